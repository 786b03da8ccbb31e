//! One shape of a flow (pod or outside at each end, in which namespaces, of which family), its variables, and the ways in which
//! policies let it pass or drop it.

use std::rc::Rc;

use towpath_model::{Direction, Family, Labels, Protocol};

use super::solve::{Budget, Conjunction, Domains, Exhausted, Literal, both};
use super::vocabulary::{Keys, PortNames};
use crate::verify::addresses::Addresses;
use crate::verify::clauses::{Action, Clause, Namespaces, PeerSet, PodSet, Ranked, Tiers};
use crate::verify::ports::Ports;
use crate::verify::ranges::Ranges;
use crate::verify::statement::Exception;
use crate::verify::words::{Peers, Place, PortWords, Term, Within};

/// The label that the API server gives to every namespace.
pub(super) const NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// A namespace that a pod may be in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Space {
    pub(super) name: String,
    /// Its labels; none: it may have any, besides its name.
    pub(super) labels: Option<Labels>,
}

/// One end of a flow.
#[derive(Clone, Copy, Debug)]
pub(super) enum End<'s> {
    Pod(&'s Space),
    Outside,
}

/// What can be told apart, and where addresses are.
#[derive(Clone, Debug)]
pub(super) struct Vocabulary {
    pub(super) pods: Keys,
    pub(super) namespaces: Keys,
    pub(super) names: PortNames,
    /// Labels of nodes.
    pub(super) nodes: Keys,
    /// Addresses of nodes that are known, by the labels of the node; none where two nodes with other labels share them.
    pub(super) known_nodes: Vec<(Addresses, Option<Labels>)>,
    pub(super) pod_ranges: Addresses,
}

pub(super) const PORT: usize = 0;
const ADDRESS: [usize; 2] = [1, 2];
const FIRST: usize = 3;
const ABSENT: u128 = 0;
const GIVEN: u128 = 1;

/// The shape of a flow. Variables: port; addresses; labels of the source, of the destination; of their namespaces; port names; and of each end
/// whether it is a node, and the labels of that node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case<'s> {
    pub(super) vocabulary: &'s Vocabulary,
    pub(super) family: Family,
    /// Source, destination.
    pub(super) ends: [End<'s>; 2],
}

/// One way in which a flow is open, or closed: all of `when`, and none of `unless`.
#[derive(Clone, Debug, Default)]
pub(super) struct Way {
    pub(super) when: Conjunction,
    unless: Vec<Unless>,
}

/// Conjunctions that must not hold: the first ones of a list. Thousands of ways exclude parts of one list, so they share it.
#[derive(Clone, Debug)]
struct Unless {
    list: Rc<[Conjunction]>,
    first: usize,
}

impl Unless {
    fn iter(&self) -> impl Iterator<Item = &Conjunction> {
        self.list.iter().take(self.first)
    }
}

/// A list of which ways exclude the beginnings.
struct Excluded {
    list: Rc<[Conjunction]>,
    /// The place of the first one that always holds.
    hopeless: usize,
}

impl Excluded {
    fn of(list: Vec<Conjunction>) -> Self {
        let hopeless = list.iter().position(Vec::is_empty).unwrap_or(list.len());
        Self { list: list.into(), hopeless }
    }

    fn all(&self, when: Conjunction) -> Option<Way> {
        self.before(when, self.list.len())
    }

    /// A way that excludes the first ones of them; none: what must not hold always does.
    fn before(&self, when: Conjunction, first: usize) -> Option<Way> {
        let unless = if first == 0 { Vec::new() } else { vec![Unless { list: Rc::clone(&self.list), first }] };
        (first <= self.hopeless).then_some(Way { when, unless })
    }
}

impl Way {
    /// Both; none if they exclude each other.
    fn and(&self, other: &Way) -> Option<Way> {
        let unless = self.unless.iter().chain(&other.unless).cloned().collect();
        Some(Way { when: both(&self.when, &other.when)?, unless })
    }

    /// What must not hold.
    pub(super) fn excluded(&self) -> impl Iterator<Item = &Conjunction> {
        self.unless.iter().flat_map(Unless::iter)
    }
}

