//! Replays recordings through a supervisor that nobody configured, on a Kafka at 9092 and a Redis at 6379.
//!
//! In:     files of one message a line, `<milliseconds since the first>` TAB `<message>`, plain or .zst.
//! Out:    the balance of each; exit code 0 when every span came out once.
//! Keeps:  everything that it starts ends with it.
//! Source: docs/spec.md 10.1.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a program for a person who watches it"
)]

use std::{path::PathBuf, process::ExitCode, time::Duration};

use nix::sys::signal::Signal;
use shared::time::{Clock, UnixMillis};
use stand::{
    kafka::{INPUT, OUTPUT, RealKafka},
    launch::plain_supervisor,
    ledger::Ledger,
    recording::Recording,
    redis::Redis,
    topics::{Producer, Reader},
    traffic::SpanMessage,
};

const SHARDS: u32 = 8;
/// Timeouts are the defaults: a minute without a root, behind the last span.
const PATIENCE: Duration = Duration::from_secs(180);

fn main() -> ExitCode {
    let files: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    if files.is_empty() {
        println!("usage: scripts/acceptance.sh FILE…");
        return ExitCode::from(2);
    }
    let kafka = RealKafka::start_on(9092, SHARDS).unwrap();
    let _redis = Redis::start_on(6379).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut supervisor = plain_supervisor(
        &["--shards", "0-7", "--max-workers", "4"],
        &folder.path().join("log"),
    )
    .unwrap();
    let mut producer = Producer::new(&kafka.brokers()).unwrap();
    let mut reader = Reader::new(&kafka.brokers(), OUTPUT).unwrap();
    let mut even = true;
    for file in files {
        let mut ledger = Ledger::new();
        let mut messages: Vec<SpanMessage> = Recording::open(&file, UnixMillis(0), SHARDS)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        // The last one arrives now: a broker deletes what is older than its retention, and nothing comes from the future.
        let (last, now) = (
            messages
                .iter()
                .map(|message| message.arrival.0)
                .max()
                .unwrap_or(0),
            Clock::wall_now().0,
        );
        for message in &mut messages {
            message.arrival = UnixMillis(now - (last - message.arrival.0));
        }
        ledger.sent_all(&messages).unwrap();
        for message in &messages {
            producer.send(INPUT, &message.record()).unwrap();
        }
        producer.flush(PATIENCE).unwrap();
        let begun = Clock::mono_now();
        while !ledger.is_complete() && Clock::mono_now().since(begun) < PATIENCE {
            drop(reader.read_until(Duration::from_secs(1), "", |_| false));
            ledger.read_output(&reader.take());
        }
        let balance = ledger.balance();
        println!("{}: {balance}", file.display());
        even &= balance.is_exact();
    }
    supervisor.signal(Signal::SIGTERM).unwrap();
    let status = supervisor.wait(Duration::from_secs(60)).unwrap();
    println!("supervisor: {status}");
    if !even || !status.success() {
        println!("{}", supervisor.log());
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
