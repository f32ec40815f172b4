//! Which shards may take input.
//!
//! In:     the shards of this worker; how their flushers stand; `now`.
//! Out:    `Changes`: what to pause and what to resume at Kafka.
//! Keeps:  all are paused at first; a shard is open when its flusher has been healthy once and has not been down for longer than the
//!         limit; a flusher closes its own shards and no others; a change is told until it is done.
//! Knows:  shards and slots. No Kafka, no board. Pure.
//! Source: docs/spec.md 6.2; docs/supervision.md 3.

use std::time::Duration;

use shared::{
    board::SlotState,
    shard::{ShardId, ShardList},
    time::MonoNanos,
};

/// The state of intake, shard by shard.
#[derive(Debug, Clone)]
pub struct Intake {
    gates: Vec<Gate>,
    /// How long a flusher may be down before its shards close.
    limit: Duration,
}

/// How a flusher stands, as the supervisor shows it.
#[derive(Debug, Clone, Copy)]
pub struct Flusher {
    /// It has been healthy since the supervisor started.
    pub healthy_once: bool,
    /// The state of its slot and since when; none when nothing is shown.
    pub state: Option<(SlotState, MonoNanos)>,
}

impl Flusher {
    /// Since when it is down, as far as its present state tells; none while it works.
    fn down_since(self, now: MonoNanos) -> Option<MonoNanos> {
        match self.state {
            Some((SlotState::Healthy | SlotState::Backpressured, _)) => None,
            Some((_, since)) => Some(since),
            None => Some(now),
        }
    }
}

/// One shard's intake.
#[derive(Debug, Clone, Copy)]
struct Gate {
    shard: ShardId,
    /// The slot of its flusher; none when nobody flushes it, and then it stays closed.
    flusher: Option<u32>,
    /// Since when the flusher is down: states change while it is, and each has its own beginning.
    down_since: Option<MonoNanos>,
    /// It may take input.
    open: bool,
    /// What Kafka was told last, with success.
    applied: bool,
}

/// What has to change at Kafka.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Shards that take no more input.
    pub pause: Vec<ShardId>,
    /// Shards that take input again.
    pub resume: Vec<ShardId>,
}

impl Changes {
    /// Whether nothing has to change.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pause.is_empty() && self.resume.is_empty()
    }
}

impl Intake {
    /// The intake of these shards, all paused; `all` is the list that the flush workers share.
    #[must_use]
    pub fn new(mine: &ShardList, all: &ShardList, flush_workers: u32, limit: Duration) -> Self {
        let gate = |shard| Gate {
            shard,
            flusher: all.worker_of(shard, flush_workers),
            down_since: None,
            open: false,
            applied: false,
        };
        Self {
            gates: mine.iter().map(gate).collect(),
            limit,
        }
    }

    /// Decides which shards are open, given how each slot stands. Gives what differs from what Kafka was told; the same again until it
    /// is [`done`](Self::done).
    pub fn decide(&mut self, flusher: impl Fn(u32) -> Flusher, now: MonoNanos) -> Changes {
        let mut changes = Changes::default();
        for gate in &mut self.gates {
            gate.open = gate.flusher.map(&flusher).is_some_and(|flusher| {
                let down_since = flusher.down_since(now);
                gate.down_since = down_since.map(|since| gate.down_since.unwrap_or(since));
                let down = gate
                    .down_since
                    .map_or(Duration::ZERO, |since| now.since(since));
                flusher.healthy_once && down <= self.limit
            });
            match (gate.applied, gate.open) {
                (false, true) => changes.resume.push(gate.shard),
                (true, false) => changes.pause.push(gate.shard),
                (true, true) | (false, false) => {}
            }
        }
        changes
    }

