//! What must hold with and without the programs.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::lab::{Lab, Ns, OPEN, tcp, udp};

pub(super) fn pods_reach_pods_and_nodes(lab: &Lab) {
    let (a, b, c) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n2.pod(10, OPEN));
    for (from, to) in [(&a, &b), (&a, &c), (&c, &b)] {
        for (source, target) in [(from.v4(), to.v4()), (from.v6(), to.v6())] {
            assert!(from.ns.pings(&target.to_string()), "{source} pings {target}");
            let full = lab.n1.call(|node| Ok(node.facts().pod_mtu)).unwrap() - if target.is_ipv4() { 28 } else { 48 };
            assert!(from.ns.pings(&format!("-M do -s {full} {target}")), "a packet as large as the MTU, to {target}");
            let port = SocketAddr::new(target, 8080);
            assert_eq!(tcp(&from.ns, &to.ns, port).unwrap(), source, "TCP to {port}");
            assert_eq!(udp(&from.ns, &to.ns, port).unwrap(), source, "UDP to {port}");
        }
    }
    for (node, v4, v6) in [(&lab.n1, "192.0.2.1", "2001:db8:1::1"), (&lab.n2, "192.0.2.2", "2001:db8:1::2")] {
        for (own, pod) in [(v4, a.v4()), (v6, a.v6())] {
            let own = SocketAddr::new(own.parse().unwrap(), 8081);
            assert_eq!(tcp(&a.ns, &node.ns, own).unwrap(), pod, "pod to {own}");
            assert_eq!(tcp(&node.ns, &a.ns, SocketAddr::new(pod, 8082)).unwrap(), own.ip(), "from {own} to the pod");
        }
    }
}

pub(super) fn outside_sees_the_node(lab: &Lab) {
    let a = lab.n1.pod(10, OPEN);
    for (outside, node) in [("198.51.100.9:80", "192.0.2.1"), ("[2001:db8:2::9]:80", "2001:db8:1::1")] {
        let outside: SocketAddr = outside.parse().unwrap();
        assert!(a.ns.pings(&outside.ip().to_string()), "echo to {outside}");
        assert_eq!(tcp(&a.ns, &lab.outside, outside).unwrap().to_string(), node);
        assert_eq!(udp(&a.ns, &lab.outside, outside).unwrap().to_string(), node);
    }
}

pub(super) fn unknown_service_is_refused(lab: &Lab) {
    let a = lab.n1.pod(10, OPEN);
    for ns in [&a.ns, &lab.n1.ns] {
        for address in ["10.96.0.77:443", "[fd00:96::77]:443"] {
            let address: SocketAddr = address.parse().unwrap();
            assert_eq!(
                tcp(ns, &lab.outside, address).unwrap_err().kind(),
                ErrorKind::ConnectionRefused,
                "TCP {address}"
            );
            let started = Instant::now();
            // A node's own packet is refused as it is sent, a pod's on its way.
            let refusal = udp_refusal(ns, address);
            assert!(
                matches!(refusal, ErrorKind::ConnectionRefused | ErrorKind::PermissionDenied),
                "UDP {address}: {refusal}"
            );
            assert!(started.elapsed() < Duration::from_secs(2), "at once, not by time-out");
        }
    }
    assert!(!a.ns.pings("10.96.0.77"));
}

fn udp_refusal(ns: &Ns, to: SocketAddr) -> ErrorKind {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = ns.run(|| std::net::UdpSocket::bind(any).unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    socket.connect(to).unwrap();
    socket.send(b"?").and_then(|_| socket.recv(&mut [0; 8])).unwrap_err().kind()
}

pub(super) fn dns_is_local(lab: &Lab) {
    let a = lab.n1.pod(10, OPEN);
    let dns: SocketAddr = "169.254.116.10:53".parse().unwrap();
    assert_eq!(udp(&a.ns, &lab.n1.ns, dns).unwrap(), a.v4());
    udp(&lab.n1.ns, &lab.n1.ns, dns).unwrap();
    lab.n2.ns.sh("ip addr del 169.254.116.10/32 dev lo; ip route add 169.254.116.10/32 via 192.0.2.1");
    assert!(udp(&lab.n2.ns, &lab.n1.ns, dns).is_err(), "from another machine of the underlay");
}

/// Clusters of one family: `outside` is the outside host's address, `node` the first node's.
pub(super) fn one_family(lab: &Lab, outside: &str, node: &str) {
    let (a, b, c) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n2.pod(10, OPEN));
    let only = |pod: &super::lab::TestPod| {
        assert_eq!(pod.pod.addresses.len(), 1);
        pod.pod.addresses[0]
    };
    for to in [&b, &c] {
        assert_eq!(tcp(&a.ns, &to.ns, SocketAddr::new(only(to), 8080)).unwrap(), only(&a));
        assert!(lab.n1.ns.pings(&only(to).to_string()), "from the node");
    }
    let outside = SocketAddr::new(outside.parse().unwrap(), 80);
    assert_eq!(tcp(&a.ns, &lab.outside, outside).unwrap().to_string(), node);
}

/// What is for an address that no pod has is refused by the node whose range it is in.
pub(super) fn dead_addresses_are_refused(lab: &Lab) {
    let a = lab.n1.pod(10, OPEN);
    for ns in [&a.ns, &lab.n1.ns] {
        for dead in ["10.244.1.77:80", "[fd00:244:1::77]:80"] {
            let dead: SocketAddr = dead.parse().unwrap();
            let connect = || TcpStream::connect_timeout(&dead, Duration::from_secs(2)).unwrap_err().kind();
            assert!(matches!(ns.run(connect), ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable), "{dead}");
        }
    }
}
