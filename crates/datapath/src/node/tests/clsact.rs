//! As on a kernel that has no links for devices: every hook is a filter, through restarts, other versions and repairs.

use super::hooks::{Flood, as_if_of_version, filters, filters_of, links, loses_nothing};
use super::lab::{CLSACT, Kind, Lab, OPEN, TestNode, TestPod, root};
use super::scenarios;
use super::shortcut::{Flow, image, pins};
use crate::bpf::Programs;
use crate::net::link::TUNNEL_DEVICE;

/// Ids of the programs that run on the tunnel device and the uplink.
fn node_filters(node: &TestNode) -> Vec<String> {
    [filters_of(node, TUNNEL_DEVICE), filters_of(node, "eth0")].concat()
}

/// Ids of all programs that run on the node's devices: two a pod, the tunnel device's and the uplink's two.
fn all_filters(node: &TestNode, pods: &[&TestPod]) -> Vec<String> {
    let of_pods = pods.iter().flat_map(|pod| filters(node, pod));
    let all: Vec<String> = of_pods.chain(node_filters(node)).collect();
    assert_eq!(all.len(), 2 * pods.len() + 3, "{all:?}");
    assert!(node.call(|node| node.observe(Programs::attached)).unwrap().is_empty(), "no hook is a link");
    all
}

#[test]
fn packets_go_the_same_ways() {
    if root() {
        scenarios::pods_reach_pods_and_nodes(&Lab::new(CLSACT));
        scenarios::outside_sees_the_node(&Lab::new(CLSACT));
        scenarios::unknown_service_is_refused(&Lab::new(CLSACT));
        scenarios::pods_reach_pods_and_nodes(&Lab::new(Kind { underlay_v6: true, ..CLSACT }));
    }
}

#[test]
fn filters_outlive_the_agent_and_run_the_next_ones_programs_without_a_gap() {
    if !root() {
        return;
    }
    let mut lab = Lab::new(CLSACT);
    let (a, b, shut) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n1.pod(12, None));
    let remote = lab.n2.pod(10, OPEN);
    let before = all_filters(&lab.n1, &[&a, &b, &shut]);
    let unjudged = Flood::start(&lab, &shut);
    let mut flow = Flow::open(&a, &b, 80);
    loses_nothing(&a.ns, &b, || {
        loses_nothing(&remote.ns, &b, || {
            lab.n1.close();
            assert_eq!(all_of(&lab.n1, &[&a, &b, &shut]), before, "nobody is there, and the programs are");
            assert!(flow.works());
            lab.n1.open();
            lab.n1.link();
            assert!(flow.works(), "with the connections of before");
        });
    });
    let after = all_filters(&lab.n1, &[&a, &b, &shut]);
    assert!(before.iter().all(|id| !after.contains(id)), "{before:?}, then {after:?}");
    let (sent, arrived) = unjudged.end();
    assert!(sent > 100 && arrived == 0, "{arrived} of {sent} packets reached an isolated pod");
    lab.n1.apply_peers();
    let clean = lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert_eq!((clean.changes, clean.problems), (vec![], vec![]));
    assert_eq!(links(&lab.n1, &a), []);
}

/// As [`all_filters`], of a node without an agent.
fn all_of(node: &TestNode, pods: &[&TestPod]) -> Vec<String> {
    pods.iter().flat_map(|pod| filters(node, pod)).chain(node_filters(node)).collect()
}

