//! How much was asked, and what kinds of answers there were: a generator that asks nothing finds nothing.

use std::collections::BTreeMap;

use towpath_model::desired::Verdict;
use towpath_policy::{Reason, Side};

use crate::text::Outcome;

/// Counts of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// (cluster, policies, packet) cases.
    pub cases: u64,
    /// Clusters.
    pub clusters: u64,
    /// Ends of packets that evaluator and image judged.
    pub ends: u64,
    /// Of these, the oracle's answer was compared.
    pub oracle: u64,
    /// Packets that ran through the kernel's programs.
    pub kernel: u64,
    /// Connections whose rules in the kernel were compared.
    pub rules: u64,
    /// Ends that a rule allowed, and denied.
    pub by_rule: [u64; 2],
    /// Ends denied because nothing matched.
    pub by_default: u64,
    /// Ends open because nothing isolates.
    pub open: u64,
    /// Ends decided behind a rule that passes.
    pub passed: u64,
    /// Denied to what may be a pod that is not known yet.
    pub unknown: u64,
    /// Policies with one wrong place, by what became of them.
    pub read: BTreeMap<Outcome, u64>,
}

impl Tally {
    /// Counts one end's answer.
    pub fn count(&mut self, side: &Side) {
        self.ends += 1;
        match &side.reason {
            Reason::Rule { .. } if side.verdict == Verdict::Allow => self.by_rule[0] += 1,
            Reason::Rule { .. } => self.by_rule[1] += 1,
            Reason::DefaultDeny { .. } => self.by_default += 1,
            Reason::NotIsolated => self.open += 1,
            Reason::Itself | Reason::OwnNode | Reason::Unknown => {}
        }
        self.passed += u64::from(!side.passed.is_empty());
    }

    /// Adds another's counts.
    pub fn add(&mut self, other: &Self) {
        self.cases += other.cases;
        self.clusters += other.clusters;
        self.ends += other.ends;
        self.oracle += other.oracle;
        self.kernel += other.kernel;
        self.rules += other.rules;
        self.by_rule[0] += other.by_rule[0];
        self.by_rule[1] += other.by_rule[1];
        self.by_default += other.by_default;
        self.open += other.open;
        self.passed += other.passed;
        self.unknown += other.unknown;
        other.read.iter().for_each(|(outcome, count)| *self.read.entry(*outcome).or_default() += count);
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [allowed, denied] = self.by_rule;
        write!(
            f,
            "{} cases of {} clusters: {} ends judged, {} of them by the oracle too; {} packets through the kernel, {} rules compared there; \
             {allowed} allowed and {denied} denied by a rule, {} by default, {} open, {} behind a Pass, {} denied to pods not known yet; policies with a wrong place: {:?}",
            self.cases,
            self.clusters,
            self.ends,
            self.oracle,
            self.kernel,
            self.rules,
            self.by_default,
            self.open,
            self.passed,
            self.unknown,
            self.read
        )
    }
}
