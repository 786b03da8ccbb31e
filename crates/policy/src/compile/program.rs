//! One direction of one policy, flattened to clauses: a clause is one peer of one rule with the rule's ports.

use std::collections::HashMap;
use std::sync::Arc;

use ipnet::IpNet;
use towpath_model::desired::PolicyRef;
use towpath_model::{
    Action, ClusterPeer, ClusterRule, Direction, DomainName, NamespacedName, Peer, PolicyPort, PolicyRule, PortMatch,
    Protocol, ProtocolMatch, Selector, Subject, Tier,
};

/// What of a peer a clause asks for. Equal atoms are looked up once.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Atom {
    /// Pods.
    Pods { within: Within, pods: Selector },
    /// Addresses.
    Block { cidr: IpNet, except: Vec<IpNet> },
    /// Addresses in any of these.
    Networks(Vec<IpNet>),
    /// Addresses outside the cluster that these names stand for.
    Names(Vec<DomainName>),
    /// Addresses of nodes with these labels.
    Nodes(Selector),
}

/// Where a program stands among those of a pod. A rule that passes goes on at the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Stage {
    Admin,
    /// NetworkPolicies.
    Namespaced,
    Baseline,
    /// Behind all programs.
    Default,
}

impl Stage {
    pub(super) fn next(self) -> Self {
        match self {
            Stage::Admin => Stage::Namespaced,
            Stage::Namespaced => Stage::Baseline,
            Stage::Baseline | Stage::Default => Stage::Default,
        }
    }
}

impl From<Tier> for Stage {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Admin => Stage::Admin,
            Tier::Baseline => Stage::Baseline,
        }
    }
}

/// The namespaces of a pod atom.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Within {
    /// This one.
    Namespace(String),
    /// Those with these labels.
    Matching(Selector),
}

/// An entry of a rule's `ports` or `protocols`; a named port of any protocol is three of one index.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ClausePort {
    pub(super) index: u32,
    pub(super) protocol: Protocol,
    pub(super) wanted: PortMatch,
}

/// The ports of a rule, which all its clauses share.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    /// None: all of every protocol.
    pub(super) list: Option<Vec<ClausePort>>,
    /// Its named ports in order.
    pub(super) named: Vec<(String, Protocol)>,
    /// Whether it has something even where no named port resolves.
    pub(super) has_numbers: bool,
}

impl Ports {
    fn of(list: Option<Vec<ClausePort>>) -> Self {
        let named = list.iter().flatten().filter_map(|port| match &port.wanted {
            PortMatch::Named(name) => Some((name.clone(), port.protocol)),
            PortMatch::Any | PortMatch::Range(..) => None,
        });
        let named = named.collect();
        let is_number = |port: &ClausePort| matches!(port.wanted, PortMatch::Any | PortMatch::Range(..));
        let has_numbers = list.as_ref().is_none_or(|ports| ports.iter().any(is_number));
        Self { list, named, has_numbers }
    }
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
    /// On which ports.
    pub(super) ports: Arc<Ports>,
    /// Which of [`Program::ports`] these are.
    pub(super) lane: usize,
    /// What it does with them.
    pub(super) action: Action,
}

impl Clause {
    /// Whether it might turn out to be about a pod that is not known yet, to that pod's disadvantage.
    pub(super) fn doubts(&self) -> bool {
        self.action != Action::Accept && matches!(self.atom, Some(Atom::Pods { .. }))
    }
}

/// The rules of a program, as the model has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Rules {
    /// Of a NetworkPolicy.
    Namespaced(Vec<PolicyRule>),
    /// Of a ClusterNetworkPolicy.
    Cluster(Vec<ClusterRule>),
}

/// One direction of one policy as it was at one time.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) policy: PolicyRef,
    pub(super) stage: Stage,
    pub(super) direction: Direction,
    /// Tells it from what the policy said before.
    pub(super) version: u64,
    /// What it was made from.
    pub(super) rules: Rules,
    /// In the order in which they decide.
    pub(super) clauses: Vec<Clause>,
    /// The ports that its rules have, each once.
    pub(super) ports: Vec<Arc<Ports>>,
    /// All named ports, sorted.
    pub(super) named: Vec<(String, Protocol)>,
}

