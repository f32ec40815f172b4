//! The command line.
//!
//! In:     arguments as typed.
//! Out:    what to do: run or check by a plan, print something, or refuse.
//! Keeps:  a refusal is one line that says how to mend it.
//! Knows:  the flags; nothing of the configuration behind them.
//! Source: docs/spec.md 7.1, 10.1; docs/house.md 8.

use std::{ffi::OsString, path::PathBuf};

use clap::{Parser, error::ErrorKind};
use shared::{config::Flags, shard::ShardList};

/// What a command line asks for.
#[derive(Debug)]
pub enum Order {
    /// Run, or prove what a run needs.
    Run(Plan),
    /// Print that (help, the version), and end well.
    Print(String),
    /// End with a usage error: one line.
    Refuse(String),
}

/// What a run is told by its command line.
#[derive(Debug, Default)]
pub struct Plan {
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// Flags that win over file and environment.
    pub flags: Flags,
    /// Only prove the configuration and what it names.
    pub check: bool,
}

/// Keeps Spanbuf's workers alive: spans from Kafka, assembled in Redis, segments to Kafka.
#[derive(Debug, Parser)]
#[command(name = "supervisor", version, max_term_width = 100)]
struct Line {
    /// Partitions of the input topic to work on: ranges and lists, such as 0,2,5-9
    #[arg(long, value_name = "LIST")]
    shards: Option<ShardList>,
    /// Flush workers at most [default: one a shard]
    #[arg(long, value_name = "N", value_parser = workers)]
    max_workers: Option<u32>,
    /// Ingest workers
    #[arg(long, value_name = "N", value_parser = workers)]
    ingest_workers: Option<u32>,
    /// Configuration in TOML
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Prove the configuration, the run directory and the reachability of Redis and Kafka, print what is in force, end
    #[arg(long)]
    check: bool,
}

/// Reads a command line; its first word is the program's name.
#[must_use]
pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Order {
    match Line::try_parse_from(arguments) {
        Ok(Line {
            shards,
            max_workers,
            ingest_workers,
            config,
            check,
        }) => Order::Run(Plan {
            config,
            flags: Flags {
                shards,
                max_workers,
                ingest_workers,
            },
            check,
        }),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            ) =>
        {
            Order::Print(error.to_string())
        }
        Err(error) => Order::Refuse(folded(&error.to_string())),
    }
}

fn workers(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(0) => Err("without workers nothing runs (write 1 or more)".into()),
        Ok(workers) => Ok(workers),
        Err(_) => Err("it is no number of workers (write 1 or more)".into()),
    }
}

/// Several lines of clap as one: the error, its hints, where to find more.
fn folded(text: &str) -> String {
    let lines = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("Usage:"));
    lines.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::CommandFactory;

    use super::*;

    /// The words in backticks of the first column of a table of README.
    fn readme_words(heading: &str) -> BTreeSet<String> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md");
        let readme = std::fs::read_to_string(path).unwrap();
        let section = readme
            .split("\n## ")
            .find(|text| text.starts_with(heading))
            .unwrap();
        let rows = section.lines().filter(|line| line.starts_with("| `"));
        let first = rows.map(|row| row.split('|').nth(1).unwrap());
        let words = first.flat_map(|cell| cell.split('`').skip(1).step_by(2));
        words
            .map(|word| word.split(' ').next().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn readme_lists_every_flag_and_signal() {
        let mut command = Line::command();
        command.build();
        let long = |argument: &clap::Arg| argument.get_long().map(|long| format!("--{long}"));
        let mut flags: BTreeSet<String> = command.get_arguments().filter_map(long).collect();
        // It is what one tries when README is not at hand.
        flags.remove("--help");
        assert_eq!(readme_words("Flags"), flags);
        // CHLD is the kernel's, not an operator's.
        let signals = crate::turn::SIGNALS
            .iter()
            .map(|signal| signal.as_str().trim_start_matches("SIG").to_owned());
        let signals: BTreeSet<String> = signals.filter(|signal| signal != "CHLD").collect();
        assert_eq!(readme_words("Signals"), signals);
    }

    fn order(line: &str) -> Order {
        read(
            std::iter::once("supervisor")
                .chain(line.split_whitespace())
                .map(Into::into),
        )
    }

    #[test]
    fn flags_are_read() {
        let Order::Run(plan) =
            order("--shards 0,2,5-9 --max-workers=4 --ingest-workers 2 --config a.toml --check")
        else {
            panic!("a run")
        };
        assert_eq!(
            plan.flags
                .shards
                .map(|shards| shards.to_string())
                .as_deref(),
            Some("0,2,5-9")
        );
        assert_eq!(
            (
                plan.flags.max_workers,
                plan.flags.ingest_workers,
                plan.check
            ),
            (Some(4), Some(2), true)
        );
        assert_eq!(plan.config, Some(PathBuf::from("a.toml")));
        let Order::Run(plan) = order("") else {
            panic!("a run")
        };
        assert!(plan.flags.shards.is_none() && plan.config.is_none() && !plan.check);
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line_with_its_cure() {
        let rows = [
            ("--max-workers 0", "write 1 or more"),
            ("--ingest-workers 0", "write 1 or more"),
            ("--max-workers -1", "--help"),
            ("--max-workers many", "write 1 or more"),
            ("--max-workers 99999999999", "write 1 or more"),
            ("--shards 7-0", "write 0-7"),
            ("--shards 1,1", "list every shard once"),
            ("--shards 1,,2", "write shards as"),
            ("--shards 65536", "the largest is 65535"),
            ("--shards", "--help"),
            ("--max-worker 3", "--max-workers"),
            ("0-7", "--help"),
            ("--check --check", "--help"),
        ];
        for (line, cure) in rows {
            let Order::Refuse(text) = order(line) else {
                panic!("{line} is refused")
            };
            assert!(
                text.contains(cure) && !text.contains('\n'),
                "{line}: {text}"
            );
            assert!(text.starts_with("error: "), "{line}: {text}");
        }
        let empty = read(["supervisor", "--shards", ""].map(Into::into));
        assert!(matches!(empty, Order::Refuse(text) if text.contains("write shards as")));
    }

    #[test]
    fn help_and_version_are_printed() {
        let Order::Print(help) = order("--help") else {
            panic!("help")
        };
        for flag in [
            "--shards",
            "--max-workers",
            "--ingest-workers",
            "--config",
            "--check",
            "--version",
        ] {
            assert!(help.contains(flag), "{help}");
        }
        let Order::Print(version) = order("--version") else {
            panic!("a version")
        };
        assert_eq!(
            version,
            format!("supervisor {}\n", env!("CARGO_PKG_VERSION"))
        );
    }
}
