//! The server over a real socket with a fake kernel, and the whole of ADD and DEL cut at every step.

mod crash;
mod kernel;

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use towpath_model::{Bandwidth, Rate};
use towpath_plan::ipam::Usage;
use towpath_wire::cni::{
    AddRequest, AddResult, Attachment, CheckRequest, CniError, DelRequest, ErrorCode, Reply, Request, RuntimeBandwidth,
};

use towpath_wire::ipam::{Kind, NodeAddresses};

use super::*;
use crate::ipam::RealDisk;
use crate::ipam::tests::{ranges, request};
use kernel::{Api, Kernel, ask, netns};

struct Rig {
    dir: tempfile::TempDir,
    kernel: Arc<Kernel>,
    api: Arc<Api>,
    leases: Arc<LeaseStore>,
    readiness: watch::Sender<Readiness>,
    config: CniServerConfig,
    server: Option<CniServer>,
}

impl Rig {
    async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), Arc::default()).await
    }

    async fn start_in(dir: tempfile::TempDir, kernel: Arc<Kernel>) -> Self {
        let leases = Arc::new(LeaseStore::open(dir.path(), &ranges(), Arc::new(RealDisk)).unwrap());
        let (readiness, _) = watch::channel(Readiness::Ready);
        let mut config = CniServerConfig {
            socket: dir.path().join("run/cni.sock"),
            settings: Settings::new(dir.path().join("deletes")),
            sweep_every: Duration::from_secs(3600),
        };
        config.settings.ready_wait = Duration::from_millis(50);
        config.settings.fetch_wait = Duration::from_millis(50);
        config.settings.attach_wait = Duration::from_millis(300);
        let mut rig = Self { dir, kernel, api: Arc::default(), leases, readiness, config, server: None };
        rig.serve().await;
        rig
    }

    async fn serve(&mut self) {
        let (index, plumber, leases) = (self.api.clone(), self.kernel.clone(), self.leases.clone());
        let started = CniServer::start(self.config.clone(), index, plumber, leases, self.readiness.subscribe()).await;
        self.server = Some(started.unwrap());
    }

    /// As if the agent had been stopped and started.
    async fn restart(mut self) -> Self {
        self.server.take().unwrap().drain(Duration::from_secs(5)).await;
        let Self { dir, kernel, leases, .. } = self;
        drop(leases);
        Self::start_in(dir, kernel).await
    }

    async fn ask(&self, request: Request) -> Reply {
        let namespace = matches!(request, Request::Add(_) | Request::Check(_)).then(netns);
        ask(&self.config.socket, &request, namespace.as_ref()).await.unwrap()
    }

    async fn add(&self, id: &str) -> Result<AddResult, CniError> {
        match self.ask(Request::Add(request(id))).await {
            Reply::Added { result } => Ok(result),
            Reply::Failed { error } => Err(error),
            other => panic!("{other:?} to ADD"),
        }
    }

    async fn del(&self, id: &str) -> Reply {
        self.ask(Request::Del(DelRequest { attachment: owner(id), network: "towpath".into() })).await
    }

    async fn check(&self, id: &str, prev_result: AddResult) -> Reply {
        self.ask(Request::Check(CheckRequest {
            attachment: owner(id),
            network: "towpath".into(),
            netns: format!("/run/netns/{id}"),
            prev_result,
        }))
        .await
    }

    fn taken(&self) -> u128 {
        self.leases.usage().iter().map(|Usage { taken, .. }| *taken).max().unwrap()
    }

    fn queued(&self) -> usize {
        std::fs::read_dir(&self.config.settings.deletes).map_or(0, Iterator::count)
    }
}

fn owner(id: &str) -> Attachment {
    request(id).attachment
}

fn code(reply: &Reply) -> Option<ErrorCode> {
    if let Reply::Failed { error } = reply { Some(error.code) } else { None }
}

