//! What the embedder decides: where state lives, which ranges Services get, and who may log in with which token.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use ipnet::IpNet;

use crate::auth::UserInfo;

/// When a write is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// After it is synced to disk (group commit: writes that arrive together share one sync).
    Synced,
    /// As soon as it is visible; it reaches the disk within about 5 ms. A crash of the process may lose that much.
    Relaxed,
}

/// Configuration of one API server.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory of the database, the CA and the token key; created with mode 0700 when absent.
    pub data_dir: PathBuf,
    /// Service address ranges, first the primary family, at most one of each family. Default `10.96.0.0/12`.
    pub service_cidrs: Vec<IpNet>,
    /// Ports that `NodePort` Services get. Default 30000–32767, as kube-apiserver has it.
    pub node_port_range: RangeInclusive<u16>,
    /// Addresses and port under which pods reach this server: the endpoints of the Service `default/kubernetes`.
    /// Empty: that Service has no endpoints.
    pub advertise: Vec<(IpAddr, u16)>,
    /// Further names and addresses for the serving certificate; the usual ones (`localhost`, `127.0.0.1`, `::1`,
    /// `kubernetes.default.svc…`, the first Service address, the advertised addresses) are always in it.
    pub certificate_names: Vec<String>,
    /// Bearer tokens and whom they stand for.
    pub tokens: Vec<(String, UserInfo)>,
    /// When writes are answered.
    pub durability: Durability,
    /// Whether pods get the `kube-api-access` token volume as the ServiceAccount admission plugin adds it.
    pub mount_service_account_tokens: bool,
    /// Whether requests without credentials are served as `system:anonymous` (RBAC then allows them health and version).
    pub anonymous: bool,
}

impl Config {
    /// The defaults of a kubeadm cluster, with state in `data_dir`.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            service_cidrs: "10.96.0.0/12".parse().into_iter().collect(),
            node_port_range: 30000..=32767,
            advertise: Vec::new(),
            certificate_names: Vec::new(),
            tokens: Vec::new(),
            durability: Durability::Synced,
            mount_service_account_tokens: true,
            anonymous: true,
        }
    }
}
