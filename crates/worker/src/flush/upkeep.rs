//! What a flusher does now and then: keeps TTLs, and accounts for what expired.
//!
//! In:     the buckets of its shards.
//! Out:    renewed TTLs; spans that expired, counted.
//! Keeps:  nothing expires while a flusher lives; what expired before is a counted outcome. One page of work a turn.
//! Knows:  queues, positions and sums. No journal's content.
//! Source: docs/store.md 1; docs/spec.md 5.6.

use std::{collections::BTreeMap, time::Duration};

use log::{error, warn};
use shared::{
    board::Ledger,
    shard::ShardId,
    time::{Clock, MonoNanos},
};
use store::{
    client::{Client, Command, reply},
    keys::{Bucket, Member},
};

use crate::{Ended, ask::ask, beat::Beat};

/// How often all TTLs are renewed.
const RENEW_EVERY: Duration = Duration::from_secs(3600);
/// How many traces of a queue are renewed in a turn.
const PAGE: usize = 1_000;
/// How often a bucket's account is read.
const ACCOUNT_EVERY: Duration = Duration::from_secs(60);

/// The counter of spans whose journals are gone.
const EXPIRED: &str = "dropped:expired";

/// The state of the walks.
#[derive(Debug)]
pub struct Upkeep {
    buckets: Vec<Bucket>,
    renewed: MonoNanos,
    /// Where the walk over the queues stands: a bucket and a place in its queue.
    walk: Option<(usize, usize)>,
    accounted: MonoNanos,
}

impl Upkeep {
    /// Walks that begin an hour, and a minute, from now.
    #[must_use]
    pub fn new(buckets: Vec<Bucket>) -> Self {
        let now = Clock::mono_now();
        Self {
            buckets,
            renewed: now,
            walk: None,
            accounted: now,
        }
    }

    /// Does one page of what is due.
    ///
    /// # Errors
    /// [`Ended::Stopped`].
    pub fn turn(
        &mut self,
        client: &mut Client,
        beat: &mut Beat,
        ttl: Duration,
        ledgers: &BTreeMap<ShardId, Ledger>,
    ) -> Result<(), Ended> {
        let now = Clock::mono_now();
        if self.walk.is_none() && now.since(self.renewed) >= RENEW_EVERY {
            (self.renewed, self.walk) = (now, Some((0, 0)));
        }
        if let Some(walk) = self.walk {
            self.walk = self.renew_page(walk, client, beat, ttl)?;
        }
        if now.since(self.accounted) >= ACCOUNT_EVERY {
            self.accounted = now;
            self.account(client, beat, ledgers)?;
        }
        Ok(())
    }

    /// Renews a page of traces, and with a queue's first page the bucket's own keys; gives the next page.
    fn renew_page(
        &self,
        (index, place): (usize, usize),
        client: &mut Client,
        beat: &mut Beat,
        ttl: Duration,
    ) -> Result<Option<(usize, usize)>, Ended> {
        let Some(&bucket) = self.buckets.get(index) else {
            return Ok(None);
        };
        let mut commands = vec![Command::queued(bucket, place, place + PAGE - 1)];
        if place == 0 {
            commands.extend(Command::renew(bucket, ttl));
        }
        let queued = ask(client, beat, "renew ttl", commands)?.into_iter().next();
        let members = queued
            .and_then(Result::ok)
            .as_ref()
            .and_then(reply::list)
            .unwrap_or_default();
        let next = if members.len() < PAGE {
            (index + 1, 0)
        } else {
            (index, place + PAGE)
        };
        let journals = members.iter().filter_map(|member| Member::parse(member));
        let commands = journals
            .map(|member| Command::expire_journal(bucket, &member, ttl))
            .collect();
        for refusal in ask(client, beat, "renew ttl", commands)?
            .into_iter()
            .filter_map(Result::err)
        {
            warn!("renew ttl shard={}: {refusal}", bucket.shard);
        }
        Ok(Some(next))
    }

    /// When a queue is empty, all that was inserted has to be in the sum; what is not has expired.
    fn account(
        &self,
        client: &mut Client,
        beat: &mut Beat,
        ledgers: &BTreeMap<ShardId, Ledger>,
    ) -> Result<(), Ended> {
        // In this order: what was inserted before the queue was seen empty has been summed before the sum is read.
        let commands = self.buckets.iter().flat_map(|&bucket| {
            [
                Command::whole_position(bucket),
                Command::queue_len(bucket),
                Command::sum(bucket),
            ]
        });
        let answers = ask(client, beat, "read accounts", commands.collect())?;
        for (&bucket, answers) in self.buckets.iter().zip(answers.chunks_exact(3)) {
            let [Ok(position), Ok(queued), Ok(sum)] = answers else {
                continue;
            };
            let (Some(position), Some(0)) = (reply::position(position), reply::number(queued))
            else {
                continue;
            };
            let sum = reply::counters(sum);
            let expired = position.spans.saturating_sub(summed(&sum));
            if expired > 0 {
                error!(
                    "dropped spans={expired} shard={} reason=expired: their journals are gone (check redis.redis_ttl and the server's history)",
                    bucket.shard
                );
                // Only this flusher counts them, so the whole amount is written: to do it twice is harmless.
                let amount = counter(&sum, EXPIRED) + expired;
                let counted = ask(
                    client,
                    beat,
                    "count expired spans",
                    vec![Command::set_in_sum(bucket, EXPIRED, amount)],
                )?;
                for refusal in counted.into_iter().filter_map(Result::err) {
                    error!("count expired spans shard={}: {refusal}", bucket.shard);
                }
                if let Some(ledger) = ledgers.get(&bucket.shard) {
                    ledger.dropped(expired);
                }
            }
        }
        Ok(())
    }
}

/// What one counter of a sum stands at.
fn counter(sum: &[(String, u64)], name: &str) -> u64 {
    sum.iter()
        .find(|(known, _)| known == name)
        .map_or(0, |(_, amount)| *amount)
}

/// The spans of a sum: what became of those that were inserted.
fn summed(sum: &[(String, u64)]) -> u64 {
    let counts =
        |name: &str| name == "produced" || name == "repeats" || name.starts_with("dropped:");
    sum.iter()
        .filter(|(name, _)| counts(name))
        .map(|(_, amount)| amount)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_holds_what_became_of_inserted_spans_only() {
        let sum = [
            ("produced", 5),
            ("repeats", 2),
            ("dropped:corrupt", 1),
            ("dropped:expired", 1),
            ("offset_out_of_range", 100),
        ];
        assert_eq!(
            summed(&sum.map(|(name, amount)| (name.to_owned(), amount))),
            9
        );
    }
}
