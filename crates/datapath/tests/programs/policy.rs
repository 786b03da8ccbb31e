//! Judgement: by set and class, of both ends, again after a change, for replies and ICMP errors, and with a full table.

use std::net::IpAddr;

use towpath_datapath::bpf::{Isolation, Limits};
use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, L4, SYN};
use crate::world::*;

const TCP_ROWS: RowProtocol = RowProtocol::Ports(Protocol::Tcp);

#[test]
fn ingress_of_an_isolated_pod_admits_what_a_row_allows() {
    in_world(|w| {
        let (b, family) = (w.local_b(), BOTH);
        w.isolate(&b, 5, 0);
        for h in family.map(hosts) {
            w.allow(5, h.a, TCP_ROWS, 80, 42);
        }
        w.apply_policy();
        for h in family.map(hosts) {
            w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::syn())).into_pod(w.pod_b);
            w.from_pod(&sent_by(h.a, 4000, h.b, 81, L4::syn())).dropped("ingress_policy");
            w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::udp(b"x"))).dropped("ingress_policy");
            w.from_pod(&sent_by(h.a, 0, h.b, 0, L4::echo(h.a.is_ipv4(), true, 3))).dropped("ingress_policy");
            // Its own egress is not isolated, and replies are part of what was allowed.
            w.from_pod(&sent_by(h.b, 80, h.a, 4000, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
            w.from_pod(&sent_by(h.b, 4444, h.a, 80, L4::syn())).into_pod(w.pod_a);
        }
        let judged: Vec<_> = w
            .programs
            .connections()
            .unwrap()
            .into_iter()
            .filter(|c| c.responder.1 == 80 && c.opener.1 == 4000)
            .collect();
        assert_eq!(judged.len(), 2);
        for connection in judged {
            let ingress = connection.ingress.unwrap();
            assert_eq!((ingress.verdict, ingress.rule), (Verdict::Allow, RuleId(42)));
            assert_eq!(connection.egress.unwrap().rule, RuleId::NOT_ISOLATED);
        }
    });
}

#[test]
fn port_ranges_and_everyone_are_rows_like_any_other() {
    in_world(|w| {
        let a = w.local_a();
        w.isolate(&a, 0, 6);
        // 8192–12287 to everybody the set does not mention, ICMP to nobody.
        let key = RowKey { set: SetId(6), class: LocalClass(0), protocol: TCP_ROWS, port: 8192, port_bits: 4 };
        w.image.rows.insert(key, Row { verdict: Verdict::Allow, rule: RuleId(1) });
        w.apply_policy();
        for h in BOTH.map(hosts) {
            for (port, allowed) in [(8191, false), (8192, true), (12287, true), (12288, false)] {
                let outcome = w.from_pod(&sent_by(h.a, 4000, h.outside, port, L4::syn()));
                if allowed {
                    outcome.passed();
                } else {
                    outcome.dropped("egress_policy");
                }
            }
            w.from_pod(&sent_by(h.a, 0, h.outside, 0, L4::echo(h.a.is_ipv4(), true, 3))).dropped("egress_policy");
        }
    });
}

#[test]
fn the_longest_range_gives_the_class_and_any_v6_is_not_any_v4() {
    in_world(|w| {
        let a = w.local_a();
        w.isolate(&a, 0, 6);
        for (net, class) in [("::/0", 1), ("198.51.100.0/24", 2), ("198.51.100.9/32", 3)] {
            w.image.cidr_classes.insert(net.parse().unwrap(), ClassId(class));
            w.image.set_classes.insert((SetId(6), ClassId(class)), LocalClass(class));
            let verdict = if class == 3 { Verdict::Deny } else { Verdict::Allow };
            let key = RowKey { set: SetId(6), class: LocalClass(class), protocol: TCP_ROWS, port: 0, port_bits: 0 };
            w.image.rows.insert(key, Row { verdict, rule: RuleId(class) });
        }
        w.apply_policy();
        let from = ip("10.1.0.10");
        w.from_pod(&sent_by(from, 1, ip("198.51.100.8"), 80, L4::syn())).passed();
        w.from_pod(&sent_by(from, 1, ip("198.51.100.9"), 80, L4::syn())).dropped("egress_policy");
        w.from_pod(&sent_by(from, 1, ip("203.0.113.1"), 80, L4::syn())).dropped("egress_policy");
        w.from_pod(&sent_by(ip("fd01::10"), 1, ip("fd99::9"), 80, L4::syn())).passed();
    });
}

