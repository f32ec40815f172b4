//! Exit codes: what a process of Spanbuf says when it ends.
//!
//! Out:    a code with one meaning, the same for the supervisor, its workers and systemd.
//! Knows:  nothing else. Pure.
//! Source: docs/supervision.md 4.

use std::process::{ExitCode, Termination};

/// Why a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Drained: nothing is left undone.
    Ok = 0,
    /// The command line is wrong.
    Usage = 2,
    /// A worker failed more often than its restart cap allows.
    Restarts = 70,
    /// The operating system refused something.
    Os = 71,
    /// Stopped, but some workers had to be killed.
    Killed = 75,
    /// The configuration, or what it names, is wrong: trying again does not help.
    Config = 78,
}

/// Every exit code, with the line that README gives it.
pub const EXITS: [(Exit, &str); 6] = [
    (Exit::Ok, "drained: nothing is left undone"),
    (Exit::Usage, "the command line is wrong"),
    (
        Exit::Restarts,
        "a worker failed more often than its restart cap allows",
    ),
    (
        Exit::Os,
        "the operating system refused something; the run directory is held by another supervisor; `--check` could not reach Redis or Kafka",
    ),
    (Exit::Killed, "stopped, but some workers had to be killed"),
    (
        Exit::Config,
        "the configuration, or what it names, is wrong: trying again does not help",
    ),
];

impl Exit {
    /// The code as the operating system sees it.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }
}

impl Termination for Exit {
    fn report(self) -> ExitCode {
        ExitCode::from(self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_codes_are_those_that_service_managers_know() {
        assert_eq!(EXITS.map(|(exit, _)| exit.code()), [0, 2, 70, 71, 75, 78]);
    }
}
