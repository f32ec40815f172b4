//! Lifts due traces out of sight of others, then reads what their journals hold.
//!
//! In:     `Due` traces.
//! Out:    a `Journal` for each: its entries below the position, those of a small one with their chunks, and what could not be read.
//! Keeps:  lifting stands before reading: whoever inserts from then on lowers the score by itself; however
//!         large the traces are, a bounded number of headers is held, and of bytes of chunks.
//! Knows:  the queue, the position, entry headers. Not what is due in a journal.
//! Source: docs/store.md 3.

use std::{collections::HashMap, fmt::Display, time::Duration};

use log::error;
use shared::{shard::ShardId, time::Clock};
use store::{
    client::{Client, Command, WHOLE_BYTES, reply},
    entry::{EntryHeader, HeaderError},
    scripts::{QueueCall, QueueMode},
};

use super::{
    assemble::{Entry, gate},
    due::{Due, by_bucket},
};
use crate::{
    Ended,
    ask::{Answer, ask},
    beat::Beat,
};

const ATTEMPT: &str = "look at journals";
/// Up to so many entries a journal is read whole: chunks that are read with their headers cost no look-up and no round trip of
/// their own.
const WHOLE_ENTRIES: u64 = 4;
/// Entries whose headers one pipeline reads; a single larger trace comes alone, in pages.
const GROUP_ENTRIES: u64 = 20_000;
/// Entries of a page. Redis sends their chunks along.
const PAGE_ENTRIES: u64 = 250;
/// How many times as many pages are read at most as its entries would fill.
const PAGES_MAX: u64 = 20;
/// Bytes, as they are stored, from which on a lane looks at no more traces. Decoded, headers take some five times as many.
const LOOK_BYTES: usize = 8 << 20;
/// Time after which a lane looks at no more traces.
const LOOK_MAX: Duration = Duration::from_secs(10);
/// One trace's journal as a look found it.
#[derive(Debug)]
pub struct Journal {
    /// The trace.
    pub due: Due,
    /// Entries that exist: below the position.
    pub open: Vec<Entry>,
    /// Entries that do not exist yet.
    pub held: usize,
    /// Fields whose header does not decode.
    pub damaged: Vec<Vec<u8>>,
    /// Entries of a version that this build does not know.
    pub unknown: usize,
}

impl Journal {
    /// Bytes of what was read of its entries, as they are stored.
    fn bytes(&self) -> usize {
        let chunk = |entry: &Entry| entry.chunk.as_ref().map_or(0, Vec::len);
        let bytes = self
            .open
            .iter()
            .map(|entry| entry.field.len() + chunk(entry));
        bytes.sum()
    }

    /// Unpacked bytes of its spans, where it is small enough to be read whole; else none.
    fn whole_bytes(&self) -> u64 {
        match self.open.len() as u64 <= WHOLE_ENTRIES {
            true => self.open.iter().map(|entry| entry.header.bytes).sum(),
            false => 0,
        }
    }
}

/// What a lane looked at.
#[derive(Debug)]
pub struct Looked {
    /// The journals.
    pub journals: Vec<Journal>,
    /// The traces whose look failed.
    pub failed: Vec<Due>,
    /// Whether traces were left for the next cycle: they would have been too much, or taken too long. They are as due as they were.
    pub left: bool,
    /// Whether the small journals fit into the room for whole ones even unpacked.
    pub fits: bool,
}

