//! From one image to the next: ids keep their meaning, and a kernel caught between two images judges by one of them.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

mod cluster;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use proptest::prelude::*;
use towpath_model::desired::{ClassId, PolicyImage, Verdict};
use towpath_model::{Direction, NodeName};
use towpath_policy::compile::UsedIds;
use towpath_policy::{Compiler, View, image};

use cluster::{PodSpec, Spec, addresses, dns, services, spec, world};

const GRACE: Duration = Duration::from_secs(5);

/// A change of a cluster.
#[derive(Clone, Debug)]
enum Change {
    Policy(usize, serde_json::Value),
    DropPolicy(usize),
    ClusterPolicy(usize, serde_json::Value),
    DropClusterPolicy(usize),
    /// The policy of that number, of both kinds together, is only audited from now on, or is enforced again.
    Audit(usize),
    Pod(usize, PodSpec),
    Namespace(usize, BTreeMap<String, String>),
    /// What DNS has said of names.
    Names(u16),
    /// Nothing but time.
    Wait,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (0usize..7, cluster::policy()).prop_map(|(i, p)| Change::Policy(i, p)),
        2 => (0usize..7).prop_map(Change::DropPolicy),
        4 => (0usize..6, cluster::cluster_policy()).prop_map(|(i, p)| Change::ClusterPolicy(i, p)),
        2 => (0usize..6).prop_map(Change::DropClusterPolicy),
        3 => (0usize..12).prop_map(Change::Audit),
        3 => (0usize..8, cluster::pod()).prop_map(|(i, p)| Change::Pod(i, p)),
        1 => (0usize..3, cluster::labels()).prop_map(|(i, l)| Change::Namespace(i, l)),
        3 => (0..1u16 << cluster::NAMES.len()).prop_map(Change::Names),
        1 => Just(Change::Wait),
    ]
}

fn apply(spec: &mut Spec, change: &Change) {
    match change {
        Change::Policy(index, policy) if *index < spec.policies.len() => spec.policies[*index] = policy.clone(),
        Change::Policy(_, policy) => spec.policies.push(policy.clone()),
        Change::DropPolicy(index) => {
            if *index < spec.policies.len() {
                spec.policies.remove(*index);
            }
        }
        Change::ClusterPolicy(index, policy) if *index < spec.cluster_policies.len() => {
            spec.cluster_policies[*index] = policy.clone();
        }
        Change::ClusterPolicy(_, policy) => spec.cluster_policies.push(policy.clone()),
        Change::DropClusterPolicy(index) => {
            if *index < spec.cluster_policies.len() {
                spec.cluster_policies.remove(*index);
            }
        }
        Change::Audit(index) => {
            let policy = spec.policies.iter_mut().chain(&mut spec.cluster_policies).nth(*index);
            policy.into_iter().for_each(cluster::audit_or_not);
        }
        Change::Pod(index, pod) => {
            let index = index % spec.pods.len();
            spec.pods[index] = pod.clone();
        }
        Change::Namespace(index, labels) => spec.namespaces[*index] = labels.clone(),
        Change::Names(said) => spec.names = *said,
        Change::Wait => {}
    }
}

/// What both images must say of an id for it to mean the same.
fn ids_keep_their_meaning(before: &PolicyImage, after: &PolicyImage) -> Result<(), TestCaseError> {
    for (key, row) in &before.rows {
        prop_assert!(after.rows.get(key).is_none_or(|r| r == row), "a row changed in place: {:?}", key);
    }
    for (key, local) in &before.set_classes {
        prop_assert!(after.set_classes.get(key).is_none_or(|l| l == local), "a class changed for a set: {:?}", key);
    }
    for (id, rule) in &before.rules {
        prop_assert!(after.rules.get(id).is_none_or(|r| r == rule), "a rule id changed its meaning: {:?}", id);
    }
    for (id, policies) in &before.isolating {
        prop_assert!(after.isolating.get(id).is_none_or(|p| p == policies), "a set changed its meaning: {:?}", id);
    }
    Ok(())
}

type Write = Box<dyn Fn(&mut PolicyImage)>;

/// The kernel's maps while an image is applied in the order that the compiler's documentation gives.
struct Kernel {
    maps: PolicyImage,
}

