//! What names stand for on this node, and what answers were not believed.
//!
//! Refused are addresses that no name outside the cluster can stand for: whoever answers for a name that a policy accepts must not thereby open
//! the way to pods, Services, nodes, the node's DNS, or what only the sender's own link or machine is ([`Refused`]).

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towpath_model::{DomainName, World, canonical};
use towpath_policy::names::{Learned, Limits, Refused, is_special};
use towpath_wire::dns::NameAnswer;
use tracing::{info, warn};

use super::journal::Journal;

/// How much longer than its TTL an answer is good: programs use an address a while after they looked it up.
pub const HOLD: Duration = Duration::from_secs(60);
/// Refusals that are remembered for people.
const MOST_REFUSALS: usize = 32;

/// Ranges and addresses of the cluster, beside what the world says.
#[derive(Clone, Copy, Debug)]
pub struct Inside<'a> {
    /// Pod ranges of the whole cluster.
    pub cluster: &'a [IpNet],
    /// Ranges of Services.
    pub services: &'a [IpNet],
    /// Node-local addresses of DNS.
    pub dns: &'a [IpAddr],
}

impl Inside<'_> {
    /// Why an address cannot be learned.
    fn refuses(&self, world: &World, address: IpAddr) -> Option<Refused> {
        let services = || {
            world.services.values().any(|service| {
                let published = service.external_ips.iter().chain(&service.load_balancer_ips);
                service.cluster_ips.iter().chain(published).any(|ip| *ip == address)
            })
        };
        self.range_refuses(&pod_ranges(world), address).or_else(|| {
            if world.nodes.values().any(|node| node.addresses().any(|ip| ip == address)) {
                Some(Refused::Node)
            } else if world.pods.values().any(|pod| pod.on_pod_network() && pod.ips.contains(&address)) {
                Some(Refused::Pods)
            } else {
                services().then_some(Refused::Services)
            }
        })
    }

    fn range_refuses(&self, pods: &[IpNet], address: IpAddr) -> Option<Refused> {
        let within = |ranges: &[IpNet]| ranges.iter().any(|range| range.contains(&address));
        if is_special(address) {
            Some(Refused::Special)
        } else if self.dns.contains(&address) {
            Some(Refused::Dns)
        } else if within(self.cluster) || within(pods) {
            Some(Refused::Pods)
        } else {
            within(self.services).then_some(Refused::Services)
        }
    }
}

fn pod_ranges(world: &World) -> Vec<IpNet> {
    IpNet::aggregate(&world.nodes.values().flat_map(|node| node.pod_cidrs.iter().copied()).collect())
}

/// An address that was not learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The name that it was said to be of.
    pub name: String,
    /// The address.
    pub address: IpAddr,
    /// Why.
    pub why: Refused,
    /// How often.
    pub times: u64,
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pairs of a name and an address that were new.
    pub learned: u64,
    /// Addresses that were refused.
    pub refused: u64,
    /// Pairs that made room for others before their time was over.
    pub evicted: u64,
    /// Pairs whose time was over.
    pub forgotten: u64,
}

/// The book.
#[derive(Debug)]
pub struct Book {
    learned: Learned,
    patterns: Vec<DomainName>,
    journal: Journal,
    counts: Counts,
    refusals: VecDeque<Refusal>,
    /// Something was forgotten since the last lesson.
    forgot: bool,
    /// When the machine was started, by the clock of this process.
    boot: Instant,
    boot_was: Duration,
}

/// The book, written by the loop and read by who shows it.
pub type SharedBook = Arc<RwLock<Book>>;

impl Book {
    /// What an earlier run of this boot of the machine knew, from a directory that does not outlive a reboot.
    pub fn open(run_dir: &Path) -> Self {
        let boot_was = super::journal::since_boot();
        let mut learned = Learned::new(Limits::default());
        let (journal, lines) = Journal::open(run_dir);
        for line in &lines {
            // Whether policies still ask for it is seen when they are known.
            let itself = DomainName { below: false, name: line.name.clone() };
            learned.learn(&line.name, line.addresses.iter().copied(), line.until(), &[itself]);
        }
        if !learned.is_empty() {
            info!(pairs = learned.len(), "addresses of names that an earlier run learned");
        }
        Self {
            learned,
            patterns: Vec::new(),
            journal,
            counts: Counts::default(),
            refusals: VecDeque::new(),
            forgot: false,
            boot: Instant::now(),
            boot_was,
        }
    }

