//! Services: a new backend list is written whole before the entry points to it, and the old one stays until nothing that
//! runs can still be reading it.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use libbpf_rs::Object;
use towpath_model::desired::{BackendId, Clients, Frontend, FrontendTarget, ServiceTable};

use super::config::Changes;
use super::error::{Error, Result};
use super::map::Map;
use super::mirror::Mirror;
use crate::abi::{
    self, Addr, Affinity, AffinityKey, Be16, ServiceKey, SlotKey, TP_SERVICE_AFFINITY, TP_SERVICE_NODEPORT,
    TP_SERVICE_PODS,
};

/// How long what is no longer referred to stays: a program that read the reference has ended long before.
const GRACE: Duration = Duration::from_secs(2);

/// `tp_services`, `tp_slots`, `tp_backends` and `tp_affinity`.
#[derive(Debug)]
pub(crate) struct ServiceMaps {
    services: Mirror<ServiceKey, abi::Service>,
    slots: Mirror<SlotKey, u32>,
    backends: Mirror<u32, abi::Backend>,
    affinity: Map<AffinityKey, Affinity>,
    /// Lists that no entry points to, and since when.
    old_lists: Vec<(u32, u32, Instant)>,
    /// Backends that the table no longer has, and since when.
    old_backends: HashMap<u32, Instant>,
    /// (Service, backend) pairs that clients must not be held to, and since when.
    unaffine: HashMap<(u32, u32), Instant>,
    next_list: u32,
}

fn key_of(frontend: &Frontend) -> ServiceKey {
    ServiceKey {
        addr: frontend.address.map(Addr::new).unwrap_or_else(|| Addr::any(frontend.family)),
        port: Be16::new(frontend.port),
        proto: frontend.protocol.number(),
        inside: 0,
    }
}

fn inside_key_of(frontend: &Frontend) -> ServiceKey {
    ServiceKey { inside: 1, ..key_of(frontend) }
}

/// Every entry that a table asks for, but for the marks of addresses.
fn entries(table: &ServiceTable) -> impl Iterator<Item = (ServiceKey, &Frontend, &FrontendTarget)> {
    let outside = table.frontends.iter().map(|(frontend, target)| (key_of(frontend), frontend, target));
    outside.chain(table.inside.iter().map(|(frontend, target)| (inside_key_of(frontend), frontend, target)))
}

/// The marks of addresses that are Services'. One is for pods only if all frontends at that address are.
fn address_marks(table: &ServiceTable) -> HashMap<ServiceKey, abi::Service> {
    let mut marks: HashMap<ServiceKey, abi::Service> = HashMap::new();
    for (frontend, target) in &table.frontends {
        let Some(address) = frontend.address else { continue };
        let key = ServiceKey { addr: Addr::new(address), ..ServiceKey::default() };
        let mark = marks.entry(key).or_insert(abi::Service { flags: TP_SERVICE_PODS, ..abi::Service::default() });
        mark.flags &= clients_flag(target.clients);
    }
    marks
}

fn clients_flag(clients: Clients) -> u32 {
    match clients {
        Clients::All => 0,
        Clients::Pods => TP_SERVICE_PODS,
    }
}

fn lists_in_use(services: &Mirror<ServiceKey, abi::Service>) -> HashMap<u32, u32> {
    services.held().values().filter(|service| service.count > 0).map(|service| (service.list, service.count)).collect()
}

