//! What the values of the keys mean.
//!
//! In:     text.
//! Out:    the sections; faults where a value is none, is out of its range, or contradicts another.
//! Keeps:  0 is refused where it is not said to mean *off*.
//! Knows:  units, ranges, contradictions; who the user is.
//! Source: docs/spec.md 10.1; docs/supervision.md 3.

use std::{collections::BTreeMap, ffi::OsString, path::PathBuf, str::FromStr, time::Duration};

use super::{
    Buffer, Compression, Flush, HangSignal, Intake, Kafka, Log, MessageKey, OffsetReset, Policy,
    Redis, Supervision,
    raw::{Raw, default_of},
};
use crate::shard::{SHARDS_MAX, ShardId, ShardList, SliceId};

/// Longer than any length of time that is meant: scores and TTLs stay exact.
const DURATION_MAX: Duration = Duration::from_secs(366 * 86_400);
/// The largest message that a producer of ours can send, less its framing.
const MESSAGE_BYTES_MAX: u64 = 255 << 20;
/// Buckets of a shard on a cluster, when nothing is said.
const CLUSTER_BUCKETS: u32 = 16;
/// More than any cluster has nodes: each costs a position for every shard and batch.
const BUCKETS_MAX: u32 = 1_024;
/// The largest size that is meant anywhere.
const BYTES_MAX: u64 = 1 << 40;

/// A worker sleeps no longer.
const SLEEP_MAX: Duration = Duration::from_secs(1);
/// A budget is at least so many of the longest legal gaps: a machine that is slow for a while kills nobody.
const GAPS: u32 = 3;
/// The longest wait for one answer of Kafka's.
const ANSWER: (&str, Duration, u32) = ("an answer of kafka", Duration::from_secs(2), GAPS);
/// A pipeline to Redis goes on for ten timeouts while replies come; a connection, a write and the last reply stand around it.
const RUN_TIMEOUTS: u32 = 13;
/// The default of `supervision.blocked`: the longer of this, and the delivery timeout and a minute.
const BLOCKED_LEAST: Duration = Duration::from_secs(300);
const BLOCKED_MORE: Duration = Duration::from_secs(60);

/// Properties of librdkafka that a key of ours, or the way in which Spanbuf works, sets.
const OURS: [(&str, &str); 20] = [
    ("bootstrap.servers", "kafka.brokers"),
    ("metadata.broker.list", "kafka.brokers"),
    ("group.id", "kafka.group"),
    ("message.timeout.ms", "flush.delivery_timeout"),
    ("delivery.timeout.ms", "flush.delivery_timeout"),
    (
        "message.max.bytes",
        "spanbuf: 256 MiB, and the topic's own limit",
    ),
    ("queued.max.messages.kbytes", "intake.batch_bytes"),
    ("auto.offset.reset", "kafka.offset_reset"),
    ("acks", "spanbuf: all"),
    ("request.required.acks", "spanbuf: all"),
    ("enable.idempotence", "spanbuf: true"),
    ("enable.auto.commit", "spanbuf: false"),
    ("auto.commit.enable", "spanbuf: false"),
    ("auto.commit.interval.ms", "spanbuf: it commits itself"),
    ("enable.auto.offset.store", "spanbuf: false"),
    ("enable.partition.eof", "spanbuf: true"),
    ("transactional.id", "spanbuf: none"),
    (
        "group.instance.id",
        "spanbuf: none, partitions are assigned by hand",
    ),
    (
        "partition.assignment.strategy",
        "spanbuf: none, partitions are assigned by hand",
    ),
    ("delivery.report.only.error", "spanbuf: false"),
];

pub(super) fn kafka(raw: &mut Raw) -> Kafka {
    Kafka {
        brokers: brokers(raw),
        group: filled(raw, "kafka.group"),
        start_group: optional(raw, "kafka.start_group"),
        offset_reset: one_of(
            raw,
            "kafka.offset_reset",
            &[
                ("earliest", OffsetReset::Earliest),
                ("latest", OffsetReset::Latest),
                ("none", OffsetReset::None),
            ],
        ),
        input_topic: topic(raw, "kafka.input_topic"),
        output_topics: output_topics(raw),
        input_dlq: optional_topic(raw, "kafka.input_dlq"),
        output_dlq: optional_topic(raw, "kafka.output_dlq"),
        key: one_of(
            raw,
            "kafka.key",
            &[("none", MessageKey::None), ("trace", MessageKey::Trace)],
        ),
        properties: properties(raw, "kafka.properties"),
        consumer: properties(raw, "kafka.consumer"),
        producer: properties(raw, "kafka.producer"),
    }
}

