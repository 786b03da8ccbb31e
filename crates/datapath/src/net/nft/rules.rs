//! What the table consists of. No rule has a set of its own, which would go with it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};
use towpath_model::Family;

use super::{KUBE_PROXY_MASQUERADE, MASQUERADE_PORTS, TABLE};
use crate::net::host_range;
use crate::net::link::TUNNEL_DEVICE;
use crate::net::tap::UDP_DEVICE;

/// Sets that rules name, by their names, and what is in them.
pub(super) type Sets = BTreeMap<String, BTreeSet<IpNet>>;

/// What of [`Facts`] is in a set.
type Members = fn(&Facts) -> Vec<IpNet>;

/// Ranges and addresses that rules go by: the name of the set, without the family's digit that follows it, and what there can be in it.
const SETS: [(&str, Members); 6] = [
    ("pods", |facts| facts.pods.clone()),
    ("cluster", |facts| facts.cluster.clone()),
    ("services", |facts| facts.services.clone()),
    ("untranslated", |facts| facts.untranslated.clone()),
    ("nodes", |facts| facts.nodes.iter().copied().map(host_range).collect()),
    ("dns", |facts| facts.dns.iter().copied().map(host_range).collect()),
];

/// What the table depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// This node's pod ranges: what is masqueraded.
    pub pods: Vec<IpNet>,
    /// All pod ranges.
    pub cluster: Vec<IpNet>,
    /// Service ranges.
    pub services: Vec<IpNet>,
    /// This node's addresses, at most one a family.
    pub own: Vec<IpAddr>,
    /// Addresses of all nodes, this one included.
    pub nodes: Vec<IpAddr>,
    /// Families of which anything is masqueraded.
    pub masqueraded: Vec<Family>,
    /// Destinations that see pod addresses untranslated.
    pub untranslated: Vec<IpNet>,
    /// Node-local DNS addresses.
    pub dns: Vec<IpAddr>,
    /// UDP port of the tunnel.
    pub tunnel_port: u16,
    /// Port of the backend `udp`, while packets are taken so.
    pub udp_port: Option<u16>,
    /// The tunnel device is another network's, and no program of ours judges what it opens: only nodes send envelopes here.
    pub borrowed_tunnel: bool,
    /// Packets between pods are tracked: another network's pods are here, whose rules and translations go by what is tracked.
    pub track_pods: bool,
}

/// All sets, those that are empty too. No two elements of one overlap.
pub(super) fn sets(facts: &Facts) -> Sets {
    let families = [4, 6];
    let each = SETS.iter().flat_map(|(name, of)| families.map(|family| (name, family, of)));
    each.map(|(name, family, of)| {
        let own: Vec<IpNet> = of(facts).into_iter().filter(|n| n.addr().is_ipv4() == (family == 4)).collect();
        (format!("{name}{family}"), IpNet::aggregate(&own).into_iter().collect())
    })
    .collect()
}

/// Commands that make the empty sets, where they are not.
pub(super) fn add_sets() -> impl Iterator<Item = Value> {
    let families = [(4, "ipv4_addr"), (6, "ipv6_addr")];
    SETS.iter().flat_map(move |(name, _)| families.map(|(family, kind)| (name, family, kind))).map(|(name, family, kind)| {
        json!({"add": {"set": {
            "family": "inet", "table": TABLE, "name": format!("{name}{family}"), "type": kind, "flags": ["interval"],
        }}})
    })
}

/// Commands that add chains, where they are not, and rules.
pub(super) fn rules(facts: &Facts) -> Vec<Value> {
    let mut commands = Vec::new();
    for (name, (kind, hook, priority)) in chains() {
        commands.push(json!({"add": {"chain": {
            "family": "inet", "table": TABLE, "name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept",
        }}}));
    }
    for chain in ["raw-prerouting", "raw-output"] {
        for port in [facts.tunnel_port].into_iter().chain(facts.udp_port) {
            let port = equal(payload("udp", "dport"), json!(port));
            commands.push(rule(chain, "tunnel packets need no tracking", vec![port, json!({"notrack": null})]));
        }
    }
    let sets = sets(facts);
    for family in [4, 6] {
        commands.extend(family_rules(family, facts, &sets));
    }
    commands
}

fn chains() -> BTreeMap<&'static str, (&'static str, &'static str, i32)> {
    BTreeMap::from([
        ("raw-prerouting", ("filter", "prerouting", -300)),
        ("raw-output", ("filter", "output", -300)),
        ("input", ("filter", "input", 0)),
        ("forward", ("filter", "forward", 0)),
        ("output", ("filter", "output", 0)),
        ("before-masquerading", ("nat", "postrouting", 99)),
        ("postrouting", ("nat", "postrouting", 100)),
    ])
}

