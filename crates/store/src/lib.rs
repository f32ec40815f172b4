//! The data model in Redis.
//!
//! In:     spans to insert, traces to look at, entries to remove.
//! Out:    keys, headers, chunks, commands, and what their replies say.
//! Keeps:  all keys of a bucket share the hash tag `{S.B}`, so they lie on one node and one script can change them.
//! Knows:  Redis. No loop, no Kafka, no board.
//! Source: docs/store.md 1.
//!
//! | key | type | TTL | written by | deleted by |
//! |---|---|---|---|---|
//! | `span-buf:{S.B}:t:<project>:<trace>`: the journal | hash: entry header → chunk | `redis_ttl` | ingest, `HSET` | `clear.lua`, field by field |
//! | `span-buf:{S.B}:q`: the queue | sorted set: `<project>:<trace>` by its next look | twice that | ingest, `ZADD LT`; `queue.lua`, `clear.lua` | `clear.lua`, with a journal's last field |
//! | `span-buf:{S.B}:pos`: the position | hash: `next`, `clock`, `spans`, `instance` | twice that | `position.lua` | nobody |
//! | `span-buf:{S.B}:sum`: the sum | hash: `produced`, `repeats`, `dropped:<reason>`, `refused:<reason>`, `offset_out_of_range` | twice that | `clear.lua`, `position.lua`; the flusher that finds expired spans | nobody |
//! | `span-buf:meta` | hash: `instance`, `layout`, `buckets` | none | the first worker | nobody |

pub mod chunk;
pub mod client;
pub mod entry;
pub mod keys;
pub mod scripts;
mod varint;
