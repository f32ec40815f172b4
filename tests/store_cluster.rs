//! The client on a cluster: every reply, moving slots, nodes that are away, what its nodes have to be.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use redis::Value;
use shared::{
    config::{Config, Flags},
    ids::{ProjectId, TraceId},
    shard::ShardId,
    time::{Clock, UnixMillis},
};
use stand::{
    cluster::{Cluster, MASTERS},
    proxy::Proxy,
    redis::Redis,
};
use store::{
    client::{CheckError, Client, Command, Reply, reply},
    keys::{Bucket, Member, journal_key, position_key},
    scripts::{ClearCall, ClearReply, ClearTrace, FieldOut, PositionCall, PositionReply},
};

const SHARDS: u32 = 4;
const BUCKETS: u32 = 4;
const TTL: Duration = Duration::from_secs(60);

fn client_of(nodes: &str, cluster: bool, buckets: u32, timeout: Duration) -> Client {
    let environment = [
        ("SPANBUF_REDIS__NODES", nodes.to_owned()),
        ("SPANBUF_REDIS__CLUSTER", cluster.to_string()),
        ("SPANBUF_REDIS__BUCKETS", buckets.to_string()),
        (
            "SPANBUF_REDIS__TIMEOUT",
            format!("{}ms", timeout.as_millis()),
        ),
        ("SPANBUF_SUPERVISION__SHARDS", "0-3".to_owned()),
    ];
    let environment = environment
        .into_iter()
        .map(|(name, value)| (name.into(), value.into()));
    let config = Config::load(None, environment, &Flags::default()).unwrap();
    Client::new(&config.redis).unwrap()
}

fn client(cluster: &Cluster, timeout: Duration) -> Client {
    client_of(&cluster.addresses(), true, BUCKETS, timeout)
}

fn buckets(client: &Client) -> Vec<Bucket> {
    let shards = 0..SHARDS;
    shards
        .flat_map(|shard| client.buckets().of_shard(ShardId(shard)))
        .collect()
}

fn member(trace: u64) -> Member {
    Member::new(
        ProjectId(1),
        &TraceId::new(format!("trace-{trace}").as_bytes()),
    )
}

fn step(bucket: Bucket, before: Option<u64>, next: u64) -> Command {
    PositionCall {
        bucket,
        before,
        next,
        clock: UnixMillis(1),
        spans: 0,
        instance: "inst",
        ttl: TTL,
        counts: &[],
    }
    .command()
}

/// Sends commands until none meets an outage, as the roles do.
fn insist(client: &mut Client, commands: &[Command]) -> Vec<Value> {
    let mut values: Vec<Option<Value>> = vec![None; commands.len()];
    let begun = Clock::mono_now();
    while values.iter().any(Option::is_none) {
        assert!(
            Clock::mono_now().since(begun) < Duration::from_secs(30),
            "no answer in 30 s"
        );
        let places: Vec<usize> = (0..values.len())
            .filter(|&place| values[place].is_none())
            .collect();
        let left: Vec<Command> = places
            .iter()
            .map(|&place| commands[place].clone())
            .collect();
        for (place, reply) in places.into_iter().zip(client.run(&left)) {
            match reply {
                Ok(value) => values[place] = Some(value),
                Err(error) => assert!(error.is_outage(), "{error}"),
            }
        }
    }
    values.into_iter().flatten().collect()
}

/// Gives every bucket another position, and proves that each is read where it was written.
fn assert_distinct(client: &mut Client, round: u64) {
    let buckets = buckets(client);
    let next =
        |round: u64, place: usize| round * 1_000_000 + 1_000 * u64::try_from(place).unwrap() + 7;
    let steps: Vec<Command> = (0..)
        .zip(&buckets)
        .map(|(place, &bucket)| {
            step(
                bucket,
                (round > 0).then(|| next(round - 1, place)),
                next(round, place),
            )
        })
        .collect();
    for (place, value) in insist(client, &steps).iter().enumerate() {
        let wrote = PositionReply::read(value).unwrap();
        let own = PositionReply::Stands(Some(next(round, place)));
        assert!(
            wrote == PositionReply::Written || wrote == own,
            "round {round} place {place}: {wrote:?}"
        );
    }
    // Thousands of questions to all nodes in turn, more than one slice for each.
    let asked: Vec<usize> = (0..4_000)
        .map(|number| number * 7 % buckets.len())
        .collect();
    let questions: Vec<Command> = asked
        .iter()
        .map(|&place| Command::position(buckets[place]))
        .collect();
    for (&place, value) in asked.iter().zip(insist(client, &questions)) {
        assert_eq!(
            reply::offset(&value),
            Some(next(round, place)),
            "round {round}"
        );
    }
}

