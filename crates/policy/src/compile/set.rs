//! A policy set: the programs of one direction that one or more pods share, and the peers as it sees them.
//!
//! A set never changes its meaning: when a policy changes, its pods get another set. Its local classes are numbered as peers
//! turn up, and a number is never given to other rows while the set lives, so rows can be added under traffic.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use towpath_model::desired::{LocalClass, PolicyRef, RowKey, RowProtocol, RuleInfo, SetId, Verdict};
use towpath_model::{Action, Direction, NamespacedName, PortMatch, Protocol};

use super::atoms::Atoms;
use super::budget::{Budget, ROW, TooLarge};
use super::lanes::Lanes;
use super::painted::Painted;
use super::ports::{self, Span};
use super::program::{Clause, Program, Stage};

/// What makes two pods share a set.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SetKey {
    pub(super) direction: Direction,
    /// Versions of the programs, in the order in which they are asked.
    pub(super) versions: Vec<u64>,
    /// Ingress: what the programs' named ports are in the pods, in the order of [`Program::named`].
    pub(super) resolved: Vec<Option<u16>>,
}

/// A row but for its set, class and rule id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RowDraft {
    pub(super) protocol: RowProtocol,
    pub(super) port: u16,
    pub(super) port_bits: u8,
    /// Index over the clauses of all programs; none: no clause decides, and nothing isolates.
    pub(super) clause: Option<u32>,
    /// Index into the rule's ports.
    pub(super) port_index: Option<u32>,
}

impl Hash for RowDraft {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // In few words: lists of these are hashed for each class.
        let protocol = match self.protocol {
            RowProtocol::Ports(protocol) => protocol.number(),
            RowProtocol::Other => 0,
        };
        state.write_u32(u32::from(self.port) << 16 | u32::from(self.port_bits) << 8 | u32::from(protocol));
        let clause = u64::from(self.clause.unwrap_or(u32::MAX)) << 32;
        state.write_u64(clause | u64::from(self.port_index.unwrap_or(u32::MAX)));
    }
}

/// Where a rule id comes from: version of the program, rule, peer, port.
pub(super) type RuleKey = (u64, u32, Option<u32>, Option<u32>);

/// What decides in a row.
#[derive(Debug)]
pub(super) struct Deciding<'s> {
    pub(super) key: RuleKey,
    pub(super) verdict: Verdict,
    program: &'s Program,
}

impl Deciding<'_> {
    /// What its rule id stands for.
    pub(super) fn info(&self) -> RuleInfo {
        let (_, rule, peer, port) = self.key;
        RuleInfo {
            policy: self.program.policy.clone(),
            direction: self.program.direction,
            rule,
            name: self.program.rule_name(rule).to_owned(),
            peer,
            port,
        }
    }
}

/// A peer, as far as sets look at it.
pub(super) trait Seen {
    /// The atoms that match it (by the numbers they have in this compilation), but for some that decide nothing where others do.
    fn atoms(&self) -> impl Iterator<Item = u32>;
    /// What a named port is in it.
    fn named_port(&self, name: &str, protocol: Protocol) -> Option<u16>;
    /// Whether it may be a pod that is not known yet.
    fn may_be_pod(&self) -> bool {
        false
    }
}

/// Somebody that no atom matches and who has no named port.
struct Stranger;

impl Seen for Stranger {
    fn atoms(&self) -> impl Iterator<Item = u32> {
        std::iter::empty()
    }

    fn named_port(&self, _: &str, _: Protocol) -> Option<u16> {
        None
    }
}

