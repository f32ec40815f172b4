//! What was sent against what came out, span by span.
//!
//! In:     messages as they were sent; messages of the output topics.
//! Out:    `Balance`: missing, repeated, unknown and altered spans.
//! Keeps:  knows nothing of our own parser or splicer: what it says is not said by what it examines.
//! Knows:  a span by its serial number, or else by its text outside the two places that may be edited.
//! Source: docs/spec.md 5.2, docs/house.md 13.

use std::{
    collections::{BTreeMap, HashMap, hash_map::DefaultHasher},
    fmt,
    hash::{Hash, Hasher},
};

use serde_json::value::RawValue;

use crate::{StandError, span::SERIAL, topics::Message, traffic::SpanMessage};

/// How many of each kind a report shows.
const SHOWN: usize = 10;

/// What tells a span from all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mark {
    /// Its serial number.
    Serial(u64),
    /// A hash of its text, for spans without one.
    Text(u128),
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Serial(serial) => serial.fmt(f),
            Self::Text(hash) => write!(f, "{hash:032x}"),
        }
    }
}

/// What was sent, and what was read of it.
#[derive(Debug, Default)]
pub struct Ledger {
    spans: HashMap<Mark, Fate>,
    flushes: Vec<String>,
    flush_numbers: HashMap<String, usize>,
    messages: u64,
    produced: u64,
    unmarked: Vec<Mark>,
    twice: Vec<(Mark, String)>,
    malformed: Vec<String>,
}

/// What became of a span.
#[derive(Debug, Default)]
struct Fate {
    sent: bool,
    /// A hash of the text that was sent.
    text: Option<u128>,
    altered: bool,
    /// The messages in which it came out, as numbers of flush ids.
    flushes: Vec<usize>,
}

/// A span that came out more than once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repeat {
    /// The span.
    pub mark: Mark,
    /// The flush ids of the messages that hold it.
    pub flush_ids: Vec<String>,
}

impl Repeat {
    /// Whether the same message came again: its flush id tells a reader so.
    #[must_use]
    pub fn is_explained(&self) -> bool {
        self.flush_ids.windows(2).all(|pair| pair[0] == pair[1])
    }
}

/// How sent and produced compare.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Balance {
    /// Distinct spans sent.
    pub sent: u64,
    /// Messages read.
    pub messages: u64,
    /// Spans in them.
    pub produced: u64,
    /// Distinct spans of those sent that came out.
    pub produced_distinct: u64,
    /// Sent, and in no message.
    pub missing: Vec<Mark>,
    /// In several messages.
    pub repeats: Vec<Repeat>,
    /// Several times in one message, and its flush id: always wrong.
    pub twice: Vec<(Mark, String)>,
    /// In a message, and never sent.
    pub unknown: Vec<Mark>,
    /// Came out with another text than was sent, outside the two places that may be edited.
    pub altered: Vec<Mark>,
    /// Came out without a segment id, or without an `is_segment` that says yes or no.
    pub unmarked: Vec<Mark>,
    /// Messages that are no segments, and why.
    pub malformed: Vec<String>,
}

impl Balance {
    /// Sent − produced − dropped: 0 when every span is accounted for.
    #[must_use]
    pub fn difference(&self, dropped: u64) -> i128 {
        i128::from(self.sent) - i128::from(self.produced_distinct) - i128::from(dropped)
    }

    /// The repeats whose messages have different flush ids.
    pub fn unexplained_repeats(&self) -> impl Iterator<Item = &Repeat> {
        self.repeats.iter().filter(|repeat| !repeat.is_explained())
    }

    /// Whether each sent span came out, as it was, and nothing else; messages that were sent again are allowed.
    #[must_use]
    pub fn is_even(&self) -> bool {
        self.missing.is_empty() && self.unexplained_repeats().next().is_none() && self.is_clean()
    }

    /// Whether each sent span came out once.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.is_even() && self.repeats.is_empty()
    }

    /// Whether what came out is what was sent, however often.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.twice.is_empty()
            && self.unknown.is_empty()
            && self.altered.is_empty()
            && self.unmarked.is_empty()
            && self.malformed.is_empty()
    }
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "sent={} messages={} produced={} produced_distinct={} missing={} repeats={} unexplained_repeats={} twice={} \
             unknown={} altered={} unmarked={} malformed={}",
            self.sent,
            self.messages,
            self.produced,
            self.produced_distinct,
            self.missing.len(),
            self.repeats.len(),
            self.unexplained_repeats().count(),
            self.twice.len(),
            self.unknown.len(),
            self.altered.len(),
            self.unmarked.len(),
            self.malformed.len(),
        )?;
        for (name, marks) in [
            ("missing", &self.missing),
            ("unknown", &self.unknown),
            ("altered", &self.altered),
            ("unmarked", &self.unmarked),
        ] {
            if !marks.is_empty() {
                let shown: Vec<String> = marks.iter().take(SHOWN).map(Mark::to_string).collect();
                write!(f, "\n  {name}: {}", shown.join(" "))?;
            }
        }
        for repeat in self.unexplained_repeats().take(SHOWN) {
            write!(
                f,
                "\n  repeat: {} in {}",
                repeat.mark,
                repeat.flush_ids.join(" ")
            )?;
        }
        for (mark, flush_id) in self.twice.iter().take(SHOWN) {
            write!(f, "\n  twice: {mark} in {flush_id}")?;
        }
        self.malformed
            .iter()
            .take(SHOWN)
            .try_for_each(|reason| write!(f, "\n  malformed: {reason}"))
    }
}

