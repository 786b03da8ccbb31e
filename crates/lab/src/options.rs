//! What a person may choose about a lab, and the [`ClusterSpec`] that follows from it and is kept on disk.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::layout::LabName;

/// Address families of pods, Services and nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IpFamily {
    /// IPv4 only.
    #[default]
    Ipv4,
    /// IPv6 only.
    Ipv6,
    /// Both, IPv4 first.
    Dual,
}

impl IpFamily {
    /// Whether IPv4 is in use.
    pub fn has_v4(self) -> bool {
        self != Self::Ipv6
    }

    /// Whether IPv6 is in use.
    pub fn has_v6(self) -> bool {
        self != Self::Ipv4
    }

    fn wants(self, network: &IpNet) -> bool {
        match network {
            IpNet::V4(_) => self.has_v4(),
            IpNet::V6(_) => self.has_v6(),
        }
    }
}

impl FromStr for IpFamily {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "ipv4" => Ok(Self::Ipv4),
            "ipv6" => Ok(Self::Ipv6),
            "dual" => Ok(Self::Dual),
            other => bail!("IP family {other:?} is none of ipv4, ipv6, dual"),
        }
    }
}

/// Options of `lab up`. The default is a three-node IPv4 lab called `lab`.
#[derive(Clone, Debug)]
pub struct UpOptions {
    /// The lab's name.
    pub name: LabName,
    /// Number of nodes, 1 to [`MOST_NODES`].
    pub nodes: usize,
    /// Address families.
    pub ip_family: IpFamily,
    /// Pod ranges, one a family; empty for 10.244.0.0/16 and fd00:10:244::/56.
    pub pod_cidrs: Vec<IpNet>,
    /// Length of a node's part of the IPv4 pod range, as kube-controller-manager's `--node-cidr-mask-size`.
    pub node_cidr_mask_size: u8,
    /// Service ranges, one a family; empty for 10.96.0.0/12 and fd00:10:96::/112.
    pub service_cidrs: Vec<IpNet>,
    /// Underlay networks, written as the gateway's address and length; empty for 192.168.255.1/24 and fd00:255::1/64.
    pub underlay: Vec<IpNet>,
    /// Networks outside of the cluster, written as the gateway's address and length; the host in each has number 10.
    /// Empty for 192.168.26.1/24, 203.0.113.1/24, fd00:26::1/64 and 2001:db8:113::1/64.
    pub outside: Vec<IpNet>,
    /// A CNI configuration list to use instead of Towpath: no agent, carry and controller are started then.
    /// `$NODE`, `$POD_CIDR` (the node's first), `$POD_CIDRS` (a JSON list) and `$STATE` in it are replaced for each node.
    pub cni_conf: Option<PathBuf>,
    /// Directory of `towpath-cni`; the directory of [`UpOptions::program`] when not given.
    pub cni_bin_dir: Option<PathBuf>,
    /// The program whose hidden `lab serve` and `lab stage` commands are run, and `agent`, `carry` and `controller`.
    pub program: PathBuf,
    /// Arguments in front of those commands, for programs that wrap them; normally empty.
    pub program_args: Vec<String>,
    /// Extra fields merged into every agent's configuration, for experiments.
    pub agent_config: serde_json::Map<String, serde_json::Value>,
}

/// As Kubernetes has it.
pub const NODE_CIDR_MASK_SIZE: u8 = 24;
/// How many nodes a lab may have: beside them, a network of 256 addresses holds those of load balancers.
pub const MOST_NODES: usize = 200;

fn kubernetes_mask() -> u8 {
    NODE_CIDR_MASK_SIZE
}

impl UpOptions {
    /// Defaults, with the running program as the one that is started for the stages.
    pub fn new(name: LabName) -> Result<Self> {
        Ok(Self {
            name,
            nodes: 3,
            ip_family: IpFamily::Ipv4,
            pod_cidrs: Vec::new(),
            node_cidr_mask_size: NODE_CIDR_MASK_SIZE,
            service_cidrs: Vec::new(),
            underlay: Vec::new(),
            outside: Vec::new(),
            cni_conf: None,
            cni_bin_dir: None,
            program: std::env::current_exe().context("find the running program")?,
            program_args: Vec::new(),
            agent_config: serde_json::Map::new(),
        })
    }
}

