//! Redis that went back, or never answers for one journal, and bytes in it that are not what was written.
//!
//! In:     traffic; a server that goes back, for good or for a moment, stands still, or holds other bytes.
//! Keeps:  nothing is lost that is not counted.
//! Source: docs/store.md 3, 6.

use std::time::Duration;

use nix::sys::signal::Signal;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use shared::time::{Clock, UnixMillis};
use stand::{
    kafka::{Kafka, MockKafka},
    traffic::SpanMessage,
};

use crate::world::{LONG, SHARDS, World, message, moves_position, span, traffic};

fn mock(world: &World) -> &MockKafka {
    match &world.kafka {
        Kafka::Mock(kafka) => kafka,
        Kafka::Real(_) => panic!("a mock was started"),
    }
}

#[test]
fn a_redis_that_went_back_loses_nothing() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    world.send(&traffic(30, 1_000, 1));
    stand::eventually(LONG, "spans in redis", || {
        (world.redis.inserted() >= 500).then_some(())
    });
    world.redis.save();
    world.send(&traffic(31, 1_000, 100_000));
    stand::eventually(LONG, "more spans in redis", || {
        (world.redis.inserted() >= 1_500).then_some(())
    });
    world.redis.restart_as_saved();
    world.send(&traffic(32, 1_000, 200_000));
    world.await_all();
    world.settle_with_losses();
    world.assert_store_is_even();
    assert!(
        world
            .said
            .contains("its node went back, or there is a second writer"),
        "{}",
        world.said
    );
}

/// A batch meets a position that is another one for a moment, as where a node goes back and forth. The batch behind it is read by then, and
/// finds all as it was: it is not written over the gap.
#[test]
fn a_position_that_is_another_one_for_a_moment_leaves_no_gap() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    // Many batches of one shard, one behind the other.
    world.plan.settings = world.settings("intake.batch_spans = 20\n");
    let of_one_shard = |seed, first_serial| {
        let mut messages = traffic(seed, 1_000, first_serial);
        messages.retain(|message| message.partition == 0);
        messages
    };
    world.start();
    world.await_healthy();
    world.send(&of_one_shard(37, 1));
    world.await_all();
    // Where a batch stands between its entries and its position, and where it is told of that.
    let before = world.proxy.hold_when(moves_position());
    let told = world.proxy.hold_reply_when(moves_position());
    world.send(&of_one_shard(38, 100_000));
    assert!(before.reached(LONG), "{}", world.log());
    move_positions(&world, 1);
    drop(before);
    assert!(told.reached(LONG), "{}", world.log());
    move_positions(&world, -1);
    drop(told);
    world.await_all();
    world.settle_exact();
    assert!(world.said.contains("another one stands"), "{}", world.said);
}

fn move_positions(world: &World, by: i64) {
    for (_, bucket) in world.redis.buckets().filter(|(shard, _)| *shard == 0) {
        let key = world.redis.key(0, bucket, "pos");
        let mut connection = world.redis.connection(&key);
        let mut increment = redis::cmd("HINCRBY");
        increment.arg(&key).arg("next").arg(by);
        increment.exec(&mut connection).unwrap();
    }
}

#[test]
fn a_redis_that_lost_everything_loses_nothing() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    world.send(&traffic(35, 1_500, 1));
    stand::eventually(LONG, "spans in redis", || {
        (world.redis.inserted() >= 1_000).then_some(())
    });
    let committed = || {
        stand::offsets::committed(&world.kafka.brokers(), "spanbuf", stand::kafka::INPUT).unwrap()
    };
    stand::eventually(LONG, "commits", || {
        (committed().values().sum::<i64>() >= 1_000).then_some(())
    });
    // What was committed is still buffered: it is read again from the floor that the commits carry.
    assert!(!world.ledger.is_complete());
    world.redis.flush_all();
    world.send(&traffic(36, 1_000, 100_000));
    world.await_all();
    world.settle_with_losses();
    assert!(world.said.contains("by=floor"), "{}", world.said);
}

