//! What all ways insert: segments of some size, child first, in subsegments of five.
//!
//! Out:    parsed spans, by batch and subsegment.
//! Keeps:  a subsegment comes before the one that holds the parent of its top; a segment's root comes last. All ways get the same
//!         subsegments: each is grouped alone, as if the rest of the batch were other traffic.
//! Source: docs/store.md 7.

use std::path::Path;

use bytes::Bytes;
use shared::time::UnixMillis;
use stand::{
    recording::Recording,
    rng::Rng,
    span::{Span, render},
};
use worker::ingest::{group::Arrived, parse::parse};

pub(crate) const BATCH_SPANS: usize = 5_000;
const SUBSEGMENT_SPANS: usize = 5;
const SPAN_BYTES: usize = 1_000;
/// The time of every message: deadlines are counted from it.
pub(crate) const ARRIVAL: UnixMillis = UnixMillis(1_700_000_000_000);

/// The messages of a case.
pub(crate) struct Input {
    /// The messages, by subsegment, in order of arrival.
    messages: Vec<Vec<Bytes>>,
}

/// The spans of one subsegment, as they arrived.
pub(crate) type Envelope = Vec<Arrived>;

impl Input {
    /// `total` spans in segments of `size`.
    pub(crate) fn chains(size: usize, total: usize) -> Self {
        let mut rng = Rng::new(7);
        let mut messages = Vec::new();
        let mut serial = 0;
        for _ in 0..total.div_ceil(size) {
            let trace = format!("{:016x}{:016x}", rng.bits(), rng.bits());
            let ids: Vec<String> = (0..size).map(|_| format!("{:016x}", rng.bits())).collect();
            let places: Vec<usize> = (0..size).collect();
            for piece in places.chunks(SUBSEGMENT_SPANS).rev() {
                let mut envelope = Vec::new();
                for &place in piece.iter().rev() {
                    // The first of a subsegment hangs under the last of the one above, the others under the first.
                    let above = if place == piece[0] {
                        place.checked_sub(1)
                    } else {
                        Some(piece[0])
                    };
                    serial += 1;
                    let span = Span {
                        organization: 1,
                        project: 1,
                        trace: trace.clone(),
                        id: ids[place].clone(),
                        parent: above.map(|above| ids[above].clone()),
                        is_segment: above.is_none().then_some(true),
                        service: serial % 7,
                        start: ARRIVAL.0 * 1_000,
                        end: ARRIVAL.0 * 1_000 + rng.below(900_000),
                        ..Span::default()
                    };
                    envelope.push(Bytes::from(render(&span, serial, SPAN_BYTES, &mut rng)));
                }
                messages.push(envelope);
            }
        }
        Self { messages }
    }

    /// Recorded spans, in order of arrival: real groups come out of whole batches.
    pub(crate) fn recorded(path: &Path) -> Self {
        let messages: Vec<Bytes> = Recording::open(path, ARRIVAL, 1)
            .unwrap()
            .map(|message| Bytes::from(message.unwrap().payload))
            .collect();
        Self {
            messages: messages.chunks(BATCH_SPANS).map(<[_]>::to_vec).collect(),
        }
    }

    pub(crate) fn spans(&self) -> usize {
        self.messages.iter().map(Vec::len).sum()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.messages.iter().flatten().map(Bytes::len).sum()
    }

    /// The parsed spans, in batches.
    pub(crate) fn batches(&self) -> Vec<Vec<Envelope>> {
        let mut offset = 0;
        let mut batches: Vec<Vec<Envelope>> = Vec::new();
        let mut room = 0;
        for envelope in &self.messages {
            let spans: Envelope = envelope
                .iter()
                .map(|json| {
                    offset += 1;
                    Arrived {
                        offset: offset - 1,
                        time: ARRIVAL,
                        json: json.clone(),
                        span: parse(json).unwrap(),
                    }
                })
                .collect();
            if room < spans.len() {
                batches.push(Vec::new());
                room = BATCH_SPANS;
            }
            room -= spans.len();
            batches.last_mut().unwrap().push(spans);
        }
        batches
    }
}