/// Lifts the scores of traces and reads positions and headers, a bounded number of them at a time and in all, and small journals
/// whole if asked to. A trace whose look failed comes back by its lifted score.
///
/// # Errors
/// [`Ended::Stopped`].
pub fn look(
    client: &mut Client,
    beat: &mut Beat,
    due: Vec<Due>,
    reads_whole: bool,
    root_timeout: Duration,
    ttl: Duration,
) -> Result<Looked, Ended> {
    let counts = due
        .iter()
        .map(|due| Command::entries(due.bucket, &due.member));
    let counts = ask(client, beat, "count entries", counts.collect())?;
    let counts = counts
        .into_iter()
        .map(|count| count.as_ref().map_or(0, reply::count));
    let mut groups = groups(due.into_iter().zip(counts)).into_iter();
    let (mut journals, mut failed, mut bytes) = (Vec::new(), Vec::new(), 0);
    let until = Clock::mono_now().after(LOOK_MAX);
    while bytes < LOOK_BYTES
        && Clock::mono_now() < until
        && let Some(group) = groups.next()
    {
        beat.go_on()?;
        let looked = match group.as_slice() {
            [(due, entries)] if *entries > GROUP_ENTRIES => {
                let (due, entries) = (due.clone(), *entries);
                vec![look_in_pages(
                    client,
                    beat,
                    due,
                    entries,
                    root_timeout,
                    ttl,
                )?]
            }
            _ => {
                let whole = |entries| whole_entries(entries).filter(|_| reads_whole);
                let group = group
                    .into_iter()
                    .map(|(due, entries)| (due, whole(entries)));
                look_at(client, beat, group.collect(), root_timeout, ttl)?
            }
        };
        for looked in looked {
            match looked {
                Ok(journal) => {
                    bytes += journal.bytes();
                    journals.push(journal);
                }
                Err(due) => failed.push(due),
            }
        }
    }
    let whole_bytes: u64 = journals.iter().map(Journal::whole_bytes).sum();
    Ok(Looked {
        journals: in_turn(journals),
        failed,
        left: groups.next().is_some(),
        fits: whole_bytes <= WHOLE_BYTES as u64,
    })
}

/// Cuts traces, each with the number of its entries, into groups whose headers are read at once.
fn groups(due: impl Iterator<Item = (Due, u64)>) -> Vec<Vec<(Due, u64)>> {
    let (mut groups, mut entries): (Vec<Vec<(Due, u64)>>, u64) = (Vec::new(), 0);
    for (due, count) in due {
        entries = entries.saturating_add(count);
        match groups.last_mut() {
            Some(group) if entries <= GROUP_ENTRIES => group.push((due, count)),
            _ => {
                groups.push(vec![(due, count)]);
                entries = count;
            }
        }
    }
    groups
}

/// A trace, and as how many entries its journal is read whole; none: its headers are read.
type Asked = (Due, Option<usize>);

/// Looks at traces, the nodes side by side; gives a journal for each, or the trace whose look failed.
fn look_at(
    client: &mut Client,
    beat: &mut Beat,
    group: Vec<Asked>,
    root_timeout: Duration,
    ttl: Duration,
) -> Result<Vec<Result<Journal, Due>>, Ended> {
    let groups = by_bucket(group, |(due, _)| due.bucket);
    let mut commands = Vec::new();
    for group in &groups {
        let traces = group.iter().map(|(due, _)| due);
        let Some(lift) = lift(traces, root_timeout, ttl) else {
            continue;
        };
        let bucket = group[0].0.bucket;
        commands.extend([lift, Command::position(bucket)]);
        commands.extend(group.iter().map(|(due, whole)| match whole {
            Some(entries) => Command::whole_journal(bucket, &due.member, *entries),
            None => Command::headers(bucket, &due.member),
        }));
    }
    let mut answers = ask(client, beat, ATTEMPT, commands)?.into_iter();
    let (mut looked, mut not_whole) = (Vec::new(), Vec::new());
    for group in groups {
        for outcome in looked_at(group, &mut answers) {
            match outcome {
                Outcome::Read(journal) => looked.push(Ok(journal)),
                Outcome::Failed(due) => looked.push(Err(due)),
                Outcome::NotWhole(due) => not_whole.push((due, None)),
            }
        }
    }
    if !not_whole.is_empty() {
        looked.extend(look_at(client, beat, not_whole, root_timeout, ttl)?);
    }
    Ok(looked)
}

/// As how many entries a journal is read whole that has so many; none when it is too large for that, or was not counted.
fn whole_entries(entries: u64) -> Option<usize> {
    let is_small = (1..=WHOLE_ENTRIES).contains(&entries);
    usize::try_from(entries).ok().filter(|_| is_small)
}

