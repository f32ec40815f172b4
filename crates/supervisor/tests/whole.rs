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

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use shared::time::Clock;

const LONG: Duration = Duration::from_secs(30);

fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let begun = Clock::mono_now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(Clock::mono_now().since(begun) < LONG, "{what} did not come");
        nix::poll::poll(&mut [], 10_u16).unwrap();
    }
}

fn stub() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let stub = own.ancestors().nth(2).unwrap().join("examples/stub");
    assert!(
        stub.exists(),
        "cargo test -p supervisor builds {}",
        stub.display()
    );
    stub
}

/// A process, while it is this one and not a zombie.
fn lives(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
}

/// Children with a worker's name: pid and name.
fn workers_of(parent: u32) -> Vec<(i32, String)> {
    let pids = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let worker = |pid: i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let own = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse() == Ok(parent);
        let line = fs::read(format!("/proc/{pid}/cmdline"))
            .ok()
            .filter(|_| own)?;
        let name = String::from_utf8(line.split(|&byte| byte == 0).next()?.to_vec()).ok()?;
        name.starts_with("spanbuf: ").then_some((pid, name))
    };
    let mut workers: Vec<_> = pids.filter_map(worker).collect();
    workers.sort_by(|one, other| one.1.cmp(&other.1));
    workers
}

struct World {
    folder: tempfile::TempDir,
    children: Vec<Child>,
}

impl World {
    fn new(settings: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("run");
        let text = format!(
            "supervision.run_dir = {run_dir:?}\nsupervision.worker = {:?}\n{settings}\n",
            stub()
        );
        fs::write(folder.path().join("spanbuf.toml"), text).unwrap();
        Self {
            folder,
            children: Vec::new(),
        }
    }

    fn command(&self, program: &Path, arguments: &[&str], stub: &str) -> Command {
        let mut command = Command::new(program);
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SPANBUF_"))
        {
            command.env_remove(name);
        }
        command
            .env("STUB", stub)
            .args(arguments)
            .arg("--config")
            .arg(self.folder.path().join("spanbuf.toml"));
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str], stub: &str) -> Output {
        self.command(Path::new(env!("CARGO_BIN_EXE_supervisor")), arguments, stub)
            .output()
            .unwrap()
    }

    fn start(&mut self, arguments: &[&str], stub: &str) -> u32 {
        let command = self.command(Path::new(env!("CARGO_BIN_EXE_supervisor")), arguments, stub);
        self.spawn(command)
    }

    fn spawn(&mut self, mut command: Command) -> u32 {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("log"))
            .unwrap();
        let child = command
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let pid = child.id();
        self.children.push(child);
        pid
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) {
        send(
            i32::try_from(self.children.last().unwrap().id()).unwrap(),
            signal,
        );
    }

    /// The exit code, and how long it took from now on.
    fn wait(&mut self) -> (Option<i32>, Duration) {
        let begun = Clock::mono_now();
        let child = self.children.last_mut().unwrap();
        let status = eventually("the end of the supervisor", || child.try_wait().unwrap());
        assert_eq!(workers_of(child.id()), []);
        (status.code(), Clock::mono_now().since(begun))
    }

    fn await_workers(&self, count: usize) -> Vec<(i32, String)> {
        let pid = self.children.last().unwrap().id();
        eventually(&format!("{count} workers"), || {
            Some(workers_of(pid)).filter(|workers| workers.len() == count)
        })
    }

    fn await_said(&self, text: &str) -> String {
        eventually(text, || {
            self.log()
                .lines()
                .find(|line| line.contains(text))
                .map(str::to_owned)
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for child in &mut self.children {
            drop(child.kill());
            drop(child.wait());
        }
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

fn boards_of(pid: u32) -> usize {
    let boards = fs::read_dir("/dev/shm").unwrap().flatten();
    boards
        .filter(|board| {
            board
                .file_name()
                .to_string_lossy()
                .starts_with(&format!("spanbuf-{pid}-"))
        })
        .count()
}

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
    world.signal(Signal::SIGHUP);
    world.await_said("configuration is read at start only");
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