impl Kernel {
    /// Every single write, as a list of closures in order.
    fn writes(before: &PolicyImage, after: &PolicyImage) -> Vec<Write> {
        let mut writes: Vec<Write> = Vec::new();
        let (rows, classes) = (after.rows.clone(), after.set_classes.clone());
        writes.push(Box::new(move |m| {
            m.rows.extend(rows.clone());
            m.set_classes.extend(classes.clone());
        }));
        for (ip, class) in after.pod_classes.clone() {
            writes.push(Box::new(move |m| {
                m.pod_classes.insert(ip, class);
            }));
        }
        let mut cut: Vec<_> = after.cidr_classes.clone().into_iter().collect();
        cut.sort_by_key(|(net, _)| Reverse(net.prefix_len()));
        for (net, class) in cut {
            writes.push(Box::new(move |m| {
                m.cidr_classes.insert(net, class);
            }));
        }
        let gone = before.cidr_classes.keys().copied().filter(|net| !after.cidr_classes.contains_key(net));
        let mut gone: Vec<_> = gone.collect();
        gone.sort_by_key(IpNet::prefix_len);
        for net in gone {
            writes.push(Box::new(move |m| {
                m.cidr_classes.remove(&net);
            }));
        }
        for ip in before.pod_classes.keys().copied().filter(|ip| !after.pod_classes.contains_key(ip)) {
            writes.push(Box::new(move |m| {
                m.pod_classes.remove(&ip);
            }));
        }
        for (ip, sets) in after.pods.clone() {
            writes.push(Box::new(move |m| {
                m.pods.insert(ip, sets);
            }));
        }
        let last = after.clone();
        writes.push(Box::new(move |m| *m = last.clone()));
        writes
    }
}

type Verdicts = BTreeMap<(IpAddr, Direction, IpAddr, usize), Verdict>;

fn verdicts(maps: &PolicyImage, pods: &BTreeSet<IpAddr>, peers: &[IpAddr]) -> Verdicts {
    let mut all = Verdicts::new();
    // A few services suffice: what can go wrong here are classes and sets, not port borders.
    let services: Vec<_> = services().into_iter().enumerate().filter(|(i, _)| i % 4 == 1 || *i == 21).collect();
    for pod in pods {
        // A pod's traffic to itself is not judged. (Were it, a new pod at an address would change both ends at once.)
        for peer in peers.iter().filter(|p| p.is_ipv4() == pod.is_ipv4() && *p != pod) {
            for (index, (protocol, _, port)) in &services {
                for direction in [Direction::Ingress, Direction::Egress] {
                    let (verdict, _) = image::judge_pod(maps, *pod, direction, *peer, *protocol, *port);
                    all.insert((*pod, direction, *peer, *index), verdict);
                }
            }
        }
    }
    all
}

fn compile(compiler: &mut Compiler, spec: &Spec, now: Duration) -> PolicyImage {
    let (dns, given, world) = (dns(), BTreeMap::new(), world(&spec.objects()));
    let learned = cluster::learned(&cluster::names(spec, &world));
    let view = View { world: &world, dns: &dns, pod_ips: &given, names: &learned };
    compiler.compile(&view, &NodeName::new("m0"), now).unwrap()
}

/// Classes of pods and blocks among sixteen addresses, and nothing else.
fn classes() -> impl Strategy<Value = PolicyImage> {
    let class = || (1u32..5).prop_map(ClassId);
    let pods = prop::collection::btree_map((0u8..16).prop_map(|last| IpAddr::from([10, 0, 0, last])), class(), 0..8);
    let block = (0u8..16, 28u8..=32)
        .prop_map(|(last, length)| IpNet::new(IpAddr::from([10, 0, 0, last]), length).unwrap().trunc());
    let blocks = prop::collection::btree_map(block, class(), 0..8);
    (pods, blocks).prop_map(|(pod_classes, cidr_classes)| PolicyImage {
        pod_classes,
        cidr_classes,
        ..PolicyImage::default()
    })
}

