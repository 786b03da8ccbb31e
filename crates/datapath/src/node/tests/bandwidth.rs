//! Pods with limits: what their devices have, what gets through, and what mends it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use towpath_model::bandwidth::Asked;
use towpath_model::{AskedBandwidth, Bandwidth, Rate};

use super::lab::{CLSACT, Kind, Lab, Ns, OPEN, PROGRAMS, TestNode, TestPod, root};
use crate::net::namespaces::Namespaces;

fn rate(text: &str) -> Option<Rate> {
    Some(Rate::parse(text).unwrap())
}

fn asks(ingress: Asked, egress: Asked) -> AskedBandwidth {
    AskedBandwidth { ingress, egress }
}

fn limit(text: &str) -> Asked {
    Asked::Limit(Rate::parse(text).unwrap())
}

/// Has the node find the pods' namespaces by this process's descriptors, as it finds a container runtime's by its files.
fn find_by_descriptors(node: &TestNode, places: &'static [&'static str]) {
    node.call(move |node| {
        node.namespaces = Namespaces::new(places.iter().map(PathBuf::from));
        Ok(())
    })
    .unwrap();
}

const DESCRIPTORS: &[&str] = &["/proc/self/fd"];

fn apply(node: &TestNode, pod: &TestPod, asked: AskedBandwidth) -> (Vec<String>, Vec<String>) {
    let asked: BTreeMap<IpAddr, AskedBandwidth> = pod.pod.addresses.iter().map(|a| (*a, asked.clone())).collect();
    let applied = node.call(move |node| node.apply_bandwidth(&asked)).unwrap();
    (applied.changes, applied.problems)
}

/// The root queues of a pod's device: at the node's side, which is what it receives, and at its own.
fn queues(node: &TestNode, pod: &TestPod) -> [String; 2] {
    let of = |ns: &Ns, device: &str| {
        let shown = ns.sh(&format!("tc qdisc show dev {device} root"));
        let words: Vec<&str> = shown.split_whitespace().collect();
        let after = |name: &str| words.iter().position(|word| *word == name).and_then(|at| words.get(at + 1));
        match (after("tbf"), after("rate")) {
            (Some(handle), Some(rate)) => format!("{handle} {rate}"),
            _ => words.get(1).map_or_else(String::new, |kind| (*kind).to_owned()),
        }
    };
    [of(&node.ns, &pod.pod.host_device), of(&pod.ns, "eth0")]
}

const NONE: [&str; 2] = ["noqueue", "noqueue"];

fn limited_pod(node: &TestNode, host: u8, bandwidth: Bandwidth) -> TestPod {
    let ns = Ns::new();
    let request = crate::requests::AttachRequest { bandwidth, ..node.request(&ns, host, OPEN) };
    let pod = node.attach(request).unwrap();
    node.link();
    TestPod { ns, pod }
}

/// Megabits of payload a second, of `bytes` that one namespace sends to an address of another.
fn speed(from: &Ns, to: &Ns, address: IpAddr, bytes: usize) -> f64 {
    let listener = to.run(|| TcpListener::bind(SocketAddr::new(address, 7000)).unwrap());
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let (mut buffer, mut got) = (vec![0; 1 << 16], 0);
        while got < bytes {
            match stream.read(&mut buffer).unwrap() {
                0 => break,
                n => got += n,
            }
        }
        got
    });
    let begun = Instant::now();
    let mut stream =
        from.run(|| TcpStream::connect_timeout(&SocketAddr::new(address, 7000), Duration::from_secs(3)).unwrap());
    stream.write_all(&vec![7; bytes]).unwrap();
    assert_eq!(receiver.join().unwrap(), bytes);
    bytes as f64 * 8.0 / begun.elapsed().as_secs_f64() / 1e6
}

fn near(measured: f64, limit: f64, what: &str) {
    assert!((limit * 0.7..=limit * 1.1).contains(&measured), "{what}: {measured:.1} Mbit/s, the limit is {limit}");
}

#[test]
fn a_pod_gets_and_sends_no_more_than_its_limits_and_others_what_they_like() {
    for kind in [PROGRAMS, CLSACT] {
        if root() {
            limits_hold(kind);
        }
    }
}

