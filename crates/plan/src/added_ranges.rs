//! Which of the pod ranges that nodes have beyond their `spec.podCIDRs` are in force.
//!
//! A node's annotation asks for them ([`towpath_model::added_ranges`]), and a node that is not to be trusted may write its own. So they come after
//! everything else: a range must be inside the cluster's, and touch no node's `spec.podCIDRs` and no node's address, whoever came first. Of two that
//! ask for one, who has it keeps it: who had it in force here, then who says that he uses it, then the older node. A range that is no longer asked for
//! stays its node's as long as that says that its pods still have addresses of it; nobody else gets it until then.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use towpath_model::{Family, Node, NodeName, family_of};

use crate::backend::Says;

/// Where added ranges may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Within {
    /// In these.
    Cluster {
        /// The cluster's pod ranges.
        cluster: Vec<IpNet>,
        /// Ranges of Services, so that a range in them can be called that.
        services: Vec<IpNet>,
    },
    /// Nobody here knows: what its node says it uses is where it may be.
    Used,
}

/// What is in force, and what is not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Ranges beyond `spec.podCIDRs`: those that are asked for in the order in which they are, then those that are only used still.
    pub in_force: BTreeMap<NodeName, Vec<IpNet>>,
    /// Why a range is not, for people.
    pub refused: BTreeMap<NodeName, Vec<String>>,
}

/// A range of a node.
#[derive(Clone, Copy)]
struct Claim<'a> {
    node: &'a Node,
    range: IpNet,
    /// In force when it was last settled.
    had: bool,
    /// Its node says that it uses it.
    used: bool,
    /// Its node no longer asks for it.
    left: bool,
}

/// Settles it for all nodes. `nodes` with what is in force now; `said` is what they say of themselves.
pub fn settle(nodes: &BTreeMap<NodeName, Node>, said: &BTreeMap<NodeName, Says>, within: &Within) -> Settled {
    let mut settled = Settled::default();
    let mut claims: Vec<Claim<'_>> = nodes.values().flat_map(|node| claims_of(node, said)).collect();
    for node in nodes.values().filter(|node| !node.added.problems.is_empty()) {
        settled.refused.entry(node.name.clone()).or_default().extend(node.added.problems.iter().cloned());
    }
    if claims.is_empty() {
        return settled;
    }
    claims.sort_by_key(|claim| (!claim.had, !claim.used, claim.node.created, &claim.node.name));
    let mut taken = Taken::of(nodes);
    let mut got: BTreeSet<(&NodeName, IpNet)> = BTreeSet::new();
    for claim in claims {
        match may_have(&claim, within).and_then(|()| taken.claim(&claim)) {
            Ok(()) => drop(got.insert((&claim.node.name, claim.range))),
            Err(reason) => {
                let pods = if claim.left { ", and its pods still have addresses of it" } else { "" };
                let reason = format!("pod range {} (towpath.dev/pod-cidrs): {reason}{pods}", claim.range);
                settled.refused.entry(claim.node.name.clone()).or_default().push(reason);
            }
        }
    }
    for node in nodes.values() {
        let ranges: Vec<IpNet> = claims_of(node, said)
            .map(|claim| claim.range)
            .filter(|range| got.contains(&(&node.name, *range)))
            .collect();
        if !ranges.is_empty() {
            settled.in_force.insert(node.name.clone(), ranges);
        }
    }
    settled
}

/// What a node asks for, then what it only uses.
fn claims_of<'a>(node: &'a Node, said: &'a BTreeMap<NodeName, Says>) -> impl Iterator<Item = Claim<'a>> {
    let used: &[IpNet] = said.get(&node.name).map_or(&[], |says| &says.added_ranges);
    let left =
        used.iter().filter(|range| !node.added.wanted.contains(range) && node.assigned().all(|own| own != *range));
    let all = node.added.wanted.iter().map(|range| (range, false)).chain(left.map(|range| (range, true)));
    let mut seen: BTreeSet<&IpNet> = BTreeSet::new();
    all.filter(move |(range, _)| seen.insert(range)).map(|(range, left)| Claim {
        node,
        range: *range,
        had: node.added.in_force.contains(range),
        used: used.contains(range),
        left,
    })
}

