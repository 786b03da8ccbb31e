//! A node that Flannel (or Canal) connects still: its VXLAN device is our tunnel device for a while, and pods on its bridge are
//! reached through the kernel's stack.
//!
//! Two VXLAN devices of different kinds cannot share a UDP port: the kernel refuses the second to come up. Flannel's has to stay
//! as long as its pods are here, and it can do for us what ours does on the slow path: a frame with a node's MAC address finds that
//! node by its forwarding table. The short cut at the uplink does not use the device. When the device goes, ours takes its place.
//!
//! Nothing of the device itself is changed, and no entry of others in its tables is deleted. What is changed of the bridge is that the
//! node answers ARP and neighbour discovery on it for pods of its range that are elsewhere.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::packet_route::link::InfoKind;
use towpath_model::NodeName;
use towpath_model::desired::{NodePeer, Reach, Vxlan};

use super::Node;
use crate::bpf::Surroundings;
use crate::error::Error;
use crate::net::link::{self, Link, TUNNEL_DEVICE};
use crate::net::netlink::Netlink;
use crate::net::{self, neighbour, route, sysctl};
use crate::predecessor::tunnels;
use crate::requests::Applied;

/// What the names of Flannel's VXLAN devices begin with; the network identifier follows.
pub(crate) const FLANNEL_VXLAN: &str = "flannel.";
/// Its bridge.
pub(crate) const BRIDGE: &str = "cni0";
/// The VXLAN device over IPv6.
pub(crate) const FLANNEL_VXLAN_V6: &str = "flannel-v6.";

/// Has the node answer on a bridge for its pods that are not there: a pod on the bridge takes the whole range for its neighbours, and
/// asks by ARP or neighbour discovery.
fn answer_on(bridge: &str) -> Result<(), Error> {
    let wanted = [
        (format!("ipv4/conf/{bridge}/proxy_arp"), "1"),
        (format!("ipv4/neigh/{bridge}/proxy_delay"), "0"),
        (format!("ipv6/conf/{bridge}/proxy_ndp"), "1"),
        (format!("ipv6/neigh/{bridge}/proxy_delay"), "0"),
    ];
    for (name, value) in wanted {
        if sysctl::set_if_known(&name, value)? {
            tracing::info!("set sysctl {name} to {value}: pods on the bridge reach those that are not");
        }
    }
    Ok(())
}

/// Undoes [`answer_on`] on the bridge of the reference plugins, where it is; for [`crate::uninstall`].
pub(crate) fn no_longer_answer() -> Result<(), Error> {
    for name in [format!("ipv4/conf/{BRIDGE}/proxy_arp"), format!("ipv6/conf/{BRIDGE}/proxy_ndp")] {
        sysctl::set_if_known(&name, "0")?;
    }
    Ok(())
}

/// Flannel's device, if it is up with our port while ours is not. Another identifier than ours is refused: neither device could
/// take the other's packets.
pub(super) fn find(netlink: &mut Netlink, vxlan: Vxlan) -> Result<Option<Link>, Error> {
    let Vxlan { vni, port } = vxlan;
    let links = link::list(netlink)?;
    if links.iter().any(|l| l.name == TUNNEL_DEVICE && l.up) {
        return Ok(None);
    }
    let usable = tunnels(&links).into_iter().filter(|l| l.up && l.vxlan == Some((false, port)));
    let Some(found) = usable.min_by_key(|l| l.name.starts_with(FLANNEL_VXLAN_V6)) else { return Ok(None) };
    if found.vni != Some(vni) {
        let other = found.vni.unwrap_or_default();
        return Err(net::Error::Refused(format!(
            "device {} of Flannel has UDP port {port} with VXLAN identifier {other}, and ours is {vni}: to take this node over, set \
             spec.vxlan.vni of the NetworkConfig to {other}; else remove the device (`ip link delete {}`)",
            found.name, found.name
        ))
        .into());
    }
    Ok(Some(found.clone()))
}

