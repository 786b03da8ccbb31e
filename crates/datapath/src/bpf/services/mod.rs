//! Services: entries and backends, with the [`lists`] that entries point to, who may use them ([`sources`]) and how busy their backends are
//! ([`loads`]). Applied whole, or by what became different.

mod backends;
mod bits;
mod keys;
mod lists;
mod loads;
mod slots;
mod sources;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use libbpf_rs::Object;
use towpath_model::desired::{Algorithm, BackendId, Clients, Frontend, FrontendTarget, ServiceChanges, ServiceTable};
use towpath_model::{Family, NamespacedName, Protocol, family_of};

use super::config::Changes;
use super::error::{Error, Result};
use super::map::Map;
use super::mirror::Mirror;
use super::observe::End;
use crate::abi::{
    self, Addr, Affinity, AffinityKey, ServiceKey, TP_ALGORITHM_SHIFT, TP_LEAST_CONNECTIONS, TP_RANDOM, TP_ROUND_ROBIN,
    TP_SERVICE_AFFINITY, TP_SERVICE_INSIDE, TP_SERVICE_NODEPORT, TP_SERVICE_PODS, TP_SERVICE_RANGES, TP_SOURCE_HASH,
    TP_TUPLE_HASH,
};
use backends::Backends;
use bits::Bits;
use keys::{changed, entries, is_mark, key_of, mark_of};
use lists::{List, Lists};
use loads::Loads;
use sources::Sources;

/// How long what is no longer referred to stays: a program that read the reference has ended long before.
const GRACE: Duration = Duration::from_secs(2);

fn is_over(since: Instant, now: Instant) -> bool {
    now.saturating_duration_since(since) >= GRACE
}

/// Where the UDP flows of a frontend may go: to backends that take new ones, and to those that keep what they have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UdpTarget {
    /// The address; none: any node's.
    pub address: Option<IpAddr>,
    /// Its family.
    pub family: Family,
    /// The port.
    pub port: u16,
    /// The backends.
    pub backends: HashSet<End>,
}

/// `tp_services`, `tp_backends` and `tp_affinity`, and the parts.
#[derive(Debug)]
pub(crate) struct ServiceMaps {
    services: Mirror<ServiceKey, abi::Service>,
    backends: Backends,
    lists: Lists,
    sources: Sources,
    /// IPv6 addresses of Services by [`Addr::name`].
    names: Mirror<u64, Addr>,
    /// Which addresses may be Services'.
    bits: Bits,
    loads: Loads,
    at: HashMap<ServiceKey, AtAddress>,
    /// A whole table was applied: changes can follow.
    whole: bool,
    affinity: Map<AffinityKey, Affinity>,
    /// (Service, backend) pairs that clients must not be held to, and since when.
    unaffine: HashMap<(u32, u32), Instant>,
    /// UDP backends left a frontend, or the table; or an earlier process may have seen that.
    udp_left: bool,
    /// UDP backends that take no new flows of an entry, and keep those they have.
    lingering: HashMap<ServiceKey, BTreeSet<BackendId>>,
    /// Entries for which there was no room, until there is.
    left_out: HashMap<ServiceKey, LeftOut>,
}

/// A Service that is not in the kernel as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// [`FrontendTarget::service`].
    pub service: NamespacedName,
    /// [`FrontendTarget::port_name`].
    pub port_name: String,
    /// Why, for people.
    pub reason: String,
}

/// What came of applying Services.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicesApplied {
    /// Entries of all maps.
    pub changes: Changes,
    /// For what there is no room, of all that was ever applied. Each has what it had before, or nothing; it is tried again with the
    /// next whole table, for which there may be room after the grace period.
    pub left_out: Vec<LeftOut>,
}

