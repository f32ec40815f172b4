//! Several lanes, each on a thread of its own: what one waits for, Redis or Kafka, holds up none of the others.
//!
//! In:     due traces, a part at a time, each trace in one lane at most.
//! Out:    messages, acknowledged; then journals without them; the word that a part is done with, and when what it left is due.
//! Keeps:  a lane has one part and there is no queue of them: what nobody took is as due as it was; a stop ends what runs and
//!         starts nothing; a panic of a lane ends the process.
//! Knows:  the order of look, load, produce and clear. Not how due traces are found.
//! Source: docs/spec.md 5; docs/supervision.md 3.

use std::{
    collections::{BTreeMap, HashSet},
    panic::resume_unwind,
    thread::{self, JoinHandle},
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded};
use shared::{
    board::{Ledger, Phase},
    config,
    shard::ShardId,
    time::{Clock, MonoNanos, UnixMillis},
};
use store::{
    client::Client,
    keys::{Bucket, Member},
};

use super::{
    CYCLE_EVERY,
    assemble::Limits,
    choose::{Budget, Choice, Look},
    clear,
    due::Due,
    headers::{self, Looked},
    load,
    produce::Output,
};
use crate::{
    Ended,
    beat::Beat,
    deliver::{Deliver, Deliverer},
};

/// How many lanes there are: with fewer, Redis and the client wait for each other (docs/performance.md).
const LANES: usize = 4;
/// How long one wait for work, or for a lane, may last: both sides show progress in between.
const SLICE: Duration = Duration::from_millis(250);
/// How long chunks that were read with their headers may be used: behind that, they are fetched as all others are, since another
/// flusher may have produced them.
const FRESH: Duration = Duration::from_secs(1);
/// The longest that one look's waves keep others waiting that became due meanwhile. It may be longer than the lift of the scores:
/// no other worker has these shards, and no other lane these traces.
const WAVES_MAX: Duration = Duration::from_secs(10);

/// How many lanes there are, and what a wave of each may flush: they share the bytes.
#[must_use]
pub fn lanes_of(flush: &config::Flush) -> (usize, Budget) {
    let count = LANES.min(flush.max_flush_segments).max(1);
    let budget = Budget {
        segments: flush.max_flush_segments,
        bytes: flush.max_flush_bytes / u64::try_from(count).unwrap_or(u64::MAX),
    };
    (count, budget)
}

/// All lanes, and what is with them.
#[derive(Debug)]
pub struct Lanes<D: Deliver = Deliverer> {
    // Without room: what nobody has taken is still the giver's.
    work: Sender<Vec<Due>>,
    done: Receiver<Done>,
    threads: Vec<JoinHandle<LaneEnd<D>>>,
    /// Traces that a lane takes at once.
    part: usize,
    in_flight: HashSet<(Bucket, Member)>,
    /// When Kafka last did not take all of a part.
    failed: Option<MonoNanos>,
    left: bool,
    /// A part went the whole way.
    is_proven: bool,
}

/// What one lane works with.
#[derive(Debug)]
pub struct Lane<D: Deliver = Deliverer> {
    /// A client of its own.
    pub client: Client,
    /// A hold of its own on the worker's slot.
    pub beat: Beat,
    /// Where messages go.
    pub output: Output<D>,
    /// When segments are due, and how large they may be.
    pub limits: Limits,
    /// What one wave may flush.
    pub budget: Budget,
    /// `redis.redis_ttl`.
    pub ttl: Duration,
    /// What is counted.
    pub ledgers: BTreeMap<ShardId, Ledger>,
    /// Whether small journals are read whole: not while they have more bytes than there is room for.
    pub reads_whole: bool,
}

/// What a lane leaves.
type LaneEnd<D> = (Output<D>, Result<(), Ended>);

/// A part that nothing is done for any more.
struct Done {
    traces: Vec<Due>,
    heard: Heard,
    /// Something that is due was left.
    left: bool,
    /// Kafka did not take all of it.
    left_open: bool,
}

/// What was heard of the lanes.
#[derive(Debug, Default)]
pub struct Heard {
    /// Traces whose journals were read.
    pub read: Vec<Due>,
    /// Traces whose look failed.
    pub failed: Vec<Due>,
    /// When what stays in their traces is looked at.
    pub next: Vec<(Bucket, UnixMillis)>,
}

