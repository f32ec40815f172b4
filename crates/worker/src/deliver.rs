//! Sends messages to Kafka and awaits the broker's word on every one of them.
//!
//! In:     messages, in order.
//! Out:    for each message: acknowledged by all replicas, or why not.
//! Keeps:  no message is without an answer when `deliver` returns: librdkafka's time-out ends each, ours ends the wait.
//! Knows:  rdkafka's producer. Not what is sent, nor what an answer means for it.
//! Source: docs/spec.md 2.4, 5.4.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, bounded};
use log::warn;
use rdkafka::{
    ClientContext,
    config::{ClientConfig, RDKafkaLogLevel},
    error::{KafkaError, RDKafkaErrorCode},
    message::{DeliveryResult, Header, OwnedHeaders},
    producer::{BaseRecord, Producer, ProducerContext, ThreadedProducer},
};
use shared::{
    board::Phase,
    config,
    time::{Clock, MonoNanos},
};

use crate::{
    beat::{Beat, Reason},
    kafka::{self, Context, MakeError},
};

/// How long one wait for reports may last: the worker shows progress in between.
const SLICE: Duration = Duration::from_millis(250);
/// How much longer than librdkafka's own time-out a report may take before its client is given up.
const GRACE: Duration = Duration::from_secs(5);
/// How long deliveries are awaited after a stop was asked for: well within the supervisor's `drain`.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// After how long an awaited delivery shows as backpressure (docs/spec.md 6.1).
const SHOWN_AFTER: Duration = Duration::from_secs(5);

/// One message on its way out.
#[derive(Debug, Clone)]
pub struct Outgoing<'m> {
    /// The topic.
    pub topic: &'m str,
    /// The key; without one librdkafka spreads messages over partitions.
    pub key: Option<&'m [u8]>,
    /// The value; none sends a tombstone on.
    pub payload: Option<&'m [u8]>,
    /// The headers, in order.
    pub headers: Vec<(&'static str, Vec<u8>)>,
}

/// Why a message was not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The broker will never take it.
    #[error("message is too large for the broker (check max.message.bytes of the topic)")]
    TooLarge,
    /// Not now; the same message may be taken later. It may also have been written.
    #[error("not acknowledged: {0} (check brokers, topic and authorization)")]
    Later(RDKafkaErrorCode),
    /// librdkafka gave no answer in time, and was given up.
    #[error("no answer from librdkafka")]
    Silent,
}

/// An error in making a producer: a property that librdkafka does not take.
#[derive(Debug, thiserror::Error)]
#[error("make kafka producer (check kafka.properties and kafka.producer)")]
pub struct ProducerError(#[source] MakeError);

impl crate::Refusal for ProducerError {}

/// What delivers messages: Kafka, or in a bench nobody.
pub trait Deliver: std::fmt::Debug {
    /// Sends all messages and waits for the answer to each.
    ///
    /// Shape: one answer for each message, in the order given.
    fn deliver(&mut self, messages: &[Outgoing<'_>], beat: &mut Beat) -> Vec<Result<(), Fault>>;

    /// Sends one message in no batch with others, whoever sends them: a batch is refused as a whole.
    fn deliver_alone(&mut self, message: Outgoing<'_>, beat: &mut Beat) -> Result<(), Fault> {
        let answer = self.deliver(&[message], beat).pop();
        answer.unwrap_or(Err(Fault::Silent))
    }
}

/// A producer whose every delivery is awaited. A copy, for another thread, delivers with the same one.
#[derive(Clone)]
pub struct Deliverer {
    client: ClientConfig,
    delivery_timeout: Duration,
    producer: Arc<Mutex<Arc<ThreadedProducer<Reports>>>>,
    /// For messages that go alone; made for the first of them.
    alone: Option<Box<Deliverer>>,
}

impl std::fmt::Debug for Deliverer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deliverer")
            .field("delivery_timeout", &self.delivery_timeout)
            .finish_non_exhaustive()
    }
}

/// A message's place in its round, and the broker's word on it.
type Report = (usize, Result<(), RDKafkaErrorCode>);

/// Where the report on a message goes: it has room there.
struct Ticket {
    index: usize,
    reports: Sender<Report>,
}

/// Sends reports where their tickets say.
struct Reports;

impl ClientContext for Reports {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        Context.log(level, facility, line);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        Context.error(error, reason);
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = Box<Ticket>;

    fn delivery(&self, result: &DeliveryResult<'_>, ticket: Box<Ticket>) {
        let answer = match result {
            Ok(_) => Ok(()),
            Err((error, _)) => Err(error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail)),
        };
        // Where nobody listens any more the message was given up, and what it held is asked of Kafka again.
        ticket.reports.try_send((ticket.index, answer)).ok();
    }
}

