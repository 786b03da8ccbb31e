//! Nodes to peers: where each node's pods and own addresses are reached. A node that would take what another has is
//! refused, in whole or in part, with a reason for people.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use towpath_model::desired::{FlannelPeer, NodePeer, Reach};
use towpath_model::flannel::{Flannel, FlannelBackend};
use towpath_model::{Family, Node, NodeName, World, family_of};

/// The peers, and what was left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// Nodes that can be reached, this one included, by name.
    pub peers: Vec<NodePeer>,
    /// Why a node, one of its addresses or one of its ranges is not among them.
    pub refused: BTreeMap<NodeName, Vec<String>>,
}

/// What else decides how a node is reached.
#[derive(Clone, Debug, Default)]
pub struct Tunnels {
    /// Identifier of our VXLAN.
    pub vni: u32,
    /// Nodes that this network has taken over: their agents have said something.
    pub taken_over: BTreeSet<NodeName>,
    /// How nodes' pods are reached that are not sent envelopes ([`crate::backend::instead`]).
    pub instead: BTreeMap<NodeName, Reach>,
    /// Whether other nodes' pods may send so ([`crate::backend::takes_plain`]).
    pub plain: bool,
    /// Whether this node's pods are on the link ([`crate::backend::takes_on_link`]).
    pub on_link: bool,
    /// The nodes at IPv6 addresses that whoever carries packets in user space knows. What is for others goes in envelopes until it does.
    pub udp_known: Arc<BTreeSet<Ipv6Addr>>,
}

impl Tunnels {
    /// Whether datagrams get to a node at this address.
    fn takes_datagrams(&self, node: IpAddr) -> bool {
        match node {
            IpAddr::V4(_) => true,
            IpAddr::V6(v6) => self.udp_known.contains(&v6),
        }
    }
}

/// Plans the peers of `local`. `previous` is the last result: who had a range or an address keeps it, whatever others say of themselves since;
/// else the older node has it, so that all nodes decide alike. The tunnel runs over IPv4 if this node has an IPv4 address, else over IPv6.
///
/// A node that bears Flannel's annotations is reached as those say, also after it was taken over: its device for old pods may still
/// be Flannel's, and packets of its pods may come without an envelope as long as somebody counts on the annotations. Flannel has a
/// tunnel a family, so such a node of both families, before it is taken over, is two peers.
pub fn plan(world: &World, local: &NodeName, previous: &[NodePeer], tunnels: &Tunnels) -> Peers {
    let mut out = Peers::default();
    let Some(own) = world.nodes.get(local) else {
        refuse(&mut out, local, "this node is not in the cluster yet: its kubelet has not registered it".to_owned());
        return out;
    };
    let Some(family) = [Family::V4, Family::V6].into_iter().find(|f| own.internal_ip(*f).is_some()) else {
        refuse(&mut out, local, NO_ADDRESS.to_owned());
        return out;
    };
    let mut before: BTreeMap<&NodeName, Vec<&NodePeer>> = BTreeMap::new();
    previous.iter().for_each(|peer| before.entry(&peer.name).or_default().push(peer));
    let had = |node: &Node, has: &dyn Fn(&NodePeer) -> bool| {
        before.get(&node.name).is_some_and(|peers| peers.iter().any(|peer| has(peer)))
    };
    let mut order: Vec<&Node> = world.nodes.values().collect();
    order.sort_by_key(|node| (node.created, &node.name));
    let mut claims = Claims::default();
    // Addresses of all nodes first: no pod range may cover one, whosever it is.
    let mut addresses = claimed(
        &order,
        |node| &node.internal_ips,
        |node, address| had(node, &|peer| peer.addresses.contains(address)),
        |node, address| match claims.address(&node.name, *address) {
            Ok(()) => true,
            Err(reason) => {
                refuse(&mut out, &node.name, reason);
                false
            }
        },
    );
    let mut ranges = claimed(
        &order,
        |node| &node.pod_cidrs,
        |node, range| had(node, &|peer| peer.pod_cidrs.contains(range)),
        |node, range| {
            // Without an address it is nobody's who could be reached.
            let reachable = addresses.get(&node.name).is_some_and(|all| all.iter().any(|a| family_of(*a) == family));
            match reachable.then(|| claims.range(&node.name, *range)) {
                None => false,
                Some(Ok(())) => true,
                Some(Err(reason)) => {
                    refuse(&mut out, &node.name, reason);
                    false
                }
            }
        },
    );
    for node in order {
        let addresses = addresses.remove(&node.name).unwrap_or_default();
        let Some(tunnel) = addresses.iter().copied().find(|a| family_of(*a) == family) else {
            let reason = match (node.internal_ips.is_empty(), family) {
                (true, _) => NO_ADDRESS,
                (false, Family::V4) => "has no usable IPv4 address, and the tunnels of this node run over IPv4",
                (false, Family::V6) => "has no usable IPv6 address, and the tunnels of this node run over IPv6",
            };
            refuse(&mut out, &node.name, reason.to_owned());
            continue;
        };
        let pod_cidrs = ranges.remove(&node.name).unwrap_or_default();
        if node.pod_cidrs.is_empty() {
            refuse(&mut out, &node.name, NO_RANGE.to_owned());
        }
        if pod_cidrs.is_empty() {
            continue;
        }
        let own = node.name == *local;
        let reach = match tunnels.instead.get(&node.name) {
            _ if own && tunnels.on_link => Reach::Link,
            _ if own => Reach::Tunnel,
            Some(Reach::Udp) if !tunnels.takes_datagrams(tunnel) => Reach::Tunnel,
            instead => instead.copied().unwrap_or(Reach::Tunnel),
        };
        let peer = NodePeer {
            name: node.name.clone(),
            addresses,
            pod_cidrs,
            tunnel,
            local: own,
            reach,
            plain: !own && tunnels.plain,
            flannel: None,
        };
        let had = previous.iter().any(|p| p.name == node.name && p.flannel.is_some());
        let (found, problems) = as_flannel_has_it(node, peer, tunnels, had);
        out.peers.extend(found);
        problems.into_iter().for_each(|reason| refuse(&mut out, &node.name, reason));
    }
    // An annotation names any address it likes: it may be nobody else's, or its node would speak for another's pods.
    let peers = std::mem::take(&mut out.peers);
    for mut peer in peers {
        let ends = match (peer.flannel, world.nodes.get(&peer.name)) {
            // Its device for old pods sends from the address in the annotation, which may be of another card (`--iface`).
            (Some(FlannelPeer { taken_over: true, .. }), Some(node)) => {
                node.flannel.iter().flat_map(|f| &f.ends).collect()
            }
            _ => Vec::new(),
        };
        for end in ends {
            if let Err(reason) = claims.end(&NodePeer { tunnel: end.address, ..peer.clone() }) {
                refuse(&mut out, &peer.name, reason);
                continue;
            }
            if !peer.addresses.contains(&end.address) {
                peer.addresses.push(end.address);
            }
            // Where Flannel's pods go by routes, new ones go the same way.
            let routed = world.nodes.get(&peer.name).and_then(|node| node.flannel.as_ref());
            if routed.is_some_and(|flannel| flannel.backend == FlannelBackend::HostGw)
                && family_of(end.address) == family_of(peer.tunnel)
            {
                peer.tunnel = end.address;
            }
        }
        match claims.end(&peer) {
            Ok(()) => out.peers.push(peer),
            Err(reason) => refuse(&mut out, &peer.name, reason),
        }
    }
    out.peers.sort_by(|a, b| a.name.cmp(&b.name));
    out
}

