//! A private Redis Cluster: three masters and, where wanted, their replicas, each with its own ports and directory.
//!
//! In:     how many replicas; nodes to stop, slots to move, masters to fail over.
//! Out:    addresses, connections, who has a slot; where wanted, a proxy before every node.
//! Keeps:  a node that is killed loses nothing that it acknowledged (its log of writes is in the kernel by then); a node keeps
//!         its place in the cluster when it is started again, empty or not.
//! Knows:  CLUSTER commands. No key of ours.
//! Source: docs/house.md 9.

use std::time::Duration;

use redis::{Connection, Value, cmd};

use crate::{StandError, await_some, free_port, proxy::Proxy, redis::Redis};

/// Masters of a cluster: the fewest that agree on which of them is down.
pub const MASTERS: usize = 3;
/// The hash slots.
pub const SLOTS: u16 = 16_384;

/// How long the nodes may take to agree.
const AGREE: Duration = Duration::from_secs(20);
/// How long a planned fail-over may take: servers give it up after 5 s, which they need on a busy machine now and then.
const FAILOVER: Duration = Duration::from_secs(6);
const FAILOVER_TRIES: u32 = 4;
/// When a node that does not answer counts as down; the default is 15 s. Units: milliseconds.
const NODE_TIMEOUT: &str = "2000";
/// How long a MIGRATE may take. Units: milliseconds.
const MIGRATE_TIMEOUT: u32 = 5_000;
/// Keys that one MIGRATE takes along.
const MIGRATE_KEYS: usize = 100;
/// Tries for the ports of a node.
const TRIES: u32 = 3;

/// A Redis Cluster that ends with its owner.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
}

#[derive(Debug)]
struct Node {
    redis: Redis,
    /// What it is called in the cluster: its own address, or that of the proxy before it.
    address: String,
    bus: u16,
    id: String,
}

/// A slot on its way from one node to another.
#[derive(Debug, Clone, Copy)]
pub struct Migration {
    slot: u16,
    from: usize,
    to: usize,
}

impl Cluster {
    /// Starts three empty masters that share all slots. They die with the calling thread.
    ///
    /// # Errors
    /// As [`Redis::start`]; [`StandError::Late`] when the nodes do not agree within 20 s.
    pub fn start() -> Result<Self, StandError> {
        Self::start_with(0, &[])
    }

