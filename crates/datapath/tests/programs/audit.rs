//! Policies that are only audited: what they would deny passes, is counted once a connection, and told to whoever listens.

use std::collections::BTreeMap;

use towpath_datapath::bpf::Isolation;
use towpath_model::Protocol;
use towpath_model::desired::*;

use crate::frame::{ACK, L4, RST, SYN};
use crate::world::*;

const TCP: RowProtocol = RowProtocol::Ports(Protocol::Tcp);

/// Gives pod b an ingress set that is only audited and admits a to port 80; and pod a an egress set that denies everything by rule 9.
fn audit(w: &mut World) {
    let sets = PodSets { audit_ingress: SetId(5), ..PodSets::default() };
    w.image.pods.extend(w.local_b().addresses.iter().map(|address| (*address, sets)));
    for h in BOTH.map(hosts) {
        w.allow(5, h.a, TCP, 80, 42);
    }
    let sets = PodSets { audit_egress: SetId(6), ..PodSets::default() };
    w.image.pods.extend(w.local_a().addresses.iter().map(|address| (*address, sets)));
    for (protocol, port_bits) in [(TCP, 0), (RowProtocol::Other, 0)] {
        let key = RowKey { set: SetId(6), class: LocalClass(0), protocol, port: 0, port_bits };
        w.image.rows.insert(key, Row { verdict: Verdict::Allow, rule: RuleId(8) });
    }
    let key = RowKey { set: SetId(6), class: LocalClass(0), protocol: TCP, port: 6666, port_bits: 16 };
    w.image.rows.insert(key, Row { verdict: Verdict::Deny, rule: RuleId(9) });
    let whole = RowKey { set: SetId(6), class: LocalClass(0), protocol: TCP, port: 0, port_bits: 0 };
    // Rows do not overlap: all but the 4096 ports around it.
    w.image.rows.remove(&whole);
    for (port, port_bits) in [(0, 4), (0x2000, 3), (0x4000, 2), (0x8000, 1)] {
        let key = RowKey { port, port_bits, ..whole };
        w.image.rows.insert(key, Row { verdict: Verdict::Allow, rule: RuleId(8) });
    }
    w.apply_policy();
}

/// Connections by set and rule.
fn counted(w: &World) -> BTreeMap<(u32, u32), u64> {
    w.programs.audited().unwrap().into_iter().map(|held| ((held.set.0, held.rule.0), held.connections)).collect()
}

const DEFAULT: u32 = RuleId::DEFAULT_DENY.0;

