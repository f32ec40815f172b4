//! Entry headers: what is known of an entry without reading its chunk.
//!
//! In:     the spans of an entry, when it is inserted; field names of a journal, which may be any bytes.
//! Out:    field names, short and versioned; headers, or what is wrong with them.
//! Keeps:  one form for each header, so that a field can be named again byte for byte; ids exactly.
//! Knows:  the layout of version 1. Pure.
//! Source: docs/store.md 1.

use shared::{
    ids::{OrganizationId, SpanId},
    time::UnixMillis,
};

use crate::varint::{self, Reader};

/// What is known of an entry without reading its chunk; it is the field's name in the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryHeader {
    /// Whether one of its spans heads a segment.
    pub has_root: bool,
    /// The organization of its spans.
    pub organization: OrganizationId,
    /// The latest time of its spans, not below the shard's `now` of their batch.
    pub arrival: UnixMillis,
    /// The topmost known parent of its spans.
    pub top: SpanId,
    /// Its spans by offset.
    pub spans: Vec<SpanAt>,
    /// Bytes of its payloads before compression.
    pub bytes: u64,
}

/// One span of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpanAt {
    /// Its offset in the input.
    pub offset: u64,
    /// Its id.
    pub id: SpanId,
}

/// Why an entry header is not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Another version wrote it.
    #[error(
        "read entry header version={0}: this version is not known (check that all workers run the same release)"
    )]
    UnknownVersion(u8),
    /// No version writes it like that.
    #[error("read entry header: {0} (check what else writes to this redis)")]
    Damaged(HeaderDamage),
}

/// What is wrong with the bytes of an entry header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderDamage {
    /// Too few bytes, or a number in a longer form than it needs.
    #[error("it is cut short or a number is malformed")]
    Malformed,
    /// A flag without a meaning.
    #[error("a flag has no meaning")]
    Flags,
    /// An arrival that Redis could not keep as a score.
    #[error("its arrival is out of range")]
    Arrival,
    /// A header speaks of one span at least.
    #[error("it has no span")]
    NoSpan,
    /// Offsets ascend, each once, within 64 bits.
    #[error("its offsets do not ascend")]
    Offsets,
    /// Hex digits written as text, or the mark of text ids without one.
    #[error("an id is written in a longer form than it needs")]
    IdForm,
    /// Bytes behind the last span.
    #[error("bytes follow its end")]
    Trailing,
}

/// The version of what follows; the first byte.
const VERSION: u8 = 1;
/// Flag: one of the spans heads a segment.
const HAS_ROOT: u8 = 1;
/// Flag: some id is no 16 hex digits, so every id has its length in front; without it each is 8 bytes.
const TEXT_IDS: u8 = 2;

// Version 1: version · flags · organization · arrival · bytes · top · number of spans · per span: offset (the first; then how far
// from the one before) · id. Numbers are varints. An id: 8 bytes; under TEXT_IDS 0 and 8 bytes, or length + 1 and the text.
impl EntryHeader {
    /// The field name of an entry. Spans that are not sorted by offset, or not there at all, give a name that is refused when read.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let text_ids = is_text(&self.top) || self.spans.iter().any(|span| is_text(&span.id));
        let mut out = Vec::with_capacity(32 + 10 * self.spans.len());
        out.push(VERSION);
        out.push(if self.has_root { HAS_ROOT } else { 0 } | if text_ids { TEXT_IDS } else { 0 });
        varint::put(&mut out, self.organization.0);
        varint::put(&mut out, self.arrival.0);
        varint::put(&mut out, self.bytes);
        put_id(&mut out, &self.top, text_ids);
        varint::put(
            &mut out,
            u64::try_from(self.spans.len()).unwrap_or(u64::MAX),
        );
        let mut before = 0;
        for span in &self.spans {
            varint::put(&mut out, span.offset.wrapping_sub(before));
            before = span.offset;
            put_id(&mut out, &span.id, text_ids);
        }
        out
    }

    /// Reads a field name of any bytes.
    ///
    /// Keeps: what is read, encoded again, gives the same bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let mut reader = Reader::new(bytes);
        match reader.byte() {
            Some(VERSION) => Self::read(&mut reader).map_err(HeaderError::Damaged),
            Some(version) => Err(HeaderError::UnknownVersion(version)),
            None => Err(HeaderError::Damaged(HeaderDamage::Malformed)),
        }
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, HeaderDamage> {
        use HeaderDamage::{Arrival, Flags, IdForm, Malformed, Trailing};
        let flags = reader.byte().ok_or(Malformed)?;
        if flags & !(HAS_ROOT | TEXT_IDS) != 0 {
            return Err(Flags);
        }
        let text_ids = flags & TEXT_IDS != 0;
        let organization = OrganizationId(reader.number().ok_or(Malformed)?);
        let arrival = UnixMillis(reader.number().ok_or(Malformed)?);
        if arrival > UnixMillis::MAX {
            return Err(Arrival);
        }
        let bytes = reader.number().ok_or(Malformed)?;
        let top = read_id(reader, text_ids)?;
        let spans = read_spans(reader, text_ids)?;
        if text_ids && !is_text(&top) && !spans.iter().any(|span| is_text(&span.id)) {
            return Err(IdForm);
        }
        if !reader.rest().is_empty() {
            return Err(Trailing);
        }
        Ok(Self {
            has_root: flags & HAS_ROOT != 0,
            organization,
            arrival,
            top,
            spans,
            bytes,
        })
    }
}

