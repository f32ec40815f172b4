//! What a server has to be, and what the store says of itself.
//!
//! In:     `INFO`, and the key `span-buf:meta`.
//! Out:    the server's facts; the store's instance id; or why it is refused, or has to be waited for.
//! Keeps:  a store that another layout wrote is not touched.
//! Knows:  versions, eviction policies, the store's own description.
//! Source: docs/spec.md 9.1; docs/store.md 1.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
};

use shared::shard::{BucketId, ShardList};

use super::{Client, Command, CommandError, reply};
use crate::keys::Bucket;

/// The layout that this build writes and reads.
const LAYOUT: &str = "1";
/// `ZADD LT` came with it.
const VERSION_MIN: (u32, u32) = (6, 2);

/// What a server says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Its version, as it prints it.
    pub version: String,
    /// Bytes it may use; 0 is no limit.
    pub maxmemory: u64,
}

/// What the store says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// Made once for a store, and kept in every position.
    pub instance: String,
}

/// Why a server or a store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// No good answer.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// It takes no writes now.
    #[error(
        "redis at {address} is read-only: its role is {role} (write its master's address, or wait for a fail-over)"
    )]
    ReadOnly {
        /// The node.
        address: String,
        /// What it says it is.
        role: String,
    },
    /// It is too old.
    #[error("redis at {address} has version {version}, at least 6.2 is needed")]
    TooOld {
        /// The node.
        address: String,
        /// What it says.
        version: String,
    },
    /// It deletes keys by itself.
    #[error(
        "redis at {address} has maxmemory-policy {policy}, which deletes spans when it is full (set maxmemory-policy noeviction)"
    )]
    Evicts {
        /// The node.
        address: String,
        /// Its policy.
        policy: String,
    },
    /// It is one of many.
    #[error(
        "redis at {address} is a node of a cluster, which is not supported yet (give it a single node)"
    )]
    Cluster {
        /// The node.
        address: String,
    },
    /// Another build wrote it.
    #[error(
        "the store at {address} has {what} {found}, this build has {expected} (empty the store, or run the build that wrote it)"
    )]
    OtherStore {
        /// The node.
        address: String,
        /// What differs.
        what: &'static str,
        /// What stands.
        found: String,
        /// What is wanted.
        expected: String,
    },
}

impl CheckError {
    /// Whether time may mend it.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        match self {
            Self::Command(error) => error.is_outage(),
            Self::ReadOnly { .. } => true,
            Self::TooOld { .. }
            | Self::Evicts { .. }
            | Self::Cluster { .. }
            | Self::OtherStore { .. } => false,
        }
    }
}

impl Client {
    /// Proves that every node can hold spans.
    ///
    /// # Errors
    /// [`CheckError`], of which some are to be waited for.
    pub fn check(&mut self) -> Result<Server, CheckError> {
        let info = self.one(Command::info())?;
        let text = reply::bytes(&info)
            .map(String::from_utf8_lossy)
            .unwrap_or_default();
        let facts: BTreeMap<&str, &str> = text
            .lines()
            .filter_map(|line| line.trim().split_once(':'))
            .collect();
        judge(&self.address(), &facts)
    }

    /// Reads what the store says of itself, and describes it where it is new.
    ///
    /// # Errors
    /// [`CheckError`].
    pub fn meta(&mut self, buckets: u32, shards: &ShardList) -> Result<Meta, CheckError> {
        let mut stands = self.description()?;
        // A store that is described is only read: a full server refuses writes, and flushing has to start on it.
        if ["instance", "layout", "buckets"]
            .iter()
            .any(|&field| !stands.contains_key(field))
        {
            let candidate = self
                .instance_of_positions(buckets, shards)?
                .unwrap_or_else(new_instance);
            for (field, value) in [
                ("instance", &candidate[..]),
                ("layout", LAYOUT),
                ("buckets", &buckets.to_string()),
            ] {
                self.one(Command::describe(field, value))?;
            }
            stands = self.description()?;
        }
        let found = |field: &str| stands.get(field).cloned().unwrap_or_default();
        for (what, expected) in [
            ("layout", LAYOUT.to_owned()),
            ("buckets", buckets.to_string()),
        ] {
            if found(what) != expected {
                return Err(CheckError::OtherStore {
                    address: self.address(),
                    what,
                    found: found(what),
                    expected,
                });
            }
        }
        Ok(Meta {
            instance: found("instance"),
        })
    }

