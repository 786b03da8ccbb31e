//! Answers for the cluster domain and for the reverse names of cluster addresses, from what the feed said.
//!
//! Kubernetes DNS specification 1.1.0: A and AAAA, SRV, PTR, CNAME for ExternalName, `dns-version` TXT; and pods by address
//! (`10-1-2-3.ns.pod.cluster.local`, only those that exist). Beyond it, as CoreDNS: an endpoint with a host name has a name
//! below its Service also where that has a cluster address, and an endpoint's name has SRV of all its ports. No wildcards.
//! NXDOMAIN and NODATA are told apart, both with the SOA (RFC 2308). Names are text in lower case without a trailing dot;
//! labels are separated by `.`, so a caller must escape labels that hold one (such a name then matches nothing, which is
//! right: no cluster name has such a label).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use towpath_model::{Family, family_of};
use towpath_wire::dns::{DnsAnswer, DnsEndpoint, DnsPort, DnsService, FeedMessage};

use super::answer::{Answer, Data, Outcome, QueryType, Rcode, Record};
use super::records::Records;

/// Seconds that a client may keep an answer, and a negative one. Short: addresses of pods come and go.
pub const TTL: u32 = 5;

/// How many ExternalName aliases within the cluster are followed in one answer.
const MAX_ALIASES: usize = 8;

/// No message has room for more records of a kind: 64 KiB, of which an address takes 16 bytes, and everything else more.
const MAX_RECORDS: usize = 4096;

/// What a name within the cluster domain holds.
enum Found<'a> {
    /// No such name, and nothing below it.
    Nothing,
    /// The name exists, perhaps only because something is below it.
    Data(Vec<Data>),
    /// SRV records, and the addresses of their targets.
    Services { records: Vec<Data>, targets: BTreeMap<String, BTreeSet<IpAddr>> },
    /// An alias.
    Alias(&'a str),
}

/// What is asked of a name.
#[derive(Clone, Copy)]
struct Asked {
    query: QueryType,
    turn: usize,
}

/// The records of a cluster and an index for reverse names.
#[derive(Clone, Debug, Default)]
pub struct Zone {
    records: Records,
    /// Services (namespace, name) that have an address as cluster address or headless endpoint.
    reverse: HashMap<IpAddr, BTreeSet<(String, String)>>,
    servers: Vec<IpAddr>,
    serial: u32,
}

impl Zone {
    /// An empty zone that names these addresses as its server (`ns.dns.<domain>`).
    pub fn new(servers: Vec<IpAddr>) -> Self {
        Self { servers, ..Self::default() }
    }

    /// Applies one message of the feed.
    pub fn apply(&mut self, message: FeedMessage) {
        self.serial = self.serial.wrapping_add(1).max(1);
        match &message {
            FeedMessage::Set { service } => {
                self.unindex(&service.namespace, &service.name);
                let addresses = addresses_of(service);
                let key = (service.namespace.clone(), service.name.clone());
                for address in addresses {
                    self.reverse.entry(address).or_default().insert(key.clone());
                }
            }
            FeedMessage::Remove { namespace, name } => self.unindex(namespace, name),
            FeedMessage::Snapshot { services, .. } => {
                self.reverse.clear();
                for service in services {
                    for address in addresses_of(service) {
                        let key = (service.namespace.clone(), service.name.clone());
                        self.reverse.entry(address).or_default().insert(key);
                    }
                }
            }
            FeedMessage::Namespaces { .. } | FeedMessage::Pods { .. } | FeedMessage::Rules { .. } => {}
        }
        self.records.apply(message);
    }

    fn unindex(&mut self, namespace: &str, name: &str) {
        let Some(old) = self.records.service(namespace, name) else { return };
        let key = (namespace.to_owned(), name.to_owned());
        for address in addresses_of(old) {
            if let Some(owners) = self.reverse.get_mut(&address) {
                owners.remove(&key);
                if owners.is_empty() {
                    self.reverse.remove(&address);
                }
            }
        }
    }

