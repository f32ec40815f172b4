//! Role `ingest`: spans go from Kafka into Redis.
//!
//! In:     the partitions of its shards.
//! Out:    entries, positions; then commits and clocks.
//! Keeps:  nothing is committed that is not wholly in Redis; a clock moves on only behind acknowledged writes.
//! Knows:  the order of a pass.
//! Source: docs/spec.md 2–4; docs/store.md 2, 6.

use std::{collections::BTreeMap, error::Error, panic::resume_unwind, time::Duration};

use log::{debug, info, warn};
use shared::{
    board::{Board, Phase},
    config::Config,
    launch::Launch,
    shard::{ShardId, ShardList},
    time::{Clock, MonoNanos, UnixMillis},
};
use store::keys::Buckets;

use self::{
    batch::{Batch, Positions},
    begin::{locate, read_from},
    clocks::Clocks,
    commit::Commits,
    consume::{BatchLimits, Input, Outage},
    encode::Making,
    floor::Floor,
    insert::{Inserted, Store},
    intake::{Flusher, Intake},
    stages::Stages,
    writer::{SharedStore, Writer},
};
use crate::{
    Ended,
    beat::{Beat, Reason},
    chain,
};

pub mod batch;
pub mod begin;
pub mod clock;
pub mod clocks;
pub mod commit;
pub mod consume;
pub mod dlq;
pub mod encode;
pub mod floor;
pub mod group;
pub mod insert;
pub mod intake;
pub mod journal;
pub mod parse;
mod reading;
pub mod stages;
pub mod start;
pub mod trip;
pub mod writer;

/// How long a pass waits for a first message: clocks are published between two passes.
const IDLE: Duration = Duration::from_millis(50);
/// How often the positions of all shards are read, whether they got something or not.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// How often floors are judged.
const FLOOR_EVERY: Duration = Duration::from_secs(60);
/// How long a shard waits before it is read again: what made it so may still be there.
const AGAIN_AFTER: Duration = Duration::from_millis(500);
/// How often the TTLs of idle shards are renewed.
const RENEW_EVERY: Duration = Duration::from_secs(3600);

/// The role at work.
pub(crate) struct Ingest {
    /// First, as they are dropped first where a pass panics: their threads must not beat beside a consumer that is being closed.
    stages: Stages<Batch, Inserted>,
    store: SharedStore,
    config: Config,
    board: Board,
    beat: Beat,
    input: Input,
    buckets: Buckets,
    /// Where the buckets stand, with all that was read since: what comes from below that is in them already, or on its way.
    positions: Positions,
    clocks: Clocks,
    commits: Commits,
    intake: Intake,
    shards: BTreeMap<ShardId, Shard>,
    /// When the batch before was taken: the next one stays open until `intake.batch_time` after it.
    batch_taken: MonoNanos,
    watched: MonoNanos,
    renewed: MonoNanos,
    floored: MonoNanos,
    /// The last question for the ends of partitions was not answered.
    ends_failed: bool,
}

/// One pass's reading.
struct Read {
    batch: Batch,
    lost_place: bool,
    outage: Option<Outage>,
}

/// One shard's place.
struct Shard {
    /// All before it is in Redis, or was never to be.
    next: u64,
    floor: Floor,
}

/// Inserts until it is asked to stop.
pub(crate) fn run(launch: &Launch, board: &Board, beat: Beat) -> Ended {
    match begin::begin(launch, board, beat).map(Ingest::work) {
        Ok(ended) | Err(ended) => ended,
    }
}

impl Ingest {
    fn work(mut self) -> Ended {
        self.beat.ready();
        loop {
            if let Err(ended) = self.beat.go_on().and_then(|()| self.pass()) {
                crate::drain(&mut self.beat);
                return self.end(ended);
            }
        }
    }

    /// The whole way, once. What is read is encoded and goes into Redis while the next passes read.
    fn pass(&mut self) -> Result<(), Ended> {
        self.steer_intake()?;
        let Read {
            batch,
            lost_place,
            outage,
        } = self.read();
        // With the next, each stage has one.
        let mut again = self.written(self.stages.count() - 1)?;
        self.watch(&mut again)?;
        if !batch.0.is_empty() {
            self.stages.hand(batch);
        }
        if lost_place {
            again = self.shards.keys().copied().collect();
        }
        self.read_again(again)?;
        self.commits.send_due(&self.input);
        self.run_clocks(outage.is_some())?;
        if let Some(outage) = outage {
            let attempt = format!(
                "read topic={} brokers={}",
                self.input.topic(),
                self.config.kafka.brokers
            );
            self.kafka_failed(&attempt, &outage)?;
        }
        self.beat.turn_done();
        Ok(())
    }

