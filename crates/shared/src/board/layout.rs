//! Where each cell of the board lies.
//!
//! Out:    sizes and places, in words of 8 bytes; what a word means.
//! Keeps:  cells of different writers lie on different cache lines; sizes are checked when this is compiled.
//! Knows:  nothing else. Pure.
//! Source: docs/supervision.md 2.

use std::fmt;

use crate::time::MonoNanos;

/// `spanbufB`.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"spanbufB");
/// Of the layout below.
pub(super) const VERSION: u64 = 2;

/// Bytes of a word.
pub(super) const WORD: usize = 8;
/// Words of a pair of cache lines: processors fetch lines in pairs.
const LINES: usize = 16;

/// The head: written before anybody else maps the board, and again, the same, before each worker does.
pub(super) mod head {
    pub(in super::super) const MAGIC: usize = 0;
    pub(in super::super) const VERSION: usize = 1;
    /// Bytes of the whole board.
    pub(in super::super) const BYTES: usize = 2;
    pub(in super::super) const SLOTS: usize = 3;
    pub(in super::super) const SHARDS: usize = 4;
    pub(in super::super) const SUPERVISOR_PID: usize = 5;
    pub(in super::super) const SUPERVISOR_START: usize = 6;
    pub(in super::super) const BUILD: usize = 7;
    /// 1 while all workers drain; the supervisor writes it at each turn.
    pub(in super::super) const DRAINING: usize = 8;
    pub(in super::super) const WORDS: usize = super::LINES;
}

/// Cells of one shard. First what its ingest worker writes, then what its flusher writes.
pub(super) mod shard {
    /// The shard's number; written with the head.
    pub(in super::super) const NUMBER: usize = 0;
    /// Odd while the three words behind it change; 0: the clock is not known.
    pub(in super::super) const SEQUENCE: usize = 1;
    pub(in super::super) const CLOCK: usize = 2;
    pub(in super::super) const AT: usize = 3;
    pub(in super::super) const UNTIL: usize = 4;
    pub(in super::super) const CONSUMED: usize = 5;
    pub(in super::super) const INSERTED: usize = 6;
    pub(in super::super) const REFUSED: usize = 7;

    pub(in super::super) const PRODUCED: usize = super::LINES;
    pub(in super::super) const DROPPED: usize = super::LINES + 1;
    pub(in super::super) const REPEATS: usize = super::LINES + 2;
    pub(in super::super) const WORDS: usize = 2 * super::LINES;
}

/// Cells of one slot. First what the supervisor writes, then what its worker writes.
pub(super) mod slot {
    /// Which life of the slot this is; 0: it never had one.
    pub(in super::super) const GENERATION: usize = 0;
    /// A [`SlotState`](super::SlotState) and since when, in microseconds.
    pub(in super::super) const STATE: usize = 1;
    /// Whether its worker has been healthy once: 1 or 0.
    pub(in super::super) const HEALTHY_ONCE: usize = 2;
    /// Role and index: written with each state, as all that follows.
    pub(in super::super) const DUTY: usize = 3;
    /// The process id of its child; 0: there is none.
    pub(in super::super) const CHILD: usize = 4;
    /// When progress or phase was last seen to change; 0: not in this life.
    pub(in super::super) const MOVED: usize = 5;
    /// Signs of progress in ten seconds.
    pub(in super::super) const RATE: usize = 6;
    /// Failures that have not healed, and how many are allowed.
    pub(in super::super) const FAILURES: usize = 7;
    /// Failures since the supervisor started.
    pub(in super::super) const LIFETIME: usize = 8;
    /// The budget between two signs of progress, in milliseconds.
    pub(in super::super) const HANG: usize = 9;
    /// The process id of a debugger; 0: there is none.
    pub(in super::super) const TRACER: usize = 10;
    /// The last deaths, newest first; 0: none.
    pub(in super::super) const DEATHS: usize = super::LINES;
    pub(in super::super) const DEATHS_KEPT: usize = 8;

    /// From here on the worker writes; zeroed before a fork, all but the one kept.
    pub(in super::super) const WORKER: usize = 2 * super::LINES;
    pub(in super::super) const ECHO: usize = WORKER;
    pub(in super::super) const PID: usize = WORKER + 1;
    pub(in super::super) const HEALTHY_SINCE: usize = WORKER + 2;
    /// Kept over a respawn: intake must not open because a worker died.
    pub(in super::super) const BACKPRESSURE_SINCE: usize = WORKER + 3;
    pub(in super::super) const PROGRESS: usize = WORKER + 4;
    /// A [`Phase`](super::Phase) and since when, in microseconds.
    pub(in super::super) const PHASE: usize = WORKER + 5;
    pub(in super::super) const IN_FLIGHT: usize = WORKER + 6;
    pub(in super::super) const QUEUE_DEPTH: usize = WORKER + 7;
    pub(in super::super) const LONGEST_GAP: usize = WORKER + 8;
    /// The errno of an exec that failed, and the generation that left it.
    pub(in super::super) const EXEC_ERRNO: usize = WORKER + 9;
    pub(in super::super) const WORDS: usize = 3 * super::LINES;
}

