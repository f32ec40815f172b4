//! What is refused, and how; what is waited for.
//!
//! In:     a row a mistake; servers that are wrong, or away.
//! Keeps:  what time may mend is waited for, by the same workers.
//! Source: docs/spec.md 10.1, docs/supervision.md 3.

use std::{
    io::{Read, Write},
    net::TcpListener,
    time::Duration,
};

use shared::time::Clock;
use stand::{
    kafka::{Kafka, RealKafka},
    launch::{Run, Supervisor, SupervisorPlan, run},
    proxy::Proxy,
};

use crate::world::{
    LONG, SHARDS, World,
    store::{Store, is_left_out, settings},
    traffic,
};

/// One way to be refused.
struct Row {
    name: &'static str,
    arguments: &'static [&'static str],
    variables: &'static [(&'static str, &'static str)],
    code: i32,
    /// All of these stand in what is said.
    says: &'static [&'static str],
}

const fn row(
    name: &'static str,
    arguments: &'static [&'static str],
    code: i32,
    says: &'static [&'static str],
) -> Row {
    Row {
        name,
        arguments,
        variables: &[],
        code,
        says,
    }
}

/// Of the command line and the configuration.
const ROWS: [Row; 18] = [
    row("an empty list", &["--shards", ""], 2, &["--shards"]),
    row("a hole in a list", &["--shards", "1,,2"], 2, &["0-7"]),
    row("a reversed range", &["--shards", "7-0"], 2, &["write 0-7"]),
    row(
        "a duplicate",
        &["--shards", "1,0-3"],
        2,
        &["shard 1", "twice"],
    ),
    row(
        "a shard that no topic has",
        &["--shards", "0-99999999999"],
        2,
        &["too large"],
    ),
    row(
        "too many shards",
        &["--shards", "0-65535"],
        2,
        &["too many"],
    ),
    row("no number", &["--shards", "all"], 2, &["`all`"]),
    row(
        "no workers",
        &["--shards", "0-7", "--max-workers", "0"],
        2,
        &["--max-workers", "0"],
    ),
    row(
        "no ingest workers",
        &["--shards", "0-7", "--ingest-workers", "0"],
        2,
        &["--ingest-workers"],
    ),
    row("an unknown flag", &["--shard", "0-7"], 2, &["--shard"]),
    row("a flag without its value", &["--shards"], 2, &["--shards"]),
    row(
        "a stranger behind the flags",
        &["--shards", "0-7", "now"],
        2,
        &["now"],
    ),
    row(
        "no shards at all",
        &[],
        78,
        &["supervision.shards", "--shards 0-7"],
    ),
    row(
        "a file that is not there",
        &["--shards", "0-7", "--config", "/nonexistent/spanbuf.toml"],
        78,
        &["/nonexistent/spanbuf.toml", "cannot be read"],
    ),
    row(
        "a file that is a folder",
        &["--shards", "0-7", "--config", "/proc"],
        78,
        &["/proc", "cannot be read"],
    ),
    Row {
        name: "unknown and wrong keys, all at once",
        arguments: &["--shards", "0-7"],
        variables: &[
            ("SPANBUF_KAFKA__GRUOP", "a"),
            ("SPANBUF_BUFFER__TIMEOUT", "soon"),
            ("SPANBUF_FLUSH__MAX_FLUSH_SEGMENTS", "0"),
        ],
        code: 78,
        says: &["SPANBUF_KAFKA__GROUP?", "`soon`", "`0`"],
    },
    Row {
        name: "values that contradict",
        arguments: &["--shards", "0-7"],
        variables: &[("SPANBUF_KAFKA__OUTPUT_TOPICS", "ingest-spans")],
        code: 78,
        says: &["kafka.input_topic"],
    },
    Row {
        name: "a key whose feature does not exist yet",
        arguments: &["--shards", "0-7"],
        variables: &[("SPANBUF_REDIS__TLS", "true")],
        code: 78,
        says: &["SPANBUF_REDIS__TLS"],
    },
];

