//! The node's own facts, its peers, and the revision under which verdicts are made.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};

use libbpf_rs::Object;
use towpath_model::desired::{NodePeer, Reach};

use super::config::{Changes, NodeConfig, Surroundings};
use super::error::Result;
use super::map::Map;
use super::mirror::Mirror;
use crate::abi::{
    self, Addr, Be16, CidrKey, TP_MODE_VXLAN, TP_NODE_BORROWED_TUNNEL, TP_NODE_DIRECT_RETURN, TP_NODE_ON_LINK,
    TP_NODE_PLAIN_ROUTING, TP_NODE_SILENT_LO4, TP_NODE_SILENT_LO6, TP_PEER_IPIP, TP_PEER_LINK, TP_PEER_LOCAL,
    TP_PEER_NODE, TP_PEER_PLAIN, TP_PEER_SILENT, TP_PEER_UDP,
};
use crate::udp_names;

/// `tp_node_config`, `tp_peers` and `tp_revision`.
#[derive(Debug)]
pub(crate) struct NodeMaps {
    config: Mirror<u32, abi::NodeConfig>,
    peers: Mirror<CidrKey, abi::Peer>,
    /// Nodes' IPv6 addresses by [`Addr::name`].
    names: Mirror<u64, Addr>,
    /// Other nodes' by what they go by on the device of the backend `udp`.
    udp_nodes: Mirror<u64, Addr>,
    revision: Map<u32, u32>,
    surroundings: Surroundings,
}

/// The first address of a family, or the zero address.
fn of_family(addresses: &[IpAddr], v4: bool) -> Addr {
    addresses.iter().find(|a| a.is_ipv4() == v4).map(|a| Addr::new(*a)).unwrap_or_default()
}

fn encode(node: &NodeConfig) -> abi::NodeConfig {
    abi::NodeConfig {
        node4: of_family(&node.addresses, true),
        node6: of_family(&node.addresses, false),
        dns4: of_family(&node.dns_addresses, true),
        dns6: of_family(&node.dns_addresses, false),
        netns_cookie: node.netns_cookie,
        uplink_ifindex: node.uplink_ifindex,
        tunnel_ifindex: node.tunnel_ifindex,
        tunnel_id: node.vni,
        mode: TP_MODE_VXLAN,
        tunnel_mtu: node.tunnel_mtu,
        tunnel_port: Be16::new(node.tunnel_port),
        nodeport_min: Be16::new(node.node_ports.0),
        nodeport_max: Be16::new(node.node_ports.1),
        tunnel_mac: node.tunnel_mac,
        flags: if node.plain_routing { TP_NODE_PLAIN_ROUTING } else { 0 }
            | if node.borrowed_tunnel { TP_NODE_BORROWED_TUNNEL } else { 0 }
            | if node.loopback_node_ports.0 { 0 } else { TP_NODE_SILENT_LO4 }
            | if node.loopback_node_ports.1 { 0 } else { TP_NODE_SILENT_LO6 }
            | if node.direct_return { TP_NODE_DIRECT_RETURN } else { 0 }
            | if node.on_link { TP_NODE_ON_LINK } else { 0 },
        tunnel6_ifindex: node.borrowed_tunnel6,
        udp_ifindex: node.udp.0,
        udp_port: Be16::new(node.udp.1),
        pad: [0; 2],
    }
}