fn family_rules(family: u8, facts: &Facts, sets: &Sets) -> Vec<Value> {
    let ip = if family == 4 { "ip" } else { "ip6" };
    // A set by its name, if there is anything in it.
    let set = |name: &str| {
        let name = format!("{name}{family}");
        sets.get(&name).filter(|set| !set.is_empty()).map(|_| json!(format!("@{name}")))
    };
    let (source, destination) = (|| payload(ip, "saddr"), || payload(ip, "daddr"));
    let mut rules = Vec::new();
    if let Some(own) = facts.own.iter().find(|own| own.is_ipv4() == (family == 4)) {
        rules.extend(source_for_kube_proxy(ip, *own));
    }
    if let Some(cluster) = set("cluster").filter(|_| !facts.track_pods) {
        let both = vec![equal(source(), cluster.clone()), equal(destination(), cluster), json!({"notrack": null})];
        rules.push(rule("raw-prerouting", "pod to pod needs no tracking", both));
    }
    if let Some(dns) = set("dns") {
        let elsewhere = ["lo", "tp*"].map(|device| differ(meta("iifname"), json!(device)));
        let expressions = elsewhere.into_iter().chain([equal(destination(), dns), json!({"drop": null})]).collect();
        rules.push(rule("input", "DNS is for this node and its pods", expressions));
    }
    if let Some(nodes) = set("nodes").filter(|_| facts.borrowed_tunnel) {
        // Of whichever of this node's addresses, by whichever device, a pod's too.
        let envelope = equal(payload("udp", "dport"), json!(facts.tunnel_port));
        let expressions = vec![envelope, differ(source(), nodes), json!({"drop": null})];
        rules.push(rule("input", "only nodes send envelopes", expressions));
    }
    if let Some(services) = set("services") {
        for chain in ["forward", "output"] {
            rules.extend(refusal(chain, &equal(destination(), services.clone())));
        }
    }
    let masqueraded = facts.masqueraded.contains(&if family == 4 { Family::V4 } else { Family::V6 });
    if let Some(pods) = set("pods").filter(|_| masqueraded) {
        let inside = ["cluster", "services", "untranslated", "pods", "nodes"].into_iter().filter_map(set);
        let outside = inside.map(|inside| differ(destination(), inside));
        let leaving: Vec<Value> = std::iter::once(equal(source(), pods)).chain(outside).collect();
        rules.extend(masquerade(&leaving));
    }
    rules
}

/// What is for a Service address and still untranslated never leaves the node.
fn refusal(chain: &str, service: &Value) -> [Value; 3] {
    let protocol = |name: &str| equal(meta("l4proto"), json!(name));
    let reset = json!({"reject": {"type": "tcp reset"}});
    let unreachable = json!({"reject": {"type": "icmpx", "expr": "port-unreachable"}});
    let why = "no Service has this address and port";
    [
        rule(chain, why, vec![service.clone(), protocol("tcp"), reset]),
        rule(chain, why, vec![service.clone(), protocol("udp"), unreachable]),
        rule(chain, why, vec![service.clone(), json!({"drop": null})]),
    ]
}

/// kube-proxy gives what it translates for others than pods a source of the node, and the kernel takes it from the device that the
/// packet leaves by. Pods' devices and the tunnel have none: it would be the gateway's, which no peer believes. So it is given
/// here, just before, and the mark taken off, as kube-proxy does: the envelope must not be translated too.
fn source_for_kube_proxy(ip: &str, own: IpAddr) -> [Value; 3] {
    let mark = || meta("mark");
    let family = if ip == "ip" { "ipv4" } else { "ipv6" };
    ["tp*", TUNNEL_DEVICE, UDP_DEVICE].map(|device| {
        let marked = json!({"match": {
            "op": "==", "left": {"&": [mark(), KUBE_PROXY_MASQUERADE]}, "right": KUBE_PROXY_MASQUERADE,
        }});
        let expressions = vec![
            equal(meta("nfproto"), json!(family)),
            equal(meta("oifname"), json!(device)),
            marked,
            json!({"mangle": {"key": mark(), "value": {"&": [mark(), !KUBE_PROXY_MASQUERADE]}}}),
            json!({"snat": {"family": ip, "addr": own.to_string(), "flags": "fully-random"}}),
        ];
        rule("before-masquerading", "what kube-proxy masquerades on its way to a pod", expressions)
    })
}

fn masquerade(leaving: &[Value]) -> Vec<Value> {
    let range = json!({"range": [MASQUERADE_PORTS.0, MASQUERADE_PORTS.1]});
    let why = "pods leave the cluster with the node's address";
    let build = |tail: Vec<Value>| rule("postrouting", why, leaving.iter().cloned().chain(tail).collect());
    let with_ports = ["tcp", "udp", "sctp"].map(|protocol| {
        let protocol = equal(meta("l4proto"), json!(protocol));
        build(vec![protocol, json!({"masquerade": {"port": range, "flags": "fully-random"}})])
    });
    let other = build(vec![json!({"masquerade": {"flags": "fully-random"}})]);
    with_ports.into_iter().chain([other]).collect()
}

fn rule(chain: &str, comment: &str, expressions: Vec<Value>) -> Value {
    json!({"add": {"rule": {"family": "inet", "table": TABLE, "chain": chain, "comment": comment, "expr": expressions}}})
}

fn meta(key: &str) -> Value {
    json!({"meta": {"key": key}})
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn equal(left: Value, right: Value) -> Value {
    json!({"match": {"op": "==", "left": left, "right": right}})
}

fn differ(left: Value, right: Value) -> Value {
    json!({"match": {"op": "!=", "left": left, "right": right}})
}
