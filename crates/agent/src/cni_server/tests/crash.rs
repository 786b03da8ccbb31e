//! The agent dies at every step of ADD and DEL: disk operations and kernel operations counted together. Whatever the step, the
//! next start finds every device with a lease or its addresses held, gives no address twice, and after the runtime's DEL (or a
//! power cut, which takes the devices and what was not synced) nothing is left.

use std::sync::Mutex;

use towpath_wire::cni::{DelRequest, Reply, Request};

use super::kernel::{Api, Kernel, netns};
use super::*;
use crate::ipam::tests::{Failing, name_of};
use crate::ipam::{Disk, LeaseStore};

type Ops = Operations<Api, Kernel>;

/// An agent in a directory, over a kernel; `power` is cut for both.
async fn agent(
    dir: &Path,
    kernel: &Arc<Kernel>,
    disk: Arc<dyn Disk>,
    power: Option<Arc<Failing>>,
) -> Option<(Ops, Arc<LeaseStore>)> {
    *kernel.power.lock().unwrap() = power;
    let leases = Arc::new(LeaseStore::open(dir, &ranges(), disk).ok()?);
    // The sender may go: its last value stays.
    let (_, readiness) = watch::channel(Readiness::Ready);
    let settings = Settings::new(dir.join("deletes"));
    Some((Operations::new(settings, Arc::default(), kernel.clone(), leases.clone(), readiness), leases))
}

async fn add(ops: &Ops, id: &str) -> Reply {
    ops.handle(Request::Add(request(id)), Some(netns().into()), CancellationToken::new()).await.reply
}

