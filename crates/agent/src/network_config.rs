//! The cluster-wide `NetworkConfig`: read at the start, and followed. How it is laid over the agent's own configuration is
//! [`towpath_plan::config`]'s.
//!
//! What was read last is kept on disk, so that an agent which starts while the API server is away has the same configuration as
//! before. With a change that can be used the agent starts anew within its process; what is in the kernel goes on meanwhile. What says the
//! same under another generation (a change taken back, an object deleted and made again) is in force already: only its generation is told.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use kube::api::Api;
use kube::runtime::watcher::{self, Event};
use serde::{Deserialize, Serialize};
use tokio::sync::watch as channel;
use towpath_model::custom::{NETWORK_CONFIG_NAME, NetworkConfig, NetworkConfigSpec};
use towpath_wire::config::AgentConfig;
use tracing::{debug, error, info, warn};

use crate::relist::Watch;

/// How long the start waits for the API server before it goes on with what is kept.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is in force of the `NetworkConfig`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InForce {
    /// `metadata.generation`; none: there is no such object.
    pub generation: Option<i64>,
    /// Its spec.
    pub spec: NetworkConfigSpec,
}

impl InForce {
    fn of(object: Option<NetworkConfig>) -> Self {
        object.map_or_else(Self::default, |object| Self { generation: object.metadata.generation, spec: object.spec })
    }
}

fn file(config: &AgentConfig) -> PathBuf {
    config.state_dir.join("network-config.json")
}

/// Reads the object; what was in force before, when the API server does not answer or `usable` does not take what it says. What is
/// returned was taken by `usable`, or says nothing.
///
/// # Errors
/// What is to be kept cannot be written.
pub async fn read(
    client: &kube::Client,
    config: &AgentConfig,
    usable: impl Fn(&NetworkConfigSpec) -> Result<()>,
) -> Result<InForce> {
    let api: Api<NetworkConfig> = Api::all(client.clone());
    // A definition that is not installed answers as an object that is not there: 404.
    let why = match tokio::time::timeout(PATIENCE, api.get_opt(NETWORK_CONFIG_NAME)).await {
        Ok(Ok(object)) => {
            let now = InForce::of(object);
            match usable(&now.spec) {
                Ok(()) => {
                    keep(config, &now)?;
                    return Ok(now);
                }
                Err(reason) => format!("{reason:#}"),
            }
        }
        Ok(Err(refused)) => refused.to_string(),
        Err(_) => "the API server does not answer".to_owned(),
    };
    error!(why, "NetworkConfig {NETWORK_CONFIG_NAME} cannot be used; going on with what was in force before");
    Ok(kept(&file(config)).filter(|kept| usable(&kept.spec).is_ok()).unwrap_or_default())
}

fn keep(config: &AgentConfig, now: &InForce) -> Result<()> {
    let path = file(config);
    if kept(&path).as_ref() == Some(now) {
        return Ok(());
    }
    crate::disk::write_atomically(&path, &serde_json::to_vec_pretty(now)?)
        .with_context(|| format!("could not write {}", path.display()))
}

fn kept(path: &Path) -> Option<InForce> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Ends when the object says something else than what is in force, and `usable` takes it: it is kept for the next start. `generation`
/// is that of the object that says what is in force.
pub async fn changed(
    client: kube::Client,
    config: AgentConfig,
    mut in_force: InForce,
    generation: channel::Sender<Option<i64>>,
    usable: impl Fn(&NetworkConfigSpec) -> Result<()>,
) {
    let api: Api<NetworkConfig> = Api::all(client);
    let only = watcher::Config::default().fields(&format!("metadata.name={NETWORK_CONFIG_NAME}"));
    let mut events = Watch::new(api, only);
    let mut listed = None;
    loop {
        let now = match events.next().await {
            Ok(Event::Init) => {
                listed = None;
                continue;
            }
            Ok(Event::InitApply(object)) => {
                listed = Some(object);
                continue;
            }
            Ok(Event::InitDone) => InForce::of(listed.take()),
            Ok(Event::Apply(object)) => InForce::of(Some(object)),
            Ok(Event::Delete(_)) => InForce::default(),
            Err(error) => {
                // Also while the definition is not installed.
                debug!(%error, "watch of NetworkConfig interrupted; listing again");
                continue;
            }
        };
        if now == in_force {
            continue;
        }
        if now.spec == in_force.spec {
            if let Err(reason) = keep(&config, &now) {
                // What it would be good for is a start without the API server, with the same spec either way.
                warn!("{reason:#}");
            }
            info!(generation = ?now.generation, "NetworkConfig {NETWORK_CONFIG_NAME} says what is in force already");
            generation.send_replace(now.generation);
            in_force = now;
            continue;
        }
        match usable(&now.spec).and_then(|()| keep(&config, &now)) {
            Ok(()) => {
                info!(generation = ?now.generation, "NetworkConfig {NETWORK_CONFIG_NAME} changed: starting again with it");
                return;
            }
            Err(reason) => error!("{reason:#}; going on with the one before"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_again_and_damage_counts_as_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let config = AgentConfig { state_dir: dir.path().to_owned(), ..AgentConfig::default() };
        let path = file(&config);
        assert_eq!(kept(&path), None);
        let spec = NetworkConfigSpec { mtu: Some(1300), ..NetworkConfigSpec::default() };
        let in_force = InForce { generation: Some(3), spec };
        keep(&config, &in_force).unwrap();
        assert_eq!(kept(&path), Some(in_force));
        std::fs::write(&path, "{").unwrap();
        assert_eq!(kept(&path), None);
    }
}
