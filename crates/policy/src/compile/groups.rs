//! Peers that selectors and named ports cannot tell apart, and which of them a selector matches.
//!
//! An index from label to groups answers a selector with set operations, so its cost does not grow with the pods.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use towpath_model::labels::Requirement;
use towpath_model::{Labels, NamedPort, NamespacedName, NodeName, Protocol, Selector};

use super::bits::Bits;
use crate::view::{Holder, Holders, PeerPod, View};

/// An address and the group of its holder.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member<'a> {
    pub(super) address: IpAddr,
    pub(super) group: usize,
    /// Set for pods of the node that is compiled for.
    pub(super) local: Option<&'a NamespacedName>,
}

/// All peers of a view by group: pods of the same namespace, labels and named ports; behind those, nodes of the same labels.
#[derive(Debug)]
pub(super) struct Groups<'a> {
    /// All addresses, sorted.
    pub(super) members: Vec<Member<'a>>,
    kinds: Vec<PeerPod<'a>>,
    /// Labels of the nodes that list the addresses of a group; the groups are counted from where `kinds` ends.
    nodes: Vec<Vec<&'a Labels>>,
    by_namespace: HashMap<&'a str, Bits>,
    by_label: HashMap<&'a str, HashMap<&'a str, Vec<usize>>>,
    namespaces: Vec<(&'a str, Labels)>,
    pods_memo: HashMap<Selector, Arc<Bits>>,
    namespaces_memo: HashMap<Selector, Arc<Bits>>,
}

impl<'a> Groups<'a> {
    /// Groups the peers of a view. `with_nodes`: some program in force can tell nodes apart.
    pub(super) fn of(view: &View<'a>, holders: &Holders<'a>, node: &NodeName, with_nodes: bool) -> Self {
        type Identity<'a> = (&'a str, &'a Labels, &'a [NamedPort]);
        let mut known: HashMap<Identity<'a>, usize> = HashMap::new();
        let mut kinds: Vec<PeerPod<'a>> = Vec::new();
        let mut peers: Vec<_> = holders.peers().collect();
        peers.sort_unstable_by_key(|(address, ..)| *address);
        let mut members = Vec::with_capacity(peers.len());
        for (address, holder, peer) in peers {
            let group = *known.entry((peer.namespace, peer.labels, peer.named_ports)).or_insert_with(|| {
                kinds.push(peer);
                kinds.len() - 1
            });
            let local = match holder {
                Holder::Pod(pod) if pod.node.as_ref() == Some(node) => Some(&pod.name),
                _ => None,
            };
            members.push(Member { address, group, local });
        }
        let nodes = if with_nodes { group_nodes(holders, kinds.len(), &mut members) } else { Vec::new() };
        let count = kinds.len() + nodes.len();
        let mut by_namespace: HashMap<&'a str, Bits> = HashMap::new();
        let mut by_label: HashMap<&'a str, HashMap<&'a str, Vec<usize>>> = HashMap::new();
        for (group, kind) in kinds.iter().enumerate() {
            by_namespace.entry(kind.namespace).or_insert_with(|| Bits::none(count)).insert(group);
            for (key, value) in kind.labels {
                by_label.entry(key).or_default().entry(value).or_default().push(group);
            }
        }
        let namespaces = by_namespace.keys().map(|name| (*name, view.world.namespace_labels(name))).collect();
        Self {
            members,
            kinds,
            nodes,
            by_namespace,
            by_label,
            namespaces,
            pods_memo: HashMap::new(),
            namespaces_memo: HashMap::new(),
        }
    }

    /// How many groups there are.
    pub(super) fn len(&self) -> usize {
        self.kinds.len() + self.nodes.len()
    }

    /// The groups of nodes of which a selector matches one.
    pub(super) fn of_nodes(&self, selector: &Selector) -> Bits {
        let mut bits = Bits::none(self.len());
        for (group, nodes) in (self.kinds.len()..).zip(&self.nodes) {
            if nodes.iter().any(|labels| selector.matches(labels)) {
                bits.insert(group);
            }
        }
        bits
    }

    /// The number a named port has in the pods of a group.
    pub(super) fn named_port(&self, group: usize, name: &str, protocol: Protocol) -> Option<u16> {
        self.kinds.get(group)?.named_port(name, protocol)
    }

    /// The namespace of a group.
    pub(super) fn namespace(&self, group: usize) -> Option<&'a str> {
        self.kinds.get(group).map(|k| k.namespace)
    }

    /// The groups of a namespace.
    pub(super) fn in_namespace(&self, namespace: &str) -> Bits {
        self.by_namespace.get(namespace).cloned().unwrap_or_else(|| Bits::none(self.len()))
    }

    /// The groups of the namespaces that a selector matches.
    pub(super) fn in_namespaces(&mut self, selector: &Selector) -> Arc<Bits> {
        if let Some(known) = self.namespaces_memo.get(selector) {
            return known.clone();
        }
        let mut bits = Bits::none(self.len());
        for (name, _) in self.namespaces.iter().filter(|(_, labels)| selector.matches(labels)) {
            if let Some(groups) = self.by_namespace.get(name) {
                bits.unite(groups);
            }
        }
        let bits = Arc::new(bits);
        self.namespaces_memo.insert(selector.clone(), bits.clone());
        bits
    }

    /// The groups, of any namespace, whose pods a selector matches. Where the selector wants that something is not, groups of nodes are among
    /// them: who asks for pods intersects with namespaces.
    pub(super) fn with_labels(&mut self, selector: &Selector) -> Arc<Bits> {
        if let Some(known) = self.pods_memo.get(selector) {
            return known.clone();
        }
        let mut bits = Bits::none(self.len());
        bits.complement();
        for requirement in selector.requirements() {
            bits.intersect(&self.meeting(requirement));
        }
        let bits = Arc::new(bits);
        self.pods_memo.insert(selector.clone(), bits.clone());
        bits
    }

    fn meeting(&self, requirement: &Requirement) -> Bits {
        let mut bits = Bits::none(self.len());
        let values = self.by_label.get(requirement.key());
        let mut add = |groups: &Vec<usize>| groups.iter().for_each(|g| bits.insert(*g));
        match requirement {
            Requirement::In(_, wanted) | Requirement::NotIn(_, wanted) => {
                wanted.iter().filter_map(|v| values?.get(v.as_str())).for_each(&mut add);
            }
            Requirement::Exists(_) | Requirement::DoesNotExist(_) => {
                values.into_iter().flat_map(HashMap::values).for_each(&mut add);
            }
        }
        if matches!(requirement, Requirement::NotIn(..) | Requirement::DoesNotExist(_)) {
            bits.complement();
        }
        bits
    }
}

/// Groups the addresses that nodes hold, and adds them to the members; the first group has the number `first`.
fn group_nodes<'a>(holders: &Holders<'a>, first: usize, members: &mut Vec<Member<'a>>) -> Vec<Vec<&'a Labels>> {
    let mut known: HashMap<Vec<&'a Labels>, usize> = HashMap::new();
    let mut groups: Vec<Vec<&'a Labels>> = Vec::new();
    let mut addresses: Vec<_> = holders.node_addresses().collect();
    addresses.sort_unstable_by_key(|(address, _)| *address);
    for (address, nodes) in addresses {
        let labels: Vec<&'a Labels> = nodes.iter().map(|node| &node.labels).collect();
        let group = *known.entry(labels).or_insert_with_key(|labels| {
            groups.push(labels.clone());
            first + groups.len() - 1
        });
        members.push(Member { address, group, local: None });
    }
    members.sort_unstable_by_key(|member| member.address);
    groups
}
