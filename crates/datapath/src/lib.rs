//! Every effect of Towpath on the kernel of one node.
//!
//! [`Datapath`] is the door: open it once, hand it what should be ([`towpath_model::desired`]), and it makes the kernel so
//! by difference, adopting what is there. Beneath it [`bpf`] owns kernel programs and maps, [`net`] devices, addresses,
//! routes and nftables. Nothing here decides what should be; nothing that is not ours is changed or deleted.

pub mod abi;
pub mod bpf;
pub mod datagrams;
mod error;
mod facade;
pub mod memory;
pub mod net;
mod node;
pub mod predecessor;
mod records;
mod requests;
#[cfg(test)]
mod testing;
pub mod udp_names;
mod uninstall;
mod worker;

pub use error::Error;
pub use facade::Datapath;
pub use requests::{
    Applied, AttachRequest, CheckRequest, DatapathConfig, NodeFacts, NodeStatus, PodMtu, PodSurvey, Released,
    RememberedPod, ServiceFlow, ServiceFlows, UdpEnds,
};
pub use uninstall::uninstall;
