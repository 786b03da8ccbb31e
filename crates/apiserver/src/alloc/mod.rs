//! Service addresses and node ports: allocation, requested values, release.
//!
//! The rules and messages are those of `k8s.io/kubernetes/pkg/registry/core/service`. The lower part of each range is left
//! to values that people ask for, as kube-apiserver does (KEP-3070, KEP-3668). Ranges come from `ServiceCIDR` objects, and each address that
//! a Service has is an `IPAddress` object (KEP-1880).

mod families;
mod objects;
mod ranges;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::meta;
use crate::resource::{FieldError, ResourceKind};
use crate::rest::Call;
use crate::server::{Core, StartError};
use crate::status::ApiError;
use families::Family;
use ranges::{AddressRange, PortRange};

/// What is given out, and to which Service (`namespace/name`).
#[derive(Default)]
struct Taken {
    addresses: HashMap<IpAddr, String>,
    ports: HashMap<u16, String>,
}

/// The allocator of Service addresses and node ports.
pub(crate) struct ServiceAddresses {
    ranges: Vec<AddressRange>,
    ports: PortRange,
    taken: Mutex<Taken>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Item {
    Address(IpAddr),
    Port(u16),
}

/// Values taken for a write that is not made yet; they go back unless it is kept.
pub(crate) struct Reservation<'a> {
    core: &'a Core,
    owner: String,
    taken: Vec<Item>,
    released: Vec<Item>,
    kept: bool,
}

impl Reservation<'_> {
    /// The write was made: what it took stays taken, what it gave up is free.
    pub(crate) fn keep(&mut self) {
        self.kept = true;
        for item in &self.taken {
            if let Item::Address(address) = item {
                objects::publish(self.core, *address, &self.owner);
            }
        }
        for item in &self.released {
            if let Item::Address(address) = item {
                objects::withdraw(self.core, *address);
            }
        }
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let gone = if self.kept { &self.released } else { &self.taken };
        let mut taken = self.core.services.lock();
        for item in gone {
            match item {
                Item::Address(address) => taken.addresses.remove(address),
                Item::Port(port) => taken.ports.remove(port),
            };
        }
    }
}

fn shown(ranges: &[&AddressRange]) -> String {
    ranges.iter().map(|range| range.cidr().to_string()).collect::<Vec<_>>().join(", ")
}

fn is_service(kind: &ResourceKind) -> bool {
    kind.gvk.group.is_empty() && kind.plural == "services"
}

fn owner(object: &Value) -> String {
    format!("{}/{}", meta::namespace(object), meta::name(object))
}

fn items_of(service: &Value) -> Vec<Item> {
    let addresses = meta::strings(service.pointer("/spec/clusterIPs"));
    let mut items: Vec<Item> = addresses.iter().filter_map(|text| text.parse().ok()).map(Item::Address).collect();
    let ports = service.pointer("/spec/ports").and_then(Value::as_array).into_iter().flatten();
    let numbers = ports.filter_map(|port| port.get("nodePort"));
    for number in numbers.chain(service.pointer("/spec/healthCheckNodePort")) {
        let port = number.as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0);
        if let Some(port) = port.map(Item::Port)
            && !items.contains(&port)
        {
            items.push(port);
        }
    }
    items
}

fn invalid(call: &Call, service: &Value, field: String, value: String, why: &str) -> ApiError {
    let error = FieldError { reason: "FieldValueInvalid", field, message: format!("Invalid value: {value}: {why}") };
    ApiError::invalid_object(&call.kind, meta::name(service), &[error])
}

