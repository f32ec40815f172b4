//! Reads one message of the input: what groups a span, and where its JSON is edited on its way out.
//!
//! In:     the value of a message, which may be any bytes.
//! Out:    `Span`, or why it is none.
//! Keeps:  no schema-valid message is refused; no depth of nesting fails or costs stack; every value is skipped, not built.
//! Knows:  the fields of a span. Pure.
//! Source: docs/spec.md 2.1–2.3; `ingest-spans.v1.schema.json` of sentry-kafka-schemas 3.0.2.

use std::{borrow::Cow, fmt, ops::Range};

use serde::de::{Deserializer as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use shared::ids::{OrganizationId, ProjectId, SpanId, TraceId};
use store::chunk::{SegmentPlace, Splice};

/// The fields that are read or checked, in the order in which [`parse`] takes them.
const FIELDS: [&str; 13] = [
    "organization_id",
    "project_id",
    "trace_id",
    "span_id",
    "parent_span_id",
    "is_segment",
    "attributes",
    "start_timestamp",
    "end_timestamp",
    "received",
    "retention_days",
    "status",
    "name",
];
/// The attribute that names a span's segment.
const SEGMENT_ATTRIBUTE: &str = "sentry.segment.id";
/// The most days of retention that the schema allows.
const RETENTION_DAYS_MAX: u64 = 65_535;

/// What a message says of its span.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Its organization.
    pub organization: OrganizationId,
    /// Its project.
    pub project: ProjectId,
    /// Its trace.
    pub trace: TraceId,
    /// Its own id.
    pub id: SpanId,
    /// Its parent's id.
    pub parent: Option<SpanId>,
    /// Whether it is marked as the head of a segment.
    pub is_segment: bool,
    /// The id of its segment, when its attributes know it.
    pub segment: Option<SpanId>,
    /// Where the message is edited on its way out.
    pub splice: Splice,
}

/// Why a message holds no span.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// Positions in it would not fit in 32 bits.
    #[error("parse span bytes={bytes}: the message is too long (4 GiB is the limit)")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// It is no text.
    #[error("parse span byte={byte}: the message is not utf-8")]
    NotUtf8 {
        /// Where the first wrong byte is.
        byte: usize,
    },
    /// It is cut short, malformed, or goes on behind its end.
    #[error("parse span line={} column={}: the message is not valid json", .0.line(), .0.column())]
    InvalidJson(#[source] serde_json::Error),
    /// It is some other value.
    #[error("parse span: the message is json, but no object")]
    NoObject,
    /// A field that every span has is not there.
    #[error("parse span field={field}: it is missing")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A field holds some other type.
    #[error("parse span field={field}: it is no {expected}")]
    WrongType {
        /// The field.
        field: &'static str,
        /// What it has to be.
        expected: &'static str,
    },
    /// A number has a fraction, is negative or too large.
    #[error("parse span field={field}: it is no whole number from 0 to {max}")]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// The largest number that it may be.
        max: u64,
    },
}

/// Reads one message. Of a key that stands twice the last one counts, as for most parsers; that one is edited, too.
///
/// # Errors
/// [`ParseError`] when it is no span; another try gives the same.
pub fn parse(json: &[u8]) -> Result<Span, ParseError> {
    if u32::try_from(json.len()).is_err() {
        return Err(ParseError::TooLong { bytes: json.len() });
    }
    let message = str::from_utf8(json).map_err(|error| ParseError::NotUtf8 {
        byte: error.valid_up_to(),
    })?;
    let [
        organization,
        project,
        trace,
        id,
        parent,
        is_segment,
        attributes,
        start,
        end,
        received,
        retention,
        status,
        name,
    ] = pick(message, FIELDS)?;

    for time in [start, end, received] {
        time.number()?;
    }
    retention.whole(RETENTION_DAYS_MAX)?;
    status.text()?;
    name.text_or_null()?;

    let (segment_place, segment) = find_segment(message, &attributes)?;
    Ok(Span {
        organization: OrganizationId(organization.whole(u64::MAX)?),
        project: ProjectId(project.whole(u64::MAX)?),
        trace: TraceId::new(&decode(trace.text()?)?),
        id: span_id(id.text()?)?,
        parent: parent.text_or_null()?.map(span_id).transpose()?,
        is_segment: is_segment.flag_or_null()?,
        segment,
        splice: Splice {
            span_id_end: range(message, id.text()?).end,
            is_segment: is_segment.json.map(|value| range(message, value)),
            segment: segment_place,
        },
    })
}

