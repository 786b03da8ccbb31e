//! Devices: what is there, and making, changing and deleting ours.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage as Message;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage, State,
};

use super::error::Error;
use super::netlink::{Netlink, Request};

/// The VXLAN device of the node.
pub const TUNNEL_DEVICE: &str = "towpath-vx";

/// Device group (`IFLA_GROUP`) of pods' devices that are about to be deleted together.
const DOOMED: u32 = 0x7470_0116;

/// A device, as far as we care.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether it sends: up, with a carrier that the kernel has acted upon (RFC 2863 ifOperStatus).
    pub operational: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// Packets that may wait to be sent.
    pub queue: u32,
    /// Hardware address, for Ethernet.
    pub mac: Option<[u8; 6]>,
    /// `veth`, `vxlan`, `bridge`, …; none for a plain device.
    pub kind: Option<InfoKind>,
    /// Of a VXLAN device: collects metadata, and its UDP port.
    pub vxlan: Option<(bool, u16)>,
    /// Of a VXLAN device that does not collect metadata: its network identifier.
    pub vni: Option<u32>,
}

/// All devices of the namespace.
pub fn list(netlink: &mut Netlink) -> Result<Vec<Link>, Error> {
    let answers = netlink.dump("list network devices", Message::GetLink(LinkMessage::default()))?;
    Ok(answers
        .into_iter()
        .filter_map(|m| if let Message::NewLink(link) = m { Some(read(link)) } else { None })
        .collect())
}

/// The device of that name, none when there is none.
pub fn by_name(netlink: &mut Netlink, name: &str) -> Result<Option<Link>, Error> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    match netlink.request(Request::new(format!("look up device {name}"), Message::GetLink(message), 0)) {
        Ok(answers) => {
            Ok(answers.into_iter().find_map(|m| if let Message::NewLink(link) = m { Some(read(link)) } else { None }))
        }
        Err(error) if error.is_absent() => Ok(None),
        Err(error) => Err(error),
    }
}

/// As [`by_name`], but an absent device is an error.
pub fn existing(netlink: &mut Netlink, name: &str) -> Result<Link, Error> {
    by_name(netlink, name)?.ok_or_else(|| Error::Refused(format!("device {name} is not there")))
}

/// Waits until the device sends, at most `patience`; whether it does. A veth's side that came up before its peer got its
/// carrier later, and until the kernel's link watcher has run it silently drops what it should send.
pub fn operational(netlink: &mut Netlink, name: &str, patience: Duration) -> Result<bool, Error> {
    let deadline = Instant::now() + patience;
    while !existing(netlink, name)?.operational {
        if Instant::now() > deadline {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(true)
}

/// A veth pair to make, both sides down.
#[derive(Debug)]
pub struct Veth<'a> {
    /// Name in our namespace.
    pub host_name: &'a str,
    /// MAC of that side.
    pub host_mac: [u8; 6],
    /// Name in the pod.
    pub pod_name: &'a str,
    /// MAC of the pod's side.
    pub pod_mac: [u8; 6],
    /// The pod's network namespace.
    pub pod_netns: BorrowedFd<'a>,
    /// MTU of both sides in bytes.
    pub mtu: u32,
}

/// Makes a veth pair, the far side directly in the pod's namespace.
pub fn create_veth(netlink: &mut Netlink, veth: &Veth<'_>) -> Result<(), Error> {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(veth.pod_name.to_owned()),
        LinkAttribute::Address(veth.pod_mac.to_vec()),
        LinkAttribute::Mtu(veth.mtu),
        LinkAttribute::NetNsFd(veth.pod_netns.as_raw_fd()),
    ];
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(veth.host_name.to_owned()),
        LinkAttribute::Address(veth.host_mac.to_vec()),
        LinkAttribute::Mtu(veth.mtu),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    let operation = format!("make veth pair {} and {} (in the pod)", veth.host_name, veth.pod_name);
    netlink.request(Request::new(operation, Message::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)).map(drop)
}