pub(super) fn redis(raw: &mut Raw) -> Redis {
    let nodes = raw.list("redis.nodes");
    let cluster = one_of(raw, "redis.cluster", &[("false", false), ("true", true)]);
    match &nodes[..] {
        [] => raw.fault("redis.nodes", "no node is given (write 127.0.0.1:6379)"),
        [_] => {}
        [_, ..] if cluster => {}
        _ => raw.fault(
            "redis.nodes",
            "several nodes are given, and redis.cluster is false (give one, or set redis.cluster = true)",
        ),
    }
    for node in &nodes {
        let address = node.strip_prefix("redis://").unwrap_or(node);
        if address.contains(['@', '/']) || !is_address(address) {
            // It may hold a password: it is not shown.
            raw.fault("redis.nodes", "a node is no host:port (write 127.0.0.1:6379; users and passwords are not supported yet)");
        }
    }
    Redis {
        nodes,
        cluster,
        timeout: duration(raw, "redis.timeout"),
        redis_ttl: duration(raw, "redis.redis_ttl"),
        buckets: match raw.text("redis.buckets").is_empty() {
            true if cluster => CLUSTER_BUCKETS,
            true => 1,
            false => number(raw, "redis.buckets", 1, BUCKETS_MAX),
        },
        slice: optional(raw, "redis.slice")
            .map(|_| SliceId(number(raw, "redis.slice", 0, u32::MAX))),
        compression: one_of(
            raw,
            "redis.compression",
            &[
                ("none", Compression::None),
                ("lz4", Compression::Lz4),
                ("zstd", Compression::Zstd),
            ],
        ),
    }
}

pub(super) fn buffer(raw: &mut Raw) -> Buffer {
    Buffer {
        timeout: duration(raw, "buffer.timeout"),
        root_timeout: duration(raw, "buffer.root_timeout"),
        max_segment_age: duration_or_off(raw, "buffer.max_segment_age"),
        max_spans_per_insert: number(raw, "buffer.max_spans_per_insert", 1, 1_000_000),
        max_insert_bytes: size(raw, "buffer.max_insert_bytes", MESSAGE_BYTES_MAX),
        max_trace_bytes: size(raw, "buffer.max_trace_bytes", BYTES_MAX),
        max_trace_entries: number(raw, "buffer.max_trace_entries", 1, 100_000_000),
        max_segment_bytes: size(raw, "buffer.max_segment_bytes", MESSAGE_BYTES_MAX),
    }
}

pub(super) fn flush(raw: &mut Raw) -> Flush {
    // Redis 6.2 takes a million arguments in one command.
    Flush {
        max_flush_segments: number(raw, "flush.max_flush_segments", 1, 100_000),
        max_flush_bytes: size(raw, "flush.max_flush_bytes", BYTES_MAX),
        delivery_timeout: duration_within(
            raw,
            "flush.delivery_timeout",
            Duration::from_millis(100),
            Duration::from_secs(86_400),
        ),
    }
}

pub(super) fn intake(raw: &mut Raw) -> Intake {
    Intake {
        batch_spans: number(raw, "intake.batch_spans", 1, 200_000),
        batch_bytes: size(raw, "intake.batch_bytes", 2 << 30),
        // A batch is one of the things between two signs of life.
        batch_time: duration_within(
            raw,
            "intake.batch_time",
            Duration::from_millis(1),
            Duration::from_secs(10),
        ),
        backpressure_seconds: Duration::from_secs(number(
            raw,
            "intake.backpressure_seconds",
            1,
            86_400,
        )),
    }
}

