//! Pure decisions: what is configured, service tables, routes, address allocation, DNS answers.
#![forbid(unsafe_code)]

pub mod added_ranges;
pub mod backend;
pub mod bandwidth;
pub mod changed;
pub mod cluster_cidrs;
pub mod config;
pub mod dns;
pub mod election;
pub mod ipam;
pub mod load_balancer;
pub mod modes;
pub mod path;
pub mod peers;
pub mod pod_mtu;
pub mod service_ranges;
pub mod services;
pub mod socket_services;

pub use changed::{Changed, ChangedPods};
