//! A board as people and programs read it: a line for each worker and a summary, or one JSON object.
//!
//! In:     the board; `now`, and the wall clock that drift is measured against.
//! Out:    lines of `key=value`; JSON with the same columns.
//! Keeps:  `kill -USR1` and `spanctl status` show the same; whatever the cells hold, it is shown.
//! Knows:  how a reading is shown. It changes nothing.
//! Source: docs/supervision.md 4.

use std::{collections::BTreeMap, fmt, time::Duration};

use super::{
    layout::SlotState,
    standing::Standing,
    views::{Board, SlotBeat, Totals},
};
use crate::{
    launch::Role,
    shard::ShardList,
    time::{MonoNanos, UnixMillis, millis},
};

/// Everything that is shown, at one moment.
#[derive(Debug)]
pub struct View {
    /// A row for each slot.
    pub rows: Vec<Row>,
    draining: bool,
    supervisor: u32,
    totals: Totals,
    wall_now: UnixMillis,
}

/// A worker's row.
#[derive(Debug)]
pub struct Row {
    slot: u32,
    shards: Option<ShardList>,
    /// How it stands; none before the supervisor's first turn.
    pub standing: Option<Standing>,
    beat: Option<SlotBeat>,
    /// Of the shard that is furthest behind, and of the one furthest ahead.
    drift: Option<(i64, i64)>,
    totals: Totals,
    now: MonoNanos,
}

impl Board {
    /// Reads everything that is shown.
    #[must_use]
    pub fn view(&self, now: MonoNanos, wall_now: UnixMillis) -> View {
        let standings: Vec<Option<Standing>> =
            (0..self.slots()).map(|slot| self.standing(slot)).collect();
        let workers = |role: Role| {
            let alike = standings.iter().flatten();
            u32::try_from(alike.filter(|standing| standing.role == role).count()).unwrap_or(1)
        };
        let counts = [Role::Flush, Role::Ingest].map(|role| (role, workers(role)));
        let rows = (0..)
            .zip(standings)
            .map(|(slot, standing)| {
                let shards = standing.as_ref().and_then(|standing| {
                    let (_, count) = counts.iter().find(|(role, _)| *role == standing.role)?;
                    let index = usize::try_from(standing.index).ok()?;
                    self.shards().share(*count).get(index).cloned()
                });
                let beat = standing
                    .as_ref()
                    .filter(|standing| standing.child.is_some())
                    .and_then(|standing| self.beat(slot, standing.generation, now));
                Row {
                    slot,
                    drift: shards
                        .as_ref()
                        .and_then(|shards| self.drift(shards, now, wall_now)),
                    totals: shards
                        .as_ref()
                        .map_or_else(Totals::default, |shards| self.sum(shards)),
                    shards,
                    standing,
                    beat,
                    now,
                }
            })
            .collect();
        View {
            rows,
            draining: self.is_draining(),
            supervisor: self.supervisor(),
            totals: self.sum(self.shards()),
            wall_now,
        }
    }

    /// The drift of the shards with a clock: least and most.
    fn drift(
        &self,
        shards: &ShardList,
        now: MonoNanos,
        wall_now: UnixMillis,
    ) -> Option<(i64, i64)> {
        let millis = |moment: UnixMillis| i64::try_from(moment.0).unwrap_or(i64::MAX);
        let drifts = || {
            shards
                .iter()
                .filter_map(|shard| Some(millis(self.clock(shard)?.read(now)) - millis(wall_now)))
        };
        drifts().min().zip(drifts().max())
    }

    /// The ledgers of the shards, added up.
    fn sum(&self, shards: &ShardList) -> Totals {
        shards
            .iter()
            .filter_map(|shard| self.totals(shard))
            .fold(Totals::default(), |sum, one| Totals {
                consumed: sum.consumed.saturating_add(one.consumed),
                inserted: sum.inserted.saturating_add(one.inserted),
                refused: sum.refused.saturating_add(one.refused),
                produced: sum.produced.saturating_add(one.produced),
                dropped: sum.dropped.saturating_add(one.dropped),
                repeats: sum.repeats.saturating_add(one.repeats),
            })
    }
}

