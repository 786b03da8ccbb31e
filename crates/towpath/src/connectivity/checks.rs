//! What is tried, as a list: pure, from who is there to who asks whom for what and what must come of it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result};
use towpath_model::{Family, family_of};

use super::manifests::{PORT, Role, SERVICE_PORT};
use super::stage::NodeFacts;
use crate::probe::{Action, Ask, Endpoint, Expect, Size};

/// Bytes of the large transfers.
pub(super) const LARGE: u32 = 4 * 1024 * 1024;
/// Bytes of a datagram that cannot go in one packet of any usual MTU but loopback's.
pub(super) const FRAGMENTED: u32 = 16_000;
/// Milliseconds that what was just changed may take to be so everywhere.
const PATIENCE: u64 = 15_000;
/// Milliseconds of one attempt.
const ATTEMPT: u64 = 3_000;
/// Milliseconds of a large transfer.
const LARGE_ATTEMPT: u64 = 10_000;
/// Milliseconds after which nothing is taken for silence: longer than a retransmitted SYN (RFC 6298).
const SILENCE: u64 = 1_500;

/// Steps of the test; what policies are in force is different in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Phase {
    /// No policy.
    Open,
    /// Nobody may reach the guarded pod.
    Denied,
    /// The first client may.
    Allowed,
    /// Clients may reach the first server only.
    Egress,
    /// No policy again.
    Lifted,
}

impl Phase {
    /// In order.
    pub(super) const ALL: [Self; 5] = [Self::Open, Self::Denied, Self::Allowed, Self::Egress, Self::Lifted];
}

/// A pod of the test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Actor {
    /// Its name.
    pub(super) pod: String,
    /// Its node.
    pub(super) node: String,
    /// Its addresses; those of its node for pods on the node's network.
    pub(super) ips: Vec<IpAddr>,
}

impl Actor {
    fn ip(&self, family: Family) -> Option<IpAddr> {
        self.ips.iter().copied().find(|ip| family_of(*ip) == family)
    }
}

/// A Service as the API server made it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ServiceFacts {
    /// Its addresses; none when headless.
    pub(super) cluster_ips: Vec<IpAddr>,
    /// Node port of TCP.
    pub(super) tcp_node_port: Option<u16>,
    /// Node port of UDP.
    pub(super) udp_node_port: Option<u16>,
}

/// Everybody who is there.
#[derive(Clone, Debug)]
pub(super) struct Cast {
    pub(super) namespace: String,
    pub(super) nodes: Vec<NodeFacts>,
    pub(super) host_port: u16,
    pub(super) clients: Vec<Actor>,
    pub(super) servers: Vec<Actor>,
    pub(super) guarded: Vec<Actor>,
    pub(super) hosts: Vec<Actor>,
    pub(super) host_ports: Vec<Actor>,
    pub(super) services: BTreeMap<String, ServiceFacts>,
    /// Why there is no pod with a host port.
    pub(super) no_host_port: Option<String>,
}

impl Cast {
    /// Nobody yet.
    pub(super) fn new(namespace: &str, nodes: Vec<NodeFacts>, host_port: u16) -> Self {
        Self {
            namespace: namespace.to_owned(),
            nodes,
            host_port,
            clients: Vec::new(),
            servers: Vec::new(),
            guarded: Vec::new(),
            hosts: Vec::new(),
            host_ports: Vec::new(),
            services: BTreeMap::new(),
            no_host_port: None,
        }
    }

    /// One more.
    pub(super) fn add(&mut self, role: Role, actor: Actor) {
        match role {
            Role::Client => self.clients.push(actor),
            Role::Server => self.servers.push(actor),
            Role::Guarded => self.guarded.push(actor),
            Role::Host => self.hosts.push(actor),
            Role::HostPort => self.host_ports.push(actor),
        }
    }

    /// Families that pods have.
    fn families(&self) -> Vec<Family> {
        let has = |family: &Family| self.clients.iter().chain(&self.servers).all(|a| a.ip(*family).is_some());
        [Family::V4, Family::V6].into_iter().filter(has).collect()
    }

    fn service(&self, name: &str) -> Result<&ServiceFacts> {
        self.services.get(name).with_context(|| format!("Service {name} was not made"))
    }

    fn server_names(&self) -> Vec<String> {
        self.servers.iter().map(|server| server.pod.clone()).collect()
    }
}

