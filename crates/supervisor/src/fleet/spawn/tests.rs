//! Tests of spawning, on real processes.

use std::{
    fs,
    os::unix::process::CommandExt,
    process::Command,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, poll};
use shared::{
    board::{BoardOwner, Cause},
    time::Clock,
};

use super::*;
use crate::fleet::{reap, stop};

/// Boards of one process share their name, and strangers are anybody's children: one test at a time makes some.
static ONE: Mutex<()> = Mutex::new(());

pub(crate) fn with_board(test: impl FnOnce(&BoardOwner)) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let board = BoardOwner::create(&"0".parse().unwrap(), 1).unwrap();
    board.board().supervise(0).begin(1);
    test(&board);
}

/// A shell whose script stands where a worker finds its launch record.
pub(crate) fn shell(
    script: &str,
    board: &BoardOwner,
    inherited: &[BorrowedFd<'_>],
) -> Result<Child, SpawnError> {
    let spawner = Spawner::new(Path::new("/bin/sh"), std::env::vars_os()).unwrap();
    let birth = Birth {
        name: "spanbuf: flush 0 shards 0",
        record: script.as_bytes(),
        inherited,
    };
    spawner.spawn(&birth, &board.board().supervise(0))
}

pub(crate) fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let begun = Clock::mono_now();
    while !check() {
        assert!(
            Clock::mono_now().since(begun) < Duration::from_secs(20),
            "{what} did not come"
        );
        poll(&mut [], 5_u16).unwrap();
    }
}

pub(crate) fn name(child: &Child) -> String {
    String::from_utf8_lossy(&fs::read(format!("/proc/{}/cmdline", child.pid)).unwrap())
        .replace('\0', "")
}

/// Waits for the end without reaping.
fn await_end(pidfd: &OwnedFd) {
    assert_eq!(
        poll(
            &mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)],
            20_000_u16
        ),
        Ok(1)
    );
}

fn end(child: &Child) -> Cause {
    await_end(&child.pidfd);
    reap::reap(child).unwrap()
}

#[test]
fn causes_are_read_from_the_raw_status() {
    with_board(|board| {
        let rows = [
            ("exit 0", "exit_0"),
            ("exit 78", "exit_78"),
            ("kill -KILL $$", "signal_KILL"),
            ("kill -TERM $$", "signal_TERM"),
            ("kill -37 $$", "signal_RTMIN+3"),
        ];
        for (script, cause) in rows {
            assert_eq!(
                end(&shell(script, board, &[]).unwrap()).to_string(),
                cause,
                "{script}"
            );
        }
    });
}

#[test]
fn a_worker_begins_clean_whatever_its_supervisor_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("status");
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    mask.thread_block().unwrap();
    with_board(|board| {
        // By words of its own: while it forks, a shell blocks everything.
        let script = format!(
            "while read -r line; do echo \"$line\"; done </proc/$$/status >{0}; read -r line </proc/$$/stat; echo \"$line\" >>{0}",
            path.display()
        );
        let child = shell(&script, board, &[]).unwrap();
        assert_eq!(end(&child), Cause::Exit(0));
        let said = fs::read_to_string(&path).unwrap();
        let bits = |what: &str| {
            let line = said
                .lines()
                .find_map(|line| line.strip_prefix(what))
                .unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        let ignored: u64 = IGNORED
            .iter()
            .map(|signal| 1_u64 << (*signal as u32 - 1))
            .sum();
        assert_eq!((bits("SigBlk:"), bits("SigIgn:")), (0, ignored), "{said}");
        // Its own session: the sixth field, the first behind the name being the third.
        let session = said
            .lines()
            .find_map(|line| line.rsplit_once(") ")?.1.split_whitespace().nth(3))
            .unwrap();
        assert_eq!(session, child.pid.to_string());
    });
    // Ours is as before.
    let mut now = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_SETMASK, None, Some(&mut now)).unwrap();
    assert!(now.contains(Signal::SIGTERM) && !now.contains(Signal::SIGUSR1));
}

#[test]
fn a_signal_before_exec_is_not_swallowed() {
    with_board(|board| {
        for _ in 0..50 {
            let child = shell("exec sleep 600", board, &[]).unwrap();
            stop::terminate(&child);
            assert_eq!(end(&child), Cause::Signal(libc::SIGTERM));
        }
    });
}

#[test]
fn a_child_that_cannot_execute_says_why_in_its_slot() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("worker");
    fs::write(&path, "no program").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    with_board(|board| {
        let spawner = Spawner::new(&path, std::iter::empty()).unwrap();
        let birth = Birth {
            name: "spanbuf: flush 0 shards 0",
            record: b"",
            inherited: &[],
        };
        let child = spawner.spawn(&birth, &board.board().supervise(0)).unwrap();
        assert_eq!(end(&child), Cause::Exit(NOT_EXECUTED));
        assert_eq!(board.board().exec_errno(0, 1), Some(libc::ENOEXEC));
        assert_eq!(board.board().exec_errno(0, 2), None);
    });
}

#[test]
fn a_binary_that_is_replaced_meanwhile_is_still_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("worker");
    fs::copy("/bin/true", &path).unwrap();
    let spawner = Spawner::new(&path, std::iter::empty()).unwrap();
    fs::remove_file(&path).unwrap();
    fs::copy("/bin/false", &path).unwrap();
    with_board(|board| {
        let birth = Birth {
            name: "spanbuf: flush 0 shards 0",
            record: b"",
            inherited: &[],
        };
        assert_eq!(
            end(&spawner.spawn(&birth, &board.board().supervise(0)).unwrap()),
            Cause::Exit(0)
        );
    });
}

#[test]
#[expect(clippy::zombie_processes, reason = "that is what a stranger is")]
fn strangers_are_reaped_and_never_in_the_place_of_workers() {
    with_board(|board| {
        let known = shell("kill -35 $$", board, &[]).unwrap();
        // A process of a group of its own that nobody here waits for.
        let stranger = Command::new("/bin/true").process_group(0).spawn().unwrap();
        let pid = rustix::process::Pid::from_raw(i32::try_from(stranger.id()).unwrap()).unwrap();
        await_end(&open(pid).unwrap());
        await_end(&known.pidfd);
        // Whoever ended first: the known one's status is left to its handle.
        reap::reap_strangers(&[known.pid]);
        assert_eq!(
            reap::reap(&known),
            Some(Cause::Signal(libc::SIGRTMIN() + 1))
        );
        reap::reap_strangers(&[]);
        assert_eq!(ended_child(), None);
        assert!(!Path::new(&format!("/proc/{}", stranger.id())).exists());
    });
}

#[test]
fn what_is_for_the_supervisor_alone_is_not_handed_on() {
    let variables = [
        "PATH",
        "NOTIFY_SOCKET",
        "WATCHDOG_PID",
        "LISTEN_FDS",
        "SPANBUF_REDIS__NODES",
        "NOTIFY_SOCKETS",
        "HOME",
    ];
    let handed_on = environment(variables.iter().map(|&name| (name.into(), "1".into())));
    assert_eq!(
        handed_on,
        [c"PATH=1", c"NOTIFY_SOCKETS=1", c"HOME=1"].map(CString::from)
    );
}

#[test]
fn a_missing_binary_is_named() {
    for (path, word) in [
        ("/no/such/worker", "path=/no/such/worker"),
        ("/etc/passwd", "no executable file"),
        ("/tmp", "no executable file"),
    ] {
        let error = Spawner::new(Path::new(path), std::iter::empty())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(word) && error.contains("supervision.worker"),
            "{error}"
        );
    }
}
