//! `--check`: prints what is in force, proves the run directory, and lets one worker prove that Redis and Kafka are there.
//!
//! In:     the proved configuration.
//! Out:    the worker's own output and exit code.
//! Keeps:  no lock, a board of its own: it runs beside a supervisor at work. It ends within a minute.
//! Knows:  one worker in role `check`.
//! Source: docs/supervision.md 1; docs/spec.md 10.1.

use std::{
    io::{self, Write},
    time::Duration,
};

use log::{error, info};
use shared::{
    board::{BoardOwner, Cause},
    config::Config,
    exit::Exit,
    launch::Role,
    time::Clock,
};

use crate::{
    StartError,
    fleet::{
        self, Duty,
        lock::Lock,
        reap,
        spawn::{Birth, Spawner},
        stop,
    },
    turn::{Request, Turn},
};

/// How long the worker may take: it bounds its own calls well below that.
const LIMIT: Duration = Duration::from_secs(60);
/// How long it is waited for once it is killed.
const REAPING_MAX: Duration = Duration::from_secs(2);

/// Proves what a run would need.
pub(crate) fn run(turn: &Turn, config: &Config, spawner: &Spawner) -> Result<Exit, StartError> {
    let in_force: String = config
        .redacted()
        .iter()
        .map(|(key, value)| format!("{key} = {value}\n"))
        .collect();
    // Nobody reads it: the exit code says whether all is well.
    drop(io::stdout().write_all(in_force.as_bytes()));

    Lock::prove(&config.supervision.run_dir)?;
    let duty = Duty {
        role: Role::Check,
        index: 0,
        shards: config.supervision.shards.clone(),
    };
    let flush_workers = fleet::count(&fleet::duties(&config.supervision), Role::Flush);
    let board = BoardOwner::create(&duty.shards, 1)?;
    let launch = fleet::launch(&duty, 0, 1, flush_workers, &board, config);
    let (name, record) = (launch.process_name(), launch.write()?);
    let cells = board.board().supervise(0);
    cells.begin(1);
    let child = spawner.spawn(
        &Birth {
            name: &name,
            record: &record,
            inherited: &[board.inherited()],
        },
        &cells,
    )?;
    turn.watch(&child.pidfd);

    let mut deadline = Clock::mono_now().after(LIMIT);
    let mut given_up = None;
    loop {
        turn.arm(deadline.since(Clock::mono_now()))?;
        let stop = turn.wait()?.contains(&Request::Stop);
        if let Some(cause) = reap::reap(&child) {
            let errno = board.board().exec_errno(0, 1);
            return Ok(given_up.unwrap_or_else(|| exit(&cause, errno)));
        }
        let now = Clock::mono_now();
        match given_up {
            Some(exit) if now >= deadline => return Ok(exit),
            None if stop => given_up = Some(Exit::Killed),
            None if now >= deadline => {
                error!(
                    "check takes too long limit={}s (are Redis and Kafka reachable?)",
                    LIMIT.as_secs()
                );
                given_up = Some(Exit::Os);
            }
            _ => continue,
        }
        stop::kill(&child);
        deadline = now.after(REAPING_MAX);
    }
}

/// The worker's exit code as ours.
fn exit(cause: &Cause, errno: Option<i32>) -> Exit {
    let known = [Exit::Ok, Exit::Os, Exit::Config]
        .into_iter()
        .find(|exit| *cause == Cause::Exit(exit.code().into()));
    match (known, errno) {
        (Some(exit), _) => {
            info!("checked exit={}", exit.code());
            exit
        }
        (None, Some(errno)) => {
            error!(
                "check could not be executed: {}",
                io::Error::from_raw_os_error(errno)
            );
            Exit::Os
        }
        (None, None) => {
            error!("check did not end by itself cause={cause}");
            Exit::Os
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_taken_over_and_anything_else_is_an_error_of_the_system() {
        let rows = [
            (0, Exit::Ok),
            (71, Exit::Os),
            (78, Exit::Config),
            (101, Exit::Os),
            (75, Exit::Os),
            (127, Exit::Os),
        ];
        for (code, expected) in rows {
            assert_eq!(exit(&Cause::Exit(code), None), expected, "{code}");
        }
        assert_eq!(exit(&Cause::Signal(11), None), Exit::Os);
        assert_eq!(exit(&Cause::Exit(127), Some(2)), Exit::Os);
    }
}
