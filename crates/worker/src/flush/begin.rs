//! Begins the role: the store and Kafka are there and are what they should be.
//!
//! In:     the launch record.
//! Out:    `Flush`, ready for its first cycle.
//! Keeps:  what is away is waited for; only a refusal ends the worker; a broker's lower limit lowers ours.
//! Knows:  the order of a start.
//! Source: docs/spec.md 5.3, 9.1; docs/supervision.md 3.

use std::collections::BTreeMap;

use log::{info, warn};
use shared::{board::Board, config::Config, launch::Launch};
use store::client::Client;

use super::{
    Flush,
    assemble::Limits,
    lanes::{Lane, Lanes, lanes_of},
    produce::Output,
    put_off::Failures,
    upkeep::Upkeep,
};
use crate::{
    Ended, Refusal,
    beat::{Beat, Reason},
    checks,
    deliver::Deliverer,
    kafka::{self, TopicError},
};

/// What Kafka adds to a message: headers, framing of record and batch.
const FRAMING_BYTES: u64 = 2_048;

/// An output topic that is not there.
#[derive(Debug, thiserror::Error)]
#[error("find output topic={topic}: it does not exist (create it, or check kafka.output_topics)")]
pub struct NoTopic {
    topic: String,
}

impl Refusal for NoTopic {}

/// Makes the role ready: waits for Redis and Kafka.
pub(super) fn begin(launch: &Launch, board: &Board, mut beat: Beat) -> Result<Flush, Ended> {
    let config = launch.config.clone();
    let mut client = Client::new(&config.redis)?;
    checks::wait_for_store(&mut client, &config.supervision.shards, &mut beat)?;

    let deliverer = Deliverer::new(&config.kafka, config.flush.delivery_timeout, None)?;
    for topic in &config.kafka.output_topics {
        if !exists(&deliverer, topic, &config, &mut beat)? {
            return Err(NoTopic {
                topic: topic.clone(),
            }
            .into());
        }
    }
    let mut dlq = config.kafka.output_dlq.clone();
    if let Some(topic) = &dlq
        && !exists(&deliverer, topic, &config, &mut beat)?
    {
        warn!(
            "topic={topic} does not exist: messages that the broker never takes will stay in redis (create it, or empty kafka.output_dlq)"
        );
        dlq = None;
    }
    let segment_bytes_max = segment_bytes_max(&config, &beat);
    drop(deliverer);
    let deliverer = Deliverer::new(
        &config.kafka,
        config.flush.delivery_timeout,
        Some(segment_bytes_max),
    )?;

    let all = client.buckets();
    let buckets = launch.shards.iter().flat_map(|shard| all.of_shard(shard));
    let ledgers: BTreeMap<_, _> = launch
        .shards
        .iter()
        .filter_map(|shard| Some((shard, board.ledger(shard)?)))
        .collect();
    let limits = Limits::new(&config.buffer, segment_bytes_max);
    let (count, budget) = lanes_of(&config.flush);
    let mut lanes = Vec::with_capacity(count);
    for _ in 0..count {
        let deliverer = deliverer.clone();
        lanes.push(Lane {
            client: Client::new(&config.redis)?,
            beat: beat.another(),
            output: Output::new(&config, deliverer, dlq.clone(), segment_bytes_max),
            limits,
            budget,
            ttl: config.redis.redis_ttl,
            ledgers: ledgers.clone(),
            reads_whole: true,
        });
    }
    Ok(Flush {
        lanes: Lanes::start(lanes),
        upkeep: Upkeep::new(buckets.collect()),
        shards: launch.shards.clone(),
        board: board.clone(),
        failures: Failures::default(),
        config,
        beat,
        client,
        ledgers,
    })
}

/// Asks Kafka for a topic until it answers.
fn exists(
    deliverer: &Deliverer,
    topic: &str,
    config: &Config,
    beat: &mut Beat,
) -> Result<bool, Ended> {
    loop {
        match deliverer.partitions(topic) {
            Ok(partitions) => {
                beat.worked(Reason::Kafka);
                return Ok(partitions.is_some());
            }
            Err(source) => {
                let error = TopicError {
                    topic: topic.to_owned(),
                    brokers: config.kafka.brokers.clone(),
                    source,
                };
                if kafka::is_denied(&error.source) {
                    return Err(error.into());
                }
                beat.failed(Reason::Kafka, "find output topic", &error)?;
            }
        }
    }
}

/// The largest message that we make: ours, or what the smallest of the output topics takes.
fn segment_bytes_max(config: &Config, beat: &Beat) -> u64 {
    let ours = config.buffer.max_segment_bytes;
    let mut lowest = ours;
    for topic in &config.kafka.output_topics {
        match kafka::message_bytes_max(&config.kafka, topic, beat) {
            Ok(theirs) if theirs.saturating_sub(FRAMING_BYTES) < lowest => {
                lowest = theirs.saturating_sub(FRAMING_BYTES).max(1);
                warn!(
                    "topic={topic} takes messages of bytes={theirs}: segments are cut at bytes={lowest}, not at buffer.max_segment_bytes={ours} (raise max.message.bytes of the topic)"
                );
            }
            Ok(theirs) => info!("topic={topic} takes messages of bytes={theirs}"),
            Err(error) => info!(
                "topic={topic} does not tell its largest message, buffer.max_segment_bytes={ours} stands: {}",
                crate::chain(&error)
            ),
        }
    }
    lowest
}
