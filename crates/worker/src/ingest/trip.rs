//! Trip 1 of an insert: what is sent to Redis, what has a good reply, what has to be sent again.
//!
//! In:     the journals of a batch, encoded; replies, in the order of the commands.
//! Out:    the commands that are left; at the end the positions that stood at the head of the connection.
//! Keeps:  a `ZADD` is sent again after any `HSET` of its bucket that was; a bucket that begins again does so at `HGET`.
//! Knows:  commands and replies. No connection, no waiting.
//! Source: docs/store.md 2.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use shared::time::UnixMillis;
use store::{
    chunk::{self, Codec},
    client::{Command, CommandError, Reply, Value, reply},
    entry::{EntryHeader, SpanAt},
    keys::{Bucket, Member},
};

use super::group::Subsegment;

/// From how many bytes of a trace in one batch on its size in Redis is asked.
const MEMORY_ASKED_FROM: u64 = 64 << 10;

/// The entries of a trace that gets one entry are counted at one insert in so many: to count costs a tenth of an insert.
const COUNTED_ONE_IN: u64 = 8;

/// One journal's part of a batch.
#[derive(Debug)]
pub struct JournalWrite {
    /// Its bucket.
    pub bucket: Bucket,
    /// Its place in the queue.
    pub member: Member,
    /// The shard's `now` of the batch.
    pub now: UnixMillis,
    /// The offset behind the shard's part of the batch: above all of its new entries.
    pub next: u64,
    /// The earliest deadline that its new entries can have.
    pub score: UnixMillis,
    /// Spans in `fields`.
    pub spans: u64,
    /// Entries in the journal after the write, where they were asked for.
    pub entries: Option<u64>,
    /// Bytes of the journal in Redis after the write, where they were asked for.
    pub memory: Option<u64>,
    /// Bytes of `fields`.
    pub bytes: u64,
    fields: Vec<(Vec<u8>, Vec<u8>)>,
    /// Whether its entries are to be counted.
    is_counted: bool,
    raw_bytes: u64,
    done: bool,
}

impl JournalWrite {
    /// A journal that gets nothing yet.
    #[must_use]
    pub fn new(bucket: Bucket, member: Member, now: UnixMillis, next: u64) -> Self {
        Self {
            bucket,
            member,
            now,
            next,
            score: UnixMillis::MAX,
            spans: 0,
            entries: None,
            memory: None,
            bytes: 0,
            fields: Vec::new(),
            is_counted: false,
            raw_bytes: 0,
            done: false,
        }
    }

    /// Adds one subsegment as an entry; the earliest deadline of its segment is `timeout` behind its arrival.
    pub fn add(&mut self, subsegment: &Subsegment<'_>, timeout: Duration, codec: Codec) {
        let spans = &subsegment.spans;
        let latest = spans.iter().map(|arrived| arrived.time).max();
        let arrival = latest.map_or(self.now, |latest| latest.max(self.now));
        let header = EntryHeader {
            has_root: subsegment.has_root,
            organization: subsegment.organization,
            arrival,
            top: subsegment.top.clone(),
            spans: spans
                .iter()
                .map(|arrived| SpanAt {
                    offset: arrived.offset,
                    id: arrived.span.id.clone(),
                })
                .collect(),
            bytes: subsegment.bytes,
        };
        let payloads: Vec<_> = spans
            .iter()
            .map(|arrived| (arrived.span.json, &arrived.span.splice))
            .collect();
        let (field, chunk) = (header.encode(), chunk::encode(codec, &payloads));
        self.score = self.score.min(arrival.after(timeout));
        self.spans += count(spans.len());
        self.bytes += count(field.len() + chunk.len());
        self.raw_bytes += subsegment.bytes;
        let is_chosen = |offset: u64| offset.is_multiple_of(COUNTED_ONE_IN);
        self.is_counted =
            !self.fields.is_empty() || spans.first().is_some_and(|first| is_chosen(first.offset));
        self.fields.push((field, chunk));
    }

    /// Entries that this batch added.
    #[must_use]
    pub fn added(&self) -> u64 {
        count(self.fields.len())
    }
}

/// The state of trip 1.
#[derive(Debug)]
pub struct Trip<'j> {
    heads: Vec<(Bucket, Option<Value>)>,
    journals: &'j mut [JournalWrite],
    queued: BTreeMap<Bucket, bool>,
    /// Buckets with a write that failed in this attempt.
    undone: HashSet<Bucket>,
}

/// What a command of the trip is for.
#[derive(Debug, Clone, Copy)]
pub enum Place {
    /// The position at the head of a connection.
    Head(usize),
    /// A journal's entries.
    Write(usize),
    /// A journal's TTL.
    Expire(usize),
    /// The number of a journal's entries.
    Entries(usize),
    /// A journal's bytes in Redis.
    Memory(usize),
    /// The scores of a bucket's journals.
    Queue(Bucket),
}

