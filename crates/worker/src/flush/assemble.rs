//! Tells which entries exist, and assembles those of one trace into segments.
//!
//! In:     the entries of a journal in any order; the bucket's position; the shard's `now`.
//! Out:    segments, the earliest deadline first, each with what made it due, if anything did.
//! Keeps:  every entry is in exactly one segment, and entries that share an offset are in the same one; the order of entries
//!         changes nothing. Time grows hardly faster than the number of spans; nothing recurses.
//! Knows:  entry headers. Pure.
//! Source: docs/store.md 3; docs/spec.md 4.2, 4.5.

use std::{
    collections::{HashMap, hash_map},
    time::Duration,
};

use shared::{config::Buffer, ids::SpanId, time::UnixMillis};
use store::entry::EntryHeader;

/// One entry of a journal.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its name in the journal.
    pub field: Vec<u8>,
    /// What that name says.
    pub header: EntryHeader,
    /// Its chunk, as it is stored, where that was read with the header.
    pub chunk: Option<Vec<u8>>,
}

/// A journal's entries, told apart by the position.
#[derive(Debug)]
pub struct Gated {
    /// Entries that exist, in the order in which they came.
    pub open: Vec<Entry>,
    /// How many do not exist yet.
    pub held: usize,
}

/// When a segment is due.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// From the latest arrival to the deadline of a segment without a root.
    pub timeout: Duration,
    /// The same for a segment with a root.
    pub root_timeout: Duration,
    /// From the first arrival to the latest deadline; none: off.
    pub max_segment_age: Option<Duration>,
    /// Bytes of one segment, before compression.
    pub max_segment_bytes: u64,
    /// Bytes of one trace, before compression.
    pub max_trace_bytes: u64,
    /// Entries of one trace.
    pub max_trace_entries: u64,
}

impl Limits {
    /// The limits of the configuration, with the most bytes that a segment may have in one message.
    #[must_use]
    pub fn new(buffer: &Buffer, max_segment_bytes: u64) -> Self {
        Self {
            timeout: buffer.timeout,
            root_timeout: buffer.root_timeout,
            max_segment_age: buffer.max_segment_age,
            max_segment_bytes,
            max_trace_bytes: buffer.max_trace_bytes,
            max_trace_entries: buffer.max_trace_entries,
        }
    }
}

/// Everything of a trace that hangs under one top.
#[derive(Debug)]
pub struct Segment {
    /// The top of its topmost entry.
    pub id: SpanId,
    /// Whether a root span is in it.
    pub has_root: bool,
    /// Bytes of its entries, before compression.
    pub bytes: u64,
    /// When it is due by time.
    pub deadline: UnixMillis,
    /// What made it due; none: it is not.
    pub due: Option<DueReason>,
    /// Its entries by first offset.
    pub entries: Vec<Entry>,
}

/// What made a segment due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DueReason {
    /// Its deadline, with a root in it.
    RootTimeout,
    /// Its deadline, without one.
    Timeout,
    /// Its deadline, which its maximum age brought forward.
    MaxAge,
    /// It, or its trace, is over a limit; its deadline has not passed.
    Size,
}

impl DueReason {
    /// As it stands in Kafka headers and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RootTimeout => "root_timeout",
            Self::Timeout => "timeout",
            Self::MaxAge => "max_age",
            Self::Size => "size",
        }
    }
}

/// Holds back what does not exist yet: entries with an offset at or above the position, and those that share an offset with such
/// an entry, directly or through others. Without a position nothing exists.
#[must_use]
pub fn gate(entries: Vec<Entry>, position: Option<u64>) -> Gated {
    let total = entries.len();
    let Some(position) = position else {
        return Gated {
            open: Vec::new(),
            held: total,
        };
    };
    let is_above = |entry: &Entry| {
        entry
            .header
            .spans
            .iter()
            .any(|span| span.offset >= position)
    };
    if !entries.iter().any(is_above) {
        return Gated {
            open: entries,
            held: 0,
        };
    }
    let mut sets = Sets::new(total);
    join_overlapping(&entries, &mut sets);
    let mut held = vec![false; total];
    for (place, _) in entries
        .iter()
        .enumerate()
        .filter(|(_, entry)| is_above(entry))
    {
        held[sets.first_of(place)] = true;
    }
    let exists = |(place, entry)| (!held[sets.first_of(place)]).then_some(entry);
    let open: Vec<Entry> = entries.into_iter().enumerate().filter_map(exists).collect();
    Gated {
        held: total - open.len(),
        open,
    }
}

