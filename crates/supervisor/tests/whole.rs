//! The built supervisor with stubs for workers: what it promises without a Kafka or a Redis.
//!
//! In:     command lines, signals, deaths.
//! Out:    exit codes, what is said, which processes there are.
//! Keeps:  each test has a run directory of its own; whatever it started ends with it.
//! Source: docs/supervision.md 1, 3, 4, 5.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "helpers of a test fail loudly"
)]

mod faults;
mod figures;
mod limits;
mod systemd;
mod world;

use std::{fs, path::Path, time::Duration};

use nix::sys::signal::Signal;
use shared::time::Clock;

use crate::world::{World, boards_of, eventually, lives, send};

#[test]
fn workers_are_started_shown_and_drained() {
    let mut world = World::new("");
    let pid = world.start(&["--shards", "0,2,4-6", "--max-workers", "2"], "");
    let workers = world.await_workers(3);
    let names: Vec<&str> = workers.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "spanbuf: flush 0 shards 0,4,6",
            "spanbuf: flush 1 shards 2,5",
            "spanbuf: ingest 0 shards 0,2,4-6"
        ]
    );
    assert_eq!(boards_of(pid), 1);
    world.await_said("assigned slot=1 role=flush index=1 shards=2,5");
    world.await_said("supervision.shards=0,2,4-6");
    for slot in 0..3 {
        world.await_said(&format!("changed slot={slot} "));
    }
    world.signal(Signal::SIGUSR1);
    world.await_said("summary workers=3 mode=running healthy=3 ");
    for (slot, (pid, name)) in workers.iter().enumerate() {
        let line = world.await_said(&format!("worker slot={slot} "));
        let shards = name.rsplit_once(' ').unwrap().1;
        for word in [
            format!("shards={shards} "),
            format!("pid={pid} "),
            "state=healthy ".into(),
            "restarts=0/10 ".into(),
            "generation=1 ".into(),
            "phase=idle ".into(),
        ] {
            assert!(line.contains(&word), "{word}: {line}");
        }
    }
    // What goes to a whole group does not end workers.
    for signal in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ] {
        workers.iter().for_each(|(pid, _)| send(*pid, signal));
    }
    assert_eq!(world.await_workers(3), workers);
    world.signal(Signal::SIGTERM);
    assert_eq!(world.wait().0, Some(0));
    assert_eq!(boards_of(pid), 0);
    assert!(!world.log().contains("died"), "{}", world.log());
}

#[test]
fn more_workers_than_shards_are_capped_and_said() {
    let mut world = World::new("");
    world.start(
        &[
            "--shards",
            "3",
            "--max-workers",
            "5",
            "--ingest-workers",
            "2",
        ],
        "",
    );
    world.await_workers(2);
    world.await_said("more flush workers than shards asked=5 shards=1 workers=1");
    world.await_said("more ingest workers than shards asked=2 shards=1 workers=1");
    world.signal(Signal::SIGINT);
    assert_eq!(world.wait().0, Some(0));
}

#[test]
fn a_dead_worker_is_replaced_and_leaves_nothing() {
    // Noticed by its handle, long before the next tick.
    let mut world = World::new("supervision.tick = \"10s\"");
    world.start(&["--shards", "0-1"], "");
    let before = world.await_workers(3);
    let killed = Clock::mono_now();
    send(before[0].0, Signal::SIGKILL);
    eventually("another pid", || {
        world
            .await_workers(3)
            .iter()
            .all(|worker| *worker != before[0])
            .then_some(())
    });
    assert!(Clock::mono_now().since(killed) < Duration::from_secs(4));
    world.await_said("cause=signal_KILL restarts=1/10 wait=0ms");
    world.await_said("generation=2 pid=");
    assert!(!Path::new(&format!("/proc/{}", before[0].0)).exists());
    world.signal(Signal::SIGUSR1);
    let line = world.await_said("worker slot=0 ");
    assert!(
        line.contains("restarts=1/10 failures=1 deaths=signal_KILL("),
        "{line}"
    );
    world.signal(Signal::SIGUSR2);
    world.await_said("failures are forgotten");
    world.signal(Signal::SIGTERM);
    assert_eq!(world.wait().0, Some(0));
}

