//! Where partitions end, and how far groups have come.
//!
//! In:     a broker, a topic, a group.
//! Out:    offsets by partition.
//! Keeps:  no group is joined.
//! Knows:  rdkafka. No message.
//! Source: docs/house.md 13.

use std::{collections::BTreeMap, time::Duration};

use rdkafka::{
    Offset, TopicPartitionList,
    config::ClientConfig,
    consumer::{BaseConsumer, CommitMode, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
};

use crate::StandError;

/// How long one question to a broker may take.
const ANSWER: Duration = Duration::from_secs(10);

/// A consumer that neither commits by itself nor makes topics by asking for them.
pub(crate) fn consumer(brokers: &str, group: &str) -> ClientConfig {
    let mut client = ClientConfig::new();
    client
        .set("bootstrap.servers", brokers)
        .set("client.id", "stand-reader")
        .set("group.id", group)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        // A mock answers an empty fetch after this time and not before, whatever came meanwhile.
        .set("fetch.wait.max.ms", "10")
        .set("allow.auto.create.topics", "false");
    client
}

/// The partitions of a topic that exists.
pub(crate) fn partitions(consumer: &BaseConsumer, topic: &str) -> Result<Vec<i32>, StandError> {
    let metadata = consumer.fetch_metadata(Some(topic), ANSWER)?;
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    match found.map(|found| (found.error(), found.partitions())) {
        Some((None, partitions)) if !partitions.is_empty() => {
            Ok(partitions.iter().map(|part| part.id()).collect())
        }
        Some((Some(error), _)) => Err(KafkaError::MetadataFetch(error.into()).into()),
        _ => Err(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownTopicOrPartition).into()),
    }
}

/// The first offset and the one behind the last, of some partitions.
pub(crate) fn ends(
    consumer: &BaseConsumer,
    topic: &str,
    partitions: impl Iterator<Item = i32>,
) -> Result<BTreeMap<i32, (i64, i64)>, StandError> {
    partitions
        .map(|partition| {
            Ok((
                partition,
                consumer.fetch_watermarks(topic, partition, ANSWER)?,
            ))
        })
        .collect()
}

/// The first offset and the one behind the last, of every partition of a topic.
///
/// # Errors
/// [`StandError::Kafka`] when the broker does not tell.
pub fn watermarks(brokers: &str, topic: &str) -> Result<BTreeMap<i32, (i64, i64)>, StandError> {
    let consumer: BaseConsumer = consumer(brokers, "stand-reader").create()?;
    let partitions = partitions(&consumer, topic)?;
    ends(&consumer, topic, partitions.into_iter())
}

/// What a group has committed for every partition of a topic, where it has.
///
/// # Errors
/// [`StandError::Kafka`] when the broker does not tell.
pub fn committed(
    brokers: &str,
    group: &str,
    topic: &str,
) -> Result<BTreeMap<i32, i64>, StandError> {
    let consumer: BaseConsumer = consumer(brokers, group).create()?;
    let mut asked = TopicPartitionList::new();
    for partition in partitions(&consumer, topic)? {
        asked.add_partition(topic, partition);
    }
    let told = consumer.committed_offsets(asked, ANSWER)?;
    let offset = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| match element
        .offset()
    {
        Offset::Offset(offset) => Some((element.partition(), offset)),
        _ => None,
    };
    Ok(told.elements().iter().filter_map(offset).collect())
}

/// Commits offsets for a group that has no member, as an operator does to rewind it.
///
/// # Errors
/// [`StandError::Kafka`] when the broker refuses.
pub fn commit(
    brokers: &str,
    group: &str,
    topic: &str,
    offsets: &BTreeMap<i32, i64>,
) -> Result<(), StandError> {
    let consumer: BaseConsumer = consumer(brokers, group).create()?;
    let mut list = TopicPartitionList::new();
    for (&partition, &offset) in offsets {
        list.add_partition_offset(topic, partition, Offset::Offset(offset))?;
    }
    Ok(consumer.commit(&list, CommitMode::Sync)?)
}
