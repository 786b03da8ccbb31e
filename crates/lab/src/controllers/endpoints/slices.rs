//! The slices of one Service: what they should hold, and the fewest writes that bring them there.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::{Client, ResourceExt};

use super::{Member, hostname, pod_reference, target_port};
use crate::controllers::{Error, gone_is_fine, owned};

const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Our name as manager of slices: kube-controller-manager's, because the slices are what it would make.
const MANAGER: &str = "endpointslice-controller.k8s.io";
/// The annotation by which the API server says since when an EndpointSlice waits (KEP-0614).
const TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const MOST: usize = 100;

/// What slices are kept apart by: family and ports.
type Group = (String, Vec<(Option<String>, Option<i32>, Option<String>, Option<String>)>);

fn group_of(family: &str, ports: &[EndpointPort]) -> Group {
    let mut key: Vec<_> =
        ports.iter().map(|p| (p.name.clone(), p.port, p.protocol.clone(), p.app_protocol.clone())).collect();
    key.sort();
    (family.to_owned(), key)
}

fn endpoint(member: &Member, address: std::net::IpAddr, service: &str) -> Endpoint {
    Endpoint {
        addresses: vec![address.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(member.ready),
            serving: Some(member.serving),
            terminating: Some(member.terminating),
        }),
        hostname: hostname(&member.pod, service),
        node_name: member.pod.spec.as_ref().and_then(|s| s.node_name.clone()),
        target_ref: Some(pod_reference(&member.pod)),
        ..Endpoint::default()
    }
}

fn desired(service: &Service, members: &[Member]) -> BTreeMap<Group, (Vec<EndpointPort>, Vec<Endpoint>)> {
    let spec = service.spec.clone().unwrap_or_default();
    let families = spec.ip_families.clone().unwrap_or_else(|| vec!["IPv4".to_owned()]);
    let mut groups: BTreeMap<Group, (Vec<EndpointPort>, Vec<Endpoint>)> = BTreeMap::new();
    for family in families {
        for member in members {
            let Some(address) = member.addresses.iter().find(|a| a.is_ipv6() == (family == "IPv6")) else { continue };
            let ports: Vec<EndpointPort> = spec
                .ports
                .iter()
                .flatten()
                .filter_map(|p| {
                    Some(EndpointPort {
                        name: Some(p.name.clone().unwrap_or_default()),
                        port: Some(target_port(&member.pod, p)?),
                        protocol: Some(p.protocol.clone().unwrap_or_else(|| "TCP".to_owned())),
                        app_protocol: p.app_protocol.clone(),
                    })
                })
                .collect();
            let group = groups.entry(group_of(&family, &ports)).or_insert_with(|| (ports, Vec::new()));
            group.1.push(endpoint(member, *address, &service.name_any()));
        }
        // A Service without endpoints has one empty slice a family, as kube-controller-manager keeps it.
        if !groups.keys().any(|(f, _)| *f == family) {
            groups.insert((family, Vec::new()), (Vec::new(), Vec::new()));
        }
    }
    groups
}

fn empty_slice(service: &Service, family: &str, ports: Vec<EndpointPort>) -> Result<EndpointSlice, Error> {
    let name = service.name_any();
    let mut labels = service.labels().clone();
    labels.insert(SERVICE_NAME.to_owned(), name.clone());
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    if service.spec.as_ref().and_then(|s| s.cluster_ip.as_deref()) == Some("None") {
        labels.insert("service.kubernetes.io/headless".to_owned(), String::new());
    }
    Ok(EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{name}-")),
            namespace: service.namespace(),
            labels: Some(labels),
            owner_references: Some(vec![owned::controller_of(service)?]),
            ..ObjectMeta::default()
        },
        address_type: family.to_owned(),
        ports: Some(ports),
        endpoints: Some(Vec::new()),
    })
}

fn pod_uid(endpoint: &Endpoint) -> Option<&str> {
    endpoint.target_ref.as_ref().and_then(|r| r.uid.as_deref())
}

/// Fills slices of one group: endpoints stay where their pod is already, new ones fill gaps, the rest gets new slices.
/// Returns slices to write (with a name: update) in order.
fn distribute(
    service: &Service,
    family: &str,
    ports: &[EndpointPort],
    mut wanted: Vec<Endpoint>,
    existing: Vec<EndpointSlice>,
) -> Result<Vec<EndpointSlice>, Error> {
    let mut out = Vec::new();
    for mut slice in existing {
        let mut kept = Vec::new();
        for old in slice.endpoints.take().unwrap_or_default() {
            if let Some(at) = wanted.iter().position(|e| pod_uid(e).is_some() && pod_uid(e) == pod_uid(&old)) {
                kept.push(wanted.swap_remove(at));
            }
        }
        slice.endpoints = Some(kept);
        out.push(slice);
    }
    wanted.sort_by(|a, b| a.addresses.cmp(&b.addresses));
    for slice in &mut out {
        let list = slice.endpoints.get_or_insert_default();
        let room = MOST.saturating_sub(list.len()).min(wanted.len());
        list.extend(wanted.drain(..room));
    }
    while !wanted.is_empty() {
        let mut slice = empty_slice(service, family, ports.to_vec())?;
        slice.endpoints = Some(wanted.drain(..wanted.len().min(MOST)).collect());
        out.push(slice);
    }
    if out.is_empty() {
        out.push(empty_slice(service, family, ports.to_vec())?);
    }
    Ok(out)
}

