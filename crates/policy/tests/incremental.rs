//! What a compiler makes of a change is what one makes that looks at everything: the same image, with the same ids. And a translation
//! check that keeps what it read finds what one finds that reads everything anew: nothing; or, if the compiler misses the change, has an entry
//! wrong or does not tell one to the kernel, that.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

mod cluster;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::Index;
use towpath_model::desired::{PolicyChanges, PolicyImage};
use towpath_model::{NamespacedName, NodeName, World};
use towpath_policy::check::{Checker, check};
use towpath_policy::compile::{Touched, UsedIds};
use towpath_policy::names::{Learned, Limits};
use towpath_policy::{Compiler, View};

use cluster::{PodSpec, Spec, dns, spec, world};

const GRACE: Duration = Duration::from_secs(5);

type Given = BTreeMap<NamespacedName, Vec<IpAddr>>;

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
    /// Its labels only.
    Label(usize, BTreeMap<String, String>),
    NewPod(PodSpec),
    /// The last one.
    DropPod,
    Namespace(usize, BTreeMap<String, String>),
    /// The node says that it gave a pod an address, which may be another pod's, a node's or that of DNS; or nothing any more.
    Given(usize, Option<IpAddr>),
    /// A name of a pod that nothing happened to.
    Rumour(usize),
    /// What DNS has said of names.
    Names(u16),
    /// Nothing but time.
    Wait,
}

fn given() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        3 => (0u8..9).prop_map(|number| IpAddr::from([10, 0, number % 2, number])),
        1 => prop::sample::select(vec!["10.9.0.1", "192.0.2.70", "198.51.100.70", cluster::DNS[0]])
            .prop_map(|text| text.parse().unwrap()),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => (0usize..7, cluster::policy()).prop_map(|(i, p)| Change::Policy(i, p)),
        2 => (0usize..7).prop_map(Change::DropPolicy),
        2 => (0usize..6, cluster::cluster_policy()).prop_map(|(i, p)| Change::ClusterPolicy(i, p)),
        2 => (0usize..6).prop_map(Change::DropClusterPolicy),
        3 => (0usize..12).prop_map(Change::Audit),
        4 => (0usize..8, cluster::pod()).prop_map(|(i, p)| Change::Pod(i, p)),
        5 => (0usize..8, cluster::labels()).prop_map(|(i, l)| Change::Label(i, l)),
        2 => cluster::pod().prop_map(Change::NewPod),
        2 => Just(Change::DropPod),
        2 => (0usize..3, cluster::labels()).prop_map(|(i, l)| Change::Namespace(i, l)),
        2 => (0usize..8, prop::option::of(given())).prop_map(|(i, n)| Change::Given(i, n)),
        1 => (0usize..8).prop_map(Change::Rumour),
        3 => (0..1u16 << cluster::NAMES.len()).prop_map(Change::Names),
        2 => Just(Change::Wait),
    ]
}

/// Pods that nothing happened to and that are said to have changed.
fn apply(spec: &mut Spec, given: &mut Given, change: &Change) -> Vec<NamespacedName> {
    let name = |spec: &Spec, index: usize| {
        let index = index % spec.pods.len();
        cluster::named(cluster::NAMESPACES[spec.pods[index].namespace], &format!("p{index}"))
    };
    match change {
        Change::Policy(index, policy) if *index < spec.policies.len() => spec.policies[*index] = policy.clone(),
        Change::Policy(_, policy) => spec.policies.push(policy.clone()),
        Change::DropPolicy(index) if *index < spec.policies.len() => drop(spec.policies.remove(*index)),
        Change::ClusterPolicy(index, policy) if *index < spec.cluster_policies.len() => {
            spec.cluster_policies[*index] = policy.clone();
        }
        Change::ClusterPolicy(_, policy) => spec.cluster_policies.push(policy.clone()),
        Change::DropClusterPolicy(index) if *index < spec.cluster_policies.len() => {
            spec.cluster_policies.remove(*index);
        }
        Change::Audit(index) => {
            let policy = spec.policies.iter_mut().chain(&mut spec.cluster_policies).nth(*index);
            policy.into_iter().for_each(cluster::audit_or_not);
        }
        Change::Pod(index, pod) => {
            let index = index % spec.pods.len();
            spec.pods[index] = pod.clone();
        }
        Change::Label(index, labels) => {
            let index = index % spec.pods.len();
            spec.pods[index].labels = labels.clone();
        }
        Change::NewPod(pod) => spec.pods.push(pod.clone()),
        Change::DropPod if spec.pods.len() > 1 => drop(spec.pods.pop()),
        Change::Namespace(index, labels) => spec.namespaces[*index] = labels.clone(),
        Change::Given(index, None) => drop(given.remove(&name(spec, *index))),
        Change::Given(index, Some(address)) => drop(given.insert(name(spec, *index), vec![*address])),
        Change::Names(said) => spec.names = *said,
        Change::Rumour(index) => return vec![name(spec, *index)],
        Change::DropPolicy(_) | Change::DropClusterPolicy(_) | Change::DropPod | Change::Wait => {}
    }
    Vec::new()
}

