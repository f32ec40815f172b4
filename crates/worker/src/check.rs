//! Role `check`: one run that proves that Redis and Kafka are there and are what they should be.
//!
//! In:     the configuration in the launch record.
//! Out:    a line for each thing that was proved or was not, on standard output; an exit code.
//! Keeps:  it writes nothing to Redis or Kafka, and ends within some seconds whatever they do.
//! Knows:  the same checks as the roles.
//! Source: docs/spec.md 10.1; docs/supervision.md 1.

use std::{
    fmt::Display,
    io::{Write, stdout},
};

use rdkafka::consumer::{BaseConsumer, Consumer};
use shared::{exit::Exit, launch::Launch};
use store::client::{Client, Server};

use crate::{
    chain,
    deliver::Deliverer,
    kafka::{self, Context, MakeError, TopicError},
};

/// Proves both and says what was found.
#[must_use]
pub fn run(launch: &Launch) -> Exit {
    let redis = redis(launch);
    let kafka = kafka(launch);
    // What was refused outweighs what did not answer: trying again does not help it.
    match (redis, kafka) {
        (Exit::Config, _) | (_, Exit::Config) => Exit::Config,
        (Exit::Ok, Exit::Ok) => Exit::Ok,
        _ => Exit::Os,
    }
}

fn redis(launch: &Launch) -> Exit {
    let mut client = match Client::new(&launch.config.redis) {
        Ok(client) => client,
        Err(error) => return say(Exit::Config, "redis", &chain(&error)),
    };
    let checked = client.check();
    let checked = checked.and_then(|servers| client.prove_meta(&launch.shards).map(|()| servers));
    match checked {
        Ok(servers) => {
            for server in &servers {
                let Server {
                    address,
                    version,
                    maxmemory,
                } = server;
                let limit = match maxmemory {
                    0 => "answers; it has no maxmemory (set maxmemory and maxmemory-policy noeviction)".to_owned(),
                    _ => format!("maxmemory={maxmemory} answers"),
                };
                say(
                    Exit::Ok,
                    "redis",
                    &format!("{address} version={version} {limit}"),
                );
            }
            Exit::Ok
        }
        Err(error) => say(
            if error.is_outage() {
                Exit::Os
            } else {
                Exit::Config
            },
            "redis",
            &chain(&error),
        ),
    }
}

fn kafka(launch: &Launch) -> Exit {
    let config = &launch.config;
    let client: BaseConsumer<Context> =
        match kafka::consumer(&config.kafka, 1).create_with_context(Context) {
            Ok(client) => client,
            Err(error) => {
                return say(
                    Exit::Config,
                    "kafka",
                    &format!(
                        "make consumer (check kafka.properties and kafka.consumer): {}",
                        MakeError::from(error)
                    ),
                );
            }
        };
    if let Err(error) = Deliverer::new(&config.kafka, config.flush.delivery_timeout, None) {
        return say(Exit::Config, "kafka", &chain(&error));
    }
    let topics = &config.kafka;
    let outputs = topics.output_topics.iter();
    let needs = std::iter::once((&topics.input_topic, Need::Shards))
        .chain(outputs.map(|topic| (topic, Need::Topic)))
        .chain(topics.input_dlq.iter().map(|topic| (topic, Need::Topic)))
        .chain(topics.output_dlq.iter().map(|topic| (topic, Need::Nothing)));
    let mut worst = Exit::Ok;
    for (topic, need) in needs {
        let exit = prove(&client, launch, topic, need);
        if worst != Exit::Config && exit != Exit::Ok {
            worst = exit;
        }
        // One broker that does not answer is enough: the others would not either.
        if exit == Exit::Os {
            break;
        }
    }
    worst
}

/// What has to be there of a topic.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    /// A partition for each shard.
    Shards,
    /// The topic.
    Topic,
    /// Nothing: what it would take is kept.
    Nothing,
}

fn prove(client: &BaseConsumer<Context>, launch: &Launch, topic: &str, need: Need) -> Exit {
    match kafka::partitions(client.client(), topic) {
        Ok(Some(there)) => {
            let count = there.len();
            let mut shards = launch.shards.iter();
            let missing = shards.find(|shard| !there.contains(&shard.0));
            match missing.filter(|_| need == Need::Shards) {
                Some(shard) => {
                    let found =
                        format!("has partitions={count}, none for shard={shard} (check --shards)");
                    say(Exit::Config, topic, &found)
                }
                None => say(Exit::Ok, topic, &format!("has partitions={count}")),
            }
        }
        Ok(None) if need == Need::Nothing => say(
            Exit::Ok,
            topic,
            &"does not exist: what it would take stays in redis (create it, or empty its key)",
        ),
        Ok(None) => say(Exit::Config, topic, &"does not exist (create it)"),
        Err(source) => {
            let error = TopicError {
                topic: topic.to_owned(),
                brokers: launch.config.kafka.brokers.clone(),
                source,
            };
            say(Exit::Os, topic, &chain(&error))
        }
    }
}

fn say(exit: Exit, what: &str, found: &dyn Display) -> Exit {
    let word = if exit == Exit::Ok { "ok" } else { "not ok" };
    // Nobody reads it: the exit code says the same.
    drop(writeln!(stdout(), "{word}: {what}: {found}"));
    exit
}
