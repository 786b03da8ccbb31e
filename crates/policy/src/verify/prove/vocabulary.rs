//! Everything that selectors can tell apart: label keys with the values that are mentioned, one value that is not, and absence.

use std::collections::{BTreeMap, BTreeSet};

use towpath_model::labels::Requirement;
use towpath_model::{Labels, Protocol, Selector};

use super::solve::{Conjunction, Literal};
use crate::verify::ranges::Ranges;

/// Mentioned values of each label key.
#[derive(Clone, Debug, Default)]
pub(super) struct Keys(BTreeMap<String, Known>);

#[derive(Clone, Debug, Default)]
struct Known {
    position: usize,
    /// From 1 on, in their order.
    values: BTreeMap<String, u128>,
}

const ABSENT: u128 = 0;

impl Known {
    /// The number of what is not mentioned.
    fn other(&self) -> u128 {
        u128::try_from(self.values.len()).unwrap_or(u128::MAX - 1) + 1
    }
}

impl Keys {
    /// Takes note of a selector. Numbers hold after [`Keys::settle`].
    pub(super) fn note(&mut self, selector: &Selector) {
        for requirement in selector.requirements() {
            let known = self.0.entry(requirement.key().to_owned()).or_default();
            if let Requirement::In(_, more) | Requirement::NotIn(_, more) = requirement {
                known.values.extend(more.iter().map(|value| (value.clone(), ABSENT)));
            }
        }
    }

    /// Takes note of a key that every object has.
    pub(super) fn note_key(&mut self, key: &str) {
        self.0.entry(key.to_owned()).or_default();
    }

    /// Gives numbers to all that was noted.
    pub(super) fn settle(&mut self) {
        for (position, known) in self.0.values_mut().enumerate() {
            known.position = position;
            for (number, value) in (1u128..).zip(known.values.values_mut()) {
                *value = number;
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn values_of(&self, key: &str) -> impl Iterator<Item = &str> {
        self.0.get(key).into_iter().flat_map(|known| known.values.keys()).map(String::as_str)
    }

    fn position(&self, key: &str) -> Option<usize> {
        self.0.get(key).map(|known| known.position)
    }

    /// All that a key can be: absent, a mentioned value, or another.
    fn all(&self, key: &str) -> Ranges {
        Ranges::of(ABSENT, self.0.get(key).map_or(1, Known::other))
    }

    fn number(&self, key: &str, value: &str) -> u128 {
        self.0.get(key).map_or(1, |known| known.values.get(value).copied().unwrap_or_else(|| known.other()))
    }

    /// The domains of all keys, in their order.
    pub(super) fn domains(&self) -> Vec<Ranges> {
        self.0.keys().map(|key| self.all(key)).collect()
    }

    /// The value that a key's domain comes down to when any of them will do: absent, else the first.
    pub(super) fn choose(&self, index: usize, domain: &Ranges) -> Option<(String, String)> {
        let (key, known) = self.0.iter().nth(index)?;
        let number = domain.first().filter(|number| *number != ABSENT)?;
        let mentioned = usize::try_from(number - 1).ok().and_then(|at| known.values.keys().nth(at));
        let value = mentioned.cloned().unwrap_or_else(|| fresh("other", |name| known.values.contains_key(name)));
        Some((key.clone(), value))
    }

    /// Fixes a key's domain to a value.
    pub(super) fn fixed(&self, key: &str, value: &str) -> Option<(usize, Ranges)> {
        Some((self.position(key)?, Ranges::one(self.number(key, value))))
    }

    /// A selector over variables that begin at `base`; none: it selects nothing.
    pub(super) fn literals(&self, base: usize, selector: &Selector) -> Option<Conjunction> {
        let mut out: Conjunction = Vec::new();
        for requirement in selector.requirements() {
            let variable = base + self.position(requirement.key())?;
            let within = self.within(requirement);
            match out.iter_mut().find(|literal| literal.variable == variable) {
                Some(literal) => literal.within = literal.within.and(&within),
                None => out.push(Literal { variable, within }),
            }
        }
        out.iter().all(|literal| !literal.within.is_empty()).then_some(out)
    }

    /// Where a selector does not select: each of these by itself.
    pub(super) fn negated(&self, base: usize, selector: &Selector) -> Vec<Conjunction> {
        let requirements = selector.requirements();
        requirements
            .filter_map(|requirement| {
                let variable = base + self.position(requirement.key())?;
                let within = self.all(requirement.key()).without(&self.within(requirement));
                (!within.is_empty()).then(|| vec![Literal { variable, within }])
            })
            .collect()
    }

    fn within(&self, requirement: &Requirement) -> Ranges {
        let all = self.all(requirement.key());
        let listed = |key: &str, values: &BTreeSet<String>| {
            Ranges::collect(values.iter().map(|value| self.number(key, value)).map(|n| (n, n)))
        };
        match requirement {
            Requirement::In(key, values) => listed(key, values),
            Requirement::NotIn(key, values) => all.without(&listed(key, values)),
            Requirement::Exists(_) => all.without(&Ranges::one(ABSENT)),
            Requirement::DoesNotExist(_) => Ranges::one(ABSENT),
        }
    }

    /// What labels that are known are not: each of these by itself.
    pub(super) fn others(&self, base: usize, labels: &Labels) -> Vec<Literal> {
        let of = |(key, known): (&String, &Known)| {
            let number = labels.get(key).map_or(ABSENT, |value| self.number(key, value));
            Literal { variable: base + known.position, within: self.all(key).without(&Ranges::one(number)) }
        };
        self.0.iter().map(of).collect()
    }

    /// Labels reduced to keys that are mentioned.
    pub(super) fn reduced(&self, labels: &Labels) -> Labels {
        labels.iter().filter(|(key, _)| self.0.contains_key(*key)).map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

/// A name like `stem` that is not taken.
pub(super) fn fresh(stem: &str, taken: impl Fn(&str) -> bool) -> String {
    let names = std::iter::once(stem.to_owned()).chain((2u64..).map(|n| format!("{stem}-{n}")));
    names.into_iter().find(|name| !taken(name)).unwrap_or_else(|| stem.to_owned())
}

/// Names of ports, by protocol. A variable each: whether the destination gives that name to the flow's port.
#[derive(Clone, Debug, Default)]
pub(super) struct PortNames(BTreeSet<(String, Protocol)>);

impl PortNames {
    pub(super) fn note(&mut self, name: &str, protocol: Protocol) {
        self.0.insert((name.to_owned(), protocol));
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn position(&self, name: &str, protocol: Protocol) -> Option<usize> {
        self.0.iter().position(|(have, of)| have == name && *of == protocol)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &(String, Protocol)> {
        self.0.iter()
    }
}