impl ServiceAddresses {
    pub(crate) fn new(config: &Config) -> Result<Self, StartError> {
        let ranges: Vec<AddressRange> = config.service_cidrs.iter().map(|cidr| AddressRange::new(*cidr)).collect();
        match ranges.as_slice() {
            [_] => {}
            [a, b] if a.family() != b.family() => {}
            _ => {
                let why = "service_cidrs must have one range, or one of each address family";
                return Err(StartError::Config(why.to_owned()));
            }
        }
        let ports = PortRange::new(config.node_port_range.clone());
        Ok(Self { ranges, ports, taken: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first address of each range: what `default/kubernetes` has.
    pub(crate) fn first_addresses(&self) -> Vec<IpAddr> {
        self.ranges.iter().filter_map(|range| range.address(1)).collect()
    }

    /// The `ServiceCIDR` that every cluster has.
    pub(crate) fn first_object(&self) -> Value {
        objects::first(&self.ranges.iter().map(AddressRange::cidr).collect::<Vec<_>>())
    }

    /// Takes what the stored Services have.
    pub(crate) fn load(&self, core: &Core) {
        let (services, _) = core.store.list(&core.storage_key("", "services"), None);
        let mut taken = self.lock();
        for service in services.iter().filter_map(|stored| stored.value().ok()) {
            for item in items_of(&service) {
                match item {
                    Item::Address(address) => {
                        objects::publish(core, address, &owner(&service));
                        taken.addresses.insert(address, owner(&service))
                    }
                    Item::Port(port) => taken.ports.insert(port, owner(&service)),
                };
            }
        }
    }

    /// Gives back what a deleted Service had.
    pub(crate) fn release(&self, core: &Core, kind: &ResourceKind, object: &Value) {
        if !is_service(kind) {
            return;
        }
        let mut taken = self.lock();
        for item in items_of(object) {
            match item {
                Item::Address(address) => {
                    objects::withdraw(core, address);
                    taken.addresses.remove(&address)
                }
                Item::Port(port) => taken.ports.remove(&port),
            };
        }
    }

    /// Fills in addresses, families and node ports of a Service and takes them. Other kinds pass.
    pub(crate) fn reserve<'a>(
        &self,
        call: &'a Call,
        service: &mut Value,
        old: Option<&Value>,
    ) -> Result<Reservation<'a>, ApiError> {
        let (core, owner) = (&*call.core, owner(service));
        let mut reservation = Reservation { core, owner, taken: Vec::new(), released: Vec::new(), kept: false };
        if !is_service(&call.kind) || !service.get("spec").is_some_and(Value::is_object) {
            return Ok(reservation);
        }
        if let Some(old) = old {
            keep_allocated(service, old);
        }
        let before = old.map(items_of).unwrap_or_default();
        self.addresses(call, service, &before, &mut reservation)?;
        self.node_ports(call, service, &before, &mut reservation)?;
        let now = items_of(service);
        reservation.released = before.into_iter().filter(|item| !now.contains(item)).collect();
        Ok(reservation)
    }

    fn addresses(
        &self,
        call: &Call,
        service: &mut Value,
        before: &[Item],
        reservation: &mut Reservation<'_>,
    ) -> Result<(), ApiError> {
        let kind = meta::text(service, "/spec/type").to_owned();
        if kind == "ExternalName" {
            let spec = meta::object_at(service, "spec");
            for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                spec.shift_remove(field);
            }
            return Ok(());
        }
        let available: Vec<Family> = self.ranges.iter().map(AddressRange::family).collect();
        families::fill(call, service, &available)?;
        if meta::text(service, "/spec/clusterIP") == "None" {
            meta::object_at(service, "spec").insert("clusterIPs".to_owned(), json!(["None"]));
            return Ok(());
        }
        let given = meta::strings(service.pointer("/spec/clusterIPs"));
        let wanted = meta::strings(service.pointer("/spec/ipFamilies"));
        let mut addresses: Vec<String> = Vec::new();
        let all = objects::ranges(&call.core, &self.ranges);
        for (index, family) in wanted.iter().enumerate() {
            let ranges: Vec<&AddressRange> = all.iter().filter(|range| range.family().name() == family).collect();
            if ranges.is_empty() {
                continue;
            }
            let text = given.get(index).map(String::as_str).unwrap_or_default();
            let address = if text.is_empty() {
                let next = |range: &&AddressRange| self.next_address(&call.core, range, &owner(service));
                ranges.iter().find_map(next).ok_or_else(|| {
                    ApiError::internal(format!("failed to allocate a serviceIP: range {} is full", shown(&ranges)))
                })?
            } else {
                match text.parse::<IpAddr>() {
                    Ok(address) if before.contains(&Item::Address(address)) => {
                        addresses.push(text.to_owned());
                        continue;
                    }
                    Ok(address) => self.take_address(call, service, &ranges, address)?,
                    // Validation names it.
                    Err(_) => {
                        addresses.push(text.to_owned());
                        continue;
                    }
                }
            };
            reservation.taken.push(Item::Address(address));
            addresses.push(address.to_string());
        }
        let spec = meta::object_at(service, "spec");
        if let Some(first) = addresses.first() {
            spec.insert("clusterIP".to_owned(), first.as_str().into());
        }
        spec.insert("clusterIPs".to_owned(), addresses.into());
        Ok(())
    }