fn without_retired(image: &PolicyImage) -> usize {
    image.pods.values().flat_map(|s| s.all()).filter(|s| s.0 != 0).collect::<BTreeSet<_>>().len()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn between_two_images_every_verdict_is_of_one_of_them(
        mut spec in spec(),
        changes in prop::collection::vec((change(), 0u64..4), 1..6),
    ) {
        let mut compiler = Compiler::new(GRACE);
        let mut now = Duration::ZERO;
        let mut kernel = Kernel { maps: compile(&mut compiler, &spec, now) };
        for (change, seconds) in &changes {
            let mut peers = addresses(&spec);
            apply(&mut spec, change);
            peers.extend(addresses(&spec));
            peers.sort();
            peers.dedup();
            now += Duration::from_secs(*seconds);
            let before = kernel.maps.clone();
            let after = compile(&mut compiler, &spec, now);
            ids_keep_their_meaning(&before, &after)?;
            let pods: BTreeSet<IpAddr> = before.pods.keys().filter(|ip| after.pods.contains_key(ip)).copied().collect();
            let (old, new) = (verdicts(&before, &pods, &peers), verdicts(&after, &pods, &peers));
            let fresh = compile(&mut Compiler::new(GRACE), &spec, now);
            prop_assert_eq!(&new, &verdicts(&fresh, &pods, &peers), "what was before shows in the verdicts");
            for (step, write) in Kernel::writes(&before, &after).iter().enumerate() {
                write(&mut kernel.maps);
                for (flow, verdict) in verdicts(&kernel.maps, &pods, &peers) {
                    prop_assert!(verdict == old[&flow] || verdict == new[&flow], "step {}: {:?}: {:?}", step, flow, verdict);
                }
            }
        }
    }

    /// An agent that starts again, with nothing of what the one before it knew but the kernel's maps, while the cluster changed or not.
    #[test]
    fn between_what_a_kernel_holds_and_the_first_image_of_another_run_every_verdict_is_of_one_of_them(
        mut spec in spec(), before in change(), meanwhile in prop::option::of(change()), later in change(),
    ) {
        let mut first = Compiler::new(GRACE);
        compile(&mut first, &spec, Duration::ZERO);
        apply(&mut spec, &before);
        let mut kernel = Kernel { maps: compile(&mut first, &spec, Duration::from_secs(1)) };
        kernel.maps.isolating.clear();
        let held = kernel.maps.clone();
        let mut used = UsedIds {
            sets: held.rows.keys().map(|row| row.set).chain(held.set_classes.keys().map(|(set, _)| *set)).collect(),
            classes: held.pod_classes.values().chain(held.cidr_classes.values()).copied().collect(),
            rules: held.rows.values().map(|row| row.rule).collect(),
            held,
        };
        used.sets.extend(used.held.pods.values().flat_map(|sets| sets.all()));
        used.classes.extend(used.held.set_classes.keys().map(|(_, class)| *class));
        let mut second = Compiler::resume(GRACE, &used, Duration::ZERO);
        let mut peers = addresses(&spec);
        for (change, now) in [(meanwhile, 0), (Some(later), 1), (Some(Change::Wait), 6)] {
            change.iter().for_each(|change| apply(&mut spec, change));
            peers.extend(addresses(&spec));
            peers.sort();
            peers.dedup();
            let before = kernel.maps.clone();
            let after = compile(&mut second, &spec, Duration::from_secs(now));
            ids_keep_their_meaning(&before, &after)?;
            let pods: BTreeSet<IpAddr> = before.pods.keys().filter(|ip| after.pods.contains_key(ip)).copied().collect();
            let (old, new) = (verdicts(&before, &pods, &peers), verdicts(&after, &pods, &peers));
            let fresh = compile(&mut Compiler::new(GRACE), &spec, Duration::ZERO);
            prop_assert_eq!(&new, &verdicts(&fresh, &pods, &peers), "what was before shows in the verdicts");
            for (step, write) in Kernel::writes(&before, &after).iter().enumerate() {
                write(&mut kernel.maps);
                for (flow, verdict) in verdicts(&kernel.maps, &pods, &peers) {
                    prop_assert!(verdict == old[&flow] || verdict == new[&flow], "step {}: {:?}: {:?}", step, flow, verdict);
                }
            }
            if now == 6 {
                prop_assert_eq!(second.next_expiry(), None);
                prop_assert_eq!(after.rows.len(), fresh.rows.len());
                prop_assert_eq!(after.set_classes.len(), fresh.set_classes.len());
                prop_assert_eq!(after.pod_classes.len(), fresh.pod_classes.len());
                prop_assert_eq!(after.cidr_classes.len(), fresh.cidr_classes.len());
            }
        }
    }

    /// Whatever pods and blocks come and go at once, a node's range and its gateway among them.
    #[test]
    fn every_address_goes_from_its_class_before_to_that_after_in_one_step(before in classes(), after in classes()) {
        let addresses: Vec<IpAddr> = (0..16).map(|last| IpAddr::from([10, 0, 0, last])).collect();
        let of = |maps: &PolicyImage| addresses.iter().map(|ip| image::class_of(maps, *ip)).collect::<Vec<_>>();
        let mut maps = before.clone();
        let mut is = of(&maps);
        for (step, write) in Kernel::writes(&before, &after).iter().enumerate() {
            write(&mut maps);
            let now = of(&maps);
            for (index, address) in addresses.iter().enumerate() {
                let goes_on = now[index] == is[index] || now[index] == of(&after)[index];
                prop_assert!(goes_on, "step {}: {} from {:?} to {:?}", step, address, is[index], now[index]);
            }
            is = now;
        }
    }

    #[test]
    fn compiling_again_changes_nothing_and_after_the_grace_only_what_is_used_remains(
        mut spec in spec(), change in change()
    ) {
        let mut compiler = Compiler::new(GRACE);
        compile(&mut compiler, &spec, Duration::ZERO);
        apply(&mut spec, &change);
        let image = compile(&mut compiler, &spec, Duration::from_secs(1));
        prop_assert_eq!(&image, &compile(&mut compiler, &spec, Duration::from_secs(2)));
        let expiry = compiler.next_expiry().unwrap_or(Duration::from_secs(6));
        prop_assert_eq!(expiry, Duration::from_secs(6));
        let later = compile(&mut compiler, &spec, expiry);
        prop_assert_eq!(later.isolating.len(), without_retired(&later));
        prop_assert_eq!(compiler.next_expiry(), None);
        let fresh = compile(&mut Compiler::new(GRACE), &spec, Duration::ZERO);
        prop_assert_eq!(later.rows.len(), fresh.rows.len());
        prop_assert_eq!(later.pod_classes.len(), fresh.pod_classes.len());
        prop_assert_eq!(later.cidr_classes.len(), fresh.cidr_classes.len());
    }
}

