//! The scripts of `lua/`, with their arguments and replies as types.
//!
//! In:     what a step wants of one bucket.
//! Out:    a `Command` for the client, and what its reply says.
//! Keeps:  keys of one call share their hash tag; a reply of another shape is an error, never a guess.
//! Knows:  the scripts' heads. No connection.
//! Source: docs/store.md 2, 3, 4.

use std::{sync::LazyLock, time::Duration};

use redis::{Cmd, Script, Value};
use serde::Serialize;
use shared::time::{UnixMillis, millis};

use crate::{
    client::{Command, reply},
    keys::{Bucket, Member, journal_key, position_key, queue_key, sum_key},
};

/// A script of ours: its source, and what it is called in errors.
#[derive(Debug)]
pub struct Source {
    name: &'static str,
    code: &'static str,
    hash: String,
}

impl Source {
    fn new(name: &'static str, code: &'static str) -> Self {
        Self {
            name,
            code,
            hash: Script::new(code).get_hash().to_owned(),
        }
    }

    /// The file's name in `lua/`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The command that makes a server know the script.
    #[must_use]
    pub(crate) fn load(&self) -> Cmd {
        let mut load = redis::cmd("SCRIPT");
        load.arg("LOAD").arg(self.code);
        load
    }

    fn call(&self, keys: &[Vec<u8>]) -> Cmd {
        let mut call = redis::cmd("EVALSHA");
        call.arg(&self.hash).arg(keys.len()).arg(keys);
        call
    }
}

static POSITION: LazyLock<Source> =
    LazyLock::new(|| Source::new("position.lua", include_str!("../../../lua/position.lua")));
static QUEUE: LazyLock<Source> =
    LazyLock::new(|| Source::new("queue.lua", include_str!("../../../lua/queue.lua")));
static CLEAR: LazyLock<Source> =
    LazyLock::new(|| Source::new("clear.lua", include_str!("../../../lua/clear.lua")));

/// All scripts.
#[must_use]
pub fn all() -> [&'static Source; 3] {
    [&POSITION, &QUEUE, &CLEAR]
}

/// A reply that is not what its script returns.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read reply of {script}: it is not {expected} (is the script of the same build?)")]
pub struct ReplyError {
    script: &'static str,
    expected: &'static str,
}

/// Queues, positions and sums live twice as long as journals, so that they speak for every journal to its end.
#[must_use]
pub fn long_ttl(ttl: Duration) -> Duration {
    ttl.saturating_mul(2)
}

/// Moves the position of one bucket on.
#[derive(Debug, Clone)]
pub struct PositionCall<'a> {
    /// The bucket.
    pub bucket: Bucket,
    /// The offset that has to stand now; none: there has to be no position.
    pub before: Option<u64>,
    /// The offset below which the bucket now holds everything.
    pub next: u64,
    /// The shard's clock.
    pub clock: UnixMillis,
    /// Spans that this step makes visible.
    pub spans: u64,
    /// The store's instance id.
    pub instance: &'a str,
    /// `redis.redis_ttl`.
    pub ttl: Duration,
    /// What else this step counts in the bucket's sum.
    pub counts: &'a [(&'static str, u64)],
}

/// What became of a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PositionReply {
    /// It is written.
    Written,
    /// Another one stood, and stands.
    Stands(Option<u64>),
}

impl PositionCall<'_> {
    /// The command.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut call = POSITION.call(&[
            position_key(self.bucket),
            queue_key(self.bucket),
            sum_key(self.bucket),
        ]);
        let before = self
            .before
            .map_or_else(String::new, |before| before.to_string());
        call.arg(millis(long_ttl(self.ttl)))
            .arg(before)
            .arg(self.next)
            .arg(self.clock.0)
            .arg(self.spans)
            .arg(self.instance);
        for (counter, amount) in self.counts {
            call.arg(counter).arg(amount);
        }
        // Another node may lack what this one acknowledged: the caller reads its position first.
        Command::script(self.bucket, &POSITION, call).staying()
    }
}

