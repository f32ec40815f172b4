//! Builds the messages of loaded segments, sends them, and waits for Kafka's word on each.
//!
//! In:     loaded segments.
//! Out:    `Produced`: for each trace, the fields whose every span is acknowledged or a counted outcome.
//! Keeps:  an entry with a span in a message that nobody acknowledged is named nowhere: it stays in Redis; messages are built and
//!         sent in rounds of a bounded size.
//! Knows:  topics, headers, what the broker never takes. Not Redis.
//! Source: docs/spec.md 5.2–5.4.

use std::iter::Peekable;

use log::{error, warn};
use shared::config::{Config, MessageKey};
use store::scripts::FieldOut;

use super::{
    choose::Look,
    due::Due,
    load::{Loaded, LoadedSegment},
    message::{FieldCount, LoadedEntry, Part, build},
};
use crate::{
    beat::Beat,
    deliver::{Deliver, Deliverer, Fault, Outgoing},
};

/// What of one trace may leave Redis. Only `clear` takes it, and it is made here only.
#[derive(Debug)]
pub struct Produced {
    /// The trace, its next look included.
    look: Look,
    /// What leaves, counted.
    fields: Vec<FieldOut>,
    /// A message that the broker never takes stays: the trace is put off.
    put_off: bool,
}

impl Produced {
    /// The trace, what leaves of it, and whether it is to be put off.
    #[must_use]
    pub fn into_parts(self) -> (Look, Vec<FieldOut>, bool) {
        (self.look, self.fields, self.put_off)
    }
}

/// The output topics.
#[derive(Debug)]
pub struct Output<D = Deliverer> {
    deliverer: D,
    topics: Vec<String>,
    next_topic: usize,
    /// Whether a message of the last call was not answered well.
    left_open: bool,
    dlq: Option<String>,
    key: MessageKey,
    segment_bytes_max: u64,
    round_bytes: usize,
}

/// One message on its way, and the segment that it is of.
struct Sending {
    place: (usize, usize),
    part: Part,
    topic: String,
    key: Option<Vec<u8>>,
    headers: Vec<(&'static str, Vec<u8>)>,
}

/// Messages that are sent together, and what became of those before them.
#[derive(Default)]
struct Round {
    sendings: Vec<Sending>,
    /// Bytes of their payloads.
    bytes: usize,
    answered: Vec<Answered>,
}

/// A message that was sent, without its payload.
struct Answered {
    place: (usize, usize),
    /// As in [`Part`].
    fields: Vec<(usize, u64)>,
    outcome: Outcome,
}

/// What became of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Acknowledged,
    /// In the dead-letter topic: the broker never takes it.
    TooLarge,
    /// The broker never takes it, and there is nowhere else.
    Nowhere,
    /// Not acknowledged; it may or may not have been written.
    Open,
}

impl<D: Deliver> Output<D> {
    /// Takes a producer; `dlq` is none where there is no such topic.
    #[must_use]
    pub fn new(config: &Config, deliverer: D, dlq: Option<String>, segment_bytes_max: u64) -> Self {
        let topics = config.kafka.output_topics.clone();
        Self {
            deliverer,
            topics,
            next_topic: 0,
            left_open: false,
            dlq,
            key: config.kafka.key,
            segment_bytes_max,
            // The messages of a wave go in one round; only a long segment id makes more of it.
            round_bytes: usize::try_from(config.flush.max_flush_bytes).unwrap_or(usize::MAX),
        }
    }

    /// Whether a message of the last call was not answered well: to send at once again would be in vain.
    #[must_use]
    pub fn left_open(&self) -> bool {
        self.left_open
    }

    /// What it delivers with.
    pub fn deliverer_mut(&mut self) -> &mut D {
        &mut self.deliverer
    }

    /// Produces all loaded segments.
    pub fn produce(&mut self, loaded: Vec<Loaded>, beat: &mut Beat) -> Vec<Produced> {
        let (counts, answered) = self.send_all(&loaded, beat);
        let mut answered = answered.into_iter().peekable();
        let traces = loaded.into_iter().zip(counts).enumerate();
        traces
            .map(|(trace, (loaded, counts))| settle(trace, loaded, counts, &mut answered))
            .collect()
    }