#[tokio::test]
async fn add_answers_with_what_was_made_and_del_leaves_nothing() {
    let rig = Rig::start().await;
    let result = rig.add("a").await.unwrap();
    assert_eq!(result.interfaces[0].sandbox, "");
    assert_eq!((result.interfaces[1].name.as_str(), result.interfaces[1].sandbox.as_str()), ("eth0", "/run/netns/a"));
    assert_eq!(result.interfaces[1].mac, "02:00:00:00:00:01");
    let ips: Vec<String> =
        result.ips.iter().map(|ip| format!("{} {:?} {:?}", ip.address, ip.gateway.unwrap(), ip.interface)).collect();
    assert_eq!(ips, ["10.244.1.2/32 10.244.1.1 Some(1)", "fd00:10:244:1::2/128 fd00:10:244:1::1 Some(1)"]);
    let routes: Vec<String> = result.routes.iter().map(|r| format!("{} {}", r.dst, r.gw.unwrap())).collect();
    assert_eq!(routes, ["0.0.0.0/0 10.244.1.1", "::/0 fd00:10:244:1::1"]);
    assert_eq!(rig.kernel.isolation_of(&owner("a")), Some(Isolation::Policy));
    assert!(rig.leases.lease(&owner("a")).unwrap().attached.is_some(), "the lease knows what was made");
    assert_eq!(rig.del("a").await, Reply::Done);
    assert_eq!(rig.del("a").await, Reply::Done, "again");
    assert_eq!((rig.kernel.devices().len(), rig.taken(), rig.queued()), (0, 0, 0));
}

#[tokio::test]
async fn limits_of_the_runtime_come_with_the_device_and_nonsense_makes_none() {
    let rig = Rig::start().await;
    let ask = async |id: &str, ingress_rate, egress_rate| {
        let bandwidth = Some(RuntimeBandwidth { ingress_rate, egress_rate });
        rig.ask(Request::Add(AddRequest { bandwidth, ..request(id) })).await
    };
    assert!(matches!(ask("a", 8_000_000, 0).await, Reply::Added { .. }));
    let limits = Bandwidth { ingress: Rate::new(8_000_000), egress: None };
    assert_eq!(*rig.kernel.limits.lock().unwrap(), limits);
    for (ingress, egress, name) in [(999, 0, "ingressRate 999"), (8_000, u64::MAX, "egressRate 18446744073709551615")] {
        let Reply::Failed { error } = ask("b", ingress, egress).await else { panic!("made with {ingress}, {egress}") };
        assert_eq!(error.code, ErrorCode::InvalidConfig);
        assert!(error.to_string().contains(name) && error.to_string().contains("from 1k to 1P"), "{error}");
    }
    assert_eq!((rig.kernel.devices().len(), rig.taken()), (1, 1));
}

#[tokio::test]
async fn the_socket_is_roots_alone() {
    let rig = Rig::start().await;
    let metadata = std::fs::metadata(&rig.config.socket).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    if metadata.uid() != 0 {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "needs root");
        eprintln!("the second half is skipped: needs root");
        return;
    }
    // Even where the file's mode would let them, others are turned away by who they are.
    for dir in [rig.dir.path(), &rig.dir.path().join("run")] {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    std::fs::set_permissions(&rig.config.socket, std::fs::Permissions::from_mode(0o666)).unwrap();
    let socket = rig.config.socket.clone();
    let asked = tokio::task::spawn_blocking(move || std::thread::spawn(move || kernel::ask_as_nobody(&socket)).join());
    assert_eq!(asked.await.unwrap().unwrap().unwrap(), b"", "answered to nobody");
}

#[tokio::test]
async fn add_again_gives_the_same_answer_while_all_is_as_it_was() {
    let rig = Rig::start().await;
    let first = rig.add("a").await.unwrap();
    assert_eq!(rig.add("a").await.unwrap(), first);
    assert_eq!(rig.kernel.attached.load(Ordering::SeqCst), 1, "not made again");
    rig.kernel.lose(&owner("a"));
    let again = rig.add("a").await.unwrap();
    assert_eq!(rig.kernel.attached.load(Ordering::SeqCst), 2);
    assert_eq!((rig.kernel.devices().len(), rig.taken(), again.ips.len()), (1, 1, 2));
}

