//! The status socket: one JSON document ([`AgentStatus`]) to whoever connects, then the end. Root only.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::Result;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use towpath_datapath::bpf::Count;
use towpath_datapath::{Datapath, NodeStatus};
use towpath_model::NodeName;
use towpath_model::custom::BackendName;
use towpath_model::desired::{NodePeer, Reach};
use towpath_plan::backend::{self, Able, Behind, Says};
use towpath_wire::config::AgentConfig;
use towpath_wire::status::{AgentStatus, PathStatus, PeerStatus};

use crate::SharedIndex;
use crate::announce::local_network::Announced;
use crate::cni_server::Readiness;
use crate::ipam::LeaseStore;
use crate::json_socket;
use crate::names::book::SharedBook;
use crate::paths::{Paths, SmallPath};
use crate::pulse::Pulse;
use crate::reconcile::{SharedReport, ways_to};
use crate::udp::Carried;

/// What the status and the metrics are made of, once the data path is open.
pub struct Sources {
    /// The kernel's side.
    pub datapath: Datapath,
    /// The loop's.
    pub report: SharedReport,
    /// The node's leases.
    pub leases: Arc<LeaseStore>,
    /// What the API server says.
    pub index: SharedIndex,
    /// This node.
    pub node: NodeName,
    /// Where the DNS server answers what it counted.
    pub carry: PathBuf,
    /// Addresses of load balancers that this node announces.
    pub announced: Announced,
    /// What domain names of policies stand for.
    pub book: SharedBook,
    /// Whether packets are carried by way of user space.
    pub carried: watch::Receiver<Carried>,
    /// Which paths to other nodes carry less than they have to.
    pub paths: watch::Receiver<Paths>,
    /// Turns of the loop.
    pub pulse: Pulse,
}

impl std::fmt::Debug for Sources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sources").field("carry", &self.carry).finish_non_exhaustive()
    }
}

/// Set when there are some.
pub type SharedSources = Arc<OnceLock<Sources>>;

/// Serves the socket, from the first moment of the process on, until the handle is dropped.
///
/// # Errors
/// The socket cannot be made.
pub fn serve(
    config: &AgentConfig,
    node: &NodeName,
    sources: SharedSources,
    readiness: watch::Receiver<Readiness>,
) -> Result<AbortOnDropHandle<()>> {
    let node = node.to_string();
    json_socket::serve(&config.status_socket(), move || {
        let (node, sources, readiness) = (node.clone(), sources.clone(), readiness.clone());
        async move { collect(&node, &sources, &readiness).await }
    })
}

/// Who asks for the status asks because something is wrong: it is answered though the data path is not.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is not done of other DNS servers' configuration: of interest before a hand-over, too.
fn dns_hints(left_out: &[String]) -> impl Iterator<Item = String> {
    left_out.iter().map(|line| format!("DNS: not done when Towpath answers: {line}"))
}

/// The state of this agent now; what can be said of it without the data path where that is at something else for long.
pub async fn collect(node: &str, sources: &SharedSources, readiness: &watch::Receiver<Readiness>) -> AgentStatus {
    let within = tokio::time::timeout(PATIENCE, collect_all(node, sources, readiness)).await;
    within.unwrap_or_else(|_| {
        let busy = sources.get().and_then(|sources| sources.datapath.busy_for()).unwrap_or_default();
        let problem = format!(
            "the data path does not answer: it has been at one call for {} s; if that goes on, see the agent's log and `ps -eLo pid,stat,wchan,comm`",
            busy.as_secs()
        );
        AgentStatus {
            node: node.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ready: *readiness.borrow() == Readiness::Ready,
            problems: vec![problem],
            ..AgentStatus::default()
        }
    })
}

