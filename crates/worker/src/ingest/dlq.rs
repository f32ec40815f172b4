//! Sends invalid messages to the dead-letter topic, and waits until it has them.
//!
//! In:     the refused messages of a batch.
//! Out:    `Settled`: every one is acknowledged there, or a counted drop.
//! Keeps:  no offset of a batch is committed, and no position moves past it, before this is done.
//! Knows:  the topic's name; `deliver`.
//! Source: docs/spec.md 2.4.

use bytes::Bytes;
use log::{error, info};
use shared::{
    config::Kafka,
    shard::ShardId,
    time::{Clock, UnixMillis},
};

use super::batch::Refused;
use crate::{
    Ended,
    beat::{Beat, Reason},
    deliver::{Deliver, Deliverer, Fault, Outgoing, ProducerError},
};

/// The longest reason that goes into a header.
const REASON_BYTES_MAX: usize = 256;
/// Budget of one attempt to deliver; attempts go on until the topic has the message.
const DELIVERY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);

/// The dead-letter topic of the input, or its absence.
#[derive(Debug)]
pub struct DeadLetters {
    open: Option<(String, Deliverer)>,
    input_topic: String,
}

/// Proof that every refused message of a batch is in the dead-letter topic, or is to be counted as dropped.
#[derive(Debug)]
pub struct Settled {
    dropped: Vec<(ShardId, u64, &'static str)>,
}

impl Settled {
    /// What a step counts that takes a shard's position on from `from`: below it, a life before has counted.
    #[must_use]
    pub fn counts(&self, shard: ShardId, from: u64) -> Vec<(&'static str, u64)> {
        let mut counts: Vec<(&'static str, u64)> = Vec::new();
        for &(_, _, reason) in self
            .dropped
            .iter()
            .filter(|(of, offset, _)| *of == shard && *offset >= from)
        {
            match counts.iter_mut().find(|(counter, _)| *counter == reason) {
                Some((_, amount)) => *amount += 1,
                None => counts.push((reason, 1)),
            }
        }
        counts
    }
}

/// Counters of the sum. They are no spans that were inserted: the ledger of these leaves them out.
const DLQ_OFF: &str = "refused:dlq_off";
const DLQ_TOO_LARGE: &str = "refused:dlq_too_large";

impl DeadLetters {
    /// Makes the producer, if there is a topic; no broker is asked.
    ///
    /// # Errors
    /// [`ProducerError`].
    pub fn new(kafka: &Kafka) -> Result<Self, ProducerError> {
        let open = match &kafka.input_dlq {
            Some(topic) => Some((
                topic.clone(),
                Deliverer::new(kafka, DELIVERY_TIMEOUT, None)?,
            )),
            None => None,
        };
        Ok(Self {
            open,
            input_topic: kafka.input_topic.clone(),
        })
    }

    /// Delivers all refused messages; tries again until every one is taken.
    ///
    /// # Errors
    /// [`Ended::Stopped`] when the supervisor asked for it before the topic had all: nothing of the batch may be committed.
    pub fn settle(&mut self, refused: &[Refused], beat: &mut Beat) -> Result<Settled, Ended> {
        let Some((topic, deliverer)) = &mut self.open else {
            for message in refused {
                info!(
                    "dropped message partition={} offset={} reason=dlq_off: {}",
                    message.shard, message.offset, message.reason
                );
            }
            return Ok(Settled {
                dropped: refused
                    .iter()
                    .map(|message| (message.shard, message.offset, DLQ_OFF))
                    .collect(),
            });
        };
        let (wall_now, mut dropped) = (Clock::wall_now(), Vec::new());
        let mut left: Vec<_> = refused
            .iter()
            .map(|message| {
                (
                    message,
                    outgoing(topic, &self.input_topic, message, wall_now),
                )
            })
            .collect();
        while !left.is_empty() {
            let messages: Vec<_> = left.iter().map(|(_, message)| message.clone()).collect();
            let answers = deliverer.deliver(&messages, beat);
            let mut fault = None;
            left = left.into_iter().zip(answers).filter_map(|(message, answer)| match answer {
                Ok(()) => None,
                // Larger than the dead-letter topic takes: the one way in which its bytes are let go.
                Err(Fault::TooLarge) => {
                    let refused = message.0;
                    error!(
                        "dropped message partition={} offset={} bytes={} reason=too_large: {} (raise max.message.bytes of {topic})",
                        refused.shard, refused.offset, refused.payload.as_ref().map_or(0, Bytes::len), refused.reason
                    );
                    dropped.push((refused.shard, refused.offset, DLQ_TOO_LARGE));
                    None
                }
                Err(other) => {
                    fault = Some(other);
                    Some(message)
                }
            }).collect();
            match fault {
                Some(fault) => beat.failed(
                    Reason::Kafka,
                    &format!(
                        "deliver invalid messages topic={topic} messages={}",
                        left.len()
                    ),
                    &fault,
                )?,
                None => beat.worked(Reason::Kafka),
            }
        }
        Ok(Settled { dropped })
    }
}

fn outgoing<'m>(
    topic: &'m str,
    input_topic: &str,
    message: &'m Refused,
    wall_now: UnixMillis,
) -> Outgoing<'m> {
    let mut reason = message.reason.to_string();
    reason.truncate(reason.floor_char_boundary(REASON_BYTES_MAX));
    Outgoing {
        topic,
        key: None,
        payload: message.payload.as_deref(),
        headers: vec![
            ("source_topic", input_topic.as_bytes().to_vec()),
            ("source_partition", message.shard.to_string().into_bytes()),
            ("source_offset", message.offset.to_string().into_bytes()),
            ("reason", reason.into_bytes()),
            ("time", wall_now.to_string().into_bytes()),
        ],
    }
}