/// Puts together what belongs together, and says of each segment whether it is due at `now`.
#[must_use]
pub fn assemble(mut entries: Vec<Entry>, now: UnixMillis, limits: &Limits) -> Vec<Segment> {
    entries.sort_by(|one, other| {
        (first_offset(one), &one.field).cmp(&(first_offset(other), &other.field))
    });
    let trace_is_over = is_over(&entries, limits);
    let mut segments: Vec<Segment> = Vec::new();
    // For the first entry of each segment, the segment's place.
    let mut places = vec![0; entries.len()];
    let (firsts, heads) = hang_together(&entries);
    for (place, entry) in entries
        .iter()
        .enumerate()
        .filter(|&(place, _)| firsts[place] == place)
    {
        places[place] = segments.len();
        segments.push(Segment {
            id: heads[place]
                .map_or(&entry.header, |head| &entries[head].header)
                .top
                .clone(),
            has_root: false,
            bytes: 0,
            deadline: UnixMillis::default(),
            due: None,
            entries: Vec::new(),
        });
    }
    for (place, entry) in entries.into_iter().enumerate() {
        segments[places[firsts[place]]].entries.push(entry);
    }
    for segment in &mut segments {
        segment.settle(now, limits, trace_is_over);
    }
    // They stand by first offset; a stable sort keeps that where deadlines are equal.
    segments.sort_by_key(|segment| segment.deadline);
    segments
}

impl Segment {
    /// Works out everything that follows from its entries.
    fn settle(&mut self, now: UnixMillis, limits: &Limits, trace_is_over: bool) {
        let headers = || self.entries.iter().map(|entry| &entry.header);
        self.has_root = headers().any(|header| header.has_root);
        self.bytes = total_bytes(headers());
        let arrivals = || headers().map(|header| header.arrival);
        let (first, last) = (
            arrivals().min().unwrap_or_default(),
            arrivals().max().unwrap_or_default(),
        );
        let (timeout, mut reason) = if self.has_root {
            (limits.root_timeout, DueReason::RootTimeout)
        } else {
            (limits.timeout, DueReason::Timeout)
        };
        self.deadline = last.after(timeout);
        if let Some(oldest) = limits
            .max_segment_age
            .map(|age| first.after(age))
            .filter(|&oldest| oldest < self.deadline)
        {
            (self.deadline, reason) = (oldest, DueReason::MaxAge);
        }
        let is_over = trace_is_over || self.bytes > limits.max_segment_bytes;
        self.due = if self.deadline <= now {
            Some(reason)
        } else {
            is_over.then_some(DueReason::Size)
        };
    }
}

/// Whether the trace as a whole is over a limit.
fn is_over(entries: &[Entry], limits: &Limits) -> bool {
    let count = u64::try_from(entries.len()).unwrap_or(u64::MAX);
    count > limits.max_trace_entries
        || total_bytes(entries.iter().map(|entry| &entry.header)) > limits.max_trace_bytes
}

fn total_bytes<'e>(headers: impl Iterator<Item = &'e EntryHeader>) -> u64 {
    headers.fold(0, |bytes, header| bytes.saturating_add(header.bytes))
}

/// What a top leads to.
struct Top {
    /// The first entry under it.
    first: usize,
    /// The entry that its id belongs to, if one holds it: the lowest claim wins.
    holder: Option<(Claim, usize)>,
}

/// Why an id that several entries hold belongs to one of them; the lowest counts, then the lowest offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Claim {
    /// It is the id of the root of a root's own entry.
    Root,
    /// It is another id in a root's own entry.
    WithRoot,
    /// It is in an entry without a root of its own.
    Other,
}

/// Finds what belongs together among entries in the order of their first offsets.
///
/// Shape:  for each entry, the first entry of its segment; for each first entry of a segment, the entry whose top names the segment.
fn hang_together(entries: &[Entry]) -> (Vec<usize>, Vec<Option<usize>>) {
    // Most traces have one: it is a segment, whatever its top.
    if entries.len() == 1 {
        return (vec![0], vec![Some(0)]);
    }
    let mut sets = Sets::new(entries.len());
    join_overlapping(entries, &mut sets);
    let mut tops = join_same_tops(entries, &mut sets);
    let owns: Vec<bool> = entries.iter().map(is_roots_own).collect();
    find_holders(entries, &owns, &mut tops);

    // For each entry, the one above it. A root's own is above itself, or one of the same root before it: nothing else is.
    let holder = |entry: &Entry| {
        tops.get(&entry.header.top)?
            .holder
            .map(|(_, holder)| holder)
    };
    let above: Vec<Option<usize>> = entries.iter().map(holder).collect();
    for (place, &above) in above.iter().enumerate() {
        if let Some(above) = above {
            sets.join(place, above);
        }
    }

    // Several topmost entries are in one segment only when they share an offset, or in a cycle.
    let mut heads: Vec<Option<usize>> = vec![None; entries.len()];
    for place in topmost(&above) {
        let head = &mut heads[sets.first_of(place)];
        if head.is_none_or(|head| owns[place] && !owns[head]) {
            *head = Some(place);
        }
    }
    (
        (0..entries.len())
            .map(|place| sets.first_of(place))
            .collect(),
        heads,
    )
}