/// How many entries there are at an address.
#[derive(Clone, Copy, Debug, Default)]
struct AtAddress {
    all: u32,
    /// Those that are for pods only.
    for_pods: u32,
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

/// How long each list is that an entry points to, of those that are asked for.
fn in_use(services: &HashMap<ServiceKey, abi::Service>, asked: impl Fn(u32) -> bool) -> HashMap<u32, u32> {
    let used = services.values().filter(|service| service.count > 0 && asked(service.slots));
    used.map(|service| (service.slots, service.count)).collect()
}

fn at_addresses(services: &Mirror<ServiceKey, abi::Service>) -> HashMap<ServiceKey, AtAddress> {
    let mut all: HashMap<ServiceKey, AtAddress> = HashMap::new();
    for (key, service) in services.held() {
        let Some(mark) = mark_of(key) else { continue };
        let at = all.entry(mark).or_default();
        at.all += 1;
        at.for_pods += u32::from(service.flags & TP_SERVICE_PODS != 0);
    }
    all
}

impl ServiceMaps {
    pub(crate) fn open(object: &Object, now: Instant) -> Result<Self> {
        let services = Mirror::open(object, "tp_services")?;
        Ok(Self {
            backends: Backends::open(object)?,
            lists: Lists::open(object, &in_use(services.held(), |_| true), now)?,
            sources: Sources::open(object)?,
            names: Mirror::open(object, "tp_service_names")?,
            bits: Bits::open(object, services.held().keys().filter_map(mark_of).map(|mark| mark.addr))?,
            loads: Loads::open(object, now)?,
            at: at_addresses(&services),
            whole: false,
            affinity: Map::open(object, "tp_affinity")?,
            unaffine: HashMap::new(),
            services,
            udp_left: true,
            lingering: HashMap::new(),
            left_out: HashMap::new(),
        })
    }

    fn retire(&mut self, key: &ServiceKey, old: &abi::Service, kept: &[BackendId], now: Instant) {
        if old.count == 0 {
            return;
        }
        if key.proto == Protocol::Udp.number() && !self.udp_left {
            let kept: HashSet<u32> = kept.iter().map(|id| id.0).collect();
            self.udp_left = self.lists.backends_of(old).iter().any(|backend| !kept.contains(backend));
        }
        if old.flags & TP_SERVICE_AFFINITY != 0 {
            let lost = self.lists.backends_of(old).into_iter().filter(|backend| !kept.contains(&BackendId(*backend)));
            self.unaffine.extend(lost.map(|backend| ((old.id, backend), now)));
        }
        self.lists.retire(old, now);
    }

    /// Whether all of it came to be is said last: an entry that is written is so with all that hangs on it. The second part of the
    /// answer: what it is written without.
    fn apply_frontend(
        &mut self,
        key: ServiceKey,
        frontend: &Frontend,
        target: &FrontendTarget,
        now: Instant,
    ) -> Result<(Changes, Option<String>)> {
        let (former, admitted) = self.sources.admit(key, target);
        let (old, service, mut changes, tabled) = match self.write_frontend(key, frontend, target, now) {
            Ok(written) => written,
            Err(error) => {
                // Whoever the entry as it is lets in, it still does.
                self.sources.keep(key, former);
                return Err(error);
            }
        };
        if let Some(old) = old {
            if old.slots != service.slots {
                self.retire(&key, &old, &target.backends, now);
            }
            if old.id != service.id && old.flags & TP_SERVICE_AFFINITY != 0 {
                let held_to = self.lists.backends_of(&old).into_iter();
                self.unaffine.extend(held_to.map(|backend| ((old.id, backend), now)));
            }
        }
        if !self.unaffine.is_empty() {
            for BackendId(backend) in &target.backends {
                self.unaffine.remove(&(service.id, *backend));
            }
        }
        changes += self.mark_inside(&key, true)?;
        changes += self.sources.drop_former(former)?;
        if old.is_some() {
            changes += self.count_at(&key, old.as_ref(), Some(&service))?;
        }
        // Said only now: the entry is for those that fit, and not for everybody.
        changes += admitted?;
        let without = |error: Error| {
            format!(
                "no room for its look-up table, so an endpoint that comes or goes changes most clients' choice: {error}"
            )
        };
        Ok((changes, tabled.err().map(without)))
    }

