//! Validation of what steers scheduling: affinity, tolerations, taints, topology spread.

use serde_json::Value;

use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::metadata::label_selector;
use crate::kinds::read::Read;

const EFFECTS: &[&str] = &["NoSchedule", "PreferNoSchedule", "NoExecute"];
const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";

/// Checks a pod's `affinity`.
pub(super) fn affinity(affinity: &Value, path: &Path, faults: &mut Faults) {
    let (node, node_path) = (affinity.at("nodeAffinity"), path.child("nodeAffinity"));
    if node.has(REQUIRED) {
        node_selector(node.at(REQUIRED), &node_path.child(REQUIRED), faults);
    }
    for (index, term) in node.list(PREFERRED).iter().enumerate() {
        let here = node_path.child(PREFERRED).index(index);
        weight(term, &here, faults);
        node_selector_term(term.at("preference"), false, &here.child("preference"), faults);
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        let (terms, here) = (affinity.at(kind), path.child(kind));
        for (index, term) in terms.list(REQUIRED).iter().enumerate() {
            pod_term(term, &here.child(REQUIRED).index(index), faults);
        }
        for (index, term) in terms.list(PREFERRED).iter().enumerate() {
            let here = here.child(PREFERRED).index(index);
            weight(term, &here, faults);
            pod_term(term.at("podAffinityTerm"), &here.child("podAffinityTerm"), faults);
        }
    }
}

fn weight(term: &Value, path: &Path, faults: &mut Faults) {
    let weight = term.int("weight").unwrap_or(0);
    if !(1..=100).contains(&weight) {
        faults.invalid(&path.child("weight"), weight, "must be in the range 1-100");
    }
}

/// Checks a `NodeSelector`.
pub(super) fn node_selector(selector: &Value, path: &Path, faults: &mut Faults) {
    let terms = path.child("nodeSelectorTerms");
    if selector.list("nodeSelectorTerms").is_empty() {
        faults.required(&terms, "must have at least one node selector term");
    }
    for (index, term) in selector.list("nodeSelectorTerms").iter().enumerate() {
        node_selector_term(term, true, &terms.index(index), faults);
    }
}

fn node_selector_term(term: &Value, check_values: bool, path: &Path, faults: &mut Faults) {
    for (index, requirement) in term.list("matchExpressions").iter().enumerate() {
        node_requirement(requirement, check_values, &path.child("matchExpressions").index(index), faults);
    }
    for (index, requirement) in term.list("matchFields").iter().enumerate() {
        let here = path.child("matchFields").index(index);
        match requirement.text("operator") {
            "In" | "NotIn" if requirement.list("values").len() != 1 => {
                faults.required(
                    &here.child("values"),
                    "must be only one value when `operator` is 'In' or 'NotIn' for node field selector",
                );
            }
            "In" | "NotIn" => {}
            other => faults.invalid(&here.child("operator"), other, "not a valid selector operator"),
        }
        if requirement.text("key") != "metadata.name" {
            faults.invalid(&here.child("key"), requirement.text("key"), "not a valid field selector key");
        }
    }
}

fn node_requirement(requirement: &Value, check_values: bool, path: &Path, faults: &mut Faults) {
    let values = requirement.texts("values");
    match requirement.text("operator") {
        "In" | "NotIn" if values.is_empty() => {
            faults.required(&path.child("values"), "must be specified when `operator` is 'In' or 'NotIn'");
        }
        "Exists" | "DoesNotExist" if !values.is_empty() => {
            faults
                .forbidden(&path.child("values"), "may not be specified when `operator` is 'Exists' or 'DoesNotExist'");
        }
        "Gt" | "Lt" if values.len() != 1 => {
            faults.required(&path.child("values"), "must be specified single value when `operator` is 'Lt' or 'Gt'");
        }
        "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
        other => faults.invalid(&path.child("operator"), other, "not a valid selector operator"),
    }
    let key = requirement.text("key");
    faults.invalid_each(&path.child("key"), key, format::label_key(key));
    for (index, value) in values.iter().enumerate().filter(|_| check_values) {
        faults.invalid_each(&path.child("values").index(index), value, format::label_value(value));
    }
}

fn pod_term(term: &Value, path: &Path, faults: &mut Faults) {
    label_selector(term.at("labelSelector"), &path.child("labelSelector"), faults);
    label_selector(term.at("namespaceSelector"), &path.child("namespaceSelector"), faults);
    for namespace in term.texts("namespaces") {
        faults.invalid_each(&path.child("namespace"), namespace, format::dns_label(namespace));
    }
    label_keys(term, "matchLabelKeys", path, faults);
    label_keys(term, "mismatchLabelKeys", path, faults);
    let mismatched = term.texts("mismatchLabelKeys");
    for (index, key) in term.texts("matchLabelKeys").iter().enumerate() {
        if mismatched.contains(key) {
            let here = path.child("matchLabelKeys").index(index);
            faults.invalid(&here, *key, "exists in both matchLabelKeys and mismatchLabelKeys");
        }
    }
    let key = term.text("topologyKey");
    if key.is_empty() {
        faults.required(&path.child("topologyKey"), "can not be empty");
    }
    faults.invalid_each(&path.child("topologyKey"), key, format::label_key(key));
}

