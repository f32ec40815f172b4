//! Time: lag, late spans, shards with different clocks; and segments that are too large for a message.
//!
//! In:     messages with times of their own.
//! Keeps:  a segment is cut by its input's time, never by ours.
//! Source: docs/spec.md 2.6, 4, 5.

use std::{collections::BTreeMap, time::Duration};

use rdkafka::{
    config::ClientConfig,
    producer::{BaseProducer, BaseRecord, Producer as _},
};
use shared::time::{Clock, UnixMillis};
use stand::{
    kafka::{INPUT, Kafka},
    traffic::SpanMessage,
};

use crate::world::{SHARDS, World, message, span};

const ROOT: &str = "00000000000000aa";

fn ago(length: Duration) -> UnixMillis {
    UnixMillis(Clock::wall_now().0 - u64::try_from(length.as_millis()).unwrap())
}

/// A trace's root and two children, each two seconds of message time behind the other.
fn slow_trace(trace: &str, partition: u32, begin: UnixMillis, serial: u64) -> Vec<SpanMessage> {
    let child = |index: u64| {
        span(
            trace,
            &format!("{index:016x}"),
            Some(ROOT),
            serial + index,
            10,
        )
    };
    let at = |seconds| begin.after(Duration::from_secs(seconds));
    vec![
        message(partition, at(0), child(1)),
        message(partition, at(2), child(2)),
        message(partition, at(4), span(trace, ROOT, None, serial, 10)),
    ]
}

/// Messages of the output for each trace.
fn segments(world: &World) -> BTreeMap<String, usize> {
    let mut segments = BTreeMap::new();
    for message in &world.output {
        let segment: serde_json::Value =
            serde_json::from_slice(message.payload.as_deref().unwrap()).unwrap();
        *segments
            .entry(segment["spans"][0]["trace_id"].as_str().unwrap().to_owned())
            .or_default() += 1;
    }
    segments
}

#[test]
fn a_restart_under_an_hour_of_lag_splits_no_segment() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    // Of every trace a part is in Redis when all is restarted; the rest comes after it, an hour late as well.
    let begin = ago(Duration::from_secs(3_600));
    let traces: Vec<Vec<SpanMessage>> = (0..40_u32)
        .map(|index| {
            slow_trace(
                &format!("{index:032x}"),
                index % SHARDS,
                begin,
                1_000 + 10 * u64::from(index),
            )
        })
        .collect();
    let part = |parts: std::ops::Range<usize>| {
        traces
            .iter()
            .flat_map(|trace| trace[parts.clone()].to_vec())
            .collect::<Vec<_>>()
    };
    world.start();
    world.send(&part(0..1));
    await_inserted(&world, 40);
    world.drain();
    world.send(&part(1..3));
    world.start();
    world.await_all();
    world.settle_exact();
    assert!(
        segments(&world).values().all(|&count| count == 1),
        "{:?}",
        segments(&world)
    );
}

fn await_inserted(world: &World, spans: u64) {
    stand::eventually(crate::world::LONG, "spans in redis", || {
        (world.redis.inserted() >= spans).then_some(())
    });
}

#[test]
fn a_backlog_that_is_read_slowly_splits_no_segment() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    // One message a batch, and a slow store: a trace's parts are read further apart than any timeout, and stand two seconds
    // apart by their own time. Workers read side by side.
    world.plan.settings = world.settings("intake.batch_spans = 1\n");
    world
        .proxy
        .slow(Duration::from_millis(60) * world.plan.ingest_workers);
    let begin = ago(Duration::from_secs(3_600));
    let traces: Vec<Vec<SpanMessage>> = (0..20_u32)
        .map(|index| {
            let serial = 1_000 + 10 * u64::from(index);
            slow_trace(&format!("{index:032x}"), index % SHARDS, begin, serial)
        })
        .collect();
    for part in 0..3 {
        let messages: Vec<SpanMessage> = traces.iter().map(|trace| trace[part].clone()).collect();
        world.send(&messages);
    }
    world.start();
    let begun = Clock::mono_now();
    stand::eventually(crate::world::LONG, "the first parts in redis", || {
        (world.redis.inserted() >= 20).then_some(())
    });
    let first = Clock::mono_now();
    stand::eventually(crate::world::LONG, "the last parts in redis", || {
        (world.redis.inserted() >= 60).then_some(())
    });
    let apart = Clock::mono_now().since(first);
    assert!(
        apart > Duration::from_secs(4),
        "read too fast to tell: {apart:?} of {:?}",
        Clock::mono_now().since(begun)
    );
    world.proxy.release();
    world.await_all();
    world.settle_exact();
    assert!(
        segments(&world).values().all(|&count| count == 1),
        "{:?}",
        segments(&world)
    );
}

