//! Policy and pods. Rows and classes of new ids are written before what points to them, the revision is raised when all of
//! it stands, rows that nothing points to go last.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::net::IpAddr;

use libbpf_rs::Object;
use towpath_model::desired::{
    ClassId, LocalClass, LocalPod, PodSets, PolicyChanges, PolicyImage, Row, RowKey, RowProtocol, RuleId, SetId,
    TranslatedAt, Verdict,
};

use super::config::{Changes, Isolation};
use super::error::{Error, Result};
use super::mirror::Mirror;
use crate::abi::{
    self, Addr, Be16, CidrKey, NetnsPod, Plain, RuleKey, SetClassKey, TP_HOST_MAC_WAITS, TP_POD_HOST_ONLY,
    TP_VERDICT_ALLOW, TP_VERDICT_DENY,
};

/// Bits of a rule key before the port.
const RULE_BITS: u32 = 80;

/// The maps of policy and pods.
#[derive(Debug)]
pub(crate) struct PolicyMaps {
    pods: Mirror<Addr, abi::Pod>,
    netns: Mirror<u64, NetnsPod>,
    class_pods: Mirror<Addr, u32>,
    class_cidrs: Mirror<CidrKey, u32>,
    set_classes: Mirror<SetClassKey, u32>,
    rules: Mirror<RuleKey, abi::Rule>,
    /// An [`PolicyMaps::apply`] failed midway: what it wrote is in force, and the revision was not raised for it. Or nobody knows, because who wrote
    /// last was another process, which may have been killed there.
    unraised: bool,
}

fn rule_key(row: &RowKey) -> RuleKey {
    let (proto, port, bits) = match row.protocol {
        RowProtocol::Ports(protocol) => (protocol.number(), row.port, u32::from(row.port_bits.min(16))),
        RowProtocol::Other => (0, 0, 0),
    };
    // The kernel compares keys whole in this copy, so bits that do not count must be zero.
    let mask = u16::MAX.checked_shl(16 - bits).unwrap_or(0);
    RuleKey {
        prefixlen: RULE_BITS + bits,
        set: row.set.0,
        local_class: row.class.0,
        proto,
        pad: 0,
        port: Be16::new(port & mask),
    }
}

fn rule(row: &Row) -> abi::Rule {
    let verdict = match row.verdict {
        Verdict::Allow => TP_VERDICT_ALLOW,
        Verdict::Deny => TP_VERDICT_DENY,
    };
    abi::Rule { verdict, rule_id: row.rule.0 }
}

/// A pod as its network namespace is known.
fn netns_pod(pod: &LocalPod) -> NetnsPod {
    let of_family = |v4: bool| pod.addresses.iter().find(|a| a.is_ipv4() == v4).map(|a| Addr::new(*a));
    NetnsPod {
        addr4: of_family(true).unwrap_or_default(),
        addr6: of_family(false).unwrap_or_default(),
        pod_id: pod.pod_id,
        pad: 0,
    }
}

/// The row of a key; none for one that no row has.
fn row_key(key: &RuleKey) -> Option<RowKey> {
    let protocol = match key.proto {
        0 => RowProtocol::Other,
        number => RowProtocol::Ports(super::adopt::protocol(number)?),
    };
    let port_bits = u8::try_from(key.prefixlen.checked_sub(RULE_BITS)?).ok()?;
    let (set, class) = (SetId(key.set), LocalClass(key.local_class));
    Some(RowKey { set, class, protocol, port: key.port.get(), port_bits })
}

fn row(rule: &abi::Rule) -> Row {
    let verdict = if rule.verdict == TP_VERDICT_ALLOW { Verdict::Allow } else { Verdict::Deny };
    Row { verdict, rule: RuleId(rule.rule_id) }
}

fn set_class_key((SetId(set), ClassId(class_id)): &(SetId, ClassId)) -> SetClassKey {
    SetClassKey { set: *set, class_id: *class_id }
}

/// What is to be written to a map, and what removed from it.
#[derive(Debug)]
struct Entries<K, V> {
    put: Vec<(K, V)>,
    remove: Vec<K>,
}

