//! What the kernel of one node should hold. Planners make it, `datapath` applies it by difference.
//!
//! Nothing here knows of maps or netlink; the names are those of the ABI header where both speak of the same thing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{Family, NamespacedName, NodeName, NodePortAddresses, Protocol, Tier};

/// Facts about this node that rarely change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSettings {
    /// This node.
    pub name: NodeName,
    /// Its addresses, at most one a family.
    pub addresses: Vec<IpAddr>,
    /// Its pod ranges, disjoint.
    pub pod_cidrs: Vec<IpNet>,
    /// All pod ranges of the cluster: never masqueraded.
    pub cluster_cidrs: Vec<IpNet>,
    /// Ranges of Service addresses: what no Service has there is rejected on the node.
    pub service_cidrs: Vec<IpNet>,
    /// Families of which what pods send out of the cluster leaves with this node's address.
    pub masqueraded: Vec<Family>,
    /// More destinations that are not masqueraded.
    pub non_masquerade_cidrs: Vec<IpNet>,
    /// Node-local addresses that DNS listens on, at most one a family.
    pub dns_addresses: Vec<IpAddr>,
    /// Lowest and highest NodePort.
    pub node_ports: (u16, u16),
    /// Where they answer.
    pub node_port_addresses: NodePortAddresses,
    /// Envelopes between nodes.
    pub vxlan: Vxlan,
    /// Port of the backend `udp`.
    pub udp_port: u16,
    /// MTU of pod devices in bytes; none: what the ways to other nodes carry.
    pub pod_mtu: Option<u32>,
    /// The node of a Service's endpoint answers clients outside the cluster itself, whichever node they came in at.
    pub direct_server_return: bool,
}

/// Envelopes between nodes: VXLAN (RFC 7348).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vxlan {
    /// Network identifier, 24 bits.
    pub vni: u32,
    /// Outer UDP destination port.
    pub port: u16,
}

/// A node as its peers need it (this one included): where its pods and its own addresses are reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePeer {
    /// Its name.
    pub name: NodeName,
    /// Its own addresses.
    pub addresses: Vec<IpAddr>,
    /// Its pod ranges.
    pub pod_cidrs: Vec<IpNet>,
    /// Outer address of its tunnel.
    pub tunnel: IpAddr,
    /// Whether it is this node.
    pub local: bool,
    /// How its pods are reached.
    pub reach: Reach,
    /// Its pods' packets may also come as they are, without an envelope.
    pub plain: bool,
    /// What Flannel has to do with it; none: nothing.
    pub flannel: Option<FlannelPeer>,
}

/// A node that Flannel connects, or connected before this network did: others that still run Flannel count on what it left.
/// Its pods' packets may always come as they are (Flannel's `host-gw`, or `vxlan` with DirectRouting).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlannelPeer {
    /// Whether this network has taken the node over.
    pub taken_over: bool,
}

/// How a node's pods are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// In an envelope, as any node of this network.
    Tunnel,
    /// In an envelope whose inner destination is this MAC address: Flannel's device there takes no other.
    TunnelTo([u8; 6]),
    /// In an IP header alone; what needs more, as with [`Reach::Tunnel`].
    Ipip,
    /// In UDP datagrams that user space makes, with all that would go in an envelope.
    Udp,
    /// By a route over the node's own address. A node of this network that is beyond a router is reached by [`Reach::Tunnel`] instead.
    Route,
    /// As with [`Reach::Route`], but at the pods' own MAC addresses. Of this node itself: its pods are reached so, by whoever is on the link.
    Link,
}

impl Reach {
    /// Whether packets go as they are.
    pub fn is_plain(self) -> bool {
        matches!(self, Self::Route | Self::Link)
    }
}

/// A pod of this node that has a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalPod {
    /// Namespace and name.
    pub name: NamespacedName,
    /// CNI container id: the sandbox.
    pub container_id: String,
    /// Its addresses, at most one a family.
    pub addresses: Vec<IpAddr>,
    /// Name of the host side of its veth.
    pub host_device: String,
    /// Index of the host side in the node's network namespace.
    pub ifindex: u32,
    /// The pod's own MAC.
    pub mac: [u8; 6],
    /// The host side's MAC.
    pub host_mac: [u8; 6],
    /// Cookie of its network namespace.
    pub netns_cookie: u64,
    /// Stable while the pod lives, never 0.
    pub pod_id: u32,
}

