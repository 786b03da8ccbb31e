//! What the loop does about the network that was on this node before ([`crate::predecessor`]): every second, and before the first plan.

use std::path::Path;

use tracing::{info, warn};

use super::Reconciler;
use crate::predecessor::{self, conflists, flannel_here};
use crate::read;

impl Reconciler {
    /// What Flannel or Canal has left on this node, and what comes of it: nobody gets its addresses, and pods here may speak to its pods.
    pub(super) async fn follow_predecessor(&mut self, directory: &Path) {
        let (leases, index, node) = (self.leases.clone(), self.index.clone(), self.node.clone());
        let (ranges, directory) = (self.own.pod_cidrs.clone(), directory.to_owned());
        let found = tokio::task::block_in_place(|| {
            let theirs = leases.leases_before()?;
            let flannel_here = || flannel_here(read(&index).world(), &node);
            let was_here =
                !conflists::active(&directory, flannel_here)?.is_empty() || !conflists::aside(&directory)?.is_empty();
            let ours = |address| leases.knows(address);
            let remains = predecessor::remains(read(&index).world(), &node, &ranges, &theirs, was_here, ours);
            leases.hold_for_predecessor(&remains.addresses);
            Ok::<_, std::io::Error>(remains)
        });
        let remains = match found {
            Ok(remains) => remains,
            Err(error) => return warn!(%error, "could not read the leases of the network before; trying again"),
        };
        if remains == self.remains {
            return;
        }
        match self.datapath.apply_elsewhere(remains.addresses.iter().copied().collect()).await {
            Ok(applied) => {
                for problem in applied.problems {
                    warn!(problem, "pods of the network before");
                }
                info!(
                    pods = remains.names().len(),
                    addresses = remains.addresses.len(),
                    "what the network before still has here"
                );
                self.remains.clone_from(&remains);
                self.with_report(|report| report.remains = remains);
            }
            Err(error) => warn!(%error, "pods of the network before cannot be reached as they should; trying again"),
        }
    }

    /// `towpath node migrate --clean` says that Flannel's tunnel device is no longer needed.
    pub(super) async fn take_tunnel_if_told(&self, note: &Path) {
        if !note.exists() || !self.remains.pods.is_empty() {
            return;
        }
        match self.datapath.take_tunnel().await {
            Ok(applied) => {
                info!(changes = ?applied.changes, problems = ?applied.problems, "put our tunnel device in the place of Flannel's");
                if let Err(error) = std::fs::remove_file(note) {
                    warn!(%error, file = %note.display(), "could not remove");
                }
            }
            Err(error) => warn!(%error, "could not put our tunnel device in the place of Flannel's; trying again"),
        }
    }

    /// Flannel's own pod puts its configuration back whenever it starts.
    pub(super) fn set_predecessor_aside(&self, directory: &Path) {
        match conflists::set_aside(directory, || flannel_here(read(&self.index).world(), &self.node)) {
            Ok(names) => {
                for name in names {
                    info!(file = %directory.join(name).display(), "set aside: the container runtime now takes ours");
                }
            }
            Err(error) => {
                warn!(%error, directory = %directory.display(), "could not set the CNI configuration of the network before aside; trying again")
            }
        }
    }
}
