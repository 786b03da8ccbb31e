//! The kernel programs of `bpf/`: loaded once, pinned, adopted after a restart, replaced in place, and fed by difference.
//!
//! [`Programs`] promises: opening never detaches or empties anything that works; an `apply_*` writes in an order that is
//! never less safe than before or after, and what it could not write it tries again at its next call. It touches nothing
//! but BPF objects and the pin directory. Devices are named by index and looked up in the calling thread's network
//! namespace.

mod config;
mod error;

use std::path::Path;
use std::time::Instant;

use towpath_model::desired::{LocalPod, NodePeer, PolicyImage, ServiceTable};

pub use config::{BpfConfig, Changes, Hook, Isolation, Limits, NodeConfig};
pub use error::{Error, Result};

/// The loaded programs and maps of one node.
#[derive(Debug)]
pub struct Programs {
    config: BpfConfig,
}

fn unfinished<T>() -> Result<T> {
    Err(Error::Mismatch { what: "everything (not yet written)".into() })
}

impl Programs {
    /// Loads the programs, adopting pinned maps of the same layout. Also reads what the maps hold (the mirror that the
    /// `apply_*` compare with) and arms the collector. Attaches nothing; existing links go on running the old program until
    /// [`Programs::attach_device`] or [`Programs::attach_cgroup`] replaces it in place.
    pub fn open(config: BpfConfig) -> Result<Self> {
        Ok(Self { config })
    }

    /// Attaches a hook's program to a device, or replaces the program of the link that is there. Idempotent.
    pub fn attach_device(&mut self, _ifindex: u32, _hook: Hook) -> Result<()> {
        unfinished()
    }

    /// Detaches all hooks of a device. Idempotent; the device may be gone.
    pub fn detach_device(&mut self, _ifindex: u32) -> Result<()> {
        unfinished()
    }

    /// Attaches the socket programs to a cgroup directory, or replaces them in place. Idempotent.
    pub fn attach_cgroup(&mut self, _cgroup: &Path) -> Result<()> {
        unfinished()
    }

    /// Detaches the socket programs. Idempotent.
    pub fn detach_cgroup(&mut self) -> Result<()> {
        unfinished()
    }

    /// Removes pinned links whose device or cgroup is gone; the number removed.
    pub fn sweep_links(&mut self) -> Result<usize> {
        unfinished()
    }

    /// Device hooks that are attached, by what the kernel says of the pinned links.
    pub fn attached(&self) -> Result<Vec<(u32, Hook)>> {
        unfinished()
    }

    /// Removes every pin of this node: links (which detaches) and maps.
    pub fn unpin_all(self) -> Result<()> {
        unfinished()
    }

    /// The node's own facts.
    pub fn apply_node(&mut self, _node: &NodeConfig) -> Result<Changes> {
        unfinished()
    }

    /// Ranges and addresses of all nodes, this one included.
    pub fn apply_peers(&mut self, _peers: &[NodePeer]) -> Result<Changes> {
        unfinished()
    }

    /// Services: new backend lists are written whole, entries flip, old lists go at a later [`Programs::sweep`].
    pub fn apply_services(&mut self, _table: &ServiceTable, _now: Instant) -> Result<Changes> {
        unfinished()
    }

    /// Policy, including the sets of the pods that [`Programs::set_pod`] named. The revision is raised last.
    pub fn apply_policy(&mut self, _image: &PolicyImage) -> Result<Changes> {
        unfinished()
    }

    /// Makes a pod known. To be called before its device is up. Idempotent.
    pub fn set_pod(&mut self, _pod: &LocalPod, _isolation: Isolation) -> Result<()> {
        unfinished()
    }

    /// Forgets a pod and purges its connections. Idempotent.
    pub fn remove_pod(&mut self, _pod: &LocalPod) -> Result<()> {
        unfinished()
    }

    /// Deletes what a grace period protected (old backend lists). Call every second or so; the entries removed.
    pub fn sweep(&mut self, _now: Instant) -> Result<usize> {
        unfinished()
    }

    /// Where this node's pins are.
    pub fn config(&self) -> &BpfConfig {
        &self.config
    }
}
