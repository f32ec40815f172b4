//! The contract between the processes of Spanbuf: what two of them must agree on, byte for byte or name for name.
//!
//! Knows:  ids, shards, time, the board, the launch record, exit codes, the configuration.
//! Never:  Kafka, Redis, any loop, any policy.
//! Source: docs/house.md 2.

pub mod board;
pub mod config;
pub mod exit;
pub mod ids;
pub mod launch;
pub mod shard;
pub mod signals;
pub mod telemetry;
pub mod time;