#[test]
fn a_redis_that_is_stopped_and_comes_back_with_its_data_costs_nothing() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    world.send(&traffic(33, 2_000, 1));
    stand::eventually(LONG, "spans in redis", || {
        (world.redis.inserted() >= 500).then_some(())
    });
    let workers = world.workers();
    // Frozen first: what is written is what was saved.
    world.proxy.hold();
    world.redis.restart_with_data();
    world.proxy.cut();
    world.proxy.release();
    world.send(&traffic(34, 1_000, 100_000));
    world.await_all();
    assert_eq!(
        world.workers(),
        workers,
        "nobody died meanwhile\n{}",
        world.log()
    );
    world.settle();
    world.assert_store_is_even();
}

#[test]
fn damaged_bytes_are_a_counted_outcome_and_what_is_of_a_newer_build_stays() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.plan.settings = world
        .settings(
            "buffer.root_timeout = \"5s\"\nintake.batch_spans = 1\nredis.compression = \"none\"\n",
        )
        .replacen("buffer.root_timeout = \"1s\"\n", "", 1);
    world.start();
    let (damaged, newer) = ("a".repeat(32), "b".repeat(32));
    let now = UnixMillis(Clock::wall_now().0 - 100);
    let messages: Vec<_> = [&damaged, &newer]
        .into_iter()
        .zip([1, 10])
        .flat_map(|(trace, serial)| {
            [
                message(0, now, span(trace, "1", None, serial, 5)),
                message(0, now, span(trace, "2", Some("1"), serial + 1, 5)),
            ]
        })
        .collect();
    for message in &messages {
        world.send_raw(0, message.arrival, Some(&message.payload));
    }
    stand::eventually(LONG, "four entries", || {
        (world.redis.inserted() >= 4).then_some(())
    });
    for (trace, change) in [(&damaged, 0_usize), (&newer, 1)] {
        let (key, _) = world.redis.journals(trace).remove(0);
        let mut connection = world.redis.connection(&key);
        let entries: Vec<(Vec<u8>, Vec<u8>)> = redis::cmd("HGETALL")
            .arg(&key)
            .query(&mut connection)
            .unwrap();
        let (field, mut chunk) = entries
            .into_iter()
            .find(|(_, chunk)| chunk.windows(13).any(|part| part == b"\"span_id\":\"2\""))
            .unwrap();
        if change == 0 {
            let middle = chunk.len() / 2;
            chunk[middle] ^= 1;
        } else {
            chunk[0] = 9;
        }
        redis::cmd("HSET")
            .arg(&key)
            .arg(field)
            .arg(chunk)
            .exec(&mut connection)
            .unwrap();
    }
    // Of the damaged trace its whole entry comes out; of the other nothing, since a newer build can read it.
    world.ledger.sent(&messages[0].payload).unwrap();
    world.await_all();
    stand::eventually(LONG, "the damage to be counted", || {
        (world.redis.sum(0, "dropped:corrupt") == 1).then_some(())
    });
    stand::pause(Duration::from_secs(2));
    world.drain();
    let balance = world.read_rest();
    assert!(balance.is_exact() && balance.produced == 1, "{balance}");
    let (_, left) = world.redis.journals(&newer).remove(0);
    assert_eq!(left, 2, "{}", world.said);
}

#[test]
fn a_position_that_is_none_is_refused_and_named() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    world.send(&traffic(37, 400, 1));
    world.await_all();
    let key = world.redis.key(0, 0, "pos");
    redis::cmd("HSET")
        .arg(&key)
        .arg("next")
        .arg("soon")
        .exec(&mut world.redis.connection(&key))
        .unwrap();
    let status = world.supervisor().wait_exit(LONG).unwrap();
    assert_eq!(status.code(), Some(78), "{}", world.log());
    assert!(
        world.log().contains("read position shard=0"),
        "{}",
        world.log()
    );
}