    /// A zone without names to build this one's successor in: same servers and rules, later serial.
    pub fn successor(&self) -> Self {
        let mut records = Records::default();
        if let Some(rules) = self.records.rules() {
            records.apply(FeedMessage::Rules { rules: rules.clone() });
        }
        Self { servers: self.servers.clone(), serial: self.serial, records, ..Self::default() }
    }

    /// What the feed said so far.
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// The SOA serial: rises with every message applied.
    pub fn serial(&self) -> u32 {
        self.serial
    }

    /// Answers a question of class IN. `name`: lower case, without a trailing dot. Where there are more equal records than a message has
    /// room for, `turn` picks which: over all turns each is given as often as the others.
    pub fn answer(&self, name: &str, query: QueryType, turn: u16) -> Outcome {
        if self.records.domain().is_empty() {
            return Outcome::NotReady;
        }
        if let Some(address) = reverse_address(name) {
            return match self.pointers(address) {
                None => Outcome::Forward,
                Some(names) if matches!(query, QueryType::Ptr | QueryType::Any) => {
                    let answers = names.into_iter().map(|n| record(name, Data::Ptr(n))).collect();
                    Outcome::Answer(Answer { answers, ..Answer::empty(Rcode::NoError) })
                }
                Some(_) => Outcome::Answer(self.negative(Rcode::NoError)),
            };
        }
        let Some(below) = self.below(name) else { return Outcome::Forward };
        Outcome::Answer(self.answer_below(name, &below, Asked { query, turn: usize::from(turn) }))
    }

