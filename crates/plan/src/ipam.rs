//! Address allocation out of a node's pod ranges.
//!
//! Pure: the caller persists what is allocated and passes the time. Promises, held for any sequence of calls:
//! an address has at most one holder; asking again for the same owner gives the same addresses; of several families all are
//! given or none; of several ranges of a family the first that has room gives; a range's network address, its gateway (the first host) and, of IPv4, its broadcast address are never given;
//! an address that was released is given again only when no address that was never used is left (or when thousands rest), the
//! longest released first, so within [`REST`] only when the range is otherwise exhausted. An address that is chosen is given however
//! short ago it was released: who may have it so soon is for the caller to say ([`Pool::resting_since`]).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::IpNet;
use towpath_model::{Family, family_of};
use towpath_wire::cni::Attachment;

#[cfg(test)]
mod tests;

/// How long a released address is left alone while there is any other.
pub const REST: Duration = Duration::from_secs(30);

/// So many released addresses rest at most, so that a range of 2⁶⁴ does not remember every address it ever gave: past it the
/// longest released goes before fresh ones.
const RESTING_LIMIT: usize = 4096;

/// Why there is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    /// The node has no pod range yet.
    #[error("the node has no pod range; check that its spec.podCIDRs is set: kubectl get node -o yaml")]
    NoRange,
    /// All are taken.
    #[error("no free address in {ranges}: {taken} of {size} are taken")]
    Exhausted {
        /// The node's ranges of the family, for people.
        ranges: String,
        /// Addresses with a holder.
        taken: u128,
        /// Addresses that could have one.
        size: u128,
    },
    /// An address that is asked for is in no range of the node.
    #[error(
        "{address} is asked for and is in no pod range of this node ({ranges}): choose one that is, on a node that is chosen too (spec.nodeName, nodeSelector)"
    )]
    Elsewhere {
        /// The address.
        address: IpAddr,
        /// The node's ranges, for people.
        ranges: String,
    },
    /// An address that is asked for is the range's own.
    #[error(
        "{address} is asked for and is the network's, the gateway's or the broadcast address of {range}: choose another"
    )]
    Reserved {
        /// The address.
        address: IpAddr,
        /// The range.
        range: IpNet,
    },
    /// An address that is asked for has a holder.
    #[error("{address} is asked for and {holder} has it: choose another, or wait until that is gone")]
    Taken {
        /// The address.
        address: IpAddr,
        /// Who has it.
        holder: Box<Holder>,
    },
    /// A range is too small to hold a pod.
    #[error("the pod range {0} has no address for a pod; it needs at least a /30 (IPv4) or /126 (IPv6)")]
    TooSmall(IpNet),
    /// Two ranges share addresses.
    #[error("the pod ranges {0} and {1} overlap; choose disjoint ranges")]
    Overlap(IpNet, IpNet),
    /// Adopted twice.
    #[error("{address} is held by {holder} and cannot also belong to {claimant}")]
    Conflict {
        /// The address.
        address: IpAddr,
        /// Who has it.
        holder: Box<Holder>,
        /// Who else claims it.
        claimant: Box<Holder>,
    },
}

/// Who holds an address.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Holder {
    /// A container's attachment.
    Attachment(Attachment),
    /// A device of that name which is there without a lease.
    Device(String),
    /// A container of the network that was here before, known by its address.
    Predecessor(IpAddr),
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Holder::Attachment(attachment) => attachment.fmt(f),
            Holder::Device(name) => write!(f, "device {name}"),
            Holder::Predecessor(address) => write!(f, "a container of the network before, {address}"),
        }
    }
}

/// Addresses that were given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// The addresses, one a family, in the order of the families' first ranges.
    pub addresses: Vec<IpAddr>,
    /// One of them was released less than [`REST`] ago, this long: the range is nearly exhausted.
    pub hurried: Option<Duration>,
}

/// How full a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The range.
    pub range: IpNet,
    /// Addresses with a holder.
    pub taken: u128,
    /// Addresses that could have one.
    pub size: u128,
    /// It gives none any more ([`Pool::close`]).
    pub closed: bool,
}

/// One range. Addresses are numbers of 32 or 128 bits.
#[derive(Clone, Debug)]
struct Range {
    net: IpNet,
    first: u128,
    last: u128,
    /// Nothing below it is fresh.
    cursor: u128,
    closed: bool,
}

impl Range {
    fn new(net: IpNet) -> Result<Self, IpamError> {
        let net = net.trunc();
        // Network and gateway lie below the first, IPv4's broadcast above the last.
        let first = number(net.network()).checked_add(2).ok_or(IpamError::TooSmall(net))?;
        let top = number(net.broadcast());
        let last = if net.network().is_ipv4() { top.saturating_sub(1) } else { top };
        if first > last || net.prefix_len() + 2 > net.max_prefix_len() {
            return Err(IpamError::TooSmall(net));
        }
        Ok(Self { net, first, last, cursor: first, closed: false })
    }

