//! A cluster on one machine: API server, stand-in kubelets, namespaces.
#![forbid(unsafe_code)]
