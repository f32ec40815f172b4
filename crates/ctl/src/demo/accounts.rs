//! The store's own accounts: what was inserted, and what became of it.
//!
//! In:     a Redis, and the numbers of shards and buckets.
//! Out:    sums over all of them.
//! Keeps:  inserted = produced + dropped + repeats + buffered.
//! Knows:  positions, sums, journals by their headers.
//! Source: docs/store.md 1, 5 (I6).

use std::{collections::BTreeSet, fmt};

use shared::{
    config::{Config, Flags},
    shard::ShardId,
};
use store::{
    client::{Client, Command, Reply, Value, reply},
    entry::EntryHeader,
    keys::{Bucket, Member},
};

/// Sums over all buckets of all shards.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    inserted: u64,
    produced: u64,
    repeats: u64,
    dropped: u64,
    buffered: u64,
}

impl Accounts {
    /// Reads all accounts of a store at rest.
    pub(super) fn read(address: &str, shards: u32, buckets: u32) -> Result<Self, String> {
        let environment = [
            ("SPANBUF_REDIS__NODES".into(), address.into()),
            ("SPANBUF_REDIS__BUCKETS".into(), buckets.to_string().into()),
        ];
        let flags = Flags {
            shards: format!("0-{}", shards.saturating_sub(1)).parse().ok(),
            ..Flags::default()
        };
        let config = Config::load(None, environment.into_iter(), &flags)
            .map_err(|error| error.to_string())?;
        let mut client = Client::new(&config.redis).map_err(|error| error.to_string())?;
        let mut accounts = Self::default();
        let buckets = client.buckets();
        for bucket in (0..shards).flat_map(|shard| buckets.of_shard(ShardId(shard))) {
            accounts.add(&mut client, bucket)?;
        }
        Ok(accounts)
    }

    fn add(&mut self, client: &mut Client, bucket: Bucket) -> Result<(), String> {
        let commands = [
            Command::whole_position(bucket),
            Command::sum(bucket),
            Command::queued(bucket, 0, usize::MAX >> 1),
        ];
        let [position, sum, queued] = <[Reply; 3]>::try_from(client.run(&commands))
            .map_err(|_| "a reply is missing".to_owned())?;
        let (position, sum, queued) = (good(position)?, good(sum)?, good(queued)?);
        let next = reply::position(&position).map_or(0, |position| {
            self.inserted += position.spans;
            position.next
        });
        for (name, amount) in reply::counters(&sum) {
            match &name[..] {
                "produced" => self.produced += amount,
                "repeats" => self.repeats += amount,
                name if name.starts_with("dropped:") => self.dropped += amount,
                _ => {}
            }
        }
        let members = reply::list(&queued).unwrap_or_default();
        let commands: Vec<Command> = members
            .iter()
            .filter_map(|member| Some(Command::headers(bucket, &Member::parse(member)?)))
            .collect();
        for headers in client.run(&commands) {
            let headers = reply::list(&good(headers)?).unwrap_or_default();
            let offsets: BTreeSet<u64> = headers
                .iter()
                .filter_map(|header| EntryHeader::decode(header).ok())
                .flat_map(|header| header.spans)
                .map(|span| span.offset)
                .collect();
            self.buffered += u64::try_from(offsets.range(..next).count()).unwrap_or(u64::MAX);
        }
        Ok(())
    }

    /// Inserted less all that became of it: 0.
    pub(super) fn difference(&self) -> i128 {
        i128::from(self.inserted)
            - i128::from(self.produced)
            - i128::from(self.repeats)
            - i128::from(self.dropped)
            - i128::from(self.buffered)
    }
}

fn good(reply: Reply) -> Result<Value, String> {
    reply.map_err(|error| error.to_string())
}

impl fmt::Display for Accounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "inserted {} = produced {} + dropped {} + repeats {} + buffered {}, difference {}",
            self.inserted,
            self.produced,
            self.dropped,
            self.repeats,
            self.buffered,
            self.difference()
        )
    }
}
