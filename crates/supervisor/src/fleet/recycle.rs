//! Takes on a new configuration: reads it again, and replaces the workers one at a time.
//!
//! In:     the file, the environment and the flags of the start; HUP.
//! Out:    workers with a new record, from a binary that was opened anew.
//! Keeps:  what is wrong or fixed for life is refused as a whole, by name, and the old stays in force; at most one worker is
//!         away; the first that does not become Healthy ends it.
//! Knows:  slots. It decides when the next one is due, `step` decides the rest.
//! Source: docs/supervision.md 4.

use std::{collections::VecDeque, path::PathBuf};

use log::{error, info, warn};
use shared::{
    board::SlotState,
    config::{Config, ConfigError, Flags, Supervision},
    telemetry::logs,
    time::MonoNanos,
};

use crate::{
    chain,
    fleet::{
        Fleet,
        spawn::{BinaryError, Spawner},
    },
    slot::{Event, Rules},
};

/// Where the configuration comes from.
#[derive(Debug)]
pub(crate) struct Source {
    /// The file.
    pub(crate) path: Option<PathBuf>,
    /// What the command line set.
    pub(crate) flags: Flags,
    /// The worker's binary when no key names one: the supervisor's own name may change while it runs.
    pub(crate) worker: PathBuf,
}

impl Source {
    /// Reads and proves everything.
    ///
    /// # Errors
    /// [`ConfigError`] with every fault.
    pub(crate) fn config(&self) -> Result<Config, ConfigError> {
        Config::load(self.path.as_deref(), std::env::vars_os(), &self.flags)
    }

    /// Opens the worker's binary.
    ///
    /// # Errors
    /// [`BinaryError`].
    pub(crate) fn spawner(&self, supervision: &Supervision) -> Result<Spawner, BinaryError> {
        let path = supervision.worker.as_ref().unwrap_or(&self.worker);
        Spawner::new(path, std::env::vars_os())
    }
}

/// The replacing of all workers, one at a time.
#[derive(Debug)]
pub(crate) struct Rolling {
    /// Places whose turn is still to come.
    left: VecDeque<usize>,
    current: Option<Replaced>,
}

/// The one that is replaced now, as it was before.
#[derive(Debug)]
struct Replaced {
    place: usize,
    generation: u32,
    failures: u64,
}

impl Fleet {
    /// Takes on what the file says now, or says why not.
    pub(super) fn reload(&mut self) {
        if self.drain.is_some() {
            return info!("all workers are draining: the configuration is not read again");
        }
        let config = match self.source.config() {
            Ok(config) => config,
            Err(ConfigError { faults }) => {
                faults.iter().for_each(|fault| error!("{fault}"));
                return error!(
                    "the configuration is refused, the old one stays in force faults={}",
                    faults.len()
                );
            }
        };
        let fixed = fixed(&self.config, &config);
        if !fixed.is_empty() {
            fixed.iter().for_each(|key| {
                error!("{key} is fixed for the life of a supervisor (restart it to change it)");
            });
            return error!("the configuration is refused, the old one stays in force");
        }
        match self.source.spawner(&config.supervision) {
            Ok(spawner) => self.spawner = spawner,
            Err(error) => {
                error!("{}", chain(&error));
                return error!("the worker is refused, the old configuration stays in force");
            }
        }
        info!(
            "the configuration is taken on, workers are replaced one at a time workers={}",
            self.posts.len()
        );
        logs::level(config.log.level);
        let rules = Rules::new(&config.supervision);
        for post in &mut self.posts {
            post.slot.rule(rules);
        }
        self.config = config;
        self.rolling = Some(Rolling {
            left: (0..self.posts.len()).collect(),
            current: None,
        });
    }

    /// Replaces the next worker, once the one before is Healthy.
    pub(super) fn roll(&mut self, now: MonoNanos) {
        let Some(rolling) = &mut self.rolling else {
            return;
        };
        if let Some(Replaced {
            place,
            generation,
            failures,
        }) = rolling.current
        {
            let post = &self.posts[place];
            let (slot, left) = (&post.slot, rolling.left.len());
            if slot.state() == SlotState::Failed || slot.cap().lifetime() > failures {
                error!(
                    "a worker does not work with the new configuration, no more are replaced {post} left={left} (those keep the old one until they start anew; mend it and send HUP)"
                );
                self.rolling = None;
                return;
            }
            if slot.generation() == generation || slot.state() != SlotState::Healthy {
                return;
            }
            info!("replaced {post} left={left}");
            rolling.current = None;
        }
        let Some(place) = rolling.left.pop_front() else {
            info!("all workers have the new configuration");
            self.rolling = None;
            return;
        };
        let slot = &self.posts[place].slot;
        rolling.current = Some(Replaced {
            place,
            generation: slot.generation(),
            failures: slot.cap().lifetime(),
        });
        if matches!(slot.state(), SlotState::Killed | SlotState::Unkillable) {
            warn!(
                "is being killed, its successor has the new configuration anyway {}",
                self.posts[place]
            );
        }
        self.apply(place, Event::Recycle, now);
    }
}

/// Keys that differ and cannot change while the supervisor lives. Workers that are replaced one at a time must not look for a trace in
/// two places.
fn fixed(old: &Config, new: &Config) -> Vec<&'static str> {
    let (old_store, new_store) = (&old.redis, &new.redis);
    let (old, new) = (&old.supervision, &new.supervision);
    let keys = [
        ("supervision.run_dir", old.run_dir != new.run_dir),
        ("supervision.shards", old.shards != new.shards),
        (
            "supervision.max_workers",
            old.max_workers != new.max_workers,
        ),
        (
            "supervision.ingest_workers",
            old.ingest_workers != new.ingest_workers,
        ),
        ("redis.cluster", old_store.cluster != new_store.cluster),
        ("redis.slice", old_store.slice != new_store.slice),
        ("redis.buckets", old_store.buckets != new_store.buckets),
    ];
    let changed = keys.into_iter().filter(|(_, differs)| *differs);
    changed.map(|(key, _)| key).collect()
}
