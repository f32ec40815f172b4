//! Reads the chunks of the chosen segments, where the look has not.
//!
//! In:     what was chosen, with the fields of every segment.
//! Out:    the same with its spans; what is gone, corrupt or not readable by this build is told apart.
//! Keeps:  a reply holds a bounded number of bytes; a chunk that lies about its size is corrupt.
//! Knows:  the store's read side.
//! Source: docs/store.md 3.

use std::collections::HashSet;

use log::{error, warn};
use store::{
    chunk::{self, Chunk, ChunkError},
    client::{Client, Command, reply},
    scripts::FieldOut,
};

use super::{
    assemble::{Entry, Segment},
    choose::{Look, UNKNOWN_AGAIN},
    due::Due,
};
use crate::{
    Ended,
    ask::{Answer, ask},
    beat::Beat,
};

/// Bytes of spans, before compression, that one reply may hold; a single larger entry comes alone.
const REPLY_BYTES: u64 = 8 << 20;
/// The most bytes of spans in a chunk whose header does not say how many there are.
const UNTOLD_BYTES: u64 = 64 << 20;

/// One trace with the spans of its due segments.
#[derive(Debug)]
pub struct Loaded {
    /// The trace, its next look included.
    pub look: Look,
    /// The due segments.
    pub segments: Vec<LoadedSegment>,
    /// Entries that are given up, counted.
    pub given_up: Vec<FieldOut>,
}

/// One segment with its spans.
#[derive(Debug)]
pub struct LoadedSegment {
    /// The segment; its entries are those of `chunks`, in the same order.
    pub segment: Segment,
    /// The spans of each entry.
    pub chunks: Vec<Chunk>,
}

/// Loads everything that was chosen.
///
/// # Errors
/// [`Ended::Stopped`].
pub fn load(client: &mut Client, beat: &mut Beat, looks: Vec<Look>) -> Result<Vec<Loaded>, Ended> {
    let mut commands = Vec::new();
    for look in &looks {
        let wanted = look.flush.iter().map(|segment| &segment.entries[..]);
        let wanted = wanted.filter(|entries| !have_chunks(entries));
        for group in wanted.flat_map(groups) {
            commands.push(Command::chunks(
                look.due.bucket,
                &look.due.member,
                group.iter().map(|entry| &entry.field[..]),
            ));
        }
        for field in &look.damaged {
            commands.push(Command::chunks(
                look.due.bucket,
                &look.due.member,
                [&field[..]],
            ));
        }
    }
    let mut answers = ask(client, beat, "load segments", commands)?.into_iter();
    Ok(looks
        .into_iter()
        .map(|look| sort(look, &mut answers))
        .collect())
}

/// Whether all of a segment's chunks were read with their headers.
fn have_chunks(entries: &[Entry]) -> bool {
    entries.iter().all(|entry| entry.chunk.is_some())
}

/// Cuts entries into groups whose spans fit into one reply.
fn groups(entries: &[Entry]) -> Vec<&[Entry]> {
    let (mut groups, mut first, mut bytes) = (Vec::new(), 0, 0_u64);
    for (index, entry) in entries.iter().enumerate() {
        bytes = bytes.saturating_add(entry.header.bytes);
        if bytes > REPLY_BYTES && index > first {
            groups.push(&entries[first..index]);
            (first, bytes) = (index, entry.header.bytes);
        }
    }
    groups.push(&entries[first..]);
    groups
}

/// What one field's value turned out to be.
enum Value {
    Spans(Chunk),
    /// Another flusher took it.
    Gone,
    /// Of a build that knows more than this one.
    Unknown,
    Corrupt,
}

/// Sorts the answers of one trace; takes as many as its part of the commands has.
fn sort(mut look: Look, answers: &mut impl Iterator<Item = Answer>) -> Loaded {
    let (mut segments, mut given_up) = (Vec::new(), Vec::new());
    for mut segment in std::mem::take(&mut look.flush) {
        if !have_chunks(&segment.entries) && !take_chunks(&look.due, &mut segment.entries, answers)
        {
            // Nothing of it was taken: it stays, and its lifted score brings it back.
            continue;
        }
        let Some(Read {
            entries,
            chunks,
            damaged,
        }) = read_all(&look.due, segment.entries)
        else {
            // All of it waits for a build that can read it: what a replay wrote twice must not go out twice.
            let again = look.due.now.after(UNKNOWN_AGAIN);
            look.next_look = Some(
                look.next_look
                    .map_or(again, |next_look| next_look.min(again)),
            );
            continue;
        };
        // A span that lies in another entry as well is counted there.
        let mut counted: HashSet<u64> = match damaged.is_empty() {
            true => HashSet::new(),
            false => entries.iter().flat_map(offsets).collect(),
        };
        for entry in damaged {
            let lost = offsets(&entry)
                .filter(|&offset| counted.insert(offset))
                .count();
            given_up.push(corrupt(&look.due, entry.field, lost));
        }
        if !entries.is_empty() {
            let segment = Segment { entries, ..segment };
            segments.push(LoadedSegment { segment, chunks });
        }
    }
    for field in std::mem::take(&mut look.damaged) {
        let values = values(&look.due, answers.next(), 1);
        let Some(value) = values.and_then(|mut values| values.pop()) else {
            continue;
        };
        // How many spans it held is known from its chunk, or not at all: then they turn up as expired.
        let spans = match read(&look.due, value.as_deref(), UNTOLD_BYTES) {
            Value::Spans(chunk) => chunk.len(),
            Value::Gone | Value::Unknown | Value::Corrupt => 0,
        };
        given_up.push(corrupt(&look.due, field, spans));
    }
    Loaded {
        look,
        segments,
        given_up,
    }
}

