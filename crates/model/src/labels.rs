//! Labels and label selectors (`meta/v1` `LabelSelector`).

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::{Deserialize, Serialize};

use crate::Invalid;

/// An object's labels.
pub type Labels = BTreeMap<String, String>;

/// A parsed label selector. All requirements must hold; none at all selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Selector {
    /// Sorted, so that equal selectors compare equal however they were written.
    requirements: BTreeSet<Requirement>,
}

/// One requirement of a selector.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Requirement {
    /// The label is there and its value is one of these. (`matchLabels` is the case of one value.)
    In(String, BTreeSet<String>),
    /// The label is absent, or its value is none of these.
    NotIn(String, BTreeSet<String>),
    /// The label is there.
    Exists(String),
    /// The label is absent.
    DoesNotExist(String),
}

impl Requirement {
    fn matches(&self, labels: &Labels) -> bool {
        match self {
            Requirement::In(key, values) => labels.get(key).is_some_and(|v| values.contains(v)),
            Requirement::NotIn(key, values) => labels.get(key).is_none_or(|v| !values.contains(v)),
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::DoesNotExist(key) => !labels.contains_key(key),
        }
    }

    /// The label key the requirement is about.
    pub fn key(&self) -> &str {
        match self {
            Requirement::In(k, _)
            | Requirement::NotIn(k, _)
            | Requirement::Exists(k)
            | Requirement::DoesNotExist(k) => k,
        }
    }
}

impl Selector {
    /// The selector that selects everything.
    pub fn everything() -> Self {
        Self::default()
    }

    /// A selector of these requirements.
    pub fn of(requirements: impl IntoIterator<Item = Requirement>) -> Self {
        Self { requirements: requirements.into_iter().collect() }
    }

    /// A selector that wants these labels with these values (a Service's `spec.selector`).
    pub fn equals<K: Into<String>, V: Into<String>>(labels: impl IntoIterator<Item = (K, V)>) -> Self {
        Self::of(labels.into_iter().map(|(k, v)| Requirement::In(k.into(), BTreeSet::from([v.into()]))))
    }

    /// Parses the API form. `object` and `field` name it in errors.
    ///
    /// # Errors
    /// An unknown operator, or values where the operator has none or the other way round.
    pub fn parse(selector: &LabelSelector, object: &str, field: &str) -> Result<Self, Invalid> {
        let mut requirements = BTreeSet::new();
        for (key, value) in selector.match_labels.iter().flatten() {
            requirements.insert(Requirement::In(key.clone(), BTreeSet::from([value.clone()])));
        }
        for (index, expression) in selector.match_expressions.iter().flatten().enumerate() {
            let at = || format!("{field}.matchExpressions[{index}]");
            let key = expression.key.clone();
            let values: BTreeSet<String> = expression.values.iter().flatten().cloned().collect();
            let requirement = match (expression.operator.as_str(), values.is_empty()) {
                ("In", false) => Requirement::In(key, values),
                ("NotIn", false) => Requirement::NotIn(key, values),
                ("Exists", true) => Requirement::Exists(key),
                ("DoesNotExist", true) => Requirement::DoesNotExist(key),
                ("In" | "NotIn", true) => return Err(Invalid::new(object, at(), "In and NotIn need values")),
                ("Exists" | "DoesNotExist", false) => {
                    return Err(Invalid::new(object, at(), "Exists and DoesNotExist take no values"));
                }
                (other, _) => return Err(Invalid::new(object, at(), format!("unknown operator {other:?}"))),
            };
            requirements.insert(requirement);
        }
        Ok(Self { requirements })
    }

    /// Whether all requirements hold for `labels`.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|r| r.matches(labels))
    }

    /// Whether it selects everything because it has no requirement.
    pub fn is_everything(&self) -> bool {
        self.requirements.is_empty()
    }

    /// The requirements, sorted.
    pub fn requirements(&self) -> impl Iterator<Item = &Requirement> {
        self.requirements.iter()
    }
}

impl std::fmt::Display for Selector {
    /// As `kubectl -l` takes it; `<everything>` when there is no requirement.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_everything() {
            return f.write_str("<everything>");
        }
        let join = |values: &BTreeSet<String>| values.iter().cloned().collect::<Vec<_>>().join(",");
        for (index, requirement) in self.requirements.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            match requirement {
                Requirement::In(key, values) if values.len() == 1 => write!(f, "{key}={}", join(values))?,
                Requirement::In(key, values) => write!(f, "{key} in ({})", join(values))?,
                Requirement::NotIn(key, values) => write!(f, "{key} notin ({})", join(values))?,
                Requirement::Exists(key) => write!(f, "{key}")?,
                Requirement::DoesNotExist(key) => write!(f, "!{key}")?,
            }
        }
        Ok(())
    }
}
