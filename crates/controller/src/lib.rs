//! Cluster-wide duties under a Lease: pod ranges of nodes, addresses of load balancers, and the status of the `NetworkConfig`.
//!
//! Any number of replicas run; one leads at a time ([`towpath_plan::election`]) and does the work ([`node_ranges`], [`load_balancers`],
//! [`network_status`]). What is decided is
//! decided by pure functions; this crate only watches and writes.
#![forbid(unsafe_code)]

mod events;
mod lease;
mod load_balancers;
mod network_status;
mod node_ranges;
mod watched;

use std::path::PathBuf;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio_util::sync::CancellationToken;
use towpath_plan::cluster_cidrs::{ClusterRanges, RangeError};
use towpath_wire::config::ControllerConfig;

/// Why the controller cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// A range in the configuration is no CIDR.
    #[error("clusterCidrs: {text:?} is no CIDR: {source}")]
    Cidr {
        /// As configured.
        text: String,
        /// Why.
        source: ipnet::AddrParseError,
    },
    /// The ranges cannot be used together.
    #[error("clusterCidrs: {0}")]
    Ranges(#[from] RangeError),
    /// The API server's address is none.
    #[error("apiServer: {text:?} is no URL (https://HOST:PORT): {source}")]
    ApiServer {
        /// As configured.
        text: String,
        /// Why.
        source: http::uri::InvalidUri,
    },
    /// The kubeconfig cannot be used.
    #[error("kubeconfig {path}: {source}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        source: kube::config::KubeconfigError,
    },
    /// Not in a pod with a service account.
    #[error("no kubeconfig is given, and there is no service account here: {0}")]
    InCluster(#[from] kube::config::InClusterError),
    /// No client could be made.
    #[error("cannot talk to the Kubernetes API: {0}")]
    Client(#[from] kube::Error),
    /// The replica has no name.
    #[error("no identity is configured, and the host name cannot be read: {0}")]
    Identity(std::io::Error),
}

/// Runs a replica until `shutdown`: waits to lead, and works while it does.
///
/// # Errors
/// The configuration is wrong, or no client can be made of it. Errors of the API afterwards are logged and retried.
pub async fn run(config: ControllerConfig, shutdown: CancellationToken) -> Result<(), ControllerError> {
    let mut cidrs = Vec::new();
    for cidr in &config.cluster_cidrs {
        let parsed = cidr.0.parse().map_err(|source| ControllerError::Cidr { text: cidr.0.clone(), source })?;
        cidrs.push(parsed);
    }
    let ranges = ClusterRanges::new(&cidrs, config.node_mask_v4, config.node_mask_v6)?;
    let client = client(&config).await?;
    let identity = identity(&config)?;
    if cidrs.is_empty() {
        tracing::info!("clusterCidrs is empty: nodes get their pod ranges from somebody else");
    }
    tracing::info!(%identity, ?cidrs, "controller started");
    lease::lead(&client, &config.namespace, &identity, &shutdown, |leading| {
        let (client, identity) = (client.clone(), identity.clone());
        let ranges = (!cidrs.is_empty()).then(|| ranges.clone());
        let cidrs = cidrs.clone();
        async move {
            let status = network_status::work(client.clone(), leading.clone());
            let balancers = load_balancers::work(client.clone(), cidrs, identity.clone(), leading.clone());
            let ranges = async {
                match ranges {
                    Some(ranges) => node_ranges::work(client, ranges, identity, leading).await,
                    None => leading.cancelled().await,
                }
            };
            // None of them ends by itself: where one does, somebody else is to try.
            tokio::select! {
                () = status => {}
                () = balancers => {}
                () = ranges => {}
            }
        }
    })
    .await;
    Ok(())
}

async fn client(config: &ControllerConfig) -> Result<Client, ControllerError> {
    let config = match &config.kubeconfig {
        None => {
            let mut own = Config::incluster()?;
            if let Some(url) = &config.api_server {
                own.cluster_url =
                    url.parse().map_err(|source| ControllerError::ApiServer { text: url.clone(), source })?;
            }
            own
        }
        Some(path) => {
            let wrong = |source| ControllerError::Kubeconfig { path: path.clone(), source };
            let kubeconfig = Kubeconfig::read_from(path).map_err(wrong)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(wrong)?
        }
    };
    Ok(towpath_api::client(config)?)
}

/// The configured identity, else the host name, which in Kubernetes is the pod's.
fn identity(config: &ControllerConfig) -> Result<String, ControllerError> {
    if !config.identity.is_empty() {
        return Ok(config.identity.clone());
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(ControllerError::Identity)?;
    Ok(name.trim().to_owned())
}