/// Takes the chunks of one segment from its part of the answers; false where there is no good one.
fn take_chunks(
    due: &Due,
    entries: &mut [Entry],
    answers: &mut impl Iterator<Item = Answer>,
) -> bool {
    let counts: Vec<usize> = groups(entries).into_iter().map(<[Entry]>::len).collect();
    // All of them are taken, good or not: what follows is another segment's.
    let answered: Vec<Option<Values>> = counts
        .into_iter()
        .map(|count| values(due, answers.next(), count))
        .collect();
    let Some(answered) = answered.into_iter().collect::<Option<Vec<_>>>() else {
        return false;
    };
    for (entry, value) in entries.iter_mut().zip(answered.into_iter().flatten()) {
        entry.chunk = value;
    }
    true
}

/// The entries of one segment: those that were read, each with its chunk, and those that hold no spans that could be.
#[derive(Default)]
struct Read {
    entries: Vec<Entry>,
    chunks: Vec<Chunk>,
    damaged: Vec<Entry>,
}

/// Unpacks the chunks of one segment; nothing where one of them is of a build that knows more. What has none is gone.
fn read_all(due: &Due, entries: Vec<Entry>) -> Option<Read> {
    let (mut all, mut is_unknown) = (Read::default(), false);
    for mut entry in entries {
        let chunk = entry.chunk.take();
        match read(due, chunk.as_deref(), entry.header.bytes) {
            Value::Spans(chunk) if chunk.len() == entry.header.spans.len() => {
                all.entries.push(entry);
                all.chunks.push(chunk);
            }
            Value::Spans(_) | Value::Corrupt => all.damaged.push(entry),
            Value::Gone => {}
            Value::Unknown => is_unknown = true,
        }
    }
    (!is_unknown).then_some(all)
}

fn offsets(entry: &Entry) -> impl Iterator<Item = u64> {
    entry.header.spans.iter().map(|span| span.offset)
}

/// Chunks, where they are there.
type Values = Vec<Option<Vec<u8>>>;

fn values(due: &Due, answer: Option<Answer>, count: usize) -> Option<Values> {
    match answer? {
        Ok(reply) => {
            let values = reply::values(reply).filter(|values| values.len() == count);
            if values.is_none() {
                error!(
                    "load segment shard={} member={}: reply is no list of fields={count} (check redis version)",
                    due.bucket.shard, due.member
                );
            }
            values
        }
        Err(refusal) => {
            error!(
                "load segment shard={} member={}: {refusal}",
                due.bucket.shard, due.member
            );
            None
        }
    }
}

fn read(due: &Due, chunk: Option<&[u8]>, bytes_max: u64) -> Value {
    let Some(bytes) = chunk else {
        return Value::Gone;
    };
    match chunk::decode(bytes, bytes_max) {
        Ok(chunk) => Value::Spans(chunk),
        Err(error @ (ChunkError::UnknownCodec(_) | ChunkError::UnknownDictionary(_))) => {
            error!(
                "load entry shard={} member={}: {error} (is a newer build at work?)",
                due.bucket.shard, due.member
            );
            Value::Unknown
        }
        Err(error) => {
            warn!(
                "load entry shard={} member={}: {error}",
                due.bucket.shard, due.member
            );
            Value::Corrupt
        }
    }
}

fn corrupt(due: &Due, field: Vec<u8>, spans: usize) -> FieldOut {
    error!(
        "dropped spans={spans} shard={} member={} reason=corrupt: an entry does not decode",
        due.bucket.shard, due.member
    );
    FieldOut {
        field,
        produced: 0,
        repeats: 0,
        dropped: vec![("corrupt", u64::try_from(spans).unwrap_or(u64::MAX))],
    }
}

#[cfg(test)]
mod tests {
    use shared::{
        ids::{OrganizationId, SpanId},
        time::UnixMillis,
    };
    use store::entry::EntryHeader;

    use super::*;

    #[test]
    fn groups_hold_every_entry_once_and_fit_into_a_reply() {
        let entry = |bytes| Entry {
            field: Vec::new(),
            header: EntryHeader {
                has_root: false,
                organization: OrganizationId(1),
                arrival: UnixMillis(1),
                top: SpanId::Hex(1),
                spans: Vec::new(),
                bytes,
            },
            chunk: None,
        };
        let entries: Vec<Entry> = [3 << 20, 4 << 20, 2 << 20, 20 << 20, 1, 1]
            .map(entry)
            .into();
        let sizes: Vec<Vec<u64>> = groups(&entries)
            .into_iter()
            .map(|group| group.iter().map(|entry| entry.header.bytes >> 20).collect())
            .collect();
        assert_eq!(sizes, [vec![3, 4], vec![2], vec![20], vec![0, 0]]);
    }
}
