//! A connection of the bench's own models to Redis: pipelined, every reply read.
//!
//! In:     commands.
//! Out:    their replies, in order.
//! Keeps:  slices as the product's client cuts and sends them, so that no way has a better client than another.
//! Knows:  redis. No key.
//! Source: crates/store/src/client/node.rs.

use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};
use redis::{Cmd, Connection, Value};
use stand::redis::Redis;

/// As in the product's client.
const SLICE_COMMANDS: usize = 500;
const SLICE_BYTES: usize = 4 << 20;

pub(crate) struct Link {
    connection: Connection,
    /// The memory of encoded slices.
    slice: Vec<u8>,
}

impl Link {
    pub(crate) fn new(redis: &Redis) -> Self {
        let connection = redis.connection().unwrap();
        connection
            .set_read_timeout(Some(std::time::Duration::from_secs(60)))
            .unwrap();
        Self {
            connection,
            slice: Vec::new(),
        }
    }

    /// The replies to a slice are read behind the next one.
    pub(crate) fn run(&mut self, commands: &[Cmd]) -> Vec<Value> {
        let mut replies = Vec::with_capacity(commands.len());
        let (mut left, mut unread) = (commands, 0);
        while replies.len() < commands.len() {
            self.slice.clear();
            let mut count = 0;
            for command in left.iter().take(SLICE_COMMANDS) {
                command.write_packed_command(&mut self.slice);
                count += 1;
                if self.slice.len() >= SLICE_BYTES {
                    break;
                }
            }
            left = &left[count..];
            if count > 0 {
                self.connection.send_packed_command(&self.slice).unwrap();
            }
            for _ in 0..unread {
                match self.connection.recv_response().unwrap() {
                    Value::ServerError(error) => panic!("redis refused: {error:?}"),
                    reply => replies.push(reply),
                }
            }
            unread = count;
        }
        replies
    }
}

/// A link on a thread of its own, as the product's stage that writes: a batch is sent while the next one is made.
pub(crate) struct Behind {
    work: Sender<(Link, Vec<Cmd>)>,
    done: Receiver<Link>,
    here: Option<Link>,
}

impl Behind {
    pub(crate) fn new(link: Link) -> Self {
        let (work, taken) = bounded::<(Link, Vec<Cmd>)>(1);
        let (say, done) = bounded(1);
        thread::spawn(move || {
            for (mut link, commands) in taken {
                link.run(&commands);
                say.send(link).unwrap();
            }
        });
        Self {
            work,
            done,
            here: Some(link),
        }
    }

    /// The link, when all that was handed over is done.
    pub(crate) fn link(&mut self) -> &mut Link {
        self.here.get_or_insert_with(|| self.done.recv().unwrap())
    }

    /// Hands commands over; what was handed over before is done by then.
    pub(crate) fn hand(&mut self, commands: Vec<Cmd>) {
        self.link();
        self.work
            .send((self.here.take().unwrap(), commands))
            .unwrap();
    }
}

/// A command of a name and arguments, with room for them.
pub(crate) fn command<'a>(
    name: &str,
    arguments: impl IntoIterator<Item = &'a [u8], IntoIter: Clone>,
) -> Cmd {
    let arguments = arguments.into_iter();
    let lengths = arguments.clone().map(<[u8]>::len);
    let (count, bytes) = lengths.fold((1, name.len()), |(count, bytes), length| {
        (count + 1, bytes + length)
    });
    let mut command = Cmd::with_capacity(count, bytes);
    command.arg(name);
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