#[test]
fn a_change_judges_open_connections_again_in_their_own_direction() {
    in_world(|w| {
        let h = hosts(Family::V4);
        w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::syn())).into_pod(w.pod_b);
        w.from_pod(&sent_by(h.a, 4000, h.b, 81, L4::syn())).into_pod(w.pod_b);
        let b = w.local_b();
        w.isolate(&b, 5, 5);
        w.allow(5, h.a, TCP_ROWS, 80, 42);
        w.apply_policy();
        // Port 80 stays, also seen from the isolated end, whose egress set allows nothing from port 80 to 4000.
        w.from_pod(&sent_by(h.b, 80, h.a, 4000, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
        w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::tcp(ACK))).into_pod(w.pod_b);
        // Port 81 ends, in both directions.
        w.from_pod(&sent_by(h.a, 4000, h.b, 81, L4::tcp(ACK))).dropped("ingress_policy");
        w.from_pod(&sent_by(h.b, 81, h.a, 4000, L4::tcp(ACK))).dropped("ingress_policy");
        // And comes back when it is allowed again.
        w.allow(5, h.a, TCP_ROWS, 81, 43);
        w.apply_policy();
        w.from_pod(&sent_by(h.a, 4000, h.b, 81, L4::tcp(ACK))).into_pod(w.pod_b);
    });
}

#[test]
fn a_packet_of_an_unknown_connection_is_judged_in_its_own_direction() {
    in_world(|w| {
        let h = hosts(Family::V4);
        let b = w.local_b();
        w.isolate(&b, 5, 5);
        w.allow(5, h.a, TCP_ROWS, 80, 42);
        w.apply_policy();
        w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::tcp(ACK))).into_pod(w.pod_b);
        w.from_pod(&sent_by(h.b, 80, h.a, 4001, L4::tcp(ACK))).dropped("egress_policy");
        // A SYN from the responder is no reply.
        w.from_pod(&sent_by(h.b, 80, h.a, 4000, L4::syn())).dropped("egress_policy");
        // Nor is an echo request of one's own part of the other's ping.
        let other = RowKey { set: SetId(5), class: LocalClass(1), protocol: RowProtocol::Other, port: 0, port_bits: 0 };
        w.image.rows.insert(other, Row { verdict: Verdict::Allow, rule: RuleId(44) });
        w.isolate(&b, 5, 8);
        w.apply_policy();
        w.from_pod(&sent_by(h.a, 0, h.b, 0, L4::echo(true, true, 9))).into_pod(w.pod_b);
        w.from_pod(&sent_by(h.b, 0, h.a, 0, L4::echo(true, false, 9))).into_pod(w.pod_a);
        w.from_pod(&sent_by(h.b, 0, h.a, 0, L4::echo(true, true, 9))).dropped("egress_policy");
    });
}

#[test]
fn a_pod_of_unknown_labels_talks_only_with_its_node() {
    in_world(|w| {
        let b = w.local_b();
        w.programs.set_pod(&b, Isolation::HostOnly).unwrap();
        for h in BOTH.map(hosts) {
            w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::syn())).dropped("ingress_policy");
            w.from_pod(&sent_by(h.b, 4000, h.a, 80, L4::syn())).dropped("egress_policy");
            w.from_pod(&sent_by(h.b, 4000, h.outside, 80, L4::syn())).dropped("egress_policy");
            w.from_pod(&sent_by(h.b, 4000, h.node, 80, L4::syn())).passed();
            w.to_pod(&arriving(MAC_B, h.node, 5000, h.b, 80, L4::syn()), w.pod_b, 0).passed();
            w.from_pod(&sent_by(h.b, 80, h.node, 5000, L4::tcp(SYN | ACK))).passed();
        }
        // What a policy image does not know is treated the same; what it knows is let free.
        w.image.pods.retain(|address, _| ![ip("10.1.0.10")].contains(address));
        w.apply_policy();
        w.from_pod(&sent_by(ip("10.1.0.10"), 4000, ip("198.51.100.9"), 80, L4::syn())).dropped("egress_policy");
        w.from_pod(&sent_by(ip("10.1.0.11"), 4000, ip("198.51.100.9"), 80, L4::syn())).passed();
    });
}

