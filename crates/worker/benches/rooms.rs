//! What the pure rooms of a worker cost alone: parse and group on the way in, assemble and splice on the way out.

#![expect(clippy::unwrap_used, reason = "a bench on its own input")]

use std::{hint::black_box, time::Duration};

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput};
use shared::{
    ids::{ProjectId, SpanId, TraceId},
    shard::ShardId,
    time::UnixMillis,
};
use store::{
    chunk::{self, Codec},
    entry::EntryHeader,
    keys::Member,
};
use worker::{
    flush::{
        assemble::{Entry, Limits, assemble},
        message::{LoadedEntry, build},
    },
    ingest::{
        group::{Arrived, GroupLimits, Subsegment, group},
        journal::header,
        parse::parse,
    },
};

/// Spans of a batch, in segments of 20 whose spans hang under one root, child first.
const SPANS: usize = 5_000;
const SEGMENT: usize = 20;
/// Spans of an entry.
const ENTRY: usize = 5;
const NOW: UnixMillis = UnixMillis(1_700_000_000_000);
const LIMITS_OF_GROUP: GroupLimits = GroupLimits {
    spans_max: 1_000,
    bytes_max: 1 << 20,
};

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let messages: Vec<Bytes> = (0..SPANS).map(message).collect();
    way_in(&mut criterion, &messages);
    way_out(&mut criterion, &messages);
    criterion.final_summary();
}

fn id(place: usize) -> String {
    format!("{:016x}", 0x0123_4567_0000_0000_usize + place)
}

/// About a kilobyte.
fn message(place: usize) -> Bytes {
    let (segment, from_last) = (place / SEGMENT, place % SEGMENT);
    let root = id(segment * SEGMENT + SEGMENT - 1);
    let parent = if from_last == SEGMENT - 1 {
        "null".to_owned()
    } else {
        format!("\"{root}\"")
    };
    let attributes: Vec<String> = (0..12)
        .map(|number| {
            format!(
                "\"some.attribute.{number}\":{{\"type\":\"string\",\"value\":\"value {}\"}}",
                place * 31 + number
            )
        })
        .collect();
    format!(
        "{{\"organization_id\":1,\"project_id\":1,\"trace_id\":\"{segment:032x}\",\"span_id\":\"{}\",\"parent_span_id\":{parent},\"start_timestamp\":1.5,\"end_timestamp\":2.5,\"received\":3.5,\"retention_days\":90,\"status\":\"ok\",\"name\":\"GET /\",\"attributes\":{{{}}}}}",
        id(place),
        attributes.join(",")
    )
    .into()
}

fn arrived(messages: &[Bytes]) -> Vec<Arrived> {
    (0..)
        .zip(messages)
        .map(|(offset, json)| Arrived {
            offset,
            time: NOW,
            json: json.clone(),
            span: parse(json).unwrap(),
        })
        .collect()
}

fn spans(count: usize) -> Throughput {
    Throughput::Elements(u64::try_from(count).unwrap())
}

fn way_in(criterion: &mut Criterion, messages: &[Bytes]) {
    let mut ingest = criterion.benchmark_group("ingest");
    ingest.throughput(spans(SPANS));
    ingest.bench_function("parse", |bencher| {
        bencher.iter(|| {
            for json in messages {
                black_box(parse(json).unwrap());
            }
        })
    });
    let arrived = arrived(messages);
    ingest.bench_function("group", |bencher| {
        bencher.iter_batched(
            || arrived.clone(),
            |spans| group(spans, &LIMITS_OF_GROUP),
            BatchSize::LargeInput,
        )
    });
    ingest.finish();
}

/// What lies in Redis of a segment, entry by entry.
fn journal(messages: &[Bytes]) -> Vec<(EntryHeader, chunk::Chunk)> {
    let arrived = arrived(messages);
    let subsegments = arrived
        .chunks(ENTRY)
        .flat_map(|spans| group(spans.to_vec(), &LIMITS_OF_GROUP));
    let entry = |subsegment: Subsegment| {
        let payloads: Vec<_> = subsegment
            .spans
            .iter()
            .map(|span| (&span.json[..], &span.span.splice))
            .collect();
        let packed = chunk::encode(Codec::None, &payloads);
        let chunk = chunk::decode(&packed, u64::MAX).unwrap();
        (header(&subsegment, NOW), chunk)
    };
    subsegments.map(entry).collect()
}

fn way_out(criterion: &mut Criterion, messages: &[Bytes]) {
    const LIMITS: Limits = Limits {
        timeout: Duration::from_secs(60),
        root_timeout: Duration::from_secs(10),
        max_segment_age: None,
        max_segment_bytes: u64::MAX,
        max_trace_bytes: u64::MAX,
        max_trace_entries: u64::MAX,
    };
    let root = SpanId::new(id(SEGMENT - 1).as_bytes());
    let (headers, chunks): (Vec<_>, Vec<_>) = journal(&messages[..SEGMENT]).into_iter().unzip();
    let mut flush = criterion.benchmark_group("flush of a segment of 20 spans");
    flush.throughput(spans(SEGMENT));
    let entries: Vec<Entry> = headers
        .iter()
        .map(|header| Entry {
            field: header.encode(),
            header: header.clone(),
            chunk: None,
        })
        .collect();
    flush.bench_function("assemble", |bencher| {
        bencher.iter_batched(
            || entries.clone(),
            |entries| assemble(entries, NOW, &LIMITS),
            BatchSize::SmallInput,
        )
    });
    let loaded: Vec<LoadedEntry<'_>> = headers
        .iter()
        .zip(&chunks)
        .map(|(header, chunk)| LoadedEntry { header, chunk })
        .collect();
    let member = Member::new(ProjectId(1), &TraceId::Hex(0));
    flush.bench_function("splice", |bencher| {
        bencher.iter(|| {
            build(
                ShardId(0),
                black_box(&member),
                &root,
                black_box(&loaded),
                10 << 20,
                |part| drop(black_box(part)),
            )
        })
    });
    flush.finish();
}
