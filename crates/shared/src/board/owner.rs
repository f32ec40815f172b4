//! Makes the supervisor's board, and sweeps the boards of dead supervisors.
//!
//! In:     shards and slots.
//! Out:    a board with a name, locked for as long as its owner lives; a descriptor that workers inherit.
//! Keeps:  space is reserved before the first touch; what can be locked belongs to the dead; the name goes with the owner.
//! Knows:  the crate `shared_memory`, /dev/shm. Not what the cells say.
//! Source: docs/supervision.md 2.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process,
    sync::{Mutex, PoisonError},
};

use rustix::fs::FallocateFlags;
use shared_memory::{Shmem, ShmemConf, ShmemError};

use super::{
    layout::{self, MAGIC, VERSION, WORD, head, shard},
    map::{BoardError, Words},
    views::Board,
};
use crate::{launch::BUILD, shard::ShardList};

/// Where POSIX shared memory has its names.
pub(super) const FOLDER: &str = "/dev/shm";
const PREFIX: &str = "spanbuf-";
/// Between making and locking it, another supervisor's sweep may take a board for a dead one's.
const TRIES: u32 = 5;
/// Boards of one process, as tests make them, have one name: each takes the one before for a dead one's, which may not be half made.
static MAKING: Mutex<()> = Mutex::new(());

/// The supervisor's board.
pub struct BoardOwner {
    board: Board,
    /// When this process started, in the kernel's ticks.
    start: u64,
    name: String,
    inherited: File,
    /// Held, with its lock, for as long as the board is somebody's.
    _lock: File,
    /// Unlinks the name when dropped.
    _memory: Shmem,
}

impl std::fmt::Debug for BoardOwner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BoardOwner")
            .field("name", &self.name)
            .field("board", &self.board)
            .finish_non_exhaustive()
    }
}

impl BoardOwner {
    /// Sweeps, then makes a board for this process.
    ///
    /// # Errors
    /// [`BoardError`].
    pub fn create(shards: &ShardList, slots: u32) -> Result<Self, BoardError> {
        let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
        sweep();
        let start = start_ticks().ok_or(BoardError::NoStartTime)?;
        let name = format!("{PREFIX}{}-{start}", process::id());
        for _ in 0..TRIES {
            if let Some(owner) = Self::try_create(&name, start, shards, slots)? {
                return Ok(owner);
            }
        }
        Err(BoardError::Removed { name })
    }

    /// None when the board was removed before it was locked.
    fn try_create(
        name: &str,
        start: u64,
        shards: &ShardList,
        slots: u32,
    ) -> Result<Option<Self>, BoardError> {
        let system = |attempt| {
            move |source| BoardError::System {
                attempt,
                name: name.to_owned(),
                source,
            }
        };
        let slot_count = usize::try_from(slots).unwrap_or(usize::MAX);
        let bytes = layout::words(shards.len(), slot_count) * WORD;
        let memory = make(name, bytes)?;
        let path = path_of(name);
        let lock = File::options().read(true).write(true).open(&path);
        let Some(lock) = found(lock).map_err(system("open"))? else {
            return Ok(None);
        };
        // A full /dev/shm is an error here, and a SIGBUS at the first touch otherwise.
        rustix::fs::fallocate(
            &lock,
            FallocateFlags::empty(),
            0,
            u64::try_from(bytes).unwrap_or(u64::MAX),
        )
        .map_err(|errno| BoardError::Reserve {
            name: name.to_owned(),
            bytes,
            source: errno.into(),
        })?;
        if lock.try_lock().is_err() || lock.metadata().map_err(system("look at"))?.nlink() == 0 {
            return Ok(None);
        }
        // Files of the standard library are close-on-exec; this one is for the workers.
        let Some(inherited) =
            found(File::options().read(true).write(true).open(&path)).map_err(system("open"))?
        else {
            return Ok(None);
        };
        rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty())
            .map_err(|errno| system("hand over")(errno.into()))?;
        let words = Words::map(&inherited, true).map_err(system("map"))?;
        describe(&words, bytes, start, shards, slots);
        Ok(Some(Self {
            board: Board::of(words)?,
            start,
            name: name.to_owned(),
            inherited,
            _lock: lock,
            _memory: memory,
        }))
    }

    /// The board.
    #[must_use]
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// Writes the head again, with what has not changed: a stray hand may have written over it, and no worker could start any more.
    pub fn mend_head(&self) {
        let Board {
            words,
            shards,
            slots,
        } = &self.board;
        let bytes = words.all().len() * WORD;
        describe(words, bytes, self.start, shards, *slots);
    }

    /// The descriptor that workers inherit: it is not close-on-exec, and carries no lock.
    #[must_use]
    pub fn inherited(&self) -> BorrowedFd<'_> {
        self.inherited.as_fd()
    }

    /// Its name in /dev/shm.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Makes the shared memory. One of this name is of this very process, and dead: pid and start time are ours.
fn make(name: &str, bytes: usize) -> Result<Shmem, BoardError> {
    let create = || ShmemConf::new().os_id(name).size(bytes).create();
    let made = match create() {
        Err(ShmemError::MappingIdExists) => {
            // Gone meanwhile is as good.
            drop(fs::remove_file(path_of(name)));
            create()
        }
        made => made,
    };
    made.map_err(|error| BoardError::Make {
        name: name.to_owned(),
        reason: error.to_string(),
    })
}

