//! Filters give way to links, and one version's programs to another's, without a packet that is lost or passes unjudged.

use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::lab::{BENEATH, FILTERS, Lab, Ns, OPEN, PATIENCE, PROGRAMS, TestNode, TestPod, root};
use super::shortcut::{Flow, image, pins};
use crate::abi::TP_ABI_VERSION;
use crate::bpf::{Hook, Programs};
use crate::net::link;
use crate::net::netlink::Netlink;

/// The pod's hooks that have a link of ours.
pub(super) fn links(node: &TestNode, pod: &TestPod) -> Vec<Hook> {
    let attached = node.call(|node| node.observe(Programs::attached)).unwrap();
    attached.into_iter().filter(|(index, _)| *index == pod.pod.ifindex).map(|(_, hook)| hook).collect()
}

/// The programs' ids that filters of the pod's device run, from and to the pod.
pub(super) fn filters(node: &TestNode, pod: &TestPod) -> Vec<String> {
    filters_of(node, &pod.pod.host_device)
}

/// The programs' ids that filters of a device run.
pub(super) fn filters_of(node: &TestNode, device: &str) -> Vec<String> {
    let show = |place: &str| node.ns.sh(&format!("tc filter show dev {device} {place}"));
    let shown = [show("ingress"), show("egress")].concat();
    let words: Vec<&str> = shown.split_whitespace().collect();
    words.windows(2).filter(|pair| pair[0] == "id").map(|pair| pair[1].to_owned()).collect()
}

/// Echo requests, two milliseconds apart, until it is dropped or asked.
struct Pinging(Option<Child>);

impl Pinging {
    fn start(from: &Ns, to: &TestPod) -> Self {
        let to = to.v4().to_string();
        let arguments = ["-i", "0.002", "-W", "1", "-q", &to];
        let start = || Command::new("ping").args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        Self(Some(from.run(start)))
    }

    /// How many were sent and how many answered.
    fn end(mut self) -> (u32, u32) {
        let child = self.0.take().unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::Signal::SIGINT)
            .unwrap();
        let said = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let number = |word: &str| {
            let before = said.split(word).next().unwrap();
            before.split([' ', '\n']).rfind(|w| !w.is_empty()).unwrap().parse().unwrap()
        };
        (number(" packets transmitted"), number(" received"))
    }
}

impl Drop for Pinging {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

/// Datagrams of the outside host to a pod, ten thousand a second: they are judged at the pod's device alone, and a gap of a
/// millisecond lets some through.
pub(super) struct Flood {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<u32>,
    receiver: UdpSocket,
}

impl Flood {
    pub(super) fn start(lab: &Lab, to: &TestPod) -> Self {
        lab.router.sh("ip route replace 10.244.1.0/24 via 192.0.2.1");
        let receiver = to.ns.run(|| UdpSocket::bind((to.v4(), 9)).unwrap());
        receiver.set_nonblocking(true).unwrap();
        let socket = lab.outside.run(|| UdpSocket::bind("198.51.100.9:0").unwrap());
        socket.connect((to.v4(), 9)).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let send = move || {
            let mut sent = 0;
            while !stopped.load(Ordering::Relaxed) {
                sent += u32::from(socket.send(b"x").is_ok());
                // The pace, not a wait for anything.
                std::thread::sleep(Duration::from_micros(50));
            }
            sent
        };
        Self { stop, sender: std::thread::spawn(send), receiver }
    }

