//! DaemonSets: one pod on every node that fits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetStatus};
use k8s_openapi::api::core::v1::{
    Affinity, Node, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec,
    PodTemplateSpec, Toleration,
};
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Client, ResourceExt};

use super::scheduler::fit;
use super::{Context, Error, drive, owned, pods, template};

const GENERATION: &str = "pod-template-generation";
const REVISION_HASH: &str = "controller-revision-hash";

pub(super) async fn run(context: Arc<Context>) {
    let all: Api<DaemonSet> = Api::all(context.client.clone());
    let controller = Controller::new(all, watcher::Config::default());
    let known = controller.store();
    let controller = controller.owns(Api::<Pod>::all(context.client.clone()), watcher::Config::default()).watches(
        Api::<Node>::all(context.client.clone()),
        watcher::Config::default(),
        move |_| known.state().iter().map(|set| ObjectRef::from_obj(set.as_ref())).collect::<Vec<_>>(),
    );
    drive("daemonset", controller, context, |set, context| async move { reconcile(&set, &context.client).await }).await;
}

/// Tolerations that every daemon pod has, so that it stays on a node in trouble.
fn tolerations(spec: &mut PodSpec) {
    let everywhere = [
        ("node.kubernetes.io/not-ready", "NoExecute"),
        ("node.kubernetes.io/unreachable", "NoExecute"),
        ("node.kubernetes.io/disk-pressure", "NoSchedule"),
        ("node.kubernetes.io/memory-pressure", "NoSchedule"),
        ("node.kubernetes.io/pid-pressure", "NoSchedule"),
        ("node.kubernetes.io/unschedulable", "NoSchedule"),
    ];
    let host = spec.host_network == Some(true);
    let network = host.then_some(("node.kubernetes.io/network-unavailable", "NoSchedule"));
    for (key, effect) in everywhere.into_iter().chain(network) {
        spec.tolerations.get_or_insert_default().push(Toleration {
            key: Some(key.to_owned()),
            operator: Some("Exists".to_owned()),
            effect: Some(effect.to_owned()),
            ..Toleration::default()
        });
    }
}

/// The template with what a daemon pod adds; `node` pins it.
fn daemon_template(set: &DaemonSet, hash: &str, node: &str) -> Result<PodTemplateSpec, Error> {
    let from = &set.spec.as_ref().ok_or(Error::Incomplete("spec"))?.template;
    let mut from = template::with_label(from, REVISION_HASH, hash);
    from = template::with_label(&from, GENERATION, &set.metadata.generation.unwrap_or(1).to_string());
    let spec = from.spec.get_or_insert_default();
    tolerations(spec);
    let name = NodeSelectorTerm {
        match_fields: Some(vec![NodeSelectorRequirement {
            key: "metadata.name".to_owned(),
            operator: "In".to_owned(),
            values: Some(vec![node.to_owned()]),
        }]),
        match_expressions: None,
    };
    let affinity: &mut Affinity = spec.affinity.get_or_insert_default();
    let own: &mut NodeAffinity = affinity.node_affinity.get_or_insert_default();
    own.required_during_scheduling_ignored_during_execution = Some(NodeSelector { node_selector_terms: vec![name] });
    Ok(from)
}

/// The node a daemon pod is for: where it runs, or what its affinity names.
fn node_of(pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    if let Some(node) = &spec.node_name {
        return Some(node.clone());
    }
    let required =
        spec.affinity.as_ref()?.node_affinity.as_ref()?.required_during_scheduling_ignored_during_execution.as_ref()?;
    let field = required.node_selector_terms.first()?.match_fields.as_ref()?.first()?;
    field.values.as_ref()?.first().cloned()
}

