//! Makes a batch of what was read: sorted, grouped, encoded, its refused messages settled.
//!
//! In:     records; `now` of each shard's part; where the buckets stood.
//! Out:    `Encoded` for `writer`.
//! Keeps:  every shard that was read has one part, whatever its records are.
//! Knows:  the order: sort, now, group, encode, settle. No Redis.
//! Source: docs/spec.md 2.6, 3, 4; docs/house.md 3.

use shared::{shard::ShardId, time::UnixMillis};

use super::{
    batch::{Counts, Positions, Record, sort},
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

impl Encoded {
    /// Leaves the parts of these shards out: they are read again, from before this batch.
    pub fn leave_out(&mut self, shards: &[ShardId]) {
        self.parts.retain(|part| !shards.contains(&part.shard));
        self.journals
            .retain(|journal| !shards.contains(&journal.bucket.shard));
    }
}

/// How a batch is made.
#[derive(Debug)]
pub struct Making {
    /// Where the buckets stand, with all that was read since: what comes from below that is in them already, or on its way.
    pub positions: Positions,
    /// What one entry may hold.
    pub limits: GroupLimits,
    /// Makes the entries.
    pub encoder: Encoder,
    /// Where refused messages go.
    pub dead_letters: DeadLetters,
}

impl Making {
    /// Parses, groups and encodes one batch, and settles its refused messages. `now` begins a shard's part; none: the shard is not ours.
    ///
    /// # Errors
    /// [`Ended::Stopped`] when the supervisor asked for it before the refused messages were settled.
    pub fn encode<'r>(
        &mut self,
        records: impl Iterator<Item = Record<'r>>,
        now: impl Fn(ShardId, &[UnixMillis]) -> Option<UnixMillis>,
        beat: &mut Beat,
    ) -> Result<Encoded, Ended> {
        let (mut parts, mut journals, mut refused) = (Vec::new(), Vec::new(), Vec::new());
        for part in sort(records, &self.positions, self.encoder.buckets()) {
            // Only assigned partitions are read.
            let Some(now) = now(part.shard, &part.times) else {
                continue;
            };
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
            for bucket in self.encoder.buckets().of_shard(part.shard) {
                let position = self.positions.entry(bucket).or_default();
                *position = part.next.max(*position);
            }
        }
        let settled = self.dead_letters.settle(&refused, beat)?;
        Ok(Encoded {
            parts,
            journals,
            settled,
        })
    }
}