async fn del(ops: &Ops, id: &str) -> Reply {
    let request = DelRequest { attachment: owner(id), network: "towpath".into() };
    ops.handle(Request::Del(request), None, CancellationToken::new()).await.reply
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Life {
    Add,
    AddThenDel,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum After {
    Restart,
    PowerCut,
}

/// Runs the life up to the cut; says whether it came to its end, and what was answered.
async fn cut_life(dir: &Path, kernel: &Arc<Kernel>, life: Life, after: After, cut: u32) -> (bool, Option<Reply>) {
    // The first container is there before and must come through.
    let (ops, _leases) = agent(dir, kernel, Arc::new(RealDisk), None).await.unwrap();
    assert!(matches!(add(&ops, "bystander").await, Reply::Added { .. }));
    drop((ops, _leases));
    let power = Arc::new(Failing::after(cut));
    let Some((ops, _leases)) = agent(dir, kernel, power.clone(), Some(power.clone())).await else {
        return (false, None);
    };
    let added = add(&ops, "victim").await;
    if matches!(added, Reply::Added { .. }) {
        assert!(
            !power.would_lose(&dir.join("leases/victim@eth0.lease")),
            "ADD was answered before its lease was on the disk"
        );
    }
    if life == Life::AddThenDel && matches!(added, Reply::Added { .. }) {
        del(&ops, "victim").await;
        // What the dead agent would have queued, the plugin queues; tested elsewhere.
        let _ = std::fs::remove_file(dir.join("deletes/victim@eth0.del"));
    }
    let _ = std::fs::remove_dir_all(dir.join("deletes"));
    if after == After::PowerCut {
        power.lose_unsynced();
        kernel.reboot();
    }
    (power.left.load(Ordering::SeqCst) > 0, Some(added))
}

static PRINTED: Mutex<()> = Mutex::new(());

async fn crash_everywhere(life: Life, after: After) {
    for cut in 0..500 {
        let context = format!("{life:?}, {after:?}, cut before operation {cut}");
        let dir = tempfile::tempdir().unwrap();
        let kernel: Arc<Kernel> = Arc::default();
        let (whole, answer) = cut_life(dir.path(), &kernel, life, after, cut).await;
        let (ops, leases) = agent(dir.path(), &kernel, Arc::new(RealDisk), None).await.unwrap();
        ops.reconcile().await.unwrap();
        let devices = kernel.devices();
        for lease in leases.leases() {
            assert!(
                devices.iter().any(|d| d.name == name_of(&lease.owner)),
                "{context}: {} leaks its address",
                lease.owner
            );
        }
        for device in &devices {
            let leased =
                leases.leases().iter().any(|l| name_of(&l.owner) == device.name && l.addresses == device.addresses);
            assert!(leased, "{context}: {device:?} has no lease");
        }
        if after == After::Restart {
            assert!(leases.lease(&owner("bystander")).is_some(), "{context}: the bystander's lease is lost");
            if life == Life::Add && matches!(answer, Some(Reply::Added { .. })) {
                assert!(leases.lease(&owner("victim")).is_some(), "{context}: an answered ADD is forgotten");
            }
        }
        // The fake kernel refuses an address that another device has.
        for n in 0..4 {
            assert!(matches!(add(&ops, &format!("next{n}")).await, Reply::Added { .. }), "{context}");
        }
        for id in ["victim", "bystander", "next0", "next1", "next2", "next3"] {
            assert_eq!(del(&ops, id).await, Reply::Done, "{context}");
        }
        assert_eq!((kernel.devices(), leases.leases(), leases.usage()[0].taken), (vec![], vec![], 0), "{context}");
        assert_eq!(files(&dir.path().join("leases")), Vec::<String>::new(), "{context}");
        if whole {
            let _one_at_a_time = PRINTED.lock();
            eprintln!("{life:?}, {after:?}: cut before each of {cut} operations");
            assert!(cut > 8, "only {cut} operations: the test cuts nothing");
            return;
        }
    }
    panic!("never came to its end");
}

#[tokio::test]
async fn an_add_cut_anywhere_leaks_nothing() {
    crash_everywhere(Life::Add, After::Restart).await;
}

#[tokio::test]
async fn an_add_cut_anywhere_by_a_power_cut_leaks_nothing() {
    crash_everywhere(Life::Add, After::PowerCut).await;
}

#[tokio::test]
async fn a_del_cut_anywhere_leaks_nothing() {
    crash_everywhere(Life::AddThenDel, After::Restart).await;
}

#[tokio::test]
async fn a_del_cut_anywhere_by_a_power_cut_leaks_nothing() {
    crash_everywhere(Life::AddThenDel, After::PowerCut).await;
}

/// A disk without room for one operation, whichever: that ADD fails or succeeds, the next succeeds, and after DEL nothing is left, neither now nor
/// for the next agent.
#[tokio::test]
async fn a_disk_that_is_full_for_a_moment_costs_one_answer_at_most() {
    for cut in 0..500 {
        let context = format!("no room for disk operation {cut}");
        let dir = tempfile::tempdir().unwrap();
        let kernel: Arc<Kernel> = Arc::default();
        let disk = Arc::new(Failing::once_after(cut));
        let Some((ops, leases)) = agent(dir.path(), &kernel, disk.clone(), None).await else {
            assert!(disk.has_failed(), "{context}: the store does not open");
            continue;
        };
        let mut refused = 0;
        for id in ["first", "second"] {
            match add(&ops, id).await {
                Reply::Added { .. } => {}
                Reply::Failed { error } => {
                    assert_eq!(error.code, ErrorCode::State, "{context}: {error}");
                    assert!(error.msg.contains("no storage space"), "{context}: {error}");
                    refused += 1;
                    let again = add(&ops, id).await;
                    assert!(matches!(again, Reply::Added { .. }), "{context}: asked again: {again:?}");
                }
                other => panic!("{context}: {other:?}"),
            }
        }
        assert_eq!((leases.leases().len(), kernel.devices().len(), leases.usage()[0].taken), (2, 2, 2), "{context}");
        for id in ["first", "second"] {
            assert_eq!(del(&ops, id).await, Reply::Done, "{context}");
        }
        // A DEL that failed for want of room is queued, and done by the next sweep.
        ops.sweep().await;
        assert!(refused <= 1, "{context}: {refused} ADDs were refused");
        assert_eq!((kernel.devices(), leases.leases(), leases.usage()[0].taken), (vec![], vec![], 0), "{context}");
        let came = disk.has_failed();
        drop((ops, leases));
        let (_ops, leases) = agent(dir.path(), &kernel, Arc::new(RealDisk), None).await.unwrap();
        assert_eq!((leases.leases(), files(&dir.path().join("leases"))), (vec![], Vec::<String>::new()), "{context}");
        if !came {
            assert!(cut > 12, "only {cut} operations: the test fills nothing");
            return;
        }
    }
    panic!("never came to its end");
}
