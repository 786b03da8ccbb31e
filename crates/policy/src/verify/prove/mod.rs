//! A [`Statement`] over all possible pods: proved, or a counterexample.
//!
//! Selectors tell apart only what they mention, so all possible pods fall into finitely many kinds: per label key each mentioned value, one
//! that is not mentioned, and absence; per namespace its name and labels; addresses and ports by the borders of blocks and ranges; and whether the
//! destination gives a port's name to the port of the flow. The policies are read as a set of *ways* in which a flow can be open
//! (or closed): a conjunction that must hold and others that must not. For every pair of ways, one at each end, [`solve`] looks for
//! values. The search is exact: "proved" is said only after all of it. It is bounded by a number of steps ([`Limits::steps`]), each a look at one literal;
//! beyond them the answer is [`Unanswered::TooLong`]. Before a counterexample is shown, the evaluator is asked about it.
//!
//! What a possible pod is: on the pod network, with an address of [`Universe::pod_ranges`], in a namespace that is known (then with its labels) or, unless
//! [`Limits::known_namespaces`], in any other. Two pods are two: what a pod sends to itself is not spoken of. A possible address outside is any that is in no pod range.
//! It may be a node's: that of a known node is, with its labels; any other may be, with any. Such a node is none that the pod is on: a pod's own node always reaches it.
//!
//! "Proved" is not said of nobody: where no possible flow is one that the statement speaks of, or a part of its sets holds nobody, there is no answer.

mod cases;
mod realize;
mod solve;
mod vocabulary;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use towpath_model::{Direction, Family, Labels, World};

use self::cases::{Case, End, NAME_LABEL, Space, Vocabulary};
use self::solve::{Budget, Conjunction, Domains, Exhausted, assume, both, solve};
use self::vocabulary::{Keys, PortNames, fresh};
use super::addresses::Addresses;
use super::clauses::{Namespaces, PeerSet, Tiers};
use super::expect::describe;
use super::statement::{Claim, Exception, Statement};
use super::universe::Universe;
use super::words::{Peers, Place, PortWords, Term, Within};

pub use realize::{Actor, Counterexample};

/// How far a search may go.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many literals may be looked at.
    pub steps: u64,
    /// Only namespaces that are there are possible.
    pub known_namespaces: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { steps: 50_000_000, known_namespaces: false }
    }
}

/// The answer.
#[derive(Clone, Debug)]
pub enum Answer {
    /// There is no exception, after this many steps.
    Proved {
        /// Literals that were looked at.
        steps: u64,
    },
    /// This contradicts it.
    Disproved(Box<Counterexample>),
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unanswered {
    /// The search is longer than the limit.
    TooLong {
        /// The limit.
        steps: u64,
    },
    /// The statement speaks of what a proof over all possible pods cannot (names), or of nobody.
    Unspeakable(String),
    /// A counterexample was found, and the evaluator does not agree with it: a fault of this program.
    Disagreement(String),
}

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong { steps } => write!(
                f,
                "not decided within {steps} steps: raise --steps, or ask something narrower (name a namespace, leave an \"or\" to a statement of its own)"
            ),
            Self::Unspeakable(what) => f.write_str(what),
            Self::Disagreement(what) => {
                write!(f, "the search and the evaluator disagree, so nothing is proved; please report this: {what}")
            }
        }
    }
}

impl std::error::Error for Unanswered {}

/// Decides a statement.
///
/// # Errors
/// It speaks of names or of nobody, or the search is longer than the limit.
pub fn prove(universe: &Universe, statement: &Statement, limits: &Limits) -> Result<Answer, Unanswered> {
    speakable(statement)?;
    let world = &universe.world;
    let tiers = [Tiers::of(world, Direction::Egress), Tiers::of(world, Direction::Ingress)];
    let vocabulary = vocabulary(universe, &tiers, statement);
    let spaces = spaces(world, &tiers, statement, &vocabulary, limits);
    let budget = Budget { spent: 0, limit: limits.steps };
    let mut search = Search { tiers: &tiers, statement, budget, meant: Meant::nobody(statement) };
    let too_long = |_: Exhausted| Unanswered::TooLong { steps: limits.steps };
    for family in [Family::V4, Family::V6] {
        for ends in pairs(&spaces) {
            let case = Case { vocabulary: &vocabulary, family, ends };
            if let Some(domains) = search.case(&case).map_err(too_long)? {
                let found = realize::realize(universe, statement, &case, &domains)?;
                return Ok(Answer::Disproved(Box::new(found)));
            }
        }
    }
    search.meant.somebody(statement)?;
    Ok(Answer::Proved { steps: search.budget.spent })
}

