//! The program of XDP: what it forwards, what it leaves alone, and that a packet's fate is the same either way. (That it decides nothing
//! otherwise than the hooks of tc the other fixtures show, which run in both worlds.)

use std::net::SocketAddr;

use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::envelope::wrap;
use crate::frame::{ACK, FIN, Frame, L4, Mac, SYN, read};
use crate::world::*;

const MAC_NODE2: Mac = [2, 0, 0, 0, 0, 2];
const NODE2: &str = "192.168.50.2";

/// The same question, always from outside.
fn ask(w: &World, family: Family, sport: u16, dport: u16, l4: L4) -> Frame {
    let h = hosts(family);
    let _ = w;
    arriving(MAC_UPLINK, h.outside, sport, h.node, dport, l4)
}

/// A backend's answer, as node 2 sends it.
fn answer(family: Family, from: u16, sport: u16, l4: L4) -> Vec<u8> {
    let h = hosts(family);
    wrap(&arriving(MAC_TUNNEL, h.remote, from, h.outside, sport, l4).bytes(), NODE2).bytes()
}

/// What the program of XDP must leave to the hooks of tc, as it is.
#[track_caller]
fn left_alone(w: &World, what: &str, bytes: &[u8]) {
    let got = w.on_wire(bytes, w.uplink);
    assert_eq!(got.verdict, PASS, "{what}: {got:?}");
}

/// Sets the bytes of a frame's transport checksum.
fn with_sum(family: Family, base: usize, at: usize, sum: u16, mut bytes: Vec<u8>) -> Vec<u8> {
    let l4 = base + if family == Family::V4 { 34 } else { 54 };
    bytes[l4 + at..l4 + at + 2].copy_from_slice(&sum.to_be_bytes());
    bytes
}

#[test]
fn a_node_port_with_a_remote_backend_is_turned_round_before_the_stack() {
    in_accelerated_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, None, 30080, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
            w.serve(11 + family as u32, family, Some(h.service), 80, Protocol::Tcp, &[SocketAddr::new(h.remote, 80)]);
            w.serve(21 + family as u32, family, None, 30053, Protocol::Udp, &[SocketAddr::new(h.remote, 53)]);
            let bare = L4::Udp { payload: b"no checksum".to_vec(), checksum: false };
            let cases = [
                (
                    h.node,
                    30080,
                    8080,
                    vec![
                        (L4::syn(), L4::tcp(SYN | ACK)),
                        (L4::data(&[7; 1301]), L4::data(&[9; 1400])),
                        (L4::tcp(FIN | ACK), L4::tcp(FIN | ACK)),
                    ],
                ),
                (h.service, 80, 80, vec![(L4::syn(), L4::tcp(SYN | ACK)), (L4::data(b"x"), L4::data(b"y"))]),
                (h.node, 30053, 53, vec![(L4::udp(b"question"), L4::udp(b"an answer")), (bare.clone(), bare)]),
            ];
            for (to, port, backend, exchanges) in cases {
                for (question, reply) in exchanges {
                    let asked = arriving(MAC_UPLINK, h.outside, 4000, to, port, question.clone());
                    let got = w.from_uplink(&asked);
                    let (outer, inner) = crate::envelope::open(&got.by_wire().bytes);
                    // Both link headers are complete: nothing resolves a neighbour afterwards.
                    assert_eq!((outer.src_mac, outer.dst_mac), (MAC_UPLINK, MAC_NODE2));
                    assert_eq!((read(&inner).src_mac, read(&inner).dst_mac), (MAC_TUNNEL, tunnel_mac()));
                    let inner = got.into_tunnel(w, ip(NODE2));
                    assert_eq!((inner.src, inner.dst), (asked.src, SocketAddr::new(h.remote, backend)));
                    assert_eq!((inner.ttl, inner.l4), (63, question));
                    let got = w.run(
                        towpath_datapath::bpf::Hook::FromUplink,
                        &answer(family, backend, 4000, reply.clone()),
                        w.uplink,
                        w.uplink,
                        None,
                    );
                    let back = got.by_wire().out_of(3, w.uplink);
                    assert_eq!((back.src, back.dst), (SocketAddr::new(to, port), asked.src));
                    assert_eq!((back.src_mac, back.dst_mac), (MAC_UPLINK, MAC_ROUTER));
                    assert_eq!((back.ttl, back.l4), (63, reply));
                }
            }
            assert_eq!(w.programs.connections().unwrap().len(), 3 * (1 + usize::from(family == Family::V6)));
        }
    });
}