    /// Time since the machine was started.
    pub fn now(&self) -> Duration {
        self.boot_was + self.boot.elapsed()
    }

    /// What is in force.
    pub fn learned(&self) -> &Learned {
        &self.learned
    }

    /// The names that policies ask for.
    pub fn patterns(&self) -> &[DomainName] {
        &self.patterns
    }

    /// What happened so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The latest that was refused.
    pub fn refusals(&self) -> impl Iterator<Item = &Refusal> {
        self.refusals.iter()
    }

    /// Whether anything was forgotten since this was last asked.
    pub fn take_forgot(&mut self) -> bool {
        std::mem::take(&mut self.forgot)
    }

    /// Follows policies and ranges: what nobody asks for, or what is the cluster's by now, is forgotten. Whether other names are asked for.
    pub fn follow(&mut self, world: &World, inside: &Inside<'_>) -> bool {
        let wanted: BTreeSet<&DomainName> = world.cluster_policies.values().flat_map(|p| p.domain_names()).collect();
        let changed = !wanted.iter().copied().eq(&self.patterns);
        if changed {
            self.patterns = wanted.into_iter().cloned().collect();
            let gone = self.learned.keep_asked(&self.patterns);
            self.forgot_some(gone);
        }
        if !self.learned.is_empty() {
            let pods = pod_ranges(world);
            let gone = self.learned.keep_addresses(|address| inside.range_refuses(&pods, address).is_none());
            self.forgot_some(gone);
        }
        changed
    }

    fn forgot_some(&mut self, pairs: usize) {
        if pairs > 0 {
            self.forgot = true;
            self.journal.outdate();
        }
    }

    /// Takes up answers; whether there is anything new for the kernel.
    pub fn learn(&mut self, answers: &[NameAnswer], world: &World, inside: &Inside<'_>) -> bool {
        let now = self.now();
        let mut new = false;
        for answer in answers {
            let until = now + Duration::from_secs(u64::from(answer.ttl)) + HOLD;
            let said: BTreeSet<IpAddr> = answer.addresses.iter().copied().collect();
            let mut believed = Vec::with_capacity(said.len());
            for address in said {
                // One that is known was looked at when it came, and whenever the ranges changed.
                let known = self.learned.name_of(&self.patterns, address).is_some();
                match if known { None } else { inside.refuses(world, address) } {
                    None => believed.push(address),
                    Some(why) => self.refuse(&answer.name, address, why),
                }
            }
            let lesson = self.learned.learn(&answer.name, believed.iter().copied(), until, &self.patterns);
            // Written before the kernel has it: an agent that dies in between comes back with it.
            self.journal.append(&answer.name, believed, until);
            new |= lesson.new > 0 || lesson.evicted > 0;
            self.counts.learned += lesson.new as u64;
            if lesson.evicted > 0 {
                self.forgot_some(lesson.evicted);
                self.counts.evicted += lesson.evicted as u64;
                warn!(name = answer.name, evicted = lesson.evicted, limits = ?Limits::default(),
                    "names have more addresses than are kept: the oldest are not accepted any more");
            }
        }
        new
    }

    fn refuse(&mut self, name: &str, address: IpAddr, why: Refused) {
        self.counts.refused += 1;
        if let Some(known) = self.refusals.iter_mut().find(|known| known.name == name && known.address == address) {
            known.times += 1;
            return;
        }
        warn!(name, address = %canonical(address), %why, "an answer for a name that a policy accepts has an address that no name can stand for: not accepted");
        if self.refusals.len() >= MOST_REFUSALS {
            self.refusals.pop_front();
        }
        self.refusals.push_back(Refusal { name: name.to_owned(), address, why, times: 1 });
    }

