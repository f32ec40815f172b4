//! Begins the role: the store and Kafka are there and are what they should be, and every shard has its place.
//!
//! In:     the launch record; positions, committed offsets, what Kafka holds.
//! Out:    `Ingest`, reading, with all intake paused and its stages waiting.
//! Keeps:  what is away is waited for; only a refusal ends the worker; a gap is reported with its count.
//! Knows:  the order of a start. What decides a place is in `start`.
//! Source: docs/spec.md 7.4, 9.1; docs/store.md 2, 6.

use std::collections::BTreeMap;

use log::{error, info, warn};
use shared::{
    board::{Board, Ledger, Phase},
    config::Config,
    launch::Launch,
    shard::{ShardId, ShardList},
    time::{Clock, MonoNanos, UnixMillis},
};
use store::client::{Client, Meta};

use super::{
    Ingest, Shard,
    clocks::Clocks,
    commit::Commits,
    consume::{ConsumeError, Input, committed_of_group},
    dlq::DeadLetters,
    encode::Making,
    floor::Floor,
    group::GroupLimits,
    insert::Store,
    intake::Intake,
    journal::Encoder,
    start::{Known, Source, Start, floor_of, start},
    writer::{SharedStore, Writer},
};
use crate::{
    Ended,
    beat::{Beat, Reason},
    checks,
};

/// Where a shard begins, and at what time.
#[derive(Debug)]
pub(super) struct Begun {
    start: Start,
    /// Nobody committed anything for this shard yet.
    uncommitted: bool,
    /// Below it nothing is buffered, as far as is known.
    pub(super) floor: u64,
    /// The lowest time in its positions.
    pub(super) clock: Option<UnixMillis>,
}

impl Begun {
    /// The first offset that is read.
    pub(super) fn offset(&self) -> u64 {
        self.start.offset
    }
}

/// Makes the role ready: waits for Redis and Kafka, finds each shard's place, assigns all of them, paused.
pub(super) fn begin(launch: &Launch, board: &Board, mut beat: Beat) -> Result<Ingest, Ended> {
    let config = launch.config.clone();
    let (client, meta) = open_store(&config, &mut beat)?;
    let mut store = Store::new(client, meta.instance, &config.redis, &config.buffer);
    let mut input = Input::new(&config.kafka, config.intake.batch_bytes)?;
    prove(&mut input, launch, &mut beat)?;
    let dead_letters = DeadLetters::new(&config.kafka)?;

    let begun = locate(&config, &launch.shards, &mut input, &mut store, &mut beat)?;
    let (shards, ledgers, clocks) = take_up(&begun, board);
    let mut commits = Commits::default();
    begun
        .iter()
        .for_each(|(&shard, begun)| commits.set_floor(shard, begun.floor));
    read_from(&begun, &mut input, &mut commits, &mut beat)?;
    pause_all(&mut input, &launch.shards, &mut beat)?;
    let intake = Intake::new(
        &launch.shards,
        &config.supervision.shards,
        launch.flush_workers,
        config.intake.backpressure_seconds,
    );
    let making = Making {
        limits: GroupLimits::from(&config.buffer),
        encoder: Encoder::new(store.buckets(), &config.redis, &config.buffer),
        dead_letters,
    };
    let (buckets, positions) = (store.buckets(), store.positions().clone());
    let store = SharedStore::new(store);
    let writer = Writer {
        store: store.clone(),
        clocks: clocks.clone(),
        ledgers,
    };
    let now = Clock::mono_now();
    Ok(Ingest {
        board: board.clone(),
        input,
        stages: super::way(making, writer, &beat),
        store,
        buckets,
        positions,
        clocks,
        commits,
        intake,
        shards,
        config,
        beat,
        batch_taken: now,
        watched: now,
        renewed: now,
        floored: now,
        ends_failed: false,
    })
}

/// What this worker keeps of its shards, what it counts for them, and their clocks, which stand.
fn take_up(
    begun: &BTreeMap<ShardId, Begun>,
    board: &Board,
) -> (BTreeMap<ShardId, Shard>, BTreeMap<ShardId, Ledger>, Clocks) {
    let (mut shards, mut ledgers, clocks) = (BTreeMap::new(), BTreeMap::new(), Clocks::default());
    for (&shard, begun) in begun {
        let (Some(published), Some(ledger)) = (board.clock_writer(shard), board.ledger(shard))
        else {
            continue;
        };
        // The clock is kept over a respawn, with all that it may have run to: what a flusher has read is not taken back.
        let kept = board
            .clock(shard)
            .map(|clock| clock.read(MonoNanos(u64::MAX)));
        clocks.begin(shard, kept.max(begun.clock), published);
        let begins = Shard {
            next: begun.offset(),
            floor: Floor::new(begun.floor),
        };
        shards.insert(shard, begins);
        ledgers.insert(shard, ledger);
    }
    (shards, ledgers, clocks)
}

