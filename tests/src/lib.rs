//! The walkthrough: what a user does by hand, typed into the real `kubectl`, as a demo and as end-to-end tests.
//!
//! [`cluster`] brings up a lab and drives it, [`rows`] are the rows of the walkthrough, [`log`] keeps what each showed. The rows
//! know nothing of Towpath's inside: they see what a user sees. [`api`], [`in_force`], [`load`], [`traffic`], [`machine`], [`place`], [`pods`], [`in_charge`], [`kube_proxy`], [`libcni`], [`strace`] and
//! [`containerd`] serve the tests in `tests/`.
#![forbid(unsafe_code)]

pub mod api;
pub mod cluster;
pub mod containerd;
pub mod in_charge;
pub mod in_force;
pub mod kube_proxy;
mod lab_driver;
pub mod libcni;
pub mod load;
pub mod log;
pub mod machine;
pub mod place;
pub mod pods;
pub mod rows;
pub mod strace;
pub mod traffic;
pub mod udp;
