//! The raw limit: what Redis can take at best. One `SET` a subsegment; no queue, no index, no TTL, nothing that outlives a crash.
//!
//! Keeps:  groups, packs and builds messages as the product does, and sends a batch while the next one is made; what to read back stands in memory.
//! Source: docs/store.md 7.

use redis::Cmd;
use shared::{ids::SpanId, shard::ShardId};
use stand::redis::Redis;
use store::{
    chunk::{self, Codec},
    entry::EntryHeader,
    keys::Member,
};
use worker::{
    flush::message::{LoadedEntry, build},
    ingest::{group::Subsegment, journal::header},
};

use crate::{
    Flushed, SEGMENT_BYTES_MAX, SEGMENTS_A_CYCLE, Way, groups,
    input::{ARRIVAL, Envelope},
    link::{Behind, Link, bytes, command},
};

pub(crate) struct Raw {
    link: Behind,
    codec: Codec,
    segments: Vec<Segment>,
    next_key: usize,
}

struct Segment {
    member: Member,
    id: SpanId,
    entries: Vec<(Vec<u8>, EntryHeader)>,
}

impl Raw {
    pub(crate) fn new(redis: &Redis, codec: Codec) -> Self {
        Self {
            link: Behind::new(Link::new(redis)),
            codec,
            segments: Vec::new(),
            next_key: 0,
        }
    }

    fn remember(&mut self, subsegment: &Subsegment, key: Vec<u8>) {
        let header = header(subsegment, ARRIVAL);
        let member = Member::new(subsegment.project, &subsegment.trace);
        // A trace of the bench is one segment, and its spans come one behind the other.
        match self.segments.last_mut() {
            Some(segment) if segment.member == member => {
                segment.id = header.top.clone();
                segment.entries.push((key, header));
            }
            _ => self.segments.push(Segment {
                member,
                id: header.top.clone(),
                entries: vec![(key, header)],
            }),
        }
    }
}

impl Way for Raw {
    fn insert(&mut self, batch: Vec<Envelope>) {
        let mut commands = Vec::new();
        for subsegment in groups(batch) {
            let payloads: Vec<_> = subsegment
                .spans
                .iter()
                .map(|arrived| (&arrived.json[..], &arrived.span.splice))
                .collect();
            let chunk = chunk::encode(self.codec, &payloads);
            let key = format!("raw:{}", self.next_key).into_bytes();
            self.next_key += 1;
            commands.push(command("SET", [&key[..], &chunk[..]]));
            self.remember(&subsegment, key);
        }
        self.link.hand(commands);
    }

    fn end_insert(&mut self) {
        self.link.link();
    }

    fn flush(&mut self) -> Flushed {
        let mut flushed = Flushed::default();
        for segments in self.segments.chunks(SEGMENTS_A_CYCLE) {
            let keys = segments.iter().flat_map(|segment| &segment.entries);
            let gets: Vec<Cmd> = keys.map(|(key, _)| command("GET", [&key[..]])).collect();
            let replies = self.link.link().run(&gets);
            let mut chunks = replies
                .iter()
                .map(|reply| chunk::decode(bytes(reply), u64::MAX).unwrap());
            let mut messages = Vec::new();
            for segment in segments {
                let chunks: Vec<_> = chunks.by_ref().take(segment.entries.len()).collect();
                let entries: Vec<_> = segment
                    .entries
                    .iter()
                    .zip(&chunks)
                    .map(|((_, header), chunk)| LoadedEntry { header, chunk })
                    .collect();
                // What becomes of each entry is nobody's business here.
                drop(build(
                    ShardId(0),
                    &segment.member,
                    &segment.id,
                    &entries,
                    SEGMENT_BYTES_MAX,
                    |part| messages.push(part),
                ));
            }
            for part in &messages {
                flushed.add(part.spans, &part.payload);
            }
            let unlinks: Vec<Cmd> = segments
                .iter()
                .map(|segment| command("UNLINK", segment.entries.iter().map(|(key, _)| &key[..])))
                .collect();
            self.link.link().run(&unlinks);
        }
        self.segments.clear();
        flushed
    }
}
