//! Pod ranges that a node has besides those of its `spec.podCIDRs`, which Kubernetes never lets be changed: an annotation adds them while the node runs.
//!
//! What the annotation says is a wish. Whether a range is in force depends on what all other nodes have, and is for the planner to say
//! (`towpath_plan::added_ranges`).

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Annotation of a node: pod ranges, separated by commas.
pub const POD_CIDRS_ANNOTATION: &str = "towpath.dev/pod-cidrs";
/// So many ranges are taken from an annotation: each costs every node a route.
pub const MOST: usize = 16;
/// So many of its parts are named that are no ranges.
const NAMED: usize = 4;

/// The ranges that a node has beyond `spec.podCIDRs`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AddedRanges {
    /// What the annotation asks for, in its order, none twice, at most [`MOST`].
    pub wanted: Vec<IpNet>,
    /// What of the annotation is left out, for people.
    pub problems: Vec<String>,
    /// Those that are in force, of which some may be wanted no longer. They are among the node's pod ranges, after `spec.podCIDRs`.
    pub in_force: Vec<IpNet>,
}

impl AddedRanges {
    /// What an object's annotations ask for; nothing is in force.
    pub fn of(annotations: Option<&BTreeMap<String, String>>) -> Self {
        let mut added = Self::default();
        let Some(text) = annotations.and_then(|all| all.get(POD_CIDRS_ANNOTATION)) else { return added };
        let (mut many, mut wrong) = (0_usize, 0_usize);
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            match part.parse::<IpNet>() {
                Ok(range) if added.wanted.contains(&range.trunc()) => {}
                Ok(range) if added.wanted.len() < MOST => added.wanted.push(range.trunc()),
                Ok(_) => many += 1,
                Err(_) => {
                    wrong += 1;
                    if wrong <= NAMED {
                        let beginning: String = part.chars().take(50).collect();
                        let what = format!(
                            "annotation {POD_CIDRS_ANNOTATION}: {beginning:?} is no range, as in 10.245.7.0/24: left out"
                        );
                        added.problems.push(what);
                    }
                }
            }
        }
        if many > 0 {
            added.problems.push(format!(
                "annotation {POD_CIDRS_ANNOTATION}: {many} ranges beyond the first {MOST} are left out: write larger ones"
            ));
        }
        added
    }

    /// Whether there is nothing to say.
    pub fn is_empty(&self) -> bool {
        self.wanted.is_empty() && self.problems.is_empty() && self.in_force.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> AddedRanges {
        AddedRanges::of(Some(&BTreeMap::from([(POD_CIDRS_ANNOTATION.to_owned(), text.to_owned())])))
    }

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn ranges_of_both_families_are_read_in_their_order_and_once() {
        assert_eq!(AddedRanges::of(None), AddedRanges::default());
        assert!(of("").is_empty() && of(" , ").is_empty());
        let added = of(" fd00:7::/64, 10.245.7.9/24 ,10.245.7.0/24,10.246.0.0/25,");
        assert_eq!(added.wanted, nets(&["fd00:7::/64", "10.245.7.0/24", "10.246.0.0/25"]));
        assert!(added.problems.is_empty() && added.in_force.is_empty());
    }

    #[test]
    fn what_is_no_range_costs_itself_and_is_named() {
        let added = of("10.245.7.0, 10.245.8.0/24,/24,10.245.9.0/33");
        assert_eq!(added.wanted, nets(&["10.245.8.0/24"]));
        assert_eq!(added.problems.len(), 3);
        assert!(added.problems[0].contains("\"10.245.7.0\"") && added.problems[0].contains(POD_CIDRS_ANNOTATION));
    }

    #[test]
    fn what_is_said_of_an_annotation_without_end_has_one() {
        let ranges: Vec<String> = (0..200).map(|n| format!("10.245.{n}.0/24")).collect();
        let added = of(&ranges.join(","));
        assert_eq!((added.wanted.len(), added.problems.len()), (MOST, 1));
        assert!(added.problems[0].contains("184 ranges"), "{:?}", added.problems);
        let wrong = of(&format!("{},", "ä".repeat(1000)).repeat(1000));
        assert!(wrong.problems.len() <= NAMED && wrong.problems.iter().all(|problem| problem.len() < 300));
    }
}
