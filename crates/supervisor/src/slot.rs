//! The states of one slot, and what leads from one to the next.
//!
//! In:     what happened: the board was looked at, a child ended or could not be forked, an operator spoke.
//! Out:    the slot as it is then, and what is to be done: start, terminate, kill, escalate.
//! Keeps:  every change is in [`CHANGES`]; a start is asked for only where no process is; the restart cap is never passed;
//!         a slot that was told to stop never starts again.
//! Knows:  the beat on the board, the restart cap. It does nothing itself. Pure.
//! Source: docs/supervision.md 3.

use std::{collections::VecDeque, fmt, time::Duration};

use shared::{
    board::{Phase, SlotBeat, SlotState},
    exit::Exit,
    time::MonoNanos,
};

use crate::cap::{Cap, Jitter};

/// A worker that waits this long for one call to Redis or Kafka is shown as Backpressured, whatever it says itself.
const WAITING_SHOWN_AFTER: Duration = Duration::from_secs(5);
/// How many deaths a slot remembers.
const DEATHS_KEPT: usize = 8;

/// Every change of state that is allowed. What judges hangs (Suspect, Hung) will stand between the living and Killed.
pub const CHANGES: [(SlotState, &[SlotState]); 9] = {
    use SlotState::{
        Backoff, Backpressured, Dead, Failed, Healthy, Killed, Starting, Stopped, Unkillable,
    };
    [
        (Starting, &[Healthy, Backpressured, Killed, Dead]),
        (Healthy, &[Backpressured, Killed, Dead]),
        (Backpressured, &[Healthy, Killed, Dead]),
        (Killed, &[Unkillable, Dead]),
        (Unkillable, &[Dead]),
        (Dead, &[Stopped, Failed, Backoff]),
        (Backoff, &[Starting, Stopped]),
        (Failed, &[Starting, Stopped]),
        (Stopped, &[]),
    ]
};

/// Whether a slot may go from one state to the other.
#[must_use]
pub fn allowed(from: SlotState, to: SlotState) -> bool {
    CHANGES
        .iter()
        .any(|(state, next)| *state == from && next.contains(&to))
}

/// Whether a process belongs to that state.
#[must_use]
pub fn lives(state: SlotState) -> bool {
    use SlotState::{Backpressured, Healthy, Killed, Starting, Unkillable};
    matches!(
        state,
        Starting | Healthy | Backpressured | Killed | Unkillable
    )
}

/// Why a worker ended, or never began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It ended by itself, with that code. Without having been asked to, even 0 is a failure.
    Exit(i32),
    /// A signal ended it, such as `KILL`.
    Signal(String),
    /// It was forked but the worker's binary could not be executed: the name of the error.
    Exec(String),
    /// It could not be forked: the name of the error.
    Fork(String),
    /// It was killed and did not end.
    Unkillable,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(code) => write!(f, "exit_{code}"),
            Self::Signal(name) => write!(f, "signal_{name}"),
            Self::Exec(errno) => write!(f, "exec_{errno}"),
            Self::Fork(errno) => write!(f, "fork_{errno}"),
            Self::Unkillable => f.write_str("unkillable"),
        }
    }
}

/// One of the last deaths of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// When it was noticed.
    pub at: MonoNanos,
    /// Whose it was.
    pub generation: u32,
    /// Why.
    pub cause: Cause,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// The board was looked at, once a turn: the beat of this generation, if there is one. Time passes by it, too.
    Look(Option<SlotBeat>),
    /// The start that was asked for failed before there was a process.
    ForkFailed {
        /// Why.
        cause: Cause,
        /// For the wait before the next one.
        jitter: Jitter,
    },
    /// The process was reaped.
    Died {
        /// Why it ended.
        cause: Cause,
        /// For the wait before the next one.
        jitter: Jitter,
    },
    /// All is to drain.
    Stop,
    /// The deadline of draining has come.
    Kill,
    /// An operator asks to forget what failed.
    Retry,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Fork a worker of that generation.
    Start(u32),
    /// Ask the process to end what it is in (TERM).
    Terminate,
    /// End the process (KILL).
    Kill,
    /// Drain everything and end with that code.
    Escalate(Exit),
}

