//! What each pod may hold of the connection table. The counting and the refusing are the kernel's (`tp_flows` in
//! `bpf/abi.h`); here pods are given their accounts and lose them, and the size of a share is settled.
//!
//! An account is there before its pod is known to the programs, and goes seconds after the last connection that is counted
//! to it: until then a program may still be counting in it, and the kernel would give its memory to the next pod at once.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use libbpf_rs::Object;

use super::error::Result;
use super::map::Map;
use super::object;
use crate::abi::{self, Addr, Adjust, Ct, CtKey, Flows, TP_HOLDER_NODE, TP_HOLDER_OTHERS};

/// How long an account stays empty before it goes: a program that looked it up has ended long before.
const GRACE: Duration = Duration::from_secs(2);

/// A share is never larger than if this many divided a half of the table. Up to here a share stays the same as pods come,
/// so that what is promised to one is not taken back when the next is there. Nodes have 110 pods unless told otherwise.
const HOLDERS_MIN: u32 = 128;

/// Holders that are no pods: their accounts are always there.
const NO_PODS: [u32; 2] = [TP_HOLDER_OTHERS, TP_HOLDER_NODE];

/// How the connection table is held.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Entries of all.
    pub all: u32,
    /// While fewer than these are held, pods may hold more than their share.
    pub room: u32,
    /// Entries that each pod may hold whatever others hold.
    pub share: u32,
    /// Who holds how many, by id.
    pub holders: Vec<Holder>,
}

/// One account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Pod id, or `enum tp_holder`.
    pub id: u32,
    /// The pod's addresses; none of a pod that is gone.
    pub addresses: Vec<IpAddr>,
    /// Connections that are counted to it.
    pub held: u32,
    /// It may hold no more: a new connection takes the place of one that is not established, or is refused.
    pub full: bool,
}

impl Holder {
    /// Whose account it is, in words.
    pub fn name(&self) -> String {
        match (self.id, self.addresses.as_slice()) {
            (TP_HOLDER_NODE, _) => "the node itself".to_owned(),
            (TP_HOLDER_OTHERS, _) => "clients outside, with backends on other nodes".to_owned(),
            (id, []) => format!("former pod {id}"),
            (_, addresses) => {
                let texts: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
                format!("pod {}", texts.join(", "))
            }
        }
    }
}

/// The programs' own rule, see `tp_may_hold_more` in `bpf/budget.h`.
fn is_full(held: u32, all: u32, budget: &abi::Budget) -> bool {
    held >= budget.share && (all >= budget.room || held >= 2u32.saturating_mul(budget.room - all))
}

/// What an account says: the programs read it as signed, see `bpf/budget.h`.
fn count(flows: &Flows) -> u32 {
    flows.held.cast_signed().max(0).cast_unsigned()
}

/// Half of a table of `limit` entries, and the share of each of `holders`.
fn divide(limit: u32, holders: u32) -> abi::Budget {
    let room = limit / 2;
    let parts = holders.max(HOLDERS_MIN).checked_next_power_of_two().unwrap_or(u32::MAX);
    abi::Budget { room, share: (room / parts).max(1) }
}

/// `tp_flows`, `tp_budget` and `tp_held`.
#[derive(Debug)]
pub(crate) struct Accounts {
    flows: Map<u32, Flows>,
    budget: Map<u32, abi::Budget>,
    held: Map<u32, u32>,
    /// Entries that the connection table may have.
    limit: u32,
    /// By pod id: since when a pod that is gone was seen to hold nothing.
    accounts: HashMap<u32, Option<Instant>>,
}

impl Accounts {
    /// Adopts the accounts that are there, and makes those of these pods that are not.
    pub(crate) fn open(object: &Object, limit: u32, pods: impl Iterator<Item = u32>) -> Result<Self> {
        let flows: Map<u32, Flows> = Map::open(object, "tp_flows")?;
        let accounts = flows.entries()?.into_iter().map(|(pod, _)| (pod, None)).collect();
        let budget = Map::open(object, "tp_budget")?;
        let mut opened = Self { flows, budget, held: Map::open(object, "tp_held")?, limit, accounts };
        for pod in NO_PODS.into_iter().chain(pods) {
            opened.add(pod)?;
        }
        opened.settle()?;
        Ok(opened)
    }

    /// Gives a pod its account, unless it has one.
    pub(crate) fn add(&mut self, pod: u32) -> Result<()> {
        if let Some(empty_since) = self.accounts.get_mut(&pod) {
            *empty_since = None;
            return Ok(());
        }
        self.flows.put(&pod, &Flows::default())?;
        self.accounts.insert(pod, None);
        self.settle()
    }

