//! Whatever may stand in a message: it goes through, or to the dead-letter topic, and nobody dies of it.
//!
//! In:     a row a message.
//! Keeps:  the worker that read them lives on.
//! Source: docs/spec.md 2.

use std::time::Duration;

use shared::time::{Clock, UnixMillis};
use stand::{
    kafka::{INPUT_DLQ, Kafka},
    topics::{Message, Reader},
    traffic::SpanMessage,
};

use crate::world::{LONG, SHARDS, World, message, span, traffic};

/// What is to become of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Through,
    DeadLetter,
}
use Way::{DeadLetter, Through};

/// A valid span of a trace of its own, changed.
fn changed(row: u64, from: &str, to: &str) -> Option<Vec<u8>> {
    let text = String::from_utf8(span(
        &format!("{row:032x}"),
        &format!("{row:016x}"),
        None,
        1_000 + row,
        5,
    ))
    .unwrap();
    assert!(text.contains(from), "{from}");
    Some(text.replacen(from, to, 1).into_bytes())
}

/// A row a message: its name, its bytes, its way.
fn rows() -> Vec<(&'static str, Option<Vec<u8>>, Way)> {
    let deep = |levels: usize, open: &str, close: &str| {
        format!("{}1{}", open.repeat(levels), close.repeat(levels))
    };
    let with = |row: u64, value: &str| {
        changed(row, "\"status\"", &format!("\"extra\":{value},\"status\""))
    };
    let long_id = "x".repeat(100_000);
    vec![
        ("empty", Some(Vec::new()), DeadLetter),
        ("a tombstone", None, DeadLetter),
        ("no json", Some(b"hello".to_vec()), DeadLetter),
        (
            "half a span",
            changed(1, ",\"status\"", "").map(|span| span[..span.len() / 2].to_vec()),
            DeadLetter,
        ),
        ("no object", Some(b"[1]".to_vec()), DeadLetter),
        ("an empty object", Some(b"{}".to_vec()), DeadLetter),
        (
            "bytes behind the object",
            Some([span("a", "b", None, 1, 1), b"x".to_vec()].concat()),
            DeadLetter,
        ),
        (
            "broken utf-8",
            changed(2, "\"n\"", "\"n\"").map(|span| {
                [
                    &span[..span.len() - 20],
                    b"\xff\xfe",
                    &span[span.len() - 20..],
                ]
                .concat()
            }),
            DeadLetter,
        ),
        (
            "no trace id",
            changed(3, "\"trace_id\"", "\"trace\""),
            DeadLetter,
        ),
        (
            "a trace id of another type",
            changed(
                4,
                "\"trace_id\":\"00000000000000000000000000000004\"",
                "\"trace_id\":4",
            ),
            DeadLetter,
        ),
        (
            "a span id that is null",
            changed(5, "\"span_id\":\"0000000000000005\"", "\"span_id\":null"),
            DeadLetter,
        ),
        (
            "a project below zero",
            changed(6, "\"project_id\":1", "\"project_id\":-1"),
            DeadLetter,
        ),
        (
            "a project with a fraction",
            changed(7, "\"project_id\":1", "\"project_id\":1.5"),
            DeadLetter,
        ),
        (
            "a project beyond 64 bits",
            changed(8, "\"project_id\":1", "\"project_id\":18446744073709551616"),
            DeadLetter,
        ),
        (
            "an organization of another type",
            changed(9, "\"organization_id\":1", "\"organization_id\":\"1\""),
            DeadLetter,
        ),
        (
            "a time of another type",
            changed(10, "\"start_timestamp\":1.5", "\"start_timestamp\":\"now\""),
            DeadLetter,
        ),
        (
            "no end",
            changed(11, "\"end_timestamp\"", "\"end\""),
            DeadLetter,
        ),
        (
            "a name of another type",
            changed(12, "\"name\":\"n\"", "\"name\":1"),
            DeadLetter,
        ),
        (
            "a status of another type",
            changed(13, "\"status\":\"ok\"", "\"status\":1"),
            DeadLetter,
        ),
        (
            "is_segment of another type",
            changed(14, "\"status\"", "\"is_segment\":\"yes\",\"status\""),
            DeadLetter,
        ),
        (
            "an object 100,000 levels deep",
            with(20, &deep(100_000, "{\"a\":", "}")),
            Through,
        ),
        (
            "an array 100,000 levels deep",
            with(21, &deep(100_000, "[", "]")),
            Through,
        ),
        ("NUL in a text", with(22, r#""a\u0000b""#), Through),
        (
            "a lone surrogate in a text",
            with(23, r#""\ud800""#),
            Through,
        ),
        (
            "duplicate keys",
            changed(
                24,
                "\"status\":\"ok\"",
                "\"status\":\"no\",\"status\":\"ok\"",
            ),
            Through,
        ),
        (
            "a duplicate is_segment",
            changed(
                25,
                "\"status\"",
                "\"is_segment\":false,\"is_segment\":true,\"status\"",
            ),
            Through,
        ),
        (
            "ids of 100 kB",
            changed(26, "0000000000000000000000000000001a", &long_id).map(|span| {
                String::from_utf8(span)
                    .unwrap()
                    .replacen("000000000000001a", &long_id, 1)
                    .into_bytes()
            }),
            Through,
        ),
        (
            "ten megabytes",
            changed(27, "xxxxx", &"x y ".repeat(2_500_000)),
            Through,
        ),
        (
            "white space around everything",
            changed(28, "{", " \n{ ").map(|span| [span, b" \n".to_vec()].concat()),
            Through,
        ),
        (
            "escaped keys",
            changed(29, "\"span_id\"", r#""span\u005fid""#),
            Through,
        ),
        (
            "numbers in other forms",
            changed(30, "\"end_timestamp\":2.5", "\"end_timestamp\":2.50E+0"),
            Through,
        ),
        (
            "attributes that are null",
            changed(31, "\"status\"", "\"spare\":null,\"status\""),
            Through,
        ),
        (
            "a known segment without a value",
            changed(32, "\"padding\"", "\"sentry.segment.id\":null,\"padding\""),
            Through,
        ),
        (
            "a segment id of another type",
            changed(
                33,
                "\"padding\"",
                "\"sentry.segment.id\":{\"type\":\"integer\",\"value\":7},\"padding\"",
            ),
            Through,
        ),
        (
            "name that is null, end before start",
            changed(34, "\"start_timestamp\":1.5", "\"start_timestamp\":9.5").map(|span| {
                String::from_utf8(span)
                    .unwrap()
                    .replacen("\"n\"", "null", 1)
                    .into_bytes()
            }),
            Through,
        ),
    ]
}

fn dead_letters(world: &World, wanted: usize) -> Vec<Message> {
    let mut reader = Reader::new(&world.kafka.brokers(), INPUT_DLQ).unwrap();
    reader
        .read_until(LONG, "all dead letters", |letters| letters.len() >= wanted)
        .unwrap();
    reader.read_to_end(LONG).unwrap();
    reader.take()
}

fn any_message(kafka: Kafka) {
    let rows = rows();
    assert_eq!(rows.len(), 35);
    let mut world = World::new(kafka);
    world.start();
    let worker = world.worker("ingest", 0);
    for (name, payload, way) in &rows {
        match (payload, way) {
            (Some(payload), Through) => {
                // Duplicate keys stand twice: the ledger's reader keeps the last, as ours does.
                world
                    .ledger
                    .sent(payload)
                    .unwrap_or_else(|error| panic!("{name}: {error}"));
                world.send_raw(0, Clock::wall_now(), Some(payload));
            }
            (payload, _) => world.send_raw(0, Clock::wall_now(), payload.as_deref()),
        }
    }
    // Behind all of them, so that what is missing was lost and not late.
    world.send(&traffic(1, 200, 100_000));
    world.await_all();
    let refused: Vec<_> = rows.iter().filter(|(.., way)| *way == DeadLetter).collect();
    let letters = dead_letters(&world, refused.len());
    assert_eq!(letters.len(), refused.len(), "{letters:?}");
    for ((name, payload, _), letter) in refused.iter().zip(&letters) {
        assert_eq!(&letter.payload, payload, "{name}");
        let header = |key| std::str::from_utf8(letter.header(key).unwrap()).unwrap();
        assert_eq!(
            (header("source_topic"), header("source_partition")),
            ("ingest-spans", "0"),
            "{name}"
        );
        let offset = rows.iter().position(|row| row.0 == *name).unwrap();
        assert_eq!(header("source_offset"), offset.to_string(), "{name}");
        assert!(
            !header("reason").is_empty()
                && header("time").parse::<u64>().unwrap() > 1_600_000_000_000,
            "{name}"
        );
    }
    assert!(worker.lives(), "the ingest worker died\n{}", world.log());
    world.settle_exact();
}

#[test]
fn any_message_goes_through_or_to_the_dead_letters() {
    any_message(Kafka::mock(SHARDS).unwrap());
}

#[test]
fn refused_messages_are_counted_where_there_is_no_dead_letter_topic() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.plan.settings = world.settings("kafka.input_dlq = \"\"\n");
    world.start();
    for payload in [&b"no span"[..], b"{}", b""] {
        world.send_raw(1, Clock::wall_now(), Some(payload));
    }
    world.send(&traffic(2, 200, 1));
    world.await_all();
    world.settle_exact();
    assert_eq!(world.redis.sum(1, "refused:dlq_off"), 3);
}

#[test]
fn every_example_of_the_input_schema_goes_through() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    let schema = sentry_kafka_schemas::get_schema("ingest-spans", None).unwrap();
    let examples: Vec<SpanMessage> = schema
        .examples()
        .iter()
        .map(|example| message(0, Clock::wall_now(), example.payload().to_vec()))
        .collect();
    assert!(examples.len() >= 3);
    // What the schema allows at its edges.
    let edges = [
        r#"{"organization_id":0,"project_id":18446744073709551615,"trace_id":"{}:{}:{}:{}:{}:{}:{}:{}:{}:{}:{}!","span_id":"","parent_span_id":null,"is_segment":null,"received":0,"start_timestamp":0,"end_timestamp":1e300,"retention_days":65535,"name":null,"status":"","attributes":null,"links":[null],"_meta":{}}"#,
        r#"{"organization_id":1.0,"project_id":1e3,"trace_id":"00000000-0000-0000-0000-000000000001","span_id":"{0}:1","parent_span_id":"","received":1,"start_timestamp":2,"end_timestamp":1,"retention_days":0,"name":"","status":"anything","attributes":{"a":null,"b":{"type":"double","value":1.50}}}"#,
        r#"{"organization_id":1,"project_id":1,"trace_id":"0123456789ABCDEF0123456789ABCDEF","span_id":"s","is_segment":true,"parent_span_id":"p","received":1,"start_timestamp":2,"end_timestamp":1,"retention_days":0,"name":"n","status":"ok","unknown":{"deep":[[[{}]]]}}"#,
    ];
    for edge in edges {
        schema.validate_json(edge.as_bytes()).unwrap();
    }
    let edges = edges.map(|edge| message(1, Clock::wall_now(), edge.as_bytes().to_vec()));
    world.send(&examples);
    world.send(&edges);
    world.await_all();
    world.settle_exact();
    world.assert_schema();
}

/// Sends messages; each is in Redis before the next one is sent when `apart`.
fn send_in_turn(world: &mut World, messages: &[SpanMessage], apart: bool) {
    for message in messages {
        let before = world.redis.inserted();
        world.send(std::slice::from_ref(message));
        if apart {
            stand::eventually(LONG, "an insert", || {
                (world.redis.inserted() > before).then_some(())
            });
        }
    }
}

#[test]
fn self_parents_cycles_and_duplicate_ids_end_in_segments() {
    let now = UnixMillis(Clock::wall_now().0 - 3_000);
    for apart in [false, true] {
        let mut world = World::new(Kafka::mock(SHARDS).unwrap());
        // One message a batch: what arrives apart is inserted apart.
        world.plan.settings = world.settings(if apart {
            "intake.batch_spans = 1\n"
        } else {
            "intake.batch_time = \"1s\"\n"
        });
        if apart {
            world.start();
        }
        let of = |trace: &str, id: &str, parent: Option<&str>, serial: u64| {
            message(3, now, span(trace, id, parent, serial, 5))
        };
        let (own, cycle, twice) = (&"a".repeat(32), &"b".repeat(32), &"c".repeat(32));
        let with_root = |id: &str, serial| {
            let text = String::from_utf8(span(twice, id, Some("p"), serial, 5)).unwrap();
            message(
                3,
                now,
                text.replacen("\"status\"", "\"is_segment\":true,\"status\"", 1)
                    .into_bytes(),
            )
        };
        let messages = [
            of(own, "1", Some("1"), 1),
            of(cycle, "1", Some("3"), 2),
            of(cycle, "2", Some("1"), 3),
            of(cycle, "3", Some("2"), 4),
            with_root("r1", 5),
            of(twice, "d", Some("r1"), 6),
            with_root("r2", 7),
            of(twice, "d", Some("r2"), 8),
            of(twice, "e", Some("d"), 9),
        ];
        send_in_turn(&mut world, &messages, apart);
        if !apart {
            // All of it is there when reading begins: it is one batch.
            world.start();
        }
        world.await_all();
        world.settle_exact();
    }
}

#[test]
fn a_span_that_was_sent_twice_comes_out_once() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    let trace = "d".repeat(32);
    let now = UnixMillis(Clock::wall_now().0 - Duration::from_secs(2).as_secs() * 1_000);
    let one = message(0, now, span(&trace, "1", None, 1, 5));
    world.send(&[one.clone(), one.clone(), one]);
    world.start();
    world.await_all();
    world.settle_exact();
    assert_eq!(world.redis.sum(0, "repeats"), 2);
}
