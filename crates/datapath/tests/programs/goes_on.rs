//! Later packets of a connection to a Service: what changes nothing about it goes on by its translation alone, everything else does not.

use std::net::SocketAddr;

use towpath_datapath::abi::*;
use towpath_datapath::bpf::Hook;
use towpath_model::desired::RowProtocol;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, FIN, Frame, L4, RST, SYN};
use crate::world::*;

/// What pod a sends to the Service from one port.
fn asks(family: Family, l4: L4) -> Frame {
    let h = hosts(family);
    sent_by(h.a, 4000, h.service, 80, l4)
}

/// Opens a connection from pod a to pod b by the Service, and uses it until its translation knows that.
fn open(w: &mut World, family: Family) {
    let h = hosts(family);
    w.serve(1 + family as u32, family, Some(h.service), 80, Protocol::Tcp, &[SocketAddr::new(h.b, 8080)]);
    w.from_pod(&asks(family, L4::syn())).into_pod(w.pod_b);
    w.from_pod(&sent_by(h.b, 8080, h.a, 4000, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
    w.from_pod(&asks(family, L4::tcp(ACK))).into_pod(w.pod_b);
    assert!(translations(w).iter().all(|(_, nat)| nat.fresh != 0), "{:?}", translations(w));
}

fn translations(w: &World) -> Vec<(Tuple, Nat)> {
    w.entries("tp_nat")
}

fn connections(w: &World) -> Vec<(CtKey, Ct)> {
    w.entries("tp_ct")
}

#[test]
fn a_packet_that_changes_nothing_needs_no_look_at_its_connection() {
    in_world(|w| {
        for family in BOTH {
            open(w, family);
            // Gone behind the programs' backs: who looked at it would enter it anew.
            for (key, _) in connections(w) {
                libbpf_rs::MapCore::delete(&w.map("tp_ct"), &bytes_of(&key)).unwrap();
            }
            let got = w.from_pod(&asks(family, L4::data(b"more"))).into_pod(w.pod_b);
            assert_eq!((got.src, got.dst), ((hosts(family).a, 4000).into(), (hosts(family).b, 8080).into()));
            assert_eq!((got.l4, got.dst_mac, got.src_mac), (L4::data(b"more"), MAC_B, MAC_HOST));
            assert!(connections(w).is_empty());
            // Some seconds later it does.
            w.age(5);
            w.from_pod(&asks(family, L4::data(b"more"))).into_pod(w.pod_b);
            assert_eq!(connections(w).len(), 1);
            w.age(9 * 3600);
            w.programs.collect().unwrap();
        }
    });
}

#[test]
fn a_backend_on_another_node_is_reached_through_the_tunnel_all_the_same() {
    in_world(|w| {
        let h = hosts(Family::V4);
        w.serve(1, Family::V4, Some(h.service), 80, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
        w.from_pod(&asks(Family::V4, L4::syn())).into_tunnel(w, h.node2);
        w.from_tunnel(&sent_by(h.remote, 8080, h.a, 4000, L4::tcp(SYN | ACK)), "192.168.50.2").into_pod(w.pod_a);
        for text in ["one", "two"] {
            let l4 = L4::data(text.as_bytes());
            let got = w.from_pod(&asks(Family::V4, l4.clone())).into_tunnel(w, h.node2);
            assert_eq!((got.dst, got.l4), ((h.remote, 8080).into(), l4));
        }
        assert!(translations(w).iter().all(|(_, nat)| nat.fresh != 0));
    });
}

#[test]
fn its_end_is_seen_and_others_packets_do_not_go_on_by_it() {
    in_world(|w| {
        for family in BOTH {
            open(w, family);
            // From the other pod's device, and with another's address on the wire.
            let data = asks(family, L4::data(b"more"));
            w.run(Hook::FromPod, &data.bytes(), w.pod_b, w.pod_b, None).dropped("source_address");
            let lie = Frame { src_mac: MAC_B, ..data };
            w.run(Hook::FromPod, &lie.bytes(), w.pod_a, w.pod_a, None).dropped("source_mac");
            let closed = |w: &World, bits: u32| connections(w).iter().any(|(_, ct)| ct.flags & bits != 0);
            for (l4, bits) in [(L4::tcp(FIN | ACK), TP_CT_FIN_A | TP_CT_FIN_B), (L4::tcp(RST), TP_CT_RST)] {
                assert!(!closed(w, bits));
                w.from_pod(&asks(family, l4)).into_pod(w.pod_b);
                assert!(closed(w, bits));
            }
            w.age(60);
            w.programs.collect().unwrap();
            assert!(connections(w).is_empty() && translations(w).is_empty());
        }
    });
}

#[test]
fn a_change_of_policy_ends_it_at_once_and_lets_it_go_on_when_it_may() {
    in_world(|w| {
        let h = hosts(Family::V4);
        open(w, Family::V4);
        let b = w.local_b();
        w.isolate(&b, 5, 0);
        w.apply_policy();
        w.from_pod(&asks(Family::V4, L4::data(b"more"))).dropped("ingress_policy");
        w.allow(5, h.a, RowProtocol::Ports(Protocol::Tcp), 8080, 42);
        w.apply_policy();
        for _ in 0..2 {
            w.from_pod(&asks(Family::V4, L4::data(b"more"))).into_pod(w.pod_b);
        }
        // What it knows is of now again.
        let judged = connections(w).first().map(|(_, ct)| ct.ingress as u32).unwrap();
        assert_eq!(translations(w).first().map(|(_, nat)| nat.revision), Some(judged));
    });
}

#[test]
fn an_entry_that_is_anothers_by_now_is_not_believed() {
    in_world(|w| {
        open(w, Family::V4);
        let (key, nat) = *translations(w).first().unwrap();
        w.write("tp_nat", &key, &Nat { mark: nat.mark ^ 2, ..nat });
        for (key, _) in connections(w) {
            libbpf_rs::MapCore::delete(&w.map("tp_ct"), &bytes_of(&key)).unwrap();
        }
        w.from_pod(&asks(Family::V4, L4::data(b"more"))).into_pod(w.pod_b);
        assert_eq!(connections(w).len(), 1, "looked at");
    });
}