fn limits_hold(kind: Kind) {
    let lab = Lab::new(kind);
    let limits = Bandwidth { ingress: rate("20M"), egress: rate("8M") };
    let slow = limited_pod(&lab.n1, 10, limits);
    let (near_by, far) = (lab.n1.pod(11, OPEN), lab.n2.pod(10, OPEN));
    assert_eq!(queues(&lab.n1, &slow), ["7470: 20Mbit", "7470: 8Mbit"]);
    assert_eq!(queues(&lab.n1, &near_by), NONE);
    for (other, place) in [(&near_by, "here"), (&far, "at another node")] {
        for (to, back) in [(slow.v4(), other.v4()), (slow.v6(), other.v6())] {
            near(speed(&other.ns, &slow.ns, to, 2_000_000), 20.0, &format!("to it from {place}"));
            near(speed(&slow.ns, &other.ns, back, 1_000_000), 8.0, &format!("from it to one {place}"));
        }
    }
    // From the node itself, by its stack.
    near(speed(&lab.n1.ns, &slow.ns, slow.v4(), 2_000_000), 20.0, "to it from its node");
    let free = speed(&far.ns, &near_by.ns, near_by.v4(), 20_000_000);
    assert!(free > 60.0, "one without limits gets {free:.1} Mbit/s");
}

#[test]
fn limits_come_change_and_go_while_a_pod_runs() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    find_by_descriptors(&lab.n1, DESCRIPTORS);
    let (pod, other) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN));
    assert_eq!(queues(&lab.n1, &pod), NONE);
    assert_eq!(apply(&lab.n1, &pod, AskedBandwidth::default()), (vec![], vec![]));

    let (changes, problems) = apply(&lab.n1, &pod, asks(limit("9M"), limit("10M")));
    assert_eq!(
        (changes.as_slice(), problems.len()),
        (["pod default/pod-1-10: receives 9M, sends 10M (it was: no limit)".to_owned()].as_slice(), 0)
    );
    assert_eq!(queues(&lab.n1, &pod), ["7470: 9Mbit", "7470: 10Mbit"]);
    near(speed(&other.ns, &pod.ns, pod.v4(), 1_000_000), 9.0, "a limit that came");
    assert_eq!(apply(&lab.n1, &pod, asks(limit("9M"), limit("10M"))), (vec![], vec![]));

    // A connection that is open while its limit changes.
    assert_eq!(apply(&lab.n1, &pod, asks(limit("18M"), limit("10M"))).1, Vec::<String>::new());
    assert_eq!(queues(&lab.n1, &pod), ["7470: 18Mbit", "7470: 10Mbit"]);
    near(speed(&other.ns, &pod.ns, pod.v4(), 2_000_000), 18.0, "one that is larger");

    let nonsense = asks(Asked::Misunderstood("fast".into()), limit("11M"));
    assert_eq!(apply(&lab.n1, &pod, nonsense).1, Vec::<String>::new());
    assert_eq!(queues(&lab.n1, &pod), ["7470: 18Mbit", "7470: 11Mbit"], "what is not understood leaves what is");
    assert_eq!(queues(&lab.n1, &other), NONE);

    assert_eq!(apply(&lab.n1, &pod, asks(Asked::Nothing, Asked::Nothing)).1, Vec::<String>::new());
    assert_eq!(queues(&lab.n1, &pod), NONE);
    let free = speed(&other.ns, &pod.ns, pod.v4(), 10_000_000);
    assert!(free > 60.0, "{free:.1} Mbit/s");
    assert_eq!(lab.n1.call(|node| Ok(node.limited())).unwrap(), []);
}

#[test]
fn what_the_runtime_said_holds_where_the_pod_asks_for_nothing() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    find_by_descriptors(&lab.n1, DESCRIPTORS);
    let runtime_bandwidth = Bandwidth { ingress: rate("9M"), egress: None };
    let ns = Ns::new();
    let request = lab.n1.request(&ns, 10, OPEN);
    let request = crate::requests::AttachRequest { bandwidth: runtime_bandwidth, runtime_bandwidth, ..request };
    let pod = TestPod { pod: lab.n1.attach(request).unwrap(), ns };
    apply(&lab.n1, &pod, asks(limit("12M"), limit("13M")));
    assert_eq!(queues(&lab.n1, &pod), ["7470: 12Mbit", "7470: 13Mbit"]);
    apply(&lab.n1, &pod, asks(Asked::Nothing, Asked::Nothing));
    assert_eq!(queues(&lab.n1, &pod), ["7470: 9Mbit", "noqueue"]);
}