impl<K: Copy, V> Entries<K, V> {
    /// None: removed.
    fn of(entries: impl Iterator<Item = (K, Option<V>)>) -> Self {
        let mut all = Self { put: Vec::new(), remove: Vec::new() };
        for (key, value) in entries {
            match value {
                Some(value) => all.put.push((key, value)),
                None => all.remove.push(key),
            }
        }
        all
    }
}

/// What makes a map hold these entries and no others.
fn difference<K, V>(map: &Mirror<K, V>, wanted: impl Iterator<Item = (K, V)>) -> Entries<K, V>
where
    K: Plain + Eq + Hash,
    V: Plain + Eq,
{
    let wanted: HashMap<K, V> = wanted.collect();
    let remove = map.held().keys().filter(|key| !wanted.contains_key(key)).copied().collect();
    let put = wanted.into_iter().filter(|(key, value)| map.held().get(key) != Some(value)).collect();
    Entries { put, remove }
}

/// What the maps that point to sets and rows, and those, are to become.
#[derive(Debug)]
struct Writes {
    rules: Entries<RuleKey, abi::Rule>,
    set_classes: Entries<SetClassKey, u32>,
    cidrs: Entries<CidrKey, u32>,
    pods: Entries<Addr, u32>,
}

/// Returns when every program that runs now has ended (`membarrier(2)`, a grace period of RCU, 8 ms where this was tried). A kernel that does not do
/// it, with `nohz_full`, leaves the packets that are just being looked at to be judged as neither image says; their connections are judged again.
fn programs_end() {
    let _ = rustix::thread::membarrier(rustix::thread::MembarrierCommand::Global);
}

/// An entry with another isolation.
fn isolated(pod: abi::Pod, isolation: Isolation) -> abi::Pod {
    match isolation {
        Isolation::Sets(sets) => with_sets(pod, sets, pod.flags & !TP_POD_HOST_ONLY),
        Isolation::HostOnly => with_sets(pod, PodSets::default(), pod.flags | TP_POD_HOST_ONLY),
    }
}

fn with_sets(pod: abi::Pod, sets: PodSets, flags: u32) -> abi::Pod {
    abi::Pod {
        ingress_set: sets.ingress.0,
        egress_set: sets.egress.0,
        ingress_audit_set: sets.audit_ingress.0,
        egress_audit_set: sets.audit_egress.0,
        flags,
        ..pod
    }
}

/// Whether what is for the pod waits at its device.
fn waits(pod: &abi::Pod) -> bool {
    pod.host_mac[0] & TP_HOST_MAC_WAITS as u8 != 0
}

fn waiting(mut pod: abi::Pod, waits: bool) -> abi::Pod {
    pod.host_mac[0] &= !(TP_HOST_MAC_WAITS as u8);
    if waits {
        pod.host_mac[0] |= TP_HOST_MAC_WAITS as u8;
    }
    pod
}

/// The sets of an entry.
fn sets_of(pod: &abi::Pod) -> PodSets {
    PodSets {
        ingress: SetId(pod.ingress_set),
        egress: SetId(pod.egress_set),
        audit_ingress: SetId(pod.ingress_audit_set),
        audit_egress: SetId(pod.egress_audit_set),
    }
}

impl PolicyMaps {
    pub(crate) fn open(object: &Object) -> Result<Self> {
        Ok(Self {
            pods: Mirror::open(object, "tp_pods")?,
            netns: Mirror::open(object, "tp_netns_pods")?,
            class_pods: Mirror::open(object, "tp_class_pods")?,
            class_cidrs: Mirror::open(object, "tp_class_cidrs")?,
            set_classes: Mirror::open(object, "tp_set_class")?,
            rules: Mirror::open(object, "tp_rules")?,
            unraised: true,
        })
    }

