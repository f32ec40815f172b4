//! Tests of the views: lives, garbage, clocks read while they are written.

use super::*;
use crate::{
    board::{Cause, Death, Standing, owner::describe},
    launch::Role,
};

const NOW: MonoNanos = MonoNanos(5_000_000_000);

pub(in crate::board) fn board(shards: &str, slots: u32) -> Board {
    let shards: ShardList = shards.parse().unwrap();
    let bytes = layout::words(shards.len(), usize::try_from(slots).unwrap()) * WORD;
    let file = tempfile::tempfile().unwrap();
    file.set_len(u64::try_from(bytes).unwrap()).unwrap();
    let words = Words::map(&file, true).unwrap();
    describe(&words, bytes, 7, &shards, slots);
    Board::of(words).unwrap()
}

#[test]
fn a_beat_of_another_life_is_none() {
    let board = board("0", 2);
    board.supervise(1).begin(3);
    assert_eq!(board.beat(1, 3, NOW), None);
    let cells = board.worker(1, 3);
    cells.echo();
    cells.phase(Phase::Kafka);
    cells.progress();
    cells.healthy(MonoNanos(9));
    cells.backpressure(Some(MonoNanos(8)));
    cells.in_flight(4);
    cells.queue_depth(5);
    let beat = board.beat(1, 3, Clock::mono_now()).unwrap();
    assert_eq!(
        (beat.pid, beat.phase, beat.progress),
        (std::process::id(), Phase::Kafka, 1)
    );
    assert_eq!(
        (beat.healthy_since, beat.backpressure_since),
        (Some(MonoNanos(9)), Some(MonoNanos(8)))
    );
    assert_eq!((beat.in_flight, beat.queue_depth), (4, 5));
    assert_eq!(board.beat(1, 2, NOW), None);
    board.supervise(1).begin(4);
    // The old worker may still beat: it is not heard.
    cells.progress();
    assert_eq!(board.beat(1, 4, NOW), None);
    board.worker(1, 4).echo();
    let beat = board.beat(1, 4, NOW).unwrap();
    assert_eq!(
        (beat.healthy_since, beat.backpressure_since),
        (None, Some(MonoNanos(8))),
        "backpressure is kept over a respawn"
    );
    assert_eq!(board.beat(2, 1, NOW), None);
}

#[test]
fn garbage_gives_values_within_their_range() {
    let board = board("0", 1);
    for bits in [u64::MAX, 1 << 63, 0xaaaa_aaaa_aaaa_aaaa] {
        let cells = board.slot(0).unwrap();
        cells
            .iter()
            .skip(slot::WORKER)
            .for_each(|cell| cell.store(bits, Relaxed));
        cells[slot::ECHO].store(1, Relaxed);
        let beat = board.beat(0, 1, NOW).unwrap();
        assert!(
            beat.healthy_since.is_none_or(|time| time <= NOW) && beat.phase_since <= NOW,
            "{beat:?}"
        );
        board
            .shard(ShardId(0))
            .unwrap()
            .iter()
            .skip(1)
            .for_each(|cell| cell.store(bits & !1, Relaxed));
        assert!(
            board
                .clock(ShardId(0))
                .is_none_or(|clock| clock.read(NOW) <= UnixMillis::MAX)
        );
    }
}

#[test]
fn a_failed_exec_is_told_for_its_own_life() {
    let board = board("0", 1);
    board.supervise(0).begin(2);
    assert_eq!(board.exec_errno(0, 2), None);
    board.supervise(0).exec_failed(13);
    assert_eq!(
        (board.exec_errno(0, 2), board.exec_errno(0, 3)),
        (Some(13), None)
    );
    board.supervise(9).exec_failed(13);
}

#[test]
fn a_clock_runs_up_to_its_end_and_is_unknown_before_its_first_word() {
    let board = board("5", 1);
    assert_eq!(board.clock(ShardId(5)), None);
    let writer = board.clock_writer(ShardId(5)).unwrap();
    writer.publish(
        UnixMillis(1_000),
        MonoNanos(2_000_000),
        MonoNanos(4_000_000),
    );
    let clock = board.clock(ShardId(5)).unwrap();
    let read = |millis: u64| clock.read(MonoNanos(millis * 1_000_000)).0;
    assert_eq!(
        [1, 2, 3, 4, 5].map(read),
        [1_000, 1_000, 1_001, 1_002, 1_002]
    );
    // A writer that died in the middle: unknown, until the next one writes.
    board.shard(ShardId(5)).unwrap()[shard::SEQUENCE].store(7, Relaxed);
    assert_eq!(board.clock(ShardId(5)), None);
    board
        .clock_writer(ShardId(5))
        .unwrap()
        .publish(UnixMillis(3), NOW, NOW);
    assert_eq!(
        board.clock(ShardId(5)).unwrap().read(MonoNanos(u64::MAX)),
        UnixMillis(3)
    );
    writer.unknown();
    assert_eq!(board.clock(ShardId(5)), None);
}

#[test]
fn a_clock_is_read_whole_while_it_is_written() {
    let board = board("0", 1);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let writer = board.clock_writer(ShardId(0)).unwrap();
            for value in 1..200_000_u64 {
                writer.publish(UnixMillis(value), MonoNanos(value), MonoNanos(value));
            }
            done.store(true, Relaxed);
        });
        while !done.load(Relaxed) {
            if let Some(clock) = board.clock(ShardId(0)) {
                assert!(
                    clock.clock.0 == clock.at.0 && clock.at == clock.until,
                    "{clock:?}"
                );
            }
        }
    });
}

#[test]
fn ledgers_of_shards_do_not_mix() {
    let board = board("0,9", 1);
    let (one, other) = (
        board.ledger(ShardId(0)).unwrap(),
        board.ledger(ShardId(9)).unwrap(),
    );
    one.consumed(1);
    one.inserted(2);
    one.refused(3);
    other.produced(4);
    other.dropped(5);
    other.repeats(6);
    let expected = Totals {
        consumed: 1,
        inserted: 2,
        refused: 3,
        ..Totals::default()
    };
    assert_eq!(board.totals(ShardId(0)), Some(expected));
    assert_eq!(
        board.totals(ShardId(9)),
        Some(Totals {
            produced: 4,
            dropped: 5,
            repeats: 6,
            ..Totals::default()
        })
    );
    assert!(board.ledger(ShardId(1)).is_none() && board.totals(ShardId(1)).is_none());
}

#[test]
fn the_supervisors_word_is_shown() {
    let board = board("0", 1);
    assert!(!board.healthy_once(0) && !board.healthy_once(5));
    let standing = Standing {
        role: Role::Ingest,
        index: 3,
        generation: 4,
        state: SlotState::Backoff,
        since: MonoNanos(3_000),
        healthy_once: true,
        child: None,
        moved: Some(MonoNanos(2_000)),
        rate: 5,
        failures: 6,
        max_restarts: 7,
        lifetime: 8,
        hang: Duration::from_secs(9),
        tracer: Some(10),
        deaths: vec![Death {
            at: MonoNanos(1_000),
            cause: Cause::Oom,
        }],
    };
    board.supervise(0).show(&standing);
    assert!(board.healthy_once(0));
    assert_eq!(board.state(0), Some((SlotState::Backoff, MonoNanos(3_000))));
    assert_eq!(board.standing(0), Some(standing));
    assert_eq!(board.standing(1), None);
    assert!(!board.is_draining());
    board.show_draining(true);
    assert!(board.is_draining());
}
