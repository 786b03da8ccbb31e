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
/// Annotation: the addresses that we gave, separated by commas. The second mark of ours: who may write a Service may take all of
/// `metadata.managedFields` away (`[{}]`), by mistake, too.
pub const ASSIGNED_ANNOTATION: &str = "towpath.dev/assigned-addresses";

/// Where `managedFields` say who wrote the addresses of a Service's status.
pub(crate) const INGRESS_FIELD: &str = "/f:status/f:loadBalancer/f:ingress";

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
    /// Whether both marks say so ([`MANAGER`], [`ASSIGNED_ANNOTATION`]); else they are to be written again.
    pub is_marked: bool,
    /// `spec.clusterIPs`.
    pub cluster_ips: BTreeSet<IpAddr>,
    /// `spec.externalIPs`, which anybody may claim who may write a Service.
    pub external_ips: BTreeSet<IpAddr>,
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

/// The annotation, else the deprecated field; what is empty says nothing.
fn wish(annotation: Option<&String>, field: Option<&String>) -> Wish {
    let says = |text: &&String| !text.trim().is_empty();
    let annotated = annotation.filter(says).map(|text| (ADDRESSES_ANNOTATION, text));
    let Some((from, text)) = annotated.or(field.filter(says).map(|text| ("spec.loadBalancerIP", text))) else {
        return Wish::Any;
    };
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
    if wanted.is_empty() {
        return Wish::Unclear(format!("{from}: it names no address"));
    }
    Wish::Addresses(wanted)
}

fn ingress(object: &core::Service) -> &[core::LoadBalancerIngress] {
    let status = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    status.and_then(|balancer| balancer.ingress.as_deref()).unwrap_or_default()
}

/// Whether the status's addresses are ours by `metadata.managedFields`.
fn is_managed_by_us(object: &core::Service) -> bool {
    let entries = object.metadata.managed_fields.iter().flatten();
    entries.filter(|entry| entry.manager.as_deref() == Some(MANAGER)).any(|entry| {
        let fields = entry.fields_v1.as_ref().map(|fields| &fields.0);
        fields.is_some_and(|fields| fields.pointer(INGRESS_FIELD).is_some())
    })
}

/// Whether [`ASSIGNED_ANNOTATION`] names what stands in the status, and nothing else stands there.
fn is_annotated_by_us(object: &core::Service) -> bool {
    let Some(text) = object.metadata.annotations.as_ref().and_then(|all| all.get(ASSIGNED_ANNOTATION)) else {
        return false;
    };
    let named: Option<BTreeSet<IpAddr>> =
        text.split(',').map(|part| part.trim().parse::<IpAddr>().map(canonical).ok()).collect();
    let ingress = ingress(object);
    ingress.iter().all(|entry| entry.ip.is_some())
        && named.is_some_and(|named| named == addresses(ingress.iter().filter_map(|entry| entry.ip.as_ref())))
}

/// Whether the addresses in a Service's status are ours: by either mark, or because its class names us, so that nobody else gives
/// it any. Those of another implementation are neither announced nor changed.
pub fn is_ours(object: &core::Service) -> bool {
    let class = object.spec.as_ref().and_then(|spec| spec.load_balancer_class.as_deref());
    class == Some(CLASS) || is_managed_by_us(object) || is_annotated_by_us(object)
}