#[test]
fn shards_at_different_lags_do_not_disturb_each_other() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    let begin = [0, 60, 3_600, 86_400].map(|lag| ago(Duration::from_secs(lag + 5)));
    world.start();
    for (shard, begin) in (0..SHARDS).zip(begin) {
        let traces: Vec<SpanMessage> = (0..10_u64)
            .flat_map(|index| {
                slow_trace(
                    &format!("{:032x}", u64::from(shard) * 100 + index),
                    shard,
                    begin,
                    10_000 * u64::from(shard + 1) + 10 * index,
                )
            })
            .collect();
        world.send(&traces);
    }
    world.await_all();
    world.settle_exact();
    assert_eq!(segments(&world).len(), 40);
    assert!(
        segments(&world).values().all(|&count| count == 1),
        "{:?}",
        segments(&world)
    );
}

#[test]
fn input_that_trickles_in_is_written_at_the_pace_of_batches() {
    const BATCH_TIME: Duration = Duration::from_millis(500);
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.plan.settings = world.settings("intake.batch_time = \"500ms\"\n");
    world.start();
    world.await_healthy();
    // Of no root: nothing is due, and read by a flusher, before all was sent.
    let children: Vec<SpanMessage> = (0..100)
        .map(|serial| {
            let (trace, id) = (format!("{serial:032x}"), format!("{serial:016x}"));
            let child = span(&trace, &id, Some(ROOT), serial, 10);
            message(0, Clock::wall_now(), child)
        })
        .collect();
    let (begun, before) = (Clock::mono_now(), world.redis.calls("hget"));
    world.trickle(&children, Duration::from_millis(15));
    let took = Clock::mono_now().since(begun);
    let read = world.redis.calls("hget") - before;
    // A batch of one shard reads the positions of that shard; once a second those of all are read.
    let buckets = f64::from(world.redis.buckets_a_shard());
    let batches = took.as_secs_f64() / BATCH_TIME.as_secs_f64() + 1.0;
    let watches = took.as_secs_f64() + 1.0;
    let expected = buckets * (batches + watches * f64::from(SHARDS));
    assert!(
        took < Duration::from_millis(2_900),
        "too slow to tell: {took:?}"
    );
    assert!(
        read >= buckets && read <= expected,
        "positions read {read} times, {expected} expected, in {took:?}"
    );
    world.await_all();
    world.settle_exact();
}

#[test]
fn a_span_that_comes_a_moment_later_makes_its_segment_later_by_no_more_than_that() {
    const ROOT_TIMEOUT: Duration = Duration::from_secs(1);
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    world.await_healthy();
    let mut late: Vec<u64> = Vec::new();
    for index in 0..3 {
        let trace = format!("{index:032x}");
        let serial = 1_000 + 10 * index;
        let root = span(&trace, ROOT, None, serial, 10);
        world.send(&[message(0, Clock::wall_now(), root)]);
        // The input's own pace. The trace is looked at when the root alone would be due; nothing else becomes due then that would have
        // it looked at again.
        stand::pause(Duration::from_millis(300));
        let last = Clock::wall_now();
        let child = span(
            &trace,
            &format!("{serial:016x}"),
            Some(ROOT),
            serial + 1,
            10,
        );
        world.send(&[message(0, last, child)]);
        world.read_first();
        let sent = world.output.last().and_then(|message| message.timestamp);
        let sent = UnixMillis(sent.unwrap().try_into().unwrap());
        let deadline = last.after(ROOT_TIMEOUT);
        assert!(sent >= deadline, "sent={sent} deadline={deadline}");
        late.push(sent.0 - deadline.0);
    }
    world.settle_exact();
    assert_eq!(segments(&world).len(), 3);
    // Without that word each of them is late by 700 ms.
    assert!(late.iter().any(|&late| late < 400), "late by {late:?} ms");
}

#[test]
fn spans_that_come_after_their_segment_form_one_under_its_id() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    let trace = "0000000000000000000000000000beef";
    world.send(&slow_trace(trace, 1, ago(Duration::from_secs(4)), 1));
    world.await_all();
    world.send(&[message(
        1,
        Clock::wall_now(),
        span(trace, "00000000000000ff", Some(ROOT), 99, 10),
    )]);
    world.await_all();
    world.settle_exact();
    let late: serde_json::Value =
        serde_json::from_slice(world.output.last().unwrap().payload.as_deref().unwrap()).unwrap();
    assert_eq!(
        late["spans"][0]["attributes"]["sentry.segment.id"]["value"], ROOT,
        "{late}"
    );
    assert_eq!(late["spans"][0]["is_segment"], false, "{late}");
}

