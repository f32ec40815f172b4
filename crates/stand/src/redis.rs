//! A private Redis: one node, with its own port and directory.
//!
//! In:     settings.
//! Out:    an address, connections, and its deaths and pauses.
//! Keeps:  nothing is written to disk unless a restart with data asks for it; the address stays over restarts.
//! Knows:  redis-server. No key of ours.
//! Source: docs/house.md 13.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::signal::Signal;
use redis::{Client, Connection, cmd};
use tempfile::TempDir;

use crate::{
    StandError, await_some, free_port,
    process::{Process, Start},
};

/// How long a start may take.
const START: Duration = Duration::from_secs(5);
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(5);
/// Tries for a port: between finding one and binding it, somebody else may have it.
const TRIES: u32 = 5;

/// A Redis server that ends with its owner.
#[derive(Debug)]
pub struct Redis {
    // Before the directory: the server ends before its files go.
    process: Option<Process>,
    settings: Vec<(String, String)>,
    port: u16,
    directory: TempDir,
}

impl Redis {
    /// Starts an empty server. It dies with the calling thread.
    ///
    /// # Errors
    /// [`StandError::Missing`] when redis-server is not installed; another when it does not come up within 5 s.
    pub fn start() -> Result<Self, StandError> {
        Self::start_with(&[])
    }

    /// Starts an empty server with settings of `redis.conf`, such as `("maxmemory", "10mb")`.
    ///
    /// # Errors
    /// As [`Redis::start`].
    pub fn start_with(settings: &[(&str, &str)]) -> Result<Self, StandError> {
        let directory = directory()?;
        let settings = settings
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let mut redis = Self {
            process: None,
            settings,
            port: 0,
            directory,
        };
        let mut tries = 1;
        loop {
            redis.port = free_port()?;
            match redis.launch() {
                Err(StandError::Ended { .. }) if tries < TRIES => tries += 1,
                started => return started.map(|()| redis),
            }
        }
    }

    /// Starts an empty server at a port, such as the one where clients expect it.
    ///
    /// # Errors
    /// As [`Redis::start`]; [`StandError::Ended`] when the port is taken.
    pub fn start_on(port: u16) -> Result<Self, StandError> {
        let mut redis = Self {
            process: None,
            settings: Vec::new(),
            port,
            directory: directory()?,
        };
        redis.launch().map(|()| redis)
    }

    /// `127.0.0.1:<port>`, the same over restarts.
    #[must_use]
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The server's process id; none while it is stopped.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// A new connection, which waits at most 5 s for an answer.
    ///
    /// # Errors
    /// [`StandError::Redis`] when the server does not take it.
    pub fn connection(&self) -> Result<Connection, StandError> {
        let client = Client::open(format!("redis://{}/", self.address()))?;
        let connection = client.get_connection_with_timeout(ANSWER)?;
        connection.set_read_timeout(Some(ANSWER))?;
        connection.set_write_timeout(Some(ANSWER))?;
        Ok(connection)
    }

    /// Changes a setting of the running server; a restart forgets it.
    ///
    /// # Errors
    /// [`StandError::Redis`] when the server refuses it.
    pub fn config_set(&self, name: &str, value: &str) -> Result<(), StandError> {
        Ok(cmd("CONFIG")
            .arg("SET")
            .arg(name)
            .arg(value)
            .exec(&mut self.connection()?)?)
    }

    /// Changes a setting of the running server, for its restarts too.
    ///
    /// # Errors
    /// As [`Redis::config_set`].
    pub fn config_keep(&mut self, name: &str, value: &str) -> Result<(), StandError> {
        self.config_set(name, value)?;
        self.settings.push((name.to_owned(), value.to_owned()));
        Ok(())
    }

    /// Deletes every key, as an operator's mistake would.
    ///
    /// # Errors
    /// [`StandError::Redis`] when the server refuses it.
    pub fn flush_all(&self) -> Result<(), StandError> {
        Ok(cmd("FLUSHALL").exec(&mut self.connection()?)?)
    }