    fn next_address(&self, core: &Core, range: &AddressRange, owner: &str) -> Option<IpAddr> {
        let mut taken = self.lock();
        let free = |address: &IpAddr| !taken.addresses.contains_key(address) && !objects::is_taken(core, *address);
        let address = range.candidates().find(free)?;
        taken.addresses.insert(address, owner.to_owned());
        Some(address)
    }

    fn take_address(
        &self,
        call: &Call,
        service: &Value,
        ranges: &[&AddressRange],
        address: IpAddr,
    ) -> Result<IpAddr, ApiError> {
        let refuse = |why: &str| {
            let value = format!("[]string{{{:?}}}", address.to_string());
            let why = format!("failed to allocate IP {address}: {why}");
            Err(invalid(call, service, "spec.clusterIPs".to_owned(), value, &why))
        };
        if !ranges.iter().any(|range| range.holds(address)) {
            let cidr = shown(ranges);
            return refuse(&format!(
                "the provided IP ({address}) is not in the valid range. The range of valid IPs is {cidr}"
            ));
        }
        let mut taken = self.lock();
        if taken.addresses.contains_key(&address) || objects::is_taken(&call.core, address) {
            return refuse("provided IP is already allocated");
        }
        taken.addresses.insert(address, owner(service));
        Ok(address)
    }

    fn node_ports(
        &self,
        call: &Call,
        service: &mut Value,
        before: &[Item],
        reservation: &mut Reservation<'_>,
    ) -> Result<(), ApiError> {
        let kind = meta::text(service, "/spec/type").to_owned();
        let allocates = service.pointer("/spec/allocateLoadBalancerNodePorts").and_then(Value::as_bool);
        let wants = kind == "NodePort" || kind == "LoadBalancer" && allocates.unwrap_or(true);
        let who = owner(service);
        let snapshot = service.clone();
        let mut own: Vec<(u16, String)> = Vec::new();
        let ports = service.pointer_mut("/spec/ports").and_then(Value::as_array_mut);
        for (index, port) in ports.into_iter().flatten().filter(|port| port.is_object()).enumerate() {
            let protocol = meta::text(port, "/protocol").to_owned();
            let number = port.get("nodePort").and_then(Value::as_u64).unwrap_or(0);
            let number = u16::try_from(number).unwrap_or(0);
            if number == 0 {
                if wants {
                    let port_number = self
                        .next_port(&who)
                        .ok_or_else(|| ApiError::internal("failed to allocate a nodePort: range is full"))?;
                    reservation.taken.push(Item::Port(port_number));
                    own.push((port_number, protocol));
                    meta::as_map(port).insert("nodePort".to_owned(), port_number.into());
                }
                continue;
            }
            // One number may serve two protocols of one Service.
            let shared = own.iter().any(|(have, other)| *have == number && *other != protocol);
            if !shared && !before.contains(&Item::Port(number)) {
                let field = format!("spec.ports[{index}].nodePort");
                self.take_port(call, &snapshot, field, number)?;
                reservation.taken.push(Item::Port(number));
            }
            own.push((number, protocol));
        }
        self.health_port(call, service, &snapshot, before, reservation)
    }

