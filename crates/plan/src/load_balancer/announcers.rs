//! Which nodes may announce the address of a load balancer, and in which order they try to.
//!
//! Every node computes this for itself from what it knows of the cluster; that two may know it differently for a moment does no harm, for
//! who announces is decided by a Lease. The order (rendezvous hashing) spreads addresses over nodes, and a node that comes or goes
//! moves no address but its own.

use std::collections::BTreeMap;
use std::net::IpAddr;

use towpath_model::load_balancer::is_our_class;
use towpath_model::{AddressPool, NamespacedName, Node, NodeName, Service, ServiceKind, TrafficPolicy, World};

/// The label with which a node is no way in (KEP-1143).
const EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";

/// This node's part in announcing an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its place among the nodes that may announce it; 0 tries first.
    pub rank: usize,
    /// The pool that the address is from.
    pub pool: String,
}

/// The addresses that this node may announce: those that we gave, in a pool that this node is for, with a node's endpoint where only such
/// a node leads to them.
///
/// A node that says an address is its own announces it by itself, and is no candidate; it silences nobody else, or a kubelet could
/// take any address away by a line in its status.
pub fn candidates(world: &World, pools: &BTreeMap<String, AddressPool>, own: &NodeName) -> BTreeMap<IpAddr, Candidate> {
    let mut holders: BTreeMap<IpAddr, (&AddressPool, Vec<&Service>)> = BTreeMap::new();
    for service in world.services.values() {
        let ours = service.kind == ServiceKind::LoadBalancer
            && service.balanced_by_us
            && is_our_class(service.load_balancer_class.as_deref())
            && !service.for_other_proxies();
        for address in service.load_balancer_ips.iter().filter(|_| ours) {
            // Who may write a Service's status must not make a node answer for any address.
            let Some(pool) = pools.values().find(|pool| pool.contains(*address)) else { continue };
            holders.entry(*address).or_insert((pool, Vec::new())).1.push(service);
        }
    }
    let local = local_nodes(world, holders.values().flat_map(|(_, services)| services.iter().copied()));
    let eligible: Vec<&Node> = world
        .nodes
        .values()
        .filter(|node| (node.ready || node.name == *own) && !node.labels.contains_key(EXCLUDED))
        .collect();
    let place = |address: IpAddr, pool: &AddressPool, services: &[&Service]| {
        // Services that share an address under Local have the same pods; whichever of them has an endpoint here will do.
        let policies = services.iter().filter(|service| service.external_policy == TrafficPolicy::Local);
        let only: Vec<&BTreeMap<&NodeName, Endpoints>> =
            policies.filter_map(|service| local.get(&service.name)).collect();
        let endpoints = |node: &NodeName| match only.is_empty() {
            true => Some(Endpoints::Ready),
            false => only.iter().filter_map(|nodes| nodes.get(node)).min().copied(),
        };
        let may =
            eligible.iter().filter(|node| !node.internal_ips.contains(&address) && pool.nodes.matches(&node.labels));
        let mut nodes: Vec<(Endpoints, u64, &NodeName)> =
            may.filter_map(|node| Some((endpoints(&node.name)?, weight(&node.name, address), &node.name))).collect();
        nodes.sort_unstable();
        nodes.iter().position(|(_, _, node)| *node == own)
    };
    let with_rank = holders.into_iter().filter_map(|(address, (pool, services))| {
        let rank = place(address, pool, &services)?;
        Some((address, Candidate { rank, pool: pool.name.clone() }))
    });
    with_rank.collect()
}

/// Whether candidates depend on where endpoints are: some load balancer's external policy is `Local`.
pub fn follow_endpoints(world: &World) -> bool {
    let is_local =
        |service: &Service| service.external_policy == TrafficPolicy::Local && !service.load_balancer_ips.is_empty();
    world.services.values().any(is_local)
}

/// What endpoints a node has for an address: with those that stay it comes before one with those that go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Endpoints {
    Ready,
    Terminating,
}

