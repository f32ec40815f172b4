//! Chunks: the payloads of one entry, packed, with what the output needs to know of each.
//!
//! In:     raw JSONs and the positions found while parsing; values of a journal, which may be any bytes.
//! Out:    one value; its spans again, byte for byte, or what is wrong with it.
//! Keeps:  no byte that changed in between is taken for a span; a false length allocates nothing beyond the caller's bound.
//! Knows:  the codecs and the layout of the table. Pure.
//! Source: docs/store.md 1.

use std::{cell::RefCell, ops::Range};

use shared::config::Compression;
use xxhash_rust::xxh3::xxh3_64;
use zstd::bulk::{Compressor, Decompressor};

use crate::varint::{self, Reader};

/// Where a span's JSON is edited on its way out; positions are bytes from its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Splice {
    /// Just behind the value of `span_id`.
    pub span_id_end: u32,
    /// The value of `is_segment`, when the key is there.
    pub is_segment: Option<Range<u32>>,
    /// Where the segment id goes.
    pub segment: SegmentPlace,
}

/// Where the segment id of a span stands, or goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SegmentPlace {
    /// The attribute has a value: it is not edited.
    Known,
    /// The attribute is there without a value: its JSON value is replaced.
    Attribute(Range<u32>),
    /// `attributes` is an object without it: it is put in at this byte, right behind the `{`.
    Object {
        /// The byte behind the `{`.
        at: u32,
        /// Whether the object is empty, so that no comma follows.
        empty: bool,
    },
    /// `attributes` is null or no object: its value is replaced.
    Attributes(Range<u32>),
    /// There is no `attributes`: it is made behind the value of `span_id`.
    Missing,
}

/// How the payloads of a chunk are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// As they are.
    None,
    /// LZ4 block.
    Lz4,
    /// One zstd frame.
    Zstd,
}

impl From<Compression> for Codec {
    fn from(compression: Compression) -> Self {
        match compression {
            Compression::None => Self::None,
            Compression::Lz4 => Self::Lz4,
            Compression::Zstd => Self::Zstd,
        }
    }
}

/// Why a chunk is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// Another version wrote it.
    #[error(
        "read chunk codec={0}: this codec is not known (check that all workers run the same release)"
    )]
    UnknownCodec(u8),
    /// It is packed with a dictionary, which this version does not read.
    #[error(
        "read chunk dictionary={0}: dictionaries are not known (check that all workers run the same release)"
    )]
    UnknownDictionary(u32),
    /// It is not what was written.
    #[error("read chunk: {0} (check what else writes to this redis)")]
    Damaged(ChunkDamage),
}

/// What is wrong with the bytes of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChunkDamage {
    /// Bytes are missing, or have changed.
    #[error("its checksum does not match")]
    Checksum,
    /// The table of spans is cut short, or a number is malformed.
    #[error("its table of spans is malformed")]
    Table,
    /// A chunk holds one span at least.
    #[error("it has no span")]
    NoSpan,
    /// An edit lies beyond its span, or within another edit.
    #[error("the edits of a span are out of place")]
    Splice,
    /// The payloads are longer than the entry header says.
    #[error("its payloads are longer than its entry header says")]
    TooLong,
    /// The payloads do not unpack to the length in the table.
    #[error("its payloads do not unpack")]
    Body,
}

/// The spans of an entry.
#[derive(Clone, Debug)]
pub struct Chunk {
    payloads: Vec<u8>,
    rows: Vec<Row>,
}

/// One span of a chunk: it begins where the one before ends.
#[derive(Clone, Debug)]
struct Row {
    end: usize,
    splice: Splice,
}

impl Chunk {
    /// The JSON and the edits of each span, in the order in which they were written. All edits lie within their span, none within another.
    pub fn spans(&self) -> impl ExactSizeIterator<Item = (&[u8], &Splice)> {
        let mut start = 0;
        self.rows.iter().map(move |row| {
            let json = &self.payloads[start..row.end];
            start = row.end;
            (json, &row.splice)
        })
    }

    /// How many spans it holds: never zero.
    #[expect(clippy::len_without_is_empty, reason = "a chunk is never empty")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }
}

