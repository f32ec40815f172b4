//! The client: plain connections behind a slot map, and a reply to every command.
//!
//! In:     commands, each for one hash slot.
//! Out:    a reply to each, in order: a value, a refusal, or that the connection was lost.
//! Keeps:  replies belong to their commands; what has to stand behind a command that was redirected is sent again behind it; a
//!         run takes ten time-outs and one more wait for a node; only masters are asked.
//! Knows:  slots, redirections, unknown scripts. No meaning of any key.
//! Source: docs/store.md 2, 4; docs/spec.md 9.1.

use std::{collections::BTreeMap, panic::resume_unwind, sync::LazyLock, thread, time::Duration};

use redis::{RedisError, ServerErrorKind};
use shared::{
    config,
    time::{Clock, MonoNanos},
};

use self::{
    node::Node,
    slots::{Range, Redirect},
};
use crate::keys::{Bucket, Buckets};

pub use self::{
    check::{CheckError, Meta, Server},
    command::Command,
    node::WHOLE_BYTES,
};
pub use redis::Value;

mod check;
mod command;
mod node;
pub mod reply;
mod slots;

/// How many time-outs a run may take that gets a reply now and then.
const RUN_TIMEOUTS: u32 = 10;
/// How many of them may go into reading the map of slots.
const MAP_TIMEOUTS: u32 = 3;
/// How often the map is read anew at most: a node that is down says so with every command.
const MAP_EVERY: Duration = Duration::from_millis(100);
/// How often a command is sent elsewhere within a run; what is refused once more is the caller's to wait for.
const REDIRECTS_MAX: usize = 3;
/// More nodes than a cluster has; whatever the servers say, no more are kept.
const NODES_MAX: usize = 1_000;
/// No node has the slot.
const NOBODY: u16 = u16::MAX;

/// The reply to one command.
pub type Reply = Result<Value, CommandError>;

/// Why a command has no good reply.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommandError {
    /// The connection could not be made, or went, or was too slow: whether the command was carried out is not known.
    #[error(
        "lost redis at {address}: {} (is it running, and reachable from here?)",
        lost(source)
    )]
    Lost {
        /// The node.
        address: String,
        /// What the connection said.
        source: RedisError,
    },
    /// The server refused it: it was not carried out.
    #[error("redis at {address} refused {command}: {message}{hint}", hint = .kind.hint())]
    Refused {
        /// The node.
        address: String,
        /// The command's name.
        command: String,
        /// What kind of refusal it is.
        kind: Refusal,
        /// The server's words.
        message: String,
    },
}

/// What a lost connection means, in words.
fn lost(source: &RedisError) -> &'static str {
    if source.is_timeout() {
        "no answer within redis.timeout"
    } else {
        "no connection"
    }
}

/// Kinds of refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The server is full.
    Full,
    /// The server takes no writes: a replica, or one whose disk or replicas fail.
    ReadOnly,
    /// The server is loading, busy with a script, or in the middle of a change.
    Busy,
    /// The server wants authorization that this client does not have.
    Denied,
    /// The slot is on its way, or was a moment ago.
    Moved,
    /// Keys of this slot are elsewhere, and no cluster is configured.
    Elsewhere,
    /// Anything else: a key of another type, a command that does not exist.
    Wrong,
}

impl Refusal {
    fn hint(self) -> &'static str {
        match self {
            Self::Full => " (raise maxmemory, or wait for flushing)",
            Self::ReadOnly => " (is it a replica, or is its disk full?)",
            Self::Busy | Self::Moved => "",
            Self::Denied => " (users and passwords are not supported yet)",
            Self::Elsewhere => " (it is a cluster: set redis.cluster = true)",
            Self::Wrong => " (is this server shared with something else?)",
        }
    }
}

