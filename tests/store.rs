//! Every script and every call of the store, on a real Redis, against a naive model.
//!
//! In:     seeded steps.
//! Out:    replies, keys and TTLs, compared with the model after every step.
//! Keeps:  keys that a call does not name are not touched.
//! Source: docs/house.md 13, docs/store.md 2–4.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of a test fail loudly"
)]

mod store_calls;
mod store_clear;
mod store_cluster;
mod store_full;
mod store_insert;
mod store_lanes;
mod store_scripts;