#[tokio::test]
async fn an_agent_that_is_not_ready_says_why() {
    let rig = Rig::start().await;
    rig.readiness.send_replace(Readiness::Starting("waiting for the node's podCIDR".into()));
    let error = rig.add("a").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::TryAgain);
    assert!(error.msg.contains("waiting for the node's podCIDR"), "{error}");
    let status = rig.ask(Request::Status { network: "towpath".into() }).await;
    assert_eq!(code(&status), Some(ErrorCode::NotAvailable));
    assert_eq!(rig.del("a").await, Reply::Done, "DEL does not wait for readiness");
    assert_eq!(rig.taken(), 0);
    rig.readiness.send_replace(Readiness::Ready);
    assert_eq!(rig.ask(Request::Status { network: "towpath".into() }).await, Reply::Done);
    rig.add("a").await.unwrap();
}

#[tokio::test]
async fn an_unknown_pod_is_asked_for_once_and_isolated_when_nobody_answers() {
    let rig = Rig::start().await;
    rig.api.forget();
    for (fetched, expected) in [
        (Some(Fetched::Absent), Err(ErrorCode::TryAgain)),
        (None, Err(ErrorCode::TryAgain)),
        (
            Some(Fetched::Found(PodFacts { uid: Some("uid-other".into()), choice: Choice::Any })),
            Err(ErrorCode::StaleSandbox),
        ),
        (Some(Fetched::Found(PodFacts { uid: Some("uid-a".into()), choice: Choice::Any })), Ok(Isolation::Policy)),
        (Some(Fetched::Found(PodFacts { uid: None, choice: Choice::Any })), Ok(Isolation::Policy)),
        (Some(Fetched::Unreachable("connection refused".into())), Ok(Isolation::HostOnly)),
    ] {
        let before = rig.api.fetches.load(Ordering::SeqCst);
        rig.api.answer(fetched.clone());
        let started = Instant::now();
        let outcome = rig.add("a").await.map(|_| rig.kernel.isolation_of(&owner("a")).unwrap()).map_err(|e| e.code);
        assert_eq!(outcome, expected, "{fetched:?}");
        assert!(started.elapsed() < Duration::from_secs(5));
        assert_eq!(rig.api.fetches.load(Ordering::SeqCst), before + 1);
        rig.del("a").await;
        assert_eq!((rig.taken(), rig.kernel.devices().len()), (0, 0), "{fetched:?}");
    }
}

#[tokio::test]
async fn a_pod_known_by_another_uid_is_never_taken_for_it() {
    let rig = Rig::start().await;
    rig.api.knows("pod-a", Some("uid-new"));
    rig.api.answer(Some(Fetched::Unreachable("down".into())));
    assert_eq!(rig.add("a").await.unwrap_err().code, ErrorCode::TryAgain);
    rig.api.answer(Some(Fetched::Found(PodFacts { uid: Some("uid-new".into()), choice: Choice::Any })));
    assert_eq!(rig.add("a").await.unwrap_err().code, ErrorCode::StaleSandbox);
}

fn addresses(result: &AddResult) -> Vec<String> {
    result.ips.iter().map(|ip| ip.address.address.to_string()).collect()
}

