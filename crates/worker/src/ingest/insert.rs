//! Writes the entries of a batch into Redis, and then the positions that make them exist.
//!
//! In:     `Encoded`: a batch as entries, its refused messages settled.
//! Out:    `Inserted`: the parts that are wholly in, with their offsets; the shards that have to be read again.
//! Keeps:  positions are written after every reply of trip 1 was good; until then nothing of the batch exists for a flusher.
//! Knows:  the store's write side. No Kafka.
//! Source: docs/store.md 2, 6.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    time::Duration,
};

use log::{error, warn};
use shared::{
    board::Phase,
    config::{Buffer, Redis},
    shard::ShardId,
    time::UnixMillis,
};
use store::{
    client::{Client, Command, CommandError, Refusal, Reply, Seat, Value, reply},
    keys::{Bucket, Buckets, Member},
    scripts::{PositionCall, PositionReply},
};

use super::{
    batch::Positions,
    dlq::Settled,
    encode::{Encoded, Writing},
    journal::{JournalWrite, UNCOUNTED_MAX},
    trip::Trip,
};
use crate::{
    Ended,
    ask::{ask, insist},
    beat::{Beat, Reason},
};

/// What is wholly in Redis, positions included. Behind it alone offsets are committed and clocks move on; it is made here only.
#[derive(Debug)]
pub struct Inserted {
    parts: Vec<Writing>,
    rewind: Vec<ShardId>,
}

impl Inserted {
    /// The parts that are wholly in.
    #[must_use]
    pub fn parts(&self) -> &[Writing] {
        &self.parts
    }

    /// For each shard that is wholly in, the offset behind its part.
    pub fn offsets(&self) -> impl Iterator<Item = (ShardId, u64)> {
        self.parts.iter().map(|part| (part.shard, part.next))
    }

    /// Shards that have to be read again: this batch, or what was met before it, found another position.
    #[must_use]
    pub fn rewind(&self) -> &[ShardId] {
        &self.rewind
    }
}

/// The counter of messages that Kafka had deleted before they were read.
const MISSING: &str = "offset_out_of_range";

/// A position that another program wrote, or damaged.
#[derive(Debug, thiserror::Error)]
#[error("read position shard={} bucket={}: it is no position (what else writes to this redis? mend or delete its key)", bucket.shard, bucket.bucket)]
pub struct UnreadablePosition {
    bucket: Bucket,
}

impl crate::Refusal for UnreadablePosition {}

/// The write side of the store.
#[derive(Debug)]
pub struct Store {
    client: Client,
    instance: String,
    ttl: Duration,
    buffer: Buffer,
    /// The positions as this process wrote or adopted them last.
    written: Positions,
    /// Shards that have to be read again, as a batch before or the watch met another position: nothing of them is written before their
    /// positions are adopted.
    read_again: HashSet<ShardId>,
}

impl Store {
    /// Takes a client whose server was checked, and the store's instance id.
    #[must_use]
    pub fn new(client: Client, instance: String, redis: &Redis, buffer: &Buffer) -> Self {
        Self {
            client,
            instance,
            ttl: redis.redis_ttl,
            buffer: buffer.clone(),
            written: Positions::new(),
            read_again: HashSet::new(),
        }
    }

    /// The positions as they were written or adopted last.
    #[must_use]
    pub fn positions(&self) -> &Positions {
        &self.written
    }

    /// How the store is cut into buckets.
    #[must_use]
    pub fn buckets(&self) -> Buckets {
        self.client.buckets()
    }

    /// Reads the positions of a shard's buckets and takes them for its own; gives each offset, and the lowest clock.
    ///
    /// # Errors
    /// [`Ended::Stopped`].
    pub fn adopt(
        &mut self,
        shard: ShardId,
        beat: &mut Beat,
    ) -> Result<(Vec<Option<u64>>, Option<UnixMillis>), Ended> {
        let buckets: Vec<Bucket> = self.buckets_of(shard).collect();
        let commands: Vec<Command> = buckets
            .iter()
            .map(|&bucket| Command::whole_position(bucket))
            .collect();
        let (mut offsets, mut clock) = (Vec::new(), None);
        for (bucket, value) in
            buckets
                .into_iter()
                .zip(insist(&mut self.client, beat, "read positions", &commands)?)
        {
            let position = reply::position(&value);
            if position.is_none() && value != Value::Array(Vec::new()) {
                return Err(UnreadablePosition { bucket }.into());
            }
            match &position {
                Some(position) => {
                    self.written.insert(bucket, position.next);
                    clock = Some(clock.map_or(position.clock, |clock: UnixMillis| {
                        clock.min(position.clock)
                    }));
                }
                None => {
                    self.written.remove(&bucket);
                }
            }
            offsets.push(position.map(|position| position.next));
        }
        // From here on the shard is written again.
        self.read_again.remove(&shard);
        Ok((offsets, clock))
    }