    /// Whether one arrives, before a deadline.
    pub(super) fn arrives(&self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.receiver.recv(&mut [0; 8]).is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    /// How many were sent, and how many arrived (as far as the receiver's buffer goes).
    pub(super) fn end(self) -> (u32, u32) {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        let mut arrived = 0;
        while self.receiver.recv(&mut [0; 8]).is_ok() {
            arrived += 1;
        }
        (sent, arrived)
    }
}

/// What is sent while `work` runs is answered, all but the one that was on its way at the end.
pub(super) fn loses_nothing<R>(from: &Ns, to: &TestPod, work: impl FnOnce() -> R) -> R {
    assert!(from.pings(&to.v4().to_string()));
    let pinging = Pinging::start(from, to);
    std::thread::sleep(Duration::from_millis(50));
    let result = work();
    let (sent, answered) = pinging.end();
    assert!(sent > 10 && sent - answered <= 1, "{answered} of {sent} answered");
    result
}

#[test]
fn links_take_the_place_of_filters_without_a_gap() {
    if !root() {
        return;
    }
    let lab = Lab::new(FILTERS);
    let (a, b, shut) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n1.pod(12, None));
    assert_eq!((links(&lab.n1, &b), filters(&lab.n1, &b).len()), (vec![], 2));
    let unjudged = Flood::start(&lab, &shut);
    let mut flow = Flow::open(&a, &b, 80);
    loses_nothing(&a.ns, &b, || {
        for step in 1.. {
            let more = lab.n1.call(|node| Ok(node.link_next())).unwrap();
            assert!(flow.works(), "after step {step}");
            if !more {
                assert!(step >= 9, "a step attaches one link at most: {step}");
                break;
            }
        }
    });
    for pod in [&a, &b, &shut] {
        assert_eq!(links(&lab.n1, pod), [Hook::FromPod, Hook::ToPod]);
        assert!(filters(&lab.n1, pod).is_empty());
    }
    let (sent, arrived) = unjudged.end();
    assert!(sent > 100 && arrived == 0, "{arrived} of {sent} packets reached an isolated pod");
    assert!(!lab.n1.call(|node| Ok(node.link_next())).unwrap(), "nothing is left to do");
    let clean = lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert_eq!((clean.changes, clean.problems), (vec![], vec![]));
    lab.n1.call(|node| node.apply_policy(&image(&[], &[10, 11, 12]))).unwrap();
    let judged = Flood::start(&lab, &shut);
    assert!(judged.arrives(), "a flood that is allowed arrives");
    judged.end();
}

#[test]
fn a_restarted_agent_brings_filters_up_to_date_and_goes_on() {
    if !root() {
        return;
    }
    let mut lab = Lab::new(FILTERS);
    let (a, b) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN));
    // One link of two, as an agent leaves it that dies in between.
    lab.n1.call(|node| Ok(node.link_next())).unwrap();
    let before = filters(&lab.n1, &b);
    lab.n1.close();
    loses_nothing(&a.ns, &b, || lab.n1.open());
    let after = filters(&lab.n1, &b);
    assert!(after.len() == 2 && before.iter().all(|id| !after.contains(id)), "{before:?}, then {after:?}");
    lab.n1.link();
    for pod in [&a, &b] {
        assert_eq!((links(&lab.n1, pod), filters(&lab.n1, pod)), (vec![Hook::FromPod, Hook::ToPod], vec![]));
    }
    assert!(a.ns.pings(&b.v6().to_string()));
}

#[test]
fn filters_that_somebody_takes_away_become_links_at_the_next_check() {
    if !root() {
        return;
    }
    let lab = Lab::new(FILTERS);
    let (a, shut) = (lab.n1.pod(10, OPEN), lab.n1.pod(12, None));
    lab.n1.ns.sh(&format!("tc qdisc del dev {} clsact", shut.pod.host_device));
    let repaired = lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert_eq!(repaired.problems, Vec::<String>::new());
    assert_eq!(links(&lab.n1, &shut), [Hook::FromPod, Hook::ToPod]);
    assert!(!shut.ns.pings(&a.v4().to_string()) && !a.ns.pings(&shut.v4().to_string()));
    lab.n1.link();
    assert_eq!(links(&lab.n1, &a), [Hook::FromPod, Hook::ToPod]);
}

#[test]
fn a_pod_that_goes_before_its_links_leaves_nothing_to_do() {
    if !root() {
        return;
    }
    let lab = Lab::new(FILTERS);
    let (traces, pinned) = (lab.n1.traces(), pins(&lab.n1));
    let _pod = lab.n1.pod(10, OPEN);
    lab.n1.call(|node| node.detach_pod("container-1-10", "eth0")).unwrap();
    assert!(!lab.n1.call(|node| Ok(node.link_next())).unwrap());
    lab.n1.comes_to(&traces, "nothing is left");
    assert_eq!(pins(&lab.n1), pinned);
}

/// Ends the agent and has what it pinned be another version's.
pub(super) fn as_if_of_version(node: &mut TestNode, version: u32) {
    node.close();
    let bpffs = node.config.bpffs.display();
    node.ns.sh(&format!("mv {bpffs}/towpath-v{TP_ABI_VERSION} {bpffs}/towpath-v{version}"));
}

