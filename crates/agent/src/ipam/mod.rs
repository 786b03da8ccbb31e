//! The node's leases: which container holds which addresses, on disk and in memory.
//!
//! One file a lease, `leases/<container id>@<interface>.lease` in the state directory. The order of an attachment's life, and
//! why a crash after any step neither leaks an address nor gives one twice:
//!
//! 1. [`LeaseStore::reserve`] writes the lease (write, rename) before there is a device: an agent that dies later finds it.
//!    Not synced: when the machine dies, so do all pods.
//! 2. The device is made.
//! 3. [`LeaseStore::commit`] writes what was made (write, fsync, rename, fsync of the directory); only then is ADD answered. Leases
//!    that are written at once sync side by side, and the file system joins them: one sync for all, one after the other, took 2.5 times as long
//!    (110 leases, ext4).
//! 4. DEL removes the device, then [`LeaseStore::release`] moves the file to `released/`, where it keeps the address at rest
//!    over a restart of the agent, and goes after [`REST`].
//!
//! [`LeaseStore::compare`] looks at the devices that really exist: a lease without a device is released, so is one
//! whose ADD was never answered (its device goes first), and a device without a lease keeps its addresses *held* until it is
//! gone. A file that cannot be believed is moved to `damaged/` with an error and never guessed at; its device is such a device.
//!
//! A lock on the directory keeps a second agent out, so that two can overlap in an upgrade without giving an address twice.

pub mod check;
mod disk;
mod lease;

pub use disk::{Disk, RealDisk};
pub use lease::{AttachedDevice, Lease, NotALease};

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::watch;
use towpath_datapath::RememberedPod;
use towpath_model::NamespacedName;
use towpath_plan::ipam::{Holder, IpamError, Pool, REST, Usage, gateway_of};
use towpath_wire::cni::{AddRequest, Attachment};
use towpath_wire::ipam::RangeUse;

use crate::cni_server::{Attached, Device};
use crate::predecessor::host_local::{HostLocal, HostLocalLease};

#[cfg(test)]
pub(crate) mod tests;

const SUFFIX: &str = ".lease";

/// Why a lease could not be had, kept or given back.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The disk.
    #[error("lease store: cannot {operation} {path}: {source}; check the disk's space and the directory's permissions")]
    Disk {
        /// What was tried.
        operation: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// What came of it.
        source: io::Error,
    },
    /// The leases of another network.
    #[error(
        "cannot read the leases of the network that was here before: {source}; an address that is in use could be given again"
    )]
    Before {
        /// What came of it.
        source: io::Error,
    },
    /// Another process has the directory.
    #[error("lease store {0} is in use by another agent; wait until that one has ended")]
    InUse(PathBuf),
    /// The range.
    #[error(transparent)]
    Ipam(#[from] IpamError),
    /// An address that is asked for was another namespace's until a moment ago, or nobody knows whose: other nodes may still take who has it for that pod.
    #[error(
        "{address} is asked for, and until {} s ago somebody of another namespace had it; it is given again {} s after that: the container \
         runtime tries again by itself",
        .rested.as_secs(),
        REST.as_secs()
    )]
    Resting {
        /// The address.
        address: IpAddr,
        /// How long nobody has had it.
        rested: Duration,
    },
    /// A lease that is not there was to be committed.
    #[error("there is no lease of {0}")]
    Unknown(Attachment),
}

fn disk_error<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> LeaseError + 'a {
    move |source| LeaseError::Disk { operation, path: path.to_owned(), source }
}

/// The leases of a node.
pub struct LeaseStore {
    live: PathBuf,
    released: PathBuf,
    damaged: PathBuf,
    disk: Arc<dyn Disk>,
    epoch: Instant,
    inner: Mutex<Inner>,
    /// Counts changes of leases, for who follows them.
    changes: watch::Sender<u64>,
    /// Leases of the network that was here before.
    before: Option<HostLocal>,
    _lock: File,
}

#[derive(Default)]
struct Inner {
    pool: Pool,
    leases: BTreeMap<Attachment, Lease>,
    /// Leases whose file could not be believed; the name is all that is known.
    damaged: BTreeSet<Attachment>,
    /// Files in `released/`, oldest first, with the time they came there.
    resting: VecDeque<(PathBuf, Duration)>,
    /// In which namespace the pod was that had an address last, and until when; of those that were released less than [`REST`] ago.
    last: BTreeMap<IpAddr, (String, Duration)>,
}

