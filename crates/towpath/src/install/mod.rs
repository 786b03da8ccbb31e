//! `towpath install`, `towpath uninstall` and `towpath node …`: the objects that put Towpath into a Kubernetes cluster, and what
//! their containers do on a node.
//!
//! There is one source: `deploy/kustomize/`, embedded here. `towpath install` prints it with the values it is asked for in a few
//! named places ([`manifests`]); `deploy/towpath.yaml` is what it prints without options, and the Helm chart has template
//! expressions in the same places ([`chart`]). Tests hold all of them together.

#[cfg(test)]
mod chart;
#[cfg(test)]
mod check_tests;
mod manifests;
mod migrate;
mod node;
#[cfg(test)]
mod objects_tests;
mod uninstall;

/// The image when none is named.
pub(crate) use manifests::IMAGE as DEFAULT_IMAGE;

use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};
use ipnet::IpNet;
use towpath_wire::config::{self, AgentConfig, ControllerConfig};

use manifests::Values;
pub(crate) use node::{Command as NodeCommand, run as run_node};

/// Options of `towpath install`; a default is that of a kubeadm cluster.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// The image of all containers.
    #[arg(long, default_value = manifests::IMAGE)]
    image: String,
    /// Pod range of the cluster (kubeadm's --pod-network-cidr); once a family.
    #[arg(long = "cluster-cidr", value_name = "CIDR", value_delimiter = ',', default_value = "10.244.0.0/16")]
    cluster_cidrs: Vec<IpNet>,
    /// Service range of the cluster (kubeadm's --service-cidr); once a family.
    #[arg(long = "service-cidr", value_name = "CIDR", value_delimiter = ',', default_value = "10.96.0.0/12")]
    service_cidrs: Vec<IpNet>,
    /// Who serves Services to nodes and to the outside; pods are served by Towpath in any case.
    #[arg(long, value_enum, default_value = "auto")]
    service_proxy: Duty,
    /// Who answers cluster DNS. With towpath the Service kube-dns is part of what is printed.
    #[arg(long, value_enum, default_value = "auto")]
    dns: Duty,
    /// With --dns towpath: address of the Service kube-dns, as kubelets have it in clusterDNS; once a family [default: the
    /// tenth of each Service range].
    #[arg(long = "cluster-dns", value_name = "IP", value_delimiter = ',')]
    cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster.
    #[arg(long, default_value = "cluster.local")]
    cluster_domain: String,
    /// The API server, https://HOST:PORT [default: the one that each node's kubelet talks to, by /etc/kubernetes/kubelet.conf].
    #[arg(long, value_name = "URL")]
    api_server: Option<String>,
    /// MTU of pods' devices in bytes [default: what the ways between nodes carry].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1280..=65535))]
    mtu: Option<u32>,
    /// Destination outside the cluster that sees pods' own addresses; may be repeated.
    #[arg(long = "non-masquerade-cidr", value_name = "CIDR", value_delimiter = ',')]
    non_masquerade_cidrs: Vec<IpNet>,
    /// UDP port of the tunnel.
    #[arg(long, default_value_t = 8472, value_parser = clap::value_parser!(u16).range(1..))]
    vxlan_port: u16,
    /// Replicas of the controller.
    #[arg(long, default_value_t = 2)]
    controller_replicas: u8,
}

/// Options of `towpath uninstall`.
#[derive(clap::Args, Debug)]
pub(crate) struct UninstallOptions {
    /// The image of all containers.
    #[arg(long, default_value = manifests::IMAGE)]
    image: String,
}

/// Who does something that another program of the cluster may do too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Duty {
    /// The other program (kube-proxy, CoreDNS) where it runs, else Towpath.
    Auto,
    /// Towpath, on every node.
    Towpath,
    /// Not Towpath.
    Off,
}

impl From<Duty> for config::Duty {
    fn from(duty: Duty) -> Self {
        match duty {
            Duty::Auto => Self::Auto,
            Duty::Towpath => Self::Towpath,
            Duty::Off => Self::Off,
        }
    }
}

/// The tenth address of a range, where kubeadm puts `kube-dns`.
fn tenth(range: &IpNet) -> Result<IpAddr> {
    let address = match range.network() {
        IpAddr::V4(network) => u32::from(network).checked_add(10).map(|bits| IpAddr::from(bits.to_be_bytes())),
        IpAddr::V6(network) => u128::from(network).checked_add(10).map(|bits| IpAddr::from(bits.to_be_bytes())),
    };
    address
        .filter(|address| range.contains(address))
        .with_context(|| format!("the Service range {range} has no tenth address: give --cluster-dns"))
}