impl Deliverer {
    /// Makes a producer; no broker is asked.
    ///
    /// # Errors
    /// [`ProducerError`] when librdkafka refuses a property.
    pub fn new(
        kafka: &config::Kafka,
        delivery_timeout: Duration,
        batch_bytes: Option<u64>,
    ) -> Result<Self, ProducerError> {
        let mut client = kafka::producer(kafka, delivery_timeout);
        if let Some(bytes) = batch_bytes.filter(|_| client.get("batch.size").is_none()) {
            // A batch is refused as a whole: it must not be what makes small messages too large.
            client.set("batch.size", bytes.clamp(1, 1_000_000).to_string());
        }
        let producer = make(&client)?;
        Ok(Self {
            client,
            delivery_timeout,
            producer: Arc::new(Mutex::new(Arc::new(producer))),
            alone: None,
        })
    }

    /// The same, with every message in a batch of its own.
    fn batchless(&self) -> Result<Self, ProducerError> {
        let mut client = self.client.clone();
        client.set("batch.num.messages", "1");
        let producer = make(&client)?;
        Ok(Self {
            client,
            delivery_timeout: self.delivery_timeout,
            producer: Arc::new(Mutex::new(Arc::new(producer))),
            alone: None,
        })
    }

    /// Asks Kafka for the partitions of a topic; none: there is no such topic.
    ///
    /// # Errors
    /// librdkafka's, when the brokers do not answer or refuse.
    pub fn partitions(&self, topic: &str) -> Result<Option<Vec<u32>>, KafkaError> {
        kafka::partitions(self.current().client(), topic)
    }

    fn current(&self) -> Arc<ThreadedProducer<Reports>> {
        // A thread that panics while it holds this has changed nothing.
        let producer = self.producer.lock();
        Arc::clone(&producer.unwrap_or_else(PoisonError::into_inner))
    }

    /// Hands one message to librdkafka; while its queue is full, takes reports.
    fn send(&self, index: usize, message: &Outgoing<'_>, round: &mut Round, beat: &mut Beat) {
        loop {
            let ticket = Box::new(Ticket {
                index,
                reports: round.sender.clone(),
            });
            let mut record =
                BaseRecord::<[u8], [u8], Box<Ticket>>::with_opaque_to(message.topic, ticket)
                    .headers(headers(&message.headers));
            if let Some(payload) = message.payload {
                record = record.payload(payload);
            }
            if let Some(key) = message.key {
                record = record.key(key);
            }
            let Err((error, _)) = round.producer.send(record) else {
                return;
            };
            match error.rdkafka_error_code() {
                Some(RDKafkaErrorCode::QueueFull) if !self.overdue(round, beat) => {
                    self.await_some(round, beat)
                }
                code => {
                    return round.answer(index, Err(fault(code.unwrap_or(RDKafkaErrorCode::Fail))));
                }
            }
        }
    }

    /// Takes the reports that stand, or waits a moment for the first.
    fn await_some(&self, round: &mut Round, beat: &mut Beat) {
        let mut report = round.reports.recv_timeout(SLICE).ok();
        while let Some((index, answer)) = report {
            round.answer(index, answer.map_err(fault));
            report = round.reports.try_recv().ok();
        }
        if Clock::mono_now().since(round.begun) >= SHOWN_AFTER {
            beat.backpressure(Reason::Delivery, Some(round.begun));
        }
        beat.progress();
    }

    /// Whether the wait is over: librdkafka is late, or a stop was asked for a while ago. What is not answered by then may have
    /// been written: it stays, and whoever sees it again sees the same `flush_id`.
    fn overdue(&self, round: &mut Round, beat: &Beat) -> bool {
        let now = Clock::mono_now();
        if beat.stopping() {
            let since = *round.stopping.get_or_insert(now);
            if now.since(since) > STOP_GRACE {
                return true;
            }
        }
        now.since(round.begun) > self.delivery_timeout + GRACE
    }