#[test]
fn the_own_node_is_known_by_what_it_generates_not_by_its_address() {
    in_world(|w| {
        let b = w.local_b();
        w.isolate(&b, 5, 5);
        w.apply_policy();
        for h in BOTH.map(hosts) {
            let probe = arriving(MAC_B, h.node, 5000, h.b, 80, L4::syn());
            w.to_pod(&probe, w.pod_b, w.uplink).dropped("ingress_policy");
            w.to_pod(&probe, w.pod_b, 0).passed();
            w.from_pod(&sent_by(h.b, 80, h.node, 5000, L4::tcp(SYN | ACK))).passed();
            // The entry that the probe made does not serve what came from elsewhere with the same address.
            w.to_pod(&arriving(MAC_B, h.node, 5000, h.b, 80, L4::tcp(ACK)), w.pod_b, w.uplink)
                .dropped("ingress_policy");
            // Nor does a change of policy turn the node out.
            w.image.cidr_classes.insert(IpAddr::from([9, 9, 9, 9]).into(), ClassId(h.node.is_ipv4() as u32 + 900));
            w.apply_policy();
            w.to_pod(&arriving(MAC_B, h.node, 5000, h.b, 80, L4::tcp(ACK)), w.pod_b, 0).passed();
        }
    });
}

/// The kernel makes fragments of a forwarded IPv6 packet anew, and forgets by which device it came.
#[test]
fn fragments_made_again_are_not_taken_for_the_nodes_own() {
    in_world(|w| {
        let b = w.local_b();
        w.isolate(&b, 5, 0);
        w.apply_policy();
        let h = hosts(towpath_model::Family::V6);
        // The fragment header (first, more to come, identification 7), then UDP to port 53.
        let mut bytes = vec![17, 0, 0, 1, 0, 0, 0, 7, 0x13, 0x88, 0, 53, 0, 24, 0, 0];
        bytes.extend([0; 16]);
        let fragment = |src| arriving(MAC_B, src, 0, h.b, 0, L4::Raw { proto: 44, bytes: bytes.clone() });
        w.to_pod(&fragment(h.outside), w.pod_b, 0).dropped("ingress_policy");
        w.to_pod(&fragment(h.node), w.pod_b, 0).passed();
    });
}

#[test]
fn a_pods_address_is_believed_only_from_where_the_pod_is() {
    in_world(|w| {
        for h in BOTH.map(hosts) {
            let from = |src| arriving(MAC_B, src, 5000, h.b, 80, L4::syn());
            w.to_pod(&from(h.a), w.pod_b, w.uplink).dropped("spoofed_node");
            w.to_pod(&from(h.a), w.pod_b, w.pod_a).passed();
            w.to_pod(&from(h.remote), w.pod_b, w.uplink).dropped("spoofed_node");
            w.to_pod(&from(h.remote), w.pod_b, w.tunnel).passed();
            w.to_pod(&from(h.outside), w.pod_b, w.uplink).passed();
        }
    });
}

#[test]
fn a_pod_always_reaches_itself_and_nobody_else_by_that() {
    in_world(|w| {
        let a = w.local_a();
        w.isolate(&a, 5, 6);
        w.apply_policy();
        for h in BOTH.map(hosts) {
            w.from_pod(&sent_by(h.a, 4000, h.a, 80, L4::syn())).into_pod(w.pod_a);
            w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::syn())).dropped("egress_policy");
            w.from_pod(&sent_by(h.b, 4000, h.a, 80, L4::syn())).dropped("ingress_policy");
            w.from_pod(&sent_by(h.b, 4000, h.b, 80, L4::syn())).into_pod(w.pod_b);
        }
    });
}

#[test]
fn the_stack_does_not_carry_what_policy_denies() {
    in_world(|w| {
        let b = w.local_b();
        w.isolate(&b, 5, 0);
        w.apply_policy();
        for h in BOTH.map(hosts) {
            w.to_pod(&arriving(MAC_B, h.outside, 5000, h.b, 80, L4::syn()), w.pod_b, w.uplink)
                .dropped("ingress_policy");
            w.to_pod(&arriving(MAC_B, h.outside, 5000, h.remote, 80, L4::syn()), w.pod_b, w.uplink).dropped("no_pod");
            // A reply to what the pod opened comes back through the stack.
            w.from_pod(&sent_by(h.b, 4000, h.outside, 443, L4::syn())).passed();
            w.to_pod(&arriving(MAC_B, h.outside, 443, h.b, 4000, L4::tcp(SYN | ACK)), w.pod_b, w.uplink).passed();
        }
    });
}

/// An ICMP error about a packet from `quoted.0` to `quoted.1`.
pub fn unreachable(src: IpAddr, dst: IpAddr, quoted: (IpAddr, u16, IpAddr, u16)) -> crate::frame::Frame {
    let inner = sent_by(quoted.0, quoted.1, quoted.2, quoted.3, L4::udp(b"hello")).packet();
    let (kind, code) = if src.is_ipv4() { (3, 3) } else { (1, 4) };
    sent_by(src, 0, dst, 0, L4::Icmp { kind, code, rest: [0; 4], payload: inner })
}