    /// Sends all messages; gives what each field of each segment of each trace holds, and what became of each message, in their order.
    fn send_all(
        &mut self,
        loaded: &[Loaded],
        beat: &mut Beat,
    ) -> (Vec<Vec<Vec<FieldCount>>>, Vec<Answered>) {
        self.left_open = false;
        let mut round = Round::default();
        let mut counts = Vec::with_capacity(loaded.len());
        for (trace, of_trace) in loaded.iter().enumerate() {
            let due = &of_trace.look.due;
            let mut of_segments = Vec::with_capacity(of_trace.segments.len());
            for (segment, loaded) in of_trace.segments.iter().enumerate() {
                let place = (trace, segment);
                let topic = self.next_topic();
                let bytes_max = self.segment_bytes_max;
                let count = build_parts(due, loaded, bytes_max, |part| {
                    round.bytes += part.payload.len();
                    round
                        .sendings
                        .push(self.address(due, loaded, place, part, &topic));
                    if round.bytes >= self.round_bytes {
                        self.send_round(&mut round, beat);
                    }
                });
                of_segments.push(count);
            }
            counts.push(of_segments);
        }
        self.send_round(&mut round, beat);
        (counts, round.answered)
    }

    /// Sends what has gathered, and keeps of it what became of each message.
    fn send_round(&mut self, round: &mut Round, beat: &mut Beat) {
        let sendings = std::mem::take(&mut round.sendings);
        round.bytes = 0;
        beat.in_flight(sendings.len());
        // After a round that was not answered well the others would wait in vain, each as long.
        let outcomes = if self.left_open {
            vec![Outcome::Open; sendings.len()]
        } else {
            self.send(&sendings, beat)
        };
        beat.in_flight(0);
        let answers = sendings.into_iter().zip(outcomes);
        round
            .answered
            .extend(answers.map(|(sending, outcome)| Answered {
                place: sending.place,
                fields: sending.part.fields,
                outcome,
            }));
    }

    /// The topic of the next segment: all of its parts go there.
    fn next_topic(&mut self) -> String {
        let topic = self.topics.get(self.next_topic).cloned();
        self.next_topic = (self.next_topic + 1) % self.topics.len().max(1);
        topic.unwrap_or_default()
    }

    /// Gives a part its topic, its key and its headers.
    fn address(
        &self,
        due: &Due,
        loaded: &LoadedSegment,
        place: (usize, usize),
        part: Part,
        topic: &str,
    ) -> Sending {
        let segment = &loaded.segment;
        let key = match self.key {
            MessageKey::None => None,
            MessageKey::Trace => Some(due.member.trace().to_vec()),
        };
        let reason = segment.due.map_or("", |reason| reason.as_str());
        let headers = vec![
            ("flush_id", part.flush_id.clone().into_bytes()),
            ("part", part.part.to_string().into_bytes()),
            ("parts", part.parts.to_string().into_bytes()),
            ("reason", reason.as_bytes().to_vec()),
            ("has_root", segment.has_root.to_string().into_bytes()),
            ("spans", part.spans.to_string().into_bytes()),
        ];
        Sending {
            place,
            part,
            topic: topic.to_owned(),
            key,
            headers,
        }
    }

    fn send(&mut self, sendings: &[Sending], beat: &mut Beat) -> Vec<Outcome> {
        let messages: Vec<Outgoing<'_>> = sendings
            .iter()
            .map(|sending| outgoing(sending, &sending.topic))
            .collect();
        let answers = self.deliver(&messages, beat);
        let mut outcomes = Vec::with_capacity(answers.len());
        let mut open: Option<(usize, Fault)> = None;
        for (sending, answer) in sendings.iter().zip(answers) {
            outcomes.push(match answer {
                Ok(()) => Outcome::Acknowledged,
                // Each is a wait of its own: none while others are not answered, and none after a stop was asked for.
                Err(Fault::TooLarge) if open.is_none() && !beat.stopping() => {
                    self.send_large(sending, beat)
                }
                Err(Fault::TooLarge) => Outcome::Open,
                Err(fault) => {
                    open = Some((open.map_or(0, |(count, _)| count) + 1, fault));
                    Outcome::Open
                }
            });
        }
        self.left_open = outcomes.contains(&Outcome::Open);
        if let Some((count, fault)) = open {
            warn!(
                "deliver segments messages={count}: {fault}; they stay, and are sent again at later looks"
            );
        }
        outcomes
    }