async fn reconcile(set: &DaemonSet, client: &Client) -> Result<Action, Error> {
    if set.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let spec = set.spec.as_ref().ok_or(Error::Incomplete("spec"))?;
    let namespace = owned::namespace(set)?;
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?.items;
    let mut wanted_spec = spec.template.spec.clone().unwrap_or_default();
    tolerations(&mut wanted_spec);
    let probe = Pod { spec: Some(wanted_spec), ..Pod::default() };
    let eligible: BTreeSet<String> =
        nodes.iter().filter(|n| fit::daemon_may_run(&probe, n)).map(ResourceExt::name_any).collect();
    let hash = template::hash(&spec.template, 0)?;
    let mut by_node: BTreeMap<String, Vec<Pod>> = BTreeMap::new();
    for pod in pods::of_owner(client, set, &spec.selector).await? {
        by_node.entry(node_of(&pod).unwrap_or_default()).or_default().push(pod);
    }
    let mut status = DaemonSetStatus {
        desired_number_scheduled: i32::try_from(eligible.len()).unwrap_or(i32::MAX),
        observed_generation: set.metadata.generation,
        updated_number_scheduled: Some(0),
        number_available: Some(0),
        number_unavailable: Some(0),
        ..DaemonSetStatus::default()
    };
    let rolling = spec.update_strategy.as_ref().and_then(|s| s.type_.as_deref()) != Some("OnDelete");
    let ready_elsewhere = |node: &str| by_node.iter().any(|(n, p)| n != node && p.iter().any(|p| !pods::is_ready(p)));
    let mut replaced = false;
    for node in &eligible {
        let here = by_node.get(node).map(Vec::as_slice).unwrap_or_default();
        let mut active: Vec<&Pod> = here.iter().filter(|p| pods::is_active(p)).collect();
        for ended in
            here.iter().filter(|p| matches!(pods::phase(p), "Failed" | "Succeeded") && !pods::is_terminating(p))
        {
            pods::delete(&api, ended).await?;
        }
        for surplus in active.split_off(active.len().min(1)) {
            pods::delete(&api, surplus).await?;
        }
        match active.first() {
            None if here.iter().all(|p| !pods::is_terminating(p)) => {
                let from = daemon_template(set, &hash, node)?;
                api.create(&PostParams::default(), &template::pod(&from, &namespace, owned::controller_of(set)?))
                    .await?;
            }
            None => {}
            Some(pod) => {
                status.current_number_scheduled += 1;
                let updated = pod.labels().get(REVISION_HASH) == Some(&hash);
                if updated {
                    *status.updated_number_scheduled.get_or_insert_default() += 1;
                } else if rolling && !replaced && !ready_elsewhere(node) {
                    // One node at a time: the default maxUnavailable.
                    replaced = true;
                    pods::delete(&api, pod).await?;
                }
                if pods::is_ready(pod) {
                    status.number_ready += 1;
                    *status.number_available.get_or_insert_default() += 1;
                }
            }
        }
    }
    for (node, stray) in by_node.iter().filter(|(node, _)| !eligible.contains(*node)) {
        for pod in stray.iter().filter(|p| pods::is_active(p)) {
            tracing::debug!(node, pod = pod.name_any(), "daemon pod on a node that no longer fits");
            pods::delete(&api, pod).await?;
            status.number_misscheduled += 1;
        }
    }
    status.number_unavailable =
        Some(status.desired_number_scheduled - status.number_available.unwrap_or(0)).filter(|n| *n > 0);
    if set.status.as_ref() != Some(&status) {
        let sets: Api<DaemonSet> = Api::namespaced(client.clone(), &namespace);
        let mut value = serde_json::to_value(&status)?;
        if status.number_unavailable.is_none()
            && let Some(fields) = value.as_object_mut()
        {
            fields.insert("numberUnavailable".to_owned(), serde_json::Value::Null);
        }
        let patch = Patch::Merge(serde_json::json!({ "status": value }));
        sets.patch_status(&set.name_any(), &PatchParams::default(), &patch).await?;
    }
    Ok(Action::await_change())
}
