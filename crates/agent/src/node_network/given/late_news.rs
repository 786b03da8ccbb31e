//! An address that is given again at once, while news come late: whatever has been heard and in whatever order kinds are heard of, who has it now is
//! judged as what it is or as a stranger, on its own node always, and elsewhere by nothing but what it is or what had the address before.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1 as networking;
use serde_json::{Value, json};
use towpath_model::desired::{PolicyImage, RowProtocol, Verdict};
use towpath_model::{Direction, NamespacedName, NetworkPolicy, Node, NodeName, Pod, Protocol};
use towpath_policy::{Compiler, View, image};
use towpath_wire::cni::Attachment;

use super::{Given, addresses};
use crate::heard::Listed;
use crate::index::{Index, Kind};
use crate::ipam::Lease;

/// The address that is given again.
const AGAIN: &str = "10.244.1.7";
/// Pods that are there all the time, the first on the node whose pods are judged.
const SERVER: &str = "10.244.3.5";
const FRIENDS_DESK: &str = "10.244.3.6";
/// A pod is judged towards these ports: friends may ask the first, strangers the second.
const PORTS: [u16; 2] = [80, 81];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pod(name: &str, uid: &str, node: &str, app: &str, address: Option<&str>, version: u64) -> (Pod, u64) {
    let ips: Vec<Value> = address.iter().map(|ip| json!({"ip": ip})).collect();
    let object: core::Pod = serde_json::from_value(json!({
        "metadata": {"namespace": "a", "name": name, "uid": uid, "labels": {"app": app}},
        "spec": {"nodeName": node, "containers": []}, "status": {"phase": "Running", "podIPs": ips},
    }))
    .unwrap();
    (Pod::try_from(&object).unwrap(), version)
}

fn node(name: &str, ranges: &[&str]) -> Node {
    let object: core::Node =
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"podCIDRs": ranges}})).unwrap();
    Node::try_from(&object).unwrap()
}

fn policy(name: &str, spec: Value) -> NetworkPolicy {
    let object: networking::NetworkPolicy =
        serde_json::from_value(json!({"metadata": {"namespace": "a", "name": name}, "spec": spec})).unwrap();
    NetworkPolicy::try_from(&object).unwrap()
}

/// Servers hear friends on the one port and strangers on the other; friends and strangers may each send to one of them, and hear it.
fn policies() -> Vec<NetworkPolicy> {
    let of = |app: &str| json!({"podSelector": {"matchLabels": {"app": app}}});
    let mut all = vec![policy(
        "servers",
        json!({"podSelector": {"matchLabels": {"app": "server"}}, "policyTypes": ["Ingress"], "ingress": [
            {"from": [of("friend")], "ports": [{"port": PORTS[0]}]}, {"from": [of("stranger")], "ports": [{"port": PORTS[1]}]}]}),
    )];
    for (app, desk, port) in [("friend", "server", PORTS[0]), ("stranger", "desk", PORTS[1])] {
        all.push(policy(
            app,
            json!({"podSelector": {"matchLabels": {"app": app}}, "policyTypes": ["Ingress", "Egress"],
                "egress": [{"to": [of(desk)], "ports": [{"port": port}]}],
                "ingress": [{"from": [of(desk)], "ports": [{"port": port}]}]}),
        ));
    }
    all
}

