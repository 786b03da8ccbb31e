//! The atoms and named ports of the programs in force, each once, and which groups they match.
//!
//! A group finds its atoms by its labels: each selector is filed under one label that it wants. So neither a new pod nor a new policy asks
//! every selector of every pod.

use std::collections::{BTreeSet, HashMap};

use ipnet::IpNet;
use towpath_model::desired::SetId;
use towpath_model::labels::Requirement;
use towpath_model::{DomainName, Labels, Protocol, World};

use super::peers::{Group, Who};
use super::program::{Atom, Within};

/// Labels of namespaces, each looked up once.
#[derive(Debug, Default)]
pub(super) struct NamespaceLabels(HashMap<String, Labels>);

impl NamespaceLabels {
    fn of(&mut self, world: &World, namespace: &str) -> &Labels {
        if !self.0.contains_key(namespace) {
            self.0.insert(namespace.to_owned(), world.namespace_labels(namespace));
        }
        static NONE: Labels = Labels::new();
        self.0.get(namespace).unwrap_or(&NONE)
    }

    /// They may be others now.
    pub(super) fn forget(&mut self, namespace: &str) {
        self.0.remove(namespace);
    }
}

/// Atoms about pods and nodes, filed by what their selectors want.
#[derive(Debug, Default)]
struct Filed {
    by_label: HashMap<String, HashMap<String, Vec<u32>>>,
    by_namespace: HashMap<String, Vec<u32>>,
    anywhere: Vec<u32>,
    nodes: Vec<u32>,
}

impl Filed {
    fn file(&mut self, number: u32, atom: &Atom) {
        match atom {
            Atom::Pods { within, pods } => {
                let fewest = pods.requirements().filter_map(|requirement| match requirement {
                    Requirement::In(key, values) => Some((key, values)),
                    _ => None,
                });
                match (fewest.min_by_key(|(_, values)| values.len()), within) {
                    (Some((key, values)), _) => {
                        let of_key = self.by_label.entry(key.clone()).or_default();
                        values.iter().for_each(|value| of_key.entry(value.clone()).or_default().push(number));
                    }
                    (None, Within::Namespace(name)) => {
                        self.by_namespace.entry(name.clone()).or_default().push(number);
                    }
                    (None, Within::Matching(_)) => self.anywhere.push(number),
                }
            }
            Atom::Nodes(_) => self.nodes.push(number),
            Atom::Block { .. } | Atom::Networks(_) | Atom::Names(_) => {}
        }
    }

    fn is_empty(&self) -> bool {
        self.by_label.is_empty() && self.by_namespace.is_empty() && self.anywhere.is_empty() && self.nodes.is_empty()
    }

    /// Those that may match a group.
    fn candidates<'s>(&'s self, who: &'s Who) -> Vec<u32> {
        match who {
            Who::Pods { namespace, labels, .. } => {
                let by_label = labels.iter().filter_map(|(key, value)| self.by_label.get(key)?.get(value)).flatten();
                let here = self.by_namespace.get(namespace).into_iter().flatten();
                by_label.chain(here).chain(&self.anywhere).copied().collect()
            }
            Who::Nodes(_) => self.nodes.clone(),
        }
    }
}

/// An atom, and who asks for it.
#[derive(Debug)]
struct Asked {
    atom: Atom,
    /// Sets with a clause of it. None: nobody asks any more; groups that match it are still told from others.
    sets: Vec<SetId>,
}

/// All atoms and named ports.
#[derive(Debug, Default)]
pub(super) struct Atoms {
    numbers: HashMap<Atom, u32>,
    list: Vec<Asked>,
    filed: Filed,
    /// Those about domain names.
    about_names: Vec<u32>,
    /// Named ports that egress rules ask of peers.
    names: HashMap<String, Vec<Named>>,
    name_count: u32,
    idle: usize,
    /// What came since [`Atoms::news`].
    fresh: Filed,
    fresh_names: Vec<(String, Protocol)>,
    /// Blocks came or went, or are asked for by another set.
    borders: bool,
}

/// A named port of one protocol.
#[derive(Debug)]
struct Named {
    protocol: Protocol,
    number: u32,
    /// How many sets ask for it.
    sets: usize,
}

