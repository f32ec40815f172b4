//! What every Kafka client of a worker is made with.
//!
//! In:     section `kafka` of the configuration.
//! Out:    client configurations; librdkafka's log lines in ours.
//! Keeps:  keys of ours win: the configuration has refused properties that they set.
//! Knows:  rdkafka's configuration. No loop, no message.
//! Source: docs/spec.md 10.1, 5.4, 7.4; docs/house.md 2.

use std::{
    future::Future,
    pin::pin,
    task::{self, Poll, Waker},
    time::Duration,
};

use log::{debug, error, info, warn};
use rdkafka::{
    ClientContext,
    admin::{AdminClient, AdminOptions, ResourceSpecifier},
    client::Client,
    config::{ClientConfig, RDKafkaLogLevel},
    consumer::ConsumerContext,
    error::{KafkaError, RDKafkaErrorCode},
};
use shared::{
    config,
    time::{Clock, millis},
};

use crate::beat::Beat;

/// The longest wait for one answer of a broker.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// What a consumer waits for where librdkafka's own defaults are too long, in milliseconds: the names of a property, ours first, and our
/// value. `kafka.properties` and `kafka.consumer` may say otherwise.
const CONSUMER_WAITS: &[(&[&str], &str)] = &[
    // How long a broker holds a fetch back that finds no message. It answers one request of a connection after the other: a question
    // for the ends waits behind that fetch, and the clocks of a partition that is read to its end stand meanwhile. Else 500.
    (&["fetch.wait.max.ms"], "50"),
    // How soon a full prefetch is looked at again. A worker empties one in a third of a second; librdkafka's 1000 would leave it
    // without messages for the rest.
    (&["fetch.queue.backoff.ms"], "10"),
];
/// The same for producers.
const PRODUCER_WAITS: &[(&[&str], &str)] = &[
    // How long a message is kept to send others with it. What is sent together comes at once here, and is waited for. Else 5.
    (&["linger.ms", "queue.buffering.max.ms"], "1"),
];

/// How often a pending answer is looked for.
const POLL: Duration = Duration::from_millis(20);

/// The largest message that librdkafka takes from us. What a broker takes is less, and told by the broker: a single span
/// over our limit goes alone.
const CLIENT_MESSAGE_BYTES: u64 = 256 << 20;

/// librdkafka's log lines in ours; outages are said by whoever waits, with the address.
#[derive(Clone, Copy, Debug)]
pub struct Context;

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        match level {
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
                error!("librdkafka facility={facility}: {line}");
            }
            // FAIL: a connection went; ERROR: all of them. Both come back for as long as a broker is away.
            RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning
                if !matches!(facility, "FAIL" | "ERROR") =>
            {
                warn!("librdkafka facility={facility}: {line}");
            }
            RDKafkaLogLevel::Notice => info!("librdkafka facility={facility}: {line}"),
            _ => debug!("librdkafka facility={facility}: {line}"),
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        debug!("librdkafka: {error}: {reason}");
    }
}

impl ConsumerContext for Context {}

/// The consumer's: offsets and resets are ours alone, prefetch is bounded in bytes.
#[must_use]
pub fn consumer(kafka: &config::Kafka, prefetch_bytes: u64) -> ClientConfig {
    let mut client = client(kafka, "ingest");
    // librdkafka takes 1 to 2,097,151 KiB.
    let prefetch_kib = (prefetch_bytes / 1024).clamp(1, 2_097_151);
    client
        .set("group.id", &kafka.group)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "error")
        .set("enable.partition.eof", "true")
        .set("queued.max.messages.kbytes", prefetch_kib.to_string());
    set_all(&mut client, &kafka.consumer);
    set_unsaid(&mut client, CONSUMER_WAITS);
    client
}

/// A producer's: every replica acknowledges, no message is written twice by a retry.
#[must_use]
pub fn producer(kafka: &config::Kafka, delivery_timeout: Duration) -> ClientConfig {
    let mut client = client(kafka, "produce");
    client
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", millis(delivery_timeout).to_string())
        .set("message.max.bytes", CLIENT_MESSAGE_BYTES.to_string());
    set_all(&mut client, &kafka.producer);
    set_unsaid(&mut client, PRODUCER_WAITS);
    client
}

/// The partitions of a topic; `None` where the broker says that there is no such topic.
///
/// # Errors
/// librdkafka's, when no broker answers within [`ANSWER_TIMEOUT`], or not well.
pub fn partitions<C: ClientContext>(
    client: &Client<C>,
    topic: &str,
) -> Result<Option<Vec<u32>>, KafkaError> {
    let metadata = client.fetch_metadata(Some(topic), ANSWER_TIMEOUT)?;
    let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else {
        return Ok(None);
    };
    match found.error().map(RDKafkaErrorCode::from) {
        None => Ok(Some(
            found
                .partitions()
                .iter()
                .filter_map(|partition| u32::try_from(partition.id()).ok())
                .collect(),
        )),
        Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => {
            Ok(None)
        }
        Some(code) => Err(KafkaError::MetadataFetch(code)),
    }
}

/// A client that librdkafka does not make. Its own words may hold a value, and the value may be a secret.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct MakeError(String);

