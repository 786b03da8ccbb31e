//! Policies that ask for more together than this node holds: some of them stand aside, so that the others are enforced.
//!
//! Those that stand aside are closed, which is safe and hard on the pods that they select, and for nobody else anything changes
//! ([`crate::aside`], which also says who is first). It is one at a time, so that no more stand aside than must; where many must, more and more at a time. They are tried again as their objects change, and every now and then by
//! themselves: at first soon, since what the policies before take of the tables is free only after the next ones are written.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use towpath_model::NamespacedName;
use towpath_model::desired::PolicyRef;
use towpath_plan::services::{Asks, Refusal, RefusedPart};
use tracing::warn;

use super::Reconciler;
use super::policy::REVIEW;
use crate::aside::order;
use crate::backoff::Backoff;
use crate::{read, write};

/// What stands aside is tried again after so long for the first time. Longer than policies that nobody has any more stay in the kernel's tables.
const SOON: Duration = Duration::from_secs(10);

/// So many stand aside one by one. Each time costs at most what compiling two million rows does.
const ONE_BY_ONE: usize = 8;

/// Why policies are not in the kernel.
#[derive(Debug)]
pub(super) enum Failure {
    /// They ask for more than is compiled or checked.
    TooLarge(String),
    /// They ask for more than its tables hold beside what is there.
    Full(String),
    /// Something else.
    Other(String),
}

/// The kernel's tables are emptied for others at most so often: who changes what fills them must not keep everybody's pods closed.
const VACATE_EVERY: Duration = Duration::from_secs(60);

/// Said where even closing all of them does not help.
const STAY: &str = "the policies are not enforced as they are now; those before stay in force";

/// Said where that does not help in empty tables either.
const CLOSED: &str =
    "the policies are not enforced; the pods that those before isolated are closed to all but their node";

/// Why policies stand aside, and when they are tried again.
#[derive(Debug)]
pub(super) struct Crowd {
    why: BTreeMap<PolicyRef, String>,
    again: Instant,
    tries: Backoff,
    /// All stood aside, and that was not enough.
    in_vain: bool,
    /// When the kernel's tables were emptied last.
    vacated_at: Option<Instant>,
}

impl Default for Crowd {
    fn default() -> Self {
        Self {
            why: BTreeMap::new(),
            again: Instant::now(),
            tries: Backoff::between(SOON, REVIEW),
            in_vain: false,
            vacated_at: None,
        }
    }
}

/// Those that may stand aside next.
#[derive(Debug, Default)]
struct Next {
    /// Those that did until now, and were to be tried again.
    former: Vec<PolicyRef>,
    /// The others, the first last.
    others: Option<Vec<PolicyRef>>,
    rounds: usize,
}

impl Next {
    /// So many as stand aside together; none: there are no more.
    fn take(&mut self, order: impl FnOnce() -> Vec<PolicyRef>) -> Vec<PolicyRef> {
        if !self.former.is_empty() {
            // Nothing has become better for them.
            return std::mem::take(&mut self.former);
        }
        let others = self.others.get_or_insert_with(|| order().into_iter().rev().collect());
        self.rounds += 1;
        let doubled = u32::try_from(self.rounds.saturating_sub(ONE_BY_ONE)).unwrap_or(u32::MAX);
        let count = 1usize.checked_shl(doubled).unwrap_or(usize::MAX);
        others.split_off(others.len().saturating_sub(count))
    }
}

impl Reconciler {
    /// Whether policies stand aside that are to be tried again.
    pub(super) fn crowd_is_due(&self) -> bool {
        !self.crowd.why.is_empty() && Instant::now() >= self.crowd.again
    }

