//! What is kept from one compilation to the next, so that a change costs what it touches.
//!
//! All of it follows from the view and the sets in force. Made anew it is the same, and so are the ids of the image: nothing here is an
//! input of them but which class an address had.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use towpath_model::desired::{LocalClass, PodSets, SetId};
use towpath_model::{NamespacedName, NodeName};

use super::atoms::{Atoms, NamespaceLabels};
use super::budget::{Budget, TooLarge};
use super::classes::{Content, Turnover};
use super::kinds::{GroupKind, Kinds};
use super::peers::{Moves, NONE, Peers};
use super::set::{Seen, Set};
use super::space::{PodRanges, Space};
use super::touched::Touched;
use crate::names::{Learned, Mark};
use crate::view::{Holders, View};

/// Peers, what they match, and how sets see it.
#[derive(Debug, Default)]
pub(super) struct Sight {
    node: Option<NodeName>,
    dns: Vec<IpAddr>,
    pod_ips: BTreeMap<NamespacedName, Vec<IpAddr>>,
    pub(super) peers: Peers,
    atoms: Atoms,
    namespaces: NamespaceLabels,
    pub(super) space: Space,
    /// Up to where it was followed what domain names stand for.
    taught: Mark,
    pub(super) kinds: Kinds,
    /// Sets of each group of this node's pods.
    pub(super) of_group: HashMap<u32, PodSets>,
}

/// What a compilation looks at.
#[derive(Debug)]
pub(super) enum Looks {
    /// At everything.
    All {
        /// Addresses of the last image that nobody claims any more.
        gone: Vec<IpAddr>,
    },
    /// At what changed.
    Moves(Moves),
}

/// What became of the kinds.
#[derive(Debug, Default)]
pub(super) struct Recut {
    /// Addresses of another kind.
    pub(super) moved: Vec<IpAddr>,
    /// Addresses that other names stand for.
    pub(super) named: Vec<IpAddr>,
    /// Regions may be others.
    pub(super) regions: bool,
}

/// Kinds with their contents before, and the sets that somebody came into or left.
type Classified = (Vec<(u32, u32)>, BTreeSet<SetId>);

impl Sight {
    /// Looks at what is touched, or at everything, if there is no other way.
    pub(super) fn look(&mut self, view: &View<'_>, node: &NodeName, touched: &Touched) -> Looks {
        let follows = !touched.everything
            && self.node.as_ref() == Some(node)
            && self.dns == view.dns
            && !self.atoms.is_littered()
            && !self.kinds.is_littered();
        let moves = if follows { self.follow(view, node, touched) } else { None };
        self.pod_ips.clone_from(view.pod_ips);
        match moves {
            Some(moves) => Looks::Moves(moves),
            None => self.look_at_all(view, node),
        }
    }

    fn follow(&mut self, view: &View<'_>, node: &NodeName, touched: &Touched) -> Option<Moves> {
        let mut pods: BTreeSet<&NamespacedName> = touched.pods.iter().collect();
        pods.extend(
            view.pod_ips.iter().filter(|(name, ips)| self.pod_ips.get(*name) != Some(*ips)).map(|(name, _)| name),
        );
        pods.extend(self.pod_ips.keys().filter(|name| !view.pod_ips.contains_key(*name)));
        let moves = self.peers.follow(view, node, pods.into_iter())?;
        for group in &moves.groups {
            self.of_group.remove(group);
        }
        touched.namespaces.iter().for_each(|name| self.namespaces.forget(name));
        Some(moves)
    }

    fn look_at_all(&mut self, view: &View<'_>, node: &NodeName) -> Looks {
        let mut before = std::mem::take(&mut self.peers);
        let peers = Peers::of(view, &Holders::of(view), node, &mut before);
        let gone = before.addresses.into_iter().filter(|(ip, held)| held.shown && !peers.addresses.contains_key(ip));
        let gone = gone.map(|(ip, _)| ip).collect();
        let pod_ips = std::mem::take(&mut self.pod_ips);
        *self = Self { node: Some(node.clone()), dns: view.dns.to_vec(), pod_ips, peers, ..Self::default() };
        Looks::All { gone }
    }

