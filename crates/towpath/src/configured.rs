//! What a cluster's agents go by, as far as it can be known from outside of them: their own configuration, the `NetworkConfig` over it, what
//! objects say of ranges and destinations, and what each node says of itself.
//!
//! [`Found`] asks; the rest is pure, and reads what was found as the agents do ([`towpath_plan::config`]). What cannot be known is
//! assumed, and [`Configured::notes`] say so.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result};
use ipnet::IpNet;
use kube::ResourceExt;
use towpath_lab::layout::LabName;
use towpath_model::custom::{BackendName, NETWORK_CONFIG_NAME, NetworkConfigSpec, NodeNetwork, NodeNetworkStatus};
use towpath_model::{Family, NodeName, ServiceCidr, World, family_of};
use towpath_plan::backend::{self, Able, Says};
use towpath_plan::config::{self, ConfigError, Ranges};
use towpath_plan::modes::{self, InCharge};
use towpath_plan::service_ranges::{self, Own};
use towpath_plan::services::ServiceConfig;
use towpath_wire::config::AgentConfig;

use crate::{kubernetes, place};

/// The ConfigMap of the agents, and its key.
const AGENTS: (&str, &str) = ("towpath", "agent.yaml");
/// That of ip-masq-agent, which Towpath's agents follow.
const IP_MASQ_AGENT: &str = "ip-masq-agent";

/// What the API, or a lab's own files, have of configuration.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    /// The agents' own; none: that is not known.
    pub(crate) agent: Option<AgentConfig>,
    /// The `NetworkConfig`, if there is one.
    pub(crate) network: Option<NetworkConfigSpec>,
    /// The data of ip-masq-agent's ConfigMap.
    pub(crate) ip_masq_agent: BTreeMap<String, String>,
    /// `ServiceCIDR` objects by name; none where the API has no such kind.
    pub(crate) service_cidrs: Option<BTreeMap<String, ServiceCidr>>,
    /// What nodes say of themselves.
    pub(crate) nodes: BTreeMap<NodeName, NodeSays>,
    /// What could not be found out, for people.
    pub(crate) doubts: Vec<String>,
}

/// What a node says of itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct NodeSays {
    /// Of backends.
    pub(crate) backends: Says,
    /// Nodes that it reaches by another backend than its own.
    pub(crate) behind: BTreeMap<NodeName, BackendName>,
    /// Who is in charge there.
    pub(crate) in_charge: Option<InCharge>,
}

impl NodeSays {
    pub(crate) fn of(object: &NodeNetwork) -> Self {
        let none = NodeNetworkStatus::default();
        let status = object.status.as_ref().unwrap_or(&none);
        let behind = status.peers_behind.iter().filter_map(|peer| {
            let by = serde_json::from_value(peer.backend.clone().into()).ok()?;
            Some((NodeName::new(peer.node.as_str()), by))
        });
        Self { backends: Says::of(object), behind: behind.collect(), in_charge: InCharge::said(status) }
    }
}

impl Found {
    /// Asks the API server, or of their own configuration the agents' files where the cluster is a lab of this machine.
    pub(crate) async fn ask(client: &kube::Client, lab: Option<&LabName>) -> Self {
        let doubts = &mut Vec::new();
        let agent = agent_config(client, lab).await.map(Some);
        let network = kubernetes::network(client).await;
        let ip_masq_agent = kubernetes::system_config_map(client, IP_MASQ_AGENT).await;
        let service_cidrs = kubernetes::service_cidrs(client).await;
        let said = kubernetes::node_networks(client).await;
        let said = or_doubt(said, "what nodes say of themselves is not known here", doubts);
        Self {
            agent: or_doubt(agent, "agents' own configuration is not known here, its defaults are assumed", doubts),
            network: or_doubt(network, "the NetworkConfig is not known here, none is assumed", doubts),
            ip_masq_agent: or_doubt(ip_masq_agent, "no destinations of ip-masq-agent are assumed", doubts)
                .unwrap_or_default(),
            service_cidrs: or_doubt(service_cidrs, "the configured ranges of Services are assumed", doubts),
            nodes: said.iter().map(|object| (NodeName::new(object.name_any()), NodeSays::of(object))).collect(),
            doubts: std::mem::take(doubts),
        }
    }
}

