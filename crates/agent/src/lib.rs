//! The node agent: watches, the reconcile loop, the CNI socket, status and metrics.
//!
//! ```text
//! kube API ─► watch (a task a kind) ─► Index ─► reconcile: plan, policy ─► Datapath (one thread) ─► kernel
//!                                        ▲          ▲        └─► feed ─► towpath carry
//!                        towpath-cni ─► CNI server ─┘
//!        answers of towpath carry ─► names ─┘
//!              Index, AddressPools ─► announce (a task an address) ─► ARP, neighbour discovery
//! ```
//!
//! Nothing in the kernel changes before every watch has had its first full list (or, while the API server is away, before what an
//! earlier run knew is recalled, [`last_known`]), but for this node's own base (devices,
//! programs, gateway addresses), which a restart adopts. The CNI configuration is written last, when the node is ready.
#![forbid(unsafe_code)]

pub mod announce;

mod api_client;
mod aside;
mod audits;
mod backoff;
pub mod cni_server;
pub mod conflist;
pub(crate) mod counts;
pub mod disk;
pub mod events;
pub mod failure;
mod firewall;
mod heard;
mod in_force;
pub mod index;
pub mod ipam;
mod json_socket;
pub mod last_known;
mod last_ready;
pub mod masquerade;
pub mod metrics;
pub mod modes;
pub mod names;
pub mod network_config;
pub mod node_going;
pub mod node_network;
pub mod node_ready;
mod observe;
pub mod outliving;
mod own_node;
pub mod paths;
mod plain_http;
pub mod pods;
pub mod predecessor;
pub mod proxy_health;
pub mod pulse;
pub mod reconcile;
mod relist;
pub mod service_ranges;
mod service_status;
pub mod settings;
mod sole;
pub mod status;
pub mod udp;
pub mod watch;

use std::net::IpAddr;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use anyhow::{Context, Result};
use ipnet::IpNet;
use tokio::sync::{mpsc, watch as channel};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use towpath_carry::feed;
use towpath_datapath::{Datapath, DatapathConfig};
use towpath_model::custom::NetworkConfigSpec;
use towpath_model::desired::NodeSettings;
use towpath_plan::config::overlay;
use towpath_plan::service_ranges::Own;
use towpath_wire::config::AgentConfig;
use tracing::info;

use cni_server::{CniServer, CniServerConfig, Readiness};
use index::Index;
use ipam::{LeaseStore, RealDisk};
use last_known::LastKnown;
use masquerade::NonMasquerade;
use node_network::kept::Kept;
use node_network::publish::{self, Publisher};
use predecessor::host_local::HostLocal;
use reconcile::{Reconciler, Request, Stopped};
use service_ranges::Ranges;
use settings::{OwnNode, Parsed};
use sole::Sole;
use status::{SharedSources, Sources};

/// The index, shared between the one who writes it and those who look pods up.
pub type SharedIndex = Arc<RwLock<Index>>;

/// Why an agent ended in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was told to.
    Told,
    /// The cluster's NetworkConfig says something else now. It is kept on disk, and an agent that starts anew goes by it.
    ConfigChanged,
    /// This node has other addresses or pod ranges now: an agent that starts anew opens the data path with them.
    NodeChanged,
}

/// Runs the agent until `shutdown`, or until the cluster's configuration or this node's own addresses or pod ranges change. What is in the kernel stays there and goes on working.
///
/// # Errors
/// The configuration is wrong, the kernel refuses, or an essential task died; the process should be started again.
pub async fn run(config: AgentConfig, shutdown: CancellationToken) -> Result<Ended> {
    let outcome = run_until(config.clone(), shutdown).await;
    if let Err(error) = &outcome {
        failure::report(&config, error).await;
    }
    outcome
}

