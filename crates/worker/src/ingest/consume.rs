//! The consumer: partitions assigned by hand, records in bounded batches, the end of each partition as the broker tells it.
//!
//! In:     the shards, the offset where each begins, which of them are paused.
//! Out:    `Collected`: records in order, and what was learnt beside them.
//! Keeps:  polling goes on while partitions are paused; nothing is skipped without being said.
//! Knows:  rdkafka's consumer. Not what a record means.
//! Source: docs/spec.md 2.6, 4.1, 6.2, 7.4.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

use bytes::Bytes;
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use log::warn;
use rdkafka::{
    ClientContext, Offset, TopicPartitionList,
    config::{ClientConfig, RDKafkaLogLevel},
    consumer::{BaseConsumer, Consumer, ConsumerContext},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
    message::{BorrowedMessage, Message},
};
use shared::{
    config::Kafka,
    shard::{ShardId, ShardList},
    time::{Clock, MonoNanos, UnixMillis},
};

use super::{
    batch::Record,
    clock::message_time,
    reading::{Reading, ends_pause},
};
use crate::{
    chain,
    kafka::{self, ANSWER_TIMEOUT, Context, MakeError},
};

/// How long the end of a worker waits for the close of its consumer.
const CLOSE_WAIT: Duration = Duration::from_secs(2);
/// How long one wait for the answer to a commit lasts.
const COMMIT_SLICE: Duration = Duration::from_millis(50);
/// How long the question for the ends may take: it stands in the way of the next batch.
const ENDS_TIMEOUT: Duration = Duration::from_millis(500);
/// How long the broker may be silent before the consumer is made anew, and after that once more.
const RENEW_AFTER: Duration = Duration::from_secs(20);

/// What the consumer tells beside messages.
#[derive(Debug, Default)]
pub struct Events {
    commits_answered: AtomicU64,
}

impl ClientContext for Events {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        Context.log(level, facility, line);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        Context.error(error, reason);
    }
}

impl ConsumerContext for Events {
    fn commit_callback(&self, result: KafkaResult<()>, offsets: &TopicPartitionList) {
        self.commits_answered.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = result {
            warn!(
                "commit offsets shards={}: {error} (the next commit makes up for it)",
                offsets.count()
            );
        }
    }
}

/// librdkafka's word that the broker cannot be reached, or refuses.
pub type Outage = KafkaError;

/// What a call to the consumer may end with.
#[derive(Debug, thiserror::Error)]
pub enum ConsumeError {
    /// A property that librdkafka does not take.
    #[error("make kafka consumer (check kafka.properties and kafka.consumer)")]
    Make(#[source] MakeError),
    /// The broker did not answer, or not well.
    #[error("{attempt}")]
    Ask {
        /// What was asked, of whom.
        attempt: String,
        /// librdkafka's word.
        source: KafkaError,
    },
    /// A topic is not there.
    #[error("find topic={topic}: it does not exist (create it, or check {key})")]
    NoTopic {
        /// The topic.
        topic: String,
        /// The key that names it.
        key: &'static str,
    },
    /// The input topic has fewer partitions than there are shards.
    #[error(
        "find partition={shard} of topic={topic}: the topic has partitions={partitions} (check --shards)"
    )]
    NoPartition {
        /// The input topic.
        topic: String,
        /// The first shard that is missing.
        shard: ShardId,
        /// How many partitions there are.
        partitions: usize,
    },
}

impl ConsumeError {
    /// Whether a later try may go better.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        matches!(self, Self::Ask { source, .. } if !kafka::is_denied(source))
    }
}

impl crate::Refusal for ConsumeError {}

/// The consumer and where each of its shards stands.
pub struct Input {
    client: ClientConfig,
    consumer: BaseConsumer<Events>,
    /// When the consumer was made.
    made: MonoNanos,
    /// The one before it.
    leaving: Option<Leaving>,
    topic: String,
    brokers: String,
    shards: BTreeMap<ShardId, Reading>,
    ends_asked: Option<MonoNanos>,
    ends_failed: bool,
    /// Where the questions one by one go on.
    ends_cursor: usize,
    /// Bytes of the last batch: the next one gets room for as many.
    batch_bytes: usize,
}

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Input")
            .field("topic", &self.topic)
            .field("shards", &self.shards)
            .finish_non_exhaustive()
    }
}

