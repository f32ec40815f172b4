//! A worker that does nothing but what `STUB` says: the supervisor's own tests start it in the worker's place.
//!
//! In:     the launch record; `STUB`: empty, `deaf`, `boot`, `pressed`, `mute`, `orphan`, `greedy` (that of slot 0 takes
//!         memory without end), `exit:<code>`, or `@<file>` that says one of them and is read again and again.
//! Out:    beats on the board; an exit code.
//! Knows:  the contract, as a worker does.

use std::{
    fs,
    io::Read,
    process::{Command, ExitCode},
    time::Duration,
};

use shared::{
    board::{Board, Phase},
    launch::{Launch, Role},
    signals::Stop,
    time::Clock,
};

fn manner() -> String {
    let manner = std::env::var("STUB").unwrap_or_default();
    match manner.strip_prefix('@') {
        Some(path) => fs::read_to_string(path).unwrap_or_default(),
        None => manner,
    }
}

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let stop = Stop::install()?;
    let mut record = Vec::new();
    std::io::stdin().read_to_end(&mut record)?;
    let launch = Launch::read(&record)?;
    let cells = Board::map_inherited(launch.board)?.worker(launch.slot, launch.generation);
    if launch.role == Role::Check {
        std::io::Write::write_all(&mut std::io::stdout(), b"ok: stub\n")?;
    }
    let (mut greeted, mut orphaned, mut taken) = (false, false, Vec::new());
    loop {
        let manner = manner();
        if let Some(code) = manner.strip_prefix("exit:") {
            return Ok(ExitCode::from(code.trim().parse::<u8>()?));
        }
        let deaf = manner == "deaf";
        if !deaf && (stop.requested() || launch.role == Role::Check) {
            return Ok(ExitCode::SUCCESS);
        }
        if manner != "mute" && !std::mem::replace(&mut greeted, true) {
            cells.echo();
        }
        match manner.as_str() {
            "mute" | "boot" => {}
            manner => {
                cells.phase(Phase::Idle);
                cells.backpressure((manner == "pressed").then(Clock::mono_now));
                cells.healthy(Clock::mono_now());
                cells.progress();
            }
        }
        if manner == "orphan" && !std::mem::replace(&mut orphaned, true) {
            // Its child leaves one behind that ends soon after.
            let mut shell = Command::new("/bin/sh");
            shell.args(["-c", "for i in 1 2 3; do (exec sleep 0.5) & done"]);
            shell.status()?;
        }
        if manner == "greedy" && launch.slot == 0 {
            // Touched, not only asked for.
            taken.extend(vec![1_u8; 8 << 20]);
        }
        // A deaf one has been asked, and its waits are none.
        if deaf && stop.requested() {
            nix::unistd::pause();
        }
        stop.wait(Duration::from_millis(50));
    }
}
