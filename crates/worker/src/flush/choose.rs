//! Chooses which due segments go next, and when each trace is looked at again.
//!
//! In:     journals as a look found them, earliest first.
//! Out:    a `Look` for each: segments to flush, fields to give up, the next look at what stays. Wave by wave: reading a large
//!         journal costs more than a wave of it.
//! Keeps:  a segment that stays is looked at no later than its deadline; what is over the budget is due at the next wave.
//! Knows:  deadlines and sizes. Pure.
//! Source: docs/spec.md 5.1; docs/store.md 3.

use std::collections::VecDeque;
use std::time::Duration;

use shared::time::UnixMillis;

use super::{
    assemble::{Limits, Segment, assemble},
    due::Due,
    headers::Journal,
};

/// When entries that do not exist yet are looked at again.
const HELD_AGAIN: Duration = Duration::from_secs(1);
/// When entries that this build cannot read are looked at again.
pub(super) const UNKNOWN_AGAIN: Duration = Duration::from_secs(60);

/// What one wave may flush.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Segments.
    pub segments: usize,
    /// Bytes of their spans, before compression; one segment may be larger.
    pub bytes: u64,
}

/// What becomes of one trace in a wave.
#[derive(Debug)]
pub struct Look {
    /// The trace.
    pub due: Due,
    /// The segments to flush now.
    pub flush: Vec<Segment>,
    /// Fields whose header does not decode.
    pub damaged: Vec<Vec<u8>>,
    /// When what stays is looked at; none: nothing stays, or its turn comes with a later wave.
    pub next_look: Option<UnixMillis>,
}

/// What was looked at and has not gone yet.
#[derive(Debug)]
pub struct Choice(VecDeque<Trace>);

/// One trace on its way through the waves.
#[derive(Debug)]
struct Trace {
    due: Due,
    /// Its due segments.
    ready: VecDeque<Segment>,
    damaged: Vec<Vec<u8>>,
    /// For what is not due now.
    next_look: NextLook,
}

impl Choice {
    /// Assembles every journal.
    #[must_use]
    pub fn new(journals: Vec<Journal>, limits: &Limits) -> Self {
        let traces = journals.into_iter().map(|journal| {
            let Journal {
                due,
                open,
                held,
                damaged,
                unknown,
            } = journal;
            let mut next_look = NextLook::default();
            if held > 0 {
                next_look.at(due.now.after(HELD_AGAIN));
            }
            if unknown > 0 {
                next_look.at(due.now.after(UNKNOWN_AGAIN));
            }
            let mut ready = VecDeque::new();
            for segment in assemble(open, due.now, limits) {
                if segment.due.is_some() {
                    ready.push_back(segment);
                } else {
                    next_look.at(segment.deadline);
                }
            }
            Trace {
                due,
                ready,
                damaged,
                next_look,
            }
        });
        Self(traces.collect())
    }

    /// Whether nothing is left to go.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes due segments, as far as the budget goes. A trace of which all has gone leaves with its next look.
    pub fn wave(&mut self, budget: &Budget) -> Vec<Look> {
        let (mut segments, mut bytes, mut looks) = (0, 0_u64, Vec::new());
        while let Some(trace) = self.0.front_mut() {
            let mut flush = Vec::new();
            while let Some(segment) = trace.ready.front() {
                let fits = segments < budget.segments
                    && (bytes.saturating_add(segment.bytes) <= budget.bytes || bytes == 0);
                if !fits {
                    break;
                }
                segments += 1;
                bytes = bytes.saturating_add(segment.bytes);
                flush.extend(trace.ready.pop_front());
            }
            let is_gone = trace.ready.is_empty();
            if flush.is_empty() && !is_gone {
                // Nothing of it fits: it is the first of the next wave, in which its first segment does.
                break;
            }
            looks.push(Look {
                due: trace.due.clone(),
                flush,
                damaged: std::mem::take(&mut trace.damaged),
                // Its score is lifted, and stays so until the last of it has gone.
                next_look: trace.next_look.0.filter(|_| is_gone),
            });
            let trace = self.0.pop_front();
            if !is_gone {
                // The others go first now.
                self.0.extend(trace);
                break;
            }
        }
        looks
    }

    /// Forgets the chunks of what has not gone.
    pub fn forget_chunks(&mut self) {
        let segments = self.0.iter_mut().flat_map(|trace| &mut trace.ready);
        for entry in segments.flat_map(|segment| &mut segment.entries) {
            entry.chunk = None;
        }
    }

    /// Lets a trace be: it is looked at when its score says so.
    pub fn forget(&mut self, due: &Due) {
        let is_other =
            |trace: &Trace| (trace.due.bucket, &trace.due.member) != (due.bucket, &due.member);
        self.0.retain(is_other);
    }

    /// Gives up the waves: what is due is left for the next cycle.
    #[must_use]
    pub fn rest(self) -> Vec<Look> {
        let looks = self.0.into_iter().map(|trace| Look {
            next_look: match trace.ready.is_empty() {
                true => trace.next_look.0,
                false => Some(trace.due.now),
            },
            due: trace.due,
            flush: Vec::new(),
            damaged: trace.damaged,
        });
        looks.collect()
    }
}

/// The earliest of several moments.
#[derive(Debug, Default)]
struct NextLook(Option<UnixMillis>);

impl NextLook {
    fn at(&mut self, moment: UnixMillis) {
        self.0 = Some(self.0.map_or(moment, |earliest| earliest.min(moment)));
    }
}

#[cfg(test)]
mod tests {
    use shared::{
        ids::{OrganizationId, ProjectId, SpanId, TraceId},
        shard::{BucketId, ShardId},
    };
    use store::{
        entry::{EntryHeader, SpanAt},
        keys::{Bucket, Member},
    };

