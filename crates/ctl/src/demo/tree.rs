//! One segment as a tree.
//!
//! In:     a message of the output.
//! Out:    lines to print.
//! Keeps:  any message gives lines: cycles are cut, strangers stand at the top.
//! Knows:  the output's JSON.
//! Source: docs/spec.md 10.2.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use stand::topics::Message;

/// The number of spans that makes a good picture.
const WANTED: std::ops::RangeInclusive<usize> = 8..=24;

/// Keeps the message that is the better picture.
pub(super) fn prefer(shown: &mut Option<Message>, other: Message) {
    let fits = |message: &Message| spans(message).is_some_and(|spans| WANTED.contains(&spans));
    if shown.is_none() || (!shown.as_ref().is_some_and(fits) && fits(&other)) {
        *shown = Some(other);
    }
}

fn spans(message: &Message) -> Option<usize> {
    std::str::from_utf8(message.header("spans")?)
        .ok()?
        .parse()
        .ok()
}

/// The segment's spans under each other.
pub(super) fn lines(message: &Message) -> Vec<String> {
    let payload = message.payload.as_deref().unwrap_or_default();
    let segment: Value = serde_json::from_slice(payload).unwrap_or(Value::Null);
    let header = |name| {
        message
            .header(name)
            .map_or("?".into(), String::from_utf8_lossy)
    };
    let mut lines = vec![format!(
        "a segment: {} bytes, flush_id {}, due by {}, part {} of {}",
        payload.len(),
        header("flush_id"),
        header("reason"),
        header("part"),
        header("parts")
    )];
    let spans: Vec<&Value> = segment["spans"]
        .as_array()
        .map(|spans| spans.iter().take(200).collect())
        .unwrap_or_default();
    let ids: BTreeSet<&str> = spans
        .iter()
        .filter_map(|span| span["span_id"].as_str())
        .collect();
    let mut children: BTreeMap<Option<&str>, Vec<&Value>> = BTreeMap::new();
    for span in &spans {
        let parent = span["parent_span_id"]
            .as_str()
            .filter(|parent| ids.contains(parent) && Some(*parent) != span["span_id"].as_str());
        let parent = parent.filter(|_| span["is_segment"] != Value::Bool(true));
        children.entry(parent).or_default().push(span);
    }
    let mut drawn = BTreeSet::new();
    draw(None, "", &children, &mut drawn, &mut lines);
    lines
}

fn draw<'s>(
    parent: Option<&'s str>,
    indent: &str,
    children: &BTreeMap<Option<&'s str>, Vec<&'s Value>>,
    drawn: &mut BTreeSet<Option<&'s str>>,
    lines: &mut Vec<String>,
) {
    if !drawn.insert(parent) || indent.len() > 200 {
        return;
    }
    let spans = children.get(&parent).map(Vec::as_slice).unwrap_or_default();
    for (index, span) in spans.iter().enumerate() {
        let (branch, below) = if index + 1 == spans.len() {
            ("└─ ", "   ")
        } else {
            ("├─ ", "│  ")
        };
        let id = span["span_id"].as_str();
        let name = span["name"].as_str().unwrap_or("(no name)");
        let milliseconds = (span["end_timestamp"].as_f64().unwrap_or(0.0)
            - span["start_timestamp"].as_f64().unwrap_or(0.0))
            * 1_000.0;
        let shown: String = id.unwrap_or("?").chars().take(16).collect();
        lines.push(format!(
            "  {indent}{branch}{shown} {name} {milliseconds:.0} ms"
        ));
        draw(id, &format!("{indent}{below}"), children, drawn, lines);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_stand_under_their_parents_and_cycles_end() {
        let payload = br#"{"spans":[{"span_id":"a","name":"root"},{"span_id":"b","parent_span_id":"a"},{"span_id":"c","parent_span_id":"d"},{"span_id":"d","parent_span_id":"c"}]}"#;
        let message = Message {
            partition: 0,
            offset: 0,
            timestamp: None,
            key: None,
            payload: Some(payload.to_vec()),
            headers: Vec::new(),
        };
        let lines = lines(&message);
        assert_eq!(lines[1..], ["  └─ a root 0 ms", "     └─ b (no name) 0 ms"]);
    }
}