    /// Addresses of which the time of some pair is over.
    pub fn overdue(&self) -> BTreeSet<IpAddr> {
        let now = self.now();
        if self.learned.next_overdue().is_none_or(|at| at > now) {
            return BTreeSet::new();
        }
        self.learned.overdue(now)
    }

    /// Forgets what is overdue, but for addresses that somebody is connected to; whether anything.
    pub fn forget_overdue(&mut self, connected: &BTreeSet<IpAddr>) -> bool {
        let gone = self.learned.forget_overdue(self.now(), connected);
        self.counts.forgotten += gone as u64;
        self.forgot_some(gone);
        gone > 0
    }

    /// Writes the journal anew if it has much that does not hold any more.
    pub fn tidy(&mut self) {
        self.journal.tidy(&self.learned);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towpath_model::ClusterNetworkPolicy;

    const DNS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(169, 254, 116, 10));

    fn asks(names: &[&str]) -> World {
        let object = serde_json::json!({
            "metadata": {"name": "p"},
            "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
                "egress": [{"action": "Accept", "to": [{"domainNames": names}]}]},
        });
        let object: towpath_model::cluster_policy::object::ClusterNetworkPolicy =
            serde_json::from_value(object).unwrap();
        let (policy, problems) = ClusterNetworkPolicy::fail_closed(&object).unwrap();
        assert!(problems.is_empty());
        let node = serde_json::json!({
            "metadata": {"name": "n1"}, "spec": {"podCIDRs": ["10.9.1.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "203.0.113.1"}, {"type": "ExternalIP", "address": "203.0.113.2"}]},
        });
        let node: k8s_openapi::api::core::v1::Node = serde_json::from_value(node).unwrap();
        let node = towpath_model::Node::try_from(&node).unwrap();
        World {
            cluster_policies: [("p".to_owned(), policy)].into(),
            nodes: [(node.name.clone(), node)].into(),
            ..World::default()
        }
    }

    fn answer(name: &str, addresses: &[&str], ttl: u32) -> NameAnswer {
        let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
        NameAnswer { name: name.to_owned(), addresses, ttl }
    }

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_hostile_answer_opens_nothing_of_the_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let (cluster, services) = (nets(&["10.244.0.0/16", "fd00:10:244::/48"]), nets(&["10.96.0.0/12"]));
        let inside = Inside { cluster: &cluster, services: &services, dns: &[DNS] };
        let world = asks(&["*.example.com"]);
        let mut book = Book::open(dir.path());
        assert!(book.follow(&world, &inside));
        let hostile = [
            ("10.244.3.4", Refused::Pods),
            ("fd00:10:244::7", Refused::Pods),
            ("10.9.1.7", Refused::Pods),
            ("10.96.0.1", Refused::Services),
            ("203.0.113.1", Refused::Node),
            ("203.0.113.2", Refused::Node),
            ("127.0.0.1", Refused::Special),
            ("169.254.169.254", Refused::Special),
            ("169.254.116.10", Refused::Special),
            ("::ffff:203.0.113.9", Refused::Special),
            ("0.0.0.0", Refused::Special),
        ];
        for (address, _) in hostile {
            assert!(!book.learn(&[answer("a.example.com", &[address], 60)], &world, &inside), "{address}");
        }
        assert!(book.learn(
            &[answer("a.example.com", &["10.96.0.1", "198.51.100.7", "10.244.0.1"], 60)],
            &world,
            &inside
        ));
        assert_eq!(book.learned().iter().map(|pair| pair.address.to_string()).collect::<Vec<_>>(), ["198.51.100.7"]);
        let whys: Vec<(String, Refused)> = book.refusals().map(|r| (r.address.to_string(), r.why)).collect();
        let expected: Vec<(String, Refused)> = hostile.iter().map(|(a, w)| ((*a).to_owned(), *w)).collect();
        assert_eq!(whys[..hostile.len()], expected[..]);
        assert_eq!(book.counts().refused, hostile.len() as u64 + 2);
        assert!(
            !book.learn(&[answer("else.example.org", &["198.51.100.8"], 60)], &world, &inside),
            "nobody asks for it"
        );

        // A node's range that grows over it takes it back.
        let services = nets(&["10.96.0.0/12", "198.51.100.0/24"]);
        assert!(!book.follow(&world, &Inside { services: &services, ..inside }));
        assert!(book.learned().is_empty() && book.take_forgot() && !book.take_forgot());
    }

