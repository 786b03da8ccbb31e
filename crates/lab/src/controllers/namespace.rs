//! Namespaces: what each has from its first moment, and the end of one: its objects first, then itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, PostParams};
use kube::core::ApiResource;
use kube::discovery::{Discovery, Scope, verbs};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Client, ResourceExt};

use super::{Context, Error, drive, gone_is_fine, is_status};

pub(super) async fn run(context: Arc<Context>) {
    let all: Api<Namespace> = Api::all(context.client.clone());
    let of = |namespace: Option<String>| namespace.map(|n| ObjectRef::<Namespace>::new(&n));
    let controller = Controller::new(all, watcher::Config::default())
        .watches(Api::<ServiceAccount>::all(context.client.clone()), watcher::Config::default(), move |o| {
            of(o.namespace())
        })
        .watches(
            Api::<ConfigMap>::all(context.client.clone()),
            watcher::Config::default().fields("metadata.name=kube-root-ca.crt"),
            move |o| of(o.namespace()),
        );
    drive("namespace", controller, context, |n, context| async move { reconcile(&n, &context).await }).await;
}

async fn reconcile(namespace: &Namespace, context: &Context) -> Result<Action, Error> {
    let name = namespace.name_any();
    if namespace.metadata.deletion_timestamp.is_some() {
        return end(namespace, &context.client).await;
    }
    let accounts: Api<ServiceAccount> = Api::namespaced(context.client.clone(), &name);
    if accounts.get_opt("default").await?.is_none() {
        let account = ServiceAccount {
            metadata: ObjectMeta { name: Some("default".to_owned()), ..ObjectMeta::default() },
            ..ServiceAccount::default()
        };
        made_by_anyone(accounts.create(&PostParams::default(), &account).await)?;
    }
    let maps: Api<ConfigMap> = Api::namespaced(context.client.clone(), &name);
    let data = BTreeMap::from([("ca.crt".to_owned(), context.cluster_ca.clone())]);
    match maps.get_opt("kube-root-ca.crt").await? {
        Some(have) if have.data.as_ref() == Some(&data) => {}
        Some(mut have) => {
            have.data = Some(data);
            maps.replace("kube-root-ca.crt", &PostParams::default(), &have).await?;
        }
        None => {
            let map = ConfigMap {
                metadata: ObjectMeta { name: Some("kube-root-ca.crt".to_owned()), ..ObjectMeta::default() },
                data: Some(data),
                ..ConfigMap::default()
            };
            made_by_anyone(maps.create(&PostParams::default(), &map).await)?;
        }
    }
    Ok(Action::await_change())
}

/// A conflict means that it exists.
fn made_by_anyone<T>(result: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if is_status(&error, 409) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Deletes what is in the namespace; when nothing is left, takes our finalizer off.
async fn end(namespace: &Namespace, client: &Client) -> Result<Action, Error> {
    let name = namespace.name_any();
    let mut left = 0;
    for resource in namespaced_resources(client).await? {
        let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &name, &resource);
        let list = match api.list(&ListParams::default()).await {
            Ok(list) => list,
            Err(error) if is_status(&error, 404) || is_status(&error, 405) => continue,
            Err(error) => return Err(error.into()),
        };
        left += list.items.len();
        for object in list.items.iter().filter(|o| o.metadata.deletion_timestamp.is_none()) {
            gone_is_fine(api.delete(&object.name_any(), &DeleteParams::background()).await)?;
        }
    }
    if left > 0 {
        return Ok(Action::requeue(Duration::from_millis(100)));
    }
    let mut ended = namespace.clone();
    ended.metadata.managed_fields = None;
    ended.spec.get_or_insert_default().finalizers = None;
    let api: Api<Namespace> = Api::all(client.clone());
    let finalized: Result<Namespace, kube::Error> =
        api.replace_subresource("finalize", &name, &PostParams::default(), &ended).await;
    match finalized {
        Ok(_) => {}
        Err(error) if is_status(&error, 404) || is_status(&error, 409) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(Action::await_change())
}

/// Every namespaced resource that can be listed and deleted, one version each; pods first, so that they stop before what they need.
async fn namespaced_resources(client: &Client) -> Result<Vec<ApiResource>, Error> {
    let discovery = Discovery::new(client.clone()).run().await?;
    let mut resources: Vec<ApiResource> = discovery
        .groups()
        .flat_map(|group| group.recommended_resources())
        .filter(|(resource, capabilities)| {
            capabilities.scope == Scope::Namespaced
                && capabilities.supports_operation(verbs::LIST)
                && capabilities.supports_operation(verbs::DELETE)
                && resource.group != "events.k8s.io"
        })
        .map(|(resource, _)| resource)
        .collect();
    resources.sort_by_key(|r| (r.plural == "events", r.plural != "pods"));
    Ok(resources)
}