impl Ledger {
    /// An empty ledger.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes a message that was sent; an equal one again is no other span.
    ///
    /// # Errors
    /// [`StandError::Malformed`] when it is no JSON object: such a message is not expected in the output.
    pub fn sent(&mut self, payload: &[u8]) -> Result<(), StandError> {
        let read = read_span(payload).map_err(|reason| StandError::Malformed {
            what: "a sent message".into(),
            reason,
        })?;
        let fate = self.spans.entry(read.mark).or_default();
        (fate.sent, fate.text) = (true, Some(read.text));
        Ok(())
    }

    /// Notes messages that were sent.
    ///
    /// # Errors
    /// As [`Ledger::sent`].
    pub fn sent_all<'m>(
        &mut self,
        messages: impl IntoIterator<Item = &'m SpanMessage>,
    ) -> Result<(), StandError> {
        messages
            .into_iter()
            .try_for_each(|message| self.sent(&message.payload))
    }

    /// Notes spans that were sent, by their serial numbers alone: cheaper, and their text is not compared.
    pub fn sent_serials(&mut self, serials: impl IntoIterator<Item = u64>) {
        for serial in serials {
            self.spans.entry(Mark::Serial(serial)).or_default().sent = true;
        }
    }

    /// Notes messages of an output topic. What is wrong with one stands in the balance.
    pub fn read_output<'m>(&mut self, messages: impl IntoIterator<Item = &'m Message>) {
        for message in messages {
            self.messages += 1;
            if let Err(reason) = self.read_message(message.payload.as_deref().unwrap_or_default()) {
                self.malformed.push(format!(
                    "partition={} offset={}: {reason}",
                    message.partition, message.offset
                ));
            }
        }
    }

    /// Whether every span sent has come out: cheap enough to be asked after each read.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.spans
            .values()
            .all(|fate| !fate.sent || !fate.flushes.is_empty())
    }

    /// How things stand.
    #[must_use]
    pub fn balance(&self) -> Balance {
        let mut balance = Balance {
            messages: self.messages,
            produced: self.produced,
            unmarked: self.unmarked.clone(),
            twice: self.twice.clone(),
            malformed: self.malformed.clone(),
            ..Balance::default()
        };
        for (&mark, fate) in &self.spans {
            balance.sent += u64::from(fate.sent);
            match (fate.sent, fate.flushes.is_empty()) {
                (true, true) => balance.missing.push(mark),
                (true, false) => balance.produced_distinct += 1,
                (false, _) => balance.unknown.push(mark),
            }
            if fate.altered {
                balance.altered.push(mark);
            }
            if fate.flushes.len() > 1 {
                let flush_ids = fate
                    .flushes
                    .iter()
                    .map(|&flush| self.flushes[flush].clone())
                    .collect();
                balance.repeats.push(Repeat { mark, flush_ids });
            }
        }
        balance.missing.sort_unstable();
        balance.unknown.sort_unstable();
        balance.altered.sort_unstable();
        balance.repeats.sort_unstable_by_key(|repeat| repeat.mark);
        balance
    }

    fn read_message(&mut self, payload: &[u8]) -> Result<(), String> {
        let fields = object(payload)?;
        let flush_id: String = match fields.get("flush_id") {
            Some(text) => {
                serde_json::from_str(text.get()).map_err(|error| format!("flush_id: {error}"))?
            }
            None => return Err("no flush_id".into()),
        };
        let spans: Vec<&RawValue> = match fields.get("spans") {
            Some(text) => {
                serde_json::from_str(text.get()).map_err(|error| format!("spans: {error}"))?
            }
            None => return Err("no spans".into()),
        };
        let flush = self.flush_number(&flush_id);
        let mut here: HashMap<Mark, u32> = HashMap::new();
        for span in spans {
            let read = read_span(span.get().as_bytes())?;
            self.produced += 1;
            if !read.is_marked {
                self.unmarked.push(read.mark);
            }
            let fate = self.spans.entry(read.mark).or_default();
            fate.altered |= fate.text.is_some_and(|text| text != read.text);
            let count = here.entry(read.mark).or_default();
            *count += 1;
            match count {
                1 => fate.flushes.push(flush),
                2 => self.twice.push((read.mark, flush_id.clone())),
                _ => {}
            }
        }
        Ok(())
    }

    fn flush_number(&mut self, flush_id: &str) -> usize {
        if let Some(&number) = self.flush_numbers.get(flush_id) {
            return number;
        }
        self.flushes.push(flush_id.to_owned());
        self.flush_numbers
            .insert(flush_id.to_owned(), self.flushes.len() - 1);
        self.flushes.len() - 1
    }
}