    /// Ids that are in the maps: they must not come to mean anything else.
    pub(crate) fn used_ids(&self) -> (BTreeSet<SetId>, BTreeSet<ClassId>, BTreeSet<RuleId>) {
        let of_rules = self.rules.held().keys().map(|key| key.set);
        let of_pods = self.pods.held().values().flat_map(|pod| sets_of(pod).all().map(|set| set.0));
        let of_classes = self.set_classes.held().keys();
        let sets = of_rules.chain(of_pods).chain(of_classes.clone().map(|key| key.set)).map(SetId).collect();
        let held = self.class_pods.held().values().chain(self.class_cidrs.held().values()).copied();
        let classes = held.chain(of_classes.map(|key| key.class_id)).map(ClassId).collect();
        let rules = self.rules.held().values().map(|rule| RuleId(rule.rule_id)).collect();
        (sets, classes, rules)
    }

    /// What the maps hold, as an image: classes, set classes, rows, and the sets of the pods that have any.
    pub(crate) fn held(&self) -> PolicyImage {
        let set_class = |key: &SetClassKey| (SetId(key.set), ClassId(key.class_id));
        PolicyImage {
            pod_classes: self
                .class_pods
                .held()
                .iter()
                .map(|(address, class)| (address.ip(), ClassId(*class)))
                .collect(),
            cidr_classes: self
                .class_cidrs
                .held()
                .iter()
                .filter_map(|(key, class)| Some((key.net()?, ClassId(*class))))
                .collect(),
            set_classes: self
                .set_classes
                .held()
                .iter()
                .map(|(key, local)| (set_class(key), LocalClass(*local)))
                .collect(),
            rows: self.rules.held().iter().filter_map(|(key, rule)| Some((row_key(key)?, row(rule)))).collect(),
            pods: self.pods.held().iter().map(|(address, pod)| (address.ip(), sets_of(pod))).collect(),
            ..PolicyImage::default()
        }
    }

    /// A whole image; `raise` raises the revision.
    pub(crate) fn apply(&mut self, image: &PolicyImage, raise: impl Fn() -> Result<u32>) -> Result<Changes> {
        let writes = Writes {
            rules: difference(&self.rules, image.rows.iter().map(|(key, row)| (rule_key(key), rule(row)))),
            set_classes: difference(
                &self.set_classes,
                image.set_classes.iter().map(|(key, class)| (set_class_key(key), class.0)),
            ),
            cidrs: difference(
                &self.class_cidrs,
                image.cidr_classes.iter().map(|(net, class)| (CidrKey::new(*net), class.0)),
            ),
            pods: difference(
                &self.class_pods,
                image.pod_classes.iter().map(|(address, class)| (Addr::new(*address), class.0)),
            ),
        };
        self.write(writes, &image.pods, raise)
    }

    /// Takes all rules out of the tables, for policies that are to come and do not fit beside those that are there. Pods that have any are closed to
    /// all but their node first, and stay so until an image comes; the others stay as they are.
    pub(crate) fn vacate(&mut self, raise: impl Fn() -> Result<u32>) -> Result<Changes> {
        self.unraised = true;
        let held = self.pods.held().iter().map(|(address, pod)| (*address, *pod));
        let (isolated_pods, others): (Vec<_>, Vec<_>) = held.partition(|(_, pod)| sets_of(pod).isolates());
        let mut changes =
            self.pods.put_all(isolated_pods.into_iter().map(|(at, pod)| (at, isolated(pod, Isolation::HostOnly))))?;
        // Before an address loses its class: to a set that is in force it would be a stranger, whom the set may let in.
        raise()?;
        programs_end();
        let open = others.into_iter().filter(|(_, pod)| pod.flags & TP_POD_HOST_ONLY == 0);
        let pods = open.map(|(address, _)| (address.ip(), PodSets::default())).collect();
        changes += self.apply(&PolicyImage { pods, ..PolicyImage::default() }, raise)?;
        Ok(changes)
    }

    /// What became different since the image that is in force.
    pub(crate) fn apply_changes(
        &mut self,
        changes: &PolicyChanges,
        raise: impl Fn() -> Result<u32>,
    ) -> Result<Changes> {
        let writes = Writes {
            rules: Entries::of(changes.rows.iter().map(|(key, row)| (rule_key(key), row.as_ref().map(rule)))),
            set_classes: Entries::of(
                changes.set_classes.iter().map(|(key, class)| (set_class_key(key), class.map(|class| class.0))),
            ),
            cidrs: Entries::of(
                changes.cidr_classes.iter().map(|(net, class)| (CidrKey::new(*net), class.map(|class| class.0))),
            ),
            pods: Entries::of(
                changes.pod_classes.iter().map(|(address, class)| (Addr::new(*address), class.map(|class| class.0))),
            ),
        };
        self.write(writes, &changes.pods, raise)
    }

