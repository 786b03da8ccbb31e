//! Namespaces, as far as the network needs them.

use k8s_openapi::api::core::v1 as core;
use serde::{Deserialize, Serialize};

use crate::{Chosen, Invalid, Labels, SocketServices};

/// A namespace and its labels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// Its labels; the API server adds `kubernetes.io/metadata.name`.
    pub labels: Labels,
    /// What holds for those of its pods that do not say so themselves.
    pub socket_services: SocketServices,
    /// Its pods may choose their addresses ([`Chosen::allowed`]).
    #[serde(default)]
    pub pods_choose: bool,
    /// It has a deletion timestamp: its objects are being deleted, in no order that can be relied on.
    #[serde(default)]
    pub terminating: bool,
}

impl TryFrom<&core::Namespace> for Namespace {
    type Error = Invalid;

    fn try_from(object: &core::Namespace) -> Result<Self, Invalid> {
        let name = object.metadata.name.clone().ok_or_else(|| Invalid::new("Namespace", "metadata.name", "missing"))?;
        let socket_services = SocketServices::of(object.metadata.annotations.as_ref());
        let pods_choose = Chosen::allowed(object.metadata.annotations.as_ref());
        let labels = object.metadata.labels.clone().unwrap_or_default();
        let terminating = object.metadata.deletion_timestamp.is_some();
        Ok(Self { name, labels, socket_services, pods_choose, terminating })
    }
}