/// What is new since it was last asked.
#[derive(Debug, Default)]
pub(super) struct News {
    atoms: Filed,
    names: Vec<(String, Protocol)>,
    /// Blocks came or went, or are asked for by another set.
    pub(super) borders: bool,
}

fn is_block(atom: &Atom) -> bool {
    matches!(atom, Atom::Block { .. } | Atom::Networks(_) | Atom::Names(_))
}

impl Atoms {
    /// A set asks for an atom; its number.
    pub(super) fn ask(&mut self, atom: &Atom, set: SetId) -> u32 {
        let number = match self.numbers.get(atom) {
            Some(number) => *number,
            None => {
                let number = u32::try_from(self.list.len()).unwrap_or(u32::MAX);
                self.numbers.insert(atom.clone(), number);
                self.list.push(Asked { atom: atom.clone(), sets: Vec::new() });
                self.idle += 1;
                if matches!(atom, Atom::Names(_)) {
                    self.about_names.push(number);
                }
                self.filed.file(number, atom);
                self.fresh.file(number, atom);
                number
            }
        };
        let asked = usize::try_from(number).ok().and_then(|number| self.list.get_mut(number));
        if let Some(asked) = asked
            && asked.sets.last() != Some(&set)
            && !asked.sets.contains(&set)
        {
            if asked.sets.is_empty() {
                self.idle -= 1;
            }
            // Also if others ask for it: where it decides something differs from set to set.
            self.borders |= is_block(atom);
            asked.sets.push(set);
        }
        number
    }

    /// A set asks for it no more.
    pub(super) fn leave(&mut self, number: u32, set: SetId) {
        let Some(asked) = usize::try_from(number).ok().and_then(|number| self.list.get_mut(number)) else { return };
        let before = asked.sets.len();
        asked.sets.retain(|other| *other != set);
        if before > 0 && asked.sets.is_empty() {
            self.idle += 1;
            self.borders |= is_block(&asked.atom);
        }
    }

    /// A set asks what a named port is in its peers.
    pub(super) fn ask_name(&mut self, name: &str, protocol: Protocol) {
        let of_name = self.names.entry(name.to_owned()).or_default();
        if let Some(named) = of_name.iter_mut().find(|named| named.protocol == protocol) {
            named.sets += 1;
            return;
        }
        of_name.push(Named { protocol, number: self.name_count, sets: 1 });
        self.name_count += 1;
        self.fresh_names.push((name.to_owned(), protocol));
    }

    /// A set asks so no more.
    pub(super) fn leave_name(&mut self, name: &str, protocol: Protocol) {
        let named = self.names.get_mut(name).and_then(|list| list.iter_mut().find(|named| named.protocol == protocol));
        if let Some(named) = named {
            named.sets = named.sets.saturating_sub(1);
        }
    }

    /// The number of a named port that is asked for.
    pub(super) fn name(&self, name: &str, protocol: Protocol) -> Option<u32> {
        self.names.get(name)?.iter().find(|named| named.protocol == protocol).map(|named| named.number)
    }

    /// Sets that ask for an atom.
    pub(super) fn sets(&self, number: u32) -> &[SetId] {
        let asked = usize::try_from(number).ok().and_then(|number| self.list.get(number));
        asked.map(|asked| asked.sets.as_slice()).unwrap_or_default()
    }

    /// Whether so many are idle that it is time to begin anew.
    pub(super) fn is_littered(&self) -> bool {
        let idle_names = self.names.values().flatten().filter(|named| named.sets == 0).count();
        self.idle > self.list.len() / 2 + 256 || idle_names > self.names.len() / 2 + 256
    }

    /// A bound of the numbers.
    pub(super) fn bound(&self) -> usize {
        self.list.len()
    }