/// Index of Flannel's device over IPv6, 0 when there is none.
pub(super) fn tunnel6(links: &[Link]) -> u32 {
    links.iter().find(|l| l.name.starts_with(FLANNEL_VXLAN_V6)).map_or(0, |l| l.index)
}

impl Node {
    /// Flannel's device, if it can serve; notes in [`Node::lent`] what was found.
    pub(super) fn find_lent_tunnel(&mut self) -> Result<Option<Link>, Error> {
        self.lent = None;
        let Some(found) = find(&mut self.netlink, self.config.settings.vxlan)? else { return Ok(None) };
        if let Some(own) = link::by_name(&mut self.netlink, TUNNEL_DEVICE)? {
            // Left by a start that was cut off before the device came up.
            link::delete(&mut self.netlink, own.index, TUNNEL_DEVICE)?;
        }
        self.lent = Some(found.name.clone());
        Ok(Some(found))
    }

    /// Beside a lent device: index of Flannel's own for IPv6 (0: there is none), and where routes of others lead by which device.
    pub(super) fn find_lent_v6(&mut self) -> Result<(u32, BTreeMap<IpNet, u32>), Error> {
        if self.lent.is_none() {
            return Ok((0, BTreeMap::new()));
        }
        let mut led = route::of_others_v6(&mut self.netlink)?;
        led.retain(|_, device| *device != self.facts.tunnel_ifindex);
        Ok((tunnel6(&link::list(&mut self.netlink)?), led))
    }

    /// Makes our own device as soon as the lent one is gone. For every second or so.
    pub(super) fn replace_lent_tunnel(&mut self) -> Result<(), Error> {
        let Some(name) = self.lent.clone() else { return Ok(()) };
        if link::by_name(&mut self.netlink, &name)?.is_some_and(|l| l.index == self.facts.tunnel_ifindex && l.up) {
            return Ok(());
        }
        let applied = self.audit();
        tracing::info!(device = name, now = ?self.lent, changes = ?applied.changes, "the tunnel device that another network lent is gone");
        Ok(())
    }

    /// See [`crate::Datapath::take_tunnel`].
    pub(crate) fn take_tunnel(&mut self) -> Result<Applied, Error> {
        let links = link::list(&mut self.netlink)?;
        let theirs: Vec<(u32, &str)> = tunnels(&links).iter().map(|l| (l.index, l.name.as_str())).collect();
        if theirs.is_empty() {
            return Ok(Applied::default());
        }
        link::delete_all(&mut self.netlink, &theirs)?;
        let mut applied = Applied::default();
        applied.note(self.ensure_node());
        self.ensure_surroundings()?;
        self.ensure_peers(&mut applied);
        Ok(applied)
    }

    /// Has the node answer for pods here on the bridges of another network. Of IPv4 it does so for whatever its routes lead elsewhere.
    pub(super) fn answer_for(&mut self, pods: &[IpAddr]) -> Result<(), Error> {
        let mut requests = Vec::new();
        for (index, name) in &self.bridges {
            let v6 = pods.iter().filter(|address| address.is_ipv6());
            requests.extend(v6.map(|address| neighbour::answer_for(*index, name, *address)));
        }
        Ok(self.netlink.batch(requests).into_iter().collect::<Result<(), _>>()?)
    }

    /// The same undone for a pod that goes.
    pub(super) fn no_longer_answer_for(&mut self, pod: &[IpAddr]) {
        let mut requests = Vec::new();
        for (index, name) in &self.bridges {
            let v6 = pod.iter().filter(|address| address.is_ipv6());
            requests.extend(v6.map(|address| neighbour::no_longer_answer_for(*index, name, *address)));
        }
        for error in self.netlink.batch(requests).into_iter().filter_map(Result::err).filter(|e| !e.is_absent()) {
            tracing::warn!(%error, "an entry of a pod that is gone stays on another network's bridge");
        }
    }

