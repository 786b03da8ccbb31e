//! The last words of an agent that cannot run: besides its log, in a file that `towpath status` reads when nobody answers, and as an
//! Event on its node's object when the API server can be reached.

use std::path::Path;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};
use towpath_model::NodeName;
use towpath_wire::config::AgentConfig;
use tracing::warn;

use crate::events::NodeEvents;

/// The API server gets so long to take the Event: the process is to be started again.
const PATIENCE: Duration = Duration::from_secs(3);

/// Why the agent of this node ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastWords {
    /// When.
    pub at: Timestamp,
    /// Why.
    pub error: String,
}

/// Says it wherever it can be said.
pub(crate) async fn report(config: &AgentConfig, error: &anyhow::Error) {
    let words = LastWords { at: Timestamp::now(), error: format!("{error:#}") };
    let path = config.last_words();
    let kept = serde_json::to_vec(&words).map_err(std::io::Error::other);
    if let Err(error) = kept.and_then(|text| crate::disk::write_atomically(&path, &text)) {
        warn!(%error, path = %path.display(), "could not write down why this agent ends");
    }
    let Ok(parsed) = crate::settings::parse_node_name(config) else { return };
    let Ok(client) = crate::api_client::client(config).await else { return };
    let said = tokio::time::timeout(PATIENCE, tell(client, &parsed, &words.error)).await;
    if said.is_err() {
        warn!("the API server took no Event that says why this agent ends");
    }
}

async fn tell(client: kube::Client, node: &NodeName, error: &str) {
    NodeEvents::new(client, node).warn("NetworkAgentFailed", error).await;
}

/// What an agent said at its end, if it did since the machine booted.
pub fn last_words(path: &Path) -> Option<LastWords> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// An agent of this node is ready: what was said before no longer holds.
pub(crate) fn forget(config: &AgentConfig) {
    let _ = std::fs::remove_file(config.last_words());
}
