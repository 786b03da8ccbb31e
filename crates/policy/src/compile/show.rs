//! What the image shows of classes, and how that differs from the image before.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use towpath_model::desired::{ClassId, PolicyChanges, PolicyImage};

use super::Compiler;
use super::classes::{Classes, Content, Turnover, Votes, remaining};
use super::kinds::Kind;
use super::peers::{Held, NONE};
use super::sight::{Looks, Recut, Sight};

/// Classes that are seen otherwise now; none: gone.
type Reclassed = Vec<(ClassId, Option<Arc<Content>>)>;

/// Kinds that are of another class now.
pub(super) type Otherwise = HashSet<u32>;

impl Sight {
    /// Who was in which class: of each of these contents the members by the class that they were in.
    fn votes(
        &self,
        changed: &BTreeMap<u32, u32>,
        moved: &[IpAddr],
        regions: &HashMap<IpNet, ClassId>,
        index: &HashMap<u32, usize>,
    ) -> Votes {
        let mut votes = Votes::new();
        let mut vote = |content: u32, class: Option<ClassId>, count: usize| {
            if let (Some(content), Some(class)) = (index.get(&content), class)
                && count > 0
            {
                *votes.entry((*content, class)).or_default() += count;
            }
        };
        for (number, kind) in (0u32..).zip(&self.kinds.list).filter(|(_, kind)| kind.addresses > kind.arrived) {
            if !index.contains_key(&kind.content) {
                continue;
            }
            let before = changed.get(&number).copied().unwrap_or(kind.content);
            let class = self.kinds.content(before).and_then(|shared| shared.class);
            vote(kind.content, class, kind.addresses - kind.arrived);
        }
        let content = |kind: u32| self.kinds.get(kind).map_or(NONE, |kind| kind.content);
        for held in moved.iter().filter_map(|ip| self.peers.addresses.get(ip)) {
            vote(content(held.kind), held.class, 1);
        }
        for (net, kind, _) in self.space.iter() {
            let content = content(kind);
            if index.contains_key(&content) {
                vote(content, regions.get(&net).copied(), 1);
            }
        }
        votes
    }

    /// The classes of all contents, since the regions are others.
    pub(super) fn reassign(
        &mut self,
        classes: &mut Classes,
        changed: &[(u32, u32)],
        moved: &[IpAddr],
        turnover: &Turnover,
    ) -> Reclassed {
        let used = self.kinds.contents().filter(|(_, shared)| shared.kinds > 0);
        let numbers: Vec<u32> = used.map(|(number, _)| number).collect();
        let olds = classes.contents.keys().copied().collect();
        self.reassign_these(classes, &numbers, &olds, changed, moved, turnover)
    }

    /// The same after sets came or went, while the regions are those of before: of the contents that became others with them, and of those that
    /// may inherit a class with one of these. Every other content is seen as before by sets that stay, and so is nothing else: it keeps its class.
    /// `left` are the classes that a set saw which went.
    pub(super) fn reassign_some(
        &mut self,
        classes: &mut Classes,
        changed: &[(u32, u32)],
        moved: &[IpAddr],
        turnover: &Turnover,
        left: &BTreeSet<ClassId>,
    ) -> (Reclassed, Otherwise) {
        let of_kind = |kind: &u32| self.kinds.get(*kind).map(|kind| kind.content).filter(|content| *content != NONE);
        let mut numbers: BTreeSet<u32> = changed.iter().filter_map(|(kind, _)| of_kind(kind)).collect();
        let mut olds = left.clone();
        for number in numbers.clone() {
            let Some(shared) = self.kinds.content(number) else { continue };
            let seen = remaining(&shared.content, &turnover.came);
            // As it was before any of these sets came: what is still so, and the class that was.
            if let Some(number) = self.kinds.number_of(&seen)
                && let Some(shared) = self.kinds.content(number)
            {
                olds.extend(shared.class.filter(|_| !seen.is_empty()));
                if shared.kinds > 0 {
                    numbers.insert(number);
                }
            }
        }
        let unused = self.kinds.unused().filter(|shared| !shared.content.is_empty());
        olds.extend(unused.filter_map(|shared| shared.class));
        let before: HashMap<u32, u32> = changed.iter().copied().collect();
        let class_before = |number: u32, content: u32| {
            let content = before.get(&number).copied().unwrap_or(content);
            self.kinds.content(content).and_then(|shared| shared.class).unwrap_or_default()
        };
        let concerned = (0u32..).zip(&self.kinds.list).filter(|(_, kind)| numbers.contains(&kind.content));
        let was: Vec<(u32, ClassId)> =
            concerned.map(|(number, kind)| (number, class_before(number, kind.content))).collect();
        let numbers: Vec<u32> = numbers.into_iter().collect();
        let reclassed = self.reassign_these(classes, &numbers, &olds, changed, moved, turnover);
        let otherwise = was.into_iter().filter(|(kind, class)| self.kinds.class_of(*kind) != *class);
        (reclassed, otherwise.map(|(kind, _)| kind).collect())
    }

