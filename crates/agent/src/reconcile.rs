//! The reconcile loop: what changed, planned and applied.
//!
//! One task takes every change and every ADD in turn, so that what a pod is admitted with is what the kernel holds at that
//! moment. A change that comes alone is planned at once, those that come while it works together ([`pace`]). What could not be applied is
//! tried again, with growing delays; a slow full check repairs what others broke.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout_at};
use towpath_carry::feed;
use towpath_datapath::Datapath;
use towpath_datapath::bpf::Adopted;
use towpath_datapath::net::address::DeviceAddress;
use towpath_model::custom::BackendName;
use towpath_model::desired::{NodePeer, PodSets};
use towpath_model::{AskedBandwidth, NamespacedName, NodeName};
use towpath_plan::dns::FeedPlanner;
use towpath_plan::peers::Tunnels;
use towpath_plan::pod_mtu::{Change, PodMtu};
use towpath_plan::services::{Planner, Refusal, RefusedPart, ServiceConfig, api_server, asks};
use towpath_plan::{Changed, ChangedPods};
use towpath_policy::Compiler;
use towpath_policy::check::Checker;
use towpath_policy::compile::Touched;
use towpath_wire::config::AgentConfig;
use tracing::{error, info, warn};

use crate::audits::Ledger;
use crate::backoff::Backoff;
use crate::cni_server::{AttachRequest, Attached, PlumbError, Readiness};
use crate::counts;
use crate::index::{Changes, Kind};
use crate::ipam::LeaseStore;
use crate::masquerade::NonMasquerade;
use crate::modes::{self, Follower};
use crate::names::Lesson;
use crate::names::book::{Book, SharedBook};
use crate::node_network::kept::Kept;
use crate::predecessor::Remains;
use crate::proxy_health::HealthPorts;
use crate::pulse::Pulse;
use crate::service_ranges::Ranges;
use crate::settings::{OwnNode, Parsed};
use crate::udp::Carried;
use crate::watch::Update;
use crate::{SharedIndex, own_node, read, write};

mod addresses;
mod attach;
mod bandwidth;
mod before;
mod crowd;
mod health_checks;
mod learn;
mod masquerade;
mod mtu;
mod names;
mod pace;
mod peers;
mod policy;
mod progress;
mod report;
mod service_ranges;
mod socket_services;
mod udp;

pub use progress::Progress;
pub(crate) use progress::ways as ways_to;
pub use report::{Report, RuleNames, SharedReport};

use pace::Pace;

/// More changes than these are not gathered.
const MOST_AT_ONCE: usize = 4096;
/// Old lists are swept and grace periods looked at this often.
const SWEEP: Duration = Duration::from_secs(1);
/// What the kernel had no room for is tried again after this long, then after twice as long, and at last so often.
const ROOM: Duration = Duration::from_secs(3);
const LONGEST_ROOM: Duration = Duration::from_secs(60);
/// The slow full check.
const AUDIT: Duration = Duration::from_secs(30);
/// It comes so soon after peers could not be set up.
const AUDIT_SOON: Duration = Duration::from_secs(2);
/// Ids of policy rows and backends rest for this long.
const GRACE: Duration = Duration::from_secs(10);

/// What the loop does on request.
#[derive(Debug)]
pub enum Request {
    /// Give a pod its device, with its isolation in the kernel first.
    Attach {
        /// The pod and its namespace.
        request: Box<AttachRequest>,
        /// The outcome.
        reply: oneshot::Sender<Result<Attached, PlumbError>>,
    },
    /// Learn what names stand for, and say when the kernel has it.
    Learn(Lesson),
}

type Attach = (Box<AttachRequest>, oneshot::Sender<Result<Attached, PlumbError>>);

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Nobody tells it anything any more.
    Unheard,
    /// This node's own addresses or ranges are others.
    NodeChanged,
}

