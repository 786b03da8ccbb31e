//! Defaults of the kinds that make pods.

use serde_json::{Value, json};

use super::pod::template;
use crate::kinds::prepare::workload_counters;
use crate::kinds::read::{Read, fill, fill_text, items_mut, present, put};

/// Fills in a `Deployment`.
pub(crate) fn deployment(object: &mut Value) {
    workload_counters(object);
    let Some(spec) = present(object, "spec") else { return };
    fill(spec, "replicas", 1);
    rolling(spec, "strategy", "RollingUpdate", &[("maxUnavailable", json!("25%")), ("maxSurge", json!("25%"))]);
    fill(spec, "revisionHistoryLimit", 10);
    fill(spec, "progressDeadlineSeconds", 600);
    template(spec);
}

/// Fills in the update strategy and, when it is a rolling one, its limits.
fn rolling(spec: &mut Value, field: &str, kind: &str, limits: &[(&str, Value)]) {
    fill(spec, field, json!({}));
    let Some(strategy) = present(spec, field) else { return };
    fill_text(strategy, "type", kind);
    if strategy.text("type") != kind {
        return;
    }
    fill(strategy, "rollingUpdate", json!({}));
    if let Some(update) = present(strategy, "rollingUpdate") {
        for (name, value) in limits {
            fill(update, name, value.clone());
        }
    }
}

/// Fills in a `ReplicaSet`.
pub(crate) fn replica_set(object: &mut Value) {
    workload_counters(object);
    let Some(spec) = present(object, "spec") else { return };
    fill(spec, "replicas", 1);
    template(spec);
}

/// Fills in a `ReplicationController`, whose selector and labels follow its template.
pub(crate) fn replication_controller(object: &mut Value) {
    workload_counters(object);
    let labels = object.deep(&["spec", "template", "metadata", "labels"]).clone();
    let Some(spec) = present(object, "spec") else { return };
    fill(spec, "replicas", 1);
    if !labels.is_blank() && spec.at("selector").is_blank() {
        put(spec, "selector", labels.clone());
    }
    template(spec);
    labels_from(object, labels);
}

fn labels_from(object: &mut Value, labels: Value) {
    if let Some(metadata) = present(object, "metadata")
        && !labels.is_blank()
        && metadata.at("labels").is_blank()
    {
        put(metadata, "labels", labels);
    }
}

/// Fills in a `DaemonSet`.
pub(crate) fn daemon_set(object: &mut Value) {
    workload_counters(object);
    let Some(spec) = present(object, "spec") else { return };
    rolling(spec, "updateStrategy", "RollingUpdate", &[("maxUnavailable", json!(1)), ("maxSurge", json!(0))]);
    fill(spec, "revisionHistoryLimit", 10);
    template(spec);
}

/// Fills in a `StatefulSet`.
pub(crate) fn stateful_set(object: &mut Value) {
    workload_counters(object);
    let Some(spec) = present(object, "spec") else { return };
    fill_text(spec, "podManagementPolicy", "OrderedReady");
    fill(spec, "updateStrategy", json!({}));
    if let Some(strategy) = present(spec, "updateStrategy") {
        if strategy.text("type").is_empty() {
            put(strategy, "type", "RollingUpdate");
            fill(strategy, "rollingUpdate", json!({}));
        }
        if strategy.text("type") == "RollingUpdate"
            && let Some(update) = present(strategy, "rollingUpdate")
        {
            fill(update, "partition", 0);
            fill(update, "maxUnavailable", 1);
        }
    }
    fill(spec, "persistentVolumeClaimRetentionPolicy", json!({}));
    if let Some(policy) = present(spec, "persistentVolumeClaimRetentionPolicy") {
        fill_text(policy, "whenDeleted", "Retain");
        fill_text(policy, "whenScaled", "Retain");
    }
    fill(spec, "replicas", 1);
    fill(spec, "revisionHistoryLimit", 10);
    template(spec);
    for claim in items_mut(spec, "volumeClaimTemplates") {
        fill(claim, "apiVersion", "v1");
        fill(claim, "kind", "PersistentVolumeClaim");
        super::config::persistent_volume_claim(claim);
        fill(claim, "status", json!({}));
        if let Some(status) = present(claim, "status") {
            fill_text(status, "phase", "Pending");
        }
    }
}

fn job_spec(spec: &mut Value) {
    if !spec.has("completions") && !spec.has("parallelism") {
        put(spec, "completions", 1);
    }
    fill(spec, "parallelism", 1);
    let backoff = if spec.has("backoffLimitPerIndex") { i64::from(i32::MAX) } else { 6 };
    fill(spec, "backoffLimit", backoff);
    fill(spec, "completionMode", "NonIndexed");
    fill(spec, "suspend", false);
    let replacement = if spec.has("podFailurePolicy") { "Failed" } else { "TerminatingOrFailed" };
    fill(spec, "podReplacementPolicy", replacement);
    fill(spec, "manualSelector", false);
    if let Some(policy) = present(spec, "podFailurePolicy") {
        for rule in items_mut(policy, "rules") {
            for pattern in items_mut(rule, "onPodConditions") {
                fill_text(pattern, "status", "True");
            }
        }
    }
    template(spec);
}

/// Fills in a `Job`.
pub(crate) fn job(object: &mut Value) {
    let labels = object.deep(&["spec", "template", "metadata", "labels"]).clone();
    let Some(spec) = present(object, "spec") else { return };
    job_spec(spec);
    labels_from(object, labels);
}

/// Fills in a `CronJob`; the job it makes gets its own defaults only where Kubernetes fills them in here.
pub(crate) fn cron_job(object: &mut Value) {
    let Some(spec) = present(object, "spec") else { return };
    fill_text(spec, "concurrencyPolicy", "Allow");
    fill(spec, "suspend", false);
    fill(spec, "successfulJobsHistoryLimit", 3);
    fill(spec, "failedJobsHistoryLimit", 1);
    if let Some(job) = present(spec, "jobTemplate").and_then(|job| present(job, "spec")) {
        template(job);
    }
}