#[test]
fn a_worker_that_ends_unasked_reaches_its_cap() {
    let mut world = World::new("supervision.max_restarts = 2\nsupervision.tick = \"10s\"");
    world.start(&["--shards", "0"], "exit:0");
    assert_eq!(world.wait().0, Some(70));
    world.await_said("cause=exit_0 restarts=3/2");
}

#[test]
fn a_worker_that_refuses_its_configuration_ends_all_at_once() {
    let mut world = World::new("");
    world.start(&["--shards", "0"], "exit:78");
    let (code, took) = world.wait();
    assert_eq!(code, Some(78));
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert!(!world.log().contains("generation=2"), "{}", world.log());
}

#[test]
fn eight_workers_that_ignore_term_end_within_the_deadline() {
    let mut world = World::new("supervision.drain = \"1s\"\nsupervision.tick = \"2s\"");
    world.start(&["--shards", "0-6"], "deaf");
    world.await_workers(8);
    (0..8).for_each(|slot| drop(world.await_said(&format!("changed slot={slot} "))));
    world.signal(Signal::SIGTERM);
    let (code, took) = world.wait();
    assert_eq!(code, Some(75));
    assert!(
        took >= Duration::from_millis(900) && took < Duration::from_secs(3),
        "{took:?}"
    );
    world.await_said("workers had to be killed count=8");
}

#[test]
fn a_second_term_ends_at_once() {
    let mut world = World::new("supervision.drain = \"20s\"");
    world.start(&["--shards", "0"], "deaf");
    world.await_workers(2);
    (0..2).for_each(|slot| drop(world.await_said(&format!("changed slot={slot} "))));
    world.signal(Signal::SIGTERM);
    world.await_said("draining for=");
    world.signal(Signal::SIGTERM);
    let (code, took) = world.wait();
    assert_eq!(code, Some(75));
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn workers_die_with_their_supervisor_and_the_next_one_starts_cleanly() {
    let mut world = World::new("");
    let pid = world.start(&["--shards", "0-3", "--max-workers", "2"], "deaf");
    let workers = world.await_workers(3);
    world.signal(Signal::SIGKILL);
    let begun = Clock::mono_now();
    eventually("the end of all workers", || {
        workers.iter().all(|(pid, _)| !lives(*pid)).then_some(())
    });
    assert!(Clock::mono_now().since(begun) < Duration::from_secs(1));
    world.wait();
    assert_eq!(boards_of(pid), 1);
    world.start(&["--shards", "0-3", "--max-workers", "4"], "");
    world.await_workers(5);
    assert_eq!(boards_of(pid), 0);
    world.signal(Signal::SIGTERM);
    assert_eq!(world.wait().0, Some(0));
}

#[test]
fn a_held_run_directory_is_waited_for_and_then_refused() {
    let mut world = World::new("supervision.reap_limit = \"500ms\"");
    let first = world.start(&["--shards", "0"], "");
    world.await_workers(2);
    let begun = Clock::mono_now();
    let output = world.run(&["--shards", "0"], "");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(71), "{text}");
    assert!(Clock::mono_now().since(begun) >= Duration::from_millis(500));
    assert!(
        text.contains(&format!("pid={first} (")) && text.contains("(spanbuf: flush 0 shards 0)"),
        "{text}"
    );
    // A check takes no lock.
    assert_eq!(
        world.run(&["--shards", "0", "--check"], "").status.code(),
        Some(0)
    );
}

#[test]
fn a_stop_ends_the_wait_for_the_run_directory() {
    let mut world = World::new("supervision.reap_limit = \"25s\"");
    world.start(&["--shards", "0"], "");
    world.await_workers(2);
    world.start(&["--shards", "0"], "");
    world.await_said("run directory is held, waiting");
    world.signal(Signal::SIGTERM);
    assert_eq!(world.wait().0, Some(0));
}

