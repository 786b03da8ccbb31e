//! Which rules belong to which kind.

use super::metadata::NameRule;
use super::strategy::Rules;
use super::table::Row;

/// The rules of the kind in `row`.
pub(crate) fn of(row: &Row) -> Rules {
    let name = match (row.group, row.kind) {
        ("", "Namespace" | "Service") => NameRule::Label,
        ("rbac.authorization.k8s.io", _) => NameRule::PathSegment,
        ("networking.k8s.io", "IPAddress") => NameRule::Address,
        ("certificates.k8s.io", _) => NameRule::Any,
        _ => NameRule::Subdomain,
    };
    Rules { name, ..Rules::PLAIN }
}
