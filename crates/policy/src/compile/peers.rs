//! Who is behind each address, by group, kept from one compilation to the next.
//!
//! A group is the pods that selectors and named ports cannot tell apart (namespace, labels, named ports), or the nodes that list the same
//! addresses. What [`Holders`] says of a whole view, [`Peers::follow`] says of the addresses of the pods that changed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;

use towpath_model::desired::ClassId;
use towpath_model::{Labels, NamedPort, NamespacedName, NodeName, Pod, PodIps, Protocol, Shared};

use crate::pod_name::{PodName as Name, name_of, text};
use crate::view::{Holder, Holders, PeerPod, View, likelier};

/// Stands for no group, region or kind.
pub(super) const NONE: u32 = u32::MAX;

/// Pods that say an address is theirs.
#[derive(Clone, Debug, Default)]
#[expect(
    clippy::box_collection,
    reason = "there is one of these an address of the cluster, and hardly ever many claim the same"
)]
enum Claims {
    #[default]
    Nobody,
    One(Name),
    Many(Box<BTreeSet<Name>>),
}

impl Claims {
    fn add(&mut self, name: Name) {
        *self = match std::mem::take(self) {
            Claims::Nobody => Claims::One(name),
            Claims::One(one) if one == name => Claims::One(one),
            Claims::One(one) => Claims::Many(Box::new(BTreeSet::from([one, name]))),
            Claims::Many(mut all) => {
                all.insert(name);
                Claims::Many(all)
            }
        };
    }

    fn remove(&mut self, name: &str) {
        *self = match std::mem::take(self) {
            Claims::One(one) if *one != *name => Claims::One(one),
            Claims::Nobody | Claims::One(_) => Claims::Nobody,
            Claims::Many(mut all) => {
                all.remove(name);
                match (all.len(), all.pop_first()) {
                    (_, None) => Claims::Nobody,
                    (1, Some(last)) => Claims::One(last),
                    (_, Some(first)) => {
                        all.insert(first);
                        Claims::Many(all)
                    }
                }
            }
        };
    }

    /// In their order.
    fn names(&self) -> impl Iterator<Item = NamespacedName> {
        let (one, many) = match self {
            Claims::Nobody => (None, None),
            Claims::One(one) => (Some(one), None),
            Claims::Many(all) => (None, Some(all.iter())),
        };
        one.into_iter().chain(many.into_iter().flatten()).map(|name| name_of(name))
    }
}

/// An address that somebody claims.
#[derive(Clone, Debug)]
pub(super) struct Held {
    claims: Claims,
    /// [`NONE`]: its holder is nobody whom a selector can match.
    pub(super) group: u32,
    /// The region it is in.
    pub(super) region: u32,
    /// Its kind when it was last looked at.
    pub(super) kind: u32,
    /// Its class in the last image.
    pub(super) class: Option<ClassId>,
    /// The last image has an entry for it.
    pub(super) shown: bool,
}

impl Default for Held {
    fn default() -> Self {
        Self { claims: Claims::Nobody, group: NONE, region: NONE, kind: NONE, class: None, shown: false }
    }
}

/// What the members of a group share.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Who {
    Pods {
        namespace: String,
        labels: Shared<Labels>,
        named_ports: Shared<Vec<NamedPort>>,
    },
    /// Labels of the nodes that list the addresses.
    Nodes(Vec<Labels>),
}

#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) who: Who,
    hash: u64,
    members: u32,
    local: u32,
    /// See [`super::kinds`]; [`NONE`]: not looked at yet.
    pub(super) kind: u32,
}

impl Group {
    /// What selectors see of its pods.
    pub(super) fn as_peer(&self) -> Option<PeerPod<'_>> {
        match &self.who {
            Who::Pods { namespace, labels, named_ports } => Some(PeerPod { namespace, labels, named_ports }),
            Who::Nodes(_) => None,
        }
    }

    /// The number of a named port in its pods.
    pub(super) fn named_port(&self, name: &str, protocol: Protocol) -> Option<u16> {
        self.as_peer()?.named_port(name, protocol)
    }
}

/// What became of [`Peers`].
#[derive(Debug, Default)]
pub(super) struct Moves {
    /// Addresses that have another group now, or none.
    pub(super) addresses: Vec<IpAddr>,
    /// Groups that are new. Their numbers may have been another group's before.
    pub(super) groups: Vec<u32>,
}

/// All addresses that somebody claims.
#[derive(Debug, Default)]
pub(super) struct Peers {
    pub(super) addresses: BTreeMap<IpAddr, Held>,
    pods: HashMap<Name, PodIps>,
    groups: Vec<Option<Group>>,
    free: Vec<u32>,
    numbers: HashMap<u64, Vec<u32>>,
    hasher: RandomState,
    /// Addresses of this node's pods.
    pub(super) local: BTreeSet<IpAddr>,
    /// Addresses that are somebody's whatever pods say: who follows pods only does not judge of them.
    reserved: HashSet<IpAddr>,
}

