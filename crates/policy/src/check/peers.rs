//! All peers, cut where some policy in force on the node, or some entry of the image, may tell two of them apart.
//!
//! Unlike the compiler's cut, this one knows nothing of groups and regions: who holds an address is looked at by his labels, and addresses
//! are cut at both ends of every range that anybody speaks of.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use towpath_model::desired::{ClassId, PolicyImage};
use towpath_model::labels::Requirement;
use towpath_model::{Labels, NamedPort, Node, Protocol, Selector, World};

use super::Whom;
use super::effort::{Effort, TooMuch};
use super::subject::Subjects;
use crate::image::prefix_class;
use crate::verify::addresses::{Addresses, address as at, number};
use crate::verify::clauses::{Namespaces, PodSet};
use crate::view::{Holder, Holders, PeerPod, View, never_given};

/// What a clause asks of a peer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Matcher<'w> {
    /// It is one of these pods.
    Pods(PodSet<'w>),
    /// It is one of these nodes.
    Nodes(&'w Selector),
    /// It has one of these addresses.
    Addresses(Addresses),
    /// It has one of these addresses, and is nobody whom a selector can match.
    Outside(Addresses),
    /// It is a pod that has a port of this name.
    Calls(&'w str, Protocol),
    /// It may be a pod that is not known yet.
    MayBePod,
}

/// Peers that nothing tells apart.
#[derive(Debug)]
pub(super) struct Kind<'a> {
    /// Numbers of the matchers that match it, ascending.
    pub(super) matched: Vec<u32>,
    pub(super) class: ClassId,
    /// One of them.
    pub(super) sample: IpAddr,
    /// Its named ports.
    pub(super) named: &'a [NamedPort],
    pub(super) may_be_pod: bool,
}

/// All peers.
#[derive(Debug, Default)]
pub(super) struct Peers<'a> {
    kinds: Vec<Kind<'a>>,
    known: HashMap<Same, u32>,
    by_matcher: HashMap<u32, Vec<u32>>,
    by_class: HashMap<ClassId, Vec<u32>>,
    /// Classes of whom no matcher matches.
    unmatched: HashSet<ClassId>,
}

/// What makes two peers of one kind: matchers, what the ports that matchers ask for are, and the class.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Same {
    matched: Vec<u32>,
    ports: Vec<u16>,
    class: ClassId,
    may_be_pod: bool,
}

/// What peers are seen with.
struct Seen<'s, 'a> {
    holders: &'s Holders<'a>,
    image: &'s PolicyImage,
    line: Line,
    identities: Identities<'s, 'a>,
    /// Where pods may be that are not known yet.
    pods: Addresses,
}

impl<'a> Peers<'a> {
    /// Cuts them, or these.
    pub(super) fn cut(
        view: &View<'a>,
        holders: &Holders<'a>,
        image: &PolicyImage,
        subjects: &Subjects<'a>,
        whom: Option<&Whom<'_>>,
        effort: &mut Effort,
    ) -> Result<Self, TooMuch> {
        let matchers = &subjects.matchers.list;
        let doubts = matchers.contains(&Matcher::MayBePod);
        let pods = if doubts { where_pods_may_be(view.world) } else { Addresses::default() };
        let line = Line::cut(matchers, image, whom, &pods, effort)?;
        let identities = Identities::of(matchers, view.world);
        let mut seen = Seen { holders, image, line, identities, pods };
        let mut peers = Self::default();
        let asked = |address: IpAddr| whom.is_none_or(|whom| whom.has(address));
        let mut held: HashSet<IpAddr> = HashSet::new();
        for (address, holder) in holders.all().filter(|(address, _)| asked(*address)) {
            held.insert(address);
            peers.add(address, Some(holder), &mut seen);
        }
        // What the image says of an address that nobody holds.
        let unheld = whom.map(|whom| whom.peers.iter());
        let unheld: Vec<IpAddr> = match unheld {
            Some(unheld) => unheld.copied().collect(),
            None => image.pod_classes.keys().copied().collect(),
        };
        for address in unheld {
            if held.insert(address) {
                peers.add(address, None, &mut seen);
            }
        }
        for interval in 0..seen.line.starts.len() {
            let first = seen.line.starts.get(interval).copied().map(at);
            if first.is_some_and(|first| whom.is_none_or(|whom| whom.prefixes.has(first)))
                && let Some(address) = seen.line.somebody_in(interval, &held)
            {
                peers.add(address, None, &mut seen);
            }
        }
        Ok(peers)
    }