/// The lengths and numbers that a slot is judged by.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// How often the board is looked at.
    pub tick: Duration,
    /// How long a killed process may take to end.
    pub reap_limit: Duration,
    /// The restart cap.
    pub max_restarts: u32,
}

/// One place for a worker.
#[derive(Clone, Debug)]
pub struct Slot {
    rules: Rules,
    state: SlotState,
    since: MonoNanos,
    generation: u32,
    healthy_once: bool,
    cap: Cap,
    deaths: VecDeque<Death>,
    /// When Backoff ends.
    due: MonoNanos,
    /// It was told to stop: nothing is judged or started any more.
    stopping: bool,
    pulse: Option<Pulse>,
    /// Since when the board shows no backpressure, while the slot is Backpressured.
    clear_since: Option<MonoNanos>,
}

/// The last sign of life, and when it was seen to change.
#[derive(Clone, Copy, Debug)]
struct Pulse {
    progress: u64,
    phase: Phase,
    moved: MonoNanos,
}

impl Slot {
    /// A slot whose first worker is due now.
    #[must_use]
    pub fn new(rules: Rules, now: MonoNanos) -> Self {
        Self {
            rules,
            state: SlotState::Backoff,
            since: now,
            generation: 0,
            healthy_once: false,
            cap: Cap::default(),
            deaths: VecDeque::with_capacity(DEATHS_KEPT),
            due: now,
            stopping: false,
            pulse: None,
            clear_since: None,
        }
    }

    /// The state.
    #[must_use]
    pub fn state(&self) -> SlotState {
        self.state
    }

    /// When the state was entered.
    #[must_use]
    pub fn since(&self) -> MonoNanos {
        self.since
    }

    /// Which life of the slot this is; 0 before the first.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Whether a worker of this slot was Healthy since the supervisor started.
    #[must_use]
    pub fn healthy_once(&self) -> bool {
        self.healthy_once
    }

    /// The failures.
    #[must_use]
    pub fn cap(&self) -> &Cap {
        &self.cap
    }

    /// How many restarts are allowed.
    #[must_use]
    pub fn max_restarts(&self) -> u32 {
        self.rules.max_restarts
    }

    /// The last deaths, oldest first.
    pub fn deaths(&self) -> impl ExactSizeIterator<Item = &Death> {
        self.deaths.iter()
    }

    /// How long Backoff lasts that was entered.
    #[must_use]
    pub fn wait(&self) -> Duration {
        self.due.since(self.since)
    }

    /// When time alone moves the slot on; none where only an event does, or a beat.
    #[must_use]
    pub fn due(&self) -> Option<MonoNanos> {
        match self.state {
            SlotState::Backoff => Some(self.due),
            SlotState::Killed => Some(self.since.after(self.rules.reap_limit)),
            _ => None,
        }
    }

    /// How long the supervisor has seen no sign of life; none before the first.
    #[must_use]
    pub fn beat_age(&self, now: MonoNanos) -> Option<Duration> {
        self.pulse.map(|pulse| now.since(pulse.moved))
    }

    fn enter(&mut self, state: SlotState, now: MonoNanos) {
        debug_assert!(
            allowed(self.state, state),
            "{} -> {state} is no change of a slot",
            self.state
        );
        self.state = state;
        self.since = now;
        self.clear_since = None;
        if state != SlotState::Healthy {
            self.cap.interrupt();
        }
    }

    fn start(&mut self, now: MonoNanos) -> Vec<Action> {
        self.enter(SlotState::Starting, now);
        // Generation 0 is that of a slot that never had a worker.
        self.generation = self.generation.wrapping_add(1).max(1);
        self.pulse = None;
        vec![Action::Start(self.generation)]
    }

    /// Notes a death, and counts it unless it was wanted.
    fn note(&mut self, cause: Cause, now: MonoNanos) {
        if !self.stopping {
            self.cap.fail();
        }
        if self.deaths.len() == DEATHS_KEPT {
            self.deaths.pop_front();
        }
        self.deaths.push_back(Death {
            at: now,
            generation: self.generation,
            cause,
        });
    }

