//! Configuration files of `towpath agent`, `towpath carry` and `towpath controller`: JSON, one struct each, every field
//! with a default that works on a node of a kubeadm cluster.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Who does something that another program of the cluster may do too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Duty {
    /// The other program where it runs, else Towpath.
    #[default]
    Auto,
    /// Towpath.
    Towpath,
    /// Not Towpath.
    Off,
}

/// Whether packets for Services are forwarded by the drivers of the devices that they come in by (native XDP), before the kernel has made
/// buffers of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Acceleration {
    /// No.
    #[default]
    Disabled,
    /// Where the driver can, and the device is one of hardware.
    BestEffort,
    /// On every device that leads out; one that cannot is named by `towpath status`, and does without.
    Native,
}

/// How packets get from pod to pod of another node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendName {
    /// Encapsulated in UDP (RFC 7348).
    #[default]
    Vxlan,
    /// As they are, over the node itself, where it is on the same link; else as with [`BackendName::Vxlan`].
    HostGw,
    /// In an IP header alone (RFC 2003, RFC 4213). What needs more than that, and what goes between nodes' IPv6 addresses, as with
    /// [`BackendName::Vxlan`].
    Ipip,
    /// In UDP datagrams that are made in user space (by `towpath carry`). Between nodes' IPv6 addresses as with [`BackendName::Vxlan`].
    Udp,
    /// As they are, between the pods' own MAC addresses: pods are on the link of the node's uplink. Where they cannot be, and for a node on another
    /// link, as with [`BackendName::Vxlan`].
    Macvlan,
}

impl BackendName {
    /// As configurations say it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
            Self::Ipip => "ipip",
            Self::Udp => "udp",
            Self::Macvlan => "macvlan",
        }
    }
}

/// `towpath agent --config FILE`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub struct AgentConfig {
    /// The node's name in Kubernetes; empty: the machine's host name.
    pub node_name: String,
    /// Kubeconfig; none: the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// The API server's URL for the pod's service account, before Services work; none: what `towpath node install` found on
    /// the node ([`AgentConfig::api_server_note`]), else the Service `kubernetes`.
    pub api_server: Option<String>,
    /// bpffs mount under which programs and maps are pinned.
    pub bpffs: PathBuf,
    /// cgroup v2 directory that holds the node's own processes and its pods, or a directory of cgroup v1 hierarchies with such a
    /// one in `unified`; none: the root of the cgroup2 mount.
    pub cgroup: Option<PathBuf>,
    /// Survives reboots: leases, queued DELs.
    pub state_dir: PathBuf,
    /// Does not: sockets.
    pub run_dir: PathBuf,
    /// Where the container runtime looks for CNI configuration; the agent writes its own there, last.
    pub cni_conf_dir: PathBuf,
    /// Where CNI plugins keep their state: leases of a network that was here before.
    pub cni_state_dir: PathBuf,
    /// Pod ranges of the whole cluster, at most one a family.
    pub cluster_cidrs: Vec<ipnet_text::Cidr>,
    /// Service ranges, at most one a family.
    pub service_cidrs: Vec<ipnet_text::Cidr>,
    /// Who serves Services to the node's own processes and to the outside. A node's pods are always served by Towpath.
    pub service_proxy: Duty,
    /// Who answers cluster DNS.
    pub dns: Duty,
    /// Cluster DNS Service addresses, at most one a family; empty: those of the Service `kube-system/kube-dns`.
    pub cluster_dns: Vec<IpAddr>,
    /// Node-local addresses that `towpath carry` answers DNS on, at most one a family.
    pub dns_addresses: Vec<IpAddr>,
    /// Domain of the cluster, without a trailing dot.
    pub cluster_domain: String,
    /// Lowest and highest NodePort.
    pub node_ports: (u16, u16),
    /// At which of a node's addresses NodePorts answer: CIDRs, or `primary` alone; all, if there are none.
    pub node_port_addresses: Vec<String>,
    /// How packets get from pod to pod of another node.
    pub backend: BackendName,
    /// VXLAN network identifier. With other backends, too, what has to come back by this node goes in envelopes.
    pub vxlan_vni: u32,
    /// VXLAN UDP port.
    pub vxlan_port: u16,
    /// UDP port of the backend `udp`.
    pub udp_port: u16,
    /// Uplink device; none: the one that holds the node's address.
    pub uplink: Option<String>,
    /// Devices that lead out of the node besides the uplink, by name or by the beginning of names (`eth*`); none: those with a default route,
    /// and network cards, bonds and VLANs with an address.
    pub devices: Vec<String>,
    /// MTU of pod devices in bytes; none: derived from the uplink.
    pub pod_mtu: Option<u32>,
    /// From one look at what the paths to the other nodes carry to the next, in seconds; 1 at least.
    pub path_round_seconds: u32,
    /// What pods send out of the cluster by IPv4 leaves with their node's address.
    pub masquerade_ipv4: bool,
    /// The same of IPv6.
    pub masquerade_ipv6: bool,
    /// Destinations outside the cluster that see pod addresses untranslated.
    pub non_masquerade_cidrs: Vec<ipnet_text::Cidr>,
    /// Ranges in which Services may have external addresses (`spec.externalIPs`); none: nowhere.
    pub external_cidrs: Vec<ipnet_text::Cidr>,
    /// The node of a Service's endpoint answers clients outside the cluster itself, with the Service's address as source.
    pub direct_server_return: bool,
    /// Whether Services are forwarded by drivers (XDP).
    pub service_acceleration: Acceleration,
    /// How many entries the kernel's tables may hold.
    pub limits: MapLimits,
    /// Prometheus metrics and health; none: not served.
    pub metrics_listen: Option<SocketAddr>,
    /// Answer `:10256/healthz` and `:10249/proxyMode` as callers of kube-proxy expect, while this node's Services are served by us.
    pub kube_proxy_health: bool,
}

