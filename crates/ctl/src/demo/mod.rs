//! `spanctl demo`: the whole way on one machine, nothing to prepare.
//!
//! In:     how many spans, or a file of them.
//! Out:    live figures, one segment as a tree, the ledger; true when every span is accounted for.
//! Keeps:  whatever ends it, Ctrl-C too, nothing is left: no process, no directory, no shared memory.
//! Knows:  the stand's parts, the board as a reader, the store's accounts.
//! Source: docs/spec.md 10.2.

use std::{path::PathBuf, time::Duration};

use nix::sys::signal::Signal;
use shared::{
    signals::{SignalError, Stop},
    time::{Clock, UnixMillis},
};
use stand::{
    StandError,
    kafka::{INPUT, Kafka, OUTPUT},
    launch::{Supervisor, SupervisorPlan},
    ledger::Ledger,
    recording::Recording,
    redis::Redis,
    topics::{Message, Producer, Reader},
    traffic::{SpanMessage, Traffic, TrafficPlan},
};

use self::{accounts::Accounts, figures::Figures, screen::Screen};

mod accounts;
mod figures;
mod screen;
mod tree;

/// How long messages are awaited in one turn of the loop.
const TURN: Duration = Duration::from_millis(50);
/// How long the last spans may take after the last one was sent.
const PATIENCE: Duration = Duration::from_secs(40);
/// How long the supervisor may take to drain.
const DRAIN: Duration = Duration::from_secs(30);
/// The timeouts of the demo, shorter than the defaults so that it ends soon.
const TIMEOUT: &str = "6s";
const ROOT_TIMEOUT: &str = "2s";

/// What the demo is to show.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How many spans are made and sent.
    #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    spans: u64,
    /// A recording to send instead: `<arrival ms>\t<message>` a line, plain or .zst.
    #[arg(long)]
    file: Option<PathBuf>,
    /// The seed of the traffic that is made.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds over which the traffic is spread.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
    /// Shards: partitions of the input.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    shards: u32,
    /// Buckets of a shard in Redis.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    buckets: u32,
    /// Flush workers.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    max_workers: u32,
    /// Leave everything running until Ctrl-C, and print the addresses.
    #[arg(long)]
    keep: bool,
}

