//! Services forwarded by drivers, with real packets: a client outside, the node that it asks, a backend on another node, and back.
//!
//! Every device here is a veth. Its driver runs programs of XDP like another, with two conditions that cards do not have: what a program sends
//! arrives only if the other end runs one, too, and only what left its sender with a complete checksum can be forwarded.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use towpath_model::custom::Acceleration;
use towpath_model::desired::ServiceTable;

use super::hooks::as_if_of_version;
use super::lab::{CLSACT, Kind, Lab, OPEN, PATIENCE, PROGRAMS, TestNode, TestPod, root, tcp_to};
use super::shortcut::{Flow, image, pins, services};
use crate::abi::TP_ABI_VERSION;
use crate::bpf::{Hook, Programs};
use crate::net::link;
use crate::net::netlink::Netlink;
use crate::requests::NodeStatus;

const ENTRIES: [&str; 2] = ["192.0.2.1:30080", "[2001:db8:1::1]:30080"];
const CLIENTS: [&str; 2] = ["198.51.100.9", "2001:db8:2::9"];

/// A lab whose first node forwards in its driver, and a pod behind the second that a NodePort leads to.
fn accelerated(kind: Kind) -> (Lab, TestPod, OwnedFd) {
    let mut lab = Lab::bare(kind);
    let other_end = lab.router.run(|| pass_all("n1"));
    lab.outside.sh("ethtool -K eth0 tx off");
    lab.n1.config.acceleration = Acceleration::Native;
    for node in [&mut lab.n1, &mut lab.n2] {
        node.open();
        node.apply_peers();
    }
    let pod = lab.n2.pod(10, OPEN);
    pod.ns.sh("ethtool -K eth0 tx off");
    let table = services(&pod.pod.addresses);
    serve(&lab.n1, &table);
    serve(&lab.n2, &table);
    // So that the neighbours are known from the first packet on.
    assert!(lab.n1.ns.comes_to_ping("192.0.2.2") && lab.n1.ns.comes_to_ping("2001:db8:2::9"));
    assert!(lab.n1.ns.comes_to_ping("198.51.100.9"));
    (lab, pod, other_end)
}

fn serve(node: &TestNode, table: &ServiceTable) {
    let table = table.clone();
    node.call(move |node| node.apply_services(&table)).unwrap();
}

/// Packets by what became of them, all looked at together.
fn counted<const N: usize>(node: &TestNode, names: [&str; N]) -> [u64; N] {
    let counters = node.call(|node| node.observe(Programs::counters)).unwrap();
    names.map(|name| counters.iter().find(|count| count.reason.name() == name).unwrap().packets)
}

fn status(node: &TestNode) -> NodeStatus {
    node.call(|node| Ok(node.status())).unwrap()
}

/// Whether the driver of the node's uplink runs a program.
fn runs_xdp(node: &TestNode) -> bool {
    node.ns.sh("ip -d link show eth0").contains(" xdp")
}

