//! A connection of the bench's own models to Redis: pipelined, every reply read.
//!
//! In:     commands.
//! Out:    their replies, in order.
//! Keeps:  slices as the product's client cuts them, so that no way has a better client than another.
//! Knows:  redis. No key.
//! Source: crates/store/src/client/mod.rs.

use redis::{Cmd, Connection, Value};
use stand::redis::Redis;

/// As in the product's client.
const SLICE_COMMANDS: usize = 1_000;
const SLICE_BYTES: usize = 8 << 20;

pub(crate) struct Link(Connection);

impl Link {
    pub(crate) fn new(redis: &Redis) -> Self {
        let connection = redis.connection().unwrap();
        connection
            .set_read_timeout(Some(std::time::Duration::from_secs(60)))
            .unwrap();
        Self(connection)
    }

    pub(crate) fn run(&mut self, commands: &[Cmd]) -> Vec<Value> {
        let mut replies = Vec::with_capacity(commands.len());
        while replies.len() < commands.len() {
            let (mut slice, mut count) = (Vec::new(), 0);
            for command in commands[replies.len()..].iter().take(SLICE_COMMANDS) {
                command.write_packed_command(&mut slice);
                count += 1;
                if slice.len() >= SLICE_BYTES {
                    break;
                }
            }
            self.0.send_packed_command(&slice).unwrap();
            for _ in 0..count {
                match self.0.recv_response().unwrap() {
                    Value::ServerError(error) => panic!("redis refused: {error:?}"),
                    reply => replies.push(reply),
                }
            }
        }
        replies
    }
}

/// A command of a name and arguments.
pub(crate) fn command<'a>(name: &str, arguments: impl IntoIterator<Item = &'a [u8]>) -> Cmd {
    let mut command = redis::cmd(name);
    for argument in arguments {
        command.arg(argument);
    }
    command
}

pub(crate) fn bytes(value: &Value) -> &[u8] {
    match value {
        Value::BulkString(bytes) => bytes,
        other => panic!("no string: {other:?}"),
    }
}

pub(crate) fn list(value: &Value) -> &[Value] {
    match value {
        Value::Array(values) | Value::Set(values) => values,
        other => panic!("no list: {other:?}"),
    }
}