    fn add(&mut self, address: IpAddr, holder: Option<Holder<'a>>, seen: &mut Seen<'_, 'a>) {
        let Some(interval) = seen.line.interval(address) else { return };
        let nodes = seen.holders.nodes_at(address);
        let peer = holder.and_then(|holder| holder.as_peer());
        let nobody = matches!(holder, None | Some(Holder::UnknownPod(_)));
        let may_be_pod = nobody && seen.pods.has(address);
        let mut matched = seen.identities.matched(peer, nodes);
        matched
            .extend(seen.line.matched(interval).iter().filter(|number| nobody || !seen.line.outside.contains(number)));
        matched.extend(seen.identities.may_be_pod.filter(|_| may_be_pod));
        matched.sort_unstable();
        let named = peer.map_or(&[][..], |peer| peer.named_ports);
        let class = seen.image.pod_classes.get(&address).copied();
        let class = class.unwrap_or_else(|| seen.line.class(seen.image, interval));
        // Most of many: nobody asks for them, and one of each class stands for all.
        if matched.is_empty() && !may_be_pod && !self.unmatched.insert(class) {
            return;
        }
        let same = Same { ports: seen.identities.ports(&matched, named), matched, class, may_be_pod };
        if self.known.contains_key(&same) {
            return;
        }
        let number = u32::try_from(self.kinds.len()).unwrap_or(u32::MAX);
        for matcher in &same.matched {
            self.by_matcher.entry(*matcher).or_default().push(number);
        }
        self.by_class.entry(class).or_default().push(number);
        self.kinds.push(Kind { matched: same.matched.clone(), class, sample: address, named, may_be_pod });
        self.known.insert(same, number);
    }

    pub(super) fn len(&self) -> usize {
        self.kinds.len()
    }

    pub(super) fn all(&self) -> &[Kind<'a>] {
        &self.kinds
    }

    /// The numbers of the kinds of a class.
    pub(super) fn of_class(&self, class: ClassId) -> &[u32] {
        self.by_class.get(&class).map(Vec::as_slice).unwrap_or_default()
    }

    /// The numbers of the kinds that a matcher matches.
    pub(super) fn matched_by(&self, matcher: u32) -> &[u32] {
        self.by_matcher.get(&matcher).map(Vec::as_slice).unwrap_or_default()
    }
}

/// Where pods may be of which nobody has heard: in the nodes' ranges, but not at the addresses that no pod is given.
fn where_pods_may_be(world: &World) -> Addresses {
    let ranges = world.nodes.values().flat_map(|node| &node.pod_cidrs);
    let never: Vec<Addresses> = ranges.clone().flat_map(never_given).map(Addresses::one).collect();
    Addresses::of_all(ranges).without(&Addresses::any_of(&never))
}

/// The line of all addresses, cut into intervals in which nothing but the holders tells two addresses apart.
struct Line {
    /// First number of each interval, ascending, from 0.
    starts: Vec<u128>,
    matched: Vec<Vec<u32>>,
    /// Those of them that are about nobody whom a selector can match.
    outside: HashSet<u32>,
    /// As far as it was asked.
    classes: Vec<Option<ClassId>>,
}