pub(super) fn supervision(raw: &mut Raw, environment: &[(OsString, OsString)]) -> Supervision {
    let shards = shards(raw);
    let workers_max = u32::try_from(SHARDS_MAX).unwrap_or(u32::MAX);
    let all = u32::try_from(shards.len()).unwrap_or(u32::MAX);
    Supervision {
        max_workers: if raw.text("supervision.max_workers").is_empty() {
            all
        } else {
            number(raw, "supervision.max_workers", 1, workers_max)
        },
        ingest_workers: number(raw, "supervision.ingest_workers", 1, workers_max),
        boot: duration(raw, "supervision.boot"),
        hang: duration(raw, "supervision.hang"),
        blocked: if raw.text("supervision.blocked").is_empty() {
            // What it is then follows from another section.
            Duration::ZERO
        } else {
            duration(raw, "supervision.blocked")
        },
        hang_signal: one_of(
            raw,
            "supervision.hang_signal",
            &[
                ("off", None),
                ("ABRT", Some(HangSignal::Abrt)),
                ("QUIT", Some(HangSignal::Quit)),
                ("SEGV", Some(HangSignal::Segv)),
                ("TRAP", Some(HangSignal::Trap)),
            ],
        ),
        policy: one_of(
            raw,
            "supervision.policy",
            &[("escalate", Policy::Escalate), ("isolate", Policy::Isolate)],
        ),
        stable: duration(raw, "supervision.stable"),
        dump: optional(raw, "supervision.dump").map(PathBuf::from),
        tick: duration_within(
            raw,
            "supervision.tick",
            Duration::from_millis(10),
            Duration::from_secs(10),
        ),
        reap_limit: duration(raw, "supervision.reap_limit"),
        drain: duration(raw, "supervision.drain"),
        max_restarts: number(raw, "supervision.max_restarts", 1, 1_000_000),
        worker: optional(raw, "supervision.worker").map(PathBuf::from),
        run_dir: run_dir(raw, environment),
        shards,
    }
}

pub(super) fn log(raw: &mut Raw) -> Log {
    use ::log::LevelFilter::{Debug, Error, Info, Off, Trace, Warn};
    let levels = [
        ("info", Info),
        ("off", Off),
        ("error", Error),
        ("warn", Warn),
        ("debug", Debug),
        ("trace", Trace),
    ];
    Log {
        level: one_of(raw, "log.level", &levels),
    }
}

/// The budgets of the phases against the longest time that a worker may legally show no progress in them.
pub(super) fn budgets(
    raw: &mut Raw,
    mut supervision: Supervision,
    redis: &Redis,
    flush: &Flush,
    intake: &Intake,
) -> Supervision {
    if supervision.blocked.is_zero() {
        supervision.blocked = BLOCKED_LEAST.max(flush.delivery_timeout + BLOCKED_MORE);
    }
    let gaps = [
        ("a sleep of", SLEEP_MAX, GAPS),
        ("redis.timeout", redis.timeout, GAPS),
        ("redis.timeout", redis.timeout, RUN_TIMEOUTS),
        ("intake.batch_time", intake.batch_time, GAPS),
    ];
    for (path, budget) in [
        ("supervision.boot", supervision.boot),
        ("supervision.hang", supervision.hang),
    ] {
        // At work, Kafka's answers are waited for in a phase of their own.
        let answer = (path == "supervision.boot").then_some(ANSWER);
        let longest = gaps
            .iter()
            .chain(&answer)
            .max_by_key(|(_, gap, times)| *gap * *times);
        if let Some((what, gap, times)) = longest.filter(|(_, gap, times)| budget < *gap * *times) {
            raw.fault(
                path,
                format!("{budget:?} is shorter than {times} times {what}={gap:?}: a worker that only waits would be killed (raise it)"),
            );
        }
    }
    if supervision.blocked <= flush.delivery_timeout {
        raw.fault(
            "supervision.blocked",
            format!(
                "{:?} is not longer than flush.delivery_timeout={:?}: a worker that waits for Kafka would be killed (raise it)",
                supervision.blocked, flush.delivery_timeout
            ),
        );
    }
    supervision
}

