//! The frames of ARP (RFC 826, RFC 5227) and IPv6 neighbour discovery (RFC 4861) that say which device has an address: read, and made.
//! Pure. What is not well-formed is nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(super) use towpath_datapath::net::groups::solicited_node;

/// An Ethernet address.
pub(super) type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
const ETHERNET: usize = 14;
const IPV6: usize = 40;
const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;
const ICMPV6: u8 = 58;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const REQUEST: u16 = 1;
const REPLY: u16 = 2;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// What a frame says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// Who has this address?
    pub(super) asks: Option<Question>,
    /// An address, and the device that says it has it.
    pub(super) claims: Option<(IpAddr, Mac)>,
}

/// Who has this address?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// The address asked for.
    pub(super) target: IpAddr,
    /// Who asks.
    pub(super) mac: Mac,
    /// Its address; none: it has none yet, and asks to see whether it may have this one.
    pub(super) from: Option<IpAddr>,
}

fn array<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn word(frame: &[u8], at: usize) -> Option<u16> {
    array(frame, at).map(u16::from_be_bytes)
}

/// Whether a frame can come from there: no group has sent anything.
fn is_station(mac: Mac) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

/// Reads a frame.
pub(super) fn read(frame: &[u8]) -> Heard {
    let heard = match word(frame, 12) {
        Some(ETH_P_ARP) => read_arp(frame),
        Some(ETH_P_IPV6) => read_discovery(frame),
        _ => None,
    };
    heard.unwrap_or_default()
}

fn read_arp(frame: &[u8]) -> Option<Heard> {
    // Hardware Ethernet, protocol IPv4, lengths 6 and 4.
    if array(frame, ETHERNET)? != [0, 1, 0x08, 0, 6, 4] {
        return None;
    }
    let operation = word(frame, ETHERNET + 6)?;
    let mac: Mac = array(frame, ETHERNET + 8)?;
    let sender = Ipv4Addr::from(array::<4>(frame, ETHERNET + 14)?);
    let target = Ipv4Addr::from(array::<4>(frame, ETHERNET + 24)?);
    if !is_station(mac) || !matches!(operation, REQUEST | REPLY) {
        return None;
    }
    let from = (!sender.is_unspecified()).then_some(IpAddr::V4(sender));
    // Who announces its own address asks nobody.
    let asks = operation == REQUEST && sender != target;
    Some(Heard {
        asks: asks.then_some(Question { target: IpAddr::V4(target), mac, from }),
        claims: from.map(|address| (address, mac)),
    })
}

fn read_discovery(frame: &[u8]) -> Option<Heard> {
    let [_, hop_limit] = array(frame, ETHERNET + 6)?;
    let next_header: u8 = *frame.get(ETHERNET + 6)?;
    let source = Ipv6Addr::from(array::<16>(frame, ETHERNET + 8)?);
    let message = ETHERNET + IPV6;
    let [kind, code] = array(frame, message)?;
    // RFC 4861 §7.1: what passed a router has another hop limit.
    if hop_limit != 255 || next_header != ICMPV6 || code != 0 {
        return None;
    }
    let destination = Ipv6Addr::from(array::<16>(frame, ETHERNET + 24)?);
    let target = Ipv6Addr::from(array::<16>(frame, message + 8)?);
    let ethernet_source: Mac = array(frame, 6)?;
    let length = usize::from(word(frame, ETHERNET + 4)?);
    let body = frame.get(message..message + length)?;
    let options = body.get(24..)?;
    // What was damaged on the way would make us believe in a neighbour that is none.
    if target.is_multicast() || checksum(source, destination, body) != 0 {
        return None;
    }
    match kind {
        SOLICITATION => {
            let mac = option(options, 1).unwrap_or(ethernet_source);
            let from = (!source.is_unspecified()).then_some(IpAddr::V6(source));
            let asks = is_station(mac).then_some(Question { target: IpAddr::V6(target), mac, from });
            Some(Heard { asks, claims: None })
        }
        ADVERTISEMENT => {
            let mac = option(options, 2).unwrap_or(ethernet_source);
            Some(Heard { asks: None, claims: is_station(mac).then_some((IpAddr::V6(target), mac)) })
        }
        _ => None,
    }
}

/// The link-layer address in an option of that type.
fn option(mut options: &[u8], wanted: u8) -> Option<Mac> {
    while let [kind, units, ..] = options {
        let length = usize::from(*units) * 8;
        if length == 0 {
            return None;
        }
        if *kind == wanted {
            return array(options, 2);
        }
        options = options.get(length..)?;
    }
    None
}

fn ethernet(to: Mac, from: Mac, kind: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(ETHERNET + IPV6 + 32);
    frame.extend(to);
    frame.extend(from);
    frame.extend(kind.to_be_bytes());
    frame
}

