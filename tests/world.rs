//! A Kafka, a Redis behind a proxy or a cluster, a supervisor with its workers, and both sides of the ledger.
//!
//! In:     a Kafka, settings.
//! Out:    what came out, compared with what was sent; what Redis holds, read without our own client.
//! Keeps:  one supervisor at a time; what a test started ends with it.
//! Knows:  the stand.
//! Source: docs/house.md 13.

use std::{collections::BTreeMap, time::Duration};

use nix::sys::signal::Signal;
use shared::time::{Clock, UnixMillis};
use stand::{
    cluster::{Cluster, MASTERS},
    eventually,
    kafka::{INPUT, Kafka, OUTPUT},
    launch::{Supervisor, SupervisorPlan, Worker},
    ledger::{Balance, Ledger},
    proxy::Proxy,
    redis::Redis,
    topics::{Message, Producer, Reader, Record},
    traffic::{SpanMessage, Traffic, TrafficPlan},
};

pub(crate) const SHARDS: u32 = 4;
/// How long anything may take that has no reason to take long: two shared cores.
pub(crate) const LONG: Duration = Duration::from_secs(90);

/// Everything of one test. Dropped in this order: the supervisor first.
pub(crate) struct World {
    supervisor: Option<Supervisor>,
    pub(crate) plan: SupervisorPlan,
    pub(crate) proxy: Proxy,
    pub(crate) redis: Redis,
    /// In the place of `redis`, which idles then.
    pub(crate) cluster: Option<Cluster>,
    /// How keys are cut: the slice as it stands in tags, and the buckets of a shard.
    slice: &'static str,
    buckets: u32,
    pub(crate) ledger: Ledger,
    pub(crate) output: Vec<Message>,
    /// What a supervisor that was drained had said.
    pub(crate) said: String,
    readers: Vec<Reader>,
    /// How many messages came out of each output topic.
    pub(crate) came: Vec<usize>,
    producer: Producer,
    pub(crate) kafka: Kafka,
}

impl World {
    /// Starts all but the supervisor. Timeouts are a second with a root, three without.
    pub(crate) fn new(kafka: Kafka) -> Self {
        let redis = Redis::start().unwrap();
        let proxy = Proxy::start(&redis.address()).unwrap();
        let mut plan = SupervisorPlan::new(SHARDS, &kafka.brokers(), &proxy.address());
        plan.max_workers = 2;
        plan.settings = settings("");
        let producer = Producer::new(&kafka.brokers()).unwrap();
        let reader = Reader::new(&kafka.brokers(), OUTPUT).unwrap();
        Self {
            supervisor: None,
            plan,
            proxy,
            redis,
            cluster: None,
            slice: "",
            buckets: 1,
            ledger: Ledger::new(),
            output: Vec::new(),
            said: String::new(),
            readers: vec![reader],
            came: vec![0; 2],
            producer,
            kafka,
        }
    }

    /// On a cluster of three with `replicas` each: four buckets a shard, a slice, two ingest workers, two output topics.
    pub(crate) fn on_cluster(kafka: Kafka, replicas: usize) -> Self {
        const SECOND: &str = "buffered-segments-2";
        kafka.create_topic(SECOND, SHARDS).unwrap();
        let mut world = Self::new(kafka);
        let cluster = Cluster::start_with(replicas, &[]).unwrap();
        world.plan.redis = cluster.addresses();
        world.plan.ingest_workers = 2;
        world.plan.settings = settings(&format!(
            "redis.cluster = true\nredis.buckets = 4\nredis.slice = 3\nkafka.output_topics = [\"{OUTPUT}\", \"{SECOND}\"]\n"
        ));
        world.cluster = Some(cluster);
        (world.slice, world.buckets) = ("3-", 4);
        world
            .readers
            .push(Reader::new(&world.kafka.brokers(), SECOND).unwrap());
        world
    }

    pub(crate) fn start(&mut self) -> &mut Supervisor {
        assert!(self.supervisor.is_none(), "one supervisor at a time");
        self.supervisor
            .insert(Supervisor::start(self.plan.clone()).unwrap())
    }

    pub(crate) fn supervisor(&mut self) -> &mut Supervisor {
        self.supervisor.as_mut().expect("started")
    }

