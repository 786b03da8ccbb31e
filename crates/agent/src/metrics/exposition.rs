//! The metrics of a node. Names follow Prometheus' conventions: base units, `_total` for what only rises, a label where a sum makes
//! sense. `docs/operations.md` says what each is for.

use std::fmt;
use std::sync::PoisonError;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Result;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry, Unit};
use tokio::sync::watch;
use towpath_plan::ipam::Usage;
use towpath_wire::dns::{DURATIONS, DnsCounters, RCODES};
use towpath_wire::status::AuditedPolicy;

use crate::cni_server::Readiness;
use crate::counts::{self, Labels};
use crate::index::Kind;
use crate::status::Sources;
use crate::udp::Carried;

use super::kube_proxy;

/// The DNS server gets so long to say what it counted.
const PATIENCE: Duration = Duration::from_secs(1);

/// A registry that is filled and read once.
struct Page(Registry);

fn number(value: impl TryInto<i64>) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}

fn label(name: &'static str, value: impl ToString) -> Labels {
    vec![(name, value.to_string())]
}

impl Page {
    fn gauge(&mut self, name: &str, help: &str, value: impl TryInto<i64>) {
        let gauge = Gauge::<i64>::default();
        gauge.set(number(value));
        self.0.register(name, help, gauge);
    }

    fn gauges<N: TryInto<i64>>(&mut self, name: &str, help: &str, values: impl IntoIterator<Item = (Labels, N)>) {
        let family = Family::<Labels, Gauge>::default();
        for (labels, value) in values {
            family.get_or_create(&labels).set(number(value));
        }
        self.0.register(name, help, family);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        let counter = Counter::<u64>::default();
        counter.inc_by(value);
        self.0.register(name, help, counter);
    }

    fn counters(&mut self, name: &str, help: &str, values: impl IntoIterator<Item = (Labels, u64)>) {
        let family = Family::<Labels, Counter>::default();
        for (labels, value) in values {
            family.get_or_create(&labels).inc_by(value);
        }
        self.0.register(name, help, family);
    }

    fn seconds(&mut self, name: &str, help: &str, metric: impl Metric) {
        self.0.register_with_unit(name, help, Unit::Seconds, metric);
    }
}

/// All metrics now.
pub(super) async fn text(sources: &Sources, readiness: &watch::Receiver<Readiness>) -> Result<String> {
    let mut page = Page(Registry::with_prefix("towpath"));
    let ready = *readiness.borrow() == Readiness::Ready;
    page.gauge("ready", "Whether the first full sync is in the kernel", u32::from(ready));
    let version = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
    page.0.register("build", "Version of the agent", version);
    at_least_zero();
    sync(&mut page, sources);
    requests(&mut page, sources);
    names(&mut page, sources);
    kernel(&mut page, sources).await?;
    dns(&mut page, sources).await;
    let mut out = String::new();
    encode_registry(&mut out, &page.0)?;
    encode_registry(&mut out, &kube_proxy::registry(sources).await?)?;
    encode_eof(&mut out)?;
    Ok(out)
}

/// What has not happened yet counts 0: what is not there at all has no rate.
fn at_least_zero() {
    for kind in Kind::ALL {
        let _there = counts::WATCH_ERRORS.get_or_create(&label("kind", format!("{kind:?}")));
    }
    for verb in ["ADD", "DEL"] {
        let _there = counts::CNI_DURATION.get_or_create(&label("verb", verb));
        for outcome in counts::Outcome::ALL {
            let labels = vec![("verb", verb.to_owned()), ("outcome", outcome.label().to_owned())];
            let _there = counts::CNI_REQUESTS.get_or_create(&labels);
        }
    }
}

