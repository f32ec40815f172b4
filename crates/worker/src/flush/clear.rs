//! Removes what was produced from Redis, and queues what stays.
//!
//! In:     `Produced`, and nothing else.
//! Out:    journals without it; sums and the ledger on the board with it; the traces that were put off.
//! Keeps:  a clear is repeated until it is answered; it names only what `Produced` names.
//! Knows:  the scripts. Not Kafka.
//! Source: docs/store.md 4.

use std::{collections::BTreeMap, time::Duration};

use log::{error, warn};
use shared::{board::Ledger, shard::ShardId};
use store::{
    client::Client,
    keys::Bucket,
    scripts::{ClearCall, ClearReply, ClearTrace, FieldOut, NoJournal, QueueCall, QueueMode},
};

use super::{choose::Look, due::Due, produce::Produced, put_off::put_off_all};
use crate::{Ended, ask::ask, beat::Beat};

/// Traces and fields that one call removes: about a millisecond, in which the server does nothing else.
const CALL_MAX: usize = 500;

/// Clears every trace of which something left; lowers the scores of the others to their next look. Gives the traces that were put off.
///
/// # Errors
/// [`Ended::Stopped`]: what was not cleared then is produced once more, with the same `flush_id`.
pub fn clear(
    client: &mut Client,
    beat: &mut Beat,
    produced: Vec<Produced>,
    ttl: Duration,
    ledgers: &BTreeMap<ShardId, Ledger>,
) -> Result<Vec<Due>, Ended> {
    let (mut clears, mut lowered, mut put_off) = (
        BTreeMap::<Bucket, Vec<_>>::new(),
        BTreeMap::<Bucket, Vec<_>>::new(),
        Vec::new(),
    );
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
                clears.entry(due.bucket).or_default().push(ClearTrace {
                    member: due.member,
                    next_look: next_look.filter(|_| !is_put_off),
                    fields,
                });
            }
        }
    }
    let calls: Vec<ClearCall> = clears
        .into_iter()
        .flat_map(|(bucket, traces)| calls(bucket, ttl, traces))
        .collect();
    let mut commands: Vec<_> = calls.iter().map(ClearCall::command).collect();
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
    for (call, answer) in calls.iter().zip(answers.by_ref()) {
        let (shard, traces) = (call.bucket.shard, call.traces.len());
        match answer.map(|value| ClearReply::read(&value, call)) {
            Ok(Ok(replies)) => take(call, replies, ledgers),
            Ok(Err(wrong)) => error!("clear journals shard={shard} traces={traces}: {wrong}"),
            Err(refusal) => error!("clear journals shard={shard} traces={traces}: {refusal}"),
        }
    }
    for refusal in answers.filter_map(Result::err) {
        error!("queue traces: {refusal}");
    }
    put_off_all(client, beat, put_off.clone(), ttl)?;
    Ok(put_off)
}

/// Cuts what is cleared of one bucket into calls of a bounded size; a larger trace goes alone.
fn calls(bucket: Bucket, ttl: Duration, traces: Vec<ClearTrace>) -> Vec<ClearCall> {
    let (mut calls, mut cost): (Vec<ClearCall>, usize) = (Vec::new(), 0);
    for trace in traces {
        let of_trace = trace.fields.len() + 1;
        cost += of_trace;
        match calls.last_mut() {
            Some(call) if cost <= CALL_MAX => call.traces.push(trace),
            _ => {
                cost = of_trace;
                calls.push(ClearCall {
                    bucket,
                    ttl,
                    traces: vec![trace],
                });
            }
        }
    }
    calls
}

/// Takes what became of each trace of a call.
fn take(
    call: &ClearCall,
    replies: Vec<Result<ClearReply, NoJournal>>,
    ledgers: &BTreeMap<ShardId, Ledger>,
) {
    for (trace, reply) in call.traces.iter().zip(replies) {
        match reply {
            Ok(reply) => count(call.bucket.shard, trace, &reply, ledgers),
            Err(foreign) => error!(
                "clear journal shard={} member={}: {foreign}",
                call.bucket.shard, trace.member
            ),
        }
    }
}

/// Counts on the board what this clear removed. Redis has counted already: its sum is the truth, the board shows it.
fn count(
    shard: ShardId,
    trace: &ClearTrace,
    reply: &ClearReply,
    ledgers: &BTreeMap<ShardId, Ledger>,
) {
    let asked = u64::try_from(trace.fields.len()).unwrap_or(u64::MAX);
    if reply.removed < asked {
        warn!(
            "clear journal shard={shard} member={}: fields={} of {asked} were gone (another flusher, or an unanswered call before)",
            trace.member,
            asked - reply.removed
        );
    }
    let Some(ledger) = ledgers.get(&shard).filter(|_| reply.removed == asked) else {
        return;
    };
    let total = |amount: fn(&FieldOut) -> u64| trace.fields.iter().map(amount).sum();
    ledger.produced(total(|out| out.produced));
    ledger.repeats(total(|out| out.repeats));
    ledger.dropped(total(|out| {
        out.dropped.iter().map(|(_, spans)| spans).sum()
    }));
}

#[cfg(test)]
mod tests {
    use shared::{
        ids::{ProjectId, TraceId},
        shard::BucketId,
    };
    use store::keys::Member;

    use super::*;

    #[test]
    fn calls_hold_every_trace_once_in_order_and_are_bounded() {
        let bucket = Bucket {
            slice: None,
            shard: ShardId(0),
            bucket: BucketId(0),
        };
        let field = FieldOut {
            field: Vec::new(),
            produced: 1,
            repeats: 0,
            dropped: Vec::new(),
        };
        let trace = |(number, fields)| ClearTrace {
            member: Member::new(ProjectId(number), &TraceId::new(b"t")),
            next_look: None,
            fields: vec![field.clone(); fields],
        };
        let sizes = [0, CALL_MAX - 2, 1, CALL_MAX * 3, 0, CALL_MAX - 1, 5, 5];
        let cut = calls(
            bucket,
            Duration::ZERO,
            (0..).zip(sizes).map(trace).collect(),
        );
        let sizes: Vec<Vec<usize>> = cut
            .iter()
            .map(|call| call.traces.iter().map(|trace| trace.fields.len()).collect())
            .collect();
        let expected: [&[usize]; 6] = [
            &[0, CALL_MAX - 2],
            &[1],
            &[CALL_MAX * 3],
            &[0],
            &[CALL_MAX - 1],
            &[5, 5],
        ];
        assert_eq!(sizes, expected);
    }
}
