//! Pods that receive no more than a limit allows: what is for them is judged as for anybody, and then waits at their device.

use libbpf_rs::ProgramInput;
use towpath_datapath::bpf::Hook;
use towpath_model::desired::RowProtocol;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, Frame, L4, SYN};
use crate::world::*;

/// What programs write on a packet that was judged (`TP_MARK_DELIVERED`).
const DELIVERED: u32 = 0x7470_d311;

/// Verdict, and mark when it was done.
fn with_mark(w: &World, hook: Hook, frame: &Frame, (device, ingress): (u32, u32), mark: u32) -> (u32, u32) {
    // struct __sk_buff: mark at 8, ingress_ifindex at 36, ifindex at 40.
    let (mut context, mut after) = ([0u8; 192], [0u8; 192]);
    for (at, value) in [(8, mark), (36, ingress), (40, device)] {
        context[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    let (data, mut out) = (frame.bytes(), vec![0u8; 2048]);
    let program = w.programs.object().progs_mut().find(|p| p.name() == hook.program()).unwrap();
    let output = program
        .test_run(ProgramInput {
            context_in: Some(&mut context),
            context_out: Some(&mut after),
            data_in: Some(&data),
            data_out: Some(&mut out),
            ..ProgramInput::default()
        })
        .unwrap();
    (output.return_value, u32::from_ne_bytes(after[8..12].try_into().unwrap()))
}

fn limit_b(w: &mut World, waits: bool) -> bool {
    let b = w.local_b();
    w.programs.set_waits(&b, waits).unwrap()
}

#[test]
fn what_is_for_it_goes_to_its_device_and_open_connections_follow_a_change() {
    in_world(|w| {
        for h in BOTH.map(hosts) {
            w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::syn())).into_pod(w.pod_b);
            w.from_pod(&sent_by(h.b, 80, h.a, 4000, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
        }
        assert!(limit_b(w, true) && !limit_b(w, true), "a change once");
        for h in BOTH.map(hosts) {
            let data = sent_by(h.a, 4000, h.b, 80, L4::data(b"1"));
            for _ in 0..2 {
                let got = w.from_pod(&data).out_of(2, w.pod_b);
                assert_eq!((got.dst_mac, got.src_mac, got.ttl), (MAC_B, MAC_HOST, 63), "nobody sees the bit");
            }
            assert_eq!(with_mark(w, Hook::FromPod, &data, (w.pod_a, w.pod_a), 0), (REDIRECT, DELIVERED));
            // Of a datagram a copy waits, and the original is gone: to no device.
            let datagram = sent_by(h.a, 4000, h.b, 53, L4::udp(b"?"));
            w.from_pod(&datagram).out_of(2, w.pod_b);
            assert_eq!(w.to_pod(&sent_by(h.node, 4000, h.b, 53, L4::udp(b"?")), w.pod_b, 0).verdict, REDIRECT);
            // The node's own connections wait themselves.
            assert_eq!(w.to_pod(&sent_by(h.node, 4000, h.b, 80, L4::syn()), w.pod_b, 0).verdict, PASS);
            // What it sends itself goes to others as ever.
            w.from_pod(&sent_by(h.b, 80, h.a, 4000, L4::data(b"2"))).into_pod(w.pod_a);
            // From another node.
            let far = sent_by(h.remote, 4000, h.b, 80, L4::syn());
            w.from_tunnel(&far, "192.168.50.2").out_of(2, w.pod_b);
        }
        let b = w.local_b();
        w.programs.adopt_pod(&b).unwrap();
        w.apply_policy();
        assert!(!limit_b(w, true), "neither a new agent nor a policy ends it");
        assert!(limit_b(w, false));
        for h in BOTH.map(hosts) {
            w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::data(b"3"))).into_pod(w.pod_b);
            w.from_tunnel(&sent_by(h.remote, 4000, h.b, 80, L4::tcp(ACK)), "192.168.50.2").into_pod(w.pod_b);
        }
    });
}

#[test]
fn through_a_service_too_from_inside_and_from_outside() {
    in_both_worlds(|w| {
        limit_b(w, true);
        for (id, family) in (1..).zip(BOTH) {
            let h = hosts(family);
            let backends = [std::net::SocketAddr::new(h.b, 8080)];
            w.serve(id, family, Some(h.service), 80, Protocol::Tcp, &backends);
            w.serve(10 + id, family, None, 30080, Protocol::Tcp, &backends);
            for l4 in [L4::syn(), L4::tcp(ACK), L4::data(b"1")] {
                w.from_pod(&sent_by(h.a, 4000, h.service, 80, l4)).out_of(2, w.pod_b);
            }
            let asked = arriving(MAC_UPLINK, h.outside, 4000, h.node, 30080, L4::syn());
            w.from_uplink(&asked).out_of(2, w.pod_b);
        }
    });
}

#[test]
fn policy_is_not_passed_over_by_waiting() {
    in_world(|w| {
        let (a, b) = (w.local_a(), w.local_b());
        limit_b(w, true);
        for h in BOTH.map(hosts) {
            w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::syn())).out_of(2, w.pod_b);
        }
        w.isolate(&b, 5, 0);
        w.apply_policy();
        for h in BOTH.map(hosts) {
            w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::tcp(ACK))).dropped("ingress_policy");
            w.from_pod(&sent_by(h.a, 4001, h.b, 80, L4::syn())).dropped("ingress_policy");
            w.from_tunnel(&sent_by(h.remote, 4000, h.b, 80, L4::syn()), "192.168.50.2").dropped("ingress_policy");
            w.to_pod(&sent_by(h.outside, 4000, h.b, 80, L4::syn()), w.pod_b, w.uplink).dropped("ingress_policy");
        }
        // An answer that may not leave the pod that was asked.
        w.isolate(&b, 0, 0);
        w.isolate(&a, 0, 6);
        w.apply_policy();
        w.allow(6, hosts(Family::V4).b, RowProtocol::Ports(Protocol::Tcp), 80, 42);
        w.apply_policy();
        let h = hosts(Family::V4);
        w.from_pod(&sent_by(h.a, 4002, h.b, 80, L4::syn())).out_of(2, w.pod_b);
        w.from_pod(&sent_by(h.a, 4002, h.b, 81, L4::syn())).dropped("egress_policy");
    });
}

#[test]
fn only_what_came_in_by_a_device_passes_by_its_mark_and_keeps_none() {
    in_world(|w| {
        let b = w.local_b();
        limit_b(w, true);
        w.isolate(&b, 5, 0);
        w.apply_policy();
        for h in BOTH.map(hosts) {
            let stranger = sent_by(h.outside, 4000, h.b, 80, L4::syn());
            let (to_pod, by_stack) = (Hook::ToPod, (w.pod_b, w.uplink));
            assert_eq!(with_mark(w, to_pod, &stranger, by_stack, DELIVERED), (PASS, 0));
            // Others' marks open nothing, and stay.
            for mark in [0, 1, DELIVERED + 1, DELIVERED | 1 << 31, u32::MAX] {
                assert_eq!(with_mark(w, to_pod, &stranger, by_stack, mark), (DROP, mark));
            }
            // Written by a process of the node, whose packets have no ingress device: read like any other packet of its own.
            let pretends = ip(if h.b.is_ipv4() { "169.254.116.9" } else { "fd00:7470::9" });
            let forged = sent_by(pretends, 4000, h.b, 80, L4::syn());
            assert_eq!(with_mark(w, to_pod, &forged, (w.pod_b, 0), DELIVERED), (DROP, DELIVERED));
        }
    });
}