/// Limits of the kernel's tables, in entries; none: the default (`towpath_datapath::bpf::Limits`). A limit that is raised is in force
/// when the agent starts with it, without a packet lost; one that is lowered when the node restarts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub struct MapLimits {
    /// Tracked connections, and translations beside them (262144).
    pub connections: Option<u32>,
    /// Service addresses and ports, and NodePorts (65536).
    pub services: Option<u32>,
    /// Places in the lists of all Services' backends (262144).
    pub slots: Option<u32>,
    /// Backends (131072).
    pub backends: Option<u32>,
    /// Pod addresses and ranges that policies can tell apart (131072).
    pub classes: Option<u32>,
    /// Pairs of a policy set and a class (262144).
    pub set_classes: Option<u32>,
    /// Rule rows (1048576).
    pub rules: Option<u32>,
    /// Prefixes of nodes: pod ranges and addresses (65536).
    pub peers: Option<u32>,
    /// Addresses of pods of the node (4096).
    pub pods: Option<u32>,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            node_name: String::new(),
            kubeconfig: None,
            api_server: None,
            bpffs: "/sys/fs/bpf".into(),
            cgroup: None,
            state_dir: "/var/lib/towpath".into(),
            run_dir: "/run/towpath".into(),
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni_state_dir: "/var/lib/cni".into(),
            cluster_cidrs: vec![ipnet_text::Cidr("10.244.0.0/16".to_owned())],
            service_cidrs: vec![ipnet_text::Cidr("10.96.0.0/12".to_owned())],
            service_proxy: Duty::Auto,
            dns: Duty::Auto,
            cluster_dns: Vec::new(),
            dns_addresses: vec![IpAddr::from([169, 254, 116, 10]), IpAddr::from([0xfd00, 0x7470, 0, 0, 0, 0, 0, 0x0a])],
            cluster_domain: "cluster.local".to_owned(),
            node_ports: (30000, 32767),
            node_port_addresses: Vec::new(),
            backend: BackendName::Vxlan,
            vxlan_vni: 116,
            vxlan_port: 8472,
            udp_port: 8285,
            uplink: None,
            devices: Vec::new(),
            pod_mtu: None,
            path_round_seconds: 60,
            masquerade_ipv4: true,
            masquerade_ipv6: true,
            non_masquerade_cidrs: Vec::new(),
            external_cidrs: Vec::new(),
            direct_server_return: false,
            service_acceleration: Acceleration::Disabled,
            limits: MapLimits::default(),
            metrics_listen: None,
            kube_proxy_health: true,
        }
    }
}

impl AgentConfig {
    /// Socket on which the agent takes CNI requests (root only).
    pub fn cni_socket(&self) -> PathBuf {
        self.run_dir.join("cni.sock")
    }

