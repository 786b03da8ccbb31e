//! Kinds of peers: two that no atom and no named port in force tells apart are of one kind.
//!
//! Finer than classes, since it is not asked here whether rules differ; coarser than groups. A kind is what a group's labels match together
//! with what the region of the address matches, and has one content: how each set sees it. Contents are kept once, with their class.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::sync::Arc;

use towpath_model::Protocol;
use towpath_model::desired::ClassId;

use super::atoms::Atoms;
use super::classes::Content;
use super::peers::NONE;
use super::set::Seen;

/// What a group matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct GroupKind {
    /// Atoms, sorted.
    pub(super) atoms: Box<[u32]>,
    /// Named ports (as [`Atoms::name`] counts them) with their numbers, sorted.
    pub(super) ports: Box<[(u32, u16)]>,
}

/// What a region matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct RegionKind {
    /// Atoms, sorted; of blocks only those that decide something there for some set ([`super::set::Set::decide_where`]).
    pub(super) atoms: Box<[u32]>,
    /// Pods may be there that are not known yet.
    pub(super) may_hold_pods: bool,
}

/// Values numbered in the order in which they turn up.
#[derive(Debug)]
pub(super) struct Numbered<T> {
    numbers: HashMap<Arc<T>, u32>,
    list: Vec<Arc<T>>,
}

impl<T> Default for Numbered<T> {
    fn default() -> Self {
        Self { numbers: HashMap::new(), list: Vec::new() }
    }
}

impl<T: Eq + Hash> Numbered<T> {
    /// The number of a value.
    pub(super) fn number(&mut self, value: T) -> u32 {
        if let Some(number) = self.numbers.get(&value) {
            return *number;
        }
        let number = u32::try_from(self.list.len()).unwrap_or(NONE);
        let value = Arc::new(value);
        self.list.push(value.clone());
        self.numbers.insert(value, number);
        number
    }

    /// The value of a number.
    pub(super) fn get(&self, number: u32) -> Option<&T> {
        self.list.get(usize::try_from(number).ok()?).map(Arc::as_ref)
    }

    fn len(&self) -> usize {
        self.list.len()
    }
}

/// A kind.
#[derive(Debug)]
pub(super) struct Kind {
    /// A [`GroupKind`]; [`NONE`]: in no group.
    pub(super) group: u32,
    /// A [`RegionKind`]; [`NONE`]: in no region.
    pub(super) region: u32,
    /// Addresses of the kind.
    pub(super) addresses: usize,
    /// Those of them that were of another, or were not there, in the last image.
    pub(super) arrived: usize,
    /// Regions of the kind.
    pub(super) regions: usize,
    /// How the sets see it; [`NONE`]: not asked yet.
    pub(super) content: u32,
}

impl Kind {
    /// Whether anything is of it.
    pub(super) fn is_in_use(&self) -> bool {
        self.addresses + self.regions > 0
    }
}

/// A content, and how many kinds have it.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) content: Arc<Content>,
    pub(super) kinds: usize,
    /// None: it is new.
    pub(super) class: Option<ClassId>,
}

/// All kinds.
#[derive(Debug, Default)]
pub(super) struct Kinds {
    pub(super) groups: Numbered<GroupKind>,
    pub(super) regions: Numbered<RegionKind>,
    numbers: HashMap<(u32, u32), u32>,
    pub(super) list: Vec<Kind>,
    /// Kinds by the atoms that match their group or region: who looks for those that a new set may tell from others need not ask all.
    by_atom: HashMap<u32, Vec<u32>>,
    /// Kinds that came into use, or fell out of it, since [`Kinds::take_stirred`].
    stirred: BTreeSet<u32>,
    /// How many are in use.
    used: usize,
    contents: HashMap<Arc<Content>, u32>,
    shared: Vec<Option<Shared>>,
    free: Vec<u32>,
    /// Contents that kinds left since [`Kinds::sweep`].
    left: BTreeSet<u32>,
}

