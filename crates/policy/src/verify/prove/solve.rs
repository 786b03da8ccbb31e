//! Whether values can be found that are in every domain and match none of the forbidden conjunctions.
//!
//! A search with unit propagation over sets of values: a branch decides one literal for good, so it ends; every look at a literal is a step, and
//! the steps are counted against a limit. It never answers "none" unless it has looked everywhere.

use crate::verify::ranges::Ranges;

/// One variable has one of these values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Literal {
    pub(super) variable: usize,
    pub(super) within: Ranges,
}

/// All of these hold; no two about the same variable. Empty: always true.
pub(super) type Conjunction = Vec<Literal>;

/// Both conjunctions; none if they cannot hold together.
pub(super) fn both(a: &[Literal], b: &[Literal]) -> Option<Conjunction> {
    let mut out = a.to_vec();
    for literal in b {
        match out.iter_mut().find(|have| have.variable == literal.variable) {
            Some(have) => {
                have.within = have.within.and(&literal.within);
                if have.within.is_empty() {
                    return None;
                }
            }
            None => out.push(literal.clone()),
        }
    }
    Some(out)
}

/// The values that each variable may still have.
pub(super) type Domains = Vec<Ranges>;

/// How much may still be looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    pub(super) spent: u64,
    pub(super) limit: u64,
}

/// The limit is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exhausted;

impl Budget {
    pub(super) fn spend(&mut self, steps: usize) -> Result<(), Exhausted> {
        self.spent = self.spent.saturating_add(u64::try_from(steps).unwrap_or(u64::MAX));
        if self.spent > self.limit { Err(Exhausted) } else { Ok(()) }
    }
}

/// The domains with a conjunction made true; none if it cannot be.
pub(super) fn assume(
    domains: &Domains,
    conjunction: &[Literal],
    budget: &mut Budget,
) -> Result<Option<Domains>, Exhausted> {
    budget.spend(conjunction.len() + 1)?;
    let possible = |l: &Literal| domains.get(l.variable).is_some_and(|domain| !domain.is_disjoint(&l.within));
    if !conjunction.iter().all(possible) {
        return Ok(None);
    }
    let mut next = domains.clone();
    for literal in conjunction {
        if let Some(domain) = next.get_mut(literal.variable) {
            *domain = domain.and(&literal.within);
            if domain.is_empty() {
                return Ok(None);
            }
        }
    }
    Ok(Some(next))
}

/// Domains within which every choice matches no forbidden conjunction, and which `fits`.
pub(super) fn solve(
    domains: Domains,
    forbidden: &[&Conjunction],
    fits: &dyn Fn(&Domains) -> bool,
    budget: &mut Budget,
) -> Result<Option<Domains>, Exhausted> {
    // A branch with the conjunctions that it has still to break.
    let mut open: Vec<(Domains, Vec<usize>)> = vec![(domains, (0..forbidden.len()).collect())];
    while let Some((mut domains, mut left)) = open.pop() {
        match propagate(&mut domains, &mut left, forbidden, budget)? {
            Step::Conflict => {}
            Step::Solved if fits(&domains) => return Ok(Some(domains)),
            Step::Solved => {}
            Step::Branch(literal) => {
                let split = |keep: Ranges, domains: &Domains| {
                    let mut next = domains.clone();
                    if let Some(domain) = next.get_mut(literal.variable) {
                        *domain = keep;
                    }
                    next
                };
                let domain = domains.get(literal.variable).cloned().unwrap_or_default();
                open.push((split(domain.and(&literal.within), &domains), left.clone()));
                // First the branch that breaks the conjunction.
                open.push((split(domain.without(&literal.within), &domains), left));
            }
        }
    }
    Ok(None)
}

enum Step {
    Conflict,
    Solved,
    Branch(Literal),
}

/// Removes values that a forbidden conjunction leaves no room for, until nothing changes.
fn propagate(
    domains: &mut Domains,
    left: &mut Vec<usize>,
    forbidden: &[&Conjunction],
    budget: &mut Budget,
) -> Result<Step, Exhausted> {
    loop {
        let mut changed = false;
        let mut conflict = false;
        let mut shortest: Option<(usize, Literal)> = None;
        let mut still = Vec::with_capacity(left.len());
        for index in left.iter().copied() {
            let Some(conjunction) = forbidden.get(index) else { continue };
            budget.spend(conjunction.len() + 1)?;
            let mut broken = false;
            let mut undecided: Vec<&Literal> = Vec::new();
            for literal in conjunction.iter() {
                let Some(domain) = domains.get(literal.variable) else { continue };
                if domain.is_disjoint(&literal.within) {
                    broken = true;
                    break;
                }
                if !domain.is_within(&literal.within) {
                    undecided.push(literal);
                }
            }
            match undecided.as_slice() {
                _ if broken => {}
                [] => {
                    conflict = true;
                    break;
                }
                [only] => {
                    if let Some(domain) = domains.get_mut(only.variable) {
                        *domain = domain.without(&only.within);
                    }
                    changed = true;
                }
                [first, ..] => {
                    if shortest.as_ref().is_none_or(|(length, _)| undecided.len() < *length) {
                        shortest = Some((undecided.len(), (*first).clone()));
                    }
                    still.push(index);
                }
            }
        }
        if conflict {
            return Ok(Step::Conflict);
        }
        *left = still;
        match shortest {
            None => return Ok(Step::Solved),
            Some(_) if changed => {}
            Some((_, literal)) => return Ok(Step::Branch(literal)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn conjunction() -> impl Strategy<Value = Conjunction> {
        let ranges = prop::collection::vec((0u128..4, 0u128..4), 1..3).prop_map(Ranges::collect);
        prop::collection::btree_map(0usize..4, ranges, 0..4)
            .prop_map(|map| map.into_iter().map(|(variable, within)| Literal { variable, within }).collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn it_finds_values_exactly_if_there_are_some(forbidden in prop::collection::vec(conjunction(), 0..12)) {
            let holds = |c: &Conjunction, values: &[u128]| c.iter().all(|l| l.within.has(values[l.variable]));
            let good = |values: &[u128]| !forbidden.iter().any(|c| holds(c, values));
            let all = (0..256u128).map(|n| [n % 4, n / 4 % 4, n / 16 % 4, n / 64 % 4]);
            let truth = all.clone().any(|values| good(&values));
            let list: Vec<&Conjunction> = forbidden.iter().collect();
            let mut budget = Budget { spent: 0, limit: 1_000_000 };
            let found = solve(vec![Ranges::of(0, 3); 4], &list, &|_| true, &mut budget).unwrap();
            prop_assert_eq!(found.is_some(), truth);
            if let Some(domains) = found {
                for values in all.filter(|values| (0..4).all(|i| domains[i].has(values[i]))) {
                    prop_assert!(good(&values), "every choice within the domains is a solution");
                }
            }
        }
    }

    #[test]
    fn a_search_that_is_too_long_says_so() {
        // n pigeons, n-1 holes: no answer but by trying.
        let (pigeons, holes) = (9usize, 8u128);
        let mut forbidden = Vec::new();
        for a in 0..pigeons {
            for b in 0..a {
                for hole in 0..holes {
                    let at = |variable| Literal { variable, within: Ranges::one(hole) };
                    forbidden.push(vec![at(a), at(b)]);
                }
            }
        }
        let list: Vec<&Conjunction> = forbidden.iter().collect();
        let mut budget = Budget { spent: 0, limit: 50_000 };
        let all = vec![Ranges::of(0, holes - 1); pigeons];
        assert_eq!(solve(all, &list, &|_| true, &mut budget), Err(Exhausted));
    }
}
