//! How late segments come: the whole way at a rate, real supervisor and workers, one of each role.
//!
//! In:     spans a second, for how long, a mock Kafka or a real broker.
//! Out:    the time from a segment's deadline until a reader has its message, and how far the shards' clocks are behind meanwhile.
//! Keeps:  a deadline is read in Redis, as it was stored; what does not come is counted.
//! Source: docs/store.md 7; docs/spec.md 2.6, 5.

use std::{
    collections::{HashMap, VecDeque},
    thread::JoinHandle,
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, bounded};
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
    topics::{Producer, Reader, Record},
};
use store::entry::EntryHeader;

use crate::{
    Results,
    machine::{Lookout, Pauses},
    whole::{CODEC, PATIENCE, SEGMENT, SHARDS, segment, settings},
};

const ROOT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the machine is looked at before anything is at work.
const IDLE: Duration = Duration::from_secs(10);
/// Every so many segments are looked at in Redis.
const SAMPLE: u64 = 20;
/// When a segment is looked at: well behind its insert, well before its deadline.
const LOOK_AFTER: Duration = Duration::from_secs(1);
/// A mock answers an empty fetch after the time that it may wait and not before, whatever came meanwhile; a real broker at once.
const MOCK_ALONE: &str = "kafka.consumer = { \"fetch.wait.max.ms\" = \"10\" }\n";
/// Segments that are sent again and again, each time as another trace: to render a span costs more than to insert it. They do not fit
/// into the window of a compressor together.
const PATTERN_SEGMENTS: u64 = 1_000;

/// What was due while spans came.
pub(crate) const MEANWHILE: &str = "while spans come";
/// The part of it that met no pause of the machine.
pub(crate) const AT_ITS_SPEED: &str = "the same, the machine at its speed";

/// Those that are due while spans come, and those that are due afterwards.
pub(crate) fn latency(rate: u64, seconds: u64, real: bool) {
    let lookout = Lookout::start();
    pause(IDLE);
    let idle = lookout.stop();
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
    let board = await_clocks(&mut supervisor);
    let reading = Reading::start(kafka.brokers());
    let lookout = Lookout::start();
    let mut traffic = Traffic {
        producer: Producer::packing(&kafka.brokers(), CODEC).unwrap(),
        redis: redis.connection().unwrap(),
        patterns: patterns(),
        count: 0,
        asked: VecDeque::new(),
        deadlines: HashMap::new(),
        last_sent: UnixMillis::default(),
    };
    let (begun, mut behind) = (Clock::mono_now(), Vec::new());
    loop {
        let elapsed = Clock::mono_now().since(begun);
        let sending = elapsed < Duration::from_secs(seconds);
        if sending {
            let millis = u64::try_from(elapsed.as_millis()).unwrap();
            traffic.send_to(millis * rate / 1_000 / SEGMENT as u64);
            let (mono, wall) = (Clock::mono_now(), Clock::wall_now());
            let clocks = (0..SHARDS).filter_map(|shard| board.clock(ShardId(shard)));
            behind.extend(clocks.map(|clock| (wall, signed(wall) - signed(clock.read(mono)))));
        } else if traffic.asked.is_empty() {
            break;
        }
        traffic.look();
        pause(Duration::from_millis(2));
    }
    pause(ROOT_TIMEOUT + Duration::from_secs(2));
    let (came, pauses) = (reading.stop(), lookout.stop());
    let broker = if real { "a real broker" } else { "mock" };
    let run = format!("{broker}\t{rate}");
    tell(&run, &traffic, &came, &behind, &pauses);
    let (idle, meanwhile) = (idle.percent(), pauses.percent());
    let line = format!("{run}\t{idle:.1}\t{meanwhile:.1}");
    println!("the machine was slow, in percent of the time, before and meanwhile: {line}");
    Results::open("machine").line(&line);
    supervisor.signal(Signal::SIGTERM).unwrap();
    supervisor.wait_exit(PATIENCE).unwrap();
}

/// Waits until both roles are at work, so that every clock runs: a start is not what is measured.
fn await_clocks(supervisor: &mut Supervisor) -> Board {
    supervisor.await_workers("flush", 1, PATIENCE).unwrap();
    supervisor.await_workers("ingest", 1, PATIENCE).unwrap();
    let mine = format!("spanbuf-{}-", supervisor.pid());
    let name = boards().into_iter().find(|name| name.starts_with(&mine));
    let board = Board::open_read(&name.unwrap()).unwrap();
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
    board
}

/// A reader on a thread of its own: when each trace came.
struct Reading {
    stop: Sender<()>,
    thread: JoinHandle<HashMap<String, UnixMillis>>,
}

impl Reading {
    fn start(brokers: String) -> Self {
        let (stop, stopped) = bounded(1);
        let thread = std::thread::spawn(move || read(&brokers, &stopped));
        Self { stop, thread }
    }

    fn stop(self) -> HashMap<String, UnixMillis> {
        self.stop.send(()).unwrap();
        self.thread.join().unwrap()
    }
}

fn read(brokers: &str, stopped: &Receiver<()>) -> HashMap<String, UnixMillis> {
    let mut reader = Reader::new(brokers, OUTPUT).unwrap();
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
}

/// A message, and where in it the trace stands.
struct Pattern {
    payload: Vec<u8>,
    place: usize,
}

impl Pattern {
    fn of(&mut self, trace: &str) -> &[u8] {
        self.payload[self.place..self.place + trace.len()].copy_from_slice(trace.as_bytes());
        &self.payload
    }
}

