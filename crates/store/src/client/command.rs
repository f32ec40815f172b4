//! Every command that Spanbuf sends, routed by the bucket that it speaks to.
//!
//! In:     buckets, members, fields, scores.
//! Out:    a `Command`, encoded, that may be sent more than once.
//! Keeps:  each touches keys of one hash slot only.
//! Knows:  keys. No connection.
//! Source: docs/store.md 1, 2, 3.

use std::{borrow::Borrow, time::Duration};

use redis::Cmd;
use shared::{
    shard::SliceId,
    time::{UnixMillis, millis},
};

use crate::{
    keys::{Bucket, Member, hash_tag, journal_key, meta_key, position_key, queue_key, sum_key},
    scripts::{Source, long_ttl},
};

/// The hash slots of Redis Cluster.
pub(crate) const SLOTS: u16 = 16_384;

/// One command of ours.
#[derive(Clone, Debug)]
pub struct Command {
    pub(crate) slot: u16,
    pub(crate) cmd: Cmd,
    /// The script that a server may not know.
    pub(crate) script: Option<&'static Source>,
    /// It has to stand behind what its bucket got before it: after a redirection there it is sent again.
    pub(crate) is_orderly: bool,
    /// It speaks of what this node got: it does not follow its slot to another one.
    pub(crate) stays: bool,
    /// The most entries, chunks and all, in a reply that is left out when there is no room for it; 0 for all other commands.
    pub(crate) whole_entries: usize,
}

impl Command {
    fn new(bucket: Bucket, cmd: Cmd) -> Self {
        Self::at(slot_of(bucket), cmd)
    }

    fn at(slot: u16, cmd: Cmd) -> Self {
        Self {
            slot,
            cmd,
            script: None,
            is_orderly: false,
            stays: false,
            whole_entries: 0,
        }
    }

    pub(crate) fn script(bucket: Bucket, script: &'static Source, cmd: Cmd) -> Self {
        Self {
            script: Some(script),
            ..Self::new(bucket, cmd)
        }
    }

    fn orderly(self) -> Self {
        Self {
            is_orderly: true,
            ..self
        }
    }

    pub(crate) fn staying(self) -> Self {
        Self {
            stays: true,
            ..self
        }
    }

    /// Its name, for errors.
    pub(crate) fn name(&self) -> String {
        match self.cmd.args_iter().next() {
            Some(redis::Arg::Simple(name)) => String::from_utf8_lossy(name).into_owned(),
            _ => String::new(),
        }
    }

    /// Whether this has to be sent again once `before`, which failed, was: it had to stand behind it.
    #[must_use]
    pub fn follows(&self, before: &Self) -> bool {
        self.is_orderly && self.slot == before.slot
    }

    /// Reads the offset below which a bucket holds everything.
    #[must_use]
    pub fn position(bucket: Bucket) -> Self {
        Self::new(
            bucket,
            named("HGET", position_key(bucket)).arg("next").take(),
        )
    }

    /// Reads all of a bucket's position.
    #[must_use]
    pub fn whole_position(bucket: Bucket) -> Self {
        Self::new(bucket, named("HGETALL", position_key(bucket)))
    }

    /// Reads all of a bucket's sum.
    #[must_use]
    pub fn sum(bucket: Bucket) -> Self {
        Self::new(bucket, named("HGETALL", sum_key(bucket))).orderly()
    }

    /// Sets one counter of a bucket's sum, such as one that a single process counts.
    #[must_use]
    pub fn set_in_sum(bucket: Bucket, counter: &str, amount: u64) -> Self {
        Self::new(
            bucket,
            named("HSET", sum_key(bucket))
                .arg(counter)
                .arg(amount)
                .take(),
        )
    }

    /// Writes entries into a journal.
    #[must_use]
    pub fn insert(bucket: Bucket, member: &Member, entries: &[(Vec<u8>, Vec<u8>)]) -> Self {
        let key = journal_key(bucket, member);
        let bytes = entries
            .iter()
            .map(|(field, chunk)| field.len() + chunk.len());
        let bytes = key.len() + bytes.sum::<usize>();
        let mut cmd = sized("HSET", 1 + 2 * entries.len(), bytes);
        cmd.arg(key);
        for (field, chunk) in entries {
            cmd.arg(&field[..]).arg(&chunk[..]);
        }
        Self::new(bucket, cmd)
    }

    /// Renews a journal's TTL.
    #[must_use]
    pub fn expire_journal(bucket: Bucket, member: &Member, ttl: Duration) -> Self {
        Self::new(bucket, expire(journal_key(bucket, member), ttl))
    }

