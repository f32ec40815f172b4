//! Shard lists, and which worker has which shard.
//!
//! In:     text as people type it: `0-7`, `0,2,5-9`.
//! Out:    `ShardList`: sorted, distinct, never empty.
//! Keeps:  the i-th shard of a list belongs to worker i mod n, whatever the order in which it was typed.
//! Knows:  a shard is a partition of the input topic. Pure.
//! Source: docs/spec.md 7.1.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A shard: one partition of the input topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ShardId(pub u32);

/// One of the parts into which a shard's traces are spread over Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BucketId(pub u32);

/// One of several Spanbufs that share a Redis: its keys stand apart from theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SliceId(pub u32);

/// The largest shard number: topics of more partitions than this do not exist in the field.
pub const SHARD_MAX: u32 = 65_535;
/// The most shards of one supervisor: its board and its consumer stay small.
pub const SHARDS_MAX: usize = 4_096;

/// Shards in ascending order, each once, at least one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<ShardId>", into = "Vec<ShardId>")]
pub struct ShardList(Vec<ShardId>);

/// What is wrong with a list of shards, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShardListError {
    /// Nothing between two commas, or nothing at all.
    #[error("the list of shards has an empty part (write shards as 0-7 or 0,2,5-9)")]
    Empty,
    /// Not a number.
    #[error("`{0}` is no shard (write shards as 0-7 or 0,2,5-9)")]
    NoNumber(String),
    /// A range that runs backwards.
    #[error("range `{first}-{last}` is reversed (write {last}-{first})")]
    Reversed {
        /// The first number of the range.
        first: u32,
        /// The last one.
        last: u32,
    },
    /// A shard that is listed twice.
    #[error("shard {0} is listed twice (list every shard once)")]
    Duplicate(u32),
    /// A number that no topic has.
    #[error("shard {0} is too large (the largest is 65535)")]
    TooLarge(u64),
    /// More shards than one supervisor takes.
    #[error("{0} shards are too many for one supervisor (at most 4096)")]
    TooMany(u64),
}

impl ShardList {
    /// Takes shards in any order.
    ///
    /// # Errors
    /// [`ShardListError`] when there is none, one stands twice, or a limit is passed.
    pub fn new(mut shards: Vec<ShardId>) -> Result<Self, ShardListError> {
        shards.sort_unstable();
        if let Some(pair) = shards.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ShardListError::Duplicate(pair[0].0));
        }
        match shards.last() {
            None => Err(ShardListError::Empty),
            Some(last) if last.0 > SHARD_MAX => Err(ShardListError::TooLarge(last.0.into())),
            Some(_) if shards.len() > SHARDS_MAX => Err(ShardListError::TooMany(
                u64::try_from(shards.len()).unwrap_or(u64::MAX),
            )),
            Some(_) => Ok(Self(shards)),
        }
    }

    /// The shards, ascending.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = ShardId> + Clone + '_ {
        self.0.iter().copied()
    }

    /// The shards, ascending.
    #[must_use]
    pub fn as_slice(&self) -> &[ShardId] {
        &self.0
    }

    /// How many there are: never zero.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a list of shards is never empty"
    )]
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Where a shard stands in the list.
    #[must_use]
    pub fn index_of(&self, shard: ShardId) -> Option<usize> {
        self.0.binary_search(&shard).ok()
    }

    /// The shares of `workers` workers: the i-th shard belongs to worker i mod n. Workers beyond the shards get none, and are left out.
    #[must_use]
    pub fn share(&self, workers: u32) -> Vec<ShardList> {
        let workers = usize::try_from(workers)
            .unwrap_or(usize::MAX)
            .clamp(1, self.0.len());
        (0..workers)
            .map(|worker| {
                Self(
                    self.0
                        .iter()
                        .copied()
                        .skip(worker)
                        .step_by(workers)
                        .collect(),
                )
            })
            .collect()
    }

    /// The worker that has a shard, when the list is shared over `workers`.
    #[must_use]
    pub fn worker_of(&self, shard: ShardId, workers: u32) -> Option<u32> {
        let workers = usize::try_from(workers)
            .unwrap_or(usize::MAX)
            .clamp(1, self.0.len());
        u32::try_from(self.index_of(shard)? % workers).ok()
    }
}

impl From<ShardId> for ShardList {
    fn from(shard: ShardId) -> Self {
        Self(vec![shard])
    }
}

impl TryFrom<Vec<ShardId>> for ShardList {
    type Error = ShardListError;

    fn try_from(shards: Vec<ShardId>) -> Result<Self, ShardListError> {
        Self::new(shards)
    }
}