#[tokio::test]
async fn a_pod_gets_the_addresses_that_it_may_choose_and_the_same_again_whatever_it_asks_for_by_then() {
    let rig = Rig::start().await;
    let choice = |address: &str| Choice::These {
        addresses: vec![address.parse().unwrap()],
        mac: Some([0x02, 0, 0x5e, 0x10, 0, 1]),
    };
    rig.api.choose(choice("10.244.1.9"));
    let first = rig.add("a").await.unwrap();
    assert_eq!(addresses(&first), ["10.244.1.9", "fd00:10:244:1::2"]);
    assert_eq!(first.interfaces[1].mac, "02:00:5e:10:00:01");
    let taken = rig.add("b").await.unwrap_err();
    assert_eq!(taken.code, ErrorCode::Choice);
    assert!(taken.msg.contains("10.244.1.9 is asked for"), "{taken}");
    // The annotation is another by now, or its namespace lets it no longer: what it has it keeps, over a restart too.
    for later in [choice("10.244.1.8"), Choice::Refused("no longer".into()), Choice::Any] {
        rig.api.choose(later);
        assert_eq!(rig.add("a").await.unwrap(), first);
    }
    let rig = rig.restart().await;
    rig.api.choose(Choice::Refused("no longer".into()));
    assert_eq!(rig.add("a").await.unwrap(), first);
    rig.del("a").await;
    rig.api.choose(choice("10.244.1.9"));
    assert_eq!(addresses(&rig.add("b").await.unwrap())[0], "10.244.1.9", "free again, for its namespace at once");
    rig.del("b").await;
    assert_eq!((rig.taken(), rig.kernel.devices().len(), rig.queued()), (0, 0, 0));
}

#[tokio::test]
async fn a_pod_that_may_not_choose_gets_no_network_and_leaves_nothing() {
    let rig = Rig::start().await;
    rig.api.choose(Choice::Refused("pod default/pod-a: not so".into()));
    let error = rig.add("a").await.unwrap_err();
    assert_eq!((error.code, error.msg.as_str()), (ErrorCode::Choice, "pod default/pod-a: not so"));
    rig.api.choose(Choice::These { addresses: vec!["10.244.1.1".parse().unwrap()], mac: None });
    assert_eq!(rig.add("a").await.unwrap_err().code, ErrorCode::Choice);
    // What the device is refused for, too.
    rig.api.choose(Choice::These { addresses: vec!["10.244.1.9".parse().unwrap()], mac: Some([2; 6]) });
    rig.kernel.refuse_attach.store(true, Ordering::SeqCst);
    assert_eq!(rig.add("a").await.unwrap_err().code, ErrorCode::Plumbing);
    assert_eq!((rig.taken(), rig.kernel.devices().len(), rig.leases.leases().len()), (0, 0, 0));
}

#[tokio::test]
async fn a_pod_that_may_have_chosen_gets_no_other_address_while_nobody_can_say() {
    let rig = Rig::start().await;
    rig.api.forget();
    rig.api.answer(Some(Fetched::Unreachable("connection refused".into())));
    rig.api.lets_choose("default");
    let error = rig.add("a").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::TryAgain);
    assert!(error.msg.contains("namespace default") && error.msg.contains("connection refused"), "{error}");
    assert_eq!(rig.taken(), 0);
}

#[tokio::test]
async fn a_container_that_is_no_pod_gets_an_address_and_no_policy() {
    let rig = Rig::start().await;
    let mut add = request("podman");
    add.pod = None;
    assert!(matches!(rig.ask(Request::Add(add)).await, Reply::Added { .. }));
    assert_eq!(rig.kernel.isolation_of(&owner("podman")), Some(Isolation::NotAPod));
    assert!(rig.leases.pod_addresses().is_empty());
}

#[tokio::test]
async fn del_of_an_old_sandbox_leaves_the_new_one_of_the_pod_alone() {
    let rig = Rig::start().await;
    let mut new = request("new");
    new.pod = request("old").pod;
    rig.add("old").await.unwrap();
    assert!(matches!(rig.ask(Request::Add(new)).await, Reply::Added { .. }));
    let pod = towpath_model::NamespacedName::new("default", "pod-old");
    assert_eq!(rig.leases.pod_addresses()[&pod].len(), 4, "both sandboxes are the pod's while they last");
    rig.del("old").await;
    assert_eq!(rig.kernel.devices().len(), 1);
    assert_eq!(rig.leases.pod_addresses()[&pod], rig.leases.lease(&owner("new")).unwrap().addresses);
}