/// What was found; else nothing, and the reason goes to the doubts with what is assumed.
fn or_doubt<T: Default>(found: Result<T>, assumed: &str, doubts: &mut Vec<String>) -> T {
    found.unwrap_or_else(|error| {
        doubts.push(format!("{assumed}: {error:#}"));
        T::default()
    })
}

async fn agent_config(client: &kube::Client, lab: Option<&LabName>) -> Result<AgentConfig> {
    if let Some(lab) = lab {
        return place::agent_config_of_lab(lab);
    }
    let (name, key) = AGENTS;
    let data = kubernetes::system_config_map(client, name).await?;
    let text = data.as_ref().and_then(|data| data.get(key));
    let text = text.with_context(|| format!("there is no ConfigMap kube-system/{name} with a key {key}"))?;
    serde_saphyr::from_str(text).with_context(|| format!("{key} of ConfigMap kube-system/{name} is no configuration"))
}

/// What becomes of the source of what a pod sends out of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Leaves {
    /// It is its node's.
    AsNode,
    /// It stays the pod's, for this reason.
    AsPod(String),
}

/// How packets are sent from one node to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sends {
    /// By which backend.
    pub(crate) by: BackendName,
    /// The sender says so; else it is what is configured.
    pub(crate) said: bool,
}

/// What agents go by.
#[derive(Clone, Debug)]
pub(crate) struct Configured {
    config: AgentConfig,
    ranges: Ranges,
    /// On any node, before it is decided who is in charge there.
    services: ServiceConfig,
    /// Where cluster DNS is answered, on nodes whose own server does.
    dns_at: Vec<IpAddr>,
    /// Destinations that ip-masq-agent's ConfigMap names.
    left_alone: Vec<IpNet>,
    in_charge: BTreeMap<NodeName, InCharge>,
    nodes: BTreeMap<NodeName, NodeSays>,
    notes: Vec<String>,
}

impl Configured {
    /// Reads what was found, as agents of a cluster with this world do.
    ///
    /// # Errors
    /// The agents' own configuration is one that they cannot run with.
    pub(crate) fn of(world: &World, found: &Found) -> Result<Self, ConfigError> {
        let mut notes = found.doubts.clone();
        let (config, ranges) = in_force(found, &mut notes)?;
        let own = Own { world, cluster: &ranges.cluster_cidrs, dns: &config.dns_addresses };
        let service_cidrs = service_ranges::plan(found.service_cidrs.as_ref(), &ranges.service_cidrs, &own).ranges;
        let left_alone = towpath_agent::masquerade::named(&found.ip_masq_agent).unwrap_or_else(|error| {
            notes.push(format!(
                "ConfigMap kube-system/{IP_MASQ_AGENT}: {error:#}; nodes go by what it said before, which is not known here"
            ));
            Vec::new()
        });
        let servers = modes::core_dns(world, &config.dns_addresses);
        let in_charge = |node: &NodeName| {
            let said = found.nodes.get(node).and_then(|says| says.in_charge);
            said.unwrap_or_else(|| {
                let proxy = modes::kube_proxy(world, node);
                InCharge::at_first_look(config.service_proxy, config.dns, proxy, servers)
            })
        };
        Ok(Self {
            services: config::services(&config, &ranges, &service_cidrs),
            dns_at: modes::dns_addresses(world, &config.cluster_dns).0,
            left_alone,
            in_charge: world.nodes.keys().map(|node| (node.clone(), in_charge(node))).collect(),
            nodes: found.nodes.clone(),
            config,
            ranges,
            notes,
        })
    }

    /// What is assumed, for people.
    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Node-local addresses that DNS is answered at.
    pub(crate) fn own_dns(&self) -> &[IpAddr] {
        &self.config.dns_addresses
    }

    /// What Services go by on every node alike.
    pub(crate) fn services(&self) -> &ServiceConfig {
        &self.services
    }