/// Where what a pod sends to Services is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum TranslatedAt {
    /// In its sockets, when they connect or send; at its device what did not come from one that the hooks see.
    #[default]
    Sockets,
    /// At its device, all of it.
    Device,
}

// ---- services ------------------------------------------------------------------------------------------------------

/// Stable id of a Service port (one frontend set). Never 0, not reused while anything refers to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServiceId(pub u32);

/// Stable id of a backend (address, port, protocol). Never 0, not reused while anything refers to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BackendId(pub u32);

/// What a client connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frontend {
    /// The address; none: any node address (NodePort), in the family of [`Frontend::family`].
    pub address: Option<IpAddr>,
    /// Family it serves; with an address, the address's.
    pub family: Family,
    /// Port.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

/// Whose connections a frontend is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Clients {
    /// Everybody who reaches this node: its pods, its own processes, the outside.
    #[default]
    All,
    /// Pods of this node. Another proxy serves the node's own processes and the outside; it cannot serve pods, whose answers do
    /// not pass the kernel's stack.
    Pods,
}

/// How one of a Service's backends is chosen for a new connection (annotation [`crate::ALGORITHM_ANNOTATION`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// Any of them.
    #[default]
    Random,
    /// One after the other, on each node.
    RoundRobin,
    /// The one to which the fewest connections are open that were opened by way of this node.
    LeastConnections,
    /// The same one for the same client address, on every node, as long as it is there.
    SourceHash,
    /// The same one for the same addresses, ports and protocol, on every node, as long as it is there.
    Maglev,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Random, Self::RoundRobin, Self::LeastConnections, Self::SourceHash, Self::Maglev];

    /// As the annotation names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::LeastConnections => "least-connections",
            Self::SourceHash => "source-hash",
            Self::Maglev => "maglev",
        }
    }

    /// By its name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }

    /// Whether a client's packets say which backend it is, by a look-up table that every node has.
    pub fn hashes(self) -> bool {
        matches!(self, Self::SourceHash | Self::Maglev)
    }
}

/// Where a frontend leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontendTarget {
    /// The Service port's id.
    pub id: ServiceId,
    /// Backends that take new connections, sorted. Empty: refuse at once.
    pub backends: Vec<BackendId>,
    /// How one of them is chosen.
    pub algorithm: Algorithm,
    /// With an algorithm that hashes: the look-up table, in which each of `backends` is about as often; else empty.
    pub table: Arc<[BackendId]>,
    /// ClientIP affinity in seconds.
    pub affinity_seconds: Option<u32>,
    /// Who may use it.
    pub clients: Clients,
    /// Clients' addresses that it is for; none: all.
    pub sources: Option<Arc<[IpNet]>>,
    /// Who it is, for people.
    pub service: NamespacedName,
    /// Name of the Service port, for people.
    pub port_name: String,
}

impl FrontendTarget {
    /// What new connections are spread over.
    pub fn slots(&self) -> &[BackendId] {
        if self.table.is_empty() { &self.backends } else { &self.table }
    }
}

/// One backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendAddress {
    /// Address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

/// All Services of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceTable {
    /// Frontends.
    pub frontends: BTreeMap<Frontend, Arc<FrontendTarget>>,
    /// What leads clients from outside to this node's endpoints only, as this node's own clients have it: NodePorts (at its
    /// addresses), load balancers' addresses and external ones.
    pub inside: BTreeMap<Frontend, Arc<FrontendTarget>>,
    /// UDP backends that take no new flows of a frontend and keep those they have: they still serve.
    pub lingering: BTreeMap<Frontend, BTreeSet<BackendId>>,
    /// Backends that a frontend refers to, and those that only drain (open connections may still refer to them).
    pub backends: BTreeMap<BackendId, BackendAddress>,
}

/// What became different in a [`ServiceTable`] since it was last asked for; none: it is gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceChanges {
    /// See [`ServiceTable::frontends`].
    pub frontends: BTreeMap<Frontend, Option<Arc<FrontendTarget>>>,
    /// See [`ServiceTable::inside`].
    pub inside: BTreeMap<Frontend, Option<Arc<FrontendTarget>>>,
    /// See [`ServiceTable::lingering`].
    pub lingering: BTreeMap<Frontend, Option<BTreeSet<BackendId>>>,
    /// See [`ServiceTable::backends`].
    pub backends: BTreeMap<BackendId, Option<BackendAddress>>,
}