// 0 to 3 were these with a part of a blake3 hash behind them: no chunk of ours any more.
const NONE: u8 = 4;
const LZ4: u8 = 5;
const ZSTD: u8 = 6;
/// Reserved: zstd with a dictionary, whose number follows the codec.
const ZSTD_DICTIONARY: u8 = 7;

/// The lowest: ingest pays for it span by span, and the repeated keys of JSON are found at any level.
const ZSTD_LEVEL: i32 = 1;

thread_local! {
    // To make a context takes longer than to use it for an entry of some spans, so each thread keeps its own. They carry nothing over.
    static PACKER: RefCell<Option<Compressor<'static>>> = RefCell::new(Compressor::new(ZSTD_LEVEL).ok());
    static UNPACKER: RefCell<Decompressor<'static>> = RefCell::new(Decompressor::default());
}

/// The end of a chunk: half of the 64 bits of XXH3 over all before it. Four bytes tell all but one in four billion damaged chunks;
/// whoever damages them on purpose can write any chunk, so a hash that withstands that would be paid for in vain.
const CHECKSUM: usize = 4;

/// Packs spans, which must be one at least. What does not become smaller is stored as it is: that costs nothing to read.
#[must_use]
pub fn encode(codec: Codec, spans: &[(&[u8], &Splice)]) -> Vec<u8> {
    let length: usize = spans.iter().map(|(json, _)| json.len()).sum();
    let packed = pack(codec, spans, length);
    let room = packed.as_ref().map_or(length, |(_, body)| body.len());
    let mut out = Vec::with_capacity(1 + 4 + 16 * spans.len() + room + CHECKSUM);
    out.push(packed.as_ref().map_or(NONE, |(code, _)| *code));
    put_table(&mut out, spans);
    match packed {
        Some((_, body)) => out.extend_from_slice(&body),
        None => spans
            .iter()
            .for_each(|(json, _)| out.extend_from_slice(json)),
    }
    let checksum = checksum(&out);
    out.extend_from_slice(&checksum);
    out
}

/// The payloads in one piece and smaller, with the code of what did it.
fn pack(codec: Codec, spans: &[(&[u8], &Splice)], length: usize) -> Option<(u8, Vec<u8>)> {
    let (code, body) = match codec {
        Codec::None => return None,
        Codec::Lz4 => (LZ4, lz4_flex::block::compress(&joined(spans, length))),
        Codec::Zstd => (
            ZSTD,
            PACKER
                .with_borrow_mut(|packer| packer.as_mut()?.compress(&joined(spans, length)).ok())?,
        ),
    };
    (body.len() < length).then_some((code, body))
}

fn joined(spans: &[(&[u8], &Splice)], length: usize) -> Vec<u8> {
    let mut payloads = Vec::with_capacity(length);
    spans
        .iter()
        .for_each(|(json, _)| payloads.extend_from_slice(json));
    payloads
}

/// Unpacks a chunk of any bytes.
///
/// Units: `max_bytes` bounds the payloads before compression; no more is ever allocated for them.
pub fn decode(bytes: &[u8], max_bytes: u64) -> Result<Chunk, ChunkError> {
    // Before the checksum: a codec of another version may have another one.
    let known = NONE..=ZSTD_DICTIONARY;
    if let Some(&code) = bytes.first().filter(|code| !known.contains(code)) {
        return Err(ChunkError::UnknownCodec(code));
    }
    let content = intact(bytes).ok_or(ChunkError::Damaged(ChunkDamage::Checksum))?;
    let mut reader = Reader::new(content);
    let code = reader.byte().unwrap_or(NONE);
    if code == ZSTD_DICTIONARY {
        let dictionary = reader
            .number()
            .and_then(|number| u32::try_from(number).ok());
        return Err(dictionary.map_or(
            ChunkError::Damaged(ChunkDamage::Table),
            ChunkError::UnknownDictionary,
        ));
    }
    read(code, &mut reader, max_bytes).map_err(ChunkError::Damaged)
}

/// All but the checksum, when that is right.
fn intact(bytes: &[u8]) -> Option<&[u8]> {
    let (content, sum) = bytes.split_last_chunk::<CHECKSUM>()?;
    (!content.is_empty() && checksum(content) == *sum).then_some(content)
}

fn checksum(content: &[u8]) -> [u8; CHECKSUM] {
    let [.., a, b, c, d] = xxh3_64(content).to_be_bytes();
    [a, b, c, d]
}