#[test]
fn wrong_flags_and_configurations_are_refused_and_say_how_to_mend_them() {
    assert_eq!(ROWS.len(), 18);
    for Row {
        name,
        arguments,
        variables,
        code,
        says,
    } in ROWS
    {
        for check in [false, true] {
            let mut arguments = arguments.to_vec();
            if check {
                arguments.insert(0, "--check");
            }
            let Run { status, text } = run("supervisor", &arguments, variables, LONG).unwrap();
            assert_eq!(status.code(), Some(code), "{name}: {text}");
            assert!(
                says.iter().all(|said| text.contains(said)),
                "{name}: {text}"
            );
            assert!(
                code != 2 || text.trim_end().lines().count() == 1,
                "{name}: {text}"
            );
        }
    }
}

/// Starts a supervisor that is to be refused; gives what it said.
fn refused(plan: SupervisorPlan, says: &[&str]) -> String {
    let mut supervisor = Supervisor::start(plan).unwrap();
    let status = supervisor.wait_exit(LONG).unwrap();
    let log = supervisor.log();
    assert_eq!(status.code(), Some(78), "{log}");
    assert!(
        says.iter().all(|said| log.contains(said)),
        "{says:?} not in\n{log}"
    );
    log
}

#[test]
fn a_redis_that_would_lose_spans_is_refused() {
    let kafka = Kafka::mock(SHARDS).unwrap();
    let mut proxy = Proxy::empty();
    let settings = [("maxmemory", "50mb"), ("maxmemory-policy", "allkeys-lru")];
    let redis = Store::start_with(&mut proxy, &settings);
    let plan = SupervisorPlan {
        settings: redis.settings().into(),
        ..SupervisorPlan::new(SHARDS, &kafka.brokers(), &proxy.addresses())
    };
    refused(plan, &["allkeys-lru", "noeviction", &proxy.address()]);
}

#[test]
fn a_redis_that_is_too_old_is_refused() {
    // No such server is to be had: this one says that it is one, and nothing else.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut stream = stream;
                let about = "redis_version:6.0.16\r\nmaxmemory:0\r\nrole:master\r\n";
                while stream.read(&mut [0; 1_024]).is_ok_and(|read| read > 0) {
                    drop(write!(stream, "${}\r\n{about}\r\n", about.len()));
                }
            });
        }
    });
    let kafka = Kafka::mock(SHARDS).unwrap();
    let plan = SupervisorPlan {
        settings: settings().into(),
        ..SupervisorPlan::new(SHARDS, &kafka.brokers(), &address)
    };
    refused(plan, &["6.0.16", "6.2", &address]);
}

#[test]
fn missing_topics_and_partitions_are_refused_and_a_check_names_them() {
    let kafka = RealKafka::start(SHARDS).unwrap();
    let mut proxy = Proxy::empty();
    let redis = Store::start_with(&mut proxy, &[]);
    let plan = |settings: &str| SupervisorPlan {
        settings: format!("{}{settings}", redis.settings()),
        ..SupervisorPlan::new(SHARDS, &kafka.brokers(), &proxy.addresses())
    };
    refused(
        plan("kafka.input_topic = \"nowhere\""),
        &["topic=nowhere", "kafka.input_topic"],
    );
    refused(
        plan("kafka.output_topics = [\"buffered-segments\", \"nowhere\"]"),
        &["topic=nowhere", "kafka.output_topics"],
    );
    refused(
        plan("kafka.input_dlq = \"nowhere\""),
        &["topic=nowhere", "kafka.input_dlq"],
    );
    refused(
        SupervisorPlan {
            shards: format!("0-{SHARDS}"),
            ..plan("")
        },
        &["partition=4", "--shards"],
    );
    let (brokers, addresses) = (kafka.brokers(), proxy.addresses());
    let cluster = redis.is_cluster().to_string();
    let check = |more: &[(&str, &str)], code: i32, words: &[&str]| {
        let own = [
            ("SPANBUF_KAFKA__BROKERS", brokers.as_str()),
            ("SPANBUF_REDIS__NODES", addresses.as_str()),
            ("SPANBUF_REDIS__CLUSTER", cluster.as_str()),
        ];
        let arguments = ["--check", "--shards", "0-3"];
        let ended = run("supervisor", &arguments, &[&own[..], more].concat(), LONG).unwrap();
        assert_eq!(ended.status.code(), Some(code), "{}", ended.text);
        let says = |word: &&str| ended.text.contains(*word);
        assert!(words.iter().all(says), "{}", ended.text);
    };
    check(&[], 0, &["kafka.group", "ok: ingest-spans"]);
    let elsewhere = [("SPANBUF_KAFKA__INPUT_TOPIC", "nowhere")];
    check(&elsewhere, 78, &["not ok: nowhere"]);
}

