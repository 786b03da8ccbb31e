//! Routes of ours: those with [`super::PROTOCOL`], applied as a two-way difference.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteIp6Tunnel, RouteIp6TunnelFlags, RouteIpTunnel,
    RouteLwEnCapType, RouteLwTunnelEncap, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage as Message};

use super::error::Error;
use super::netlink::{Netlink, Request};
use super::{PROTOCOL, host_range};

/// Metric of refusals: beside a route to the same range that another network's bridge brought, which they stay behind.
const REFUSAL_METRIC: u32 = 7470;

/// A route of ours.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Route {
    /// Routing table.
    pub table: u32,
    /// Destination.
    pub destination: IpNet,
    /// Index of the device; 0 refuses the destination (`unreachable`), and nothing below counts.
    pub device: u32,
    /// Next hop, taken as reachable on the device whatever other routes say (onlink).
    pub gateway: Option<IpAddr>,
    /// Source that the node's own packets get.
    pub source: Option<IpAddr>,
    /// Tunnel key that packets get (lightweight tunnel).
    pub encap: Option<Encap>,
}

/// Tunnel key of a route.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Encap {
    /// VNI.
    pub id: u32,
    /// Outer source.
    pub source: IpAddr,
    /// Outer destination.
    pub destination: IpAddr,
}

impl Route {
    /// Refuses what no more specific route covers: senders learn at once.
    pub fn unreachable(destination: IpNet) -> Self {
        let table = super::MAIN_TABLE;
        Self { table, destination: destination.trunc(), device: 0, gateway: None, source: None, encap: None }
    }

    fn key(&self) -> (u32, IpNet) {
        (self.table, self.destination)
    }

    /// Request: add it; it must not be there, also not as somebody else's.
    pub fn add(&self) -> Request {
        self.request("add", Message::NewRoute(self.message()), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Request: put it in the place of ours with the same destination.
    pub fn replace(&self) -> Request {
        self.request("replace", Message::NewRoute(self.message()), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// As [`Route::replace`]; what goes by it is at most `mtu` bytes. It is the same route with and without.
    pub fn replace_with_mtu(&self, mtu: u32) -> Request {
        let mut message = self.message();
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
        self.request(&format!("set MTU {mtu} of"), Message::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// What has to come before [`Route::replace`] of another: IPv6 takes a next hop within the range itself only if the range leads to its
    /// device already, onlink or not (`ip6_route_check_nh_onlink`). For an instant the range is without a next hop, on the right device.
    fn turned_from(&self, other: &Self) -> Option<Request> {
        let within = self.gateway.is_some_and(|gateway| gateway.is_ipv6() && self.destination.contains(&gateway));
        let first = Self { gateway: None, ..self.clone() };
        (within && other.device != self.device)
            .then(|| first.request("turn", Message::NewRoute(first.message()), NLM_F_CREATE | NLM_F_REPLACE))
    }

    /// Request: delete it.
    pub fn delete(&self) -> Request {
        let mut message = self.message();
        // One of an earlier version's may have another metric.
        message.attributes.retain(|a| !matches!(a, RouteAttribute::Priority(_)));
        self.request("delete", Message::DelRoute(message), 0)
    }

    fn request(&self, verb: &str, message: Message, flags: u16) -> Request {
        let table = if self.table == super::MAIN_TABLE { String::new() } else { format!(" in table {}", self.table) };
        Request::new(format!("{verb} route {}{table}", self.destination), message, flags)
    }

    fn message(&self) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: if self.destination.addr().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 },
            destination_prefix_length: self.destination.prefix_len(),
            table: u8::try_from(self.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC),
            protocol: RouteProtocol::Other(PROTOCOL),
            scope: match (self.destination, self.gateway) {
                (IpNet::V4(_), None) if self.device > 0 => RouteScope::Link,
                _ => RouteScope::Universe,
            },
            kind: if self.device > 0 { RouteType::Unicast } else { RouteType::Unreachable },
            flags: if self.gateway.is_some() { RouteFlags::Onlink } else { RouteFlags::empty() },
            ..RouteHeader::default()
        };
        let attributes = &mut message.attributes;
        attributes.push(RouteAttribute::Table(self.table));
        attributes.push(RouteAttribute::Destination(self.destination.network().into()));
        if self.device > 0 {
            attributes.push(RouteAttribute::Oif(self.device));
        }
        attributes.extend(self.gateway.map(|g| RouteAttribute::Gateway(g.into())));
        attributes.extend(self.source.map(|s| RouteAttribute::PrefSource(s.into())));
        if self.device == 0 {
            attributes.push(RouteAttribute::Priority(REFUSAL_METRIC));
        }
        if let Some(encap) = &self.encap {
            // The kernel reads the type first, but accepts either order.
            attributes.push(RouteAttribute::EncapType(encap.kind()));
            attributes.push(RouteAttribute::Encap(encap.attributes()));
        }
        message
    }
}

impl Encap {
    fn kind(&self) -> RouteLwEnCapType {
        if self.destination.is_ipv4() { RouteLwEnCapType::Ip } else { RouteLwEnCapType::Ip6 }
    }

    fn attributes(&self) -> Vec<RouteLwTunnelEncap> {
        let id = u64::from(self.id);
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => vec![
                RouteLwTunnelEncap::Ip(RouteIpTunnel::Id(id)),
                RouteLwTunnelEncap::Ip(RouteIpTunnel::Destination(destination)),
                RouteLwTunnelEncap::Ip(RouteIpTunnel::Source(source)),
            ],
            (IpAddr::V6(source), IpAddr::V6(destination)) => vec![
                RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Id(id)),
                RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Destination(destination)),
                RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Source(source)),
                // Over IPv6 a packet without UDP checksum is dropped by the other end (RFC 6935 makes it an opt-in).
                RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Flags(RouteIp6TunnelFlags::Checksum)),
            ],
            _ => Vec::new(),
        }
    }
}

