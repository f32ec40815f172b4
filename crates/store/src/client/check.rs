//! What a server has to be, and what the store says of itself.
//!
//! In:     `INFO` of every node that has slots, and the key `span-buf:meta`.
//! Out:    the server's facts; the store's instance id; or why it is refused, or has to be waited for.
//! Keeps:  a store that another layout wrote is not touched; the number of buckets changes only while nothing is held.
//! Knows:  versions, eviction policies, the store's own description.
//! Source: docs/spec.md 9.1; docs/store.md 1.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
};

use shared::{
    shard::{ShardId, ShardList},
    time::Clock,
};

use super::{
    Client, Command, CommandError, RUN_TIMEOUTS, Reply,
    command::SLOTS,
    judge,
    reply::{self, Position},
};
use crate::{
    keys::{Bucket, Buckets},
    scripts::PositionCall,
};

/// The layout that this build writes and reads.
const LAYOUT: &str = "2";
/// `ZADD LT` came with it.
const VERSION_MIN: (u32, u32) = (6, 2);

/// What a server says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// The node.
    pub address: String,
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
    #[error("redis at {address} is a node of a cluster (set redis.cluster = true)")]
    Cluster {
        /// The node.
        address: String,
    },
    /// It is alone.
    #[error("redis at {address} is no node of a cluster (set redis.cluster = false)")]
    NoCluster {
        /// The node.
        address: String,
    },
    /// Its cluster does not serve all slots.
    #[error(
        "redis at {address} is of a cluster that is not well: {what} (redis-cli --cluster check {address})"
    )]
    ClusterDown {
        /// The node.
        address: String,
        /// What it says.
        what: String,
    },
    /// It holds spans that the new number of buckets would hide.
    #[error(
        "the store at {address} was written with redis.buckets = {found}, and shard={shard} {what}: redis.buckets = {wanted} is not taken (start with redis.buckets = {found} and without input until all queues are empty, stop, then change it)"
    )]
    OtherBuckets {
        /// The node.
        address: String,
        /// What stands.
        found: u32,
        /// What is wanted.
        wanted: u32,
        /// A shard that stands against it.
        shard: ShardId,
        /// Why it does.
        what: &'static str,
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
            Self::ReadOnly { .. } | Self::ClusterDown { .. } => true,
            Self::TooOld { .. }
            | Self::Evicts { .. }
            | Self::Cluster { .. }
            | Self::NoCluster { .. }
            | Self::OtherBuckets { .. }
            | Self::OtherStore { .. } => false,
        }
    }
}

impl Client {
    /// Proves that every node that has slots can hold spans; gives them in the order of their slots' first.
    ///
    /// # Errors
    /// [`CheckError`], of which some are to be waited for.
    pub fn check(&mut self) -> Result<Vec<Server>, CheckError> {
        let until = Clock::mono_now().after(self.timeout.saturating_mul(RUN_TIMEOUTS));
        (self.is_stale, self.mapped) = (self.is_cluster, None);
        self.map_slots(until);
        let masters = self.masters();
        // Without a map the configured nodes say what is wrong with them.
        let asked = if masters.is_empty() {
            (0..self.seeds).collect()
        } else {
            masters
        };
        let mut servers = Vec::new();
        for node in asked {
            servers.push(self.check_node(node)?);
        }
        let open = self
            .owners
            .iter()
            .filter(|&&owner| usize::from(owner) >= self.nodes.len())
            .count();
        if open > 0 {
            return Err(CheckError::ClusterDown {
                address: self.address(),
                what: format!("{open} of {SLOTS} slots have no node"),
            });
        }
        Ok(servers)
    }

    fn check_node(&mut self, node: usize) -> Result<Server, CheckError> {
        let info = facts(&self.ask_node(node, &Command::info())?);
        let address = self.nodes[node].address.clone();
        let server = judge_facts(&address, &info, self.is_cluster)?;
        if self.is_cluster {
            let cluster = facts(&self.ask_node(node, &Command::cluster_info())?);
            let state = cluster.get("cluster_state").map_or("", String::as_str);
            if state != "ok" {
                let what = format!("cluster_state is `{state}`");
                return Err(CheckError::ClusterDown { address, what });
            }
        }
        Ok(server)
    }

    /// Asks one node, whatever slots it has.
    fn ask_node(&mut self, node: usize, command: &Command) -> Reply {
        let until = Clock::mono_now().after(self.timeout.saturating_mul(RUN_TIMEOUTS));
        let node = &mut self.nodes[node];
        let raw = node.send(std::iter::once(command), until).pop();
        // One reply for one command.
        let raw = raw.unwrap_or(Ok(redis::Value::Nil));
        judge(&node.address, raw, command, self.is_cluster)
    }