#[test]
fn a_stop_while_kafka_takes_nothing_ends_in_time_and_loses_nothing() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    world.workers();
    world.send(&traffic(38, 400, 1));
    let refuse = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS;
    match &world.kafka {
        Kafka::Mock(mock) => mock.fail_requests(RDKafkaApiKey::Produce, &[refuse; 20_000]),
        Kafka::Real(_) => panic!("a mock was started"),
    }
    stand::eventually(LONG, "a delivery that waits", || {
        (world.redis.inserted() >= 400 && world.redis.queued() > 0).then_some(())
    });
    // Drained, not killed: well within the default of 25 s.
    world.drain();
    match &world.kafka {
        Kafka::Mock(mock) => mock.fail_no_more(RDKafkaApiKey::Produce),
        Kafka::Real(_) => panic!("a mock was started"),
    }
    world.start();
    world.await_all();
    world.settle();
    world.assert_store_is_even();
}

#[test]
fn a_stop_while_kafka_is_away_ends_in_time() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    world.workers();
    world.send(&traffic(39, 400, 1));
    world.await_all();
    match &world.kafka {
        Kafka::Mock(mock) => mock.down().unwrap(),
        Kafka::Real(_) => panic!("a mock was started"),
    }
    // Exit code 0: nobody had to be killed.
    world.drain();
}

#[test]
fn a_broker_that_goes_away_at_work_and_comes_back_costs_nothing() {
    let mut world = World::new(Kafka::real(SHARDS).unwrap());
    world.start();
    let workers = world.workers();
    world.send(&traffic(40, 1_000, 1));
    world.read_first();
    // Segments are due while it is away.
    match &mut world.kafka {
        Kafka::Real(kafka) => {
            kafka.stop().unwrap();
            stand::pause(Duration::from_secs(8));
            kafka.start_again().unwrap();
        }
        Kafka::Mock(_) => panic!("a real broker was started"),
    }
    world.send(&traffic(41, 1_000, 100_000));
    world.await_all();
    assert_eq!(
        world.workers(),
        workers,
        "nobody died meanwhile\n{}",
        world.log()
    );
    world.settle();
    world.assert_store_is_even();
}

/// A client knows the brokers that answered it, and no other: those of a cluster that is gone. One that is made anew asks the
/// configured addresses again.
#[test]
fn a_client_that_lost_its_way_is_made_anew() {
    let (left, joined) = (
        MockKafka::start(SHARDS).unwrap(),
        MockKafka::start(SHARDS).unwrap(),
    );
    let mut world = World::new(Kafka::Mock(joined));
    world.plan.brokers = format!("{},{}", left.brokers(), world.plan.brokers);
    world.plan.settings = world.settings(
        "kafka.properties = { \"metadata.recovery.strategy\" = \"none\" }\nflush.delivery_timeout = \"5s\"\n",
    );
    mock(&world).down().unwrap();
    world.start();
    let workers = world.await_healthy();
    left.down().unwrap();
    mock(&world).up().unwrap();
    world.send(&traffic(42, 300, 1));
    world.await_all();
    assert_eq!(world.workers(), workers, "nobody died\n{}", world.log());
    world.settle_exact();
    // A producer that nobody had answered yet finds its way by itself; one that was answered is made anew.
    assert!(world.said.contains("kafka consumer is made anew"));
}

/// A Kafka that went away just behind a commit does not hold up a stop: librdkafka would wait for its answer.
#[test]
fn a_stop_does_not_wait_for_a_kafka_that_is_away() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    world.await_healthy();
    let trickle = traffic(45, 100, 1);
    for part in trickle.chunks(10) {
        world.send(part);
        stand::pause(Duration::from_millis(100));
    }
    mock(&world).down().unwrap();
    let begun = Clock::mono_now();
    world.drain();
    let took = Clock::mono_now().since(begun);
    assert!(took < Duration::from_secs(15), "{took:?}\n{}", world.said);
    mock(&world).up().unwrap();
    world.start();
    world.await_all();
    world.settle();
}

