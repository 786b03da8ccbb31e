//! What domain names stand for: addresses that DNS answers have taught, with the bounds that keep them few.
//!
//! Pure: time is an argument, a duration since any fixed moment. Whoever fills the table decides which answers count and which addresses
//! are refused ([`is_special`] has what holds everywhere); whoever compiles or evaluates asks it by pattern. Whatever is in the table is in
//! force, also what is overdue: that is taken out by [`Learned::forget_overdue`], which leaves what is still connected to.
//!
//! Who follows a table need not read all of it: [`Learned::since`] says which addresses are concerned.
//!
//! Bounds: [`Limits`]. Within a name the address whose time ends first makes room; over all names the one whose time ends first of the
//! pattern that has most, so that a wildcard under which somebody invents names costs other policies nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use towpath_model::DomainName;

/// How much a table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Addresses of one name.
    pub of_name: usize,
    /// Pairs of a name and an address.
    pub all: usize,
}

impl Default for Limits {
    /// What fits into the kernel's table of prefixes sixteen times (131,072), and takes some 2 MiB.
    fn default() -> Self {
        Self { of_name: 256, all: 8192 }
    }
}

/// One name and address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair<'a> {
    /// Lower case, without a dot at the end.
    pub name: &'a str,
    /// What it stands for.
    pub address: IpAddr,
    /// Until when the answer is good.
    pub until: Duration,
}

/// What learning changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lesson {
    /// Pairs that are new.
    pub new: usize,
    /// Pairs that made room.
    pub evicted: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    name: String,
    /// The first pattern that asks for it: whose share it takes from.
    pattern: DomainName,
    addresses: BTreeMap<IpAddr, Duration>,
}

/// The table.
#[derive(Clone, Debug, Default)]
pub struct Learned {
    limits: Limits,
    /// By the name's labels from the right, so that all names below one are neighbours.
    names: BTreeMap<String, Entry>,
    /// The keys of the names that stand for an address.
    by_address: BTreeMap<IpAddr, BTreeSet<String>>,
    pairs: usize,
    log: Log,
}

/// What a table holds, not how it came to it.
impl PartialEq for Learned {
    fn eq(&self, other: &Self) -> bool {
        (self.limits, self.pairs) == (other.limits, other.pairs) && self.names == other.names
    }
}

impl Eq for Learned {}

/// An empty table: whoever knows no names.
pub static NOTHING_LEARNED: Learned = Learned {
    limits: Limits { of_name: 0, all: 0 },
    names: BTreeMap::new(),
    by_address: BTreeMap::new(),
    pairs: 0,
    log: Log { from: Mark(0), changes: VecDeque::new() },
};

/// A moment in the history of a table: of the one that it was taken from, and of its clones. The default is before anything was learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(u64);

/// So many changes are remembered; who is further behind looks at everything.
const REMEMBERED: usize = 4096;

/// The last changes, with the moments after them. No two changes of any tables have the same moment, so one that is found here is of
/// this table's history.
#[derive(Clone, Debug, Default)]
struct Log {
    /// Before the first of them.
    from: Mark,
    changes: VecDeque<(Mark, IpAddr)>,
}

impl Log {
    fn add(&mut self, address: IpAddr) {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let mark = Mark(LAST.fetch_add(1, Ordering::Relaxed) + 1);
        self.changes.push_back((mark, address));
        if self.changes.len() > REMEMBERED {
            self.from = self.changes.pop_front().map_or(self.from, |(mark, _)| mark);
        }
    }
}

fn unfile(by_address: &mut BTreeMap<IpAddr, BTreeSet<String>>, key: &str, address: IpAddr) {
    if let Some(keys) = by_address.get_mut(&address) {
        keys.remove(key);
        if keys.is_empty() {
            by_address.remove(&address);
        }
    }
}

fn reversed(name: &str) -> String {
    let mut labels: Vec<&str> = name.rsplit('.').collect();
    // A dot behind the last label, too: "com.example." is no beginning of "com.examples.".
    labels.push("");
    labels.join(".")
}