    /// Reads what the store says of itself, and describes it where it is new. `shards` are all that this supervisor has: a
    /// change of the number of buckets is taken when none of them holds anything.
    ///
    /// # Errors
    /// [`CheckError`].
    pub fn meta(&mut self, shards: &ShardList) -> Result<Meta, CheckError> {
        let (buckets, slice) = (self.buckets, self.buckets.slice());
        let mut stands = self.description()?;
        // A store that is described is only read: a full server refuses writes, and flushing has to start on it.
        if ["instance", "layout", "buckets"]
            .iter()
            .any(|&field| !stands.contains_key(field))
        {
            let candidate = self
                .instance_of_positions(shards)?
                .unwrap_or_else(new_instance);
            for (field, value) in [
                ("instance", &candidate[..]),
                ("layout", LAYOUT),
                ("buckets", &buckets.count().to_string()),
            ] {
                self.one(Command::describe(slice, field, value))?;
            }
            stands = self.description()?;
        }
        let instance = stands.get("instance").cloned().unwrap_or_default();
        let before = self.judge_description(&stands)?;
        if before != buckets {
            self.change_buckets(before, shards, &instance)?;
        }
        Ok(Meta { instance })
    }

    /// Proves that this store may be used as it is configured, as [`Client::meta`] does, and writes nothing.
    ///
    /// # Errors
    /// [`CheckError`].
    pub fn prove_meta(&mut self, shards: &ShardList) -> Result<(), CheckError> {
        let stands = self.description()?;
        if stands.is_empty() {
            return Ok(());
        }
        let before = self.judge_description(&stands)?;
        if before != self.buckets {
            for shard in shards.iter() {
                if let Err(what) = self.standing(before, shard)? {
                    return Err(self.other_buckets(before, shard, what));
                }
            }
        }
        Ok(())
    }

    /// How the store was cut into buckets when it was written, if this build can read it.
    fn judge_description(&self, stands: &BTreeMap<String, String>) -> Result<Buckets, CheckError> {
        let found = |field: &str| stands.get(field).cloned().unwrap_or_default();
        let other = |what, expected: String| CheckError::OtherStore {
            address: self.address(),
            what,
            found: found(what),
            expected,
        };
        if found("layout") != LAYOUT {
            return Err(other("layout", LAYOUT.to_owned()));
        }
        match found("buckets").parse() {
            Ok(count) => Ok(self.buckets.of_count(count)),
            Err(_) => Err(other("buckets", self.buckets.count().to_string())),
        }
    }

    fn other_buckets(&self, before: Buckets, shard: ShardId, what: &'static str) -> CheckError {
        CheckError::OtherBuckets {
            address: self.address(),
            found: before.count(),
            wanted: self.buckets.count(),
            shard,
            what,
        }
    }

    /// Takes another number of buckets than the store was written with, if it holds nothing: every new bucket gets the position
    /// at which all of its shard stand, and then the store is described anew. Several workers may do so at once: a position
    /// that moved on meanwhile stays.
    fn change_buckets(
        &mut self,
        before: Buckets,
        shards: &ShardList,
        instance: &str,
    ) -> Result<(), CheckError> {
        let after = self.buckets;
        for shard in shards.iter() {
            if let Err(what) = self.level(before, shard, instance)? {
                // Another worker may have been faster, and at work already.
                let stands = self.description()?;
                if stands.get("buckets") == Some(&after.count().to_string()) {
                    return Ok(());
                }
                return Err(self.other_buckets(before, shard, what));
            }
        }
        let count = after.count().to_string();
        self.one(Command::describe_anew(after.slice(), "buckets", &count))?;
        Ok(())
    }

