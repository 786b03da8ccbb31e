//! Leases on disk: what is believed, what is not, and what a crash leaves.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use towpath_model::desired::LocalPod;
use towpath_wire::cni::PodIdentity;

use super::*;

pub(crate) fn request(id: &str) -> AddRequest {
    AddRequest {
        attachment: Attachment::new(id, "eth0").unwrap(),
        network: "towpath".into(),
        netns: format!("/run/netns/{id}"),
        pod: Some(PodIdentity { namespace: "default".into(), name: format!("pod-{id}"), uid: format!("uid-{id}") }),
        bandwidth: None,
    }
}

pub(crate) fn attached(request: &AddRequest, addresses: &[IpAddr]) -> Attached {
    Attached {
        pod: LocalPod {
            name: NamespacedName::new("default", "pod"),
            container_id: request.attachment.container_id().to_owned(),
            addresses: addresses.to_vec(),
            host_device: name_of(&request.attachment),
            ifindex: 7,
            mac: [2, 0, 0, 0, 0, 1],
            host_mac: [2, 0x74, 0x70, 0, 0, 1],
            netns_cookie: 9,
            pod_id: 1,
        },
        mtu: 1450,
    }
}

pub(crate) fn name_of(owner: &Attachment) -> String {
    format!("tp-{}", owner.file_stem())
}

pub(crate) fn ranges() -> Vec<IpNet> {
    vec!["10.244.1.0/28".parse().unwrap(), "fd00:10:244:1::/64".parse().unwrap()]
}

fn open(dir: &Path) -> LeaseStore {
    LeaseStore::open(dir, &ranges(), Arc::new(RealDisk)).unwrap()
}

fn add(store: &LeaseStore, id: &str) -> Lease {
    let request = request(id);
    let lease = store.reserve(&request, &[]).unwrap();
    store.commit(&request.attachment, &attached(&request, &lease.addresses)).unwrap()
}

fn owner(id: &str) -> Attachment {
    request(id).attachment
}

#[test]
fn leases_outlive_the_agent() {
    let dir = tempfile::tempdir().unwrap();
    let before: Vec<Lease> = {
        let store = open(dir.path());
        vec![add(&store, "a"), add(&store, "b")]
    };
    let store = open(dir.path());
    assert_eq!(store.leases(), before);
    assert_eq!(store.reserve(&request("a"), &[]).unwrap(), before[0], "idempotent over a restart");
    let third = add(&store, "c");
    assert!(before.iter().all(|lease| lease.addresses.iter().all(|a| !third.addresses.contains(a))));
    assert_eq!(store.pod_addresses()[&NamespacedName::new("default", "pod-a")], before[0].addresses);
    assert_eq!(
        store.gateways(&third.addresses),
        ["10.244.1.1".parse::<IpAddr>().unwrap(), "fd00:10:244:1::1".parse().unwrap()]
    );
}

#[test]
fn what_was_made_is_remembered_of_who_was_answered_and_of_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let made = {
        let store = open(dir.path());
        store.reserve(&request("b"), &[]).unwrap();
        add(&store, "a").attached.unwrap().pod
    };
    assert_eq!(open(dir.path()).attached(), [RememberedPod { pod: made, ifname: "eth0".to_owned() }]);
}

#[test]
fn a_second_agent_is_kept_out() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path());
    assert!(matches!(LeaseStore::open(dir.path(), &ranges(), Arc::new(RealDisk)), Err(LeaseError::InUse(_))));
    drop(first);
    open(dir.path());
}

#[test]
fn a_released_address_rests_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let released = {
        let store = open(dir.path());
        let lease = add(&store, "a");
        store.release(&lease.owner).unwrap();
        lease.addresses
    };
    let store = open(dir.path());
    assert_eq!(store.leases(), []);
    let next = add(&store, "b").addresses;
    assert!(next.iter().all(|a| !released.contains(a)), "{next:?} was released just before");
}

