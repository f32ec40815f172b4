//! Names of things in Redis.
//!
//! In:     shard, bucket, project, trace id of any text; members as they stand in a queue.
//! Out:    keys, all of a bucket under the one hash tag `{S.B}`.
//! Keeps:  other traces have other keys; no trace text can change the hash tag; a trace stays in its bucket.
//! Knows:  the layout of keys. Pure.
//! Source: docs/store.md 1.

use std::fmt;

use shared::{
    config,
    ids::{ProjectId, TraceId},
    shard::{BucketId, ShardId, SliceId},
};

/// The longest trace id that stands in keys as it is. Units: bytes.
const TRACE_TEXT_MAX: usize = 128;
/// How every key of a bucket begins.
const PREFIX: &[u8] = b"span-buf:{";
/// Bytes of a hash tag, as a rule.
const HASH_TAG_USUAL: usize = 16;
/// A blake3 hash in hex digits.
const HASH_DIGITS: usize = 64;

/// A bucket of a shard: what lies on one node together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bucket {
    /// The slice, where several Spanbufs share a store.
    pub slice: Option<SliceId>,
    /// The shard.
    pub shard: ShardId,
    /// Which of its buckets.
    pub bucket: BucketId,
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&hash_tag(*self)))
    }
}

/// How each shard of a slice is cut into buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buckets {
    slice: Option<SliceId>,
    count: u32,
}

impl Buckets {
    /// That many buckets a shard, at least one.
    #[must_use]
    pub fn new(slice: Option<SliceId>, count: u32) -> Self {
        Self {
            slice,
            count: count.max(1),
        }
    }

    /// The same slice, cut into another number.
    #[must_use]
    pub fn of_count(self, count: u32) -> Self {
        Self::new(self.slice, count)
    }

    /// The slice.
    #[must_use]
    pub fn slice(self) -> Option<SliceId> {
        self.slice
    }

    /// How many buckets a shard has.
    #[must_use]
    pub fn count(self) -> u32 {
        self.count
    }

    /// A shard's first bucket, which counts for the shard.
    #[must_use]
    pub fn first(self, shard: ShardId) -> Bucket {
        self.numbered(shard, 0)
    }

    /// All buckets of a shard.
    pub fn of_shard(self, shard: ShardId) -> impl Iterator<Item = Bucket> {
        (0..self.count).map(move |bucket| self.numbered(shard, bucket))
    }

    /// The bucket of a trace: by the hash of `<project>:<trace>`, the same in every version and on every machine.
    #[must_use]
    pub fn of_trace(self, shard: ShardId, project: ProjectId, trace: &TraceId) -> Bucket {
        let bucket = match self.count {
            1 => 0,
            count => spread(project, trace, count),
        };
        self.numbered(shard, bucket)
    }

    fn numbered(self, shard: ShardId, bucket: u32) -> Bucket {
        Bucket {
            slice: self.slice,
            shard,
            bucket: BucketId(bucket),
        }
    }
}

impl From<&config::Redis> for Buckets {
    fn from(redis: &config::Redis) -> Self {
        Self::new(redis.slice, redis.buckets)
    }
}

fn spread(project: ProjectId, trace: &TraceId, buckets: u32) -> u32 {
    let mut text = start_of_member(project, b':');
    trace.write_to(&mut text);
    let [a, b, c, d, ..] = *blake3::hash(&text).as_bytes();
    u32::from_le_bytes([a, b, c, d]) % buckets
}

/// A trace as it stands in keys and queues: `<project>:<trace>`, or `<project>#<hash of the trace id>` when that id is over 128 bytes.
/// A project is digits only, so the first other byte tells which: no trace id can pass for the hash of another.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Member {
    bytes: Box<[u8]>,
    project: ProjectId,
}