impl Heard {
    fn extend(&mut self, more: Self) {
        self.read.extend(more.read);
        self.failed.extend(more.failed);
        self.next.extend(more.next);
    }
}

impl<D: Deliver + Send + 'static> Lanes<D> {
    /// Starts every lane; together they take as many traces at once as one wave may have segments.
    #[must_use]
    pub fn start(lanes: Vec<Lane<D>>) -> Self {
        let wave = lanes.first().map_or(1, |lane| lane.budget.segments);
        let part = (wave / lanes.len().max(1)).max(1);
        let (work, taken) = bounded(0);
        // A lane has one part at work, and may have said one done that was not heard yet.
        let (say, done) = bounded(2 * lanes.len());
        let start = |lane: Lane<D>| {
            let (taken, say) = (taken.clone(), say.clone());
            thread::spawn(move || lane.work(&taken, &say))
        };
        Self {
            work,
            done,
            threads: lanes.into_iter().map(start).collect(),
            part,
            in_flight: HashSet::new(),
            failed: None,
            left: false,
            is_proven: false,
        }
    }

    /// How many due traces are worth reading: what all lanes take at once, and what they have, which may be due again.
    #[must_use]
    pub fn wanted(&self) -> usize {
        self.part * self.threads.len() + self.in_flight.len()
    }

    /// Hands due traces to the lanes, part by part, as they come free. Once Kafka did not take something, what is not handed yet
    /// is left: it is as due as it was.
    ///
    /// # Errors
    /// [`Ended::Stopped`] when a stop was asked for, or a lane has ended.
    pub fn hand(&mut self, mut due: Vec<Due>, beat: &mut Beat) -> Result<Heard, Ended> {
        let mut heard = self.hear()?;
        while !due.is_empty() {
            if self.failed.is_some_and(is_recent) {
                self.left = true;
                break;
            }
            let rest = due.split_off(due.len().min(self.part));
            let traces: Vec<_> = due.iter().map(key).collect();
            let mut part = due;
            loop {
                part = match self.work.send_timeout(part, SLICE) {
                    Ok(()) => break,
                    Err(SendTimeoutError::Timeout(part)) => part,
                    // Its end says why.
                    Err(SendTimeoutError::Disconnected(_)) => return Err(Ended::Stopped),
                };
                beat.progress();
                beat.go_on()?;
                self.check()?;
            }
            self.in_flight.extend(traces);
            due = rest;
            heard.extend(self.hear()?);
        }
        Ok(heard)
    }

    /// Hears what was done since.
    ///
    /// # Errors
    /// [`Ended::Stopped`] when a lane has ended: it was stopped, or it panicked, which [`Lanes::end`] passes on.
    pub fn hear(&mut self) -> Result<Heard, Ended> {
        let mut heard = Heard::default();
        for done in self.done.try_iter() {
            for due in &done.traces {
                self.in_flight.remove(&key(due));
            }
            if done.left_open {
                self.failed = Some(Clock::mono_now());
            }
            self.left |= done.left;
            self.is_proven = true;
            heard.extend(done.heard);
        }
        self.check()?;
        Ok(heard)
    }

    fn check(&self) -> Result<(), Ended> {
        match self.threads.iter().any(JoinHandle::is_finished) {
            true => Err(Ended::Stopped),
            false => Ok(()),
        }
    }

    /// Whether a lane has a trace: until it is done with, no other looks at it.
    #[must_use]
    pub fn hold(&self, due: &Due) -> bool {
        // A copy of the key for each due trace is saved where nothing is in flight.
        !self.in_flight.is_empty() && self.in_flight.contains(&key(due))
    }

    /// Whether a part went the whole way, or none had to.
    #[must_use]
    pub fn are_proven(&self) -> bool {
        self.is_proven || self.in_flight.is_empty()
    }

    /// Whether something due was left since it was last taken.
    #[must_use]
    pub fn left(&self) -> bool {
        self.left
    }

    /// Takes whether something due was left.
    pub fn take_left(&mut self) -> bool {
        std::mem::take(&mut self.left)
    }

    /// Whether Kafka did not take all a moment ago: to send at once again would be in vain.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failed.is_some_and(is_recent)
    }

    /// Lets the lanes end their work, and waits for that: as long as a delivery may take after a stop. Where one of them ended by
    /// itself, the others are asked to stop.
    pub fn end(self, beat: &mut Beat) -> (Vec<Output<D>>, Result<(), Ended>) {
        if self.check().is_err() {
            beat.stop();
        }
        drop(self.work);
        while !matches!(
            self.done.recv_timeout(SLICE),
            Err(RecvTimeoutError::Disconnected)
        ) {
            beat.progress();
        }
        let (mut outputs, mut all) = (Vec::new(), Ok(()));
        for thread in self.threads {
            let (output, ended) = thread.join().unwrap_or_else(|panic| resume_unwind(panic));
            outputs.push(output);
            all = all.and(ended);
        }
        (outputs, all)
    }
}

