//! What is done of CoreDNS's configuration (ConfigMap `kube-system/coredns`, key `Corefile`) and of kube-dns's (ConfigMap
//! `kube-system/kube-dns`, keys `stubDomains` and `upstreamNameservers`) when Towpath answers in their place.
//!
//! | done | how |
//! | --- | --- |
//! | server blocks | names of zones, port 53 |
//! | `forward`, `proxy` | `FROM` and addresses with ports, or a resolv.conf, which is the node's; options that only tune it are of no effect |
//! | `hosts` | inline entries, `no_reverse`, `fallthrough`; `ttl` is of no effect |
//! | `cache` | longest times; nothing of the cluster's own names is cached anyway |
//! | `rewrite name [exact]` | the answer is an alias to the other name |
//! | `kubernetes` | its zones must be the cluster's domain and reverse zones; pods' names are always verified |
//! | `errors`, `log`, `health`, `ready`, `prometheus`, `loop`, `reload`, `loadbalance`, `bufsize`, `minimal`, `debug`, `trace`, `pprof` … | nothing: `towpath carry` has its own way |
//!
//! Everything else is named with its line, and left out. Pure.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use towpath_wire::dns::{DnsAlias, DnsHost, DnsRules, DnsUpstream, DnsZone};

use super::corefile::{Corefile, Directive, parse};

/// Directives without an effect on what is answered.
const OF_NO_EFFECT: [&str; 15] = [
    "errors",
    "log",
    "health",
    "ready",
    "prometheus",
    "loop",
    "reload",
    "loadbalance",
    "bufsize",
    "minimal",
    "debug",
    "trace",
    "pprof",
    "dnstap",
    "local",
];
/// Options of `forward` that change how servers are asked, not which.
const TUNING: [&str; 9] = [
    "expire",
    "max_fails",
    "health_check",
    "policy",
    "prefer_udp",
    "max_concurrent",
    "next",
    "failfast_all_unhealthy_upstreams",
    "max_idle_conns",
];
/// Options of `cache` of which only freshness depends.
const CACHE_TUNING: [&str; 3] = ["prefetch", "serve_stale", "servfail"];
/// Longest time that a cache may be told, in seconds.
const DAY: u32 = 86400;

/// The texts that the rules are made of; none: there is no such ConfigMap or key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// ConfigMap `coredns`.
    pub coredns: BTreeMap<String, String>,
    /// ConfigMap `kube-dns`.
    pub kube_dns: BTreeMap<String, String>,
}

/// What the rules must agree with.
#[derive(Clone, Debug, Default)]
pub struct Cluster<'a> {
    /// The cluster's domain, without a trailing dot.
    pub domain: &'a str,
    /// Addresses that cluster DNS is answered at: asking them would be asking oneself.
    pub own: &'a [IpAddr],
}

/// The rules, and what of the sources is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// The rules.
    pub rules: DnsRules,
    /// For people: what is not done, with its place.
    pub left_out: Vec<String>,
}

/// Makes rules of the sources. What the Corefile says of a zone wins over the ConfigMap `kube-dns`.
pub fn compile(sources: &Sources, cluster: &Cluster<'_>) -> Compiled {
    let mut compiler = Compiler { cluster, zones: BTreeMap::new(), left_out: Vec::new(), place: String::new() };
    if let Some(text) = sources.coredns.get("Corefile") {
        compiler.corefile(&parse(text));
    }
    for key in sources.coredns.keys().filter(|key| *key != "Corefile") {
        compiler.left_out.push(format!("ConfigMap coredns: key {key:?}"));
    }
    compiler.kube_dns(&sources.kube_dns);
    compiler.left_out.sort();
    compiler.left_out.dedup();
    Compiled { rules: DnsRules { zones: compiler.zones.into_values().collect() }, left_out: compiler.left_out }
}

/// A name in lower case without its trailing dot; the root is empty. None: it is no name.
fn name(text: &str) -> Option<String> {
    let text = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let label = |label: &str| (1..=63).contains(&label.len()) && label.chars().all(good);
    (text.is_empty() || (text.len() <= 253 && text.split('.').all(label))).then_some(text)
}

