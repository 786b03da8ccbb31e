//! What a pod sends: delivered, encapsulated, handed to the stack, or dropped for what it pretends.

use towpath_datapath::bpf::{Hook, Isolation};
use towpath_model::Family;
use towpath_model::desired::PodSets;

use crate::frame::{ACK, L4, SYN};
use crate::world::*;

#[test]
fn a_pod_of_the_same_node_is_reached_directly_and_answers() {
    in_both_worlds(|w| {
        for h in BOTH.map(hosts) {
            for (ask, answer) in [(L4::syn(), L4::tcp(SYN | ACK)), (L4::udp(b"question"), L4::udp(b"answer"))] {
                let got = w.from_pod(&sent_by(h.a, 4000, h.b, 80, ask.clone())).into_pod(w.pod_b);
                assert_eq!((got.src.ip(), got.dst.ip(), got.ttl), (h.a, h.b, 63));
                assert_eq!((got.dst_mac, got.src_mac), (MAC_B, MAC_HOST));
                assert_eq!(got.l4, ask);
                let back = w.from_pod(&sent_by(h.b, 80, h.a, 4000, answer)).into_pod(w.pod_a);
                assert_eq!((back.src.port(), back.dst_mac), (80, MAC_A));
            }
            let v4 = h.a.is_ipv4();
            w.from_pod(&sent_by(h.a, 0, h.b, 0, L4::echo(v4, true, 9))).into_pod(w.pod_b);
            w.from_pod(&sent_by(h.b, 0, h.a, 0, L4::echo(v4, false, 9))).into_pod(w.pod_a);
        }
        // Both directions are one entry.
        assert_eq!(w.programs.connections().unwrap().len(), 6);
    });
}

#[test]
fn a_remote_pod_and_a_remote_node_are_reached_through_the_tunnel() {
    in_both_worlds(|w| {
        for h in BOTH.map(hosts) {
            for to in [h.remote, h.node2] {
                let first = w.from_pod(&sent_by(h.a, 4000, to, 80, L4::syn())).into_tunnel(w, ip("192.168.50.2"));
                assert_eq!((first.src.ip(), first.dst.ip(), first.ttl), (h.a, to, 63));
                // The receiver's device: 02:74 and the fold of ::ffff:192.168.50.2; the sender's: our own.
                assert_eq!((first.dst_mac, first.src_mac), ([2, 0x74, 192, 168, 50 ^ 0xff, 2 ^ 0xff], MAC_TUNNEL));
                // The second packet takes its way from the connection.
                w.from_pod(&sent_by(h.a, 4000, to, 80, L4::tcp(ACK))).into_tunnel(w, ip("192.168.50.2"));
            }
        }
        assert!(w.programs.connections().unwrap().iter().all(|c| c.via == Some(ip("192.168.50.2"))));
    });
}

#[test]
fn a_peer_that_moves_is_followed_by_running_connections() {
    in_both_worlds(|w| {
        let h = hosts(Family::V4);
        w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn())).into_tunnel(w, ip("192.168.50.2"));
        let mut moved = peers();
        moved[1].tunnel = ip("192.168.50.77");
        w.programs.apply_peers(&moved).unwrap();
        w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::tcp(ACK))).into_tunnel(w, ip("192.168.50.77"));
    });
}

#[test]
fn what_the_short_cut_cannot_do_goes_to_the_stack() {
    in_both_worlds(|w| {
        for h in BOTH.map(hosts) {
            for to in [h.node, h.outside] {
                w.from_pod(&sent_by(h.a, 4000, to, 80, L4::syn())).passed();
            }
            let mut dying = sent_by(h.a, 4001, h.b, 80, L4::syn());
            dying.ttl = 1;
            w.from_pod(&dying).passed();
            // 1450 is the tunnel's MTU.
            let long = L4::udp(&vec![7; 1430]);
            w.from_pod(&sent_by(h.a, 4002, h.remote, 80, long)).passed();
        }
        let mut options = sent_by(ip("10.1.0.10"), 4003, ip("10.1.0.11"), 80, L4::udp(b"x")).bytes();
        options[14] = 0x46;
        options.splice(34..34, [1, 1, 1, 0]);
        let total = (options.len() - 14) as u16;
        options[16..18].copy_from_slice(&total.to_be_bytes());
        w.run(Hook::FromPod, &options, w.pod_a, w.pod_a, None).passed();
    });
}

