//! The built-in kinds: names, defaults, validation, merge rules and table columns.

mod conform;
mod defaults;
pub(crate) mod fault;
mod format;
pub(crate) mod merge;
pub(crate) mod metadata;
mod prepare;
pub(crate) mod print;
pub(crate) mod protobuf;
pub mod quantity;
pub(crate) mod read;
mod rules;
pub(crate) mod schema;
mod selectable;
mod strategy;
pub(crate) mod table;
mod validate;

use std::borrow::Cow;

use crate::resource::{GroupVersionKind, ResourceKind, ScalePaths};
use table::{Row, Served};

/// Every built-in resource, in the order discovery lists them.
pub fn builtin() -> Vec<ResourceKind> {
    table::ROWS.iter().map(resource).collect()
}

fn resource(row: &'static Row) -> ResourceKind {
    let borrowed = |names: &'static [&'static str]| names.iter().map(|name| Cow::Borrowed(*name)).collect();
    let storage_key = match (row.group, row.plural) {
        ("events.k8s.io", "events") | ("", "events") => Cow::Borrowed("/events"),
        (group, plural) => Cow::Owned(format!("{group}/{plural}")),
    };
    ResourceKind {
        gvk: GroupVersionKind { group: row.group.into(), version: row.version.into(), kind: row.kind.into() },
        plural: row.plural.into(),
        singular: Cow::Owned(row.kind.to_lowercase()),
        short_names: borrowed(row.short),
        categories: borrowed(row.categories),
        namespaced: row.namespaced,
        status: matches!(row.served, Served::Status | Served::Scale),
        scale: (row.served == Served::Scale).then(|| ScalePaths {
            spec_replicas: "/spec/replicas".into(),
            status_replicas: "/status/replicas".into(),
            selector: Some("/spec/selector".into()),
        }),
        stored: row.served != Served::Review,
        storage_key,
        strategy: strategy::Builtin::strategy(row, rules::of(row)),
    }
}

#[cfg(test)]
mod tests;
