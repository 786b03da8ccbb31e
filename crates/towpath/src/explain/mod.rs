//! `towpath explain FROM TO PORT`: the way a packet takes and who decides over it.
//!
//! Pure but for [`run`]: [`explain()`] answers from a [`World`], with the same planner and the same evaluator that the agent and
//! the tests use.

#[cfg(test)]
mod config_tests;
mod path;
mod show;
#[cfg(test)]
mod tests;
mod who;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use serde::{Serialize, Serializer};
use towpath_model::desired::{
    Algorithm, BackendAddress, Clients, Frontend, FrontendTarget, PolicyRef, RowProtocol, Verdict,
};
use towpath_model::{
    ClusterNetworkPolicy, DomainName, NamespacedName, NodeName, Protocol, SOCKET_SERVICES_ANNOTATION, Service,
    SocketServices, TrafficPolicy, World, family_of,
};
use towpath_plan::modes::Proxy;
use towpath_plan::services::{OwnPods, Planner, host_port_of};
use towpath_plan::{Changed, ChangedPods, socket_services};
use towpath_policy::names::{Learned, Limits};
use towpath_policy::{Decision, Evaluator, Flow, Holder, Side, View};
use towpath_wire::names::LearnedName;

pub(crate) use who::{PortSpec, Target};

use crate::configured::{Configured, Found};
use crate::kubernetes;
use crate::place::Where;
use path::Entry;

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

/// What is at one end of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EndKind {
    /// A pod of the pod network.
    Pod(NamespacedName),
    /// A node.
    Node(NodeName),
    /// What listens on the loopback of this node.
    Loopback(NodeName),
    /// The server of DNS that every node has.
    OwnDns,
    /// A Service, at an address of its own.
    Service(NamespacedName),
    /// An address in a range of Services that no Service has.
    NoService,
    /// Anybody else.
    Outside,
}

impl fmt::Display for EndKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(name) => write!(f, "pod {name}"),
            Self::Node(name) => write!(f, "node {name}"),
            Self::Loopback(node) => write!(f, "loopback of node {node}"),
            Self::OwnDns => f.write_str("the node's own DNS"),
            Self::Service(name) => write!(f, "Service {name}"),
            Self::NoService => f.write_str("an address for Services that none has"),
            Self::Outside => f.write_str("outside the cluster"),
        }
    }
}

impl Serialize for EndKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One end of a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct End {
    /// What is there; in JSON as in words: `pod default/web`, `node n1`, `Service default/web`, `outside the cluster` …
    pub(crate) what: EndKind,
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
    /// Where the translation happens, and by whom if that is not Towpath.
    pub(crate) place: String,
    #[serde(skip)]
    by: Proxy,
    /// Endpoints that take new connections.
    pub(crate) backends: Vec<String>,
    /// How one of them is chosen; none: that is not Towpath's to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) algorithm: Option<Algorithm>,
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
    /// What is assumed, because it is not known here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) notes: Vec<String>,
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

/// What an answer depends on besides the world.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    configured: Configured,
    /// What domain names stand for on the node of the sender.
    names: Learned,
    /// Why that is not known, for people.
    no_names: Option<String>,
}

