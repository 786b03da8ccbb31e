//! The one error of this crate: an object that says something impossible, and how parsers name the place of it.

use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::Selector;

/// An object, or one of its fields, is not what the Kubernetes API allows. The object is left out of the world; the
/// message goes to a person.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {field}: {reason}")]
pub struct Invalid {
    /// Kind, namespace and name: `Pod default/web`.
    pub object: String,
    /// Field path, for example `spec.ports[0].port`.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Invalid {
    /// An error for `object` at `field`.
    pub fn new(object: impl fmt::Display, field: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self { object: object.to_string(), field: field.into(), reason: reason.to_string() }
    }
}

/// A field of an object that is being parsed.
#[derive(Clone, Debug)]
pub(crate) struct At<'a> {
    /// Kind and name of the object.
    pub(crate) who: &'a str,
    /// Field path.
    pub(crate) field: String,
}

impl<'a> At<'a> {
    /// An error at a field below this one.
    pub(crate) fn invalid(&self, below: &str, reason: impl fmt::Display) -> Invalid {
        Invalid::new(self.who, format!("{}{below}", self.field), reason)
    }

    /// A field below this one.
    pub(crate) fn below(&self, field: &str) -> At<'a> {
        At { who: self.who, field: format!("{}{field}", self.field) }
    }

    /// A selector at a field below this one.
    pub(crate) fn selector(&self, below: &str, selector: &LabelSelector) -> Result<Selector, Invalid> {
        Selector::parse(selector, self.who, &format!("{}{below}", self.field))
    }

    /// A port's number at a field below this one.
    pub(crate) fn port<N: Copy + fmt::Display + TryInto<u16>>(&self, below: &str, value: N) -> Result<u16, Invalid> {
        let number = value.try_into().ok().filter(|number| *number > 0);
        number.ok_or_else(|| self.invalid(below, format!("{value} is not between 1 and 65535")))
    }
}

/// Decides whether something impossible ends the parsing of an object.
pub(crate) type Refuse<'r> = &'r mut dyn FnMut(Invalid) -> Result<(), Invalid>;

/// Parses an object past all that is impossible in it, which comes with what was made of the rest.
///
/// # Errors
/// What `parse` itself returns: there is nothing to make.
pub(crate) fn with_problems<T>(
    parse: impl FnOnce(Refuse<'_>) -> Result<T, Invalid>,
) -> Result<(T, Vec<Invalid>), Invalid> {
    let mut problems = Vec::new();
    let parsed = parse(&mut |problem| {
        problems.push(problem);
        Ok(())
    })?;
    Ok((parsed, problems))
}