    /// Starts three masters with `replicas` replicas each (node `3 + i` is the first replica of node `i`), all with settings of
    /// `redis.conf`.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub fn start_with(replicas: usize, settings: &[(&str, &str)]) -> Result<Self, StandError> {
        let nodes = (0..MASTERS * (1 + replicas))
            .map(|_| Node::start(settings))
            .collect::<Result<Vec<_>, _>>()?;
        Self { nodes }.join()
    }

    /// As [`Cluster::start_with`], with `proxy` before every node: they name each other by its addresses only, so whoever asks
    /// for slots or is redirected stays behind it, and so do replicas. What the nodes agree on (their bus) does not pass there.
    ///
    /// # Errors
    /// As [`Cluster::start`], and as [`Proxy::add`].
    pub fn start_behind(
        proxy: &mut Proxy,
        replicas: usize,
        settings: &[(&str, &str)],
    ) -> Result<Self, StandError> {
        let mut nodes = Vec::new();
        for _ in 0..MASTERS * (1 + replicas) {
            let mut node = Node::start(settings)?;
            node.announce(proxy.add(&node.redis.address())?)?;
            nodes.push(node);
        }
        Self { nodes }.join()
    }

    /// Makes a cluster of nodes that do not know each other.
    fn join(mut self) -> Result<Self, StandError> {
        let cluster = &mut self;
        for (index, node) in cluster.nodes.iter_mut().enumerate() {
            let mut connection = node.redis.connection()?;
            node.id = cmd("CLUSTER").arg("MYID").query(&mut connection)?;
            cmd("CLUSTER")
                .arg("SET-CONFIG-EPOCH")
                .arg(index + 1)
                .exec(&mut connection)?;
            if index < MASTERS {
                let share = usize::from(SLOTS) / MASTERS;
                let last = if index + 1 == MASTERS {
                    usize::from(SLOTS) - 1
                } else {
                    share * (index + 1) - 1
                };
                cmd("CLUSTER")
                    .arg("ADDSLOTSRANGE")
                    .arg(share * index)
                    .arg(last)
                    .exec(&mut connection)?;
            }
        }
        let mut first = cluster.connection(0)?;
        for node in &cluster.nodes[1..] {
            cmd("CLUSTER")
                .arg("MEET")
                .arg("127.0.0.1")
                .arg(port(&node.address))
                .arg(node.bus)
                .exec(&mut first)?;
        }
        cluster.await_known()?;
        for replica in MASTERS..cluster.nodes.len() {
            let master = &cluster.nodes[replica % MASTERS].id;
            cmd("CLUSTER")
                .arg("REPLICATE")
                .arg(master)
                .exec(&mut cluster.connection(replica)?)?;
        }
        cluster.await_ok()?;
        Ok(self)
    }

    /// How many nodes there are, replicas included.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// One node.
    ///
    /// # Panics
    /// When there is no such node.
    #[must_use]
    pub fn node(&self, node: usize) -> &Redis {
        &self.nodes[node].redis
    }

    /// One node, to be stopped, frozen or started.
    ///
    /// # Panics
    /// When there is no such node.
    pub fn node_mut(&mut self, node: usize) -> &mut Redis {
        &mut self.nodes[node].redis
    }

    /// The addresses of all nodes as clients are told them, with commas between them.
    #[must_use]
    pub fn addresses(&self) -> String {
        let addresses: Vec<&str> = self
            .nodes
            .iter()
            .map(|node| node.address.as_str())
            .collect();
        addresses.join(",")
    }

    /// A new connection to one node.
    ///
    /// # Errors
    /// [`StandError::Redis`] when it does not take it.
    pub fn connection(&self, node: usize) -> Result<Connection, StandError> {
        self.nodes[node].redis.connection()
    }

    /// Waits until every node that runs finds the cluster well, all slots served and all replicas in step.
    ///
    /// # Errors
    /// [`StandError::Late`] after 20 s.
    pub fn await_ok(&self) -> Result<(), StandError> {
        await_some(AGREE, "a cluster that is well", || {
            let running = (0..self.nodes.len()).filter(|&node| self.node(node).pid().is_some());
            running
                .map(|node| self.is_ok(node))
                .all(|ok| ok.unwrap_or(false))
                .then_some(())
        })
    }

    /// The master that has a slot, as node `asked` knows it.
    ///
    /// # Errors
    /// [`StandError`] when it does not answer, or knows of none.
    pub fn owner_as_seen_by(&self, asked: usize, slot: u16) -> Result<usize, StandError> {
        let ranges = self.ranges(asked)?;
        let master = ranges
            .iter()
            .find(|(first, last, _)| (*first..=*last).contains(&slot))
            .and_then(|(_, _, master)| text(master.get(2)?));
        self.nodes
            .iter()
            .position(|node| Some(&node.id) == master.as_ref())
            .ok_or_else(|| StandError::Malformed {
                what: "CLUSTER SLOTS".into(),
                reason: format!("no node has slot={slot}"),
            })
    }

    /// The master that has a slot, as the first node that runs knows it.
    ///
    /// # Errors
    /// [`StandError`] when none runs, or knows of none.
    pub fn owner(&self, slot: u16) -> Result<usize, StandError> {
        let asked = (0..self.nodes.len()).find(|&node| self.node(node).pid().is_some());
        self.owner_as_seen_by(asked.unwrap_or(0), slot)
    }

    /// The slot of a key, as the cluster computes it.
    ///
    /// # Errors
    /// [`StandError::Redis`] when the first node does not answer.
    pub fn slot_of(&self, key: &[u8]) -> Result<u16, StandError> {
        Ok(cmd("CLUSTER")
            .arg("KEYSLOT")
            .arg(key)
            .query(&mut self.connection(0)?)?)
    }

    /// Begins to move a slot: from here on ASK and TRYAGAIN are answered for it.
    ///
    /// # Errors
    /// [`StandError`] when a node refuses.
    pub fn begin_migration(&self, slot: u16, to: usize) -> Result<Migration, StandError> {
        let from = self.owner(slot)?;
        self.set_slot(to, slot, "IMPORTING", from)?;
        self.set_slot(from, slot, "MIGRATING", to)?;
        Ok(Migration { slot, from, to })
    }

    /// Moves some keys of a slot that is on its way; says how many are left.
    ///
    /// # Errors
    /// [`StandError`] when a node refuses.
    pub fn move_keys(&self, migration: Migration, most: usize) -> Result<usize, StandError> {
        let Migration { slot, from, to } = migration;
        let mut source = self.connection(from)?;
        let mut moved = 0;
        loop {
            let keys: Vec<Vec<u8>> = cmd("CLUSTER")
                .arg("GETKEYSINSLOT")
                .arg(slot)
                .arg(MIGRATE_KEYS.min(most - moved))
                .query(&mut source)?;
            if !keys.is_empty() {
                // Not by the proxy: what it holds or cuts is clients' commands.
                let target = self.nodes[to].redis.address();
                cmd("MIGRATE")
                    .arg("127.0.0.1")
                    .arg(port(&target))
                    .arg("")
                    .arg(0)
                    .arg(MIGRATE_TIMEOUT)
                    .arg("KEYS")
                    .arg(&keys)
                    .exec(&mut source)?;
                moved += keys.len();
            }
            if keys.is_empty() || moved >= most {
                return Ok(cmd("CLUSTER")
                    .arg("COUNTKEYSINSLOT")
                    .arg(slot)
                    .query(&mut source)?);
            }
        }
    }

    /// Ends a move: moves what is left and gives the slot to its new node, whom it tells first.
    ///
    /// # Errors
    /// [`StandError`] when a node refuses.
    pub fn end_migration(&self, migration: Migration) -> Result<(), StandError> {
        let Migration { slot, from, to } = migration;
        while self.move_keys(migration, usize::MAX)? > 0 {}
        let others = (0..MASTERS).filter(|&node| node != to && node != from);
        for node in [to, from].into_iter().chain(others) {
            if self.node(node).pid().is_some() && self.is_master(node)? {
                self.set_slot(node, slot, "NODE", to)?;
            }
        }
        Ok(())
    }

    /// Moves a slot with all of its keys, as `redis-cli --cluster reshard` does.
    ///
    /// # Errors
    /// [`StandError`] when a node refuses.
    pub fn migrate_slot(&self, slot: u16, to: usize) -> Result<(), StandError> {
        let migration = self.begin_migration(slot, to)?;
        self.end_migration(migration)
    }

    /// A planned fail-over (`CLUSTER FAILOVER`): the replica takes its master's place, with all of its data. Waits until every
    /// node knows.
    ///
    /// # Errors
    /// [`StandError`] when it is refused, or does not come to its end.
    pub fn fail_over(&self, replica: usize) -> Result<(), StandError> {
        for _ in 1..FAILOVER_TRIES {
            if self.try_fail_over(replica).is_ok() {
                return self.await_new_master(replica);
            }
        }
        self.try_fail_over(replica)?;
        self.await_new_master(replica)
    }

    /// Waits until every node that runs knows of a master's slots.
    fn await_new_master(&self, master: usize) -> Result<(), StandError> {
        let knows = |asked: usize| {
            let ranges = self.ranges(asked).unwrap_or_default();
            ranges.iter().any(|(_, _, owner)| {
                owner.get(2).and_then(text).as_ref() == Some(&self.nodes[master].id)
            })
        };
        let running: Vec<usize> = (0..self.nodes.len())
            .filter(|&node| self.node(node).pid().is_some())
            .collect();
        await_some(FAILOVER, "all nodes to know the new master", || {
            running.iter().all(|&node| knows(node)).then_some(())
        })?;
        self.await_ok()
    }

    /// The ranges of slots as a node knows them, each with its master.
    fn ranges(&self, asked: usize) -> Result<Vec<(u16, u16, Vec<Value>)>, StandError> {
        let ranges: Vec<Vec<Value>> = cmd("CLUSTER")
            .arg("SLOTS")
            .query(&mut self.connection(asked)?)?;
        Ok(ranges.iter().filter_map(|range| read(range)).collect())
    }

    fn try_fail_over(&self, replica: usize) -> Result<(), StandError> {
        cmd("CLUSTER")
            .arg("FAILOVER")
            .exec(&mut self.connection(replica)?)?;
        await_some(FAILOVER, "a replica that became a master", || {
            self.is_master(replica).unwrap_or(false).then_some(())
        })
    }

    /// Whether a node says that it is a master.
    ///
    /// # Errors
    /// [`StandError::Redis`] when it does not answer.
    pub fn is_master(&self, node: usize) -> Result<bool, StandError> {
        let role: Vec<Value> = cmd("ROLE").query(&mut self.connection(node)?)?;
        Ok(role.first().and_then(text).as_deref() == Some("master"))
    }

    fn set_slot(&self, told: usize, slot: u16, what: &str, node: usize) -> Result<(), StandError> {
        Ok(cmd("CLUSTER")
            .arg("SETSLOT")
            .arg(slot)
            .arg(what)
            .arg(&self.nodes[node].id)
            .exec(&mut self.connection(told)?)?)
    }

    fn is_ok(&self, node: usize) -> Result<bool, StandError> {
        let mut connection = self.connection(node)?;
        let info: String = cmd("CLUSTER").arg("INFO").query(&mut connection)?;
        let role: Vec<Value> = cmd("ROLE").query(&mut connection)?;
        let in_step = match role.first().and_then(text).as_deref() {
            Some("slave") => role.get(3).and_then(text).as_deref() == Some("connected"),
            _ => true,
        };
        let says = |line: &str| info.lines().any(|said| said.trim_end() == line);
        Ok(in_step && says("cluster_state:ok") && says("cluster_slots_ok:16384"))
    }

    /// Waits until every node knows every other.
    fn await_known(&self) -> Result<(), StandError> {
        let line = format!("cluster_known_nodes:{}", self.nodes.len());
        await_some(AGREE, "nodes that know each other", || {
            let knows = |node: usize| -> Result<bool, StandError> {
                let mut connection = self.connection(node)?;
                let info: String = cmd("CLUSTER").arg("INFO").query(&mut connection)?;
                let nodes: String = cmd("CLUSTER").arg("NODES").query(&mut connection)?;
                let met = !nodes.contains("handshake") && !nodes.contains(":0@");
                Ok(met && info.lines().any(|said| said.trim_end() == line))
            };
            (0..self.nodes.len())
                .map(knows)
                .all(|known| known.unwrap_or(false))
                .then_some(())
        })
    }
}