#[test]
fn a_low_limit_of_the_broker_is_obeyed() {
    // The broker's own topics take a megabyte: less than ours.
    let mut world = World::new(Kafka::Real(RealKafka::start(SHARDS).unwrap()));
    world.start();
    world.send(&traffic(5, 500, 1));
    world.await_all();
    assert!(
        world
            .log()
            .contains("topic=buffered-segments takes messages of bytes=1048588"),
        "{}",
        world.log()
    );
    world.settle_exact();
}

#[test]
fn a_check_refuses_another_number_of_buckets_where_spans_stand() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    world.start();
    world.send(&traffic(6, 200, 1));
    stand::eventually(LONG, "spans in redis", || {
        (world.redis.inserted() >= 100).then_some(())
    });
    let (brokers, nodes) = (world.kafka.brokers(), world.proxy.addresses());
    let mut variables = vec![
        ("SPANBUF_KAFKA__BROKERS", brokers.as_str()),
        ("SPANBUF_REDIS__NODES", nodes.as_str()),
        ("SPANBUF_REDIS__BUCKETS", "7"),
    ];
    if world.redis.is_cluster() {
        variables.push(("SPANBUF_REDIS__CLUSTER", "true"));
        variables.push(("SPANBUF_REDIS__SLICE", "3"));
    }
    let arguments = ["--check", "--shards", "0-3"];
    let Run { status, text } = run("supervisor", &arguments, &variables, LONG).unwrap();
    assert_eq!(status.code(), Some(78), "{text}");
    assert!(
        text.contains("not ok: redis") && text.contains("redis.buckets"),
        "{text}"
    );
    world.await_all();
    world.settle_exact();
}

/// Spans that no message of a topic of small ones can hold.
const LARGE: u64 = 20;

#[test]
fn a_topic_of_small_messages_gets_segments_in_parts_and_large_spans_as_dead_letters() {
    let kafka = RealKafka::start(SHARDS).unwrap();
    kafka
        .create_topic("small", SHARDS, &[("max.message.bytes", "50000")])
        .unwrap();
    let mut world = World::new(Kafka::Real(kafka));
    world.plan.settings = world.settings("kafka.output_topics = [\"small\"]\n");
    world.read_from("small");
    world.start();
    let now = Clock::wall_now();
    let trace = "e".repeat(32);
    let many: Vec<_> = (1..200_u64)
        .map(|id| {
            crate::world::message(
                0,
                now,
                crate::world::span(&trace, &format!("{id:016x}"), Some("r"), id, 500),
            )
        })
        .collect();
    world.send(&many);
    // Alone over the limit: they go to the dead letters of the output, counted, and take none of those along that are due with them.
    for index in 0..LARGE {
        let small = (0..10).map(|other| {
            let serial = 1_000 + index * 10 + other;
            let trace = format!("{serial:032x}");
            crate::world::message(1, now, crate::world::span(&trace, "1", None, serial, 500))
        });
        world.send(&small.collect::<Vec<_>>());
        let large = crate::world::span(&format!("f{index:031x}"), "1", None, 500, 120_000);
        world.send_raw(1, now, Some(&incompressible(large)));
    }
    world.await_all();
    let mut reader =
        stand::topics::Reader::new(&world.kafka.brokers(), stand::kafka::OUTPUT_DLQ).unwrap();
    reader
        .read_until(LONG, "the large spans", |letters| {
            letters.len() >= usize::try_from(LARGE).unwrap()
        })
        .unwrap();
    reader.read_to_end(LONG).unwrap();
    let letters = reader.take();
    assert_eq!(u64::try_from(letters.len()).unwrap(), LARGE);
    assert!(letters.iter().all(|letter| {
        letter.header("dropped") == Some(&b"too_large"[..])
            && letter.header("source_topic") == Some(&b"small"[..])
    }));
    assert!(
        world.output.len() > 2
            && world
                .output
                .iter()
                .all(|message| message.payload.as_ref().unwrap().len() <= 50_000)
    );
    world.settle_exact();
    assert_eq!(world.redis.sum(1, "dropped:too_large"), LARGE);
}

