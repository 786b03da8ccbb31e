//! Garbage collection: objects whose owners are all gone are deleted; foreground and orphan deletion are honoured.
//!
//! A graph of metadata is kept by a watch a resource (found by discovery, again every half minute for what CRDs add). Decisions
//! are checked against the API server before anything is deleted, because a watch may lag behind.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Api, DeleteParams, DynamicObject, PartialObjectMeta, Patch, PatchParams, Preconditions};
use kube::core::ApiResource;
use kube::discovery::{Discovery, Scope, verbs};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::{Context, Error, gone_is_fine, is_status};

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";

/// What the collector knows of one object.
#[derive(Clone, Debug)]
struct Known {
    resource: ApiResource,
    namespace: Option<String>,
    name: String,
    owners: Vec<OwnerReference>,
    finalizers: Vec<String>,
    deleting: bool,
}

enum Seen {
    Object(String, Known),
    Gone(String),
    Listed(ApiResource, HashSet<String>),
}

#[derive(Default)]
struct Graph {
    objects: HashMap<String, Known>,
    dependents: HashMap<String, HashSet<String>>,
    /// Resources whose first list is in: before all are, an absent owner proves nothing.
    listed: HashSet<String>,
}

pub(super) async fn run(context: Arc<Context>) {
    let (send, mut seen) = mpsc::channel(1024);
    let mut watches = JoinSet::new();
    let mut watched = HashSet::new();
    let mut graph = Graph::default();
    let mut again = tokio::time::interval(Duration::from_secs(30));
    loop {
        tokio::select! {
            _ = again.tick() => match resources(&context.client).await {
                Ok(found) => {
                    for (resource, namespaced) in found {
                        if watched.insert(key_of(&resource)) {
                            watches.spawn(watch(context.client.clone(), resource, namespaced, send.clone()));
                        }
                    }
                }
                Err(error) => warn!(%error, "could not discover resources; trying again in 30 s"),
            },
            Some(event) = seen.recv() => {
                let mut touched = graph.apply(event);
                while let Ok(more) = seen.try_recv() {
                    touched.extend(graph.apply(more));
                }
                if graph.listed.len() >= watched.len() {
                    for uid in touched {
                        if let Err(error) = graph.look(&uid, &context.client).await {
                            debug!(%error, uid, "could not collect");
                        }
                    }
                }
            }
        }
    }
}

fn key_of(resource: &ApiResource) -> String {
    format!("{}/{}", resource.group, resource.plural)
}

async fn resources(client: &Client) -> Result<Vec<(ApiResource, bool)>, Error> {
    let discovery = Discovery::new(client.clone()).run().await?;
    Ok(discovery
        .groups()
        .flat_map(|group| group.recommended_resources())
        .filter(|(resource, capabilities)| {
            capabilities.supports_operation(verbs::WATCH)
                && capabilities.supports_operation(verbs::DELETE)
                && resource.plural != "events"
                && resource.plural != "leases"
        })
        .map(|(resource, capabilities)| (resource, capabilities.scope == Scope::Namespaced))
        .collect())
}

async fn watch(client: Client, resource: ApiResource, namespaced: bool, seen: mpsc::Sender<Seen>) {
    let api: Api<PartialObjectMeta<DynamicObject>> = Api::all_with(client, &resource);
    let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
    let mut listed = HashSet::new();
    while let Some(event) = events.next().await {
        let out = match event {
            Err(error) => {
                debug!(%error, resource = resource.plural, "metadata watch interrupted");
                continue;
            }
            Ok(watcher::Event::Init) => {
                listed.clear();
                continue;
            }
            Ok(watcher::Event::InitApply(object)) => {
                listed.insert(object.uid().unwrap_or_default());
                known(&resource, namespaced, &object)
            }
            Ok(watcher::Event::Apply(object)) => known(&resource, namespaced, &object),
            Ok(watcher::Event::Delete(object)) => Seen::Gone(object.uid().unwrap_or_default()),
            Ok(watcher::Event::InitDone) => Seen::Listed(resource.clone(), std::mem::take(&mut listed)),
        };
        if seen.send(out).await.is_err() {
            return;
        }
    }
}

