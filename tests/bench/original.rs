//! A model of the original's way: it assembles while inserting.
//!
//! Keeps:  its commands, scripts and defaults as they are described (no lock, no chunking of subsegments, TTL an hour, zstd at its
//!         default level or none); a client as good as ours: Rust, the same slices, our parser, spans edited in place.
//! Source: background/original.md c–h.

use std::{
    collections::{HashMap, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
};

use redis::{Cmd, Script, Value};
use shared::ids::SpanId;
use stand::redis::Redis;
use store::chunk::{SegmentPlace, Splice};
use worker::ingest::{group::Subsegment, parse::parse};

use crate::{
    Flushed, SEGMENT_BYTES_MAX, SEGMENTS_A_CYCLE, Way, groups,
    input::Envelope,
    link::{Link, bytes, command, list},
};

const TTL: &str = "3600";
/// `spans.buffer.compression.level`: zstd takes 0 for its default, 3.
const ZSTD_LEVEL: i32 = 0;
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const PAGE: &[u8] = b"100";
const QUEUE: &[u8] = b"span-buf:q:0";
/// Ids in one `HDEL` and members in one `ZREM`.
const REMOVED_AT_ONCE: usize = 100;
/// Everything is due.
const LATER: &[u8] = b"9999999999";

pub(crate) struct Original {
    link: Link,
    compressor: Option<zstd::bulk::Compressor<'static>>,
    script: String,
}

impl Original {
    pub(crate) fn new(redis: &Redis, compressed: bool) -> Self {
        let script = Script::new(include_str!("add-buffer.lua"));
        let mut link = Link::new(redis);
        let load = [&b"LOAD"[..], include_bytes!("add-buffer.lua")];
        link.run(&[command("SCRIPT", load)]);
        Self {
            link,
            compressor: compressed.then(|| zstd::bulk::Compressor::new(ZSTD_LEVEL).unwrap()),
            script: script.get_hash().to_owned(),
        }
    }

    /// One member: a frame of all payloads; without compression each payload is a member.
    fn members(&mut self, subsegment: &Subsegment) -> Vec<Vec<u8>> {
        let payloads = subsegment.spans.iter().map(|arrived| &arrived.json[..]);
        match &mut self.compressor {
            None => payloads.map(<[u8]>::to_vec).collect(),
            Some(compressor) => {
                let payloads: Vec<&[u8]> = payloads.collect();
                vec![compressor.compress(&payloads.join(&0)).unwrap()]
            }
        }
    }

    fn call(&self, subsegment: &Subsegment, trace: &str, salt: &str) -> Cmd {
        let mut call = redis::cmd("EVALSHA");
        call.arg(&self.script).arg(1).arg(trace);
        call.arg(subsegment.spans.len())
            .arg(&subsegment.top.to_bytes()[..])
            .arg(if subsegment.has_root { "true" } else { "false" })
            .arg(TTL)
            .arg(subsegment.bytes)
            .arg(SEGMENT_BYTES_MAX)
            .arg(salt)
            .arg("false")
            .arg(100);
        for arrived in &subsegment.spans {
            call.arg(&arrived.span.id.to_bytes()[..]);
        }
        call
    }

    /// What one cycle takes; none when nothing is left.
    fn cycle(&mut self, flushed: &mut Flushed) -> bool {
        let limit = SEGMENTS_A_CYCLE.to_string();
        let due = command(
            "ZRANGEBYSCORE",
            [
                QUEUE,
                b"0",
                LATER,
                b"WITHSCORES",
                b"LIMIT",
                b"0",
                limit.as_bytes(),
            ],
        );
        let due = self.link.run(&[due]);
        let candidates: Vec<Vec<u8>> = list(&due[0])
            .iter()
            .step_by(2)
            .map(|key| bytes(key).to_vec())
            .collect();
        if candidates.is_empty() {
            return false;
        }
        let indexes: Vec<Cmd> = candidates
            .iter()
            .map(|key| command("SMEMBERS", [&index_key(key)[..]]))
            .collect();
        let keys: Vec<Vec<Vec<u8>>> = candidates
            .iter()
            .zip(self.link.run(&indexes))
            .map(|(key, salts)| {
                let salts = list(&salts).iter();
                salts
                    .map(|salt| payload_key(tag(key), bytes(salt)))
                    .collect()
            })
            .collect();
        let payloads = self.load(&keys);
        let counters: Vec<Cmd> = candidates
            .iter()
            .flat_map(|key| {
                [&b"span-buf:ic:"[..], b"span-buf:ibc:"]
                    .map(|prefix| command("GET", [&[prefix, &key[..]].concat()[..]]))
            })
            .collect();
        self.link.run(&counters);
        let mut ids = Vec::with_capacity(candidates.len());
        for (key, payloads) in candidates.iter().zip(&payloads) {
            ids.push(produce(key, payloads, flushed));
        }
        self.clean(&candidates, &keys, &ids);
        true
    }

    /// The payloads of each segment: all keys scanned side by side, page by page.
    fn load(&mut self, keys: &[Vec<Vec<u8>>]) -> Vec<Vec<Vec<u8>>> {
        let mut payloads: Vec<Vec<Vec<u8>>> = vec![Vec::new(); keys.len()];
        let mut open: Vec<(usize, &[u8], Vec<u8>)> = keys
            .iter()
            .enumerate()
            .flat_map(|(place, keys)| keys.iter().map(move |key| (place, &key[..], b"0".to_vec())))
            .collect();
        let mut unpack = zstd::bulk::Decompressor::new().unwrap();
        while !open.is_empty() {
            let scans: Vec<Cmd> = open
                .iter()
                .map(|(_, key, cursor)| command("SSCAN", [*key, cursor, b"COUNT", PAGE]))
                .collect();
            let pages = self.link.run(&scans);
            open = open
                .into_iter()
                .zip(&pages)
                .filter_map(|((place, key, _), page)| {
                    for member in list(&list(page)[1]) {
                        let member = bytes(member);
                        if member.starts_with(&ZSTD_MAGIC) {
                            let length = zstd::bulk::Decompressor::upper_bound(member).unwrap();
                            let joined = unpack.decompress(member, length).unwrap();
                            payloads[place]
                                .extend(joined.split(|&byte| byte == 0).map(<[u8]>::to_vec));
                        } else {
                            payloads[place].push(member.to_vec());
                        }
                    }
                    let cursor = bytes(&list(page)[0]);
                    (cursor != b"0").then(|| (place, key, cursor.to_vec()))
                })
                .collect();
        }
        payloads
    }

    /// The unconditional cleanup, in one pipeline.
    fn clean(&mut self, candidates: &[Vec<u8>], keys: &[Vec<Vec<u8>>], ids: &[Vec<Vec<u8>>]) {
        let mut commands = Vec::new();
        for ((segment, keys), ids) in candidates.iter().zip(keys).zip(ids) {
            for prefix in [&b"span-buf:hrs:"[..], b"span-buf:ic:", b"span-buf:ibc:"] {
                commands.push(command("DEL", [&[prefix, &segment[..]].concat()[..]]));
            }
            let redirects = [b"span-buf:ssr:{", tag(segment), b"}"].concat();
            for ids in ids.chunks(REMOVED_AT_ONCE) {
                let mut remove = command("HDEL", [&redirects[..]]);
                remove.arg(ids);
                commands.push(remove);
            }
            commands.push(command("DEL", [&index_key(segment)[..]]));
            commands.extend(keys.iter().map(|key| command("UNLINK", [&key[..]])));
        }
        for segments in candidates.chunks(REMOVED_AT_ONCE) {
            let mut remove = command("ZREM", [QUEUE]);
            remove.arg(segments);
            commands.push(remove);
        }
        self.link.run(&commands);
    }
}

impl Way for Original {
    fn insert(&mut self, batch: Vec<Envelope>) {
        let subsegments = groups(batch);
        let (mut payloads, mut calls) = (Vec::new(), Vec::new());
        for subsegment in &subsegments {
            let trace = [
                subsegment.project.0.to_string().as_bytes(),
                b":",
                &subsegment.trace.to_bytes(),
            ]
            .concat();
            let trace = String::from_utf8(trace).unwrap();
            let salt = salt(subsegment);
            let key = payload_key(trace.as_bytes(), salt.as_bytes());
            let mut add = command("SADD", [&key[..]]);
            add.arg(self.members(subsegment));
            payloads.push(add);
            payloads.push(command("EXPIRE", [&key[..], TTL.as_bytes()]));
            calls.push(self.call(subsegment, &trace, &salt));
        }
        self.link.run(&payloads);
        let results = self.link.run(&calls);
        let (mut deadlines, mut merged) = (HashMap::new(), Vec::new());
        for result in &results {
            let result = list(result);
            let segment = bytes(&result[0]);
            // Seconds, of a batch whose `now` is 0.
            let deadline: u32 = if result[1] == Value::Int(1) { 10 } else { 60 };
            deadlines.insert(segment, deadline);
            for id in list(&result[3]) {
                let former = [b"span-buf:s:{", tag(segment), b"}:", bytes(id)].concat();
                if former != segment {
                    merged.push(former);
                }
            }
        }
        let mut add = command("ZADD", [QUEUE]);
        for (segment, deadline) in &deadlines {
            add.arg(deadline).arg(segment);
        }
        let mut queue = vec![add, command("EXPIRE", [QUEUE, TTL.as_bytes()])];
        if !merged.is_empty() {
            let mut remove = command("ZREM", [QUEUE]);
            remove.arg(&merged);
            queue.push(remove);
        }
        self.link.run(&queue);
    }

    fn flush(&mut self) -> Flushed {
        let mut flushed = Flushed::default();
        while self.cycle(&mut flushed) {}
        flushed
    }
}

/// 32 digits out of the ids of the spans: the same for the same subsegment.
fn salt(subsegment: &Subsegment) -> String {
    let half = |seed: u8| {
        let mut hasher = DefaultHasher::new();
        seed.hash(&mut hasher);
        subsegment
            .spans
            .iter()
            .for_each(|arrived| arrived.span.id.hash(&mut hasher));
        hasher.finish()
    };
    format!("{:016x}{:016x}", half(0), half(1))
}

fn payload_key(trace: &[u8], salt: &[u8]) -> Vec<u8> {
    [b"span-buf:s:{", trace, b":", salt, b"}:", salt].concat()
}

/// `project:trace` of a segment key.
fn tag(segment: &[u8]) -> &[u8] {
    let open = segment.iter().position(|&byte| byte == b'{').unwrap();
    let close = segment.iter().position(|&byte| byte == b'}').unwrap();
    &segment[open + 1..close]
}

fn last_part(segment: &[u8]) -> &[u8] {
    segment.rsplit(|&byte| byte == b':').next().unwrap()
}

fn index_key(segment: &[u8]) -> Vec<u8> {
    [b"span-buf:mk:{", tag(segment), b"}:", last_part(segment)].concat()
}

/// Makes the messages of a segment; gives the ids of its spans.
fn produce(segment: &[u8], payloads: &[Vec<u8>], flushed: &mut Flushed) -> Vec<Vec<u8>> {
    let root = SpanId::new(last_part(segment));
    let attribute = [
        b"\"sentry.segment.id\":{\"type\":\"string\",\"value\":\"",
        last_part(segment),
        b"\"}",
    ]
    .concat();
    let mut ids = Vec::with_capacity(payloads.len());
    let (mut message, mut spans) = (b"{\"spans\":[".to_vec(), 0);
    for payload in payloads {
        let span = parse(payload).unwrap();
        if spans > 0 && (message.len() + payload.len()) as u64 > SEGMENT_BYTES_MAX {
            flushed.add(spans, &message);
            message.truncate(b"{\"spans\":[".len());
            spans = 0;
        }
        if spans > 0 {
            message.push(b',');
        }
        edit(
            payload,
            &span.splice,
            &attribute,
            span.id == root,
            &mut message,
        );
        spans += 1;
        ids.push(span.id.to_bytes());
    }
    message.extend_from_slice(b"],\"flush_id\":\"00000000000000000000000000000000\"}");
    if spans > 0 {
        flushed.add(spans, &message);
    }
    ids
}

/// The two edits of the spans of the bench, whose `attributes` is an object that names no segment.
fn edit(json: &[u8], splice: &Splice, attribute: &[u8], is_root: bool, out: &mut Vec<u8>) {
    let SegmentPlace::Object { at, .. } = splice.segment else {
        panic!("a span of another shape: {splice:?}")
    };
    let flag = if is_root { "true" } else { "false" };
    let (from, to) = match &splice.is_segment {
        Some(value) => (value.start as usize, value.end as usize),
        None => (splice.span_id_end as usize, splice.span_id_end as usize),
    };
    out.extend_from_slice(&json[..from]);
    if splice.is_segment.is_none() {
        out.extend_from_slice(b",\"is_segment\":");
    }
    out.extend_from_slice(flag.as_bytes());
    out.extend_from_slice(&json[to..at as usize]);
    out.extend_from_slice(attribute);
    out.push(b',');
    out.extend_from_slice(&json[at as usize..]);
}
