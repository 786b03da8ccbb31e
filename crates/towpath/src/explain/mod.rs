//! `towpath explain FROM TO PORT`: the way a packet takes and who decides over it.
//!
//! Pure but for [`run`]: [`explain()`] answers from a [`World`], with the same planner and the same evaluator that the agent and
//! the tests use.

mod show;
#[cfg(test)]
mod tests;
mod who;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use serde::Serialize;
use towpath_model::custom::NetworkConfigSpec;
use towpath_model::desired::{Algorithm, BackendAddress, Frontend, PolicyRef, Reach, RowProtocol, Verdict};
use towpath_model::{
    ClusterNetworkPolicy, DomainName, NamespacedName, NodeName, NodePortAddresses, Protocol,
    SOCKET_SERVICES_ANNOTATION, Service, SocketServices, TrafficPolicy, World, family_of,
};
use towpath_plan::backend::{self, Able, Says};
use towpath_plan::services::{OwnPods, Planner, ServiceConfig, host_port_of};
use towpath_plan::{Changed, ChangedPods, modes, socket_services};
use towpath_policy::names::{Learned, Limits};
use towpath_policy::{Decision, Evaluator, Flow, Holder, Side, View};
use towpath_wire::config::AgentConfig;
use towpath_wire::names::LearnedName;

pub(crate) use who::{PortSpec, Target};

use crate::kubernetes;
use crate::place::Where;

/// Options of `towpath explain`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Who sends: pod/NAME, node/NAME, NAMESPACE/pod/NAME or an address.
    from: String,
    /// To whom: pod/NAME, svc/NAME, node/NAME, NAMESPACE/svc/NAME or an address.
    to: String,
    /// Where: 80, 53/udp, 9/sctp, or icmp.
    port: PortSpec,
    /// Namespace of names that have none.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Kubeconfig; else KUBECONFIG and the usual places.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// text or json.
    #[arg(short, long, value_enum, default_value = "text")]
    output: crate::Output,
}

/// One end of a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct End {
    /// `pod default/web`, `node n1`, `Service default/web` or `outside`.
    pub(crate) what: String,
    /// Its address.
    pub(crate) address: IpAddr,
    /// The node it is on.
    pub(crate) node: Option<String>,
}

/// What a Service makes of the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Translation {
    /// The Service; with `binding`: the pod.
    pub(crate) service: NamespacedName,
    /// The host port, where it is one and no Service's (`hostPort 8088 on 192.0.2.1`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) binding: Option<String>,
    /// What the sender connects to.
    pub(crate) frontend: String,
    /// Where the translation happens.
    pub(crate) place: String,
    /// Endpoints that take new connections.
    pub(crate) backends: Vec<String>,
    /// How one of them is chosen.
    pub(crate) algorithm: Algorithm,
    /// `loadBalancerSourceRanges`, where the address is a load balancer's; none: it is for everybody.
    pub(crate) sources: Option<Vec<String>>,
}

/// One way the packet may take: one destination after translation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Way {
    /// The destination.
    pub(crate) to: End,
    /// Its port; 0 for protocols without.
    pub(crate) port: u16,
    /// Hop by hop.
    pub(crate) path: Vec<String>,
    /// Who decides, at both ends.
    pub(crate) decision: Decision,
    /// Where it would be decided otherwise if the policies that are only audited were enforced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) if_enforced: Option<IfEnforced>,
}

/// What policies that are only audited would make of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct IfEnforced {
    /// The decision then.
    pub(crate) decision: Decision,
    /// Which of them would have a part in it.
    pub(crate) policies: Vec<String>,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Explanation {
    /// Who sends.
    pub(crate) from: End,
    /// To whom, as asked.
    pub(crate) to: End,
    /// `TCP 80`, `ICMP` …
    pub(crate) protocol: String,
    /// The Service in between.
    pub(crate) service: Option<Translation>,
    /// Domain names of policies that the destination goes by, or why they are not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) names: Option<String>,
    /// The ways; several when a Service has several endpoints.
    pub(crate) ways: Vec<Way>,
    /// `allow`, `deny`, or `depends` when ways differ; `refused` when a Service has no endpoint or no such port.
    pub(crate) outcome: Outcome,
}