    pub(crate) fn log(&self) -> String {
        self.supervisor
            .as_ref()
            .map_or_else(String::new, Supervisor::log)
    }

    /// Reads the output from another topic.
    pub(crate) fn read_from(&mut self, topic: &str) {
        self.readers = vec![Reader::new(&self.kafka.brokers(), topic).unwrap()];
    }

    /// All workers at this moment, once there are as many as the plan says.
    pub(crate) fn workers(&self) -> Vec<Worker> {
        let supervisor = self.supervisor.as_ref().expect("started");
        let wanted = usize::try_from(self.plan.max_workers + self.plan.ingest_workers).unwrap();
        eventually(LONG, "all workers", || {
            Some(supervisor.workers().unwrap()).filter(|workers| workers.len() == wanted)
        })
    }

    /// The only worker of that role that has `shard`, once it is there.
    pub(crate) fn worker(&mut self, role: &str, shard: u32) -> Worker {
        let supervisor = self.supervisor.as_ref().expect("started");
        eventually(LONG, &format!("a {role} worker of shard {shard}"), || {
            let workers = supervisor.workers().unwrap();
            workers
                .into_iter()
                .find(|worker| worker.role == role && holds(&worker.shards, shard))
        })
    }

    pub(crate) fn send(&mut self, messages: &[SpanMessage]) {
        self.ledger.sent_all(messages).unwrap();
        for message in messages {
            self.producer.send(INPUT, &message.record()).unwrap();
        }
        self.producer.flush(LONG).unwrap();
    }

    /// Sends a message that the ledger does not know of.
    pub(crate) fn send_raw(&mut self, partition: i32, time: UnixMillis, payload: Option<&[u8]>) {
        self.producer
            .send(
                INPUT,
                &Record {
                    partition,
                    time: Some(time),
                    payload,
                    ..Record::default()
                },
            )
            .unwrap();
        self.producer.flush(LONG).unwrap();
    }

    /// Reads the output until every span that was sent came out.
    pub(crate) fn await_all(&mut self) {
        let begun = Clock::mono_now();
        while !self.ledger.is_complete() {
            self.read_some();
            if Clock::mono_now().since(begun) > LONG {
                panic!(
                    "not all came out: {}\n{}",
                    self.ledger.balance(),
                    self.log()
                );
            }
        }
    }

    /// Whether every worker has been at work: USR1 says so.
    pub(crate) fn said_healthy(&mut self) -> bool {
        let workers = usize::try_from(self.plan.max_workers + self.plan.ingest_workers).unwrap();
        let supervisor = self.supervisor();
        supervisor.signal(Signal::SIGUSR1).unwrap();
        let log = supervisor.log();
        let lines: Vec<&str> = log
            .lines()
            .filter(|line| line.starts_with("worker slot="))
            .collect();
        lines.len() >= workers
            && lines[lines.len() - workers..]
                .iter()
                .all(|line| line.contains("state=healthy"))
    }

    /// Reads until something more has come out.
    pub(crate) fn read_first(&mut self) {
        self.readers[0]
            .read_until(LONG, "a segment", |came| !came.is_empty())
            .unwrap();
        self.read_some();
    }

    /// Reads what comes within half a second.
    pub(crate) fn read_some(&mut self) {
        for (reader, count) in self.readers.iter_mut().zip(&mut self.came) {
            // It is late every time: nothing is ever enough.
            drop(reader.read_until(Duration::from_millis(500), "", |_| false));
            let came = reader.take();
            *count += came.len();
            self.ledger.read_output(&came);
            self.output.extend(came);
        }
    }

    /// Drains the supervisor: it ends well, and leaves nothing.
    pub(crate) fn drain(&mut self) {
        let mut supervisor = self.supervisor.take().expect("started");
        let (pid, workers) = (supervisor.pid(), supervisor.workers().unwrap());
        supervisor.signal(Signal::SIGTERM).unwrap();
        let status = supervisor.wait_exit(LONG).unwrap();
        self.said = supervisor.log();
        assert_eq!(status.code(), Some(0), "{}", self.said);
        assert!(workers.iter().all(|worker| !worker.lives()), "{workers:?}");
        assert_no_board(pid);
    }

