//! What the agent answers on its status socket to `towpath status`: one JSON document.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::ipam::RangeUse;

/// State of one agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentStatus {
    /// The node.
    pub node: String,
    /// Version of the binary.
    pub version: String,
    /// Whether the first full sync is in the kernel.
    pub ready: bool,
    /// What is wrong, for people; empty when all is well.
    pub problems: Vec<String>,
    /// The backend that is wanted between nodes, for example `vxlan`.
    pub backend: String,
    /// Who serves Services to the node's own processes and the outside: `towpath`, `kube-proxy` or `others`; empty: not decided.
    #[serde(default)]
    pub service_proxy: String,
    /// Who answers cluster DNS: `towpath`, `coredns`, `stand-in` (towpath while no CoreDNS is ready) or `others`; empty: not decided.
    #[serde(default)]
    pub dns: String,
    /// Who is in charge of what, and how to hand over, for people.
    #[serde(default)]
    pub hints: Vec<String>,
    /// MTU of pod devices in bytes.
    pub pod_mtu: u32,
    /// Nodes this one can reach, with their tunnel addresses.
    pub peers: Vec<PeerStatus>,
    /// Pods with a device on this node.
    pub pods: u32,
    /// The node's pod ranges, and how full they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pod_ranges: Vec<RangeUse>,
    /// Paths to other nodes that carry less than they have to; those of nodes that answer no echo are not known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub small_paths: Vec<PathStatus>,
    /// Ranges of Service addresses: what no Service has there is refused on the node.
    #[serde(default)]
    pub service_ranges: Vec<String>,
    /// Addresses of load balancers that this node announces to the network outside.
    #[serde(default)]
    pub announced: Vec<IpAddr>,
    /// Frontends in the kernel.
    pub frontends: u32,
    /// Host ports that this node's pods have.
    #[serde(default)]
    pub host_ports: u32,
    /// Pods of this node, as `namespace/name`, whose sockets are left alone because they or their namespaces ask for it
    /// (`towpath.dev/socket-services: disabled`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub translated_at_device: Vec<String>,
    /// Pods of this node that may not receive or send as much as they could, as `namespace/name (receives 10M, sends 5M)`, in bits a
    /// second (`kubernetes.io/ingress-bandwidth`, `kubernetes.io/egress-bandwidth`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limited: Vec<String>,
    /// Backends in the kernel.
    pub backends: u32,
    /// Policies in force on this node.
    pub policies: u32,
    /// Policy sets: rules that pods of this node share.
    #[serde(default)]
    pub policy_sets: u32,
    /// Policies that are only audited (`towpath.dev/audit`) and concern pods of this node, with what they would have denied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub audited: Vec<AuditedPolicy>,
    /// Address classes in the kernel.
    pub classes: u32,
    /// Classes as sets see them.
    #[serde(default)]
    pub class_entries: u32,
    /// Rule rows in the kernel.
    pub rules: u32,
    /// Tracked connections.
    pub connections: u32,
    /// Packets by reason, `drop.*` for drops.
    pub counters: BTreeMap<String, u64>,
    /// Pods of this node that the network before still connects, as `namespace/name`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pods_of_predecessor: Vec<String>,
    /// Those pods by address.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub addresses_of_predecessor: BTreeMap<IpAddr, String>,
    /// Flannel keeps a subnet for this node in the API.
    #[serde(default)]
    pub flannel_here: bool,
}

/// One peer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    /// The node's name.
    pub node: String,
    /// Outer address of its tunnel.
    pub tunnel: Option<IpAddr>,
    /// Its pod ranges.
    pub pod_cidrs: Vec<String>,
    /// Backend by which packets go to its pods.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub backend: String,
    /// Why that is not the backend that is wanted: `NotReady`, `Silent`, `Kernel`, `BeyondRouter`, `SameName` or `Uplink`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The network that connects its pods, if it is not this one (`flannel`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
}

/// A path to another node that carries less than it has to. Sizes are of IP packets, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PathStatus {
    /// The node's name.
    pub node: String,
    /// Its address that was tried.
    pub address: Option<IpAddr>,
    /// The largest that gets through.
    pub carries: u32,
    /// What has to.
    pub needed: u32,
}

/// A policy that is judged and reported, and not enforced.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditedPolicy {
    /// Kind and name: `NetworkPolicy shop/deny`, `ClusterNetworkPolicy admin/guard`.
    pub policy: String,
    /// Since when this node counts: it was not audited before, or said something else (RFC 3339, UTC).
    pub since: String,
    /// Connections that passed and would have been denied: new ones, and those that were open when the policy or what it selects changed.
    pub connections: u64,
    /// The same by rule.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub denials: Vec<AuditedDenial>,
}

/// What one rule of an audited policy would have denied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditedDenial {
    /// `Ingress` or `Egress` of the pod that the policy selects.
    pub direction: String,
    /// The rule in words: `spec.egress[0]`, or that none allows it.
    pub rule: String,
    /// Connections.
    pub connections: u64,
    /// When there was one last (RFC 3339, UTC).
    pub last: String,
}
