//! One turn after the other: wait, drain signals, reap, look, judge, act, notify.
//!
//! In:     signals, the tick, ends of children: each a descriptor in one epoll.
//! Out:    the fleet, told in that order; the exit code when it is at its end.
//! Keeps:  the process waits here only; nothing in a turn waits. Judging comes last.
//! Knows:  descriptors. It decides nothing.
//! Source: docs/supervision.md 1.

use std::{os::fd::AsFd, time::Duration};

use log::warn;
use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};
use shared::{exit::Exit, time::Clock};

use crate::{fleet::Fleet, notify::Notify};

/// Signals that are read; all but CHLD are an operator's.
pub(crate) const SIGNALS: [Signal; 6] = [
    Signal::SIGCHLD,
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];
/// A timer that is set to nothing is off.
const AT_ONCE: Duration = Duration::from_nanos(1);

/// The kernel refused a descriptor, or to wait on one.
#[derive(Debug, thiserror::Error)]
#[error("{attempt} (check limits on open files and memory)")]
pub struct TurnError {
    attempt: &'static str,
    source: Errno,
}

/// What an operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Drain (TERM, INT).
    Stop,
    /// Take on what the configuration says now (HUP).
    Reload,
    /// Show the workers (USR1).
    Report,
    /// Forget what failed (USR2).
    Retry,
}

/// Everything that the supervisor waits on.
#[derive(Debug)]
pub struct Turn {
    epoll: Epoll,
    signals: SignalFd,
    timer: TimerFd,
}

/// Runs the fleet to its end.
///
/// # Errors
/// [`TurnError`] when the kernel does not let it wait.
pub(crate) fn run(turn: &Turn, fleet: &mut Fleet, notify: &mut Notify) -> Result<Exit, TurnError> {
    turn.arm(Duration::ZERO)?;
    loop {
        let requests = turn.wait()?;
        let now = Clock::mono_now();
        fleet.begin(now);
        for request in requests {
            fleet.hear(request, now);
        }
        fleet.reap(now);
        fleet.judge(now);
        // Before the end: the workers may be gone within the turn that was asked to stop.
        notify.turn(&fleet.health(), now);
        if let Some(exit) = fleet.ended(now) {
            return Ok(exit);
        }
        for pidfd in fleet.unwatched() {
            turn.watch(pidfd);
        }
        turn.arm(fleet.rest(now))?;
    }
}

impl Turn {
    /// Blocks the signals and listens for them: the first act of a process.
    ///
    /// # Errors
    /// [`TurnError`].
    pub fn new() -> Result<Self, TurnError> {
        let mask: SigSet = SIGNALS.into_iter().collect();
        mask.thread_block().map_err(failed("block signals"))?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .map_err(failed("listen for signals"))?;
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )
        .map_err(failed("make a timer"))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed("make an epoll"))?;
        for descriptor in [signals.as_fd(), timer.as_fd()] {
            epoll
                .add(descriptor, EpollEvent::new(EpollFlags::EPOLLIN, 0))
                .map_err(failed("wait on signals and ticks"))?;
        }
        Ok(Self {
            epoll,
            signals,
            timer,
        })
    }

    /// Lets a turn begin after that time, if nothing else begins one.
    ///
    /// # Errors
    /// [`TurnError`].
    pub fn arm(&self, rest: Duration) -> Result<(), TurnError> {
        let once = Expiration::OneShot(TimeSpec::from(rest.max(AT_ONCE)));
        self.timer
            .set(once, TimerSetTimeFlags::empty())
            .map_err(failed("set the timer"))
    }

    /// Lets a turn begin when a child ends; once, so that a descriptor that is not closed at once wakes nobody again.
    pub fn watch(&self, pidfd: impl AsFd) {
        if let Err(errno) = self.epoll.add(
            pidfd,
            EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 0),
        ) {
            warn!("worker is not watched, its end is noticed at a tick: {errno}");
        }
    }

    /// Waits for the next turn; gives what was asked for meanwhile, once for each signal.
    ///
    /// # Errors
    /// [`TurnError`].
    pub fn wait(&self) -> Result<Vec<Request>, TurnError> {
        let mut events = [EpollEvent::empty(); 16];
        match self.epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed("wait for events")(errno)),
        }
        match self.timer.wait() {
            // Another descriptor began this turn.
            Ok(()) | Err(Errno::EAGAIN) => {}
            Err(errno) => return Err(failed("read the tick")(errno)),
        }
        let mut requests = Vec::new();
        while let Some(signal) = self.signals.read_signal().map_err(failed("read signals"))? {
            requests.extend(i32::try_from(signal.ssi_signo).ok().and_then(request));
        }
        Ok(requests)
    }
}

fn failed(attempt: &'static str) -> impl FnOnce(Errno) -> TurnError {
    move |source| TurnError { attempt, source }
}

/// What a signal asks for. CHLD asks for nothing: every turn reaps.
fn request(signal: i32) -> Option<Request> {
    match Signal::try_from(signal).ok()? {
        Signal::SIGTERM | Signal::SIGINT => Some(Request::Stop),
        Signal::SIGHUP => Some(Request::Reload),
        Signal::SIGUSR1 => Some(Request::Report),
        Signal::SIGUSR2 => Some(Request::Retry),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::raise;

    use super::*;

    #[test]
    fn ticks_and_signals_begin_a_turn() {
        let turn = Turn::new().unwrap();
        turn.arm(Duration::ZERO).unwrap();
        assert_eq!(turn.wait().unwrap(), []);
        turn.arm(Duration::from_millis(20)).unwrap();
        let begun = Clock::mono_now();
        assert_eq!(turn.wait().unwrap(), []);
        assert!(Clock::mono_now().since(begun) >= Duration::from_millis(20));
        for signal in [Signal::SIGUSR1, Signal::SIGINT, Signal::SIGCHLD] {
            raise(signal).unwrap();
        }
        let mut requests = turn.wait().unwrap();
        requests.sort_by_key(|request| *request as u8);
        assert_eq!(requests, [Request::Stop, Request::Report]);
    }
}