async fn collect_all(node: &str, sources: &SharedSources, readiness: &watch::Receiver<Readiness>) -> AgentStatus {
    match sources.get() {
        Some(sources) => {
            let said = crate::read(&sources.index).backends().clone();
            let mut status = AgentStatus {
                announced: sources.announced.addresses().into_iter().collect(),
                pod_ranges: sources.leases.range_use(),
                ..collected(node, &sources.datapath, &sources.report, readiness, &said).await
            };
            let paths = sources.paths.borrow().clone().unwrap_or_default();
            status.problems.extend(paths.iter().map(SmallPath::in_words));
            status.small_paths = paths
                .into_iter()
                .map(|path| PathStatus {
                    node: path.node,
                    address: Some(path.address),
                    carries: path.carries,
                    needed: path.needed,
                })
                .collect();
            tell_of_udp(&sources.carried.borrow(), &mut status);
            status
        }
        None => AgentStatus {
            node: node.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            problems: match &*readiness.borrow() {
                Readiness::Starting(why) => vec![why.clone()],
                Readiness::Ready => Vec::new(),
            },
            ..AgentStatus::default()
        },
    }
}

async fn collected(
    node: &str,
    datapath: &Datapath,
    report: &SharedReport,
    readiness: &watch::Receiver<Readiness>,
    said: &BTreeMap<NodeName, Says>,
) -> AgentStatus {
    let report = report.read().unwrap_or_else(PoisonError::into_inner).clone();
    let mut problems: Vec<String> = Vec::new();
    let ready = match &*readiness.borrow() {
        Readiness::Ready => true,
        Readiness::Starting(why) => {
            problems.push(why.clone());
            false
        }
    };
    if report.recalled {
        problems.push("the API server has not said all of the cluster since this agent started: of the rest it goes on with what an earlier run knew".to_owned());
    }
    problems.extend(report.failures.iter().map(|(what, why)| format!("{what}: {why}")));
    problems.extend(report.refused.iter().flat_map(|(n, why)| why.iter().map(move |w| format!("node {n}: {w}"))));
    let ranges = report.refused_ranges.iter();
    problems.extend(ranges.flat_map(|(name, why)| why.iter().map(move |w| format!("ServiceCIDR {name}: {w}"))));
    problems.extend(report.refused_services.iter().chain(&report.misread_pods).map(ToString::to_string));
    problems.extend(report.misread_bandwidth.iter().map(ToString::to_string));
    problems.extend(report.misread_policies.iter().chain(&report.aside).map(ToString::to_string));
    problems.extend(report.unenforced.iter().cloned());
    problems.extend(report.no_udp.clone());
    problems.extend(report.in_charge.problems());
    problems.extend(report.remains.in_words());
    problems.extend(report.preferred.iter().map(|name| {
        format!("the container runtime takes CNI configuration {name} before ours: remove it, and pods get their network from Towpath")
    }));
    problems.extend(crate::counts::notes());
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let mut status = AgentStatus {
        node: node.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ready,
        backend: report.backend.as_str().to_owned(),
        service_proxy: report.in_charge.in_charge.map_or_else(String::new, |who| who.proxy.name().to_owned()),
        dns: report.in_charge.in_charge.map_or_else(String::new, |who| who.dns.name().to_owned()),
        hints: report.in_charge.hints().into_iter().chain(dns_hints(&report.dns_left_out)).collect(),
        peers: report
            .peers
            .iter()
            .filter(|p| !p.local)
            .map(|p| PeerStatus {
                node: p.name.to_string(),
                tunnel: Some(p.tunnel),
                pod_cidrs: p.pod_cidrs.iter().map(ToString::to_string).collect(),
                backend: BackendName::Vxlan.as_str().to_owned(),
                why: None,
                network: p.flannel.filter(|flannel| !flannel.taken_over).map(|_| "flannel".to_owned()),
            })
            .collect(),
        service_ranges: report.service_ranges.iter().map(ToString::to_string).collect(),
        frontends: count(report.frontends),
        host_ports: count(report.host_ports),
        translated_at_device: report.at_device,
        backends: count(report.backends),
        policies: count(report.policy.policies),
        policy_sets: count(report.policy.sets),
        classes: count(report.policy.classes),
        class_entries: count(report.policy.set_classes),
        rules: count(report.policy.rows),
        audited: report.audited,
        pods_of_predecessor: report.remains.names().into_iter().map(ToString::to_string).collect(),
        addresses_of_predecessor: report.remains.pods.iter().map(|(at, pod)| (*at, pod.to_string())).collect(),
        flannel_here: report.remains.flannel_here,
        ..AgentStatus::default()
    };
    match datapath.status().await {
        Ok(kernel) => {
            status.pods = count(kernel.pods);
            status.pod_mtu = kernel.facts.pod_mtu;
            status.limited = kernel.limited.iter().map(|(pod, limits)| format!("{pod} ({limits})")).collect();
            status.hints.extend(ways(report.backend, &report.peers, &mut status.peers, &kernel, said));
            problems.extend(kernel.problems);
            status.hints.extend(report.mtu_problems);
            status.hints.extend(report.bandwidth_problems);
            status.hints.extend(kernel.released.lost);
            status.hints.extend(kernel.acceleration_notes);
        }
        Err(error) => problems.push(error.to_string()),
    }
    match datapath.counters().await {
        Ok(counters) => {
            let name = |count: &Count| match count.reason.is_drop() {
                true => format!("drop.{}", count.reason.name()),
                false => count.reason.name().to_owned(),
            };
            status.counters = counters.iter().map(|count| (name(count), count.packets)).collect();
        }
        Err(error) => problems.push(error.to_string()),
    }
    match datapath.usage().await {
        Ok(maps) => {
            let tracked = maps.iter().find(|map| map.map == "tp_ct");
            status.connections = tracked.map_or(0, |map| count(map.entries));
            for map in
                maps.iter().filter(|map| map.entries.saturating_mul(10) >= (map.limit as usize).saturating_mul(9))
            {
                problems.push(format!("map {} holds {} of {} entries", map.map, map.entries, map.limit));
            }
        }
        Err(error) => problems.push(error.to_string()),
    }
    match datapath.held().await {
        Ok(held) => problems.extend(held.holders.iter().filter(|holder| holder.full).map(|holder| {
            format!(
                "{} has {} connections and may have no more while all have {} of {}: what it opens now takes the place of \
                 what nobody answered, or is refused (drop.ct_budget)",
                holder.name(),
                holder.held,
                held.all,
                held.room
            )
        })),
        Err(error) => problems.push(error.to_string()),
    }
    status.problems = problems;
    status
}
/// What user space counts of the packets that it carries, or why it carries none.
fn tell_of_udp(carried: &Carried, status: &mut AgentStatus) {
    match carried {
        Carried::Unknown => {}
        Carried::No(why) if status.backend == BackendName::Udp.as_str() => status.problems.push(why.clone()),
        Carried::No(why) => status.hints.push(why.clone()),
        Carried::Yes { counters, .. } => {
            status.counters.extend(counters.named().map(|(name, count)| (format!("udp.{name}"), count)));
        }
    }
}

/// Names the backend by which each peer is reached, and why it is not the one that is wanted.
fn ways(
    wanted: BackendName,
    known: &[NodePeer],
    peers: &mut [PeerStatus],
    kernel: &NodeStatus,
    said: &BTreeMap<NodeName, Says>,
) -> Vec<String> {
    for peer in &mut *peers {
        let reach = kernel.reached.get(&NodeName::new(&peer.node)).copied().unwrap_or(Reach::Tunnel);
        peer.backend = backend::of_way(reach).as_str().to_owned();
    }
    let able = Able { ipip: true, udp: true, macs: kernel.facts.bears_macs };
    let behind = backend::behind(wanted, able, ways_to(known, kernel), said);
    for peer in &mut *peers {
        let found = behind.iter().find(|behind| behind.node.as_str() == peer.node);
        peer.why = found.map(|behind| behind.why.reason().to_owned());
    }
    let in_words = |Behind { node, by, why }: &Behind| {
        let (by, wanted) = (by.as_str(), wanted.as_str());
        format!("packets to the pods of node {node} go by {by}, not {wanted}: it {}", why.in_words())
    };
    behind.iter().map(in_words).collect()
}
