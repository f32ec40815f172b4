//! Where the reading of a shard stands, and what the broker says of the end of its partition.
//!
//! In:     how far the consumer has come, ends that the broker told.
//! Out:    since when a shard is read to its end; how soon the broker is asked again.
//! Keeps:  a shard is at its end when the broker said so, not when nothing came.
//! Knows:  offsets and moments. Pure.
//! Source: docs/spec.md 2.6.

use std::time::Duration;

use shared::time::MonoNanos;

/// How often the broker is asked for the ends of the partitions; an answer speaks for 2 s (docs/spec.md 2.6).
const ENDS_EVERY: Duration = Duration::from_millis(750);
/// How soon it may be asked again when a shard came to its end and the broker has not said so yet: till then its clock gets no further than the latest
/// time read.
const ENDS_SOON: Duration = Duration::from_millis(100);
/// How long it must have been quiet since: where messages come one by one, the consumer is at the end behind each, and who asks waits.
const QUIET: Duration = Duration::from_millis(20);
/// How long it is not asked again after it failed.
const ENDS_PAUSE: Duration = Duration::from_millis(1_500);

/// One shard in the reading.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    /// The next offset to come.
    pub(super) next: u64,
    /// No record is wanted now.
    pub(super) paused: bool,
    /// When the broker last said that there is nothing behind `next`: the moment before it was asked.
    pub(super) at_end: Option<MonoNanos>,
    /// The consumer came to the end, and nothing has come since.
    pub(super) eof: bool,
    /// When a message of it came last, or a word of the broker on it.
    pub(super) heard: MonoNanos,
    /// The end that the broker told while `eof` stood, and when it told it first.
    eof_end: Option<(u64, MonoNanos)>,
}

impl Reading {
    pub(super) fn at(next: u64, paused: bool, now: MonoNanos) -> Self {
        Self {
            next,
            paused,
            at_end: None,
            eof: false,
            heard: now,
            eof_end: None,
        }
    }

    /// Whether the consumer came to the end and the broker's word on it is missing.
    fn wants_end(&self, now: MonoNanos) -> bool {
        let is_quiet = now.since(self.heard) >= QUIET;
        self.eof && self.at_end.is_none() && is_quiet && !self.paused
    }

    /// Whether it may be at its end: a message that comes is a better word than the broker's.
    fn may_be_at_end(&self, now: MonoNanos) -> bool {
        let is_silent = now.since(self.heard) >= ENDS_EVERY;
        (self.at_end.is_some() || is_silent) && !self.paused
    }

    /// Takes the end that the broker told at `now`. What stands behind the last message may be no message, such as the mark of
    /// a transaction's end: then the consumer has come to the end, and the end has stayed where it was since.
    pub(super) fn take_end(&mut self, end: u64, now: MonoNanos) {
        self.heard = now;
        let (told, since) = self.eof_end.filter(|_| self.eof).unwrap_or((end, now));
        let since = if told == end { since } else { now };
        let is_stable = self.eof && now.since(since) >= ENDS_EVERY;
        if self.next >= end || is_stable {
            self.at_end = Some(now);
        }
        self.eof_end = Some((end, since)).filter(|_| self.eof);
    }
}

/// How long after one question for the ends the next one may follow; none: there is nothing to ask.
pub(super) fn ends_pause<'r>(
    failed: bool,
    readings: impl Iterator<Item = &'r Reading> + Clone,
    now: MonoNanos,
) -> Option<Duration> {
    if failed {
        Some(ENDS_PAUSE)
    } else if readings.clone().any(|reading| reading.wants_end(now)) {
        Some(ENDS_SOON)
    } else {
        let mut readings = readings;
        readings
            .any(|reading| reading.may_be_at_end(now))
            .then_some(ENDS_EVERY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_asked_for_soon_until_it_is_told() {
        let at = |millis| MonoNanos::default().after(Duration::from_millis(millis));
        let pause = |reading: &Reading, millis| ends_pause(false, [*reading].iter(), at(millis));
        let mut shard = Reading::at(7, false, at(0));
        assert_eq!(pause(&shard, 749), None, "more may come");
        assert_eq!(pause(&shard, 750), Some(ENDS_EVERY), "nothing was heard");
        (shard.eof, shard.heard) = (true, at(1_000));
        assert_eq!(pause(&shard, 1_019), None, "more may be on its way");
        assert_eq!(pause(&shard, 1_020), Some(ENDS_SOON));
        shard.take_end(8, at(1_030));
        let elsewhere = "the end is elsewhere";
        assert_eq!(pause(&shard, 1_050), Some(ENDS_SOON), "{elsewhere}");
        shard.take_end(7, at(1_060));
        assert_eq!(pause(&shard, 1_080), Some(ENDS_EVERY), "it was told");
        let busy = Reading::at(5, false, at(1_080));
        let both = [busy, shard];
        let of_both = ends_pause(false, both.iter(), at(1_080));
        assert_eq!(of_both, Some(ENDS_EVERY), "it speaks for 2 s");
        shard = Reading::at(8, false, at(1_090));
        assert_eq!(pause(&shard, 1_200), None, "more came");
        let failed = ends_pause(true, both.iter(), at(1_080));
        assert_eq!(failed, Some(ENDS_PAUSE), "no answer: not so soon");
    }

    #[test]
    fn an_end_behind_the_last_message_counts_when_it_has_stayed_for_a_while() {
        let told = |times: &[(u64, u64)]| {
            let mut reading = Reading::at(7, false, MonoNanos::default());
            reading.eof = true;
            for &(end, millis) in times {
                reading.take_end(
                    end,
                    MonoNanos::default().after(Duration::from_millis(millis)),
                );
            }
            reading.at_end.is_some()
        };
        assert!(told(&[(7, 0)]), "nothing is behind it");
        assert!(
            !told(&[(8, 0), (8, 100), (8, 749)]),
            "a message may be on its way"
        );
        assert!(told(&[(8, 0), (8, 100), (8, 750)]));
        assert!(!told(&[(8, 0), (9, 700), (9, 1_400)]), "it moved on");
        assert!(told(&[(8, 0), (9, 700), (9, 1_450)]));
    }
}