impl Inner {
    /// Whether pods of a namespace may have an address that they ask for as far as its last holder goes.
    ///
    /// Until they hear of the change, other nodes judge who has it by that pod's labels. In one namespace that gives nobody anything: who makes
    /// pods there gives them any labels.
    fn may_follow(&self, address: IpAddr, namespace: Option<&str>, now: Duration) -> Result<(), LeaseError> {
        let Some(at) = self.pool.resting_since(address) else { return Ok(()) };
        let rested = now.saturating_sub(at);
        let had = self.last.get(&address).filter(|(_, until)| *until == at).map(|(namespace, _)| namespace.as_str());
        if rested >= REST || had.is_some() && had == namespace {
            return Ok(());
        }
        Err(LeaseError::Resting { address, rested })
    }

    fn note_last(&mut self, addresses: &[IpAddr], pod: Option<&NamespacedName>, until: Duration) {
        let Some(pod) = pod else { return };
        self.last.extend(addresses.iter().map(|address| (*address, (pod.namespace.clone(), until))));
    }
}

/// Leases against the devices that really exist.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// The namespace is gone, with the device: release.
    pub without_device: Vec<Lease>,
    /// Their ADD has not been answered: unless it is in work at this moment, remove the device and release.
    pub unanswered: Vec<Lease>,
    /// Leases whose file was set aside and whose device is gone: release.
    pub damaged_gone: Vec<Attachment>,
    /// Devices without a lease: hold their addresses.
    pub strangers: Vec<Device>,
}