impl Line {
    fn cut(
        matchers: &[Matcher<'_>],
        image: &PolicyImage,
        whom: Option<&Whom<'_>>,
        pods: &Addresses,
        effort: &mut Effort,
    ) -> Result<Self, TooMuch> {
        let blocks = || {
            (0u32..).zip(matchers).filter_map(|(number, matcher)| match matcher {
                Matcher::Addresses(addresses) | Matcher::Outside(addresses) => Some((number, addresses)),
                _ => None,
            })
        };
        let mut starts = BTreeSet::from([0]);
        let mut border = |first: u128, last: u128| {
            starts.insert(first);
            starts.extend(last.checked_add(1));
        };
        let single = whom.filter(|whom| whom.prefixes.is_empty());
        match single {
            // Each address is an interval of its own: whatever else borders anywhere tells nothing of it.
            Some(whom) => whom.peers.iter().map(|address| number(*address)).for_each(|n| border(n, n)),
            None => {
                let prefixes = image.cidr_classes.keys().map(Addresses::of).collect::<Vec<_>>();
                let families = [towpath_model::Family::V4, towpath_model::Family::V6].map(Addresses::of_family);
                let more = whom.map(|whom| &whom.prefixes);
                let all = blocks().map(|(_, addresses)| addresses);
                let all = all.chain(&prefixes).chain([pods]).chain(more).chain(&families);
                all.flat_map(|addresses| addresses.0.iter()).for_each(|(first, last)| border(first, last));
            }
        }
        let starts: Vec<u128> = starts.into_iter().collect();
        let mut matched = vec![Vec::new(); starts.len()];
        for (number, addresses) in blocks() {
            for (first, last) in addresses.0.iter() {
                let (from, to) = (starts.partition_point(|s| *s < first), starts.partition_point(|s| *s <= last));
                effort.take(to.saturating_sub(from))?;
                matched.get_mut(from..to).into_iter().flatten().for_each(|list: &mut Vec<u32>| list.push(number));
            }
        }
        let classes = if single.is_some() { vec![None; starts.len()] } else { classes_at(&starts, image) };
        let outside = (0u32..).zip(matchers).filter(|(_, matcher)| matches!(matcher, Matcher::Outside(_)));
        let outside = outside.map(|(number, _)| number).collect();
        Ok(Self { starts, matched, outside, classes })
    }

    fn interval(&self, address: IpAddr) -> Option<usize> {
        let number = number(address);
        self.starts.partition_point(|start| *start <= number).checked_sub(1)
    }

    fn matched(&self, interval: usize) -> &[u32] {
        self.matched.get(interval).map(Vec::as_slice).unwrap_or_default()
    }

    /// The class of who is no pod. No prefix of the image ends within an interval, so one address tells.
    fn class(&mut self, image: &PolicyImage, interval: usize) -> ClassId {
        let (Some(start), Some(class)) = (self.starts.get(interval), self.classes.get_mut(interval)) else {
            return ClassId::default();
        };
        *class.get_or_insert_with(|| prefix_class(image, at(*start)))
    }

    /// An address of an interval that nobody holds.
    fn somebody_in(&self, interval: usize, held: &HashSet<IpAddr>) -> Option<IpAddr> {
        let first = *self.starts.get(interval)?;
        let end = self.starts.get(interval + 1).copied();
        let mut numbers = (first..=u128::MAX).take_while(|number| end.is_none_or(|end| *number < end));
        numbers.find_map(|number| Some(at(number)).filter(|address| !held.contains(address)))
    }
}

/// The classes of the longest prefixes that ascending places of the line are in, as [`prefix_class`] finds them one by one.
fn classes_at(starts: &[u128], image: &PolicyImage) -> Vec<Option<ClassId>> {
    // A prefix sorts right before those inside it. One that has bits behind its length is never found.
    let known = || image.cidr_classes.iter().filter(|(net, _)| **net == net.trunc());
    let mut v4 = Nested { rest: known().filter(|(net, _)| net.addr().is_ipv4()).peekable(), open: Vec::new() };
    let mut v6 = Nested { rest: known().filter(|(net, _)| net.addr().is_ipv6()).peekable(), open: Vec::new() };
    let class = |start: &u128| match at(*start) {
        address @ IpAddr::V4(_) => v4.class(address),
        address @ IpAddr::V6(_) => v6.class(address),
    };
    starts.iter().map(class).map(Some).collect()
}

/// Prefixes of one family, walked along.
struct Nested<'i, I: Iterator<Item = (&'i IpNet, &'i ClassId)>> {
    rest: std::iter::Peekable<I>,
    /// Those that the last address was in, each in the one before.
    open: Vec<(IpAddr, ClassId)>,
}

impl<'i, I: Iterator<Item = (&'i IpNet, &'i ClassId)>> Nested<'i, I> {
    /// The class of an address, which must not be below the one before.
    fn class(&mut self, address: IpAddr) -> ClassId {
        while let Some((net, class)) = self.rest.next_if(|(net, _)| net.network() <= address) {
            self.close(net.network());
            self.open.push((net.broadcast(), *class));
        }
        self.close(address);
        self.open.last().map(|(_, class)| *class).unwrap_or_default()
    }

    /// Leaves those that end before an address.
    fn close(&mut self, address: IpAddr) {
        while self.open.pop_if(|(last, _)| *last < address).is_some() {}
    }
}

