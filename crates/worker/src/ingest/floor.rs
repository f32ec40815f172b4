//! The floor of a shard: the offset below which nothing is buffered, should Redis lose everything.
//!
//! In:     how far the shard has read, and by when; the lowest score in its queues, now and then.
//! Out:    an offset that every commit carries.
//! Keeps:  what is still buffered lies at or above the floor; it never goes up past that, and its memory is bounded.
//! Knows:  offsets and times. Pure.
//! Source: docs/store.md 6.

use std::{collections::VecDeque, time::Duration};

use shared::time::UnixMillis;

/// The longest time for which a look may be put off.
const PUT_OFF_MAX: Duration = Duration::from_secs(600);
/// Between two samples of one shard, by its own clock.
const SAMPLE_EVERY: Duration = Duration::from_secs(5);
/// The most samples of a shard; beyond them, every other one is let go.
const SAMPLES_MAX: usize = 1_024;

/// Up to a moment, nothing had come from this offset on.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// No entry below `next` has a later arrival.
    latest: UnixMillis,
    next: u64,
}

/// One shard's floor.
#[derive(Debug)]
pub struct Floor {
    floor: u64,
    samples: VecDeque<Sample>,
    /// What the judgement before this one came to.
    before: Option<u64>,
}

impl Floor {
    /// Begins at a floor that is known.
    #[must_use]
    pub fn new(floor: u64) -> Self {
        Self {
            floor,
            samples: VecDeque::new(),
            before: None,
        }
    }

    /// The offset below which nothing is buffered.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.floor
    }

    /// Notes a batch that is in Redis: all below `next`, with no arrival later than `latest`.
    pub fn note(&mut self, latest: UnixMillis, next: u64) {
        let last = self.samples.back().copied();
        let latest = last.map_or(latest, |last| last.latest.max(latest));
        if last.is_some_and(|last| latest < last.latest.after(SAMPLE_EVERY)) {
            return;
        }
        self.samples.push_back(Sample { latest, next });
        if self.samples.len() > SAMPLES_MAX {
            let mut keep = false;
            self.samples.retain(|_| {
                keep = !keep;
                keep
            });
        }
    }

    /// Takes the lowest score of the shard's queues, read when all below `position` was in; none: nothing is buffered. `age` is
    /// the longest life of a segment.
    ///
    /// A flusher lifts a score while it works on a trace, and Redis may be lost just then: what the judgement before found
    /// holds as well.
    pub fn judge(&mut self, position: u64, lowest: Option<UnixMillis>, age: Duration) {
        let found = match lowest {
            None => position,
            Some(lowest) => {
                // An entry's deadline is at most `age` behind its arrival, and its look may have been put off.
                let oldest = UnixMillis(
                    lowest
                        .0
                        .saturating_sub(shared::time::millis(age + PUT_OFF_MAX)),
                );
                let gone = self
                    .samples
                    .iter()
                    .take_while(|sample| sample.latest < oldest)
                    .count();
                let sample = gone
                    .checked_sub(1)
                    .and_then(|index| self.samples.get(index));
                sample.map_or(self.floor, |sample| sample.next.min(position))
            }
        };
        let both = self
            .before
            .replace(found)
            .map_or(self.floor, |before| before.min(found));
        self.floor = self.floor.max(both);
        while self
            .samples
            .get(1)
            .is_some_and(|second| second.next <= self.floor)
        {
            self.samples.pop_front();
        }
    }

    /// The shard is read again from an offset.
    pub fn rewind(&mut self, offset: u64) {
        *self = Self::new(self.floor.min(offset));
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const AGE: Duration = Duration::from_secs(600);

    #[test]
    fn with_nothing_buffered_the_floor_follows_the_position_one_judgement_behind() {
        let mut floor = Floor::new(5);
        floor.judge(100, None, AGE);
        assert_eq!(floor.offset(), 5);
        floor.judge(200, None, AGE);
        assert_eq!(floor.offset(), 100);
        floor.rewind(50);
        assert_eq!(floor.offset(), 50);
        floor.rewind(80);
        assert_eq!(floor.offset(), 50);
    }

    #[test]
    fn a_buffered_trace_holds_the_floor_and_a_lifted_score_does_not_raise_it_at_once() {
        let mut floor = Floor::new(0);
        for minute in 0..60_u64 {
            floor.note(UnixMillis(minute * 60_000), (minute + 1) * 100);
        }
        let now = UnixMillis(60 * 60_000);
        // Its deadline was at minute 30: it came after minute 10 at the earliest.
        let waiting = UnixMillis(30 * 60_000);
        floor.judge(6_000, Some(waiting), AGE);
        floor.judge(6_000, Some(waiting), AGE);
        assert_eq!(floor.offset(), 1_000);
        floor.judge(6_000, Some(now), AGE);
        assert_eq!(floor.offset(), 1_000);
        floor.judge(6_000, Some(waiting), AGE);
        assert_eq!(floor.offset(), 1_000);
    }

    proptest! {
        /// Entries in the order of their offsets; each waits in the queue at its deadline, at most `AGE` behind its arrival,
        /// until it is flushed.
        #[test]
        fn what_is_buffered_lies_above_the_floor(steps in vec((0..200_000_u64, 0..30_000_u64, 0..700_u64, any::<bool>()), 1..400)) {
            let (mut floor, mut clock) = (Floor::new(0), 1_000_000_u64);
            let mut buffered: Vec<(u64, u64)> = Vec::new();
            for (offset, (step, ahead, wait, judged)) in steps.into_iter().enumerate() {
                let offset = u64::try_from(offset).unwrap();
                clock += step;
                let arrival = clock + ahead;
                buffered.push((offset, arrival + (wait * 1_000).min(600_000)));
                floor.note(UnixMillis(arrival), offset + 1);
                buffered.retain(|(_, deadline)| *deadline > clock);
                if judged {
                    let lowest = buffered.iter().map(|(_, deadline)| UnixMillis(*deadline)).min();
                    floor.judge(offset + 1, lowest, AGE);
                }
                prop_assert!(buffered.iter().all(|(offset, _)| *offset >= floor.offset()));
                prop_assert!(floor.samples.len() <= SAMPLES_MAX);
            }
        }
    }
}
