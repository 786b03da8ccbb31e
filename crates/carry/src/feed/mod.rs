//! The socket between the agent and this process: [`Client`] for the agent, [`server`] here, one framing for both.

pub mod client;
pub(crate) mod frame;
pub(crate) mod server;

pub use client::{Client, FeedError, Status, counters, is_of_this_pid_namespace};
