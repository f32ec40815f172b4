//! The whole way on a cluster of three, and what happens to clusters in the middle of it.
//!
//! Every world here has four buckets a shard, a slice, two ingest workers and two output topics.

use std::time::Duration;

use shared::time::Clock;
use stand::{
    cluster::{Cluster, MASTERS},
    kafka::Kafka,
};

use crate::world::{SHARDS, World, traffic};

/// How long a node is away: longer than its cluster takes to notice, and than a worker takes to show it.
const AWAY: Duration = Duration::from_secs(5);

fn world(kafka: Kafka, replicas: usize) -> World {
    let mut world = World::on_cluster(kafka, replicas);
    world.start();
    world
}

fn cluster(world: &mut World) -> &mut Cluster {
    world.redis.cluster()
}

/// Sends and reads for that long.
fn play(world: &mut World, seed: u64, length: Duration) {
    let begun = Clock::mono_now();
    let mut sent = 0;
    while Clock::mono_now().since(begun) < length {
        world.send(&traffic(
            seed * 100 + sent,
            300,
            seed * 100_000 + sent * 1_000 + 1,
        ));
        world.read_some();
        sent += 1;
    }
}

/// The slot of a bucket, with the slice of these worlds.
fn slot(world: &mut World, shard: u32, bucket: u32) -> u16 {
    let key = world.redis.key(shard, bucket, "pos");
    cluster(world).slot_of(key.as_bytes()).unwrap()
}

fn the_whole_way(kafka: Kafka) {
    let mut world = world(kafka, 0);
    world.send(&traffic(50, 5_000, 1));
    world.await_all();
    world.settle_exact();
    world.assert_schema();
    assert!(world.came.iter().all(|&came| came > 0), "{:?}", world.came);
    // Every node had its part.
    for node in 0..MASTERS {
        let keys: Vec<String> = redis::cmd("KEYS")
            .arg("span-buf:{3-*}:sum")
            .query(&mut cluster(&mut world).connection(node).unwrap())
            .unwrap();
        assert!(!keys.is_empty(), "node {node}");
    }
}

#[test]
fn spans_come_out_as_segments_on_a_cluster() {
    the_whole_way(Kafka::mock(SHARDS).unwrap());
}

#[test]
fn spans_come_out_as_segments_on_a_cluster_and_a_real_kafka() {
    the_whole_way(Kafka::real(SHARDS).unwrap());
}

#[test]
fn a_node_that_stands_still_for_five_seconds_loses_and_doubles_nothing() {
    let mut world = world(Kafka::mock(SHARDS).unwrap(), 0);
    play(&mut world, 51, Duration::from_secs(3));
    cluster(&mut world).node_mut(1).pause().unwrap();
    play(&mut world, 52, AWAY);
    cluster(&mut world).node_mut(1).resume().unwrap();
    play(&mut world, 53, Duration::from_secs(3));
    world.await_all();
    cluster(&mut world).await_ok().unwrap();
    world.settle_exact();
}

#[test]
fn a_node_that_is_killed_and_comes_back_with_its_data_loses_and_doubles_nothing() {
    let mut world = world(Kafka::mock(SHARDS).unwrap(), 0);
    play(&mut world, 54, Duration::from_secs(3));
    cluster(&mut world).node_mut(2).stop().unwrap();
    play(&mut world, 55, AWAY);
    cluster(&mut world).node_mut(2).start_again().unwrap();
    play(&mut world, 56, Duration::from_secs(2));
    // And at once: nobody notices but those who were speaking to it.
    cluster(&mut world).node_mut(0).stop().unwrap();
    cluster(&mut world).node_mut(0).start_again().unwrap();
    play(&mut world, 57, Duration::from_secs(2));
    world.await_all();
    cluster(&mut world).await_ok().unwrap();
    world.settle_exact();
}

