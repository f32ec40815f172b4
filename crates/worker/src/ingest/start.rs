//! Decides where the reading of a shard begins.
//!
//! In:     the positions of its buckets, the committed offset with its floor, another group's offset, what Kafka holds.
//! Out:    an offset and how many messages are gone before it, or a refusal.
//! Keeps:  nothing is skipped silently; a position wins over whatever is committed.
//! Knows:  numbers. Pure.
//! Source: docs/spec.md 7.4; docs/store.md 2, 6.

use std::fmt;

use shared::{config::OffsetReset, shard::ShardId};

use super::consume::{Committed, Extent};

/// What is known of a shard at its start.
#[derive(Debug, Clone)]
pub struct Known {
    /// The position of each bucket; none where it has none.
    pub positions: Vec<Option<u64>>,
    /// What our own group committed.
    pub committed: Option<Committed>,
    /// What the group to take over from committed.
    pub taken_over: Option<u64>,
    /// What Kafka holds.
    pub extent: Extent,
}

/// Where a shard begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// The first offset to read.
    pub offset: u64,
    /// What decided it.
    pub source: Source,
    /// Messages between where it should have begun and what Kafka still holds.
    pub missing: u64,
}

/// What decided where a shard begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The lowest position of the shard's buckets.
    Position,
    /// The floor that a commit of our group carried.
    Floor,
    /// The offset of the group to take over from.
    StartGroup,
    /// `kafka.offset_reset`.
    OffsetReset,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Position => "position",
            Self::Floor => "floor",
            Self::StartGroup => "start_group",
            Self::OffsetReset => "offset_reset",
        })
    }
}

/// Why a shard does not begin.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StartError {
    /// The store speaks of messages that Kafka does not have.
    #[error(
        "begin shard={shard}: position={position} is above the end={end} of the partition (was the topic made anew? then empty \
         the store or lower its positions)"
    )]
    AboveEnd {
        /// The shard.
        shard: ShardId,
        /// What the store says.
        position: u64,
        /// What Kafka says.
        end: u64,
    },
    /// `kafka.offset_reset` is `none`, and nothing else says where.
    #[error(
        "begin shard={shard}: no position and no committed offset, and kafka.offset_reset is none (commit an offset, or set earliest or latest)"
    )]
    NowhereToBegin {
        /// The shard.
        shard: ShardId,
    },
}

impl crate::Refusal for StartError {}

const FLOOR: &str = "floor=";

/// The metadata of a commit: the floor of the shard.
#[must_use]
pub fn floor_metadata(floor: u64) -> String {
    format!("{FLOOR}{floor}")
}

/// The floor in a commit's metadata; a commit that another tool wrote has its own offset for a floor.
#[must_use]
pub fn floor_of(committed: &Committed) -> u64 {
    let floor = committed
        .metadata
        .strip_prefix(FLOOR)
        .and_then(|floor| floor.parse().ok());
    floor.map_or(committed.offset, |floor: u64| floor.min(committed.offset))
}

/// Decides where a shard begins.
///
/// # Errors
/// [`StartError`].
pub fn start(shard: ShardId, known: &Known, reset: OffsetReset) -> Result<Start, StartError> {
    let lowest = known.positions.iter().flatten().min().copied();
    let all_stand = known.positions.iter().all(Option::is_some);
    let floor = known.committed.as_ref().map(floor_of);
    let (wanted, source) = match (lowest, floor) {
        (Some(position), _) if all_stand => (position, Source::Position),
        // A bucket without a position lost it, or never had one: whatever it held lies above the floor.
        (Some(position), Some(floor)) => (position.min(floor), Source::Floor),
        (None, Some(floor)) => (floor, Source::Floor),
        (Some(position), None) => (position, Source::Position),
        (None, None) => match (known.taken_over, reset) {
            (Some(offset), _) => (offset, Source::StartGroup),
            (None, OffsetReset::Earliest) => (known.extent.low, Source::OffsetReset),
            (None, OffsetReset::Latest) => (known.extent.high, Source::OffsetReset),
            (None, OffsetReset::None) => return Err(StartError::NowhereToBegin { shard }),
        },
    };
    if wanted > known.extent.high {
        return Err(StartError::AboveEnd {
            shard,
            position: wanted,
            end: known.extent.high,
        });
    }
    let offset = wanted.max(known.extent.low);
    Ok(Start {
        offset,
        source,
        missing: offset - wanted,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARD: ShardId = ShardId(3);

    fn known(
        positions: &[Option<u64>],
        committed: Option<(u64, &str)>,
        taken_over: Option<u64>,
    ) -> Known {
        Known {
            positions: positions.to_vec(),
            committed: committed.map(|(offset, metadata)| Committed {
                offset,
                metadata: metadata.to_owned(),
            }),
            taken_over,
            extent: Extent {
                low: 100,
                high: 200,
            },
        }
    }

    #[test]
    fn a_position_wins_then_the_floor_then_the_group_to_take_over_from_then_the_reset() {
        let rows = [
            (
                known(&[Some(150)], Some((190, "floor=110")), Some(105)),
                150,
                Source::Position,
                0,
            ),
            (
                known(&[Some(150), Some(140)], None, None),
                140,
                Source::Position,
                0,
            ),
            (
                known(&[Some(150), None], Some((160, "floor=120")), None),
                120,
                Source::Floor,
                0,
            ),
            (
                known(&[Some(150), None], None, None),
                150,
                Source::Position,
                0,
            ),
            (
                known(&[None], Some((160, "floor=120")), Some(105)),
                120,
                Source::Floor,
                0,
            ),
            (
                known(&[None], Some((160, "by another tool")), None),
                160,
                Source::Floor,
                0,
            ),
            (
                known(&[None], Some((160, "floor=170")), None),
                160,
                Source::Floor,
                0,
            ),
            (known(&[None], None, Some(105)), 105, Source::StartGroup, 0),
            (known(&[None], None, None), 100, Source::OffsetReset, 0),
            (known(&[Some(60)], None, None), 100, Source::Position, 40),
            (known(&[Some(200)], None, None), 200, Source::Position, 0),
        ];
        for (known, offset, source, missing) in rows {
            assert_eq!(
                start(SHARD, &known, OffsetReset::Earliest),
                Ok(Start {
                    offset,
                    source,
                    missing
                }),
                "{known:?}"
            );
        }
        let nothing = known(&[None], None, None);
        assert_eq!(
            start(SHARD, &nothing, OffsetReset::Latest).unwrap().offset,
            200
        );
        assert_eq!(
            start(SHARD, &nothing, OffsetReset::None),
            Err(StartError::NowhereToBegin { shard: SHARD })
        );
    }

    #[test]
    fn a_position_above_the_end_is_refused() {
        let error = start(
            SHARD,
            &known(&[Some(201)], None, None),
            OffsetReset::Earliest,
        );
        assert_eq!(
            error,
            Err(StartError::AboveEnd {
                shard: SHARD,
                position: 201,
                end: 200
            })
        );
    }

    #[test]
    fn a_floor_reads_back() {
        let committed = Committed {
            offset: 9,
            metadata: floor_metadata(7),
        };
        assert_eq!(floor_of(&committed), 7);
    }
}
