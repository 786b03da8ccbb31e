//! Pods on the link of the uplink with MAC addresses of their own (`macvlan`): who is answered for them, which frames are taken, which MAC packets leave
//! with, and that all else is judged as ever.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use towpath_datapath::bpf::{Hook, Isolation, NodeConfig};
use towpath_datapath::net::mac;
use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, Frame, L4, Mac, SYN, read, sum};
use crate::plain::node2_is;
use crate::world::*;

/// The MAC of an address on the link. (The pods of these tests have others: somebody gave them.)
fn on_link(address: IpAddr) -> Mac {
    mac::of_pod(address)
}

/// Somebody on the link.
const MAC_OTHER: Mac = [2, 0, 0, 0, 0, 0x77];
const BROADCAST: Mac = [0xff; 6];

/// A world whose pods are on the link, and so are node2's.
fn begin(w: &mut World) {
    let config = NodeConfig { on_link: true, ..node_config(w.tunnel, w.uplink) };
    w.programs.apply_node(&config).unwrap();
    node2_is(w, Reach::Link, true);
}

fn arp(operation: u8, dst: Mac, (sender_mac, sender): (Mac, [u8; 4]), target: [u8; 4]) -> Vec<u8> {
    let mut out = [dst, sender_mac].concat();
    out.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    out.extend(sender_mac);
    out.extend(sender);
    out.extend([0; 6]);
    out.extend(target);
    out
}

fn v6(address: IpAddr) -> Ipv6Addr {
    let IpAddr::V6(address) = address else { panic!("{address}") };
    address
}

/// A neighbour solicitation, with or without the sender's link address in it.
fn solicitation(dst: Mac, from: Ipv6Addr, target: Ipv6Addr, hops: u8, told: bool) -> Vec<u8> {
    let mut body = vec![135, 0, 0, 0, 0, 0, 0, 0];
    body.extend(target.octets());
    if told {
        body.extend([1, 1]);
        body.extend(MAC_OTHER);
    }
    let to: Ipv6Addr = "ff02::1:ff00:10".parse().unwrap();
    let length = (body.len() as u16).to_be_bytes();
    let check = sum(&[&from.octets(), &to.octets(), &[0, 0], &length, &[0, 0, 0, 58], &body]).to_be_bytes();
    body[2..4].copy_from_slice(&check);
    let mut out = [dst, MAC_OTHER].concat();
    out.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    out.extend(length);
    out.extend([58, hops]);
    out.extend(from.octets());
    out.extend(to.octets());
    out.extend(body);
    out
}

fn on_uplink(w: &World, frame: &[u8]) -> Outcome {
    w.run(Hook::FromUplink, frame, w.uplink, w.uplink, None)
}

/// What leaves by the uplink, made by the node (`ingress` 0) or received before.
fn leaves(w: &World, frame: &Frame, ingress: u32) -> Outcome {
    w.run(Hook::ToUplink, &frame.bytes(), w.uplink, ingress, None)
}

#[test]
fn who_asks_by_arp_for_a_pod_here_is_told_its_own_mac() {
    in_world(|w| {
        let other = (MAC_OTHER, [192, 168, 50, 9]);
        let asked = arp(1, BROADCAST, other, [10, 1, 0, 10]);
        on_uplink(w, &asked).passed();
        begin(w);
        let told = on_uplink(w, &asked);
        assert_eq!((told.verdict, told.kind, told.ifindex), (REDIRECT, 2, w.uplink));
        let mut expected = arp(2, MAC_OTHER, (MAC_A, [10, 1, 0, 10]), other.1);
        expected[32..38].copy_from_slice(&MAC_OTHER);
        assert_eq!(told.bytes, expected);
        // A neighbour that makes sure asks the pod's MAC, and who makes sure that nobody has the address has none yet.
        assert_eq!(on_uplink(w, &arp(1, MAC_A, other, [10, 1, 0, 10])).verdict, REDIRECT);
        assert_eq!(on_uplink(w, &arp(1, BROADCAST, (MAC_OTHER, [0; 4]), [10, 1, 0, 10])).verdict, REDIRECT);
        // Answers, claims, and questions for others are not ours.
        on_uplink(w, &arp(2, BROADCAST, other, [10, 1, 0, 10])).passed();
        on_uplink(w, &arp(1, BROADCAST, (MAC_OTHER, [10, 1, 0, 10]), [10, 1, 0, 10])).passed();
        on_uplink(w, &arp(1, BROADCAST, other, [10, 1, 0, 99])).passed();
        on_uplink(w, &arp(1, BROADCAST, other, [192, 168, 50, 1])).passed();
        on_uplink(w, &asked[..30]).passed();
    });
}

