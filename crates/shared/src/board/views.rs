//! Who may write which cells, and what the others read.
//!
//! In:     the words of a board.
//! Out:    one view for each writer; readings, each within its range.
//! Keeps:  a view stores to its own cells only; a reader takes any bits.
//! Knows:  the layout. No policy.
//! Source: docs/supervision.md 2; docs/spec.md 2.6.

use std::{
    fs::File,
    path::Path,
    sync::{
        Arc,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
            fence,
        },
    },
    time::Duration,
};

use super::{
    layout::{self, MAGIC, Phase, SlotState, VERSION, WORD, head, shard, slot},
    map::{BoardError, Words},
    owner::FOLDER,
};
use crate::{
    launch::BUILD,
    shard::{ShardId, ShardList},
    time::{Clock, MonoNanos, UnixMillis},
};

/// How often a reading that was disturbed by its writer is taken again.
const READ_TRIES: u32 = 1_000;
/// A clock that is not known: beyond any time.
const UNKNOWN: u64 = u64::MAX;
/// How far ahead of the reader's a time may be: clocks are read one after the other.
const AHEAD_MAX: Duration = Duration::from_secs(1);

/// A mapped board.
#[derive(Debug, Clone)]
pub struct Board {
    pub(super) words: Arc<Words>,
    pub(super) shards: ShardList,
    pub(super) slots: u32,
}

impl Board {
    /// Maps the board behind a descriptor that this process inherited, to write its own cells.
    ///
    /// # Errors
    /// [`BoardError`].
    pub fn map_inherited(descriptor: i32) -> Result<Self, BoardError> {
        // Through /proc: the name may be gone, and the number alone is no owner.
        let path = format!("/proc/self/fd/{descriptor}");
        let file = File::options().read(true).write(true).open(&path);
        let words = file.and_then(|file| Words::map(&file, true));
        Self::of(words.map_err(|source| BoardError::System {
            attempt: "map inherited",
            name: path,
            source,
        })?)
    }

    /// Maps the board of that name, to look at it.
    ///
    /// # Errors
    /// [`BoardError`].
    pub fn open_read(name: &str) -> Result<Self, BoardError> {
        let words =
            File::open(Path::new(FOLDER).join(name)).and_then(|file| Words::map(&file, false));
        Self::of(words.map_err(|source| BoardError::System {
            attempt: "open",
            name: name.to_owned(),
            source,
        })?)
    }

    /// Checks the head.
    pub(super) fn of(words: Words) -> Result<Self, BoardError> {
        let all = words.all();
        let bytes = count(all.len() * WORD);
        if all.len() < head::WORDS {
            return Err(BoardError::Foreign {
                what: "size",
                found: bytes,
                expected: count(head::WORDS * WORD),
            });
        }
        let word = |place: usize| all[place].load(Relaxed);
        for (what, place, expected) in [
            ("magic", head::MAGIC, MAGIC),
            ("version", head::VERSION, VERSION),
            ("build", head::BUILD, BUILD),
            ("size", head::BYTES, bytes),
        ] {
            if word(place) != expected {
                return Err(BoardError::Foreign {
                    what,
                    found: word(place),
                    expected,
                });
            }
        }
        // Bounded by the size before anything is computed from them.
        let bounded = |place: usize| {
            usize::try_from(word(place))
                .ok()
                .filter(|&number| number <= all.len())
        };
        let (shard_count, slot_count) = (
            bounded(head::SHARDS).unwrap_or(0),
            bounded(head::SLOTS).unwrap_or(0),
        );
        let expected = count(layout::words(shard_count, slot_count) * WORD);
        let numbers = || {
            (0..shard_count).map(|index| {
                u32::try_from(word(head::WORDS + index * shard::WORDS + shard::NUMBER))
                    .ok()
                    .map(ShardId)
            })
        };
        if expected != bytes {
            return Err(BoardError::Foreign {
                what: "size for its shards and slots",
                found: bytes,
                expected,
            });
        }
        let shards = numbers()
            .collect::<Option<Vec<_>>>()
            .and_then(|numbers| ShardList::new(numbers).ok());
        let shards = shards.ok_or(BoardError::Foreign {
            what: "list of shards",
            found: count(shard_count),
            expected: 1,
        })?;
        let slots = u32::try_from(slot_count).unwrap_or(u32::MAX);
        Ok(Self {
            words: Arc::new(words),
            shards,
            slots,
        })
    }

    /// How many slots it has.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// The shards that it has cells for.
    #[must_use]
    pub fn shards(&self) -> &ShardList {
        &self.shards
    }