    /// Lets the batches that are on their way come into Redis, and commits what is there. It comes behind a stop, which the stages hear
    /// as well, or a refusal that was met with nothing on its way: nobody is left that asks a Redis that is away.
    fn end(self, ended: Ended) -> Ended {
        let Self {
            stages,
            input,
            mut commits,
            beat,
            mut shards,
            ..
        } = self;
        let (written, panicked) = stages.end(&beat);
        for inserted in written {
            note(&inserted, &mut shards, &mut commits);
        }
        commits.send_last(&input);
        input.close();
        panicked.unwrap_or_else(|panic| resume_unwind(panic));
        ended
    }

    /// Reads one batch and parses it.
    fn read(&mut self) -> Read {
        self.beat.phase(Phase::Idle);
        let limits = self.limits();
        let mut collected = self.input.collect(&limits);
        if !collected.is_empty() {
            self.batch_taken = Clock::mono_now();
            self.beat.worked(Reason::Kafka);
            self.beat.phase(Phase::Work);
        }
        let records = collected.records(Clock::wall_now());
        let now = |shard, times: &[UnixMillis]| self.clocks.batch(shard, times);
        let batch = Batch::make(records, now, &mut self.positions, self.buckets);
        for (part, _) in &batch.0 {
            self.input.advance(part.shard, part.next);
        }
        self.input.came_to_end(&collected.ends);
        Read {
            batch,
            lost_place: collected.lost_place,
            outage: collected.outage,
        }
    }

    /// Notes what came into Redis; waits until no more than `left` batches are on their way there. Gives the shards that have to be read
    /// again.
    fn written(&mut self, left: usize) -> Result<Vec<ShardId>, Ended> {
        let mut again = Vec::new();
        while let Some(inserted) = self.stages.next(left, &self.beat)? {
            again.extend(note(&inserted, &mut self.shards, &mut self.commits));
        }
        Ok(again)
    }

    /// Waits for Kafka; when that takes long, the consumer is made anew.
    fn kafka_failed(&mut self, attempt: &str, error: &dyn Error) -> Result<(), Ended> {
        self.beat.failed(Reason::Kafka, attempt, error)?;
        self.input.renew(self.beat.failing_for(Reason::Kafka));
        Ok(())
    }

    /// Pauses and resumes shards after the states of their flushers.
    fn steer_intake(&mut self) -> Result<(), Ended> {
        let flusher = |slot| Flusher {
            healthy_once: self.board.healthy_once(slot),
            state: self.board.state(slot),
        };
        let changes = self.intake.decide(flusher, Clock::mono_now());
        for (shards, paused) in [(&changes.pause, true), (&changes.resume, false)] {
            if let Err(error) = self.input.pause(shards, paused) {
                // Nothing is noted as done: it is tried again at the next pass.
                return self
                    .beat
                    .failed(Reason::Kafka, "pause or resume partitions", &error);
            }
        }
        for &shard in &changes.pause {
            self.clocks.forget_end(shard);
            warn!("intake is closed shard={shard}: its flusher is down");
        }
        for shard in &changes.resume {
            info!("intake is open shard={shard}");
        }
        self.intake.done(&changes);
        Ok(())
    }

    /// Now and then, with nothing on its way: reads the positions of all shards, renews what must not expire, judges floors. Adds the
    /// shards that have to be read again.
    fn watch(&mut self, again: &mut Vec<ShardId>) -> Result<(), Ended> {
        let now = Clock::mono_now();
        if now.since(self.watched) < WATCH_EVERY {
            return Ok(());
        }
        again.extend(self.written(0)?);
        self.watched = now;
        let shards: Vec<ShardId> = self.shards.keys().copied().collect();
        // A hold of its own: all of `self` is needed beside it.
        let shared = self.store.clone();
        let mut store = shared.take();
        if now.since(self.renewed) >= RENEW_EVERY {
            self.renewed = now;
            store.renew(&shards, &mut self.beat)?;
        }
        again.extend(store.watch(&shards, &mut self.beat)?);
        // The queues of a node that went back do not say what was buffered.
        if again.is_empty() {
            self.judge_floors(&mut store)?;
        }
        Ok(())
    }

    /// Reads shards again: a node went back, or their place is gone from the topic. What is on its way comes into Redis first: it may be
    /// gone from the topic as well.
    fn read_again(&mut self, mut again: Vec<ShardId>) -> Result<(), Ended> {
        if again.is_empty() {
            return Ok(());
        }
        again.extend(self.written(0)?);
        again.sort_unstable();
        again.dedup();
        match ShardList::new(again) {
            Ok(again) => self.begin_again(&again),
            Err(_) => Ok(()),
        }
    }

