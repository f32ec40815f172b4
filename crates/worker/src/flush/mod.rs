//! Role `flush`: segments that are due go from Redis to Kafka.
//!
//! In:     the shards' clocks on the board; queues and journals.
//! Out:    messages, acknowledged; then journals without them.
//! Keeps:  what is cleared was produced; nothing is flushed that is not due; a stop ends the running cycle and starts none.
//! Knows:  the order of a cycle: what is due is found here, and goes its way in the lanes.
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
    due::{Due, Queues},
    lanes::{Heard, Lanes},
    put_off::Failures,
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
pub mod lanes;
pub mod load;
pub mod message;
pub mod produce;
pub mod put_off;
pub mod upkeep;

/// The longest sleep between two looks at the clocks on the board.
const SLEEP_MAX: Duration = Duration::from_millis(50);
/// Where nothing due was left, the next cycle begins so long after one at the earliest, and for each queue so long: to read one takes
/// Redis some 4 µs, and with thousands of them it would do nothing else. Under load cycles find more to do at once then.
const CYCLE_LEAST: Duration = Duration::from_millis(4);
const QUEUE_LEAST: Duration = Duration::from_micros(10);
/// A cycle begins after this long, whatever the deadlines say.
const CYCLE_EVERY: Duration = Duration::from_secs(1);

/// The role at work.
pub(crate) struct Flush {
    config: Config,
    board: Board,
    shards: ShardList,
    ledgers: BTreeMap<ShardId, Ledger>,
    beat: Beat,
    client: Client,
    lanes: Lanes,
    failures: Failures,
    upkeep: Upkeep,
}

/// What a cycle leaves for the next.
struct CycleEnd {
    begun: MonoNanos,
    /// When the next one may begin.
    not_before: MonoNanos,
    /// Something that is due was left.
    left: bool,
    /// What is due, and with a lane still.
    held: Vec<Due>,
    next: Next,
}

/// When the next trace of each bucket is due that is not due yet.
#[derive(Debug, Default)]
struct Next(BTreeMap<Bucket, UnixMillis>);

impl Next {
    fn note(&mut self, moments: Vec<(Bucket, UnixMillis)>) {
        for (bucket, at) in moments {
            let soonest = self.0.entry(bucket).or_insert(at);
            *soonest = at.min(*soonest);
        }
    }
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
                Ok(end) => self.sleep(end),
                Err(ended) => Err(ended),
            };
            if let Err(ended) = ended {
                crate::drain(&mut self.beat);
                let (_, of_lanes) = self.lanes.end(&mut self.beat);
                return of_lanes.err().unwrap_or(ended);
            }
        }
    }

    /// Finds what is due and hands it to the lanes.
    fn cycle(&mut self) -> Result<CycleEnd, Ended> {
        let begun = Clock::mono_now();
        let ttl = self.config.redis.redis_ttl;
        let heard = self.lanes.hear()?;
        // What they left is in the queues, which are read below.
        self.take(heard)?;
        let was_left = self.lanes.take_left();

        let clocks = self.clocks(begun);
        let wanted = self.lanes.wanted();
        let queues = due::read(&mut self.client, &mut self.beat, &clocks, wanted)?;
        self.take_out_foreign(&queues)?;
        let Queues {
            due,
            more,
            next: not_yet_due,
            depth,
            ..
        } = queues;
        let mut next = Next::default();
        next.note(not_yet_due);
        let queue_count = u32::try_from(clocks.len()).unwrap_or(u32::MAX);
        let not_before = begun.after(CYCLE_LEAST.max(QUEUE_LEAST.saturating_mul(queue_count)));
        let (held, due): (Vec<Due>, Vec<Due>) =
            due.into_iter().partition(|due| self.lanes.hold(due));
        // Where the lanes have all that was read, there is nothing to do at once.
        let more_for_lanes = more && !due.is_empty();
        let heard = self.lanes.hand(due, &mut self.beat)?;
        next.note(self.take(heard)?);

        self.upkeep
            .turn(&mut self.client, &mut self.beat, ttl, &self.ledgers)?;
        self.beat.queue_depth(depth);
        let left = self.lanes.take_left();
        let behind = more | was_left | left;
        self.beat.backpressure(Reason::Due, behind.then_some(begun));
        if self.lanes.are_proven() {
            self.beat.turn_done();
        }
        Ok(CycleEnd {
            begun,
            not_before,
            left: left | more_for_lanes,
            held,
            next,
        })
    }

    /// Puts off the traces whose looks failed again and again; gives when others are looked at again.
    fn take(&mut self, heard: Heard) -> Result<Vec<(Bucket, UnixMillis)>, Ended> {
        let put_off = self.failures.count(&heard.read, heard.failed);
        let ttl = self.config.redis.redis_ttl;
        put_off::put_off_all(&mut self.client, &mut self.beat, put_off, ttl)?;
        Ok(heard.next)
    }

    /// Waits until something is due by the clocks on the board, at most a second; a stop ends the wait.
    fn sleep(&mut self, mut end: CycleEnd) -> Result<(), Ended> {
        self.beat.phase(Phase::Idle);
        loop {
            self.beat.go_on()?;
            let heard = self.lanes.hear()?;
            end.next.note(self.take(heard)?);
            let now = Clock::mono_now();
            if self.lanes.failed() {
                self.beat.wait(SLEEP_MAX);
                continue;
            }
            let is_free = end.held.iter().any(|due| !self.lanes.hold(due));
            let left = end.left || is_free || self.lanes.left();
            if left || now.since(end.begun) >= CYCLE_EVERY {
                return Ok(());
            }
            let until = |(bucket, at): (&Bucket, &UnixMillis)| {
                let clock = self.board.clock(bucket.shard)?;
                Some(at.since(clock.read(now)))
            };
            let soonest = end.next.0.iter().filter_map(until).min();
            let pause = soonest.unwrap_or(SLEEP_MAX).max(end.not_before.since(now));
            if pause.is_zero() {
                return Ok(());
            }
            self.beat.wait(pause.min(SLEEP_MAX));
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
