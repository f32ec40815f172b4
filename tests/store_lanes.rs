//! A lane on a real Redis: how long it may use what it has read.
//!
//! In:     two traces that are due at once, a Kafka that takes its time; it is played by the test.
//! Keeps:  what another flusher took meanwhile is not produced.
//! Source: docs/store.md 3.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use shared::{
    config::Redis as RedisConfig,
    ids::{ProjectId, TraceId},
    time::UnixMillis,
};
use stand::{pause, proxy::Proxy, redis::Redis};
use store::{
    client::Client,
    keys::{Member, journal_key},
};
use worker::{
    beat::Beat,
    deliver::{Deliver, Fault, Outgoing},
    flush::{
        assemble::Limits,
        choose::Budget,
        due,
        lanes::{Lane, Lanes},
        produce::Output,
    },
};

use crate::store_insert::{ARRIVAL, BUCKET, Inserts, SHARD, config, record};

/// Chunks that were read with their headers may be used for a second from the begin of a look. The look and the first delivery take
/// longer together; waves go on for a second behind the look.
const LOOK: Duration = Duration::from_millis(700);
const DELIVERY: Duration = Duration::from_millis(500);

/// At its first message the other trace is taken out of Redis, and time goes by.
#[derive(Clone, Debug)]
struct Slow {
    redis: Arc<Redis>,
    takes: Duration,
    delivered: Arc<Mutex<Vec<String>>>,
}

impl Deliver for Slow {
    fn deliver(&mut self, messages: &[Outgoing<'_>], _: &mut Beat) -> Vec<Result<(), Fault>> {
        let mut delivered = self.delivered.lock().unwrap();
        for message in messages {
            let text = String::from_utf8(message.payload.unwrap().to_vec()).unwrap();
            let is_of = |trace: &&str| text.contains(&format!("\"trace_id\":\"{trace}\""));
            let trace = ["one", "other"].into_iter().find(is_of).unwrap();
            delivered.push(trace.to_owned());
        }
        if delivered.len() == 1 {
            let other = Member::new(ProjectId(1), &TraceId::new(b"other"));
            redis::cmd("DEL")
                .arg(journal_key(BUCKET, &other))
                .exec(&mut self.redis.connection().unwrap())
                .unwrap();
            pause(self.takes);
        }
        vec![Ok(()); messages.len()]
    }
}

/// Flushes both traces, one a wave; gives those that were delivered, and how often chunks were fetched behind the look.
fn flush(look: Duration, delivery: Duration) -> (Vec<String>, u64) {
    let redis = Arc::new(Redis::start().unwrap());
    let proxy = Proxy::start(&redis.address()).unwrap();
    let config = config(&redis);
    let behind_proxy = RedisConfig {
        nodes: vec![proxy.address()],
        ..config.redis.clone()
    };
    let mut inserts = Inserts::new(&config);
    inserts.store.adopt(SHARD, &mut inserts.beat).unwrap();
    let inserted = inserts.insert(vec![record(0, "one"), record(1, "other")]);
    assert_eq!(inserted.parts().len(), 1);
    let beat = &mut inserts.beat;
    let mut client = Client::new(&config.redis).unwrap();
    let slow = Slow {
        redis: Arc::clone(&redis),
        takes: delivery,
        delivered: Arc::default(),
    };
    let lane = Lane {
        client: Client::new(&behind_proxy).unwrap(),
        beat: beat.another(),
        output: Output::new(&config, slow.clone(), None, 1 << 20),
        limits: Limits::new(&config.buffer, 1 << 20),
        budget: Budget {
            segments: 10,
            bytes: 1,
        },
        ttl: config.redis.redis_ttl,
        ledgers: BTreeMap::new(),
        reads_whole: true,
    };
    let mut lanes = Lanes::start(vec![lane]);
    let later = UnixMillis(ARRIVAL.0 + 3_600_000);
    let due = due::read(&mut client, beat, &[(BUCKET, later)], 10)
        .unwrap()
        .due;
    assert_eq!(due.len(), 2);
    let hold = proxy.hold_reply("HRANDFIELD");
    lanes.hand(due, beat).unwrap();
    assert!(hold.reached(Duration::from_secs(5)));
    pause(look);
    hold.release();
    lanes.end(beat).1.unwrap();
    let delivered = slow.delivered.lock().unwrap();
    (delivered.clone(), fetches(&redis))
}

fn fetches(redis: &Redis) -> u64 {
    let stats: String = redis::cmd("INFO")
        .arg("commandstats")
        .query(&mut redis.connection().unwrap())
        .unwrap();
    let calls = stats
        .lines()
        .find_map(|line| line.strip_prefix("cmdstat_hmget:calls="));
    let calls = calls.and_then(|rest| rest.split(',').next());
    calls.map_or(0, |calls| calls.parse().unwrap())
}

#[test]
fn chunks_that_were_read_with_their_headers_are_used_for_a_moment_and_then_read_anew() {
    let (delivered, fetches) = flush(Duration::ZERO, Duration::ZERO);
    assert_eq!(
        (&delivered[..], fetches),
        (&["one", "other"].map(String::from)[..], 0)
    );
    let (delivered, fetches) = flush(LOOK, DELIVERY);
    assert_eq!((&delivered[..], fetches), (&["one".to_owned()][..], 1));
}