    /// What the worker of a slot shows, if it is of that generation.
    ///
    /// Units: times are not ahead of `now`.
    #[must_use]
    pub fn beat(&self, slot: u32, generation: u32, now: MonoNanos) -> Option<SlotBeat> {
        let cells = self.slot(slot)?;
        // Stored last of all that a start writes, so that what belongs to this life is seen behind it.
        if cells[slot::ECHO].load(Acquire) != u64::from(generation) {
            return None;
        }
        let word = |place: usize| cells[place].load(Relaxed);
        let time = |word: u64| {
            Some(MonoNanos(word))
                .filter(|&time| time.0 > 0 && time <= now.after(AHEAD_MAX))
                .map(|time| time.min(now))
        };
        let (phase, phase_since) = Phase::unpack(word(slot::PHASE)).unwrap_or((Phase::Boot, now));
        Some(SlotBeat {
            pid: u32::try_from(word(slot::PID)).unwrap_or(0),
            healthy_since: time(word(slot::HEALTHY_SINCE)),
            backpressure_since: time(word(slot::BACKPRESSURE_SINCE)),
            progress: word(slot::PROGRESS),
            phase,
            phase_since: time(phase_since.0).unwrap_or(now),
            in_flight: word(slot::IN_FLIGHT),
            queue_depth: word(slot::QUEUE_DEPTH),
            longest_gap: Duration::from_nanos(word(slot::LONGEST_GAP)),
        })
    }

    /// The errno of the exec that failed in that generation's child.
    #[must_use]
    pub fn exec_errno(&self, slot: u32, generation: u32) -> Option<i32> {
        let word = self.slot(slot)?[slot::EXEC_ERRNO].load(Acquire);
        let (left_by, errno) = (word >> 32, word & u64::from(u32::MAX));
        (word != 0 && left_by == u64::from(generation))
            .then(|| i32::try_from(errno).ok())
            .flatten()
    }

    /// Whether a slot's worker has been healthy once since the supervisor started.
    #[must_use]
    pub fn healthy_once(&self, slot: u32) -> bool {
        self.slot(slot)
            .is_some_and(|cells| cells[slot::HEALTHY_ONCE].load(Relaxed) == 1)
    }

    /// The supervisor's cells of a slot.
    #[must_use]
    pub fn supervise(&self, slot: u32) -> SupervisorCells<'_> {
        SupervisorCells {
            cells: self.own_slot(slot).unwrap_or_default(),
        }
    }

    /// The worker's cells of its slot; a slot that is not there takes nothing.
    #[must_use]
    pub fn worker(&self, slot: u32, generation: u32) -> WorkerCells {
        WorkerCells {
            board: self.clone(),
            slot,
            generation,
            moved: std::cell::Cell::new(Clock::mono_now()),
            longest: std::cell::Cell::new(Duration::ZERO),
        }
    }

    /// A shard's clock; none while it is not known.
    #[must_use]
    pub fn clock(&self, shard: ShardId) -> Option<PublishedClock> {
        let cells = self.shard(shard)?;
        for _ in 0..READ_TRIES {
            let before = cells[shard::SEQUENCE].load(Acquire);
            let word = |place: usize| cells[place].load(Relaxed);
            let value = word(shard::CLOCK);
            let clock = PublishedClock {
                clock: UnixMillis(value).min(UnixMillis::MAX),
                at: MonoNanos(word(shard::AT)),
                until: MonoNanos(word(shard::UNTIL)),
            };
            // The three loads are done before the sequence is read again.
            fence(Acquire);
            if before == cells[shard::SEQUENCE].load(Relaxed) && before.is_multiple_of(2) {
                return (before != 0 && value != UNKNOWN).then_some(clock);
            }
            std::hint::spin_loop();
        }
        // Its writer died in the middle: unknown until the next one writes.
        None
    }

    /// The view that writes a shard's clock.
    #[must_use]
    pub fn clock_writer(&self, shard: ShardId) -> Option<ClockWriter> {
        let cells = self.own_shard(shard)?;
        // A writer that died in the middle left an odd number.
        let sequence = cells[shard::SEQUENCE].load(Relaxed).next_multiple_of(2);
        Some(ClockWriter {
            board: self.clone(),
            shard,
            sequence: std::cell::Cell::new(sequence),
        })
    }

    /// The view that counts for a shard: ingest its three cells, flush its three.
    #[must_use]
    pub fn ledger(&self, shard: ShardId) -> Option<Ledger> {
        self.own_shard(shard)?;
        Some(Ledger {
            board: self.clone(),
            shard,
        })
    }

    /// A shard's totals since the supervisor started.
    #[must_use]
    pub fn totals(&self, shard: ShardId) -> Option<Totals> {
        let cells = self.shard(shard)?;
        let word = |place: usize| cells[place].load(Relaxed);
        Some(Totals {
            consumed: word(shard::CONSUMED),
            inserted: word(shard::INSERTED),
            refused: word(shard::REFUSED),
            produced: word(shard::PRODUCED),
            dropped: word(shard::DROPPED),
            repeats: word(shard::REPEATS),
        })
    }

    /// The cells of a shard, to be stored to; none on a board that is only read.
    fn own_shard(&self, shard: ShardId) -> Option<&[AtomicU64]> {
        self.shard(shard).filter(|_| self.words.is_writable())
    }

    /// The cells of a slot, to be stored to; none on a board that is only read.
    fn own_slot(&self, slot: u32) -> Option<&[AtomicU64]> {
        self.slot(slot).filter(|_| self.words.is_writable())
    }

    fn shard(&self, shard: ShardId) -> Option<&[AtomicU64]> {
        let start = head::WORDS + self.shards.index_of(shard)? * shard::WORDS;
        self.words.all().get(start..start + shard::WORDS)
    }

    /// Shows whether all workers drain.
    pub fn show_draining(&self, draining: bool) {
        self.words.all()[head::DRAINING].store(draining.into(), Relaxed);
    }

    /// Whether all workers drain.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.words.all()[head::DRAINING].load(Relaxed) == 1
    }

    /// The supervisor that made it.
    #[must_use]
    pub fn supervisor(&self) -> u32 {
        u32::try_from(self.words.all()[head::SUPERVISOR_PID].load(Relaxed)).unwrap_or(0)
    }

    /// What the supervisor makes of a slot, and since when.
    #[must_use]
    pub fn state(&self, slot: u32) -> Option<(SlotState, MonoNanos)> {
        SlotState::unpack(self.slot(slot)?[slot::STATE].load(Acquire))
    }

    pub(super) fn slot(&self, slot: u32) -> Option<&[AtomicU64]> {
        let index = usize::try_from(slot).ok().filter(|_| slot < self.slots)?;
        let start = head::WORDS + self.shards.len() * shard::WORDS + index * slot::WORDS;
        self.words.all().get(start..start + slot::WORDS)
    }
}

