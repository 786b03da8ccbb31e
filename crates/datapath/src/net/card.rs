//! The MAC addresses that a network card lets in besides its own (`bridge fdb show dev …`, entries `self`): those of pods that are on its link.
//!
//! The kernel keeps them with the card, whoever asked for them, so they outlive agents. What is ours is told by the beginning of the address, or by
//! who knows which MAC addresses pods chose.

use std::collections::BTreeSet;

use rtnetlink::packet_core::NLM_F_CREATE;
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage as Message};

use super::error::Error;
use super::mac;
use super::netlink::{Netlink, Request};

fn message(device: u32, address: [u8; 6]) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = device;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(address.to_vec()));
    message
}

/// Request: let frames for this address in.
pub fn let_in(device: u32, name: &str, address: [u8; 6]) -> Request {
    let operation = format!("let frames for {} in at device {name}", mac::text(address));
    Request::new(operation, Message::NewNeighbour(message(device, address)), NLM_F_CREATE)
}

/// Request: let them in no longer.
pub fn keep_out(device: u32, name: &str, address: [u8; 6]) -> Request {
    let operation = format!("let frames for {} in at device {name} no longer", mac::text(address));
    Request::new(operation, Message::DelNeighbour(message(device, address)), 0)
}

/// Those that are let in and are pods' of this network: by how they begin, or because they are among those `chosen`.
pub fn ours(netlink: &mut Netlink, device: u32, chosen: &BTreeSet<[u8; 6]>) -> Result<BTreeSet<[u8; 6]>, Error> {
    let mut filter = NeighbourMessage::default();
    filter.header.family = AddressFamily::Bridge;
    filter.header.ifindex = device;
    let mut found = BTreeSet::new();
    for answer in netlink.dump("list what a card lets in", Message::GetNeighbour(filter))? {
        let Message::NewNeighbour(entry) = answer else { continue };
        if entry.header.ifindex != device || !entry.header.flags.contains(NeighbourFlags::Own) {
            continue;
        }
        for attribute in &entry.attributes {
            if let NeighbourAttribute::LinkLayerAddress(bytes) = attribute
                && let Ok(address) = <[u8; 6]>::try_from(bytes.as_slice())
                && (mac::is_of_pod(address) || chosen.contains(&address))
            {
                found.insert(address);
            }
        }
    }
    Ok(found)
}
