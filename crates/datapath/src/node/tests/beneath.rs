//! The network beneath the programs works by itself: nothing of BPF is loaded here.

use std::net::UdpSocket;
use std::time::Duration;

use towpath_model::Family;

use super::lab::{BENEATH, Kind, Lab, Ns, OPEN, root};
use super::scenarios;
use crate::net::{mac, pod};
use crate::requests::AttachRequest;

#[test]
fn pods_reach_pods_and_nodes_by_their_own_addresses() {
    if root() {
        scenarios::pods_reach_pods_and_nodes(&Lab::new(BENEATH));
        scenarios::pods_reach_pods_and_nodes(&Lab::new(Kind { underlay_v6: true, ..BENEATH }));
    }
}

#[test]
fn pods_to_remote_nodes_go_inside_the_tunnel() {
    if !root() {
        return;
    }
    let lab = Lab::new(BENEATH);
    let a = lab.n1.pod(10, OPEN);
    // An underlay that drops pod addresses.
    lab.n2.ns.sh("nft 'add table ip foreign; add chain ip foreign in { type filter hook prerouting priority -500; }; \
                  add rule ip foreign in iifname eth0 ip saddr 10.244.0.0/16 drop'");
    assert!(a.ns.pings("192.0.2.2"));
    assert!(lab.n2.ns.pings(&a.v4().to_string()));
}

#[test]
fn what_leaves_the_cluster_is_masqueraded_and_nothing_else() {
    if root() {
        scenarios::outside_sees_the_node(&Lab::new(BENEATH));
    }
}

#[test]
fn a_service_address_that_nobody_translated_is_refused_on_the_node() {
    if root() {
        scenarios::unknown_service_is_refused(&Lab::new(BENEATH));
    }
}

#[test]
fn the_dns_address_answers_pods_and_node_but_nobody_outside() {
    if root() {
        scenarios::dns_is_local(&Lab::new(BENEATH));
    }
}

#[test]
fn a_restarted_agent_adopts_what_is_there() {
    if !root() {
        return;
    }
    let mut lab = Lab::new(BENEATH);
    let (a, c) = (lab.n1.pod(10, OPEN), lab.n2.pod(10, OPEN));
    let before = lab.n1.traces();
    lab.n1.close();
    lab.n1.ns.sh("ip link add tp0123456789a type veth peer name left-over");
    assert!(a.ns.pings(&c.v4().to_string()), "works without the agent");
    lab.n1.open();
    lab.n1.comes_to(&before, "nothing rebuilt, the unfinished device removed");
    let pods = lab.n1.call(|node| node.list_pods()).unwrap();
    assert_eq!(pods, [(a.pod.clone(), "eth0".to_owned())]);
    assert!(a.ns.pings(&c.v4().to_string()));
    lab.n1.apply_peers();
    assert_eq!(lab.n1.traces(), before);
}

