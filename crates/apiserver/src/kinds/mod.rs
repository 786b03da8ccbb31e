//! The built-in kinds: names, defaults, validation, merge rules and table columns.

use crate::resource::ResourceKind;

/// Every built-in resource, in the order discovery lists them.
pub fn builtin() -> Vec<ResourceKind> {
    Vec::new()
}