/// A consumer on its way out. librdkafka's close waits for the answers to commits, of a broker that is away for a minute, and its
/// caller with it: it has a thread to itself.
struct Leaving(Receiver<()>);

impl Leaving {
    fn start(consumer: BaseConsumer<Events>) -> Self {
        let (left, leaving) = bounded(0);
        // Without a thread it is closed here.
        let thread = thread::Builder::new().spawn(move || {
            drop(consumer);
            drop(left);
        });
        drop(thread);
        Self(leaving)
    }

    /// Waits at most that long; says whether it has left.
    fn has_left(&self, length: Duration) -> bool {
        self.0.recv_timeout(length) == Err(RecvTimeoutError::Disconnected)
    }
}

/// First and last offset that a partition holds, the last one exclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The oldest offset that is left.
    pub low: u64,
    /// The offset that the next record will get.
    pub high: u64,
}

/// A committed offset with what was committed beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The offset.
    pub offset: u64,
    /// The metadata, as text.
    pub metadata: String,
}

/// Limits of one batch.
#[derive(Debug, Clone, Copy)]
pub struct BatchLimits {
    /// Records.
    pub spans: usize,
    /// Bytes of values.
    pub bytes: u64,
    /// Until when the batch stays open once it has a record; where that is over, only what is there is taken.
    pub until: MonoNanos,
    /// How long to wait for the first record.
    pub idle: Duration,
}

/// What one turn of reading gave.
#[derive(Debug, Default)]
pub struct Collected {
    messages: Vec<Received>,
    /// The values, one behind the other. Copied: the batch goes on to other threads, and a message of librdkafka's is its consumer's.
    values: Vec<u8>,
    /// Shards that came to their end, with no message behind it.
    pub ends: Vec<ShardId>,
    /// A partition lost its place: its next offset is no longer there.
    pub lost_place: bool,
    /// The broker cannot be reached, or refuses.
    pub outage: Option<Outage>,
}

/// One message, and where its value stands among the others.
#[derive(Debug)]
struct Received {
    shard: ShardId,
    offset: u64,
    time: Option<UnixMillis>,
    value: Option<Range<usize>>,
}

impl Input {
    /// Makes the consumer; no broker is asked.
    ///
    /// # Errors
    /// [`ConsumeError::Make`].
    pub fn new(kafka: &Kafka, prefetch_bytes: u64) -> Result<Self, ConsumeError> {
        let client = kafka::consumer(kafka, prefetch_bytes);
        Ok(Self {
            consumer: make(&client)?,
            client,
            made: Clock::mono_now(),
            leaving: None,
            topic: kafka.input_topic.clone(),
            brokers: kafka.brokers.clone(),
            shards: BTreeMap::new(),
            ends_asked: None,
            ends_failed: false,
            ends_cursor: 0,
            batch_bytes: 0,
        })
    }

    /// The consumer itself, for commits.
    #[must_use]
    pub fn consumer(&self) -> &BaseConsumer<Events> {
        &self.consumer
    }

    /// The input topic.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// Proves that the topic and all partitions exist; gives the number of partitions.
    ///
    /// # Errors
    /// [`ConsumeError::NoTopic`], [`ConsumeError::NoPartition`], or [`ConsumeError::Ask`] when the broker does not answer.
    pub fn prove(&self, shards: &ShardList) -> Result<usize, ConsumeError> {
        let there = self.prove_topic(&self.topic, "kafka.input_topic")?;
        match shards.iter().find(|shard| !there.contains(&shard.0)) {
            Some(shard) => Err(ConsumeError::NoPartition {
                topic: self.topic.clone(),
                shard,
                partitions: there.len(),
            }),
            None => Ok(there.len()),
        }
    }

    /// Proves that a topic exists; gives its partitions.
    ///
    /// # Errors
    /// [`ConsumeError::NoTopic`], or [`ConsumeError::Ask`] when the broker does not answer.
    pub fn prove_topic(&self, topic: &str, key: &'static str) -> Result<Vec<u32>, ConsumeError> {
        let there = kafka::partitions(self.consumer.client(), topic)
            .map_err(|source| self.asked("read metadata", source))?;
        there.ok_or_else(|| ConsumeError::NoTopic {
            topic: topic.to_owned(),
            key,
        })
    }