/// What is asked for beyond the cluster's own.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked {
    /// The cluster's domain.
    pub(super) domain: String,
    /// `ADDRESS:PORT` outside.
    pub(super) outside: Option<String>,
    /// A name outside.
    pub(super) outside_name: Option<String>,
}

/// What must come of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// One of these pods answers; with `client`, it sees one of these addresses.
    Served {
        /// Any of them.
        by: Vec<String>,
        /// None: whatever it sees.
        client: Option<Vec<IpAddr>>,
    },
    /// So many bytes, unchanged; none: as many as were sent.
    Bytes(Option<u64>),
    /// A connection.
    Connected,
    /// Exactly these addresses; none: any.
    Addresses(Option<Vec<IpAddr>>),
    /// Nothing: dropped.
    Silence,
}

/// One check.
#[derive(Clone, Debug)]
pub(super) struct Check {
    /// `pod-to-pod/tcp`, `policy/denied` …
    pub(super) name: String,
    /// When.
    pub(super) phase: Phase,
    /// Who asks.
    pub(super) from: Actor,
    /// Whom, in words.
    pub(super) to: String,
    /// What it does.
    pub(super) action: Action,
    /// What must come of it.
    pub(super) want: Want,
    /// How long it is tried, in milliseconds.
    pub(super) patience: u64,
    /// Arguments of `towpath explain` that say more.
    pub(super) explain: Option<[String; 3]>,
}

impl Check {
    /// As the probe takes it.
    pub(super) fn ask(&self, id: usize) -> Ask {
        let expect = if self.want == Want::Silence { Expect::Silence } else { Expect::Answer };
        let timeout = match (&self.want, &self.action) {
            (Want::Silence, _) => SILENCE,
            (_, Action::Download(..) | Action::Upload(..)) => LARGE_ATTEMPT,
            (_, Action::Resolve(_)) => 2 * ATTEMPT,
            _ => ATTEMPT,
        };
        Ask { id, action: self.action.clone(), expect, patience: self.patience, timeout }
    }
}

/// The checks of a phase.
///
/// # Errors
/// Something that the checks need is not there.
pub(super) fn plan(cast: &Cast, asked: &Asked, phase: Phase) -> Result<Vec<Check>> {
    let mut plan = Plan { cast, phase, checks: Vec::new() };
    for family in cast.families() {
        match phase {
            Phase::Open => plan.open(family)?,
            Phase::Denied => plan.denied(family),
            Phase::Allowed => plan.allowed(family),
            Phase::Egress => plan.egress(family),
            Phase::Lifted => plan.lifted(family),
        }
    }
    if phase == Phase::Open {
        plan.names(asked)?;
        plan.outside(asked)?;
    }
    Ok(plan.checks)
}

/// How to ask the agent of the guarded pod's node what it has dropped: from its node, since metrics are on the loopback address.
pub(super) fn drops(cast: &Cast, metrics_port: u16) -> Option<Check> {
    let guarded = cast.guarded.first()?;
    let from = cast.hosts.iter().find(|host| host.node == guarded.node)?;
    let end = Endpoint::new("127.0.0.1", metrics_port);
    Some(Check {
        name: "policy/drop-is-counted".to_owned(),
        phase: Phase::Denied,
        from: from.clone(),
        to: format!("the metrics of {}'s agent at {end}", guarded.node),
        action: Action::Text(end, "/metrics".to_owned()),
        want: Want::Connected,
        patience: 0,
        explain: None,
    })
}

/// A list in the making.
struct Plan<'a> {
    cast: &'a Cast,
    phase: Phase,
    checks: Vec<Check>,
}

/// Which side of which pod.
fn place(name: &str, from: &Actor, to_node: &str) -> String {
    let where_ = if from.node == to_node { "same-node" } else { "other-node" };
    format!("{name}/{where_}")
}