/// Our routes in `table`, both families.
pub fn list(netlink: &mut Netlink, table: u32) -> Result<Vec<Route>, Error> {
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        filter.header.protocol = RouteProtocol::Other(PROTOCOL);
        filter.attributes.push(RouteAttribute::Table(table));
        match netlink.dump("list routes", Message::GetRoute(filter)) {
            Ok(answers) => {
                routes.extend(
                    answers.into_iter().filter_map(|m| if let Message::NewRoute(r) = m { read(&r) } else { None }),
                );
            }
            // The table does not exist before its first route.
            Err(error) if error.is_absent() => {}
            Err(error) => return Err(error),
        }
    }
    routes.retain(|route| route.table == table);
    Ok(routes)
}

/// Where the kernel's routes lead for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Towards {
    /// Index of the device.
    pub device: u32,
    /// It is on that device's link: no router is in between.
    pub on_link: bool,
}

/// Where the kernel's routes lead for an address; none: nowhere, or no further than here.
pub fn towards(netlink: &mut Netlink, address: IpAddr) -> Result<Option<Towards>, Error> {
    let Some(route) = look_up(netlink, address)?.filter(|route| route.header.kind == RouteType::Unicast) else {
        return Ok(None);
    };
    let device =
        route.attributes.iter().find_map(|a| if let RouteAttribute::Oif(device) = a { Some(*device) } else { None });
    let routed = |a: &RouteAttribute| matches!(a, RouteAttribute::Gateway(_) | RouteAttribute::Via(_));
    Ok(device.map(|device| Towards { device, on_link: !route.attributes.iter().any(routed) }))
}

/// Whether the kernel takes what is for an address for its own.
pub fn is_local(netlink: &mut Netlink, address: IpAddr) -> Result<bool, Error> {
    Ok(look_up(netlink, address)?.is_some_and(|route| route.header.kind == RouteType::Local))
}