/// What a worker shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotBeat {
    /// Its process id, as it says.
    pub pid: u32,
    /// The end of its last complete loop.
    pub healthy_since: Option<MonoNanos>,
    /// Since when it cannot keep up.
    pub backpressure_since: Option<MonoNanos>,
    /// Calls that came back.
    pub progress: u64,
    /// What it is doing.
    pub phase: Phase,
    /// Since when.
    pub phase_since: MonoNanos,
    /// Messages that wait for Kafka's word.
    pub in_flight: u64,
    /// Traces in its queues.
    pub queue_depth: u64,
    /// The longest time between two signs of progress.
    pub longest_gap: Duration,
}

/// A shard's clock, as its ingest worker left it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedClock {
    clock: UnixMillis,
    at: MonoNanos,
    until: MonoNanos,
}

impl PublishedClock {
    /// The clock at a moment: it runs from when it was true to when it may run.
    #[must_use]
    pub fn read(&self, now: MonoNanos) -> UnixMillis {
        self.clock.after(now.min(self.until).since(self.at))
    }
}

/// A shard's totals.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Messages that were read.
    pub consumed: u64,
    /// Spans that went into Redis.
    pub inserted: u64,
    /// Messages that hold no span.
    pub refused: u64,
    /// Spans that Kafka acknowledged.
    pub produced: u64,
    /// Spans that were given up, counted.
    pub dropped: u64,
    /// Spans that were sent twice to us, and once on.
    pub repeats: u64,
}

/// The cells of a slot that the supervisor writes.
#[derive(Debug)]
pub struct SupervisorCells<'b> {
    cells: &'b [AtomicU64],
}

impl SupervisorCells<'_> {
    /// Begins a life: before the fork, so that the child finds it.
    pub fn begin(&self, generation: u32) {
        for (place, cell) in self.cells.iter().enumerate().skip(slot::WORKER) {
            if place != slot::BACKPRESSURE_SINCE {
                cell.store(0, Relaxed);
            }
        }
        self.store(slot::GENERATION, generation.into());
    }

    /// Leaves word that exec failed. The child calls it between fork and exec: it stores a word, and does nothing else.
    pub fn exec_failed(&self, errno: i32) {
        let Some([generation, errno_cell]) = self
            .cells
            .get(slot::GENERATION)
            .zip(self.cells.get(slot::EXEC_ERRNO))
            .map(|(one, other)| [one, other])
        else {
            return;
        };
        let errno = u64::from(errno.unsigned_abs());
        errno_cell.store(generation.load(Relaxed) << 32 | errno, Release);
    }

    pub(super) fn store(&self, place: usize, value: u64) {
        if let Some(cell) = self.cells.get(place) {
            cell.store(value, Release);
        }
    }
}

