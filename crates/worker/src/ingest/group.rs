//! Groups the spans of one shard's part of a batch into subsegments.
//!
//! In:     spans as they arrived; the limits of one insert.
//! Out:    `Subsegment`s for `journal`, each with one topmost known parent.
//! Keeps:  every span is in exactly one subsegment, whatever the record order; the cost is near linear, whatever the tree.
//! Knows:  ids. No Redis, no clock. Pure.
//! Source: docs/spec.md 2.3, 3.

use std::collections::HashMap;

use bytes::Bytes;
use shared::{
    config::Buffer,
    ids::{OrganizationId, ProjectId, SpanId, TraceId},
    time::UnixMillis,
};

use super::parse::Span;

/// A span with where and when it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrived {
    /// Its offset in the input.
    pub offset: u64,
    /// Its message's time.
    pub time: UnixMillis,
    /// The message, byte for byte.
    pub json: Bytes,
    /// What it says.
    pub span: Span,
}

/// Spans of one batch under one topmost known parent, or a piece of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subsegment {
    /// The project of all of them.
    pub project: ProjectId,
    /// The trace of all of them.
    pub trace: TraceId,
    /// The organization of the first one; a project has one organization.
    pub organization: OrganizationId,
    /// The topmost known parent, which may not be among them.
    pub top: SpanId,
    /// Whether a root span is among these: a segment has a root when one of its entries holds one.
    pub has_root: bool,
    /// Bytes of their messages.
    pub bytes: u64,
    /// The spans by offset, at least one.
    pub spans: Vec<Arrived>,
}

/// What one subsegment may hold; a single larger span is one by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupLimits {
    /// Spans.
    pub spans_max: usize,
    /// Bytes of messages.
    pub bytes_max: u64,
}

impl From<&Buffer> for GroupLimits {
    fn from(buffer: &Buffer) -> Self {
        Self {
            spans_max: buffer.max_spans_per_insert,
            bytes_max: buffer.max_insert_bytes,
        }
    }
}

impl Arrived {
    /// Whether it heads a segment.
    fn is_root(&self) -> bool {
        self.span.is_segment || self.span.parent.is_none()
    }

    /// The id under which it is put before anything else of the batch is known.
    fn effective_parent(&self) -> &SpanId {
        let Span {
            id,
            parent,
            segment,
            ..
        } = &self.span;
        if self.is_root() {
            id
        } else {
            segment.as_ref().or(parent.as_ref()).unwrap_or(id)
        }
    }

    fn bytes(&self) -> u64 {
        u64::try_from(self.json.len()).unwrap_or(u64::MAX)
    }
}

/// Groups spans, given in input order, by their topmost known parent; subsegments come in the order of their first spans.
#[must_use]
pub fn group(spans: Vec<Arrived>, limits: &GroupLimits) -> Vec<Subsegment> {
    let (tops, group_of) = find_groups(&spans);
    let mut groups: Vec<(SpanId, Vec<Arrived>)> =
        tops.into_iter().map(|top| (top, Vec::new())).collect();
    for (arrived, group) in spans.into_iter().zip(group_of) {
        groups[group].1.push(arrived);
    }
    let mut subsegments = Vec::with_capacity(groups.len());
    for (top, mut spans) in groups {
        // A shard's records come in this order already; it costs nothing then.
        spans.sort_by_key(|arrived| arrived.offset);
        cut(&top, spans, limits, &mut subsegments);
    }
    subsegments
}

