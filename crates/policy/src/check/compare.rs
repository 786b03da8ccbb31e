//! What an image says of pods and peers, held against what their policies say.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

use towpath_model::Direction;
use towpath_model::desired::{ClassId, LocalClass, RowProtocol, Verdict};

use super::effort::{Effort, TooMuch};
use super::program::Program;
use super::reading::{News, Reading};
use super::rows::Rows;
use super::texts::{Compared, Text};
use super::{Checked, Mismatch};
use crate::evaluate::{Evaluator, Flow};
use crate::verify::ports::Ports;
use crate::view::View;

/// Where an image and the policies differ.
struct Difference {
    kind: u32,
    protocol: RowProtocol,
    port: u16,
    image: Verdict,
}

/// A text whose pods' flows are compared, with the classes that its set tells from a stranger.
struct Comparison<'c> {
    reading: &'c Reading,
    text: &'c Text,
    classes: BTreeMap<ClassId, LocalClass>,
}

impl Reading {
    /// Compares everything.
    pub(super) fn compare_all(&mut self, view: &View<'_>) -> Result<Checked, Box<Mismatch>> {
        let news = self.texts.all().map(|(number, _)| (number, News::Everybody)).collect();
        Ok(Checked { anew: true, ..self.compare_news(&news, view)? })
    }

    /// Compares what is new.
    pub(super) fn compare_news(
        &mut self,
        news: &BTreeMap<u32, News>,
        view: &View<'_>,
    ) -> Result<Checked, Box<Mismatch>> {
        let mut checked = Checked::default();
        let mut compared = Vec::new();
        let mut rows = Rows::of(self.written.image());
        let mut effort = Effort::new();
        for (number, news) in news {
            let Some(text) = self.texts.get(*number).filter(|text| !text.is_open()) else { continue };
            checked.subjects += 1;
            let classes = self.written.classes(text.alike.set).collect();
            let comparison = Comparison { reading: self, text, classes };
            let (kinds, how) = comparison.kinds(news);
            if let Some(difference) = comparison.differs(kinds.into_iter(), &mut rows, &mut checked, &mut effort)? {
                return Err(Box::new(self.named(view, text, &difference)));
            }
            compared.push((*number, how));
        }
        compared.into_iter().for_each(|(number, how)| self.texts.compared(number, how));
        Ok(checked)
    }

    /// A difference as people read it: with the reason that the evaluator gives.
    fn named(&self, view: &View<'_>, text: &Text, difference: &Difference) -> Mismatch {
        let peer = self.peers.sample(difference.kind);
        let own = text.addresses.iter().copied().find(|own| peer.is_some_and(|peer| own.is_ipv4() == peer.is_ipv4()));
        let own = own.or_else(|| text.addresses.first().copied()).unwrap_or(IpAddr::from([0; 4]));
        let peer = peer.unwrap_or(own);
        let (source, destination) = match text.alike.direction {
            Direction::Ingress => (peer, own),
            Direction::Egress => (own, peer),
        };
        let flow = Flow { source, destination, protocol: difference.protocol, port: difference.port, forwarded: true };
        Mismatch::Flow {
            pod: self.name(own).cloned().unwrap_or_else(|| towpath_model::NamespacedName::new("", "")),
            direction: text.alike.direction,
            flow,
            image: difference.image,
            policies: Evaluator::new(view).side(&flow, text.alike.direction).map(Box::new),
        }
    }
}

impl Comparison<'_> {
    /// The kinds to compare, and what has been compared then. Who is a stranger to the policies and to the set is as all strangers are: one
    /// of them stands for all.
    fn kinds(&self, news: &News) -> (Vec<u32>, Compared) {
        let peers = &self.reading.peers;
        let wanted = match news {
            News::Everybody => {
                let mut visited = vec![false; peers.kinds().len()];
                let asked = self.text.ask.iter().flat_map(|matcher| peers.matched_by(*matcher));
                let told_apart = asked.chain(self.classes.keys().flat_map(|class| peers.of_class(*class)));
                told_apart.filter_map(|kind| usize::try_from(*kind).ok()).for_each(|kind| {
                    visited.get_mut(kind).into_iter().for_each(|seen| *seen = true);
                });
                let stranger = peers.kinds().zip(&visited).find(|(kind, seen)| !**seen && peers.kind(*kind).is_some());
                let stranger = stranger.map(|(kind, _)| kind);
                let told_apart = peers.kinds().zip(visited).filter_map(|(kind, seen)| seen.then_some(kind));
                let compared = if stranger.is_some() { Compared::Wholly } else { Compared::NoStranger };
                return (told_apart.chain(stranger).collect(), compared);
            }
            News::Kinds(kinds) => kinds,
        };
        let stranger = || wanted.iter().any(|kind| self.is_stranger(*kind));
        let compared = match self.text.compared {
            Compared::NoStranger if stranger() => Compared::Wholly,
            before => before,
        };
        (wanted.iter().copied().collect(), compared)
    }

    fn is_stranger(&self, kind: u32) -> bool {
        self.reading.peers.kind(kind).is_some_and(|kind| {
            !self.classes.contains_key(&kind.class)
                && kind.matched.iter().all(|matcher| self.text.ask.binary_search(matcher).is_err())
        })
    }

    /// Where the image and the policies differ over these kinds, over all ports.
    fn differs(
        &self,
        kinds: impl Iterator<Item = u32>,
        rows: &mut Rows<'_>,
        checked: &mut Checked,
        effort: &mut Effort,
    ) -> Result<Option<Difference>, TooMuch> {
        let (set, program) = (self.text.alike.set, Program::of(self.text));
        let mut outcomes: HashMap<Vec<u32>, (Ports, HashSet<LocalClass>)> = HashMap::new();
        for number in kinds {
            let Some(kind) = self.reading.peers.kind(number) else { continue };
            let class = self.classes.get(&kind.class).copied().unwrap_or_default();
            let case = program.case(kind);
            effort.take(1 + case.len())?;
            let (said, known) = outcomes.entry(case.key()).or_insert_with(|| (program.run(&case), HashSet::new()));
            if !known.insert(class) {
                continue;
            }
            checked.compared += 1;
            let held = rows.ports(set, class);
            if held == *said {
                continue;
            }
            let too_much = held.without(said);
            let (ports, image) =
                if too_much.is_empty() { (said.without(&held), Verdict::Deny) } else { (too_much, Verdict::Allow) };
            if let Some((protocol, port)) = ports.sample() {
                return Ok(Some(Difference { kind: number, protocol, port, image }));
            }
        }
        Ok(None)
    }
}