/// A span as it was read.
struct ReadSpan {
    mark: Mark,
    /// A hash of its text outside the two places.
    text: u128,
    /// Whether both places are filled as in the output.
    is_marked: bool,
}

/// Values stay text: a number that was printed anew is another text, and no depth of nesting is too deep.
type Object<'t> = BTreeMap<String, &'t RawValue>;

fn object(text: &[u8]) -> Result<Object<'_>, String> {
    serde_json::from_slice(text).map_err(|error| error.to_string())
}

fn read_span(text: &[u8]) -> Result<ReadSpan, String> {
    let mut fields = object(text)?;
    let is_segment = fields.remove("is_segment").map(RawValue::get);
    let attributes = fields.remove("attributes").map_or("null", RawValue::get);
    // Where it is no object it may be replaced by one: the same as an empty one.
    let mut attributes: Object<'_> = object(attributes.as_bytes()).unwrap_or_default();
    let segment = attributes.remove("sentry.segment.id").and_then(value_text);
    let text = hash_of(&fields, &attributes);
    let serial = attributes
        .get(SERIAL)
        .copied()
        .and_then(value_text)
        .and_then(|digits| digits.parse().ok());
    Ok(ReadSpan {
        mark: serial.map_or(Mark::Text(text), Mark::Serial),
        text,
        is_marked: matches!(is_segment, Some("true" | "false"))
            && segment.is_some_and(|segment| segment.starts_with('"')),
    })
}

/// The text of an attribute's value.
fn value_text(attribute: &RawValue) -> Option<&str> {
    object(attribute.get().as_bytes())
        .ok()?
        .get("value")
        .copied()
        .map(RawValue::get)
}

