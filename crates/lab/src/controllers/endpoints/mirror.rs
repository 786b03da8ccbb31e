//! Hand-made Endpoints of Services without a selector, mirrored into EndpointSlices (which is all that proxies read).

use std::sync::Arc;

use k8s_openapi::api::core::v1::{EndpointSubset, Endpoints, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Client, ResourceExt};

use super::forget_endpoints;
use crate::controllers::{Context, Error, drive, gone_is_fine, owned};

const MANAGER: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";

pub(in crate::controllers) async fn run(context: Arc<Context>) {
    let all: Api<Endpoints> = Api::all(context.client.clone());
    let controller = Controller::new(all, watcher::Config::default()).watches(
        Api::<Service>::all(context.client.clone()),
        watcher::Config::default(),
        |service| {
            Some(ObjectRef::<Endpoints>::new(&service.name_any()).within(&service.namespace().unwrap_or_default()))
        },
    );
    drive(
        "endpointslice-mirroring",
        controller,
        context,
        |e, context| async move { reconcile(&e, &context.client).await },
    )
    .await;
}

fn slices_of(endpoints: &Endpoints) -> Result<Vec<EndpointSlice>, Error> {
    let name = endpoints.name_any();
    let mut out = Vec::new();
    for family in ["IPv4", "IPv6"] {
        for subset in endpoints.subsets.iter().flatten() {
            let slice_endpoints = endpoints_of(subset, family == "IPv6");
            if slice_endpoints.is_empty() {
                continue;
            }
            let mut labels = endpoints.labels().clone();
            labels.remove("endpoints.kubernetes.io/managed-by");
            labels.insert("kubernetes.io/service-name".to_owned(), name.clone());
            labels.insert("endpointslice.kubernetes.io/managed-by".to_owned(), MANAGER.to_owned());
            out.push(EndpointSlice {
                metadata: ObjectMeta {
                    name: Some(format!("{name}-mirror-{}", out.len())),
                    namespace: endpoints.namespace(),
                    labels: Some(labels),
                    owner_references: Some(vec![owned::controller_of(endpoints)?]),
                    ..ObjectMeta::default()
                },
                address_type: family.to_owned(),
                ports: Some(
                    subset
                        .ports
                        .iter()
                        .flatten()
                        .map(|p| EndpointPort {
                            name: Some(p.name.clone().unwrap_or_default()),
                            port: Some(p.port),
                            protocol: p.protocol.clone(),
                            app_protocol: p.app_protocol.clone(),
                        })
                        .collect(),
                ),
                endpoints: Some(slice_endpoints),
            });
        }
    }
    Ok(out)
}

fn endpoints_of(subset: &EndpointSubset, six: bool) -> Vec<Endpoint> {
    let ready = subset.addresses.iter().flatten().map(|a| (a, true));
    let not_ready = subset.not_ready_addresses.iter().flatten().map(|a| (a, false));
    ready
        .chain(not_ready)
        .filter(|(a, _)| a.ip.contains(':') == six)
        .map(|(a, ready)| Endpoint {
            addresses: vec![a.ip.clone()],
            conditions: Some(EndpointConditions { ready: Some(ready), ..EndpointConditions::default() }),
            hostname: a.hostname.clone(),
            node_name: a.node_name.clone(),
            target_ref: a.target_ref.clone(),
            ..Endpoint::default()
        })
        .collect()
}

async fn reconcile(endpoints: &Endpoints, client: &Client) -> Result<Action, Error> {
    let namespace = owned::namespace(endpoints)?;
    let name = endpoints.name_any();
    let service = Api::<Service>::namespaced(client.clone(), &namespace).get_opt(&name).await?;
    let ours = endpoints.labels().get("endpoints.kubernetes.io/managed-by").is_some_and(|m| m == "endpoint-controller");
    if service.is_none() && ours {
        forget_endpoints(client, &namespace, &name).await?;
        return Ok(Action::await_change());
    }
    let by_hand = service
        .as_ref()
        .is_some_and(|s| s.spec.as_ref().is_some_and(|s| s.selector.as_ref().is_none_or(|sel| sel.is_empty())));
    let skipped = endpoints.labels().get(SKIP).is_some_and(|v| v == "true")
        || endpoints.annotations().contains_key("control-plane.alpha.kubernetes.io/leader")
        // The API server keeps slices of its own for its Service.
        || (namespace == "default" && name == "kubernetes");
    let wanted = if by_hand && !skipped { slices_of(endpoints)? } else { Vec::new() };
    let api: Api<EndpointSlice> = Api::namespaced(client.clone(), &namespace);
    let selector = format!("kubernetes.io/service-name={name},endpointslice.kubernetes.io/managed-by={MANAGER}");
    let have = api.list(&ListParams::default().labels(&selector)).await?.items;
    for slice in &have {
        if !wanted.iter().any(|w| w.name_any() == slice.name_any() && w.address_type == slice.address_type) {
            gone_is_fine(api.delete(&slice.name_any(), &DeleteParams::default()).await)?;
        }
    }
    for mut slice in wanted {
        match have.iter().find(|h| h.name_any() == slice.name_any() && h.address_type == slice.address_type) {
            Some(old) if old.endpoints == slice.endpoints && old.ports == slice.ports => {}
            Some(old) => {
                slice.metadata.resource_version.clone_from(&old.metadata.resource_version);
                api.replace(&slice.name_any(), &PostParams::default(), &slice).await?;
            }
            None => {
                api.create(&PostParams::default(), &slice).await?;
            }
        }
    }
    Ok(Action::await_change())
}
