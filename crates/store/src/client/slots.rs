//! Which node has which slot, as servers say it.
//!
//! In:     replies of `CLUSTER SLOTS`, and refusals that name another node.
//! Out:    ranges of slots with the address of their master; where a command is to go instead.
//! Keeps:  any reply gives ranges or nothing, and a bounded number of them; replicas are left out.
//! Knows:  the forms of Redis 6.2 and later. Pure.
//! Source: https://redis.io/commands/cluster-slots

use redis::{ServerError, ServerErrorKind, Value};

use super::{command::SLOTS, reply};

/// Slots that lie together on one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) first: u16,
    pub(super) last: u16,
    /// The master, `host:port`.
    pub(super) address: String,
}

/// Where a command is to go instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Redirect {
    /// The slot has another node.
    Moved(String),
    /// The slot is on its way, and this key is there already or is new.
    Ask(String),
}

/// The ranges of a reply; `None` when it is none. `host` is that of the node that was asked: a node may not know its own.
pub(super) fn ranges(value: &Value, host: &str) -> Option<Vec<Range>> {
    let Value::Array(ranges) = value else {
        return None;
    };
    let mut found = Vec::new();
    for range in ranges.iter().take(usize::from(SLOTS)) {
        let Value::Array(parts) = range else {
            return None;
        };
        let [first, last, Value::Array(master), ..] = &parts[..] else {
            return None;
        };
        let (first, last) = (slot(first)?, slot(last)?);
        let said = master.first().and_then(reply::bytes).unwrap_or_default();
        let port = reply::number(master.get(1)?)?;
        let port = u16::try_from(port).ok().filter(|&port| port > 0)?;
        let said = std::str::from_utf8(said).ok()?;
        // `?` stands for a name that is not configured: the range is as good as missing.
        if first > last || said == "?" {
            continue;
        }
        let host = if said.is_empty() { host } else { said };
        found.push(Range {
            first,
            last,
            address: format!("{host}:{port}"),
        });
    }
    (!found.is_empty()).then_some(found)
}

/// Where a refused command is to go; `None` when the refusal says nothing of the kind.
pub(super) fn redirect(error: &ServerError, host: &str) -> Option<Redirect> {
    let (kind, details) = (error.kind()?, error.details()?);
    let (said, port) = details.split_whitespace().nth(1)?.rsplit_once(':')?;
    let port: u16 = port.parse().ok().filter(|&port| port > 0)?;
    let host = if said.is_empty() { host } else { said };
    let address = format!("{host}:{port}");
    match kind {
        ServerErrorKind::Moved => Some(Redirect::Moved(address)),
        ServerErrorKind::Ask => Some(Redirect::Ask(address)),
        _ => None,
    }
}

fn slot(value: &Value) -> Option<u16> {
    u16::try_from(reply::number(value)?)
        .ok()
        .filter(|&slot| slot < SLOTS)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.into())
    }

    fn node(host: Value, port: i64) -> Value {
        Value::Array(vec![host, Value::Int(port), bulk("id")])
    }

    fn range(first: i64, last: i64, nodes: &[Value]) -> Value {
        let ends = [Value::Int(first), Value::Int(last)];
        Value::Array(ends.into_iter().chain(nodes.iter().cloned()).collect())
    }

    #[test]
    fn masters_are_read_and_replicas_left_out() {
        let reply = Value::Array(vec![
            range(
                0,
                99,
                &[node(bulk("10.0.0.1"), 7), node(bulk("10.0.0.2"), 8)],
            ),
            range(100, 100, &[node(Value::Nil, 9)]),
            range(101, 101, &[node(bulk(""), 9)]),
            range(200, 300, &[node(bulk("?"), 9)]),
            range(301, 16_383, &[node(bulk("::1"), 9)]),
        ]);
        let found: Vec<(u16, u16, String)> = ranges(&reply, "asked")
            .unwrap()
            .into_iter()
            .map(|range| (range.first, range.last, range.address))
            .collect();
        let expected = [
            (0, 99, "10.0.0.1:7"),
            (100, 100, "asked:9"),
            (101, 101, "asked:9"),
            (301, 16_383, "::1:9"),
        ];
        assert_eq!(
            found,
            expected.map(|(first, last, address)| (first, last, address.to_owned()))
        );
    }

    #[test]
    fn what_is_no_map_is_none() {
        let one = [node(bulk("a"), 1)];
        for wrong in [
            Value::Nil,
            Value::Array(vec![]),
            Value::Array(vec![Value::Int(1)]),
            Value::Array(vec![range(0, 16_384, &one)]),
            Value::Array(vec![range(-1, 5, &one)]),
            Value::Array(vec![range(5, 4, &one)]),
            Value::Array(vec![range(0, 5, &[])]),
            Value::Array(vec![range(0, 5, &[node(bulk("a"), 65_536)])]),
            Value::Array(vec![range(0, 5, &[node(bulk("a"), 0)])]),
        ] {
            assert_eq!(ranges(&wrong, "asked"), None, "{wrong:?}");
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Nil),
            (-2..20_000_i64).prop_map(Value::Int),
            "[a-z?]{0,3}".prop_map(|text| bulk(&text)),
            vec(any::<u8>(), 0..3).prop_map(Value::BulkString),
        ];
        leaf.prop_recursive(4, 64, 5, |inner| vec(inner, 0..5).prop_map(Value::Array))
    }

    proptest! {
        #[test]
        fn any_reply_gives_slots_that_exist(value in any_value()) {
            for range in ranges(&value, "asked").unwrap_or_default() {
                prop_assert!(range.first <= range.last && range.last < SLOTS);
            }
        }
    }
}