impl<D: Deliver> Lane<D> {
    fn work(mut self, taken: &Receiver<Vec<Due>>, say: &Sender<Done>) -> LaneEnd<D> {
        let ended = loop {
            match taken.recv_timeout(SLICE) {
                Ok(due) => match self.flush_all(due) {
                    // Where nobody listens any more, nobody looks at a trace again.
                    Ok(done) => drop(say.send(done)),
                    Err(ended) => break Err(ended),
                },
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break Ok(()),
            }
            self.beat.phase(Phase::Idle);
        };
        (self.output, ended)
    }

    /// The whole way of one part.
    fn flush_all(&mut self, traces: Vec<Due>) -> Result<Done, Ended> {
        let begun = Clock::mono_now();
        let Looked {
            journals,
            failed,
            left: unread,
            fits,
        } = headers::look(
            &mut self.client,
            &mut self.beat,
            traces.clone(),
            self.reads_whole,
            self.limits.root_timeout,
            self.ttl,
        )?;
        self.reads_whole = fits;
        self.beat.phase(Phase::Work);
        let read = journals.iter().map(|journal| journal.due.clone()).collect();
        let mut choice = Choice::new(journals, &self.limits);
        let ready = Clock::mono_now();
        // As long as it took to come here, so that half of the time goes into what it is for.
        let until = ready.after(ready.since(begun).clamp(CYCLE_EVERY, WAVES_MAX));
        let (mut left_open, mut next) = (false, Vec::new());
        let mut fresh = true;
        while !left_open && !choice.is_empty() && !self.beat.stopping() {
            if fresh && Clock::mono_now().since(begun) >= FRESH {
                fresh = false;
                choice.forget_chunks();
            }
            let looks = choice.wave(&self.budget);
            // One that is put off now has a cycle begin for nothing, once.
            next.extend(looks.iter().filter_map(next_look));
            for put_off in self.flush(looks)? {
                choice.forget(&put_off);
            }
            left_open = self.output.left_open();
            // Behind the first wave at the earliest, or nothing would ever go.
            if Clock::mono_now() >= until {
                break;
            }
        }
        let unfinished = !choice.is_empty();
        if unfinished {
            self.flush(choice.rest())?;
        }
        Ok(Done {
            traces,
            heard: Heard { read, failed, next },
            left: unread || unfinished,
            left_open,
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
            self.ttl,
            &self.ledgers,
        )
    }
}

fn is_recent(failed: MonoNanos) -> bool {
    Clock::mono_now().since(failed) < CYCLE_EVERY
}

/// The bucket of a look, and when it is to be followed by another.
fn next_look(look: &Look) -> Option<(Bucket, UnixMillis)> {
    Some((look.due.bucket, look.next_look?))
}

fn key(due: &Due) -> (Bucket, Member) {
    (due.bucket, due.member.clone())
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use nix::sys::signal::{Signal, raise};
    use shared::{
        board::BoardOwner,
        config::{Config, Flags},
        ids::{ProjectId, TraceId},
        shard::BucketId,
    };

    use super::*;
    use crate::{
        beat::tests::alone,
        deliver::{Fault, Outgoing},
    };

    /// Is never asked: no lane here comes so far.
    #[derive(Debug)]
    struct Nobody;

    impl Deliver for Nobody {
        fn deliver(&mut self, messages: &[Outgoing<'_>], _: &mut Beat) -> Vec<Result<(), Fault>> {
            vec![Err(Fault::Silent); messages.len()]
        }
    }

    fn config() -> Config {
        let variables = [
            ("SPANBUF_SUPERVISION__SHARDS".into(), "0".into()),
            ("SPANBUF_REDIS__NODES".into(), "127.0.0.1:1".into()),
        ];
        Config::load(None, variables.into_iter(), &Flags::default()).unwrap()
    }

    fn beat(config: &Config) -> (Beat, BoardOwner) {
        let (mut beat, board) = alone(config);
        beat.ready();
        (beat, board)
    }

    /// A lane whose Redis is nowhere: what it takes it keeps, until a stop.
    fn lane(config: &Config, beat: &Beat) -> Lane<Nobody> {
        Lane {
            client: Client::new(&config.redis).unwrap(),
            beat: beat.another(),
            output: Output::new(config, Nobody, None, 1 << 20),
            limits: Limits::new(&config.buffer, 1 << 20),
            budget: Budget {
                segments: 2,
                bytes: 1 << 20,
            },
            ttl: config.redis.redis_ttl,
            ledgers: BTreeMap::new(),
            reads_whole: true,
        }
    }

    fn due(project: u64) -> Due {
        Due {
            bucket: Bucket {
                slice: None,
                shard: ShardId(0),
                bucket: BucketId(0),
            },
            member: Member::new(ProjectId(project), &TraceId::new(b"t")),
            score: UnixMillis(1),
            now: UnixMillis(1),
        }
    }

    #[test]
    fn each_lane_has_one_part_and_what_nobody_took_is_not_held() {
        let config = config();
        let (mut beat, _board) = beat(&config);
        let mut lanes = Lanes::start(vec![lane(&config, &beat), lane(&config, &beat)]);
        assert_eq!(lanes.wanted(), 2);
        lanes.hand(vec![due(1), due(2)], &mut beat).unwrap();
        assert!(lanes.hold(&due(1)) && lanes.hold(&due(2)));
        assert_eq!(lanes.wanted(), 4, "what they have may be read again");

        raise(Signal::SIGTERM).unwrap();
        let handed = lanes.hand(vec![due(3)], &mut beat);
        assert!(matches!(handed, Err(Ended::Stopped)));
        assert!(!lanes.hold(&due(3)));
        let (outputs, ended) = lanes.end(&mut beat);
        assert_eq!(outputs.len(), 2);
        assert!(matches!(ended, Err(Ended::Stopped)));
    }

    #[test]
    fn a_lane_that_panics_ends_the_others_and_is_passed_on() {
        let config = config();
        let (mut beat, _board) = beat(&config);
        let mut lanes = Lanes::start(vec![lane(&config, &beat)]);
        // It would try for as long as its Redis is away.
        lanes.hand(vec![due(1)], &mut beat).unwrap();
        lanes.threads.push(thread::spawn(|| panic!("a lane")));
        while !lanes.threads[1].is_finished() {
            beat.wait(Duration::from_millis(1));
        }
        assert!(matches!(lanes.hear(), Err(Ended::Stopped)));
        assert!(catch_unwind(AssertUnwindSafe(|| lanes.end(&mut beat))).is_err());
    }

    #[test]
    fn what_kafka_did_not_take_keeps_the_rest_back_for_a_while() {
        let config = config();
        let (mut beat, _board) = beat(&config);
        let mut lanes = Lanes::start(vec![lane(&config, &beat)]);
        lanes.failed = Some(Clock::mono_now());
        lanes.hand(vec![due(1)], &mut beat).unwrap();
        assert!(!lanes.hold(&due(1)) && lanes.take_left() && lanes.failed());
        lanes.end(&mut beat).1.unwrap();
    }

    #[test]
    fn lanes_share_the_bytes_and_there_are_no_more_than_traces() {
        let mut flush = config().flush;
        let (count, budget) = lanes_of(&flush);
        assert_eq!((count, budget.segments), (4, flush.max_flush_segments));
        assert_eq!(budget.bytes * 4, flush.max_flush_bytes);
        flush.max_flush_segments = 2;
        assert_eq!(lanes_of(&flush).0, 2);
    }
}
