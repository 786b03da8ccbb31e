//! Which endpoints of a Service port take connections (KEP-1669, KEP-2086; hints: KEP-2433, KEP-3015), and which addresses an
//! EndpointSlice may not name.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use towpath_model::desired::BackendAddress;
use towpath_model::{EndpointSlice, Family, NodeName, Service, ServicePort, family_of};

use super::{RefusedPart, ServiceConfig};

/// Where the clients are that a table is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Here<'a> {
    pub(super) node: &'a NodeName,
    pub(super) zone: Option<&'a str>,
}

/// What the hints of an endpoint say to this node's clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Hint {
    None,
    ForOthers,
    ForUs,
}

impl Hint {
    fn of<T>(list: &[T], us: impl Fn(&T) -> bool) -> Self {
        match list {
            [] => Hint::None,
            list if list.iter().any(us) => Hint::ForUs,
            _ => Hint::ForOthers,
        }
    }
}

/// What is known of one backend of a port, merged over all slices that list it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: bool,
    pub(super) node: Option<NodeName>,
    pub(super) by_node: Hint,
    pub(super) by_zone: Hint,
}

/// The backends of `port` in one family. What may not be a backend is named in `refused`.
pub(super) fn candidates(
    service: &Service,
    port: &ServicePort,
    family: Family,
    slices: &[&EndpointSlice],
    here: Here<'_>,
    config: &ServiceConfig,
    refused: &mut Vec<(RefusedPart, String)>,
) -> BTreeMap<BackendAddress, State> {
    let mut found: BTreeMap<BackendAddress, State> = BTreeMap::new();
    for slice in slices.iter().filter(|slice| !slice.headless) {
        let ports = slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol && p.port != 0);
        for slice_port in ports {
            for endpoint in slice.endpoints.iter().filter(|e| family_of(e.address) == family) {
                if let Some(reason) = forbidden(endpoint.address, config) {
                    let reason = format!("EndpointSlice {}: endpoint {}: {reason}", slice.name, endpoint.address);
                    refused.push((RefusedPart::Endpoint, reason));
                    continue;
                }
                let hints = endpoint.hints.as_deref();
                let state = State {
                    ready: endpoint.conditions.ready || service.publish_not_ready,
                    serving: endpoint.conditions.serving || service.publish_not_ready,
                    terminating: endpoint.conditions.terminating,
                    node: endpoint.node.clone(),
                    by_node: Hint::of(hints.map_or(&[], |hints| &hints.nodes), |node| node == here.node),
                    by_zone: Hint::of(hints.map_or(&[], |hints| &hints.zones), |zone| here.zone == Some(zone.as_str())),
                };
                let key = BackendAddress { address: endpoint.address, port: slice_port.port, protocol: port.protocol };
                // An endpoint may be in two slices while it moves: the better state counts.
                found
                    .entry(key)
                    .and_modify(|have| {
                        have.ready |= state.ready;
                        have.serving |= state.serving;
                        have.terminating &= state.terminating;
                        have.node = have.node.take().or_else(|| state.node.clone());
                        have.by_node = have.by_node.max(state.by_node);
                        have.by_zone = have.by_zone.max(state.by_zone);
                    })
                    .or_insert(state);
            }
        }
    }
    found
}

/// Those that take new connections: the ready ones; if there is none, those that still serve while they terminate.
/// Among the ready ones hints choose those for this node, else those for its zone, as long as every one has such a hint.
pub(super) fn choose(candidates: &BTreeMap<BackendAddress, State>) -> Vec<BackendAddress> {
    let ready: Vec<(&BackendAddress, &State)> = candidates.iter().filter(|(_, s)| s.ready).collect();
    let meant_for_us = |hint: fn(&State) -> Hint| {
        let all_hinted = ready.iter().all(|(_, state)| hint(state) != Hint::None);
        let ours: Vec<BackendAddress> =
            ready.iter().filter(|(_, state)| hint(state) == Hint::ForUs).map(|(b, _)| **b).collect();
        (all_hinted && !ours.is_empty()).then_some(ours)
    };
    meant_for_us(|state| state.by_node)
        .or_else(|| meant_for_us(|state| state.by_zone))
        .unwrap_or_else(|| ready_or_draining(candidates.iter()))
}

/// As [`choose`] with a policy of [`towpath_model::TrafficPolicy::Local`], for clients of `node`: its own endpoints only, and
/// no hints.
pub(super) fn choose_on(node: &NodeName, candidates: &BTreeMap<BackendAddress, State>) -> Vec<BackendAddress> {
    ready_or_draining(candidates.iter().filter(|(_, state)| state.node.as_ref() == Some(node)))
}

fn ready_or_draining<'a>(
    eligible: impl Iterator<Item = (&'a BackendAddress, &'a State)> + Clone,
) -> Vec<BackendAddress> {
    let ready: Vec<BackendAddress> = eligible.clone().filter(|(_, s)| s.ready).map(|(b, _)| *b).collect();
    if !ready.is_empty() {
        return ready;
    }
    eligible.filter(|(_, s)| s.serving && s.terminating).map(|(b, _)| *b).collect()
}

/// Metadata services of clouds at addresses that are not link-local: they hand a node's credentials to who asks from it. AWS and Google
/// over IPv6, Alibaba Cloud, Azure (WireServer), Oracle Cloud.
const METADATA: [IpAddr; 5] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
];

/// The IPv4 address that a gateway would make of an IPv6 one: compatible (RFC 4291 2.5.5.1), 6to4 (RFC 3056), NAT64 (RFC 6052).
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let from = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        Ipv4Addr::new(a, b, c, d)
    };
    match address.segments() {
        [0, 0, 0, 0, 0, 0, high, low] if high != 0 || low > 1 => Some(from(high, low)),
        [0x2002, high, low, ..] => Some(from(high, low)),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(from(high, low)),
        _ => None,
    }
}

/// Why an address may not be an endpoint: who may write EndpointSlices must not reach what only the node may (CVE-2021-25737; the API
/// server refuses loopback, link-local and multicast too), nor send a Service in circles.
pub(super) fn forbidden(address: IpAddr, config: &ServiceConfig) -> Option<&'static str> {
    if address.is_loopback() {
        return Some("loopback addresses are the node's own");
    }
    // 0.0.0.0/8 is "this host on this network" (RFC 1122 3.2.1.3), 240.0.0.0/4 nobody's, the broadcast address in it.
    let nobodys = matches!(address, IpAddr::V4(v4) if matches!(v4.octets(), [0 | 240..=255, ..]));
    if address.is_multicast() || address.is_unspecified() || nobodys {
        return Some("not the address of one host");
    }
    if config.dns_addresses.contains(&address) {
        return Some("the node-local DNS address");
    }
    if config.service_cidrs.iter().any(|cidr| cidr.contains(&address)) {
        return Some("itself a Service address");
    }
    if METADATA.contains(&address) {
        return Some("a cloud's metadata service, which is for the node");
    }
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if link_local {
        return Some("link-local addresses (metadata services among them) are the node's own");
    }
    let IpAddr::V6(v6) = address else { return None };
    forbidden(embedded(v6)?.into(), config).map(|_| "an IPv6 form of an IPv4 address that may not be one")
}