/// Joins entries that share an offset: an earlier life of the writer cut its batches otherwise, and each holds that very span.
/// Where ids are given twice, such entries may have different tops and lead apart; their span is to be produced once all the same.
fn join_overlapping(entries: &[Entry], sets: &mut Sets) {
    let offsets = entries.iter().enumerate().flat_map(|(place, entry)| {
        entry
            .header
            .spans
            .iter()
            .map(move |span| (span.offset, place))
    });
    let mut offsets: Vec<(u64, usize)> = offsets.collect();
    offsets.sort_unstable();
    for pair in offsets.windows(2) {
        if pair[0].0 == pair[1].0 {
            sets.join(pair[0].1, pair[1].1);
        }
    }
}

fn join_same_tops<'e>(entries: &'e [Entry], sets: &mut Sets) -> HashMap<&'e SpanId, Top> {
    let mut tops = HashMap::new();
    for (place, entry) in entries.iter().enumerate() {
        match tops.entry(&entry.header.top) {
            hash_map::Entry::Occupied(top) => {
                let Top { first, .. } = top.get();
                sets.join(place, *first);
            }
            hash_map::Entry::Vacant(vacant) => {
                vacant.insert(Top {
                    first: place,
                    holder: None,
                });
            }
        }
    }
    tops
}

/// Finds for each top the entry that its id belongs to.
fn find_holders(entries: &[Entry], owns: &[bool], tops: &mut HashMap<&SpanId, Top>) {
    for (place, entry) in entries.iter().enumerate() {
        for span in &entry.header.spans {
            let Some(top) = tops.get_mut(&span.id) else {
                continue;
            };
            let claim = match (owns[place], span.id == entry.header.top) {
                (true, true) => Claim::Root,
                (true, false) => Claim::WithRoot,
                (false, _) => Claim::Other,
            };
            let claim = (claim, place);
            top.holder = Some(top.holder.map_or(claim, |holder| holder.min(claim)));
        }
    }
}

/// Whether it is the entry of a root span itself: nothing is above it. An entry with a root whose top it does not hold is none:
/// another span has the root's id, and hangs under that top.
fn is_roots_own(entry: &Entry) -> bool {
    let EntryHeader {
        has_root,
        top,
        spans,
        ..
    } = &entry.header;
    *has_root && spans.iter().any(|span| span.id == *top)
}

/// The entries, in order, that have no entry above them or are above themselves, through others or directly.
fn topmost(above: &[Option<usize>]) -> Vec<usize> {
    let mut is_topmost: Vec<bool> = above.iter().map(Option::is_none).collect();
    // For each entry, the walk that has seen it: the entry where it began.
    let mut seen: Vec<Option<usize>> = vec![None; above.len()];
    for start in 0..above.len() {
        let mut place = start;
        while seen[place].is_none() {
            seen[place] = Some(start);
            place = above[place].unwrap_or(place);
        }
        // The walk came back to itself: from here on round it is a cycle.
        while seen[place] == Some(start) && !is_topmost[place] {
            is_topmost[place] = true;
            place = above[place].unwrap_or(place);
        }
    }
    (0..above.len())
        .filter(|&place| is_topmost[place])
        .collect()
}

/// Its lowest offset: spans stand by offset in a header.
fn first_offset(entry: &Entry) -> u64 {
    entry
        .header
        .spans
        .first()
        .map_or(u64::MAX, |span| span.offset)
}

/// Which of some things belong together; a set is known by its first member.
struct Sets {
    /// For each thing, itself when it is the first of its set, else an earlier one of the same set.
    earlier: Vec<usize>,
}

impl Sets {
    /// Each in a set of its own.
    fn new(count: usize) -> Self {
        Self {
            earlier: (0..count).collect(),
        }
    }