/// What [`ASSIGNED_ANNOTATION`] says of these addresses.
pub fn assigned<'a>(addresses: impl IntoIterator<Item = &'a IpAddr>) -> String {
    addresses.into_iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

impl TryFrom<&core::Service> for BalancedService {
    type Error = Invalid;

    fn try_from(object: &core::Service) -> Result<Self, Invalid> {
        Self::read(object, false)
    }
}

impl BalancedService {
    /// From the object. `known_as_ours`: that what stands in its status is ours is known from before, whatever its marks say now.
    ///
    /// # Errors
    /// It has no name or no namespace.
    pub fn read(object: &core::Service, known_as_ours: bool) -> Result<Self, Invalid> {
        let meta = &object.metadata;
        let (Some(namespace), Some(name)) = (&meta.namespace, &meta.name) else {
            return Err(Invalid::new("Service", "metadata", "namespace or name missing"));
        };
        let name = NamespacedName::new(namespace, name);
        let spec = object.spec.clone().unwrap_or_default();
        let cluster_ips = addresses(spec.cluster_ips.iter().flatten());
        let ingress = ingress(object);
        let class = spec.load_balancer_class.as_deref();
        let explicit = class == Some(CLASS);
        let ours = known_as_ours || is_ours(object);
        let foreign = !ingress.is_empty() && !ours;
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
            standing_is_ours: ours && !ingress.is_empty(),
            is_marked: is_managed_by_us(object) && is_annotated_by_us(object),
            external_ips: addresses(spec.external_ips.iter().flatten()),
            cluster_ips,
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
    fn a_tenant_that_takes_the_managed_fields_away_does_not_make_an_address_of_ours_a_foreign_one() {
        let with = |assigned: &str, ingress: Value| {
            service(|s| {
                s["status"] = json!({"loadBalancer": {"ingress": ingress}});
                s["metadata"]["annotations"] = json!({ASSIGNED_ANNOTATION: assigned});
            })
        };
        let one_left = with("192.0.2.1, 2001:db8::1", json!([{"ip": "2001:db8::1"}, {"ip": "192.0.2.1"}]));
        assert!(
            one_left.request.is_some() && one_left.standing_is_ours && !one_left.is_marked,
            "one of the two marks is left"
        );
        for (assigned, ingress) in [
            ("192.0.2.1", json!([{"ip": "192.0.2.2"}])),
            ("192.0.2.1", json!([{"ip": "192.0.2.1"}, {"ip": "192.0.2.2"}])),
            ("192.0.2.1", json!([{"ip": "192.0.2.1"}, {"hostname": "lb.example"}])),
            ("192.0.2.1,web", json!([{"ip": "192.0.2.1"}])),
        ] {
            let theirs = with(assigned, ingress);
            assert!(theirs.request.is_none() && !theirs.standing_is_ours, "{assigned} is not all that stands there");
        }
        let marked = service(|s| {
            s["status"] = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}});
            s["metadata"] = json!({"name": "web", "namespace": "default", "managedFields": ours(),
                "annotations": {ASSIGNED_ANNOTATION: assigned(&["192.0.2.1".parse().unwrap()])}});
        });
        assert!(marked.is_marked);
        let object = json!({"metadata": {"name": "web", "namespace": "default"}, "spec": {"type": "LoadBalancer"},
            "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}});
        let bare: core::Service = serde_json::from_value(object).unwrap();
        assert!(BalancedService::read(&bare, false).unwrap().request.is_none());
        assert!(
            BalancedService::read(&bare, true).unwrap().request.is_some(),
            "who knows it from before is not fooled"
        );
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
        let empty = service(|s| {
            s["spec"]["loadBalancerIP"] = "192.0.2.9".into();
            s["metadata"]["annotations"] = json!({ADDRESSES_ANNOTATION: " "});
        });
        assert_eq!(empty.request.unwrap().wish, Wish::Addresses([ip("192.0.2.9")].into()), "nothing hides nothing");
        for (bad, why) in [
            ("192.0.2.1,192.0.2.2", "two addresses"),
            ("web", "no address"),
            (",", "names no address"),
            (" , ", "names no"),
        ] {
            let service = service(|s| s["metadata"]["annotations"] = json!({ADDRESSES_ANNOTATION: bad}));
            let Wish::Unclear(reason) = service.request.unwrap().wish else { panic!("{bad}") };
            assert!(reason.contains(why) && reason.contains(ADDRESSES_ANNOTATION), "{reason}");
        }
    }
}
