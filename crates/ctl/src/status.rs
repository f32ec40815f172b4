//! `spanctl status`: what the supervisor's dump shows, read from the board by name.
//!
//! In:     boards in /dev/shm.
//! Out:    a table for people, or JSON; once, or again and again.
//! Keeps:  it only reads: neither the supervisor nor a worker notices it.
//! Knows:  the board. No Kafka, no Redis.
//! Source: docs/spec.md 10.2; docs/supervision.md 2, 4.

use std::{
    io::{Write, stdout},
    time::Duration,
};

use shared::{
    board::{Board, BoardError, View, boards},
    signals::Stop,
    time::Clock,
};

/// How often it looks when it watches.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// What `spanctl status` may be told.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The supervisor's process id; needed only where several run
    #[arg(long, value_name = "PID")]
    supervisor: Option<u32>,
    /// Look again every second, until interrupted
    #[arg(long)]
    watch: bool,
    /// Print JSON, one object a look
    #[arg(long)]
    json: bool,
}

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    /// No supervisor has a board here.
    #[error("find a board: no supervisor runs here (is it another host, container or user?)")]
    None,
    /// Several have one.
    #[error("find a board: several supervisors run here: {0} (name one with --supervisor)")]
    Several(String),
    /// None of that supervisor.
    #[error("find a board of supervisor={0}: there is none")]
    Other(u32),
    /// It is what one left that has ended.
    #[error("show board name={0}: its supervisor has ended")]
    Gone(String),
    /// It cannot be read.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// The terminal's signals cannot be read.
    #[error(transparent)]
    Signals(#[from] shared::signals::SignalError),
}

/// Shows it. False when nobody reads what is shown.
pub(crate) fn run(arguments: &Arguments) -> Result<bool, StatusError> {
    let stop = Stop::install_interactive()?;
    let name = name(arguments.supervisor)?;
    let board = Board::open_read(&name)?;
    loop {
        if !lives(&name) {
            return Err(StatusError::Gone(name));
        }
        let view = board.view(Clock::mono_now(), Clock::wall_now());
        let mut text = if arguments.json {
            view.json() + "\n"
        } else {
            table(&view)
        };
        if arguments.watch && !arguments.json {
            // The screen is cleared first.
            text.insert_str(0, "\x1b[H\x1b[2J");
        }
        let mut out = stdout();
        if out
            .write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .is_err()
        {
            return Ok(false);
        }
        if !arguments.watch {
            return Ok(true);
        }
        stop.wait(WATCH_EVERY);
        if stop.requested() {
            return Ok(true);
        }
    }
}

/// The board that is meant: that of the supervisor that was named, or the only one of the living.
fn name(supervisor: Option<u32>) -> Result<String, StatusError> {
    let of = |pid: u32| format!("spanbuf-{pid}-");
    let names = boards();
    if let Some(pid) = supervisor {
        let found = names.into_iter().find(|name| name.starts_with(&of(pid)));
        return found.ok_or(StatusError::Other(pid));
    }
    // What a killed supervisor left is swept by the next one.
    let mut living: Vec<String> = names.into_iter().filter(|name| lives(name)).collect();
    match living.len() {
        0 => Err(StatusError::None),
        1 => Ok(living.remove(0)),
        _ => Err(StatusError::Several(living.join(", "))),
    }
}

/// Whether the process of that pid and start time is there, as the board's name says both.
fn lives(name: &str) -> bool {
    let mut words = name.split('-').skip(1);
    let (Some(pid), Some(start)) = (words.next(), words.next()) else {
        return false;
    };
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before it may hold anything, brackets too.
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    fields.split(' ').nth(19) == Some(start)
}

/// Columns under their names, and the summary.
fn table(view: &View) -> String {
    let rows: Vec<Vec<(&str, String)>> = view.rows.iter().map(|row| row.columns()).collect();
    let names: Vec<&str> = rows
        .first()
        .map(|row| row.iter().map(|(name, _)| *name).collect())
        .unwrap_or_default();
    let width = |place: usize| {
        let values = rows.iter().filter_map(|row| row.get(place));
        let widest = values.map(|(_, value)| value.chars().count()).max();
        widest.unwrap_or(0).max(names[place].len())
    };
    let widths: Vec<usize> = (0..names.len()).map(width).collect();
    let line = |values: Vec<&str>| {
        let cells = values.iter().zip(&widths);
        let cells: Vec<String> = cells
            .map(|(value, width)| format!("{value:width$}"))
            .collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    let mut text = line(names.clone());
    for row in &rows {
        text += &line(row.iter().map(|(_, value)| value.as_str()).collect());
    }
    if let Some(summary) = view.lines().last() {
        text += &format!("{summary}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use shared::board::BoardOwner;

    use super::*;

    #[test]
    fn the_board_of_a_living_supervisor_is_shown() {
        let board = BoardOwner::create(&"0-1".parse().unwrap(), 2).unwrap();
        let pid = std::process::id();
        assert!(lives(board.name()) && !lives("spanbuf-1-999") && !lives("spanbuf-x"));
        assert_eq!(name(Some(pid)).unwrap(), board.name());
        assert!(matches!(name(Some(0)), Err(StatusError::Other(0))));
        let read = Board::open_read(board.name()).unwrap();
        let text = table(&read.view(Clock::mono_now(), Clock::wall_now()));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(
            lines[0].starts_with("slot  role  index  shards  pid") && lines[1].starts_with("0 "),
            "{text}"
        );
        assert!(lines[3].starts_with("summary workers=2"), "{text}");
    }
}
