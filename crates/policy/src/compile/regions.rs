//! Address space cut along the borders of all CIDRs in force: what `ipBlock` can tell apart.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::Range;

use ipnet::IpNet;

/// Disjoint regions: each is a prefix without the longer prefixes inside it.
#[derive(Clone, Debug, Default)]
pub(super) struct Regions {
    /// In pre-order: a prefix comes right before those inside it.
    nets: Vec<Region>,
    /// First addresses from which a region (or none) holds, sorted, by family.
    v4: Vec<(u128, Option<usize>)>,
    v6: Vec<(u128, Option<usize>)>,
}

#[derive(Clone, Debug)]
struct Region {
    net: IpNet,
    parent: Option<usize>,
    /// Index after the last prefix inside it.
    end: usize,
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(a.to_bits()),
        IpAddr::V6(a) => a.to_bits(),
    }
}

impl Regions {
    /// The regions of these prefixes.
    pub(super) fn of(prefixes: &BTreeSet<IpNet>) -> Self {
        let mut regions = Self::default();
        let mut open: Vec<usize> = Vec::new();
        // The order of IpNet: family, network address, length: a prefix sorts right before what is inside it.
        for net in prefixes {
            while let Some(top) = open.last().copied()
                && !regions.nets.get(top).is_some_and(|r| r.net.contains(net))
            {
                open.pop();
                regions.close(top, open.last().copied());
            }
            let index = regions.nets.len();
            regions.nets.push(Region { net: *net, parent: open.last().copied(), end: index });
            regions.starts(net.addr()).push((number(net.network()), Some(index)));
            open.push(index);
        }
        while let Some(top) = open.pop() {
            regions.close(top, open.last().copied());
        }
        regions
    }

    fn starts(&mut self, family: IpAddr) -> &mut Vec<(u128, Option<usize>)> {
        if family.is_ipv4() { &mut self.v4 } else { &mut self.v6 }
    }

    fn close(&mut self, index: usize, outer: Option<usize>) {
        let count = self.nets.len();
        let Some(region) = self.nets.get_mut(index) else { return };
        region.end = count;
        let last = region.net.broadcast();
        if let Some(next) = number(last).checked_add(1) {
            self.starts(last).push((next, outer));
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.nets.len()
    }

    /// The region an address is in.
    pub(super) fn find(&self, address: IpAddr) -> Option<usize> {
        let starts = if address.is_ipv4() { &self.v4 } else { &self.v6 };
        let wanted = number(address);
        let after = starts.partition_point(|(start, _)| *start <= wanted);
        starts.get(after.checked_sub(1)?)?.1
    }

    /// The regions in a block: ascending ranges with gaps between them. All its borders must be among the prefixes.
    pub(super) fn in_block(&self, cidr: &IpNet, except: &[IpNet]) -> Vec<Range<usize>> {
        let whole = self.inside(cidr);
        let mut holes: Vec<Range<usize>> = except.iter().map(|hole| self.inside(hole)).collect();
        holes.sort_unstable_by_key(|hole| hole.start);
        let (mut at, mut left) = (whole.start, Vec::new());
        for hole in holes {
            let start = hole.start.min(whole.end);
            if at < start {
                left.push(at..start);
            }
            at = at.max(hole.end);
        }
        if at < whole.end {
            left.push(at..whole.end);
        }
        left
    }

    /// The regions in any of these prefixes, which must be borders: ascending ranges with gaps between them.
    pub(super) fn in_any(&self, nets: &[IpNet]) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = nets.iter().map(|net| self.inside(net)).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let mut all: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match all.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => all.push(range),
            }
        }
        all
    }

    /// The regions in a prefix, which must be one of the borders.
    pub(super) fn inside(&self, net: &IpNet) -> Range<usize> {
        match self.nets.binary_search_by(|r| r.net.cmp(net)) {
            Ok(index) => index..self.nets.get(index).map_or(index, |r| r.end),
            Err(index) => index..index,
        }
    }

    /// A region's prefix, and the index of the next larger one.
    pub(super) fn get(&self, index: usize) -> Option<(IpNet, Option<usize>)> {
        self.nets.get(index).map(|region| (region.net, region.parent))
    }

    /// All prefixes in pre-order with the index of the next larger one.
    pub(super) fn iter(&self) -> impl Iterator<Item = (IpNet, Option<usize>)> + '_ {
        self.nets.iter().map(|r| (r.net, r.parent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    fn any_net() -> impl Strategy<Value = IpNet> {
        // Addresses in few corners, so that prefixes nest, touch the ends and share borders.
        let v4 = (prop::sample::select(vec![0u32, 0x0a00_0000, 0x0a00_00ff, 0xffff_ffff]), 0u8..=32);
        let v6 = (prop::sample::select(vec![0u128, 1, 0xfd00 << 112, u128::MAX]), 0u8..=128);
        prop_oneof![
            v4.prop_map(|(a, n)| IpNet::new(Ipv4Addr::from(a).into(), n).unwrap().trunc()),
            v6.prop_map(|(a, n)| IpNet::new(Ipv6Addr::from(a).into(), n).unwrap().trunc()),
        ]
    }

    proptest! {
        #[test]
        fn the_region_found_is_the_longest_prefix_and_blocks_hold_what_they_contain(
            nets in prop::collection::btree_set(any_net(), 0..12),
            probes in prop::collection::vec((any_net(), any::<bool>()), 20),
        ) {
            let regions = Regions::of(&nets);
            let list: Vec<IpNet> = nets.iter().copied().collect();
            for (net, end) in probes {
                let address = if end { net.broadcast() } else { net.network() };
                let longest = list.iter().enumerate().filter(|(_, n)| n.contains(&address)).max_by_key(|(_, n)| n.prefix_len());
                let found = regions.find(address);
                prop_assert_eq!(found, longest.map(|(i, _)| i));
                for outer in &list {
                    let holes: Vec<IpNet> = list.iter().copied().filter(|h| outer.contains(h) && h != outer).take(2).collect();
                    let truth = outer.contains(&address) && !holes.iter().any(|h| h.contains(&address));
                    prop_assert_eq!(found.is_some_and(|f| regions.in_block(outer, &holes).iter().any(|r| r.contains(&f))), truth);
                    let both = [*outer, *list.first().unwrap_or(outer)];
                    let any = both.iter().any(|net| net.contains(&address));
                    prop_assert_eq!(found.is_some_and(|f| regions.in_any(&both).iter().any(|r| r.contains(&f))), any);
                }
            }
        }
    }
}
