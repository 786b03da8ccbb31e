//! Ranges and addresses as objects (KEP-1880): `ServiceCIDR`s say where addresses are taken from, an `IPAddress` says whose each is.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::ranges::AddressRange;
use crate::meta;
use crate::server::Core;
use crate::store::{Expect, Key, WriteRefused};

const GROUP: &str = "networking.k8s.io";
const MANAGED_BY: &str = "ipaddress.kubernetes.io/managed-by";
const ALLOCATOR: &str = "ipallocator.k8s.io";

/// Where new addresses come from: the ranges of every `ServiceCIDR` that is not being deleted; without any, `configured`. Those of the
/// object `kubernetes`, the cluster's first, come first.
pub(super) fn ranges(core: &Core, configured: &[AddressRange]) -> Vec<AddressRange> {
    let (stored, _) = core.store.list(&core.storage_key(GROUP, "servicecidrs"), None);
    let mut objects: Vec<Value> = stored.iter().filter_map(|stored| stored.value().ok()).collect();
    objects.retain(|object| !meta::is_deleting(object));
    objects.sort_by_key(|object| (meta::name(object) != "kubernetes", meta::name(object).to_owned()));
    let texts = objects.iter().flat_map(|object| meta::strings(object.pointer("/spec/cidrs")));
    let ranges: Vec<AddressRange> = texts.filter_map(|text| text.parse().ok()).map(AddressRange::new).collect();
    let own = || configured.iter().map(|range| AddressRange::new(range.cidr())).collect();
    if ranges.is_empty() { own() } else { ranges }
}

/// The first object, which says what is configured.
pub(super) fn first(configured: &[IpNet]) -> Value {
    let cidrs: Vec<String> = configured.iter().map(|cidr| cidr.trunc().to_string()).collect();
    json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": cidrs}})
}

/// Whether there is an `IPAddress` of this name: also one that somebody made keeps its address from Services.
pub(super) fn is_taken(core: &Core, address: IpAddr) -> bool {
    core.store.get(&table(core), &key(address)).is_some()
}

/// Says that a Service (`namespace/name`) has an address.
pub(super) fn publish(core: &Core, address: IpAddr, owner: &str) {
    let (namespace, name) = owner.split_once('/').unwrap_or(("", owner));
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    let object = json!({
        "kind": "IPAddress", "apiVersion": "networking.k8s.io/v1",
        "metadata": {
            "name": address.to_string(), "uid": uuid::Uuid::new_v4().to_string(), "creationTimestamp": meta::now(),
            "labels": {"ipaddress.kubernetes.io/ip-family": family, MANAGED_BY: ALLOCATOR},
        },
        "spec": {"parentRef": {"group": "", "resource": "services", "namespace": namespace, "name": name}},
    });
    match core.store.put(&table(core), &key(address), object, Expect::Absent) {
        Ok(_) | Err(WriteRefused::Exists) => {}
        Err(_) => tracing::warn!(%address, service = owner, "the IPAddress of a Service could not be written"),
    }
}

/// Says that it has it no more. What others made of that name stays.
pub(super) fn withdraw(core: &Core, address: IpAddr) {
    let Some(stored) = core.store.get(&table(core), &key(address)) else { return };
    let Ok(object) = stored.value() else { return };
    let labels = object.pointer("/metadata/labels");
    if labels.and_then(|labels| labels.get(MANAGED_BY)).and_then(Value::as_str) != Some(ALLOCATOR) {
        return;
    }
    if core.store.remove(&table(core), &key(address), object, stored.version).is_err() {
        tracing::warn!(%address, "the IPAddress of a Service that is gone could not be removed: delete it");
    }
}

fn table(core: &Core) -> String {
    core.storage_key(GROUP, "ipaddresses")
}

fn key(address: IpAddr) -> Key {
    Key::new("", &address.to_string())
}