    /// Kills the supervisor; its workers die with it.
    pub(crate) fn kill_supervisor(&mut self) {
        let mut supervisor = self.supervisor.take().expect("started");
        let workers = supervisor.workers().unwrap();
        assert!(!workers.is_empty());
        supervisor.kill().unwrap();
        eventually(Duration::from_secs(5), "the end of all workers", || {
            workers.iter().all(|worker| !worker.lives()).then_some(())
        });
    }

    /// Reads the output to its end, and compares.
    pub(crate) fn read_rest(&mut self) -> Balance {
        for (reader, count) in self.readers.iter_mut().zip(&mut self.came) {
            reader.read_to_end(LONG).unwrap();
            let came = reader.take();
            *count += came.len();
            self.ledger.read_output(&came);
            self.output.extend(came);
        }
        self.ledger.balance()
    }

    /// Drains, reads to the end, and proves that every span is accounted for, in the topics and in Redis.
    pub(crate) fn settle(&mut self) -> Balance {
        self.drain();
        let balance = self.read_rest();
        assert!(balance.is_even(), "{balance}");
        balance
    }

    /// As [`World::settle`]; no span came out twice.
    pub(crate) fn settle_exact(&mut self) {
        let balance = self.settle();
        assert!(balance.is_exact(), "{balance}");
        self.assert_store_is_even();
    }

    /// Inserted = produced + dropped + repeats, and nothing is left in Redis. Read without our own client.
    pub(crate) fn assert_store_is_even(&self) {
        for (shard, bucket) in
            (0..SHARDS).flat_map(|shard| (0..self.buckets).map(move |bucket| (shard, bucket)))
        {
            let key = |what: &str| format!("span-buf:{{{}{shard}.{bucket}}}:{what}", self.slice);
            let mut connection = self.connection(&key("pos"));
            let spans: Option<u64> = redis::cmd("HGET")
                .arg(key("pos"))
                .arg("spans")
                .query(&mut connection)
                .unwrap();
            let sum: BTreeMap<String, u64> = redis::cmd("HGETALL")
                .arg(key("sum"))
                .query(&mut connection)
                .unwrap();
            let queued: u64 = redis::cmd("ZCARD")
                .arg(key("q"))
                .query(&mut connection)
                .unwrap();
            let summed: u64 = sum
                .iter()
                .filter(|(name, _)| {
                    name.as_str() != "offset_out_of_range" && !name.starts_with("refused:")
                })
                .map(|(_, amount)| amount)
                .sum();
            assert_eq!(
                (spans.unwrap_or(0), queued),
                (summed, 0),
                "shard {shard} bucket {bucket}: {sum:?}"
            );
        }
        let nodes: Vec<&Redis> = match &self.cluster {
            Some(cluster) => (0..MASTERS).map(|node| cluster.node(node)).collect(),
            None => vec![&self.redis],
        };
        for node in nodes {
            let journals: Vec<String> = redis::cmd("KEYS")
                .arg("span-buf:*:t:*")
                .query(&mut node.connection().unwrap())
                .unwrap();
            assert!(journals.is_empty(), "{journals:?}");
        }
    }

    /// A connection to the node that has this key.
    fn connection(&self, key: &str) -> redis::Connection {
        match &self.cluster {
            Some(cluster) => {
                let slot = cluster.slot_of(key.as_bytes()).unwrap();
                cluster.connection(cluster.owner(slot).unwrap()).unwrap()
            }
            None => self.redis.connection().unwrap(),
        }
    }

    /// Every message holds to the published schema of the output.
    pub(crate) fn assert_schema(&self) {
        let schema = sentry_kafka_schemas::get_schema("buffered-segments", None).unwrap();
        for message in &self.output {
            let payload = message.payload.as_deref().unwrap();
            if let Err(error) = schema.validate_json(payload) {
                panic!(
                    "{error:?}: {}",
                    payload[..payload.len().min(2_000)].escape_ascii()
                );
            }
        }
    }
}