/// The answer in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    /// Every way is allowed.
    Allow,
    /// No way is.
    Deny,
    /// Some ways are.
    Depends,
    /// The connection is refused at once.
    Refused,
    /// A Service address does not answer this protocol.
    NoReply,
    /// The Service is not for this client.
    NotForClient,
}

/// Facts that are not in the API.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    dns: Vec<IpAddr>,
    services: ServiceConfig,
    /// What domain names stand for on the node of the sender.
    names: Learned,
    /// Why that is not known, for people.
    no_names: Option<String>,
    /// What nodes say of their backends; none: that is not known.
    backends: Option<BTreeMap<NodeName, Says>>,
}

impl Default for Facts {
    fn default() -> Self {
        let config = AgentConfig::default();
        Self {
            services: ServiceConfig {
                node_ports: config.node_ports,
                cluster_dns: config.cluster_dns,
                dns_addresses: config.dns_addresses.clone(),
                ..ServiceConfig::default()
            },
            dns: config.dns_addresses,
            names: Learned::default(),
            no_names: None,
            backends: None,
        }
    }
}

impl Facts {
    /// What the cluster's own objects say of its DNS address, and `network` of external addresses.
    pub(crate) fn of(world: &World, network: Option<&NetworkConfigSpec>) -> Self {
        let mut facts = Self::default();
        let external = network.and_then(|spec| spec.external_cidrs.as_ref()).into_iter().flatten();
        facts.services.external_cidrs = external.filter_map(|range| range.parse().ok()).collect();
        let node_ports = network.and_then(|spec| spec.node_port_addresses.as_ref());
        if let Some(Ok(chosen)) = node_ports.map(|list| NodePortAddresses::parse(list)) {
            facts.services.node_port_addresses = chosen;
        }
        // With servers behind it, it is a Service like any other.
        if modes::core_dns(world, &facts.dns).endpoints == 0 {
            facts.services.cluster_dns = modes::dns_addresses(world, &facts.services.cluster_dns).0;
        }
        facts
    }

    /// How pods' packets go from one node to another, in words.
    fn way(&self, from: &NodeName, to: &NodeName) -> &'static str {
        let Some(backends) = &self.backends else { return "by the backend in force, which is not known here," };
        let sends = backends.get(from).and_then(|says| says.sends).unwrap_or_default();
        // Who sends so is able to.
        let able = Able { ipip: true, udp: true, macs: true };
        match backend::instead(sends, able, backends).get(to) {
            Some(Reach::Route) => "as it is (host-gw; VXLAN where a router lies between)",
            Some(Reach::Link) => {
                "as it is, between the pods' own MAC addresses (macvlan; VXLAN where a router lies between)"
            }
            Some(Reach::Ipip) => "in an IP header (ipip)",
            Some(Reach::Udp) => "in a UDP datagram (udp)",
            Some(Reach::Tunnel | Reach::TunnelTo(_)) | None => "VXLAN",
        }
    }
}

/// Asks the API server, prints the answer. The exit code is 0 when the answer is `allow`, 1 when it is not.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    let client = kubernetes::client(options.kubeconfig.as_deref()).await?;
    let world = kubernetes::world(&client).await?;
    let namespace = options.namespace.clone().unwrap_or_else(|| kubernetes::default_namespace(&client));
    let from = who::parse(&world, &namespace, &options.from)?;
    let to = who::parse(&world, &namespace, &options.to)?;
    let mut facts = Facts::of(&world, kubernetes::network(&client).await.as_ref());
    facts.backends = kubernetes::backends(&client).await;
    if let Some(node) = asks_for_names(&world, &from) {
        facts.ask_for_names(options, &node).await;
    }
    let explanation = explain(&world, &facts, &from, &to, options.port)?;
    match options.output {
        crate::Output::Json => crate::print_json(&explanation)?,
        crate::Output::Text => crate::print(&explanation.to_string())?,
    }
    Ok(explanation.outcome == Outcome::Allow)
}

