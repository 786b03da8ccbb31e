//! What policies that are only audited would have denied on this node, by policy and rule, since each came into audit as it is now.
//!
//! The kernel counts by the numbers of sets and rules, whose meaning only this process knows. So what they mean is on disk before the kernel
//! judges by them, and what was counted is added up there together with how far the kernel's counts were read: nothing is lost or counted
//! twice, however the process ends. (After the node itself starts anew, what was not written in the last seconds is lost.)
//!
//! A policy whose text changes begins at nothing, as does one that is audited again after it was enforced: what another text would have
//! denied says nothing about it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};
use towpath_datapath::bpf::Audited;
use towpath_model::desired::{LocalClass, PolicyImage, PolicyRef, Row, RowKey, RowProtocol, RuleId, RuleInfo, SetId};
use towpath_model::{Direction, NamespacedName, Protocol, World};
use towpath_wire::status::{AuditedDenial, AuditedPolicy};
use tracing::warn;

use crate::disk::write_atomically;

/// What a file says first. Another number: another shape.
const FORMAT: u32 = 1;
/// Counts alone are written no more often.
const EVERY: Duration = Duration::from_secs(10);
/// Rules of one policy that are told apart; what further ones would deny is added to the last.
const MOST_RULES: usize = 200;

/// What a set that is only audited stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Meaning {
    direction: Direction,
    /// The policies that are not enforced, and what they said.
    policies: Vec<(PolicyRef, u64)>,
    /// NetworkPolicies that isolate in it.
    isolating: Vec<NamespacedName>,
}

/// A rule, and how often it would have denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Denial {
    direction: Direction,
    rule: String,
    connections: u64,
    last: SystemTime,
}

/// What is known of one policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Account {
    policy: PolicyRef,
    /// A hash of what it says.
    says: u64,
    since: SystemTime,
    denials: Vec<Denial>,
}

/// The file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    format: u32,
    sets: BTreeMap<u32, Meaning>,
    rules: BTreeMap<u32, RuleInfo>,
    /// How far the kernel's count of a set and rule was read.
    read: Vec<(u32, u32, u64)>,
    accounts: Vec<Account>,
}

/// The ledger of this node.
#[derive(Debug)]
pub(crate) struct Ledger {
    path: PathBuf,
    sets: BTreeMap<SetId, Meaning>,
    rules: BTreeMap<RuleId, RuleInfo>,
    read: BTreeMap<(SetId, RuleId), u64>,
    accounts: BTreeMap<PolicyRef, Account>,
    /// Sets of the image that was compiled last, and the rules of those of them that are audited; none: until there is one, pods have the
    /// sets of the run before.
    image: Option<(BTreeSet<SetId>, BTreeSet<RuleId>)>,
    written: Kept,
    written_at: Option<SystemTime>,
    complained: bool,
}

/// Who would deny by a rule of a set, in words, and the rule's own.
pub(crate) fn denying(
    rule: RuleId,
    info: Option<&RuleInfo>,
    audited: &BTreeSet<PolicyRef>,
    isolating: &BTreeSet<NamespacedName>,
) -> (String, BTreeSet<PolicyRef>) {
    let isolates = |policy: &PolicyRef| matches!(policy, PolicyRef::Namespaced(name) if isolating.contains(name));
    let (words, named): (_, BTreeSet<PolicyRef>) = match (rule, info) {
        (RuleId::DEFAULT_DENY, _) => {
            ("no rule allows it".to_owned(), audited.iter().filter(|policy| isolates(policy)).cloned().collect())
        }
        (_, Some(info)) => {
            let own = audited.iter().filter(|policy| **policy == info.policy).cloned();
            (crate::observe::words(info), own.collect())
        }
        (rule, None) => (format!("rule {}, which is gone", rule.0), BTreeSet::new()),
    };
    if !named.is_empty() {
        return (words, named);
    }
    // What an audited policy only passes on is denied by another, which is enforced.
    let whose = info.map(|info| format!("{}: ", info.policy)).unwrap_or_default();
    (format!("{whose}{words}"), audited.clone())
}

/// What policies of a world that are only audited say, as a hash.
fn audited_in(world: &World) -> BTreeMap<PolicyRef, u64> {
    let says = |text: Result<String, _>| text.map_or(0, |text: String| crate::events::refusals::hash(&[&text]));
    let namespaced = world.policies.values().filter(|policy| policy.enforcement.is_audited());
    let namespaced =
        namespaced.map(|policy| (PolicyRef::Namespaced(policy.name.clone()), says(serde_json::to_string(policy))));
    let cluster = world.cluster_policies.values().filter(|policy| policy.enforcement.is_audited());
    let cluster = cluster.map(|policy| {
        let named = PolicyRef::Cluster { tier: policy.tier, name: policy.name.clone() };
        (named, says(serde_json::to_string(policy)))
    });
    namespaced.chain(cluster).collect()
}

