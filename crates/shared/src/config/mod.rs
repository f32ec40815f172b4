//! The configuration: raw file, environment and flags → checked sections.
//!
//! In:     a TOML file, `SPANBUF_<SECTION>__<KEY>` variables, flags; in that order, later ones win.
//! Out:    `Config`, or every fault at once, each with its place and with what to do.
//! Keeps:  no unknown key is passed over; no secret is printed; every default is read by the code that reads a file.
//! Knows:  what may be set, and which values contradict. No policy, no client.
//! Source: docs/spec.md 10.1; docs/supervision.md 3.

use std::{collections::BTreeMap, ffi::OsString, path::Path, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::shard::{ShardList, SliceId};

pub use self::{
    keys::{KEYS, Key},
    raw::{ConfigError, Fault},
};

mod keys;
mod raw;
mod values;

use self::raw::Raw;

/// Everything that may be set, checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Topics and clients of Kafka.
    pub kafka: Kafka,
    /// The store.
    pub redis: Redis,
    /// When a segment is due, and how large things may get.
    pub buffer: Buffer,
    /// The flushing role.
    pub flush: Flush,
    /// The reading role.
    pub intake: Intake,
    /// Workers, and how they are kept.
    pub supervision: Supervision,
    /// What is said.
    pub log: Log,
    /// Every key in force as text, secrets hidden.
    shown: Vec<(String, String)>,
}

/// Section `kafka`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kafka {
    /// `host:port,…`.
    pub brokers: String,
    /// The consumer group that offsets are committed for.
    pub group: String,
    /// The group to take over from, where ours has committed nothing.
    pub start_group: Option<String>,
    /// Where to begin with neither a position nor an offset.
    pub offset_reset: OffsetReset,
    /// Where spans come from.
    pub input_topic: String,
    /// Where segments go, round robin.
    pub output_topics: Vec<String>,
    /// Where messages go that hold no span.
    pub input_dlq: Option<String>,
    /// Where segments go that the broker never takes.
    pub output_dlq: Option<String>,
    /// The key of a segment's message.
    pub key: MessageKey,
    /// librdkafka's properties, for all clients.
    pub properties: BTreeMap<String, String>,
    /// The same for the consumer alone.
    pub consumer: BTreeMap<String, String>,
    /// The same for producers alone.
    pub producer: BTreeMap<String, String>,
}

/// Where to begin with neither a position nor an offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OffsetReset {
    /// At the oldest message.
    Earliest,
    /// Behind the newest one.
    Latest,
    /// Nowhere: refuse to start.
    None,
}

/// The key of a segment's message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MessageKey {
    /// None: librdkafka spreads messages.
    None,
    /// The trace id: segments of a trace in one partition.
    Trace,
}

/// Section `redis`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redis {
    /// `host:port`; of a cluster, those to begin with.
    pub nodes: Vec<String>,
    /// Whether it is a Redis Cluster.
    pub cluster: bool,
    /// The longest wait for one connection, write or reply.
    pub timeout: Duration,
    /// How long a journal lives that nobody touches.
    pub redis_ttl: Duration,
    /// Buckets of a shard.
    pub buckets: u32,
    /// Sets the keys apart from those of other Spanbufs in the same store.
    pub slice: Option<SliceId>,
    /// How payloads are packed.
    pub compression: Compression,
}

/// How payloads are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    /// As they are.
    None,
    /// LZ4.
    Lz4,
    /// zstd.
    Zstd,
}

/// Section `buffer`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buffer {
    /// From the latest arrival to the deadline, without a root.
    pub timeout: Duration,
    /// The same with a root.
    pub root_timeout: Duration,
    /// From the first arrival to the latest deadline; none: no limit.
    pub max_segment_age: Option<Duration>,
    /// Spans in an entry.
    pub max_spans_per_insert: usize,
    /// Bytes of spans in an entry.
    pub max_insert_bytes: u64,
    /// Bytes of a trace from which all of its segments are due.
    pub max_trace_bytes: u64,
    /// Entries of a trace from which all of its segments are due.
    pub max_trace_entries: u64,
    /// Bytes of a segment from which it is due, and of a message.
    pub max_segment_bytes: u64,
}

/// Section `flush`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flush {
    /// Segments that one worker loads, sends and clears together.
    pub max_flush_segments: usize,
    /// Bytes of their spans.
    pub max_flush_bytes: u64,
    /// How long librdkafka tries to deliver a message.
    pub delivery_timeout: Duration,
}

