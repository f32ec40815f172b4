//! Chooses which due segments go in this cycle, and when each trace is looked at again.
//!
//! In:     journals as a look found them, earliest first.
//! Out:    a `Look` for each: segments to flush, fields to give up, the next look at what stays.
//! Keeps:  a segment that stays is looked at no later than its deadline; what is over the budget is due at the next cycle.
//! Knows:  deadlines and sizes. Pure.
//! Source: docs/spec.md 5.1; docs/store.md 3.

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

/// What one cycle may flush.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Segments.
    pub segments: usize,
    /// Bytes of their spans, before compression; one segment may be larger.
    pub bytes: u64,
}

/// What becomes of one trace in this cycle.
#[derive(Debug)]
pub struct Look {
    /// The trace.
    pub due: Due,
    /// The segments to flush now.
    pub flush: Vec<Segment>,
    /// Fields whose header does not decode.
    pub damaged: Vec<Vec<u8>>,
    /// When what stays is looked at; none: nothing stays.
    pub next_look: Option<UnixMillis>,
}

/// The choice of one cycle.
#[derive(Debug)]
pub struct Chosen {
    /// Every trace that was looked at.
    pub looks: Vec<Look>,
    /// Due segments were left.
    pub left: bool,
}

/// Assembles every journal and takes due segments, as far as the budget goes.
#[must_use]
pub fn choose(journals: Vec<Journal>, limits: &Limits, budget: &Budget) -> Chosen {
    let (mut segments, mut bytes, mut left) = (0, 0_u64, false);
    let mut looks = Vec::with_capacity(journals.len());
    for journal in journals {
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
        let mut flush = Vec::new();
        for segment in assemble(open, due.now, limits) {
            let fits = segments < budget.segments
                && (bytes.saturating_add(segment.bytes) <= budget.bytes || bytes == 0);
            if segment.due.is_some() && fits {
                segments += 1;
                bytes = bytes.saturating_add(segment.bytes);
                flush.push(segment);
            } else {
                left |= segment.due.is_some();
                // A segment that is over a limit is due before its deadline.
                next_look.at(if segment.due.is_some() {
                    due.now
                } else {
                    segment.deadline
                });
            }
        }
        looks.push(Look {
            due,
            flush,
            damaged,
            next_look: next_look.0,
        });
    }
    Chosen { looks, left }
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
        let chosen = choose(
            vec![journal(&[(1, 90_000, 10), (2, 95_000, 10)], 0, 0)],
            &LIMITS,
            &budget(10, 1_000),
        );
        assert_eq!(chosen.looks[0].flush.len(), 1);
        assert_eq!(chosen.looks[0].next_look, Some(UnixMillis(105_000)));
        assert!(!chosen.left);
    }

    #[test]
    fn what_is_over_the_budget_stays_due() {
        let journals = || vec![journal(&[(1, 90_000, 600), (2, 90_000, 600)], 0, 0)];
        for budget in [budget(1, 10_000), budget(10, 700), budget(10, 10)] {
            let chosen = choose(journals(), &LIMITS, &budget);
            assert_eq!(chosen.looks[0].flush.len(), 1, "{budget:?}");
            assert_eq!(chosen.looks[0].next_look, Some(NOW), "{budget:?}");
            assert!(chosen.left, "{budget:?}");
        }
    }

    #[test]
    fn what_does_not_exist_yet_or_cannot_be_read_is_looked_at_again() {
        let next_look = |held, unknown| {
            choose(vec![journal(&[], held, unknown)], &LIMITS, &budget(1, 1)).looks[0].next_look
        };
        assert_eq!(next_look(0, 0), None);
        assert_eq!(next_look(2, 0), Some(UnixMillis(101_000)));
        assert_eq!(next_look(0, 2), Some(UnixMillis(160_000)));
        assert_eq!(next_look(1, 1), Some(UnixMillis(101_000)));
    }
}