    /// The offsets that this consumer's group committed.
    ///
    /// # Errors
    /// [`ConsumeError::Ask`].
    pub fn committed(
        &self,
        shards: &ShardList,
    ) -> Result<BTreeMap<ShardId, Committed>, ConsumeError> {
        let asked = self.list(shards.iter().map(|shard| (shard, Offset::Invalid)))?;
        let answer = self.consumer.committed_offsets(asked, ANSWER_TIMEOUT);
        let answer = answer.map_err(|source| self.asked("read committed offsets", source))?;
        let mut committed = BTreeMap::new();
        for element in answer.elements() {
            element
                .error()
                .map_err(|source| self.asked("read committed offsets", source))?;
            if let (Ok(partition), Some(offset)) =
                (u32::try_from(element.partition()), real(element.offset()))
            {
                committed.insert(
                    ShardId(partition),
                    Committed {
                        offset,
                        metadata: element.metadata().to_owned(),
                    },
                );
            }
        }
        Ok(committed)
    }

    /// What the partition holds.
    ///
    /// # Errors
    /// [`ConsumeError::Ask`].
    pub fn extent(&self, shard: ShardId) -> Result<Extent, ConsumeError> {
        let answer =
            self.consumer
                .fetch_watermarks(&self.topic, partition_of(shard), ANSWER_TIMEOUT);
        let (low, high) = answer.map_err(|source| self.asked("read watermarks", source))?;
        Ok(Extent {
            low: u64::try_from(low).unwrap_or(0),
            high: u64::try_from(high).unwrap_or(0),
        })
    }

    /// Begins to read every given shard at its offset; what was read ahead is let go. Paused shards stay paused.
    ///
    /// # Errors
    /// [`ConsumeError::Ask`].
    pub fn begin(&mut self, starts: &BTreeMap<ShardId, u64>) -> Result<(), ConsumeError> {
        // The others are assigned anew as well, and the consumer comes to their ends anew.
        let now = Clock::mono_now();
        for reading in self.shards.values_mut() {
            *reading = Reading::at(reading.next, reading.paused, now);
        }
        for (&shard, &next) in starts {
            let reading = self.shards.entry(shard);
            let reading = reading.or_insert_with(|| Reading::at(next, false, now));
            reading.next = next;
        }
        let all = self.list(
            self.shards
                .iter()
                .map(|(&shard, reading)| (shard, offset_of(reading.next))),
        )?;
        self.consumer
            .assign(&all)
            .map_err(|source| self.asked("assign partitions", source))?;
        let paused = self.shards.iter().filter(|(_, reading)| reading.paused);
        let paused = self.list(paused.map(|(&shard, _)| (shard, Offset::Invalid)))?;
        self.consumer
            .pause(&paused)
            .map_err(|source| self.asked("pause partitions", source))
    }

    /// How long at most a shard has been silent that is read: no message, no word of the broker on it.
    #[must_use]
    pub fn silence(&self, now: MonoNanos) -> Duration {
        let read = self.shards.values().filter(|reading| !reading.paused);
        let silences = read.map(|reading| now.since(reading.heard));
        silences.max().unwrap_or_default()
    }

    /// Makes the consumer anew when there has been silence for long: librdkafka may not find its way back to a broker that is there
    /// again. Each shard goes on where it stands; what fails is tried again later, with the consumer of before.
    pub fn renew(&mut self, silent: Duration) {
        let now = Clock::mono_now();
        let is_leaving = |leaving: &Leaving| !leaving.has_left(Duration::ZERO);
        if silent.min(now.since(self.made)) < RENEW_AFTER
            || self.leaving.as_ref().is_some_and(is_leaving)
        {
            return;
        }
        self.made = now;
        warn!(
            "kafka consumer is made anew silent={}s brokers={}",
            silent.as_secs(),
            self.brokers
        );
        let renewed = make(&self.client).and_then(|consumer| {
            let mut other = std::mem::replace(&mut self.consumer, consumer);
            let places = self.shards.iter().map(|(&shard, at)| (shard, at.next));
            let begun = self.begin(&places.collect());
            if begun.is_err() {
                std::mem::swap(&mut self.consumer, &mut other);
            }
            self.leaving = Some(Leaving::start(other));
            begun
        });
        if let Err(error) = renewed {
            warn!("kafka consumer is not made anew: {}", chain(&error));
        }
    }

