//! Starts the built binaries, and watches them from outside.
//!
//! In:     settings, the addresses of Kafka and Redis.
//! Out:    a running supervisor: its workers, its log, its end.
//! Keeps:  a run directory of its own; nothing of the caller's `SPANBUF_` environment reaches it; everything that it started
//!         ends with its owner.
//! Knows:  the command line, dotted keys of the configuration, what workers are called. Nothing of their inside.
//! Source: docs/spec.md 10.1, docs/supervision.md 1, docs/house.md 13.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::{
    StandError, await_some,
    process::{Process, Start, tell},
};

/// How long a supervisor may take to stop before it is killed.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a supervisor is to be started.
#[derive(Debug, Clone)]
pub struct SupervisorPlan {
    /// `--shards`.
    pub shards: String,
    /// `--max-workers`.
    pub max_workers: u32,
    /// `--ingest-workers`.
    pub ingest_workers: u32,
    /// Kafka's address.
    pub brokers: String,
    /// The address of Redis; of a cluster several, with commas between them.
    pub redis: String,
    /// More lines of the configuration, with dotted keys: `buffer.timeout = "2s"`.
    pub settings: String,
    /// More arguments.
    pub arguments: Vec<String>,
    /// More environment.
    pub environment: Vec<(String, String)>,
}

impl SupervisorPlan {
    /// A plan for `shards` shards from 0 on, with one worker for every two and one for the input.
    #[must_use]
    pub fn new(shards: u32, brokers: &str, redis: &str) -> Self {
        Self {
            shards: format!("0-{}", shards.max(1) - 1),
            max_workers: shards.div_ceil(2).max(1),
            ingest_workers: 1,
            brokers: brokers.into(),
            redis: redis.into(),
            settings: String::new(),
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }
}

/// A running supervisor.
#[derive(Debug)]
pub struct Supervisor {
    process: Process,
    plan: SupervisorPlan,
    directory: TempDir,
}

impl Supervisor {
    /// Starts the built supervisor. It dies with the calling thread, and its workers with it.
    ///
    /// # Errors
    /// [`StandError::Unbuilt`] when the binaries are not there; [`StandError::System`] when they cannot be started.
    pub fn start(plan: SupervisorPlan) -> Result<Self, StandError> {
        let program = binary("supervisor")?;
        binary("worker")?;
        let directory = tempfile::Builder::new()
            .prefix("stand-spanbuf-")
            .tempdir()
            .map_err(StandError::system("make a run directory"))?;
        write_config(directory.path(), &plan)?;
        let mut arguments: Vec<OsString> =
            vec!["--config".into(), config_path(directory.path()).into()];
        for (flag, value) in [
            ("--shards", plan.shards.clone()),
            ("--max-workers", plan.max_workers.to_string()),
            ("--ingest-workers", plan.ingest_workers.to_string()),
        ] {
            arguments.extend([flag.into(), value.into()]);
        }
        arguments.extend(plan.arguments.iter().map(Into::into));
        let process = Process::start(Start {
            program: program.as_os_str(),
            hint: "cargo build --workspace",
            arguments,
            environment: environment(&plan.environment),
            log: directory.path().join("log"),
        })?;
        Ok(Self {
            process,
            plan,
            directory,
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its run directory.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        run_dir(self.directory.path())
    }

    /// Its configuration file.
    #[must_use]
    pub fn config_path(&self) -> PathBuf {
        config_path(self.directory.path())
    }

    /// Puts other lines in the place of the plan's `settings`; HUP makes it read them.
    ///
    /// # Errors
    /// [`StandError::System`] when the file cannot be written.
    pub fn set_settings(&mut self, settings: &str) -> Result<(), StandError> {
        self.plan.settings = settings.into();
        write_config(self.directory.path(), &self.plan)
    }

    /// Its workers at this moment, by pid.
    ///
    /// # Errors
    /// [`StandError::System`] when `/proc` cannot be read.
    pub fn workers(&self) -> Result<Vec<Worker>, StandError> {
        workers_of(self.pid())
    }

    /// Waits until it has that many workers of a role (`flush`, `ingest`).
    ///
    /// # Errors
    /// [`StandError::Late`] at the deadline; [`StandError::Ended`] with its log when it ends meanwhile.
    pub fn await_workers(
        &mut self,
        role: &str,
        count: usize,
        deadline: Duration,
    ) -> Result<Vec<Worker>, StandError> {
        let what = format!("{count} {role} workers");
        await_some(deadline, &what, || {
            let mut look = || -> Result<Option<Vec<Worker>>, StandError> {
                if let Some(status) = self.process.ended()? {
                    return Err(self.process.died(status));
                }
                let mut workers = self.workers()?;
                workers.retain(|worker| worker.role == role);
                Ok((workers.len() == count).then_some(workers))
            };
            look().transpose()
        })?
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// [`StandError::System`] when the kernel refuses.
    pub fn signal(&mut self, signal: Signal) -> Result<(), StandError> {
        self.process.signal(signal)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`StandError::Late`] when it still runs at the deadline.
    pub fn wait_exit(&mut self, deadline: Duration) -> Result<ExitStatus, StandError> {
        self.process.wait(deadline)
    }

    /// Kills it without a word (KILL).
    ///
    /// # Errors
    /// [`StandError`] when it survives.
    pub fn kill(&mut self) -> Result<ExitStatus, StandError> {
        self.process.kill()
    }

    /// What it and its workers said.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.log()
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let mut left = self.workers().unwrap_or_default();
        if let Err(error) = self.process.stop(PATIENCE) {
            tell(&format!("{error}\n"));
        }
        // They die with it, unless that is what is broken.
        let gone = await_some(Duration::from_secs(2), "the end of the workers", || {
            left.retain(Worker::lives);
            left.is_empty().then_some(())
        });
        if gone.is_err() {
            for worker in &left {
                tell(&format!("worker outlived its supervisor: {worker:?}\n"));
                if let Err(error) = worker.signal(Signal::SIGKILL) {
                    tell(&format!("{error}\n"));
                }
            }
        }
    }
}

/// A worker, as `ps` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worker {
    /// Its process id.
    pub pid: u32,
    /// `flush`, `ingest` or `check`.
    pub role: String,
    /// Its number within its role.
    pub index: u32,
    /// Its shards, as it shows them.
    pub shards: String,
    /// When it started, in the kernel's ticks: tells it from a later process with its pid.
    start: u64,
}

impl Worker {
    /// Whether it still runs: not ended, and not waiting to be reaped.
    #[must_use]
    pub fn lives(&self) -> bool {
        stat(self.pid)
            .is_some_and(|stat| stat.start == self.start && !matches!(stat.state, 'Z' | 'X'))
    }