    /// Where a shard stands that holds nothing: the offset that all its old buckets have, and the positions of old and new ones;
    /// `Ok(Err(…))` says what it holds.
    fn standing(
        &mut self,
        before: Buckets,
        shard: ShardId,
    ) -> Result<Result<Standing, &'static str>, CheckError> {
        let old: Vec<Bucket> = before.of_shard(shard).collect();
        let new = self.buckets.of_shard(shard);
        let lengths = old.iter().map(|&bucket| Command::queue_len(bucket));
        for reply in self.run(&lengths.collect::<Vec<_>>()) {
            if reply::number(&reply?) != Some(0) {
                return Ok(Err("holds spans"));
            }
        }
        let mut positions = BTreeMap::new();
        let all: Vec<Bucket> = old.iter().copied().chain(new).collect();
        let commands: Vec<Command> = all.iter().copied().map(Command::whole_position).collect();
        for (bucket, reply) in all.into_iter().zip(self.run(&commands)) {
            positions.insert(bucket, reply::position(&reply?));
        }
        let standing = Standing {
            next: old.first().and_then(|bucket| next_of(&positions, bucket)),
            positions,
        };
        let is_level = |bucket| next_of(&standing.positions, bucket) == standing.next;
        Ok(match old.iter().all(is_level) {
            true => Ok(standing),
            false => Err("has buckets that stand at different offsets"),
        })
    }

    /// Brings a shard's new buckets to where its old ones stand; `Ok(Err(…))` says why it cannot be.
    fn level(
        &mut self,
        before: Buckets,
        shard: ShardId,
        instance: &str,
    ) -> Result<Result<(), &'static str>, CheckError> {
        let Standing { next, positions } = match self.standing(before, shard)? {
            Ok(standing) => standing,
            Err(what) => return Ok(Err(what)),
        };
        let Some(next) = next else {
            return Ok(Ok(()));
        };
        let clocks = positions.values().flatten().map(|position| position.clock);
        let clock = clocks.min().unwrap_or_default();
        let ttl = self.ttl;
        let new = self.buckets.of_shard(shard);
        let steps = new.filter(|bucket| next_of(&positions, bucket) != Some(next));
        let commands: Vec<Command> = steps
            .map(|bucket| {
                PositionCall {
                    bucket,
                    before: next_of(&positions, &bucket),
                    next,
                    clock,
                    spans: 0,
                    instance,
                    ttl,
                    counts: &[],
                }
                .command()
            })
            .collect();
        for reply in self.run(&commands) {
            // Where another position stands by now, a faster worker wrote it.
            reply?;
        }
        Ok(Ok(()))
    }

    fn description(&mut self) -> Result<BTreeMap<String, String>, CheckError> {
        let meta = Command::meta(self.buckets.slice());
        Ok(match self.one(meta)? {
            redis::Value::Array(values) => values
                .chunks_exact(2)
                .filter_map(|pair| Some((text(&pair[0])?, text(&pair[1])?)))
                .collect(),
            _ => BTreeMap::new(),
        })
    }

    /// The id of a store whose description is gone while positions stand.
    fn instance_of_positions(&mut self, shards: &ShardList) -> Result<Option<String>, CheckError> {
        let buckets = self.buckets;
        let all = shards.iter().flat_map(|shard| buckets.of_shard(shard));
        let commands: Vec<Command> = all.map(Command::whole_position).collect();
        for reply in self.run(&commands) {
            if let Some(position) = reply::position(&reply?) {
                return Ok(Some(position.instance));
            }
        }
        Ok(None)
    }

    fn one(&mut self, command: Command) -> Reply {
        let reply = self.run(std::slice::from_ref(&command)).pop();
        // A run gives a reply for each command.
        reply.unwrap_or(Ok(redis::Value::Nil))
    }
}

/// Where a shard stands that holds nothing.
struct Standing {
    /// The offset at which all its old buckets stand; none has a position where there is none.
    next: Option<u64>,
    /// Of old and new buckets.
    positions: BTreeMap<Bucket, Option<Position>>,
}

fn next_of(positions: &BTreeMap<Bucket, Option<Position>>, bucket: &Bucket) -> Option<u64> {
    let position = positions.get(bucket).and_then(Option::as_ref);
    position.map(|position| position.next)
}

/// The lines of an `INFO`: names and values.
fn facts(info: &redis::Value) -> BTreeMap<String, String> {
    text(info)
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.trim().split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

fn judge_facts(
    address: &str,
    facts: &BTreeMap<String, String>,
    is_cluster: bool,
) -> Result<Server, CheckError> {
    let fact = |name: &str| facts.get(name).map_or("", String::as_str);
    let address = address.to_owned();
    let version = fact("redis_version").to_owned();
    let mut numbers = version
        .split('.')
        .map(|part| part.parse::<u32>().unwrap_or(0));
    if (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) < VERSION_MIN {
        return Err(CheckError::TooOld { address, version });
    }
    match (fact("cluster_enabled") == "1", is_cluster) {
        (true, false) => return Err(CheckError::Cluster { address }),
        (false, true) => return Err(CheckError::NoCluster { address }),
        _ => {}
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
        "master" => Ok(Server {
            address,
            version,
            maxmemory,
        }),
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
            let mut facts: BTreeMap<&'static str, &'static str> = [
                ("redis_version", "7.0.15"),
                ("maxmemory", "0"),
                ("maxmemory_policy", "noeviction"),
                ("role", "master"),
                ("cluster_enabled", "0"),
            ]
            .into();
            facts.extend(changed.iter().copied());
            let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
            facts.into_iter().map(owned).collect::<BTreeMap<_, _>>()
        };
        let judged =
            |changed: &[(&'static str, &'static str)]| judge_facts("a:1", &facts(changed), false);
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
        let alone = judge_facts("a:1", &facts(&[]), true);
        assert!(matches!(alone, Err(CheckError::NoCluster { .. })));
        assert!(judge_facts("a:1", &facts(&[("cluster_enabled", "1")]), true).is_ok());
        let replica = judged(&[("role", "slave")]).unwrap_err();
        assert!(replica.is_outage(), "{replica}");
    }

    #[test]
    fn instances_differ() {
        assert_ne!(new_instance(), new_instance());
        assert_eq!(new_instance().len(), 32);
    }
}
