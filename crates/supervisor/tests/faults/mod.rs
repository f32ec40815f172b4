//! The faults of docs/supervision.md 5 that are the supervisor's own, by number, and what else was seen to go wrong.
//!
//! Not here: 6, 10 (its backlog), 12, 13, 14, 16, 18, which stand beside the other promises in whole.rs under their own names; 8,
//! which wants a real worker and a broker.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::signal::Signal;
use shared::time::Clock;
use stand::step::ClockStep;

use crate::world::{World, boards_of, eventually, lives, send, workers_of};

/// The shortest budget that the configuration lets through.
const HANG: Duration = Duration::from_secs(3);
const SHORT: &str = "supervision.hang = \"3s\"\nsupervision.boot = \"6s\"\nredis.timeout = \"100ms\"\nintake.batch_time = \"1s\"";
const TICK: Duration = Duration::from_millis(250);
/// What a busy machine adds to a moment that is measured from outside.
const SLACK: Duration = Duration::from_secs(1);

fn await_gone(pid: i32) {
    eventually(&format!("the end of pid={pid}"), || {
        (!Path::new(&format!("/proc/{pid}")).exists()).then_some(())
    });
}

#[test]
fn fault_01_old_and_new_never_work_side_by_side() {
    // Whoever still holds the run directory of a dead supervisor is waited for, whatever the number of workers is now.
    let mut world = World::new("");
    world.start(&["--shards", "0-3", "--max-workers", "2"], "");
    world.await_workers(3);
    world.stop_well();
    let held = File::open(world.folder.path().join("run/lock")).unwrap();
    held.lock().unwrap();
    let pid = world.start(&["--shards", "0-3", "--max-workers", "4"], "");
    world.await_said("run directory is held, waiting");
    assert_eq!(workers_of(pid), []);
    drop(held);
    let before = world.await_workers(5);
    // And within one life: the old process is reaped before the new one is there.
    for round in 2..5 {
        let (old, name) = world.await_workers(5)[0].clone();
        send(old, Signal::SIGKILL);
        world.await_said(&format!("generation={round} pid="));
        assert!(!Path::new(&format!("/proc/{old}")).exists(), "{name}");
    }
    assert_eq!(world.await_workers(5)[1..], before[1..]);
    world.stop_well();
}

#[test]
fn fault_02_a_new_worker_is_not_judged_by_the_old_ones_heartbeat() {
    let mut world = World::new(SHORT);
    world.start(&["--shards", "0"], "");
    let hung = world.await_workers(2)[0].0;
    world.await_shown(0, &["state=healthy"]);
    send(hung, Signal::SIGSTOP);
    await_gone(hung);
    // Its successor lives for longer than what the old beat's age would have allowed.
    let line = world.await_shown(0, &["generation=2 state=healthy state_age=4."]);
    assert!(line.contains("failures=1 deaths=hang_idle("), "{line}");
    world.stop_well();
}

#[test]
fn fault_03_ten_restarts_are_ten() {
    let mut world = World::new("supervision.max_restarts = 3\nsupervision.stable = \"1s\"");
    world.start(&["--shards", "0"], "exit:1");
    assert_eq!(world.wait().0, Some(70));
    // The first start and three restarts, of either worker at most; the counter was not reset by any of them.
    let starts = (0..2).map(|slot| world.said(&format!("started slot={slot} ")));
    assert_eq!(starts.max(), Some(4), "{}", world.log());
    world.await_said("cause=exit_1 restarts=4/3");
}

#[test]
fn fault_04_two_that_hang_at_once_are_both_handled() {
    let mut world = World::new(SHORT);
    world.start(&["--shards", "0-2"], "");
    let workers = world.await_healthy(4);
    let begun = Clock::mono_now();
    for (pid, _) in &workers[..2] {
        send(*pid, Signal::SIGSTOP);
    }
    for (pid, _) in &workers[..2] {
        await_gone(*pid);
    }
    let took = Clock::mono_now().since(begun);
    assert!(took >= HANG && took < HANG + 2 * TICK + SLACK, "{took:?}");
    (0..2).for_each(|slot| {
        drop(world.await_shown(slot, &["generation=2 state=healthy", "deaths=hang_idle("]));
    });
    assert_eq!(world.await_workers(4)[2..], workers[2..]);
    // What was seen of them before they were killed.
    world.await_said("hung slot=0 role=flush index=0 shards=0 generation=1");
    let line = world.await_said("status State=");
    assert!(line.contains("State=T_(stopped)"), "{line}");
    world.await_said(" wchan=");
    world.stop_well();
}

