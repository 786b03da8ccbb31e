//! CNI (specification 1.1.0) types, and the messages between `towpath-cni` and the agent.
//!
//! Configurations of versions 0.3.1 to 1.1.0 are understood, and results are written in the shape of the version that the
//! configuration asks for. Parsing never panics and every refusal is a [`CniError`] with the specification's code.

mod attachment;
mod config;
mod error;
mod message;
mod prefix;
mod result;
mod version;

pub use attachment::{Attachment, Malformed};
pub use config::NetworkConfig;
pub use error::{CniError, ErrorCode};
pub use message::{AddRequest, CheckRequest, DelRequest, MAX_MESSAGE, PodIdentity, Reply, Request, RuntimeBandwidth};
pub use prefix::Prefix;
pub use result::{AddResult, Dns, Interface, IpConfig, Route};
pub use version::Version;

/// Default of the configuration's `runDir`: the agent's socket `cni.sock` is in it.
pub const DEFAULT_RUN_DIR: &str = "/run/towpath";
/// Default of the configuration's `stateDir`: DELs that the agent could not take are queued in `deletes/` in it.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/towpath";
/// Name of the agent's socket in the run directory.
pub const SOCKET_NAME: &str = "cni.sock";
/// Name of the file beside the agent's socket whose time of change says when the agent was last ready.
pub const READY_NAME: &str = "last-ready";
/// Name of the directory of queued DELs in the state directory.
pub const DELETES_NAME: &str = "deletes";

#[cfg(test)]
mod tests;
