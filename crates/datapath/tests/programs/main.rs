//! Packet fixtures: each kernel program run on single frames (frame in, verdict and frame out, map changes), in both
//! families. Needs root; everything happens in namespaces that end with the test.
#![allow(unreachable_pub, reason = "modules of one test binary")]

mod frame;
mod from_pod;
mod live;
mod loader;
mod node_paths;
mod policy;
mod services;
mod sockets;
mod world;