/// Asks the API server, prints the answer. The exit code is 0 when the answer is `allow`, 1 when it is not.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    let client = kubernetes::client(options.kubeconfig.as_deref()).await?;
    let world = kubernetes::world(&client).await?;
    let namespace = options.namespace.clone().unwrap_or_else(|| kubernetes::default_namespace(&client));
    let from = who::parse(&world, &namespace, &options.from)?;
    let to = who::parse(&world, &namespace, &options.to)?;
    let place = Where { kubeconfig: options.kubeconfig.clone(), lab: None, output: options.output };
    let mut facts = Facts::of(&world, &Found::ask(&client, place.named_lab()?.as_ref()).await)?;
    if let Some(node) = asks_for_names(&world, &from) {
        facts.ask_for_names(&place, &node).await;
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
pub(crate) fn in_words(world: &World, found: &Found, namespace: &str, [from, to, port]: [&str; 3]) -> Result<String> {
    let (from, to) = (who::parse(world, namespace, from)?, who::parse(world, namespace, to)?);
    Ok(explain(world, &Facts::of(world, found)?, &from, &to, parse_port(port)?)?.to_string())
}

/// The node of a sender that domain names of policies may concern.
fn asks_for_names(world: &World, from: &Target) -> Option<String> {
    let named = world.cluster_policies.values().any(ClusterNetworkPolicy::has_domain_names);
    let pods = world.pods.values().filter(|pod| pod.on_pod_network());
    let pod = pods.filter(|_| named).find(|pod| pod.ips.iter().any(|ip| from.addresses().contains(ip)))?;
    pod.node.as_ref().map(ToString::to_string)
}

impl Facts {
    /// What agents go by, and of domain names nothing yet.
    ///
    /// # Errors
    /// As [`Configured::of`].
    fn of(world: &World, found: &Found) -> Result<Self> {
        Ok(Self { configured: Configured::of(world, found)?, names: Learned::default(), no_names: None })
    }

    /// Asks a node's agent what domain names stand for there.
    async fn ask_for_names(&mut self, place: &Where, node: &str) {
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
    let view = View { world, dns: facts.configured.own_dns(), pod_ips: &no_pod_ips, names: &facts.names };
    let as_if_enforced = Evaluator::as_if_enforced(&view);
    let case = Case { world, evaluator: Evaluator::new(&view), as_if_enforced, facts };
    let (source, destination) = who::pair(from, to)?;
    let from = case.end(source);
    let to = match &from.node {
        _ if !destination.is_loopback() => case.end(destination),
        Some(node) if matches!(from.what, EndKind::Node(_)) => {
            End { what: EndKind::Loopback(NodeName::new(node.as_str())), address: destination, node: from.node.clone() }
        }
        _ => bail!("{destination} is its own for every host and pod: ask from node/NAME for what a node has there"),
    };
    let (service, destinations, refused) = case.translate(facts, &from, destination, port);
    // An outside client's packets enter where the Service is translated: at the node that it addressed.
    let entry = match (&service, &from.node) {
        (Some(service), None) => Entry::Uplink(to.node.as_deref(), service.by),
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
    let mut notes = facts.configured.notes().to_vec();
    if matches!(entry, Entry::Uplink(_, Proxy::KubeProxy)) {
        notes.push(CLIENT_HIDDEN.to_owned());
    }
    Ok(Explanation { from, to, protocol: port.to_string(), service, names, notes, ways, outcome })
}

type Translated = (Option<Translation>, Vec<(IpAddr, u16)>, Option<Outcome>);

impl Case<'_> {
    fn end(&self, address: IpAddr) -> End {
        let (what, node) = match self.evaluator.holder(address) {
            Some(Holder::Pod(pod)) => (EndKind::Pod(pod.name.clone()), pod.node.as_ref().map(ToString::to_string)),
            Some(Holder::Node(name)) => (EndKind::Node(name.clone()), Some(name.to_string())),
            Some(Holder::Dns) => (EndKind::OwnDns, None),
            Some(Holder::UnknownPod(name)) => (EndKind::Pod(name.clone()), None),
            None => match self.world.services.values().find(|s| s.cluster_ips.contains(&address)) {
                Some(service) => (EndKind::Service(service.name.clone()), None),
                None if self.is_for_services(address) => (EndKind::NoService, None),
                None => (EndKind::Outside, None),
            },
        };
        End { what, address, node }
    }

    fn is_for_services(&self, address: IpAddr) -> bool {
        self.facts.configured.services().service_cidrs.iter().any(|range| range.contains(&address))
    }

    fn translate(&self, facts: &Facts, from: &End, to: IpAddr, port: PortSpec) -> Translated {
        let by_node = self.world.nodes.values().find(|n| n.internal_ips.contains(&to));
        let is_service = matches!(self.end(to).what, EndKind::Service(_) | EndKind::NoService)
            || self.world.services.values().any(|service| is_for_all(service, to, facts));
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
        let answers = by_node.is_some() && facts.configured.services().node_port_addresses.has(to, true);
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
        let by =
            if own_clients && matches!(from.what, EndKind::Pod(_)) { Proxy::Towpath } else { self.by(target, &place) };
        let place = match (own_clients, by) {
            (true, Proxy::Towpath) => format!("on node {place}, {}", self.moment(from)),
            (true, _) => format!("on node {place}"),
            (false, _) if by_node.is_some() => format!("on node {place}, at the uplink"),
            (false, _) => format!("on the node that the address leads to (here {place}), at the uplink"),
        };
        let translation = Translation {
            service: target.service.clone(),
            binding: host_port_of(target).map(str::to_owned),
            frontend: show::address_port(to, number),
            place: place + by_whom(by),
            by,
            backends: backends.iter().map(|b| show::address_port(b.address, b.port)).collect(),
            algorithm: (by == Proxy::Towpath).then_some(target.algorithm),
            sources: target.sources.as_ref().map(|ranges| ranges.iter().map(ToString::to_string).collect()),
        };
        if target.sources.as_ref().is_some_and(|ranges| !ranges.iter().any(|range| range.contains(&from.address))) {
            return (Some(translation), Vec::new(), Some(Outcome::NotForClient));
        }
        let refused = backends.is_empty().then_some(Outcome::Refused);
        (Some(translation), backends.iter().map(|b| (b.address, b.port)).collect(), refused)
    }

    /// Who translates, on a node, what anybody but its pods sends to a target.
    fn by(&self, target: &FrontendTarget, node: &NodeName) -> Proxy {
        match target.clients {
            Clients::All => Proxy::Towpath,
            Clients::Pods => self.facts.configured.in_charge(node).map_or(Proxy::Towpath, |in_charge| in_charge.proxy),
        }
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
        let mut planner = Planner::new(facts.configured.services_on(node));
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
        let end = if self.facts.configured.own_dns().contains(&to) {
            End { what: EndKind::OwnDns, address: to, node: from.node.clone() }
        } else {
            self.end(to)
        };
        let path = path::hops(self.world, &self.facts.configured, from, entry, &end);
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

/// Who translates, where it is not Towpath.
fn by_whom(by: Proxy) -> &'static str {
    match by {
        Proxy::Towpath => "",
        Proxy::KubeProxy => ", by kube-proxy",
        Proxy::Others => ", by whoever serves Services there (serviceProxy: off)",
    }
}

/// Whether the outside knows a Service by this address.
fn is_for_all(service: &Service, address: IpAddr, facts: &Facts) -> bool {
    let allowed = || facts.configured.services().external_cidrs.iter().any(|range| range.contains(&address));
    service.load_balancer_ips.contains(&address) || (service.external_ips.contains(&address) && allowed())
}

/// What kube-proxy does where it is in charge, and what follows from it for policies.
const CLIENT_HIDDEN: &str = "kube-proxy gives clients outside a source of its node's own unless externalTrafficPolicy is Local: policies judge that one then, \
                             not the client's as they do below";

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