    /// Moves a shard's positions on to an offset: Kafka has deleted what came before it, `missing` messages. Counted in the same
    /// step, so once.
    ///
    /// # Errors
    /// [`Ended::Stopped`].
    pub fn skip_to(
        &mut self,
        shard: ShardId,
        offset: u64,
        missing: u64,
        clock: Option<UnixMillis>,
        beat: &mut Beat,
    ) -> Result<(), Ended> {
        let behind = |bucket: &Bucket| {
            self.written
                .get(bucket)
                .is_none_or(|&written| written < offset)
        };
        let buckets = self.buckets_of(shard).filter(behind);
        let steps: Vec<Step> = buckets
            .map(|bucket| Step {
                bucket,
                before: self.written.get(&bucket).copied(),
                next: offset,
                clock: clock.unwrap_or_default(),
                spans: 0,
                counts: if bucket == self.buckets().first(shard) {
                    vec![(MISSING, missing)]
                } else {
                    Vec::new()
                },
            })
            .collect();
        let commands: Vec<Command> = steps
            .iter()
            .map(|step| step.command(&self.instance, self.ttl))
            .collect();
        for (step, value) in steps.iter().zip(insist(
            &mut self.client,
            beat,
            "skip missing messages",
            &commands,
        )?) {
            // Another position stands: whoever wrote it is seen at the next batch.
            self.stepped(step, Ok(value));
        }
        Ok(())
    }

    /// Reads the positions of these shards; gives those that have to be read again.
    ///
    /// # Errors
    /// [`Ended::Stopped`].
    pub fn watch(&mut self, shards: &[ShardId], beat: &mut Beat) -> Result<Vec<ShardId>, Ended> {
        let buckets: Vec<Bucket> = shards
            .iter()
            .flat_map(|&shard| self.buckets_of(shard))
            .collect();
        let commands: Vec<Command> = buckets
            .iter()
            .map(|&bucket| Command::position(bucket))
            .collect();
        let values = insist(&mut self.client, beat, "read positions", &commands)?;
        let stands = values.iter().map(reply::offset);
        let changed = self.changed(buckets.into_iter().zip(stands));
        self.read_again.extend(&changed);
        Ok(changed)
    }

    /// The lowest score in the queues of each of these shards; none where nothing is queued.
    ///
    /// # Errors
    /// [`Ended::Stopped`].
    pub fn lowest_scores(
        &mut self,
        shards: &[ShardId],
        beat: &mut Beat,
    ) -> Result<Vec<Option<UnixMillis>>, Ended> {
        let buckets: Vec<Bucket> = shards
            .iter()
            .flat_map(|&shard| self.buckets_of(shard))
            .collect();
        let commands: Vec<Command> = buckets
            .iter()
            .map(|&bucket| Command::first_queued(bucket))
            .collect();
        let values = insist(&mut self.client, beat, "read lowest scores", &commands)?;
        let lowest = |shard: &ShardId| {
            let of_shard = buckets
                .iter()
                .zip(&values)
                .filter(|(bucket, _)| bucket.shard == *shard);
            of_shard
                .filter_map(|(_, value)| reply::scored(value).first().map(|&(_, score)| score))
                .min()
        };
        Ok(shards.iter().map(lowest).collect())
    }

    /// Renews the TTLs of queue, position and sum of these shards.
    ///
    /// # Errors
    /// [`Ended::Stopped`].
    pub fn renew(&mut self, shards: &[ShardId], beat: &mut Beat) -> Result<(), Ended> {
        let ttl = self.ttl;
        let buckets = shards.iter().flat_map(|&shard| self.buckets_of(shard));
        let commands = buckets
            .flat_map(|bucket| Command::renew(bucket, ttl))
            .collect();
        for refusal in ask(&mut self.client, beat, "renew ttl", commands)?
            .into_iter()
            .filter_map(Result::err)
        {
            warn!("renew ttl: {refusal}");
        }
        Ok(())
    }

