//! Which pod ranges a node without any gets: the lowest free ones of the cluster's ranges, one a family.
//!
//! Deterministic: the same nodes and ranges give the same assignments, whoever asks. What a node already has is never changed.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use towpath_model::{Family, NodeName, family_of};

/// The cluster's pod ranges, at most one a family, and how much of each a node gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterRanges {
    ranges: Vec<(IpNet, u8)>,
}

/// Why ranges cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Two ranges of one family.
    #[error("cluster ranges {0} and {1} are of the same family: give at most one IPv4 and one IPv6 range")]
    SameFamily(IpNet, IpNet),
    /// The node's part is not inside the range.
    #[error("a node's prefix length {mask} does not fit cluster range {range}: it must be from {} to {max}", range.prefix_len())]
    Mask {
        /// The range.
        range: IpNet,
        /// The prefix length wanted.
        mask: u8,
        /// The longest that leaves room for a gateway and a pod.
        max: u8,
    },
}

/// What to write to nodes, and who gets nothing and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assignments {
    /// Ranges for nodes that had none, IPv4 first.
    pub assigned: BTreeMap<NodeName, Vec<IpNet>>,
    /// Nodes that could not be given any.
    pub refused: BTreeMap<NodeName, String>,
}

impl ClusterRanges {
    /// Checks the ranges. `mask_v4` and `mask_v6` are the prefix lengths of a node's part.
    ///
    /// # Errors
    /// Two ranges of a family, or a prefix length outside the range or too long to hold pods.
    pub fn new(ranges: &[IpNet], mask_v4: u8, mask_v6: u8) -> Result<Self, RangeError> {
        let mut checked: Vec<(IpNet, u8)> = Vec::new();
        for range in ranges {
            let family = family_of(range.addr());
            if let Some((other, _)) = checked.iter().find(|(r, _)| family_of(r.addr()) == family) {
                return Err(RangeError::SameFamily(*other, range.trunc()));
            }
            // /30 and /126 are the smallest with network, gateway, one pod and broadcast.
            let (mask, max) = if family == Family::V4 { (mask_v4, 30) } else { (mask_v6, 126) };
            if mask < range.prefix_len() || mask > max {
                return Err(RangeError::Mask { range: range.trunc(), mask, max });
            }
            checked.push((range.trunc(), mask));
        }
        checked.sort();
        Ok(Self { ranges: checked })
    }

    /// The cluster's ranges.
    pub fn ranges(&self) -> Vec<IpNet> {
        self.ranges.iter().map(|(range, _)| *range).collect()
    }

    /// Ranges for each node that has none, in name order. `nodes` holds every node with what it has; `avoid` names ranges
    /// not to give out although nobody has them (those of nodes deleted a moment ago).
    pub fn assign(&self, nodes: &BTreeMap<NodeName, Vec<IpNet>>, avoid: &[IpNet]) -> Assignments {
        let mut used = Used::default();
        for cidr in nodes.values().flatten().chain(avoid) {
            used.insert(*cidr);
        }
        let mut out = Assignments::default();
        if self.ranges.is_empty() {
            return out;
        }
        // Free ranges are found in order, so the search for the next goes on where the last ended.
        let mut from: Vec<u128> = self.ranges.iter().map(|(range, _)| bounds(*range).0).collect();
        for (name, _) in nodes.iter().filter(|(_, has)| has.is_empty()) {
            let found: Vec<Option<IpNet>> = self
                .ranges
                .iter()
                .zip(from.iter_mut())
                .map(|((range, mask), from)| used.lowest_free(*range, *mask, from))
                .collect();
            // All families or none: a node with half its ranges would give pods half their addresses for good.
            match found.iter().copied().collect::<Option<Vec<IpNet>>>() {
                Some(cidrs) => {
                    cidrs.iter().for_each(|c| used.insert(*c));
                    out.assigned.insert(name.clone(), cidrs);
                }
                None => {
                    let full: Vec<String> = self
                        .ranges
                        .iter()
                        .zip(&found)
                        .filter(|(_, found)| found.is_none())
                        .map(|((range, mask), _)| format!("no /{mask} is free in cluster range {range}"))
                        .collect();
                    out.refused.insert(
                        name.clone(),
                        format!("{}: remove nodes that are gone, or use a larger range", full.join(", ")),
                    );
                }
            }
        }
        out
    }
}

/// Ranges in use, by family and first address; may nest.
#[derive(Default)]
struct Used {
    by_start: BTreeMap<(Family, u128), u128>,
}

impl Used {
    fn insert(&mut self, cidr: IpNet) {
        let (first, last) = bounds(cidr);
        let end = self.by_start.entry((family_of(cidr.addr()), first)).or_insert(last);
        *end = (*end).max(last);
    }

    /// The first free block at or after `from`, which moves to it.
    fn lowest_free(&self, range: IpNet, mask: u8, from: &mut u128) -> Option<IpNet> {
        let family = family_of(range.addr());
        let width = u32::from(range.max_prefix_len() - mask);
        let size = 1u128.checked_shl(width)?;
        let (_, last) = bounds(range);
        let mut start = *from;
        loop {
            let end = start.checked_add(size - 1).filter(|end| *end <= last)?;
            match self.overlap(family, start, end) {
                None => {
                    *from = start;
                    return block(family, start, mask);
                }
                Some(taken_to) => {
                    // On to the first block boundary past what is taken.
                    let next = taken_to.max(end).checked_add(1)?;
                    start = next.checked_add(size - 1)? / size * size;
                }
            }
        }
    }

    /// Where a range in use that touches `first..=last` ends.
    fn overlap(&self, family: Family, first: u128, last: u128) -> Option<u128> {
        // Ranges nest or are disjoint, but one that began earlier may reach further than a later one inside it.
        let before = self.by_start.range((family, 0)..(family, first)).rev().map(|(_, end)| *end).find(|e| *e >= first);
        let within = self.by_start.range((family, first)..=(family, last)).map(|(_, end)| *end).max();
        before.max(within)
    }
}

fn bounds(cidr: IpNet) -> (u128, u128) {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    };
    (bits(cidr.network()), bits(cidr.broadcast()))
}

fn block(family: Family, start: u128, mask: u8) -> Option<IpNet> {
    let address = match family {
        Family::V4 => IpAddr::V4(u32::try_from(start).ok()?.into()),
        Family::V6 => IpAddr::V6(start.into()),
    };
    IpNet::new(address, mask).ok()
}

#[cfg(test)]
mod tests;
