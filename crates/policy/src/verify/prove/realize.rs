//! A solution made concrete: two ends with labels and addresses, a port, and what the evaluator says of it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;
use towpath_model::desired::{RowProtocol, Verdict};
use towpath_model::{Labels, NamedPort, Namespace, NamespacedName, Node, NodeName, Phase, Pod, SocketServices, World};

use super::Unanswered;
use super::cases::{Case, End, NAME_LABEL, PORT};
use super::solve::Domains;
use crate::evaluate::{Decision, Flow, evaluate};
use crate::names::{Learned, Limits};
use crate::verify::addresses::address;
use crate::verify::membership::{Peer, holds, holds_ports};
use crate::verify::ports::Ports;
use crate::verify::ranges::Ranges;
use crate::verify::statement::{Claim, Statement};
use crate::verify::universe::Universe;
use crate::view::View;

/// One end of a counterexample.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Actor {
    /// Whether it is a node; then the labels are the node's.
    #[serde(rename = "node", skip_serializing_if = "std::ops::Not::not")]
    pub is_node: bool,
    /// Its namespace; none: it is no pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The labels of the namespace, as far as they matter.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub namespace_labels: Labels,
    /// Its labels, as far as they matter: all others are absent.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: Labels,
    /// Its address.
    pub address: IpAddr,
}

/// A flow that contradicts a statement.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Counterexample {
    /// Who connects.
    pub from: Actor,
    /// To whom.
    pub to: Actor,
    /// `TCP`, `UDP`, `SCTP` or `ICMP`.
    pub protocol: String,
    /// The port; 0 without.
    pub port: u16,
    /// What the destination calls that port, where it matters.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub port_names: Vec<String>,
    /// Who decides, at both ends.
    pub decision: Decision,
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |labels: &Labels| {
            let mut parts: Vec<String> = Vec::new();
            parts.extend(labels.iter().map(|(key, value)| format!("{key}={value}")));
            parts.join(",")
        };
        let Some(namespace) = &self.namespace else {
            return match (self.is_node, self.labels.is_empty()) {
                (false, _) => write!(f, "{}, which is outside", self.address),
                (true, true) => write!(f, "{}, a node", self.address),
                (true, false) => write!(f, "{}, a node with {}", self.address, list(&self.labels)),
            };
        };
        match self.labels.is_empty() {
            true => f.write_str("a pod without labels")?,
            false => write!(f, "a pod with {}", list(&self.labels))?,
        }
        write!(f, " in namespace {namespace}")?;
        let mut others = self.namespace_labels.clone();
        others.remove(NAME_LABEL);
        if !others.is_empty() {
            write!(f, " ({})", list(&others))?;
        }
        write!(f, " at {}", self.address)
    }
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "from  {}", self.from)?;
        writeln!(f, "to    {}", self.to)?;
        match self.protocol.as_str() {
            "ICMP" => write!(f, "on    ICMP")?,
            protocol => write!(f, "on    {protocol} {}", self.port)?,
        }
        if !self.port_names.is_empty() {
            write!(f, ", which it calls {}", self.port_names.join(", "))?;
        }
        for line in self.decision.to_string().lines() {
            write!(f, "\n      {line}")?;
        }
        Ok(())
    }
}

/// Makes a solution concrete and has the evaluator judge it.
pub(super) fn realize(
    universe: &Universe,
    statement: &Statement,
    case: &Case<'_>,
    domains: &Domains,
) -> Result<Counterexample, Unanswered> {
    let lost = |what: &str| Unanswered::Disagreement(format!("{what} of a solution is empty"));
    let (protocol, port) =
        domains.get(PORT).and_then(|numbers| Ports(numbers.clone()).sample()).ok_or_else(|| lost("the port"))?;
    let addresses = addresses(case, domains).ok_or_else(|| lost("an address"))?;
    let names: Vec<String> = case
        .vocabulary
        .names
        .iter()
        .enumerate()
        .filter(|(index, (_, of))| {
            let domain = domains.get(case.port_names() + index);
            protocol == RowProtocol::Ports(*of) && domain.is_some_and(|domain| !domain.has(0))
        })
        .map(|(_, (name, _))| name.clone())
        .collect();
    let [from, to] = [0, 1].map(|which| actor(case, domains, which, addresses));
    let decision = judge(universe, [&from, &to], protocol, port, &names, statement.claim);
    let found = Counterexample {
        protocol: match protocol {
            RowProtocol::Ports(protocol) => protocol.to_string(),
            RowProtocol::Other => "ICMP".to_owned(),
        },
        port,
        port_names: names,
        decision,
        from,
        to,
    };
    check(statement, &found, protocol)?;
    Ok(found)
}

/// An address each, two where both are pods.
fn addresses(case: &Case<'_>, domains: &Domains) -> Option<[IpAddr; 2]> {
    let usual = |range: &Ranges| {
        // The first address of a prefix is usually nobody's: take the next where there is one.
        let some = range.some(4);
        some.iter().copied().find(|n| n % 256 != 0).or_else(|| some.first().copied())
    };
    let own = |which: usize| domains.get(Case::address_of(which));
    let first = usual(own(0)?)?;
    let distinct = own(1)?.without(&Ranges::one(first));
    match (usual(&distinct), case.ends) {
        (Some(second), _) => Some([address(first), address(second)]),
        // The other end has only this address: let the first have another.
        (None, _) => {
            let second = own(1)?.first()?;
            Some([address(usual(&own(0)?.without(&Ranges::one(second)))?), address(second)])
        }
    }
}