    /// Inserts a batch: entries and queues, then positions. A part is left out whose shard has to be read again: it would come to stand
    /// over what is missing before it.
    ///
    /// # Errors
    /// [`Ended::Stopped`] when the supervisor asked for it before all was in: nothing of the batch may be committed then.
    pub fn insert(&mut self, batch: Encoded, beat: &mut Beat) -> Result<Inserted, Ended> {
        let Encoded {
            mut parts,
            mut journals,
            settled,
        } = batch;
        beat.phase(Phase::Redis);
        let left_out = parts.extract_if(.., |part| self.read_again.contains(&part.shard));
        let mut rewind: Vec<ShardId> = left_out.map(|part| part.shard).collect();
        rewind.extend(self.first_positions(&parts, beat)?);
        let shards = parts.iter().map(|part| part.shard);
        let mut open: HashSet<Bucket> = shards.flat_map(|shard| self.buckets_of(shard)).collect();
        loop {
            open.retain(|bucket| !rewind.contains(&bucket.shard));
            journals.retain(|journal| open.contains(&journal.bucket));
            let seats = self.trip_one(&open, &mut journals, &mut rewind, beat)?;
            let early = self.ask_early_looks(&journals);
            beat.progress();
            let Left { buckets, error } =
                self.trip_two(&parts, &seats, &journals, &settled, &mut rewind, beat)?;
            if buckets.is_empty() {
                break;
            }
            match error.or(early) {
                Some(error) => beat.failed(Reason::Redis, "insert batch", &error)?,
                None => beat.go_on()?,
            }
            // Behind a new connection may be a server that never had the entries: its positions say so, and what that node was
            // to get begins again. What lies below a position that was written and stands exists: it may be flushed, and is
            // not written again.
            rewind.extend(self.confirm(&parts, &buckets, beat)?);
            open = buckets.into_iter().collect();
            open.retain(|bucket| self.written.get(bucket) < next_of(&parts, bucket.shard).as_ref());
        }
        rewind.sort_unstable();
        rewind.dedup();
        self.read_again.extend(&rewind);
        parts.retain(|part| !rewind.contains(&part.shard));
        Ok(Inserted { parts, rewind })
    }

    /// A bucket gets its first position before its first entry: without one, nothing in it exists.
    fn first_positions(
        &mut self,
        parts: &[Writing],
        beat: &mut Beat,
    ) -> Result<Vec<ShardId>, Ended> {
        let mut steps = Vec::new();
        for part in parts {
            for bucket in self
                .buckets_of(part.shard)
                .filter(|bucket| !self.written.contains_key(bucket))
            {
                steps.push(Step {
                    bucket,
                    before: None,
                    next: part.first,
                    clock: part.now,
                    spans: 0,
                    counts: Vec::new(),
                });
            }
        }
        let commands = steps
            .iter()
            .map(|step| step.command(&self.instance, self.ttl))
            .collect();
        let answers = ask(&mut self.client, beat, "write first positions", commands)?;
        Ok(steps
            .iter()
            .zip(answers)
            .filter_map(|(step, answer)| self.stepped(step, answer))
            .collect())
    }

    /// Trip 1: positions are read, entries and queues written; gives the seat that took all of each bucket. A bucket whose seat
    /// changed meanwhile begins again: another node, or another life of the same, may lack what was acknowledged.
    fn trip_one(
        &mut self,
        open: &HashSet<Bucket>,
        journals: &mut [JournalWrite],
        rewind: &mut Vec<ShardId>,
        beat: &mut Beat,
    ) -> Result<BTreeMap<Bucket, Seat>, Ended> {
        let attempt = format!("insert batch journals={}", journals.len());
        let mut trip = Trip::new(open.iter().copied(), journals);
        loop {
            let before = self.seats(open);
            let (places, commands): (Vec<_>, Vec<_>) = trip.left(self.ttl).into_iter().unzip();
            if commands.is_empty() {
                beat.worked(Reason::Redis);
                let positions = trip.positions();
                rewind.extend(self.changed(positions.into_iter()));
                return Ok(before);
            }
            let error = trip.take(&places, self.client.run(&commands));
            let moved = before
                .iter()
                .filter(|&(&bucket, &seat)| self.client.seat(bucket) != seat);
            trip.begin_again(&moved.map(|(&bucket, _)| bucket).collect());
            match error {
                Some(error) => beat.failed(Reason::Redis, &attempt, &error)?,
                // What is all there is taken in, whoever stops meanwhile.
                None if !trip.is_whole() => beat.go_on()?,
                None => {}
            }
        }
    }