/// The messages of each segment.
fn patterns() -> Vec<Vec<Pattern>> {
    let (mut rng, mut serial, now) = (Rng::new(5), 0, Clock::wall_now());
    let pattern = |payload: Vec<u8>| Pattern {
        place: trace_place(&payload),
        payload,
    };
    (0..PATTERN_SEGMENTS)
        .map(|_| {
            let (_, messages) = segment(&mut rng, &mut serial, now);
            messages.into_iter().map(pattern).collect()
        })
        .collect()
}

/// What is sent, and the deadlines of some of it.
struct Traffic {
    producer: Producer,
    redis: Connection,
    patterns: Vec<Vec<Pattern>>,
    count: u64,
    /// Sent when, to which shard, in which trace.
    asked: VecDeque<(UnixMillis, u64, String)>,
    deadlines: HashMap<String, UnixMillis>,
    last_sent: UnixMillis,
}

impl Traffic {
    /// Sends segments until there were so many in all.
    fn send_to(&mut self, wanted: u64) {
        while self.count < wanted {
            let now = Clock::wall_now();
            let shard = self.count % u64::from(SHARDS);
            let trace = format!("{:032x}", self.count);
            let place = usize::try_from(self.count % PATTERN_SEGMENTS).unwrap();
            for pattern in &mut self.patterns[place] {
                let record = Record {
                    partition: i32::try_from(shard).unwrap(),
                    time: Some(now),
                    payload: Some(pattern.of(&trace)),
                    ..Record::default()
                };
                self.producer.send(INPUT, &record).unwrap();
            }
            if self.count.is_multiple_of(SAMPLE) {
                self.asked.push_back((now, shard, trace));
            }
            (self.count, self.last_sent) = (self.count + 1, now);
        }
    }

    /// Reads the deadlines of the segments whose time it is, all at once.
    fn look(&mut self) {
        let now = Clock::wall_now();
        let is_time = |(sent, ..): &(UnixMillis, u64, String)| sent.after(LOOK_AFTER) <= now;
        let due = self.asked.partition_point(is_time);
        if due == 0 {
            return;
        }
        let mut pipeline = redis::pipe();
        for (_, shard, trace) in self.asked.range(..due) {
            pipeline
                .cmd("HKEYS")
                .arg(format!("span-buf:{{{shard}.0}}:t:1:{trace}"));
        }
        let journals: Vec<Vec<Vec<u8>>> = pipeline.query(&mut self.redis).unwrap();
        for ((_, _, trace), fields) in self.asked.drain(..due).zip(journals) {
            let arrival = fields
                .iter()
                .filter_map(|field| Some(EntryHeader::decode(field).ok()?.arrival))
                .max();
            if let Some(arrival) = arrival {
                self.deadlines.insert(trace, arrival.after(ROOT_TIMEOUT));
            }
        }
    }
}

/// Three lines: what was due while spans came, that of it which met no pause of the machine, and what was due after the last one.
fn tell(
    run: &str,
    traffic: &Traffic,
    came: &HashMap<String, UnixMillis>,
    behind: &[(UnixMillis, i64)],
    pauses: &Pauses,
) {
    let mut results = Results::open("latency");
    println!(
        "broker\trate\twhen\tsegments\tmissing\tmin\tp50\tp90\tp99\tmax\tclock p50\tclock p99"
    );
    let (mut meanwhile, mut undisturbed, mut afterwards) = (
        Lateness::default(),
        Lateness::default(),
        Lateness::default(),
    );
    for (trace, &deadline) in &traffic.deadlines {
        let came = came.get(trace).copied();
        if deadline > traffic.last_sent {
            afterwards.add(deadline, came);
            continue;
        }
        meanwhile.add(deadline, came);
        if !pauses.touch(deadline, came.unwrap_or(deadline)) {
            undisturbed.add(deadline, came);
        }
    }
    for &(at, behind) in behind {
        meanwhile.clocks.push(behind);
        if !pauses.touch(at, at) {
            undisturbed.clocks.push(behind);
        }
    }
    let all = [
        (MEANWHILE, meanwhile),
        (AT_ITS_SPEED, undisturbed),
        ("after the last span", afterwards),
    ];
    for (when, lines) in all {
        let line = format!("{run}\t{when}\t{}", lines.tell());
        println!("{line}");
        results.line(&line);
    }
}

/// How late segments of one kind came, and clocks were behind, in milliseconds.
#[derive(Default)]
struct Lateness {
    late: Vec<i64>,
    missing: u64,
    clocks: Vec<i64>,
}

impl Lateness {
    fn add(&mut self, deadline: UnixMillis, came: Option<UnixMillis>) {
        match came {
            Some(came) => self.late.push(signed(came) - signed(deadline)),
            None => self.missing += 1,
        }
    }

    fn tell(self) -> String {
        let (late, clocks) = (Spread::of(self.late), Spread::of(self.clocks));
        let clocks = match clocks.0.is_empty() {
            true => "\t".into(),
            false => format!("{}\t{}", clocks.at(500), clocks.at(990)),
        };
        format!(
            "{}\t{}\t{}\t{}\t{}\t{}\t{}\t{clocks}",
            late.0.len(),
            self.missing,
            late.at(0),
            late.at(500),
            late.at(900),
            late.at(990),
            late.most()
        )
    }
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
    let place = trace_place(payload);
    String::from_utf8_lossy(payload.get(place..place + 32).unwrap_or_default()).into_owned()
}

/// Where the trace of the first span of a message stands.
fn trace_place(payload: &[u8]) -> usize {
    const KEY: &[u8] = b"\"trace_id\":\"";
    let place = payload.windows(KEY.len()).position(|window| window == KEY);
    place.unwrap() + KEY.len()
}