impl CommandError {
    /// Whether time may mend it, so that the command is to be sent again.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        match self {
            Self::Lost { .. } => true,
            Self::Refused { kind, .. } => {
                matches!(
                    kind,
                    Refusal::Full | Refusal::ReadOnly | Refusal::Busy | Refusal::Moved
                )
            }
        }
    }

    /// Whether the server refused it for that.
    #[must_use]
    pub fn is_refused_as(&self, wanted: Refusal) -> bool {
        matches!(self, Self::Refused { kind, .. } if *kind == wanted)
    }

    /// Whether the connection went, so that nobody knows what was carried out.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }
}

/// What lets a node take a slot that is on its way to it.
static ASKING: LazyLock<Command> = LazyLock::new(Command::asking);
/// What makes a node know all scripts.
static LOADS: LazyLock<[Command; 3]> = LazyLock::new(|| crate::scripts::all().map(Command::load));

/// The client of one store.
#[derive(Debug)]
pub struct Client {
    nodes: Vec<Node>,
    /// How many of the nodes were configured: they are kept whatever the cluster says.
    seeds: usize,
    /// The node of each slot.
    owners: Box<[u16]>,
    /// Where slots are on their way to: that node has some of their keys, and is not in the map.
    importing: BTreeMap<u16, usize>,
    is_cluster: bool,
    /// Something said that the map is not true any more.
    is_stale: bool,
    /// Who said so, and knows better.
    ask_first: Option<usize>,
    mapped: Option<MonoNanos>,
    timeout: Duration,
    ttl: Duration,
    buckets: Buckets,
}

/// The connections that a bucket's commands go to. Another seat may lack what this one acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seat {
    node: u16,
    losses: u64,
}

/// An address that cannot be one.
#[derive(Debug, thiserror::Error)]
#[error("read redis.nodes `{0}`: it is no host:port (write 127.0.0.1:6379)")]
pub struct AddressError(String);

/// What a run has of one command. There is none where no node has the slot.
struct Answer {
    /// Where it came from.
    node: usize,
    raw: Result<Value, RedisError>,
}

/// Where a command is to go once more.
struct Target {
    node: usize,
    /// The slot is on its way there.
    asks: bool,
    /// The node may not know the script.
    loads: bool,
}

/// One command on its way to one node; the reply to what has no place is of no interest.
struct Errand<'c> {
    place: Option<usize>,
    command: &'c Command,
}

impl Client {
    /// Takes the configured addresses; connects when there is something to send.
    ///
    /// # Errors
    /// [`AddressError`].
    pub fn new(redis: &config::Redis) -> Result<Self, AddressError> {
        let nodes: Vec<Node> = redis
            .nodes
            .iter()
            .take(NODES_MAX)
            .map(|address| Node::new(address, redis.timeout))
            .collect::<Result<_, _>>()?;
        // A single node has all slots, and says nothing of them.
        let owner = if redis.cluster { NOBODY } else { 0 };
        Ok(Self {
            seeds: nodes.len(),
            nodes,
            owners: vec![owner; usize::from(command::SLOTS)].into(),
            importing: BTreeMap::new(),
            is_cluster: redis.cluster,
            is_stale: redis.cluster,
            ask_first: None,
            mapped: None,
            timeout: redis.timeout,
            ttl: redis.redis_ttl,
            buckets: Buckets::from(redis),
        })
    }

    /// How the store is cut into buckets.
    #[must_use]
    pub fn buckets(&self) -> Buckets {
        self.buckets
    }

    /// Where a bucket's commands go now. While it is the same before and after some of them, the same node heard them all, and
    /// its connection lived.
    #[must_use]
    pub fn seat(&self, bucket: Bucket) -> Seat {
        let slot = command::slot_of(bucket);
        let node = self.owners[usize::from(slot)];
        let both = [Some(&usize::from(node)), self.importing.get(&slot)];
        let nodes = both
            .into_iter()
            .flatten()
            .filter_map(|&node| self.nodes.get(node));
        Seat {
            node,
            losses: nodes.map(|node| node.losses).sum(),
        }
    }

