//! Keeps Spanbuf's workers alive: starts them, watches them, starts them anew, drains them.
//!
//! In:     a command line; signals.
//! Out:    worker processes; an exit code.
//! Keeps:  one supervisor on a run directory; one thread, which waits in [`turn`] only; no worker outlives it.
//! Knows:  child processes, the board, signals. No Kafka, no Redis, not what a span is.
//! Source: docs/supervision.md; docs/house.md 2, 3.

use std::{
    error::Error,
    ffi::OsString,
    io::{self, Write},
};

use log::{LevelFilter, error, info, warn};
use nix::errno::Errno;
use shared::{
    board::{BoardError, BoardOwner},
    config::{Config, ConfigError, Supervision},
    exit::Exit,
    launch::{LaunchError, Role},
    telemetry::logs::{self, Identity},
    time::Clock,
};

use crate::{
    cli::{Order, Plan},
    fleet::{
        Duty, Fleet,
        lock::{Lock, LockError},
        reap,
        recycle::Source,
        spawn::{self, BinaryError, SpawnError},
    },
    notify::Notify,
    turn::{Request, Turn, TurnError},
};

pub mod cap;
mod check;
pub mod cli;
mod fleet;
mod notify;
mod report;
pub mod slot;
pub mod turn;

/// Why there is nothing to supervise.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Turn(#[from] TurnError),
    #[error("open pidfd (Linux 5.4 or later is needed)")]
    NoPidfds(#[source] Errno),
    #[error("read configuration")]
    Config(#[from] ConfigError),
    #[error("find the supervisor's own binary (is /proc mounted?)")]
    OwnBinary(#[source] io::Error),
    #[error(transparent)]
    Binary(#[from] BinaryError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Board(#[from] BoardError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
}

/// Does what a command line asks for; its first word is the program's name.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Exit {
    // Before anything else: no signal is lost, and no child's status.
    let turn = Turn::new();
    spawn::keep_statuses();
    match cli::read(arguments) {
        Order::Print(text) => {
            // Nobody reads it.
            drop(io::stdout().write_all(text.as_bytes()));
            Exit::Ok
        }
        Order::Refuse(line) => {
            // As above; the exit code says the same.
            drop(writeln!(io::stderr(), "{line}"));
            Exit::Usage
        }
        Order::Run(plan) => turn
            .map_err(StartError::from)
            .and_then(|turn| start(&turn, &plan))
            .unwrap_or_else(|error| refuse(&error)),
    }
}

/// From a plan to the end of the last worker.
fn start(turn: &Turn, plan: &Plan) -> Result<Exit, StartError> {
    reap::prove_pidfds().map_err(StartError::NoPidfds)?;
    let source = Source {
        path: plan.config.clone(),
        flags: plan.flags.clone(),
        worker: std::env::current_exe()
            .map_err(StartError::OwnBinary)?
            .with_file_name("worker"),
    };
    let config = source.config()?;
    listen(config.log.level);
    let spawner = source.spawner(&config.supervision)?;
    if plan.check {
        return check::run(turn, &config, &spawner);
    }
    let duties = fleet::duties(&config.supervision);
    tell(&config, &duties);
    let Some(lock) = own(turn, &config.supervision)? else {
        return Ok(Exit::Ok);
    };
    let slots = u32::try_from(duties.len()).unwrap_or(u32::MAX);
    let board = BoardOwner::create(&config.supervision.shards, slots)?;
    let mut fleet = Fleet::new(
        config,
        duties,
        spawner,
        source,
        board,
        lock,
        Clock::mono_now(),
    );
    let mut notify = Notify::new(std::env::vars_os());
    Ok(turn::run(turn, &mut fleet, &mut notify)?)
}

/// Takes the run directory, waiting for its last owner to go. None when asked to stop meanwhile.
fn own(turn: &Turn, supervision: &Supervision) -> Result<Option<Lock>, StartError> {
    let deadline = Clock::mono_now().after(supervision.reap_limit);
    let mut free = Lock::open(&supervision.run_dir)?;
    let mut said = false;
    loop {
        free = match free.take()? {
            Ok(lock) => return Ok(Some(lock)),
            Err(held) if Clock::mono_now() >= deadline => return Err(held.held().into()),
            Err(held) => held,
        };
        if !std::mem::replace(&mut said, true) {
            info!(
                "run directory is held, waiting path={} for={}ms at most",
                supervision.run_dir.display(),
                supervision.reap_limit.as_millis()
            );
        }
        turn.arm(supervision.tick)?;
        if turn.wait()?.contains(&Request::Stop) {
            return Ok(None);
        }
    }
}

/// Says what is in force, and who has which shards.
fn tell(config: &Config, duties: &[Duty]) {
    info!("starting version={}", env!("CARGO_PKG_VERSION"));
    let section = |key: &str| {
        key.split_once('.')
            .map_or("", |(section, _)| section)
            .to_owned()
    };
    for keys in config
        .redacted()
        .chunk_by(|(one, _), (other, _)| section(one) == section(other))
    {
        let keys: Vec<String> = keys
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        info!("configuration {}", keys.join(" "));
    }
    let Supervision {
        shards,
        max_workers,
        ingest_workers,
        ..
    } = &config.supervision;
    for (role, asked) in [(Role::Flush, *max_workers), (Role::Ingest, *ingest_workers)] {
        let workers = fleet::count(duties, role);
        if workers < asked {
            warn!(
                "there are more {role} workers than shards asked={asked} shards={} workers={workers}",
                shards.len()
            );
        }
    }
    for (
        slot,
        Duty {
            role,
            index,
            shards,
        },
    ) in duties.iter().enumerate()
    {
        info!("assigned slot={slot} role={role} index={index} shards={shards}");
    }
}

fn listen(level: LevelFilter) {
    logs::start(
        level,
        &Identity {
            role: "supervisor".into(),
            slot: None,
            generation: None,
        },
    );
}

/// An error and its causes in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Says why, once, and gives the exit code.
fn refuse(error: &StartError) -> Exit {
    // Where the configuration is what is wrong, nothing is known of its level.
    listen(LevelFilter::Info);
    if let StartError::Config(config) = error {
        config.faults.iter().for_each(|fault| error!("{fault}"));
        return Exit::Config;
    }
    error!("{}", chain(error));
    if matches!(error, StartError::Binary(_)) {
        Exit::Config
    } else {
        Exit::Os
    }
}