    /// A message that the broker found too large: alone once more, since a batch is refused as a whole; then to the dead-letter topic.
    fn send_large(&mut self, sending: &Sending, beat: &mut Beat) -> Outcome {
        match self
            .deliverer
            .deliver_alone(outgoing(sending, &sending.topic), beat)
        {
            Ok(()) => return Outcome::Acknowledged,
            Err(Fault::TooLarge) => {}
            Err(_) => return Outcome::Open,
        }
        let bytes = sending.part.payload.len();
        let Some(dlq) = self.dlq.clone() else {
            error!(
                "message flush_id={} bytes={bytes} is too large for topic={} and there is no dead-letter topic: it stays (raise max.message.bytes, or create kafka.output_dlq)",
                sending.part.flush_id, sending.topic
            );
            return Outcome::Nowhere;
        };
        let mut message = outgoing(sending, &dlq);
        message
            .headers
            .push(("source_topic", sending.topic.as_bytes().to_vec()));
        message.headers.push(("dropped", b"too_large".to_vec()));
        match self.deliverer.deliver_alone(message, beat) {
            Ok(()) => {
                error!(
                    "dropped spans={} flush_id={} bytes={bytes} reason=too_large: they are in topic={dlq} (raise max.message.bytes of {})",
                    sending.part.spans, sending.part.flush_id, sending.topic
                );
                Outcome::TooLarge
            }
            Err(Fault::TooLarge) => {
                error!(
                    "message flush_id={} bytes={bytes} is too large for topic={} and for topic={dlq}: it stays (raise max.message.bytes)",
                    sending.part.flush_id, sending.topic
                );
                Outcome::Nowhere
            }
            Err(_) => Outcome::Open,
        }
    }