const _: () = assert!(head::DRAINING < head::WORDS && head::WORDS.is_multiple_of(LINES));
const _: () = assert!(
    shard::REFUSED < shard::PRODUCED
        && shard::REPEATS < shard::WORDS
        && shard::WORDS.is_multiple_of(LINES)
);
const _: () = assert!(
    slot::TRACER < slot::DEATHS
        && slot::DEATHS + slot::DEATHS_KEPT <= slot::WORKER
        && slot::EXEC_ERRNO < slot::WORDS
        && slot::WORDS.is_multiple_of(LINES)
);
const _: () = assert!(WORD == size_of::<std::sync::atomic::AtomicU64>());

/// Words of a board.
pub(super) fn words(shards: usize, slots: usize) -> usize {
    head::WORDS + shards * shard::WORDS + slots * slot::WORDS
}

/// What a worker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It starts.
    Boot,
    /// It waits for something to do.
    Idle,
    /// It computes.
    Work,
    /// It waits for Redis.
    Redis,
    /// It waits for Kafka.
    Kafka,
    /// It ends.
    Drain,
}

/// What the supervisor makes of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SlotState {
    /// A process was made.
    Starting,
    /// It works.
    Healthy,
    /// It works, and cannot keep up.
    Backpressured,
    /// It has shown no progress for longer than its phase allows.
    Suspect,
    /// That was confirmed: it will be killed.
    Hung,
    /// It was sent SIGKILL.
    Killed,
    /// It does not go.
    Unkillable,
    /// It ended.
    Dead,
    /// It is started again in a while.
    Backoff,
    /// It is not started again.
    Failed,
    /// It ended, and was to.
    Stopped,
}

const PHASES: [Phase; 6] = [
    Phase::Boot,
    Phase::Idle,
    Phase::Work,
    Phase::Redis,
    Phase::Kafka,
    Phase::Drain,
];
const STATES: [SlotState; 11] = [
    SlotState::Starting,
    SlotState::Healthy,
    SlotState::Backpressured,
    SlotState::Suspect,
    SlotState::Hung,
    SlotState::Killed,
    SlotState::Unkillable,
    SlotState::Dead,
    SlotState::Backoff,
    SlotState::Failed,
    SlotState::Stopped,
];

/// One byte for what it is, seven for the microsecond since when: changed and read as one.
const SINCE_BITS: u32 = 56;

fn packed(code: usize, since: MonoNanos) -> u64 {
    let micros = (since.0 / 1_000).min((1 << SINCE_BITS) - 1);
    // 0 is a word that nobody has written.
    u64::try_from(code + 1).unwrap_or(0) << SINCE_BITS | micros
}

fn unpacked<T: Copy>(word: u64, all: &[T]) -> Option<(T, MonoNanos)> {
    let code = usize::try_from(word >> SINCE_BITS).ok()?.checked_sub(1)?;
    let micros = word & ((1 << SINCE_BITS) - 1);
    Some((*all.get(code)?, MonoNanos(micros.saturating_mul(1_000))))
}

impl Phase {
    /// Its number, for words that hold more than a phase.
    pub(super) fn code(self) -> u16 {
        PHASES
            .iter()
            .position(|&phase| phase == self)
            .and_then(|code| u16::try_from(code).ok())
            .unwrap_or(0)
    }

    pub(super) fn of_code(code: u16) -> Option<Self> {
        PHASES.get(usize::from(code)).copied()
    }

    pub(super) fn pack(self, since: MonoNanos) -> u64 {
        packed(
            PHASES.iter().position(|&phase| phase == self).unwrap_or(0),
            since,
        )
    }

    pub(super) fn unpack(word: u64) -> Option<(Self, MonoNanos)> {
        unpacked(word, &PHASES)
    }
}

impl SlotState {
    pub(super) fn pack(self, since: MonoNanos) -> u64 {
        packed(
            STATES.iter().position(|&state| state == self).unwrap_or(0),
            since,
        )
    }

    pub(super) fn unpack(word: u64) -> Option<(Self, MonoNanos)> {
        unpacked(word, &STATES)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Boot => "boot",
            Self::Idle => "idle",
            Self::Work => "work",
            Self::Redis => "redis",
            Self::Kafka => "kafka",
            Self::Drain => "drain",
        })
    }
}

impl fmt::Display for SlotState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Backpressured => "backpressured",
            Self::Suspect => "suspect",
            Self::Hung => "hung",
            Self::Killed => "killed",
            Self::Unkillable => "unkillable",
            Self::Dead => "dead",
            Self::Backoff => "backoff",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_word_holds_what_and_since_when(nanos in 0..1_u64 << 62, phase in 0..PHASES.len(), state in 0..STATES.len()) {
            let micros = MonoNanos(nanos / 1_000 * 1_000);
            prop_assert_eq!(Phase::unpack(PHASES[phase].pack(MonoNanos(nanos))), Some((PHASES[phase], micros)));
            prop_assert_eq!(SlotState::unpack(STATES[state].pack(MonoNanos(nanos))), Some((STATES[state], micros)));
        }

        #[test]
        fn any_word_is_something_or_nothing(word: u64) {
            let told = Phase::unpack(word);
            prop_assert_eq!(told.is_some(), (1..=6).contains(&(word >> SINCE_BITS)));
            // Within the 584 years that nanoseconds hold.
            let short = word & !(0xff << 48);
            prop_assert!(Phase::unpack(short).is_none_or(|(phase, since)| phase.pack(since) == short));
        }
    }

    #[test]
    fn a_word_that_nobody_wrote_is_nothing() {
        assert_eq!(Phase::unpack(0), None);
    }
}