/// The rows of a set.
fn rows_of(image: &PolicyImage, set: SetId) -> impl Iterator<Item = &Row> {
    let protocol = RowProtocol::Ports(Protocol::Tcp);
    let first = RowKey { set, class: LocalClass(0), protocol, port: 0, port_bits: 0 };
    image.rows.range(first..).take_while(move |(key, _)| key.set == set).map(|(_, row)| row)
}

impl Ledger {
    /// As the last run left it, with what the kernel has counted since.
    pub(crate) fn open(state_dir: &Path, counts: &[Audited]) -> Self {
        let path = state_dir.join("audited.json");
        let kept = load(&path).unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                warn!(%error, file = %path.display(), "what audited policies would have denied so far is not known any more");
            }
            Kept { format: FORMAT, ..Kept::default() }
        });
        let mut ledger = Self {
            path,
            sets: kept.sets.iter().map(|(set, meaning)| (SetId(*set), meaning.clone())).collect(),
            rules: kept.rules.iter().map(|(rule, info)| (RuleId(*rule), info.clone())).collect(),
            read: kept.read.iter().map(|(set, rule, count)| ((SetId(*set), RuleId(*rule)), *count)).collect(),
            accounts: kept.accounts.iter().map(|account| (account.policy.clone(), account.clone())).collect(),
            image: None,
            written: kept,
            written_at: None,
            complained: false,
        };
        // The node started anew: its kernel has counted nothing yet, and numbers will come to mean something else.
        let there: BTreeSet<_> = counts.iter().map(|count| (count.set, count.rule)).collect();
        ledger.read.retain(|key, _| there.contains(key));
        ledger.add(counts);
        ledger
    }

    /// Takes note of an image, before the kernel judges by it.
    pub(crate) fn follow(&mut self, image: &PolicyImage, world: &World, now: SystemTime) {
        let (sets, rules) = self.image.get_or_insert_default();
        *sets = image.isolating.keys().copied().collect();
        rules.clear();
        if image.audited.is_empty() && self.accounts.is_empty() {
            return;
        }
        let said = audited_in(world);
        self.accounts.retain(|policy, account| said.get(policy) == Some(&account.says));
        for policy in image.audited.values().flatten() {
            let says = said.get(policy).copied().unwrap_or_default();
            let fresh = || Account { policy: policy.clone(), says, since: now, denials: Vec::new() };
            self.accounts.entry(policy.clone()).or_insert_with(fresh);
        }
        for (set, policies) in &image.audited {
            let of = |policy: &PolicyRef| (policy.clone(), said.get(policy).copied().unwrap_or_default());
            let is_ingress = image.pods.values().any(|sets| sets.audit_ingress == *set);
            let meaning = Meaning {
                direction: if is_ingress { Direction::Ingress } else { Direction::Egress },
                policies: policies.iter().map(of).collect(),
                isolating: image.isolating.get(set).into_iter().flatten().cloned().collect(),
            };
            self.sets.insert(*set, meaning);
        }
        for row in image.audited.keys().flat_map(|set| rows_of(image, *set)) {
            if let Some(info) = image.rules.get(&row.rule)
                && rules.insert(row.rule)
            {
                self.rules.insert(row.rule, info.clone());
            }
        }
        self.write_if(|now, written| now.sets != written.sets || now.rules != written.rules);
    }

    /// Whether there is, or may be, something to read.
    pub(crate) fn is_in_use(&self) -> bool {
        !self.accounts.is_empty() || !self.sets.is_empty()
    }

    /// Adds what the kernel counted; what it counted for sets that nobody has any more, and which therefore may go.
    pub(crate) fn read(&mut self, counts: &[Audited], now: SystemTime) -> Vec<(SetId, RuleId)> {
        self.add(counts);
        let Some((sets, rules)) = &self.image else { return Vec::new() };
        let keys = counts.iter().map(|count| (count.set, count.rule));
        let gone: Vec<_> = keys.filter(|(set, _)| !sets.contains(set)).collect();
        let counted: BTreeSet<SetId> = counts.iter().map(|count| count.set).collect();
        self.sets.retain(|set, _| sets.contains(set) || counted.contains(set));
        let by: BTreeSet<RuleId> = counts.iter().map(|count| count.rule).collect();
        self.rules.retain(|rule, _| rules.contains(rule) || by.contains(rule));
        let is_due = self.written_at.and_then(|at| now.duration_since(at).ok()).is_none_or(|age| age >= EVERY);
        // Before they go: what was read of them is on disk then.
        if is_due || !gone.is_empty() {
            self.write_if(|now, written| now != written);
        }
        gone
    }

    /// Those were taken out of the kernel.
    pub(crate) fn forgotten(&mut self, gone: &[(SetId, RuleId)]) {
        self.read.retain(|key, _| !gone.contains(key));
    }

    /// What is known of each policy, in order.
    pub(crate) fn policies(&self) -> Vec<AuditedPolicy> {
        let time = |at: SystemTime| Timestamp::try_from(at).map_or_else(|_| String::new(), |at| format!("{at:.0}"));
        let denial = |denial: &Denial| AuditedDenial {
            direction: direction_name(denial.direction).to_owned(),
            rule: denial.rule.clone(),
            connections: denial.connections,
            last: time(denial.last),
        };
        let policy = |account: &Account| AuditedPolicy {
            policy: account.policy.to_string(),
            since: time(account.since),
            connections: account.denials.iter().map(|denial| denial.connections).fold(0, u64::saturating_add),
            denials: account.denials.iter().map(denial).collect(),
        };
        self.accounts.values().map(policy).collect()
    }

    fn add(&mut self, counts: &[Audited]) {
        for count in counts {
            let known = self.read.insert((count.set, count.rule), count.connections).unwrap_or(0);
            // Less than before: it was taken away and counts from nothing.
            let more = count.connections.checked_sub(known).unwrap_or(count.connections);
            let Some(meaning) = self.sets.get(&count.set).filter(|_| more > 0) else { continue };
            let audited = meaning.policies.iter().map(|(policy, _)| policy.clone()).collect();
            let isolating = meaning.isolating.iter().cloned().collect();
            let (words, policies) = denying(count.rule, self.rules.get(&count.rule), &audited, &isolating);
            for (policy, says) in meaning.policies.iter().filter(|(policy, _)| policies.contains(policy)) {
                if let Some(account) = self.accounts.get_mut(policy).filter(|account| account.says == *says) {
                    account.add(meaning.direction, &words, more, count.last);
                }
            }
        }
    }

    fn kept(&self) -> Kept {
        Kept {
            format: FORMAT,
            sets: self.sets.iter().map(|(set, meaning)| (set.0, meaning.clone())).collect(),
            rules: self.rules.iter().map(|(rule, info)| (rule.0, info.clone())).collect(),
            read: self.read.iter().map(|((set, rule), count)| (set.0, rule.0, *count)).collect(),
            accounts: self.accounts.values().cloned().collect(),
        }
    }

    fn write_if(&mut self, differs: impl Fn(&Kept, &Kept) -> bool) {
        let kept = self.kept();
        if !differs(&kept, &self.written) {
            return;
        }
        let written = serde_json::to_vec(&kept).map_err(io::Error::other);
        match written.and_then(|bytes| write_atomically(&self.path, &bytes)) {
            Ok(()) => {
                (self.written, self.complained) = (kept, false);
                self.written_at = Some(SystemTime::now());
            }
            Err(error) if !self.complained => {
                self.complained = true;
                warn!(%error, file = %self.path.display(), "what audited policies would deny is not kept over the agent's next start");
            }
            Err(_) => {}
        }
    }
}

impl Account {
    fn add(&mut self, direction: Direction, rule: &str, connections: u64, last: SystemTime) {
        let is_full = self.denials.len() >= MOST_RULES;
        let known = self.denials.iter().position(|denial| denial.direction == direction && denial.rule == rule);
        match known.or_else(|| is_full.then(|| self.denials.len().saturating_sub(1))) {
            Some(index) => {
                if let Some(denial) = self.denials.get_mut(index) {
                    denial.connections = denial.connections.saturating_add(connections);
                    denial.last = denial.last.max(last);
                }
            }
            None => self.denials.push(Denial { direction, rule: rule.to_owned(), connections, last }),
        }
    }
}

fn load(path: &Path) -> io::Result<Kept> {
    let kept: Kept = serde_json::from_slice(&std::fs::read(path)?).map_err(io::Error::other)?;
    if kept.format != FORMAT {
        return Err(io::Error::other(format!("format {} is of another version", kept.format)));
    }
    Ok(kept)
}

/// As it is written in events and answers.
pub(crate) fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "Ingress",
        Direction::Egress => "Egress",
    }
}

#[cfg(test)]
mod tests;
