//! What a Service asks of a load balancer's address (`core/v1` `Service`, type LoadBalancer), and whose its status is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;

use crate::{Family, Invalid, Labels, NamespacedName, Protocol, TrafficPolicy, canonical};

/// `spec.loadBalancerClass` of Services that are ours; those without a class are ours, too.
pub const CLASS: &str = "towpath.dev/lb";
/// Annotation: addresses that are wanted, separated by commas, at most one a family.
pub const ADDRESSES_ANNOTATION: &str = "towpath.dev/load-balancer-ips";
/// Annotation: Services of the same text may have one address, each with its own ports.
pub const SHARING_ANNOTATION: &str = "towpath.dev/allow-shared-ip";
/// Annotation: the pool that the address is to be from.
pub const POOL_ANNOTATION: &str = "towpath.dev/address-pool";
/// Field manager of addresses that we gave: how they are told from those of another implementation, also after a restart.
pub const MANAGER: &str = "towpath-load-balancer";

/// Whether a Service of type LoadBalancer and this class is ours.
pub fn is_our_class(class: Option<&str>) -> bool {
    class.is_none_or(|class| class == CLASS)
}

/// Which addresses are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Any of a pool.
    Any,
    /// These, at most one a family.
    Addresses(BTreeSet<IpAddr>),
    /// What is written cannot be understood; why, for people.
    Unclear(String),
}

/// `spec.ipFamilyPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FamilyPolicy {
    /// One family.
    #[default]
    Single,
    /// Both if both can be had.
    PreferDual,
    /// Both, or none.
    RequireDual,
}

/// What a Service of type LoadBalancer asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadBalancerRequest {
    /// Whether its class names us: then nobody else gives it an address.
    pub explicit: bool,
    /// It is being deleted: it keeps what it has and gets nothing new.
    pub leaving: bool,
    /// `spec.ipFamilies`, the first first.
    pub families: Vec<Family>,
    /// `spec.ipFamilyPolicy`.
    pub policy: FamilyPolicy,
    /// Which addresses.
    pub wish: Wish,
    /// From which pool; none: any.
    pub pool: Option<String>,
    /// With whom it may share an address; none: with nobody.
    pub sharing_key: Option<String>,
    /// What it serves.
    pub ports: BTreeSet<(Protocol, u16)>,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// `spec.selector`.
    pub selector: BTreeMap<String, String>,
}

/// A Service, as far as addresses of load balancers are concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalancedService {
    /// Namespace and name.
    pub name: NamespacedName,
    /// `metadata.creationTimestamp` in seconds: the older one keeps what two want.
    pub created: i64,
    /// Its labels.
    pub labels: Labels,
    /// What it asks of us; none: another type, or another implementation's.
    pub request: Option<LoadBalancerRequest>,
    /// `status.loadBalancer.ingress[].ip`.
    pub standing: BTreeSet<IpAddr>,
    /// Whether what stands there was written by us.
    pub standing_is_ours: bool,
    /// Its cluster and external addresses.
    pub other_addresses: BTreeSet<IpAddr>,
}

fn addresses<'a>(texts: impl Iterator<Item = &'a String>) -> BTreeSet<IpAddr> {
    texts.filter_map(|text| text.parse::<IpAddr>().ok().map(canonical)).collect()
}

fn families(spec: &core::ServiceSpec, cluster_ips: &BTreeSet<IpAddr>) -> Vec<Family> {
    let mut families: Vec<Family> = Vec::new();
    for name in spec.ip_families.iter().flatten() {
        let family = match name.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            _ => continue,
        };
        if !families.contains(&family) {
            families.push(family);
        }
    }
    if families.is_empty() {
        families.extend(cluster_ips.iter().map(|ip| crate::family_of(*ip)));
        families.dedup();
    }
    families
}

/// The annotation, else the deprecated field.
fn wish(annotation: Option<&String>, field: Option<&String>) -> Wish {
    let Some(text) = annotation.or(field).filter(|text| !text.trim().is_empty()) else { return Wish::Any };
    let from = if annotation.is_some() { ADDRESSES_ANNOTATION } else { "spec.loadBalancerIP" };
    let mut wanted: BTreeSet<IpAddr> = BTreeSet::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        // Whoever may write an annotation may write much of it: what is shown has an end.
        let shown: String = part.chars().take(64).collect();
        let Ok(address) = part.parse::<IpAddr>().map(canonical) else {
            return Wish::Unclear(format!("{from}: {shown:?} is no address"));
        };
        if wanted.iter().any(|other| *other != address && other.is_ipv4() == address.is_ipv4()) {
            return Wish::Unclear(format!("{from}: it names two addresses of one family, and a Service gets one"));
        }
        wanted.insert(address);
    }
    Wish::Addresses(wanted)
}

/// Whether the status subresource's addresses are ours by `metadata.managedFields`.
fn written_by_us(object: &core::Service) -> bool {
    let entries = object.metadata.managed_fields.iter().flatten();
    entries.filter(|entry| entry.manager.as_deref() == Some(MANAGER)).any(|entry| {
        let fields = entry.fields_v1.as_ref().map(|fields| &fields.0);
        fields.is_some_and(|fields| fields.pointer("/f:status/f:loadBalancer/f:ingress").is_some())
    })
}

impl TryFrom<&core::Service> for BalancedService {
    type Error = Invalid;

