//! Namespaces, as far as selectors need them.

use k8s_openapi::api::core::v1 as core;
use serde::{Deserialize, Serialize};

use crate::{Invalid, Labels};

/// A namespace and its labels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// Its labels; the API server adds `kubernetes.io/metadata.name`.
    pub labels: Labels,
}

impl TryFrom<&core::Namespace> for Namespace {
    type Error = Invalid;

    fn try_from(object: &core::Namespace) -> Result<Self, Invalid> {
        let name = object.metadata.name.clone().ok_or_else(|| Invalid::new("Namespace", "metadata.name", "missing"))?;
        Ok(Self { name, labels: object.metadata.labels.clone().unwrap_or_default() })
    }
}