    /// Has the policies enforced; those for which there is no room stand aside.
    ///
    /// # Errors
    /// Why they are not. Those that were in force before stay in force, or the pods that they isolated are closed.
    pub(super) async fn apply_policy(&mut self) -> Result<(), String> {
        let mut next = Next::default();
        if self.crowd_is_due() {
            next.former = self.take_back();
        }
        let (mut more, mut vacated) = (false, false);
        loop {
            let (reason, full) = match self.write_policy().await {
                Ok(()) => break,
                Err(Failure::Other(reason)) => return Err(reason),
                Err(Failure::TooLarge(reason)) => (reason, false),
                Err(Failure::Full(reason)) => (reason, true),
            };
            let waits = self.crowd.in_vain && Instant::now() < self.crowd.again;
            let those = if waits {
                Vec::new()
            } else {
                next.take(|| tokio::task::block_in_place(|| order(read(&self.index).world(), &self.node)))
            };
            if !those.is_empty() {
                more = true;
                self.set_aside(&those, &reason);
                continue;
            }
            let stood_aside = !self.take_back().is_empty();
            self.crowd.why.clear();
            if !waits {
                let vacate_from = self.crowd.vacated_at.map(|at| at + VACATE_EVERY);
                if full && vacate_from.is_none_or(|from| Instant::now() >= from) {
                    // Even what closes pods finds no room beside what is there: what is there goes first.
                    self.vacate(&reason).await?;
                    (next, more, vacated) = (Next::default(), false, true);
                    continue;
                }
                self.crowd.in_vain = stood_aside;
                self.crowd.again = vacate_from.filter(|_| full && !vacated).unwrap_or_else(|| Instant::now() + REVIEW);
            }
            self.with_report(|report| report.aside.clear());
            return Err(format!("{}: {reason}", if vacated { CLOSED } else { STAY }));
        }
        self.crowd.in_vain = false;
        let aside = read(&self.index).aside();
        self.crowd.why.retain(|policy, _| aside.contains(policy));
        if more {
            self.crowd.again = Instant::now() + self.crowd.tries.failed();
        } else if aside.is_empty() {
            self.crowd.tries.worked();
        }
        let refusals: Vec<Refusal> = self.crowd.why.iter().map(|(policy, why)| refusal(policy, why)).collect();
        self.with_report(|report| report.aside = refusals);
        Ok(())
    }

    /// Has the kernel's tables emptied, with all pods closed that have rules there: better than rules that nobody has written any more.
    ///
    /// # Errors
    /// Why they were not.
    async fn vacate(&mut self, reason: &str) -> Result<(), String> {
        warn!(
            reason,
            "the tables of policy are so full that no change fits: pods with policies are closed until they are written anew"
        );
        self.crowd.vacated_at = Some(Instant::now());
        self.pod_sets.retain(|_, sets| !sets.isolates());
        self.datapath.vacate_policy().await.map_err(|error| error.to_string())?;
        self.forget_compiled().await
    }

    fn set_aside(&mut self, policies: &[PolicyRef], reason: &str) {
        for policy in policies {
            warn!(%policy, reason, "stands aside, and closes the pods that it selects: there is no room for its rules");
            self.crowd.why.insert(policy.clone(), reason.to_owned());
        }
        self.policy_touched.merge(write(&self.index).set_aside(policies));
    }

    /// Has all of them as they are written again; which.
    fn take_back(&mut self) -> Vec<PolicyRef> {
        let (policies, touched) = write(&self.index).take_back();
        self.policy_touched.merge(touched);
        policies
    }
}

fn refusal(policy: &PolicyRef, why: &str) -> Refusal {
    let (asks, name) = match policy {
        PolicyRef::Namespaced(name) => (Asks::NetworkPolicy, name.clone()),
        PolicyRef::Cluster { name, .. } => (Asks::ClusterNetworkPolicy, NamespacedName::new("", name)),
    };
    let reason = format!(
        "its rules are not enforced, and nobody is admitted where it isolates (an audited policy: it is not judged), until it asks for less or \
         there is more room: {why}"
    );
    Refusal { asks, name, part: RefusedPart::Room, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_by_one_then_more_and_more_until_there_are_no_more() {
        let named = |n: usize| PolicyRef::Namespaced(NamespacedName::new("a", format!("p{n:03}")));
        let mut next = Next { former: vec![named(900), named(901)], ..Next::default() };
        let all = || (0..30).map(named).collect();
        assert_eq!(next.take(all), [named(900), named(901)], "as before, at once");
        let mut sizes = Vec::new();
        let mut taken = Vec::new();
        loop {
            let those = next.take(all);
            if those.is_empty() {
                break;
            }
            sizes.push(those.len());
            taken.extend(those.into_iter().rev());
        }
        assert_eq!(sizes, [1, 1, 1, 1, 1, 1, 1, 1, 2, 4, 8, 8]);
        assert_eq!(taken, (0..30).map(named).collect::<Vec<_>>(), "in their order");
    }
}