/// How large policy is.
fn policy(page: &mut Page, size: &towpath_policy::compile::Counts) {
    page.gauge("policies", "Policies that isolate a pod of this node, or have a rule for one", size.policies);
    page.gauge("policy_sets", "Sets of rules that pods of this node share", size.sets);
    page.gauge("policy_classes", "Address classes in the kernel", size.classes);
    page.gauge("policy_class_entries", "Classes as sets see them, in the kernel", size.set_classes);
    page.gauge("policy_rules", "Rule rows in the kernel", size.rows);
    page.gauge("policy_addresses", "Addresses of pods that have a class of their own in the kernel", size.addresses);
    page.gauge("policy_ranges", "Address ranges that have a class in the kernel", size.ranges);
    page.seconds(
        "policy_compile_duration",
        "Time to compile what changed of policies",
        counts::COMPILE_DURATION.clone(),
    );
    page.seconds(
        "policy_check_duration",
        "Time to check what was compiled against the policies",
        counts::CHECK_DURATION.clone(),
    );
    page.counter(
        "policy_translation_mismatches",
        "Times that what was compiled did not say what the policies say, and was not enforced: never, or there is a fault",
        counts::MISMATCHES.get(),
    );
    page.counter(
        "policy_missed_changes",
        "Times that a look at everything found what following changes had missed: never, or there is a fault",
        counts::MISSED_CHANGES.get(),
    );
}

/// What policies that are only audited would have done.
fn audits(page: &mut Page, audited: &[AuditedPolicy]) {
    page.gauge("policies_audited", "Policies that are only audited and concern pods of this node", audited.len());
    let would_deny = audited.iter().flat_map(|audited| {
        ["Ingress", "Egress"].map(|direction| {
            let of = audited.denials.iter().filter(|denial| denial.direction == direction);
            let labels = vec![("policy", audited.policy.clone()), ("direction", direction.to_lowercase())];
            (labels, of.map(|denial| denial.connections).fold(0, u64::saturating_add))
        })
    });
    page.counters(
        "policy_audit_denied_connections",
        "Connections that passed and that a policy which is only audited would have denied",
        would_deny,
    );
}

/// What the API server says and what became of it.
fn sync(page: &mut Page, sources: &Sources) {
    let report = sources.report.read().unwrap_or_else(PoisonError::into_inner).clone();
    let peers = report.peers.iter().filter(|peer| !peer.local).count();
    page.gauge("peers", "Other nodes that can be reached", peers);
    let refused: usize = report.refused.values().map(Vec::len).sum();
    page.gauge("peers_refused", "Nodes or their ranges that are left out because they contradict others", refused);
    page.gauge("service_frontends", "Service addresses and ports in the kernel", report.frontends);
    page.gauge("service_backends", "Service backends in the kernel", report.backends);
    page.gauge(
        "services_refused",
        "Services and host ports that do not get what they ask for",
        report.refused_services.len(),
    );
    page.gauge(
        "lb_announced_addresses",
        "Addresses of load balancers that this node announces to the network outside",
        sources.announced.addresses().len(),
    );
    policy(page, &report.policy);
    audits(page, &report.audited);
    page.gauge(
        "policies_aside",
        "Policies that are closed here because there is no room for their rules",
        report.aside.len(),
    );
    page.gauge("applies_failing", "Parts whose newest version could not be applied", report.failures.len());
    page.counter("plans", "How often something was planned", report.plans);
    page.counter("apply_failures", "How often something planned could not be applied", report.failed);
    page.gauge(
        "foreign_cni_configurations",
        "CNI configurations that the container runtime takes before ours",
        report.preferred.len(),
    );
    page.seconds("apply_duration", "Time to plan and apply what changed, by part", counts::APPLY_DURATION.clone());
    page.0.register(
        "watch_errors",
        "Watches of the API server that were interrupted, by kind",
        counts::WATCH_ERRORS.clone(),
    );
    let heard = Family::<Labels, Gauge<f64, std::sync::atomic::AtomicU64>>::default();
    for (kind, watch) in counts::watches() {
        if let Some(since) = watch.heard.and_then(|at| at.duration_since(UNIX_EPOCH).ok()) {
            heard.get_or_create(&label("kind", format!("{kind:?}"))).set(since.as_secs_f64());
        }
    }
    page.seconds(
        "watch_last_event_timestamp",
        "When the API server last said something of a kind, in Unix time",
        heard,
    );
}