    fn family(&self) -> Family {
        family_of(self.net.network())
    }

    fn size(&self) -> u128 {
        (self.last - self.first).saturating_add(1)
    }

    fn holds(&self, address: IpAddr) -> bool {
        family_of(address) == self.family() && (self.first..=self.last).contains(&number(address))
    }

    fn address(&self, number: u128) -> IpAddr {
        match self.family() {
            Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(u32::try_from(number).unwrap_or(u32::MAX))),
            Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(number)),
        }
    }
}

/// Ranges for people.
fn named(ranges: &mut dyn Iterator<Item = &Range>) -> String {
    ranges.map(|range| range.net.to_string()).collect::<Vec<_>>().join(", ")
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// The gateway of a pod range: its first host.
pub fn gateway_of(range: &IpNet) -> IpAddr {
    match range.trunc().network() {
        IpAddr::V4(v4) => IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() | 1)),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() | 1)),
    }
}

/// All addresses of a node's pods.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    ranges: Vec<Range>,
    held: BTreeMap<Holder, Vec<IpAddr>>,
    holder: HashMap<IpAddr, Holder>,
    /// Released, the longest ago first, with the time. An address is in it at most once.
    resting: VecDeque<(IpAddr, Duration)>,
    rested: HashMap<IpAddr, Duration>,
}

impl Pool {
    /// A pool of disjoint ranges; none: nothing can be allocated yet.
    pub fn new(ranges: &[IpNet]) -> Result<Self, IpamError> {
        let mut pool = Pool::default();
        pool.set_ranges(ranges)?;
        Ok(pool)
    }

    /// Changes the ranges. Holders keep their addresses, in range or not.
    pub fn set_ranges(&mut self, ranges: &[IpNet]) -> Result<(), IpamError> {
        let mut fresh: Vec<Range> = Vec::new();
        for net in ranges {
            let range = Range::new(*net)?;
            if let Some(other) = fresh.iter().find(|r| r.net.contains(&range.net) || range.net.contains(&r.net)) {
                return Err(IpamError::Overlap(other.net, range.net));
            }
            match self.ranges.iter().find(|r| r.net == range.net) {
                Some(known) => fresh.push(known.clone()),
                None => fresh.push(range),
            }
        }
        self.ranges = fresh;
        Ok(())
    }

    /// Has exactly these of the ranges give no more addresses. Who has one keeps it.
    pub fn close(&mut self, ranges: &[IpNet]) {
        for range in &mut self.ranges {
            range.closed = ranges.contains(&range.net);
        }
    }

    /// The ranges, also those that are closed.
    pub fn ranges(&self) -> Vec<IpNet> {
        self.ranges.iter().map(|r| r.net).collect()
    }

    /// Addresses for an attachment, one of each family: those that are `chosen`, which may rest, and any of the other families.
    ///
    /// # Errors
    /// One of them cannot be given, or the ranges of a family have none left; then none is.
    pub fn allocate(&mut self, owner: &Attachment, chosen: &[IpAddr], now: Duration) -> Result<Allocation, IpamError> {
        let holder = Holder::Attachment(owner.clone());
        if let Some(addresses) = self.held.get(&holder) {
            return Ok(Allocation { addresses: addresses.clone(), hurried: None });
        }
        let mut families: Vec<Family> = Vec::new();
        for range in self.ranges.iter().filter(|range| !range.closed) {
            if !families.contains(&range.family()) {
                families.push(range.family());
            }
        }
        if families.is_empty() {
            return Err(IpamError::NoRange);
        }
        chosen.iter().try_for_each(|address| self.may_choose(*address))?;
        let mut addresses = Vec::new();
        let mut hurried = None;
        for family in families {
            if let Some(address) = chosen.iter().find(|address| family_of(**address) == family) {
                addresses.push(*address);
                continue;
            }
            let (address, released) = self.candidate(family, now)?;
            addresses.push(address);
            let rested = released.map(|at| now.saturating_sub(at)).filter(|rested| *rested < REST);
            hurried = hurried.into_iter().chain(rested).min();
        }
        self.take(holder, addresses.clone());
        Ok(Allocation { addresses, hurried })
    }

    /// Whether somebody may have this very address.
    fn may_choose(&self, address: IpAddr) -> Result<(), IpamError> {
        let mut open = self.ranges.iter().filter(|range| !range.closed);
        let Some(range) = open.clone().find(|range| range.net.contains(&address)) else {
            return Err(IpamError::Elsewhere { address, ranges: named(&mut open) });
        };
        if !range.holds(address) {
            return Err(IpamError::Reserved { address, range: range.net });
        }
        match self.holder.get(&address) {
            Some(holder) => Err(IpamError::Taken { address, holder: Box::new(holder.clone()) }),
            None => Ok(()),
        }
    }

