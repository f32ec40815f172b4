//! Seeded traffic in the shapes of tracing: envelopes of a few spans, in order of arrival.
//!
//! In:     a seed and a plan.
//! Out:    envelopes, each with the messages of its spans.
//! Keeps:  the same seed and plan give the same bytes; every message is valid by the schema and has a serial number of its
//!         own; memory is what is under way, not what was sent.
//! Knows:  what tracing does to a buffer: children before parents, several services in a trace, late and missing spans,
//!         strange ids. Pure.
//! Source: docs/spec.md 2, 3.

use std::{collections::BTreeMap, ops::RangeInclusive, time::Duration};

use shared::time::{UnixMillis, millis};

use crate::{
    rng::Rng,
    span::{Span, render},
    topics::Record,
};

/// What traffic is like. Shares are in thousandths.
#[derive(Debug, Clone)]
pub struct TrafficPlan {
    /// Partitions of the input topic; a trace stands in one.
    pub partitions: u32,
    /// When the first trace begins.
    pub start: UnixMillis,
    /// How many traces there are.
    pub traces: u64,
    /// The time between the beginnings of two traces.
    pub trace_gap: Duration,
    /// The longest trace.
    pub trace_length: Duration,
    /// Spans in a trace: mostly few, now and then many.
    pub spans: RangeInclusive<u64>,
    /// Spans in an envelope.
    pub envelope: RangeInclusive<u64>,
    /// Services in a trace, each with a segment of its own.
    pub services: RangeInclusive<u64>,
    /// Projects, numbered from 1.
    pub projects: u64,
    /// The length of a message.
    pub payload_bytes: usize,
    /// The number of the first span.
    pub first_serial: u64,
    /// The share of envelopes that come late.
    pub late: u64,
    /// How late they come.
    pub late_by: Duration,
    /// The share of segments whose spans name their segment.
    pub known_segments: u64,
    /// The share of segments of which one span, maybe the root, is never sent.
    pub missing: u64,
    /// The share of ids that are no plain hex digits.
    pub odd_ids: u64,
}

impl Default for TrafficPlan {
    fn default() -> Self {
        Self {
            partitions: 8,
            start: UnixMillis(1_700_000_000_000),
            traces: 1_000,
            trace_gap: Duration::from_millis(20),
            trace_length: Duration::from_secs(5),
            spans: 1..=1_000,
            envelope: 1..=8,
            services: 1..=4,
            projects: 3,
            payload_bytes: 1_000,
            first_serial: 1,
            late: 10,
            late_by: Duration::from_secs(15),
            known_segments: 300,
            missing: 50,
            odd_ids: 20,
        }
    }
}

/// The message of one span.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanMessage {
    /// The partition of its trace.
    pub partition: u32,
    /// When it arrives: its time in Kafka.
    pub arrival: UnixMillis,
    /// Its serial number; none for a recorded span.
    pub serial: Option<u64>,
    /// The message.
    pub payload: Vec<u8>,
}

impl SpanMessage {
    /// The same, to be sent.
    #[must_use]
    pub fn record(&self) -> Record<'_> {
        Record {
            partition: i32::try_from(self.partition).unwrap_or(i32::MAX),
            time: Some(self.arrival),
            payload: Some(&self.payload),
            ..Record::default()
        }
    }
}

/// Spans that a client sent together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    /// When it arrives.
    pub arrival: UnixMillis,
    /// Its spans, in order.
    pub spans: Vec<SpanMessage>,
}

/// Envelopes in order of arrival.
#[derive(Debug)]
pub struct Traffic {
    plan: TrafficPlan,
    rng: Rng,
    begun: u64,
    next_serial: u64,
    /// Envelopes under way, by arrival and order of making.
    under_way: BTreeMap<(UnixMillis, u64), Vec<Span>>,
    made: u64,
}

impl Traffic {
    /// Traffic from its beginning.
    #[must_use]
    pub fn new(seed: u64, plan: TrafficPlan) -> Self {
        let next_serial = plan.first_serial;
        Self {
            plan,
            rng: Rng::new(seed),
            begun: 0,
            next_serial,
            under_way: BTreeMap::new(),
            made: 0,
        }
    }