    /// Kills the server (KILL); what it held is lost, its address stays.
    ///
    /// # Errors
    /// [`StandError`] when it cannot be killed.
    pub fn stop(&mut self) -> Result<(), StandError> {
        match self.process.take() {
            Some(mut process) => process.kill().map(drop),
            None => Ok(()),
        }
    }

    /// Stops the server, if it runs, and starts an empty one at the same address.
    ///
    /// # Errors
    /// As [`Redis::start`].
    pub fn restart_empty(&mut self) -> Result<(), StandError> {
        self.stop()?;
        remove(&self.dump())?;
        remove(&self.log_of_writes())?;
        self.launch()
    }

    /// Starts a stopped server at its address with what lies on its disk: nothing, unless its settings keep a log of writes.
    ///
    /// # Errors
    /// As [`Redis::start`].
    pub fn start_again(&mut self) -> Result<(), StandError> {
        self.stop()?;
        self.launch()
    }

    /// Stops the server and starts it at the same address with the data that it held.
    ///
    /// # Errors
    /// As [`Redis::start`], and when the data cannot be saved.
    pub fn restart_with_data(&mut self) -> Result<(), StandError> {
        self.save()?;
        self.restart_as_saved()
    }

    /// Writes what the server holds to its disk; of one that keeps a log of writes, that is copied as it stands.
    ///
    /// # Errors
    /// [`StandError::Redis`] when the server cannot.
    pub fn save(&self) -> Result<(), StandError> {
        cmd("SAVE").exec(&mut self.connection()?)?;
        remove(&self.saved_log())?;
        copy(&self.log_of_writes(), &self.saved_log())
    }

    /// Kills the server and starts it with what it held at the last [`Redis::save`]: it went back.
    ///
    /// # Errors
    /// As [`Redis::start`].
    pub fn restart_as_saved(&mut self) -> Result<(), StandError> {
        self.stop()?;
        if self.saved_log().exists() {
            remove(&self.log_of_writes())?;
            copy(&self.saved_log(), &self.log_of_writes())?;
        }
        self.launch()
    }

    /// Freezes the server: connections stay and nothing answers (STOP).
    ///
    /// # Errors
    /// [`StandError`] when it cannot be signalled.
    pub fn pause(&mut self) -> Result<(), StandError> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets a frozen server go on (CONT).
    ///
    /// # Errors
    /// [`StandError`] when it cannot be signalled.
    pub fn resume(&mut self) -> Result<(), StandError> {
        self.signal(Signal::SIGCONT)
    }

    /// What the server said.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.as_ref().map_or_else(String::new, Process::log)
    }

    fn signal(&mut self, signal: Signal) -> Result<(), StandError> {
        self.process
            .as_mut()
            .map_or(Ok(()), |process| process.signal(signal))
    }

    fn dump(&self) -> PathBuf {
        self.directory.path().join("dump.rdb")
    }

    fn log_of_writes(&self) -> PathBuf {
        self.directory.path().join("appendonlydir")
    }

    fn saved_log(&self) -> PathBuf {
        self.directory.path().join("appendonlydir.saved")
    }

    /// Starts the server at its port and waits until it answers.
    fn launch(&mut self) -> Result<(), StandError> {
        let port = self.port.to_string();
        let directory = self.directory.path().to_string_lossy().into_owned();
        let own = [
            ("bind", "127.0.0.1"),
            ("port", &port),
            ("save", ""),
            ("appendonly", "no"),
            ("dir", &directory),
            ("daemonize", "no"),
        ];
        let given = self
            .settings
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()));
        let arguments = own
            .into_iter()
            .chain(given)
            .flat_map(|(name, value)| [format!("--{name}"), value.to_owned()]);
        let mut process = Process::start(Start {
            program: OsStr::new("redis-server"),
            hint: "apt-get install redis-server",
            arguments: arguments.map(Into::into).collect(),
            environment: Vec::new(),
            log: self.directory.path().join("redis.log"),
        })?;
        let pid = process.pid();
        await_some(START, "an answer of redis", || match process.ended() {
            Ok(None) => self.answers(pid).then_some(Ok(())),
            Ok(Some(status)) => Some(Err(process.died(status))),
            Err(error) => Some(Err(error)),
        })??;
        self.process = Some(process);
        Ok(())
    }

    /// Whether it is our server that answers at the port, with its data loaded.
    fn answers(&self, pid: u32) -> bool {
        let ask = || -> Result<bool, StandError> {
            let mut connection = self.connection()?;
            cmd("PING").exec(&mut connection)?;
            let about: String = cmd("INFO").arg("server").query(&mut connection)?;
            Ok(about
                .lines()
                .any(|line| line.trim_end() == format!("process_id:{pid}")))
        };
        ask().unwrap_or(false)
    }
}