/// Section `intake`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intake {
    /// Messages in a batch.
    pub batch_spans: usize,
    /// Bytes of a batch.
    pub batch_bytes: u64,
    /// How soon a batch that is not full follows the one before.
    pub batch_time: Duration,
    /// How long a flusher may be down before its shards take no more input.
    pub backpressure_seconds: Duration,
}

/// Section `supervision`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Supervision {
    /// The partitions to work on.
    pub shards: ShardList,
    /// Flush workers, as configured: more than shards are left out.
    pub max_workers: u32,
    /// Ingest workers, as configured: more than shards are left out.
    pub ingest_workers: u32,
    /// How long a worker may show no progress while it starts.
    pub boot: Duration,
    /// The same at work, and while it waits for Redis.
    pub hang: Duration,
    /// The same while it waits for Kafka.
    pub blocked: Duration,
    /// Sent to a hung worker before it is killed; none: it is killed at once.
    pub hang_signal: Option<HangSignal>,
    /// What follows when a worker has failed for good.
    pub policy: Policy,
    /// How long a worker is healthy until one of its failures is forgotten.
    pub stable: Duration,
    /// Where a report goes as JSON.
    pub dump: Option<PathBuf>,
    /// How often the board is judged.
    pub tick: Duration,
    /// How long a killed worker, or the holder of the run directory, may take to go.
    pub reap_limit: Duration,
    /// How long workers may take to end after TERM.
    pub drain: Duration,
    /// Failures of one worker, less those healed, that are answered by a restart.
    pub max_restarts: u32,
    /// The worker's binary; none: beside the supervisor's.
    pub worker: Option<PathBuf>,
    /// The directory of the lock.
    pub run_dir: PathBuf,
}

/// A signal that ends a worker and leaves something to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HangSignal {
    /// SIGABRT.
    Abrt,
    /// SIGQUIT.
    Quit,
    /// SIGSEGV.
    Segv,
    /// SIGTRAP.
    Trap,
}

/// What follows when a worker has failed for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Policy {
    /// All drain, and the supervisor ends with the failure's code.
    Escalate,
    /// The others go on; the failed one stays Failed.
    Isolate,
}

/// Section `log`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Log {
    /// From which level on records are printed.
    pub level: log::LevelFilter,
}

/// What a command line may set.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// `--shards`.
    pub shards: Option<ShardList>,
    /// `--max-workers`.
    pub max_workers: Option<u32>,
    /// `--ingest-workers`.
    pub ingest_workers: Option<u32>,
}

impl Config {
    /// Reads and proves everything.
    ///
    /// # Errors
    /// [`ConfigError`] with every fault that was found.
    pub fn load(
        file: Option<&Path>,
        environment: impl Iterator<Item = (OsString, OsString)>,
        flags: &Flags,
    ) -> Result<Self, ConfigError> {
        let environment: Vec<(OsString, OsString)> = environment.collect();
        let mut raw = Raw::read(file, &environment);
        if let Some(shards) = &flags.shards {
            raw.set("supervision.shards", "--shards", shards.to_string());
        }
        for (key, flag, value) in [
            (
                "supervision.max_workers",
                "--max-workers",
                flags.max_workers,
            ),
            (
                "supervision.ingest_workers",
                "--ingest-workers",
                flags.ingest_workers,
            ),
        ] {
            if let Some(value) = value {
                raw.set(key, flag, value.to_string());
            }
        }
        let kafka = values::kafka(&mut raw);
        let redis = values::redis(&mut raw);
        let buffer = values::buffer(&mut raw);
        let flush = values::flush(&mut raw);
        let intake = values::intake(&mut raw);
        let supervision = values::supervision(&mut raw, &environment);
        let log = values::log(&mut raw);
        values::contradictions(&mut raw, &kafka, &redis, &buffer);
        let supervision = values::budgets(&mut raw, supervision, &redis, &flush, &intake);
        let mut shown = raw.finish()?;
        for (key, value) in [
            ("redis.buckets", redis.buckets.to_string()),
            (
                "supervision.max_workers",
                supervision.max_workers.to_string(),
            ),
            (
                "supervision.blocked",
                format!("{}ms", supervision.blocked.as_millis()),
            ),
            (
                "supervision.run_dir",
                supervision.run_dir.display().to_string(),
            ),
        ] {
            if let Some(row) = shown.iter_mut().find(|(name, _)| name == key) {
                row.1 = value;
            }
        }
        Ok(Self {
            kafka,
            redis,
            buffer,
            flush,
            intake,
            supervision,
            log,
            shown,
        })
    }

    /// Every key in force as text, in the order of [`KEYS`], secrets hidden.
    #[must_use]
    pub fn redacted(&self) -> &[(String, String)] {
        &self.shown
    }
}

#[cfg(test)]
mod tests;
