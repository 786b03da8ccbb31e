//! Which ranges are Services' own: what `ServiceCIDR` objects say (KEP-1880), or, where the API has no such kind, what is configured.
//!
//! Much follows from them on a node: what is for an address there and no Service's port is refused, no endpoint may be in them, and a
//! Service cannot take one of their addresses for the outside. So a range that would swallow pods, nodes or the node's own DNS
//! server is left out and named, whoever wrote it: Services in it work all the same, since each of their addresses is known by itself.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use towpath_model::{ServiceCidr, World};

/// What nobody else's range may touch.
#[derive(Clone, Copy, Debug)]
pub struct Own<'a> {
    /// Nodes, with their addresses and pod ranges.
    pub world: &'a World,
    /// Pod ranges of the cluster.
    pub cluster: &'a [IpNet],
    /// Addresses of the node-local DNS server.
    pub dns: &'a [IpAddr],
}

/// The ranges, and what was left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceRanges {
    /// Sorted, none in another.
    pub ranges: Vec<IpNet>,
    /// Why an object's range does not count, by the object's name, for people.
    pub refused: BTreeMap<String, Vec<String>>,
}

/// The ranges that hold now. `objects`: none where the API has no such kind. Without any that can be used it is `configured`.
pub fn plan(objects: Option<&BTreeMap<String, ServiceCidr>>, configured: &[IpNet], own: &Own<'_>) -> ServiceRanges {
    let mut planned = ServiceRanges::default();
    for (name, range) in objects.into_iter().flatten().flat_map(|(name, o)| o.ranges.iter().map(move |r| (name, r))) {
        match touched(range, own) {
            None => planned.ranges.push(*range),
            Some(what) => planned.refused.entry(name.clone()).or_default().push(format!(
                "{range} overlaps {what}: it does not count as a range of Services; delete this ServiceCIDR and choose a range \
                 that is used nowhere else"
            )),
        }
    }
    if planned.ranges.is_empty() {
        planned.ranges = configured.to_vec();
    }
    planned.ranges = IpNet::aggregate(&planned.ranges);
    planned
}

/// What of the cluster's own a range holds, or is in.
fn touched(range: &IpNet, own: &Own<'_>) -> Option<String> {
    let overlaps = |other: &IpNet| range.contains(&other.network()) || other.contains(&range.network());
    if let Some(pods) = own.cluster.iter().find(|pods| overlaps(pods)) {
        return Some(format!("the pod range {pods}"));
    }
    if let Some(dns) = own.dns.iter().find(|dns| range.contains(*dns)) {
        return Some(format!("the node-local DNS address {dns}"));
    }
    own.world.nodes.values().find_map(|node| {
        let pods = node.pod_cidrs.iter().find(|pods| overlaps(pods));
        let address = node.internal_ips.iter().find(|ip| range.contains(*ip));
        pods.map(|pods| format!("the pod range {pods} of node {}", node.name))
            .or_else(|| address.map(|ip| format!("the address {ip} of node {}", node.name)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use towpath_model::{Node, NodeName};

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn objects(list: &[(&str, &[&str])]) -> BTreeMap<String, ServiceCidr> {
        list.iter().map(|(name, ranges)| ((*name).to_owned(), ServiceCidr { ranges: nets(ranges) })).collect()
    }

    fn world() -> World {
        let node = Node {
            name: NodeName::new("n1"),
            labels: Default::default(),
            internal_ips: vec!["192.0.2.1".parse().unwrap()],
            other_ips: Vec::new(),
            created: 0,
            pod_cidrs: nets(&["10.5.0.0/24"]),
            ready: true,
            added: Default::default(),
            flannel: None,
        };
        World { nodes: BTreeMap::from([(node.name.clone(), node)]), ..World::default() }
    }

    fn planned(objects: Option<&BTreeMap<String, ServiceCidr>>) -> ServiceRanges {
        let (world, cluster, dns) = (world(), nets(&["10.244.0.0/16"]), ["169.254.116.10".parse().unwrap()]);
        plan(objects, &nets(&["10.96.0.0/12"]), &Own { world: &world, cluster: &cluster, dns: &dns })
    }

    #[test]
    fn objects_take_the_place_of_what_is_configured_and_only_where_they_are_served() {
        assert_eq!(planned(None).ranges, nets(&["10.96.0.0/12"]));
        assert_eq!(planned(Some(&objects(&[]))).ranges, nets(&["10.96.0.0/12"]), "before the first object is there");
        let both = objects(&[("kubernetes", &["10.43.0.0/16", "fd43::/112"]), ("more", &["10.50.0.0/24"])]);
        assert_eq!(planned(Some(&both)).ranges, nets(&["10.43.0.0/16", "10.50.0.0/24", "fd43::/112"]));
        let nested = objects(&[("kubernetes", &["10.43.0.0/16"]), ("inside", &["10.43.7.0/24"])]);
        assert_eq!(planned(Some(&nested)).ranges, nets(&["10.43.0.0/16"]));
    }

    #[test]
    fn a_range_that_would_swallow_what_is_the_clusters_own_is_left_out_by_name() {
        for (range, what) in [
            ("10.0.0.0/8", "the pod range 10.244.0.0/16"),
            ("10.244.3.0/24", "the pod range 10.244.0.0/16"),
            ("10.5.0.128/25", "the pod range 10.5.0.0/24 of node n1"),
            ("192.0.0.0/16", "the address 192.0.2.1 of node n1"),
            ("169.254.0.0/16", "the node-local DNS address 169.254.116.10"),
        ] {
            let planned = planned(Some(&objects(&[("kubernetes", &["10.96.0.0/16"]), ("odd", &[range])])));
            assert_eq!(planned.ranges, nets(&["10.96.0.0/16"]), "{range}");
            assert!(planned.refused["odd"][0].contains(what), "{:?}", planned.refused);
        }
        let alone = planned(Some(&objects(&[("odd", &["192.0.0.0/16"])])));
        assert_eq!((alone.ranges, alone.refused.len()), (nets(&["10.96.0.0/12"]), 1));
    }
}
