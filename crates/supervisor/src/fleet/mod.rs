//! The workers of one supervisor: a slot, a place on the board and at most one process each.
//!
//! In:     requests, ends of children, what the board shows; `now`.
//! Out:    what [`step`] asks for: forks, signals, the exit code. The slots' states on the board, anew each turn.
//! Keeps:  every event goes through `step`; nothing here decides, and nothing waits.
//! Knows:  which worker has which shards; the board. No Kafka, no Redis.
//! Source: docs/supervision.md 1, 3; docs/spec.md 7.1.

use std::{
    fmt,
    hash::{BuildHasher, RandomState},
    mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    process,
    time::Duration,
};

use log::{error, info, warn};
use nix::errno::Errno;
use shared::{
    board::{BoardOwner, SlotBeat, SlotState},
    config::{Config, Supervision},
    exit::Exit,
    launch::{Launch, Role},
    shard::ShardList,
    time::MonoNanos,
};

use crate::{
    cap::Jitter,
    fleet::{
        lock::Lock,
        spawn::{Birth, Child, NOT_EXECUTED, Spawner},
        stop::Drain,
    },
    report,
    slot::{Action, Cause, Event, Rules, Slot, lives, step},
    turn::Request,
};

pub(crate) mod lock;
pub(crate) mod reap;
pub(crate) mod spawn;
pub(crate) mod stop;

/// What one worker is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Duty {
    pub(crate) role: Role,
    /// Its number within its role.
    pub(crate) index: u32,
    pub(crate) shards: ShardList,
}

/// One slot with its process.
#[derive(Debug)]
pub(crate) struct Post {
    /// Its number on the board.
    pub(crate) number: u32,
    pub(crate) duty: Duty,
    pub(crate) slot: Slot,
    pub(crate) child: Option<Child>,
    /// What the board showed in this turn.
    pub(crate) beat: Option<SlotBeat>,
    watched: bool,
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Fleet {
    posts: Vec<Post>,
    drain: Option<Drain>,
    config: Config,
    flush_workers: u32,
    spawner: Spawner,
    board: BoardOwner,
    lock: Lock,
}

/// Who does what: the flush workers take the first slots, ingest workers follow.
pub(crate) fn duties(supervision: &Supervision) -> Vec<Duty> {
    let share = |role, workers| {
        let shares = (0..).zip(supervision.shards.share(workers));
        shares.map(move |(index, shards)| Duty {
            role,
            index,
            shards,
        })
    };
    share(Role::Flush, supervision.max_workers)
        .chain(share(Role::Ingest, supervision.ingest_workers))
        .collect()
}

/// How many of them have a role.
pub(crate) fn count(duties: &[Duty], role: Role) -> u32 {
    u32::try_from(duties.iter().filter(|duty| duty.role == role).count()).unwrap_or(u32::MAX)
}

impl Fleet {
    /// Takes all that is needed; every worker is due at the first look.
    pub(crate) fn new(
        config: Config,
        duties: Vec<Duty>,
        spawner: Spawner,
        board: BoardOwner,
        lock: Lock,
        now: MonoNanos,
    ) -> Self {
        let Supervision {
            tick,
            reap_limit,
            max_restarts,
            ..
        } = config.supervision;
        let slot = Slot::new(
            Rules {
                tick,
                reap_limit,
                max_restarts,
            },
            now,
        );
        let flush_workers = count(&duties, Role::Flush);
        let posts = (0..)
            .zip(duties)
            .map(|(number, duty)| Post::new(number, duty, slot.clone(), None))
            .collect();
        Self {
            posts,
            drain: None,
            config,
            flush_workers,
            spawner,
            board,
            lock,
        }
    }

    /// Takes an operator's request.
    pub(crate) fn hear(&mut self, request: Request, now: MonoNanos) {
        match request {
            Request::Stop => self.stop(now),
            Request::Report => {
                self.look(now);
                report::print(&self.posts, self.board.board(), self.drain.is_some(), now);
            }
            Request::Reload => info!(
                "the configuration is read at start only (restart the supervisor to change it)"
            ),
            Request::Retry if self.drain.is_some() => {
                info!("all workers are draining: failures are not forgotten")
            }
            Request::Retry => {
                info!("failures are forgotten, workers that failed are tried again");
                self.apply_to_all(&Event::Retry, now);
            }
        }
    }

