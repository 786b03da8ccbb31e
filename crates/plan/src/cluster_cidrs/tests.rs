use std::collections::BTreeMap;

use ipnet::IpNet;
use proptest::prelude::*;
use towpath_model::NodeName;

use super::{ClusterRanges, RangeError};

fn cidr(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn nodes(list: &[(&str, &[&str])]) -> BTreeMap<NodeName, Vec<IpNet>> {
    list.iter().map(|(name, has)| (NodeName::new(*name), has.iter().map(|c| cidr(c)).collect())).collect()
}

fn ranges(list: &[&str], v4: u8, v6: u8) -> ClusterRanges {
    ClusterRanges::new(&list.iter().map(|c| cidr(c)).collect::<Vec<_>>(), v4, v6).unwrap()
}

#[test]
fn nodes_without_ranges_get_the_lowest_free_of_each_family() {
    let plan = ranges(&["fd00:244::/56", "10.244.0.0/16"], 24, 64).assign(
        &nodes(&[("a", &["10.244.0.0/24", "fd00:244::/64"]), ("b", &[]), ("c", &["10.244.2.0/24"]), ("d", &[])]),
        &[],
    );
    assert_eq!(plan.assigned[&NodeName::new("b")], [cidr("10.244.1.0/24"), cidr("fd00:244:0:1::/64")]);
    assert_eq!(plan.assigned[&NodeName::new("d")], [cidr("10.244.3.0/24"), cidr("fd00:244:0:2::/64")]);
    assert_eq!(plan.assigned.len(), 2, "what a node has is never changed");
    assert!(plan.refused.is_empty());
}

#[test]
fn ranges_in_use_of_any_size_are_gone_around() {
    let plan = ranges(&["10.0.0.0/22"], 24, 64).assign(
        &nodes(&[("a", &["10.0.0.0/23"]), ("b", &["10.0.0.128/25"]), ("c", &["10.0.2.64/26"]), ("d", &[])]),
        &[],
    );
    assert_eq!(plan.assigned[&NodeName::new("d")], [cidr("10.0.3.0/24")]);
}

#[test]
fn ranges_to_avoid_are_not_given_out() {
    let plan = ranges(&["10.0.0.0/23"], 24, 64).assign(&nodes(&[("a", &[])]), &[cidr("10.0.0.0/24")]);
    assert_eq!(plan.assigned[&NodeName::new("a")], [cidr("10.0.1.0/24")]);
}

#[test]
fn exhaustion_is_said_and_gives_no_half_of_the_families() {
    let plan = ranges(&["10.0.0.0/24", "fd00::/48"], 24, 64).assign(&nodes(&[("a", &[]), ("b", &[])]), &[]);
    assert_eq!(plan.assigned.len(), 1);
    let reason = &plan.refused[&NodeName::new("b")];
    assert!(
        reason.contains("no /24 is free in cluster range 10.0.0.0/24") && reason.contains("larger range"),
        "{reason}"
    );
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    let new = |list: &[&str], v4, v6| ClusterRanges::new(&list.iter().map(|c| cidr(c)).collect::<Vec<_>>(), v4, v6);
    assert!(matches!(new(&["10.0.0.0/16", "10.1.0.0/16"], 24, 64), Err(RangeError::SameFamily(..))));
    assert!(matches!(new(&["10.0.0.0/16"], 8, 64), Err(RangeError::Mask { .. })));
    assert!(matches!(new(&["10.0.0.0/16"], 31, 64), Err(RangeError::Mask { .. })));
    assert!(matches!(new(&["fd00::/64"], 24, 127), Err(RangeError::Mask { .. })));
    assert!(new(&["0.0.0.0/0", "::/0"], 24, 64).is_ok());
}

#[test]
fn no_ranges_assign_nothing() {
    assert_eq!(ranges(&[], 24, 64).assign(&nodes(&[("a", &[])]), &[]), Default::default());
}

proptest! {
    #[test]
    fn what_is_assigned_overlaps_nothing_and_lies_inside(
        used in prop::collection::vec((0u32..1024, 24u8..30), 0..12), wanting in 1usize..20,
    ) {
        let range = cidr("10.0.0.0/22");
        let mut all = BTreeMap::new();
        for (index, (offset, prefix)) in used.iter().enumerate() {
            let base = u32::from(std::net::Ipv4Addr::new(10, 0, 0, 0)) + offset;
            let net = IpNet::new(std::net::Ipv4Addr::from(base).into(), *prefix).unwrap().trunc();
            all.insert(NodeName::new(format!("used{index}")), vec![net]);
        }
        for index in 0..wanting {
            all.insert(NodeName::new(format!("want{index:02}")), vec![]);
        }
        let plan = ranges(&["10.0.0.0/22"], 26, 64).assign(&all, &[]);
        let mut taken: Vec<IpNet> = all.values().flatten().copied().collect();
        let free_before = range.subnets(26).unwrap()
            .filter(|s| taken.iter().all(|t| !t.contains(s) && !s.contains(t))).count();
        for given in plan.assigned.values().flatten() {
            prop_assert!(range.contains(given) && given.prefix_len() == 26);
            prop_assert!(taken.iter().all(|t| !t.contains(given) && !given.contains(t)), "{given} of {taken:?}");
            taken.push(*given);
        }
        prop_assert_eq!(plan.assigned.len(), wanting.min(free_before), "as many as there is room for");
        prop_assert_eq!(plan.assigned.len() + plan.refused.len(), wanting);
    }
}