#[test]
fn every_command_gets_its_own_reply_on_a_cluster() {
    let cluster = Cluster::start().unwrap();
    // One seed is enough, even where another is down.
    let seeds = format!("127.0.0.1:1,{}", cluster.node(1).address());
    let mut client = client_of(&seeds, true, BUCKETS, Duration::from_secs(2));
    let of_node = |node: usize| {
        let is_of = |&bucket: &Bucket| {
            let slot = cluster.slot_of(&position_key(bucket)).unwrap();
            cluster.owner(slot).unwrap() == node
        };
        buckets(&client)
            .iter()
            .filter(|bucket| is_of(bucket))
            .count()
    };
    assert!((0..MASTERS).all(|node| of_node(node) > 0));
    for round in 0..3 {
        assert_distinct(&mut client, round);
    }
    // The scripts are unknown on one node only.
    redis::cmd("SCRIPT")
        .arg("FLUSH")
        .exec(&mut cluster.connection(2).unwrap())
        .unwrap();
    let buckets = buckets(&client);
    let steps: Vec<Command> = buckets
        .iter()
        .map(|&bucket| step(bucket, None, 1))
        .collect();
    let replies = client.run(&steps);
    assert!(replies.iter().all(Result::is_ok), "{replies:?}");
    assert_distinct(&mut client, 3);
}