/// One node of the cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// `n1`, `n2` …
    pub name: String,
    /// Its addresses on the underlay, one a family.
    pub addresses: Vec<IpNet>,
    /// Its pod ranges, one a family.
    pub pod_cidrs: Vec<IpNet>,
}

impl NodeSpec {
    /// The first address, as text: what `lab status` and tests call "the node's address".
    pub fn primary_address(&self) -> Option<IpAddr> {
        self.addresses.first().map(IpNet::addr)
    }
}

/// A host outside of the cluster, in a network namespace of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutsideHost {
    /// Namespace suffix: `outside` for the first, then `outside2` …
    pub netns: String,
    /// Its addresses with prefix length, one a family.
    pub addresses: Vec<IpNet>,
    /// The underlay's router in each of its networks.
    pub gateways: Vec<IpNet>,
}

/// Everything that is decided about a lab; stored in its state directory, so that `start` brings back the same cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterSpec {
    /// The lab's name.
    pub name: LabName,
    /// Address families.
    pub ip_family: IpFamily,
    /// Pod ranges of the cluster.
    pub pod_cidrs: Vec<IpNet>,
    /// Length of a node's part of the IPv4 pod range.
    #[serde(default = "kubernetes_mask")]
    pub node_cidr_mask_size: u8,
    /// Service ranges.
    pub service_cidrs: Vec<IpNet>,
    /// Addresses of the cluster's DNS: the tenth of each Service range.
    pub dns_addresses: Vec<IpAddr>,
    /// The underlay's gateway address and length, one a family.
    pub underlay: Vec<IpNet>,
    /// The nodes.
    pub nodes: Vec<NodeSpec>,
    /// Hosts outside.
    pub outside: Vec<OutsideHost>,
    /// Port of the API server on 127.0.0.1, kept across stop and start.
    pub api_port: u16,
    /// Text of a CNI configuration list that replaces Towpath.
    pub cni_conf: Option<String>,
    /// Directories of CNI plugins, in order of search.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// The program of the hidden commands.
    pub program: PathBuf,
    /// Arguments in front of the hidden commands.
    pub program_args: Vec<String>,
    /// Extra fields of every agent's configuration.
    #[serde(default)]
    pub agent_config: serde_json::Map<String, serde_json::Value>,
}

/// The cluster's DNS domain.
pub const CLUSTER_DOMAIN: &str = "cluster.local";

fn v4(a: u8, b: u8, c: u8, d: u8, length: u8) -> Result<IpNet> {
    Ok(Ipv4Net::new(Ipv4Addr::new(a, b, c, d), length)?.into())
}

fn v6(address: &str, length: u8) -> Result<IpNet> {
    Ok(Ipv6Net::new(address.parse::<Ipv6Addr>()?, length)?.into())
}

/// The address `offset` after the network's first, for example 10 → 10.96.0.10.
pub(crate) fn nth_address(network: &IpNet, offset: u32) -> Result<IpAddr> {
    let address = match network {
        IpNet::V4(net) => u32::from(net.network()).checked_add(offset).map(|bits| IpAddr::V4(bits.into())),
        IpNet::V6(net) => u128::from(net.network()).checked_add(offset.into()).map(|bits| IpAddr::V6(bits.into())),
    };
    address
        .filter(|a| network.contains(a))
        .with_context(|| format!("{network} is too small: it has no address number {offset}"))
}

/// What was chosen, or the defaults, restricted to the families in use; one a family.
fn ranges(what: &str, chosen: &[IpNet], defaults: Vec<IpNet>, family: IpFamily, one_each: bool) -> Result<Vec<IpNet>> {
    if chosen.is_empty() {
        return Ok(defaults.into_iter().filter(|net| family.wants(net)).collect());
    }
    let (mut fours, mut sixes) = (0, 0);
    for net in chosen {
        ensure!(family.wants(net), "{what} {net} does not belong to the lab's IP family");
        *(if matches!(net, IpNet::V4(_)) { &mut fours } else { &mut sixes }) += 1;
    }
    ensure!(
        (fours > 0) == family.has_v4() && (sixes > 0) == family.has_v6(),
        "{what} is not given for every IP family of the lab"
    );
    ensure!(!one_each || (fours <= 1 && sixes <= 1), "{what} is given twice for one IP family");
    Ok(chosen.to_vec())
}

