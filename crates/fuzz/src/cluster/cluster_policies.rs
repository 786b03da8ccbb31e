//! ClusterNetworkPolicies of network-policy-api v0.2.0, and some that only a later version has.

use serde_json::{Value, json};

use super::policies::{BLOCKS, PORT_RANGES, PORTS};
use super::selectors::selector;
use crate::random::Random;

/// Pods by labels: a subject, or a peer.
fn pods(random: &mut Random) -> Value {
    match random.below(6) {
        0 | 1 => json!({"namespaces": {}}),
        2 => json!({"namespaces": selector(random)}),
        3 => json!({"pods": {"namespaceSelector": {}, "podSelector": selector(random)}}),
        _ => json!({"pods": {"namespaceSelector": selector(random), "podSelector": selector(random)}}),
    }
}

/// A peer that egress rules alone may have.
fn outside(random: &mut Random) -> Value {
    match random.below(12) {
        0..=6 => json!({"networks": random.list(1, 4, |random| random.pick(&BLOCKS))}),
        7..=9 => json!({"nodes": selector(random)}),
        10 => json!({"domainNames": ["*.example.com"]}),
        _ => json!({"ofALaterVersion": {}}),
    }
}

fn port(random: &mut Random) -> Value {
    let protocol = random.pick(&["tcp", "tcp", "udp", "sctp"]);
    let ranges: Vec<_> = PORT_RANGES.into_iter().filter(|(first, last)| first < last).collect();
    let port = if random.chance(1, 2) {
        json!({"number": random.pick(&PORTS)})
    } else {
        let (start, end) = random.pick(&ranges);
        json!({"range": {"start": start, "end": end}})
    };
    json!({protocol: {"destinationPort": port}})
}

fn rule(random: &mut Random, peers_field: &str) -> Value {
    let egress = peers_field == "to";
    // Named ports stand beside pods only.
    let named = random.chance(1, 4);
    let mut peers = random
        .list(1, 3, |random| if egress && !named && random.chance(1, 2) { outside(random) } else { pods(random) });
    let mut action = random.pick(&["Accept", "Deny", "Pass"]);
    // Domain names stand in rules that accept only.
    if peers.iter().any(|peer| !peer["domainNames"].is_null()) {
        action = "Accept";
    }
    if !egress && random.chance(1, 24) {
        peers.push(json!({"ofALaterVersion": {}}));
    }
    let mut rule = json!({"action": action, peers_field: peers});
    if named {
        let name = |random: &mut Random| json!({"destinationNamedPort": random.pick(&["http", "alt", "dns", "edge"])});
        let one = |random: &mut Random| if random.chance(1, 2) { name(random) } else { port(random) };
        rule["protocols"] = json!(random.list(1, 3, one));
    } else if random.chance(1, 2) {
        rule["protocols"] = json!(random.list(1, 3, port));
    }
    rule
}

/// A policy without a name. Priorities are few, so that some are equal.
pub(super) fn policy(random: &mut Random) -> Value {
    let mut spec = json!({
        "tier": random.pick(&["Admin", "Baseline"]),
        "priority": random.pick(&[0, 0, 1, 2, 256, 1000]),
        "subject": pods(random),
    });
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        if random.chance(3, 4) {
            spec[direction] = json!(random.list(0, 4, |random| rule(random, peers)));
        }
    }
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {}, "spec": spec,
    })
}
