//! Cluster-wide duties under a Lease: pod ranges of nodes.
#![forbid(unsafe_code)]