#[test]
fn what_would_be_denied_passes_and_is_counted_once_a_connection() {
    in_both_worlds(|w| {
        audit(w);
        for h in BOTH.map(hosts) {
            // Two would go: by the responder's ingress, and by both ends.
            w.from_pod(&sent_by(h.a, 4000, h.b, 80, L4::syn())).into_pod(w.pod_b);
            let would = w.from_pod(&sent_by(h.a, 4001, h.b, 81, L4::syn()));
            would.into_pod(w.pod_b);
            assert!(would.counted.contains(&"audit_ingress") && !would.counted.contains(&"audit_egress"));
            let both = w.from_pod(&sent_by(h.a, 4002, h.b, 6666, L4::syn()));
            both.into_pod(w.pod_b);
            assert!(both.counted.contains(&"audit_ingress") && both.counted.contains(&"audit_egress"));
            // Answers and what follows are of a connection that is counted already.
            w.from_pod(&sent_by(h.b, 81, h.a, 4001, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
            w.from_pod(&sent_by(h.a, 4001, h.b, 81, L4::tcp(ACK))).into_pod(w.pod_b);
            w.from_pod(&sent_by(h.a, 4001, h.b, 81, L4::syn())).into_pod(w.pod_b);
        }
        // The last SYN began the connection anew: another one.
        assert_eq!(counted(w), [((5, DEFAULT), 6), ((6, 9), 2)].into());
        let seen = w.programs.audited().unwrap();
        assert!(seen.iter().all(|held| held.last.elapsed().is_ok_and(|age| age.as_secs() < 60)));
        w.programs.forget_audited(&[(SetId(6), RuleId(9)), (SetId(77), RuleId(1))]).unwrap();
        assert_eq!(counted(w).into_keys().collect::<Vec<_>>(), [(5, DEFAULT)]);
    });
}

#[test]
fn a_connection_that_is_open_when_the_audit_begins_is_counted_when_it_is_judged_again_and_not_twice() {
    in_world(|w| {
        let h = hosts(towpath_model::Family::V4);
        w.from_pod(&sent_by(h.a, 4001, h.b, 81, L4::syn())).into_pod(w.pod_b);
        w.from_pod(&sent_by(h.b, 81, h.a, 4001, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
        audit(w);
        assert_eq!(counted(w), [].into());
        let ear = w.programs.listen_to_drops().unwrap();
        // By an answer: what is told is the connection all the same.
        w.from_pod(&sent_by(h.b, 81, h.a, 4001, L4::tcp(ACK))).into_pod(w.pod_a);
        assert_eq!(counted(w), [((5, DEFAULT), 1)].into());
        let [told] = crate::drops::told(&ear).try_into().unwrap();
        assert_eq!(told.ends, Some(((h.a, 4001), (h.b, 81))));
        for round in 0..3 {
            w.image.cidr_classes.insert(std::net::IpAddr::from([9, 9, 9, round]).into(), ClassId(900));
            w.apply_policy();
            w.from_pod(&sent_by(h.a, 4001, h.b, 81, L4::tcp(ACK))).into_pod(w.pod_b);
        }
        assert_eq!(counted(w), [((5, DEFAULT), 1)].into(), "other changes do not count it again");
        // Another set, of a policy that says something else now.
        let sets = PodSets { audit_ingress: SetId(7), ..PodSets::default() };
        w.image.pods.extend(w.local_b().addresses.iter().map(|address| (*address, sets)));
        w.apply_policy();
        w.from_pod(&sent_by(h.a, 4001, h.b, 81, L4::tcp(ACK))).into_pod(w.pod_b);
        assert_eq!(counted(w), [((5, DEFAULT), 1), ((7, DEFAULT), 1)].into());
    });
}

#[test]
fn what_is_denied_or_always_allowed_is_no_matter_of_an_audit() {
    in_world(|w| {
        audit(w);
        let h = hosts(towpath_model::Family::V4);
        let b = w.local_b();
        // Denied for other reasons: nothing would change.
        let sets = PodSets { ingress: SetId(15), audit_ingress: SetId(5), ..PodSets::default() };
        w.image.pods.extend(b.addresses.iter().map(|address| (*address, sets)));
        w.apply_policy();
        w.from_pod(&sent_by(h.a, 4001, h.b, 81, L4::syn())).dropped("ingress_policy");
        // From its own node, to itself, and of a pod that nothing is known of.
        let sets = PodSets { audit_ingress: SetId(5), ..PodSets::default() };
        w.image.pods.extend(b.addresses.iter().map(|address| (*address, sets)));
        w.apply_policy();
        w.to_pod(&arriving(MAC_B, h.node, 5000, h.b, 81, L4::syn()), w.pod_b, 0).passed();
        w.from_pod(&sent_by(h.a, 4000, h.a, 6666, L4::syn())).into_pod(w.pod_a);
        w.programs.set_pod(&b, Isolation::HostOnly).unwrap();
        w.from_pod(&sent_by(h.a, 4001, h.b, 81, L4::syn())).dropped("ingress_policy");
        assert_eq!(counted(w), [].into());
    });
}

#[test]
fn it_is_told_with_its_rule_and_set_and_only_to_whoever_listens() {
    in_world(|w| {
        audit(w);
        let h = hosts(towpath_model::Family::V6);
        w.from_pod(&sent_by(h.a, 4000, h.b, 6666, L4::syn())).into_pod(w.pod_b);
        let ear = w.programs.listen_to_drops().unwrap();
        w.from_pod(&sent_by(h.a, 4001, h.b, 6666, L4::syn())).into_pod(w.pod_b);
        w.from_pod(&sent_by(h.a, 4001, h.b, 6666, L4::tcp(RST))).into_pod(w.pod_b);
        let told = crate::drops::told(&ear);
        let said: Vec<_> = told.iter().map(|t| (t.reason.name(), t.rule, t.audit_set, t.ends)).collect();
        let ends = Some(((h.a, 4001), (h.b, 6666)));
        assert_eq!(
            said,
            [
                ("audit_egress", Some(RuleId(9)), Some(SetId(6)), ends),
                ("audit_ingress", Some(RuleId::DEFAULT_DENY), Some(SetId(5)), ends)
            ]
        );
        assert!(told.iter().all(|t| t.reason.is_audit() && !t.reason.is_drop()));
    });
}

/// An unisolated pod needs no entry, and gets none when there is no room: an audit does not change that.
#[test]
fn an_audit_isolates_nobody() {
    in_world_with(towpath_datapath::bpf::Limits { connections: 8, ..Default::default() }, |w| {
        audit(w);
        let h = hosts(towpath_model::Family::V4);
        w.fill(8, uptime());
        w.write("tp_held", &0u32, &0u32);
        let open = w.from_pod(&sent_by(h.a, 5000, h.outside, 6666, L4::syn()));
        let open = open.passed();
        assert!(open.counted.contains(&"untracked") && open.counted.contains(&"audit_egress"));
    });
}