    /// Reaps what ended: workers first, then strangers.
    pub(crate) fn reap(&mut self, now: MonoNanos) {
        for place in 0..self.posts.len() {
            let ended = self.posts[place].child.as_ref().and_then(reap::reap);
            if let Some(cause) = ended {
                let cause = self.with_errno(place, cause);
                self.apply(
                    place,
                    Event::Died {
                        cause,
                        jitter: jitter(),
                    },
                    now,
                );
                self.posts[place].child = None;
            }
        }
        let known: Vec<_> = self
            .posts
            .iter()
            .filter_map(|post| Some(post.child.as_ref()?.pid))
            .collect();
        reap::reap_strangers(&known);
    }

    /// Looks at every slot and acts on it, kills when the deadline of draining has come, shows the states.
    pub(crate) fn judge(&mut self, now: MonoNanos) {
        if self.drain.as_ref().is_some_and(|drain| drain.is_due(now)) {
            self.kill(now);
        }
        self.look(now);
        for place in 0..self.posts.len() {
            let look = Event::Look(self.posts[place].beat.clone());
            self.apply(place, look, now);
        }
        for Post { number, slot, .. } in &self.posts {
            self.board.board().supervise(*number).state(
                slot.state(),
                slot.since(),
                slot.healthy_once(),
            );
        }
    }

    /// The exit code, once draining is at its end.
    pub(crate) fn ended(&self, now: MonoNanos) -> Option<Exit> {
        let drain = self.drain.as_ref()?;
        let left: Vec<String> = self
            .posts
            .iter()
            .filter(|post| post.child.is_some())
            .map(Post::to_string)
            .collect();
        if !left.is_empty() && !drain.is_over(now) {
            return None;
        }
        if !drain.killed().is_empty() {
            warn!(
                "workers had to be killed count={}: {}",
                drain.killed().len(),
                drain.killed().join("; ")
            );
        }
        if !left.is_empty() {
            error!(
                "workers are left behind count={}: {}",
                left.len(),
                left.join("; ")
            );
        }
        info!("ended exit={}", drain.exit().code());
        Some(drain.exit())
    }

    /// How long the next turn may be away: a tick, or less where a deadline comes before it.
    pub(crate) fn rest(&self, now: MonoNanos) -> Duration {
        let slots = self.posts.iter().filter_map(|post| post.slot.due());
        let dues = slots.chain(self.drain.as_ref().map(Drain::due));
        let first = dues.map(|due| due.since(now)).min();
        first.map_or(self.config.supervision.tick, |first| {
            first.min(self.config.supervision.tick)
        })
    }

    /// Handles that no turn waits on yet.
    pub(crate) fn unwatched(&mut self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.posts.iter_mut().filter_map(|post| {
            let child = post.child.as_ref()?;
            (!mem::replace(&mut post.watched, true)).then(|| child.pidfd.as_fd())
        })
    }

    /// Reads what the board shows of every slot.
    fn look(&mut self, now: MonoNanos) {
        for post in &mut self.posts {
            let beat = self
                .board
                .board()
                .beat(post.number, post.slot.generation(), now);
            post.beat = beat.filter(|_| lives(post.slot.state()));
        }
    }

    fn stop(&mut self, now: MonoNanos) {
        match &mut self.drain {
            Some(drain) => {
                drain.ask(now);
                info!(
                    "asked to stop again left={}ms",
                    drain.deadline().since(now).as_millis()
                );
            }
            None => {
                info!(
                    "draining for={}ms at most",
                    self.config.supervision.drain.as_millis()
                );
                self.drain = Some(Drain::asked(now, self.config.supervision.drain));
                self.apply_to_all(&Event::Stop, now);
            }
        }
    }

    fn escalate(&mut self, exit: Exit, now: MonoNanos) {
        if self.drain.is_none() {
            error!(
                "draining all workers because one failed for good exit={}",
                exit.code()
            );
            self.drain = Some(Drain::escalated(exit, now, self.config.supervision.drain));
            self.apply_to_all(&Event::Stop, now);
        }
    }

    fn kill(&mut self, now: MonoNanos) {
        let killed = self
            .posts
            .iter()
            .filter(|post| post.child.is_some())
            .map(Post::to_string)
            .collect();
        if let Some(drain) = &mut self.drain {
            drain.kill(killed, now);
        }
        self.apply_to_all(&Event::Kill, now);
    }

    fn apply_to_all(&mut self, event: &Event, now: MonoNanos) {
        for place in 0..self.posts.len() {
            self.apply(place, event.clone(), now);
        }
    }