    /// The classes of these contents, which inherit from these classes: those of them that nobody inherits are gone.
    fn reassign_these(
        &mut self,
        classes: &mut Classes,
        numbers: &[u32],
        olds: &BTreeSet<ClassId>,
        changed: &[(u32, u32)],
        moved: &[IpAddr],
        turnover: &Turnover,
    ) -> Reclassed {
        let contents: Vec<Arc<Content>> = numbers
            .iter()
            .map(|number| self.kinds.content(*number).map(|shared| shared.content.clone()).unwrap_or_default())
            .collect();
        let index: HashMap<u32, usize> = numbers.iter().copied().zip(0..).collect();
        let votes = self.votes(&changed.iter().copied().collect(), moved, &classes.regions, &index);
        let ids = classes.assign(&contents, &votes, turnover, olds);
        for (number, id) in numbers.iter().zip(&ids) {
            self.kinds.set_class(*number, *id);
        }
        self.kinds.sweep();
        let named = ids.into_iter().zip(contents).filter(|(_, content)| !content.is_empty());
        let next: BTreeMap<ClassId, Arc<Content>> = named.collect();
        let gone = olds.iter().filter(|id| classes.contents.contains_key(id) && !next.contains_key(id));
        let mut reclassed: Reclassed = gone.map(|id| (*id, None)).collect();
        reclassed.extend(
            next.into_iter()
                .filter(|(id, content)| classes.contents.get(id) != Some(content))
                .map(|(id, content)| (id, Some(content))),
        );
        reclassed
    }

    /// The classes of contents that are new, while the sets and regions are those of before.
    pub(super) fn add_classes(&mut self, classes: &mut Classes, changed: &[(u32, u32)]) -> Reclassed {
        let mut fresh: BTreeMap<Arc<Content>, u32> = BTreeMap::new();
        for (kind, _) in changed {
            let Some(number) = self.kinds.get(*kind).map(|kind| kind.content) else { continue };
            if let Some(shared) = self.kinds.content(number)
                && shared.class.is_none()
            {
                fresh.insert(shared.content.clone(), number);
            }
        }
        let unused = self.kinds.unused().filter(|shared| !shared.content.is_empty());
        let mut reclassed: Reclassed = unused.filter_map(|shared| Some((shared.class?, None))).collect();
        for (content, number) in fresh {
            let id = if content.is_empty() { ClassId::default() } else { ClassId(classes.ids.take()) };
            self.kinds.set_class(number, id);
            if !content.is_empty() {
                reclassed.push((id, Some(content)));
            }
        }
        self.kinds.sweep();
        reclassed
    }

    /// Nothing has moved since the image.
    pub(super) fn settle(&mut self, moved: &[IpAddr]) {
        for ip in moved {
            let Some(kind) = self.peers.addresses.get(ip).map(|held| held.kind) else { continue };
            if let Some(kind) = self.kinds.get_mut(kind) {
                kind.arrived = 0;
            }
            self.peers.forget(*ip);
        }
    }
}

/// What an address shows.
fn show(image: &mut PolicyImage, changes: &mut PolicyChanges, ip: IpAddr, held: &mut Held, of: (ClassId, ClassId)) {
    let (class, around) = of;
    let is_peer = held.kind != NONE;
    // What a shorter prefix already implies is left out.
    let wanted = (is_peer && class != around).then_some(class);
    let was = held.class.filter(|_| held.shown);
    held.class = is_peer.then_some(class);
    held.shown = wanted.is_some();
    if wanted == was {
        return;
    }
    match wanted {
        Some(class) => drop(image.pod_classes.insert(ip, class)),
        None => drop(image.pod_classes.remove(&ip)),
    }
    changes.pod_classes.insert(ip, wanted);
}

impl Compiler {
    /// How the sets see each class.
    pub(super) fn show_set_classes(&mut self, reclassed: Reclassed, now: Duration) {
        let (image, changes) = (&mut self.image.set_classes, &mut self.changes.set_classes);
        for (id, next) in reclassed {
            let before = match &next {
                Some(content) => self.classes.contents.insert(id, content.clone()),
                None => {
                    self.classes.ids.release(id.0, now);
                    self.classes.contents.remove(&id)
                }
            };
            let next = next.as_deref().map(Vec::as_slice).unwrap_or_default();
            for (set, _) in before.iter().flat_map(|before| before.iter()) {
                if next.binary_search_by_key(set, |(set, _)| *set).is_err() {
                    image.remove(&(*set, id));
                    changes.insert((*set, id), None);
                }
            }
            for (set, class) in next {
                // Of a first image nobody asks what changed.
                if image.insert((*set, id), *class) != Some(*class) && self.compiled {
                    changes.insert((*set, id), Some(*class));
                }
            }
        }
    }