    /// Cuts the peers, as far as they changed, or the atoms that are asked for did.
    #[expect(clippy::too_many_arguments, reason = "all of one compilation")]
    pub(super) fn recut(
        &mut self,
        view: &View<'_>,
        looks: &Looks,
        touched: &Touched,
        sets: &mut BTreeMap<SetId, Set>,
        turnover: &Turnover,
        gone: &[Set],
        budget: &mut Budget,
    ) -> Result<Recut, TooLarge> {
        let all = matches!(looks, Looks::All { .. });
        for set in sets.values_mut().filter(|set| all || turnover.came.contains(&set.id)) {
            set.ask(&mut self.atoms);
        }
        if !all {
            gone.iter().for_each(|set| set.leave(&mut self.atoms));
        }
        let news = self.atoms.news();
        let mut regrouped = vec![false; self.peers.group_bound()];
        let (atoms, namespaces, kinds) = (&self.atoms, &mut self.namespaces, &mut self.kinds);
        let idle = news.spares_groups() && touched.namespaces.is_empty();
        let fresh: &[u32] = if let Looks::Moves(moves) = looks { &moves.groups } else { &[] };
        let mut regroup = |number: u32, group: &mut super::peers::Group| {
            let renamed = group.as_peer().is_some_and(|peer| touched.namespaces.contains(peer.namespace));
            let kind = if group.kind == NONE || renamed {
                let matched = atoms.of_group(group, namespaces, view.world);
                kinds.groups.number(GroupKind { atoms: matched.into(), ports: atoms.ports_of(group).into() })
            } else {
                let more = atoms.new_of_group(&news, group, namespaces, view.world);
                if more.is_empty() && !news.names_port_of(group) {
                    return;
                }
                let mut matched = kinds.groups.get(group.kind).map(|kind| kind.atoms.to_vec()).unwrap_or_default();
                matched.extend(more);
                matched.sort_unstable();
                matched.dedup();
                kinds.groups.number(GroupKind { atoms: matched.into(), ports: atoms.ports_of(group).into() })
            };
            if group.kind != kind {
                group.kind = kind;
                if let Some(mark) = usize::try_from(number).ok().and_then(|number| regrouped.get_mut(number)) {
                    *mark = true;
                }
            }
        };
        if all || !idle {
            self.peers.groups_mut().for_each(|(number, group)| regroup(number, group));
        } else {
            for number in fresh {
                if let Some(group) = self.peers.group_mut(*number) {
                    regroup(*number, group);
                }
            }
        }
        let doubts = sets.values().any(Set::doubts);
        let regions = all || news.borders || self.space.lacks(doubts);
        let mut named = Vec::new();
        if regions {
            // Only who denies pods must know where there may be more of them.
            let pods = doubts.then(|| PodRanges::of(view, &Holders::of(view)));
            let of = self.named(view.names);
            self.space.cut(&self.atoms, sets, pods.as_ref(), of, &mut self.kinds, budget)?;
        } else {
            named = self.follow_names(view.names);
        }
        self.taught = view.names.mark();
        let scan = regions || (!idle && regrouped.contains(&true));
        let moved = self.move_addresses(looks, scan, regions, &regrouped, &named);
        Ok(Recut { moved, named, regions })
    }

    /// What the domain names stand for that sets ask for: the atoms of each address.
    fn named(&self, learned: &Learned) -> BTreeMap<IpAddr, Vec<u32>> {
        let mut of: BTreeMap<IpAddr, Vec<u32>> = BTreeMap::new();
        for (number, names) in self.atoms.names() {
            learned.of(names).into_iter().for_each(|address| of.entry(address).or_default().push(number));
        }
        of
    }

    /// Looks at the addresses that were learned or forgotten, or at all if nobody knows which. Those that other names stand for now.
    fn follow_names(&mut self, learned: &Learned) -> Vec<IpAddr> {
        let mut named = Vec::new();
        let mut name = |space: &mut Space, address: IpAddr, atoms: Vec<u32>, kinds: &mut Kinds| {
            if space.name(address, atoms, kinds) {
                named.push(address);
            }
        };
        if let Some(changed) = learned.since(self.taught) {
            for address in changed {
                let atoms = self.atoms.names().filter(|(_, names)| learned.stand_for(names, address));
                let atoms = atoms.map(|(number, _)| number).collect();
                name(&mut self.space, address, atoms, &mut self.kinds);
            }
            return named;
        }
        let mut of = self.named(learned);
        for address in self.space.named() {
            of.entry(address).or_default();
        }
        of.into_iter().for_each(|(address, atoms)| name(&mut self.space, address, atoms, &mut self.kinds));
        named
    }

    fn move_addresses(
        &mut self,
        looks: &Looks,
        scan: bool,
        regions: bool,
        regrouped: &[bool],
        named: &[IpAddr],
    ) -> Vec<IpAddr> {
        let (groups, space, kinds) = (&self.peers, &self.space, &mut self.kinds);
        let group_kind = |number: u32| groups.group(number).map_or(NONE, |group| group.kind);
        let mut next = |group: u32, region: u32| match group {
            NONE => NONE,
            group => kinds.number(group_kind(group), space.matched(region)),
        };
        let marked = |group: u32| usize::try_from(group).ok().and_then(|group| regrouped.get(group)).copied();
        let mut moved: Vec<(IpAddr, u32, u32)> = Vec::new();
        if scan {
            for (ip, held) in groups.addresses.iter().filter(|(_, held)| held.group != NONE || held.kind != NONE) {
                let region = if regions || held.kind == NONE { space.find(*ip) } else { held.region };
                if !regions && held.kind != NONE && marked(held.group) == Some(false) {
                    continue;
                }
                let kind = next(held.group, region);
                if kind != held.kind || region != held.region {
                    moved.push((*ip, region, kind));
                }
            }
        }
        if let Looks::Moves(moves) = looks {
            for ip in moves.addresses.iter().chain(named) {
                let Some(held) = groups.addresses.get(ip) else { continue };
                let region = space.find(*ip);
                let kind = next(held.group, region);
                moved.push((*ip, region, kind));
            }
        }
        let mut others = Vec::new();
        for (ip, region, kind) in moved {
            let Some(held) = self.peers.addresses.get_mut(&ip) else { continue };
            held.region = region;
            if held.kind != kind {
                self.kinds.moved(held.kind, kind);
                held.kind = kind;
                others.push(ip);
            }
        }
        others
    }