/// What a pod says its addresses are, as far as it counts.
fn claimed<'v>(view: &View<'v>, name: &NamespacedName) -> &'v [IpAddr] {
    match view.pod_ips.get(name).filter(|ips| !ips.is_empty()) {
        Some(given) => given,
        None => view.world.pods.get(name).map_or(&[][..], |pod| view.addresses_of(pod)),
    }
}

fn who_of(peer: &PeerPod<'_>) -> Who {
    Who::Pods {
        namespace: peer.namespace.to_owned(),
        labels: peer.labels.clone(),
        named_ports: peer.named_ports.clone(),
    }
}

impl Peers {
    /// Looks at a whole view. Classes are taken over from `before`.
    pub(super) fn of(view: &View<'_>, holders: &Holders<'_>, node: &NodeName, before: &mut Peers) -> Self {
        let mut peers = Self { hasher: before.hasher.clone(), ..Self::default() };
        peers.reserved.extend(view.dns);
        peers.reserved.extend(view.world.nodes.values().flat_map(|node| node.addresses()));
        peers.reserved.extend(view.world.nodes.values().flat_map(|node| &node.internal_ips));
        let mut addresses: HashMap<IpAddr, Held> = HashMap::new();
        let given = view.pod_ips.keys().filter(|name| !view.world.pods.contains_key(name));
        for name in view.world.pods.keys().chain(given) {
            let ips = claimed(view, name);
            if ips.is_empty() {
                continue;
            }
            let name = Name::from(text(name));
            for ip in ips {
                addresses.entry(*ip).or_default().claims.add(name.clone());
            }
            peers.pods.insert(name, ips.into());
        }
        for (ip, holder, peer) in holders.peers() {
            let local = matches!(holder, Holder::Pod(pod) if pod.node.as_ref() == Some(node));
            let group = peers.enter(peer, local);
            addresses.entry(ip).or_default().group = group;
            if local {
                peers.local.insert(ip);
            }
        }
        for (ip, nodes) in holders.node_addresses() {
            let who = Who::Nodes(nodes.iter().map(|node| node.labels.clone()).collect());
            let hash = peers.hasher.hash_one(&who);
            addresses.entry(ip).or_default().group = peers.join(hash, |known| *known == who, || who.clone(), false);
        }
        for (ip, held) in &mut addresses {
            if let Some(before) = before.addresses.get(ip) {
                (held.class, held.shown) = (before.class, before.shown);
            }
        }
        peers.addresses = addresses.into_iter().collect();
        peers
    }

