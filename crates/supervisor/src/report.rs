//! What `kill -USR1` shows: a line for each worker and a summary.
//!
//! In:     slots, their processes, the board; `now`.
//! Out:    lines of `key=value` on standard error.
//! Keeps:  one write a line that never waits, whatever state the workers and the reader are in.
//! Knows:  how a reading is shown. It changes nothing.
//! Source: docs/supervision.md 4.

use std::{collections::BTreeMap, fmt, time::Duration};

use shared::{
    board::{Board, Totals},
    shard::ShardList,
    telemetry::logs,
    time::{Clock, MonoNanos, UnixMillis},
};

use crate::fleet::Post;

/// Prints everything.
pub(crate) fn print(posts: &[Post], board: &Board, draining: bool, now: MonoNanos) {
    let wall_now = Clock::wall_now();
    for post in posts {
        let shards = &post.duty.shards;
        let (drift, totals) = (drift(board, shards, now, wall_now), totals(board, shards));
        logs::line(
            &Row {
                post,
                drift,
                totals,
                now,
            }
            .to_string(),
        );
    }
    logs::line(
        &Summary {
            posts,
            draining,
            totals: totals(board, board.shards()),
        }
        .to_string(),
    );
}

/// A worker's line.
struct Row<'r> {
    post: &'r Post,
    /// Of the shard that is furthest behind, and of the one furthest ahead.
    drift: Option<(i64, i64)>,
    totals: Totals,
    now: MonoNanos,
}

struct Summary<'s> {
    posts: &'s [Post],
    draining: bool,
    totals: Totals,
}

impl fmt::Display for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            post:
                Post {
                    number,
                    duty,
                    slot,
                    child,
                    beat,
                    ..
                },
            drift,
            totals,
            now,
        } = self;
        let ago = |moment: MonoNanos| Age(Some(now.since(moment)));
        write!(
            f,
            "worker slot={number} role={} index={} shards={}",
            duty.role, duty.index, duty.shards
        )?;
        write!(
            f,
            " pid={} generation={}",
            Shown(child.as_ref().map(|child| child.pid)),
            slot.generation()
        )?;
        write!(f, " state={} state_age={}", slot.state(), ago(slot.since()))?;
        let beat = beat.as_ref();
        write!(f, " phase={}", Shown(beat.map(|beat| beat.phase)))?;
        write!(
            f,
            " phase_age={}",
            Age(beat.map(|beat| now.since(beat.phase_since)))
        )?;
        write!(
            f,
            " beat_age={}",
            Age(beat.and_then(|_| slot.beat_age(*now)))
        )?;
        let backpressure = beat.and_then(|beat| beat.backpressure_since);
        write!(
            f,
            " backpressure_age={}",
            Age(backpressure.map(|since| now.since(since)))
        )?;
        match drift {
            None => f.write_str(" drift=-")?,
            Some((least, most)) if least == most => write!(f, " drift={least}ms")?,
            Some((least, most)) => write!(f, " drift={least}..{most}ms")?,
        }
        write!(f, " in_flight={}", Shown(beat.map(|beat| beat.in_flight)))?;
        write!(
            f,
            " queue_depth={}",
            Shown(beat.map(|beat| beat.queue_depth))
        )?;
        write!(f, " longest_gap={}", Age(beat.map(|beat| beat.longest_gap)))?;
        write!(
            f,
            " restarts={}/{} failures={}",
            slot.cap().failures(),
            slot.max_restarts(),
            slot.cap().lifetime()
        )?;
        let deaths: Vec<String> = slot
            .deaths()
            .map(|death| format!("{}({})", death.cause, ago(death.at)))
            .collect();
        write!(
            f,
            " deaths={}",
            Shown(Some(deaths.join(",")).filter(|deaths| !deaths.is_empty()))
        )?;
        write!(f, " {}", Ledger(totals))
    }
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut states = BTreeMap::new();
        for post in self.posts {
            *states.entry(post.slot.state()).or_insert(0) += 1;
        }
        let failures: u64 = self
            .posts
            .iter()
            .map(|post| post.slot.cap().lifetime())
            .sum();
        write!(
            f,
            "summary workers={} mode={}",
            self.posts.len(),
            if self.draining { "draining" } else { "running" }
        )?;
        states
            .iter()
            .try_for_each(|(state, count)| write!(f, " {state}={count}"))?;
        write!(f, " failures={failures} {}", Ledger(&self.totals))
    }
}

/// The drift of the shards with a clock: least and most.
fn drift(
    board: &Board,
    shards: &ShardList,
    now: MonoNanos,
    wall_now: UnixMillis,
) -> Option<(i64, i64)> {
    let millis = |moment: UnixMillis| i64::try_from(moment.0).unwrap_or(i64::MAX);
    let drifts = || {
        shards
            .iter()
            .filter_map(|shard| Some(millis(board.clock(shard)?.read(now)) - millis(wall_now)))
    };
    drifts().min().zip(drifts().max())
}

