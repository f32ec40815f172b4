//! Large shapes, and input that wants to grow in memory.
//!
//! In:     shapes.
//! Keeps:  every span comes out once, memory is bounded, no call of Redis holds up the others.
//! Source: docs/store.md 7; docs/house.md 13.

use std::time::Duration;

use nix::sys::signal::Signal;
use shared::time::Clock;
use stand::{kafka::Kafka, launch::Worker, pause, rng::Rng, traffic::SpanMessage};

use crate::world::{SHARDS, World, message, span, store::is_left_out};

/// The most memory that a process ever had, in MiB.
fn peak(worker: &Worker) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", worker.pid)).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

#[test]
fn a_huge_segment_id_in_hundreds_of_spans_is_produced_part_by_part() {
    const SPANS: u64 = 250;
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.plan.settings = world.settings("flush.max_flush_bytes = \"16MiB\"\n");
    world.start();
    let now = Clock::wall_now();
    // One span names a parent that nobody sent, a megabyte long; all others hang under that span. The name goes into each.
    let parent = "p".repeat(1_000_000);
    let spans: Vec<_> = (0..SPANS)
        .map(|serial| {
            let (id, above) = match serial {
                0 => ("c".to_owned(), parent.as_str()),
                _ => (format!("{serial:016x}"), "c"),
            };
            message(0, now, span("t", &id, Some(above), serial + 1, 0))
        })
        .collect();
    world.send(&spans);
    world.await_all();
    let peaks: Vec<u64> = world.workers().iter().map(peak).collect();
    world.settle_exact();
    let bytes: usize = world
        .output
        .iter()
        .filter_map(|message| message.payload.as_ref())
        .map(Vec::len)
        .sum();
    assert!(bytes > 240_000_000, "{bytes}");
    assert!(peaks.iter().all(|&peak| peak < 200), "{peaks:?} MiB");
}

/// Sends spans made one after the other, all of this moment.
fn send(world: &mut World, spans: u64, mut make: impl FnMut(u64) -> (u32, Vec<u8>)) {
    let now = Clock::wall_now();
    let messages: Vec<SpanMessage> = (1..=spans)
        .map(|serial| {
            let (partition, payload) = make(serial);
            message(partition, now, payload)
        })
        .collect();
    world.send(&messages);
}

/// Sends spans of one trace that each name a parent of its own that nobody sent: an entry each, and a segment each.
fn send_orphans(world: &mut World, spans: u64) {
    send(world, spans, |serial| {
        let parent = format!("f{serial:015x}");
        let payload = span("t", &format!("{serial:016x}"), Some(&parent), serial, 0);
        (1, payload)
    });
}

/// What a shape must hold to: every span once, bounded memory, and a Redis that serves others meanwhile.
fn hold_to(shape: &str, mut world: World) {
    let begun = Clock::mono_now();
    world.await_all();
    let took = Clock::mono_now().since(begun);
    let peaks: Vec<u64> = world.workers().iter().map(peak).collect();
    let mut calls = world.redis.call_times();
    // What this world itself asks for, with a look at every key.
    calls.retain(|name, _| {
        !["info", "keys", "cluster|slots", "cluster|nodes"].contains(&name.as_str())
    });
    let longest = calls
        .into_iter()
        .max_by(|one, other| one.1.total_cmp(&other.1))
        .unwrap();
    println!(
        "{shape}: out {took:?} after it was sent, peaks {peaks:?} MiB, longest call {longest:?} µs"
    );
    world.settle_exact();
    assert!(peaks.iter().all(|&peak| peak < 400), "{peaks:?} MiB");
    // On average: a single one may have waited for a core.
    assert!(longest.1 < 20_000.0, "{longest:?}");
}

fn started() -> World {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    world
}

#[test]
fn traces_of_few_entries_that_are_too_large_to_be_read_whole_come_out() {
    const TRACES: u64 = 40;
    const BYTES: usize = 100_000;
    let mut world = started();
    world.await_healthy();
    let by_headers = world.proxy.hold_when(|arguments| arguments[0] == b"HKEYS");
    // While it stands, more becomes due than it has room for. A mock broker keeps no more than one of these parts.
    let flusher = world.worker("flush", 0);
    flusher.signal(Signal::SIGSTOP).unwrap();
    let mut rng = Rng::new(7);
    for part in 0..3 {
        send(&mut world, TRACES, |serial| {
            let serial = part * TRACES + serial;
            let trace = format!("{serial:032x}");
            let mut payload = span(&trace, "1111111111111111", None, serial, BYTES);
            // So that it does not pack.
            for byte in payload.iter_mut().filter(|byte| **byte == b'x') {
                *byte = b'a' + u8::try_from(rng.below(16)).unwrap();
            }
            (0, payload)
        });
        stand::eventually(Duration::from_secs(60), "all of it in redis", || {
            (world.redis.inserted() >= (part + 1) * TRACES).then_some(())
        });
    }
    // Until all of it is due.
    pause(Duration::from_millis(1_500));
    flusher.signal(Signal::SIGCONT).unwrap();
    if !is_left_out("whole journals that a node has no room for") {
        let reached = by_headers.reached(Duration::from_secs(60));
        assert!(reached, "there was room");
    }
    drop(by_headers);
    hold_to("120 traces of a tenth of a megabyte", world);
}

#[test]
fn a_segment_of_a_hundred_thousand_spans_comes_out() {
    const SPANS: u64 = 100_000;
    let mut world = started();
    // Child first: each names the next as its parent, the last is the root.
    send(&mut world, SPANS, |serial| {
        let parent = (serial < SPANS).then(|| format!("{:016x}", serial + 1));
        (
            0,
            span("t", &format!("{serial:016x}"), parent.as_deref(), serial, 0),
        )
    });
    hold_to("a segment of 100,000 spans", world);
}

#[test]
fn a_trace_of_ten_thousand_segments_comes_out() {
    let mut world = started();
    send_orphans(&mut world, 10_000);
    hold_to("a trace of 10,000 segments", world);
}

#[test]
fn a_trace_of_three_hundred_thousand_entries_comes_out() {
    let mut world = started();
    send_orphans(&mut world, 300_000);
    hold_to("a trace of 300,000 entries", world);
}

#[test]
fn a_hundred_thousand_traces_that_are_due_at_once_come_out() {
    let mut world = started();
    send(&mut world, 100_000, |serial| {
        let shard = u32::try_from(serial % u64::from(SHARDS)).unwrap();
        (
            shard,
            span(
                &format!("{serial:032x}"),
                "1111111111111111",
                None,
                serial,
                0,
            ),
        )
    });
    hold_to("100,000 traces", world);
}