    /// The entry, and what it needs to be there before. The last part of the answer: whether it has the look-up table that it asks for.
    fn write_frontend(
        &mut self,
        key: ServiceKey,
        frontend: &Frontend,
        target: &FrontendTarget,
        now: Instant,
    ) -> Result<(Option<abi::Service>, abi::Service, Changes, Result<()>)> {
        if !target.backends.iter().all(|id| self.backends.held().contains_key(&id.0)) {
            return Err(self.backends.full());
        }
        let old = self.services.held().get(&key).copied();
        let List { number: list, count, mut changes, tabled } =
            self.lists.list_for(old.as_ref(), target, self.backends.held())?;
        let affinity = if target.affinity_seconds.is_some() { TP_SERVICE_AFFINITY } else { 0 };
        let ranges = if target.sources.is_some() { TP_SERVICE_RANGES } else { 0 };
        let nodeport = if frontend.address.is_none() { TP_SERVICE_NODEPORT } else { 0 };
        let beside = key.inside == 0 && self.services.held().contains_key(&ServiceKey { inside: 1, ..key });
        let inside = if beside { TP_SERVICE_INSIDE } else { 0 };
        let service = abi::Service {
            id: target.id.0,
            slots: list,
            count,
            flags: affinity
                | nodeport
                | inside
                | ranges
                | clients_flag(target.clients)
                | algorithm_flag(target.algorithm),
            affinity_seconds: target.affinity_seconds.unwrap_or(0),
            // Counted up by programs from where it is; where a list begins, nobody is the first for ever.
            turn: old.filter(|old| old.slots == list).map_or(list, |old| old.turn),
        };
        let marked = if old.is_none() { self.count_at(&key, None, Some(&service)) } else { Ok(Changes::default()) };
        let written = marked.and_then(|marked| {
            changes += marked;
            self.services.put(key, service)
        });
        match written {
            Ok(written) => changes.written += usize::from(written),
            Err(error) => {
                if old.is_none() {
                    // Nothing but a mark that nobody needs is left when this fails, too.
                    drop(self.count_at(&key, Some(&service), None));
                }
                if old.is_none_or(|old| old.slots != list) {
                    self.retire(&key, &service, &target.backends, now);
                }
                return Err(error);
            }
        }
        Ok((old, service, changes, tabled))
    }

    fn remove_frontend(&mut self, key: &ServiceKey, now: Instant) -> Result<Changes> {
        let Some(old) = self.services.held().get(key).copied() else { return Ok(Changes::default()) };
        let mut changes = self.mark_inside(key, false)?;
        changes.removed += usize::from(self.services.remove(key)?);
        self.left_out.remove(key);
        changes += self.sources.remove(key)?;
        changes += self.count_at(key, Some(&old), None)?;
        self.retire(key, &old, &[], now);
        Ok(changes)
    }

    /// Says of what is for clients from outside whether there is an entry for this node's own beside it.
    fn mark_inside(&mut self, key: &ServiceKey, is_there: bool) -> Result<Changes> {
        let outside = ServiceKey { inside: 0, ..*key };
        let Some(held) = self.services.held().get(&outside).filter(|_| key.inside == 1).copied() else {
            return Ok(Changes::default());
        };
        let flags = if is_there { held.flags | TP_SERVICE_INSIDE } else { held.flags & !TP_SERVICE_INSIDE };
        let written = self.services.put(outside, abi::Service { flags, ..held })?;
        Ok(Changes { written: usize::from(written), ..Changes::default() })
    }