/// The ledgers of the shards, added up.
fn totals(board: &Board, shards: &ShardList) -> Totals {
    shards
        .iter()
        .filter_map(|shard| board.totals(shard))
        .fold(Totals::default(), |sum, one| Totals {
            consumed: sum.consumed.saturating_add(one.consumed),
            inserted: sum.inserted.saturating_add(one.inserted),
            refused: sum.refused.saturating_add(one.refused),
            produced: sum.produced.saturating_add(one.produced),
            dropped: sum.dropped.saturating_add(one.dropped),
            repeats: sum.repeats.saturating_add(one.repeats),
        })
}

/// A value, or a dash.
struct Shown<T>(Option<T>);

impl<T: fmt::Display> fmt::Display for Shown<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("-"),
        }
    }
}

/// A length of time in seconds, to a tenth.
struct Age(Option<Duration>);

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Shown(
            self.0
                .map(|age| format!("{}.{}s", age.as_secs(), age.subsec_millis() / 100)),
        )
        .fmt(f)
    }
}

struct Ledger<'t>(&'t Totals);

impl fmt::Display for Ledger<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Totals {
            consumed,
            inserted,
            refused,
            produced,
            dropped,
            repeats,
        } = self.0;
        write!(
            f,
            "consumed={consumed} inserted={inserted} refused={refused} produced={produced} dropped={dropped} repeats={repeats}"
        )
    }
}

#[cfg(test)]
mod tests {
    use shared::{
        board::{Phase, SlotBeat},
        launch::Role,
    };

    use super::*;
    use crate::{
        cap::Jitter,
        fleet::Duty,
        slot::{Cause, Event, Rules, Slot, step},
    };

    const RULES: Rules = Rules {
        tick: Duration::from_millis(250),
        reap_limit: Duration::from_secs(10),
        max_restarts: 10,
    };

    fn at(millis: u64) -> MonoNanos {
        MonoNanos::default().after(Duration::from_millis(millis))
    }

    fn post(events: Vec<(u64, Event)>, beat: Option<SlotBeat>) -> Post {
        let fold = |slot, (millis, event)| step(slot, event, at(millis)).0;
        let slot = events.into_iter().fold(Slot::new(RULES, at(0)), fold);
        Post::new(
            3,
            Duty {
                role: Role::Flush,
                index: 3,
                shards: "0-2,7".parse().unwrap(),
            },
            slot,
            beat,
        )
    }

    fn row(post: &Post, drift: Option<(i64, i64)>) -> String {
        let totals = Totals {
            consumed: 1,
            inserted: 2,
            refused: 3,
            produced: 4,
            dropped: 5,
            repeats: 6,
        };
        Row {
            post,
            drift,
            totals,
            now: at(61_234),
        }
        .to_string()
    }

    #[test]
    fn a_worker_has_a_line_with_every_column() {
        let beat = SlotBeat {
            pid: 7,
            healthy_since: Some(at(2_000)),
            backpressure_since: Some(at(50_000)),
            progress: 9,
            phase: Phase::Kafka,
            phase_since: at(61_000),
            in_flight: 12,
            queue_depth: 34,
            longest_gap: Duration::from_millis(1_550),
        };
        let died = Event::Died {
            cause: Cause::Exit(1),
            jitter: Jitter::default(),
        };
        let look = |beat| Event::Look(Some(beat));
        let events = vec![
            (0, Event::Look(None)),
            (1_234, died),
            (1_234, Event::Look(None)),
            (2_000, look(beat.clone())),
        ];
        assert_eq!(
            row(&post(events, Some(beat)), Some((-120, 35))),
            "worker slot=3 role=flush index=3 shards=0-2,7 pid=- generation=2 state=backpressured state_age=59.2s \
             phase=kafka phase_age=0.2s beat_age=59.2s backpressure_age=11.2s drift=-120..35ms in_flight=12 queue_depth=34 \
             longest_gap=1.5s restarts=1/10 failures=1 deaths=exit_1(60.0s) consumed=1 inserted=2 refused=3 produced=4 \
             dropped=5 repeats=6"
        );
    }

    #[test]
    fn what_is_not_known_is_a_dash() {
        let row = row(&post(Vec::new(), None), None);
        let unknown = "phase=- phase_age=- beat_age=- backpressure_age=- drift=- in_flight=- queue_depth=- longest_gap=- ";
        assert!(
            row.contains("pid=- generation=0 state=backoff state_age=61.2s ")
                && row.contains(unknown),
            "{row}"
        );
    }

    #[test]
    fn the_summary_counts_states() {
        let posts = [
            post(Vec::new(), None),
            post(vec![(0, Event::Look(None))], None),
            post(vec![(0, Event::Look(None))], None),
        ];
        let summary = Summary {
            posts: &posts,
            draining: true,
            totals: Totals::default(),
        }
        .to_string();
        assert!(
            summary.starts_with(
                "summary workers=3 mode=draining starting=2 backoff=1 failures=0 consumed=0 "
            ),
            "{summary}"
        );
    }
}