    /// `healthCheckNodePort` of load balancers with local traffic policy.
    fn health_port(
        &self,
        call: &Call,
        service: &mut Value,
        snapshot: &Value,
        before: &[Item],
        reservation: &mut Reservation<'_>,
    ) -> Result<(), ApiError> {
        let wanted = meta::text(service, "/spec/type") == "LoadBalancer"
            && meta::text(service, "/spec/externalTrafficPolicy") == "Local";
        let spec = meta::object_at(service, "spec");
        let given = spec.get("healthCheckNodePort").and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok());
        match (wanted, given.filter(|port| *port != 0)) {
            (false, _) => {
                spec.shift_remove("healthCheckNodePort");
            }
            (true, Some(port)) if before.contains(&Item::Port(port)) => {}
            (true, Some(port)) => {
                self.take_port(call, snapshot, "spec.healthCheckNodePort".to_owned(), port)?;
                reservation.taken.push(Item::Port(port));
            }
            (true, None) => {
                let port = self
                    .next_port(&owner(snapshot))
                    .ok_or_else(|| ApiError::internal("failed to allocate a HealthCheck NodePort: range is full"))?;
                reservation.taken.push(Item::Port(port));
                spec.insert("healthCheckNodePort".to_owned(), port.into());
            }
        }
        Ok(())
    }

    fn next_port(&self, owner: &str) -> Option<u16> {
        let mut taken = self.lock();
        let port = self.ports.candidates().find(|port| !taken.ports.contains_key(port))?;
        taken.ports.insert(port, owner.to_owned());
        Some(port)
    }

    fn take_port(&self, call: &Call, service: &Value, field: String, port: u16) -> Result<(), ApiError> {
        if !self.ports.holds(port) {
            let why =
                format!("provided port is not in the valid range. The range of valid ports is {}", self.ports.text());
            return Err(invalid(call, service, field, port.to_string(), &why));
        }
        let mut taken = self.lock();
        if taken.ports.contains_key(&port) {
            return Err(invalid(call, service, field, port.to_string(), "provided port is already allocated"));
        }
        taken.ports.insert(port, owner(service));
        Ok(())
    }
}

/// An update that names no addresses or node ports keeps those it has (`patchAllocatedValues`).
fn keep_allocated(service: &mut Value, old: &Value) {
    let kind = meta::text(service, "/spec/type").to_owned();
    if kind == "ExternalName" {
        return;
    }
    let old_kind = meta::text(old, "/spec/type").to_owned();
    let spec = meta::object_at(service, "spec");
    let absent = |spec: &Map<String, Value>, field: &str| match spec.get(field) {
        None | Some(Value::Null) => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Number(number)) => number.as_u64() == Some(0),
        Some(_) => false,
    };
    if old_kind != "ExternalName" {
        for field in ["clusterIP", "clusterIPs"] {
            if absent(spec, field)
                && let Some(value) = old.pointer(&format!("/spec/{field}"))
            {
                spec.insert(field.to_owned(), value.clone());
            }
        }
    }
    let has_ports = |kind: &str| kind == "NodePort" || kind == "LoadBalancer";
    if has_ports(&kind) && has_ports(&old_kind) {
        let old_ports = old.pointer("/spec/ports").and_then(Value::as_array).cloned().unwrap_or_default();
        for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
            let same = |have: &&Value| {
                have.get("port") == port.get("port") && meta::text(have, "/protocol") == meta::text(port, "/protocol")
            };
            let number = old_ports.iter().find(same).and_then(|have| have.get("nodePort")).cloned();
            if let (Some(number), Some(port)) = (number, port.as_object_mut())
                && absent(port, "nodePort")
            {
                port.insert("nodePort".to_owned(), number);
            }
        }
    } else if !has_ports(&kind) {
        // A change to ClusterIP gives up the node ports that the old object had and the new one repeats.
        for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
            let had = items_of(old);
            let number = port.get("nodePort").and_then(Value::as_u64).and_then(|number| u16::try_from(number).ok());
            if number.is_some_and(|number| had.contains(&Item::Port(number)))
                && let Some(port) = port.as_object_mut()
            {
                port.shift_remove("nodePort");
            }
        }
    }
}
