//! Validation of Deployments, ReplicaSets, DaemonSets, StatefulSets and what belongs to them.

use serde_json::Value;

use super::{not_negative, pod};
use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::metadata::{immutable, label_selector, same, selector_is_empty, selector_matches};
use crate::kinds::read::{Read, keep_from};

/// A count or a percentage.
pub(super) fn int_or_percent(value: &Value, path: &Path, faults: &mut Faults) {
    match value {
        Value::String(text) => faults.invalid_each(path, text, format::percent(text)),
        other => {
            if let Some(number) = other.as_i64().filter(|number| *number < 0) {
                faults.invalid(path, number, format::NOT_NEGATIVE);
            }
        }
    }
}

fn percent_of(value: &Value) -> Option<i64> {
    value.as_str().and_then(|text| text.strip_suffix('%')).and_then(|digits| digits.parse().ok())
}

/// No percentage above a hundred.
pub(super) fn at_most_all(value: &Value, path: &Path, faults: &mut Faults) {
    if percent_of(value).is_some_and(|percent| percent > 100) {
        faults.invalid(path, value, "must not be greater than 100%");
    }
}

fn amount(value: &Value) -> i64 {
    percent_of(value).or_else(|| value.as_i64()).unwrap_or(0)
}

/// A selector that must be given, must not be empty and must match the template.
fn selector_and_template(spec: &Value, empty: &str, kind: &str, path: &Path, faults: &mut Faults) {
    let (selector, here) = (spec.at("selector"), path.child("selector"));
    if selector.is_null() {
        faults.required(&here, "");
    } else {
        label_selector(selector, &here, faults);
        if selector_is_empty(selector) {
            faults.invalid(&here, selector, empty);
        }
    }
    template_matches(spec, path, faults);
    always_restarted(spec, kind, path, faults);
}

fn template_matches(spec: &Value, path: &Path, faults: &mut Faults) {
    let (selector, template) = (spec.at("selector"), spec.at("template"));
    let here = path.child("template");
    if !selector.is_null()
        && !selector_is_empty(selector)
        && !selector_matches(selector, template.deep(&["metadata", "labels"]))
    {
        let labels_path = here.child("metadata").child("labels");
        faults.invalid(
            &labels_path,
            template.deep(&["metadata", "labels"]),
            "`selector` does not match template `labels`",
        );
    }
    pod::template(template, &here, faults);
}

fn always_restarted(spec: &Value, kind: &str, path: &Path, faults: &mut Faults) {
    let (pod, here) = (spec.deep(&["template", "spec"]), path.child("template").child("spec"));
    if !matches!(pod.text("restartPolicy"), "Always") && pod.has("restartPolicy") {
        faults.unsupported(&here.child("restartPolicy"), pod.text("restartPolicy"), &["Always"]);
    }
    if let Some(seconds) = pod.int("activeDeadlineSeconds") {
        let here = here.child("activeDeadlineSeconds");
        match kind {
            "StatefulSet" | "DaemonSet" => faults.invalid(&here, seconds, "must not be specified"),
            kind => faults.forbidden(&here, &format!("activeDeadlineSeconds in {kind} is not Supported")),
        }
    }
}

const EMPTY_SELECTOR: &str = "empty selector is invalid for deployment";

/// Checks a `Deployment`.
pub(crate) fn deployment(object: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    not_negative(spec, "replicas", &path, faults);
    selector_and_template(spec, EMPTY_SELECTOR, "ReplicaSet", &path, faults);
    deployment_strategy(spec.at("strategy"), &path.child("strategy"), faults);
    not_negative(spec, "minReadySeconds", &path, faults);
    not_negative(spec, "revisionHistoryLimit", &path, faults);
    if let Some(deadline) = spec.int("progressDeadlineSeconds") {
        not_negative(spec, "progressDeadlineSeconds", &path, faults);
        if deadline <= spec.int("minReadySeconds").unwrap_or(0) {
            faults.invalid(&path.child("progressDeadlineSeconds"), deadline, "must be greater than minReadySeconds");
        }
    }
}