    /// Marks an address as a Service's while there is an entry at it; for pods only if all entries are.
    fn count_at(
        &mut self,
        key: &ServiceKey,
        old: Option<&abi::Service>,
        new: Option<&abi::Service>,
    ) -> Result<Changes> {
        let Some(mark) = mark_of(key) else { return Ok(Changes::default()) };
        let for_pods = |service: &abi::Service| u32::from(service.flags & TP_SERVICE_PODS != 0);
        let at = self.at.entry(mark).or_default();
        at.all = (at.all + u32::from(new.is_some())).saturating_sub(u32::from(old.is_some()));
        at.for_pods = (at.for_pods + new.map_or(0, for_pods)).saturating_sub(old.map_or(0, for_pods));
        let at = *at;
        if at.all == 0 {
            self.at.remove(&mark);
            if let Some(name) = mark.addr.name() {
                self.names.remove(&name)?;
            }
            return Ok(Changes { removed: usize::from(self.services.remove(&mark)?), ..Changes::default() });
        }
        // First: what has an entry and no bit is not found.
        self.bits.set(mark.addr)?;
        let flags = if at.all == at.for_pods { TP_SERVICE_PODS } else { 0 };
        let written = self.services.put(mark, abi::Service { flags, ..abi::Service::default() })?;
        if let Some(name) = mark.addr.name() {
            self.names.put(name, mark.addr)?;
        }
        Ok(Changes { written: usize::from(written), ..Changes::default() })
    }

    /// Everything that a table leads to is to be there.
    fn check<'a>(
        targets: impl Iterator<Item = &'a FrontendTarget>,
        is_known: impl Fn(&BackendId) -> bool,
    ) -> Result<()> {
        for target in targets {
            if !target.backends.iter().all(&is_known) {
                return Err(Error::Invalid {
                    object: format!("Service {} port {:?}", target.service, target.port_name),
                    reason: "its backend list names a backend that the table does not have",
                });
            }
        }
        Ok(())
    }

    /// Applies what is known of an entry; what there is no room for is left out, by name.
    fn apply_entry(
        &mut self,
        key: ServiceKey,
        frontend: &Frontend,
        target: &FrontendTarget,
        now: Instant,
        applied: &mut ServicesApplied,
    ) -> Result<()> {
        let missing = match self.apply_frontend(key, frontend, target, now) {
            Ok((changes, missing)) => {
                applied.changes += changes;
                missing
            }
            Err(error @ Error::Full { .. }) => Some(error.to_string()),
            Err(error) => return Err(error),
        };
        match missing {
            Some(reason) => {
                let (service, port_name) = (target.service.clone(), target.port_name.clone());
                self.left_out.insert(key, LeftOut { service, port_name, reason });
            }
            None => drop(self.left_out.remove(&key)),
        }
        Ok(())
    }

    /// Whether what replaces an entry is found only when it is gone: then it goes last.
    fn gives_way(&self, key: &ServiceKey) -> bool {
        let any = [Addr::any(Family::V4), Addr::any(Family::V6)];
        let at = |addr| self.services.held().contains_key(&ServiceKey { addr, inside: 0, ..*key });
        key.inside == 1 || (!any.contains(&key.addr) && at(Addr::any(family_of(key.addr.ip()))))
    }