#[derive(Debug)]
pub(super) struct Set {
    pub(super) id: SetId,
    pub(super) key: SetKey,
    pub(super) programs: Vec<Arc<Program>>,
    /// Since when no pod has it.
    pub(super) retired: Option<Duration>,
    lanes: Lanes,
    /// Numbers of its clauses' atoms, sorted.
    atoms: Vec<u32>,
    /// The clauses of each atom that decide something somewhere, ascending.
    of_atom: HashMap<u32, Vec<u32>>,
    /// All these with their atoms and lanes, ascending.
    deciding: Vec<(u32, u32)>,
    doubts: bool,
    asks_everyone: bool,
    /// Ingress: named ports of the pods.
    own_ports: HashMap<(usize, String, Protocol), u16>,
    /// From the clauses that match (and what named ports are) to the class.
    by_clauses: HashMap<Box<[u32]>, LocalClass>,
    by_rows: HashMap<Arc<[RowDraft]>, LocalClass>,
    rows: BTreeMap<LocalClass, Arc<[RowDraft]>>,
    next: u32,
    /// Classes but 0 in which somebody is, with how many kinds of peers.
    used: BTreeMap<LocalClass, usize>,
    /// Classes that somebody is in and was not, or the other way round, since [`Set::show`].
    stirred: BTreeSet<LocalClass>,
    /// Classes of which the last image has the rows.
    pub(super) shown: BTreeMap<LocalClass, Arc<[RowDraft]>>,
}

/// In a list of clause indices: what follows is a named port's number.
const NAMED: u32 = 1 << 31;
/// And it is none.
const UNRESOLVED: u32 = 1 << 16;
/// First in a list of clause indices: the peer may be a pod that is not known yet.
const MAY_BE_POD: u32 = u32::MAX;

impl Set {
    pub(super) fn new(id: SetId, key: SetKey, programs: Vec<Arc<Program>>) -> Self {
        let mut own_ports = HashMap::new();
        if key.direction == Direction::Ingress {
            let names = programs.iter().enumerate().flat_map(|(i, p)| p.named.iter().map(move |n| (i, n)));
            for ((program, (name, protocol)), number) in names.zip(&key.resolved) {
                if let Some(number) = number {
                    own_ports.insert((program, name.clone(), *protocol), *number);
                }
            }
        }
        let mut set = Self {
            id,
            key,
            lanes: Lanes::of(&programs),
            programs,
            retired: None,
            atoms: Vec::new(),
            of_atom: HashMap::new(),
            deciding: Vec::new(),
            doubts: false,
            asks_everyone: false,
            own_ports,
            by_clauses: HashMap::new(),
            by_rows: HashMap::new(),
            rows: BTreeMap::new(),
            next: 1,
            used: BTreeMap::new(),
            stirred: BTreeSet::from([LocalClass(0)]),
            shown: BTreeMap::new(),
        };
        set.doubts = set.programs.iter().any(|program| program.doubts());
        set.asks_everyone = set.key.direction == Direction::Egress
            && set.clauses().any(|(_, c)| c.atom.is_none() && !c.ports.named.is_empty());
        let base = set.draft(&[], &Stranger, &mut Budget::boundless()).unwrap_or_else(|_| Arc::from([]));
        set.by_rows.insert(base.clone(), LocalClass(0));
        set.rows.insert(LocalClass(0), base);
        set.by_clauses.insert(Box::default(), LocalClass(0));
        set
    }

    /// Its clauses in the order in which they decide, with the index of their program.
    pub(super) fn clauses(&self) -> impl Iterator<Item = (usize, &Clause)> {
        self.programs.iter().enumerate().flat_map(|(i, p)| p.clauses.iter().map(move |c| (i, c)))
    }

    /// Whether a peer that no atom matches may still be no stranger: a rule for everybody has ports named by the peer.
    pub(super) fn asks_everyone(&self) -> bool {
        self.asks_everyone
    }

    /// Whether a pod that is not known yet is no stranger to it.
    pub(super) fn doubts(&self) -> bool {
        self.doubts
    }

    /// Has its atoms and named ports looked up.
    pub(super) fn ask(&mut self, atoms: &mut Atoms) {
        self.of_atom.clear();
        self.deciding.clear();
        let (mut all, mut known) = (Vec::new(), HashSet::new());
        let clauses = self.programs.iter().flat_map(|program| &program.clauses);
        for (position, clause) in (0u32..).zip(clauses) {
            let Some(atom) = &clause.atom else { continue };
            let number = atoms.ask(atom, self.id);
            all.push(number);
            // A second clause of the same peers and ports decides nothing.
            if let Some(lane) = self.lanes.lane(position)
                && known.insert((lane, number))
            {
                self.of_atom.entry(number).or_default().push(position);
                self.deciding.push((number, lane));
            }
        }
        all.sort_unstable();
        all.dedup();
        self.atoms = all;
        if self.key.direction == Direction::Egress {
            let names = self.programs.iter().flat_map(|program| &program.named);
            names.for_each(|(name, protocol)| atoms.ask_name(name, *protocol));
        }
    }

