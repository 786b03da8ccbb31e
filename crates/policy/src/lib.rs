//! NetworkPolicy and ClusterNetworkPolicy compiled to peer classes; evaluated and explained.
//!
//! Two independent ways to the same answer. [`Compiler`] turns the policies in force on one node into a
//! [`PolicyImage`](towpath_model::desired::PolicyImage), which the kernel holds and [`image`] interprets exactly as the
//! kernel does. [`evaluate`](fn@evaluate) answers for one flow straight from the parsed policies, with the rule that decides or the
//! nearest one that does not. Both read a [`View`] and nothing else: no clock, no file, no randomness.
//!
//! What the Kubernetes API leaves open, and what is decided here (with its reasons in `docs/policy.md`; the evaluator, the compiler and the tests agree on it):
//! - A pod always reaches itself, and its own node always reaches it. Traffic *to* the own node is judged as to any address.
//! - `ipBlock` also matches pod addresses. `0.0.0.0/0` matches IPv4 only, `::/0` IPv6 only.
//! - A `hostNetwork` pod is its node's address; an ended pod is nothing; a terminating pod counts until it has ended.
//! - ClusterNetworkPolicies of one tier and priority are asked by name. They do not isolate.
//! - What may be a pod that is not known yet is judged to its disadvantage by rules that deny pods.
//! - A domain name is the addresses that DNS answers have taught ([`names`]), none of which a pod, a node or the node's DNS holds.
//! - The node-local DNS addresses are peers like a pod labelled `k8s-app=kube-dns` in `kube-system`; no policy isolates them.
#![forbid(unsafe_code)]

pub mod check;
pub mod compile;
pub mod evaluate;
pub mod image;
pub mod names;
mod pod_name;
pub mod verify;
pub mod view;

pub use compile::Compiler;
pub use evaluate::{Decision, Evaluator, Flow, Mismatch, Nearest, Reason, Side, evaluate};
pub use names::Learned;
pub use view::{Holder, Holders, View};
