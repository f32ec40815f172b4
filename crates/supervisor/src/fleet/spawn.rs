//! Forks a worker and executes its binary. The only room of this crate with `unsafe` in it.
//!
//! In:     the binary and the environment, made once; name, launch record and slot of one worker.
//! Out:    a child with its own handle, or why there is none. A child that cannot execute leaves the reason in its slot.
//! Keeps:  between fork and exec only raw system calls, on what was made before; all signals are blocked across fork; a
//!         worker begins with an empty mask, in a session of its own, and dies with the supervisor.
//! Knows:  the kernel. Nothing of states and roles.
//! Source: docs/supervision.md 1.
#![expect(
    unsafe_code,
    reason = "fork, exec and what lies between them; dispositions; a look at any ended child"
)]

use std::{
    ffi::{CString, NulError, OsString, c_char, c_int},
    fs::{File, OpenOptions},
    io::{self, Seek, Write},
    mem,
    ops::ControlFlow,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{OpenOptionsExt, PermissionsExt},
        },
    },
    path::{Path, PathBuf},
    ptr,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, fcntl},
    libc,
    sys::{
        memfd::{MFdFlags, memfd_create},
        prctl,
        signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::{ForkResult, Pid, dup2_stdin, fork, getpid, getppid, setsid},
};
use rustix::process::{PidfdFlags, pidfd_open};
use shared::board::SupervisorCells;

/// What a child leaves with that could not execute; its slot says why.
pub(crate) const NOT_EXECUTED: i32 = 127;

/// Signals to a whole group or unit that must not end workers.
const IGNORED: [Signal; 4] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// Variables that are for the supervisor alone.
const OWN_VARIABLES: [&[u8]; 4] = [b"NOTIFY_SOCKET=", b"WATCHDOG_", b"LISTEN_", b"SPANBUF_"];

/// The worker's binary cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BinaryError {
    /// It cannot be opened.
    #[error("open worker binary path={} (build or install the worker beside the supervisor, or set supervision.worker)", path.display())]
    Open {
        /// Where it was looked for.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is nothing that can be executed.
    #[error("open worker binary path={}: it is no executable file (set supervision.worker to the worker's binary)", path.display())]
    NotExecutable {
        /// Where it was looked for.
        path: PathBuf,
    },
}

/// No process came of it.
#[derive(Debug, thiserror::Error)]
#[error("{attempt}")]
pub(crate) struct SpawnError {
    attempt: &'static str,
    #[source]
    pub(crate) errno: Errno,
}

/// A process that was forked here and is not reaped yet.
#[derive(Debug)]
pub(crate) struct Child {
    /// Its process id; only shown.
    pub(crate) pid: Pid,
    /// Its handle: signals and its end go through it.
    pub(crate) pidfd: OwnedFd,
}

/// What all workers are made of.
#[derive(Debug)]
pub(crate) struct Spawner {
    binary: File,
    environment: Vec<CString>,
}

/// One worker to be made.
#[derive(Debug)]
pub(crate) struct Birth<'b> {
    /// What `ps` shows.
    pub(crate) name: &'b str,
    /// What it reads on standard input.
    pub(crate) record: &'b [u8],
    /// What it inherits beside the standard ones, under the same numbers.
    pub(crate) inherited: &'b [BorrowedFd<'b>],
}