    /// The labels of a name below the cluster domain.
    fn below<'n>(&self, name: &'n str) -> Option<Vec<&'n str>> {
        let rest = name.strip_suffix(self.records.domain())?;
        if rest.is_empty() {
            return Some(Vec::new());
        }
        rest.strip_suffix('.').map(|rest| rest.split('.').collect())
    }

    fn answer_below(&self, name: &str, below: &[&str], asked: Asked) -> Answer {
        let mut answer = Answer::empty(Rcode::NoError);
        let mut owner = name.to_owned();
        let mut found = self.find(below, asked);
        for _ in 0..MAX_ALIASES {
            let Found::Alias(target) = found else { break };
            answer.answers.push(record(&owner, Data::Cname(target.to_owned())));
            if matches!(asked.query, QueryType::Cname | QueryType::Any) {
                return answer;
            }
            let Some(below) = self.below(target) else {
                answer.chase = Some(target.to_owned());
                return answer;
            };
            if answer.answers.iter().any(|r| r.owner == target) {
                return answer; // Aliases in a circle: what is known so far is all there is.
            }
            owner = target.to_owned();
            found = self.find(&below, asked);
        }
        let negative = match found {
            Found::Nothing => Some(Rcode::NxDomain),
            Found::Alias(_) => None,
            Found::Data(data) => {
                let matching: Vec<Data> = data.into_iter().filter(|d| d.is(asked.query)).collect();
                let none = matching.is_empty();
                answer.answers.extend(matching.into_iter().map(|d| record(&owner, d)));
                none.then_some(Rcode::NoError)
            }
            Found::Services { records, targets } => {
                answer.answers.extend(records.into_iter().map(|data| record(&owner, data)));
                let addresses = targets.iter().flat_map(|(target, addresses)| {
                    addresses.iter().map(move |address| record(target, Data::of(*address)))
                });
                answer.additional.extend(addresses.take(MAX_RECORDS));
                None
            }
        };
        if let Some(rcode) = negative {
            answer.rcode = rcode;
            answer.authority = self.negative(rcode).authority;
        }
        answer
    }

    fn find(&self, below: &[&str], asked: Asked) -> Found<'_> {
        match below {
            [] => Found::Data(vec![self.soa(), Data::Ns(self.server_name())]),
            ["dns-version"] => Found::Data(vec![Data::Txt("1.1.0".to_owned())]),
            ["dns" | "svc" | "pod"] => Found::Data(Vec::new()),
            ["ns", "dns"] => Found::Data(self.servers.iter().map(|a| Data::of(*a)).collect()),
            [namespace, "svc" | "pod"] => self.exists(self.records.has_namespace(namespace)),
            [address, namespace, "pod"] => self.pod(address, namespace),
            [name, namespace, "svc"] => match self.records.service(namespace, name) {
                Some(service) => self.service(service, asked),
                None => Found::Nothing,
            },
            [label, name, namespace, "svc"] => match self.records.service(namespace, name) {
                Some(service) => self.below_service(service, label, asked),
                None => Found::Nothing,
            },
            [port, protocol, name, namespace, "svc"] => match self.records.service(namespace, name) {
                Some(service) => self.port(service, port, protocol, asked),
                None => Found::Nothing,
            },
            _ => Found::Nothing,
        }
    }

    fn exists(&self, yes: bool) -> Found<'_> {
        if yes { Found::Data(Vec::new()) } else { Found::Nothing }
    }

    fn pod(&self, label: &str, namespace: &str) -> Found<'_> {
        let Some(address) = parse_dashed(label) else { return Found::Nothing };
        if self.records.has_pod(namespace, address) { Found::Data(vec![Data::of(address)]) } else { Found::Nothing }
    }

    fn service<'a>(&self, service: &'a DnsService, asked: Asked) -> Found<'a> {
        match &service.answer {
            DnsAnswer::Alias { target } => Found::Alias(target),
            DnsAnswer::ClusterIps { addresses, .. } => Found::Data(addresses.iter().map(|a| Data::of(*a)).collect()),
            // "If there are no ready endpoints for the headless Service, the answer should be NXDOMAIN."
            DnsAnswer::Endpoints { endpoints } if endpoints.is_empty() => Found::Nothing,
            DnsAnswer::Endpoints { endpoints } => Found::Data(addresses(endpoints.iter(), asked)),
        }
    }

    /// `<endpoint>.<service>` or `_<protocol>.<service>`, which exists when a port does below it.
    fn below_service<'a>(&self, service: &'a DnsService, label: &str, asked: Asked) -> Found<'a> {
        if let Some(protocol) = label.strip_prefix('_') {
            let exists = ports_of(service).any(|p| !p.name.is_empty() && p.protocol == protocol);
            return if exists { Found::Data(Vec::new()) } else { Found::Nothing };
        }
        let dashed = parse_dashed(label);
        let named: Vec<&DnsEndpoint> = endpoints_of(service).iter().filter(|e| is_called(e, label, dashed)).collect();
        if named.is_empty() {
            return Found::Nothing;
        }
        if asked.query != QueryType::Srv {
            return Found::Data(addresses(named.into_iter(), asked));
        }
        let with_ports = named.into_iter().flat_map(|e| e.ports.iter().map(move |port| (e, port.port))).collect();
        self.endpoint_ports(service, with_ports, asked)
    }

    /// `_<port>._<protocol>.<service>`: SRV of named ports only.
    fn port<'a>(&self, service: &'a DnsService, port: &str, protocol: &str, asked: Asked) -> Found<'a> {
        let (Some(port), Some(protocol)) = (port.strip_prefix('_'), protocol.strip_prefix('_')) else {
            return Found::Nothing;
        };
        let wanted = |p: &&DnsPort| !p.name.is_empty() && p.name == port && p.protocol == protocol;
        let found = match &service.answer {
            DnsAnswer::Alias { .. } => return Found::Nothing,
            DnsAnswer::ClusterIps { addresses, ports, .. } => {
                let target = self.service_name(&service.namespace, &service.name);
                let ports = ports.iter().filter(wanted).map(|p| (target.clone(), p.port)).collect();
                services(ports, BTreeMap::from([(target, addresses.iter().copied().collect())]))
            }
            DnsAnswer::Endpoints { endpoints } => {
                let with_ports = |e: &'a DnsEndpoint| e.ports.iter().filter(wanted).map(move |p| (e, p.port));
                self.endpoint_ports(service, endpoints.iter().flat_map(with_ports).collect(), asked)
            }
        };
        match found {
            Found::Data(_) => Found::Nothing,
            Found::Services { .. } if !matches!(asked.query, QueryType::Srv | QueryType::Any) => {
                Found::Data(Vec::new())
            }
            found => found,
        }
    }

    /// SRV of ports of endpoints.
    fn endpoint_ports<'a>(&self, service: &DnsService, all: Vec<(&DnsEndpoint, u16)>, asked: Asked) -> Found<'a> {
        let service_name = self.service_name(&service.namespace, &service.name);
        let mut targets: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
        let mut ports = BTreeSet::new();
        for (endpoint, port) in turned(&all, asked.turn) {
            // Then no address of a target has room either.
            if ports.len() >= MAX_RECORDS {
                break;
            }
            // Two families of one pod share a host name: one SRV record, two addresses.
            let target = format!("{}.{service_name}", endpoint_label(endpoint));
            targets.entry(target.clone()).or_default().insert(endpoint.address);
            ports.insert((target, *port));
        }
        services(ports, targets)
    }

    /// The names of an address; none if it is not one of ours.
    fn pointers(&self, address: IpAddr) -> Option<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for (namespace, name) in self.reverse.get(&address)? {
            let Some(service) = self.records.service(namespace, name) else { continue };
            let own = self.service_name(namespace, name);
            let endpoints = endpoints_of(service).iter().filter(|e| e.address == address);
            names.extend(endpoints.map(|e| format!("{}.{own}", endpoint_label(e))));
            if matches!(&service.answer, DnsAnswer::ClusterIps { addresses, .. } if addresses.contains(&address)) {
                names.insert(own);
            }
        }
        (!names.is_empty()).then_some(names)
    }

    fn service_name(&self, namespace: &str, name: &str) -> String {
        format!("{name}.{namespace}.svc.{}", self.records.domain())
    }

    fn server_name(&self) -> String {
        format!("ns.dns.{}", self.records.domain())
    }

    fn soa(&self) -> Data {
        Data::Soa {
            mname: self.server_name(),
            rname: format!("hostmaster.{}", self.records.domain()),
            serial: self.serial,
        }
    }

    fn negative(&self, rcode: Rcode) -> Answer {
        Answer { authority: vec![record(self.records.domain(), self.soa())], ..Answer::empty(rcode) }
    }
}

