//! The product's own rooms, in the order of `ingest::pass` and `flush::cycle`, without Kafka.
//!
//! Keeps:  nothing of them is copied here but the order of `encode`, as envelopes are grouped alone: what is measured is what runs.
//! Source: crates/worker/src/ingest/mod.rs, crates/worker/src/flush/mod.rs.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use shared::{
    board::BoardOwner,
    config::{Compression, Config, Flags},
    launch::{Launch, Role},
    shard::{BucketId, ShardId},
    signals::Stop,
    time::UnixMillis,
};
use stand::{pause, redis::Redis};
use store::{client::Client, keys::Bucket};
use worker::{
    beat::Beat,
    deliver::{Deliver, Fault, Outgoing},
    flush::{
        assemble::Limits,
        due,
        lanes::{Lane, Lanes, lanes_of},
        produce::Output,
    },
    ingest::{
        batch::Counts,
        clocks::Clocks,
        dlq::DeadLetters,
        encode::{Encoded, Writing},
        insert::{Inserted, Store},
        journal::Encoder,
        stages::Stages,
        writer::{SharedStore, Writer},
    },
};

use crate::{
    Flushed, SEGMENT_BYTES_MAX, Way, groups,
    input::{ARRIVAL, Envelope},
};

const SHARD: ShardId = ShardId(0);
const BUCKET: Bucket = Bucket {
    slice: None,
    shard: SHARD,
    bucket: BucketId(0),
};
/// Everything is due.
const LATER: UnixMillis = UnixMillis(ARRIVAL.0 + 3_600_000);
/// How long one wait for the lanes lasts.
const LANES_SLICE: Duration = Duration::from_micros(200);

pub(crate) struct Product {
    config: Config,
    encoder: Encoder,
    dead_letters: DeadLetters,
    store: SharedStore,
    writing: Stages<Encoded, Inserted>,
    lanes: Lanes<Nobody>,
    /// What the lanes have taken, since they began.
    taken: Nobody,
    client: Client,
    beat: Beat,
    _board: BoardOwner,
    offset: u64,
}

/// Takes every message and forgets it, but for how many spans and bytes there were.
#[derive(Debug, Clone, Default)]
struct Nobody(Arc<(AtomicU64, AtomicUsize)>);

impl Nobody {
    fn flushed(&self) -> Flushed {
        Flushed {
            spans: self.0.0.load(Ordering::Relaxed),
            bytes: self.0.1.load(Ordering::Relaxed),
        }
    }
}

impl Deliver for Nobody {
    fn deliver(&mut self, messages: &[Outgoing<'_>], _: &mut Beat) -> Vec<Result<(), Fault>> {
        let mut flushed = Flushed::default();
        for message in messages {
            let spans = message.headers.iter().find(|(name, _)| *name == "spans");
            let spans = std::str::from_utf8(&spans.unwrap().1).unwrap().parse();
            flushed.add(spans.unwrap(), message.payload.unwrap());
        }
        self.0.0.fetch_add(flushed.spans, Ordering::Relaxed);
        self.0.1.fetch_add(flushed.bytes, Ordering::Relaxed);
        vec![Ok(()); messages.len()]
    }
}

impl Product {
    pub(crate) fn new(redis: &Redis, compression: Compression) -> Self {
        let variables = [
            ("SPANBUF_REDIS__NODES".into(), redis.address().into()),
            ("SPANBUF_SUPERVISION__SHARDS".into(), "0".into()),
            ("SPANBUF_KAFKA__INPUT_DLQ".into(), "".into()),
        ];
        let mut config = Config::load(None, variables.into_iter(), &Flags::default()).unwrap();
        config.redis.compression = compression;
        // A machine that others work on as well: a slow answer is no outage.
        config.redis.timeout = std::time::Duration::from_secs(20);
        let shards = config.supervision.shards.clone();
        let board = BoardOwner::create(&shards, 1).unwrap();
        let launch = Launch {
            role: Role::Ingest,
            index: 0,
            slot: 0,
            generation: 0,
            shards: shards.clone(),
            flush_workers: 1,
            supervisor: 0,
            board: 0,
            config: config.clone(),
        };
        let mut beat = Beat::new(board.board(), &launch, Stop::install_interactive().unwrap());
        beat.ready();
        let store = SharedStore::new(open(&config));
        let encoder = Encoder::new(store.take().buckets(), &config.redis, &config.buffer);
        let writer = Writer {
            store: store.clone(),
            clocks: Clocks::default(),
            ledgers: BTreeMap::new(),
        };
        let taken = Nobody::default();
        Self {
            encoder,
            dead_letters: DeadLetters::new(&config.kafka).unwrap(),
            store,
            writing: Stages::start(beat.another(), move |encoded, beat| {
                writer.write(encoded, beat)
            }),
            lanes: lanes(&config, &taken, &beat),
            taken,
            client: Client::new(&config.redis).unwrap(),
            beat,
            _board: board,
            offset: 0,
            config,
        }
    }

