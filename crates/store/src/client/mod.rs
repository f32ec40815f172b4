//! The client: plain connections behind a slot map, and a reply to every command.
//!
//! In:     commands, each for one hash slot.
//! Out:    a reply to each, in order: a value, a refusal, or that the connection was lost.
//! Keeps:  a connection that had any I/O error is dropped, so no reply is ever taken for another's; a run never mixes two
//!         connections to one node; every call ends within ten time-outs.
//! Knows:  the crate `redis`, as far as one connection. No meaning of any key.
//! Source: docs/store.md 2, 4; docs/spec.md 9.1.

use std::time::Duration;

use redis::{
    Connection, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo,
    RedisError, ServerErrorKind, io::tcp::TcpSettings,
};
use shared::{
    config,
    time::{Clock, MonoNanos},
};

pub use self::{
    check::{CheckError, Meta, Server},
    command::Command,
};
pub use redis::Value;

mod check;
mod command;
pub mod reply;

/// What is sent before replies are read: a pause of the server is noticed early, and its buffers stay small.
const SLICE_COMMANDS: usize = 1_000;
const SLICE_BYTES: usize = 8 << 20;
/// How many time-outs a run may take that gets a reply now and then.
const RUN_TIMEOUTS: u32 = 10;

/// The reply to one command.
pub type Reply = Result<Value, CommandError>;

/// Why a command has no good reply.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommandError {
    /// The connection could not be made, or went, or was too slow: whether the command was carried out is not known.
    #[error("lost redis at {address} (is it running, and reachable from here?)")]
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
    /// Keys of this slot are elsewhere: it is a cluster.
    Elsewhere,
    /// Anything else: a key of another type, a command that does not exist.
    Wrong,
}

impl Refusal {
    fn hint(self) -> &'static str {
        match self {
            Self::Full => " (raise maxmemory, or wait for flushing)",
            Self::ReadOnly => " (is it a replica, or is its disk full?)",
            Self::Busy => "",
            Self::Denied => " (check the user's rights)",
            Self::Elsewhere => " (a cluster is not supported yet)",
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
                matches!(kind, Refusal::Full | Refusal::ReadOnly | Refusal::Busy)
            }
        }
    }

    /// Whether the connection went, so that nobody knows what was carried out.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }
}

/// The client of one store.
#[derive(Debug)]
pub struct Client {
    nodes: Vec<Node>,
    /// The last slot of each range, ascending, and the node that has the range.
    slots: Vec<(u16, usize)>,
}

/// An address that cannot be one.
#[derive(Debug, thiserror::Error)]
#[error("read redis.nodes `{0}`: it is no host:port (write 127.0.0.1:6379)")]
pub struct AddressError(String);

impl Client {
    /// Takes the configured address; connects when there is something to send.
    ///
    /// # Errors
    /// [`AddressError`].
    pub fn new(redis: &config::Redis) -> Result<Self, AddressError> {
        let nodes: Vec<Node> = redis
            .nodes
            .iter()
            .map(|address| Node::new(address, redis.timeout))
            .collect::<Result<_, _>>()?;
        // One range until the store may be a cluster: the first node has all slots.
        Ok(Self {
            nodes,
            slots: vec![(command::SLOTS - 1, 0)],
        })
    }

    /// Sends commands and reads a reply to each.
    ///
    /// Shape: one reply for each command, in the order given; after a lost connection all that follow to its node are lost.
    /// Units: one time-out for each connection, write and reply; ten in all.
    pub fn run(&mut self, commands: &[Command]) -> Vec<Reply> {
        let mut replies: Vec<Option<Reply>> = Vec::new();
        replies.resize_with(commands.len(), || None);
        for (index, node) in self.nodes.iter_mut().enumerate() {
            let of_node = |command: &Command| {
                self.slots
                    .iter()
                    .find(|(last, _)| command.slot <= *last)
                    .map(|&(_, node)| node)
                    == Some(index)
            };
            let places: Vec<usize> = (0..commands.len())
                .filter(|&place| of_node(&commands[place]))
                .collect();
            let asked: Vec<&Command> = places.iter().map(|&place| &commands[place]).collect();
            for (place, reply) in places.into_iter().zip(node.run(&asked)) {
                replies[place] = Some(reply);
            }
        }
        // Every slot is in a range of the map, so every command had a node.
        replies.into_iter().flatten().collect()
    }
}

struct Node {
    address: String,
    info: ConnectionInfo,
    timeout: Duration,
    connection: Option<Connection>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let open = self.connection.is_some();
        f.debug_struct("Node")
            .field("address", &self.address)
            .field("timeout", &self.timeout)
            .field("open", &open)
            .finish_non_exhaustive()
    }
}

