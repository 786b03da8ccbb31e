//! Addresses that other nodes gave to their pods, and which of them are believed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use towpath_model::custom::NodeNetwork;
use towpath_model::{NamespacedName, NodeName, Uid, World, canonical};

use crate::ipam::Lease;

/// Addresses that a node says it gave to a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    /// The pod.
    pub pod: NamespacedName,
    /// Its uid; empty: the container runtime did not say.
    pub uid: Uid,
    /// The addresses, canonical.
    pub addresses: Vec<IpAddr>,
}

/// What a node's object says. Text that is no address is left out.
pub fn of(object: &NodeNetwork) -> Vec<Given> {
    let pods = object.status.iter().flat_map(|status| &status.pods);
    pods.map(|pod| Given {
        pod: NamespacedName::new(&pod.namespace, &pod.name),
        uid: pod.uid.as_str().into(),
        addresses: pod.ips.iter().filter_map(|ip| ip.parse().ok()).map(canonical).collect(),
    })
    .collect()
}

/// Addresses by pod that are believed although the pod's status does not say them yet.
///
/// A node speaks only for pods that are bound to it, in the life that it names, and only of addresses in the ranges that it was
/// assigned: a node that lies can lend its own pods' labels to its own addresses, which it can do anyway. What another pod's
/// status says is newer than what a node has not yet taken back.
pub fn believed(world: &World, given: &BTreeMap<NodeName, Vec<Given>>) -> BTreeMap<NamespacedName, Vec<IpAddr>> {
    let mut believed: BTreeMap<NamespacedName, Vec<IpAddr>> = BTreeMap::new();
    for (name, pods) in given {
        let Some(node) = world.nodes.get(name) else { continue };
        for entry in pods {
            let Some(pod) = world.pods.get(&entry.pod) else { continue };
            let same_life = !pod.uid.is_other_than(&entry.uid);
            if pod.node.as_ref() != Some(name) || !same_life || !pod.ips.is_empty() || !pod.on_pod_network() {
                continue;
            }
            let own = |address: &&IpAddr| node.pod_cidrs.iter().any(|range| range.contains(*address));
            let addresses: Vec<IpAddr> = entry.addresses.iter().filter(own).copied().collect();
            if !addresses.is_empty() {
                believed.insert(entry.pod.clone(), addresses);
            }
        }
    }
    if believed.is_empty() {
        // Mostly: a pod's status says its addresses within seconds, and all pods need not be asked for theirs.
        return believed;
    }
    let wanted: BTreeSet<IpAddr> = believed.values().flatten().copied().collect();
    let reported: BTreeSet<IpAddr> = world
        .pods
        .values()
        .filter(|pod| pod.on_pod_network())
        .flat_map(|pod| pod.ips.iter().filter(|address| wanted.contains(*address)).copied())
        .collect();
    believed.retain(|_, addresses| {
        addresses.retain(|address| !reported.contains(address));
        !addresses.is_empty()
    });
    believed
}

/// Addresses by pod that are believed whatever the pod's status says: of other nodes' pods what is [`believed`], of this node's what it gave out
/// itself.
///
/// A sandbox of another life than the one that the API has told of (a StatefulSet's pod is there again under its name, and its news are late; or it is
/// an earlier one's, not removed yet) is that of a pod of which nothing is known: it stands under a name that no pod can have. By the labels of another
/// life it would be judged as the pod that it is not.
pub fn addresses(
    world: &World,
    given: &BTreeMap<NodeName, Vec<Given>>,
    own: &[Lease],
) -> BTreeMap<NamespacedName, Vec<IpAddr>> {
    let mut addresses = believed(world, given);
    let mut mine: BTreeMap<NamespacedName, Vec<IpAddr>> = BTreeMap::new();
    for lease in own {
        let Some(pod) = &lease.pod else { continue };
        let told = world.pods.get(pod).map(|pod| &pod.uid);
        let same_life = told.is_none_or(|told| !told.is_other_than(&lease.uid.as_str().into()));
        let name = if same_life {
            pod.clone()
        } else {
            NamespacedName::new(&pod.namespace, format!("{} {}", pod.name, lease.uid))
        };
        mine.entry(name).or_default().extend(&lease.addresses);
    }
    addresses.extend(mine);
    addresses
}

#[cfg(test)]
mod late_news;

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1 as core;
    use towpath_model::{Node, Pod};

    use super::*;

    fn world() -> World {
        let object = |value| serde_json::from_value::<core::Node>(value).unwrap();
        let pod = |name: &str, node: &str, ip: Option<&str>| {
            let mut value = serde_json::json!({
                "metadata": {"namespace": "a", "name": name, "uid": format!("uid-{name}")},
                "spec": {"nodeName": node, "containers": []}, "status": {},
            });
            if let Some(ip) = ip {
                value["status"]["podIPs"] = serde_json::json!([{"ip": ip}]);
            }
            Pod::try_from(&serde_json::from_value::<core::Pod>(value).unwrap()).unwrap()
        };
        let mut world = World::default();
        for (name, range) in [("n1", "10.244.1.0/24"), ("n2", "10.244.2.0/24")] {
            let node = object(serde_json::json!({"metadata": {"name": name}, "spec": {"podCIDRs": [range]}}));
            world.nodes.insert(NodeName::new(name), Node::try_from(&node).unwrap());
        }
        for pod in [pod("new", "n2", None), pod("known", "n2", Some("10.244.2.9")), pod("elsewhere", "n1", None)] {
            world.pods.insert(pod.name.clone(), pod);
        }
        world
    }

    fn given(pod: &str, uid: &str, ip: &str) -> BTreeMap<NodeName, Vec<Given>> {
        let text = serde_json::json!({
            "apiVersion": "towpath.dev/v1alpha1", "kind": "NodeNetwork", "metadata": {"name": "n2"},
            "status": {"pods": [{"namespace": "a", "name": pod, "uid": uid, "ips": [ip]}]},
        });
        BTreeMap::from([(NodeName::new("n2"), of(&serde_json::from_value(text).unwrap()))])
    }

    #[test]
    fn a_pod_that_its_status_does_not_know_yet_is_known_by_what_its_node_says() {
        let expected = BTreeMap::from([(NamespacedName::new("a", "new"), vec!["10.244.2.7".parse().unwrap()])]);
        for uid in ["uid-new", ""] {
            assert_eq!(believed(&world(), &given("new", uid, "10.244.2.7")), expected, "{uid:?}");
        }
    }

    #[test]
    fn a_node_speaks_for_nobody_else_and_of_no_other_addresses() {
        for (pod, uid, ip, why) in [
            ("elsewhere", "uid-elsewhere", "10.244.2.7", "another node's pod"),
            ("new", "uid-old", "10.244.2.7", "an earlier pod of that name"),
            ("new", "uid-new", "10.244.1.7", "another node's address"),
            ("new", "uid-new", "192.0.2.1", "an address of nobody"),
            ("new", "uid-new", "nonsense", "no address"),
            ("unheard", "uid", "10.244.2.7", "a pod that nobody knows"),
            ("known", "uid-known", "10.244.2.7", "a pod whose status says its address"),
            ("new", "uid-new", "10.244.2.9", "an address that another pod's status says"),
        ] {
            assert!(believed(&world(), &given(pod, uid, ip)).is_empty(), "{why}");
        }
    }
}