async fn run_until(config: AgentConfig, shutdown: CancellationToken) -> Result<Ended> {
    counts::begin();
    let node = settings::parse(&config)?.node;
    for directory in [&config.run_dir, &config.state_dir] {
        std::fs::create_dir_all(directory).with_context(|| format!("could not make {}", directory.display()))?;
    }
    let _sole = Sole::take(&config.run_dir).await?;
    let (ready, readiness) = channel::channel(Readiness::Starting("waiting for the API server".to_owned()));
    // From the first moment on: whoever waits for the API server is alive, and says so.
    let sources: SharedSources = Arc::default();
    let health = config.metrics_listen.map(|listen| metrics::serve(listen, readiness.clone(), sources.clone()));
    let health = health.transpose()?;
    let status = status::serve(&config, &node, sources.clone(), readiness.clone())?;
    let service_status = service_status::serve(&config, &node, sources.clone())?;
    let policies_in_force = in_force::serve(&config, &node, sources.clone())?;
    let observed = observe::serve(&config, &node, sources.clone())?;
    let named = names::status::serve(&config, &node, sources.clone())?;
    let client = api_client::client(&config).await?;
    let telling = owned(events::announce_problems(client.clone(), node, sources.clone(), readiness.clone()));
    let refusing = owned(events::refusals::announce(client.clone(), sources.clone()));
    let own_config = config;
    let overlaid = |spec: &NetworkConfigSpec| overlay(own_config.clone(), spec);
    let usable = |spec: &NetworkConfigSpec| settings::parse(&overlaid(spec)?).map(drop);
    let in_force = network_config::read(&client, &own_config, usable).await?;
    let config = overlaid(&in_force.spec)?;
    let parsed = settings::parse(&config)?;
    let (told_generation, generation) = channel::channel(in_force.generation);
    let config_changed = network_config::changed(client.clone(), own_config.clone(), in_force, told_generation, usable);
    let index: SharedIndex = Arc::default();
    let (updates, mut inbox) = mpsc::channel(4096);
    let last_known = LastKnown::new(&config.state_dir);
    let (asking, questions) = mpsc::unbounded_channel();
    {
        let former = last_known.clone().policies().await;
        let mut index = write(&index);
        index.ask_about_namespaces(parsed.node.clone(), asking);
        index.remember_policies(former);
        index.say_all(Kept::open(&config.state_dir).said().clone());
        index.bound_pod_ranges(parsed.ranges.cluster_cidrs.clone(), parsed.ranges.service_cidrs.clone());
    }
    let outliving = owned(outliving::answer(client.clone(), questions, updates.clone()));
    let mut watches = watch::watch_all(&client, &updates);
    let recalling = owned(last_known.clone().recall_when_silent(index.clone(), updates.clone()));
    let keeping = owned(last_known.clone().keep(index.clone()));
    let own = tokio::select! {
        () = shutdown.cancelled() => return Ok(Ended::Told),
        own = own_node::own_node(&config, &parsed, &index, &mut inbox, &ready) => own?,
    };
    settings::refuse_underlay_overlap(&parsed.node, &own, &own_node::own_addresses().await?)?;
    info!(node = %parsed.node, addresses = ?own.addresses, pod_cidrs = ?own.pod_cidrs, "this node");

    let ranges = ranges_at_start(&config, &parsed, &own, &index);
    let non_masquerade = NonMasquerade::at_start(&config.state_dir, &parsed.ranges.non_masquerade_cidrs);
    let before = HostLocal::new(&config.cni_state_dir);
    let leases = Arc::new(LeaseStore::open(&config.state_dir, &own.pod_cidrs, Arc::new(RealDisk))?.after(before));
    leases.close(&own.closed);
    let datapath = open_datapath(&config, &parsed, &own, &ranges, &non_masquerade, &leases).await?;
    let (requests, request_inbox) = mpsc::channel::<Request>(1024);
    let feed = feed::Client::start(config.carry_socket());
    let ends = reconcile::Ends { index: index.clone(), datapath: datapath.clone(), leases: leases.clone(), feed };
    let reconciler = Reconciler::new(&config, &parsed, &own, ranges, non_masquerade, ends).await?;
    let carried = reconciler.carried();
    let (report, in_charge, book) = (reconciler.report(), reconciler.in_charge(), reconciler.book());
    let (progress, pulse) = (reconciler.progress(), reconciler.pulse());
    let hearing = owned(names::hear(config.carry_socket(), reconciler.asked_names(), requests.clone()));
    let mut loop_task = tokio::spawn(reconciler.run(inbox, request_inbox, ready, config.clone()));

    let announcing = owned(node_ready::announce_when_ready(client.clone(), parsed.node.clone(), readiness.clone()));
    let facts = datapath.facts().await?;
    let (found, paths) = channel::channel(None);
    let round = Duration::from_secs(config.path_round_seconds.into());
    let probing = owned(paths::probe(datapath.clone(), report.clone(), own.addresses.clone(), round, found));
    let publisher = Publisher::new(
        client.clone(),
        publish::Facts {
            node: parsed.node.clone(),
            spec: own.offers(&facts),
            backend: config.backend,
            takes_ipip: facts.takes_ipip,
            bears_macs: facts.bears_macs,
        },
        leases.clone(),
        index.clone(),
        publish::Sources {
            readiness: readiness.clone(),
            in_charge: in_charge.clone(),
            generation,
            progress,
            paths: paths.clone(),
            carried: carried.clone(),
        },
    );
    let announcing_to_flannel = owned(predecessor::announce::keep(
        client.clone(),
        parsed.node.clone(),
        own.clone(),
        datapath.clone(),
        config.vxlan_vni,
        index.clone(),
    ));
    let publishing = owned(publisher.run());
    let announcing_balancers = announce::start(
        client.clone(),
        parsed.node.clone(),
        &config.state_dir,
        index.clone(),
        datapath.clone(),
        readiness.clone(),
    );
    let telling_who_announces = owned(events::announced::tell(
        client.clone(),
        parsed.node.clone(),
        index.clone(),
        announcing_balancers.announced(),
    ));
    let going = node_going::watch(client.clone(), &parsed.node);
    let pods = Arc::new(pods::Pods::new(parsed.node.clone(), client, index.clone(), datapath.clone(), requests));
    let mut cni =
        CniServer::start(CniServerConfig::new(&config), pods.clone(), pods, leases.clone(), readiness.clone()).await?;
    let ways = firewall::Ways { own: own.clone(), dns: config.dns_addresses.clone(), in_charge: in_charge.clone() };
    let watching_rules = owned(firewall::look(ways, datapath.clone(), index.clone()));
    let _once = sources.set(Sources {
        datapath,
        report,
        leases,
        index: index.clone(),
        node: parsed.node.clone(),
        carry: config.carry_socket(),
        announced: announcing_balancers.announced(),
        book,
        carried,
        paths,
        pulse,
    });
    let clean = owned(forget_when_ready(config.clone(), readiness.clone()));
    let noting = owned(last_ready::keep(config.run_dir.clone(), readiness.clone()));
    let was_ready = readiness.clone();
    let in_kube_proxys_place =
        config.kube_proxy_health.then(|| proxy_health::serve_when_in_charge(in_charge, readiness, going));

    let outcome = tokio::select! {
        () = shutdown.cancelled() => Ok(Ended::Told),
        ended = &mut loop_task => match ended {
            Ok(Stopped::NodeChanged) => Ok(Ended::NodeChanged),
            ended => Err(anyhow::anyhow!("the reconcile loop ended: {ended:?}")),
        },
        () = config_changed => Ok(Ended::ConfigChanged),
        () = cni.ended() => Err(anyhow::anyhow!("the CNI server ended")),
        Some(ended) = watches.join_next() => Err(anyhow::anyhow!("a watch ended: {ended:?}")),
    };
    last_ready::note(&config.run_dir, &was_ready);
    // Requests in work end first; nothing that they made is lost if they do not.
    tokio::join!(cni.drain(Duration::from_secs(5)), announcing_balancers.drain());
    if !loop_task.is_finished() {
        loop_task.abort();
        // Its turn ends first: what comes after it in this process is to find no write under way.
        let _ended_or_too_long = tokio::time::timeout(Duration::from_secs(5), &mut loop_task).await;
    }
    drop((
        status,
        telling,
        clean,
        noting,
        watching_rules,
        health,
        in_kube_proxys_place,
        announcing,
        announcing_to_flannel,
    ));
    drop((outliving, policies_in_force, named, hearing, probing));
    drop((publishing, recalling, keeping, service_status, observed, refusing, telling_who_announces));
    last_known.keep_now(index).await;
    // Told to end while it was about to start anew: it ends.
    match outcome {
        Ok(_) if shutdown.is_cancelled() => Ok(Ended::Told),
        outcome => outcome,
    }
}

