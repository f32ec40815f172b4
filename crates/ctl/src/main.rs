//! `spanctl`, the operator's tool of Spanbuf.
//!
//! In:     a command line.
//! Out:    what the command says; an exit code.
//! Knows:  the commands by name.
//! Source: docs/spec.md 10.2.

use std::{
    io::{Write, stderr},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

mod demo;
mod status;

/// The operator's tool of Spanbuf.
#[derive(Debug, Parser)]
#[command(name = "spanctl", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the whole way on this machine: a private Redis, a Kafka inside this process, the real supervisor and workers.
    Demo(demo::Arguments),
    /// Shows the workers of the supervisor on this machine, as its board has them.
    Status(status::Arguments),
}

fn main() -> ExitCode {
    let Arguments { command } = Arguments::parse();
    let done: Result<bool, Box<dyn std::error::Error>> = match command {
        Command::Demo(arguments) => demo::run(&arguments).map_err(Into::into),
        Command::Status(arguments) => status::run(&arguments).map_err(Into::into),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let mut text = format!("error: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                // Some errors say what their source says.
                let cause_text = cause.to_string();
                if !text.contains(&cause_text) {
                    text.push_str(&format!(": {cause_text}"));
                }
                source = cause.source();
            }
            // Nobody reads it: the exit code says the same.
            drop(writeln!(stderr(), "{text}"));
            ExitCode::FAILURE
        }
    }
}