/// Where the segment id stands in the attributes, or goes; and the id, when it is there. A value that is no string is no id.
fn find_segment(
    message: &str,
    attributes: &Field<'_>,
) -> Result<(SegmentPlace, Option<SpanId>), ParseError> {
    let Some(attributes) = attributes.json else {
        return Ok((SegmentPlace::Missing, None));
    };
    if !attributes.starts_with('{') {
        return Ok((SegmentPlace::Attributes(range(message, attributes)), None));
    }
    let [attribute] = pick(attributes, [SEGMENT_ATTRIBUTE])?;
    let Some(attribute) = attribute.json else {
        let empty = attributes[1..].trim_start().starts_with('}');
        let at = range(message, attributes).start + 1;
        return Ok((SegmentPlace::Object { at, empty }, None));
    };
    if attribute.starts_with('{') {
        let [value] = pick(attribute, ["value"])?;
        if let Some(value) = value.json.filter(|value| value.starts_with('"')) {
            return Ok((SegmentPlace::Known, Some(span_id(value)?)));
        }
    }
    Ok((SegmentPlace::Attribute(range(message, attribute)), None))
}

/// One field of an object, as it stands there: a valid JSON value without space around it, so that its first byte tells its type.
#[derive(Debug, Clone, Copy)]
struct Field<'a> {
    name: &'static str,
    json: Option<&'a str>,
}

impl<'a> Field<'a> {
    fn text(&self) -> Result<&'a str, ParseError> {
        self.of_type("string", |first| first == b'"')
    }

    fn text_or_null(&self) -> Result<Option<&'a str>, ParseError> {
        match self.json {
            None | Some("null") => Ok(None),
            Some(_) => self.text().map(Some),
        }
    }

    fn flag_or_null(&self) -> Result<bool, ParseError> {
        match self.json {
            None | Some("null" | "false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(self.wrong_type("boolean")),
        }
    }

    fn number(&self) -> Result<&'a str, ParseError> {
        self.of_type("number", |first| first == b'-' || first.is_ascii_digit())
    }

    fn whole(&self, max: u64) -> Result<u64, ParseError> {
        let value = whole(self.number()?).filter(|&value| value <= max);
        value.ok_or(ParseError::OutOfRange {
            field: self.name,
            max,
        })
    }

    fn of_type(
        &self,
        expected: &'static str,
        is: impl Fn(u8) -> bool,
    ) -> Result<&'a str, ParseError> {
        let json = self.json.ok_or(ParseError::Missing { field: self.name })?;
        let fits = json.bytes().next().is_some_and(is);
        fits.then_some(json)
            .ok_or_else(|| self.wrong_type(expected))
    }

    fn wrong_type(&self, expected: &'static str) -> ParseError {
        ParseError::WrongType {
            field: self.name,
            expected,
        }
    }
}

/// The named fields of an object. What is in them is checked for being JSON, and skipped: no value is built, nothing recurses.
fn pick<'a, const N: usize>(
    json: &'a str,
    names: [&'static str; N],
) -> Result<[Field<'a>; N], ParseError> {
    let mut reader = serde_json::Deserializer::from_str(json);
    let nothing = names.map(|name| Field { name, json: None });
    let picked = reader.deserialize_map(Pick(nothing));
    picked
        .and_then(|fields| reader.end().map(|()| fields))
        .map_err(|error| {
            // The only thing that can be wrong with valid JSON here is that it is no object.
            if error.is_data() {
                ParseError::NoObject
            } else {
                ParseError::InvalidJson(error)
            }
        })
}

struct Pick<'a, const N: usize>([Field<'a>; N]);

impl<'a, const N: usize> Visitor<'a> for Pick<'a, N> {
    type Value = [Field<'a>; N];

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<M: MapAccess<'a>>(mut self, mut map: M) -> Result<Self::Value, M::Error> {
        // Keys are taken raw: read as bytes they would pass with control characters, read as text not with a lone surrogate.
        while let Some(key) = map.next_key::<&RawValue>()? {
            match self.field(key.get()) {
                Some(field) => field.json = Some(map.next_value::<&RawValue>()?.get()),
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(self.0)
    }
}

impl<'a, const N: usize> Pick<'a, N> {
    fn field(&mut self, key: &str) -> Option<&mut Field<'a>> {
        let key = decode(key).ok()?;
        self.0
            .iter_mut()
            .find(|field| field.name.as_bytes() == &*key)
    }
}

/// Where a part of the message stands in it. The message is not longer than 32 bits count.
fn range(message: &str, part: &str) -> Range<u32> {
    let start = part.as_ptr().addr() - message.as_ptr().addr();
    let position = |byte: usize| u32::try_from(byte).unwrap_or(u32::MAX);
    position(start)..position(start + part.len())
}

