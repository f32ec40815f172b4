//! The Redis of a world: one server, or a cluster of three; read and spoiled without our own client.
//!
//! In:     the variable `STORE`: nothing, or `cluster`.
//! Out:    servers, all to be told the same; what they hold.
//! Keeps:  a test knows neither how keys are cut nor on which node they are.
//! Knows:  the names of keys. Nothing of the store's client.
//! Source: docs/store.md 1; docs/cluster.md.

use std::{collections::BTreeMap, io::Write};

use redis::Connection;
use stand::{
    StandError,
    cluster::{Cluster, MASTERS},
    proxy::Proxy,
    redis::Redis,
};

use super::SHARDS;

/// Buckets of a shard on a cluster: shards × buckets is well above the number of nodes.
const BUCKETS: u32 = 4;
/// What a configuration says of a cluster.
const CLUSTER_SETTINGS: &str = "redis.cluster = true\nredis.buckets = 4\nredis.slice = 3\n";

/// Tests, or halves of them, whose subject a cluster does not have. Each says so when it meets one.
pub(crate) const NOT_ON_A_CLUSTER: [(&str, &str); 2] = [
    (
        "a redis that is read-only at the start",
        "a master with slots refuses REPLICAOF, and a replica is not asked",
    ),
    (
        "whole journals that a node has no room for",
        "each node has room of its own, and one look is not so large",
    ),
];

/// Whether the worlds of this run are on a cluster.
pub(crate) fn on_cluster() -> bool {
    match std::env::var("STORE").as_deref() {
        Err(_) | Ok("") => false,
        Ok("cluster") => true,
        Ok(other) => panic!("STORE={other}: it is `cluster`, or not set"),
    }
}

/// The lines of a configuration that say what this run's stores are.
pub(crate) fn settings() -> &'static str {
    if on_cluster() { CLUSTER_SETTINGS } else { "" }
}

/// Whether this part of a test is left out here; it is said, and it stands in the table.
pub(crate) fn is_left_out(part: &str) -> bool {
    let (_, why) = NOT_ON_A_CLUSTER
        .iter()
        .find(|(name, _)| *name == part)
        .expect("what is left out stands in the table");
    if on_cluster() {
        // Past the harness, which shows only what a failing test prints.
        let said = format!("not on a cluster: {part}: {why}\n");
        std::io::stderr().write_all(said.as_bytes()).unwrap();
    }
    on_cluster()
}

/// One server, or a cluster.
pub(crate) struct Store {
    servers: Servers,
    /// As it stands in tags.
    slice: &'static str,
    buckets: u32,
}

enum Servers {
    One(Redis),
    Three(Cluster),
}

impl Store {
    /// What this run is to have, behind `proxy`, with settings of `redis.conf`.
    pub(crate) fn start_with(proxy: &mut Proxy, settings: &[(&str, &str)]) -> Self {
        if on_cluster() {
            return Self::cluster_with(proxy, 0, settings);
        }
        let redis = Redis::start_with(settings).unwrap();
        proxy.add(&redis.address()).unwrap();
        Self {
            servers: Servers::One(redis),
            slice: "",
            buckets: 1,
        }
    }

    /// A cluster of three, each with so many replicas.
    pub(crate) fn cluster_with(
        proxy: &mut Proxy,
        replicas: usize,
        settings: &[(&str, &str)],
    ) -> Self {
        // A replica takes its master's place when it is told to. By itself it may lack what was acknowledged.
        let settings = [settings, &[("cluster-replica-no-failover", "yes")]].concat();
        Self {
            servers: Servers::Three(Cluster::start_behind(proxy, replicas, &settings).unwrap()),
            slice: "3-",
            buckets: BUCKETS,
        }
    }