/// The cells of a slot that its worker writes.
#[derive(Debug)]
pub struct WorkerCells {
    board: Board,
    slot: u32,
    generation: u32,
    /// When it last showed progress.
    moved: std::cell::Cell<MonoNanos>,
    longest: std::cell::Cell<Duration>,
}

impl WorkerCells {
    /// Says that this life has begun.
    pub fn echo(&self) {
        self.store(slot::PID, std::process::id().into());
        self.store(slot::PHASE, Phase::Boot.pack(Clock::mono_now()));
        self.store(slot::ECHO, self.generation.into());
    }

    /// A bounded call came back.
    pub fn progress(&self) {
        let now = Clock::mono_now();
        let gap = now.since(self.moved.replace(now));
        if gap > self.longest.get() {
            self.longest.set(gap);
            self.store(
                slot::LONGEST_GAP,
                u64::try_from(gap.as_nanos()).unwrap_or(u64::MAX),
            );
        }
        if let Some(cell) = self.cell(slot::PROGRESS) {
            // Nobody else writes it: no need for one step.
            cell.store(cell.load(Relaxed).wrapping_add(1), Release);
        }
    }

    /// What it does from now on.
    pub fn phase(&self, phase: Phase) {
        self.store(slot::PHASE, phase.pack(Clock::mono_now()));
    }

    /// A loop is complete.
    pub fn healthy(&self, now: MonoNanos) {
        self.store(slot::HEALTHY_SINCE, now.0);
    }

    /// Since when it cannot keep up; none: it can.
    pub fn backpressure(&self, since: Option<MonoNanos>) {
        self.store(slot::BACKPRESSURE_SINCE, since.map_or(0, |since| since.0));
    }

    /// Messages that wait for Kafka's word.
    pub fn in_flight(&self, messages: u64) {
        self.store(slot::IN_FLIGHT, messages);
    }

    /// Traces in its queues.
    pub fn queue_depth(&self, traces: u64) {
        self.store(slot::QUEUE_DEPTH, traces);
    }

    fn cell(&self, place: usize) -> Option<&AtomicU64> {
        self.board.own_slot(self.slot)?.get(place)
    }

    fn store(&self, place: usize, value: u64) {
        if let Some(cell) = self.cell(place) {
            cell.store(value, Release);
        }
    }
}

/// Writes a shard's clock: the ingest worker that owns the shard has the only one.
#[derive(Debug)]
pub struct ClockWriter {
    board: Board,
    shard: ShardId,
    sequence: std::cell::Cell<u64>,
}

impl ClockWriter {
    /// The clock's value at a moment, and the moment up to which it runs: the same, and it stands.
    pub fn publish(&self, clock: UnixMillis, at: MonoNanos, until: MonoNanos) {
        let Some(cells) = self.board.own_shard(self.shard) else {
            return;
        };
        let sequence = self.sequence.get();
        cells[shard::SEQUENCE].store(sequence + 1, Relaxed);
        // A reader that sees one of the three sees the odd number as well.
        fence(Release);
        cells[shard::CLOCK].store(clock.0, Relaxed);
        cells[shard::AT].store(at.0, Relaxed);
        cells[shard::UNTIL].store(until.0, Relaxed);
        cells[shard::SEQUENCE].store(sequence + 2, Release);
        self.sequence.set(sequence + 2);
    }

    /// Takes the clock back: nothing is known.
    pub fn unknown(&self) {
        self.publish(UnixMillis(UNKNOWN), MonoNanos(0), MonoNanos(0));
    }
}

/// Counts what becomes of a shard's spans. Each cell has one writer, a process: the first three ingest, the others flush.
#[derive(Debug, Clone)]
pub struct Ledger {
    board: Board,
    shard: ShardId,
}

impl Ledger {
    /// Counts messages read.
    pub fn consumed(&self, messages: u64) {
        self.add(shard::CONSUMED, messages);
    }

    /// Counts spans that went into Redis.
    pub fn inserted(&self, spans: u64) {
        self.add(shard::INSERTED, spans);
    }

    /// Counts messages that hold no span.
    pub fn refused(&self, messages: u64) {
        self.add(shard::REFUSED, messages);
    }

    /// Counts spans that Kafka acknowledged.
    pub fn produced(&self, spans: u64) {
        self.add(shard::PRODUCED, spans);
    }

    /// Counts spans that were given up.
    pub fn dropped(&self, spans: u64) {
        self.add(shard::DROPPED, spans);
    }

    /// Counts spans that came twice.
    pub fn repeats(&self, spans: u64) {
        self.add(shard::REPEATS, spans);
    }

    fn add(&self, place: usize, amount: u64) {
        if let Some(cell) = self
            .board
            .own_shard(self.shard)
            .and_then(|cells| cells.get(place))
        {
            // Its worker's threads all count here.
            cell.fetch_add(amount, Relaxed);
        }
    }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(super) mod tests;
