//! From one version of the programs to another and back, with connections that only the table of connections lets through.

use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};

use super::hooks::as_if_of_version;
use super::lab::{CLSACT, Kind, Lab, OPEN, PROGRAMS, TestNode, TestPod, root};
use super::shortcut::{CLUSTER, Flow, image, pins, services};
use crate::abi::TP_ABI_VERSION;
use crate::bpf::lay_out_as_the_next_version;
use crate::bpf::{Held, Programs};

fn maps(node: &TestNode, version: u32) -> PathBuf {
    node.config.bpffs.join(format!("towpath-v{version}/maps"))
}

fn apply(node: &TestNode, backend: &TestPod) {
    node.apply_peers();
    // Nobody may open a connection to pod 10 but on port 80; it may open any.
    node.call(|node| node.apply_policy(&image(&[10], &[11]))).unwrap();
    let table = services(&[backend.v4()]);
    node.call(move |node| node.apply_services(&table)).unwrap();
}

fn held(node: &TestNode) -> Held {
    node.call(|node| node.observe(Programs::held)).unwrap()
}

fn has_connections_of(node: &TestNode, pod: &TestPod) -> bool {
    let address = pod.v4();
    let all = node.call(|node| node.observe(Programs::connections)).unwrap();
    all.iter().any(|connection| [connection.opener.0, connection.responder.0].contains(&address))
}

struct Flows {
    forbidden_anew: Flow,
    translated: Flow,
}

impl Flows {
    /// Both are opened by the isolated pod.
    fn open(lab: &Lab, isolated: &TestPod, open: &TestPod) -> Self {
        apply(&lab.n1, open);
        let mut flows = Self {
            forbidden_anew: Flow::open(isolated, open, 81),
            translated: Flow::between(&isolated.ns, &open.ns, CLUSTER[0].parse().unwrap(), 80),
        };
        assert!(flows.forbidden_anew.works() && flows.translated.works());
        flows
    }

    /// What the other end says now would be a new connection, which the policy forbids, to whoever does not know this one; and would
    /// come from another address than the Service's.
    fn go_on(&mut self) -> bool {
        self.forbidden_anew.is_spoken_to()
            && self.translated.is_spoken_to()
            && self.forbidden_anew.works()
            && self.translated.works()
    }
}

/// A connection that the other version's programs let in after ours were loaded.
fn enter_another(node: &TestNode, version: u32) {
    let pin = maps(node, version).join("tp_ct");
    node.ns.run(|| {
        let connections = MapHandle::from_pinned_path(pin).unwrap();
        let mut key = connections.keys().next().unwrap();
        let value = connections.lookup(&key, MapFlags::ANY).unwrap().unwrap();
        let port = key.len() - 8;
        key[port] ^= 0x55;
        connections.update(&key, &value, MapFlags::NO_EXIST).unwrap();
    });
}

/// A run of ours that ended, without a word, after it had made its maps and before it had filled them.
fn die_before_filling(node: &mut TestNode) {
    node.open();
    node.close();
    let ours = maps(node, TP_ABI_VERSION);
    node.ns.run(|| {
        std::fs::remove_file(ours.join("filled")).unwrap();
        for name in ["tp_ct", "tp_nat"] {
            let map = MapHandle::from_pinned_path(ours.join(name)).unwrap();
            for key in map.keys().collect::<Vec<_>>() {
                map.delete(&key).unwrap();
            }
        }
    });
}

/// Maps, and no links, that a version which never came to work left.
fn leave_idle(node: &TestNode, version: u32) {
    let idle = maps(node, version);
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    let empty = MapHandle::create(MapType::Hash, Some("tp_ct"), 40, 8, 1, &options);
    node.ns.run(|| {
        std::fs::create_dir_all(&idle).unwrap();
        empty.unwrap().pin(idle.join("tp_ct")).unwrap();
    });
}

/// How a version's last moments went wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    /// See [`die_before_filling`].
    Killed,
    /// See [`leave_idle`].
    Third,
    /// A pod ends while both versions are there.
    PodGone,
}

fn over_to_ours(kind: Kind, version: u32, other_layouts: bool) {
    over_to_ours_with(kind, version, other_layouts, Trouble::None);
}

