//! StatefulSets: pods `name-0`, `name-1` …, in order, each with a name of its own.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetStatus};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::watcher;
use kube::{Client, ResourceExt};

use super::{Context, Error, drive, owned, pods, template};

const REVISION: &str = "controller-revision-hash";

pub(super) async fn run(context: Arc<Context>) {
    let all: Api<StatefulSet> = Api::all(context.client.clone());
    let controller = Controller::new(all, watcher::Config::default())
        .owns(Api::<Pod>::all(context.client.clone()), watcher::Config::default());
    drive("statefulset", controller, context, |set, context| async move { reconcile(&set, &context.client).await })
        .await;
}

fn ordinal(set: &str, pod: &str) -> Option<i32> {
    pod.strip_prefix(set)?.strip_prefix('-')?.parse().ok()
}

fn stateful_pod(set: &StatefulSet, number: i32, revision: &str) -> Result<Pod, Error> {
    let spec = set.spec.as_ref().ok_or(Error::Incomplete("spec"))?;
    let name = format!("{}-{number}", set.name_any());
    let mut from = template::with_label(&spec.template, REVISION, revision);
    from = template::with_label(&from, "statefulset.kubernetes.io/pod-name", &name);
    from = template::with_label(&from, "apps.kubernetes.io/pod-index", &number.to_string());
    let mut pod = template::pod(&from, &owned::namespace(set)?, owned::controller_of(set)?);
    pod.metadata.generate_name = None;
    pod.metadata.name = Some(name.clone());
    let pod_spec = pod.spec.get_or_insert_default();
    pod_spec.hostname = Some(name);
    pod_spec.subdomain = spec.service_name.clone();
    Ok(pod)
}

async fn reconcile(set: &StatefulSet, client: &Client) -> Result<Action, Error> {
    if set.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let spec = set.spec.as_ref().ok_or(Error::Incomplete("spec"))?;
    let name = set.name_any();
    let start = spec.ordinals.as_ref().and_then(|o| o.start).unwrap_or(0);
    let wanted = start..start + spec.replicas.unwrap_or(1);
    let parallel = spec.pod_management_policy.as_deref() == Some("Parallel");
    let revision = template::hash(&spec.template, 0)?;
    let api: Api<Pod> = Api::namespaced(client.clone(), &owned::namespace(set)?);
    let mut mine: Vec<(i32, Pod)> = pods::of_owner(client, set, &spec.selector)
        .await?
        .into_iter()
        .filter_map(|pod| Some((ordinal(&name, &pod.name_any())?, pod)))
        .collect();
    mine.sort_by_key(|(number, _)| *number);
    let settled = step(set, &api, &mine, wanted.clone(), parallel, &revision).await?;
    let partition =
        spec.update_strategy.as_ref().and_then(|s| s.rolling_update.as_ref()).and_then(|r| r.partition).unwrap_or(0);
    let on_delete = spec.update_strategy.as_ref().and_then(|s| s.type_.as_deref()) == Some("OnDelete");
    if settled && !on_delete {
        // From the last to the first, one at a time.
        let outdated =
            mine.iter().rev().find(|(n, pod)| *n >= partition && pod.labels().get(REVISION) != Some(&revision));
        if let Some((_, pod)) = outdated.filter(|(_, pod)| pods::is_active(pod)) {
            pods::delete(&api, pod).await?;
        }
    }
    update_status(set, client, &mine, &format!("{name}-{revision}"), &revision).await?;
    Ok(Action::await_change())
}

/// Makes or deletes what is next; whether everything is there and ready.
async fn step(
    set: &StatefulSet,
    api: &Api<Pod>,
    mine: &[(i32, Pod)],
    wanted: std::ops::Range<i32>,
    parallel: bool,
    revision: &str,
) -> Result<bool, Error> {
    let mut settled = true;
    for number in wanted.clone() {
        match mine.iter().find(|(n, _)| *n == number) {
            None => {
                api.create(&PostParams::default(), &stateful_pod(set, number, revision)?).await?;
                settled = false;
            }
            Some((_, pod)) if matches!(pods::phase(pod), "Failed" | "Succeeded") && !pods::is_terminating(pod) => {
                pods::delete(api, pod).await?;
                settled = false;
            }
            Some((_, pod)) if pods::is_ready(pod) && !pods::is_terminating(pod) => continue,
            Some(_) => settled = false,
        }
        if !parallel {
            return Ok(false);
        }
    }
    for (_, pod) in mine.iter().rev().filter(|(n, _)| !wanted.contains(n)) {
        settled = false;
        if !pods::is_terminating(pod) {
            pods::delete(api, pod).await?;
        }
        if !parallel {
            return Ok(false);
        }
    }
    Ok(settled)
}

async fn update_status(
    set: &StatefulSet,
    client: &Client,
    mine: &[(i32, Pod)],
    revision: &str,
    hash: &str,
) -> Result<(), Error> {
    let count = |f: &dyn Fn(&Pod) -> bool| i32::try_from(mine.iter().filter(|(_, p)| f(p)).count()).unwrap_or(i32::MAX);
    let updated = count(&|p| p.labels().get(REVISION).is_some_and(|r| r == hash));
    let replicas = count(&|p| !pods::is_terminating(p));
    let before = set.status.clone().unwrap_or_default();
    let current = if updated == replicas { Some(revision.to_owned()) } else { before.current_revision.clone() };
    let status = StatefulSetStatus {
        observed_generation: set.metadata.generation,
        replicas,
        ready_replicas: Some(count(&pods::is_ready)),
        available_replicas: Some(count(&pods::is_ready)),
        current_replicas: Some(if updated == replicas { updated } else { replicas - updated }),
        updated_replicas: Some(updated),
        current_revision: current.or_else(|| Some(revision.to_owned())),
        update_revision: Some(revision.to_owned()),
        collision_count: Some(0),
        ..before.clone()
    };
    if status != before {
        let api: Api<StatefulSet> = Api::namespaced(client.clone(), &owned::namespace(set)?);
        let patch = Patch::Merge(serde_json::json!({ "status": status }));
        api.patch_status(&set.name_any(), &PatchParams::default(), &patch).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinals_are_read_off_names() {
        assert_eq!(ordinal("db", "db-3"), Some(3));
        assert_eq!(ordinal("db", "db-x"), None);
        assert_eq!(ordinal("db", "dbx-3"), None);
    }
}