/// Nodes with an endpoint that takes connections, of each Service whose external policy is `Local`.
fn local_nodes<'a>(
    world: &'a World,
    services: impl Iterator<Item = &'a Service>,
) -> BTreeMap<&'a NamespacedName, BTreeMap<&'a NodeName, Endpoints>> {
    let mut nodes: BTreeMap<&NamespacedName, BTreeMap<&NodeName, Endpoints>> = services
        .filter(|service| service.external_policy == TrafficPolicy::Local)
        .map(|service| (&service.name, BTreeMap::new()))
        .collect();
    if nodes.is_empty() {
        return nodes;
    }
    for slice in world.slices.values().filter(|slice| !slice.headless) {
        let Some(found) = nodes.get_mut(&slice.service) else { continue };
        let all = world.services.get(&slice.service).is_some_and(|service| service.publish_not_ready);
        // Those that still serve while they terminate count, too: with them gone the address would be nobody's (KEP-1669).
        let takes = |conditions: towpath_model::Conditions| match conditions.terminating {
            false if all || conditions.ready => Some(Endpoints::Ready),
            true if all || conditions.ready || conditions.serving => Some(Endpoints::Terminating),
            _ => None,
        };
        for endpoint in &slice.endpoints {
            let (Some(node), Some(has)) = (&endpoint.node, takes(endpoint.conditions)) else { continue };
            let best = found.entry(node).or_insert(has);
            *best = has.min(*best);
        }
    }
    nodes
}

