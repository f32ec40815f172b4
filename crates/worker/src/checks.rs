//! Waits for a store that can be used.
//!
//! In:     the client; what the configuration says of the store.
//! Out:    the store's description, or the refusal that ends the worker.
//! Keeps:  what time may mend is waited for, and said; only what it does not mend ends a worker.
//! Knows:  the store's own checks. No role.
//! Source: docs/spec.md 9.1; docs/supervision.md 3.

use log::warn;
use shared::shard::ShardList;
use store::client::{AddressError, CheckError, Client, Meta};

use crate::{
    Ended, Refusal,
    beat::{Beat, Reason},
};

impl Refusal for CheckError {}
impl Refusal for AddressError {}

/// Checks the servers and reads the store's description, until both are good. `shards` are all of the supervisor's.
///
/// # Errors
/// [`Ended::Refused`] for a server or a store that cannot be used, [`Ended::Stopped`].
pub fn wait_for_store(
    client: &mut Client,
    shards: &ShardList,
    beat: &mut Beat,
) -> Result<Meta, Ended> {
    loop {
        let checked = client
            .check()
            .and_then(|servers| Ok((servers, client.meta(shards)?)));
        match checked {
            Ok((servers, meta)) => {
                beat.worked(Reason::Redis);
                for server in servers.iter().filter(|server| server.maxmemory == 0) {
                    warn!(
                        "redis at {} has no maxmemory: it may take all of its machine's memory (set maxmemory and maxmemory-policy noeviction)",
                        server.address
                    );
                }
                return Ok(meta);
            }
            Err(error) if error.is_outage() => beat.failed(Reason::Redis, "check redis", &error)?,
            Err(error) => return Err(error.into()),
        }
    }
}
