//! Gives Services of type LoadBalancer their addresses: watches Services, pools and what is the cluster's own, asks the planner
//! ([`towpath_plan::load_balancer`]), and writes `status.loadBalancer` of Services that are ours, Events on those that get nothing, and the
//! status of pools.
//!
//! Nothing is written before everything is known. What stands in Services' status is all the memory there is, so a new leader goes on
//! where the last one was.

mod leases;
mod pool_status;
mod services;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use futures::StreamExt;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Namespace, Node, Service};
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::{Api, ApiResource, DynamicObject};
use kube::runtime::WatchStreamExt;
use kube::runtime::events::EventType;
use kube::runtime::watcher::{self, Event, watcher as watch};
use kube::{Client, ResourceExt};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use towpath_model::custom::{AddressPool as PoolObject, NetworkConfig};
use towpath_model::{Labels, NamespacedName, Readable, ServiceCidr};
use towpath_plan::load_balancer::{Plan, Refusal, View, plan};

use crate::events::{Events, Note};
use crate::watched::{Watched, until};
use leases::Sweeping;
use pool_status::SeenPool;
use services::{Known, Written};

/// What comes within it is looked at together.
const WINDOW: Duration = Duration::from_millis(20);
/// What could not be written is tried again after this time.
const RETRY: Duration = Duration::from_secs(5);
/// A pool's status is written so often at most: under many changes its counts may lag.
const STATUS_EVERY: Duration = Duration::from_millis(500);
/// So many Services are written at once.
const AT_ONCE: usize = 8;
/// One write, and all of a round: what is not done by then is left to the next pass, for others wait.
const WRITE: Duration = Duration::from_secs(5);
const ROUND: Duration = Duration::from_secs(15);
/// Rounds of one pass: taking back, giving, and giving once more what others gave back. What is left comes with the next.
const ROUNDS: usize = 4;

/// Works until told to stop.
pub(crate) async fn work(client: Client, cluster_cidrs: Vec<IpNet>, identity: String, stop: CancellationToken) {
    let config = watcher::Config::default;
    let kind = ApiResource::erase::<Service>(&());
    let mut services = watch(Api::<DynamicObject>::all_with(client.clone(), &kind), config()).default_backoff().boxed();
    let mut pools = watch(Api::<Readable<PoolObject>>::all(client.clone()), config()).default_backoff().boxed();
    let mut namespaces = watch(Api::<Namespace>::all(client.clone()), config()).default_backoff().boxed();
    let mut nodes = watch(Api::<Node>::all(client.clone()), config()).default_backoff().boxed();
    let mut configs = watch(Api::<NetworkConfig>::all(client.clone()), config()).default_backoff().boxed();
    let mut ranges = watch(Api::<Readable<ServiceCIDR>>::all(client.clone()), config()).default_backoff().boxed();
    let mut balancers = Balancers::new(client, cluster_cidrs, identity);
    loop {
        let changed = tokio::select! {
            () = stop.cancelled() => return,
            event = services.next() => balancers.heard("Services", event, Balancers::service),
            event = pools.next() => balancers.heard("AddressPools", event, Balancers::pool),
            event = namespaces.next() => balancers.heard("Namespaces", event, Balancers::namespace),
            event = nodes.next() => balancers.heard("Nodes", event, Balancers::node),
            event = configs.next() => balancers.heard("NetworkConfigs", event, Balancers::network_config),
            event = ranges.next() => balancers.heard_of_ranges(event),
            () = until(balancers.due) => {
                balancers.pass().await;
                Some(false)
            }
        };
        match changed {
            None => return,
            Some(true) => balancers.due_within(WINDOW),
            Some(false) => {}
        }
    }
}

/// What is the cluster's own, as one node says it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct OwnOfNode {
    addresses: Vec<IpAddr>,
    ranges: Vec<IpNet>,
}

/// What a `NetworkConfig` says of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Configured {
    /// Ranges of pods and Services.
    own: Vec<IpNet>,
    /// Where Services may have external addresses.
    external: Vec<IpNet>,
}

