//! What is configured beside the cluster's names, ready to be looked up: zones with their own servers, hosts, aliases and longest
//! times. Replaced as a whole when the feed says something else.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use towpath_plan::dns::rules::is_in;
use towpath_plan::dns::zone::{TTL, reverse_address};
use towpath_plan::dns::{Answer, Data, QueryType, Rcode, Record};
use towpath_wire::dns::{DnsRules, DnsUpstream, DnsZone};

use crate::message::response::MAX_TTL;
use crate::upstream::Upstreams;

/// Who is asked about names of a zone.
#[derive(Debug)]
pub(crate) enum Route {
    /// The node's own resolvers.
    Node,
    /// These.
    Servers(Arc<Upstreams>),
    /// Nobody.
    Nobody,
}

/// A zone.
#[derive(Debug)]
pub(crate) struct Zone {
    pub(crate) route: Route,
    /// Its names are not the cluster's, though the cluster might have an answer.
    pub(crate) over_cluster: bool,
    /// Longest that answers, and answers that there is nothing, may be kept, in seconds.
    pub(crate) success_ttl: u32,
    pub(crate) denial_ttl: u32,
    hosts: HashMap<String, Vec<IpAddr>>,
    reverse: HashMap<IpAddr, Vec<String>>,
    hosts_fall_through: bool,
    aliases: HashMap<String, String>,
}

impl Zone {
    /// Without `own`: asking one's own address would be asking oneself.
    fn new(zone: &DnsZone, own: &[IpAddr]) -> Self {
        let route = match &zone.upstream {
            DnsUpstream::Node => Route::Node,
            DnsUpstream::Nobody => Route::Nobody,
            DnsUpstream::Servers { servers } => {
                let others: Vec<SocketAddr> = servers.iter().filter(|s| !own.contains(&s.ip())).copied().collect();
                if others.is_empty() { Route::Nobody } else { Route::Servers(Arc::new(Upstreams::new(others))) }
            }
        };
        let mut reverse: HashMap<IpAddr, Vec<String>> = HashMap::new();
        for host in zone.hosts.iter().filter(|_| zone.hosts_reverse) {
            for address in &host.addresses {
                reverse.entry(*address).or_default().push(host.name.clone());
            }
        }
        Self {
            route,
            over_cluster: zone.over_cluster,
            success_ttl: zone.success_ttl.unwrap_or(MAX_TTL).min(MAX_TTL),
            denial_ttl: zone.denial_ttl.unwrap_or(MAX_TTL).min(MAX_TTL),
            hosts: zone.hosts.iter().map(|host| (host.name.clone(), host.addresses.clone())).collect(),
            reverse,
            hosts_fall_through: zone.hosts_fall_through || zone.hosts.is_empty(),
            aliases: zone.aliases.iter().map(|alias| (alias.from.clone(), alias.to.clone())).collect(),
        }
    }

    /// The name that this one stands for.
    pub(crate) fn alias(&self, name: &str) -> Option<&str> {
        self.aliases.get(name).map(String::as_str)
    }

    /// What the zone's own hosts say of a name; none: nothing.
    pub(crate) fn host(&self, name: &str, query: QueryType) -> Option<Answer> {
        let data: Vec<Data> = match self.hosts.get(name) {
            Some(addresses) => addresses.iter().map(|address| data_of(*address)).collect(),
            None => {
                let names = self.reverse.get(&reverse_address(name)?)?;
                names.iter().cloned().map(Data::Ptr).collect()
            }
        };
        let wanted = |data: &Data| match data {
            Data::A(_) => matches!(query, QueryType::A | QueryType::Any),
            Data::Aaaa(_) => matches!(query, QueryType::Aaaa | QueryType::Any),
            _ => matches!(query, QueryType::Ptr | QueryType::Any),
        };
        let record = |data| Record { owner: name.to_owned(), ttl: TTL, data };
        Some(Answer { answers: data.into_iter().filter(wanted).map(record).collect(), ..nothing(Rcode::NoError) })
    }

