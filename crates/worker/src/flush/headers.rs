//! Lifts due traces out of sight of others, then reads what their journals hold.
//!
//! In:     `Due` traces.
//! Out:    a `Journal` for each: its entries below the position, and what could not be read.
//! Keeps:  lifting stands before reading in the same pipeline: whoever inserts from then on lowers the score by itself.
//! Knows:  the queue, the position, entry headers. Not what is due in a journal.
//! Source: docs/store.md 3.

use std::{collections::HashMap, time::Duration};

use log::error;
use shared::shard::ShardId;
use store::{
    client::{Client, Command, reply},
    entry::{EntryHeader, HeaderError},
    keys::{Bucket, Member},
    scripts::{QueueCall, QueueMode},
};

use super::{
    assemble::{Entry, gate},
    due::Due,
};
use crate::{Ended, ask::ask, beat::Beat};

/// How many looks may fail before a trace is put off, and for how long it is.
const LOOKS_MAX: u32 = 3;
const PUT_OFF: Duration = Duration::from_secs(600);
/// The most failing traces that are remembered; beyond it counting begins anew.
const FAILURES_MAX: usize = 10_000;

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

/// Traces whose look failed, and how often in a row.
#[derive(Debug, Default)]
pub struct Failures(HashMap<(Bucket, Member), u32>);

impl Failures {
    /// Counts a failed look; says whether the trace is to be put off.
    fn add(&mut self, due: &Due) -> bool {
        if self.0.len() >= FAILURES_MAX {
            self.0.clear();
        }
        let key = (due.bucket, due.member.clone());
        let count = self.0.entry(key.clone()).or_default();
        *count += 1;
        let put_off = *count >= LOOKS_MAX;
        if put_off {
            self.0.remove(&key);
        }
        put_off
    }

    fn forget(&mut self, due: &Due) {
        if !self.0.is_empty() {
            self.0.remove(&(due.bucket, due.member.clone()));
        }
    }
}

/// Lifts the scores of all traces and reads positions and headers. A trace whose look failed comes back by its lifted score;
/// after three failures in a row it is put off.
///
/// # Errors
/// [`Ended::Stopped`].
pub fn look(
    client: &mut Client,
    beat: &mut Beat,
    due: Vec<Due>,
    root_timeout: Duration,
    ttl: Duration,
    failures: &mut Failures,
) -> Result<Vec<Journal>, Ended> {
    let (mut journals, mut put_off) = (Vec::new(), Vec::new());
    for group in by_bucket(due) {
        for looked in look_at_bucket(client, beat, group, root_timeout, ttl)? {
            match looked {
                Ok(journal) => {
                    failures.forget(&journal.due);
                    journals.push(journal);
                }
                Err(due) if failures.add(&due) => put_off.push(due),
                Err(_) => {}
            }
        }
    }
    put_off_all(client, beat, put_off, ttl)?;
    Ok(in_turn(journals))
}

/// Lifts the scores of traces far up: nothing can be done for them now.
///
/// # Errors
/// [`Ended::Stopped`].
pub fn put_off_all(
    client: &mut Client,
    beat: &mut Beat,
    traces: Vec<Due>,
    ttl: Duration,
) -> Result<(), Ended> {
    let mut commands = Vec::new();
    for group in by_bucket(traces) {
        for due in &group {
            error!(
                "trace shard={} member={} is put off by {}s",
                due.bucket.shard,
                due.member,
                PUT_OFF.as_secs()
            );
        }
        let Some(bucket) = group.first().map(|first| first.bucket) else {
            continue;
        };
        let members = group
            .into_iter()
            .map(|due| (due.member, due.now.after(PUT_OFF)))
            .collect();
        commands.push(
            QueueCall {
                bucket,
                ttl,
                mode: QueueMode::Lift,
                members,
            }
            .command(),
        );
    }
    for refusal in ask(client, beat, "put traces off", commands)?
        .into_iter()
        .filter_map(Result::err)
    {
        error!("put traces off: {refusal}");
    }
    Ok(())
}

/// Looks at traces of one bucket; gives a journal, or the trace whose look failed.
fn look_at_bucket(
    client: &mut Client,
    beat: &mut Beat,
    group: Vec<Due>,
    root_timeout: Duration,
    ttl: Duration,
) -> Result<Vec<Result<Journal, Due>>, Ended> {
    let Some(first) = group.first() else {
        return Ok(Vec::new());
    };
    let (bucket, lifted) = (first.bucket, first.now.after(root_timeout));
    let members = group
        .iter()
        .map(|due| (due.member.clone(), lifted))
        .collect();
    let lift = QueueCall {
        bucket,
        ttl,
        mode: QueueMode::Lift,
        members,
    };
    let mut commands = vec![lift.command(), Command::position(bucket)];
    commands.extend(
        group
            .iter()
            .map(|due| Command::headers(bucket, &due.member)),
    );
    let mut answers = ask(client, beat, "look at journals", commands)?.into_iter();
    let (lift, position) = (answers.next(), answers.next());
    let position = match (lift, position) {
        (Some(Ok(_)), Some(Ok(position))) => reply::offset(&position),
        (lift, position) => {
            for refusal in [lift, position]
                .into_iter()
                .flatten()
                .filter_map(Result::err)
            {
                error!(
                    "look at queue shard={} traces={}: {refusal}",
                    bucket.shard,
                    group.len()
                );
            }
            return Ok(group.into_iter().map(Err).collect());
        }
    };
    let looked = group.into_iter().zip(answers).map(|(due, headers)| {
        match headers.map(|headers| reply::list(&headers)) {
            Ok(Some(fields)) => Ok(journal(due, fields, position)),
            Ok(None) => {
                error!(
                    "look at journal shard={} member={}: reply is no list (check redis version)",
                    due.bucket.shard, due.member
                );
                Err(due)
            }
            Err(refusal) => {
                error!(
                    "look at journal shard={} member={}: {refusal}",
                    due.bucket.shard, due.member
                );
                Err(due)
            }
        }
    });
    Ok(looked.collect())
}

fn journal(due: Due, fields: Vec<Vec<u8>>, position: Option<u64>) -> Journal {
    let (mut entries, mut damaged, mut unknown) = (Vec::with_capacity(fields.len()), Vec::new(), 0);
    for field in fields {
        match EntryHeader::decode(&field) {
            Ok(header) => entries.push(Entry { field, header }),
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

/// Takes the earliest of each shard in turn, so that no shard uses up what a cycle may flush.
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

fn by_bucket(mut due: Vec<Due>) -> Vec<Vec<Due>> {
    due.sort_by_key(|due| due.bucket);
    let mut groups: Vec<Vec<Due>> = Vec::new();
    for due in due {
        match groups.last_mut() {
            Some(group)
                if group
                    .first()
                    .is_some_and(|first| first.bucket == due.bucket) =>
            {
                group.push(due)
            }
            _ => groups.push(vec![due]),
        }
    }
    groups
}
