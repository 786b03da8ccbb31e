use serde_json::{Value, json};
use towpath_model::{ClusterNetworkPolicy, EndpointSlice, Namespace, Node, Service};

use super::*;
use crate::heard::Listed;
use crate::index::Index;

fn parsed<O: serde::de::DeserializeOwned, N: for<'o> TryFrom<&'o O, Error: std::fmt::Debug>>(object: Value) -> N {
    N::try_from(&serde_json::from_value(object).unwrap()).unwrap()
}

fn namespace(ends: bool) -> Namespace {
    let deleted = if ends { json!("2026-01-01T00:00:00Z") } else { Value::Null };
    parsed::<core::Namespace, _>(json!({"metadata": {"name": "red", "deletionTimestamp": deleted}}))
}

fn pod(node: &str, phase: &str) -> Pod {
    parsed::<core::Pod, _>(json!({
        "metadata": {"namespace": "red", "name": "web", "uid": "u"},
        "spec": {"nodeName": node, "containers": []}, "status": {"phase": phase, "podIPs": [{"ip": "10.244.0.2"}]},
    }))
}

fn name(text: &str) -> NamespacedName {
    NamespacedName::new("red", text)
}

fn policies() -> BTreeMap<NamespacedName, NetworkPolicy> {
    ["p", "q"].map(|text| (name(text), NetworkPolicy::deny_all(name(text)))).into()
}

/// An index that has listed everything: one pod on a node, two policies, a namespace; and what it asks.
fn index(ends: bool, node: &str) -> (Index, mpsc::UnboundedReceiver<Question>) {
    let (asking, questions) = mpsc::unbounded_channel();
    let mut index = Index::default();
    index.ask_about_namespaces(NodeName::new("n1"), asking);
    index.reset::<Node>(BTreeMap::new());
    index.reset::<Service>(BTreeMap::new());
    index.reset::<EndpointSlice>(BTreeMap::new());
    index.reset::<ClusterNetworkPolicy>(BTreeMap::new());
    index.reset(BTreeMap::from([("red".to_owned(), namespace(ends))]));
    index.reset(BTreeMap::from([(name("web"), pod(node, "Running"))]));
    index.reset(policies());
    index.take_changes();
    (index, questions)
}

fn holds(index: &Index, policy: &str) -> bool {
    index.world().policies.contains_key(&name(policy))
}

#[test]
fn a_namespace_that_ends_keeps_its_policies_until_its_last_pod_is_gone() {
    let (mut index, mut questions) = index(true, "n1");
    index.remove::<NetworkPolicy>(&name("p"));
    assert!(holds(&index, "p") && index.take_changes().is_empty(), "nothing is to be compiled");
    assert_eq!(index.outliving().len(), 1);
    index.remove::<Pod>(&name("web"));
    assert!(!holds(&index, "p") && holds(&index, "q"), "only what was deleted goes");
    assert!(index.take_changes().any(&[Kind::NetworkPolicy]) && index.outliving().is_empty());
    assert!(questions.try_recv().is_err(), "nothing was in question");
}

#[test]
fn a_pod_that_has_ended_keeps_nothing() {
    let (mut index, _questions) = index(true, "n1");
    index.remove::<NetworkPolicy>(&name("p"));
    index.apply(name("web"), Some(pod("n1", "Succeeded")));
    assert!(!holds(&index, "p"));
}

#[test]
fn a_policy_that_is_deleted_by_itself_goes_when_the_api_server_has_said_that_its_namespace_stays() {
    let (mut index, mut questions) = index(false, "n1");
    index.remove::<NetworkPolicy>(&name("p"));
    let first = questions.try_recv().unwrap();
    assert!(holds(&index, "p"), "its namespace may have been deleted before it");
    index.remove::<NetworkPolicy>(&name("q"));
    index.namespace_ends(&first, false);
    assert!(!holds(&index, "p") && holds(&index, "q"), "the answer may be older than the second deletion");
    index.namespace_ends(&questions.try_recv().unwrap(), false);
    assert!(!holds(&index, "p") && !holds(&index, "q"));
    assert!(index.take_changes().any(&[Kind::NetworkPolicy]));
}

#[test]
fn news_of_a_policy_may_come_before_those_of_its_namespaces_end() {
    let (mut index, mut questions) = index(false, "n1");
    index.remove::<NetworkPolicy>(&name("p"));
    index.namespace_ends(&questions.try_recv().unwrap(), true);
    assert!(holds(&index, "p"));
    // What the watch of namespaces says later is the same.
    index.apply("red".to_owned(), Some(namespace(true)));
    assert!(holds(&index, "p"));
    index.remove::<Pod>(&name("web"));
    assert!(!holds(&index, "p"));
}

