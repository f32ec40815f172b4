//! Random steps of all scripts against a model of one bucket.
//!
//! In:     seeded steps.
//! Keeps:  Redis holds what the model holds, after every step.
//! Source: docs/store.md 1–4.

use std::{collections::BTreeMap, time::Duration};

use redis::Connection;
use shared::{
    config::Redis as RedisConfig,
    ids::{ProjectId, TraceId},
    shard::{BucketId, ShardId},
    time::UnixMillis,
};
use stand::{redis::Redis, rng::Rng};
use store::{
    client::{Client, Command, reply},
    keys::{Bucket, Member, journal_key, position_key, queue_key, sum_key},
    scripts::{
        ClearCall, ClearReply, ClearTrace, FieldOut, PositionCall, PositionReply, QueueCall,
        QueueMode,
    },
};

pub(crate) const BUCKET: Bucket = Bucket {
    slice: None,
    shard: ShardId(3),
    bucket: BucketId(0),
};
const NEIGHBOUR: Bucket = Bucket {
    slice: None,
    shard: ShardId(4),
    bucket: BucketId(0),
};
pub(crate) const TTL: Duration = Duration::from_secs(1_000);
const REASONS: [&str; 2] = ["corrupt", "too_large"];
const COUNTERS: [&str; 2] = ["refused:dlq_off", "refused:dlq_too_large"];

pub(crate) fn client(redis: &Redis, timeout: Duration) -> Client {
    Client::new(&config(redis, timeout)).unwrap()
}

/// Runs commands that none may refuse.
pub(crate) fn run_all(client: &mut Client, commands: &[Command]) -> Vec<redis::Value> {
    let replies = client.run(commands).into_iter();
    replies.map(Result::unwrap).collect()
}

pub(crate) fn config(redis: &Redis, timeout: Duration) -> RedisConfig {
    let environment = [
        ("SPANBUF_REDIS__NODES".into(), redis.address().into()),
        ("SPANBUF_SUPERVISION__SHARDS".into(), "0-7".into()),
    ];
    let config =
        shared::config::Config::load(None, environment.into_iter(), &Default::default()).unwrap();
    RedisConfig {
        timeout,
        ..config.redis
    }
}

/// What one bucket should hold.
#[derive(Debug, Default, PartialEq, Eq)]
struct Model {
    journals: BTreeMap<u64, BTreeMap<Vec<u8>, Vec<u8>>>,
    queue: BTreeMap<u64, u64>,
    sum: BTreeMap<String, u64>,
    position: Option<(u64, u64, u64)>,
}

pub(crate) fn member(trace: u64) -> Member {
    Member::new(
        ProjectId(7),
        &TraceId::new(format!("trace-{trace}").as_bytes()),
    )
}

impl Model {
    fn lower(&mut self, trace: u64, score: u64) {
        let stands = self.queue.entry(trace).or_insert(score);
        *stands = (*stands).min(score);
    }

    fn clear(&mut self, traces: &[u64], call: &ClearCall) -> Vec<ClearReply> {
        let each = traces.iter().zip(&call.traces);
        each.map(|(&trace, of_trace)| self.clear_one(trace, of_trace))
            .collect()
    }

    fn clear_one(&mut self, trace: u64, call: &ClearTrace) -> ClearReply {
        let journal = self.journals.entry(trace).or_default();
        let mut removed = 0;
        for out in &call.fields {
            if journal.remove(&out.field).is_none() {
                continue;
            }
            removed += 1;
            let dropped = out
                .dropped
                .iter()
                .map(|(reason, spans)| (format!("dropped:{reason}"), *spans));
            for (name, amount) in [
                ("produced".to_owned(), out.produced),
                ("repeats".to_owned(), out.repeats),
            ]
            .into_iter()
            .chain(dropped)
            {
                if amount > 0 {
                    *self.sum.entry(name).or_default() += amount;
                }
            }
        }
        let left = u64::try_from(journal.len()).unwrap();
        if left == 0 {
            self.journals.remove(&trace);
            self.queue.remove(&trace);
        } else if let Some(next_look) = call.next_look {
            self.lower(trace, next_look.0);
        }
        ClearReply { removed, left }
    }