fn deployment_strategy(strategy: &Value, path: &Path, faults: &mut Faults) {
    let (rolling, here) = (strategy.at("rollingUpdate"), path.child("rollingUpdate"));
    match strategy.text("type") {
        "Recreate" if !rolling.is_null() => {
            faults.forbidden(&here, "may not be specified when strategy `type` is 'Recreate'");
        }
        "Recreate" => {}
        "RollingUpdate" if rolling.is_null() => faults.required(&here, "this should be defaulted and never be nil"),
        "RollingUpdate" => {
            let (unavailable, surge) = (rolling.at("maxUnavailable"), rolling.at("maxSurge"));
            int_or_percent(unavailable, &here.child("maxUnavailable"), faults);
            int_or_percent(surge, &here.child("maxSurge"), faults);
            if amount(unavailable) == 0 && amount(surge) == 0 {
                faults.invalid(&here.child("maxUnavailable"), unavailable, "may not be 0 when `maxSurge` is 0");
            }
            at_most_all(unavailable, &here.child("maxUnavailable"), faults);
        }
        other => faults.unsupported(&path.child("type"), other, &["Recreate", "RollingUpdate"]),
    }
}

/// The selector of a `Deployment` never changes.
pub(crate) fn deployment_update(object: &Value, old: &Value, faults: &mut Faults) {
    immutable(
        object.deep(&["spec", "selector"]),
        old.deep(&["spec", "selector"]),
        &Path::new("spec").child("selector"),
        faults,
    );
}

/// Checks a `ReplicaSet`.
pub(crate) fn replica_set(object: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    not_negative(spec, "replicas", &path, faults);
    not_negative(spec, "minReadySeconds", &path, faults);
    selector_and_template(spec, EMPTY_SELECTOR, "ReplicaSet", &path, faults);
}

/// The selector of a `ReplicaSet` never changes.
pub(crate) fn replica_set_update(object: &Value, old: &Value, faults: &mut Faults) {
    deployment_update(object, old, faults);
}

/// Checks a `ReplicationController`.
pub(crate) fn replication_controller(object: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    not_negative(spec, "minReadySeconds", &path, faults);
    if spec.at("selector").is_blank() {
        faults.required(&path.child("selector"), "");
    }
    not_negative(spec, "replicas", &path, faults);
    let template = spec.at("template");
    if template.is_null() {
        faults.required(&path.child("template"), "");
        return;
    }
    let known = template.deep(&["metadata", "labels"]);
    if spec.entries("selector").any(|(key, value)| known.at(key) != value) {
        let here = path.child("template").child("metadata").child("labels");
        faults.invalid(&here, known, "`selector` does not match template `labels`");
    }
    pod::template(template, &path.child("template"), faults);
    always_restarted(spec, "ReplicationController", &path, faults);
}

/// Checks a `DaemonSet`.
pub(crate) fn daemon_set(object: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    let selector = spec.at("selector");
    label_selector(selector, &path.child("selector"), faults);
    if selector.is_null() {
        let here = path.child("template").child("metadata").child("labels");
        faults.invalid(
            &here,
            spec.deep(&["template", "metadata", "labels"]),
            "`selector` does not match template `labels`",
        );
    } else if selector_is_empty(selector) {
        faults.invalid(&path.child("selector"), selector, "empty selector is invalid for daemonset");
    }
    template_matches(spec, &path, faults);
    always_restarted(spec, "DaemonSet", &path, faults);
    not_negative(spec, "minReadySeconds", &path, faults);
    let (strategy, here) = (spec.at("updateStrategy"), path.child("updateStrategy"));
    match strategy.text("type") {
        "OnDelete" => {}
        "RollingUpdate" if !strategy.has("rollingUpdate") => faults.required(&here.child("rollingUpdate"), ""),
        "RollingUpdate" => {
            let (rolling, here) = (strategy.at("rollingUpdate"), here.child("rollingUpdate"));
            let (unavailable, surge) = (rolling.at("maxUnavailable"), rolling.at("maxSurge"));
            int_or_percent(unavailable, &here.child("maxUnavailable"), faults);
            at_most_all(unavailable, &here.child("maxUnavailable"), faults);
            int_or_percent(surge, &here.child("maxSurge"), faults);
            at_most_all(surge, &here.child("maxSurge"), faults);
            match (amount(unavailable), amount(surge)) {
                (0, 0) => faults.required(&here.child("maxUnavailable"), "cannot be 0 when maxSurge is 0"),
                (0, _) | (_, 0) => {}
                _ => faults.invalid(&here.child("maxSurge"), surge, "may not be set when maxUnavailable is non-zero"),
            }
        }
        other => faults.unsupported(&here.child("type"), other, &["RollingUpdate", "OnDelete"]),
    }
    not_negative(spec, "revisionHistoryLimit", &path, faults);
}

