//! Makes the messages of one segment: orders its spans, drops repeats, edits them, cuts.
//!
//! In:     the entries of a segment with their chunks.
//! Out:    messages, one at a time, and for each entry how many of its spans are in them or repeat one that is.
//! Keeps:  every offset is counted once; no message is over the limit but that of a single span; every byte that is not edited is as it came in.
//! Knows:  entries, chunks, the form of the output. Pure.
//! Source: docs/spec.md 5.2, 5.3; docs/store.md 3.

use std::{
    collections::{HashMap, HashSet, hash_map},
    ops::Range,
};

use shared::{ids::SpanId, shard::ShardId};
use store::{
    chunk::{Chunk, SegmentPlace, Splice},
    entry::EntryHeader,
    keys::Member,
};

/// One entry with its spans, in the same order in both.
#[derive(Debug, Clone, Copy)]
pub struct LoadedEntry<'a> {
    /// Offsets and ids.
    pub header: &'a EntryHeader,
    /// Payloads.
    pub chunk: &'a Chunk,
}

/// What becomes of the spans of one entry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FieldCount {
    /// Spans that are in a message.
    pub produced: u64,
    /// Spans whose bytes are in a message already, from another offset.
    pub repeats: u64,
}

/// One message of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The JSON.
    pub payload: Vec<u8>,
    /// As it stands in the payload.
    pub flush_id: String,
    /// Which message of the segment it is, from 1.
    pub part: usize,
    /// How many there are.
    pub parts: usize,
    /// Spans in it.
    pub spans: u64,
    /// For each entry with spans in it, the entry's place and how many; by place.
    pub fields: Vec<(usize, u64)>,
}

const HEAD: &[u8] = b"{\"spans\":[";
const FLUSH_ID: &[u8] = b"],\"flush_id\":\"";
/// A flush id is half a blake3 hash: 128 bits.
const FLUSH_ID_DIGITS: usize = 32;
const END: &[u8] = b"\"}";
/// The end of every message of a segment that is cut.
const END_OF_CUT: &[u8] = b"\",\"skip_enrichment\":true}";

/// Builds the messages of one segment, each of at most `segment_bytes_max` bytes, and hands over one after the other in the order
/// of its spans: a long segment id may make them far larger than what they are made of.
///
/// Returns for each entry what becomes of its spans. An offset that lies in several entries is counted in the first of them.
#[must_use]
pub fn build(
    shard: ShardId,
    member: &Member,
    segment: &SpanId,
    entries: &[LoadedEntry<'_>],
    segment_bytes_max: u64,
    each: impl FnMut(Part),
) -> Vec<FieldCount> {
    let mut per_field = vec![FieldCount::default(); entries.len()];
    let texts = Texts::new(segment);
    let spans = without_repeats(in_order(entries), &mut per_field);
    let spans: Vec<Edited<'_>> = spans
        .into_iter()
        .map(|span| Edited::new(span, segment, &texts))
        .collect();
    let cuts = cut(&spans, segment_bytes_max);
    let parts = cuts.len();
    let end = if parts > 1 { END_OF_CUT } else { END };
    let part = |(index, place): (usize, Range<usize>)| {
        let spans = &spans[place];
        let flush_id = flush_id(shard, member, spans);
        let payload = payload(spans, &flush_id, end);
        Part {
            payload,
            flush_id,
            part: index + 1,
            parts,
            spans: count(spans.len()),
            fields: fields(spans),
        }
    };
    cuts.into_iter().enumerate().map(part).for_each(each);
    per_field
}

/// One span as it is stored.
#[derive(Clone, Copy)]
struct Stored<'a> {
    offset: u64,
    /// The place of its entry.
    field: usize,
    id: &'a SpanId,
    json: &'a [u8],
    splice: &'a Splice,
}

/// All spans by offset, each offset once: from the first of the entries that hold it.
fn in_order<'a>(entries: &[LoadedEntry<'a>]) -> Vec<Stored<'a>> {
    let spans = entries.iter().enumerate().flat_map(|(field, entry)| {
        let stored = entry.header.spans.iter().zip(entry.chunk.spans());
        stored.map(move |(at, (json, splice))| Stored {
            offset: at.offset,
            field,
            id: &at.id,
            json,
            splice,
        })
    });
    let mut spans: Vec<Stored<'_>> = spans.collect();
    spans.sort_unstable_by_key(|span| (span.offset, span.field));
    spans.dedup_by_key(|span| span.offset);
    spans
}

/// Leaves out spans whose bytes stand at a lower offset, and counts all. Equal bytes have equal ids, so bytes are hashed only where
/// an id comes again.
fn without_repeats<'a>(
    mut spans: Vec<Stored<'a>>,
    per_field: &mut [FieldCount],
) -> Vec<Stored<'a>> {
    let mut ids: HashMap<&SpanId, Option<&'a [u8]>> = HashMap::with_capacity(spans.len());
    let mut texts: HashSet<&'a [u8]> = HashSet::new();
    spans.retain(|span| {
        let is_new = match ids.entry(span.id) {
            hash_map::Entry::Vacant(vacant) => {
                vacant.insert(Some(span.json));
                true
            }
            hash_map::Entry::Occupied(mut first) => {
                texts.extend(first.get_mut().take());
                texts.insert(span.json)
            }
        };
        let FieldCount { produced, repeats } = &mut per_field[span.field];
        *(if is_new { produced } else { repeats }) += 1;
        is_new
    });
    spans
}