    /// Sends commands and reads a reply to each; the nodes work side by side.
    ///
    /// Shape: one reply for each command, in the order given; after a lost connection all of its node are lost that were not answered.
    /// Units: one time-out for each connection, write and reply; ten in all, and one more wait.
    pub fn run(&mut self, commands: &[Command]) -> Vec<Reply> {
        let until = Clock::mono_now().after(self.timeout.saturating_mul(RUN_TIMEOUTS));
        self.map_slots(until);
        let mut answers: Vec<Option<Answer>> = Vec::new();
        answers.resize_with(commands.len(), || None);
        let mut errands = self.no_errands();
        for (place, command) in commands.iter().enumerate() {
            self.route(place, command, &mut errands);
        }
        self.send(errands, until, &mut answers);
        self.follow(commands, until, &mut answers);
        let replies = answers.into_iter().zip(commands);
        replies
            .map(|(answer, command)| self.judge(answer, command))
            .collect()
    }

    /// Puts a command on its way to the node of its slot, if there is one.
    fn route<'c>(&self, place: usize, command: &'c Command, errands: &mut [Vec<Errand<'c>>]) {
        let owner = usize::from(self.owners[usize::from(command.slot)]);
        if let Some(errands) = errands.get_mut(owner) {
            errands.push(Errand {
                place: Some(place),
                command,
            });
        }
    }

    /// Sends again what was redirected or met an unknown script, and behind it what has to stand there.
    fn follow(&mut self, commands: &[Command], until: MonoNanos, answers: &mut [Option<Answer>]) {
        let mut redirected: Vec<usize> = Vec::new();
        for _ in 0..REDIRECTS_MAX {
            let mut targets = Vec::new();
            for (place, command) in commands.iter().enumerate() {
                if let Some(target) = self.target(answers[place].as_ref(), command) {
                    targets.push((place, command, target));
                }
            }
            if targets.is_empty() {
                break;
            }
            redirected.extend(targets.iter().map(|&(place, ..)| place));
            self.send(self.again(targets), until, answers);
        }
        if redirected.is_empty() {
            return;
        }
        redirected.sort_unstable();
        redirected.dedup();
        let mut errands = self.no_errands();
        for (place, command) in commands.iter().enumerate() {
            let answered = answers[place].as_ref().is_some_and(|answer| {
                matches!(&answer.raw, Ok(value) if !matches!(value, Value::ServerError(_)))
            });
            let mut before = redirected.iter().take_while(|&&before| before < place);
            if answered
                && redirected.binary_search(&place).is_err()
                && before.any(|&before| command.follows(&commands[before]))
            {
                self.route(place, command, &mut errands);
            }
        }
        self.send(errands, until, answers);
    }

    /// Where a command is to go once more, by its answer. Notes what the answer says of the map.
    fn target(&mut self, answer: Option<&Answer>, command: &Command) -> Option<Target> {
        let answer = answer?;
        let Ok(Value::ServerError(error)) = &answer.raw else {
            return None;
        };
        if error.kind() == Some(ServerErrorKind::NoScript) {
            return command.script.map(|_| Target {
                node: answer.node,
                asks: false,
                loads: true,
            });
        }
        if !self.is_cluster {
            return None;
        }
        let host = self.nodes[answer.node].host.clone();
        match slots::redirect(error, &host)? {
            Redirect::Moved(address) => {
                let node = self.node_at(&address)?;
                self.owners[usize::from(command.slot)] = u16::try_from(node).unwrap_or(NOBODY);
                self.importing.remove(&command.slot);
                (self.is_stale, self.ask_first) = (true, Some(node));
                (!command.stays).then_some(Target {
                    node,
                    asks: false,
                    loads: false,
                })
            }
            // The other node would name an unknown script before it looked at the slot.
            Redirect::Ask(address) => {
                let node = self.node_at(&address)?;
                self.importing.insert(command.slot, node);
                Some(Target {
                    node,
                    asks: true,
                    loads: command.script.is_some(),
                })
            }
        }
    }