#[test]
fn filters_that_somebody_takes_away_come_back_at_the_next_check_and_others_stay() {
    if !root() {
        return;
    }
    let lab = Lab::new(CLSACT);
    let (a, shut) = (lab.n1.pod(10, OPEN), lab.n1.pod(12, None));
    lab.n1.ns.sh(&format!("tc qdisc del dev {} clsact", shut.pod.host_device));
    lab.n1.ns.sh("tc qdisc del dev eth0 clsact && tc qdisc add dev eth0 clsact
        tc filter add dev eth0 ingress pref 7 protocol ip bpf bytecode '1,6 0 0 0' flowid 1:7
        tc filter del dev towpath-vx ingress");
    assert!(lab.outside.comes_to_ping("192.0.2.1"));
    let repaired = lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert_eq!(repaired.problems, Vec::<String>::new());
    all_filters(&lab.n1, &[&a, &shut]);
    assert!(lab.n1.ns.sh("tc filter show dev eth0 ingress").contains("flowid 1:7"), "another owner's filter stays");
    assert!(!shut.ns.pings(&a.v4().to_string()) && !a.ns.pings(&shut.v4().to_string()));
}

#[test]
fn a_place_that_another_filter_has_is_named() {
    if !root() {
        return;
    }
    let mut lab = Lab::bare(CLSACT);
    lab.n2.open();
    lab.n2.close();
    lab.n2
        .ns
        .sh("tc filter del dev eth0 ingress; tc filter add dev eth0 ingress pref 1 protocol ip bpf bytecode '1,6 0 0 0' flowid 1:7");
    lab.n2.open_in_vain(&["run tp_from_uplink as a filter of device eth0", "tc filter show dev"]);
    lab.n2.ns.sh("tc filter del dev eth0 ingress");
    lab.n2.open();
}

#[test]
fn another_versions_filters_go_on_until_all_is_applied_and_then_give_way() {
    if !root() {
        return;
    }
    let mut lab = Lab::new(CLSACT);
    let (a, b, shut) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n1.pod(12, None));
    let remote = lab.n2.pod(10, OPEN);
    let before = all_filters(&lab.n1, &[&a, &b, &shut]);
    as_if_of_version(&mut lab.n1, 0);
    let unjudged = Flood::start(&lab, &shut);
    loses_nothing(&a.ns, &b, || {
        loses_nothing(&remote.ns, &b, || {
            lab.n1.open();
            assert_eq!(all_of(&lab.n1, &[&a, &b, &shut]), before, "theirs are at work");
            lab.n1.apply_peers();
            lab.n1.call(|node| node.apply_policy(&image(&[], &[10, 11]))).unwrap();
            assert_eq!(all_of(&lab.n1, &[&a, &b, &shut]), before, "still");
            lab.n1.call(|node| node.apply_services(&Default::default())).unwrap();
        });
    });
    let after = all_filters(&lab.n1, &[&a, &b, &shut]);
    assert!(before.iter().all(|id| !after.contains(id)), "{before:?}, then {after:?}");
    assert!(!pins(&lab.n1).contains("towpath-v0"), "{}", pins(&lab.n1));
    let (sent, arrived) = unjudged.end();
    assert!(sent > 100 && arrived == 0, "{arrived} of {sent} packets reached an isolated pod");
    lab.n1.call(|node| node.apply_policy(&image(&[11], &[10]))).unwrap();
    assert!(!a.ns.pings(&b.v4().to_string()), "our maps rule");
}

#[test]
fn uninstalling_leaves_the_uplink_as_it_was() {
    if !root() {
        return;
    }
    let mut lab = Lab::bare(CLSACT);
    let qdiscs = |node: &TestNode| node.ns.sh("tc qdisc show dev eth0; tc filter show dev eth0 ingress");
    let (traces, before) = (lab.n1.traces(), qdiscs(&lab.n1));
    lab.n1.open();
    let _pod = lab.n1.pod(10, OPEN);
    assert_ne!(qdiscs(&lab.n1), before);
    lab.n1.call(|node| node.uninstall()).unwrap();
    assert_eq!((lab.n1.traces(), qdiscs(&lab.n1)), (traces, before.clone()));
    // Where another owner's filter hangs on the qdisc, only ours goes.
    lab.n1.open();
    lab.n1.ns.sh("tc filter add dev eth0 ingress pref 7 protocol ip bpf bytecode '1,6 0 0 0' flowid 1:7");
    lab.n1.call(|node| node.uninstall()).unwrap();
    let left = qdiscs(&lab.n1);
    assert!(left.contains("flowid 1:7") && !left.contains("tp_from_uplink"), "{left}");
    // Without the agent, on a device that need not be the uplink any more, and not where another owner's qdisc is empty.
    lab.n1.open();
    lab.n1.close();
    lab.n1.ns.sh("tc filter del dev eth0 ingress pref 7; tc qdisc add dev lo clsact");
    let bpffs = lab.n1.config.bpffs.clone();
    lab.n1.ns.run(|| crate::uninstall::uninstall(&bpffs)).unwrap();
    assert_eq!(qdiscs(&lab.n1), before);
    assert!(lab.n1.ns.sh("tc qdisc show dev lo").contains("clsact"));
}
