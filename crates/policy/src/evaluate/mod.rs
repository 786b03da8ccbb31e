//! One flow judged straight from the parsed policies, with the reason: what `explain` shows.
//!
//! Nothing here goes through a [`PolicyImage`](towpath_model::desired::PolicyImage); that both agree is what the tests check.

mod nearest;
mod show;
mod tiers;

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::IpAddr;

use serde::Serialize;
use towpath_model::desired::{PolicyRef, RowProtocol, RuleInfo, Verdict};
use towpath_model::{
    ClusterNetworkPolicy, Direction, Enforcement, Labels, NamespacedName, NetworkPolicy, Peer, Pod, PolicyPort,
    PortMatch, Protocol, Tier, World,
};

pub use nearest::{Mismatch, Nearest};

use crate::view::{Holder, Holders, View};

/// A flow, as its first packet shows it after Service translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Protocol.
    pub protocol: RowProtocol,
    /// Destination port; 0 for [`RowProtocol::Other`].
    pub port: u16,
    /// The packet only passes the node whose address it carries (it was masqueraded): not the node's own traffic.
    pub forwarded: bool,
}

impl Flow {
    /// A flow that its source itself generates.
    pub fn new(source: IpAddr, destination: IpAddr, protocol: RowProtocol, port: u16) -> Self {
        Self { source, destination, protocol, port, forwarded: false }
    }
}

/// Why one end's verdict is what it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Reason {
    /// Both ends are the same pod.
    Itself,
    /// It comes from the pod's own node. Or it goes there, from a pod of which the API has not told us yet.
    OwnNode,
    /// The API has not told us of the pod yet: only its own node is in reach.
    Unknown,
    /// No NetworkPolicy isolates the pod in this direction, and no rule of a ClusterNetworkPolicy decides.
    NotIsolated,
    /// This rule decides: one of a NetworkPolicy allows it, one of a ClusterNetworkPolicy allows or denies it.
    Rule {
        /// The rule.
        rule: RuleInfo,
    },
    /// Policies isolate the pod and none of their rules matches.
    DefaultDeny {
        /// The policies, by name.
        isolating: Vec<NamespacedName>,
        /// The rule that was closest to a match; none: they have no rules at all.
        nearest: Option<Nearest>,
    },
}

/// The verdict at one end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Side {
    /// The pod whose policies were asked.
    pub pod: NamespacedName,
    /// Egress at the source, ingress at the destination.
    pub direction: Direction,
    /// The verdict.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// Rules with `action: Pass` that led there, in order: at most one a tier.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub passed: Vec<RuleInfo>,
}

impl Side {
    /// The policies that have a part in it: of the rule that decides, of those that passed it on, or all that isolate.
    pub fn policies(&self) -> Vec<PolicyRef> {
        let mut policies: Vec<PolicyRef> = self.passed.iter().map(|rule| rule.policy.clone()).collect();
        match &self.reason {
            Reason::Rule { rule } => policies.push(rule.policy.clone()),
            Reason::DefaultDeny { isolating, .. } => {
                policies.extend(isolating.iter().cloned().map(PolicyRef::Namespaced));
            }
            Reason::Itself | Reason::OwnNode | Reason::Unknown | Reason::NotIsolated => {}
        }
        policies
    }
}

/// The verdict on a flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// Allowed only if no end denies.
    pub verdict: Verdict,
    /// At the source; none: the source is no pod.
    pub egress: Option<Side>,
    /// At the destination; none: the destination is no pod.
    pub ingress: Option<Side>,
}

/// Judges flows of one view. Making one costs a pass over all pods, a flow then only the policies of its two namespaces.
#[derive(Clone, Debug)]
pub struct Evaluator<'a> {
    view: View<'a>,
    holders: Holders<'a>,
    policies: HashMap<&'a str, Vec<&'a NetworkPolicy>>,
    /// In the order in which they are asked.
    admin: Vec<&'a ClusterNetworkPolicy>,
    baseline: Vec<&'a ClusterNetworkPolicy>,
    /// Labels of all namespaces that have pods.
    namespaces: HashMap<&'a str, Labels>,
}

/// Judges one flow; see [`Evaluator`] for many.
pub fn evaluate(view: &View<'_>, flow: &Flow) -> Decision {
    Evaluator::new(view).evaluate(flow)
}

impl<'a> Evaluator<'a> {
    /// Prepares a view. Policies that are only audited decide nothing.
    pub fn new(view: &View<'a>) -> Self {
        Self::of(view, |enforcement| !enforcement.is_audited())
    }

