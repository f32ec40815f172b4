//! Inserts on a real Redis: what is left out behind another position.
//!
//! In:     batches of one span each, and a position that somebody else moves.
//! Keeps:  nothing is written over a gap.
//! Source: docs/store.md 2, 6.

use bytes::Bytes;
use shared::{
    board::BoardOwner,
    config::{Config, Flags},
    launch::{Launch, Role},
    shard::{BucketId, ShardId},
    signals::Stop,
    time::UnixMillis,
};
use stand::redis::Redis;
use store::{
    client::{Client, Command, reply},
    keys::{Bucket, position_key},
};
use worker::{
    beat::Beat,
    ingest::{
        batch::{Batch, Positions, Record},
        dlq::DeadLetters,
        encode::Making,
        group::GroupLimits,
        insert::{Inserted, Store},
        journal::Encoder,
    },
};

pub(crate) const SHARD: ShardId = ShardId(0);
pub(crate) const BUCKET: Bucket = Bucket {
    slice: None,
    shard: SHARD,
    bucket: BucketId(0),
};
pub(crate) const ARRIVAL: UnixMillis = UnixMillis(1_700_000_000_000);

pub(crate) fn config(redis: &Redis) -> Config {
    let variables = [
        ("SPANBUF_REDIS__NODES".into(), redis.address().into()),
        ("SPANBUF_SUPERVISION__SHARDS".into(), "0".into()),
        ("SPANBUF_KAFKA__INPUT_DLQ".into(), "".into()),
    ];
    Config::load(None, variables.into_iter(), &Flags::default()).unwrap()
}

/// A worker's beat, on a board of its own.
pub(crate) fn beat(config: &Config) -> (Beat, BoardOwner) {
    let board = BoardOwner::create(&config.supervision.shards, 1).unwrap();
    let launch = Launch {
        role: Role::Ingest,
        index: 0,
        slot: 0,
        generation: 0,
        shards: config.supervision.shards.clone(),
        flush_workers: 1,
        supervisor: 0,
        board: 0,
        config: config.clone(),
    };
    let mut beat = Beat::new(board.board(), &launch, Stop::install().unwrap());
    beat.ready();
    (beat, board)
}

/// A span of a trace of its own.
pub(crate) fn record(offset: u64, trace: &str) -> Record {
    let json = format!(
        r#"{{"organization_id":1,"project_id":1,"trace_id":"{trace}","span_id":"1","start_timestamp":1,"end_timestamp":2,"received":3,"retention_days":90,"status":"ok"}}"#
    );
    Record {
        shard: SHARD,
        offset,
        time: UnixMillis(ARRIVAL.0 + offset),
        payload: Some(Bytes::from(json)),
    }
}

/// The write side of a worker, batch by batch.
pub(crate) struct Inserts {
    making: Making,
    pub(crate) store: Store,
    pub(crate) beat: Beat,
    _board: BoardOwner,
}

impl Inserts {
    pub(crate) fn new(config: &Config) -> Self {
        let client = Client::new(&config.redis).unwrap();
        let (beat, board) = beat(config);
        Self {
            making: Making {
                limits: GroupLimits {
                    spans_max: 10,
                    bytes_max: 1 << 20,
                },
                encoder: Encoder::new(client.buckets(), &config.redis, &config.buffer),
                dead_letters: DeadLetters::new(&config.kafka).unwrap(),
            },
            store: Store::new(client, "inst".into(), &config.redis, &config.buffer),
            beat,
            _board: board,
        }
    }

    pub(crate) fn insert(&mut self, records: Vec<Record>) -> Inserted {
        let now = |_, times: &[UnixMillis]| Some(times[0]);
        let buckets = self.store.buckets();
        let batch = Batch::make(records, now, &mut Positions::new(), buckets);
        let encoded = self.making.encode(batch, &mut self.beat).unwrap();
        self.store.insert(encoded, &mut self.beat).unwrap()
    }
}

#[test]
fn behind_another_position_nothing_is_written_until_it_is_adopted() {
    let redis = Redis::start().unwrap();
    let config = config(&redis);
    let mut client = Client::new(&config.redis).unwrap();
    let mut inserts = Inserts::new(&config);
    let move_to = |next: u64| {
        redis::cmd("HSET")
            .arg(position_key(BUCKET))
            .arg("next")
            .arg(next)
            .exec(&mut redis.connection().unwrap())
            .unwrap();
    };
    let mut insert = |inserts: &mut Inserts, offset: u64| {
        let inserted = inserts.insert(vec![record(offset, &offset.to_string())]);
        let queued = client.run(&[Command::queue_len(BUCKET)]).remove(0).unwrap();
        (
            inserted.rewind().len(),
            inserted.parts().len(),
            reply::count(&queued),
        )
    };
    inserts.store.adopt(SHARD, &mut inserts.beat).unwrap();
    assert_eq!(insert(&mut inserts, 0), (0, 1, 1));
    move_to(9);
    assert_eq!(insert(&mut inserts, 1), (1, 0, 2), "found behind its write");
    move_to(1);
    assert_eq!(insert(&mut inserts, 2), (1, 0, 2), "over a gap");
    inserts.store.adopt(SHARD, &mut inserts.beat).unwrap();
    assert_eq!(insert(&mut inserts, 1), (0, 1, 2));
    assert_eq!(insert(&mut inserts, 2), (0, 1, 3));
    // The watch finds it as well.
    move_to(9);
    let found = inserts.store.watch(&[SHARD], &mut inserts.beat).unwrap();
    assert_eq!(found, [SHARD]);
    move_to(3);
    assert_eq!(
        insert(&mut inserts, 3),
        (1, 0, 3),
        "over what the watch found"
    );
}