/// All shapes: a pod at each end (in every pair of namespaces), or at one.
fn pairs(spaces: &[Space]) -> Vec<[End<'_>; 2]> {
    let mut out = Vec::new();
    for space in spaces.iter().filter(|space| space.name != spaces::second_stranger(spaces)) {
        out.push([End::Pod(space), End::Outside]);
        out.push([End::Outside, End::Pod(space)]);
    }
    for from in spaces {
        out.extend(spaces.iter().map(|to| [End::Pod(from), End::Pod(to)]));
    }
    out
}

mod spaces {
    //! Names of namespaces that are not known.

    use super::Space;

    /// The second of two namespaces that are not known: two pods in strange namespaces need not share one.
    pub(super) fn second_stranger(spaces: &[Space]) -> &str {
        match spaces {
            [.., first, second] if first.labels.is_none() && second.labels.is_none() => &second.name,
            _ => "",
        }
    }
}

struct Search<'s> {
    /// Egress, ingress.
    tiers: &'s [Tiers<'s>; 2],
    statement: &'s Statement,
    budget: Budget,
    meant: Meant,
}

/// Whether a statement speaks of anybody.
struct Meant {
    /// A flow that no exception takes out was possible.
    flow: bool,
    /// Of each term of the source, and of the destination: somebody could be that.
    ends: [Vec<bool>; 2],
}

impl Meant {
    fn nobody(statement: &Statement) -> Self {
        Self { flow: false, ends: [&statement.from, &statement.to].map(|peers| vec![false; peers.0.len()]) }
    }

    /// # Errors
    /// Nobody could be what is said of one end, or there could be no such flow between them.
    fn somebody(&self, statement: &Statement) -> Result<(), Unanswered> {
        for ((peers, found), end) in [&statement.from, &statement.to].into_iter().zip(&self.ends).zip(["from", "to"]) {
            if let Some((term, _)) = peers.0.iter().zip(found).find(|(_, found)| !**found) {
                return Err(Unanswered::Unspeakable(format!(
                    "{end}: {}: nobody can be that, so nothing would be proved",
                    describe(term)
                )));
            }
        }
        if self.flow {
            return Ok(());
        }
        Err(Unanswered::Unspeakable(
            "no possible flow is meant, so nothing would be proved: one end must be a pod, both of one address family, \
             only pods give names to ports, and the exceptions must leave something"
                .to_owned(),
        ))
    }
}

impl Search<'_> {
    /// Looks for flows of one shape that contradict the statement.
    fn case(&mut self, case: &Case<'_>) -> Result<Option<Domains>, Exhausted> {
        self.budget.spend(1)?;
        let statement = self.statement;
        let Some(domains) = case.domains() else { return Ok(None) };
        self.note_ends(case, &domains)?;
        let (from, to) = (case.among(0, &statement.from), case.among(1, &statement.to));
        if from.is_empty() || to.is_empty() {
            return Ok(None);
        }
        let mut except: Vec<Conjunction> = statement.but.iter().flat_map(|but| case.exception(but)).collect();
        except.extend(case.impossible());
        if except.iter().any(Vec::is_empty) {
            return Ok(None);
        }
        let ports = case.ports(&statement.ports);
        let mut starts = Vec::new();
        for ends in from.iter().flat_map(|a| to.iter().filter_map(move |b| both(a, b))) {
            for flows in ports.iter().filter_map(|port| both(&ends, port)) {
                starts.extend(assume(&domains, &flows, &mut self.budget)?);
            }
        }
        if starts.is_empty() {
            return Ok(None);
        }
        if !self.meant.flow {
            let always = [cases::Way::default()];
            self.meant.flow = self.open(case, &starts, &except, &always, &always)?.is_some();
        }
        let [egress, ingress] = self.tiers;
        match statement.claim {
            Claim::Nothing => {
                let out = case.ways(egress, Direction::Egress, true, &mut self.budget)?;
                let into = case.ways(ingress, Direction::Ingress, true, &mut self.budget)?;
                self.open(case, &starts, &except, &out, &into)
            }
            Claim::Everything => {
                let mut ways = case.ways(egress, Direction::Egress, false, &mut self.budget)?;
                ways.extend(case.ways(ingress, Direction::Ingress, false, &mut self.budget)?);
                self.open(case, &starts, &except, &ways, &[cases::Way::default()])
            }
        }
    }

    /// Notes which terms of the statement somebody of this shape could be.
    fn note_ends(&mut self, case: &Case<'_>, domains: &Domains) -> Result<(), Exhausted> {
        let statement = self.statement;
        for ((which, peers), found) in
            [&statement.from, &statement.to].into_iter().enumerate().zip(&mut self.meant.ends)
        {
            for (term, found) in peers.0.iter().zip(found).filter(|(_, found)| !**found) {
                for kind in case.term(which, term) {
                    *found |= assume(domains, &kind, &mut self.budget)?.is_some();
                }
            }
        }
        Ok(())
    }

    fn open(
        &mut self,
        case: &Case<'_>,
        starts: &[Domains],
        except: &[Conjunction],
        first: &[cases::Way],
        second: &[cases::Way],
    ) -> Result<Option<Domains>, Exhausted> {
        let fits = |domains: &Domains| has_two_addresses(case, domains);
        for start in starts {
            for one in first {
                let Some(domains) = assume(start, &one.when, &mut self.budget)? else { continue };
                for two in second {
                    let Some(domains) = assume(&domains, &two.when, &mut self.budget)? else { continue };
                    let forbidden: Vec<&Conjunction> =
                        except.iter().chain(one.excluded()).chain(two.excluded()).collect();
                    self.budget.spend(forbidden.len())?;
                    if let Some(found) = solve(domains, &forbidden, &fits, &mut self.budget)? {
                        return Ok(Some(found));
                    }
                }
            }
        }
        Ok(None)
    }
}