impl<'j> Trip<'j> {
    /// A trip that has sent nothing; what a trip before it sent is sent again.
    pub fn new(
        buckets: impl IntoIterator<Item = Bucket>,
        journals: &'j mut [JournalWrite],
    ) -> Self {
        for journal in &mut *journals {
            journal.done = false;
        }
        let queued = journals
            .iter()
            .map(|journal| (journal.bucket, false))
            .collect();
        Self {
            heads: buckets.into_iter().map(|bucket| (bucket, None)).collect(),
            journals,
            queued,
            undone: HashSet::new(),
        }
    }

    /// What has no good reply yet, in the order in which it has to be sent.
    #[must_use]
    pub fn left(&self, ttl: Duration) -> Vec<(Place, Command)> {
        let mut left = Vec::new();
        for (index, (bucket, _)) in self
            .heads
            .iter()
            .enumerate()
            .filter(|(_, (_, head))| head.is_none())
        {
            left.push((Place::Head(index), Command::position(*bucket)));
        }
        for (index, journal) in self
            .journals
            .iter()
            .enumerate()
            .filter(|(_, journal)| !journal.done)
        {
            left.push((
                Place::Write(index),
                Command::insert(journal.bucket, &journal.member, &journal.fields),
            ));
            left.push((
                Place::Expire(index),
                Command::expire_journal(journal.bucket, &journal.member, ttl),
            ));
            if journal.is_counted {
                left.push((
                    Place::Entries(index),
                    Command::entries(journal.bucket, &journal.member),
                ));
            }
            if journal.raw_bytes > MEMORY_ASKED_FROM {
                left.push((
                    Place::Memory(index),
                    Command::memory(journal.bucket, &journal.member),
                ));
            }
        }
        let mut members: BTreeMap<Bucket, Vec<(Member, UnixMillis)>> = BTreeMap::new();
        for journal in self.journals.iter() {
            if self.queued.get(&journal.bucket) == Some(&false) {
                members
                    .entry(journal.bucket)
                    .or_default()
                    .push((journal.member.clone(), journal.score));
            }
        }
        for (bucket, members) in members {
            left.push((Place::Queue(bucket), Command::enqueue(bucket, &members)));
        }
        left
    }

    /// Takes the replies to what was left; gives the first error among them.
    pub fn take(&mut self, places: &[Place], replies: Vec<Reply>) -> Option<CommandError> {
        for place in places {
            if let Place::Write(index) = *place {
                self.journals[index].done = true;
            }
        }
        self.undone.clear();
        let mut first = None;
        for (&place, reply) in places.iter().zip(replies) {
            match reply {
                Ok(value) => self.good(place, value),
                // Sizes are hints: a server that never tells them keeps no entry out.
                Err(error)
                    if matches!(place, Place::Entries(_) | Place::Memory(_))
                        && !error.is_outage() => {}
                Err(error) => {
                    self.bad(place);
                    first.get_or_insert(error);
                }
            }
        }
        first
    }

    /// Lets go of every reply of these buckets: the connection that gave them is gone, and what it had written may be.
    pub fn begin_again(&mut self, buckets: &HashSet<Bucket>) {
        if buckets.is_empty() {
            return;
        }
        for (bucket, head) in &mut self.heads {
            if buckets.contains(bucket) {
                *head = None;
            }
        }
        for journal in &mut *self.journals {
            journal.done &= !buckets.contains(&journal.bucket);
        }
        for (bucket, queued) in &mut self.queued {
            *queued &= !buckets.contains(bucket);
        }
    }

    /// The positions that stood at the head of the connection.
    #[must_use]
    pub fn positions(&self) -> Vec<(Bucket, Option<u64>)> {
        self.heads
            .iter()
            .map(|(bucket, head)| (*bucket, head.as_ref().and_then(reply::offset)))
            .collect()
    }

    fn good(&mut self, place: Place, value: Value) {
        match place {
            Place::Head(index) => self.heads[index].1 = Some(value),
            Place::Entries(index) => self.journals[index].entries = Some(reply::count(&value)),
            Place::Memory(index) => self.journals[index].memory = Some(reply::count(&value)),
            Place::Write(_) | Place::Expire(_) => {}
            // Commands are answered in order: whether all writes of this bucket were good is known by now.
            Place::Queue(bucket) => {
                self.queued.insert(bucket, !self.undone.contains(&bucket));
            }
        }
    }

    fn bad(&mut self, place: Place) {
        match place {
            Place::Write(index)
            | Place::Expire(index)
            | Place::Entries(index)
            | Place::Memory(index) => {
                let journal = &mut self.journals[index];
                journal.done = false;
                self.queued.insert(journal.bucket, false);
                self.undone.insert(journal.bucket);
            }
            Place::Head(_) | Place::Queue(_) => {}
        }
    }
}