/// The selector of a `DaemonSet` never changes.
pub(crate) fn daemon_set_update(object: &Value, old: &Value, faults: &mut Faults) {
    deployment_update(object, old, faults);
}

/// Checks a `StatefulSet`.
pub(crate) fn stateful_set(object: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    if !["OrderedReady", "Parallel"].contains(&spec.text("podManagementPolicy")) {
        let here = path.child("podManagementPolicy");
        faults.invalid(&here, spec.text("podManagementPolicy"), "must be 'OrderedReady' or 'Parallel'");
    }
    let (strategy, here) = (spec.at("updateStrategy"), path.child("updateStrategy"));
    let rolling = strategy.at("rollingUpdate");
    match strategy.text("type") {
        "OnDelete" if !rolling.is_null() => {
            faults.invalid(&here.child("rollingUpdate"), rolling, "only allowed for updateStrategy 'RollingUpdate'");
        }
        "OnDelete" => {}
        "RollingUpdate" => {
            not_negative(rolling, "partition", &here.child("rollingUpdate"), faults);
            if rolling.has("maxUnavailable") {
                let (value, here) = (rolling.at("maxUnavailable"), here.child("rollingUpdate").child("maxUnavailable"));
                int_or_percent(value, &here, faults);
                if amount(value) == 0 {
                    faults.invalid(&here, value, "cannot be 0");
                }
                at_most_all(value, &here, faults);
            }
        }
        "" => faults.required(&here, ""),
        _ => faults.invalid(&here, strategy, "must be 'RollingUpdate' or 'OnDelete'"),
    }
    let (policy, here) =
        (spec.at("persistentVolumeClaimRetentionPolicy"), path.child("persistentVolumeClaimRetentionPolicy"));
    for field in ["whenDeleted", "whenScaled"] {
        if policy.has(field) && !["Retain", "Delete"].contains(&policy.text(field)) {
            faults.unsupported(&here.child(field), policy.text(field), &["Retain", "Delete"]);
        }
    }
    for field in ["replicas", "minReadySeconds", "revisionHistoryLimit"] {
        not_negative(spec, field, &path, faults);
    }
    not_negative(spec.at("ordinals"), "start", &path.child("ordinals"), faults);
    let selector = spec.at("selector");
    if selector.is_null() {
        faults.required(&path.child("selector"), "");
    } else {
        label_selector(selector, &path.child("selector"), faults);
        if selector_is_empty(selector) {
            faults.invalid(&path.child("selector"), selector, "empty selector is invalid for statefulset");
        }
    }
    let (template, here) = (spec.at("template"), path.child("template"));
    if !selector.is_null()
        && !selector_is_empty(selector)
        && !selector_matches(selector, template.deep(&["metadata", "labels"]))
    {
        let here = here.child("metadata").child("labels");
        faults.invalid(&here, template.deep(&["metadata", "labels"]), "`selector` does not match template `labels`");
    }
    // Mounts may name claim templates, so claims count as volumes here.
    pod::template(&with_claims(spec), &here, faults);
    always_restarted(spec, "StatefulSet", &path, faults);
    if !spec.text("serviceName").is_empty() {
        let name = spec.text("serviceName");
        faults.invalid_each(&path.child("serviceName"), name, format::dns_label(name));
    }
}

