//! From the configuration file and the node's own object to what the datapath needs to know of this node.
//!
//! The result is also kept on disk, so that an agent which restarts while the API server is away knows its own node.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use towpath_datapath::NodeFacts;
use towpath_datapath::bpf::Limits;
use towpath_datapath::net::address::DeviceAddress;
use towpath_model::custom::NodeNetworkSpec;
use towpath_model::desired::{NodeSettings, Vxlan};
use towpath_model::{Node, NodeName, POD_CIDRS_ANNOTATION, family_of};
use towpath_plan::config::{self, Ranges};
use towpath_wire::config::{AgentConfig, MapLimits};

/// The configuration with every text parsed.
#[derive(Clone, Debug)]
pub struct Parsed {
    /// This node.
    pub node: NodeName,
    /// The ranges.
    pub ranges: Ranges,
}

/// The node's name: the configured one, else the machine's.
///
/// # Errors
/// The machine's cannot be read.
pub fn parse_node_name(config: &AgentConfig) -> Result<NodeName> {
    if !config.node_name.is_empty() {
        return Ok(NodeName::new(config.node_name.clone()));
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").context("could not read the host name")?;
    Ok(NodeName::new(name.trim().to_lowercase()))
}

/// Refuses pod ranges that overlap a network which one of the node's own addresses is in: packets to pods and to hosts of that
/// network could not be told apart. Addresses without a network (/32, /128) and devices without a node address do not count.
///
/// # Errors
/// Both ranges, by name.
pub fn refuse_underlay_overlap(node: &NodeName, own: &OwnNode, addresses: &[DeviceAddress]) -> Result<()> {
    if let Some((cidr, network)) = underlay_overlap(&own.addresses, &own.pod_cidrs, addresses) {
        bail!(
            "node {node}: its pod range {cidr} overlaps the node's own network {network}; choose pod ranges \
             (kube-controller-manager's --cluster-cidr) that are used nowhere else"
        );
    }
    Ok(())
}

/// The first of some pod ranges that overlaps a network which one of the node's own addresses is in, and that network.
fn underlay_overlap(own: &[IpAddr], ranges: &[IpNet], addresses: &[DeviceAddress]) -> Option<(IpNet, IpNet)> {
    let devices: Vec<u32> =
        addresses.iter().filter(|held| own.contains(&held.address)).map(|held| held.device).collect();
    let networks = addresses
        .iter()
        .filter(|held| devices.contains(&held.device) && !held.ours)
        .filter_map(|held| IpNet::new(held.address, held.prefix_len).ok())
        .filter(|network| network.prefix_len() < network.max_prefix_len());
    networks.map(|network| network.trunc()).find_map(|network| {
        let overlaps = |cidr: &&IpNet| network.contains(&cidr.network()) || cidr.contains(&network.network());
        ranges.iter().find(overlaps).map(|cidr| (*cidr, network))
    })
}

/// Parses and checks a configuration.
///
/// # Errors
/// As [`config::parse`], or there is no node name.
pub fn parse(config: &AgentConfig) -> Result<Parsed> {
    Ok(Parsed { node: parse_node_name(config)?, ranges: config::parse(config)? })
}

/// Limits of the kernel's tables.
pub fn limits(configured: &MapLimits) -> Limits {
    let default = Limits::default();
    Limits {
        connections: configured.connections.unwrap_or(default.connections),
        services: configured.services.unwrap_or(default.services),
        slots: configured.slots.unwrap_or(default.slots),
        backends: configured.backends.unwrap_or(default.backends),
        classes: configured.classes.unwrap_or(default.classes),
        set_classes: configured.set_classes.unwrap_or(default.set_classes),
        rules: configured.rules.unwrap_or(default.rules),
        peers: configured.peers.unwrap_or(default.peers),
        pods: configured.pods.unwrap_or(default.pods),
    }
}

/// The API server's URL that the configuration names, else the one that `towpath node install` noted.
pub fn api_server(config: &AgentConfig) -> Option<String> {
    let noted = || std::fs::read_to_string(config.api_server_note()).ok();
    let url = config.api_server.clone().or_else(noted)?;
    Some(url.trim().to_owned()).filter(|url| !url.is_empty())
}

/// The cgroup2 directory that a configured one means: itself, or `unified` in it where cgroup v1 is mounted beside it.
///
/// # Errors
/// Neither is of a cgroup2 file system.
pub fn cgroup2(configured: &Path) -> Result<PathBuf> {
    /// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
    const CGROUP2: rustix::fs::FsWord = 0x6367_7270;
    let unified = configured.join("unified");
    let is_v2 = |path: &&Path| rustix::fs::statfs(*path).is_ok_and(|fs| fs.f_type == CGROUP2);
    let found = [configured, &unified].into_iter().find(is_v2).with_context(|| {
        let shown = configured.display();
        format!(
            "agent configuration, cgroup: neither {shown} nor {shown}/unified is of a cgroup2 file system; mount one"
        )
    })?;
    Ok(found.to_owned())
}

/// What is known of this node: from its object, or from disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnNode {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its pod ranges, with those that were added to its `spec.podCIDRs` behind them.
    pub pod_cidrs: Vec<IpNet>,
    /// Those that were added.
    #[serde(default)]
    pub added: Vec<IpNet>,
    /// Those of them that nobody asks for any more and that pods still have addresses of: they give no more.
    #[serde(default)]
    pub closed: Vec<IpNet>,
    /// Why ranges that were added are not used on this node, for people.
    #[serde(skip)]
    pub refused: Vec<String>,
}