impl Node {
    fn start(settings: &[(&str, &str)]) -> Result<Self, StandError> {
        let mut tries = 1;
        loop {
            let bus = free_port()?;
            let port = bus.to_string();
            let own = [
                ("cluster-enabled", "yes"),
                ("cluster-config-file", "nodes.conf"),
                ("cluster-node-timeout", NODE_TIMEOUT),
                // The default is the port + 10,000, which may be no port at all.
                ("cluster-port", &port),
                ("cluster-allow-replica-migration", "no"),
                // Written before an answer is: a killed process loses nothing, and no disk is waited for.
                ("appendonly", "yes"),
                ("appendfsync", "no"),
                ("repl-diskless-sync-delay", "0"),
            ];
            let all: Vec<(&str, &str)> = own.iter().chain(settings).copied().collect();
            match Redis::start_with(&all) {
                Err(StandError::Ended { .. }) if tries < TRIES => tries += 1,
                started => {
                    let redis = started?;
                    return Ok(Self {
                        address: redis.address(),
                        redis,
                        bus,
                        id: String::new(),
                    });
                }
            }
        }
    }

    /// Makes it tell an address in the place of its own.
    fn announce(&mut self, address: String) -> Result<(), StandError> {
        let bus = self.bus.to_string();
        for (name, value) in [
            ("cluster-announce-ip", "127.0.0.1"),
            ("cluster-announce-port", port(&address)),
            ("cluster-announce-bus-port", &bus),
        ] {
            self.redis.config_keep(name, value)?;
        }
        self.address = address;
        Ok(())
    }
}

