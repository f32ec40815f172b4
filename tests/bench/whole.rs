//! The whole way: real supervisor and workers, a mock Kafka in this process, a private Redis.
//!
//! Out:    `kafka`: spans a second of ingest and of flush, each with the other idle, with 1, 2 and 4 workers of each role.
//!         `latency`: how long after its deadline a segment is in Kafka, at a rate.
//! Keeps:  what is read of Redis and of the workers is counted by them, not estimated here.
//! Source: docs/store.md 7; docs/spec.md 4, 5.

use std::{
    collections::{HashMap, VecDeque},
    fs,
    time::Duration,
};

use nix::sys::signal::Signal;
use redis::Connection;
use shared::{
    board::{Board, boards},
    shard::ShardId,
    time::{Clock, UnixMillis},
};
use stand::{
    kafka::{INPUT, Kafka, OUTPUT},
    launch::{Supervisor, SupervisorPlan},
    pause,
    redis::Redis,
    rng::Rng,
    span::{Span, render},
    topics::{Producer, Reader, Record},
};
use store::entry::EntryHeader;

use crate::{
    Results,
    meter::{Cost, info},
};

const SHARDS: u32 = 8;
/// What the mock keeps: 5 MB of batches a partition, compressed.
const SPANS: usize = 80_000;
/// Spans of a segment.
const SEGMENT: usize = 10;
/// Long enough to insert everything before anything is due.
const TIMEOUT: Duration = Duration::from_secs(15);
const PATIENCE: Duration = Duration::from_secs(60);