#[test]
fn damaged_files_are_set_aside_and_their_device_keeps_its_addresses() {
    let whole = Lease { attached: None, ..lease_of("x") }.to_file().unwrap();
    let mut flipped = whole.clone();
    let at = flipped.windows(10).position(|w| w == b"10.244.1.9").unwrap() + 9;
    flipped[at] = b'8';
    let others = Lease { owner: owner("other"), ..lease_of("x") }.to_file().unwrap();
    let damages: Vec<Vec<u8>> = vec![
        vec![],
        whole[..whole.len() / 2].to_vec(),
        whole[..whole.len() - 1].to_vec(),
        flipped,
        others,
        vec![0xff; 300],
    ];
    for damaged in damages {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()));
        std::fs::write(dir.path().join("leases/x@eth0.lease"), &damaged).unwrap();
        let store = open(dir.path());
        assert_eq!(store.leases(), [], "nothing is invented from {damaged:?}");
        assert!(dir.path().join("leases/damaged/x@eth0.lease").exists());
        let device = Device { name: name_of(&owner("x")), addresses: vec!["10.244.1.2".parse().unwrap()] };
        let found = store.compare(std::slice::from_ref(&device), name_of);
        assert_eq!((found.strangers.as_slice(), found.damaged_gone.len()), ([device.clone()].as_slice(), 0));
        store.hold(&found.strangers);
        assert_ne!(add(&store, "b").addresses[0], device.addresses[0], "given twice");
        store.hold(&[]);
        let gone = store.compare(&[], name_of);
        assert_eq!(gone.damaged_gone, [owner("x")]);
        store.release(&owner("x")).unwrap();
        assert!(!dir.path().join("leases/damaged/x@eth0.lease").exists());
    }
}

fn lease_of(id: &str) -> Lease {
    let request = request(id);
    Lease {
        owner: request.attachment.clone(),
        network: request.network.clone(),
        pod: None,
        uid: String::new(),
        netns: String::new(),
        addresses: vec!["10.244.1.9".parse().unwrap()],
        attached: None,
    }
}

#[test]
fn two_leases_of_one_address_are_not_both_believed() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    for id in ["x", "y"] {
        std::fs::write(dir.path().join(format!("leases/{id}@eth0.lease")), lease_of(id).to_file().unwrap()).unwrap();
    }
    let store = open(dir.path());
    assert_eq!(store.leases().len(), 1);
    assert!(dir.path().join("leases/damaged/y@eth0.lease").exists());
}

#[test]
fn an_exhausted_range_is_an_error_that_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for n in 0..13 {
        add(&store, &format!("c{n}"));
    }
    let error = store.reserve(&request("late"), &[]).unwrap_err();
    assert_eq!(error.to_string(), "no free address in 10.244.1.0/28: 13 of 13 are taken");
    assert!(!dir.path().join("leases/late@eth0.lease").exists());
    store.release(&owner("c5")).unwrap();
    add(&store, "late");
}

/// A disk on which the power is cut before the operation of a number: from then on everything fails. It knows what a power cut
/// may take with it: contents and names that have not been synced.
pub(crate) struct Failing {
    pub(crate) left: AtomicU32,
    /// Only that one operation fails, for want of room, and after it all is well; none: it has not come to it yet.
    once: Option<AtomicBool>,
    real: RealDisk,
    unsynced: Mutex<BTreeSet<PathBuf>>,
    unsynced_dirs: Mutex<BTreeSet<PathBuf>>,
}

impl Failing {
    pub(crate) fn after(operations: u32) -> Self {
        Self {
            left: AtomicU32::new(operations),
            once: None,
            real: RealDisk,
            unsynced: Mutex::default(),
            unsynced_dirs: Mutex::default(),
        }
    }

    /// A disk that is full for the one operation of that number.
    pub(crate) fn once_after(operations: u32) -> Self {
        Self { once: Some(AtomicBool::new(false)), ..Self::after(operations) }
    }

    /// Whether that operation came.
    pub(crate) fn has_failed(&self) -> bool {
        self.once.as_ref().is_some_and(|failed| failed.load(Ordering::SeqCst))
    }

    /// Whether a power cut now would take this lease.
    pub(crate) fn would_lose(&self, lease: &Path) -> bool {
        let dir = lease.parent().unwrap();
        self.unsynced.lock().unwrap().contains(lease) || self.unsynced_dirs.lock().unwrap().contains(dir)
    }

    /// The power cut: files whose contents were not synced are empty, as file systems leave them that order no data.
    pub(crate) fn lose_unsynced(&self) {
        for path in self.unsynced.lock().unwrap().iter().filter(|p| p.exists()) {
            std::fs::write(path, "").unwrap();
        }
    }

    fn step<T>(&self, work: impl FnOnce(&RealDisk) -> io::Result<T>) -> io::Result<T> {
        let alive = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        match (&self.once, alive) {
            (None, Err(_)) => return Err(io::Error::other("the power is cut")),
            (Some(failed), Err(_)) if !failed.swap(true, Ordering::SeqCst) => {
                return Err(io::ErrorKind::StorageFull.into());
            }
            _ => {}
        }
        work(&self.real)
    }
}