impl From<ShardList> for Vec<ShardId> {
    fn from(list: ShardList) -> Self {
        list.0
    }
}

impl FromStr for ShardList {
    type Err = ShardListError;

    fn from_str(text: &str) -> Result<Self, ShardListError> {
        let mut shards = Vec::new();
        for part in text.split(',').map(str::trim) {
            let (first, last) = range(part)?;
            let total =
                u64::try_from(shards.len()).unwrap_or(u64::MAX) + u64::from(last - first) + 1;
            if total > u64::from(SHARD_MAX) + 1 {
                return Err(ShardListError::TooMany(total));
            }
            shards.extend((first..=last).map(ShardId));
        }
        Self::new(shards)
    }
}

fn range(part: &str) -> Result<(u32, u32), ShardListError> {
    if part.is_empty() {
        return Err(ShardListError::Empty);
    }
    let (first, last) = match part.split_once('-') {
        Some((first, last)) => (number(first, part)?, number(last, part)?),
        None => (number(part, part)?, number(part, part)?),
    };
    if first > last {
        return Err(ShardListError::Reversed { first, last });
    }
    Ok((first, last))
}

fn number(digits: &str, part: &str) -> Result<u32, ShardListError> {
    let digits = digits.trim();
    if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(ShardListError::NoNumber(part.chars().take(40).collect()));
    }
    // All digits: what does not fit in 64 bits is too large as well.
    let number: u64 = digits.parse().unwrap_or(u64::MAX);
    u32::try_from(number)
        .ok()
        .filter(|&number| number <= SHARD_MAX)
        .ok_or(ShardListError::TooLarge(number))
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for SliceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for BucketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ShardList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.0.chunk_by(|before, after| before.0 + 1 == after.0);
        for (index, run) in runs.enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match run {
                [first, .., last] => write!(f, "{comma}{first}-{last}")?,
                [only] => write!(f, "{comma}{only}")?,
                [] => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn list(text: &str) -> ShardList {
        text.parse().unwrap()
    }

    #[test]
    fn ranges_and_lists_are_read_and_printed() {
        assert_eq!(list("0-7").len(), 8);
        assert_eq!(list(" 9, 0,2 ,5-7").to_string(), "0,2,5-7,9");
        assert_eq!(list("3-3").to_string(), "3");
    }

    #[test]
    fn bad_lists_say_how_to_mend_them() {
        use ShardListError::{Duplicate, Empty, NoNumber, Reversed, TooLarge, TooMany};
        let rows = [
            ("", Empty),
            ("1,,2", Empty),
            ("0-", NoNumber("0-".into())),
            ("-1", NoNumber("-1".into())),
            ("a", NoNumber("a".into())),
            ("1-2-3", NoNumber("1-2-3".into())),
            ("+1", NoNumber("+1".into())),
            ("7-0", Reversed { first: 7, last: 0 }),
            ("1,0-3", Duplicate(1)),
            ("65536", TooLarge(65_536)),
            ("99999999999999999999999", TooLarge(u64::MAX)),
            ("0-65535,0-65535", TooMany(131_072)),
            ("0-65535", TooMany(65_536)),
        ];
        for (text, error) in rows {
            assert_eq!(text.parse::<ShardList>(), Err(error), "{text}");
        }
    }

    #[test]
    fn shards_are_dealt_in_turn() {
        let shares: Vec<String> = list("0,2,4,6")
            .share(2)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(shares, ["0,4", "2,6"]);
        assert_eq!(list("0-1").share(5).len(), 2);
        assert_eq!(list("0,2,4,6").worker_of(ShardId(6), 2), Some(1));
        assert_eq!(list("0,2").worker_of(ShardId(1), 2), None);
    }

    proptest! {
        #[test]
        fn shares_hold_every_shard_once_and_differ_by_at_most_one(
            shards in proptest::collection::btree_set(0..=SHARD_MAX, 1..100), workers in 1..120_u32,
        ) {
            let list = ShardList::new(shards.into_iter().map(ShardId).collect()).unwrap();
            let shares = list.share(workers);
            let lengths: Vec<usize> = shares.iter().map(ShardList::len).collect();
            prop_assert!(lengths.iter().max().unwrap() - lengths.iter().min().unwrap() <= 1);
            for (worker, share) in shares.iter().enumerate() {
                prop_assert!(share.iter().all(|shard| list.worker_of(shard, workers) == u32::try_from(worker).ok()));
            }
            let all: Vec<ShardId> = shares.iter().flat_map(ShardList::iter).collect();
            prop_assert_eq!(&ShardList::new(all).unwrap(), &list);
            prop_assert_eq!(&list.to_string().parse::<ShardList>().unwrap(), &list);
        }
    }
}
