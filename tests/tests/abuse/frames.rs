//! Frames as an attacker writes them, byte by byte.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacket, EtherType, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv6Extensions,
    Ipv6Header, PacketBuilder,
};

pub(crate) type Mac = [u8; 6];

pub(crate) const ALL_NODES: IpAddr = IpAddr::V6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));
pub(crate) const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
pub(crate) const BROADCAST: Mac = [0xff; 6];
/// Of the nodes' VXLAN network.
pub(crate) const VNI: [u8; 3] = [0, 0, 116];
pub(crate) const VXLAN: u16 = 8472;

pub(crate) fn ip_headers(from: IpAddr, to: IpAddr) -> Result<IpHeaders> {
    Ok(match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let header = Ipv4Header {
                time_to_live: 64,
                source: from.octets(),
                destination: to.octets(),
                ..Ipv4Header::default()
            };
            IpHeaders::Ipv4(header, Ipv4Extensions::default())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let header =
                Ipv6Header { hop_limit: 64, source: from.octets(), destination: to.octets(), ..Ipv6Header::default() };
            IpHeaders::Ipv6(header, Ipv6Extensions::default())
        }
        _ => anyhow::bail!("{from} and {to} in one packet"),
    })
}

pub(crate) fn udp(macs: (Mac, Mac), from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Result<Vec<u8>> {
    udp_behind(macs, ip_headers(from.ip(), to.ip())?, (from.port(), to.port()), payload)
}

pub(crate) fn udp_behind(macs: (Mac, Mac), headers: IpHeaders, ports: (u16, u16), payload: &[u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(macs.0, macs.1).ip(headers).udp(ports.0, ports.1).write(&mut frame, payload)?;
    Ok(frame)
}

/// A packet of any protocol.
pub(crate) fn raw(macs: (Mac, Mac), headers: IpHeaders, protocol: IpNumber, payload: &[u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(macs.0, macs.1).ip(headers).write(&mut frame, protocol, payload)?;
    Ok(frame)
}

pub(crate) fn vxlan(vni: [u8; 3], inner: &[u8]) -> Vec<u8> {
    [[8, 0, 0, 0].as_slice(), &vni, &[0], inner].concat()
}

pub(crate) fn arp_reply(macs: (Mac, Mac), claimed: IpAddr, mark: &[u8]) -> Result<Vec<u8>> {
    let IpAddr::V4(claimed) = claimed else { anyhow::bail!("{claimed} in ARP") };
    let (hardware, operation) = (ArpHardwareId::ETHERNET, ArpOperation::REPLY);
    let packet =
        ArpPacket::new(hardware, EtherType::IPV4, operation, &macs.0, &claimed.octets(), &macs.1, &claimed.octets())?;
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(macs.0, macs.1).arp(packet).write(&mut frame)?;
    Ok([&frame, mark].concat())
}

/// Neighbour discovery of some type to all, with an option at its end that nobody knows.
pub(crate) fn discovery(mac: Mac, from: Ipv6Addr, kind: u8, body: &[u8], mark: &[u8]) -> Result<Vec<u8>> {
    discovery_to((mac, ALL_NODES_MAC), (from, ALL_NODES), kind, body, mark)
}

/// The same to anybody.
pub(crate) fn discovery_to(
    macs: (Mac, Mac),
    (from, to): (Ipv6Addr, IpAddr),
    kind: u8,
    body: &[u8],
    mark: &[u8],
) -> Result<Vec<u8>> {
    let IpHeaders::Ipv6(header, rest) = ip_headers(from.into(), to)? else { anyhow::bail!("not IPv6") };
    let headers = IpHeaders::Ipv6(Ipv6Header { hop_limit: 255, ..header }, rest);
    let option = [[253, u8::try_from((mark.len() + 2).div_ceil(8))?].as_slice(), mark, &[0; 8]].concat();
    let option = option.get(..(mark.len() + 2).div_ceil(8) * 8).context("too short")?;
    let (word, body) = body.split_first_chunk::<4>().context("too short")?;
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(macs.0, macs.1)
        .ip(headers)
        .icmpv6_raw(kind, 0, *word)
        .write(&mut frame, &[body, option].concat())?;
    Ok(frame)
}

/// A frame with the tag of a VLAN (IEEE 802.1Q); 0 names none and is taken for a frame without one.
pub(crate) fn tagged(frame: &[u8], vlan: u16) -> Result<Vec<u8>> {
    let (macs, rest) = frame.split_at_checked(12).context("no frame")?;
    Ok([macs, &[0x81, 0], &vlan.to_be_bytes(), rest].concat())
}

/// An ICMP error that quotes a packet.
pub(crate) fn complaint(
    macs: (Mac, Mac),
    from: IpAddr,
    to: IpAddr,
    [kind, code]: [u8; 2],
    quoted: &[u8],
) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    let start = PacketBuilder::ethernet2(macs.0, macs.1).ip(ip_headers(from, to)?);
    let quoted = quoted.get(14..).context("no frame")?;
    if from.is_ipv4() {
        start.icmpv4_raw(kind, code, [0, 0, 2, 88]).write(&mut frame, quoted)?;
    } else {
        start.icmpv6_raw(kind, code, [0, 0, 5, 0]).write(&mut frame, quoted)?;
    }
    Ok(frame)
}

pub(crate) fn tcp_reset(macs: (Mac, Mac), from: SocketAddr, to: SocketAddr, mark: &[u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(macs.0, macs.1)
        .ip(ip_headers(from.ip(), to.ip())?)
        .tcp(from.port(), to.port(), 1000, 1000)
        .rst()
        .write(&mut frame, mark)?;
    Ok(frame)
}