/// Looks at one trace whose headers are too many to be read at once: Redis would serve nobody else meanwhile.
fn look_in_pages(
    client: &mut Client,
    beat: &mut Beat,
    due: Due,
    entries: u64,
    root_timeout: Duration,
    ttl: Duration,
) -> Result<Result<Journal, Due>, Ended> {
    let lift = lift(std::iter::once(&due), root_timeout, ttl);
    let mut commands: Vec<Command> = lift.into_iter().collect();
    commands.push(Command::position(due.bucket));
    let mut answers = ask(client, beat, ATTEMPT, commands)?.into_iter();
    let Some(position) = position(1, answers.next(), answers.next()) else {
        return Ok(Err(due));
    };
    let Some(mut fields) = read_pages(client, beat, &due, entries)? else {
        return Ok(Err(due));
    };
    // A page may repeat what another one had.
    fields.sort_unstable();
    fields.dedup();
    if u64::try_from(fields.len()).is_ok_and(|read| read < entries) {
        // Entries are removed here alone: the cursor was that of another server.
        not_read(
            &due,
            &format_args!(
                "of entries={entries} only {} were read (did it move to another node?)",
                fields.len()
            ),
        );
        return Ok(Err(due));
    }
    Ok(Ok(journal(due, headers_alone(fields), position)))
}

/// Reads the fields of a journal to its end; none when that cannot be done now.
fn read_pages(
    client: &mut Client,
    beat: &mut Beat,
    due: &Due,
    entries: u64,
) -> Result<Option<Vec<Vec<u8>>>, Ended> {
    let (mut fields, mut cursor) = (Vec::new(), 0);
    // A page of a table that was much larger once has few entries.
    for _ in 0..=entries.saturating_mul(PAGES_MAX) / PAGE_ENTRIES {
        beat.go_on()?;
        let page = Command::headers_page(due.bucket, &due.member, cursor, PAGE_ENTRIES);
        let answer = ask(client, beat, ATTEMPT, vec![page])?.pop();
        match answer.map(|answer| answer.map(|value| reply::page(&value))) {
            Some(Ok(Some((next, page)))) => {
                fields.extend(page);
                cursor = next;
            }
            Some(Err(refusal)) => {
                not_read(due, &refusal);
                return Ok(None);
            }
            Some(Ok(None)) | None => {
                not_read(due, &"reply is no page (check redis version)");
                return Ok(None);
            }
        }
        if cursor == 0 {
            return Ok(Some(fields));
        }
    }
    not_read(
        due,
        &"its pages have no end (does it grow faster than it is read?)",
    );
    Ok(None)
}

fn not_read(due: &Due, why: &dyn Display) {
    error!(
        "look at journal shard={} member={}: {why}",
        due.bucket.shard, due.member
    );
}

/// Lifts the scores of traces of one bucket; none of none.
fn lift<'d>(
    group: impl Iterator<Item = &'d Due> + Clone,
    root_timeout: Duration,
    ttl: Duration,
) -> Option<Command> {
    let first = group.clone().next()?;
    let lifted = first.now.after(root_timeout);
    let call = QueueCall {
        bucket: first.bucket,
        ttl,
        mode: QueueMode::Lift,
        members: group.map(|due| (due.member.clone(), lifted)).collect(),
    };
    Some(call.command())
}

/// What a look at one trace came to.
enum Outcome {
    Read(Journal),
    Failed(Due),
    /// It has grown since it was counted, or there was no room for it: its headers can be read.
    NotWhole(Due),
}

/// Reads the answers of one bucket: as many as its part of the commands has.
fn looked_at(group: Vec<Asked>, answers: &mut impl Iterator<Item = Answer>) -> Vec<Outcome> {
    let position = position(group.len(), answers.next(), answers.next());
    let read: Vec<Answer> = answers.take(group.len()).collect();
    let Some(position) = position else {
        let failed = group.into_iter().map(|(due, _)| Outcome::Failed(due));
        return failed.collect();
    };
    let looked = group.into_iter().zip(read).map(|((due, whole), answer)| {
        let fields = match (answer, whole) {
            (Ok(reply), Some(most)) => match reply::pairs(reply) {
                Some(pairs) if pairs.len() <= most => with_chunks(pairs),
                Some(_) | None => return Outcome::NotWhole(due),
            },
            (Ok(reply), None) => match reply::list(&reply) {
                Some(fields) => headers_alone(fields),
                None => {
                    not_read(&due, &"reply is no list (check redis version)");
                    return Outcome::Failed(due);
                }
            },
            (Err(refusal), _) => {
                not_read(&due, &refusal);
                return Outcome::Failed(due);
            }
        };
        Outcome::Read(journal(due, fields, position))
    });
    looked.collect()
}