fn hash_of(fields: &Object<'_>, attributes: &Object<'_>) -> u128 {
    let half = |salt: u64| {
        let mut hasher = DefaultHasher::new();
        salt.hash(&mut hasher);
        for part in [fields, attributes] {
            part.len().hash(&mut hasher);
            part.iter()
                .for_each(|(key, value)| (key, value.get()).hash(&mut hasher));
        }
        u128::from(hasher.finish())
    };
    half(1) << 64 | half(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic::{Traffic, TrafficPlan};

    fn message(payload: &str) -> Message {
        Message {
            partition: 0,
            offset: 7,
            timestamp: None,
            key: None,
            payload: Some(payload.as_bytes().to_vec()),
            headers: Vec::new(),
        }
    }

    fn segment(flush_id: &str, spans: &[String]) -> Message {
        message(&format!(
            "{{\"spans\":[{}],\"flush_id\":\"{flush_id}\"}}",
            spans.join(",")
        ))
    }

    /// A span as it is sent, and as it comes out.
    fn span(serial: u64) -> (String, String) {
        let with = |is_segment: &str, segment: &str| {
            format!(
                "{{\"n\":1.50{is_segment},\"attributes\":{{\"spanbuf.serial\":{{\"type\":\"integer\",\"value\":{serial}}}{segment}}}}}"
            )
        };
        let marked = with(
            ",\"is_segment\":false",
            ",\"sentry.segment.id\":{\"type\":\"string\",\"value\":\"a\"}",
        );
        (with("", ""), marked)
    }

    fn ledger(serials: std::ops::Range<u64>) -> Ledger {
        let mut ledger = Ledger::new();
        serials.for_each(|serial| ledger.sent(span(serial).0.as_bytes()).unwrap());
        ledger
    }

    #[test]
    fn every_span_once_is_exact() {
        let mut ledger = ledger(0..4);
        assert!(!ledger.is_complete());
        ledger.read_output(&[
            segment("a", &[span(0).1, span(1).1]),
            segment("b", &[span(2).1, span(3).1]),
        ]);
        let balance = ledger.balance();
        assert!(balance.is_exact() && ledger.is_complete(), "{balance}");
        assert_eq!(
            (
                balance.sent,
                balance.messages,
                balance.produced,
                balance.difference(0)
            ),
            (4, 2, 4, 0)
        );
    }

    #[test]
    fn losses_repeats_and_strangers_are_told_apart() {
        let mut ledger = ledger(0..5);
        let again = segment("a", &[span(0).1, span(1).1]);
        ledger.read_output(&[
            again.clone(),
            again,
            segment("b", &[span(1).1, span(2).1, span(2).1, span(2).1]),
            segment("c", &[span(9).1, span(3).0]),
        ]);
        let balance = ledger.balance();
        assert_eq!(balance.missing, [Mark::Serial(4)]);
        assert_eq!(balance.unknown, [Mark::Serial(9)]);
        assert_eq!(balance.unmarked, [Mark::Serial(3)]);
        assert_eq!(balance.twice, [(Mark::Serial(2), "b".to_owned())]);
        assert_eq!(balance.repeats.len(), 2);
        let unexplained: Vec<&Repeat> = balance.unexplained_repeats().collect();
        assert_eq!(
            (unexplained.len(), unexplained[0].mark),
            (1, Mark::Serial(1))
        );
        assert_eq!((balance.difference(0), balance.difference(1)), (1, 0));
        assert!(!balance.is_even() && !balance.is_clean());
        let shown = balance.to_string();
        assert!(
            shown.contains("missing: 4") && shown.contains("repeat: 1 in a a b"),
            "{shown}"
        );
    }

    #[test]
    fn a_message_that_came_again_is_even_but_not_exact() {
        let mut ledger = ledger(0..1);
        let message = segment("a", &[span(0).1]);
        ledger.read_output(&[message.clone(), message]);
        let balance = ledger.balance();
        assert!(balance.is_even() && !balance.is_exact(), "{balance}");
    }

    #[test]
    fn a_change_outside_the_two_places_is_seen_and_one_inside_is_not() {
        let mut ledger = ledger(0..2);
        ledger.read_output(&[segment("a", &[span(0).1.replace("1.50", "1.5"), span(1).1])]);
        assert_eq!(ledger.balance().altered, [Mark::Serial(0)]);
    }

    #[test]
    fn spans_without_a_number_are_known_by_their_text() {
        let deep = format!("{}{}", "[".repeat(5_000), "]".repeat(5_000));
        let sent = [
            "{\"id\":1}".to_owned(),
            "{\"id\":2,\"attributes\":null}".to_owned(),
            format!(
                "{{\"id\":3,\"deep\":{deep},\"attributes\":{{\"a\":1,\"sentry.segment.id\":null}},\"is_segment\":null}}"
            ),
        ];
        let id = "\"is_segment\":true,\"attributes\":{\"sentry.segment.id\":{\"type\":\"string\",\"value\":\"x\"}";
        let out = [
            format!("{{\"id\":1,{id}}}}}"),
            format!("{{\"id\":2,{id}}}}}"),
            format!("{{\"id\":3,\"deep\":{deep},{id},\"a\":1}}}}"),
        ];
        let mut ledger = Ledger::new();
        sent.iter()
            .for_each(|span| ledger.sent(span.as_bytes()).unwrap());
        ledger.read_output(&[segment("a", &out)]);
        assert!(ledger.balance().is_exact(), "{}", ledger.balance());
        ledger.read_output(&[segment("b", &["{\"id\":4}".to_owned()])]);
        assert_eq!(ledger.balance().unknown.len(), 1);
    }

    #[test]
    fn what_is_no_segment_is_named() {
        let mut ledger = Ledger::new();
        let texts = [
            "",
            "[]",
            "{\"spans\":[]}",
            "{\"flush_id\":\"a\"}",
            "{\"flush_id\":1,\"spans\":[]}",
            "{\"flush_id\":\"a\",\"spans\":[1]}",
        ];
        texts
            .iter()
            .for_each(|text| ledger.read_output(&[message(text)]));
        assert_eq!(ledger.balance().malformed.len(), texts.len());
        assert!(ledger.balance().malformed[2].contains("offset=7: no flush_id"));
        assert!(ledger.sent(b"[]").is_err());
    }

    #[test]
    fn generated_traffic_balances_when_sent_on_as_it_is() {
        let traffic = Traffic::new(
            3,
            TrafficPlan {
                traces: 20,
                ..TrafficPlan::default()
            },
        );
        let spans: Vec<SpanMessage> = traffic.spans().collect();
        let mut ledger = Ledger::new();
        ledger.sent_all(&spans).unwrap();
        let texts: Vec<String> = spans
            .iter()
            .map(|span| String::from_utf8(span.payload.clone()).unwrap())
            .collect();
        ledger.read_output(&[segment("a", &texts)]);
        let balance = ledger.balance();
        assert_eq!(balance.difference(0), 0);
        assert!(
            balance.altered.is_empty() && balance.unknown.is_empty() && balance.twice.is_empty(),
            "{balance}"
        );
    }
}