/// Of node 2's tunnel device, as every node computes it: 02:74 and its address, mapped into IPv6, folded (`bpf/abi.h`).
fn tunnel_mac() -> Mac {
    [2, 0x74, 192, 168, 50 ^ 0xff, 2 ^ 0xff]
}

#[test]
fn what_is_not_ordinary_goes_on_as_it_came() {
    in_accelerated_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            let v4 = family == Family::V4;
            w.serve(1 + family as u32, family, None, 30080, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
            w.serve(11 + family as u32, family, None, 30053, Protocol::Udp, &[SocketAddr::new(h.remote, 53)]);
            w.serve(21 + family as u32, family, None, 30081, Protocol::Tcp, &[]);
            w.serve(31 + family as u32, family, None, 30132, Protocol::Sctp, &[SocketAddr::new(h.remote, 30132)]);
            let syn = ask(w, family, 4000, 30080, L4::syn());
            left_alone(w, "at the end of its life", &Frame { ttl: 1, ..syn.clone() }.bytes());
            left_alone(w, "for another station", &Frame { dst_mac: MAC_ROUTER, ..syn.clone() }.bytes());
            left_alone(w, "for everybody", &Frame { dst_mac: [0xff; 6], ..syn.clone() }.bytes());
            left_alone(w, "without a backend", &ask(w, family, 4000, 30081, L4::syn()).bytes());
            left_alone(w, "nobody's port", &ask(w, family, 4000, 30099, L4::syn()).bytes());
            left_alone(
                w,
                "SCTP",
                &ask(
                    w,
                    family,
                    4000,
                    30132,
                    L4::Raw { proto: 132, bytes: vec![0x0f, 0xa0, 0x75, 0xb4, 0, 0, 0, 0, 0, 0, 0, 0] },
                )
                .bytes(),
            );
            left_alone(w, "a ping", &ask(w, family, 0, 0, L4::echo(v4, true, 7)).bytes());
            let udp = ask(w, family, 4000, 30053, L4::udp(&[1; 64]));
            left_alone(w, "a first fragment", &Frame { fragment: Some((9, 0, true)), ..udp.clone() }.bytes());
            left_alone(w, "a later fragment", &Frame { fragment: Some((9, 64, false)), ..udp.clone() }.bytes());
            left_alone(w, "too big for the tunnel", &ask(w, family, 4000, 30080, L4::data(&[0; 1450])).bytes());
            for src in [h.node, h.a, h.remote] {
                left_alone(
                    w,
                    "a source of the cluster's",
                    &arriving(MAC_UPLINK, src, 4000, h.node, 30080, L4::syn()).bytes(),
                );
            }
            let mut tagged = syn.bytes();
            tagged.splice(12..12, [0x81, 0, 0, 5]);
            left_alone(w, "a VLAN's", &tagged);
            let whole = syn.bytes();
            for len in 14..whole.len() {
                left_alone(w, "cut", &whole[..len]);
            }
            // None of them has left anything but the choices that were made.
            let connections = w.programs.connections().unwrap();
            assert!(connections.iter().all(|c| c.opener.0 == h.outside), "{connections:?}");
        }
    });
}

#[test]
fn an_answer_that_is_not_for_a_client_of_ours_goes_on_as_it_came() {
    in_accelerated_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, None, 30080, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
            let syn_ack = |sport| answer(family, 8080, sport, L4::tcp(SYN | ACK));
            left_alone(w, "without a question", &syn_ack(4000));
            w.from_uplink(&ask(w, family, 4000, 30080, L4::syn())).by_wire();
            left_alone(w, "to another port", &syn_ack(4001));
            let frame = |from: &str| {
                wrap(&arriving(MAC_TUNNEL, h.remote, 8080, h.outside, 4000, L4::tcp(SYN | ACK)).bytes(), from).bytes()
            };
            for from in ["192.168.50.3", "192.168.50.1", "198.51.100.77"] {
                left_alone(w, "from who is not the backend's node", &frame(from));
            }
            let whole = syn_ack(4000);
            for len in 14..whole.len() {
                left_alone(w, "cut", &whole[..len]);
            }
            w.run(towpath_datapath::bpf::Hook::FromUplink, &whole, w.uplink, w.uplink, None).by_wire();
        }
    });
}