impl View {
    /// A line for each worker, and the summary.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let rows = self.rows.iter().map(|row| {
            let columns = row.columns().into_iter();
            let words = columns.map(|(name, value)| format!(" {name}={value}"));
            format!("worker{}", words.collect::<String>())
        });
        rows.chain([self.summary()]).collect()
    }

    fn summary(&self) -> String {
        let states = self.states();
        let states = states
            .iter()
            .map(|(state, count)| format!(" {state}={count}"));
        format!(
            "summary workers={} mode={}{} failures={} {}",
            self.rows.len(),
            self.mode(),
            states.collect::<String>(),
            self.failures(),
            words(&self.totals)
        )
    }

    fn mode(&self) -> &'static str {
        if self.draining { "draining" } else { "running" }
    }

    fn states(&self) -> BTreeMap<SlotState, u32> {
        let mut states = BTreeMap::new();
        for standing in self.rows.iter().filter_map(|row| row.standing.as_ref()) {
            *states.entry(standing.state).or_insert(0) += 1;
        }
        states
    }

    fn failures(&self) -> u64 {
        let standings = self.rows.iter().filter_map(|row| row.standing.as_ref());
        standings.map(|standing| standing.lifetime).sum()
    }

    /// The same as one JSON object. Ages are in milliseconds; what is not known is null.
    #[must_use]
    pub fn json(&self) -> String {
        let workers: Vec<String> = self.rows.iter().map(Row::json).collect();
        let states: Vec<String> = self
            .states()
            .iter()
            .map(|(state, count)| format!("\"{state}\":{count}"))
            .collect();
        format!(
            "{{\"time_ms\":{},\"supervisor\":{},\"mode\":\"{}\",\"states\":{{{}}},\"failures\":{},\"totals\":{},\"workers\":[{}]}}",
            self.wall_now,
            self.supervisor,
            self.mode(),
            states.join(","),
            self.failures(),
            object(&self.totals),
            workers.join(",")
        )
    }
}

impl Row {
    /// Names and values, in the order in which they are shown.
    #[must_use]
    pub fn columns(&self) -> Vec<(&'static str, String)> {
        let (standing, beat) = (self.standing.as_ref(), self.beat.as_ref());
        let ago = |moment: MonoNanos| self.now.since(moment);
        let deaths: Vec<String> = standing
            .iter()
            .flat_map(|standing| standing.deaths.iter().rev())
            .map(|death| format!("{}({})", death.cause, age(ago(death.at))))
            .collect();
        let mut columns = vec![
            ("slot", self.slot.to_string()),
            ("role", shown(standing.map(|standing| standing.role))),
            ("index", shown(standing.map(|standing| standing.index))),
            ("shards", shown(self.shards.as_ref())),
            ("pid", shown(standing.and_then(|standing| standing.child))),
            (
                "generation",
                shown(standing.map(|standing| standing.generation)),
            ),
            ("state", shown(standing.map(|standing| standing.state))),
            (
                "state_age",
                shown(standing.map(|standing| age(ago(standing.since)))),
            ),
            ("phase", shown(beat.map(|beat| beat.phase))),
            (
                "phase_age",
                shown(beat.map(|beat| age(ago(beat.phase_since)))),
            ),
            ("beat_age", shown(self.beat_age().map(age))),
            (
                "rate",
                shown(beat.and(standing).map(|standing| {
                    let rate = standing.rate;
                    format!("{}.{}/s", rate / 10, rate % 10)
                })),
            ),
            ("backpressure_age", shown(self.backpressure_age().map(age))),
            (
                "drift",
                match self.drift {
                    None => "-".into(),
                    Some((least, most)) if least == most => format!("{least}ms"),
                    Some((least, most)) => format!("{least}..{most}ms"),
                },
            ),
            ("in_flight", shown(beat.map(|beat| beat.in_flight))),
            ("queue_depth", shown(beat.map(|beat| beat.queue_depth))),
            (
                "longest_gap",
                shown(beat.map(|beat| {
                    let percent = self
                        .gap_percent()
                        .map_or(String::new(), |percent| format!("({percent}%)"));
                    format!("{}{percent}", age(beat.longest_gap))
                })),
            ),
            (
                "restarts",
                shown(
                    standing
                        .map(|standing| format!("{}/{}", standing.failures, standing.max_restarts)),
                ),
            ),
            (
                "failures",
                shown(standing.map(|standing| standing.lifetime)),
            ),
            (
                "deaths",
                shown(Some(deaths.join(",")).filter(|deaths| !deaths.is_empty())),
            ),
            (
                "tracer",
                shown(standing.and_then(|standing| standing.tracer)),
            ),
        ];
        columns.extend(fields(&self.totals).map(|(name, value)| (name, value.to_string())));
        columns
    }