#[test]
fn a_node_that_comes_back_empty_loses_nothing() {
    let mut world = world(Kafka::mock(SHARDS).unwrap(), 0);
    play(&mut world, 58, Duration::from_secs(3));
    cluster(&mut world).node_mut(1).restart_empty().unwrap();
    play(&mut world, 59, Duration::from_secs(3));
    world.await_all();
    // What had been produced before is read again: repeats, and nothing missing.
    world.settle_with_losses();
}

#[test]
fn slots_that_move_under_traffic_lose_and_double_nothing() {
    let mut world = world(Kafka::mock(SHARDS).unwrap(), 0);
    play(&mut world, 60, Duration::from_secs(2));
    for (shard, bucket) in [(0, 0), (1, 2), (3, 3)] {
        let slot = slot(&mut world, shard, bucket);
        let to = (cluster(&mut world).owner(slot).unwrap() + 1) % MASTERS;
        let migration = cluster(&mut world).begin_migration(slot, to).unwrap();
        // Half of it is there and half is not, for some batches.
        play(&mut world, 61 + u64::from(shard), Duration::from_secs(1));
        cluster(&mut world).move_keys(migration, 5).unwrap();
        play(&mut world, 71 + u64::from(shard), Duration::from_secs(2));
        cluster(&mut world).end_migration(migration).unwrap();
    }
    play(&mut world, 81, Duration::from_secs(2));
    world.await_all();
    world.settle_exact();
}

#[test]
fn a_planned_fail_over_loses_and_doubles_nothing() {
    let mut world = world(Kafka::mock(SHARDS).unwrap(), 1);
    play(&mut world, 82, Duration::from_secs(2));
    cluster(&mut world).fail_over(1 + MASTERS).unwrap();
    play(&mut world, 83, Duration::from_secs(3));
    world.await_all();
    world.settle_exact();
}

#[test]
fn a_node_that_went_back_loses_nothing() {
    let mut world = world(Kafka::mock(SHARDS).unwrap(), 0);
    play(&mut world, 84, Duration::from_secs(3));
    cluster(&mut world).node(1).save().unwrap();
    // What its buckets get now is gone in a moment; those of the others is not, and is taken from nobody twice.
    play(&mut world, 85, Duration::from_secs(3));
    cluster(&mut world).node_mut(1).restart_as_saved().unwrap();
    play(&mut world, 86, Duration::from_secs(3));
    world.await_all();
    world.settle_with_losses();
    world.assert_store_is_even();
    let word = "its node went back, or there is a second writer";
    assert!(world.said.contains(word), "{}", world.said);
}

#[test]
fn a_cluster_that_is_worked_on_all_the_time_loses_and_doubles_nothing() {
    let mut world = world(Kafka::mock(SHARDS).unwrap(), 1);
    play(&mut world, 87, Duration::from_secs(2));
    cluster(&mut world).node_mut(0).pause().unwrap();
    play(&mut world, 88, AWAY);
    cluster(&mut world).node_mut(0).resume().unwrap();
    cluster(&mut world).await_ok().unwrap();
    play(&mut world, 89, Duration::from_secs(2));
    cluster(&mut world).node_mut(2).stop().unwrap();
    cluster(&mut world).node_mut(2).start_again().unwrap();
    play(&mut world, 90, Duration::from_secs(2));
    cluster(&mut world).await_ok().unwrap();
    let slot = slot(&mut world, 2, 1);
    let to = (cluster(&mut world).owner(slot).unwrap() + 1) % MASTERS;
    let migration = cluster(&mut world).begin_migration(slot, to).unwrap();
    play(&mut world, 91, Duration::from_secs(1));
    cluster(&mut world).move_keys(migration, 5).unwrap();
    play(&mut world, 92, Duration::from_secs(2));
    cluster(&mut world).end_migration(migration).unwrap();
    play(&mut world, 93, Duration::from_secs(1));
    cluster(&mut world).fail_over(1 + MASTERS).unwrap();
    play(&mut world, 94, Duration::from_secs(3));
    world.await_all();
    cluster(&mut world).await_ok().unwrap();
    world.settle_exact();
}