impl Spawner {
    /// Opens the worker's binary: all workers of this supervisor are of one build, whatever is installed meanwhile.
    ///
    /// # Errors
    /// [`BinaryError`] when there is none that can be executed.
    pub(crate) fn new(
        path: &Path,
        variables: impl Iterator<Item = (OsString, OsString)>,
    ) -> Result<Self, BinaryError> {
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path);
        let looked = opened.and_then(|binary| binary.metadata().map(|about| (binary, about)));
        let (binary, about) = looked.map_err(|source| BinaryError::Open {
            path: path.to_path_buf(),
            source,
        })?;
        if !about.is_file() || about.permissions().mode() & 0o111 == 0 {
            return Err(BinaryError::NotExecutable {
                path: path.to_path_buf(),
            });
        }
        Ok(Self {
            binary,
            environment: environment(variables),
        })
    }

    /// Forks and executes. A worker that cannot execute ends with [`NOT_EXECUTED`], its reason in its slot.
    ///
    /// # Errors
    /// [`SpawnError`]: no process is left behind.
    pub(crate) fn spawn(
        &self,
        birth: &Birth<'_>,
        cells: &SupervisorCells<'_>,
    ) -> Result<Child, SpawnError> {
        let failed = |attempt| move |errno| SpawnError { attempt, errno };
        let name =
            CString::new(birth.name).map_err(|_: NulError| failed("name worker")(Errno::EINVAL))?;
        let record = record(birth.record).map_err(failed("write launch record"))?;
        let image = Image {
            binary: self.binary.as_fd(),
            record: record.as_fd(),
            inherited: birth.inherited,
            arguments: &[name.as_ptr(), ptr::null()],
            environment: &self
                .environment
                .iter()
                .map(|variable| variable.as_ptr())
                .chain([ptr::null()])
                .collect::<Vec<_>>(),
            parent: getpid(),
            last_signal: libc::SIGRTMAX(),
        };
        let mut before = SigSet::empty();
        sigprocmask(
            SigmaskHow::SIG_SETMASK,
            Some(&SigSet::all()),
            Some(&mut before),
        )
        .map_err(failed("block signals"))?;
        // SAFETY: until it executes or ends, the child runs `Image::take` alone, which calls the kernel on values that
        // were made before; it takes no lock and no memory, so another thread's state at the fork does not matter.
        let forked = match unsafe { fork() } {
            Ok(ForkResult::Child) => image.take(cells),
            Ok(ForkResult::Parent { child }) => Ok(child),
            Err(errno) => Err(failed("fork worker")(errno)),
        };
        // It was taken from the kernel just now: it is put back as it was.
        let restored = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
        debug_assert_eq!(restored, Ok(()), "a mask that was in force");
        handle(forked?).map_err(failed("open pidfd"))
    }
}

/// The child's handle. Without one it is ended: nobody could signal or reap it safely later on.
fn handle(pid: Pid) -> Result<Child, Errno> {
    match rustix::process::Pid::from_raw(pid.as_raw())
        .ok_or(Errno::ESRCH)
        .and_then(open)
    {
        Ok(pidfd) => Ok(Child { pid, pidfd }),
        Err(errno) => {
            // Not reaped yet, so the number is still its own; after KILL its end is a matter of moments.
            let ended = kill(pid, Signal::SIGKILL)
                .and_then(|()| waitid(Id::Pid(pid), WaitPidFlag::WEXITED));
            debug_assert!(ended.is_ok(), "a child of ours takes signals and is reaped");
            Err(errno)
        }
    }
}

fn open(pid: rustix::process::Pid) -> Result<OwnedFd, Errno> {
    pidfd_open(pid, PidfdFlags::empty()).map_err(errno)
}

/// One error of the kernel, from one crate's type to the other's.
pub(crate) fn errno(errno: rustix::io::Errno) -> Errno {
    Errno::from_raw(errno.raw_os_error())
}

/// A file in memory that holds the record, ready to be read.
fn record(bytes: &[u8]) -> Result<OwnedFd, Errno> {
    let mut file = File::from(memfd_create(c"spanbuf-launch", MFdFlags::MFD_CLOEXEC)?);
    let written = file.write_all(bytes).and_then(|()| file.rewind());
    written.map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    Ok(file.into())
}

/// Our variables without those that are for the supervisor alone.
fn environment(variables: impl Iterator<Item = (OsString, OsString)>) -> Vec<CString> {
    let variables =
        variables.map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat());
    let handed_on =
        variables.filter(|variable| !OWN_VARIABLES.iter().any(|own| variable.starts_with(own)));
    // What came from an environment holds no NUL.
    handed_on
        .filter_map(|variable| CString::new(OsString::from_vec(variable).into_vec()).ok())
        .collect()
}