/// Two pods have two addresses.
fn has_two_addresses(case: &Case<'_>, domains: &Domains) -> bool {
    let addresses = [0, 1].map(|which| domains.get(Case::address_of(which)));
    match (case.ends, addresses) {
        ([End::Pod(_), End::Pod(_)], [Some(a), Some(b)]) => a != b || a.count() > 1,
        _ => true,
    }
}

fn speakable(statement: &Statement) -> Result<(), Unanswered> {
    let but = statement.but.iter().flat_map(|but| but.from.iter().chain(&but.to));
    for term in [&statement.from, &statement.to].into_iter().chain(but).flat_map(|peers| &peers.0) {
        let refused = match term {
            Term::Named { namespace, name, .. } => format!(
                "{namespace}/{name}: a proof is about all possible pods, so it names them by labels (pods app={name} in namespace {namespace}); \
                 what workloads that exist may do is for `towpath verify assert`"
            ),
            Term::Node(Some(name)) => format!(
                "node/{name}: a proof is about all possible nodes (nodes); one of them is said by its address (192.0.2.1)"
            ),
            _ => continue,
        };
        return Err(Unanswered::Unspeakable(refused));
    }
    Ok(())
}

fn note_place(place: &Place, keys: &mut Keys) {
    if let Place::Matching(selector) = place {
        keys.note(selector);
    }
}

fn sets_of(statement: &Statement) -> impl Iterator<Item = &Term> {
    let but = statement.but.iter().flat_map(|Exception { from, to, .. }| from.iter().chain(to));
    [&statement.from, &statement.to].into_iter().chain(but).flat_map(|peers: &Peers| &peers.0)
}

