//! What the supervisor shows of a slot beside its state: its child, its failures, its last deaths.
//!
//! In:     a `Standing`, at each turn.
//! Out:    the same for `spanctl`, for role `http` and for the dump.
//! Keeps:  the supervisor never reads it back; whatever the cells hold, a reader gets values within their range.
//! Knows:  the layout. No policy.
//! Source: docs/supervision.md 2, 4.

use std::{fmt, sync::atomic::Ordering::Relaxed, time::Duration};

use nix::{errno::Errno, libc, sys::signal::Signal};

use super::{
    layout::{Phase, SlotState, slot},
    views::{Board, SupervisorCells},
};
use crate::{
    launch::Role,
    time::{MonoNanos, millis},
};

/// Why a worker ended, or never began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It ended by itself, with that code. Without having been asked to, even 0 is a failure.
    Exit(i32),
    /// A signal ended it, by number.
    Signal(i32),
    /// It was forked but the worker's binary could not be executed: the errno.
    Exec(i32),
    /// It could not be forked: the errno.
    Fork(i32),
    /// It showed no progress in that phase for longer than the phase allows.
    Hang(Phase),
    /// It was not ready in time.
    BootTimeout,
    /// The kernel killed it for memory.
    Oom,
    /// It was killed and did not end.
    Unkillable,
    /// Somebody else took its status.
    Lost,
}

impl Cause {
    const NUMBER_BITS: u32 = 12;

    fn code(self) -> (u64, i32) {
        match self {
            Self::Exit(code) => (1, code),
            Self::Signal(number) => (2, number),
            Self::Exec(errno) => (3, errno),
            Self::Fork(errno) => (4, errno),
            Self::Hang(phase) => (5, phase.code().into()),
            Self::BootTimeout => (6, 0),
            Self::Oom => (7, 0),
            Self::Unkillable => (8, 0),
            Self::Lost => (9, 0),
        }
    }

    fn of_code(kind: u64, number: u16) -> Option<Self> {
        let value = i32::from(number);
        Some(match kind {
            1 => Self::Exit(value),
            2 => Self::Signal(value),
            3 => Self::Exec(value),
            4 => Self::Fork(value),
            5 => Self::Hang(Phase::of_code(number)?),
            6 => Self::BootTimeout,
            7 => Self::Oom,
            8 => Self::Unkillable,
            9 => Self::Lost,
            _ => return None,
        })
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Exit(code) => write!(f, "exit_{code}"),
            Self::Signal(number) => write!(f, "signal_{}", signal_name(number)),
            Self::Exec(errno) => write!(f, "exec_{:?}", Errno::from_raw(errno)),
            Self::Fork(errno) => write!(f, "fork_{:?}", Errno::from_raw(errno)),
            Self::Hang(phase) => write!(f, "hang_{phase}"),
            Self::BootTimeout => f.write_str("boot_timeout"),
            Self::Oom => f.write_str("oom"),
            Self::Unkillable => f.write_str("unkillable"),
            Self::Lost => f.write_str("signal_LOST"),
        }
    }
}

/// `KILL`, `RTMIN+3`, or the number of a signal without a name.
fn signal_name(signal: i32) -> String {
    match Signal::try_from(signal) {
        Ok(named) => named.as_str().trim_start_matches("SIG").to_owned(),
        Err(_) if signal >= libc::SIGRTMIN() && signal <= libc::SIGRTMAX() => {
            format!("RTMIN+{}", signal - libc::SIGRTMIN())
        }
        Err(_) => signal.to_string(),
    }
}

/// One of the last deaths of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Death {
    /// When it was noticed.
    pub at: MonoNanos,
    /// Why.
    pub cause: Cause,
}

impl Death {
    /// Microseconds in 48 bits: nine years of uptime.
    const AT_BITS: u32 = 48;

    fn pack(self) -> u64 {
        let (kind, number) = self.cause.code();
        let largest = (1 << Cause::NUMBER_BITS) - 1;
        let number = u64::try_from(number).map_or(largest, |number| number.min(largest));
        let micros = (self.at.0 / 1_000).min((1 << Self::AT_BITS) - 1);
        (kind << Cause::NUMBER_BITS | number) << Self::AT_BITS | micros
    }

    fn unpack(word: u64) -> Option<Self> {
        let micros = word & ((1 << Self::AT_BITS) - 1);
        let code = word >> Self::AT_BITS;
        let number = u16::try_from(code & ((1 << Cause::NUMBER_BITS) - 1)).ok()?;
        Some(Self {
            at: MonoNanos(micros.saturating_mul(1_000)),
            cause: Cause::of_code(code >> Cause::NUMBER_BITS, number)?,
        })
    }
}