impl ServiceMaps {
    pub(crate) fn open(object: &Object, now: Instant) -> Result<Self> {
        let services = Mirror::open(object, "tp_services")?;
        let slots: Mirror<SlotKey, u32> = Mirror::open(object, "tp_slots")?;
        let used = lists_in_use(&services);
        // What an earlier process did not come to delete.
        let mut orphans: HashMap<u32, u32> = HashMap::new();
        for slot in slots.held().keys().filter(|slot| used.get(&slot.list).is_none_or(|count| slot.index >= *count)) {
            let count = orphans.entry(slot.list).or_default();
            *count = (*count).max(slot.index.saturating_add(1));
        }
        let next_list = slots.held().keys().map(|slot| slot.list).max().unwrap_or(0).wrapping_add(1).max(1);
        Ok(Self {
            backends: Mirror::open(object, "tp_backends")?,
            affinity: Map::open(object, "tp_affinity")?,
            old_lists: orphans.into_iter().map(|(list, count)| (list, count, now)).collect(),
            old_backends: HashMap::new(),
            unaffine: HashMap::new(),
            services,
            slots,
            next_list,
        })
    }

    /// The backends of the list that an entry points to.
    fn backends_of(&self, service: &abi::Service) -> Vec<u32> {
        let slot = |index| self.slots.held().get(&SlotKey { list: service.list, index }).copied();
        (0..service.count).filter_map(slot).collect()
    }

    fn free_list(&mut self) -> u32 {
        let list = self.next_list;
        self.next_list = self.next_list.wrapping_add(1).max(1);
        list
    }

    /// The list of a target: the present one when it is the same, else a new one, written whole.
    fn list_for(&mut self, old: Option<&abi::Service>, wanted: &[u32]) -> Result<(u32, Changes)> {
        if wanted.is_empty() {
            return Ok((0, Changes::default()));
        }
        if let Some(old) = old.filter(|old| self.backends_of(old) == wanted) {
            return Ok((old.list, Changes::default()));
        }
        let list = self.free_list();
        let slots = (0u32..).zip(wanted).map(|(index, backend)| (SlotKey { list, index }, *backend));
        match self.slots.put_all(slots) {
            Ok(changes) => Ok((list, changes)),
            Err(e) => {
                self.old_lists.push((list, wanted.len() as u32, Instant::now()));
                Err(e)
            }
        }
    }

    fn retire(&mut self, old: &abi::Service, kept: &[u32], now: Instant) {
        if old.count == 0 {
            return;
        }
        if old.flags & TP_SERVICE_AFFINITY != 0 {
            let lost = self.backends_of(old).into_iter().filter(|backend| !kept.contains(backend));
            self.unaffine.extend(lost.map(|backend| ((old.id, backend), now)));
        }
        self.old_lists.push((old.list, old.count, now));
    }

    fn apply_frontend(
        &mut self,
        key: ServiceKey,
        frontend: &Frontend,
        target: &FrontendTarget,
        now: Instant,
    ) -> Result<Changes> {
        let old = self.services.held().get(&key).copied();
        let wanted: Vec<u32> = target.backends.iter().map(|BackendId(id)| *id).collect();
        let (list, mut changes) = self.list_for(old.as_ref(), &wanted)?;
        let affinity = if target.affinity_seconds.is_some() { TP_SERVICE_AFFINITY } else { 0 };
        let nodeport = if frontend.address.is_none() { TP_SERVICE_NODEPORT } else { 0 };
        let service = abi::Service {
            id: target.id.0,
            list,
            count: wanted.len() as u32,
            flags: affinity | nodeport | clients_flag(target.clients),
            affinity_seconds: target.affinity_seconds.unwrap_or(0),
            pad: 0,
        };
        changes.written += usize::from(self.services.put(key, service)?);
        if let Some(old) = old.filter(|old| old.list != list) {
            self.retire(&old, &wanted, now);
        }
        Ok(changes)
    }

    fn check(table: &ServiceTable) -> Result<()> {
        for (_, frontend, target) in entries(table) {
            let unknown = |id: &&BackendId| !table.backends.contains_key(id);
            if target.backends.iter().any(|id| unknown(&id)) {
                return Err(Error::Invalid {
                    object: format!("Service {} port {}", target.service, frontend.port),
                    reason: "its backend list names a backend that the table does not have",
                });
            }
        }
        Ok(())
    }