    /// Notes that Kafka was told, and took it.
    pub fn done(&mut self, changes: &Changes) {
        for gate in &mut self.gates {
            if changes.resume.contains(&gate.shard) {
                gate.applied = true;
            }
            if changes.pause.contains(&gate.shard) {
                gate.applied = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn at(millis: u64) -> MonoNanos {
        MonoNanos::default().after(Duration::from_millis(millis))
    }

    fn intake(mine: &str) -> Intake {
        Intake::new(&mine.parse().unwrap(), &"0-5".parse().unwrap(), 2, LIMIT)
    }

    fn resume(shards: &[u32]) -> Changes {
        Changes {
            pause: Vec::new(),
            resume: shards.iter().copied().map(ShardId).collect(),
        }
    }

    fn pause(shards: &[u32]) -> Changes {
        Changes {
            pause: shards.iter().copied().map(ShardId).collect(),
            resume: Vec::new(),
        }
    }

    fn flusher(state: SlotState, since: u64) -> Flusher {
        Flusher {
            healthy_once: true,
            state: Some((state, at(since))),
        }
    }

    fn healthy_if(wanted: bool) -> Flusher {
        Flusher {
            healthy_once: wanted,
            state: Some((SlotState::Healthy, at(0))),
        }
    }

    #[test]
    fn a_shard_opens_with_its_own_flusher() {
        let mut intake = intake("0,3-5");
        assert!(intake.decide(|_| healthy_if(false), at(0)).is_empty());
        // Of the whole list: 1, 3 and 5 belong to slot 1.
        let changes = intake.decide(|slot| healthy_if(slot == 1), at(0));
        assert_eq!(changes, resume(&[3, 5]));
        intake.done(&changes);
        assert!(
            intake
                .decide(|slot| healthy_if(slot == 1), at(0))
                .is_empty()
        );
        let changes = intake.decide(|_| healthy_if(true), at(0));
        assert_eq!(changes, resume(&[0, 4]));
        intake.done(&changes);
        assert!(intake.decide(|_| healthy_if(true), at(0)).is_empty());
    }

    #[test]
    fn a_flusher_that_is_down_for_long_closes_its_own_shards() {
        use SlotState::{Backoff, Backpressured, Healthy, Killed, Starting, Suspect};
        let mut intake = intake("0-1");
        intake.done(&resume(&[0, 1]));
        let mut decide = |state, since, now| {
            let other = flusher(Healthy, 0);
            intake.decide(
                |slot| {
                    if slot == 0 {
                        flusher(state, since)
                    } else {
                        other
                    }
                },
                at(now),
            )
        };
        assert!(decide(Backpressured, 0, 50_000).is_empty());
        // Down from the first of these states on, whatever follows it.
        assert!(decide(Suspect, 60_000, 60_010).is_empty());
        assert!(decide(Killed, 64_000, 64_010).is_empty());
        assert!(decide(Backoff, 65_000, 70_000).is_empty());
        assert_eq!(decide(Starting, 69_000, 70_001), pause(&[0]));
        // Up again, and it counts from anew.
        assert!(decide(Healthy, 70_100, 70_200).is_empty());
        assert!(decide(Suspect, 71_000, 80_000).is_empty());
        // Seen late, as by a worker that was away itself.
        let mut fresh = Intake::new(&"0".parse().unwrap(), &"0".parse().unwrap(), 1, LIMIT);
        assert!(fresh.decide(|_| flusher(Killed, 0), at(10_001)).is_empty());
        assert_eq!(
            fresh.decide(|_| flusher(Healthy, 0), at(10_002)),
            resume(&[0])
        );
    }

    #[test]
    fn nothing_shown_is_down() {
        let mut intake = intake("0");
        intake.done(&resume(&[0]));
        let unknown = Flusher {
            healthy_once: true,
            state: None,
        };
        assert!(intake.decide(|_| unknown, at(1)).is_empty());
        assert_eq!(intake.decide(|_| unknown, at(10_002)), pause(&[0]));
    }

    #[test]
    fn a_change_is_told_until_it_is_done() {
        let mut intake = intake("0-1");
        assert_eq!(
            intake.decide(|slot| healthy_if(slot == 0), at(0)),
            resume(&[0])
        );
        let changes = intake.decide(|_| healthy_if(true), at(0));
        assert_eq!(changes, resume(&[0, 1]));
        intake.done(&resume(&[1]));
        assert_eq!(intake.decide(|_| healthy_if(true), at(0)), resume(&[0]));
        intake.done(&changes);
        assert!(intake.decide(|_| healthy_if(true), at(0)).is_empty());
    }

    #[test]
    fn a_shard_that_nobody_flushes_stays_closed() {
        let mut intake = intake("6");
        assert!(intake.decide(|_| healthy_if(true), at(0)).is_empty());
    }
}
