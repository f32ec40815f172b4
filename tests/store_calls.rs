//! The client: every reply, lost connections, unknown scripts, what a server has to be.
//!
//! In:     commands, on servers that fail.
//! Keeps:  every reply is that of its command.
//! Source: docs/store.md 2.

use std::time::Duration;

use redis::Value;
use shared::{
    ids::{ProjectId, TraceId},
    shard::{BucketId, ShardId},
    time::{Clock, UnixMillis},
};
use stand::{proxy::Proxy, redis::Redis};
use store::{
    client::{CheckError, Client, Command, CommandError, Refusal, WHOLE_BYTES, reply},
    keys::{Bucket, Member, journal_key, meta_key, position_key},
    scripts::{PositionCall, PositionReply},
};

use crate::store_scripts::{client, config};

const BUCKET: Bucket = Bucket {
    slice: None,
    shard: ShardId(0),
    bucket: BucketId(0),
};

fn member() -> Member {
    Member::new(ProjectId(1), &TraceId::new(b"t"))
}

fn position(next: u64) -> Command {
    PositionCall {
        bucket: BUCKET,
        before: None,
        next,
        clock: UnixMillis(1),
        spans: 1,
        instance: "inst",
        ttl: Duration::from_secs(60),
        counts: &[],
    }
    .command()
}

#[test]
fn every_command_gets_its_own_reply() {
    let redis = Redis::start().unwrap();
    let mut client = client(&redis, Duration::from_secs(2));
    redis::cmd("SET")
        .arg(journal_key(BUCKET, &member()))
        .arg("no hash")
        .exec(&mut redis.connection().unwrap())
        .unwrap();
    // More than one slice, a refusal in the middle, and a script that the server does not know.
    let mut commands = vec![Command::queue_len(BUCKET); 1_500];
    commands[700] = Command::entries(BUCKET, &member());
    commands[1_200] = position(5);
    commands[1_400] = Command::position(BUCKET);
    let replies = client.run(&commands);
    assert_eq!(replies.len(), 1_500);
    for (place, reply) in replies.into_iter().enumerate() {
        match (place, reply) {
            (
                700,
                Err(CommandError::Refused {
                    kind: Refusal::Wrong,
                    command,
                    ..
                }),
            ) => assert_eq!(command, "HLEN"),
            (1_200, Ok(value)) => {
                assert_eq!(PositionReply::read(&value), Ok(PositionReply::Written))
            }
            // The script was unknown, and ran behind all the others.
            (1_400, Ok(value)) => assert_eq!(value, Value::Nil),
            (_, reply) => assert_eq!(reply.unwrap(), Value::Int(0), "{place}"),
        }
    }
    assert_eq!(
        reply::offset(&client.run(&[Command::position(BUCKET)]).remove(0).unwrap()),
        Some(5)
    );
}

#[test]
fn whole_journals_are_left_out_where_there_is_no_room_and_the_others_keep_their_places() {
    const JOURNALS: u8 = 100;
    const BYTES: usize = 200_000;
    let redis = Redis::start().unwrap();
    let mut client = client(&redis, Duration::from_secs(2));
    let member = |number: u8| Member::new(ProjectId(number.into()), &TraceId::new(b"t"));
    // The last one is small, and fits where larger ones do not.
    let chunk = |number| vec![number; if number + 1 == JOURNALS { 1 } else { BYTES }];
    let numbers = || 0..JOURNALS;
    let inserts = numbers().map(|number| {
        let entry = (vec![number], chunk(number));
        Command::insert(BUCKET, &member(number), &[entry])
    });
    assert!(
        client
            .run(&inserts.collect::<Vec<_>>())
            .iter()
            .all(Result::is_ok)
    );
    let mut commands: Vec<Command> = numbers()
        .map(|number| Command::whole_journal(BUCKET, &member(number), 1))
        .collect();
    commands.push(Command::entries(BUCKET, &member(0)));
    let mut replies: Vec<Value> = client
        .run(&commands)
        .into_iter()
        .map(Result::unwrap)
        .collect();
    assert_eq!(replies.pop(), Some(Value::Int(1)));
    let mut whole = Vec::new();
    for (number, reply) in numbers().zip(replies) {
        if reply != Value::Nil {
            assert_eq!(
                reply::pairs(reply).unwrap(),
                [(vec![number], chunk(number))]
            );
            whole.push(number);
        }
    }
    let most = u8::try_from(WHOLE_BYTES / BYTES).unwrap();
    assert_eq!(whole, (0..most).chain([JOURNALS - 1]).collect::<Vec<_>>());
}