/// Spans that the store says were inserted. Read without our own client.
pub(crate) fn inserted(world: &World) -> u64 {
    let mut connection = world.redis.connection().unwrap();
    let of = |shard: u32, connection: &mut redis::Connection| {
        let key = format!("span-buf:{{{shard}.0}}:pos");
        redis::cmd("HGET")
            .arg(key)
            .arg("spans")
            .query::<Option<u64>>(connection)
            .unwrap()
            .unwrap_or(0)
    };
    (0..SHARDS).map(|shard| of(shard, &mut connection)).sum()
}

/// Settings of a test, with dotted keys.
pub(crate) fn settings(more: &str) -> String {
    format!(
        "buffer.timeout = \"3s\"\nbuffer.root_timeout = \"1s\"\nkafka.producer = {{ \"compression.type\" = \"zstd\" }}\n{more}"
    )
}

/// Traffic whose last span arrives now.
pub(crate) fn traffic(seed: u64, spans: usize, first_serial: u64) -> Vec<SpanMessage> {
    let now = Clock::wall_now();
    let plan = TrafficPlan {
        partitions: SHARDS,
        start: now,
        traces: u64::try_from(spans).unwrap(),
        trace_gap: Duration::from_millis(5),
        trace_length: Duration::from_secs(2),
        late_by: Duration::from_secs(5),
        payload_bytes: 600,
        first_serial,
        ..TrafficPlan::default()
    };
    let mut messages: Vec<SpanMessage> = Traffic::new(seed, plan).spans().take(spans).collect();
    let last = messages
        .iter()
        .map(|message| message.arrival)
        .max()
        .unwrap();
    for message in &mut messages {
        message.arrival = UnixMillis(now.0 - (last.0 - message.arrival.0));
    }
    messages
}

/// A span with as little as the schema wants, and an optional padding in an attribute.
pub(crate) fn span(
    trace: &str,
    id: &str,
    parent: Option<&str>,
    serial: u64,
    padding: usize,
) -> Vec<u8> {
    let parent = parent.map_or("null".to_owned(), |parent| format!("\"{parent}\""));
    format!(
        r#"{{"organization_id":1,"project_id":1,"trace_id":"{trace}","span_id":"{id}","parent_span_id":{parent},"start_timestamp":1.5,"end_timestamp":2.5,"received":3.5,"retention_days":90,"status":"ok","name":"n","attributes":{{"spanbuf.serial":{{"type":"integer","value":{serial}}},"padding":{{"type":"string","value":"{}"}}}}}}"#,
        "x".repeat(padding)
    )
    .into_bytes()
}

pub(crate) fn message(partition: u32, arrival: UnixMillis, payload: Vec<u8>) -> SpanMessage {
    SpanMessage {
        partition,
        arrival,
        serial: None,
        payload,
    }
}

fn holds(list: &str, shard: u32) -> bool {
    list.parse::<shared::shard::ShardList>()
        .is_ok_and(|list| list.iter().any(|held| held.0 == shard))
}

pub(crate) fn assert_no_board(pid: u32) {
    let prefix = format!("spanbuf-{pid}-");
    let left: Vec<_> = std::fs::read_dir("/dev/shm")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
        .filter(|name| name.starts_with(&prefix))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Whether a Redis command is the call of a script, one of whose keys holds that.
pub(crate) fn calls_script_on(part: &'static str) -> impl FnMut(&[&[u8]]) -> bool + Send + 'static {
    let holds = move |key: &[u8]| {
        key.windows(part.len())
            .any(|window| window == part.as_bytes())
    };
    move |arguments| {
        let [name, _, keys, rest @ ..] = arguments else {
            return false;
        };
        let keys = std::str::from_utf8(keys).map(str::parse);
        name.eq_ignore_ascii_case(b"EVALSHA")
            && rest
                .iter()
                .take(keys.map_or(0, |keys| keys.unwrap_or(0)))
                .any(|key| holds(key))
    }
}

/// Whether a Redis command moves a position on: not a bucket's first one, which stands before its first entry.
pub(crate) fn moves_position() -> impl FnMut(&[&[u8]]) -> bool + Send + 'static {
    let mut calls = calls_script_on(":pos");
    move |arguments| calls(arguments) && arguments.get(7).is_some_and(|before| !before.is_empty())
}
