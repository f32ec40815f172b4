//! The worker's signs of life on the board, and its ear for SIGTERM.
//!
//! In:     what the role is doing; attempts that failed or came back.
//! Out:    progress, phase, health and backpressure in the worker's own slot; a line when something stays away.
//! Keeps:  one reason a cell: the board shows the oldest of them, and each is cleared by whoever set it.
//! Knows:  the board. It decides nothing.
//! Source: docs/supervision.md 2, 3; docs/spec.md 6.1.

use std::{error::Error, time::Duration};

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

/// The worker's slot, and its stop.
#[derive(Debug)]
pub struct Beat {
    cells: WorkerCells,
    stop: Stop,
    phase: Phase,
    /// Until the role is ready, its calls to Redis and Kafka are part of its boot.
    booting: bool,
    /// Whether a loop has been complete.
    turned: bool,
    since: [Option<MonoNanos>; REASONS],
    outages: [Outage; REASONS],
}

#[derive(Clone, Copy, Debug, Default)]
struct Outage {
    since: Option<MonoNanos>,
    said: Option<MonoNanos>,
    attempts: u32,
}

impl Beat {
    /// Takes the worker's slot: echoes its generation and pid, in phase `boot`.
    #[must_use]
    pub fn new(board: &Board, launch: &Launch, stop: Stop) -> Self {
        let cells = board.worker(launch.slot, launch.generation);
        cells.echo();
        cells.phase(Phase::Boot);
        Self {
            cells,
            stop,
            phase: Phase::Boot,
            booting: true,
            turned: false,
            since: [None; REASONS],
            outages: [Outage::default(); REASONS],
        }
    }

    /// The role is ready: its boot is over.
    pub fn ready(&mut self) {
        self.booting = false;
        self.phase(Phase::Idle);
    }

    /// Shows what the worker is doing now.
    pub fn phase(&mut self, phase: Phase) {
        if self.phase != phase && !self.booting {
            self.phase = phase;
            self.cells.phase(phase);
        }
        self.cells.progress();
    }

    /// What the worker shows now.
    #[must_use]
    pub fn phase_now(&self) -> Phase {
        self.phase
    }

    /// A bounded call came back.
    pub fn progress(&self) {
        self.cells.progress();
    }

    /// A loop is complete.
    pub fn turn_done(&mut self) {
        if !self.turned {
            // The cell still holds what the life before left there: its backpressure ends with our first loop.
            self.turned = true;
            self.show_backpressure();
        }
        self.cells.healthy(Clock::mono_now());
    }

    /// The worker's own cells, for what only its role knows.
    #[must_use]
    pub fn cells(&self) -> &WorkerCells {
        &self.cells
    }

    /// Whether the supervisor asked this worker to stop.
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.stop.requested()
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

    /// Waits at most `length` (a second at the longest: a worker shows progress), or until a stop is asked for.
    pub fn wait(&self, length: Duration) {
        self.stop.wait(length.min(BACKOFF_MAX));
        self.cells.progress();
    }

    /// Sets or clears one reason for backpressure.
    pub fn backpressure(&mut self, reason: Reason, since: Option<MonoNanos>) {
        let place = &mut self.since[reason as usize];
        match (*place, since) {
            (Some(_), Some(_)) => return,
            (before, after) if before == after => return,
            _ => *place = since,
        }
        self.show_backpressure();
    }

    fn show_backpressure(&self) {
        self.cells
            .backpressure(self.since.iter().flatten().min().copied());
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
        let outage = &mut self.outages[reason as usize];
        let since = *outage.since.get_or_insert(now);
        if outage.said.is_none_or(|said| now.since(said) >= SAID_EVERY) {
            outage.said = Some(now);
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

    /// How long attempts have failed for this reason.
    #[must_use]
    pub fn failing_for(&self, reason: Reason) -> Duration {
        let since = self.outages[reason as usize].since;
        since.map_or(Duration::ZERO, |since| Clock::mono_now().since(since))
    }

    /// An attempt came back well: an outage is over.
    pub fn worked(&mut self, reason: Reason) {
        self.cells.progress();
        let outage = std::mem::take(&mut self.outages[reason as usize]);
        if let Some(since) = outage.since {
            info!(
                "{reason:?} is back after={}ms",
                Clock::mono_now().since(since).as_millis()
            );
            self.backpressure(reason, None);
        }
    }
}
