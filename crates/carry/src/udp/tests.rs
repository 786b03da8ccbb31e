//! Cutting and joining, against packets that are built and judged here by other means: sums are added up in full, never adjusted.

use std::io::IoSlice;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use towpath_datapath::datagrams::Datagram;
use towpath_datapath::udp_names::mac_of as mac;

use super::bytes::{fold, sum};
use super::frame::{FRONT, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP, HEAD, Head, Unfinished, Vnet};
use super::join::{Joiner, Refused};
use super::nodes::Nodes;
use super::split::{Outbox, Unsent};

const NETWORK: u32 = 0x0a_0b0c;
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const THERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
const HERE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const THERE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const FIN: u8 = 0x01;
const CWR: u8 = 0x80;

/// A packet as a pod's kernel leaves it: its checksum is the sum of the pseudo header.
#[derive(Clone, Debug)]
struct Packet {
    v6: bool,
    tcp: bool,
    /// Bytes of TCP options, a multiple of four.
    options: usize,
    id: u16,
    sequence: u32,
    flags: u8,
    payload: Vec<u8>,
}

impl Packet {
    fn l4(&self) -> usize {
        if self.v6 { 40 } else { 20 }
    }

    fn headers(&self) -> usize {
        self.l4() + if self.tcp { 20 + self.options } else { 8 }
    }

    fn unfinished(&self) -> Unfinished {
        Unfinished { start: self.l4() as u16, offset: if self.tcp { 16 } else { 6 } }
    }

