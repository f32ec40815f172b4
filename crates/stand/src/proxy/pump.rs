//! Forwards bytes, one thread for each direction of a connection.
//!
//! In:     a stream.
//! Out:    the same stream, when it may pass.
//! Keeps:  bytes in order; a command is forwarded whole, and one over 64 MiB ends the reading of its connection.
//! Knows:  where commands and replies end.
//! Source: docs/house.md 13.

use std::{
    io::{self, Read, Write},
    sync::atomic::Ordering,
};

use log::{debug, warn};

use super::control::{Kind, Link, Shared};
use crate::resp::{Command, Replies, command};

/// How much is read at once.
const PIECE_BYTES: usize = 16 << 10;
/// The most that is kept of one command or reply.
const KEPT_BYTES: usize = 64 << 20;

/// Client to server, until the connection ends.
pub(super) fn commands(shared: &Shared, link: &Link) {
    end(Commands {
        shared,
        link,
        kept: Vec::new(),
        number: 0,
        state: State::Unknown,
    }
    .run());
}

/// Server to client, until the connection ends.
pub(super) fn replies(shared: &Shared, link: &Link) {
    end(ReplyPump {
        shared,
        link,
        reader: Replies::new(),
        number: 0,
        out: Vec::new(),
    }
    .run());
}

fn end(result: io::Result<()>) {
    if let Err(error) = result {
        debug!("a proxied connection ended: {error}");
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing has come yet.
    Unknown,
    /// Commands are read.
    Redis,
    /// Bytes pass unread.
    Opaque,
}

struct Commands<'p> {
    shared: &'p Shared,
    link: &'p Link,
    /// Bytes that are not forwarded yet.
    kept: Vec<u8>,
    /// Commands forwarded so far.
    number: u64,
    state: State,
}

impl Commands<'_> {
    fn run(&mut self) -> io::Result<()> {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let length = (&self.link.client).read(&mut piece)?;
            if length == 0 {
                return Ok(());
            }
            self.shared.pass(self.link)?;
            if self.state == State::Unknown {
                let is_redis = piece.first() == Some(&b'*');
                self.state = if is_redis {
                    State::Redis
                } else {
                    State::Opaque
                };
                self.link.is_redis.store(is_redis, Ordering::SeqCst);
            }
            self.kept.extend_from_slice(&piece[..length]);
            let whole = if self.state == State::Redis {
                self.whole_commands()?
            } else {
                self.kept.len()
            };
            self.send(whole)?;
        }
    }

    /// The length of the whole commands that stand; one that is to be held is awaited here, those before it being sent.
    fn whole_commands(&mut self) -> io::Result<usize> {
        let mut at = 0;
        loop {
            let (claimed, makes_a_replica, length) = match command(&self.kept[at..]) {
                Command::Whole(arguments, length) => {
                    let name = arguments.first().copied().unwrap_or_default();
                    let makes_a_replica =
                        name.eq_ignore_ascii_case(b"PSYNC") || name.eq_ignore_ascii_case(b"SYNC");
                    (self.shared.claim(&arguments), makes_a_replica, length)
                }
                Command::Part if self.kept.len() - at <= KEPT_BYTES => return Ok(at),
                Command::Part | Command::Foreign => {
                    warn!("a proxied client sends what is no command of redis: read no further");
                    self.state = State::Opaque;
                    return Ok(self.kept.len());
                }
            };
            for (hold, kind) in claimed {
                match kind {
                    Kind::Command => {
                        self.send(at)?;
                        at = 0;
                        self.shared.stand(hold, self.link)?;
                    }
                    Kind::Reply => self.link.hold_reply(self.number, hold),
                }
            }
            self.number += 1;
            at += length;
            if makes_a_replica {
                // What comes back is a copy of the data, and behind it commands: no replies.
                self.state = State::Opaque;
                self.link.is_redis.store(false, Ordering::SeqCst);
                return Ok(self.kept.len());
            }
        }
    }

    fn send(&mut self, length: usize) -> io::Result<()> {
        (&self.link.server).write_all(&self.kept[..length])?;
        self.kept.drain(..length);
        Ok(())
    }
}

struct ReplyPump<'p> {
    shared: &'p Shared,
    link: &'p Link,
    reader: Replies,
    /// Whole replies so far.
    number: u64,
    /// Bytes that are not forwarded yet.
    out: Vec<u8>,
}

impl ReplyPump<'_> {
    fn run(&mut self) -> io::Result<()> {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let length = (&self.link.server).read(&mut piece)?;
            if length == 0 {
                return Ok(());
            }
            self.shared.pass(self.link)?;
            // The server speaks second: whose protocol it is, is known.
            if self.link.is_redis.load(Ordering::SeqCst) {
                self.take(&piece[..length])?;
            } else {
                self.out.extend_from_slice(&piece[..length]);
                self.send()?;
            }
        }
    }

    /// Forwards replies, but for one that is held: that is kept until it is whole and released.
    fn take(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let mut hold = self.link.hold_of_reply(self.number);
        while !bytes.is_empty() {
            if hold.is_some() && self.reader.is_between() {
                self.send()?;
            }
            let (taken, is_whole) = self.reader.advance(bytes);
            self.out.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if is_whole {
                if let Some(hold) = hold {
                    self.shared.stand(hold, self.link)?;
                }
                self.number += 1;
                hold = self.link.hold_of_reply(self.number);
            }
        }
        if hold.is_none() || self.reader.is_between() || self.out.len() > KEPT_BYTES {
            self.send()?;
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        (&self.link.client).write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }
}