    /// The errands of commands that go to their targets.
    fn again<'c>(&self, targets: Vec<(usize, &'c Command, Target)>) -> Vec<Vec<Errand<'c>>> {
        let mut errands = self.no_errands();
        let mut loaded: Vec<usize> = Vec::new();
        for (place, command, Target { node, asks, loads }) in targets {
            let list = &mut errands[node];
            let mut before = |command| {
                list.push(Errand {
                    place: None,
                    command,
                });
            };
            if loads && !loaded.contains(&node) {
                loaded.push(node);
                LOADS.iter().for_each(&mut before);
            }
            if asks {
                before(&ASKING);
            }
            list.push(Errand {
                place: Some(place),
                command,
            });
        }
        errands
    }

    fn no_errands<'c>(&self) -> Vec<Vec<Errand<'c>>> {
        self.nodes.iter().map(|_| Vec::new()).collect()
    }

    /// Sends every node its errands, side by side, and takes the answers.
    fn send(
        &mut self,
        errands: Vec<Vec<Errand<'_>>>,
        until: MonoNanos,
        answers: &mut [Option<Answer>],
    ) {
        let work = self.nodes.iter_mut().zip(errands).enumerate();
        let mut work: Vec<_> = work
            .filter(|(_, (_, errands))| !errands.is_empty())
            .collect();
        let here = work.pop();
        let run = |node: &mut Node, errands: &[Errand<'_>]| {
            node.send(errands.iter().map(|errand| errand.command), until)
        };
        let mut take = |index, errands: Vec<Errand<'_>>, raws: Vec<_>| {
            for (errand, raw) in errands.into_iter().zip(raws) {
                if let Some(place) = errand.place {
                    answers[place] = Some(Answer { node: index, raw });
                }
            }
        };
        // A thread costs some 20 µs, once for each other node and run; a single node needs none.
        thread::scope(|scope| {
            let threads: Vec<_> = work
                .into_iter()
                .map(|(index, (node, errands))| {
                    thread::Builder::new().spawn_scoped(scope, move || {
                        let raws = run(node, &errands);
                        (index, errands, raws)
                    })
                })
                .collect();
            if let Some((index, (node, errands))) = here {
                let raws = run(node, &errands);
                take(index, errands, raws);
            }
            // Where no thread could be made nothing was sent: these commands have no answer.
            for thread in threads.into_iter().flatten() {
                match thread.join() {
                    Ok((index, errands, raws)) => take(index, errands, raws),
                    Err(panic) => resume_unwind(panic),
                }
            }
        });
    }

    fn judge(&mut self, answer: Option<Answer>, command: &Command) -> Reply {
        let Some(Answer { node, raw }) = answer else {
            self.is_stale = self.is_cluster;
            return Err(CommandError::Refused {
                address: self.address(),
                command: command.name(),
                kind: Refusal::Busy,
                message: format!("no node answers for slot={}", command.slot),
            });
        };
        let reply = judge(&self.nodes[node].address, raw, command, self.is_cluster);
        if let Err(error) = &reply {
            self.is_stale |= self.is_cluster && error.is_outage();
        }
        reply
    }

    /// Reads anew which node has which slot, when something said that it changed.
    fn map_slots(&mut self, until: MonoNanos) {
        let now = Clock::mono_now();
        let recently = |mapped| now.since(mapped) < MAP_EVERY;
        if !self.is_stale || self.mapped.is_some_and(recently) {
            return;
        }
        self.mapped = Some(now);
        let until = until.min(now.after(self.timeout.saturating_mul(MAP_TIMEOUTS)));
        // Who knows best, then those that answered last, then the configured ones.
        let mut order: Vec<usize> = self.ask_first.take().into_iter().collect();
        order.extend((0..self.nodes.len()).filter(|&node| self.nodes[node].is_open()));
        order.extend(0..self.nodes.len());
        let mut asked: Vec<usize> = Vec::new();
        for node in order {
            if asked.contains(&node) {
                continue;
            }
            asked.push(node);
            let question = Command::cluster_slots();
            let answer = self.nodes[node]
                .send(std::iter::once(&question), until)
                .pop();
            let host = self.nodes[node].host.clone();
            let ranges = answer
                .and_then(Result::ok)
                .and_then(|value| slots::ranges(&value, &host));
            if let Some(ranges) = ranges {
                self.take_map(ranges);
                return;
            }
        }
    }

    fn take_map(&mut self, ranges: Vec<Range>) {
        self.is_stale = false;
        let mut owners = vec![NOBODY; self.owners.len()];
        for range in ranges {
            let node = self.node_at(&range.address);
            let node = node.and_then(|node| u16::try_from(node).ok());
            owners[usize::from(range.first)..=usize::from(range.last)].fill(node.unwrap_or(NOBODY));
        }
        self.owners = owners.into();
        let masters = self.masters();
        for (index, node) in self.nodes.iter_mut().enumerate() {
            if node.is_open() && !masters.contains(&index) {
                node.close();
            }
        }
    }

    /// The nodes that have slots.
    fn masters(&self) -> Vec<usize> {
        let mut masters: Vec<usize> = self
            .owners
            .iter()
            .map(|&owner| usize::from(owner))
            .collect();
        masters.dedup();
        masters.sort_unstable();
        masters.dedup();
        masters.retain(|&master| master < self.nodes.len());
        masters
    }

    /// The node of an address, which may be a new one; `None` when there are too many, or it is no address.
    fn node_at(&mut self, address: &str) -> Option<usize> {
        let known = self.nodes.iter().position(|node| node.address == address);
        if known.is_some() {
            return known;
        }
        let mut node = Node::new(address, self.timeout).ok()?;
        if self.nodes.len() < NODES_MAX {
            self.nodes.push(node);
            return Some(self.nodes.len() - 1);
        }
        let masters = self.masters();
        let unused = (self.seeds..self.nodes.len()).find(|node| !masters.contains(node))?;
        // Another seat than that of the node before it.
        node.losses = self.nodes[unused].losses + 1;
        self.nodes[unused] = node;
        Some(unused)
    }

    /// Some node's address, for errors of the store as a whole.
    fn address(&self) -> String {
        self.nodes
            .first()
            .map_or_else(String::new, |node| node.address.clone())
    }
}