#[test]
fn what_others_take_away_comes_back_and_a_new_agent_keeps_it() {
    if !root() {
        return;
    }
    let mut lab = Lab::new(PROGRAMS);
    find_by_descriptors(&lab.n1, DESCRIPTORS);
    let pod = limited_pod(&lab.n1, 10, Bandwidth { ingress: rate("20M"), egress: rate("8M") });
    let other = lab.n1.pod(11, OPEN);
    let wanted = ["7470: 20Mbit", "7470: 8Mbit"];
    lab.n1.ns.sh(&format!("tc qdisc del dev {} root", pod.pod.host_device));
    pod.ns.sh("tc qdisc replace dev eth0 root pfifo");
    assert_eq!(queues(&lab.n1, &pod), ["noqueue", "pfifo"]);
    assert!(pod.ns.comes_to_ping(&other.v4().to_string()), "without its queue it is reached all the same");
    let applied = lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert_eq!(applied.problems, Vec::<String>::new());
    assert_eq!(queues(&lab.n1, &pod), wanted);
    let applied = lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert!(!applied.changes.iter().any(|change| change.contains("bucket")), "{:?}", applied.changes);

    lab.n1.close();
    lab.n1.ns.sh(&format!("tc qdisc del dev {} root", pod.pod.host_device));
    lab.n1.open();
    lab.n1.apply_peers();
    assert_eq!(queues(&lab.n1, &pod), wanted);
    near(speed(&other.ns, &pod.ns, pod.v4(), 2_000_000), 20.0, "with a new agent");

    // Taken away while nobody finds the pod's namespace: the record says what is still there.
    find_by_descriptors(&lab.n1, &[]);
    let (_, problems) = apply(&lab.n1, &pod, asks(Asked::Nothing, Asked::Nothing));
    assert!(problems.iter().all(|problem| problem.contains("pod-1-10")), "{problems:?}");
    let left = lab.n1.call(|node| Ok(node.limited())).unwrap();
    assert_eq!(queues(&lab.n1, &pod)[0], "noqueue");
    if !problems.is_empty() {
        assert_eq!(left.first().map(|(_, limits)| *limits), Some(Bandwidth { ingress: None, egress: rate("8M") }));
    }
    find_by_descriptors(&lab.n1, DESCRIPTORS);
    assert_eq!(apply(&lab.n1, &pod, asks(Asked::Nothing, Asked::Nothing)).1, Vec::<String>::new());
    assert_eq!(queues(&lab.n1, &pod), NONE);
}

/// A server asks nobody how fast a client is: what waits for a slow one must not keep it from the others.
#[test]
fn a_slow_pod_holds_up_nobody_else_who_is_answered_by_the_same_socket() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let slow = limited_pod(&lab.n1, 10, Bandwidth { ingress: rate("1k"), egress: None });
    let (server, other) = (lab.n1.pod(11, OPEN), lab.n1.pod(12, OPEN));
    // From a pod, and from the node itself.
    for (place, address) in [(&server.ns, server.v4()), (&lab.n1.ns, [10, 244, 1, 1].into())] {
        let socket = place.run(|| UdpSocket::bind((address, 5300)).unwrap());
        socket.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        let taken = slow.ns.run(|| UdpSocket::bind((slow.v4(), 5300)).unwrap());
        let asks = other.ns.run(|| UdpSocket::bind((other.v4(), 5300)).unwrap());
        asks.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        // It asked before, so that answers may go there.
        for client in [&taken, &asks] {
            client.send_to(b"?", (address, 5300)).unwrap();
            socket.recv(&mut [0; 8]).unwrap();
        }
        let begun = Instant::now();
        for _ in 0..3000 {
            socket.send_to(&[7; 10], (slow.v4(), 5300)).unwrap();
            assert!(begun.elapsed() < Duration::from_secs(2), "it waits for the slow one");
        }
        socket.send_to(b"!", (other.v4(), 5300)).unwrap();
        asks.recv(&mut [0; 8]).unwrap();
        taken.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        taken.recv(&mut [0; 128]).unwrap();
    }
}
