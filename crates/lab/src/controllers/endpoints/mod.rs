//! EndpointSlices and Endpoints of Services with a selector.
//!
//! Slices are kept a family and a set of ports, at most 100 endpoints each; an endpoint keeps its slice, so that one pod's
//! change rewrites one slice. Services without a selector are left alone; see [`mirror`] for their Endpoints.

pub(super) mod mirror;
mod slices;

use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort, EndpointSubset, Endpoints, ObjectReference, Pod, Service,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Client, ResourceExt};

use super::{Context, Error, drive, gone_is_fine, owned, pods};

pub(super) async fn run(context: Arc<Context>) {
    let all: Api<Service> = Api::all(context.client.clone());
    let controller = Controller::new(all, watcher::Config::default());
    let known = controller.store();
    let controller = controller
        .owns(Api::<EndpointSlice>::all(context.client.clone()), watcher::Config::default())
        .watches(Api::<Pod>::all(context.client.clone()), watcher::Config::default(), move |pod| {
            services_of(&known, &pod)
        });
    drive(
        "endpoints",
        controller,
        context,
        |service, context| async move { reconcile(&service, &context.client).await },
    )
    .await;
}

/// Services that a pod belongs to, or did until its labels changed (cheap to look at once more: those of its namespace that
/// have a selector with one of its label keys).
fn services_of(known: &Store<Service>, pod: &Pod) -> Vec<ObjectRef<Service>> {
    known
        .state()
        .iter()
        .filter(|s| s.namespace() == pod.namespace())
        .filter(|s| {
            let selector = s.spec.as_ref().and_then(|s| s.selector.as_ref());
            selector.is_some_and(|sel| !sel.is_empty() && sel.keys().all(|k| pod.labels().contains_key(k)))
        })
        .map(|s| ObjectRef::from_obj(s.as_ref()))
        .collect()
}

/// A pod as an endpoint.
#[derive(Clone, Debug)]
struct Member {
    pod: Pod,
    addresses: Vec<std::net::IpAddr>,
    ready: bool,
    serving: bool,
    terminating: bool,
}

/// The pods of a Service that have an address and have not ended.
fn members(all: Vec<Pod>, publish_not_ready: bool) -> Vec<Member> {
    let mut members: Vec<Member> = all
        .into_iter()
        .filter(|pod| !matches!(pods::phase(pod), "Succeeded" | "Failed"))
        .filter_map(|pod| {
            let status = pod.status.as_ref()?;
            let listed = status.pod_ips.iter().flatten().map(|p| p.ip.as_str()).chain(status.pod_ip.as_deref());
            let mut addresses: Vec<std::net::IpAddr> = listed.filter_map(|ip| ip.parse().ok()).collect();
            addresses.dedup();
            let serving = pods::is_ready(&pod);
            let terminating = pods::is_terminating(&pod);
            let ready = publish_not_ready || (serving && !terminating);
            (!addresses.is_empty()).then_some(Member {
                addresses,
                ready,
                serving: serving || publish_not_ready,
                terminating,
                pod,
            })
        })
        .collect();
    members.sort_by_key(|m| m.pod.name_any());
    members
}

/// The number that a Service port has in a pod.
fn target_port(pod: &Pod, port: &k8s_openapi::api::core::v1::ServicePort) -> Option<i32> {
    match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => {
            let spec = pod.spec.as_ref()?;
            let sidecars =
                spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
            let mut ports = spec.containers.iter().chain(sidecars).flat_map(|c| c.ports.iter().flatten());
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            ports
                .find(|p| p.name.as_deref() == Some(name) && p.protocol.as_deref().unwrap_or("TCP") == protocol)
                .map(|p| p.container_port)
        }
    }
}

fn pod_reference(pod: &Pod) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".to_owned()),
        namespace: pod.namespace(),
        name: Some(pod.name_any()),
        uid: pod.uid(),
        ..ObjectReference::default()
    }
}

/// A pod's own name below a headless Service of its subdomain.
fn hostname(pod: &Pod, service: &str) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    spec.hostname.clone().filter(|_| spec.subdomain.as_deref() == Some(service))
}