/// Whether two slices hold the same endpoints; the API server leaves an empty list out.
fn same_endpoints(one: &EndpointSlice, other: &EndpointSlice) -> bool {
    one.endpoints.as_deref().unwrap_or_default() == other.endpoints.as_deref().unwrap_or_default()
}

/// Brings the slices that we manage up to date.
pub(super) async fn sync(service: &Service, client: &Client, members: &[Member]) -> Result<(), Error> {
    let api: Api<EndpointSlice> = Api::namespaced(client.clone(), &owned::namespace(service)?);
    let selector = format!("{SERVICE_NAME}={},{MANAGED_BY}={MANAGER}", service.name_any());
    let have = api.list(&ListParams::default().labels(&selector)).await?.items;
    let mut by_group: BTreeMap<Group, Vec<EndpointSlice>> = BTreeMap::new();
    for slice in have.iter().filter(|s| owned::is_controlled_by(&s.metadata, service)) {
        let group = group_of(&slice.address_type, slice.ports.as_deref().unwrap_or_default());
        by_group.entry(group).or_default().push(slice.clone());
    }
    let labels = |slice: &EndpointSlice| slice.metadata.labels.clone();
    let mut surplus: Vec<EndpointSlice> = Vec::new();
    for (group, (ports, wanted)) in desired(service, members) {
        let existing = by_group.remove(&group).unwrap_or_default();
        let slices = distribute(service, &group.0, &ports, wanted, existing)?;
        let filled = slices.iter().filter(|s| s.endpoints.as_ref().is_some_and(|e| !e.is_empty())).count();
        for (index, mut slice) in slices.into_iter().enumerate() {
            let empty = slice.endpoints.as_ref().is_none_or(Vec::is_empty);
            let Some(name) = slice.metadata.name.clone() else {
                api.create(&PostParams::default(), &slice).await?;
                continue;
            };
            if empty && (filled > 0 || index > 0) {
                surplus.push(slice);
                continue;
            }
            slice.metadata.labels = labels(&empty_slice(service, &group.0, Vec::new())?);
            let old = have.iter().find(|s| s.metadata.name.as_deref() == Some(&name));
            if old.is_none_or(|old| !same_endpoints(old, &slice) || old.metadata.labels != slice.metadata.labels) {
                slice.metadata.managed_fields = None;
                slice
                    .metadata
                    .annotations
                    .get_or_insert_default()
                    .insert(TRIGGERED.to_owned(), k8s_openapi::jiff::Timestamp::now().to_string());
                api.replace(&name, &PostParams::default(), &slice).await?;
            }
        }
    }
    for slice in surplus.iter().chain(by_group.values().flatten()) {
        gone_is_fine(api.delete(&slice.name_any(), &DeleteParams::default()).await)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> Service {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "web", "namespace": "default", "uid": "u"},
            "spec": {"clusterIP": "10.96.0.1", "ipFamilies": ["IPv4"], "selector": {"a": "b"},
                     "ports": [{"name": "http", "port": 80, "targetPort": "web"}, {"name": "raw", "port": 81}]},
        }))
        .unwrap()
    }

    fn member(name: &str, ip: &str, port: i32, ready: bool) -> Member {
        let pod: k8s_openapi::api::core::v1::Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": name, "namespace": "default", "uid": name},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": port}]}]},
        }))
        .unwrap();
        Member { pod, addresses: vec![ip.parse().unwrap()], ready, serving: ready, terminating: false }
    }

    #[test]
    fn pods_whose_named_port_differs_get_slices_of_their_own() {
        let members = [
            member("a", "10.0.0.1", 8080, true),
            member("b", "10.0.0.2", 9090, true),
            member("c", "10.0.0.3", 8080, false),
        ];
        let groups = desired(&service(), &members);
        let sizes: Vec<usize> = groups.values().map(|(_, e)| e.len()).collect();
        assert_eq!(sizes, [2, 1]);
    }

    #[test]
    fn an_endpoint_keeps_its_slice_and_a_slice_holds_a_hundred() {
        let members: Vec<Member> = (0..150)
            .map(|i| member(&format!("p{i}"), &format!("10.0.{}.{}", i / 200, i % 200 + 1), 80, true))
            .collect();
        let (group, (ports, wanted)) = desired(&service(), &members).pop_first().unwrap();
        let mut first = distribute(&service(), &group.0, &ports, wanted.clone(), Vec::new()).unwrap();
        assert_eq!(first.iter().map(|s| s.endpoints.as_ref().unwrap().len()).collect::<Vec<_>>(), [100, 50]);
        for (i, slice) in first.iter_mut().enumerate() {
            slice.metadata.name = Some(format!("s{i}"));
        }
        let before: Vec<_> = first[0].endpoints.as_ref().unwrap().iter().map(|e| e.addresses.clone()).collect();
        let fewer: Vec<Endpoint> = wanted.into_iter().filter(|e| e.addresses != before[0]).collect();
        let after = distribute(&service(), &group.0, &ports, fewer, first).unwrap();
        assert_eq!(after.len(), 2);
        assert_eq!(after[0].endpoints.as_ref().unwrap().len(), 99);
    }
}