impl<'s> Case<'s> {
    fn end(&self, which: usize) -> End<'s> {
        self.ends.get(which).copied().unwrap_or(End::Outside)
    }

    fn space(&self, which: usize) -> Option<&'s Space> {
        match self.end(which) {
            End::Pod(space) => Some(space),
            End::Outside => None,
        }
    }

    pub(super) fn address_of(which: usize) -> usize {
        ADDRESS.get(which).copied().unwrap_or(FIRST)
    }

    pub(super) fn pod_labels(&self, which: usize) -> usize {
        FIRST + which * self.vocabulary.pods.len()
    }

    /// Two pods of one namespace share its labels.
    pub(super) fn namespace_labels(&self, which: usize) -> usize {
        let same = match (self.space(0), self.space(1)) {
            (Some(a), Some(b)) => a.name == b.name,
            _ => false,
        };
        let which = if same { 0 } else { which };
        FIRST + 2 * self.vocabulary.pods.len() + which * self.vocabulary.namespaces.len()
    }

    pub(super) fn port_names(&self) -> usize {
        FIRST + 2 * self.vocabulary.pods.len() + 2 * self.vocabulary.namespaces.len()
    }

    /// Whether an end is a node.
    pub(super) fn is_node(&self, which: usize) -> usize {
        self.port_names() + self.vocabulary.names.len() + which * (1 + self.vocabulary.nodes.len())
    }

    pub(super) fn node_labels(&self, which: usize) -> usize {
        self.is_node(which) + 1
    }

    /// What each variable may be at first; none: there is no such flow.
    pub(super) fn domains(&self) -> Option<Domains> {
        let family = Addresses::of_family(self.family);
        let mut domains: Domains = vec![Ports::all().0];
        for end in self.ends {
            let ranges = &self.vocabulary.pod_ranges;
            let whole = match end {
                End::Pod(_) => family.and(ranges),
                End::Outside => family.without(ranges),
            };
            if whole.is_empty() {
                return None;
            }
            domains.push(whole.0);
        }
        for _ in self.ends {
            domains.extend(self.vocabulary.pods.domains());
        }
        for which in 0..2 {
            let begin = domains.len();
            domains.extend(self.vocabulary.namespaces.domains());
            let Some(space) = self.space(which) else { continue };
            if let Some((index, only)) = self.vocabulary.namespaces.fixed(NAME_LABEL, &space.name)
                && let Some(domain) = domains.get_mut(begin + index)
            {
                *domain = only;
            }
        }
        domains.extend((0..self.vocabulary.names.len()).map(|_| Ranges::of(ABSENT, GIVEN)));
        for end in self.ends {
            domains.push(match end {
                End::Pod(_) => Ranges::one(ABSENT),
                End::Outside => Ranges::of(ABSENT, GIVEN),
            });
            domains.extend(self.vocabulary.nodes.domains());
        }
        Some(domains)
    }

    /// What cannot be because of the nodes that are known: that somebody else has their addresses, or they other labels.
    pub(super) fn impossible(&self) -> Vec<Conjunction> {
        let mut out = Vec::new();
        for which in (0..2).filter(|which| matches!(self.end(*which), End::Outside)) {
            for (addresses, labels) in &self.vocabulary.known_nodes {
                let Some(there) = self.in_addresses(which, addresses) else { continue };
                let nobody = vec![Literal { variable: self.is_node(which), within: Ranges::one(ABSENT) }];
                let others =
                    labels.iter().flat_map(|labels| self.vocabulary.nodes.others(self.node_labels(which), labels));
                let wrong = std::iter::once(nobody).chain(others.map(|literal| vec![literal]));
                out.extend(wrong.filter_map(|wrong| both(&there, &wrong)));
            }
        }
        out
    }

    fn nodes(&self, which: usize) -> Option<Conjunction> {
        let is_node = Literal { variable: self.is_node(which), within: Ranges::one(GIVEN) };
        matches!(self.end(which), End::Outside).then(|| vec![is_node])
    }

    fn in_namespaces(&self, which: usize, space: &Space, set: Namespaces<'_>) -> Option<Conjunction> {
        match (set, &space.labels) {
            (Namespaces::Named(name), _) => (name == space.name).then(Vec::new),
            (Namespaces::Matching(selector), Some(labels)) => selector.matches(labels).then(Vec::new),
            (Namespaces::Matching(selector), None) => {
                self.vocabulary.namespaces.literals(self.namespace_labels(which), selector)
            }
        }
    }

    fn in_pods(&self, which: usize, set: &PodSet<'_>) -> Option<Conjunction> {
        let space = self.space(which)?;
        let namespaces = self.in_namespaces(which, space, set.namespaces)?;
        both(&namespaces, &self.vocabulary.pods.literals(self.pod_labels(which), set.pods)?)
    }

    fn in_peers(&self, which: usize, peers: &PeerSet<'_>) -> Option<Conjunction> {
        match peers {
            PeerSet::Anyone => Some(Vec::new()),
            PeerSet::Pods(set) => self.in_pods(which, set),
            PeerSet::Nodes(selector) => {
                both(&self.nodes(which)?, &self.vocabulary.nodes.literals(self.node_labels(which), selector)?)
            }
            PeerSet::Addresses(block) => self.in_addresses(which, block),
            // Any address outside may be one of theirs.
            PeerSet::Names(_) => matches!(self.end(which), End::Outside).then(Vec::new),
        }
    }

    fn in_addresses(&self, which: usize, block: &Addresses) -> Option<Conjunction> {
        let within = block.and(&Addresses::of_family(self.family)).0;
        (!within.is_empty()).then(|| vec![Literal { variable: Self::address_of(which), within }])
    }

    /// Each by itself: on these ports.
    fn on_ports<'n>(&self, fixed: &Ports, named: impl Iterator<Item = (&'n str, Protocol)>) -> Vec<Conjunction> {
        let mut out = Vec::new();
        if *fixed == Ports::all() {
            out.push(Vec::new());
        } else if !fixed.is_empty() {
            out.push(vec![Literal { variable: PORT, within: fixed.0.clone() }]);
        }
        for (name, protocol) in named.filter(|_| matches!(self.end(1), End::Pod(_))) {
            if let Some(index) = self.vocabulary.names.position(name, protocol) {
                out.push(vec![
                    Literal { variable: PORT, within: Ports::of_protocol(protocol).0 },
                    Literal { variable: self.port_names() + index, within: Ranges::one(GIVEN) },
                ]);
            }
        }
        out
    }

    fn clause(&self, peer: usize, clause: &Clause<'_>) -> Vec<Conjunction> {
        let Some(peers) = self.in_peers(peer, &clause.peer) else { return Vec::new() };
        let ports = self.on_ports(&clause.ports.fixed, clause.ports.named.iter().copied());
        ports.iter().filter_map(|port| both(&peers, port)).collect()
    }

    /// The ways in which one direction is open (or closed, if not `open`). What they hold in all is spent.
    pub(super) fn ways(
        &self,
        tiers: &Tiers<'_>,
        direction: Direction,
        open: bool,
        budget: &mut Budget,
    ) -> Result<Vec<Way>, Exhausted> {
        let subject = match direction {
            Direction::Egress => 0,
            Direction::Ingress => 1,
        };
        let Some(space) = self.space(subject) else {
            return Ok(if open { vec![Way::default()] } else { Vec::new() });
        };
        let wanted = if open { Action::Accept } else { Action::Deny };
        let admin = self.ranked(subject, &tiers.admin, open);
        let mut ways = first_of(&admin, wanted, budget)?;
        let through = falls_through(&admin, budget)?;
        let isolations = tiers.isolation.get(space.name.as_str()).map(Vec::as_slice).unwrap_or_default();
        let mut selected: Vec<Conjunction> = Vec::new();
        let mut admitted: Vec<Conjunction> = Vec::new();
        for isolation in isolations {
            let Some(own) = self.vocabulary.pods.literals(self.pod_labels(subject), isolation.selector) else {
                continue;
            };
            let clauses = isolation.clauses.iter().flat_map(|clause| self.clause(1 - subject, clause));
            admitted.extend(clauses.filter_map(|clause| both(&own, &clause)));
            selected.push(own);
        }
        let mut later: Vec<Way> = Vec::new();
        if open {
            later.extend(admitted.into_iter().map(|when| Way { when, unless: Vec::new() }));
        } else {
            let admitted = Excluded::of(admitted);
            later.extend(selected.iter().filter_map(|own| admitted.all(own.clone())));
        }
        let free = Excluded::of(selected).all(Vec::new());
        let baseline = self.ranked(subject, &tiers.baseline, open);
        let mut last = first_of(&baseline, wanted, budget)?;
        if open {
            last.extend(falls_through(&baseline, budget)?);
        }
        later.extend(free.iter().flat_map(|free| last.iter().filter_map(|way| way.and(free))));
        for way in &later {
            // A step for each that is made, so that the limit bounds the memory too.
            budget.spend(through.iter().map(|first| first.when.len() + way.when.len() + 1).sum())?;
            ways.extend(through.iter().filter_map(|first| first.and(way)));
        }
        Ok(ways)
    }

    /// With domain names that stand for every address outside where an `open` way is looked for, and for none where a closed one is: DNS may say either.
    fn ranked(&self, subject: usize, list: &[Ranked<'_>], open: bool) -> Vec<(Conjunction, Action)> {
        let mut out = Vec::new();
        for ranked in list.iter().filter(|ranked| open || !matches!(ranked.clause.peer, PeerSet::Names(_))) {
            let Some(own) = self.in_pods(subject, &ranked.subject) else { continue };
            let clauses = self.clause(1 - subject, &ranked.clause);
            out.extend(clauses.iter().filter_map(|clause| Some((both(&own, clause)?, ranked.clause.action))));
        }
        out
    }

    /// What a set of a statement is at an end: any of these.
    pub(super) fn among(&self, which: usize, peers: &Peers) -> Vec<Conjunction> {
        peers.0.iter().flat_map(|term| self.term(which, term)).collect()
    }

    pub(super) fn term(&self, which: usize, term: &Term) -> Vec<Conjunction> {
        let always = || vec![Vec::new()];
        match (term, self.end(which)) {
            (Term::Anything, _) | (Term::Outside | Term::NotIn(_), End::Outside) => always(),
            (Term::Addresses(net), _) => self.in_addresses(which, &Addresses::of(net)).into_iter().collect(),
            (Term::NotIn(place), End::Pod(space)) => self.not_in_place(which, space, place),
            (Term::Pods(selector, within), End::Pod(space)) => {
                let Some(pods) = self.vocabulary.pods.literals(self.pod_labels(which), selector) else {
                    return Vec::new();
                };
                let places = match within {
                    Within::Any => always(),
                    Within::In(place) => self.in_place(which, space, place).into_iter().collect(),
                    Within::NotIn(place) => self.not_in_place(which, space, place),
                };
                places.iter().filter_map(|place| both(place, &pods)).collect()
            }
            (Term::Node(None), _) => self.nodes(which).into_iter().collect(),
            // Of names there is nothing to say about all possible pods: they are refused before.
            (Term::Outside | Term::Named { .. } | Term::Node(Some(_)), _) | (Term::Pods(..), End::Outside) => {
                Vec::new()
            }
        }
    }

    fn in_place(&self, which: usize, space: &Space, place: &Place) -> Option<Conjunction> {
        match place {
            Place::Named(names) => names.contains(&space.name).then(Vec::new),
            Place::Matching(selector) => self.in_namespaces(which, space, Namespaces::Matching(selector)),
        }
    }

    fn not_in_place(&self, which: usize, space: &Space, place: &Place) -> Vec<Conjunction> {
        match (place, &space.labels) {
            (Place::Named(names), _) if names.contains(&space.name) => Vec::new(),
            (Place::Matching(selector), Some(labels)) if selector.matches(labels) => Vec::new(),
            (Place::Matching(selector), None) => {
                self.vocabulary.namespaces.negated(self.namespace_labels(which), selector)
            }
            _ => vec![Vec::new()],
        }
    }

    /// The ports of a statement: any of these.
    pub(super) fn ports(&self, words: &PortWords) -> Vec<Conjunction> {
        self.on_ports(&words.fixed, words.named.iter().map(|(name, protocol)| (name.as_str(), *protocol)))
    }

    /// The flows of an exception.
    pub(super) fn exception(&self, exception: &Exception) -> Vec<Conjunction> {
        let always = vec![Vec::new()];
        let of = |which: usize, peers: &Option<Peers>| {
            peers.as_ref().map_or_else(|| always.clone(), |peers| self.among(which, peers))
        };
        let (from, to, ports) = (of(0, &exception.from), of(1, &exception.to), self.ports(&exception.ports));
        let ends = from.iter().flat_map(|a| to.iter().filter_map(|b| both(a, b))).collect::<Vec<_>>();
        ends.iter().flat_map(|ends| ports.iter().filter_map(|port| both(ends, port))).collect()
    }
}