    fn write_backends(&mut self, table: &ServiceTable) -> Result<Changes> {
        let encode = |(BackendId(id), backend): (&BackendId, &towpath_model::desired::BackendAddress)| {
            let value = abi::Backend {
                addr: Addr::new(backend.address),
                port: Be16::new(backend.port),
                proto: backend.protocol.number(),
                pad: 0,
                flags: 0,
            };
            (*id, value)
        };
        for BackendId(id) in table.backends.keys() {
            self.old_backends.remove(id);
        }
        self.backends.put_all(table.backends.iter().map(encode))
    }

    pub(crate) fn apply(&mut self, table: &ServiceTable, now: Instant) -> Result<Changes> {
        Self::check(table)?;
        let mut changes = self.write_backends(table)?;
        for (key, frontend, target) in entries(table) {
            changes += self.apply_frontend(key, frontend, target, now)?;
        }
        let marks = address_marks(table);
        changes += self.services.put_all(marks.iter().map(|(key, mark)| (*key, *mark)))?;
        let keys: HashSet<ServiceKey> = entries(table).map(|(key, ..)| key).chain(marks.into_keys()).collect();
        let gone: Vec<(ServiceKey, abi::Service)> =
            self.services.held().iter().filter(|(key, _)| !keys.contains(key)).map(|(k, v)| (*k, *v)).collect();
        for (key, old) in gone {
            changes.removed += usize::from(self.services.remove(&key)?);
            self.retire(&old, &[], now);
        }
        for id in self.backends.held().keys().filter(|id| !table.backends.contains_key(&BackendId(**id))) {
            self.old_backends.entry(*id).or_insert(now);
        }
        self.drop_affinity()?;
        Ok(changes)
    }

    /// Lets go of clients that were held to a backend which their Service no longer has.
    fn drop_affinity(&self) -> Result<usize> {
        if self.unaffine.is_empty() {
            return Ok(0);
        }
        let mut removed = 0;
        for (key, value) in self.affinity.entries()? {
            if self.unaffine.contains_key(&(key.service, value.backend)) {
                removed += usize::from(self.affinity.delete(&key)?);
            }
        }
        Ok(removed)
    }

    /// Deletes old lists and backends after the grace period. Whether backends went, and so translations must be released.
    pub(crate) fn sweep(&mut self, now: Instant) -> Result<(usize, bool)> {
        let over = |since: &Instant| now.saturating_duration_since(*since) >= GRACE;
        let mut removed = 0;
        let used = lists_in_use(&self.services);
        let due: Vec<(u32, u32, Instant)> =
            self.old_lists.iter().filter(|(_, _, since)| over(since)).copied().collect();
        for (list, count, _) in &due {
            let first = used.get(list).copied().unwrap_or(0);
            for index in first..*count {
                removed += usize::from(self.slots.remove(&SlotKey { list: *list, index })?);
            }
        }
        self.old_lists.retain(|(_, _, since)| !over(since));
        let dead: Vec<u32> = self.old_backends.iter().filter(|(_, since)| over(since)).map(|(id, _)| *id).collect();
        if self.unaffine.values().any(over) {
            // Once more, for what a program wrote while the entry flipped. Before the backends go: nothing that leads to one may
            // outlive it, or a program could be copying what the kernel has given to another.
            removed += self.drop_affinity()?;
            self.unaffine.retain(|_, since| !over(since));
        }
        for id in &dead {
            removed += usize::from(self.backends.remove(id)?);
            self.old_backends.remove(id);
        }
        Ok((removed, !dead.is_empty()))
    }

    pub(crate) fn services(&self) -> &HashMap<ServiceKey, abi::Service> {
        self.services.held()
    }

    pub(crate) fn backends(&self) -> &HashMap<u32, abi::Backend> {
        self.backends.held()
    }

    pub(crate) fn usage(&self) -> [(&'static str, usize, u32); 3] {
        [self.services.usage(), self.slots.usage(), self.backends.usage()]
    }
}