/// FNV-1a (the same on every node and in every version), mixed once more, for names and addresses that differ in one digit.
fn weight(node: &NodeName, address: IpAddr) -> u64 {
    let octets = match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let hash = node
        .as_str()
        .bytes()
        .chain(octets)
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let mixed = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use towpath_model::{Conditions, Endpoint, EndpointSlice, Protocol, Selector, ServicePort, TargetPort};

    const READY: Conditions = Conditions { ready: true, serving: true, terminating: false };

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn world(nodes: usize) -> World {
        let mut world = World::default();
        for number in 1..=nodes {
            let name = NodeName::new(format!("n{number}"));
            let node = Node {
                name: name.clone(),
                labels: Default::default(),
                internal_ips: vec![ip(&format!("192.0.2.{number}"))],
                other_ips: Vec::new(),
                created: 0,
                pod_cidrs: Vec::new(),
                ready: true,
                added: Default::default(),
                flannel: None,
            };
            world.nodes.insert(name, node);
        }
        world
    }

    fn add(world: &mut World, name: &str, address: &str, policy: TrafficPolicy) {
        let name = NamespacedName::new("default", name);
        let service = Service {
            name: name.clone(),
            labels: Default::default(),
            kind: ServiceKind::LoadBalancer,
            cluster_ips: vec![ip("10.96.0.7")],
            external_ips: Vec::new(),
            load_balancer_ips: vec![ip(address)],
            load_balancer_class: None,
            balanced_by_us: true,
            ports: vec![ServicePort::new("", Protocol::Tcp, 80, TargetPort::Number(80), None)],
            has_selector: true,
            affinity_seconds: None,
            internal_policy: TrafficPolicy::Cluster,
            external_policy: policy,
            publish_not_ready: false,
            algorithm: Default::default(),
            source_ranges: None,
            misunderstood: Vec::new(),
            health_check_port: None,
        };
        world.services.insert(name, service);
    }

    fn endpoint(world: &mut World, service: &str, node: &str, conditions: Conditions) {
        let service = NamespacedName::new("default", service);
        let name = NamespacedName::new("default", format!("{}-{node}", service.name));
        let endpoint = Endpoint {
            address: ip("10.244.0.9"),
            conditions,
            hostname: None,
            node: Some(NodeName::new(node)),
            pod: None,
            hints: None,
        };
        let slice = EndpointSlice {
            name: name.clone(),
            service,
            endpoints: vec![endpoint],
            ports: Vec::new(),
            headless: false,
        };
        world.slices.insert(name, slice);
    }

    fn pools() -> BTreeMap<String, AddressPool> {
        let pool = AddressPool {
            name: "p".to_owned(),
            uid: String::new(),
            ranges: vec!["192.0.2.0/24".parse().unwrap()],
            auto_assign: true,
            services: Default::default(),
            namespaces: Default::default(),
            shared_across_namespaces: false,
            nodes: Default::default(),
        };
        BTreeMap::from([("p".to_owned(), pool)])
    }

    fn ranks(world: &World, address: &str) -> BTreeMap<String, usize> {
        let rank = |node: &NodeName| Some(candidates(world, &pools(), node).get(&ip(address))?.rank);
        world.nodes.keys().filter_map(|node| Some((node.to_string(), rank(node)?))).collect()
    }

    #[test]
    fn every_node_has_a_place_of_its_own_and_addresses_are_spread() {
        let mut world = world(5);
        let mut first: BTreeMap<String, u32> = BTreeMap::new();
        for number in 100..200 {
            add(&mut world, &format!("s{number}"), &format!("192.0.2.{number}"), TrafficPolicy::Cluster);
        }
        for number in 100..200 {
            let ranks = ranks(&world, &format!("192.0.2.{number}"));
            assert_eq!(ranks.values().copied().collect::<BTreeSet<_>>(), (0..5).collect());
            let (node, _) = ranks.iter().find(|(_, rank)| **rank == 0).unwrap();
            *first.entry(node.clone()).or_default() += 1;
        }
        assert!(first.len() == 5 && first.values().all(|count| (8..=35).contains(count)), "{first:?}");
    }

    #[test]
    fn with_the_policy_local_only_nodes_with_an_endpoint_are_candidates() {
        let mut world = world(3);
        add(&mut world, "web", "192.0.2.100", TrafficPolicy::Local);
        assert!(ranks(&world, "192.0.2.100").is_empty(), "no endpoint, nobody");
        assert!(follow_endpoints(&world) && !follow_endpoints(&World::default()));
        endpoint(&mut world, "web", "n2", READY);
        endpoint(&mut world, "web", "n1", Conditions { ready: false, serving: false, terminating: false });
        endpoint(&mut world, "other", "n3", READY);
        assert_eq!(ranks(&world, "192.0.2.100"), BTreeMap::from([("n2".to_owned(), 0)]));
        endpoint(&mut world, "web", "n2", Conditions { ready: false, serving: true, terminating: true });
        assert_eq!(ranks(&world, "192.0.2.100").len(), 1, "it still serves");
    }

    #[test]
    fn nodes_whose_endpoints_stay_come_before_those_whose_endpoints_go() {
        let mut world = world(5);
        for number in 100..120 {
            let (name, address) = (format!("s{number}"), format!("192.0.2.{number}"));
            add(&mut world, &name, &address, TrafficPolicy::Local);
            for node in ["n1", "n2", "n3", "n4"] {
                endpoint(&mut world, &name, node, Conditions { ready: false, serving: true, terminating: true });
            }
            endpoint(&mut world, &name, "n5", READY);
            let ranks = ranks(&world, &address);
            assert!(ranks["n5"] == 0 && ranks.len() == 5, "{ranks:?}");
        }
    }

    #[test]
    fn nobody_answers_for_what_is_in_no_pool_or_another_implementations() {
        let mut world = world(2);
        add(&mut world, "stray", "198.51.100.1", TrafficPolicy::Cluster);
        add(&mut world, "theirs", "192.0.2.100", TrafficPolicy::Cluster);
        add(&mut world, "theirs-too", "192.0.2.101", TrafficPolicy::Cluster);
        let mut of = |name: &str, change: fn(&mut Service)| {
            change(world.services.get_mut(&NamespacedName::new("default", name)).unwrap());
        };
        of("theirs", |service| service.load_balancer_class = Some("metallb".to_owned()));
        of("theirs-too", |service| service.balanced_by_us = false);
        assert_eq!(candidates(&world, &pools(), &NodeName::new("n2")), BTreeMap::new());
    }

    #[test]
    fn a_node_that_claims_an_address_silences_only_itself() {
        let mut world = world(3);
        add(&mut world, "web", "192.0.2.100", TrafficPolicy::Cluster);
        world.nodes.get_mut(&NodeName::new("n2")).unwrap().internal_ips.push(ip("192.0.2.100"));
        let ranks = ranks(&world, "192.0.2.100");
        assert_eq!(ranks.values().copied().collect::<BTreeSet<_>>(), (0..2).collect());
        assert!(!ranks.contains_key("n2"), "{ranks:?}");
    }

    #[test]
    fn only_nodes_that_the_pool_is_for_announce_its_addresses() {
        let mut world = world(3);
        add(&mut world, "web", "192.0.2.100", TrafficPolicy::Cluster);
        world.nodes.get_mut(&NodeName::new("n3")).unwrap().labels.insert("rack".to_owned(), "a".to_owned());
        let mut pools = pools();
        pools.get_mut("p").unwrap().nodes = Selector::equals([("rack", "a")]);
        let rank = |node: &str| candidates(&world, &pools, &NodeName::new(node)).values().map(|c| c.rank).next();
        assert_eq!(["n1", "n2", "n3"].map(rank), [None, None, Some(0)]);
    }

    #[test]
    fn excluded_and_unready_nodes_are_no_candidates() {
        let mut world = world(3);
        add(&mut world, "web", "192.0.2.100", TrafficPolicy::Cluster);
        world.nodes.get_mut(&NodeName::new("n1")).unwrap().labels.insert(EXCLUDED.to_owned(), String::new());
        world.nodes.get_mut(&NodeName::new("n2")).unwrap().ready = false;
        assert!(!ranks(&world, "192.0.2.100").contains_key("n1"));
        let n3 = candidates(&world, &pools(), &NodeName::new("n3"));
        assert_eq!(n3[&ip("192.0.2.100")].rank, 0, "the others do not count");
    }
}