fn actor(case: &Case<'_>, domains: &Domains, which: usize, addresses: [IpAddr; 2]) -> Actor {
    let address = match which {
        0 => addresses[0],
        _ => addresses[1],
    };
    let chosen = |base: usize, keys: &super::vocabulary::Keys| -> Labels {
        let of = |index: usize| keys.choose(index, domains.get(base + index)?);
        (0..keys.len()).filter_map(of).collect()
    };
    let end = if which == 0 { case.ends[0] } else { case.ends[1] };
    match end {
        End::Outside => {
            // Nobody says it must be one: then it is none.
            let is_node = domains.get(case.is_node(which)).is_some_and(|domain| !domain.has(0));
            let labels = if is_node { chosen(case.node_labels(which), &case.vocabulary.nodes) } else { Labels::new() };
            Actor { is_node, namespace: None, namespace_labels: Labels::new(), labels, address }
        }
        End::Pod(space) => {
            let mut namespace_labels = match &space.labels {
                Some(labels) => labels.clone(),
                None => chosen(case.namespace_labels(which), &case.vocabulary.namespaces),
            };
            if space.labels.is_none() {
                namespace_labels.insert(NAME_LABEL.to_owned(), space.name.clone());
            }
            Actor {
                is_node: false,
                namespace: Some(space.name.clone()),
                namespace_labels,
                labels: chosen(case.pod_labels(which), &case.vocabulary.pods),
                address,
            }
        }
    }
}

/// What the evaluator says, in a world of these two (no pod is on one of them that is a node) and the policies.
pub(super) fn judge(
    universe: &Universe,
    ends: [&Actor; 2],
    protocol: RowProtocol,
    port: u16,
    names: &[String],
    claim: Claim,
) -> Decision {
    let mut world = World {
        policies: universe.world.policies.clone(),
        cluster_policies: universe.world.cluster_policies.clone(),
        ..World::default()
    };
    for (which, actor) in ends.into_iter().enumerate() {
        if actor.is_node {
            let node = node(if which == 0 { "source" } else { "destination" }, actor);
            world.nodes.insert(node.name.clone(), node);
        }
        let Some(namespace) = &actor.namespace else { continue };
        let labels = actor.namespace_labels.clone();
        world.namespaces.insert(
            namespace.clone(),
            Namespace {
                name: namespace.clone(),
                labels,
                socket_services: SocketServices::default(),
                pods_choose: false,
                terminating: false,
            },
        );
        let named_ports = match (protocol, which) {
            (RowProtocol::Ports(protocol), 1) => {
                names.iter().map(|name| NamedPort { name: name.clone(), protocol, number: port }).collect()
            }
            _ => Vec::new(),
        };
        let name = NamespacedName::new(namespace, if which == 0 { "source" } else { "destination" });
        world.pods.insert(name.clone(), pod(name, actor, named_ports));
    }
    // What is to stay closed must be closed whatever DNS says, and what is to be open must not need it.
    let learned = match claim {
        Claim::Nothing => said_by_all_names(&world, ends[1].address),
        Claim::Everything => Learned::default(),
    };
    let view = View { names: &learned, ..View::of(&world) };
    evaluate(&view, &Flow::new(ends[0].address, ends[1].address, protocol, port))
}

/// As if every domain name of every policy stood for an address.
fn said_by_all_names(world: &World, address: IpAddr) -> Learned {
    let mut learned = Learned::new(Limits::default());
    for pattern in world.cluster_policies.values().flat_map(|policy| policy.domain_names()) {
        let name = if pattern.below { format!("any.{}", pattern.name) } else { pattern.name.clone() };
        learned.learn(&name, [address], Duration::ZERO, std::slice::from_ref(pattern));
    }
    learned
}

fn node(name: &str, actor: &Actor) -> Node {
    Node {
        name: NodeName::new(name),
        labels: actor.labels.clone(),
        internal_ips: vec![actor.address],
        other_ips: Vec::new(),
        created: 0,
        pod_cidrs: Vec::new(),
        ready: true,
        added: Default::default(),
        flannel: None,
    }
}

fn pod(name: NamespacedName, actor: &Actor, named_ports: Vec<NamedPort>) -> Pod {
    Pod {
        name,
        uid: Default::default(),
        labels: actor.labels.clone().into(),
        daemon_set: None,
        node: None,
        ips: vec![actor.address].into(),
        named_ports: named_ports.into(),
        host_ports: Default::default(),
        host_network: false,
        phase: Phase::Running,
        terminating: false,
        ready: true,
        socket_services: SocketServices::default(),
        chosen: None,
        bandwidth: None,
    }
}

/// That it is a flow of the statement and that its verdict is not what the statement says.
fn check(statement: &Statement, found: &Counterexample, protocol: RowProtocol) -> Result<(), Unanswered> {
    let peer = |actor: &'_ Actor| Peer {
        is_node: actor.is_node,
        namespace: actor.namespace.clone(),
        namespace_labels: actor.namespace_labels.clone(),
        labels: actor.labels.clone(),
        address: actor.address,
    };
    let (from, to) = (peer(&found.from), peer(&found.to));
    let named: Vec<(&str, RowProtocol)> = found.port_names.iter().map(|name| (name.as_str(), protocol)).collect();
    let on = |ports| holds_ports(ports, protocol, found.port, &named);
    let spoken = holds(&statement.from, &from) && holds(&statement.to, &to) && on(&statement.ports);
    let excepted = statement.but.iter().any(|but| {
        but.from.as_ref().is_none_or(|set| holds(set, &from))
            && but.to.as_ref().is_none_or(|set| holds(set, &to))
            && on(&but.ports)
    });
    let wrong = match statement.claim {
        Claim::Nothing => Verdict::Allow,
        Claim::Everything => Verdict::Deny,
    };
    if spoken && !excepted && found.decision.verdict == wrong {
        return Ok(());
    }
    Err(Unanswered::Disagreement(found.to_string()))
}
