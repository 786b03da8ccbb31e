//! How long calls take, printed; fails only where a call is slow by an order of magnitude.

use std::time::{Duration, Instant};

use towpath_model::NodeName;
use towpath_model::desired::{NodePeer, Reach};

use super::lab::{Lab, Ns, OPEN, PROGRAMS, block_on, root};

#[test]
fn attaching_and_detaching_a_pod_takes_milliseconds() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (mut attached, mut detached) = (Vec::new(), Vec::new());
    for host in 20..60 {
        let ns = Ns::new();
        let request = lab.n1.request(&ns, host, OPEN);
        let started = Instant::now();
        lab.n1.attach(request).unwrap();
        attached.push(started.elapsed());
        let started = Instant::now();
        lab.n1.call(move |node| node.detach_pod(&format!("container-1-{host}"), "eth0")).unwrap();
        detached.push(started.elapsed());
    }
    attached.sort();
    detached.sort();
    let (attach, detach) = (attached[attached.len() / 2], detached[detached.len() / 2]);
    println!("median of {}: attach {attach:?}, detach {detach:?}", attached.len());
    assert!(attach < Duration::from_millis(100) && detach < Duration::from_millis(100));
}

#[test]
fn pods_that_come_at_once_are_all_made_and_answer_their_first_packet() {
    const AT_ONCE: u8 = 40;
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let mut took = Vec::new();
    for (at_once, first) in [(false, 20), (true, 80)] {
        let sandboxes: Vec<(u8, Ns)> = (first..first + AT_ONCE).map(|host| (host, Ns::new())).collect();
        let started = Instant::now();
        let begun = sandboxes.iter().map(|(host, ns)| lab.n1.begin_attach(lab.n1.request(ns, *host, OPEN)));
        let pods: Vec<_> = if at_once {
            let begun: Vec<_> = begun.collect();
            begun.into_iter().map(|pod| block_on(pod).unwrap()).collect()
        } else {
            begun.map(|pod| block_on(pod).unwrap()).collect()
        };
        took.push(started.elapsed());
        for pod in &pods {
            assert!(lab.n1.ns.pings(&pod.addresses[0].to_string()), "{} gets the first packet", pod.name);
        }
    }
    println!("{AT_ONCE} pods: one after the other {:?}, at once {:?}", took[0], took[1]);
}

#[test]
fn a_thousand_nodes_are_applied_in_a_moment_and_once() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let peer = |n: u16| {
        let [high, low] = n.to_be_bytes();
        NodePeer {
            name: NodeName::new(format!("far-{n}")),
            addresses: vec![[172, 16, high, low].into()],
            pod_cidrs: vec![
                format!("10.{}.{low}.0/24", 100 + high).parse().unwrap(),
                format!("fd00:99:{n:x}::/64").parse().unwrap(),
            ],
            tunnel: [172, 16, high, low].into(),
            local: false,
            reach: Reach::Tunnel,
            plain: false,
            flannel: None,
        }
    };
    let peers: Vec<NodePeer> = (0..1000).map(peer).collect();
    let again = peers.clone();
    let started = Instant::now();
    let first = lab.n1.call(move |node| node.apply_peers(peers)).unwrap();
    let took = started.elapsed();
    let started = Instant::now();
    let second = lab.n1.call(move |node| node.apply_peers(again)).unwrap();
    println!("1000 nodes: first {took:?}, unchanged {:?}", started.elapsed());
    assert_eq!(first.problems, Vec::<String>::new());
    assert!(first.changes.len() >= 5000, "neighbours and routes of both families: {}", first.changes.len());
    assert_eq!((second.changes, second.problems), (vec![], vec![]));
    let routes = lab
        .n1
        .ns
        .sh("ip route show proto 116 | wc -l; ip -6 route show proto 116 | wc -l; ip route show table 7470 | wc -l");
    assert_eq!(routes.split_whitespace().collect::<Vec<_>>(), ["1001", "1001", "1000"]);
    assert!(took < Duration::from_secs(10));
}
