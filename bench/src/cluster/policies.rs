//! NetworkPolicies, and the pods that they name, as an API server has them: of one namespace whose pods they judge, and of a large
//! cluster of which the node has its share.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::{core::v1 as core, networking::v1 as networking};
use serde_json::{Value, json};
use towpath_model::{Namespace, NetworkPolicy, Pod, World};

use super::objects::{NAMESPACE, PORT, managed, uid};

/// Rules of a policy in each direction.
const RULES: usize = 10;
/// Every so many-th rule names addresses, the others pods.
const BLOCKS: usize = 10;
/// Namespaces of a large cluster.
const NAMESPACES: usize = 50;
/// Pods of one node of a large cluster, as kubelet's default allows.
const PER_NODE: usize = 110;
/// First address of pods of other nodes, behind the ranges of the nodes that are really there.
const ELSEWHERE: u32 = 0x0af4_0800;

/// An address among those of pods of other nodes.
fn elsewhere(index: usize) -> IpAddr {
    Ipv4Addr::from(ELSEWHERE + u32::try_from(index).unwrap_or(0)).into()
}

/// A pod that runs, and has all that controllers and kubelet write.
pub(crate) fn running(namespace: &str, name: &str, node: &str, ip: IpAddr, labels: &Value) -> Value {
    let fields = json!({
        "f:metadata": {"f:generateName": {}, "f:labels": {".": {}, "f:app": {}, "f:pod-template-hash": {}, "f:tier": {}}, "f:ownerReferences": {}},
        "f:spec": {"f:containers": {"k:{\"name\":\"c\"}": {".": {}, "f:image": {}, "f:imagePullPolicy": {}, "f:name": {}, "f:ports": {},
            "f:resources": {}, "f:terminationMessagePath": {}, "f:terminationMessagePolicy": {}}}, "f:dnsPolicy": {},
            "f:restartPolicy": {}, "f:schedulerName": {}, "f:securityContext": {}, "f:terminationGracePeriodSeconds": {}},
    });
    let owner = format!("{name}-set");
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "generateName": format!("{owner}-"), "namespace": namespace, "uid": uid(&format!("{namespace}/{name}")),
            "creationTimestamp": "2026-01-01T00:00:00Z", "labels": labels,
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": owner, "uid": uid(&owner), "controller": true,
                "blockOwnerDeletion": true,
            }],
            "managedFields": managed("kube-controller-manager", &fields),
        },
        "spec": {
            "nodeName": node, "serviceAccountName": "default", "restartPolicy": "Always", "dnsPolicy": "ClusterFirst",
            "schedulerName": "default-scheduler", "terminationGracePeriodSeconds": 30, "enableServiceLinks": true,
            "containers": [{
                "name": "c", "image": "registry.example/app:1", "imagePullPolicy": "IfNotPresent",
                "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
            }],
        },
        "status": {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "qosClass": "BestEffort", "startTime": "2026-01-01T00:00:00Z",
            "conditions": [
                {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
            ],
        },
    })
}

fn labelled(app: &str) -> Value {
    json!({"podSelector": {"matchLabels": {"app": app}}})
}

fn policy(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace, "uid": uid(&format!("{namespace}/{name}")), "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": spec,
    })
}

/// What judges two pods of the measured namespace by one rule of many, which is the last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Admitted<'a> {
    /// `app` label of the pod that may come in.
    pub(crate) from: &'a str,
    /// `app` label of the pod that it goes to.
    pub(crate) to: &'a str,
    /// First and last TCP port.
    pub(crate) ports: (u16, u16),
}

impl Admitted<'_> {
    fn ports(&self) -> Value {
        json!([{"protocol": "TCP", "port": self.ports.0, "endPort": self.ports.1}])
    }
}