struct Balancers {
    client: Client,
    events: Events,
    cluster_cidrs: Vec<IpNet>,
    services: Known,
    pools: Watched<SeenPool>,
    namespaces: Watched<Labels>,
    nodes: Watched<OwnOfNode>,
    configs: Watched<Configured>,
    /// Ranges of Services; those of an object that is being deleted too, for it is there while Services have addresses in them.
    service_cidrs: Watched<Vec<IpNet>>,
    sweeping: Sweeping,
    /// When there is something to do.
    due: Option<Instant>,
    statuses_written: Option<Instant>,
    /// What Services were told, so that they are told once.
    told: BTreeMap<NamespacedName, String>,
}

impl Balancers {
    fn new(client: Client, cluster_cidrs: Vec<IpNet>, identity: String) -> Self {
        Self {
            events: Events::new(client.clone(), identity),
            sweeping: Sweeping::start(client.clone()),
            client,
            cluster_cidrs,
            services: Known::default(),
            pools: Watched::default(),
            namespaces: Watched::default(),
            nodes: Watched::default(),
            configs: Watched::default(),
            service_cidrs: Watched::default(),
            due: None,
            statuses_written: None,
            told: BTreeMap::new(),
        }
    }

    fn due_within(&mut self, time: Duration) {
        let at = Instant::now() + time;
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    /// Takes what a watch says; whether something is another than before. None: the watch ended.
    fn heard<O>(
        &mut self,
        what: &str,
        event: Option<Result<Event<O>, watcher::Error>>,
        take: impl Fn(&mut Self, Event<O>) -> bool,
    ) -> Option<bool> {
        match event? {
            Ok(event) => Some(take(self, event)),
            Err(error) => {
                tracing::debug!(%error, "{what} cannot be watched; trying again");
                Some(false)
            }
        }
    }

    fn service(&mut self, event: Event<DynamicObject>) -> bool {
        if let Event::Delete(object) = &event {
            let name = NamespacedName::new(object.namespace().unwrap_or_default(), object.name_any());
            self.told.remove(&name);
        }
        self.services.take(event)
    }

    fn pool(&mut self, event: Event<Readable<PoolObject>>) -> bool {
        let known: BTreeMap<String, SeenPool> = self.pools.all.clone();
        let name = |pool: &Readable<PoolObject>| k8s_openapi::Metadata::metadata(pool).name.clone();
        self.pools.take(event, name, |pool| SeenPool::of(pool, name(pool).and_then(|name| known.get(&name))))
    }

    fn namespace(&mut self, event: Event<Namespace>) -> bool {
        let labels = |namespace: &Namespace| namespace.metadata.labels.clone().unwrap_or_default();
        self.namespaces.take(event, |namespace| namespace.metadata.name.clone(), labels)
    }

    fn node(&mut self, event: Event<Node>) -> bool {
        self.nodes.take(
            event,
            |node| node.metadata.name.clone(),
            |node| match towpath_model::Node::try_from(node) {
                Ok(node) => OwnOfNode { addresses: node.internal_ips, ranges: node.pod_cidrs },
                Err(error) => {
                    tracing::warn!(%error, "what this node says is its own is not known to load balancers");
                    OwnOfNode::default()
                }
            },
        )
    }

    fn network_config(&mut self, event: Event<NetworkConfig>) -> bool {
        let parsed = |texts: &Option<Vec<String>>| -> Vec<IpNet> {
            texts.iter().flatten().filter_map(|text| text.parse::<IpNet>().ok()).map(|range| range.trunc()).collect()
        };
        let ranges = |config: &NetworkConfig| {
            let mut own = parsed(&config.spec.cluster_cidrs);
            own.extend(parsed(&config.spec.service_cidrs));
            Configured { own, external: parsed(&config.spec.external_cidrs) }
        };
        self.configs.take(event, |config| config.metadata.name.clone(), ranges)
    }

    fn service_cidr(&mut self, event: Event<Readable<ServiceCIDR>>) -> bool {
        let name = |object: &Readable<ServiceCIDR>| k8s_openapi::Metadata::metadata(object).name.clone();
        self.service_cidrs.take(event, name, |object| {
            let parsed = object.object().map_err(ToString::to_string);
            match parsed.and_then(|object| ServiceCidr::try_from(object).map_err(|error| error.to_string())) {
                Ok(range) => range.ranges,
                Err(error) => {
                    tracing::warn!(error, "the ranges of this ServiceCIDR are not known to load balancers");
                    Vec::new()
                }
            }
        })
    }

    /// As [`Balancers::heard`]; nothing waits for a server that does not have the kind (Kubernetes before 1.33), or does not let it be
    /// read (rights of an older installation): what `NetworkConfig` names is known either way.
    fn heard_of_ranges(&mut self, event: Option<Result<Event<Readable<ServiceCIDR>>, watcher::Error>>) -> Option<bool> {
        let refused = |error: &watcher::Error| matches!(error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if matches!(status.code, 403 | 404));
        if let Some(Err(error)) = &event
            && refused(error)
            && !self.service_cidrs.complete
        {
            tracing::info!(%error, "ServiceCIDRs are not followed: addresses in the ranges that NetworkConfig names are not given");
            self.service_cidrs.complete = true;
            return Some(true);
        }
        self.heard("ServiceCIDRs", event, Self::service_cidr)
    }

    fn is_complete(&self) -> bool {
        self.services.complete
            && self.pools.complete
            && self.namespaces.complete
            && self.nodes.complete
            && self.configs.complete
            && self.service_cidrs.complete
    }

    fn view(&self) -> View {
        let mut own_ranges: BTreeSet<IpNet> = self.cluster_cidrs.iter().map(IpNet::trunc).collect();
        own_ranges.extend(self.configs.all.values().flat_map(|config| &config.own));
        own_ranges.extend(self.service_cidrs.all.values().flatten());
        // A node's range that is in one of these says nothing new, and there are many nodes.
        let of_nodes = self.nodes.all.values().flat_map(|node| &node.ranges).copied();
        let node_ranges: BTreeSet<IpNet> =
            of_nodes.filter(|range| !own_ranges.iter().any(|own| own.contains(range))).collect();
        let pools = self.pools.all.iter();
        View {
            pools: pools.filter_map(|(name, seen)| Some((name.clone(), seen.pool.clone()?))).collect(),
            some_pool_is_unclear: self.pools.all.values().any(|seen| seen.unclear.is_some()),
            services: self.services.all(),
            namespaces: self.namespaces.all.clone(),
            node_addresses: self.nodes.all.values().flat_map(|node| node.addresses.iter().copied()).collect(),
            own_ranges: own_ranges.into_iter().collect(),
            node_ranges: node_ranges.into_iter().collect(),
            external_ranges: self.configs.all.values().flat_map(|config| config.external.iter().copied()).collect(),
        }
    }

    /// Brings everything to what it should be, as far as it is known.
    async fn pass(&mut self) {
        self.due = None;
        if !self.is_complete() {
            return;
        }
        let mut last = None;
        for _ in 0..ROUNDS {
            let view = self.view();
            let planned = plan(&view);
            let written = self.write(&view, &planned).await;
            if written.failed {
                self.due_within(RETRY);
            }
            let settled = planned.changes(&view).is_empty();
            last = Some(planned);
            if settled || !written.any {
                break;
            }
            // What comes of the last round is looked at again.
            self.due_within(WINDOW);
        }
        if let Some(planned) = last {
            self.tell(&planned);
            let standing = self.services.all().into_values().flat_map(|service| service.standing);
            self.sweeping.tell(standing.chain(planned.addresses.values().flatten().copied()).collect());
            self.write_pool_statuses(&planned).await;
        }
    }

    /// Writes what is to be another; whatever part of it is done, in whatever order, nobody has what is another's.
    async fn write(&mut self, view: &View, planned: &Plan) -> Written {
        let changes: Vec<_> =
            planned.changes(view).into_iter().map(|(name, addresses)| (name.clone(), addresses.clone())).collect();
        let writes = changes.into_iter().filter_map(|(name, addresses)| {
            let write = timeout(WRITE, self.services.writing(&self.client, &name, &addresses)?);
            let is_new = view.services.get(&name).is_none_or(|service| service.standing != addresses);
            Some(async move { (name, addresses, is_new, write.await) })
        });
        let writes: Vec<_> = writes.collect();
        let (all, deadline) = (writes.len(), Instant::now() + ROUND);
        let mut written = Written::default();
        let mut answers = futures::stream::iter(writes).buffer_unordered(AT_ONCE);
        let mut done = 0_usize;
        while let Ok(Some((name, addresses, is_new, outcome))) = timeout_at(deadline, answers.next()).await {
            done += 1;
            let Ok(outcome) = outcome else {
                tracing::warn!(service = %name, "its load balancer's addresses were not written in time; trying again");
                written.failed = true;
                continue;
            };
            match outcome {
                Ok(object) => {
                    written.any = true;
                    self.services.learn_written(&object);
                    if is_new {
                        self.announce(&name, &addresses);
                    }
                }
                // Changed or deleted meanwhile: the watch brings it. Where another implementation wrote the status a moment before, it stays.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {
                    tracing::debug!(service = %name, reason = status.message, "not written");
                    written.failed = true;
                }
                Err(error) => {
                    tracing::warn!(service = %name, %error, "its load balancer's addresses could not be written; trying again");
                    written.failed = true;
                }
            }
        }
        if done < all {
            tracing::warn!(
                left = all - done,
                "the API server is slow: addresses that are not written yet come with the next pass"
            );
            written.failed = true;
        }
        written
    }