fn read(code: u8, reader: &mut Reader<'_>, max_bytes: u64) -> Result<Chunk, ChunkDamage> {
    let rows = read_table(reader)?;
    let length = rows.last().map_or(0, |row| row.end);
    if u64::try_from(length).map_or(true, |length| length > max_bytes) {
        return Err(ChunkDamage::TooLong);
    }
    let payloads = unpack(code, reader.rest(), length).ok_or(ChunkDamage::Body)?;
    Ok(Chunk { payloads, rows })
}

/// The payloads, when they are `length` bytes.
fn unpack(code: u8, body: &[u8], length: usize) -> Option<Vec<u8>> {
    if code == NONE {
        return (body.len() == length).then(|| body.to_vec());
    }
    if code == LZ4 {
        // A byte of LZ4 stands for 255 at most.
        let mut payloads = if length / 255 > body.len() {
            return None;
        } else {
            vec![0; length]
        };
        let written = lz4_flex::block::decompress_into(body, &mut payloads).ok()?;
        return (written == length).then_some(payloads);
    }
    // Zstd has no such limit: room is asked for, not used, before there is something to write.
    let mut payloads = Vec::new();
    payloads.try_reserve_exact(length).ok()?;
    UNPACKER
        .with_borrow_mut(|unpacker| unpacker.decompress_to_buffer(body, &mut payloads))
        .ok()?;
    (payloads.len() == length).then_some(payloads)
}

// The table: number of spans; per span: length · marks · end of `span_id` · start and length of `is_segment`, if marked · place of
// the segment id. Numbers are varints. It is not compressed: some ten bytes a span, in which there is little to find, and with it at
// hand the length of the payloads is known before anything is unpacked.
const IS_SEGMENT: u8 = 1;
const KNOWN: u8 = 0;
const ATTRIBUTE: u8 = 2;
const OBJECT: u8 = 4;
const OBJECT_EMPTY: u8 = 6;
const ATTRIBUTES: u8 = 8;
const MISSING: u8 = 10;

fn put_table(out: &mut Vec<u8>, spans: &[(&[u8], &Splice)]) {
    put_size(out, spans.len());
    for (json, splice) in spans {
        put_size(out, json.len());
        let place = match &splice.segment {
            SegmentPlace::Known => KNOWN,
            SegmentPlace::Attribute(_) => ATTRIBUTE,
            SegmentPlace::Object { empty: false, .. } => OBJECT,
            SegmentPlace::Object { empty: true, .. } => OBJECT_EMPTY,
            SegmentPlace::Attributes(_) => ATTRIBUTES,
            SegmentPlace::Missing => MISSING,
        };
        out.push(
            place
                | if splice.is_segment.is_some() {
                    IS_SEGMENT
                } else {
                    0
                },
        );
        varint::put(out, splice.span_id_end.into());
        if let Some(value) = &splice.is_segment {
            put_range(out, value);
        }
        match &splice.segment {
            SegmentPlace::Known | SegmentPlace::Missing => {}
            SegmentPlace::Attribute(value) | SegmentPlace::Attributes(value) => {
                put_range(out, value)
            }
            SegmentPlace::Object { at, .. } => varint::put(out, (*at).into()),
        }
    }
}

fn put_size(out: &mut Vec<u8>, size: usize) {
    varint::put(out, u64::try_from(size).unwrap_or(u64::MAX));
}

fn put_range(out: &mut Vec<u8>, range: &Range<u32>) {
    varint::put(out, range.start.into());
    varint::put(out, range.end.wrapping_sub(range.start).into());
}

fn read_table(reader: &mut Reader<'_>) -> Result<Vec<Row>, ChunkDamage> {
    let count = reader.number().ok_or(ChunkDamage::Table)?;
    if count == 0 {
        return Err(ChunkDamage::NoSpan);
    }
    // No row is shorter than three bytes, so the bytes at hand bound what is allocated.
    let count = usize::try_from(count)
        .ok()
        .filter(|&count| count <= reader.rest().len() / 3)
        .ok_or(ChunkDamage::Table)?;
    let mut rows = Vec::with_capacity(count);
    let mut end = 0_usize;
    for _ in 0..count {
        let length = reader.number().ok_or(ChunkDamage::Table)?;
        let splice = read_splice(reader).ok_or(ChunkDamage::Table)?;
        if !is_in_place(&splice, length) {
            return Err(ChunkDamage::Splice);
        }
        end = usize::try_from(length)
            .ok()
            .and_then(|length| end.checked_add(length))
            .ok_or(ChunkDamage::TooLong)?;
        rows.push(Row { end, splice });
    }
    Ok(rows)
}

