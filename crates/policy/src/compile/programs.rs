//! The programs that sets have, or that the next set of their policies gets; and of how many policies they are.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use towpath_model::Direction;
use towpath_model::desired::PolicyRef;

use super::program::Program;

/// Whose program it is.
pub(super) type Whose = (PolicyRef, Direction);

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Programs {
    all: HashMap<Whose, Arc<Program>>,
    /// Of how many policies they are: most have two.
    policies: usize,
}

impl Programs {
    /// One of them.
    pub(super) fn get(&self, whose: &Whose) -> Option<&Arc<Program>> {
        self.all.get(whose)
    }

    /// One of them; if it is not there yet, as it is made.
    pub(super) fn get_or(&mut self, whose: Whose, make: impl FnOnce() -> Program) -> Arc<Program> {
        if let Some(known) = self.all.get(&whose) {
            return known.clone();
        }
        self.policies += usize::from(!self.all.contains_key(&other(&whose)));
        let made = Arc::new(make());
        self.all.insert(whose, made.clone());
        made
    }

    /// Takes one out.
    pub(super) fn remove(&mut self, whose: &Whose) {
        if self.all.remove(whose).is_some() && !self.all.contains_key(&other(whose)) {
            self.policies = self.policies.saturating_sub(1);
        }
    }

    /// Takes those of these out that no set has any more.
    pub(super) fn remove_idle(&mut self, of: impl Iterator<Item = Whose>) {
        for whose in of {
            if self.all.get(&whose).is_some_and(|program| Arc::strong_count(program) == 1) {
                self.remove(&whose);
            }
        }
    }

    /// Keeps these. Looks at all.
    pub(super) fn retain(&mut self, keep: impl Fn(&Whose, &Arc<Program>) -> bool) {
        self.all.retain(|whose, program| keep(whose, program));
        self.policies = self.all.keys().map(|(policy, _)| policy).collect::<HashSet<_>>().len();
    }

    /// Of how many policies they are, but for these.
    pub(super) fn policies_but(&self, without: &BTreeSet<&PolicyRef>) -> usize {
        let both = [Direction::Ingress, Direction::Egress];
        let has = |policy: &&&PolicyRef| both.iter().any(|way| self.all.contains_key(&((**policy).clone(), *way)));
        self.policies.saturating_sub(without.iter().filter(has).count())
    }
}

/// The same policy's of the other direction.
fn other((policy, direction): &Whose) -> Whose {
    let other = match direction {
        Direction::Ingress => Direction::Egress,
        Direction::Egress => Direction::Ingress,
    };
    (policy.clone(), other)
}

#[cfg(test)]
mod tests {
    use towpath_model::NamespacedName;

    use super::*;

    #[test]
    fn policies_are_counted_once_however_they_come_and_go() {
        let name = |n: usize| NamespacedName::new("a", format!("p{n}"));
        let whose = |n: usize, direction| (PolicyRef::Namespaced(name(n)), direction);
        let mut programs = Programs::default();
        let mut held = Vec::new();
        for (n, direction) in
            [(0, Direction::Ingress), (0, Direction::Egress), (1, Direction::Egress), (0, Direction::Ingress)]
        {
            held.push(programs.get_or(whose(n, direction), || Program::of(&name(n), direction, &[], 1)));
        }
        let none = BTreeSet::new();
        assert_eq!(programs.policies_but(&none), 2);
        let (first, unknown) = (PolicyRef::Namespaced(name(0)), PolicyRef::Namespaced(name(7)));
        assert_eq!(programs.policies_but(&BTreeSet::from([&first, &unknown])), 1);
        programs.remove(&whose(0, Direction::Egress));
        programs.remove(&whose(0, Direction::Egress));
        assert_eq!(programs.policies_but(&none), 2, "it has one left");
        programs.remove_idle([whose(0, Direction::Ingress)].into_iter());
        assert_eq!(programs.policies_but(&none), 2, "somebody has it");
        held.clear();
        programs.remove_idle([whose(0, Direction::Ingress)].into_iter());
        assert_eq!(programs.policies_but(&none), 1);
        programs.retain(|_, _| false);
        assert_eq!(programs.policies_but(&none), 0);
    }
}