/// The planners and the data path they feed.
pub struct Reconciler {
    node: NodeName,
    parsed: Parsed,
    /// What the data path was opened with, and where it is kept.
    own: OwnNode,
    own_file: PathBuf,
    /// Addresses of this network namespace at the start.
    own_addresses: Vec<DeviceAddress>,
    /// This node has other addresses or ranges now: only a new start can follow.
    moved: bool,
    dns: Vec<IpAddr>,
    index: SharedIndex,
    datapath: Datapath,
    leases: Arc<LeaseStore>,
    feed: feed::Client,
    services: Planner,
    /// The kernel has the table as it was last planned.
    services_followed: bool,
    /// A whole table was written: what that took is to be given back.
    give_back: bool,
    /// What the kernel has no room for.
    left_out: BTreeSet<Refusal>,
    /// When there may be room for it, and how long it was waited for.
    room: Option<(Instant, Duration)>,
    compiler: Compiler,
    audits: Ledger,
    names: FeedPlanner,
    /// What domain names of policies stand for.
    book: SharedBook,
    /// The names that policies ask for; none: not known yet.
    asked_names: watch::Sender<Option<Vec<String>>>,
    /// When connections may next be looked at because of names whose time is over.
    look_at: Instant,
    health_ports: HealthPorts,
    health_checked: BTreeSet<u16>,
    modes: Follower,
    ranges: Ranges,
    non_masquerade: NonMasquerade,
    peers: Vec<NodePeer>,
    /// Nodes whose agents were heard of, and our VXLAN.
    tunnels: Tunnels,
    /// Backend that this node sends by.
    backend: BackendName,
    /// Packets of other nodes' pods are taken as they are until then.
    plain_until: Option<Instant>,
    /// This node's pods are on the link until then.
    on_link_until: Option<Instant>,
    /// Whether the uplink bears their MAC addresses.
    bears_macs: bool,
    /// Packets by way of user space.
    udp: udp::Way,
    /// MTU of this node's pods, and when it may be more.
    pod_mtu: PodMtu,
    /// What the configuration says it is.
    pod_mtu_said: Option<u32>,
    /// What could not be done of it.
    mtu_failed: Option<Change>,
    /// Tells how far this node is with its backend.
    teller: progress::Teller,
    /// What nodes said of backends.
    kept: Kept,
    /// What the network before had on this node when it was last looked at.
    remains: Remains,
    /// Sets of this node's pods in the image that was applied last.
    pod_sets: BTreeMap<IpAddr, PodSets>,
    /// Addresses of this node's pods whose sockets are left alone.
    at_device: BTreeSet<IpAddr>,
    /// What this node's pods ask for of bandwidth, as it was applied last, by their addresses; none: it must be applied again.
    bandwidth: Option<BTreeMap<IpAddr, AskedBandwidth>>,
    started: Instant,
    /// Whether packets can go by way of user space became another matter: ways must be looked at.
    due_ways: bool,
    /// What must be planned at the next opportunity; failed applies put it back.
    due: Changes,
    /// The policy must be compiled at the next opportunity.
    policy_due: bool,
    /// What it must look at then.
    policy_touched: Touched,
    /// Policies for which there is no room.
    crowd: crowd::Crowd,
    /// NetworkPolicies with an annotation that means nothing.
    misread: BTreeMap<NamespacedName, Refusal>,
    /// Has every image checked before it is written, and keeps what it read for that.
    checker: Checker,
    /// The kernel has the image that was compiled last.
    policy_followed: bool,
    /// When it looks at everything again.
    review_at: Instant,
    /// Host ports must be looked at at the next opportunity: pods got addresses, or the API told of pods or nodes.
    host_ports_due: bool,
    backoff: Backoff,
    pace: Pace,
    retry_at: Option<Instant>,
    /// When the next full check is due.
    audit_at: Instant,
    /// Devices that are being made, each with who waits for it.
    attaching: JoinSet<()>,
    report: SharedReport,
    pulse: Pulse,
}

/// What the loop reads from and writes to.
pub struct Ends {
    /// The cluster.
    pub index: SharedIndex,
    /// The kernel.
    pub datapath: Datapath,
    /// Addresses of this node's pods.
    pub leases: Arc<LeaseStore>,
    /// What answers DNS.
    pub feed: feed::Client,
}