fn label_keys(owner: &Value, field: &str, path: &Path, faults: &mut Faults) {
    let keys = owner.texts(field);
    if !keys.is_empty() && !owner.has("labelSelector") {
        faults.forbidden(&path.child(field), "must not be specified when labelSelector is not set");
        return;
    }
    for (index, key) in keys.iter().enumerate() {
        faults.invalid_each(&path.child(field).index(index), key, format::label_key(key));
    }
}

/// Checks a taint's or toleration's effect.
fn effect(effect: &str, empty_allowed: bool, path: &Path, faults: &mut Faults) {
    if effect.is_empty() {
        if !empty_allowed {
            faults.required(path, "");
        }
    } else if !EFFECTS.contains(&effect) {
        faults.unsupported(path, effect, EFFECTS);
    }
}

/// Checks `tolerations`.
pub(super) fn tolerations(tolerations: &[Value], path: &Path, faults: &mut Faults) {
    for (index, toleration) in tolerations.iter().enumerate() {
        let here = path.index(index);
        let (key, operator, value) = (toleration.text("key"), toleration.text("operator"), toleration.text("value"));
        if !key.is_empty() {
            faults.invalid_each(&here.child("key"), key, format::label_key(key));
        } else if operator != "Exists" {
            let detail = "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
            faults.invalid(&here.child("operator"), operator, detail);
        }
        if toleration.has("tolerationSeconds") && toleration.text("effect") != "NoExecute" {
            let detail = "effect must be 'NoExecute' when `tolerationSeconds` is set";
            faults.invalid(&here.child("effect"), toleration.text("effect"), detail);
        }
        match operator {
            "" | "Equal" => {
                let complaints = format::label_value(value);
                if !complaints.is_empty() {
                    faults.invalid(&here.child("operator"), value, &complaints.join(";"));
                }
            }
            "Exists" if !value.is_empty() => {
                faults.invalid(&here.child("operator"), value, "value must be empty when `operator` is 'Exists'");
            }
            "Exists" => {}
            other => faults.unsupported(&here.child("operator"), other, &["Equal", "Exists"]),
        }
        effect(toleration.text("effect"), true, &here.child("effect"), faults);
    }
}

/// Checks a node's `taints`.
pub(super) fn taints(taints: &[Value], path: &Path, faults: &mut Faults) {
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for (index, taint) in taints.iter().enumerate() {
        let here = path.index(index);
        let (key, value, kind) = (taint.text("key"), taint.text("value"), taint.text("effect"));
        faults.invalid_each(&here.child("key"), key, format::label_key(key));
        let complaints = format::label_value(value);
        if !complaints.is_empty() {
            faults.invalid(&here.child("value"), value, &complaints.join(";"));
        }
        effect(kind, false, &here.child("effect"), faults);
        if seen.contains(&(key, kind)) {
            faults.duplicate_because(&here, taint, "taints must be unique by key and effect pair");
            continue;
        }
        seen.push((key, kind));
    }
}

/// Checks `topologySpreadConstraints`.
pub(super) fn topology_spread(constraints: &[Value], path: &Path, faults: &mut Faults) {
    const ACTIONS: &[&str] = &["DoNotSchedule", "ScheduleAnyway"];
    for (index, constraint) in constraints.iter().enumerate() {
        let here = path.index(index);
        let skew = constraint.int("maxSkew").unwrap_or(0);
        if skew <= 0 {
            faults.invalid(&here.child("maxSkew"), skew, "must be greater than zero");
        }
        let (key, action) = (constraint.text("topologyKey"), constraint.text("whenUnsatisfiable"));
        if key.is_empty() {
            faults.required(&here.child("topologyKey"), "can not be empty");
        }
        if !ACTIONS.contains(&action) {
            faults.unsupported(&here.child("whenUnsatisfiable"), action, ACTIONS);
        }
        let later = constraints.iter().skip(index.saturating_add(1));
        if later.into_iter().any(|other| other.text("topologyKey") == key && other.text("whenUnsatisfiable") == action)
        {
            faults.duplicate(&here.child("{topologyKey, whenUnsatisfiable}"), format!("{{{key}, {action}}}").as_str());
        }
        if let Some(domains) = constraint.int("minDomains") {
            if domains <= 0 {
                faults.invalid(&here.child("minDomains"), domains, "must be greater than zero");
            }
            if action != "DoNotSchedule" {
                let detail = format!("can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {action}");
                faults.invalid(&here.child("minDomains"), domains, &detail);
            }
        }
        for field in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            if constraint.has(field) && !["Honor", "Ignore"].contains(&constraint.text(field)) {
                faults.unsupported(&here.child(field), constraint.text(field), &["Honor", "Ignore"]);
            }
        }
        label_keys(constraint, "matchLabelKeys", &here, faults);
        label_selector(constraint.at("labelSelector"), &here.child("labelSelector"), faults);
    }
}
