//! The node's own facts, its peers, and the revision under which verdicts are made.

use std::collections::HashMap;
use std::net::IpAddr;

use libbpf_rs::Object;
use towpath_model::desired::NodePeer;

use super::config::{Changes, NodeConfig};
use super::error::Result;
use super::map::Map;
use super::mirror::Mirror;
use crate::abi::{self, Addr, Be16, CidrKey, TP_MODE_VXLAN, TP_NODE_PLAIN_ROUTING, TP_PEER_LOCAL, TP_PEER_NODE};

/// `tp_node_config`, `tp_peers` and `tp_revision`.
#[derive(Debug)]
pub(crate) struct NodeMaps {
    config: Mirror<u32, abi::NodeConfig>,
    peers: Mirror<CidrKey, abi::Peer>,
    revision: Map<u32, u32>,
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
        flags: if node.plain_routing { TP_NODE_PLAIN_ROUTING } else { 0 },
        pad: 0,
    }
}

/// Prefixes of all nodes. A node's own address wins over a range that is written the same.
fn prefixes(peers: &[NodePeer]) -> HashMap<CidrKey, abi::Peer> {
    let mut wanted = HashMap::new();
    for peer in peers {
        let tunnel = Addr::new(peer.tunnel);
        let local = if peer.local { TP_PEER_LOCAL } else { 0 };
        for net in &peer.pod_cidrs {
            wanted.entry(CidrKey::new(*net)).or_insert(abi::Peer { tunnel, flags: local, pad: 0 });
        }
        for address in &peer.addresses {
            wanted.insert(CidrKey::host(*address), abi::Peer { tunnel, flags: local | TP_PEER_NODE, pad: 0 });
        }
    }
    wanted
}

impl NodeMaps {
    pub(crate) fn open(object: &Object) -> Result<Self> {
        Ok(Self {
            config: Mirror::open(object, "tp_node_config")?,
            peers: Mirror::open(object, "tp_peers")?,
            revision: Map::open(object, "tp_revision")?,
        })
    }

    pub(crate) fn apply_node(&mut self, node: &NodeConfig) -> Result<Changes> {
        let written = usize::from(self.config.put(0, encode(node))?);
        Ok(Changes { written, removed: 0 })
    }

    pub(crate) fn apply_peers(&mut self, peers: &[NodePeer]) -> Result<Changes> {
        let wanted = prefixes(peers);
        let mut changes = self.peers.put_all(wanted.iter().map(|(key, peer)| (*key, *peer)))?;
        changes += self.peers.retain(|key| wanted.contains_key(key))?;
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