#[tokio::test]
async fn check_finds_what_is_missing() {
    let rig = Rig::start().await;
    let result = rig.add("a").await.unwrap();
    assert_eq!(rig.check("a", result.clone()).await, Reply::Done);
    let mut without_address = result.clone();
    without_address.ips.pop();
    let mut without_device = result.clone();
    without_device.interfaces.remove(0);
    for wrong in [without_address, without_device, AddResult::default()] {
        assert_eq!(code(&rig.check("a", wrong).await), Some(ErrorCode::Mismatch));
    }
    rig.kernel.lose(&owner("a"));
    assert_eq!(code(&rig.check("a", result.clone()).await), Some(ErrorCode::Mismatch));
    rig.del("a").await;
    assert_eq!(code(&rig.check("a", result).await), Some(ErrorCode::Mismatch));
}

#[tokio::test]
async fn gc_removes_what_the_runtime_no_longer_uses_of_that_network() {
    let rig = Rig::start().await;
    for id in ["a", "b", "c"] {
        rig.add(id).await.unwrap();
    }
    let mut foreign = request("foreign");
    foreign.network = "other".into();
    assert!(matches!(rig.ask(Request::Add(foreign)).await, Reply::Added { .. }));
    rig.kernel.refuse_detach(&owner("a"), true);
    let gc = || Request::Gc { network: "towpath".into(), valid: vec![owner("b")] };
    let reply = rig.ask(gc()).await;
    assert!(matches!(&reply, Reply::Failed { error } if error.msg.contains("container a")), "{reply:?}");
    let left = || rig.leases.leases().iter().map(|l| l.owner.container_id().to_owned()).collect::<Vec<_>>();
    assert_eq!(left(), ["a", "b", "foreign"], "it goes on after a failure");
    rig.kernel.refuse_detach(&owner("a"), false);
    assert_eq!(rig.ask(gc()).await, Reply::Done);
    assert_eq!((left(), rig.kernel.devices().len()), (vec!["b".to_owned(), "foreign".to_owned()], 2));
}

#[tokio::test]
async fn a_del_that_cannot_be_done_now_is_done_later_and_its_address_waits() {
    let rig = Rig::start().await;
    rig.add("a").await.unwrap();
    rig.kernel.refuse_detach(&owner("a"), true);
    assert_eq!(rig.del("a").await, Reply::Done, "DEL always succeeds");
    assert_eq!((rig.queued(), rig.taken()), (1, 1), "queued, and the address is not free");
    rig.kernel.refuse_detach(&owner("a"), false);
    let rig = rig.restart().await;
    assert_eq!((rig.queued(), rig.taken(), rig.kernel.devices().len()), (0, 0, 0));
}

#[tokio::test]
async fn dels_queued_by_the_plugin_are_done_at_start_and_never_hit_a_later_add() {
    let rig = Rig::start().await;
    rig.add("a").await.unwrap();
    rig.add("b").await.unwrap();
    std::fs::create_dir_all(&rig.config.settings.deletes).unwrap();
    std::fs::write(rig.config.settings.deletes.join("a@eth0.del"), "").unwrap();
    std::fs::write(rig.config.settings.deletes.join("unknown@eth0.del"), "").unwrap();
    std::fs::write(rig.config.settings.deletes.join("nonsense"), "").unwrap();
    let rig = rig.restart().await;
    assert_eq!((rig.queued(), rig.taken()), (0, 1));
    // The container id is used again while its DEL is still queued.
    std::fs::write(rig.config.settings.deletes.join("b@eth0.del"), "").unwrap();
    rig.add("b").await.unwrap();
    assert_eq!(rig.kernel.attached.load(Ordering::SeqCst), 3, "the old one went, a new one was made");
    assert_eq!((rig.queued(), rig.kernel.devices().len()), (0, 1));
}