/// Waits for the kernel to end a program whose link went: it does so after a grace period.
fn comes_to_run_none(node: &TestNode) {
    let deadline = Instant::now() + PATIENCE;
    while runs_xdp(node) {
        assert!(Instant::now() < deadline, "the driver still runs a program");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How many packets the driver forwards while `work` runs, and how many leave the node by the stack or by tc instead.
fn forwarded<R>(node: &TestNode, work: impl FnOnce() -> R) -> (u64, u64) {
    let count = || {
        let [accelerated, to_node, to_client] = counted(node, ["accelerated", "tunnel_out", "host_out"]);
        (accelerated, to_node + to_client)
    };
    let before = count();
    work();
    let after = count();
    let accelerated = after.0 - before.0;
    // Packets may go by between two looks at counters.
    (accelerated, (after.1 - before.1).saturating_sub(accelerated))
}

/// Asks a UDP NodePort; the address that the backend sees. The answer comes from where the question went, or not at all.
fn udp_to(lab: &Lab, pod: &TestPod, entry: SocketAddr) -> IpAddr {
    let any = if entry.is_ipv4() { "0.0.0.0" } else { "::" };
    let serving = pod.ns.run(|| UdpSocket::bind((any, 80)).unwrap());
    let asking = lab.outside.run(|| UdpSocket::bind((any, 0)).unwrap());
    for socket in [&serving, &asking] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    asking.connect(entry).unwrap();
    let (question, mut bytes): (Vec<u8>, _) = ((0..1200_u32).map(|n| (n * 7) as u8).collect(), [0; 2048]);
    let mut seen = entry.ip();
    for _ in 0..4 {
        asking.send(&question).unwrap();
        let (len, from) = serving.recv_from(&mut bytes).unwrap();
        assert_eq!(bytes[..len], question);
        serving.send_to(&bytes[..len], from).unwrap();
        let len = asking.recv(&mut bytes).unwrap();
        assert_eq!(bytes[..len], question);
        seen = from.ip();
    }
    seen
}

fn a_node_port_is_forwarded(kind: Kind) {
    let (mut lab, pod, _other_end) = accelerated(kind);
    assert_eq!((status(&lab.n1).accelerated, runs_xdp(&lab.n1)), (vec!["eth0".to_owned()], true));
    assert!(!runs_xdp(&lab.n2));
    for (entry, client) in ENTRIES.into_iter().zip(CLIENTS) {
        let entry: SocketAddr = entry.parse().unwrap();
        let (by_driver, otherwise) = forwarded(&lab.n1, || {
            assert_eq!(tcp_to(&lab.outside, &pod.ns, 80, entry).unwrap().to_string(), client, "TCP to {entry}");
            assert_eq!(udp_to(&lab, &pod, entry).to_string(), client, "UDP to {entry}");
        });
        // 40,000 bytes are 29 segments; one of 65,536 checksums looks as if it were left to a device.
        assert!(by_driver >= 40 && otherwise <= 3, "{entry}: {by_driver} by the driver, {otherwise} otherwise");
    }
    // A backend of this node is tc's, with the client's address all the same.
    let near = lab.n1.pod(11, OPEN);
    serve(&lab.n1, &services(&near.pod.addresses));
    let (by_driver, _) = forwarded(&lab.n1, || {
        assert_eq!(tcp_to(&lab.outside, &near.ns, 80, ENTRIES[0].parse().unwrap()).unwrap().to_string(), CLIENTS[0]);
    });
    assert_eq!(by_driver, 0);
    lab.n1.call(|node| node.uninstall()).unwrap();
    comes_to_run_none(&lab.n1);
    lab.n1.close();
}

#[test]
fn a_node_port_is_forwarded_by_the_driver_with_the_clients_address() {
    if root() {
        a_node_port_is_forwarded(PROGRAMS);
    }
}

#[test]
fn so_it_is_beside_filters() {
    if root() {
        a_node_port_is_forwarded(CLSACT);
    }
}

#[test]
fn what_has_no_checksum_yet_takes_the_stacks_way() {
    if !root() {
        return;
    }
    let (lab, pod, _other_end) = accelerated(PROGRAMS);
    lab.outside.sh("ethtool -K eth0 tx on");
    pod.ns.sh("ethtool -K eth0 tx on");
    for (entry, client) in ENTRIES.into_iter().zip(CLIENTS) {
        let entry: SocketAddr = entry.parse().unwrap();
        let (by_driver, otherwise) = forwarded(&lab.n1, || {
            assert_eq!(tcp_to(&lab.outside, &pod.ns, 80, entry).unwrap().to_string(), client, "TCP to {entry}");
            assert_eq!(udp_to(&lab, &pod, entry).to_string(), client, "UDP to {entry}");
        });
        assert!(otherwise >= 10, "{entry}: {by_driver} by the driver, {otherwise} otherwise");
    }
}

/// A connection that is used all the time.
struct Talk {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<bool>,
}

impl Talk {
    fn start(mut flow: Flow) -> Self {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&rounds));
        let talk = move || {
            while !stopped.load(Ordering::Relaxed) {
                if !flow.works() {
                    return false;
                }
                count.fetch_add(1, Ordering::Relaxed);
            }
            true
        };
        Self { stop, rounds, thread: std::thread::spawn(talk) }
    }

    /// Waits for 20 questions and answers, and for the one that is under way.
    fn goes_on(&self) {
        let (deadline, wanted) = (Instant::now() + PATIENCE, self.rounds.load(Ordering::Relaxed) + 21);
        while self.rounds.load(Ordering::Relaxed) < wanted {
            assert!(Instant::now() < deadline && !self.thread.is_finished(), "the connection is dead");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn end(self) -> bool {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

#[test]
fn a_connection_outlives_the_agent_the_program_and_its_coming_back() {
    if !root() {
        return;
    }
    let (mut lab, pod, _other_end) = accelerated(PROGRAMS);
    let talk = Talk::start(Flow::between(&lab.outside, &pod.ns, ENTRIES[0].parse().unwrap(), 80));
    let table = services(&pod.pod.addresses);
    talk.goes_on();
    let [before] = counted(&lab.n1, ["accelerated"]);
    lab.n1.close();
    talk.goes_on();
    assert!(runs_xdp(&lab.n1), "it needs no agent");
    let start = |lab: &mut Lab, acceleration| {
        lab.n1.close();
        lab.n1.config.acceleration = acceleration;
        lab.n1.open();
        lab.n1.apply_peers();
        serve(&lab.n1, &table);
    };
    start(&mut lab, Acceleration::Native);
    let meanwhile = counted(&lab.n1, ["accelerated"])[0] - before;
    assert!(meanwhile >= 40, "{meanwhile} packets while there was no agent");
    let (by_driver, otherwise) = forwarded(&lab.n1, || talk.goes_on());
    assert!(by_driver >= 40 && otherwise <= 9, "{by_driver} by the new program, {otherwise} otherwise");
    for _ in 0..3 {
        start(&mut lab, Acceleration::Disabled);
        comes_to_run_none(&lab.n1);
        assert!(status(&lab.n1).accelerated.is_empty());
        let (by_driver, otherwise) = forwarded(&lab.n1, || talk.goes_on());
        assert!(by_driver == 0 && otherwise >= 40, "{by_driver} by a program that is gone, {otherwise} otherwise");
        start(&mut lab, Acceleration::Native);
        let (by_driver, _) = forwarded(&lab.n1, || talk.goes_on());
        assert!(by_driver >= 40, "{by_driver} by the program that is back");
    }
    assert!(talk.end(), "nothing was lost for good");
}

#[test]
fn another_versions_program_goes_on_until_ours_takes_its_place() {
    if !root() {
        return;
    }
    for version in [0, TP_ABI_VERSION + 1] {
        let (mut lab, pod, _other_end) = accelerated(PROGRAMS);
        let talk = Talk::start(Flow::between(&lab.outside, &pod.ns, ENTRIES[0].parse().unwrap(), 80));
        talk.goes_on();
        as_if_of_version(&mut lab.n1, version);
        lab.n1.open();
        talk.goes_on();
        let linked = |lab: &Lab| {
            let attached = lab.n1.call(|node| node.observe(Programs::attached)).unwrap();
            attached.iter().filter(|(_, hook)| *hook == Hook::FromWire).count()
        };
        assert!(linked(&lab) == 0 && runs_xdp(&lab.n1), "theirs is at work");
        lab.n1.apply_peers();
        serve(&lab.n1, &services(&pod.pod.addresses));
        lab.n1.call(|node| node.apply_policy(&image(&[], &[]))).unwrap();
        assert!(!pins(&lab.n1).contains(&format!("towpath-v{version}/")), "{}", pins(&lab.n1));
        assert!(linked(&lab) == 1 && runs_xdp(&lab.n1));
        let (by_driver, _) = forwarded(&lab.n1, || talk.goes_on());
        assert!(by_driver >= 40, "{by_driver} by ours");
        assert!(talk.end());
    }
}

/// A program of somebody else's that lets everything pass, on a device as long as the answer lives.
fn pass_all(device: &str) -> OwnedFd {
    let index = link::existing(&mut Netlink::open().unwrap(), device).unwrap().index;
    let insn = |code: u8, imm: i32| {
        let mut insn = libbpf_sys::bpf_insn { code, imm, ..Default::default() };
        insn.set_dst_reg(0);
        insn
    };
    // r0 = XDP_PASS; exit
    let program = [insn(0xb7, 2), insn(0x95, 0)];
    // SAFETY: the instructions and names outlive the calls; descriptors are new and nobody else's.
    unsafe {
        let program = libbpf_sys::bpf_prog_load(
            libbpf_sys::BPF_PROG_TYPE_XDP,
            c"theirs".as_ptr(),
            c"GPL".as_ptr(),
            program.as_ptr(),
            program.len() as libbpf_sys::size_t,
            std::ptr::null_mut(),
        );
        assert!(program >= 0, "{program}");
        let program = OwnedFd::from_raw_fd(program);
        let link =
            libbpf_sys::bpf_link_create(program.as_raw_fd(), index as i32, libbpf_sys::BPF_XDP, std::ptr::null());
        assert!(link >= 0, "{link}");
        OwnedFd::from_raw_fd(link)
    }
}

#[test]
fn somebody_elses_program_stays_and_is_named() {
    if !root() {
        return;
    }
    let (mut lab, pod, _other_end) = accelerated(PROGRAMS);
    lab.n1.close();
    lab.n1.config.acceleration = Acceleration::Disabled;
    lab.n1.open();
    comes_to_run_none(&lab.n1);
    let theirs = lab.n1.ns.run(|| pass_all("eth0"));
    lab.n1.close();
    lab.n1.config.acceleration = Acceleration::Native;
    lab.n1.open();
    lab.n1.apply_peers();
    serve(&lab.n1, &services(&pod.pod.addresses));
    let said = status(&lab.n1);
    assert!(said.accelerated.is_empty(), "{said:?}");
    assert!(
        said.acceleration_notes.len() == 1
            && said.acceleration_notes[0].contains("device eth0: it runs another XDP program"),
        "{said:?}"
    );
    let entry: SocketAddr = ENTRIES[0].parse().unwrap();
    assert_eq!(tcp_to(&lab.outside, &pod.ns, 80, entry).unwrap().to_string(), CLIENTS[0], "without it");
    assert!(runs_xdp(&lab.n1), "theirs");
    drop(theirs);
    let audited = lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert_eq!(audited.problems, Vec::<String>::new());
    let said = status(&lab.n1);
    assert_eq!(said.accelerated, ["eth0"]);
    assert!(
        said.acceleration_notes.len() == 1 && said.acceleration_notes[0].contains("eth0, which is a veth"),
        "{said:?}"
    );
    let (by_driver, _) = forwarded(&lab.n1, || tcp_to(&lab.outside, &pod.ns, 80, entry).unwrap());
    assert!(by_driver >= 40, "{by_driver}");
}

#[test]
fn a_device_that_cannot_does_without_and_best_effort_leaves_software_alone() {
    if !root() {
        return;
    }
    let mut lab = Lab::bare(PROGRAMS);
    lab.n1.ns.sh("ip link add br1 type bridge; ip addr add 203.0.113.1/24 dev br1; ip link set br1 up");
    lab.n1.config.devices = vec!["br1".to_owned()];
    lab.n1.config.acceleration = Acceleration::Native;
    lab.n1.open();
    lab.n1.apply_peers();
    let said = status(&lab.n1);
    assert_eq!(said.accelerated, ["eth0"]);
    assert!(said.acceleration_notes[0].contains("device br1: its driver cannot"), "{said:?}");
    lab.n1.close();
    lab.n1.config.acceleration = Acceleration::BestEffort;
    lab.n1.open();
    lab.n1.apply_peers();
    let said = status(&lab.n1);
    assert_eq!((said.accelerated, said.acceleration_notes, runs_xdp(&lab.n1)), (vec![], vec![], false));
}