impl ServiceChanges {
    /// Whether nothing did.
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.inside.is_empty() && self.lingering.is_empty() && self.backends.is_empty()
    }
}

// ---- policy --------------------------------------------------------------------------------------------------------

/// Class of a peer, as coarse as the policies in force on this node allow. 0: nothing tells it from a stranger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ClassId(pub u32);

/// A policy set: the compiled rules of one direction that one or more pods share. 0: no policy selects the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct SetId(pub u32);

/// Class as one set sees it. 0: everybody the set does not mention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct LocalClass(pub u32);

/// Names the rule that decided, see [`RuleInfo`]. 0 and values from `0xffff_fff0` up are reserved by the ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct RuleId(pub u32);

impl RuleId {
    /// No NetworkPolicy isolates the pod in this direction, and no rule of a ClusterNetworkPolicy decides.
    pub const NOT_ISOLATED: RuleId = RuleId(0);
    /// Isolated, and no rule matched.
    pub const DEFAULT_DENY: RuleId = RuleId(0xffff_ffff);
    /// Generated by the pod's own node.
    pub const OWN_NODE: RuleId = RuleId(0xffff_fffe);
    /// The pod's labels are not known yet.
    pub const HOST_ONLY: RuleId = RuleId(0xffff_fffd);
    /// A pod always reaches itself.
    pub const SELF: RuleId = RuleId(0xffff_fffc);
}

/// A verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Let it pass.
    Allow,
    /// Drop it.
    Deny,
}

/// The protocol part of a rule row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RowProtocol {
    /// A protocol with ports.
    Ports(Protocol),
    /// Every other protocol (ICMP and the rest); its rows have no port.
    Other,
}

/// Key of a rule row. Rows of one set, local class and protocol do not overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowKey {
    /// The set.
    pub set: SetId,
    /// The peer, as the set sees it.
    pub class: LocalClass,
    /// Protocol.
    pub protocol: RowProtocol,
    /// Port bits; 0 for [`RowProtocol::Other`].
    pub port: u16,
    /// How many leading bits of `port` count, 0–16.
    pub port_bits: u8,
}

/// Value of a rule row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    /// The verdict.
    pub verdict: Verdict,
    /// Who says so.
    pub rule: RuleId,
}

/// Which policy sets a pod has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct PodSets {
    /// Ingress set.
    pub ingress: SetId,
    /// Egress set.
    pub egress: SetId,
    /// Ingress set if the policies that are only audited were enforced; 0: none of them would change who judges.
    pub audit_ingress: SetId,
    /// The same of egress.
    pub audit_egress: SetId,
}

impl PodSets {
    /// These, and nothing is audited.
    pub const fn enforced(ingress: SetId, egress: SetId) -> Self {
        Self { ingress, egress, audit_ingress: SetId(0), audit_egress: SetId(0) }
    }

    /// All of them.
    pub fn all(&self) -> [SetId; 4] {
        [self.ingress, self.egress, self.audit_ingress, self.audit_egress]
    }

    /// Whether one of them judges.
    pub fn isolates(&self) -> bool {
        self.ingress != SetId(0) || self.egress != SetId(0)
    }

    /// The one that judges in a direction, and the one that would.
    pub fn of(&self, direction: crate::Direction) -> (SetId, SetId) {
        match direction {
            crate::Direction::Ingress => (self.ingress, self.audit_ingress),
            crate::Direction::Egress => (self.egress, self.audit_egress),
        }
    }
}

