//! The nodes at IPv6 addresses: a frame has no room for theirs, so the agent says who they are.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, PoisonError, RwLock};

use towpath_datapath::udp_names;

/// Those that are known now; shared by all who carry.
#[derive(Clone, Debug, Default)]
pub(crate) struct Nodes(Arc<RwLock<Arc<Known>>>);

/// Those that were known at a time.
#[derive(Debug, Default)]
pub(crate) struct Known(BTreeMap<[u8; 6], Ipv6Addr>);

impl Nodes {
    /// These, and no others.
    pub(crate) fn replace(&self, nodes: impl IntoIterator<Item = Ipv6Addr>) {
        let known = Arc::new(Known(udp_names::named(nodes)));
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = known;
    }

    pub(crate) fn known(&self) -> Arc<Known> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Known {
    /// Where the node is that goes by this; one at an IPv4 address says so itself.
    pub(super) fn at(&self, mac: [u8; 6]) -> Option<IpAddr> {
        let v4 = udp_names::ipv4_of(mac).map(IpAddr::V4);
        v4.or_else(|| self.0.get(&mac).copied().map(IpAddr::V6))
    }

    /// Whether what is sent from this address may be a node's. Who is none is not let through by the kernel's programs, here or before; but one node may
    /// not go by what another does.
    pub(super) fn may_be_from(&self, from: IpAddr) -> bool {
        match from {
            IpAddr::V4(_) => true,
            IpAddr::V6(v6) => self.0.get(&udp_names::mac_of(from)).is_none_or(|node| *node == v6),
        }
    }

    pub(super) fn list(&self) -> Vec<Ipv6Addr> {
        self.0.values().copied().collect()
    }
}