fn record(owner: &str, data: Data) -> Record {
    Record { owner: owner.to_owned(), ttl: TTL, data }
}

fn addresses_of(service: &DnsService) -> BTreeSet<IpAddr> {
    let own = match &service.answer {
        DnsAnswer::ClusterIps { addresses, .. } => addresses.as_slice(),
        DnsAnswer::Endpoints { .. } | DnsAnswer::Alias { .. } => &[],
    };
    own.iter().copied().chain(endpoints_of(service).iter().map(|e| e.address)).collect()
}

/// Those that have a name below the Service.
fn endpoints_of(service: &DnsService) -> &[DnsEndpoint] {
    match &service.answer {
        DnsAnswer::ClusterIps { endpoints, .. } | DnsAnswer::Endpoints { endpoints } => endpoints,
        DnsAnswer::Alias { .. } => &[],
    }
}

/// All of them; where that is more than a message has room for, another one is first at each turn.
fn turned<T>(all: &[T], turn: usize) -> impl Iterator<Item = &T> {
    let first = if all.len() > MAX_RECORDS { turn.checked_rem(all.len()).unwrap_or(0) } else { 0 };
    let (late, early) = all.split_at(first);
    early.iter().chain(late)
}

/// The addresses of endpoints that are asked for, each once, and no more than a message has room for.
fn addresses<'a>(endpoints: impl Iterator<Item = &'a DnsEndpoint>, asked: Asked) -> Vec<Data> {
    let all: Vec<Data> = endpoints.map(|e| Data::of(e.address)).filter(|data| data.is(asked.query)).collect();
    let given: BTreeSet<&Data> = turned(&all, asked.turn).take(MAX_RECORDS).collect();
    given.into_iter().cloned().collect()
}

