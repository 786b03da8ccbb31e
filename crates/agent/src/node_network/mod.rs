//! `NodeNetwork`: what this node tells the others, and what it believes of what they tell.
//!
//! An address that ADD gives to a pod is written to this node's object at once ([`publish`]); the other agents watch these objects
//! ([`given`]), so a peer's policy knows the pod without waiting for kubelet's status and the API server's round trips behind it. When the pod's own
//! status says the address, the entry has done its work and goes, so the objects stay small however many pods there are.
//!
//! Where the kind is not installed nothing of this happens: pods are then known by their status.

pub mod given;
pub mod kept;
pub mod publish;