    /// Needs them no more.
    pub(super) fn leave(&self, atoms: &mut Atoms) {
        self.atoms.iter().for_each(|atom| atoms.leave(*atom, self.id));
        if self.key.direction == Direction::Egress {
            let names = self.programs.iter().flat_map(|program| &program.named);
            names.for_each(|(name, protocol)| atoms.leave_name(name, *protocol));
        }
    }

    /// The numbers of its atoms, ascending.
    pub(super) fn atoms(&self) -> impl Iterator<Item = u32> + '_ {
        self.atoms.iter().copied()
    }

    /// Where in the address space its atoms decide something: elsewhere an earlier clause of the same ports does, or one of all ports.
    /// `cover` says which regions an atom is about, as ascending ranges; `decides` is told of ranges of regions.
    pub(super) fn decide_where<'c>(
        &self,
        cover: impl Fn(u32) -> &'c [Range<usize>],
        mut decides: impl FnMut(u32, Range<usize>),
    ) {
        let mut painted: HashMap<u32, Painted> = HashMap::new();
        let nothing = Painted::default();
        for (atom, lane) in &self.deciding {
            let mut fresh = Vec::new();
            for range in cover(*atom) {
                painted.entry(*lane).or_default().paint(range.clone(), |piece| fresh.push(piece));
            }
            let whole = self.lanes.whole_beside(*lane).and_then(|whole| painted.get(&whole)).unwrap_or(&nothing);
            for piece in fresh {
                whole.unpainted(piece, |piece| decides(*atom, piece));
            }
        }
    }

    /// Starts a new count of the classes in use.
    pub(super) fn begin(&mut self) {
        self.stirred.extend(self.shown.keys());
        self.used.clear();
    }

    /// The local classes of these kinds of peers, which count as in them from now on. New classes are numbered in the order of their
    /// rows, so that it does not matter in which order, or how often, peers are asked about.
    ///
    /// # Errors
    /// They have more rows than there is budget for; nothing is counted then.
    pub(super) fn classify<S: Seen>(
        &mut self,
        kinds: &[u32],
        sample: impl Fn(u32) -> S,
        budget: &mut Budget,
    ) -> Result<Vec<(u32, LocalClass)>, TooLarge> {
        let (mut scratch, mut positions) = (Vec::new(), Vec::new());
        let mut drafts: HashMap<Box<[u32]>, Arc<[RowDraft]>> = HashMap::new();
        /// The class, or the clauses by which it is found when it has a number.
        type Found = Result<LocalClass, Box<[u32]>>;
        let mut keys: Vec<(u32, Found)> = Vec::with_capacity(kinds.len());
        for kind in kinds {
            let peer = sample(*kind);
            positions.clear();
            positions.extend(peer.atoms().filter_map(|atom| self.of_atom.get(&atom)).flatten());
            positions.sort_unstable();
            scratch.clear();
            self.matching(&positions, &peer, &mut scratch);
            budget.spend(1 + positions.len())?;
            if let Some(class) = self.by_clauses.get(scratch.as_slice()) {
                keys.push((*kind, Ok(*class)));
                continue;
            }
            if !drafts.contains_key(scratch.as_slice()) {
                drafts.insert(scratch.as_slice().into(), self.draft(&positions, &peer, budget)?);
            }
            keys.push((*kind, Err(scratch.as_slice().into())));
        }
        let unknown: BTreeSet<Arc<[RowDraft]>> =
            drafts.values().filter(|rows| !self.by_rows.contains_key(*rows)).cloned().collect();
        for rows in unknown {
            let class = LocalClass(self.next);
            self.next = self.next.saturating_add(1);
            self.by_rows.insert(rows.clone(), class);
            self.rows.insert(class, rows);
        }
        for (clauses, rows) in drafts {
            let class = self.by_rows.get(&rows).copied().unwrap_or_default();
            self.by_clauses.insert(clauses, class);
        }
        let class = |key: Found| match key {
            Ok(class) => class,
            Err(clauses) => self.by_clauses.get(&clauses).copied().unwrap_or_default(),
        };
        let classes: Vec<(u32, LocalClass)> = keys.into_iter().map(|(kind, key)| (kind, class(key))).collect();
        for (_, class) in classes.iter().filter(|(_, class)| *class != LocalClass(0)) {
            let kinds = self.used.entry(*class).or_default();
            *kinds += 1;
            if *kinds == 1 {
                self.stirred.insert(*class);
            }
        }
        Ok(classes)
    }

    /// A kind of peers is no longer in this class.
    pub(super) fn release(&mut self, class: LocalClass) {
        if let Some(kinds) = self.used.get_mut(&class) {
            *kinds = kinds.saturating_sub(1);
            if *kinds == 0 {
                self.used.remove(&class);
                self.stirred.insert(class);
            }
        }
    }

    /// Whether somebody is in a class; strangers always are.
    fn is_in_use(&self, class: LocalClass) -> bool {
        class == LocalClass(0) || self.used.contains_key(&class)
    }

    /// The classes in use of which the last image does not have the rows, ascending.
    pub(super) fn to_show(&self) -> impl Iterator<Item = LocalClass> + '_ {
        self.stirred.iter().copied().filter(|class| self.is_in_use(*class) && !self.shown.contains_key(class))
    }

    /// The rows of a class.
    pub(super) fn rows_of(&self, class: LocalClass) -> Option<Arc<[RowDraft]>> {
        self.rows.get(&class).cloned()
    }

    /// The last image has the rows of the classes in use now. Of these it had some before.
    pub(super) fn show(&mut self) -> Vec<(LocalClass, Arc<[RowDraft]>)> {
        let mut gone = Vec::new();
        for class in std::mem::take(&mut self.stirred) {
            if !self.is_in_use(class) {
                gone.extend(self.shown.remove(&class).map(|rows| (class, rows)));
            } else if !self.shown.contains_key(&class)
                && let Some(rows) = self.rows_of(class)
            {
                self.shown.insert(class, rows);
            }
        }
        gone
    }

    /// NetworkPolicies among its programs.
    pub(super) fn isolating(&self) -> impl Iterator<Item = &NamespacedName> {
        self.programs.iter().filter_map(|program| match &program.policy {
            PolicyRef::Namespaced(name) => Some(name),
            PolicyRef::Cluster { .. } => None,
        })
    }

    /// The keys of a class's rows with what decides there; none: nothing does, and nothing isolates.
    pub(super) fn resolve<'s>(
        &'s self,
        class: LocalClass,
        rows: &'s [RowDraft],
    ) -> impl Iterator<Item = (RowKey, Option<Deciding<'s>>)> + 's {
        rows.iter().filter_map(move |draft| {
            let RowDraft { protocol, port, port_bits, .. } = *draft;
            let row = RowKey { set: self.id, class, protocol, port, port_bits };
            let Some(position) = draft.clause else { return Some((row, None)) };
            let (_, program, clause) = self.position(position)?;
            let verdict = if clause.action == Action::Deny { Verdict::Deny } else { Verdict::Allow };
            let key = (program.version, clause.rule, clause.peer, draft.port_index);
            Some((row, Some(Deciding { key, verdict, program })))
        })
    }

    /// The clause at an index over the clauses of all programs, with its program's index.
    fn position(&self, position: u32) -> Option<(usize, &Program, &Clause)> {
        let (index, within) = self.lanes.program(position)?;
        let program = self.programs.get(index)?;
        Some((index, program, program.clauses.get(within)?))
    }

    /// Forgets classes that nobody is in, once they are many, and what was found out about peers that are gone. Which classes are
    /// remembered must depend on nothing but the images before: a class that comes back has the number it had.
    pub(super) fn forget_unused(&mut self) {
        let used = &self.used;
        if self.rows.len() > 2 * (used.len() + 1) + 64 {
            let keep = |class: &LocalClass| class.0 == 0 || used.contains_key(class);
            self.rows.retain(|class, _| keep(class));
            self.by_rows.retain(|_, class| keep(class));
            self.by_clauses.retain(|_, class| keep(class));
        }
        if self.by_clauses.len() > 16 * (used.len() + 1) + 1024 {
            self.by_clauses.retain(|clauses, class| clauses.is_empty() || (used.contains_key(class) && class.0 != 0));
        }
    }

    /// Lists what makes this peer, which these clauses match, differ from a stranger.
    fn matching(&self, positions: &[u32], peer: &impl Seen, out: &mut Vec<u32>) {
        if peer.may_be_pod() && self.doubts() {
            out.push(MAY_BE_POD);
        }
        if self.key.direction == Direction::Ingress {
            out.extend(positions);
            return;
        }
        for (index, matched) in merged(positions, self.lanes.everyone_named(), &[]) {
            let Some((_, _, clause)) = self.position(index) else { continue };
            let before = out.len();
            out.push(index);
            let mut differs = matched && clause.atom.is_some() && clause.ports.has_numbers;
            for (name, protocol) in &clause.ports.named {
                let number = peer.named_port(name, *protocol);
                differs |= number.is_some();
                out.push(NAMED | number.map_or(UNRESOLVED, u32::from));
            }
            if !differs {
                out.truncate(before);
            }
        }
    }

    /// The rows of a peer that these clauses match.
    fn draft(&self, positions: &[u32], peer: &impl Seen, budget: &mut Budget) -> Result<Arc<[RowDraft]>, TooLarge> {
        let mut candidates = Candidates::default();
        let doubtful = if peer.may_be_pod() { self.lanes.doubtful() } else { &[] };
        // What a clause of all ports leaves to later ones of its stage, or of any: nothing.
        let (mut over, mut passes): (Option<Stage>, Option<Stage>) = (None, None);
        let mut seen: HashSet<u32> = HashSet::new();
        for (index, matched) in merged(positions, self.lanes.everyone(), doubtful) {
            let Some((program, Program { stage, .. }, clause)) = self.position(index) else { continue };
            let (stage, doubtful) = (*stage, !matched);
            if over.is_some_and(|over| stage <= over) {
                continue;
            }
            if matched && self.lanes.lane(index).is_some_and(|lane| !seen.insert(lane)) {
                continue;
            }
            if clause.action == Action::Pass {
                passes = Some(stage);
            }
            budget.spend(1 + clause.ports.list.as_ref().map_or(0, Vec::len))?;
            let base = Candidate { clause: Some(index), port: None, stage, action: clause.action, doubtful };
            let Some(list) = &clause.ports.list else {
                candidates.add_all(base);
                match matched {
                    true if passes != Some(stage) => break,
                    true => over = Some(stage),
                    false => {}
                }
                continue;
            };
            for port in list {
                let range = match &port.wanted {
                    PortMatch::Any => Some((0, u16::MAX)),
                    PortMatch::Range(first, last) => Some((*first, *last)),
                    // What an unknown pod calls its ports is not known either.
                    PortMatch::Named(_) if doubtful && self.key.direction == Direction::Egress => Some((0, u16::MAX)),
                    PortMatch::Named(name) => self.named_port(program, name, port.protocol, peer).map(|n| (n, n)),
                };
                if let Some((first, last)) = range {
                    let entry = Candidate { port: Some(port.index), ..base };
                    candidates.add(entry, RowProtocol::Ports(port.protocol), first, last);
                }
            }
        }
        if !self.isolates() {
            let (stage, action) = (Stage::Default, Action::Accept);
            candidates.add_all(Candidate { clause: None, port: None, stage, action, doubtful: false });
        }
        let rows = candidates.rows();
        budget.spend(ROW * rows.len())?;
        Ok(rows)
    }

    /// Whether a NetworkPolicy is among its programs: then what no rule allows is denied.
    pub(super) fn isolates(&self) -> bool {
        self.programs.iter().any(|program| program.stage == Stage::Namespaced)
    }

    fn named_port(&self, program: usize, name: &str, protocol: Protocol, peer: &impl Seen) -> Option<u16> {
        match self.key.direction {
            Direction::Ingress => self.own_ports.get(&(program, name.to_owned(), protocol)).copied(),
            Direction::Egress => peer.named_port(name, protocol),
        }
    }
}