/// SRV of these targets and ports, each an equal share; a name without data where there are none.
fn services<'a>(ports: BTreeSet<(String, u16)>, targets: BTreeMap<String, BTreeSet<IpAddr>>) -> Found<'a> {
    let Some(share) = 100usize.checked_div(ports.len()) else { return Found::Data(Vec::new()) };
    let weight = u16::try_from(share.max(1)).unwrap_or(1);
    let srv = |(target, port)| Data::Srv { priority: 0, weight, port, target };
    Found::Services { records: ports.into_iter().map(srv).collect(), targets }
}

fn ports_of(service: &DnsService) -> Box<dyn Iterator<Item = &DnsPort> + '_> {
    match &service.answer {
        DnsAnswer::ClusterIps { ports, .. } => Box::new(ports.iter()),
        DnsAnswer::Endpoints { endpoints } => Box::new(endpoints.iter().flat_map(|e| e.ports.iter())),
        DnsAnswer::Alias { .. } => Box::new(std::iter::empty()),
    }
}

/// The label of an endpoint below its Service: its host name, else its address with dashes.
fn endpoint_label(endpoint: &DnsEndpoint) -> String {
    endpoint.hostname.clone().unwrap_or_else(|| match endpoint.address {
        IpAddr::V4(v4) => v4.to_string().replace('.', "-"),
        IpAddr::V6(v6) => v6.to_string().replace(':', "-"),
    })
}

/// Whether an endpoint has this label below its Service; `dashed` is the address that the label spells, if it does.
fn is_called(endpoint: &DnsEndpoint, label: &str, dashed: Option<IpAddr>) -> bool {
    match &endpoint.hostname {
        Some(hostname) => hostname == label,
        None => dashed == Some(endpoint.address) && endpoint_label(endpoint) == label,
    }
}

/// `10-1-2-3` or `fd00--1` as an address.
fn parse_dashed(label: &str) -> Option<IpAddr> {
    let v4 = || label.replace('-', ".").parse::<Ipv4Addr>().ok().map(IpAddr::V4);
    let v6 = || label.replace('-', ":").parse::<Ipv6Addr>().ok().map(IpAddr::V6);
    v4().or_else(v6)
}

/// The address of a name below `in-addr.arpa` or `ip6.arpa` (RFC 1035 §3.5, RFC 3596 §2.5), if it names a whole one.
pub fn reverse_address(name: &str) -> Option<IpAddr> {
    if let Some(rest) = name.strip_suffix(".in-addr.arpa") {
        let mut octets: Vec<&str> = rest.split('.').collect();
        octets.reverse();
        let address: Ipv4Addr = octets.join(".").parse().ok()?;
        return Some(IpAddr::V4(address));
    }
    let rest = name.strip_suffix(".ip6.arpa")?;
    let mut bits: u128 = 0;
    let mut count = 0;
    for (index, label) in rest.split('.').enumerate() {
        let nibble = u128::from(label.chars().next().filter(|_| label.len() == 1)?.to_digit(16)?);
        bits |= nibble.checked_shl(u32::try_from(index).ok()?.checked_mul(4)?)?;
        count = index + 1;
    }
    let address = IpAddr::V6(Ipv6Addr::from(bits));
    (count == 32 && family_of(address) == Family::V6).then_some(address)
}
