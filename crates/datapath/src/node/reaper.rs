//! Takes away what is left of a pod behind the caller's back: finding its connections and deleting its device take the kernel
//! tens of milliseconds each, and nobody needs to wait once programs and routes no longer know the pod.
//!
//! Each pod has a tombstone on disk (see [`crate::records`]) until it is done, so a crash in between leaves nothing.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use crate::bpf::Purger;
use crate::error::Error;
use crate::net::{self, link, netlink::Netlink};

/// What is left of a pod.
#[derive(Debug)]
pub(super) struct Remains {
    /// Name of its device on the node.
    pub(super) device: String,
    /// The device's index; none when it is gone already.
    pub(super) index: Option<u32>,
    /// Its addresses, whose connections go.
    pub(super) addresses: Vec<IpAddr>,
    /// Removed when the rest is gone.
    pub(super) tombstone: Option<PathBuf>,
}

/// Addresses whose connections are still to be deleted, by the order in which they were handed over.
#[derive(Debug, Default)]
struct Pending {
    addresses: Mutex<BTreeMap<u64, Vec<IpAddr>>>,
    fewer: Condvar,
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<IpAddr>>> {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handle on the thread; dropping it ends the thread when its queue is done.
#[derive(Debug)]
pub(super) struct Reaper {
    queue: mpsc::Sender<(u64, Remains)>,
    pending: Arc<Pending>,
    count: u64,
}

impl Reaper {
    /// Starts the thread, in the network namespace of the caller's thread.
    pub(super) fn start(purger: Option<Purger>) -> Result<Self, Error> {
        let mut netlink = Netlink::open()?;
        let (queue, inbox) = mpsc::channel::<(u64, Remains)>();
        let pending = Arc::new(Pending::default());
        let shared = Arc::clone(&pending);
        let run = move || {
            for (number, remains) in inbox {
                let purged = purge(purger.as_ref(), &remains.addresses);
                shared.lock().remove(&number);
                shared.fewer.notify_all();
                let outcome = purged.and_then(|()| finish(&mut netlink, &remains));
                if let Err(error) = outcome {
                    let device = &remains.device;
                    tracing::warn!(device, %error, "taking away what is left of a pod failed; the next check or start tries again");
                }
            }
        };
        std::thread::Builder::new()
            .name("towpath-reaper".to_owned())
            .spawn(run)
            .map_err(|e| net::Error::system("start the thread that deletes devices", e))?;
        Ok(Self { queue, pending, count: 0 })
    }

    /// Has the remains taken away soon.
    pub(super) fn bury(&mut self, remains: Remains) {
        self.count += 1;
        if !remains.addresses.is_empty() {
            self.pending.lock().insert(self.count, remains.addresses.clone());
        }
        if let Err(mpsc::SendError((number, remains))) = self.queue.send((self.count, remains)) {
            self.pending.lock().remove(&number);
            tracing::warn!(device = remains.device, "the thread that deletes devices has ended; the next start tries again");
        }
    }

    /// Waits until no connections of former holders of `addresses` are left to delete.
    pub(super) fn await_purged(&self, addresses: &[IpAddr], patience: Duration) -> Result<(), Error> {
        let busy = |pending: &mut BTreeMap<u64, Vec<IpAddr>>| pending.values().flatten().any(|a| addresses.contains(a));
        let waited = self.pending.fewer.wait_timeout_while(self.pending.lock(), patience, busy);
        let (pending, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(pending);
        if waited.timed_out() {
            return Err(net::Error::Refused(format!(
                "connections of a former holder of {addresses:?} are still being deleted; try again"
            ))
            .into());
        }
        Ok(())
    }
}

/// Deletes the connections of addresses.
pub(super) fn purge(purger: Option<&Purger>, addresses: &[IpAddr]) -> Result<(), Error> {
    let Some(purger) = purger else { return Ok(()) };
    for address in addresses {
        purger.purge(*address)?;
    }
    Ok(())
}

fn finish(netlink: &mut Netlink, remains: &Remains) -> Result<(), Error> {
    if let Some(index) = remains.index {
        link::delete(netlink, index, &remains.device)?;
    }
    if let Some(path) = &remains.tombstone {
        fs::remove_file(path).map_err(|source| Error::Record { operation: "remove", path: path.clone(), source })?;
    }
    Ok(())
}