fn refuse_overlaps(named: &[(&str, &[IpNet])]) -> Result<()> {
    let all: Vec<(&str, &IpNet)> =
        named.iter().flat_map(|(name, nets)| nets.iter().map(move |net| (*name, net))).collect();
    for (index, (name, net)) in all.iter().enumerate() {
        for (other_name, other) in all.iter().skip(index + 1) {
            ensure!(
                !net.contains(&other.network()) && !other.contains(&net.network()),
                "{name} {net} and {other_name} {other} overlap: choose disjoint ranges"
            );
        }
    }
    Ok(())
}

impl ClusterSpec {
    /// Decides everything that [`UpOptions`] leave open, and refuses ranges that overlap or are too small.
    pub fn plan(options: &UpOptions, api_port: u16) -> Result<Self> {
        let family = options.ip_family;
        ensure!((1..=MOST_NODES).contains(&options.nodes), "a lab has 1 to {MOST_NODES} nodes, not {}", options.nodes);
        let pod_cidrs = ranges(
            "the pod range",
            &options.pod_cidrs,
            vec![v4(10, 244, 0, 0, 16)?, v6("fd00:10:244::", 56)?],
            family,
            true,
        )?;
        let service_cidrs = ranges(
            "the Service range",
            &options.service_cidrs,
            vec![v4(10, 96, 0, 0, 12)?, v6("fd00:10:96::", 112)?],
            family,
            true,
        )?;
        let underlay = ranges(
            "the underlay",
            &options.underlay,
            vec![v4(192, 168, 255, 1, 24)?, v6("fd00:255::1", 64)?],
            family,
            true,
        )?;
        let outside = ranges(
            "the outside network",
            &options.outside,
            vec![v4(192, 168, 26, 1, 24)?, v6("fd00:26::1", 64)?, v4(203, 0, 113, 1, 24)?, v6("2001:db8:113::1", 64)?],
            family,
            false,
        )?;
        refuse_overlaps(&[
            ("pod range", &pod_cidrs),
            ("Service range", &service_cidrs),
            ("underlay", &underlay),
            ("outside network", &outside),
        ])?;
        Ok(Self {
            name: options.name.clone(),
            ip_family: family,
            dns_addresses: service_cidrs.iter().map(|net| nth_address(net, 10)).collect::<Result<_>>()?,
            nodes: (1..=options.nodes)
                .map(|number| plan_node(number, &underlay, &pod_cidrs, options.node_cidr_mask_size))
                .collect::<Result<_>>()?,
            outside: plan_outside(&outside)?,
            pod_cidrs,
            node_cidr_mask_size: options.node_cidr_mask_size,
            service_cidrs,
            underlay,
            api_port,
            cni_conf: read_cni_conf(options)?,
            cni_bin_dirs: cni_bin_dirs(options),
            program: options.program.clone(),
            program_args: options.program_args.clone(),
            agent_config: options.agent_config.clone(),
        })
    }

    /// The node that comes next: the first number that none has, so one that was deleted comes back with its name, addresses and ranges.
    ///
    /// # Errors
    ///
    /// A range has nothing left for it.
    pub(crate) fn next_node(&self) -> Result<NodeSpec> {
        let taken = |number: &usize| self.nodes.iter().any(|node| node.name == format!("n{number}"));
        let number = (1..=MOST_NODES).find(|number| !taken(number));
        let number = number.with_context(|| format!("lab {} has {MOST_NODES} nodes, which is the most", self.name))?;
        let node = plan_node(number, &self.underlay, &self.pod_cidrs, self.node_cidr_mask_size)?;
        for range in self.load_balancer_pools() {
            if let Some(address) = node.addresses.iter().map(IpNet::addr).find(|address| range.contains(address)) {
                bail!("{address} would be node {}'s, and load balancers have it: the underlay is too small", node.name);
            }
        }
        Ok(node)
    }

    /// Addresses on the underlay for Services of type LoadBalancer: the last forty of an IPv4 network (without its broadcast address), or as
    /// many as are free above the nodes; 256 of an IPv6 network.
    pub(crate) fn load_balancer_ranges(&self) -> Vec<String> {
        self.load_balancer_pools().iter().map(|range| format!("{}-{}", range.start(), range.end())).collect()
    }

