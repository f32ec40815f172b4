//! Input that wants to grow in memory does not.

use stand::{kafka::Kafka, launch::Worker};

use crate::world::{SHARDS, World, message, span};

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
    let now = shared::time::Clock::wall_now();
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
