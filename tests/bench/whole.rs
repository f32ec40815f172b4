//! The whole way: real supervisor and workers, a mock Kafka in this process, a private Redis or a cluster of three.
//!
//! Out:    spans a second of ingest and of flush, each with the other idle, with 1, 2 and 4 workers of each role.
//! Keeps:  what is read of Redis and of the workers is counted by them, not estimated here.
//! Source: docs/store.md 7; docs/spec.md 4, 5.

use std::{fs, time::Duration};

use nix::sys::signal::Signal;
use shared::time::{Clock, UnixMillis};
use stand::{
    kafka::{INPUT, Kafka},
    launch::{Supervisor, SupervisorPlan},
    pause,
    rng::Rng,
    span::{Span, render},
    topics::{Producer, Record},
};

use crate::{
    Results,
    meter::Cost,
    nodes::{Nodes, Watch},
};

pub(crate) const SHARDS: u32 = 8;
/// How batches are compressed, both ways: what costs the least time.
pub(crate) const CODEC: &str = "lz4";
/// What the mock keeps: 5 MB of batches a partition, compressed.
const SPANS: usize = 80_000;
/// Spans of a segment.
pub(crate) const SEGMENT: usize = 10;
/// Nodes of Redis, and workers of each role.
pub(crate) const NODES: [usize; 2] = [1, 3];
pub(crate) const WORKERS: [u32; 3] = [1, 2, 4];
/// Long enough to insert everything before anything is due.
const TIMEOUT: Duration = Duration::from_secs(15);
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// One root with its children, child first.
pub(crate) fn segment(rng: &mut Rng, serial: &mut u64, now: UnixMillis) -> (String, Vec<Vec<u8>>) {
    let trace = format!("{:016x}{:016x}", rng.bits(), rng.bits());
    let root = format!("{:016x}", rng.bits());
    let mut messages = Vec::with_capacity(SEGMENT);
    for place in (0..SEGMENT).rev() {
        *serial += 1;
        let is_root = place == 0;
        let span = Span {
            organization: 1,
            project: 1,
            trace: trace.clone(),
            id: if is_root {
                root.clone()
            } else {
                format!("{:016x}", rng.bits())
            },
            parent: (!is_root).then(|| root.clone()),
            is_segment: is_root.then_some(true),
            service: *serial % 7,
            start: now.0 * 1_000,
            end: now.0 * 1_000 + 5_000,
            ..Span::default()
        };
        messages.push(render(&span, *serial, 1_000, rng));
    }
    (trace, messages)
}

pub(crate) fn settings(timeout: Duration) -> String {
    format!(
        "buffer.timeout = \"{0}s\"\nbuffer.root_timeout = \"{0}s\"\nkafka.producer = {{ \"compression.type\" = \"{CODEC}\" }}\nredis.timeout = \"4s\"\n",
        timeout.as_secs()
    )
}

/// CPU time of a role's workers, in microseconds.
fn cpu_of(supervisor: &Supervisor, role: &str) -> f64 {
    const TICK_US: f64 = 10_000.0;
    let workers = supervisor.workers().unwrap();
    let ticks = |pid: u32| -> f64 {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = text
            .rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .collect();
        fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()
    };
    workers
        .iter()
        .filter(|worker| worker.role == role)
        .map(|worker| ticks(worker.pid) * TICK_US)
        .sum()
}

/// Insert, then flush, of what stands in the topic; on one node and on three.
pub(crate) fn kafka(rounds: usize) {
    let mut results = Results::open("kafka");
    for round in 1..=rounds {
        for (nodes, workers) in NODES
            .into_iter()
            .flat_map(|nodes| WORKERS.map(|n| (nodes, n)))
        {
            let costs = run(nodes, workers);
            for (phase, cost) in ["insert", "flush"].iter().zip(&costs) {
                let key = [
                    &round.to_string(),
                    &nodes.to_string(),
                    &workers.to_string(),
                    "lz4",
                    *phase,
                ];
                results.add(&key, cost);
            }
        }
    }
}

fn run(nodes: usize, workers: u32) -> [Cost; 2] {
    let nodes = Nodes::start(nodes);
    let kafka = Kafka::mock(SHARDS).unwrap();
    let mut producer = Producer::packing(&kafka.brokers(), CODEC).unwrap();
    let (mut rng, mut serial) = (Rng::new(3), 0);
    let now = Clock::wall_now();
    let mut sent = 0;
    while sent < SPANS {
        let (_, messages) = segment(&mut rng, &mut serial, now);
        for payload in &messages {
            let record = Record {
                partition: i32::try_from((sent / SEGMENT) % SHARDS as usize).unwrap(),
                time: Some(Clock::wall_now()),
                payload: Some(payload),
                ..Record::default()
            };
            producer.send(INPUT, &record).unwrap();
        }
        sent += SEGMENT;
    }
    producer.flush(PATIENCE).unwrap();

    let mut plan = SupervisorPlan::new(SHARDS, &kafka.brokers(), &nodes.addresses());
    (plan.max_workers, plan.ingest_workers) = (workers, workers);
    plan.settings = settings(TIMEOUT) + &nodes.settings();
    let mut watch = nodes.watch(SHARDS);
    let mut supervisor = Supervisor::start(plan).unwrap();
    let insert = measure(&mut watch, &supervisor, "ingest", "pos", "spans");
    let flush = measure(&mut watch, &supervisor, "flush", "sum", "produced");
    supervisor.signal(Signal::SIGTERM).unwrap();
    supervisor.wait_exit(PATIENCE).unwrap();
    [insert, flush]
}

/// From the first change of a sum until it is whole.
fn measure(watch: &mut Watch, supervisor: &Supervisor, role: &str, key: &str, field: &str) -> Cost {
    let whole = SPANS as u64;
    let begun = Clock::mono_now();
    // What is counted when the watch begins is left out, with the time before it.
    let first = loop {
        let first = watch.total(key, field);
        if first > 0 {
            break first;
        }
        assert!(
            Clock::mono_now().since(begun) < PATIENCE,
            "nothing came: {}",
            supervisor.log()
        );
        pause(Duration::from_millis(2));
    };
    let (from, cpu, (redis_us, bytes)) =
        (Clock::mono_now(), cpu_of(supervisor, role), watch.info());
    let mut last = first;
    while last < whole {
        pause(Duration::from_millis(5));
        last = watch.total(key, field);
        assert!(
            Clock::mono_now().since(begun) < PATIENCE * 2,
            "only {last} of {whole} came: {}",
            supervisor.log()
        );
    }
    let (to, cpu_after, (redis_after, bytes_after)) =
        (Clock::mono_now(), cpu_of(supervisor, role), watch.info());
    Cost {
        spans: (whole - first) as f64,
        seconds: to.since(from).as_secs_f64(),
        client_us: cpu_after - cpu,
        redis_us: redis_after - redis_us,
        bytes: bytes_after - bytes,
    }
}