/// Writes the head: what it says stays the same for the life of a board.
pub(super) fn describe(words: &Words, bytes: usize, start: u64, shards: &ShardList, slots: u32) {
    use std::sync::atomic::Ordering::Relaxed;
    let words = words.all();
    let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    for (index, shard) in shards.iter().enumerate() {
        words[head::WORDS + index * shard::WORDS + shard::NUMBER].store(shard.0.into(), Relaxed);
    }
    let head = [
        (head::VERSION, VERSION),
        (head::BYTES, count(bytes)),
        (head::SLOTS, slots.into()),
        (head::SHARDS, count(shards.len())),
        (head::SUPERVISOR_PID, process::id().into()),
        (head::SUPERVISOR_START, start),
        (head::BUILD, BUILD),
        (head::MAGIC, MAGIC),
    ];
    for (place, value) in head {
        words[place].store(value, Relaxed);
    }
    // Workers are forked after this, so they see it; those who open by name check it and try again.
    std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
}

/// The names of all boards there are, of the living and of the dead.
#[must_use]
pub fn boards() -> Vec<String> {
    let entries = fs::read_dir(FOLDER).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut boards: Vec<String> = names.filter(|name| name.starts_with(PREFIX)).collect();
    boards.sort();
    boards
}

/// Removes every board whose lock can be taken: its supervisor is dead. What may not be opened is another user's.
fn sweep() {
    let Ok(entries) = fs::read_dir(FOLDER) else {
        return;
    };
    for entry in entries.flatten() {
        if entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(PREFIX))
        {
            sweep_one(&entry.path());
        }
    }
}

fn sweep_one(path: &Path) {
    // A foreign file of that name may be a pipe: it must not be waited for, nor followed to elsewhere.
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOFOLLOW;
    let flags = i32::try_from(flags.bits()).unwrap_or(0);
    let Ok(file) = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
    else {
        return;
    };
    // Under the lock, and only if the name is still that file's.
    let is_same = || {
        fs::metadata(path).is_ok_and(|named| {
            file.metadata()
                .is_ok_and(|opened| named.ino() == opened.ino())
        })
    };
    if file.metadata().is_ok_and(|about| about.is_file()) && file.try_lock().is_ok() && is_same() {
        match fs::remove_file(path) {
            Ok(()) => log::info!(
                "removed the board of a dead supervisor name={}",
                path.display()
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => log::warn!(
                "remove the board of a dead supervisor name={}: {error}",
                path.display()
            ),
        }
    }
}

fn found(opened: io::Result<File>) -> io::Result<Option<File>> {
    match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

fn path_of(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

/// When this process started, in the kernel's ticks: tells it from an earlier one with its pid.
fn start_ticks() -> Option<u64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name before it may hold anything, brackets too.
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::ShardId;

    /// Boards of this process share their name: one test at a time has one.
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

    #[test]
    fn a_board_goes_with_its_owner_and_boards_of_the_dead_are_swept() {
        let _one = ONE
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        // Nobody holds its lock.
        let dead = path_of("spanbuf-999999999-1");
        fs::write(&dead, b"left behind").unwrap();
        let held = path_of("spanbuf-999999998-1");
        let lock = File::create(&held).unwrap();
        lock.try_lock().unwrap();
        let owner = BoardOwner::create(&"3,7".parse().unwrap(), 2).unwrap();
        assert!(!dead.exists() && held.exists());
        let path = path_of(owner.name());
        assert_eq!(
            fs::metadata(&path).unwrap().len(),
            u64::try_from(layout::words(2, 2) * WORD).unwrap()
        );

        let read = Board::open_read(owner.name()).unwrap();
        assert_eq!(
            (read.slots(), read.shards().to_string().as_str()),
            (2, "3,7")
        );
        assert!(read.clock(ShardId(3)).is_none() && read.clock(ShardId(4)).is_none());
        // A store would end the process.
        read.supervise(0).begin(1);
        read.worker(0, 1).echo();
        assert!(read.ledger(ShardId(3)).is_none() && read.clock_writer(ShardId(3)).is_none());
        drop(owner);
        assert!(!path.exists());
        fs::remove_file(held).unwrap();
    }

    #[test]
    fn what_is_no_board_is_refused() {
        let _one = ONE
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let owner = BoardOwner::create(&"0".parse().unwrap(), 1).unwrap();
        let file = File::options()
            .read(true)
            .write(true)
            .open(path_of(owner.name()))
            .unwrap();
        let bytes = fs::read(path_of(owner.name())).unwrap();
        for place in [
            head::MAGIC,
            head::VERSION,
            head::BYTES,
            head::SLOTS,
            head::SHARDS,
            head::BUILD,
        ] {
            let copy = tempfile::tempfile().unwrap();
            let mut changed = bytes.clone();
            changed[place * WORD] ^= 1;
            std::os::unix::fs::FileExt::write_all_at(&copy, &changed, 0).unwrap();
            assert!(
                Board::of(Words::map(&copy, true).unwrap()).is_err(),
                "word {place}"
            );
        }
        assert!(Board::of(Words::map(&file, true).unwrap()).is_ok());
        let short = tempfile::tempfile().unwrap();
        assert!(Words::map(&short, true).is_err());
        std::os::unix::fs::FileExt::write_all_at(&short, &bytes[..64], 0).unwrap();
        assert!(Board::of(Words::map(&short, true).unwrap()).is_err());
        assert!(Board::open_read("spanbuf-no-such-board").is_err());
    }
}
