//! Encodes the subsegments of a batch, trace by trace.
//!
//! In:     subsegments of one shard, its `now`.
//! Out:    for each trace its new entries, when it is to be looked at, what of its size is to be asked.
//! Keeps:  the score is not above the deadline of any segment that the entries may be in.
//! Knows:  entries and chunks. Pure.
//! Source: docs/store.md 1, 2.

use std::{collections::HashMap, time::Duration};

use shared::{
    config::{Buffer, Redis},
    shard::ShardId,
    time::UnixMillis,
};
use store::{
    chunk::{self, Codec},
    entry::{EntryHeader, SpanAt},
    keys::{Bucket, Buckets, Member},
};

use super::group::{Arrived, Subsegment};

/// From how many bytes of a trace in one batch on its size in Redis is asked.
const MEMORY_ASKED_FROM: u64 = 64 << 10;

/// The entries of a trace that gets one entry are counted at one insert in so many: to count costs a seventh of an insert.
const COUNTED_ONE_IN: u64 = 8;
/// How many entries a trace is taken to have got since it was counted. One in seventy has got more, (7/8)^32, and may pass a multiple
/// unseen; one that has got fewer may be looked at early again.
pub(super) const UNCOUNTED_MAX: u64 = 32;

/// Makes entries of subsegments.
#[derive(Debug)]
pub struct Encoder {
    buckets: Buckets,
    codec: Codec,
    timeout: Duration,
    root_timeout: Duration,
}

impl Encoder {
    /// An encoder for a store that is cut like this.
    #[must_use]
    pub fn new(buckets: Buckets, redis: &Redis, buffer: &Buffer) -> Self {
        let within_age = |timeout: Duration| {
            let age = buffer.max_segment_age;
            age.map_or(timeout, |age| timeout.min(age))
        };
        Self {
            buckets,
            codec: Codec::from(redis.compression),
            timeout: within_age(buffer.timeout),
            root_timeout: within_age(buffer.root_timeout),
        }
    }

    /// Headers and chunks of a shard's subsegments, by journal.
    #[must_use]
    pub fn encode(
        &self,
        shard: ShardId,
        now: UnixMillis,
        subsegments: &[Subsegment],
    ) -> Vec<JournalWrite> {
        let mut journals: Vec<JournalWrite> = Vec::new();
        let mut places: HashMap<Member, usize> = HashMap::new();
        for subsegment in subsegments {
            let member = Member::new(subsegment.project, &subsegment.trace);
            let place = *places.entry(member).or_insert_with_key(|member| {
                let bucket = self
                    .buckets
                    .of_trace(shard, subsegment.project, &subsegment.trace);
                journals.push(JournalWrite::new(bucket, member.clone(), now));
                journals.len() - 1
            });
            let timeout = if subsegment.has_root {
                self.root_timeout
            } else {
                self.timeout
            };
            journals[place].add(subsegment, timeout, self.codec);
        }
        journals
    }
}

/// One journal's part of a batch.
#[derive(Debug)]
pub struct JournalWrite {
    /// Its bucket.
    pub bucket: Bucket,
    /// Its place in the queue.
    pub member: Member,
    /// The shard's `now` of the batch.
    pub now: UnixMillis,
    /// When the first of its new entries would be due, alone.
    pub score: UnixMillis,
    /// Spans in `fields`.
    pub spans: u64,
    /// Entries in the journal after the write, where they were asked for.
    pub entries: Option<u64>,
    /// Bytes of the journal in Redis after the write, where they were asked for.
    pub memory: Option<u64>,
    /// Bytes of `fields`.
    pub bytes: u64,
    /// Its new entries: headers and chunks.
    pub fields: Vec<(Vec<u8>, Vec<u8>)>,
    /// Whether its entries are to be counted.
    pub is_counted: bool,
    /// Bytes of its new spans, before compression.
    raw_bytes: u64,
    /// Everything that it gets has a good reply.
    pub done: bool,
}