    /// Whether a name that neither the hosts nor the cluster have does not exist.
    pub(crate) fn ends_here(&self) -> bool {
        !self.hosts_fall_through
    }
}

fn data_of(address: IpAddr) -> Data {
    match address {
        IpAddr::V4(v4) => Data::A(v4),
        IpAddr::V6(v6) => Data::Aaaa(v6),
    }
}

/// An answer without records.
pub(crate) fn nothing(rcode: Rcode) -> Answer {
    Answer { rcode, answers: Vec::new(), authority: Vec::new(), additional: Vec::new(), chase: None }
}

/// All zones.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    zones: HashMap<String, Zone>,
    /// Rises with every change: what was cached before it may be another's answer.
    pub(crate) version: u64,
}

impl Rules {
    pub(crate) fn new(rules: &DnsRules, own: &[IpAddr], version: u64) -> Self {
        let zones = rules.zones.iter().map(|zone| (zone.name.clone(), Zone::new(zone, own))).collect();
        Self { zones, version }
    }

    /// The zone that a name is in: the longest.
    pub(crate) fn zone_of(&self, name: &str) -> Option<&Zone> {
        let mut rest = name;
        loop {
            if let Some(zone) = self.zones.get(rest) {
                debug_assert!(is_in(name, rest));
                return Some(zone);
            }
            if rest.is_empty() {
                return None;
            }
            rest = rest.split_once('.').map_or("", |(_, above)| above);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towpath_wire::dns::DnsHost;

    fn zone(name: &str, hosts: &[(&str, &str)]) -> DnsZone {
        let hosts =
            hosts.iter().map(|(name, ip)| DnsHost { name: (*name).to_owned(), addresses: vec![ip.parse().unwrap()] });
        DnsZone { name: name.to_owned(), hosts: hosts.collect(), hosts_reverse: true, ..DnsZone::default() }
    }

    #[test]
    fn the_longest_zone_counts_and_labels_are_whole() {
        let zones = vec![zone("", &[]), zone("test", &[]), zone("a.test", &[("x.a.test", "192.0.2.1")])];
        let rules = Rules::new(&DnsRules { zones }, &[], 1);
        let hosts = |name: &str| rules.zone_of(name).map(|zone| zone.hosts.len());
        assert_eq!(
            (hosts("b.a.test"), hosts("a.test"), hosts("ba.test"), hosts("else")),
            (Some(1), Some(1), Some(0), Some(0))
        );
        assert!(Rules::default().zone_of("any").is_none());
    }

    #[test]
    fn hosts_are_answered_by_type_and_in_reverse() {
        let rules = Rules::new(&DnsRules { zones: vec![zone("", &[("x.test", "192.0.2.1")])] }, &[], 1);
        let zone = rules.zone_of("x.test").unwrap();
        assert_eq!(zone.host("x.test", QueryType::A).unwrap().answers.len(), 1);
        assert_eq!(zone.host("x.test", QueryType::Aaaa).unwrap().answers, Vec::new(), "the name exists");
        let pointer = zone.host("1.2.0.192.in-addr.arpa", QueryType::Ptr).unwrap();
        assert_eq!(pointer.answers[0].data, Data::Ptr("x.test".to_owned()));
        assert!(zone.host("y.test", QueryType::A).is_none() && zone.ends_here());
    }

    #[test]
    fn a_server_that_is_this_process_is_not_asked() {
        let own: IpAddr = "169.254.116.10".parse().unwrap();
        let upstream = DnsUpstream::Servers { servers: vec![SocketAddr::new(own, 53)] };
        let rules = Rules::new(&DnsRules { zones: vec![DnsZone { upstream, ..zone("", &[]) }] }, &[own], 1);
        assert!(matches!(rules.zone_of("a").unwrap().route, Route::Nobody));
    }
}
