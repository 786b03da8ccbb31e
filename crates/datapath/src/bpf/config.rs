//! What the loader and `apply_node` are told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

use towpath_model::NodeName;
use towpath_model::desired::PodSets;

/// Where the loader pins and how much the maps may hold.
#[derive(Clone, Debug)]
pub struct BpfConfig {
    /// A directory on a mounted bpffs that is this node's own (`/sys/fs/bpf` in a real cluster). Everything is pinned
    /// beneath `towpath-v<ABI version>` in it.
    pub pin_dir: PathBuf,
    /// Map limits.
    pub limits: Limits,
}

/// How many entries the maps may hold. Entries are not preallocated: until it is used, an entry of a hash map's limit costs 16
/// bytes (the defaults: about 25 MiB in all), one of a prefix tree's nothing.
///
/// A full table of connections takes 256 bytes an entry, and 192 for its translation: 112 MiB with the default, which is what a
/// hostile pod and its friends can make the kernel spend. It is as many as the kernel's own tracking has on a machine with
/// 8 CPUs under kube-proxy (32,768 each); half of it, divided by 128, leaves each pod 1,024 that no neighbour can take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tracked connections, and translations beside them. A quarter as many of clients outside with backends that are no pods may be
    /// tracked besides, at 320 bytes each.
    pub connections: u32,
    /// Frontends (Service addresses and NodePorts).
    pub services: u32,
    /// Slots of all backend lists, old and new.
    pub slots: u32,
    /// Backends.
    pub backends: u32,
    /// Pod addresses and ranges that policies can tell apart.
    pub classes: u32,
    /// (set, class) pairs.
    pub set_classes: u32,
    /// Rule rows.
    pub rules: u32,
    /// Prefixes of nodes (pod ranges and addresses).
    pub peers: u32,
    /// Addresses of pods of this node.
    pub pods: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256 * 1024,
            services: 64 * 1024,
            slots: 256 * 1024,
            backends: 128 * 1024,
            classes: 128 * 1024,
            set_classes: 256 * 1024,
            rules: 1024 * 1024,
            peers: 64 * 1024,
            pods: 4096,
        }
    }
}

/// A place in the kernel that runs one of our programs for each packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    /// Host side of a pod's veth, packets that the pod sends.
    FromPod,
    /// Host side of a pod's veth, packets that the kernel's stack sends to the pod.
    ToPod,
    /// The collect-metadata tunnel device, packets of other nodes.
    FromTunnel,
    /// The uplink, packets from outside.
    FromUplink,
    /// The same devices, what the node sends there.
    ToUplink,
    /// The same devices, before the kernel has made a buffer of a packet (XDP).
    FromWire,
}

impl Hook {
    /// All of them.
    pub const ALL: [Hook; 6] =
        [Hook::FromPod, Hook::ToPod, Hook::FromTunnel, Hook::FromUplink, Hook::ToUplink, Hook::FromWire];

    /// Name of the program.
    pub fn program(self) -> &'static str {
        match self {
            Hook::FromPod => "tp_from_pod",
            Hook::ToPod => "tp_to_pod",
            Hook::FromTunnel => "tp_from_tunnel",
            Hook::FromUplink => "tp_from_uplink",
            Hook::ToUplink => "tp_to_uplink",
            Hook::FromWire => "tp_from_wire",
        }
    }
}

/// Facts about this node that the programs need (`tp_node_config`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeConfig {
    /// This node's addresses, at most one a family.
    pub addresses: Vec<IpAddr>,
    /// Node-local addresses that DNS listens on, at most one a family.
    pub dns_addresses: Vec<IpAddr>,
    /// Cookie of the node's own network namespace (`SO_NETNS_COOKIE`).
    pub netns_cookie: u64,
    /// The device that leads to the other nodes.
    pub uplink_ifindex: u32,
    /// The collect-metadata tunnel device.
    pub tunnel_ifindex: u32,
    /// The tunnel device's own MAC: 02:74 and the fold of the tunnel address, see `bpf/abi.h`.
    pub tunnel_mac: [u8; 6],
    /// MTU of the tunnel device in bytes: what does not fit takes the kernel's path. 0: not checked.
    pub tunnel_mtu: u32,
    /// VXLAN network identifier.
    pub vni: u32,
    /// Outer UDP destination port.
    pub tunnel_port: u16,
    /// Lowest and highest NodePort.
    pub node_ports: (u16, u16),
    /// Whether NodePorts answer at `127.0.0.1` and at `::1`, for the node's own sockets.
    pub loopback_node_ports: (bool, bool),
    /// The node has no routing rules but the kernel's and ours, so its main table alone says where packets go.
    pub plain_routing: bool,
    /// The tunnel device is another network's, without metadata: what it is given finds its node by that device's own tables.
    pub borrowed_tunnel: bool,
    /// An endpoint's node answers clients outside itself, with the Service's address as source.
    pub direct_return: bool,
    /// The other network's tunnel device over IPv6; 0: none.
    pub borrowed_tunnel6: u32,
    /// The device of the backend `udp` and the port where its datagrams come in; 0: none.
    pub udp: (u32, u16),
    /// Pods are on the uplink's link with MAC addresses of their own (`macvlan`).
    pub on_link: bool,
}

/// What packets of pods come by besides our own devices, where another network was here before or still is on other nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Devices by which packets of a node's pods may come without an envelope, IPv4 and IPv6; 0: none.
    pub plain: BTreeMap<NodeName, [u32; 2]>,
    /// Addresses in this node's ranges that are no pods of ours, with the device that each is reached by.
    pub elsewhere: Vec<(IpAddr, u32)>,
    /// Addresses of nodes at which NodePorts do not answer.
    pub silent: BTreeSet<IpAddr>,
}

/// What is known about the policies of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// Its policy sets.
    Sets(PodSets),
    /// Its labels are not known yet: everything is denied but its own node.
    HostOnly,
}

/// How many entries an `apply_*` wrote and removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Entries written.
    pub written: usize,
    /// Entries removed.
    pub removed: usize,
}

impl std::ops::AddAssign for Changes {
    fn add_assign(&mut self, other: Self) {
        self.written += other.written;
        self.removed += other.removed;
    }
}