/// One root with its children, child first.
fn segment(rng: &mut Rng, serial: &mut u64, now: UnixMillis) -> (String, Vec<Vec<u8>>) {
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

fn settings(timeout: Duration) -> String {
    format!(
        "buffer.timeout = \"{0}s\"\nbuffer.root_timeout = \"{0}s\"\nkafka.producer = {{ \"compression.type\" = \"zstd\" }}\nredis.timeout = \"4s\"\n",
        timeout.as_secs()
    )
}

/// A mock answers an empty fetch after the time that it may wait and not before, whatever came meanwhile; a real broker at once.
const MOCK_ALONE: &str = "kafka.consumer = { \"fetch.wait.max.ms\" = \"20\" }\n";

/// A sum over all shards of one field of a hash.
fn total(redis: &mut Connection, key: &str, field: &str) -> u64 {
    let mut pipe = redis::pipe();
    for shard in 0..SHARDS {
        pipe.cmd("HGET")
            .arg(format!("span-buf:{{{shard}.0}}:{key}"))
            .arg(field);
    }
    let values: Vec<Option<u64>> = pipe.query(redis).unwrap();
    values.into_iter().flatten().sum()
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

/// Insert, then flush, of what stands in the topic.
pub(crate) fn kafka(rounds: usize) {
    let mut results = Results::open("kafka");
    for round in 1..=rounds {
        for workers in [1, 2, 4] {
            let [insert, flush] = run(workers);
            for (phase, cost) in [("insert", insert), ("flush", flush)] {
                results.add(
                    &[
                        &round.to_string(),
                        "product",
                        &workers.to_string(),
                        "lz4",
                        phase,
                    ],
                    &cost,
                );
            }
        }
    }
}

fn run(workers: u32) -> [Cost; 2] {
    let redis = Redis::start().unwrap();
    let kafka = Kafka::mock(SHARDS).unwrap();
    let mut producer = Producer::new(&kafka.brokers()).unwrap();
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

    let mut plan = SupervisorPlan::new(SHARDS, &kafka.brokers(), &redis.address());
    (plan.max_workers, plan.ingest_workers) = (workers, workers);
    plan.settings = settings(TIMEOUT);
    let mut supervisor = Supervisor::start(plan).unwrap();
    let mut connection = redis.connection().unwrap();
    let insert = watch(&mut connection, &supervisor, "ingest", "pos", "spans");
    let flush = watch(&mut connection, &supervisor, "flush", "sum", "produced");
    supervisor.signal(Signal::SIGTERM).unwrap();
    supervisor.wait_exit(PATIENCE).unwrap();
    [insert, flush]
}

/// From the first change of a sum until it is whole.
fn watch(
    redis: &mut Connection,
    supervisor: &Supervisor,
    role: &str,
    key: &str,
    field: &str,
) -> Cost {
    let whole = SPANS as u64;
    let begun = Clock::mono_now();
    // What is counted when the watch begins is left out, with the time before it.
    let first = loop {
        let first = total(redis, key, field);
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
    let (from, cpu, (redis_us, bytes)) = (Clock::mono_now(), cpu_of(supervisor, role), info(redis));
    let mut last = first;
    while last < whole {
        pause(Duration::from_millis(5));
        last = total(redis, key, field);
        assert!(
            Clock::mono_now().since(begun) < PATIENCE * 2,
            "only {last} of {whole} came: {}",
            supervisor.log()
        );
    }
    let (to, cpu_after, (redis_after, bytes_after)) =
        (Clock::mono_now(), cpu_of(supervisor, role), info(redis));
    Cost {
        spans: (whole - first) as f64,
        seconds: to.since(from).as_secs_f64(),
        client_us: cpu_after - cpu,
        redis_us: redis_after - redis_us,
        bytes: bytes_after - bytes,
    }
}

/// How late segments come, at a rate of spans a second: those that are due while spans come, and those that are due afterwards.
/// Beside it how far the shards' clocks are behind the wall clock: nothing is flushed before its clock says so.
pub(crate) fn latency(rate: u64, seconds: u64, real: bool) {
    const ROOT_TIMEOUT: Duration = Duration::from_secs(2);
    /// Every so many segments are looked at in Redis.
    const SAMPLE: u64 = 10;
    let redis = Redis::start().unwrap();
    let kafka = if real {
        Kafka::real(SHARDS)
    } else {
        Kafka::mock(SHARDS)
    };
    let kafka = kafka.unwrap();
    let mut plan = SupervisorPlan::new(SHARDS, &kafka.brokers(), &redis.address());
    (plan.max_workers, plan.ingest_workers) = (1, 1);
    plan.settings = settings(ROOT_TIMEOUT);
    if !real {
        plan.settings.push_str(MOCK_ALONE);
    }
    let mut supervisor = Supervisor::start(plan).unwrap();
    supervisor.await_workers("flush", 1, PATIENCE).unwrap();
    supervisor.await_workers("ingest", 1, PATIENCE).unwrap();
    let mine = format!("spanbuf-{}-", supervisor.pid());
    let name = boards().into_iter().find(|name| name.starts_with(&mine));
    let board = Board::open_read(&name.unwrap()).unwrap();
    // Both roles are at work when every clock runs: a start is not what is measured.
    let started = Clock::mono_now();
    let runs = |shard| {
        let clock = board
            .clock(ShardId(shard))
            .map(|clock| clock.read(Clock::mono_now()));
        clock.is_some_and(|clock| Clock::wall_now().since(clock) < Duration::from_millis(100))
    };
    while !(0..SHARDS).all(runs) {
        assert!(
            Clock::mono_now().since(started) < PATIENCE,
            "no clock runs: {}",
            supervisor.log()
        );
        pause(Duration::from_millis(5));
    }

    let brokers = kafka.brokers();
    let (stop, stopped) = crossbeam_channel::bounded::<()>(1);
    let reader = std::thread::spawn(move || {
        let mut reader = Reader::new(&brokers, OUTPUT).unwrap();
        let mut came: HashMap<String, UnixMillis> = HashMap::new();
        while stopped.try_recv().is_err() {
            let before = reader.messages().len();
            drop(
                reader.read_until(Duration::from_millis(50), "", |messages| {
                    messages.len() > before
                }),
            );
            let now = Clock::wall_now();
            for message in reader.take() {
                came.entry(trace_of(message.payload.as_deref().unwrap_or_default()))
                    .or_insert(now);
            }
        }
        came
    });

    let mut producer = Producer::new(&kafka.brokers()).unwrap();
    let mut connection = redis.connection().unwrap();
    let (mut rng, mut serial, mut count) = (Rng::new(5), 0, 0_u64);
    let begun = Clock::mono_now();
    let mut asked: VecDeque<(u64, u64, String)> = VecDeque::new();
    let mut deadlines: HashMap<String, UnixMillis> = HashMap::new();
    let (mut behind, mut last_sent) = (Vec::new(), UnixMillis::default());
    loop {
        let elapsed = Clock::mono_now().since(begun);
        let sending = elapsed < Duration::from_secs(seconds);
        if !sending && asked.is_empty() {
            break;
        }
        let wanted = u64::try_from(elapsed.as_millis()).unwrap() * rate / 1_000 / SEGMENT as u64;
        while sending && count < wanted {
            let now = Clock::wall_now();
            let shard = count % u64::from(SHARDS);
            let (trace, messages) = segment(&mut rng, &mut serial, now);
            for payload in &messages {
                let record = Record {
                    partition: i32::try_from(shard).unwrap(),
                    time: Some(now),
                    payload: Some(payload),
                    ..Record::default()
                };
                producer.send(INPUT, &record).unwrap();
            }
            if count.is_multiple_of(SAMPLE) {
                asked.push_back((now.0, shard, trace));
            }
            (count, last_sent) = (count + 1, now);
        }
        // Well behind their insert, well before their deadline.
        while let Some((sent, shard, trace)) = asked.front() {
            if Clock::wall_now().0 < sent + 1_000 {
                break;
            }
            let fields: Vec<Vec<u8>> = redis::cmd("HKEYS")
                .arg(format!("span-buf:{{{shard}.0}}:t:1:{trace}"))
                .query(&mut connection)
                .unwrap();
            let arrival = fields
                .iter()
                .filter_map(|field| Some(EntryHeader::decode(field).ok()?.arrival))
                .max();
            if let Some(arrival) = arrival {
                deadlines.insert(trace.clone(), arrival.after(ROOT_TIMEOUT));
            }
            asked.pop_front();
        }
        if sending {
            let (mono, wall) = (Clock::mono_now(), Clock::wall_now());
            let clocks = (0..SHARDS).filter_map(|shard| board.clock(ShardId(shard)));
            behind.extend(clocks.map(|clock| signed(wall) - signed(clock.read(mono))));
        }
        pause(Duration::from_millis(2));
    }
    pause(ROOT_TIMEOUT + Duration::from_secs(2));
    stop.send(()).unwrap();
    let came = reader.join().unwrap();
    let behind = Spread::of(behind);
    let broker = if real { "a real broker" } else { "mock" };
    let mut results = Results::open("latency");
    println!(
        "broker\trate\twhen\tsegments\tmissing\tmin\tp50\tp90\tp99\tmax\tclock p50\tclock p99"
    );
    for (when, later) in [("while spans come", false), ("after the last span", true)] {
        let of_this = deadlines
            .iter()
            .filter(|(_, deadline)| (**deadline > last_sent) == later);
        let (mut late, mut missing) = (Vec::new(), 0);
        for (trace, deadline) in of_this {
            match came.get(trace) {
                Some(&came) => late.push(signed(came) - signed(*deadline)),
                None => missing += 1,
            }
        }
        let late = Spread::of(late);
        let clock = match later {
            false => format!("{}\t{}", behind.at(500), behind.at(990)),
            true => "\t".into(),
        };
        let line = format!(
            "{broker}\t{rate}\t{when}\t{}\t{missing}\t{}\t{}\t{}\t{}\t{}\t{clock}",
            late.0.len(),
            late.at(0),
            late.at(500),
            late.at(900),
            late.at(990),
            late.most()
        );
        println!("{line}");
        results.line(&line);
    }
    supervisor.signal(Signal::SIGTERM).unwrap();
    supervisor.wait_exit(PATIENCE).unwrap();
}

fn signed(time: UnixMillis) -> i64 {
    i64::try_from(time.0).unwrap()
}

/// Values in order.
struct Spread(Vec<i64>);

impl Spread {
    fn of(mut values: Vec<i64>) -> Self {
        values.sort_unstable();
        Self(values)
    }

    fn at(&self, permille: usize) -> i64 {
        let place = self.0.len() * permille / 1_000;
        self.0.get(place).copied().unwrap_or(0)
    }

    fn most(&self) -> i64 {
        self.0.last().copied().unwrap_or(0)
    }
}

/// The trace of the first span of a message.
fn trace_of(payload: &[u8]) -> String {
    const KEY: &[u8] = b"\"trace_id\":\"";
    let place = payload.windows(KEY.len()).position(|window| window == KEY);
    let start = place.map_or(0, |place| place + KEY.len());
    String::from_utf8_lossy(payload.get(start..start + 32).unwrap_or_default()).into_owned()
}