#[test]
fn an_icmp_error_is_as_welcome_as_the_flow_it_quotes() {
    in_world(|w| {
        let a = w.local_a();
        w.isolate(&a, 7, 0);
        w.apply_policy();
        for h in BOTH.map(hosts) {
            w.from_pod(&sent_by(h.a, 4000, h.b, 53, L4::udp(b"hello"))).into_pod(w.pod_b);
            w.from_pod(&unreachable(h.b, h.a, (h.a, 4000, h.b, 53))).into_pod(w.pod_a);
            w.from_pod(&unreachable(h.b, h.a, (h.a, 4001, h.b, 53))).dropped("ingress_policy");
            w.from_pod(&unreachable(h.b, h.a, (h.b, 4000, h.a, 53))).dropped("malformed");
            // b may not complain of what was sent to another.
            w.from_pod(&sent_by(h.a, 4000, h.remote, 53, L4::udp(b"hello"))).into_tunnel(w, ip("192.168.50.2"));
            w.from_pod(&unreachable(h.b, h.a, (h.a, 4000, h.remote, 53))).dropped("source_address");
        }
    });
}

/// A datagram that its sender cut up: a router complains of the first piece, behind whose fragment header the ports are.
#[test]
fn an_error_about_the_first_piece_of_a_datagram_is_as_welcome_as_the_flow() {
    in_world(|w| {
        let a = w.local_a();
        w.isolate(&a, 7, 0);
        w.apply_policy();
        for h in BOTH.map(hosts) {
            w.from_pod(&sent_by(h.a, 4000, h.outside, 53, L4::udp(b"hello"))).passed();
            let complains = |sport, fragment| {
                let mut piece = sent_by(h.a, sport, h.outside, 53, L4::udp(&[1; 64]));
                piece.fragment = Some(fragment);
                let (kind, code, rest) = if h.a.is_ipv4() { (3, 4, [0, 0, 5, 0]) } else { (2, 0, [0, 0, 5, 0]) };
                let error = L4::Icmp { kind, code, rest, payload: piece.packet() };
                let mut frame = arriving(MAC_A, h.node2, 0, h.a, 0, error);
                frame.ttl = 63;
                w.to_pod(&frame, w.pod_a, w.uplink)
            };
            complains(4000, (7, 0, true)).passed();
            complains(4001, (7, 0, true)).dropped("ingress_policy");
            if h.a.is_ipv6() {
                complains(4000, (7, 64, false)).dropped("malformed");
            }
        }
    });
}

#[test]
fn a_full_table_fails_closed_for_isolated_pods_and_open_for_others() {
    in_world_with(Limits { connections: 8, ..Limits::default() }, |w| {
        let h = hosts(Family::V4);
        let b = w.local_b();
        w.isolate(&b, 5, 0);
        w.allow(5, h.a, TCP_ROWS, 80, 42);
        w.apply_policy();
        w.from_pod(&sent_by(h.a, 4000, h.outside, 80, L4::syn())).passed();
        // Budgets alone never let it become full: entries that nobody counts.
        w.fill(7, uptime());
        w.write("tp_held", &0u32, &0u32);
        assert_eq!(w.programs.connections().unwrap().len(), 8);
        let open = w.from_pod(&sent_by(h.a, 5000, h.outside, 80, L4::syn()));
        assert!(open.passed().counted.contains(&"untracked"));
        w.from_pod(&sent_by(h.a, 5000, h.b, 80, L4::syn())).dropped("ct_full");
        // What is known goes on.
        w.from_pod(&sent_by(h.a, 4000, h.outside, 80, L4::tcp(ACK))).passed();
    });
}

#[test]
fn a_pod_that_goes_takes_its_connections_along() {
    in_world(|w| {
        let h = hosts(Family::V4);
        w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::syn())).into_pod(w.pod_b);
        w.from_pod(&sent_by(h.a, 4000, h.outside, 80, L4::syn())).passed();
        let b = w.local_b();
        w.programs.remove_pod(&b).unwrap();
        let left = w.programs.connections().unwrap();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].responder.0, h.outside);
        w.from_pod(&sent_by(h.b, 80, h.a, 4000, L4::tcp(ACK))).dropped("source_address");
        // A late removal does not touch who has the address now.
        let mut heir = w.local_b();
        heir.pod_id = 99;
        w.programs.set_pod(&heir, Isolation::HostOnly).unwrap();
        w.programs.remove_pod(&b).unwrap();
        assert!(w.programs.snapshot().unwrap().pods.iter().any(|(address, pod)| *address == h.b && pod.pod_id == 99));
    });
}
