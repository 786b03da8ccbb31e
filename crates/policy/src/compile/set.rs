//! A policy set: the programs of one direction that one or more pods share, and the peers as it sees them.
//!
//! A set never changes its meaning: when a policy changes, its pods get another set. Its local classes are numbered as peers
//! turn up and a number is never given to other rows while the set lives, so rows can be added under traffic.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use towpath_model::desired::{LocalClass, RowProtocol, SetId};
use towpath_model::{Action, Direction, PortMatch, Protocol};

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
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct RowDraft {
    pub(super) protocol: RowProtocol,
    pub(super) port: u16,
    pub(super) port_bits: u8,
    /// Index over the clauses of all programs; none: no clause decides, and nothing isolates.
    pub(super) clause: Option<u32>,
    /// Index into the rule's ports.
    pub(super) port_index: Option<u32>,
}

/// A peer, as far as sets look at it.
pub(super) trait Seen {
    /// Whether an atom (by the number it has in this compilation) matches it.
    fn matches(&self, atom: usize) -> bool;
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
    fn matches(&self, _: usize) -> bool {
        false
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
    /// Ingress: named ports of the pods.
    own_ports: HashMap<(usize, String, Protocol), u16>,
    /// From the clauses that match (and what named ports are) to the class.
    by_clauses: HashMap<Box<[u32]>, LocalClass>,
    by_rows: HashMap<Arc<[RowDraft]>, LocalClass>,
    rows: BTreeMap<LocalClass, Arc<[RowDraft]>>,
    next: u32,
    used: BTreeSet<LocalClass>,
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
            programs,
            retired: None,
            own_ports,
            by_clauses: HashMap::new(),
            by_rows: HashMap::new(),
            rows: BTreeMap::new(),
            next: 1,
            used: BTreeSet::new(),
        };
        let base = set.draft(&[], &Stranger);
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
        self.key.direction == Direction::Egress
            && self.clauses().any(|(_, c)| c.atom.is_none() && c.named().next().is_some())
    }

    /// Whether a pod that is not known yet is no stranger to it.
    pub(super) fn doubts(&self) -> bool {
        self.programs.iter().any(|program| program.doubts())
    }

    /// Starts a new count of the classes in use.
    pub(super) fn begin(&mut self) {
        self.used.clear();
        self.used.insert(LocalClass(0));
    }

    /// The local class of a peer. `atoms` holds the number of each clause's atom; `scratch` is overwritten.
    pub(super) fn classify(&mut self, atoms: &[Option<usize>], peer: &impl Seen, scratch: &mut Vec<u32>) -> LocalClass {
        scratch.clear();
        self.matching(atoms, peer, scratch);
        let class = match self.by_clauses.get(scratch.as_slice()) {
            Some(class) => *class,
            None => {
                let rows = self.draft(atoms, peer);
                let class = match self.by_rows.get(&rows) {
                    Some(class) => *class,
                    None => {
                        let class = LocalClass(self.next);
                        self.next = self.next.saturating_add(1);
                        self.by_rows.insert(rows.clone(), class);
                        self.rows.insert(class, rows);
                        class
                    }
                };
                self.by_clauses.insert(scratch.as_slice().into(), class);
                class
            }
        };
        self.used.insert(class);
        class
    }

    /// The classes in use since [`Set::begin`] with their rows.
    pub(super) fn rows(&self) -> impl Iterator<Item = (LocalClass, &Arc<[RowDraft]>)> {
        self.used.iter().filter_map(|class| Some((*class, self.rows.get(class)?)))
    }

    /// Forgets classes that nobody is in, once they are many.
    pub(super) fn forget_unused(&mut self) {
        if self.rows.len() <= 2 * self.used.len() + 64 && self.by_clauses.len() <= 16 * self.used.len() + 1024 {
            return;
        }
        let used = &self.used;
        self.rows.retain(|class, _| used.contains(class));
        self.by_rows.retain(|_, class| used.contains(class));
        self.by_clauses.retain(|clauses, class| clauses.is_empty() || (used.contains(class) && class.0 != 0));
    }

    /// Lists the clauses that make this peer differ from a stranger.
    fn matching(&self, atoms: &[Option<usize>], peer: &impl Seen, out: &mut Vec<u32>) {
        let egress = self.key.direction == Direction::Egress;
        if peer.may_be_pod() && self.doubts() {
            out.push(MAY_BE_POD);
        }
        for ((index, (_, clause)), atom) in (0u32..).zip(self.clauses()).zip(atoms) {
            if atom.is_some_and(|a| !peer.matches(a)) {
                continue;
            }
            let before = out.len();
            out.push(index);
            let mut differs = atom.is_some() && clause.has_numbers();
            if egress {
                for (name, protocol) in clause.named() {
                    let number = peer.named_port(name, protocol);
                    differs |= number.is_some();
                    out.push(NAMED | number.map_or(UNRESOLVED, u32::from));
                }
            } else {
                differs |= atom.is_some();
            }
            if !differs {
                out.truncate(before);
            }
        }
    }

    /// The rows of a peer. Without `atoms`: of a stranger.
    fn draft(&self, atoms: &[Option<usize>], peer: &impl Seen) -> Arc<[RowDraft]> {
        let mut candidates = Candidates::default();
        for (position, (program, clause)) in self.clauses().enumerate() {
            let Ok(index) = u32::try_from(position) else { break };
            let matched = match &clause.atom {
                None => true,
                Some(_) => atoms.get(position).copied().flatten().is_some_and(|a| peer.matches(a)),
            };
            let Some(stage) = self.programs.get(program).map(|p| p.stage) else { continue };
            let doubtful = !matched && stage != Stage::Namespaced && peer.may_be_pod() && clause.doubts();
            if !matched && !doubtful {
                continue;
            }
            let base = Candidate { clause: Some(index), port: None, stage, action: clause.action, doubtful };
            let Some(list) = &clause.ports else {
                candidates.add_all(base);
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
        candidates.rows()
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