fn look_up(netlink: &mut Netlink, address: IpAddr) -> Result<Option<RouteMessage>, Error> {
    let mut message = RouteMessage::default();
    let host = host_range(address);
    message.header.address_family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.destination_prefix_length = host.prefix_len();
    message.attributes.push(RouteAttribute::Destination(address.into()));
    let answers =
        match netlink.request(Request::new(format!("look up the route to {address}"), Message::GetRoute(message), 0)) {
            Err(error) if matches!(error.errno(), Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES)) => {
                return Ok(None);
            }
            answers => answers?,
        };
    Ok(answers.into_iter().find_map(|answer| if let Message::NewRoute(route) = answer { Some(route) } else { None }))
}

/// The device that the kernel's routes lead to for an address; none: they lead nowhere.
pub fn device_towards(netlink: &mut Netlink, address: IpAddr) -> Result<Option<u32>, Error> {
    Ok(towards(netlink, address)?.map(|towards| towards.device))
}

/// Indexes of the devices that default routes of the main table lead to, whosever the routes are.
pub fn default_devices(netlink: &mut Netlink) -> Result<Vec<u32>, Error> {
    let mut devices = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        for route in in_main(netlink, family)?.iter().filter(|route| route.header.destination_prefix_length == 0) {
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Oif(device) => devices.push(*device),
                    RouteAttribute::MultiPath(hops) => devices.extend(hops.iter().map(|hop| hop.interface_index)),
                    _ => {}
                }
            }
        }
    }
    devices.sort_unstable();
    devices.dedup();
    Ok(devices)
}

/// What IPv6 routes of others lead to, main table: destination and index of the device.
pub fn of_others_v6(netlink: &mut Netlink) -> Result<BTreeMap<IpNet, u32>, Error> {
    let mut led = BTreeMap::new();
    for route in in_main(netlink, AddressFamily::Inet6)? {
        let device =
            route.attributes.iter().find_map(|a| if let RouteAttribute::Oif(to) = a { Some(*to) } else { None });
        if route.header.protocol != RouteProtocol::Other(PROTOCOL) {
            led.extend(destination_of(&route).zip(device));
        }
    }
    Ok(led)
}

/// Routes to somewhere, main table, whosever they are.
fn in_main(netlink: &mut Netlink, family: AddressFamily) -> Result<Vec<RouteMessage>, Error> {
    let mut filter = RouteMessage::default();
    filter.header.address_family = family;
    let answers = match netlink.dump("list the routes of the main table", Message::GetRoute(filter)) {
        Err(error) if error.is_absent() => return Ok(Vec::new()),
        answers => answers?,
    };
    let routes = answers.into_iter().filter_map(|m| if let Message::NewRoute(route) = m { Some(route) } else { None });
    let counts =
        |r: &RouteMessage| u32::from(r.header.table) == super::MAIN_TABLE && r.header.kind == RouteType::Unicast;
    Ok(routes.filter(counts).collect())
}

/// Makes our routes of `table` that lie in `scope` exactly `wanted`. What was changed, in words, and what could not be.
pub fn ensure(
    netlink: &mut Netlink,
    table: u32,
    scope: impl Fn(&Route) -> bool,
    wanted: &[Route],
) -> Result<(Vec<String>, Vec<Error>), Error> {
    ensure_or_yield(netlink, table, scope, wanted, |_| false)
}

