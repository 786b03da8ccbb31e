//! Deployments: a ReplicaSet a revision, replaced pod by pod.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{
    Deployment, DeploymentCondition, DeploymentSpec, DeploymentStatus, ReplicaSet, ReplicaSetSpec,
};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::watcher;
use kube::{Client, ResourceExt};

use super::template::POD_TEMPLATE_HASH;
use super::{Context, Error, drive, events, gone_is_fine, is_status, owned, pods, template};

const REVISION: &str = "deployment.kubernetes.io/revision";
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAXIMUM: &str = "deployment.kubernetes.io/max-replicas";

pub(super) async fn run(context: Arc<Context>) {
    let all: Api<Deployment> = Api::all(context.client.clone());
    let controller = Controller::new(all, watcher::Config::default())
        .owns(Api::<ReplicaSet>::all(context.client.clone()), watcher::Config::default());
    drive("deployment", controller, context, |d, context| async move { reconcile(&d, &context.client).await }).await;
}

/// One look's view of a Deployment.
struct Rollout<'a> {
    client: &'a Client,
    deployment: &'a Deployment,
    spec: &'a DeploymentSpec,
    sets: Api<ReplicaSet>,
    desired: i32,
    max_surge: i32,
    max_unavailable: i32,
}

fn replicas(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
}

fn available(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|s| s.available_replicas).unwrap_or(0)
}

fn running(set: &ReplicaSet) -> i32 {
    set.status.as_ref().map_or(0, |s| s.replicas)
}

fn revision(set: &ReplicaSet) -> i64 {
    set.annotations().get(REVISION).and_then(|r| r.parse().ok()).unwrap_or(0)
}

/// A number of pods, absolute or as a share of `of`.
fn share(value: Option<&IntOrString>, of: i32, round_up: bool) -> i32 {
    match value {
        Some(IntOrString::Int(n)) => (*n).max(0),
        Some(IntOrString::String(text)) => {
            let percent: i32 = text.trim_end_matches('%').parse().unwrap_or(25);
            let product = of.saturating_mul(percent.max(0));
            if round_up { product.saturating_add(99) / 100 } else { product / 100 }
        }
        None => share(Some(&IntOrString::String("25%".to_owned())), of, round_up),
    }
}

async fn reconcile(deployment: &Deployment, client: &Client) -> Result<Action, Error> {
    if deployment.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let spec = deployment.spec.as_ref().ok_or(Error::Incomplete("spec"))?;
    let desired = spec.replicas.unwrap_or(1);
    let rolling = spec.strategy.as_ref().and_then(|s| s.rolling_update.as_ref());
    let mut max_surge = share(rolling.and_then(|r| r.max_surge.as_ref()), desired, true);
    let mut max_unavailable = share(rolling.and_then(|r| r.max_unavailable.as_ref()), desired, false);
    if spec.strategy.as_ref().and_then(|s| s.type_.as_deref()) == Some("Recreate") {
        (max_surge, max_unavailable) = (0, desired);
    } else if max_surge == 0 && max_unavailable == 0 {
        max_unavailable = 1;
    }
    let rollout = Rollout {
        client,
        deployment,
        spec,
        sets: Api::namespaced(client.clone(), &owned::namespace(deployment)?),
        desired,
        max_surge,
        max_unavailable,
    };
    rollout.go().await
}