/// The top of each group, and for each span the group that it is in.
fn find_groups(spans: &[Arrived]) -> (Vec<SpanId>, Vec<usize>) {
    let mut redirects = Redirects::default();
    let mut joined = Vec::with_capacity(spans.len());
    for arrived in spans {
        let trace = redirects.trace(arrived);
        let own = redirects.place(trace, &arrived.span.id);
        let parent = redirects.place(trace, arrived.effective_parent());
        let top = redirects.top(parent);
        // This also takes the group that stands under the span's own id along: its spans find their top through that id.
        redirects.note(own, top);
        joined.push(top);
    }
    let mut group_of_top = vec![None; redirects.to.len()];
    let mut tops = Vec::new();
    let mut group_of = Vec::with_capacity(spans.len());
    for place in joined {
        let top = redirects.top(place);
        group_of.push(*group_of_top[top].get_or_insert_with(|| {
            tops.push(redirects.ids[top].clone());
            tops.len() - 1
        }));
    }
    (tops, group_of)
}

/// The batch's redirects, from span id to top, within each trace of a project.
///
/// Keeps: no cycle, for a redirect is noted only between two ids that have none. Of several spans with one id the first one's redirect
/// stays, as in a journal the entry with the lowest offset has the id (docs/store.md 3); so a chain may be shortened at any time.
#[derive(Debug, Default)]
struct Redirects<'s> {
    traces: HashMap<(ProjectId, &'s TraceId), usize>,
    places: HashMap<(usize, &'s SpanId), usize>,
    ids: Vec<&'s SpanId>,
    /// For each place where it is redirected to; itself when it is not.
    to: Vec<usize>,
}

impl<'s> Redirects<'s> {
    fn trace(&mut self, arrived: &'s Arrived) -> usize {
        let next = self.traces.len();
        let key = (arrived.span.project, &arrived.span.trace);
        *self.traces.entry(key).or_insert(next)
    }

    fn place(&mut self, trace: usize, id: &'s SpanId) -> usize {
        *self.places.entry((trace, id)).or_insert_with(|| {
            self.ids.push(id);
            self.to.push(self.to.len());
            self.to.len() - 1
        })
    }

    /// Follows the redirects to their end; halves the way for whoever comes next.
    fn top(&mut self, mut place: usize) -> usize {
        while self.to[place] != place {
            self.to[place] = self.to[self.to[place]];
            place = self.to[place];
        }
        place
    }

    /// Redirects an id to a top, unless it is that top or is redirected already.
    fn note(&mut self, own: usize, top: usize) {
        if self.to[own] == own {
            self.to[own] = top;
        }
    }
}

/// Cuts the spans of one group into pieces within the limits.
fn cut(top: &SpanId, spans: Vec<Arrived>, limits: &GroupLimits, subsegments: &mut Vec<Subsegment>) {
    let mut open: Option<Subsegment> = None;
    for arrived in spans {
        let fits = |piece: &Subsegment| {
            piece.spans.len() < limits.spans_max
                && piece.bytes.saturating_add(arrived.bytes()) <= limits.bytes_max
        };
        match &mut open {
            Some(piece) if fits(piece) => piece.add(arrived),
            piece => subsegments.extend(piece.replace(Subsegment::new(top, arrived))),
        }
    }
    subsegments.extend(open);
}

impl Subsegment {
    fn new(top: &SpanId, first: Arrived) -> Self {
        Self {
            project: first.span.project,
            trace: first.span.trace.clone(),
            organization: first.span.organization,
            top: top.clone(),
            has_root: first.is_root(),
            bytes: first.bytes(),
            spans: vec![first],
        }
    }

    fn add(&mut self, arrived: Arrived) {
        self.has_root |= arrived.is_root();
        self.bytes = self.bytes.saturating_add(arrived.bytes());
        self.spans.push(arrived);
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use proptest::{collection::vec, option, prelude::*};
    use shared::time::Clock;
    use store::chunk::{SegmentPlace, Splice};

    use super::*;

    const WIDE: GroupLimits = GroupLimits {
        spans_max: usize::MAX,
        bytes_max: u64::MAX,
    };

    fn id(name: &str) -> SpanId {
        SpanId::new(name.as_bytes())
    }

    /// A span of trace 1 in project 1, of as many bytes as are given.
    fn sized(offset: u64, own: &str, parent: Option<&str>, json: &'static [u8]) -> Arrived {
        Arrived {
            offset,
            time: UnixMillis(offset),
            json: Bytes::from_static(json),
            span: Span {
                organization: OrganizationId(1),
                project: ProjectId(1),
                trace: TraceId::Hex(1),
                id: id(own),
                parent: parent.map(id),
                is_segment: false,
                segment: None,
                splice: Splice {
                    span_id_end: 0,
                    is_segment: None,
                    segment: SegmentPlace::Missing,
                },
            },
        }
    }

    fn span(offset: u64, own: &str, parent: Option<&str>) -> Arrived {
        sized(offset, own, parent, b"{}")
    }

    /// Each subsegment as its top, its ids, and a star when it has a root.
    fn shown(subsegments: &[Subsegment]) -> Vec<String> {
        let text = |id: &SpanId| String::from_utf8(id.to_bytes()).unwrap();
        let of = |subsegment: &Subsegment| {
            let ids: Vec<_> = subsegment
                .spans
                .iter()
                .map(|arrived| text(&arrived.span.id))
                .collect();
            let star = if subsegment.has_root { "*" } else { "" };
            format!("{}{star}: {}", text(&subsegment.top), ids.join(" "))
        };
        subsegments.iter().map(of).collect()
    }

    #[track_caller]
    fn grouped(spans: &[(&str, Option<&str>)], expected: &[&str]) {
        let spans = (0..)
            .zip(spans)
            .map(|(offset, (own, parent))| span(offset, own, *parent));
        assert_eq!(shown(&group(spans.collect(), &WIDE)), expected);
    }

    #[test]
    fn spans_gather_under_their_topmost_known_parent() {
        grouped(&[], &[]);
        grouped(
            &[("r", None), ("a", Some("r")), ("b", Some("a"))],
            &["r*: r a b"],
        );
        // Child first.
        grouped(
            &[("b", Some("a")), ("a", Some("r")), ("r", None)],
            &["r*: b a r"],
        );
        // The parent never came.
        grouped(
            &[("b", Some("a")), ("c", Some("x")), ("a", Some("gone"))],
            &["gone: b a", "x: c"],
        );
        // The one in the middle comes last and joins both.
        grouped(
            &[("c", Some("b")), ("a", Some("r")), ("b", Some("a"))],
            &["r: c a b"],
        );
    }

    #[test]
    fn cycles_and_repeats_are_legal() {
        grouped(&[("a", Some("a"))], &["a: a"]);
        grouped(&[("a", Some("b")), ("b", Some("a"))], &["b: a b"]);
        grouped(
            &[
                ("a", Some("b")),
                ("b", Some("c")),
                ("c", Some("a")),
                ("d", Some("b")),
            ],
            &["c: a b c d"],
        );
        grouped(&[("a", Some("r")), ("a", Some("r"))], &["r: a a"]);
        // Two parents: what hangs under the id goes with the first span that has it.
        grouped(
            &[("a", Some("p")), ("a", Some("q")), ("b", Some("a"))],
            &["p: a b", "q: a"],
        );
        // A root whose id is known to hang elsewhere goes there.
        grouped(&[("a", Some("p")), ("a", None)], &["p*: a a"]);
    }

    #[test]
    fn a_known_segment_goes_before_the_parent_and_a_root_before_both() {
        let mut known = span(0, "a", Some("p"));
        known.span.segment = Some(id("s"));
        let mut marked = span(1, "b", Some("p"));
        marked.span.segment = Some(id("s"));
        marked.span.is_segment = true;
        let mut rootless = span(2, "c", None);
        rootless.span.segment = Some(id("s"));
        let subsegments = group(vec![known, marked, rootless], &WIDE);
        assert_eq!(shown(&subsegments), ["s: a", "b*: b", "c*: c"]);
    }

    #[test]
    fn nothing_crosses_a_project_or_a_trace() {
        let mut other_project = span(1, "a", Some("r"));
        other_project.span.project = ProjectId(2);
        let mut other_trace = span(2, "b", Some("r"));
        other_trace.span.trace = TraceId::Hex(2);
        let mut other_organization = span(3, "c", Some("r"));
        other_organization.span.organization = OrganizationId(2);
        let spans = vec![
            span(0, "r", None),
            other_project,
            other_trace,
            other_organization,
        ];
        let subsegments = group(spans, &WIDE);
        assert_eq!(shown(&subsegments), ["r*: r c", "r: a", "r: b"]);
        assert_eq!(subsegments[0].organization, OrganizationId(1));
    }

    #[test]
    fn a_group_over_a_limit_is_cut_and_only_the_piece_with_the_root_has_it() {
        let spans = || {
            vec![
                span(0, "a", Some("r")),
                span(1, "b", Some("r")),
                span(2, "r", None),
            ]
        };
        let limits = |spans_max, bytes_max| GroupLimits {
            spans_max,
            bytes_max,
        };
        assert_eq!(shown(&group(spans(), &limits(2, 100))), ["r: a b", "r*: r"]);
        assert_eq!(shown(&group(spans(), &limits(100, 4))), ["r: a b", "r*: r"]);
        assert_eq!(shown(&group(spans(), &limits(100, 6))), ["r*: a b r"]);
        assert_eq!(
            shown(&group(spans(), &limits(0, 0))),
            ["r: a", "r: b", "r*: r"]
        );
        // A single larger one goes alone.
        let large = vec![
            span(0, "a", Some("r")),
            sized(1, "b", Some("r"), &[b' '; 50]),
            span(2, "c", Some("r")),
        ];
        assert_eq!(
            shown(&group(large, &limits(100, 10))),
            ["r: a", "r: b", "r: c"]
        );
    }

    #[test]
    fn a_deep_trace_costs_no_more_than_a_flat_one() {
        const SPANS: u64 = 100_000;
        let name = |number: u64| format!("{number:016x}");
        // A chain, child first; then as many spans again under its lowest end.
        let chain = (0..SPANS).map(|number| span(number, &name(number), Some(&name(number + 1))));
        let leaves = (0..SPANS)
            .map(|number| span(SPANS + number, &name(2 * SPANS + number), Some(&name(0))));
        let spans: Vec<_> = chain.chain(leaves).collect();
        let began = Clock::mono_now();
        let subsegments = group(spans, &WIDE);
        let took = Clock::mono_now().since(began);
        assert_eq!(subsegments.len(), 1);
        assert_eq!(subsegments[0].top, id(&name(SPANS)));
        assert_eq!(subsegments[0].spans.len(), 200_000);
        assert!(took < Duration::from_secs(3), "{took:?}");
    }

    /// The words of docs/spec.md 3, as they stand there.
    fn naive(spans: &[Arrived]) -> Vec<(SpanId, Vec<Arrived>)> {
        type Key = (ProjectId, TraceId, SpanId);
        let mut redirects: HashMap<Key, SpanId> = HashMap::new();
        let mut groups: Vec<(Key, Vec<Arrived>)> = Vec::new();
        for arrived in spans {
            let span = &arrived.span;
            let key = |id: &SpanId| (span.project, span.trace.clone(), id.clone());
            let mut top = match (&span.parent, &span.segment) {
                (Some(_), Some(segment)) if !span.is_segment => segment.clone(),
                (Some(parent), None) if !span.is_segment => parent.clone(),
                _ => span.id.clone(),
            };
            while let Some(next) = redirects.get(&key(&top)) {
                top = next.clone();
            }
            let mut joining = vec![arrived.clone()];
            if top != span.id {
                if let Some(own) = groups.iter().position(|(at, _)| *at == key(&span.id)) {
                    let mut in_front = groups.remove(own).1;
                    in_front.append(&mut joining);
                    joining = in_front;
                }
                redirects.entry(key(&span.id)).or_insert(top.clone());
            }
            match groups.iter_mut().find(|(at, _)| *at == key(&top)) {
                Some((_, spans)) => spans.append(&mut joining),
                None => groups.push((key(&top), joining)),
            }
        }
        for (_, spans) in &mut groups {
            spans.sort_by_key(|arrived| arrived.offset);
        }
        groups.sort_by_key(|(_, spans)| spans[0].offset);
        groups
            .into_iter()
            .map(|((_, _, top), spans)| (top, spans))
            .collect()
    }

    /// Few ids, so that they meet: trees, cycles, duplicates, several traces.
    fn batch() -> impl Strategy<Value = Vec<Arrived>> {
        let name = || "[a-j]";
        let ids = (
            name(),
            option::weighted(0.9, name()),
            option::weighted(0.2, name()),
        );
        let one = (
            ids,
            prop::bool::weighted(0.1),
            1..3_u64,
            1..3_u128,
            0..50_usize,
        );
        let one = one.prop_map(
            |((own, parent, segment), is_segment, project, trace, bytes)| {
                static SPACE: [u8; 50] = [b' '; 50];
                let mut arrived = sized(0, &own, parent.as_deref(), &SPACE[..bytes]);
                let span = &mut arrived.span;
                span.segment = segment.as_deref().map(id);
                span.is_segment = is_segment;
                (span.project, span.trace) = (ProjectId(project), TraceId::Hex(trace));
                arrived
            },
        );
        vec(one, 0..40).prop_map(|mut spans| {
            for (offset, arrived) in (0..).zip(&mut spans) {
                arrived.offset = offset;
            }
            spans
        })
    }

    proptest! {
        #[test]
        fn groups_are_those_of_the_plain_words(spans in batch()) {
            let subsegments = group(spans.clone(), &WIDE);
            let found: Vec<_> = subsegments.into_iter().map(|subsegment| (subsegment.top, subsegment.spans)).collect();
            prop_assert_eq!(found, naive(&spans));
        }

        #[test]
        fn every_span_is_in_one_piece_whatever_the_order(
            spans in batch().prop_shuffle(), spans_max in 0..6_usize, bytes_max in 0..120_u64,
        ) {
            let limits = GroupLimits { spans_max, bytes_max };
            let pieces = group(spans.clone(), &limits);
            let mut all: Vec<_> = pieces.iter().flat_map(|piece| piece.spans.clone()).collect();
            all.sort_by_key(|arrived| arrived.offset);
            let mut spans_by_offset = spans.clone();
            spans_by_offset.sort_by_key(|arrived| arrived.offset);
            prop_assert_eq!(all, spans_by_offset);
            let mut joined: BTreeMap<_, Vec<Arrived>> = BTreeMap::new();
            for piece in pieces {
                prop_assert!(!piece.spans.is_empty());
                prop_assert!(piece.spans.is_sorted_by(|one, other| one.offset < other.offset));
                prop_assert!(piece.spans.len() == 1 || piece.spans.len() <= spans_max && piece.bytes <= bytes_max);
                prop_assert_eq!(piece.bytes, piece.spans.iter().map(Arrived::bytes).sum::<u64>());
                prop_assert_eq!(piece.has_root, piece.spans.iter().any(|arrived| arrived.span.is_segment || arrived.span.parent.is_none()));
                prop_assert!(piece.spans.iter().all(|arrived| (arrived.span.project, &arrived.span.trace) == (piece.project, &piece.trace)));
                joined.entry((piece.project, piece.trace, piece.top)).or_default().extend(piece.spans);
            }
            // Pieces of one top are consecutive parts of one group.
            let whole = group(spans, &WIDE);
            prop_assert_eq!(joined.len(), whole.len());
            for subsegment in whole {
                let spans = joined.remove(&(subsegment.project, subsegment.trace, subsegment.top));
                prop_assert_eq!(spans, Some(subsegment.spans));
            }
        }
    }
}