/// Values that are legal alone and not together.
pub(super) fn contradictions(raw: &mut Raw, kafka: &Kafka, redis: &Redis, buffer: &Buffer) {
    let age = buffer.max_segment_age;
    if let Some(age) = age.filter(|&age| age < buffer.root_timeout) {
        raw.fault(
            "buffer.max_segment_age",
            format!(
                "{age:?} is shorter than buffer.root_timeout={:?} (raise it, or 0 for no limit)",
                buffer.root_timeout
            ),
        );
    }
    if buffer.max_insert_bytes > buffer.max_trace_bytes {
        raw.fault("buffer.max_insert_bytes", "is larger than buffer.max_trace_bytes: every entry would be over it (lower one, or raise the other)");
    }
    let longest = age
        .unwrap_or_default()
        .max(buffer.timeout)
        .max(buffer.root_timeout);
    // A look may be put off by ten minutes.
    if redis.redis_ttl < longest + Duration::from_secs(600) {
        raw.fault("redis.redis_ttl", format!("{:?} is shorter than the longest life of a segment, {longest:?} and 600s: spans would expire (raise it)", redis.redis_ttl));
    }
    if kafka.start_group.as_ref() == Some(&kafka.group) {
        raw.fault(
            "kafka.start_group",
            "is kafka.group itself (name the other consumer's group, or leave it empty)",
        );
    }
    let others = kafka
        .output_topics
        .iter()
        .map(|topic| (topic, "kafka.output_topics"));
    let others = others
        .chain(
            kafka
                .input_dlq
                .iter()
                .map(|topic| (topic, "kafka.input_dlq")),
        )
        .chain(
            kafka
                .output_dlq
                .iter()
                .map(|topic| (topic, "kafka.output_dlq")),
        );
    let same: Vec<&str> = others
        .filter(|(topic, _)| **topic == kafka.input_topic)
        .map(|(_, key)| key)
        .collect();
    for key in same {
        raw.fault(
            key,
            "is kafka.input_topic: what goes out would come in again (name another topic)",
        );
    }
}

fn brokers(raw: &mut Raw) -> String {
    let brokers = raw.list("kafka.brokers");
    if brokers.is_empty() {
        raw.fault("kafka.brokers", "no broker is given (write 127.0.0.1:9092)");
    }
    if let Some(broker) = brokers.iter().find(|broker| {
        !is_address(
            broker
                .rsplit_once("://")
                .map_or(broker, |(_, address)| address),
        )
    }) {
        raw.fault(
            "kafka.brokers",
            format!("`{broker}` is no host:port (write 127.0.0.1:9092)"),
        );
    }
    brokers.join(",")
}

fn is_address(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty()
            && !host.contains(char::is_whitespace)
            && port.parse::<u16>().is_ok_and(|port| port > 0)
    })
}

fn filled(raw: &mut Raw, path: &'static str) -> String {
    let text = raw.text(path);
    if text.is_empty() {
        raw.fault(path, "is empty (give it a value, or leave the key out)");
    }
    text
}

fn optional(raw: &mut Raw, path: &'static str) -> Option<String> {
    Some(raw.text(path)).filter(|text| !text.is_empty())
}

fn topic(raw: &mut Raw, path: &'static str) -> String {
    let name = filled(raw, path);
    prove_topic(raw, path, &name);
    name
}

fn optional_topic(raw: &mut Raw, path: &'static str) -> Option<String> {
    let name = optional(raw, path)?;
    prove_topic(raw, path, &name);
    Some(name)
}

fn output_topics(raw: &mut Raw) -> Vec<String> {
    let topics = raw.list("kafka.output_topics");
    if topics.is_empty() {
        raw.fault(
            "kafka.output_topics",
            "no topic is given (write buffered-segments)",
        );
    }
    topics
        .iter()
        .for_each(|topic| prove_topic(raw, "kafka.output_topics", topic));
    if (1..topics.len()).any(|index| topics[..index].contains(&topics[index])) {
        raw.fault(
            "kafka.output_topics",
            "a topic stands twice (name each once)",
        );
    }
    topics
}

/// As Kafka has it.
fn prove_topic(raw: &mut Raw, path: &'static str, name: &str) {
    let legal = name.len() <= 249
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
    if !legal || name == "." || name == ".." {
        raw.fault(
            path,
            format!(
                "`{name}` is no name of a topic (letters, digits, `.`, `_` and `-`, at most 249)"
            ),
        );
    }
}

fn properties(raw: &mut Raw, path: &'static str) -> BTreeMap<String, String> {
    let map = raw.map(path);
    for name in map.keys() {
        if let Some((_, owner)) = OURS.iter().find(|(ours, _)| ours == name) {
            raw.fault(
                path,
                format!("`{name}` is set by {owner} (leave it out here)"),
            );
        }
    }
    map
}

fn one_of<T: Copy>(raw: &mut Raw, path: &'static str, values: &[(&str, T)]) -> T {
    let text = raw.text(path);
    if let Some((_, value)) = values.iter().find(|(name, _)| *name == text) {
        return *value;
    }
    let names: Vec<&str> = values.iter().map(|(name, _)| *name).collect();
    raw.fault(path, format!("`{text}` is not one of {}", names.join(", ")));
    // Any of them: the fault keeps it from being used.
    values[0].1
}