/// What decides here whether a range that was added is used.
#[derive(Clone, Copy)]
pub struct Here<'a> {
    /// Addresses of this network namespace.
    pub addresses: &'a [DeviceAddress],
    /// Whether pods have addresses of a range that nobody asks for any more.
    pub still: &'a dyn Fn(&IpNet) -> bool,
}

impl OwnNode {
    /// From the node's object; the reason why it cannot be used yet. A range that was added and cannot be used here costs itself.
    ///
    /// # Errors
    /// No address, no pod range, or a pod range that does not fit the cluster's ranges.
    pub fn of(node: &Node, config: &Parsed, here: &Here<'_>) -> Result<Self> {
        if node.internal_ips.is_empty() {
            bail!("node {} has no InternalIP in status.addresses yet: kubelet sets it", node.name);
        }
        if node.assigned().next().is_none() {
            bail!(
                "node {} has no spec.podCIDRs yet: the controller manager (--allocate-node-cidrs) or `towpath controller` gives it one",
                node.name
            );
        }
        for cidr in node.assigned() {
            if let Some(service) =
                config.ranges.service_cidrs.iter().find(|s| s.contains(&cidr.network()) || cidr.contains(&s.network()))
            {
                bail!("node {}: its pod range {cidr} overlaps the Service range {service}", node.name);
            }
            if let Some(ip) = node.internal_ips.iter().find(|ip| cidr.contains(*ip)) {
                bail!("node {}: its pod range {cidr} holds the node's own address {ip}", node.name);
            }
        }
        let mut own = Self {
            addresses: node.internal_ips.clone(),
            pod_cidrs: node.assigned().copied().collect(),
            added: Vec::new(),
            closed: Vec::new(),
            refused: Vec::new(),
        };
        for range in &node.added.in_force {
            if let Some(network) = underlay_overlap(&own.addresses, std::slice::from_ref(range), here.addresses) {
                own.refused.push(format!(
                    "pod range {range} ({POD_CIDRS_ANNOTATION}) is not used: it overlaps the node's own network {}",
                    network.1
                ));
                continue;
            }
            if !node.added.wanted.contains(range) {
                if !(here.still)(range) {
                    continue;
                }
                own.closed.push(*range);
            }
            own.pod_cidrs.push(*range);
            own.added.push(*range);
        }
        Ok(own)
    }

