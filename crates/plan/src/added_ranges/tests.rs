//! Who gets which range, by example, and that nobody ever has what is another's for any wishes.

use proptest::prelude::*;
use towpath_model::AddedRanges;

use super::*;

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// A node; the number says its age.
fn node(name: &str, created: i64, ip: &str, assigned: &[&str], wanted: &[&str]) -> Node {
    Node {
        name: NodeName::new(name),
        labels: Default::default(),
        internal_ips: vec![ip.parse().unwrap()],
        other_ips: Vec::new(),
        pod_cidrs: nets(assigned),
        added: AddedRanges { wanted: nets(wanted), ..AddedRanges::default() },
        created,
        ready: true,
        flannel: None,
    }
}

fn cluster() -> Within {
    Within::Cluster {
        cluster: nets(&["10.244.0.0/16", "10.245.0.0/16", "fd00::/56"]),
        services: nets(&["10.96.0.0/12"]),
    }
}

/// The nodes after it is settled once, and what was refused.
fn after(nodes: &mut BTreeMap<NodeName, Node>, said: &BTreeMap<NodeName, Says>) -> BTreeMap<NodeName, Vec<String>> {
    let settled = settle(nodes, said, &cluster());
    for (name, node) in nodes {
        node.put_in_force(settled.in_force.get(name).cloned().unwrap_or_default());
    }
    settled.refused
}

fn by_name(nodes: Vec<Node>) -> BTreeMap<NodeName, Node> {
    nodes.into_iter().map(|node| (node.name.clone(), node)).collect()
}

fn uses(ranges: &[&str]) -> Says {
    Says { added_ranges: nets(ranges), ..Says::default() }
}

fn two() -> BTreeMap<NodeName, Node> {
    by_name(vec![
        node("n1", 1, "192.0.2.1", &["10.244.1.0/24", "fd00:0:0:1::/64"], &[]),
        node("n2", 2, "192.0.2.2", &["10.244.2.0/24", "fd00:0:0:2::/64"], &[]),
    ])
}

fn wants(nodes: &mut BTreeMap<NodeName, Node>, name: &str, ranges: &[&str]) {
    nodes.get_mut(&NodeName::new(name)).unwrap().added.wanted = nets(ranges);
}

fn ranges_of<'n>(nodes: &'n BTreeMap<NodeName, Node>, name: &str) -> &'n [IpNet] {
    &nodes[&NodeName::new(name)].pod_cidrs
}

#[test]
fn what_is_free_is_added_after_what_was_assigned_and_goes_with_the_wish() {
    let (mut nodes, said) = (two(), BTreeMap::new());
    wants(&mut nodes, "n1", &["10.245.1.0/24", "fd00:0:0:11::/64", "10.244.77.0/25"]);
    for _ in 0..2 {
        assert_eq!(after(&mut nodes, &said), BTreeMap::new());
        let all = ["10.244.1.0/24", "fd00:0:0:1::/64", "10.245.1.0/24", "fd00:0:0:11::/64", "10.244.77.0/25"];
        assert_eq!(ranges_of(&nodes, "n1"), nets(&all));
        assert_eq!(nodes[&NodeName::new("n1")].assigned().copied().collect::<Vec<_>>(), nets(&all[..2]));
    }
    wants(&mut nodes, "n1", &["10.244.77.0/25"]);
    after(&mut nodes, &said);
    assert_eq!(ranges_of(&nodes, "n1"), nets(&["10.244.1.0/24", "fd00:0:0:1::/64", "10.244.77.0/25"]));
}

