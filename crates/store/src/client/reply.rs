//! Reads replies: any value that Redis may send gives what was asked, or nothing.
//!
//! In:     a `Value`.
//! Out:    numbers, scores, lists, a position.
//! Keeps:  never a panic, never a guess.
//! Knows:  the forms in which Redis 6.2 and later answer. Pure.
//! Source: docs/store.md 1.

use redis::Value;
use shared::time::UnixMillis;

/// A bucket's position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// The offset below which the bucket holds everything.
    pub next: u64,
    /// The shard's clock when it was written.
    pub clock: UnixMillis,
    /// Spans inserted, in all.
    pub spans: u64,
    /// The store's instance id when it was written.
    pub instance: String,
}

/// The bytes of a string reply.
#[must_use]
pub fn bytes(value: &Value) -> Option<&[u8]> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.as_bytes()),
        _ => None,
    }
}

/// A number that is not negative, as an integer or as text.
#[must_use]
pub fn number(value: &Value) -> Option<u64> {
    match value {
        Value::Int(number) => u64::try_from(*number).ok(),
        other => std::str::from_utf8(bytes(other)?).ok()?.parse().ok(),
    }
}

/// A count; no number is none.
#[must_use]
pub fn count(value: &Value) -> u64 {
    number(value).unwrap_or(0)
}

/// An offset, where there is one.
#[must_use]
pub fn offset(value: &Value) -> Option<u64> {
    number(value)
}

/// A score in whole milliseconds; what lies outside of a shard clock's range is its nearest end.
#[must_use]
pub fn score(text: &[u8]) -> Option<UnixMillis> {
    let text = std::str::from_utf8(text).ok()?;
    if let Ok(whole) = text.parse::<u64>() {
        return Some(UnixMillis(whole).min(UnixMillis::MAX));
    }
    let score: f64 = text.parse().ok().filter(|score: &f64| !score.is_nan())?;
    // Between these bounds every whole number is exact, and prints without an exponent.
    format!("{:.0}", score.clamp(0.0, 9_007_199_254_740_992.0))
        .parse()
        .ok()
        .map(UnixMillis)
}

/// A list of strings; `None` for anything else, or a list that holds anything else.
#[must_use]
pub fn list(value: &Value) -> Option<Vec<Vec<u8>>> {
    match value {
        Value::Array(values) | Value::Set(values) => values
            .iter()
            .map(|value| bytes(value).map(<[u8]>::to_vec))
            .collect(),
        _ => None,
    }
}

/// The values of fields, in the order in which they were asked for, none where there is no such field; `None` for anything that is no list.
#[must_use]
pub fn values(value: Value) -> Option<Vec<Option<Vec<u8>>>> {
    let Value::Array(values) = value else {
        return None;
    };
    let owned = |value| match value {
        Value::BulkString(bytes) => Some(bytes),
        _ => None,
    };
    Some(values.into_iter().map(owned).collect())
}

/// Fields of a hash with their values; `None` for anything that is no list of pairs of strings.
#[must_use]
pub fn pairs(value: Value) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let Value::Array(values) = value else {
        return None;
    };
    let mut values = values.into_iter();
    let mut pairs = Vec::with_capacity(values.len() / 2);
    while let Some(field) = values.next() {
        match (field, values.next()?) {
            (Value::BulkString(field), Value::BulkString(value)) => pairs.push((field, value)),
            _ => return None,
        }
    }
    Some(pairs)
}

/// A page of a hash: the cursor of the next one, 0 behind the last, and the fields.
#[must_use]
pub fn page(value: &Value) -> Option<(u64, Vec<Vec<u8>>)> {
    let Value::Array(parts) = value else {
        return None;
    };
    let [cursor, Value::Array(pairs)] = parts.as_slice() else {
        return None;
    };
    let fields = pairs.chunks(2).map(|pair| match pair {
        [field, _] => bytes(field).map(<[u8]>::to_vec),
        _ => None,
    });
    Some((number(cursor)?, fields.collect::<Option<_>>()?))
}

/// Members with their scores; what is no such pair is left out.
#[must_use]
pub fn scored(value: &Value) -> Vec<(Vec<u8>, UnixMillis)> {
    let Value::Array(values) = value else {
        return Vec::new();
    };
    let pair = |pair: &[Value]| match pair {
        [member, at] => Some((bytes(member)?.to_vec(), score(bytes(at)?)?)),
        _ => None,
    };
    values.chunks(2).filter_map(pair).collect()
}