fn span_id(string: &str) -> Result<SpanId, ParseError> {
    Ok(SpanId::new(&decode(string)?))
}

/// The bytes that a JSON string stands for. A lone surrogate, which JSON may escape, gives the three bytes that its number has in
/// generalised UTF-8.
fn decode(string: &str) -> Result<Cow<'_, [u8]>, ParseError> {
    let plain = string
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'))
        .filter(|text| !text.contains('\\'));
    if let Some(plain) = plain {
        return Ok(Cow::Borrowed(plain.as_bytes()));
    }
    let decoded = serde_json::Deserializer::from_str(string).deserialize_bytes(Decode);
    decoded.map(Cow::Owned).map_err(ParseError::InvalidJson)
}

struct Decode;

impl Visitor<'_> for Decode {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_bytes<E>(self, text: &[u8]) -> Result<Self::Value, E> {
        Ok(text.to_vec())
    }
}

/// The value of a JSON number, when it is whole and fits: exact, and however it is written (`1`, `1.0`, `10e-1`).
fn whole(number: &str) -> Option<u64> {
    if let Ok(plain) = number.parse() {
        return Some(plain);
    }
    let magnitude = number.strip_prefix('-').unwrap_or(number);
    let (mantissa, exponent) = magnitude.split_once(['e', 'E']).unwrap_or((magnitude, "0"));
    let (before, behind) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    // An exponent that does not fit shifts everything out of sight.
    let far = if exponent.starts_with('-') {
        i64::MIN
    } else {
        i64::MAX
    };
    let exponent = exponent.parse().unwrap_or(far);
    let length = |digits: &str| i64::try_from(digits.len()).unwrap_or(i64::MAX);
    let point = length(before).saturating_add(exponent);

    let mut value = 0_u64;
    for (place, digit) in (0_i64..).zip(before.bytes().chain(behind.bytes())) {
        let digit = u64::from(digit.wrapping_sub(b'0'));
        if place < point {
            value = value.checked_mul(10)?.checked_add(digit)?;
        } else if digit != 0 {
            return None;
        }
    }
    if value == 0 {
        return Some(0);
    }
    // Twenty zeros behind any other digit are too many.
    let zeros = point.saturating_sub(length(before) + length(behind));
    for _ in 0..zeros {
        value = value.checked_mul(10)?;
    }
    (!number.starts_with('-')).then_some(value)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};
    use serde_json::{Value, json};
    use store::chunk::{self, Codec};

    use super::*;

    /// A valid message: these fields, then those that are given, of which the last counts.
    fn message(more: &str) -> String {
        let fields = r#""organization_id":1,"project_id":42,"trace_id":"ff62a8b040f340bda5d830223def1d81","span_id":"bbbbbbbbbbbbbbbb","start_timestamp":1759215782.349409,"end_timestamp":1759215782.849409,"received":1759215783.850951,"retention_days":90,"status":"ok","name":null"#;
        let comma = if more.is_empty() { "" } else { "," };
        format!("{{{fields}{comma}{more}}}")
    }

    #[track_caller]
    fn span(json: &str) -> Span {
        match parse(json.as_bytes()) {
            Ok(span) => span,
            Err(error) => panic!("{error:?}: {json}"),
        }
    }

    fn text(part: &Range<u32>, json: &str) -> String {
        let (start, end) = (part.start.try_into().unwrap(), part.end.try_into().unwrap());
        json[Range::<usize> { start, end }].to_owned()
    }

    #[test]
    fn a_whole_message_is_read() {
        let json = r#" {
            "organization_id": 1, "project_id": 42, "key_id": 123, "event_id": "cbf6960622e14a45abc1f03b2055b186",
            "received": 1759215783.850951, "retention_days": 90, "downsampled_retention_days": 90,
            "attributes": {
                "sentry.op": {"type": "string", "value": "http"},
                "sentry.segment.id": {"type": "string", "value": "968cff94913ebb07"},
                "foo": null
            },
            "end_timestamp": 1759215782.849409, "is_segment": false, "_meta": {},
            "links": [{"trace_id": "0f62a8b040f340bda5d830223def1d82", "span_id": "cbbbbbbbbbbbbbbc", "attributes": null}],
            "name": "http", "parent_span_id": "968cff94913ebb08", "span_id": "bbbbbbbbbbbbbbbb",
            "start_timestamp": 1759215782.349409, "status": "ok", "trace_id": "ff62a8b040f340bda5d830223def1d81"
        }
        "#;
        let span = span(json);
        assert_eq!(span.organization, OrganizationId(1));
        assert_eq!(span.project, ProjectId(42));
        assert_eq!(
            span.trace,
            TraceId::Hex(0xff62_a8b0_40f3_40bd_a5d8_3022_3def_1d81)
        );
        assert_eq!(span.id, SpanId::Hex(0xbbbb_bbbb_bbbb_bbbb));
        assert_eq!(span.parent, Some(SpanId::Hex(0x968c_ff94_913e_bb08)));
        assert_eq!(span.segment, Some(SpanId::Hex(0x968c_ff94_913e_bb07)));
        assert!(!span.is_segment);
        assert!(
            text(&(0..span.splice.span_id_end), json).ends_with(r#""span_id": "bbbbbbbbbbbbbbbb""#)
        );
        assert_eq!(
            text(&span.splice.is_segment.clone().unwrap(), json),
            "false"
        );
        assert_eq!(span.splice.segment, SegmentPlace::Known);
    }

    #[test]
    fn what_the_schema_allows_is_taken() {
        let rows = [
            "",
            r#""is_segment":null"#,
            r#""is_segment":true"#,
            r#""parent_span_id":null"#,
            r#""parent_span_id":"""#,
            r#""attributes":null,"links":null"#,
            r#""attributes":{}"#,
            r#""attributes":{"sentry.segment.id":null,"foo":null}"#,
            r#""name":"x""#,
            r#""name":"\ud800""#,
            r#""status":"""#,
            r#""status":"\u0000""#,
            r#""retention_days":0"#,
            r#""retention_days":65535"#,
            r#""retention_days":9.0e1"#,
            r#""start_timestamp":0,"end_timestamp":-0.0,"received":1e400"#,
            r#""start_timestamp":5,"end_timestamp":4"#,
            r#""organization_id":18446744073709551615,"project_id":0"#,
            r#""organization_id":1.0,"project_id":1e3"#,
            r#""event_id":5,"key_id":"x","_meta":[],"unknown":[{}]"#,
        ];
        for row in rows {
            span(&message(row));
        }
        assert_eq!(
            span(&message(r#""organization_id":1e3"#)).organization,
            OrganizationId(1000)
        );
        let no_name = message("").replace(r#","name":null"#, "");
        span(&no_name);
    }

    #[test]
    fn what_is_no_span_is_refused_with_its_reason() {
        for field in FIELDS
            .into_iter()
            .filter(|field| !["parent_span_id", "is_segment", "attributes", "name"].contains(field))
        {
            let json = message("").replace(&format!("\"{field}\""), "\"other\"");
            let error = parse(json.as_bytes()).unwrap_err();
            assert!(
                matches!(error, ParseError::Missing { field: missing } if missing == field),
                "{error:?}"
            );
            let error = parse(message(&format!("\"{field}\":null")).as_bytes()).unwrap_err();
            assert!(
                matches!(error, ParseError::WrongType { field: wrong, .. } if wrong == field),
                "{error:?}"
            );
        }
        let wrong_types = [
            r#""trace_id":1"#,
            r#""span_id":["b"]"#,
            r#""parent_span_id":false"#,
            r#""is_segment":1"#,
            r#""is_segment":"true""#,
            r#""start_timestamp":"1""#,
            r#""received":true"#,
            r#""organization_id":"1""#,
            r#""retention_days":{}"#,
            r#""status":5"#,
            r#""name":{}"#,
        ];
        for row in wrong_types {
            assert!(
                matches!(
                    parse(message(row).as_bytes()),
                    Err(ParseError::WrongType { .. })
                ),
                "{row}"
            );
        }
        let out_of_range = [
            r#""organization_id":-1"#,
            r#""organization_id":1.5"#,
            r#""project_id":18446744073709551616"#,
            r#""project_id":1e99999999999999999999"#,
            r#""retention_days":65536"#,
            r#""retention_days":1e-1"#,
        ];
        for row in out_of_range {
            assert!(
                matches!(
                    parse(message(row).as_bytes()),
                    Err(ParseError::OutOfRange { .. })
                ),
                "{row}"
            );
        }
        for json in ["null", "5", "[{}]", r#""x""#, "[[[["] {
            assert!(
                matches!(parse(json.as_bytes()), Err(ParseError::NoObject)),
                "{json}"
            );
        }
        let whole = message("");
        let malformed = [
            "",
            " ",
            "{",
            "{}{}",
            "{\"a\":1}x",
            "{\"a\":01}",
            "{\"a\":\"\n\"}",
            "{\"a\n\":1}",
            "{\"a\0\":1}",
            "{\"a\":\"\\x\"}",
            "{a:1}",
            "{1:1}",
            "{\"a\":1,}",
            "\u{feff}{}",
        ];
        for json in malformed
            .into_iter()
            .chain([&whole[..whole.len() - 1], &format!("{whole}x")])
        {
            assert!(
                matches!(parse(json.as_bytes()), Err(ParseError::InvalidJson(_))),
                "{json}"
            );
        }
    }

    #[test]
    fn broken_utf8_is_refused_wherever_it_stands() {
        for place in [
            r#""name":"@""#,
            r#""@":1"#,
            r#""x":{"@":1}"#,
            r#""x":["@"]"#,
        ] {
            let json = message(place)
                .into_bytes()
                .into_iter()
                .map(|byte| if byte == b'@' { 0xff } else { byte })
                .collect::<Vec<_>>();
            assert!(
                matches!(parse(&json), Err(ParseError::NotUtf8 { .. })),
                "{place}"
            );
        }
    }

    #[test]
    fn a_message_over_4_gib_is_refused_unread() {
        // Zeros that nobody touches take no memory.
        let json = vec![0; (1 << 32) + 1];
        assert!(matches!(parse(&json), Err(ParseError::TooLong { .. })));
    }

    #[test]
    fn a_refusal_reads_well() {
        let of = |more: &str| parse(message(more).as_bytes()).unwrap_err().to_string();
        assert_eq!(
            of(r#""status":null"#),
            "parse span field=status: it is no string"
        );
        assert_eq!(
            of(r#""retention_days":-1"#),
            "parse span field=retention_days: it is no whole number from 0 to 65535"
        );
        assert_eq!(
            parse(b"{]").unwrap_err().to_string(),
            "parse span line=1 column=2: the message is not valid json"
        );
    }

    #[test]
    fn ids_are_decoded_and_any_text() {
        let rows: [(&str, &[u8]); 9] = [
            (r#""""#, b""),
            (r#""a:b{c}""#, b"a:b{c}"),
            (r#""\u0000""#, b"\0"),
            (r#""\"\\\/\b\f\n\r\t""#, b"\"\\/\x08\x0c\n\r\t"),
            (r#""\u00e9é""#, "éé".as_bytes()),
            (r#""\ud83d\ude00""#, "😀".as_bytes()),
            (r#""\ud800""#, b"\xed\xa0\x80"),
            (
                r#""\udc00x\ud800\ud800""#,
                b"\xed\xb0\x80x\xed\xa0\x80\xed\xa0\x80",
            ),
            (
                r#""ABCDEF0123456789-long-and-not-hex""#,
                b"ABCDEF0123456789-long-and-not-hex",
            ),
        ];
        for (string, bytes) in rows {
            let json = message(&format!(
                r#""trace_id":{string},"span_id":{string},"parent_span_id":{string},"attributes":{{"sentry.segment.id":{{"value":{string}}}}}"#
            ));
            let span = span(&json);
            let id = SpanId::new(bytes);
            assert_eq!(
                (&span.trace, &span.id),
                (&TraceId::new(bytes), &id),
                "{string}"
            );
            assert_eq!(
                (span.parent.as_ref(), span.segment.as_ref()),
                (Some(&id), Some(&id)),
                "{string}"
            );
        }
        // An escaped id is the same id.
        assert_eq!(
            span(&message(r#""span_id":"\u0062bbbbbbbbbbbbbbb""#)).id,
            SpanId::Hex(0xbbbb_bbbb_bbbb_bbbb)
        );
    }

    #[test]
    fn keys_may_be_escaped() {
        let json = message(
            r#""span\u005fid":"cc","\u0069s_segment":true,"\ud800":1,"attributes":{"\udc00":1,"sentry\u002esegment.id":{"v\u0061lue":"dd"}}"#,
        );
        let span = span(&json);
        assert_eq!(span.id, SpanId::new(b"cc"));
        assert!(span.is_segment);
        assert_eq!(span.segment, Some(SpanId::new(b"dd")));
    }

    #[test]
    fn of_a_key_that_stands_twice_the_last_one_counts() {
        let json = message(
            r#""is_segment":7,"span_id":1,"attributes":{"sentry.segment.id":{"value":"first"}},"is_segment":true,"span_id":"last","attributes":{"sentry.segment.id":{"value":"x"},"sentry.segment.id":{"value":"y","value":null}}"#,
        );
        let span = span(&json);
        assert_eq!(
            (&span.id, span.is_segment, &span.segment),
            (&SpanId::new(b"last"), true, &None)
        );
        assert!(text(&(0..span.splice.span_id_end), &json).ends_with(r#""span_id":"last""#));
        assert_eq!(
            text(span.splice.is_segment.as_ref().unwrap(), &json),
            "true"
        );
        let SegmentPlace::Attribute(place) = &span.splice.segment else {
            panic!("{:?}", span.splice)
        };
        assert_eq!(text(place, &json), r#"{"value":"y","value":null}"#);
    }

    #[test]
    fn the_place_of_the_segment_id_is_found() {
        // What is replaced, or what stands right behind the place.
        let rows = [
            (r#""attributes":null"#, "all", "null"),
            (
                r#""attributes":[{"sentry.segment.id":1}]"#,
                "all",
                r#"[{"sentry.segment.id":1}]"#,
            ),
            (r#""attributes":"x""#, "all", r#""x""#),
            (r#""attributes":{ }"#, "empty", " }"),
            (
                r#""attributes":{"a":{"sentry.segment.id":{"value":"x"}}}"#,
                "object",
                r#""a":"#,
            ),
            (r#""attributes": { "a":null}"#, "object", r#" "a":null"#),
            (
                r#""attributes":{"sentry.segment.id": null }"#,
                "one",
                "null",
            ),
            (r#""attributes":{"sentry.segment.id":"x"}"#, "one", r#""x""#),
            (r#""attributes":{"sentry.segment.id":[1]}"#, "one", "[1]"),
            (r#""attributes":{"sentry.segment.id":{}}"#, "one", "{}"),
            (
                r#""attributes":{"sentry.segment.id":{"type":"string"}}"#,
                "one",
                r#"{"type":"string"}"#,
            ),
            (
                r#""attributes":{"sentry.segment.id":{"value":null}}"#,
                "one",
                r#"{"value":null}"#,
            ),
            (
                r#""attributes":{"sentry.segment.id":{"value":5}}"#,
                "one",
                r#"{"value":5}"#,
            ),
            (
                r#""attributes":{"sentry.segment.id":{"value":{"value":"x"}}}"#,
                "one",
                r#"{"value":{"value":"x"}}"#,
            ),
        ];
        for (row, kind, part) in rows {
            let json = message(row);
            let span = span(&json);
            assert_eq!(span.segment, None, "{row}");
            let found = match &span.splice.segment {
                SegmentPlace::Attributes(place) => ("all", text(place, &json)),
                SegmentPlace::Attribute(place) => ("one", text(place, &json)),
                SegmentPlace::Object { at, empty } => (
                    if *empty { "empty" } else { "object" },
                    text(&(*at..*at + u32::try_from(part.len()).unwrap()), &json),
                ),
                other => panic!("{row}: {other:?}"),
            };
            assert_eq!(found, (kind, part.to_owned()), "{row}");
        }
        assert_eq!(span(&message("")).splice.segment, SegmentPlace::Missing);
        assert_eq!(span(&message("")).splice.is_segment, None);
        let empty = message(r#""attributes":{"sentry.segment.id":{"value":""}}"#);
        assert_eq!(span(&empty).segment, Some(SpanId::new(b"")));
        assert_eq!(span(&empty).splice.segment, SegmentPlace::Known);
    }

    #[test]
    fn depth_of_nesting_neither_fails_nor_costs_stack() {
        const DEPTH: usize = 1_000_000;
        let arrays = format!("{}{}", "[".repeat(DEPTH), "]".repeat(DEPTH));
        let objects = format!("{}1{}", r#"{"a":"#.repeat(DEPTH), "}".repeat(DEPTH));
        for deep in [&arrays, &objects] {
            for row in [
                format!(r#""x":{deep}"#),
                format!(r#""attributes":{deep}"#),
                format!(r#""attributes":{{"sentry.segment.id":{deep}}}"#),
                format!(r#""attributes":{{"sentry.segment.id":{{"value":{deep}}}}}"#),
            ] {
                span(&message(&row));
            }
            let json = message(&format!(r#""status":{deep}"#));
            let error = parse(json.as_bytes());
            assert!(matches!(error, Err(ParseError::WrongType { .. })));
        }
        assert!(matches!(
            parse(arrays.as_bytes()),
            Err(ParseError::NoObject)
        ));
        let open = format!(r#"{{"x":{}"#, "[".repeat(DEPTH));
        assert!(matches!(
            parse(open.as_bytes()),
            Err(ParseError::InvalidJson(_))
        ));
    }

    #[test]
    fn numbers_are_whole_however_they_are_written() {
        let rows = [
            ("0", Some(0)),
            ("-0", Some(0)),
            ("-0.0e5", Some(0)),
            ("0e99999999999999999999", Some(0)),
            ("0.0000e-99999999999999999999", Some(0)),
            ("1.0", Some(1)),
            ("1.50e1", Some(15)),
            ("10E-1", Some(1)),
            ("1e+3", Some(1000)),
            ("0.001e3", Some(1)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551615.00", Some(u64::MAX)),
            ("1844674407370955161.5e1", Some(u64::MAX)),
            ("1e19", Some(10_000_000_000_000_000_000)),
            ("18446744073709551616", None),
            ("1e20", None),
            ("1e99999999999999999999", None),
            ("1e-99999999999999999999", None),
            ("1.5", None),
            ("15e-1", None),
            ("-1", None),
            ("-1.0", None),
        ];
        for (number, value) in rows {
            assert_eq!(whole(number), value, "{number}");
        }
    }

    /// A message and what is to be edited in it, done the plain way.
    fn edited(json: &[u8], span: &Span, segment: &str, is_segment: bool) -> Vec<u8> {
        let attribute = json!({"type": "string", "value": segment}).to_string();
        let named = format!(r#""sentry.segment.id":{attribute}"#);
        let splice = &span.splice;
        let behind_id = splice.span_id_end..splice.span_id_end;
        let mut edits = vec![match splice.is_segment.clone() {
            Some(value) => (value, is_segment.to_string()),
            None => (behind_id.clone(), format!(r#","is_segment":{is_segment}"#)),
        }];
        edits.extend(match splice.segment.clone() {
            SegmentPlace::Known => None,
            SegmentPlace::Attribute(value) => Some((value, attribute)),
            SegmentPlace::Object { at, empty } => {
                Some((at..at, format!("{named}{}", if empty { "" } else { "," })))
            }
            SegmentPlace::Attributes(value) => Some((value, format!("{{{named}}}"))),
            SegmentPlace::Missing => Some((behind_id, format!(r#","attributes":{{{named}}}"#))),
        });
        edits.sort_by_key(|(place, _)| std::cmp::Reverse((place.start, place.end)));
        let mut out = json.to_vec();
        for (place, text) in edits {
            let place: Range<usize> =
                place.start.try_into().unwrap()..place.end.try_into().unwrap();
            out = [&out[..place.start], text.as_bytes(), &out[place.end..]].concat();
        }
        out
    }

    /// The same, done on the parsed message.
    fn expected(mut message: Value, segment: &str, is_segment: bool) -> Value {
        message["is_segment"] = is_segment.into();
        if !message["attributes"].is_object() {
            message["attributes"] = json!({});
        }
        let attribute = &mut message["attributes"]["sentry.segment.id"];
        if !attribute.get("value").is_some_and(Value::is_string) {
            *attribute = json!({"type": "string", "value": segment});
        }
        message
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 8, 3, |inner| {
            prop_oneof![
                vec(inner.clone(), 0..3).prop_map(Value::from),
                vec((any_key(), inner), 0..3).prop_map(|fields| fields.into_iter().collect()),
            ]
        })
    }

    fn any_key() -> impl Strategy<Value = String> {
        let known = FIELDS
            .into_iter()
            .chain([SEGMENT_ATTRIBUTE, "value", "type"]);
        prop_oneof![
            proptest::sample::select(known.map(str::to_owned).collect::<Vec<_>>()),
            ".{0,6}",
        ]
    }

    fn id() -> impl Strategy<Value = Value> {
        prop_oneof!["[0-9a-f]{16}", "[0-9a-f]{32}", ".{0,40}"].prop_map(Value::from)
    }

    fn maybe<V: Into<Value>>(value: impl Strategy<Value = V>) -> impl Strategy<Value = Value> {
        prop_oneof![Just(Value::Null), value.prop_map(Into::into)]
    }

    fn attributes() -> impl Strategy<Value = Value> {
        let attribute = prop_oneof![
            any_value(),
            any_value().prop_map(|value| json!({"type": "string", "value": value})),
            id().prop_map(|value| json!({"value": value})),
        ];
        let object = (
            maybe(attribute),
            vec((any_key(), any_value()), 0..3),
            any::<bool>(),
        );
        let object = object.prop_map(|(attribute, fields, there)| {
            let mut object: Value = fields.into_iter().collect();
            if there {
                object[SEGMENT_ATTRIBUTE] = attribute;
            }
            object
        });
        prop_oneof![3 => object, 1 => any_value()]
    }

    /// The fields of a valid span in any order; some keys stand twice, the wrong one first; some keys are escaped.
    fn fields() -> impl Strategy<Value = Vec<(String, Value)>> {
        let required = (
            (any::<u64>(), any::<u64>(), id(), id()),
            (any::<f64>(), any::<u32>(), any::<u16>(), ".{0,4}"),
        );
        let required = required.prop_map(
            |((organization, project, trace, id), (time, received, days, status))| {
                let time = if time.is_finite() { time } else { 0.0 };
                json!({
                    "organization_id": organization, "project_id": project, "trace_id": trace, "span_id": id,
                    "start_timestamp": time, "end_timestamp": time, "received": received,
                    "retention_days": days, "status": status,
                })
            },
        );
        let optional = (
            maybe(id()),
            maybe(any::<bool>()),
            attributes(),
            maybe(".{0,4}"),
        );
        let which = vec(any::<bool>(), 4);
        let fields = (
            required,
            optional,
            which,
            vec(("[a-z]{0,3}", any_value()), 0..3),
        );
        let fields = fields.prop_map(
            |(required, (parent, is_segment, attributes, name), which, more)| {
                let Value::Object(fields) = required else {
                    unreachable!()
                };
                let names = ["parent_span_id", "is_segment", "attributes", "name"];
                let optional = names
                    .into_iter()
                    .zip([parent, is_segment, attributes, name])
                    .zip(which);
                let optional = optional
                    .filter(|(_, there)| *there)
                    .map(|((name, value), _)| (name.to_owned(), value));
                fields
                    .into_iter()
                    .chain(optional)
                    .chain(more)
                    .collect::<Vec<_>>()
            },
        );
        let shadowed = vec((any::<Index>(), any_value()), 0..3);
        (fields.prop_shuffle(), shadowed).prop_map(|(mut fields, shadowed)| {
            for (index, value) in shadowed {
                let name = index.get(&fields).0.clone();
                fields.insert(0, (name, value));
            }
            fields
        })
    }

    fn printed(fields: &[(String, Value)], escaped: &[bool], space: &str) -> String {
        let mut escaped = escaped.iter().cycle();
        let mut out = format!("{space}{{");
        for (place, (name, value)) in fields.iter().enumerate() {
            let comma = if place == 0 { "" } else { "," };
            let name = if *escaped.next().unwrap() {
                let units = name.encode_utf16().map(|unit| format!("\\u{unit:04x}"));
                format!("\"{}\"", units.collect::<String>())
            } else {
                Value::from(name.as_str()).to_string()
            };
            out += &format!("{comma}{space}{name}{space}:{space}{value}{space}");
        }
        out + "}" + space
    }

    proptest! {
        #[test]
        fn a_span_reads_as_any_parser_reads_it(
            fields in fields(), escaped in vec(any::<bool>(), 1..20), space in "[ \n\r\t]{0,2}", segment in "[a-z]{0,4}", is_segment: bool,
        ) {
            let json = printed(&fields, &escaped, &space);
            let span = span(&json);
            let value: Value = serde_json::from_str(&json).unwrap();
            let id = |value: &Value| value.as_str().map(|text| SpanId::new(text.as_bytes()));
            prop_assert_eq!(Some(span.organization.0), value["organization_id"].as_u64());
            prop_assert_eq!(Some(span.project.0), value["project_id"].as_u64());
            prop_assert_eq!(&span.trace, &TraceId::new(value["trace_id"].as_str().unwrap().as_bytes()));
            prop_assert_eq!(Some(span.id.clone()), id(&value["span_id"]));
            prop_assert_eq!(&span.parent, &id(&value["parent_span_id"]));
            prop_assert_eq!(span.is_segment, value["is_segment"] == true);
            let known = value.pointer("/attributes/sentry.segment.id/value").and_then(id);
            prop_assert_eq!(&span.segment, &known);
            prop_assert_eq!(known.is_some(), span.splice.segment == SegmentPlace::Known);

            let output: Value = serde_json::from_slice(&edited(json.as_bytes(), &span, &segment, is_segment)).unwrap();
            prop_assert_eq!(output, expected(value, &segment, is_segment));
            let stored = chunk::encode(Codec::None, &[(json.as_bytes(), &span.splice)]);
            let stored = chunk::decode(&stored, u64::MAX).unwrap();
            prop_assert_eq!(stored.spans().next(), Some((json.as_bytes(), &span.splice)));
        }

        #[test]
        fn damaged_messages_are_refused_or_still_json(
            fields in fields(), changes in vec((any::<Index>(), prop_oneof![any::<u8>(), proptest::sample::select(b"{}[]\",:\\0e.-n ".to_vec())]), 1..4),
        ) {
            let mut json = printed(&fields, &[false], "").into_bytes();
            for (place, byte) in changes {
                *place.get_mut(&mut json) = byte;
            }
            if parse(&json).is_ok() {
                prop_assert!(serde_json::from_slice::<IgnoredAny>(&json).is_ok());
            }
        }

        #[test]
        fn any_bytes_are_refused_without_harm(json in vec(any::<u8>(), 0..100)) {
            prop_assert!(parse(&json).is_err());
        }
    }
}