/// The ways in which the first clause that matches does what is wanted.
fn first_of(list: &[(Conjunction, Action)], wanted: Action, budget: &mut Budget) -> Result<Vec<Way>, Exhausted> {
    let mut found: Vec<(Conjunction, usize)> = Vec::new();
    let mut others: Vec<Conjunction> = Vec::new();
    for (when, action) in list {
        budget.spend(when.len() + 1)?;
        if *action == wanted {
            found.push((when.clone(), others.len()));
        } else {
            others.push(when.clone());
        }
    }
    let others = Excluded::of(others);
    Ok(found.into_iter().filter_map(|(when, before)| others.before(when, before)).collect())
}

/// The ways in which a tier leaves a flow to the next: no clause decides it, or one that passes it on comes before any that does.
fn falls_through(list: &[(Conjunction, Action)], budget: &mut Budget) -> Result<Vec<Way>, Exhausted> {
    let mut found: Vec<(Conjunction, usize)> = Vec::new();
    let mut deciding: Vec<Conjunction> = Vec::new();
    for (when, action) in list {
        budget.spend(when.len() + 1)?;
        match action {
            Action::Pass => found.push((when.clone(), deciding.len())),
            Action::Accept | Action::Deny => deciding.push(when.clone()),
        }
    }
    found.push((Vec::new(), deciding.len()));
    let deciding = Excluded::of(deciding);
    Ok(found.into_iter().filter_map(|(when, before)| deciding.before(when, before)).collect())
}