    /// Has the sets say how they see what is new to them. Kinds whose content became another, with the one before. `left_by` are the contents
    /// that have a set in them which went.
    pub(super) fn classify(
        &mut self,
        sets: &mut BTreeMap<SetId, Set>,
        all: bool,
        turnover: &Turnover,
        left_by: &HashSet<u32>,
        budget: &mut Budget,
    ) -> Result<Classified, TooLarge> {
        let mut contents: BTreeMap<u32, Content> = BTreeMap::new();
        let mut asked: BTreeMap<SetId, Vec<u32>> = BTreeMap::new();
        let mut concerned: BTreeSet<SetId> = BTreeSet::new();
        let mut left: Vec<u32> = Vec::new();
        let flags: Vec<(SetId, bool, bool)> =
            sets.values().map(|set| (set.id, set.asks_everyone(), set.doubts())).filter(|(_, a, d)| *a || *d).collect();
        let came = atoms_of(sets, turnover);
        let mut looked_at = self.kinds.take_stirred();
        if all || flags.iter().any(|(set, ..)| turnover.came.contains(set)) {
            // Sets that ask for everybody may see any kind.
            looked_at.extend((0u32..).zip(&self.kinds.list).map(|(number, _)| number));
        } else {
            looked_at.extend(came.keys().flat_map(|atom| self.kinds.of_atom(*atom)));
            if !left_by.is_empty() {
                looked_at.extend(self.kinds.having(left_by));
            }
        }
        for number in looked_at {
            let Some(kind) = self.kinds.get(number) else { continue };
            let new = kind.content == NONE;
            match (kind.is_in_use(), new) {
                (false, true) => continue,
                (false, false) => {
                    left.push(number);
                    continue;
                }
                (true, false) if turnover.is_empty() => continue,
                (true, _) => {}
            }
            let sample = self.kinds.sample(number, &self.atoms);
            let mut by: Vec<SetId> = Vec::new();
            if new {
                by.extend(sample.atoms().flat_map(|atom| self.atoms.sets(atom)));
            } else {
                let matching = sample.atoms().filter_map(|atom| came.get(&atom)).flatten();
                by.extend(matching);
            }
            let counts = |set: &SetId| new || turnover.came.contains(set);
            let for_all = flags.iter().filter(|(set, ..)| counts(set));
            by.extend(for_all.filter(|(_, all, doubt)| *all || (*doubt && sample.may_be_pod())).map(|(set, ..)| *set));
            by.sort_unstable();
            by.dedup();
            let before = self.kinds.content(kind.content).map(|shared| shared.content.as_ref());
            let loses = before.is_some_and(|before| before.iter().any(|(set, _)| turnover.went.contains(set)));
            if !new && by.is_empty() && !loses {
                continue;
            }
            let kept = before.into_iter().flatten().filter(|(set, _)| !turnover.went.contains(set)).copied();
            contents.insert(number, kept.collect());
            by.into_iter().for_each(|set| asked.entry(set).or_default().push(number));
        }
        for (set, kinds) in asked {
            let Some(set) = sets.get_mut(&set) else { continue };
            concerned.insert(set.id);
            let classes = set.classify(&kinds, |kind| self.kinds.sample(kind, &self.atoms), budget)?;
            for (kind, class) in classes.into_iter().filter(|(_, class)| *class != LocalClass(0)) {
                contents.entry(kind).or_default().push((set.id, class));
            }
        }
        for kind in left {
            for (set, class) in self.kinds.content_of(kind).map(|shared| shared.content.as_slice()).unwrap_or_default()
            {
                if let Some(set) = sets.get_mut(set) {
                    set.release(*class);
                    concerned.insert(set.id);
                }
            }
            self.kinds.set_content(kind, None);
        }
        let mut changed = Vec::new();
        for (kind, mut content) in contents {
            content.sort_unstable();
            let before = self.kinds.get(kind).map_or(NONE, |kind| kind.content);
            self.kinds.set_content(kind, Some(content));
            changed.push((kind, before));
        }
        if all {
            concerned.extend(sets.keys());
        }
        Ok((changed, concerned))
    }
}

/// By atom, the sets that came and ask for it.
fn atoms_of(sets: &BTreeMap<SetId, Set>, turnover: &Turnover) -> HashMap<u32, Vec<SetId>> {
    let mut of: HashMap<u32, Vec<SetId>> = HashMap::new();
    for set in turnover.came.iter().filter_map(|set| sets.get(set)) {
        for atom in set.atoms() {
            let list = of.entry(atom).or_default();
            if list.last() != Some(&set.id) {
                list.push(set.id);
            }
        }
    }
    of
}