/// What each node gets of what it says it has, in its own order. Who `had` a thing is asked for before all others.
fn claimed<'w, T: Copy + 'w>(
    nodes: &[&'w Node],
    says: impl Fn(&'w Node) -> &'w Vec<T>,
    had: impl Fn(&Node, &T) -> bool,
    mut claim: impl FnMut(&'w Node, &T) -> bool,
) -> BTreeMap<&'w NodeName, Vec<T>> {
    let mut got: BTreeMap<&NodeName, Vec<(usize, T)>> = BTreeMap::new();
    for theirs in [true, false] {
        for node in nodes {
            for (index, thing) in says(node).iter().enumerate().filter(|(_, thing)| had(node, thing) == theirs) {
                if claim(node, thing) {
                    got.entry(&node.name).or_default().push((index, *thing));
                }
            }
        }
    }
    let in_order = |mut all: Vec<(usize, T)>| {
        all.sort_by_key(|(index, _)| *index);
        all.into_iter().map(|(_, thing)| thing).collect()
    };
    got.into_iter().map(|(node, all)| (node, in_order(all))).collect()
}

/// The peers that a node is by Flannel's annotations, and what is wrong with those. `had`: it bore some before.
fn as_flannel_has_it(node: &Node, peer: NodePeer, tunnels: &Tunnels, had: bool) -> (Vec<NodePeer>, Vec<String>) {
    let taken_over = tunnels.taken_over.contains(&node.name);
    if peer.local {
        return (vec![peer], Vec::new());
    }
    let Some(flannel) = &node.flannel else {
        // Whoever has not heard yet that they are gone goes on as before.
        let flannel = had.then_some(FlannelPeer { taken_over });
        return (vec![NodePeer { plain: peer.plain || had, flannel, ..peer }], Vec::new());
    };
    let mut problems: Vec<String> = Vec::new();
    if !taken_over {
        problems.extend(flannel.problems.iter().cloned());
        problems.extend(cannot_be_reached(flannel, tunnels));
    }
    if taken_over {
        let end = flannel.end_of(family_of(peer.tunnel));
        let reach = match peer.reach {
            plain if plain.is_plain() => plain,
            _ => reach(flannel, end.and_then(|end| end.vtep).map(|vtep| vtep.mac)),
        };
        return (vec![NodePeer { reach, plain: true, flannel: Some(FlannelPeer { taken_over }), ..peer }], problems);
    }
    let mut peers = Vec::new();
    for end in &flannel.ends {
        let family = family_of(end.address);
        let of_family = |net: &&IpNet| family_of(net.addr()) == family;
        let pod_cidrs: Vec<IpNet> = peer.pod_cidrs.iter().filter(of_family).copied().collect();
        if pod_cidrs.is_empty() {
            continue;
        }
        let addresses = peer.addresses.iter().copied().filter(|address| family_of(*address) == family).collect();
        let reach = reach(flannel, end.vtep.map(|vtep| vtep.mac));
        let flannel = Some(FlannelPeer { taken_over });
        peers.push(NodePeer { addresses, pod_cidrs, tunnel: end.address, reach, plain: true, flannel, ..peer.clone() });
    }
    if peers.is_empty() {
        peers.push(NodePeer { reach: Reach::Tunnel, plain: true, flannel: Some(FlannelPeer { taken_over }), ..peer });
    }
    (peers, problems)
}

fn reach(flannel: &Flannel, mac: Option<[u8; 6]>) -> Reach {
    match (&flannel.backend, mac) {
        (FlannelBackend::HostGw, _) => Reach::Route,
        (FlannelBackend::Vxlan, Some(mac)) => Reach::TunnelTo(mac),
        (FlannelBackend::Vxlan | FlannelBackend::Other(_), _) => Reach::Tunnel,
    }
}

/// Why packets between here and a node of Flannel's will not arrive.
fn cannot_be_reached(flannel: &Flannel, tunnels: &Tunnels) -> Option<String> {
    if let FlannelBackend::Other(name) = &flannel.backend {
        return Some(format!(
            "runs Flannel with the backend {name:?}, which is not understood (vxlan and host-gw are): its pods are not reached"
        ));
    }
    let other = flannel.ends.iter().filter_map(|end| end.vtep).find(|vtep| vtep.vni != tunnels.vni)?;
    Some(format!(
        "runs Flannel with VXLAN identifier {}, and ours is {}: set spec.vxlan.vni of the NetworkConfig to {} until all nodes are \
         taken over (and the port to Flannel's, 8472 if it does not say)",
        other.vni, tunnels.vni, other.vni
    ))
}

const NO_ADDRESS: &str = "has no InternalIP in status.addresses: check its kubelet (--node-ip)";
const NO_RANGE: &str = "has no spec.podCIDRs: run kube-controller-manager with --allocate-node-cidrs, or towpath controller \
                        with clusterCidrs";

fn refuse(out: &mut Peers, node: &NodeName, reason: String) {
    let reasons = out.refused.entry(node.clone()).or_default();
    if !reasons.contains(&reason) {
        reasons.push(reason);
    }
}

/// Who has which address and range.
#[derive(Default)]
struct Claims<'a> {
    addresses: BTreeMap<IpAddr, &'a NodeName>,
    /// By first address; disjoint.
    ranges: BTreeMap<IpAddr, (IpNet, &'a NodeName)>,
}

impl<'a> Claims<'a> {
    fn address(&mut self, node: &'a NodeName, address: IpAddr) -> Result<(), String> {
        if address.is_loopback() || address.is_multicast() || address.is_unspecified() {
            return Err(format!("address {address} cannot be a node's"));
        }
        match self.addresses.get(&address) {
            Some(owner) => Err(format!("address {address} already belongs to node {owner}")),
            None => {
                self.addresses.insert(address, node);
                Ok(())
            }
        }
    }

    /// Whether a peer's tunnel may end where it says. To be asked when all addresses and ranges are claimed.
    fn end(&self, peer: &NodePeer) -> Result<(), String> {
        let end = peer.tunnel;
        if peer.addresses.contains(&end) {
            return Ok(());
        }
        if end.is_loopback() || end.is_multicast() || end.is_unspecified() {
            return Err(format!("public-ip {end} of Flannel's cannot be a node's"));
        }
        if let Some(owner) = self.addresses.get(&end).filter(|owner| ***owner != peer.name) {
            return Err(format!("public-ip {end} of Flannel's belongs to node {owner}"));
        }
        match self.ranges.range(..=end).next_back() {
            Some((_, (range, owner))) if range.contains(&end) => {
                Err(format!("public-ip {end} of Flannel's is in the pod range {range} of node {owner}"))
            }
            _ => Ok(()),
        }
    }

    fn range(&mut self, node: &'a NodeName, cidr: IpNet) -> Result<(), String> {
        let (first, last) = (cidr.network(), cidr.broadcast());
        if let Some((address, owner)) = self.addresses.range(first..=last).next() {
            return Err(format!("pod range {cidr} covers {address}, the address of node {owner}"));
        }
        // Disjoint so far: only the nearest that begins at or before our end can touch us.
        if let Some((_, (other, owner))) = self.ranges.range(..=last).next_back()
            && family_of(other.addr()) == family_of(first)
            && other.broadcast() >= first
        {
            return Err(if *owner == node {
                format!("pod range {cidr} overlaps its own {other}")
            } else {
                format!("pod range {cidr} overlaps {other} of node {owner}")
            });
        }
        self.ranges.insert(first, (cidr, node));
        Ok(())
    }
}

#[cfg(test)]
mod tests;