impl Disk for Failing {
    fn write(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        // Two instructions of a machine that dies: the file is there, then what is in it.
        self.unsynced.lock().unwrap().insert(path.to_owned());
        self.step(|disk| disk.write(path, &contents[..contents.len() / 2]))?;
        self.step(|disk| disk.write(path, contents))
    }
    fn sync_file(&self, path: &Path) -> io::Result<()> {
        self.step(|disk| disk.sync_file(path))?;
        self.unsynced.lock().unwrap().remove(path);
        Ok(())
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step(|disk| disk.rename(from, to))?;
        self.unsynced_dirs.lock().unwrap().insert(to.parent().unwrap().to_owned());
        let mut unsynced = self.unsynced.lock().unwrap();
        if unsynced.remove(from) {
            unsynced.insert(to.to_owned())
        } else {
            unsynced.remove(to)
        };
        Ok(())
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.step(|disk| disk.sync_dir(path))?;
        self.unsynced_dirs.lock().unwrap().remove(path);
        Ok(())
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step(|disk| disk.remove(path))
    }
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.step(|disk| disk.read(path))
    }
    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.step(|disk| disk.list(path))
    }
    fn age(&self, path: &Path) -> io::Result<Duration> {
        self.step(|disk| disk.age(path))
    }
}

#[test]
fn opening_can_be_cut_anywhere_and_is_whole_the_next_time() {
    for cut in 0.. {
        let dir = tempfile::tempdir().unwrap();
        {
            let store = open(dir.path());
            add(&store, "kept");
            let gone = add(&store, "gone");
            store.release(&gone.owner).unwrap();
        }
        std::fs::write(dir.path().join("leases/bad@eth0.lease"), "{").unwrap();
        std::fs::write(dir.path().join("leases/half@eth0.tmp"), "{").unwrap();
        let cut_short = LeaseStore::open(dir.path(), &ranges(), Arc::new(Failing::after(cut))).is_err();
        let store = open(dir.path());
        assert_eq!(store.leases().iter().map(|l| l.owner.clone()).collect::<Vec<_>>(), [owner("kept")]);
        assert!(!dir.path().join("leases/half@eth0.tmp").exists());
        assert!(dir.path().join("leases/damaged/bad@eth0.lease").exists());
        if !cut_short {
            assert!(cut > 8, "only {cut} operations: the test cuts nothing");
            return;
        }
    }
}

/// A state directory of CNI plugins in which `host-local` gave addresses to these containers.
fn before(dir: &Path, leases: &[(&str, &str)]) -> HostLocal {
    let network = dir.join("cni/networks/cbr0");
    std::fs::create_dir_all(&network).unwrap();
    for (address, container) in leases {
        std::fs::write(network.join(address), format!("{container}\r\neth0")).unwrap();
    }
    HostLocal::new(&dir.join("cni"))
}

/// ADD of a container of a pod in a namespace, which asks for an address.
fn asks(store: &LeaseStore, id: &str, namespace: &str, address: &str) -> Result<Lease, LeaseError> {
    let mut request = request(id);
    request.pod.as_mut().unwrap().namespace = namespace.to_owned();
    store.reserve(&request, &[address.parse().unwrap()])
}

#[test]
fn an_address_goes_from_one_namespace_to_another_only_after_it_has_rested() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let wanted = "10.244.1.9";
    let lease = asks(&store, "a", "one", wanted).unwrap();
    assert_eq!(lease.addresses[0].to_string(), wanted);
    assert_eq!(asks(&store, "a", "one", "10.244.1.8").unwrap(), lease, "asked again it is the same");
    let taken = asks(&store, "b", "one", wanted).unwrap_err();
    assert!(taken.to_string().contains("eth0 of container a has it"), "{taken}");

    let refused = |store: &LeaseStore, id: &str, namespace: &str| {
        let error = asks(store, id, namespace, wanted).unwrap_err();
        assert!(matches!(error, LeaseError::Resting { .. }), "{error}");
        assert!(
            error.to_string().starts_with("10.244.1.9 is asked for") && error.to_string().contains("tries again"),
            "{error}"
        );
        assert!(store.lease(&owner(id)).is_none() && !dir.path().join(format!("leases/{id}@eth0.lease")).exists());
    };
    store.release(&owner("a")).unwrap();
    refused(&store, "b", "two");
    // Over a restart too; who makes pods where it was gets it at once.
    drop(store);
    let store = open(dir.path());
    refused(&store, "b", "two");
    assert_eq!(asks(&store, "c", "one", wanted).unwrap().addresses[0].to_string(), wanted);

    // Of a device that nobody knew nobody knows the namespace either, whoever had the address before.
    store.release(&owner("c")).unwrap();
    let stranger = Device { name: "tp-x".into(), addresses: vec![wanted.parse().unwrap()] };
    store.hold(&[stranger]);
    assert!(matches!(asks(&store, "d", "one", wanted), Err(LeaseError::Ipam(IpamError::Taken { .. }))));
    store.device_gone("tp-x");
    refused(&store, "d", "one");

    // When its time is over it is anybody's.
    store.lock().pool = Pool::new(&ranges()).unwrap();
    store.lock().pool.rest(wanted.parse().unwrap(), Duration::ZERO);
    assert_eq!(asks(&store, "e", "two", wanted).unwrap().addresses[0].to_string(), wanted);
}

