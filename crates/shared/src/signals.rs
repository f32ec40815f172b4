//! A worker's and a tool's ear for the signals that ask them to stop.
//!
//! In:     SIGTERM; for tools at a terminal SIGINT, SIGHUP and SIGQUIT as well.
//! Out:    whether a stop was asked for, and waits that end when it is.
//! Keeps:  no handler: signals are blocked and read from a descriptor. Once asked for, a stop stays asked for.
//! Knows:  the kernel's signals. No role.
//! Source: docs/supervision.md 1; docs/house.md 10.

use std::{
    os::fd::AsFd,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

use crate::time::Clock;

/// The kernel gave no descriptor for signals.
#[derive(Debug, thiserror::Error)]
#[error("listen for signals (check limits on open files)")]
pub struct SignalError(#[from] Errno);

/// Whether a stop was asked for.
#[derive(Debug)]
pub struct Stop {
    signals: SignalFd,
    requested: AtomicBool,
}

impl Stop {
    /// Listens for SIGTERM. Call it before any thread is made: threads inherit what is blocked.
    ///
    /// # Errors
    /// [`SignalError`].
    pub fn install() -> Result<Self, SignalError> {
        Self::listen(&[Signal::SIGTERM])
    }

    /// Listens for everything that ends a program at a terminal.
    ///
    /// # Errors
    /// [`SignalError`].
    pub fn install_interactive() -> Result<Self, SignalError> {
        Self::listen(&[
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGHUP,
            Signal::SIGQUIT,
        ])
    }

    fn listen(wanted: &[Signal]) -> Result<Self, SignalError> {
        let mut mask = SigSet::empty();
        wanted.iter().for_each(|&signal| mask.add(signal));
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Self {
            signals,
            requested: AtomicBool::new(false),
        })
    }

    /// Asks for a stop from within: every thread sees it, one that waits at the end of its wait.
    pub fn request(&self) {
        self.requested.store(true, Relaxed);
    }

    /// Whether a stop was asked for.
    #[must_use]
    pub fn requested(&self) -> bool {
        // It says nothing of other memory: whoever reads it late waits once more.
        if !self.requested.load(Relaxed) && matches!(self.signals.read_signal(), Ok(Some(_))) {
            self.requested.store(true, Relaxed);
        }
        self.requested.load(Relaxed)
    }

    /// Waits that long, or until a stop is asked for.
    pub fn wait(&self, length: Duration) {
        let until = Clock::mono_now().after(length);
        while !self.requested() {
            let left = until.since(Clock::mono_now());
            if left.is_zero() {
                return;
            }
            // A rest of less than a millisecond is waited as one; an interrupted wait is looked at again.
            let millis = i32::try_from(left.as_micros().div_ceil(1_000)).unwrap_or(i32::MAX);
            let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
            if poll(
                &mut [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)],
                timeout,
            )
            .is_err_and(|errno| errno != Errno::EINTR)
            {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::raise;

    use super::*;

    #[test]
    fn a_stop_ends_a_wait_and_stays() {
        let stop = Stop::install().unwrap();
        assert!(!stop.requested());
        let begun = Clock::mono_now();
        stop.wait(Duration::from_millis(20));
        assert!(Clock::mono_now().since(begun) >= Duration::from_millis(20));
        raise(Signal::SIGTERM).unwrap();
        stop.wait(Duration::from_secs(60));
        assert!(Clock::mono_now().since(begun) < Duration::from_secs(30));
        assert!(stop.requested() && stop.requested());
    }
}
