//! What it costs to pack an entry and to read it again: header and chunk, with each codec.

#![expect(clippy::unwrap_used, reason = "a bench on its own input")]

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use shared::{
    ids::{OrganizationId, SpanId},
    time::UnixMillis,
};
use store::{
    chunk::{self, Codec, SegmentPlace, Splice},
    entry::{EntryHeader, SpanAt},
};

/// Spans of an entry.
const SPANS: u64 = 5;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    entry(&mut criterion);
    chunks(&mut criterion);
    criterion.final_summary();
}

fn entry(criterion: &mut Criterion) {
    let header = EntryHeader {
        has_root: true,
        organization: OrganizationId(1),
        arrival: UnixMillis(1_700_000_000_000),
        top: SpanId::Hex(1),
        spans: (1..=SPANS)
            .map(|number| SpanAt {
                offset: 1_000_000 + number,
                id: SpanId::Hex(number.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            })
            .collect(),
        bytes: 5_000,
    };
    let field = header.encode();
    let mut group = criterion.benchmark_group("entry header of 5 spans");
    group.throughput(Throughput::Elements(SPANS));
    group.bench_function("encode", |bencher| {
        bencher.iter(|| black_box(&header).encode())
    });
    group.bench_function("decode", |bencher| {
        bencher.iter(|| EntryHeader::decode(black_box(&field)).unwrap())
    });
    group.finish();
}

fn chunks(criterion: &mut Criterion) {
    let spans: Vec<Vec<u8>> = (0..SPANS).map(span).collect();
    let splice = Splice {
        span_id_end: 100,
        is_segment: None,
        segment: SegmentPlace::Object {
            at: 300,
            empty: false,
        },
    };
    let payloads: Vec<(&[u8], &Splice)> = spans.iter().map(|json| (&json[..], &splice)).collect();
    let mut group = criterion.benchmark_group("chunk of 5 spans");
    group.throughput(Throughput::Elements(SPANS));
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
        let bytes = chunk::encode(codec, &payloads);
        group.bench_function(format!("encode {codec:?}"), |bencher| {
            bencher.iter(|| chunk::encode(codec, black_box(&payloads)))
        });
        group.bench_function(format!("decode {codec:?}"), |bencher| {
            bencher.iter(|| chunk::decode(black_box(&bytes), u64::MAX).unwrap())
        });
    }
    group.finish();
}

/// About a kilobyte that packs as spans do: keys that come again, numbers that do not.
fn span(number: u64) -> Vec<u8> {
    let mut json = String::from("{\"organization_id\":1,\"attributes\":{");
    let mut noise = number + 1;
    while json.len() < 1_000 {
        noise = noise.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17);
        json.push_str(&format!(
            "\"sentry.key.{}\":{{\"type\":\"string\",\"value\":\"{noise:016x}\"}},",
            noise % 20
        ));
    }
    json.push_str("\"end\":1}}");
    json.into_bytes()
}
