//! Trip 1 of an insert: what is sent to Redis, what has a good reply, what has to be sent again.
//!
//! In:     the journals of a batch, encoded; replies, in the order of the commands.
//! Out:    the commands that are left; at the end the positions that stood at the head of the connection.
//! Keeps:  a `ZADD` is sent again after any `HSET` of its bucket that was; a bucket that begins again does so at `HGET`.
//! Knows:  commands and replies. No connection, no waiting.
//! Source: docs/store.md 2.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use shared::time::UnixMillis;
use store::{
    client::{Command, CommandError, Reply, Value, reply},
    keys::{Bucket, Member},
};

use super::journal::JournalWrite;

/// The state of trip 1.
#[derive(Debug)]
pub struct Trip<'j> {
    heads: Vec<(Bucket, Option<Value>)>,
    journals: &'j mut [JournalWrite],
    queued: BTreeMap<Bucket, bool>,
    /// Buckets with a write that failed in this attempt.
    undone: HashSet<Bucket>,
}

/// What a command of the trip is for.
#[derive(Debug, Clone, Copy)]
pub enum Place {
    /// The position at the head of a connection.
    Head(usize),
    /// A journal's entries.
    Write(usize),
    /// A journal's TTL.
    Expire(usize),
    /// The number of a journal's entries.
    Entries(usize),
    /// A journal's bytes in Redis.
    Memory(usize),
    /// The scores of a bucket's journals.
    Queue(Bucket),
}

impl<'j> Trip<'j> {
    /// A trip that has sent nothing; what a trip before it sent is sent again.
    pub fn new(
        buckets: impl IntoIterator<Item = Bucket>,
        journals: &'j mut [JournalWrite],
    ) -> Self {
        for journal in &mut *journals {
            journal.done = false;
        }
        let queued = journals
            .iter()
            .map(|journal| (journal.bucket, false))
            .collect();
        Self {
            heads: buckets.into_iter().map(|bucket| (bucket, None)).collect(),
            journals,
            queued,
            undone: HashSet::new(),
        }
    }

    /// What has no good reply yet, in the order in which it has to be sent.
    #[must_use]
    pub fn left(&self, ttl: Duration) -> Vec<(Place, Command)> {
        let mut left = Vec::new();
        for (index, (bucket, _)) in self
            .heads
            .iter()
            .enumerate()
            .filter(|(_, (_, head))| head.is_none())
        {
            left.push((Place::Head(index), Command::position(*bucket)));
        }
        for (index, journal) in self
            .journals
            .iter()
            .enumerate()
            .filter(|(_, journal)| !journal.done)
        {
            left.push((
                Place::Write(index),
                Command::insert(journal.bucket, &journal.member, &journal.fields),
            ));
            left.push((
                Place::Expire(index),
                Command::expire_journal(journal.bucket, &journal.member, ttl),
            ));
            if journal.is_counted {
                left.push((
                    Place::Entries(index),
                    Command::entries(journal.bucket, &journal.member),
                ));
            }
            if journal.is_weighed() {
                left.push((
                    Place::Memory(index),
                    Command::memory(journal.bucket, &journal.member),
                ));
            }
        }
        let mut members: BTreeMap<Bucket, Vec<(&Member, UnixMillis)>> = BTreeMap::new();
        for journal in self.journals.iter() {
            if self.queued.get(&journal.bucket) == Some(&false) {
                members
                    .entry(journal.bucket)
                    .or_default()
                    .push((&journal.member, journal.score));
            }
        }
        for (bucket, members) in members {
            left.push((Place::Queue(bucket), Command::enqueue(bucket, &members)));
        }
        left
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let heads = self.heads.iter().all(|(_, head)| head.is_some());
        heads
            && self.queued.values().all(|&queued| queued)
            && self.journals.iter().all(|journal| journal.done)
    }

    /// Takes the replies to what was left; gives the first error among them.
    pub fn take(&mut self, places: &[Place], replies: Vec<Reply>) -> Option<CommandError> {
        for place in places {
            if let Place::Write(index) = *place {
                self.journals[index].done = true;
            }
        }
        self.undone.clear();
        let mut first = None;
        for (&place, reply) in places.iter().zip(replies) {
            match reply {
                Ok(value) => self.good(place, value),
                // Sizes are hints: a server that never tells them keeps no entry out.
                Err(error)
                    if matches!(place, Place::Entries(_) | Place::Memory(_))
                        && !error.is_outage() => {}
                Err(error) => {
                    self.bad(place);
                    first.get_or_insert(error);
                }
            }
        }
        first
    }

