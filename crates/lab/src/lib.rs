//! A cluster on one machine: API server, stand-in kubelets, nodes and pods as network namespaces.
//!
//! The crate promises that everything it makes (namespaces, mounts, cgroups, processes, files) can be found again from
//! the lab's name alone, so that [`commands::down`] leaves nothing behind whatever happened before, and that nothing of
//! the machine's own network is touched: links exist only inside namespaces that the lab made.
//!
//! ```text
//!   lab up ─► lab serve (supervisor, one process) ── API server ── controllers, scheduler
//!                │                                       ▲
//!                ├─ a stand-in kubelet a node ───────────┘  pods: sandbox namespaces → CNI ADD → containers
//!                └─ children: towpath agent + carry a node, towpath controller
//! ```
//!
//! Work that has to happen inside other namespaces runs in short single-threaded helper processes, the hidden
//! `lab stage …` commands ([`stage`]); nothing here needs `unsafe`.
#![forbid(unsafe_code)]

pub mod commands;
pub mod controllers;
mod kernel;
mod kubelet;
pub mod layout;
pub mod options;
mod runtime;
pub mod stage;
mod streams;
mod supervisor;
mod topology;