impl PositionReply {
    /// Reads the reply.
    ///
    /// # Errors
    /// [`ReplyError`] for any other shape.
    pub fn read(value: &Value) -> Result<Self, ReplyError> {
        let wrong = ReplyError {
            script: "position.lua",
            expected: "a flag and an offset",
        };
        let Value::Array(parts) = value else {
            return Err(wrong);
        };
        match (parts.first().and_then(reply::number), parts.get(1)) {
            (Some(1), Some(_)) => Ok(Self::Written),
            (Some(0), Some(stands)) => match reply::bytes(stands) {
                Some([]) => Ok(Self::Stands(None)),
                _ => reply::number(stands)
                    .map(|stands| Self::Stands(Some(stands)))
                    .ok_or(wrong),
            },
            _ => Err(wrong),
        }
    }
}

/// Which way scores may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueMode {
    /// Up or down, for members that are there.
    Lift,
    /// Down; members that are not there are added.
    Lower,
}

/// Lifts or lowers the scores of traces in one queue.
#[derive(Debug, Clone)]
pub struct QueueCall {
    /// The bucket.
    pub bucket: Bucket,
    /// `redis.redis_ttl`.
    pub ttl: Duration,
    /// Which way.
    pub mode: QueueMode,
    /// The traces, each with its score.
    pub members: Vec<(Member, UnixMillis)>,
}

impl QueueCall {
    /// The command.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut call = QUEUE.call(&[queue_key(self.bucket)]);
        call.arg(millis(long_ttl(self.ttl))).arg(match self.mode {
            QueueMode::Lift => "lift",
            QueueMode::Lower => "lower",
        });
        for (member, score) in &self.members {
            call.arg(score.0).arg(member.as_bytes());
        }
        Command::script(self.bucket, &QUEUE, call)
    }
}

/// What is removed of journals of one bucket, and counted.
#[derive(Debug, Clone)]
pub struct ClearCall {
    /// The bucket.
    pub bucket: Bucket,
    /// `redis.redis_ttl`.
    pub ttl: Duration,
    /// The traces. The server stands still meanwhile: the caller bounds them, and their fields.
    pub traces: Vec<ClearTrace>,
}

/// What is removed of one journal.
#[derive(Debug, Clone)]
pub struct ClearTrace {
    /// The trace.
    pub member: Member,
    /// When what is left is looked at; none: nothing was left when the journal was read.
    pub next_look: Option<UnixMillis>,
    /// The entries to remove.
    pub fields: Vec<FieldOut>,
}

/// One entry that goes, and what became of its spans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldOut {
    /// The entry's field.
    pub field: Vec<u8>,
    /// Spans that Kafka acknowledged.
    pub produced: u64,
    /// Spans that stood in a produced one with equal bytes, sent twice.
    pub repeats: u64,
    /// Spans that are given up, by reason.
    pub dropped: Vec<(&'static str, u64)>,
}

/// One element of what goes, as `clear.lua` reads it.
#[derive(Serialize)]
#[serde(untagged)]
enum Element<'a> {
    /// Fields of a journal.
    Fields(usize),
    /// When what is left is looked at.
    NextLook(UnixMillis),
    /// No next look: always false, since JSON's null comes into Lua as a value that counts as true.
    NoLook(bool),
    /// Spans produced, and nothing else to count.
    Produced(u64),
    /// Spans produced, repeats, and spans dropped by reason.
    Amounts(u64, u64, &'a [(&'static str, u64)]),
}

/// What a clear did to one journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClearReply {
    /// Fields that this call removed.
    pub removed: u64,
    /// Fields that are left.
    pub left: u64,
}

/// A key that stands where a journal should, and is none: nothing of its trace was removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} (is this server shared with something else?)")]
pub struct NoJournal(String);

impl ClearCall {
    /// The command.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut keys = vec![queue_key(self.bucket), sum_key(self.bucket)];
        let journals = self.traces.iter();
        keys.extend(journals.map(|trace| journal_key(self.bucket, &trace.member)));
        let mut call = CLEAR.call(&keys);
        call.arg(millis(self.ttl))
            .arg(millis(long_ttl(self.ttl)))
            .arg(self.plan());
        let fields = self.traces.iter().flat_map(|trace| &trace.fields);
        fields.for_each(|out| {
            call.arg(&out.field[..]);
        });
        Command::script(self.bucket, &CLEAR, call)
    }

    /// What goes, in one argument: to take each number over by itself was nearly half of what the call cost the server.
    fn plan(&self) -> Vec<u8> {
        let mut plan = Vec::with_capacity(3 * self.traces.len());
        for trace in &self.traces {
            let next_look = trace.next_look.map(Element::NextLook);
            plan.push(Element::Fields(trace.fields.len()));
            plan.push(next_look.unwrap_or(Element::NoLook(false)));
            plan.extend(trace.fields.iter().map(FieldOut::element));
        }
        // Numbers and names are always JSON; an empty argument would be refused.
        serde_json::to_vec(&plan).unwrap_or_default()
    }
}