/// The node's data path, as an earlier agent left it or anew.
async fn open_datapath(
    config: &AgentConfig,
    parsed: &Parsed,
    own: &OwnNode,
    ranges: &Ranges,
    non_masquerade: &NonMasquerade,
    leases: &LeaseStore,
) -> Result<Datapath> {
    let settings = NodeSettings {
        service_cidrs: ranges.in_force().to_vec(),
        non_masquerade_cidrs: non_masquerade.in_force(),
        ..settings::node_settings(config, parsed, own)
    };
    let datapath = Datapath::open(DatapathConfig {
        settings,
        bpffs: config.bpffs.clone(),
        cgroup: config.cgroup.as_deref().map(settings::cgroup2).transpose()?,
        state_dir: config.run_dir.join("pods"),
        remembered: leases.attached(),
        uplink: config.uplink.clone(),
        devices: config.devices.clone(),
        acceleration: config.service_acceleration,
        limits: settings::limits(&config.limits),
    });
    datapath.await.context("could not open the data path")
}

/// The ranges of Services as the run before knew them, unless they touch this node's own by now.
fn ranges_at_start(config: &AgentConfig, parsed: &Parsed, own: &OwnNode, index: &SharedIndex) -> Ranges {
    let index = read(index);
    let cluster: Vec<IpNet> = parsed.ranges.cluster_cidrs.iter().chain(&own.pod_cidrs).copied().collect();
    let addresses: Vec<IpAddr> = own.addresses.iter().chain(&config.dns_addresses).copied().collect();
    let own = Own { world: index.world(), cluster: &cluster, dns: &addresses };
    Ranges::at_start(&config.state_dir, &parsed.ranges.service_cidrs, &own)
}

/// A task that is cancelled when its handle is dropped.
fn owned(task: impl Future<Output = ()> + Send + 'static) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(task))
}

/// What an earlier agent of this node failed with no longer holds when this one is ready.
async fn forget_when_ready(config: AgentConfig, mut readiness: channel::Receiver<Readiness>) {
    if readiness.wait_for(|state| *state == Readiness::Ready).await.is_ok() {
        failure::forget(&config);
    }
}

/// The index to read. A poisoned lock still holds a whole index: updates replace single entries.
pub(crate) fn read(index: &SharedIndex) -> std::sync::RwLockReadGuard<'_, Index> {
    index.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The index to change.
pub(crate) fn write(index: &SharedIndex) -> std::sync::RwLockWriteGuard<'_, Index> {
    index.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}