    /// Closes the consumer, as far as that goes within a moment.
    pub fn close(self) {
        Leaving::start(self.consumer).has_left(CLOSE_WAIT);
    }

    /// Pauses and resumes shards; polling goes on.
    ///
    /// # Errors
    /// [`ConsumeError::Ask`].
    pub fn pause(&mut self, shards: &[ShardId], paused: bool) -> Result<(), ConsumeError> {
        let list = self.list(shards.iter().map(|&shard| (shard, Offset::Invalid)))?;
        let done = if paused {
            self.consumer.pause(&list)
        } else {
            self.consumer.resume(&list)
        };
        done.map_err(|source| self.asked("pause or resume partitions", source))?;
        for shard in shards {
            if let Some(reading) = self.shards.get_mut(shard) {
                // What was heard of its end is of before: the consumer comes to it anew.
                *reading = Reading::at(reading.next, paused, Clock::mono_now());
            }
        }
        Ok(())
    }

    /// Reads one batch: until it is full, its time is over, or nothing came. An outage is one when nothing came after the last word
    /// of it: librdkafka keeps what it said while nobody read, a word for every try.
    pub fn collect(&mut self, limits: &BatchLimits) -> Collected {
        let mut batch = Collected::default();
        let mut deadline = Clock::mono_now().after(limits.idle);
        let mut wait = limits.idle;
        let bytes_max = usize::try_from(limits.bytes).unwrap_or(usize::MAX);
        while batch.messages.len() < limits.spans && batch.values.len() < bytes_max {
            match self.consumer.poll(wait) {
                Some(Ok(message)) => {
                    // The time is read when there is no more: that is a good part of what a poll costs.
                    (deadline, wait) = (limits.until, Duration::ZERO);
                    if batch.is_empty() {
                        batch.values.reserve(self.batch_bytes);
                    }
                    batch.take(&message);
                    batch.outage = batch.outage.filter(|error| !is_transport(error));
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    batch.ends.extend(u32::try_from(partition).map(ShardId));
                    batch.outage = batch.outage.filter(|error| !is_transport(error));
                    wait = Duration::ZERO;
                }
                Some(Err(error)) => match error.rdkafka_error_code() {
                    Some(
                        RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange,
                    ) => {
                        batch.lost_place = true;
                        break;
                    }
                    _ => {
                        batch.outage = Some(error);
                        wait = Duration::ZERO;
                    }
                },
                None => {
                    wait = deadline.since(Clock::mono_now());
                    if wait.is_zero() {
                        break;
                    }
                }
            }
        }
        if !batch.is_empty() {
            self.batch_bytes = batch.values.len();
        }
        batch
    }

    /// Waits for the answer to a commit; what is read meanwhile is let go, so it is the last thing to do.
    pub fn await_commit(&self, length: Duration) {
        let answered = || {
            self.consumer
                .context()
                .commits_answered
                .load(Ordering::Relaxed)
        };
        let (before, until) = (answered(), Clock::mono_now().after(length));
        while answered() == before && Clock::mono_now() < until {
            drop(self.consumer.poll(COMMIT_SLICE));
        }
    }

    /// Notes how far a batch has read. What the broker said of the end speaks for the offset before.
    pub fn advance(&mut self, shard: ShardId, next: u64) {
        if let Some(reading) = self.shards.get_mut(&shard) {
            *reading = Reading::at(next, reading.paused, Clock::mono_now());
        }
    }

    /// Notes that the consumer came to the end of these shards.
    pub fn came_to_end(&mut self, shards: &[ShardId]) {
        for shard in shards {
            if let Some(reading) = self.shards.get_mut(shard) {
                reading.came_to_end(Clock::mono_now());
            }
        }
    }