    /// Its state as `ps` shows it: `R`, `S`, `T` when stopped; none when it is gone.
    #[must_use]
    pub fn state(&self) -> Option<char> {
        stat(self.pid)
            .filter(|stat| stat.start == self.start)
            .map(|stat| stat.state)
    }

    /// Sends it a signal; nothing when it is gone.
    ///
    /// # Errors
    /// [`StandError::System`] when the kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<(), StandError> {
        let Some(pid) = i32::try_from(self.pid).ok().filter(|_| self.lives()) else {
            return Ok(());
        };
        match kill(Pid::from_raw(pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(StandError::errno(format!(
                "send {signal} to worker pid={}",
                self.pid
            ))(errno)),
        }
    }
}

/// The workers among a process's children, by pid.
///
/// # Errors
/// [`StandError::System`] when `/proc` cannot be read.
pub fn workers_of(parent: u32) -> Result<Vec<Worker>, StandError> {
    let entries = fs::read_dir("/proc").map_err(StandError::system("read /proc"))?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let mut workers: Vec<Worker> = pids.filter_map(|pid| worker(pid, parent)).collect();
    workers.sort_unstable_by_key(|worker| worker.pid);
    Ok(workers)
}

/// The worker of that pid, if it is one and a child of `parent`.
fn worker(pid: u32, parent: u32) -> Option<Worker> {
    let stat = stat(pid).filter(|stat| stat.parent == parent)?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let name = std::str::from_utf8(line.split(|&byte| byte == 0).next()?).ok()?;
    let mut words = name.strip_prefix("spanbuf: ")?.split_whitespace();
    let (role, index) = (words.next()?.to_owned(), words.next()?.parse().ok()?);
    let shards = words.nth(1).unwrap_or_default().to_owned();
    Some(Worker {
        pid,
        role,
        index,
        shards,
        start: stat.start,
    })
}

struct Stat {
    state: char,
    parent: u32,
    start: u64,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it may hold anything, brackets too.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        start: fields.get(19)?.parse().ok()?,
    })
}

/// A supervisor as a person starts it: no file, no settings, only flags. It dies with the calling thread.
///
/// # Errors
/// [`StandError::Unbuilt`] when the binaries are not there; [`StandError::System`] when it cannot be started.
pub fn plain_supervisor(flags: &[&str], log: &Path) -> Result<Process, StandError> {
    Process::start(Start {
        program: binary("supervisor")?.as_os_str(),
        hint: "cargo build --workspace",
        arguments: flags.iter().map(Into::into).collect(),
        environment: environment(&[]),
        log: log.to_path_buf(),
    })
}

/// What a short run of a binary came to.
#[derive(Debug)]
pub struct Run {
    /// How it ended.
    pub status: ExitStatus,
    /// What it said, on both outputs.
    pub text: String,
}