fn arp(to: Mac, operation: u16, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut frame = ethernet(to, sender.0, ETH_P_ARP);
    frame.extend([0, 1, 0x08, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(sender.0);
    frame.extend(sender.1.octets());
    frame.extend(target.0);
    frame.extend(target.1.octets());
    frame
}

/// The Ethernet address of an IPv6 group (RFC 2464 §7).
fn group(address: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = address.octets();
    [0x33, 0x33, a, b, c, d]
}

fn discovery(macs: (Mac, Mac), addresses: (Ipv6Addr, Ipv6Addr), mut message: Vec<u8>) -> Vec<u8> {
    let ((to, from), (source, destination)) = (macs, addresses);
    let length = u16::try_from(message.len()).unwrap_or_default();
    let sum = checksum(source, destination, &message).to_be_bytes();
    if let Some(place) = message.get_mut(2..4) {
        place.copy_from_slice(&sum);
    }
    let mut frame = ethernet(to, from, ETH_P_IPV6);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend([ICMPV6, 255]);
    frame.extend(source.octets());
    frame.extend(destination.octets());
    frame.extend(message);
    frame
}

/// Of an ICMPv6 message with its pseudo-header (RFC 4443 §2.3).
fn checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let length = u32::try_from(message.len()).unwrap_or_default();
    let header =
        [source.octets().as_slice(), &destination.octets(), &length.to_be_bytes(), &[0, 0, 0, ICMPV6]].concat();
    let byte = |pair: &[u8], at: usize| u32::from(pair.get(at).copied().unwrap_or_default());
    let bytes = header.chunks(2).chain(message.chunks(2));
    let mut sum: u32 = bytes.map(|pair| byte(pair, 0) << 8 | byte(pair, 1)).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A neighbour advertisement's or solicitation's body: flags, target, and our link-layer address as option `option`.
fn about(kind: u8, flags: u8, target: Ipv6Addr, option: u8, mac: Option<Mac>) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, flags, 0, 0, 0];
    message.extend(target.octets());
    if let Some(mac) = mac {
        message.extend([option, 1]);
        message.extend(mac);
    }
    message
}

/// Solicited, and override (RFC 4861 §4.4).
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;

/// The answer to a question: `mac` has the address. `own` is our address on the device, for IPv6.
pub(super) fn answer(question: &Question, mac: Mac, own: Option<Ipv6Addr>) -> Vec<u8> {
    match question.target {
        IpAddr::V4(target) => {
            let asker = match question.from {
                Some(IpAddr::V4(from)) => from,
                _ => Ipv4Addr::UNSPECIFIED,
            };
            arp(question.mac, REPLY, (mac, target), (question.mac, asker))
        }
        IpAddr::V6(target) => {
            let source = own.unwrap_or(target);
            match question.from {
                Some(IpAddr::V6(from)) => {
                    let message = about(ADVERTISEMENT, SOLICITED | OVERRIDE, target, 2, Some(mac));
                    discovery((question.mac, mac), (source, from), message)
                }
                // Who asks without an address is told with everybody else (RFC 4861 §7.2.4).
                _ => {
                    let message = about(ADVERTISEMENT, OVERRIDE, target, 2, Some(mac));
                    discovery((group(ALL_NODES), mac), (source, ALL_NODES), message)
                }
            }
        }
    }
}

/// To everybody: `mac` has the address now. For IPv4 as a request and as a reply, since some believe only the one or the other.
pub(super) fn announcement(address: IpAddr, mac: Mac, own: Option<Ipv6Addr>) -> Vec<Vec<u8>> {
    match address {
        IpAddr::V4(address) => vec![
            arp(BROADCAST, REQUEST, (mac, address), ([0; 6], address)),
            arp(BROADCAST, REPLY, (mac, address), (BROADCAST, address)),
        ],
        IpAddr::V6(address) => {
            let message = about(ADVERTISEMENT, OVERRIDE, address, 2, Some(mac));
            vec![discovery((group(ALL_NODES), mac), (own.unwrap_or(address), ALL_NODES), message)]
        }
    }
}