#[test]
fn a_pod_speaks_only_for_itself() {
    in_both_worlds(|w| {
        for h in BOTH.map(hosts) {
            let honest = sent_by(h.a, 4000, h.outside, 80, L4::syn());
            for src in [h.b, h.remote, h.node, h.outside] {
                let mut lie = honest.clone();
                lie.src.set_ip(src);
                w.run(Hook::FromPod, &lie.bytes(), w.pod_a, w.pod_a, None).dropped("source_address");
            }
            let mut lie = honest.clone();
            lie.src_mac = MAC_B;
            w.run(Hook::FromPod, &lie.bytes(), w.pod_a, w.pod_a, None).dropped("source_mac");
        }
    });
}

#[test]
fn a_known_connection_lends_its_address_to_nobody_else() {
    in_both_worlds(|w| {
        for h in BOTH.map(hosts) {
            let frame = sent_by(h.a, 4000, h.b, 80, L4::syn());
            w.from_pod(&frame).into_pod(w.pod_b);
            w.run(Hook::FromPod, &frame.bytes(), w.pod_b, w.pod_b, None).dropped("source_address");
            let mut other = frame.clone();
            other.src_mac = [2, 0, 0, 0, 0, 0x77];
            w.run(Hook::FromPod, &other.bytes(), w.pod_a, w.pod_a, None).dropped("source_mac");
            // b gets another device: the connection follows it, and the old device speaks for b no more.
            let mut moved = w.local_b();
            moved.ifindex = w.uplink;
            w.programs.set_pod(&moved, Isolation::Sets(PodSets::default())).unwrap();
            w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::tcp(ACK))).into_pod(w.uplink);
            w.from_pod(&sent_by(h.b, 80, h.a, 4000, L4::tcp(ACK))).dropped("source_address");
            let back = w.local_b();
            w.programs.set_pod(&back, Isolation::Sets(PodSets::default())).unwrap();
            w.from_pod(&sent_by(h.b, 80, h.a, 4000, L4::tcp(ACK))).into_pod(w.pod_a);
        }
    });
}

fn arp(sender_mac: [u8; 6], sender: [u8; 4]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend([0xff; 6]);
    out.extend(MAC_A);
    out.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    out.extend(sender_mac);
    out.extend(sender);
    out.extend([0; 6]);
    out.extend([10, 1, 0, 1]);
    out
}

#[test]
fn arp_only_about_the_pods_own_address() {
    in_both_worlds(|w| {
        let run = |bytes: &[u8]| w.run(Hook::FromPod, bytes, w.pod_a, w.pod_a, None);
        run(&arp(MAC_A, [10, 1, 0, 10])).passed();
        for (mac, sender) in [(MAC_A, [10, 1, 0, 11]), (MAC_A, [10, 1, 0, 1]), (MAC_B, [10, 1, 0, 10]), (MAC_A, [0; 4])]
        {
            run(&arp(mac, sender)).dropped("arp_nd");
        }
        run(&arp(MAC_A, [10, 1, 0, 10])[..30]).dropped("malformed");
    });
}

fn nd(kind: u8, src: &str, target: &str) -> Vec<u8> {
    nd_to("ff02::1", kind, src, target)
}

fn nd_to(to: &str, kind: u8, src: &str, target: &str) -> Vec<u8> {
    let IpAddr::V6(target) = ip(target) else { panic!("IPv6") };
    let l4 = L4::Icmp { kind, code: 0, rest: [0; 4], payload: target.octets().to_vec() };
    let mut frame = sent_by(ip(src), 0, ip(to), 0, l4);
    frame.ttl = 255;
    frame.bytes()
}

use std::net::IpAddr;

#[test]
fn neighbour_discovery_only_about_the_pods_own_address() {
    in_both_worlds(|w| {
        let run = |bytes: &[u8]| w.run(Hook::FromPod, bytes, w.pod_a, w.pod_a, None);
        run(&nd(135, "fd01::10", "fd01::1")).passed();
        run(&nd(136, "fd01::10", "fd01::10")).passed();
        for (kind, src, target) in [
            (136, "fd01::10", "fd01::11"),
            (136, "fe80::1", "fd01::11"),
            (135, "fd01::11", "fd01::1"),
            (134, "fe80::1", "fd01::1"),
            (137, "fd01::10", "fd01::1"),
        ] {
            run(&nd(kind, src, target)).dropped("arp_nd");
        }
        // It is spoken on the link; what the kernel would route is no such talk, and no policy has seen it.
        for (kind, target) in [(135, "fd01::1"), (136, "fd01::10")] {
            for to in ["fe80::1", "ff02::1:ff00:1", "fd50::1"] {
                run(&nd_to(to, kind, "fd01::10", target)).passed();
            }
            for to in ["fd99::9", "fd02::20", "fd01::11", "fd50::2", "ff05::1", "ff0e::1"] {
                run(&nd_to(to, kind, "fd01::10", target)).dropped("arp_nd");
            }
        }
        // The kernel of every pod says these of itself.
        for (kind, src) in [(133, "fe80::aa"), (143, "fe80::aa"), (135, "::")] {
            run(&nd(kind, src, "fe80::aa")).dropped("ignored");
        }
    });
}