fn vocabulary(universe: &Universe, tiers: &[Tiers<'_>; 2], statement: &Statement) -> Vocabulary {
    let (mut pods, mut namespaces, mut names) = (Keys::default(), Keys::default(), PortNames::default());
    let mut nodes = Keys::default();
    namespaces.note_key(NAME_LABEL);
    for tiers in tiers {
        for set in tiers.pod_sets() {
            pods.note(set.pods);
            if let Namespaces::Matching(selector) = set.namespaces {
                namespaces.note(selector);
            }
        }
        for clause in tiers.clauses() {
            clause.ports.named.iter().for_each(|(name, protocol)| names.note(name, *protocol));
            if let PeerSet::Nodes(selector) = &clause.peer {
                nodes.note(selector);
            }
        }
    }
    for term in sets_of(statement) {
        match term {
            Term::NotIn(place) => note_place(place, &mut namespaces),
            Term::Pods(selector, within) => {
                pods.note(selector);
                if let Within::In(place) | Within::NotIn(place) = within {
                    note_place(place, &mut namespaces);
                }
            }
            _ => {}
        }
    }
    let ports = std::iter::once(&statement.ports).chain(statement.but.iter().map(|but| &but.ports));
    for (name, protocol) in ports.flat_map(|PortWords { named, .. }| named) {
        names.note(name, *protocol);
    }
    pods.settle();
    namespaces.settle();
    nodes.settle();
    // Who nobody asks for is not told apart.
    let of_nodes = tiers.iter().flat_map(Tiers::clauses).any(|clause| matches!(clause.peer, PeerSet::Nodes(_)));
    let asked = of_nodes || sets_of(statement).any(|term| matches!(term, Term::Node(_)));
    let known_nodes = if asked { known_nodes(&universe.world, &nodes) } else { Vec::new() };
    Vocabulary { pods, namespaces, names, nodes, known_nodes, pod_ranges: Addresses::of_all(&universe.pod_ranges) }
}

/// The addresses of all nodes, those of nodes with the same labels (as far as anybody looks) together.
fn known_nodes(world: &World, keys: &Keys) -> Vec<(Addresses, Option<Labels>)> {
    let mut labels_at: BTreeMap<IpAddr, BTreeSet<Labels>> = BTreeMap::new();
    for node in world.nodes.values() {
        for address in node.addresses() {
            labels_at.entry(address).or_default().insert(keys.reduced(&node.labels));
        }
    }
    let mut groups: BTreeMap<Option<Labels>, Vec<IpAddr>> = BTreeMap::new();
    for (address, labels) in labels_at {
        let only = if labels.len() == 1 { labels.into_iter().next() } else { None };
        groups.entry(only).or_default().push(address);
    }
    let of = |list: &[IpAddr]| Addresses::any_of(list.iter().map(|ip| Addresses::one(*ip)).collect::<Vec<_>>().iter());
    groups.into_iter().map(|(labels, list)| (of(&list), labels)).collect()
}

/// The namespaces to look at: those that something speaks of by name; of the other known ones, one of each kind; and two that are not known.
fn spaces(
    world: &World,
    tiers: &[Tiers<'_>; 2],
    statement: &Statement,
    vocabulary: &Vocabulary,
    limits: &Limits,
) -> Vec<Space> {
    let mut spoken: BTreeSet<&str> = tiers.iter().flat_map(|t| t.isolation.keys().copied()).collect();
    for set in tiers.iter().flat_map(Tiers::pod_sets) {
        if let Namespaces::Named(name) = set.namespaces {
            spoken.insert(name);
        }
    }
    spoken.extend(vocabulary.namespaces.values_of(NAME_LABEL));
    for term in sets_of(statement) {
        if let Term::NotIn(place) | Term::Pods(_, Within::In(place) | Within::NotIn(place)) = term
            && let Place::Named(names) = place
        {
            spoken.extend(names.iter().map(String::as_str));
        }
    }
    let mut known: BTreeSet<&str> = world.namespaces.keys().map(String::as_str).collect();
    known.extend(world.policies.keys().map(|name| name.namespace.as_str()));
    known.extend(world.pods.keys().map(|name| name.namespace.as_str()));
    let labels = |name: &str| match world.namespaces.get(name) {
        Some(namespace) => Some(namespace.labels.clone()),
        None => limits.known_namespaces.then(|| world.namespace_labels(name)),
    };
    let mut list: Vec<Space> = Vec::new();
    for name in spoken.iter().filter(|name| !limits.known_namespaces || known.contains(**name)) {
        list.push(Space { name: (*name).to_owned(), labels: labels(name) });
    }
    // Namespaces that nothing names are one to policy if their labels are, as far as anybody looks. Each kind twice: two pods
    // may be in two of them.
    let mut kinds: BTreeMap<Labels, usize> = BTreeMap::new();
    for (name, namespace) in world.namespaces.iter().filter(|(name, _)| !spoken.contains(name.as_str())) {
        let mut reduced = vocabulary.namespaces.reduced(&namespace.labels);
        reduced.remove(NAME_LABEL);
        let count = kinds.entry(reduced).or_default();
        *count += 1;
        if *count <= 2 {
            list.push(Space { name: name.clone(), labels: Some(namespace.labels.clone()) });
        }
    }
    if limits.known_namespaces {
        for name in known.iter().filter(|name| !spoken.contains(**name) && !world.namespaces.contains_key(**name)) {
            list.push(Space { name: (*name).to_owned(), labels: labels(name) });
        }
        return list;
    }
    let taken = |name: &str| known.contains(name) || spoken.contains(name);
    let first = fresh("elsewhere", taken);
    let second = fresh("elsewhere-else", taken);
    list.extend([first, second].map(|name| Space { name, labels: None }));
    list
}