/// The answer in words, of ends and a port as they are written on the command line.
///
/// # Errors
/// As [`explain()`], or an end that is not there.
pub(crate) fn in_words(world: &World, namespace: &str, from: &str, to: &str, port: &str) -> Result<String> {
    let (from, to) = (who::parse(world, namespace, from)?, who::parse(world, namespace, to)?);
    Ok(explain(world, &Facts::of(world, None), &from, &to, parse_port(port)?)?.to_string())
}

impl Facts {
    /// What a planner is told.
    pub(crate) fn services(self) -> ServiceConfig {
        self.services
    }
}

/// The node of a sender that domain names of policies may concern.
fn asks_for_names(world: &World, from: &Target) -> Option<String> {
    let named = world.cluster_policies.values().any(ClusterNetworkPolicy::has_domain_names);
    let pods = world.pods.values().filter(|pod| pod.on_pod_network());
    let pod = pods.filter(|_| named).find(|pod| pod.ips.iter().any(|ip| from.addresses().contains(ip)))?;
    pod.node.as_ref().map(ToString::to_string)
}

impl Facts {
    /// Asks a node's agent what domain names stand for there.
    async fn ask_for_names(&mut self, options: &Options, node: &str) {
        let place = Where { kubeconfig: options.kubeconfig.clone(), lab: None, output: options.output };
        let said = match place.cluster().await {
            Ok(cluster) => crate::dns::of_node(&cluster, node).await,
            Err(error) => Err(error),
        };
        match said {
            Ok(said) => {
                let asked: Vec<DomainName> = said.asked.iter().filter_map(|text| DomainName::parse(text)).collect();
                self.names = Learned::new(Limits::default());
                for LearnedName { name, addresses } in said.names {
                    self.names.learn(&name, addresses.iter().map(|one| one.address), Duration::MAX, &asked);
                }
            }
            Err(error) => {
                self.no_names = Some(format!("what domainNames stand for on node {node} is not known: {error:#}"))
            }
        }
    }

    /// What is to be said of domain names, for an address that somebody sends to.
    fn said_of(&self, address: IpAddr) -> Option<String> {
        let mut names: Vec<&str> = self.names.iter().filter(|p| p.address == address).map(|p| p.name).collect();
        names.sort_unstable();
        let named = (!names.is_empty()).then(|| format!("by what DNS said there, {address} is {}", names.join(", ")));
        named.or_else(|| self.no_names.clone())
    }
}

struct Case<'a> {
    world: &'a World,
    evaluator: Evaluator<'a>,
    /// Only if there are policies that are only audited.
    as_if_enforced: Option<Evaluator<'a>>,
    facts: &'a Facts,
}

/// Answers from a world.
///
/// # Errors
/// An end has no address, or not in a family of the other.
pub(crate) fn explain(world: &World, facts: &Facts, from: &Target, to: &Target, port: PortSpec) -> Result<Explanation> {
    let no_pod_ips = BTreeMap::new();
    let view = View { world, dns: &facts.dns, pod_ips: &no_pod_ips, names: &facts.names };
    let as_if_enforced = Evaluator::as_if_enforced(&view);
    let case = Case { world, evaluator: Evaluator::new(&view), as_if_enforced, facts };
    let (source, destination) = who::pair(from, to)?;
    let from = case.end(source);
    let to = match &from.node {
        _ if !destination.is_loopback() => case.end(destination),
        Some(node) if from.what.starts_with("node ") => {
            End { what: format!("loopback of node {node}"), address: destination, node: from.node.clone() }
        }
        _ => bail!("{destination} is its own for every host and pod: ask from node/NAME for what a node has there"),
    };
    let (service, destinations, refused) = case.translate(facts, &from, destination, port);
    // An outside client's packets enter where the Service is translated: at the node that it addressed.
    let entry = match (&service, &from.node) {
        (Some(_), None) => Entry::Uplink(to.node.as_deref()),
        _ => Entry::None,
    };
    let way = |(ip, number): &(IpAddr, u16)| case.way(&from, entry, *ip, port, *number);
    let ways: Vec<Way> = destinations.iter().map(way).collect();
    let allowed = ways.iter().filter(|w| w.decision.verdict == Verdict::Allow).count();
    let outcome = match refused {
        Some(outcome) => outcome,
        None if allowed == ways.len() => Outcome::Allow,
        None if allowed == 0 => Outcome::Deny,
        None => Outcome::Depends,
    };
    let names = facts.said_of(destination);
    Ok(Explanation { from, to, protocol: port.to_string(), service, names, ways, outcome })
}