    /// Socket on which the agent answers `towpath status` (root only).
    pub fn status_socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }

    /// Socket on which the agent answers `towpath service` (root only).
    pub fn service_socket(&self) -> PathBuf {
        self.run_dir.join("service.sock")
    }

    /// Socket on which the agent answers which policies are in force, to `towpath policy` (root only).
    pub fn policy_socket(&self) -> PathBuf {
        self.run_dir.join("policy.sock")
    }

    /// Socket on which the agent tells what is dropped, to `towpath observe` (root only).
    pub fn observe_socket(&self) -> PathBuf {
        self.run_dir.join("observe.sock")
    }

    /// Socket on which the agent answers `towpath dns names` (root only).
    pub fn names_socket(&self) -> PathBuf {
        self.run_dir.join("names.sock")
    }

    /// Where an agent that cannot run says why.
    pub fn last_words(&self) -> PathBuf {
        self.run_dir.join("agent.error")
    }

    /// Where `towpath node install` notes the URL of the API server that the node's kubelet talks to.
    pub fn api_server_note(&self) -> PathBuf {
        self.run_dir.join("api-server")
    }

    /// What `towpath node migrate --clean` writes to have the agent put its own tunnel device in the place of Flannel's; the agent
    /// removes it when that is done.
    pub fn take_tunnel_note(&self) -> PathBuf {
        self.run_dir.join("take-tunnel")
    }

    /// Socket on which `towpath carry` takes its feed (root only).
    pub fn carry_socket(&self) -> PathBuf {
        self.run_dir.join(FEED_SOCKET)
    }

    /// Socket on which `towpath carry` takes what it needs for the backend `udp` (root only).
    pub fn carry_udp_socket(&self) -> PathBuf {
        self.run_dir.join(UDP_SOCKET)
    }
}

/// Name of the socket of the feed, below both run directories.
const FEED_SOCKET: &str = "carry.sock";
/// Name of the socket on which queues of the backend `udp` are handed over, below both run directories.
const UDP_SOCKET: &str = "carry-udp.sock";

/// `towpath carry --config FILE`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub struct CarryConfig {
    /// Does not survive reboots: the sockets of the feed and of handing over.
    pub run_dir: PathBuf,
    /// Survives them: the last state that the agent fed.
    pub state_dir: PathBuf,
    /// Addresses to answer on, UDP and TCP port 53; added to the loopback device by the agent.
    pub dns_addresses: Vec<IpAddr>,
    /// Upstream servers for names outside the cluster; empty: those of `resolv_conf`.
    pub upstreams: Vec<SocketAddr>,
    /// The node's own resolver configuration.
    pub resolv_conf: PathBuf,
}

impl CarryConfig {
    /// Socket on which it takes the feed (root only); the agent's [`AgentConfig::carry_socket`].
    pub fn feed_socket(&self) -> PathBuf {
        self.run_dir.join(FEED_SOCKET)
    }

    /// Socket on which it takes what it needs for the backend `udp` (root only); the agent's [`AgentConfig::carry_udp_socket`].
    pub fn udp_socket(&self) -> PathBuf {
        self.run_dir.join(UDP_SOCKET)
    }

    /// Socket on which one carry hands over to the next (root only).
    pub fn handover_socket(&self) -> PathBuf {
        self.run_dir.join("carry-handover.sock")
    }
}

impl Default for CarryConfig {
    fn default() -> Self {
        Self {
            run_dir: "/run/towpath".into(),
            state_dir: "/var/lib/towpath".into(),
            dns_addresses: AgentConfig::default().dns_addresses,
            upstreams: Vec::new(),
            resolv_conf: "/etc/resolv.conf".into(),
        }
    }
}

/// `towpath controller --config FILE`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub struct ControllerConfig {
    /// Kubeconfig; none: the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// The API server's URL for the pod's service account; none: the Service `kubernetes`.
    pub api_server: Option<String>,
    /// Identity in the leader election Lease; empty: the host name.
    pub identity: String,
    /// Namespace of the Lease.
    pub namespace: String,
    /// Give nodes without podCIDRs a range out of these, at most one a family; empty: leave that to others.
    pub cluster_cidrs: Vec<ipnet_text::Cidr>,
    /// Prefix length of a node's IPv4 range.
    pub node_mask_v4: u8,
    /// Prefix length of a node's IPv6 range.
    pub node_mask_v6: u8,
}

impl Default for ControllerConfig {
    fn default() -> Self {
        Self {
            kubeconfig: None,
            api_server: None,
            identity: String::new(),
            namespace: "kube-system".to_owned(),
            cluster_cidrs: vec![ipnet_text::Cidr("10.244.0.0/16".to_owned())],
            node_mask_v4: 24,
            node_mask_v6: 64,
        }
    }
}

/// CIDRs as text: this crate has no parser for them; `model` does.
pub mod ipnet_text {
    use serde::{Deserialize, Serialize};

    /// A CIDR as written, for example `10.244.0.0/16`.
    #[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct Cidr(pub String);
}
