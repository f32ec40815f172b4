//! The stage that encodes: a batch is grouped and made into entries, its refused messages are settled.
//!
//! In:     `Batch`.
//! Out:    `Encoded` for `writer`.
//! Keeps:  every part of the batch stays one, whatever its records are.
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

/// How a batch is made.
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
