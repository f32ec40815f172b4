//! The stage that writes: a batch goes into Redis on a thread of its own, while the next one is read, parsed and encoded.
//!
//! In:     `Encoded`, one at a time.
//! Out:    `Inserted`; and at once, whatever the reader does meanwhile, clocks and ledger on the board.
//! Keeps:  the store goes with its batch and comes back with what became of it: no batch is handed over before what the one before
//!         met is known, and nobody else asks the store meanwhile. A panic of the thread ends the process.
//! Knows:  the order: insert, then what shows it. No Kafka.
//! Source: docs/spec.md 2.6, 4; docs/house.md 3.

use std::{
    collections::BTreeMap,
    panic::resume_unwind,
    thread::{self, JoinHandle},
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use shared::{
    board::{Ledger, Phase},
    shard::ShardId,
};

use super::{
    batch::Counts,
    clocks::Clocks,
    encode::Encoded,
    insert::{Inserted, Store},
};
use crate::{
    Ended,
    beat::{Beat, Reason},
};

/// How long one wait for the other side may last: both show progress in between.
const SLICE: Duration = Duration::from_millis(250);

/// The thread that writes, and the store when that is here.
#[derive(Debug)]
pub struct Writer {
    work: Sender<(Store, Encoded)>,
    done: Receiver<(Store, Result<Inserted, Ended>)>,
    thread: JoinHandle<()>,
    here: Option<Store>,
}

/// What shows that a batch is in.
struct Shows {
    clocks: Clocks,
    ledgers: BTreeMap<ShardId, Ledger>,
    beat: Beat,
}

impl Writer {
    /// Starts the thread, with a hold of its own on the worker's slot.
    #[must_use]
    pub fn start(
        store: Store,
        clocks: Clocks,
        ledgers: BTreeMap<ShardId, Ledger>,
        beat: Beat,
    ) -> Self {
        let mut shows = Shows {
            clocks,
            ledgers,
            beat,
        };
        // There is one store: neither side ever has two to send.
        let (work, taken) = bounded(1);
        let (say, done) = bounded(1);
        let thread = thread::spawn(move || write_all(&taken, &say, &mut shows));
        Self {
            work,
            done,
            thread,
            here: Some(store),
        }
    }

    /// Gives the store, and what was handed over since it was last taken: it is in Redis now.
    ///
    /// # Errors
    /// [`Ended::Stopped`] when the supervisor asked for it before all was in.
    pub fn take(&mut self, beat: &Beat) -> Result<(Store, Option<Inserted>), Ended> {
        if let Some(store) = self.here.take() {
            return Ok((store, None));
        }
        loop {
            match self.done.recv_timeout(SLICE) {
                Ok((store, written)) => return Ok((store, Some(written?))),
                // The thread ends by itself, once it hears of a stop.
                Err(RecvTimeoutError::Timeout) => beat.progress(),
                Err(RecvTimeoutError::Disconnected) => return Err(Ended::Stopped),
            }
        }
    }

    /// Hands a batch over, with the store; one without parts is none.
    pub fn hand(&mut self, store: Store, batch: Encoded) {
        if batch.parts.is_empty() {
            self.keep(store);
        } else {
            // Where the thread is gone, taking the store back says so.
            drop(self.work.send((store, batch)));
        }
    }

    /// Keeps the store until it is taken again.
    pub fn keep(&mut self, store: Store) {
        self.here = Some(store);
    }

    /// Lets the thread end what it has; gives what it wrote. It comes behind a stop, which the thread hears as well, or a refusal that
    /// was met with the store here: nobody is left that asks a Redis that is away.
    pub fn end(self, beat: &Beat) -> Option<Inserted> {
        drop(self.work);
        let mut written = None;
        loop {
            match self.done.recv_timeout(SLICE) {
                // A stop kept it from coming in: the next start reads it again.
                Ok((_, last)) => written = last.ok(),
                Err(RecvTimeoutError::Timeout) => beat.progress(),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let ended = self.thread.join();
        ended.unwrap_or_else(|panic| resume_unwind(panic));
        written
    }
}

fn write_all(
    taken: &Receiver<(Store, Encoded)>,
    say: &Sender<(Store, Result<Inserted, Ended>)>,
    shows: &mut Shows,
) {
    loop {
        match taken.recv_timeout(SLICE) {
            Ok((mut store, batch)) => {
                let written = write(&mut store, batch, shows);
                let is_over = written.is_err();
                // Where nobody listens any more, nobody commits.
                drop(say.send((store, written)));
                if is_over {
                    return;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        shows.beat.phase(Phase::Idle);
    }
}

fn write(store: &mut Store, batch: Encoded, shows: &mut Shows) -> Result<Inserted, Ended> {
    let inserted = store.insert(batch, &mut shows.beat)?;
    shows.beat.worked(Reason::Redis);
    shows.clocks.written(&inserted);
    for part in inserted.parts() {
        if let Some(ledger) = shows.ledgers.get(&part.shard) {
            let Counts { inserted, refused } = part.counts;
            ledger.consumed(inserted + refused);
            ledger.inserted(inserted);
            ledger.refused(refused);
        }
    }
    Ok(inserted)
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use shared::{
        board::BoardOwner,
        config::{Config, Flags},
        time::UnixMillis,
    };
    use store::client::Client;

    use super::*;
    use crate::{
        beat::tests::alone,
        ingest::{dlq::DeadLetters, encode::Writing},
    };

    /// A writer whose Redis is nowhere: what it is handed it keeps, until a stop.
    fn writer() -> (Writer, Config, Beat, BoardOwner) {
        let variables = [
            ("SPANBUF_SUPERVISION__SHARDS".into(), "0".into()),
            ("SPANBUF_REDIS__NODES".into(), "127.0.0.1:1".into()),
        ];
        let config = Config::load(None, variables.into_iter(), &Flags::default()).unwrap();
        let (mut beat, board) = alone(&config);
        beat.ready();
        let client = Client::new(&config.redis).unwrap();
        let store = Store::new(client, String::new(), &config.redis, &config.buffer);
        let writer = Writer::start(store, Clocks::default(), BTreeMap::new(), beat.another());
        (writer, config, beat, board)
    }

    fn batch(config: &Config, shards: &[u32], beat: &mut Beat) -> Encoded {
        let part = |&shard: &u32| Writing {
            shard: ShardId(shard),
            first: 1,
            next: 2,
            now: UnixMillis(1),
            latest: UnixMillis(1),
            counts: Counts {
                inserted: 1,
                refused: 0,
            },
        };
        Encoded {
            parts: shards.iter().map(part).collect(),
            journals: Vec::new(),
            settled: DeadLetters::new(&config.kafka)
                .unwrap()
                .settle(&[], beat)
                .unwrap(),
        }
    }

    #[test]
    fn a_batch_that_did_not_come_in_before_a_stop_is_not_written() {
        let (mut writer, config, mut beat, _board) = writer();
        let (store, written) = writer.take(&beat).unwrap();
        assert!(written.is_none());
        writer.hand(store, batch(&config, &[0], &mut beat));
        beat.stop();
        assert!(matches!(writer.take(&beat), Err(Ended::Stopped)));
        assert!(
            matches!(writer.take(&beat), Err(Ended::Stopped)),
            "it is over"
        );
        assert!(writer.end(&beat).is_none());
    }

    #[test]
    fn a_batch_of_which_nothing_is_left_is_not_handed_over() {
        let (mut writer, config, mut beat, _board) = writer();
        let (store, _) = writer.take(&beat).unwrap();
        let mut batch = batch(&config, &[0, 3], &mut beat);
        batch.leave_out(&[ShardId(3)]);
        let left = batch.parts.iter().map(|part| part.shard);
        assert!(left.eq([ShardId(0)]));
        batch.leave_out(&[ShardId(0)]);
        writer.hand(store, batch);
        let (store, written) = writer.take(&beat).unwrap();
        assert!(written.is_none());
        // One who has the store may fail with it.
        drop(store);
        assert!(writer.end(&beat).is_none());
    }

    #[test]
    fn a_panic_of_the_thread_is_passed_on() {
        let (mut writer, _config, beat, _board) = writer();
        let (say, done) = bounded(1);
        drop((writer.take(&beat).unwrap(), say));
        (writer.done, writer.thread) = (done, thread::spawn(|| panic!("the writer")));
        assert!(matches!(writer.take(&beat), Err(Ended::Stopped)));
        assert!(catch_unwind(AssertUnwindSafe(|| writer.end(&beat))).is_err());
    }
}
