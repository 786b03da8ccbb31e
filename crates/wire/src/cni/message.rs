//! Messages between `towpath-cni` and the agent, and between `towpath ipam` and the agent.
//!
//! One request and one reply a connection, on a unix stream socket: a length of 4 bytes, big-endian, at most
//! [`MAX_MESSAGE`], then JSON. The file descriptor of the container's network namespace (ADD, CHECK) travels with the
//! length, as SCM_RIGHTS. Unknown fields are ignored, so plugin and agent need not be upgraded together.

use serde::{Deserialize, Serialize};

use super::{AddResult, Attachment, CniError};
use crate::ipam::NodeAddresses;

/// Largest message in bytes.
pub const MAX_MESSAGE: usize = 4 << 20;

/// What the plugin asks, and `towpath ipam`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "camelCase")]
pub enum Request {
    /// Attach a container. Comes with its network namespace.
    Add(AddRequest),
    /// Detach it.
    Del(DelRequest),
    /// Is it still as it was made? Comes with its network namespace.
    Check(CheckRequest),
    /// Remove every attachment of the network that is not listed.
    Gc {
        /// Name of the network.
        network: String,
        /// Those still in use.
        valid: Vec<Attachment>,
    },
    /// Can an ADD be served?
    Status {
        /// Name of the network.
        network: String,
    },
    /// Not a runtime's: what of the node's addresses does not fit together (`towpath ipam check`).
    Addresses {
        /// Repair what can be, first.
        repair: bool,
    },
}

/// Attach a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddRequest {
    /// The container and interface.
    #[serde(flatten)]
    pub attachment: Attachment,
    /// Name of the network.
    pub network: String,
    /// Path of the network namespace as the runtime knows it: only repeated in the result.
    pub netns: String,
    /// The pod it is the sandbox of; none: a container that Kubernetes does not know.
    pub pod: Option<PodIdentity>,
    /// Limits that the runtime asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<RuntimeBandwidth>,
}

/// What a container may receive and send, in bits a second, as the capability `bandwidth` has it (CONVENTIONS.md of the CNI
/// specification). 0: as much as it can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RuntimeBandwidth {
    /// What it receives.
    pub ingress_rate: u64,
    /// What it sends.
    pub egress_rate: u64,
}

/// Detach a container. Also the content of a file in the queue of DELs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DelRequest {
    /// The container and interface.
    #[serde(flatten)]
    pub attachment: Attachment,
    /// Name of the network.
    pub network: String,
}

/// Compare a container with what ADD answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckRequest {
    /// The container and interface.
    #[serde(flatten)]
    pub attachment: Attachment,
    /// Name of the network.
    pub network: String,
    /// Path of the network namespace as the runtime knows it.
    pub netns: String,
    /// What the whole list of plugins answered to ADD.
    pub prev_result: AddResult,
}

/// Which pod a sandbox belongs to (`CNI_ARGS`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodIdentity {
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_UID`; empty when the runtime does not say.
    #[serde(default)]
    pub uid: String,
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "camelCase")]
pub enum Reply {
    /// To ADD.
    Added {
        /// What was made.
        result: AddResult,
    },
    /// To the rest: done, or all is well.
    Done,
    /// To what is not a runtime's.
    Addresses {
        /// The node's addresses.
        addresses: NodeAddresses,
    },
    /// It failed.
    Failed {
        /// Why.
        error: CniError,
    },
}
