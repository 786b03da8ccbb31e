//! The client of the API server: by a kubeconfig, or as the pod that this agent is.

use std::time::Duration;

use anyhow::{Context, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};
use towpath_wire::config::AgentConfig;
use tracing::info;

use crate::settings;

/// By the configuration's kubeconfig; without one, by the pod's service account, at the address that the node's kubelet has for the server.
///
/// # Errors
/// The kubeconfig cannot be used, or this is no pod with a service account.
pub(crate) async fn client(config: &AgentConfig) -> Result<kube::Client> {
    let mut kube_config = match &config.kubeconfig {
        Some(path) => {
            let parsed = Kubeconfig::read_from(path).with_context(|| {
                format!(
                    "could not read the kubeconfig {}: check kubeconfig in the agent's configuration",
                    path.display()
                )
            })?;
            kube::Config::from_custom_kubeconfig(parsed, &KubeConfigOptions::default()).await?
        }
        None => {
            let mut own = kube::Config::incluster()
                .context("no kubeconfig is configured, and this is no pod with a service account")?;
            // The Service `kubernetes` is an address that this very agent has to make work.
            if let Some(url) = settings::api_server(config) {
                info!(url, "the API server");
                own.cluster_url =
                    url.parse().with_context(|| format!("apiServer: {url:?} is no URL (https://HOST:PORT)"))?;
            }
            own
        }
    };
    // Shorter than an ADD waits for a pod it does not know: a server that swallows packets must not look like a slow one.
    kube_config.connect_timeout = Some(Duration::from_secs(1));
    Ok(towpath_api::client(kube_config)?)
}
