//! A full Redis: what is refused, and that cleaning up works.
//!
//! In:     a server at its `maxmemory`.
//! Keeps:  what cleans up is taken.
//! Source: docs/store.md 4.

use std::time::Duration;

use shared::{
    ids::{ProjectId, TraceId},
    shard::{BucketId, ShardId},
    time::UnixMillis,
};
use stand::redis::Redis;
use store::{
    client::{Client, Command, Refusal, reply},
    keys::{Bucket, Member},
    scripts::{
        ClearCall, ClearReply, ClearTrace, FieldOut, PositionCall, PositionReply, QueueCall,
        QueueMode,
    },
};

use crate::store_scripts::{client, run_all};

const BUCKET: Bucket = Bucket {
    slice: None,
    shard: ShardId(0),
    bucket: BucketId(0),
};
const TTL: Duration = Duration::from_secs(1_000);

/// A trace with two entries on a server that is full now.
fn full() -> (Redis, Client, Member) {
    let redis = Redis::start_with(&[("maxmemory-policy", "noeviction")]).unwrap();
    let mut client = client(&redis, Duration::from_secs(5));
    let member = Member::new(ProjectId(1), &TraceId::new(b"t"));
    let insert = [
        Command::insert(BUCKET, &member, &[field("a"), field("b")]),
        Command::enqueue(BUCKET, &[(member.clone(), UnixMillis(5))]),
    ];
    run_all(&mut client, &insert);
    redis.config_set("maxmemory", "1").unwrap();
    (redis, client, member)
}

fn field(name: &str) -> (Vec<u8>, Vec<u8>) {
    (name.as_bytes().to_vec(), vec![b'x'; 1_000])
}

#[test]
fn a_full_server_takes_no_entries() {
    let (_redis, mut client, _) = full();
    let other = Member::new(ProjectId(1), &TraceId::new(b"u"));
    let refused = client.run(&[
        Command::insert(BUCKET, &other, &[field("c")]),
        Command::enqueue(BUCKET, &[(other.clone(), UnixMillis(5))]),
    ]);
    for reply in refused {
        let error = reply.unwrap_err();
        assert!(error.is_refused_as(Refusal::Full), "{error}");
        assert!(error.is_outage() && !error.is_lost(), "{error}");
    }
}

#[test]
fn a_full_server_takes_every_clean_up() {
    let (_redis, mut client, member) = full();
    // Scripts may be unknown to the server: they are loaded although it is full.
    let position = PositionCall {
        bucket: BUCKET,
        before: None,
        next: 2,
        clock: UnixMillis(9),
        spans: 2,
        instance: "i",
        ttl: TTL,
        counts: &[],
    };
    let written = run_all(&mut client, &[position.command()]);
    assert_eq!(PositionReply::read(&written[0]), Ok(PositionReply::Written));
    let lift = QueueCall {
        bucket: BUCKET,
        ttl: TTL,
        mode: QueueMode::Lift,
        members: vec![(member.clone(), UnixMillis(50))],
    };
    let lifted = run_all(&mut client, &[lift.command()]);
    assert_eq!(reply::count(&lifted[0]), 1);
    let out = FieldOut {
        field: b"a".to_vec(),
        produced: 1,
        repeats: 0,
        dropped: Vec::new(),
    };
    let trace = |member, fields| ClearTrace {
        member,
        next_look: Some(UnixMillis(7)),
        fields,
    };
    let clear = ClearCall {
        bucket: BUCKET,
        ttl: TTL,
        traces: vec![
            trace(member.clone(), vec![out]),
            trace(Member::new(ProjectId(1), &TraceId::new(b"gone")), vec![]),
        ],
    };
    let cleared = run_all(&mut client, &[clear.command()]);
    let reply = |removed, left| Ok(ClearReply { removed, left });
    assert_eq!(
        ClearReply::read(&cleared[0], &clear),
        Ok(vec![reply(1, 1), reply(0, 0)])
    );
    let due = run_all(&mut client, &[Command::due(BUCKET, UnixMillis(7), 9)]);
    assert_eq!(
        reply::scored(&due[0]),
        [(member.as_bytes().to_vec(), UnixMillis(7))]
    );
}