    /// As if every policy that is only audited were enforced. None: there is none.
    pub fn as_if_enforced(view: &View<'a>) -> Option<Self> {
        let World { policies, cluster_policies, .. } = view.world;
        let audited = policies.values().any(|policy| policy.enforcement.is_audited())
            || cluster_policies.values().any(|policy| policy.enforcement.is_audited());
        audited.then(|| Self::of(view, |_| true))
    }

    fn of(view: &View<'a>, counts: impl Fn(&Enforcement) -> bool) -> Self {
        let mut policies: HashMap<&'a str, Vec<&'a NetworkPolicy>> = HashMap::new();
        for policy in view.world.policies.values().filter(|policy| counts(&policy.enforcement)) {
            policies.entry(&policy.name.namespace).or_default().push(policy);
        }
        let holders = Holders::of(view);
        let peers = holders.peers().map(|(_, _, peer)| peer.namespace);
        let mut namespaces: HashMap<&'a str, Labels> = HashMap::new();
        for name in peers {
            namespaces.entry(name).or_insert_with(|| view.world.namespace_labels(name));
        }
        let tier = |tier| {
            let policies = view.world.cluster_policies_of(tier).into_iter();
            policies.filter(|policy| counts(&policy.enforcement)).collect()
        };
        Self { view: *view, holders, policies, admin: tier(Tier::Admin), baseline: tier(Tier::Baseline), namespaces }
    }

    /// Who holds an address.
    pub fn holder(&self, address: IpAddr) -> Option<Holder<'a>> {
        self.holders.holder(address)
    }

    /// Whether an address may be that of a pod which is not known yet: rules of ClusterNetworkPolicies that deny pods then deny it.
    pub fn may_be_pod(&self, address: IpAddr) -> bool {
        self.holders.may_be_pod(self.view.world, address)
    }

    /// Judges a flow at both of its ends.
    pub fn evaluate(&self, flow: &Flow) -> Decision {
        let egress = self.side(flow, Direction::Egress);
        let ingress = self.side(flow, Direction::Ingress);
        let denied = [&egress, &ingress].into_iter().flatten().any(|side| side.verdict == Verdict::Deny);
        Decision { verdict: if denied { Verdict::Deny } else { Verdict::Allow }, egress, ingress }
    }

    /// Judges a flow at one end; none: there is no pod there.
    pub fn side(&self, flow: &Flow, direction: Direction) -> Option<Side> {
        let (own, other) = match direction {
            Direction::Ingress => (flow.destination, flow.source),
            Direction::Egress => (flow.source, flow.destination),
        };
        match self.holders.holder(own)? {
            Holder::Pod(pod) => {
                let mut passed = Vec::new();
                let (verdict, reason) = self.judge(pod, direction, other, flow, &mut passed);
                Some(Side { pod: pod.name.clone(), direction, verdict, reason, passed })
            }
            Holder::UnknownPod(pod) => {
                let own_node =
                    self.is_node_of(other, own, direction) && (direction == Direction::Egress || !flow.forwarded);
                let (verdict, reason) = match self.holders.holder(other) {
                    Some(Holder::UnknownPod(same)) if same == pod => (Verdict::Allow, Reason::Itself),
                    _ if own_node => (Verdict::Allow, Reason::OwnNode),
                    _ => (Verdict::Deny, Reason::Unknown),
                };
                Some(Side { pod: pod.clone(), direction, verdict, reason, passed: Vec::new() })
            }
            Holder::Dns | Holder::Node(_) => None,
        }
    }

    /// Whether `address` is the node whose range holds `pod`: all that is known of the node of an unknown pod. What the node sends is its
    /// own whatever address it carries; as a destination the kernel knows the node by its internal addresses alone.
    fn is_node_of(&self, address: IpAddr, pod: IpAddr, direction: Direction) -> bool {
        let Some(Holder::Node(name)) = self.holders.holder(address) else { return false };
        self.view.world.nodes.get(name).is_some_and(|node| {
            node.pod_cidrs.iter().any(|cidr| cidr.contains(&pod))
                && (direction == Direction::Ingress || node.internal_ips.contains(&address))
        })
    }

    fn judge(
        &self,
        pod: &'a Pod,
        direction: Direction,
        other: IpAddr,
        flow: &Flow,
        passed: &mut Vec<RuleInfo>,
    ) -> (Verdict, Reason) {
        let peer = self.holders.holder(other);
        match peer {
            Some(Holder::Pod(same)) if same.name == pod.name => return (Verdict::Allow, Reason::Itself),
            Some(Holder::Node(node))
                if direction == Direction::Ingress && !flow.forwarded && pod.node.as_ref() == Some(node) =>
            {
                return (Verdict::Allow, Reason::OwnNode);
            }
            _ => {}
        }
        let case = Case { of: self, pod, direction, other, peer, flow };
        if let Some(decided) = case.tier(&self.admin, passed) {
            return decided;
        }
        let isolating: Vec<&NetworkPolicy> = self
            .policies
            .get(pod.name.namespace.as_str())
            .into_iter()
            .flatten()
            .copied()
            .filter(|p| p.rules(direction).is_some() && p.pod_selector.matches(&pod.labels))
            .collect();
        if isolating.is_empty() {
            return case.tier(&self.baseline, passed).unwrap_or((Verdict::Allow, Reason::NotIsolated));
        }
        match isolating.iter().find_map(|policy| case.allowed_by(policy)) {
            Some(rule) => (Verdict::Allow, Reason::Rule { rule }),
            None => {
                let nearest = case.nearest(&isolating);
                let isolating = isolating.into_iter().map(|p| p.name.clone()).collect();
                (Verdict::Deny, Reason::DefaultDeny { nearest, isolating })
            }
        }
    }

    /// The labels of a namespace.
    fn namespace_labels(&self, namespace: &str) -> Cow<'_, Labels> {
        match self.namespaces.get(namespace) {
            Some(labels) => Cow::Borrowed(labels),
            None => Cow::Owned(self.view.world.namespace_labels(namespace)),
        }
    }
}

