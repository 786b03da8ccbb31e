//! A pod's device: its veth pair, what is set up on both sides of it, and how its host side is named.
//!
//! The pod has host addresses (/32, /128), a link-scope route to its gateway and the default route through it, and a permanent
//! neighbour entry for the gateway, so it never asks for anybody. The host side has the same for the pod.
//!
//! Where the ways between nodes carry more than an envelope does, pods may send each other more ([`Mtu`]): the device has the larger MTU, the
//! cluster's pod ranges have routes of their own, and the default route has what an envelope carries, for what is not between pods may go in one.

use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::bucket::{self, Bucket};
use super::error::Error;
use super::netlink::{Netlink, Request};
use super::route::{self, Route};
use super::{MAIN_TABLE, address, gateway_of, host_range, link, mac, neighbour, netns, of_family, sysctl};

/// Longest name of a device (IFNAMSIZ less its terminator).
const NAME_MAX: usize = 15;
/// How long the kernel may take to put an address that it has accepted into use.
const TAKEN_PATIENCE: Duration = Duration::from_secs(5);

/// Name of the host side of the device `ifname` of the sandbox `container_id`: `tp` and 11 hex digits of their FNV-1a hash.
pub fn host_device(container_id: &str, ifname: &str) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in container_id.bytes().chain([0]).chain(ifname.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    format!("tp{:011x}", hash >> 20)
}

/// Whether a device of that name is the host side of a pod's.
pub fn is_host_device(name: &str) -> bool {
    name.strip_prefix("tp")
        .is_some_and(|rest| rest.len() == 11 && rest.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)))
}

/// Whether Linux takes `name` as a device's, and it is not the loopback's (dev_valid_name).
pub fn check_name(name: &str) -> Result<(), Error> {
    let valid = !name.is_empty()
        && name.len() <= NAME_MAX
        && !matches!(name, "." | ".." | "lo")
        && name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':'));
    if valid { Ok(()) } else { Err(Error::Refused(format!("{name:?} cannot be the name of a pod's device"))) }
}

/// The pod's addresses with their gateways. Refused without an address, with two of a family, or with one outside this
/// node's ranges.
pub fn with_gateways(addresses: &[IpAddr], ranges: &[IpNet]) -> Result<Vec<(IpAddr, IpAddr)>, Error> {
    let mut pairs: Vec<(IpAddr, IpAddr)> = Vec::new();
    for address in addresses {
        if pairs.iter().any(|(other, _)| other.is_ipv4() == address.is_ipv4()) {
            return Err(Error::Refused(format!("a pod cannot have two addresses of one family: {addresses:?}")));
        }
        let gateway = ranges.iter().find(|r| r.contains(address)).copied().and_then(gateway_of);
        let Some(gateway) = gateway.filter(|g| g != address) else {
            return Err(Error::Refused(format!(
                "address {address} is not a pod's address on this node, whose ranges are {ranges:?}"
            )));
        };
        pairs.push((*address, gateway));
    }
    if pairs.is_empty() { Err(Error::Refused("a pod needs an address".to_owned())) } else { Ok(pairs) }
}

/// The host's route to a pod's address.
pub fn host_route(device: u32, pod: IpAddr, node_addresses: &[IpAddr]) -> Route {
    Route {
        table: MAIN_TABLE,
        destination: host_range(pod),
        device,
        gateway: None,
        source: of_family(node_addresses, pod),
        encap: None,
    }
}

/// Requests that bring the host side up, with its neighbours and routes.
pub fn host_side(
    device: u32,
    name: &str,
    pod_mac: [u8; 6],
    addresses: &[IpAddr],
    node_addresses: &[IpAddr],
) -> Vec<Request> {
    let mut requests = vec![link::up(device, name)];
    for address in addresses {
        requests.push(neighbour::set(device, name, *address, pod_mac));
        requests.push(host_route(device, *address, node_addresses).add());
    }
    requests
}

/// How large the packets of a pod may be, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mtu<'a> {
    /// MTU of its device, and so of what it sends to the pods of the cluster.
    pub device: u32,
    /// Of what it sends elsewhere, if that is less.
    pub elsewhere: u32,
    /// Where the pods of the cluster are.
    pub cluster: &'a [IpNet],
}

