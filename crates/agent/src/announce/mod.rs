//! Makes the network outside send packets for load balancers' addresses to this node, if it is the one that is to take them.
//!
//! ```text
//!  index, AddressPools ─► candidates (plan) ─► a task an address: Lease ─► Announcer ─► ARP, neighbour discovery
//!                                                  ▲                          │
//!                                                  └───── another answers ◄───┘
//! ```
//!
//! An address is on no device: what comes in for it is translated at the device that it comes in at ([`towpath_plan::services`]). All that
//! is missing is that it comes in, at one node. Which one a Lease says ([`lease`]); how the network is told is the [`Announcer`]'s business.

mod frames;
mod held;
pub mod lease;
pub mod local_network;
mod pools;
mod table;
mod twice;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::Api;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use towpath_datapath::Datapath;
use towpath_model::custom::API_VERSION;
use towpath_model::{AddressPool, NodeName};
use towpath_plan::load_balancer::announcers::{self, Candidate, candidates};
use tracing::warn;

use crate::cni_server::Readiness;
use crate::events::NodeEvents;
use crate::index::Kind;
use crate::{SharedIndex, read};
use held::{Held, Kept};
use lease::{Election, Place, Since};
use local_network::{Announced, LocalNetwork};

/// Namespace of the Leases.
pub const NAMESPACE: &str = "kube-system";
/// How often it is looked whether the candidates may be others.
const LOOK: Duration = Duration::from_millis(200);
/// How long an address that is not announced any more counts as one that was. That it might be another's by then does no harm: a start
/// without the API server asks the network first.
const LATELY: Duration = Duration::from_secs(5);
/// How long Leases are given back at the end of the process.
const PATIENCE: Duration = Duration::from_millis(1500);

/// A way in which the network outside comes to send an address's packets to this node. One for each kind of network: here the nodes' own
/// ([`LocalNetwork`]); a routing protocol is another.
pub trait Announcer: Clone + Send + Sync + 'static {
    /// This address may be announced soon: from now on it is noticed who else does.
    fn prepare(&self, address: IpAddr);
    /// This node takes the address's packets until then; none: until told otherwise. What is announced already goes on.
    fn announce(&self, address: IpAddr, until: Option<Instant>);
    /// It does not take them any more.
    fn withdraw(&self, address: IpAddr);
    /// Asks the network whether another node takes them.
    fn probe(&self, address: IpAddr);
    /// Whether another node has said so since then.
    fn is_contested_since(&self, address: IpAddr, since: Instant) -> bool;
    /// The opposite of [`Announcer::prepare`].
    fn forget(&self, address: IpAddr);
}

/// The running announcements. Dropping it ends them at once; other nodes take over when the Leases run out.
#[derive(Debug)]
pub struct Announcing {
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
    announced: Announced,
}

impl Announcing {
    /// What is announced at the moment.
    pub fn announced(&self) -> Announced {
        self.announced.clone()
    }

    /// Ends them, and gives the Leases back, so that other nodes take over at once.
    pub async fn drain(mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take()
            && timeout(PATIENCE, task).await.is_err()
        {
            warn!("Leases of load balancers' addresses were not given back in time; they run out by themselves");
        }
    }
}