/// What the supervisor shows of one slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// What its worker is for.
    pub role: Role,
    /// Its number within its role.
    pub index: u32,
    /// Which life of the slot it is; 0 before the first.
    pub generation: u32,
    /// The state.
    pub state: SlotState,
    /// When the state was entered.
    pub since: MonoNanos,
    /// Whether its worker has been healthy since the supervisor started.
    pub healthy_once: bool,
    /// Its process.
    pub child: Option<u32>,
    /// When progress or phase was last seen to change, in this life.
    pub moved: Option<MonoNanos>,
    /// Signs of progress in ten seconds.
    pub rate: u64,
    /// Failures that have not healed.
    pub failures: u32,
    /// How many are answered by a restart.
    pub max_restarts: u32,
    /// All failures since the supervisor started.
    pub lifetime: u64,
    /// The budget between two signs of progress.
    pub hang: Duration,
    /// A debugger that holds the process: it is not judged meanwhile.
    pub tracer: Option<u32>,
    /// The last deaths, newest first.
    pub deaths: Vec<Death>,
}

impl SupervisorCells<'_> {
    /// Shows how a slot stands; all cells are written anew, so that garbage does not last.
    pub fn show(&self, standing: &Standing) {
        let role: u64 = match standing.role {
            Role::Ingest => 1,
            Role::Flush => 2,
            Role::Check => 3,
        };
        self.store(slot::STATE, standing.state.pack(standing.since));
        self.store(slot::HEALTHY_ONCE, standing.healthy_once.into());
        self.store(slot::GENERATION, standing.generation.into());
        self.store(slot::DUTY, role << 32 | u64::from(standing.index));
        self.store(slot::CHILD, standing.child.unwrap_or(0).into());
        self.store(slot::MOVED, standing.moved.map_or(0, |moved| moved.0));
        self.store(slot::RATE, standing.rate);
        self.store(
            slot::FAILURES,
            u64::from(standing.failures) << 32 | u64::from(standing.max_restarts),
        );
        self.store(slot::LIFETIME, standing.lifetime);
        self.store(slot::HANG, millis(standing.hang));
        self.store(slot::TRACER, standing.tracer.unwrap_or(0).into());
        for place in 0..slot::DEATHS_KEPT {
            let death = standing.deaths.get(place);
            self.store(slot::DEATHS + place, death.map_or(0, |death| death.pack()));
        }
    }
}

impl Board {
    /// How a slot stands; none before the supervisor has shown it.
    #[must_use]
    pub fn standing(&self, slot: u32) -> Option<Standing> {
        let (state, since) = self.state(slot)?;
        let cells = self.slot(slot)?;
        let word = |place: usize| cells[place].load(Relaxed);
        let low = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0);
        let pid = |word: u64| Some(low(word)).filter(|&pid| pid > 0);
        let duty = word(slot::DUTY);
        Some(Standing {
            role: match duty >> 32 {
                1 => Role::Ingest,
                2 => Role::Flush,
                _ => Role::Check,
            },
            index: low(duty),
            generation: low(word(slot::GENERATION)),
            state,
            since,
            healthy_once: word(slot::HEALTHY_ONCE) == 1,
            child: pid(word(slot::CHILD)),
            moved: Some(MonoNanos(word(slot::MOVED))).filter(|moved| moved.0 > 0),
            rate: word(slot::RATE),
            failures: low(word(slot::FAILURES) >> 32),
            max_restarts: low(word(slot::FAILURES)),
            lifetime: word(slot::LIFETIME),
            hang: Duration::from_millis(word(slot::HANG)),
            tracer: pid(word(slot::TRACER)),
            deaths: (0..slot::DEATHS_KEPT)
                .filter_map(|place| Death::unpack(word(slot::DEATHS + place)))
                .collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn causes_are_named() {
        let causes = [
            (Cause::Exit(0), "exit_0"),
            (Cause::Signal(libc::SIGKILL), "signal_KILL"),
            (Cause::Signal(libc::SIGRTMIN() + 3), "signal_RTMIN+3"),
            (Cause::Signal(33), "signal_33"),
            (Cause::Exec(libc::ENOENT), "exec_ENOENT"),
            (Cause::Fork(libc::EAGAIN), "fork_EAGAIN"),
            (Cause::Hang(Phase::Redis), "hang_redis"),
            (Cause::BootTimeout, "boot_timeout"),
            (Cause::Oom, "oom"),
            (Cause::Unkillable, "unkillable"),
            (Cause::Lost, "signal_LOST"),
        ];
        for (cause, name) in causes {
            assert_eq!(cause.to_string(), name);
            let death = Death {
                at: MonoNanos(7_000),
                cause,
            };
            assert_eq!(Death::unpack(death.pack()), Some(death));
        }
        assert_eq!(Death::unpack(0), None);
    }

    proptest! {
        #[test]
        fn any_word_is_a_death_or_none(word: u64) {
            if let Some(death) = Death::unpack(word) {
                prop_assert!(!death.cause.to_string().is_empty());
            }
        }
    }
}
