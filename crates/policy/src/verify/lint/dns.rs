//! Pods that may reach something, and no DNS server.

use std::collections::BTreeMap;

use towpath_model::desired::RowProtocol;
use towpath_model::{Action, Labels, Protocol, World};

use super::{Code, Finding, is_in};
use crate::verify::clauses::{Clause, PeerSet, PodSet, Tiers};
use crate::verify::ports::Ports;
use crate::verify::universe::{Endpoint, Who, in_namespaces};

const UDP: RowProtocol = RowProtocol::Ports(Protocol::Udp);

/// Finds policies whose pods have egress to something and none to a DNS server, each set of policies once.
pub(super) fn find(world: &World, pods: &[&Endpoint], tiers: &Tiers<'_>, found: &mut Vec<Finding>) {
    let mut forgetful: BTreeMap<(String, Vec<String>), Vec<String>> = BTreeMap::new();
    for endpoint in pods {
        let Some(list) = endpoint.namespace().and_then(|namespace| tiers.isolation.get(namespace)) else { continue };
        let own: Vec<_> = list.iter().filter(|isolation| isolation.selector.matches(&endpoint.labels)).collect();
        let clauses: Vec<&Clause<'_>> = own.iter().flat_map(|isolation| &isolation.clauses).collect();
        let by_admin = tiers
            .admin
            .iter()
            .filter(|ranked| ranked.clause.action == Action::Accept && is_in(world, ranked.subject, endpoint))
            .map(|ranked| &ranked.clause);
        // Without any rule, that nothing is reached is what is wanted.
        if clauses.is_empty() || clauses.iter().copied().chain(by_admin).any(|clause| reaches_dns(world, pods, clause))
        {
            continue;
        }
        let names: Vec<String> = own.iter().map(|isolation| isolation.policy.name.to_string()).collect();
        let Some(first) = own.iter().find(|isolation| !isolation.clauses.is_empty()) else { continue };
        let Who::Workload(workload, _) = &endpoint.who else { continue };
        forgetful.entry((first.policy.name.to_string(), names)).or_default().push(workload.name.clone());
    }
    for ((policy, all), mut workloads) in forgetful {
        workloads.dedup();
        let shown = workloads.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
        let more = workloads.len().saturating_sub(5);
        let more = if more == 0 { String::new() } else { format!(" and {more} more") };
        let others: Vec<String> = all.into_iter().filter(|name| *name != policy).collect();
        let with = if others.is_empty() { String::new() } else { format!(" (with {})", others.join(", ")) };
        let message = format!("{shown}{more}: egress to something, but not to UDP 53 of any DNS server{with}");
        found.push(Finding::new(Code::NoDns, format!("NetworkPolicy {policy}"), "spec.egress", message));
    }
}

fn reaches_dns(world: &World, pods: &[&Endpoint], clause: &Clause<'_>) -> bool {
    let by_name =
        clause.ports.named.iter().any(|(name, protocol)| *protocol == Protocol::Udp && name.starts_with("dns"));
    if !by_name && !clause.ports.fixed.has(UDP, 53) {
        return false;
    }
    match &clause.peer {
        PeerSet::Anyone | PeerSet::Nodes(_) => true,
        PeerSet::Addresses(block) => !block.is_empty(),
        // They stand for nobody before a DNS server was reached.
        PeerSet::Names(_) => false,
        PeerSet::Pods(set) => is_cluster_dns(world, *set) || pods.iter().any(|e| is_server(e) && is_in(world, *set, e)),
    }
}

/// Whether the set holds the pods that clusters have their DNS in, there or not.
fn is_cluster_dns(world: &World, set: PodSet<'_>) -> bool {
    let labels = Labels::from([("k8s-app".to_owned(), "kube-dns".to_owned())]);
    in_namespaces(set.namespaces, "kube-system", &world.namespace_labels("kube-system")) && set.pods.matches(&labels)
}

fn is_server(endpoint: &Endpoint) -> bool {
    let ports = endpoint.named_ports.iter();
    ports.filter(|p| p.protocol == Protocol::Udp).any(|p| Ports::of(p.protocol, p.number, p.number).has(UDP, 53))
}
