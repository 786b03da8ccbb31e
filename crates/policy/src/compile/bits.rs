//! Sets of small numbers.

/// A set of numbers below a fixed bound, a bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bits {
    words: Vec<u64>,
}

impl Bits {
    /// The empty set.
    pub(super) fn none(bound: usize) -> Self {
        Self { words: vec![0; bound.div_ceil(64)] }
    }

    /// Adds a number below the bound.
    pub(super) fn insert(&mut self, number: usize) {
        if let Some(word) = self.words.get_mut(number / 64) {
            *word |= 1 << (number % 64);
        }
    }

    /// Removes a number.
    pub(super) fn remove(&mut self, number: usize) {
        if let Some(word) = self.words.get_mut(number / 64) {
            *word &= !(1 << (number % 64));
        }
    }

    /// Whether the number is in it.
    #[cfg(test)]
    pub(super) fn has(&self, number: usize) -> bool {
        self.words.get(number / 64).is_some_and(|word| word & (1 << (number % 64)) != 0)
    }

    /// Its numbers, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = usize> + Clone + '_ {
        self.words.iter().enumerate().flat_map(|(index, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros() as usize)?;
                rest &= rest - 1;
                Some(index * 64 + bit)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn bits_are_a_set(a in prop::collection::btree_set(0usize..130, 0..90), b in prop::collection::btree_set(0usize..130, 0..90)) {
            let of = |s: &BTreeSet<usize>| { let mut bits = Bits::none(130); s.iter().for_each(|n| bits.insert(*n)); bits };
            let list = |bits: &Bits| bits.iter().collect::<BTreeSet<_>>();
            let (all, mut rest) = (of(&a), of(&a));
            b.iter().for_each(|n| rest.remove(*n));
            prop_assert_eq!(list(&all), a.clone());
            prop_assert_eq!(list(&rest), &a - &b);
            prop_assert!((0..130).all(|n| all.has(n) == a.contains(&n)));
        }
    }
}
