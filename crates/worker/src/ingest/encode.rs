//! The stage that encodes: a batch is grouped and made into entries, its refused messages are settled.
//!
//! In:     `Batch`.
//! Out:    `Encoded` for `writer`.
//! Keeps:  a part without spans is kept: its position moves on.
//! Knows:  the order: group, encode, settle. No Redis.
//! Source: docs/spec.md 2.6, 3, 4; docs/house.md 3.

use shared::{board::Phase, shard::ShardId, time::UnixMillis};

use super::{
    batch::{Batch, Counts},
    dlq::{DeadLetters, Settled},
    group::{GroupLimits, group},
    journal::{Encoder, JournalWrite},
};
use crate::{Ended, beat::Beat};

/// What positions, commits and the ledger have to know of one shard's part of a batch.
#[derive(Debug)]
pub struct Writing {
    /// The shard.
    pub shard: ShardId,
    /// The offset of the first record of the part.
    pub first: u64,
    /// The offset behind the last record of the part.
    pub next: u64,
    /// The shard's `now` of this batch.
    pub now: UnixMillis,
    /// No entry of it has a later arrival.
    pub latest: UnixMillis,
    /// What becomes of its records.
    pub counts: Counts,
}

/// A batch as entries, ready to be written.
#[derive(Debug)]
pub struct Encoded {
    /// Its shards.
    pub parts: Vec<Writing>,
    /// Their entries.
    pub journals: Vec<JournalWrite>,
    /// Its refused messages.
    pub settled: Settled,
}

/// How batches are made into entries.
#[derive(Debug)]
pub struct Making {
    /// What one entry may hold.
    pub limits: GroupLimits,
    /// Makes the entries.
    pub encoder: Encoder,
    /// Where refused messages go.
    pub dead_letters: DeadLetters,
}

impl Making {
    /// Groups and encodes one batch, and settles its refused messages.
    ///
    /// # Errors
    /// [`Ended::Stopped`] when the supervisor asked for it before the refused messages were settled.
    pub fn encode(&mut self, batch: Batch, beat: &mut Beat) -> Result<Encoded, Ended> {
        beat.phase(Phase::Work);
        let (mut parts, mut journals, mut refused) = (Vec::new(), Vec::new(), Vec::new());
        for (part, now) in batch.0 {
            parts.push(Writing {
                shard: part.shard,
                first: part.first,
                next: part.next,
                now,
                latest: part.times.iter().copied().fold(now, Ord::max),
                counts: part.counts(),
            });
            let subsegments = group(part.spans, &self.limits);
            journals.extend(self.encoder.encode(part.shard, now, &subsegments));
            refused.extend(part.refused);
        }
        let settled = self.dead_letters.settle(&refused, beat)?;
        Ok(Encoded {
            parts,
            journals,
            settled,
        })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use shared::config::{Config, Flags};
    use store::keys::Buckets;

    use super::*;
    use crate::{
        beat::tests::alone,
        ingest::batch::{Positions, Record},
    };

    #[test]
    fn a_part_without_spans_is_kept() {
        let variables = [
            ("SPANBUF_SUPERVISION__SHARDS".into(), "0-1".into()),
            ("SPANBUF_KAFKA__INPUT_DLQ".into(), "".into()),
        ];
        let config = Config::load(None, variables.into_iter(), &Flags::default()).unwrap();
        let (mut beat, _board) = alone(&config);
        let buckets = Buckets::new(None, 1);
        let mut making = Making {
            limits: GroupLimits {
                spans_max: 1,
                bytes_max: 1,
            },
            encoder: Encoder::new(buckets, &config.redis, &config.buffer),
            dead_letters: DeadLetters::new(&config.kafka).unwrap(),
        };
        let record = |shard, offset, time, payload| Record {
            shard: ShardId(shard),
            offset,
            time: UnixMillis(time),
            payload,
        };
        let records = [
            record(1, 4, 30, None),
            record(1, 5, 70, Some(Bytes::from_static(b"no span"))),
            record(1, 6, 50, None),
        ];
        let now = |_, times: &[UnixMillis]| Some(times[0]);
        let batch = Batch::make(records, now, &mut Positions::new(), buckets);
        let encoded = making.encode(batch, &mut beat).unwrap();
        assert!(encoded.journals.is_empty());
        let [part] = &encoded.parts[..] else {
            panic!("{:?}", encoded.parts)
        };
        assert_eq!((part.shard, part.first, part.next), (ShardId(1), 4, 7));
        assert_eq!((part.now.0, part.latest.0), (30, 70));
        let dropped = encoded.settled.counts(ShardId(1), 0);
        assert_eq!(dropped.iter().map(|(_, amount)| amount).sum::<u64>(), 3);
    }
}
