//! towpath-cni, the plugin that the container runtime executes.
#![forbid(unsafe_code)]

fn main() {}
