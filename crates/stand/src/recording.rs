//! Recorded traffic: files of one message a line, with the time at which it arrived.
//!
//! In:     lines `<milliseconds since the first>` TAB `<message>`; compressed when the name ends in `.zst`.
//! Out:    messages, one at a time, in the file's order.
//! Keeps:  a message's bytes as they stand; memory is one line.
//! Knows:  where a message has its trace id. Nothing else of it.
//! Source: docs/house.md 13.

use std::{
    fmt,
    fs::File,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;
use shared::time::UnixMillis;

use crate::{
    StandError,
    traffic::{SpanMessage, partition_of},
};

/// The longest line: a longer one is no message.
const LINE_BYTES: u64 = 16 << 20;

/// The messages of a file.
pub struct Recording {
    lines: Box<dyn BufRead>,
    path: PathBuf,
    line: u64,
    start: UnixMillis,
    partitions: u32,
}

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recording")
            .field("path", &self.path)
            .field("line", &self.line)
            .finish_non_exhaustive()
    }
}

impl Recording {
    /// Opens a file whose first message is to arrive at `start`.
    ///
    /// # Errors
    /// [`StandError::System`] when it cannot be opened.
    pub fn open(path: &Path, start: UnixMillis, partitions: u32) -> Result<Self, StandError> {
        let what = || format!("open recording={}", path.display());
        let file = File::open(path).map_err(StandError::system(what()))?;
        let lines: Box<dyn BufRead> =
            if path.extension().is_some_and(|extension| extension == "zst") {
                Box::new(BufReader::new(
                    zstd::stream::read::Decoder::new(file).map_err(StandError::system(what()))?,
                ))
            } else {
                Box::new(BufReader::new(file))
            };
        Ok(Self {
            lines,
            path: path.into(),
            line: 0,
            start,
            partitions,
        })
    }

    fn read(&mut self) -> Result<Option<SpanMessage>, StandError> {
        let mut line = Vec::new();
        self.line += 1;
        let read = (&mut self.lines)
            .take(LINE_BYTES)
            .read_until(b'\n', &mut line);
        if read.map_err(StandError::system(format!(
            "read recording={}",
            self.path.display()
        )))? == 0
        {
            return Ok(None);
        }
        if line.pop_if(|last| *last == b'\n').is_none()
            && u64::try_from(line.len()).is_ok_and(|length| length >= LINE_BYTES)
        {
            return Err(self.malformed(format!("line is over {LINE_BYTES} bytes")));
        }
        self.message(&line).map(Some)
    }

    fn message(&self, line: &[u8]) -> Result<SpanMessage, StandError> {
        let tab = line
            .iter()
            .position(|&byte| byte == b'\t')
            .ok_or_else(|| self.malformed("no tab"))?;
        let (since, payload) = (&line[..tab], &line[tab + 1..]);
        let since: u64 = std::str::from_utf8(since)
            .ok()
            .and_then(|digits| digits.parse().ok())
            .ok_or_else(|| self.malformed("no number of milliseconds before the tab"))?;
        let value: Value =
            serde_json::from_slice(payload).map_err(|error| self.malformed(error))?;
        let trace = value
            .get("trace_id")
            .and_then(Value::as_str)
            .ok_or_else(|| self.malformed("no trace_id"))?;
        Ok(SpanMessage {
            partition: partition_of(trace.as_bytes(), self.partitions),
            arrival: self.start.after(Duration::from_millis(since)),
            serial: None,
            payload: payload.to_vec(),
        })
    }

    fn malformed(&self, reason: impl fmt::Display) -> StandError {
        StandError::Malformed {
            what: format!("recording={} line={}", self.path.display(), self.line),
            reason: reason.to_string(),
        }
    }
}

impl Iterator for Recording {
    type Item = Result<SpanMessage, StandError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const LINES: &str = "0\t{\"trace_id\":\"a\"}\n1500\t{ \"trace_id\":\"b\",\"n\":1.50}\n";

    #[test]
    fn plain_and_compressed_files_give_the_same_messages() {
        let folder = tempfile::tempdir().unwrap();
        let (plain, packed) = (
            folder.path().join("a.ndjson"),
            folder.path().join("a.ndjson.zst"),
        );
        fs::write(&plain, LINES).unwrap();
        fs::write(&packed, zstd::encode_all(LINES.as_bytes(), 3).unwrap()).unwrap();
        let read = |path: &Path| -> Vec<SpanMessage> {
            Recording::open(path, UnixMillis(1_000), 4)
                .unwrap()
                .map(Result::unwrap)
                .collect()
        };
        let messages = read(&plain);
        assert_eq!(messages, read(&packed));
        assert_eq!(messages.len(), 2);
        assert_eq!(
            (messages[1].arrival, messages[1].serial),
            (UnixMillis(2_500), None)
        );
        assert_eq!(messages[1].payload, b"{ \"trace_id\":\"b\",\"n\":1.50}");
        assert_eq!(messages[1].partition, partition_of(b"b", 4));
    }

    #[test]
    fn a_bad_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bad");
        for (line, reason) in [
            ("x", "no tab"),
            ("x\t{}", "no number"),
            ("1\t{", "EOF"),
            ("1\t{}", "no trace_id"),
        ] {
            fs::write(&path, format!("{LINES}{line}\n")).unwrap();
            let error = Recording::open(&path, UnixMillis(0), 1)
                .unwrap()
                .find_map(Result::err)
                .unwrap()
                .to_string();
            assert!(
                error.contains("line=3") && error.contains(reason),
                "{error}"
            );
        }
    }
}