impl Rollout<'_> {
    async fn go(&self) -> Result<Action, Error> {
        let mut sets = self.own_sets().await?;
        sets.sort_by_key(revision);
        let at = sets.iter().position(|set| self.is_current(set));
        let current = match at {
            Some(at) => Some(self.raise_revision(sets.remove(at), &sets).await?),
            None if self.spec.paused == Some(true) => None,
            None => Some(self.create(&sets).await?),
        };
        let mut old = sets;
        let mut current = current;
        if self.spec.paused == Some(true) {
            self.follow_scale(&mut current, &mut old).await?;
        } else if self.spec.strategy.as_ref().and_then(|s| s.type_.as_deref()) == Some("Recreate") {
            self.recreate(&mut current, &mut old).await?;
        } else {
            self.roll(&mut current, &mut old).await?;
        }
        self.forget_history(&old).await?;
        self.update_status(current.as_ref(), &old).await?;
        Ok(Action::await_change())
    }

    async fn own_sets(&self) -> Result<Vec<ReplicaSet>, Error> {
        let selector = pods::selector_text(&self.spec.selector);
        let list = self.sets.list(&ListParams::default().labels(&selector)).await?;
        Ok(list.items.into_iter().filter(|s| owned::is_controlled_by(&s.metadata, self.deployment)).collect())
    }

    fn is_current(&self, set: &ReplicaSet) -> bool {
        let plain = |template: &PodTemplateSpec| {
            let mut template = template.clone();
            if let Some(labels) = template.metadata.as_mut().and_then(|m| m.labels.as_mut()) {
                labels.remove(POD_TEMPLATE_HASH);
            }
            serde_json::to_value(template).ok()
        };
        set.spec.as_ref().and_then(|s| s.template.as_ref()).is_some_and(|t| plain(t) == plain(&self.spec.template))
    }

    async fn create(&self, old: &[ReplicaSet]) -> Result<ReplicaSet, Error> {
        let name = self.deployment.name_any();
        let mut collision = self.deployment.status.as_ref().and_then(|s| s.collision_count).unwrap_or(0);
        loop {
            let hash = template::hash(&self.spec.template, collision)?;
            let set_name = format!("{name}-{hash}");
            let mut selector = self.spec.selector.clone();
            selector.match_labels.get_or_insert_with(BTreeMap::new).insert(POD_TEMPLATE_HASH.to_owned(), hash.clone());
            let from = template::with_label(&self.spec.template, POD_TEMPLATE_HASH, &hash);
            let total: i32 = old.iter().map(replicas).sum();
            let first = if old.is_empty() {
                self.desired
            } else {
                (self.desired + self.max_surge - total).clamp(0, self.desired)
            };
            let next = old.iter().map(revision).max().unwrap_or(0) + 1;
            let set = ReplicaSet {
                metadata: ObjectMeta {
                    name: Some(set_name.clone()),
                    namespace: self.deployment.namespace(),
                    labels: from.metadata.as_ref().and_then(|m| m.labels.clone()),
                    annotations: Some(self.annotations(next)),
                    owner_references: Some(vec![owned::controller_of(self.deployment)?]),
                    ..ObjectMeta::default()
                },
                spec: Some(ReplicaSetSpec {
                    replicas: Some(first),
                    selector,
                    template: Some(from),
                    min_ready_seconds: self.spec.min_ready_seconds,
                }),
                status: None,
            };
            match self.sets.create(&PostParams::default(), &set).await {
                Ok(made) => {
                    self.note_scaled(&made, 0, first).await;
                    self.set_revision(next).await?;
                    return Ok(made);
                }
                Err(error) if is_status(&error, 409) => {
                    let other = self.sets.get(&set_name).await?;
                    if owned::is_controlled_by(&other.metadata, self.deployment) && self.is_current(&other) {
                        return Ok(other);
                    }
                    collision += 1;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn annotations(&self, revision: i64) -> BTreeMap<String, String> {
        let mut annotations: BTreeMap<String, String> = self
            .deployment
            .annotations()
            .iter()
            .filter(|(k, _)| k.as_str() != "kubectl.kubernetes.io/last-applied-configuration" && k.as_str() != REVISION)
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        annotations.insert(REVISION.to_owned(), revision.to_string());
        annotations.insert(DESIRED.to_owned(), self.desired.to_string());
        annotations.insert(MAXIMUM.to_owned(), (self.desired + self.max_surge).to_string());
        annotations
    }

    /// A template that is used again (a rollback) becomes the newest revision.
    async fn raise_revision(&self, set: ReplicaSet, others: &[ReplicaSet]) -> Result<ReplicaSet, Error> {
        let newest = others.iter().map(revision).max().unwrap_or(0);
        let own = revision(&set).max(1);
        let next = if own > newest { own } else { newest + 1 };
        self.set_revision(next).await?;
        let wanted = self.annotations(next);
        if wanted.iter().all(|(k, v)| set.annotations().get(k) == Some(v)) {
            return Ok(set);
        }
        let patch = Patch::Merge(serde_json::json!({"metadata": {"annotations": wanted}}));
        Ok(self.sets.patch(&set.name_any(), &PatchParams::default(), &patch).await?)
    }

    async fn set_revision(&self, revision: i64) -> Result<(), Error> {
        if self.deployment.annotations().get(REVISION).is_some_and(|r| *r == revision.to_string()) {
            return Ok(());
        }
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), &owned::namespace(self.deployment)?);
        let patch = Patch::Merge(serde_json::json!({"metadata": {"annotations": {REVISION: revision.to_string()}}}));
        api.patch(&self.deployment.name_any(), &PatchParams::default(), &patch).await?;
        Ok(())
    }

    async fn scale(&self, set: &mut ReplicaSet, to: i32) -> Result<(), Error> {
        let from = replicas(set);
        if from == to {
            return Ok(());
        }
        let patch = Patch::Merge(serde_json::json!({"spec": {"replicas": to}}));
        *set = self.sets.patch(&set.name_any(), &PatchParams::default(), &patch).await?;
        self.note_scaled(set, from, to).await;
        Ok(())
    }

    async fn note_scaled(&self, set: &ReplicaSet, from: i32, to: i32) {
        let way = if to >= from { "up" } else { "down" };
        let note = format!("Scaled {way} replica set {} from {from} to {to}", set.name_any());
        events::record(self.client, "deployment-controller", self.deployment, false, "ScalingReplicaSet", note).await;
    }

    /// A paused Deployment still follows its own scale.
    async fn follow_scale(&self, current: &mut Option<ReplicaSet>, old: &mut [ReplicaSet]) -> Result<(), Error> {
        let mut active: Vec<&mut ReplicaSet> =
            current.iter_mut().chain(old.iter_mut()).filter(|s| replicas(s) > 0).collect();
        if let [only] = active.as_mut_slice() {
            self.scale(only, self.desired).await?;
        }
        Ok(())
    }

    async fn recreate(&self, current: &mut Option<ReplicaSet>, old: &mut [ReplicaSet]) -> Result<(), Error> {
        for set in old.iter_mut() {
            self.scale(set, 0).await?;
        }
        if old.iter().all(|set| running(set) == 0)
            && let Some(set) = current
        {
            self.scale(set, self.desired).await?;
        }
        Ok(())
    }

    async fn roll(&self, current: &mut Option<ReplicaSet>, old: &mut [ReplicaSet]) -> Result<(), Error> {
        let Some(new) = current else { return Ok(()) };
        let old_total: i32 = old.iter().map(replicas).sum();
        if replicas(new) > self.desired {
            self.scale(new, self.desired).await?;
        } else {
            let room = self.desired + self.max_surge - old_total - replicas(new);
            let up = room.min(self.desired - replicas(new)).max(0);
            self.scale(new, replicas(new) + up).await?;
        }
        if old_total == 0 {
            return Ok(());
        }
        let minimum = self.desired - self.max_unavailable;
        let new_unavailable = replicas(new) - available(new).min(replicas(new));
        let mut removable = old_total + replicas(new) - minimum - new_unavailable;
        // Replicas that do not answer go first: they cost nothing.
        for set in old.iter_mut() {
            let unhealthy = (replicas(set) - available(set)).min(removable).max(0);
            self.scale(set, replicas(set) - unhealthy).await?;
            removable -= unhealthy;
        }
        let total_available: i32 = old.iter().map(available).sum::<i32>() + available(new);
        let mut removable = removable.min(total_available - minimum);
        for set in old.iter_mut() {
            let down = replicas(set).min(removable).max(0);
            self.scale(set, replicas(set) - down).await?;
            removable -= down;
        }
        Ok(())
    }

    async fn forget_history(&self, old: &[ReplicaSet]) -> Result<(), Error> {
        let limit = usize::try_from(self.spec.revision_history_limit.unwrap_or(10)).unwrap_or(10);
        let idle: Vec<&ReplicaSet> = old.iter().filter(|s| replicas(s) == 0 && running(s) == 0).collect();
        let surplus = idle.len().saturating_sub(limit);
        for set in idle.into_iter().take(surplus) {
            gone_is_fine(self.sets.delete(&set.name_any(), &DeleteParams::background()).await)?;
        }
        Ok(())
    }

    async fn update_status(&self, current: Option<&ReplicaSet>, old: &[ReplicaSet]) -> Result<(), Error> {
        let all = || current.into_iter().chain(old);
        let sum = |f: fn(&ReplicaSet) -> i32| all().map(f).sum::<i32>();
        let ready = all().map(|s| s.status.as_ref().and_then(|s| s.ready_replicas).unwrap_or(0)).sum::<i32>();
        let (total, usable, updated) = (sum(running), sum(available), current.map_or(0, running));
        let before = self.deployment.status.clone().unwrap_or_default();
        let complete = updated == self.desired && total == self.desired && usable >= self.desired;
        let enough = usable >= self.desired - self.max_unavailable;
        let set_name = current.map(ResourceExt::name_any).unwrap_or_default();
        let progressing = if complete {
            ("True", "NewReplicaSetAvailable", format!("ReplicaSet \"{set_name}\" has successfully progressed."))
        } else if self.spec.paused == Some(true) {
            ("Unknown", "DeploymentPaused", "Deployment is paused".to_owned())
        } else {
            ("True", "ReplicaSetUpdated", format!("ReplicaSet \"{set_name}\" is progressing."))
        };
        let availability = if enough {
            ("True", "MinimumReplicasAvailable", "Deployment has minimum availability.".to_owned())
        } else {
            ("False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability.".to_owned())
        };
        let status = DeploymentStatus {
            observed_generation: self.deployment.metadata.generation,
            replicas: Some(total),
            updated_replicas: Some(updated),
            ready_replicas: Some(ready),
            available_replicas: Some(usable),
            unavailable_replicas: Some((self.desired - usable).max(0)).filter(|n| *n > 0),
            conditions: Some(vec![
                condition(&before, "Available", availability),
                condition(&before, "Progressing", progressing),
            ]),
            ..before.clone()
        };
        if status != before {
            let api: Api<Deployment> = Api::namespaced(self.client.clone(), &owned::namespace(self.deployment)?);
            // A merge patch removes a field only by an explicit null.
            let mut value = serde_json::to_value(&status)?;
            if status.unavailable_replicas.is_none()
                && let Some(fields) = value.as_object_mut()
            {
                fields.insert("unavailableReplicas".to_owned(), serde_json::Value::Null);
            }
            let patch = Patch::Merge(serde_json::json!({ "status": value }));
            api.patch_status(&self.deployment.name_any(), &PatchParams::default(), &patch).await?;
        }
        Ok(())
    }
}

fn condition(
    before: &DeploymentStatus,
    name: &str,
    (status, reason, message): (&str, &str, String),
) -> DeploymentCondition {
    let old = before.conditions.iter().flatten().find(|c| c.type_ == name);
    if let Some(old) = old.filter(|c| c.status == status && c.reason.as_deref() == Some(reason)) {
        return DeploymentCondition { message: Some(message), ..old.clone() };
    }
    let now = Time(k8s_openapi::jiff::Timestamp::now());
    DeploymentCondition {
        type_: name.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_transition_time: old
            .filter(|c| c.status == status)
            .and_then(|c| c.last_transition_time.clone())
            .or_else(|| Some(now.clone())),
        last_update_time: Some(now),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_round_as_kubernetes_does() {
        let percent = IntOrString::String("25%".to_owned());
        assert_eq!(share(Some(&percent), 3, true), 1);
        assert_eq!(share(Some(&percent), 3, false), 0);
        assert_eq!(share(Some(&IntOrString::Int(2)), 10, false), 2);
        assert_eq!(share(None, 10, true), 3);
    }
}