impl Member {
    /// The member of a trace.
    #[must_use]
    pub fn new(project: ProjectId, trace: &TraceId) -> Self {
        let mut bytes = start_of_member(project, b':');
        let start = bytes.len();
        trace.write_to(&mut bytes);
        if bytes.len() - start > TRACE_TEXT_MAX {
            let hash = blake3::hash(&bytes[start..]).to_hex();
            bytes = start_of_member(project, b'#');
            bytes.extend_from_slice(hash.as_bytes());
        }
        Self {
            bytes: bytes.into(),
            project,
        }
    }

    /// Reads what stands in a queue; `None` when no trace is written that way.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (digits, rest) = bytes.split_at(bytes.iter().position(|byte| !byte.is_ascii_digit())?);
        let project = ProjectId(std::str::from_utf8(digits).ok()?.parse().ok()?);
        let (&mark, trace) = rest.split_first()?;
        let legal = match mark {
            b':' => trace.len() <= TRACE_TEXT_MAX,
            b'#' => {
                trace.len() == HASH_DIGITS
                    && trace
                        .iter()
                        .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
            }
            _ => false,
        };
        let shortest = digits.len() == 1 || digits.first() != Some(&b'0');
        (legal && shortest).then(|| Self {
            bytes: bytes.into(),
            project,
        })
    }

    /// As it stands in keys and queues.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The project.
    #[must_use]
    pub fn project(&self) -> ProjectId {
        self.project
    }

    /// The text behind the project and its mark: the trace id, or the hash of a long one in hex digits.
    #[must_use]
    pub fn trace(&self) -> &[u8] {
        let digits = self
            .bytes
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .count();
        self.bytes.get(digits + 1..).unwrap_or_default()
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Enough for any project with 32 hex digits, or with a hash.
        const SHOWN: usize = 96;
        let cut = &self.bytes[..self.bytes.len().min(SHOWN)];
        write!(f, "{}", cut.escape_ascii())?;
        if self.bytes.len() > SHOWN {
            write!(f, "…({} bytes)", self.bytes.len())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The project and a mark, with room for a usual trace id.
fn start_of_member(project: ProjectId, mark: u8) -> Vec<u8> {
    let digits = project.to_string();
    let mut bytes = Vec::with_capacity(digits.len() + 1 + HASH_DIGITS);
    bytes.extend_from_slice(digits.as_bytes());
    bytes.push(mark);
    bytes
}

/// Instance id, layout version and number of buckets: the one key of a slice without a bucket.
#[must_use]
pub fn meta_key(slice: Option<SliceId>) -> Vec<u8> {
    match slice {
        Some(slice) => format!("span-buf:meta:{slice}").into_bytes(),
        None => b"span-buf:meta".to_vec(),
    }
}

/// The journal of a trace: a hash of entry headers and chunks.
#[must_use]
pub fn journal_key(bucket: Bucket, member: &Member) -> Vec<u8> {
    let member = member.as_bytes();
    let mut key = begun_key(bucket, 2 + member.len());
    key.extend_from_slice(b"t:");
    key.extend_from_slice(member);
    key
}

/// The queue of a bucket: members by when to look at them.
#[must_use]
pub fn queue_key(bucket: Bucket) -> Vec<u8> {
    key(bucket, "q")
}

/// The position of a bucket: how far its input is inserted.
#[must_use]
pub fn position_key(bucket: Bucket) -> Vec<u8> {
    key(bucket, "pos")
}

/// The sum of a bucket: what left it, by way.
#[must_use]
pub fn sum_key(bucket: Bucket) -> Vec<u8> {
    key(bucket, "sum")
}

fn key(bucket: Bucket, kind: &str) -> Vec<u8> {
    let mut key = begun_key(bucket, kind.len());
    key.extend_from_slice(kind.as_bytes());
    key
}

/// The part that all keys of a bucket share, with room for the rest. The hash tag comes first, so that a brace of a trace id lies behind
/// it. Several keys are made for each trace: they are not formatted.
fn begun_key(bucket: Bucket, rest: usize) -> Vec<u8> {
    let tag = hash_tag(bucket);
    let mut key = Vec::with_capacity(PREFIX.len() + tag.len() + 2 + rest);
    key.extend_from_slice(PREFIX);
    key.extend_from_slice(&tag);
    key.extend_from_slice(b"}:");
    key
}

/// What Redis Cluster hashes of a bucket's keys.
pub(crate) fn hash_tag(bucket: Bucket) -> Vec<u8> {
    let mut tag = Vec::with_capacity(HASH_TAG_USUAL);
    let mut digits = itoa::Buffer::new();
    if let Some(SliceId(slice)) = bucket.slice {
        tag.extend_from_slice(digits.format(slice).as_bytes());
        tag.push(b'-');
    }
    tag.extend_from_slice(digits.format(bucket.shard.0).as_bytes());
    tag.push(b'.');
    tag.extend_from_slice(digits.format(bucket.bucket.0).as_bytes());
    tag
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    const BUCKET: Bucket = Bucket {
        slice: None,
        shard: ShardId(7),
        bucket: BucketId(3),
    };

    /// Ids that try to pass for others: marks, braces, digits, hashes, any bytes, any length around the limit.
    fn trace() -> impl Strategy<Value = Vec<u8>> {
        let tricky = prop_oneof![
            Just(b'{'),
            Just(b'}'),
            Just(b':'),
            Just(b'#'),
            Just(0),
            Just(b'1')
        ];
        prop_oneof![
            vec(tricky, 0..12),
            vec(any::<u8>(), 0..140),
            Just(vec![b'x'; 500]),
            any::<u128>().prop_map(|id| format!("{id:032x}").into_bytes()),
            any::<u8>().prop_map(|seed| blake3::hash(&[seed; 500]).to_hex().as_bytes().to_vec()),
        ]
    }

    fn member(project: u64, trace: &[u8]) -> Member {
        Member::new(ProjectId(project), &TraceId::new(trace))
    }

    /// What Redis hashes: between the first `{` and the first `}` behind it.
    fn hash_tag(key: &[u8]) -> &[u8] {
        let open = key.iter().position(|&byte| byte == b'{').unwrap() + 1;
        let length = key[open..].iter().position(|&byte| byte == b'}').unwrap();
        &key[open..open + length]
    }

    #[test]
    fn keys_are_as_documented() {
        let trace = b"0123456789abcdef0123456789abcdef";
        assert_eq!(
            journal_key(BUCKET, &member(42, trace)),
            b"span-buf:{7.3}:t:42:0123456789abcdef0123456789abcdef"
        );
        assert_eq!(queue_key(BUCKET), b"span-buf:{7.3}:q");
        assert_eq!(position_key(BUCKET), b"span-buf:{7.3}:pos");
        assert_eq!(sum_key(BUCKET), b"span-buf:{7.3}:sum");
        let sliced = Bucket {
            slice: Some(SliceId(2)),
            ..BUCKET
        };
        assert_eq!(queue_key(sliced), b"span-buf:{2-7.3}:q");
        assert_eq!(meta_key(None), b"span-buf:meta");
        assert_eq!(meta_key(Some(SliceId(2))), b"span-buf:meta:2");
    }

    #[test]
    fn long_ids_stand_as_their_hash() {
        assert_eq!(member(1, &[b'x'; 128]).as_bytes().len(), 130);
        let long = member(1, &[b'x'; 129]);
        let hash = blake3::hash(&[b'x'; 129]).to_hex();
        assert_eq!(long.as_bytes(), format!("1#{hash}").as_bytes());
        assert_ne!(long, member(1, hash.as_bytes()));
        assert_ne!(long, member(1, &[b'x'; 130]));
    }

    #[test]
    fn the_trace_stands_behind_the_mark() {
        let long = [b'x'; 129];
        let hash = blake3::hash(&long).to_hex();
        let rows: [(&[u8], &[u8]); 6] = [
            (b"abc", b"abc"),
            (b"", b""),
            (b"42", b"42"),
            (b":#1", b":#1"),
            (&long[..128], &long[..128]),
            (&long, hash.as_bytes()),
        ];
        for (trace, text) in rows {
            assert_eq!(member(42, trace).trace(), text, "{}", trace.escape_ascii());
        }
    }

    #[test]
    fn what_is_no_member_is_refused() {
        let long = [b"1:".to_vec(), vec![b'x'; 129]].concat();
        let upper = [b"1#".to_vec(), vec![b'A'; 64]].concat();
        let rows: [&[u8]; 12] = [
            b"",
            b"1",
            b":",
            b":a",
            b"a:b",
            b"-1:a",
            b"+1:a",
            b"01:a",
            b"18446744073709551616:a",
            b"1#abc",
            &long,
            &upper,
        ];
        for bytes in rows {
            assert_eq!(Member::parse(bytes), None, "{}", bytes.escape_ascii());
        }
        assert_eq!(Member::parse(b"0:").unwrap(), member(0, b""));
    }

    #[test]
    fn members_are_shown_escaped_and_short() {
        assert_eq!(member(5, b"a\n\xff").to_string(), "5:a\\n\\xff");
        assert_eq!(
            format!("{:?}", member(5, &[b'x'; 128])),
            format!("5:{}…(130 bytes)", "x".repeat(94))
        );
    }

    #[test]
    fn buckets_are_the_same_in_every_version() {
        let rows: [(u64, &[u8], u32, u32); 5] = [
            (1, b"0123456789abcdef0123456789abcdef", 1, 0),
            (1, b"0123456789abcdef0123456789abcdef", 16, 12),
            (2, b"0123456789abcdef0123456789abcdef", 16, 15),
            (1, b"", 1000, 369),
            (u64::MAX, &[b'x'; 500], 1000, 784),
        ];
        for (project, trace, buckets, bucket) in rows {
            assert_eq!(
                Buckets::new(None, buckets).of_trace(
                    ShardId(3),
                    ProjectId(project),
                    &TraceId::new(trace),
                ),
                Bucket {
                    slice: None,
                    shard: ShardId(3),
                    bucket: BucketId(bucket)
                }
            );
        }
    }

    proptest! {
        #[test]
        fn other_traces_have_other_members(one in (0..12_u64, trace()), other in (0..12_u64, trace())) {
            let (first, second) = (member(one.0, &one.1), member(other.0, &other.1));
            prop_assert_eq!(one == other, first == second);
            prop_assert_eq!(one == other, first.as_bytes() == second.as_bytes());
            prop_assert_eq!(one == other, journal_key(BUCKET, &first) == journal_key(BUCKET, &second));
        }

        #[test]
        fn members_parse_back(project: u64, trace in trace()) {
            let member = member(project, &trace);
            prop_assert_eq!(member.project(), ProjectId(project));
            prop_assert_eq!(Member::parse(member.as_bytes()), Some(member));
        }

        #[test]
        fn any_bytes_are_a_member_or_none(bytes in "[0-9]{0,3}[:#]".prop_map(String::into_bytes), text in trace()) {
            for bytes in [[bytes, text.clone()].concat(), text] {
                if let Some(member) = Member::parse(&bytes) {
                    prop_assert_eq!(member.as_bytes(), &bytes);
                }
            }
        }

        #[test]
        fn no_trace_changes_the_hash_tag(slice: Option<u32>, shard: u32, bucket: u32, project: u64, trace in trace()) {
            let bucket = Bucket { slice: slice.map(SliceId), shard: ShardId(shard), bucket: BucketId(bucket) };
            let tag = bucket.to_string().into_bytes();
            let keys = [journal_key(bucket, &member(project, &trace)), queue_key(bucket), position_key(bucket), sum_key(bucket)];
            for key in &keys {
                prop_assert_eq!(hash_tag(key), &tag);
            }
            prop_assert!(!keys[1..].contains(&keys[0]));
        }

        #[test]
        fn buckets_stay_in_range(project: u64, trace in trace(), buckets: u32) {
            let bucket = Buckets::new(None, buckets).of_trace(ShardId(1), ProjectId(project), &TraceId::new(&trace));
            prop_assert!(bucket.bucket.0 < buckets.max(1));
        }
    }
}
