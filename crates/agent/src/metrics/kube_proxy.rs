//! Metrics under the names that kube-proxy gives them, those that mean something here: what dashboards and alerts made for kube-proxy ask
//! for. One pass serves both address families, so `ip_family` is a label only where a family has a number of its own.

use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use towpath_model::Family as AddressFamily;
use towpath_plan::services::describe::{self, Side};

use crate::counts::{self, Labels};
use crate::index::Kind;
use crate::read;
use crate::status::Sources;

/// All of them, in a registry of their own.
pub(super) async fn registry(sources: &Sources) -> Result<Registry> {
    let mut registry = Registry::with_prefix("kubeproxy");
    let report = sources.report.read().unwrap_or_else(PoisonError::into_inner).clone();
    registry.register_with_unit(
        "network_programming_duration",
        "From a change of endpoints, as their controller dates it, to the moment that the kernel knew",
        Unit::Seconds,
        counts::NETWORK_PROGRAMMING.clone(),
    );
    registry.register_with_unit(
        "sync_proxy_rules_duration",
        "Time to plan and apply Services",
        Unit::Seconds,
        counts::SERVICES_DURATION.clone(),
    );
    let mut moment = |name: &str, help: &str, at: Option<SystemTime>| {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(at.and_then(|at| at.duration_since(UNIX_EPOCH).ok()).map_or(0.0, |since| since.as_secs_f64()));
        registry.register_with_unit(name, help, Unit::Seconds, gauge);
    };
    moment(
        "sync_proxy_rules_last_queued_timestamp",
        "When Services were last found to be due for applying, in Unix time",
        report.services_due,
    );
    moment("sync_proxy_rules_last_timestamp", "When Services were last applied, in Unix time", report.services_applied);
    changes(&mut registry, sources);
    without_local_endpoints(&mut registry, sources);
    let released = sources.datapath.status().await?.released;
    let deleted = Counter::<u64>::default();
    deleted.inc_by(released.translations);
    registry.register(
        "conntrack_reconciler_deleted_entries",
        "Translations of UDP flows that were deleted because their backend left the Service",
        deleted,
    );
    health(&mut registry);
    Ok(registry)
}

fn changes(registry: &mut Registry, sources: &Sources) {
    let index = read(&sources.index);
    for (name, help, kind) in [
        ("sync_proxy_rules_endpoint_changes", "Changes of EndpointSlices that say something new", Kind::EndpointSlice),
        ("sync_proxy_rules_service_changes", "Changes of Services that say something new", Kind::Service),
    ] {
        let counter = Counter::<u64>::default();
        counter.inc_by(index.revision(kind));
        registry.register(name, help, counter);
    }
}

/// A gauge, in spite of its name.
fn without_local_endpoints(registry: &mut Registry, sources: &Sources) {
    let found = describe::without_local_endpoints(read(&sources.index).world(), &sources.node);
    let family = Family::<Labels, Gauge>::default();
    for (side, policy) in [(Side::Internal, "internal"), (Side::External, "external")] {
        for (of, name) in [(AddressFamily::V4, "IPv4"), (AddressFamily::V6, "IPv6")] {
            let labels = vec![("ip_family", name.to_owned()), ("traffic_policy", policy.to_owned())];
            let count = found.iter().filter(|(_, s, f)| (*s, *f) == (side, of)).count();
            family.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
    registry.register(
        "sync_proxy_rules_no_local_endpoints_total",
        "Service ports with a traffic policy of Local that have endpoints, and none on this node",
        family,
    );
}

fn health(registry: &mut Registry) {
    for (path, name, help) in [
        ("healthz", "proxy_healthz", "Answers of /healthz in kube-proxy's place, by status code"),
        ("livez", "proxy_livez", "Answers of /livez in kube-proxy's place, by status code"),
    ] {
        let family = Family::<Labels, Counter>::default();
        for code in ["200", "503"] {
            let counted = counts::PROXY_HEALTH.get_or_create(&counts::health_labels(path, code)).get();
            family.get_or_create(&vec![("code", code.to_owned())]).inc_by(counted);
        }
        registry.register(name, help, family);
    }
}