impl Kinds {
    /// The kind of a group's kind in a region's kind.
    pub(super) fn number(&mut self, group: u32, region: u32) -> u32 {
        if let Some(number) = self.numbers.get(&(group, region)) {
            return *number;
        }
        let number = u32::try_from(self.list.len()).unwrap_or(NONE);
        self.list.push(Kind { group, region, addresses: 0, arrived: 0, regions: 0, content: NONE });
        self.numbers.insert((group, region), number);
        let of_group = self.groups.get(group).into_iter().flat_map(|kind| kind.atoms.iter());
        for atom in of_group.chain(self.regions.get(region).into_iter().flat_map(|kind| kind.atoms.iter())) {
            self.by_atom.entry(*atom).or_default().push(number);
        }
        number
    }

    /// Kinds whose group or region an atom matches, and some of which nothing is any more.
    pub(super) fn of_atom(&self, atom: u32) -> &[u32] {
        self.by_atom.get(&atom).map(Vec::as_slice).unwrap_or_default()
    }

    /// Kinds that have one of these contents.
    pub(super) fn having(&self, contents: &HashSet<u32>) -> impl Iterator<Item = u32> {
        (0u32..).zip(&self.list).filter(|(_, kind)| contents.contains(&kind.content)).map(|(number, _)| number)
    }

    /// The number of a content that is kept, also if no kind has it since [`Kinds::sweep`] was last called.
    pub(super) fn number_of(&self, content: &Content) -> Option<u32> {
        self.contents.get(content).copied()
    }

    /// A kind.
    pub(super) fn get(&self, number: u32) -> Option<&Kind> {
        self.list.get(usize::try_from(number).ok()?)
    }

    /// A kind, to count.
    pub(super) fn get_mut(&mut self, number: u32) -> Option<&mut Kind> {
        self.list.get_mut(usize::try_from(number).ok()?)
    }

    /// An address is of another kind now.
    pub(super) fn moved(&mut self, from: u32, to: u32) {
        self.count(from, |kind| kind.addresses = kind.addresses.saturating_sub(1));
        self.count(to, |kind| {
            kind.addresses += 1;
            kind.arrived += 1;
        });
    }

    /// A region is of this kind now.
    pub(super) fn region_came(&mut self, kind: u32) {
        self.count(kind, |kind| kind.regions += 1);
    }

    /// A region is not of this kind any more.
    pub(super) fn region_left(&mut self, kind: u32) {
        self.count(kind, |kind| kind.regions = kind.regions.saturating_sub(1));
    }

    fn count(&mut self, number: u32, change: impl FnOnce(&mut Kind)) {
        let Some(kind) = self.get_mut(number) else { return };
        let before = kind.is_in_use();
        change(kind);
        let after = kind.is_in_use();
        if before != after {
            self.used = if after { self.used + 1 } else { self.used.saturating_sub(1) };
            self.stirred.insert(number);
        }
    }

