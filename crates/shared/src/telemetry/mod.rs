//! What processes tell about themselves.
//!
//! Knows:  log records. Metrics get their names here when they exist.
//! Source: docs/house.md 11.

pub mod logs;
