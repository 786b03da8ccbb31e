//! Takes away what is left of pods behind the caller's back: finding their connections and deleting their devices take the
//! kernel tens of milliseconds each time, for one as for a hundred, and nobody needs to wait once programs and routes no longer
//! know the pod. So what comes within a moment is done at once.
//!
//! Each pod has a tombstone on disk (see [`crate::records`]) until it is done, so a crash in between leaves nothing.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use crate::bpf::Purger;
use crate::error::Error;
use crate::net::{self, link, netlink::Netlink};

/// How long a pod's remains may rest before they are taken away. Its own network namespace mostly goes sooner, and the
/// device with it.
const REST: Duration = Duration::from_millis(500);
/// How many are taken away at once.
const BATCH: usize = 256;

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

/// What the thread is told.
#[derive(Debug)]
enum Order {
    /// Take these away soon.
    Take(u64, Remains),
    /// Take away now what you have: somebody waits.
    Hurry,
}

/// What was handed over and is not done, with its addresses.
#[derive(Debug, Default)]
struct Pending {
    remains: Mutex<BTreeMap<u64, Vec<IpAddr>>>,
    fewer: Condvar,
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<IpAddr>>> {
        self.remains.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handle on the thread; dropping it ends the thread when its queue is done.
#[derive(Debug)]
pub(super) struct Reaper {
    queue: mpsc::Sender<Order>,
    pending: Arc<Pending>,
    count: u64,
}

impl Reaper {
    /// Starts the thread, in the network namespace of the caller's thread.
    pub(super) fn start(purger: Option<Purger>) -> Result<Self, Error> {
        let mut netlink = Netlink::open()?;
        let (queue, inbox) = mpsc::channel();
        let pending = Arc::new(Pending::default());
        let shared = Arc::clone(&pending);
        let run = move || {
            while let Some(batch) = next_batch(&inbox) {
                let (numbers, remains): (Vec<u64>, Vec<Remains>) = batch.into_iter().unzip();
                for error in take_away(purger.as_ref(), &mut netlink, &remains) {
                    tracing::warn!(%error, "taking away what is left of pods failed; the next check or start tries again");
                }
                let mut pending = shared.lock();
                numbers.iter().for_each(|number| drop(pending.remove(number)));
                drop(pending);
                shared.fewer.notify_all();
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
        self.pending.lock().insert(self.count, remains.addresses.clone());
        if self.queue.send(Order::Take(self.count, remains)).is_err() {
            self.pending.lock().remove(&self.count);
            tracing::warn!("the thread that deletes devices has ended; the next start tries again");
        }
    }

    /// Waits until nothing is left of former holders of `addresses`; with no addresses, of anybody.
    pub(super) fn settle(&self, addresses: &[IpAddr], patience: Duration) -> Result<(), Error> {
        let concerns = |held: &Vec<IpAddr>| addresses.is_empty() || held.iter().any(|a| addresses.contains(a));
        let pending = self.pending.lock();
        if !pending.values().any(concerns) {
            return Ok(());
        }
        // An ended thread leaves it to the time-out below.
        drop(self.queue.send(Order::Hurry));
        let waited = self.pending.fewer.wait_timeout_while(pending, patience, |p| p.values().any(concerns));
        let (pending, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(pending);
        if waited.timed_out() {
            return Err(net::Error::Refused(format!(
                "devices or connections of former pods (addresses {addresses:?}) are still being deleted; try again"
            ))
            .into());
        }
        Ok(())
    }
}

/// The next remains to take away: all that come within a moment of the first, unless somebody waits for them. None when the
/// handle was dropped and everything is done.
fn next_batch(inbox: &mpsc::Receiver<Order>) -> Option<Vec<(u64, Remains)>> {
    let mut batch = Vec::new();
    let mut deadline = None;
    loop {
        let order = match deadline {
            None => inbox.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
            Some(deadline) => inbox.recv_timeout(Instant::saturating_duration_since(&deadline, Instant::now())),
        };
        match order {
            Ok(Order::Take(number, remains)) => {
                batch.push((number, remains));
                deadline.get_or_insert_with(|| Instant::now() + REST);
                if batch.len() >= BATCH {
                    return Some(batch);
                }
            }
            Ok(Order::Hurry) if batch.is_empty() => {}
            Err(mpsc::RecvTimeoutError::Disconnected) if batch.is_empty() => return None,
            Ok(Order::Hurry) | Err(_) => return Some(batch),
        }
    }
}

/// Connections first, devices next, tombstones last and only when everything else went well.
fn take_away(purger: Option<&Purger>, netlink: &mut Netlink, remains: &[Remains]) -> Vec<Error> {
    let mut errors: Vec<Error> = Vec::new();
    let addresses: Vec<IpAddr> = remains.iter().flat_map(|r| r.addresses.iter().copied()).collect();
    errors.extend(purger.and_then(|purger| purger.purge(&addresses).err()).map(Error::from));
    let devices: Vec<(u32, &str)> = remains.iter().filter_map(|r| Some((r.index?, r.device.as_str()))).collect();
    errors.extend(link::delete_all(netlink, &devices).err().map(Error::from));
    if errors.is_empty() {
        for path in remains.iter().filter_map(|r| r.tombstone.as_ref()) {
            let removed = fs::remove_file(path);
            errors.extend(removed.err().map(|source| Error::Record {
                operation: "remove",
                path: path.clone(),
                source,
            }));
        }
    }
    errors
}