#[test]
fn the_audit_repairs_what_others_took_away_and_leaves_theirs_alone() {
    if !root() {
        return;
    }
    let lab = Lab::new(BENEATH);
    let (a, c) = (lab.n1.pod(10, OPEN), lab.n2.pod(10, OPEN));
    let clean = lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert_eq!((clean.changes, clean.problems), (vec![], vec![]), "nothing to repair");
    let before = lab.n1.traces();
    let damage = [
        "ip link del towpath-vx".to_owned(),
        format!("ip route del {}/32", a.v4()),
        format!("ip -6 route del {}/128", a.v6()),
        "ip route del 10.244.2.0/24; ip route flush table 7470".to_owned(),
        "ip rule del priority 7470; ip -6 rule del priority 7470".to_owned(),
        "nft flush ruleset".to_owned(),
        "nft flush chain inet towpath postrouting".to_owned(),
        "ip neigh flush nud permanent dev towpath-vx".to_owned(),
        "ip addr del 10.244.1.1/32 dev lo; echo 0 > /proc/sys/net/ipv4/ip_forward".to_owned(),
        format!("ip link set {} down", a.pod.host_device),
    ];
    for command in &damage {
        lab.n1.ns.sh(command);
        let repaired = lab.n1.call(|node| Ok(node.audit())).unwrap();
        assert!(!repaired.changes.is_empty() && repaired.problems.is_empty(), "{command}: {repaired:?}");
        let same = |text: &str| {
            text.lines()
                .map(|l| l.trim_end().to_owned())
                .filter(|l| !l.contains("towpath-vx@") && !l.starts_with("towpath-vx"))
                .collect::<Vec<_>>()
        };
        let mut lines = (same(&lab.n1.traces()), same(&before));
        lines.0.sort();
        lines.1.sort();
        assert_eq!(lines.0, lines.1, "{command}");
        assert!(a.ns.pings(&c.v4().to_string()) && a.ns.pings(&c.v6().to_string()), "after {command}");
    }
    lab.n1.ns.sh("ip route add 203.0.113.0/24 via 192.0.2.254 proto 42; nft add table inet theirs");
    let left = lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert_eq!((left.changes, left.problems), (vec![], vec![]));
    assert!(lab.n1.traces().contains("203.0.113.0/24") && lab.n1.traces().contains("theirs"));
}

#[test]
fn a_pod_is_checked_detached_twice_and_leaves_nothing() {
    if !root() {
        return;
    }
    let lab = Lab::new(BENEATH);
    let before = lab.n1.traces();
    let a = lab.n1.pod(10, OPEN);
    let check = |ns: &Ns| {
        let request =
            crate::CheckRequest { netns: ns.fd(), container_id: "container-1-10".into(), ifname: "eth0".into() };
        lab.n1.call(move |node| node.check_pod(&request))
    };
    check(&a.ns).unwrap();
    a.ns.sh("ip route del default");
    assert!(check(&a.ns).unwrap_err().to_string().contains("0.0.0.0/0"));
    for _ in 0..2 {
        lab.n1.call(|node| node.detach_pod("container-1-10", "eth0")).unwrap();
    }
    lab.n1.comes_to(&before, "nothing is left");
    assert!(check(&a.ns).is_err());
    assert_eq!(a.ns.sh("ip -br link | wc -l").trim(), "1", "only lo is left in the pod");
}

#[test]
fn a_failed_attach_takes_everything_back() {
    if !root() {
        return;
    }
    let lab = Lab::new(BENEATH);
    let before = lab.n1.traces();
    let ns = Ns::new();
    ns.sh("ip link add eth0 type veth peer name other");
    let request = lab.n1.request(&ns, 10, OPEN);
    let error = lab.n1.attach(request).unwrap_err().to_string();
    assert!(error.contains("default/pod-1-10") && error.contains("eth0"), "{error}");
    // The pod's own default route is in the way: the device was made, its setup fails.
    let ns = Ns::new();
    ns.sh("ip link add x type veth peer name y; ip addr add 10.9.9.1/24 dev x; ip link set x up; ip link set y up; ip route add default dev x scope global");
    let request = lab.n1.request(&ns, 10, OPEN);
    let error = lab.n1.attach(request).unwrap_err().to_string();
    assert!(error.contains("0.0.0.0/0"), "{error}");
    assert_eq!(lab.n1.traces(), before);
    // The node's own namespace is no pod's.
    let mut request = lab.n1.request(&ns, 12, OPEN);
    request.netns = lab.n1.ns.fd();
    assert!(lab.n1.attach(request).unwrap_err().to_string().contains("host-network"));
    assert!(!lab.n1.traces().contains(&pod::host_device("container-1-12", "eth0")));
}

