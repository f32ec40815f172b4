//! The last stage: a batch goes into Redis, and what shows it moves on.
//!
//! In:     `Encoded`.
//! Out:    `Inserted`; and at once, whatever the reader does meanwhile, clocks and ledger on the board.
//! Keeps:  the reader has the store only while no batch is on its way: an insert holds it for as long as Redis is away.
//! Knows:  the order: insert, then what shows it. No Kafka.
//! Source: docs/spec.md 2.6, 4; docs/house.md 3.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use shared::{board::Ledger, shard::ShardId};

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

/// The store, which the last stage and the reader take in turns.
#[derive(Debug, Clone)]
pub struct SharedStore(Arc<Mutex<Store>>);

impl SharedStore {
    /// Shares a store.
    #[must_use]
    pub fn new(store: Store) -> Self {
        Self(Arc::new(Mutex::new(store)))
    }

    /// Takes it until the guard is let go.
    pub fn take(&self) -> MutexGuard<'_, Store> {
        // A thread that panics ends the process.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes batches, and shows that they are in.
#[derive(Debug)]
pub struct Writer {
    /// Where they go.
    pub store: SharedStore,
    /// What moves on behind them.
    pub clocks: Clocks,
    /// Where their messages are counted.
    pub ledgers: BTreeMap<ShardId, Ledger>,
}

impl Writer {
    /// Writes one batch.
    ///
    /// # Errors
    /// As [`Store::insert`].
    pub fn write(&self, batch: Encoded, beat: &mut Beat) -> Result<Inserted, Ended> {
        let inserted = self.store.take().insert(batch, beat)?;
        beat.worked(Reason::Redis);
        self.clocks.written(&inserted);
        for part in inserted.parts() {
            if let Some(ledger) = self.ledgers.get(&part.shard) {
                let Counts { inserted, refused } = part.counts;
                ledger.consumed(inserted + refused);
                ledger.inserted(inserted);
                ledger.refused(refused);
            }
        }
        Ok(inserted)
    }
}

#[cfg(test)]
mod tests {
    use shared::{
        config::{Config, Flags},
        time::UnixMillis,
    };
    use store::client::Client;

    use super::*;
    use crate::{
        beat::tests::alone,
        ingest::{dlq::DeadLetters, encode::Writing},
    };

    #[test]
    fn a_batch_that_did_not_come_in_before_a_stop_is_not_shown() {
        let variables = [
            ("SPANBUF_SUPERVISION__SHARDS".into(), "0".into()),
            ("SPANBUF_REDIS__NODES".into(), "127.0.0.1:1".into()),
        ];
        let config = Config::load(None, variables.into_iter(), &Flags::default()).unwrap();
        let (mut beat, board) = alone(&config);
        beat.ready();
        let client = Client::new(&config.redis).unwrap();
        let store = Store::new(client, String::new(), &config.redis, &config.buffer);
        let writer = Writer {
            store: SharedStore::new(store),
            clocks: Clocks::default(),
            ledgers: [(ShardId(0), board.board().ledger(ShardId(0)).unwrap())].into(),
        };
        let batch = Encoded {
            parts: vec![Writing {
                shard: ShardId(0),
                first: 1,
                next: 2,
                now: UnixMillis(1),
                latest: UnixMillis(1),
                counts: Counts {
                    inserted: 1,
                    refused: 0,
                },
            }],
            journals: Vec::new(),
            settled: DeadLetters::new(&config.kafka)
                .unwrap()
                .settle(&[], &mut beat)
                .unwrap(),
        };
        beat.stop();
        assert!(matches!(
            writer.write(batch, &mut beat),
            Err(Ended::Stopped)
        ));
        let totals = board.board().totals(ShardId(0)).unwrap();
        assert_eq!((totals.consumed, totals.inserted), (0, 0));
    }
}
