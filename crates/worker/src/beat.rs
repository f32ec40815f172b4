//! The worker's signs of life on the board, and its ear for SIGTERM.
//!
//! In:     what the role is doing; attempts that failed or came back.
//! Out:    progress, phase, health and backpressure in the worker's own slot; a line when something stays away.
//! Keeps:  one reason a cell: the board shows the oldest of them, and each is cleared by whoever set it; of several threads the
//!         slot shows the one that moved longest ago, so that one that hangs is seen; when one panics all are asked to stop.
//! Knows:  the board. It decides nothing.
//! Source: docs/supervision.md 2, 3; docs/spec.md 6.1.

use std::{
    error::Error,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use log::{info, warn};
use shared::{
    board::{Board, Phase, WorkerCells},
    launch::Launch,
    signals::Stop,
    time::{Clock, MonoNanos},
};

use crate::{Ended, chain};

/// How long an attempt may fail before the worker shows it.
const SHOWN_AFTER: Duration = Duration::from_secs(5);
/// How often an outage is said again.
const SAID_EVERY: Duration = Duration::from_secs(10);
/// The waits between attempts: first and longest.
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Why a worker cannot keep up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Redis does not answer, or refuses.
    Redis,
    /// Kafka does not answer, or refuses.
    Kafka,
    /// A delivery has been awaited for over 5 s.
    Delivery,
    /// Due segments were left when a cycle ended.
    Due,
}

const REASONS: usize = 4;

impl Reason {
    /// What a worker does that waits for it to end.
    fn phase(self) -> Option<Phase> {
        match self {
            Self::Redis => Some(Phase::Redis),
            Self::Kafka | Self::Delivery => Some(Phase::Kafka),
            Self::Due => None,
        }
    }
}

/// One thread's hold on the worker's slot, and on its stop.
#[derive(Debug)]
pub struct Beat {
    shared: Arc<Shared>,
    /// Which of the holds this is.
    place: usize,
    phase: Phase,
    outages: [Outage; REASONS],
}

#[derive(Debug)]
struct Shared {
    stop: Stop,
    slot: Mutex<Slot>,
}

/// What all threads show together: the slot moves on when the one does that moved longest ago, and shows what that one does.
#[derive(Debug)]
struct Slot {
    cells: WorkerCells,
    /// Until the role is ready, its calls to Redis and Kafka are part of its boot.
    booting: bool,
    /// Whether a loop has been complete.
    turned: bool,
    shown: Phase,
    /// When each outage was last said.
    said: [Option<MonoNanos>; REASONS],
    /// A place is empty when its thread has let go.
    holds: Vec<Option<Hold>>,
}

#[derive(Debug)]
struct Hold {
    phase: Phase,
    moved: MonoNanos,
    since: [Option<MonoNanos>; REASONS],
    /// Messages that wait for Kafka's word.
    in_flight: u64,
}

impl Hold {
    fn new(phase: Phase) -> Self {
        Self {
            phase,
            moved: Clock::mono_now(),
            since: [None; REASONS],
            in_flight: 0,
        }
    }
}

impl Slot {
    fn oldest(&self) -> Option<&Hold> {
        self.holds.iter().flatten().min_by_key(|hold| hold.moved)
    }

    /// A thread moved, or let go.
    fn change(&mut self, change: impl FnOnce(&mut Vec<Option<Hold>>)) {
        let before = self.oldest().map(|hold| hold.moved);
        change(&mut self.holds);
        // After the last one the cells stay as they are: the next life begins with them.
        let Some((moved, phase)) = self.oldest().map(|hold| (hold.moved, hold.phase)) else {
            return;
        };
        if self.shown != phase && !self.booting {
            self.shown = phase;
            self.cells.phase(phase);
        }
        if Some(moved) > before {
            self.cells.progress();
        }
    }

