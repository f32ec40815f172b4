//! Every key that may be set, its default, and why.
//!
//! Out:    the table that README prints and the reader obeys.
//! Keeps:  defaults stand here and nowhere else, as text, read like any other.
//! Knows:  nothing else. Pure.
//! Source: docs/spec.md 10.1.

/// A key of the configuration.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// `section.key`.
    pub path: &'static str,
    /// Its value when nothing sets it.
    pub default: &'static str,
    /// What it does, for README.
    pub meaning: &'static str,
}

/// All keys.
pub const KEYS: &[Key] = &[
    key(
        "kafka.brokers",
        "127.0.0.1:9092",
        "brokers to begin with, `host:port,…`",
    ),
    key(
        "kafka.group",
        "spanbuf",
        "consumer group that offsets are committed for",
    ),
    key(
        "kafka.start_group",
        "",
        "group to take over from: where to begin when ours has committed nothing; empty = off",
    ),
    key(
        "kafka.offset_reset",
        "earliest",
        "where to begin with neither a position nor a committed offset: `earliest`, `latest`, `none` = refuse",
    ),
    key(
        "kafka.input_topic",
        "ingest-spans",
        "topic of spans; one partition is one shard",
    ),
    key(
        "kafka.output_topics",
        "buffered-segments",
        "topics of segments, used in turn",
    ),
    key(
        "kafka.input_dlq",
        "ingest-spans-dlq",
        "topic of messages that hold no span; empty = off: they are counted and dropped",
    ),
    key(
        "kafka.output_dlq",
        "buffered-segments-dlq",
        "topic of segments that are too large for the broker; empty = off: they stay in Redis",
    ),
    key(
        "kafka.key",
        "none",
        "key of a segment's message: `none`, `trace`",
    ),
    key(
        "kafka.properties",
        "",
        "properties of librdkafka for all clients, such as `security.protocol`; those that a key here sets are refused",
    ),
    key(
        "kafka.consumer",
        "",
        "the same for the consumer alone; `fetch.wait.max.ms` is 50 and `fetch.queue.backoff.ms` 10 where nobody says otherwise",
    ),
    key(
        "kafka.producer",
        "",
        "the same for producers alone, such as `compression.type`; `linger.ms` is 1 where nobody says otherwise",
    ),
    key(
        "redis.nodes",
        "127.0.0.1:6379",
        "the Redis, `host:port`; of a cluster some nodes to begin with",
    ),
    // Said, not found out: a client that took what answers would write into the wrong store after a mistaken address.
    key(
        "redis.cluster",
        "false",
        "whether it is a Redis Cluster: `true`, `false`",
    ),
    // A second is far above a healthy answer, and a third of the shortest hang limit that makes sense.
    key(
        "redis.timeout",
        "1s",
        "longest wait for one connection, write or reply",
    ),
    key(
        "redis.redis_ttl",
        "24h",
        "how long a trace stays in Redis that no worker touches",
    ),
    // 16 lie well enough on a few nodes, and cost an idle shard 16 positions a second.
    key(
        "redis.buckets",
        "",
        "parts into which a shard's traces are spread over nodes; empty = 1, on a cluster 16",
    ),
    key(
        "redis.slice",
        "",
        "number that sets the keys of several Spanbufs in one Redis apart; empty = none",
    ),
    // On recorded spans (docs/performance.md) the fastest of the three: up to 1.5 times as many spans a second on insert as unpacked, for
    // sending a kilobyte costs more than packing it, in a quarter to a sixth of the memory. zstd takes a quarter less still, for 1.6
    // to 1.9 times the CPU time of ingest.
    key(
        "redis.compression",
        "lz4",
        "how payloads are packed: `none`, `lz4`, `zstd`",
    ),
    key(
        "buffer.timeout",
        "60s",
        "a segment without a root is due this long after its latest arrival",
    ),
    key(
        "buffer.root_timeout",
        "10s",
        "a segment with a root is due this long after its latest arrival",
    ),
    key(
        "buffer.max_segment_age",
        "600s",
        "a segment is due this long after its first arrival, however busy; 0 = off",
    ),
    // At 1 kB a span this is the byte limit below.
    key(
        "buffer.max_spans_per_insert",
        "1000",
        "most spans in one entry of a journal",
    ),
    key(
        "buffer.max_insert_bytes",
        "1MiB",
        "most bytes of spans in one entry; a larger span stands alone",
    ),
    key(
        "buffer.max_trace_bytes",
        "64MiB",
        "a trace of more bytes is flushed at its next look",
    ),
    key(
        "buffer.max_trace_entries",
        "20000",
        "a trace of more entries is flushed at its next look",
    ),
    key(
        "buffer.max_segment_bytes",
        "10MiB",
        "a segment of more bytes is flushed at its next look, in messages of at most this size",
    ),
    key(
        "flush.max_flush_segments",
        "500",
        "most traces that all lanes of a worker take at once, and most segments that one of them loads, sends and clears together",
    ),
    key(
        "flush.max_flush_bytes",
        "64MiB",
        "most bytes of their spans; one segment may be larger",
    ),
    // Within the time that a worker may wait for Kafka; what fails is sent again at later looks.
    key(
        "flush.delivery_timeout",
        "30s",
        "how long one delivery is tried before its segment goes back to wait",
    ),
    key("intake.batch_spans", "5000", "most messages in one batch"),
    key(
        "intake.batch_bytes",
        "32MiB",
        "most bytes in one batch, of which there are three at most, and read ahead",
    ),
    // A span waits as long for its batch; half of it costs 3 % of a core at 10,000 spans a second (docs/performance.md).
    key(
        "intake.batch_time",
        "10ms",
        "how soon a batch that is not full follows the one before",
    ),
    // A respawn is over long before; spans that nobody flushes fill Redis.
    key(
        "intake.backpressure_seconds",
        "10",
        "a shard takes no more input when its flusher has been down for this many seconds",
    ),
    key(
        "supervision.shards",
        "",
        "partitions to work on: `0-7`, `0,2,5-9`; has no default",
    ),
    key(
        "supervision.max_workers",
        "",
        "flush workers at most; empty = one a shard",
    ),
    key("supervision.ingest_workers", "1", "ingest workers"),
    key(
        "supervision.boot",
        "60s",
        "how long a worker that starts may show no progress before it is killed",
    ),
    key(
        "supervision.hang",
        "60s",
        "how long a worker at work may show no progress before it is killed",
    ),
    // Kafka is waited for, not judged: only a worker whose wait does not even end by itself is hung.
    key(
        "supervision.blocked",
        "",
        "the same while it waits for Kafka; empty = 300 s, or `flush.delivery_timeout` and 60 s if that is more",
    ),
    key(
        "supervision.hang_signal",
        "off",
        "signal to a hung worker 5 s before it is killed, for a core or a trace: `off`, `ABRT`, `QUIT`, `SEGV`, `TRAP`",
    ),
    key(
        "supervision.tick",
        "250ms",
        "how often the workers are looked at",
    ),
    key(
        "supervision.reap_limit",
        "10s",
        "how long a killed worker may take to go, and how long a held run directory is waited for",
    ),
    key(
        "supervision.drain",
        "25s",
        "how long workers may take to end after TERM before they are killed",
    ),
    key(
        "supervision.max_restarts",
        "10",
        "failures of one worker that are answered by a restart",
    ),
    // Longer than any backoff: a worker that dies again and again reaches its cap.
    key(
        "supervision.stable",
        "300s",
        "how long a worker has to be healthy for one of its failures to be forgotten",
    ),
    key(
        "supervision.policy",
        "escalate",
        "when a worker has failed for good: `escalate` = drain all and end, `isolate` = the others go on",
    ),
    key(
        "supervision.dump",
        "",
        "file that `USR1` writes the workers' state to as JSON; empty = off",
    ),
    key(
        "supervision.worker",
        "",
        "the worker's binary; empty = `worker` beside the supervisor",
    ),
    key(
        "supervision.run_dir",
        "",
        "directory of the lock; empty = `$RUNTIME_DIRECTORY`, `$XDG_RUNTIME_DIR/spanbuf`, or `spanbuf-<uid>` in the temp directory",
    ),
    key(
        "log.level",
        "info",
        "`off`, `error`, `warn`, `info`, `debug`, `trace`",
    ),
];

const fn key(path: &'static str, default: &'static str, meaning: &'static str) -> Key {
    Key {
        path,
        default,
        meaning,
    }
}

/// The key of that path.
pub(super) fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// The key that a misspelt path most likely means.
pub(super) fn nearest(path: &str) -> Option<&'static Key> {
    /// Below this, a neighbour misleads more than it helps.
    const LIKENESS: f64 = 0.8;
    // The right key in the wrong section is nearly as near as a misspelt one in the right section.
    let likeness = |key: &Key| match (key.path.split_once('.'), path.split_once('.')) {
        (Some((section, name)), Some((written_section, written))) => {
            let sections = if section == written_section {
                1.0
            } else {
                strsim::jaro_winkler(section, written_section).max(0.95)
            };
            sections * strsim::jaro_winkler(name, written)
        }
        _ => strsim::jaro_winkler(key.path, path),
    };
    let best = KEYS
        .iter()
        .max_by(|one, other| likeness(one).total_cmp(&likeness(other)));
    best.filter(|key| likeness(key) >= LIKENESS)
}
