//! Commits the offsets of what is wholly in Redis.
//!
//! In:     `Inserted`; the starts of shards that nobody committed for; floors.
//! Out:    commits of the group, at most twice a second, each with the shard's floor as metadata.
//! Keeps:  contiguous per partition, never past a failed write: a batch follows its predecessor, and only whole ones come here.
//! Knows:  the consumer's commit call. A commit that fails is made up for by the next one: positions lead, commits follow.
//! Source: docs/spec.md 4.3; docs/store.md 2, 6.

use std::{collections::BTreeMap, time::Duration};

use log::warn;
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{CommitMode, Consumer},
    error::KafkaError,
};
use shared::{
    shard::ShardId,
    time::{Clock, MonoNanos},
};

use super::{consume::Input, insert::Inserted, start::floor_metadata};

/// How often offsets go to the broker: a restart begins at positions, so a commit is for others to see and for floors.
const EVERY: Duration = Duration::from_millis(500);

/// How long the answer to the last commit is awaited.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// The offsets that wait to be committed.
#[derive(Debug, Default)]
pub struct Commits {
    waiting: BTreeMap<ShardId, u64>,
    floors: BTreeMap<ShardId, u64>,
    sent: Option<MonoNanos>,
}

impl Commits {
    /// Takes what was inserted.
    pub fn add(&mut self, inserted: &Inserted) {
        self.waiting.extend(inserted.offsets());
    }

    /// Takes a shard's floor: every commit of the shard carries it.
    pub fn set_floor(&mut self, shard: ShardId, floor: u64) {
        self.floors.insert(shard, floor);
    }

    /// Takes an offset that stands already: where a shard begins that nobody committed for, or where it still is.
    pub fn add_start(&mut self, shard: ShardId, offset: u64) {
        self.waiting.entry(shard).or_insert(offset);
    }

    /// Lets go of what waits for a shard that is read again.
    pub fn forget(&mut self, shard: ShardId) {
        self.waiting.remove(&shard);
    }

    /// Sends what waits, when it is time to; the answer comes with a later poll.
    pub fn send_due(&mut self, input: &Input) {
        let now = Clock::mono_now();
        if self.waiting.is_empty() || self.sent.is_some_and(|sent| now.since(sent) < EVERY) {
            return;
        }
        self.sent = Some(now);
        let waiting = std::mem::take(&mut self.waiting);
        if let Err(error) = commit(input, &waiting, &self.floors) {
            warn!(
                "commit offsets topic={} shards={}: {error}",
                input.topic(),
                waiting.len()
            );
            self.keep(waiting);
        }
    }

    /// Sends what waits, and waits a moment for the answer: the end of a worker. A broker that is away keeps nobody: the next
    /// start begins at positions.
    pub fn send_last(&mut self, input: &Input) {
        let waiting = std::mem::take(&mut self.waiting);
        if waiting.is_empty() {
            return;
        }
        match commit(input, &waiting, &self.floors) {
            Ok(()) => input.await_commit(LAST_WAIT),
            Err(error) => warn!(
                "commit last offsets topic={} shards={}: {error} (the next start begins at positions)",
                input.topic(),
                waiting.len()
            ),
        }
    }

    /// What was taken meanwhile is newer.
    fn keep(&mut self, mut failed: BTreeMap<ShardId, u64>) {
        failed.append(&mut self.waiting);
        self.waiting = failed;
    }
}

fn commit(
    input: &Input,
    offsets: &BTreeMap<ShardId, u64>,
    floors: &BTreeMap<ShardId, u64>,
) -> Result<(), KafkaError> {
    let topic = input.topic();
    let mut list = TopicPartitionList::with_capacity(offsets.len());
    for (&shard, &offset) in offsets {
        let partition = i32::try_from(shard.0).unwrap_or(i32::MAX);
        list.add_partition_offset(
            topic,
            partition,
            Offset::Offset(i64::try_from(offset).unwrap_or(i64::MAX)),
        )?;
        if let Some(mut element) = list.find_partition(topic, partition) {
            let floor = floors
                .get(&shard)
                .map_or(offset, |&floor| floor.min(offset));
            element.set_metadata(floor_metadata(floor));
        }
    }
    input.consumer().commit(&list, CommitMode::Async)
}