#[test]
fn a_lost_connection_takes_no_reply_for_anothers_and_is_made_anew() {
    let redis = Redis::start().unwrap();
    let proxy = Proxy::start(&redis.address()).unwrap();
    let mut settings = config(&redis, Duration::from_millis(300));
    settings.nodes = vec![proxy.address()];
    let mut client = Client::new(&settings).unwrap();
    let hold = proxy.hold_reply("ZCARD");
    let begun = Clock::mono_now();
    let replies = client.run(&[
        Command::position(BUCKET),
        Command::queue_len(BUCKET),
        Command::position(BUCKET),
    ]);
    assert!(
        hold.reached(Duration::from_secs(5)),
        "the reply was not held"
    );
    assert!(
        Clock::mono_now().since(begun) < Duration::from_secs(3),
        "one time-out ends a run"
    );
    assert!(
        replies[1..]
            .iter()
            .all(|reply| matches!(reply, Err(error) if error.is_lost() && error.is_outage())),
        "{replies:?}"
    );
    hold.release();
    redis::cmd("HSET")
        .arg(position_key(BUCKET))
        .arg("next")
        .arg(77)
        .exec(&mut redis.connection().unwrap())
        .unwrap();
    let replies = client.run(&[Command::position(BUCKET), Command::queue_len(BUCKET)]);
    assert_eq!(
        reply::offset(replies[0].as_ref().unwrap()),
        Some(77),
        "{replies:?}"
    );
    assert_eq!(replies[1].as_ref().unwrap(), &Value::Int(0));
    proxy.cut();
    assert!(client.run(&[Command::position(BUCKET)])[0].is_err());
    assert!(client.run(&[Command::position(BUCKET)])[0].is_ok());
}

#[test]
fn a_server_that_is_away_or_stands_still_is_an_outage_in_time() {
    let mut redis = Redis::start().unwrap();
    let mut client = client(&redis, Duration::from_millis(300));
    assert!(client.run(&[Command::position(BUCKET)])[0].is_ok());
    redis.pause().unwrap();
    let begun = Clock::mono_now();
    let replies = client.run(&vec![Command::position(BUCKET); 3_000]);
    assert!(Clock::mono_now().since(begun) < Duration::from_secs(3));
    assert!(
        replies
            .iter()
            .all(|reply| matches!(reply, Err(error) if error.is_lost()))
    );
    redis.resume().unwrap();
    assert!(client.run(&[Command::position(BUCKET)])[0].is_ok());
    redis.stop().unwrap();
    let error = client.check().unwrap_err();
    assert!(
        error.is_outage() && error.to_string().contains(&redis.address()),
        "{error}"
    );
}

#[test]
fn servers_that_would_lose_spans_are_refused() {
    let redis =
        Redis::start_with(&[("maxmemory", "50mb"), ("maxmemory-policy", "allkeys-lru")]).unwrap();
    let mut client = client(&redis, Duration::from_secs(2));
    let error = client.check().unwrap_err();
    assert!(
        matches!(error, CheckError::Evicts { .. }) && !error.is_outage(),
        "{error}"
    );
    redis.config_set("maxmemory-policy", "noeviction").unwrap();
    assert_eq!(client.check().unwrap()[0].maxmemory, 50 << 20);
    let mut connection = redis.connection().unwrap();
    redis::cmd("REPLICAOF")
        .arg("127.0.0.1")
        .arg(1)
        .exec(&mut connection)
        .unwrap();
    let error = client.check().unwrap_err();
    assert!(
        matches!(error, CheckError::ReadOnly { .. }) && error.is_outage(),
        "{error}"
    );
    let refused = client.run(&[position(1)]).remove(0).unwrap_err();
    assert!(refused.is_outage(), "{refused}");
}

#[test]
fn a_store_is_described_once_and_another_layout_is_refused() {
    let redis = Redis::start().unwrap();
    let mut client = client(&redis, Duration::from_secs(2));
    let shards = "0-3".parse().unwrap();
    let meta = client.meta(&shards).unwrap();
    assert_eq!(client.meta(&shards).unwrap(), meta);
    assert_eq!(meta.instance.len(), 32);
    let mut connection = redis.connection().unwrap();
    let ttl: i64 = redis::cmd("TTL")
        .arg(meta_key(None))
        .query(&mut connection)
        .unwrap();
    assert_eq!(ttl, -1);

    // The key is gone while positions stand: the id is taken from them.
    client.run(&[position(5)]).remove(0).unwrap();
    redis::cmd("DEL")
        .arg(meta_key(None))
        .exec(&mut connection)
        .unwrap();
    assert_eq!(client.meta(&shards).unwrap().instance, "inst");

    // A described store is only read: a full server does not keep a worker from starting.
    redis.config_set("maxmemory", "1").unwrap();
    assert_eq!(client.meta(&shards).unwrap().instance, "inst");
    redis.config_set("maxmemory", "0").unwrap();

    redis::cmd("HSET")
        .arg(meta_key(None))
        .arg("layout")
        .arg("9")
        .exec(&mut connection)
        .unwrap();
    let error = client.meta(&shards).unwrap_err();
    assert!(
        matches!(error, CheckError::OtherStore { what: "layout", .. }) && !error.is_outage(),
        "{error}"
    );
}
