//! Whose addresses, devices and rules those of a dropped packet are.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::PoisonError;
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::jiff::Timestamp;
use nix::net::if_::if_indextoname;
use towpath_datapath::bpf::{Dropped, End, Place as Where, Reason};
use towpath_model::desired::{RuleId, RuleInfo, SetId};
use towpath_model::{Direction, NamespacedName, NodeName, Protocol, World};
use towpath_policy::names::NOTHING_LEARNED;
use towpath_policy::{Holder as Held, Holders, View};
use towpath_wire::observe::{Denial, DropEvent, Fate, FlowEnd, Holder, Place};

use crate::SharedIndex;
use crate::audits::{denying, direction_name};
use crate::ipam::LeaseStore;
use crate::node_network::given;
use crate::read;
use crate::reconcile::{RuleNames, SharedReport};
use crate::status::Sources;

/// How old what is known of addresses may be, and how old it must be to be asked for again because of one that is not in it. (All
/// pods are looked through for it, so what is dropped on its way to addresses outside may not ask for it each time.)
const OLD: Duration = Duration::from_secs(2);
const NEW: Duration = Duration::from_millis(200);

/// A holder's kind.
const POD: &str = "Pod";

/// IP protocol numbers (IANA).
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Names of what a packet has numbers of.
pub(super) struct Names {
    node: String,
    index: SharedIndex,
    report: SharedReport,
    leases: std::sync::Arc<LeaseStore>,
    known: Known,
}

/// Who has which address, as far as that was asked.
#[derive(Debug, Default)]
struct Known {
    holders: HashMap<IpAddr, Holder>,
    asked: Option<Instant>,
    /// It was asked because of an address that nobody has: not again until what is known is old.
    in_vain: bool,
}

impl Known {
    /// Who has it; `ask`: who has which.
    fn holder(
        &mut self,
        address: IpAddr,
        now: Instant,
        ask: impl FnOnce() -> HashMap<IpAddr, Holder>,
    ) -> Option<Holder> {
        let age = self.asked.map(|asked| now.saturating_duration_since(asked));
        let is_old = age.is_none_or(|age| age > OLD);
        let is_missed = !self.in_vain && !self.holders.contains_key(&address) && age.is_some_and(|age| age > NEW);
        if is_old || is_missed {
            self.holders = ask();
            self.asked = Some(now);
            self.in_vain = !is_old && !self.holders.contains_key(&address);
        }
        self.holders.get(&address).cloned()
    }
}

impl Names {
    pub(super) fn new(node: &str, sources: &Sources) -> Self {
        Self {
            node: node.to_owned(),
            index: sources.index.clone(),
            report: sources.report.clone(),
            leases: sources.leases.clone(),
            known: Known::default(),
        }
    }

    /// What is told of a packet.
    pub(super) fn event(&mut self, dropped: &Dropped) -> DropEvent {
        let is_drop = dropped.reason.is_drop();
        DropEvent {
            time: time(dropped.at),
            node: self.node.clone(),
            verdict: match dropped.reason.is_audit() {
                true => Fate::Audited,
                false if is_drop => Fate::Dropped,
                false => Fate::Refused,
            },
            reason: dropped.reason.name().to_owned(),
            place: match dropped.place {
                Where::Device => Place::Device,
                Where::Wire => Place::Driver,
                Where::Socket => Place::Socket,
            },
            protocol: dropped.ends.map_or_else(String::new, |_| protocol(dropped.protocol)),
            detail: detail(dropped),
            source: dropped.ends.map(|(from, _)| self.end(from, dropped.protocol)),
            destination: dropped.ends.map(|(_, to)| self.end(to, dropped.protocol)),
            backend: dropped.backend.map(|to| self.end(to, dropped.protocol)),
            policy: dropped.rule.and_then(|rule| self.denial(dropped, rule)),
            device: Some(dropped.ifindex).filter(|index| *index != 0).map(device),
            bytes: dropped.bytes,
        }
    }

    fn end(&mut self, (address, port): End, protocol: u8) -> FlowEnd {
        let (index, leases) = (&self.index, &self.leases);
        let is = self.known.holder(address, Instant::now(), || holders(index, leases));
        let labels = is.as_ref().map(|is| self.labels(is)).unwrap_or_default();
        // Of an echo, both are its identifier.
        let port = if [ICMP, ICMPV6].contains(&protocol) { 0 } else { port };
        FlowEnd { address, port, is, labels }
    }