    use super::*;
    use crate::flush::assemble::Entry;

    const NOW: UnixMillis = UnixMillis(100_000);
    const LIMITS: Limits = Limits {
        timeout: Duration::from_secs(60),
        root_timeout: Duration::from_secs(10),
        max_segment_age: None,
        max_segment_bytes: 1_000,
        max_trace_bytes: 10_000,
        max_trace_entries: 100,
    };

    fn journal(entries: &[(u64, u64, u64)], held: usize, unknown: usize) -> Journal {
        let entry = |&(offset, arrival, bytes): &(u64, u64, u64)| Entry {
            field: offset.to_be_bytes().to_vec(),
            header: EntryHeader {
                has_root: true,
                organization: OrganizationId(1),
                arrival: UnixMillis(arrival),
                top: SpanId::Hex(offset),
                spans: vec![SpanAt {
                    offset,
                    id: SpanId::Hex(offset),
                }],
                bytes,
            },
            chunk: None,
        };
        let bucket = Bucket {
            slice: None,
            shard: ShardId(0),
            bucket: BucketId(0),
        };
        let due = Due {
            bucket,
            member: Member::new(ProjectId(1), &TraceId::new(b"t")),
            score: NOW,
            now: NOW,
        };
        Journal {
            due,
            open: entries.iter().map(entry).collect(),
            held,
            damaged: Vec::new(),
            unknown,
        }
    }

    fn budget(segments: usize, bytes: u64) -> Budget {
        Budget { segments, bytes }
    }

    #[test]
    fn due_segments_go_and_the_others_are_looked_at_in_their_time() {
        let entries = [(1, 90_000, 10), (2, 95_000, 10)];
        let mut choice = Choice::new(vec![journal(&entries, 0, 0)], &LIMITS);
        let looks = choice.wave(&budget(10, 1_000));
        assert_eq!(looks[0].flush.len(), 1);
        assert_eq!(looks[0].next_look, Some(UnixMillis(105_000)));
        assert!(choice.is_empty());
    }

    #[test]
    fn what_is_over_the_budget_goes_with_the_next_wave() {
        let entries = [(1, 90_000, 600), (2, 90_000, 600), (3, 95_000, 10)];
        for budget in [budget(1, 10_000), budget(10, 700), budget(10, 10)] {
            let mut choice = Choice::new(vec![journal(&entries, 0, 0)], &LIMITS);
            let first = choice.wave(&budget);
            assert_eq!((first.len(), first[0].flush.len()), (1, 1), "{budget:?}");
            assert_eq!(first[0].next_look, None, "{budget:?}");
            let second = choice.wave(&budget);
            assert_eq!((second.len(), second[0].flush.len()), (1, 1), "{budget:?}");
            assert_eq!(second[0].next_look, Some(UnixMillis(105_000)), "{budget:?}");
            assert!(choice.is_empty(), "{budget:?}");
        }
    }

    #[test]
    fn a_trace_that_is_not_through_goes_behind_the_others_and_they_keep_their_turn() {
        let order = |traces: &[&[(u64, u64, u64)]]| {
            let journals = traces.iter().map(|entries| journal(entries, 0, 0));
            let mut choice = Choice::new(journals.collect(), &LIMITS);
            let mut gone = Vec::new();
            while !choice.is_empty() {
                let wave = choice.wave(&budget(1, 1_000));
                let segments = wave.into_iter().flat_map(|look| look.flush);
                gone.extend(segments.map(|segment| segment.entries[0].header.spans[0].offset));
            }
            gone
        };
        let one = |offset| [(offset, 90_000, 10)];
        assert_eq!(order(&[&one(1), &one(2), &one(3)]), [1, 2, 3]);
        let two = [(1, 90_000, 10), (2, 90_000, 10)];
        assert_eq!(order(&[&two, &one(8), &one(9)]), [1, 8, 9, 2]);
    }

    #[test]
    fn what_is_left_when_the_waves_end_is_due_and_what_was_put_off_is_not() {
        let entries = [(1, 90_000, 600), (2, 90_000, 600)];
        let choice = || {
            let mut choice = Choice::new(vec![journal(&entries, 0, 0)], &LIMITS);
            let due = choice.wave(&budget(1, 1)).remove(0).due;
            (choice, due)
        };
        let rest = choice().0.rest();
        assert_eq!((rest.len(), rest[0].flush.len()), (1, 0));
        assert_eq!(rest[0].next_look, Some(NOW));
        let (mut choice, due) = choice();
        choice.forget(&due);
        assert!(choice.is_empty());
    }

    #[test]
    fn chunks_that_are_forgotten_go_with_no_wave() {
        let mut journal = journal(&[(1, 90_000, 600), (2, 90_000, 600)], 0, 0);
        for entry in &mut journal.open {
            entry.chunk = Some(Vec::new());
        }
        let mut choice = Choice::new(vec![journal], &LIMITS);
        let mut has_chunk = || {
            let look = choice.wave(&budget(1, 1)).remove(0);
            choice.forget_chunks();
            look.flush[0].entries[0].chunk.is_some()
        };
        assert_eq!([has_chunk(), has_chunk()], [true, false]);
    }

    #[test]
    fn what_does_not_exist_yet_or_cannot_be_read_is_looked_at_again() {
        let next_look = |held, unknown| {
            let mut choice = Choice::new(vec![journal(&[], held, unknown)], &LIMITS);
            choice.wave(&budget(1, 1))[0].next_look
        };
        assert_eq!(next_look(0, 0), None);
        assert_eq!(next_look(2, 0), Some(UnixMillis(101_000)));
        assert_eq!(next_look(0, 2), Some(UnixMillis(160_000)));
        assert_eq!(next_look(1, 1), Some(UnixMillis(101_000)));
    }
}
