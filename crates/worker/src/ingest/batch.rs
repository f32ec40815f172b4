//! Makes a batch of records: by shard, into spans to insert and messages to refuse.
//!
//! In:     `Record`s as they came, each shard's in offset order; where the buckets stand.
//! Out:    `Batch`: a `Part` for each shard that got anything, with the shard's `now`.
//! Keeps:  every record is counted in exactly one of spans, refused, standing (below its bucket's position).
//! Knows:  parsing and buckets. No Kafka, no Redis, no clock.
//! Source: docs/spec.md 2, 4; docs/store.md 2.

use std::collections::HashMap;

use bytes::Bytes;
use shared::{shard::ShardId, time::UnixMillis};
use store::keys::{Bucket, Buckets};

use super::{
    group::Arrived,
    parse::{ParseError, parse},
};

/// One message of the input.
#[derive(Debug, Clone)]
pub struct Record {
    /// The partition.
    pub shard: ShardId,
    /// The offset in it.
    pub offset: u64,
    /// Kafka's timestamp, milliseconds; checked against the wall clock already.
    pub time: UnixMillis,
    /// The value; none for a tombstone.
    pub payload: Option<Bytes>,
}

/// A message that holds no span.
#[derive(Debug)]
pub struct Refused {
    /// The partition.
    pub shard: ShardId,
    /// The offset in it.
    pub offset: u64,
    /// The value, raw; none for a tombstone.
    pub payload: Option<Bytes>,
    /// Why it is refused.
    pub reason: Reason,
}

/// Why a message is refused.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// The value is not a span.
    #[error(transparent)]
    Invalid(#[from] ParseError),
    /// There is no value.
    #[error("no value (a tombstone)")]
    Tombstone,
}

/// One shard's part of a batch.
#[derive(Debug)]
pub struct Part {
    /// The shard.
    pub shard: ShardId,
    /// The offset of the first record, of whatever kind.
    pub first: u64,
    /// The offset behind the last one.
    pub next: u64,
    /// The times of all records, in order.
    pub times: Vec<UnixMillis>,
    /// What is to be inserted, in input order.
    pub spans: Vec<Arrived>,
    /// What holds no span.
    pub refused: Vec<Refused>,
    /// Spans that stand in their bucket already: below its position.
    pub standing: u64,
}

/// What was read at once: the parts of its shards, each with the shard's `now`.
#[derive(Debug)]
pub struct Batch(pub Vec<(Part, UnixMillis)>);

impl Batch {
    /// Makes a batch of records. `now` begins a shard's part; none: the shard is not ours. Positions go on to behind what was read: what
    /// comes again of it is in Redis, or on its way there.
    pub fn make(
        records: impl IntoIterator<Item = Record>,
        now: impl Fn(ShardId, &[UnixMillis]) -> Option<UnixMillis>,
        positions: &mut Positions,
        buckets: Buckets,
    ) -> Self {
        let mut parts = Vec::new();
        for part in sort(records, positions, buckets) {
            // Only assigned partitions are read.
            let Some(now) = now(part.shard, &part.times) else {
                continue;
            };
            for bucket in buckets.of_shard(part.shard) {
                let position = positions.entry(bucket).or_default();
                *position = part.next.max(*position);
            }
            parts.push((part, now));
        }
        Self(parts)
    }
}

/// Where buckets stand: the offset below which each holds everything.
pub type Positions = HashMap<Bucket, u64>;

/// Sorts records by shard, and each shard's into spans and refusals.
fn sort(
    records: impl IntoIterator<Item = Record>,
    positions: &Positions,
    buckets: Buckets,
) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for record in records {
        let place = match parts.iter().position(|part| part.shard == record.shard) {
            Some(place) => place,
            None => {
                parts.push(Part::new(&record));
                parts.len() - 1
            }
        };
        parts[place].take(record, positions, buckets);
    }
    parts
}