    /// The lines of a configuration that say what it is.
    pub(crate) fn settings(&self) -> &'static str {
        match &self.servers {
            Servers::One(_) => "",
            Servers::Three(_) => CLUSTER_SETTINGS,
        }
    }

    pub(crate) fn cluster(&mut self) -> &mut Cluster {
        match &mut self.servers {
            Servers::Three(cluster) => cluster,
            Servers::One(_) => panic!("the world is on no cluster"),
        }
    }

    pub(crate) fn is_cluster(&self) -> bool {
        matches!(self.servers, Servers::Three(_))
    }

    /// The servers that are, or may become, masters of something.
    fn nodes(&self) -> Vec<&Redis> {
        match &self.servers {
            Servers::One(redis) => vec![redis],
            Servers::Three(cluster) => (0..cluster.nodes())
                .map(|node| cluster.node(node))
                .collect(),
        }
    }

    /// Does the same to every server that began as a master.
    fn on_all(&mut self, mut act: impl FnMut(&mut Redis) -> Result<(), StandError>) {
        match &mut self.servers {
            Servers::One(redis) => act(redis).unwrap(),
            Servers::Three(cluster) => {
                for node in 0..MASTERS {
                    act(cluster.node_mut(node)).unwrap();
                }
            }
        }
    }

    pub(crate) fn save(&mut self) {
        self.on_all(|redis| redis.save());
    }

    pub(crate) fn restart_as_saved(&mut self) {
        self.on_all(Redis::restart_as_saved);
    }

    pub(crate) fn restart_with_data(&mut self) {
        self.on_all(Redis::restart_with_data);
    }

    pub(crate) fn restart_empty(&mut self) {
        self.on_all(Redis::restart_empty);
    }

    pub(crate) fn stop(&mut self) {
        self.on_all(Redis::stop);
    }

    pub(crate) fn flush_all(&mut self) {
        self.on_all(|redis| redis.flush_all());
    }

    /// Sends each server a command.
    pub(crate) fn tell_all(&mut self, command: &redis::Cmd) {
        self.on_all(|redis| Ok(command.exec(&mut redis.connection()?)?));
    }

    /// What kinds of calls took on average, in microseconds, on the server where each took longest.
    pub(crate) fn call_times(&self) -> BTreeMap<String, f64> {
        let mut times = BTreeMap::new();
        for (name, mean) in self.call_stats("usec_per_call=") {
            let longest = times.entry(name).or_insert(0.0_f64);
            *longest = longest.max(mean);
        }
        times
    }

    /// How many calls of a kind there were, on all servers.
    pub(crate) fn calls(&self, kind: &str) -> f64 {
        let counts = self.call_stats("calls=").into_iter();
        counts
            .filter_map(|(name, count)| (name == kind).then_some(count))
            .sum()
    }

    /// One figure of each kind of calls, of each server.
    fn call_stats(&self, figure: &str) -> Vec<(String, f64)> {
        let mut stats = Vec::new();
        for node in self.nodes() {
            let info = redis::cmd("INFO").arg("commandstats").take();
            let text: String = info.query(&mut node.connection().unwrap()).unwrap();
            // cmdstat_hkeys:calls=3,usec=60,usec_per_call=20.00,rejected_calls=0,failed_calls=0
            for line in text
                .lines()
                .filter_map(|line| line.strip_prefix("cmdstat_"))
            {
                let (name, values) = line.split_once(':').unwrap();
                let value = values
                    .split(',')
                    .find_map(|value| value.strip_prefix(figure));
                stats.push((name.to_owned(), value.unwrap().parse().unwrap()));
            }
        }
        stats
    }

    /// The key of a bucket: its `pos`, `q`, `sum`.
    pub(crate) fn key(&self, shard: u32, bucket: u32, what: &str) -> String {
        format!("span-buf:{{{}{shard}.{bucket}}}:{what}", self.slice)
    }

    /// How many buckets a shard has.
    pub(crate) fn buckets_a_shard(&self) -> u32 {
        self.buckets
    }

    /// Every bucket, with its shard.
    pub(crate) fn buckets(&self) -> impl Iterator<Item = (u32, u32)> + use<> {
        let buckets = self.buckets;
        (0..SHARDS).flat_map(move |shard| (0..buckets).map(move |bucket| (shard, bucket)))
    }

    /// A connection to the server that has this key.
    pub(crate) fn connection(&self, key: &str) -> Connection {
        match &self.servers {
            Servers::One(redis) => redis.connection().unwrap(),
            Servers::Three(cluster) => {
                let slot = cluster.slot_of(key.as_bytes()).unwrap();
                cluster.connection(cluster.owner(slot).unwrap()).unwrap()
            }
        }
    }

    /// Keys by their pattern, each with a number that a command gives of it.
    fn numbers(&self, pattern: &str, ask: impl Fn(&str) -> redis::Cmd) -> Vec<(String, u64)> {
        let mut found = Vec::new();
        for node in self.nodes() {
            let mut connection = node.connection().unwrap();
            let role: Vec<redis::Value> = redis::cmd("ROLE").query(&mut connection).unwrap();
            if role.first() != Some(&redis::Value::BulkString(b"master".to_vec())) {
                continue;
            }
            let keys: Vec<String> = redis::cmd("KEYS")
                .arg(pattern)
                .query(&mut connection)
                .unwrap();
            for key in keys {
                // Between the two it may have gone to another node; the next look finds it there.
                let number: Option<u64> = ask(&key).query(&mut connection).unwrap_or_default();
                found.push((key, number.unwrap_or(0)));
            }
        }
        found
    }

    /// Journals that are left, with their entries; of all traces, or of one.
    pub(crate) fn journals(&self, trace: &str) -> Vec<(String, u64)> {
        self.numbers(&format!("span-buf:*:t:*:{trace}"), |key| {
            redis::cmd("HLEN").arg(key).take()
        })
    }

    /// Spans that the store says were inserted.
    pub(crate) fn inserted(&self) -> u64 {
        let all = self.numbers("span-buf:*:pos", |key| {
            redis::cmd("HGET").arg(key).arg("spans").take()
        });
        all.iter().map(|(_, spans)| spans).sum()
    }

    /// Traces in all queues.
    pub(crate) fn queued(&self) -> u64 {
        let all = self.numbers("span-buf:*:q", |key| redis::cmd("ZCARD").arg(key).take());
        all.iter().map(|(_, traces)| traces).sum()
    }

    /// A counter of a shard's sums, over its buckets.
    pub(crate) fn sum(&self, shard: u32, counter: &str) -> u64 {
        let pattern = self.key(shard, 0, "sum").replace(".0}", ".*}");
        let all = self.numbers(&pattern, |key| {
            redis::cmd("HGET").arg(key).arg(counter).take()
        });
        all.iter().map(|(_, amount)| amount).sum()
    }
}

#[test]
fn what_is_left_out_on_a_cluster_stands_in_one_table() {
    let tests: Vec<String> = std::fs::read_dir(env!("CARGO_MANIFEST_DIR"))
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|path| path.to_string_lossy().contains("/process_"))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    let called: usize = tests
        .iter()
        .map(|test| test.matches("is_left_out(").count())
        .sum();
    assert_eq!(called, NOT_ON_A_CLUSTER.len());
    for (name, _) in NOT_ON_A_CLUSTER {
        let call = format!("is_left_out(\"{name}\")");
        assert!(tests.iter().any(|test| test.contains(&call)), "{name}");
    }
}