#[test]
fn a_stuck_reader_of_its_log_stops_nobody() {
    let mut world = World::new("");
    // Not the log file: a pipe that nobody reads.
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = world.command(
        Path::new(env!("CARGO_BIN_EXE_supervisor")),
        &["--shards", "0"],
        "",
    );
    world.children.push(command.stderr(writer).spawn().unwrap());
    drop(command);
    let before = world.await_workers(2);
    // More than a pipe takes.
    for _ in 0..200 {
        world.signal(Signal::SIGUSR1);
        nix::poll::poll(&mut [], 3_u16).unwrap();
    }
    send(before[0].0, Signal::SIGKILL);
    eventually("another pid", || {
        world
            .await_workers(2)
            .iter()
            .all(|worker| *worker != before[0])
            .then_some(())
    });
    world.signal(Signal::SIGTERM);
    assert_eq!(world.wait().0, Some(0));
    drop(reader);
}

#[test]
fn a_wrapper_that_ignores_sigchld_and_term_changes_nothing() {
    let mut world = World::new("");
    let mut command = world.command(
        Path::new("/bin/sh"),
        &[
            "-c",
            "trap '' CHLD TERM; exec \"$0\" \"$@\"",
            env!("CARGO_BIN_EXE_supervisor"),
            "--shards",
            "0",
        ],
        "",
    );
    command.env("NOTIFY_SOCKET", "/nowhere");
    world.spawn(command);
    let before = world.await_workers(2);
    let environment = fs::read(format!("/proc/{}/environ", before[0].0)).unwrap();
    assert!(!String::from_utf8_lossy(&environment).contains("NOTIFY_SOCKET"));
    let status = fs::read_to_string(format!("/proc/{}/status", before[0].0)).unwrap();
    // HUP, INT, USR1, USR2 (and what the stub's runtime adds: PIPE).
    assert!(status.contains("SigIgn:\t0000000000001a03"), "{status}");
    send(before[0].0, Signal::SIGABRT);
    world.await_said("cause=signal_ABRT");
    world.await_workers(2);
    world.signal(Signal::SIGTERM);
    assert_eq!(world.wait().0, Some(0));
}

#[test]
fn a_check_prints_what_is_in_force_and_takes_over_the_exit_code() {
    let world = World::new("");
    for (stub, code) in [("", 0), ("exit:78", 78), ("exit:71", 71), ("exit:3", 71)] {
        let output = world.run(&["--shards", "0-3", "--check"], stub);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(code), "{stub}");
        assert!(
            text.contains("supervision.shards = 0-3\n") && text.contains("ok: stub\n"),
            "{text}"
        );
    }
    assert!(!world.folder.path().join("run").exists());
}

#[test]
fn a_check_ends_when_asked() {
    let mut world = World::new("");
    world.start(&["--shards", "0", "--check"], "deaf");
    world.await_said("ok: stub");
    world.signal(Signal::SIGINT);
    let (code, took) = world.wait();
    assert_eq!(code, Some(75));
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn what_is_wrong_from_the_start_has_its_exit_code() {
    let world = World::new("");
    let output = world.run(&["--max-workers", "0"], "");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        (output.status.code(), text.lines().count()),
        (Some(2), 1),
        "{text}"
    );

    let world = World::new("supervision.tik = \"1s\"\nredis.timeout = \"never\"");
    for arguments in [&["--check", "--shards", "0"][..], &["--shards", "0"]] {
        let output = world.run(arguments, "");
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{text}");
        assert!(
            text.contains("tik") && text.contains("redis.timeout") && text.lines().count() == 2,
            "{text}"
        );
    }

    let world = World::new("");
    fs::write(
        world.folder.path().join("spanbuf.toml"),
        "supervision.worker = \"/no/such/worker\"",
    )
    .unwrap();
    let output = world.run(&["--shards", "0"], "");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("path=/no/such/worker"), "{text}");
}
