//! Ids as they stand in the input: parsed once, printed once, any legal text.
//!
//! In:     the decoded bytes of a JSON string, or a number.
//! Out:    values that compare and hash cheaply: 16 and 32 lower-case hex digits are packed.
//! Keeps:  every text exactly; nothing is refused, trimmed or folded.
//! Knows:  nothing else. Pure.
//! Source: docs/spec.md 2.2.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An organization's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OrganizationId(pub u64);

/// A project's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProjectId(pub u64);

/// A trace id: 32 lower-case hex digits packed, any other text as it is.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TraceId {
    /// 32 lower-case hex digits.
    Hex(u128),
    /// Anything else: the decoded bytes (generalised UTF-8, since JSON may escape lone surrogates).
    Text(Box<[u8]>),
}

/// A span id: 16 lower-case hex digits packed, any other text as it is.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SpanId {
    /// 16 lower-case hex digits.
    Hex(u64),
    /// Anything else, as for [`TraceId::Text`].
    Text(Box<[u8]>),
}

impl fmt::Display for OrganizationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ProjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl TraceId {
    /// Takes the decoded bytes of an id.
    #[must_use]
    pub fn new(text: &[u8]) -> Self {
        match packed::<32>(text) {
            Some(value) => Self::Hex(value),
            None => Self::Text(text.into()),
        }
    }

    /// Appends the id's text, exactly as it was taken.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hex(value) => push_hex(out, *value, 32),
            Self::Text(text) => out.extend_from_slice(text),
        }
    }

    /// The id's text.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(32);
        self.write_to(&mut out);
        out
    }
}

impl SpanId {
    /// Takes the decoded bytes of an id.
    #[must_use]
    pub fn new(text: &[u8]) -> Self {
        match packed::<16>(text) {
            // 16 hex digits fill 64 bits and no more.
            Some(value) => u64::try_from(value).map_or_else(|_| Self::Text(text.into()), Self::Hex),
            None => Self::Text(text.into()),
        }
    }

    /// Appends the id's text, exactly as it was taken.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hex(value) => push_hex(out, u128::from(*value), 16),
            Self::Text(text) => out.extend_from_slice(text),
        }
    }

    /// The id's text.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16);
        self.write_to(&mut out);
        out
    }
}

/// For logs: hex as it is, other bytes escaped, long text cut.
fn display(text: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    const SHOWN: usize = 64;
    let cut = &text[..text.len().min(SHOWN)];
    write!(f, "{}", cut.escape_ascii())?;
    if text.len() > SHOWN {
        write!(f, "…({} bytes)", text.len())?;
    }
    Ok(())
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        display(&self.to_bytes(), f)
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        display(&self.to_bytes(), f)
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        display(&self.to_bytes(), f)
    }
}

impl fmt::Debug for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        display(&self.to_bytes(), f)
    }
}

/// The value of exactly `DIGITS` lower-case hex digits; `None` for any other text, so that text round-trips.
fn packed<const DIGITS: usize>(text: &[u8]) -> Option<u128> {
    if text.len() != DIGITS {
        return None;
    }
    text.iter().try_fold(0_u128, |value, digit| {
        let nibble = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(value << 4 | u128::from(nibble))
    })
}

fn push_hex(out: &mut Vec<u8>, value: u128, digits: u32) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for place in (0..digits).rev() {
        let nibble = usize::try_from(value >> (4 * place) & 0xf).unwrap_or(0);
        out.push(DIGITS[nibble]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hex_is_packed_and_other_text_is_kept() {
        let hex = b"0123456789abcdef";
        assert_eq!(SpanId::new(hex), SpanId::Hex(0x0123_4567_89ab_cdef));
        for text in [
            &b""[..],
            b"0123456789ABCDEF",
            b"0123456789abcde",
            b"{a}:b\0",
            &[b'x'; 500],
        ] {
            assert!(matches!(SpanId::new(text), SpanId::Text(_)), "{text:?}");
        }
        assert!(matches!(TraceId::new(&[b'0'; 32]), TraceId::Hex(0)));
    }

    proptest! {
        #[test]
        fn ids_round_trip(text in proptest::collection::vec(any::<u8>(), 0..40), hex in "[0-9a-f]{16}", trace in "[0-9a-f]{32}") {
            prop_assert_eq!(SpanId::new(&text).to_bytes(), text.clone());
            prop_assert_eq!(TraceId::new(&text).to_bytes(), text);
            prop_assert_eq!(SpanId::new(hex.as_bytes()).to_bytes(), hex.as_bytes());
            prop_assert_eq!(TraceId::new(trace.as_bytes()).to_bytes(), trace.as_bytes());
        }
    }
}
