//! A Kafka, a Redis or a cluster of them behind a proxy, a supervisor with its workers, and both sides of the ledger.
//!
//! In:     a Kafka, settings.
//! Out:    what came out, compared with what was sent; what Redis holds, read without our own client.
//! Keeps:  one supervisor at a time; what a test started ends with it.
//! Knows:  the stand.
//! Source: docs/house.md 13.

pub(crate) mod store;

use std::{collections::BTreeMap, time::Duration};

use nix::sys::signal::Signal;
use shared::time::{Clock, UnixMillis};
use stand::{
    eventually,
    kafka::{INPUT, Kafka, OUTPUT},
    launch::{Supervisor, SupervisorPlan, Worker},
    ledger::{Balance, Ledger},
    proxy::Proxy,
    topics::{Message, Producer, Reader, Record},
    traffic::{SpanMessage, Traffic, TrafficPlan},
};

use store::Store;

pub(crate) const SHARDS: u32 = 4;
/// The second output topic of a world on a cluster.
const SECOND: &str = "buffered-segments-2";
/// How long anything may take that has no reason to take long: two shared cores.
pub(crate) const LONG: Duration = Duration::from_secs(90);

/// Everything of one test. Dropped in this order: the supervisor first.
pub(crate) struct World {
    supervisor: Option<Supervisor>,
    pub(crate) plan: SupervisorPlan,
    pub(crate) proxy: Proxy,
    pub(crate) redis: Store,
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
    /// Starts all but the supervisor, on what `STORE` says. Timeouts are a second with a root, three without.
    pub(crate) fn new(kafka: Kafka) -> Self {
        let mut proxy = Proxy::empty();
        let redis = Store::start_with(&mut proxy, &[]);
        Self::on(kafka, proxy, redis)
    }

    /// On a cluster of three with `replicas` each, whatever `STORE` says.
    pub(crate) fn on_cluster(kafka: Kafka, replicas: usize) -> Self {
        let mut proxy = Proxy::empty();
        let redis = Store::cluster_with(&mut proxy, replicas, &[]);
        Self::on(kafka, proxy, redis)
    }

    /// On a cluster there are four buckets a shard, a slice, two ingest workers and two output topics.
    fn on(kafka: Kafka, proxy: Proxy, redis: Store) -> Self {
        let mut plan = SupervisorPlan::new(SHARDS, &kafka.brokers(), &proxy.addresses());
        plan.max_workers = 2;
        let mut topics = vec![OUTPUT];
        if redis.is_cluster() {
            plan.ingest_workers = 2;
            kafka.create_topic(SECOND, SHARDS).unwrap();
            topics.push(SECOND);
        }
        let reader = |topic: &&str| Reader::new(&kafka.brokers(), topic).unwrap();
        let mut world = Self {
            supervisor: None,
            plan,
            proxy,
            redis,
            ledger: Ledger::new(),
            output: Vec::new(),
            said: String::new(),
            readers: topics.iter().map(reader).collect(),
            came: vec![0; 2],
            producer: Producer::new(&kafka.brokers()).unwrap(),
            kafka,
        };
        world.plan.settings = world.settings("");
        world
    }

    /// Settings of a test, with dotted keys.
    pub(crate) fn settings(&self, more: &str) -> String {
        let topics = if self.readers.len() == 2 && !more.contains("kafka.output_topics") {
            format!("kafka.output_topics = [\"{OUTPUT}\", \"{SECOND}\"]\n")
        } else {
            String::new()
        };
        format!(
            "buffer.timeout = \"3s\"\nbuffer.root_timeout = \"1s\"\nkafka.producer = {{ \"compression.type\" = \"zstd\" }}\n{}{topics}{more}",
            self.redis.settings()
        )
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
        self.send_untold(messages);
    }

    /// Sends spans that the ledger is told of later.
    pub(crate) fn send_untold(&mut self, messages: &[SpanMessage]) {
        for message in messages {
            self.producer.send(INPUT, &message.record()).unwrap();
        }
        self.producer.flush(LONG).unwrap();
    }

    /// Sends spans one by one, a pause behind each.
    pub(crate) fn trickle(&mut self, messages: &[SpanMessage], pause: Duration) {
        self.ledger.sent_all(messages).unwrap();
        for message in messages {
            self.producer.send(INPUT, &message.record()).unwrap();
            stand::pause(pause);
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

    /// All workers, once every one of them has been at work.
    pub(crate) fn await_healthy(&mut self) -> Vec<Worker> {
        let workers = self.workers();
        eventually(LONG, "healthy workers", || {
            self.said_healthy().then_some(())
        });
        workers
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
        let before = self.output.len();
        eventually(LONG, "a segment", || {
            self.read_some();
            (self.output.len() > before).then_some(())
        });
    }

    /// Reads what comes within half a second.
    pub(crate) fn read_some(&mut self) {
        let each = Duration::from_millis(500) / u32::try_from(self.readers.len()).unwrap();
        for (reader, count) in self.readers.iter_mut().zip(&mut self.came) {
            // It is late every time: nothing is ever enough.
            drop(reader.read_until(each, "", |_| false));
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

    /// Drains, reads to the end, and proves that nothing is missing and nothing came that was not sent: what a store lost comes
    /// again, maybe with others beside it.
    pub(crate) fn settle_with_losses(&mut self) {
        self.drain();
        let balance = self.read_rest();
        assert!(
            balance.missing.is_empty() && balance.is_clean(),
            "{balance}"
        );
    }

    /// As [`World::settle`]; no span came out twice.
    pub(crate) fn settle_exact(&mut self) {
        let balance = self.settle();
        assert!(balance.is_exact(), "{balance}");
        self.assert_store_is_even();
    }

    /// Inserted = produced + dropped + repeats, and nothing is left in Redis. Read without our own client.
    pub(crate) fn assert_store_is_even(&self) {
        for (shard, bucket) in self.redis.buckets() {
            let key = |what: &str| self.redis.key(shard, bucket, what);
            let mut connection = self.redis.connection(&key("pos"));
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
        let journals = self.redis.journals("*");
        assert!(journals.is_empty(), "{journals:?}");
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