    fn beat_age(&self) -> Option<Duration> {
        let moved = self.standing.as_ref()?.moved;
        self.beat
            .as_ref()
            .and(moved)
            .map(|moved| self.now.since(moved))
    }

    fn backpressure_age(&self) -> Option<Duration> {
        let since = self.beat.as_ref()?.backpressure_since?;
        Some(self.now.since(since))
    }

    /// The longest gap as a share of the budget.
    fn gap_percent(&self) -> Option<u64> {
        let hang = millis(self.standing.as_ref()?.hang);
        let gap = millis(self.beat.as_ref()?.longest_gap);
        gap.saturating_mul(100).checked_div(hang)
    }

    fn json(&self) -> String {
        let (standing, beat) = (self.standing.as_ref(), self.beat.as_ref());
        let ago = |moment: MonoNanos| millis(self.now.since(moment));
        let deaths: Vec<String> = standing
            .iter()
            .flat_map(|standing| standing.deaths.iter().rev())
            .map(|death| {
                format!(
                    "{{\"cause\":\"{}\",\"age_ms\":{}}}",
                    death.cause,
                    ago(death.at)
                )
            })
            .collect();
        let columns = [
            ("slot", self.slot.to_string()),
            ("role", text(standing.map(|standing| standing.role))),
            ("index", or_null(standing.map(|standing| standing.index))),
            ("shards", text(self.shards.as_ref())),
            ("pid", or_null(standing.and_then(|standing| standing.child))),
            (
                "generation",
                or_null(standing.map(|standing| standing.generation)),
            ),
            ("state", text(standing.map(|standing| standing.state))),
            (
                "state_age_ms",
                or_null(standing.map(|standing| ago(standing.since))),
            ),
            ("phase", text(beat.map(|beat| beat.phase))),
            (
                "phase_age_ms",
                or_null(beat.map(|beat| ago(beat.phase_since))),
            ),
            ("beat_age_ms", or_null(self.beat_age().map(millis))),
            (
                "rate",
                or_null(
                    beat.and(standing)
                        .map(|standing| format!("{}.{}", standing.rate / 10, standing.rate % 10)),
                ),
            ),
            (
                "backpressure_age_ms",
                or_null(self.backpressure_age().map(millis)),
            ),
            (
                "drift_least_ms",
                or_null(self.drift.map(|(least, _)| least)),
            ),
            ("drift_most_ms", or_null(self.drift.map(|(_, most)| most))),
            ("in_flight", or_null(beat.map(|beat| beat.in_flight))),
            ("queue_depth", or_null(beat.map(|beat| beat.queue_depth))),
            (
                "longest_gap_ms",
                or_null(beat.map(|beat| millis(beat.longest_gap))),
            ),
            ("gap_percent", or_null(self.gap_percent())),
            (
                "restarts",
                or_null(standing.map(|standing| standing.failures)),
            ),
            (
                "max_restarts",
                or_null(standing.map(|standing| standing.max_restarts)),
            ),
            (
                "failures",
                or_null(standing.map(|standing| standing.lifetime)),
            ),
            ("deaths", format!("[{}]", deaths.join(","))),
            (
                "tracer",
                or_null(standing.and_then(|standing| standing.tracer)),
            ),
            ("totals", object(&self.totals)),
        ];
        let columns = columns.map(|(name, value)| format!("\"{name}\":{value}"));
        format!("{{{}}}", columns.join(","))
    }
}