fn read_splice(reader: &mut Reader<'_>) -> Option<Splice> {
    let marks = reader.byte()?;
    let span_id_end = read_position(reader)?;
    let is_segment = if marks & IS_SEGMENT == 0 {
        None
    } else {
        Some(read_range(reader)?)
    };
    let segment = match marks & !IS_SEGMENT {
        KNOWN => SegmentPlace::Known,
        ATTRIBUTE => SegmentPlace::Attribute(read_range(reader)?),
        OBJECT => SegmentPlace::Object {
            at: read_position(reader)?,
            empty: false,
        },
        OBJECT_EMPTY => SegmentPlace::Object {
            at: read_position(reader)?,
            empty: true,
        },
        ATTRIBUTES => SegmentPlace::Attributes(read_range(reader)?),
        MISSING => SegmentPlace::Missing,
        _ => return None,
    };
    Some(Splice {
        span_id_end,
        is_segment,
        segment,
    })
}

fn read_position(reader: &mut Reader<'_>) -> Option<u32> {
    u32::try_from(reader.number()?).ok()
}

fn read_range(reader: &mut Reader<'_>) -> Option<Range<u32>> {
    let start = read_position(reader)?;
    Some(start..start.checked_add(read_position(reader)?)?)
}

/// Whether all edits lie within the span and none within another. Their order is that of the keys in the JSON: any.
fn is_in_place(splice: &Splice, length: u64) -> bool {
    let span_id = splice.span_id_end..splice.span_id_end;
    let is_segment = splice.is_segment.as_ref().unwrap_or(&span_id);
    let segment = match &splice.segment {
        SegmentPlace::Attribute(value) | SegmentPlace::Attributes(value) => value.clone(),
        SegmentPlace::Object { at, .. } => *at..*at,
        SegmentPlace::Known | SegmentPlace::Missing => span_id.clone(),
    };
    let edits = [&span_id, is_segment, &segment];
    edits.iter().all(|edit| u64::from(edit.end) <= length)
        && apart(&span_id, is_segment)
        && apart(&span_id, &segment)
        && apart(is_segment, &segment)
}