impl Drop for Announcing {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// Starts to announce what is this node's to announce, as soon as it is ready. What it announces is kept in `state_dir`.
pub fn start(
    client: kube::Client,
    node: NodeName,
    state_dir: &Path,
    index: SharedIndex,
    datapath: Datapath,
    readiness: watch::Receiver<Readiness>,
) -> Announcing {
    let stop = CancellationToken::new();
    let announcer = LocalNetwork::start(datapath);
    let announced = announcer.announced();
    let keeper = Keeper {
        events: Arc::new(NodeEvents::new(client.clone(), &node)),
        client,
        node,
        index,
        readiness,
        announcer,
        held: Held::open(state_dir),
        lately: BTreeMap::new(),
        resumed: BTreeSet::new(),
        running: BTreeMap::new(),
        seen: None,
        where_endpoints_are: Matters::default(),
    };
    let task = tokio::spawn(keeper.run(stop.clone()));
    Announcing { stop, task: Some(task), announced }
}

/// The task of one address.
struct Running {
    place: watch::Sender<Place>,
    stop: CancellationToken,
    /// Whether this node still counts as the last holder.
    task: JoinHandle<bool>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What the candidates follow from, by revision: Services, nodes and, where it matters where endpoints are, EndpointSlices.
type Seen = [Option<u64>; 3];

/// Whether it matters where endpoints are. That is asked of all Services, of which there may be many: only when one of them changed.
#[derive(Debug, Default)]
struct Matters {
    /// The answer, and the revision of Services that it is of.
    known: Option<(u64, bool)>,
}

impl Matters {
    fn at(&mut self, revision: u64, ask: impl FnOnce() -> bool) -> bool {
        match self.known {
            Some((of, answer)) if of == revision => answer,
            _ => self.known.insert((revision, ask())).1,
        }
    }
}

struct Keeper {
    client: kube::Client,
    events: Arc<NodeEvents>,
    node: NodeName,
    index: SharedIndex,
    readiness: watch::Receiver<Readiness>,
    announcer: LocalNetwork,
    held: Held,
    /// When each address was announced last.
    lately: BTreeMap<IpAddr, Instant>,
    /// Addresses that an earlier run announced, and that no task stands for yet; none once the API server has answered.
    resumed: BTreeSet<IpAddr>,
    running: BTreeMap<IpAddr, Running>,
    seen: Option<Seen>,
    where_endpoints_are: Matters,
}

impl Keeper {
    async fn run(mut self, stop: CancellationToken) {
        let ready = tokio::select! {
            () = stop.cancelled() => return,
            ready = self.readiness.wait_for(|state| *state == Readiness::Ready) => ready.is_ok(),
        };
        if !ready {
            return;
        }
        // Without the API server only what was known before it went can be gone by; with it, Leases say all there is to say.
        let before = if self.is_recalled() { self.held.kept().clone() } else { Kept::default() };
        self.resumed = before.addresses;
        let mut pools = pools::watch(self.client.clone(), before.pools);
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut wanted = BTreeMap::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = look.tick() => {}
                changed = pools.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    self.seen = None;
                }
            }
            let known = pools.borrow_and_update().clone();
            if self.is_new() {
                wanted = candidates(read(&self.index).world(), &known, &self.node);
            }
            self.follow(&wanted, &known);
            if !self.is_recalled() {
                self.resumed.clear();
                let addresses = self.announced_lately();
                if !self.held.rests() {
                    self.held.keep(Kept { addresses, pools: known }).await;
                }
            }
        }
        let known = pools.borrow().clone();
        for running in self.running.values() {
            running.stop.cancel();
        }
        let mut addresses = std::mem::take(&mut self.resumed);
        for (address, running) in &mut self.running {
            // Each gives its Lease back and ends; whoever waits for all of this has an end of its own.
            if (&mut running.task).await.unwrap_or(false) {
                addresses.insert(*address);
            }
        }
        self.held.keep(Kept { addresses, pools: known }).await;
    }

    /// What is announced, or was a moment ago: who goes on alone listens first, and is the last holder meanwhile.
    fn announced_lately(&mut self) -> BTreeSet<IpAddr> {
        let now = Instant::now();
        self.lately.extend(self.announcer.announced().addresses().into_iter().map(|address| (address, now)));
        self.lately.retain(|_, since| now.saturating_duration_since(*since) < LATELY);
        self.lately.keys().copied().collect()
    }

    /// Whether the API server has been silent since the start.
    fn is_recalled(&self) -> bool {
        !read(&self.index).recalled().is_empty()
    }

    /// Whether something that candidates follow from is another than before.
    fn is_new(&mut self) -> bool {
        let now = {
            let index = read(&self.index);
            // Endpoints change most often, and mostly that is nothing to whoever announces.
            let services = index.revision(Kind::Service);
            let matters = self.where_endpoints_are.at(services, || announcers::follow_endpoints(index.world()));
            let local = matters.then(|| index.revision(Kind::EndpointSlice));
            [Some(services), Some(index.revision(Kind::Node)), local]
        };
        self.seen.replace(now) != Some(now)
    }

    /// Has a task for each address that this node may announce, and for no other.
    fn follow(&mut self, wanted: &BTreeMap<IpAddr, Candidate>, pools: &BTreeMap<String, AddressPool>) {
        for (address, running) in &self.running {
            match wanted.get(address) {
                Some(candidate) => drop(running.place.send_if_modified(|place| {
                    let now = place_of(candidate, pools);
                    std::mem::replace(place, now.clone()) != now
                })),
                None => running.stop.cancel(),
            }
        }
        // One that has not ended yet is waited for: it speaks for the same address.
        self.running.retain(|_, running| !running.task.is_finished());
        for (address, candidate) in wanted {
            if self.running.contains_key(address) {
                continue;
            }
            let since = if self.resumed.remove(address) { Since::BeforeTheStart } else { Since::Now };
            self.running.insert(*address, self.stand(*address, place_of(candidate, pools), since));
        }
    }

    fn stand(&self, address: IpAddr, place: Place, since: Since) -> Running {
        let (place, receiver) = watch::channel(place);
        let stop = CancellationToken::new();
        let api: Api<Lease> = Api::namespaced(self.client.clone(), NAMESPACE);
        let election = Election::new(api, &self.node, address, self.announcer.clone()).since(since);
        let election = election.with_events(self.events.clone());
        let task = tokio::spawn(election.run(receiver, stop.clone()));
        Running { place, stop, task }
    }
}

fn place_of(candidate: &Candidate, pools: &BTreeMap<String, AddressPool>) -> Place {
    Place { rank: candidate.rank, owner: pools.get(&candidate.pool).map(owner) }
}

/// With its pool a Lease goes, too. (That of an address that nobody has, while its pool stays, the controller deletes.)
fn owner(pool: &AddressPool) -> OwnerReference {
    OwnerReference {
        api_version: API_VERSION.to_owned(),
        kind: "AddressPool".to_owned(),
        name: pool.name.clone(),
        uid: pool.uid.clone(),
        ..OwnerReference::default()
    }
}

#[cfg(test)]
mod tests {
    use super::Matters;

    #[test]
    fn services_are_asked_when_one_changed_and_not_every_second() {
        let (mut matters, mut asked) = (Matters::default(), 0);
        let mut look = |revision: u64, answer: bool| {
            matters.at(revision, || {
                asked += 1;
                answer
            })
        };
        let answers: Vec<bool> = (0..100).map(|_| look(1, true)).collect();
        assert!(answers.iter().all(|answer| *answer));
        assert!(!look(2, false) && !look(2, true), "another revision is asked once, too");
        assert_eq!(asked, 2);
    }
}
