//! VXLAN envelopes: built, opened, and what the uplink and the pods' hooks do with them.

use std::net::{IpAddr, SocketAddr};

use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, Frame, L4, SYN, read, sum};
use crate::world::*;

/// Flags and identifier of a header with our network's identifier.
const HEADER: [u8; 8] = [8, 0, 0, 0, 0, 0, VNI as u8, 0];
/// Where the outer IPv4 header lies, and how much lies before the inner frame.
const OUTER: usize = 14;
const WRAPPED: usize = 50;

/// The outer frame, without what is in it, and the inner one. The outer link header is still the one that the pod wrote: it is
/// written anew on the way to the next hop, for the protocol that the packet then has.
#[track_caller]
pub fn open(bytes: &[u8]) -> (Frame, Vec<u8>) {
    let mut outer = read(&[&bytes[..12], &[8, 0], &bytes[OUTER..]].concat());
    let L4::Udp { payload, checksum: false } = &mut outer.l4 else { panic!("not UDP without a checksum: {outer:?}") };
    let inner = payload.split_off(8);
    assert_eq!(payload.as_slice(), HEADER);
    (outer, inner)
}

/// A frame in an envelope from the node at `from` to this one.
pub fn wrap(inner: &[u8], from: &str) -> Frame {
    let payload = [HEADER.as_slice(), inner].concat();
    arriving(MAC_UPLINK, ip(from), 50000, ip("192.168.50.1"), 4789, L4::Udp { payload, checksum: false })
}

/// The same as bytes, in which `change` may change anything; the outer header's checksum is made right again.
fn changed(inner: &Frame, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = wrap(&inner.bytes(), "192.168.50.2").bytes();
    change(&mut bytes);
    let header = OUTER..OUTER + 20;
    bytes[OUTER + 10..OUTER + 12].fill(0);
    let check = sum(&[&bytes[header]]).to_be_bytes();
    bytes[OUTER + 10..OUTER + 12].copy_from_slice(&check);
    bytes
}

fn uplink(w: &World, bytes: &[u8]) -> Outcome {
    w.run(towpath_datapath::bpf::Hook::FromUplink, bytes, w.uplink, w.uplink, None)
}

#[test]
fn an_envelope_of_the_owning_node_is_opened_at_the_uplink() {
    in_both_worlds(|w| {
        for h in BOTH.map(hosts) {
            let syn = arriving(MAC_TUNNEL, h.remote, 4000, h.a, 80, L4::syn());
            let got = w.from_uplink(&wrap(&syn.bytes(), "192.168.50.2")).into_pod(w.pod_a);
            assert_eq!((got.src, got.dst, got.ttl), (syn.src, syn.dst, 63));
            assert_eq!((got.dst_mac, got.src_mac), (MAC_A, MAC_HOST));
            let answer = sent_by(h.a, 80, h.remote, 4000, L4::tcp(SYN | ACK));
            w.from_pod(&answer).into_tunnel(w, ip("192.168.50.2"));
            let data = arriving(MAC_TUNNEL, h.remote, 4000, h.a, 80, L4::data(b"known by now"));
            let got = w.from_uplink(&wrap(&data.bytes(), "192.168.50.2")).into_pod(w.pod_a);
            assert_eq!(got.l4, data.l4);
            // The node's own address in the tunnel, and an outside client that the node forwards.
            for (n, src) in [h.node2, h.outside].into_iter().enumerate() {
                let frame = arriving(MAC_TUNNEL, src, 4100 + n as u16, h.a, 80, L4::udp(b"x"));
                w.from_uplink(&wrap(&frame.bytes(), "192.168.50.2")).into_pod(w.pod_a);
            }
        }
    });
}

#[test]
fn what_the_uplink_does_not_open_goes_on_as_it_came() {
    in_both_worlds(|w| {
        for h in BOTH.map(hosts) {
            let syn = arriving(MAC_TUNNEL, h.remote, 4000, h.a, 80, L4::syn());
            let same = |what: &str, bytes: &[u8]| {
                let got = uplink(w, bytes);
                assert_eq!((got.verdict, got.bytes.as_slice()), (PASS, bytes), "{what}");
            };
            same("another network", &changed(&syn, |b| b[OUTER + 34] = 9));
            same("an unknown flag", &changed(&syn, |b| b[OUTER + 28] = 0x88));
            same("a UDP checksum", &changed(&syn, |b| b[OUTER + 27] = 1));
            same("congestion met on the way", &changed(&syn, |b| b[OUTER + 1] = 3));
            same("a fragment", &changed(&syn, |b| b[OUTER + 6] = 0x20));
            same("another inner protocol", &changed(&syn, |b| b[OUTER + WRAPPED - 1] = 6));
            let wrapped = |frame: &Frame| wrap(&frame.bytes(), "192.168.50.2").bytes();
            same("for the node itself", &wrapped(&arriving(MAC_TUNNEL, h.remote, 4000, h.node, 22, L4::syn())));
            let mut nobody = h.a;
            if let IpAddr::V4(v4) = &mut nobody {
                *v4 = [10, 1, 0, 99].into();
            } else {
                nobody = ip("fd01::99");
            }
            same("for nobody", &wrapped(&arriving(MAC_TUNNEL, h.remote, 4000, nobody, 80, L4::syn())));
            same("at the end of its life", &wrapped(&Frame { ttl: 1, ..syn.clone() }));
            for src in [h.b, h.a, h.node] {
                same("a source of ours", &wrapped(&arriving(MAC_TUNNEL, src, 4000, h.a, 80, L4::syn())));
            }
            let of_node3 = wrap(&syn.bytes(), "192.168.50.3").bytes();
            same("a source of another node", &of_node3);
            // A known flow is not taken over by another node.
            w.from_uplink(&wrap(&syn.bytes(), "192.168.50.2")).into_pod(w.pod_a);
            same("a source of another node", &of_node3);
            w.from_uplink(&wrap(&syn.bytes(), "198.51.100.9")).dropped("tunnel_outsider");
            w.from_uplink(&wrap(&syn.bytes(), "192.168.50.1")).dropped("spoofed_node");
        }
    });
}