#[test]
fn what_the_network_before_gave_is_given_to_nobody_until_its_container_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let range = ["10.244.1.0/29".parse().unwrap()];
    let store = LeaseStore::open(&dir.path().join("state"), &range, Arc::new(RealDisk)).unwrap();
    let store = store.after(before(dir.path(), &[("10.244.1.2", "old-1"), ("10.244.1.3", "old-2")]));
    let address = |id: &str| store.reserve(&request(id), &[]).unwrap().addresses[0].to_string();
    assert_eq!(address("a"), "10.244.1.4");
    // Its plugin was at work a moment ago.
    before(dir.path(), &[("10.244.1.5", "late")]);
    assert_eq!(address("b"), "10.244.1.6");
    let error = store.reserve(&request("c"), &[]).unwrap_err().to_string();
    assert!(error.contains("5 of 5 are taken"), "{error}");

    store.release_before("old-2").unwrap();
    assert!(!dir.path().join("cni/networks/cbr0/10.244.1.3").exists());
    assert_eq!(address("c"), "10.244.1.3");
    store.release_before("never-heard-of").unwrap();
    assert!(store.reserve(&request("d"), &[]).is_err());
}

#[test]
fn addresses_of_pods_before_are_held_as_long_as_they_are_said_and_ours_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let range = ["10.244.1.0/29".parse().unwrap()];
    let store = LeaseStore::open(dir.path(), &range, Arc::new(RealDisk)).unwrap();
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    store.hold_for_predecessor(&BTreeSet::from([ip("10.244.1.2"), ip("10.244.1.3")]));
    let ours = store.reserve(&request("a"), &[]).unwrap().addresses[0];
    assert_eq!(ours, ip("10.244.1.4"));
    assert!(store.knows(ours) && !store.knows(ip("10.244.1.2")));
    // An address that is ours is not taken away, whoever claims it.
    store.hold_for_predecessor(&BTreeSet::from([ip("10.244.1.3"), ours]));
    assert_eq!(store.lease(&owner("a")).unwrap().addresses, [ours]);
    store.release(&owner("a")).unwrap();
    assert!(store.knows(ours), "what was ours a moment ago is no pod of the network before");
    // The fresh ones first, then the longest released: the pod's before.
    let rest: Vec<String> =
        ["b", "c", "d"].iter().map(|id| store.reserve(&request(id), &[]).unwrap().addresses[0].to_string()).collect();
    assert_eq!(rest, ["10.244.1.5", "10.244.1.6", "10.244.1.2"]);
}

#[test]
fn a_lost_lease_is_written_again_and_if_that_fails_its_addresses_stay_held() {
    let device = Device { name: name_of(&owner("x")), addresses: vec!["10.244.1.2".parse().unwrap()] };
    let lost = || {
        let request = request("x");
        let made = attached(&request, &device.addresses);
        let attached = Some(AttachedDevice { pod: made.pod, mtu: made.mtu });
        Lease { addresses: device.addresses.clone(), attached, ..lease_of("x") }
    };
    let next = |store: &LeaseStore| store.reserve(&request("next"), &[]).map(|lease| lease.addresses[0]);
    for cut in 0.. {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()));
        std::fs::write(dir.path().join("leases/x@eth0.lease"), "torn").unwrap();
        // The store is opened on a disk that works.
        drop(open(dir.path()));
        let disk = Arc::new(Failing::once_after(cut));
        let Ok(store) = LeaseStore::open(dir.path(), &ranges(), disk.clone()) else { continue };
        store.hold(std::slice::from_ref(&device));
        let adopted = store.adopt(lost(), &device.name);
        // The disk may refuse this, too.
        if let Ok(given) = next(&store) {
            assert_ne!(given, device.addresses[0], "given twice, cut {cut}: {adopted:?}");
        }
        if !disk.has_failed() {
            assert!(adopted.is_ok() && cut > 4, "{adopted:?}, {cut} operations");
            drop(store);
            assert_eq!(open(dir.path()).lease(&owner("x")), Some(lost()));
            return;
        }
    }
}

#[test]
fn a_lost_lease_of_an_address_that_another_has_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let other = add(&store, "other");
    let lease = Lease { addresses: vec![other.addresses[0], "10.244.1.9".parse().unwrap()], ..lease_of("x") };
    assert!(matches!(store.adopt(lease, "tp-x@eth0"), Err(LeaseError::Ipam(IpamError::Conflict { .. }))));
    assert_eq!((store.lease(&owner("x")), store.lease(&owner("other"))), (None, Some(other)));
    assert!(store.knows("10.244.1.9".parse().unwrap()), "held for the device");
}
