//! The chain of authorizers: `system:masters`, the node rules, RBAC.

use super::{Attributes, node};
use crate::server::Core;
use crate::status::{ApiError, qualified};

/// Whether the user may do this.
pub(crate) fn allows(core: &Core, attributes: &Attributes<'_>) -> bool {
    attributes.user.groups.iter().any(|group| group == "system:masters")
        || node::allows(attributes)
        || core.rbac.allows(core, attributes)
}

/// The same as an answer to the request: 403 as Kubernetes words it.
pub(crate) fn authorize(core: &Core, attributes: &Attributes<'_>) -> Result<(), ApiError> {
    if allows(core, attributes) {
        return Ok(());
    }
    let user = &attributes.user.name;
    if attributes.resource.is_empty() {
        let message = format!("forbidden: User {user:?} cannot {} path {:?}", attributes.verb, attributes.path);
        let mut error = ApiError::new(403, "Forbidden", message);
        error.set_details(serde_json::json!({}));
        return Err(error);
    }
    let resource = if attributes.subresource.is_empty() {
        attributes.resource.to_owned()
    } else {
        format!("{}/{}", attributes.resource, attributes.subresource)
    };
    let place = if attributes.namespace.is_empty() {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace {:?}", attributes.namespace)
    };
    let object = qualified(attributes.group, attributes.resource);
    let named = if attributes.name.is_empty() { object } else { format!("{object} {:?}", attributes.name) };
    let message = format!(
        "{named} is forbidden: User {user:?} cannot {} resource {resource:?} in API group {:?} {place}",
        attributes.verb, attributes.group
    );
    let mut error = ApiError::new(403, "Forbidden", message);
    let mut details = serde_json::Map::new();
    for (key, value) in [("name", attributes.name), ("group", attributes.group), ("kind", attributes.resource)] {
        if !value.is_empty() {
            details.insert(key.to_owned(), value.into());
        }
    }
    error.set_details(details.into());
    Err(error)
}
