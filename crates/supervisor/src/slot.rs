//! The states of one slot, and what leads from one to the next.
//!
//! In:     what happened: the board was looked at, a child ended or could not be forked, an operator spoke.
//! Out:    the slot as it is then, and what is to be done: start, terminate, capture, kill, escalate.
//! Keeps:  every change is in [`CHANGES`]; a start is asked for only where no process is; the restart cap is never passed;
//!         a slot that was told to stop never starts again; only what was confirmed a tick later is killed.
//! Knows:  the beat on the board, the restart cap. It does nothing itself. Pure.
//! Source: docs/supervision.md 3.

use std::{collections::VecDeque, time::Duration};

use shared::{
    board::{Cause, Death, Phase, SlotBeat, SlotState},
    config::{HangSignal, Policy, Supervision},
    exit::Exit,
    time::MonoNanos,
};

use crate::cap::{Cap, Jitter};

/// A worker that waits this long for one call to Redis or Kafka is shown as Backpressured, whatever it says itself.
const WAITING_SHOWN_AFTER: Duration = Duration::from_secs(5);
/// How long a hung worker may take over what `hang_signal` makes it do, such as writing a core.
const HANG_GRACE: Duration = Duration::from_secs(5);
/// How many deaths a slot remembers.
const DEATHS_KEPT: usize = 8;