/// The numbers of three ascending lists in one, each with whether it is in one of the first two.
fn merged<'l>(first: &'l [u32], second: &'l [u32], doubtful: &'l [u32]) -> impl Iterator<Item = (u32, bool)> + 'l {
    let mut first = first.iter().copied().peekable();
    let mut second = second.iter().copied().peekable();
    let mut doubtful = doubtful.iter().copied().peekable();
    std::iter::from_fn(move || {
        let heads = [first.peek(), second.peek(), doubtful.peek()];
        let next = heads.into_iter().flatten().copied().min()?;
        let sure = first.next_if_eq(&next).is_some() | second.next_if_eq(&next).is_some();
        doubtful.next_if_eq(&next);
        Some((next, sure))
    })
}

/// A clause with one of its ports, as it stands for some traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Candidate {
    clause: Option<u32>,
    port: Option<u32>,
    stage: Stage,
    action: Action,
    /// Whether it matches is not known: one that denies does, after one that passes nothing of its stage is accepted.
    doubtful: bool,
}

/// All clauses that match a peer, in the order in which they are asked, with the traffic that each is about.
#[derive(Default)]
struct Candidates {
    list: Vec<Candidate>,
    spans: BTreeMap<RowProtocol, Vec<Span>>,
}

impl Candidates {
    fn add(&mut self, candidate: Candidate, protocol: RowProtocol, first: u16, last: u16) {
        if self.list.last() != Some(&candidate) {
            self.list.push(candidate);
        }
        let rank = u32::try_from(self.list.len()).unwrap_or(u32::MAX) - 1;
        self.spans.entry(protocol).or_default().push(Span { first, last, rank });
    }

