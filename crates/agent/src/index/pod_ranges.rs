//! Pod ranges that are added to nodes: which are in force follows from all nodes and what they say, so it is settled anew whenever one of them changes.

use std::collections::BTreeMap;

use ipnet::IpNet;
use towpath_model::NodeName;
use towpath_plan::added_ranges::{self, Within};

use super::{Index, Kind};

impl Index {
    /// From now on pod ranges may be added to nodes that are in the cluster's and in none of the Services'.
    pub fn bound_pod_ranges(&mut self, cluster: Vec<IpNet>, services: Vec<IpNet>) {
        self.bounds = Some(Within::Cluster { cluster, services });
        self.settle_pod_ranges();
    }

    /// Why pod ranges that were added to nodes are not in force, by node, for people.
    pub fn refused_ranges(&self) -> &BTreeMap<NodeName, Vec<String>> {
        &self.refused_ranges
    }

    /// Works out which of the ranges that were added to nodes are in force.
    pub(super) fn settle_pod_ranges(&mut self) {
        let Some(bounds) = &self.bounds else { return };
        let mut settled = added_ranges::settle(&self.world.nodes, &self.backends, bounds);
        let before = std::mem::replace(&mut self.refused_ranges, std::mem::take(&mut settled.refused));
        let mut changed = before != self.refused_ranges;
        for (name, node) in &mut self.world.nodes {
            let now = settled.in_force.remove(name).unwrap_or_default();
            if node.added.in_force != now {
                node.put_in_force(now);
                self.changes.touched.all();
                changed = true;
            }
        }
        if changed {
            self.touch(Kind::Node);
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1 as core;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
    use towpath_model::Node;
    use towpath_plan::backend::Says;
    use towpath_policy::compile::Touched;

    use super::*;

    fn node(name: &str, assigned: &str, wanted: &str) -> Node {
        let object = core::Node {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                annotations: Some([(towpath_model::POD_CIDRS_ANNOTATION.to_owned(), wanted.to_owned())].into()),
                ..ObjectMeta::default()
            },
            spec: Some(core::NodeSpec { pod_cidrs: Some(vec![assigned.to_owned()]), ..core::NodeSpec::default() }),
            ..core::Node::default()
        };
        Node::try_from(&object).unwrap()
    }

    fn apply_node(index: &mut Index, name: &str, assigned: &str, wanted: &str) {
        index.apply(NodeName::new(name), Some(node(name, assigned, wanted)));
    }

    fn ranges(index: &Index, name: &str) -> Vec<String> {
        index.world().nodes[&NodeName::new(name)].pod_cidrs.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn ranges_that_are_added_to_nodes_are_in_force_as_all_nodes_together_allow_and_a_heartbeat_changes_nothing() {
        let mut index = Index::default();
        apply_node(&mut index, "n1", "10.244.1.0/24", "10.245.1.0/24");
        assert_eq!(ranges(&index, "n1"), ["10.244.1.0/24"], "nobody has said where they may be");
        index.bound_pod_ranges(vec!["10.244.0.0/15".parse().unwrap()], Vec::new());
        assert_eq!(ranges(&index, "n1"), ["10.244.1.0/24", "10.245.1.0/24"]);
        apply_node(&mut index, "n0", "10.244.0.0/24", "10.245.0.0/16,10.0.0.0/24");
        assert_eq!(ranges(&index, "n0"), ["10.244.0.0/24"]);
        assert_eq!(index.refused_ranges()[&NodeName::new("n0")].len(), 2);
        index.take_changes();
        apply_node(&mut index, "n1", "10.244.1.0/24", "10.245.1.0/24");
        index.reset(
            ["n0", "n1"].map(|name| (NodeName::new(name), index.world().nodes[&NodeName::new(name)].clone())).into(),
        );
        assert!(index.take_changes().is_empty());
        // Its own, or what another has, changes: both are looked at.
        apply_node(&mut index, "n1", "10.244.1.0/24", "");
        assert_eq!(
            (ranges(&index, "n1"), ranges(&index, "n0")),
            (vec!["10.244.1.0/24".to_owned()], vec!["10.244.0.0/24".to_owned(), "10.245.0.0/16".to_owned()])
        );
        let mut changes = index.take_changes();
        assert!(changes.any(&[Kind::Node]) && changes.take_touched() == Touched::everything());
        index.remove::<Node>(&NodeName::new("n0"));
        assert!(index.refused_ranges().is_empty());
    }

    #[test]
    fn a_range_that_is_taken_away_stays_while_its_node_says_that_it_is_used() {
        let mut index = Index::default();
        index.bound_pod_ranges(vec!["10.244.0.0/15".parse().unwrap()], Vec::new());
        apply_node(&mut index, "n1", "10.244.1.0/24", "10.245.1.0/24");
        let says = |ranges: &[&str]| Says {
            added_ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
            ..Says::default()
        };
        index.say(NodeName::new("n1"), Some(says(&["10.245.1.0/24"])));
        apply_node(&mut index, "n1", "10.244.1.0/24", "");
        assert_eq!(ranges(&index, "n1"), ["10.244.1.0/24", "10.245.1.0/24"]);
        index.take_changes();
        index.say(NodeName::new("n1"), Some(says(&[])));
        assert_eq!(ranges(&index, "n1"), ["10.244.1.0/24"]);
        assert!(index.take_changes().any(&[Kind::Node]));
    }
}