/// Which matchers match whom by what he is.
struct Identities<'m, 'a> {
    matchers: &'m [Matcher<'a>],
    /// Selectors that want a label with a value, by that; the others of one namespace, by that; and the rest.
    by_label: HashMap<(&'a str, &'a str), Vec<u32>>,
    by_namespace: HashMap<&'a str, Vec<u32>>,
    of_pods: Vec<u32>,
    of_nodes: Vec<u32>,
    calls: Vec<u32>,
    may_be_pod: Option<u32>,
    namespaces: HashMap<&'a str, Labels>,
    world: &'a World,
}

impl<'m, 'a> Identities<'m, 'a> {
    fn of(matchers: &'m [Matcher<'a>], world: &'a World) -> Self {
        let mut all = Self {
            matchers,
            by_label: HashMap::new(),
            by_namespace: HashMap::new(),
            of_pods: Vec::new(),
            of_nodes: Vec::new(),
            calls: Vec::new(),
            may_be_pod: None,
            namespaces: HashMap::new(),
            world,
        };
        for (number, matcher) in (0u32..).zip(matchers) {
            match matcher {
                Matcher::Pods(set) => match (one_of(set.pods), set.namespaces) {
                    (Some((key, values)), _) => {
                        for value in values {
                            all.by_label.entry((key, value)).or_default().push(number);
                        }
                    }
                    (None, Namespaces::Named(name)) => all.by_namespace.entry(name).or_default().push(number),
                    (None, Namespaces::Matching(_)) => all.of_pods.push(number),
                },
                Matcher::Nodes(_) => all.of_nodes.push(number),
                Matcher::Calls(..) => all.calls.push(number),
                Matcher::MayBePod => all.may_be_pod = Some(number),
                Matcher::Addresses(_) | Matcher::Outside(_) => {}
            }
        }
        all
    }

    fn matched(&mut self, peer: Option<PeerPod<'a>>, nodes: &[&'a Node]) -> Vec<u32> {
        let mut matched = Vec::new();
        if let Some(peer) = &peer {
            let world = self.world;
            let namespace =
                self.namespaces.entry(peer.namespace).or_insert_with(|| world.namespace_labels(peer.namespace));
            let by_label =
                peer.labels.iter().filter_map(|(key, value)| self.by_label.get(&(key.as_str(), value.as_str())));
            let candidates = by_label.flatten().chain(self.by_namespace.get(peer.namespace).into_iter().flatten());
            for number in candidates.chain(&self.of_pods).chain(&self.calls) {
                let matches = match usize::try_from(*number).ok().and_then(|index| self.matchers.get(index)) {
                    Some(Matcher::Pods(set)) => is_in(set, peer, namespace),
                    Some(Matcher::Calls(name, protocol)) => peer.named_port(name, *protocol).is_some(),
                    _ => false,
                };
                matched.extend(matches.then_some(*number));
            }
        }
        for number in self.of_nodes.iter().filter(|_| !nodes.is_empty()) {
            if let Some(Matcher::Nodes(selector)) = usize::try_from(*number).ok().and_then(|i| self.matchers.get(i)) {
                matched.extend(nodes.iter().any(|node| selector.matches(&node.labels)).then_some(*number));
            }
        }
        matched.sort_unstable();
        matched.dedup();
        matched
    }

    /// What the ports are that matchers ask for.
    fn ports(&self, matched: &[u32], named: &[NamedPort]) -> Vec<u16> {
        let calls = self.calls.iter().filter(|number| matched.binary_search(number).is_ok());
        let asked = calls.filter_map(|number| match self.matchers.get(usize::try_from(*number).ok()?) {
            Some(Matcher::Calls(name, protocol)) => {
                named.iter().find(|port| port.name == *name && port.protocol == *protocol).map(|port| port.number)
            }
            _ => None,
        });
        asked.collect()
    }
}

/// Whether somebody is one of these pods.
pub(super) fn is_in(set: &PodSet<'_>, peer: &PeerPod<'_>, namespace: &Labels) -> bool {
    let here = match set.namespaces {
        Namespaces::Named(name) => name == peer.namespace,
        Namespaces::Matching(selector) => selector.matches(namespace),
    };
    here && set.pods.matches(peer.labels)
}

/// A label that a selector wants, and the values it may have.
fn one_of(selector: &Selector) -> Option<(&str, impl Iterator<Item = &str>)> {
    selector.requirements().find_map(|requirement| match requirement {
        Requirement::In(key, values) => Some((key.as_str(), values.iter().map(String::as_str))),
        _ => None,
    })
}