    /// What Redis holds of the same bucket.
    fn read(connection: &mut Connection) -> Self {
        let mut model = Self::default();
        for trace in 0..4 {
            let journal: BTreeMap<Vec<u8>, Vec<u8>> = redis::cmd("HGETALL")
                .arg(journal_key(BUCKET, &member(trace)))
                .query(connection)
                .unwrap();
            if !journal.is_empty() {
                model.journals.insert(trace, journal);
            }
            let score: Option<f64> = redis::cmd("ZSCORE")
                .arg(queue_key(BUCKET))
                .arg(member(trace).as_bytes())
                .query(connection)
                .unwrap();
            if let Some(score) = score {
                model
                    .queue
                    .insert(trace, format!("{score:.0}").parse().unwrap());
            }
        }
        model.sum = redis::cmd("HGETALL")
            .arg(sum_key(BUCKET))
            .query(connection)
            .unwrap();
        let position: BTreeMap<String, String> = redis::cmd("HGETALL")
            .arg(position_key(BUCKET))
            .query(connection)
            .unwrap();
        let number = |name: &str| position.get(name).map(|text| text.parse::<u64>().unwrap());
        model.position =
            number("next").map(|next| (next, number("clock").unwrap(), number("spans").unwrap()));
        model
    }
}

/// The TTL of a key, if it is there.
pub(crate) fn ttl(connection: &mut Connection, key: &[u8]) -> Option<Duration> {
    let left: i64 = redis::cmd("PTTL").arg(key).query(connection).unwrap();
    match left {
        -2 => None,
        left => Some(Duration::from_millis(
            u64::try_from(left).expect("every key of a bucket has a TTL"),
        )),
    }
}

pub(crate) fn assert_ttl(connection: &mut Connection, key: &[u8], expected: Duration) {
    if let Some(left) = ttl(connection, key) {
        assert!(
            left <= expected && left > expected - Duration::from_secs(60),
            "{}: {left:?} of {expected:?}",
            key.escape_ascii()
        );
    }
}

#[test]
fn scripts_do_what_the_model_does() {
    let redis = Redis::start().unwrap();
    let mut client = client(&redis, Duration::from_secs(5));
    let mut connection = redis.connection().unwrap();
    let mut plant = |key: Vec<u8>| {
        redis::cmd("SET")
            .arg(key)
            .arg("untouched")
            .exec(&mut redis.connection().unwrap())
            .unwrap()
    };
    let bystanders = [
        queue_key(NEIGHBOUR),
        position_key(NEIGHBOUR),
        sum_key(NEIGHBOUR),
        journal_key(NEIGHBOUR, &member(0)),
        b"foreign".to_vec(),
    ];
    bystanders.iter().cloned().for_each(&mut plant);

    let seed = 20_261_124;
    let mut rng = Rng::new(seed);
    let mut model = Model::default();
    for step in 0..3_000 {
        let context = format!("seed {seed} step {step}");
        let trace = rng.below(4);
        match rng.below(6) {
            0 => insert(&mut client, &mut model, &mut rng, trace),
            1 => position(&mut client, &mut model, &mut rng, &context),
            2 => queue(&mut client, &mut model, &mut rng, &context),
            3 => small_changes(&mut client, &mut model, &mut rng, trace),
            _ => clear(&mut client, &mut model, &mut rng, &context),
        }
        assert_eq!(Model::read(&mut connection), model, "{context}");
        reads(&mut client, &model, &mut rng, &context);
        if step % 50 == 0 {
            for trace in 0..4 {
                assert_ttl(&mut connection, &journal_key(BUCKET, &member(trace)), TTL);
            }
            for key in [queue_key(BUCKET), position_key(BUCKET), sum_key(BUCKET)] {
                assert_ttl(&mut connection, &key, 2 * TTL);
            }
        }
    }
    for key in bystanders {
        let value: String = redis::cmd("GET").arg(&key).query(&mut connection).unwrap();
        assert_eq!(
            (&value[..], ttl_raw(&mut connection, &key)),
            ("untouched", -1),
            "{}",
            key.escape_ascii()
        );
    }
}

fn ttl_raw(connection: &mut Connection, key: &[u8]) -> i64 {
    redis::cmd("PTTL").arg(key).query(connection).unwrap()
}

fn insert(client: &mut Client, model: &mut Model, rng: &mut Rng, trace: u64) {
    let entries: Vec<(Vec<u8>, Vec<u8>)> = (0..=rng.below(3))
        .map(|_| {
            (
                vec![u8::try_from(rng.below(6)).unwrap(), 0, b'{'],
                rng.bits().to_be_bytes().to_vec(),
            )
        })
        .collect();
    let score = 1_000 + rng.below(1_000);
    let commands = [
        Command::insert(BUCKET, &member(trace), &entries),
        Command::expire_journal(BUCKET, &member(trace), TTL),
        Command::entries(BUCKET, &member(trace)),
        Command::enqueue(BUCKET, &[(member(trace), UnixMillis(score))]),
    ];
    let replies = run_all(client, &commands);
    let journal = model.journals.entry(trace).or_default();
    journal.extend(entries);
    assert_eq!(
        reply::count(&replies[2]),
        u64::try_from(journal.len()).unwrap()
    );
    model.lower(trace, score);
    let renewed: Vec<Command> = Command::renew(BUCKET, TTL).into();
    run_all(client, &renewed);
}

