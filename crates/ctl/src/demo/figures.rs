//! The live figures of a run.
//!
//! In:     what was sent and what came out; the board, read only.
//! Out:    one line.
//! Keeps:  a board that cannot be read is shown as such.
//! Knows:  the board's totals and clocks.
//! Source: docs/spec.md 10.2.

use std::fs;

use shared::{
    board::{Board, Totals},
    time::Clock,
};
use stand::topics::Message;

use super::screen::Screen;

/// Counts of one run.
#[derive(Debug)]
pub(super) struct Figures {
    all: usize,
    pub(super) sent: usize,
    out: usize,
    segments: usize,
    supervisor: u32,
    board: Option<Board>,
}

impl Figures {
    pub(super) fn new(all: usize, supervisor: u32) -> Self {
        Self {
            all,
            sent: 0,
            out: 0,
            segments: 0,
            supervisor,
            board: None,
        }
    }

    /// Counts a message of the output; its header says how many spans it holds.
    pub(super) fn take(&mut self, message: &Message) {
        self.segments += 1;
        let spans = message
            .header("spans")
            .and_then(|spans| std::str::from_utf8(spans).ok()?.parse::<usize>().ok());
        self.out += spans.unwrap_or(0);
    }

    /// Whether it is worth asking the ledger.
    pub(super) fn may_be_complete(&self) -> bool {
        self.out >= self.all
    }

    pub(super) fn show(&mut self, screen: &mut Screen, all_sent: bool) {
        let state = if all_sent {
            "all sent, waiting for timeouts"
        } else {
            "sending"
        };
        let line = self.line(state);
        screen.figures(&line, false);
    }

    pub(super) fn end(&mut self, screen: &mut Screen) {
        let line = self.line("done");
        screen.figures(&line, true);
    }

    fn line(&mut self, state: &str) -> String {
        let (totals, drift) = self.board().map_or((Totals::default(), 0), |board| {
            (totals(board), drift(board))
        });
        format!(
            "sent {} of {} · in redis {} · out {} spans in {} segments · clocks {drift} ms behind · {state}",
            self.sent,
            self.all,
            totals
                .inserted
                .saturating_sub(totals.produced + totals.dropped + totals.repeats),
            self.out,
            self.segments,
        )
    }

    /// The supervisor's board, once it has one.
    fn board(&mut self) -> Option<&Board> {
        if self.board.is_none() {
            let prefix = format!("spanbuf-{}-", self.supervisor);
            let names = fs::read_dir("/dev/shm")
                .ok()?
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            let name = names.into_iter().find(|name| name.starts_with(&prefix))?;
            self.board = Board::open_read(&name).ok();
        }
        self.board.as_ref()
    }
}

fn totals(board: &Board) -> Totals {
    let mut sum = Totals::default();
    for shard in board.shards().iter() {
        if let Some(totals) = board.totals(shard) {
            sum.inserted += totals.inserted;
            sum.produced += totals.produced;
            sum.dropped += totals.dropped;
            sum.repeats += totals.repeats;
        }
    }
    sum
}

/// How far the slowest shard's clock is behind the wall clock, in milliseconds.
fn drift(board: &Board) -> u128 {
    let (now, wall_now) = (Clock::mono_now(), Clock::wall_now());
    let behind = board
        .shards()
        .iter()
        .filter_map(|shard| Some(wall_now.since(board.clock(shard)?.read(now)).as_millis()));
    behind.max().unwrap_or(0)
}
