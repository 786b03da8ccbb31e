//! What controllers ask of pods.

use std::cmp::Reverse;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement, Time};
use kube::api::{Api, DeleteParams, ListParams};
use kube::{Client, Resource, ResourceExt};

use super::{Error, gone_is_fine, owned};

/// A condition's status is `True`.
pub(super) fn condition(pod: &Pod, name: &str) -> bool {
    pod.status.iter().flat_map(|s| s.conditions.iter().flatten()).any(|c| c.type_ == name && c.status == "True")
}

/// The `Ready` condition.
pub(super) fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready")
}

/// When it became ready.
fn ready_since(pod: &Pod) -> Option<&Time> {
    pod.status
        .as_ref()?
        .conditions
        .iter()
        .flatten()
        .find(|c| c.type_ == "Ready" && c.status == "True")?
        .last_transition_time
        .as_ref()
}

/// Ready for at least `seconds`.
pub(super) fn is_available(pod: &Pod, seconds: i32, now: k8s_openapi::jiff::Timestamp) -> bool {
    is_ready(pod)
        && (seconds == 0
            || ready_since(pod).is_some_and(|since| now.as_second() - since.0.as_second() >= i64::from(seconds)))
}

/// `status.phase`.
pub(super) fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or("Pending")
}

/// Being deleted.
pub(super) fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Neither ended nor being deleted.
pub(super) fn is_active(pod: &Pod) -> bool {
    !is_terminating(pod) && !matches!(phase(pod), "Succeeded" | "Failed")
}

/// A label selector as the `labelSelector` query parameter.
pub(super) fn selector_text(selector: &LabelSelector) -> String {
    let expression = |e: &LabelSelectorRequirement| {
        let values = e.values.clone().unwrap_or_default().join(",");
        match e.operator.as_str() {
            "In" => format!("{} in ({values})", e.key),
            "NotIn" => format!("{} notin ({values})", e.key),
            "Exists" => e.key.clone(),
            _ => format!("!{}", e.key),
        }
    };
    let equal = selector.match_labels.iter().flatten().map(|(k, v)| format!("{k}={v}"));
    equal.chain(selector.match_expressions.iter().flatten().map(expression)).collect::<Vec<_>>().join(",")
}

/// The pods of `owner`; pods that its selector matches and nobody owns are adopted.
pub(super) async fn of_owner<K>(client: &Client, owner: &K, selector: &LabelSelector) -> Result<Vec<Pod>, Error>
where
    K: Resource<DynamicType = ()>,
{
    let namespace = owned::namespace(owner)?;
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let list = api.list(&ListParams::default().labels(&selector_text(selector))).await?;
    let mut pods = Vec::new();
    for pod in list.items {
        if owned::is_controlled_by(&pod.metadata, owner) {
            pods.push(pod);
        } else if owned::controller(&pod.metadata).is_none()
            && is_active(&pod)
            && owner.meta().deletion_timestamp.is_none()
        {
            let patch = serde_json::json!({"metadata": {
                "uid": pod.uid(), "ownerReferences": [owned::controller_of(owner)?],
            }});
            let merge = kube::api::Patch::Strategic(patch);
            pods.push(api.patch(&pod.name_any(), &kube::api::PatchParams::default(), &merge).await?);
        }
    }
    Ok(pods)
}

/// The pods to delete first when there are too many: unscheduled before scheduled, pending before running, not ready before
/// ready, younger before older (as kube-controller-manager ranks them).
pub(super) fn rank_for_deletion(pods: &mut [Pod]) {
    pods.sort_by_cached_key(|pod| {
        let scheduled = pod.spec.as_ref().is_some_and(|s| s.node_name.is_some());
        let stage = match phase(pod) {
            "Pending" => 0,
            "Running" => 2,
            _ => 1,
        };
        let created = pod.metadata.creation_timestamp.as_ref().map(|t| t.0.as_second());
        (scheduled, stage, is_ready(pod), Reverse(created), pod.name_any())
    });
}

/// Deletes a pod; one that is gone already is fine.
pub(super) async fn delete(api: &Api<Pod>, pod: &Pod) -> Result<(), Error> {
    let mut params = DeleteParams::background();
    if let Some(uid) = pod.uid() {
        params = params.preconditions(kube::api::Preconditions { uid: Some(uid), resource_version: None });
    }
    match gone_is_fine(api.delete(&pod.name_any(), &params).await) {
        // The uid is another's: the pod that was meant is gone.
        Err(error) if super::is_status(&error, 409) => Ok(()),
        other => Ok(other?),
    }
}