    /// Waits until the batch before is in.
    fn written(&mut self) {
        while let Some(inserted) = self.writing.next(0, &self.beat).unwrap() {
            assert!(inserted.rewind().is_empty());
        }
    }

    /// Hands what is due to the lanes; whether there was any.
    fn cycle(&mut self) -> bool {
        let (client, beat, lanes) = (&mut self.client, &mut self.beat, &mut self.lanes);
        lanes.hear().unwrap();
        let queues = due::read(client, beat, &[(BUCKET, LATER)], lanes.wanted()).unwrap();
        let mut due = queues.due;
        due.retain(|due| !lanes.hold(due));
        let any = !due.is_empty() || queues.more;
        lanes.hand(due, beat).unwrap();
        any
    }
}

/// The write side of the store.
fn open(config: &Config) -> Store {
    let mut client = Client::new(&config.redis).unwrap();
    let instance = client.meta(&config.supervision.shards).unwrap().instance;
    Store::new(client, instance, &config.redis, &config.buffer)
}

/// The lanes of a worker, as `flush::begin` makes them.
fn lanes(config: &Config, taken: &Nobody, beat: &Beat) -> Lanes<Nobody> {
    let limits = Limits::new(&config.buffer, SEGMENT_BYTES_MAX);
    let (count, budget) = lanes_of(&config.flush);
    let lane = || Lane {
        client: Client::new(&config.redis).unwrap(),
        beat: beat.another(),
        output: Output::new(config, taken.clone(), None, SEGMENT_BYTES_MAX),
        limits,
        budget,
        ttl: config.redis.redis_ttl,
        ledgers: BTreeMap::new(),
        reads_whole: true,
    };
    Lanes::start((0..count).map(|_| lane()).collect())
}

impl Way for Product {
    fn begin(&mut self) {
        self.offset = 0;
        let mut store = self.store.take();
        *store = open(&self.config);
        store.adopt(SHARD, &mut self.beat).unwrap();
    }

    fn insert(&mut self, batch: Vec<Envelope>) {
        let first = self.offset;
        self.offset += batch
            .iter()
            .map(|envelope| envelope.len() as u64)
            .sum::<u64>();
        let subsegments = groups(batch);
        let encoded = Encoded {
            parts: vec![Writing {
                shard: SHARD,
                first,
                next: self.offset,
                now: ARRIVAL,
                latest: ARRIVAL,
                counts: Counts {
                    inserted: self.offset - first,
                    refused: 0,
                },
            }],
            journals: self.encoder.encode(SHARD, ARRIVAL, &subsegments),
            settled: self.dead_letters.settle(&[], &mut self.beat).unwrap(),
        };
        self.written();
        self.writing.hand(encoded);
    }

    fn end_insert(&mut self) {
        self.written();
    }

    fn flush(&mut self) -> Flushed {
        let (before, idle) = (self.taken.flushed(), self.lanes.wanted());
        // What a lane leaves is seen when it has ended its part.
        loop {
            while self.cycle() {}
            if self.lanes.wanted() == idle {
                break;
            }
            while self.lanes.wanted() > idle {
                pause(LANES_SLICE);
                self.lanes.hear().unwrap();
            }
        }
        let after = self.taken.flushed();
        Flushed {
            spans: after.spans - before.spans,
            bytes: after.bytes - before.bytes,
        }
    }
}
