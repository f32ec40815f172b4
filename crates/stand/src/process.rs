//! A child process that ends with its owner.
//!
//! In:     a program, its arguments, a file for what it says.
//! Out:    its pid, its end, its log.
//! Keeps:  it is killed when its owner is dropped, and by the kernel when the thread that started it ends (PDEATHSIG);
//!         its log is shown when that happens in a failing test; it has no descriptor of ours but the three that it is given: a
//!         connection of the mock Kafka that a child held open would not end when the mock closes it.
//! Knows:  setpriv of util-linux, which sets PDEATHSIG without a fork hook of ours, and bash, which closes descriptors.
//! Source: docs/house.md 13.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{StandError, await_some};

/// How much of a log an error or a failing test shows.
const SHOWN_BYTES: u64 = 8 << 10;

/// Closes what librdkafka's mock opened without CLOEXEC, and becomes the program.
const CLOSE_AND_EXEC: &str =
    r#"for fd in /proc/$$/fd/*; do fd=${fd##*/}; ((fd > 2)) && exec {fd}>&-; done; exec "$@""#;

/// A running program.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    ended: Option<ExitStatus>,
    log: PathBuf,
}

/// What to start.
#[derive(Debug)]
pub struct Start<'s> {
    /// The program: a path, or a name to be looked for in `PATH`.
    pub program: &'s OsStr,
    /// What to do when it is not found.
    pub hint: &'s str,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// What its environment has beside ours; none takes a variable away.
    pub environment: Vec<(OsString, Option<OsString>)>,
    /// The file that takes what it says; appended to.
    pub log: PathBuf,
}

