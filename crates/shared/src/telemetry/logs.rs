//! Log records: one line each on standard error, with who says it.
//!
//! In:     records of the crate `log`.
//! Out:    one write each, of at most 4096 bytes.
//! Keeps:  a reader that is stuck stops nobody: what it does not take is dropped, counted, and said with the next record.
//! Knows:  env_logger. No role.
//! Source: docs/spec.md 8.3; docs/supervision.md 4.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    process,
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
};

use env_logger::{Builder, Target};
use log::LevelFilter;
use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, send},
};

/// What a pipe takes in one piece, so that lines of several processes do not cut into each other.
const RECORD_BYTES_MAX: usize = 4096;

/// Who says it.
#[derive(Debug, Clone)]
pub struct Identity {
    /// `supervisor`, or a worker's role.
    pub role: String,
    /// The worker's slot.
    pub slot: Option<u32>,
    /// Which life of its slot it is.
    pub generation: Option<u32>,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.role)?;
        if let Some(slot) = self.slot {
            write!(f, " slot={slot}")?;
        }
        write!(f, " pid={}", process::id())?;
        if let Some(generation) = self.generation {
            write!(f, " generation={generation}")?;
        }
        Ok(())
    }
}

/// Sends all records from `level` on to standard error. Only the first identity of a process counts.
pub fn start(level: LevelFilter, identity: &Identity) {
    let identity = identity.to_string();
    let mut builder = Builder::new();
    builder
        // All of them: which are printed is a switch that can be turned while the process runs.
        .filter_level(LevelFilter::Trace)
        .target(Target::Pipe(Box::new(Records::default())));
    builder.format(move |out, record| {
        let time = out.timestamp_micros();
        let text = record.args().to_string();
        // A record is a line, whatever text of others it holds.
        let text = if text.contains(['\n', '\r']) {
            text.replace(['\n', '\r'], "\\n")
        } else {
            text
        };
        writeln!(out, "{time} {} {identity} {text}", record.level())
    });
    // A second call finds the first one's logger in place, which is as good.
    drop(builder.try_init());
    self::level(level);
}

/// Prints records from another level on.
pub fn level(level: LevelFilter) {
    log::set_max_level(level);
}

/// Writes a line that an operator asked for: whatever the level, without time and identity, and as a record is written otherwise.
pub fn line(text: &str) {
    let text = text.replace(['\n', '\r'], "\\n");
    // Nobody reads it: it is asked for again.
    drop(OUTPUT.write(&shortened(text.as_bytes(), "")));
}

/// Where all lines of this process go.
static OUTPUT: LazyLock<Output> = LazyLock::new(Output::open);

/// Standard error, in a form that never makes a writer wait.
#[derive(Debug)]
enum Output {
    /// A pipe, through a description of its own: what others set on theirs stays as it is.
    Pipe(File),
    /// A socket, such as the journal's.
    Socket,
    /// A file or a terminal.
    Plain,
}

impl Output {
    fn open() -> Self {
        let Ok(about) = File::options()
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits() | OFlag::O_NOCTTY.bits())
            .open(STDERR)
            .and_then(|file| Ok((file.metadata()?.file_type(), file)))
        else {
            // The kernel opens no socket by this path.
            return if fs::metadata(STDERR).is_ok_and(|about| about.file_type().is_socket()) {
                Self::Socket
            } else {
                Self::Plain
            };
        };
        match about {
            (kind, file) if kind.is_fifo() => Self::Pipe(file),
            _ => Self::Plain,
        }
    }

    /// Writes one piece whole, or not at all.
    fn write(&self, piece: &[u8]) -> io::Result<()> {
        let written = match self {
            Self::Pipe(file) => (&mut &*file).write(piece),
            Self::Socket => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                send(io::stderr().as_fd().as_raw_fd(), piece, flags).map_err(io::Error::from)
            }
            Self::Plain if is_ready() => io::stderr().write(piece),
            Self::Plain => Err(io::ErrorKind::WouldBlock.into()),
        };
        written.map(drop)
    }
}

const STDERR: &str = "/proc/self/fd/2";

/// Whether a terminal takes more: one that is stopped does not.
fn is_ready() -> bool {
    let stderr = io::stderr();
    poll(
        &mut [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)],
        PollTimeout::ZERO,
    )
    .is_ok_and(|ready| ready > 0)
}

/// Records on their way, one piece each.
#[derive(Debug, Default)]
struct Records {
    dropped: AtomicU64,
}

impl Write for Records {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let dropped = self.dropped.load(Ordering::Relaxed);
        let piece = if dropped == 0 {
            shortened(record, "")
        } else {
            shortened(record, &format!(" (records_dropped={dropped} before)"))
        };
        match OUTPUT.write(&piece) {
            Ok(()) => self.dropped.fetch_sub(dropped, Ordering::Relaxed),
            Err(_) => self.dropped.fetch_add(1, Ordering::Relaxed),
        };
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A record with something behind it, cut at its end where it is too long; it stays one line.
fn shortened(record: &[u8], behind: &str) -> Vec<u8> {
    let text = record.strip_suffix(b"\n").unwrap_or(record);
    let room = RECORD_BYTES_MAX - behind.len() - 1;
    let mut piece = Vec::with_capacity(RECORD_BYTES_MAX.min(text.len() + behind.len() + 1));
    if text.len() <= room {
        piece.extend_from_slice(text);
    } else {
        const MARK: &str = "…";
        let mut end = room - MARK.len();
        while end > 0 && text[end] & 0xc0 == 0x80 {
            end -= 1;
        }
        piece.extend_from_slice(&text[..end]);
        piece.extend_from_slice(MARK.as_bytes());
    }
    piece.extend_from_slice(behind.as_bytes());
    piece.push(b'\n');
    piece
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_records_are_cut_to_one_piece_and_one_line() {
        assert_eq!(shortened(b"a\n", ""), b"a\n");
        assert_eq!(shortened(b"a\n", " (b)"), b"a (b)\n");
        for length in 4_000..4_200 {
            let piece = shortened(
                format!("{}\n", "é".repeat(length / 2)).as_bytes(),
                " (behind)",
            );
            assert!(piece.len() <= RECORD_BYTES_MAX);
            assert!(
                std::str::from_utf8(&piece)
                    .unwrap()
                    .ends_with(" (behind)\n")
            );
        }
    }

    #[test]
    fn an_identity_names_what_there_is() {
        let pid = process::id();
        let worker = Identity {
            role: "flush".into(),
            slot: Some(3),
            generation: Some(2),
        };
        assert_eq!(
            worker.to_string(),
            format!("flush slot=3 pid={pid} generation=2")
        );
        let supervisor = Identity {
            role: "supervisor".into(),
            slot: None,
            generation: None,
        };
        assert_eq!(supervisor.to_string(), format!("supervisor pid={pid}"));
    }
}
