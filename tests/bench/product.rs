//! The product's own rooms, in the order of `ingest::pass` and `flush::cycle`, without Kafka.
//!
//! Keeps:  nothing of them is copied here: what is measured is what runs.
//! Source: crates/worker/src/ingest/mod.rs, crates/worker/src/flush/mod.rs.

use std::collections::BTreeMap;

use shared::{
    board::BoardOwner,
    config::{Compression, Config, Flags},
    launch::{Launch, Role},
    shard::{BucketId, ShardId},
    signals::Stop,
    time::UnixMillis,
};
use stand::redis::Redis;
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
        insert::Store,
        journal::Encoder,
        writer::Writer,
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

pub(crate) struct Product {
    config: Config,
    encoder: Encoder,
    dead_letters: DeadLetters,
    writer: Writer,
    client: Client,
    beat: Beat,
    _board: BoardOwner,
    offset: u64,
}

/// Takes every message and forgets it.
#[derive(Debug, Default)]
struct Nobody(Flushed);

impl Deliver for Nobody {
    fn deliver(&mut self, messages: &[Outgoing<'_>], _: &mut Beat) -> Vec<Result<(), Fault>> {
        for message in messages {
            let spans = message.headers.iter().find(|(name, _)| *name == "spans");
            let spans = std::str::from_utf8(&spans.unwrap().1).unwrap().parse();
            self.0.add(spans.unwrap(), message.payload.unwrap());
        }
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
        let mut client = Client::new(&config.redis).unwrap();
        let instance = client.meta(&shards).unwrap().instance;
        let writer = Client::new(&config.redis).unwrap();
        let mut store = Store::new(writer, instance, &config.redis, &config.buffer);
        store.adopt(SHARD, &mut beat).unwrap();
        Self {
            encoder: Encoder::new(store.buckets(), &config.redis, &config.buffer),
            dead_letters: DeadLetters::new(&config.kafka).unwrap(),
            writer: Writer::start(store, Clocks::default(), BTreeMap::new(), beat.another()),
            client,
            beat,
            _board: board,
            offset: 0,
            config,
        }
    }

    /// The lanes of a worker, as `flush::begin` makes them.
    fn lanes(&self) -> Lanes<Nobody> {
        let buffer = &self.config.buffer;
        let limits = Limits {
            timeout: buffer.timeout,
            root_timeout: buffer.root_timeout,
            max_segment_age: buffer.max_segment_age,
            max_segment_bytes: SEGMENT_BYTES_MAX,
            max_trace_bytes: buffer.max_trace_bytes,
            max_trace_entries: buffer.max_trace_entries,
        };
        let (count, budget) = lanes_of(&self.config.flush);
        let lane = || Lane {
            client: Client::new(&self.config.redis).unwrap(),
            beat: self.beat.another(),
            output: Output::new(&self.config, Nobody::default(), None, SEGMENT_BYTES_MAX),
            limits,
            budget,
            ttl: self.config.redis.redis_ttl,
            ledgers: BTreeMap::new(),
            reads_whole: true,
        };
        Lanes::start((0..count).map(|_| lane()).collect())
    }

    /// The store, when the batch before is in.
    fn take_store(&mut self) -> Store {
        let (store, written) = self.writer.take(&self.beat).unwrap();
        assert!(written.is_none_or(|inserted| inserted.rewind().is_empty()));
        store
    }

    fn cycle(&mut self, lanes: &mut Lanes<Nobody>) -> bool {
        let (client, beat) = (&mut self.client, &mut self.beat);
        lanes.hear().unwrap();
        let queues = due::read(client, beat, &[(BUCKET, LATER)], lanes.wanted()).unwrap();
        let mut due = queues.due;
        due.retain(|due| !lanes.hold(due));
        lanes.hand(due, beat).unwrap();
        queues.more | lanes.take_left()
    }
}

impl Way for Product {
    fn insert(&mut self, batch: Vec<Envelope<'_>>) {
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
        let store = self.take_store();
        self.writer.hand(store, encoded);
    }

    fn end_insert(&mut self) {
        let store = self.take_store();
        self.writer.keep(store);
    }

    fn flush(&mut self) -> Flushed {
        let mut flushed = Flushed::default();
        // What a lane left is seen when it has ended its part.
        loop {
            let mut lanes = self.lanes();
            while self.cycle(&mut lanes) {}
            let (outputs, ended) = lanes.end(&mut self.beat);
            ended.unwrap();
            let before = flushed.spans;
            for mut output in outputs {
                let Flushed { spans, bytes } = output.deliverer_mut().0;
                flushed.spans += spans;
                flushed.bytes += bytes;
            }
            if flushed.spans == before {
                return flushed;
            }
        }
    }
}