/// Removes a file or a folder, if it is there.
fn remove(path: &Path) -> Result<(), StandError> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(StandError::system("remove the data of redis")(error))
        }
        _ => Ok(()),
    }
}

/// Copies a folder of files, if it is there.
fn copy(from: &Path, to: &Path) -> Result<(), StandError> {
    let copied = || -> io::Result<()> {
        if !from.is_dir() {
            return Ok(());
        }
        fs::create_dir(to)?;
        for file in fs::read_dir(from)? {
            let file = file?;
            fs::copy(file.path(), to.join(file.file_name()))?;
        }
        Ok(())
    };
    copied().map_err(StandError::system("copy the data of redis"))
}

fn directory() -> Result<TempDir, StandError> {
    tempfile::Builder::new()
        .prefix("stand-redis-")
        .tempdir()
        .map_err(StandError::system("make a directory for redis"))
}

impl Drop for Redis {
    fn drop(&mut self) {
        // A frozen server takes no TERM; with nothing to save, TERM and KILL are the same to it.
        self.process = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(redis: &Redis, key: &str) -> Option<String> {
        cmd("GET")
            .arg(key)
            .query(&mut redis.connection().unwrap())
            .unwrap()
    }

    fn set(redis: &Redis, key: &str, value: &str) {
        cmd("SET")
            .arg(key)
            .arg(value)
            .exec(&mut redis.connection().unwrap())
            .unwrap();
    }

    #[test]
    fn servers_are_private_and_keep_what_they_hold_only_when_told() {
        let mut one = Redis::start().unwrap();
        let other = Redis::start_with(&[("maxmemory", "7mb")]).unwrap();
        let address = one.address();
        assert_ne!(address, other.address());
        set(&one, "name", "value");
        assert_eq!(get(&other, "name"), None);
        let (_, limit): (String, String) = cmd("CONFIG")
            .arg("GET")
            .arg("maxmemory")
            .query(&mut other.connection().unwrap())
            .unwrap();
        assert_eq!(limit, (7_u64 << 20).to_string());

        one.restart_with_data().unwrap();
        assert_eq!(get(&one, "name").as_deref(), Some("value"));
        one.restart_empty().unwrap();
        assert_eq!(get(&one, "name"), None);
        set(&one, "name", "value");
        one.flush_all().unwrap();
        assert_eq!(get(&one, "name"), None);
        assert_eq!(one.address(), address);
    }

    #[test]
    fn a_stopped_server_refuses_and_a_paused_one_is_silent() {
        let mut redis = Redis::start().unwrap();
        let mut connection = redis.connection().unwrap();
        connection
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        redis.pause().unwrap();
        assert!(cmd("PING").exec(&mut connection).unwrap_err().is_timeout());
        redis.resume().unwrap();
        cmd("PING").exec(&mut redis.connection().unwrap()).unwrap();
        redis.stop().unwrap();
        assert_eq!(redis.pid(), None);
        assert!(redis.connection().is_err());
        redis.restart_empty().unwrap();
        redis.pause().unwrap();
        let (pid, path) = (redis.pid().unwrap(), redis.directory.path().to_path_buf());
        drop(redis);
        assert!(!PathBuf::from(format!("/proc/{pid}")).exists());
        assert!(!path.exists());
    }

    #[test]
    fn a_refused_setting_shows_what_the_server_said() {
        let error = Redis::start_with(&[("no-such-setting", "1")])
            .unwrap_err()
            .to_string();
        assert!(error.contains("no-such-setting"), "{error}");
    }
}