fn count(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use shared::{
        ids::{OrganizationId, ProjectId, SpanId, TraceId},
        shard::ShardId,
    };
    use store::{client::Refusal, keys::Buckets};

    use super::*;
    use crate::ingest::{group::Arrived, parse::parse};

    const SPAN: &[u8] = br#"{"organization_id":1,"project_id":1,"trace_id":"t","span_id":"1","start_timestamp":1,"end_timestamp":2,"retention_days":90,"received":2,"name":"n","status":"ok","is_remote":false}"#;
    const TTL: Duration = Duration::from_secs(60);

    fn buckets() -> Vec<Bucket> {
        Buckets::new(None, 2).of_shard(ShardId(0)).collect()
    }

    /// One journal in each bucket.
    fn journals() -> Vec<JournalWrite> {
        let journal = |bucket: Bucket| {
            let member = Member::new(ProjectId(1), &TraceId::new(b"t"));
            JournalWrite::new(bucket, member, UnixMillis(1), 1)
        };
        buckets().into_iter().map(journal).collect()
    }

    /// What is left, as letters with the bucket's number.
    fn left(trip: &Trip<'_>) -> (Vec<Place>, String) {
        let places: Vec<Place> = trip.left(TTL).into_iter().map(|(place, _)| place).collect();
        let letters = places.iter().map(|place| match place {
            Place::Head(bucket) => format!("h{bucket}"),
            Place::Write(journal) => format!("w{journal}"),
            Place::Expire(journal) => format!("e{journal}"),
            Place::Entries(journal) => format!("n{journal}"),
            Place::Memory(journal) => format!("m{journal}"),
            Place::Queue(bucket) => format!("q{}", bucket.bucket),
        });
        let letters = letters.collect::<Vec<_>>().join(" ");
        (places, letters)
    }

    fn refused() -> Reply {
        Err(CommandError::Refused {
            address: String::new(),
            command: String::new(),
            kind: Refusal::Moved,
            message: String::new(),
        })
    }

    /// One span, as a subsegment.
    fn subsegment(offset: u64, time: u64) -> Subsegment<'static> {
        Subsegment {
            project: ProjectId(1),
            trace: TraceId::new(b"t"),
            organization: OrganizationId(1),
            top: SpanId::Hex(1),
            has_root: false,
            bytes: 0,
            spans: vec![Arrived {
                offset,
                time: UnixMillis(time),
                span: parse(SPAN).unwrap(),
            }],
        }
    }

    #[test]
    fn a_trace_is_looked_at_when_the_first_of_its_new_entries_may_be_due() {
        let mut journal = journals().remove(0);
        let mut score = |time, timeout| {
            let timeout = Duration::from_millis(timeout);
            journal.add(&subsegment(1, time), timeout, Codec::None);
            journal.score.0
        };
        assert_eq!(score(500, 60), 560);
        assert_eq!(score(520, 60), 560);
        assert_eq!(score(520, 10), 530);
        // No arrival is below the batch's `now`.
        assert_eq!(score(0, 10), 11);
    }

    #[test]
    fn entries_are_counted_where_one_insert_adds_several_and_now_and_then_where_it_adds_one() {
        let is_counted = |offsets: &[u64]| {
            let mut journals = journals();
            for &offset in offsets {
                journals[0].add(&subsegment(offset, 1), TTL, Codec::None);
            }
            left(&Trip::new(buckets(), &mut journals)).1.contains("n0")
        };
        assert!(is_counted(&[1, 2]) && is_counted(&[2, 3, 9]));
        let alone = (0..800).filter(|&offset| is_counted(&[offset])).count();
        assert_eq!(alone, 100);
    }

    #[test]
    fn a_queue_is_written_again_after_a_write_that_was_refused() {
        let mut journals = journals();
        let mut trip = Trip::new(buckets(), &mut journals);
        let (places, letters) = left(&trip);
        assert_eq!(letters, "h0 h1 w0 e0 w1 e1 q0 q1");
        let replies = |bad: &[usize], all: usize| -> Vec<Reply> {
            (0..all)
                .map(|place| match bad.contains(&place) {
                    true => refused(),
                    false => Ok(Value::Int(1)),
                })
                .collect()
        };
        // The second journal's write is refused, and its queue is written all the same.
        assert!(trip.take(&places, replies(&[4], 8)).is_some());
        let (places, letters) = left(&trip);
        assert_eq!(letters, "w1 e1 q1");
        assert!(trip.take(&places, replies(&[], 3)).is_none());
        assert_eq!(left(&trip).1, "");
    }

    #[test]
    fn a_bucket_that_begins_again_leaves_the_others_alone() {
        let mut journals = journals();
        let mut trip = Trip::new(buckets(), &mut journals);
        let (places, _) = left(&trip);
        let good = places.iter().map(|_| Ok(Value::Int(1))).collect();
        assert!(trip.take(&places, good).is_none());
        trip.begin_again(&[buckets()[1]].into());
        assert_eq!(left(&trip).1, "h1 w1 e1 q1");
    }
}