    fn load_balancer_pools(&self) -> Vec<RangeInclusive<IpAddr>> {
        let highest = |net: &IpNet| {
            let nodes = self.nodes.iter().flat_map(|node| &node.addresses).map(IpNet::addr);
            nodes.chain([net.addr()]).filter(|address| net.contains(address)).max()
        };
        let range = |net: &IpNet| match (net, highest(net)?) {
            (IpNet::V4(v4), IpAddr::V4(highest)) => {
                let last = u32::from(v4.broadcast()).checked_sub(1)?;
                let first = last.saturating_sub(39).max(u32::from(highest).saturating_add(1));
                (first <= last).then(|| Ipv4Addr::from(first).into()..=Ipv4Addr::from(last).into())
            }
            (IpNet::V6(_), _) => Some(nth_address(net, 0x1000).ok()?..=nth_address(net, 0x10ff).ok()?),
            _ => None,
        };
        self.underlay.iter().filter_map(range).collect()
    }

    /// The node called `name`.
    pub fn node(&self, name: &str) -> Result<&NodeSpec> {
        self.nodes.iter().find(|node| node.name == name).with_context(|| {
            let known: Vec<&str> = self.nodes.iter().map(|n| n.name.as_str()).collect();
            format!("lab {} has no node {name:?}; it has {}", self.name, known.join(", "))
        })
    }
}

/// The node `n<number>`, counted from 1.
fn plan_node(number: usize, underlay: &[IpNet], pod_cidrs: &[IpNet], mask: u8) -> Result<NodeSpec> {
    let longest = 30;
    ensure!(mask <= longest, "a node's pod range of length {mask} holds no pod: give at most {longest}");
    let offset = u32::try_from(number)?;
    let addresses = underlay
        .iter()
        .map(|net| Ok(IpNet::new(nth_address(net, 10 + offset)?, net.prefix_len())?))
        .collect::<Result<_>>()?;
    let pods = pod_cidrs.iter().map(|net| node_range(net, mask, number - 1)).collect::<Result<_>>()?;
    Ok(NodeSpec { name: format!("n{number}"), addresses, pod_cidrs: pods })
}

/// The node's share of the pod range: of IPv4 as long as is asked for, a /64 of IPv6, as Kubernetes' controller cuts it.
fn node_range(cluster: &IpNet, mask: u8, index: usize) -> Result<IpNet> {
    let length = match cluster {
        IpNet::V4(_) => mask,
        IpNet::V6(_) => 64,
    };
    cluster.subnets(length.max(cluster.prefix_len()))?.nth(index).with_context(|| {
        format!("the pod range {cluster} has no /{length} left for node n{}; choose a larger range", index + 1)
    })
}

fn plan_outside(gateways: &[IpNet]) -> Result<Vec<OutsideHost>> {
    let fours: Vec<&IpNet> = gateways.iter().filter(|net| matches!(net, IpNet::V4(_))).collect();
    let sixes: Vec<&IpNet> = gateways.iter().filter(|net| matches!(net, IpNet::V6(_))).collect();
    let mut hosts = Vec::new();
    for index in 0..fours.len().max(sixes.len()) {
        let gateways: Vec<IpNet> =
            [fours.get(index), sixes.get(index)].into_iter().flatten().map(|net| **net).collect();
        let addresses = gateways
            .iter()
            .map(|net| {
                Ok(IpNet::new(nth_address(net, if net.addr().is_ipv4() { 10 } else { 0x10 })?, net.prefix_len())?)
            })
            .collect::<Result<_>>()?;
        let netns = if index == 0 { "outside".to_owned() } else { format!("outside{}", index + 1) };
        hosts.push(OutsideHost { netns, addresses, gateways });
    }
    Ok(hosts)
}

fn read_cni_conf(options: &UpOptions) -> Result<Option<String>> {
    let Some(path) = &options.cni_conf else { return Ok(None) };
    let text =
        std::fs::read_to_string(path).with_context(|| format!("read the CNI configuration {}", path.display()))?;
    serde_json::from_str::<serde_json::Value>(&text.replace("$POD_CIDRS", "[]"))
        .with_context(|| format!("{} is not JSON", path.display()))?;
    Ok(Some(text))
}