/// Makes the node's VXLAN device, down: it takes tunnel keys from routes and programs (collect metadata), learns nothing
/// and asks nobody.
pub fn create_vxlan(netlink: &mut Netlink, name: &str, mac: [u8; 6], port: u16, mtu: u32) -> Result<(), Error> {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Address(mac.to_vec()),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(vec![
                InfoVxlan::CollectMetadata(true),
                InfoVxlan::Learning(false),
                InfoVxlan::Port(port),
                InfoVxlan::UDPCsum(true),
            ])),
        ]),
    ];
    let request = Request::new(
        format!("make VXLAN device {name} on UDP port {port}"),
        Message::NewLink(message),
        NLM_F_CREATE | NLM_F_EXCL,
    );
    match netlink.request(request) {
        Err(error) if error.errno() == Some(libc::EADDRINUSE) => Err(Error::Refused(format!(
            "{error}: another VXLAN device or program has the port; find it with `ip -d link show type vxlan` and \
             `ss -ulnp sport = :{port}`, or set another vxlanPort"
        ))),
        other => other.map(drop),
    }
}

/// Deletes a device; fine when it is gone already.
pub fn delete(netlink: &mut Netlink, index: u32, name: &str) -> Result<(), Error> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    match netlink.request(Request::new(format!("delete device {name}"), Message::DelLink(message), 0)) {
        Err(error) if error.is_absent() => Ok(()),
        other => other.map(drop),
    }
}

/// Deletes devices in one step: the kernel waits for packets in flight once, not once for each. Fine when some are gone
/// already.
pub fn delete_all(netlink: &mut Netlink, devices: &[(u32, &str)]) -> Result<(), Error> {
    if let [(index, name)] = devices {
        return delete(netlink, *index, name);
    }
    let mark =
        |(index, name): &(u32, &str)| change(*index, format!("mark device {name}"), LinkAttribute::Group(DOOMED));
    let mut any = false;
    for marked in netlink.batch(devices.iter().map(mark).collect()) {
        match marked {
            Err(error) if error.is_absent() => {}
            other => {
                other?;
                any = true;
            }
        }
    }
    if !any {
        return Ok(());
    }
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::Group(DOOMED));
    let operation = format!("delete {} devices of former pods", devices.len());
    match netlink.request(Request::new(operation, Message::DelLink(message), 0)) {
        Err(error) if error.is_absent() => Ok(()),
        other => other.map(drop),
    }
}

/// Request: bring the device up.
pub fn up(index: u32, name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    Request::new(format!("bring device {name} up"), Message::SetLink(message), 0)
}

/// Request: set MTU, in bytes.
pub fn set_mtu(index: u32, name: &str, mtu: u32) -> Request {
    change(index, format!("set MTU {mtu} on device {name}"), LinkAttribute::Mtu(mtu))
}

/// Request: how many packets may wait to be sent.
pub fn set_queue(index: u32, name: &str, packets: u32) -> Request {
    change(index, format!("let {packets} packets wait at device {name}"), LinkAttribute::TxQueueLen(packets))
}

/// Request: set the hardware address.
pub fn set_mac(index: u32, name: &str, mac: [u8; 6]) -> Request {
    change(index, format!("set MAC {} on device {name}", super::mac::text(mac)), LinkAttribute::Address(mac.to_vec()))
}

/// Request: no IPv6 link-local address (and so no duplicate address detection) when the device comes up.
pub fn no_link_local(index: u32, name: &str) -> Request {
    let none = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    change(
        index,
        format!("turn IPv6 link-local addresses off on device {name}"),
        LinkAttribute::AfSpecUnspec(vec![none]),
    )
}

fn change(index: u32, operation: String, attribute: LinkAttribute) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(attribute);
    Request::new(operation, Message::SetLink(message), 0)
}

fn read(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        up: message.header.flags.contains(LinkFlags::Up),
        operational: false,
        mtu: 0,
        queue: 0,
        mac: None,
        kind: None,
        vxlan: None,
        vni: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::TxQueueLen(packets) => link.queue = packets,
            LinkAttribute::OperState(state) => link.operational = matches!(state, State::Up | State::Unknown),
            LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok(),
            LinkAttribute::LinkInfo(infos) => read_info(&mut link, infos),
            _ => {}
        }
    }
    link
}

fn read_info(link: &mut Link, infos: Vec<LinkInfo>) {
    for info in infos {
        match info {
            LinkInfo::Kind(kind) => link.kind = Some(kind),
            LinkInfo::Data(InfoData::Vxlan(facts)) => {
                let collect = facts.iter().any(|f| matches!(f, InfoVxlan::CollectMetadata(true)));
                let port = facts.iter().find_map(|f| if let InfoVxlan::Port(port) = f { Some(*port) } else { None });
                let vni = facts.iter().find_map(|f| if let InfoVxlan::Id(id) = f { Some(*id) } else { None });
                link.vxlan = Some((collect, port.unwrap_or(0)));
                link.vni = vni.filter(|_| !collect);
            }
            _ => {}
        }
    }
}
