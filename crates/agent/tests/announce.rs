//! Who announces an address, by Leases of an API server over TLS: one at a time, whatever becomes of a node or of the API server.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test binary: a panic is how a test fails"
)]

mod cluster;

use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Api, DeleteParams};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use towpath_agent::announce::lease::{ANSWER_FOR, DURATION, Election, Place, REFUSED_FOR, RENEW, Since, lease_name};
use towpath_agent::announce::{Announcer, NAMESPACE};
use towpath_model::NodeName;

use cluster::cluster;
use cluster::faults::{Fault, Faults};

const ADDRESS: &str = "192.0.2.1";
/// What requests for its Lease end with.
const LEASE: &str = "leases/towpath-lb-192-0-2-1";

#[derive(Debug, Default)]
struct State {
    /// None: silent; some of none: until told otherwise.
    until: Option<Option<Instant>>,
    contested: Option<Instant>,
    probes: usize,
}

/// A network that notes what it is told, and on which another node is heard when the test says so.
#[derive(Clone, Debug, Default)]
struct Noted(Arc<Mutex<State>>);

impl Noted {
    fn answers(&self) -> bool {
        let until = self.0.lock().unwrap().until;
        until.is_some_and(|until| until.is_none_or(|until| Instant::now() < until))
    }

    fn is_alone(&self) -> bool {
        self.0.lock().unwrap().until == Some(None)
    }
}

impl Announcer for Noted {
    fn prepare(&self, _: IpAddr) {}

    fn announce(&self, _: IpAddr, until: Option<Instant>) {
        self.0.lock().unwrap().until = Some(until);
    }

    fn withdraw(&self, _: IpAddr) {
        self.0.lock().unwrap().until = None;
    }

    fn probe(&self, _: IpAddr) {
        self.0.lock().unwrap().probes += 1;
    }

    fn is_contested_since(&self, _: IpAddr, since: Instant) -> bool {
        self.0.lock().unwrap().contested.is_some_and(|heard| heard >= since)
    }

    fn forget(&self, _: IpAddr) {}
}

struct Node {
    network: Noted,
    stop: CancellationToken,
    task: JoinHandle<bool>,
    place: watch::Sender<Place>,
}

fn node(client: &kube::Client, name: &str, rank: usize) -> Node {
    node_since(client, name, rank, Since::Now)
}

fn node_since(client: &kube::Client, name: &str, rank: usize, since: Since) -> Node {
    let api: Api<Lease> = Api::namespaced(client.clone(), NAMESPACE);
    let (network, stop) = (Noted::default(), CancellationToken::new());
    let (place, receiver) = watch::channel(Place { rank, owner: None });
    let election = Election::new(api, &NodeName::new(name), ADDRESS.parse().unwrap(), network.clone()).since(since);
    let task = tokio::spawn(election.run(receiver, stop.clone()));
    Node { network, stop, task, place }
}

async fn until(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < limit, "{what}: not within {limit:?}");
        sleep(Duration::from_millis(5)).await;
    }
    begun.elapsed()
}