fn cni_bin_dirs(options: &UpOptions) -> Vec<PathBuf> {
    let own = options.cni_bin_dir.clone().or_else(|| options.program.parent().map(PathBuf::from));
    own.into_iter().chain([PathBuf::from("/usr/lib/cni"), PathBuf::from("/opt/cni/bin")]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> UpOptions {
        UpOptions::new("t".parse().unwrap()).unwrap()
    }

    #[test]
    fn defaults_follow_the_documentation() {
        let spec = ClusterSpec::plan(&UpOptions { ip_family: IpFamily::Dual, ..options() }, 6443).unwrap();
        assert_eq!(spec.dns_addresses, ["10.96.0.10".parse::<IpAddr>().unwrap(), "fd00:10:96::a".parse().unwrap()]);
        let second = &spec.nodes[1];
        assert_eq!(second.name, "n2");
        assert_eq!(second.addresses[0].to_string(), "192.168.255.12/24");
        assert_eq!(second.addresses[1].to_string(), "fd00:255::c/64");
        assert_eq!(second.pod_cidrs[0].to_string(), "10.244.1.0/24");
        assert_eq!(second.pod_cidrs[1].to_string(), "fd00:10:244:1::/64");
        assert_eq!(spec.outside[0].addresses[0].to_string(), "192.168.26.10/24");
        assert_eq!(spec.outside[1].addresses[0].to_string(), "203.0.113.10/24");
    }

    #[test]
    fn load_balancers_get_addresses_of_the_underlay_that_no_node_has() {
        let ranges = |underlay: &[&str], nodes: usize| {
            let underlay = underlay.iter().map(|net| net.parse().unwrap()).collect();
            let spec =
                ClusterSpec::plan(&UpOptions { underlay, nodes, ip_family: IpFamily::Dual, ..options() }, 1).unwrap();
            spec.load_balancer_ranges()
        };
        let usual = ["192.168.255.215-192.168.255.254", "fd00:255::1000-fd00:255::10ff"];
        assert_eq!(ranges(&[], 3), usual);
        assert_eq!(ranges(&[], 200), usual, "nodes end at .210");
        assert_eq!(ranges(&["10.9.0.1/28", "fd00:9::1/64"], 3)[0], "10.9.0.14-10.9.0.14", "nodes are .11 to .13");
    }

    #[test]
    fn the_next_node_takes_the_first_number_that_is_free_and_no_address_of_load_balancers() {
        let plan = |options: &UpOptions| ClusterSpec::plan(options, 1).unwrap();
        let mut spec = plan(&UpOptions { node_cidr_mask_size: 26, ..options() });
        let (second, fourth) = (spec.nodes.remove(1), spec.next_node().unwrap());
        assert_eq!(fourth, second, "it comes back as it was");
        spec.nodes.insert(1, second);
        let fourth = spec.next_node().unwrap();
        assert_eq!((fourth.name.as_str(), fourth.addresses[0].to_string()), ("n4", "192.168.255.14/24".to_owned()));
        assert_eq!(fourth.pod_cidrs[0].to_string(), "10.244.0.192/26");
        let small = plan(&UpOptions { underlay: vec!["10.9.0.1/28".parse().unwrap()], ..options() });
        assert!(small.next_node().unwrap_err().to_string().contains("10.9.0.14"), "of .11 to .14");
        let full = plan(&UpOptions { nodes: MOST_NODES, ..options() });
        assert!(full.next_node().is_err());
    }

    #[test]
    fn overlapping_and_exhausted_ranges_are_refused_by_name() {
        let overlap = UpOptions { pod_cidrs: vec!["10.96.0.0/16".parse().unwrap()], ..options() };
        let error = ClusterSpec::plan(&overlap, 1).unwrap_err().to_string();
        assert!(error.contains("overlap") && error.contains("10.96.0.0/16"), "{error}");
        let small = UpOptions { pod_cidrs: vec!["10.250.0.0/23".parse().unwrap()], ..options() };
        let error = ClusterSpec::plan(&small, 1).unwrap_err().to_string();
        assert!(error.contains("n3"), "{error}");
        let tiny = UpOptions { node_cidr_mask_size: 29, ..options() };
        let second = ClusterSpec::plan(&tiny, 1).unwrap().nodes[1].pod_cidrs[0].to_string();
        assert_eq!(second, "10.244.0.8/29");
        let none = UpOptions { node_cidr_mask_size: 31, ..options() };
        assert!(ClusterSpec::plan(&none, 1).unwrap_err().to_string().contains("holds no pod"));
        let wrong = UpOptions { pod_cidrs: vec!["fd00::/56".parse().unwrap()], ..options() };
        assert!(ClusterSpec::plan(&wrong, 1).is_err());
    }
}