/// Runs a built binary to its end, such as `spanctl` or `supervisor --check`.
///
/// # Errors
/// [`StandError::Unbuilt`] when it is not there; [`StandError::Late`] when it still runs at the deadline, and is killed.
pub fn run(
    name: &str,
    arguments: &[&str],
    variables: &[(&str, &str)],
    deadline: Duration,
) -> Result<Run, StandError> {
    let program = binary(name)?;
    let directory = tempfile::tempdir().map_err(StandError::system("make a directory"))?;
    let variables: Vec<(String, String)> = variables
        .iter()
        .map(|&(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let mut process = Process::start(Start {
        program: program.as_os_str(),
        hint: "cargo build --workspace",
        arguments: arguments.iter().map(Into::into).collect(),
        environment: environment(&variables),
        log: directory.path().join("log"),
    })?;
    let status = process.wait(deadline)?;
    Ok(Run {
        status,
        text: process.log(),
    })
}

/// A built binary: beside the one that runs, or one folder up from a test's.
///
/// # Errors
/// [`StandError::Unbuilt`] when it is not there.
pub fn binary(name: &str) -> Result<PathBuf, StandError> {
    let own = std::env::current_exe().map_err(StandError::system("find the running program"))?;
    let found = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    found.ok_or_else(|| StandError::Unbuilt {
        name: name.into(),
        beside: own,
    })
}

/// Nothing of the caller's settings or service manager, and what is told.
fn environment(told: &[(String, String)]) -> Vec<(OsString, Option<OsString>)> {
    let foreign = std::env::vars_os().map(|(name, _)| name).filter(|name| {
        let name = name.to_string_lossy();
        [
            "SPANBUF_",
            "NOTIFY_SOCKET",
            "WATCHDOG_",
            "LISTEN_",
            "RUNTIME_DIRECTORY",
        ]
        .iter()
        .any(|own| name.starts_with(own))
    });
    let told = told
        .iter()
        .map(|(name, value)| (name.into(), Some(value.into())));
    foreign.map(|name| (name, None)).chain(told).collect()
}

fn run_dir(directory: &Path) -> PathBuf {
    directory.join("run")
}

fn config_path(directory: &Path) -> PathBuf {
    directory.join("spanbuf.toml")
}

/// Writes the configuration: dotted keys, which any order and any lines of a plan may follow.
fn write_config(directory: &Path, plan: &SupervisorPlan) -> Result<(), StandError> {
    let run_dir = run_dir(directory);
    fs::create_dir_all(&run_dir).map_err(StandError::system("make a run directory"))?;
    let nodes: Vec<String> = plan
        .redis
        .split(',')
        .map(|node| format!("{node:?}"))
        .collect();
    let text = format!(
        "kafka.brokers = {:?}\nredis.nodes = [{}]\nsupervision.run_dir = {:?}\n{}\n",
        plan.brokers,
        nodes.join(", "),
        run_dir.to_string_lossy(),
        plan.settings
    );
    fs::write(config_path(directory), text).map_err(StandError::system("write a configuration"))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;
    use crate::eventually;

    #[test]
    fn workers_are_found_by_their_parent_and_name() {
        let folder = tempfile::tempdir().unwrap();
        let script = "(exec -a 'spanbuf: flush 3 shards 3,7' sleep 30) & (exec -a 'spanbuf: ingest 0 shards 0-7' sleep 30) & \
                      sleep 2 & wait";
        let mut parent = Process::start(Start {
            program: OsStr::new("bash"),
            hint: "apt-get install bash",
            arguments: vec!["-c".into(), script.into()],
            environment: Vec::new(),
            log: folder.path().join("log"),
        })
        .unwrap();
        let look = || {
            workers_of(parent.pid())
                .ok()
                .filter(|workers| workers.len() == 2)
        };
        let workers = eventually(Duration::from_secs(5), "two workers", look);
        assert_eq!(
            (
                workers[0].role.as_str(),
                workers[0].index,
                workers[0].shards.as_str()
            ),
            ("flush", 3, "3,7")
        );
        assert_eq!(
            (
                workers[1].role.as_str(),
                workers[1].index,
                workers[1].shards.as_str()
            ),
            ("ingest", 0, "0-7")
        );
        workers[0].signal(Signal::SIGSTOP).unwrap();
        eventually(Duration::from_secs(5), "a stopped worker", || {
            (workers[0].state() == Some('T')).then_some(())
        });
        assert!(workers[0].lives());
        // Nobody here dies with its parent by itself.
        parent.kill().unwrap();
        for worker in &workers {
            worker.signal(Signal::SIGKILL).unwrap();
            eventually(Duration::from_secs(5), "a dead worker", || {
                (!worker.lives()).then_some(())
            });
        }
    }

    #[test]
    fn an_unbuilt_binary_says_how_to_build_it() {
        let error = binary("no-such-binary").unwrap_err().to_string();
        assert!(error.contains("cargo build --workspace"), "{error}");
    }

    #[test]
    fn the_configuration_is_what_the_plan_says() {
        let folder = tempfile::tempdir().unwrap();
        let plan = SupervisorPlan {
            settings: "kafka.group = \"g\"".into(),
            ..SupervisorPlan::new(8, "127.0.0.1:1", "127.0.0.1:2")
        };
        assert_eq!((plan.shards.as_str(), plan.max_workers), ("0-7", 4));
        write_config(folder.path(), &plan).unwrap();
        let text = fs::read_to_string(config_path(folder.path())).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..2],
            [
                "kafka.brokers = \"127.0.0.1:1\"",
                "redis.nodes = [\"127.0.0.1:2\"]"
            ]
        );
        assert!(
            lines[2].starts_with("supervision.run_dir = \"/") && lines[3] == "kafka.group = \"g\""
        );
    }
}