/// Prefixes of all nodes. A node's own address wins over a range that is written the same.
fn prefixes(peers: &[NodePeer], surroundings: &Surroundings) -> HashMap<CidrKey, abi::Peer> {
    let mut wanted = HashMap::new();
    for peer in peers {
        let plain = match peer.reach {
            // Of this node it says how others reach its pods.
            _ if peer.local => 0,
            Reach::Route => TP_PEER_PLAIN,
            Reach::Link => TP_PEER_PLAIN | TP_PEER_LINK,
            Reach::Ipip => TP_PEER_IPIP,
            Reach::Tunnel | Reach::TunnelTo(_) | Reach::Udp => 0,
        };
        let mac = if let Reach::TunnelTo(mac) = peer.reach { mac } else { [0; 6] };
        let local = if peer.local { TP_PEER_LOCAL } else { 0 };
        let entry = abi::Peer { tunnel: Addr::new(peer.tunnel), flags: local, ifindex: 0, mac, pad: [0; 2] };
        let [plain_v4, plain_v6] =
            surroundings.plain.get(&peer.name).filter(|_| peer.plain).copied().unwrap_or_default();
        for net in &peer.pod_cidrs {
            let ifindex = if net.addr().is_ipv4() { plain_v4 } else { plain_v6 };
            wanted.entry(CidrKey::new(*net)).or_insert(abi::Peer { ifindex, flags: local | plain, ..entry });
        }
        // A node of ours answers pods in the tunnel, for an underlay may drop their addresses; Flannel's has none for that.
        let plain = if peer.flannel.is_some() { plain & TP_PEER_PLAIN } else { 0 };
        let udp = if peer.reach == Reach::Udp { TP_PEER_UDP } else { 0 };
        let of_node = |address: &IpAddr| {
            let silent = if surroundings.silent.contains(address) { TP_PEER_SILENT } else { 0 };
            abi::Peer { flags: local | plain | udp | TP_PEER_NODE | silent, ..entry }
        };
        for address in &peer.addresses {
            wanted.insert(CidrKey::host(*address), of_node(address));
        }
        // It may be one that the node's object does not list (Flannel's public-ip), and takes nothing from anybody.
        let tunnel = wanted.entry(CidrKey::host(peer.tunnel));
        tunnel.or_insert(of_node(&peer.tunnel));
    }
    for (address, ifindex) in &surroundings.elsewhere {
        let entry = abi::Peer { flags: TP_PEER_LOCAL, ifindex: *ifindex, ..abi::Peer::default() };
        wanted.entry(CidrKey::host(*address)).or_insert(entry);
    }
    wanted
}

impl NodeMaps {
    pub(crate) fn open(object: &Object) -> Result<Self> {
        Ok(Self {
            config: Mirror::open(object, "tp_node_config")?,
            peers: Mirror::open(object, "tp_peers")?,
            names: Mirror::open(object, "tp_node_names")?,
            udp_nodes: Mirror::open(object, "tp_udp_nodes")?,
            revision: Map::open(object, "tp_revision")?,
            surroundings: Surroundings::default(),
        })
    }

    pub(crate) fn apply_node(&mut self, node: &NodeConfig) -> Result<Changes> {
        let written = usize::from(self.config.put(0, encode(node))?);
        Ok(Changes { written, removed: 0 })
    }

    /// At which addresses NodePorts do not answer stays as it is.
    pub(crate) fn surround(&mut self, surroundings: Surroundings) {
        let silent = std::mem::take(&mut self.surroundings.silent);
        self.surroundings = Surroundings { silent, ..surroundings };
    }

    pub(crate) fn silence(&mut self, silent: BTreeSet<IpAddr>) {
        self.surroundings.silent = silent;
    }

    pub(crate) fn apply_peers(&mut self, peers: &[NodePeer]) -> Result<Changes> {
        let wanted = prefixes(peers, &self.surroundings);
        let mut changes = self.peers.put_all(wanted.iter().map(|(key, peer)| (*key, *peer)))?;
        changes += self.peers.retain(|key| wanted.contains_key(key))?;
        let nodes = peers.iter().flat_map(|peer| &peer.addresses).map(|address| Addr::new(*address));
        let names: HashMap<u64, Addr> = nodes.filter_map(|address| Some((address.name()?, address))).collect();
        self.names.retain(|name| names.contains_key(name))?;
        self.names.put_all(names)?;
        let address = |node: &Ipv6Addr| Addr::new(IpAddr::V6(*node));
        let named: HashMap<u64, Addr> =
            udp_names::others(peers).iter().map(|node| (address(node).udp_tag(), address(node))).collect();
        self.udp_nodes.retain(|tag| named.contains_key(tag))?;
        self.udp_nodes.put_all(named)?;
        Ok(changes)
    }

    /// Verdicts and routes made before this are looked at again at their flow's next packet.
    pub(crate) fn raise_revision(&self) -> Result<u32> {
        let now = self.revision.get(&0)?.unwrap_or_default();
        let next = now.wrapping_add(1).max(1);
        self.revision.put(&0, &next)?;
        Ok(next)
    }

    pub(crate) fn revision(&self) -> Result<u32> {
        Ok(self.revision.get(&0)?.unwrap_or_default())
    }

    pub(crate) fn config(&self) -> Option<&abi::NodeConfig> {
        self.config.held().get(&0)
    }

    pub(crate) fn peers(&self) -> &HashMap<CidrKey, abi::Peer> {
        self.peers.held()
    }

    pub(crate) fn usage(&self) -> [(&'static str, usize, u32); 1] {
        [self.peers.usage()]
    }
}