fn with_claims(spec: &Value) -> Value {
    let mut template = spec.at("template").clone();
    let claims = spec.list("volumeClaimTemplates").iter().map(|claim| {
        let name = claim.deep(&["metadata", "name"]).clone();
        serde_json::json!({"name": name, "persistentVolumeClaim": {"claimName": name}})
    });
    if let Some(spec) = crate::kinds::read::present(&mut template, "spec") {
        let mut volumes = spec.list("volumes").to_vec();
        let names: Vec<Value> = volumes.iter().map(|volume| volume.at("name").clone()).collect();
        volumes.extend(claims.filter(|claim| !names.contains(claim.at("name"))));
        crate::kinds::read::put(spec, "volumes", volumes);
    }
    template
}

/// Only some fields of a `StatefulSet` may change.
pub(crate) fn stateful_set_update(object: &Value, old: &Value, faults: &mut Faults) {
    let mut munged = object.at("spec").clone();
    const FREE: &[&str] = &[
        "replicas",
        "ordinals",
        "template",
        "updateStrategy",
        "revisionHistoryLimit",
        "persistentVolumeClaimRetentionPolicy",
        "minReadySeconds",
    ];
    for field in FREE {
        keep_from(&mut munged, old.at("spec"), field);
    }
    if !same(&munged, old.at("spec")) {
        let detail = "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden";
        faults.forbidden(&Path::new("spec"), detail);
    }
}

/// Checks the counters in a workload's status.
pub(crate) fn workload_status(object: &Value, _old: &Value, faults: &mut Faults) {
    let (status, path) = (object.at("status"), Path::new("status"));
    const COUNTERS: &[&str] = &[
        "replicas",
        "updatedReplicas",
        "readyReplicas",
        "availableReplicas",
        "unavailableReplicas",
        "fullyLabeledReplicas",
        "currentReplicas",
        "observedGeneration",
        "currentNumberScheduled",
        "numberMisscheduled",
        "desiredNumberScheduled",
        "numberReady",
        "updatedNumberScheduled",
        "numberAvailable",
        "numberUnavailable",
        "active",
        "succeeded",
        "failed",
    ];
    for field in COUNTERS {
        not_negative(status, field, &path, faults);
    }
    let count = |field: &str| status.int(field).unwrap_or(0);
    if !status.has("replicas") && count("readyReplicas") == 0 {
        return;
    }
    for field in ["updatedReplicas", "readyReplicas", "availableReplicas", "fullyLabeledReplicas"] {
        if count(field) > count("replicas") {
            faults.invalid(&path.child(field), count(field), "cannot be greater than status.replicas");
        }
    }
    if count("availableReplicas") > count("readyReplicas") {
        faults.invalid(
            &path.child("availableReplicas"),
            count("availableReplicas"),
            "cannot be greater than readyReplicas",
        );
    }
}

/// Checks a `ControllerRevision`.
pub(crate) fn controller_revision(object: &Value, faults: &mut Faults) {
    if !object.has("data") {
        faults.required(&Path::new("data"), "data is mandatory");
    }
    if let Some(revision) = object.int("revision").filter(|revision| *revision < 0) {
        faults.invalid(&Path::new("revision"), revision, format::NOT_NEGATIVE);
    }
}

/// The data of a `ControllerRevision` never changes.
pub(crate) fn controller_revision_update(object: &Value, old: &Value, faults: &mut Faults) {
    immutable(object.at("data"), old.at("data"), &Path::new("data"), faults);
}

/// Checks a `HorizontalPodAutoscaler`.
pub(crate) fn horizontal_pod_autoscaler(object: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    let (least, most) = (spec.int("minReplicas"), spec.int("maxReplicas").unwrap_or(0));
    if let Some(least) = least.filter(|least| *least < 1) {
        faults.invalid(&path.child("minReplicas"), least, "must be greater than or equal to 1");
    }
    if most < 1 {
        faults.invalid(&path.child("maxReplicas"), most, "must be greater than 0");
    }
    if least.is_some_and(|least| most < least) {
        faults.invalid(&path.child("maxReplicas"), most, "must be greater than or equal to `minReplicas`");
    }
    let (target, here) = (spec.at("scaleTargetRef"), path.child("scaleTargetRef"));
    for field in ["kind", "name"] {
        if target.text(field).is_empty() {
            faults.required(&here.child(field), "");
        } else {
            faults.invalid_each(&here.child(field), target.text(field), format::path_segment(target.text(field)));
        }
    }
}