/// What domain names of policies stand for.
fn names(page: &mut Page, sources: &Sources) {
    let book = sources.book.read().unwrap_or_else(PoisonError::into_inner);
    let counts = book.counts();
    page.gauge("names_asked", "Domain names that policies ask for", book.patterns().len());
    page.gauge("names_addresses", "Pairs of a name and an address that policies accept now", book.learned().len());
    page.counter("names_learned", "Pairs of a name and an address that DNS answers taught", counts.learned);
    page.counter("names_refused", "Addresses in DNS answers that no name can stand for", counts.refused);
    page.counter("names_evicted", "Pairs that made room for others before their time was over", counts.evicted);
    page.counter("names_forgotten", "Pairs whose time was over", counts.forgotten);
}

/// CNI requests and the addresses they take.
fn requests(page: &mut Page, sources: &Sources) {
    page.0.register("cni_requests", "CNI requests, by verb and outcome", counts::CNI_REQUESTS.clone());
    page.seconds("cni_duration", "Time to answer a CNI request, by verb", counts::CNI_DURATION.clone());
    let usage = sources.leases.usage();
    let of = |value: fn(&Usage) -> u128| {
        let labels = |u: &Usage| {
            let family = if u.range.addr().is_ipv4() { "ipv4" } else { "ipv6" };
            vec![("range", u.range.to_string()), ("family", family.to_owned())]
        };
        let values: Vec<(Labels, u128)> = usage.iter().map(|u| (labels(u), value(u))).collect();
        values
    };
    // One that gives no more has no room: of a node's family it must not look like some.
    let can_have = |u: &Usage| if u.closed { u.taken } else { u.size };
    page.gauges("addresses_taken", "Addresses of the node's pod ranges that are taken or at rest", of(|u| u.taken));
    page.gauges("addresses", "Addresses of the node's pod ranges that pods can have", of(can_have));
}

/// What the kernel holds and has done.
async fn kernel(page: &mut Page, sources: &Sources) -> Result<()> {
    let datapath = &sources.datapath;
    let status = datapath.status().await?;
    page.gauge("pods", "Pods of this node that have a device", status.pods);
    page.counter(
        "udp_sockets_released",
        "Connected UDP sockets that were ended because their backend left the Service",
        status.released.sockets,
    );
    page.counter(
        "udp_translations_released",
        "Translations of UDP flows that were deleted because their backend left the Service",
        status.released.translations,
    );
    page.gauge("pod_mtu_bytes", "MTU of new pods' devices", status.facts.pod_mtu);
    let paths = sources.paths.borrow().clone().unwrap_or_default();
    page.gauge("paths_too_small", "Paths to other nodes that carry less than they have to", paths.len());
    let carries = |path: &crate::paths::SmallPath| {
        (vec![("node", path.node.clone()), ("address", path.address.to_string())], path.carries)
    };
    page.gauges("path_mtu_bytes", "What such a path carries, in bytes", paths.iter().map(carries));
    let carried = match &*sources.carried.borrow() {
        Carried::Yes { counters, .. } => counters.named().to_vec(),
        Carried::No(_) | Carried::Unknown => Vec::new(),
    };
    page.counters(
        "udp_packets",
        "Packets by way of user space (the backend udp), by what became of them",
        carried.into_iter().map(|(name, count)| (label("outcome", name), count)),
    );
    let counters = datapath.counters().await?;
    let (drops, rest): (Vec<_>, Vec<_>) = counters.into_iter().partition(|count| count.reason.is_drop());
    page.counters(
        "packets",
        "Packets that went on, by the way they took",
        rest.iter().map(|c| (label("path", c.reason.name()), c.packets)),
    );
    page.counters(
        "bytes",
        "Bytes that went on, link header included",
        rest.iter().map(|c| (label("path", c.reason.name()), c.bytes)),
    );
    page.counters(
        "drop_packets",
        "Packets dropped, by reason",
        drops.iter().map(|c| (label("reason", c.reason.name()), c.packets)),
    );
    page.counters(
        "drop_bytes",
        "Bytes dropped, by reason",
        drops.iter().map(|c| (label("reason", c.reason.name()), c.bytes)),
    );
    let maps = datapath.usage().await?;
    page.gauges("map_entries", "Entries of a kernel table", maps.iter().map(|m| (label("map", m.map), m.entries)));
    page.gauges(
        "map_limit",
        "Entries that a kernel table may hold",
        maps.iter().map(|m| (label("map", m.map), m.limit)),
    );
    let held = datapath.held().await?;
    page.gauge("connections", "Tracked connections", held.all);
    page.gauge("connections_room", "While fewer are tracked, a pod may have more than its share", held.room);
    page.gauge("connections_share", "Connections that each pod may have whatever others have", held.share);
    let full = held.holders.iter().filter(|holder| holder.full).count();
    page.gauge("connection_holders_full", "Pods that may have no more connections now", full);
    Ok(())
}