    /// The whole table, whatever was there before.
    pub(crate) fn apply(&mut self, table: &ServiceTable, now: Instant) -> Result<ServicesApplied> {
        if !std::mem::replace(&mut self.whole, false) {
            // Whatever an earlier one left half done.
            self.sources.forget();
        }
        self.at = at_addresses(&self.services);
        self.backends.begin();
        Self::check(entries(table).map(|(.., target)| target), |id| table.backends.contains_key(id))?;
        let mut applied = ServicesApplied::default();
        // What goes makes room for what comes.
        let keys: HashSet<ServiceKey> = entries(table).map(|(key, ..)| key).collect();
        self.left_out.retain(|key, _| keys.contains(key));
        let gone = self.services.held().keys().filter(|key| !keys.contains(key) && !is_mark(key)).copied();
        let (last, first): (Vec<ServiceKey>, Vec<ServiceKey>) = gone.partition(|key| self.gives_way(key));
        for key in first {
            applied.changes += self.remove_frontend(&key, now)?;
        }
        table.backends.keys().for_each(|id| self.loads.remember(id.0));
        applied.changes += self.backends.write(table.backends.iter(), entries(table).map(|(.., target)| target))?;
        self.lists.disown(&self.backends.take_renamed());
        self.loads.count(entries(table).map(|(.., target)| target))?;
        for (frontend, backends) in &table.lingering {
            self.lingering.entry(key_of(frontend)).or_default().extend(backends);
        }
        for (key, frontend, target) in entries(table) {
            self.apply_entry(key, frontend, target, now, &mut applied)?;
        }
        for key in last {
            applied.changes += self.remove_frontend(&key, now)?;
        }
        // What an earlier process left half done.
        let at = &self.at;
        applied.changes += self.services.retain(|key| !is_mark(key) || at.contains_key(key))?;
        let names: HashMap<u64, Addr> =
            at.keys().filter_map(|mark| mark.addr.name().map(|name| (name, mark.addr))).collect();
        self.names.retain(|name| names.contains_key(name))?;
        self.names.put_all(names)?;
        let as_they_were: HashSet<u32> =
            self.left_out.keys().filter_map(|key| self.services.held().get(key)).map(|service| service.id).collect();
        applied.changes += self.sources.drop_unreferred(&as_they_were)?;
        let unlisted: Vec<u32> =
            self.backends.held().keys().filter(|id| !table.backends.contains_key(&BackendId(**id))).copied().collect();
        self.retire_backends(&unlisted, now);
        let former: Vec<ServiceKey> = self.lingering.keys().copied().collect();
        let lingering: HashMap<ServiceKey, &BTreeSet<BackendId>> =
            table.lingering.iter().map(|(frontend, backends)| (key_of(frontend), backends)).collect();
        for key in former.iter().filter(|key| !lingering.contains_key(key)) {
            self.linger(*key, None);
        }
        for (key, backends) in lingering {
            self.linger(key, Some(backends));
        }
        self.drop_affinity()?;
        self.whole = true;
        applied.left_out = self.left_out.values().cloned().collect();
        Ok(applied)
    }

    /// Which backends flows of an entry may go on to. After its list: one that takes new flows again is not lost.
    fn linger(&mut self, key: ServiceKey, backends: Option<&BTreeSet<BackendId>>) {
        let former = match backends {
            Some(backends) => self.lingering.insert(key, backends.clone()),
            None => self.lingering.remove(&key),
        };
        let lost = former.into_iter().flatten().filter(|id| backends.is_none_or(|now| !now.contains(id)));
        let lost: Vec<u32> = lost.map(|id| id.0).collect();
        if !lost.is_empty() && !self.udp_left {
            let taken =
                self.services.held().get(&key).map(|service| self.lists.backends_of(service)).unwrap_or_default();
            self.udp_left = lost.iter().any(|id| !taken.contains(id));
        }
    }

