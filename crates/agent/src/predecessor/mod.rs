//! The network that was on this node before: Flannel, or Canal (Flannel with Calico's policy).
//!
//! Its pods keep their addresses and devices until they are recreated. Until then their addresses are nobody else's ([`host_local`]),
//! they are reached through the kernel's stack, and pods here know them. Its CNI configuration is set aside when this network is
//! ready, and not before ([`conflists`]). Nodes on which it still runs find this one by what it writes on node objects
//! ([`announce`]). Nothing of it is deleted here: that is `towpath node migrate --clean`.

pub mod announce;
pub mod conflists;
pub mod host_local;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use towpath_model::{NamespacedName, NodeName, World};

use host_local::HostLocalLease;

/// What the network before still has on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remains {
    /// Addresses in the node's pod ranges that its containers hold, or may hold.
    pub addresses: BTreeSet<IpAddr>,
    /// Kubernetes' pods among them, by address.
    pub pods: BTreeMap<IpAddr, NamespacedName>,
    /// Flannel knows this node, or did.
    pub flannel_here: bool,
}

impl Remains {
    /// Its pods by name, each once.
    pub fn names(&self) -> BTreeSet<&NamespacedName> {
        self.pods.values().collect()
    }

    /// In words, for status; none when nothing is left.
    pub fn in_words(&self) -> Option<String> {
        const NAMED: usize = 5;
        let pods = self.names();
        if pods.is_empty() {
            return None;
        }
        let count = pods.len();
        let mut names: Vec<String> = pods.into_iter().take(NAMED).map(ToString::to_string).collect();
        if count > NAMED {
            names.push("…".to_owned());
        }
        let (pods, them) = if count == 1 { ("pod is", "it") } else { ("pods are", "them") };
        Some(format!(
            "{count} {pods} still on the network before (Flannel or Canal), where no policy of ours is enforced: recreate {them} ({})",
            names.join(", ")
        ))
    }
}

/// Whether Flannel is, or was, on this node: it keeps a subnet for it in the API, or its device is here.
pub fn flannel_here(world: &World, node: &NodeName) -> bool {
    world.nodes.get(node).is_some_and(|node| node.flannel.is_some())
        || towpath_datapath::predecessor::has_tunnel().unwrap_or_else(|error| {
            tracing::warn!(%error, "could not look for Flannel's device; taking it for absent");
            false
        })
}

/// What is left, from the leases of the network before and the pods that the API server binds to this node. `ours` are addresses that
/// were given here, now or before; `was_here`: there are other signs of that network than leases.
pub fn remains(
    world: &World,
    node: &NodeName,
    ranges: &[IpNet],
    leases: &[HostLocalLease],
    was_here: bool,
    ours: impl Fn(IpAddr) -> bool,
) -> Remains {
    let flannel_here = world.nodes.get(node).is_some_and(|node| node.flannel.is_some());
    let mut remains = Remains { flannel_here, ..Remains::default() };
    // Where it never was it has no pods: what the API server says of ours that have just gone is no sign of it.
    if leases.is_empty() && !was_here {
        return remains;
    }
    let theirs = |address: &IpAddr| ranges.iter().any(|range| range.contains(address)) && !ours(*address);
    for pod in world.pods.values().filter(|pod| pod.node.as_ref() == Some(node) && pod.on_pod_network()) {
        remains
            .pods
            .extend(pod.ips.iter().filter(|address| theirs(address)).map(|address| (*address, pod.name.clone())));
    }
    // A lease from before the machine booted is of a container that is gone; only its address may be a present pod's.
    let alive = leases.iter().filter(|lease| !lease.outlived).map(|lease| lease.address);
    remains.addresses.extend(alive.filter(theirs).chain(remains.pods.keys().copied()));
    remains
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1 as core;
    use towpath_model::Pod;

    use super::*;

    fn lease(address: &str, outlived: bool) -> HostLocalLease {
        HostLocalLease {
            address: address.parse().unwrap(),
            container: format!("c-{address}"),
            ifname: "eth0".to_owned(),
            file: address.into(),
            outlived,
        }
    }

    fn world(pods: &[(&str, &str, &str)]) -> World {
        let mut world = World::default();
        for (name, node, ip) in pods {
            let object = serde_json::json!({
                "metadata": {"namespace": "a", "name": name, "uid": name},
                "spec": {"nodeName": node, "containers": []}, "status": {"podIPs": [{"ip": ip}], "phase": "Running"},
            });
            let pod = Pod::try_from(&serde_json::from_value::<core::Pod>(object).unwrap()).unwrap();
            world.pods.insert(pod.name.clone(), pod);
        }
        world
    }

    fn found(pods: &[(&str, &str, &str)], leases: &[HostLocalLease], ours: &str) -> (Vec<String>, Vec<String>) {
        let ours: Option<IpAddr> = ours.parse().ok();
        let ranges = ["10.244.1.0/24".parse().unwrap()];
        let remains = remains(&world(pods), &NodeName::new("n1"), &ranges, leases, false, |a| Some(a) == ours);
        (
            remains.addresses.iter().map(ToString::to_string).collect(),
            remains.pods.values().map(|p| p.name.clone()).collect(),
        )
    }

    #[test]
    fn leases_and_pods_of_this_node_hold_their_addresses() {
        let pods = [
            ("old", "n1", "10.244.1.2"),
            ("elsewhere", "n2", "10.244.1.4"),
            ("host", "n1", "192.0.2.1"),
            ("new", "n1", "10.244.1.9"),
        ];
        let leases = [lease("10.244.1.2", false), lease("10.244.1.3", false), lease("10.88.0.2", false)];
        let (addresses, names) = found(&pods, &leases, "10.244.1.9");
        assert_eq!(
            addresses,
            ["10.244.1.2", "10.244.1.3"],
            "a container that Kubernetes does not know holds its address too"
        );
        assert_eq!(names, ["old"]);
    }

    #[test]
    fn what_outlived_a_boot_is_held_only_by_a_pod() {
        let leases = [lease("10.244.1.2", true), lease("10.244.1.3", true)];
        assert_eq!(found(&[("old", "n1", "10.244.1.2")], &leases, "").0, ["10.244.1.2"]);
    }

    #[test]
    fn where_it_never_was_nothing_is_left() {
        assert_eq!(found(&[("gone", "n1", "10.244.1.2")], &[], ""), (Vec::new(), Vec::new()));
    }

    #[test]
    fn its_pods_are_known_by_other_signs_when_its_leases_cannot_be_seen() {
        let world = world(&[("old", "n1", "10.244.1.2")]);
        let remains = remains(&world, &NodeName::new("n1"), &["10.244.1.0/24".parse().unwrap()], &[], true, |_| false);
        assert_eq!(remains.addresses, BTreeSet::from(["10.244.1.2".parse().unwrap()]));
    }

    #[test]
    fn status_names_some_pods_and_counts_all() {
        let pods = (0..7).map(|n| (IpAddr::from([10, 244, 1, n]), NamespacedName::new("a", format!("p{n}")))).collect();
        let text = Remains { pods, ..Remains::default() }.in_words().unwrap();
        assert!(text.starts_with("7 pods are") && text.contains("a/p0") && !text.contains("a/p6"), "{text}");
        assert_eq!(Remains::default().in_words(), None);
    }
}
