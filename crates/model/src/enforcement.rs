//! Whether a policy is enforced or only audited: judged and reported, one policy at a time.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Annotation of a NetworkPolicy or a ClusterNetworkPolicy: [`Enforcement::AUDITED`], or [`Enforcement::ENFORCED`] as if it were not there.
pub const AUDIT_ANNOTATION: &str = "towpath.dev/audit";

/// No more of what is not understood is kept, in characters.
const KEPT: usize = 40;

/// What becomes of what a policy says.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Enforcement {
    /// It is done.
    #[default]
    Enforced,
    /// It is not. What it would deny that passes is counted and told.
    Audited,
    /// The annotation has another value, of which this is the beginning: enforced, because whoever writes a policy means it.
    Misunderstood(Box<str>),
}

impl Enforcement {
    /// The annotation's value for [`Enforcement::Audited`].
    pub const AUDITED: &str = "true";
    /// The annotation's value for [`Enforcement::Enforced`].
    pub const ENFORCED: &str = "false";

    /// What an object's annotations say.
    pub fn of(annotations: Option<&BTreeMap<String, String>>) -> Self {
        match annotations.and_then(|all| all.get(AUDIT_ANNOTATION)).map(String::as_str) {
            None | Some(Self::ENFORCED) => Self::Enforced,
            Some(Self::AUDITED) => Self::Audited,
            Some(other) => Self::Misunderstood(other.chars().take(KEPT).collect()),
        }
    }

    /// Whether it decides nothing.
    pub fn is_audited(&self) -> bool {
        *self == Self::Audited
    }

    /// What to say of an annotation that is not understood.
    pub fn misread(&self) -> Option<String> {
        let Self::Misunderstood(said) = self else { return None };
        Some(format!(
            "annotation {AUDIT_ANNOTATION}: {said:?} is neither \"{}\" nor \"{}\": the policy is enforced",
            Self::AUDITED,
            Self::ENFORCED
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(value: &str) -> Enforcement {
        Enforcement::of(Some(&[(AUDIT_ANNOTATION.to_owned(), value.to_owned())].into()))
    }

    #[test]
    fn only_what_says_so_to_the_letter_is_audited() {
        assert_eq!(Enforcement::of(None), Enforcement::Enforced);
        assert_eq!(Enforcement::of(Some(&BTreeMap::new())), Enforcement::Enforced);
        assert_eq!(said("false"), Enforcement::Enforced);
        assert!(said("true").is_audited() && said("true").misread().is_none());
        for odd in ["True", "yes", "1", " true", ""] {
            assert!(!said(odd).is_audited(), "{odd:?}");
            assert!(said(odd).misread().unwrap().contains(&format!("{odd:?}")));
        }
    }

    #[test]
    fn of_what_is_not_understood_only_the_beginning_is_kept() {
        let Enforcement::Misunderstood(kept) = said(&"é".repeat(1 << 16)) else { panic!("understood") };
        assert_eq!(kept.chars().count(), KEPT);
    }
}