#[test]
fn slots_that_move_under_traffic_lose_no_entry_and_mix_no_reply() {
    let cluster = Cluster::start().unwrap();
    let mut client = client(&cluster, Duration::from_secs(2));
    let buckets = buckets(&client);
    let moving: Vec<u16> = buckets[..6]
        .iter()
        .map(|&bucket| cluster.slot_of(&position_key(bucket)).unwrap())
        .collect();
    let (done, mut rounds) = (AtomicBool::new(false), 0_u64);
    thread::scope(|scope| {
        let mover = scope.spawn(|| {
            // Each slot there and further on, with keys on both sides for a while.
            for turn in 0..4 {
                for &slot in &moving {
                    let to = (cluster.owner(slot).unwrap() + 1 + turn % 2) % MASTERS;
                    let migration = cluster.begin_migration(slot, to).unwrap();
                    for _ in 0..4 {
                        stand::pause(Duration::from_millis(15));
                        cluster.move_keys(migration, 2).unwrap();
                    }
                    stand::pause(Duration::from_millis(15));
                    cluster.end_migration(migration).unwrap();
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) || rounds < 10 {
            assert_distinct(&mut client, rounds);
            insert_round(&mut client, &buckets, rounds);
            rounds += 1;
        }
        mover.join().unwrap();
    });
    for error in ["ASK", "MOVED", "TRYAGAIN"] {
        let met: u64 = (0..MASTERS).map(|node| met(&cluster, node, error)).sum();
        assert!(met > 0, "{error} was not met");
    }
    // Every entry is in its journal, and every journal in its queue.
    let mut client = self::client(&cluster, Duration::from_secs(2));
    for &bucket in &buckets {
        let journals = usize::try_from(rounds.div_ceil(5)).unwrap();
        let queued = insist(&mut client, &[Command::queue_len(bucket)]).remove(0);
        assert_eq!(reply::count(&queued), rounds.div_ceil(5), "{bucket}");
        let counts: Vec<Command> = (0..rounds.div_ceil(5))
            .map(|trace| Command::entries(bucket, &member(trace)))
            .collect();
        let entries = insist(&mut client, &counts)
            .iter()
            .map(reply::count)
            .sum::<u64>();
        assert_eq!((counts.len(), entries), (journals, rounds), "{bucket}");
    }
}

/// How often a node answered with that error.
fn met(cluster: &Cluster, node: usize, error: &str) -> u64 {
    let stats: String = redis::cmd("INFO")
        .arg("errorstats")
        .query(&mut cluster.connection(node).unwrap())
        .unwrap();
    let start = format!("errorstat_{error}:count=");
    let line = stats.lines().find_map(|line| line.strip_prefix(&start));
    line.map_or(0, |count| count.trim_end().parse().unwrap())
}

/// One entry for every bucket, with its trace queued behind it; both again until both are answered well.
fn insert_round(client: &mut Client, buckets: &[Bucket], round: u64) {
    let trace = member(round / 5);
    let entry = [(round.to_be_bytes().to_vec(), b"chunk".to_vec())];
    let commands: Vec<Command> = buckets
        .iter()
        .flat_map(|&bucket| {
            [
                Command::insert(bucket, &trace, &entry),
                Command::enqueue(bucket, &[(trace.clone(), UnixMillis(1_000))]),
            ]
        })
        .collect();
    insist(client, &commands);
}

#[test]
fn a_node_that_is_away_keeps_only_its_own_part_waiting_and_in_time() {
    let mut cluster = Cluster::start_with(0, &[("cluster-require-full-coverage", "no")]).unwrap();
    let mut client = client(&cluster, Duration::from_millis(300));
    assert_distinct(&mut client, 0);
    let buckets = buckets(&client);
    let owners: Vec<usize> = buckets
        .iter()
        .map(|&bucket| {
            let slot = cluster.slot_of(&position_key(bucket)).unwrap();
            cluster.owner(slot).unwrap()
        })
        .collect();
    let seats: BTreeMap<Bucket, _> = buckets
        .iter()
        .map(|&bucket| (bucket, client.seat(bucket)))
        .collect();
    let questions: Vec<Command> = buckets
        .iter()
        .map(|&bucket| Command::position(bucket))
        .collect();
    for frozen in [true, false] {
        if frozen {
            cluster.node_mut(1).pause().unwrap();
        } else {
            cluster.node_mut(1).stop().unwrap();
        }
        for _ in 0..3 {
            let begun = Clock::mono_now();
            let replies: Vec<Reply> = client.run(&questions);
            assert!(Clock::mono_now().since(begun) < Duration::from_secs(3));
            for (place, reply) in replies.iter().enumerate() {
                match reply {
                    Ok(value) if owners[place] != 1 => {
                        let next = 1_000 * u64::try_from(place).unwrap() + 7;
                        assert_eq!(reply::offset(value), Some(next));
                    }
                    Err(error) if owners[place] == 1 => assert!(error.is_outage(), "{error}"),
                    reply => panic!("place {place} of node {}: {reply:?}", owners[place]),
                }
            }
        }
        // Another life of the connection is another seat, of this node's buckets only.
        for (place, &bucket) in buckets.iter().enumerate() {
            assert_eq!(
                client.seat(bucket) == seats[&bucket],
                owners[place] != 1,
                "{bucket}"
            );
        }
        if frozen {
            cluster.node_mut(1).resume().unwrap();
        } else {
            cluster.node_mut(1).start_again().unwrap();
        }
        cluster.await_ok().unwrap();
        insist(&mut client, &questions);
    }
    assert_distinct(&mut client, 1);
}

#[test]
fn replies_that_are_late_and_connections_that_are_cut_mix_no_reply() {
    let mut proxy = Proxy::empty();
    let cluster = Cluster::start_behind(&mut proxy, 0, &[]).unwrap();
    let mut client = client(&cluster, Duration::from_millis(300));
    let buckets = buckets(&client);
    let questions: Vec<Command> = buckets
        .iter()
        .map(|&bucket| Command::position(bucket))
        .collect();
    assert_distinct(&mut client, 0);
    for round in 1..=3 {
        // One node's reply comes when nobody waits for it any more.
        let hold = proxy.hold_reply("HGET");
        let replies = client.run(&questions);
        assert!(hold.reached(Duration::ZERO));
        let lost = replies.iter().filter(|reply| reply.is_err()).count();
        assert!(lost > 0 && lost < replies.len(), "{lost}");
        hold.release();
        assert_distinct(&mut client, round);
    }
    let seats =
        |client: &Client| -> Vec<_> { buckets.iter().map(|&bucket| client.seat(bucket)).collect() };
    let (before, done) = (seats(&client), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                stand::pause(Duration::from_millis(25));
                proxy.cut();
            }
        });
        for round in 4..14 {
            assert_distinct(&mut client, round);
        }
        done.store(true, Ordering::Relaxed);
    });
    let after = seats(&client);
    assert!(
        before
            .iter()
            .zip(&after)
            .all(|(before, after)| before != after),
        "not every node's connection was cut"
    );
}

