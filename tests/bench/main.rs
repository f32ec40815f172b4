//! Measures what an insert and a flush cost: the raw limit, a model of the original's way, and the product, in one run.
//!
//! In:     `bench PART…`: `store`, `codecs FILE…`, `kafka`, `latency RATE SECONDS [real]`, `report DATE`; `commands SIZE [WAY…]` tells what Redis did.
//! Out:    target/bench/PART.tsv, one line a measurement; `report` makes docs/performance.md and docs/performance.svg of them.
//! Keeps:  ways take turns within every round, so that what else the machine does meets them alike; only ratios mean anything.
//! Source: docs/store.md 7.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a program for a person who watches it"
)]

use std::{fs, io::Write as _, path::PathBuf};

use shared::config::Compression;
use stand::redis::Redis;
use store::chunk::Codec;
use worker::ingest::group::{GroupLimits, Subsegment, group};

use crate::{
    input::{Envelope, Input},
    meter::{Cost, Meter},
    original::Original,
    product::Product,
    raw::Raw,
};

mod input;
mod lateness;
mod link;
mod machine;
mod meter;
mod nodes;
mod original;
mod plot;
mod product;
mod raw;
mod report;
mod whole;

/// As in a worker.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `flush.max_flush_segments`, in both systems.
const SEGMENTS_A_CYCLE: usize = 500;
/// `buffer.max_segment_bytes`, in both systems.
const SEGMENT_BYTES_MAX: u64 = 10 << 20;
const GROUP_LIMITS: GroupLimits = GroupLimits {
    spans_max: 1_000,
    bytes_max: 1 << 20,
};
const ROUNDS: usize = 5;
/// Spans of a measurement; one segment may have more.
const SPANS: usize = 50_000;
const SIZES: [usize; 5] = [1, 5, 100, 10_000, 100_000];

/// One way to keep spans until their segments are due.
trait Way {
    /// Begins anew, on an empty server. What a process keeps for as long as it runs, connections, threads and their memory, stays; but
    /// for the product's writer, whose store has another name now.
    fn begin(&mut self) {}
    /// Inserts a batch; what Redis has to do may still be under way.
    fn insert(&mut self, batch: Vec<Envelope>);
    /// Waits until all is in.
    fn end_insert(&mut self) {}
    fn flush(&mut self) -> Flushed;
}

/// What came out.
#[derive(Debug, Default)]
struct Flushed {
    spans: u64,
    bytes: usize,
}

impl Flushed {
    fn add(&mut self, spans: u64, payload: &[u8]) {
        self.spans += spans;
        self.bytes += std::hint::black_box(payload).len();
    }
}

/// The subsegments of a batch: each envelope is grouped alone.
fn groups(batch: Vec<Envelope>) -> Vec<Subsegment> {
    batch
        .into_iter()
        .flat_map(|envelope| group(envelope, &GROUP_LIMITS))
        .collect()
}

const WAYS: [&str; 3] = ["raw", "original", "product"];

fn way(name: &str, redis: &Redis, compression: Compression) -> Box<dyn Way> {
    match name {
        "raw" => Box::new(Raw::new(redis, Codec::from(compression))),
        "original" => Box::new(Original::new(redis, compression != Compression::None)),
        _ => Box::new(Product::new(redis, compression)),
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (part, rest) = arguments.split_first().expect("usage: scripts/bench.sh");
    fs::create_dir_all("target/bench").unwrap();
    match part.as_str() {
        "store" => store(rest),
        "codecs" => codecs(rest),
        "commands" => commands(rest[0].parse().unwrap(), &rest[1..]),
        "half" => println!("{}", report::half_of_capacity()),
        "kafka" => whole::kafka(
            rest.first()
                .map_or(ROUNDS, |rounds| rounds.parse().unwrap()),
        ),
        "latency" => lateness::latency(
            rest[0].parse().unwrap(),
            rest[1].parse().unwrap(),
            rest.get(2).is_some_and(|broker| broker == "real"),
        ),
        "report" => report::write(&rest.join(" ")),
        other => panic!("no part of the bench: {other}"),
    }
}

/// Lines of a part's results: replaced at the first, then grown.
struct Results(fs::File);

impl Results {
    fn open(part: &str) -> Self {
        let path = PathBuf::from(format!("target/bench/{part}.tsv"));
        let open = fs::File::options().create(true).append(true).open(path);
        Self(open.unwrap())
    }

    fn add(&mut self, key: &[&str], cost: &Cost) {
        let Cost {
            spans,
            seconds,
            client_us,
            redis_us,
            bytes,
        } = cost;
        let line = format!(
            "{}\t{:.0}\t{:.3}\t{:.3}\t{:.0}",
            key.join("\t"),
            spans / seconds,
            client_us / spans,
            redis_us / spans,
            bytes / spans
        );
        println!("{line}");
        self.line(&line);
    }

    fn line(&mut self, line: &str) {
        writeln!(self.0, "{line}").unwrap();
    }
}

fn name_of(compression: Compression) -> &'static str {
    match compression {
        Compression::None => "none",
        Compression::Lz4 => "lz4",
        Compression::Zstd => "zstd",
    }
}

