//! Services: a new backend list is written whole before the entry points to it, and the old one stays until nothing that
//! runs can still be reading it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use libbpf_rs::Object;
use towpath_model::desired::{Algorithm, BackendId, Clients, Frontend, FrontendTarget, ServiceTable};

use super::config::Changes;
use super::error::{Error, Result};
use super::map::Map;
use super::mirror::Mirror;
use crate::abi::{
    self, Addr, Affinity, AffinityKey, Be16, CidrKey, Load, ServiceKey, SlotKey, SourceKey, TP_ALGORITHM_SHIFT,
    TP_LEAST_CONNECTIONS, TP_RANDOM, TP_ROUND_ROBIN, TP_SERVICE_AFFINITY, TP_SERVICE_NODEPORT, TP_SERVICE_PODS,
    TP_SERVICE_RANGES, TP_SOURCE_HASH, TP_TUPLE_HASH, Tuple,
};

/// How long what is no longer referred to stays: a program that read the reference has ended long before.
const GRACE: Duration = Duration::from_secs(2);

/// `tp_services`, `tp_slots`, `tp_backends` and `tp_affinity`.
#[derive(Debug)]
pub(crate) struct ServiceMaps {
    services: Mirror<ServiceKey, abi::Service>,
    slots: Mirror<SlotKey, u32>,
    backends: Mirror<u32, abi::Backend>,
    /// Backends whose open connections are counted.
    loads: Map<u32, Load>,
    counted: HashSet<u32>,
    sources: Mirror<SourceKey, u32>,
    affinity: Map<AffinityKey, Affinity>,
    translations: Map<Tuple, abi::Nat>,
    /// Lists that are look-up tables, which all frontends of a Service port share.
    tables: HashMap<u32, Arc<[BackendId]>>,
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

fn algorithm_flag(algorithm: Algorithm) -> u32 {
    let number = match algorithm {
        Algorithm::Random => TP_RANDOM,
        Algorithm::RoundRobin => TP_ROUND_ROBIN,
        Algorithm::LeastConnections => TP_LEAST_CONNECTIONS,
        Algorithm::SourceHash => TP_SOURCE_HASH,
        Algorithm::Maglev => TP_TUPLE_HASH,
    };
    number << TP_ALGORITHM_SHIFT
}

/// Who may use the Services that are for some clients only.
fn source_keys(table: &ServiceTable) -> HashSet<SourceKey> {
    let limited = entries(table).filter_map(|(_, _, target)| Some((target.id.0, target.sources.as_deref()?)));
    limited.flat_map(|(service, ranges)| ranges.iter().map(move |range| source_key(service, *range))).collect()
}

fn source_key(service: u32, range: IpNet) -> SourceKey {
    let CidrKey { prefixlen, family, addr } = CidrKey::new(range);
    SourceKey { prefixlen: prefixlen + u32::BITS, service, family, addr }
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
        let loads: Map<u32, Load> = Map::open(object, "tp_loads")?;
        Ok(Self {
            backends: Mirror::open(object, "tp_backends")?,
            counted: loads.entries()?.into_iter().map(|(id, _)| id).collect(),
            loads,
            sources: Mirror::open(object, "tp_source_ranges")?,
            translations: Map::open(object, "tp_nat")?,
            affinity: Map::open(object, "tp_affinity")?,
            old_lists: orphans.into_iter().map(|(list, count)| (list, count, now)).collect(),
            tables: HashMap::new(),
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

    fn is_list_of(&self, service: &abi::Service, wanted: &[BackendId]) -> bool {
        let slot = |index| self.slots.held().get(&SlotKey { list: service.list, index }).copied();
        service.count as usize == wanted.len()
            && (0..service.count).zip(wanted).all(|(index, BackendId(id))| slot(index) == Some(*id))
    }

    fn free_list(&mut self) -> u32 {
        let list = self.next_list;
        self.next_list = self.next_list.wrapping_add(1).max(1);
        list
    }

    /// The list of a target: the present one when it is the same, that of another frontend with the same look-up table, else a new
    /// one, written whole.
    fn list_for(&mut self, old: Option<&abi::Service>, target: &FrontendTarget) -> Result<(u32, Changes)> {
        let wanted = target.slots();
        if wanted.is_empty() {
            return Ok((0, Changes::default()));
        }
        let large = !target.table.is_empty();
        let written = self.tables.iter().find(|(_, table)| large && Arc::ptr_eq(table, &target.table));
        if let Some((list, _)) = written {
            return Ok((*list, Changes::default()));
        }
        if let Some(old) = old.filter(|old| self.is_list_of(old, wanted)) {
            if large {
                self.tables.insert(old.list, Arc::clone(&target.table));
            }
            return Ok((old.list, Changes::default()));
        }
        let list = self.free_list();
        if large {
            self.tables.insert(list, Arc::clone(&target.table));
        }
        let slots = (0u32..).zip(wanted).map(|(index, BackendId(id))| (SlotKey { list, index }, *id));
        match self.slots.put_all(slots) {
            Ok(changes) => Ok((list, changes)),
            Err(e) => {
                self.tables.remove(&list);
                self.old_lists.push((list, wanted.len() as u32, Instant::now()));
                Err(e)
            }
        }
    }

    fn retire(&mut self, old: &abi::Service, kept: &[BackendId], now: Instant) {
        if old.count == 0 {
            return;
        }
        if old.flags & TP_SERVICE_AFFINITY != 0 {
            let lost = self.backends_of(old).into_iter().filter(|backend| !kept.contains(&BackendId(*backend)));
            self.unaffine.extend(lost.map(|backend| ((old.id, backend), now)));
        }
        self.tables.remove(&old.list);
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
        let (list, mut changes) = self.list_for(old.as_ref(), target)?;
        let affinity = if target.affinity_seconds.is_some() { TP_SERVICE_AFFINITY } else { 0 };
        let ranges = if target.sources.is_some() { TP_SERVICE_RANGES } else { 0 };
        let nodeport = if frontend.address.is_none() { TP_SERVICE_NODEPORT } else { 0 };
        let service = abi::Service {
            id: target.id.0,
            list,
            count: target.slots().len() as u32,
            flags: affinity | nodeport | ranges | clients_flag(target.clients) | algorithm_flag(target.algorithm),
            affinity_seconds: target.affinity_seconds.unwrap_or(0),
            // Counted up by programs from where it is; where a list begins, nobody is the first for ever.
            turn: old.filter(|old| old.list == list).map_or(list, |old| old.turn),
        };
        changes.written += usize::from(self.services.put(key, service)?);
        if let Some(old) = old.filter(|old| old.list != list) {
            self.retire(&old, &target.backends, now);
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
        self.count_loads(table)?;
        // Before the entries that refer to them, and removed after.
        let sources = source_keys(table);
        changes += self.sources.put_all(sources.iter().map(|key| (*key, 1)))?;
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
        let outdated: Vec<SourceKey> =
            self.sources.held().keys().filter(|key| !sources.contains(key)).copied().collect();
        for key in outdated {
            changes.removed += usize::from(self.sources.remove(&key)?);
        }
        for id in self.backends.held().keys().filter(|id| !table.backends.contains_key(&BackendId(**id))) {
            self.old_backends.entry(*id).or_insert(now);
        }
        self.drop_affinity()?;
        Ok(changes)
    }

    /// Has the open connections of backends counted that are chosen by them, from what is open by translation now; those that
    /// sockets made before are not known. A backend's count goes with the backend.
    fn count_loads(&mut self, table: &ServiceTable) -> Result<()> {
        let least = entries(table).filter(|(_, _, target)| target.algorithm == Algorithm::LeastConnections);
        let wanted: HashSet<u32> = least.flat_map(|(_, _, target)| target.backends.iter().map(|id| id.0)).collect();
        let new: Vec<u32> = wanted.difference(&self.counted).copied().collect();
        if !new.is_empty() {
            let mut flows: HashMap<u32, u32> = HashMap::new();
            for (_, translation) in self.translations.entries()? {
                *flows.entry(translation.backend).or_default() += 1;
            }
            for id in new {
                self.loads.put(&id, &Load { flows: flows.get(&id).copied().unwrap_or(0), sockets: 0 })?;
                self.counted.insert(id);
            }
        }
        let known = &table.backends;
        let gone: Vec<u32> = self.counted.iter().filter(|id| !known.contains_key(&BackendId(**id))).copied().collect();
        for id in gone {
            self.loads.delete(&id)?;
            self.counted.remove(&id);
        }
        Ok(())
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
