//! What a machine may run out of, and what may be written where it should not: said with its cause, and the others go on.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::sys::signal::Signal;
use stand::pause;

use crate::world::{World, eventually, lives, send, workers_of};

/// Sets a soft limit of a process, as its own user.
fn limit(pid: u32, uid: u32, limit: &str) {
    let [user, group] = ["--reuid", "--regid"].map(|name| format!("{name}={uid}"));
    let set = Command::new("setpriv")
        .args([&user, &group, "--clear-groups", "prlimit", "--pid"])
        .args([&pid.to_string(), limit])
        .status();
    assert!(set.unwrap().success(), "util-linux sets limits");
}

#[test]
fn a_fork_that_fails_is_said_and_tried_again() {
    // Nobody else runs under this uid: its processes are these.
    let mut world = World::new("supervision.max_restarts = 100");
    let folder = world.folder.path().to_owned();
    fs::create_dir(folder.join("run")).unwrap();
    for path in [&folder, &folder.join("run")] {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    }
    let command = world.command(
        Path::new("setpriv"),
        &[
            "--reuid=23457",
            "--regid=23457",
            "--clear-groups",
            "--inh-caps=-all",
            env!("CARGO_BIN_EXE_supervisor"),
            "--shards",
            "0-1",
        ],
        "",
    );
    let pid = world.spawn(command);
    let before = world.await_healthy(3);
    limit(pid, 23_457, "--nproc=3:");
    send(before[0].0, Signal::SIGKILL);
    world.await_said("cause=fork_EAGAIN");
    assert!(before[1..].iter().all(|(pid, _)| lives(*pid)));
    limit(pid, 23_457, "--nproc=100:");
    world.await_shown(0, &["state=healthy", "fork_EAGAIN("]);
    assert_eq!(world.await_workers(3)[1..], before[1..]);
    world.stop_well();
}

#[test]
fn descriptors_that_run_out_stop_a_birth_and_nothing_else() {
    let mut world = World::new("supervision.max_restarts = 100");
    let pid = world.start(&["--shards", "0-1"], "");
    let before = world.await_healthy(3);
    // No new one, whatever it is for.
    limit(pid, 0, "--nofile=3:");
    send(before[0].0, Signal::SIGKILL);
    world.await_said("cause=fork_EMFILE");
    assert!(before[1..].iter().all(|(pid, _)| lives(*pid)));
    // The report comes all the same.
    world.await_shown(1, &["state=healthy"]);
    limit(pid, 0, "--nofile=256:");
    world.await_shown(0, &["state=healthy", "fork_EMFILE("]);
    assert_eq!(world.await_workers(3)[1..], before[1..]);
    world.stop_well();
}

/// A cgroup with a limit of memory, of whichever version this machine has.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(bytes: u64) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let name = format!("spanbuf-test-{}", std::process::id());
        let (folder, limit) = if root.join("memory/memory.limit_in_bytes").exists() {
            (root.join("memory").join(name), "memory.limit_in_bytes")
        } else {
            (root.join(name), "memory.max")
        };
        // The tests run as root: they make cgroups, mounts and other users' processes.
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(limit), bytes.to_string()).unwrap();
        Self(folder)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        eventually("an empty cgroup", || fs::remove_dir(&self.0).ok());
    }
}

#[test]
fn a_kill_for_memory_is_told_from_others() {
    let cgroup = Cgroup::new(96 << 20);
    let mut world = World::new("supervision.max_restarts = 100");
    let manner = world.manner("");
    let into = format!(
        "echo $$ > {:?} && exec \"$0\" \"$@\"",
        cgroup.0.join("cgroup.procs")
    );
    let command = world.command(
        Path::new("sh"),
        &[
            "-c",
            &into,
            env!("CARGO_BIN_EXE_supervisor"),
            "--shards",
            "0-1",
        ],
        &manner,
    );
    world.spawn(command);
    let before = world.await_healthy(3);
    // A kill from outside is none for memory.
    send(before[1].0, Signal::SIGKILL);
    world.await_said("cause=signal_KILL restarts=1/100");
    world.await_shown(1, &["generation=2 state=healthy"]);
    world.manner("greedy");
    world.await_said("cause=oom restarts=1/100");
    world.manner("");
    let line = world.await_shown(0, &["state=healthy", " deaths=oom("]);
    assert!(!line.contains("KILL"), "{line}");
    world.stop_well();
    drop(world);
}

#[test]
fn garbage_on_the_board_costs_one_life_at_most() {
    let mut world = World::new(
        "supervision.hang = \"3s\"\nsupervision.boot = \"6s\"\nredis.timeout = \"100ms\"\nintake.batch_time = \"1s\"",
    );
    let pid = world.start(&["--shards", "0-3", "--max-workers", "2"], "");
    world.await_healthy(3);
    let boards = fs::read_dir("/dev/shm").unwrap().flatten();
    let path = boards
        .map(|entry| entry.path())
        .find(|path| path.to_string_lossy().contains(&format!("spanbuf-{pid}-")))
        .unwrap();
    let board = File::options().write(true).open(path).unwrap();
    let length = usize::try_from(board.metadata().unwrap().len()).unwrap();
    // All of it, the head too: by some stray hand, twice with other bytes.
    for (lives, byte) in [(1, 0xff_u8), (2, 0x5a)] {
        board.write_all_at(&vec![byte; length], 0).unwrap();
        // Longer than the budget, a tick and a respawn.
        pause(Duration::from_secs(8));
        for slot in 0..3 {
            let line = world.await_shown(slot, &["state=healthy"]);
            assert!(
                (0..=lives).any(|lost| line.contains(&format!("restarts={lost}/10"))),
                "{line}"
            );
        }
        assert_eq!(workers_of(pid).len(), 3);
    }
    world.stop_well();
}