    /// Classes of addresses and regions; `otherwise` are the kinds that are of another class, none: it may be any, and the regions are others.
    pub(super) fn show_addresses(
        &mut self,
        sight: &mut Sight,
        looks: &Looks,
        recut: &Recut,
        otherwise: Option<&Otherwise>,
    ) {
        match otherwise {
            None => self.with_classes(sight),
            Some(otherwise) => {
                let of = |kind: &u32| sight.kinds.get(*kind).is_some_and(|kind| kind.regions > 0);
                if otherwise.iter().any(of) {
                    self.with_some_classes(sight, otherwise);
                }
                recut.named.iter().for_each(|address| self.show_point(sight, *address));
            }
        }
        let (image, changes) = (&mut self.image, &mut self.changes);
        let (kinds, space) = (&sight.kinds, &sight.space);
        let of = |held: &Held| (kinds.class_of(held.kind), kinds.class_of(space.kind(held.region)));
        match otherwise {
            None => {
                for (ip, held) in &mut sight.peers.addresses {
                    show(image, changes, *ip, held, of(held));
                }
            }
            Some(otherwise) => {
                for ip in &recut.moved {
                    if let Some(held) = sight.peers.addresses.get_mut(ip) {
                        show(image, changes, *ip, held, of(held));
                    }
                }
                // Most changes are about nobody, or about somebody new.
                let counts = |counted: fn(&Kind) -> usize| {
                    otherwise.iter().filter_map(|kind| kinds.get(*kind)).any(|kind| counted(kind) > 0)
                };
                let (own, around) = (counts(|kind| kind.addresses), counts(|kind| kind.regions));
                if own || around {
                    let is_other = |held: &Held| {
                        otherwise.contains(&held.kind) || (around && otherwise.contains(&space.kind(held.region)))
                    };
                    for (ip, held) in sight.peers.addresses.iter_mut().filter(|(_, held)| is_other(held)) {
                        show(image, changes, *ip, held, of(held));
                    }
                }
            }
        }
        if let Looks::All { gone } = looks {
            for ip in gone {
                image.pod_classes.remove(ip);
                changes.pod_classes.insert(*ip, None);
            }
        }
    }

    /// As [`Compiler::with_classes`], of the regions that are of these kinds, or inside of one.
    fn with_some_classes(&mut self, sight: &Sight, otherwise: &Otherwise) {
        let concerned = |(_, kind, around): &(IpNet, u32, u32)| otherwise.contains(kind) || otherwise.contains(around);
        for (net, kind, around) in sight.space.iter().filter(concerned) {
            let (own, around) = (sight.kinds.class_of(kind), sight.kinds.class_of(around));
            self.show_region(net, Some((own, around)));
        }
    }

    /// Classes of regions; an entry that a shorter prefix already implies is left out.
    fn with_classes(&mut self, sight: &Sight) {
        let mut shown: BTreeMap<IpNet, ClassId> = BTreeMap::new();
        self.classes.regions.clear();
        for (net, kind, around) in sight.space.iter() {
            let (own, around) = (sight.kinds.class_of(kind), sight.kinds.class_of(around));
            self.classes.regions.insert(net, own);
            if own != around {
                shown.insert(net, own);
            }
        }
        let changes = &mut self.changes.cidr_classes;
        for net in self.image.cidr_classes.keys().filter(|net| !shown.contains_key(net)) {
            changes.insert(*net, None);
        }
        for (net, class) in &shown {
            if self.image.cidr_classes.get(net) != Some(class) {
                changes.insert(*net, Some(*class));
            }
        }
        self.image.cidr_classes = shown;
    }

    /// The class of one address that names stand for, or do no more.
    fn show_point(&mut self, sight: &Sight, address: IpAddr) {
        let classes = sight.space.at(address);
        let classes = classes.map(|(own, around)| (sight.kinds.class_of(own), sight.kinds.class_of(around)));
        self.show_region(IpNet::from(address), classes);
    }

    /// The class of a region, and of what is around it; none: it is no region any more.
    fn show_region(&mut self, net: IpNet, classes: Option<(ClassId, ClassId)>) {
        match classes {
            Some((own, _)) => drop(self.classes.regions.insert(net, own)),
            None => drop(self.classes.regions.remove(&net)),
        }
        let wanted = classes.filter(|(own, around)| own != around).map(|(own, _)| own);
        let was = match wanted {
            Some(class) => self.image.cidr_classes.insert(net, class),
            None => self.image.cidr_classes.remove(&net),
        };
        if was != wanted {
            self.changes.cidr_classes.insert(net, wanted);
        }
    }
}
