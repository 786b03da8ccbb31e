//! CNI types and the messages between Towpath's processes. Serde only: nothing here does I/O.
#![forbid(unsafe_code)]

pub mod cni;
pub mod config;
pub mod dns;
pub mod ipam;
pub mod names;
pub mod observe;
pub mod policy;
pub mod service;
pub mod shared;
pub mod status;
pub mod udp;