impl Reconciler {
    /// Takes over what the kernel holds from an earlier run.
    ///
    /// # Errors
    /// The data path does not answer.
    pub async fn new(
        config: &AgentConfig,
        parsed: &Parsed,
        own: &OwnNode,
        ranges: Ranges,
        non_masquerade: NonMasquerade,
        Ends { index, datapath, leases, feed }: Ends,
    ) -> Result<Self> {
        let left = datapath.status().await?;
        let kept = Kept::open(&config.state_dir);
        let said = kept.said().get(&parsed.node).map(|said| &said.receives);
        // What the run before took, others may send until they have heard that it is taken no longer.
        let took_plain = left.on_link || said.is_some_and(|receives| receives.contains(&BackendName::HostGw));
        let quiet = |took: bool| took.then(|| Instant::now() + peers::QUIET);
        let (plain_until, on_link_until) = (quiet(took_plain), quiet(left.on_link));
        let settings = crate::settings::node_settings(config, parsed, own);
        let udp = udp::Way::start(config, &datapath).await?;
        let started = Instant::now();
        let mut adopted = datapath.adopted().await?;
        let audited = datapath.audited().await?;
        // Whose its Services are, and where it answers DNS, follows from who is in charge, which is decided before the first plan.
        let mut services = Planner::new(ServiceConfig {
            dns_addresses: settings.dns_addresses.clone(),
            ..towpath_plan::config::services(config, &parsed.ranges, ranges.in_force())
        });
        let Adopted { backends, frontends, inside, .. } = &mut adopted;
        services.adopt(std::mem::take(backends), std::mem::take(frontends), std::mem::take(inside), Duration::ZERO);
        Ok(Self {
            node: parsed.node.clone(),
            parsed: parsed.clone(),
            own: own.clone(),
            own_file: own_node::file(config),
            own_addresses: own_node::own_addresses().await?,
            moved: false,
            dns: settings.dns_addresses,
            index,
            datapath,
            leases,
            feed,
            services,
            services_followed: false,
            give_back: false,
            left_out: BTreeSet::new(),
            room: None,
            compiler: Compiler::resume(GRACE, &policy::used(adopted), Duration::ZERO),
            audits: Ledger::open(&config.state_dir, &audited),
            names: FeedPlanner::new(config.cluster_domain.clone()),
            book: Arc::new(RwLock::new(Book::open(&config.run_dir))),
            asked_names: watch::Sender::new(None),
            look_at: started,
            health_ports: HealthPorts::default(),
            health_checked: BTreeSet::new(),
            modes: Follower::new(config, &parsed.node, &config.dns_addresses),
            ranges,
            non_masquerade,
            peers: Vec::new(),
            tunnels: Tunnels { vni: config.vxlan_vni, ..Tunnels::default() },
            backend: config.backend,
            plain_until,
            on_link_until,
            bears_macs: left.facts.bears_macs,
            udp,
            pod_mtu: PodMtu::default(),
            pod_mtu_said: config.pod_mtu,
            mtu_failed: None,
            teller: progress::Teller::default(),
            kept,
            remains: Remains::default(),
            pod_sets: BTreeMap::new(),
            at_device: BTreeSet::new(),
            bandwidth: None,
            started,
            due_ways: false,
            due: Changes::everything(),
            policy_due: true,
            policy_touched: Touched::everything(),
            crowd: crowd::Crowd::default(),
            misread: BTreeMap::new(),
            checker: Checker::new(parsed.node.clone()),
            policy_followed: false,
            review_at: started + policy::REVIEW,
            host_ports_due: true,
            backoff: Backoff::default(),
            pace: Pace::default(),
            retry_at: None,
            audit_at: started + AUDIT,
            attaching: JoinSet::new(),
            report: SharedReport::default(),
            pulse: Pulse::default(),
        })
    }

    /// What the loop reports.
    pub fn report(&self) -> SharedReport {
        self.report.clone()
    }

