//! An embedded Kubernetes API server that kubectl and kube-rs talk to.
#![forbid(unsafe_code)]

pub mod kinds;
pub mod openapi;
pub mod resource;