#[test]
fn nobody_is_asked_about_pods_of_other_nodes() {
    let (mut index, mut questions) = index(false, "n2");
    index.remove::<NetworkPolicy>(&name("p"));
    assert!(!holds(&index, "p") && questions.try_recv().is_err());
    index.apply(name("web"), Some(pod("", "Pending")));
    index.remove::<NetworkPolicy>(&name("q"));
    assert!(holds(&index, "q") && questions.try_recv().is_ok(), "a pod that may yet come here");
}

#[test]
fn one_that_is_made_again_is_as_the_api_server_has_it() {
    let (mut index, _questions) = index(true, "n1");
    index.remove::<NetworkPolicy>(&name("p"));
    index.apply(name("p"), Some(NetworkPolicy::deny_all(name("p"))));
    assert!(index.outliving().is_empty());
    index.remove::<Pod>(&name("web"));
    assert!(holds(&index, "p"), "nobody deleted this one");
}

#[test]
fn a_new_list_without_it_is_as_its_deletion() {
    let (mut ending, _questions) = index(true, "n1");
    ending.reset::<NetworkPolicy>(BTreeMap::new());
    assert!(holds(&ending, "p") && holds(&ending, "q"));
    let (mut staying, mut questions) = index(false, "n1");
    staying.reset::<NetworkPolicy>(BTreeMap::new());
    let [_, last] = [questions.try_recv().unwrap(), questions.try_recv().unwrap()];
    staying.namespace_ends(&last, false);
    assert!(!holds(&staying, "p") && !holds(&staying, "q"));
}

/// In whatever order the first lists come.
#[test]
fn an_agent_that_starts_again_keeps_what_the_one_before_enforced() {
    type List = fn(&mut Index, bool);
    let lists: [List; 3] = [
        |index, _| index.reset::<NetworkPolicy>(BTreeMap::new()),
        |index, ends| index.reset(BTreeMap::from([("red".to_owned(), namespace(ends))])),
        |index, _| index.reset(BTreeMap::from([(name("web"), pod("n1", "Running"))])),
    ];
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        for ends in [true, false] {
            let mut index = Index::default();
            index.remember_policies(policies());
            order.iter().for_each(|list| lists[*list](&mut index, ends));
            assert!(!index.missing().is_empty() || index.is_synced());
            assert_eq!(holds(&index, "p"), ends, "{order:?}");
        }
    }
}

#[test]
fn what_was_deleted_by_itself_before_a_restart_does_not_come_into_force_again_for_a_moment() {
    let (asking, mut questions) = mpsc::unbounded_channel();
    let mut index = Index::default();
    index.ask_about_namespaces(NodeName::new("n1"), asking);
    index.remember_policies(policies());
    index.reset::<Node>(BTreeMap::new());
    index.reset::<Service>(BTreeMap::new());
    index.reset::<EndpointSlice>(BTreeMap::new());
    index.reset::<ClusterNetworkPolicy>(BTreeMap::new());
    index.reset(BTreeMap::from([("red".to_owned(), namespace(false))]));
    index.reset(BTreeMap::from([(name("web"), pod("n1", "Running"))]));
    index.reset::<NetworkPolicy>(BTreeMap::new());
    assert!(index.missing().is_empty() && !index.is_synced(), "nothing is planned before it is decided");
    while let Ok(question) = questions.try_recv() {
        index.namespace_ends(&question, false);
    }
    assert!(index.is_synced() && index.world().policies.is_empty());
    // Later deletions hold up nothing.
    index.apply(name("p"), Some(NetworkPolicy::deny_all(name("p"))));
    index.remove::<NetworkPolicy>(&name("p"));
    assert!(index.is_synced() && holds(&index, "p"));
}

#[test]
fn a_deletion_is_not_acknowledged_while_the_policy_holds() {
    let (mut index, mut questions) = index(false, "n1");
    let all = |index: &Index| index.heard().told()["NetworkPolicy"].objects.clone().unwrap();
    index.listed_at(policies(), Listed::of(Kind::NetworkPolicy, &[("red/p", 5), ("red/q", 6)]));
    index.remove_at::<NetworkPolicy>(&name("p"), "", Some(7));
    assert_eq!((all(&index).len(), index.outliving().len()), (2, 0), "whether it outlives its object is not known");
    index.namespace_ends(&questions.try_recv().unwrap(), false);
    assert_eq!(all(&index), BTreeMap::from([("red/q".to_owned(), 6)]));
    index.listed_at::<NetworkPolicy>(BTreeMap::new(), Listed::default());
    assert_eq!(all(&index), BTreeMap::from([("red/q".to_owned(), 0)]), "a list without it is no more than a question");
    index.namespace_ends(&questions.try_recv().unwrap(), true);
    assert_eq!((all(&index).len(), index.outliving().len()), (1, 1), "it holds, and on purpose");
}
