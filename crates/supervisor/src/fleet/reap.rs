//! Reaps children, and says why they ended.
//!
//! In:     handles of children; any ended process that became ours.
//! Out:    causes.
//! Keeps:  a worker is reaped through its own handle only; no status is lost, that of a real-time signal neither;
//!         strangers are reaped after the known ones and never in their place.
//! Knows:  wait statuses. Nothing of states.
//! Source: docs/supervision.md 1.

use std::os::fd::AsFd;

use log::{debug, warn};
use nix::{errno::Errno, unistd::Pid};
use rustix::process::{PidfdFlags, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open, waitid};

use shared::board::Cause;

use crate::fleet::spawn::{self, Child};

/// Strangers of one turn at most: the next one comes soon.
const STRANGERS_MAX: usize = 64;

/// Whether this kernel has handles for processes, and reaps through them.
///
/// # Errors
/// The kernel's, when it has none: Linux before 5.4, or a sandbox without the calls.
pub(crate) fn prove_pidfds() -> Result<(), Errno> {
    let own = pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).map_err(spawn::errno)?;
    match waitid(
        WaitId::PidFd(own.as_fd()),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
    )
    .map_err(spawn::errno)
    {
        // We are no child of ours: that was understood.
        Ok(_) | Err(Errno::ECHILD) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Why a child ended, once it has.
pub(crate) fn reap(child: &Child) -> Option<Cause> {
    match waitid(
        WaitId::PidFd(child.pidfd.as_fd()),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
    ) {
        Ok(status) => status.map(|status| cause(&status)),
        Err(error) if spawn::errno(error) == Errno::ECHILD => {
            // Nobody else may reap, and SIGCHLD is not ignored; should it ever be, the slot must not wait for ever.
            warn!("status of worker is lost pid={}", child.pid);
            Some(Cause::Lost)
        }
        Err(error) => {
            warn!("reap worker pid={}: {error}", child.pid);
            None
        }
    }
}

/// Reaps processes that became ours because their parent died; known ones are left to their handles.
pub(crate) fn reap_strangers(known: &[Pid]) {
    for _ in 0..STRANGERS_MAX {
        let Some(pid) = spawn::ended_child().filter(|pid| !known.contains(pid)) else {
            return;
        };
        let Some(stranger) = rustix::process::Pid::from_raw(pid.as_raw()) else {
            return;
        };
        match waitid(
            WaitId::Pid(stranger),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        ) {
            Ok(_) => debug!("reaped a stranger pid={pid}"),
            Err(error) => return warn!("reap a stranger pid={pid}: {error}"),
        }
    }
}

fn cause(status: &WaitIdStatus) -> Cause {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Cause::Exit(code),
        (None, Some(signal)) => Cause::Signal(signal),
        // Only ends are waited for.
        (None, None) => Cause::Lost,
    }
}