/// Every call that reads gives what the model holds.
fn reads(client: &mut Client, model: &Model, rng: &mut Rng, context: &str) {
    let (trace, now, limit) = (rng.below(4), 500 + rng.below(2_000), rng.below(4));
    reads_of_bucket(client, model, context);
    reads_of_queue(client, model, now, usize::try_from(limit).unwrap(), context);
    reads_of_journal(client, model, trace, context);
}

fn reads_of_bucket(client: &mut Client, model: &Model, context: &str) {
    let commands = [
        Command::position(BUCKET),
        Command::whole_position(BUCKET),
        Command::sum(BUCKET),
    ];
    let replies = run_all(client, &commands);
    assert_eq!(
        reply::offset(&replies[0]),
        model.position.map(|(next, ..)| next),
        "{context}"
    );
    let whole = reply::position(&replies[1])
        .map(|position| (position.next, position.clock.0, position.spans));
    assert_eq!(whole, model.position, "{context}");
    assert_eq!(
        BTreeMap::from_iter(reply::counters(&replies[2])),
        model.sum,
        "{context}"
    );
}

fn reads_of_queue(client: &mut Client, model: &Model, now: u64, limit: usize, context: &str) {
    let commands = [
        Command::due(BUCKET, UnixMillis(now), limit),
        Command::after(BUCKET, UnixMillis(now)),
        Command::queued(BUCKET, 1, 2),
        Command::queue_len(BUCKET),
    ];
    let replies = run_all(client, &commands);
    let mut queue: Vec<(Vec<u8>, UnixMillis)> = model
        .queue
        .iter()
        .map(|(&trace, &score)| (member(trace).as_bytes().to_vec(), UnixMillis(score)))
        .collect();
    queue.sort_by_key(|(member, score)| (*score, member.clone()));
    let (due, later): (Vec<_>, Vec<_>) =
        queue.iter().cloned().partition(|(_, score)| score.0 <= now);
    let first = |scored: Vec<_>, count| scored.into_iter().take(count).collect::<Vec<_>>();
    assert_eq!(reply::scored(&replies[0]), first(due, limit), "{context}");
    assert_eq!(reply::scored(&replies[1]), first(later, 1), "{context}");
    let members = queue.iter().map(|(member, _)| member.clone());
    assert_eq!(
        reply::list(&replies[2]).unwrap(),
        members.skip(1).take(2).collect::<Vec<_>>(),
        "{context}"
    );
    let length = u64::try_from(queue.len()).unwrap();
    assert_eq!(reply::count(&replies[3]), length, "{context}");
}

fn reads_of_journal(client: &mut Client, model: &Model, trace: u64, context: &str) {
    let fields = [vec![0, 0, b'{'], vec![1, 0, b'{'], vec![9]];
    let commands = [
        Command::entries(BUCKET, &member(trace)),
        Command::memory(BUCKET, &member(trace)),
        Command::headers(BUCKET, &member(trace)),
        Command::chunks(BUCKET, &member(trace), fields.iter().map(Vec::as_slice)),
        Command::whole_journal(BUCKET, &member(trace), fields.len()),
        Command::whole_journal(BUCKET, &member(trace), 1),
    ];
    let mut replies = run_all(client, &commands);
    let journal = model.journals.get(&trace).cloned().unwrap_or_default();
    let mut whole = |most: usize| {
        let pairs = reply::pairs(replies.pop().unwrap()).unwrap();
        match journal.len() > most {
            true => assert_eq!(pairs.len(), most + 1, "{context}"),
            false => assert_eq!(BTreeMap::from_iter(pairs), journal, "{context}"),
        }
    };
    whole(1);
    whole(fields.len());
    let length = u64::try_from(journal.len()).unwrap();
    assert_eq!(reply::count(&replies[0]), length, "{context}");
    let takes_memory = reply::count(&replies[1]) > 0;
    assert_eq!(takes_memory, !journal.is_empty(), "{context}");
    let mut headers = reply::list(&replies[2]).unwrap();
    headers.sort();
    let known: Vec<_> = journal.keys().cloned().collect();
    assert_eq!(headers, known, "{context}");
    let redis::Value::Array(chunks) = &replies[3] else {
        panic!("{context}: {:?}", replies[3])
    };
    let chunks: Vec<Option<Vec<u8>>> = chunks
        .iter()
        .map(|chunk| reply::bytes(chunk).map(<[u8]>::to_vec))
        .collect();
    let known: Vec<_> = fields
        .iter()
        .map(|field| journal.get(field).cloned())
        .collect();
    assert_eq!(chunks, known, "{context}");
}