#[test]
fn who_asks_by_neighbour_discovery_is_told_too() {
    in_world(|w| {
        let (pod, other) = (v6(hosts(Family::V6).a), "fe80::77".parse().unwrap());
        let group = [0x33, 0x33, 0xff, 0, 0, 0x10];
        on_uplink(w, &solicitation(group, other, pod, 255, true)).passed();
        begin(w);
        let advertised = |from: Ipv6Addr, told: bool| {
            let out = on_uplink(w, &solicitation(group, from, pod, 255, told));
            assert_eq!((out.verdict, out.kind, out.ifindex), (REDIRECT, 2, w.uplink));
            assert_eq!(out.bytes.len(), 86);
            // Reading it checks the sum.
            let frame = read(&out.bytes);
            let L4::Icmp { kind: 136, code: 0, rest, payload } = &frame.l4 else { panic!("{frame:?}") };
            assert_eq!((frame.src.ip(), frame.ttl, frame.src_mac), (IpAddr::V6(pod), 255, MAC_A));
            assert_eq!(*payload, [pod.octets().as_slice(), &[2, 1], &MAC_A].concat());
            (frame.dst.ip(), frame.dst_mac, rest[0])
        };
        for told in [true, false] {
            assert_eq!(advertised(other, told), (IpAddr::V6(other), MAC_OTHER, 0x60));
        }
        let everybody = advertised(Ipv6Addr::UNSPECIFIED, false);
        assert_eq!(everybody, (ip("ff02::1"), [0x33, 0x33, 0, 0, 0, 1], 0x20));
        // A pod that nobody gave a MAC has the one of the address that is asked for.
        let own = LocalPod { mac: mac::of_pod(hosts(Family::V4).a), ..w.local_a() };
        w.programs.set_pod(&own, Isolation::Sets(PodSets::default())).unwrap();
        let out = on_uplink(w, &solicitation(group, other, pod, 255, true));
        assert_eq!(read(&out.bytes).src_mac, on_link(IpAddr::V6(pod)));
        assert_eq!(out.bytes[80..], on_link(IpAddr::V6(pod)));
        // From beyond a router, and for nobody here.
        on_uplink(w, &solicitation(group, other, pod, 254, true)).passed();
        on_uplink(w, &solicitation(group, other, "fd01::99".parse().unwrap(), 255, true)).passed();
        // And by who says that he is the pod.
        on_uplink(w, &solicitation(group, pod, pod, 255, true)).dropped("spoofed_node");
    });
}

/// Who is about to take an address asks from none (RFC 4862 5.4.2), which a node without one of a family has in that place.
#[test]
fn who_makes_sure_that_nobody_has_an_address_is_let_ask_nodes_of_any_family() {
    in_world(|w| {
        let group = [0x33, 0x33, 0xff, 0, 0, 0x10];
        for addresses in [vec!["192.168.50.1"], vec!["fd50::1"], vec!["192.168.50.1", "fd50::1"]] {
            let addresses = addresses.into_iter().map(ip).collect();
            let config = NodeConfig { addresses, ..node_config(w.tunnel, w.uplink) };
            w.programs.apply_node(&config).unwrap();
            let asked = solicitation(group, Ipv6Addr::UNSPECIFIED, "fd50::77".parse().unwrap(), 255, false);
            on_uplink(w, &asked).passed();
        }
    });
}

