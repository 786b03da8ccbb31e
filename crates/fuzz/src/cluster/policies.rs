//! NetworkPolicies.

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::selectors::selector;
use crate::random::Random;

/// Ranges that nest, touch, cover each other and hold one address; some with bits beyond the prefix, as old objects have them.
pub const BLOCKS: [&str; 34] = [
    "0.0.0.0/0",
    "0.0.0.0/1",
    "128.0.0.0/1",
    "10.0.0.0/8",
    "10.7.7.7/8",
    "10.0.0.0/15",
    "10.0.0.0/23",
    "10.0.0.0/24",
    "10.0.1.0/24",
    "10.0.0.0/29",
    "10.0.0.4/30",
    "10.0.0.2/31",
    "10.0.0.2/32",
    "10.0.1.3/32",
    "10.9.0.0/24",
    "10.9.0.1/32",
    "198.51.100.0/24",
    "198.51.100.128/25",
    "198.51.100.64/26",
    "203.0.113.9/32",
    "255.255.255.255/32",
    "169.254.20.10/32",
    "::/0",
    "::/1",
    "8000::/1",
    "fd00::/8",
    "fd00::/63",
    "fd00::/64",
    "fd00:0:0:1::/64",
    "fd00::2/127",
    "fd00::3/128",
    "fd09::/64",
    "2001:db8::/32",
    "2001:db8::1/32",
];

/// Ports as rules name them: alone, and as first and last.
pub(super) const PORTS: [i64; 8] = [1, 53, 79, 80, 81, 8080, 65534, 65535];
/// Ranges: of one port, of all, that nest, touch and cross powers of two.
pub(super) const PORT_RANGES: [(i64, i64); 10] = [
    (80, 80),
    (79, 81),
    (80, 8080),
    (1, 65535),
    (1, 79),
    (82, 65535),
    (32767, 32768),
    (8000, 8191),
    (8192, 12287),
    (65535, 65535),
];

fn inside(outer: &str, inner: &str) -> bool {
    let (Ok(outer), Ok(inner)) = (outer.parse::<IpNet>(), inner.parse::<IpNet>()) else { return false };
    outer.trunc().contains(&inner.trunc()) && outer.prefix_len() < inner.prefix_len()
}

/// A range and holes in it, one in the other too.
fn block(random: &mut Random) -> Value {
    let cidr = random.pick(&BLOCKS);
    let within: Vec<&str> = BLOCKS.into_iter().filter(|hole| inside(cidr, hole)).collect();
    if within.is_empty() || random.chance(1, 3) {
        return json!({"ipBlock": {"cidr": cidr}});
    }
    json!({"ipBlock": {"cidr": cidr, "except": random.list(1, 4, |random| random.pick(&within))}})
}

fn peer(random: &mut Random) -> Value {
    match random.below(8) {
        0 | 1 => json!({"podSelector": selector(random)}),
        2 => json!({"namespaceSelector": selector(random)}),
        3 | 4 => json!({"namespaceSelector": selector(random), "podSelector": selector(random)}),
        _ => block(random),
    }
}

fn port(random: &mut Random) -> Value {
    let mut port = Map::new();
    let protocol = random.pick(&[None, Some("TCP"), Some("TCP"), Some("UDP"), Some("SCTP")]);
    port.extend(protocol.map(|protocol| ("protocol".to_owned(), json!(protocol))));
    match random.below(8) {
        0 => {}
        1..=3 => drop(port.insert("port".to_owned(), json!(random.pick(&PORTS)))),
        4 | 5 => {
            let (first, last) = random.pick(&PORT_RANGES);
            port.insert("port".to_owned(), json!(first));
            port.insert("endPort".to_owned(), json!(last));
        }
        _ => drop(port.insert("port".to_owned(), json!(random.pick(&["http", "alt", "dns", "edge", "none"])))),
    }
    Value::Object(port)
}

fn rule(random: &mut Random, peers: &str) -> Value {
    let mut rule = Map::new();
    // An empty list is everyone, as none is.
    if random.chance(4, 5) {
        rule.insert(peers.to_owned(), json!(random.list(0, 3, peer)));
    }
    if random.chance(3, 4) {
        rule.insert("ports".to_owned(), json!(random.list(0, 3, port)));
    }
    Value::Object(rule)
}

/// A policy without a name.
pub(super) fn policy(random: &mut Random) -> Value {
    let namespace = random.pick(&["n0", "n0", "n0", "n1", "n1", "kube-system"]);
    let mut spec = Map::new();
    let selector = if random.chance(1, 2) { json!({}) } else { selector(random) };
    spec.insert("podSelector".to_owned(), selector);
    let types: Option<&[&str]> = random.pick(&[
        None,
        Some(&["Ingress"][..]),
        Some(&["Egress"][..]),
        Some(&["Ingress", "Egress"][..]),
        Some(&["Egress", "Ingress"][..]),
    ]);
    spec.extend(types.map(|types| ("policyTypes".to_owned(), json!(types))));
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        if random.chance(4, 5) {
            let most = if random.chance(1, 16) { 20 } else { 3 };
            spec.insert(direction.to_owned(), json!(random.list(0, most, |random| rule(random, peers))));
        }
    }
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": namespace}, "spec": spec,
    })
}