/// Sets up the pod's side, in the pod's namespace, and brings it up. `sends`: where what the pod sends waits for its turn.
pub fn set_up_inside(
    netns: BorrowedFd<'_>,
    ifname: &str,
    addresses: &[(IpAddr, IpAddr)],
    host_mac: [u8; 6],
    mtu: Mtu<'_>,
    sends: Option<Bucket>,
) -> Result<(), Error> {
    netns::within(netns, || {
        quiet_ipv6(ifname, addresses.iter().any(|(address, _)| address.is_ipv6()))?;
        let mut netlink = Netlink::open()?;
        let device = link::existing(&mut netlink, ifname)?.index;
        let lo = link::existing(&mut netlink, "lo")?.index;
        if sends.is_some() {
            bucket::ensure(&mut netlink, device, ifname, sends)?;
        }
        let mut requests = vec![link::up(lo, "lo")];
        requests.extend(addresses.iter().map(|(address, _)| address::add(device, ifname, *address)));
        requests.push(link::up(device, ifname));
        for (_, gateway) in addresses {
            requests.push(neighbour::set(device, ifname, *gateway, host_mac));
            requests.extend(inside_routes(device, *gateway).iter().map(Route::add));
            if mtu.elsewhere < mtu.device {
                let [_, default] = inside_routes(device, *gateway);
                requests.extend(cluster_routes(device, *gateway, mtu.cluster).iter().map(Route::add));
                requests.push(default.replace_with_mtu(mtu.elsewhere));
            }
        }
        netlink.batch(requests).into_iter().collect::<Result<(), Error>>()?;
        addresses.iter().try_for_each(|(address, _)| wait_until_taken(&mut netlink, *address))
    })
}

