//! Supervision with real workers: hangs, brokers that are away, intake that follows the flushers.

use std::time::Duration;

use nix::sys::signal::Signal;
use shared::time::Clock;
use stand::{eventually, kafka::Kafka, launch::Worker, pause};

use crate::world::{LONG, SHARDS, World, traffic};

/// The shortest budgets that the configuration lets through.
const SHORT: &str = "supervision.hang = \"3s\"\nsupervision.boot = \"6s\"\nredis.timeout = \"200ms\"\nintake.batch_time = \"500ms\"\n";
const HANG: Duration = Duration::from_secs(3);

fn world(more: &str) -> World {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.plan.settings = world.settings(&format!("{SHORT}{more}"));
    world
}

/// The line of a slot in the latest report.
fn shown(world: &mut World, slot: u32, wanted: &[&str]) -> String {
    let start = format!("worker slot={slot} ");
    eventually(LONG, &format!("slot {slot} with {wanted:?}"), || {
        world.supervisor().signal(Signal::SIGUSR1).unwrap();
        let log = world.log();
        let line = log.lines().rfind(|line| line.starts_with(&start))?;
        let all = wanted.iter().all(|part| line.contains(part));
        all.then(|| line.to_owned())
    })
}

fn await_all_healthy(world: &mut World) -> Vec<Worker> {
    let workers = world.workers();
    for slot in 0..u32::try_from(workers.len()).unwrap() {
        shown(world, slot, &["state=healthy"]);
    }
    workers
}

#[test]
fn a_worker_of_either_role_that_stands_still_is_replaced_and_loses_nothing() {
    let mut world = world("");
    world.start();
    world.send(&traffic(40, 1_000, 1));
    await_all_healthy(&mut world);
    for role in ["flush", "ingest"] {
        let worker = world.worker(role, 0);
        let begun = Clock::mono_now();
        worker.signal(Signal::SIGSTOP).unwrap();
        eventually(LONG, "its end", || (!worker.lives()).then_some(()));
        let took = Clock::mono_now().since(begun);
        assert!(
            took >= HANG - Duration::from_secs(1) && took < HANG + Duration::from_secs(2),
            "{role}: {took:?}"
        );
    }
    world.send(&traffic(41, 1_000, 100_000));
    world.await_all();
    shown(&mut world, 0, &["state=healthy", "deaths=hang_"]);
    shown(&mut world, 2, &["state=healthy", "deaths=hang_"]);
    let balance = world.settle();
    assert!(balance.is_even(), "{balance}");
    world.assert_store_is_even();
}

/// Fault 8 of docs/supervision.md 5.
#[test]
fn fault_08_a_broker_that_is_away_for_three_budgets_kills_nobody() {
    let mut world = world("");
    let kafka = |world: &World, up: bool| match &world.kafka {
        Kafka::Mock(mock) if up => mock.up().unwrap(),
        Kafka::Mock(mock) => mock.down().unwrap(),
        Kafka::Real(_) => unreachable!("the mock was asked for"),
    };
    // From the start on: nobody gets past its boot, and nobody is killed for it.
    kafka(&world, false);
    world.start();
    let workers = world.workers();
    for slot in 0..u32::try_from(workers.len()).unwrap() {
        shown(&mut world, slot, &["state=backpressured", "phase=boot"]);
    }
    pause(HANG * 3);
    assert_eq!(world.workers(), workers);
    kafka(&world, true);
    await_all_healthy(&mut world);
    world.send(&traffic(42, 1_000, 1));
    world.await_all();
    // And at work.
    kafka(&world, false);
    shown(&mut world, 2, &["state=backpressured"]);
    pause(HANG * 3);
    kafka(&world, true);
    world.send(&traffic(45, 1_000, 100_000));
    world.await_all();
    await_all_healthy(&mut world);
    assert_eq!(world.workers(), workers, "{}", world.log());
    assert!(!world.log().contains("cause="), "{}", world.log());
    world.settle_exact();
}

#[test]
fn a_redis_that_is_away_for_three_budgets_kills_nobody() {
    let mut world = world("");
    world.proxy.refuse();
    world.start();
    let workers = world.workers();
    for slot in 0..u32::try_from(workers.len()).unwrap() {
        shown(&mut world, slot, &["state=backpressured", "phase=boot"]);
    }
    pause(HANG * 3);
    world.proxy.release();
    await_all_healthy(&mut world);
    world.send(&traffic(43, 500, 1));
    world.await_all();
    assert_eq!(world.workers(), workers, "{}", world.log());
    world.settle_exact();
}

#[test]
fn a_flusher_that_is_down_closes_its_own_shards_and_no_others() {
    let mut world = world(
        "supervision.policy = \"isolate\"\nsupervision.max_restarts = 1\nintake.backpressure_seconds = 1\n",
    );
    world.start();
    await_all_healthy(&mut world);
    // What was never open is not closed.
    for shard in 0..SHARDS {
        eventually(LONG, "an open shard", || {
            world
                .log()
                .contains(&format!("intake is open shard={shard}"))
                .then_some(())
        });
    }
    // Shards 0 and 2 are those of the first of two flushers: it dies more often than it may.
    while !world.log().contains("failed for good slot=0 ") {
        if let Some(worker) = world
            .supervisor()
            .workers()
            .unwrap()
            .iter()
            .find(|worker| worker.role == "flush" && worker.index == 0)
        {
            worker.signal(Signal::SIGKILL).unwrap();
        }
        pause(Duration::from_millis(20));
    }
    for shard in [0, 2] {
        eventually(LONG, "a closed shard", || {
            world
                .log()
                .contains(&format!("intake is closed shard={shard}:"))
                .then_some(())
        });
    }
    for shard in [1, 3] {
        assert!(
            !world
                .log()
                .contains(&format!("intake is closed shard={shard}:"))
        );
    }
    // What comes in now waits in Kafka, or comes out by the other flusher.
    world.send(&traffic(44, 500, 1));
    world.read_some();
    world.supervisor().signal(Signal::SIGUSR2).unwrap();
    for shard in [0, 2] {
        eventually(LONG, "an open shard", || {
            let log = world.log();
            let opened = format!("intake is open shard={shard}");
            (log.matches(&opened).count() >= 2).then_some(())
        });
    }
    world.await_all();
    world.settle_exact();
}
