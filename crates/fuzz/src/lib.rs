//! Tests only: random clusters, policies and packets, judged by everybody who judges here.
//!
//! A case is a cluster, the policies in it, and a packet that opens a connection. The oracle reads the API's words; the evaluator answers from
//! parsed policies; the compiler's image is interpreted; and the kernel, which holds that image, runs the packet through its programs. They must
//! agree ([`judge`]). [`text`] feeds what parses policies with what the API server would refuse, and with what nobody would write.
//!
//! A seed names a case on every machine. Nothing of the machine's own network is touched: the kernel's part lives in namespaces that end with
//! the thread.
#![forbid(unsafe_code)]
#![allow(
    clippy::indexing_slicing,
    reason = "lists and JSON of its own making; an index that is out of bounds is a bug that must show"
)]

pub mod cluster;
pub mod judge;
pub mod kernel;
pub mod packet;
pub mod random;
pub mod run;
pub mod shrink;
pub mod tally;
pub mod text;