fn read_spans(reader: &mut Reader<'_>, text_ids: bool) -> Result<Vec<SpanAt>, HeaderDamage> {
    let count = reader.number().ok_or(HeaderDamage::Malformed)?;
    if count == 0 {
        return Err(HeaderDamage::NoSpan);
    }
    // No span is shorter than an offset of one byte and its id, so the bytes at hand bound what is allocated.
    let shortest = if text_ids { 2 } else { 9 };
    let count = usize::try_from(count)
        .ok()
        .filter(|&count| count <= reader.rest().len() / shortest)
        .ok_or(HeaderDamage::Malformed)?;
    let mut spans = Vec::with_capacity(count);
    let mut before = 0_u64;
    for index in 0..count {
        let step = reader.number().ok_or(HeaderDamage::Malformed)?;
        if step == 0 && index > 0 {
            return Err(HeaderDamage::Offsets);
        }
        let offset = before.checked_add(step).ok_or(HeaderDamage::Offsets)?;
        spans.push(SpanAt {
            offset,
            id: read_id(reader, text_ids)?,
        });
        before = offset;
    }
    Ok(spans)
}

fn is_text(id: &SpanId) -> bool {
    matches!(id, SpanId::Text(_))
}

fn put_id(out: &mut Vec<u8>, id: &SpanId, text_ids: bool) {
    match id {
        SpanId::Hex(value) => {
            if text_ids {
                out.push(0);
            }
            out.extend_from_slice(&value.to_be_bytes());
        }
        SpanId::Text(text) => {
            varint::put(
                out,
                u64::try_from(text.len())
                    .unwrap_or(u64::MAX)
                    .saturating_add(1),
            );
            out.extend_from_slice(text);
        }
    }
}

