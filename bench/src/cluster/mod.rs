//! A cluster of one node (or two) with as many Services and policies as wanted: a real agent in a namespace of our own, and an API server that
//! lists and streams objects which are made here. What an API server, kubelets and their controllers need is in no figure that is taken with it.

mod listener;
mod node;
mod objects;
pub(crate) mod policies;
mod server;

pub(crate) use node::Node;
pub(crate) use objects::{MEASURED, NAMESPACE, PORT, address, filler, nobodys, service, slice};