    fn show_backpressure(&self) {
        let reasons = self.holds.iter().flatten().flat_map(|hold| hold.since);
        self.cells.backpressure(reasons.flatten().min());
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Outage {
    since: Option<MonoNanos>,
    said: bool,
    attempts: u32,
}

impl Beat {
    /// Takes the worker's slot: echoes its generation and pid, in phase `boot`.
    #[must_use]
    pub fn new(board: &Board, launch: &Launch, stop: Stop) -> Self {
        let cells = board.worker(launch.slot, launch.generation);
        cells.echo();
        cells.phase(Phase::Boot);
        let slot = Slot {
            cells,
            booting: true,
            turned: false,
            shown: Phase::Boot,
            said: [None; REASONS],
            holds: vec![Some(Hold::new(Phase::Boot))],
        };
        Self {
            shared: Arc::new(Shared {
                stop,
                slot: Mutex::new(slot),
            }),
            place: 0,
            phase: Phase::Boot,
            outages: [Outage::default(); REASONS],
        }
    }

    /// A hold for one more thread.
    #[must_use]
    pub fn another(&self) -> Self {
        let mut slot = self.slot();
        let hold = Some(Hold::new(Phase::Idle));
        let place = match slot.holds.iter().position(Option::is_none) {
            Some(place) => place,
            None => {
                slot.holds.push(None);
                slot.holds.len() - 1
            }
        };
        slot.holds[place] = hold;
        drop(slot);
        Self {
            shared: Arc::clone(&self.shared),
            place,
            phase: Phase::Idle,
            outages: [Outage::default(); REASONS],
        }
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        // A thread that panics ends the process: what it leaves here is shown till then.
        let slot = self.shared.slot.lock();
        slot.unwrap_or_else(PoisonError::into_inner)
    }

    fn moved(&self) {
        let (place, phase) = (self.place, self.phase);
        self.slot().change(|holds| {
            if let Some(Some(hold)) = holds.get_mut(place) {
                (hold.phase, hold.moved) = (phase, Clock::mono_now());
            }
        });
    }

    /// The role is ready: its boot is over.
    pub fn ready(&mut self) {
        self.slot().booting = false;
        self.phase(Phase::Idle);
    }

    /// Shows what this thread is doing now.
    pub fn phase(&mut self, phase: Phase) {
        if !self.slot().booting {
            self.phase = phase;
        }
        self.moved();
    }

    /// What this thread shows now.
    #[must_use]
    pub fn phase_now(&self) -> Phase {
        self.phase
    }

    /// A bounded call came back.
    pub fn progress(&self) {
        self.moved();
    }

    /// A loop is complete.
    pub fn turn_done(&mut self) {
        let mut slot = self.slot();
        if !slot.turned {
            // The cell still holds what the life before left there: its backpressure ends with our first loop.
            slot.turned = true;
            slot.show_backpressure();
        }
        slot.cells.healthy(Clock::mono_now());
    }

    /// Messages that wait for Kafka's word.
    pub fn in_flight(&self, messages: usize) {
        let mut slot = self.slot();
        if let Some(Some(hold)) = slot.holds.get_mut(self.place) {
            hold.in_flight = u64::try_from(messages).unwrap_or(u64::MAX);
        }
        let holds = slot.holds.iter().flatten();
        let all = holds.map(|hold| hold.in_flight).sum();
        slot.cells.in_flight(all);
    }

    /// Traces in the worker's queues.
    pub fn queue_depth(&self, traces: u64) {
        self.slot().cells.queue_depth(traces);
    }

    /// Asks all threads of this worker to stop.
    pub fn stop(&self) {
        self.shared.stop.request();
    }

    /// Whether the supervisor asked this worker to stop, or one of its threads did, or panicked.
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.shared.stop.requested()
    }

    /// `Err(Ended::Stopped)` once the supervisor asked for it.
    ///
    /// # Errors
    /// [`Ended::Stopped`].
    pub fn go_on(&self) -> Result<(), Ended> {
        if self.stopping() {
            Err(Ended::Stopped)
        } else {
            Ok(())
        }
    }

    /// Waits at most `length` (a second at the longest: a worker shows progress), or until a stop is asked for; where another
    /// thread heard of it first, to the end.
    pub fn wait(&self, length: Duration) {
        self.shared.stop.wait(length.min(BACKOFF_MAX));
        self.moved();
    }

    /// Sets or clears one reason of this thread for backpressure.
    pub fn backpressure(&mut self, reason: Reason, since: Option<MonoNanos>) {
        let mut slot = self.slot();
        let Some(Some(hold)) = slot.holds.get_mut(self.place) else {
            return;
        };
        let place = &mut hold.since[reason as usize];
        match (*place, since) {
            (Some(_), Some(_)) => return,
            (before, after) if before == after => return,
            _ => *place = since,
        }
        slot.show_backpressure();
    }

    /// An attempt failed: says so at once and then every 10 s, shows it after 5 s, waits (longer each time, at most 1 s).
    ///
    /// # Errors
    /// [`Ended::Stopped`] when the supervisor asked for it meanwhile.
    pub fn failed(
        &mut self,
        reason: Reason,
        attempt: &str,
        error: &dyn Error,
    ) -> Result<(), Ended> {
        let now = Clock::mono_now();
        let says = self.says(reason, now);
        let outage = &mut self.outages[reason as usize];
        let since = *outage.since.get_or_insert(now);
        outage.said |= says;
        if says {
            warn!(
                "{attempt} failed, tried for={}s, trying again: {}",
                now.since(since).as_secs(),
                chain(error)
            );
        }
        let wait = BACKOFF_FIRST
            .saturating_mul(1 << outage.attempts.min(5))
            .min(BACKOFF_MAX);
        outage.attempts = outage.attempts.saturating_add(1);
        if now.since(since) >= SHOWN_AFTER {
            self.backpressure(reason, Some(since));
        }
        let before = self.phase;
        self.phase(reason.phase().unwrap_or(before));
        self.wait(wait);
        self.phase(before);
        self.go_on()
    }

    /// Whether it is time to say an outage: several threads meet the same one, and one of them says it.
    fn says(&self, reason: Reason, now: MonoNanos) -> bool {
        let said = &mut self.slot().said[reason as usize];
        let says = said.is_none_or(|said| now.since(said) >= SAID_EVERY);
        if says {
            *said = Some(now);
        }
        says
    }

    /// How long attempts have failed for this reason.
    #[must_use]
    pub fn failing_for(&self, reason: Reason) -> Duration {
        let since = self.outages[reason as usize].since;
        since.map_or(Duration::ZERO, |since| Clock::mono_now().since(since))
    }

    /// An attempt came back well: an outage is over.
    pub fn worked(&mut self, reason: Reason) {
        self.moved();
        let outage = std::mem::take(&mut self.outages[reason as usize]);
        if let Some(since) = outage.since {
            if outage.said {
                self.slot().said[reason as usize] = None;
                info!(
                    "{reason:?} is back after={}ms",
                    Clock::mono_now().since(since).as_millis()
                );
            }
            self.backpressure(reason, None);
        }
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        // The others end as well, and whoever joins them passes the panic on.
        if thread::panicking() {
            self.stop();
        }
        let place = self.place;
        let mut slot = self.slot();
        slot.change(|holds| {
            if let Some(hold) = holds.get_mut(place) {
                *hold = None;
            }
        });
        if slot.holds.iter().any(Option::is_some) {
            slot.show_backpressure();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use shared::{
        board::BoardOwner,
        config::{Config, Flags},
        launch::Role,
    };

    use super::*;

    /// The beat of a worker that has a board to itself, booting; for the tests of other rooms too.
    pub(crate) fn alone(config: &Config) -> (Beat, BoardOwner) {
        let shards = config.supervision.shards.clone();
        let owner = BoardOwner::create(&shards, 1).unwrap();
        let launch = Launch {
            role: Role::Flush,
            index: 0,
            slot: 0,
            generation: 3,
            shards,
            flush_workers: 1,
            supervisor: 0,
            board: 0,
            config: config.clone(),
        };
        let beat = Beat::new(owner.board(), &launch, Stop::install().unwrap());
        (beat, owner)
    }

    #[test]
    fn a_panic_of_one_thread_asks_all_to_stop() {
        let shards = ("SPANBUF_SUPERVISION__SHARDS".into(), "0".into());
        let config = Config::load(None, std::iter::once(shards), &Flags::default()).unwrap();
        let (main, _owner) = alone(&config);
        drop(main.another());
        assert!(!main.stopping(), "it has only let go");
        let held = main.another();
        let panics = thread::spawn(move || {
            let _held = held;
            panic!("one thread");
        });
        assert!(panics.join().is_err() && main.stopping());
    }

    #[test]
    fn the_slot_moves_on_with_the_thread_that_moved_longest_ago() {
        let shards = ("SPANBUF_SUPERVISION__SHARDS".into(), "0".into());
        let config = Config::load(None, std::iter::once(shards), &Flags::default()).unwrap();
        let (mut main, owner) = alone(&config);
        let shown = || {
            let beat = owner.board().beat(0, 3, Clock::mono_now()).unwrap();
            (beat.progress, beat.phase, beat.backpressure_since)
        };
        let mut other = main.another();
        other.phase(Phase::Kafka);
        assert_eq!(shown().1, Phase::Boot, "the role is not ready");
        main.ready();

        other.phase(Phase::Redis);
        main.phase(Phase::Work);
        let (stands, phase, _) = shown();
        assert_eq!(phase, Phase::Redis);
        for _ in 0..9 {
            main.progress();
            main.phase(Phase::Idle);
            main.phase(Phase::Work);
        }
        assert_eq!(
            (shown().0, shown().1),
            (stands, Phase::Redis),
            "the other one hangs"
        );
        other.progress();
        assert_eq!((shown().0, shown().1), (stands + 1, Phase::Work));
        main.progress();
        assert_eq!((shown().0, shown().1), (stands + 2, Phase::Redis));

        let (early, late) = (MonoNanos(5), MonoNanos(7));
        other.backpressure(Reason::Delivery, Some(early));
        main.backpressure(Reason::Redis, Some(late));
        assert_eq!(shown().2, Some(early));
        main.backpressure(Reason::Delivery, None);
        assert_eq!(shown().2, Some(early), "each hold clears its own");
        drop(other);
        assert_eq!((shown().1, shown().2), (Phase::Work, Some(late)));
        let stands = shown().0;
        main.progress();
        assert_eq!(shown().0, stands + 1, "it is alone now");
        drop(main);
        assert_eq!(shown().2, Some(late), "what the last one left stands");
    }
}