/// Waits until the store can be used; gives the client and the store's description.
fn open_store(config: &Config, beat: &mut Beat) -> Result<(Client, Meta), Ended> {
    let mut client = Client::new(&config.redis)?;
    let meta = checks::wait_for_store(&mut client, &config.supervision.shards, beat)?;
    Ok((client, meta))
}

/// Waits for the topics; a topic or partition that is not there is refused.
fn prove(input: &mut Input, launch: &Launch, beat: &mut Beat) -> Result<(), Ended> {
    let partitions = until_answered(input, beat, "find input topic", |input| {
        input.prove(&launch.shards)
    })?;
    if let Some(topic) = &launch.config.kafka.input_dlq {
        until_answered(input, beat, "find dead-letter topic", |input| {
            input.prove_topic(topic, "kafka.input_dlq")
        })?;
    }
    let all = &launch.config.supervision.shards;
    let outside = (0..partitions)
        .filter(|&partition| {
            !all.iter()
                .any(|shard| usize::try_from(shard.0) == Ok(partition))
        })
        .count();
    if outside > 0 {
        warn!(
            "topic={} has partitions={partitions}, of which {outside} are not in --shards {all}: nobody reads them here",
            input.topic()
        );
    }
    Ok(())
}

/// Finds where each of these shards begins.
pub(super) fn locate(
    config: &Config,
    shards: &ShardList,
    input: &mut Input,
    store: &mut Store,
    beat: &mut Beat,
) -> Result<BTreeMap<ShardId, Begun>, Ended> {
    let committed = until_answered(input, beat, "read committed offsets", |input| {
        input.committed(shards)
    })?;
    let taken_over = match &config.kafka.start_group {
        Some(group) => until_answered(
            input,
            beat,
            "read offsets of the group to take over from",
            |_| committed_of_group(&config.kafka, group, shards),
        )?,
        None => BTreeMap::new(),
    };
    let mut begun = BTreeMap::new();
    for shard in shards.iter() {
        let (positions, clock) = store.adopt(shard, beat)?;
        let extent = until_answered(input, beat, "read watermarks", |input| input.extent(shard))?;
        let known = Known {
            positions,
            committed: committed.get(&shard).cloned(),
            taken_over: taken_over.get(&shard).map(|committed| committed.offset),
            extent,
        };
        let start = start(shard, &known, config.kafka.offset_reset)?;
        report(shard, &start, clock, store, beat)?;
        begun.insert(
            shard,
            Begun {
                start,
                uncommitted: known.committed.is_none(),
                floor: known
                    .committed
                    .as_ref()
                    .map_or(start.offset, floor_of)
                    .min(start.offset),
                clock,
            },
        );
    }
    Ok(begun)
}

/// Says where a shard begins, and counts what is gone before it.
fn report(
    shard: ShardId,
    start: &Start,
    clock: Option<UnixMillis>,
    store: &mut Store,
    beat: &mut Beat,
) -> Result<(), Ended> {
    let Start {
        offset,
        source,
        missing,
    } = *start;
    info!("begin shard={shard} offset={offset} by={source}");
    if missing == 0 {
        return Ok(());
    }
    error!(
        "messages={missing} of shard={shard} before offset={offset} are gone from the input topic, reason=offset_out_of_range (check its retention)"
    );
    store.skip_to(shard, offset, missing, clock, beat)
}

/// Begins to read; a shard that nobody committed anything for gets its floor at once.
pub(super) fn read_from(
    begun: &BTreeMap<ShardId, Begun>,
    input: &mut Input,
    commits: &mut Commits,
    beat: &mut Beat,
) -> Result<(), Ended> {
    let starts: BTreeMap<ShardId, u64> = begun
        .iter()
        .map(|(&shard, begun)| (shard, begun.start.offset))
        .collect();
    let new = begun
        .iter()
        .filter(|(_, begun)| begun.uncommitted && begun.start.source != Source::Position);
    new.for_each(|(&shard, begun)| commits.add_start(shard, begun.start.offset));
    until_answered(input, beat, "assign partitions", |input| {
        input.begin(&starts)
    })
}

fn pause_all(input: &mut Input, shards: &ShardList, beat: &mut Beat) -> Result<(), Ended> {
    until_answered(input, beat, "pause partitions", |input| {
        input.pause(shards.as_slice(), true)
    })
}

/// Asks Kafka until it answers; a refusal ends the worker.
fn until_answered<T>(
    input: &mut Input,
    beat: &mut Beat,
    attempt: &str,
    mut ask: impl FnMut(&mut Input) -> Result<T, ConsumeError>,
) -> Result<T, Ended> {
    let phase = beat.phase_now();
    loop {
        beat.phase(Phase::Kafka);
        match ask(input) {
            Ok(answer) => {
                beat.worked(Reason::Kafka);
                beat.phase(phase);
                return Ok(answer);
            }
            Err(error) if error.is_outage() => {
                beat.failed(Reason::Kafka, attempt, &error)?;
                input.renew(beat.failing_for(Reason::Kafka));
            }
            Err(error) => return Err(error.into()),
        }
    }
}