#[test]
fn fault_05_a_death_during_boot_is_noticed_at_once() {
    let mut world = World::new("supervision.tick = \"10s\"\nsupervision.boot = \"60s\"");
    world.start(&["--shards", "0"], "boot");
    let mut quickest = Duration::MAX;
    for death in 1..4 {
        let (pid, _) = world.await_workers(2)[0].clone();
        let begun = Clock::mono_now();
        send(pid, Signal::SIGKILL);
        eventually("word of its death", || {
            (world.said(&format!("cause=signal_KILL restarts={death}/10")) > 0).then_some(())
        });
        quickest = quickest.min(Clock::mono_now().since(begun));
    }
    assert!(quickest < Duration::from_millis(50), "{quickest:?}");
    world.stop_well();
}

#[test]
fn fault_05_a_boot_that_never_ends_is_ended() {
    let mut world = World::new(SHORT);
    let manner = world.manner("mute");
    world.start(&["--shards", "0"], &manner);
    world.await_said("cause=boot_timeout restarts=1/10");
    world.manner("");
    for slot in 0..2 {
        world.await_shown(slot, &["state=healthy", "deaths=boot_timeout("]);
    }
    world.stop_well();
}

#[test]
fn fault_07_health_does_not_wait_for_a_message() {
    // Nothing ever comes in here: a death, and a hang, are noticed all the same.
    let mut world = World::new(SHORT);
    world.start(&["--shards", "0"], "");
    let workers = world.await_workers(2);
    world.await_shown(1, &["state=healthy"]);
    send(workers[0].0, Signal::SIGABRT);
    send(workers[1].0, Signal::SIGSTOP);
    world.await_shown(0, &["generation=2 state=healthy", "deaths=signal_ABRT("]);
    world.await_shown(1, &["generation=2 state=healthy", "deaths=hang_idle("]);
    world.stop_well();
}

#[test]
fn fault_09_a_clock_step_kills_nobody() {
    // The wall clock of supervisor and workers is what a file says; the machine's own is left alone.
    let mut world = World::new(SHORT);
    let step = ClockStep::new().unwrap();
    let supervisor = Path::new(env!("CARGO_BIN_EXE_supervisor"));
    let mut command = world.command(supervisor, &["--shards", "0-1"], "");
    command.envs(step.environment());
    world.spawn(command);
    let workers = world.await_healthy(3);
    // The day as the supervisor's own records have it: the step is seen, and changes nothing else.
    let mut said = 0;
    let mut day = |world: &World| {
        const RECORD: &str = "failures are forgotten";
        world.signal(Signal::SIGUSR2);
        eventually("a record", || (world.said(RECORD) > said).then_some(()));
        said = world.said(RECORD);
        let log = world.log();
        let line = log.lines().rfind(|line| line.contains(RECORD)).unwrap();
        line[..10].to_owned()
    };
    let mut days = vec![day(&world)];
    for (seconds, age) in [(86_400_i64, "state_age=4."), (-86_400, "state_age=8.")] {
        step.set(seconds).unwrap();
        (0..3).for_each(|slot| drop(world.await_shown(slot, &["state=healthy", age])));
        days.push(day(&world));
    }
    assert!(days[2] < days[0] && days[0] < days[1], "{days:?}");
    assert_eq!(world.await_workers(3), workers);
    assert_eq!(world.said("cause="), 0, "{}", world.log());
    world.stop_well();
}