    #[test]
    fn what_is_learned_is_there_after_a_restart_and_only_what_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let inside = Inside { cluster: &[], services: &[], dns: &[] };
        let world = asks(&["*.example.com", "b.example.org"]);
        let mut book = Book::open(dir.path());
        book.follow(&world, &inside);
        book.learn(&[answer("a.example.com", &["198.51.100.7"], 60)], &world, &inside);
        book.learn(&[answer("b.example.org", &["198.51.100.8", "2001:db8::1"], 60)], &world, &inside);
        let before: Vec<_> = book.learned().iter().map(|p| (p.name.to_owned(), p.address)).collect();
        drop(book);
        let mut again = Book::open(dir.path());
        assert_eq!(again.learned().iter().map(|p| (p.name.to_owned(), p.address)).collect::<Vec<_>>(), before);
        let left = again.learned().next_overdue().unwrap().saturating_sub(again.now());
        assert!(left > Duration::from_secs(110) && left <= Duration::from_secs(120), "{left:?}");
        again.follow(&asks(&["b.example.org"]), &inside);
        assert_eq!(again.learned().len(), 2);
        again.tidy();
        assert_eq!(Book::open(dir.path()).learned().len(), 2, "what is forgotten stays so");
    }

    #[test]
    fn a_journal_of_another_boot_or_with_a_torn_end_teaches_nothing_that_was_not_said() {
        let dir = tempfile::tempdir().unwrap();
        let inside = Inside { cluster: &[], services: &[], dns: &[] };
        let world = asks(&["*.example.com"]);
        let mut book = Book::open(dir.path());
        book.follow(&world, &inside);
        book.learn(&[answer("a.example.com", &["198.51.100.7"], 60)], &world, &inside);
        book.learn(&[answer("b.example.com", &["198.51.100.8"], 60)], &world, &inside);
        let path = dir.path().join(super::super::journal::FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 9]).unwrap();
        let mut torn = Book::open(dir.path());
        assert_eq!(torn.learned().len(), 1);
        torn.follow(&world, &inside);
        torn.learn(&[answer("c.example.com", &["198.51.100.9"], 60)], &world, &inside);
        assert_eq!(Book::open(dir.path()).learned().len(), 2, "what comes after a torn end is read");
        let (header, rest) = text.split_once('\n').unwrap();
        std::fs::write(&path, format!("{}\n{rest}", header.replace("boot\":\"", "boot\":\"x"))).unwrap();
        assert!(Book::open(dir.path()).learned().is_empty());
        std::fs::write(&path, b"\xff\xfe nonsense").unwrap();
        assert!(Book::open(dir.path()).learned().is_empty());
    }

    #[test]
    fn time_is_over_a_minute_after_the_ttl_unless_somebody_is_connected() {
        let dir = tempfile::tempdir().unwrap();
        let inside = Inside { cluster: &[], services: &[], dns: &[] };
        let world = asks(&["*.example.com"]);
        let mut book = Book::open(dir.path());
        book.follow(&world, &inside);
        book.learn(&[answer("a.example.com", &["198.51.100.7", "198.51.100.8"], 5)], &world, &inside);
        assert!(book.overdue().is_empty());
        book.boot_was += Duration::from_secs(5) + HOLD;
        let address: IpAddr = "198.51.100.7".parse().unwrap();
        assert_eq!(book.overdue().len(), 2);
        assert!(book.forget_overdue(&[address].into()));
        assert_eq!(book.learned().iter().map(|p| p.address).collect::<Vec<_>>(), [address]);
        assert!(book.take_forgot());
        assert!(book.forget_overdue(&BTreeSet::new()));
    }
}