/// The broker's limit is that of the compressed batch: the padding becomes hex noise.
fn incompressible(span: Vec<u8>) -> Vec<u8> {
    let mut rng = stand::rng::Rng::new(7);
    let text = String::from_utf8(span).unwrap();
    let noise: String = (0..120_000 / 16)
        .map(|_| format!("{:016x}", rng.bits()))
        .collect();
    text.replace(&"x".repeat(120_000), &noise).into_bytes()
}

/// Waits until the log says that something is away, with its address.
fn await_said(world: &World, said: &[&str]) {
    stand::eventually(
        Duration::from_secs(15),
        &format!("{said:?} in the log"),
        || {
            let log = world.log();
            log.lines()
                .any(|line| said.iter().all(|said| line.contains(said)))
                .then_some(())
        },
    );
}

#[test]
fn a_redis_that_is_away_or_read_only_at_the_start_is_waited_for() {
    let mut world = World::new(Kafka::mock(SHARDS).unwrap());
    let address = world.proxy.address();
    world.redis.stop();
    world.start();
    await_said(&world, &["check redis failed", &address]);
    let workers = world.workers();
    // Said again, ten seconds later.
    stand::eventually(Duration::from_secs(30), "a second word", || {
        (world.log().matches("check redis failed").count() > 2 * workers.len()).then_some(())
    });
    world.redis.restart_empty();
    if !is_left_out("a redis that is read-only at the start") {
        let mut replica_of = redis::cmd("REPLICAOF");
        world
            .redis
            .tell_all(replica_of.clone().arg("127.0.0.1").arg(1));
        await_said(&world, &["read-only", &address]);
        world.redis.tell_all(replica_of.arg("NO").arg("ONE"));
    }
    world.send(&traffic(6, 500, 1));
    world.await_all();
    assert_eq!(
        world.workers(),
        workers,
        "nobody died meanwhile\n{}",
        world.log()
    );
    world.settle_exact();
}

#[test]
fn a_kafka_that_is_away_at_the_start_is_waited_for() {
    let kafka = stand::kafka::MockKafka::start(SHARDS).unwrap();
    let brokers = kafka.brokers();
    let mut world = World::new(Kafka::Mock(kafka));
    let down = |world: &World| {
        if let Kafka::Mock(mock) = &world.kafka {
            mock.down().unwrap()
        }
    };
    down(&world);
    world.start();
    await_said(&world, &["find input topic failed", &brokers]);
    await_said(&world, &["find output topic failed", &brokers]);
    let workers = world.workers();
    if let Kafka::Mock(mock) = &world.kafka {
        mock.up().unwrap();
    }
    world.send(&traffic(7, 500, 1));
    world.await_all();
    assert_eq!(
        world.workers(),
        workers,
        "nobody died meanwhile\n{}",
        world.log()
    );
    world.settle_exact();
    assert!(!world.output.is_empty());
}