fn known(resource: &ApiResource, namespaced: bool, object: &PartialObjectMeta<DynamicObject>) -> Seen {
    let known = Known {
        resource: resource.clone(),
        namespace: object.namespace().filter(|_| namespaced),
        name: object.name_any(),
        owners: object.owner_references().to_vec(),
        finalizers: object.finalizers().to_vec(),
        deleting: object.metadata.deletion_timestamp.is_some(),
    };
    Seen::Object(object.uid().unwrap_or_default(), known)
}

impl Graph {
    /// Takes an event in; the uids of objects that must be looked at.
    fn apply(&mut self, seen: Seen) -> HashSet<String> {
        match seen {
            Seen::Object(uid, known) => {
                let mut touched = HashSet::from([uid.clone()]);
                for owner in &known.owners {
                    self.dependents.entry(owner.uid.clone()).or_default().insert(uid.clone());
                    touched.insert(owner.uid.clone());
                }
                if let Some(old) = self.objects.insert(uid.clone(), known.clone()) {
                    for owner in old.owners.iter().filter(|o| !known.owners.iter().any(|n| n.uid == o.uid)) {
                        self.forget_dependent(&owner.uid, &uid);
                        touched.insert(owner.uid.clone());
                    }
                }
                touched
            }
            Seen::Gone(uid) => self.remove(&uid),
            Seen::Listed(resource, uids) => {
                let key = key_of(&resource);
                let lost: Vec<String> = self
                    .objects
                    .iter()
                    .filter(|(uid, known)| key_of(&known.resource) == key && !uids.contains(*uid))
                    .map(|(uid, _)| uid.clone())
                    .collect();
                self.listed.insert(key);
                let mut touched: HashSet<String> = lost.iter().flat_map(|uid| self.remove(uid)).collect();
                // What came before everything was listed has not been looked at yet.
                touched.extend(
                    self.objects.iter().filter(|(_, k)| !k.owners.is_empty() || k.deleting).map(|(uid, _)| uid.clone()),
                );
                touched
            }
        }
    }

    fn forget_dependent(&mut self, owner: &str, dependent: &str) {
        if let Some(set) = self.dependents.get_mut(owner) {
            set.remove(dependent);
            if set.is_empty() {
                self.dependents.remove(owner);
            }
        }
    }

    fn remove(&mut self, uid: &str) -> HashSet<String> {
        let mut touched: HashSet<String> = self.dependents.get(uid).cloned().unwrap_or_default();
        if let Some(old) = self.objects.remove(uid) {
            for owner in old.owners {
                self.forget_dependent(&owner.uid, uid);
                touched.insert(owner.uid);
            }
        }
        touched
    }

    async fn look(&self, uid: &str, client: &Client) -> Result<(), Error> {
        let Some(known) = self.objects.get(uid) else { return Ok(()) };
        if known.deleting && known.finalizers.iter().any(|f| f == ORPHAN) {
            return self.orphan(uid, known, client).await;
        }
        if known.deleting && known.finalizers.iter().any(|f| f == FOREGROUND) {
            return self.foreground(uid, known, client).await;
        }
        if known.deleting || known.owners.is_empty() || known.owners.iter().any(|o| self.objects.contains_key(&o.uid)) {
            return Ok(());
        }
        for owner in &known.owners {
            if exists(client, owner, known.namespace.as_deref()).await? {
                return Ok(());
            }
        }
        debug!(kind = known.resource.kind, name = known.name, "its owners are gone");
        delete(client, known, uid, DeleteParams::background()).await
    }

    /// The owner waits until its dependents are gone; those that block are deleted in the foreground too.
    async fn foreground(&self, uid: &str, known: &Known, client: &Client) -> Result<(), Error> {
        let dependents: Vec<(&String, &Known)> =
            self.dependents.get(uid).into_iter().flatten().filter_map(|d| self.objects.get_key_value(d)).collect();
        let blocking = |d: &Known| d.owners.iter().any(|o| o.uid == uid && o.block_owner_deletion == Some(true));
        for (dependent_uid, dependent) in dependents.iter().filter(|(_, d)| !d.deleting) {
            let others = dependent.owners.iter().any(|o| o.uid != uid && self.objects.contains_key(&o.uid));
            if !others {
                delete(client, dependent, dependent_uid, DeleteParams::foreground()).await?;
            }
        }
        if dependents.iter().any(|(_, d)| blocking(d)) {
            return Ok(());
        }
        drop_finalizer(client, known, FOREGROUND).await
    }

