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
    client::{Command, CommandError, Refusal, reply},
    keys::{Bucket, Member},
    scripts::{
        ClearCall, ClearReply, ClearTrace, FieldOut, PositionCall, PositionReply, QueueCall,
        QueueMode,
    },
};

use crate::store_scripts::client;

const BUCKET: Bucket = Bucket {
    slice: None,
    shard: ShardId(0),
    bucket: BucketId(0),
};
const TTL: Duration = Duration::from_secs(1_000);

#[test]
fn a_full_server_takes_no_entries_and_every_clean_up() {
    let redis = Redis::start_with(&[("maxmemory-policy", "noeviction")]).unwrap();
    let mut client = client(&redis, Duration::from_secs(5));
    let member = Member::new(ProjectId(1), &TraceId::new(b"t"));
    let other = Member::new(ProjectId(1), &TraceId::new(b"u"));
    let field = |name: &str| (name.as_bytes().to_vec(), vec![b'x'; 1_000]);
    let insert = [
        Command::insert(BUCKET, &member, &[field("a"), field("b")]),
        Command::enqueue(BUCKET, &[(member.clone(), UnixMillis(5))]),
    ];
    client
        .run(&insert)
        .into_iter()
        .for_each(|reply| drop(reply.unwrap()));
    redis.config_set("maxmemory", "1").unwrap();

    let refused = client.run(&[
        Command::insert(BUCKET, &other, &[field("c")]),
        Command::enqueue(BUCKET, &[(other.clone(), UnixMillis(5))]),
    ]);
    for reply in refused {
        let error = reply.unwrap_err();
        assert!(
            matches!(
                error,
                CommandError::Refused {
                    kind: Refusal::Full,
                    ..
                }
            ),
            "{error}"
        );
        assert!(error.is_outage() && !error.is_lost(), "{error}");
    }

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
    let written = client.run(&[position.command()]).remove(0).unwrap();
    assert_eq!(PositionReply::read(&written), Ok(PositionReply::Written));
    let lift = QueueCall {
        bucket: BUCKET,
        ttl: TTL,
        mode: QueueMode::Lift,
        members: vec![(member.clone(), UnixMillis(50))],
    };
    assert_eq!(
        reply::count(&client.run(&[lift.command()]).remove(0).unwrap()),
        1
    );
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
    let cleared = ClearReply::read(&client.run(&[clear.command()]).remove(0).unwrap(), &clear);
    let reply = |removed, left| Ok(ClearReply { removed, left });
    assert_eq!(cleared, Ok(vec![reply(1, 1), reply(0, 0)]));
    let due = Command::due(BUCKET, UnixMillis(7), 9);
    assert_eq!(
        reply::scored(&client.run(&[due]).remove(0).unwrap()),
        [(member.as_bytes().to_vec(), UnixMillis(7))]
    );
}
