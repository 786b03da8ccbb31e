//! Validation of roles and their bindings.

use serde_json::Value;

use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::metadata::label_selector;
use crate::kinds::read::Read;

const GROUP: &str = "rbac.authorization.k8s.io";

/// Checks a `Role` or `ClusterRole`.
pub(crate) fn role(object: &Value, faults: &mut Faults) {
    let namespaced = object.at("metadata").has("namespace");
    for (index, rule) in object.list("rules").iter().enumerate() {
        self::rule(rule, namespaced, &Path::new("rules").index(index), faults);
    }
    if object.has("aggregationRule") {
        let path = Path::new("aggregationRule").child("clusterRoleSelectors");
        let selectors = object.at("aggregationRule").list("clusterRoleSelectors");
        if selectors.is_empty() {
            faults.required(&path, "at least one clusterRoleSelector required if aggregationRule is non-nil");
        }
        for (index, selector) in selectors.iter().enumerate() {
            label_selector(selector, &path.index(index), faults);
        }
    }
}

fn rule(rule: &Value, namespaced: bool, path: &Path, faults: &mut Faults) {
    if rule.list("verbs").is_empty() {
        faults.required(&path.child("verbs"), "verbs must contain at least one value");
    }
    let given = |field: &str| !rule.list(field).is_empty();
    if given("nonResourceURLs") {
        let (here, shown) = (path.child("nonResourceURLs"), rule.at("nonResourceURLs"));
        if namespaced {
            faults.invalid(&here, shown, "namespaced rules cannot apply to non-resource URLs");
        }
        if given("apiGroups") || given("resources") || given("resourceNames") {
            faults.invalid(&here, shown, "rules cannot apply to both regular resources and non-resource URLs");
        }
        return;
    }
    if !given("apiGroups") {
        faults.required(&path.child("apiGroups"), "resource rules must supply at least one api group");
    }
    if !given("resources") {
        faults.required(&path.child("resources"), "resource rules must supply at least one resource");
    }
}

/// Checks a `RoleBinding` or `ClusterRoleBinding`.
pub(crate) fn role_binding(object: &Value, faults: &mut Faults) {
    let namespaced = object.at("metadata").has("namespace");
    let (role, path) = (object.at("roleRef"), Path::new("roleRef"));
    if role.text("apiGroup") != GROUP {
        faults.unsupported(&path.child("apiGroup"), role.text("apiGroup"), &[GROUP]);
    }
    let kinds: &[&str] = if namespaced { &["Role", "ClusterRole"] } else { &["ClusterRole"] };
    if !kinds.contains(&role.text("kind")) {
        faults.unsupported(&path.child("kind"), role.text("kind"), kinds);
    }
    let name = role.text("name");
    if name.is_empty() {
        faults.required(&path.child("name"), "");
    } else {
        faults.invalid_each(&path.child("name"), name, format::path_segment(name));
    }
    for (index, subject) in object.list("subjects").iter().enumerate() {
        self::subject(subject, namespaced, &Path::new("subjects").index(index), faults);
    }
}

fn subject(subject: &Value, namespaced: bool, path: &Path, faults: &mut Faults) {
    let (name, group) = (subject.text("name"), subject.text("apiGroup"));
    if name.is_empty() {
        faults.required(&path.child("name"), "");
    }
    match subject.text("kind") {
        "ServiceAccount" => {
            if !name.is_empty() {
                faults.invalid_each(&path.child("name"), name, format::dns_subdomain(name));
            }
            if !group.is_empty() {
                faults.unsupported(&path.child("apiGroup"), group, &[""]);
            }
            if !namespaced && subject.text("namespace").is_empty() {
                faults.required(&path.child("namespace"), "");
            }
        }
        "User" | "Group" => {
            if group != GROUP {
                faults.unsupported(&path.child("apiGroup"), group, &[GROUP]);
            }
        }
        other => faults.unsupported(&path.child("kind"), other, &["ServiceAccount", "User", "Group"]),
    }
}

/// What a binding refers to never changes.
pub(crate) fn role_binding_update(object: &Value, old: &Value, faults: &mut Faults) {
    if object.at("roleRef") != old.at("roleRef") {
        faults.invalid(&Path::new("roleRef"), object.at("roleRef"), "cannot change roleRef");
    }
}
