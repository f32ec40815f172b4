//! Reads from the queues which traces are due.
//!
//! In:     the worker's buckets with their clocks.
//! Out:    `Due` traces, earliest first within each shard, shared fairly over the shards; when the next ones are.
//! Keeps:  at most as many traces as a wave may have segments; a shard whose clock is unknown has nothing due.
//! Knows:  the queue. Not what a journal holds.
//! Source: docs/spec.md 5.1; docs/store.md 3.

use std::collections::VecDeque;

use shared::time::UnixMillis;
use store::{
    client::{Client, Command, reply},
    keys::{Bucket, Member},
};

use crate::{Ended, ask::insist, beat::Beat};

/// Members that are read of all queues together; they are far more than a cycle takes.
const MEMBERS_MAX: usize = 100_000;

/// A trace to look at.
#[derive(Debug, Clone)]
pub struct Due {
    /// The bucket whose queue holds it.
    pub bucket: Bucket,
    /// Its place in the queue.
    pub member: Member,
    /// When it was to be looked at.
    pub score: UnixMillis,
    /// The shard's clock as this cycle sees it.
    pub now: UnixMillis,
}

/// What the queues hold.
#[derive(Debug, Default)]
pub struct Queues {
    /// The traces of this cycle.
    pub due: Vec<Due>,
    /// Whether more are due than one cycle takes.
    pub more: bool,
    /// For each bucket, when its next trace that is not yet due will be.
    pub next: Vec<(Bucket, UnixMillis)>,
    /// Traces in all queues.
    pub depth: u64,
    /// Members that are no trace of ours.
    pub foreign: Vec<(Bucket, Vec<u8>)>,
}

/// Reads the due traces of all buckets, at most `limit` in all.
///
/// # Errors
/// [`Ended::Stopped`].
pub fn read(
    client: &mut Client,
    beat: &mut Beat,
    clocks: &[(Bucket, UnixMillis)],
    limit: usize,
) -> Result<Queues, Ended> {
    // With very many buckets each gives a few at a time, and the next cycle follows at once.
    let of_each = (MEMBERS_MAX / clocks.len().max(1)).clamp(2, limit.saturating_add(1).max(2));
    let commands: Vec<Command> = clocks
        .iter()
        .flat_map(|&(bucket, now)| {
            [
                Command::due(bucket, now, of_each),
                Command::after(bucket, now),
                Command::queue_len(bucket),
            ]
        })
        .collect();
    let replies = insist(client, beat, "read queues", &commands)?;
    let mut queues = Queues::default();
    let mut waiting: Vec<VecDeque<Due>> = Vec::new();
    let mut full = false;
    for (&(bucket, now), replies) in clocks.iter().zip(replies.chunks_exact(3)) {
        let mut traces = VecDeque::new();
        for (member, score) in reply::scored(&replies[0]) {
            match Member::parse(&member) {
                Some(member) => traces.push_back(Due {
                    bucket,
                    member,
                    score,
                    now,
                }),
                None => queues.foreign.push((bucket, member)),
            }
        }
        full |= of_each <= limit && traces.len() >= of_each;
        waiting.push(traces);
        queues.next.extend(
            reply::scored(&replies[1])
                .first()
                .map(|&(_, score)| (bucket, score)),
        );
        queues.depth += reply::count(&replies[2]);
    }
    share(&mut waiting, limit, &mut queues.due);
    queues.more = full || waiting.iter().any(|traces| !traces.is_empty());
    Ok(queues)
}

/// Takes one trace of each bucket in turn, so that what one shard does not use goes to the others.
fn share(waiting: &mut [VecDeque<Due>], limit: usize, due: &mut Vec<Due>) {
    while due.len() < limit {
        let before = due.len();
        for traces in waiting.iter_mut() {
            if due.len() < limit {
                due.extend(traces.pop_front());
            }
        }
        if due.len() == before {
            return;
        }
    }
}

/// Cuts what belongs to traces by their buckets; none is empty.
pub(super) fn by_bucket<T>(mut traces: Vec<T>, bucket_of: impl Fn(&T) -> Bucket) -> Vec<Vec<T>> {
    traces.sort_by_key(&bucket_of);
    let mut groups: Vec<Vec<T>> = Vec::new();
    for trace in traces {
        let bucket = bucket_of(&trace);
        let is_of = |group: &&mut Vec<T>| group.first().map(&bucket_of) == Some(bucket);
        match groups.last_mut().filter(is_of) {
            Some(group) => group.push(trace),
            None => groups.push(vec![trace]),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::{
        ids::{ProjectId, TraceId},
        shard::{BucketId, ShardId},
    };

    fn traces(shard: u32, count: u64) -> VecDeque<Due> {
        let bucket = Bucket {
            slice: None,
            shard: ShardId(shard),
            bucket: BucketId(0),
        };
        let due = |score| Due {
            bucket,
            member: Member::new(ProjectId(score), &TraceId::new(b"t")),
            score: UnixMillis(score),
            now: UnixMillis(1_000),
        };
        (0..count).map(due).collect()
    }

    #[test]
    fn shares_that_are_not_used_go_to_the_others_and_the_earliest_come_first() {
        let mut waiting = vec![traces(0, 1), traces(1, 100), traces(2, 2)];
        let mut due = Vec::new();
        share(&mut waiting, 10, &mut due);
        let of = |shard| {
            due.iter()
                .filter(|due| due.bucket.shard == ShardId(shard))
                .map(|due| due.score.0)
                .collect::<Vec<_>>()
        };
        assert_eq!(of(0), [0]);
        assert_eq!(of(1), [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(of(2), [0, 1]);
        assert_eq!(waiting[1].len(), 93);
    }

    #[test]
    fn fewer_than_the_limit_are_all_taken() {
        let mut waiting = vec![traces(0, 3), traces(1, 0)];
        let mut due = Vec::new();
        share(&mut waiting, 10, &mut due);
        assert_eq!(due.len(), 3);
        assert!(waiting.iter().all(VecDeque::is_empty));
    }
}
