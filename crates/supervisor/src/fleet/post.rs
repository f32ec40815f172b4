//! One slot with its process: what it is for, how it stands, what is said of it.
//!
//! In:     its slot, its child, what the board showed.
//! Out:    a standing for the board, lines in the log.
//! Keeps:  each change of state is said once.
//! Knows:  how a worker is named. It decides nothing.
//! Source: docs/supervision.md 2, 3, 4.

use std::{fmt, time::Duration};

use log::{error, info, warn};
use shared::{
    board::{SlotBeat, SlotState, Standing},
    time::{MonoNanos, millis},
};

use crate::{
    fleet::{Duty, capture, spawn::Child},
    slot::{Slot, lives},
};

/// How long progress is counted for one rate.
const PACE_EVERY: Duration = Duration::from_secs(5);

/// One slot with its process.
#[derive(Debug)]
pub(crate) struct Post {
    /// Its number on the board.
    pub(crate) number: u32,
    pub(crate) duty: Duty,
    pub(crate) slot: Slot,
    pub(crate) child: Option<Child>,
    /// What the board showed in this turn.
    pub(crate) beat: Option<SlotBeat>,
    /// A debugger that held it at the last look.
    pub(crate) tracer: Option<u32>,
    pub(super) watched: bool,
    pace: Pace,
}

/// How fast progress goes.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    from: Option<(u64, MonoNanos)>,
    /// Signs of progress in ten seconds, over the last whole count.
    rate: u64,
}

impl Pace {
    fn take(&mut self, progress: u64, now: MonoNanos) {
        match self.from {
            Some((before, since)) if progress >= before => {
                let took = now.since(since);
                if took >= PACE_EVERY {
                    self.rate = (progress - before).saturating_mul(10_000) / millis(took).max(1);
                    self.from = Some((progress, now));
                }
            }
            // The first, or another life's.
            _ => self.from = Some((progress, now)),
        }
    }
}

impl Post {
    pub(crate) fn new(number: u32, duty: Duty, slot: Slot) -> Self {
        Self {
            number,
            duty,
            slot,
            child: None,
            beat: None,
            tracer: None,
            watched: false,
            pace: Pace::default(),
        }
    }

    /// Asks who holds the process with a debugger.
    pub(super) fn trace(&mut self) {
        self.tracer = self
            .child
            .as_ref()
            .and_then(|child| capture::tracer(child.pid));
    }

    /// Takes this turn's progress into the rate.
    pub(super) fn pace(&mut self, now: MonoNanos) {
        match &self.beat {
            Some(beat) => self.pace.take(beat.progress, now),
            None => self.pace = Pace::default(),
        }
    }

    /// How it stands, for the board.
    pub(super) fn standing(&self, hang: Duration) -> Standing {
        let slot = &self.slot;
        let child = self.child.as_ref();
        Standing {
            role: self.duty.role,
            index: self.duty.index,
            generation: slot.generation(),
            state: slot.state(),
            since: slot.since(),
            healthy_once: slot.healthy_once(),
            child: child.and_then(|child| u32::try_from(child.pid.as_raw()).ok()),
            moved: slot.moved().filter(|_| lives(slot.state())),
            rate: self.pace.rate,
            failures: slot.cap().failures(),
            max_restarts: slot.max_restarts(),
            lifetime: slot.cap().lifetime(),
            hang,
            tracer: self.tracer,
            deaths: slot.deaths().rev().copied().collect(),
        }
    }

    /// Says everything that can be seen of a worker that will be killed.
    pub(super) fn capture(&self, now: MonoNanos) {
        let Some(child) = &self.child else {
            return;
        };
        let age = self.slot.beat_age(now).unwrap_or_default().as_millis();
        match &self.beat {
            Some(beat) => error!(
                "hung {self} phase={} silent_for={age}ms progress={} in_flight={} queue_depth={} longest_gap={}ms",
                beat.phase,
                beat.progress,
                beat.in_flight,
                beat.queue_depth,
                beat.longest_gap.as_millis()
            ),
            None => error!("hung {self} phase=boot silent_for={age}ms: it has shown no beat"),
        }
        for line in capture::lines(child.pid) {
            warn!("hung slot={} pid={} {line}", self.number, child.pid);
        }
    }

    /// Says what has changed.
    pub(super) fn tell(&self, before: &Slot) {
        let (from, to) = (before.state(), self.slot.state());
        if from == to {
            return;
        }
        let restarts = format!(
            "{}/{}",
            self.slot.cap().failures(),
            self.slot.max_restarts()
        );
        let cause = self
            .slot
            .deaths()
            .last()
            .map_or_else(String::new, |death| death.cause.to_string());
        match to {
            // It is said with its process.
            SlotState::Starting => {}
            SlotState::Stopped if lives(from) => info!("stopped {self} cause={cause}"),
            SlotState::Hung | SlotState::Killed => warn!("changed {self} from={from} to={to}"),
            SlotState::Suspect => {
                warn!("changed {self} from={from} to={to} (it shows no progress)")
            }
            SlotState::Failed if self.slot.on_trial() => error!(
                "failed for good with its new configuration {self} cause={cause} restarts={restarts} (the others are not drained)"
            ),
            SlotState::Failed => error!("failed for good {self} cause={cause} restarts={restarts}"),
            SlotState::Backoff => warn!(
                "died {self} cause={cause} restarts={restarts} wait={}ms",
                self.slot.wait().as_millis()
            ),
            SlotState::Unkillable => {
                error!("does not end after KILL {self} (its shards stay closed)")
            }
            _ => info!("changed {self} from={from} to={to}"),
        }
    }
}

impl fmt::Display for Post {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            number,
            duty:
                Duty {
                    role,
                    index,
                    shards,
                },
            slot,
            child,
            ..
        } = self;
        write!(
            f,
            "slot={number} role={role} index={index} shards={shards} generation={}",
            slot.generation()
        )?;
        child
            .as_ref()
            .map_or(Ok(()), |child| write!(f, " pid={}", child.pid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_counted_for_five_seconds() {
        let at = |seconds| MonoNanos::default().after(Duration::from_secs(seconds));
        let mut pace = Pace::default();
        pace.take(10, at(0));
        pace.take(20, at(4));
        assert_eq!(pace.rate, 0);
        pace.take(60, at(5));
        assert_eq!(pace.rate, 100);
        // Another life begins at zero.
        pace.take(0, at(6));
        pace.take(5, at(16));
        assert_eq!(pace.rate, 5);
        pace.take(u64::MAX, at(26));
        assert!(pace.rate > 0);
    }
}