/// Longer than anything takes that is not stuck: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn one_announces_at_a_time_and_the_next_takes_over_when_it_is_gone() {
    let cluster = cluster().await;
    let nodes = [node(&cluster.client, "n1", 0), node(&cluster.client, "n2", 1), node(&cluster.client, "n3", 2)];
    let networks = nodes.each_ref().map(|node| node.network.clone());
    // Two that answer at one moment would be seen here sooner or later.
    let both = Arc::new(Mutex::new(0));
    let (seen, watched) = (both.clone(), networks.clone());
    let watching = tokio::spawn(async move {
        loop {
            if watched.iter().filter(|network| network.answers()).count() > 1 {
                *seen.lock().unwrap() += 1;
            }
            sleep(Duration::from_millis(1)).await;
        }
    });
    until("one announces", PATIENCE, || networks.iter().any(Noted::answers)).await;
    sleep(DURATION * 2).await;
    let first = networks.iter().position(Noted::answers).unwrap();
    assert_eq!(first, 0, "the first in the order");

    // Dead in the midst of it: nothing is given back, what it said last holds for as long as it does.
    nodes[first].task.abort();
    until("it is silent", PATIENCE, || !networks[first].answers()).await;
    until("another announces", PATIENCE, || networks.iter().any(Noted::answers)).await;
    let second = networks.iter().position(Noted::answers).unwrap();
    assert_ne!(second, first);

    // In good order: the third need not wait for anything to run out.
    nodes[second].stop.cancel();
    let taken = until("the last one announces", PATIENCE, || networks.iter().any(Noted::answers)).await;
    assert!(taken < DURATION, "given back, and taken after {taken:?}");
    watching.abort();
    assert_eq!(*both.lock().unwrap(), 0, "two answered at one moment");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_api_server_is_silent_the_last_holder_goes_on_until_another_is_heard() {
    let cluster = cluster().await;
    let faults = Faults::default();
    let holder = node(&cluster.client_with(&faults), "n1", 0);
    until("it announces", PATIENCE, || holder.network.answers()).await;
    let stranger = node(&cluster.client_with(&faults), "n2", 1);

    faults.add(LEASE, false, 100_000, Fault::Late(Duration::from_secs(60)));
    until("it goes on alone", PATIENCE, || holder.network.is_alone()).await;
    let probes = || holder.network.0.lock().unwrap().probes;
    let asked = probes();
    assert!(asked > 0, "it asked the network first");
    sleep(DURATION * 3).await;
    assert!(probes() <= asked + 3, "every machine on the network hears it: {asked} probes, then {}", probes());
    assert!(!stranger.network.answers(), "who never had it stays silent");

    holder.network.0.lock().unwrap().contested = Some(Instant::now());
    until("it yields", PATIENCE, || !holder.network.answers()).await;
    sleep(DURATION * 2).await;
    assert!(!holder.network.answers(), "and does not come back by itself");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_could_not_reach_the_api_server_finds_that_another_took_over() {
    let cluster = cluster().await;
    let faults = Faults::default();
    let cut_off = node(&cluster.client_with(&faults), "n1", 0);
    until("it announces", PATIENCE, || cut_off.network.answers()).await;
    let other = node(&cluster.client, "n2", 1);
    faults.add(LEASE, false, 12, Fault::Late(Duration::from_secs(60)));
    until("another takes over", PATIENCE, || other.network.answers()).await;
    until("the first one learns of it", PATIENCE, || !cut_off.network.answers()).await;
    sleep(DURATION).await;
    until("one announces", PATIENCE, || other.network.answers() && !cut_off.network.answers()).await;
    let lease: Lease =
        Api::namespaced(cluster.client.clone(), NAMESPACE).get(&lease_name(ADDRESS.parse().unwrap())).await.unwrap();
    let spec = lease.spec.unwrap();
    assert_eq!((spec.holder_identity.as_deref(), spec.lease_transitions), (Some("n2"), Some(2)));
    for node in [cut_off, other] {
        node.stop.cancel();
        timeout(PATIENCE, node.task).await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_starts_without_the_api_server_goes_on_with_what_it_announced_if_nobody_else_is_heard() {
    let cluster = cluster().await;
    let faults = Faults::default();
    faults.add(LEASE, false, 100_000, Fault::Late(Duration::from_secs(60)));
    let client = cluster.client_with(&faults);
    let held = node_since(&client, "n1", 0, Since::BeforeTheStart);
    let never = node(&client, "n2", 1);
    until("it goes on", PATIENCE, || held.network.is_alone()).await;
    assert!(held.network.0.lock().unwrap().probes >= 2, "it asked more than once before");
    sleep(DURATION).await;
    assert!(!never.network.answers());
    held.stop.cancel();
    assert!(timeout(PATIENCE, held.task).await.unwrap().unwrap(), "the next run goes on again");

    // Somebody took over while it was down, and answers.
    let lost = node_since(&client, "n1", 0, Since::BeforeTheStart);
    lost.network.0.lock().unwrap().contested = Some(Instant::now() + Duration::from_millis(20));
    let deadline = Instant::now() + DURATION * 4;
    while Instant::now() < deadline {
        assert!(!lost.network.answers(), "another has it");
        sleep(Duration::from_millis(5)).await;
    }
    lost.stop.cancel();
    assert!(!timeout(PATIENCE, lost.task).await.unwrap().unwrap(), "nor is it to be tried again");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_api_server_answers_after_all_its_lease_decides() {
    let cluster = cluster().await;
    let other = node(&cluster.client, "n2", 0);
    until("the other announces", PATIENCE, || other.network.answers()).await;
    let before = node_since(&cluster.client, "n1", 1, Since::BeforeTheStart);
    let deadline = Instant::now() + DURATION * 2;
    while Instant::now() < deadline {
        assert!(!before.network.answers());
        sleep(Duration::from_millis(5)).await;
    }
    assert!(other.network.answers());
    other.stop.cancel();
    assert!(!timeout(PATIENCE, other.task).await.unwrap().unwrap(), "given back in good order");
    until("it is next", PATIENCE, || before.network.answers()).await;
}

fn leases(client: &kube::Client) -> Api<Lease> {
    Api::namespaced(client.clone(), NAMESPACE)
}

/// How often two of them answered at one moment by the Lease, from now on. (Who goes on alone, because the API server was too slow, is told
/// by the network, which is not there.)
fn watch_for_two(networks: Vec<Noted>) -> (JoinHandle<()>, Arc<Mutex<usize>>) {
    let both = Arc::new(Mutex::new(0));
    let seen = both.clone();
    let watching = tokio::spawn(async move {
        loop {
            if networks.iter().filter(|network| network.answers() && !network.is_alone()).count() > 1 {
                *seen.lock().unwrap() += 1;
            }
            sleep(Duration::from_millis(1)).await;
        }
    });
    (watching, both)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_is_deleted_makes_no_second_announcer() {
    let cluster = cluster().await;
    let holder = node(&cluster.client, "n1", 1);
    until("it announces", PATIENCE, || holder.network.answers()).await;
    // One that would go first, if it had to be chosen anew.
    let next = node(&cluster.client, "n2", 0);
    let (watching, both) = watch_for_two(vec![holder.network.clone(), next.network.clone()]);
    let (api, name) = (leases(&cluster.client), lease_name(ADDRESS.parse().unwrap()));
    let mut again = Vec::new();
    for _ in 0..5 {
        api.delete(&name, &DeleteParams::default()).await.unwrap();
        let begun = Instant::now();
        while api.get_opt(&name).await.unwrap().is_none() {
            assert!(begun.elapsed() < PATIENCE, "nobody makes it again");
            sleep(Duration::from_millis(20)).await;
        }
        again.push(begun.elapsed());
        sleep(RENEW).await;
    }
    until("one announces", PATIENCE, || holder.network.answers() || next.network.answers()).await;
    watching.abort();
    assert_eq!(*both.lock().unwrap(), 0, "two answered at one moment");
    assert!(again.iter().min().unwrap() < &DURATION, "whoever held it makes it again at once: {again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lease_goes_over_to_the_pool_that_has_the_address_now() {
    let cluster = cluster().await;
    let holder = node(&cluster.client, "n1", 0);
    until("it announces", PATIENCE, || holder.network.answers()).await;
    let pool = |name: &str| OwnerReference {
        api_version: "towpath.dev/v1alpha1".to_owned(),
        kind: "AddressPool".to_owned(),
        name: name.to_owned(),
        uid: format!("uid-of-{name}"),
        ..OwnerReference::default()
    };
    for name in ["a", "b"] {
        holder.place.send_modify(|place| place.owner = Some(pool(name)));
        let begun = Instant::now();
        loop {
            let lease = leases(&cluster.client).get(&lease_name(ADDRESS.parse().unwrap())).await.unwrap();
            if lease.metadata.owner_references == Some(vec![pool(name)]) {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "{:?}", lease.metadata.owner_references);
            sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_that_is_lost_silences_nobody() {
    let cluster = cluster().await;
    let faults = Faults::default();
    let holder = node(&cluster.client_with(&faults), "n1", 0);
    until("it announces", PATIENCE, || holder.network.answers()).await;
    // On a machine that is busy with other things a request may be slow by itself.
    let mut silent = Duration::ZERO;
    for _ in 0..5 {
        faults.add(LEASE, false, 1, Fault::Late(Duration::from_secs(60)));
        let begun = Instant::now();
        silent = Duration::ZERO;
        while begun.elapsed() < ANSWER_FOR * 2 {
            let at = Instant::now();
            sleep(Duration::from_millis(2)).await;
            if !holder.network.answers() {
                silent += at.elapsed();
            }
        }
        if silent.is_zero() {
            return;
        }
    }
    panic!("it was silent for {silent:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_is_refused_goes_on_for_a_while_and_then_withdraws() {
    let cluster = cluster().await;
    let faults = Faults::default();
    let holder = node(&cluster.client_with(&faults), "n1", 0);
    until("it announces", PATIENCE, || holder.network.answers()).await;
    faults.add(LEASE, false, 100_000, Fault::Status(403, None));
    until("it goes on alone", PATIENCE, || holder.network.is_alone()).await;
    let after = until("it withdraws", REFUSED_FOR + PATIENCE, || !holder.network.answers()).await;
    assert!(after > REFUSED_FOR / 2, "an API server that starts refuses for a moment: {after:?}");
    let asked = faults.lists(LEASE);
    sleep(DURATION * 3).await;
    assert!(faults.lists(LEASE) <= asked + 1, "and it does not go on asking three times a second");
    assert!(!holder.network.answers());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_a_stranger_has_is_not_announced_until_it_is_free() {
    let cluster = cluster().await;
    let api = leases(&cluster.client);
    let (network, stop) = (Noted::default(), CancellationToken::new());
    network.0.lock().unwrap().contested = Some(Instant::now() + Duration::from_secs(3600));
    let (_place, receiver) = watch::channel(Place::default());
    let election = Election::new(api.clone(), &NodeName::new("n1"), ADDRESS.parse().unwrap(), network.clone());
    let _task = tokio::spawn(election.run(receiver, stop.clone()));
    until("it asks", PATIENCE, || network.0.lock().unwrap().probes >= 3).await;
    sleep(DURATION * 2).await;
    assert!(!network.answers() && api.get_opt(&lease_name(ADDRESS.parse().unwrap())).await.unwrap().is_none());
    network.0.lock().unwrap().contested = None;
    until("it announces", PATIENCE * 2, || network.answers()).await;
}
