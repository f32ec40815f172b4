//! One role of Spanbuf in a process of its own.
//!
//! In:     a launch record; the board.
//! Out:    the role's work; an exit code.
//! Keeps:  a role ends because it was asked to, or because going on would not help; never because something is away.
//! Knows:  which roles there are. One role never imports another.
//! Source: docs/house.md 2, 3; docs/supervision.md 1, 3.

use std::error::Error;

use log::{error, info};
use shared::{
    board::{Board, Phase},
    exit::Exit,
    launch::{Launch, Role},
    signals::Stop,
};

use self::beat::Beat;

pub mod ask;
pub mod beat;
pub mod check;
pub mod checks;
pub mod deliver;
pub mod flush;
pub mod ingest;
pub mod kafka;

/// Why a role ended.
#[derive(Debug)]
pub enum Ended {
    /// The supervisor asked for it.
    Stopped,
    /// Going on, or trying again, does not help.
    Refused(Box<dyn Error + Send + Sync>),
}

/// An error that ends a worker for good: its supervisor does not start it again.
pub trait Refusal: Error + Send + Sync + 'static {}

impl<E: Refusal> From<E> for Ended {
    fn from(refusal: E) -> Self {
        Self::Refused(Box::new(refusal))
    }
}

/// Does what the record says, until asked to stop.
#[must_use]
pub fn run(launch: &Launch, board: &Board, stop: Stop) -> Exit {
    let beat = Beat::new(board, launch, stop);
    let ended = match launch.role {
        Role::Ingest => ingest::run(launch, board, beat),
        Role::Flush => flush::run(launch, board, beat),
        Role::Check => return check::run(launch),
    };
    match ended {
        Ended::Stopped => {
            info!("stopped");
            Exit::Ok
        }
        Ended::Refused(refusal) => {
            error!("refused: {}", chain(refusal.as_ref()));
            Exit::Config
        }
    }
}

/// Shows that the role ends, and says so.
pub(crate) fn drain(beat: &mut Beat) {
    beat.phase(Phase::Drain);
    info!("asked to stop");
}

/// An error and its causes in one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Some errors say what their source says.
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
