//! Writes to topics and reads them: what stands in Kafka, as it stands there.
//!
//! In:     records with their time and partition; a topic's name.
//! Out:    messages with partition, offset, time and headers.
//! Keeps:  `flush` tells of every record that was not acknowledged; a reader reads every partition from its beginning.
//! Knows:  rdkafka. No message of ours.
//! Source: docs/house.md 13.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rdkafka::{
    ClientContext, Message as _, Offset, TopicPartitionList,
    config::ClientConfig,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, DeliveryResult, Header, Headers, OwnedHeaders},
    producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer},
};
use shared::time::{Clock, UnixMillis};

use crate::{
    StandError,
    offsets::{consumer, ends, partitions},
    pause,
};

/// How long one wait for messages lasts.
const SLICE: Duration = Duration::from_millis(50);

/// A message to be sent.
#[derive(Debug, Clone, Default)]
pub struct Record<'r> {
    /// The partition.
    pub partition: i32,
    /// The message's time; librdkafka's own when none.
    pub time: Option<UnixMillis>,
    /// The key.
    pub key: Option<&'r [u8]>,
    /// The value; none is a tombstone.
    pub payload: Option<&'r [u8]>,
    /// The headers, in order.
    pub headers: Vec<(&'r str, &'r [u8])>,
}

/// A message as it stands in a topic.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
    /// The message's time, in Unix milliseconds.
    pub timestamp: Option<i64>,
    /// The key.
    pub key: Option<Vec<u8>>,
    /// The value; none is a tombstone.
    pub payload: Option<Vec<u8>>,
    /// The headers, in order; one without a value is empty.
    pub headers: Vec<(String, Vec<u8>)>,
}

impl Message {
    /// The first header of that name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_slice())
    }

    fn of(message: &BorrowedMessage<'_>) -> Self {
        let headers = message.headers().map_or_else(Vec::new, |headers| {
            headers
                .iter()
                .map(|header| {
                    (
                        header.key.to_owned(),
                        header.value.unwrap_or_default().to_vec(),
                    )
                })
                .collect()
        });
        Self {
            partition: message.partition(),
            offset: message.offset(),
            timestamp: message.timestamp().to_millis(),
            key: message.key().map(<[u8]>::to_vec),
            payload: message.payload().map(<[u8]>::to_vec),
            headers,
        }
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let payload = self
            .payload
            .as_deref()
            .map(|payload| payload[..payload.len().min(200)].escape_ascii().to_string());
        f.debug_struct("Message")
            .field("partition", &self.partition)
            .field("offset", &self.offset)
            .field("timestamp", &self.timestamp)
            .field("payload", &payload)
            .field("headers", &self.headers.len())
            .finish_non_exhaustive()
    }
}

/// Counts of what the brokers said.
#[derive(Debug, Default)]
struct Answers {
    taken: AtomicU64,
    refused: AtomicU64,
    last: std::sync::Mutex<Option<RDKafkaErrorCode>>,
}

#[derive(Debug, Clone)]
struct Counting(Arc<Answers>);

impl ClientContext for Counting {}

impl ProducerContext for Counting {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        match result {
            Ok(_) => self.0.taken.fetch_add(1, Ordering::Relaxed),
            Err((error, _)) => {
                *self
                    .0
                    .last
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner) =
                    error.rdkafka_error_code();
                self.0.refused.fetch_add(1, Ordering::Relaxed)
            }
        };
    }
}

/// Sends messages in batches.
pub struct Producer {
    producer: ThreadedProducer<Counting>,
    answers: Arc<Answers>,
    sent: u64,
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer")
            .field("sent", &self.sent)
            .field("answers", &self.answers)
            .finish_non_exhaustive()
    }
}

impl Producer {
    /// Makes a producer whose batches are compressed by zstd: a mock broker keeps 5 MB of them a partition.
    ///
    /// # Errors
    /// As [`Producer::packing`].
    pub fn new(brokers: &str) -> Result<Self, StandError> {
        Self::packing(brokers, "zstd")
    }

    /// Makes a producer whose batches are compressed by a codec of Kafka's.
    ///
    /// # Errors
    /// [`StandError::Kafka`] when librdkafka does not.
    pub fn packing(brokers: &str, codec: &str) -> Result<Self, StandError> {
        let answers = Arc::new(Answers::default());
        let producer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("client.id", "stand-producer")
            .set("acks", "all")
            .set("enable.idempotence", "true")
            .set("compression.type", codec)
            .set("linger.ms", "5")
            .set("message.max.bytes", "33554432")
            .set("message.timeout.ms", "30000")
            .create_with_context(Counting(Arc::clone(&answers)))?;
        Ok(Self {
            producer,
            answers,
            sent: 0,
        })
    }

