use k8s_openapi::api::core::v1 as core;
use towpath_model::{ClusterNetworkPolicy, EndpointSlice, Namespace, Node, Service};

use super::*;

fn namespace(name: &str) -> Namespace {
    Namespace {
        name: name.to_owned(),
        labels: Default::default(),
        socket_services: Default::default(),
        pods_choose: false,
        terminating: false,
    }
}

#[test]
fn a_heartbeat_changes_nothing() {
    let mut index = Index::default();
    index.apply("a".to_owned(), Some(namespace("a")));
    assert!(index.take_changes().any(&[Kind::Namespace]));
    index.apply("a".to_owned(), Some(namespace("a")));
    assert!(index.take_changes().is_empty());
}

#[test]
fn what_led_to_a_change_is_known_until_it_is_taken_and_of_no_heartbeat() {
    let mut index = Index::default();
    let then = SystemTime::UNIX_EPOCH;
    index.apply_since("a".to_owned(), Some(namespace("a")), Some(then));
    index.apply_since("a".to_owned(), Some(namespace("a")), Some(then));
    index.apply_since("b".to_owned(), Some(namespace("b")), None);
    let mut due = index.take_changes();
    assert_eq!(due.led_to_by(), [then]);
    assert!(index.take_changes().led_to_by().is_empty());
    for _ in 0..MOST_SINCE {
        due.merge(Changes::default().since(vec![then]));
    }
    assert_eq!(due.led_to_by().len(), MOST_SINCE, "a measurement, not a leak");
    assert!(Changes::everything().since(due.led_to_by().to_vec()).led_to_by().contains(&then));
}

#[test]
fn a_reset_forgets_what_is_not_listed() {
    let mut index = Index::default();
    index.apply("gone".to_owned(), Some(namespace("gone")));
    index.take_changes();
    index.reset(BTreeMap::from([("kept".to_owned(), namespace("kept"))]));
    assert!(index.take_changes().any(&[Kind::Namespace]));
    assert_eq!(index.world().namespaces.keys().collect::<Vec<_>>(), ["kept"]);
}

#[test]
fn what_policies_look_at_is_named_however_it_changes_and_nothing_else_is() {
    let named = |names: &[&str]| {
        let mut touched = Touched::nothing();
        names.iter().for_each(|name| touched.namespace((*name).to_owned()));
        touched
    };
    let labelled = |name: &str| Namespace { labels: [("a".to_owned(), "b".to_owned())].into(), ..namespace(name) };
    let mut index = Index::default();
    index.apply("a".to_owned(), Some(namespace("a")));
    index.apply("b".to_owned(), Some(namespace("b")));
    assert_eq!(index.take_changes().take_touched(), named(&["a", "b"]));
    index.apply("a".to_owned(), Some(namespace("a")));
    assert_eq!(index.take_changes().take_touched(), Touched::nothing(), "a heartbeat");
    let listed = [namespace("a"), labelled("c")].map(|n| (n.name.clone(), n));
    index.reset(BTreeMap::from(listed));
    assert_eq!(index.take_changes().take_touched(), named(&["b", "c"]), "gone and new, not what stayed");
    index.remove::<Namespace>(&"a".to_owned());
    let mut due = index.take_changes();
    index.apply("c".to_owned(), Some(namespace("c")));
    due.merge(index.take_changes());
    assert_eq!(due.take_touched(), named(&["a", "c"]));
    assert_eq!(Changes::everything().take_touched(), Touched::everything());
    let object = |ready: &str, range: &str| {
        let value = serde_json::json!({"metadata": {"name": "n"}, "spec": {"podCIDRs": [range]},
            "status": {"conditions": [{"type": "Ready", "status": ready}]}});
        Node::try_from(&serde_json::from_value::<core::Node>(value).unwrap()).unwrap()
    };
    let key = NodeName::new("n");
    index.apply(key.clone(), Some(object("True", "10.0.0.0/24")));
    assert_eq!(index.take_changes().take_touched(), Touched::everything());
    index.apply(key.clone(), Some(object("False", "10.0.0.0/24")));
    let mut unready = index.take_changes();
    assert!(unready.any(&[Kind::Node]) && unready.take_touched() == Touched::nothing(), "policies do not ask for it");
    index.apply(key, Some(object("False", "10.0.1.0/24")));
    assert_eq!(index.take_changes().take_touched(), Touched::everything());
}

#[test]
fn only_full_lists_of_every_kind_make_it_synced() {
    let mut index = Index::default();
    index.reset::<Namespace>(BTreeMap::new());
    assert!(!index.is_synced());
    index.reset::<Node>(BTreeMap::new());
    index.reset::<Pod>(BTreeMap::new());
    index.reset::<Service>(BTreeMap::new());
    index.reset::<EndpointSlice>(BTreeMap::new());
    assert_eq!(index.missing(), [Kind::NetworkPolicy, Kind::ClusterNetworkPolicy]);
    index.reset::<NetworkPolicy>(BTreeMap::new());
    index.reset::<ClusterNetworkPolicy>(BTreeMap::new());
    assert!(index.is_synced());
}

#[test]
fn what_is_recalled_holds_until_it_is_listed_and_never_against_a_list() {
    let mut index = Index::default();
    index.recall(BTreeMap::from([("old".to_owned(), namespace("old"))]));
    assert!(!index.missing().contains(&Kind::Namespace) && index.recalled().contains(&Kind::Namespace));
    assert!(index.take_changes().any(&[Kind::Namespace]));
    index.reset(BTreeMap::from([("new".to_owned(), namespace("new"))]));
    assert!(index.recalled().is_empty() && index.listed().contains(&Kind::Namespace));
    let revision = index.revision(Kind::Namespace);
    index.recall(BTreeMap::from([("old".to_owned(), namespace("old"))]));
    assert_eq!(index.world().namespaces.keys().collect::<Vec<_>>(), ["new"]);
    assert_eq!(index.revision(Kind::Namespace), revision);
}

#[test]
fn an_impossible_object_counts_as_absent() {
    let mut index = Index::default();
    index.apply("a".to_owned(), Some(namespace("a")));
    index.take_changes();
    index.apply::<Namespace>("a".to_owned(), None);
    assert!(index.world().namespaces.is_empty());
    assert!(!index.take_changes().is_empty());
}

#[test]
fn a_policy_that_cannot_be_read_admits_nobody_and_any_other_object_counts_as_absent() {
    let key = NamespacedName::new("default", "odd");
    let policy = NetworkPolicy::unreadable(&key).unwrap();
    assert!(policy.pod_selector.is_everything());
    assert_eq!((policy.ingress, policy.egress), (Some(Vec::new()), Some(Vec::new())));
    assert!(Service::unreadable(&key).is_none());
}
