//! The clocks of all shards, as the board shows them.
//!
//! In:     the times of batches, what is written, the ends of partitions.
//! Out:    `now` of each batch; what the readers of the board see.
//! Keeps:  one thread at a time moves a clock and shows it: whoever reads a batch begins it, whoever has written it moves it on.
//! Knows:  the board's clock cells. How a clock goes is in `clock`.
//! Source: docs/spec.md 2.6.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use shared::{
    board::ClockWriter,
    shard::ShardId,
    time::{Clock, MonoNanos, UnixMillis},
};

use super::{
    clock::{InputClock, Shown},
    insert::Inserted,
};

/// All clocks of a worker; each of its threads has a hold on them.
#[derive(Debug, Clone, Default)]
pub struct Clocks(Arc<Mutex<BTreeMap<ShardId, ShardClock>>>);

/// A shard's clock and its cells.
#[derive(Debug)]
struct ShardClock {
    clock: InputClock,
    published: ClockWriter,
}

impl Clocks {
    /// Begins a shard's clock: it stands, at what readers may have seen or at what the positions say.
    pub fn begin(&self, shard: ShardId, start: Option<UnixMillis>, published: ClockWriter) {
        let mut clock = InputClock::new(start);
        let standing = clock.freeze(Clock::mono_now());
        let begun = ShardClock { clock, published };
        begun.show(standing);
        self.all().insert(shard, begun);
    }

    /// The `now` of a batch that has these times in this shard: the clock does not get past it until it is written. None for a shard
    /// that is not ours.
    #[must_use]
    pub fn batch(&self, shard: ShardId, times: &[UnixMillis]) -> Option<UnixMillis> {
        let mut all = self.all();
        let of_shard = all.get_mut(&shard)?;
        if !of_shard.clock.stops_before(times) {
            of_shard.stop();
        }
        Some(of_shard.clock.batch(times, Clock::mono_now()))
    }

    /// Moves clocks on behind what is written.
    pub fn written(&self, inserted: &Inserted) {
        let mut all = self.all();
        for (shard, _) in inserted.offsets() {
            if let Some(of_shard) = all.get_mut(&shard) {
                let shown = of_shard.clock.written(Clock::mono_now());
                of_shard.show(Some(shown));
            }
        }
    }

    /// Lets a clock run whose shard is read to its end, as the broker confirmed at a moment.
    pub fn at_end(
        &self,
        shard: ShardId,
        confirmed: MonoNanos,
        mono: MonoNanos,
        wall_now: UnixMillis,
    ) {
        if let Some(of_shard) = self.all().get_mut(&shard) {
            let shown = of_shard.clock.at_end(confirmed, mono, wall_now);
            of_shard.show(shown);
        }
    }

    /// Forgets what was told of the end of a shard that is paused.
    pub fn forget_end(&self, shard: ShardId) {
        if let Some(of_shard) = self.all().get_mut(&shard) {
            of_shard.clock.forget_end();
        }
    }

    /// Sets a clock back to where the shard's positions stand.
    pub fn rewind(&self, shard: ShardId, to: Option<UnixMillis>) {
        if let Some(of_shard) = self.all().get_mut(&shard) {
            match of_shard.clock.rewind(to, Clock::mono_now()) {
                None => of_shard.published.unknown(),
                shown => of_shard.show(shown),
            }
        }
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<ShardId, ShardClock>> {
        // A thread that panics ends the process.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ShardClock {
    /// Makes the clock stand, for readers first: what they got to until then is where it stands. Between the two words one that has got
    /// further may see it some microseconds back; the second is not below what any has seen.
    fn stop(&mut self) {
        let standing = self.clock.clone().freeze(Clock::mono_now());
        self.show(standing);
        let standing = self.clock.freeze(Clock::mono_now());
        self.show(standing);
    }

    fn show(&self, shown: Option<Shown>) {
        if let Some(Shown { clock, at, until }) = shown {
            self.published.publish(clock, at, until);
        }
    }
}

#[cfg(test)]
mod tests {
    use shared::{board::BoardOwner, shard::ShardList};

    use super::*;

    #[test]
    fn a_batch_from_before_a_running_clock_stops_it_for_its_readers() {
        let shard = ShardId(0);
        let owner = BoardOwner::create(&ShardList::new(vec![shard]).unwrap(), 1).unwrap();
        let (board, clocks) = (owner.board(), Clocks::default());
        let furthest = || {
            let clock = board.clock(shard);
            clock.map(|clock| clock.read(MonoNanos(u64::MAX)))
        };
        clocks.begin(
            shard,
            Some(UnixMillis(1_000)),
            board.clock_writer(shard).unwrap(),
        );
        assert_eq!(furthest(), Some(UnixMillis(1_000)));
        let mono = Clock::mono_now();
        clocks.at_end(shard, mono, mono, UnixMillis(5_000));
        assert_eq!(furthest(), Some(UnixMillis(7_000)));
        let now = clocks.batch(shard, &[UnixMillis(5_000)]).unwrap();
        let stands = furthest().unwrap();
        assert!(stands < UnixMillis(7_000) && now >= stands);
        clocks.rewind(shard, None);
        assert_eq!(furthest(), None, "nothing is known");
        assert_eq!(clocks.batch(ShardId(1), &[]), None, "not ours");
    }
}