    /// What became different since the last time.
    pub(crate) fn apply_changes(&mut self, wanted: &ServiceChanges, now: Instant) -> Result<ServicesApplied> {
        if !self.whole {
            return Err(Error::Invalid {
                object: "changes of Services".to_owned(),
                reason: "the table that they are changes of was not applied whole",
            });
        }
        let was = &self.backends;
        let is_known = |id: &BackendId| wanted.backends.get(id).map_or_else(|| was.is_known(id), Option::is_some);
        Self::check(changed(wanted).filter_map(|(.., target)| target), is_known)?;
        // Until all of it is done, only a whole table may follow.
        self.whole = false;
        let listed = wanted.backends.iter().filter_map(|(id, backend)| Some((id, backend.as_ref()?)));
        listed.clone().for_each(|(id, _)| self.loads.remember(id.0));
        let targets = changed(wanted).filter_map(|(.., target)| target);
        let changes = self.backends.write(listed, targets)?;
        self.lists.disown(&self.backends.take_renamed());
        let mut applied = ServicesApplied { changes, ..ServicesApplied::default() };
        self.loads.count(changed(wanted).filter_map(|(.., target)| target))?;
        let gone = changed(wanted).filter(|(.., target)| target.is_none()).map(|(key, ..)| key);
        let (last, first): (Vec<ServiceKey>, Vec<ServiceKey>) = gone.partition(|key| self.gives_way(key));
        for key in first {
            applied.changes += self.remove_frontend(&key, now)?;
        }
        for (frontend, backends) in &wanted.lingering {
            self.lingering.entry(key_of(frontend)).or_default().extend(backends.iter().flatten());
        }
        for (key, frontend, target) in changed(wanted).filter_map(|(key, f, target)| Some((key, f, target?))) {
            self.apply_entry(key, frontend, target, now, &mut applied)?;
        }
        for key in last {
            applied.changes += self.remove_frontend(&key, now)?;
        }
        let unlisted = wanted.backends.iter().filter(|(_, backend)| backend.is_none());
        self.retire_backends(&unlisted.map(|(id, _)| id.0).collect::<Vec<u32>>(), now);
        for (frontend, backends) in &wanted.lingering {
            self.linger(key_of(frontend), backends.as_ref());
        }
        self.drop_affinity()?;
        self.whole = true;
        applied.left_out = self.left_out.values().cloned().collect();
        Ok(applied)
    }

    /// Backends that the table no longer has.
    fn retire_backends(&mut self, ids: &[u32], now: Instant) {
        self.udp_left |= self.backends.retire(ids, now);
        ids.iter().for_each(|id| self.loads.forget(*id, now));
    }

    /// Whether UDP backends left a frontend or the table since this was asked last; yes at the first time. Never before the
    /// first table is known: what may go on is in it.
    pub(crate) fn take_udp_left(&mut self) -> bool {
        self.whole && std::mem::replace(&mut self.udp_left, false)
    }

    /// Where UDP flows may go, by what is in the kernel.
    pub(crate) fn udp_targets(&self) -> impl Iterator<Item = UdpTarget> {
        let udp = |key: &ServiceKey| key.proto == Protocol::Udp.number();
        self.services.held().iter().filter(move |(key, _)| udp(key)).map(|(key, service)| {
            let lingering = self.lingering.get(key).into_iter().flatten().map(|id| id.0);
            let ids = self.lists.backends_of(service).into_iter().chain(lingering);
            let ends = ids.filter_map(|id| self.backends.held().get(&id));
            UdpTarget {
                address: Some(key.addr.ip()).filter(|address| !address.is_unspecified()),
                family: family_of(key.addr.ip()),
                port: key.port.get(),
                backends: ends.map(|backend| (backend.addr.ip(), backend.port.get())).collect(),
            }
        })
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
        // Every second, and mostly for nothing: what entries there are is looked at only for lists whose time has come.
        let services = self.services.held();
        let mut removed = self.lists.sweep(|lists| in_use(services, |list| lists.contains(&list)), now)?;
        if self.unaffine.values().any(|since| is_over(*since, now)) {
            // Once more, for what a program wrote while the entry flipped. Before the backends go: nothing that leads to one may
            // outlive it, or a program could be copying what the kernel has given to another.
            removed += self.drop_affinity()?;
            self.unaffine.retain(|_, since| !is_over(*since, now));
        }
        // What has no room yet leads where it led.
        let entries = self.left_out.keys().filter_map(|key| self.services.held().get(key));
        let needed: HashSet<u32> = entries.flat_map(|service| self.lists.backends_of(service)).collect();
        removed += self.loads.sweep(now)?;
        let dead = self.backends.sweep(&needed, now)?;
        Ok((removed + dead, dead > 0))
    }

    pub(crate) fn services(&self) -> &HashMap<ServiceKey, abi::Service> {
        self.services.held()
    }

    pub(crate) fn backends(&self) -> &HashMap<u32, abi::Backend> {
        self.backends.held()
    }

    pub(crate) fn usage(&self) -> [(&'static str, usize, u32); 3] {
        [self.services.usage(), self.lists.usage(), self.backends.usage()]
    }
}