#[test]
fn fault_10_a_backlog_is_no_hang_and_a_pause_of_all_kills_nobody() {
    let mut world = World::new(SHORT);
    let manner = world.manner("pressed");
    let supervisor = i32::try_from(world.start(&["--shards", "0"], &manner)).unwrap();
    let workers = world.await_workers(2);
    // Backpressure for longer than the budget.
    for slot in 0..2 {
        world.await_shown(slot, &["state=backpressured state_age=4."]);
    }
    // The whole machine stands still, supervisor included: that says nothing of the workers.
    let everybody = [supervisor, workers[0].0, workers[1].0];
    everybody.iter().for_each(|pid| send(*pid, Signal::SIGSTOP));
    let begun = Clock::mono_now();
    eventually("more than the budget", || {
        (Clock::mono_now().since(begun) > HANG + Duration::from_secs(1)).then_some(())
    });
    everybody.iter().for_each(|pid| send(*pid, Signal::SIGCONT));
    world.await_said("a turn is late by=");
    world.manner("");
    for slot in 0..2 {
        world.await_shown(slot, &["state=healthy"]);
    }
    assert_eq!(world.await_workers(2), workers);
    world.stop_well();
}

#[test]
fn fault_11_strangers_are_reaped_by_a_supervisor_that_is_pid_1() {
    let mut world = World::new("");
    let mut command = world.command(
        Path::new("unshare"),
        &[
            "--pid",
            "--fork",
            "--kill-child",
            env!("CARGO_BIN_EXE_supervisor"),
            "--shards",
            "0",
        ],
        "orphan",
    );
    command.stdin(std::process::Stdio::null());
    let unshare = world.spawn(command);
    // Its workers are grandchildren of ours, and what they leave behind is the supervisor's to reap.
    let supervisor = eventually("the supervisor", || {
        let text = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).ok()?;
        text.trim().parse::<u32>().ok()
    });
    eventually("two workers", || {
        (workers_of(supervisor).len() == 2).then_some(())
    });
    let children = || {
        let text = fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"));
        text.unwrap_or_default().split_whitespace().count()
    };
    eventually("orphans at the supervisor", || {
        (children() > 2).then_some(())
    });
    eventually("no child but the workers", || {
        (children() == 2).then_some(())
    });
    // And no worker's status was eaten on the way.
    send(workers_of(supervisor)[0].0, Signal::SIGABRT);
    world.await_said("cause=signal_ABRT restarts=1/10");
    let supervisor = i32::try_from(supervisor).unwrap();
    send(supervisor, Signal::SIGTERM);
    assert_eq!(world.wait().0, Some(0), "{}", world.log());
}

#[test]
fn a_container_needs_a_run_directory_and_a_little_shared_memory() {
    // PID 1, another uid without capabilities, a read-only root, 256 KiB of /dev/shm.
    let mut world = World::new("");
    let folder = world.folder.path().to_owned();
    fs::create_dir(folder.join("run")).unwrap();
    fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let script = format!(
        "mount -t tmpfs -o size=256k,mode=1777 none /dev/shm && mount -t tmpfs -o mode=1777 none {:?} && \
         mount -o remount,bind,ro / && \
         exec setpriv --reuid=12345 --regid=12345 --clear-groups --inh-caps=-all --no-new-privs \"$0\" \"$@\"",
        folder.join("run")
    );
    let mut command = world.command(
        Path::new("unshare"),
        &[
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            &script,
            env!("CARGO_BIN_EXE_supervisor"),
            "--shards",
            "0-31",
            "--max-workers",
            "8",
        ],
        "",
    );
    command.current_dir("/");
    let unshare = world.spawn(command);
    let supervisor = eventually("the supervisor", || {
        let text = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).ok()?;
        text.trim().parse::<u32>().ok()
    });
    eventually("nine workers", || {
        (workers_of(supervisor).len() == 9).then_some(())
    });
    let status = fs::read_to_string(format!("/proc/{supervisor}/status")).unwrap();
    assert!(
        status.contains("Uid:\t12345") && status.contains("CapEff:\t0000000000000000"),
        "{status}"
    );
    let (worker, _) = workers_of(supervisor)[0].clone();
    send(worker, Signal::SIGKILL);
    world.await_said("cause=signal_KILL restarts=1/10");
    eventually("nine workers again", || {
        (workers_of(supervisor).len() == 9).then_some(())
    });
    (0..9).for_each(|slot| drop(world.await_said(&format!("changed slot={slot} "))));
    send(i32::try_from(supervisor).unwrap(), Signal::SIGTERM);
    assert_eq!(world.wait().0, Some(0), "{}", world.log());
}

