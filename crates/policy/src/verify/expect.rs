//! Expectations of a policy's author, held against the pods that exist.
//!
//! `allow` holds if every one of `from` reaches every one of `to` on every one of the ports, in each address family that both have; `deny` if
//! nobody reaches anybody on any. What is not there is not denied: a name or a selector that means nobody is [`Unclear`].

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use serde::Serialize;
use towpath_model::desired::RowProtocol;
use towpath_model::{Direction, Family, family_of};

use super::addresses::Addresses;
use super::membership::{Peer, holds};
use super::ports::Ports;
use super::reach::{Matrix, families};
use super::rows::Names;
use super::universe::{Endpoint, Universe, Who};
use super::words::{Peers, Place, PortWords, Term, Within};
use crate::evaluate::{Decision, Evaluator, Flow};
use crate::view::View;

/// What should be so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expectation {
    /// That it passes, or that it does not.
    pub allow: bool,
    /// Who connects.
    pub from: Peers,
    /// To whom.
    pub to: Peers,
    /// On which ports.
    pub ports: PortWords,
}

/// Why an expectation cannot be checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unclear(pub String);

impl fmt::Display for Unclear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unclear {}

/// Two ends between which it is not as expected.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// Who connects.
    pub from: String,
    /// To whom.
    pub to: String,
    /// The ports that should be open and are not, or the other way round.
    pub ports: Ports,
    /// One flow of them.
    pub example: Example,
    /// Who decides over that flow.
    pub decision: Decision,
}

/// A flow, in words.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Example {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// `TCP 80`, `ICMP`.
    pub port: String,
}

/// What came of an expectation.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// How many pairs of ends were looked at.
    pub pairs: usize,
    /// Where it is not so, the first 20 of them; empty: it holds.
    pub failures: Vec<Failure>,
}

/// Failures that are told of one expectation: the first ones are enough to act on.
const TOLD: usize = 20;

/// A universe to hold expectations against.
pub struct Checker<'u> {
    universe: &'u Universe,
    matrix: Matrix,
    names: Names,
    evaluator: Evaluator<'u>,
}

struct Chosen {
    endpoints: BTreeSet<usize>,
    outside: Addresses,
}

impl<'u> Checker<'u> {
    /// Judges everything once.
    pub fn of(universe: &'u Universe) -> Self {
        Self {
            universe,
            matrix: Matrix::of(universe),
            names: Names::of(universe),
            evaluator: Evaluator::new(&View::of(&universe.world)),
        }
    }

    /// Checks an expectation.
    ///
    /// # Errors
    /// It speaks of somebody or of a port that is not there.
    pub fn check(&mut self, expectation: &Expectation) -> Result<Outcome, Unclear> {
        let (from, to) = (self.choose(&expectation.from, "from")?, self.choose(&expectation.to, "to")?);
        let mut outcome = Outcome { pairs: 0, failures: Vec::new() };
        for source in &from.endpoints {
            for target in &to.endpoints {
                self.pair(expectation, *source, *target, &mut outcome)?;
            }
            self.at_outside(expectation, *source, Direction::Egress, &to.outside, &mut outcome)?;
        }
        for target in &to.endpoints {
            self.at_outside(expectation, *target, Direction::Ingress, &from.outside, &mut outcome)?;
        }
        if outcome.pairs == 0 {
            return Err(Unclear(
                "no policy is between these: one end must be a pod, another pod than the other end, and of the same address family"
                    .to_owned(),
            ));
        }
        Ok(outcome)
    }

    fn pair(&mut self, wanted: &Expectation, from: usize, to: usize, outcome: &mut Outcome) -> Result<(), Unclear> {
        for family in families(self.universe, from, to) {
            let ports = self.ports(wanted, Some(to))?;
            outcome.pairs += 1;
            let wrong = wrong(wanted, &ports, &self.matrix.between(from, to, family));
            let ends = (self.address(from, family, false), self.address(to, family, from == to));
            if let (Some(sample), (Some(source), Some(target))) = (wrong.sample(), ends) {
                let names = (self.names.endpoint(from).to_owned(), self.names.endpoint(to).to_owned());
                self.fail(outcome, names, wrong, sample, (source, target));
            }
        }
        Ok(())
    }

