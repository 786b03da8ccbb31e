//! The device that leads out of the node: the one that holds the node's address, or the one that was named.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::address;
use super::error::Error;
use super::link::{self, Link};
use super::netlink::Netlink;

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
