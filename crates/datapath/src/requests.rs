//! What the facade takes and gives.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use towpath_model::custom::Acceleration;
use towpath_model::desired::{LocalPod, NodeSettings, PodSets, Reach, TranslatedAt};
use towpath_model::{Bandwidth, NamespacedName, NodeName};

use crate::bpf;
use crate::net;

/// How to open the data path of a node.
#[derive(Clone, Debug)]
pub struct DatapathConfig {
    /// Facts about the node.
    pub settings: NodeSettings,
    /// A directory on a mounted bpffs under which programs and maps are pinned.
    pub bpffs: PathBuf,
    /// cgroup v2 directory that holds the node's processes and pods; none: the root of the cgroup2 mount.
    pub cgroup: Option<PathBuf>,
    /// Directory for the records of attached pods; made if it is not there. It must outlive the agent, not a reboot.
    pub state_dir: PathBuf,
    /// Pods that were given a device, by who keeps that elsewhere: for those whose record is lost or cannot be read.
    pub remembered: Vec<RememberedPod>,
    /// Uplink device; none: the one that holds the node's address.
    pub uplink: Option<String>,
    /// Further devices that lead out of the node, by name or by the beginning of names (`eth*`); none: those of default routes, and network
    /// cards, bonds and VLANs with an address.
    pub devices: Vec<String>,
    /// Which of them forward packets of Services in their drivers.
    pub acceleration: Acceleration,
    /// Limits of the maps.
    pub limits: bpf::Limits,
}

/// A pod that was given a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RememberedPod {
    /// The pod, as [`crate::Datapath::attach_pod`] answered.
    pub pod: LocalPod,
    /// Name of the device in the pod.
    pub ifname: String,
}

/// A pod to give a device.
#[derive(Debug)]
pub struct AttachRequest {
    /// The pod's network namespace.
    pub netns: OwnedFd,
    /// Name of the device in the pod, `eth0`.
    pub ifname: String,
    /// CNI container id: the sandbox.
    pub container_id: String,
    /// Whose it is.
    pub pod: NamespacedName,
    /// Its addresses, at most one a family, each in one of the node's pod ranges.
    pub addresses: Vec<IpAddr>,
    /// MAC address of its device; none: as it follows from the first address.
    pub mac: Option<[u8; 6]>,
    /// MTU of its device in bytes; none: the node's default for pods.
    pub mtu: Option<u32>,
    /// Its policy sets, whose rows were applied before; none: its labels are not known, deny all but its node until a later
    /// `apply_policy` names it.
    pub sets: Option<PodSets>,
    /// Where what it sends to Services is translated, from its first packet on.
    pub translated_at: TranslatedAt,
    /// How much it may receive and send.
    pub bandwidth: Bandwidth,
    /// The same by what the runtime says, where the pod itself asks for nothing.
    pub runtime_bandwidth: Bandwidth,
}

/// What pods' devices are to have, in bytes; new ones get the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodMtu {
    /// Those that have more get this; others stay as they are.
    AtMost(u32),
    /// All of them get this.
    Exactly(u32),
}

/// What there is of pods' devices, by each of those who should agree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSurvey {
    /// Devices of the node that are named as the host sides of pods', with their indexes; not those that are being taken away.
    pub devices: BTreeMap<String, u32>,
    /// What was written down when devices were made: pods, with the names of their devices inside.
    pub records: Vec<(LocalPod, String)>,
    /// Pods that the programs know: each address with the index of a device.
    pub entries: BTreeMap<IpAddr, u32>,
    /// MTU that pods get in bytes.
    pub pod_mtu: u32,
}

/// A pod to compare with what was set up for it (CNI CHECK).
#[derive(Debug)]
pub struct CheckRequest {
    /// The pod's network namespace.
    pub netns: OwnedFd,
    /// CNI container id.
    pub container_id: String,
    /// Name of the device in the pod.
    pub ifname: String,
}