    /// That there is room for all of it, before any of it is written: what does not fit leaves the maps as they are, and no litter in them for
    /// which what comes next does not fit either. Rows and classes of sets that no pod has make room first, if they are to go.
    fn make_room(&mut self, writes: &mut Writes) -> Result<()> {
        let in_use: HashSet<u32> =
            self.pods.held().values().flat_map(|pod| sets_of(pod).all().map(|set| set.0)).collect();
        if !self.rules.has_room(&writes.rules.put) {
            let (idle, later) = writes.rules.remove.drain(..).partition(|key| !in_use.contains(&key.set));
            writes.rules.remove = later;
            self.rules.remove_all(&idle)?;
        }
        if !self.set_classes.has_room(&writes.set_classes.put) {
            let (idle, later) = writes.set_classes.remove.drain(..).partition(|key| !in_use.contains(&key.set));
            writes.set_classes.remove = later;
            self.set_classes.remove_all(&idle)?;
        }
        let full = [
            (self.rules.has_room(&writes.rules.put), self.rules.full()),
            (self.set_classes.has_room(&writes.set_classes.put), self.set_classes.full()),
            (self.class_cidrs.has_room(&writes.cidrs.put), self.class_cidrs.full()),
            (self.class_pods.has_room(&writes.pods.put), self.class_pods.full()),
        ];
        full.into_iter().find(|(has_room, _)| !has_room).map_or(Ok(()), |(_, full)| Err(full))
    }

    /// In the order that is never less safe than before or after (`towpath_policy::compile`).
    fn write(
        &mut self,
        mut writes: Writes,
        sets: &BTreeMap<IpAddr, PodSets>,
        raise: impl Fn() -> Result<u32>,
    ) -> Result<Changes> {
        self.make_room(&mut writes)?;
        let before = std::mem::replace(&mut self.unraised, true);
        let mut changes = self.rules.put_all(writes.rules.put)?;
        changes += self.set_classes.put_all(writes.set_classes.put)?;
        // An address without an entry has a class too, so taking one away is a change of what points to rows.
        changes += self.apply_classes(writes.pods, writes.cidrs)?;
        changes += self.apply_sets(sets)?;
        if before || changes != Changes::default() {
            raise()?;
        }
        // Rows first: a program that has a set in hand finds none then and denies. Without its class, a peer that a rule denies
        // would be a stranger to the set.
        let mut after = self.rules.remove_all(&writes.rules.remove)?;
        after += self.set_classes.remove_all(&writes.set_classes.remove)?;
        if after != Changes::default() {
            raise()?;
        }
        self.unraised = false;
        changes += after;
        Ok(changes)
    }

    /// In the order in which every address goes from its class before to that after in one step. A program looks first among pods, then
    /// among blocks: between changes of the one and of the other all that are looking come to their end.
    fn apply_classes(&mut self, pods: Entries<Addr, u32>, mut cidrs: Entries<CidrKey, u32>) -> Result<Changes> {
        cidrs.put.sort_unstable_by_key(|(key, _)| Reverse(key.prefixlen));
        cidrs.remove.sort_unstable_by_key(|key| key.prefixlen);
        let recut = !cidrs.put.is_empty() || !cidrs.remove.is_empty();
        let mut changes = self.class_pods.put_all(pods.put)?;
        if recut && changes != Changes::default() {
            programs_end();
        }
        changes += self.class_cidrs.put_all(cidrs.put)?;
        changes += self.class_cidrs.remove_all(&cidrs.remove)?;
        if recut && !pods.remove.is_empty() {
            programs_end();
        }
        changes += self.class_pods.remove_all(&pods.remove)?;
        Ok(changes)
    }

