//! How large an image is, and what makes it grow: what `docs/policy.md` says under "What it costs".

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use towpath_model::labels::Requirement;
use towpath_model::{
    Labels, NamespacedName, NetworkPolicy, NodeName, Peer, Phase, Pod, PolicyPort, PolicyRule, PortMatch, Protocol,
    Selector, World,
};
use towpath_policy::check::check;
use towpath_policy::compile::{TooLarge, Touched};
use towpath_policy::{Compiler, View};

const GRACE: Duration = Duration::from_secs(5);
/// The default of `limits.setClasses`.
const SET_CLASSES: usize = 262_144;
/// Bytes of an entry of `tp_set_class` in the kernel (`BPF_F_NO_PREALLOC`): an element's head of 48, a key of 8, a value of 4, in a slab of 64.
const ENTRY: usize = 64;

/// So many labels come in all combinations, in a row; the others at random.
const FEW: usize = 5;

fn pod(name: String, node: &str, labels: Labels, ip: IpAddr) -> Pod {
    Pod {
        name: NamespacedName::new("default", name),
        uid: Default::default(),
        labels: labels.into(),
        daemon_set: None,
        node: Some(NodeName::new(node)),
        ips: vec![ip].into(),
        named_ports: Default::default(),
        host_ports: Default::default(),
        host_network: false,
        phase: Phase::Running,
        terminating: false,
        ready: true,
        socket_services: Default::default(),
        chosen: None,
        bandwidth: None,
    }
}

fn equals(key: &str, value: &str) -> Selector {
    Selector::of([Requirement::In(key.to_owned(), BTreeSet::from([value.to_owned()]))])
}

/// Selects the pods labelled `own=<index>`, and lets those in that `from` selects.
fn policy(name: String, own: usize, from: Selector) -> NetworkPolicy {
    NetworkPolicy {
        name: NamespacedName::new("default", name),
        pod_selector: equals("own", &own.to_string()),
        ingress: Some(vec![PolicyRule { peers: vec![Peer::Pods { namespaces: None, pods: from }], ports: Vec::new() }]),
        egress: None,
        enforcement: Default::default(),
    }
}

fn address(index: usize) -> IpAddr {
    IpAddr::from(u32::try_from(0x0a00_0000 + index).unwrap().to_be_bytes())
}

/// Whether the pods of a label set have a label: halves that have nothing to do with each other.
fn has(set: usize, label: usize) -> bool {
    if label < FEW {
        return (set >> label) & 1 == 1;
    }
    let mut mixed = (set * 131 + label + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^= mixed >> 29;
    (mixed.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) & 1 == 1
}

/// A node of `own` pods, each with a policy of its own, in a cluster of `sets` label sets of `replicas` pods; `labels` labels, each of which
/// half of the label sets have.
fn world(own: usize, labels: usize, sets: usize, replicas: usize, copies: usize) -> World {
    let mut pods: Vec<Pod> = (0..own)
        .map(|i| pod(format!("own{i}"), "n1", Labels::from([("own".to_owned(), i.to_string())]), address(i)))
        .collect();
    for index in 0..sets * replicas {
        let set = index % sets;
        let mut all: Labels =
            (0..labels).filter(|l| has(set, *l)).map(|l| (format!("l{l}"), "yes".to_owned())).collect();
        all.insert("set".to_owned(), set.to_string());
        pods.push(pod(format!("pod{index}"), "n2", all, address(0x1000 + index)));
    }
    let policies =
        (0..own * copies).map(|i| policy(format!("p{i}"), i % own, equals(&format!("l{}", i % own % labels), "yes")));
    World {
        pods: pods.into_iter().map(|p| (p.name.clone(), p)).collect(),
        policies: policies.map(|p| (p.name.clone(), p)).collect(),
        ..World::default()
    }
}

fn compile(compiler: &mut Compiler, world: &World) {
    compiler.follow(&View::of(world), &NodeName::new("n1"), Duration::ZERO, &Touched::everything()).unwrap();
}

/// Bytes of this process that are in memory. Tests have a process each.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn entries_grow_with_what_selectors_tell_apart_and_not_with_pods_or_policies() {
    let counts = |world: &World| {
        let mut compiler = Compiler::new(GRACE);
        compile(&mut compiler, world);
        compiler.counts()
    };
    let small = counts(&world(10, FEW, 96, 1, 1));
    // Five labels: 32 ways to have them, of which one says nothing to anybody. An allowed peer has four rows: TCP, UDP, SCTP, the rest.
    assert_eq!((small.sets, small.classes, small.rows), (10, 31, 10 * 4));
    assert_eq!(small.set_classes, 10 * 16, "a set sees the half of the classes that have its label");
    let more_pods = counts(&world(10, FEW, 96, 20, 1));
    assert_eq!(more_pods.addresses, 20 * small.addresses, "an entry a pod");
    assert_eq!(more_pods, towpath_policy::compile::Counts { addresses: more_pods.addresses, ..small });
    let more_policies = counts(&world(10, FEW, 96, 1, 30));
    assert_eq!(more_policies.policies, 300);
    assert_eq!(more_policies, towpath_policy::compile::Counts { policies: 300, ..small });
    let more_label_sets = counts(&world(10, FEW, 1920, 1, 1));
    assert_eq!(more_label_sets, towpath_policy::compile::Counts { addresses: more_label_sets.addresses, ..small });
}