/// What opening found out or made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFacts {
    /// Name of the uplink.
    pub uplink: String,
    /// Its index.
    pub uplink_ifindex: u32,
    /// Its MTU in bytes.
    pub uplink_mtu: u32,
    /// All devices that lead out of the node, the uplink among them, by index.
    pub outside: Vec<(u32, String)>,
    /// Addresses of this node on them that the API does not name: NodePorts answer there, too.
    pub more_addresses: Vec<IpAddr>,
    /// Index of the tunnel device.
    pub tunnel_ifindex: u32,
    /// Index of the device of the backend `udp`; 0: there is none.
    pub udp_ifindex: u32,
    /// This node's tunnel address.
    pub tunnel_address: IpAddr,
    /// MAC of the tunnel device.
    pub tunnel_mac: [u8; 6],
    /// MTU of the tunnel device in bytes.
    pub tunnel_mtu: u32,
    /// MTU that new pods get in bytes.
    pub pod_mtu: u32,
    /// Gateway addresses of the node's pod ranges.
    pub gateways: Vec<IpAddr>,
    /// Cookie of the node's network namespace.
    pub netns_cookie: u64,
    /// Whether this kernel's programs can take packets of both families out of an IP header (Linux 6.3).
    pub takes_ipip: bool,
    /// Whether the uplink sends and takes frames with other MAC addresses than its own, as far as that can be known.
    pub bears_macs: bool,
}

/// The data path as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeStatus {
    /// Facts of the node.
    pub facts: NodeFacts,
    /// Pods that have a device.
    pub pods: usize,
    /// Those of them that may not receive or send as much as they could.
    pub limited: Vec<(NamespacedName, Bandwidth)>,
    /// Other nodes that were handed over.
    pub peers: usize,
    /// How the pods of each of them are reached.
    pub reached: BTreeMap<NodeName, Reach>,
    /// Those of them that were to be sent packets as they are, and have a router in between.
    pub beyond: BTreeSet<NodeName>,
    /// Pods are on the uplink's link; before the first `apply_peers`, as an earlier run left it.
    pub on_link: bool,
    /// What the last `apply_peers` or `audit` could not do, in words; tried again at the next.
    pub problems: Vec<String>,
    /// Devices whose drivers forward packets of Services.
    pub accelerated: Vec<String>,
    /// What is to be said of it: of devices that were to and cannot, and of what they depend on.
    pub acceleration_notes: Vec<String>,
    /// What was let go of when UDP backends went.
    pub released: Released,
}

/// UDP flows that were held to a backend which their Service no longer has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Connected sockets that were ended since the start: their owners connect again.
    pub sockets: u64,
    /// Translations that were deleted since the start: the next datagram is translated anew.
    pub translations: u64,
    /// What could not be let go of when this was last tried.
    pub problem: Option<String>,
    /// What this kernel cannot do of it, and what that means; empty: nothing is missing.
    pub lost: Vec<String>,
}

/// How many open connections through a Service address a backend has, by what this node's tables hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceFlow {
    /// IP protocol number.
    pub protocol: u8,
    /// What clients connect to.
    pub service: (IpAddr, u16),
    /// Where they get.
    pub backend: (IpAddr, u16),
}

/// All of them, and what is not counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceFlows {
    /// Connections by Service address and backend.
    pub flows: BTreeMap<ServiceFlow, u64>,
    /// Why sockets that were translated when they connected are not among them, if they are not.
    pub without_sockets: Option<String>,
}

/// The ends between which user space carries packets (`udp`).
#[derive(Debug)]
pub struct UdpEnds {
    /// Queues of the device.
    pub queues: net::tap::Queues,
    /// Sockets on which datagrams of other nodes come in.
    pub receivers: Vec<OwnedFd>,
    /// Sockets by which datagrams go to other nodes.
    pub senders: Vec<OwnedFd>,
}

/// What an apply or a check changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Changes, in words; empty when everything was as it should be.
    pub changes: Vec<String>,
    /// What could not be done, in words; everything else was. Tried again at the next apply or audit.
    pub problems: Vec<String>,
}

impl Applied {
    /// Notes the outcome of one step.
    pub(crate) fn note<E: std::fmt::Display>(&mut self, outcome: Result<Vec<String>, E>) {
        match outcome {
            Ok(changes) => self.changes.extend(changes),
            Err(error) => self.problems.push(error.to_string()),
        }
    }
}