    fn description(&mut self) -> Result<BTreeMap<String, String>, CheckError> {
        Ok(match self.one(Command::meta())? {
            redis::Value::Array(values) => values
                .chunks_exact(2)
                .filter_map(|pair| Some((text(&pair[0])?, text(&pair[1])?)))
                .collect(),
            _ => BTreeMap::new(),
        })
    }

    /// The id of a store whose description is gone while positions stand.
    fn instance_of_positions(
        &mut self,
        buckets: u32,
        shards: &ShardList,
    ) -> Result<Option<String>, CheckError> {
        let all = shards.iter().flat_map(|shard| {
            (0..buckets).map(move |bucket| Bucket {
                shard,
                bucket: BucketId(bucket),
            })
        });
        let commands: Vec<Command> = all.map(Command::whole_position).collect();
        for reply in self.run(&commands) {
            if let Some(position) = reply::position(&reply?) {
                return Ok(Some(position.instance));
            }
        }
        Ok(None)
    }

    fn one(&mut self, command: Command) -> Result<redis::Value, CheckError> {
        let reply = self.run(std::slice::from_ref(&command)).pop();
        // A run gives a reply for each command.
        Ok(reply.transpose()?.unwrap_or(redis::Value::Nil))
    }

    fn address(&self) -> String {
        self.nodes
            .first()
            .map_or_else(String::new, |node| node.address.clone())
    }
}

fn judge(address: &str, facts: &BTreeMap<&str, &str>) -> Result<Server, CheckError> {
    let fact = |name: &str| facts.get(name).copied().unwrap_or("");
    let address = address.to_owned();
    let version = fact("redis_version").to_owned();
    let mut numbers = version
        .split('.')
        .map(|part| part.parse::<u32>().unwrap_or(0));
    if (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) < VERSION_MIN {
        return Err(CheckError::TooOld { address, version });
    }
    if fact("cluster_enabled") == "1" {
        return Err(CheckError::Cluster { address });
    }
    let maxmemory = fact("maxmemory").parse().unwrap_or(0);
    let policy = fact("maxmemory_policy");
    if maxmemory > 0 && policy != "noeviction" {
        return Err(CheckError::Evicts {
            address,
            policy: policy.to_owned(),
        });
    }
    match fact("role") {
        "master" => Ok(Server { version, maxmemory }),
        role => Err(CheckError::ReadOnly {
            address,
            role: role.to_owned(),
        }),
    }
}

fn text(value: &redis::Value) -> Option<String> {
    reply::bytes(value).map(|bytes| String::from_utf8_lossy(bytes).into_owned())
}

/// 32 hex digits that no other store has. Hasher keys come from the operating system's randomness.
fn new_instance() -> String {
    format!(
        "{:016x}{:016x}",
        RandomState::new().hash_one(0),
        RandomState::new().hash_one(1)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_judged_by_what_they_say() {
        let facts = |changed: &[(&'static str, &'static str)]| {
            let mut facts: BTreeMap<&str, &str> = [
                ("redis_version", "7.0.15"),
                ("maxmemory", "0"),
                ("maxmemory_policy", "noeviction"),
                ("role", "master"),
                ("cluster_enabled", "0"),
            ]
            .into();
            facts.extend(changed.iter().copied());
            facts
        };
        let judged = |changed: &[(&'static str, &'static str)]| judge("a:1", &facts(changed));
        assert_eq!(judged(&[("maxmemory", "5")]).unwrap().maxmemory, 5);
        assert!(
            judged(&[
                ("redis_version", "6.2.0"),
                ("maxmemory_policy", "allkeys-lru")
            ])
            .is_ok()
        );
        assert!(matches!(
            judged(&[("maxmemory", "5"), ("maxmemory_policy", "allkeys-lru")]),
            Err(CheckError::Evicts { .. })
        ));
        assert!(matches!(
            judged(&[("redis_version", "6.0.16")]),
            Err(CheckError::TooOld { .. })
        ));
        assert!(matches!(
            judged(&[("redis_version", "")]),
            Err(CheckError::TooOld { .. })
        ));
        assert!(matches!(
            judged(&[("cluster_enabled", "1")]),
            Err(CheckError::Cluster { .. })
        ));
        let replica = judged(&[("role", "slave")]).unwrap_err();
        assert!(replica.is_outage(), "{replica}");
    }

    #[test]
    fn instances_differ() {
        assert_ne!(new_instance(), new_instance());
        assert_eq!(new_instance().len(), 32);
    }
}