/// Insert and flush without Kafka. `store SIZE CODEC…`: one size with the codecs named, all rounds.
fn store(rest: &[String]) {
    let redis = Redis::start().unwrap();
    let mut results = Results::open("store");
    let wanted: Vec<usize> = match rest.first() {
        Some(size) => vec![size.parse().unwrap()],
        None => SIZES.to_vec(),
    };
    for size in wanted {
        let input = Input::chains(size, SPANS);
        let batches = input.batches();
        for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
            let codec = name_of(compression);
            if rest.len() > 1 && !rest[1..].iter().any(|wanted| wanted == codec) {
                continue;
            }
            let mut ways = WAYS.map(|name| (name, way(name, &redis, compression)));
            // The first round warms caches and memory, and is thrown away.
            for round in 0..=ROUNDS {
                for (name, way) in &mut ways {
                    let costs = measure(name, way.as_mut(), &redis, &batches, input.spans());
                    if round > 0 {
                        for (phase, cost) in ["insert", "flush"].iter().zip(&costs) {
                            results.add(
                                &[&round.to_string(), *name, &size.to_string(), codec, phase],
                                cost,
                            );
                        }
                    }
                }
            }
        }
    }
}

/// One way, from an empty server to an empty server.
fn measure(
    name: &str,
    way: &mut dyn Way,
    redis: &Redis,
    batches: &[Vec<Envelope>],
    spans: usize,
) -> [Cost; 2] {
    redis.flush_all().unwrap();
    way.begin();
    let copies = batches.to_vec();
    let meter = Meter::start(redis);
    for batch in copies {
        way.insert(batch);
    }
    way.end_insert();
    let insert = meter.stop(spans);
    let meter = Meter::start(redis);
    let flushed = way.flush();
    let flush = meter.stop(spans);
    assert_eq!(
        flushed.spans, spans as u64,
        "{name}: every span comes out once"
    );
    [insert, flush]
}

/// What Redis spent its time on, command by command: its own measure, without reading and writing sockets.
fn commands(size: usize, ways: &[String]) {
    let redis = Redis::start().unwrap();
    let input = Input::chains(size, SPANS);
    let batches = input.batches();
    let mut connection = redis.connection().unwrap();
    let wanted = |name: &&str| ways.is_empty() || ways.iter().any(|way| way == name);
    for name in WAYS.into_iter().filter(wanted) {
        redis.flush_all().unwrap();
        let mut way = way(name, &redis, Compression::Lz4);
        way.begin();
        for phase in ["insert", "flush"] {
            redis::cmd("CONFIG")
                .arg("RESETSTAT")
                .exec(&mut connection)
                .unwrap();
            if phase == "insert" {
                batches.iter().for_each(|batch| way.insert(batch.clone()));
                way.end_insert();
            } else {
                way.flush();
            }
            let stats: String = redis::cmd("INFO")
                .arg("commandstats")
                .query(&mut connection)
                .unwrap();
            for line in stats
                .lines()
                .filter_map(|line| line.strip_prefix("cmdstat_"))
            {
                println!("{name}\t{phase}\t{line}");
            }
        }
    }
}

/// The product on recorded spans, with every codec.
fn codecs(files: &[String]) {
    let redis = Redis::start().unwrap();
    let mut results = Results::open("codecs");
    for file in files {
        let path = PathBuf::from(file);
        let input = Input::recorded(&path);
        let batches = input.batches();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        println!(
            "{name}: spans={} bytes={} a span",
            input.spans(),
            input.bytes() / input.spans()
        );
        let mut ways = [Compression::None, Compression::Lz4, Compression::Zstd]
            .map(|compression| (compression, way("product", &redis, compression)));
        for round in 0..=ROUNDS {
            for (compression, way) in &mut ways {
                let costs = measure("product", way.as_mut(), &redis, &batches, input.spans());
                if round > 0 {
                    for (phase, cost) in ["insert", "flush"].iter().zip(&costs) {
                        results.add(
                            &[&round.to_string(), &name, "-", name_of(*compression), phase],
                            cost,
                        );
                    }
                }
            }
        }
    }
}