    /// Hands a record to librdkafka; waits while its queue is full.
    ///
    /// # Errors
    /// [`StandError::Kafka`] when it does not take the record, such as for its size.
    pub fn send(&mut self, topic: &str, record: &Record<'_>) -> Result<(), StandError> {
        let mut out = BaseRecord::<[u8], [u8]>::to(topic).partition(record.partition);
        out.key = record.key;
        out.payload = record.payload;
        out.timestamp = record.time.and_then(|time| i64::try_from(time.0).ok());
        if !record.headers.is_empty() {
            out.headers = Some(record.headers.iter().fold(
                OwnedHeaders::new(),
                |headers, &(key, value)| {
                    headers.insert(Header {
                        key,
                        value: Some(value),
                    })
                },
            ));
        }
        self.sent += 1;
        loop {
            match self.producer.send(out) {
                Ok(()) => return Ok(()),
                // Ends: librdkafka gives every message up after message.timeout.ms.
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                    out = back;
                    pause(Duration::from_millis(5));
                }
                Err((error, _)) => {
                    self.sent -= 1;
                    return Err(error.into());
                }
            }
        }
    }

    /// Waits until every record sent so far is answered.
    ///
    /// # Errors
    /// [`StandError::Unacknowledged`] when the answer was no for some; [`StandError::Late`] when it did not come.
    pub fn flush(&mut self, deadline: Duration) -> Result<(), StandError> {
        let begun = Clock::mono_now();
        // A time-out shows in the counts.
        drop(self.producer.flush(deadline));
        loop {
            let (taken, failed) = (
                self.answers.taken.load(Ordering::Relaxed),
                self.answers.refused.load(Ordering::Relaxed),
            );
            if taken + failed < self.sent && Clock::mono_now().since(begun) < deadline {
                // Handed out by librdkafka, not yet by our counting.
                pause(Duration::from_millis(1));
                continue;
            }
            return match failed {
                0 if taken >= self.sent => Ok(()),
                0 => Err(StandError::Late {
                    what: format!("acknowledgement of {} messages", self.sent),
                    after: deadline,
                    seen: format!("{taken} acknowledged"),
                }),
                _ => Err(StandError::Unacknowledged {
                    sent: self.sent,
                    failed,
                    reason: self.last_reason(),
                }),
            };
        }
    }

    /// Records sent so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent
    }

    fn last_reason(&self) -> String {
        let last = self
            .answers
            .last
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        last.map_or_else(|| "an unknown reason".into(), |code| code.to_string())
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        // Dropping purges what is queued: a short wait saves a test that forgot to flush from a riddle.
        drop(self.producer.flush(Duration::from_secs(1)));
    }
}

/// Reads all partitions of a topic from their beginning, without a group.
pub struct Reader {
    consumer: BaseConsumer,
    topic: String,
    next: BTreeMap<i32, i64>,
    messages: Vec<Message>,
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader")
            .field("topic", &self.topic)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

impl Reader {
    /// Makes a reader of a topic that exists.
    ///
    /// # Errors
    /// [`StandError::Kafka`] when the broker does not tell the topic's partitions.
    pub fn new(brokers: &str, topic: &str) -> Result<Self, StandError> {
        // A group is named because librdkafka wants one; nothing is committed, no group is joined.
        let consumer: BaseConsumer = consumer(brokers, "stand-reader")
            .set("fetch.message.max.bytes", "33554432")
            .set("auto.offset.reset", "earliest")
            .create()?;
        let partitions = partitions(&consumer, topic)?;
        let mut assignment = TopicPartitionList::new();
        for &partition in &partitions {
            assignment.add_partition_offset(topic, partition, Offset::Beginning)?;
        }
        consumer.assign(&assignment)?;
        let next = partitions
            .into_iter()
            .map(|partition| (partition, 0))
            .collect();
        Ok(Self {
            consumer,
            topic: topic.into(),
            next,
            messages: Vec::new(),
        })
    }

    /// Everything read so far, in order within each partition.
    #[must_use]
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Hands over everything read so far; reading goes on behind it.
    pub fn take(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.messages)
    }

    /// Reads on until `enough` says so of everything read.
    ///
    /// # Errors
    /// [`StandError::Late`] at the deadline; what was read stays.
    pub fn read_until(
        &mut self,
        deadline: Duration,
        what: &str,
        mut enough: impl FnMut(&[Message]) -> bool,
    ) -> Result<&[Message], StandError> {
        let begun = Clock::mono_now();
        let mut looked_at = usize::MAX;
        loop {
            if looked_at != self.messages.len() && enough(&self.messages) {
                return Ok(&self.messages);
            }
            looked_at = self.messages.len();
            if Clock::mono_now().since(begun) >= deadline {
                let seen = format!("{looked_at} messages in {}", self.topic);
                return Err(StandError::Late {
                    what: what.into(),
                    after: deadline,
                    seen,
                });
            }
            self.read_some()?;
        }
    }

    /// Reads on to what is the end of every partition at this moment.
    ///
    /// # Errors
    /// [`StandError::Late`] at the deadline; [`StandError::Kafka`] when the broker does not tell the ends.
    pub fn read_to_end(&mut self, deadline: Duration) -> Result<&[Message], StandError> {
        let ends = ends(&self.consumer, &self.topic, self.next.keys().copied())?;
        let begun = Clock::mono_now();
        while ends
            .iter()
            .any(|(partition, &(low, high))| low < high && self.next.get(partition) < Some(&high))
        {
            if Clock::mono_now().since(begun) >= deadline {
                let what = format!("the end of {} at {ends:?}", self.topic);
                return Err(StandError::Late {
                    what,
                    after: deadline,
                    seen: format!("{:?}", self.next),
                });
            }
            self.read_some()?;
        }
        Ok(&self.messages)
    }

    /// Waits a moment for a message, and takes all that stand behind it.
    fn read_some(&mut self) -> Result<(), StandError> {
        let mut wait = SLICE;
        while let Some(polled) = self.consumer.poll(wait) {
            match polled {
                Ok(message) => {
                    self.next.insert(message.partition(), message.offset() + 1);
                    self.messages.push(Message::of(&message));
                }
                // librdkafka goes on by itself when a broker is away.
                Err(error) if passing(&error) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            wait = Duration::ZERO;
            if self.messages.len().is_multiple_of(1024) {
                break;
            }
        }
        Ok(())
    }
}

fn passing(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(
            RDKafkaErrorCode::BrokerTransportFailure
                | RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::OperationTimedOut
                | RDKafkaErrorCode::NotLeaderForPartition
                | RDKafkaErrorCode::LeaderNotAvailable
        )
    )
}
