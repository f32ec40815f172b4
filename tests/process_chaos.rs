//! Chaos under traffic: blow after blow, and nothing is lost or left.
//!
//! In:     a seed and a time: `scripts/chaos.sh`; a minute of it in the tests.
//! Out:    an even ledger; a line for each blow: when it was noticed, when all were at work again.
//! Source: docs/supervision.md 5; docs/house.md 13.

use std::time::Duration;

use nix::sys::signal::Signal;
use shared::time::{Clock, MonoNanos};
use stand::{eventually, kafka::Kafka, launch::Worker, pause, rng::Rng, step::ClockStep};

use crate::world::{LONG, SHARDS, World, traffic};

/// Budgets as short as the configuration lets through, that of a wait for Kafka too, and no end of restarts.
const SETTINGS: &str = "supervision.hang = \"3s\"\nsupervision.boot = \"6s\"\nsupervision.blocked = \"10s\"\nflush.delivery_timeout = \"8s\"\nredis.timeout = \"200ms\"\nintake.batch_time = \"500ms\"\n\
                        supervision.max_restarts = 100000\nsupervision.stable = \"1s\"\n";
/// Spans sent before each blow.
const SPANS: usize = 300;
/// The longest that an outage, or a pause that is no hang, lasts.
const OUTAGE_MILLIS: u64 = 2_000;

/// What may happen. A round has each of them once, in an order of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    Worker(Signal),
    /// Stopped for less than a hang takes, and continued.
    Pause,
    RedisCut,
    RedisRestart,
    KafkaDown,
    ClockStep,
    Supervisor,
}

const BLOWS: [Blow; 11] = [
    Blow::Worker(Signal::SIGKILL),
    Blow::Worker(Signal::SIGSEGV),
    Blow::Worker(Signal::SIGABRT),
    // It takes that for a stop, and ends with 0 that nobody asked it for.
    Blow::Worker(Signal::SIGTERM),
    Blow::Worker(Signal::SIGSTOP),
    Blow::Pause,
    Blow::RedisCut,
    Blow::RedisRestart,
    Blow::KafkaDown,
    Blow::ClockStep,
    Blow::Supervisor,
];

#[test]
fn chaos_loses_nothing_and_leaves_nothing() {
    let number =
        |name: &str, other: u64| std::env::var(name).map_or(other, |text| text.parse().unwrap());
    let seed = number("CHAOS_SEED", Clock::wall_now().0);
    let length = Duration::from_secs(number("CHAOS_SECONDS", 60));
    println!("seed={seed} seconds={}", length.as_secs());
    let mut rng = Rng::new(seed);
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    let step = ClockStep::new().unwrap();
    world.plan.settings = world.settings(SETTINGS);
    world.plan.environment = step.environment();
    world.start();
    await_all_at_work(&mut world);

    let begun = Clock::mono_now();
    let (mut serial, mut deck) = (1, Vec::new());
    let mut descriptors = descriptors_of(&mut world);
    while Clock::mono_now().since(begun) < length || !deck.is_empty() {
        if deck.is_empty() {
            deck = BLOWS.to_vec();
        }
        let blow = deck.swap_remove(pick(&mut rng, deck.len()));
        world.send(&traffic(seed.wrapping_add(serial), SPANS, serial));
        serial += u64::try_from(SPANS).unwrap();
        let workers = world.workers();
        let worker = workers[pick(&mut rng, workers.len())].clone();
        let outage = Duration::from_millis(rng.below(OUTAGE_MILLIS));
        let from = Clock::mono_now();
        let noticed = strike(&mut world, blow, &worker, outage, &step, &mut rng);
        await_all_at_work(&mut world);
        println!(
            "{:22} {} {} noticed={} working_again={:?}",
            format!("{blow:?}"),
            worker.role,
            worker.index,
            noticed.map_or_else(
                || "-".into(),
                |noticed| format!("{:?}", noticed.since(from))
            ),
            Clock::mono_now().since(from)
        );
        if blow == Blow::Supervisor {
            descriptors = descriptors_of(&mut world);
        }
        world.read_some();
    }
    step.set(0).unwrap();
    world.await_all();
    // A worker that was struck at the very end may have its successor still to come.
    eventually(
        LONG,
        &format!("no descriptors but those of the start: {descriptors:?}"),
        || {
            let now = descriptors_of(&mut world);
            if now == descriptors {
                return Some(());
            }
            println!("descriptors: {now:?}");
            None
        },
    );
    let balance = world.settle();
    println!("{balance}");
    world.assert_store_is_even();
}

