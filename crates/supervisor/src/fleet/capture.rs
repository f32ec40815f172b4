//! What can be seen of a process from outside, before it is killed.
//!
//! In:     a pid that is not reaped, so that it is still its own.
//! Out:    lines for the log; who traces it.
//! Keeps:  nothing here waits for the process: only files of /proc that the kernel answers by itself.
//! Knows:  /proc. Nothing of states.
//! Source: docs/supervision.md 3.

use std::{fs, path::PathBuf};

use nix::unistd::Pid;

/// Fields of `status` that tell what a process waits for and with what.
const FIELDS: [&str; 11] = [
    "State",
    "TracerPid",
    "VmRSS",
    "VmSwap",
    "Threads",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches",
];
/// Threads that are shown, the first ones: librdkafka adds some for each broker.
const THREADS_MAX: usize = 8;
/// Frames of a kernel stack that are shown.
const FRAMES_MAX: usize = 8;

/// What its status says, and where each of its threads waits.
pub(crate) fn lines(pid: Pid) -> Vec<String> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let status = fs::read_to_string(proc.join("status")).unwrap_or_default();
    let mut lines = vec![format!("status {}", fields(&status))];
    let threads = fs::read_dir(proc.join("task"))
        .into_iter()
        .flatten()
        .flatten();
    for thread in threads.take(THREADS_MAX) {
        let read = |name: &str| {
            let text = fs::read_to_string(thread.path().join(name)).unwrap_or_default();
            text.trim().to_owned()
        };
        // The stack is for root alone; where it waits is told to its owner as well.
        let frames: Vec<String> = read("stack")
            .lines()
            .take(FRAMES_MAX)
            .map(|frame| frame.rsplit(' ').next().unwrap_or(frame).to_owned())
            .collect();
        lines.push(format!(
            "thread={} name={} wchan={} syscall={} stack={}",
            thread.file_name().to_string_lossy(),
            read("comm"),
            or_dash(&read("wchan")),
            or_dash(read("syscall").split(' ').next().unwrap_or_default()),
            or_dash(&frames.join("<"))
        ));
    }
    lines
}

/// The process that traces it, such as a debugger.
pub(crate) fn tracer(pid: Pid) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"))?;
    line.trim().parse().ok().filter(|&tracer| tracer > 0)
}

fn fields(status: &str) -> String {
    let wanted = status.lines().filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        FIELDS
            .contains(&name)
            .then(|| format!("{name}={}", value.trim().replace(['\t', ' '], "_")))
    });
    wanted.collect::<Vec<_>>().join(" ")
}

fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_seen_from_outside() {
        let lines = lines(Pid::this());
        assert!(
            lines[0].starts_with("status State=") && lines[0].contains(" Threads="),
            "{lines:?}"
        );
        assert!(
            lines[1].starts_with("thread=") && lines[1].contains(" wchan="),
            "{lines:?}"
        );
        assert_eq!(tracer(Pid::this()), None);
    }

    #[test]
    fn one_that_is_gone_is_no_error() {
        assert_eq!(super::lines(Pid::from_raw(i32::MAX)), ["status "]);
        assert_eq!(tracer(Pid::from_raw(i32::MAX)), None);
    }
}