    /// Asks the broker for the ends of all partitions that are not paused, when it is time to; says whether it answered now.
    ///
    /// # Errors
    /// [`ConsumeError::Ask`]: nobody's end is known then, and the clocks run no further.
    pub fn ask_ends(&mut self) -> Result<bool, ConsumeError> {
        let now = Clock::mono_now();
        let pause = ends_pause(self.ends_failed, self.shards.values(), now);
        if self
            .ends_asked
            .is_some_and(|asked| now.since(asked) < pause)
        {
            return Ok(false);
        }
        self.ends_asked = Some(now);
        let open = self.shards.iter().filter(|(_, reading)| !reading.paused);
        let asked = self.list(open.map(|(&shard, _)| (shard, Offset::End)))?;
        if asked.count() == 0 {
            return Ok(false);
        }
        let was_failed = std::mem::replace(&mut self.ends_failed, true);
        // One request a broker: ListOffsets, with the end in place of a time.
        match self.consumer.offsets_for_times(asked, ENDS_TIMEOUT) {
            Ok(answer) => {
                for element in answer.elements() {
                    let shard = u32::try_from(element.partition()).map(ShardId);
                    let end = real(element.offset()).filter(|_| element.error().is_ok());
                    if let (Ok(shard), Some(end)) = (shard, end) {
                        self.take_end(shard, end, now);
                    }
                }
                self.ends_failed = false;
                Ok(true)
            }
            // It fails as a whole for one partition without a leader: the others are asked one by one.
            Err(source) if !self.ask_ends_singly() || !was_failed => {
                Err(self.asked("read ends of partitions", source))
            }
            Err(_) => Ok(true),
        }
    }

    /// Asks for the ends of some shards, each for itself, for as long as one question may take; says whether any was told.
    fn ask_ends_singly(&mut self) -> bool {
        let begun = Clock::mono_now();
        let open: Vec<ShardId> = self
            .shards
            .iter()
            .filter(|(_, reading)| !reading.paused)
            .map(|(&shard, _)| shard)
            .collect();
        let mut told = false;
        for turn in 0..open.len() {
            let now = Clock::mono_now();
            if now.since(begun) >= ENDS_TIMEOUT {
                self.ends_cursor = (self.ends_cursor + turn) % open.len();
                return told;
            }
            let shard = open[(self.ends_cursor + turn) % open.len()];
            let answer =
                self.consumer
                    .fetch_watermarks(&self.topic, partition_of(shard), ENDS_TIMEOUT / 4);
            if let Some(end) = answer.ok().and_then(|(_, high)| u64::try_from(high).ok()) {
                self.take_end(shard, end, now);
                told = true;
            }
        }
        told
    }

    fn take_end(&mut self, shard: ShardId, end: u64, now: MonoNanos) {
        if let Some(reading) = self.shards.get_mut(&shard) {
            reading.take_end(end, now);
        }
    }

    /// When the broker last said that a shard is read to its end, if it is not paused.
    #[must_use]
    pub fn at_end(&self, shard: ShardId) -> Option<MonoNanos> {
        self.shards
            .get(&shard)
            .filter(|reading| !reading.paused)
            .and_then(|reading| reading.at_end)
    }

    fn list(
        &self,
        offsets: impl Iterator<Item = (ShardId, Offset)>,
    ) -> Result<TopicPartitionList, ConsumeError> {
        let mut list = TopicPartitionList::new();
        for (shard, offset) in offsets {
            let added = list.add_partition_offset(&self.topic, partition_of(shard), offset);
            added.map_err(|source| self.asked("list partitions", source))?;
        }
        Ok(list)
    }

    fn asked(&self, attempt: &'static str, source: KafkaError) -> ConsumeError {
        ConsumeError::Ask {
            attempt: format!("{attempt} brokers={} topic={}", self.brokers, self.topic),
            source,
        }
    }
}

impl Collected {
    fn take(&mut self, message: &BorrowedMessage<'_>) {
        // librdkafka gives real partitions and offsets, which are not negative.
        let (Ok(shard), Ok(offset)) = (
            u32::try_from(message.partition()).map(ShardId),
            u64::try_from(message.offset()),
        ) else {
            return;
        };
        self.ends.retain(|&end| end != shard);
        let from = self.values.len();
        let value = message.payload().map(|value| {
            self.values.extend_from_slice(value);
            from..self.values.len()
        });
        let time = message.timestamp().to_millis();
        self.messages.push(Received {
            shard,
            offset,
            time: time
                .and_then(|time| u64::try_from(time).ok())
                .map(UnixMillis),
            value,
        });
    }