    /// Gives the pods that are here their sets; one that the image does not know is denied all but its node.
    fn apply_sets(&mut self, sets: &BTreeMap<IpAddr, PodSets>) -> Result<Changes> {
        let wanted: Vec<(Addr, abi::Pod)> = self
            .pods
            .held()
            .iter()
            .map(|(address, pod)| {
                let isolation = sets.get(&address.ip()).map_or(Isolation::HostOnly, |sets| Isolation::Sets(*sets));
                (*address, isolated(*pod, isolation))
            })
            .collect();
        self.pods.put_all(wanted)
    }

    /// Enters a pod. Whether a pod was entered before under one of its addresses: another one's connections must be purged.
    pub(crate) fn set_pod(
        &mut self,
        pod: &LocalPod,
        isolation: Isolation,
        translated_at: TranslatedAt,
    ) -> Result<(Changes, Vec<Addr>)> {
        if pod.addresses.is_empty() || pod.pod_id == 0 || pod.ifindex == 0 {
            return Err(Error::Invalid {
                object: format!("pod {}", pod.name),
                reason: "it has no address, no id or no device",
            });
        }
        // Before its addresses: [`PolicyMaps::translated_at`] tells by this.
        match translated_at {
            _ if pod.netns_cookie == 0 => {}
            TranslatedAt::Sockets => drop(self.netns.put(pod.netns_cookie, netns_pod(pod))?),
            TranslatedAt::Device => drop(self.netns.remove(&pod.netns_cookie)?),
        }
        let fresh = abi::Pod {
            ifindex: pod.ifindex,
            pod_id: pod.pod_id,
            mac: pod.mac,
            host_mac: pod.host_mac,
            ..abi::Pod::default()
        };
        let mut changes = Changes::default();
        let mut reused = Vec::new();
        for address in pod.addresses.iter().map(|a| Addr::new(*a)) {
            if self.pods.held().get(&address).is_some_and(|old| old.pod_id != pod.pod_id) {
                reused.push(address);
            }
            let waits = self.pods.held().get(&address).is_some_and(|old| old.pod_id == pod.pod_id && waits(old));
            let entry = waiting(isolated(fresh, isolation), waits);
            changes.written += usize::from(self.pods.put(address, entry)?);
        }
        Ok((changes, reused))
    }

    /// Whether what is for a pod waits at its device; whether that was different. Of a pod that is entered anew nothing waits.
    pub(crate) fn set_waits(&mut self, pod: &LocalPod, waits: bool) -> Result<bool> {
        let mut changed = false;
        for address in pod.addresses.iter().map(|a| Addr::new(*a)) {
            let held = self.pods.held().get(&address).filter(|held| held.pod_id == pod.pod_id).copied();
            if let Some(held) = held {
                changed |= self.pods.put(address, waiting(held, waits))?;
            }
        }
        Ok(changed)
    }

    /// Has the socket hooks know a pod, or leave its sockets alone; whether that was different. Connections that are open stay as they
    /// are: a socket remembers what it was translated to, and what was not translated is, at the device.
    pub(crate) fn set_translated_at(&mut self, pod: &LocalPod, translated_at: TranslatedAt) -> Result<bool> {
        match translated_at {
            TranslatedAt::Device => self.netns.remove(&pod.netns_cookie),
            // A pod with two devices has one namespace.
            TranslatedAt::Sockets if pod.netns_cookie == 0 || self.netns.held().contains_key(&pod.netns_cookie) => {
                Ok(false)
            }
            TranslatedAt::Sockets => self.netns.put(pod.netns_cookie, netns_pod(pod)),
        }
    }

    /// Where it is as the pinned entries have it: a pod that is known by its addresses and not by its namespace was taken out.
    pub(crate) fn translated_at(&self, pod: &LocalPod) -> TranslatedAt {
        let known =
            |address: &IpAddr| self.pods.held().get(&Addr::new(*address)).is_some_and(|held| held.pod_id == pod.pod_id);
        if pod.addresses.iter().any(known) && !self.netns.held().contains_key(&pod.netns_cookie) {
            TranslatedAt::Device
        } else {
            TranslatedAt::Sockets
        }
    }