impl Part {
    fn new(first: &Record) -> Self {
        Self {
            shard: first.shard,
            first: first.offset,
            next: first.offset,
            times: Vec::new(),
            spans: Vec::new(),
            refused: Vec::new(),
            standing: 0,
        }
    }

    fn take(&mut self, record: Record, positions: &Positions, buckets: Buckets) {
        let Record {
            shard,
            offset,
            time,
            payload,
        } = record;
        self.next = offset + 1;
        self.times.push(time);
        let Some(json) = payload else {
            return self.refuse(offset, None, Reason::Tombstone);
        };
        let span = match parse(&json) {
            Ok(span) => span,
            Err(error) => return self.refuse(offset, Some(json), error.into()),
        };
        let bucket = buckets.of_trace(shard, span.project, &span.trace);
        if positions.get(&bucket).is_some_and(|&next| offset < next) {
            self.standing += 1;
        } else {
            self.spans.push(Arrived {
                offset,
                time,
                json,
                span,
            });
        }
    }

    fn refuse(&mut self, offset: u64, payload: Option<Bytes>, reason: Reason) {
        self.refused.push(Refused {
            shard: self.shard,
            offset,
            payload,
            reason,
        });
    }

    /// What the ledger counts of this part: not what an earlier life of this worker inserted.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let count = |length: usize| u64::try_from(length).unwrap_or(u64::MAX);
        Counts {
            inserted: count(self.spans.len()),
            refused: count(self.refused.len()),
        }
    }
}