async fn reconcile(service: &Service, client: &Client) -> Result<Action, Error> {
    let spec = service.spec.as_ref().ok_or(Error::Incomplete("spec"))?;
    let external = spec.type_.as_deref() == Some("ExternalName");
    let Some(selector) = spec.selector.as_ref().filter(|s| !s.is_empty() && !external) else {
        return Ok(Action::await_change());
    };
    if service.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let namespace = owned::namespace(service)?;
    let text = selector.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",");
    let listed = Api::<Pod>::namespaced(client.clone(), &namespace).list(&ListParams::default().labels(&text)).await?;
    let members = members(listed.items, spec.publish_not_ready_addresses.unwrap_or(false));
    slices::sync(service, client, &members).await?;
    sync_endpoints(service, client, &members).await?;
    Ok(Action::await_change())
}

/// The older object: one subset a set of ports, in the Service's first family.
fn subsets(service: &Service, members: &[Member]) -> Vec<EndpointSubset> {
    let spec = service.spec.clone().unwrap_or_default();
    let six = spec.ip_families.as_ref().and_then(|f| f.first()).is_some_and(|f| f == "IPv6");
    let mut subsets: Vec<EndpointSubset> = Vec::new();
    for member in members.iter().filter(|m| m.ready || !m.terminating) {
        let Some(ip) = member.addresses.iter().find(|a| a.is_ipv6() == six) else { continue };
        let ports: Vec<EndpointPort> = spec
            .ports
            .iter()
            .flatten()
            .filter_map(|p| {
                Some(EndpointPort {
                    name: p.name.clone().filter(|n| !n.is_empty()),
                    port: target_port(&member.pod, p)?,
                    protocol: Some(p.protocol.clone().unwrap_or_else(|| "TCP".to_owned())),
                    app_protocol: p.app_protocol.clone(),
                })
            })
            .collect();
        if ports.is_empty() && spec.ports.as_ref().is_some_and(|p| !p.is_empty()) {
            continue;
        }
        let address = EndpointAddress {
            ip: ip.to_string(),
            hostname: hostname(&member.pod, &service.name_any()),
            node_name: member.pod.spec.as_ref().and_then(|s| s.node_name.clone()),
            target_ref: Some(pod_reference(&member.pod)),
        };
        let ports = Some(ports).filter(|p| !p.is_empty());
        let subset = match subsets.iter_mut().find(|s| s.ports == ports) {
            Some(subset) => subset,
            None => {
                subsets.push(EndpointSubset { ports, ..EndpointSubset::default() });
                let Some(last) = subsets.last_mut() else { continue };
                last
            }
        };
        let list = if member.ready { &mut subset.addresses } else { &mut subset.not_ready_addresses };
        list.get_or_insert_default().push(address);
    }
    subsets
}

async fn sync_endpoints(service: &Service, client: &Client, members: &[Member]) -> Result<(), Error> {
    let name = service.name_any();
    let api: Api<Endpoints> = Api::namespaced(client.clone(), &owned::namespace(service)?);
    let wanted = Some(subsets(service, members)).filter(|s| !s.is_empty());
    let mut labels = service.labels().clone();
    labels.insert("endpoints.kubernetes.io/managed-by".to_owned(), "endpoint-controller".to_owned());
    match api.get_opt(&name).await? {
        Some(have) if have.subsets.clone().filter(|s| !s.is_empty()) == wanted && *have.labels() == labels => {}
        Some(mut have) => {
            have.subsets = wanted;
            have.metadata.labels = Some(labels);
            have.metadata.managed_fields = None;
            api.replace(&name, &PostParams::default(), &have).await?;
        }
        None => {
            let made = Endpoints {
                metadata: ObjectMeta { name: Some(name), labels: Some(labels), ..ObjectMeta::default() },
                subsets: wanted,
            };
            api.create(&PostParams::default(), &made).await?;
        }
    }
    Ok(())
}

/// Deletes Endpoints whose Service is gone (they carry no owner reference; kube-controller-manager does the same).
pub(super) async fn forget_endpoints(client: &Client, namespace: &str, name: &str) -> Result<(), Error> {
    let api: Api<Endpoints> = Api::namespaced(client.clone(), namespace);
    Ok(gone_is_fine(api.delete(name, &DeleteParams::default()).await)?)
}