    /// Whether nothing was read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Takes the records out, in order; a time that is missing or ahead of the wall clock is the wall clock.
    pub fn records(&mut self, wall_now: UnixMillis) -> impl Iterator<Item = Record> + use<> {
        let values = Bytes::from(std::mem::take(&mut self.values));
        let messages = std::mem::take(&mut self.messages);
        messages.into_iter().map(move |message| Record {
            shard: message.shard,
            offset: message.offset,
            time: message_time(message.time, wall_now),
            payload: message.value.map(|place| values.slice(place)),
        })
    }
}

fn make(client: &ClientConfig) -> Result<BaseConsumer<Events>, ConsumeError> {
    client
        .create_with_context(Events::default())
        .map_err(|error| ConsumeError::Make(error.into()))
}

/// The offsets that another consumer's group committed, when taking over from it.
///
/// # Errors
/// [`ConsumeError`].
pub fn committed_of_group(
    kafka: &Kafka,
    group: &str,
    shards: &ShardList,
) -> Result<BTreeMap<ShardId, Committed>, ConsumeError> {
    let mut taken_over = kafka.clone();
    group.clone_into(&mut taken_over.group);
    Input::new(&taken_over, 1)?.committed(shards)
}

/// Whether an error says that a broker cannot be reached: an answer of one is the end of it.
fn is_transport(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{AllBrokersDown, BrokerTransportFailure, OperationTimedOut, Resolve};
    matches!(
        error.rdkafka_error_code(),
        Some(AllBrokersDown | BrokerTransportFailure | OperationTimedOut | Resolve)
    )
}

/// An offset that is one, not one of librdkafka's words.
fn real(offset: Offset) -> Option<u64> {
    match offset {
        Offset::Offset(offset) => u64::try_from(offset).ok(),
        _ => None,
    }
}

/// Shard lists end far below Kafka's largest partition.
fn partition_of(shard: ShardId) -> i32 {
    i32::try_from(shard.0).unwrap_or(i32::MAX)
}

fn offset_of(next: u64) -> Offset {
    Offset::Offset(i64::try_from(next).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use shared::config::{Config, Flags};

    use super::*;

    fn input_of_three(offset: u64) -> Input {
        let variables = [
            ("SPANBUF_SUPERVISION__SHARDS".into(), "0-2".into()),
            ("SPANBUF_KAFKA__BROKERS".into(), "127.0.0.1:1".into()),
        ];
        let config = Config::load(None, variables.into_iter(), &Flags::default()).unwrap();
        let mut input = Input::new(&config.kafka, 1 << 20).unwrap();
        let starts = [0, 1, 2].map(|shard| (ShardId(shard), offset)).into();
        input.begin(&starts).unwrap();
        input
    }

    #[test]
    fn what_was_heard_of_an_end_does_not_outlive_a_pause_or_an_assignment() {
        let mut input = input_of_three(5);
        let shard = ShardId(0);
        let tell = |input: &mut Input| {
            input.take_end(shard, 5, Clock::mono_now());
            assert!(input.at_end(shard).is_some());
        };
        tell(&mut input);
        input.pause(&[shard], true).unwrap();
        assert_eq!(input.at_end(shard), None, "it is paused");
        input.pause(&[shard], false).unwrap();
        assert_eq!(input.at_end(shard), None, "that was before the pause");
        tell(&mut input);
        input.begin(&[(ShardId(1), 9)].into()).unwrap();
        assert_eq!(input.at_end(shard), None, "it was assigned anew as well");
        tell(&mut input);
        input.advance(shard, 6);
        assert_eq!(input.at_end(shard), None, "more was read");
    }

    #[test]
    fn silence_is_that_of_the_shard_that_is_read_and_was_not_heard_of_for_longest() {
        let [first, second, third] = [0, 1, 2].map(ShardId);
        let mut input = input_of_three(5);
        let begun = Clock::mono_now();
        let later = begun.after(Duration::from_secs(30));
        let silence = |input: &Input| input.silence(later).as_secs();
        assert!(silence(&input) >= 30);
        // One is told of, one is paused, one is silent still; then it is read.
        input.take_end(first, 5, later);
        input.pause(&[second], true).unwrap();
        assert!(silence(&input) >= 30);
        input.take_end(third, 9, later);
        assert_eq!(silence(&input), 0);
        let resumed = Clock::mono_now();
        input.pause(&[second], false).unwrap();
        let since = input.silence(later);
        assert!(since > Duration::ZERO && since <= later.since(resumed));
    }
}