/// An entry's name in the journal, and its chunk where that was read with it.
type Field = (Vec<u8>, Option<Vec<u8>>);

fn with_chunks(pairs: Vec<(Vec<u8>, Vec<u8>)>) -> Vec<Field> {
    let field = |(field, chunk)| (field, Some(chunk));
    pairs.into_iter().map(field).collect()
}

fn headers_alone(fields: Vec<Vec<u8>>) -> Vec<Field> {
    fields.into_iter().map(|field| (field, None)).collect()
}

/// The position of a bucket, which may have none; nothing if its traces were not lifted before it was read, or it was not read.
fn position(traces: usize, lift: Option<Answer>, position: Option<Answer>) -> Option<Option<u64>> {
    match (lift, position) {
        (Some(Ok(_)), Some(Ok(position))) => Some(reply::offset(&position)),
        (lift, position) => {
            let answers = [lift, position].into_iter().flatten();
            for refusal in answers.filter_map(Result::err) {
                error!("look at queue traces={traces}: {refusal}");
            }
            None
        }
    }
}

fn journal(due: Due, fields: Vec<Field>, position: Option<u64>) -> Journal {
    let (mut entries, mut damaged, mut unknown) = (Vec::with_capacity(fields.len()), Vec::new(), 0);
    for (field, chunk) in fields {
        match EntryHeader::decode(&field) {
            Ok(header) => entries.push(Entry {
                field,
                header,
                chunk,
            }),
            Err(HeaderError::UnknownVersion(_)) => unknown += 1,
            Err(HeaderError::Damaged(_)) => damaged.push(field),
        }
    }
    if unknown > 0 {
        error!(
            "journal shard={} member={} holds entries={unknown} of an unknown version (is a newer build at work?)",
            due.bucket.shard, due.member
        );
    }
    let gated = gate(entries, position);
    Journal {
        due,
        open: gated.open,
        held: gated.held,
        damaged,
        unknown,
    }
}

/// Takes the earliest of each shard in turn, so that no shard uses up what a wave may flush.
fn in_turn(mut journals: Vec<Journal>) -> Vec<Journal> {
    journals.sort_by_key(|journal| journal.due.score);
    let mut ranks: HashMap<ShardId, usize> = HashMap::new();
    let mut ranked: Vec<(usize, Journal)> = Vec::with_capacity(journals.len());
    for journal in journals {
        let rank = ranks.entry(journal.due.bucket.shard).or_default();
        ranked.push((*rank, journal));
        *rank += 1;
    }
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, journal)| journal).collect()
}

#[cfg(test)]
mod tests {
    use shared::{
        ids::{ProjectId, TraceId},
        shard::BucketId,
        time::UnixMillis,
    };
    use store::keys::{Bucket, Member};

    use super::*;

    fn due(number: u64) -> Due {
        Due {
            bucket: Bucket {
                slice: None,
                shard: ShardId(0),
                bucket: BucketId(0),
            },
            member: Member::new(ProjectId(number), &TraceId::new(b"t")),
            score: UnixMillis(number),
            now: UnixMillis(1_000),
        }
    }

    #[test]
    fn groups_hold_every_trace_once_and_a_bounded_number_of_entries() {
        let counts = [1, 19_999, 1, 300_000, 0, 5, 20_000, 20_000];
        let cut: Vec<Vec<u64>> = groups((0..).map(due).zip(counts))
            .into_iter()
            .map(|group| group.into_iter().map(|(due, _)| due.score.0).collect())
            .collect();
        assert_eq!(
            cut,
            [vec![0, 1], vec![2], vec![3], vec![4, 5], vec![6], vec![7]]
        );
    }
}
