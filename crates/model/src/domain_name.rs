//! Names that policies ask for: one, or all below one.
//!
//! As `DomainName` of network-policy-api v0.2.0 has it: `*` stands for one label or more, only at the beginning, and never for a part of a
//! label; the name itself does not match what is below it.

use std::collections::HashSet;
use std::fmt;

use serde::{Deserialize, Serialize};

/// A domain name, or all names below one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DomainName {
    /// It began with `*.`: one label or more stand before `name`, and `name` itself does not match.
    pub below: bool,
    /// Lower case, without a dot at the end.
    pub name: String,
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.below { "*." } else { "" }, self.name)
    }
}

impl DomainName {
    /// As the definition's pattern has it: labels of letters, digits, `-` and `_`, at least two of them, with `*.` before and a dot after.
    pub fn parse(text: &str) -> Option<Self> {
        let (below, rest) = text.strip_prefix("*.").map_or((false, text), |rest| (true, rest));
        let name = rest.strip_suffix('.').unwrap_or(rest);
        let outer = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
        let label = |label: &str| {
            outer(label.chars().next())
                && outer(label.chars().last())
                && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
        };
        let valid = name.contains('.') && name.split('.').all(label);
        valid.then(|| Self { below, name: name.to_ascii_lowercase() })
    }

    /// Whether it stands for a name (any case, with or without a dot at the end).
    pub fn matches(&self, name: &str) -> bool {
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        if !self.below {
            return name == self.name;
        }
        name.strip_suffix(&self.name).and_then(|rest| rest.strip_suffix('.')).is_some_and(|labels| !labels.is_empty())
    }
}

/// Many names, asked at once: a question costs no more than the name has labels, however many there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DomainNames {
    exact: HashSet<String>,
    below: HashSet<String>,
}

impl<'a> FromIterator<&'a DomainName> for DomainNames {
    fn from_iter<I: IntoIterator<Item = &'a DomainName>>(names: I) -> Self {
        let mut all = Self::default();
        for name in names {
            let set = if name.below { &mut all.below } else { &mut all.exact };
            set.insert(name.name.clone());
        }
        all
    }
}

impl DomainNames {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.below.is_empty()
    }

    /// Whether one of them stands for a name (lower case, without a dot at the end).
    pub fn matches(&self, name: &str) -> bool {
        if self.exact.contains(name) {
            return true;
        }
        let mut rest = name;
        while let Some((label, above)) = rest.split_once('.') {
            if !label.is_empty() && self.below.contains(above) {
                return true;
            }
            rest = above;
        }
        false
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = DomainName> {
        let exact = self.exact.iter().map(|name| DomainName { below: false, name: name.clone() });
        let below = self.below.iter().map(|name| DomainName { below: true, name: name.clone() });
        let mut all: Vec<DomainName> = exact.chain(below).collect();
        all.sort();
        all.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn many_names_match_what_one_of_them_does(
            patterns in prop::collection::vec("(\\*\\.)?[ab](\\.[abc]){1,3}", 0..6),
            names in prop::collection::vec("\\.?[abc](\\.[abc]){0,5}", 8),
        ) {
            let patterns: Vec<DomainName> = patterns.iter().filter_map(|text| DomainName::parse(text)).collect();
            let all: DomainNames = patterns.iter().collect();
            for name in names {
                prop_assert_eq!(all.matches(&name), patterns.iter().any(|one| one.matches(&name)), "{}", name);
            }
            let mut sorted = patterns.clone();
            sorted.sort();
            sorted.dedup();
            prop_assert_eq!(all.iter().collect::<Vec<_>>(), sorted);
        }
    }

    #[test]
    fn a_name_is_written_as_it_is_read() {
        for text in ["*.example.com", "example.com", "_srv.a-b.c"] {
            assert_eq!(DomainName::parse(text).unwrap().to_string(), text);
        }
    }
}