#[test]
fn a_pod_has_the_mac_that_was_chosen_for_it_unless_it_is_somebodys() {
    if !root() {
        return;
    }
    let mut lab = Lab::new(BENEATH);
    let other = lab.n1.pod(10, OPEN);
    let before = lab.n1.traces();
    let attach = |host: u8, mac: [u8; 6]| {
        let ns = Ns::new();
        let request = AttachRequest { mac: Some(mac), ..lab.n1.request(&ns, host, OPEN) };
        lab.n1.attach(request).map(|pod| (ns, pod)).map_err(|error| error.to_string())
    };
    let parsed = |text: &str| -> [u8; 6] {
        let bytes: Vec<u8> = text.trim().split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        bytes.try_into().unwrap()
    };
    let of_eth0 = |ns: &Ns| parsed(&ns.sh("ip -o link show eth0 | sed 's,.*link/ether \\([^ ]*\\).*,\\1,'"));
    let uplink = of_eth0(&lab.n1.ns);
    lab.n1.ns.sh("ip neigh replace 192.0.2.77 lladdr 02:00:00:00:00:77 dev eth0 nud stale");
    for (mac, words) in [
        ([0xff; 6], "none that a device can have"),
        ([0x33, 0x33, 0, 0, 0, 1], "none that a device can have"),
        ([0; 6], "none that a device can have"),
        (mac::HOST_SIDE, "one that this network gives by itself"),
        (mac::of_tunnel("192.0.2.2".parse().unwrap()), "one that this network gives by itself"),
        (mac::of_pod("10.244.2.9".parse().unwrap()), "one that this network gives by itself"),
        (other.pod.mac, "one that this network gives by itself"),
        (uplink, "device eth0 of the node has it"),
        ([2, 0, 0, 0, 0, 0x77], "192.0.2.77 has it, beside the node at device eth0"),
    ] {
        let error = attach(11, mac).unwrap_err();
        assert!(
            error.contains(&format!("MAC address {} is asked for", mac::text(mac))) && error.contains(words),
            "{error}"
        );
        assert_eq!(lab.n1.traces(), before, "{error}");
    }
    let chosen = parsed("02:00:5e:10:00:01");
    let (ns, pod) = attach(11, chosen).unwrap();
    assert_eq!((pod.mac, of_eth0(&ns)), (chosen, chosen));
    assert!(ns.pings(&other.v4().to_string()) && other.ns.pings(&pod.addresses[1].to_string()));
    let error = attach(12, chosen).unwrap_err();
    assert!(error.contains("pod default/pod-1-11 has it"), "{error}");
    // Its own sandbox asks again, and an agent that starts finds it as it is.
    let again = AttachRequest { mac: Some(chosen), ..lab.n1.request(&ns, 11, OPEN) };
    assert_eq!(lab.n1.attach(again).unwrap().mac, chosen);
    lab.n1.close();
    lab.n1.open();
    assert!(ns.pings(&other.v4().to_string()));
    assert!(lab.n1.attach(AttachRequest { mac: Some(chosen), ..lab.n1.request(&Ns::new(), 12, OPEN) }).is_err());
    lab.n1.call(|node| node.detach_pod("container-1-11", "eth0")).unwrap();
    lab.n1.comes_to(&before, "nothing is left");
    assert_eq!(
        lab.n1.attach(AttachRequest { mac: Some(chosen), ..lab.n1.request(&Ns::new(), 12, OPEN) }).unwrap().mac,
        chosen
    );
}

#[test]
fn uninstalling_leaves_the_namespace_as_it_was() {
    if !root() {
        return;
    }
    let mut lab = Lab::bare(BENEATH);
    let before = lab.n1.traces();
    lab.n1.open();
    lab.n1.apply_peers();
    let a = lab.n1.pod(10, OPEN);
    let ns = Ns::new();
    let chosen = [2, 0, 0x5e, 0x10, 0, 1];
    lab.n1.attach(AttachRequest { mac: Some(chosen), ..lab.n1.request(&ns, 11, OPEN) }).unwrap();
    // As an agent with the backend `macvlan` lets them in, and somebody else another.
    let others = "02:00:00:00:00:99";
    for mac in [&mac::text(chosen), &mac::text(a.pod.mac), others] {
        lab.n1.ns.sh(&format!("bridge fdb add {mac} dev eth0 self permanent"));
    }
    assert_ne!(lab.n1.traces(), before);
    lab.n1.call(|node| node.uninstall()).unwrap();
    assert_eq!(lab.n1.traces(), before);
    let let_in = lab.n1.ns.sh("bridge fdb show dev eth0 | grep -vi ^33:33: | grep -v ^01:00:5e | cut -d' ' -f1");
    assert_eq!(let_in.trim(), others);
}