fn number<T: FromStr + PartialOrd + Copy + std::fmt::Display>(
    raw: &mut Raw,
    path: &'static str,
    min: T,
    max: T,
) -> T {
    let text = raw.text(path);
    match text.parse::<T>() {
        Ok(number) if number >= min && number <= max => number,
        _ => {
            raw.fault(
                path,
                format!("`{text}` is no whole number from {min} to {max}"),
            );
            default_of(path).parse().unwrap_or(min)
        }
    }
}

fn duration(raw: &mut Raw, path: &'static str) -> Duration {
    duration_within(raw, path, Duration::from_millis(1), DURATION_MAX)
}

fn duration_or_off(raw: &mut Raw, path: &'static str) -> Option<Duration> {
    let length = duration_within(raw, path, Duration::ZERO, DURATION_MAX);
    (!length.is_zero()).then_some(length)
}

fn duration_within(raw: &mut Raw, path: &'static str, min: Duration, max: Duration) -> Duration {
    let text = raw.text(path);
    match parse_duration(&text) {
        Some(length) if length >= min && length <= max => return length,
        Some(length) if length.is_zero() => raw.fault(
            path,
            format!("0 does not mean off here (write at least {min:?})"),
        ),
        Some(_) => raw.fault(
            path,
            format!("`{text}` is not within {min:?} and {}s", max.as_secs()),
        ),
        None => raw.fault(
            path,
            format!("`{text}` is no length of time (write 250ms, 60s, 5m or 24h)"),
        ),
    }
    parse_duration(&default_of(path)).unwrap_or(max)
}

fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let (number, unit) = text.split_at(text.find(|letter: char| !letter.is_ascii_digit())?);
    let number: u64 = number.parse().ok()?;
    let millis = match unit.trim_start() {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.checked_mul(millis).map(Duration::from_millis)
}

fn size(raw: &mut Raw, path: &'static str, max: u64) -> u64 {
    let text = raw.text(path);
    match parse_size(&text) {
        Some(0) => raw.fault(path, "0 does not mean off here (write at least 1B)"),
        Some(bytes) if bytes <= max => return bytes,
        Some(_) => raw.fault(path, format!("`{text}` is more than {max}B")),
        None => raw.fault(
            path,
            format!("`{text}` is no size (write 512B, 64KiB, 10MiB or 2GiB)"),
        ),
    }
    parse_size(&default_of(path)).unwrap_or(max)
}

fn parse_size(text: &str) -> Option<u64> {
    if text == "0" {
        return Some(0);
    }
    let (number, unit) = text.split_at(text.find(|letter: char| !letter.is_ascii_digit())?);
    let number: u64 = number.parse().ok()?;
    let bytes = match unit.trim_start() {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(bytes)
}

fn shards(raw: &mut Raw) -> ShardList {
    let text = raw.list("supervision.shards").join(",");
    match text.parse() {
        Ok(shards) => return shards,
        Err(_) if text.is_empty() && raw.is_partial() => {}
        Err(_) if text.is_empty() => raw.fault(
            "supervision.shards",
            "is not set (give --shards 0-7: the partitions to work on)",
        ),
        Err(error) => {
            let error: crate::shard::ShardListError = error;
            raw.fault("supervision.shards", error.to_string());
        }
    }
    any_shards()
}

/// Stands in where a fault keeps the list from being used.
fn any_shards() -> ShardList {
    ShardList::from(ShardId(0))
}

fn run_dir(raw: &mut Raw, environment: &[(OsString, OsString)]) -> PathBuf {
    let variable = |wanted: &str| {
        environment
            .iter()
            .find(|(name, value)| name == wanted && !value.is_empty())
            .map(|(_, value)| PathBuf::from(value))
    };
    if let Some(run_dir) = optional(raw, "supervision.run_dir") {
        return run_dir.into();
    }
    if let Some(run_dir) = variable("RUNTIME_DIRECTORY") {
        return run_dir;
    }
    if let Some(parent) = variable("XDG_RUNTIME_DIR") {
        return parent.join("spanbuf");
    }
    let temp = variable("TMPDIR").unwrap_or_else(|| "/tmp".into());
    temp.join(format!("spanbuf-{}", nix::unistd::getuid()))
}