/// What becomes of a part's records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Spans to insert.
    pub inserted: u64,
    /// Messages that hold no span.
    pub refused: u64,
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};
    use shared::ids::{ProjectId, TraceId};

    use super::*;

    const VALID: &[u8] = br#"{"organization_id":1,"project_id":42,"trace_id":"t","span_id":"s","start_timestamp":1,"end_timestamp":2,"received":3,"retention_days":90,"status":"ok"}"#;
    const INVALID: &[u8] = br#"{"organization_id":1}"#;

    fn record(shard: u32, offset: u64, payload: Option<&'static [u8]>) -> Record {
        Record {
            shard: ShardId(shard),
            offset,
            time: UnixMillis(1000 + offset),
            payload: payload.map(Bytes::from_static),
        }
    }

    /// The bucket of the valid message.
    fn bucket(shard: u32, buckets: u32) -> Bucket {
        Buckets::new(None, buckets).of_trace(ShardId(shard), ProjectId(42), &TraceId::new(b"t"))
    }

    #[test]
    fn records_are_sorted_by_shard_and_kind() {
        let records = [
            record(3, 10, Some(VALID)),
            record(1, 77, Some(INVALID)),
            record(3, 12, None),
            record(1, 78, Some(VALID)),
            record(3, 13, Some(VALID)),
        ];
        let parts = sort(records, &Positions::new(), Buckets::new(None, 1));
        let [three, one] = &parts[..] else {
            panic!("{parts:?}")
        };
        assert_eq!(
            (three.shard, three.next, one.shard, one.next),
            (ShardId(3), 14, ShardId(1), 79)
        );
        assert_eq!(three.times, [1010, 1012, 1013].map(UnixMillis));
        let offsets: Vec<_> = three
            .spans
            .iter()
            .map(|arrived| (arrived.offset, arrived.time.0))
            .collect();
        assert_eq!(offsets, [(10, 1010), (13, 1013)]);
        assert_eq!(
            three.counts(),
            Counts {
                inserted: 2,
                refused: 1
            }
        );
        assert_eq!(
            one.counts(),
            Counts {
                inserted: 1,
                refused: 1
            }
        );
        assert_eq!((three.first, one.first), (10, 77));
        let tombstone = &three.refused[0];
        assert!(matches!(tombstone.reason, Reason::Tombstone) && tombstone.payload.is_none());
        let invalid = &one.refused[0];
        assert_eq!(
            (invalid.shard, invalid.offset, invalid.payload.as_deref()),
            (ShardId(1), 77, Some(INVALID))
        );
        assert_eq!(
            invalid.reason.to_string(),
            "parse span field=start_timestamp: it is missing"
        );
    }

    #[test]
    fn what_was_read_stands_before_it_is_written() {
        let buckets = Buckets::new(None, 4);
        let far = bucket(3, 4);
        let mut positions = Positions::from([(far, 100)]);
        let mut read = |shard, offsets: &[u64]| {
            let records = offsets
                .iter()
                .map(|&offset| record(shard, offset, Some(VALID)));
            let now = |shard, times: &[UnixMillis]| (shard != ShardId(9)).then(|| times[0]);
            let batch = Batch::make(records, now, &mut positions, buckets);
            let of = |(part, now): &(Part, UnixMillis)| (part.spans.len(), part.standing, now.0);
            batch.0.iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(read(1, &[7, 8]), [(2, 0, 1_007)]);
        assert_eq!(read(1, &[8, 9]), [(1, 1, 1_008)], "it was read before");
        assert_eq!(read(3, &[98]), [(0, 1, 1_098)]);
        assert_eq!(read(9, &[1]), [], "not ours");
        assert_eq!(positions[&far], 100, "it is ahead of the others");
        let of_shard = buckets.of_shard(ShardId(3)).filter(|&bucket| bucket != far);
        assert!(of_shard.map(|bucket| positions[&bucket]).eq([99; 3]));
        assert!(
            buckets
                .of_shard(ShardId(9))
                .all(|bucket| !positions.contains_key(&bucket))
        );
    }

    #[test]
    fn what_is_below_its_buckets_position_stands_already() {
        let (own, other) = (
            bucket(3, 16),
            (0..16).map(|number| Bucket {
                bucket: shared::shard::BucketId(number),
                ..bucket(3, 16)
            }),
        );
        let other = other.into_iter().find(|other| *other != own).unwrap();
        let records = || [9, 10, 11].map(|offset| record(3, offset, Some(VALID)));
        let inserted = |positions: &[(Bucket, u64)]| {
            let parts = sort(
                records(),
                &positions.iter().copied().collect(),
                Buckets::new(None, 16),
            );
            (parts[0].standing, parts[0].counts().inserted, parts[0].next)
        };
        assert_eq!(inserted(&[(own, 10)]), (1, 2, 12));
        assert_eq!(inserted(&[(own, 12)]), (3, 0, 12));
        assert_eq!(inserted(&[(other, 12)]), (0, 3, 12));
    }

    proptest! {
        #[test]
        fn every_record_is_counted_once(
            kinds in vec((0..4_u32, 0..3_usize), 0..50), position in 0..50_u64,
        ) {
            let payloads = [Some(VALID), Some(INVALID), None];
            let records: Vec<_> = (0..).zip(&kinds).map(|(offset, &(shard, kind))| record(shard, offset, payloads[kind])).collect();
            let positions = [(bucket(2, 1), position)].into();
            let mut left: Vec<_> = records.iter().map(|record| (record.shard, record.offset)).collect();
            for part in sort(records, &positions, Buckets::new(None, 1)) {
                let spans = part.spans.iter().map(|arrived| arrived.offset);
                let taken: Vec<_> = spans.chain(part.refused.iter().map(|refused| refused.offset)).collect();
                let of_part = left.iter().filter(|(shard, _)| *shard == part.shard).count();
                prop_assert_eq!(taken.len() + usize::try_from(part.standing).unwrap(), of_part);
                prop_assert_eq!(part.times.len(), of_part);
                prop_assert!(part.standing == 0 || part.shard == ShardId(2));
                prop_assert!(part.shard != ShardId(2) || part.spans.iter().all(|arrived| arrived.offset >= position));
                prop_assert_eq!(Some(part.next - 1), left.iter().filter(|(shard, _)| *shard == part.shard).map(|(_, offset)| *offset).max());
                left.retain(|(shard, _)| *shard != part.shard);
            }
            prop_assert!(left.is_empty());
        }
    }
}