fn read_id(reader: &mut Reader<'_>, text_ids: bool) -> Result<SpanId, HeaderDamage> {
    let length = if text_ids {
        reader.number().ok_or(HeaderDamage::Malformed)?
    } else {
        0
    };
    let Some(length) = length.checked_sub(1) else {
        return reader
            .array()
            .map(|value| SpanId::Hex(u64::from_be_bytes(value)))
            .ok_or(HeaderDamage::Malformed);
    };
    let id = SpanId::new(reader.take(length).ok_or(HeaderDamage::Malformed)?);
    if is_text(&id) {
        Ok(id)
    } else {
        Err(HeaderDamage::IdForm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*, sample::Index};

    fn id() -> impl Strategy<Value = SpanId> {
        let text = prop_oneof![4 => Just(None), 1 => vec(any::<u8>(), 0..40).prop_map(Some), 1 => Just(Some(b"0123456789ABCDEF".to_vec()))];
        (any::<u64>(), text)
            .prop_map(|(hex, text)| text.map_or(SpanId::Hex(hex), |text| SpanId::new(&text)))
    }

    fn header() -> impl Strategy<Value = EntryHeader> {
        let ids = prop_oneof![any::<u64>().prop_map(SpanId::Hex).boxed(), id().boxed()];
        let offset = prop_oneof![0..1000_u64, any::<u64>()];
        let spans = proptest::collection::btree_map(offset, ids, 1..20);
        (
            any::<bool>(),
            any::<u64>(),
            0..=UnixMillis::MAX.0,
            id(),
            spans,
            any::<u64>(),
        )
            .prop_map(
                |(has_root, organization, arrival, top, spans, bytes)| EntryHeader {
                    has_root,
                    organization: OrganizationId(organization),
                    arrival: UnixMillis(arrival),
                    top,
                    spans: spans
                        .into_iter()
                        .map(|(offset, id)| SpanAt { offset, id })
                        .collect(),
                    bytes,
                },
            )
    }

    fn usual() -> EntryHeader {
        let spans = (1000..1005)
            .map(|offset| SpanAt {
                offset,
                id: SpanId::Hex(offset),
            })
            .collect();
        EntryHeader {
            has_root: true,
            organization: OrganizationId(1),
            arrival: UnixMillis(1),
            top: SpanId::Hex(7),
            spans,
            bytes: 100,
        }
    }

    fn damage(bytes: &[u8]) -> HeaderDamage {
        match EntryHeader::decode(bytes) {
            Err(HeaderError::Damaged(damage)) => damage,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_usual_span_takes_nine_bytes() {
        let header = usual();
        let bytes = header.encode();
        assert_eq!(bytes[..5], [1, 1, 1, 1, 100]);
        assert_eq!(bytes[5..13], 7_u64.to_be_bytes());
        assert_eq!(bytes[13..16], [5, 0xe8, 7]);
        assert_eq!(bytes.len(), 16 + 8 + 4 * 9);
        assert_eq!(EntryHeader::decode(&bytes), Ok(header));
    }

    #[test]
    fn each_kind_of_damage_is_named() {
        let bytes = usual().encode();
        let with = |at: usize, byte: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            bytes
        };
        assert_eq!(
            EntryHeader::decode(&with(0, 2)),
            Err(HeaderError::UnknownVersion(2))
        );
        assert_eq!(damage(b""), HeaderDamage::Malformed);
        assert_eq!(damage(&with(1, 4)), HeaderDamage::Flags);
        assert_eq!(damage(&with(13, 6)), HeaderDamage::Malformed);
        assert_eq!(damage(&with(13, 4)), HeaderDamage::Trailing);
        assert_eq!(damage(&with(24, 0)), HeaderDamage::Offsets);
        assert_eq!(damage(&[&bytes[..], &[0]].concat()), HeaderDamage::Trailing);
        assert_eq!(damage(&[&bytes[..13], &[0]].concat()), HeaderDamage::NoSpan);
    }

    #[test]
    fn other_forms_of_the_same_header_are_refused() {
        // Flags, organization, arrival and bytes, then an id as text, one span at offset 0 with an id as hex.
        let with_top = |top: &[u8]| [&[1, TEXT_IDS, 0, 0, 0], top, &[1, 0, 0], &[9; 8]].concat();
        assert!(EntryHeader::decode(&with_top(b"\x02x")).is_ok());
        assert_eq!(
            damage(&with_top(b"\x110123456789abcdef")),
            HeaderDamage::IdForm
        );
        assert_eq!(damage(&with_top(b"\x0001234567")), HeaderDamage::IdForm);
        assert_eq!(damage(&with_top(b"\x82\x00x")), HeaderDamage::Malformed);
    }

    #[test]
    fn headers_that_break_the_rules_are_refused() {
        let with = |change: fn(&mut EntryHeader)| {
            let mut header = usual();
            change(&mut header);
            damage(&header.encode())
        };
        assert_eq!(with(|header| header.spans.clear()), HeaderDamage::NoSpan);
        assert_eq!(with(|header| header.spans.reverse()), HeaderDamage::Offsets);
        assert_eq!(
            with(|header| header.spans[1].offset = 1000),
            HeaderDamage::Offsets
        );
        assert_eq!(
            with(|header| header.arrival.0 = UnixMillis::MAX.0 + 1),
            HeaderDamage::Arrival
        );
    }

    #[test]
    fn a_false_number_of_spans_allocates_nothing() {
        let start = [&[1, 0, 0, 0, 0][..], &[0; 8]].concat();
        for count in [u64::MAX, 1 << 40, 1000] {
            let mut bytes = start.clone();
            varint::put(&mut bytes, count);
            bytes.extend_from_slice(&[1; 50]);
            assert_eq!(damage(&bytes), HeaderDamage::Malformed);
        }
    }

    proptest! {
        #[test]
        fn headers_round_trip(header in header()) {
            prop_assert_eq!(EntryHeader::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn whatever_is_read_has_one_form(header in header(), changes in vec((any::<Index>(), any::<u8>()), 0..4), noise in vec(any::<u8>(), 0..80)) {
            let mut bytes = header.encode();
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            for bytes in [bytes, noise.clone(), [&[1, 0][..], &noise].concat(), [&[1, 2][..], &noise].concat()] {
                if let Ok(header) = EntryHeader::decode(&bytes) {
                    prop_assert!(header.spans.is_sorted_by(|before, after| before.offset < after.offset));
                    prop_assert_eq!(header.encode(), bytes);
                }
            }
        }

        #[test]
        fn cut_headers_are_refused(header in header(), cut: Index) {
            let bytes = header.encode();
            prop_assert!(EntryHeader::decode(&bytes[..cut.index(bytes.len())]).is_err());
        }
    }
}
