//! Stops: signals to single workers, and the draining of all.
//!
//! In:     an operator's word, or a slot that failed for good; the deadline.
//! Out:    TERM and KILL through a worker's own handle; the exit code in the end.
//! Keeps:  one deadline for all, and it only comes nearer. An escalation keeps its code whatever follows.
//! Knows:  handles. Nothing of states.
//! Source: docs/supervision.md 3, 4.

use std::{os::fd::AsFd, time::Duration};

use log::error;
use rustix::process::{Signal, pidfd_send_signal};
use shared::{config::HangSignal, exit::Exit, time::MonoNanos};

use crate::fleet::spawn::{Child, errno};

/// How long killed workers are waited for before the supervisor ends without them; they die with it.
const REAPING_MAX: Duration = Duration::from_secs(2);

/// Asks a worker to end what it is in.
pub(crate) fn terminate(child: &Child) {
    send(child, Signal::TERM);
}

/// Ends a worker.
pub(crate) fn kill(child: &Child) {
    send(child, Signal::KILL);
}

/// Sends a hung worker what makes it leave a core or a trace.
pub(crate) fn hang_signal(child: &Child, signal: HangSignal) {
    send(
        child,
        match signal {
            HangSignal::Abrt => Signal::ABORT,
            HangSignal::Quit => Signal::QUIT,
            HangSignal::Segv => Signal::SEGV,
            HangSignal::Trap => Signal::TRAP,
        },
    );
}

fn send(child: &Child, signal: Signal) {
    // It is not reaped yet, so its handle takes signals even when it has ended.
    if let Err(error) = pidfd_send_signal(child.pidfd.as_fd(), signal) {
        error!(
            "send signal={signal:?} to worker pid={}: {}",
            child.pid,
            errno(error)
        );
    }
}

/// The mode in which nothing is started and all is to end.
#[derive(Debug)]
pub(crate) struct Drain {
    /// What it ends with, if nobody has to be killed or it is an escalation.
    exit: Exit,
    /// An operator asked for it; the next time, it is for the last time.
    asked: bool,
    deadline: MonoNanos,
    killed_at: Option<MonoNanos>,
    /// Workers that had to be killed.
    killed: Vec<String>,
}

impl Drain {
    /// An operator asks for it.
    pub(crate) fn asked(now: MonoNanos, length: Duration) -> Self {
        Self {
            exit: Exit::Ok,
            asked: true,
            deadline: now.after(length),
            killed_at: None,
            killed: Vec::new(),
        }
    }

    /// A slot failed for good.
    pub(crate) fn escalated(exit: Exit, now: MonoNanos, length: Duration) -> Self {
        Self {
            exit,
            asked: false,
            ..Self::asked(now, length)
        }
    }

    /// An operator asks for it again: the deadline is now. For one that escalated by itself it is the first time.
    pub(crate) fn ask(&mut self, now: MonoNanos) {
        if std::mem::replace(&mut self.asked, true) {
            self.deadline = self.deadline.min(now);
        }
    }

    /// When it is time to kill.
    pub(crate) fn deadline(&self) -> MonoNanos {
        self.deadline
    }

    /// When time alone moves it on.
    pub(crate) fn due(&self) -> MonoNanos {
        self.killed_at
            .map_or(self.deadline, |killed_at| killed_at.after(REAPING_MAX))
    }

    /// Whether it is time to kill, and it was not done yet.
    pub(crate) fn is_due(&self, now: MonoNanos) -> bool {
        self.killed_at.is_none() && now >= self.deadline
    }

    /// Those workers had to be killed.
    pub(crate) fn kill(&mut self, workers: Vec<String>, now: MonoNanos) {
        self.killed_at = Some(now);
        self.killed = workers;
    }

    /// Whether what was killed was waited for long enough.
    pub(crate) fn is_over(&self, now: MonoNanos) -> bool {
        self.killed_at
            .is_some_and(|killed_at| now.since(killed_at) >= REAPING_MAX)
    }

    /// Who had to be killed.
    pub(crate) fn killed(&self) -> &[String] {
        &self.killed
    }

    /// The exit code.
    pub(crate) fn exit(&self) -> Exit {
        match self.exit {
            Exit::Ok if !self.killed.is_empty() => Exit::Killed,
            exit => exit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> MonoNanos {
        MonoNanos::default().after(Duration::from_secs(seconds))
    }

    #[test]
    fn the_second_request_ends_at_once_and_the_deadline_only_comes_nearer() {
        let mut drain = Drain::asked(at(10), Duration::from_secs(25));
        assert!(!drain.is_due(at(34)) && drain.is_due(at(35)));
        drain.ask(at(12));
        assert!(drain.is_due(at(12)));
        drain.ask(at(50));
        assert_eq!(drain.deadline(), at(12));
        drain.kill(vec!["slot=0".into()], at(12));
        assert!(!drain.is_due(at(13)) && !drain.is_over(at(13)) && drain.is_over(at(14)));
        assert_eq!(drain.exit(), Exit::Killed);
    }

    #[test]
    fn an_escalation_keeps_its_code_and_is_asked_twice() {
        let mut drain = Drain::escalated(Exit::Restarts, at(10), Duration::from_secs(25));
        drain.ask(at(11));
        assert!(!drain.is_due(at(11)));
        drain.ask(at(12));
        assert!(drain.is_due(at(12)));
        drain.kill(vec!["slot=0".into()], at(12));
        assert_eq!(drain.exit(), Exit::Restarts);
        assert_eq!(Drain::asked(at(0), Duration::ZERO).exit(), Exit::Ok);
    }
}