/// Does anybody have this address? In a way that no neighbour learns anything from (RFC 5227 §2.1.1, RFC 4862 §5.4.2).
pub(super) fn probe(address: IpAddr, mac: Mac, own: Option<Ipv6Addr>) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => arp(BROADCAST, REQUEST, (mac, Ipv4Addr::UNSPECIFIED), ([0; 6], address)),
        IpAddr::V6(address) => {
            let to = solicited_node(address);
            let (source, mac_option) = own.map_or((Ipv6Addr::UNSPECIFIED, None), |own| (own, Some(mac)));
            let message = about(SOLICITATION, 0, address, 1, mac_option);
            discovery((group(to), mac), (source, to), message)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINE: Mac = [2, 0, 0, 0, 0, 1];
    const THEIRS: Mac = [2, 0, 0, 0, 0, 2];

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn six(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }

    #[test]
    fn an_answer_claims_the_address_to_who_asked() {
        for (target, from, own) in
            [("192.0.2.1", "192.0.2.9", None), ("2001:db8::1", "2001:db8::9", Some(six("fe80::1")))]
        {
            let question = Question { target: ip(target), mac: THEIRS, from: Some(ip(from)) };
            let frame = answer(&question, MINE, own);
            assert_eq!(frame[..6], THEIRS);
            assert_eq!(read(&frame), Heard { asks: None, claims: Some((ip(target), MINE)) });
        }
    }

    #[test]
    fn a_frame_of_a_kernel_is_read_and_answered_as_another_kernel_would() {
        // Who has 192.168.255.211? Tell 192.168.255.1.
        let mut request = [&BROADCAST[..], &THEIRS, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &THEIRS].concat();
        request.extend([192, 168, 255, 1, 0, 0, 0, 0, 0, 0, 192, 168, 255, 211]);
        let heard = read(&request);
        let question = heard.asks.unwrap();
        assert_eq!((question.target, question.from), (ip("192.168.255.211"), Some(ip("192.168.255.1"))));
        assert_eq!(heard.claims, Some((ip("192.168.255.1"), THEIRS)), "who asks says who it is");
        let reply = answer(&question, MINE, None);
        let expected = [&THEIRS[..], &MINE, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &MINE, &[192, 168, 255, 211], &THEIRS];
        assert_eq!(reply, [&expected.concat()[..], &[192, 168, 255, 1]].concat());
    }

    #[test]
    fn announcements_and_probes_ask_and_claim_what_they_should() {
        for address in ["192.0.2.1", "2001:db8::1"] {
            for frame in announcement(ip(address), MINE, None) {
                assert_eq!(read(&frame), Heard { asks: None, claims: Some((ip(address), MINE)) }, "{address}");
                assert!(frame[0] & 1 == 1, "to everybody");
            }
            let asked = read(&probe(ip(address), MINE, None));
            let question = Question { target: ip(address), mac: MINE, from: None };
            assert_eq!(asked, Heard { asks: Some(question), claims: None }, "nobody learns anything");
        }
        assert_eq!(solicited_node(six("2001:db8::1:2345:6789")), six("ff02::1:ff45:6789"));
        let (asked, to) =
            (probe(ip("2001:db8::12:3456"), MINE, Some(six("fe80::1"))), [0x33, 0x33, 0xff, 0x12, 0x34, 0x56]);
        assert_eq!(asked[..6], to);
    }

    #[test]
    fn the_checksum_is_that_of_a_known_message() {
        // Over a message with its own checksum in place the sum is 0xffff, so that its complement is 0.
        let frame = &announcement(ip("2001:db8::1"), MINE, Some(six("fe80::1")))[0];
        assert_eq!(checksum(six("fe80::1"), ALL_NODES, &frame[ETHERNET + IPV6..]), 0);
        // RFC 1071's own example as a body: 0001 f203 f4f5 f6f7 sum to ddf2, pseudo-header of 8 bytes of ICMPv6 between :: added.
        let sum = checksum(Ipv6Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED, &[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum, !(0xddf2 + 8 + 58));
    }

    #[test]
    fn what_was_damaged_or_cut_on_the_way_is_nothing() {
        let whole = announcement(ip("2001:db8::1"), MINE, Some(six("fe80::1"))).remove(0);
        for at in ETHERNET + 8..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            assert_eq!(read(&damaged), Heard::default(), "byte {at}");
        }
        assert_eq!(read(&whole[..whole.len() - 8]), Heard::default(), "shorter than it says");
    }

    #[test]
    fn what_passed_a_router_or_comes_from_a_group_is_nothing() {
        let mut routed = announcement(ip("2001:db8::1"), MINE, None).remove(0);
        routed[ETHERNET + 7] = 254;
        assert_eq!(read(&routed), Heard::default());
        assert_eq!(read(&announcement(ip("192.0.2.1"), [3, 0, 0, 0, 0, 1], None)[0]), Heard::default());
    }

    proptest! {
        #[test]
        fn nothing_that_comes_in_breaks_it(kind in prop_oneof![Just(ETH_P_ARP), Just(ETH_P_IPV6)],
                                           cut in 0..120_usize, noise in proptest::collection::vec(any::<u8>(), 0..120)) {
            let mut frame = probe(ip("2001:db8::1"), MINE, Some(six("fe80::1")));
            frame[12..14].copy_from_slice(&kind.to_be_bytes());
            frame.truncate(cut);
            frame.extend(&noise);
            let _ = read(&frame);
            for at in (ETHERNET..frame.len()).step_by(7) {
                let mut other = frame.clone();
                other[at] ^= 0xff;
                let _ = read(&other);
            }
        }
    }
}
