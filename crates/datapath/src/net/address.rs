//! Addresses on devices. Ours carry [`super::PROTOCOL`] (`IFA_PROTO`).

use std::collections::BTreeSet;
use std::net::IpAddr;

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressProtocol};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage as Message};

use super::PROTOCOL;
use super::error::Error;
use super::netlink::{Netlink, Request};

/// An address of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceAddress {
    /// Index of the device.
    pub device: u32,
    /// The address.
    pub address: IpAddr,
    /// Length of its on-link prefix.
    pub prefix_len: u8,
    /// Whether we put it there.
    pub ours: bool,
    /// Duplicate address detection still runs or has failed: not usable as a source.
    pub tentative: bool,
}

/// All addresses of the namespace.
pub fn list(netlink: &mut Netlink) -> Result<Vec<DeviceAddress>, Error> {
    let answers = netlink.dump("list addresses", Message::GetAddress(AddressMessage::default()))?;
    Ok(answers.into_iter().filter_map(|m| if let Message::NewAddress(a) = m { read(&a) } else { None }).collect())
}

/// Request: put `address` on the device as a host address (/32, or /128 without duplicate address detection).
pub fn add(device: u32, name: &str, address: IpAddr) -> Request {
    let message = message(device, address);
    Request::new(
        format!("add address {address} to device {name}"),
        Message::NewAddress(message),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

/// Request: take it away.
pub fn delete(device: u32, name: &str, address: IpAddr) -> Request {
    Request::new(
        format!("delete address {address} from device {name}"),
        Message::DelAddress(message(device, address)),
        0,
    )
}

/// Makes our addresses of `device` exactly `wanted`; what was added or deleted, in words. Addresses of others stay, and one
/// that is there already, whoever put it there, is left as it is.
pub fn ensure(netlink: &mut Netlink, device: u32, name: &str, wanted: &BTreeSet<IpAddr>) -> Result<Vec<String>, Error> {
    let present: Vec<DeviceAddress> = list(netlink)?.into_iter().filter(|a| a.device == device).collect();
    let mut requests = Vec::new();
    for address in wanted.iter().filter(|w| !present.iter().any(|p| p.address == **w)) {
        requests.push(add(device, name, *address));
    }
    for stale in present.iter().filter(|p| p.ours && !wanted.contains(&p.address)) {
        requests.push(delete(device, name, stale.address));
    }
    let done = requests.iter().map(|r| r.operation.clone()).collect();
    netlink.batch(requests).into_iter().collect::<Result<(), Error>>()?;
    Ok(done)
}

fn message(device: u32, address: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = device;
    message.attributes.push(AddressAttribute::Address(address));
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)));
    match address {
        IpAddr::V4(_) => {
            message.header.family = AddressFamily::Inet;
            message.header.prefix_len = 32;
        }
        IpAddr::V6(_) => {
            message.header.family = AddressFamily::Inet6;
            message.header.prefix_len = 128;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
    }
    message
}

pub(super) fn read(message: &AddressMessage) -> Option<DeviceAddress> {
    let (mut address, mut local, mut ours, mut tentative) = (None, None, false, false);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(a) => address = Some(*a),
            AddressAttribute::Local(a) => local = Some(*a),
            AddressAttribute::Protocol(AddressProtocol::Other(protocol)) => ours = *protocol == PROTOCOL,
            AddressAttribute::Flags(flags) => {
                tentative = flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed);
            }
            _ => {}
        }
    }
    Some(DeviceAddress {
        device: message.header.index,
        address: local.or(address)?,
        prefix_len: message.header.prefix_len,
        ours,
        tentative,
    })
}