    /// The turns of the loop, as it takes them.
    pub fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// What domain names of policies stand for.
    pub fn book(&self) -> SharedBook {
        self.book.clone()
    }

    /// The names that policies ask for, as the loop knows them.
    pub fn asked_names(&self) -> watch::Receiver<Option<Vec<String>>> {
        self.asked_names.subscribe()
    }

    /// Whether packets are carried by way of user space.
    pub fn carried(&self) -> watch::Receiver<Carried> {
        self.udp.carried()
    }

    /// How far this node is with its backend, as the loop sees it; none: nothing is known yet.
    pub fn progress(&self) -> watch::Receiver<Option<Progress>> {
        self.teller.subscribe()
    }

    /// Who is in charge of Services and DNS, as the loop decides.
    pub fn in_charge(&self) -> watch::Receiver<modes::State> {
        self.modes.state()
    }

    /// Runs until the watches end, or until this node's own addresses or ranges change.
    pub async fn run(
        mut self,
        mut updates: mpsc::Receiver<Update>,
        mut requests: mpsc::Receiver<Request>,
        ready: watch::Sender<Readiness>,
        config: AgentConfig,
    ) -> Stopped {
        let mut addresses = addresses::Followed::by(&self.datapath).await;
        let mut sweep = tokio::time::interval(SWEEP);
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.pulse.beat();
            let (mut attaches, mut lessons): (Vec<Attach>, Vec<Lesson>) = (Vec::new(), Vec::new());
            let retry = self.retry_at.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
            tokio::select! {
                update = updates.recv() => match update {
                    Some(update) => self.take(update, &mut updates).await,
                    None => return Stopped::Unheard,
                },
                request = requests.recv() => match request {
                    Some(Request::Attach { request, reply }) => attaches.push((request, reply)),
                    Some(Request::Learn(lesson)) => lessons.push(lesson),
                    None => return Stopped::Unheard,
                },
                () = sleep_until(retry.into()) => self.retry_at = None,
                () = self.udp.changed() => self.due_ways = true,
                () = addresses.changed() => {
                    addresses::follow(&self.datapath).await;
                    self.answer_health_checks().await;
                }
                _ = sweep.tick() => {
                    self.sweep().await;
                    self.forget_names().await;
                    if self.mtu_is_due() {
                        self.follow_mtu().await;
                    }
                    self.tell_progress().await;
                    if self.health_ports.lacks_some() {
                        self.answer_health_checks().await;
                    }
                    if *ready.borrow() == Readiness::Ready {
                        self.follow_predecessor(&config.cni_conf_dir).await;
                        self.set_predecessor_aside(&config.cni_conf_dir);
                        self.take_tunnel_if_told(&config.take_tunnel_note()).await;
                    }
                    if Instant::now() >= self.audit_at {
                        self.audit().await;
                        self.retry_mtu().await;
                        self.follow_mtu().await;
                        self.retry_bandwidth().await;
                        self.teller.due = true;
                        self.look_for_preferred(&config.cni_conf_dir);
                        self.audit_at = Instant::now() + AUDIT;
                    }
                }
            }
            while let Ok(request) = requests.try_recv() {
                match request {
                    Request::Attach { request, reply } => attaches.push((request, reply)),
                    Request::Learn(lesson) => lessons.push(lesson),
                }
            }
            let (synced, recalled, heard, outliving) = {
                let mut index = write(&self.index);
                let changes = index.take_changes();
                self.due.merge(changes);
                let recalled = !index.recalled().is_empty();
                (index.is_synced(), recalled, index.heard().clone(), index.outliving().clone())
            };
            self.with_report(|report| report.recalled = recalled);
            if synced {
                // Before the first peers are written: what a former agent wrote of its pods stays then.
                if *ready.borrow() != Readiness::Ready {
                    self.follow_predecessor(&config.cni_conf_dir).await;
                }
                let learned = self.learn(&lessons);
                if !attaches.is_empty() || learned || self.retry_at.is_none() {
                    self.policy_due |= !attaches.is_empty();
                    self.host_ports_due |= !attaches.is_empty();
                    let done = self.plan_and_apply().await;
                    self.settle(done);
                    // All that was heard before the plan is in it, whatever else failed.
                    if !self.policy_due {
                        self.with_report(|report| (report.heard, report.outliving) = (heard, outliving));
                    }
                }
                if self.moved {
                    warn!(was = ?self.own, "this node has other addresses or pod ranges now: starting anew with them");
                    return Stopped::NodeChanged;
                }
                self.become_ready(&ready, &config);
            } else {
                let missing = read(&self.index).missing();
                let said = counts::trouble(&missing).map(|said| format!("; it says: {said}")).unwrap_or_default();
                let reason = format!("waiting for the first full list of {missing:?} from the API server{said}");
                ready.send_if_modified(|state| match state {
                    Readiness::Starting(old) if *old != reason => {
                        old.clone_from(&reason);
                        true
                    }
                    _ => false,
                });
            }
            self.tell_learned(lessons, synced);
            self.attach_all(attaches, synced).await;
        }
    }

    /// Applies an update, those that have come with it, and those that come while the loop rests.
    async fn take(&mut self, first: Update, updates: &mut mpsc::Receiver<Update>) {
        let until = self.pace.gathers_until(Instant::now());
        let mut batch = vec![first];
        loop {
            while let Ok(update) = updates.try_recv() {
                batch.push(update);
            }
            if batch.len() >= MOST_AT_ONCE || Instant::now() >= until {
                break;
            }
            match timeout_at(until.into(), updates.recv()).await {
                Ok(Some(update)) => batch.push(update),
                _ => break,
            }
        }
        let index = self.index.clone();
        tokio::task::block_in_place(|| {
            let mut index = write(&index);
            batch.into_iter().for_each(|update| update(&mut index));
        });
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn settle(&mut self, done: bool) {
        if done {
            self.backoff.worked();
            self.retry_at = None;
        } else {
            self.retry_at = Some(Instant::now() + self.backoff.failed());
        }
    }

    fn become_ready(&self, ready: &watch::Sender<Readiness>, config: &AgentConfig) {
        if *ready.borrow() == Readiness::Ready || !self.report_is_clean() {
            return;
        }
        if let Err(error) = crate::conflist::install(config) {
            error!(%error, directory = %config.cni_conf_dir.display(), "could not write the CNI configuration; trying again");
            return;
        }
        self.set_predecessor_aside(&config.cni_conf_dir);
        self.look_for_preferred(&config.cni_conf_dir);
        ready.send_replace(Readiness::Ready);
        info!(seconds = self.now().as_secs_f64(), "ready: the first full sync is in the kernel");
    }

    /// Another network's leftover would go on giving pods their addresses.
    fn look_for_preferred(&self, directory: &Path) {
        let names = crate::conflist::preferred_to_ours(directory);
        let known = self.with_report(|report| std::mem::replace(&mut report.preferred, names.clone()));
        for name in names.iter().filter(|name| !known.contains(name)) {
            warn!(file = %directory.join(name).display(), "the container runtime takes this CNI configuration before ours: remove it");
        }
    }

    fn report_is_clean(&self) -> bool {
        self.with_report(|report| report.plans > 0 && report.failures.is_empty())
    }

    fn with_report<T>(&self, f: impl FnOnce(&mut Report) -> T) -> T {
        f(&mut self.report.write().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Plans what is due and applies it, in the order peers, policy, Services, names; whether everything worked.
    async fn plan_and_apply(&mut self) -> bool {
        self.follow_modes().await;
        let ranges = self.follow_service_ranges().await;
        let non_masquerade = self.follow_non_masquerade().await;
        let mut due = std::mem::take(&mut self.due);
        let touched = due.take_touched();
        let pods = touched.pods().cloned();
        let pods = pods.as_ref().map_or(ChangedPods::All, ChangedPods::These);
        self.policy_touched.merge(touched);
        let expired = self.compiler.next_expiry().is_some_and(|at| at <= self.now());
        let room = self.room.is_some_and(|(at, _)| at <= Instant::now());
        let drained = room || self.services.next_deadline().is_some_and(|at| at <= self.now());
        let policy_kinds = [
            Kind::Node,
            Kind::Namespace,
            Kind::Pod,
            Kind::NetworkPolicy,
            Kind::ClusterNetworkPolicy,
            Kind::NodeNetwork,
        ];
        self.policy_due |= due.any(&policy_kinds) || expired || self.crowd_is_due() || Instant::now() >= self.review_at;
        // Where the API servers are, no host port is given.
        let api_moved = match due.services() {
            Changed::All => due.any(&[Kind::EndpointSlice]),
            Changed::Services(changed) => changed.contains(&api_server()),
        };
        self.host_ports_due |= api_moved || due.any(&[Kind::Node, Kind::Pod]);
        self.moved |= (due.any(&[Kind::Node]) || self.range_is_left()) && self.own_node_moved();
        if due.is_empty() && !self.policy_due && !self.host_ports_due && !drained && !self.ways_are_due() {
            return true;
        }
        let begun = Instant::now();
        let mut failures: BTreeMap<&'static str, String> = BTreeMap::new();
        if let Err(error) = non_masquerade {
            failures.insert("masquerading", error);
        }
        if let Err(error) = ranges {
            failures.insert("service ranges", error);
        }
        let joined = due.any(&[Kind::NodeNetwork]) && self.nodes_taken_over();
        self.teller.due |= due.any(&[Kind::NodeNetwork]);
        let another_way = (due.any(&[Kind::NodeNetwork]) || self.ways_are_due()) && self.ways_changed();
        if (due.any(&[Kind::Node]) || joined || another_way)
            && let Err(error) = self.apply_peers().await
        {
            failures.insert("peers", error);
        }
        if self.policy_due {
            let begun = Instant::now();
            let outcome = self.apply_policy().await;
            counts::applied("policy", begun.elapsed());
            match outcome {
                Ok(()) => self.policy_due = false,
                Err(error) => drop(failures.insert("policy", error)),
            }
            if let Err(error) = self.apply_socket_services().await {
                failures.insert("socket services", error);
            }
        }
        if due.any(&[Kind::Pod])
            && let Err(error) = self.apply_bandwidth().await
        {
            failures.insert("bandwidth", error);
        }
        let host_ports = std::mem::take(&mut self.host_ports_due) && self.plan_host_ports(pods);
        let mut unapplied = due.led_to_by().to_vec();
        if due.any(&[Kind::Service, Kind::EndpointSlice, Kind::Node]) || drained || host_ports {
            match self.apply_services_timed(&due).await {
                Ok(()) => unapplied.clear(),
                Err(error) => drop(failures.insert("services", error)),
            }
        }
        if due.any(&[Kind::DnsConfig, Kind::Service]) {
            self.feed_dns_config();
        }
        if due.any(&[Kind::Service, Kind::EndpointSlice, Kind::Namespace, Kind::Pod]) {
            self.feed_names(&due, pods);
        }
        if std::mem::take(&mut self.give_back) {
            // Lists were read and tables of all were written: most of what that took is free now.
            tokio::task::block_in_place(towpath_datapath::memory::give_back);
        }
        for (what, error) in &failures {
            warn!(what, error, "could not be applied; trying again");
        }
        let failed = !failures.is_empty();
        if failed {
            self.due = Changes::everything().since(unapplied);
        }
        self.with_report(|report| {
            report.plans += 1;
            report.failed += u64::from(failed);
            report.failures = failures;
            report.last_seconds = begun.elapsed().as_secs_f64();
        });
        counts::applied("all", begun.elapsed());
        self.pace.worked(begun, Instant::now());
        !failed
    }

    /// Decides who is in charge, if there is a reason to, and has what follows from it planned.
    async fn follow_modes(&mut self) {
        let now = self.now();
        if !self.due.any(&[Kind::Pod, Kind::Service, Kind::EndpointSlice]) && !self.modes.is_due(now) {
            return;
        }
        let sight = self.modes.look(read(&self.index).world());
        let (state, changed) = self.modes.decide(sight, now).await;
        if changed && let Some(in_charge) = state.in_charge {
            self.services.serve(in_charge.proxy.clients());
            self.services.answer_dns_at(&state.dns_addresses, now);
            self.due.merge(Changes::all_services());
            // Whether names are learned here is said with the policies.
            self.policy_due = true;
        }
        self.with_report(|report| report.in_charge = state);
    }

    /// Host ports as pods, nodes and leases are now; whether the table is another.
    fn plan_host_ports(&mut self, pods: ChangedPods<'_>) -> bool {
        let (now, own, index) = (self.now(), self.leases.pod_addresses(), self.index.clone());
        tokio::task::block_in_place(|| self.services.plan_host_ports(read(&index).world(), pods, &self.node, &own, now))
    }

    async fn apply_services_timed(&mut self, due: &Changes) -> Result<(), String> {
        let begun = Instant::now();
        self.with_report(|report| report.services_due = Some(SystemTime::now()));
        self.apply_services(due).await?;
        counts::services_applied(begun.elapsed(), due.led_to_by());
        self.with_report(|report| report.services_applied = Some(SystemTime::now()));
        Ok(())
    }

    async fn apply_services(&mut self, due: &Changes) -> Result<(), String> {
        let now = self.now();
        let index = self.index.clone();
        // At the start, and after a failure, of which nobody knows how far it came, the whole table; and when there may be room again.
        let room = self.room.filter(|(at, _)| *at <= Instant::now());
        let followed = std::mem::replace(&mut self.services_followed, false) && room.is_none();
        let changes = tokio::task::block_in_place(|| {
            self.services.plan(read(&index).world(), &self.node, due.services(), now);
            if followed {
                return Some(self.services.take_changes());
            }
            self.services.forget_changes();
            None
        });
        let host_ports = self.services.count_host_ports(read(&index).world(), &self.node);
        let mut refused = self.services.refusals();
        let (frontends, backends) = (self.services.table().frontends.len(), self.services.table().backends.len());
        let applied = match changes {
            Some(changes) => self.datapath.apply_service_changes(changes).await,
            None => self.datapath.apply_services(self.services.table().clone()).await,
        };
        let applied = applied.map_err(|e| e.to_string())?;
        self.services_followed = true;
        let left_out: BTreeSet<Refusal> = applied
            .left_out
            .into_iter()
            .map(|left| Refusal {
                asks: asks(&left.port_name),
                name: left.service,
                part: RefusedPart::Room,
                reason: left.reason,
            })
            .collect();
        for refusal in left_out.difference(&self.left_out) {
            warn!(%refusal, "not all Services fit into the kernel's tables");
        }
        self.room = match (left_out.is_empty(), self.room) {
            (true, _) => None,
            // What went with a change makes room.
            (false, Some((at, waited))) if followed => Some((at.min(Instant::now() + ROOM), waited)),
            (false, waited) => {
                let next = waited.map_or(ROOM, |(_, waited)| (waited * 2).min(LONGEST_ROOM));
                Some((Instant::now() + next, next))
            }
        };
        self.left_out.clone_from(&left_out);
        refused.extend(left_out);
        self.with_report(|report| {
            report.frontends = frontends;
            report.backends = backends;
            report.host_ports = host_ports;
            report.refused_services = refused;
        });
        self.answer_health_checks().await;
        self.give_back |= !followed;
        Ok(())
    }

    async fn sweep(&mut self) {
        if let Err(error) = self.datapath.sweep().await {
            warn!(%error, "could not sweep old entries; trying again");
        }
        if let Err(error) = self.read_audits().await {
            warn!(%error, "could not read what audited policies would deny; trying again");
        }
    }

    async fn audit(&mut self) {
        match self.datapath.audit().await {
            Ok(applied) => {
                for change in applied.changes {
                    warn!(change, "the kernel was not as it should be: repaired");
                }
                for problem in applied.problems {
                    warn!(problem, "the kernel is not as it should be and could not be repaired");
                }
            }
            Err(error) => warn!(%error, "the full check failed"),
        }
    }
}