fn plain_pod() -> PodSpec {
    PodSpec {
        namespace: 0,
        node: 0,
        kind: cluster::Kind::Plain,
        labels: BTreeMap::new(),
        families: (true, false),
        ports: BTreeMap::new(),
    }
}

/// Everybody but one name is denied, and DNS now says that the name is a pod's address: at no moment is that pod allowed.
#[test]
fn a_name_of_a_pods_address_is_never_the_pods() {
    let policy = |priority: u8, action: &str, to: &[serde_json::Value]| {
        serde_json::json!({"metadata": {}, "spec": {"tier": "Admin", "priority": priority,
            "subject": {"namespaces": {}}, "egress": [{"action": action, "to": to}]}})
    };
    let mut spec = Spec {
        namespaces: vec![BTreeMap::new(); cluster::NAMESPACES.len()],
        pods: vec![plain_pod(), plain_pod()],
        policies: Vec::new(),
        cluster_policies: vec![
            policy(0, "Accept", &[serde_json::json!({"domainNames": ["*.example.com"]})]),
            policy(1, "Deny", &[serde_json::json!({"networks": ["0.0.0.0/0"]}), serde_json::json!({"namespaces": {}})]),
        ],
        names: 0,
    };
    let (number, (_, address)) =
        cluster::NAMES.iter().enumerate().find(|(_, (_, address))| *address == "10.0.0.0").unwrap();
    let hostile: IpAddr = address.parse().unwrap();
    let mut compiler = Compiler::new(GRACE);
    let mut kernel = Kernel { maps: compile(&mut compiler, &spec, Duration::ZERO) };
    spec.names = 1 << number;
    let before = kernel.maps.clone();
    let after = compile(&mut compiler, &spec, Duration::from_secs(1));
    assert!(after.pods.contains_key(&hostile) && after.cidr_classes.contains_key(&hostile.into()));
    let victim = *after.pods.keys().find(|pod| **pod != hostile).unwrap();
    let tcp = towpath_model::desired::RowProtocol::Ports(towpath_model::Protocol::Tcp);
    for (step, write) in Kernel::writes(&before, &after).iter().enumerate() {
        write(&mut kernel.maps);
        let (verdict, _) = image::judge_pod(&kernel.maps, victim, Direction::Egress, hostile, tcp, 443);
        assert_eq!(verdict, Verdict::Deny, "step {step}");
    }
}

/// Denied as a node before, as an address after: at no moment is it neither.
#[test]
fn nodes_are_nodes_to_a_set_until_no_pod_has_it() {
    let policy = |to: serde_json::Value| {
        serde_json::json!({"metadata": {}, "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
            "egress": [{"action": "Deny", "to": [to]}]}})
    };
    let mut spec = Spec {
        namespaces: vec![BTreeMap::new(); cluster::NAMESPACES.len()],
        pods: vec![plain_pod()],
        policies: Vec::new(),
        cluster_policies: vec![policy(serde_json::json!({"nodes": {}}))],
        names: 0,
    };
    let mut compiler = Compiler::new(GRACE);
    let mut kernel = Kernel { maps: compile(&mut compiler, &spec, Duration::ZERO) };
    spec.cluster_policies = vec![policy(serde_json::json!({"networks": ["0.0.0.0/0"]}))];
    let before = kernel.maps.clone();
    let after = compile(&mut compiler, &spec, Duration::from_secs(1));
    let (pod, node): (IpAddr, IpAddr) = ("10.0.0.0".parse().unwrap(), "10.9.0.2".parse().unwrap());
    let protocol = towpath_model::desired::RowProtocol::Other;
    let denied =
        |maps: &PolicyImage| image::judge_pod(maps, pod, Direction::Egress, node, protocol, 0).0 == Verdict::Deny;
    assert!(denied(&before) && denied(&after));
    for (step, write) in Kernel::writes(&before, &after).iter().enumerate() {
        write(&mut kernel.maps);
        assert!(denied(&kernel.maps), "step {step}");
    }
}