    /// Writes how large a share is, if that changed.
    fn settle(&self) -> Result<()> {
        let holders = u32::try_from(self.accounts.len()).unwrap_or(u32::MAX);
        let wanted = divide(self.limit, holders);
        if self.budget.get(&0)? == Some(wanted) { Ok(()) } else { self.budget.put(&0, &wanted) }
    }

    /// Counts what is in the table, and sets each account right by the difference: what programs count meanwhile is kept.
    pub(crate) fn recount(&self, object: &Object, connections: &Map<CtKey, Ct>) -> Result<()> {
        let mut entered: HashMap<u32, i32> = HashMap::new();
        for (_, connection) in connections.entries()? {
            *entered.entry(connection.pod_id).or_default() += 1;
        }
        for pod in self.accounts.keys() {
            let counted = self.flows.get(pod)?.map_or(0, |flows| flows.held.cast_signed());
            let change = entered.get(pod).copied().unwrap_or_default().wrapping_sub(counted);
            self.adjust(object, Adjust { pod: *pod, change: change.cast_unsigned(), all: 0 })?;
        }
        let all = entered.values().fold(0i32, |sum, count| sum.saturating_add(*count));
        let counted = self.held.get(&0)?.unwrap_or_default().cast_signed();
        self.adjust(object, Adjust { pod: TP_HOLDER_OTHERS, change: 0, all: all.wrapping_sub(counted).cast_unsigned() })
    }

    fn adjust(&self, object: &Object, mut adjust: Adjust) -> Result<()> {
        if adjust.change == 0 && adjust.all == 0 {
            return Ok(());
        }
        object::call(object, "tp_adjust", &mut adjust).map(drop)
    }

    /// Deletes the accounts of pods that are not among these and have held nothing for a while; how many.
    pub(crate) fn sweep(&mut self, pods: &HashSet<u32>, now: Instant) -> Result<usize> {
        let gone: Vec<u32> =
            self.accounts.keys().filter(|pod| !NO_PODS.contains(pod) && !pods.contains(pod)).copied().collect();
        let mut removed = 0;
        for pod in gone {
            let empty = self.flows.get(&pod)?.is_none_or(|flows| count(&flows) == 0);
            let since = self.accounts.entry(pod).or_default();
            let first = *since.get_or_insert(now);
            if !empty {
                *since = None;
            } else if now.saturating_duration_since(first) >= GRACE {
                self.flows.delete(&pod)?;
                self.accounts.remove(&pod);
                removed += 1;
            }
        }
        if removed > 0 {
            self.settle()?;
        }
        Ok(removed)
    }

    /// Entries of the connection table, as the programs count them.
    pub(crate) fn all(&self) -> Result<u32> {
        Ok(self.held.get(&0)?.unwrap_or_default())
    }

    /// Who holds how many; `pods` are those that are here.
    pub(crate) fn held(&self, pods: &HashMap<Addr, abi::Pod>) -> Result<Held> {
        let budget = self.budget.get(&0)?.unwrap_or_default();
        let all = self.all()?;
        let mut holders = Vec::with_capacity(self.accounts.len());
        for id in self.accounts.keys().copied() {
            let Some(held) = self.flows.get(&id)?.map(|flows| count(&flows)) else { continue };
            let mut addresses: Vec<IpAddr> =
                pods.iter().filter(|(_, pod)| pod.pod_id == id).map(|(address, _)| address.ip()).collect();
            addresses.sort_unstable();
            holders.push(Holder { id, addresses, held, full: is_full(held, all, &budget) });
        }
        holders.sort_unstable_by_key(|holder| holder.id);
        Ok(Held { all, room: budget.room, share: budget.share, holders })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_its_share_is_full_when_nothing_is_left_to_lend() {
        let budget = abi::Budget { room: 100, share: 10 };
        assert!(!is_full(9, 300, &budget), "below its share nobody is");
        assert!(is_full(10, 100, &budget));
        assert!(!is_full(65, 66, &budget));
        assert!(is_full(67, 67, &budget));
    }

    #[test]
    fn shares_are_half_of_the_table_at_most_and_shrink_in_steps() {
        assert_eq!(divide(262_144, 3), abi::Budget { room: 131_072, share: 1024 });
        assert_eq!(divide(262_144, 128), divide(262_144, 3));
        assert_eq!(divide(262_144, 129).share, 512);
        for (limit, holders) in [(262_144, 1), (262_144, 4097), (1_000_003, 250), (300, 5)] {
            let budget = divide(limit, holders);
            assert!(budget.share >= 1 && budget.share * holders <= budget.room && budget.room <= limit / 2);
        }
        // A table that is smaller than its holders are many still has a place for each try.
        assert_eq!(divide(8, 3), abi::Budget { room: 4, share: 1 });
        assert_eq!(divide(u32::MAX, u32::MAX).share, 1);
    }
}