    fn seats(&self, buckets: &HashSet<Bucket>) -> BTreeMap<Bucket, Seat> {
        buckets
            .iter()
            .map(|&bucket| (bucket, self.client.seat(bucket)))
            .collect()
    }

    /// A trace that was seen to pass a multiple of a limit is looked at now, not at its deadline (docs/spec.md 4.5).
    /// Gives a lost connection: the seats of its buckets have changed.
    fn ask_early_looks(&mut self, journals: &[JournalWrite]) -> Option<CommandError> {
        let limits = [self.buffer.max_segment_bytes, self.buffer.max_trace_bytes];
        let mut early: BTreeMap<Bucket, Vec<(Member, UnixMillis)>> = BTreeMap::new();
        for journal in journals {
            let long = journal.entries.is_some_and(|entries| {
                let uncounted = journal.added().max(UNCOUNTED_MAX);
                passes(entries, uncounted, self.buffer.max_trace_entries)
            });
            let large = journal.memory.is_some_and(|memory| {
                limits
                    .iter()
                    .any(|&limit| passes(memory, journal.bytes, limit))
            });
            if long || large {
                early
                    .entry(journal.bucket)
                    .or_default()
                    .push((journal.member.clone(), journal.now));
            }
        }
        let commands: Vec<Command> = early
            .iter()
            .map(|(&bucket, members)| Command::enqueue(bucket, members))
            .collect();
        let mut lost = None;
        for refusal in self
            .client
            .run(&commands)
            .into_iter()
            .filter_map(Result::err)
        {
            // The trace is in its queue already: it is looked at in its time.
            if refusal.is_lost() {
                lost = Some(refusal);
            } else {
                warn!("ask for early looks: {refusal}");
            }
        }
        lost
    }

    /// Trip 2: the positions of all buckets of these shards; from here on the entries exist. Gives the buckets that have to begin
    /// again: those whose seat is not the one that took their trip 1, or was lost before it answered.
    fn trip_two(
        &mut self,
        parts: &[Writing],
        seats: &BTreeMap<Bucket, Seat>,
        journals: &[JournalWrite],
        settled: &Settled,
        rewind: &mut Vec<ShardId>,
        beat: &mut Beat,
    ) -> Result<Left, Ended> {
        let mut spans: HashMap<Bucket, u64> = HashMap::new();
        for journal in journals {
            *spans.entry(journal.bucket).or_default() += journal.spans;
        }
        let mut steps = Vec::new();
        for part in parts.iter().filter(|part| !rewind.contains(&part.shard)) {
            for bucket in self
                .buckets_of(part.shard)
                .filter(|bucket| seats.contains_key(bucket))
            {
                // A bucket may be ahead of the others of its shard; its position never goes back here.
                let before = self.written.get(&bucket).copied();
                let next = before.map_or(part.next, |written| written.max(part.next));
                // A shard's first bucket counts for the shard.
                let counts = if bucket == self.buckets().first(part.shard) {
                    settled.counts(part.shard, before.unwrap_or(0))
                } else {
                    Vec::new()
                };
                steps.push(Step {
                    bucket,
                    before,
                    next,
                    clock: part.now,
                    spans: spans.get(&bucket).copied().unwrap_or(0),
                    counts,
                });
            }
        }
        let mut lost = Left::default();
        while !steps.is_empty() {
            let sits =
                |step: &Step| seats.get(&step.bucket) == Some(&self.client.seat(step.bucket));
            let (sitting, moved): (Vec<Step>, Vec<Step>) = steps.into_iter().partition(sits);
            lost.buckets.extend(moved.iter().map(|step| step.bucket));
            let commands: Vec<Command> = sitting
                .iter()
                .map(|step| step.command(&self.instance, self.ttl))
                .collect();
            let replies = self.client.run(&commands);
            let (mut left, mut refused) = (Vec::new(), None);
            for (step, reply) in sitting.into_iter().zip(replies) {
                match reply {
                    Err(error) if error.is_lost() || error.is_refused_as(Refusal::Moved) => {
                        lost.buckets.push(step.bucket);
                        lost.error = Some(error);
                    }
                    Err(error) if error.is_outage() => {
                        left.push(step);
                        refused = Some(error);
                    }
                    reply => rewind.extend(self.stepped(&step, reply)),
                }
            }
            if let Some(error) = refused {
                beat.failed(Reason::Redis, "write positions", &error)?;
            }
            steps = left;
        }
        Ok(lost)
    }

