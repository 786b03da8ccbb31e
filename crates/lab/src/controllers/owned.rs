//! Owner references: which object made which.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{Resource, ResourceExt};

use super::Error;

/// The reference that a controller puts into what it makes.
pub(super) fn controller_of<K: Resource<DynamicType = ()>>(owner: &K) -> Result<OwnerReference, Error> {
    owner.controller_owner_ref(&()).ok_or(Error::Incomplete("name or uid"))
}

/// The controlling owner of an object, if it has one.
pub(super) fn controller(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references.iter().flatten().find(|r| r.controller == Some(true))
}

/// Whether `owner` controls the object.
pub(super) fn is_controlled_by<K: Resource>(meta: &ObjectMeta, owner: &K) -> bool {
    owner.uid().is_some_and(|uid| controller(meta).is_some_and(|r| r.uid == uid))
}

/// Namespace of a namespaced object.
pub(super) fn namespace<K: Resource>(object: &K) -> Result<String, Error> {
    object.namespace().ok_or(Error::Incomplete("namespace"))
}
