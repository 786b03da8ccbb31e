//! ReplicaSets: so many pods of a template, no more and no fewer.

use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join_all;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::watcher;
use kube::{Client, ResourceExt};

use super::{Context, Error, drive, events, owned, pods, template};

/// Pods made or deleted in one look.
const BURST: usize = 500;

pub(super) async fn run(context: Arc<Context>) {
    let all: Api<ReplicaSet> = Api::all(context.client.clone());
    let controller = Controller::new(all, watcher::Config::default())
        .owns(Api::<Pod>::all(context.client.clone()), watcher::Config::default());
    drive("replicaset", controller, context, |set, context| async move { reconcile(&set, &context.client).await })
        .await;
}

async fn reconcile(set: &ReplicaSet, client: &Client) -> Result<Action, Error> {
    let spec = set.spec.as_ref().ok_or(Error::Incomplete("spec"))?;
    let mine = pods::of_owner(client, set, &spec.selector).await?;
    let mut active: Vec<Pod> = mine.into_iter().filter(pods::is_active).collect();
    if set.metadata.deletion_timestamp.is_none() {
        let wanted = usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0);
        scale(set, client, &mut active, wanted).await?;
    }
    let waiting = update_status(set, client, &active).await?;
    Ok(if waiting { Action::requeue(Duration::from_secs(1)) } else { Action::await_change() })
}

async fn scale(set: &ReplicaSet, client: &Client, active: &mut Vec<Pod>, wanted: usize) -> Result<(), Error> {
    let namespace = owned::namespace(set)?;
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    if active.len() < wanted {
        let spec = set.spec.as_ref().ok_or(Error::Incomplete("spec"))?;
        let Some(from) = &spec.template else { return Ok(()) };
        let pod = template::pod(from, &namespace, owned::controller_of(set)?);
        let params = PostParams::default();
        let missing = (wanted - active.len()).min(BURST);
        let made = try_join_all((0..missing).map(|_| api.create(&params, &pod))).await;
        match made {
            Ok(made) => {
                for pod in &made {
                    let note = format!("Created pod: {}", pod.name_any());
                    events::record(client, "replicaset-controller", set, false, "SuccessfulCreate", note).await;
                }
                active.extend(made);
            }
            Err(error) => {
                let note = format!("Error creating: {error}");
                events::record(client, "replicaset-controller", set, true, "FailedCreate", note).await;
                return Err(error.into());
            }
        }
    } else if active.len() > wanted {
        pods::rank_for_deletion(active);
        let surplus = active.len() - wanted;
        let leaving: Vec<Pod> = active.drain(..surplus.min(BURST)).collect();
        try_join_all(leaving.iter().map(|pod| pods::delete(&api, pod))).await?;
        for pod in &leaving {
            let note = format!("Deleted pod: {}", pod.name_any());
            events::record(client, "replicaset-controller", set, false, "SuccessfulDelete", note).await;
        }
    }
    Ok(())
}

/// Writes the status; whether some pod is ready but not long enough to be available.
async fn update_status(set: &ReplicaSet, client: &Client, active: &[Pod]) -> Result<bool, Error> {
    let spec = set.spec.as_ref().ok_or(Error::Incomplete("spec"))?;
    let now = k8s_openapi::jiff::Timestamp::now();
    let seconds = spec.min_ready_seconds.unwrap_or(0);
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let ready = active.iter().filter(|p| pods::is_ready(p)).count();
    let available = active.iter().filter(|p| pods::is_available(p, seconds, now)).count();
    let labels =
        spec.template.as_ref().and_then(|t| t.metadata.as_ref()).and_then(|m| m.labels.clone()).unwrap_or_default();
    let labelled = active.iter().filter(|p| labels.iter().all(|(k, v)| p.labels().get(k) == Some(v))).count();
    let status = ReplicaSetStatus {
        replicas: count(active.len()),
        fully_labeled_replicas: Some(count(labelled)),
        ready_replicas: Some(count(ready)),
        available_replicas: Some(count(available)),
        observed_generation: set.metadata.generation,
        ..set.status.clone().unwrap_or_default()
    };
    if set.status.as_ref() != Some(&status) {
        let api: Api<ReplicaSet> = Api::namespaced(client.clone(), &owned::namespace(set)?);
        let patch = Patch::Merge(serde_json::json!({ "status": status }));
        api.patch_status(&set.name_any(), &PatchParams::default(), &patch).await?;
    }
    Ok(available < ready)
}
