//! The data model in Redis.
//!
//! Source: docs/store.md 1.

pub mod chunk;
pub mod client;
pub mod entry;
pub mod keys;
pub mod scripts;
mod varint;