    fn try_from(object: &core::Service) -> Result<Self, Invalid> {
        let meta = &object.metadata;
        let (Some(namespace), Some(name)) = (&meta.namespace, &meta.name) else {
            return Err(Invalid::new("Service", "metadata", "namespace or name missing"));
        };
        let name = NamespacedName::new(namespace, name);
        let spec = object.spec.clone().unwrap_or_default();
        let cluster_ips = addresses(spec.cluster_ips.iter().flatten());
        let mut other_addresses = cluster_ips.clone();
        other_addresses.extend(addresses(spec.external_ips.iter().flatten()));
        let ingress = object.status.as_ref().and_then(|s| s.load_balancer.as_ref()).and_then(|l| l.ingress.as_ref());
        let ingress = ingress.map(Vec::as_slice).unwrap_or_default();
        let class = spec.load_balancer_class.as_deref();
        let explicit = class == Some(CLASS);
        let ours = written_by_us(object);
        let foreign = !ingress.is_empty() && !ours && !explicit;
        let asks = spec.type_.as_deref() == Some("LoadBalancer") && is_our_class(class) && !foreign;
        let annotation = |key: &str| meta.annotations.as_ref().and_then(|all| all.get(key));
        let ports = spec
            .ports
            .iter()
            .flatten()
            .filter_map(|port| Some((Protocol::parse(port.protocol.as_deref())?, u16::try_from(port.port).ok()?)));
        let request = asks.then(|| LoadBalancerRequest {
            explicit,
            leaving: meta.deletion_timestamp.is_some(),
            families: families(&spec, &cluster_ips),
            policy: match spec.ip_family_policy.as_deref() {
                Some("PreferDualStack") => FamilyPolicy::PreferDual,
                Some("RequireDualStack") => FamilyPolicy::RequireDual,
                _ => FamilyPolicy::Single,
            },
            wish: wish(annotation(ADDRESSES_ANNOTATION), spec.load_balancer_ip.as_ref()),
            pool: annotation(POOL_ANNOTATION).filter(|pool| !pool.is_empty()).cloned(),
            sharing_key: annotation(SHARING_ANNOTATION).filter(|key| !key.is_empty()).cloned(),
            ports: ports.collect(),
            external_policy: match spec.external_traffic_policy.as_deref() {
                Some("Local") => TrafficPolicy::Local,
                _ => TrafficPolicy::Cluster,
            },
            selector: spec.selector.clone().unwrap_or_default(),
        });
        Ok(Self {
            created: meta.creation_timestamp.as_ref().map_or(i64::MAX, |time| time.0.as_second()),
            labels: meta.labels.clone().unwrap_or_default(),
            standing: addresses(ingress.iter().filter_map(|entry| entry.ip.as_ref())),
            standing_is_ours: ours || (explicit && !ingress.is_empty()),
            other_addresses,
            request,
            name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn service(change: impl FnOnce(&mut Value)) -> BalancedService {
        let mut object = json!({
            "metadata": {"name": "web", "namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"type": "LoadBalancer", "clusterIPs": ["10.96.0.7"], "ipFamilies": ["IPv4"], "ports": [{"port": 80}]},
            "status": {"loadBalancer": {}},
        });
        change(&mut object);
        let object: core::Service = serde_json::from_value(object).unwrap();
        BalancedService::try_from(&object).unwrap()
    }

    fn ours() -> Value {
        json!([{"manager": MANAGER, "operation": "Apply", "subresource": "status",
            "fieldsV1": {"f:status": {"f:loadBalancer": {"f:ingress": {}}}}}])
    }

    #[test]
    fn only_load_balancers_of_our_class_or_of_none_ask() {
        assert!(service(|_| {}).request.is_some_and(|request| !request.explicit));
        assert!(service(|s| s["spec"]["loadBalancerClass"] = CLASS.into()).request.unwrap().explicit);
        assert!(service(|s| s["spec"]["loadBalancerClass"] = "metallb".into()).request.is_none());
        assert!(service(|s| s["spec"]["type"] = "NodePort".into()).request.is_none());
    }

    #[test]
    fn a_status_that_another_implementation_wrote_is_not_ours() {
        let status = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}});
        let theirs = service(|s| s["status"] = status.clone());
        assert!(theirs.request.is_none() && !theirs.standing_is_ours);
        assert_eq!(theirs.standing, BTreeSet::from(["192.0.2.1".parse().unwrap()]));
        let by_name = service(|s| s["status"] = json!({"loadBalancer": {"ingress": [{"hostname": "lb.example"}]}}));
        assert!(by_name.request.is_none());
        let mine = service(|s| {
            s["status"] = status.clone();
            s["metadata"]["managedFields"] = ours();
        });
        assert!(mine.request.is_some() && mine.standing_is_ours);
        let named = service(|s| {
            s["status"] = status;
            s["spec"]["loadBalancerClass"] = CLASS.into();
        });
        assert!(named.request.is_some() && named.standing_is_ours);
    }

    #[test]
    fn wishes_are_read_from_the_annotation_and_then_from_the_field() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let field = service(|s| s["spec"]["loadBalancerIP"] = "192.0.2.9".into());
        assert_eq!(field.request.unwrap().wish, Wish::Addresses([ip("192.0.2.9")].into()));
        let both = service(|s| {
            s["spec"]["loadBalancerIP"] = "192.0.2.9".into();
            s["metadata"]["annotations"] = json!({ADDRESSES_ANNOTATION: "192.0.2.1, 2001:db8::1"});
        });
        assert_eq!(both.request.unwrap().wish, Wish::Addresses([ip("192.0.2.1"), ip("2001:db8::1")].into()));
        for (bad, why) in [("192.0.2.1,192.0.2.2", "two addresses"), ("web", "no address")] {
            let service = service(|s| s["metadata"]["annotations"] = json!({ADDRESSES_ANNOTATION: bad}));
            let Wish::Unclear(reason) = service.request.unwrap().wish else { panic!("{bad}") };
            assert!(reason.contains(why) && reason.contains(ADDRESSES_ANNOTATION), "{reason}");
        }
    }
}