/// One event of a watch, as the index takes it.
#[derive(Clone, Debug)]
enum Event {
    Pod(Box<(Pod, u64)>),
    Gone(NamespacedName, &'static str, u64),
    Node(Box<Node>),
    Given(&'static str, Vec<Given>),
}

impl Event {
    fn reaches(&self, index: &mut Index) {
        match self.clone() {
            Event::Pod(pod) => index.apply_at(pod.0.name.clone(), Some(pod.0), Some(pod.1), None),
            Event::Gone(pod, uid, version) => index.remove_at::<Pod>(&pod, uid, Some(version)),
            Event::Node(node) => index.apply(node.name.clone(), Some(*node)),
            Event::Given(node, pods) => index.give(NodeName::new(node), Some(pods)),
        }
    }
}

/// A pod goes, and another gets its address.
struct Story {
    old: &'static str,
    new: &'static str,
    /// Label of the old one; the other is the new one's.
    apps: [&'static str; 2],
    /// Where the new one is; the old one was on `n1`.
    on: &'static str,
    /// Whether the old one's object is deleted without having been said to end.
    at_once: bool,
}

impl Story {
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for (old, new) in [("web-0", "web-0"), ("old", "new"), ("young", "elder")] {
            for apps in [["friend", "stranger"], ["stranger", "friend"]] {
                for (on, at_once) in [("n1", false), ("n1", true), ("n2", false), ("n2", true)] {
                    all.push(Self { old, new, apps, on, at_once });
                }
            }
        }
        all
    }

    /// What was listed before it begins.
    fn listed(&self) -> Index {
        let mut index = Index::default();
        for (name, range) in [("n1", "10.244.1.0/24"), ("n2", "10.244.2.0/24"), ("n3", "10.244.3.0/24")] {
            index.apply(NodeName::new(name), Some(node(name, &[range])));
        }
        let here = [("server", "n3", SERVER, 3), ("desk", "n3", FRIENDS_DESK, 4)];
        let mut pods: BTreeMap<NamespacedName, Pod> = BTreeMap::new();
        let mut versions = Listed::default();
        for (name, at, address, version) in here {
            let (pod, version) = pod(name, name, at, name, Some(address), version);
            versions.add(Kind::Pod, &pod.name, version);
            pods.insert(pod.name.clone(), pod);
        }
        let (old, version) = pod(self.old, "uid-old", "n1", self.apps[0], Some(AGAIN), 5);
        versions.add(Kind::Pod, &old.name, version);
        pods.insert(old.name.clone(), old);
        index.listed_at(pods, versions);
        let policies = policies().into_iter().map(|policy| (policy.name.clone(), policy)).collect();
        index.listed_at(policies, Listed::default());
        index
    }

    fn new_pod(&self, address: Option<&str>, version: u64) -> (Pod, u64) {
        pod(self.new, "uid-new", self.on, self.apps[1], address, version)
    }

    /// What the watch of pods brings, in the order in which it happened.
    fn of_pods(&self) -> Vec<Event> {
        let (mut ending, _) = pod(self.old, "uid-old", "n1", self.apps[0], Some(AGAIN), 10);
        ending.terminating = true;
        let ends = (!self.at_once).then(|| Event::Pod(Box::new((ending, 10))));
        let later = [
            Event::Gone(NamespacedName::new("a", self.old), "uid-old", 11),
            Event::Pod(Box::new(self.new_pod(None, 12))),
            Event::Pod(Box::new(self.new_pod(Some(AGAIN), 13))),
        ];
        ends.into_iter().chain(later).collect()
    }

    /// What the watches of nodes and of what they gave bring.
    fn of_nodes(&self) -> [Vec<Event>; 2] {
        let moves = if self.on == "n1" {
            Vec::new()
        } else {
            let ranges = ["10.244.2.0/24", "10.244.1.0/24"];
            [node("n1", &["10.244.9.0/24"]), node(self.on, &ranges)].map(|node| Event::Node(Box::new(node))).to_vec()
        };
        let given =
            Given { pod: NamespacedName::new("a", self.new), uid: "uid-new".into(), addresses: vec![ip(AGAIN)] };
        [moves, vec![Event::Given(self.on, vec![given])]]
    }

    fn lease(&self) -> Lease {
        Lease {
            owner: Attachment::new("c", "eth0").unwrap(),
            network: "towpath".to_owned(),
            pod: Some(NamespacedName::new("a", self.new)),
            uid: "uid-new".to_owned(),
            netns: String::new(),
            addresses: vec![ip(AGAIN)],
            attached: None,
        }
    }

    /// The verdicts that are due to a pod with a label at that address, on its own node and on the others'.
    fn due(&self, app: &str, own: bool) -> Verdicts {
        let mut index = self.listed();
        index.remove::<Pod>(&NamespacedName::new("a", self.old));
        self.of_nodes()[0].iter().for_each(|event| event.reaches(&mut index));
        let (pod, _) = pod(self.new, "uid-new", self.on, app, Some(AGAIN), 13);
        index.apply(pod.name.clone(), Some(pod));
        if own { own_end(&index, self.on, &[self.lease()]) } else { other_end(&index) }
    }
}

type Verdicts = Vec<(&'static str, Direction, u16, bool)>;

fn compiled(index: &Index, on: &str, leases: &[Lease]) -> PolicyImage {
    let pod_ips = addresses(index.world(), index.given(), leases);
    let view = View { pod_ips: &pod_ips, ..View::of(index.world()) };
    Compiler::new(Duration::ZERO).compile(&view, &NodeName::new(on), Duration::ZERO).unwrap()
}

fn judged(image: &PolicyImage, pod: &'static str, peer: &'static str, told: &'static str) -> Verdicts {
    let mut all = Vec::new();
    for direction in [Direction::Ingress, Direction::Egress] {
        for port in PORTS {
            let protocol = RowProtocol::Ports(Protocol::Tcp);
            let (verdict, _) = image::judge_pod(image, ip(pod), direction, ip(peer), protocol, port);
            all.push((told, direction, port, verdict == Verdict::Allow));
        }
    }
    all
}

/// How the node that has the address judges the pod that has it.
fn own_end(index: &Index, on: &str, leases: &[Lease]) -> Verdicts {
    let image = compiled(index, on, leases);
    [judged(&image, AGAIN, SERVER, SERVER), judged(&image, AGAIN, FRIENDS_DESK, FRIENDS_DESK)].concat()
}

/// How another node judges its own pod towards the address.
fn other_end(index: &Index) -> Verdicts {
    judged(&compiled(index, "n3", &[]), SERVER, AGAIN, SERVER)
}

/// No verdict allows what none of these does.
fn allows_no_more_than(verdicts: &Verdicts, due: &[&Verdicts], what: &str) {
    for (at, verdict) in verdicts.iter().enumerate() {
        assert!(!verdict.3 || due.iter().any(|due| due[at].3), "{what}: {verdict:?}");
    }
}

/// All orders of several rows of events that keep each row's own.
fn orders(rows: &[Vec<Event>]) -> Vec<Vec<Event>> {
    if rows.iter().all(Vec::is_empty) {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for at in (0..rows.len()).filter(|at| !rows[*at].is_empty()) {
        let mut left = rows.to_vec();
        let first = left[at].remove(0);
        all.extend(orders(&left).into_iter().map(|rest| [vec![first.clone()], rest].concat()));
    }
    all
}

#[test]
fn on_its_own_node_a_new_pod_is_judged_as_itself_however_late_the_news_of_the_pod_before_are() {
    for story in Story::all() {
        let what = format!("{} ({}) then {} ({}) on {}", story.old, story.apps[0], story.new, story.apps[1], story.on);
        let due = story.due(story.apps[1], true);
        assert!(
            due.iter().any(|verdict| verdict.3) && due != story.due(story.apps[0], true),
            "{what}: it tells nothing"
        );
        let events = story.of_pods();
        let [moves, _] = story.of_nodes();
        for heard in 0..=events.len() {
            let mut index = story.listed();
            moves.iter().chain(&events[..heard]).for_each(|event| event.reaches(&mut index));
            let name = NamespacedName::new("a", story.new);
            // What an ADD asks the API server, where the watch is late.
            let known = index.world().pods.get(&name).is_some_and(|pod| pod.uid == "uid-new".into());
            if !known {
                // A server that does not answer: nothing may be lent to the new one.
                let unasked = own_end(&index, story.on, &[story.lease()]);
                allows_no_more_than(&unasked, &[], &format!("{what}, {heard} heard, the server not asked"));
                let (pod, version) = story.new_pod(None, 12);
                index.answered_with(name, pod, Some(version));
            }
            assert_eq!(own_end(&index, story.on, &[story.lease()]), due, "{what}, {heard} heard");
            for (late, event) in events.iter().enumerate().skip(heard) {
                // Each comes, and comes once more.
                for _ in 0..2 {
                    event.reaches(&mut index);
                    assert_eq!(own_end(&index, story.on, &[story.lease()]), due, "{what}, {heard} heard, then {late}");
                }
            }
            // The end of the one before, at the very last again.
            Event::Gone(NamespacedName::new("a", story.old), "uid-old", 11).reaches(&mut index);
            assert_eq!(own_end(&index, story.on, &[story.lease()]), due, "{what}, {heard} heard, and the end again");
        }
    }
}

#[test]
fn what_an_earlier_run_knew_of_the_pod_before_is_lent_to_nobody() {
    for story in Story::all().into_iter().filter(|story| story.old == story.new) {
        let index = story.listed();
        let verdicts = own_end(&index, story.on, &[story.lease()]);
        allows_no_more_than(&verdicts, &[], "nothing is known of the new one");
    }
}

#[test]
fn elsewhere_it_is_judged_as_itself_or_as_what_had_the_address_and_as_itself_when_all_is_heard() {
    for story in Story::all() {
        let what = format!("{} ({}) then {} ({}) on {}", story.old, story.apps[0], story.new, story.apps[1], story.on);
        let [old, new] = story.apps.map(|app| story.due(app, false));
        assert!(old != new, "{what}: it tells nothing");
        let [moves, given] = story.of_nodes();
        for order in orders(&[story.of_pods(), moves, given]) {
            let mut index = story.listed();
            let mut has_it = false;
            for event in &order {
                for _ in 0..2 {
                    event.reaches(&mut index);
                    let verdicts = other_end(&index);
                    allows_no_more_than(&verdicts, &[&old, &new], &format!("{what} after {event:?} of {order:?}"));
                    // From its status on, which is what this node then acknowledges, it is nobody else.
                    has_it |= matches!(event, Event::Pod(pod) if pod.1 == 13);
                    if has_it {
                        assert_eq!(verdicts, new, "{what} after {event:?} of {order:?}");
                    }
                }
            }
        }
    }
}