/// As [`ensure`]; where `yields` says so, a route to the same destination that is not ours serves as well.
pub fn ensure_or_yield(
    netlink: &mut Netlink,
    table: u32,
    scope: impl Fn(&Route) -> bool,
    wanted: &[Route],
    yields: impl Fn(IpNet) -> bool,
) -> Result<(Vec<String>, Vec<Error>), Error> {
    let mut present: BTreeMap<(u32, IpNet), Route> =
        list(netlink, table)?.into_iter().filter(|route| scope(route)).map(|r| (r.key(), r)).collect();
    let mut requests = Vec::new();
    let mut yielding = Vec::new();
    for route in wanted {
        match present.remove(&route.key()) {
            Some(same) if same == *route => continue,
            Some(other) => {
                if let Some(turned) = route.turned_from(&other) {
                    requests.push(turned);
                    yielding.push(false);
                }
                requests.push(route.replace());
            }
            None => requests.push(route.add()),
        }
        yielding.push(yields(route.destination));
    }
    requests.extend(present.values().map(Route::delete));
    yielding.resize(requests.len(), false);
    let words: Vec<String> = requests.iter().map(|r| r.operation.clone()).collect();
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    for ((operation, result), yields) in words.into_iter().zip(netlink.batch(requests)).zip(yielding) {
        match result {
            Err(error) if yields && error.is_present() => {}
            Ok(()) => done.push(operation),
            Err(error) if operation.starts_with("delete") && error.is_absent() => {}
            Err(error) if error.is_present() => failed.push(Error::Refused(format!(
                "{operation}: a route to the same destination exists that is not ours; compare `ip route show proto {PROTOCOL}` \
                 with `ip route`, and remove it or choose other pod ranges"
            ))),
            Err(error) => failed.push(error),
        }
    }
    Ok((done, failed))
}

/// Where a route leads to; none: of a family that is not ours.
pub(crate) fn destination_of(message: &RouteMessage) -> Option<IpNet> {
    let given =
        message.attributes.iter().find_map(|a| if let RouteAttribute::Destination(to) = a { ip(to) } else { None });
    let any = match message.header.address_family {
        AddressFamily::Inet => IpAddr::from([0_u8; 4]),
        AddressFamily::Inet6 => IpAddr::from([0_u8; 16]),
        _ => return None,
    };
    IpNet::new(given.unwrap_or(any), message.header.destination_prefix_length).ok()
}

fn read(message: &RouteMessage) -> Option<Route> {
    let ours = message.header.protocol == RouteProtocol::Other(PROTOCOL);
    if !ours || !matches!(message.header.kind, RouteType::Unicast | RouteType::Unreachable) {
        return None;
    }
    let mut route = Route {
        table: u32::from(message.header.table),
        destination: host_range(IpAddr::from([0; 4])),
        device: 0,
        gateway: None,
        source: None,
        encap: None,
    };
    let mut destination = match message.header.address_family {
        AddressFamily::Inet => IpAddr::from([0_u8; 4]),
        AddressFamily::Inet6 => IpAddr::from([0_u8; 16]),
        _ => return None,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Destination(address) => destination = ip(address)?,
            // IPv6 says that refusal is the loopback device's.
            RouteAttribute::Oif(device) if message.header.kind == RouteType::Unicast => route.device = *device,
            RouteAttribute::Gateway(address) => route.gateway = ip(address),
            RouteAttribute::PrefSource(address) => route.source = ip(address),
            RouteAttribute::Encap(attributes) => route.encap = read_encap(attributes),
            _ => {}
        }
    }
    route.destination = IpNet::new(destination, message.header.destination_prefix_length).ok()?;
    Some(route)
}

fn read_encap(attributes: &[RouteLwTunnelEncap]) -> Option<Encap> {
    let (mut id, mut source, mut destination) = (None, None, None);
    for attribute in attributes {
        match attribute {
            RouteLwTunnelEncap::Ip(RouteIpTunnel::Id(value)) | RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Id(value)) => {
                id = u32::try_from(*value).ok();
            }
            RouteLwTunnelEncap::Ip(RouteIpTunnel::Source(a)) => source = Some(IpAddr::V4(*a)),
            RouteLwTunnelEncap::Ip(RouteIpTunnel::Destination(a)) => destination = Some(IpAddr::V4(*a)),
            RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Source(a)) => source = Some(IpAddr::V6(*a)),
            RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Destination(a)) => destination = Some(IpAddr::V6(*a)),
            _ => {}
        }
    }
    Some(Encap { id: id?, source: source?, destination: destination? })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(a) => Some(IpAddr::V4(*a)),
        RouteAddress::Inet6(a) => Some(IpAddr::V6(*a)),
        _ => None,
    }
}