    /// Counts the entries of a journal.
    #[must_use]
    pub fn entries(bucket: Bucket, member: &Member) -> Self {
        Self::new(bucket, named("HLEN", journal_key(bucket, member)))
    }

    /// Estimates a journal's bytes in Redis from five of its entries.
    #[must_use]
    pub fn memory(bucket: Bucket, member: &Member) -> Self {
        let mut cmd = redis::cmd("MEMORY");
        cmd.arg("USAGE")
            .arg(journal_key(bucket, member))
            .arg("SAMPLES")
            .arg(5);
        Self::new(bucket, cmd)
    }

    /// Puts traces into the queue, or lowers their scores; raises none.
    #[must_use]
    pub fn enqueue<M: Borrow<Member>>(bucket: Bucket, members: &[(M, UnixMillis)]) -> Self {
        let mut cmd = named("ZADD", queue_key(bucket));
        cmd.arg("LT");
        for (member, score) in members {
            cmd.arg(score.0).arg(member.borrow().as_bytes());
        }
        Self::new(bucket, cmd).orderly()
    }

    /// Reads the traces that are due, earliest first, with their scores.
    #[must_use]
    pub fn due(bucket: Bucket, now: UnixMillis, limit: usize) -> Self {
        let mut cmd = named("ZRANGEBYSCORE", queue_key(bucket));
        cmd.arg("-inf")
            .arg(now.0)
            .arg("WITHSCORES")
            .arg("LIMIT")
            .arg(0)
            .arg(limit);
        Self::new(bucket, cmd)
    }

    /// Reads the first trace that is not due yet, with its score.
    #[must_use]
    pub fn after(bucket: Bucket, now: UnixMillis) -> Self {
        let mut cmd = named("ZRANGEBYSCORE", queue_key(bucket));
        cmd.arg(format!("({now}"))
            .arg("+inf")
            .arg("WITHSCORES")
            .arg("LIMIT")
            .arg(0)
            .arg(1);
        Self::new(bucket, cmd)
    }

    /// Reads the trace with the lowest score.
    #[must_use]
    pub fn first_queued(bucket: Bucket) -> Self {
        let mut cmd = named("ZRANGE", queue_key(bucket));
        cmd.arg(0).arg(0).arg("WITHSCORES");
        Self::new(bucket, cmd)
    }

    /// Reads the traces of a queue from place `first` to `last`, lowest score first.
    #[must_use]
    pub fn queued(bucket: Bucket, first: usize, last: usize) -> Self {
        Self::new(
            bucket,
            named("ZRANGE", queue_key(bucket))
                .arg(first)
                .arg(last)
                .take(),
        )
    }

    /// Counts the traces of a queue.
    #[must_use]
    pub fn queue_len(bucket: Bucket) -> Self {
        Self::new(bucket, named("ZCARD", queue_key(bucket))).orderly()
    }

    /// Takes a member out of a queue that is no trace of ours.
    #[must_use]
    pub fn unqueue(bucket: Bucket, member: &[u8]) -> Self {
        Self::new(bucket, named("ZREM", queue_key(bucket)).arg(member).take())
    }

    /// Reads the headers of a journal's entries.
    #[must_use]
    pub fn headers(bucket: Bucket, member: &Member) -> Self {
        Self::new(bucket, named("HKEYS", journal_key(bucket, member))).orderly()
    }

    /// Reads a journal of so many entries, chunks and all; where it has more by now, any of them, one more than that.
    ///
    /// Shape: pairs of field and chunk; nil where there was no room for it ([`WHOLE_BYTES`](super::WHOLE_BYTES)).
    #[must_use]
    pub fn whole_journal(bucket: Bucket, member: &Member, entries: usize) -> Self {
        // HGETALL would have no end where a journal has grown since it was counted.
        let most = entries.saturating_add(1);
        let mut cmd = named("HRANDFIELD", journal_key(bucket, member));
        cmd.arg(most).arg("WITHVALUES");
        Self {
            whole_entries: most,
            ..Self::new(bucket, cmd).orderly()
        }
    }

    /// Reads the headers, and with them the chunks, of about `count` entries of a journal, from a cursor on; the first is 0.
    #[must_use]
    pub fn headers_page(bucket: Bucket, member: &Member, cursor: u64, count: u64) -> Self {
        let mut cmd = named("HSCAN", journal_key(bucket, member));
        cmd.arg(cursor).arg("COUNT").arg(count);
        Self::new(bucket, cmd)
    }