    /// Atoms about addresses that somebody asks for.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (u32, &Atom)> {
        let asked = (0u32..).zip(&self.list).filter(|(_, asked)| !asked.sets.is_empty());
        asked.map(|(number, asked)| (number, &asked.atom)).filter(|(_, atom)| is_block(atom))
    }

    /// The atoms about domain names that somebody asks for, ascending, with their patterns.
    pub(super) fn names(&self) -> impl Iterator<Item = (u32, &[DomainName])> {
        self.about_names.iter().filter_map(|number| {
            let asked = self.list.get(usize::try_from(*number).ok()?).filter(|asked| !asked.sets.is_empty())?;
            match &asked.atom {
                Atom::Names(names) => Some((*number, names.as_slice())),
                _ => None,
            }
        })
    }

    /// Whether an atom is about domain names: then it is about nobody whom a selector can match.
    pub(super) fn is_named(&self, number: u32) -> bool {
        let asked = usize::try_from(number).ok().and_then(|number| self.list.get(number));
        asked.is_some_and(|asked| matches!(asked.atom, Atom::Names(_)))
    }

    /// All borders of these, but for those of domain names.
    pub(super) fn borders(&self) -> BTreeSet<IpNet> {
        let mut borders = BTreeSet::new();
        for (_, atom) in self.blocks() {
            match atom {
                Atom::Block { cidr, except } => {
                    borders.insert(*cidr);
                    borders.extend(except);
                }
                Atom::Networks(networks) => borders.extend(networks),
                Atom::Pods { .. } | Atom::Nodes(_) | Atom::Names(_) => {}
            }
        }
        borders
    }

    /// What came since this was last asked.
    pub(super) fn news(&mut self) -> News {
        News {
            atoms: std::mem::take(&mut self.fresh),
            names: std::mem::take(&mut self.fresh_names),
            borders: std::mem::take(&mut self.borders),
        }
    }

    fn matches(&self, number: u32, who: &Who, namespaces: &mut NamespaceLabels, world: &World) -> bool {
        let asked = usize::try_from(number).ok().and_then(|number| self.list.get(number));
        match (asked.map(|asked| &asked.atom), who) {
            (Some(Atom::Pods { within, pods }), Who::Pods { namespace, labels, .. }) => {
                let inside = match within {
                    Within::Namespace(name) => name == namespace,
                    Within::Matching(selector) => {
                        selector.is_everything() || selector.matches(namespaces.of(world, namespace))
                    }
                };
                inside && pods.matches(labels)
            }
            (Some(Atom::Nodes(selector)), Who::Nodes(nodes)) => nodes.iter().any(|labels| selector.matches(labels)),
            _ => false,
        }
    }

    /// The atoms that match a group, sorted.
    pub(super) fn of_group(&self, group: &Group, namespaces: &mut NamespaceLabels, world: &World) -> Vec<u32> {
        self.among(self.filed.candidates(&group.who), group, namespaces, world)
    }

    /// Of what is new, the atoms that match a group, sorted.
    pub(super) fn new_of_group(
        &self,
        news: &News,
        group: &Group,
        namespaces: &mut NamespaceLabels,
        world: &World,
    ) -> Vec<u32> {
        if news.atoms.is_empty() {
            return Vec::new();
        }
        self.among(news.atoms.candidates(&group.who), group, namespaces, world)
    }

    fn among(&self, mut list: Vec<u32>, group: &Group, namespaces: &mut NamespaceLabels, world: &World) -> Vec<u32> {
        list.retain(|number| self.matches(*number, &group.who, namespaces, world));
        list.sort_unstable();
        list.dedup();
        list
    }

    /// The numbers of the named ports that are asked for, in a group; sorted.
    pub(super) fn ports_of(&self, group: &Group) -> Vec<(u32, u16)> {
        let Some(peer) = group.as_peer() else { return Vec::new() };
        let mut ports: Vec<(u32, u16)> = Vec::new();
        for port in peer.named_ports.iter().filter(|_| !self.names.is_empty()) {
            // Of two ports of one name the first counts.
            if let Some(name) = self.name(&port.name, port.protocol)
                && !ports.iter().any(|(known, _)| *known == name)
            {
                ports.push((name, port.number));
            }
        }
        ports.sort_unstable();
        ports
    }
}

impl News {
    /// Whether a named port of a group is asked for that was not before.
    pub(super) fn names_port_of(&self, group: &Group) -> bool {
        self.names.iter().any(|(name, protocol)| group.named_port(name, *protocol).is_some())
    }

    /// Whether it is all about addresses, or nothing.
    pub(super) fn spares_groups(&self) -> bool {
        self.atoms.is_empty() && self.names.is_empty()
    }
}
