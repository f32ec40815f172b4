//! A wall clock of its own for what is started with it; the machine's clock is left alone.
//!
//! In:     seconds to step by.
//! Out:    a library for `LD_PRELOAD`, built here, and the environment that loads it.
//! Keeps:  every process that has it sees the same step, at its next look at the clock; other clocks are untouched.
//! Knows:  a C compiler, `clock_gettime`.
//! Source: docs/supervision.md 5, docs/house.md 13.

use std::{fs, process::Command};

use tempfile::TempDir;

use crate::StandError;

const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int done = real(id, now);
    FILE *file = id == CLOCK_REALTIME ? fopen(getenv("CLOCK_STEP"), "r") : NULL;
    long step = 0;
    if (file) { if (fscanf(file, "%ld", &step) == 1) now->tv_sec += step; fclose(file); }
    return done;
}
"#;

/// A step of the wall clock, none at first.
#[derive(Debug)]
pub struct ClockStep {
    directory: TempDir,
}

impl ClockStep {
    /// Builds the library.
    ///
    /// # Errors
    /// [`StandError::Missing`] without a C compiler; [`StandError::Ended`] when it fails; [`StandError::System`].
    pub fn new() -> Result<Self, StandError> {
        let directory =
            tempfile::tempdir().map_err(StandError::system("make a directory for a library"))?;
        let at = |name: &str| directory.path().join(name);
        fs::write(at("step.c"), SOURCE).map_err(StandError::system("write a library"))?;
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-o"])
            .args([at("step.so"), at("step.c")])
            .arg("-ldl")
            .output()
            .map_err(|_| StandError::Missing {
                program: "cc".into(),
                hint: "apt-get install gcc".into(),
            })?;
        if !built.status.success() {
            return Err(StandError::Ended {
                program: "cc".into(),
                status: built.status.to_string(),
                log: String::from_utf8_lossy(&built.stderr).into_owned(),
            });
        }
        let step = Self { directory };
        step.set(0)?;
        Ok(step)
    }

    /// What a process is started with to have this clock.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        let path = |name: &str| self.directory.path().join(name).display().to_string();
        vec![
            ("LD_PRELOAD".into(), path("step.so")),
            ("CLOCK_STEP".into(), path("step")),
        ]
    }

    /// Steps the clock to that many seconds from the machine's.
    ///
    /// # Errors
    /// [`StandError::System`] when it cannot be written.
    pub fn set(&self, seconds: i64) -> Result<(), StandError> {
        // A reader sees the one or the other, never half of it.
        let (beside, file) = (
            self.directory.path().join("step.new"),
            self.directory.path().join("step"),
        );
        fs::write(&beside, seconds.to_string())
            .and_then(|()| fs::rename(&beside, &file))
            .map_err(StandError::system("step a clock"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_sees_the_step_and_this_one_does_not() {
        let step = ClockStep::new().unwrap();
        let seconds = || {
            let output = Command::new("date")
                .arg("+%s")
                .envs(step.environment())
                .output()
                .unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            text.trim().parse::<i64>().unwrap()
        };
        let now = seconds();
        step.set(1_000_000).unwrap();
        assert!((seconds() - now - 1_000_000).abs() < 60);
        step.set(0).unwrap();
        assert!((seconds() - now).abs() < 60);
    }
}