/// What the spans of one segment are edited with.
struct Texts {
    /// A made attribute's value.
    attribute: Vec<u8>,
    /// The attribute, first of an object that is not empty.
    in_object: Vec<u8>,
    /// The attribute, alone in an object.
    in_empty: Vec<u8>,
    /// Made attributes.
    attributes: Vec<u8>,
    /// Made attributes with their key, behind another key.
    missing: Vec<u8>,
}

impl Texts {
    fn new(segment: &SpanId) -> Self {
        let mut attribute = b"{\"type\":\"string\",\"value\":".to_vec();
        put_string(&mut attribute, &segment.to_bytes());
        attribute.push(b'}');
        let in_empty = [b"\"sentry.segment.id\":", &attribute[..]].concat();
        let attributes = [b"{", &in_empty[..], b"}"].concat();
        Self {
            in_object: [&in_empty[..], b","].concat(),
            missing: [b",\"attributes\":", &attributes[..]].concat(),
            attribute,
            in_empty,
            attributes,
        }
    }
}

/// Bytes of a span that others take the place of.
#[derive(Clone, Copy)]
struct Edit<'a> {
    start: usize,
    end: usize,
    text: &'a [u8],
}

impl<'a> Edit<'a> {
    fn new(place: &Range<u32>, text: &'a [u8]) -> Self {
        // A chunk has checked that all places lie within the span.
        let size = |position: u32| usize::try_from(position).unwrap_or(usize::MAX);
        Self {
            start: size(place.start),
            end: size(place.end),
            text,
        }
    }
}

/// One span as it goes out.
struct Edited<'a> {
    span: Stored<'a>,
    /// In the order of their places, none within another.
    edits: [Edit<'a>; 2],
    /// Its length with the edits.
    length: usize,
}

impl<'a> Edited<'a> {
    fn new(span: Stored<'a>, segment: &SpanId, texts: &'a Texts) -> Self {
        let behind_id = span.splice.span_id_end..span.splice.span_id_end;
        let is_segment = match (&span.splice.is_segment, span.id == segment) {
            (Some(value), true) => Edit::new(value, b"true"),
            (Some(value), false) => Edit::new(value, b"false"),
            (None, true) => Edit::new(&behind_id, b",\"is_segment\":true"),
            (None, false) => Edit::new(&behind_id, b",\"is_segment\":false"),
        };
        let segment = match &span.splice.segment {
            SegmentPlace::Known => Edit::new(&behind_id, b""),
            SegmentPlace::Attribute(value) => Edit::new(value, &texts.attribute),
            SegmentPlace::Object { at, empty: false } => Edit::new(&(*at..*at), &texts.in_object),
            SegmentPlace::Object { at, empty: true } => Edit::new(&(*at..*at), &texts.in_empty),
            SegmentPlace::Attributes(value) => Edit::new(value, &texts.attributes),
            SegmentPlace::Missing => Edit::new(&behind_id, &texts.missing),
        };
        let mut edits = [is_segment, segment];
        // Stable: what is put in at the same place stays in this order.
        edits.sort_by_key(|edit| (edit.start, edit.end));
        let taken: usize = edits.iter().map(|edit| edit.end - edit.start).sum();
        let put: usize = edits.iter().map(|edit| edit.text.len()).sum();
        Self {
            span,
            edits,
            length: span.json.len() - taken + put,
        }
    }

    fn put(&self, out: &mut Vec<u8>) {
        let mut from = 0;
        for edit in &self.edits {
            out.extend_from_slice(&self.span.json[from..edit.start]);
            out.extend_from_slice(edit.text);
            from = edit.end;
        }
        out.extend_from_slice(&self.span.json[from..]);
    }
}

