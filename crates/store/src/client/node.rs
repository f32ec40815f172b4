//! One connection to one node.
//!
//! In:     commands, in the order in which they are to be sent.
//! Out:    a raw reply to each.
//! Keeps:  a connection that had any I/O error is dropped, so no reply is ever taken for another's; every wait has an end.
//! Knows:  the crate `redis`, as far as one connection. Not what a reply means.
//! Source: docs/store.md 2.

use std::time::Duration;

use redis::{
    Connection, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo,
    RedisError, Value, io::tcp::TcpSettings,
};
use shared::time::{Clock, MonoNanos};

use super::{AddressError, Command};

/// What is encoded and sent at once. The replies to a slice are read behind the next one: the server works meanwhile. A pause of it is
/// noticed early, and its buffers stay small.
const SLICE_COMMANDS: usize = 500;
const SLICE_BYTES: usize = 4 << 20;
/// About how many entries, of a mebibyte each where they are full, the replies to a slice may hold: the server keeps those of two slices until they are read.
/// With half as many a look at 125 small traces goes to and fro eight times.
const SLICE_ENTRIES: usize = 64;
/// Bytes of whole journals that are kept of what is sent at once to one node; for what is over it, nil stands.
pub const WHOLE_BYTES: usize = 8 << 20;
/// The most bytes of an encoded slice whose memory is kept for the next: to grow it anew is to copy it several times.
const KEPT_BYTES: usize = 4 << 20;

/// One node, and the connection to it.
pub(super) struct Node {
    pub(super) address: String,
    /// The host of the address.
    pub(super) host: String,
    info: ConnectionInfo,
    timeout: Duration,
    connection: Option<Connection>,
    /// The memory of encoded slices.
    slice: Vec<u8>,
    /// How many connections were let go of: what one of them heard may be gone behind the next.
    pub(super) losses: u64,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("address", &self.address)
            .field("open", &self.is_open())
            .field("losses", &self.losses)
            .finish_non_exhaustive()
    }
}

impl Node {
    pub(super) fn new(address: &str, timeout: Duration) -> Result<Self, AddressError> {
        let wrong = || AddressError(address.to_owned());
        let bare = address.strip_prefix("redis://").unwrap_or(address);
        let (host, port) = bare.rsplit_once(':').ok_or_else(wrong)?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let port = port.parse().map_err(|_| wrong())?;
        let info = ConnectionAddr::Tcp(host.to_owned(), port)
            .into_connection_info()
            .map_err(|_| wrong())?;
        let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        // Nothing is sent while connecting: the first reply is that to our first command.
        let info = info.set_redis_settings(RedisConnectionInfo::default().set_skip_set_lib_name());
        Ok(Self {
            address: bare.to_owned(),
            host: host.to_owned(),
            info,
            timeout,
            connection: None,
            slice: Vec::new(),
            losses: 0,
        })
    }

    /// Whether there is a connection.
    pub(super) fn is_open(&self) -> bool {
        self.connection.is_some()
    }

    /// Lets go of the connection.
    pub(super) fn close(&mut self) {
        self.connection = None;
        self.losses += 1;
    }

    /// Sends commands in slices; once the connection is lost, so is every reply that was not read, to a command that was carried out too.
    pub(super) fn send<'c>(
        &mut self,
        mut commands: impl ExactSizeIterator<Item = &'c Command> + Clone,
        until: MonoNanos,
    ) -> Vec<Result<Value, RedisError>> {
        let all = commands.len();
        let (mut sent, mut room) = (commands.clone(), Room(WHOLE_BYTES));
        let mut replies = Vec::with_capacity(all);
        let mut slice = std::mem::take(&mut self.slice);
        let mut unread = 0;
        while replies.len() < all {
            let count = encode(&mut commands, &mut slice);
            let unread_commands = sent.by_ref().take(unread);
            let mut take = |command, value| replies.push(Ok(room.admit(command, value)));
            if let Err(error) = self.exchange(&slice, unread_commands, until, &mut take) {
                self.close();
                replies.resize_with(all, || Err(error.clone()));
            }
            unread = count;
        }
        if slice.capacity() <= KEPT_BYTES {
            self.slice = slice;
        }
        replies
    }

    /// Sends a slice, which may be empty, and then reads the replies to the one before.
    fn exchange<'c>(
        &mut self,
        slice: &[u8],
        unread: impl Iterator<Item = &'c Command>,
        until: MonoNanos,
        take: &mut impl FnMut(&'c Command, Value),
    ) -> Result<(), RedisError> {
        let in_time = || match Clock::mono_now() < until {
            true => Ok(()),
            false => Err(std::io::Error::from(std::io::ErrorKind::TimedOut)),
        };
        in_time()?;
        let connection = match &mut self.connection {
            Some(connection) => connection,
            empty => empty.insert(connect(&self.info, self.timeout)?),
        };
        if !slice.is_empty() {
            connection.send_packed_command(slice)?;
        }
        for command in unread {
            in_time()?;
            take(command, connection.recv_response()?);
        }
        Ok(())
    }
}

/// A connection whose every wait has an end.
fn connect(info: &ConnectionInfo, timeout: Duration) -> Result<Connection, RedisError> {
    let connection = redis::Client::open(info.clone())?.get_connection_with_timeout(timeout)?;
    connection.set_read_timeout(Some(timeout))?;
    connection.set_write_timeout(Some(timeout))?;
    Ok(connection)
}

/// Encodes as many commands as go into one slice; gives how many these are.
fn encode<'c>(commands: &mut impl Iterator<Item = &'c Command>, slice: &mut Vec<u8>) -> usize {
    slice.clear();
    let (mut count, mut entries) = (0, 0);
    for command in commands.by_ref().take(SLICE_COMMANDS) {
        command.cmd.write_packed_command(slice);
        count += 1;
        entries += command.whole_entries;
        if slice.len() >= SLICE_BYTES || entries >= SLICE_ENTRIES {
            break;
        }
    }
    count
}

/// Bytes that are left for whole journals.
struct Room(usize);

impl Room {
    /// The reply, or nil where it may be left out and there is no room for it.
    fn admit(&mut self, command: &Command, reply: Value) -> Value {
        if command.whole_entries == 0 {
            return reply;
        }
        match self.0.checked_sub(size(&reply)) {
            Some(left) => {
                self.0 = left;
                reply
            }
            None => Value::Nil,
        }
    }
}

/// Bytes of the strings in a reply.
fn size(reply: &Value) -> usize {
    match reply {
        Value::BulkString(bytes) => bytes.len(),
        Value::Array(values) => values.iter().map(size).sum(),
        _ => 0,
    }
}
