//! What the agent answers on its Service socket to `towpath service`: one JSON document.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Connections through Services that one node holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeConnections {
    /// The node.
    pub node: String,
    /// Open connections by Service address and backend.
    pub connections: Vec<BackendConnections>,
    /// What is not counted, and why, for people; empty: everything is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub incomplete: Vec<String>,
}

/// The open connections of one Service address to one backend, of clients that this node translates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendConnections {
    /// `TCP`, `UDP` or `SCTP`; another protocol by its number.
    pub protocol: String,
    /// What clients connect to.
    pub service: SocketAddr,
    /// Where they get.
    pub backend: SocketAddr,
    /// How many are open. Of UDP: connected sockets, and flows of the last half minute.
    pub open: u64,
}