    /// For all traffic.
    fn add_all(&mut self, candidate: Candidate) {
        for protocol in Protocol::ALL {
            self.add(candidate, RowProtocol::Ports(protocol), 0, u16::MAX);
        }
        self.add(candidate, RowProtocol::Other, 0, 0);
    }

    fn get(&self, rank: u32) -> Option<&Candidate> {
        self.list.get(usize::try_from(rank).ok()?)
    }

    /// The first that decides: one that passes takes the rest of its stage with it.
    fn decide(&self, ranks: &mut dyn Iterator<Item = u32>) -> Option<u32> {
        let (mut stage, mut passed_perhaps) = (Stage::Admin, None);
        for rank in ranks {
            let Some(candidate) = self.get(rank).filter(|candidate| candidate.stage >= stage) else { continue };
            match candidate.action {
                Action::Deny => return Some(rank),
                Action::Pass if candidate.doubtful => passed_perhaps = Some(candidate.stage),
                Action::Accept if passed_perhaps != Some(candidate.stage) => return Some(rank),
                Action::Accept | Action::Pass => stage = candidate.stage.next(),
            }
        }
        None
    }

    fn rows(&self) -> Arc<[RowDraft]> {
        let mut rows = Vec::new();
        for (protocol, spans) in &self.spans {
            for span in ports::flatten(spans, |ranks| self.decide(ranks)) {
                let Some(candidate) = self.get(span.rank) else { continue };
                let pieces = match protocol {
                    RowProtocol::Ports(_) => ports::prefixes(span.first, span.last),
                    RowProtocol::Other => vec![(0, 0)],
                };
                rows.extend(pieces.into_iter().map(|(port, port_bits)| RowDraft {
                    protocol: *protocol,
                    port,
                    port_bits,
                    clause: candidate.clause,
                    port_index: candidate.port,
                }));
            }
        }
        rows.into()
    }
}