/// One end of one flow: what a rule is held against.
struct Case<'c, 'a> {
    of: &'c Evaluator<'a>,
    pod: &'a Pod,
    direction: Direction,
    other: IpAddr,
    peer: Option<Holder<'a>>,
    flow: &'c Flow,
}

/// The entries of a list with their indices, or "no list" once where the API reads an empty list as "all".
fn entries<T>(list: &[T]) -> impl Iterator<Item = Option<(u32, &T)>> {
    let all = list.is_empty().then_some(None);
    all.into_iter().chain((0u32..).zip(list).map(Some))
}

impl Case<'_, '_> {
    /// The first rule of a NetworkPolicy that allows the flow.
    fn allowed_by(&self, policy: &NetworkPolicy) -> Option<RuleInfo> {
        for (index, rule) in (0u32..).zip(policy.rules(self.direction)?) {
            for peer in entries(&rule.peers).filter(|p| p.is_none_or(|(_, p)| self.peer_matches(policy, p))) {
                if let Some(port) = entries(&rule.ports).find(|p| p.is_none_or(|(_, p)| self.port_matches(p))) {
                    return Some(self.rule_info(policy, index, peer, port));
                }
            }
        }
        None
    }

    fn rule_info(
        &self,
        policy: &NetworkPolicy,
        rule: u32,
        peer: Option<(u32, &Peer)>,
        port: Option<(u32, &PolicyPort)>,
    ) -> RuleInfo {
        RuleInfo {
            policy: PolicyRef::Namespaced(policy.name.clone()),
            direction: self.direction,
            rule,
            name: String::new(),
            peer: peer.map(|(i, _)| i),
            port: port.map(|(i, _)| i),
        }
    }

    fn peer_matches(&self, policy: &NetworkPolicy, wanted: &Peer) -> bool {
        match wanted {
            Peer::IpBlock { cidr, except } => {
                cidr.contains(&self.other) && !except.iter().any(|e| e.contains(&self.other))
            }
            Peer::Pods { namespaces, pods } => self.peer.and_then(|p| p.as_peer()).is_some_and(|peer| {
                pods.matches(peer.labels)
                    && match namespaces {
                        None => peer.namespace == policy.name.namespace,
                        Some(selector) => selector.matches(&self.of.namespace_labels(peer.namespace)),
                    }
            }),
        }
    }

    fn port_matches(&self, wanted: &PolicyPort) -> bool {
        self.protocol_matches(wanted) && self.number_matches(wanted)
    }

    fn protocol_matches(&self, wanted: &PolicyPort) -> bool {
        self.flow.protocol == RowProtocol::Ports(wanted.protocol)
    }

    fn number_matches(&self, wanted: &PolicyPort) -> bool {
        match &wanted.port {
            PortMatch::Any => true,
            PortMatch::Range(first, last) => (*first..=*last).contains(&self.flow.port),
            PortMatch::Named(name) => self.named_port(name, wanted.protocol) == Some(self.flow.port),
        }
    }

    /// What a named port means here: a container port of the pod that the flow leads to.
    fn named_port(&self, name: &str, protocol: Protocol) -> Option<u16> {
        match self.direction {
            Direction::Ingress => self.pod.named_port(name, protocol),
            Direction::Egress => self.peer.and_then(|p| p.as_peer())?.named_port(name, protocol),
        }
    }
}
