//! A span as a message of the input topic.
//!
//! In:     what the span is.
//! Out:    the JSON text, as the relays send it: valid by the schema of `ingest-spans`.
//! Keeps:  attribute `spanbuf.serial` tells every span of a run apart.
//! Knows:  the message's fields. Pure.
//! Source: docs/spec.md 2.1.

use crate::rng::Rng;

/// The attribute that holds a span's serial number.
pub const SERIAL: &str = "spanbuf.serial";

/// What stands in a message.
#[derive(Debug, Clone, Default)]
pub struct Span {
    /// The organization.
    pub organization: u64,
    /// The project.
    pub project: u64,
    /// The trace.
    pub trace: String,
    /// The span's id.
    pub id: String,
    /// The parent's id; JSON null when none.
    pub parent: Option<String>,
    /// Whether it begins a segment; the key is left out when none.
    pub is_segment: Option<bool>,
    /// The segment's id, where the client knows it.
    pub segment: Option<String>,
    /// Its service.
    pub service: u64,
    /// Start, in Unix microseconds.
    pub start: u64,
    /// End, in Unix microseconds.
    pub end: u64,
}

/// The message of a span: about `bytes` long, longer where the ids are.
#[must_use]
pub fn render(span: &Span, serial: u64, bytes: usize, rng: &mut Rng) -> Vec<u8> {
    const OPERATIONS: [&str; 6] = [
        "http.server",
        "http.client",
        "db.sql.query",
        "cache.get_item",
        "rpc.client",
        "function",
    ];
    let operation = rng.choose(&OPERATIONS).unwrap_or(&"function");
    let service = format!("service-{}", span.service);
    let mut out = format!(
        "{{\"organization_id\":{},\"project_id\":{},\"trace_id\":{},\"span_id\":{},\"parent_span_id\":{}",
        span.organization,
        span.project,
        quoted(&span.trace),
        quoted(&span.id),
        span.parent.as_deref().map_or_else(|| "null".into(), quoted),
    );
    if let Some(is_segment) = span.is_segment {
        out.push_str(&format!(",\"is_segment\":{is_segment}"));
    }
    out.push_str(&format!(
        ",\"start_timestamp\":{},\"end_timestamp\":{},\"received\":{},\"retention_days\":90,\
         \"downsampled_retention_days\":390,\"name\":\"{operation} {service}\",\"status\":\"ok\",\"attributes\":{{",
        seconds(span.start),
        seconds(span.end),
        seconds(span.end + 20_000),
    ));
    attribute(&mut out, SERIAL, "integer", &serial.to_string());
    attribute(&mut out, "sentry.op", "string", &quoted(operation));
    attribute(
        &mut out,
        "sentry.exclusive_time",
        "double",
        &format!("{}.25", (span.end - span.start) / 1_000),
    );
    attribute(&mut out, "service.name", "string", &quoted(&service));
    attribute(
        &mut out,
        "server.address",
        "string",
        &quoted(&format!("{service}-{:08x}", rng.bits() >> 32)),
    );
    attribute(&mut out, "http.response.status_code", "integer", "200");
    attribute(
        &mut out,
        "sentry.is_remote",
        "boolean",
        if span.parent.is_none() {
            "true"
        } else {
            "false"
        },
    );
    if let Some(segment) = &span.segment {
        attribute(&mut out, "sentry.segment.id", "string", &quoted(segment));
    }
    const FILLER_KEYS_BYTES: usize = 70;
    let filler = bytes.saturating_sub(out.len() + FILLER_KEYS_BYTES);
    attribute(
        &mut out,
        "sentry.description",
        "string",
        &quoted(&filled(filler, rng)),
    );
    out.pop();
    out.push_str("},\"_meta\":{}}");
    out.into_bytes()
}

fn attribute(out: &mut String, name: &str, kind: &str, value: &str) {
    out.push_str(&format!(
        "\"{name}\":{{\"type\":\"{kind}\",\"value\":{value}}},"
    ));
}

/// Text as JSON writes it.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Microseconds as seconds with six places.
fn seconds(micros: u64) -> String {
    format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000)
}

/// Text that compresses about as well as real attributes do: words and numbers.
fn filled(bytes: usize, rng: &mut Rng) -> String {
    const WORDS: [&str; 10] = [
        "SELECT",
        "FROM",
        "orders",
        "WHERE",
        "customer_id",
        "/api/v2/",
        "checkout",
        "GET",
        "https://",
        "shipping",
    ];
    let mut text = String::with_capacity(bytes + 32);
    while text.len() < bytes {
        text.push_str(rng.choose(&WORDS).unwrap_or(&"word"));
        text.push_str(&format!(" {:x} ", rng.bits() >> 40));
    }
    text.truncate(bytes);
    text
}
