//! A stand-in for systemd's side of `Type=notify`: its socket, its watchdog, its signals to a whole unit.

use std::{os::unix::net::UnixDatagram, path::Path, time::Duration};

use nix::sys::signal::Signal;
use shared::time::Clock;

use crate::world::{LONG, World, eventually, lives, send, workers_of};

struct Manager {
    socket: UnixDatagram,
    /// Every line that was told.
    lines: Vec<String>,
}

impl Manager {
    /// Starts the supervisor as a unit of it, on two workers.
    fn start(world: &mut World, watchdog: Duration, stub: &str) -> (Self, u32) {
        let path = world.folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let supervisor = Path::new(env!("CARGO_BIN_EXE_supervisor"));
        let mut command = world.command(supervisor, &["--shards", "0"], stub);
        command
            .env("NOTIFY_SOCKET", &path)
            .env("WATCHDOG_USEC", watchdog.as_micros().to_string())
            .env_remove("WATCHDOG_PID");
        let pid = world.spawn(command);
        let manager = Self {
            socket,
            lines: Vec::new(),
        };
        (manager, pid)
    }

    /// Takes one datagram, if one comes.
    fn hear(&mut self) -> bool {
        let mut bytes = [0; 4096];
        let Ok(length) = self.socket.recv(&mut bytes) else {
            return false;
        };
        let text = String::from_utf8(bytes[..length].to_vec()).unwrap();
        self.lines.extend(text.lines().map(str::to_owned));
        true
    }

    fn await_line(&mut self, start: &str) -> String {
        let begun = Clock::mono_now();
        loop {
            if let Some(line) = self.lines.iter().find(|line| line.starts_with(start)) {
                return line.clone();
            }
            assert!(
                Clock::mono_now().since(begun) < LONG,
                "{start}: {:?}",
                self.lines
            );
            self.hear();
        }
    }

    fn fed(&self) -> usize {
        self.lines
            .iter()
            .filter(|line| *line == "WATCHDOG=1")
            .count()
    }
}

#[test]
fn ready_is_told_once_all_were_healthy_and_stopping_with_its_time() {
    let mut world = World::new("supervision.drain = \"20s\"");
    let manner = world.manner("boot");
    let (mut manager, _) = Manager::start(&mut world, Duration::from_secs(60), &manner);
    manager.await_line("STATUS=running workers=2 starting=2");
    assert!(!manager.lines.contains(&"READY=1".to_owned()));
    world.manner("");
    manager.await_line("READY=1");
    manager.await_line("STATUS=running workers=2 healthy=2");
    // A worker's environment has nothing of it: only the unit's main process may tell.
    world.signal(Signal::SIGTERM);
    manager.await_line("STOPPING=1");
    assert_eq!(
        manager.await_line("EXTEND_TIMEOUT_USEC="),
        "EXTEND_TIMEOUT_USEC=25000000"
    );
    assert_eq!(world.wait().0, Some(0));
    while manager.hear() {}
    let ready = manager.lines.iter().filter(|line| *line == "READY=1");
    assert_eq!(ready.count(), 1, "{:?}", manager.lines);
}

#[test]
fn a_supervisor_that_stands_still_feeds_no_watchdog_and_its_unit_is_killed() {
    let watchdog = Duration::from_secs(2);
    let mut world = World::new("");
    let (mut manager, pid) = Manager::start(&mut world, watchdog, "");
    manager.await_line("READY=1");
    let fed = manager.fed();
    eventually("three more meals", || {
        manager.hear();
        (manager.fed() >= fed + 3).then_some(())
    });
    let workers = workers_of(pid);
    send(i32::try_from(pid).unwrap(), Signal::SIGSTOP);
    while manager.hear() {}
    let begun = Clock::mono_now();
    while Clock::mono_now().since(begun) < watchdog {
        assert!(!manager.hear(), "{:?}", manager.lines);
    }
    // The watchdog has run out: the main process gets ABRT, the rest of the unit KILL, as KillMode=mixed has it.
    world.signal(Signal::SIGABRT);
    world.signal(Signal::SIGKILL);
    eventually("the end of all workers", || {
        workers.iter().all(|(pid, _)| !lives(*pid)).then_some(())
    });
    world.wait();
    // And the next start is clean.
    world.start(&["--shards", "0"], "");
    world.await_workers(2);
    world.signal(Signal::SIGTERM);
    assert_eq!(world.wait().0, Some(0));
}

#[test]
fn signals_to_the_whole_unit_drain_it_once() {
    let mut world = World::new("");
    let (mut manager, pid) = Manager::start(&mut world, Duration::from_secs(60), "");
    manager.await_line("READY=1");
    let workers = workers_of(pid);
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
        for (worker, _) in &workers {
            send(*worker, signal);
        }
    }
    assert_eq!(workers_of(pid), workers);
    // As `systemctl kill` does: everybody gets it.
    for (worker, _) in &workers {
        send(*worker, Signal::SIGINT);
    }
    world.signal(Signal::SIGINT);
    assert_eq!(world.wait().0, Some(0), "{}", world.log());
    assert_eq!(world.said("cause=signal"), 0, "{}", world.log());
}
