//! Namespaces, cgroups and mounts: the kernel objects a lab is made of.
//!
//! Everything works on paths, is idempotent where teardown needs it, and never changes the calling thread: what has to
//! happen inside a namespace happens in a thread of its own that ends afterwards.

pub(crate) mod cgroup;
pub(crate) mod mounts;
pub(crate) mod ns;
pub(crate) mod sysctl;