/// Strikes; gives the moment when the supervisor had said a worker's end.
fn strike(
    world: &mut World,
    blow: Blow,
    worker: &Worker,
    outage: Duration,
    step: &ClockStep,
    rng: &mut Rng,
) -> Option<MonoNanos> {
    match blow {
        Blow::Worker(signal) => {
            let said = format!(" pid={} ", worker.pid);
            worker.signal(signal).unwrap();
            return Some(eventually(
                LONG,
                &format!("word of the end of {worker:?} by {signal}"),
                || {
                    if signal == Signal::SIGSEGV {
                        // The runtime takes the first for a fault that comes again, and waits for it.
                        worker.signal(signal).unwrap();
                    }
                    let log = world.log();
                    let mut lines = log.lines().rev();
                    let told = lines.any(|line| line.contains(&said) && line.contains(" cause="));
                    told.then(Clock::mono_now)
                },
            ));
        }
        Blow::Pause => {
            worker.signal(Signal::SIGSTOP).unwrap();
            pause(outage);
            worker.signal(Signal::SIGCONT).unwrap();
        }
        Blow::RedisCut => {
            world.proxy.refuse();
            world.proxy.cut();
            pause(outage);
            world.proxy.release();
        }
        Blow::RedisRestart => world.redis.restart_with_data(),
        Blow::KafkaDown => {
            let Kafka::Mock(mock) = &world.kafka else {
                unreachable!("the mock was asked for")
            };
            mock.down().unwrap();
            pause(outage);
            mock.up().unwrap();
        }
        Blow::ClockStep => {
            let hours = i64::try_from(rng.below(49)).unwrap() - 24;
            step.set(hours * 3_600).unwrap();
        }
        Blow::Supervisor => {
            world.kill_supervisor();
            world.start();
        }
    }
    None
}

/// Waits until a report that was asked for from now on shows all workers at work.
fn await_all_at_work(world: &mut World) {
    let wanted = world.workers().len();
    let summaries = |world: &World| -> Vec<String> {
        let log = world.log();
        let lines = log.lines().filter(|line| line.starts_with("summary "));
        lines.map(str::to_owned).collect()
    };
    let before = summaries(world).len();
    eventually(LONG, "all workers at work", || {
        world.supervisor().signal(Signal::SIGUSR1).unwrap();
        // The first may have been asked for before.
        let all = summaries(world);
        let summary = all.get(before + 1..)?.last()?;
        let count = |state: &str| -> usize {
            let word = format!(" {state}=");
            let found = summary.split_once(&word).map(|(_, rest)| rest);
            found
                .and_then(|rest| rest.split(' ').next()?.parse().ok())
                .unwrap_or(0)
        };
        (count("healthy") + count("backpressured") == wanted).then_some(())
    });
}

/// What the supervisor has open, by what it is.
fn descriptors_of(world: &mut World) -> Vec<String> {
    let pid = world.supervisor().pid();
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let mut names: Vec<String> = links
        .filter_map(|link| std::fs::read_link(link.unwrap().path()).ok())
        .map(|target| target.display().to_string())
        .collect();
    names.sort_unstable();
    names
}

fn pick(rng: &mut Rng, length: usize) -> usize {
    usize::try_from(rng.below(u64::try_from(length).unwrap())).unwrap()
}
