//! Puts traces off for which nothing can be done now.
//!
//! In:     traces that were read, and traces whose look failed.
//! Out:    those that failed too often in a row; their scores, lifted far up.
//! Keeps:  a bounded number of failing traces is remembered; each that is put off is said.
//! Knows:  the queue. Not why a look failed.
//! Source: docs/store.md 3; docs/spec.md 5.1.

use std::{collections::HashMap, time::Duration};

use log::error;
use store::{
    client::Client,
    keys::{Bucket, Member},
    scripts::{QueueCall, QueueMode},
};

use super::due::{Due, by_bucket};
use crate::{Ended, ask::ask, beat::Beat};

/// How many looks may fail before a trace is put off, and for how long it is.
const LOOKS_MAX: u32 = 3;
const PUT_OFF: Duration = Duration::from_secs(600);
/// The most failing traces that are remembered; beyond it counting begins anew.
const FAILURES_MAX: usize = 10_000;

/// Traces whose look failed, and how often in a row.
#[derive(Debug, Default)]
pub struct Failures(HashMap<(Bucket, Member), u32>);

impl Failures {
    /// Forgets the traces that were read, and counts those whose look failed; gives those of them that are to be put off.
    pub fn count(&mut self, read: &[Due], failed: Vec<Due>) -> Vec<Due> {
        if self.0.is_empty() && failed.is_empty() {
            return Vec::new();
        }
        for due in read {
            self.0.remove(&key(due));
        }
        let mut put_off = failed;
        put_off.retain(|due| self.add(due));
        put_off
    }

    fn add(&mut self, due: &Due) -> bool {
        if self.0.len() >= FAILURES_MAX {
            self.0.clear();
        }
        let count = self.0.entry(key(due)).or_default();
        *count += 1;
        let put_off = *count >= LOOKS_MAX;
        if put_off {
            self.0.remove(&key(due));
        }
        put_off
    }
}

fn key(due: &Due) -> (Bucket, Member) {
    (due.bucket, due.member.clone())
}

/// Lifts the scores of traces far up: nothing can be done for them now.
///
/// # Errors
/// [`Ended::Stopped`].
pub fn put_off_all(
    client: &mut Client,
    beat: &mut Beat,
    traces: Vec<Due>,
    ttl: Duration,
) -> Result<(), Ended> {
    let mut commands = Vec::new();
    for group in by_bucket(traces, |due| due.bucket) {
        for due in &group {
            error!(
                "trace shard={} member={} is put off by {}s",
                due.bucket.shard,
                due.member,
                PUT_OFF.as_secs()
            );
        }
        let Some(bucket) = group.first().map(|first| first.bucket) else {
            continue;
        };
        let members = group
            .into_iter()
            .map(|due| (due.member, due.now.after(PUT_OFF)))
            .collect();
        commands.push(
            QueueCall {
                bucket,
                ttl,
                mode: QueueMode::Lift,
                members,
            }
            .command(),
        );
    }
    for refusal in ask(client, beat, "put traces off", commands)?
        .into_iter()
        .filter_map(Result::err)
    {
        error!("put traces off: {refusal}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use shared::{
        ids::{ProjectId, TraceId},
        shard::{BucketId, ShardId},
        time::UnixMillis,
    };

    use super::*;

    fn due(number: u64) -> Due {
        Due {
            bucket: Bucket {
                slice: None,
                shard: ShardId(0),
                bucket: BucketId(0),
            },
            member: Member::new(ProjectId(number), &TraceId::new(b"t")),
            score: UnixMillis(number),
            now: UnixMillis(1_000),
        }
    }

    #[test]
    fn a_trace_is_put_off_after_three_failures_in_a_row() {
        let mut failures = Failures::default();
        let mut look = |failed: &[u64]| -> Vec<u64> {
            let read = (1..=2).filter(|number| !failed.contains(number));
            let read: Vec<Due> = read.map(due).collect();
            let failed = failed.iter().map(|&number| due(number)).collect();
            let put_off = failures.count(&read, failed);
            put_off.into_iter().map(|due| due.score.0).collect()
        };
        assert!(look(&[1, 2]).is_empty());
        assert!(look(&[1]).is_empty(), "the other one was read");
        assert_eq!(look(&[1, 2]), [1]);
        assert!(look(&[1, 2]).is_empty(), "it begins anew");
        assert_eq!(look(&[2]), [2]);
    }
}