type Translated = (Option<Translation>, Vec<(IpAddr, u16)>, Option<Outcome>);

impl Case<'_> {
    fn end(&self, address: IpAddr) -> End {
        let (what, node) = match self.evaluator.holder(address) {
            Some(Holder::Pod(pod)) => (format!("pod {}", pod.name), pod.node.as_ref().map(ToString::to_string)),
            Some(Holder::Node(name)) => (format!("node {name}"), Some(name.to_string())),
            Some(Holder::Dns) => ("the node's own DNS".to_owned(), None),
            Some(Holder::UnknownPod(name)) => (format!("pod {name}"), None),
            None => match self.world.services.values().find(|s| s.cluster_ips.contains(&address)) {
                Some(service) => (format!("Service {}", service.name), None),
                None => ("outside the cluster".to_owned(), None),
            },
        };
        End { what, address, node }
    }

    fn translate(&self, facts: &Facts, from: &End, to: IpAddr, port: PortSpec) -> Translated {
        let by_node = self.world.nodes.values().find(|n| n.internal_ips.contains(&to));
        let is_service = self.world.services.values().any(|s| s.cluster_ips.contains(&to) || is_for_all(s, to, facts));
        let PortSpec::Port(protocol, number) = port else {
            let silent = is_service.then_some(Outcome::NoReply);
            return (None, if is_service { Vec::new() } else { vec![(to, 0)] }, silent);
        };
        // From inside, the sender's own node translates; from outside, the node that is addressed.
        let inside = from.node.clone().map(NodeName::new);
        let addressed = || by_node.map(|n| n.name.clone()).or_else(|| self.leads_to(to, facts));
        let Some(mut place) = inside.clone().or_else(addressed) else {
            return (None, vec![(to, number)], is_service.then_some(Outcome::NoReply));
        };
        let mut planner = self.planned_on(&place, facts);
        let family = family_of(to);
        let exact = Frontend { address: Some(to), family, port: number, protocol };
        let any_node = Frontend { address: None, ..exact };
        // What is sent to another node's NodePort that keeps to that node's endpoints is for that node to translate.
        let mut own_clients = inside.is_some();
        let table = planner.table();
        if let Some(other) = by_node.filter(|node| own_clients && node.name != place)
            && table.inside.contains_key(&any_node)
            && !table.frontends.contains_key(&exact)
        {
            (place, own_clients) = (other.name.clone(), false);
            planner = self.planned_on(&place, facts);
        }
        let table = planner.table();
        let answers = by_node.is_some() && facts.services.node_port_addresses.has(to, true);
        let at = |frontend: &Frontend| {
            let inside = table.inside.get(frontend).filter(|_| own_clients);
            inside.or_else(|| table.frontends.get(frontend))
        };
        let Some(target) = at(&exact).or_else(|| at(&any_node).filter(|_| answers)) else {
            let refused = is_service.then_some(Outcome::Refused);
            return (None, if is_service { Vec::new() } else { vec![(to, number)] }, refused);
        };
        let backends: Vec<BackendAddress> =
            target.backends.iter().filter_map(|id| table.backends.get(id)).copied().collect();
        let place = match by_node {
            _ if own_clients => format!("on node {place}, {}", self.moment(from)),
            Some(_) => format!("on node {place}, at the uplink"),
            None => format!("on the node that the address leads to (here {place}), at the uplink"),
        };
        let translation = Translation {
            service: target.service.clone(),
            binding: host_port_of(target).map(str::to_owned),
            frontend: show::address_port(to, number),
            place,
            backends: backends.iter().map(|b| show::address_port(b.address, b.port)).collect(),
            algorithm: target.algorithm,
            sources: target.sources.as_ref().map(|ranges| ranges.iter().map(ToString::to_string).collect()),
        };
        if target.sources.as_ref().is_some_and(|ranges| !ranges.iter().any(|range| range.contains(&from.address))) {
            return (Some(translation), Vec::new(), Some(Outcome::NotForClient));
        }
        let refused = backends.is_empty().then_some(Outcome::Refused);
        (Some(translation), backends.iter().map(|b| (b.address, b.port)).collect(), refused)
    }

    /// When what somebody inside sends is translated.
    fn moment(&self, from: &End) -> String {
        let Some(Holder::Pod(pod)) = self.evaluator.holder(from.address) else {
            return "when the socket connects".to_owned();
        };
        let of_namespace = socket_services::of_namespace(self.world, &pod.name.namespace);
        if pod.socket_services.translates(of_namespace) {
            return "when the socket connects".to_owned();
        }
        let who = match &pod.socket_services {
            SocketServices::Disabled => format!("pod {}", pod.name),
            _ => format!("namespace {}", pod.name.namespace),
        };
        format!("at the pod's device ({who} says {SOCKET_SERVICES_ANNOTATION}: {})", SocketServices::DISABLED)
    }

    fn planned_on(&self, node: &NodeName, facts: &Facts) -> Planner {
        let mut planner = Planner::new(facts.services.clone());
        planner.plan(self.world, node, Changed::All, Duration::ZERO);
        planner.plan_host_ports(self.world, ChangedPods::All, node, &OwnPods::new(), Duration::ZERO);
        planner
    }

    /// A node to which an address for everybody may lead: where the Service keeps to a node's own endpoints, one that has some.
    fn leads_to(&self, address: IpAddr, facts: &Facts) -> Option<NodeName> {
        let service = self.world.services.values().find(|s| is_for_all(s, address, facts))?;
        let ready = self
            .world
            .slices
            .of(&service.name)
            .flat_map(|slice| &slice.endpoints)
            .filter(|endpoint| endpoint.conditions.ready);
        let with_endpoint = ready.filter_map(|endpoint| endpoint.node.clone()).next();
        let any = || self.world.nodes.keys().next().cloned();
        with_endpoint.filter(|_| service.external_policy == TrafficPolicy::Local).or_else(any)
    }

    fn way(&self, from: &End, entry: Entry<'_>, to: IpAddr, port: PortSpec, number: u16) -> Way {
        let protocol = match port {
            PortSpec::Port(protocol, _) => RowProtocol::Ports(protocol),
            PortSpec::Icmp => RowProtocol::Other,
        };
        let end = if self.facts.dns.contains(&to) {
            End { what: "the node's own DNS".to_owned(), address: to, node: from.node.clone() }
        } else {
            self.end(to)
        };
        let path = path(self.facts, from, entry, &end);
        let flow = Flow::new(from.address, to, protocol, number);
        let decision = self.evaluator.evaluate(&flow);
        let if_enforced = self.if_enforced(&flow, &decision);
        Way { to: end, port: number, path, decision, if_enforced }
    }

    /// What would be decided if the policies that are only audited were enforced, if that is something else at either end.
    fn if_enforced(&self, flow: &Flow, now: &Decision) -> Option<IfEnforced> {
        let decision = self.as_if_enforced.as_ref()?.evaluate(flow);
        let verdicts = |decision: &Decision| {
            [&decision.egress, &decision.ingress].map(|side| side.as_ref().map(|side| side.verdict))
        };
        if verdicts(&decision) == verdicts(now) {
            return None;
        }
        let sides = [&decision.egress, &decision.ingress].into_iter().flatten();
        let mut policies: Vec<PolicyRef> =
            sides.flat_map(Side::policies).filter(|named| self.is_audited(named)).collect();
        policies.sort();
        policies.dedup();
        Some(IfEnforced { decision, policies: policies.iter().map(ToString::to_string).collect() })
    }

    fn is_audited(&self, policy: &PolicyRef) -> bool {
        match policy {
            PolicyRef::Namespaced(name) => {
                self.world.policies.get(name).is_some_and(|policy| policy.enforcement.is_audited())
            }
            PolicyRef::Cluster { name, .. } => {
                self.world.cluster_policies.get(name).is_some_and(|policy| policy.enforcement.is_audited())
            }
        }
    }
}