    /// Moves a slot on, and does what that asks for. A fork that fails is the slot's next event.
    fn apply(&mut self, place: usize, event: Event, now: MonoNanos) {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let post = &mut self.posts[place];
            let (slot, actions) = step(post.slot.clone(), event, now);
            let before = mem::replace(&mut post.slot, slot);
            post.tell(&before);
            for action in actions {
                match action {
                    Action::Start(generation) => next = self.start(place, generation).err(),
                    Action::Terminate => self.posts[place].child.iter().for_each(stop::terminate),
                    Action::Kill => self.posts[place].child.iter().for_each(stop::kill),
                    Action::Escalate(exit) => self.escalate(exit, now),
                }
            }
        }
    }

    /// Forks a worker; otherwise gives the event of its failure.
    fn start(&mut self, place: usize, generation: u32) -> Result<(), Event> {
        let post = &mut self.posts[place];
        let failed = |errno: Errno| Event::ForkFailed {
            cause: Cause::Fork(format!("{errno:?}")),
            jitter: jitter(),
        };
        let launch = launch(
            &post.duty,
            post.number,
            generation,
            self.flush_workers,
            &self.board,
            &self.config,
        );
        let record = launch.write().map_err(|error| {
            error!("{error}");
            failed(Errno::EINVAL)
        })?;
        let inherited = [self.board.inherited(), self.lock.inherited()];
        let birth = Birth {
            name: &launch.process_name(),
            record: &record,
            inherited: &inherited,
        };
        let cells = self.board.board().supervise(post.number);
        cells.begin(generation);
        let child = self.spawner.spawn(&birth, &cells).map_err(|error| {
            error!(
                "start worker slot={}: {error}: {}",
                post.number, error.errno
            );
            failed(error.errno)
        })?;
        post.child = Some(child);
        post.watched = false;
        info!("started {post}");
        Ok(())
    }

    /// A child that could not execute has left the reason in its slot.
    fn with_errno(&self, place: usize, cause: Cause) -> Cause {
        let Post { number, slot, .. } = &self.posts[place];
        let errno = self
            .board
            .board()
            .exec_errno(*number, slot.generation())
            .filter(|_| cause == Cause::Exit(NOT_EXECUTED));
        errno.map_or(cause, |errno| {
            Cause::Exec(format!("{:?}", Errno::from_raw(errno)))
        })
    }
}

impl Post {
    pub(crate) fn new(number: u32, duty: Duty, slot: Slot, beat: Option<SlotBeat>) -> Self {
        Self {
            number,
            duty,
            slot,
            child: None,
            beat,
            watched: false,
        }
    }

    /// Says what has changed.
    fn tell(&self, before: &Slot) {
        let (from, to) = (before.state(), self.slot.state());
        if from == to {
            return;
        }
        let restarts = format!(
            "{}/{}",
            self.slot.cap().failures(),
            self.slot.max_restarts()
        );
        let cause = self
            .slot
            .deaths()
            .last()
            .map_or_else(String::new, |death| death.cause.to_string());
        match to {
            // It is said with its process.
            SlotState::Starting => {}
            SlotState::Stopped if lives(from) => info!("stopped {self} cause={cause}"),
            SlotState::Killed => warn!("killed {self}"),
            SlotState::Failed => error!("failed for good {self} cause={cause} restarts={restarts}"),
            SlotState::Backoff => warn!(
                "died {self} cause={cause} restarts={restarts} wait={}ms",
                self.slot.wait().as_millis()
            ),
            SlotState::Unkillable => {
                error!("does not end after KILL {self} (its shards stay closed)")
            }
            _ => info!("changed {self} from={from} to={to}"),
        }
    }
}

impl fmt::Display for Post {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            number,
            duty:
                Duty {
                    role,
                    index,
                    shards,
                },
            slot,
            child,
            ..
        } = self;
        write!(
            f,
            "slot={number} role={role} index={index} shards={shards} generation={}",
            slot.generation()
        )?;
        child
            .as_ref()
            .map_or(Ok(()), |child| write!(f, " pid={}", child.pid))
    }
}

/// What a worker is told.
pub(crate) fn launch(
    duty: &Duty,
    slot: u32,
    generation: u32,
    flush_workers: u32,
    board: &BoardOwner,
    config: &Config,
) -> Launch {
    Launch {
        role: duty.role,
        index: duty.index,
        slot,
        generation,
        shards: duty.shards.clone(),
        flush_workers,
        supervisor: process::id(),
        board: board.inherited().as_raw_fd(),
        config: config.clone(),
    }
}

/// Keys of a hasher are drawn by the system; no other randomness is needed here.
fn jitter() -> Jitter {
    Jitter::new(RandomState::new().hash_one(()))
}