    /// What the node tells the others that it offers.
    pub fn offers(&self, facts: &NodeFacts) -> NodeNetworkSpec {
        let mac: Vec<String> = facts.tunnel_mac.iter().map(|byte| format!("{byte:02x}")).collect();
        NodeNetworkSpec {
            tunnel_address: Some(facts.tunnel_address.to_string()),
            tunnel_mac: Some(mac.join(":")),
            pod_cidrs: self.pod_cidrs.iter().map(ToString::to_string).collect(),
            added_pod_cidrs: self.added.iter().map(ToString::to_string).collect(),
        }
    }

    /// What an earlier run kept; none when there is no such file.
    ///
    /// # Errors
    /// The file is there and cannot be read or understood.
    pub fn load(path: &Path) -> Result<Option<Self>> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("could not read {}", path.display())),
        };
        let own = serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged: remove it, the API server knows better", path.display()))?;
        Ok(Some(own))
    }

    /// Keeps it for a run without an API server.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn store(&self, path: &Path) -> Result<()> {
        crate::disk::write_atomically(path, &serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("could not write {}", path.display()))
    }
}

/// What the datapath needs to know.
pub fn node_settings(config: &AgentConfig, parsed: &Parsed, own: &OwnNode) -> NodeSettings {
    let has = |ip: &IpAddr| own.pod_cidrs.iter().any(|c| family_of(c.addr()) == family_of(*ip));
    NodeSettings {
        name: parsed.node.clone(),
        addresses: own.addresses.clone(),
        pod_cidrs: own.pod_cidrs.clone(),
        cluster_cidrs: parsed.ranges.cluster_cidrs.clone(),
        service_cidrs: parsed.ranges.service_cidrs.clone(),
        masqueraded: config::masqueraded(config),
        non_masquerade_cidrs: parsed.ranges.non_masquerade_cidrs.clone(),
        dns_addresses: config.dns_addresses.iter().copied().filter(has).collect(),
        node_ports: config.node_ports,
        node_port_addresses: parsed.ranges.node_port_addresses.clone(),
        vxlan: Vxlan { vni: config.vxlan_vni, port: config.vxlan_port },
        udp_port: config.udp_port,
        pod_mtu: config.pod_mtu,
        direct_server_return: config.direct_server_return,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Parsed {
        parse(&AgentConfig { node_name: "n1".to_owned(), ..AgentConfig::default() }).unwrap()
    }

    fn node(ips: &[&str], cidrs: &[&str]) -> Node {
        Node {
            name: NodeName::new("n1"),
            labels: Default::default(),
            internal_ips: ips.iter().map(|i| i.parse().unwrap()).collect(),
            other_ips: Vec::new(),
            created: 0,
            added: Default::default(),
            flannel: None,
            pod_cidrs: cidrs.iter().map(|c| c.parse().unwrap()).collect(),
            ready: true,
        }
    }

    fn of(node: &Node) -> Result<OwnNode> {
        OwnNode::of(node, &config(), &Here { addresses: &[], still: &|_| false })
    }

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn ranges_that_were_added_are_used_closed_or_left_out_and_never_keep_the_node_from_its_work() {
        let mut node = node(&["10.244.9.5"], &["10.244.0.0/24"]);
        node.added.wanted = nets(&["10.245.1.0/24", "10.244.8.0/23"]);
        node.put_in_force(nets(&["10.245.1.0/24", "10.244.8.0/23", "10.245.2.0/24", "10.245.3.0/24"]));
        let held = |text: &str| {
            let net: IpNet = text.parse().unwrap();
            DeviceAddress {
                device: 2,
                address: net.addr(),
                prefix_len: net.prefix_len(),
                ours: false,
                tentative: false,
            }
        };
        let still = |range: &IpNet| *range == "10.245.3.0/24".parse().unwrap();
        let addresses = [held("10.244.9.5/24")];
        let own = OwnNode::of(&node, &config(), &Here { addresses: &addresses, still: &still }).unwrap();
        assert_eq!(own.pod_cidrs, nets(&["10.244.0.0/24", "10.245.1.0/24", "10.245.3.0/24"]));
        assert_eq!((own.added, own.closed), (nets(&["10.245.1.0/24", "10.245.3.0/24"]), nets(&["10.245.3.0/24"])));
        assert!(own.refused.len() == 1 && own.refused[0].contains("10.244.8.0/23"), "{:?}", own.refused);
        node.pod_cidrs = node.added.in_force.clone();
        assert!(of(&node).unwrap_err().to_string().contains("podCIDRs"), "added to nothing");
    }

    #[test]
    fn the_api_server_is_the_configured_one_else_the_noted_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = AgentConfig { run_dir: dir.path().to_owned(), ..AgentConfig::default() };
        assert_eq!(api_server(&config), None);
        std::fs::write(config.api_server_note(), "https://192.0.2.1:6443\n").unwrap();
        assert_eq!(api_server(&config).as_deref(), Some("https://192.0.2.1:6443"));
        config.api_server = Some("https://api.example:443".to_owned());
        assert_eq!(api_server(&config).as_deref(), Some("https://api.example:443"));
    }

    #[test]
    fn a_directory_that_is_no_cgroup_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let error = cgroup2(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&dir.path().display().to_string()) && error.contains("cgroup2"), "{error}");
    }

    #[test]
    fn a_round_of_no_seconds_is_refused() {
        let config = AgentConfig { node_name: "n".to_owned(), path_round_seconds: 0, ..AgentConfig::default() };
        let error = parse(&config).unwrap_err().to_string();
        assert!(error.contains("pathRoundSeconds"), "{error}");
    }

    #[test]
    fn a_node_without_a_range_says_who_gives_it_one() {
        let error = of(&node(&["192.168.1.1"], &[])).unwrap_err().to_string();
        assert!(error.contains("podCIDRs") && error.contains("n1"), "{error}");
        assert!(of(&node(&[], &["10.244.0.0/24"])).unwrap_err().to_string().contains("InternalIP"));
    }

    #[test]
    fn a_pod_range_over_services_or_the_node_itself_is_refused() {
        let services = of(&node(&["192.168.1.1"], &["10.96.0.0/24"])).unwrap_err().to_string();
        assert!(services.contains("Service range"), "{services}");
        let own = of(&node(&["10.244.0.5"], &["10.244.0.0/24"])).unwrap_err().to_string();
        assert!(own.contains("10.244.0.5"), "{own}");
    }

    #[test]
    fn a_pod_range_over_the_nodes_own_network_is_refused_and_bridges_of_others_do_not_count() {
        let held = |device: u32, text: &str, ours: bool| {
            let net: IpNet = text.parse().unwrap();
            DeviceAddress { device, address: net.addr(), prefix_len: net.prefix_len(), ours, tentative: false }
        };
        let own = of(&node(&["10.244.9.5"], &["10.244.0.0/24"])).unwrap();
        let refused = |addresses: &[DeviceAddress]| refuse_underlay_overlap(&NodeName::new("n1"), &own, addresses);
        let said = refused(&[held(2, "10.244.9.5/16", false)]).unwrap_err().to_string();
        assert!(said.contains("10.244.0.0/24") && said.contains("10.244.0.0/16"), "{said}");
        // Flannel's bridge holds the node's pod range; cloud networks give /32s.
        refused(&[held(2, "10.244.9.5/32", false), held(3, "10.244.0.1/24", false)]).unwrap();
        refused(&[held(2, "10.244.9.5/24", false), held(1, "10.244.0.1/32", true)]).unwrap();
    }

    #[test]
    fn what_is_kept_comes_back_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.json");
        assert_eq!(OwnNode::load(&path).unwrap(), None);
        let own = of(&node(&["192.168.1.1"], &["10.244.0.0/24"])).unwrap();
        own.store(&path).unwrap();
        assert_eq!(OwnNode::load(&path).unwrap(), Some(own));
        std::fs::write(&path, "{").unwrap();
        assert!(OwnNode::load(&path).unwrap_err().to_string().contains("damaged"));
    }
}