    fn at_outside(
        &self,
        wanted: &Expectation,
        endpoint: usize,
        direction: Direction,
        outside: &Addresses,
        outcome: &mut Outcome,
    ) -> Result<(), Unclear> {
        let is_pod = self.endpoint(endpoint).is_some_and(|e| e.namespace().is_some());
        for family in [Family::V4, Family::V6].into_iter().filter(|_| is_pod) {
            let addresses = outside.and(&Addresses::of_family(family));
            let Some(own) = self.address(endpoint, family, false).filter(|_| !addresses.is_empty()) else { continue };
            outcome.pairs += 1;
            let ports = self.ports(wanted, (direction == Direction::Ingress).then_some(endpoint))?;
            let mut parts = self.matrix.outside(endpoint, direction);
            let open = Addresses::any_of(parts.iter().map(|(part, _)| part));
            parts.push((addresses.without(&open), Ports::none()));
            for (part, open) in parts {
                let part = part.and(&addresses);
                let wrong = wrong(wanted, &ports, &open);
                if let (Some(sample), Some(address)) = (wrong.sample(), part.sample()) {
                    let (name, other) = (self.names.endpoint(endpoint).to_owned(), self.names.outside(&part));
                    match direction {
                        Direction::Egress => self.fail(outcome, (name, other), wrong, sample, (own, address)),
                        Direction::Ingress => self.fail(outcome, (other, name), wrong, sample, (address, own)),
                    }
                }
            }
        }
        Ok(())
    }

    fn fail(
        &self,
        outcome: &mut Outcome,
        (from, to): (String, String),
        ports: Ports,
        (protocol, port): (RowProtocol, u16),
        (source, destination): (IpAddr, IpAddr),
    ) {
        if outcome.failures.len() >= TOLD {
            return;
        }
        let decision = self.evaluator.evaluate(&Flow::new(source, destination, protocol, port));
        let port = match protocol {
            RowProtocol::Ports(protocol) => format!("{protocol} {port}"),
            RowProtocol::Other => "ICMP".to_owned(),
        };
        let example = Example { source, destination, port };
        outcome.failures.push(Failure { from, to, ports, example, decision });
    }

    fn endpoint(&self, index: usize) -> Option<&'u Endpoint> {
        self.universe.endpoints.get(index)
    }

    /// An address of an endpoint; of another of its pods, if `another`.
    fn address(&self, index: usize, family: Family, another: bool) -> Option<IpAddr> {
        let endpoint = self.endpoint(index)?;
        if !another {
            return endpoint.address(family);
        }
        let pod = self.universe.world.pods.get(endpoint.pods.get(1)?)?;
        pod.ips.iter().copied().find(|ip| family_of(*ip) == family)
    }

    /// The ports of an expectation, names as the destination has them.
    fn ports(&self, wanted: &Expectation, to: Option<usize>) -> Result<Ports, Unclear> {
        let mut ports = wanted.ports.fixed.clone();
        for (name, protocol) in &wanted.ports.named {
            let endpoint = to.and_then(|to| self.endpoint(to));
            let number =
                endpoint.and_then(|e| e.named_ports.iter().find(|p| p.name == *name && p.protocol == *protocol));
            let Some(number) = number else {
                let whose = to.map_or("an address outside", |to| self.names.endpoint(to));
                return Err(Unclear(format!("port {name}: {whose} has no {protocol} port of that name")));
            };
            ports = ports.or(&Ports::of(*protocol, number.number, number.number));
        }
        Ok(ports)
    }

    fn choose(&self, peers: &Peers, end: &str) -> Result<Chosen, Unclear> {
        let mut chosen = Chosen { endpoints: BTreeSet::new(), outside: Addresses::default() };
        for term in &peers.0 {
            let mut more = Chosen { endpoints: BTreeSet::new(), outside: Addresses::default() };
            self.add(term, &mut more).map_err(|Unclear(why)| Unclear(format!("{end}: {why}")))?;
            if more.endpoints.is_empty() && more.outside.is_empty() {
                let what = describe(term);
                return Err(Unclear(format!("{end}: {what}: nobody here is that, so nothing would be checked")));
            }
            chosen.endpoints.extend(more.endpoints);
            chosen.outside = chosen.outside.or(&more.outside);
        }
        Ok(chosen)
    }

    fn add(&self, term: &Term, chosen: &mut Chosen) -> Result<(), Unclear> {
        match term {
            Term::Named { namespace, kind, name } => {
                chosen.endpoints.extend(self.named(namespace, kind.as_deref(), name)?);
                return Ok(());
            }
            Term::Node(wanted) => {
                let endpoints = self.universe.endpoints.iter().enumerate();
                let nodes = endpoints.filter(|(_, e)| match (&e.who, wanted) {
                    (Who::Node(name, _), Some(wanted)) => name == wanted,
                    (Who::Node(..), None) => true,
                    (Who::Workload(..), _) => false,
                });
                let found: Vec<usize> = nodes.map(|(index, _)| index).collect();
                if found.is_empty() {
                    let which = wanted.as_deref().map_or_else(|| "nodes".to_owned(), |name| format!("node {name}"));
                    return Err(Unclear(format!("there is no {which} here")));
                }
                chosen.endpoints.extend(found);
                return Ok(());
            }
            Term::Anything | Term::Outside | Term::NotIn(_) => {
                chosen.outside = self.universe.outside.clone();
            }
            Term::Addresses(net) => {
                chosen.outside = Addresses::of(net).and(&self.universe.outside);
            }
            Term::Pods(..) => {}
        }
        let only = Peers(vec![term.clone()]);
        let world = &self.universe.world;
        for (index, endpoint) in self.universe.endpoints.iter().enumerate() {
            // Any of its pods stands for all of them: policy cannot tell them apart.
            let is_in = endpoint.pods.iter().filter_map(|name| world.pods.get(name)).any(|pod| {
                pod.ips.iter().any(|address| {
                    holds(
                        &only,
                        &Peer {
                            is_node: false,
                            namespace: Some(pod.name.namespace.clone()),
                            namespace_labels: world.namespace_labels(&pod.name.namespace),
                            labels: (*pod.labels).clone(),
                            address: *address,
                        },
                    )
                })
            });
            let by_address =
                matches!(term, Term::Addresses(net) if endpoint.addresses.iter().any(|ip| net.contains(ip)));
            if is_in || by_address {
                chosen.endpoints.insert(index);
            }
        }
        Ok(())
    }

    fn named(&self, namespace: &str, kind: Option<&str>, name: &str) -> Result<BTreeSet<usize>, Unclear> {
        let kind = kind.map(singular);
        let mut found = BTreeSet::new();
        let mut kinds = BTreeSet::new();
        for (index, endpoint) in self.universe.endpoints.iter().enumerate() {
            let Who::Workload(workload, _) = &endpoint.who else { continue };
            let by_name = workload.namespace == namespace
                && workload.name == name
                && kind.as_deref().is_none_or(|kind| kind == workload.kind);
            let is_pod = kind.as_deref().is_none_or(|kind| kind == "pod")
                && endpoint.pods.iter().any(|pod| pod.namespace == namespace && pod.name == name);
            if by_name {
                kinds.insert(workload.to_string());
            }
            if by_name || (is_pod && found.is_empty()) {
                found.insert(index);
            }
        }
        if kinds.len() > 1 {
            let list: Vec<String> = kinds.into_iter().collect();
            return Err(Unclear(format!("{namespace}/{name} could be {}: write one of them", list.join(" or "))));
        }
        if found.is_empty() {
            let is_host = |w: &&super::universe::Workload| w.namespace == namespace && w.name == name;
            if self.universe.on_nodes.iter().any(|workload| is_host(&workload)) {
                return Err(Unclear(format!(
                    "{namespace}/{name} is on its nodes' addresses (hostNetwork): NetworkPolicy does not apply to it"
                )));
            }
            return Err(Unclear(format!("there is no workload or pod {namespace}/{name}")));
        }
        Ok(found)
    }
}

