//! How a clock goes, and what its readers may see of it.
//!
//! In:     times, and CLOCK_MONOTONIC by hand.
//! Keeps:  no reader sees it go back, or past a batch that is not written.
//! Source: docs/spec.md 2.6.

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
fn an_end_that_is_told_while_a_batch_is_on_its_way_counts_when_that_is_written() {
    let mut clock = InputClock::new(None);
    let end = |clock: &mut InputClock, at| clock.at_end(ms(at), ms(at), UnixMillis(500));
    // A stream whose messages all bear one time.
    clock.batch(&unix(&[50]), ms(0));
    assert_eq!(end(&mut clock, 5), None);
    clock.batch(&unix(&[50]), ms(10));
    assert_eq!(end(&mut clock, 15), None);
    assert_eq!(
        clock.written(ms(20)),
        shown(50, 20, 20),
        "another is on its way"
    );
    assert_eq!(clock.written(ms(25)), shown(50, 25, 2025));
    // More was read since, or it was too long ago.
    clock.freeze(ms(25));
    clock.batch(&unix(&[50]), ms(30));
    assert_eq!(end(&mut clock, 35), None);
    clock.batch(&unix(&[50]), ms(40));
    clock.written(ms(45));
    assert_eq!(clock.written(ms(50)).until, ms(50));
    clock.batch(&unix(&[50]), ms(60));
    assert_eq!(end(&mut clock, 65), None);
    assert_eq!(clock.written(ms(2_066)).until, ms(2_066));
    // It was paused since.
    clock.batch(&unix(&[50]), ms(3_000));
    assert_eq!(end(&mut clock, 3_005), None);
    clock.forget_end();
    assert_eq!(clock.written(ms(3_010)).until, ms(3_010));
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
                    let is_recent = |confirmed| mono.since(confirmed) <= REACH;
                    let is_ended = clock.pending.len() == 1 && clock.ended.is_some_and(is_recent);
                    let shown = clock.written(mono);
                    let (now, last) = pending.map_or((shown.clock, shown.clock), |batch| (batch.now, batch.last));
                    if is_ended {
                        prop_assert_eq!(shown.until, mono.after(REACH));
                    } else {
                        prop_assert_eq!(shown.clock, now);
                        prop_assert!(shown.furthest() <= last.max(now));
                    }
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