    /// How a pod is isolated now: as its pinned entry says, else denied all but its node.
    pub(crate) fn isolation_of(&self, pod: &LocalPod) -> Isolation {
        let held = pod.addresses.iter().filter_map(|a| self.pods.held().get(&Addr::new(*a)));
        match held.into_iter().find(|held| held.pod_id == pod.pod_id && held.flags & TP_POD_HOST_ONLY == 0) {
            Some(held) => Isolation::Sets(sets_of(held)),
            None => Isolation::HostOnly,
        }
    }

    /// Forgets the pods that are not among these; the addresses forgotten.
    pub(crate) fn retain_pods(&mut self, known: &[LocalPod]) -> Result<Vec<Addr>> {
        let ids: HashSet<u32> = known.iter().map(|pod| pod.pod_id).collect();
        let gone: Vec<Addr> = self
            .pods
            .held()
            .iter()
            .filter(|(_, held)| !ids.contains(&held.pod_id))
            .map(|(address, _)| *address)
            .collect();
        for address in &gone {
            self.pods.remove(address)?;
        }
        let theirs: Vec<u64> = self
            .netns
            .held()
            .iter()
            .filter(|(_, held)| !ids.contains(&held.pod_id))
            .map(|(cookie, _)| *cookie)
            .collect();
        for cookie in theirs {
            self.netns.remove(&cookie)?;
        }
        Ok(gone)
    }

    /// Forgets a pod, unless its address has been given to another since; the addresses forgotten.
    pub(crate) fn remove_pod(&mut self, pod: &LocalPod) -> Result<Vec<Addr>> {
        let mut gone = Vec::new();
        for address in pod.addresses.iter().map(|a| Addr::new(*a)) {
            if self.pods.held().get(&address).is_some_and(|held| held.pod_id == pod.pod_id) {
                self.pods.remove(&address)?;
                gone.push(address);
            }
        }
        let theirs: HashSet<u64> =
            self.netns.held().iter().filter(|(_, held)| held.pod_id == pod.pod_id).map(|(cookie, _)| *cookie).collect();
        for cookie in theirs {
            self.netns.remove(&cookie)?;
        }
        Ok(gone)
    }

    pub(crate) fn pods(&self) -> &HashMap<Addr, abi::Pod> {
        self.pods.held()
    }

    pub(crate) fn usage(&self) -> [(&'static str, usize, u32); 6] {
        [
            self.pods.usage(),
            self.netns.usage(),
            self.class_pods.usage(),
            self.class_cidrs.usage(),
            self.set_classes.usage(),
            self.rules.usage(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towpath_model::Protocol;

    #[test]
    fn bits_of_a_port_that_do_not_count_are_cleared() {
        let row = |port, port_bits| RowKey {
            set: SetId(7),
            class: LocalClass(3),
            protocol: RowProtocol::Ports(Protocol::Tcp),
            port,
            port_bits,
        };
        assert_eq!(rule_key(&row(0x1fff, 16)).port.get(), 0x1fff);
        assert_eq!(rule_key(&row(0x1fff, 4)).port.get(), 0x1000);
        assert_eq!(rule_key(&row(0x1fff, 0)).port.get(), 0);
        assert_eq!(rule_key(&row(0x1fff, 4)).prefixlen, 84);
    }

    #[test]
    fn a_row_that_was_written_is_read_as_it_was() {
        for protocol in Protocol::ALL.map(RowProtocol::Ports).into_iter().chain([RowProtocol::Other]) {
            let (port, port_bits) = if protocol == RowProtocol::Other { (0, 0) } else { (0x1f80, 9) };
            let key = RowKey { set: SetId(7), class: LocalClass(3), protocol, port, port_bits };
            assert_eq!(row_key(&rule_key(&key)), Some(key));
            for verdict in [Verdict::Allow, Verdict::Deny] {
                let value = Row { verdict, rule: RuleId(9) };
                assert_eq!(row(&rule(&value)), value);
            }
        }
        assert_eq!(row_key(&RuleKey { prefixlen: 79, ..RuleKey::default() }), None);
    }
}