#[test]
fn the_worst_case_is_as_large_as_it_is_said_to_be() {
    let (own, sets) = (110, 5000);
    let world = world(own, own, sets, 1, 1);
    let matches = (0..sets).map(|set| (0..own).filter(|l| has(set, *l)).count()).sum::<usize>();
    let before = resident();
    let mut compiler = Compiler::new(GRACE);
    compile(&mut compiler, &world);
    let grown = resident().saturating_sub(before);
    let counts = compiler.counts();
    assert_eq!((counts.sets, counts.classes, counts.rows), (own, sets, own * 4));
    assert_eq!(counts.set_classes, matches, "an entry for each set and class that it mentions");
    assert!(matches.abs_diff(275_000) < 2_000, "half of 110 × 5,000: {matches}");
    assert!(counts.set_classes > SET_CLASSES, "docs/policy.md says that the limit must be raised for this");
    assert!(counts.set_classes * ENTRY < 18 << 20, "18 MiB in the kernel");
    // Half of it are the labels of 5,000 label sets.
    assert!(grown < 80 << 20, "80 MiB in the agent: {grown}");
}

#[test]
fn a_pod_elsewhere_costs_the_compiler_less_than_300_bytes() {
    let world = world(10, FEW, 96, 500, 1);
    let compilers = [(); 4].map(|()| Compiler::new(GRACE));
    let mut after = Vec::new();
    // Those that come later find the memory again that the first two needed only while they compiled: trees are made again at the end of that, full.
    let compilers = compilers.map(|mut compiler| {
        compile(&mut compiler, &world);
        after.push(resident());
        compiler
    });
    let (pods, shown) = (world.pods.len(), compilers[0].counts().addresses);
    assert!(shown * 10 > pods * 9, "nearly all have an entry in the image: {shown} of {pods}");
    let each = (after[3] - after[1]) / (2 * pods);
    assert!((50..300).contains(&each), "{each} bytes for each of {pods} pods");
    println!("{each} bytes a pod");
}

/// One rule of so many blocks and so many ports, none next to another: a row for each of both.
fn product(name: &str, blocks: u32, ports: u16) -> NetworkPolicy {
    let block =
        |n| Peer::IpBlock { cidr: IpAddr::from(u32::to_be_bytes(0xc612_0000 + 2 * n)).into(), except: Vec::new() };
    let port = |n| PolicyPort { protocol: Protocol::Tcp, port: PortMatch::Range(2 * n + 1, 2 * n + 1) };
    let rule = PolicyRule { peers: (0..blocks).map(block).collect(), ports: (0..ports).map(port).collect() };
    NetworkPolicy { ingress: Some(vec![rule]), ..policy(name.to_owned(), 0, Selector::everything()) }
}

#[test]
fn what_is_too_large_is_given_up_before_it_costs_much_and_what_was_compiled_before_stays() {
    let mut world = world(2, FEW, 96, 1, 1);
    let node = NodeName::new("n1");
    let mut compiler = Compiler::new(GRACE);
    let mut now = Duration::ZERO;
    let mut follow = |compiler: &mut Compiler, world: &World| {
        now += Duration::from_secs(1);
        let mut touched = Touched::nothing();
        touched.policy(NamespacedName::new("default", "huge"));
        compiler.follow(&View::of(world), &node, now, &touched)
    };
    compile(&mut compiler, &world);
    let before = compiler.image().clone();
    let huge = product("huge", 10_000, 10_000);
    world.policies.insert(huge.name.clone(), huge.clone());
    let memory = resident();
    for _ in 0..2 {
        assert_eq!(follow(&mut compiler, &world), Err(TooLarge));
        assert_eq!(*compiler.image(), before, "the image is the one before");
    }
    let grown = resident().saturating_sub(memory);
    assert!(grown < 192 << 20, "100 million rows would take gigabytes: {} MiB", grown >> 20);
    // A smaller one is taken, as after a restart: what the kernel holds keeps its meaning.
    let smaller = product("huge", 100, 10);
    world.policies.insert(smaller.name.clone(), smaller);
    follow(&mut compiler, &world).unwrap();
    let after = compiler.image().clone();
    check(&View::of(&world), &node, &after).unwrap();
    let sets =
        |image: &towpath_model::desired::PolicyImage| image.pods.values().map(|s| s.ingress).collect::<BTreeSet<_>>();
    assert!(sets(&before).is_disjoint(&sets(&after)), "numbers that the kernel holds are not given to others");
    assert!(
        before.rows.iter().all(|(key, row)| after.rows.get(key) == Some(row)),
        "the rows of sets that pods still have stay"
    );
    world.policies.remove(&huge.name);
    follow(&mut compiler, &world).unwrap();
    check(&View::of(&world), &node, compiler.image()).unwrap();
}