#[test]
fn a_node_that_a_slot_is_on_its_way_to_is_part_of_its_seat() {
    let mut cluster = Cluster::start_with(0, &[("cluster-require-full-coverage", "no")]).unwrap();
    let mut client = client(&cluster, Duration::from_millis(300));
    assert_distinct(&mut client, 0);
    let bucket = buckets(&client)[0];
    let slot = cluster.slot_of(&position_key(bucket)).unwrap();
    let owner = cluster.owner(slot).unwrap();
    let to = (owner + 1) % MASTERS;
    cluster.begin_migration(slot, to).unwrap();
    let trace = member(77);
    let entry = [(b"field".to_vec(), b"chunk".to_vec())];
    // A journal that is new lies at the other node: asked there, acknowledged there.
    insist(&mut client, &[Command::insert(bucket, &trace, &entry)]);
    let seat = client.seat(bucket);
    insist(&mut client, &[Command::entries(bucket, &trace)]);
    assert_eq!(client.seat(bucket), seat);
    cluster.node_mut(to).restart_empty().unwrap();
    let lost = client.run(&[Command::entries(bucket, &trace)]).remove(0);
    assert!(lost.is_err(), "{lost:?}");
    assert_ne!(client.seat(bucket), seat, "what it acknowledged is gone");
}

#[test]
fn a_position_does_not_follow_its_slot_and_everything_else_does() {
    let cluster = Cluster::start_with(1, &[]).unwrap();
    let mut client = client(&cluster, Duration::from_secs(2));
    assert_distinct(&mut client, 0);
    let bucket = buckets(&client)[0];
    let owner = cluster
        .owner(cluster.slot_of(&position_key(bucket)).unwrap())
        .unwrap();
    let seat = client.seat(bucket);
    cluster.fail_over(owner + MASTERS).unwrap();
    let refused = client.run(&[step(bucket, Some(7), 8)]).remove(0);
    assert!(refused.is_err_and(|error| error.is_outage()));
    assert_ne!(client.seat(bucket), seat);
    let read = insist(&mut client, &[Command::position(bucket)]).remove(0);
    assert_eq!(reply::offset(&read), Some(7));
    // A replica is never asked: the old master, which is one now, would refuse.
    assert_distinct(&mut client, 1);
}