#[test]
fn a_checksum_that_is_left_to_a_device_is_left_to_the_stack() {
    in_accelerated_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, None, 30080, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
            w.serve(11 + family as u32, family, None, 30053, Protocol::Udp, &[SocketAddr::new(h.remote, 53)]);
            for (port, backend, l4, at) in
                [(30080, 8080, L4::data(b"some bytes"), 16), (30053, 53, L4::udp(b"some bytes"), 6)]
            {
                if at == 16 {
                    w.from_uplink(&ask(w, family, 4000, port, L4::syn())).by_wire();
                }
                let asked = ask(w, family, 4000, port, l4.clone());
                let pseudo = pseudo_sum(&asked);
                left_alone(w, "a question", &with_sum(family, 0, at, pseudo, asked.bytes()));
                w.from_uplink(&asked).by_wire();
                let back = arriving(MAC_TUNNEL, h.remote, backend, h.outside, 4000, l4);
                let envelope = wrap(&back.bytes(), NODE2).bytes();
                left_alone(w, "an answer", &with_sum(family, 50, at, pseudo_sum(&back), envelope.clone()));
                w.run(towpath_datapath::bpf::Hook::FromUplink, &envelope, w.uplink, w.uplink, None).by_wire();
            }
        }
    });
}

/// What the kernel writes into the checksum field for a device to complete (CHECKSUM_PARTIAL).
fn pseudo_sum(frame: &Frame) -> u16 {
    let packet = frame.packet();
    let (addresses, len, proto) = match frame.src.is_ipv4() {
        true => (&packet[12..20], packet.len() - 20, packet[9]),
        false => (&packet[8..40], packet.len() - 40, packet[6]),
    };
    !crate::frame::sum(&[addresses, &(len as u32).to_be_bytes(), &[0, 0, 0, proto]])
}

#[test]
fn a_choice_that_is_made_here_is_the_one_that_counts() {
    in_accelerated_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            let backends = [SocketAddr::new(h.a, 8080), SocketAddr::new(h.remote, 8080), SocketAddr::new(h.b, 8080)];
            w.serve(1 + family as u32, family, None, 30080, Protocol::Tcp, &backends);
            w.table
                .frontends
                .values_mut()
                .map(std::sync::Arc::make_mut)
                .for_each(|target| target.algorithm = Algorithm::RoundRobin);
            w.apply_services();
            let (mut here, mut there) = (0, 0);
            for sport in 4000..4030 {
                let got = w.from_uplink(&ask(w, family, sport, 30080, L4::syn()));
                if got.counted.contains(&"accelerated") {
                    there += 1;
                } else {
                    assert!([w.pod_a, w.pod_b].contains(&got.ifindex) && got.kind == 1, "{got:?}");
                    here += 1;
                }
            }
            // Were it made again by tc, every second turn would be lost.
            assert_eq!((here, there), (20, 10));
        }
    });
}

#[test]
fn a_packet_without_a_way_from_here_takes_the_stacks() {
    in_accelerated_world(|w| {
        let h = hosts(Family::V4);
        w.serve(1, Family::V4, None, 30080, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
        // The neighbour is not known: somebody has to ask for it.
        sh("ip neigh del 192.168.50.2 dev up0");
        let asked = w.from_uplink(&ask(w, Family::V4, 4000, 30080, L4::syn()));
        assert!(!asked.counted.contains(&"accelerated"), "{asked:?}");
        asked.into_tunnel(w, ip(NODE2));
        sh("ip neigh add 192.168.50.2 lladdr 02:00:00:00:00:02 dev up0");
        w.from_uplink(&ask(w, Family::V4, 4000, 30080, L4::tcp(ACK))).by_wire().into_tunnel(w, ip(NODE2));
        // The way to the client leads out of another device.
        sh(
            "ip link add up2 type veth peer name up3; ip link set up2 up; ip link set up3 up; ip route add 198.51.100.0/24 dev up2",
        );
        left_alone(w, "by another device", &answer(Family::V4, 8080, 4000, L4::tcp(SYN | ACK)));
    });
}