#[test]
fn a_pod_that_is_attached_has_no_packet_to_wait_for() {
    if !root() {
        return;
    }
    let lab = Lab::new(BENEATH);
    for host in 20..40 {
        let pod = lab.n1.pod(host, OPEN);
        assert!(lab.n1.ns.pings(&pod.v4().to_string()), "pod {host} gets the first packet");
        lab.n1.call(move |node| node.detach_pod(&format!("container-1-{host}"), "eth0")).unwrap();
    }
}

#[test]
fn a_sandbox_can_be_attached_again_at_once() {
    if !root() {
        return;
    }
    let lab = Lab::new(BENEATH);
    let ns = Ns::new();
    for round in 0..6 {
        // The same sandbox, once under the same container id, once under another; the same address all the time.
        let mut request = lab.n1.request(&ns, 10, OPEN);
        request.container_id = format!("container-{}", round / 2);
        let container_id = request.container_id.clone();
        let pod = lab.n1.attach(request).unwrap();
        assert!(lab.n1.ns.pings(&pod.addresses[0].to_string()), "round {round}");
        lab.n1.call(move |node| node.detach_pod(&container_id, "eth0")).unwrap();
    }
}

#[test]
fn an_attached_pod_takes_what_is_for_its_addresses() {
    if !root() {
        return;
    }
    let lab = Lab::new(BENEATH);
    // Others work on devices at the same time, as where many pods begin.
    let busy = Ns::new();
    let others = std::thread::spawn(move || {
        busy.sh("for i in $(seq 100); do ip link add va type veth peer name vb; ip link del va; done");
    });
    for host in 10..40 {
        let pod = lab.n1.pod(host, OPEN);
        for address in &pod.pod.addresses {
            let ask = || {
                let socket = UdpSocket::bind((*address, 0))?;
                socket.set_read_timeout(Some(Duration::from_secs(2)))?;
                socket.send_to(b"x", socket.local_addr()?)?;
                socket.recv(&mut [0; 8])
            };
            pod.ns.run(ask).unwrap_or_else(|error| panic!("{address} of pod {host} speaks to itself: {error}"));
        }
    }
    others.join().unwrap();
}

#[test]
fn tombstones_of_a_dead_agent_are_cleared_by_the_next() {
    if !root() {
        return;
    }
    let mut lab = Lab::new(BENEATH);
    let before = lab.n1.traces();
    for host in 20..24 {
        lab.n1.pod(host, OPEN);
        lab.n1.call(move |node| node.detach_pod(&format!("container-1-{host}"), "eth0")).unwrap();
    }
    lab.n1.close();
    lab.n1.open();
    lab.n1.comes_to(&before, "no device is left");
    let records = lab.n1.config.state_dir.join("pods");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(3);
    while std::fs::read_dir(&records).unwrap().count() > 0 {
        assert!(std::time::Instant::now() < deadline, "tombstones are left");
        std::thread::yield_now();
    }
}

#[test]
fn clusters_of_one_family_work() {
    if root() {
        let kind = |family| Kind { only: Some(family), ..BENEATH };
        scenarios::one_family(&Lab::new(kind(Family::V4)), "198.51.100.9", "192.0.2.1");
        scenarios::one_family(&Lab::new(kind(Family::V6)), "2001:db8:2::9", "2001:db8:1::1");
    }
}

#[test]
fn addresses_that_no_pod_has_are_refused_at_once() {
    if root() {
        scenarios::dead_addresses_are_refused(&Lab::new(BENEATH));
    }
}