/// A whole position; `None` when there is none, or when it is no position.
#[must_use]
pub fn position(value: &Value) -> Option<Position> {
    let Value::Array(values) = value else {
        return None;
    };
    let field = |name: &[u8]| {
        values
            .chunks_exact(2)
            .find(|pair| bytes(&pair[0]) == Some(name))
            .map(|pair| &pair[1])
    };
    Some(Position {
        next: number(field(b"next")?)?,
        clock: UnixMillis(number(field(b"clock")?)?).min(UnixMillis::MAX),
        spans: number(field(b"spans")?)?,
        instance: String::from_utf8_lossy(bytes(field(b"instance")?)?).into_owned(),
    })
}

/// A hash of counters, such as the sum: names and amounts.
#[must_use]
pub fn counters(value: &Value) -> Vec<(String, u64)> {
    let Value::Array(values) = value else {
        return Vec::new();
    };
    let pair = |pair: &[Value]| {
        Some((
            String::from_utf8_lossy(bytes(&pair[0])?).into_owned(),
            number(&pair[1])?,
        ))
    };
    values.chunks_exact(2).filter_map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_read_in_every_form_that_redis_prints() {
        let rows: [(&str, Option<u64>); 8] = [
            ("1732426890123", Some(1_732_426_890_123)),
            ("1.732426890123e+12", Some(1_732_426_890_123)),
            ("1.5", Some(2)),
            ("-7", Some(0)),
            ("inf", Some(1 << 53)),
            ("99999999999999999", Some(1 << 53)),
            ("nan", None),
            ("x", None),
        ];
        for (text, expected) in rows {
            assert_eq!(score(text.as_bytes()), expected.map(UnixMillis), "{text}");
        }
    }

    #[test]
    fn anything_else_is_nothing() {
        for value in [
            Value::Nil,
            Value::Int(-1),
            Value::Okay,
            Value::Array(vec![Value::Nil]),
            Value::BulkString(b"x".to_vec()),
        ] {
            assert_eq!(position(&value), None);
            assert_eq!(number(&value), None);
            assert!(scored(&value).is_empty());
        }
        assert_eq!(list(&Value::Array(vec![Value::Int(1)])), None);
    }

    #[test]
    fn values_keep_the_places_of_what_is_not_there() {
        let text = Value::BulkString(b"x".to_vec());
        let reply = Value::Array(vec![Value::Nil, text, Value::Int(1)]);
        assert_eq!(values(reply), Some(vec![None, Some(b"x".to_vec()), None]));
        assert_eq!(values(Value::Nil), None);
    }

    #[test]
    fn pairs_are_whole_and_of_strings() {
        let text = |text: &str| Value::BulkString(text.into());
        let read = |values: &[Value]| pairs(Value::Array(values.to_vec())).map(|pairs| pairs.len());
        assert_eq!(read(&[]), Some(0));
        assert_eq!(read(&[text("a"), text("1")]), Some(1));
        assert_eq!(read(&[text("a"), text("1"), text("b")]), None);
        assert_eq!(read(&[text("a"), Value::Array(Vec::new())]), None);
        assert_eq!(pairs(Value::Nil), None);
    }

    #[test]
    fn a_page_is_a_cursor_and_whole_pairs() {
        let text = |text: &str| Value::BulkString(text.into());
        let reply = |pairs: &[&str]| {
            let pairs = pairs.iter().map(|part| text(part)).collect();
            Value::Array(vec![text("17"), Value::Array(pairs)])
        };
        let fields = |names: &[&str]| names.iter().map(|name| name.as_bytes().to_vec()).collect();
        assert_eq!(page(&reply(&[])), Some((17, Vec::new())));
        assert_eq!(
            page(&reply(&["a", "1", "b", "2"])),
            Some((17, fields(&["a", "b"])))
        );
        assert_eq!(page(&reply(&["a", "1", "b"])), None);
        assert_eq!(page(&Value::Array(vec![text("17")])), None);
        assert_eq!(
            page(&Value::Array(vec![text("x"), Value::Array(vec![])])),
            None
        );
        assert_eq!(page(&Value::Nil), None);
    }
}