    /// Kinds that came into use, or fell out of it, since this was last asked.
    pub(super) fn take_stirred(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.stirred)
    }

    /// A content.
    pub(super) fn content(&self, number: u32) -> Option<&Shared> {
        self.shared.get(usize::try_from(number).ok()?)?.as_ref()
    }

    /// All contents.
    pub(super) fn contents(&self) -> impl Iterator<Item = (u32, &Shared)> {
        (0u32..).zip(&self.shared).filter_map(|(number, shared)| Some((number, shared.as_ref()?)))
    }

    /// The content of a kind.
    pub(super) fn content_of(&self, kind: u32) -> Option<&Shared> {
        self.content(self.get(kind)?.content)
    }

    /// The class of a kind; 0 before it has one.
    pub(super) fn class_of(&self, kind: u32) -> ClassId {
        self.content_of(kind).and_then(|shared| shared.class).unwrap_or_default()
    }

    /// Gives a kind a content, or none. What nobody has any more stays until [`Kinds::sweep`].
    pub(super) fn set_content(&mut self, kind: u32, content: Option<Content>) {
        let number = content.map_or(NONE, |content| self.share(content));
        let Some(before) = self.get_mut(kind).map(|kind| std::mem::replace(&mut kind.content, number)) else { return };
        if let Some(shared) = self.shared_mut(before) {
            shared.kinds = shared.kinds.saturating_sub(1);
            self.left.insert(before);
        }
    }

    /// Contents that no kind has any more.
    pub(super) fn unused(&self) -> impl Iterator<Item = &Shared> {
        self.left.iter().filter_map(|number| self.content(*number)).filter(|shared| shared.kinds == 0)
    }

    fn share(&mut self, content: Content) -> u32 {
        if let Some(number) = self.contents.get(&content).copied() {
            if let Some(shared) = self.shared_mut(number) {
                shared.kinds += 1;
            }
            return number;
        }
        let content = Arc::new(content);
        let shared = Some(Shared { content: content.clone(), kinds: 1, class: None });
        let number = match self.free.pop() {
            Some(number) => {
                if let Some(place) = usize::try_from(number).ok().and_then(|number| self.shared.get_mut(number)) {
                    *place = shared;
                }
                number
            }
            None => {
                self.shared.push(shared);
                u32::try_from(self.shared.len() - 1).unwrap_or(NONE)
            }
        };
        self.contents.insert(content, number);
        number
    }

    fn shared_mut(&mut self, number: u32) -> Option<&mut Shared> {
        self.shared.get_mut(usize::try_from(number).ok()?)?.as_mut()
    }

    /// The class of a content is this.
    pub(super) fn set_class(&mut self, content: u32, class: ClassId) {
        if let Some(shared) = self.shared_mut(content) {
            shared.class = Some(class);
        }
    }

    /// Forgets contents that no kind has.
    pub(super) fn sweep(&mut self) {
        for number in std::mem::take(&mut self.left) {
            let Some(place) = usize::try_from(number).ok().and_then(|number| self.shared.get_mut(number)) else {
                continue;
            };
            if place.as_ref().is_some_and(|shared| shared.kinds == 0)
                && let Some(shared) = place.take()
            {
                self.contents.remove(&shared.content);
                self.free.push(number);
            }
        }
    }

    /// Whether so much of it is of no use that it is time to begin anew.
    pub(super) fn is_littered(&self) -> bool {
        let used = self.used;
        self.list.len() > 2 * used + 1024 || self.groups.len() > 4 * used + 4096
    }

    /// A kind as sets look at it.
    pub(super) fn sample<'s>(&'s self, kind: u32, atoms: &'s Atoms) -> Sample<'s> {
        let kind = self.get(kind);
        Sample {
            names: atoms,
            group: kind.and_then(|kind| self.groups.get(kind.group)),
            region: kind.and_then(|kind| self.regions.get(kind.region)),
        }
    }
}

/// A kind, as sets look at it.
#[derive(Clone, Copy)]
pub(super) struct Sample<'s> {
    names: &'s Atoms,
    group: Option<&'s GroupKind>,
    region: Option<&'s RegionKind>,
}

impl Sample<'_> {
    /// Whether what its region matches, it does. A domain name is nobody whom a selector can match, whatever DNS says.
    fn is_of_region(&self, atom: u32) -> bool {
        self.group.is_none() || !self.names.is_named(atom)
    }
}

impl Seen for Sample<'_> {
    fn atoms(&self) -> impl Iterator<Item = u32> {
        let of_group = self.group.into_iter().flat_map(|kind| kind.atoms.iter());
        let of_region = self.region.into_iter().flat_map(|kind| kind.atoms.iter());
        of_group.chain(of_region.filter(|atom| self.is_of_region(**atom))).copied()
    }

    fn named_port(&self, name: &str, protocol: Protocol) -> Option<u16> {
        let name = self.names.name(name, protocol)?;
        self.group?.ports.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
    }

    fn may_be_pod(&self) -> bool {
        self.group.is_none() && self.region.is_some_and(|kind| kind.may_hold_pods)
    }
}
