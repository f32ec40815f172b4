//! The whole way, and restarts in the middle of it.
//!
//! In:     seeded traffic.
//! Keeps:  every span once.
//! Source: docs/spec.md 4, 5.

use nix::sys::signal::Signal;
use stand::kafka::Kafka;

use crate::world::{LONG, SHARDS, World, traffic};

fn the_whole_way(kafka: Kafka) {
    let mut world = World::new(kafka);
    world.start();
    world.send(&traffic(1, 5_000, 1));
    world.await_all();
    world.settle_exact();
    world.assert_schema();
    let reasons: std::collections::BTreeSet<_> = world
        .output
        .iter()
        .map(|message| String::from_utf8_lossy(message.header("reason").unwrap()).into_owned())
        .collect();
    assert!(
        reasons.contains("root_timeout") && reasons.contains("timeout"),
        "{reasons:?}"
    );
}

#[test]
fn spans_come_out_as_segments_on_the_mock() {
    the_whole_way(Kafka::mock(SHARDS).unwrap());
}

#[test]
fn spans_come_out_as_segments_on_a_real_kafka() {
    the_whole_way(Kafka::real(SHARDS).unwrap());
}

fn restarts(kafka: Kafka) {
    let mut world = World::new(kafka);
    for round in 0..3 {
        world.start();
        world.send(&traffic(10 + round, 2_000, 1 + 10_000 * round));
        world.read_first();
        world.drain();
    }
    world.start();
    world.await_all();
    world.settle_exact();
}

#[test]
fn a_restart_of_everything_in_the_middle_loses_and_doubles_nothing() {
    restarts(Kafka::mock(SHARDS).unwrap());
}

#[test]
fn a_restart_of_everything_in_the_middle_loses_and_doubles_nothing_on_a_real_kafka() {
    restarts(Kafka::real(SHARDS).unwrap());
}

#[test]
fn usr1_shows_every_worker_and_workers_die_with_the_supervisor() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    let pids: Vec<String> = world
        .workers()
        .iter()
        .map(|worker| worker.pid.to_string())
        .collect();
    let supervisor = world.supervisor();
    supervisor.signal(Signal::SIGUSR1).unwrap();
    stand::eventually(LONG, "a line for each worker", || {
        let log = supervisor.log();
        pids.iter()
            .all(|pid| {
                log.lines().any(|line| {
                    line.starts_with("worker slot=") && line.contains(&format!("pid={pid} "))
                })
            })
            .then_some(())
    });
    world.kill_supervisor();
    // The run directory is free again, and the dead supervisor's board is swept.
    world.start();
    world.send(&traffic(3, 200, 1));
    world.await_all();
    world.settle_exact();
}