    fn announce(&self, name: &NamespacedName, addresses: &BTreeSet<IpAddr>) {
        let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let (reason, note) = match texts.as_slice() {
            [] => ("AddressReleased", "its load balancer's address was taken back".to_owned()),
            some => ("AddressAssigned", format!("its load balancer's address is {}", some.join(" and "))),
        };
        tracing::info!(service = %name, addresses = ?texts, "{note}");
        if let Some(on) = self.services.reference(name) {
            let _said = self.events.post(Note { on, type_: EventType::Normal, reason, action: "AssignAddress", note });
        }
    }

    /// Says on each Service why it does not get all it asks for, once.
    fn tell(&mut self, planned: &Plan) {
        self.told.retain(|name, _| planned.refused.contains_key(name));
        for (name, refusal) in &planned.refused {
            // The watch of namespaces is a moment behind.
            if *refusal == Refusal::NoNamespace {
                continue;
            }
            let note = refusal.to_string();
            if self.told.get(name) == Some(&note) {
                continue;
            }
            if let Some(on) = self.services.reference(name) {
                let (type_, reason) = kind_of(refusal);
                if !self.events.post(Note { on, type_, reason, action: "AssignAddress", note: note.clone() }) {
                    // Too much is to be said at once: the rest a little later.
                    self.due_within(RETRY);
                    return;
                }
            }
            tracing::info!(service = %name, note, "no load balancer address");
            self.told.insert(name.clone(), note);
        }
    }

