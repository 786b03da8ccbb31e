//! ClusterNetworkPolicy (`policy.networking.k8s.io/v1alpha2`), parsed.
//!
//! Field by field as the definition of network-policy-api v0.2.0 validates it. What does not fit fails closed, rule by rule, in the
//! words of the API's own types: an `Accept` rule matches no traffic, a `Deny` or `Pass` rule becomes one that denies all. The
//! rules keep their places, so that they keep their numbers.

pub mod object;
mod parse;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{Direction, DomainName, Enforcement, PolicyPort, Selector};

/// Most rules of a direction, most peers and protocols of a rule, most CIDRs and names of a peer (`maxItems` of the definition).
pub const MOST_ITEMS: usize = 25;
/// Longest name of a rule in characters (`maxLength`).
pub const LONGEST_RULE_NAME: usize = 100;
/// Highest priority value (`maximum`).
pub const HIGHEST_PRIORITY: u16 = 1000;

/// Where a policy stands. NetworkPolicies come between the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Tier {
    /// Before all NetworkPolicies.
    Admin,
    /// After them, for pods that none of them isolates.
    Baseline,
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Tier::Admin => "Admin",
            Tier::Baseline => "Baseline",
        })
    }
}

/// What a rule does with the traffic it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Action {
    /// It passes this end, whatever later rules, policies and tiers say.
    Accept,
    /// It is dropped.
    Deny,
    /// The rest of this tier is skipped.
    Pass,
}

/// A ClusterNetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterNetworkPolicy {
    /// Its name.
    pub name: String,
    /// Its tier.
    pub tier: Tier,
    /// 0 to [`HIGHEST_PRIORITY`]; within a tier the lowest value is asked first.
    pub priority: u16,
    /// The pods it applies to. Never one on the host network.
    pub subject: Subject,
    /// Rules for traffic to them; the first that matches decides.
    pub ingress: Vec<ClusterRule>,
    /// Rules for traffic from them; the first that matches decides.
    pub egress: Vec<ClusterRule>,
    /// Whether that is done, or only reported.
    #[serde(default)]
    pub enforcement: Enforcement,
}

/// Pods by labels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Subject {
    /// Which namespaces.
    pub namespaces: Selector,
    /// Which pods in them.
    pub pods: Selector,
}

/// A rule: any of the peers, with any of the protocols.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRule {
    /// For people; may be empty.
    pub name: String,
    /// What it does.
    pub action: Action,
    /// Whom it is about. Empty: nobody (a NetworkPolicy's empty list is everybody).
    pub peers: Vec<ClusterPeer>,
    /// Which traffic of theirs; empty: all, of every protocol.
    pub protocols: Vec<ProtocolMatch>,
}

impl ClusterRule {
    /// What stands for a rule that cannot be understood: an `Accept` that accepts nothing, else a `Deny` of everything.
    pub fn closed(name: String, action: Option<Action>) -> Self {
        match action {
            Some(Action::Accept) => Self { name, action: Action::Accept, peers: Vec::new(), protocols: Vec::new() },
            _ => Self { name, action: Action::Deny, peers: vec![ClusterPeer::Everybody], protocols: Vec::new() },
        }
    }
}

/// A peer of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ClusterPeer {
    /// Everybody, pod or not: only of [`ClusterRule::closed`].
    Everybody,
    /// Pods, never those on the host network.
    Pods(Subject),
    /// Nodes by labels, at any of their addresses. Egress only.
    Nodes(Selector),
    /// Addresses, also those of pods and nodes. Egress only.
    Networks(Vec<IpNet>),
    /// What these names stand for, as far as DNS has said it to pods here. Egress and `Accept` only.
    DomainNames(Vec<DomainName>),
}

/// Which traffic of a peer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ProtocolMatch {
    /// Ports of one protocol; never named ones.
    Ports(PolicyPort),
    /// The container ports of this name in the pod that the traffic goes to, of whatever protocol each is.
    NamedPort(String),
}

impl ClusterNetworkPolicy {
    /// The rules of a direction; none: it says nothing of that direction.
    pub fn rules(&self, direction: Direction) -> &[ClusterRule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    /// What stands for it where there is no room for its rules: each of them as if it could not be understood ([`ClusterRule::closed`]). One that
    /// is only audited has none.
    pub fn closed(&self) -> Self {
        let closed = |rules: &[ClusterRule]| {
            let kept = rules.iter().filter(|_| !self.enforcement.is_audited());
            kept.map(|rule| ClusterRule::closed(rule.name.clone(), Some(rule.action))).collect()
        };
        Self {
            name: self.name.clone(),
            subject: self.subject.clone(),
            ingress: closed(&self.ingress),
            egress: closed(&self.egress),
            enforcement: self.enforcement.clone(),
            ..*self
        }
    }

    /// How much it asks for, as far as its text says: peers (CIDRs and names among them) times protocols, of all rules.
    pub fn weight(&self) -> usize {
        let of_peer = |peer: &ClusterPeer| match peer {
            ClusterPeer::Networks(list) => list.len(),
            ClusterPeer::DomainNames(list) => list.len(),
            ClusterPeer::Everybody | ClusterPeer::Pods(_) | ClusterPeer::Nodes(_) => 1,
        };
        let of_rule = |rule: &ClusterRule| {
            rule.peers.iter().map(of_peer).sum::<usize>().saturating_mul(rule.protocols.len().max(1))
        };
        self.ingress.iter().chain(&self.egress).map(of_rule).fold(0, usize::saturating_add)
    }

    /// What decides which of two policies of a tier is asked first: priority, then (where the API leaves it open) name.
    pub fn precedence(&self) -> (Tier, u16, &str) {
        (self.tier, self.priority, &self.name)
    }

    /// Whether a rule names domains.
    pub fn has_domain_names(&self) -> bool {
        self.domain_names().next().is_some()
    }

    /// All names that its rules ask for, in no order.
    pub fn domain_names(&self) -> impl Iterator<Item = &DomainName> {
        self.egress.iter().flat_map(|rule| &rule.peers).flat_map(|peer| match peer {
            ClusterPeer::DomainNames(names) => names.as_slice(),
            _ => &[],
        })
    }

    /// Whether a rule is about nodes.
    pub fn has_nodes(&self) -> bool {
        self.egress.iter().flat_map(|rule| &rule.peers).any(|peer| matches!(peer, ClusterPeer::Nodes(_)))
    }
}

#[cfg(test)]
mod tests;