/// Whether the outside knows a Service by this address.
fn is_for_all(service: &Service, address: IpAddr, facts: &Facts) -> bool {
    let allowed = || facts.services.external_cidrs.iter().any(|range| range.contains(&address));
    service.load_balancer_ips.contains(&address) || (service.external_ips.contains(&address) && allowed())
}

/// What becomes of an outside client's source towards an endpoint that is no pod.
const SOURCE_TRANSLATED: &str = "translated to an address of the node and a port of 61000 to 65535";

/// Where an outside client's packets were translated.
#[derive(Clone, Copy)]
enum Entry<'a> {
    /// They were not, or it is no outside client.
    None,
    /// At the uplink of this node; none: of whatever node the address leads to.
    Uplink(Option<&'a str>),
}

impl Entry<'_> {
    /// In words.
    fn name(self) -> String {
        match self {
            Self::Uplink(Some(node)) => format!("node {node}"),
            Self::Uplink(None) | Self::None => "the node that the address leads to".to_owned(),
        }
    }
}

/// Hop by hop. (See `bpf/far.h` for endpoints that are no pods.)
fn path(facts: &Facts, from: &End, entry: Entry<'_>, to: &End) -> Vec<String> {
    let pod = |end: &End| end.what.starts_with("pod ");
    let mut path = vec![format!("{} ({})", from.what, from.address)];
    match (&from.node, &to.node) {
        (Some(a), Some(b)) if a == b => {
            let how = if pod(from) && pod(to) { "straight into the other pod" } else { "through the node's own stack" };
            path.push(format!("node {a}: {how}"));
        }
        (Some(a), Some(b)) => {
            let how = match (pod(from), pod(to)) {
                (true, true) => facts.way(&NodeName::new(a), &NodeName::new(b)),
                (false, false) => "the node's network",
                _ => "VXLAN",
            };
            path.push(format!("node {a}: {how} to node {b}"));
            path.push(format!("node {b}"));
        }
        (Some(a), None) => {
            let translated = if pod(from) { ", masqueraded as the node's address" } else { "" };
            path.push(format!("node {a}: the node's own routes{translated}"));
        }
        (None, Some(b)) => match entry {
            Entry::Uplink(Some(entry)) if entry == b => path.push(format!("node {b}: from its uplink")),
            Entry::Uplink(Some(entry)) if pod(to) => {
                path.push(format!("node {entry}: from its uplink, VXLAN to node {b} with the client's address kept"));
                path.push(format!("node {b}; the answer goes back the same way"));
            }
            Entry::Uplink(Some(entry)) => {
                path.push(format!(
                    "node {entry}: from its uplink, {SOURCE_TRANSLATED}, by the node's network to node {b}"
                ));
                path.push(format!("node {b}; the answer goes back the same way"));
            }
            Entry::Uplink(None) if !pod(to) => path.push(format!(
                "{}: from its uplink; unless that is node {b} itself, {SOURCE_TRANSLATED}",
                entry.name()
            )),
            Entry::Uplink(None) | Entry::None => path.push(format!("node {b}: from its uplink")),
        },
        (None, None) if matches!(entry, Entry::Uplink(_)) => path.push(format!(
            "{}: from its uplink, {SOURCE_TRANSLATED}, by the node's own routes; the answer goes back the same way",
            entry.name()
        )),
        (None, None) => path.push("neither end is in the cluster".to_owned()),
    }
    path.push(format!("{} ({})", to.what, to.address));
    path
}

/// What `PORT` may be on the command line.
pub(crate) fn parse_port(text: &str) -> Result<PortSpec> {
    let (number, protocol) = match text.split_once('/') {
        _ if text.eq_ignore_ascii_case("icmp") => return Ok(PortSpec::Icmp),
        Some((number, protocol)) => (number, protocol.to_ascii_uppercase()),
        None => (text, "TCP".to_owned()),
    };
    let Some(protocol) = Protocol::parse(Some(&protocol)) else {
        bail!("{text:?}: the protocol is tcp, udp or sctp, as in 53/udp; or icmp alone");
    };
    match number.parse() {
        Ok(number) if number > 0 => Ok(PortSpec::Port(protocol, number)),
        _ => bail!("{text:?}: the port is a number from 1 to 65535, as in 80 or 53/udp"),
    }
}
