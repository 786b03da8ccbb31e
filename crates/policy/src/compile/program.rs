//! One direction of one policy, flattened to clauses: a clause is one peer of one rule with the rule's ports.

use ipnet::IpNet;
use towpath_model::{Direction, NamespacedName, Peer, PolicyRule, PortMatch, Protocol, Selector};

/// What of a peer a clause asks for. Equal atoms are looked up once.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Atom {
    /// Pods.
    Pods { within: Within, pods: Selector },
    /// Addresses.
    Block { cidr: IpNet, except: Vec<IpNet> },
}

/// The namespaces of a pod atom.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Within {
    /// This one.
    Namespace(String),
    /// Those with these labels.
    Matching(Selector),
}

/// An entry of a rule's `ports`.
#[derive(Clone, Debug)]
pub(super) struct ClausePort {
    pub(super) index: u32,
    pub(super) protocol: Protocol,
    pub(super) wanted: PortMatch,
}

/// One peer of one rule.
#[derive(Clone, Debug)]
pub(super) struct Clause {
    /// Index of the rule.
    pub(super) rule: u32,
    /// Index of the peer; none: the rule has no peers.
    pub(super) peer: Option<u32>,
    /// Whom it matches; none: everybody.
    pub(super) atom: Option<Atom>,
    /// On which ports; none: all of every protocol.
    pub(super) ports: Option<Vec<ClausePort>>,
}

impl Clause {
    /// Its named ports in order.
    pub(super) fn named(&self) -> impl Iterator<Item = (&str, Protocol)> {
        self.ports.iter().flatten().filter_map(|port| match &port.wanted {
            PortMatch::Named(name) => Some((name.as_str(), port.protocol)),
            PortMatch::Any | PortMatch::Range(..) => None,
        })
    }

    /// Whether it allows something even where no named port resolves.
    pub(super) fn allows_numbers(&self) -> bool {
        self.ports
            .as_ref()
            .is_none_or(|ports| ports.iter().any(|p| matches!(p.wanted, PortMatch::Any | PortMatch::Range(..))))
    }
}

/// One direction of one policy as it was at one time.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) policy: NamespacedName,
    pub(super) direction: Direction,
    /// Tells it from what the policy said before.
    pub(super) version: u64,
    /// What it was made from.
    pub(super) rules: Vec<PolicyRule>,
    /// In the order in which they decide.
    pub(super) clauses: Vec<Clause>,
    /// All named ports, sorted.
    pub(super) named: Vec<(String, Protocol)>,
}

impl Program {
    /// Flattens rules.
    pub(super) fn of(policy: &NamespacedName, direction: Direction, rules: &[PolicyRule], version: u64) -> Self {
        let mut clauses = Vec::new();
        for (rule_index, rule) in (0u32..).zip(rules) {
            let ports = (!rule.ports.is_empty()).then(|| {
                let list = (0u32..).zip(&rule.ports);
                list.map(|(index, p)| ClausePort { index, protocol: p.protocol, wanted: p.port.clone() }).collect()
            });
            if rule.peers.is_empty() {
                clauses.push(Clause { rule: rule_index, peer: None, atom: None, ports });
                continue;
            }
            for (index, peer) in (0u32..).zip(&rule.peers) {
                let atom = match peer {
                    Peer::IpBlock { cidr, except } => Atom::Block { cidr: *cidr, except: except.clone() },
                    Peer::Pods { namespaces, pods } => Atom::Pods {
                        within: match namespaces {
                            None => Within::Namespace(policy.namespace.clone()),
                            Some(selector) => Within::Matching(selector.clone()),
                        },
                        pods: pods.clone(),
                    },
                };
                clauses.push(Clause { rule: rule_index, peer: Some(index), atom: Some(atom), ports: ports.clone() });
            }
        }
        let mut named: Vec<(String, Protocol)> =
            clauses.iter().flat_map(Clause::named).map(|(name, protocol)| (name.to_owned(), protocol)).collect();
        named.sort();
        named.dedup();
        Self { policy: policy.clone(), direction, version, rules: rules.to_vec(), clauses, named }
    }
}
