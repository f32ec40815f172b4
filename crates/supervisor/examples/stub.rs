//! A worker that does nothing but what `STUB` says: the supervisor's own tests start it in the worker's place.
//!
//! In:     the launch record; `STUB`: empty, `deaf`, `exit:<code>`.
//! Out:    beats on the board; an exit code.
//! Knows:  the contract, as a worker does.

use std::{io::Read, process::ExitCode, time::Duration};

use shared::{
    board::{Board, Phase},
    launch::{Launch, Role},
    signals::Stop,
    time::Clock,
};

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let stop = Stop::install()?;
    let mut record = Vec::new();
    std::io::stdin().read_to_end(&mut record)?;
    let launch = Launch::read(&record)?;
    let cells = Board::map_inherited(launch.board)?.worker(launch.slot, launch.generation);
    cells.echo();
    let manner = std::env::var("STUB").unwrap_or_default();
    if launch.role == Role::Check {
        std::io::Write::write_all(&mut std::io::stdout(), b"ok: stub\n")?;
    }
    if let Some(code) = manner.strip_prefix("exit:") {
        return Ok(ExitCode::from(code.parse::<u8>()?));
    }
    cells.phase(Phase::Idle);
    while manner == "deaf" || !(stop.requested() || launch.role == Role::Check) {
        cells.healthy(Clock::mono_now());
        cells.progress();
        // A deaf one has been asked, and its waits are none.
        if stop.requested() {
            nix::unistd::pause();
        }
        stop.wait(Duration::from_millis(50));
    }
    Ok(ExitCode::SUCCESS)
}