    /// The next address of a family, not yet taken: a fresh one of the first range that has any, else the longest released.
    fn candidate(&mut self, family: Family, now: Duration) -> Result<(IpAddr, Option<Duration>), IpamError> {
        let gives = |range: &Range| !range.closed && range.family() == family;
        let longest_released = {
            let held = |address: IpAddr| self.ranges.iter().any(|range| gives(range) && range.holds(address));
            self.resting.iter().find(|(address, _)| held(*address)).copied()
        };
        if self.resting.len() > RESTING_LIMIT
            && let Some((address, at)) = longest_released
            && now.saturating_sub(at) >= REST
        {
            return Ok((address, Some(at)));
        }
        for range in self.ranges.iter_mut().filter(|range| gives(range)) {
            while range.cursor <= range.last {
                let address = range.address(range.cursor);
                if !self.holder.contains_key(&address) && !self.rested.contains_key(&address) {
                    // Left at this address: if the allocation fails in another family, it is still fresh.
                    return Ok((address, None));
                }
                match range.cursor.checked_add(1) {
                    Some(next) => range.cursor = next,
                    None => break,
                }
            }
        }
        if let Some((address, at)) = longest_released {
            return Ok((address, Some(at)));
        }
        let all: Vec<Usage> =
            self.ranges.iter().filter(|range| gives(range)).map(|range| self.usage_of(range)).collect();
        Err(IpamError::Exhausted {
            ranges: named(&mut self.ranges.iter().filter(|range| gives(range))),
            taken: all.iter().fold(0, |sum, usage| sum.saturating_add(usage.taken)),
            size: all.iter().fold(0, |sum, usage| sum.saturating_add(usage.size)),
        })
    }

    /// Takes addresses for a holder as they are found on disk or in the kernel, in range or not.
    pub fn adopt(&mut self, holder: Holder, addresses: &[IpAddr]) -> Result<(), IpamError> {
        for address in addresses {
            if let Some(other) = self.holder.get(address)
                && *other != holder
            {
                return Err(IpamError::Conflict {
                    address: *address,
                    holder: Box::new(other.clone()),
                    claimant: Box::new(holder),
                });
            }
        }
        self.take(holder, addresses.to_vec());
        Ok(())
    }

    fn take(&mut self, holder: Holder, addresses: Vec<IpAddr>) {
        for address in &addresses {
            if self.rested.remove(address).is_some()
                && let Some(position) = self.resting.iter().position(|(resting, _)| resting == address)
            {
                self.resting.remove(position);
            }
            self.holder.insert(*address, holder.clone());
        }
        let held = self.held.entry(holder).or_default();
        for address in addresses {
            if !held.contains(&address) {
                held.push(address);
            }
        }
    }

    /// Takes addresses back. What nobody holds is no error.
    pub fn release(&mut self, holder: &Holder, now: Duration) -> Vec<IpAddr> {
        let addresses = self.held.remove(holder).unwrap_or_default();
        for address in &addresses {
            self.holder.remove(address);
            self.rest(*address, now);
        }
        addresses
    }

    /// Notes that a free address was released at a time: it is given again last. Call in order of time.
    pub fn rest(&mut self, address: IpAddr, at: Duration) {
        if !self.holder.contains_key(&address) && self.rested.insert(address, at).is_none() {
            self.resting.push_back((address, at));
        }
        // What a former range left is of no use to anybody.
        while self.resting.len() > 2 * RESTING_LIMIT
            && let Some((oldest, _)) = self.resting.front().copied()
            && !self.ranges.iter().any(|range| range.holds(oldest))
        {
            self.resting.pop_front();
            self.rested.remove(&oldest);
        }
    }

    /// When an address that is free was released.
    pub fn resting_since(&self, address: IpAddr) -> Option<Duration> {
        self.rested.get(&address).copied()
    }

    /// Whether an address was given and taken back, and is free.
    pub fn is_resting(&self, address: IpAddr) -> bool {
        self.rested.contains_key(&address)
    }

    /// Who holds an address.
    pub fn holder(&self, address: IpAddr) -> Option<&Holder> {
        self.holder.get(&address)
    }

    /// What somebody holds.
    pub fn held_by(&self, holder: &Holder) -> Option<&[IpAddr]> {
        self.held.get(holder).map(Vec::as_slice)
    }

    /// All holders and what they hold.
    pub fn holders(&self) -> impl Iterator<Item = (&Holder, &[IpAddr])> {
        self.held.iter().map(|(holder, addresses)| (holder, addresses.as_slice()))
    }

    /// How full the ranges are.
    pub fn usage(&self) -> Vec<Usage> {
        self.ranges.iter().map(|range| self.usage_of(range)).collect()
    }

    fn usage_of(&self, range: &Range) -> Usage {
        let taken = self.holder.keys().filter(|address| range.holds(**address)).count() as u128;
        Usage { range: range.net, taken, size: range.size(), closed: range.closed }
    }
}