/// What the DNS server of this node counted; nothing when it does not answer.
async fn dns(page: &mut Page, sources: &Sources) {
    let asked = tokio::time::timeout(PATIENCE, towpath_carry::feed::counters(&sources.carry)).await;
    let counted = asked.ok().and_then(Result::ok);
    page.gauge("dns_up", "Whether the DNS server of this node answers its agent", u32::from(counted.is_some()));
    let c = counted.unwrap_or_default();
    page.counters(
        "dns_queries",
        "DNS queries, by transport",
        [(label("transport", "udp"), c.udp_queries), (label("transport", "tcp"), c.tcp_queries)],
    );
    let from = |name: &str| label("source", name);
    page.counters(
        "dns_answers",
        "DNS answers, by where they come from",
        [
            (from("cluster"), c.cluster_answers),
            (from("cache"), c.cache_hits),
            (from("upstream"), c.forwarded),
            (from("joined"), c.joined),
            (from("stale"), c.stale_answers),
        ],
    );
    let codes = RCODES.iter().zip(c.rcodes).map(|(name, count)| (label("rcode", name), count));
    page.counters("dns_responses", "DNS responses sent, by response code", codes);
    page.counter("dns_upstream_failures", "DNS queries that no upstream server answered", c.upstream_failures);
    page.counter("dns_overloaded", "DNS queries turned away because too many were under way", c.overloaded);
    page.counters(
        "dns_over_share",
        "DNS queries turned away because their client, or the servers to be asked, had their share of what may be under way",
        [(label("of", "client"), c.clients_over_share), (label("of", "servers"), c.servers_over_share)],
    );
    page.counter("dns_malformed", "DNS messages that were no query", c.malformed);
    page.counter("dns_truncated", "DNS answers truncated for UDP", c.truncated);
    page.counter("dns_names_told", "DNS answers told to the agent because policies ask for their names", c.names_told);
    page.counter("dns_names_held", "DNS answers that waited until the kernel had their addresses", c.names_held);
    let waited = Counter::<f64, std::sync::atomic::AtomicU64>::default();
    waited.inc_by(Duration::from_micros(c.names_held_micros).as_secs_f64());
    page.seconds("dns_names_waited", "Time that DNS answers waited until the kernel had their addresses", waited);
    page.counter("dns_names_late", "DNS answers that left before the kernel had their addresses", c.names_late);
    page.counter(
        "dns_names_unheard",
        "DNS answers that policies ask for, given while no agent listened",
        c.names_unheard,
    );
    page.gauge("dns_cached_answers", "Upstream answers in the cache", c.cached);
    page.gauge("dns_cached_bytes", "Size of the cache", c.cached_bytes);
    let took = upstream_durations(&c);
    page.seconds("dns_upstream_duration", "Time to answer a DNS query that upstream servers were asked for", took);
}

/// A histogram whose buckets somebody else counted.
#[derive(Debug)]
struct Counted {
    sum: f64,
    /// End and count of each, not cumulative.
    buckets: Vec<(f64, u64)>,
}

impl EncodeMetric for Counted {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let count = self.buckets.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<Labels>(self.sum, count, &self.buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

fn upstream_durations(counters: &DnsCounters) -> Counted {
    let ends = DURATIONS.into_iter().chain([f64::MAX]);
    let sum = Duration::from_micros(counters.durations_micros).as_secs_f64();
    Counted { sum, buckets: ends.zip(counters.durations).collect() }
}
