//! Maps a board into memory: the one room where shared memory becomes words.
//!
//! In:     a descriptor of shared memory.
//! Out:    its words, as atomics.
//! Keeps:  mapped is what the file holds, checked before; it stays mapped for as long as a `Words` lives.
//! Knows:  the kernel's calls. Not what a word means.
//! Source: docs/supervision.md 2; docs/house.md 10.

#![expect(
    unsafe_code,
    reason = "shared memory is mapped and read here, and nowhere else"
)]

use std::{fs::File, io, ptr::NonNull, sync::atomic::AtomicU64};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::layout::WORD;

/// Why there is no board.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// The crate refused to make it.
    #[error("make board name={name}: {reason} (is /dev/shm mounted and writable?)")]
    Make {
        /// Its name.
        name: String,
        /// The crate's word.
        reason: String,
    },
    /// There is no room.
    #[error("reserve board name={name} bytes={bytes} (free space in /dev/shm, or give it more)")]
    Reserve {
        /// Its name.
        name: String,
        /// Its size.
        bytes: usize,
        /// Why.
        source: io::Error,
    },
    /// A call failed.
    #[error(
        "{attempt} board name={name} (is it another user's? otherwise check /dev/shm and limits)"
    )]
    System {
        /// What was tried.
        attempt: &'static str,
        /// Its name.
        name: String,
        /// Why it failed.
        source: io::Error,
    },
    /// It was taken away each time it was made.
    #[error("lock board name={name}: somebody removes it (what else cleans /dev/shm?)")]
    Removed {
        /// Its name.
        name: String,
    },
    /// It is no board, or one of another build.
    #[error("open board: {what} is {found}, expected {expected} (is it of the same build?)")]
    Foreign {
        /// What differs.
        what: &'static str,
        /// What stands there.
        found: u64,
        /// What should.
        expected: u64,
    },
    /// This process has no identity in /proc.
    #[error("read start time of this process (is /proc mounted?)")]
    NoStartTime,
}

/// The words of a board.
#[derive(Debug)]
pub(super) struct Words {
    first: NonNull<AtomicU64>,
    count: usize,
    writable: bool,
}

// SAFETY: the words are atomics in memory that stays mapped until the drop: any thread may use them.
unsafe impl Send for Words {}
// SAFETY: as above; a shared reference gives access to atomics only.
unsafe impl Sync for Words {}

impl Words {
    /// Maps all of a file; a board that is only read cannot be written by mistake.
    pub(super) fn map(file: &File, writable: bool) -> io::Result<Self> {
        let bytes =
            usize::try_from(file.metadata()?.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        if bytes == 0 || !bytes.is_multiple_of(WORD) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "its size is no number of words",
            ));
        }
        let protection = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        // SAFETY: the kernel chooses the place, so no memory of ours is replaced.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                protection,
                MapFlags::SHARED,
                file,
                0,
            )
        }?;
        let first = NonNull::new(start.cast::<AtomicU64>()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self {
            first,
            count: bytes / WORD,
            writable,
        })
    }

    /// Whether the words may be stored to: a store to a board that was mapped to be read ends the process.
    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// All words. Only `views` stores, and only where [`Words::is_writable`].
    pub(super) fn all(&self) -> &[AtomicU64] {
        // SAFETY: `map` mapped `count` words at `first`, aligned to a page; nothing unmaps them before the drop, and files
        // of boards are never shortened: their makers reserve all of it and only unlink them. Any bits are an AtomicU64.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: `map` mapped exactly this, and no reference to it outlives `self`.
        let unmapped = unsafe { munmap(self.first.as_ptr().cast(), self.count * WORD) };
        // It fails only for a place that was never mapped.
        debug_assert!(unmapped.is_ok(), "a board is unmapped once");
    }
}
