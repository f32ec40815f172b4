//! Role `flush`: segments that are due go from Redis to Kafka.
//!
//! In:     the shards' clocks on the board; queues and journals.
//! Out:    messages, acknowledged; then journals without them.
//! Keeps:  what is cleared was produced; nothing is flushed that is not due; a stop ends the running cycle and starts none.
//! Knows:  the order of a cycle.
//! Source: docs/spec.md 5; docs/store.md 3, 4.

use std::{collections::BTreeMap, time::Duration};

use log::{debug, error};
use shared::{
    board::{Board, Ledger, Phase},
    config::Config,
    launch::Launch,
    shard::{ShardId, ShardList},
    time::{Clock, MonoNanos, UnixMillis},
};
use store::{
    client::{Client, Command},
    keys::Bucket,
};

use self::{
    assemble::Limits,
    choose::{Budget, Choice, Look},
    due::{Due, Queues},
    headers::{Failures, Looked},
    produce::Output,
    upkeep::Upkeep,
};
use crate::{
    Ended,
    ask::ask,
    beat::{Beat, Reason},
};

pub mod assemble;
pub mod begin;
pub mod choose;
pub mod clear;
pub mod due;
pub mod headers;
pub mod load;
pub mod message;
pub mod produce;
pub mod upkeep;

/// The longest sleep between two looks at the clocks on the board.
const SLEEP_MAX: Duration = Duration::from_millis(50);
/// A cycle begins after this long, whatever the deadlines say.
const CYCLE_EVERY: Duration = Duration::from_secs(1);

/// The longest that one look's waves keep others waiting that became due meanwhile. It may be longer than the lift of the scores:
/// no other worker has these shards.
const WAVES_MAX: Duration = Duration::from_secs(10);

/// The role at work.
pub(crate) struct Flush {
    config: Config,
    limits: Limits,
    board: Board,
    shards: ShardList,
    ledgers: BTreeMap<ShardId, Ledger>,
    beat: Beat,
    client: Client,
    output: Output,
    failures: Failures,
    upkeep: Upkeep,
}

/// What a cycle leaves for the next.
struct CycleEnd {
    begun: MonoNanos,
    /// Something that is due was left.
    left: bool,
    /// Kafka did not take all.
    failed: bool,
    /// For each bucket, when its next trace is due.
    next: Vec<(Bucket, UnixMillis)>,
}

/// Flushes until it is asked to stop.
pub(crate) fn run(launch: &Launch, board: &Board, beat: Beat) -> Ended {
    match begin::begin(launch, board, beat).map(Flush::work) {
        Ok(ended) | Err(ended) => ended,
    }
}

impl Flush {
    fn work(mut self) -> Ended {
        self.beat.ready();
        loop {
            let ended = match self.cycle() {
                Ok(end) => self.sleep(&end),
                Err(ended) => Err(ended),
            };
            if let Err(ended) = ended {
                crate::drain(&mut self.beat);
                return ended;
            }
        }
    }