#[test]
fn every_node_is_proved_and_named() {
    let mut cluster = Cluster::start().unwrap();
    let timeout = Duration::from_secs(1);
    let mut client = client(&cluster, timeout);
    let servers = client.check().unwrap();
    let mut proved: Vec<&str> = servers.iter().map(|server| &server.address[..]).collect();
    proved.sort_unstable();
    let mut all: Vec<String> = (0..MASTERS)
        .map(|node| cluster.node(node).address())
        .collect();
    all.sort_unstable();
    assert_eq!(proved, all);

    let second = cluster.node(1).address();
    cluster.node(1).config_set("maxmemory", "50mb").unwrap();
    cluster
        .node(1)
        .config_set("maxmemory-policy", "allkeys-lru")
        .unwrap();
    let error = client.check().unwrap_err();
    assert!(
        matches!(&error, CheckError::Evicts { address, .. } if *address == second),
        "{error}"
    );
    cluster
        .node(1)
        .config_set("maxmemory-policy", "noeviction")
        .unwrap();
    assert!(client.check().is_ok());

    let error = client_of(&second, false, 1, timeout).check().unwrap_err();
    assert!(
        matches!(&error, CheckError::Cluster { .. }) && !error.is_outage(),
        "{error}"
    );
    let alone = Redis::start().unwrap();
    let error = client_of(&alone.address(), true, 1, timeout)
        .check()
        .unwrap_err();
    assert!(
        matches!(&error, CheckError::NoCluster { .. }) && !error.is_outage(),
        "{error}"
    );

    cluster.node_mut(2).stop().unwrap();
    let error = client.check().unwrap_err();
    assert!(
        error.is_outage() && error.to_string().contains(&cluster.node(2).address()),
        "{error}"
    );
    let down = stand::eventually(Duration::from_secs(20), "a cluster that is down", || {
        let info: String = redis::cmd("CLUSTER")
            .arg("INFO")
            .query(&mut cluster.connection(0).unwrap())
            .unwrap();
        info.contains("cluster_state:fail")
            .then(|| client.check().unwrap_err())
    });
    assert!(
        matches!(down, CheckError::ClusterDown { .. }) && down.is_outage(),
        "{down}"
    );
}

#[test]
fn a_clear_in_a_slot_on_its_way_is_carried_out_whole() {
    let cluster = Cluster::start().unwrap();
    let mut client = client(&cluster, Duration::from_secs(2));
    // The journal, or the queue, or both of them end with it; one of the fields was taken before. The keys are here still, or
    // there already.
    for (shard, held, queued) in [(0, 1, 1), (1, 1, 2), (2, 2, 1)] {
        for moved in [false, true] {
            let mut buckets = client.buckets().of_shard(ShardId(shard));
            let bucket = buckets.nth(usize::from(moved)).unwrap();
            put(&cluster, &mut client, bucket, held, queued);
            let slot = cluster.slot_of(&journal_key(bucket, &member(1))).unwrap();
            let to = (cluster.owner(slot).unwrap() + 1) % MASTERS;
            let migration = cluster.begin_migration(slot, to).unwrap();
            if moved {
                cluster.move_keys(migration, 100).unwrap();
            }
            clears_one_field(&mut client, bucket, held);
            cluster.end_migration(migration).unwrap();
            let left = [
                Command::queue_len(bucket),
                Command::entries(bucket, &member(1)),
            ];
            let left = insist(&mut client, &left);
            let traces = queued - u64::from(held == 1);
            assert_eq!(
                left.iter().map(reply::number).collect::<Vec<_>>(),
                [Some(traces), Some(held - 1)],
                "shard {shard} moved {moved}"
            );
        }
    }
}

/// A journal with so many entries, and a queue with so many traces.
fn put(cluster: &Cluster, client: &mut Client, bucket: Bucket, held: u64, queued: u64) {
    let journal = journal_key(bucket, &member(1));
    let owner = cluster.owner(cluster.slot_of(&journal).unwrap()).unwrap();
    let mut direct = cluster.connection(owner).unwrap();
    for number in 0..held {
        let set = redis::cmd("HSET")
            .arg(&journal)
            .arg(format!("field-{number}"))
            .arg("chunk")
            .take();
        set.exec(&mut direct).unwrap();
    }
    let members: Vec<_> = (1..=queued)
        .map(|trace| (member(trace), UnixMillis(5)))
        .collect();
    let commands = [
        Command::enqueue(bucket, &members),
        Command::set_in_sum(bucket, "produced", 100),
    ];
    insist(client, &commands);
}