fn apart(one: &Range<u32>, other: &Range<u32>) -> bool {
    one.end <= other.start || other.end <= one.start
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*, sample::Index};

    const CODECS: [Codec; 3] = [Codec::None, Codec::Lz4, Codec::Zstd];

    /// Any bytes, or bytes that compress.
    fn json() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            vec(any::<u8>(), 0..200),
            (vec(any::<u8>(), 0..20), 0..300_usize).prop_map(|(part, times)| part.repeat(times)),
        ]
    }

    /// The edits of a span: cuts in ascending order, dealt to the edits in any order.
    fn splice(length: usize) -> impl Strategy<Value = Splice> {
        let length = u32::try_from(length).unwrap();
        let order = Just([0, 1, 2]).prop_shuffle();
        (
            vec(0..=length, 6),
            order,
            any::<bool>(),
            any::<bool>(),
            0..5,
        )
            .prop_map(|(mut cuts, order, marked, empty, place)| {
                cuts.sort_unstable();
                let range = |edit: usize| cuts[2 * order[edit]]..cuts[2 * order[edit] + 1];
                let segment = match place {
                    0 => SegmentPlace::Known,
                    1 => SegmentPlace::Attribute(range(2)),
                    2 => SegmentPlace::Object {
                        at: range(2).start,
                        empty,
                    },
                    3 => SegmentPlace::Attributes(range(2)),
                    _ => SegmentPlace::Missing,
                };
                Splice {
                    span_id_end: range(0).start,
                    is_segment: marked.then(|| range(1)),
                    segment,
                }
            })
    }

    fn spans() -> impl Strategy<Value = Vec<(Vec<u8>, Splice)>> {
        vec(
            json().prop_flat_map(|json| {
                (splice(json.len()), Just(json)).prop_map(|(splice, json)| (json, splice))
            }),
            1..8,
        )
    }

    fn written(codec: Codec, spans: &[(Vec<u8>, Splice)]) -> Vec<u8> {
        encode(
            codec,
            &spans
                .iter()
                .map(|(json, splice)| (json.as_slice(), splice))
                .collect::<Vec<_>>(),
        )
    }

    fn total(spans: &[(Vec<u8>, Splice)]) -> u64 {
        spans.iter().map(|(json, _)| json.len() as u64).sum()
    }

    fn content(chunk: &Chunk) -> Vec<(Vec<u8>, Splice)> {
        chunk
            .spans()
            .map(|(json, splice)| (json.to_vec(), splice.clone()))
            .collect()
    }

    fn sealed(mut content: Vec<u8>) -> Vec<u8> {
        let sum = checksum(&content);
        content.extend_from_slice(&sum);
        content
    }

    fn damage(content: Vec<u8>, max_bytes: u64) -> ChunkDamage {
        match decode(&sealed(content), max_bytes) {
            Err(ChunkError::Damaged(damage)) => damage,
            other => panic!("{other:?}"),
        }
    }

    const PLAIN: Splice = Splice {
        span_id_end: 0,
        is_segment: None,
        segment: SegmentPlace::Missing,
    };

    #[test]
    fn the_layout_is_fixed() {
        let splice = Splice {
            span_id_end: 3,
            is_segment: Some(4..6),
            segment: SegmentPlace::Object { at: 1, empty: true },
        };
        let chunk = encode(Codec::Zstd, &[(b"abcdefg", &splice), (b"", &PLAIN)]);
        let (content, sum) = chunk.split_last_chunk::<CHECKSUM>().unwrap();
        assert_eq!(
            content,
            b"\x04\x02\x07\x07\x03\x04\x02\x01\x00\x0a\x00abcdefg"
        );
        assert_eq!(*sum, checksum(content));
        // The low half of XXH3's own word on nothing, as its specification has it.
        assert_eq!(checksum(b""), 0x38d3_94c2_u32.to_be_bytes());
        let repeated = b"abcdefgh".repeat(100);
        assert_eq!(encode(Codec::Lz4, &[(&repeated, &PLAIN)])[0], LZ4);
        assert_eq!(encode(Codec::Zstd, &[(&repeated, &PLAIN)])[0], ZSTD);
        assert_eq!(encode(Codec::None, &[(&repeated, &PLAIN)])[0], NONE);
    }

    #[test]
    fn what_another_version_writes_is_told_from_damage() {
        for code in [0, 3, 8] {
            assert_eq!(
                decode(&[code], 10).unwrap_err(),
                ChunkError::UnknownCodec(code)
            );
        }
        assert_eq!(
            decode(&[255; 9], 10).unwrap_err(),
            ChunkError::UnknownCodec(255)
        );
        assert_eq!(
            decode(&sealed(vec![ZSTD_DICTIONARY, 0x85, 1, 9, 9]), 10).unwrap_err(),
            ChunkError::UnknownDictionary(133)
        );
        assert_eq!(damage(vec![ZSTD_DICTIONARY], 10), ChunkDamage::Table);
        for bytes in [&[][..], &[4], &[7, 1], &checksum(b"")] {
            assert!(
                matches!(
                    decode(bytes, 10),
                    Err(ChunkError::Damaged(ChunkDamage::Checksum) | ChunkError::UnknownCodec(_))
                ),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn edits_out_of_place_are_refused() {
        let attribute = |range| SegmentPlace::Attribute(range);
        let rows = [
            (11, None, SegmentPlace::Known),
            (0, Some(9..11), SegmentPlace::Known),
            (0, None, attribute(9..11)),
            (0, None, SegmentPlace::Attributes(11..11)),
            (
                0,
                None,
                SegmentPlace::Object {
                    at: 11,
                    empty: false,
                },
            ),
            (0, Some(Range { start: 6, end: 5 }), SegmentPlace::Known),
            (3, Some(2..4), SegmentPlace::Known),
            (3, None, attribute(2..4)),
            (0, Some(2..6), attribute(4..8)),
            (0, Some(4..8), attribute(2..6)),
            (0, Some(2..8), attribute(4..5)),
            (0, Some(2..8), attribute(2..8)),
            (0, Some(2..8), SegmentPlace::Object { at: 5, empty: true }),
        ];
        for (span_id_end, is_segment, segment) in rows {
            let splice = Splice {
                span_id_end,
                is_segment,
                segment,
            };
            let error = decode(&encode(Codec::None, &[(b"0123456789", &splice)]), 10).unwrap_err();
            assert!(
                matches!(
                    error,
                    ChunkError::Damaged(ChunkDamage::Splice | ChunkDamage::Table)
                ),
                "{splice:?}: {error:?}"
            );
        }
    }

    #[test]
    fn false_lengths_are_refused_before_anything_is_allocated() {
        let table = |code, count, length| {
            let mut content = vec![code];
            varint::put(&mut content, count);
            varint::put(&mut content, length);
            content.extend_from_slice(&[MISSING, 0]);
            content
        };
        for code in [NONE, LZ4, ZSTD] {
            assert_eq!(
                damage(table(code, 1, 1 << 60), 1 << 20),
                ChunkDamage::TooLong
            );
            assert_eq!(
                damage(table(code, 1, u64::MAX), u64::MAX),
                ChunkDamage::Body
            );
            assert_eq!(damage(table(code, 1, 1 << 50), u64::MAX), ChunkDamage::Body);
            assert_eq!(damage(table(code, u64::MAX, 0), 10), ChunkDamage::Table);
            assert_eq!(damage(table(code, 0, 0), 10), ChunkDamage::NoSpan);
        }
        let two = encode(Codec::None, &[(&[b'x'; 6], &PLAIN), (&[b'x'; 5], &PLAIN)]);
        assert_eq!(
            decode(&two, 10).unwrap_err(),
            ChunkError::Damaged(ChunkDamage::TooLong)
        );
        assert_eq!(decode(&two, 11).unwrap().len(), 2);
    }

    #[test]
    fn a_body_of_another_length_is_refused() {
        let payload = [b'x'; 1000];
        for codec in [Codec::Lz4, Codec::Zstd] {
            let (code, body) = pack(codec, &[(&payload, &PLAIN)], payload.len()).unwrap();
            for length in [999_u64, 1001] {
                let mut content = vec![code, 1];
                varint::put(&mut content, length);
                content.extend_from_slice(&[MISSING, 0]);
                content.extend_from_slice(&body);
                assert_eq!(damage(content, 2000), ChunkDamage::Body);
                // What failed leaves nothing behind.
                let whole = encode(codec, &[(&payload, &PLAIN)]);
                assert_eq!(
                    decode(&whole, 1000).unwrap().spans().next(),
                    Some((&payload[..], &PLAIN))
                );
            }
        }
    }

    proptest! {
        #[test]
        fn chunks_round_trip(spans in spans()) {
            for codec in CODECS {
                let chunk = decode(&written(codec, &spans), total(&spans)).unwrap();
                prop_assert_eq!(chunk.len(), spans.len());
                prop_assert_eq!(content(&chunk), spans.clone());
            }
        }

        #[test]
        fn changed_and_cut_chunks_are_noticed(spans in spans(), at: Index, change in 1..=u8::MAX, cut: Index) {
            for codec in CODECS {
                let mut bytes = written(codec, &spans);
                prop_assert!(decode(&bytes[..cut.index(bytes.len())], u64::MAX).is_err());
                let at = at.index(bytes.len());
                bytes[at] ^= change;
                prop_assert!(decode(&bytes, u64::MAX).is_err());
            }
        }

        /// Behind a checksum that is right, since nothing else would get beyond it.
        #[test]
        fn any_content_is_read_or_refused(spans in spans(), changes in vec((any::<Index>(), any::<u8>()), 0..4), noise in vec(any::<u8>(), 0..60)) {
            for codec in CODECS {
                let mut bytes = written(codec, &spans);
                bytes.truncate(bytes.len() - CHECKSUM);
                for (at, byte) in &changes {
                    let at = at.index(bytes.len());
                    bytes[at] = *byte;
                }
                for content in [bytes, noise.clone()] {
                    if let Ok(chunk) = decode(&sealed(content), 1 << 20) {
                        prop_assert_eq!(chunk.spans().count(), chunk.len());
                        prop_assert!(chunk.spans().all(|(json, splice)| is_in_place(splice, json.len() as u64)));
                    }
                }
            }
            prop_assert!(decode(&noise, 1 << 20).is_err());
        }
    }
}
