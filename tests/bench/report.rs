//! Makes docs/performance.md, its plot and README's table of what the parts measured.
//!
//! In:     target/bench/*.tsv; the date.
//! Out:    tables between two marks of docs/performance.md and of README.md, what stands around them stays; docs/performance.svg.
//! Keeps:  a ratio is taken within each round, and the median of the rounds is told; a target that was not measured is not met.
//! Source: docs/store.md 7.

use std::{collections::BTreeMap, fmt::Write as _, fs};

use crate::{
    SIZES, WAYS,
    lateness::{AT_ITS_SPEED, MEANWHILE},
    machine::{CAUGHT_UP, SLOW},
    plot,
    whole::{NODES, WORKERS},
};

const BEGIN: &str = "<!-- measured: scripts/bench.sh writes what follows -->";
const END: &str = "<!-- end of what scripts/bench.sh writes -->";
/// The default of `redis.compression`.
const DEFAULT_CODEC: &str = "lz4";

/// Columns of a line behind its key.
#[derive(Debug, Clone, Copy)]
enum Figure {
    SpansASecond,
    ClientUs,
    RedisUs,
    Bytes,
}

use Figure::{Bytes, ClientUs, RedisUs, SpansASecond};

/// `(way, size, codec, phase)`; of the whole way, the nodes of Redis stand in place of the way, and the workers in place of the size.
type Key = (String, String, String, String);

/// The rounds of each key.
pub(crate) struct Measured(BTreeMap<Key, Vec<[f64; 4]>>);

impl Measured {
    fn read(part: &str) -> Self {
        let text = fs::read_to_string(format!("target/bench/{part}.tsv")).unwrap_or_default();
        let mut rows: BTreeMap<Key, Vec<[f64; 4]>> = BTreeMap::new();
        for line in text.lines() {
            let fields: Vec<&str> = line.split('\t').collect();
            let [_, way, size, codec, phase, figures @ ..] = &fields[..] else {
                continue;
            };
            let key = [way, size, codec, phase].map(|part| (*part).to_owned());
            let [way, size, codec, phase] = key;
            let figures: Vec<f64> = figures
                .iter()
                .map(|figure| figure.parse().unwrap())
                .collect();
            rows.entry((way, size, codec, phase))
                .or_default()
                .push(figures.try_into().unwrap());
        }
        Self(rows)
    }

    fn rounds(&self, way: &str, size: usize, codec: &str, phase: &str) -> &[[f64; 4]] {
        let key = [way, &size.to_string(), codec, phase].map(str::to_owned);
        let [way, size, codec, phase] = key;
        self.0
            .get(&(way, size, codec, phase))
            .map_or(&[], Vec::as_slice)
    }

    pub(crate) fn redis_us(&self, way: &str, size: usize) -> Option<f64> {
        self.median(way, size, DEFAULT_CODEC, "insert", RedisUs)
    }

    pub(crate) fn spans_a_second(&self, way: &str, size: usize) -> Option<f64> {
        self.median(way, size, DEFAULT_CODEC, "insert", SpansASecond)
    }

    fn median(
        &self,
        way: &str,
        size: usize,
        codec: &str,
        phase: &str,
        figure: Figure,
    ) -> Option<f64> {
        let rounds = self.rounds(way, size, codec, phase).iter();
        median(rounds.map(|round| round[figure as usize]).collect())
    }