impl Node {
    fn new(address: &str, timeout: Duration) -> Result<Self, AddressError> {
        let wrong = || AddressError(address.to_owned());
        let (host, port) = address
            .strip_prefix("redis://")
            .unwrap_or(address)
            .rsplit_once(':')
            .ok_or_else(wrong)?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let port = port.parse().map_err(|_| wrong())?;
        let info = ConnectionAddr::Tcp(host.to_owned(), port)
            .into_connection_info()
            .map_err(|_| wrong())?;
        let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        // Nothing is sent while connecting: the first reply is that to our first command.
        let info = info.set_redis_settings(RedisConnectionInfo::default().set_skip_set_lib_name());
        Ok(Self {
            address: address.to_owned(),
            info,
            timeout,
            connection: None,
        })
    }

    /// As [`Client::run`], for one node. Scripts that the server does not know are loaded, and their calls sent again.
    fn run(&mut self, commands: &[&Command]) -> Vec<Reply> {
        let until = Clock::mono_now().after(self.timeout.saturating_mul(RUN_TIMEOUTS));
        let mut replies = self.send_all(commands, until);
        let unknown: Vec<usize> = (0..replies.len())
            .filter(|&place| is_no_script(&replies[place]) && commands[place].script.is_some())
            .collect();
        if !unknown.is_empty() {
            let loads: Vec<Command> = crate::scripts::all()
                .map(|script| Command {
                    slot: 0,
                    cmd: script.load(),
                    script: None,
                })
                .into();
            let loads: Vec<&Command> = loads.iter().collect();
            // A server that refuses to load says it does not know the script once more, and that is what its caller sees.
            drop(self.send_all(&loads, until));
            let again: Vec<&Command> = unknown.iter().map(|&place| commands[place]).collect();
            for (place, reply) in unknown.into_iter().zip(self.send_all(&again, until)) {
                replies[place] = reply;
            }
        }
        replies
            .into_iter()
            .zip(commands)
            .map(|(reply, command)| self.judge(reply, command))
            .collect()
    }

    /// Sends commands in slices; once the connection is lost, everything behind it is lost as well.
    fn send_all(
        &mut self,
        commands: &[&Command],
        until: MonoNanos,
    ) -> Vec<Result<Value, RedisError>> {
        let mut replies = Vec::with_capacity(commands.len());
        while replies.len() < commands.len() {
            let (slice, count) = encode(&commands[replies.len()..]);
            if let Err(error) = self.send_slice(&slice, count, until, &mut replies) {
                self.connection = None;
                replies.resize_with(commands.len(), || Err(error.clone()));
            }
        }
        replies
    }

    fn send_slice(
        &mut self,
        slice: &[u8],
        count: usize,
        until: MonoNanos,
        replies: &mut Vec<Result<Value, RedisError>>,
    ) -> Result<(), RedisError> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            empty => empty.insert(connect(&self.info, self.timeout)?),
        };
        connection.send_packed_command(slice)?;
        for _ in 0..count {
            if Clock::mono_now() >= until {
                return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
            }
            replies.push(Ok(connection.recv_response()?));
        }
        Ok(())
    }

    fn judge(&self, reply: Result<Value, RedisError>, command: &Command) -> Reply {
        let error = match reply {
            Ok(Value::ServerError(error)) => error,
            Ok(value) => return Ok(value),
            Err(source) => {
                return Err(CommandError::Lost {
                    address: self.address.clone(),
                    source,
                });
            }
        };
        let command = command
            .cmd
            .args_iter()
            .next()
            .map_or_else(String::new, |name| match name {
                redis::Arg::Simple(name) => String::from_utf8_lossy(name).into_owned(),
                _ => String::new(),
            });
        let kind = refusal(error.kind(), error.code(), error.details().unwrap_or(""));
        let message = format!("{} {}", error.code(), error.details().unwrap_or(""));
        Err(CommandError::Refused {
            address: self.address.clone(),
            command,
            kind,
            message,
        })
    }
}

/// A connection whose every wait has an end.
fn connect(info: &ConnectionInfo, timeout: Duration) -> Result<Connection, RedisError> {
    let connection = redis::Client::open(info.clone())?.get_connection_with_timeout(timeout)?;
    connection.set_read_timeout(Some(timeout))?;
    connection.set_write_timeout(Some(timeout))?;
    Ok(connection)
}

/// As many commands as go into one slice, encoded, and how many these are.
fn encode(commands: &[&Command]) -> (Vec<u8>, usize) {
    let (mut slice, mut count) = (Vec::new(), 0);
    for command in commands.iter().take(SLICE_COMMANDS) {
        command.cmd.write_packed_command(&mut slice);
        count += 1;
        if slice.len() >= SLICE_BYTES {
            break;
        }
    }
    (slice, count)
}

fn is_no_script(reply: &Result<Value, RedisError>) -> bool {
    matches!(reply, Ok(Value::ServerError(error)) if error.kind() == Some(ServerErrorKind::NoScript))
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