impl LeaseStore {
    /// Opens `leases/` in the state directory, makes it if need be, and reads what is there.
    ///
    /// `ranges` are the node's pod ranges; none yet is allowed, see [`LeaseStore::set_ranges`].
    pub fn open(state_dir: &Path, ranges: &[IpNet], disk: Arc<dyn Disk>) -> Result<Self, LeaseError> {
        let live = state_dir.join("leases");
        let (released, damaged) = (live.join("released"), live.join("damaged"));
        for dir in [&released, &damaged] {
            std::fs::create_dir_all(dir).map_err(disk_error("make", dir))?;
        }
        let lock_path = live.join(".lock");
        let lock = File::create(&lock_path).map_err(disk_error("open", &lock_path))?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(LeaseError::InUse(live)),
            Err(errno) => return Err(disk_error("lock", &lock_path)(errno.into())),
        }
        // Released times count from an epoch in the past, so that ages from before this start can be told apart.
        let epoch = Instant::now().checked_sub(REST).unwrap_or_else(Instant::now);
        let inner = Mutex::new(Inner { pool: Pool::new(ranges)?, ..Inner::default() });
        let changes = watch::Sender::default();
        let store = Self { live, released, damaged, disk, epoch, inner, changes, before: None, _lock: lock };
        store.load()?;
        store.load_released()?;
        Ok(store)
    }

    /// Heeds the leases of a network that was here before: they are looked at before each allocation, since its plugin may still be
    /// at work.
    pub fn after(self, before: HostLocal) -> Self {
        Self { before: Some(before), ..self }
    }

    /// Leases of the network that was here before.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn leases_before(&self) -> io::Result<Vec<HostLocalLease>> {
        self.before.as_ref().map_or_else(|| Ok(Vec::new()), HostLocal::leases)
    }

    /// Whether an address was given here, now or before.
    pub fn knows(&self, address: IpAddr) -> bool {
        let inner = self.lock();
        matches!(inner.pool.holder(address), Some(Holder::Attachment(_) | Holder::Device(_)))
            || inner.pool.is_resting(address)
    }

    /// Holds exactly these addresses for the network that was here before; lets go of others held for it.
    pub fn hold_for_predecessor(&self, addresses: &BTreeSet<IpAddr>) {
        let now = self.now();
        let mut inner = self.lock();
        let gone: Vec<Holder> = inner
            .pool
            .holders()
            .map(|(holder, _)| holder)
            .filter(|holder| matches!(holder, Holder::Predecessor(address) if !addresses.contains(address)))
            .cloned()
            .collect();
        for holder in gone {
            inner.pool.release(&holder, now);
        }
        for address in addresses {
            keep_off(&mut inner.pool, *address);
        }
    }

    /// Gives back what the network before gave to a container that is gone.
    ///
    /// # Errors
    /// Its lease cannot be read or removed.
    pub fn release_before(&self, container: &str) -> io::Result<()> {
        let Some(before) = &self.before else { return Ok(()) };
        let released = before.release(container)?;
        if !released.is_empty() {
            tracing::info!(container, addresses = ?released, "released what the network before gave to it");
        }
        let now = self.now();
        let mut inner = self.lock();
        for address in released {
            inner.pool.release(&Holder::Predecessor(address), now);
        }
        Ok(())
    }

    /// Reads `leases/`; sets aside what cannot be believed.
    fn load(&self) -> Result<(), LeaseError> {
        let mut inner = self.lock();
        for owner in self.damaged_owners()? {
            inner.damaged.insert(owner);
        }
        for name in self.disk.list(&self.live).map_err(disk_error("list", &self.live))? {
            let path = self.live.join(&name);
            let Some(stem) = name.strip_suffix(SUFFIX) else {
                if name.ends_with(".tmp") {
                    // A write that did not come to its rename.
                    self.disk.remove(&path).map_err(disk_error("remove", &path))?;
                }
                continue;
            };
            let Some(owner) = Attachment::from_file_stem(stem) else {
                self.set_aside(&name, "its name is not <container id>@<interface>")?;
                continue;
            };
            let contents = self.disk.read(&path).map_err(disk_error("read", &path))?;
            let adopted = Lease::from_file(&owner, &contents).map_err(|e| e.to_string()).and_then(|lease| {
                inner.pool.adopt(Holder::Attachment(owner.clone()), &lease.addresses).map_err(|e| e.to_string())?;
                Ok(lease)
            });
            match adopted {
                Ok(lease) => {
                    inner.damaged.remove(&owner);
                    inner.leases.insert(owner, lease);
                }
                Err(why) => {
                    self.set_aside(&name, &why)?;
                    inner.damaged.insert(owner);
                }
            }
        }
        Ok(())
    }

    fn damaged_owners(&self) -> Result<Vec<Attachment>, LeaseError> {
        let names = self.disk.list(&self.damaged).map_err(disk_error("list", &self.damaged))?;
        Ok(names.iter().filter_map(|n| n.strip_suffix(SUFFIX)).filter_map(Attachment::from_file_stem).collect())
    }

    fn set_aside(&self, name: &str, why: &str) -> Result<(), LeaseError> {
        let (from, to) = (self.live.join(name), self.damaged.join(name));
        self.disk.rename(&from, &to).map_err(disk_error("set aside", &from))?;
        tracing::error!(file = %to.display(), why, "a lease file cannot be believed and was set aside; the addresses of its \
            device stay held until the device is gone");
        Ok(())
    }

    /// Puts the addresses of files in `released/` at rest for what is left of their time.
    fn load_released(&self) -> Result<(), LeaseError> {
        let mut inner = self.lock();
        let now = self.now();
        let mut aged: Vec<(Duration, PathBuf, Lease)> = Vec::new();
        for name in self.disk.list(&self.released).map_err(disk_error("list", &self.released))? {
            let path = self.released.join(&name);
            let age = self.disk.age(&path).unwrap_or(Duration::ZERO);
            let lease = name
                .strip_suffix(SUFFIX)
                .and_then(Attachment::from_file_stem)
                .and_then(|owner| Lease::from_file(&owner, &self.disk.read(&path).ok()?).ok());
            match lease {
                Some(lease) if age < REST => aged.push((age, path, lease)),
                _ => self.disk.remove(&path).map_err(disk_error("remove", &path))?,
            }
        }
        aged.sort_by_key(|(age, _, _)| Reverse(*age));
        for (age, path, lease) in aged {
            let at = now.saturating_sub(age);
            for address in &lease.addresses {
                inner.pool.rest(*address, at);
            }
            inner.note_last(&lease.addresses, lease.pod.as_ref(), at);
            inner.resting.push_back((path, at));
        }
        Ok(())
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic while it was held cannot leave it half changed in a way that matters more than stopping all ADDs.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path_of(&self, owner: &Attachment) -> PathBuf {
        self.live.join(format!("{}{SUFFIX}", owner.file_stem()))
    }

    /// Changes the node's pod ranges; leases keep their addresses.
    pub fn set_ranges(&self, ranges: &[IpNet]) -> Result<(), LeaseError> {
        Ok(self.lock().pool.set_ranges(ranges)?)
    }

    /// Has exactly these of the ranges give no more addresses; leases keep theirs.
    pub fn close(&self, ranges: &[IpNet]) {
        self.lock().pool.close(ranges);
    }

    /// Whether somebody has an address of a range.
    pub fn has_of(&self, range: &IpNet) -> bool {
        self.lock().pool.holders().any(|(_, addresses)| addresses.iter().any(|address| range.contains(address)))
    }

    /// How full the ranges are.
    pub fn usage(&self) -> Vec<Usage> {
        self.lock().pool.usage()
    }

    /// The same, as it is told.
    pub fn range_use(&self) -> Vec<RangeUse> {
        let most = |count: u128| u64::try_from(count).unwrap_or(u64::MAX);
        let told = |usage: Usage| RangeUse {
            range: usage.range.to_string(),
            taken: most(usage.taken),
            size: most(usage.size),
            closed: usage.closed,
        };
        self.usage().into_iter().map(told).collect()
    }

    /// All leases.
    pub fn leases(&self) -> Vec<Lease> {
        self.lock().leases.values().cloned().collect()
    }

    /// Pods whose ADD was answered, for a data path that has lost whose devices there are.
    pub fn attached(&self) -> Vec<RememberedPod> {
        let known = |(owner, lease): (&Attachment, &Lease)| {
            let pod = lease.attached.as_ref()?.pod.clone();
            Some(RememberedPod { pod, ifname: owner.ifname().to_owned() })
        };
        self.lock().leases.iter().filter_map(known).collect()
    }

    /// The lease of an attachment.
    pub fn lease(&self, owner: &Attachment) -> Option<Lease> {
        self.lock().leases.get(owner).cloned()
    }

    /// Addresses by pod as leases have them: known from ADD on, before kubelet reports them. A pod whose old sandbox is still
    /// there has the addresses of both.
    pub fn pod_addresses(&self) -> BTreeMap<NamespacedName, Vec<IpAddr>> {
        let mut pods: BTreeMap<NamespacedName, Vec<IpAddr>> = BTreeMap::new();
        for lease in self.lock().leases.values() {
            if let Some(pod) = &lease.pod {
                pods.entry(pod.clone()).or_default().extend(&lease.addresses);
            }
        }
        pods
    }

    /// The gateway of each address: the first host of the range it is in, or would be.
    pub fn gateways(&self, addresses: &[IpAddr]) -> Vec<IpAddr> {
        let ranges = self.lock().pool.ranges();
        addresses
            .iter()
            .map(|address| {
                let same_family = |r: &&IpNet| r.network().is_ipv4() == address.is_ipv4();
                let range = ranges.iter().find(|r| r.contains(address)).or_else(|| ranges.iter().find(same_family));
                range.map_or(*address, gateway_of)
            })
            .collect()
    }

    /// Addresses for an attachment, those that are `chosen` or any, written down before they are used. Idempotent: who has a lease gets it
    /// again. An address that is chosen and rests goes to pods of the namespace that had it, and to others when its time is over. Blocks on
    /// the disk.
    pub fn reserve(&self, request: &AddRequest, chosen: &[IpAddr]) -> Result<Lease, LeaseError> {
        let owner = &request.attachment;
        let theirs = self.leases_before().map_err(|source| LeaseError::Before { source })?;
        let lease = {
            let mut inner = self.lock();
            if let Some(lease) = inner.leases.get(owner) {
                return Ok(lease.clone());
            }
            let now = self.now();
            for lease in theirs.iter().filter(|lease| !lease.outlived) {
                keep_off(&mut inner.pool, lease.address);
            }
            let namespace = request.pod.as_ref().map(|pod| pod.namespace.as_str());
            chosen.iter().try_for_each(|address| inner.may_follow(*address, namespace, now))?;
            let allocation = inner.pool.allocate(owner, chosen, now)?;
            if let Some(rested) = allocation.hurried {
                tracing::warn!(%owner, addresses = ?allocation.addresses, seconds = rested.as_secs(),
                    "the pod range is nearly exhausted: an address is used again soon after it was released");
            }
            let lease = Lease {
                owner: owner.clone(),
                network: request.network.clone(),
                pod: request.pod.as_ref().map(|p| NamespacedName::new(&p.namespace, &p.name)),
                uid: request.pod.as_ref().map(|p| p.uid.clone()).unwrap_or_default(),
                netns: request.netns.clone(),
                addresses: allocation.addresses,
                attached: None,
            };
            inner.leases.insert(owner.clone(), lease.clone());
            lease
        };
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
        if let Err(error) = self.store(&lease, Durable::No) {
            self.forget(owner);
            return Err(error);
        }
        Ok(lease)
    }

    /// Writes down what was made for a lease; when this returns, a power cut does not lose it. Blocks on the disk.
    pub fn commit(&self, owner: &Attachment, attached: &Attached) -> Result<Lease, LeaseError> {
        let mut lease = self.lease(owner).ok_or_else(|| LeaseError::Unknown(owner.clone()))?;
        lease.attached = Some(AttachedDevice { pod: attached.pod.clone(), mtu: attached.mtu });
        self.store(&lease, Durable::Yes)?;
        self.lock().leases.insert(owner.clone(), lease.clone());
        Ok(lease)
    }

    fn store(&self, lease: &Lease, durable: Durable) -> Result<(), LeaseError> {
        let path = self.path_of(&lease.owner);
        let temporary = self.live.join(format!("{}.tmp", lease.owner.file_stem()));
        let contents = lease.to_file().map_err(|e| disk_error("encode", &path)(e.into()))?;
        let written = self.disk.write(&temporary, &contents).map_err(disk_error("write", &temporary)).and_then(|()| {
            if durable == Durable::Yes {
                self.disk.sync_file(&temporary).map_err(disk_error("sync", &temporary))?;
            }
            self.disk.rename(&temporary, &path).map_err(disk_error("rename onto", &path))
        });
        if let Err(error) = written {
            // A full disk must not keep the pieces too; what cannot be removed goes at the next start.
            let _ = self.disk.remove(&temporary);
            return Err(error);
        }
        match durable {
            Durable::Yes => self.disk.sync_dir(&self.live).map_err(disk_error("sync", &self.live)),
            Durable::No => Ok(()),
        }
    }

    /// Gives a lease back; its device must be gone. None there: no error. Blocks on the disk.
    pub fn release(&self, owner: &Attachment) -> Result<(), LeaseError> {
        let now = self.now();
        let path = self.path_of(owner);
        let is_damaged = {
            let inner = self.lock();
            if !inner.leases.contains_key(owner) && !inner.damaged.contains(owner) {
                return Ok(());
            }
            inner.damaged.contains(owner)
        };
        if is_damaged {
            let aside = self.damaged.join(format!("{}{SUFFIX}", owner.file_stem()));
            self.disk.remove(&aside).map_err(disk_error("remove", &aside))?;
        }
        let tombstone = self.released.join(format!("{}{SUFFIX}", owner.file_stem()));
        match self.disk.rename(&path, &tombstone) {
            Ok(()) => self.lock().resting.push_back((tombstone, now)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(_) => self.disk.remove(&path).map_err(disk_error("remove", &path))?,
        }
        self.forget(owner);
        self.expire_released(now);
        Ok(())
    }

    fn forget(&self, owner: &Attachment) {
        let now = self.now();
        let mut inner = self.lock();
        let lease = inner.leases.remove(owner);
        inner.damaged.remove(owner);
        let free = inner.pool.release(&Holder::Attachment(owner.clone()), now);
        inner.note_last(&free, lease.and_then(|lease| lease.pod).as_ref(), now);
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Tells of every lease that is made or given back.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Removes files from `released/` whose time is over.
    fn expire_released(&self, now: Duration) {
        let due: Vec<PathBuf> = {
            let mut inner = self.lock();
            let Inner { pool, last, .. } = &mut *inner;
            last.retain(|address, _| pool.resting_since(*address).is_some_and(|at| now.saturating_sub(at) < REST));
            let count = inner.resting.iter().take_while(|(_, at)| now.saturating_sub(*at) >= REST).count();
            let drained: Vec<PathBuf> = inner.resting.drain(..count).map(|(path, _)| path).collect();
            // The same container may have been released again since, into the same file.
            drained.into_iter().filter(|path| !inner.resting.iter().any(|(later, _)| later == path)).collect()
        };
        for path in due {
            if let Err(error) = self.disk.remove(&path) {
                tracing::warn!(file = %path.display(), %error, "cannot remove a released lease; it goes at the next start");
            }
        }
    }

    /// Compares with the devices that really exist; changes nothing. `name_of` says what an attachment's device is called.
    pub fn compare(&self, devices: &[Device], name_of: impl Fn(&Attachment) -> String) -> Comparison {
        let there: BTreeSet<&str> = devices.iter().map(|d| d.name.as_str()).collect();
        let inner = self.lock();
        let mut comparison = Comparison::default();
        let mut owned = BTreeSet::new();
        for (owner, lease) in &inner.leases {
            let name = name_of(owner);
            if lease.attached.is_none() {
                comparison.unanswered.push(lease.clone());
            } else if !there.contains(name.as_str()) {
                comparison.without_device.push(lease.clone());
            }
            owned.insert(name);
        }
        let gone = |owner: &&Attachment| !there.contains(name_of(owner).as_str());
        comparison.damaged_gone = inner.damaged.iter().filter(gone).cloned().collect();
        comparison.strangers = devices.iter().filter(|d| !owned.contains(&d.name)).cloned().collect();
        comparison
    }

    /// Holds the addresses of exactly these devices, which have no lease; lets go of those of others held before.
    pub fn hold(&self, strangers: &[Device]) {
        let now = self.now();
        let mut inner = self.lock();
        let gone: Vec<Holder> = inner
            .pool
            .holders()
            .map(|(holder, _)| holder)
            .filter(|holder| match holder {
                Holder::Device(name) => !strangers.iter().any(|d| d.name == *name),
                Holder::Attachment(_) | Holder::Predecessor(_) => false,
            })
            .cloned()
            .collect();
        for holder in gone {
            inner.pool.release(&holder, now);
        }
        for device in strangers {
            let holder = Holder::Device(device.name.clone());
            for address in &device.addresses {
                if inner.pool.held_by(&holder).is_some_and(|held| held.contains(address)) {
                    continue;
                }
                match inner.pool.adopt(holder.clone(), &[*address]) {
                    Ok(()) => {
                        tracing::error!(device = device.name, %address, "a pod device without a lease: its address \
                        stays held until the device is gone; deleting its pod does that")
                    }
                    Err(error) => tracing::error!(device = device.name, %error, "two claim one address"),
                }
            }
        }
    }

    /// Writes down a lease that was lost, for a device that is there; its addresses were held for the device. Blocks on the disk.
    ///
    /// # Errors
    /// Somebody else has one of the addresses, or the disk refuses; then they are held for the device as before.
    pub fn adopt(&self, lease: Lease, device: &str) -> Result<(), LeaseError> {
        let (owner, before) = (lease.owner.clone(), Holder::Device(device.to_owned()));
        let holder = Holder::Attachment(owner.clone());
        // In one step under the lock: nobody may be given an address meanwhile.
        let pass_on = |inner: &mut Inner, from: &Holder, to: &Holder| {
            inner.pool.release(from, self.now());
            inner.pool.adopt(to.clone(), &lease.addresses)
        };
        {
            let mut inner = self.lock();
            if let Err(error) = pass_on(&mut inner, &before, &holder) {
                for address in &lease.addresses {
                    // What is somebody else's stays his.
                    let _ = inner.pool.adopt(before.clone(), &[*address]);
                }
                return Err(error.into());
            }
            inner.leases.insert(owner.clone(), lease.clone());
        }
        let stored = self.store(&lease, Durable::Yes);
        if stored.is_err() {
            let mut inner = self.lock();
            inner.leases.remove(&owner);
            pass_on(&mut inner, &holder, &before)?;
        }
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
        stored?;
        if self.lock().damaged.remove(&owner) {
            let aside = self.damaged.join(format!("{}{SUFFIX}", owner.file_stem()));
            self.disk.remove(&aside).map_err(disk_error("remove", &aside))?;
        }
        Ok(())
    }

    /// The node's pod ranges.
    pub fn ranges(&self) -> Vec<IpNet> {
        self.lock().pool.ranges()
    }

    /// Addresses that are held for the network that was here before.
    pub fn held_for_predecessor(&self) -> BTreeSet<IpAddr> {
        let inner = self.lock();
        let before = inner.pool.holders().filter_map(|(holder, _)| match holder {
            Holder::Predecessor(address) => Some(*address),
            Holder::Attachment(_) | Holder::Device(_) => None,
        });
        before.collect()
    }

    /// Lets go of the addresses of a device that was there without a lease and has been removed.
    pub fn device_gone(&self, name: &str) {
        let now = self.now();
        self.lock().pool.release(&Holder::Device(name.to_owned()), now);
    }
}

/// Holds an address for the network that was here before, unless somebody has it.
fn keep_off(pool: &mut Pool, address: IpAddr) {
    match pool.holder(address) {
        Some(Holder::Predecessor(_)) => {}
        None => drop(pool.adopt(Holder::Predecessor(address), &[address])),
        Some(holder) => {
            tracing::error!(%address, %holder, "two claim one address: a container of the network before holds it too; recreate its pod");
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Durable {
    Yes,
    No,
}