    /// The spans of all envelopes, in order.
    pub fn spans(self) -> impl Iterator<Item = SpanMessage> {
        self.flat_map(|envelope| envelope.spans)
    }

    /// When the next trace begins; none when all have.
    fn next_start(&self) -> Option<UnixMillis> {
        let gap = millis(self.plan.trace_gap);
        (self.begun < self.plan.traces).then(|| UnixMillis(self.plan.start.0 + self.begun * gap))
    }

    /// Plans a trace: its segments, and the envelopes in which they come.
    fn begin_trace(&mut self, start: UnixMillis) {
        self.begun += 1;
        let trace = self.trace_id();
        let project = 1 + self.rng.below(self.plan.projects.max(1));
        let length = self
            .rng
            .skewed(&(1_000..=millis(self.plan.trace_length).max(1) * 1_000));
        let total = self.rng.skewed(&self.plan.spans).max(1);
        let services = self.rng.within(&self.plan.services).clamp(1, total.max(1));
        let root = Span {
            organization: 1,
            project,
            trace,
            start: start.0 * 1_000,
            end: start.0 * 1_000 + length,
            ..Span::default()
        };
        let mut left = total;
        let mut segments: Vec<Vec<Span>> = Vec::new();
        for service in 1..=services {
            let others = services - service;
            let size = if others == 0 {
                left
            } else {
                1 + self.rng.below(left - others)
            };
            left -= size;
            let caller = segments
                .get(self.index(segments.len()))
                .and_then(|spans| self.rng.choose(spans))
                .cloned();
            let within = caller.as_ref().unwrap_or(&root);
            let segment = self.segment(
                within,
                caller.as_ref().map(|span| span.id.clone()),
                service,
                size,
            );
            segments.push(segment);
        }
        for spans in segments {
            self.send(spans);
        }
    }

    /// A segment's spans, parents before children: a tree within the time of `within`.
    fn segment(
        &mut self,
        within: &Span,
        caller: Option<String>,
        service: u64,
        size: u64,
    ) -> Vec<Span> {
        let is_called = caller.is_some();
        let mut root = self.child(within, caller);
        (root.service, root.segment, root.is_segment) = (service, None, Some(true));
        if !is_called && self.rng.chance(500) {
            // Without a parent a span is a root, whatever it says.
            root.is_segment = None;
        }
        let known = self
            .rng
            .chance(self.plan.known_segments)
            .then(|| root.id.clone());
        let mut spans = vec![root];
        while spans.len() < usize::try_from(size).unwrap_or(usize::MAX) {
            let parent = spans[self.index(spans.len())].clone();
            let mut child = self.child(&parent, Some(parent.id.clone()));
            child.is_segment = [Some(false), None][self.index(2)];
            child.segment.clone_from(&known);
            spans.push(child);
        }
        spans
    }

    /// A span within the time of another.
    fn child(&mut self, within: &Span, parent: Option<String>) -> Span {
        let start = within.start + self.rng.below((within.end - within.start) / 2 + 1);
        let end = start + self.rng.below(within.end - start + 1);
        Span {
            id: self.span_id(),
            parent,
            start,
            end,
            ..within.clone()
        }
    }

    /// Puts a segment's spans on their way: children before parents, a few in each envelope.
    fn send(&mut self, mut spans: Vec<Span>) {
        if spans.len() > 1 && self.rng.chance(self.plan.missing) {
            let lost = self.index(spans.len());
            spans.remove(lost);
        }
        // Stable and reversed: of two that end together, the child stands first.
        spans.reverse();
        spans.sort_by_key(|span| span.end);
        let mut spans = spans.into_iter().peekable();
        while let Some(last) = spans.peek() {
            let mut arrival = last.end / 1_000;
            let count =
                usize::try_from(self.rng.within(&self.plan.envelope).max(1)).unwrap_or(usize::MAX);
            let envelope: Vec<Span> = spans.by_ref().take(count).collect();
            if let Some(last) = envelope.last() {
                arrival = arrival.max(last.end / 1_000) + 1 + self.rng.below(50);
            }
            if self.rng.chance(self.plan.late) {
                arrival += millis(self.plan.late_by);
            }
            self.made += 1;
            self.under_way
                .insert((UnixMillis(arrival), self.made), envelope);
        }
    }

    fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.rng.below(u64::try_from(length).unwrap_or(u64::MAX))).unwrap_or(0)
    }

    /// The schema wants 32 to 36 characters.
    fn trace_id(&mut self) -> String {
        let hex = format!("{:016x}{:016x}", self.rng.bits(), self.rng.bits());
        if !self.rng.chance(self.plan.odd_ids) {
            return hex;
        }
        match self.rng.below(4) {
            0 => dashed(&hex),
            1 => format!("{{{}}}:{{}}", &hex[4..]),
            2 => hex.to_uppercase(),
            _ => format!("{}\u{0}\"\\é:", &hex[4..]),
        }
    }

    fn span_id(&mut self) -> String {
        let hex = format!("{:016x}", self.rng.bits());
        if !self.rng.chance(self.plan.odd_ids) {
            return hex;
        }
        match self.rng.below(6) {
            0 => dashed(&format!("{hex}{hex}")),
            1 => String::new(),
            2 => hex.repeat(32)[..500].to_owned(),
            3 => format!("{{{hex}}}:{{}}"),
            4 => hex.to_uppercase(),
            _ => format!("{hex}\u{0}\"\\é"),
        }
    }

    fn message(&mut self, span: &Span, arrival: UnixMillis) -> SpanMessage {
        let serial = self.next_serial;
        self.next_serial += 1;
        SpanMessage {
            partition: partition_of(span.trace.as_bytes(), self.plan.partitions),
            arrival,
            serial: Some(serial),
            payload: render(span, serial, self.plan.payload_bytes, &mut self.rng),
        }
    }
}

impl Iterator for Traffic {
    type Item = Envelope;

    fn next(&mut self) -> Option<Envelope> {
        while let Some(start) = self.next_start() {
            // Nothing of a trace arrives before it begins.
            if self
                .under_way
                .first_key_value()
                .is_some_and(|(&(arrival, _), _)| arrival < start)
            {
                break;
            }
            self.begin_trace(start);
        }
        let ((arrival, _), spans) = self.under_way.pop_first()?;
        let spans = spans
            .iter()
            .map(|span| self.message(span, arrival))
            .collect();
        Some(Envelope { arrival, spans })
    }
}

/// The partition of a trace: a hash of its id (FNV-1a), so that a trace stands in one.
#[must_use]
pub fn partition_of(trace: &[u8], partitions: u32) -> u32 {
    let hash = trace.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    // The high half: the low bits of this hash are the weaker ones.
    u32::try_from((hash >> 32) % u64::from(partitions.max(1))).unwrap_or(0)
}

