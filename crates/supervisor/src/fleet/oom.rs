//! Whether the kernel killed something of our cgroup for memory.
//!
//! In:     the counts of the cgroup that this process is in: `memory.events`, or `memory.oom_control` of version 1.
//! Out:    whether its count of kills has grown since it was last asked.
//! Keeps:  where there is no such file, nothing is put down to memory.
//! Knows:  cgroups.
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
        let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let found = events(&cgroups);
        if found.exists() {
            return Self::at(found);
        }
        // A container may see its cgroup as the root, by a path of the host.
        let root = Path::new("/sys/fs/cgroup");
        let roots = ["memory.events", "memory/memory.oom_control"].map(|name| root.join(name));
        Self::at(
            roots
                .into_iter()
                .find(|path| path.exists())
                .unwrap_or(found),
        )
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

/// Where the kills of a process's cgroup are counted. With both versions on one machine, memory belongs to the one that lists it.
fn events(cgroups: &str) -> PathBuf {
    let root = Path::new("/sys/fs/cgroup");
    let of_memory = cgroups.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(":/")?;
        let mut controllers = controllers.split(',');
        controllers.any(|name| name == "memory").then_some(path)
    });
    let unified = cgroups.lines().find_map(|line| line.strip_prefix("0::/"));
    match of_memory {
        Some(path) => root.join("memory").join(path).join("memory.oom_control"),
        None => root.join(unified.unwrap_or_default()).join("memory.events"),
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
    fn the_counts_of_either_version_are_found() {
        for (cgroups, found) in [
            (
                "0::/system.slice/spanbuf.service\n",
                "system.slice/spanbuf.service/memory.events",
            ),
            ("0::/\n", "memory.events"),
            (
                "9:name=systemd:/\n4:memory:/a/b\n0::/\n",
                "memory/a/b/memory.oom_control",
            ),
            ("3:cpu,memory:/\n", "memory/memory.oom_control"),
            ("", "memory.events"),
        ] {
            assert_eq!(events(cgroups), Path::new("/sys/fs/cgroup").join(found));
        }
    }

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