impl Learned {
    /// An empty table with these limits.
    pub fn new(limits: Limits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// Takes up what an answer says, good until `until`; what is known already is good for longer then. `patterns` are those that policies
    /// ask for: a name that none of them stands for is not learned.
    pub fn learn(
        &mut self,
        name: &str,
        addresses: impl IntoIterator<Item = IpAddr>,
        until: Duration,
        patterns: &[DomainName],
    ) -> Lesson {
        let Some(pattern) = patterns.iter().find(|pattern| pattern.matches(name)) else { return Lesson::default() };
        let mut lesson = Lesson::default();
        let entry = self.names.entry(reversed(name)).or_insert_with(|| Entry {
            name: name.to_owned(),
            pattern: pattern.clone(),
            addresses: BTreeMap::new(),
        });
        let fresh: BTreeSet<IpAddr> = addresses.into_iter().take(self.limits.of_name).collect();
        for address in &fresh {
            let known = entry.addresses.get(address).copied();
            if known.is_none() {
                lesson.new += 1;
                self.by_address.entry(*address).or_default().insert(reversed(name));
                self.log.add(*address);
            }
            entry.addresses.insert(*address, known.map_or(until, |before| before.max(until)));
        }
        while entry.addresses.len() > self.limits.of_name {
            let others = entry.addresses.iter().filter(|(address, _)| !fresh.contains(address));
            let Some(oldest) = others.min_by_key(|(_, until)| **until).map(|(address, _)| *address) else { break };
            entry.addresses.remove(&oldest);
            unfile(&mut self.by_address, &reversed(name), oldest);
            self.log.add(oldest);
            lesson.evicted += 1;
        }
        if entry.addresses.is_empty() {
            self.names.remove(&reversed(name));
        }
        self.pairs = (self.pairs + lesson.new).saturating_sub(lesson.evicted);
        lesson.evicted += self.make_room();
        lesson
    }

    /// Takes the oldest pairs of the patterns that have most until there are no more than allowed.
    fn make_room(&mut self) -> usize {
        let mut surplus = self.pairs.saturating_sub(self.limits.all);
        let evicted = surplus;
        while surplus > 0 {
            let mut shares: HashMap<&DomainName, usize> = HashMap::new();
            for entry in self.names.values() {
                *shares.entry(&entry.pattern).or_default() += entry.addresses.len();
            }
            let mut ranked: Vec<(usize, &DomainName)> = shares.into_iter().map(|(p, count)| (count, p)).collect();
            ranked.sort_unstable_by(|a, b| b.cmp(a));
            let Some((most, pattern)) = ranked.first().map(|(count, pattern)| (*count, (*pattern).clone())) else {
                break;
            };
            // As many as bring it down to the next one.
            let next = ranked.get(1).map_or(0, |(count, _)| *count);
            let take = surplus.min((most - next).max(1));
            let mut oldest: Vec<(Duration, String, IpAddr)> = Vec::with_capacity(most);
            for (key, entry) in self.names.iter().filter(|(_, entry)| entry.pattern == pattern) {
                oldest.extend(entry.addresses.iter().map(|(address, until)| (*until, key.clone(), *address)));
            }
            oldest.sort_unstable();
            for (_, key, address) in oldest.into_iter().take(take) {
                self.remove(&key, &address);
            }
            surplus -= take;
        }
        evicted
    }

    fn remove(&mut self, key: &str, address: &IpAddr) {
        let Some(entry) = self.names.get_mut(key) else { return };
        if entry.addresses.remove(address).is_some() {
            self.pairs = self.pairs.saturating_sub(1);
            unfile(&mut self.by_address, key, *address);
            self.log.add(*address);
        }
        if entry.addresses.is_empty() {
            self.names.remove(key);
        }
    }

    fn retain(&mut self, mut keep: impl FnMut(&Entry, IpAddr, Duration) -> bool) -> usize {
        let mut gone = Vec::new();
        for (key, entry) in &self.names {
            let out = entry.addresses.iter().filter(|(address, until)| !keep(entry, **address, **until));
            gone.extend(out.map(|(address, _)| (key.clone(), *address)));
        }
        gone.iter().for_each(|(key, address)| self.remove(key, address));
        gone.len()
    }

    /// Forgets what none of these patterns asks for; how many pairs that were.
    pub fn keep_asked(&mut self, patterns: &[DomainName]) -> usize {
        let gone = self.retain(|entry, _, _| patterns.iter().any(|pattern| pattern.matches(&entry.name)));
        for entry in self.names.values_mut() {
            if let Some(pattern) = patterns.iter().find(|pattern| pattern.matches(&entry.name)) {
                entry.pattern.clone_from(pattern);
            }
        }
        gone
    }

    /// Forgets these addresses, whatever names stand for them; how many pairs that were.
    pub fn keep_addresses(&mut self, keep: impl Fn(IpAddr) -> bool) -> usize {
        self.retain(|_, address, _| keep(address))
    }

    /// Addresses of which the time of some pair is over.
    pub fn overdue(&self, now: Duration) -> BTreeSet<IpAddr> {
        self.iter().filter(|pair| pair.until <= now).map(|pair| pair.address).collect()
    }

    /// Forgets pairs whose time is over, but of addresses in `connected`; how many that were.
    pub fn forget_overdue(&mut self, now: Duration, connected: &BTreeSet<IpAddr>) -> usize {
        self.retain(|_, address, until| until > now || connected.contains(&address))
    }

    /// When the time of the next pair is over.
    pub fn next_overdue(&self) -> Option<Duration> {
        self.iter().map(|pair| pair.until).min()
    }

    /// All addresses that a pattern stands for.
    pub fn addresses<'a>(&'a self, pattern: &DomainName) -> impl Iterator<Item = IpAddr> + use<'a> {
        self.entries(pattern).flat_map(|entry| entry.addresses.keys().copied())
    }

    /// All addresses that these patterns stand for.
    pub fn of(&self, patterns: &[DomainName]) -> BTreeSet<IpAddr> {
        patterns.iter().flat_map(|pattern| self.addresses(pattern)).collect()
    }

    /// The name by which one of these patterns stands for an address.
    pub fn name_of(&self, patterns: &[DomainName], address: IpAddr) -> Option<&str> {
        let names = || self.by_address.get(&address).into_iter().flatten().filter_map(|key| self.names.get(key));
        let mut found = patterns.iter().flat_map(|pattern| names().filter(move |entry| pattern.matches(&entry.name)));
        found.next().map(|entry| entry.name.as_str())
    }

    /// Whether one of these patterns stands for an address.
    pub fn stand_for(&self, patterns: &[DomainName], address: IpAddr) -> bool {
        self.name_of(patterns, address).is_some()
    }

    /// This moment.
    pub fn mark(&self) -> Mark {
        self.log.changes.back().map_or(self.log.from, |(mark, _)| *mark)
    }

    /// The addresses of which names came or went since a moment. None: it is of another table, or too long ago.
    pub fn since(&self, mark: Mark) -> Option<BTreeSet<IpAddr>> {
        let first = match self.log.changes.binary_search_by_key(&mark, |(mark, _)| *mark) {
            Ok(index) => index + 1,
            Err(_) if mark == self.log.from => 0,
            Err(_) => return None,
        };
        Some(self.log.changes.range(first..).map(|(_, address)| *address).collect())
    }

    fn entries<'a>(&'a self, pattern: &DomainName) -> impl Iterator<Item = &'a Entry> + use<'a> {
        let (key, below) = (reversed(&pattern.name), pattern.below);
        let length = key.len();
        // The name itself comes right before what is below it.
        let with = self.names.range(key.clone()..).take_while(move |(name, _)| name.starts_with(&key));
        with.take_while(move |(name, _)| below || name.len() == length)
            .filter(move |(name, _)| !below || name.len() > length)
            .map(|(_, entry)| entry)
    }

    /// All pairs, by name from the right.
    pub fn iter(&self) -> impl Iterator<Item = Pair<'_>> {
        self.names.values().flat_map(|entry| {
            entry.addresses.iter().map(|(address, until)| Pair { name: &entry.name, address: *address, until: *until })
        })
    }

    /// How many pairs there are.
    pub fn len(&self) -> usize {
        self.pairs
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pairs == 0
    }
}

