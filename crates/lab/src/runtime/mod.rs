//! The stand-in container runtime: sandboxes, CNI, images, containers, logs.
//!
//! It promises what containerd's CRI plugin promises the kubelet: the pod's network is complete before a container
//! starts, CNI plugins are called as libcni calls them, containers see their own process and mount namespaces and share
//! the pod's network, IPC and host name, and a container's output is kept in CRI log format.

pub(crate) mod cni;
pub(crate) mod container;
pub(crate) mod image;
mod listening;
pub(crate) mod logs;
mod pty;
pub(crate) mod sandbox;
pub(crate) mod spawn;