    /// See [`crate::Datapath::apply_elsewhere`].
    pub(crate) fn apply_elsewhere(&mut self, addresses: Vec<IpAddr>) -> Result<Applied, Error> {
        self.elsewhere = addresses.into_iter().collect();
        let mut applied = Applied::default();
        if self.peers_known {
            self.ensure_surroundings()?;
            applied.note(self.ensure_nftables(false));
        }
        Ok(applied)
    }

    /// The devices that lead to a peer, IPv4 and IPv6, and whether it is on their links. Flannel may have been given another card (`--iface`)
    /// than the uplink.
    fn devices_to(&mut self, peer: &NodePeer) -> Result<([u32; 2], bool), Error> {
        let (mut devices, mut on_link) = ([self.facts.uplink_ifindex; 2], true);
        for (device, v4) in devices.iter_mut().zip([true, false]) {
            let mut ends = [peer.tunnel].into_iter().chain(peer.addresses.iter().copied());
            if let Some(end) = ends.find(|address| address.is_ipv4() == v4)
                && let Some(towards) = route::towards(&mut self.netlink, end)?
            {
                *device = towards.device;
                on_link &= towards.on_link;
            }
        }
        Ok((devices, on_link))
    }

    /// By which devices nodes send packets as they are, and how each is reached: a node beyond a router neither sends nor is sent any.
    fn ensure_ways(&mut self) -> Result<(), Error> {
        let mut plain: BTreeMap<NodeName, [u32; 2]> = BTreeMap::new();
        let mut peers = self.planned.clone();
        self.beyond.clear();
        for peer in peers.iter_mut().filter(|peer| peer.plain) {
            let before = self.plain.get(&peer.name).copied();
            match (peer.flannel, before) {
                // Of a node whose annotations went just now that is as before: others, who have not heard yet, go on so.
                (Some(_), Some(before)) if peer.reach == Reach::Tunnel => drop(plain.insert(peer.name.clone(), before)),
                (flannel, _) => {
                    let (devices, on_link) = self.devices_to(peer)?;
                    if flannel.is_some() || on_link {
                        plain.insert(peer.name.clone(), devices);
                    } else {
                        self.beyond.extend(peer.reach.is_plain().then(|| peer.name.clone()));
                        peer.plain = false;
                        if peer.reach.is_plain() {
                            peer.reach = Reach::Tunnel;
                        }
                    }
                }
            }
        }
        (self.plain, self.peers) = (plain, peers);
        Ok(())
    }

    /// Has the programs know the peers, and what besides our own devices packets come by.
    pub(super) fn ensure_surroundings(&mut self) -> Result<(), Error> {
        self.ensure_ways()?;
        let mut surroundings = Surroundings { plain: self.plain.clone(), ..Surroundings::default() };
        let links = link::list(&mut self.netlink)?;
        for address in &self.elsewhere {
            // Nobody there any more, or not yet: nothing comes from it.
            if let Some(device) = route::device_towards(&mut self.netlink, *address)? {
                surroundings.elsewhere.push((*address, device));
            }
        }
        let theirs = |l: &&Link| surroundings.elsewhere.iter().any(|(_, device)| *device == l.index);
        let bridges = links.iter().filter(|l| l.kind == Some(InfoKind::Bridge)).filter(theirs);
        self.bridges = bridges.map(|l| (l.index, l.name.clone())).collect();
        for bridge in self.bridges.values() {
            answer_on(bridge)?;
        }
        let pods: Vec<IpAddr> = self.records.iter().flat_map(|r| r.pod.addresses.clone()).collect();
        self.answer_for(&pods)?;
        if self.peers.iter().any(|peer| peer.flannel.is_some()) {
            let lo = links.iter().find(|l| l.name == "lo").map_or(0, |l| l.index);
            surroundings.elsewhere.extend(self.facts.gateways.iter().map(|gateway| (*gateway, lo)));
        }
        if let Some(programs) = &mut self.programs {
            programs.surround(surroundings);
        }
        self.apply_prefixes()
    }
}
