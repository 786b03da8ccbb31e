//! Sets of small numbers, and partitions refined by them.

/// A set of numbers below a fixed bound, a bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bits {
    words: Vec<u64>,
    bound: usize,
}

impl Bits {
    /// The empty set.
    pub(super) fn none(bound: usize) -> Self {
        Self { words: vec![0; bound.div_ceil(64)], bound }
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
    pub(super) fn has(&self, number: usize) -> bool {
        self.words.get(number / 64).is_some_and(|word| word & (1 << (number % 64)) != 0)
    }

    /// Keeps what is in both.
    pub(super) fn intersect(&mut self, other: &Bits) {
        for (word, mask) in self.words.iter_mut().zip(&other.words) {
            *word &= mask;
        }
    }

    /// Adds what is in the other.
    pub(super) fn unite(&mut self, other: &Bits) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// Exactly the numbers below the bound that were not in it.
    pub(super) fn complement(&mut self) {
        for word in &mut self.words {
            *word = !*word;
        }
        let used = self.bound % 64;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
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

/// The numbers below a bound in classes; starts with one class and is refined set by set.
#[derive(Clone, Debug)]
pub(super) struct Partition {
    class: Vec<usize>,
    size: Vec<usize>,
    /// Scratch: how many of a class the current set has.
    touched: Vec<usize>,
    /// Scratch: where they go.
    target: Vec<usize>,
}

impl Partition {
    /// Everything in one class.
    pub(super) fn new(bound: usize) -> Self {
        let one = usize::from(bound > 0);
        Self { class: vec![0; bound], size: vec![bound; one], touched: vec![0; one], target: vec![0; one] }
    }

    /// Separates the members of a set from the others. Numbers may come in any order, each once.
    pub(super) fn split(&mut self, members: impl Iterator<Item = usize> + Clone) {
        for class in members.clone().filter_map(|m| self.class.get(m).copied()) {
            if let Some(count) = self.touched.get_mut(class) {
                *count += 1;
            }
        }
        const STAY: usize = usize::MAX;
        for member in members.clone() {
            let Some(class) = self.class.get(member).copied() else { continue };
            let (Some(size), Some(touched)) = (self.size.get(class).copied(), self.touched.get(class).copied()) else {
                continue;
            };
            if touched != 0 {
                // First member of this class: settle where all of them go.
                let target = if touched == size { STAY } else { self.size.len() };
                if target != STAY {
                    self.size.push(touched);
                    self.touched.push(0);
                    self.target.push(STAY);
                    if let Some(left) = self.size.get_mut(class) {
                        *left -= touched;
                    }
                }
                if let (Some(t), Some(count)) = (self.target.get_mut(class), self.touched.get_mut(class)) {
                    *t = target;
                    *count = 0;
                }
            }
            if let (Some(target), Some(own)) = (self.target.get(class).copied(), self.class.get_mut(member))
                && target != STAY
            {
                *own = target;
            }
        }
    }

    /// The class of a number.
    pub(super) fn class_of(&self, number: usize) -> Option<usize> {
        self.class.get(number).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn two_numbers_share_a_class_exactly_if_no_set_separates_them(
            sets in prop::collection::vec(prop::collection::btree_set(0usize..70, 0..70), 0..8)
        ) {
            let mut partition = Partition::new(70);
            for set in &sets {
                partition.split(set.iter().copied());
            }
            let signature = |n: usize| sets.iter().map(|s| s.contains(&n)).collect::<Vec<_>>();
            for a in 0..70 {
                for b in 0..70 {
                    prop_assert_eq!(partition.class_of(a) == partition.class_of(b), signature(a) == signature(b));
                }
            }
        }

        #[test]
        fn bits_are_a_set(a in prop::collection::btree_set(0usize..130, 0..90), b in prop::collection::btree_set(0usize..130, 0..90)) {
            let of = |s: &BTreeSet<usize>| { let mut bits = Bits::none(130); s.iter().for_each(|n| bits.insert(*n)); bits };
            let list = |bits: &Bits| bits.iter().collect::<BTreeSet<_>>();
            let (mut both, mut any, mut rest) = (of(&a), of(&a), of(&a));
            both.intersect(&of(&b));
            any.unite(&of(&b));
            rest.complement();
            prop_assert_eq!(list(&both), &a & &b);
            prop_assert_eq!(list(&any), &a | &b);
            prop_assert_eq!(list(&rest), (0..130).filter(|n| !a.contains(n)).collect::<BTreeSet<_>>());
            prop_assert!((0..130).all(|n| both.has(n) == (a.contains(&n) && b.contains(&n))));
        }
    }
}
