//! Pure decisions. Each takes what is known, and the time where it matters, as arguments, and says what should be.
//!
//! - how configuration is read: [`config`];
//! - between nodes: [`peers`], [`backend`], [`path`], [`pod_mtu`], [`bandwidth`];
//! - Services: [`services`], [`socket_services`], [`service_ranges`], [`load_balancer`], [`election`] of who announces;
//! - addresses: [`ipam`], [`cluster_cidrs`], [`added_ranges`];
//! - names: [`dns`];
//! - who is in charge of Services and DNS: [`modes`].
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
