//! The lock of the run directory: one supervisor on a host.
//!
//! In:     the run directory.
//! Out:    the lock, or who holds it.
//! Keeps:  the file is never removed; the lock lives as long as the supervisor or any worker that inherited it.
//! Knows:  files. Nothing of workers.
//! Source: docs/supervision.md 1.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process,
};

use nix::{
    errno::Errno,
    libc,
    unistd::{AccessFlags, access},
};

/// The lock is not ours.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    /// The run directory or its lock cannot be made.
    #[error("open lock path={} (check supervision.run_dir and its owner)", path.display())]
    Open {
        /// The lock's path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another supervisor, or a worker of one, holds it.
    #[error("take lock path={}: held by {holders} (stop them, or set another supervision.run_dir)", path.display())]
    Held {
        /// The lock's path.
        path: PathBuf,
        /// Process ids and names.
        holders: String,
    },
}

/// The lock, held.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
}

impl Lock {
    /// Opens the lock without taking it; makes the directory where it is missing.
    ///
    /// # Errors
    /// [`LockError::Open`].
    pub(crate) fn open(run_dir: &Path) -> Result<Free, LockError> {
        let path = run_dir.join("lock");
        // The directory may lie in one that everybody writes to: nobody's link is followed.
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(run_dir);
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW);
        match made.and_then(|()| options.open(&path)) {
            Ok(file) => Ok(Free { file, path }),
            Err(source) => Err(LockError::Open { path, source }),
        }
    }

    /// Whether it could be opened: nothing is made, and nothing taken.
    ///
    /// # Errors
    /// [`LockError::Open`].
    pub(crate) fn prove(run_dir: &Path) -> Result<(), LockError> {
        let path = run_dir.join("lock");
        // The lock, or the folder that it or its own would be made in.
        let proved = match path.ancestors().find(|part| part.exists()) {
            Some(part) if part == path && part.is_symlink() => Err(Errno::ELOOP),
            Some(part) if part == path => access(part, AccessFlags::R_OK | AccessFlags::W_OK),
            Some(part) if part.is_dir() => access(part, AccessFlags::W_OK | AccessFlags::X_OK),
            Some(_) => Err(Errno::ENOTDIR),
            None => Ok(()),
        };
        proved.map_err(|errno| LockError::Open {
            path,
            source: errno.into(),
        })
    }

    /// What workers inherit: their copies hold the lock as well.
    #[must_use]
    pub(crate) fn inherited(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The lock, open and not yet taken.
#[derive(Debug)]
pub(crate) struct Free {
    file: File,
    path: PathBuf,
}

impl Free {
    /// Tries to take the lock, and writes our pid to it. Held: gives itself back.
    ///
    /// # Errors
    /// [`LockError::Open`] when the file system refuses.
    pub(crate) fn take(mut self) -> Result<Result<Lock, Self>, LockError> {
        match self.file.try_lock() {
            Ok(()) => match self.write_pid() {
                Ok(()) => Ok(Ok(Lock { file: self.file })),
                Err(source) => Err(LockError::Open {
                    path: self.path,
                    source,
                }),
            },
            Err(TryLockError::WouldBlock) => Ok(Err(self)),
            Err(TryLockError::Error(source)) => Err(LockError::Open {
                path: self.path,
                source,
            }),
        }
    }

    fn write_pid(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        writeln!(self.file, "{}", process::id())
    }

    /// The error that names who holds the lock.
    #[must_use]
    pub(crate) fn held(mut self) -> LockError {
        let mut text = String::new();
        let written = self
            .file
            .rewind()
            .and_then(|()| self.file.read_to_string(&mut text));
        let owner = written.ok().and_then(|_| text.trim().parse().ok());
        LockError::Held {
            holders: holders(&self.path, owner),
            path: self.path,
        }
    }
}

/// The supervisor that wrote the file, and every process that can be seen to have it open.
fn holders(path: &Path, owner: Option<u32>) -> String {
    let mut pids = opened_by(path);
    pids.extend(owner);
    pids.sort_unstable();
    pids.dedup();
    let named = |pid: &u32| match fs::read(format!("/proc/{pid}/cmdline")) {
        Ok(line) => format!(
            "pid={pid} ({})",
            String::from_utf8_lossy(line.split(|&byte| byte == 0).next().unwrap_or_default())
        ),
        Err(_) => format!("pid={pid} (gone)"),
    };
    match pids.as_slice() {
        [] => "processes that cannot be seen".into(),
        pids => pids.iter().map(named).collect::<Vec<_>>().join(", "),
    }
}

/// Other processes with an open descriptor of that file, as far as `/proc` shows them.
fn opened_by(path: &Path) -> Vec<u32> {
    let Ok(path) = path.canonicalize() else {
        return Vec::new();
    };
    let opens = |pid: &u32| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        descriptors
            .into_iter()
            .any(|descriptor| fs::read_link(descriptor.path()).is_ok_and(|target| target == path))
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != process::id())
        .filter(opens)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::fleet::{reap, spawn::tests, stop};

    fn open(run_dir: &Path) -> Free {
        Lock::open(run_dir).unwrap()
    }

    #[test]
    fn a_run_directory_is_proved_without_a_trace() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("run/deep");
        Lock::prove(&run_dir).unwrap();
        assert!(!run_dir.exists());
        drop(Lock::open(&run_dir).unwrap());
        Lock::prove(&run_dir).unwrap();
        let file = run_dir.join("lock");
        let error = Lock::prove(&file).unwrap_err();
        assert!(error.to_string().contains("supervision.run_dir"), "{error}");
        assert!(Lock::open(&file).is_err());
        assert!(Lock::prove(Path::new("/proc/self/run")).is_err());
    }

    #[test]
    fn a_run_directory_has_one_owner_and_says_who() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("a/run");
        // A child that another test forks at this moment would hold the lock until it executes.
        tests::with_board(|_| {
            let lock = open(&run_dir).take().unwrap().unwrap();
            assert_eq!(
                fs::metadata(&run_dir).unwrap().permissions().mode() & 0o777,
                0o700
            );
            let error = open(&run_dir)
                .take()
                .unwrap()
                .unwrap_err()
                .held()
                .to_string();
            assert!(
                error.contains(&format!("pid={} (", process::id())),
                "{error}"
            );
            drop(lock);
            // The file stays, and what stood in it does not add up.
            fs::write(run_dir.join("lock"), "1234567890\n").unwrap();
            let lock = open(&run_dir).take().unwrap().unwrap();
            assert_eq!(
                fs::read_to_string(run_dir.join("lock")).unwrap(),
                format!("{}\n", process::id())
            );
            drop(lock);
            assert!(run_dir.join("lock").exists());
        });
    }

    #[test]
    fn a_worker_holds_the_lock_of_its_dead_supervisor() {
        let folder = tempfile::tempdir().unwrap();
        tests::with_board(|board| {
            let lock = open(folder.path()).take().unwrap().unwrap();
            let child = tests::shell("exec sleep 600", board, &[lock.inherited()]).unwrap();
            tests::eventually("its name", || tests::name(&child).starts_with("sleep"));
            drop(lock);
            fs::write(folder.path().join("lock"), "4000000000\n").unwrap();
            let error = open(folder.path())
                .take()
                .unwrap()
                .unwrap_err()
                .held()
                .to_string();
            assert!(
                error.contains(&format!("pid={} (sleep), pid=4000000000 (gone)", child.pid)),
                "{error}"
            );
            stop::kill(&child);
            tests::eventually("its end", || reap::reap(&child).is_some());
            assert!(open(folder.path()).take().unwrap().is_ok());
        });
    }

    #[test]
    fn nobodys_link_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("precious");
        fs::write(&other, "text").unwrap();
        std::os::unix::fs::symlink(&other, folder.path().join("lock")).unwrap();
        let error = Lock::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("supervision.run_dir"), "{error}");
        assert_eq!(fs::read_to_string(other).unwrap(), "text");
    }
}
