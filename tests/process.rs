//! The real binaries on a real Redis, with librdkafka's mock Kafka and with a real one.
//!
//! In:     seeded traffic.
//! Out:    the ledger: every span sent came out, or is counted.
//! Keeps:  a kill that did not meet its moment fails its test.
//! Source: docs/house.md 13.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::panic,
    reason = "helpers of a test fail loudly"
)]

mod process_chaos;
mod process_cluster;
mod process_damage;
mod process_input;
mod process_kills;
mod process_refusals;
mod process_sizes;
mod process_supervision;
mod process_time;
mod process_whole;
mod world;
