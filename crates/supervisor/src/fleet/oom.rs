//! Whether the kernel killed something of our cgroup for memory.
//!
//! In:     `memory.events` of the cgroup that this process is in.
//! Out:    whether its count of kills has grown since it was last asked.
//! Keeps:  where there is no such file, nothing is put down to memory.
//! Knows:  cgroups of version 2.
//! Source: docs/supervision.md 3.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The count of kills, and when it was last asked for.
#[derive(Debug)]
pub(crate) struct Memory {
    events: PathBuf,
    seen: u64,
}

impl Memory {
    /// That of the cgroup of this process.
    pub(crate) fn of_this_process() -> Self {
        let cgroup = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let path = cgroup
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .unwrap_or_default();
        Self::at(Path::new("/sys/fs/cgroup").join(path).join("memory.events"))
    }

    fn at(events: PathBuf) -> Self {
        let seen = kills(&events);
        Self { events, seen }
    }

    /// Whether there were more kills since this was last asked.
    pub(crate) fn grew(&mut self) -> bool {
        let now = kills(&self.events);
        let before = std::mem::replace(&mut self.seen, now);
        now > before
    }
}

fn kills(events: &Path) -> u64 {
    let text = fs::read_to_string(events).unwrap_or_default();
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count
        .and_then(|count| count.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_is_told_once() {
        let folder = tempfile::tempdir().unwrap();
        let events = folder.path().join("memory.events");
        let mut memory = Memory::at(events.clone());
        assert!(!memory.grew());
        fs::write(&events, "low 0\noom 3\noom_kill 2\noom_group_kill 0\n").unwrap();
        assert!(memory.grew() && !memory.grew());
        fs::write(&events, "garbage").unwrap();
        assert!(!memory.grew());
    }
}