    async fn orphan(&self, uid: &str, known: &Known, client: &Client) -> Result<(), Error> {
        for dependent in self.dependents.get(uid).into_iter().flatten().filter_map(|d| self.objects.get(d)) {
            let rest: Vec<&OwnerReference> = dependent.owners.iter().filter(|o| o.uid != uid).collect();
            let patch = Patch::Merge(serde_json::json!({"metadata": {"ownerReferences": rest}}));
            gone_is_fine(api_of(client, dependent).patch(&dependent.name, &PatchParams::default(), &patch).await)?;
        }
        drop_finalizer(client, known, ORPHAN).await
    }
}

fn api_of(client: &Client, known: &Known) -> Api<DynamicObject> {
    match &known.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &known.resource),
        None => Api::all_with(client.clone(), &known.resource),
    }
}

async fn delete(client: &Client, known: &Known, uid: &str, params: DeleteParams) -> Result<(), Error> {
    let params = params.preconditions(Preconditions { uid: Some(uid.to_owned()), resource_version: None });
    match gone_is_fine(api_of(client, known).delete(&known.name, &params).await) {
        Err(error) if is_status(&error, 409) => Ok(()),
        other => Ok(other?),
    }
}

async fn drop_finalizer(client: &Client, known: &Known, finalizer: &str) -> Result<(), Error> {
    let rest: Vec<&String> = known.finalizers.iter().filter(|f| *f != finalizer).collect();
    let patch = Patch::Merge(serde_json::json!({"metadata": {"finalizers": rest}}));
    Ok(gone_is_fine(api_of(client, known).patch(&known.name, &PatchParams::default(), &patch).await)?)
}

/// Whether the owner that a reference names really exists.
async fn exists(client: &Client, owner: &OwnerReference, namespace: Option<&str>) -> Result<bool, Error> {
    let (group, version) = owner.api_version.split_once('/').unwrap_or(("", &owner.api_version));
    let gvk = kube::core::GroupVersionKind::gvk(group, version, &owner.kind);
    let (resource, capabilities) = match kube::discovery::pinned_kind(client, &gvk).await {
        Ok(found) => found,
        Err(error) if is_status(&error, 404) => return Ok(false),
        Err(kube::Error::Discovery(_)) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let api: Api<DynamicObject> = match namespace.filter(|_| capabilities.scope == Scope::Namespaced) {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    Ok(api.get_metadata_opt(&owner.name).await?.is_some_and(|o| o.uid().as_deref() == Some(owner.uid.as_str())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(uid: &str, owners: &[&str]) -> Seen {
        let resource = ApiResource::from_gvk_with_plural(&kube::core::GroupVersionKind::gvk("", "v1", "Pod"), "pods");
        let owners =
            owners.iter().map(|o| OwnerReference { uid: (*o).to_owned(), ..OwnerReference::default() }).collect();
        let known = Known {
            resource,
            namespace: Some("default".to_owned()),
            name: uid.to_owned(),
            owners,
            finalizers: Vec::new(),
            deleting: false,
        };
        Seen::Object(uid.to_owned(), known)
    }

    #[test]
    fn the_end_of_an_owner_touches_its_dependents() {
        let mut graph = Graph::default();
        graph.apply(object("set", &[]));
        graph.apply(object("pod", &["set"]));
        assert_eq!(graph.apply(Seen::Gone("set".to_owned())), HashSet::from(["pod".to_owned()]));
    }

    #[test]
    fn a_list_removes_what_it_does_not_name() {
        let mut graph = Graph::default();
        graph.apply(object("set", &[]));
        graph.apply(object("pod", &["set"]));
        let resource = ApiResource::from_gvk_with_plural(&kube::core::GroupVersionKind::gvk("", "v1", "Pod"), "pods");
        let touched = graph.apply(Seen::Listed(resource, HashSet::from(["pod".to_owned()])));
        assert!(touched.contains("pod") && !graph.objects.contains_key("set"));
    }
}