impl JournalWrite {
    /// A journal that gets nothing yet.
    #[must_use]
    pub fn new(bucket: Bucket, member: Member, now: UnixMillis) -> Self {
        Self {
            bucket,
            member,
            now,
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

    /// Adds one subsegment as an entry. Alone it is due `timeout` behind its arrival.
    pub fn add(&mut self, subsegment: &Subsegment, timeout: Duration, codec: Codec) {
        let spans = &subsegment.spans;
        let latest = spans.iter().map(|arrived| arrived.time).max();
        let arrival = latest.map_or(self.now, |latest| latest.max(self.now));
        let header = header(subsegment, arrival);
        let payloads: Vec<_> = spans
            .iter()
            .map(|arrived| (&arrived.json[..], &arrived.span.splice))
            .collect();
        let (field, chunk) = (header.encode(), chunk::encode(codec, &payloads));
        self.score = self.score.min(arrival.after(timeout));
        self.spans += count(spans.len());
        self.bytes += count(field.len() + chunk.len());
        self.raw_bytes += subsegment.bytes;
        let first = spans.first().map_or(0, |first| first.offset);
        self.is_counted = !self.fields.is_empty() || is_counted_alone(first);
        self.fields.push((field, chunk));
    }

    /// Whether its size in Redis is to be asked.
    #[must_use]
    pub fn is_weighed(&self) -> bool {
        self.raw_bytes > MEMORY_ASKED_FROM
    }

    /// Entries that this batch added.
    #[must_use]
    pub fn added(&self) -> u64 {
        count(self.fields.len())
    }
}

/// The header of a subsegment's entry.
#[must_use]
pub fn header(subsegment: &Subsegment, arrival: UnixMillis) -> EntryHeader {
    let at = |arrived: &Arrived| SpanAt {
        offset: arrived.offset,
        id: arrived.span.id.clone(),
    };
    EntryHeader {
        has_root: subsegment.has_root,
        organization: subsegment.organization,
        arrival,
        top: subsegment.top.clone(),
        spans: subsegment.spans.iter().map(at).collect(),
        bytes: subsegment.bytes,
    }
}

/// Whether the entries of a trace are counted that gets one entry, by its offset. Mixed: a trace whose spans come at every eighth
/// offset would be chosen always or never.
fn is_counted_alone(offset: u64) -> bool {
    // 2^64 divided by the golden ratio: neighbours come to lie far apart.
    const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
    offset.wrapping_mul(MIX) <= u64::MAX / COUNTED_ONE_IN
}

fn count(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use shared::{
        config::{Config, Flags},
        ids::{OrganizationId, ProjectId, SpanId, TraceId},
    };

    use super::*;
    use crate::ingest::parse::parse;

    const SPAN: &[u8] = br#"{"organization_id":1,"project_id":1,"trace_id":"t","span_id":"1","start_timestamp":1,"end_timestamp":2,"retention_days":90,"received":2,"name":"n","status":"ok","is_remote":false}"#;

    fn journal() -> JournalWrite {
        let bucket = Buckets::new(None, 1).first(ShardId(0));
        let member = Member::new(ProjectId(1), &TraceId::new(b"t"));
        JournalWrite::new(bucket, member, UnixMillis(1))
    }

    /// One span, as a subsegment.
    fn subsegment(offset: u64, time: u64) -> Subsegment {
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
                json: Bytes::from_static(SPAN),
                span: parse(SPAN).unwrap(),
            }],
        }
    }

    #[test]
    fn a_trace_is_looked_at_when_the_first_of_its_new_entries_may_be_due() {
        let mut journal = journal();
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
    fn entries_of_a_trace_are_one_journal_due_within_the_age() {
        let shards = ("SPANBUF_SUPERVISION__SHARDS".into(), "0".into());
        let mut config = Config::load(None, std::iter::once(shards), &Flags::default()).unwrap();
        config.buffer.max_segment_age = Some(Duration::from_secs(30));
        let encoder = Encoder::new(Buckets::new(None, 4), &config.redis, &config.buffer);
        let rooted = Subsegment {
            has_root: true,
            ..subsegment(2, 500)
        };
        let other = Subsegment {
            trace: TraceId::new(b"u"),
            ..subsegment(3, 500)
        };
        let subsegments = [subsegment(1, 500), rooted, other];
        let journals = encoder.encode(ShardId(7), UnixMillis(400), &subsegments);
        let found: Vec<_> = journals
            .iter()
            .map(|journal| (journal.fields.len(), journal.score.0))
            .collect();
        // A root's 10 s; 60 s cut by the age.
        assert_eq!(found, [(2, 10_500), (1, 30_500)]);
        assert!(
            journals
                .iter()
                .all(|journal| journal.bucket.shard == ShardId(7))
        );
    }

    #[test]
    fn entries_are_counted_where_one_insert_adds_several_and_now_and_then_where_it_adds_one() {
        let is_counted = |offsets: &[u64]| {
            let mut journal = journal();
            for &offset in offsets {
                journal.add(&subsegment(offset, 1), Duration::ZERO, Codec::None);
            }
            journal.is_counted
        };
        assert!(is_counted(&[1, 2]) && is_counted(&[2, 3, 9]));
        // Whatever place in a turn of producers a trace's spans have.
        for (turn, place) in [(1, 0), (8, 3), (10, 0)] {
            let alone = (0..800).filter(|offset| is_counted(&[offset * turn + place]));
            assert!((80..=120).contains(&alone.count()));
        }
    }
}
