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
/// How soon it may be asked again when a shard came to its end and the broker has not said so yet: till then its clock gets no further
/// than the latest time read.
const ENDS_SOON: Duration = Duration::from_millis(100);
/// How long a shard must have got nothing for that: where messages come one by one, the consumer is at the end behind each, and who
/// asks waits.
const QUIET: Duration = Duration::from_millis(20);
/// How often it is asked where every shard gets messages: they are a better word than the broker's, but those of one that all bear one
/// time take its clock no further.
const ENDS_SELDOM: Duration = Duration::from_secs(2);
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
    /// When a message of it came last.
    got: MonoNanos,
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
            got: now,
            heard: now,
            eof_end: None,
        }
    }

    /// Whether the consumer came to the end and the broker's word on it is missing.
    fn wants_end(&self, now: MonoNanos) -> bool {
        let is_quiet = now.since(self.got) >= QUIET;
        self.eof && self.at_end.is_none() && is_quiet && !self.paused
    }

    /// Whether it may be at its end.
    fn may_be_at_end(&self, now: MonoNanos) -> bool {
        let is_silent = now.since(self.heard) >= ENDS_EVERY;
        (self.at_end.is_some() || is_silent) && !self.paused
    }

    /// Notes that the consumer came to the end.
    pub(super) fn came_to_end(&mut self, now: MonoNanos) {
        (self.eof, self.eof_end, self.heard) = (true, None, now);
    }

    /// Takes the end that the broker told at `now`. What stands behind the last message may be no message, such as the mark of
    /// a transaction's end: then the consumer has come to the end, and the end has stayed where it was since. Where it has moved on,
    /// there is something to read first, and the consumer comes to the new end.
    pub(super) fn take_end(&mut self, end: u64, now: MonoNanos) {
        self.heard = now;
        if self.eof_end.is_some_and(|(told, _)| told != end) {
            (self.eof, self.eof_end) = (false, None);
        } else if self.eof && self.eof_end.is_none() {
            self.eof_end = Some((end, now));
        }
        let is_stable = self
            .eof_end
            .is_some_and(|(_, since)| now.since(since) >= ENDS_EVERY);
        self.at_end = (self.next >= end || is_stable).then_some(now);
    }
}

/// How long after one question for the ends the next one may follow.
pub(super) fn ends_pause<'r>(
    failed: bool,
    readings: impl Iterator<Item = &'r Reading> + Clone,
    now: MonoNanos,
) -> Duration {
    let any = |of: fn(&Reading, MonoNanos) -> bool| readings.clone().any(|each| of(each, now));
    if failed {
        ENDS_PAUSE
    } else if any(Reading::wants_end) {
        ENDS_SOON
    } else if any(Reading::may_be_at_end) {
        ENDS_EVERY
    } else {
        ENDS_SELDOM
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
        assert_eq!(pause(&shard, 749), ENDS_SELDOM, "more may come");
        assert_eq!(pause(&shard, 750), ENDS_EVERY, "nothing was heard");
        shard.came_to_end(at(10));
        assert_eq!(pause(&shard, 19), ENDS_SELDOM, "more may be on its way");
        assert_eq!(pause(&shard, 20), ENDS_SOON);
        shard.take_end(8, at(30));
        assert_eq!(pause(&shard, 50), ENDS_SOON, "the end is elsewhere");
        shard.take_end(7, at(60));
        assert_eq!(pause(&shard, 80), ENDS_EVERY, "it was told");
        let busy = Reading::at(5, false, at(80));
        let both = [busy, shard];
        let of_both = ends_pause(false, both.iter(), at(80));
        assert_eq!(of_both, ENDS_EVERY, "it speaks for 2 s");
        shard = Reading::at(8, false, at(90));
        assert_eq!(pause(&shard, 200), ENDS_SELDOM, "more came");
        let failed = ends_pause(true, both.iter(), at(80));
        assert_eq!(failed, ENDS_PAUSE, "no answer: not so soon");
    }

    #[test]
    fn an_end_that_is_further_on_takes_the_word_back() {
        let mut shard = Reading::at(7, false, MonoNanos::default());
        shard.take_end(7, MonoNanos(1));
        assert_eq!(shard.at_end, Some(MonoNanos(1)));
        shard.take_end(9, MonoNanos(2));
        assert_eq!(shard.at_end, None);
    }

    #[test]
    fn an_end_behind_the_last_message_counts_when_it_has_stayed_for_a_while() {
        let told = |times: &[(u64, u64)]| {
            let mut reading = Reading::at(7, false, MonoNanos::default());
            reading.came_to_end(MonoNanos::default());
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
        assert!(
            !told(&[(8, 0), (9, 700), (9, 1_450), (9, 9_000)]),
            "it moved on, and the consumer did not"
        );
    }
}
