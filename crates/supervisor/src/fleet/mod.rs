//! The workers of one supervisor: a slot, a place on the board and at most one process each.
//!
//! In:     requests, ends of children, what the board shows; `now`.
//! Out:    what [`step`] asks for: forks, signals, the exit code. The slots' states on the board, anew each turn.
//! Keeps:  every event goes through `step`; nothing here decides, and nothing waits.
//! Knows:  which worker has which shards; the board. No Kafka, no Redis.
//! Source: docs/supervision.md 1, 3; docs/spec.md 7.1.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
    mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    process,
    time::Duration,
};

use log::{error, info, warn};
use nix::errno::Errno;
use shared::{
    board::{BoardOwner, Cause, SlotState},
    config::{Config, Supervision},
    exit::Exit,
    launch::{Launch, Role},
    shard::ShardList,
    time::{Clock, MonoNanos},
};

use crate::{
    cap::Jitter,
    fleet::{
        lock::Lock,
        oom::Memory,
        post::Post,
        recycle::{Rolling, Source},
        spawn::{Birth, NOT_EXECUTED, Spawner},
        stop::Drain,
    },
    notify::Health,
    report,
    slot::{Action, Event, Rules, Slot, lives, step},
    turn::Request,
};

pub(crate) mod capture;
pub(crate) mod lock;
pub(crate) mod oom;
pub(crate) mod post;
pub(crate) mod reap;
pub(crate) mod recycle;
pub(crate) mod spawn;
pub(crate) mod stop;

/// What stopping may take beside draining: killing, reaping, and a machine that is slow.
const STOPPING_MORE: Duration = Duration::from_secs(5);
/// SIGKILL, as a status has it.
const KILL: i32 = nix::libc::SIGKILL;
/// A turn that is later than this has stood still, and says nothing of the workers.
const STALL: Duration = Duration::from_secs(2);

/// What one worker is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Duty {
    pub(crate) role: Role,
    /// Its number within its role.
    pub(crate) index: u32,
    pub(crate) shards: ShardList,
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Fleet {
    posts: Vec<Post>,
    drain: Option<Drain>,
    config: Config,
    flush_workers: u32,
    spawner: Spawner,
    source: Source,
    rolling: Option<Rolling>,
    memory: Memory,
    board: BoardOwner,
    lock: Lock,
    /// When the next turn was to begin at the latest.
    expected: Option<MonoNanos>,
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
        source: Source,
        board: BoardOwner,
        lock: Lock,
        now: MonoNanos,
    ) -> Self {
        let slot = Slot::new(Rules::new(&config.supervision), now);
        let flush_workers = count(&duties, Role::Flush);
        let posts = (0..)
            .zip(duties)
            .map(|(number, duty)| Post::new(number, duty, slot.clone()))
            .collect();
        Self {
            posts,
            drain: None,
            config,
            flush_workers,
            spawner,
            source,
            rolling: None,
            memory: Memory::of_this_process(),
            board,
            lock,
            expected: None,
        }
    }

    /// Begins a turn. One that is late, because the supervisor or its machine stood still, says nothing of the workers.
    pub(crate) fn begin(&mut self, now: MonoNanos) {
        let late = self
            .expected
            .map_or(Duration::ZERO, |expected| now.since(expected));
        if late > STALL {
            warn!("a turn is late by={}ms, ages start anew", late.as_millis());
            self.apply_to_all(&Event::Anew, now);
        }
    }

    /// Takes an operator's request.
    pub(crate) fn hear(&mut self, request: Request, now: MonoNanos) {
        match request {
            Request::Stop => self.stop(now),
            Request::Report => {
                self.look(now);
                self.posts.iter_mut().for_each(Post::trace);
                self.show();
                let view = self.board.board().view(now, Clock::wall_now());
                report::print(&view, self.config.supervision.dump.as_deref());
            }
            Request::Reload => self.reload(),
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
                let cause = self.explain(place, cause);
                let died = Event::Died {
                    cause,
                    jitter: jitter(),
                };
                // Its number may be its successor's by now; its handle, which is still open, is its own.
                let handle = |post: &Post| Some(post.child.as_ref()?.pidfd.as_raw_fd());
                let reaped = handle(&self.posts[place]);
                self.apply(place, died, now);
                if handle(&self.posts[place]) == reaped {
                    self.posts[place].child = None;
                }
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
            self.excuse(place, now);
            let look = Event::Look(self.posts[place].beat.clone());
            self.apply(place, look, now);
        }
        self.roll(now);
        self.show();
    }

    /// Somebody looks at the process with a debugger: it is said, and not judged.
    fn excuse(&mut self, place: usize, now: MonoNanos) {
        let post = &mut self.posts[place];
        let overdue = post.slot.overdue(now);
        // Asked for only where it matters: it is a file to read for each worker.
        if overdue || post.tracer.is_some() {
            post.trace();
        }
        if let Some(tracer) = post.tracer.filter(|_| overdue) {
            warn!("is held by a debugger, not judged {post} tracer={tracer}");
            self.apply(place, Event::Anew, now);
        }
    }

    /// Shows on the board how all slots stand.
    fn show(&self) {
        let board = self.board.board();
        for post in &self.posts {
            let standing = post.standing(self.config.supervision.hang);
            board.supervise(post.number).show(&standing);
        }
        board.show_draining(self.drain.is_some());
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

    /// What the service manager is told.
    pub(crate) fn health(&self) -> Health {
        let mut states = BTreeMap::new();
        for post in &self.posts {
            *states.entry(post.slot.state()).or_insert(0_u32) += 1;
        }
        let states = states
            .iter()
            .map(|(state, count)| format!(" {state}={count}"));
        let mode = if self.drain.is_some() {
            "draining"
        } else {
            "running"
        };
        Health {
            ready: self.posts.iter().all(|post| post.slot.healthy_once()),
            stopping: self
                .drain
                .as_ref()
                .map(|_| self.config.supervision.drain + STOPPING_MORE),
            status: format!(
                "{mode} workers={}{}",
                self.posts.len(),
                states.collect::<String>()
            ),
        }
    }

    /// How long the next turn may be away: a tick, or less where a deadline comes before it.
    pub(crate) fn rest(&mut self, now: MonoNanos) -> Duration {
        let slots = self.posts.iter().filter_map(|post| post.slot.due());
        let dues = slots.chain(self.drain.as_ref().map(Drain::due));
        let first = dues.map(|due| due.since(now)).min();
        let tick = self.config.supervision.tick;
        let rest = first.map_or(tick, |first| first.min(tick));
        self.expected = Some(now.after(rest));
        rest
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
            post.pace(now);
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
                self.rolling = None;
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
            self.rolling = None;
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
                    Action::Capture => self.posts[place].capture(now),
                    Action::Signal(signal) => {
                        let children = self.posts[place].child.iter();
                        children.for_each(|child| stop::hang_signal(child, signal));
                    }
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
            cause: Cause::Fork(errno as i32),
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
        self.board.mend_head();
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

    /// What a status alone does not say: why it could not execute, or that the kernel killed it for memory.
    fn explain(&mut self, place: usize, cause: Cause) -> Cause {
        let Post { number, slot, .. } = &self.posts[place];
        let state = slot.state();
        match cause {
            Cause::Exit(NOT_EXECUTED) => {
                let errno = self.board.board().exec_errno(*number, slot.generation());
                errno.map_or(cause, Cause::Exec)
            }
            Cause::Signal(KILL) if state != SlotState::Killed && self.memory.grew() => Cause::Oom,
            cause => cause,
        }
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