fn over_to_ours_with(kind: Kind, version: u32, other_layouts: bool, trouble: Trouble) {
    let mut lab = Lab::new(kind);
    let (isolated, open) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN));
    let mut flows = Flows::open(&lab, &isolated, &open);
    let going = (trouble == Trouble::PodGone).then(|| {
        let going = lab.n1.pod(12, OPEN);
        let flow = Flow::open(&going, &open, 80);
        (going, flow)
    });
    lab.n1.link();
    as_if_of_version(&mut lab.n1, version);
    if other_layouts {
        let theirs = maps(&lab.n1, version);
        let changed = lab.n1.ns.run(|| lay_out_as_the_next_version(&theirs));
        for map in ["tp_ct", "tp_nat", "tp_flows", "tp_backends"] {
            assert!(changed.iter().any(|name| name == map), "{map} is not among {changed:?}");
        }
    }
    match trouble {
        Trouble::Killed => die_before_filling(&mut lab.n1),
        Trouble::Third => leave_idle(&lab.n1, version + 1),
        Trouble::None | Trouble::PodGone => {}
    }
    lab.n1.open();
    assert!(
        has_connections_of(&lab.n1, &isolated),
        "carried over at once: policies and translations are judged by them"
    );
    assert!(flows.go_on(), "while the other version's programs are at work");
    if let Some((going, _)) = &going {
        assert!(has_connections_of(&lab.n1, going), "carried over");
        lab.n1.call(|node| node.detach_pod("container-1-12", "eth0")).unwrap();
    }
    if other_layouts {
        enter_another(&lab.n1, version);
    }
    // No delayed acknowledgement makes the isolated pod the first to say something.
    std::thread::sleep(Duration::from_millis(300));
    apply(&lab.n1, &open);
    assert!(!pins(&lab.n1).contains(&format!("towpath-v{version}/")), "{}", pins(&lab.n1));
    assert!(flows.go_on(), "with ours");
    assert!(going.is_none_or(|(going, _)| !has_connections_of(&lab.n1, &going)), "they came back with the last copy");
    let accounts = held(&lab.n1);
    let by_all: u32 = accounts.holders.iter().map(|holder| holder.held).sum();
    let entries = lab.n1.call(|node| node.observe(Programs::connections)).unwrap().len();
    assert_eq!((accounts.all, by_all), (entries as u32, entries as u32), "{accounts:?}");
    assert!(entries >= if other_layouts { 3 } else { 2 }, "{entries}");
    let port = SocketAddr::new(isolated.v4(), 81);
    let anew = open.ns.run(|| TcpStream::connect_timeout(&port, Duration::from_millis(500)));
    assert!(anew.is_err(), "the policy holds");
    let clean = lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert_eq!((clean.changes, clean.problems), (vec![], vec![]));
}

#[test]
fn connections_outlive_an_upgrade_and_a_rollback_where_layouts_are_the_same() {
    if root() {
        over_to_ours(PROGRAMS, 0, false);
        over_to_ours(PROGRAMS, TP_ABI_VERSION + 1, false);
    }
}

#[test]
fn connections_outlive_them_where_layouts_changed() {
    if root() {
        over_to_ours(PROGRAMS, TP_ABI_VERSION + 1, true);
        over_to_ours(PROGRAMS, 0, true);
    }
}

#[test]
fn connections_outlive_a_run_that_was_killed_between_making_its_maps_and_filling_them() {
    if root() {
        over_to_ours_with(PROGRAMS, TP_ABI_VERSION + 1, true, Trouble::Killed);
    }
}

#[test]
fn the_version_at_work_is_followed_and_not_the_newest() {
    if root() {
        over_to_ours_with(PROGRAMS, TP_ABI_VERSION + 1, true, Trouble::Third);
    }
}

#[test]
fn connections_of_a_pod_that_goes_meanwhile_do_not_come_back() {
    if root() {
        over_to_ours_with(PROGRAMS, TP_ABI_VERSION + 1, true, Trouble::PodGone);
    }
}

#[test]
fn limits_are_raised_under_load() {
    if !root() {
        return;
    }
    let mut lab = Lab::new(PROGRAMS);
    let (isolated, open) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN));
    let mut flows = Flows::open(&lab, &isolated, &open);
    lab.n1.link();
    for round in [1, 2] {
        lab.n1.close();
        lab.n1.config.limits.connections *= 2;
        lab.n1.config.limits.backends *= 2;
        lab.n1.open();
        assert!(flows.go_on(), "while the smaller maps are at work");
        std::thread::sleep(Duration::from_millis(300));
        apply(&lab.n1, &open);
        let pins = pins(&lab.n1);
        let own = format!("towpath-v{TP_ABI_VERSION}-{round}");
        assert!(pins.contains(&own) && !pins.replace(&own, "").contains("towpath-v"), "{pins}");
        let pin = lab.n1.config.bpffs.join(format!("{own}/maps/tp_ct"));
        let size = lab.n1.ns.run(|| MapHandle::from_pinned_path(pin).unwrap().max_entries());
        assert_eq!(size, lab.n1.config.limits.connections);
        assert!(flows.go_on(), "with the larger ones");
        let accounts = held(&lab.n1);
        let entries = lab.n1.call(|node| node.observe(Programs::connections)).unwrap().len();
        assert_eq!(accounts.all, entries as u32, "{accounts:?}");
    }
    // Another start with the same limits stays where it is.
    lab.n1.close();
    lab.n1.open();
    assert!(flows.go_on() && pins(&lab.n1).contains(&format!("towpath-v{TP_ABI_VERSION}-2/")));
}

#[test]
fn connections_outlive_them_on_kernels_without_links() {
    if root() {
        over_to_ours(CLSACT, TP_ABI_VERSION + 1, true);
    }
}