    /// Where a dead slot goes.
    fn bury(&mut self, hopeless: bool, jitter: Jitter, now: MonoNanos) -> Vec<Action> {
        if self.stopping {
            self.enter(SlotState::Stopped, now);
        } else if hopeless || self.cap.passed(self.rules.max_restarts) {
            self.enter(SlotState::Failed, now);
            return vec![Action::Escalate(if hopeless {
                Exit::Config
            } else {
                Exit::Restarts
            })];
        } else {
            self.enter(SlotState::Backoff, now);
            self.due = now.after(self.cap.backoff(jitter));
        }
        Vec::new()
    }

    fn feel(&mut self, beat: &SlotBeat, now: MonoNanos) {
        let moved = match self.pulse {
            Some(pulse) if pulse.progress == beat.progress && pulse.phase == beat.phase => {
                pulse.moved
            }
            _ => now,
        };
        self.pulse = Some(Pulse {
            progress: beat.progress,
            phase: beat.phase,
            moved,
        });
    }

    /// What a living worker's beat makes of its slot.
    fn judge(&mut self, beat: &SlotBeat, now: MonoNanos) {
        use SlotState::{Backpressured, Healthy};
        let waits = matches!(beat.phase, Phase::Redis | Phase::Kafka)
            && self
                .beat_age(now)
                .is_some_and(|age| age > WAITING_SHOWN_AFTER);
        let works = beat.phase != Phase::Boot && beat.healthy_since.is_some();
        if beat.backpressure_since.is_some() || waits {
            self.clear_since = None;
            if self.state != Backpressured {
                self.enter(Backpressured, now);
            }
        } else if works && self.state == Backpressured {
            let clear_since = *self.clear_since.get_or_insert(now);
            if now.since(clear_since) >= self.rules.tick {
                self.enter(Healthy, now);
            }
        } else if works && self.state != Healthy {
            self.enter(Healthy, now);
        }
        if self.state == Healthy {
            self.healthy_once = true;
            self.cap.healthy(now);
        }
    }
}

/// Moves a slot on by one event.
#[must_use]
pub fn step(mut slot: Slot, event: Event, now: MonoNanos) -> (Slot, Vec<Action>) {
    use SlotState::{
        Backoff, Backpressured, Dead, Failed, Healthy, Killed, Starting, Stopped, Unkillable,
    };
    let mut actions = Vec::new();
    match (slot.state, event) {
        (Starting | Healthy | Backpressured, Event::Look(Some(beat))) => {
            slot.feel(&beat, now);
            if !slot.stopping {
                slot.judge(&beat, now);
            }
        }
        (Killed, Event::Look(_)) if now.since(slot.since) >= slot.rules.reap_limit => {
            slot.enter(Unkillable, now);
            slot.note(Cause::Unkillable, now);
        }
        (Backoff, Event::Look(_)) if now >= slot.due => actions = slot.start(now),
        (Starting, Event::ForkFailed { cause, jitter }) => {
            slot.enter(Dead, now);
            slot.note(cause, now);
            actions = slot.bury(false, jitter, now);
        }
        (state, Event::Died { cause, jitter }) if lives(state) => {
            slot.enter(Dead, now);
            let hopeless = cause == Cause::Exit(Exit::Config.code().into());
            // What could not be killed was counted when it was given up.
            if state != Unkillable {
                slot.note(cause, now);
            }
            actions = slot.bury(hopeless, jitter, now);
        }
        (state, Event::Stop) => {
            // Asked once: a worker takes the second TERM for an order to end at once.
            let asked = std::mem::replace(&mut slot.stopping, true);
            match state {
                Starting | Healthy | Backpressured if !asked => actions.push(Action::Terminate),
                Backoff | Failed => slot.enter(Stopped, now),
                _ => {}
            }
        }
        (Starting | Healthy | Backpressured, Event::Kill) => {
            slot.enter(Killed, now);
            actions.push(Action::Kill);
        }
        (state, Event::Retry) if !slot.stopping => {
            slot.cap.forget();
            match state {
                Failed => actions = slot.start(now),
                Backoff => slot.due = now,
                _ => {}
            }
        }
        // A beat that is missing or late, and what comes when it does not matter any more.
        _ => {}
    }
    (slot, actions)
}

#[cfg(test)]
mod tests;
