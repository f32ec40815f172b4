//! Where the demo speaks: a line that changes on a terminal, plain lines elsewhere.
//!
//! In:     lines, and figures that change.
//! Out:    standard output.
//! Keeps:  a reader that is gone stops nothing.
//! Knows:  whether there is a terminal.
//! Source: docs/spec.md 10.2.

use std::{
    io::{IsTerminal, Write, stdout},
    time::Duration,
};

use shared::time::{Clock, MonoNanos};

/// How often a plain line of figures is printed.
const PLAIN_EVERY: Duration = Duration::from_secs(2);
/// How often figures on a terminal change.
const LIVE_EVERY: Duration = Duration::from_millis(200);

/// Standard output.
#[derive(Debug)]
pub(super) struct Screen {
    terminal: bool,
    live: bool,
    shown: Option<MonoNanos>,
}

impl Screen {
    pub(super) fn new() -> Self {
        Self {
            terminal: stdout().is_terminal(),
            live: false,
            shown: None,
        }
    }

    /// Prints a line that stays.
    pub(super) fn line(&mut self, text: &str) {
        let begin = if std::mem::take(&mut self.live) {
            "\n"
        } else {
            ""
        };
        write(&format!("{begin}{text}\n"));
    }

    /// Shows figures: in place on a terminal, now and then elsewhere.
    pub(super) fn figures(&mut self, text: &str, last: bool) {
        let every = if self.terminal {
            LIVE_EVERY
        } else {
            PLAIN_EVERY
        };
        let now = Clock::mono_now();
        if !last && self.shown.is_some_and(|shown| now.since(shown) < every) {
            return;
        }
        self.shown = Some(now);
        if self.terminal {
            self.live = true;
            write(&format!("\r\x1b[K{text}"));
        } else {
            write(&format!("{text}\n"));
        }
    }
}

/// A reader that is gone (a closed pipe) is no reason to leave servers behind: the run goes on to its end.
fn write(text: &str) {
    let mut out = stdout().lock();
    drop(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
}