/// The two calls that change one value: a counter of the sum, a member of the queue.
fn small_changes(client: &mut Client, model: &mut Model, rng: &mut Rng, trace: u64) {
    let amount = 1 + rng.below(5);
    let commands = [
        Command::set_in_sum(BUCKET, "dropped:expired", amount),
        Command::unqueue(BUCKET, member(trace).as_bytes()),
    ];
    run_all(client, &commands);
    model.sum.insert("dropped:expired".into(), amount);
    model.queue.remove(&trace);
    let renewed: Vec<Command> = Command::renew(BUCKET, TTL).into();
    run_all(client, &renewed);
}

fn position(client: &mut Client, model: &mut Model, rng: &mut Rng, context: &str) {
    let stands = model.position.map(|(next, ..)| next);
    let before = if rng.chance(700) {
        stands
    } else {
        Some(rng.below(50)).filter(|_| rng.chance(500))
    };
    let (next, clock, spans) = (
        before.unwrap_or(0) + rng.below(5),
        rng.below(1 << 50),
        rng.below(10),
    );
    let counts: Vec<_> = COUNTERS
        .iter()
        .map(|counter| (*counter, rng.below(3)))
        .filter(|(_, amount)| *amount > 0)
        .collect();
    let call = PositionCall {
        bucket: BUCKET,
        before,
        next,
        clock: UnixMillis(clock),
        spans,
        instance: "i",
        ttl: TTL,
        counts: &counts,
    };
    let reply = PositionReply::read(&client.run(&[call.command()]).remove(0).unwrap()).unwrap();
    if before == stands {
        let inserted = model.position.map_or(0, |(.., spans)| spans);
        model.position = Some((next, clock, inserted + spans));
        for (counter, amount) in counts {
            *model.sum.entry(counter.to_owned()).or_default() += amount;
        }
        assert_eq!(reply, PositionReply::Written, "{context}");
    } else {
        assert_eq!(reply, PositionReply::Stands(stands), "{context}");
    }
}

fn queue(client: &mut Client, model: &mut Model, rng: &mut Rng, context: &str) {
    let mode = if rng.chance(500) {
        QueueMode::Lift
    } else {
        QueueMode::Lower
    };
    let members: BTreeMap<u64, u64> = (0..rng.below(3))
        .map(|_| (rng.below(4), 500 + rng.below(2_000)))
        .collect();
    let before = model.queue.clone();
    for (&trace, &score) in &members {
        match mode {
            QueueMode::Lift => drop(model.queue.get_mut(&trace).map(|stands| *stands = score)),
            QueueMode::Lower => model.lower(trace, score),
        }
    }
    let changed = model
        .queue
        .iter()
        .filter(|(trace, score)| before.get(trace) != Some(score))
        .count();
    let members = members
        .into_iter()
        .map(|(trace, score)| (member(trace), UnixMillis(score)))
        .collect();
    let call = QueueCall {
        bucket: BUCKET,
        ttl: TTL,
        mode,
        members,
    };
    let reply = client.run(&[call.command()]).remove(0);
    if call.members.is_empty() {
        assert_eq!(reply::count(&reply.unwrap()), 0, "{context}");
    } else {
        assert_eq!(
            reply::count(&reply.unwrap()),
            u64::try_from(changed).unwrap(),
            "{context}"
        );
    }
}

fn clear(client: &mut Client, model: &mut Model, rng: &mut Rng, context: &str) {
    let field = |rng: &mut Rng| FieldOut {
        field: vec![u8::try_from(rng.below(6)).unwrap(), 0, b'{'],
        produced: rng.below(4),
        repeats: rng.below(2),
        dropped: REASONS
            .iter()
            .filter_map(|reason| Some((*reason, 1 + rng.below(3))).filter(|_| rng.chance(200)))
            .collect::<Vec<_>>(),
    };
    // Now and then none, or one of them twice.
    let traces: Vec<u64> = (0..rng.below(4)).map(|_| rng.below(4)).collect();
    let of_trace = |&trace: &u64| ClearTrace {
        member: member(trace),
        next_look: rng.chance(600).then(|| UnixMillis(700 + rng.below(1_000))),
        fields: (0..rng.below(5)).map(|_| field(rng)).collect(),
    };
    let call = ClearCall {
        bucket: BUCKET,
        ttl: TTL,
        traces: traces.iter().map(of_trace).collect(),
    };
    let expected = model.clear(&traces, &call);
    assert_eq!(run_clear(client, &call), expected, "{context}");
    if rng.chance(300) {
        // Not answered, and so repeated: nothing is counted twice.
        let expected = model.clear(&traces, &call);
        assert_eq!(run_clear(client, &call), expected, "{context}");
    }
}

pub(crate) fn run_clear(client: &mut Client, call: &ClearCall) -> Vec<ClearReply> {
    let value = client.run(&[call.command()]).remove(0).unwrap();
    let replies = ClearReply::read(&value, call).unwrap();
    replies.into_iter().map(Result::unwrap).collect()
}