/// The keys at which two maps differ.
fn differing<K: Ord + Clone, V: PartialEq>(a: &BTreeMap<K, V>, b: &BTreeMap<K, V>) -> BTreeSet<K> {
    a.keys().chain(b.keys()).filter(|key| a.get(*key) != b.get(*key)).cloned().collect()
}

fn touched(before: &World, after: &World, rumours: Vec<NamespacedName>) -> Touched {
    let mut touched = Touched::nothing();
    differing(&before.pods, &after.pods).into_iter().chain(rumours).for_each(|name| touched.pod(name));
    differing(&before.namespaces, &after.namespaces).into_iter().for_each(|name| touched.namespace(name));
    differing(&before.policies, &after.policies).into_iter().for_each(|name| touched.policy(name));
    if before.cluster_policies != after.cluster_policies {
        touched.cluster_policies();
    }
    assert_eq!(before.nodes, after.nodes, "nodes stay as they are here");
    touched
}

/// The image before with the changes made to it.
fn changed(mut image: PolicyImage, changes: &PolicyChanges) -> PolicyImage {
    fn each<K: Ord + Clone, V: Clone>(map: &mut BTreeMap<K, V>, changes: &BTreeMap<K, Option<V>>) {
        for (key, value) in changes {
            match value {
                Some(value) => drop(map.insert(key.clone(), value.clone())),
                None => drop(map.remove(key)),
            }
        }
    }
    each(&mut image.pod_classes, &changes.pod_classes);
    each(&mut image.cidr_classes, &changes.cidr_classes);
    each(&mut image.set_classes, &changes.set_classes);
    each(&mut image.rows, &changes.rows);
    each(&mut image.rules, &changes.rules);
    each(&mut image.isolating, &changes.isolating);
    image.audited.clone_from(&changes.audited);
    image.pods.clone_from(&changes.pods);
    image
}

/// What is in both images as it was is not among the changes.
fn says_only_what_differs(before: &PolicyImage, after: &PolicyImage, changes: &PolicyChanges) {
    let keys = |changes: &BTreeSet<IpAddr>| changes.clone();
    let said: BTreeSet<IpAddr> = changes.pod_classes.keys().copied().collect();
    assert_eq!(keys(&said), differing(&before.pod_classes, &after.pod_classes));
    assert_eq!(
        changes.cidr_classes.keys().copied().collect::<BTreeSet<_>>(),
        differing(&before.cidr_classes, &after.cidr_classes)
    );
    assert_eq!(
        changes.set_classes.keys().copied().collect::<BTreeSet<_>>(),
        differing(&before.set_classes, &after.set_classes)
    );
    assert_eq!(changes.rows.keys().copied().collect::<BTreeSet<_>>(), differing(&before.rows, &after.rows));
}

/// Fate's choice of a wrong entry.
#[derive(Clone, Debug)]
struct Fault {
    how: u8,
    one: Index,
    other: Index,
}

fn fault() -> impl Strategy<Value = Fault> {
    (0u8..11, any::<Index>(), any::<Index>()).prop_map(|(how, one, other)| Fault { how, one, other })
}

/// What a checker says that has followed so far, and is told this now; and one that knows nothing and reads what the kernel holds then. They
/// find the same, whatever the compiler did of what it should.
fn agree(
    checker: &Checker,
    view: &View<'_>,
    before: &PolicyImage,
    told: &PolicyChanges,
    touched: &Touched,
    what: &str,
) -> Result<(), TestCaseError> {
    let held = changed(before.clone(), told);
    let anew = check(view, &NodeName::new("m0"), &held);
    let mut checker = checker.clone();
    let followed = checker.follow(view, &held, Some(told), touched);
    match (&followed, &anew) {
        (Ok(_), Ok(_)) => prop_assert!(checker.has(&held)),
        (Err(_), Err(_)) => {}
        (Ok(_), Err(missed)) => prop_assert!(false, "not noticed of {}: {}", what, missed),
        (Err(wrong), Ok(_)) => prop_assert!(false, "nothing is wrong with {}: {}", what, wrong),
    }
    Ok(())
}

/// What the kernel is told but for one entry; none: there is none.
fn untold(changes: &PolicyChanges, fault: &Fault) -> Option<PolicyChanges> {
    fn without<K: Ord + Clone, V: Clone>(map: &BTreeMap<K, V>, index: Index) -> Option<BTreeMap<K, V>> {
        let key = map.keys().nth(index.index(map.len().max(1)))?;
        Some(map.iter().filter(|(other, _)| *other != key).map(|(key, value)| (key.clone(), value.clone())).collect())
    }
    let mut told = changes.clone();
    match fault.how % 4 {
        0 => told.pod_classes = without(&told.pod_classes, fault.one)?,
        1 => told.cidr_classes = without(&told.cidr_classes, fault.one)?,
        2 => told.set_classes = without(&told.set_classes, fault.one)?,
        _ => told.rows = without(&told.rows, fault.one)?,
    }
    Some(told)
}

