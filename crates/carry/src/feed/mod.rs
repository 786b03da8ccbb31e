//! The socket between the agent and this process: [`Client`] and [`Answers`] for the agent, [`server`] here, one framing for all.

pub mod answers;
pub mod client;
pub(crate) mod frame;
pub(crate) mod server;

pub use answers::Answers;
pub use client::{Client, FeedError, Status, counters, is_of_this_pid_namespace};
