//! What a translation check keeps that random clusters hardly reach: addresses that are nobody's any more, and strangers where there were none.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use towpath_model::desired::{
    ClassId, LocalClass, PolicyChanges, PolicyImage, Row, RowKey, RowProtocol, RuleId, Verdict,
};
use towpath_model::labels::Requirement;
use towpath_model::{
    Action, ClusterNetworkPolicy, ClusterPeer, ClusterRule, Labels, NamedPort, Namespace, NamespacedName,
    NetworkPolicy, NodeName, Peer, Phase, Pod, PolicyPort, PolicyRule, PortMatch, Protocol, Selector, Subject, Tier,
    World,
};
use towpath_policy::check::{Checker, Mismatch, check};
use towpath_policy::compile::Touched;
use towpath_policy::{Compiler, View};

const OWN: &str = "10.0.0.1";
const OTHER: &str = "10.0.1.5";

fn node() -> NodeName {
    NodeName::new("n1")
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pod(name: &str, node: &str, address: &str) -> Pod {
    Pod {
        name: NamespacedName::new("default", name),
        uid: Default::default(),
        labels: Labels::from([("app".to_owned(), name.to_owned())]).into(),
        daemon_set: None,
        node: Some(NodeName::new(node)),
        ips: vec![ip(address)].into(),
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

/// A pod of the node that lets in whom `from` names, and another pod elsewhere.
fn world(from: Peer) -> World {
    let app = |name: &str| Selector::of([Requirement::In("app".to_owned(), BTreeSet::from([name.to_owned()]))]);
    let policy = NetworkPolicy {
        name: NamespacedName::new("default", "some"),
        pod_selector: app("own"),
        ingress: Some(vec![PolicyRule { peers: vec![from], ports: Vec::new() }]),
        egress: None,
        enforcement: Default::default(),
    };
    let pods = [pod("own", "n1", OWN), pod("other", "n2", OTHER)];
    World {
        pods: pods.into_iter().map(|pod| (pod.name.clone(), pod)).collect(),
        policies: BTreeMap::from([(policy.name.clone(), policy)]),
        ..World::default()
    }
}

fn compiled(world: &World) -> PolicyImage {
    Compiler::new(Duration::ZERO).compile(&View::of(world), &node(), Duration::ZERO).unwrap()
}

/// As compiled, but that the other pod has an entry of its own, which says what that of its block says.
fn with_own_entry(world: &World) -> PolicyImage {
    let mut image = compiled(world);
    let class = *image.cidr_classes.values().next().unwrap();
    image.pod_classes.insert(ip(OTHER), class);
    image
}

/// A checker that has seen this pass.
fn after(world: &World, image: &PolicyImage) -> Checker {
    let mut checker = Checker::new(node());
    assert!(checker.check(&View::of(world), image).unwrap().anew);
    checker
}

#[test]
fn an_address_that_is_nobodys_any_more_is_an_address_still() {
    let mut world = world(Peer::IpBlock { cidr: format!("{OTHER}/32").parse().unwrap(), except: Vec::new() });
    let before = with_own_entry(&world);
    let mut checker = after(&world, &before);
    let name = NamespacedName::new("default", "other");
    world.pods.remove(&name);
    let mut touched = Touched::nothing();
    touched.pod(name);
    // The pod's entry goes, and the block's with it.
    let told = PolicyChanges {
        pod_classes: BTreeMap::from([(ip(OTHER), None)]),
        cidr_classes: before.cidr_classes.keys().map(|prefix| (*prefix, None)).collect(),
        pods: before.pods.clone(),
        ..PolicyChanges::default()
    };
    let said = checker.follow(&View::of(&world), &before, Some(&told), &touched).unwrap_err();
    let Mismatch::Flow { flow, image, .. } = &*said else { panic!("{said}") };
    assert_eq!((flow.source, *image), (ip(OTHER), Verdict::Deny), "{said}");
}

#[test]
fn an_address_that_was_all_of_its_block_is_compared_when_it_is_free() {
    // As above; but the entry of the block was wrong before, when nobody's address was in it.
    let mut world = world(Peer::IpBlock { cidr: format!("{OTHER}/32").parse().unwrap(), except: Vec::new() });
    let mut before = with_own_entry(&world);
    before.cidr_classes.clear();
    let mut checker = after(&world, &before);
    let name = NamespacedName::new("default", "other");
    world.pods.remove(&name);
    let mut touched = Touched::nothing();
    touched.pod(name);
    let told = PolicyChanges {
        pod_classes: BTreeMap::from([(ip(OTHER), None)]),
        pods: before.pods.clone(),
        ..PolicyChanges::default()
    };
    let said = checker.follow(&View::of(&world), &before, Some(&told), &touched).unwrap_err();
    let Mismatch::Flow { flow, image, .. } = &*said else { panic!("{said}") };
    assert_eq!((flow.source, *image), (ip(OTHER), Verdict::Deny), "{said}");
}

#[test]
fn a_block_of_one_address_that_somebody_took_says_nothing_of_anybody() {
    let mut world = world(Peer::IpBlock { cidr: format!("{OTHER}/32").parse().unwrap(), except: Vec::new() });
    let name = NamespacedName::new("default", "other");
    let other = world.pods.remove(&name).unwrap();
    let image = with_own_entry(&world);
    let class = image.pod_classes[&ip(OTHER)];
    let mut before = image.clone();
    before.pod_classes.clear();
    let mut checker = after(&world, &before);
    world.pods.insert(name.clone(), other);
    let mut touched = Touched::nothing();
    touched.pod(name);
    let entry = BTreeMap::from([(ip(OTHER), Some(class))]);
    let told = PolicyChanges { pod_classes: entry, pods: image.pods.clone(), ..PolicyChanges::default() };
    assert!(checker.follow(&View::of(&world), &image, Some(&told), &touched).is_ok());
    // Whoever is there has an entry of his own: the block's may go.
    let cidr_classes = image.cidr_classes.keys().map(|prefix| (*prefix, None)).collect();
    let told = PolicyChanges { cidr_classes, pods: image.pods.clone(), ..PolicyChanges::default() };
    let checked = checker.follow(&View::of(&world), &image, Some(&told), &Touched::nothing());
    assert!(checked.is_ok(), "{}", checked.unwrap_err());
}

#[test]
fn the_first_stranger_to_a_set_is_compared_when_he_comes() {
    let world = world(Peer::Pods {
        namespaces: None,
        pods: Selector::of([Requirement::In("app".to_owned(), BTreeSet::from(["friend".to_owned()]))]),
    });
    let mut image = compiled(&world);
    // The set knows every class there is, as one that is denied; whom it does not know it lets in.
    let set = image.pods[&ip(OWN)].ingress;
    let classes: BTreeSet<ClassId> =
        image.pod_classes.values().chain(image.cidr_classes.values()).copied().chain([ClassId(0)]).collect();
    for class in classes {
        image.set_classes.entry((set, class)).or_insert(LocalClass(77));
    }
    let open = RowKey { set, class: LocalClass(0), protocol: RowProtocol::Other, port: 0, port_bits: 0 };
    image.rows.insert(open, Row { verdict: Verdict::Allow, rule: RuleId::NOT_ISOLATED });
    let mut checker = after(&world, &image);
    let told = PolicyChanges {
        pod_classes: BTreeMap::from([(ip(OTHER), Some(ClassId(4711)))]),
        pods: image.pods.clone(),
        ..PolicyChanges::default()
    };
    image.pod_classes.insert(ip(OTHER), ClassId(4711));
    let anew = check(&View::of(&world), &node(), &image).unwrap_err();
    let said = checker.follow(&View::of(&world), &image, Some(&told), &Touched::nothing()).unwrap_err();
    assert_eq!(said, anew);
}

#[test]
fn what_is_said_of_a_kind_is_compared_again_when_somebody_is_of_it_again() {
    let mut world = world(Peer::Pods {
        namespaces: None,
        pods: Selector::of([Requirement::In("app".to_owned(), BTreeSet::from(["other".to_owned()]))]),
    });
    let image = compiled(&world);
    let mut checker = after(&world, &image);
    let (set, class) = (image.pods[&ip(OWN)].ingress, image.pod_classes[&ip(OTHER)]);
    assert!(image.set_classes.contains_key(&(set, class)));
    let name = NamespacedName::new("default", "other");
    let pods = || image.pods.clone();
    let mut touched = Touched::nothing();
    touched.pod(name.clone());
    let other = world.pods.remove(&name).unwrap();
    let gone = BTreeMap::from([(ip(OTHER), None)]);
    let told = PolicyChanges { pod_classes: gone, pods: pods(), ..PolicyChanges::default() };
    assert!(checker.follow(&View::of(&world), &image, Some(&told), &touched).is_ok());
    // Nobody is of the class, so that nothing is wrong yet.
    let forgotten = BTreeMap::from([((set, class), None)]);
    let told = PolicyChanges { set_classes: forgotten, pods: pods(), ..PolicyChanges::default() };
    assert!(checker.follow(&View::of(&world), &image, Some(&told), &Touched::nothing()).is_ok());
    world.pods.insert(name, other);
    let back = BTreeMap::from([(ip(OTHER), Some(class))]);
    let told = PolicyChanges { pod_classes: back, pods: pods(), ..PolicyChanges::default() };
    let said = checker.follow(&View::of(&world), &image, Some(&told), &touched).unwrap_err();
    let Mismatch::Flow { flow, image, .. } = &*said else { panic!("{said}") };
    assert_eq!((flow.source, *image), (ip(OTHER), Verdict::Deny), "{said}");
}

#[test]
fn a_namespace_whose_labels_make_its_pods_subjects_has_them_asked_again() {
    let mut world = world(Peer::Pods { namespaces: None, pods: Selector::everything() });
    let wanted = Requirement::In("guarded".to_owned(), BTreeSet::from(["yes".to_owned()]));
    let guard = ClusterNetworkPolicy {
        name: "guard".to_owned(),
        tier: Tier::Admin,
        priority: 1,
        subject: Subject { namespaces: Selector::of([wanted]), pods: Selector::everything() },
        ingress: vec![ClusterRule {
            name: String::new(),
            action: Action::Deny,
            peers: vec![ClusterPeer::Pods(Subject {
                namespaces: Selector::everything(),
                pods: Selector::everything(),
            })],
            protocols: Vec::new(),
        }],
        egress: Vec::new(),
        enforcement: Default::default(),
    };
    world.cluster_policies.insert(guard.name.clone(), guard);
    let image = compiled(&world);
    let mut checker = after(&world, &image);
    let labels = Labels::from([("guarded".to_owned(), "yes".to_owned())]);
    let namespace = Namespace {
        name: "default".to_owned(),
        labels,
        socket_services: Default::default(),
        pods_choose: false,
        terminating: false,
    };
    world.namespaces.insert("default".to_owned(), namespace);
    let mut touched = Touched::nothing();
    touched.namespace("default".to_owned());
    // A compiler that does not see it tells the kernel nothing.
    let told = PolicyChanges { pods: image.pods.clone(), ..PolicyChanges::default() };
    let said = checker.follow(&View::of(&world), &image, Some(&told), &touched).unwrap_err();
    assert!(matches!(&*said, Mismatch::Flow { image: Verdict::Allow, .. }), "{said}");
}

#[test]
fn names_of_ports_that_are_asked_for_later_are_each_ones_own() {
    let mut world = world(Peer::Pods { namespaces: None, pods: Selector::everything() });
    // Two pods that nothing tells apart, until somebody asks for the port that only one names.
    let mut twin = pod("other2", "n2", "10.0.1.4");
    twin.labels = Labels::from([("app".to_owned(), "other".to_owned())]).into();
    let http = NamedPort { name: "http".to_owned(), protocol: Protocol::Tcp, number: 8080 };
    twin.named_ports = vec![http].into();
    world.pods.insert(twin.name.clone(), twin);
    let mut compiler = Compiler::new(Duration::ZERO);
    let mut checker = Checker::new(node());
    let mut follow = |world: &World, touched: &Touched| {
        compiler.follow(&View::of(world), &node(), Duration::ZERO, touched).unwrap();
        checker.follow(&View::of(world), compiler.image(), compiler.changes(), touched).map_err(|e| e.to_string())
    };
    assert!(follow(&world, &Touched::everything()).is_ok());
    let name = NamespacedName::new("default", "some");
    let policy = world.policies.get_mut(&name).unwrap();
    let ports = vec![PolicyPort { protocol: Protocol::Tcp, port: PortMatch::Named("http".to_owned()) }];
    policy.egress = Some(vec![PolicyRule { peers: Vec::new(), ports }]);
    let mut touched = Touched::nothing();
    touched.policy(name);
    assert_eq!(follow(&world, &touched).map(|checked| checked.anew), Ok(false));
}

#[test]
fn what_is_left_behind_is_bounded() {
    let mut world = world(Peer::Pods { namespaces: None, pods: Selector::everything() });
    let mut compiler = Compiler::new(Duration::ZERO);
    let mut checker = Checker::new(node());
    let name = NamespacedName::new("default", "other");
    let (mut anew, mut last) = (0, 0);
    for round in 0..10_000 {
        // A label of its own each time, as a Job's pods have: a face that nobody has again.
        world.pods.get_mut(&name).unwrap().labels.insert("job".to_owned(), round.to_string());
        let mut touched = Touched::nothing();
        touched.pod(name.clone());
        compiler.follow(&View::of(&world), &node(), Duration::ZERO, &touched).unwrap();
        let checked = checker.follow(&View::of(&world), compiler.image(), compiler.changes(), &touched).unwrap();
        if checked.anew {
            (anew, last) = (anew + 1, round);
        }
    }
    assert!((2..=4).contains(&anew) && last > 1000, "read anew {anew} times, the last time in round {last}");
}