impl FieldOut {
    fn element(&self) -> Element<'_> {
        if self.repeats == 0 && self.dropped.is_empty() {
            Element::Produced(self.produced)
        } else {
            Element::Amounts(self.produced, self.repeats, &self.dropped)
        }
    }
}

impl ClearReply {
    /// Reads the reply: for each trace of the call what became of it, in the same order.
    ///
    /// # Errors
    /// [`ReplyError`] for any other shape.
    pub fn read(
        value: &Value,
        call: &ClearCall,
    ) -> Result<Vec<Result<Self, NoJournal>>, ReplyError> {
        let wrong = ReplyError {
            script: "clear.lua",
            expected: "two counts for each trace",
        };
        let Value::Array(parts) = value else {
            return Err(wrong);
        };
        if parts.len() != 2 * call.traces.len() {
            return Err(wrong);
        }
        let read = |pair: &[Value]| match pair {
            [Value::Int(removed), Value::Int(left)] => Some(Ok(Self {
                removed: u64::try_from(*removed).ok()?,
                left: u64::try_from(*left).ok()?,
            })),
            [error, _] => {
                let words = String::from_utf8_lossy(reply::bytes(error)?);
                Some(Err(NoJournal(words.into_owned())))
            }
            _ => None,
        };
        let replies: Option<Vec<_>> = parts.chunks_exact(2).map(read).collect();
        replies.ok_or(wrong)
    }
}

#[cfg(test)]
mod tests {
    use shared::{
        ids::{ProjectId, TraceId},
        shard::{BucketId, ShardId},
    };

    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.into())
    }

    #[test]
    fn replies_of_another_shape_are_errors() {
        let written = Value::Array(vec![Value::Int(1), bulk("7")]);
        assert_eq!(PositionReply::read(&written), Ok(PositionReply::Written));
        let none = Value::Array(vec![Value::Int(0), bulk("")]);
        assert_eq!(PositionReply::read(&none), Ok(PositionReply::Stands(None)));
        let seven = Value::Array(vec![Value::Int(0), bulk("7")]);
        assert_eq!(
            PositionReply::read(&seven),
            Ok(PositionReply::Stands(Some(7)))
        );
        for wrong in [
            Value::Nil,
            Value::Array(vec![]),
            Value::Array(vec![Value::Int(2), bulk("7")]),
            Value::Array(vec![Value::Int(0), bulk("x")]),
        ] {
            assert!(PositionReply::read(&wrong).is_err(), "{wrong:?}");
            assert!(ClearReply::read(&wrong, &call(1)).is_err(), "{wrong:?}");
        }
        let numbers = |numbers: &[i64]| {
            Value::Array(numbers.iter().map(|&number| Value::Int(number)).collect())
        };
        let reply = |removed, left| Ok(ClearReply { removed, left });
        assert_eq!(
            ClearReply::read(&numbers(&[2, 1, 0, 3]), &call(2)),
            Ok(vec![reply(2, 1), reply(0, 3)])
        );
        let foreign = Value::Array(vec![bulk("WRONGTYPE"), Value::Int(0)]);
        assert_eq!(
            ClearReply::read(&foreign, &call(1)),
            Ok(vec![Err(NoJournal("WRONGTYPE".to_owned()))])
        );
        for (wrong, traces) in [(&[2, 1][..], 2), (&[2, 1, 0], 1), (&[-1, 0], 1)] {
            assert!(ClearReply::read(&numbers(wrong), &call(traces)).is_err());
        }
    }

    fn call(traces: u64) -> ClearCall {
        let trace = |number| ClearTrace {
            member: Member::new(ProjectId(number), &TraceId::new(b"t")),
            next_look: None,
            fields: Vec::new(),
        };
        ClearCall {
            bucket: Bucket {
                slice: None,
                shard: ShardId(0),
                bucket: BucketId(0),
            },
            ttl: Duration::from_secs(1),
            traces: (0..traces).map(trace).collect(),
        }
    }
}
