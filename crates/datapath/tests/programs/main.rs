//! Packet fixtures: each kernel program run on single frames (frame in, verdict and frame out, map changes), in both
//! families. Needs root; everything happens in namespaces that end with the test.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wrong_self_convention,
    reason = "a test that meets what it does not expect fails; names are those of the hooks"
)]
#![allow(unreachable_pub, reason = "modules of one test binary")]

mod algorithms;
mod audit;
mod budget;
mod direct_return;
mod drops;
mod entry_policy;
mod envelope;
mod errors;
mod flips;
mod fragments;
mod frame;
mod from_pod;
mod full;
mod goes_on;
mod hairpin;
mod host_ports;
mod ipip;
mod kills;
mod left_alone;
mod limited;
mod link;
mod live;
mod loader;
mod local_node_ports;
mod node_paths;
mod own_envelopes;
mod plain;
mod policy;
mod policy_changes;
mod predecessor;
mod sctp;
mod services;
mod snat;
mod sockets;
mod supervised;
mod udp;
mod wire;
mod world;