/// Why the demo did not come to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    #[error(transparent)]
    Stand(#[from] StandError),
    #[error("listen for Ctrl-C")]
    Signals(#[from] SignalError),
    #[error("read recording: it holds no message (lines are `<arrival ms>` TAB `<message>`)")]
    Empty,
    #[error("read the accounts in redis: {0}")]
    Accounts(String),
}

/// Runs the demo; true when every span is accounted for.
pub(crate) fn run(arguments: &Arguments) -> Result<bool, DemoError> {
    let stop = Stop::install_interactive()?;
    let mut screen = Screen::new();
    let messages = messages(arguments)?;
    screen.line(&format!(
        "{} spans over {} s, {} shards, {} flushers, 1 ingest; timeouts: {TIMEOUT} without a root, {ROOT_TIMEOUT} with one",
        messages.len(), arguments.seconds, arguments.shards, arguments.max_workers
    ));
    let mut parts = Parts::start(arguments)?;
    if arguments.keep {
        screen.line(&format!(
            "kafka: {}   redis: {}   supervisor: pid {}   (Ctrl-C ends all)",
            parts.kafka.brokers(),
            parts.redis.address(),
            parts.supervisor.pid()
        ));
    }
    let Some(shown) = parts.play(messages, &stop, &mut screen)? else {
        screen.line("stopped; nothing is left");
        return Ok(false);
    };
    for line in shown.iter().flat_map(tree::lines) {
        screen.line(&line);
    }
    if arguments.keep {
        screen.line("everything runs on; Ctrl-C ends it and shows the ledger");
    }
    while arguments.keep && !stop.requested() {
        stop.wait(Duration::from_secs(1));
    }
    parts.settle(&mut screen)
}

/// The traffic, spread over the demo's time from now on.
fn messages(arguments: &Arguments) -> Result<Vec<SpanMessage>, DemoError> {
    let start = Clock::wall_now();
    let mut messages: Vec<SpanMessage> = match &arguments.file {
        Some(file) => Recording::open(file, start, arguments.shards)?.collect::<Result<_, _>>()?,
        None => {
            let plan = TrafficPlan {
                partitions: arguments.shards,
                start,
                traces: arguments.spans,
                payload_bytes: 700,
                ..TrafficPlan::default()
            };
            let spans = usize::try_from(arguments.spans).unwrap_or(usize::MAX);
            Traffic::new(arguments.seed, plan)
                .spans()
                .take(spans)
                .collect()
        }
    };
    let last = messages
        .iter()
        .map(|message| message.arrival.since(start))
        .max()
        .unwrap_or_default()
        .as_millis()
        .max(1);
    for message in &mut messages {
        let scaled =
            message.arrival.since(start).as_millis() * u128::from(arguments.seconds) * 1_000 / last;
        message.arrival = UnixMillis(u64::try_from(scaled).unwrap_or(u64::MAX));
    }
    if messages.is_empty() {
        return Err(DemoError::Empty);
    }
    messages.sort_by_key(|message| message.arrival);
    Ok(messages)
}

/// Everything that runs. In this order it is dropped: the supervisor first.
struct Parts {
    supervisor: Supervisor,
    reader: Reader,
    producer: Producer,
    redis: Redis,
    kafka: Kafka,
    ledger: Ledger,
    shards: u32,
    buckets: u32,
}

impl Parts {
    fn start(arguments: &Arguments) -> Result<Self, DemoError> {
        let kafka = Kafka::mock(arguments.shards)?;
        let redis = Redis::start()?;
        let mut plan = SupervisorPlan::new(arguments.shards, &kafka.brokers(), &redis.address());
        plan.max_workers = arguments.max_workers;
        // The mock keeps 5 MB a partition: both topics are compressed.
        plan.settings = format!(
            "buffer.timeout = \"{TIMEOUT}\"\nbuffer.root_timeout = \"{ROOT_TIMEOUT}\"\nredis.buckets = {}\nkafka.producer = {{ \"compression.type\" = \"zstd\" }}\n",
            arguments.buckets
        );
        let supervisor = Supervisor::start(plan)?;
        let producer = Producer::new(&kafka.brokers())?;
        let reader = Reader::new(&kafka.brokers(), OUTPUT)?;
        Ok(Self {
            supervisor,
            reader,
            producer,
            redis,
            kafka,
            ledger: Ledger::new(),
            shards: arguments.shards,
            buckets: arguments.buckets,
        })
    }

    /// Sends the traffic at its pace and reads what comes out, until all came or time is over; gives a segment to show, or
    /// nothing when Ctrl-C ended it.
    fn play(
        &mut self,
        messages: Vec<SpanMessage>,
        stop: &Stop,
        screen: &mut Screen,
    ) -> Result<Option<Option<Message>>, DemoError> {
        let (begun, wall_begun) = (Clock::mono_now(), Clock::wall_now());
        let mut figures = Figures::new(messages.len(), self.supervisor.pid());
        let mut waiting = messages.into_iter().peekable();
        let (mut shown, mut last_sent) = (None, begun);
        loop {
            if stop.requested() {
                return Ok(None);
            }
            let since = Clock::mono_now().since(begun);
            while let Some(mut message) =
                waiting.next_if(|message| Duration::from_millis(message.arrival.0) <= since)
            {
                message.arrival = wall_begun.after(Duration::from_millis(message.arrival.0));
                self.ledger.sent(&message.payload)?;
                self.producer.send(INPUT, &message.record())?;
                last_sent = Clock::mono_now();
                figures.sent += 1;
            }
            // It is late every time: nothing is ever enough.
            drop(self.reader.read_until(TURN, "", |_| false));
            let came = self.reader.take();
            self.ledger.read_output(&came);
            for message in came {
                figures.take(&message);
                tree::prefer(&mut shown, message);
            }
            figures.show(screen, waiting.peek().is_none());
            let all_sent = waiting.peek().is_none();
            let over = Clock::mono_now().since(last_sent) > PATIENCE;
            if all_sent && (over || figures.may_be_complete() && self.ledger.is_complete()) {
                figures.end(screen);
                return Ok(Some(shown));
            }
        }
    }

    /// Drains the supervisor and compares both sides: what was sent with what came out, and the store's own accounts.
    fn settle(mut self, screen: &mut Screen) -> Result<bool, DemoError> {
        self.supervisor.signal(Signal::SIGTERM)?;
        let drained = self.supervisor.wait_exit(DRAIN)?;
        self.reader.read_to_end(Duration::from_secs(5))?;
        let came = self.reader.take();
        self.ledger.read_output(&came);
        let balance = self.ledger.balance();
        let accounts = Accounts::read(&self.redis.address(), self.shards, self.buckets)
            .map_err(DemoError::Accounts)?;
        let even = balance.is_exact() && accounts.difference() == 0 && drained.success();
        screen.line(&format!("supervisor: {drained}"));
        screen.line(&format!("store: {accounts}"));
        screen.line(&format!("topics: {balance}"));
        screen.line(&format!(
            "ledger: {}",
            if even {
                "0: every span came out once"
            } else {
                "NOT EVEN"
            }
        ));
        if !even {
            screen.line(&self.supervisor.log());
        }
        Ok(even)
    }
}