#[test]
fn fault_15_nothing_to_run_is_an_error() {
    let world = World::new("");
    for (arguments, code) in [
        (&["--shards", "0", "--max-workers", "0"][..], 2),
        (&["--shards", "0", "--ingest-workers", "0"], 2),
        (&["--shards", ""], 2),
        (&[], 78),
    ] {
        let output = world.run(arguments, "");
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn fault_17_a_board_whose_name_is_removed_serves_on() {
    let mut world = World::new("");
    let pid = world.start(&["--shards", "0"], "");
    let workers = world.await_workers(2);
    let boards = fs::read_dir("/dev/shm").unwrap().flatten();
    let board: PathBuf = boards
        .map(|entry| entry.path())
        .find(|path| path.to_string_lossy().contains(&format!("spanbuf-{pid}-")))
        .unwrap();
    fs::remove_file(board).unwrap();
    assert_eq!(boards_of(pid), 0);
    send(workers[0].0, Signal::SIGKILL);
    world.await_shown(0, &["generation=2 state=healthy"]);
    world.stop_well();
}

#[test]
fn fault_17_a_full_dev_shm_is_a_clear_error() {
    let world = World::new("");
    let script = "mount -t tmpfs -o size=4k none /dev/shm && exec \"$0\" \"$@\"";
    let output = world
        .command(
            Path::new("unshare"),
            &[
                "--mount",
                "sh",
                "-c",
                script,
                env!("CARGO_BIN_EXE_supervisor"),
                "--shards",
                "0-31",
            ],
            "",
        )
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(71), "{text}");
    assert!(text.contains("/dev/shm"), "{text}");
}

#[test]
fn a_worker_that_cannot_be_executed_or_forked_is_said_with_its_errno() {
    let mut world = World::new("supervision.max_restarts = 1");
    let worker = world.folder.path().join("worker");
    fs::write(&worker, "no program\n").unwrap();
    fs::set_permissions(&worker, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let config = fs::read_to_string(world.folder.path().join("spanbuf.toml")).unwrap();
    let own = format!("supervision.worker = {:?}", crate::world::stub());
    let text = config.replace(&own, &format!("supervision.worker = {worker:?}"));
    assert_ne!(text, config);
    fs::write(world.folder.path().join("spanbuf.toml"), text).unwrap();
    world.start(&["--shards", "0"], "");
    assert_eq!(world.wait().0, Some(70));
    world.await_said("cause=exec_ENOEXEC restarts=2/1");
}

#[test]
fn isolation_leaves_the_others_at_work() {
    let mut world = World::new("supervision.policy = \"isolate\"");
    let manner = world.manner("");
    world.start(&["--shards", "0-1"], &manner);
    let workers = world.await_healthy(3);
    world.manner("exit:78");
    // All of them end; with the manner of before, the others would go on: it is the policy that is looked at here.
    for slot in 0..3 {
        world.await_shown(slot, &["state=failed", "deaths=exit_78("]);
    }
    world.manner("");
    world.signal(Signal::SIGUSR2);
    let again = world.await_workers(3);
    assert!(again.iter().all(|worker| !workers.contains(worker)));
    for slot in 0..3 {
        world.await_shown(slot, &["state=healthy", "restarts=0/10"]);
    }
    world.stop_well();
}

#[test]
fn a_hang_signal_leaves_its_mark_and_the_hang_is_what_counts() {
    let mut world = World::new(&format!("{SHORT}\nsupervision.hang_signal = \"ABRT\""));
    world.start(&["--shards", "0"], "");
    let (pid, _) = world.await_workers(2)[0].clone();
    world.await_shown(0, &["state=healthy"]);
    send(pid, Signal::SIGSTOP);
    // A stopped process takes no ABRT: after the grace it is killed.
    world.await_shown(0, &["state=hung"]);
    await_gone(pid);
    world.await_shown(
        0,
        &["generation=2 state=healthy", "failures=1 deaths=hang_idle("],
    );
    world.stop_well();
}

#[test]
fn a_report_is_written_as_json_as_a_whole() {
    let folder = tempfile::tempdir().unwrap();
    let dump = folder.path().join("dump.json");
    let mut world = World::new(&format!("supervision.dump = {dump:?}"));
    let pid = world.start(&["--shards", "0-3", "--max-workers", "2"], "");
    world.await_workers(3);
    world.await_shown(2, &["state=healthy"]);
    let text = fs::read_to_string(&dump).unwrap();
    for part in [
        &format!("\"supervisor\":{pid},\"mode\":\"running\""),
        "\"shards\":\"0,2\"",
        "\"state\":\"healthy\"",
        "\"gap_percent\":0",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    world.stop_well();
}

#[test]
fn a_new_configuration_replaces_the_workers_one_at_a_time() {
    let mut world = World::new("");
    world.start(&["--shards", "0-1"], "");
    let before = world.await_healthy(3);
    world.configure("supervision.max_restarts = 7");
    world.signal(Signal::SIGHUP);
    world.await_said("all workers have the new configuration");
    let after = world.await_workers(3);
    assert!(after.iter().all(|worker| !before.contains(worker)));
    for slot in 0..3 {
        world.await_shown(
            slot,
            &[
                "generation=2 state=healthy",
                "restarts=0/7 failures=0 deaths=- ",
            ],
        );
    }
    // The next was asked to go only when the one before was Healthy.
    let log = world.log();
    let order: Vec<&str> = log
        .lines()
        .filter_map(|line| {
            let said = ["started slot=", "replaced slot="];
            said.iter().find(|text| line.contains(**text)).copied()
        })
        .skip(3)
        .collect();
    assert_eq!(
        order,
        ["started slot=", "replaced slot="].repeat(3),
        "{log}"
    );
    world.stop_well();
}

#[test]
fn a_configuration_that_is_wrong_or_fixed_for_life_is_refused_by_name() {
    let mut world = World::new("supervision.ingest_workers = 1");
    world.start(&["--shards", "0-3"], "");
    let before = world.await_healthy(5);
    for (settings, said) in [
        ("supervision.tik = \"1s\"", "did you mean supervision.tick"),
        (
            "supervision.max_workers = 2",
            "supervision.max_workers is fixed for the life of a supervisor",
        ),
        (
            "supervision.ingest_workers = 2",
            "supervision.ingest_workers is fixed for the life of a supervisor",
        ),
        (
            "redis.buckets = 4",
            "redis.buckets is fixed for the life of a supervisor",
        ),
    ] {
        world.configure(settings);
        let refused = world.said("the old one stays in force");
        world.signal(Signal::SIGHUP);
        world.await_said(said);
        eventually("a refusal", || {
            (world.said("the old one stays in force") > refused).then_some(())
        });
    }
    assert_eq!(world.await_workers(5), before);
    world.stop_well();
}

#[test]
fn a_new_configuration_that_does_not_work_stops_at_the_first_worker() {
    let mut world = World::new("");
    let manner = world.manner("");
    world.start(&["--shards", "0-1"], &manner);
    let before = world.await_healthy(3);
    // Another binary, as an upgrade may leave it: it is opened anew, and does not work.
    let config = world.folder.path().join("spanbuf.toml");
    let own = format!("supervision.worker = {:?}", crate::world::stub());
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        text.replace(&own, "supervision.worker = \"/bin/false\""),
    )
    .unwrap();
    world.signal(Signal::SIGHUP);
    world.await_said("no more are replaced slot=0 ");
    world.await_shown(0, &["deaths=exit_1("]);
    assert!(before[1..].iter().all(|(pid, _)| lives(*pid)));
    // Mended, and tried again.
    fs::write(&config, text).unwrap();
    world.signal(Signal::SIGHUP);
    world.await_said("all workers have the new configuration");
    for slot in 0..3 {
        world.await_shown(slot, &["state=healthy"]);
    }
    world.stop_well();
}
