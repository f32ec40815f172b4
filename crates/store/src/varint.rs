//! Varints (LEB128), and a reader that never reads beyond its bytes.
//!
//! In:     bytes from Redis, which may be anything.
//! Out:    numbers and slices; `None` where the bytes end, or where a number has a longer form than it needs.
//! Keeps:  one form for each number, so that what is read can be written again byte for byte.
//! Knows:  nothing else. Pure.
//! Source: docs/store.md 1.

/// Appends a number in as few bytes as it needs, 7 bits a byte, lowest first.
pub(crate) fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(low_bits(value) | 0x80);
        value >>= 7;
    }
    out.push(low_bits(value));
}

fn low_bits(value: u64) -> u8 {
    value.to_le_bytes()[0] & 0x7f
}

/// Takes bytes from the front.
#[derive(Debug)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// What has not been taken.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.0
    }

    pub(crate) fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    pub(crate) fn take(&mut self, length: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(length).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    /// A number in its shortest form.
    pub(crate) fn number(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..u64::BITS).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return None; // more than 64 bits
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return (byte != 0 || shift == 0).then_some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(value: u64) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, value);
        out
    }

    #[test]
    fn longer_forms_and_large_numbers_are_refused() {
        let rows: [(&[u8], Option<u64>); 8] = [
            (&[0], Some(0)),
            (&[0x80, 1], Some(128)),
            (&[0x80, 0], None),
            (&[0x80], None),
            (&[], None),
            (&[0xff; 11], None),
            (
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
                Some(u64::MAX),
            ),
            (
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2],
                None,
            ),
        ];
        for (bytes, value) in rows {
            assert_eq!(Reader::new(bytes).number(), value, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn numbers_have_one_form(value: u64, shift in 0..64_u32, bytes in proptest::collection::vec(any::<u8>(), 0..12)) {
            let value = value >> shift;
            prop_assert_eq!(Reader::new(&written(value)).number(), Some(value));
            let mut reader = Reader::new(&bytes);
            if let Some(value) = reader.number() {
                prop_assert_eq!(written(value), &bytes[..bytes.len() - reader.rest().len()]);
            }
        }
    }
}
