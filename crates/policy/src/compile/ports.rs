//! Port ranges cut into disjoint prefixes, each with the range that decides of those that cover it.

use std::collections::BTreeMap;

/// A range of ports, both ends included, and its rank: of several that cover a port the lowest is asked first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) first: u16,
    pub(super) last: u16,
    pub(super) rank: u32,
}

/// Disjoint spans, ascending; neighbours differ in rank. `decide` is given the ranks that cover a port, ascending, and says which of
/// them decides.
pub(super) fn flatten(spans: &[Span], decide: impl Fn(&mut dyn Iterator<Item = u32>) -> Option<u32>) -> Vec<Span> {
    // Of most peers one rule decides all.
    if let [span] = spans {
        let decided = decide(&mut std::iter::once(span.rank)).filter(|_| span.first <= span.last);
        return decided.map(|rank| Span { rank, ..*span }).into_iter().collect();
    }
    let mut changes: BTreeMap<u32, (Vec<u32>, Vec<u32>)> = BTreeMap::new();
    for span in spans.iter().filter(|s| s.first <= s.last) {
        changes.entry(u32::from(span.first)).or_default().0.push(span.rank);
        changes.entry(u32::from(span.last) + 1).or_default().1.push(span.rank);
    }
    // Two ranges of one rule entry may share a rank: count them.
    let mut active: BTreeMap<u32, usize> = BTreeMap::new();
    let mut flat: Vec<Span> = Vec::new();
    let mut begin: Option<(u32, u32)> = None;
    for (at, (starts, ends)) in changes {
        for rank in starts {
            *active.entry(rank).or_default() += 1;
        }
        for rank in ends {
            if let Some(count) = active.get_mut(&rank) {
                *count -= 1;
                if *count == 0 {
                    active.remove(&rank);
                }
            }
        }
        let winner = decide(&mut active.keys().copied());
        if begin.map(|(_, rank)| rank) == winner {
            continue;
        }
        if let Some((first, rank)) = begin
            && let (Ok(first), Ok(last)) = (u16::try_from(first), u16::try_from(at - 1))
        {
            flat.push(Span { first, last, rank });
        }
        begin = winner.map(|rank| (at, rank));
    }
    flat
}

/// The fewest prefixes (port bits, how many leading bits count) that make up a range.
pub(super) fn prefixes(first: u16, last: u16) -> Vec<(u16, u8)> {
    let mut out = Vec::new();
    let (mut at, end) = (u32::from(first), u32::from(last) + 1);
    while at < end {
        let aligned = at.trailing_zeros().min(16);
        let fits = (end - at).ilog2();
        let size = aligned.min(fits);
        if let (Ok(port), Ok(free)) = (u16::try_from(at), u8::try_from(size)) {
            out.push((port, 16 - free));
        }
        at += 1 << size;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn edge() -> impl Strategy<Value = u16> {
        prop_oneof![
            prop::sample::select(vec![0u16, 1, 79, 80, 81, 1023, 1024, 32767, 32768, 65534, 65535]),
            any::<u16>()
        ]
    }

    proptest! {
        #[test]
        fn every_port_has_the_first_span_that_covers_it(
            raw in prop::collection::vec((edge(), edge()), 0..8), probe in prop::collection::vec(edge(), 20)
        ) {
            let spans: Vec<Span> = (0u32..).zip(raw).map(|(rank, (a, b))| Span { first: a.min(b), last: a.max(b), rank }).collect();
            let flat = flatten(&spans, |ranks| ranks.next());
            for port in probe {
                let truth = spans.iter().find(|s| (s.first..=s.last).contains(&port)).map(|s| s.rank);
                let hits: Vec<u32> = flat.iter().filter(|s| (s.first..=s.last).contains(&port)).map(|s| s.rank).collect();
                prop_assert_eq!(hits, truth.into_iter().collect::<Vec<_>>());
            }
        }

        #[test]
        fn prefixes_make_up_exactly_the_range(a in edge(), b in edge()) {
            let (first, last) = (a.min(b), a.max(b));
            let list = prefixes(first, last);
            let mut next = u32::from(first);
            for (port, bits) in list {
                let size = 1u32 << (16 - bits);
                prop_assert_eq!(u32::from(port), next, "prefixes follow each other without gap or overlap");
                prop_assert_eq!(next % size, 0, "a prefix is aligned");
                next += size;
            }
            prop_assert_eq!(next, u32::from(last) + 1);
        }
    }
}
