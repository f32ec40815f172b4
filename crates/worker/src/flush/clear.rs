//! Removes what was produced from Redis, and queues what stays.
//!
//! In:     `Produced`, and nothing else.
//! Out:    journals without it; sums and the ledger on the board with it.
//! Keeps:  a clear is repeated until it is answered; it names only what `Produced` names.
//! Knows:  the scripts. Not Kafka.
//! Source: docs/store.md 4.

use std::{collections::BTreeMap, time::Duration};

use log::{error, warn};
use shared::{board::Ledger, shard::ShardId};
use store::{
    client::Client,
    keys::Bucket,
    scripts::{ClearCall, ClearReply, FieldOut, QueueCall, QueueMode},
};

use super::{choose::Look, headers::put_off_all, produce::Produced};
use crate::{Ended, ask::ask, beat::Beat};

/// Clears every trace of which something left; lowers the scores of the others to their next look.
///
/// # Errors
/// [`Ended::Stopped`]: what was not cleared then is produced once more, with the same `flush_id`.
pub fn clear(
    client: &mut Client,
    beat: &mut Beat,
    produced: Vec<Produced>,
    ttl: Duration,
    ledgers: &BTreeMap<ShardId, Ledger>,
) -> Result<(), Ended> {
    let (mut clears, mut lowered, mut put_off) =
        (Vec::new(), BTreeMap::<Bucket, Vec<_>>::new(), Vec::new());
    for produced in produced {
        let (Look { due, next_look, .. }, fields, is_put_off) = produced.into_parts();
        match next_look {
            Some(next_look) if fields.is_empty() && !is_put_off => lowered
                .entry(due.bucket)
                .or_default()
                .push((due.member, next_look)),
            _ => {
                if is_put_off {
                    put_off.push(due.clone());
                }
                clears.push(ClearCall {
                    bucket: due.bucket,
                    member: due.member,
                    ttl,
                    next_look: next_look.filter(|_| !is_put_off),
                    fields,
                });
            }
        }
    }
    let mut commands: Vec<_> = clears.iter().map(ClearCall::command).collect();
    commands.extend(lowered.into_iter().map(|(bucket, members)| {
        QueueCall {
            bucket,
            ttl,
            mode: QueueMode::Lower,
            members,
        }
        .command()
    }));
    let mut answers = ask(client, beat, "clear journals", commands)?.into_iter();
    for (call, answer) in clears.iter().zip(answers.by_ref()) {
        match answer.map(|value| ClearReply::read(&value)) {
            Ok(Ok(reply)) => count(call, &reply, ledgers),
            Ok(Err(wrong)) => error!(
                "clear journal shard={} member={}: {wrong}",
                call.bucket.shard, call.member
            ),
            Err(refusal) => error!(
                "clear journal shard={} member={}: {refusal}",
                call.bucket.shard, call.member
            ),
        }
    }
    for refusal in answers.filter_map(Result::err) {
        error!("queue traces: {refusal}");
    }
    put_off_all(client, beat, put_off, ttl)
}

/// Counts on the board what this clear removed. Redis has counted already: its sum is the truth, the board shows it.
fn count(call: &ClearCall, reply: &ClearReply, ledgers: &BTreeMap<ShardId, Ledger>) {
    let asked = u64::try_from(call.fields.len()).unwrap_or(u64::MAX);
    if reply.removed < asked {
        warn!(
            "clear journal shard={} member={}: fields={} of {asked} were gone (another flusher, or an unanswered call before)",
            call.bucket.shard,
            call.member,
            asked - reply.removed
        );
    }
    let Some(ledger) = ledgers
        .get(&call.bucket.shard)
        .filter(|_| reply.removed == asked)
    else {
        return;
    };
    let total = |amount: fn(&FieldOut) -> u64| call.fields.iter().map(amount).sum();
    ledger.produced(total(|out| out.produced));
    ledger.repeats(total(|out| out.repeats));
    ledger.dropped(total(|out| {
        out.dropped.iter().map(|(_, spans)| spans).sum()
    }));
}