    fn labels(&self, holder: &Holder) -> BTreeMap<String, String> {
        if holder.kind != POD {
            return BTreeMap::new();
        }
        let name = NamespacedName::new(&holder.namespace, &holder.name);
        read(&self.index).world().pods.get(&name).map(|pod| (*pod.labels).clone()).unwrap_or_default()
    }

    fn denial(&self, dropped: &Dropped, rule: RuleId) -> Option<Denial> {
        let ends = dropped.ends?;
        let to = dropped.backend.unwrap_or(ends.1);
        let names = self.report.read().unwrap_or_else(PoisonError::into_inner).rule_names.clone();
        let direction = direction_of(dropped.reason)?;
        if let Some(set) = dropped.audit_set {
            return Some(would_deny(&names, direction, rule, set));
        }
        // Of an answer, it is the other end's egress, or this end's ingress, that was judged.
        let ends = [ends.0.0, to.0];
        Some(denied(&names, direction, rule, ends))
    }
}

/// Who has which address now.
fn holders(index: &SharedIndex, leases: &LeaseStore) -> HashMap<IpAddr, Holder> {
    let own = leases.pod_addresses();
    let index = read(index);
    let mut pod_ips = given::believed(index.world(), index.given());
    pod_ips.extend(own);
    let world = index.world();
    let mut known: HashMap<_, _> = services(world).collect();
    let holders = Holders::of(&View { world, dns: &[], pod_ips: &pod_ips, names: &NOTHING_LEARNED });
    known.extend(holders.all().map(|(address, held)| (address, named(&held))));
    known
}

fn direction_of(reason: Reason) -> Option<Direction> {
    match reason.name() {
        "egress_policy" | "audit_egress" => Some(Direction::Egress),
        "ingress_policy" | "audit_ingress" => Some(Direction::Ingress),
        _ => None,
    }
}

/// What would deny a connection by a set that is only audited.
fn would_deny(names: &RuleNames, direction: Direction, rule: RuleId, set: SetId) -> Denial {
    let (none, nobody) = (BTreeSet::new(), BTreeSet::new());
    let info = names.rules.get(&rule).or_else(|| names.former.get(&rule));
    let audited = names.audited.get(&set).unwrap_or(&none);
    let (rule, policies) = denying(rule, info, audited, names.isolating.get(&set).unwrap_or(&nobody));
    let policies = policies.iter().map(ToString::to_string).collect();
    Denial { direction: direction_name(direction).to_owned(), rule, policies }
}

/// What denied a packet from the first to the second address.
fn denied(names: &RuleNames, direction: Direction, rule: RuleId, [from, to]: [IpAddr; 2]) -> Denial {
    let word = direction_name(direction);
    // Who opened the connection is not told: the end whose set isolates in this direction is the one that was judged.
    let likely = if direction == Direction::Egress { [from, to] } else { [to, from] };
    let isolating = || {
        let sets = likely.iter().filter_map(|ip| names.pods.get(ip)).map(|sets| sets.of(direction).0);
        sets.filter_map(|set| names.isolating.get(&set)).next().into_iter().flatten().map(ToString::to_string).collect()
    };
    let (rule, policies) = match rule {
        RuleId::DEFAULT_DENY => ("no rule allows it".to_owned(), isolating()),
        RuleId::HOST_ONLY => ("the pod's labels are not known yet: only its node reaches it".to_owned(), Vec::new()),
        rule => match names.rules.get(&rule).or_else(|| names.former.get(&rule)) {
            Some(info) => (words(info), vec![info.policy.to_string()]),
            None => (format!("rule {}, which is gone", rule.0), Vec::new()),
        },
    };
    Denial { direction: word.to_owned(), rule, policies }
}

/// Where a rule is in its policy.
pub(crate) fn words(info: &RuleInfo) -> String {
    let (list, peers) = match info.direction {
        Direction::Ingress => ("ingress", "from"),
        Direction::Egress => ("egress", "to"),
    };
    let mut text = format!("spec.{list}[{}]", info.rule);
    if let Some(peer) = info.peer {
        text.push_str(&format!(".{peers}[{peer}]"));
    }
    if let Some(port) = info.port {
        text.push_str(&format!(" ports[{port}]"));
    }
    text
}

