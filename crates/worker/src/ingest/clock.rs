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

/// A batch that is not written yet: its `now`, and the time of its last message; the same, and the clock stands behind it.
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
        let further = self.last.since(clock);
        (
            clock,
            if further > REACH {
                Duration::ZERO
            } else {
                further
            },
        )
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

    /// The `now` of a batch, from the times of all its messages in their order: the smallest that is not below the clock. Where all are
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
    /// its last message: what had come by then is written. Where that is more than 2 s away it stands. Without a batch it stands
    /// where it is.
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
        shown
    }

    /// Lets it run until 2 s from now: there is no more input, as the broker confirmed at a moment within the last 2 s. One that stood,
    /// or is behind the latest time read, goes up to that first, or to the wall clock if this worker has read nothing. Gives what to
    /// show; nothing when the end is not known, or a batch is not written: it stops by itself then.
    pub fn at_end(
        &mut self,
        confirmed: MonoNanos,
        mono: MonoNanos,
        wall_now: UnixMillis,
    ) -> Option<Shown> {
        if mono.since(confirmed) > REACH || !self.pending.is_empty() {
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
mod tests {
    use proptest::{collection::vec, option, prelude::*};

    use super::*;

    fn ms(mono: u64) -> MonoNanos {
        MonoNanos(mono * 1_000_000)
    }

    fn unix(times: &[u64]) -> Vec<UnixMillis> {
        times.iter().copied().map(UnixMillis).collect()
    }

    fn shown(clock: u64, at: u64, until: u64) -> Shown {
        Shown {
            clock: UnixMillis(clock),
            at: ms(at),
            until: ms(until),
        }
    }

    #[test]
    fn a_message_without_a_time_or_ahead_of_it_has_the_wall_clock() {
        let wall_now = UnixMillis(100);
        assert_eq!(message_time(None, wall_now), wall_now);
        assert_eq!(message_time(Some(UnixMillis(101)), wall_now), wall_now);
        assert_eq!(message_time(Some(UnixMillis(7)), wall_now), UnixMillis(7));
    }

    #[test]
    fn now_is_the_smallest_time_that_is_not_below_the_clock() {
        let mut clock = InputClock::new(None);
        assert_eq!(clock.freeze(ms(0)), None);
        assert_eq!(clock.batch(&unix(&[50, 40, 60]), ms(0)), UnixMillis(40));
        assert_eq!(clock.now(ms(5)), None);
        assert_eq!(clock.written(ms(5)).clock, UnixMillis(40));
        clock.freeze(ms(5));
        assert_eq!(clock.batch(&unix(&[90, 39, 40, 41]), ms(6)), UnixMillis(40));
        assert_eq!(clock.written(ms(7)).clock, UnixMillis(40));
        clock.freeze(ms(7));
        assert_eq!(clock.batch(&unix(&[30, 70, 70]), ms(8)), UnixMillis(70));
        assert_eq!(clock.written(ms(9)), shown(70, 9, 9));
        // It stands, whatever the time.
        assert_eq!(clock.now(ms(1_000_000)), Some(UnixMillis(70)));
    }

    #[test]
    fn it_runs_on_to_the_last_time_of_what_is_written() {
        let mut clock = InputClock::new(None);
        clock.batch(&unix(&[50, 40, 60]), ms(0));
        assert_eq!(clock.written(ms(5)), shown(40, 5, 25));
        assert_eq!(clock.now(ms(15)), Some(UnixMillis(50)));
        // The next batch lies behind that: the clock need not stand for it, and gets as far as before.
        assert!(clock.stops_before(&unix(&[61, 60])));
        assert_eq!(clock.batch(&unix(&[61, 60]), ms(16)), UnixMillis(60));
        assert_eq!(clock.now(ms(1_000_000)), Some(UnixMillis(60)));
        // One is behind the others: how far they are is not written to its end.
        assert_eq!(clock.written(ms(18)), shown(60, 18, 18));
        clock.batch(&unix(&[61, 62]), ms(18));
        assert_eq!(clock.written(ms(18)), shown(61, 18, 19));
        // A late one does not: where readers may get to decides, unless it stands.
        let late = unix(&[61]);
        assert!(!clock.stops_before(&late));
        clock.freeze(ms(18));
        assert!(clock.stops_before(&late));
        assert_eq!(clock.batch(&late, ms(18)), UnixMillis(61));
        // One message of today among those of a backlog.
        clock.written(ms(19));
        clock.batch(&unix(&[70, 86_400_000]), ms(20));
        assert_eq!(clock.written(ms(21)), shown(70, 21, 21));
    }

    #[test]
    fn a_batch_begins_where_the_one_on_its_way_will_let_the_clock_run_to() {
        let mut clock = InputClock::new(None);
        clock.batch(&unix(&[40, 60]), ms(0));
        assert!(clock.stops_before(&unix(&[60, 70])));
        assert!(!clock.stops_before(&unix(&[59, 70])));
        // Readers may see 60 before this one is written.
        assert_eq!(clock.batch(&unix(&[59, 70, 80]), ms(1)), UnixMillis(70));
        assert_eq!(clock.written(ms(2)), shown(40, 2, 22));
        assert_eq!(clock.written(ms(3)), shown(70, 3, 13));
        // Where it has to stand, what is on its way lets it run no further.
        clock.batch(&unix(&[80, 95]), ms(4));
        clock.freeze(ms(5));
        assert_eq!(clock.batch(&unix(&[84, 90]), ms(6)), UnixMillis(84));
        assert_eq!(clock.written(ms(7)), shown(80, 7, 7));
        assert_eq!(clock.written(ms(8)), shown(84, 8, 14));
        // The last message of the one on its way is far ahead of its neighbours.
        clock.batch(&unix(&[100, 86_400_000]), ms(9));
        assert_eq!(clock.batch(&unix(&[101]), ms(10)), UnixMillis(101));
    }

    #[test]
    fn where_all_times_are_below_it_moves_on_with_time_by_two_seconds_at_most() {
        let mut clock = InputClock::new(Some(UnixMillis(100)));
        assert_eq!(clock.batch(&unix(&[5]), ms(1000)), UnixMillis(100));
        clock.written(ms(1010));
        assert_eq!(clock.batch(&unix(&[4, 5]), ms(1300)), UnixMillis(400));
        clock.written(ms(1310));
        assert_eq!(clock.batch(&unix(&[3]), ms(60_000)), UnixMillis(2400));
        // A batch that is not written moves the next one on all the same.
        assert_eq!(clock.batch(&unix(&[1]), ms(60_001)), UnixMillis(2401));
    }

    #[test]
    fn it_goes_with_an_input_that_is_below_it() {
        let mut clock = InputClock::new(None);
        // A lagging shard, and the last message is of a producer that is ahead; then nothing is read for a minute.
        clock.batch(&unix(&[10_000, 10_400, 11_300]), ms(0));
        assert_eq!(clock.written(ms(10)).furthest(), UnixMillis(11_300));
        clock.batch(&unix(&[10_500, 10_800]), ms(60_000));
        let reached = clock.written(ms(60_010)).clock;
        assert!(reached <= UnixMillis(10_000).after(REACH));
        // Read at a fifth of the time that passes: it gets no further ahead.
        for turn in 1..=20 {
            let (mono, time) = (ms(60_000 + 500 * turn), 10_800 + 100 * turn);
            assert_eq!(
                clock.batch(&unix(&[time]), mono).0,
                reached.0 + 100 * turn,
                "turn={turn}"
            );
            clock.written(mono);
        }
        // A producer whose own clock is an hour late, at work all the time: nothing waits for it to come up.
        let mut clock = InputClock::new(Some(UnixMillis(3_600_000)));
        for turn in 1..=100 {
            clock.batch(&unix(&[10 * turn]), ms(10 * turn));
            clock.written(ms(10 * turn));
        }
        assert_eq!(clock.now(ms(1_000)), Some(UnixMillis(3_600_990)));
    }

    #[test]
    fn time_that_it_ran_is_not_added_again() {
        let mut clock = InputClock::new(None);
        clock.batch(&unix(&[1000]), ms(0));
        clock.written(ms(10));
        // Each message is a little late: behind what the clock has run to. Two minutes of that, a message a second.
        for second in 1..=120 {
            let mono = second * 1000;
            for turn in (mono - 990..mono).step_by(10) {
                clock
                    .at_end(ms(turn), ms(turn), UnixMillis(9_999_999))
                    .unwrap();
            }
            clock.freeze(ms(mono));
            clock.batch(&unix(&[1000 + mono - 50]), ms(mono));
            clock.written(ms(mono + 10));
        }
        // Its input is at 120,950 by now, and comes 50 ms late.
        let reached = clock.now(ms(120_010)).unwrap().0;
        assert!((120_950..=121_010).contains(&reached), "{reached}");
    }

    #[test]
    fn at_the_end_it_goes_up_to_the_latest_time_and_runs() {
        let mut clock = InputClock::new(None);
        clock.batch(&unix(&[50, 90, 60]), ms(0));
        assert_eq!(
            clock.at_end(ms(1), ms(1), UnixMillis(500)),
            None,
            "a batch is not written"
        );
        clock.written(ms(10));
        assert_eq!(
            clock.at_end(ms(15), ms(20), UnixMillis(500)),
            Some(shown(90, 20, 2020))
        );
        assert_eq!(clock.now(ms(30)), Some(UnixMillis(100)));
        // Each turn it may run further; nothing else changes.
        assert_eq!(
            clock.at_end(ms(15), ms(1015), UnixMillis(500)),
            Some(shown(90, 20, 3015))
        );
        // The broker's word is old.
        assert_eq!(clock.at_end(ms(15), ms(2016), UnixMillis(500)), None);
        assert_eq!(clock.now(ms(99_999)), Some(UnixMillis(3085)));
        // It stood meanwhile, and goes on from there.
        assert_eq!(
            clock.at_end(ms(99_999), ms(100_000), UnixMillis(9999)),
            Some(shown(3085, 100_000, 102_000))
        );
        assert_eq!(
            clock.freeze(ms(100_010)),
            Some(shown(3095, 100_010, 100_010))
        );
        assert_eq!(clock.now(ms(200_000)), Some(UnixMillis(3095)));
    }

    #[test]
    fn a_worker_that_has_read_nothing_goes_by_the_wall_clock_once() {
        let mut clock = InputClock::new(None);
        assert_eq!(clock.at_end(ms(0), ms(3000), UnixMillis(500)), None);
        assert_eq!(
            clock.at_end(ms(3000), ms(3000), UnixMillis(500)),
            Some(shown(500, 3000, 5000))
        );
        // The wall clock is set while it runs: no matter.
        assert_eq!(
            clock.at_end(ms(3010), ms(3010), UnixMillis(900_000)),
            Some(shown(500, 3000, 5010))
        );
        let mut ahead = InputClock::new(Some(UnixMillis(700)));
        assert_eq!(
            ahead.at_end(ms(0), ms(0), UnixMillis(500)),
            Some(shown(700, 0, 2000))
        );
    }

    #[test]
    fn short_turns_lose_no_time() {
        let mut clock = InputClock::new(Some(UnixMillis(0)));
        for turn in 0..10_000 {
            let mono = MonoNanos(turn * 999_999);
            clock.at_end(mono, mono, UnixMillis(0)).unwrap();
        }
        assert_eq!(
            clock.now(MonoNanos(9_999 * 999_999)),
            Some(UnixMillis(9_998))
        );
    }

    #[test]
    fn a_rewind_is_the_way_back() {
        let mut clock = InputClock::new(None);
        clock.batch(&unix(&[1000]), ms(0));
        clock.written(ms(1));
        clock.batch(&unix(&[2000]), ms(2));
        assert_eq!(
            clock.rewind(Some(UnixMillis(300)), ms(3)),
            Some(shown(300, 3, 3))
        );
        assert_eq!(clock.batch(&unix(&[250]), ms(9)), UnixMillis(300));
        assert_eq!(clock.rewind(None, ms(10)), None);
        assert_eq!(clock.now(ms(11)), None);
        assert_eq!(clock.batch(&unix(&[20]), ms(12)), UnixMillis(20));
    }

    #[test]
    fn written_without_a_batch_stands_where_it_is() {
        let mut clock = InputClock::new(Some(UnixMillis(70)));
        clock.at_end(ms(0), ms(0), UnixMillis(0));
        assert_eq!(clock.written(ms(5)), shown(75, 5, 5));
    }

    #[derive(Debug, Clone)]
    enum Call {
        Freeze,
        Batch(Vec<UnixMillis>),
        Written,
        AtEnd { age: u64, wall_now: UnixMillis },
        Rewind(Option<UnixMillis>),
    }

    fn call() -> impl Strategy<Value = Call> {
        let time = || (0..20_000_u64).prop_map(UnixMillis);
        prop_oneof![
            2 => Just(Call::Freeze),
            4 => vec(time(), 0..5).prop_map(Call::Batch),
            4 => Just(Call::Written),
            6 => (0..2_100_000_000_u64, time()).prop_map(|(age, wall_now)| Call::AtEnd { age, wall_now }),
            1 => option::of(time()).prop_map(Call::Rewind),
        ]
    }

    proptest! {
        #[test]
        fn no_reader_sees_it_go_back(
            start in option::of((0..20_000_u64).prop_map(UnixMillis)),
            calls in vec((call(), 0..3_000_000_000_u64, 0..3_000_000_000_u64), 0..60),
        ) {
            let mut clock = InputClock::new(start);
            let mut board = start.map(|clock| Shown::standing(clock, MonoNanos(0)));
            let mut seen = start.unwrap_or_default();
            let mut mono = MonoNanos(0);
            for (call, wait, read) in calls {
                mono = mono.after(Duration::from_nanos(wait));
                if let Some(board) = board {
                    seen = seen.max(board.read(mono));
                }
                let now_shown = match call {
                    Call::Freeze => clock.freeze(mono),
                    Call::Batch(times) => {
                        let before = clock.before;
                        let on_the_way = clock.pending.iter().map(|batch| batch.now.max(batch.last)).max();
                        let now = clock.batch(&times, mono);
                        prop_assert!(now >= seen, "now={now} seen={seen}");
                        // It never leaves its input behind but by time, or where that is below what readers saw.
                        let moved = before.map_or(seen, |before| before.now.after(mono.since(before.at).min(REACH)));
                        let furthest = board.map_or(seen, |board| board.furthest()).max(on_the_way.unwrap_or_default());
                        prop_assert!(times.contains(&now) || now <= moved.max(furthest));
                        None
                    }
                    Call::Written => {
                        let pending = clock.pending.front().copied();
                        let shown = clock.written(mono);
                        let (now, last) = pending.map_or((shown.clock, shown.clock), |batch| (batch.now, batch.last));
                        prop_assert_eq!(shown.clock, now);
                        prop_assert!(shown.furthest() <= last.max(now));
                        Some(shown)
                    }
                    Call::AtEnd { age, wall_now } => {
                        let confirmed = MonoNanos(mono.0.saturating_sub(age));
                        let shown = clock.at_end(confirmed, mono, wall_now);
                        prop_assert!(shown.is_none_or(|shown| shown.until == mono.after(REACH)));
                        shown
                    }
                    Call::Rewind(to) => {
                        board = clock.rewind(to, mono);
                        seen = to.unwrap_or_default();
                        board
                    }
                };
                if let Some(shown) = now_shown {
                    prop_assert!(shown.read(mono) >= seen, "shown={shown:?} seen={seen}");
                }
                board = now_shown.or(board);
                prop_assert_eq!(clock.now(mono), board.map(|board| board.read(mono)));
                // Readers come at any moment until the next call.
                let reading = mono.after(Duration::from_nanos(read));
                if let Some(board) = board.filter(|_| read < wait) {
                    seen = seen.max(board.read(reading));
                    mono = reading;
                }
                // What is not written yet will be at its `now` or later: no reader may be there before.
                prop_assert!(clock.pending.iter().all(|batch| batch.now >= seen), "clock={clock:?} seen={seen}");
            }
        }
    }
}
