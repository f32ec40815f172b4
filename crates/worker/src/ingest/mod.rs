//! Role `ingest`: spans go from Kafka into Redis.
//!
//! In:     the partitions of its shards.
//! Out:    entries, positions; then commits and clocks.
//! Keeps:  nothing is committed that is not wholly in Redis; a clock moves on only behind acknowledged writes.
//! Knows:  the order of a pass.
//! Source: docs/spec.md 2–4; docs/store.md 2, 6.

use std::{collections::BTreeMap, error::Error, time::Duration};

use log::{debug, info, warn};
use shared::{
    board::{Board, ClockWriter, Ledger, Phase},
    config::Config,
    launch::Launch,
    shard::{ShardId, ShardList},
    time::{Clock, MonoNanos, UnixMillis},
};

use self::{
    batch::{Counts, sort},
    begin::{locate, read_from},
    clock::{InputClock, Shown},
    commit::Commits,
    consume::{BatchLimits, Collected, Input},
    dlq::DeadLetters,
    floor::Floor,
    group::{GroupLimits, group},
    insert::{Inserted, Store, Writing},
    intake::{Flusher, Intake},
};
use crate::{
    Ended,
    beat::{Beat, Reason},
    chain,
};

pub mod batch;
pub mod begin;
pub mod clock;
pub mod commit;
pub mod consume;
pub mod dlq;
pub mod floor;
pub mod group;
pub mod insert;
pub mod intake;
pub mod journal;
pub mod parse;
mod reading;
pub mod start;
pub mod trip;

/// How long a pass waits for a first message: clocks are published between two passes.
const IDLE: Duration = Duration::from_millis(50);
/// How often positions are read that no batch read.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// How often floors are judged.
const FLOOR_EVERY: Duration = Duration::from_secs(60);
/// How long a shard waits before it is read again: what made it so may still be there.
const AGAIN_AFTER: Duration = Duration::from_millis(500);
/// How often the TTLs of idle shards are renewed.
const RENEW_EVERY: Duration = Duration::from_secs(3600);

/// The role at work.
pub(crate) struct Ingest {
    config: Config,
    board: Board,
    beat: Beat,
    input: Input,
    store: Store,
    dead_letters: DeadLetters,
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

/// One shard's clock and counts.
struct Shard {
    clock: InputClock,
    published: ClockWriter,
    ledger: Ledger,
    floor: Floor,
}

impl Shard {
    /// Makes the clock stand, for readers first: what they got to until then is where it stands. Between the two words one that has got
    /// further may see it some microseconds back; the second is not below what any has seen.
    fn stop_clock(&mut self) {
        let standing = self.clock.clone().freeze(Clock::mono_now());
        self.publish(standing);
        let standing = self.clock.freeze(Clock::mono_now());
        self.publish(standing);
    }