/// Why an address cannot be what a name outside the cluster stands for, wherever the cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Refused {
    /// Unspecified, loopback, link-local (`169.254.0.0/16`, which has clouds' metadata, and `fe80::/10`), multicast, broadcast, or an
    /// IPv4 address in the clothes of IPv6.
    Special,
    /// In a range of pods.
    Pods,
    /// In a range of Services, or an address of one.
    Services,
    /// A node's.
    Node,
    /// The node-local DNS.
    Dns,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refused::Special => "no host outside has such an address",
            Refused::Pods => "it is a pod's, or in a range of pods",
            Refused::Services => "it is a Service's, or in a range of Services",
            Refused::Node => "it is a node's",
            Refused::Dns => "it is the node-local DNS",
        })
    }
}

/// Whether an address is one that no name can teach anywhere.
pub fn is_special(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_special_v4(v4),
        IpAddr::V6(v6) => is_special_v6(v6),
    }
}

fn is_special_v4(v4: Ipv4Addr) -> bool {
    v4.octets().first() == Some(&0)
        || v4.is_loopback()
        || v4.is_link_local()
        || v4.is_multicast()
        // 240.0.0.0/4 with the broadcast address (RFC 1112 §4, RFC 919).
        || v4.octets().first().is_some_and(|first| *first >= 240)
}

fn is_special_v6(v6: Ipv6Addr) -> bool {
    v6.is_unspecified()
        || v6.is_loopback()
        || v6.is_unicast_link_local()
        || v6.is_multicast()
        || v6.to_ipv4_mapped().is_some()
        // IPv4-compatible (RFC 4291 §2.5.5.1).
        || v6.segments().iter().take(6).all(|part| *part == 0)
}

#[cfg(test)]
mod tests;
