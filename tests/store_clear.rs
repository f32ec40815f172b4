//! Large clears and clears of several traces: what each leaves, and what one of them that fails does to the others.
//!
//! In:     journals, one of them no journal, or no sum; calls that say wrongly what goes.
//! Keeps:  a trace is cleared and counted, or neither.
//! Source: docs/store.md 4.

use std::{collections::BTreeMap, time::Duration};

use shared::time::UnixMillis;
use stand::redis::Redis;
use store::{
    client::{Client, Command, reply},
    keys::{Member, journal_key, queue_key, sum_key},
    scripts::{ClearCall, ClearReply, ClearTrace, FieldOut, QueueCall, QueueMode},
};

use crate::store_scripts::{BUCKET, TTL, assert_ttl, client, member, run_all, run_clear, ttl};

/// A trace with one entry, in its queue.
fn put(client: &mut Client, trace: u64) {
    let entries = [(b"a".to_vec(), b"chunk".to_vec())];
    let commands = [
        Command::insert(BUCKET, &member(trace), &entries),
        Command::enqueue(BUCKET, &[(member(trace), UnixMillis(5))]),
    ];
    run_all(client, &commands);
}

/// Clears that entry of some traces.
fn clear_of(traces: std::ops::Range<u64>) -> ClearCall {
    let of_trace = |trace| ClearTrace {
        member: member(trace),
        next_look: None,
        fields: vec![FieldOut {
            field: b"a".to_vec(),
            produced: 2,
            repeats: 0,
            dropped: Vec::new(),
        }],
    };
    ClearCall {
        bucket: BUCKET,
        ttl: TTL,
        traces: traces.map(of_trace).collect(),
    }
}

fn put_foreign(redis: &Redis, key: &[u8]) {
    let mut connection = redis.connection().unwrap();
    let set = redis::cmd("SET").arg(key).arg("foreign").take();
    set.exec(&mut connection).unwrap();
}

#[test]
fn a_key_of_another_type_keeps_back_its_own_trace_alone() {
    let redis = Redis::start().unwrap();
    let mut client = client(&redis, Duration::from_secs(5));
    (0..3).step_by(2).for_each(|trace| put(&mut client, trace));
    put_foreign(&redis, &journal_key(BUCKET, &member(1)));
    let enqueue = Command::enqueue(BUCKET, &[(member(1), UnixMillis(5))]);
    run_all(&mut client, &[enqueue]);
    let call = clear_of(0..3);
    let value = run_all(&mut client, &[call.command()]).remove(0);
    let replies = ClearReply::read(&value, &call).unwrap();
    let cleared = Ok(ClearReply {
        removed: 1,
        left: 0,
    });
    assert_eq!((&replies[0], &replies[2]), (&cleared, &cleared));
    let words = replies[1].as_ref().unwrap_err().to_string();
    assert!(words.contains("WRONGTYPE"), "{words}");
    let commands = [Command::sum(BUCKET), Command::queued(BUCKET, 0, 9)];
    let answers = run_all(&mut client, &commands);
    assert_eq!(
        reply::counters(&answers[0]),
        [("produced".to_owned(), 4)],
        "the foreign key counts for nothing"
    );
    let queued = reply::list(&answers[1]).unwrap();
    assert_eq!(queued, [member(1).as_bytes().to_vec()]);
}

#[test]
fn a_sum_that_is_none_keeps_back_all_that_could_not_be_counted() {
    let redis = Redis::start().unwrap();
    let mut client = client(&redis, Duration::from_secs(5));
    (0..2).for_each(|trace| put(&mut client, trace));
    put_foreign(&redis, &sum_key(BUCKET));
    let refused = client.run(&[clear_of(0..2).command()]).remove(0);
    let words = refused.unwrap_err().to_string();
    assert!(words.contains("WRONGTYPE"), "{words}");
    let commands = [0, 1].map(|trace| Command::entries(BUCKET, &member(trace)));
    let left = run_all(&mut client, &commands);
    assert_eq!(left.iter().map(reply::count).collect::<Vec<_>>(), [1, 1]);
    let queued = run_all(&mut client, &[Command::queue_len(BUCKET)]);
    assert_eq!(reply::count(&queued[0]), 2);
}

#[test]
fn a_call_that_says_wrongly_what_goes_is_refused_before_it_writes() {
    let redis = Redis::start().unwrap();
    let mut client = client(&redis, Duration::from_secs(5));
    put(&mut client, 0);
    let mut connection = redis.connection().unwrap();
    let mut call = |plan: &str, fields: &[&str]| {
        let mut eval = redis::cmd("EVAL");
        eval.arg(include_str!("../lua/clear.lua")).arg(3);
        eval.arg(queue_key(BUCKET)).arg(sum_key(BUCKET));
        eval.arg(journal_key(BUCKET, &member(0)));
        eval.arg(1_000).arg(1_000).arg(plan).arg(fields);
        eval.query::<Vec<u64>>(&mut connection)
    };
    for (plan, fields) in [
        ("", &["a"][..]),
        ("7", &["a"]),
        ("[1,false]", &["a"]),
        ("[1,false,2]", &[]),
        ("[1,false,2]", &["a", "b"]),
        ("[1,false,2,2]", &["a"]),
        ("[1,null,2]", &["a"]),
        ("[1,\"7\",2]", &["a"]),
        ("[-1,false,2]", &["a"]),
        ("[1,false,-2]", &["a"]),
        ("[1,false,1.5]", &["a"]),
        ("[1,false,1e999]", &["a"]),
        ("[1,false,[2,1]]", &["a"]),
        ("[1,false,[2,1,[[\"corrupt\"]]]]", &["a"]),
        ("[1,false,[2,1,[[3,4]]]]", &["a"]),
        ("[1,false,[2,1,[4]]]", &["a"]),
    ] {
        let refused = call(plan, fields).unwrap_err().to_string();
        assert!(refused.contains("script"), "{plan}: {refused}");
    }
    let commands = [
        Command::entries(BUCKET, &member(0)),
        Command::sum(BUCKET),
        Command::queue_len(BUCKET),
    ];
    let answers = run_all(&mut client, &commands);
    assert_eq!(reply::count(&answers[0]), 1);
    assert!(reply::counters(&answers[1]).is_empty());
    assert_eq!(reply::count(&answers[2]), 1);
    let cleared = call("[1,false,[2,1,[[\"corrupt\",3]]]]", &["a"]);
    assert_eq!(cleared.unwrap(), [1, 0]);
    let mut counters = reply::counters(&run_all(&mut client, &commands)[1]);
    counters.sort();
    let expected = [("dropped:corrupt", 3), ("produced", 2), ("repeats", 1)];
    assert_eq!(
        counters,
        expected.map(|(name, amount)| (name.to_owned(), amount))
    );
}