    async fn write_pool_statuses(&mut self, planned: &Plan) {
        let stale = pool_status::stale(&self.pools.all, planned);
        if stale.is_empty() {
            return;
        }
        if let Some(last) = self.statuses_written.filter(|last| last.elapsed() < STATUS_EVERY) {
            self.due_within(STATUS_EVERY.saturating_sub(last.elapsed()));
            return;
        }
        self.statuses_written = Some(Instant::now());
        let api: Api<PoolObject> = Api::all(self.client.clone());
        for (name, status) in stale {
            let error = match timeout(WRITE, pool_status::write(&api, &name, &status)).await {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer in time".to_owned(),
            };
            tracing::warn!(pool = name, error, "the status of this AddressPool could not be written; trying again");
            self.due_within(RETRY);
            break;
        }
    }
}

/// How a refusal is shown. Where there is no pool at all, Towpath may not be meant.
fn kind_of(refusal: &Refusal) -> (EventType, &'static str) {
    match refusal {
        Refusal::NoPool { explicit: false } => (EventType::Normal, "NoAddressPool"),
        Refusal::NoPool { explicit: true }
        | Refusal::UnknownPool(_)
        | Refusal::NotAdmitted { .. }
        | Refusal::NoRange { .. } => (EventType::Warning, "NoAddressPool"),
        Refusal::Full { .. } => (EventType::Warning, "AddressPoolFull"),
        Refusal::Unclear(_)
        | Refusal::WrongFamily(_)
        | Refusal::NeedsBoth(_)
        | Refusal::NotInPool { .. }
        | Refusal::ClusterOwn(_)
        | Refusal::Taken { .. }
        | Refusal::NoNamespace => (EventType::Warning, "RequestedAddressRefused"),
    }
}