    fn bytes(&self) -> Vec<u8> {
        let whole = self.headers() + self.payload.len();
        let protocol = if self.tcp { 6 } else { 17 };
        let mut bytes = if self.v6 {
            let mut ip = vec![0x60, 3, 0, 9];
            ip.extend(((whole - 40) as u16).to_be_bytes());
            ip.extend([protocol, 63]);
            ip.extend([0xfd, 1].into_iter().chain([7; 14]).chain([0xfd, 2]).chain([9; 14]));
            ip
        } else {
            let mut ip = vec![0x45, 3];
            ip.extend((whole as u16).to_be_bytes());
            ip.extend(self.id.to_be_bytes());
            ip.extend([0, 0, 63, protocol, 0, 0, 10, 1, 0, 10, 10, 2, 0, 20]);
            let check = !fold(sum(&ip));
            ip[10..12].copy_from_slice(&check.to_be_bytes());
            ip
        };
        bytes.extend([0x30, 0x39, 0, 80]);
        if self.tcp {
            bytes.extend(self.sequence.to_be_bytes());
            bytes.extend([0, 0, 0, 77, ((20 + self.options) / 4 * 16) as u8, self.flags, 1, 2, 0, 0, 0, 0]);
            bytes.extend((0..self.options).map(|n| n as u8 + 1));
        } else {
            bytes.extend(((whole - self.l4()) as u16).to_be_bytes());
            bytes.extend([0, 0]);
        }
        bytes.extend(&self.payload);
        let at = self.l4() + usize::from(self.unfinished().offset);
        let pseudo = pseudo(&bytes);
        bytes[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
        bytes
    }

    fn gso(&self) -> u8 {
        match (self.tcp, self.v6) {
            (true, false) => GSO_TCPV4,
            (true, true) => GSO_TCPV6,
            (false, _) => GSO_UDP,
        }
    }

    /// As the device gives it; `segment`: into what it is to be cut, 0: it is not.
    fn frame(&self, segment: u16) -> Vec<u8> {
        let gso = if segment == 0 { GSO_NONE } else { self.gso() };
        let headers = if segment == 0 { 0 } else { (14 + self.headers()) as u16 };
        frame(Vnet { gso, headers, segment, unfinished: Some(self.unfinished()) }, &self.bytes())
    }
}

fn frame(vnet: Vnet, packet: &[u8]) -> Vec<u8> {
    let kind = if packet.first().is_some_and(|first| first >> 4 == 6) { [0x86, 0xdd] } else { [8, 0] };
    let ethernet: Vec<u8> = mac(THERE).into_iter().chain(mac(HERE)).chain(kind).collect();
    [vnet.bytes().as_slice(), &ethernet, packet].concat()
}

/// The sum of the pseudo header (RFC 9293 3.1, RFC 8200 8.1) of what the packet carries.
fn pseudo(packet: &[u8]) -> u16 {
    let (addresses, protocol, l4) = match packet[0] >> 4 {
        4 => (&packet[12..20], packet[9], 20),
        _ => (&packet[8..40], packet[6], 40),
    };
    fold(sum(addresses) + u32::from(protocol) + (packet.len() - l4) as u32)
}

/// Makes the checksum as the last one who may does, and says whether the packet is right in all.
#[track_caller]
fn finish_and_judge(packet: &[u8], unfinished: Unfinished) {
    let mut packet = packet.to_vec();
    let (start, at) = (usize::from(unfinished.start), usize::from(unfinished.start + unfinished.offset));
    let check = !fold(sum(&packet[start..]));
    packet[at..at + 2].copy_from_slice(&check.to_be_bytes());
    assert_eq!(fold(sum(&packet[start..]) + u32::from(pseudo(&packet))), 0xffff, "checksum of the transport");
    if packet[0] >> 4 == 4 {
        assert_eq!(fold(sum(&packet[..20])), 0xffff, "checksum of the header");
        assert_eq!(usize::from(u16::from_be_bytes([packet[2], packet[3]])), packet.len());
    } else {
        assert_eq!(usize::from(u16::from_be_bytes([packet[4], packet[5]])) + 40, packet.len());
    }
}

fn put(outbox: &mut Outbox, frame: &[u8]) -> Result<(), Unsent> {
    outbox.room().unwrap()[..frame.len()].copy_from_slice(frame);
    outbox.take(frame.len())
}

/// The datagrams of an outbox, in order, and what the node goes by that each is for; what the kernel asks of a train is asked here.
fn datagrams(outbox: &Outbox) -> Vec<([u8; 6], Vec<u8>)> {
    let mut all = Vec::new();
    for train in outbox.trains() {
        let lengths: Vec<usize> = train.pieces.chunks(2).map(|two| two[0].len() + two[1].len()).collect();
        let (last, others) = lengths.split_last().unwrap();
        assert!(others.iter().all(|length| *length == train.segment) && *last <= train.segment, "{lengths:?}");
        assert!(lengths.len() <= 64 && lengths.iter().sum::<usize>() <= 65507, "{lengths:?}");
        all.extend(train.pieces.chunks(2).map(|two| (train.to, [&two[0][..], &two[1][..]].concat())));
    }
    all
}

/// The frames that datagrams become, from whom each came.
fn join(all: &[(IpAddr, Vec<u8>)]) -> (Vec<Vec<u8>>, Vec<Refused>) {
    let unmarked: Vec<_> = all.iter().map(|(from, bytes)| Datagram { from: *from, ecn: 0, bytes }).collect();
    join_marked(&unmarked)
}

fn join_marked(all: &[Datagram<'_>]) -> (Vec<Vec<u8>>, Vec<Refused>) {
    join_at(HERE, all)
}

fn join_at(here: IpAddr, all: &[Datagram<'_>]) -> (Vec<Vec<u8>>, Vec<Refused>) {
    let (mut frames, mut refused) = (Vec::new(), Vec::new());
    let mut joiner = Joiner::new(NETWORK, here, true);
    let mut write = |front: &[u8], bodies: &[IoSlice<'_>]| {
        let bodies: Vec<u8> = bodies.iter().flat_map(|body| body.to_vec()).collect();
        frames.push([front, &bodies].concat());
    };
    for datagram in all {
        refused.extend(joiner.take(*datagram, &mut write).err());
    }
    joiner.flush(&mut write);
    (frames, refused)
}

fn sent(packet: &Packet, segment: u16) -> Vec<([u8; 6], Vec<u8>)> {
    let mut outbox = Outbox::new(NETWORK);
    put(&mut outbox, &packet.frame(segment)).unwrap();
    datagrams(&outbox)
}

fn packets() -> impl Strategy<Value = (Packet, u16)> {
    let shape = (any::<bool>(), any::<bool>(), 0_usize..=10, any::<u16>(), any::<u32>());
    (shape, prop::sample::select(vec![0, PSH, FIN | PSH, CWR | PSH]), 1_u16..3000, any::<u64>()).prop_flat_map(
        |((v6, tcp, words, id, sequence), more, segment, seed)| {
            let most = usize::from(segment).saturating_mul(if tcp { 1000 } else { 64 }).min(65_000);
            (1..=most).prop_map(move |length| {
                let payload = (0..length).map(|n| (n as u64).wrapping_mul(seed | 1).to_le_bytes()[3]).collect();
                let options = if tcp { words * 4 } else { 0 };
                (Packet { v6, tcp, options, id, sequence, flags: ACK | more, payload }, segment)
            })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn what_is_cut_is_whole_packets_with_all_that_each_must_say((packet, segment) in packets()) {
        let all = sent(&packet, segment);
        let mut payload: Vec<u8> = Vec::new();
        for (number, (to, datagram)) in all.iter().enumerate() {
            let (head, inner) = Head::read(datagram).unwrap();
            prop_assert_eq!((*to, head.network, head.unfinished), (mac(THERE), NETWORK, Some(packet.unfinished())));
            finish_and_judge(inner, packet.unfinished());
            if !packet.v6 {
                let id = packet.id.wrapping_add(number as u16);
                prop_assert_eq!(inner[4..6].to_vec(), id.to_be_bytes().to_vec());
            }
            if packet.tcp {
                let l4 = packet.l4();
                let sequence = packet.sequence.wrapping_add(payload.len() as u32);
                prop_assert_eq!(inner[l4 + 4..l4 + 8].to_vec(), sequence.to_be_bytes().to_vec());
                let last = number + 1 == all.len();
                let flags = packet.flags & if last { 0xff } else { !(FIN | PSH) } & if number > 0 { !CWR } else { 0xff };
                prop_assert_eq!(inner[l4 + 13], flags);
            }
            payload.extend(&inner[packet.headers()..]);
            prop_assert!(inner.len() - packet.headers() <= usize::from(segment));
        }
        prop_assert_eq!(all.len(), packet.payload.len().div_ceil(usize::from(segment)));
        prop_assert_eq!(payload, packet.payload);
    }

    #[test]
    fn what_was_cut_is_joined_to_what_it_was((packet, segment) in packets()) {
        let packet = Packet { flags: packet.flags & (ACK | PSH), ..packet };
        let all: Vec<_> = sent(&packet, segment).into_iter().map(|(_, datagram)| (THERE, datagram)).collect();
        let (frames, refused) = join(&all);
        prop_assert!(refused.is_empty());
        // As many as the kernel takes in one write.
        prop_assert_eq!(frames.len(), all.len().div_ceil(1000));
        if let [one] = frames.as_slice() {
            let vnet = Vnet::read(one).unwrap();
            prop_assert_eq!(vnet.unfinished, Some(packet.unfinished()));
            if all.len() > 1 {
                prop_assert_eq!((vnet.gso, vnet.segment), (packet.gso(), segment));
                prop_assert_eq!(usize::from(vnet.headers), 14 + packet.headers());
            }
            prop_assert_eq!(one[10..22].to_vec(), [mac(HERE), mac(THERE)].concat());
            prop_assert_eq!(one[FRONT..].to_vec(), packet.bytes());
        }
    }

    #[test]
    fn no_datagram_and_no_frame_ends_the_process(
        mut datagram in prop::collection::vec(any::<u8>(), 0..200),
        spoiled in (any::<prop::sample::Index>(), any::<u8>()),
        (packet, segment) in packets(),
    ) {
        let random = [(THERE, datagram.clone())];
        drop(join(&random));
        if let Some(first) = datagram.first_mut() {
            *first = 0x11;
            drop(join(&[(THERE, datagram.clone())]));
        }
        // One byte of something good: the likelier way in.
        let mut all: Vec<_> = sent(&packet, segment).into_iter().map(|(_, datagram)| (THERE, datagram)).collect();
        let place = spoiled.0.index(all.len().min(3));
        let at = spoiled.0.index(all[place].1.len().min(HEAD + 60));
        all[place].1[at] ^= spoiled.1;
        let (frames, refused) = join(&all);
        prop_assert!(frames.iter().map(Vec::len).sum::<usize>() > 0 || !refused.is_empty());
        let mut frame = packet.frame(segment);
        let at = spoiled.0.index(frame.len().min(FRONT + 60));
        frame[at] ^= spoiled.1;
        let mut outbox = Outbox::new(NETWORK);
        if put(&mut outbox, &frame).is_ok() {
            datagrams(&outbox);
        }
        frame.truncate(at);
        if put(&mut outbox, &frame).is_ok() {
            datagrams(&outbox);
        }
    }
}

fn small(payload: &[u8]) -> Packet {
    Packet { v6: false, tcp: true, options: 12, id: 7, sequence: 1000, flags: ACK, payload: payload.to_vec() }
}

fn datagram(packet: &Packet) -> Vec<u8> {
    let head = Head { network: NETWORK, unfinished: Some(packet.unfinished()) };
    [head.bytes().as_slice(), &packet.bytes()].concat()
}

#[test]
fn only_what_follows_in_a_flow_is_joined() {
    let first = small(&[1; 100]);
    let next = Packet { id: 8, sequence: 1100, ..small(&[2; 100]) };
    let (frames, _) = join(&[(THERE, datagram(&first)), (THERE, datagram(&next))]);
    assert_eq!(frames.len(), 1, "this one is");
    let others = [
        ("a gap", Packet { sequence: 1101, ..next.clone() }),
        ("one again", Packet { sequence: 1000, ..next.clone() }),
        ("another's number", Packet { id: 9, ..next.clone() }),
        ("an end", Packet { flags: ACK | FIN, ..next.clone() }),
        ("an opening", Packet { flags: 2, ..next.clone() }),
        ("other options", Packet { options: 16, ..next.clone() }),
        ("more than the first", Packet { payload: vec![2; 101], ..next.clone() }),
        ("nothing but headers", Packet { payload: Vec::new(), ..next.clone() }),
        ("another family", Packet { v6: true, ..next.clone() }),
        ("another protocol", Packet { tcp: false, options: 0, ..next.clone() }),
    ];
    for (what, other) in others {
        let all = [(THERE, datagram(&first)), (THERE, datagram(&other))];
        let (frames, refused) = join(&all);
        assert_eq!((frames.len(), refused.len()), (2, 0), "{what}");
        assert_eq!((&frames[0][FRONT..], &frames[1][FRONT..]), (&all[0].1[HEAD..], &all[1].1[HEAD..]), "{what}");
    }
    let spoof = IpAddr::from([192, 0, 2, 3]);
    let (frames, _) = join(&[(THERE, datagram(&first)), (spoof, datagram(&next))]);
    assert_eq!((&frames[0][16..22], &frames[1][16..22]), (mac(THERE).as_slice(), mac(spoof).as_slice()));
    for at in [1, 8, 15, 19, 21, 23, 30, 35, 45] {
        let mut other = datagram(&next);
        other[HEAD + at] ^= 1;
        let (frames, _) = join(&[(THERE, datagram(&first)), (THERE, other)]);
        assert_eq!(frames.len(), 2, "byte {at} of the headers is another");
    }
    let pushed = Packet { flags: ACK | PSH, ..first.clone() };
    assert_eq!(
        join(&[(THERE, datagram(&pushed)), (THERE, datagram(&next))]).0.len(),
        2,
        "what is pushed waits for nobody"
    );
    let mut finished = datagram(&next);
    finished[..HEAD].copy_from_slice(&Head { network: NETWORK, unfinished: None }.bytes());
    assert_eq!(join(&[(THERE, datagram(&first)), (THERE, finished)]).0.len(), 2, "a checksum that is made stays");
}

#[test]
fn what_no_node_sends_is_refused_by_its_kind() {
    let good = datagram(&small(b"x"));
    let change = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        join(&[(THERE, bytes)])
    };
    assert_eq!(change(&|_| {}).1, []);
    assert_eq!(change(&|bytes| bytes[3] ^= 1).1, [Refused::OtherNetwork]);
    type Spoil<'a> = &'a dyn Fn(&mut Vec<u8>);
    let malformed: [Spoil<'_>; 8] = [
        &|bytes| bytes.truncate(HEAD),
        &|bytes| bytes.truncate(5),
        &|bytes| bytes[0] = 0x21,
        &|bytes| bytes[HEAD] = 0x55,
        &|bytes| bytes[HEAD] = 0x44,
        // It says that it is longer than it is; a checksum lies behind the end, or among the addresses.
        &|bytes| bytes[HEAD + 3] += 1,
        &|bytes| bytes[5] = 60,
        &|bytes| bytes[5] = 4,
    ];
    for (n, spoil) in malformed.iter().enumerate() {
        let (frames, refused) = change(spoil);
        assert_eq!((frames.len(), refused.as_slice()), (0, [Refused::Malformed].as_slice()), "{n}");
    }
}

#[test]
fn padding_of_a_link_stays_on_it_and_what_is_for_no_node_too() {
    let packet = small(b"x");
    let mut outbox = Outbox::new(NETWORK);
    let padded = [packet.frame(0).as_slice(), &[0; 7]].concat();
    put(&mut outbox, &padded).unwrap();
    assert_eq!(datagrams(&outbox), [(mac(THERE), datagram(&packet))]);
    let mut broadcast = packet.frame(0);
    broadcast[10..16].fill(0xff);
    assert_eq!(put(&mut outbox, &broadcast), Err(Unsent::NoNode));
    assert_eq!(datagrams(&outbox).len(), 1);
}

#[test]
fn datagrams_of_one_length_to_one_node_go_together_and_stay_in_order() {
    let mut outbox = Outbox::new(NETWORK);
    let lengths = [100, 100, 60, 100, 100, 100];
    for (n, length) in lengths.iter().enumerate() {
        let packet = Packet { sequence: n as u32, ..small(&vec![n as u8; *length]) };
        let mut frame = packet.frame(0);
        if n == 4 {
            frame[10..16].copy_from_slice(&mac([192, 0, 2, 3].into()));
        }
        put(&mut outbox, &frame).unwrap();
    }
    let trains: Vec<usize> = outbox.trains().iter().map(|train| train.pieces.len() / 2).collect();
    assert_eq!(trains, [3, 1, 1, 1]);
    let order: Vec<u8> = datagrams(&outbox).iter().map(|(_, bytes)| *bytes.last().unwrap()).collect();
    assert_eq!(order, [0, 1, 2, 3, 4, 5]);
    outbox.clear();
    assert!(outbox.is_empty() && outbox.trains().is_empty());
    let mut count = 0;
    while outbox.room().is_some() {
        put(&mut outbox, &small(&[0; 1000]).frame(0)).unwrap();
        count += 1;
    }
    assert_eq!((count, datagrams(&outbox).len()), (64, 64), "it is full some time");
}

/// A packet with this mark of congestion.
fn marked(packet: &Packet, ecn: u8) -> Vec<u8> {
    let mut bytes = packet.bytes();
    if packet.v6 {
        bytes[1] = bytes[1] & 0xcf | ecn << 4;
    } else {
        bytes[1] = bytes[1] & 0xfc | ecn;
        bytes[10..12].copy_from_slice(&[0, 0]);
        let check = !fold(sum(&bytes[..20]));
        bytes[10..12].copy_from_slice(&check.to_be_bytes());
    }
    bytes
}

fn ecn_of(packet: &[u8]) -> u8 {
    if packet[0] >> 4 == 6 { packet[1] >> 4 & 3 } else { packet[1] & 3 }
}

fn piece(v6: bool, sequence: u32) -> Packet {
    Packet { v6, tcp: true, options: 0, id: (sequence / 100) as u16, sequence, flags: ACK, payload: vec![5; 100] }
}

#[test]
fn a_datagram_has_its_packets_mark_of_congestion() {
    for v6 in [false, true] {
        let mut outbox = Outbox::new(NETWORK);
        for (sequence, ecn) in [(0, 2), (100, 2), (200, 1), (300, 0), (400, 3)] {
            let packet = piece(v6, sequence);
            let vnet = Vnet { unfinished: Some(packet.unfinished()), ..Vnet::default() };
            put(&mut outbox, &frame(vnet, &marked(&packet, ecn))).unwrap();
        }
        let long = Packet { payload: vec![6; 500], ..piece(v6, 500) };
        let vnet = Vnet {
            gso: long.gso(),
            headers: (14 + long.headers()) as u16,
            segment: 100,
            unfinished: Some(long.unfinished()),
        };
        put(&mut outbox, &frame(vnet, &marked(&long, 1))).unwrap();
        let trains: Vec<(u8, usize)> =
            outbox.trains().iter().map(|train| (train.ecn, train.pieces.len() / 2)).collect();
        assert_eq!(trains, [(2, 2), (1, 1), (0, 1), (3, 1), (1, 5)]);
        for train in outbox.trains() {
            assert!(
                train.pieces.chunks(2).all(|two| ecn_of(&[&two[0][..], &two[1][..]].concat()[HEAD..]) == train.ecn)
            );
        }
    }
}

#[test]
fn what_the_path_says_of_congestion_is_said_of_the_packet() {
    for v6 in [false, true] {
        let head = Head { network: NETWORK, unfinished: Some(piece(v6, 0).unfinished()) };
        // Each packet's own mark, and that with which its datagram came.
        let course = [(2, 2), (2, 2), (2, 3), (2, 2), (1, 3), (3, 3), (0, 3), (0, 0)];
        let all: Vec<(u8, Vec<u8>)> = (0..)
            .zip(course)
            .map(|(number, (own, came))| {
                (came, [head.bytes().as_slice(), &marked(&piece(v6, number * 100), own)].concat())
            })
            .collect();
        let all: Vec<_> = all.iter().map(|(ecn, bytes)| Datagram { from: THERE, ecn: *ecn, bytes }).collect();
        let (frames, refused) = join_marked(&all);
        assert_eq!(refused, [Refused::Congested]);
        // The first two are one.
        let said: Vec<(u8, u32, usize)> = frames
            .iter()
            .map(|frame| {
                let packet = &frame[FRONT..];
                finish_and_judge(packet, piece(v6, 0).unfinished());
                let l4 = if v6 { 40 } else { 20 };
                let sequence = u32::from_be_bytes(*packet[l4 + 4..].first_chunk().unwrap());
                (ecn_of(packet), sequence, packet.len() - l4 - 20)
            })
            .collect();
        assert_eq!(said, [(2, 0, 200), (3, 200, 100), (2, 300, 100), (3, 400, 100), (3, 500, 100), (0, 700, 100)]);
        assert!(frames.iter().all(|frame| Vnet::read(frame).is_some_and(|vnet| vnet.unfinished == head.unfinished)));
    }
}

#[test]
fn nodes_at_ipv6_addresses_are_told_apart_as_those_at_ipv4_addresses_are() {
    let (here, there) = (IpAddr::V6(HERE_V6), IpAddr::V6(THERE_V6));
    let others = [there, Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 3).into(), THERE];
    let mut outbox = Outbox::new(NETWORK);
    for other in others {
        let mut frame = small(b"x").frame(0);
        frame[10..16].copy_from_slice(&mac(other));
        put(&mut outbox, &frame).unwrap();
    }
    let all = datagrams(&outbox);
    assert_eq!(all.iter().map(|(to, _)| *to).collect::<Vec<_>>(), others.map(mac));
    let came: Vec<_> =
        others.iter().zip(&all).map(|(from, (_, bytes))| Datagram { from: *from, ecn: 0, bytes }).collect();
    let (frames, refused) = join_at(here, &came);
    assert!(refused.is_empty());
    for (frame, from) in frames.iter().zip(others) {
        assert_eq!((&frame[10..16], &frame[16..22]), (mac(here).as_slice(), mac(from).as_slice()));
    }
    assert_eq!(frames.len(), 3);
}

#[test]
fn a_node_at_an_ipv6_address_is_one_that_was_named_and_nobody_else_goes_by_its_name() {
    let nodes = Nodes::default();
    let there = IpAddr::V6(THERE_V6);
    assert_eq!((nodes.known().at(mac(there)), nodes.known().at(mac(THERE))), (None, Some(THERE)));
    assert!(nodes.known().may_be_from(there), "whom the programs here know is theirs to say");
    let before = nodes.known();
    nodes.replace([THERE_V6]);
    assert_eq!((before.at(mac(there)), nodes.known().at(mac(there))), (None, Some(there)));
    assert_eq!(nodes.known().list(), [THERE_V6]);
    // The same 40 bits: found by search, as a node's owner could.
    let pair: [Ipv6Addr; 2] = ["fd50::2", "fd50::5f93:499b:1e8c:6610"].map(|text| text.parse().unwrap());
    assert_eq!(mac(pair[0].into()), mac(pair[1].into()));
    nodes.replace(pair);
    assert_eq!(nodes.known().at(mac(pair[1].into())), Some(pair[0].into()));
    assert!(nodes.known().may_be_from(pair[0].into()) && !nodes.known().may_be_from(pair[1].into()));
    nodes.replace([]);
    assert_eq!(nodes.known().at(mac(pair[0].into())), None);
}
