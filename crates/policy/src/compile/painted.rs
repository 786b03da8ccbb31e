//! Ranges of numbers that are painted once: whoever comes second gets what is left.

use std::collections::BTreeMap;
use std::ops::Range;

/// Painted numbers: the end of each range by its begin, disjoint and not adjacent.
#[derive(Clone, Debug, Default)]
pub(super) struct Painted(BTreeMap<usize, usize>);

impl Painted {
    /// Paints a range and visits what of it was not painted, ascending. All calls together cost no more than their number, but for a
    /// logarithm: what was visited in pieces is one range from then on.
    pub(super) fn paint(&mut self, range: Range<usize>, mut fresh: impl FnMut(Range<usize>)) {
        if range.is_empty() {
            return;
        }
        let before = self.0.range(..range.start).next_back().filter(|(_, end)| **end >= range.start);
        let met = before.into_iter().chain(self.0.range(range.start..=range.end));
        let met: Vec<(usize, usize)> = met.map(|(start, end)| (*start, *end)).collect();
        if let [(start, end)] = met.as_slice()
            && *start <= range.start
            && *end >= range.end
        {
            return;
        }
        let (mut at, mut all) = (range.start, range.clone());
        for (start, end) in met {
            if start > at {
                fresh(at..start);
            }
            at = at.max(end);
            all = all.start.min(start)..all.end.max(end);
            self.0.remove(&start);
        }
        if at < range.end {
            fresh(at..range.end);
        }
        self.0.insert(all.start, all.end);
    }

    /// Visits what of a range is not painted, ascending.
    pub(super) fn unpainted(&self, range: Range<usize>, mut visit: impl FnMut(Range<usize>)) {
        let before = self.0.range(..range.start).next_back().map(|(_, end)| *end);
        let mut at = before.map_or(range.start, |end| end.max(range.start));
        for (start, end) in self.0.range(range.start..range.end) {
            if *start > at {
                visit(at..*start);
            }
            at = at.max(*end);
        }
        if at < range.end {
            visit(at..range.end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn each_number_is_visited_once_by_the_first_that_paints_it(
            ranges in prop::collection::vec((0usize..60, 0usize..12), 0..20), probe in (0usize..60, 0usize..30)
        ) {
            let (mut painted, mut truth) = (Painted::default(), BTreeSet::new());
            for (start, length) in ranges {
                let range = start..start + length;
                let mut visited = Vec::new();
                painted.paint(range.clone(), |piece| visited.extend(piece));
                let wanted: Vec<usize> = range.clone().filter(|n| !truth.contains(n)).collect();
                prop_assert_eq!(visited, wanted);
                truth.extend(range);
                let ends: Vec<(usize, usize)> = painted.0.iter().map(|(a, b)| (*a, *b)).collect();
                prop_assert!(ends.windows(2).all(|pair| pair[0].1 < pair[1].0), "neighbours are one: {ends:?}");
            }
            let range = probe.0..probe.0 + probe.1;
            let mut left = Vec::new();
            painted.unpainted(range.clone(), |piece| left.extend(piece));
            prop_assert_eq!(left, range.filter(|n| !truth.contains(n)).collect::<Vec<_>>());
        }
    }
}