    fn deliver(&mut self, messages: &[Outgoing<'_>], beat: &mut Beat) -> Vec<Result<(), Fault>> {
        if messages.is_empty() {
            Vec::new()
        } else {
            self.deliverer.deliver(messages, beat)
        }
    }
}

/// What of one trace may leave Redis: what went out whole, what will never go out, and what could not be read.
fn settle(
    trace: usize,
    loaded: Loaded,
    counts: Vec<Vec<FieldCount>>,
    answered: &mut Peekable<impl Iterator<Item = Answered>>,
) -> Produced {
    let mut produced = Produced {
        look: loaded.look,
        fields: loaded.given_up,
        put_off: false,
    };
    for (index, (loaded, counts)) in loaded.segments.into_iter().zip(counts).enumerate() {
        let entries = loaded.segment.entries.into_iter().zip(counts);
        let outs = entries.map(|(entry, count)| FieldOut {
            field: entry.field,
            produced: count.produced,
            repeats: count.repeats,
            dropped: Vec::new(),
        });
        let answers =
            std::iter::from_fn(|| answered.next_if(|answer| answer.place == (trace, index)));
        let (gone, put_off) = settle_segment(outs.collect(), answers);
        produced.fields.extend(gone);
        produced.put_off |= put_off;
    }
    produced
}

/// The fields that leave, of all of a segment's, by what became of its messages; and whether one of these can go nowhere.
fn settle_segment(
    mut outs: Vec<FieldOut>,
    answers: impl Iterator<Item = Answered>,
) -> (Vec<FieldOut>, bool) {
    let (mut open, mut put_off) = (vec![false; outs.len()], false);
    for answer in answers {
        match answer.outcome {
            Outcome::Acknowledged => {}
            Outcome::TooLarge => drop_part(&answer.fields, &mut outs),
            Outcome::Open => keep(&answer.fields, &mut open),
            Outcome::Nowhere => {
                keep(&answer.fields, &mut open);
                put_off = true;
            }
        }
    }
    // What went out whole leaves, so that it does not go out again with what did not.
    let gone = outs.into_iter().zip(open).filter(|(_, open)| !open);
    (gone.map(|(out, _)| out).collect(), put_off)
}

fn build_parts(
    due: &Due,
    loaded: &LoadedSegment,
    bytes_max: u64,
    each: impl FnMut(Part),
) -> Vec<FieldCount> {
    let entries: Vec<LoadedEntry<'_>> = loaded
        .segment
        .entries
        .iter()
        .zip(&loaded.chunks)
        .map(|(entry, chunk)| LoadedEntry {
            header: &entry.header,
            chunk,
        })
        .collect();
    build(
        due.bucket.shard,
        &due.member,
        &loaded.segment.id,
        &entries,
        bytes_max,
        each,
    )
}

fn outgoing<'m>(sending: &'m Sending, topic: &'m str) -> Outgoing<'m> {
    Outgoing {
        topic,
        key: sending.key.as_deref(),
        payload: Some(&sending.part.payload),
        headers: sending.headers.clone(),
    }
}

/// Marks the entries that have spans in a part: they stay.
fn keep(fields: &[(usize, u64)], open: &mut [bool]) {
    for &(field, _) in fields {
        if let Some(open) = open.get_mut(field) {
            *open = true;
        }
    }
}

/// Counts the spans of a part as dropped, field by field, and no longer as produced.
fn drop_part(fields: &[(usize, u64)], outs: &mut [FieldOut]) {
    for &(field, spans) in fields {
        let Some(out) = outs.get_mut(field) else {
            continue;
        };
        out.produced = out.produced.saturating_sub(spans);
        match out
            .dropped
            .iter_mut()
            .find(|(reason, _)| *reason == "too_large")
        {
            Some((_, dropped)) => *dropped += spans,
            None => out.dropped.push(("too_large", spans)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_leaves_when_every_message_with_a_span_of_it_is_settled() {
        // Two spans each.
        let outs: Vec<FieldOut> = (0..4)
            .map(|field| FieldOut {
                field: vec![field],
                produced: 2,
                repeats: 0,
                dropped: Vec::new(),
            })
            .collect();
        let answer = |fields: &[(usize, u64)], outcome| Answered {
            place: (0, 0),
            fields: fields.to_vec(),
            outcome,
        };
        let settled = |answers: Vec<Answered>| {
            let (gone, put_off) = settle_segment(outs.clone(), answers.into_iter());
            let gone = gone.into_iter().map(|out| (out.field[0], out.produced));
            (gone.collect::<Vec<_>>(), put_off)
        };
        let (whole, torn) = ([(0, 2), (1, 1)], [(1, 1), (2, 2)]);
        let [sent, open] = [Outcome::Acknowledged, Outcome::Open];
        assert_eq!(
            settled(vec![answer(&whole, sent), answer(&torn, sent)]).0,
            [(0, 2), (1, 2), (2, 2), (3, 2)]
        );
        assert_eq!(
            settled(vec![answer(&whole, sent), answer(&torn, open)]),
            (vec![(0, 2), (3, 2)], false)
        );
        assert_eq!(
            settled(vec![
                answer(&whole, Outcome::TooLarge),
                answer(&torn, Outcome::Nowhere)
            ]),
            (vec![(0, 0), (3, 2)], true)
        );
    }

    #[test]
    fn spans_of_a_part_that_is_given_up_are_counted_once() {
        let out = |produced| FieldOut {
            field: Vec::new(),
            produced,
            repeats: 0,
            dropped: Vec::new(),
        };
        let mut outs = vec![out(5), out(3)];
        drop_part(&[(0, 2)], &mut outs);
        drop_part(&[(0, 3), (1, 1), (9, 1)], &mut outs);
        assert_eq!(
            (outs[0].produced, &outs[0].dropped[..]),
            (0, &[("too_large", 5)][..])
        );
        assert_eq!(
            (outs[1].produced, &outs[1].dropped[..]),
            (2, &[("too_large", 1)][..])
        );
    }
}