    fn publish(&self, shown: Option<Shown>) {
        if let Some(Shown { clock, at, until }) = shown {
            self.published.publish(clock, at, until);
        }
    }
}

/// A batch that is in Redis, and what it held.
struct Written {
    inserted: Inserted,
    counts: Vec<(ShardId, Counts, UnixMillis)>,
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
                self.commits.send_last(&self.input);
                self.input.close();
                return ended;
            }
        }
    }

    /// The whole way, once.
    fn pass(&mut self) -> Result<(), Ended> {
        self.steer_intake()?;
        self.beat.phase(Phase::Idle);
        let collected = self.input.collect(&self.limits());
        let written = if collected.is_empty() {
            None
        } else {
            self.batch_taken = Clock::mono_now();
            Some(write(
                &collected,
                &self.config,
                &mut self.shards,
                &mut self.store,
                &mut self.dead_letters,
                &mut self.beat,
            )?)
        };
        let ends = collected.ends().to_vec();
        let (lost_place, outage) = collected.end();
        let mut again = written.map_or_else(Vec::new, |written| self.settle(&written));
        self.input.came_to_end(&ends);
        if lost_place {
            again = self.shards.keys().copied().collect();
        }
        again.extend(self.watch()?);
        self.read_again(again)?;
        self.judge_floors()?;
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
        for shard in &changes.pause {
            warn!("intake is closed shard={shard}: its flusher is down");
        }
        for shard in &changes.resume {
            info!("intake is open shard={shard}");
        }
        self.intake.done(&changes);
        Ok(())
    }

    /// Notes what is in Redis: for commits, clocks and the ledger. Gives the shards that have to be read again.
    fn settle(&mut self, written: &Written) -> Vec<ShardId> {
        let mono = Clock::mono_now();
        self.commits.add(&written.inserted);
        for (id, counts, latest) in &written.counts {
            let (Some(&next), Some(shard)) =
                (written.inserted.offsets().get(id), self.shards.get_mut(id))
            else {
                continue;
            };
            self.input.advance(*id, next);
            shard.ledger.consumed(counts.inserted + counts.refused);
            shard.ledger.inserted(counts.inserted);
            shard.ledger.refused(counts.refused);
            let shown = shard.clock.written(mono);
            shard.floor.note(*latest.max(&shown.clock), next);
            shard.publish(Some(shown));
        }
        written.inserted.rewind().to_vec()
    }

    /// Now and then: reads the positions of all shards, and renews what must not expire. Gives the shards that have to be read again.
    fn watch(&mut self) -> Result<Vec<ShardId>, Ended> {
        let now = Clock::mono_now();
        if now.since(self.watched) < WATCH_EVERY {
            return Ok(Vec::new());
        }
        self.watched = now;
        let shards: Vec<ShardId> = self.shards.keys().copied().collect();
        if now.since(self.renewed) >= RENEW_EVERY {
            self.renewed = now;
            self.store.renew(&shards, &mut self.beat)?;
        }
        self.store.watch(&shards, &mut self.beat)
    }

    /// Reads shards again from where the store says: a node went back, or their place is gone from the topic.
    fn read_again(&mut self, mut again: Vec<ShardId>) -> Result<(), Ended> {
        again.sort_unstable();
        again.dedup();
        // An empty list is none.
        let Ok(again) = ShardList::new(again) else {
            return Ok(());
        };
        warn!("read again shards={again}: from their positions");
        self.beat.wait(AGAIN_AFTER);
        self.beat.go_on()?;
        again.iter().for_each(|shard| self.commits.forget(shard));
        let begun = locate(
            &self.config,
            &again,
            &mut self.input,
            &mut self.store,
            &mut self.beat,
        )?;
        for (id, begun) in &begun {
            let Some(shard) = self.shards.get_mut(id) else {
                continue;
            };
            shard.floor.rewind(begun.offset());
            self.commits.set_floor(*id, shard.floor.offset());
            match shard.clock.rewind(begun.clock, Clock::mono_now()) {
                None => shard.published.unknown(),
                shown => shard.publish(shown),
            }
        }
        read_from(&begun, &mut self.input, &mut self.commits, &mut self.beat)
    }

    /// Once a minute: what each commit says of where to begin, should Redis lose everything.
    fn judge_floors(&mut self) -> Result<(), Ended> {
        let now = Clock::mono_now();
        if now.since(self.floored) < FLOOR_EVERY {
            return Ok(());
        }
        self.floored = now;
        let shards: Vec<ShardId> = self.shards.keys().copied().collect();
        let lowest = self.store.lowest_scores(&shards, &mut self.beat)?;
        // Without a limit of age, a trace lives as long as its journal.
        let age = self
            .config
            .buffer
            .max_segment_age
            .unwrap_or(self.config.redis.redis_ttl);
        for (id, lowest) in shards.into_iter().zip(lowest) {
            let (Some(shard), Some(position)) = (self.shards.get_mut(&id), self.input.next(id))
            else {
                continue;
            };
            shard.floor.judge(position, lowest, age);
            self.commits.set_floor(id, shard.floor.offset());
            // An idle shard's commit is sent again: it carries the floor, and the one before may have failed.
            self.commits.add_start(id, position);
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
        for (&id, shard) in &mut self.shards {
            if let Some(confirmed) = self.input.at_end(id) {
                let shown = shard.clock.at_end(confirmed, mono, wall_now);
                shard.publish(shown);
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

/// Parses, groups and inserts one batch. The clocks of its shards do not get past its `now` meanwhile.
fn write(
    collected: &Collected<'_>,
    config: &Config,
    shards: &mut BTreeMap<ShardId, Shard>,
    store: &mut Store,
    dead_letters: &mut DeadLetters,
    beat: &mut Beat,
) -> Result<Written, Ended> {
    beat.worked(Reason::Kafka);
    beat.phase(Phase::Work);
    let group_limits = GroupLimits {
        spans_max: config.buffer.max_spans_per_insert,
        bytes_max: config.buffer.max_insert_bytes,
    };
    let (mut writings, mut refused, mut counts) = (Vec::new(), Vec::new(), Vec::new());
    for part in sort(
        collected.records(Clock::wall_now()),
        &*store,
        store.buckets(),
    ) {
        // Only assigned partitions are read.
        let Some(shard) = shards.get_mut(&part.shard) else {
            continue;
        };
        if !shard.clock.stops_before(&part.times) {
            shard.stop_clock();
        }
        let now = shard.clock.batch(&part.times, Clock::mono_now());
        let latest = part.times.iter().copied().max().unwrap_or(now);
        counts.push((part.shard, part.counts(), latest));
        writings.push(Writing {
            shard: part.shard,
            first: part.first,
            next: part.next,
            now,
            subsegments: group(part.spans, &group_limits),
        });
        refused.extend(part.refused);
    }
    let settled = dead_letters.settle(&refused, beat)?;
    let inserted = store.insert(&writings, &settled, beat)?;
    Ok(Written { inserted, counts })
}

impl std::fmt::Debug for Ingest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ingest")
            .field("input", &self.input)
            .finish_non_exhaustive()
    }
}
