//! Which endpoints of a Service port take connections (KEP-1669, KEP-2086), and which addresses an EndpointSlice may not
//! name.

use std::collections::BTreeMap;
use std::net::IpAddr;

use towpath_model::desired::BackendAddress;
use towpath_model::{EndpointSlice, Family, NodeName, Service, ServicePort, TrafficPolicy, family_of};

use super::ServiceConfig;

/// What is known of one backend of a port, merged over all slices that list it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: bool,
    pub(super) local: bool,
}

/// The backends of `port` in one family. What may not be a backend is named in `refused`.
pub(super) fn candidates(
    service: &Service,
    port: &ServicePort,
    family: Family,
    slices: &[&EndpointSlice],
    node: &NodeName,
    config: &ServiceConfig,
    refused: &mut Vec<String>,
) -> BTreeMap<BackendAddress, State> {
    let mut found: BTreeMap<BackendAddress, State> = BTreeMap::new();
    for slice in slices {
        let ports = slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol && p.port != 0);
        for slice_port in ports {
            for endpoint in slice.endpoints.iter().filter(|e| family_of(e.address) == family) {
                if let Some(reason) = forbidden(endpoint.address, config) {
                    refused.push(format!("EndpointSlice {}: endpoint {}: {reason}", slice.name, endpoint.address));
                    continue;
                }
                let state = State {
                    ready: endpoint.conditions.ready || service.publish_not_ready,
                    serving: endpoint.conditions.serving || service.publish_not_ready,
                    terminating: endpoint.conditions.terminating,
                    local: endpoint.node.as_ref() == Some(node),
                };
                let key = BackendAddress { address: endpoint.address, port: slice_port.port, protocol: port.protocol };
                // An endpoint may be in two slices while it moves: the better state counts.
                found
                    .entry(key)
                    .and_modify(|have| {
                        have.ready |= state.ready;
                        have.serving |= state.serving;
                        have.terminating &= state.terminating;
                        have.local |= state.local;
                    })
                    .or_insert(state);
            }
        }
    }
    found
}

/// Those that take new connections: the ready ones; if there is none, those that still serve while they terminate.
/// With [`TrafficPolicy::Local`], of this node only, and the same fallback among them.
pub(super) fn choose(candidates: &BTreeMap<BackendAddress, State>, policy: TrafficPolicy) -> Vec<BackendAddress> {
    let eligible = || candidates.iter().filter(|(_, state)| policy == TrafficPolicy::Cluster || state.local);
    let ready: Vec<BackendAddress> = eligible().filter(|(_, s)| s.ready).map(|(b, _)| *b).collect();
    if !ready.is_empty() {
        return ready;
    }
    eligible().filter(|(_, s)| s.serving && s.terminating).map(|(b, _)| *b).collect()
}

/// Why an address may not be an endpoint: who may write EndpointSlices must not reach what only the node may (the API
/// server refuses loopback, link-local and multicast too), nor send a Service in circles.
fn forbidden(address: IpAddr, config: &ServiceConfig) -> Option<&'static str> {
    if address.is_loopback() {
        return Some("loopback addresses are the node's own");
    }
    if address.is_multicast() || address.is_unspecified() || address == IpAddr::from([255, 255, 255, 255]) {
        return Some("not the address of one host");
    }
    if config.dns_addresses.contains(&address) {
        return Some("the node-local DNS address");
    }
    if config.service_cidrs.iter().any(|cidr| cidr.contains(&address)) {
        return Some("itself a Service address");
    }
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    link_local.then_some("link-local addresses (metadata services among them) are the node's own")
}