/// A trace whose journal gets so many entries, and what asks for them. Each span names a parent of its own that nobody sent.
fn journal_of(trace: &str, first: u64, entries: u64) -> Vec<SpanMessage> {
    let now = Clock::wall_now();
    let span_message = |serial| {
        let parent = format!("f{serial:015x}");
        let payload = span(trace, &format!("{serial:016x}"), Some(&parent), serial, 0);
        SpanMessage {
            serial: Some(serial),
            ..message(0, now, payload)
        }
    };
    (first..first + entries).map(span_message).collect()
}

fn asks_for(
    command: &'static str,
    trace: &'static str,
) -> impl FnMut(&[&[u8]]) -> bool + Send + Copy + 'static {
    move |arguments| {
        let [name, key, ..] = arguments else {
            return false;
        };
        name.eq_ignore_ascii_case(command.as_bytes()) && key.ends_with(trace.as_bytes())
    }
}

#[test]
fn a_large_journal_is_read_in_pages() {
    const TRACE: &str = "5105105105105105105105105105105f";
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    let whole = world.proxy.hold_when(asks_for("HKEYS", TRACE));
    world.await_healthy();
    // While it stands, the journal becomes larger than what is read at once.
    let flusher = world.worker("flush", 0);
    flusher.signal(Signal::SIGSTOP).unwrap();
    world.send(&journal_of(TRACE, 1, 25_000));
    stand::eventually(LONG, "all of it in redis", || {
        (world.redis.inserted() >= 25_000).then_some(())
    });
    let page = world.proxy.hold_when(asks_for("HSCAN", TRACE));
    flusher.signal(Signal::SIGCONT).unwrap();
    assert!(page.reached(LONG));
    // What is left of it may be read at once later.
    assert!(!whole.reached(Duration::ZERO), "it was read at once");
    drop((page, whole));
    world.await_all();
    world.settle_exact();
}

#[test]
fn a_small_journal_that_is_not_read_in_time_is_asked_for_until_it_is() {
    // One whose headers are read, and one that is read whole.
    for (trace, entries, question) in [
        ("5115115115115115115115115115115f", 20, "HKEYS"),
        ("5125125125125125125125125125125f", 2, "HRANDFIELD"),
    ] {
        let mut world = World::new(Kafka::mock(SHARDS).unwrap());
        world.plan.settings = world.settings("redis.timeout = \"300ms\"\n");
        world.start();
        // More questions than three looks, after which a trace is put off.
        let holds: Vec<_> = (0..9)
            .map(|_| world.proxy.hold_when(asks_for(question, trace)))
            .collect();
        world.send(&journal_of(trace, 1, entries));
        assert!(holds.iter().all(|hold| hold.reached(LONG)), "{question}");
        drop(holds);
        world.await_all();
        assert!(!world.log().contains("is put off by"), "{}", world.log());
        world.settle_exact();
    }
}

#[test]
fn a_journal_that_grows_while_it_is_read_whole_goes_as_one_segment() {
    const TRACE: &str = "5135135135135135135135135135135f";
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    world.await_healthy();
    let whole = world.proxy.hold_when(asks_for("HRANDFIELD", TRACE));
    let by_headers = world.proxy.hold_when(asks_for("HKEYS", TRACE));
    // Entries of one segment, each of a batch of its own.
    let mut send = |serial: u64| {
        let payload = span(
            TRACE,
            &format!("{serial:016x}"),
            Some("ffffffffffffffff"),
            serial,
            0,
        );
        world.send(&[message(0, Clock::wall_now(), payload)]);
        stand::eventually(LONG, "it in redis", || {
            (world.redis.inserted() >= serial).then_some(())
        });
    };
    send(1);
    assert!(whole.reached(LONG));
    (2..=8).for_each(&mut send);
    whole.release();
    assert!(by_headers.reached(LONG), "it was taken for whole");
    by_headers.release();
    world.await_all();
    world.settle_exact();
    assert_eq!(world.output.len(), 1);
}