#[test]
fn ipv6_that_carries_ipv4_is_dropped_at_every_hook() {
    in_both_worlds(|w| {
        for other in ["::ffff:10.1.0.11", "::10.1.0.11", "::ffff:0:10.1.0.11"] {
            let to = sent_by(ip("fd01::10"), 4000, ip(other), 80, L4::syn());
            w.from_pod(&to).dropped("mapped_v4");
            let from = arriving(MAC_UPLINK, ip(other), 4000, ip("fd01::10"), 80, L4::syn());
            w.from_uplink(&from).dropped("mapped_v4");
            let from = arriving(MAC_TUNNEL, ip(other), 4000, ip("fd01::10"), 80, L4::syn());
            w.from_tunnel(&from, "192.168.50.2").dropped("mapped_v4");
            w.to_pod(&arriving(MAC_A, ip(other), 4000, ip("fd01::10"), 80, L4::syn()), w.pod_a, 0).dropped("mapped_v4");
        }
    });
}

#[test]
fn later_fragments_follow_the_first() {
    in_both_worlds(|w| {
        for h in BOTH.map(hosts) {
            let mut first = sent_by(h.a, 4000, h.b, 80, L4::udp(&[1; 64]));
            let mut later = first.clone();
            first.fragment = Some((77, 0, true));
            later.fragment = Some((77, 72, false));
            let run = |bytes: &[u8]| w.run(Hook::FromPod, bytes, w.pod_a, w.pod_a, None);
            run(&later.bytes()).dropped("fragment");
            for frame in [&first, &later] {
                let outcome = run(&frame.bytes());
                // IPv6 with a fragment header is the kernel's to forward, and judged here all the same.
                if h.a.is_ipv4() {
                    assert_eq!((outcome.verdict, outcome.ifindex), (REDIRECT, w.pod_b));
                } else {
                    assert!([PASS, REDIRECT].contains(&outcome.verdict), "{outcome:?}");
                }
            }
            later.fragment = Some((78, 72, false));
            run(&later.bytes()).dropped("fragment");
        }
        assert_eq!(w.programs.connections().unwrap().len(), 2);
    });
}

#[test]
fn malformed_packets_are_dropped_and_counted() {
    in_both_worlds(|w| {
        let run = |bytes: &[u8]| w.run(Hook::FromPod, bytes, w.pod_a, w.pod_a, None);
        for h in BOTH.map(hosts) {
            let good = sent_by(h.a, 4000, h.b, 80, L4::udp(b"payload")).bytes();
            run(&good[..good.len() - 12]).dropped("malformed");
            let mut version = good.clone();
            version[14] = 0x95;
            run(&version).dropped("malformed");
        }
        let mut length = sent_by(ip("10.1.0.10"), 1, ip("10.1.0.11"), 2, L4::udp(b"x")).bytes();
        length[14] = 0x44;
        run(&length).dropped("malformed");
        let mut tiny = sent_by(ip("10.1.0.10"), 1, ip("10.1.0.11"), 2, L4::tcp(ACK));
        tiny.fragment = Some((5, 8, false));
        run(&tiny.bytes()).dropped("malformed");
    });
}

#[test]
fn nobody_plants_the_first_fragment_of_anothers_datagram() {
    in_both_worlds(|w| {
        let h = hosts(Family::V4);
        let mut first = sent_by(h.b, 4000, h.outside, 53, L4::udp(&[1; 64]));
        let mut later = first.clone();
        first.fragment = Some((77, 0, true));
        later.fragment = Some((77, 72, false));
        let planted = w.run(Hook::FromPod, &first.bytes(), w.pod_a, w.pod_a, None);
        planted.dropped("source_address");
        w.run(Hook::FromPod, &later.bytes(), w.pod_b, w.pod_b, None).dropped("fragment");
        w.run(Hook::FromPod, &first.bytes(), w.pod_b, w.pod_b, None).passed();
        w.run(Hook::FromPod, &later.bytes(), w.pod_b, w.pod_b, None).passed();
        // To the own node through the tunnel, which tracks nothing.
        let through = |fragment| {
            let mut frame = arriving(MAC_TUNNEL, h.remote, 4000, h.node, 53, L4::udp(&[1; 64]));
            frame.fragment = Some(fragment);
            w.run(Hook::FromTunnel, &frame.bytes(), w.tunnel, w.tunnel, Some(ip("192.168.50.2")))
        };
        through((78, 72, false)).dropped("fragment");
        through((78, 0, true)).passed();
        through((78, 72, false)).passed();
    });
}