    /// Looks at these pods again. None: only a look at everything can tell.
    pub(super) fn follow<'n>(
        &mut self,
        view: &View<'_>,
        node: &NodeName,
        pods: impl Iterator<Item = &'n NamespacedName>,
    ) -> Option<Moves> {
        let mut concerned: BTreeSet<IpAddr> = BTreeSet::new();
        for name in pods {
            let ips = claimed(view, name);
            let text = text(name);
            if let Some((name, before)) = self.pods.remove_entry(text.as_str()) {
                for ip in &*before {
                    self.addresses.entry(*ip).or_default().claims.remove(&name);
                }
                concerned.extend(&*before);
            }
            concerned.extend(ips);
            if !ips.is_empty() {
                let name = Name::from(text);
                for ip in ips {
                    self.addresses.entry(*ip).or_default().claims.add(name.clone());
                }
                self.pods.insert(name, ips.into());
            }
        }
        if concerned.iter().any(|ip| self.reserved.contains(ip)) {
            return None;
        }
        let mut moves = Moves::default();
        let mut left: Vec<(u32, bool)> = Vec::new();
        for ip in concerned {
            let Some(held) = self.addresses.get(&ip) else { continue };
            let before = held.group;
            let holder = self.holder(view, ip, held);
            let local = matches!(holder, Some(Holder::Pod(pod)) if pod.node.as_ref() == Some(node));
            let known = self.groups.len() - self.free.len();
            let group = match holder.and_then(|holder| self.peer(holder)) {
                Some(peer) => self.enter(peer, local),
                None => NONE,
            };
            if self.groups.len() - self.free.len() > known {
                moves.groups.push(group);
            }
            let was_local = if local { !self.local.insert(ip) } else { self.local.remove(&ip) };
            if before != NONE {
                left.push((before, was_local));
            }
            if before != group {
                moves.addresses.push(ip);
                if let Some(held) = self.addresses.get_mut(&ip) {
                    held.group = group;
                }
            }
        }
        left.into_iter().for_each(|(group, local)| self.leave(group, local));
        Some(moves)
    }

    /// Forgets an address that is nobody's any more.
    pub(super) fn forget(&mut self, ip: IpAddr) {
        if self.addresses.get(&ip).is_some_and(|held| held.group == NONE && matches!(held.claims, Claims::Nobody)) {
            self.addresses.remove(&ip);
        }
    }

    fn peer<'a>(&self, holder: Holder<'a>) -> Option<PeerPod<'a>> {
        match holder {
            Holder::Pod(pod) => {
                let (labels, named_ports) = (&pod.labels, &pod.named_ports);
                Some(PeerPod { namespace: &pod.name.namespace, labels, named_ports })
            }
            Holder::Dns | Holder::Node(_) | Holder::UnknownPod(_) => None,
        }
    }

    /// Who holds an address that is not reserved: of the pods to which it was given the first by name, else the likeliest by status.
    fn holder<'a>(&self, view: &View<'a>, ip: IpAddr, held: &Held) -> Option<Holder<'a>> {
        let given =
            held.claims.names().find_map(|name| view.pod_ips.get_key_value(&name).filter(|(_, ips)| ips.contains(&ip)));
        if let Some((name, _)) = given {
            return Some(match view.world.pods.get(name) {
                Some(pod) if pod.on_pod_network() => Holder::Pod(pod),
                _ => Holder::UnknownPod(name),
            });
        }
        let mut holder: Option<&'a Pod> = None;
        for challenger in held.claims.names().filter_map(|name| view.world.pods.get(&name)) {
            if holder.is_none_or(|holder| likelier(view.world, ip, challenger, holder)) {
                holder = Some(challenger);
            }
        }
        holder.map(Holder::Pod)
    }

    fn enter(&mut self, peer: PeerPod<'_>, local: bool) -> u32 {
        let hash = self.hasher.hash_one((peer.namespace, peer.labels, peer.named_ports));
        let same = |known: &Who| match known {
            Who::Pods { namespace, labels, named_ports } => {
                namespace == peer.namespace && labels == peer.labels && named_ports == peer.named_ports
            }
            Who::Nodes(_) => false,
        };
        self.join(hash, same, || who_of(&peer), local)
    }

    fn join(&mut self, hash: u64, same: impl Fn(&Who) -> bool, who: impl FnOnce() -> Who, local: bool) -> u32 {
        let bucket = self.numbers.entry(hash).or_default();
        for number in bucket.iter() {
            if let Some(group) = slot(&mut self.groups, *number)
                && same(&group.who)
            {
                group.members += 1;
                group.local += u32::from(local);
                return *number;
            }
        }
        let group = Group { who: who(), hash, members: 1, local: u32::from(local), kind: NONE };
        let number = match self.free.pop() {
            Some(number) => number,
            None => {
                self.groups.push(None);
                u32::try_from(self.groups.len() - 1).unwrap_or(NONE)
            }
        };
        bucket.push(number);
        if let Some(place) = usize::try_from(number).ok().and_then(|number| self.groups.get_mut(number)) {
            *place = Some(group);
        }
        number
    }

    fn leave(&mut self, number: u32, local: bool) {
        let Some(group) = slot(&mut self.groups, number) else { return };
        group.members = group.members.saturating_sub(1);
        group.local = group.local.saturating_sub(u32::from(local));
        if group.members > 0 {
            return;
        }
        let hash = group.hash;
        if let Some(bucket) = self.numbers.get_mut(&hash) {
            bucket.retain(|known| *known != number);
            if bucket.is_empty() {
                self.numbers.remove(&hash);
            }
        }
        if let Some(place) = usize::try_from(number).ok().and_then(|number| self.groups.get_mut(number)) {
            *place = None;
            self.free.push(number);
        }
    }

    /// A group.
    pub(super) fn group(&self, number: u32) -> Option<&Group> {
        self.groups.get(usize::try_from(number).ok()?)?.as_ref()
    }

    /// A group, to give it its kind.
    pub(super) fn group_mut(&mut self, number: u32) -> Option<&mut Group> {
        slot(&mut self.groups, number)
    }

    /// All groups, to give them kinds.
    pub(super) fn groups_mut(&mut self) -> impl Iterator<Item = (u32, &mut Group)> {
        (0u32..).zip(&mut self.groups).filter_map(|(number, group)| Some((number, group.as_mut()?)))
    }

    /// A bound of the numbers of groups.
    pub(super) fn group_bound(&self) -> usize {
        self.groups.len()
    }

    /// Groups with pods of this node.
    pub(super) fn local_groups(&self) -> BTreeSet<u32> {
        let groups = self.local.iter().filter_map(|ip| self.addresses.get(ip)).map(|held| held.group);
        groups.filter(|group| *group != NONE).collect()
    }
}

fn slot(groups: &mut [Option<Group>], number: u32) -> Option<&mut Group> {
    groups.get_mut(usize::try_from(number).ok()?)?.as_mut()
}