/// Clears one field that is there and one that is not: the one is counted.
fn clears_one_field(client: &mut Client, bucket: Bucket, held: u64) {
    let out = |field: &[u8]| FieldOut {
        field: field.to_vec(),
        produced: 13,
        repeats: 1,
        dropped: vec![],
    };
    let clear = ClearCall {
        bucket,
        ttl: TTL,
        traces: vec![ClearTrace {
            member: member(1),
            next_look: (held > 1).then_some(UnixMillis(4)),
            fields: vec![out(b"field-0"), out(b"taken")],
        }],
    };
    let value = insist(client, &[clear.command()]).remove(0);
    let reply = ClearReply {
        removed: 1,
        left: held - 1,
    };
    assert_eq!(ClearReply::read(&value, &clear), Ok(vec![Ok(reply)]));
    let mut sum = reply::counters(&insist(client, &[Command::sum(bucket)])[0]);
    sum.sort();
    let expected = [("produced", 113), ("repeats", 1)];
    assert_eq!(
        sum,
        expected.map(|(name, amount)| (name.to_owned(), amount)),
        "{bucket:?}"
    );
}

#[test]
fn another_number_of_buckets_is_taken_on_an_empty_store_and_refused_on_one_that_holds_spans() {
    let cluster = Cluster::start().unwrap();
    let with = |buckets| client_of(&cluster.addresses(), true, buckets, Duration::from_secs(2));
    let shards = "0-3".parse().unwrap();
    with(1).prove_meta(&shards).unwrap();
    // To prove it describes nothing.
    let meta = with(3).meta(&shards).unwrap();
    with(1).prove_meta(&shards).unwrap();
    assert_eq!(with(1).meta(&shards).unwrap(), meta, "and takes nothing on");
    let next = |buckets: u32, numbers: &[u32]| {
        let mut client = with(buckets);
        let all: Vec<Bucket> = client.buckets().of_shard(ShardId(2)).collect();
        let asked: Vec<Command> = numbers
            .iter()
            .map(|&number| Command::position(all[usize::try_from(number).unwrap()]))
            .collect();
        let values = insist(&mut client, &asked);
        values.iter().map(reply::offset).collect::<Vec<_>>()
    };
    let first = with(1).buckets().first(ShardId(2));
    insist(&mut with(1), &[step(first, None, 70)]);
    let queued = [(member(1), UnixMillis(5))];
    insist(&mut with(1), &[Command::enqueue(first, &queued)]);

    let error = with(4).meta(&shards).unwrap_err();
    assert!(
        matches!(
            &error,
            CheckError::OtherBuckets {
                found: 1,
                wanted: 4,
                ..
            }
        ) && !error.is_outage()
            && error.to_string().contains("redis.buckets = 1"),
        "{error}"
    );
    let proved = with(4).prove_meta(&shards).unwrap_err();
    assert_eq!(proved.to_string(), error.to_string());
    with(1).prove_meta(&shards).unwrap();
    insist(
        &mut with(1),
        &[Command::unqueue(first, member(1).as_bytes())],
    );
    // All workers start at once: each may find the old number.
    thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| with(4).meta(&shards).unwrap()))
            .collect();
        for worker in workers {
            assert_eq!(worker.join().unwrap(), meta);
        }
    });
    assert_eq!(next(4, &[0, 1, 2, 3]), [Some(70); 4]);
    assert!(with(1).meta(&shards).is_ok(), "and back");

    // What was left behind is brought to where the store stands by now.
    insist(&mut with(1), &[step(first, Some(70), 90)]);
    assert_eq!(with(2).meta(&shards).unwrap(), meta);
    assert_eq!(next(4, &[0, 1, 2]), [Some(90), Some(90), Some(70)]);

    // Buckets that stand at different offsets would be read twice.
    let second = with(2).buckets().of_shard(ShardId(2)).nth(1).unwrap();
    insist(&mut with(2), &[step(second, Some(90), 95)]);
    let error = with(4).meta(&shards).unwrap_err();
    assert!(
        matches!(&error, CheckError::OtherBuckets { .. })
            && error.to_string().contains("different offsets"),
        "{error}"
    );
    let proved = with(4).prove_meta(&shards).unwrap_err();
    assert_eq!(proved.to_string(), error.to_string());
}