fn may_have(claim: &Claim<'_>, within: &Within) -> Result<(), String> {
    let range = claim.range;
    let overlaps = |other: &&IpNet| other.contains(&range) || range.contains(*other);
    if range.prefix_len() + 2 > range.max_prefix_len() {
        return Err("it has no address for a pod; it needs at least a /30 (IPv4) or /126 (IPv6)".to_owned());
    }
    if claim.node.assigned().all(|own| family_of(own.addr()) != family_of(range.addr())) {
        let family = if family_of(range.addr()) == Family::V4 { "IPv4" } else { "IPv6" };
        return Err(format!("the node's spec.podCIDRs has no range of {family} that it could be added to"));
    }
    match within {
        Within::Cluster { services, .. } if services.iter().any(|services| overlaps(&services)) => {
            Err("it overlaps a Service range: choose one that is used nowhere else".to_owned())
        }
        Within::Cluster { cluster, .. } if !cluster.iter().any(|cluster| cluster.contains(&range)) => {
            let ranges: Vec<String> = cluster.iter().map(ToString::to_string).collect();
            let ranges = ranges.join(", ");
            Err(format!(
                "it is not inside the cluster's pod ranges ({ranges}): choose one that is, or add one to clusterCIDRs of the NetworkConfig first"
            ))
        }
        Within::Used if !claim.used => Err("its node does not use it".to_owned()),
        Within::Cluster { .. } | Within::Used => Ok(()),
    }
}

/// Who has which range and address.
struct Taken<'a> {
    addresses: BTreeMap<IpAddr, &'a NodeName>,
    /// By first address and length. Those of `spec.podCIDRs` may nest.
    ranges: BTreeMap<(IpAddr, u8), (IpNet, &'a NodeName, bool)>,
}

impl<'a> Taken<'a> {
    fn of(nodes: &'a BTreeMap<NodeName, Node>) -> Self {
        let addresses = nodes.values().flat_map(|node| node.internal_ips.iter().map(|ip| (*ip, &node.name)));
        let assigned = nodes.values().flat_map(|node| node.assigned().map(|range| (range.trunc(), &node.name)));
        Self {
            addresses: addresses.collect(),
            ranges: assigned.map(|(range, node)| (key(range), (range, node, false))).collect(),
        }
    }

    fn claim(&mut self, claim: &Claim<'a>) -> Result<(), String> {
        let range = claim.range;
        if let Some((address, owner)) = self.addresses.range(range.network()..=range.broadcast()).next() {
            return Err(format!("it covers {address}, the address of node {owner}"));
        }
        if let Some((other, owner, left)) = self.overlapping(range) {
            return Err(match (*owner == claim.node.name, left) {
                (true, _) => format!("it overlaps {other}, which the node has"),
                (false, false) => format!("it overlaps {other} of node {owner}"),
                (false, true) => format!("it overlaps {other} of node {owner}, whose pods still have addresses of it"),
            });
        }
        self.ranges.insert(key(range), (range, &claim.node.name, claim.left));
        Ok(())
    }

    /// Ranges nest or are disjoint: what touches one begins in it, or holds it.
    fn overlapping(&self, range: IpNet) -> Option<(IpNet, &'a NodeName, bool)> {
        let within = self.ranges.range((range.network(), 0)..=(range.broadcast(), u8::MAX)).next();
        let around = || {
            let shorter = (0..range.prefix_len()).filter_map(|length| IpNet::new(range.network(), length).ok());
            shorter.map(|around| key(around.trunc())).find_map(|key| self.ranges.get(&key))
        };
        within.map(|(_, found)| found).or_else(around).copied()
    }
}

fn key(range: IpNet) -> (IpAddr, u8) {
    (range.network(), range.prefix_len())
}

#[cfg(test)]
mod tests;