    fn first_of(&mut self, mut place: usize) -> usize {
        while self.earlier[place] != place {
            // Halves the way for whoever asks next.
            self.earlier[place] = self.earlier[self.earlier[place]];
            place = self.earlier[place];
        }
        place
    }

    fn join(&mut self, one: usize, other: usize) {
        let (one, other) = (self.first_of(one), self.first_of(other));
        self.earlier[one.max(other)] = one.min(other);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::{collection::vec, prelude::*};
    use shared::{ids::OrganizationId, time::Clock};
    use store::entry::SpanAt;

    use super::*;

    const NOW: UnixMillis = UnixMillis(1_000_000);
    const LIMITS: Limits = Limits {
        timeout: Duration::from_secs(60),
        root_timeout: Duration::from_secs(10),
        max_segment_age: Some(Duration::from_secs(600)),
        max_segment_bytes: 1_000,
        max_trace_bytes: 5_000,
        max_trace_entries: 100,
    };

    /// An entry of spans given as offset and id, under a top; it arrived at `NOW`.
    fn entry(spans: &[(u64, u64)], top: u64, has_root: bool) -> Entry {
        let header = EntryHeader {
            has_root,
            organization: OrganizationId(1),
            arrival: NOW,
            top: SpanId::Hex(top),
            spans: spans
                .iter()
                .map(|&(offset, id)| SpanAt {
                    offset,
                    id: SpanId::Hex(id),
                })
                .collect(),
            bytes: 1,
        };
        Entry {
            field: header.encode(),
            header,
            chunk: None,
        }
    }

    /// An entry of one span with a root.
    fn arrived(offset: u64, arrival: u64, bytes: u64) -> Entry {
        let mut entry = entry(&[(offset, offset)], offset, true);
        (entry.header.arrival, entry.header.bytes) = (UnixMillis(arrival), bytes);
        entry
    }

    fn offsets(entries: &[Entry]) -> Vec<u64> {
        let spans = entries.iter().flat_map(|entry| &entry.header.spans);
        let offsets: BTreeSet<u64> = spans.map(|span| span.offset).collect();
        offsets.into_iter().collect()
    }

    type Outline = (Vec<u64>, SpanId, bool);

    /// What segments are, whatever entries they are made of: offsets, id, has a root.
    fn outline(entries: Vec<Entry>) -> Vec<Outline> {
        let segments = assemble(entries, NOW, &LIMITS).into_iter();
        let mut outline: Vec<Outline> = segments
            .map(|segment| (offsets(&segment.entries), segment.id, segment.has_root))
            .collect();
        outline.sort();
        outline
    }

    fn segment(offsets: &[u64], id: u64, has_root: bool) -> Outline {
        (offsets.to_vec(), SpanId::Hex(id), has_root)
    }

    #[test]
    fn entries_hang_under_the_entry_that_holds_their_top() {
        let entries = vec![
            entry(&[(0, 3)], 2, false),
            entry(&[(1, 2)], 1, false),
            entry(&[(2, 1)], 9, false),
            entry(&[(3, 4)], 9, false),
        ];
        assert_eq!(outline(entries), [segment(&[0, 1, 2, 3], 9, false)]);
    }

    #[test]
    fn a_root_starts_a_segment_and_the_others_of_its_top_join_it() {
        // Root 5 with one child in its entry and another that came before; a second span of id 5 hangs under 1.
        let entries = || {
            vec![
                entry(&[(3, 6)], 5, false),
                entry(&[(4, 5)], 1, false),
                entry(&[(5, 5), (6, 7)], 5, true),
            ]
        };
        assert_eq!(
            outline(entries()),
            [segment(&[3, 5, 6], 5, true), segment(&[4], 1, false)]
        );
        // Not even a lower offset takes the id from the root's own entry.
        let mut earlier = entries();
        earlier.push(entry(&[(0, 5)], 2, false));
        earlier.push(entry(&[(1, 8), (2, 5)], 8, true));
        let expected = [
            segment(&[0], 2, false),
            segment(&[1, 2], 8, true),
            segment(&[3, 5, 6], 5, true),
            segment(&[4], 1, false),
        ];
        assert_eq!(outline(earlier), expected);
    }

    #[test]
    fn an_id_belongs_to_the_entry_with_the_lowest_offset_unless_a_root_has_it() {
        let entries = |has_root| {
            vec![
                entry(&[(0, 5)], 1, false),
                entry(&[(1, 5), (2, 2)], 2, has_root),
                entry(&[(3, 6)], 5, false),
            ]
        };
        assert_eq!(
            outline(entries(false)),
            [segment(&[0, 3], 1, false), segment(&[1, 2], 2, false)]
        );
        assert_eq!(
            outline(entries(true)),
            [segment(&[0], 1, false), segment(&[1, 2, 3], 2, true)]
        );
    }

    #[test]
    fn a_root_whose_id_another_span_took_hangs_under_that_ones_top() {
        // One batch: span 5 under 1, then a root of id 5: the group's top is 1, which comes later.
        let entries = vec![
            entry(&[(0, 5), (1, 5)], 1, true),
            entry(&[(2, 1)], 9, false),
        ];
        assert_eq!(outline(entries), [segment(&[0, 1, 2], 9, true)]);
    }

    #[test]
    fn a_cycle_is_named_by_its_entry_with_the_lowest_offset() {
        // 1 under 2 under 3 under 1; span 4 hangs under 2, and came first.
        let entries = vec![
            entry(&[(3, 1)], 2, false),
            entry(&[(2, 2)], 3, false),
            entry(&[(1, 3)], 1, false),
            entry(&[(0, 4)], 2, false),
        ];
        assert_eq!(outline(entries), [segment(&[0, 1, 2, 3], 1, false)]);
        assert_eq!(
            outline(vec![entry(&[(0, 1)], 1, false)]),
            [segment(&[0], 1, false)]
        );
    }

    #[test]
    fn pieces_of_a_group_stay_together() {
        let entries = vec![
            entry(&[(0, 1)], 1, true),
            entry(&[(1, 2)], 1, false),
            entry(&[(2, 3)], 2, false),
        ];
        assert_eq!(outline(entries), [segment(&[0, 1, 2], 1, true)]);
    }

    /// By tops and ids alone they would lead apart, and the span that both hold would be produced twice.
    #[test]
    fn entries_that_share_an_offset_stay_together_where_ids_are_given_twice() {
        // Two spans of id 5, then a child. Alone, it follows the first; in one batch with both, it followed the second.
        let entries = vec![
            entry(&[(0, 5)], 1, false),
            entry(&[(1, 5)], 2, false),
            entry(&[(2, 6)], 5, false),
            entry(&[(1, 5), (2, 6)], 2, false),
        ];
        assert_eq!(outline(entries), [segment(&[0, 1, 2], 1, false)]);
        // A root of an id that was there before. Alone, it starts a segment; in one batch, it went under 1.
        let entries = vec![
            entry(&[(0, 5)], 1, false),
            entry(&[(1, 5)], 5, true),
            entry(&[(0, 5), (1, 5)], 1, true),
        ];
        assert_eq!(outline(entries), [segment(&[0, 1], 5, true)]);
    }

    #[test]
    fn what_does_not_exist_yet_is_held_with_all_that_it_overlaps() {
        let entries = || {
            vec![
                entry(&[(0, 1), (1, 2)], 9, false),
                entry(&[(1, 2), (4, 3)], 9, false),
                entry(&[(4, 3), (6, 4)], 9, false),
                entry(&[(2, 5)], 9, false),
            ]
        };
        let gated = |position| {
            let Gated { open, held } = gate(entries(), position);
            (open.iter().map(first_offset).collect::<Vec<_>>(), held)
        };
        assert_eq!(gated(None), (vec![], 4));
        assert_eq!(gated(Some(7)), (vec![0, 1, 4, 2], 0));
        assert_eq!(gated(Some(6)), (vec![2], 3));
        assert_eq!(gated(Some(2)), (vec![], 4));
    }

    /// A row: arrivals of the entries, has a root, maximum age in seconds; deadline in milliseconds, its reason.
    #[test]
    fn deadlines_are_inclusive_and_say_what_made_them() {
        use DueReason::{MaxAge, RootTimeout, Timeout};
        let rows: [(&[u64], bool, u64, u64, DueReason); 7] = [
            (&[1_000], true, 600, 11_000, RootTimeout),
            (&[1_000], false, 600, 61_000, Timeout),
            (&[9_000, 1_000, 5_000], false, 600, 69_000, Timeout),
            (&[1_000, 9_000], true, 15, 16_000, MaxAge),
            // The age is no earlier than the timeout: it changed nothing.
            (&[1_000, 9_000], true, 18, 19_000, RootTimeout),
            (&[1_000, 900_000], false, 600, 601_000, MaxAge),
            (&[1_000, 900_000], false, 0, 960_000, Timeout),
        ];
        for (arrivals, has_root, age, deadline, reason) in rows {
            let entries = || {
                arrivals.iter().zip(0..).map(|(&arrival, offset)| {
                    let mut entry = entry(&[(offset, offset)], 0, has_root && offset == 0);
                    entry.header.arrival = UnixMillis(arrival);
                    entry
                })
            };
            let limits = Limits {
                max_segment_age: (age > 0).then(|| Duration::from_secs(age)),
                ..LIMITS
            };
            for (now, due) in [(deadline, Some(reason)), (deadline - 1, None)] {
                let segments = assemble(entries().collect(), UnixMillis(now), &limits);
                assert_eq!(
                    (segments.len(), segments[0].deadline.0, segments[0].due),
                    (1, deadline, due),
                    "{arrivals:?}"
                );
            }
        }
    }

    #[test]
    fn what_is_over_a_limit_is_due_at_once() {
        let dues = |entries: Vec<Entry>| {
            assemble(entries, NOW, &LIMITS)
                .into_iter()
                .map(|segment| (segment.bytes, segment.due))
                .collect::<Vec<_>>()
        };
        let size = Some(DueReason::Size);
        // One segment; one trace in bytes; in entries.
        assert_eq!(
            dues(vec![arrived(0, NOW.0, 1_000), arrived(1, NOW.0, 1_001)]),
            [(1_000, None), (1_001, size)]
        );
        assert_eq!(
            dues((0..5).map(|offset| arrived(offset, NOW.0, 1_000)).collect()),
            [(1_000, None); 5]
        );
        assert_eq!(
            dues((0..6).map(|offset| arrived(offset, NOW.0, 834)).collect()),
            [(834, size); 6]
        );
        assert_eq!(
            dues((0..100).map(|offset| arrived(offset, NOW.0, 1)).collect()),
            [(1, None); 100]
        );
        assert_eq!(
            dues((0..101).map(|offset| arrived(offset, NOW.0, 1)).collect()),
            [(1, size); 101]
        );
        // A deadline that has passed is the truer reason.
        assert_eq!(
            dues(vec![arrived(0, NOW.0 - 10_000, 9_000)]),
            [(9_000, Some(DueReason::RootTimeout))]
        );
        assert_eq!(
            dues(vec![
                arrived(0, NOW.0, u64::MAX),
                arrived(1, NOW.0, u64::MAX)
            ]),
            [(u64::MAX, size); 2]
        );
    }

    #[test]
    fn segments_come_with_the_earliest_deadline_first() {
        let entries = vec![
            arrived(0, 3_000, 1),
            arrived(1, 1_000, 1),
            arrived(2, 2_000, 1),
            arrived(3, 1_000, 1),
        ];
        let order: Vec<u64> = assemble(entries, NOW, &LIMITS)
            .iter()
            .map(|segment| first_offset(&segment.entries[0]))
            .collect();
        assert_eq!(order, [1, 3, 2, 0]);
        assert!(assemble(Vec::new(), NOW, &LIMITS).is_empty());
    }

    #[test]
    fn reasons_are_named_as_in_the_kafka_header() {
        let reasons = [
            DueReason::RootTimeout,
            DueReason::Timeout,
            DueReason::MaxAge,
            DueReason::Size,
        ];
        assert_eq!(
            reasons.map(DueReason::as_str),
            ["root_timeout", "timeout", "max_age", "size"]
        );
    }

    /// A chain upwards, one downwards, a cycle, a star, overlaps from the front and from behind: a quadratic step would take far longer,
    /// a recursion would overflow.
    #[test]
    fn a_hundred_thousand_entries_are_no_burden() {
        const COUNT: u64 = 100_000;
        let shapes: [&dyn Fn(u64) -> Entry; 6] = [
            &|n| entry(&[(n, n)], n + 1, false),
            &|n| entry(&[(n, COUNT - n)], COUNT - n + 1, false),
            &|n| entry(&[(n, n)], (n + 1) % COUNT, false),
            &|n| entry(&[(n, n + 1)], 0, false),
            &|n| entry(&[(n, n), (n + 1, n + 1)], COUNT + n, false),
            &|n| {
                entry(
                    &[
                        (n, n),
                        (2 * COUNT - n, COUNT + n),
                        (2 * COUNT - n + 1, 3 * COUNT + n),
                    ],
                    0,
                    false,
                )
            },
        ];
        for shape in shapes {
            let began = Clock::mono_now();
            let entries: Vec<Entry> = (0..COUNT).map(shape).collect();
            let overlap = entries[0].header.spans.len() > 1;
            assert_eq!(
                gate(entries.clone(), Some(COUNT)).held,
                if overlap { 100_000 } else { 0 }
            );
            assert_eq!(assemble(entries, NOW, &LIMITS).len(), 1);
            assert!(Clock::mono_now().since(began) < Duration::from_secs(5));
        }
    }

    /// One span of a trace's input; its offset is its place.
    #[derive(Debug, Clone, Copy)]
    struct Span {
        id: u64,
        parent: u64,
        is_root: bool,
    }

    impl Span {
        fn effective_parent(self) -> u64 {
            if self.is_root { self.id } else { self.parent }
        }
    }

    /// Subsegments of one batch as SPEC 3 says, cut into pieces of at most `piece` spans.
    fn subsegments(batch: &[(u64, Span)], piece: usize) -> Vec<Entry> {
        let mut redirects = BTreeMap::new();
        let mut groups: BTreeMap<u64, Vec<(u64, Span)>> = BTreeMap::new();
        for &(offset, span) in batch {
            let mut top = span.effective_parent();
            while let Some(&next) = redirects.get(&top) {
                top = next;
            }
            let mut group = groups.remove(&top).unwrap_or_default();
            if top != span.id {
                group.splice(0..0, groups.remove(&span.id).unwrap_or_default());
                redirects.insert(span.id, top);
            }
            group.push((offset, span));
            groups.insert(top, group);
        }
        let pieces = groups.into_iter().flat_map(|(top, spans)| {
            spans
                .chunks(piece)
                .map(|spans| (top, spans.to_vec()))
                .collect::<Vec<_>>()
        });
        let pieces = pieces.map(|(top, mut spans)| {
            spans.sort_by_key(|&(offset, _)| offset);
            let ids: Vec<(u64, u64)> = spans
                .iter()
                .map(|&(offset, span)| (offset, span.id))
                .collect();
            entry(&ids, top, spans.iter().any(|(_, span)| span.is_root))
        });
        pieces.collect()
    }

    /// What lies in the journal after some lives of a writer, each from an offset on, with batches of its own sizes; the last one goes
    /// to the end, those before it as far as their batches reach.
    fn journal(spans: &[Span], lives: &[(usize, Vec<usize>)], piece: usize) -> Vec<Entry> {
        let spans: Vec<(u64, Span)> = (0..).zip(spans.iter().copied()).collect();
        let mut fields = BTreeMap::new();
        for (life, (start, batches)) in lives.iter().enumerate() {
            let is_last = life + 1 == lives.len();
            let mut left = &spans[if is_last { 0 } else { start % spans.len() }..];
            for &size in batches.iter().chain(is_last.then_some(&usize::MAX)) {
                let (batch, rest) = left.split_at(size.min(left.len()));
                fields.extend(
                    subsegments(batch, piece)
                        .into_iter()
                        .map(|entry| (entry.field.clone(), entry)),
                );
                left = rest;
            }
        }
        fields.into_values().collect()
    }

    /// Segments of single spans with distinct ids: everything that leads to the same place by effective parents. The name of a cycle is left open.
    fn model(spans: &[Span]) -> Vec<(Vec<u64>, Option<u64>, bool)> {
        let find = |id: u64| spans.iter().find(|span| span.id == id);
        let end = |span: &Span| {
            let mut at = *span;
            let mut way = vec![at.id];
            loop {
                let parent = at.effective_parent();
                match find(parent) {
                    _ if at.is_root => return (parent, true),
                    None => return (parent, true),
                    Some(_) if way.contains(&parent) => {
                        let cycle = &way[way.iter().position(|&id| id == parent).unwrap()..];
                        return (*cycle.iter().min().unwrap(), false);
                    }
                    Some(next) => at = *next,
                }
                way.push(at.id);
            }
        };
        let mut segments: BTreeMap<(u64, bool), (Vec<u64>, bool)> = BTreeMap::new();
        for (offset, span) in (0..).zip(spans) {
            let (offsets, has_root) = segments.entry(end(span)).or_default();
            offsets.push(offset);
            *has_root |= span.is_root;
        }
        let mut segments: Vec<_> = segments
            .into_iter()
            .map(|((id, is_named), (offsets, has_root))| {
                (offsets, is_named.then_some(id), has_root)
            })
            .collect();
        segments.sort();
        segments
    }

    /// Spans with ids below 40, each once when `distinct`; parents among them, or missing, or themselves, or in cycles.
    fn spans(distinct: bool) -> impl Strategy<Value = Vec<Span>> {
        let ids = if distinct {
            Just((0..40).collect::<Vec<u64>>()).prop_shuffle().boxed()
        } else {
            vec(0..8_u64, 40).boxed()
        };
        (ids, 1..24_usize).prop_flat_map(|(ids, count)| {
            let near = ids[..count].to_vec();
            let parent = prop_oneof![6 => proptest::sample::select(near), 1 => 40..44_u64];
            let relations = vec((parent, proptest::bool::weighted(0.15)), count);
            relations.prop_map(move |relations| {
                ids.iter()
                    .zip(relations)
                    .map(|(&id, (parent, is_root))| Span {
                        id,
                        parent,
                        is_root,
                    })
                    .collect()
            })
        })
    }

    /// Lives of a writer, for `journal`.
    fn lives() -> impl Strategy<Value = Vec<(usize, Vec<usize>)>> {
        vec((0..24_usize, vec(1..7_usize, 0..8)), 1..4)
    }

    fn shuffled(
        spans: impl Strategy<Value = Vec<Span>>,
    ) -> impl Strategy<Value = (Vec<Span>, Vec<Entry>)> {
        (spans, lives(), 1..6_usize).prop_flat_map(|(spans, lives, piece)| {
            (
                Just(journal(&spans, &lives, piece)).prop_shuffle(),
                Just(spans),
            )
                .prop_map(|(entries, spans)| (spans, entries))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_500))]

        #[test]
        fn segments_are_the_same_for_every_batch_cut_every_replay_and_every_order((spans, entries) in shuffled(spans(true))) {
            let model = model(&spans);
            let outline = outline(entries);
            prop_assert_eq!(outline.len(), model.len());
            for ((offsets, id, has_root), (model_offsets, model_id, model_has_root)) in outline.into_iter().zip(model) {
                prop_assert_eq!((&offsets, has_root), (&model_offsets, model_has_root));
                match model_id {
                    Some(model_id) => prop_assert_eq!(id, SpanId::Hex(model_id)),
                    None => prop_assert!(offsets.iter().any(|&offset| SpanId::Hex(spans[usize::try_from(offset).unwrap()].id) == id)),
                }
            }
        }

        #[test]
        fn whatever_the_ids_every_entry_is_in_one_segment_and_every_offset_too((spans, entries) in shuffled(spans(false))) {
            let mut fields: Vec<Vec<u8>> = entries.iter().map(|entry| entry.field.clone()).collect();
            let mut reversed = entries.clone();
            reversed.sort_by(|one, other| other.field.cmp(&one.field));
            let segments = assemble(entries, NOW, &LIMITS);
            let mut found = BTreeSet::new();
            for segment in &segments {
                prop_assert!(offsets(&segment.entries).into_iter().all(|offset| found.insert(offset)));
                prop_assert!(segment.entries.iter().any(|entry| entry.header.top == segment.id));
                prop_assert!(segment.entries.is_sorted_by_key(first_offset));
            }
            prop_assert_eq!(found.len(), spans.len());
            let reversed = assemble(reversed, NOW, &LIMITS);
            prop_assert_eq!(segments.len(), reversed.len());
            for (one, other) in segments.iter().zip(&reversed) {
                prop_assert_eq!(&one.id, &other.id);
                prop_assert!(one.entries.iter().map(|entry| &entry.field).eq(other.entries.iter().map(|entry| &entry.field)));
            }
            let mut in_segments: Vec<Vec<u8>> = segments.into_iter().flat_map(|segment| segment.entries).map(|entry| entry.field).collect();
            fields.sort();
            in_segments.sort();
            prop_assert_eq!(fields, in_segments);
        }

        #[test]
        fn the_gate_holds_what_overlaps_through_others((_, entries) in shuffled(spans(false)), position in 0..26_u64) {
            let mut held: BTreeSet<u64> = (position..100).collect();
            let is_held = |entry: &Entry, held: &BTreeSet<u64>| entry.header.spans.iter().any(|span| held.contains(&span.offset));
            loop {
                let before = held.len();
                for entry in &entries {
                    if is_held(entry, &held) {
                        held.extend(entry.header.spans.iter().map(|span| span.offset));
                    }
                }
                if held.len() == before {
                    break;
                }
            }
            let expected: Vec<&[u8]> = entries.iter().filter(|entry| !is_held(entry, &held)).map(|entry| &entry.field[..]).collect();
            let gated = gate(entries.clone(), Some(position));
            prop_assert_eq!(gated.open.iter().map(|entry| &entry.field[..]).collect::<Vec<_>>(), expected);
            prop_assert_eq!(gated.held, entries.len() - gated.open.len());
        }
    }
}
