//! The one error of this crate: an object that says something impossible.

use std::fmt;

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