impl Program {
    /// Flattens the rules of a NetworkPolicy.
    pub(super) fn of(policy: &NamespacedName, direction: Direction, rules: &[PolicyRule], version: u64) -> Self {
        let mut clauses = Vec::new();
        let mut lanes = Lanes::default();
        for (rule_index, rule) in (0u32..).zip(rules) {
            let ports = (!rule.ports.is_empty()).then(|| {
                let list = (0u32..).zip(&rule.ports);
                list.map(|(index, port)| clause_port(index, port)).collect()
            });
            let (lane, ports) = lanes.lane(ports);
            let action = Action::Accept;
            let clause = |peer, atom| Clause { rule: rule_index, peer, atom, ports: ports.clone(), lane, action };
            if rule.peers.is_empty() {
                clauses.push(clause(None, None));
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
                clauses.push(clause(Some(index), Some(atom)));
            }
        }
        let rules = Rules::Namespaced(rules.to_vec());
        let policy = PolicyRef::Namespaced(policy.clone());
        Self::new(policy, Stage::Namespaced, direction, version, rules, clauses, lanes.list)
    }

    /// Flattens the rules of a ClusterNetworkPolicy.
    pub(super) fn of_cluster(
        name: &str,
        tier: Tier,
        direction: Direction,
        rules: &[ClusterRule],
        version: u64,
    ) -> Self {
        let mut clauses = Vec::new();
        let mut lanes = Lanes::default();
        for (rule_index, rule) in (0u32..).zip(rules) {
            let ports = (!rule.protocols.is_empty()).then(|| {
                let list = (0u32..).zip(&rule.protocols);
                list.flat_map(|(index, protocol)| clause_ports(index, protocol)).collect()
            });
            // One without peers has no clauses, and nobody asks for its ports.
            if rule.peers.is_empty() {
                continue;
            }
            let (lane, ports) = lanes.lane(ports);
            for (index, peer) in (0u32..).zip(&rule.peers) {
                let (peer, atom) = match peer {
                    ClusterPeer::Everybody => (None, None),
                    ClusterPeer::Pods(Subject { namespaces, pods }) => (
                        Some(index),
                        Some(Atom::Pods { within: Within::Matching(namespaces.clone()), pods: pods.clone() }),
                    ),
                    ClusterPeer::Nodes(selector) => (Some(index), Some(Atom::Nodes(selector.clone()))),
                    ClusterPeer::Networks(networks) => (Some(index), Some(Atom::Networks(networks.clone()))),
                    ClusterPeer::DomainNames(names) => (Some(index), Some(Atom::Names(names.clone()))),
                };
                clauses.push(Clause { rule: rule_index, peer, atom, ports: ports.clone(), lane, action: rule.action });
            }
        }
        let policy = PolicyRef::Cluster { tier, name: name.to_owned() };
        Self::new(policy, tier.into(), direction, version, Rules::Cluster(rules.to_vec()), clauses, lanes.list)
    }

    fn new(
        policy: PolicyRef,
        stage: Stage,
        direction: Direction,
        version: u64,
        rules: Rules,
        clauses: Vec<Clause>,
        ports: Vec<Arc<Ports>>,
    ) -> Self {
        let mut named: Vec<(String, Protocol)> = ports.iter().flat_map(|ports| &ports.named).cloned().collect();
        named.sort();
        named.dedup();
        Self { policy, stage, direction, version, rules, clauses, ports, named }
    }

    /// What a rule is called.
    pub(super) fn rule_name(&self, rule: u32) -> &str {
        match &self.rules {
            Rules::Namespaced(_) => "",
            Rules::Cluster(rules) => {
                usize::try_from(rule).ok().and_then(|rule| rules.get(rule)).map_or("", |rule| rule.name.as_str())
            }
        }
    }

    /// Whether a clause denies pods, or passes what they send: then a pod that is not known yet must be told from a stranger.
    pub(super) fn doubts(&self) -> bool {
        self.stage != Stage::Namespaced && self.clauses.iter().any(Clause::doubts)
    }
}

/// The ports of rules, each once.
#[derive(Default)]
struct Lanes {
    numbers: HashMap<Arc<Ports>, usize>,
    list: Vec<Arc<Ports>>,
}

impl Lanes {
    fn lane(&mut self, ports: Option<Vec<ClausePort>>) -> (usize, Arc<Ports>) {
        let ports = Arc::new(Ports::of(ports));
        if let Some((known, lane)) = self.numbers.get_key_value(&ports) {
            return (*lane, known.clone());
        }
        let lane = self.list.len();
        self.numbers.insert(ports.clone(), lane);
        self.list.push(ports.clone());
        (lane, ports)
    }
}

fn clause_port(index: u32, port: &PolicyPort) -> ClausePort {
    ClausePort { index, protocol: port.protocol, wanted: port.port.clone() }
}

fn clause_ports(index: u32, protocol: &ProtocolMatch) -> Vec<ClausePort> {
    match protocol {
        ProtocolMatch::Ports(port) => vec![clause_port(index, port)],
        ProtocolMatch::NamedPort(name) => Protocol::ALL
            .into_iter()
            .map(|protocol| ClausePort { index, protocol, wanted: PortMatch::Named(name.clone()) })
            .collect(),
    }
}
