//! A run directory, a configuration, supervisors with stubs for workers.

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

pub(crate) const LONG: Duration = Duration::from_secs(30);

pub(crate) fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let begun = Clock::mono_now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(Clock::mono_now().since(begun) < LONG, "{what} did not come");
        nix::poll::poll(&mut [], 10_u16).unwrap();
    }
}

pub(crate) fn stub() -> PathBuf {
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
pub(crate) fn lives(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
}

/// Children with a worker's name: pid and name.
pub(crate) fn workers_of(parent: u32) -> Vec<(i32, String)> {
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

pub(crate) struct World {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) children: Vec<Child>,
}

impl World {
    pub(crate) fn new(settings: &str) -> Self {
        let world = Self {
            folder: tempfile::tempdir().unwrap(),
            children: Vec::new(),
        };
        world.configure(settings);
        world
    }

    pub(crate) fn command(&self, program: &Path, arguments: &[&str], stub: &str) -> Command {
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

    pub(crate) fn run(&self, arguments: &[&str], stub: &str) -> Output {
        self.command(Path::new(env!("CARGO_BIN_EXE_supervisor")), arguments, stub)
            .output()
            .unwrap()
    }

    pub(crate) fn start(&mut self, arguments: &[&str], stub: &str) -> u32 {
        let command = self.command(Path::new(env!("CARGO_BIN_EXE_supervisor")), arguments, stub);
        self.spawn(command)
    }

    pub(crate) fn spawn(&mut self, mut command: Command) -> u32 {
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

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        send(
            i32::try_from(self.children.last().unwrap().id()).unwrap(),
            signal,
        );
    }

    /// The exit code, and how long it took from now on.
    pub(crate) fn wait(&mut self) -> (Option<i32>, Duration) {
        let begun = Clock::mono_now();
        let child = self.children.last_mut().unwrap();
        let status = eventually("the end of the supervisor", || child.try_wait().unwrap());
        assert_eq!(workers_of(child.id()), []);
        (status.code(), Clock::mono_now().since(begun))
    }

    pub(crate) fn await_workers(&self, count: usize) -> Vec<(i32, String)> {
        let pid = self.children.last().unwrap().id();
        eventually(&format!("{count} workers"), || {
            Some(workers_of(pid)).filter(|workers| workers.len() == count)
        })
    }

    /// Drains; it ends well.
    pub(crate) fn stop_well(&mut self) {
        self.signal(Signal::SIGTERM);
        assert_eq!(self.wait().0, Some(0), "{}", self.log());
    }

    /// Waits until that many workers are there and Healthy; gives them.
    pub(crate) fn await_healthy(&self, count: u32) -> Vec<(i32, String)> {
        let workers = self.await_workers(usize::try_from(count).unwrap());
        (0..count).for_each(|slot| drop(self.await_shown(slot, &["state=healthy"])));
        workers
    }

    /// The number of lines that hold a text.
    pub(crate) fn said(&self, text: &str) -> usize {
        self.log()
            .lines()
            .filter(|line| line.contains(text))
            .count()
    }

    /// Waits until a report from now on shows what is wanted of a slot; gives its line.
    pub(crate) fn await_shown(&self, slot: u32, wanted: &[&str]) -> String {
        let start = format!("worker slot={slot} ");
        let before = self.log().len();
        eventually(&format!("slot {slot} with {wanted:?}"), || {
            self.signal(Signal::SIGUSR1);
            let log = self.log();
            let line = log[before..]
                .lines()
                .rfind(|line| line.starts_with(&start))?;
            wanted
                .iter()
                .all(|part| line.contains(part))
                .then(|| line.to_owned())
        })
    }

    pub(crate) fn configure(&self, settings: &str) {
        let text = format!(
            "supervision.run_dir = {:?}\nsupervision.worker = {:?}\n{settings}\n",
            self.folder.path().join("run"),
            stub()
        );
        fs::write(self.folder.path().join("spanbuf.toml"), text).unwrap();
    }

    /// A file that tells stubs their manner, each time they look.
    pub(crate) fn manner(&self, manner: &str) -> String {
        let path = self.folder.path().join("manner");
        let beside = self.folder.path().join("manner.new");
        fs::write(&beside, manner).unwrap();
        fs::rename(&beside, &path).unwrap();
        format!("@{}", path.display())
    }

    pub(crate) fn await_said(&self, text: &str) -> String {
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

pub(crate) fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

pub(crate) fn boards_of(pid: u32) -> usize {
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