impl Process {
    /// Starts a program. It dies with the calling thread: call from one that lives as long as the fixture.
    ///
    /// # Errors
    /// [`StandError::Missing`] when there is no such program, [`StandError::System`] when it cannot be started.
    pub fn start(start: Start<'_>) -> Result<Self, StandError> {
        let name = Path::new(start.program)
            .file_name()
            .unwrap_or(start.program)
            .to_string_lossy()
            .into_owned();
        let program = find(start.program).ok_or_else(|| StandError::Missing {
            program: name.clone(),
            hint: start.hint.into(),
        })?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(&start.log)
            .map_err(StandError::system(format!(
                "open log={}",
                start.log.display()
            )))?;
        let log_again = log
            .try_clone()
            .map_err(StandError::system("double a descriptor"))?;
        let [bash, setpriv] = ["bash", "setpriv"].map(|tool| {
            find(OsStr::new(tool)).ok_or_else(|| StandError::Missing {
                program: tool.into(),
                hint: format!("apt-get install bash util-linux: {name} is started by them"),
            })
        });
        let mut command = Command::new(bash?);
        command.args(["-c", CLOSE_AND_EXEC, "bash"]);
        command.arg(setpriv?).args(["--pdeathsig", "KILL"]);
        command.arg(program);
        for (name, value) in &start.environment {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        // A group of its own: Ctrl-C at the terminal reaches the owner alone, who ends it in order.
        let child = command
            .process_group(0)
            .args(&start.arguments)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(log_again)
            .spawn()
            .map_err(StandError::system(format!("start {name}")))?;
        Ok(Self {
            name,
            child,
            ended: None,
            log: start.log,
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// [`StandError::System`] when the kernel does not tell.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, StandError> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().map_err(StandError::system(format!(
                "wait for {} pid={}",
                self.name,
                self.pid()
            )))?;
        }
        Ok(self.ended)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`StandError::Late`] when it still runs at the deadline.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus, StandError> {
        let what = format!("the end of {} pid={}", self.name, self.pid());
        await_some(deadline, &what, || self.ended().transpose())?
    }

    /// Sends a signal; none once it has ended, since its pid may be another's by then.
    ///
    /// # Errors
    /// [`StandError::System`] when the kernel refuses.
    pub fn signal(&mut self, signal: Signal) -> Result<(), StandError> {
        if self.ended()?.is_some() {
            return Ok(());
        }
        let what = format!("send {signal} to {} pid={}", self.name, self.pid());
        let pid = i32::try_from(self.pid()).map_err(|_| StandError::Malformed {
            what: "a pid".into(),
            reason: format!("{} is too large", self.pid()),
        })?;
        // Not reaped yet, so the pid is still its own.
        kill(Pid::from_raw(pid), signal).map_err(StandError::errno(what))
    }

    /// TERM, and KILL when it still runs after `patience`.
    ///
    /// # Errors
    /// [`StandError`] when it cannot be signalled, or survives.
    pub fn stop(&mut self, patience: Duration) -> Result<ExitStatus, StandError> {
        self.signal(Signal::SIGTERM)?;
        match self.wait(patience) {
            Ok(status) => Ok(status),
            Err(_) => self.kill(),
        }
    }

    /// KILL, and the end awaited.
    ///
    /// # Errors
    /// [`StandError`] when it cannot be signalled, or survives.
    pub fn kill(&mut self) -> Result<ExitStatus, StandError> {
        self.signal(Signal::SIGKILL)?;
        self.wait(Duration::from_secs(10))
    }

    /// Everything that it said.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read(&self.log).map_or_else(
            |error| error.to_string(),
            |text| String::from_utf8_lossy(&text).into_owned(),
        )
    }

    /// The end of what it said.
    #[must_use]
    pub fn log_end(&self) -> String {
        log_end(&self.log).unwrap_or_else(|error| error.to_string())
    }

    /// The error of a program that ended too early.
    pub(crate) fn died(&self, status: ExitStatus) -> StandError {
        StandError::Ended {
            program: self.name.clone(),
            status: status.to_string(),
            log: self.log_end(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let stopped = if self.ended.is_some() {
            Ok(())
        } else {
            self.kill().map(drop)
        };
        if std::thread::panicking() {
            tell(&format!(
                "-- log of {} pid={}\n{}\n",
                self.name,
                self.pid(),
                self.log_end()
            ));
        }
        if let Err(error) = stopped {
            tell(&format!("{error}\n"));
        }
    }
}

/// Writes to standard error; a broken one leaves nobody to tell.
pub(crate) fn tell(text: &str) {
    drop(io::stderr().write_all(text.as_bytes()));
}

/// The program's path: as it is, or the first of that name in `PATH`.
fn find(program: &OsStr) -> Option<PathBuf> {
    let path = Path::new(program);
    if path.components().count() > 1 {
        return path.is_file().then(|| path.to_path_buf());
    }
    let folders = std::env::var_os("PATH")?;
    std::env::split_paths(&folders)
        .map(|folder| folder.join(path))
        .find(|candidate| candidate.is_file())
}

/// The last [`SHOWN_BYTES`] of a file.
fn log_end(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(SHOWN_BYTES)))?;
    let mut end = Vec::new();
    file.take(SHOWN_BYTES).read_to_end(&mut end)?;
    Ok(String::from_utf8_lossy(&end).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, folder: &Path) -> Process {
        Process::start(Start {
            program: OsStr::new("sh"),
            hint: "apt-get install dash",
            arguments: vec!["-c".into(), script.into()],
            environment: vec![
                ("GREETING".into(), Some("hello".into())),
                ("HOME".into(), None),
            ],
            log: folder.join("log"),
        })
        .unwrap()
    }

    #[test]
    fn a_child_has_no_descriptor_of_ours() {
        let folder = tempfile::tempdir().unwrap();
        let held = File::open(folder.path()).unwrap();
        // As libraries in C open theirs.
        let flags = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty());
        nix::fcntl::fcntl(&held, flags).unwrap();
        let mut child = shell("ls -l /proc/self/fd", folder.path());
        child.wait(Duration::from_secs(5)).unwrap();
        let (log, ours) = (child.log(), folder.path().display().to_string());
        assert!(log.contains(&format!("{ours}/log")), "{log}");
        assert!(!log.lines().any(|line| line.ends_with(&ours)), "{log}");
    }

    #[test]
    fn its_end_and_its_words_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let mut process = shell("echo $GREETING$HOME; exit 7", folder.path());
        assert_eq!(
            process.wait(Duration::from_secs(5)).unwrap().code(),
            Some(7)
        );
        assert_eq!(process.log(), "hello\n");
        process.signal(Signal::SIGKILL).unwrap();
    }

    #[test]
    fn it_ends_with_its_owner_even_when_it_ignores_term() {
        let folder = tempfile::tempdir().unwrap();
        let process = shell("trap '' TERM; echo ready; exec sleep 600", folder.path());
        crate::eventually(Duration::from_secs(5), "the first word", || {
            (process.log() == "ready\n").then_some(())
        });
        let path = PathBuf::from(format!("/proc/{}", process.pid()));
        assert!(path.exists());
        drop(process);
        assert!(!path.exists());
    }

    #[test]
    fn it_dies_with_the_thread_that_started_it_even_when_nothing_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_path_buf();
        let started = std::thread::spawn(move || {
            let process = shell("echo ready; exec sleep 600", &path);
            crate::eventually(Duration::from_secs(5), "the first word", || {
                (process.log() == "ready\n").then_some(())
            });
            let pid = process.pid();
            std::mem::forget(process);
            pid
        });
        let pid = started.join().unwrap();
        // Not reaped: it stays as a zombie.
        crate::eventually(Duration::from_secs(5), "its death", || {
            fs::read_to_string(format!("/proc/{pid}/stat"))
                .ok()
                .filter(|stat| stat.contains(") Z "))
        });
    }

    #[test]
    fn a_missing_program_says_how_to_get_it() {
        let folder = tempfile::tempdir().unwrap();
        let start = Start {
            program: OsStr::new("no-such-program"),
            hint: "apt-get install it",
            arguments: Vec::new(),
            environment: Vec::new(),
            log: folder.path().join("log"),
        };
        let error = Process::start(start).unwrap_err();
        assert_eq!(
            error.to_string(),
            "start no-such-program: not found (apt-get install it)"
        );
    }
}
