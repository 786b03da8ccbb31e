//! The node agent: watches, reconcile loops, CNI socket, metrics.
#![forbid(unsafe_code)]

pub mod cni_server;
pub mod ipam;