#[test]
fn a_segment_over_ten_mebibytes_comes_in_parts() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    let trace = "0000000000000000000000000000cafe";
    let now = ago(Duration::from_secs(1));
    let mut messages: Vec<SpanMessage> = (1..=120_u64)
        .map(|index| {
            message(
                2,
                now,
                span(trace, &format!("{index:016x}"), Some(ROOT), index, 100_000),
            )
        })
        .collect();
    messages.push(message(2, now, span(trace, ROOT, None, 0, 10)));
    world.send(&messages);
    world.await_all();
    world.settle_exact();
    let sizes: Vec<usize> = world
        .output
        .iter()
        .map(|message| message.payload.as_deref().unwrap().len())
        .collect();
    assert!(
        sizes.len() >= 2 && sizes.iter().all(|&size| size <= 10 << 20),
        "{sizes:?}"
    );
    let cut = world
        .output
        .iter()
        .filter(|message| message.header("parts") != Some(b"1"));
    for message in cut {
        let part: serde_json::Value =
            serde_json::from_slice(message.payload.as_deref().unwrap()).unwrap();
        assert_eq!(part["skip_enrichment"], true);
    }
}

#[test]
fn a_gap_in_the_input_is_counted_and_passed() {
    let kafka = stand::kafka::RealKafka::start(SHARDS).unwrap();
    let mut world = World::new(Kafka::Real(kafka));
    world.start();
    let first: Vec<SpanMessage> = slow_trace(
        "0000000000000000000000000000aaaa",
        0,
        ago(Duration::from_secs(5)),
        1,
    );
    world.send(&first);
    world.await_all();
    world.drain();
    let lost: Vec<SpanMessage> = slow_trace(
        "0000000000000000000000000000bbbb",
        0,
        ago(Duration::from_secs(5)),
        101,
    );
    for message in &lost {
        world.send_raw(0, message.arrival, Some(&message.payload));
    }
    match &world.kafka {
        Kafka::Real(kafka) => kafka.delete_before(INPUT, 0, 5).unwrap(),
        Kafka::Mock(_) => panic!("a real broker was started"),
    }
    world.start();
    world.send(&slow_trace(
        "0000000000000000000000000000cccc",
        0,
        ago(Duration::from_secs(5)),
        201,
    ));
    // The last of the three before the gap's end was not deleted, and nobody knows of it here.
    world.ledger.sent(&lost[2].payload).unwrap();
    world.await_all();
    world.settle_exact();
    assert_eq!(world.redis.sum(0, "offset_out_of_range"), 2);
}

#[test]
fn a_gap_is_counted_once_however_often_nothing_comes_behind_it() {
    let mut world = World::new(Kafka::Real(stand::kafka::RealKafka::start(SHARDS).unwrap()));
    world.start();
    world.send(&slow_trace(
        "0000000000000000000000000000dddd",
        1,
        ago(Duration::from_secs(5)),
        1,
    ));
    world.await_all();
    world.drain();
    for message in slow_trace(
        "0000000000000000000000000000eeee",
        1,
        ago(Duration::from_secs(5)),
        101,
    ) {
        world.send_raw(1, message.arrival, Some(&message.payload));
    }
    match &world.kafka {
        Kafka::Real(kafka) => kafka.delete_before(INPUT, 1, 6).unwrap(),
        Kafka::Mock(_) => panic!("a real broker was started"),
    }
    for _ in 0..2 {
        world.start();
        stand::eventually(crate::world::LONG, "all shards to begin", || {
            (world.log().matches("begin shard=").count() == 4).then_some(())
        });
        stand::eventually(crate::world::LONG, "all shards to be at work", || {
            world.said_healthy().then_some(())
        });
        world.drain();
        assert_eq!(world.redis.sum(1, "offset_out_of_range"), 3);
    }
}

#[test]
fn the_mark_of_a_transaction_at_the_end_does_not_stop_the_clock() {
    let mut world = World::new(Kafka::Real(stand::kafka::RealKafka::start(SHARDS).unwrap()));
    world.start();
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", world.kafka.brokers())
        .set("transactional.id", "t")
        .create()
        .unwrap();
    producer.init_transactions(crate::world::LONG).unwrap();
    producer.begin_transaction().unwrap();
    let payload = span("0000000000000000000000000000ffff", ROOT, None, 1, 10);
    world.ledger.sent(&payload).unwrap();
    let now = i64::try_from(Clock::wall_now().0).unwrap();
    let record = BaseRecord::<(), [u8]>::to(INPUT)
        .partition(0)
        .timestamp(now)
        .payload(&payload[..]);
    producer.send(record).map_err(|(error, _)| error).unwrap();
    producer.commit_transaction(crate::world::LONG).unwrap();
    // What ends the partition is no message: nothing comes behind the span.
    world.await_all();
    world.settle_exact();
}