#[test]
fn a_cut_envelope_harms_nobody() {
    in_both_worlds(|w| {
        for h in BOTH.map(hosts) {
            let whole = wrap(&arriving(MAC_TUNNEL, h.remote, 4000, h.a, 80, L4::syn()).bytes(), "192.168.50.2").bytes();
            for len in OUTER + 20..whole.len() {
                let got = uplink(w, &whole[..len]);
                assert_eq!(got.verdict, PASS, "{len} of {} bytes: {got:?}", whole.len());
            }
            uplink(w, &whole).into_pod(w.pod_a);
        }
    });
}

#[test]
fn policy_holds_for_what_is_opened() {
    in_both_worlds(|w| {
        w.isolate(&w.local_a(), 1, 0);
        for h in BOTH.map(hosts) {
            w.allow(1, h.remote, RowProtocol::Ports(Protocol::Tcp), 80, 5);
        }
        w.apply_policy();
        for h in BOTH.map(hosts) {
            let to = |port| wrap(&arriving(MAC_TUNNEL, h.remote, 4000, h.a, port, L4::syn()).bytes(), "192.168.50.2");
            w.from_uplink(&to(80)).into_pod(w.pod_a);
            w.from_uplink(&to(81)).dropped("ingress_policy");
        }
    });
}

#[test]
fn the_answer_of_a_remote_backend_is_the_services() {
    in_both_worlds(|w| {
        for (id, family) in (1..).zip([Family::V4, Family::V6]) {
            let h = hosts(family);
            w.serve(id, family, Some(h.service), 80, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
            w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::syn())).into_tunnel(w, ip("192.168.50.2"));
            let answer = arriving(MAC_TUNNEL, h.remote, 8080, h.a, 4000, L4::tcp(SYN | ACK));
            let got = w.from_uplink(&wrap(&answer.bytes(), "192.168.50.2")).into_pod(w.pod_a);
            assert_eq!(got.src, SocketAddr::new(h.service, 80));
        }
    });
}

#[test]
fn the_outer_header_carries_the_inner_ones_congestion_bits() {
    in_both_worlds(|w| {
        for h in BOTH.map(hosts) {
            for (n, (inner, outer)) in [(0u8, 0u8), (1, 1), (2, 2), (3, 2)].into_iter().enumerate() {
                let mut bytes = sent_by(h.a, 4000 + n as u16, h.remote, 80, L4::syn()).bytes();
                if h.a.is_ipv4() {
                    bytes[OUTER + 1] = inner;
                    bytes[OUTER + 10..OUTER + 12].fill(0);
                    let check = sum(&[&bytes[OUTER..OUTER + 20]]).to_be_bytes();
                    bytes[OUTER + 10..OUTER + 12].copy_from_slice(&check);
                } else {
                    bytes[OUTER + 1] = inner << 4;
                }
                let got = w.run(towpath_datapath::bpf::Hook::FromPod, &bytes, w.pod_a, w.pod_a, None);
                got.into_tunnel(w, ip("192.168.50.2"));
                assert_eq!(got.bytes[OUTER + 1], outer, "inner {inner}");
            }
        }
    });
}

#[test]
fn without_a_way_for_the_envelope_the_tunnel_device_takes_the_packet() {
    in_both_worlds(|w| {
        let mut far = peers();
        far[1].tunnel = ip("203.0.113.2");
        sh("ip route add unreachable 203.0.113.2");
        w.programs.apply_peers(&far).unwrap();
        for h in BOTH.map(hosts) {
            let got = w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn())).by_tunnel_device(w);
            assert_eq!((got.src.ip(), got.dst.ip(), got.ttl), (h.a, h.remote, 63));
        }
        // A path with less room than the packet needs: the device's stack fragments the outer packet, or says so.
        sh("ip route replace 203.0.113.2 via 192.168.50.2 dev up0 mtu lock 600");
        for h in BOTH.map(hosts) {
            let small = w.from_pod(&sent_by(h.a, 4001, h.remote, 80, L4::udp(&[7; 300])));
            assert_eq!((small.kind, small.ifindex), (3, w.uplink));
            w.from_pod(&sent_by(h.a, 4001, h.remote, 80, L4::udp(&[7; 800]))).by_tunnel_device(w);
        }
    });
}