/// The ports that are not as they should be.
fn wrong(wanted: &Expectation, ports: &Ports, open: &Ports) -> Ports {
    if wanted.allow { ports.without(open) } else { ports.and(open) }
}

/// `deployments`, `deploy` → `deployment`, as kubectl has it.
fn singular(kind: &str) -> String {
    match kind.to_ascii_lowercase().as_str() {
        "deploy" => "deployment",
        "sts" => "statefulset",
        "ds" => "daemonset",
        "rs" => "replicaset",
        "rc" => "replicationcontroller",
        "cj" => "cronjob",
        "po" => "pod",
        other => return other.strip_suffix('s').filter(|s| !s.is_empty()).unwrap_or(other).to_owned(),
    }
    .to_owned()
}

/// A term, as it could be written.
pub(super) fn describe(term: &Term) -> String {
    match term {
        Term::Pods(selector, within) => {
            let pods = if selector.is_everything() { "any pod".to_owned() } else { format!("pods {selector}") };
            match within {
                Within::Any => pods,
                Within::In(place) => format!("{pods} in {}", describe_place(place)),
                Within::NotIn(place) => format!("{pods} outside {}", describe_place(place)),
            }
        }
        Term::Addresses(net) => net.to_string(),
        Term::NotIn(place) => format!("outside {}", describe_place(place)),
        Term::Anything => "anything".to_owned(),
        Term::Outside => "outside".to_owned(),
        Term::Node(None) => "nodes".to_owned(),
        Term::Node(Some(name)) => format!("node/{name}"),
        Term::Named { namespace, kind: None, name } => format!("{namespace}/{name}"),
        Term::Named { namespace, kind: Some(kind), name } => format!("{namespace}/{kind}/{name}"),
    }
}

fn describe_place(place: &Place) -> String {
    match place {
        Place::Named(names) => format!("namespace {}", names.join(", ")),
        Place::Matching(selector) => format!("namespaces {selector}"),
    }
}
