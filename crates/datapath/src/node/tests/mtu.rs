//! The MTU of pods that run is changed: what their devices and routes say, and what of it gets where.

use std::path::PathBuf;

use towpath_model::desired::Reach;

use super::lab::{Lab, Ns, OPEN, PROGRAMS, TestNode, TestPod, root};
use crate::net::namespaces::Namespaces;
use crate::requests::PodMtu;

/// Has the node find the pods' namespaces by this process's descriptors, as it finds a container runtime's by its files.
fn find_by_descriptors(node: &TestNode) {
    let places = [PathBuf::from("/proc/self/fd")];
    node.call(move |node| {
        node.namespaces = Namespaces::new(places);
        Ok(())
    })
    .unwrap();
}

/// Has each of the nodes send to the other as it is, or in envelopes.
fn reach(lab: &Lab, reach: Reach) {
    for node in [&lab.n1, &lab.n2] {
        node.call(move |node| {
            let mut peers = node.planned.clone();
            peers.iter_mut().filter(|peer| !peer.local).for_each(|peer| (peer.reach, peer.plain) = (reach, true));
            let applied = node.apply_peers(peers)?;
            assert_eq!(applied.problems, Vec::<String>::new());
            Ok(())
        })
        .unwrap();
    }
}

fn set(node: &TestNode, mtu: PodMtu) -> (usize, Vec<String>) {
    let applied = node.call(move |node| node.apply_pod_mtu(mtu)).unwrap();
    (applied.changes.len(), applied.problems)
}

/// MTU of both sides of a pod's device.
fn devices(node: &TestNode, pod: &TestPod) -> (String, String) {
    let read = |ns: &Ns, device: &str| ns.sh(&format!("ip -o link show dev {device}"));
    let of = |text: String| text.split(" mtu ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap().to_owned();
    (of(read(&pod.ns, "eth0")), of(read(&node.ns, &pod.pod.host_device)))
}

/// The largest packet that leaves a pod for `to` in one piece, in bytes, by what its kernel says.
fn largest(pod: &TestPod, to: &str) -> u32 {
    let fits = |size: &u32| {
        let payload = size - if to.contains(':') { 48 } else { 28 };
        // What does not fit is refused before anything is sent.
        !pod.ns.sh(&format!("ping -M do -c1 -W1 -s {payload} {to} 2>&1 || true")).contains("too long")
    };
    *[1500, 1450, 1449].iter().find(|size| fits(size)).unwrap_or(&0)
}

#[test]
fn between_pods_what_the_way_carries_and_elsewhere_what_an_envelope_does() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (a, b) = (lab.n1.pod(10, OPEN), lab.n2.pod(10, OPEN));
    for node in [&lab.n1, &lab.n2] {
        find_by_descriptors(node);
    }
    let outside = ["198.51.100.9", "2001:db8:2::9"];
    assert_eq!(set(&lab.n1, PodMtu::AtMost(1450)), (0, vec![]), "nobody has more");
    assert_eq!(set(&lab.n1, PodMtu::AtMost(1500)), (0, vec![]));
    assert_eq!(devices(&lab.n1, &a), ("1450".to_owned(), "1450".to_owned()));

    reach(&lab, Reach::Route);
    for node in [&lab.n1, &lab.n2] {
        assert_eq!(set(node, PodMtu::Exactly(1500)), (1, vec![]));
        assert_eq!(set(node, PodMtu::Exactly(1500)), (0, vec![]), "it is so");
    }
    let new = lab.n1.pod(11, OPEN);
    for pod in [&a, &new] {
        assert_eq!(devices(&lab.n1, pod), ("1500".to_owned(), "1500".to_owned()));
        for (to, full) in [(b.v4(), 1472), (b.v6(), 1452)] {
            assert_eq!(largest(pod, &to.to_string()), 1500, "to {to}");
            assert!(pod.ns.comes_to_ping(&format!("-M do -s {full} {to}")), "there and back, to {to}");
        }
        for to in outside {
            assert_eq!(largest(pod, to), 1450, "to {to}: who answers a client there may have to do it in an envelope");
            assert!(pod.ns.comes_to_ping(to));
        }
    }
    // What the runtime's CHECK compares is as ADD left it.
    let (netns, pod) = (a.ns.fd(), a.pod.clone());
    lab.n1
        .call(move |node| {
            let (container_id, ifname) = (pod.container_id.clone(), "eth0".to_owned());
            node.check_pod(&crate::CheckRequest { netns, container_id, ifname })
        })
        .unwrap();

    assert_eq!(set(&lab.n1, PodMtu::AtMost(1450)), (2, vec![]));
    assert_eq!(devices(&lab.n1, &a), ("1450".to_owned(), "1450".to_owned()));
    // The other node's pods still have more; what they send is taken.
    assert!(b.ns.comes_to_ping(&format!("-s 1472 {}", a.v4())) && b.ns.comes_to_ping(&format!("-s 1452 {}", a.v6())));
    for to in [a.v4(), a.v6()] {
        assert_eq!(largest(&b, &to.to_string()), 1500, "to {to}");
    }
    assert_eq!(set(&lab.n2, PodMtu::Exactly(1450)), (1, vec![]));
    reach(&lab, Reach::Tunnel);
    for (to, full) in [(b.v4(), 1422), (b.v6(), 1402)] {
        assert_eq!(largest(&a, &to.to_string()), 1450, "to {to}");
        assert!(a.ns.comes_to_ping(&format!("-M do -s {full} {to}")));
    }
    for to in outside {
        assert_eq!(largest(&a, to), 1450);
    }
    assert_eq!(lab.n1.call(|node| node.widest_pod()).unwrap(), Some(1450));
    assert_eq!(devices(&lab.n1, &lab.n1.pod(12, OPEN)).0, "1450", "and a new one");
}

#[test]
fn who_cannot_be_changed_keeps_what_it_has_and_is_named() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (gone, other, fine) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n1.pod(12, OPEN));
    // Its default route is that of another network of the same pod.
    other.ns.sh("ip route replace default dev eth0 proto static");
    let nowhere = set(&lab.n1, PodMtu::Exactly(1500));
    assert_eq!((nowhere.0, nowhere.1.len()), (0, 3), "no namespace is found: {:?}", nowhere.1);
    assert!(nowhere.1.iter().all(|problem| problem.contains("namespace is not found")), "{:?}", nowhere.1);
    assert_eq!(devices(&lab.n1, &fine), ("1450".to_owned(), "1450".to_owned()), "neither side is another");

    find_by_descriptors(&lab.n1);
    gone.ns.sh("ip link del eth0");
    let (changed, problems) = set(&lab.n1, PodMtu::Exactly(1500));
    assert_eq!((changed, problems.len()), (1, 1), "{problems:?}");
    assert!(problems[0].contains("pod-1-11") && problems[0].contains("another network"), "{problems:?}");
    assert_eq!(devices(&lab.n1, &other), ("1450".to_owned(), "1450".to_owned()));
    assert_eq!(devices(&lab.n1, &fine), ("1500".to_owned(), "1500".to_owned()));
    let (changed, problems) = set(&lab.n1, PodMtu::AtMost(1200));
    assert_eq!((changed, problems.len()), (0, 2), "less than IPv6 needs: {problems:?}");
}