#[test]
fn packets_go_to_the_pods_own_mac_and_come_to_it() {
    in_world(|w| {
        begin(w);
        for family in BOTH {
            let h = hosts(family);
            let out = w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn()));
            let sent = out.out_of(2, w.uplink);
            assert_eq!((sent.src.ip(), sent.dst.ip(), sent.ttl), (h.a, h.remote, 63));
            assert_eq!(sent.dst_mac, on_link(h.remote));
            assert_eq!(out.counted, ["link_out"]);
            // Nodes of this network send to the address's MAC, who has asked to the one that the pod was given.
            w.from_uplink(&arriving(on_link(h.a), h.remote, 80, h.a, 4000, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
            let answer = arriving(MAC_A, h.remote, 80, h.a, 4000, L4::tcp(ACK));
            let got = w.from_uplink(&answer).into_pod(w.pod_a);
            assert_eq!((got.src.ip(), got.dst_mac, got.src_mac), (h.remote, MAC_A, MAC_HOST));
            assert_eq!(w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::data(b"more"))).counted, ["link_out"]);
            // The node's own MAC is as good: what takes the kernel's routes goes over it.
            w.from_uplink(&arriving(MAC_UPLINK, h.remote, 80, h.a, 4000, L4::data(b"late"))).into_pod(w.pod_a);
            // Another's MAC is another's, whatever the address.
            let astray = arriving(MAC_OTHER, h.remote, 80, h.a, 4000, L4::data(b"astray"));
            w.from_uplink(&astray).passed();
            w.from_uplink(&arriving(on_link(h.b), h.remote, 80, h.a, 4000, L4::data(b"astray"))).passed();
            w.from_uplink(&arriving(MAC_B, h.remote, 80, h.a, 4000, L4::data(b"astray"))).passed();
        }
    });
}

#[test]
fn a_service_leads_to_the_mac_of_its_endpoint_at_every_packet() {
    in_world(|w| {
        for (family, reach, counter) in [
            (Family::V4, Reach::Link, "link_out"),
            (Family::V6, Reach::Link, "link_out"),
            (Family::V6, Reach::Route, "host_out"),
        ] {
            begin(w);
            node2_is(w, reach, true);
            let (h, port) = (hosts(family), if reach == Reach::Link { 4000 } else { 4001 });
            w.serve(1 + family as u32, family, Some(h.service), 80, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
            let asks = |l4| w.from_pod(&sent_by(h.a, port, h.service, 80, l4));
            asks(L4::syn());
            w.from_uplink(&arriving(on_link(h.a), h.remote, 8080, h.a, port, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
            // The first looks at the connection, others go on by its translation, longer than a next hop is remembered.
            for _ in 0..4 {
                let out = asks(L4::data(b"more"));
                assert!(out.counted.contains(&counter), "{family:?} {reach:?}: {out:?}");
                assert_eq!(out.frame().dst, (h.remote, 8080).into());
                if reach == Reach::Link {
                    assert_eq!(out.frame().dst_mac, on_link(h.remote));
                }
                std::thread::sleep(std::time::Duration::from_millis(60));
            }
        }
    });
}

#[test]
fn a_connection_follows_its_node_from_way_to_way() {
    in_world(|w| {
        begin(w);
        for family in BOTH {
            let h = hosts(family);
            w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn()));
            w.from_uplink(&arriving(MAC_A, h.remote, 80, h.a, 4000, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
            let ways = [(Reach::Route, "host_out"), (Reach::Link, "link_out"), (Reach::Tunnel, "tunnel_out")];
            let more = [(Reach::Link, "link_out"), (Reach::Ipip, "ipip_out"), (Reach::Link, "link_out")];
            for (reach, counter) in ways.into_iter().chain(more) {
                node2_is(w, reach, true);
                let out = w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::data(b"on")));
                assert_eq!(out.counted, [counter], "{family:?} {reach:?}");
            }
        }
    });
}

#[test]
fn a_node_that_is_reached_over_a_router_or_another_card_gets_no_frame_for_a_pod() {
    in_world(|w| {
        begin(w);
        let h = hosts(Family::V4);
        sh(
            "ip neigh add 192.168.50.253 lladdr 02:00:00:00:00:fd dev up0 && ip route add 192.168.50.2/32 via 192.168.50.253 dev up0",
        );
        let out = w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn()));
        out.out_of(3, w.uplink);
        assert_eq!(out.counted, ["host_out"]);
    });
}