    /// Reads positions after a lost connection: one that stands where this batch takes it was written, and not answered. Gives
    /// the shards that have to be read again.
    fn confirm(
        &mut self,
        parts: &[Writing],
        buckets: &[Bucket],
        beat: &mut Beat,
    ) -> Result<Vec<ShardId>, Ended> {
        let commands: Vec<Command> = buckets
            .iter()
            .map(|&bucket| Command::position(bucket))
            .collect();
        let values = insist(&mut self.client, beat, "read positions", &commands)?;
        let mut stands = Vec::with_capacity(buckets.len());
        for (&bucket, value) in buckets.iter().zip(&values) {
            let position = reply::offset(value);
            if let Some(next) = next_of(parts, bucket.shard)
                && position == Some(next)
            {
                self.written.insert(bucket, next);
            }
            stands.push((bucket, position));
        }
        Ok(self.changed(stands.into_iter()))
    }

    /// Notes what became of a step; gives its shard when that has to be read again.
    fn stepped(&mut self, step: &Step, reply: Reply) -> Option<ShardId> {
        match reply.map(|value| PositionReply::read(&value)) {
            Ok(Ok(PositionReply::Written)) => {}
            // A step that was carried out but not answered finds its own value when it is repeated.
            Ok(Ok(PositionReply::Stands(Some(stands)))) if stands == step.next => {}
            Ok(Ok(PositionReply::Stands(stands))) => {
                error!(
                    "write position {step}: another one stands={stands:?} (did its node go back, or is there a second writer?)"
                );
                return Some(step.bucket.shard);
            }
            Ok(Err(wrong)) => {
                error!("write position {step}: {wrong}");
                return Some(step.bucket.shard);
            }
            Err(refusal) => {
                error!("write position {step}: {refusal}");
                return Some(step.bucket.shard);
            }
        }
        self.written.insert(step.bucket, step.next);
        None
    }

    /// The shards with a bucket whose position is not what this process wrote last.
    fn changed(&self, positions: impl Iterator<Item = (Bucket, Option<u64>)>) -> Vec<ShardId> {
        let mut changed = Vec::new();
        for (bucket, stands) in positions {
            let written = self.written.get(&bucket).copied();
            if stands != written && !changed.contains(&bucket.shard) {
                error!(
                    "position shard={} stands={} written={}: its node went back, or there is a second writer (the shard is read again)",
                    bucket.shard,
                    shown(stands),
                    shown(written)
                );
                changed.push(bucket.shard);
            }
        }
        changed
    }

    fn buckets_of(&self, shard: ShardId) -> impl Iterator<Item = Bucket> + use<> {
        self.buckets().of_shard(shard)
    }
}

/// Buckets that have to begin again, and what one of them met.
#[derive(Debug, Default)]
struct Left {
    buckets: Vec<Bucket>,
    error: Option<CommandError>,
}

/// The offset behind a shard's part of the batch.
fn next_of(parts: &[Writing], shard: ShardId) -> Option<u64> {
    let part = parts.iter().find(|part| part.shard == shard);
    part.map(|part| part.next)
}

/// One bucket's position on its way.
#[derive(Debug)]
struct Step {
    bucket: Bucket,
    before: Option<u64>,
    next: u64,
    clock: UnixMillis,
    spans: u64,
    counts: Vec<(&'static str, u64)>,
}

impl Step {
    fn command(&self, instance: &str, ttl: Duration) -> Command {
        let &Self {
            bucket,
            before,
            next,
            clock,
            spans,
            ref counts,
        } = self;
        PositionCall {
            bucket,
            before,
            next,
            clock,
            spans,
            instance,
            ttl,
            counts,
        }
        .command()
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "shard={} before={:?} next={}",
            self.bucket.shard, self.before, self.next
        )
    }
}

/// A position, where there is one.
fn shown(position: Option<u64>) -> String {
    position.map_or_else(|| "none".into(), |position| position.to_string())
}

/// Whether a size, grown by `added` to `after`, has passed a multiple of `limit`.
fn passes(after: u64, added: u64, limit: u64) -> bool {
    limit > 0 && after / limit > after.saturating_sub(added) / limit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_multiple_is_passed_once() {
        assert!(!passes(9, 9, 10));
        assert!(passes(10, 1, 10));
        assert!(!passes(11, 1, 10));
        assert!(passes(20, 1, 10));
        assert!(!passes(100, 100, 0));
    }
}