/// 32 hex digits with the dashes of a UUID.
fn dashed(hex: &str) -> String {
    [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..32],
    ]
    .join("-")
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};

    use serde_json::Value;

    use super::*;
    use crate::span::SERIAL;

    fn plan() -> TrafficPlan {
        TrafficPlan {
            traces: 300,
            odd_ids: 100,
            payload_bytes: 900,
            ..TrafficPlan::default()
        }
    }

    fn values(plan: TrafficPlan) -> Vec<(SpanMessage, Value)> {
        let parse = |span: SpanMessage| {
            let value = serde_json::from_slice(&span.payload).unwrap();
            (span, value)
        };
        Traffic::new(5, plan).spans().map(parse).collect()
    }

    /// The rules of ingest-spans.v1.schema.json, for the fields that are sent.
    fn assert_valid(span: &Value) {
        let trace = span["trace_id"].as_str().unwrap().chars().count();
        assert!((32..=36).contains(&trace), "{span}");
        assert!(
            span["span_id"].is_string()
                && (span["parent_span_id"].is_string() || span["parent_span_id"].is_null())
        );
        assert!(span["organization_id"].is_u64() && span["project_id"].is_u64());
        assert!(
            ["start_timestamp", "end_timestamp", "received"]
                .iter()
                .all(|key| span[key].as_f64().unwrap() > 1.6e9)
        );
        assert!(span["retention_days"].as_u64().unwrap() < 65_536);
        assert!(span["name"].is_string() && span["status"] == "ok");
        assert!(span.get("is_segment").is_none_or(Value::is_boolean));
        for attribute in span["attributes"].as_object().unwrap().values() {
            let value = &attribute["value"];
            assert!(match attribute["type"].as_str().unwrap() {
                "string" => value.is_string(),
                "integer" => value.is_u64(),
                "double" => value.is_f64(),
                "boolean" => value.is_boolean(),
                other => panic!("{other}"),
            });
        }
    }

    #[test]
    fn every_message_is_valid_numbered_and_about_as_long_as_told() {
        let spans = values(plan());
        let mut last = plan().start;
        for (index, (span, value)) in spans.iter().enumerate() {
            assert_valid(value);
            let serial = u64::try_from(index).unwrap() + 1;
            assert_eq!(
                (span.serial, value["attributes"][SERIAL]["value"].as_u64()),
                (Some(serial), Some(serial))
            );
            assert!(span.arrival >= last);
            last = span.arrival;
            assert!(span.partition < 8);
        }
        let bytes: usize = spans.iter().map(|(span, _)| span.payload.len()).sum();
        assert!(
            (850..1_000).contains(&(bytes / spans.len())),
            "{}",
            bytes / spans.len()
        );
    }

    #[test]
    fn traffic_is_the_same_for_the_same_seed_alone() {
        let all = |seed| {
            Traffic::new(
                seed,
                TrafficPlan {
                    traces: 20,
                    ..plan()
                },
            )
            .collect::<Vec<Envelope>>()
        };
        assert_eq!(all(1), all(1));
        assert_ne!(all(1), all(2));
    }

    #[test]
    fn all_the_shapes_of_tracing_are_there() {
        let spans = values(plan());
        let mut traces: HashMap<&str, Vec<&(SpanMessage, Value)>> = HashMap::new();
        for span in &spans {
            traces
                .entry(span.1["trace_id"].as_str().unwrap())
                .or_default()
                .push(span);
        }
        let sizes: BTreeSet<usize> = traces.values().map(Vec::len).collect();
        assert!(
            sizes.first() == Some(&1) && sizes.last() > Some(&300),
            "{sizes:?}"
        );
        let (mut child_first, mut segments, mut orphans, mut known) = (0, 0, 0, 0);
        for spans in traces.values() {
            assert!(
                spans
                    .iter()
                    .all(|(span, _)| span.partition == spans[0].0.partition)
            );
            let place: HashMap<&Value, usize> = spans
                .iter()
                .enumerate()
                .map(|(place, (_, value))| (&value["span_id"], place))
                .collect();
            for (index, (_, value)) in spans.iter().enumerate() {
                let parent = &value["parent_span_id"];
                match place.get(parent) {
                    Some(&place) if place > index => child_first += 1,
                    None if !parent.is_null() => orphans += 1,
                    _ => {}
                }
                segments += u32::from(value["is_segment"] == true && !parent.is_null());
                known += u32::from(value["attributes"].get("sentry.segment.id").is_some());
            }
        }
        assert!(child_first > spans.len() / 3 && segments > 100 && orphans > 10 && known > 1_000);
        let ids: BTreeSet<&str> = spans
            .iter()
            .filter_map(|(_, value)| value["span_id"].as_str())
            .collect();
        for has in [
            |id: &&str| id.is_empty(),
            |id: &&str| id.len() == 500,
            |id: &&str| id.contains("}:{}"),
            |id: &&str| id.matches('-').count() == 4,
        ] {
            assert!(ids.iter().any(has));
        }
    }

    #[test]
    fn traces_are_spread_over_all_partitions() {
        let mut counts = [0_u32; 8];
        for (span, _) in values(TrafficPlan {
            spans: 1..=1,
            traces: 800,
            ..plan()
        }) {
            counts[usize::try_from(span.partition).unwrap()] += 1;
        }
        assert!(counts.iter().all(|&count| count > 60), "{counts:?}");
    }
}
