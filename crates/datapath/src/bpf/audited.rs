//! What policies that are only audited would have denied: counted by the programs, whoever listens.

use std::time::{Duration, SystemTime};

use libbpf_rs::Object;
use towpath_model::desired::{RuleId, SetId};

use super::error::Result;
use super::map::Map;
use super::observe::monotonic;
use crate::abi::{self, AuditKey};

/// Connections that passed and would have been denied by one rule of one set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Audited {
    /// The set that would have judged ([`PodSets::audit_ingress`](towpath_model::desired::PodSets::audit_ingress)).
    pub set: SetId,
    /// The rule.
    pub rule: RuleId,
    /// How many, since the entry was made.
    pub connections: u64,
    /// When there was one last.
    pub last: SystemTime,
}

/// The map of them, which only the programs add to.
#[derive(Debug)]
pub(super) struct AuditMap(Map<AuditKey, abi::Audited>);

impl AuditMap {
    pub(super) fn open(object: &Object) -> Result<Self> {
        Ok(Self(Map::open(object, "tp_audited")?))
    }

    /// All of it.
    pub(super) fn counts(&self) -> Result<Vec<Audited>> {
        let (entries, since_boot, now) = (self.0.entries()?, monotonic(), SystemTime::now());
        let decode = |(key, held): (AuditKey, abi::Audited)| Audited {
            set: SetId(key.set),
            rule: RuleId(key.rule),
            connections: held.connections,
            last: now.checked_sub(Duration::from_nanos(since_boot.saturating_sub(held.last))).unwrap_or(now),
        };
        Ok(entries.into_iter().map(decode).collect())
    }

    /// Takes entries away. (A program that is just counting in one may do so in another's: both are counts of what does no harm.)
    pub(super) fn forget(&self, keys: &[(SetId, RuleId)]) -> Result<()> {
        keys.iter().try_for_each(|(set, rule)| self.0.delete(&AuditKey { set: set.0, rule: rule.0 }).map(drop))
    }

    pub(super) fn usage(&self) -> Result<(&'static str, usize, u32)> {
        Ok((self.0.name(), self.0.entries()?.len(), self.0.limit()))
    }
}