/// Policies of ten rules that select every pod of the measured namespace, until there are `count` rules in each direction. Each rule
/// names a pod (every tenth a block of addresses) and a port of its own; the last one of the last policy is what is admitted. With them
/// come the pods that they name, which are on another node.
pub(crate) fn rules(count: usize, admitted: Admitted<'_>) -> Vec<Value> {
    let mut objects = Vec::new();
    let mut peer_of = |index: usize| {
        if index % BLOCKS == BLOCKS - 1 {
            let block = index / BLOCKS;
            return json!({"ipBlock": {"cidr": format!("172.{}.{}.0/24", 16 + block / 256, block % 256)}});
        }
        let app = format!("peer-{index}");
        objects.push(running(NAMESPACE, &app, "another", elsewhere(index), &json!({"app": app})));
        labelled(&app)
    };
    let mut directions = Vec::with_capacity(count);
    for index in 0..count {
        let port = 1024 + index % 60_000;
        let ports = json!([{"protocol": "TCP", "port": port}]);
        let last = index + 1 == count;
        let (from, to, ports) = if last {
            (labelled(admitted.from), labelled(admitted.to), admitted.ports())
        } else {
            let peer = peer_of(index);
            (peer.clone(), peer, ports)
        };
        directions.push((json!({"from": [from], "ports": ports}), json!({"to": [to], "ports": ports})));
    }
    let policies = directions.chunks(RULES).enumerate().map(|(number, rules)| {
        let (ingress, egress): (Vec<Value>, Vec<Value>) = rules.iter().cloned().unzip();
        let spec =
            json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": ingress, "egress": egress});
        policy(NAMESPACE, &format!("policy-{number:05}"), &spec)
    });
    objects.extend(policies.collect::<Vec<_>>());
    objects
}

/// One policy that selects every pod of the measured namespace and admits `count` blocks of addresses, all different and none inside
/// another; the last one is the `range` of the pods.
pub(crate) fn blocks(count: usize, range: &str) -> Vec<Value> {
    let others = (0..count.saturating_sub(1)).map(|index| match index % 4 {
        // Not only one length of prefix.
        3 => format!("20.{}.{}.7/32", index / 256, index % 256),
        _ => format!("20.{}.{}.0/24", index / 256, index % 256),
    });
    let all: Vec<Value> = others.chain([range.to_owned()]).map(|cidr| json!({"ipBlock": {"cidr": cidr}})).collect();
    let ports = json!([{"protocol": "TCP", "port": PORT}]);
    let spec = json!({
        "podSelector": {}, "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": all, "ports": ports}], "egress": [{"to": all, "ports": ports}],
    });
    vec![policy(NAMESPACE, "blocks", &spec)]
}

/// The policy that a change changes: only `from` may send UDP to `to`.
pub(crate) fn only(from: &str, to: &str) -> Value {
    let spec = json!({
        "podSelector": {"matchLabels": {"app": to}}, "policyTypes": ["Ingress"],
        "ingress": [{"from": [labelled(from)], "ports": [{"protocol": "UDP", "port": PORT}]}],
    });
    policy(NAMESPACE, "zz-measured", &spec)
}

/// How large a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Scale {
    /// NetworkPolicies.
    pub(crate) policies: usize,
    /// Pods.
    pub(crate) pods: usize,
    /// Different sets of labels that they have.
    pub(crate) label_sets: usize,
}

/// A number that has nothing to do with the index, so that each node has pods of most namespaces.
fn scattered(index: usize) -> usize {
    index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33
}

impl Scale {
    /// With ten pods a label set and five pods a policy, as a large cluster has.
    pub(crate) fn of_policies(policies: usize) -> Self {
        Self { policies, pods: policies * 5, label_sets: (policies / 2).max(1) }
    }

    /// In words.
    pub(crate) fn words(&self) -> String {
        let Self { policies, pods, label_sets } = self;
        format!("{policies} policies, {pods} pods of {label_sets} label sets")
    }