    /// What a planner is told on a node.
    pub(crate) fn services_on(&self, node: &NodeName) -> ServiceConfig {
        let mut services = self.services.clone();
        if let Some(in_charge) = self.in_charge(node) {
            services.clients = in_charge.proxy.clients();
        }
        if self.answers_dns(node) {
            services.cluster_dns.clone_from(&self.dns_at);
        }
        services
    }

    /// Who is in charge on a node of the world.
    pub(crate) fn in_charge(&self, node: &NodeName) -> Option<InCharge> {
        self.in_charge.get(node).copied()
    }

    /// Whether a node's own server answers cluster DNS.
    pub(crate) fn answers_dns(&self, node: &NodeName) -> bool {
        self.in_charge(node).is_some_and(|in_charge| in_charge.dns.answers_here())
    }

    /// Where cluster DNS is answered, on nodes whose own server does.
    pub(crate) fn dns_at(&self) -> &[IpAddr] {
        &self.dns_at
    }

    /// Whether an endpoint's node answers clients outside itself.
    pub(crate) fn returns_directly(&self) -> bool {
        self.config.direct_server_return
    }

    /// How a node sends packets for pods of another.
    pub(crate) fn sends(&self, from: &NodeName, to: &NodeName) -> Sends {
        let Some((says, own)) = self.nodes.get(from).and_then(|says| Some((says, says.backends.sends?))) else {
            return Sends { by: self.config.backend, said: false };
        };
        // Who sends so is able to.
        let able = Able { ipip: true, udp: true, macs: true };
        let receives = self.nodes.get(to).map(|other| (to.clone(), other.backends.clone()));
        let instead = backend::instead(own, able, &receives.into_iter().collect());
        let agreed = instead.get(to).map_or(BackendName::Vxlan, |reach| backend::of_way(*reach));
        Sends { by: says.behind.get(to).copied().unwrap_or(agreed), said: true }
    }

    /// What becomes of a pod's address towards an address that is neither a pod's nor a node's nor a Service's.
    pub(crate) fn leaves(&self, world: &World, to: IpAddr) -> Leaves {
        let within = |ranges: &[IpNet]| ranges.iter().find(|range| range.contains(&to)).copied();
        let family = family_of(to);
        if !config::masqueraded(&self.config).contains(&family) {
            let name = if family == Family::V4 { "IPv4" } else { "IPv6" };
            return Leaves::AsPod(format!("{name} is not masqueraded"));
        }
        let of_node = || world.nodes.values().find_map(|node| within(&node.pod_cidrs));
        if let Some(range) = within(&self.ranges.cluster_cidrs).or_else(of_node) {
            return Leaves::AsPod(format!("{range} is a pod range"));
        }
        if let Some(range) = within(&self.ranges.non_masquerade_cidrs) {
            return Leaves::AsPod(format!("{range} is in nonMasqueradeCIDRs"));
        }
        within(&self.left_alone).map_or(Leaves::AsNode, |range| {
            Leaves::AsPod(format!("ConfigMap kube-system/{IP_MASQ_AGENT} leaves {range} alone"))
        })
    }
}

/// The configuration that agents have in force, as they read it; their own alone, with a note, where the `NetworkConfig` cannot be used.
fn in_force(found: &Found, notes: &mut Vec<String>) -> Result<(AgentConfig, Ranges), ConfigError> {
    let own = found.agent.clone().unwrap_or_default();
    let overlaid = |spec: &NetworkConfigSpec| -> Result<_, ConfigError> {
        let config = config::overlay(own.clone(), spec)?;
        let ranges = config::parse(&config)?;
        Ok((config, ranges))
    };
    match found.network.as_ref().map(overlaid) {
        Some(Ok(both)) => return Ok(both),
        Some(Err(error)) => notes.push(format!(
            "NetworkConfig {NETWORK_CONFIG_NAME} cannot be used, and what agents go by instead is not known here; none is assumed: {:#}",
            anyhow::Error::from(error)
        )),
        None => {}
    }
    let ranges = config::parse(&own)?;
    Ok((own, ranges))
}