#[test]
fn what_is_not_to_be_had_is_refused_by_name_and_costs_nothing_else() {
    for (wanted, words) in [
        ("10.244.2.0/24", "overlaps 10.244.2.0/24 of node n2"),
        ("10.244.2.128/25", "overlaps 10.244.2.0/24 of node n2"),
        ("10.244.0.0/16", "overlaps 10.244.1.0/24"),
        ("10.244.1.0/25", "overlaps 10.244.1.0/24, which the node has"),
        ("10.96.4.0/24", "overlaps a Service range"),
        ("10.0.0.0/8", "overlaps a Service range"),
        ("8.8.8.0/24", "not inside the cluster's pod ranges (10.244.0.0/16, 10.245.0.0/16, fd00::/56)"),
        ("fd01::/64", "not inside"),
        ("10.245.3.0/31", "no address for a pod"),
        ("fd00:0:0:9::/127", "no address for a pod"),
    ] {
        let mut nodes = two();
        wants(&mut nodes, "n1", &[wanted, "10.245.9.0/24"]);
        let refused = after(&mut nodes, &BTreeMap::new());
        assert!(refused[&NodeName::new("n1")][0].contains(words), "{wanted}: {refused:?}");
        assert!(refused[&NodeName::new("n1")][0].contains(wanted) && refused.len() == 1, "{refused:?}");
        assert_eq!(ranges_of(&nodes, "n1"), nets(&["10.244.1.0/24", "fd00:0:0:1::/64", "10.245.9.0/24"]));
        assert_eq!(ranges_of(&nodes, "n2"), nets(&["10.244.2.0/24", "fd00:0:0:2::/64"]));
    }
    let mut nodes = by_name(vec![
        node("n1", 1, "192.0.2.1", &["10.244.1.0/24"], &["fd00:0:0:9::/64"]),
        node("n2", 2, "10.245.7.9", &["10.244.2.0/24"], &["10.245.7.0/24"]),
    ]);
    let refused = after(&mut nodes, &BTreeMap::new());
    assert!(refused[&NodeName::new("n1")][0].contains("no range of IPv6"), "{refused:?}");
    assert!(refused[&NodeName::new("n2")][0].contains("10.245.7.9, the address of node n2"), "{refused:?}");
}

#[test]
fn of_two_who_has_it_keeps_it_then_who_uses_it_then_the_older_has_it() {
    let mut nodes = two();
    wants(&mut nodes, "n2", &["10.245.1.0/24"]);
    after(&mut nodes, &BTreeMap::new());
    wants(&mut nodes, "n1", &["10.245.0.0/23"]);
    let refused = after(&mut nodes, &BTreeMap::new());
    assert!(refused[&NodeName::new("n1")][0].contains("overlaps 10.245.1.0/24 of node n2"), "{refused:?}");
    // An agent that starts does not know who had it.
    nodes.values_mut().for_each(|node| node.put_in_force(Vec::new()));
    let said = BTreeMap::from([(NodeName::new("n2"), uses(&["10.245.1.0/24"]))]);
    let refused = after(&mut nodes.clone(), &said);
    assert!(refused.contains_key(&NodeName::new("n1")), "{refused:?}");
    let refused = after(&mut nodes, &BTreeMap::new());
    assert!(refused.contains_key(&NodeName::new("n2")), "{refused:?}");
}

#[test]
fn what_a_node_is_assigned_is_its_own_whoever_added_it_before() {
    let mut nodes = two();
    wants(&mut nodes, "n1", &["10.244.3.0/24", "10.245.1.0/24"]);
    after(&mut nodes, &BTreeMap::new());
    let third = node("n3", 3, "192.0.2.3", &["10.244.3.0/24"], &[]);
    nodes.insert(third.name.clone(), third);
    let refused = after(&mut nodes, &BTreeMap::from([(NodeName::new("n1"), uses(&["10.244.3.0/24"]))]));
    assert!(refused[&NodeName::new("n1")][0].contains("10.244.3.0/24 of node n3"), "{refused:?}");
    assert_eq!(ranges_of(&nodes, "n3"), nets(&["10.244.3.0/24"]));
    assert!(!ranges_of(&nodes, "n1").contains(&"10.244.3.0/24".parse().unwrap()));
}