/// An IPv6 address is the pod's at once, but what comes for it is taken a moment later, when a thread of the kernel has got to it, which other work
/// on devices holds up. A pod that asked in that moment would not hear the answer.
fn wait_until_taken(netlink: &mut Netlink, address: IpAddr) -> Result<(), Error> {
    let deadline = Instant::now() + TAKEN_PATIENCE;
    while !route::is_local(netlink, address)? {
        if Instant::now() > deadline {
            return Err(Error::Refused(format!(
                "the kernel has not taken address {address} into use in the pod within {} s; its networking is overloaded, try again",
                TAKEN_PATIENCE.as_secs()
            )));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// To the pods of the cluster, of the gateway's family.
fn cluster_routes(device: u32, gateway: IpAddr, cluster: &[IpNet]) -> Vec<Route> {
    let of_family = cluster.iter().filter(|range| range.addr().is_ipv4() == gateway.is_ipv4());
    let direct = host_route(device, gateway, &[]);
    of_family.map(|range| Route { destination: range.trunc(), gateway: Some(gateway), ..direct.clone() }).collect()
}

/// Changes the MTU of a pod that runs. To be called in its network namespace; the host side is the caller's, before this if it becomes larger, else after it.
///
/// Routes come before a device that becomes larger, and after one that becomes smaller, so that nothing larger than `elsewhere` ever goes elsewhere. Refused
/// where the default route is another's (another network of the same pod): what that one means to carry is not known.
pub fn change_mtu_inside(ifname: &str, gateways: &[IpAddr], mtu: Mtu<'_>) -> Result<(), Error> {
    let mut netlink = Netlink::open()?;
    let link = link::existing(&mut netlink, ifname)?;
    let present = super::route::list(&mut netlink, MAIN_TABLE)?;
    let elsewhere = mtu.elsewhere.min(mtu.device);
    let (mut routes, mut again) = (Vec::new(), Vec::new());
    for gateway in gateways {
        let [_, default] = inside_routes(link.index, *gateway);
        let wanted = cluster_routes(link.index, *gateway, mtu.cluster);
        if !present.contains(&default) {
            if elsewhere < mtu.device {
                return Err(Error::Refused(format!("the default route of device {ifname} is another network's")));
            }
            continue;
        }
        let missing = wanted.iter().filter(|route| !present.contains(route) && elsewhere < mtu.device);
        routes.extend(missing.map(Route::replace));
        // A route whose MTU is its device's goes up with that (`rt6_mtu_change_route`): for an instant it has one byte less.
        let grows = gateway.is_ipv6() && mtu.device > link.mtu && elsewhere == link.mtu && elsewhere < mtu.device;
        routes.push(default.replace_with_mtu(if grows { elsewhere - 1 } else { elsewhere }));
        again.extend(grows.then(|| default.replace_with_mtu(elsewhere)));
    }
    let device = link::set_mtu(link.index, ifname, mtu.device);
    let requests = if mtu.device > link.mtu {
        routes.into_iter().chain([device]).chain(again).collect::<Vec<_>>()
    } else {
        [device].into_iter().chain(routes).collect()
    };
    netlink.batch(requests).into_iter().collect()
}

/// To the gateway on the link, and to everybody else through it.
fn inside_routes(device: u32, gateway: IpAddr) -> [Route; 2] {
    let direct = host_route(device, gateway, &[]);
    let everything = IpNet::new_assert(if gateway.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) }, 0);
    let default = Route { destination: everything, gateway: Some(gateway), ..direct.clone() };
    [direct, default]
}

/// No router discovery and no duplicate address detection: addresses are ours to give and unique.
fn quiet_ipv6(ifname: &str, used: bool) -> Result<(), Error> {
    for (key, value) in [("accept_ra", "0"), ("accept_dad", "0"), ("router_solicitations", "0")] {
        sysctl::set_if_known(&format!("ipv6/conf/{ifname}/{key}"), value)?;
    }
    if used {
        // Container runtimes turn IPv6 off in new namespaces.
        sysctl::set(&format!("ipv6/conf/{ifname}/disable_ipv6"), "0")?;
    }
    Ok(())
}

/// Whether the pod's side is as [`set_up_inside`] left it (CNI CHECK); the error names the first difference.
pub fn check_inside(
    netns: BorrowedFd<'_>,
    ifname: &str,
    pod_mac: [u8; 6],
    addresses: &[(IpAddr, IpAddr)],
) -> Result<(), Error> {
    let wrong = |what: String| Err(Error::Refused(format!("in the pod, {what}")));
    netns::within(netns, || {
        let mut netlink = Netlink::open()?;
        let Some(link) = link::by_name(&mut netlink, ifname)? else {
            return wrong(format!("device {ifname} is missing"));
        };
        if !link.up || link.mac != Some(pod_mac) {
            let mac = link.mac.map_or_else(|| "none".to_owned(), mac::text);
            return wrong(format!("device {ifname} is {} with MAC {mac}", if link.up { "up" } else { "down" }));
        }
        let present = address::list(&mut netlink)?;
        let routes = route::list(&mut netlink, MAIN_TABLE)?;
        for (pod, gateway) in addresses {
            if !present.iter().any(|p| p.device == link.index && p.address == *pod) {
                return wrong(format!("address {pod} is missing from device {ifname}"));
            }
            if let Some(route) = inside_routes(link.index, *gateway).iter().find(|r| !routes.contains(r)) {
                return wrong(format!("the route to {} is missing or changed", route.destination));
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_side_has_a_name_that_fits_and_is_told_from_others() {
        let name = host_device(&"f".repeat(64), "eth0");
        assert_eq!(name.len(), 13);
        assert!(is_host_device(&name));
        assert_ne!(name, host_device(&"f".repeat(64), "eth1"));
        for foreign in ["tp0", "tunnel0", "tpzzzzzzzzzzz", "tp0123456789AB", "eth0", "towpath-vx", "tp0123456789abc"] {
            assert!(!is_host_device(foreign), "{foreign}");
        }
    }

    #[test]
    fn names_that_linux_refuses_are_refused() {
        for name in ["", "lo", ".", "..", "a/b", "a b", "a:b", "sixteen-letters!", "ä"] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        check_name("eth0").unwrap();
    }

    #[test]
    fn addresses_must_be_pod_addresses_of_the_node() {
        let ranges: Vec<IpNet> = vec!["10.244.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()];
        let pairs = with_gateways(&["10.244.1.9".parse().unwrap(), "fd00:1::9".parse().unwrap()], &ranges).unwrap();
        assert_eq!(pairs[1].1, "fd00:1::1".parse::<IpAddr>().unwrap());
        for wrong in [vec!["10.244.2.9"], vec!["10.244.1.1"], vec!["10.244.1.8", "10.244.1.9"], vec![]] {
            let addresses: Vec<IpAddr> = wrong.iter().map(|a| a.parse().unwrap()).collect();
            assert!(with_gateways(&addresses, &ranges).is_err(), "{wrong:?}");
        }
    }
}