#[test]
fn what_leaves_with_a_pods_address_has_its_mac_and_nothing_else_has() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            let by_pod = |src: IpAddr| Frame {
                src_mac: MAC_UPLINK,
                dst_mac: MAC_ROUTER,
                ..sent_by(src, 4000, h.outside, 80, L4::data(b"out"))
            };
            begin(w);
            for (ingress, src, mac) in
                [(w.pod_a, h.a, MAC_A), (0, h.b, MAC_B), (w.pod_a, h.node, MAC_UPLINK), (0, h.remote, MAC_UPLINK)]
            {
                let out = leaves(w, &by_pod(src), ingress);
                assert_eq!((out.passed().frame().src_mac, out.frame().dst_mac), (mac, MAC_ROUTER), "{src}");
            }
            // Nodes of this network, and pods behind them, send to the MAC of the address, so it is what switches hear of what goes to them.
            for dst in [h.remote, h.node2] {
                let inside =
                    Frame { src_mac: MAC_UPLINK, dst_mac: MAC_ROUTER, ..sent_by(h.a, 4000, dst, 80, L4::data(b"in")) };
                assert_eq!(leaves(w, &inside, w.pod_a).passed().frame().src_mac, on_link(h.a), "to {dst}");
            }
            // One that nobody gave a MAC has the one of each address.
            w.programs
                .set_pod(
                    &LocalPod { mac: mac::of_pod(hosts(Family::V4).b), ..w.local_b() },
                    Isolation::Sets(PodSets::default()),
                )
                .unwrap();
            assert_eq!(leaves(w, &by_pod(h.b), w.pod_b).passed().frame().src_mac, on_link(h.b));
            w.programs.set_pod(&w.local_b(), Isolation::Sets(PodSets::default())).unwrap();
            w.programs.apply_node(&node_config(w.tunnel, w.uplink)).unwrap();
            assert_eq!(leaves(w, &by_pod(h.a), w.pod_a).passed().frame().src_mac, MAC_UPLINK);
        }
    });
}

#[test]
fn who_is_on_the_link_is_judged_as_from_any_backend() {
    in_world(|w| {
        begin(w);
        let a = w.local_a();
        w.isolate(&a, 5, 0);
        for h in BOTH.map(hosts) {
            w.allow(5, h.remote, RowProtocol::Ports(Protocol::Tcp), 80, 1);
        }
        w.apply_policy();
        for family in BOTH {
            let h = hosts(family);
            w.from_uplink(&arriving(MAC_A, h.remote, 4000, h.a, 80, L4::syn())).into_pod(w.pod_a);
            w.from_uplink(&arriving(MAC_A, h.remote, 4000, h.a, 81, L4::syn())).dropped("ingress_policy");
            // A pod of this node, of one of whom nobody said so, and this node, are not out there.
            let third = if family == Family::V4 { ip("10.3.0.5") } else { ip("fd03::5") };
            for forged in [h.b, third, h.node] {
                w.from_uplink(&arriving(MAC_A, forged, 4001, h.a, 80, L4::syn())).dropped("spoofed_node");
            }
            // A stranger goes through the kernel's stack, and is judged at the pod's device.
            let stranger = arriving(MAC_A, h.outside, 4002, h.a, 81, L4::syn());
            w.from_uplink(&stranger).passed();
            w.to_pod(&stranger, w.pod_a, w.uplink).dropped("ingress_policy");
        }
        let spoofed =
            |src_mac: Mac, src: IpAddr| Frame { src_mac, ..sent_by(src, 1, hosts(Family::V4).remote, 80, L4::syn()) };
        let from_a = |frame: Frame| w.run(Hook::FromPod, &frame.bytes(), w.pod_a, w.pod_a, None);
        from_a(spoofed(MAC_A, hosts(Family::V4).b)).dropped("source_address");
        from_a(spoofed(MAC_B, hosts(Family::V4).b)).dropped("source_address");
        from_a(spoofed(MAC_UPLINK, hosts(Family::V4).a)).dropped("source_mac");
    });
}