fn services(world: &World) -> impl Iterator<Item = (IpAddr, Holder)> + '_ {
    world.services.values().flat_map(|service| {
        let addresses = service.cluster_ips.iter().chain(&service.external_ips).chain(&service.load_balancer_ips);
        addresses.map(|ip| (*ip, of("Service", &service.name)))
    })
}

fn of(kind: &str, name: &NamespacedName) -> Holder {
    Holder { kind: kind.to_owned(), namespace: name.namespace.clone(), name: name.name.clone() }
}

fn named(held: &Held<'_>) -> Holder {
    let node = |name: &NodeName| Holder { kind: "Node".to_owned(), namespace: String::new(), name: name.to_string() };
    match held {
        Held::Pod(pod) => of(POD, &pod.name),
        Held::UnknownPod(name) => of(POD, name),
        Held::Node(name) => node(name),
        Held::Dns => Holder { kind: "DNS".to_owned(), namespace: String::new(), name: "of the node".to_owned() },
    }
}

fn time(at: SystemTime) -> String {
    Timestamp::try_from(at).map_or_else(|_| String::new(), |at| format!("{at:.6}"))
}

fn protocol(number: u8) -> String {
    match number {
        ICMP => "ICMP".to_owned(),
        ICMPV6 => "ICMPv6".to_owned(),
        number => Protocol::ALL
            .into_iter()
            .find(|known| known.number() == number)
            .map_or_else(|| number.to_string(), |known| known.to_string()),
    }
}

fn detail(dropped: &Dropped) -> Option<String> {
    const FLAGS: [(u8, &str); 4] = [(0x02, "SYN"), (0x10, "ACK"), (0x01, "FIN"), (0x04, "RST")];
    dropped.ends?;
    match dropped.protocol {
        ICMP | ICMPV6 => Some(format!("type {}", dropped.icmp_type)),
        6 if dropped.place != Where::Socket => {
            let set = FLAGS.iter().filter(|(bit, _)| dropped.tcp_flags & bit != 0).map(|(_, name)| *name);
            Some(set.collect::<Vec<_>>().join(",")).filter(|text| !text.is_empty())
        }
        _ => None,
    }
}

/// The device's name, or its index where it has gone.
fn device(index: u32) -> String {
    let name = if_indextoname(index).ok();
    name.and_then(|name| name.into_string().ok()).unwrap_or_else(|| format!("device {index}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_outside_are_not_asked_for_each_time_and_a_new_pod_is_known_soon() {
        let (pod, new): (IpAddr, IpAddr) = ([10, 244, 0, 5].into(), [10, 244, 0, 6].into());
        let outside = |n: u8| IpAddr::from([192, 0, 2, n]);
        let holder = of(POD, &NamespacedName::new("a", "web"));
        let all = |addresses: &[IpAddr]| addresses.iter().map(|address| (*address, holder.clone())).collect();
        let (mut known, start, asked) = (Known::default(), Instant::now(), std::cell::Cell::new(0));
        let mut who = |address, after, has: &[IpAddr]| {
            known.holder(address, start + after, || {
                asked.set(asked.get() + 1);
                all(has)
            })
        };
        // Ten seconds of drops on their way to everywhere, a hundred a second.
        for n in 0..1000u64 {
            assert_eq!(who(outside((n % 200) as u8), Duration::from_millis(n * 10), &[pod]), None);
        }
        assert!(asked.get() <= 12, "asked {} times", asked.get());
        asked.set(0);
        let later = Duration::from_secs(20);
        assert_eq!(who(pod, later, &[pod]), Some(holder.clone()));
        assert_eq!(who(new, later + NEW / 2, &[pod, new]), None);
        assert_eq!(who(new, later + NEW * 2, &[pod, new]), Some(holder.clone()));
        // What was found is no reason to wait; what was not is.
        assert_eq!(who(outside(1), later + NEW * 4, &[pod, new]), None);
        assert_eq!(asked.get(), 3);
        assert_eq!(who(outside(1), later + NEW * 8, &[pod, new]), None);
        assert_eq!(who(outside(2), later + NEW * 8, &[pod, new]), None);
        assert_eq!(asked.get(), 3);
        assert_eq!(who(outside(2), later + NEW * 5 + OLD, &[pod, outside(2)]), Some(holder.clone()));
    }
}