    /// The namespaces.
    pub(crate) fn namespaces(&self) -> Vec<Value> {
        let namespace = |n: usize| {
            let name = format!("ns{n}");
            let labels = json!({"kubernetes.io/metadata.name": name});
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "uid": uid(&name), "labels": labels}})
        };
        (0..NAMESPACES).map(namespace).collect()
    }

    /// The pods, `local` having its share of them. They are nobody's: no process, no device.
    pub(crate) fn pods(&self, local: &str) -> Vec<Value> {
        let nodes = self.pods.div_ceil(PER_NODE).max(1);
        let mut here = 0;
        let pod = |index: usize| {
            let app = index % self.label_sets;
            let labels = json!({
                "app": format!("app{app}"), "pod-template-hash": format!("{:x}", app * 7919), "tier": format!("t{}", app % 4),
            });
            let (node, ip) = match scattered(index) % nodes {
                // Behind those that the agent gives out first.
                0 => {
                    here = (here + 1) % 150;
                    (local.to_owned(), Ipv4Addr::new(10, 244, 1, 100 + here).into())
                }
                other => (format!("node{other}"), elsewhere(index)),
            };
            running(&format!("ns{}", app % NAMESPACES), &format!("pod{index}"), &node, ip, &labels)
        };
        (0..self.pods).map(pod).collect()
    }

    /// The policies: each selects a tier of a namespace, lets two apps in, and lets out to an app, a block and DNS.
    pub(crate) fn network_policies(&self) -> Vec<Value> {
        let one = |index: usize| {
            let app = |n: usize| json!({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": format!("app{}", n % self.label_sets)}}});
            let ports =
                json!([{"protocol": "TCP", "port": "http"}, {"protocol": "TCP", "port": 9000, "endPort": 10_000}]);
            let block = format!("172.{}.{}.0/24", 16 + index % 16, index / 16 % 256);
            let dns = json!({"namespaceSelector": {}, "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}});
            let spec = json!({
                "podSelector": {"matchLabels": {"tier": format!("t{}", index / NAMESPACES % 4)}},
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [{"from": [app(index * 3), app(index * 7 + 1)], "ports": ports}],
                "egress": [
                    {"to": [app(index * 5 + 2), {"ipBlock": {"cidr": block}}], "ports": ports},
                    {"to": [dns], "ports": [{"protocol": "UDP", "port": 53}]},
                ],
            });
            policy(&format!("ns{}", index % NAMESPACES), &format!("policy{index}"), &spec)
        };
        (0..self.policies).map(one).collect()
    }
}

/// The objects as the agent has them once they are parsed.
///
/// # Errors
/// One of them is of a kind that no policy is about, or cannot be read.
pub(crate) fn world(objects: Vec<Value>) -> Result<World> {
    let mut world = World::default();
    for object in objects {
        match object.get("kind").and_then(Value::as_str).context("an object without a kind")? {
            "Namespace" => {
                let namespace = Namespace::try_from(&serde_json::from_value::<core::Namespace>(object)?)?;
                world.namespaces.insert(namespace.name.clone(), namespace);
            }
            "Pod" => {
                let pod = Pod::try_from(&serde_json::from_value::<core::Pod>(object)?)?;
                world.pods.insert(pod.name.clone(), pod);
            }
            "NetworkPolicy" => {
                let policy = NetworkPolicy::try_from(&serde_json::from_value::<networking::NetworkPolicy>(object)?)?;
                world.policies.insert(policy.name.clone(), policy);
            }
            other => bail!("no policy is about a {other}"),
        }
    }
    Ok(world)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ipnet::IpNet;
    use towpath_model::desired::{RowProtocol, Verdict};
    use towpath_model::{Direction, Protocol};
    use towpath_policy::{Flow, View, evaluate};

    use super::*;

    const NEAR: [u8; 4] = [10, 244, 1, 2];
    const SERVER: [u8; 4] = [10, 244, 1, 3];

    fn judged(mut objects: Vec<Value>) -> World {
        for (name, ip) in [("near", NEAR), ("server", SERVER)] {
            objects.push(running(NAMESPACE, name, "n1", ip.into(), &json!({"app": name})));
        }
        world(objects).unwrap()
    }

    fn verdict(world: &World, protocol: RowProtocol, port: u16) -> Verdict {
        evaluate(&View::of(world), &Flow::new(NEAR.into(), SERVER.into(), protocol, port)).verdict
    }

    const ADMITTED: Admitted<'_> = Admitted { from: "near", to: "server", ports: (PORT, PORT) };

    #[test]
    fn of_many_rules_the_last_one_admits_and_nothing_else_does() {
        for count in [10, 1000] {
            let world = judged(rules(count, ADMITTED));
            for direction in [Direction::Ingress, Direction::Egress] {
                let all = world.policies.values().filter_map(|policy| policy.rules(direction)).flatten();
                assert_eq!(all.count(), count);
            }
            assert_eq!(verdict(&world, RowProtocol::Ports(Protocol::Tcp), PORT), Verdict::Allow);
            assert_eq!(verdict(&world, RowProtocol::Ports(Protocol::Tcp), PORT + 1), Verdict::Deny);
            assert_eq!(verdict(&world, RowProtocol::Ports(Protocol::Udp), PORT), Verdict::Deny);
            let mut without = world.clone();
            let last = without.policies.values_mut().next_back().unwrap();
            for rules in [&mut last.ingress, &mut last.egress] {
                rules.as_mut().unwrap().pop().unwrap();
            }
            assert_eq!(
                verdict(&without, RowProtocol::Ports(Protocol::Tcp), PORT),
                Verdict::Deny,
                "another rule admits, too"
            );
        }
    }

    #[test]
    fn blocks_are_all_different_and_only_the_last_admits() {
        let objects = blocks(10_000, "10.244.1.0/24");
        let text = objects.first().unwrap().to_string();
        assert!(text.len() < 1_500_000, "an API server takes no object of {} bytes", text.len());
        let listed = objects.first().unwrap().pointer("/spec/ingress/0/from").unwrap().as_array().unwrap().clone();
        let nets: BTreeSet<IpNet> = listed
            .iter()
            .map(|peer| peer.pointer("/ipBlock/cidr").unwrap().as_str().unwrap().parse().unwrap())
            .collect();
        assert_eq!(nets.len(), 10_000);
        // In order a network comes right before what is inside it.
        assert!(nets.iter().zip(nets.iter().skip(1)).all(|(one, next)| !one.contains(next)));
        let world = judged(objects);
        assert_eq!(verdict(&world, RowProtocol::Ports(Protocol::Tcp), PORT), Verdict::Allow);
        assert_eq!(verdict(&world, RowProtocol::Ports(Protocol::Udp), PORT), Verdict::Deny);
        assert_eq!(verdict(&judged(blocks(50, "10.9.0.0/16")), RowProtocol::Ports(Protocol::Tcp), PORT), Verdict::Deny);
    }

    #[test]
    fn a_change_of_who_may_come_in_changes_the_verdict() {
        let verdict = |from| verdict(&judged(vec![only(from, "server")]), RowProtocol::Ports(Protocol::Udp), PORT);
        assert_eq!([verdict("near"), verdict("nobody")], [Verdict::Allow, Verdict::Deny]);
    }

    #[test]
    fn a_large_cluster_has_what_was_asked_for_and_no_address_twice() {
        let scale = Scale::of_policies(1000);
        let world = world([scale.namespaces(), scale.pods("n1"), scale.network_policies()].concat()).unwrap();
        let labels: BTreeSet<_> = world.pods.values().map(|pod| (*pod.labels).clone()).collect();
        assert_eq!([world.policies.len(), world.pods.len(), labels.len()], [1000, 5000, 500]);
        let addresses: BTreeSet<_> = world.pods.values().flat_map(|pod| pod.ips.to_vec()).collect();
        assert_eq!(addresses.len(), 5000);
        let local = world.pods.values().filter(|pod| pod.node.as_ref().is_some_and(|node| node.to_string() == "n1"));
        assert!((50..150).contains(&local.count()), "a node's share");
    }
}
