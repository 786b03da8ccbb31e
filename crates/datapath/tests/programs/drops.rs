//! What is dropped is told to whoever listens, as it was sent, with the rule that denied it; and to nobody else.

use std::net::SocketAddr;
use std::time::SystemTime;

use libbpf_rs::ProgramInput;
use towpath_datapath::bpf::{Dropped, DropsEar, Hook, Place};
use towpath_model::desired::{RowProtocol, RuleId};
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, L4};
use crate::world::*;

/// What was told by now.
pub fn told(ear: &DropsEar) -> Vec<Dropped> {
    let mut all = Vec::new();
    ear.listen(|dropped| {
        let more = dropped.is_some();
        all.extend(dropped);
        more
    })
    .unwrap();
    all
}

#[test]
fn a_denied_packet_is_told_as_it_was_sent_with_backend_and_rule() {
    in_both_worlds(|w| {
        let ear = w.programs.listen_to_drops().unwrap();
        for family in BOTH {
            let h = hosts(family);
            let a = w.local_a();
            w.serve(1 + family as u32, family, Some(h.service), 80, Protocol::Tcp, &[SocketAddr::new(h.b, 8080)]);
            w.isolate(&a, 0, 6);
            w.apply_policy();
            let before = SystemTime::now();
            w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::syn())).dropped("egress_policy");
            let [dropped] = told(&ear).try_into().unwrap();
            assert_eq!(dropped.ends, Some(((h.a, 4000), (h.service, 80))));
            assert_eq!(dropped.backend, Some((h.b, 8080)));
            assert_eq!((dropped.rule, dropped.reason.name()), (Some(RuleId::DEFAULT_DENY), "egress_policy"));
            assert_eq!((dropped.place, dropped.protocol, dropped.tcp_flags), (Place::Device, 6, 2));
            assert_eq!(dropped.ifindex, w.pod_a);
            assert!(dropped.bytes >= 54, "{dropped:?}");
            let late = dropped.at.duration_since(before).unwrap_or_default();
            assert!(late.as_secs() < 5, "{late:?}");
        }
    });
}

#[test]
fn a_packet_of_a_connection_that_is_not_allowed_any_more_is_told_with_its_own_rule() {
    in_world(|w| {
        let h = hosts(Family::V4);
        let (a, b) = (w.local_a(), w.local_b());
        w.isolate(&a, 0, 6);
        w.isolate(&b, 5, 0);
        w.allow(6, h.b, RowProtocol::Ports(Protocol::Tcp), 80, 61);
        w.allow(5, h.a, RowProtocol::Ports(Protocol::Tcp), 80, 51);
        w.apply_policy();
        w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::syn())).into_pod(w.pod_b);
        let ear = w.programs.listen_to_drops().unwrap();
        w.isolate(&b, 9, 0);
        w.apply_policy();
        w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::tcp(ACK))).dropped("ingress_policy");
        // And once more, by what the connection's entry says now.
        w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::tcp(ACK))).dropped("ingress_policy");
        let rules: Vec<_> = told(&ear).iter().map(|dropped| (dropped.rule, dropped.ends, dropped.backend)).collect();
        let wanted = (Some(RuleId::DEFAULT_DENY), Some(((h.a, 4000), (h.b, 80))), None);
        assert_eq!(rules, [wanted, wanted]);
    });
}

#[test]
fn what_is_denied_by_no_policy_has_no_rule_and_what_cannot_be_read_no_ends() {
    in_world(|w| {
        let h = hosts(Family::V4);
        let ear = w.programs.listen_to_drops().unwrap();
        w.from_pod(&sent_by(ip("10.1.0.99"), 1, h.b, 2, L4::udp(&[1; 8]))).dropped("source_address");
        let [forged] = told(&ear).try_into().unwrap();
        assert_eq!((forged.rule, forged.ends), (None, Some(((ip("10.1.0.99"), 1), (h.b, 2)))));
        // An ARP packet that is cut off: nothing of the packet before may be told of it.
        let mut cut = vec![0xff; 12];
        cut.extend([8, 6, 0, 1]);
        w.run(Hook::FromPod, &cut, w.pod_a, w.pod_a, None).dropped("malformed");
        let [cut] = told(&ear).try_into().unwrap();
        assert_eq!((cut.ends, cut.backend, cut.reason.name()), (None, None, "malformed"));
        // Nor of one that the kernel would have a pod hear.
        w.to_pod(&arriving(MAC_HOST, h.remote, 1, ip("10.1.0.99"), 2, L4::udp(&[1; 8])), w.pod_a, w.uplink)
            .dropped("no_pod");
        let mut arp = vec![0xff; 12];
        arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        arp.resize(42, 0);
        w.run(Hook::ToPod, &arp, w.pod_a, w.uplink, None).dropped("no_pod");
        let [before, arp] = told(&ear).try_into().unwrap();
        assert_eq!(before.ends, Some(((h.remote, 1), (ip("10.1.0.99"), 2))));
        assert_eq!((arp.ends, arp.backend, arp.reason.name(), arp.bytes), (None, None, "no_pod", 42));
    });
}

#[test]
fn nobody_who_does_not_listen_is_told() {
    in_world(|w| {
        let h = hosts(Family::V4);
        let forge = || w.from_pod(&sent_by(ip("10.1.0.99"), 1, h.b, 2, L4::udp(&[1; 8]))).dropped("source_address");
        forge();
        let ear = w.programs.listen_to_drops().unwrap();
        forge();
        assert_eq!(told(&ear).len(), 1, "only what came while it listened");
        // Told, and not heard: the next one is not told of it as of now.
        forge();
        drop(ear);
        forge();
        let ear = w.programs.listen_to_drops().unwrap();
        assert_eq!((told(&ear).len(), ear.untold().unwrap()), (0, 0));
    });
}

/// The same frame out of a pod, as fast as the kernel runs the program.
fn flood(w: &World, frame: &[u8], times: u32) {
    let program = w.programs.object().progs_mut().find(|p| p.name() == Hook::FromPod.program()).unwrap();
    // struct __sk_buff: ifindex at 40.
    let mut context = [0u8; 192];
    context[40..44].copy_from_slice(&w.pod_a.to_ne_bytes());
    let input =
        ProgramInput { context_in: Some(&mut context), data_in: Some(frame), repeat: times, ..ProgramInput::default() };
    program.test_run(input).unwrap();
}

#[test]
fn of_a_flood_a_part_is_told_and_the_rest_is_counted() {
    in_world(|w| {
        let h = hosts(Family::V4);
        let frame = sent_by(ip("10.1.0.99"), 1, h.b, 2, L4::udp(&[1; 8]));
        let ear = w.programs.listen_to_drops().unwrap();
        const SENT: u32 = 50_000;
        flood(w, &frame.bytes(), SENT);
        let (told, untold) = (told(&ear).len() as u64, ear.untold().unwrap());
        assert_eq!(told + untold, u64::from(SENT));
        assert!(untold > told && told >= 100, "{told} were told, {untold} not");
    });
}
