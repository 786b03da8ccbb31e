//! The way of a packet, hop by hop, in words. (`bpf/far.h` has endpoints that are no pods, docs/backends.md what goes how between nodes.)

use std::borrow::Cow;

use towpath_model::custom::BackendName;
use towpath_model::{NodeName, World};
use towpath_plan::modes::Proxy;

use super::{End, EndKind};
use crate::configured::{Configured, Leaves, Sends};

/// What becomes of an outside client's source towards an endpoint that is no pod.
const SOURCE_TRANSLATED: &str = "translated to an address of the node and a port of 61000 to 65535";
/// Where neither programs nor another node are asked.
const OWN_STACK: &str = "through the node's own stack";
/// What is said of the last hop of a Service that a client outside asks by another node.
const SAME_WAY_BACK: &str = "the answer goes back the same way";

/// Where an outside client's packets were translated.
#[derive(Clone, Copy)]
pub(super) enum Entry<'a> {
    /// They were not, or it is no outside client.
    None,
    /// At the uplink of this node (none: of whatever node the address leads to), by whom.
    Uplink(Option<&'a str>, Proxy),
}

impl Entry<'_> {
    /// In words.
    fn name(self) -> String {
        match self {
            Self::Uplink(Some(node), _) => format!("node {node}"),
            Self::Uplink(None, _) | Self::None => "the node that the address leads to".to_owned(),
        }
    }
}

fn is_pod(end: &End) -> bool {
    matches!(end.what, EndKind::Pod(_))
}

/// Hop by hop.
pub(super) fn hops(world: &World, configured: &Configured, from: &End, entry: Entry<'_>, to: &End) -> Vec<String> {
    let mut hops = vec![format!("{} ({})", from.what, from.address)];
    match (&from.node, &to.node) {
        (Some(a), Some(b)) if a == b => {
            let both = is_pod(from) && is_pod(to);
            let how = if both { "straight into the other pod" } else { OWN_STACK };
            hops.push(format!("node {a}: {how}"));
        }
        (Some(a), Some(b)) => {
            let how = between(configured, (a, from), (b, to));
            hops.push(format!("node {a}: {how} to node {b}"));
            hops.push(format!("node {b}"));
        }
        (Some(a), None) => {
            let source = if is_pod(from) { source(configured.leaves(world, to.address)) } else { String::new() };
            hops.push(format!("node {a}: the node's own routes{source}"));
        }
        (None, Some(b)) => from_outside(configured, entry, b, to, &mut hops),
        (None, None) if matches!(entry, Entry::Uplink(_, Proxy::Towpath)) => hops.push(format!(
            "{}: from its uplink, {SOURCE_TRANSLATED}, by the node's own routes; {SAME_WAY_BACK}",
            entry.name()
        )),
        (None, None) if matches!(entry, Entry::Uplink(..)) => {
            hops.push(format!("{}: from its uplink, {OWN_STACK}", entry.name()));
        }
        (None, None) => hops.push("neither end is in the cluster".to_owned()),
    }
    hops.push(format!("{} ({})", to.what, to.address));
    hops
}

/// What is said of the source of what a pod sends out of the cluster.
fn source(leaves: Leaves) -> String {
    match leaves {
        Leaves::AsNode => ", masqueraded as the node's address".to_owned(),
        Leaves::AsPod(why) => format!(", with the pod's own address ({why})"),
    }
}

/// How packets of somebody on a node go to somebody on another.
fn between(configured: &Configured, (a, from): (&str, &End), (b, to): (&str, &End)) -> Cow<'static, str> {
    let (a, b) = (NodeName::new(a), NodeName::new(b));
    match (is_pod(from), is_pod(to)) {
        (true, true) => {
            let sends = configured.sends(&a, &b);
            in_words(pods_way(sends.by), sends, &a)
        }
        (false, false) => "the node's network".into(),
        _ => envelope(configured, &a, &b),
    }
}

/// How pods' packets go from one node to another by a backend.
fn pods_way(by: BackendName) -> &'static str {
    match by {
        BackendName::HostGw => "as it is (host-gw; VXLAN where a router lies between)",
        BackendName::Macvlan => {
            "as it is, between the pods' own MAC addresses (macvlan; VXLAN where a router lies between)"
        }
        BackendName::Ipip => "in an IP header (ipip)",
        BackendName::Udp => "in a UDP datagram (udp)",
        BackendName::Vxlan => "VXLAN",
    }
}

/// How what has to come back by the same nodes goes, whatever the backend is.
fn envelope(configured: &Configured, from: &NodeName, to: &NodeName) -> Cow<'static, str> {
    let sends = configured.sends(from, to);
    match sends.by {
        BackendName::Udp => in_words(pods_way(BackendName::Udp), sends, from),
        // The others, and those that are not known, leave it to envelopes.
        _ => pods_way(BackendName::Vxlan).into(),
    }
}

fn in_words(way: &'static str, sends: Sends, from: &NodeName) -> Cow<'static, str> {
    if sends.said {
        return way.into();
    }
    format!("{way}, as configured (node {from} does not say what it sends by),").into()
}

/// The hops of an outside client's packets to what is on node `b`.
fn from_outside(configured: &Configured, entry: Entry<'_>, b: &str, to: &End, hops: &mut Vec<String>) {
    let pod = is_pod(to);
    match entry {
        Entry::Uplink(Some(entry), Proxy::Towpath) if entry == b => hops.push(format!("node {b}: from its uplink")),
        Entry::Uplink(Some(entry), Proxy::Towpath) if pod => {
            // Direct return is asked for in what only envelopes have.
            let (how, back) = if configured.returns_directly() {
                ("VXLAN".into(), "it answers the client itself (directServerReturn)")
            } else {
                (envelope(configured, &NodeName::new(entry), &NodeName::new(b)), SAME_WAY_BACK)
            };
            hops.push(format!("node {entry}: from its uplink, {how} to node {b} with the client's address kept"));
            hops.push(format!("node {b}; {back}"));
        }
        Entry::Uplink(Some(entry), Proxy::Towpath) => {
            hops.push(format!("node {entry}: from its uplink, {SOURCE_TRANSLATED}, by the node's network to node {b}"));
            hops.push(format!("node {b}; {SAME_WAY_BACK}"));
        }
        Entry::Uplink(Some(entry), Proxy::KubeProxy | Proxy::Others) => {
            let on = if entry == b { String::new() } else { format!(" to node {b}") };
            hops.push(format!("node {entry}: from its uplink, {OWN_STACK}{on}"));
        }
        Entry::Uplink(None, Proxy::Towpath) if !pod => {
            hops.push(format!("{}: from its uplink; unless that is node {b} itself, {SOURCE_TRANSLATED}", entry.name()))
        }
        Entry::Uplink(None, _) | Entry::None => hops.push(format!("node {b}: from its uplink")),
    }
}
