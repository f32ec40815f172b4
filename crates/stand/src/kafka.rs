//! A private Kafka: librdkafka's mock, or a real broker in KRaft mode.
//!
//! In:     a kind, topics.
//! Out:    brokers to connect to; for the mock, its failures.
//! Keeps:  what was started ends with its owner, and its directory goes.
//! Knows:  rdkafka's mock and admin client, scripts/kafka.sh. Not what stands in a topic.
//! Source: docs/house.md 13.

use std::{
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
    pin::pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use nix::sys::signal::Signal;
use rdkafka::{
    ClientContext, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    config::{ClientConfig, RDKafkaLogLevel},
    error::{KafkaError, RDKafkaErrorCode},
    mocking::MockCluster,
    producer::DefaultProducerContext,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use tempfile::TempDir;

use crate::{
    StandError, await_some, free_port,
    process::{Process, Start},
};

/// The input topic.
pub const INPUT: &str = "ingest-spans";
/// The output topic.
pub const OUTPUT: &str = "buffered-segments";
/// What input cannot be read.
pub const INPUT_DLQ: &str = "ingest-spans-dlq";
/// What output cannot be sent.
pub const OUTPUT_DLQ: &str = "buffered-segments-dlq";
/// What was lost, and why.
pub const OUTCOMES: &str = "outcomes";

/// How long the broker may take for an order.
const ORDER: Duration = Duration::from_secs(20);
/// How long a real broker may take to start, with the load of its jars.
const START: Duration = Duration::from_secs(180);
/// How long it may take to stop.
const STOP: Duration = Duration::from_secs(20);

/// A Kafka that ends with its owner.
#[derive(Debug)]
pub enum Kafka {
    /// librdkafka's mock, within this process.
    Mock(MockKafka),
    /// A broker of its own.
    Real(RealKafka),
}

impl Kafka {
    /// A mock with the five topics.
    ///
    /// # Errors
    /// As [`MockKafka::start`].
    pub fn mock(partitions: u32) -> Result<Self, StandError> {
        MockKafka::start(partitions).map(Self::Mock)
    }

    /// A real broker with the five topics.
    ///
    /// # Errors
    /// As [`RealKafka::start`].
    pub fn real(partitions: u32) -> Result<Self, StandError> {
        RealKafka::start(partitions).map(Self::Real)
    }

    /// `host:port`, for `bootstrap.servers`.
    #[must_use]
    pub fn brokers(&self) -> String {
        match self {
            Self::Mock(mock) => mock.brokers(),
            Self::Real(real) => real.brokers(),
        }
    }

    /// Makes a topic with the broker's own settings.
    ///
    /// # Errors
    /// [`StandError::Kafka`] when the broker refuses.
    pub fn create_topic(&self, name: &str, partitions: u32) -> Result<(), StandError> {
        match self {
            Self::Mock(mock) => mock.create_topic(name, partitions),
            Self::Real(real) => real.create_topic(name, partitions, &[]),
        }
    }
}

/// The topics of a run, with their partitions: input and output as told, the others one.
fn topics(partitions: u32) -> [(&'static str, u32); 5] {
    [
        (INPUT, partitions),
        (OUTPUT, partitions),
        (INPUT_DLQ, 1),
        (OUTPUT_DLQ, 1),
        (OUTCOMES, 1),
    ]
}

fn number(partitions: u32) -> Result<i32, StandError> {
    i32::try_from(partitions).map_err(|_| StandError::Malformed {
        what: "a number of partitions".into(),
        reason: format!("{partitions} is too large"),
    })
}

/// librdkafka's mock: one broker, on real ports, usable by other processes.
///
/// It keeps 5 MB and 100,000 batches a partition and silently drops the oldest; unknown topics appear with 4 partitions;
/// it has no admin requests and no offsets for times.
pub struct MockKafka {
    cluster: MockCluster<'static, DefaultProducerContext>,
}

impl fmt::Debug for MockKafka {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MockKafka").field(&self.brokers()).finish()
    }
}

impl MockKafka {
    /// Starts a mock with the five topics.
    ///
    /// # Errors
    /// [`StandError::Kafka`] when librdkafka does not make it.
    pub fn start(partitions: u32) -> Result<Self, StandError> {
        let mock = Self {
            cluster: MockCluster::new(1)?,
        };
        for (name, partitions) in topics(partitions) {
            mock.create_topic(name, partitions)?;
        }
        Ok(mock)
    }

    /// `host:port`, for `bootstrap.servers`.
    #[must_use]
    pub fn brokers(&self) -> String {
        self.cluster.bootstrap_servers()
    }

    /// Makes a topic.
    ///
    /// # Errors
    /// [`StandError::Kafka`] when it exists.
    pub fn create_topic(&self, name: &str, partitions: u32) -> Result<(), StandError> {
        Ok(self.cluster.create_topic(name, number(partitions)?, 1)?)
    }

    /// Cuts every connection and takes no new one.
    ///
    /// # Errors
    /// [`StandError::Kafka`] when the mock is gone.
    pub fn down(&self) -> Result<(), StandError> {
        Ok(self.cluster.broker_down(-1)?)
    }

    /// Takes connections again.
    ///
    /// # Errors
    /// [`StandError::Kafka`] when the mock is gone.
    pub fn up(&self) -> Result<(), StandError> {
        Ok(self.cluster.broker_up(-1)?)
    }

    /// Delays every answer.
    ///
    /// # Errors
    /// [`StandError::Kafka`] when the mock is gone.
    pub fn round_trip_time(&self, delay: Duration) -> Result<(), StandError> {
        Ok(self.cluster.broker_round_trip_time(-1, delay)?)
    }

    /// Fails the next requests of a kind, one for each error, in order.
    pub fn fail_requests(&self, kind: RDKafkaApiKey, errors: &[RDKafkaRespErr]) {
        self.cluster.request_errors(kind, errors);
    }

    /// Takes back the failures that no request has met.
    pub fn fail_no_more(&self, kind: RDKafkaApiKey) {
        self.cluster.clear_request_errors(kind);
    }

    /// Takes a partition its leader, or gives it back.
    ///
    /// # Errors
    /// [`StandError::Kafka`] when the mock is gone.
    pub fn leader(&self, topic: &str, partition: u32, present: bool) -> Result<(), StandError> {
        Ok(self
            .cluster
            .partition_leader(topic, number(partition)?, present.then_some(1))?)
    }
}

/// A real broker: its own port, its own directory, 512 MB of heap, up in about 5 s.
#[derive(Debug)]
pub struct RealKafka {
    // Before the directory: the broker ends before its files go.
    process: Option<Process>,
    port: u16,
    proxied: Option<(u16, String)>,
    directory: TempDir,
}

impl RealKafka {
    /// Starts a broker with the five topics. The first start on a machine loads 54 MB by maven. It dies with the calling
    /// thread.
    ///
    /// # Errors
    /// [`StandError::Ended`] with its log when it does not come up.
    pub fn start(partitions: u32) -> Result<Self, StandError> {
        Self::start_at(free_port()?, partitions, None)
    }

    /// Starts a broker with the five topics and a second port, whose clients are sent on to `advertised`: the address of a
    /// proxy before that port. A broker names its own address to clients, so nothing else stands in their way.
    ///
    /// # Errors
    /// As [`RealKafka::start`].
    pub fn start_behind(
        partitions: u32,
        proxied: u16,
        advertised: &str,
    ) -> Result<Self, StandError> {
        Self::start_at(
            free_port()?,
            partitions,
            Some((proxied, advertised.to_owned())),
        )
    }

    /// As [`RealKafka::start`], at a port, such as the one where clients expect it.
    ///
    /// # Errors
    /// As [`RealKafka::start`]; [`StandError::Ended`] when the port is taken.
    pub fn start_on(port: u16, partitions: u32) -> Result<Self, StandError> {
        Self::start_at(port, partitions, None)
    }

    /// `host:port`, for `bootstrap.servers`.
    #[must_use]
    pub fn brokers(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Makes a topic with settings, such as `("max.message.bytes", "2000")`, and waits until it is there.
    ///
    /// # Errors
    /// [`StandError::Kafka`] when the broker refuses; [`StandError::Late`] when it does not answer.
    pub fn create_topic(
        &self,
        name: &str,
        partitions: u32,
        settings: &[(&str, &str)],
    ) -> Result<(), StandError> {
        let topic = NewTopic {
            name,
            num_partitions: number(partitions)?,
            replication: TopicReplication::Fixed(1),
            config: settings.to_vec(),
        };
        let admin = self.admin()?;
        refused(finish(
            "the making of a topic",
            admin.create_topics([&topic], &options()),
        )??)?;
        await_some(ORDER, &format!("topic {name} to be there"), || {
            has_leaders(&admin, name)
        })
    }

    /// Deletes a topic.
    ///
    /// # Errors
    /// As [`RealKafka::create_topic`].
    pub fn delete_topic(&self, name: &str) -> Result<(), StandError> {
        let admin = self.admin()?;
        refused(finish(
            "the deletion of a topic",
            admin.delete_topics(&[name], &options()),
        )??)
    }

    /// Deletes the messages of a partition below an offset, as retention does.
    ///
    /// # Errors
    /// As [`RealKafka::create_topic`].
    pub fn delete_before(
        &self,
        topic: &str,
        partition: i32,
        offset: i64,
    ) -> Result<(), StandError> {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(topic, partition, Offset::Offset(offset))?;
        let admin = self.admin()?;
        let deleted = finish(
            "the deletion of messages",
            admin.delete_records(&list, &options()),
        )??;
        Ok(deleted
            .elements()
            .iter()
            .try_for_each(|element| element.error())?)
    }

    /// Stops the broker in good order; its data and address stay.
    ///
    /// # Errors
    /// [`StandError`] when it cannot be stopped.
    pub fn stop(&mut self) -> Result<(), StandError> {
        self.process
            .take()
            .map_or(Ok(()), |mut process| process.stop(STOP).map(drop))
    }

    /// Starts a stopped broker with its data, at its address.
    ///
    /// # Errors
    /// As [`RealKafka::start`].
    pub fn start_again(&mut self) -> Result<(), StandError> {
        self.stop()?;
        self.launch()
    }

    /// Freezes the broker: connections stay and nothing answers (STOP).
    ///
    /// # Errors
    /// [`StandError`] when it cannot be signalled.
    pub fn pause(&mut self) -> Result<(), StandError> {
        self.process
            .as_mut()
            .map_or(Ok(()), |process| process.signal(Signal::SIGSTOP))
    }

    /// Lets a frozen broker go on (CONT).
    ///
    /// # Errors
    /// [`StandError`] when it cannot be signalled.
    pub fn resume(&mut self) -> Result<(), StandError> {
        self.process
            .as_mut()
            .map_or(Ok(()), |process| process.signal(Signal::SIGCONT))
    }

    fn start_at(
        port: u16,
        partitions: u32,
        proxied: Option<(u16, String)>,
    ) -> Result<Self, StandError> {
        let directory = tempfile::Builder::new()
            .prefix("stand-kafka-")
            .tempdir()
            .map_err(StandError::system("make a directory for kafka"))?;
        let mut kafka = Self {
            process: None,
            port,
            proxied,
            directory,
        };
        kafka.launch()?;
        for (name, partitions) in topics(partitions) {
            kafka.create_topic(name, partitions, &[])?;
        }
        Ok(kafka)
    }

    /// Starts the broker and waits until it answers.
    fn launch(&mut self) -> Result<(), StandError> {
        let mut arguments: Vec<OsString> =
            vec!["run".into(), "--port".into(), self.port.to_string().into()];
        arguments.extend([
            "--dir".into(),
            self.directory.path().join("broker").into_os_string(),
        ]);
        if let Some((port, advertised)) = &self.proxied {
            arguments.extend(["--proxied".into(), format!("{port}={advertised}").into()]);
        }
        let script = script_path();
        let mut process = Process::start(Start {
            program: script.as_os_str(),
            hint: "run from the checkout",
            arguments,
            environment: Vec::new(),
            log: self.directory.path().join("kafka.log"),
        })?;
        let admin = self.admin()?;
        await_some(START, "an answer of kafka", || match process.ended() {
            Ok(None) => admin
                .inner()
                .fetch_metadata(None, Duration::from_secs(1))
                .is_ok()
                .then_some(Ok(())),
            Ok(Some(status)) => Some(Err(process.died(status))),
            Err(error) => Some(Err(error)),
        })??;
        self.process = Some(process);
        Ok(())
    }

    fn admin(&self) -> Result<AdminClient<DefaultClientContext>, StandError> {
        let mut client = ClientConfig::new();
        client
            .set("bootstrap.servers", self.brokers())
            .set("reconnect.backoff.max.ms", "200");
        // A broker that is still starting is no news.
        client.set_log_level(RDKafkaLogLevel::Emerg);
        Ok(client.create()?)
    }
}

/// scripts/kafka.sh of the checkout in which this was built.
fn script_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/kafka.sh")
}

fn options() -> AdminOptions {
    AdminOptions::new()
        .request_timeout(Some(ORDER))
        .operation_timeout(Some(ORDER))
}

fn refused(answers: Vec<Result<String, (String, RDKafkaErrorCode)>>) -> Result<(), StandError> {
    match answers.into_iter().find_map(Result::err) {
        Some((_, code)) => Err(KafkaError::AdminOp(code).into()),
        None => Ok(()),
    }
}

/// Whether the broker tells a leader for every partition of a topic.
fn has_leaders<C: ClientContext>(admin: &AdminClient<C>, name: &str) -> Option<()> {
    let metadata = admin
        .inner()
        .fetch_metadata(Some(name), Duration::from_secs(2))
        .ok()?;
    let topic = metadata.topics().first()?;
    let led =
        !topic.partitions().is_empty() && topic.partitions().iter().all(|part| part.leader() >= 0);
    (topic.error().is_none() && led).then_some(())
}

/// What a future of the admin client comes to; it is moved by librdkafka's thread, so looking at it is enough.
fn finish<T>(what: &str, future: impl Future<Output = T>) -> Result<T, StandError> {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    await_some(ORDER, what, || match future.as_mut().poll(&mut context) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use shared::time::UnixMillis;

    use super::*;
    use crate::offsets::{commit, committed, watermarks};
    use crate::proxy::Proxy;
    use crate::topics::{Producer, Reader, Record};

    const SOON: Duration = Duration::from_secs(20);

    /// Messages in three partitions, sent and read back with all that they carry.
    fn round_trip(brokers: &str) {
        let mut producer = Producer::new(brokers).unwrap();
        let mut reader = Reader::new(brokers, INPUT).unwrap();
        for count in 0..30_i32 {
            let text = format!("payload {count}");
            let record = Record {
                partition: count % 3,
                time: Some(UnixMillis(
                    1_700_000_000_000 + u64::try_from(count).unwrap(),
                )),
                key: (count == 4).then_some(b"key"),
                payload: (count != 5).then_some(text.as_bytes()),
                headers: vec![("one", b"1"), ("raw", &[0, 255])],
            };
            producer.send(INPUT, &record).unwrap();
        }
        producer.flush(SOON).unwrap();
        assert_eq!(reader.read_to_end(SOON).unwrap().len(), 30);
        let messages = reader.take();
        let of = |partition: i32, offset: i64| {
            messages
                .iter()
                .find(|message| (message.partition, message.offset) == (partition, offset))
                .unwrap()
        };
        assert_eq!(of(1, 1).key.as_deref(), Some(&b"key"[..]));
        assert_eq!(of(1, 1).timestamp, Some(1_700_000_000_004));
        assert_eq!(of(1, 1).payload.as_deref(), Some(&b"payload 4"[..]));
        assert_eq!(of(1, 1).header("raw"), Some(&[0, 255][..]));
        assert_eq!(of(2, 1).payload, None);

        producer
            .send(
                INPUT,
                &Record {
                    payload: Some(b"last"),
                    ..Record::default()
                },
            )
            .unwrap();
        producer.flush(SOON).unwrap();
        reader
            .read_until(SOON, "the last message", |messages| !messages.is_empty())
            .unwrap();
        assert_eq!(
            watermarks(brokers, INPUT).unwrap(),
            BTreeMap::from([(0, (0, 11)), (1, (0, 10)), (2, (0, 10))])
        );
        assert_eq!(committed(brokers, "some", INPUT).unwrap(), BTreeMap::new());
        let offsets = BTreeMap::from([(0, 7), (2, 3)]);
        commit(brokers, "some", INPUT, &offsets).unwrap();
        assert_eq!(committed(brokers, "some", INPUT).unwrap(), offsets);
    }

    #[test]
    fn the_mock_takes_and_gives_back_messages() {
        let mock = Kafka::mock(3).unwrap();
        round_trip(&mock.brokers());
    }

    #[test]
    fn the_mock_fails_as_told() {
        let mock = MockKafka::start(1).unwrap();
        let mut producer = Producer::new(&mock.brokers()).unwrap();
        mock.fail_requests(
            RDKafkaApiKey::Produce,
            &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED],
        );
        producer
            .send(
                INPUT,
                &Record {
                    payload: Some(b"refused"),
                    ..Record::default()
                },
            )
            .unwrap();
        let error = producer.flush(SOON).unwrap_err();
        assert!(
            matches!(
                error,
                StandError::Unacknowledged {
                    sent: 1,
                    failed: 1,
                    ..
                }
            ),
            "{error}"
        );

        mock.down().unwrap();
        let mut producer = Producer::new(&mock.brokers()).unwrap();
        producer
            .send(
                INPUT,
                &Record {
                    payload: Some(b"late"),
                    ..Record::default()
                },
            )
            .unwrap();
        let error = producer.flush(Duration::from_millis(200)).unwrap_err();
        assert!(matches!(error, StandError::Late { .. }), "{error}");
        mock.up().unwrap();
        producer.flush(SOON).unwrap();
    }

    #[test]
    fn a_real_broker_takes_and_gives_back_messages_and_ends_with_its_owner() {
        let mut kafka = RealKafka::start(3).unwrap();
        round_trip(&kafka.brokers());
        kafka
            .create_topic("small", 2, &[("max.message.bytes", "2000")])
            .unwrap();
        assert!(kafka.create_topic("small", 2, &[]).is_err());
        let mut producer = Producer::new(&kafka.brokers()).unwrap();
        let noise: Vec<u8> = (0..40_000_u32)
            .flat_map(|count| count.wrapping_mul(2_654_435_761).to_le_bytes())
            .collect();
        producer
            .send(
                "small",
                &Record {
                    payload: Some(&noise),
                    ..Record::default()
                },
            )
            .unwrap();
        assert!(producer.flush(SOON).is_err());
        kafka.start_again().unwrap();
        assert_eq!(watermarks(&kafka.brokers(), INPUT).unwrap()[&1], (0, 10));
        let (port, path) = (kafka.port, kafka.directory.path().to_path_buf());
        drop(kafka);
        assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
        assert!(!path.exists());
    }

    #[test]
    fn a_proxy_stands_before_a_real_broker() {
        let port = free_port().unwrap();
        let proxy = Proxy::start(&format!("127.0.0.1:{port}")).unwrap();
        let _kafka = RealKafka::start_behind(1, port, &proxy.address()).unwrap();
        let mut producer = Producer::new(&proxy.address()).unwrap();
        let record = Record {
            payload: Some(b"through"),
            ..Record::default()
        };
        producer.send(INPUT, &record).unwrap();
        producer.flush(SOON).unwrap();
        proxy.hold();
        producer.send(INPUT, &record).unwrap();
        let error = producer.flush(Duration::from_millis(300)).unwrap_err();
        assert!(matches!(error, StandError::Late { .. }), "{error}");
        proxy.release();
        producer.flush(SOON).unwrap();
    }
}