fn run(
    follower: &mut Compiler,
    thorough: &mut Compiler,
    spec: &mut Spec,
    changes: &[(Change, u64, Fault)],
) -> Result<(), TestCaseError> {
    let (dns, node) = (dns(), NodeName::new("m0"));
    let (mut given, mut now) = (Given::new(), Duration::ZERO);
    let mut before = World::default();
    let mut touched_now = Touched::everything();
    let mut image: Option<PolicyImage> = None;
    let mut checker = Checker::new(node.clone());
    let mut table = Learned::new(Limits::default());
    let first = [(&Change::Wait, 0, None)].into_iter();
    let changes = first.chain(changes.iter().map(|(change, seconds, fault)| (change, *seconds, Some(fault))));
    for (turn, (change, seconds, fault)) in (0..).zip(changes) {
        let rumours = apply(spec, &mut given, change);
        now += Duration::from_secs(seconds);
        let world = world(&spec.objects());
        if image.is_some() {
            touched_now = touched(&before, &world, rumours);
        }
        let names = cluster::names(spec, &world);
        cluster::relearn(&mut table, turn, &names);
        // One follows the table that learns; to the other each is a new one.
        let anew = cluster::learned(&names);
        let view = View { world: &world, dns: &dns, pod_ips: &given, names: &table };
        let other = View { names: &anew, ..view };
        follower.follow(&view, &node, now, &touched_now).unwrap();
        let all = thorough.compile(&other, &node, now).unwrap();
        prop_assert_eq!(follower.image(), &all, "after {:?}", change);
        prop_assert_eq!(follower.next_expiry(), thorough.next_expiry());
        prop_assert_eq!(follower.changes(), thorough.changes());
        match (follower.changes(), image.clone()) {
            (Some(changes), Some(image)) => {
                prop_assert_eq!(&changed(image.clone(), changes), &all);
                says_only_what_differs(&image, &all, changes);
            }
            (None, Some(_)) => {}
            (changes, None) => prop_assert_eq!(changes, None, "there is no image before the first"),
        }
        let checked = check(&view, &node, &all);
        prop_assert!(checked.is_ok(), "after {:?}: {}", change, checked.unwrap_err());
        if let (Some(changes), Some(before), Some(fault)) = (follower.changes(), &image, fault) {
            let nothing = PolicyChanges { pods: before.pods.clone(), ..PolicyChanges::default() };
            agree(&checker, &view, before, &nothing, &touched_now, &format!("{change:?}, if the compiler misses it"))?;
            if let Some(broken) = cluster::broken(all.clone(), fault.how, fault.one, fault.other) {
                let told = cluster::changes(before, &broken);
                agree(
                    &checker,
                    &view,
                    before,
                    &told,
                    &touched_now,
                    &format!("{change:?}, with a wrong entry {fault:?}"),
                )?;
            }
            if let Some(told) = untold(changes, fault) {
                agree(&checker, &view, before, &told, &touched_now, &format!("{change:?}, not all of it told"))?;
                let all_again = checker.clone().follow(&view, &all, Some(&told), &Touched::everything());
                prop_assert!(all_again.is_err(), "the kernel does not have what the compiler has: {:?}", fault);
            }
        }
        let followed = checker.follow(&view, &all, follower.changes(), &touched_now);
        prop_assert!(followed.is_ok(), "after {:?}: {}", change, followed.unwrap_err());
        prop_assert!(checker.has(&all));
        (image, before) = (Some(all), world);
    }
    Ok(())
}

proptest! {
    #![proptest_config(cluster::config(96))]

    #[test]
    fn following_changes_gives_the_image_of_a_look_at_everything(
        mut spec in spec(), changes in prop::collection::vec((change(), 0u64..4, fault()), 1..12),
    ) {
        run(&mut Compiler::new(GRACE), &mut Compiler::new(GRACE), &mut spec, &changes)?;
    }

    #[test]
    fn also_after_a_restart_over_what_the_kernel_holds(
        mut spec in spec(), earlier in change(), changes in prop::collection::vec((change(), 0u64..4, fault()), 1..6),
    ) {
        let (dns, mut given, node) = (dns(), Given::new(), NodeName::new("m0"));
        let objects = world(&spec.objects());
        let learned = cluster::learned(&cluster::names(&spec, &objects));
        let view = View { world: &objects, dns: &dns, pod_ips: &given, names: &learned };
        let held = Compiler::new(GRACE).compile(&view, &node, Duration::ZERO).unwrap();
        let used = UsedIds {
            sets: held.isolating.keys().copied().collect(),
            classes: held.pod_classes.values().chain(held.cidr_classes.values()).copied().collect(),
            rules: held.rows.values().map(|row| row.rule).collect(),
            held,
        };
        apply(&mut spec, &mut given, &earlier);
        let resumed = || Compiler::resume(GRACE, &used, Duration::ZERO);
        run(&mut resumed(), &mut resumed(), &mut spec, &changes)?;
    }
}