/// The compiled policy of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyImage {
    /// Class of each pod address (of the whole cluster) that some policy in force here can tell apart.
    pub pod_classes: BTreeMap<IpAddr, ClassId>,
    /// Class of other addresses, longest prefix first wins.
    pub cidr_classes: BTreeMap<IpNet, ClassId>,
    /// Class as a set sees it; absent: local class 0.
    pub set_classes: BTreeMap<(SetId, ClassId), LocalClass>,
    /// Rules.
    pub rows: BTreeMap<RowKey, Row>,
    /// Sets of the pods of this node, by address. A local pod that is absent is not known yet: denied all but its node.
    pub pods: BTreeMap<IpAddr, PodSets>,
    /// What a rule id stands for.
    pub rules: BTreeMap<RuleId, RuleInfo>,
    /// NetworkPolicies that isolate the pods of a set: what a default deny resolves to. Every set is here; one of ClusterNetworkPolicies
    /// only has none.
    pub isolating: BTreeMap<SetId, BTreeSet<NamespacedName>>,
    /// Sets that are only audited, with the policies that are not enforced in them.
    pub audited: BTreeMap<SetId, BTreeSet<PolicyRef>>,
}

/// What became different from one [`PolicyImage`] to the next; none: it is gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyChanges {
    /// See [`PolicyImage::pod_classes`].
    pub pod_classes: BTreeMap<IpAddr, Option<ClassId>>,
    /// See [`PolicyImage::cidr_classes`].
    pub cidr_classes: BTreeMap<IpNet, Option<ClassId>>,
    /// See [`PolicyImage::set_classes`].
    pub set_classes: BTreeMap<(SetId, ClassId), Option<LocalClass>>,
    /// See [`PolicyImage::rows`].
    pub rows: BTreeMap<RowKey, Option<Row>>,
    /// See [`PolicyImage::rules`].
    pub rules: BTreeMap<RuleId, Option<RuleInfo>>,
    /// See [`PolicyImage::isolating`].
    pub isolating: BTreeMap<SetId, Option<BTreeSet<NamespacedName>>>,
    /// [`PolicyImage::audited`], all of it: they are few.
    pub audited: BTreeMap<SetId, BTreeSet<PolicyRef>>,
    /// [`PolicyImage::pods`], all of them: they are few.
    pub pods: BTreeMap<IpAddr, PodSets>,
}

impl PolicyChanges {
    /// Entries of the kernel's maps that are written or removed, but for those of the node's own pods.
    pub fn len(&self) -> usize {
        self.pod_classes.len() + self.cidr_classes.len() + self.set_classes.len() + self.rows.len()
    }

    /// Whether no such entry is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Which policy a rule is of.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PolicyRef {
    /// A ClusterNetworkPolicy.
    Cluster {
        /// Its tier.
        tier: Tier,
        /// Its name.
        name: String,
    },
    /// A NetworkPolicy.
    Namespaced(NamespacedName),
}

impl std::fmt::Display for PolicyRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PolicyRef::Cluster { tier: Tier::Admin, name } => write!(f, "ClusterNetworkPolicy admin/{name}"),
            PolicyRef::Cluster { tier: Tier::Baseline, name } => write!(f, "ClusterNetworkPolicy baseline/{name}"),
            PolicyRef::Namespaced(name) => write!(f, "NetworkPolicy {name}"),
        }
    }
}

/// What a rule id stands for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RuleInfo {
    /// The policy.
    pub policy: PolicyRef,
    /// The direction.
    pub direction: crate::Direction,
    /// Index into `spec.ingress` or `spec.egress`.
    pub rule: u32,
    /// The name that a ClusterNetworkPolicy gives it; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Index into the rule's `from` or `to`; none: the rule has no peers, so everyone matches.
    pub peer: Option<u32>,
    /// Index into the rule's `ports` (a ClusterNetworkPolicy's `protocols`); none: the rule has none, so all match.
    pub port: Option<u32>,
}

impl std::fmt::Display for RuleInfo {
    /// The field path, as `kubectl explain` and the API server's errors write it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (direction, peers) = match self.direction {
            crate::Direction::Ingress => ("ingress", "from"),
            crate::Direction::Egress => ("egress", "to"),
        };
        let ports = match self.policy {
            PolicyRef::Cluster { .. } => "protocols",
            PolicyRef::Namespaced(_) => "ports",
        };
        write!(f, "{}: spec.{direction}[{}]", self.policy, self.rule)?;
        if !self.name.is_empty() {
            write!(f, " {:?}", self.name)?;
        }
        if let Some(peer) = self.peer {
            write!(f, " {peers}[{peer}]")?;
        }
        self.port.map_or(Ok(()), |port| write!(f, " {ports}[{port}]"))
    }
}