fn fields(totals: &Totals) -> [(&'static str, u64); 6] {
    let Totals {
        consumed,
        inserted,
        refused,
        produced,
        dropped,
        repeats,
    } = *totals;
    [
        ("consumed", consumed),
        ("inserted", inserted),
        ("refused", refused),
        ("produced", produced),
        ("dropped", dropped),
        ("repeats", repeats),
    ]
}

fn words(totals: &Totals) -> String {
    fields(totals)
        .map(|(name, value)| format!("{name}={value}"))
        .join(" ")
}

fn object(totals: &Totals) -> String {
    let fields = fields(totals).map(|(name, value)| format!("\"{name}\":{value}"));
    format!("{{{}}}", fields.join(","))
}

/// A value, or a dash.
fn shown(value: Option<impl fmt::Display>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

/// A length of time in seconds, to a tenth.
fn age(age: Duration) -> String {
    format!("{}.{}s", age.as_secs(), age.subsec_millis() / 100)
}

/// A number, or null.
fn or_null(value: Option<impl fmt::Display>) -> String {
    value.map_or_else(|| "null".into(), |value| value.to_string())
}

/// A text, or null. Names of ours and lists of numbers only: nothing in them has to be escaped.
fn text(value: Option<impl fmt::Display>) -> String {
    value.map_or_else(|| "null".into(), |value| format!("\"{value}\""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::{Cause, Death, Phase, views::tests::board};

    fn at(millis: u64) -> MonoNanos {
        MonoNanos::default().after(Duration::from_millis(millis))
    }

    fn standing(role: Role, index: u32) -> Standing {
        Standing {
            role,
            index,
            generation: 2,
            state: SlotState::Backpressured,
            since: at(2_000),
            healthy_once: true,
            child: Some(7),
            moved: Some(at(60_000)),
            rate: 123,
            failures: 1,
            max_restarts: 10,
            lifetime: 3,
            hang: Duration::from_secs(60),
            tracer: None,
            deaths: vec![Death {
                at: at(1_234),
                cause: Cause::Hang(Phase::Work),
            }],
        }
    }

    #[test]
    fn every_column_is_explained() {
        let text = include_str!("../../../../docs/operations.md");
        let (_, after) = text.split_once("## Columns").unwrap();
        let table = after.split("\n## ").next().unwrap();
        let board = board("0", 1);
        let view = board.view(at(1), UnixMillis(5));
        for (name, _) in view.rows[0].columns() {
            assert!(table.contains(&format!("`{name}`")), "{name}");
        }
    }

    #[test]
    fn a_worker_has_a_line_with_every_column() {
        let board = board("0-2,7", 3);
        board.supervise(0).begin(2);
        board.supervise(0).show(&standing(Role::Flush, 0));
        board.supervise(1).show(&standing(Role::Flush, 1));
        board.show_draining(true);
        let view = board.view(at(61_234), UnixMillis(5));
        let lines = view.lines();
        assert_eq!(
            lines[0],
            "worker slot=0 role=flush index=0 shards=0,2 pid=7 generation=2 state=backpressured state_age=59.2s phase=- \
             phase_age=- beat_age=- rate=- backpressure_age=- drift=- in_flight=- queue_depth=- longest_gap=- restarts=1/10 \
             failures=3 deaths=hang_work(60.0s) tracer=- consumed=0 inserted=0 refused=0 produced=0 dropped=0 repeats=0"
        );
        assert!(
            lines[2]
                .starts_with("worker slot=2 role=- index=- shards=- pid=- generation=- state=- ")
        );
        assert_eq!(
            lines[3],
            "summary workers=3 mode=draining backpressured=2 failures=6 consumed=0 inserted=0 refused=0 produced=0 dropped=0 repeats=0"
        );
        let json = view.json();
        for part in [
            "{\"time_ms\":5,\"supervisor\":",
            "\"mode\":\"draining\",\"states\":{\"backpressured\":2},\"failures\":6,",
            "{\"slot\":0,\"role\":\"flush\",\"index\":0,\"shards\":\"0,2\",\"pid\":7,",
            "\"phase\":null,",
            "\"deaths\":[{\"cause\":\"hang_work\",\"age_ms\":60000}]",
        ] {
            assert!(json.contains(part), "{part}: {json}");
        }
    }

    #[test]
    fn a_beat_fills_its_columns() {
        let board = board("0", 1);
        board.supervise(0).begin(2);
        board.supervise(0).show(&standing(Role::Flush, 0));
        let cells = board.worker(0, 2);
        cells.echo();
        cells.phase(Phase::Kafka);
        cells.in_flight(12);
        let now = crate::time::Clock::mono_now();
        let line = board.view(now, UnixMillis(5)).lines().remove(0);
        for part in [
            " phase=kafka phase_age=0.",
            " rate=12.3/s ",
            " in_flight=12 ",
            " longest_gap=0.0s(0%) ",
        ] {
            assert!(line.contains(part), "{part}: {line}");
        }
    }

    #[test]
    fn garbage_is_shown_and_harms_nobody() {
        let board = board("0", 1);
        board.supervise(0).show(&Standing {
            generation: u32::MAX,
            rate: u64::MAX,
            lifetime: u64::MAX,
            hang: Duration::ZERO,
            since: MonoNanos(u64::MAX),
            ..standing(Role::Check, u32::MAX)
        });
        let view = board.view(at(1), UnixMillis(5));
        assert_eq!(view.lines().len(), 2);
        assert!(view.json().ends_with("}"));
    }
}