    /// How many times `below` goes into `above`, round by round.
    fn ratio(
        &self,
        above: (&str, usize),
        below: (&str, usize),
        phase: &str,
        figure: Figure,
    ) -> Option<f64> {
        let above = self.rounds(above.0, above.1, DEFAULT_CODEC, phase);
        let below = self.rounds(below.0, below.1, DEFAULT_CODEC, phase);
        let rounds = above.iter().zip(below);
        median(
            rounds
                .map(|(above, below)| above[figure as usize] / below[figure as usize])
                .collect(),
        )
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

pub(crate) fn write(date: &str) {
    let store = Measured::read("store");
    let mut text = format!(
        "Measured {date} by `scripts/bench.sh`, on {}.\n\n",
        machine()
    );
    let lateness = Lateness::read();
    targets(&store, &lateness, &mut text);
    table(&store, &mut text);
    kafka(&mut text);
    latency(&lateness, &mut text);
    codecs(&mut text);
    put("docs/performance.md", &text);
    fs::write("docs/performance.svg", plot::draw(&store)).unwrap();
    put("README.md", &claim(&store, &lateness));
}

/// Writes between the marks of a document.
fn put(path: &str, text: &str) {
    let old = fs::read_to_string(path).unwrap();
    let (head, rest) = old.split_once(BEGIN).unwrap();
    let (_, tail) = rest.split_once(END).unwrap();
    fs::write(path, format!("{head}{BEGIN}\n\n{text}\n{END}{tail}")).unwrap();
}

/// What README says: the product against the original's way, and how late segments come.
fn claim(store: &Measured, lateness: &Lateness) -> String {
    let mut text = String::from(
        "| spans a segment | spans/s of insert | spans/s of flush | Redis time of insert | Redis memory |\n|---|---|---|---|---|\n",
    );
    for size in [5, 100, 10_000] {
        let ratio = |phase, figure| {
            let ratio = store.ratio(("product", size), ("original", size), phase, figure);
            ratio.map_or_else(
                || "–".into(),
                // What is a hundredth is not nothing.
                |ratio| match ratio < 0.01 {
                    true => format!("× {ratio:.3}"),
                    false => format!("× {ratio:.2}"),
                },
            )
        };
        let cells = [
            ratio("insert", SpansASecond),
            ratio("flush", SpansASecond),
            ratio("insert", RedisUs),
            ratio("insert", Bytes),
        ];
        writeln!(text, "| {} | {} |", grouped(size), cells.join(" | ")).unwrap();
    }
    text.push_str("\n| spans/s, half of what one worker of each role takes here when both are at work | lateness p50, ms | p99, ms |\n|---|---|---|\n");
    for (when, mark) in [
        (MEANWHILE, ""),
        (AT_ITS_SPEED, ", the machine at its speed"),
    ] {
        if let Some(line) = lateness.of("mock", when) {
            writeln!(
                text,
                "| {}{mark} | {} | {} |",
                line[RATE], line[P50], line[P99]
            )
            .unwrap();
        }
    }
    text
}

/// What `latency` found: a line for each Kafka and each part of its segments.
struct Lateness(Vec<Vec<String>>);

/// Places of a line.
const RATE: usize = 1;
const P50: usize = 6;
const P99: usize = 8;

impl Lateness {
    fn read() -> Self {
        let text = fs::read_to_string("target/bench/latency.tsv").unwrap_or_default();
        let cells = |line: &str| line.split('\t').map(str::to_owned).collect();
        Self(text.lines().map(cells).collect())
    }

    fn of(&self, kafka: &str, when: &str) -> Option<&[String]> {
        let is_it = |line: &&Vec<String>| line[0] == kafka && line[2] == when;
        self.0.iter().find(is_it).map(Vec::as_slice)
    }
}

/// Half of the spans a second that one worker of each role takes when both are at work: as long as their parts together.
pub(crate) fn half_of_capacity() -> u64 {
    let kafka = Measured::read("kafka");
    let seconds: f64 = ["insert", "flush"]
        .iter()
        .map(|phase| {
            let spans = kafka.median("1", 1, "lz4", phase, SpansASecond);
            1.0 / spans.expect("`kafka` before `latency`")
        })
        .sum();
    format!("{:.0}", 0.5 / seconds).parse().unwrap()
}

fn machine() -> String {
    let of = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = of("/proc/cpuinfo");
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("a processor without a name", |rest| {
            rest.trim_start_matches(['\t', ' ', ':'])
        });
    let cores = cpus
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    format!(
        "{cores} cores of {model}, Linux {}, everything on them at once",
        of("/proc/sys/kernel/osrelease").trim()
    )
}

/// Every figure of docs/store.md 7, and lateness.
fn targets(store: &Measured, lateness: &Lateness, text: &mut String) {
    text.push_str("| figure | wanted | measured | |\n|---|---|---|---|\n");
    let mut row = |what: String, wanted: f64, at_most: bool, measured: Option<f64>| {
        let met = match measured {
            None => "not measured",
            Some(measured) if (measured <= wanted) == at_most => "met",
            Some(_) => "**missed**",
        };
        let sign = if at_most { "≤" } else { "≥" };
        let measured = measured.map_or_else(|| "–".into(), |measured| format!("{measured:.2}"));
        writeln!(text, "| {what} | {sign} {wanted:.2} | {measured} | {met} |").unwrap();
    };
    for (size, wanted) in [(5, 2.0), (100, 1.5), (10_000, 1.5)] {
        row(
            format!(
                "Redis time of insert ÷ raw limit, {} spans a segment",
                grouped(size)
            ),
            wanted,
            true,
            store.ratio(("product", size), ("raw", size), "insert", RedisUs),
        );
    }
    for size in [100, 10_000, 100_000] {
        row(
            format!("Redis time of insert at {} spans ÷ at 5", grouped(size)),
            1.2,
            true,
            store.ratio(("product", size), ("product", 5), "insert", RedisUs),
        );
    }
    for phase in ["insert", "flush"] {
        for size in [5, 100, 10_000] {
            row(
                format!("spans/s of {phase} ÷ raw limit, {} spans", grouped(size)),
                1.0 / 1.5,
                false,
                store.ratio(("product", size), ("raw", size), phase, SpansASecond),
            );
        }
    }
    for size in [5, 100, 10_000] {
        let at = grouped(size);
        let pair = (("product", size), ("original", size));
        row(
            format!("Redis time of insert ÷ the original's way, {at} spans"),
            1.0 / 6.0,
            true,
            store.ratio(pair.0, pair.1, "insert", RedisUs),
        );
        for phase in ["insert", "flush"] {
            row(
                format!("spans/s of {phase} ÷ the original's way, {at} spans"),
                3.0,
                false,
                store.ratio(pair.0, pair.1, phase, SpansASecond),
            );
        }
        row(
            format!("Redis memory ÷ the original's way, {at} spans"),
            1.0 / 3.0,
            true,
            store.ratio(pair.0, pair.1, "insert", Bytes),
        );
    }
    for (when, mark) in [
        (MEANWHILE, ""),
        (AT_ITS_SPEED, ", the machine at its speed"),
    ] {
        let line = lateness.of("mock", when);
        row(
            format!("p99 of lateness at half of the capacity, ms{mark}"),
            100.0,
            true,
            line.and_then(|line| line[P99].parse().ok()),
        );
    }
    text.push('\n');
}

fn table(store: &Measured, text: &mut String) {
    for phase in ["insert", "flush"] {
        writeln!(
            text,
            "### {} without Kafka: raw limit · original's way · product\n\n| spans a segment | packed | spans/s, thousands | client µs a span | Redis µs a span | Redis bytes a span |\n|---|---|---|---|---|---|",
            if phase == "insert" { "Insert" } else { "Flush" }
        )
        .unwrap();
        for codec in ["none", "lz4", "zstd"] {
            for size in SIZES {
                let cell = |figure: Figure, scale: f64, places: usize| {
                    let cells = WAYS.map(|way| {
                        store.median(way, size, codec, phase, figure).map_or_else(
                            || "–".into(),
                            |value| format!("{:.places$}", value / scale),
                        )
                    });
                    cells.join(" · ")
                };
                if WAYS
                    .iter()
                    .all(|way| store.rounds(way, size, codec, phase).is_empty())
                {
                    continue;
                }
                let bytes = if phase == "insert" {
                    cell(Bytes, 1.0, 0)
                } else {
                    String::new()
                };
                writeln!(
                    text,
                    "| {} | {codec} | {} | {} | {} | {bytes} |",
                    grouped(size),
                    cell(SpansASecond, 1_000.0, 0),
                    cell(ClientUs, 1.0, 2),
                    cell(RedisUs, 1.0, 2),
                )
                .unwrap();
            }
        }
        text.push('\n');
    }
}

fn kafka(text: &mut String) {
    let measured = Measured::read("kafka");
    text.push_str("### The whole way, with Kafka\n\nReal supervisor and workers, segments of 10 spans, a mock Kafka and Redis on the same cores: one node, or a cluster of three with 4 buckets a shard; flush begins when insert is over.\n\n| nodes of Redis | workers of a role | | spans/s, thousands | worker µs a span | Redis µs a span |\n|---|---|---|---|---|---|\n");
    let rows = NODES
        .into_iter()
        .flat_map(|nodes| WORKERS.map(|workers| (nodes.to_string(), workers)))
        .flat_map(|(nodes, workers)| {
            ["insert", "flush"].map(|phase| (nodes.clone(), workers as usize, phase))
        });
    for (nodes, workers, phase) in rows {
        let of = |figure: Figure| measured.median(&nodes, workers, "lz4", phase, figure);
        if let (Some(spans), Some(client), Some(redis)) =
            (of(SpansASecond), of(ClientUs), of(RedisUs))
        {
            let role = if phase == "insert" { "ingest" } else { "flush" };
            writeln!(
                text,
                "| {nodes} | {workers} | {role} | {:.0} | {client:.2} | {redis:.2} |",
                spans / 1_000.0
            )
            .unwrap();
        }
    }
    text.push('\n');
}

fn latency(lateness: &Lateness, text: &mut String) {
    writeln!(
        text,
        "### Lateness\n\nFrom a segment's deadline (last arrival as stored, and its timeout) until a reader has its message from Kafka, one worker of each role, in milliseconds. *Clocks*: how far the shards' clocks are behind the wall clock meanwhile, which is part of it. *The machine at its speed*: without the segments for which it was slow at any moment from {} ms before their deadline until they came.\n\n| Kafka | spans/s sent | due | segments looked at | not seen | least | p50 | p90 | p99 | most | clocks p50 | clocks p99 |\n|---|---|---|---|---|---|---|---|---|---|---|---|",
        CAUGHT_UP.as_millis()
    )
    .unwrap();
    for line in &lateness.0 {
        writeln!(text, "| {} |", line.join(" | ")).unwrap();
    }
    writeln!(text, "\nHow much of the time the machine was slow: the same work took a thread over {SLOW} times its usual CPU time, in which it waits for nobody. In percent; first with nothing at work, then meanwhile.\n\n| Kafka | spans/s sent | nothing at work | meanwhile |\n|---|---|---|---|").unwrap();
    let machine = fs::read_to_string("target/bench/machine.tsv").unwrap_or_default();
    for line in machine.lines() {
        writeln!(text, "| {} |", line.replace('\t', " | ")).unwrap();
    }
    text.push('\n');
}

fn codecs(text: &mut String) {
    let measured = Measured::read("codecs");
    text.push_str("### Packing, on recorded spans\n\n| recording | packed | | spans/s, thousands | client µs a span | Redis µs a span | Redis bytes a span |\n|---|---|---|---|---|---|---|\n");
    for ((name, _, codec, phase), rounds) in &measured.0 {
        let of = |figure: Figure| {
            median(rounds.iter().map(|round| round[figure as usize]).collect()).unwrap()
        };
        let bytes = if phase == "insert" {
            format!("{:.0}", of(Bytes))
        } else {
            String::new()
        };
        writeln!(
            text,
            "| {name} | {codec} | {phase} | {:.0} | {:.2} | {:.2} | {bytes} |",
            of(SpansASecond) / 1_000.0,
            of(ClientUs),
            of(RedisUs)
        )
        .unwrap();
    }
    text.push('\n');
}

/// A number with commas.
pub(crate) fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