impl From<KafkaError> for MakeError {
    fn from(error: KafkaError) -> Self {
        let KafkaError::ClientConfig(_, reason, property, value) = &error else {
            return Self(error.to_string());
        };
        let reason = if value.is_empty() {
            reason.clone()
        } else {
            reason.replace(value.as_str(), "***")
        };
        Self(format!("property {property}: {reason}"))
    }
}

/// Whether Kafka refuses this client: trying again does not help, its rights have to change.
#[must_use]
pub fn is_denied(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{
        ClusterAuthorizationFailed, GroupAuthorizationFailed, TopicAuthorizationFailed,
    };
    let code = error.rdkafka_error_code();
    matches!(
        code,
        Some(ClusterAuthorizationFailed | GroupAuthorizationFailed | TopicAuthorizationFailed)
    )
}

/// No word on a topic.
#[derive(Debug, thiserror::Error)]
#[error(
    "ask for topic={topic} brokers={brokers} (are the brokers running, and reachable from here?)"
)]
pub struct TopicError {
    /// The topic.
    pub topic: String,
    /// The configured addresses.
    pub brokers: String,
    /// librdkafka's word.
    pub source: KafkaError,
}

impl crate::Refusal for TopicError {}

/// Why a broker's limit is not known.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// The broker, or librdkafka, refused to say.
    #[error("describe topic")]
    Refused(#[source] KafkaError),
    /// No answer in time.
    #[error("describe topic: no answer")]
    Silent,
    /// The answer does not have it.
    #[error("describe topic: the answer lacks max.message.bytes")]
    Absent,
}

/// The largest record batch that a topic takes, in bytes.
///
/// # Errors
/// [`LimitError`], within a few seconds: some brokers, and the mock cluster of librdkafka, do not tell.
pub fn message_bytes_max(
    kafka: &config::Kafka,
    topic: &str,
    beat: &Beat,
) -> Result<u64, LimitError> {
    let client: AdminClient<Context> = client(kafka, "describe")
        .create_with_context(Context)
        .map_err(LimitError::Refused)?;
    let topics = [ResourceSpecifier::Topic(topic)];
    let options = AdminOptions::new().request_timeout(Some(ANSWER_TIMEOUT));
    let mut answer = pin!(client.describe_configs(&topics, &options));
    let until = Clock::mono_now().after(ANSWER_TIMEOUT.saturating_mul(2));
    let described = loop {
        // There is one answer to wait for, once in a worker's life: no runtime is worth it.
        match answer
            .as_mut()
            .poll(&mut task::Context::from_waker(Waker::noop()))
        {
            Poll::Ready(described) => break described.map_err(LimitError::Refused)?,
            Poll::Pending if Clock::mono_now() >= until || beat.stopping() => {
                return Err(LimitError::Silent);
            }
            Poll::Pending => beat.wait(POLL),
        }
    };
    let resource = described.into_iter().next().ok_or(LimitError::Absent)?;
    let resource = resource.map_err(|code| LimitError::Refused(KafkaError::AdminOp(code)))?;
    let value = resource
        .entry_map()
        .get("max.message.bytes")
        .and_then(|entry| entry.value.as_deref()?.parse().ok());
    value.ok_or(LimitError::Absent)
}

fn client(kafka: &config::Kafka, purpose: &str) -> ClientConfig {
    let mut client = ClientConfig::new();
    client
        .set("bootstrap.servers", &kafka.brokers)
        .set("client.id", format!("spanbuf-{purpose}"));
    set_all(&mut client, &kafka.properties);
    client.set_log_level(RDKafkaLogLevel::Info);
    client
}

/// Sets what nobody has said, by none of its names.
fn set_unsaid(client: &mut ClientConfig, waits: &[(&[&str], &str)]) {
    for &(names, value) in waits {
        if names.iter().all(|name| client.get(name).is_none()) {
            client.set(names[0], value);
        }
    }
}

fn set_all<'p>(
    client: &mut ClientConfig,
    properties: impl IntoIterator<Item = (&'p String, &'p String)>,
) {
    for (name, value) in properties {
        client.set(name, value);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use shared::config::{Config, Flags};

    use super::*;

    #[test]
    fn our_waits_stand_where_nobody_said_another_by_any_name() {
        let variables = [("SPANBUF_SUPERVISION__SHARDS".into(), "0".into())];
        let config = Config::load(None, variables.into_iter(), &Flags::default()).unwrap();
        let mut kafka = config.kafka;
        let told = |kafka: &config::Kafka| {
            let (consumer, producer) = (consumer(kafka, 1), producer(kafka, Duration::ZERO));
            let names = ["fetch.wait.max.ms", "fetch.queue.backoff.ms"];
            let mut told: Vec<Option<String>> = names
                .iter()
                .map(|name| consumer.get(name).map(str::to_owned))
                .collect();
            told.push(producer.get("linger.ms").map(str::to_owned));
            told
        };
        let some = |value: &str| Some(value.to_owned());
        assert_eq!(told(&kafka), [some("50"), some("10"), some("1")]);
        let say = |map: &mut BTreeMap<String, String>, name: &str| {
            map.insert(name.into(), "7".into());
        };
        say(&mut kafka.properties, "fetch.wait.max.ms");
        say(&mut kafka.consumer, "fetch.queue.backoff.ms");
        say(&mut kafka.producer, "queue.buffering.max.ms");
        assert_eq!(told(&kafka), [some("7"), some("7"), None]);
    }
}
