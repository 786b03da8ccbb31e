//! Nodes: their addresses and pod ranges.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use serde::{Deserialize, Serialize};

use crate::flannel::Flannel;
use crate::{AddedRanges, Family, Invalid, Labels, NodeName, canonical, family_of};

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its name.
    pub name: NodeName,
    /// Its labels (zone, hostname).
    pub labels: Labels,
    /// `status.addresses` of type `InternalIP`, in order, at most one a family.
    pub internal_ips: Vec<IpAddr>,
    /// All others of `status.addresses` that are addresses (`ExternalIP`, further `InternalIP`s), sorted: by these too a policy's peer of
    /// nodes knows it.
    #[serde(default)]
    pub other_ips: Vec<IpAddr>,
    /// Its pod ranges: `spec.podCIDRs`, at most one a family, none until somebody assigns them; then those that were added and are in force.
    pub pod_cidrs: Vec<IpNet>,
    /// Ranges beyond `spec.podCIDRs`: as parsed from an object none is in force.
    #[serde(default)]
    pub added: AddedRanges,
    /// `metadata.creationTimestamp`, in seconds since 1970: of two nodes that claim one thing the older has it.
    #[serde(default)]
    pub created: i64,
    /// The `Ready` condition.
    pub ready: bool,
    /// What Flannel wrote on it.
    #[serde(default)]
    pub flannel: Option<Flannel>,
}

impl Node {
    /// Its zone (`topology.kubernetes.io/zone`).
    pub fn zone(&self) -> Option<&str> {
        self.labels.get("topology.kubernetes.io/zone").map(String::as_str).filter(|zone| !zone.is_empty())
    }

    /// All of its addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.internal_ips.iter().chain(&self.other_ips).copied()
    }

    /// `spec.podCIDRs`: its pod ranges without those that were added.
    pub fn assigned(&self) -> impl Iterator<Item = &IpNet> + '_ {
        self.pod_cidrs.iter().filter(|range| !self.added.in_force.contains(range))
    }

    /// Puts exactly these ranges in force beside those that it was assigned.
    pub fn put_in_force(&mut self, mut ranges: Vec<IpNet>) {
        let mut all: Vec<IpNet> = self.assigned().copied().collect();
        ranges.retain(|range| !all.contains(range));
        all.extend(&ranges);
        (self.pod_cidrs, self.added.in_force) = (all, ranges);
    }

    /// The node's address of a family.
    pub fn internal_ip(&self, family: Family) -> Option<IpAddr> {
        self.internal_ips.iter().copied().find(|ip| family_of(*ip) == family)
    }
}

impl TryFrom<&core::Node> for Node {
    type Error = Invalid;

    fn try_from(object: &core::Node) -> Result<Self, Invalid> {
        let name = object.metadata.name.clone().ok_or_else(|| Invalid::new("Node", "metadata.name", "missing"))?;
        let who = format!("Node {name}");
        let spec = object.spec.clone().unwrap_or_default();
        let ranges = match (spec.pod_cidrs, spec.pod_cidr) {
            (Some(ranges), _) if !ranges.is_empty() => ranges,
            (_, Some(range)) if !range.is_empty() => vec![range],
            _ => Vec::new(),
        };
        let mut pod_cidrs: Vec<IpNet> = Vec::new();
        for (index, text) in ranges.iter().enumerate() {
            let cidr: IpNet = text
                .parse()
                .map_err(|e| Invalid::new(&who, format!("spec.podCIDRs[{index}]"), format!("{text:?}: {e}")))?;
            pod_cidrs.push(cidr.trunc());
        }
        let status = object.status.clone().unwrap_or_default();
        let (mut internal_ips, mut other_ips): (Vec<IpAddr>, Vec<IpAddr>) = (Vec::new(), Vec::new());
        for address in status.addresses.iter().flatten() {
            // Kubelet may list what a cloud provider calls it; what does not parse is no address of ours.
            let Ok(ip) = address.address.parse::<IpAddr>().map(canonical) else { continue };
            let first = internal_ips.iter().all(|have| family_of(*have) != family_of(ip));
            if address.type_ == "InternalIP" && first {
                internal_ips.push(ip);
            } else {
                other_ips.push(ip);
            }
        }
        other_ips.sort();
        other_ips.dedup();
        other_ips.retain(|ip| !internal_ips.contains(ip));
        let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
        Ok(Self {
            name: NodeName::new(name),
            labels: object.metadata.labels.clone().unwrap_or_default(),
            internal_ips,
            other_ips,
            pod_cidrs,
            added: AddedRanges::of(object.metadata.annotations.as_ref()),
            created: object.metadata.creation_timestamp.as_ref().map_or(i64::MAX, |time| time.0.as_second()),
            ready,
            flannel: object.metadata.annotations.as_ref().and_then(Flannel::of),
        })
    }
}