#[tokio::test]
async fn after_a_reboot_no_address_is_lost() {
    let rig = Rig::start().await;
    for id in ["a", "b"] {
        rig.add(id).await.unwrap();
    }
    rig.kernel.reboot();
    let rig = rig.restart().await;
    assert_eq!((rig.taken(), rig.leases.leases().len()), (0, 0));
}

#[tokio::test]
async fn a_device_without_a_lease_keeps_its_addresses_until_it_goes() {
    let rig = Rig::start().await;
    let lost = rig.add("a").await.unwrap().ips[0].address.address;
    std::fs::remove_file(rig.dir.path().join("leases/a@eth0.lease")).unwrap();
    let rig = rig.restart().await;
    assert_eq!(rig.taken(), 1);
    for id in ["b", "c", "d"] {
        assert_ne!(rig.add(id).await.unwrap().ips[0].address.address, lost);
    }
    assert_eq!(rig.kernel.devices().len(), 4, "a running pod is not torn down for a lost file");
    rig.del("a").await;
    assert_eq!((rig.taken(), rig.kernel.devices().len()), (3, 3));
}

#[tokio::test]
async fn a_check_finds_what_is_lost_and_a_repair_writes_it_down_again() {
    let rig = Rig::start().await;
    let given = rig.add("a").await.unwrap().ips[0].address.address;
    rig.add("b").await.unwrap();
    let check = async |rig: &Rig, repair| match rig.ask(Request::Addresses { repair }).await {
        Reply::Addresses { addresses } => addresses,
        other => panic!("{other:?}"),
    };
    let well = check(&rig, false).await;
    assert_eq!((well.leases, well.findings, well.ranges[0].taken), (2, vec![], 2));
    // One loses its lease, and, when the new agent has had its first look, the other its namespace.
    std::fs::write(rig.dir.path().join("leases/a@eth0.lease"), "torn").unwrap();
    let rig = rig.restart().await;
    let kinds = |found: &NodeAddresses| found.findings.iter().map(|finding| finding.kind).collect::<Vec<_>>();
    assert_eq!(kinds(&check(&rig, false).await), [Kind::DeviceWithoutLease]);
    rig.kernel.lose(&owner("b"));
    let found = check(&rig, false).await;
    assert_eq!(kinds(&found), [Kind::LeaseWithoutDevice, Kind::DeviceWithoutLease]);
    assert_eq!(rig.leases.leases().len(), 1, "a check changes nothing");
    let repaired = check(&rig, true).await;
    assert_eq!((kinds(&repaired), repaired.repaired.len(), repaired.leases), (vec![], 2, 1), "{repaired:?}");
    assert_eq!(rig.leases.lease(&owner("a")).unwrap().addresses[0], given);
    let rig = rig.restart().await;
    assert_eq!(rig.leases.lease(&owner("a")).unwrap().addresses[0], given, "on disk, too");
    assert_eq!(files(&rig.dir.path().join("leases/damaged")), Vec::<String>::new());
    rig.del("a").await;
    assert_eq!((rig.taken(), rig.kernel.devices().len()), (0, 0));
}

#[tokio::test]
async fn a_failed_attach_gives_the_address_back() {
    let rig = Rig::start().await;
    rig.kernel.refuse_attach.store(true, Ordering::SeqCst);
    assert_eq!(rig.add("a").await.unwrap_err().code, ErrorCode::Plumbing);
    rig.kernel.refuse_attach.store(false, Ordering::SeqCst);
    rig.kernel.hang_attach.store(true, Ordering::SeqCst);
    assert_eq!(rig.add("a").await.unwrap_err().code, ErrorCode::TryAgain);
    assert_eq!((rig.taken(), rig.kernel.devices().len(), rig.leases.leases().len()), (0, 0, 0));
}