/// What a raw reply means.
fn judge(
    address: &str,
    raw: Result<Value, RedisError>,
    command: &Command,
    is_cluster: bool,
) -> Reply {
    let address = address.to_owned();
    let error = match raw {
        Ok(Value::ServerError(error)) => error,
        Ok(value) => return Ok(value),
        Err(source) => return Err(CommandError::Lost { address, source }),
    };
    let details = error.details().unwrap_or("");
    let kind = match refusal(error.kind(), error.code(), details) {
        Refusal::Elsewhere if is_cluster && error.kind() != Some(ServerErrorKind::CrossSlot) => {
            Refusal::Moved
        }
        kind => kind,
    };
    Err(CommandError::Refused {
        address,
        command: command.name(),
        kind,
        message: format!("{} {details}", error.code()),
    })
}

/// A script's own refusal carries the server's word inside its message, before 7.0.
fn refusal(kind: Option<ServerErrorKind>, code: &str, details: &str) -> Refusal {
    match (kind, code) {
        (Some(ServerErrorKind::ReadOnly), _) | (_, "MISCONF" | "NOREPLICAS") => Refusal::ReadOnly,
        (
            Some(
                ServerErrorKind::BusyLoading
                | ServerErrorKind::TryAgain
                | ServerErrorKind::ClusterDown
                | ServerErrorKind::MasterDown
                | ServerErrorKind::NoScript,
            ),
            _,
        )
        | (_, "BUSY" | "UNKILLABLE") => Refusal::Busy,
        (Some(ServerErrorKind::NoPerm), _) | (_, "NOAUTH" | "WRONGPASS" | "DENIED") => {
            Refusal::Denied
        }
        (Some(ServerErrorKind::Moved | ServerErrorKind::Ask | ServerErrorKind::CrossSlot), _) => {
            Refusal::Elsewhere
        }
        (_, "OOM") => Refusal::Full,
        _ if details.contains("-OOM ")
            || details.contains("command not allowed when used memory") =>
        {
            Refusal::Full
        }
        _ if details.contains("-READONLY ") || details.contains("-MISCONF ") => Refusal::ReadOnly,
        _ => Refusal::Wrong,
    }
}
