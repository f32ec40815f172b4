//! The Redis of a bench: one server, or a cluster of three.
//!
//! Out:    what the configuration says of it; counters over all buckets; what it cost.
//! Keeps:  who owns a key is asked before anything is measured.
//! Source: docs/store.md 1; docs/cluster.md.

use redis::Connection;
use stand::{cluster::Cluster, redis::Redis};

use crate::meter::info;

/// Buckets of a shard on a cluster.
const BUCKETS: u32 = 4;

pub(crate) enum Nodes {
    One(Redis),
    Three(Cluster),
}

/// What is asked of it while the product is at work.
pub(crate) struct Watch {
    connections: Vec<Connection>,
    /// The tag of each bucket, and the node that has it.
    buckets: Vec<(String, usize)>,
}

impl Nodes {
    pub(crate) fn start(nodes: usize) -> Self {
        match nodes {
            1 => Self::One(Redis::start().unwrap()),
            // As the single one: nothing is written to disk.
            _ => Self::Three(Cluster::start_with(0, &[("appendonly", "no")]).unwrap()),
        }
    }

    pub(crate) fn addresses(&self) -> String {
        match self {
            Self::One(redis) => redis.address(),
            Self::Three(cluster) => cluster.addresses(),
        }
    }

    pub(crate) fn settings(&self) -> String {
        match self {
            Self::One(_) => String::new(),
            Self::Three(_) => format!("redis.cluster = true\nredis.buckets = {BUCKETS}\n"),
        }
    }

    pub(crate) fn watch(&self, shards: u32) -> Watch {
        match self {
            Self::One(redis) => Watch {
                connections: vec![redis.connection().unwrap()],
                buckets: (0..shards)
                    .map(|shard| (format!("{{{shard}.0}}"), 0))
                    .collect(),
            },
            Self::Three(cluster) => {
                let tags = (0..shards).flat_map(|shard| {
                    (0..BUCKETS).map(move |bucket| format!("{{{shard}.{bucket}}}"))
                });
                let owned = |tag: String| {
                    let slot = cluster.slot_of(tag.as_bytes()).unwrap();
                    (tag, cluster.owner(slot).unwrap())
                };
                Watch {
                    connections: (0..cluster.nodes())
                        .map(|node| cluster.connection(node).unwrap())
                        .collect(),
                    buckets: tags.map(owned).collect(),
                }
            }
        }
    }
}

impl Watch {
    /// A sum over all buckets of one field of a hash.
    pub(crate) fn total(&mut self, key: &str, field: &str) -> u64 {
        let mut total = 0;
        for (node, connection) in self.connections.iter_mut().enumerate() {
            let mut pipe = redis::pipe();
            for (tag, _) in self.buckets.iter().filter(|(_, owner)| *owner == node) {
                pipe.cmd("HGET")
                    .arg(format!("span-buf:{tag}:{key}"))
                    .arg(field);
            }
            let values: Vec<Option<u64>> = pipe.query(connection).unwrap();
            total += values.into_iter().flatten().sum::<u64>();
        }
        total
    }

    /// CPU time and memory of all nodes, as [`info`].
    pub(crate) fn info(&mut self) -> (f64, f64) {
        let each = self.connections.iter_mut().map(info);
        each.fold((0.0, 0.0), |(cpu, bytes), node| {
            (cpu + node.0, bytes + node.1)
        })
    }
}