    /// Reads the chunks of some entries.
    #[must_use]
    pub fn chunks<'f>(
        bucket: Bucket,
        member: &Member,
        fields: impl IntoIterator<Item = &'f [u8]>,
    ) -> Self {
        let mut cmd = named("HMGET", journal_key(bucket, member));
        for field in fields {
            cmd.arg(field);
        }
        Self::new(bucket, cmd)
    }

    /// Renews the TTLs of a bucket's queue, position and sum.
    #[must_use]
    pub fn renew(bucket: Bucket, ttl: Duration) -> [Self; 3] {
        let keys = [queue_key(bucket), position_key(bucket), sum_key(bucket)];
        keys.map(|key| Self::new(bucket, expire(key, long_ttl(ttl))))
    }

    /// Reads what a node says about itself; of no slot.
    pub(crate) fn info() -> Self {
        Self::at(0, redis::cmd("INFO"))
    }

    /// Reads what a node says about its cluster; of no slot.
    pub(crate) fn cluster_info() -> Self {
        Self::at(0, redis::cmd("CLUSTER").arg("INFO").take())
    }

    /// Reads which node has which slots; of no slot.
    pub(crate) fn cluster_slots() -> Self {
        Self::at(0, redis::cmd("CLUSTER").arg("SLOTS").take())
    }

    /// Lets the next command have a slot that is on its way to this node; of no slot.
    pub(crate) fn asking() -> Self {
        Self::at(0, redis::cmd("ASKING"))
    }

    /// Makes a node know a script; of no slot.
    pub(crate) fn load(script: &Source) -> Self {
        Self::at(0, script.load())
    }

    /// Reads the store's own description.
    pub(crate) fn meta(slice: Option<SliceId>) -> Self {
        let key = meta_key(slice);
        Self::at(slot(&key), named("HGETALL", key))
    }

    /// Describes the store, in what it does not say yet.
    pub(crate) fn describe(slice: Option<SliceId>, field: &str, value: &str) -> Self {
        let key = meta_key(slice);
        Self::at(
            slot(&key),
            named("HSETNX", key).arg(field).arg(value).take(),
        )
    }

    /// Describes the store anew, in one field.
    pub(crate) fn describe_anew(slice: Option<SliceId>, field: &str, value: &str) -> Self {
        let key = meta_key(slice);
        Self::at(slot(&key), named("HSET", key).arg(field).arg(value).take())
    }
}

fn named(name: &str, key: Vec<u8>) -> Cmd {
    let mut cmd = sized(name, 1, key.len());
    cmd.arg(key);
    cmd
}

/// With room for so many arguments, of so many bytes in all.
fn sized(name: &str, args: usize, bytes: usize) -> Cmd {
    let mut cmd = Cmd::with_capacity(1 + args, name.len() + bytes);
    cmd.arg(name);
    cmd
}

fn expire(key: Vec<u8>, ttl: Duration) -> Cmd {
    named("PEXPIRE", key).arg(millis(ttl)).take()
}

/// All keys of a bucket share its hash tag, so they share its slot.
pub(super) fn slot_of(bucket: Bucket) -> u16 {
    crc16(&hash_tag(bucket)) % SLOTS
}

/// The hash slot of a key: CRC16 of its hash tag, or of all of it.
fn slot(key: &[u8]) -> u16 {
    let tag = key.iter().position(|&byte| byte == b'{').and_then(|open| {
        let close = key[open + 1..].iter().position(|&byte| byte == b'}')?;
        (close > 0).then(|| &key[open + 1..=open + close])
    });
    crc16(tag.unwrap_or(key)) % SLOTS
}

/// CRC-16/XMODEM, as Redis Cluster has it.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, &byte| {
        crc << 8 ^ CRC16_OF_BYTE[usize::from(crc >> 8 ^ u16::from(byte))]
    })
}

/// What each byte adds.
const CRC16_OF_BYTE: [u16; 256] = {
    let mut table = [0; 256];
    let mut byte = 0_u16;
    while byte < 256 {
        let mut crc = byte << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 == 0 {
                crc << 1
            } else {
                crc << 1 ^ 0x1021
            };
            bit += 1;
        }
        table[byte as usize] = crc;
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use shared::shard::{BucketId, ShardId};

    use super::*;

    #[test]
    fn slots_are_those_of_redis_cluster() {
        assert_eq!(crc16(b"123456789"), 0x31c3);
        // As `CLUSTER KEYSLOT` says.
        assert_eq!(slot(b"foo"), 12_182);
        assert_eq!(slot(b"a{foo}b"), 12_182);
        assert_eq!(slot(b"a{}foo"), crc16(b"a{}foo") % SLOTS);
        let bucket = Bucket {
            slice: Some(SliceId(4)),
            shard: ShardId(65_535),
            bucket: BucketId(15),
        };
        assert_eq!(slot_of(bucket), slot(&queue_key(bucket)));
    }
}