    /// The whole way, once.
    fn cycle(&mut self) -> Result<CycleEnd, Ended> {
        let begun = Clock::mono_now();
        let (limits, ttl) = (self.limits, self.config.redis.redis_ttl);
        let budget = Budget {
            segments: self.config.flush.max_flush_segments,
            bytes: self.config.flush.max_flush_bytes,
        };

        let clocks = self.clocks(begun);
        let queues = due::read(&mut self.client, &mut self.beat, &clocks, budget.segments)?;
        self.take_out_foreign(&queues)?;
        let Queues {
            due,
            more,
            next,
            depth,
            ..
        } = queues;
        let Looked {
            journals,
            left: unread,
        } = headers::look(
            &mut self.client,
            &mut self.beat,
            due,
            limits.root_timeout,
            ttl,
            &mut self.failures,
        )?;
        self.beat.phase(Phase::Work);
        let mut choice = Choice::new(journals, &limits);
        let ready = Clock::mono_now();
        // As long as it took to come here, so that half of the time goes into what it is for.
        let until = ready.after(ready.since(begun).clamp(CYCLE_EVERY, WAVES_MAX));
        let mut failed = false;
        while !failed && !choice.is_empty() && !self.beat.stopping() {
            for put_off in self.flush(choice.wave(&budget))? {
                choice.forget(&put_off);
            }
            failed = self.output.left_open();
            // Behind the first wave at the earliest, or nothing would ever go.
            if Clock::mono_now() >= until {
                break;
            }
        }
        let unfinished = !choice.is_empty();
        if unfinished {
            self.flush(choice.rest())?;
        }

        let left = more || unread || unfinished;
        self.upkeep
            .turn(&mut self.client, &mut self.beat, ttl, &self.ledgers)?;
        self.beat.cells().queue_depth(depth);
        self.beat.backpressure(Reason::Due, left.then_some(begun));
        self.beat.turn_done();
        Ok(CycleEnd {
            begun,
            left,
            failed,
            next,
        })
    }

    /// Loads, produces and clears one wave; gives the traces that were put off.
    fn flush(&mut self, looks: Vec<Look>) -> Result<Vec<Due>, Ended> {
        let loaded = load::load(&mut self.client, &mut self.beat, looks)?;
        let produced = self.output.produce(loaded, &mut self.beat);
        clear::clear(
            &mut self.client,
            &mut self.beat,
            produced,
            self.config.redis.redis_ttl,
            &self.ledgers,
        )
    }

    /// Waits until something is due by the clocks on the board, at most a second; a stop ends the wait.
    fn sleep(&mut self, end: &CycleEnd) -> Result<(), Ended> {
        self.beat.phase(Phase::Idle);
        loop {
            self.beat.go_on()?;
            let now = Clock::mono_now();
            if end.failed && now.since(end.begun) < CYCLE_EVERY {
                self.beat.wait(SLEEP_MAX);
                continue;
            }
            if end.left || now.since(end.begun) >= CYCLE_EVERY {
                return Ok(());
            }
            let clocks = self.clocks(now);
            let until = |&(bucket, at): &(Bucket, UnixMillis)| {
                clocks
                    .iter()
                    .find(|(known, _)| *known == bucket)
                    .map(|&(_, clock)| at.since(clock))
            };
            let soonest = end.next.iter().filter_map(until).min().unwrap_or(SLEEP_MAX);
            if soonest.is_zero() {
                return Ok(());
            }
            self.beat.wait(soonest.min(SLEEP_MAX));
        }
    }

    /// Each bucket with its shard's clock; a shard whose clock is not known has nothing due.
    fn clocks(&self, now: MonoNanos) -> Vec<(Bucket, UnixMillis)> {
        let known = self
            .shards
            .iter()
            .filter_map(|shard| Some((shard, self.board.clock(shard)?.read(now))));
        let buckets = self.client.buckets();
        known
            .flat_map(|(shard, clock)| buckets.of_shard(shard).map(move |bucket| (bucket, clock)))
            .collect()
    }

    /// Takes members out of the queues that are no traces of ours: they would be looked at for ever.
    fn take_out_foreign(&mut self, queues: &Queues) -> Result<(), Ended> {
        if queues.foreign.is_empty() {
            return Ok(());
        }
        let commands = queues.foreign.iter().map(|(bucket, member)| {
            error!("queue shard={} holds member={} that is no trace: taken out (what else writes to this redis?)", bucket.shard, member.escape_ascii());
            Command::unqueue(*bucket, member)
        });
        let answers = ask(
            &mut self.client,
            &mut self.beat,
            "take foreign members out",
            commands.collect(),
        )?;
        answers
            .into_iter()
            .filter_map(Result::err)
            .for_each(|refusal| debug!("take foreign members out: {refusal}"));
        Ok(())
    }
}

impl std::fmt::Debug for Flush {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flush")
            .field("shards", &self.shards)
            .finish_non_exhaustive()
    }
}