#[test]
fn what_a_clear_leaves_lives_on() {
    let redis = Redis::start().unwrap();
    let mut client = client(&redis, Duration::from_secs(5));
    let mut connection = redis.connection().unwrap();
    put(&mut client, 0);
    let commands = [
        Command::insert(BUCKET, &member(0), &[(b"b".to_vec(), b"chunk".to_vec())]),
        Command::set_in_sum(BUCKET, "produced", 1),
    ];
    run_all(&mut client, &commands);
    let keys = [
        (journal_key(BUCKET, &member(0)), TTL),
        (queue_key(BUCKET), 2 * TTL),
        (sum_key(BUCKET), 2 * TTL),
    ];
    for (key, _) in &keys {
        let expire = redis::cmd("EXPIRE").arg(key).arg(60).take();
        expire.exec(&mut connection).unwrap();
    }
    let reply = ClearReply {
        removed: 1,
        left: 1,
    };
    assert_eq!(run_clear(&mut client, &clear_of(0..1)), [reply]);
    for (key, expected) in keys {
        assert!(ttl(&mut connection, &key).is_some());
        assert_ttl(&mut connection, &key, expected);
    }
}

#[test]
fn many_members_go_in_one_call() {
    let redis = Redis::start().unwrap();
    let mut client = client(&redis, Duration::from_secs(5));
    let members: Vec<(Member, UnixMillis)> = (0..10_001)
        .map(|trace| (member(trace), UnixMillis(trace)))
        .collect();
    let call = QueueCall {
        bucket: BUCKET,
        ttl: TTL,
        mode: QueueMode::Lower,
        members,
    };
    let lowered = run_all(&mut client, &[call.command()]);
    assert_eq!(reply::count(&lowered[0]), 10_001);
    let queued = run_all(
        &mut client,
        &[Command::due(BUCKET, UnixMillis(10_000), 10_001)],
    );
    let members = (0..10_001).map(|trace| (member(trace).as_bytes().to_vec(), UnixMillis(trace)));
    assert!(reply::scored(&queued[0]).into_iter().eq(members));
    // More than Lua passes at once, of both kinds: those that are gone, and those that stay.
    let stays = [(b"x".to_vec(), b"chunk".to_vec())];
    let inserts: Vec<Command> = (2..5_002)
        .map(|trace| Command::insert(BUCKET, &member(trace), &stays))
        .collect();
    run_all(&mut client, &inserts);
    let traces = (1..10_001).map(|trace| ClearTrace {
        member: member(trace),
        next_look: Some(UnixMillis(1)),
        fields: Vec::new(),
    });
    let call = ClearCall {
        bucket: BUCKET,
        ttl: TTL,
        traces: traces.collect(),
    };
    let replies = run_clear(&mut client, &call);
    let left = |left| ClearReply { removed: 0, left };
    assert_eq!(replies[0], left(0));
    assert!(replies[1..5_001].iter().all(|reply| *reply == left(1)));
    assert!(replies[5_001..].iter().all(|reply| *reply == left(0)));
    // Trace 0 was not named, 5,000 stay.
    let queued = run_all(&mut client, &[Command::queue_len(BUCKET)]);
    assert_eq!(reply::count(&queued[0]), 5_001);
}

#[test]
fn many_fields_go_in_one_call() {
    let redis = Redis::start().unwrap();
    let mut client = client(&redis, Duration::from_secs(5));
    let entries: Vec<(Vec<u8>, Vec<u8>)> = (0..9_000_u32)
        .map(|field| (field.to_be_bytes().to_vec(), vec![1]))
        .collect();
    run_all(
        &mut client,
        &[Command::insert(BUCKET, &member(1), &entries)],
    );
    let fields = entries.into_iter().map(|(field, _)| FieldOut {
        field,
        produced: 1,
        repeats: 0,
        dropped: vec![("corrupt", 2)],
    });
    let call = ClearCall {
        bucket: BUCKET,
        ttl: TTL,
        traces: vec![ClearTrace {
            member: member(1),
            next_look: None,
            fields: fields.collect(),
        }],
    };
    let reply = ClearReply {
        removed: 9_000,
        left: 0,
    };
    assert_eq!(run_clear(&mut client, &call), [reply]);
    let sum = reply::counters(&run_all(&mut client, &[Command::sum(BUCKET)])[0]);
    assert_eq!(
        BTreeMap::from_iter(sum),
        BTreeMap::from([
            ("produced".to_owned(), 9_000),
            ("dropped:corrupt".to_owned(), 18_000)
        ])
    );
}
