//! What decides over the flows of some pods in one direction: the clauses of their policies, asked of one kind of peers at a time.

use std::collections::HashMap;

use towpath_model::{Action, Direction, NamedPort, Protocol, Tier};

use super::peers::Kind;
use super::texts::{Step, Text};
use crate::verify::ports::Ports;

/// What decides over the flows of some pods in one direction.
pub(super) struct Program<'s> {
    steps: &'s [Step],
    by_matcher: HashMap<u32, Vec<u32>>,
    /// Steps about everybody.
    everyone: Vec<u32>,
    /// Some step is asked of whoever may be a pod.
    doubtful: bool,
    /// Ingress: the named ports of the pods themselves.
    own: Option<&'s [NamedPort]>,
    isolated: bool,
}

/// A peer as a program sees it.
pub(super) struct Case<'k> {
    /// Steps that match it, ascending.
    matched: Vec<u32>,
    /// Named ports that steps ask of it, and what they are in it.
    named: &'k [NamedPort],
    may_be_pod: bool,
    key: Vec<u32>,
}

impl Case<'_> {
    /// How many steps match.
    pub(super) fn len(&self) -> usize {
        self.matched.len()
    }

    /// Two with the same key are judged alike.
    pub(super) fn key(&self) -> Vec<u32> {
        self.key.clone()
    }
}

impl<'s> Program<'s> {
    pub(super) fn of(text: &'s Text) -> Self {
        let own = (text.alike.direction == Direction::Ingress).then_some(text.alike.named.as_slice());
        let (mut by_matcher, mut everyone) = (HashMap::<u32, Vec<u32>>::new(), Vec::new());
        for (number, step) in (0u32..).zip(&text.steps) {
            match step.matcher {
                Some(matcher) => by_matcher.entry(matcher).or_default().push(number),
                None => everyone.push(number),
            }
        }
        let doubtful = text.steps.iter().any(|step| step.doubtful);
        Self { steps: &text.steps, by_matcher, everyone, doubtful, own, isolated: text.isolated }
    }

    /// A peer as the program sees it.
    pub(super) fn case<'k>(&self, peer: &'k Kind) -> Case<'k> {
        let may_be_pod = peer.may_be_pod && self.doubtful;
        let mut matched = self.everyone.clone();
        matched.extend(peer.matched.iter().filter_map(|matcher| self.by_matcher.get(matcher)).flatten());
        matched.sort_unstable();
        let mut key = vec![u32::from(may_be_pod)];
        key.extend(&matched);
        if self.own.is_none() {
            for step in matched.iter().filter_map(|index| self.step(*index)) {
                let numbers = step.ports.named.iter().map(|(name, protocol)| number_of(&peer.named, name, *protocol));
                key.extend(numbers.map(|number| number.map_or(u32::MAX, u32::from)));
            }
        }
        Case { matched, named: &peer.named, may_be_pod, key }
    }

    fn step(&self, index: u32) -> Option<&Step> {
        self.steps.get(usize::try_from(index).ok()?)
    }

    /// The ports on which a peer is allowed.
    pub(super) fn run(&self, case: &Case<'_>) -> Ports {
        let (mut open, mut undecided) = (Ports::none(), Ports::all());
        self.tier(Tier::Admin, case, &mut open, &mut undecided);
        if self.isolated {
            let admitted = case.matched.iter().filter_map(|index| self.step(*index));
            let admitted: Vec<Ports> =
                admitted.filter(|step| step.tier.is_none()).map(|step| self.ports(step, case, true)).collect();
            return open.or(&Ports::any_of(&admitted).and(&undecided));
        }
        self.tier(Tier::Baseline, case, &mut open, &mut undecided);
        open.or(&undecided)
    }

    /// Takes out of `undecided` what a tier decides.
    fn tier(&self, tier: Tier, case: &Case<'_>, open: &mut Ports, undecided: &mut Ports) {
        let (mut passed, mut passed_perhaps) = (Ports::none(), Ports::none());
        for (index, step) in (0u32..).zip(self.steps).filter(|(_, step)| step.tier == Some(tier)) {
            let matches = case.matched.binary_search(&index).is_ok();
            let perhaps = !matches && case.may_be_pod && step.doubtful;
            if !matches && !perhaps {
                continue;
            }
            let hit = self.ports(step, case, matches).and(undecided);
            match (step.action, matches) {
                (Action::Deny, _) => *undecided = undecided.without(&hit),
                (Action::Accept, true) => {
                    *open = open.or(&hit.without(&passed_perhaps));
                    passed = passed.or(&hit.and(&passed_perhaps));
                    *undecided = undecided.without(&hit);
                }
                (Action::Pass, true) => {
                    passed = passed.or(&hit);
                    *undecided = undecided.without(&hit);
                }
                (Action::Pass, false) => passed_perhaps = passed_perhaps.or(&hit),
                (Action::Accept, false) => {}
            }
        }
        *undecided = undecided.or(&passed);
    }

    /// The ports of a step. What somebody calls his ports of whom it is not known whether he is a pod is not known either.
    fn ports(&self, step: &Step, case: &Case<'_>, certain: bool) -> Ports {
        let named = self.own.unwrap_or(case.named);
        step.ports.named.iter().fold(step.ports.fixed.clone(), |ports, (name, protocol)| {
            if !certain && self.own.is_none() {
                return ports.or(&Ports::of_protocol(*protocol));
            }
            number_of(named, name, *protocol).map_or(ports.clone(), |n| ports.or(&Ports::of(*protocol, n, n)))
        })
    }
}

fn number_of(named: &[NamedPort], name: &str, protocol: Protocol) -> Option<u16> {
    named.iter().find(|port| port.name == name && port.protocol == protocol).map(|port| port.number)
}
