//! The devices that lead out of the node. The uplink, by which other nodes are reached, is the one that holds the node's address,
//! or the one that was named; a node may have others.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use rtnetlink::packet_route::link::InfoKind;

use super::error::Error;
use super::link::{self, Link};
use super::netlink::Netlink;
use super::pod::is_host_device;
use super::{address, route, tap};

/// Bytes that VXLAN adds on an IPv4 underlay: 20 IPv4, 8 UDP, 8 VXLAN, 14 inner Ethernet (RFC 7348 §5).
pub const OVERHEAD_V4: u32 = 50;
/// The same on an IPv6 underlay (40 bytes IPv6).
pub const OVERHEAD_V6: u32 = 70;

/// Finds the uplink. `addresses` are the node's own; `named` is what the configuration says, if it does.
pub fn find(netlink: &mut Netlink, addresses: &[IpAddr], named: Option<&str>) -> Result<Link, Error> {
    let links = link::list(netlink)?;
    if let Some(name) = named {
        return links.into_iter().find(|l| l.name == name).ok_or_else(|| {
            Error::Refused(format!("uplink {name} from the configuration does not exist; `ip link` lists what does"))
        });
    }
    let present = address::list(netlink)?;
    for wanted in addresses {
        let holder = present.iter().find(|a| a.address == *wanted).map(|a| a.device);
        if let Some(link) = links.iter().find(|l| Some(l.index) == holder && l.name != "lo") {
            return Ok(link.clone());
        }
    }
    let list = addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    Err(Error::Refused(format!(
        "no device of this node holds its address ({list}); check the Node's InternalIP against `ip addr`, or name the uplink in \
         the configuration"
    )))
}

/// Whether a device sends and takes frames with other MAC addresses than its own, as far as that can be known: it is Ethernet, not wireless (an access
/// point knows its stations by their addresses), and none that is told from its siblings by its own.
pub fn bears_macs(link: &Link) -> bool {
    let has = |what: &str| Path::new("/sys/class/net").join(&link.name).join(what).exists();
    let by_its_own = matches!(link.kind, Some(InfoKind::MacVlan | InfoKind::IpVlan));
    link.mac.is_some() && !by_its_own && !has("phy80211") && !has("wireless")
}

/// What leads out of the node, the uplink included.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outside {
    /// Index and name of the devices.
    pub devices: Vec<(u32, String)>,
    /// The node's addresses on them, but for link-local ones.
    pub addresses: Vec<IpAddr>,
}

/// Whether a configured name (`eth1`), or the beginning of names (`eth*`), means a device.
fn means(named: &str, device: &str) -> bool {
    named.strip_suffix('*').map_or(named == device, |prefix| device.starts_with(prefix))
}

/// Whether a device of that kind is one that machines have for the world outside: a network card, or what is made of cards.
fn is_of_the_machine(link: &Link) -> bool {
    match &link.kind {
        None => link.name != "lo",
        Some(InfoKind::Bond | InfoKind::Vlan | InfoKind::MacVlan | InfoKind::IpVlan) => true,
        Some(InfoKind::Other(kind)) => kind == "team",
        Some(_) => false,
    }
}

pub(super) fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    }
}

/// Finds what leads out: the uplink, devices of default routes, and network cards (bonds, VLANs) that have an address; or, when
/// they are `named`, the uplink and those.
pub fn outside(netlink: &mut Netlink, uplink: &Link, named: &[String]) -> Result<Outside, Error> {
    let links = link::list(netlink)?;
    let present = address::list(netlink)?;
    let of = |link: &Link| {
        let of_link = present.iter().filter(|a| a.device == link.index && !a.ours && is_global(a.address));
        of_link.map(|a| a.address).collect::<Vec<_>>()
    };
    let by_default = if named.is_empty() { route::default_devices(netlink)? } else { Vec::new() };
    let mut outside = Outside::default();
    for link in links.iter().filter(|l| {
        !is_host_device(&l.name) && l.name != link::TUNNEL_DEVICE && l.name != tap::UDP_DEVICE && l.name != "lo"
    }) {
        let chosen = if named.is_empty() {
            by_default.contains(&link.index) || (is_of_the_machine(link) && !of(link).is_empty())
        } else {
            named.iter().any(|name| means(name, &link.name))
        };
        if chosen || link.index == uplink.index {
            outside.devices.push((link.index, link.name.clone()));
            outside.addresses.extend(of(link));
        }
    }
    Ok(outside)
}

/// MTU that fits through the tunnel between nodes whose tunnel addresses have the family of `tunnel`.
pub fn tunnel_mtu(uplink_mtu: u32, tunnel: IpAddr) -> u32 {
    uplink_mtu.saturating_sub(if tunnel.is_ipv4() { OVERHEAD_V4 } else { OVERHEAD_V6 })
}

/// Waits until the kernel has finished duplicate address detection on the node's addresses, at most `patience`: before that
/// they cannot be the source of a route. What is still undecided then shows as a route's error.
pub fn settle(netlink: &mut Netlink, addresses: &[IpAddr], patience: Duration) -> Result<(), Error> {
    let deadline = Instant::now() + patience;
    while address::list(netlink)?.iter().any(|a| a.tentative && addresses.contains(&a.address)) {
        if Instant::now() > deadline {
            tracing::warn!(
                ?addresses,
                "a node address is still tentative; duplicate address detection is slow or has failed"
            );
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