    /// Begins shards again where the store says.
    fn begin_again(&mut self, again: &ShardList) -> Result<(), Ended> {
        warn!("read again shards={again}: from their positions");
        self.beat.wait(AGAIN_AFTER);
        self.beat.go_on()?;
        again.iter().for_each(|shard| self.commits.forget(shard));
        // As in `watch`, with nothing on its way.
        let shared = self.store.clone();
        let mut store = shared.take();
        let begun = locate(
            &self.config,
            again,
            &mut self.input,
            &mut store,
            &mut self.beat,
        )?;
        for (&id, begun) in &begun {
            let Some(shard) = self.shards.get_mut(&id) else {
                continue;
            };
            shard.next = begun.offset();
            shard.floor.rewind(begun.offset());
            self.commits.set_floor(id, shard.floor.offset());
            self.clocks.rewind(id, begun.clock);
        }
        self.positions.clone_from(store.positions());
        read_from(&begun, &mut self.input, &mut self.commits, &mut self.beat)
    }

    /// Once a minute: what each commit says of where to begin, should Redis lose everything.
    fn judge_floors(&mut self, store: &mut Store) -> Result<(), Ended> {
        let now = Clock::mono_now();
        if now.since(self.floored) < FLOOR_EVERY {
            return Ok(());
        }
        self.floored = now;
        let shards: Vec<ShardId> = self.shards.keys().copied().collect();
        let lowest = store.lowest_scores(&shards, &mut self.beat)?;
        // Without a limit of age, a trace lives as long as its journal.
        let age = self
            .config
            .buffer
            .max_segment_age
            .unwrap_or(self.config.redis.redis_ttl);
        for (id, lowest) in shards.into_iter().zip(lowest) {
            let Some(shard) = self.shards.get_mut(&id) else {
                continue;
            };
            shard.floor.judge(shard.next, lowest, age);
            self.commits.set_floor(id, shard.floor.offset());
            // An idle shard's commit is sent again: it carries the floor, and the one before may have failed.
            self.commits.add_start(id, shard.next);
        }
        Ok(())
    }

    /// Lets the clocks run of shards that are read to their end.
    fn run_clocks(&mut self, is_outage: bool) -> Result<(), Ended> {
        if !is_outage {
            match self.input.ask_ends() {
                Ok(true) => {
                    self.ends_failed = false;
                    self.beat.worked(Reason::Kafka);
                    // A partition whose broker is away, or that librdkafka lost, while others answer.
                    self.input.renew(self.input.silence(Clock::mono_now()));
                }
                Ok(false) => {}
                // One late answer is none yet: the clocks run no further, and it is asked again.
                Err(error) if !std::mem::replace(&mut self.ends_failed, true) => {
                    debug!("read the ends of partitions: {}", chain(&error));
                }
                Err(error) => self.kafka_failed("read the ends of partitions", &error)?,
            }
        }
        let (mono, wall_now) = (Clock::mono_now(), Clock::wall_now());
        for &shard in self.shards.keys() {
            if let Some(confirmed) = self.input.at_end(shard) {
                self.clocks.at_end(shard, confirmed, mono, wall_now);
            }
        }
        Ok(())
    }

    fn limits(&self) -> BatchLimits {
        let intake = &self.config.intake;
        BatchLimits {
            spans: intake.batch_spans,
            bytes: intake.batch_bytes,
            until: self.batch_taken.after(intake.batch_time),
            idle: IDLE,
        }
    }
}

/// The way of a batch that is read: encoded, then written, each on a thread of its own.
fn way(mut making: Making, writer: Writer, beat: &Beat) -> Stages<Batch, Inserted> {
    Stages::start(beat.another(), move |batch, beat| {
        making.encode(batch, beat)
    })
    .then(beat.another(), move |encoded, beat| {
        writer.write(encoded, beat)
    })
}

/// Notes what is in Redis: for commits and floors. Gives the shards that have to be read again.
fn note(
    inserted: &Inserted,
    shards: &mut BTreeMap<ShardId, Shard>,
    commits: &mut Commits,
) -> Vec<ShardId> {
    commits.add(inserted);
    for part in inserted.parts() {
        let Some(shard) = shards.get_mut(&part.shard) else {
            continue;
        };
        shard.next = part.next;
        shard.floor.note(part.latest, part.next);
    }
    inserted.rewind().to_vec()
}

impl std::fmt::Debug for Ingest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ingest")
            .field("input", &self.input)
            .finish_non_exhaustive()
    }
}
