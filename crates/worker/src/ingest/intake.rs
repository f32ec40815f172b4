//! Which shards may take input.
//!
//! In:     the shards of this worker; which flushers have been healthy.
//! Out:    `Changes`: what to pause and what to resume at Kafka.
//! Keeps:  all are paused at first; a shard opens when its flusher has been healthy once, and stays open; a change is told until it is
//!         done.
//! Knows:  shards and slots. No Kafka, no board. Pure.
//! Source: docs/spec.md 6.2; docs/supervision.md 3.

use shared::shard::{ShardId, ShardList};

/// The state of intake, shard by shard.
#[derive(Debug, Clone)]
pub struct Intake {
    gates: Vec<Gate>,
}

/// One shard's intake.
#[derive(Debug, Clone, Copy)]
struct Gate {
    shard: ShardId,
    /// The slot of its flusher; none when nobody flushes it, and then it stays closed.
    flusher: Option<u32>,
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
    pub fn new(mine: &ShardList, all: &ShardList, flush_workers: u32) -> Self {
        let gate = |shard| Gate {
            shard,
            flusher: all.worker_of(shard, flush_workers),
            open: false,
            applied: false,
        };
        Self {
            gates: mine.iter().map(gate).collect(),
        }
    }

    /// Decides which shards are open, given which slots have been healthy since the supervisor started. Gives what differs from what
    /// Kafka was told; the same again until it is [`done`](Self::done).
    pub fn decide(&mut self, healthy_once: impl Fn(u32) -> bool) -> Changes {
        let mut changes = Changes::default();
        for gate in &mut self.gates {
            gate.open |= gate.flusher.is_some_and(&healthy_once);
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

    fn intake(mine: &str) -> Intake {
        Intake::new(&mine.parse().unwrap(), &"0-5".parse().unwrap(), 2)
    }

    fn resume(shards: &[u32]) -> Changes {
        Changes {
            pause: Vec::new(),
            resume: shards.iter().copied().map(ShardId).collect(),
        }
    }

    #[test]
    fn a_shard_opens_with_its_own_flusher_and_stays_open() {
        let mut intake = intake("0,3-5");
        assert!(intake.decide(|_| false).is_empty());
        // Of the whole list: 1, 3 and 5 belong to slot 1.
        let changes = intake.decide(|slot| slot == 1);
        assert_eq!(changes, resume(&[3, 5]));
        intake.done(&changes);
        assert!(intake.decide(|slot| slot == 1).is_empty());
        assert!(intake.decide(|_| false).is_empty());
        let changes = intake.decide(|slot| slot == 0);
        assert_eq!(changes, resume(&[0, 4]));
        intake.done(&changes);
        assert!(intake.decide(|_| true).is_empty());
    }

    #[test]
    fn a_change_is_told_until_it_is_done() {
        let mut intake = intake("0-1");
        assert_eq!(intake.decide(|slot| slot == 0), resume(&[0]));
        assert_eq!(intake.decide(|_| false), resume(&[0]));
        let changes = intake.decide(|_| true);
        assert_eq!(changes, resume(&[0, 1]));
        intake.done(&resume(&[1]));
        assert_eq!(intake.decide(|_| true), resume(&[0]));
        intake.done(&changes);
        assert!(intake.decide(|_| true).is_empty());
    }

    #[test]
    fn what_was_opened_at_kafka_and_is_not_open_is_paused() {
        let mut intake = intake("2");
        intake.done(&resume(&[2]));
        let pause = Changes {
            pause: vec![ShardId(2)],
            resume: Vec::new(),
        };
        assert_eq!(intake.decide(|_| false), pause);
        intake.done(&pause);
        assert!(intake.decide(|_| false).is_empty());
    }

    #[test]
    fn a_shard_that_nobody_flushes_stays_closed() {
        let mut intake = intake("6");
        assert!(intake.decide(|_| true).is_empty());
    }
}