fn port(address: &str) -> &str {
    address.rsplit(':').next().unwrap_or_default()
}

fn read(range: &[Value]) -> Option<(u16, u16, Vec<Value>)> {
    let number = |value: &Value| match value {
        Value::Int(number) => u16::try_from(*number).ok(),
        _ => None,
    };
    match range {
        [first, last, Value::Array(master), ..] => {
            Some((number(first)?, number(last)?, master.clone()))
        }
        _ => None,
    }
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
        Value::SimpleString(text) => Some(text.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(cluster: &Cluster, node: usize, key: &str, value: &str) -> redis::RedisResult<()> {
        cmd("SET")
            .arg(key)
            .arg(value)
            .exec(&mut cluster.connection(node).unwrap())
    }

    fn get(cluster: &Cluster, node: usize, key: &str) -> redis::RedisResult<Option<String>> {
        cmd("GET")
            .arg(key)
            .query(&mut cluster.connection(node).unwrap())
    }

    #[test]
    fn a_node_stops_and_comes_back_with_its_data_or_without() {
        let mut cluster = Cluster::start().unwrap();
        let slot = cluster.slot_of(b"foo").unwrap();
        let owner = cluster.owner(slot).unwrap();
        set(&cluster, owner, "foo", "1").unwrap();
        let other = (owner + 1) % MASTERS;
        let moved = set(&cluster, other, "foo", "2").unwrap_err().to_string();
        assert!(moved.contains("12182"), "{moved}");

        let pids: Vec<u32> = (0..MASTERS)
            .map(|node| cluster.node(node).pid().unwrap())
            .collect();
        cluster.node_mut(owner).stop().unwrap();
        assert_eq!(cluster.node(owner).pid(), None);
        cluster.node_mut(owner).start_again().unwrap();
        cluster.await_ok().unwrap();
        assert_eq!(get(&cluster, owner, "foo").unwrap().as_deref(), Some("1"));
        cluster.node_mut(owner).restart_empty().unwrap();
        cluster.await_ok().unwrap();
        assert_eq!(get(&cluster, owner, "foo").unwrap(), None);
        assert_eq!(cluster.owner(slot).unwrap(), owner);
        drop(cluster);
        for pid in pids {
            assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
        }
    }

    #[test]
    fn a_slot_moves_key_by_key() {
        let cluster = Cluster::start().unwrap();
        let slot = cluster.slot_of(b"foo").unwrap();
        let (from, to) = (cluster.owner(slot).unwrap(), 0);
        assert_ne!(from, to);
        set(&cluster, from, "{foo}1", "1").unwrap();
        set(&cluster, from, "{foo}2", "2").unwrap();
        let migration = cluster.begin_migration(slot, to).unwrap();
        assert_eq!(cluster.move_keys(migration, 1).unwrap(), 1);
        let asked = set(&cluster, from, "{foo}3", "3").unwrap_err().to_string();
        assert!(asked.to_lowercase().contains("ask"), "{asked}");
        cluster.end_migration(migration).unwrap();
        assert_eq!(cluster.owner(slot).unwrap(), to);
        for key in ["1", "2"] {
            let found = get(&cluster, to, &format!("{{foo}}{key}")).unwrap();
            assert_eq!(found.as_deref(), Some(key));
        }
    }

    #[test]
    fn a_replica_takes_its_masters_place_with_all_data() {
        let cluster = Cluster::start_with(1, &[]).unwrap();
        assert_eq!(cluster.nodes(), 2 * MASTERS);
        let slot = cluster.slot_of(b"foo").unwrap();
        let owner = cluster.owner(slot).unwrap();
        set(&cluster, owner, "foo", "1").unwrap();
        let replica = owner + MASTERS;
        assert!(!cluster.is_master(replica).unwrap());
        cluster.fail_over(replica).unwrap();
        assert_eq!(cluster.owner(slot).unwrap(), replica);
        assert_eq!(get(&cluster, replica, "foo").unwrap().as_deref(), Some("1"));
        assert!(!cluster.is_master(owner).unwrap());
    }

    fn owner_of(cluster: &Cluster, key: &str) -> usize {
        let slot = cluster.slot_of(key.as_bytes()).unwrap();
        cluster.owner(slot).unwrap()
    }

    /// A key whose owner is as wanted.
    fn key_of(cluster: &Cluster, wanted: impl Fn(usize) -> bool) -> String {
        let mut keys = (0..100).map(|number| format!("key{number}"));
        keys.find(|key| wanted(owner_of(cluster, key))).unwrap()
    }

    #[test]
    fn behind_a_proxy_no_node_tells_its_own_address() {
        let mut proxy = Proxy::empty();
        let mut cluster = Cluster::start_behind(&mut proxy, 1, &[]).unwrap();
        assert_eq!(cluster.addresses(), proxy.addresses());
        // Over a restart as well.
        cluster.node_mut(0).stop().unwrap();
        cluster.node_mut(0).start_again().unwrap();
        cluster.await_ok().unwrap();
        for asked in 0..MASTERS {
            let slots: String = cmd("CLUSTER")
                .arg("NODES")
                .query(&mut cluster.connection(asked).unwrap())
                .unwrap();
            let key = key_of(&cluster, |owner| owner != asked);
            let error = set(&cluster, asked, &key, "1").unwrap_err().to_string();
            for node in 0..cluster.nodes() {
                let own = port(&cluster.node(node).address()).to_owned();
                assert!(!slots.contains(&format!(":{own}@")), "{slots}");
                assert!(!error.contains(&own), "{error}");
            }
            let told = port(&cluster.nodes[owner_of(&cluster, &key)].address);
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn behind_a_proxy_one_order_holds_for_all_nodes() {
        let mut proxy = Proxy::empty();
        let cluster = Cluster::start_behind(&mut proxy, 1, &[]).unwrap();
        // A command is held at whichever node it reaches, and a replica is behind the proxy too.
        for owner in [1, 2] {
            let hold = proxy.hold_command("SET");
            let address = cluster.nodes[owner].address.clone();
            let key = key_of(&cluster, |other| other == owner);
            let client = std::thread::spawn({
                let key = key.clone();
                move || {
                    let client = redis::Client::open(format!("redis://{address}/")).unwrap();
                    let mut connection = client.get_connection_with_timeout(AGREE).unwrap();
                    cmd("SET").arg(key).arg(1).exec(&mut connection)
                }
            });
            assert!(hold.reached(AGREE));
            assert_eq!(get(&cluster, owner, &key).unwrap(), None);
            hold.release();
            client.join().unwrap().unwrap();
            cluster.fail_over(owner + MASTERS).unwrap();
            assert_eq!(
                get(&cluster, owner + MASTERS, &key).unwrap().as_deref(),
                Some("1")
            );
        }
        proxy.refuse();
        for address in proxy.addresses().split(',') {
            assert!(std::net::TcpStream::connect(address).is_err(), "{address}");
        }
        proxy.release();
    }

    #[test]
    fn a_node_goes_back_to_what_it_held_when_it_was_saved() {
        let mut cluster = Cluster::start().unwrap();
        let owner = cluster.owner(cluster.slot_of(b"foo").unwrap()).unwrap();
        set(&cluster, owner, "foo", "1").unwrap();
        cluster.node(owner).save().unwrap();
        set(&cluster, owner, "foo", "2").unwrap();
        cluster.node_mut(owner).restart_as_saved().unwrap();
        cluster.await_ok().unwrap();
        assert_eq!(get(&cluster, owner, "foo").unwrap().as_deref(), Some("1"));
        set(&cluster, owner, "foo", "3").unwrap();
        cluster.node_mut(owner).restart_with_data().unwrap();
        cluster.await_ok().unwrap();
        assert_eq!(get(&cluster, owner, "foo").unwrap().as_deref(), Some("3"));
    }
}