/// Every change of state that is allowed.
pub const CHANGES: [(SlotState, &[SlotState]); 11] = {
    use SlotState::{
        Backoff, Backpressured, Dead, Failed, Healthy, Hung, Killed, Starting, Stopped, Suspect,
        Unkillable,
    };
    [
        (Starting, &[Healthy, Backpressured, Suspect, Killed, Dead]),
        (Healthy, &[Backpressured, Suspect, Killed, Dead]),
        (Backpressured, &[Healthy, Suspect, Killed, Dead]),
        (
            Suspect,
            &[Starting, Healthy, Backpressured, Hung, Killed, Dead],
        ),
        (Hung, &[Killed, Dead]),
        (Killed, &[Unkillable, Dead]),
        (Unkillable, &[Dead]),
        (Dead, &[Starting, Stopped, Failed, Backoff]),
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
    use SlotState::{Backpressured, Healthy, Hung, Killed, Starting, Suspect, Unkillable};
    matches!(
        state,
        Starting | Healthy | Backpressured | Suspect | Hung | Killed | Unkillable
    )
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
    /// Ages start anew: the supervisor itself stood still, or a debugger holds the process.
    Anew,
    /// The worker is to be replaced by one with a new record.
    Recycle,
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
    /// Note what can be seen of the process, before it is killed.
    Capture,
    /// Send what the configuration names for a hung worker.
    Signal(HangSignal),
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
    /// How long one may take to end that was asked to.
    pub drain: Duration,
    /// How long one may show no progress in phase `boot`.
    pub boot: Duration,
    /// The same in phases `idle`, `work` and `redis`.
    pub hang: Duration,
    /// The same in phase `kafka`.
    pub blocked: Duration,
    /// How long in Healthy heals a failure.
    pub stable: Duration,
    /// The restart cap.
    pub max_restarts: u32,
    /// Sent to a hung worker before it is killed.
    pub hang_signal: Option<HangSignal>,
    /// What follows when the slot has failed.
    pub policy: Policy,
}

impl Rules {
    /// Those of a configuration.
    #[must_use]
    pub fn new(supervision: &Supervision) -> Self {
        let Supervision {
            tick,
            reap_limit,
            drain,
            boot,
            hang,
            blocked,
            stable,
            max_restarts,
            hang_signal,
            policy,
            ..
        } = *supervision;
        Self {
            tick,
            reap_limit,
            drain,
            boot,
            hang,
            blocked,
            stable,
            max_restarts,
            hang_signal,
            policy,
        }
    }

    /// How long no progress may be seen in a phase.
    fn budget(&self, phase: Phase) -> Duration {
        match phase {
            Phase::Boot => self.boot,
            Phase::Idle | Phase::Work | Phase::Redis => self.hang,
            Phase::Kafka => self.blocked,
            Phase::Drain => self.drain,
        }
    }
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
    /// It was told to make room for its successor, by then.
    recycling: Option<MonoNanos>,
    /// It has a new record, and has not been Healthy with it: its failure is no reason to drain the others.
    on_trial: bool,
    pulse: Option<Pulse>,
    /// From when on the age counts: the last change of the pulse, the start, or a moment from which ages start anew.
    fresh: MonoNanos,
    /// The state before Suspect.
    unsuspected: SlotState,
    /// Why it is killed, once that is decided: what its death is put down to.
    verdict: Option<Cause>,
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
            recycling: None,
            on_trial: false,
            pulse: None,
            fresh: now,
            unsuspected: SlotState::Starting,
            verdict: None,
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
    pub fn deaths(&self) -> impl ExactSizeIterator<Item = &Death> + DoubleEndedIterator {
        self.deaths.iter()
    }

    /// How long Backoff lasts that was entered.
    #[must_use]
    pub fn wait(&self) -> Duration {
        self.due.since(self.since)
    }

    /// Judges by other rules from now on.
    pub fn rule(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// Whether it makes room for its successor.
    #[must_use]
    pub fn recycling(&self) -> bool {
        self.recycling.is_some()
    }

    /// Whether its worker has a new record and has not been Healthy with it.
    #[must_use]
    pub fn on_trial(&self) -> bool {
        self.on_trial
    }

    /// When time alone moves the slot on; none where only an event does, or a beat.
    #[must_use]
    pub fn due(&self) -> Option<MonoNanos> {
        use SlotState::{Backoff, Backpressured, Healthy, Hung, Killed, Starting, Suspect};
        match self.state {
            Backoff => Some(self.due),
            Killed => Some(self.since.after(self.rules.reap_limit)),
            Hung => Some(self.since.after(HANG_GRACE)),
            Starting | Healthy | Backpressured | Suspect if self.recycling.is_some() => {
                self.recycling
            }
            Starting | Healthy | Backpressured | Suspect if self.stopping => None,
            Suspect => Some(self.since.after(self.rules.tick)),
            Starting | Healthy | Backpressured => {
                Some(self.fresh.after(self.rules.budget(self.phase())))
            }
            _ => None,
        }
    }

    /// When progress or phase was last seen to change; none before the first sign of life.
    #[must_use]
    pub fn moved(&self) -> Option<MonoNanos> {
        self.pulse.map(|pulse| pulse.moved)
    }

    /// Whether a living worker has shown no progress for longer than its phase allows, as far as it was looked at.
    #[must_use]
    pub fn overdue(&self, now: MonoNanos) -> bool {
        lives(self.state) && now.since(self.fresh) >= self.rules.budget(self.phase())
    }

    /// The phase it was last seen in; without a sign of life it boots.
    fn phase(&self) -> Phase {
        self.pulse.map_or(Phase::Boot, |pulse| pulse.phase)
    }

    /// How long the supervisor has seen no sign of life; none before the first.
    #[must_use]
    pub fn beat_age(&self, now: MonoNanos) -> Option<Duration> {
        self.moved().map(|moved| now.since(moved))
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
        self.fresh = now;
        self.verdict = None;
        self.recycling = None;
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
        self.deaths.push_back(Death { at: now, cause });
    }

    /// Where a dead slot goes.
    fn bury(&mut self, hopeless: bool, jitter: Jitter, now: MonoNanos) -> Vec<Action> {
        if self.stopping {
            self.enter(SlotState::Stopped, now);
        } else if hopeless || self.cap.passed(self.rules.max_restarts) {
            self.enter(SlotState::Failed, now);
            // A new configuration that does not work is said, and the workers with the old one go on.
            if self.rules.policy == Policy::Isolate || self.on_trial {
                return Vec::new();
            }
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
        let same = self
            .pulse
            .filter(|pulse| pulse.progress == beat.progress && pulse.phase == beat.phase);
        if same.is_none() {
            self.fresh = now;
            self.pulse = Some(Pulse {
                progress: beat.progress,
                phase: beat.phase,
                moved: now,
            });
        }
    }

    /// What a look at a living worker makes of its slot.
    fn look(&mut self, beat: Option<&SlotBeat>, now: MonoNanos) -> Vec<Action> {
        if let Some(beat) = beat {
            self.feel(beat, now);
        }
        if let Some(deadline) = self.recycling {
            return if now >= deadline {
                self.kill(now)
            } else {
                Vec::new()
            };
        }
        if self.stopping {
            return Vec::new();
        }
        match (self.state == SlotState::Suspect, self.overdue(now)) {
            (false, true) => {
                self.unsuspected = self.state;
                self.enter(SlotState::Suspect, now);
            }
            (true, true) if now.since(self.since) >= self.rules.tick => return self.condemn(now),
            (true, true) => {}
            (was_suspect, false) => {
                if was_suspect {
                    self.enter(self.unsuspected, now);
                }
                if let Some(beat) = beat {
                    self.judge(beat, now);
                }
            }
        }
        Vec::new()
    }

    /// Confirmed: it is looked at once more, and killed.
    fn condemn(&mut self, now: MonoNanos) -> Vec<Action> {
        self.enter(SlotState::Hung, now);
        self.verdict = Some(match self.phase() {
            Phase::Boot => Cause::BootTimeout,
            phase => Cause::Hang(phase),
        });
        let mut actions = vec![Action::Capture];
        match self.rules.hang_signal {
            Some(signal) => actions.push(Action::Signal(signal)),
            None => actions.append(&mut self.kill(now)),
        }
        actions
    }

    fn kill(&mut self, now: MonoNanos) -> Vec<Action> {
        self.enter(SlotState::Killed, now);
        vec![Action::Kill]
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
            self.on_trial = false;
            self.cap.healthy(now, self.rules.stable);
        }
    }
}

/// Moves a slot on by one event.
#[must_use]
pub fn step(mut slot: Slot, event: Event, now: MonoNanos) -> (Slot, Vec<Action>) {
    use SlotState::{
        Backoff, Backpressured, Dead, Failed, Healthy, Hung, Killed, Starting, Stopped, Suspect,
        Unkillable,
    };
    let mut actions = Vec::new();
    match (slot.state, event) {
        (Starting | Healthy | Backpressured | Suspect, Event::Look(beat)) => {
            actions = slot.look(beat.as_ref(), now);
        }
        (Hung, Event::Look(_)) if now.since(slot.since) >= HANG_GRACE => actions = slot.kill(now),
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
            let recycled = slot.recycling.take().is_some();
            let cause = slot.verdict.take().unwrap_or(cause);
            let hopeless = cause == Cause::Exit(Exit::Config.code().into());
            if recycled && !slot.stopping && state != Unkillable {
                slot.on_trial = true;
                actions = slot.start(now);
            } else {
                // What could not be killed was counted when it was given up.
                if state != Unkillable {
                    slot.note(cause, now);
                }
                actions = slot.bury(hopeless, jitter, now);
            }
        }
        (state, Event::Stop) => {
            // Asked once: a worker takes the second TERM for an order to end at once.
            let asked = std::mem::replace(&mut slot.stopping, true) || slot.recycling.is_some();
            // The deadline is that of all.
            slot.recycling = None;
            match state {
                Starting | Healthy | Backpressured | Suspect | Hung if !asked => {
                    actions.push(Action::Terminate);
                }
                Backoff | Failed => slot.enter(Stopped, now),
                _ => {}
            }
        }
        (Starting | Healthy | Backpressured | Suspect | Hung, Event::Kill) => {
            actions = slot.kill(now);
        }
        (state, Event::Anew) if lives(state) => slot.fresh = now,
        (state, Event::Recycle) if !slot.stopping && slot.recycling.is_none() => match state {
            Starting | Healthy | Backpressured | Suspect => {
                slot.recycling = Some(now.after(slot.rules.drain));
                actions.push(Action::Terminate);
            }
            Backoff | Failed => {
                // The operator's word, as with a retry.
                slot.cap.forget();
                slot.on_trial = true;
                actions = slot.start(now);
            }
            _ => {}
        },
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