fn one_a_family<T>(option: &str, list: &[T], is_v4: impl Fn(&T) -> bool) -> Result<()> {
    let v4 = list.iter().filter(|item| is_v4(item)).count();
    ensure!(v4 <= 1 && list.len() - v4 <= 1, "{option}: at most one of each address family");
    Ok(())
}

impl Options {
    fn values(&self) -> Result<Values> {
        ensure!(
            !self.image.is_empty() && !self.image.contains(char::is_whitespace),
            "--image: {:?} names none",
            self.image
        );
        ensure!(
            !self.cluster_cidrs.is_empty() && !self.service_cidrs.is_empty(),
            "a cluster has pod and Service ranges"
        );
        let v4 = |net: &IpNet| net.addr().is_ipv4();
        one_a_family("--cluster-cidr", &self.cluster_cidrs, v4)?;
        one_a_family("--service-cidr", &self.service_cidrs, v4)?;
        one_a_family("--cluster-dns", &self.cluster_dns, IpAddr::is_ipv4)?;
        if let Some(url) = &self.api_server {
            check_url(url)?;
        }
        let cluster_dns = match (self.dns, self.cluster_dns.as_slice()) {
            (Duty::Auto | Duty::Off, []) => Vec::new(),
            (Duty::Auto | Duty::Off, _) => bail!("--cluster-dns goes with --dns towpath"),
            (Duty::Towpath, []) => self.service_cidrs.iter().map(tenth).collect::<Result<_>>()?,
            (Duty::Towpath, given) => {
                for address in given {
                    let inside = self.service_cidrs.iter().any(|range| range.contains(address));
                    ensure!(
                        inside,
                        "--cluster-dns: {address} is in none of the Service ranges {:?}",
                        self.service_cidrs
                    );
                }
                given.to_vec()
            }
        };
        let values = Values {
            image: self.image.clone(),
            cluster_cidrs: self.cluster_cidrs.iter().map(|net| net.trunc().to_string()).collect(),
            service_cidrs: self.service_cidrs.iter().map(|net| net.trunc().to_string()).collect(),
            service_proxy: self.service_proxy.into(),
            dns: self.dns.into(),
            cluster_dns,
            cluster_domain: self.cluster_domain.clone(),
            api_server: self.api_server.clone(),
            mtu: self.mtu,
            non_masquerade_cidrs: self.non_masquerade_cidrs.iter().map(|net| net.trunc().to_string()).collect(),
            vxlan_port: self.vxlan_port,
            controller_replicas: self.controller_replicas,
            carry_probe: match self.cluster_cidrs.iter().any(v4) {
                true => "169.254.116.10",
                false => "fd00:7470::a",
            },
        };
        check_processes(&values)?;
        Ok(values)
    }
}

fn check_url(url: &str) -> Result<()> {
    let parsed: http::Uri = url.parse().with_context(|| format!("--api-server {url:?}"))?;
    let whole = parsed.scheme_str() == Some("https") && parsed.host().is_some() && matches!(parsed.path(), "" | "/");
    ensure!(whole, "--api-server: {url:?} is not https://HOST:PORT");
    Ok(())
}

/// What the processes will read is read here as they do: a range that overlaps is found before it is in a cluster.
fn check_processes(values: &Values) -> Result<()> {
    let data = manifests::config_data(values)?;
    let agent: AgentConfig = serde_saphyr::from_str(data.get("agent.yaml").map_or("", String::as_str))?;
    towpath_plan::config::parse(&agent)?;
    let _: ControllerConfig = serde_saphyr::from_str(data.get("controller.yaml").map_or("", String::as_str))?;
    Ok(())
}

/// `towpath install`: prints.
///
/// # Errors
/// Options that do not go together.
pub(crate) fn run(options: &Options) -> Result<bool> {
    crate::print(manifests::install(&options.values()?)?.trim_end())?;
    Ok(true)
}

/// `towpath uninstall`: prints the DaemonSet that cleans every node.
///
/// # Errors
/// The output cannot be written.
pub(crate) fn run_uninstall(options: &UninstallOptions) -> Result<bool> {
    let values = Values { image: options.image.clone(), ..Values::default() };
    crate::print(manifests::uninstall(&values)?.trim_end())?;
    Ok(true)
}
