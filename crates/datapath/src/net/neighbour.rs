//! Permanent neighbour entries: nobody is ever asked for the addresses of pods, gateways and tunnel ends.

use std::collections::BTreeMap;
use std::net::IpAddr;

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage as Message};

use super::error::Error;
use super::mac;
use super::netlink::{Netlink, Request};

/// Request: `address` is at `mac` on the device, for ever.
pub fn set(device: u32, name: &str, address: IpAddr, mac: [u8; 6]) -> Request {
    let mut message = message(device, address);
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    let operation = format!("set neighbour {address} at {} on device {name}", mac::text(mac));
    Request::new(operation, Message::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// A neighbour on the device that has this MAC address, as far as the kernel has heard.
pub fn with_mac(netlink: &mut Netlink, device: u32, mac: [u8; 6]) -> Result<Option<IpAddr>, Error> {
    Ok(entries(netlink, device, |_| true)?.into_iter().find(|(_, of)| *of == mac).map(|(address, _)| address))
}

/// The permanent entries of a device. Entries without a MAC are left out.
pub fn list(netlink: &mut Netlink, device: u32) -> Result<BTreeMap<IpAddr, [u8; 6]>, Error> {
    entries(netlink, device, |state| state == NeighbourState::Permanent)
}

fn entries(
    netlink: &mut Netlink,
    device: u32,
    wanted: impl Fn(NeighbourState) -> bool,
) -> Result<BTreeMap<IpAddr, [u8; 6]>, Error> {
    let mut entries = BTreeMap::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut filter = NeighbourMessage::default();
        filter.header.family = family;
        filter.attributes.push(NeighbourAttribute::IfIndex(device));
        for answer in netlink.dump("list neighbours", Message::GetNeighbour(filter))? {
            let Message::NewNeighbour(entry) = answer else { continue };
            if entry.header.ifindex == device && wanted(entry.header.state) {
                entries.extend(read(&entry));
            }
        }
    }
    Ok(entries)
}

/// Makes the permanent entries of `device`, a device of ours, exactly `wanted`; what was changed, in words.
pub fn ensure(
    netlink: &mut Netlink,
    device: u32,
    name: &str,
    wanted: &BTreeMap<IpAddr, [u8; 6]>,
) -> Result<Vec<String>, Error> {
    let present = list(netlink, device)?;
    let mut requests = Vec::new();
    for (address, mac) in wanted.iter().filter(|(address, mac)| present.get(address) != Some(mac)) {
        requests.push(set(device, name, *address, *mac));
    }
    for address in present.keys().filter(|address| !wanted.contains_key(address)) {
        let operation = format!("delete neighbour {address} from device {name}");
        requests.push(Request::new(operation, Message::DelNeighbour(message(device, *address)), 0));
    }
    let done = requests.iter().map(|r| r.operation.clone()).collect();
    for result in netlink.batch(requests) {
        match result {
            Err(error) if error.is_absent() => {}
            other => other?,
        }
    }
    Ok(done)
}

/// Makes permanent entries on a device that is not ours: what is there besides stays. What was changed, in words.
pub fn ensure_among(
    netlink: &mut Netlink,
    device: u32,
    name: &str,
    wanted: &BTreeMap<IpAddr, [u8; 6]>,
) -> Result<Vec<String>, Error> {
    let present = list(netlink, device)?;
    let missing = wanted.iter().filter(|(address, mac)| present.get(address) != Some(mac));
    let requests: Vec<Request> = missing.map(|(address, mac)| set(device, name, *address, *mac)).collect();
    let done = requests.iter().map(|r| r.operation.clone()).collect();
    netlink.batch(requests).into_iter().collect::<Result<(), Error>>()?;
    Ok(done)
}

/// Request: answer on the device for an address that is elsewhere (a proxy entry; IPv6 answers for nothing else, RFC 4861 §7.2.8).
pub fn answer_for(device: u32, name: &str, address: IpAddr) -> Request {
    let mut message = message(device, address);
    message.header.flags = NeighbourFlags::Proxy;
    Request::new(format!("answer for {address} on device {name}"), Message::NewNeighbour(message), NLM_F_CREATE)
}

/// Request: answer for it no longer.
pub fn no_longer_answer_for(device: u32, name: &str, address: IpAddr) -> Request {
    let mut message = message(device, address);
    message.header.flags = NeighbourFlags::Proxy;
    Request::new(format!("no longer answer for {address} on device {name}"), Message::DelNeighbour(message), 0)
}

/// The forwarding table of a VXLAN device: the outer destination of each MAC address.
pub fn forwarding(netlink: &mut Netlink, device: u32) -> Result<BTreeMap<[u8; 6], IpAddr>, Error> {
    let mut filter = NeighbourMessage::default();
    filter.header.family = AddressFamily::Bridge;
    filter.header.ifindex = device;
    let mut entries = BTreeMap::new();
    for answer in netlink.dump("list a VXLAN device's forwarding table", Message::GetNeighbour(filter))? {
        let Message::NewNeighbour(entry) = answer else { continue };
        if entry.header.ifindex != device {
            continue;
        }
        let (mut address, mut mac) = (None, None);
        for attribute in &entry.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => address = from_bytes(bytes),
                NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.clone().try_into().ok(),
                _ => {}
            }
        }
        entries.extend(mac.zip(address));
    }
    Ok(entries)
}

fn from_bytes(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// Has a VXLAN device that is not ours send frames for each MAC address to an outer destination; what is there besides stays. What
/// was changed, in words.
pub fn ensure_forwarding(
    netlink: &mut Netlink,
    device: u32,
    name: &str,
    wanted: &BTreeMap<[u8; 6], IpAddr>,
) -> Result<Vec<String>, Error> {
    let present = forwarding(netlink, device)?;
    let missing = wanted.iter().filter(|(mac, address)| present.get(*mac) != Some(address));
    let request = |(mac, address): (&[u8; 6], &IpAddr)| {
        let bytes = match address {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = device;
        message.header.state = NeighbourState::Permanent;
        message.header.flags = NeighbourFlags::Own;
        message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        let operation = format!("send frames for {} on device {name} to {address}", mac::text(*mac));
        Request::new(operation, Message::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
    };
    let requests: Vec<Request> = missing.map(request).collect();
    let done = requests.iter().map(|r| r.operation.clone()).collect();
    netlink.batch(requests).into_iter().collect::<Result<(), Error>>()?;
    Ok(done)
}

fn message(device: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.ifindex = device;
    message.attributes.push(NeighbourAttribute::Destination(address.into()));
    message
}

fn read(message: &NeighbourMessage) -> Option<(IpAddr, [u8; 6])> {
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => address = Some(IpAddr::V4(*a)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => address = Some(IpAddr::V6(*a)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.clone().try_into().ok(),
            _ => {}
        }
    }
    Some((address?, mac?))
}