#[tokio::test]
async fn the_nodes_own_namespace_is_refused() {
    let rig = Rig::start().await;
    let own = std::fs::File::open("/proc/self/ns/net").unwrap();
    for namespace in [Some(&own), None] {
        let reply = ask(&rig.config.socket, &Request::Add(request("a")), namespace).await.unwrap();
        assert_eq!(code(&reply), Some(ErrorCode::InvalidEnvironment));
    }
    assert_eq!(rig.taken(), 0);
}

#[tokio::test]
async fn an_answer_that_nobody_takes_is_taken_back() {
    let rig = Rig::start().await;
    rig.readiness.send_replace(Readiness::Starting("soon".into()));
    kernel::ask_and_leave(&rig.config.socket, &Request::Add(request("a")), &netns()).await;
    rig.readiness.send_replace(Readiness::Ready);
    rig.kernel.slow_attach.store(true, Ordering::SeqCst);
    kernel::ask_and_leave(&rig.config.socket, &Request::Add(request("b")), &netns()).await;
    // Its turn comes after the ADDs', so what they leave is there to be seen.
    let (_, _) = tokio::join!(rig.check("a", AddResult::default()), rig.check("b", AddResult::default()));
    let deadline = Instant::now() + Duration::from_secs(5);
    while (rig.taken(), rig.kernel.devices().len()) != (0, 0) {
        assert!(Instant::now() < deadline, "{:?} {:?}", rig.leases.leases(), rig.kernel.devices());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn an_add_asked_again_is_not_answered_with_what_is_about_to_be_taken_back() {
    let rig = Rig::start().await;
    for round in 0..20 {
        rig.kernel.slow_attach.store(true, Ordering::SeqCst);
        // The plugin is killed while its ADD is in work, and the runtime asks again at once.
        let first = kernel::ask_and_leave_later(&rig.config.socket, &Request::Add(request("a")), &netns()).await;
        let again = rig.add("a");
        tokio::pin!(again);
        let early = tokio::time::timeout(Duration::from_millis(10), &mut again).await;
        assert!(early.is_err(), "answered beside the first: {early:?}");
        drop(first);
        let result = again.await.unwrap();
        // Its turn would come after the taking back.
        assert_eq!(rig.check("a", result).await, Reply::Done, "round {round}");
        assert_eq!((rig.kernel.devices().len(), rig.taken()), (1, 1), "round {round}");
        rig.del("a").await;
    }
}

#[tokio::test]
async fn many_at_once_have_different_addresses_and_one_slow_does_not_stop_others() {
    let rig = Arc::new(Rig::start().await);
    let adds: Vec<_> = (0..13)
        .map(|n| {
            let rig = rig.clone();
            tokio::spawn(async move { rig.add(&format!("c{n}")).await.unwrap().ips[0].address.address })
        })
        .collect();
    let mut seen = std::collections::BTreeSet::new();
    for add in adds {
        assert!(seen.insert(add.await.unwrap()), "given twice");
    }
    let full = rig.add("late").await.unwrap_err();
    assert_eq!(
        (full.code, full.msg.as_str()),
        (ErrorCode::Exhausted, "no free address in 10.244.1.0/28: 13 of 13 are taken")
    );
}

#[tokio::test]
async fn garbage_on_the_socket_is_refused_and_harms_nobody() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let rig = Rig::start().await;
    for garbage in [
        &b"\xff\xff\xff\xff"[..],
        b"\0\0\0\x02{}",
        b"\0\0\0\x03{",
        b"\0",
        b"\0\0\0\0",
        b"\0\0\0\x05\xff\xff\xff\xff\xff",
    ] {
        let mut stream = tokio::net::UnixStream::connect(&rig.config.socket).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        assert!(String::from_utf8_lossy(&answer).contains("is not understood"), "{garbage:?}: {answer:?}");
    }
    rig.add("a").await.unwrap();
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|e| e.unwrap())
        .filter(|e| e.file_type().unwrap().is_file())
        .map(|e| e.file_name().into_string().unwrap())
        .filter(|n| n != ".lock")
        .collect();
    names.sort();
    names
}