impl Plan<'_> {
    fn add(&mut self, name: String, from: &Actor, to: String, action: Action, want: Want) -> &mut Check {
        let phase = self.phase;
        self.checks.push(Check {
            name,
            phase,
            from: from.clone(),
            to,
            action,
            want,
            patience: PATIENCE,
            explain: None,
        });
        let last = self.checks.len() - 1;
        // It was pushed just now.
        #[allow(clippy::indexing_slicing, reason = "the list is not empty")]
        &mut self.checks[last]
    }

    /// A check whose failure `towpath explain` has something to say about.
    fn explained(&mut self, name: String, from: &Actor, shown: String, action: Action, want: Want) {
        let target = match &action {
            Action::Udp(end, _) => Some((end.host.clone(), format!("{}/udp", end.port))),
            Action::Http(end) | Action::Download(end, _) | Action::Upload(end, _) | Action::Connect(end) => {
                Some((end.host.clone(), end.port.to_string()))
            }
            Action::Resolve(_) | Action::Text(..) => None,
        };
        let who = match from.pod.starts_with(Role::Host.name()) && !from.pod.starts_with(Role::HostPort.name()) {
            true => format!("node/{}", from.node),
            false => format!("pod/{}", from.pod),
        };
        let check = self.add(name, from, shown, action, want);
        // By address: it says which family is meant.
        check.explain = target.map(|(host, port)| [who, host, port]);
    }

    fn open(&mut self, family: Family) -> Result<()> {
        self.pods_to_pods(family);
        self.services(family)?;
        self.node_ports(family)?;
        self.nodes(family)?;
        self.host_port(family);
        Ok(())
    }

    fn pods_to_pods(&mut self, family: Family) {
        let cast = self.cast;
        for (from, to) in pairs(&cast.clients, &cast.servers) {
            let (Some(own), Some(ip)) = (from.ip(family), to.ip(family)) else { continue };
            let end = Endpoint::new(ip, PORT);
            let served = Want::Served { by: vec![to.pod.clone()], client: Some(vec![own]) };
            for (what, action, want) in [
                ("tcp", Action::Http(end.clone()), served.clone()),
                ("udp", Action::Udp(end.clone(), Size::WhoAmI), served),
                ("full-packet", Action::Udp(end.clone(), Size::Mtu), Want::Bytes(None)),
                ("fragments", Action::Udp(end.clone(), Size::Bytes(FRAGMENTED)), Want::Bytes(Some(FRAGMENTED.into()))),
                ("download", Action::Download(end.clone(), LARGE), Want::Bytes(Some(LARGE.into()))),
                ("upload", Action::Upload(end.clone(), LARGE), Want::Bytes(Some(LARGE.into()))),
            ] {
                let shown = format!("{} on {} at {end}", to.pod, to.node);
                let name = place(&format!("pod-to-pod/{what}"), from, &to.node);
                self.explained(name, from, shown, action, want);
            }
        }
    }

    fn services(&mut self, family: Family) -> Result<()> {
        let cast = self.cast;
        let any = cast.server_names();
        let of = |name: &str| -> Result<Option<IpAddr>> {
            Ok(cast.service(name)?.cluster_ips.iter().copied().find(|ip| family_of(*ip) == family))
        };
        if let Some(ip) = of("web")? {
            let end = Endpoint::new(ip, SERVICE_PORT);
            let shown = format!("Service web at {end}");
            for from in &cast.clients {
                let want = Want::Served { by: any.clone(), client: from.ip(family).map(|own| vec![own]) };
                for (what, action) in
                    [("tcp", Action::Http(end.clone())), ("udp", Action::Udp(end.clone(), Size::WhoAmI))]
                {
                    self.explained(format!("pod-to-service/{what}"), from, shown.clone(), action, want.clone());
                }
            }
            for from in &cast.hosts {
                let want = Want::Served { by: any.clone(), client: None };
                let action = Action::Http(end.clone());
                self.explained("node-to-service/tcp".to_owned(), from, shown.clone(), action, want);
            }
        }
        if let (Some(ip), Some(only)) = (of("self")?, cast.servers.first()) {
            let end = Endpoint::new(ip, SERVICE_PORT);
            let shown = format!("itself by Service self at {end}");
            let want = Want::Served { by: vec![only.pod.clone()], client: None };
            for (what, action) in [("tcp", Action::Http(end.clone())), ("udp", Action::Udp(end.clone(), Size::WhoAmI))]
            {
                self.explained(format!("hairpin/{what}"), only, shown.clone(), action, want.clone());
            }
        }
        Ok(())
    }

    fn node_ports(&mut self, family: Family) -> Result<()> {
        let cast = self.cast;
        let web = cast.service("web")?;
        let want = Want::Served { by: cast.server_names(), client: None };
        for (node, ip) in addresses(&cast.nodes, family) {
            let askers = cast.clients.iter().map(|c| ("pod", c)).chain(cast.hosts.iter().map(|h| ("node", h)));
            for (who, from) in askers {
                let tcp = web.tcp_node_port.map(|port| ("tcp", Endpoint::new(ip, port)));
                let udp = web.udp_node_port.map(|port| ("udp", Endpoint::new(ip, port)));
                for (what, end) in tcp.into_iter().chain(udp) {
                    let action = match what {
                        "tcp" => Action::Http(end.clone()),
                        _ => Action::Udp(end.clone(), Size::WhoAmI),
                    };
                    let shown = format!("node port of Service web at {end} ({node})");
                    let name = place(&format!("{who}-to-node-port/{what}"), from, node);
                    self.explained(name, from, shown, action, want.clone());
                }
            }
        }
        Ok(())
    }

    /// Nodes to pods and pods to nodes.
    fn nodes(&mut self, family: Family) -> Result<()> {
        let cast = self.cast;
        for (from, to) in pairs(&cast.hosts, &cast.servers) {
            let Some(ip) = to.ip(family) else { continue };
            let end = Endpoint::new(ip, PORT);
            let shown = format!("{} on {} at {end}", to.pod, to.node);
            let want = Want::Served { by: vec![to.pod.clone()], client: None };
            let name = place("node-to-pod/tcp", from, &to.node);
            self.explained(name, from, shown, Action::Http(end), want);
        }
        for (from, to) in pairs(&cast.clients, &cast.hosts) {
            let (Some(own), Some(ip)) = (from.ip(family), to.ip(family)) else { continue };
            let end = Endpoint::new(ip, cast.host_port.saturating_add(1));
            let shown = format!("{} on {}'s own network at {end}", to.pod, to.node);
            let want = Want::Served { by: vec![to.pod.clone()], client: Some(vec![own]) };
            let name = place("pod-to-node/tcp", from, &to.node);
            self.explained(name, from, shown, Action::Http(end), want);
        }
        Ok(())
    }

    fn host_port(&mut self, family: Family) {
        let cast = self.cast;
        for to in &cast.host_ports {
            let node = cast.nodes.iter().filter(|node| node.name == to.node).cloned().collect::<Vec<_>>();
            for (node, ip) in addresses(&node, family) {
                let end = Endpoint::new(ip, cast.host_port);
                let shown = format!("{} by host port {end} of {node}", to.pod);
                let want = Want::Served { by: vec![to.pod.clone()], client: None };
                for from in cast.clients.iter().chain(&cast.hosts) {
                    let name = place("host-port/tcp", from, node);
                    self.add(name, from, shown.clone(), Action::Http(end.clone()), want.clone());
                }
            }
        }
    }

    fn names(&mut self, asked: &Asked) -> Result<()> {
        let cast = self.cast;
        let web = cast.service("web")?;
        let sorted = |mut list: Vec<IpAddr>| {
            list.sort_unstable();
            list
        };
        let of_web = sorted(web.cluster_ips.clone());
        let of_peers = sorted(cast.servers.iter().flat_map(|server| server.ips.clone()).collect());
        let (namespace, domain) = (&cast.namespace, &asked.domain);
        for from in &cast.clients {
            for (what, name, addresses) in [
                ("cluster", format!("kubernetes.default.svc.{domain}."), None),
                ("full", format!("web.{namespace}.svc.{domain}."), Some(of_web.clone())),
                ("namespace", format!("web.{namespace}"), Some(of_web.clone())),
                ("short", "web".to_owned(), Some(of_web.clone())),
                ("headless", "peers".to_owned(), Some(of_peers.clone())),
            ] {
                let shown = format!("name {name}");
                let want = Want::Addresses(addresses);
                self.add(format!("dns/{what}"), from, shown, Action::Resolve(name), want);
            }
            let by_name = Endpoint::new("web", SERVICE_PORT);
            let want = Want::Served { by: cast.server_names(), client: None };
            self.add(
                "pod-to-service/by-name".to_owned(),
                from,
                format!("http://{by_name}"),
                Action::Http(by_name),
                want,
            );
        }
        Ok(())
    }

    fn outside(&mut self, asked: &Asked) -> Result<()> {
        for from in &self.cast.clients {
            if let Some(target) = &asked.outside {
                let (host, port) = target.rsplit_once(':').context("--outside: write ADDRESS:PORT")?;
                let host = host.trim_start_matches('[').trim_end_matches(']');
                let port = port.parse().with_context(|| format!("--outside {target:?}: {port:?} is no port"))?;
                let end = Endpoint::new(host, port);
                self.add("outside/tcp".to_owned(), from, end.to_string(), Action::Connect(end), Want::Connected);
            }
            if let Some(name) = &asked.outside_name {
                let action = Action::Resolve(name.clone());
                self.add("outside/name".to_owned(), from, format!("name {name}"), action, Want::Addresses(None));
            }
        }
        Ok(())
    }

    fn tcp(&mut self, name: &str, from: &Actor, to: &Actor, family: Family, want: Want) {
        let Some(ip) = to.ip(family) else { return };
        let end = Endpoint::new(ip, PORT);
        let shown = format!("{} on {} at {end}", to.pod, to.node);
        self.explained(place(name, from, &to.node), from, shown, Action::Http(end), want);
    }

    fn denied(&mut self, family: Family) {
        let cast = self.cast;
        for (from, to) in pairs(&cast.clients, &cast.guarded) {
            self.tcp("policy/default-deny", from, to, family, Want::Silence);
        }
        // A node always reaches its own pods: kubelet probes them.
        for (from, to) in pairs(&cast.hosts, &cast.guarded).filter(|(from, to)| from.node == to.node) {
            self.tcp("policy/own-node-still-may", from, to, family, served(to));
        }
        self.unguarded(family);
    }

    /// Who is not selected is reached as before.
    fn unguarded(&mut self, family: Family) {
        let cast = self.cast;
        if let (Some(from), Some(to)) = (cast.clients.first(), cast.servers.last()) {
            self.tcp("policy/others-as-before", from, to, family, served(to));
        }
    }

    fn allowed(&mut self, family: Family) {
        let cast = self.cast;
        for to in &cast.guarded {
            for (index, from) in cast.clients.iter().enumerate() {
                if index > 0 {
                    self.tcp("policy/not-allowed", from, to, family, Want::Silence);
                    continue;
                }
                self.tcp("policy/allowed", from, to, family, served(to));
                let Some(ip) = to.ip(family) else { continue };
                let end = Endpoint::new(ip, PORT);
                let shown = format!("{} on {} at {end} by UDP, which is not allowed", to.pod, to.node);
                let name = place("policy/other-protocol", from, &to.node);
                let action = Action::Udp(end, Size::WhoAmI);
                self.explained(name, from, shown, action, Want::Silence);
            }
        }
    }

    fn egress(&mut self, family: Family) {
        let cast = self.cast;
        for (from, to) in pairs(&cast.clients, &cast.guarded) {
            self.tcp("policy/egress-denied", from, to, family, Want::Silence);
        }
        if let Some(to) = cast.servers.first() {
            for from in &cast.clients {
                self.tcp("policy/egress-allowed", from, to, family, served(to));
            }
        }
        for from in &cast.clients {
            let addresses = self.cast.services.get("web").map(|web| {
                let mut list = web.cluster_ips.clone();
                list.sort_unstable();
                list
            });
            let action = Action::Resolve("web".to_owned());
            self.add("policy/egress-dns".to_owned(), from, "name web".to_owned(), action, Want::Addresses(addresses));
        }
    }

    fn lifted(&mut self, family: Family) {
        let cast = self.cast;
        for (from, to) in pairs(&cast.clients, &cast.guarded) {
            self.tcp("policy/lifted", from, to, family, served(to));
        }
    }
}

fn served(by: &Actor) -> Want {
    Want::Served { by: vec![by.pod.clone()], client: None }
}

fn pairs<'a>(from: &'a [Actor], to: &'a [Actor]) -> impl Iterator<Item = (&'a Actor, &'a Actor)> {
    from.iter().flat_map(move |a| to.iter().map(move |b| (a, b)))
}

fn addresses(nodes: &[NodeFacts], family: Family) -> impl Iterator<Item = (&str, IpAddr)> {
    let of = move |node: &NodeFacts| node.addresses.iter().copied().find(|ip| family_of(*ip) == family);
    nodes.iter().filter_map(move |node| of(node).map(|ip| (node.name.as_str(), ip)))
}