#[test]
fn a_range_that_is_taken_away_stays_while_it_is_used_and_nobody_else_gets_it() {
    let mut nodes = two();
    wants(&mut nodes, "n1", &["10.245.1.0/24"]);
    after(&mut nodes, &BTreeMap::new());
    wants(&mut nodes, "n1", &[]);
    wants(&mut nodes, "n2", &["10.245.1.0/24"]);
    let mut said = BTreeMap::from([(NodeName::new("n1"), uses(&["10.245.1.0/24"]))]);
    // Also for who has never heard that it was asked for.
    for forgets in [false, true] {
        if forgets {
            nodes.values_mut().for_each(|node| node.put_in_force(Vec::new()));
        }
        let refused = after(&mut nodes, &said);
        assert!(refused[&NodeName::new("n2")][0].contains("whose pods still have addresses of it"), "{refused:?}");
        assert_eq!(ranges_of(&nodes, "n1"), nets(&["10.244.1.0/24", "fd00:0:0:1::/64", "10.245.1.0/24"]));
    }
    said.insert(NodeName::new("n1"), uses(&[]));
    assert_eq!(after(&mut nodes, &said), BTreeMap::new());
    assert_eq!(ranges_of(&nodes, "n1"), nets(&["10.244.1.0/24", "fd00:0:0:1::/64"]));
    assert!(ranges_of(&nodes, "n2").contains(&"10.245.1.0/24".parse().unwrap()));
}

#[test]
fn who_does_not_know_the_clusters_ranges_believes_what_is_used() {
    let mut nodes = two();
    wants(&mut nodes, "n1", &["10.245.1.0/24", "10.245.2.0/24"]);
    let said = BTreeMap::from([(NodeName::new("n1"), uses(&["10.245.1.0/24"]))]);
    let settled = settle(&nodes, &said, &Within::Used);
    assert_eq!(settled.in_force[&NodeName::new("n1")], nets(&["10.245.1.0/24"]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// A node's wishes and claims, whatever they are, in whatever order they come.
    #[test]
    fn no_two_nodes_ever_share_and_nothing_that_was_assigned_is_lost(
        rounds in prop::collection::vec((0usize..4, prop::collection::vec((0u8..8, 24u8..31), 0..4), any::<bool>()), 1..12)
    ) {
        let names = ["n0", "n1", "n2", "n3"];
        let assigned = ["10.245.0.0/26", "10.245.2.0/25", "10.244.9.0/24", "10.245.5.128/25"];
        let mut nodes = by_name(
            (0..4).map(|n| node(names[n], n as i64 % 2, &format!("192.0.2.{n}"), &[assigned[n]], &[])).collect(),
        );
        let mut said: BTreeMap<NodeName, Says> = BTreeMap::new();
        for (who, ranges, lies) in rounds {
            let name = NodeName::new(names[who]);
            let ranges: Vec<IpNet> = ranges
                .into_iter()
                .map(|(third, length)| IpNet::new([10, 245, third, 16 * third].into(), length).unwrap().trunc())
                .collect();
            if lies {
                said.insert(name, Says { added_ranges: ranges, ..Says::default() });
            } else {
                nodes.get_mut(&name).unwrap().added.wanted = ranges;
            }
            let before = nodes.clone();
            after(&mut nodes, &said);
            let all: Vec<(usize, IpNet)> =
                nodes.values().enumerate().flat_map(|(n, node)| node.pod_cidrs.iter().map(move |range| (n, *range))).collect();
            for (at, (_, range)) in all.iter().enumerate() {
                for (_, other) in all.iter().skip(at + 1) {
                    prop_assert!(!range.contains(other) && !other.contains(range), "{range} and {other}");
                }
            }
            for (n, node) in nodes.values().enumerate() {
                prop_assert_eq!(node.assigned().copied().collect::<Vec<_>>(), nets(&[assigned[n]]));
                // Who had it and still wants it has it.
                let had = &before[&node.name].added.in_force;
                let kept = had.iter().filter(|range| node.added.wanted.contains(range));
                prop_assert!(kept.clone().all(|range| node.added.in_force.contains(range)), "{had:?} {:?}", node.added);
            }
            let again = nodes.clone();
            after(&mut nodes, &said);
            prop_assert_eq!(&again, &nodes, "settled is settled");
        }
    }
}
