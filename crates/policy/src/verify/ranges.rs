//! Sets of numbers as sorted, disjoint ranges: of ports, of addresses, of values of a label.
//!
//! Exact over the whole line; the cost of an operation is the number of ranges of its operands, whatever they cover.

/// A set of numbers. Two that hold the same numbers compare equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Ranges(Vec<(u128, u128)>);

impl Ranges {
    /// The empty set.
    pub(crate) fn none() -> Self {
        Self::default()
    }

    /// All numbers from `first` to `last`, both included; none if `last` is below `first`.
    pub(crate) fn of(first: u128, last: u128) -> Self {
        if first <= last { Self(vec![(first, last)]) } else { Self::none() }
    }

    /// One number.
    pub(crate) fn one(number: u128) -> Self {
        Self::of(number, number)
    }

    /// Of ranges in any order, which may overlap.
    pub(crate) fn collect(ranges: impl IntoIterator<Item = (u128, u128)>) -> Self {
        let mut sorted: Vec<(u128, u128)> = ranges.into_iter().filter(|(first, last)| first <= last).collect();
        sorted.sort_unstable();
        let mut out: Vec<(u128, u128)> = Vec::with_capacity(sorted.len());
        for (first, last) in sorted {
            match out.last_mut() {
                Some((_, end)) if end.checked_add(1).is_none_or(|next| first <= next) => *end = last.max(*end),
                _ => out.push((first, last)),
            }
        }
        Self(out)
    }

    /// Whether nothing is in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a number is in it.
    pub(crate) fn has(&self, number: u128) -> bool {
        let after = self.0.partition_point(|(first, _)| *first <= number);
        after.checked_sub(1).and_then(|i| self.0.get(i)).is_some_and(|(_, last)| number <= *last)
    }

    /// What is in either.
    pub(crate) fn or(&self, other: &Self) -> Self {
        match (self.is_empty(), other.is_empty()) {
            (true, _) => other.clone(),
            (_, true) => self.clone(),
            _ => Self::collect(self.0.iter().chain(&other.0).copied()),
        }
    }

    /// What is in both.
    pub(crate) fn and(&self, other: &Self) -> Self {
        let mut out = Vec::new();
        self.overlaps(other, |first, last| {
            out.push((first, last));
            true
        });
        Self(out)
    }

    /// What is in this and not in the other.
    pub(crate) fn without(&self, other: &Self) -> Self {
        let mut out = Vec::new();
        let mut holes = other.0.iter().copied().peekable();
        for (first, last) in self.0.iter().copied() {
            let mut at = Some(first);
            while let Some((hole, end)) = holes.peek().copied() {
                if end < at.unwrap_or(first) {
                    holes.next();
                    continue;
                }
                if hole > last {
                    break;
                }
                if let Some(begin) = at
                    && begin < hole
                {
                    out.push((begin, hole - 1));
                }
                at = end.checked_add(1).filter(|next| *next <= last);
                if at.is_none() {
                    break;
                }
                holes.next();
            }
            if let Some(begin) = at {
                out.push((begin, last));
            }
        }
        Self(out)
    }

    /// Whether nothing is in both.
    pub(crate) fn is_disjoint(&self, other: &Self) -> bool {
        let mut disjoint = true;
        self.overlaps(other, |_, _| {
            disjoint = false;
            false
        });
        disjoint
    }

    /// Whether everything in this is in the other.
    pub(crate) fn is_within(&self, other: &Self) -> bool {
        self.0.iter().all(|(first, last)| {
            let after = other.0.partition_point(|(start, _)| start <= first);
            after.checked_sub(1).and_then(|i| other.0.get(i)).is_some_and(|(_, end)| last <= end)
        })
    }

    /// Its ranges, ascending, with gaps between them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u128, u128)> + '_ {
        self.0.iter().copied()
    }

    /// Its least number.
    pub(crate) fn first(&self) -> Option<u128> {
        self.0.first().map(|(first, _)| *first)
    }

    /// Up to `count` of its numbers, the least ones.
    pub(crate) fn some(&self, count: usize) -> Vec<u128> {
        self.iter().flat_map(|(first, last)| first..=last).take(count).collect()
    }

    /// How many numbers are in it; `u128::MAX` also for one more than that.
    pub(crate) fn count(&self) -> u128 {
        self.iter().fold(0u128, |sum, (first, last)| sum.saturating_add((last - first).saturating_add(1)))
    }

    /// Visits the ranges of the intersection until `visit` says no.
    fn overlaps(&self, other: &Self, mut visit: impl FnMut(u128, u128) -> bool) {
        let (mut left, mut right) = (self.0.iter().copied().peekable(), other.0.iter().copied().peekable());
        while let (Some((a, b)), Some((c, d))) = (left.peek().copied(), right.peek().copied()) {
            let (first, last) = (a.max(c), b.min(d));
            if first <= last && !visit(first, last) {
                return;
            }
            if b < d {
                left.next();
            } else {
                right.next();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn any_ranges() -> impl Strategy<Value = Ranges> {
        prop::collection::vec((0u128..40, 0u128..40), 0..6).prop_map(Ranges::collect)
    }

    proptest! {
        #[test]
        fn ranges_are_a_set(a in any_ranges(), b in any_ranges()) {
            let list = |r: &Ranges| (0u128..45).filter(|n| r.has(*n)).collect::<BTreeSet<_>>();
            let (x, y) = (list(&a), list(&b));
            prop_assert_eq!(list(&a.and(&b)), &x & &y);
            prop_assert_eq!(list(&a.or(&b)), &x | &y);
            prop_assert_eq!(list(&a.without(&b)), &x - &y);
            prop_assert_eq!(a.is_disjoint(&b), x.is_disjoint(&y));
            prop_assert_eq!(a.is_within(&b), x.is_subset(&y));
            prop_assert_eq!(a.count(), x.len() as u128);
            prop_assert_eq!(x == y, a == b, "one form for one set");
            prop_assert_eq!(a.and(&b), Ranges::collect(a.and(&b).iter()), "in normal form");
            prop_assert_eq!(a.without(&b), Ranges::collect(a.without(&b).iter()), "in normal form");
        }
    }

    #[test]
    fn the_ends_of_the_line_are_numbers_too() {
        let all = Ranges::of(0, u128::MAX);
        let middle = all.without(&Ranges::one(0)).without(&Ranges::one(u128::MAX));
        assert_eq!(middle, Ranges::of(1, u128::MAX - 1));
        assert_eq!(middle.or(&Ranges::one(u128::MAX)).or(&Ranges::one(0)), all);
        assert_eq!(all.count(), u128::MAX);
        assert!(all.without(&all).is_empty());
    }
}
