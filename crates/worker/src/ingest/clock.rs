//! A shard's clock: the time of its input, as far as it is written.
//!
//! In:     the times of messages, the ends of partitions, CLOCK_MONOTONIC as an argument.
//! Out:    `now` of each batch; `Shown`, what the board tells the readers.
//! Keeps:  what a reader computes never goes back but by `rewind`; the `now` of a batch is not below what any reader sees before that
//!         batch is written.
//! Knows:  time only as arguments. Pure.
//! Source: docs/spec.md 2.6.

use std::{collections::VecDeque, time::Duration};

use shared::time::{MonoNanos, UnixMillis};

/// How long what the broker said of the end speaks, how far a clock runs ahead of its last turn, or on within its batch, and how far it
/// is moved on by time alone: docs/spec.md 2.6.
const REACH: Duration = Duration::from_secs(2);

/// The time of a message: Kafka's, or the wall clock when there is none or it lies ahead. 0 is what a producer without a clock
/// writes: taken for a time, it would hold its shard's clock in 1970.
#[must_use]
pub fn message_time(kafka: Option<UnixMillis>, wall_now: UnixMillis) -> UnixMillis {
    kafka
        .filter(|&time| time > UnixMillis(0))
        .map_or(wall_now, |time| time.min(wall_now))
}

/// What the board tells of a clock: its value at one moment, and up to which moment it runs with CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shown {
    /// The value at `at`.
    pub clock: UnixMillis,
    /// The moment of it.
    pub at: MonoNanos,
    /// Where it stops; the same moment when it stands.
    pub until: MonoNanos,
}

impl Shown {
    fn standing(clock: UnixMillis, at: MonoNanos) -> Self {
        Self {
            clock,
            at,
            until: at,
        }
    }

    /// What a reader makes of it at a moment, in whole milliseconds.
    #[must_use]
    pub fn read(&self, mono: MonoNanos) -> UnixMillis {
        self.clock.after(mono.min(self.until).since(self.at))
    }

    /// The most that any reader makes of it, at whatever moment.
    #[must_use]
    pub fn furthest(&self) -> UnixMillis {
        self.read(self.until)
    }

    fn runs(&self, mono: MonoNanos) -> bool {
        self.at < self.until && mono <= self.until
    }
}

/// A batch that is not written yet: its `now`, and the time of its last message. Where both are the same, the clock stands behind it.
#[derive(Debug, Clone, Copy)]
struct Pending {
    now: UnixMillis,
    last: UnixMillis,
}

impl Pending {
    /// Where the clock begins when it is written, one that has reached this; and how far it runs on. A last message far ahead of
    /// its neighbours takes it nowhere.
    fn run(&self, reached: UnixMillis) -> (UnixMillis, Duration) {
        let clock = self.now.max(reached);
        let further = Some(self.last.since(clock)).filter(|&further| further <= REACH);
        (clock, further.unwrap_or_default())
    }
}

/// The batch before: its `now`, the moment when that was taken, and the latest time in it.
#[derive(Debug, Clone, Copy)]
struct Before {
    now: UnixMillis,
    at: MonoNanos,
    latest: Option<UnixMillis>,
}

/// A shard's clock, as the worker keeps it that writes the shard.
#[derive(Debug, Clone)]
pub struct InputClock {
    /// What the readers see; none before there is any time.
    shown: Option<Shown>,
    before: Option<Before>,
    /// The batches that are not written yet, in their order.
    pending: VecDeque<Pending>,
    /// When the broker confirmed that there is nothing behind them.
    ended: Option<MonoNanos>,
    /// The latest time that this worker has read.
    latest: Option<UnixMillis>,
}

impl InputClock {
    /// A clock that stands: at the lowest time in the shard's positions, or at nothing.
    ///
    /// `start` must not be below what the board showed last, nor below what that may still run to.
    #[must_use]
    pub fn new(start: Option<UnixMillis>) -> Self {
        Self {
            shown: start.map(|clock| Shown::standing(clock, MonoNanos::default())),
            before: None,
            pending: VecDeque::new(),
            ended: None,
            latest: None,
        }
    }

    /// Its value at a moment; none before there is any time.
    #[must_use]
    pub fn now(&self, mono: MonoNanos) -> Option<UnixMillis> {
        self.shown.map(|shown| shown.read(mono))
    }

    /// Makes it stand where it has got to, and behind each batch that is not written: at a start, or for a batch that begins before it
    /// stops by itself. Gives what to show; nothing before there is any time.
    pub fn freeze(&mut self, mono: MonoNanos) -> Option<Shown> {
        for batch in &mut self.pending {
            batch.last = batch.now;
        }
        self.shown = self
            .shown
            .map(|shown| Shown::standing(shown.read(mono), mono));
        self.shown
    }