/// Whether a name is in a zone.
pub fn is_in(name: &str, zone: &str) -> bool {
    zone.is_empty() || name == zone || name.strip_suffix(zone).is_some_and(|rest| rest.ends_with('.'))
}

struct Compiler<'a> {
    cluster: &'a Cluster<'a>,
    zones: BTreeMap<String, DnsZone>,
    left_out: Vec<String>,
    place: String,
}

impl Compiler<'_> {
    fn leave_out(&mut self, directive: &Directive, why: &str) {
        let said = directive.words.join(" ");
        let said: String = said.chars().take(80).collect();
        self.left_out.push(format!("{}line {}: {said}: {why}", self.place, directive.line));
    }

    fn corefile(&mut self, file: &Corefile) {
        self.place = "Corefile ".to_owned();
        self.left_out.extend(file.problems.iter().map(|problem| format!("Corefile {problem}")));
        for server in &file.top {
            match &server.block {
                Some(_) if server.words.first().is_some_and(|word| word.starts_with('(')) => {
                    self.leave_out(server, "snippets are not read");
                }
                Some(block) => self.server(server, block),
                None => self.leave_out(server, "not in a server block"),
            }
        }
    }

    fn server(&mut self, server: &Directive, block: &[Directive]) {
        let mut zones = Vec::new();
        for word in server.words.iter().flat_map(|word| word.split(',')).filter(|word| !word.is_empty()) {
            match zone_of(word) {
                Ok(zone) => zones.push(zone),
                Err(why) => self.leave_out(server, &format!("{word}: {why}")),
            }
        }
        for zone in zones {
            if self.zones.contains_key(&zone) {
                self.leave_out(server, "a server block of this zone came before");
                continue;
            }
            let has_cluster =
                block.iter().any(|directive| directive.words.first().is_some_and(|word| word == "kubernetes"));
            let mut built = DnsZone {
                over_cluster: !has_cluster && self.is_within_the_clusters(&zone),
                upstream: DnsUpstream::Nobody,
                hosts_fall_through: true,
                name: zone,
                ..DnsZone::default()
            };
            for directive in block {
                self.directive(&mut built, directive);
            }
            self.zones.insert(built.name.clone(), built);
        }
    }

    /// Whether the cluster has answers for names of a zone, and for others beside.
    fn is_within_the_clusters(&self, zone: &str) -> bool {
        let parts = [self.cluster.domain, "in-addr.arpa", "ip6.arpa"];
        parts.iter().any(|whole| is_in(zone, whole) && zone != *whole)
    }

    fn directive(&mut self, zone: &mut DnsZone, directive: &Directive) {
        let Some((kind, arguments)) = directive.words.split_first() else { return };
        match kind.as_str() {
            "forward" | "proxy" => self.forward(zone, directive, arguments),
            "hosts" => self.hosts(zone, directive, arguments),
            "cache" => self.cache(zone, directive, arguments),
            "rewrite" => self.rewrite(zone, directive, arguments),
            "kubernetes" => self.kubernetes(directive, arguments),
            known if OF_NO_EFFECT.contains(&known) => {}
            _ => self.leave_out(directive, "not understood"),
        }
    }

    fn forward(&mut self, zone: &mut DnsZone, directive: &Directive, arguments: &[String]) {
        let Some((from, to)) = arguments.split_first() else { return self.leave_out(directive, "names nobody to ask") };
        let Some(from) = name(from) else { return self.leave_out(directive, "not a name") };
        for option in directive.block.iter().flatten() {
            let word = option.words.first().map(String::as_str).unwrap_or_default();
            if !TUNING.contains(&word) {
                self.leave_out(option, "this option of forward is not done");
            }
        }
        let upstream = self.upstream(directive, to);
        if is_in(&zone.name, &from) {
            zone.upstream = upstream;
        } else if is_in(&from, &zone.name) && !self.zones.contains_key(&from) {
            // A zone of its own within the block's.
            let own = DnsZone { name: from.clone(), upstream, hosts_fall_through: true, ..DnsZone::default() };
            self.zones.insert(from, own);
        } else {
            self.leave_out(directive, "not in the zone of its server block, or twice");
        }
    }

    /// Whom a list of servers means. A resolv.conf is the node's, whatever its path is in CoreDNS's container.
    fn upstream(&mut self, directive: &Directive, to: &[String]) -> DnsUpstream {
        if to.iter().any(|word| word.starts_with('/')) {
            if to.len() > 1 {
                self.leave_out(directive, "only the node's resolvers are asked");
            }
            return DnsUpstream::Node;
        }
        let mut servers = Vec::new();
        for word in to {
            match server(word.strip_prefix("dns://").unwrap_or(word)) {
                Some(server) if self.cluster.own.contains(&server.ip()) => {
                    self.leave_out(directive, &format!("{word} is this cluster's DNS itself"));
                }
                Some(server) if servers.contains(&server) => {}
                Some(server) => servers.push(server),
                None => self.leave_out(directive, &format!("{word} is no address that can be asked")),
            }
        }
        if servers.is_empty() { DnsUpstream::Nobody } else { DnsUpstream::Servers { servers } }
    }

    fn hosts(&mut self, zone: &mut DnsZone, directive: &Directive, arguments: &[String]) {
        if arguments.first().is_some_and(|word| word.contains('/'))
            || (directive.block.is_none() && arguments.is_empty())
        {
            self.leave_out(
                directive,
                "a file in CoreDNS's container cannot be read; write its entries in the Corefile",
            );
        } else if !arguments.is_empty() {
            self.leave_out(directive, "zones of hosts are not done: its entries count for the whole server block");
        }
        let mut falls_through = false;
        let mut reverse = true;
        let mut entries: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for line in directive.block.iter().flatten() {
            let Some((first, names)) = line.words.split_first() else { continue };
            match (first.as_str(), first.parse::<IpAddr>()) {
                ("fallthrough", _) => {
                    falls_through = true;
                    if !names.is_empty() {
                        self.leave_out(line, "everything falls through, not only these zones");
                    }
                }
                ("no_reverse", _) => reverse = false,
                ("ttl" | "reload", _) => {}
                (_, Ok(address)) => {
                    for word in names {
                        match name(word).filter(|name| is_in(name, &zone.name)) {
                            Some(name) => entries.entry(name).or_default().push(address),
                            None => self.leave_out(line, &format!("{word} is no name of the server block's zone")),
                        }
                    }
                }
                _ => self.leave_out(line, "not understood"),
            }
        }
        zone.hosts_reverse = reverse;
        zone.hosts_fall_through = falls_through;
        zone.hosts = entries.into_iter().map(|(name, addresses)| DnsHost { name, addresses }).collect();
    }

    fn cache(&mut self, zone: &mut DnsZone, directive: &Directive, arguments: &[String]) {
        let seconds = |word: &String| word.parse::<u32>().ok().map(|seconds| seconds.min(DAY));
        let both = arguments.first().and_then(seconds);
        (zone.success_ttl, zone.denial_ttl) = (both.or(zone.success_ttl), both.or(zone.denial_ttl));
        if arguments.len() > usize::from(both.is_some()) {
            self.leave_out(directive, "zones of cache are not done: it counts for the whole server block");
        }
        for option in directive.block.iter().flatten() {
            let words: Vec<&str> = option.words.iter().map(String::as_str).collect();
            match words.as_slice() {
                ["success", rest @ ..] => {
                    zone.success_ttl = rest.get(1).and_then(|w| w.parse().ok()).or(zone.success_ttl)
                }
                ["denial", rest @ ..] => zone.denial_ttl = rest.get(1).and_then(|w| w.parse().ok()).or(zone.denial_ttl),
                ["disable", "success" | "denial", zones @ ..] => {
                    // The cluster's own names are answered from memory; what is cached is what others said.
                    let of_the_cluster = |zone: &&str| name(zone).is_some_and(|zone| is_in(&zone, self.cluster.domain));
                    if zones.is_empty() || !zones.iter().all(of_the_cluster) {
                        self.leave_out(option, "answers of others are cached, for a second at least");
                    }
                }
                [known, ..] if CACHE_TUNING.contains(known) => {}
                _ => self.leave_out(option, "this option of cache is not done"),
            }
        }
    }

    fn rewrite(&mut self, zone: &mut DnsZone, directive: &Directive, arguments: &[String]) {
        let words: Vec<&str> =
            arguments.iter().map(String::as_str).filter(|w| !matches!(*w, "stop" | "continue")).collect();
        let pair = match words.as_slice() {
            ["name", "exact", from, to] | ["name", from, to] => Some((name(from), name(to))),
            _ => None,
        };
        match pair {
            Some((Some(from), Some(to))) if directive.block.is_none() && is_in(&from, &zone.name) && from != to => {
                zone.aliases.retain(|alias| alias.from != from);
                zone.aliases.push(DnsAlias { from, to });
            }
            _ => self.leave_out(directive, "only `rewrite name exact FROM TO` is done"),
        }
    }

    fn kubernetes(&mut self, directive: &Directive, zones: &[String]) {
        for zone in zones {
            let reverse = |zone: &str| is_in(zone, "in-addr.arpa") || is_in(zone, "ip6.arpa");
            if !name(zone).is_some_and(|zone| zone == self.cluster.domain || reverse(&zone)) {
                self.leave_out(directive, &format!("{zone} is not the cluster's domain {}", self.cluster.domain));
            }
        }
        for option in directive.block.iter().flatten() {
            let words: Vec<&str> = option.words.iter().map(String::as_str).collect();
            match words.as_slice() {
                ["pods", "insecure" | "verified"] | ["ttl", ..] | ["fallthrough", ..] | ["upstream", ..] => {}
                ["pods", ..] => self.leave_out(option, "pods' names are answered, verified"),
                _ => self.leave_out(option, "this option of kubernetes is not done"),
            }
        }
    }

    fn kube_dns(&mut self, data: &BTreeMap<String, String>) {
        self.place = "ConfigMap kube-dns, ".to_owned();
        for (key, text) in data {
            match key.as_str() {
                "stubDomains" => match serde_json::from_str::<BTreeMap<String, Vec<String>>>(text) {
                    Ok(domains) => domains.iter().for_each(|(domain, servers)| self.stub_domain(domain, servers)),
                    Err(error) => self.left_out.push(format!("ConfigMap kube-dns, stubDomains: {error}")),
                },
                "upstreamNameservers" => match serde_json::from_str::<Vec<String>>(text) {
                    Ok(servers) => self.stub_domain(".", &servers),
                    Err(error) => self.left_out.push(format!("ConfigMap kube-dns, upstreamNameservers: {error}")),
                },
                _ => self.left_out.push(format!("ConfigMap kube-dns, {key}: not understood")),
            }
        }
    }

    fn stub_domain(&mut self, domain: &str, servers: &[String]) {
        let words = [domain.to_owned()].into_iter().chain(servers.iter().cloned()).collect();
        let directive = Directive { line: 1, words, block: None };
        let Some(zone) = name(domain) else { return self.leave_out(&directive, "not a name") };
        if servers.is_empty() || self.zones.contains_key(&zone) {
            return;
        }
        let upstream = self.upstream(&directive, servers);
        let over_cluster = self.is_within_the_clusters(&zone);
        let built =
            DnsZone { name: zone.clone(), over_cluster, upstream, hosts_fall_through: true, ..DnsZone::default() };
        self.zones.insert(zone, built);
    }
}

/// The zone of a server block's name: `example.com`, `example.com:53`, `dns://example.com`, `.`.
fn zone_of(word: &str) -> Result<String, &'static str> {
    let word = word.strip_prefix("dns://").unwrap_or(word);
    if word.contains("://") {
        return Err("only plain DNS is served");
    }
    let (zone, port) = match word.rsplit_once(':') {
        Some((zone, port)) => (zone, port),
        None => (word, "53"),
    };
    if port != "53" {
        return Err("only port 53 is served");
    }
    // `:53` is the root, too.
    name(zone).ok_or("not a name")
}

/// An address with or without a port.
fn server(word: &str) -> Option<SocketAddr> {
    let of = |ip: IpAddr| SocketAddr::new(ip, 53);
    let server = word.parse::<SocketAddr>().ok().or_else(|| {
        let bare = word.strip_prefix('[').and_then(|w| w.strip_suffix(']')).unwrap_or(word);
        bare.parse::<IpAddr>().ok().map(of)
    })?;
    let ip = server.ip().to_canonical();
    (!ip.is_unspecified() && !ip.is_multicast() && server.port() != 0).then(|| SocketAddr::new(ip, server.port()))
}
