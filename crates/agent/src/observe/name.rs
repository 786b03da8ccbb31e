//! Whose addresses, devices and rules those of a dropped packet are.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::PoisonError;
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::jiff::Timestamp;
use nix::net::if_::if_indextoname;
use towpath_datapath::bpf::{Dropped, End, Place as Where, Reason};
use towpath_model::desired::{PodSets, RuleId, RuleInfo};
use towpath_model::{Direction, NamespacedName, NodeName, Protocol, World};
use towpath_policy::{Holder as Held, Holders, View};
use towpath_wire::observe::{Denial, DropEvent, Fate, FlowEnd, Holder, Place};

use crate::SharedIndex;
use crate::ipam::LeaseStore;
use crate::node_network::given;
use crate::read;
use crate::reconcile::{RuleNames, SharedReport};
use crate::status::Sources;

/// How old what is known of addresses may be, and how old it must be to be asked for again because of one that is not in it.
const OLD: Duration = Duration::from_secs(2);
const NEW: Duration = Duration::from_millis(200);

/// IP protocol numbers (IANA).
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Names of what a packet has numbers of.
pub(super) struct Names {
    node: String,
    index: SharedIndex,
    report: SharedReport,
    leases: std::sync::Arc<LeaseStore>,
    holders: HashMap<IpAddr, (Holder, BTreeMap<String, String>)>,
    asked: Option<Instant>,
}

impl Names {
    pub(super) fn new(node: &str, sources: &Sources) -> Self {
        Self {
            node: node.to_owned(),
            index: sources.index.clone(),
            report: sources.report.clone(),
            leases: sources.leases.clone(),
            holders: HashMap::new(),
            asked: None,
        }
    }

    /// What is told of a packet.
    pub(super) fn event(&mut self, dropped: &Dropped) -> DropEvent {
        let is_drop = dropped.reason.is_drop();
        DropEvent {
            time: time(dropped.at),
            node: self.node.clone(),
            verdict: if is_drop { Fate::Dropped } else { Fate::Refused },
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
        let known = self.holder(address);
        let (is, labels) = known.map_or_else(|| (None, BTreeMap::new()), |(is, labels)| (Some(is), labels));
        // Of an echo, both are its identifier.
        let port = if [ICMP, ICMPV6].contains(&protocol) { 0 } else { port };
        FlowEnd { address, port, is, labels }
    }

    fn holder(&mut self, address: IpAddr) -> Option<(Holder, BTreeMap<String, String>)> {
        let age = self.asked.map(|asked| asked.elapsed());
        let is_known = self.holders.contains_key(&address);
        if age.is_none_or(|age| age > OLD || (!is_known && age > NEW)) {
            self.holders = self.ask();
            self.asked = Some(Instant::now());
        }
        self.holders.get(&address).cloned()
    }

    fn ask(&self) -> HashMap<IpAddr, (Holder, BTreeMap<String, String>)> {
        let own = self.leases.pod_addresses();
        let index = read(&self.index);
        let mut pod_ips = given::believed(index.world(), index.given());
        pod_ips.extend(own);
        let world = index.world();
        let mut known: HashMap<_, _> = services(world).collect();
        let holders = Holders::of(&View { world, dns: &[], pod_ips: &pod_ips });
        known.extend(holders.all().map(|(address, held)| (address, (named(&held), labels(&held)))));
        known
    }

    fn denial(&self, dropped: &Dropped, rule: RuleId) -> Option<Denial> {
        let ends = dropped.ends?;
        let to = dropped.backend.unwrap_or(ends.1);
        let names = self.report.read().unwrap_or_else(PoisonError::into_inner).rule_names.clone();
        let direction = direction_of(dropped.reason)?;
        // Of an answer, it is the other end's egress, or this end's ingress, that was judged.
        let ends = [ends.0.0, to.0];
        Some(denied(&names, direction, rule, ends))
    }
}

fn direction_of(reason: Reason) -> Option<Direction> {
    match reason.name() {
        "egress_policy" => Some(Direction::Egress),
        "ingress_policy" => Some(Direction::Ingress),
        _ => None,
    }
}

fn set_of(sets: &PodSets, direction: Direction) -> towpath_model::desired::SetId {
    match direction {
        Direction::Ingress => sets.ingress,
        Direction::Egress => sets.egress,
    }
}

/// What denied a packet from the first to the second address.
fn denied(names: &RuleNames, direction: Direction, rule: RuleId, [from, to]: [IpAddr; 2]) -> Denial {
    let word = match direction {
        Direction::Ingress => "Ingress",
        Direction::Egress => "Egress",
    };
    // Who opened the connection is not told: the end whose set isolates in this direction is the one that was judged.
    let likely = if direction == Direction::Egress { [from, to] } else { [to, from] };
    let isolating = || {
        let sets = likely.iter().filter_map(|ip| names.pods.get(ip)).map(|sets| set_of(sets, direction));
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

fn words(info: &RuleInfo) -> String {
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

fn services(world: &World) -> impl Iterator<Item = (IpAddr, (Holder, BTreeMap<String, String>))> + '_ {
    world.services.values().flat_map(|service| {
        let addresses = service.cluster_ips.iter().chain(&service.external_ips).chain(&service.load_balancer_ips);
        addresses.map(|ip| (*ip, (of("Service", &service.name), BTreeMap::new())))
    })
}

fn of(kind: &str, name: &NamespacedName) -> Holder {
    Holder { kind: kind.to_owned(), namespace: name.namespace.clone(), name: name.name.clone() }
}

fn named(held: &Held<'_>) -> Holder {
    let node = |name: &NodeName| Holder { kind: "Node".to_owned(), namespace: String::new(), name: name.to_string() };
    match held {
        Held::Pod(pod) => of("Pod", &pod.name),
        Held::UnknownPod(name) => of("Pod", name),
        Held::Node(name) => node(name),
        Held::Dns => Holder { kind: "DNS".to_owned(), namespace: String::new(), name: "of the node".to_owned() },
    }
}

fn labels(held: &Held<'_>) -> BTreeMap<String, String> {
    match held {
        Held::Pod(pod) => pod.labels.clone(),
        _ => BTreeMap::new(),
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