    /// The `now` of a batch, from the times of all its messages in their order: the smallest that is not below the clock, nor below where what is on its way takes it. Where all are
    /// below, it is that of the batch before, moved on by the time since, at most 2 s, and by no more than their latest time has come
    /// on, if it has. Time that the clock has run meanwhile is not added again.
    ///
    /// The clock should stand by now, or [`stops_before`](Self::stops_before) them: one that runs is taken for the furthest that
    /// readers may get to.
    pub fn batch(&mut self, times: &[UnixMillis], mono: MonoNanos) -> UnixMillis {
        let clock = self.furthest();
        let ahead = times.iter().copied().filter(|&time| Some(time) >= clock);
        let latest = times.iter().copied().max();
        let now = ahead
            .min()
            .unwrap_or_else(|| self.moved_on(clock, latest, mono));
        self.before = Some(Before {
            now,
            at: mono,
            latest,
        });
        self.pending.push_back(Pending {
            now,
            last: times.last().copied().unwrap_or(now),
        });
        self.latest = self.latest.max(latest);
        self.ended = None;
        now
    }

    /// Whether it stops by itself at or before the earliest of these times: it need not stand for the batch that holds them.
    #[must_use]
    pub fn stops_before(&self, times: &[UnixMillis]) -> bool {
        let earliest = times.iter().copied().min();
        self.furthest() <= earliest
    }

    /// The most that any reader makes of it before a batch to come is written; none before there is any time.
    fn furthest(&self) -> Option<UnixMillis> {
        let shown = self.shown.map(|shown| shown.furthest());
        self.pending.iter().fold(shown, |reached, batch| {
            let (clock, further) = batch.run(reached.unwrap_or_default());
            Some(clock.after(further))
        })
    }

    /// Sets it to the `now` of the first batch that was not written: all writes of that one were acknowledged. It runs on to the time of
    /// its last message: what had come by then is written. Where that is more than 2 s away it stands. Behind the last one it may be at
    /// the end already. Without a batch it stands where it is.
    pub fn written(&mut self, mono: MonoNanos) -> Shown {
        let reached = self.now(mono).unwrap_or_default();
        let shown = match self.pending.pop_front() {
            None => Shown::standing(reached, mono),
            Some(batch) => {
                let (clock, further) = batch.run(reached);
                Shown {
                    clock,
                    at: mono,
                    until: mono.after(further),
                }
            }
        };
        self.shown = Some(shown);
        let ended = self.ended.take_if(|_| self.pending.is_empty());
        let at_end = ended.and_then(|confirmed| self.at_end(confirmed, mono, shown.clock));
        at_end.unwrap_or(shown)
    }

    /// Lets it run until 2 s from now: there is no more input, as the broker confirmed at a moment within the last 2 s. One that stood,
    /// or is behind the latest time read, goes up to that first, or to the wall clock if this worker has read nothing. Gives what to
    /// show; nothing when the end is not known: it stops by itself then; or while a batch is not written: it runs from when that is.
    pub fn at_end(
        &mut self,
        confirmed: MonoNanos,
        mono: MonoNanos,
        wall_now: UnixMillis,
    ) -> Option<Shown> {
        if !self.pending.is_empty() {
            self.ended = Some(confirmed);
            return None;
        }
        if mono.since(confirmed) > REACH {
            return None;
        }
        let until = mono.after(REACH);
        let shown = match self.shown {
            // Its value and moment are kept: taken anew each turn, it would lose part of a millisecond each time.
            Some(shown) if shown.runs(mono) && Some(shown.read(mono)) >= self.latest => {
                Shown { until, ..shown }
            }
            _ => {
                let goal = self.latest.unwrap_or(wall_now);
                let clock = self.now(mono).map_or(goal, |reached| reached.max(goal));
                Shown {
                    clock,
                    at: mono,
                    until,
                }
            }
        };
        self.shown = Some(shown);
        Some(shown)
    }

    /// Forgets an end that was told while a batch was on its way: the shard is paused since.
    pub fn forget_end(&mut self) {
        self.ended = None;
    }

    /// Sets it back to where the shard's positions stand, as at a start: the one way back. Gives what to show; none is *unknown*.
    pub fn rewind(&mut self, to: Option<UnixMillis>, mono: MonoNanos) -> Option<Shown> {
        *self = Self::new(to);
        self.freeze(mono)
    }

    /// Where the clock gets to while all input is below it: it moves with time, and with the input where that comes on, so that it
    /// leaves a shard that is read slowly no further behind.
    fn moved_on(
        &self,
        clock: Option<UnixMillis>,
        latest: Option<UnixMillis>,
        mono: MonoNanos,
    ) -> UnixMillis {
        let moved = self.before.map(|before| {
            let since = mono.since(before.at).min(REACH);
            let came_on = latest
                .unwrap_or_default()
                .since(before.latest.unwrap_or_default());
            before.now.after(match came_on {
                Duration::ZERO => since,
                came_on => since.min(came_on),
            })
        });
        clock.max(moved).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