    /// A fatal error (idempotence lost) or silence is mended by a new client alone; and librdkafka may not find its way back to a
    /// broker that is there again.
    fn make_anew(&self, lost: &Arc<ThreadedProducer<Reports>>) {
        let mut producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&producer, lost) {
            // Another thread lost it as well, and was first.
            return;
        }
        warn!(
            "kafka producer is made anew fatal={:?}",
            lost.client().fatal_error()
        );
        match make(&self.client) {
            Ok(anew) => *producer = Arc::new(anew),
            // The same properties were taken before; the old client goes on failing, and this is tried again.
            Err(error) => warn!("{}", crate::chain(&error)),
        }
    }
}

impl Deliver for Deliverer {
    /// Units: bounded by the delivery time-out and 5 s.
    fn deliver(&mut self, messages: &[Outgoing<'_>], beat: &mut Beat) -> Vec<Result<(), Fault>> {
        let phase = beat.phase_now();
        beat.phase(Phase::Kafka);
        let (sender, reports) = bounded(messages.len());
        let mut round = Round {
            producer: self.current(),
            sender,
            reports,
            answers: vec![None; messages.len()],
            left: messages.len(),
            begun: Clock::mono_now(),
            stopping: None,
        };
        for (index, message) in messages.iter().enumerate() {
            self.send(index, message, &mut round, beat);
        }
        while round.left > 0 && !self.overdue(&mut round, beat) {
            self.await_some(&mut round, beat);
        }
        beat.backpressure(Reason::Delivery, None);
        let is_lost = round.was_silent() || round.producer.client().fatal_error().is_some();
        if is_lost && !beat.stopping() {
            self.make_anew(&round.producer);
        }
        beat.phase(phase);
        round
            .answers
            .into_iter()
            .map(|answer| answer.unwrap_or(Err(Fault::Silent)))
            .collect()
    }

    fn deliver_alone(&mut self, message: Outgoing<'_>, beat: &mut Beat) -> Result<(), Fault> {
        if self.alone.is_none() {
            match self.batchless() {
                Ok(alone) => self.alone = Some(Box::new(alone)),
                Err(error) => warn!("{}", crate::chain(&error)),
            }
        }
        let answer = self
            .alone
            .as_mut()
            .and_then(|alone| alone.deliver(&[message], beat).pop());
        answer.unwrap_or(Err(Fault::Silent))
    }
}

/// The messages of one call and what is known of them.
struct Round {
    producer: Arc<ThreadedProducer<Reports>>,
    /// Has room for a report on each message.
    sender: Sender<Report>,
    reports: Receiver<Report>,
    answers: Vec<Option<Result<(), Fault>>>,
    left: usize,
    begun: MonoNanos,
    /// Since when a stop is asked for.
    stopping: Option<MonoNanos>,
}

impl Round {
    /// Whether librdkafka did not answer, or no broker did for as long as a message may wait.
    fn was_silent(&self) -> bool {
        let timed_out = Some(Err(Fault::Later(RDKafkaErrorCode::MessageTimedOut)));
        self.left > 0 || self.answers.contains(&timed_out) && !self.answers.contains(&Some(Ok(())))
    }

    fn answer(&mut self, index: usize, answer: Result<(), Fault>) {
        if let Some(place @ None) = self.answers.get_mut(index) {
            *place = Some(answer);
            self.left -= 1;
        }
    }
}

fn make(client: &ClientConfig) -> Result<ThreadedProducer<Reports>, ProducerError> {
    client
        .create_with_context(Reports)
        .map_err(|error| ProducerError(error.into()))
}

fn headers(pairs: &[(&'static str, Vec<u8>)]) -> OwnedHeaders {
    pairs.iter().fold(
        OwnedHeaders::new_with_capacity(pairs.len()),
        |headers, (key, value)| {
            headers.insert(Header {
                key,
                value: Some(value),
            })
        },
    )
}

fn fault(code: RDKafkaErrorCode) -> Fault {
    match code {
        RDKafkaErrorCode::MessageSizeTooLarge | RDKafkaErrorCode::InvalidMessageSize => {
            Fault::TooLarge
        }
        other => Fault::Later(other),
    }
}