fn another_version_gives_way(version: u32) {
    let mut lab = Lab::new(PROGRAMS);
    let (a, b, shut) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n1.pod(12, None));
    let remote = lab.n2.pod(10, OPEN);
    let mut flow = Flow::open(&a, &b, 80);
    as_if_of_version(&mut lab.n1, version);
    let theirs = format!("towpath-v{version}");
    let unjudged = Flood::start(&lab, &shut);
    let _late = loses_nothing(&a.ns, &b, || {
        loses_nothing(&remote.ns, &b, || {
            lab.n1.open();
            assert!(lab.n1.call(|node| node.observe(Programs::attached)).unwrap().is_empty(), "theirs are at work");
            assert!(flow.works(), "with their connection table");
            let late = lab.n1.pod(13, None);
            assert!(lab.n1.ns.pings(&late.v4().to_string()), "a pod that comes meanwhile has ours");
            lab.n1.apply_peers();
            lab.n1.call(|node| node.apply_policy(&image(&[], &[10, 11]))).unwrap();
            assert!(links(&lab.n1, &a).is_empty() && pins(&lab.n1).contains(&theirs));
            lab.n1.call(|node| node.apply_services(&Default::default())).unwrap();
            late
        })
    });
    assert!(!pins(&lab.n1).contains(&theirs), "{}", pins(&lab.n1));
    for pod in [&a, &b, &shut] {
        assert_eq!(links(&lab.n1, pod), [Hook::FromPod, Hook::ToPod]);
    }
    assert!(pins(&lab.n1).contains("cgroup-tp_connect4"));
    let (sent, arrived) = unjudged.end();
    assert!(sent > 100 && arrived == 0, "{arrived} of {sent} packets reached an isolated pod");
    assert!(flow.works(), "the policy allows what goes on");
    lab.n1.call(|node| node.apply_policy(&image(&[11], &[10]))).unwrap();
    assert!(!a.ns.pings(&b.v4().to_string()) && Flow::open(&a, &b, 80).works(), "our maps rule");
    let clean = lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert_eq!((clean.changes, clean.problems), (vec![], vec![]));
}

#[test]
fn programs_of_an_older_version_go_on_until_all_is_applied_and_then_give_way_at_once() {
    if root() {
        another_version_gives_way(0);
    }
}

#[test]
fn so_do_those_of_a_newer_version() {
    if root() {
        another_version_gives_way(TP_ABI_VERSION + 1);
    }
}

#[test]
fn filters_of_another_version_go_on_until_all_is_applied() {
    if !root() {
        return;
    }
    let mut lab = Lab::new(FILTERS);
    let (a, b) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN));
    let before = filters(&lab.n1, &b);
    as_if_of_version(&mut lab.n1, 0);
    loses_nothing(&a.ns, &b, || {
        lab.n1.open();
        lab.n1.link();
        assert_eq!(filters(&lab.n1, &b), before, "theirs are at work");
        lab.n1.apply_peers();
        lab.n1.call(|node| node.apply_policy(&image(&[], &[10, 11]))).unwrap();
        lab.n1.call(|node| node.apply_services(&Default::default())).unwrap();
        assert_ne!(filters(&lab.n1, &b), before);
        lab.n1.link();
    });
    assert_eq!((links(&lab.n1, &b), filters(&lab.n1, &b)), (vec![Hook::FromPod, Hook::ToPod], vec![]));
}

#[test]
fn uninstalling_removes_another_versions_pins_too() {
    if !root() {
        return;
    }
    let mut lab = Lab::bare(PROGRAMS);
    let (traces, pinned) = (lab.n1.traces(), pins(&lab.n1));
    lab.n1.open();
    let _pod = lab.n1.pod(10, OPEN);
    as_if_of_version(&mut lab.n1, 0);
    lab.n1.open();
    lab.n1.call(|node| node.uninstall()).unwrap();
    assert_eq!((lab.n1.traces(), pins(&lab.n1)), (traces, pinned));
}

#[test]
fn without_programs_a_device_has_no_filters() {
    if !root() {
        return;
    }
    let lab = Lab::new(BENEATH);
    let pod = lab.n1.pod(10, OPEN);
    assert!(filters(&lab.n1, &pod).is_empty());
    let up = lab.n1.ns.run(|| link::existing(&mut Netlink::open().unwrap(), &pod.pod.host_device).unwrap().up);
    assert!(up);
}
