//! The Redis protocol, as far as a proxy has to see it.
//!
//! In:     bytes of a client's stream, bytes of a server's stream, in pieces.
//! Out:    the arguments of commands; the ends of replies.
//! Keeps:  nothing is buffered here; text that is not of the protocol is told, never guessed at.
//! Knows:  arrays of bulk strings (what clients send), every reply of RESP2 and RESP3. Pure.
//! Source: docs/house.md 13.

/// What stands at the beginning of a client's bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command<'b> {
    /// A whole command: its arguments, the name first, and its length.
    Whole(Vec<&'b [u8]>, usize),
    /// The beginning of one.
    Part,
    /// Something else.
    Foreign,
}

/// Reads the command at the beginning of `bytes`.
pub(crate) fn command(bytes: &[u8]) -> Command<'_> {
    let Some(&first) = bytes.first() else {
        return Command::Part;
    };
    if first != b'*' {
        return Command::Foreign;
    }
    let (count, mut at) = match number_line(bytes, 1) {
        Line::Number(count, end) => (count, end),
        Line::Part => return Command::Part,
        Line::Foreign => return Command::Foreign,
    };
    let mut arguments = Vec::new();
    for _ in 0..count {
        match bytes.get(at) {
            None => return Command::Part,
            Some(b'$') => {}
            Some(_) => return Command::Foreign,
        }
        let (length, start) = match number_line(bytes, at + 1) {
            Line::Number(length, end) => (length, end),
            Line::Part => return Command::Part,
            Line::Foreign => return Command::Foreign,
        };
        let end = start.saturating_add(length);
        let Some(argument) = bytes
            .get(start..end)
            .filter(|_| bytes.len() >= end.saturating_add(2))
        else {
            return Command::Part;
        };
        arguments.push(argument);
        at = end + 2;
    }
    Command::Whole(arguments, at)
}

enum Line {
    Number(usize, usize),
    Part,
    Foreign,
}

/// The number from `start` to the end of its line, and where the next line begins.
fn number_line(bytes: &[u8], start: usize) -> Line {
    const DIGITS_MAX: usize = 20;
    let rest = bytes.get(start..).unwrap_or_default();
    let Some(length) = rest.iter().take(DIGITS_MAX).position(|&byte| byte == b'\r') else {
        return if rest.len() >= DIGITS_MAX {
            Line::Foreign
        } else {
            Line::Part
        };
    };
    let number = std::str::from_utf8(&rest[..length])
        .ok()
        .and_then(|digits| digits.parse().ok());
    match (number, rest.get(length + 1)) {
        (Some(number), Some(b'\n')) => Line::Number(number, start + length + 2),
        (Some(_), None) => Line::Part,
        _ => Line::Foreign,
    }
}

/// Finds where replies end in a server's stream.
#[derive(Debug)]
pub(crate) struct Replies {
    /// Values that are still to come in the reply under way; 0 between replies.
    left: u64,
    /// Bytes of a string, with its line end, that are still to come.
    skip: usize,
    /// The line under way.
    line: Vec<u8>,
}

impl Replies {
    pub(crate) fn new() -> Self {
        Self {
            left: 0,
            skip: 0,
            line: Vec::new(),
        }
    }

    /// Whether no reply is under way.
    pub(crate) fn is_between(&self) -> bool {
        self.left == 0 && self.skip == 0 && self.line.is_empty()
    }

    /// Goes on to the end of the reply under way: how many of `bytes` that takes, and whether the end is among them.
    pub(crate) fn advance(&mut self, bytes: &[u8]) -> (usize, bool) {
        let mut at = 0;
        while at < bytes.len() {
            if self.skip > 0 {
                let skipped = self.skip.min(bytes.len() - at);
                (self.skip, at) = (self.skip - skipped, at + skipped);
                if self.skip == 0 && self.left == 0 {
                    return (at, true);
                }
                continue;
            }
            let byte = bytes[at];
            at += 1;
            // A long error message is of no interest beyond its kind.
            if self.line.len() < 64 || byte == b'\n' {
                self.line.push(byte);
            }
            if byte == b'\n' && self.end_line() {
                return (at, true);
            }
        }
        (at, false)
    }

    /// Takes a whole line; whether a reply ends with it.
    fn end_line(&mut self) -> bool {
        let line = std::mem::take(&mut self.line);
        let kind = line.first().copied().unwrap_or(b'+');
        let number: i64 = std::str::from_utf8(line.get(1..).unwrap_or_default())
            .ok()
            .and_then(|digits| digits.trim_end().parse().ok())
            .unwrap_or(-1);
        let inside = u64::try_from(number).unwrap_or(0);
        self.left = self.left.max(1) - 1;
        match kind {
            b'*' | b'~' | b'>' => self.left += inside,
            b'%' => self.left += inside * 2,
            // Attributes stand before the value that they are of.
            b'|' => self.left += inside * 2 + 1,
            b'$' | b'=' | b'!' => {
                self.skip = usize::try_from(number).map_or(0, |length| length + 2)
            }
            _ => {}
        }
        self.left == 0 && self.skip == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_whole_and_no_sooner() {
        let bytes = b"*2\r\n$3\r\nGET\r\n$4\r\na\r\nb\r\n*1\r\n$4\r\nPING\r\n";
        let first = b"*2\r\n$3\r\nGET\r\n$4\r\na\r\nb\r\n".len();
        for cut in 0..first {
            assert_eq!(command(&bytes[..cut]), Command::Part, "{cut}");
        }
        assert_eq!(
            command(bytes),
            Command::Whole(vec![b"GET", b"a\r\nb"], first)
        );
        for foreign in [
            &b"PING\r\n"[..],
            b"*x\r\n",
            b"*1\r\n+OK\r\n",
            b"*99999999999999999999999",
            b"*1\r\r",
        ] {
            assert_eq!(command(foreign), Command::Foreign);
        }
    }

    #[test]
    fn replies_of_every_kind_end_where_they_end() {
        let replies = [
            "+OK\r\n",
            "-ERR a very long text that goes on and on and on, beyond what anybody would want to keep of it\r\n",
            ":12\r\n",
            "$-1\r\n",
            "$0\r\n\r\n",
            "$5\r\na\r\n*1\r\n",
            "*-1\r\n",
            "*0\r\n",
            "*3\r\n:1\r\n*2\r\n$1\r\nx\r\n+y\r\n$2\r\nzz\r\n",
            "%1\r\n+a\r\n*1\r\n:1\r\n",
            "_\r\n",
            "|1\r\n+ttl\r\n:1\r\n$1\r\nv\r\n",
        ];
        let stream = replies.concat();
        for piece in [1, 2, 3, 7, stream.len()] {
            let (mut reader, mut ends, mut seen) = (Replies::new(), Vec::new(), 0);
            for mut chunk in stream.as_bytes().chunks(piece) {
                while !chunk.is_empty() {
                    let (taken, is_end) = reader.advance(chunk);
                    seen += taken;
                    chunk = &chunk[taken..];
                    if is_end {
                        ends.push(seen);
                    }
                }
            }
            let expected: Vec<usize> = replies
                .iter()
                .scan(0, |at, reply| {
                    *at += reply.len();
                    Some(*at)
                })
                .collect();
            assert_eq!(ends, expected, "pieces of {piece}");
        }
    }
}
