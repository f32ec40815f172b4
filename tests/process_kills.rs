//! Kills at the moments that matter; the proxy keeps back what would end the moment.
//!
//! In:     traffic; a moment, by the command that would end it.
//! Keeps:  a kill that did not meet its moment fails its test.
//! Source: docs/store.md 5.

use nix::sys::signal::Signal;
use stand::kafka::Kafka;

use crate::world::{LONG, SHARDS, World, calls_script_on, moves_position, traffic};

/// Sends traffic, and kills all workers of `role` while a command is held.
fn kill_at(kafka: Kafka, role: &str, hold: impl FnOnce(&mut World) -> stand::proxy::Hold) -> World {
    let mut world = World::new(kafka);
    // Before anything is sent: a moment that has passed does not come again.
    let held = hold(&mut world);
    world.start();
    world.send(&traffic(20, 1_000, 1));
    assert!(
        held.reached(LONG),
        "the moment did not come\n{}",
        world.log()
    );
    for worker in world
        .supervisor()
        .workers()
        .unwrap()
        .iter()
        .filter(|worker| worker.role == role)
    {
        worker.signal(Signal::SIGKILL).unwrap();
        stand::eventually(LONG, "the end of the worker", || {
            (!worker.lives()).then_some(())
        });
    }
    // What was held is dropped with its connection, as if the network had lost it.
    world.proxy.cut();
    drop(held);
    world.send(&traffic(21, 1_000, 100_000));
    world.await_all();
    world
}

fn ingest_with_a_batch_inserted_and_not_committed(kafka: Kafka) {
    // The position is written and its answer is held: all is in Redis, nothing is committed.
    kill_at(kafka, "ingest", |world| {
        world.proxy.hold_reply_when(moves_position())
    })
    .settle_exact();
}

#[test]
fn ingest_killed_with_a_batch_inserted_and_not_committed() {
    ingest_with_a_batch_inserted_and_not_committed(Kafka::mock(SHARDS).unwrap());
}

#[test]
fn ingest_killed_with_a_batch_inserted_and_not_committed_on_a_real_kafka() {
    ingest_with_a_batch_inserted_and_not_committed(Kafka::real(SHARDS).unwrap());
}

#[test]
fn ingest_killed_with_entries_in_redis_and_no_position() {
    // Entries stand in their journals, and do not exist yet: they are written again, cut as it comes.
    kill_at(Kafka::mock(SHARDS).unwrap(), "ingest", |world| {
        world.proxy.hold_when(moves_position())
    })
    .settle_exact();
}

fn flusher_with_a_segment_acknowledged_and_not_cleared(kafka: Kafka) {
    let mut world = kill_at(kafka, "flush", |world| {
        world.proxy.hold_when(calls_script_on(":t:"))
    });
    let balance = world.settle();
    // They came out twice, and whoever reads them can tell: `is_even` has seen equal flush ids.
    assert!(!balance.repeats.is_empty(), "{balance}");
    world.assert_store_is_even();
}

#[test]
fn a_flusher_killed_with_a_segment_acknowledged_and_not_cleared() {
    flusher_with_a_segment_acknowledged_and_not_cleared(Kafka::mock(SHARDS).unwrap());
}

#[test]
fn a_flusher_killed_with_a_segment_acknowledged_and_not_cleared_on_a_real_kafka() {
    flusher_with_a_segment_acknowledged_and_not_cleared(Kafka::real(SHARDS).unwrap());
}

#[test]
fn a_clear_that_was_carried_out_but_not_answered_doubles_nothing() {
    kill_at(Kafka::mock(SHARDS).unwrap(), "flush", |world| {
        // A second flusher would be killed at whatever moment, such as before its clear.
        world.plan.max_workers = 1;
        world.proxy.hold_reply_when(calls_script_on(":t:"))
    })
    .settle_exact();
}

fn the_supervisor(kafka: Kafka) {
    let mut world = World::new(kafka);
    world.start();
    world.send(&traffic(22, 3_000, 1));
    world.read_first();
    assert!(!world.ledger.is_complete(), "the kill came too late");
    world.kill_supervisor();
    world.start();
    world.send(&traffic(23, 1_000, 100_000));
    world.await_all();
    // A flusher may have died between acknowledgement and clear: repeats carry the same flush id.
    world.settle();
    world.assert_store_is_even();
}

#[test]
fn the_supervisor_killed() {
    the_supervisor(Kafka::mock(SHARDS).unwrap());
}

#[test]
fn the_supervisor_killed_on_a_real_kafka() {
    the_supervisor(Kafka::real(SHARDS).unwrap());
}
