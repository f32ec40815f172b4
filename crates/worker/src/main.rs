//! Binary `worker`: reads its launch record from standard input and does its role.
//!
//! In:     the record, the board's descriptor, its parent.
//! Out:    an exit code.
//! Keeps:  it dies with the supervisor that started it, and works for no other.
//! Knows:  the order of a start.
//! Source: docs/supervision.md 1.

use std::io::{Read, Write, stderr, stdin};

use nix::{
    sys::{prctl, signal::Signal},
    unistd::getppid,
};
use shared::{
    board::Board,
    exit::Exit,
    launch::{Launch, LaunchError, Role},
    signals::Stop,
    telemetry::logs::{self, Identity},
};

/// Its threads hand memory to each other: what one of them frees is used again whoever asks for it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The longest record: far above any list of shards.
const RECORD_BYTES_MAX: u64 = 32 << 20;

fn main() -> Exit {
    match start() {
        Ok((launch, board, stop)) => worker::run(&launch, &board, stop),
        Err((exit, reason)) => {
            // Nobody reads it: the exit code says the same.
            drop(writeln!(stderr(), "worker: {reason}"));
            exit
        }
    }
}

type Failed = (Exit, String);

fn start() -> Result<(Launch, Board, Stop), Failed> {
    let os = |what: &str| {
        let what = what.to_owned();
        move |reason: String| (Exit::Os, format!("{what}: {reason}"))
    };
    // Again, as the first act: the exec of some files clears it.
    prctl::set_pdeathsig(Signal::SIGKILL)
        .map_err(|errno| os("set the death signal")(errno.to_string()))?;
    // Before any thread is made: threads inherit what is blocked.
    let stop = Stop::install().map_err(|error| os("start")(worker::chain(&error)))?;
    let launch = read_launch()?;
    // A supervisor that died meanwhile can send no death signal any more.
    if u32::try_from(getppid().as_raw()) != Ok(launch.supervisor) {
        return Err((
            Exit::Os,
            format!("supervisor pid={} is gone", launch.supervisor),
        ));
    }
    let board = Board::map_inherited(launch.board)
        .map_err(|error| os("map the board")(worker::chain(&error)))?;
    if launch.slot >= board.slots() {
        return Err((
            Exit::Os,
            format!(
                "slot={} is not on the board, which has slots={}",
                launch.slot,
                board.slots()
            ),
        ));
    }
    let slot = Some(launch.slot).filter(|_| launch.role != Role::Check);
    let identity = Identity {
        role: format!("{} {}", launch.role, launch.index),
        slot,
        generation: slot.map(|_| launch.generation),
    };
    logs::start(launch.config.log.level, &identity);
    Ok((launch, board, stop))
}

fn read_launch() -> Result<Launch, Failed> {
    let mut record = Vec::new();
    // A person who starts a worker at a terminal would wait for ever: a terminal holds no record.
    if std::io::IsTerminal::is_terminal(&stdin()) {
        return Err((Exit::Config, LaunchError::NoRecord.to_string()));
    }
    stdin()
        .take(RECORD_BYTES_MAX)
        .read_to_end(&mut record)
        .map_err(|error| (Exit::Os, format!("read launch record: {error}")))?;
    Launch::read(&record).map_err(|error| (Exit::Config, error.to_string()))
}