    /// Lets go of every reply of these buckets: the connection that gave them is gone, and what it had written may be.
    pub fn begin_again(&mut self, buckets: &HashSet<Bucket>) {
        if buckets.is_empty() {
            return;
        }
        for (bucket, head) in &mut self.heads {
            if buckets.contains(bucket) {
                *head = None;
            }
        }
        for journal in &mut *self.journals {
            journal.done &= !buckets.contains(&journal.bucket);
        }
        for (bucket, queued) in &mut self.queued {
            *queued &= !buckets.contains(bucket);
        }
    }

    /// The positions that stood at the head of the connection.
    #[must_use]
    pub fn positions(&self) -> Vec<(Bucket, Option<u64>)> {
        self.heads
            .iter()
            .map(|(bucket, head)| (*bucket, head.as_ref().and_then(reply::offset)))
            .collect()
    }

    fn good(&mut self, place: Place, value: Value) {
        match place {
            Place::Head(index) => self.heads[index].1 = Some(value),
            Place::Entries(index) => self.journals[index].entries = Some(reply::count(&value)),
            Place::Memory(index) => self.journals[index].memory = Some(reply::count(&value)),
            Place::Write(_) | Place::Expire(_) => {}
            // Commands are answered in order: whether all writes of this bucket were good is known by now.
            Place::Queue(bucket) => {
                self.queued.insert(bucket, !self.undone.contains(&bucket));
            }
        }
    }

    fn bad(&mut self, place: Place) {
        match place {
            Place::Write(index)
            | Place::Expire(index)
            | Place::Entries(index)
            | Place::Memory(index) => {
                let journal = &mut self.journals[index];
                journal.done = false;
                self.queued.insert(journal.bucket, false);
                self.undone.insert(journal.bucket);
            }
            Place::Head(_) | Place::Queue(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use shared::{
        ids::{ProjectId, TraceId},
        shard::ShardId,
    };
    use store::{client::Refusal, keys::Buckets};

    use super::*;

    const TTL: Duration = Duration::from_secs(60);

    fn buckets() -> Vec<Bucket> {
        Buckets::new(None, 2).of_shard(ShardId(0)).collect()
    }

    /// One journal in each bucket.
    fn journals() -> Vec<JournalWrite> {
        let journal = |bucket: Bucket| {
            let member = Member::new(ProjectId(1), &TraceId::new(b"t"));
            JournalWrite::new(bucket, member, UnixMillis(1))
        };
        buckets().into_iter().map(journal).collect()
    }

    /// What is left, as letters with the bucket's number.
    fn left(trip: &Trip<'_>) -> (Vec<Place>, String) {
        let places: Vec<Place> = trip.left(TTL).into_iter().map(|(place, _)| place).collect();
        let letters = places.iter().map(|place| match place {
            Place::Head(bucket) => format!("h{bucket}"),
            Place::Write(journal) => format!("w{journal}"),
            Place::Expire(journal) => format!("e{journal}"),
            Place::Entries(journal) => format!("n{journal}"),
            Place::Memory(journal) => format!("m{journal}"),
            Place::Queue(bucket) => format!("q{}", bucket.bucket),
        });
        let letters = letters.collect::<Vec<_>>().join(" ");
        (places, letters)
    }

    fn refused() -> Reply {
        Err(CommandError::Refused {
            address: String::new(),
            command: String::new(),
            kind: Refusal::Moved,
            message: String::new(),
        })
    }

    #[test]
    fn a_queue_is_written_again_after_a_write_that_was_refused() {
        let mut journals = journals();
        journals[0].is_counted = true;
        let mut trip = Trip::new(buckets(), &mut journals);
        let (places, letters) = left(&trip);
        assert_eq!(letters, "h0 h1 w0 e0 n0 w1 e1 q0 q1");
        let replies = |bad: &[usize], all: usize| -> Vec<Reply> {
            (0..all)
                .map(|place| match bad.contains(&place) {
                    true => refused(),
                    false => Ok(Value::Int(1)),
                })
                .collect()
        };
        // The second journal's write is refused, and its queue is written all the same.
        assert!(trip.take(&places, replies(&[5], 9)).is_some());
        let (places, letters) = left(&trip);
        assert_eq!(letters, "w1 e1 q1");
        assert!(trip.take(&places, replies(&[], 3)).is_none());
        assert_eq!(left(&trip).1, "");
    }

    #[test]
    fn a_bucket_that_begins_again_leaves_the_others_alone() {
        let mut journals = journals();
        let mut trip = Trip::new(buckets(), &mut journals);
        let (places, _) = left(&trip);
        let good = places.iter().map(|_| Ok(Value::Int(1))).collect();
        assert!(trip.take(&places, good).is_none());
        trip.begin_again(&[buckets()[1]].into());
        assert_eq!(left(&trip).1, "h1 w1 e1 q1");
    }
}