/// The places of the spans of each message: as many as fit, but cut behind the last span of an entry where there is such a place.
fn cut(spans: &[Edited<'_>], bytes_max: u64) -> Vec<Range<usize>> {
    let frame = HEAD.len() + FLUSH_ID.len() + FLUSH_ID_DIGITS;
    let mut cuts = Vec::new();
    if filled(spans, frame + END.len(), bytes_max) == spans.len() {
        // What is empty makes no message.
        cuts.extend((!spans.is_empty()).then_some(0..spans.len()));
        return cuts;
    }
    let is_clean = clean_cuts(spans);
    let mut start = 0;
    while start < spans.len() {
        let full = start + filled(&spans[start..], frame + END_OF_CUT.len(), bytes_max).max(1);
        let end = (start + 1..=full)
            .rev()
            .find(|&end| is_clean[end - 1])
            .unwrap_or(full);
        cuts.push(start..end);
        start = end;
    }
    cuts
}

/// How many spans, from the first on, fit into a message.
fn filled(spans: &[Edited<'_>], frame: usize, bytes_max: u64) -> usize {
    // The first span has no comma in front.
    let mut bytes = count(frame).saturating_sub(1);
    let fits = |span: &&Edited<'_>| {
        bytes = bytes.saturating_add(count(span.length)).saturating_add(1);
        bytes <= bytes_max
    };
    spans.iter().take_while(fits).count()
}

/// For each span, whether no entry has spans both up to it and behind it.
fn clean_cuts(spans: &[Edited<'_>]) -> Vec<bool> {
    let last: HashMap<usize, usize> = spans
        .iter()
        .enumerate()
        .map(|(place, edited)| (edited.span.field, place))
        .collect();
    let mut reach = 0;
    let is_clean = |(place, edited): (usize, &Edited<'_>)| {
        reach = last
            .get(&edited.span.field)
            .map_or(reach, |&last| reach.max(last));
        reach <= place
    };
    spans.iter().enumerate().map(is_clean).collect()
}

/// The hash of what is in a message: shard, trace, and offset and id of each span, with lengths where they are not fixed.
fn flush_id(shard: ShardId, member: &Member, spans: &[Edited<'_>]) -> String {
    // In one piece: a hasher that is given many small ones costs several times as much.
    let fixed = 4 + 8 + member.as_bytes().len();
    // Offset, length, and an id as it is usual.
    let mut hashed = Vec::with_capacity(fixed + (8 + 8 + 8) * spans.len());
    hashed.extend_from_slice(&shard.0.to_le_bytes());
    hashed.extend_from_slice(&count(member.as_bytes().len()).to_le_bytes());
    hashed.extend_from_slice(member.as_bytes());
    let mut id = Vec::new();
    for Edited { span, .. } in spans {
        id.clear();
        span.id.write_to(&mut id);
        hashed.extend_from_slice(&span.offset.to_le_bytes());
        hashed.extend_from_slice(&count(id.len()).to_le_bytes());
        hashed.extend_from_slice(&id);
    }
    blake3::hash(&hashed).to_hex()[..FLUSH_ID_DIGITS].to_owned()
}

fn payload(spans: &[Edited<'_>], flush_id: &str, end: &[u8]) -> Vec<u8> {
    let commas = spans.len().saturating_sub(1);
    let length: usize = spans.iter().map(|span| span.length).sum();
    let mut out = Vec::with_capacity(
        HEAD.len() + length + commas + FLUSH_ID.len() + flush_id.len() + end.len(),
    );
    out.extend_from_slice(HEAD);
    for (place, span) in spans.iter().enumerate() {
        if place > 0 {
            out.push(b',');
        }
        span.put(&mut out);
    }
    for text in [FLUSH_ID, flush_id.as_bytes(), end] {
        out.extend_from_slice(text);
    }
    out
}

/// How many spans each entry has among these.
fn fields(spans: &[Edited<'_>]) -> Vec<(usize, u64)> {
    let mut fields: Vec<usize> = spans.iter().map(|edited| edited.span.field).collect();
    fields.sort_unstable();
    fields
        .chunk_by(|one, other| one == other)
        .map(|run| (run[0], count(run.len())))
        .collect()
}

fn count(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// Appends a JSON string of generalised UTF-8. A lone surrogate is escaped, as it was in the input; bytes that are no text at all,
/// which no JSON string decodes to, become U+FFFD.
fn put_string(out: &mut Vec<u8>, text: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    out.push(b'"');
    let mut rest = text;
    while !rest.is_empty() {
        let valid = match std::str::from_utf8(rest) {
            Ok(valid) => valid.len(),
            Err(error) => error.valid_up_to(),
        };
        let (text, broken) = rest.split_at(valid);
        for &byte in text {
            match byte {
                b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
                0..0x20 => out.extend_from_slice(&[
                    b'\\',
                    b'u',
                    b'0',
                    b'0',
                    b'0' + (byte >> 4),
                    DIGITS[usize::from(byte & 0xf)],
                ]),
                _ => out.push(byte),
            }
        }
        rest = match *broken {
            // Three bytes carry 4, 6 and 6 bits; those of a surrogate begin with 1101 1.
            [0xed, high @ 0xa0..=0xbf, low @ 0x80..=0xbf, ..] => {
                let digits = [high >> 2 & 0xf, (high & 3) << 2 | low >> 4 & 3, low & 0xf]
                    .map(|digit| DIGITS[usize::from(digit)]);
                out.extend_from_slice(b"\\ud");
                out.extend_from_slice(&digits);
                &broken[3..]
            }
            [_, ref behind @ ..] => {
                out.extend_from_slice(b"\\ufffd");
                behind
            }
            [] => broken,
        };
    }
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use proptest::{collection::vec, option, prelude::*, sample::select};
    use serde::de::{Deserialize, Deserializer, Visitor};
    use serde_json::{Value, json};
    use shared::{
        ids::{OrganizationId, ProjectId, TraceId},
        time::{Clock, UnixMillis},
    };
    use store::{
        chunk::{self, Codec},
        entry::SpanAt,
    };

    use super::*;

    const SHARD: ShardId = ShardId(3);

    fn member() -> Member {
        Member::new(
            ProjectId(1),
            &TraceId::new(b"0123456789abcdef0123456789abcdef"),
        )
    }

    fn hex(id: u64) -> SpanId {
        SpanId::Hex(id)
    }

    /// A piece of a span's JSON: as it comes in, and what it is.
    #[derive(Debug, Clone)]
    enum Piece {
        Text(String),
        /// Just behind the value of `span_id`.
        IdEnd,
        IsSegment(&'static str),
        /// The attribute's value, which has no value.
        Attribute(&'static str),
        /// Just behind the `{` of `attributes`.
        Object {
            empty: bool,
        },
        /// The value of `attributes`, which is no object.
        Attributes(&'static str),
    }

    /// A span as parsing found it.
    #[derive(Debug, Clone)]
    struct Parsed {
        id: u64,
        pieces: Vec<Piece>,
    }

    impl Parsed {
        /// The raw JSON, and the places of its edits.
        fn lay(&self) -> (Vec<u8>, Splice) {
            let mut json = Vec::new();
            let mut splice = Splice {
                span_id_end: 0,
                is_segment: None,
                segment: SegmentPlace::Missing,
            };
            if self.pieces.iter().any(|piece| matches!(piece, Piece::Text(text) if text.contains("sentry.segment.id\":{\"value\":\"k"))) {
                splice.segment = SegmentPlace::Known;
            }
            for piece in &self.pieces {
                let at = u32::try_from(json.len()).unwrap();
                let mut put = |text: &str| {
                    json.extend_from_slice(text.as_bytes());
                    at..u32::try_from(json.len()).unwrap()
                };
                match piece {
                    Piece::Text(text) => drop(put(text)),
                    Piece::IdEnd => splice.span_id_end = at,
                    Piece::IsSegment(value) => splice.is_segment = Some(put(value)),
                    Piece::Attribute(value) => splice.segment = SegmentPlace::Attribute(put(value)),
                    Piece::Object { empty } => {
                        splice.segment = SegmentPlace::Object { at, empty: *empty }
                    }
                    Piece::Attributes(value) => {
                        splice.segment = SegmentPlace::Attributes(put(value))
                    }
                }
            }
            (json, splice)
        }

        /// What goes out, piece by piece; `segment` as a JSON string.
        fn expected(&self, is_segment: bool, segment: &str) -> String {
            let attribute = format!("{{\"type\":\"string\",\"value\":{segment}}}");
            let (
                _,
                Splice {
                    is_segment: mark,
                    segment: place,
                    ..
                },
            ) = self.lay();
            let pieces = self.pieces.iter().map(|piece| match piece {
                Piece::Text(text) => text.clone(),
                Piece::IdEnd => {
                    let mark = if mark.is_none() {
                        format!(",\"is_segment\":{is_segment}")
                    } else {
                        String::new()
                    };
                    let made = if place == SegmentPlace::Missing {
                        format!(",\"attributes\":{{\"sentry.segment.id\":{attribute}}}")
                    } else {
                        String::new()
                    };
                    mark + &made
                }
                Piece::IsSegment(_) => is_segment.to_string(),
                Piece::Attribute(_) => attribute.clone(),
                Piece::Object { empty } => format!(
                    "\"sentry.segment.id\":{attribute}{}",
                    if *empty { "" } else { "," }
                ),
                Piece::Attributes(_) => format!("{{\"sentry.segment.id\":{attribute}}}"),
            });
            pieces.collect()
        }
    }

    /// A span of any form, with few ids, so that some come again.
    fn parsed() -> impl Strategy<Value = Parsed> {
        let text = |text: &str| vec![Piece::Text(text.to_owned())];
        let attributes = option::weighted(
            0.8,
            prop_oneof![
                select(vec!["null", "7.50", "[]", "\"x\""])
                    .prop_map(|value| vec![Piece::Attributes(value)]),
                select(vec![
                    "null",
                    "{}",
                    "{\"type\":\"string\"}",
                    "{\"value\":null}",
                    "3"
                ])
                .prop_map(move |value| [
                    text("{\"a\":1e2,\"sentry.segment.id\" : "),
                    vec![Piece::Attribute(value)],
                    text("}")
                ]
                .concat()),
                select(vec!["}", "  }", " \"a\":{\"value\":\"b\"} }"]).prop_map(move |rest| [
                    text("{"),
                    vec![Piece::Object {
                        empty: !rest.contains('a')
                    }],
                    text(rest)
                ]
                .concat()),
                "k[a-z]{0,3}".prop_map(move |id| text(&format!(
                    "{{\"sentry.segment.id\":{{\"value\":\"{id}\"}}}}"
                ))),
            ],
        );
        let others = vec(
            prop_oneof![
                Just("\"n\":0.10".to_owned()),
                "\"o[a-z]\" : \"é[a-z]{0,60}\""
            ],
            0..3,
        );
        let is_segment = option::of(select(vec!["true", "false", "null"]));
        (0..5_u64, attributes, others, is_segment).prop_flat_map(
            move |(id, attributes, others, is_segment)| {
                let mut keys = vec![
                    [
                        text(&format!("\"span_id\": \"{id:016x}\"")),
                        vec![Piece::IdEnd],
                    ]
                    .concat(),
                ];
                keys.extend(attributes.map(|pieces| [text("\"attributes\":"), pieces].concat()));
                keys.extend(
                    others
                        .into_iter()
                        .enumerate()
                        .map(|(place, other)| text(&other.replacen('"', &format!("\"{place}"), 1))),
                );
                keys.extend(is_segment.map(|value| {
                    [text("\"is_segment\":\t"), vec![Piece::IsSegment(value)]].concat()
                }));
                Just(keys).prop_shuffle().prop_map(move |keys| Parsed {
                    id,
                    pieces: [
                        text("{ "),
                        keys.join(&Piece::Text(" , ".to_owned())),
                        text("}"),
                    ]
                    .concat(),
                })
            },
        )
    }

    /// An entry with its chunk.
    struct Owned {
        header: EntryHeader,
        chunk: Chunk,
    }

    fn owned(spans: &[(u64, &Parsed)]) -> Owned {
        let laid: Vec<(Vec<u8>, Splice)> = spans.iter().map(|(_, parsed)| parsed.lay()).collect();
        let laid: Vec<(&[u8], &Splice)> = laid
            .iter()
            .map(|(json, splice)| (&json[..], splice))
            .collect();
        let chunk = chunk::decode(&chunk::encode(Codec::None, &laid), u64::MAX).unwrap();
        let spans = spans
            .iter()
            .map(|&(offset, parsed)| SpanAt {
                offset,
                id: hex(parsed.id),
            })
            .collect();
        let header = EntryHeader {
            has_root: false,
            organization: OrganizationId(1),
            arrival: UnixMillis(1),
            top: hex(1),
            spans,
            bytes: 1,
        };
        Owned { header, chunk }
    }

    /// What a segment becomes.
    #[derive(Debug)]
    struct Built {
        parts: Vec<Part>,
        per_field: Vec<FieldCount>,
    }

    fn all(
        shard: ShardId,
        member: &Member,
        segment: &SpanId,
        entries: &[LoadedEntry<'_>],
        bytes_max: u64,
    ) -> Built {
        let mut parts = Vec::new();
        let per_field = build(shard, member, segment, entries, bytes_max, |part| {
            parts.push(part);
        });
        Built { parts, per_field }
    }

    fn built(entries: &[Owned], segment: &SpanId, bytes_max: u64) -> Built {
        let entries: Vec<LoadedEntry<'_>> = entries
            .iter()
            .map(|Owned { header, chunk }| LoadedEntry { header, chunk })
            .collect();
        all(SHARD, &member(), segment, &entries, bytes_max)
    }

    /// A span of the simplest form.
    fn plain(id: u64, padding: usize) -> Parsed {
        let text = |text: String| Piece::Text(text);
        let pieces = vec![
            text(format!("{{\"span_id\":\"{id:016x}\"")),
            Piece::IdEnd,
            text(format!(",\"p\":\"{}\"}}", "x".repeat(padding))),
        ];
        Parsed { id, pieces }
    }

    fn text(payload: &[u8]) -> &str {
        std::str::from_utf8(payload).unwrap()
    }

    #[test]
    fn the_form_of_a_message_is_fixed() {
        let built = built(
            &[owned(&[(7, &plain(1, 1)), (8, &plain(2, 0))])],
            &hex(1),
            10_000,
        );
        let attributes = "\"attributes\":{\"sentry.segment.id\":{\"type\":\"string\",\"value\":\"0000000000000001\"}}";
        let flush_id = "58c175985ceee834579404e1532cd82b";
        let expected = format!(
            "{{\"spans\":[{{\"span_id\":\"0000000000000001\",\"is_segment\":true,{attributes},\"p\":\"x\"}},\
             {{\"span_id\":\"0000000000000002\",\"is_segment\":false,{attributes},\"p\":\"\"}}],\"flush_id\":\"{flush_id}\"}}"
        );
        assert_eq!(text(&built.parts[0].payload), expected);
        let Part {
            flush_id: told,
            part,
            parts,
            spans,
            fields,
            ..
        } = &built.parts[0];
        assert_eq!(
            (&told[..], *part, *parts, *spans, &fields[..]),
            (flush_id, 1, 1, 2, &[(0, 2)][..])
        );
        let ids = [("0000000000000001", 7_u8), ("0000000000000002", 8)];
        let spans = ids
            .map(|(id, offset)| {
                [
                    &[offset, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0],
                    id.as_bytes(),
                ]
                .concat()
            })
            .concat();
        let hashed = [
            &[3, 0, 0, 0, 34, 0, 0, 0, 0, 0, 0, 0],
            member().as_bytes(),
            &spans,
        ]
        .concat();
        assert!(blake3::hash(&hashed).to_hex().starts_with(flush_id));
        assert_eq!(
            built.per_field,
            [FieldCount {
                produced: 2,
                repeats: 0
            }]
        );
    }

    #[test]
    fn nothing_makes_no_message() {
        let Built { parts, per_field } = built(&[], &hex(1), 100);
        assert!(parts.is_empty() && per_field.is_empty());
    }

    #[test]
    fn replays_count_nowhere_and_repeats_where_they_lie() {
        let (one, two, three) = (plain(1, 0), plain(2, 0), plain(2, 1));
        let entries = [
            owned(&[(5, &one), (6, &two)]),
            owned(&[(6, &two), (7, &two), (8, &three)]),
            owned(&[(3, &one), (7, &two), (9, &three)]),
        ];
        let Built { parts, per_field } = built(&entries, &hex(9), 10_000);
        let count = |produced, repeats| FieldCount { produced, repeats };
        // The first of span 1 is that of offset 3; 7 is counted in the first entry that holds it.
        assert_eq!(per_field, [count(1, 1), count(1, 1), count(1, 1)]);
        assert_eq!(
            (parts.len(), parts[0].spans, &parts[0].fields[..]),
            (1, 3, &[(0, 1), (1, 1), (2, 1)][..])
        );
    }

    #[test]
    fn a_chunk_of_another_length_than_its_header_makes_what_both_hold() {
        let mut entry = owned(&[(1, &plain(1, 0)), (2, &plain(2, 0))]);
        entry.header.spans.pop();
        let Built { parts, per_field } = built(&[entry], &hex(1), 10_000);
        assert_eq!(
            (parts[0].spans, per_field),
            (
                1,
                vec![FieldCount {
                    produced: 1,
                    repeats: 0
                }]
            )
        );
    }

    #[test]
    fn a_message_may_be_exactly_as_long_as_the_limit() {
        let entries = || {
            [owned(&[
                (1, &plain(1, 0)),
                (2, &plain(2, 0)),
                (3, &plain(3, 0)),
                (4, &plain(4, 0)),
            ])]
        };
        let parts = |limit: usize| built(&entries(), &hex(1), limit as u64).parts;
        let whole = parts(10_000)[0].payload.len();
        assert_eq!(parts(whole).len(), 1);
        assert!(!text(&parts(whole)[0].payload).contains("skip_enrichment"));
        let halves = parts(whole - 1);
        assert_eq!(
            halves
                .iter()
                .map(|part| (part.part, part.parts, part.spans))
                .collect::<Vec<_>>(),
            [(1, 2, 3), (2, 2, 1)]
        );
        assert!(
            halves
                .iter()
                .all(|part| text(&part.payload).ends_with("\",\"skip_enrichment\":true}"))
        );
        assert_eq!(parts(halves[0].payload.len()).len(), 2);
        assert_eq!(parts(halves[0].payload.len() - 1)[0].spans, 2);
        // Alone, a span is over any limit, and not cut.
        assert_eq!(
            parts(0).iter().map(|part| part.spans).collect::<Vec<_>>(),
            [1; 4]
        );
        let alone = built(&[owned(&[(1, &plain(1, 100))])], &hex(1), 10).parts;
        assert!(alone.len() == 1 && !text(&alone[0].payload).contains("skip_enrichment"));
    }

    #[test]
    fn it_is_cut_between_entries_where_that_is_possible() {
        // Six spans fit into a message. Entries: of two; of three; of eight; of two that lie across one another; a large one in an entry of three.
        let (small, large) = (|id| plain(id, 0), plain(99, 5_000));
        let spans: Vec<Parsed> = (0..30).map(small).collect();
        let at = |offsets: &[usize]| {
            owned(
                &offsets
                    .iter()
                    .map(|&offset| (offset as u64, &spans[offset]))
                    .collect::<Vec<_>>(),
            )
        };
        let limit = built(&[at(&[0, 1, 2, 3, 4, 5])], &hex(77), 10_000).parts[0]
            .payload
            .len()
            + 23;
        let sizes = |entries: &[Owned]| {
            built(entries, &hex(77), limit as u64)
                .parts
                .iter()
                .map(|part| part.spans)
                .collect::<Vec<_>>()
        };
        assert_eq!(sizes(&[at(&[0, 1]), at(&[2, 3, 4]), at(&[5, 6])]), [5, 2]);
        assert_eq!(
            sizes(&[at(&[0, 1]), at(&[2, 3, 4, 5, 6, 7, 8, 9]), at(&[10])]),
            [2, 6, 3]
        );
        assert_eq!(
            sizes(&[at(&[0, 1]), at(&[2, 4, 6]), at(&[3, 5, 7])]),
            [2, 6]
        );
        assert_eq!(sizes(&[at(&[0, 2, 4, 6, 8]), at(&[1, 3, 5, 7, 9])]), [6, 4]);
        let with_large = owned(&[(2, &spans[2]), (3, &large), (4, &spans[4])]);
        assert_eq!(sizes(&[at(&[0, 1]), with_large, at(&[5])]), [2, 1, 1, 2]);
    }

    #[test]
    fn a_flush_id_is_of_shard_trace_offsets_and_ids_only() {
        let id = |shard: u32, trace: &[u8], offset: u64, text: &[u8], json: &Parsed| {
            let mut entry = owned(&[(offset, json)]);
            entry.header.spans[0].id = SpanId::new(text);
            let entries = [LoadedEntry {
                header: &entry.header,
                chunk: &entry.chunk,
            }];
            let built = all(
                ShardId(shard),
                &Member::new(ProjectId(1), &TraceId::new(trace)),
                &hex(1),
                &entries,
                10_000,
            );
            built.parts[0].flush_id.clone()
        };
        let (one, other) = (plain(1, 0), plain(1, 1));
        let same = id(1, b"t", 5, b"a", &one);
        assert!(
            same.len() == 32
                && same
                    .bytes()
                    .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
        );
        assert_eq!(same, id(1, b"t", 5, b"a", &other));
        let others = [
            id(2, b"t", 5, b"a", &one),
            id(1, b"u", 5, b"a", &one),
            id(1, b"t", 6, b"a", &one),
            id(1, b"t", 5, b"b", &one),
            id(1, b"t", 5, b"", &one),
        ];
        assert!(others.iter().all(|other| *other != same));
    }

    /// Many spans of one id, and entries across one another: a quadratic step would take far longer.
    #[test]
    fn a_hundred_thousand_spans_are_no_burden() {
        let began = Clock::mono_now();
        let spans: Vec<Parsed> = (0..100_000)
            .map(|padding| plain(1, padding % 300))
            .collect();
        let of = |field: usize| {
            owned(
                &(0..1_000)
                    .map(|turn| (turn * 100 + field, &spans[turn * 100 + field]))
                    .map(|(offset, span)| (offset as u64, span))
                    .collect::<Vec<_>>(),
            )
        };
        let entries: Vec<Owned> = (0..100).map(of).collect();
        let Built { parts, per_field } = built(&entries, &hex(1), 1_000);
        assert_eq!(parts.iter().map(|part| part.spans).sum::<u64>(), 300);
        assert_eq!(
            per_field.iter().map(|count| count.repeats).sum::<u64>(),
            99_700
        );
        let spans: Vec<Parsed> = (0..100_000).map(|id| plain(id, 0)).collect();
        let entries: Vec<Owned> = spans
            .chunks(7)
            .enumerate()
            .map(|(at, spans)| owned(&(at as u64 * 7..).zip(spans).collect::<Vec<_>>()))
            .collect();
        assert_eq!(built(&entries, &hex(1), 1_900).parts.len(), 14_285);
        assert!(Clock::mono_now().since(began) < Duration::from_secs(5));
    }

    /// The bytes of a JSON string, lone surrogates included.
    struct Decoded(Vec<u8>);

    impl<'de> Deserialize<'de> for Decoded {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Bytes;
            impl Visitor<'_> for Bytes {
                type Value = Decoded;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("a string")
                }
                fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Decoded, E> {
                    Ok(Decoded(bytes.to_vec()))
                }
            }
            deserializer.deserialize_bytes(Bytes)
        }
    }

    fn written(id: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put_string(&mut out, id);
        out
    }

    #[test]
    fn ids_are_escaped_where_json_asks_for_it() {
        let rows: [(&[u8], &[u8]); 6] = [
            (b"", br#""""#),
            (b"\0\x1f\x7f", b"\"\\u0000\\u001f\x7f\""),
            (b"a\"b\\", br#""a\"b\\""#),
            ("é\u{10ffff}".as_bytes(), "\"é\u{10ffff}\"".as_bytes()),
            (b"\xed\xa0\x80-\xed\xbf\xbf", br#""\ud800-\udfff""#),
            (b"\xff\xed\xa0a", br#""\ufffd\ufffd\ufffda""#),
        ];
        for (id, expected) in rows {
            assert_eq!(written(id), expected, "{}", id.escape_ascii());
        }
    }

    /// A code point in generalised UTF-8.
    fn generalised(code: u32) -> Vec<u8> {
        let last = |shift: u32| u8::try_from(0x80 | code >> shift & 0x3f).unwrap();
        match char::from_u32(code) {
            Some(char) => char.to_string().into_bytes(),
            None => vec![0xed, last(6), last(0)],
        }
    }

    /// Any code points, but no pair of surrogates, which would be one character.
    fn generalised_text() -> impl Strategy<Value = Vec<u8>> {
        let code = prop_oneof![0..0x80_u32, 0x80..0x11_0000_u32, 0xd7f0..0xe010_u32];
        vec(code, 0..20).prop_map(|mut codes| {
            codes.dedup_by(|low, high| {
                (0xd800..0xdc00).contains(high) && (0xdc00..0xe000).contains(low)
            });
            codes.into_iter().flat_map(generalised).collect()
        })
    }

    /// The segment's id: one of the spans', or any text.
    fn segment_text() -> impl Strategy<Value = String> {
        prop_oneof![
            (0..5_u64).prop_map(|id| format!("{id:016x}")),
            "[\\x00-\\x7fé]{0,8}"
        ]
    }

    /// An edit of `Value`s: what SPEC 5.2 says.
    fn edited(mut span: Value, segment: &str, id: &str) -> Value {
        span["is_segment"] = json!(id == segment);
        if !span["attributes"].is_object() {
            span["attributes"] = json!({});
        }
        let attribute = &mut span["attributes"]["sentry.segment.id"];
        if attribute.get("value").is_none_or(Value::is_null) {
            *attribute = json!({"type": "string", "value": segment});
        }
        span
    }

    /// Cuts texts as the rules say, with no care for speed; gives how many go into each message.
    fn model_cut(texts: &[String], fields: &[usize], bytes_max: usize) -> Vec<usize> {
        let length = |texts: &[String], end: &str| {
            format!(
                "{{\"spans\":[{}],\"flush_id\":\"{}\"{end}}}",
                texts.join(","),
                "0".repeat(32)
            )
            .len()
        };
        if length(texts, "") <= bytes_max {
            return vec![texts.len()];
        }
        let (mut sizes, mut start) = (Vec::new(), 0);
        while start < texts.len() {
            let fits = |&end: &usize| {
                end == start + 1
                    || length(&texts[start..end], ",\"skip_enrichment\":true") <= bytes_max
            };
            let is_clean = |&end: &usize| {
                !fields[..end]
                    .iter()
                    .any(|field| fields[end..].contains(field))
            };
            let ends = || (start + 1..=texts.len()).filter(fits);
            let end = ends().filter(is_clean).max().or(ends().max()).unwrap();
            sizes.push(end - start);
            start = end;
        }
        sizes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn any_text_is_written_as_a_string_that_decodes_to_it(text in generalised_text(), noise in vec(any::<u8>(), 0..20)) {
            prop_assert_eq!(serde_json::from_slice::<Decoded>(&written(&text)).unwrap().0, text);
            prop_assert!(serde_json::from_slice::<Decoded>(&written(&noise)).is_ok());
            prop_assert!(std::str::from_utf8(&written(&noise)).is_ok());
        }

        #[test]
        fn spans_are_edited_as_said_and_nowhere_else(parsed in parsed(), segment in segment_text()) {
            let built = built(&[owned(&[(1, &parsed)])], &SpanId::new(segment.as_bytes()), 10_000);
            let payload = text(&built.parts[0].payload);
            let id = format!("{:016x}", parsed.id);
            let span = parsed.expected(id == segment, text(&written(segment.as_bytes())));
            prop_assert_eq!(payload, format!("{{\"spans\":[{span}],\"flush_id\":\"{}\"}}", built.parts[0].flush_id));
            let (json, _) = parsed.lay();
            let expected = edited(serde_json::from_slice(&json).unwrap(), &segment, &id);
            prop_assert_eq!(&serde_json::from_str::<Value>(payload).unwrap()["spans"][0], &expected);
        }

        /// Each span lies in one entry, or in several.
        #[test]
        fn messages_hold_every_span_once_in_order_within_the_limit(
            spans in vec((parsed(), vec(0..4_usize, 1..3), any::<bool>()), 1..25), bytes_max in 0..3_000_usize, step in 1..3_u64,
        ) {
            // Where marked, a span has the bytes of the one before it.
            let mut parsed: Vec<Parsed> = spans.iter().map(|(parsed, ..)| parsed.clone()).collect();
            for place in 1..parsed.len() {
                if spans[place].2 {
                    parsed[place] = parsed[place - 1].clone();
                }
            }
            let offset = |place: usize| 10 + step * place as u64;
            let in_field = |field: usize| {
                let places = (0..spans.len()).filter(|&place| spans[place].1.contains(&field));
                places.map(|place| (offset(place), &parsed[place])).collect::<Vec<_>>()
            };
            let used: Vec<usize> = (0..4).filter(|&field| !in_field(field).is_empty()).collect();
            let entries: Vec<Owned> = used.iter().map(|&field| owned(&in_field(field))).collect();
            let field = |place: usize| used.iter().position(|field| spans[place].1.contains(field)).unwrap();

            let mut per_field = vec![FieldCount::default(); used.len()];
            let mut kept: Vec<usize> = Vec::new();
            for place in 0..spans.len() {
                let is_repeat = kept.iter().any(|&kept| parsed[kept].lay().0 == parsed[place].lay().0);
                if is_repeat {
                    per_field[field(place)].repeats += 1;
                } else {
                    per_field[field(place)].produced += 1;
                    kept.push(place);
                }
            }
            let segment = "\"0000000000000001\"";
            let texts: Vec<String> = kept.iter().map(|&place| parsed[place].expected(parsed[place].id == 1, segment)).collect();
            let fields: Vec<usize> = kept.iter().map(|&place| field(place)).collect();
            let sizes = model_cut(&texts, &fields, bytes_max);

            let built = built(&entries, &hex(1), bytes_max as u64);
            prop_assert_eq!(&built.per_field, &per_field);
            prop_assert_eq!(per_field.iter().map(|count| count.produced + count.repeats).sum::<u64>(), spans.len() as u64);
            prop_assert_eq!(built.parts.iter().map(|part| usize::try_from(part.spans).unwrap()).collect::<Vec<_>>(), &sizes[..]);
            let mut from = 0;
            for (index, part) in built.parts.iter().enumerate() {
                let to = from + usize::try_from(part.spans).unwrap();
                let end = if built.parts.len() > 1 { ",\"skip_enrichment\":true" } else { "" };
                let expected = format!("{{\"spans\":[{}],\"flush_id\":\"{}\"{end}}}", texts[from..to].join(","), part.flush_id);
                prop_assert_eq!(text(&part.payload), expected);
                prop_assert_eq!(part.payload.capacity(), part.payload.len());
                prop_assert!(part.payload.len() <= bytes_max || part.spans == 1);
                prop_assert_eq!((part.part, part.parts), (index + 1, sizes.len()));
                let mut counted: BTreeMap<usize, u64> = BTreeMap::new();
                fields[from..to].iter().for_each(|&field| *counted.entry(field).or_default() += 1);
                prop_assert_eq!(&part.fields, &counted.into_iter().collect::<Vec<_>>());
                from = to;
            }
            let mut ids: Vec<&str> = built.parts.iter().map(|part| &part.flush_id[..]).collect();
            ids.sort_unstable();
            ids.dedup();
            prop_assert_eq!(ids.len(), sizes.len());
        }

        /// However the same spans lie in entries: with equal messages, equal flush ids.
        #[test]
        fn flush_ids_do_not_know_of_entries(spans in vec((parsed(), 0..3_usize), 1..10)) {
            let all: Vec<(u64, &Parsed)> = (0..).zip(spans.iter().map(|(parsed, _)| parsed)).collect();
            let in_field = |field: usize| all.iter().zip(&spans).filter(|(_, (_, of))| *of == field).map(|(span, _)| *span).collect::<Vec<_>>();
            let apart: Vec<Owned> = (0..3).map(in_field).filter(|spans| !spans.is_empty()).map(|spans| owned(&spans)).collect();
            let (one, other) = (built(&[owned(&all)], &hex(1), u64::MAX), built(&apart, &hex(2), u64::MAX));
            prop_assert_eq!(&one.parts[0].flush_id, &other.parts[0].flush_id);
            if all.len() > 1 && one.parts[0].spans == all.len() as u64 {
                prop_assert_ne!(&one.parts[0].flush_id, &built(&[owned(&all[1..])], &hex(1), u64::MAX).parts[0].flush_id);
            }
        }
    }
}