/// What the child becomes: everything is here before the fork.
struct Image<'i> {
    binary: BorrowedFd<'i>,
    record: BorrowedFd<'i>,
    inherited: &'i [BorrowedFd<'i>],
    /// Ends with null, as `environment` does; both point to strings that live as long.
    arguments: &'i [*const c_char],
    environment: &'i [*const c_char],
    parent: Pid,
    last_signal: c_int,
}

impl Image<'_> {
    /// In the child: becomes the worker, or says why not and ends.
    fn take(&self, cells: &SupervisorCells<'_>) -> ! {
        if let ControlFlow::Break(Err(errno)) = self.execute() {
            cells.exec_failed(errno as i32);
        }
        // SAFETY: it ends the child without running what the parent's memory holds: no destructor, no buffer.
        unsafe { libc::_exit(NOT_EXECUTED) }
    }

    /// Comes back only when it did not succeed, without an error when there is nobody to work for.
    fn execute(&self) -> ControlFlow<Result<(), Errno>, ()> {
        let done = |result: Result<(), Errno>| match result {
            Ok(()) => ControlFlow::Continue(()),
            Err(errno) => ControlFlow::Break(Err(errno)),
        };
        done(setsid().map(drop))?;
        for signal in 1..=self.last_signal {
            // KILL and STOP are refused: nobody can have changed them.
            reset_disposition(signal);
        }
        for signal in IGNORED {
            set_disposition(signal as c_int, libc::SIG_IGN);
        }
        done(dup2_stdin(self.record))?;
        for descriptor in self.inherited {
            done(fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty())).map(drop))?;
        }
        done(sigprocmask(
            SigmaskHow::SIG_SETMASK,
            Some(&SigSet::empty()),
            None,
        ))?;
        done(prctl::set_pdeathsig(Signal::SIGKILL))?;
        // It may have died before that, and whoever took us in is no supervisor.
        if getppid() != self.parent {
            return ControlFlow::Break(Ok(()));
        }
        // SAFETY: both lists end with null and point to strings that `spawn` keeps until the fork's memory is replaced.
        unsafe {
            libc::fexecve(
                self.binary.as_raw_fd(),
                self.arguments.as_ptr(),
                self.environment.as_ptr(),
            )
        };
        ControlFlow::Break(Err(Errno::last()))
    }
}

/// Gives a signal its default. Past the C library, which refuses the two that it keeps for itself: a parent that is no C
/// program may have ignored them.
fn reset_disposition(signal: c_int) {
    // The kernel's structure is smaller, and all zeros on every architecture: the default, without flags or mask.
    let default = [0_u64; 8];
    // SAFETY: the kernel reads at most `default`, and writes nothing; the default runs no code of ours.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            default.as_ptr(),
            ptr::null_mut::<u64>(),
            size_of::<u64>(),
        )
    };
}

/// Sets what a signal does, to one of the two values that are no function.
fn set_disposition(signal: c_int, disposition: libc::sighandler_t) {
    // SAFETY: it is called with SIG_DFL and SIG_IGN only: no code of ours ever runs on a signal.
    unsafe { libc::signal(signal, disposition) };
}

/// Lets children become zombies until they are reaped, also where a wrapper had ignored SIGCHLD. The second act of a process.
pub(crate) fn keep_statuses() {
    set_disposition(Signal::SIGCHLD as c_int, libc::SIG_DFL);
}

/// The pid of a child that has ended, known or not; it stays to be reaped. None while there is none.
///
/// It stands here because no safe call tells it for a death by a real-time signal.
pub(crate) fn ended_child() -> Option<Pid> {
    // SAFETY: a `siginfo_t` of zeros is one: it holds numbers and pointers only.
    let mut about: libc::siginfo_t = unsafe { mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: it writes one `siginfo_t` to `about`, which is ours.
    let looked = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut about, flags) };
    // SAFETY: a successful `waitid` has filled the fields of a child's state, or left them zero.
    let pid = unsafe { about.si_pid() };
    (looked == 0 && pid > 0).then(|| Pid::from_raw(pid))
}

#[cfg(test)]
pub(crate) mod tests;
