//! Rules of others that drop what is ours: a sample packet is carried through the filter chains of an nftables ruleset (those of
//! `iptables-nft` are in it), as the kernel would.
//!
//! Pure but for [`super::nft::whole_ruleset`], which fetches the ruleset. It answers only where it is sure: a rule with a
//! condition that is not understood here may let the packet through, and then nothing is said.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::nft::TABLE;

/// Chains that call chains, at most so deep (the kernel's own limit is 16).
const DEEPEST: u8 = 16;

/// A new flow's first packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// `forward` or `input`.
    pub hook: &'static str,
    /// Device that it comes from.
    pub from_device: String,
    /// Device that it leaves by; none for the node itself.
    pub to_device: Option<String>,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// Destination port.
    pub port: u16,
}

/// What becomes of a packet in a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    Dropped(String),
    Accepted,
    /// It comes to the chain's end.
    Returned,
    /// That cannot be said here.
    Unknown,
}

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    Yes,
    No,
    Unknown,
}

impl Holds {
    fn of(holds: bool) -> Self {
        if holds { Self::Yes } else { Self::No }
    }
}

/// Who drops the packet, in words that name table, chain and handle; none: nobody, as far as can be said for sure.
pub fn dropped_by(ruleset: &Value, sample: &Sample) -> Option<String> {
    let objects = ruleset.get("nftables")?.as_array()?;
    let walk = Walk { objects, sample };
    let base = objects.iter().filter_map(|object| object.get("chain")).filter(|chain| walk.is_base(chain));
    base.into_iter().find_map(|chain| {
        let (family, table, name) = (text(chain, "family"), text(chain, "table"), text(chain, "name"));
        match walk.chain(family, table, name, 0) {
            Fate::Dropped(who) => Some(who),
            Fate::Returned if text(chain, "policy") == "drop" => {
                Some(format!("the policy of nftables chain {family} {table} {name}"))
            }
            _ => None,
        }
    })
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

struct Walk<'a> {
    objects: &'a [Value],
    sample: &'a Sample,
}

impl Walk<'_> {
    fn is_base(&self, chain: &Value) -> bool {
        let own = if self.sample.source.is_ipv4() { "ip" } else { "ip6" };
        let ours = text(chain, "family") == "inet" && text(chain, "table") == TABLE;
        text(chain, "type") == "filter"
            && text(chain, "hook") == self.sample.hook
            && ["inet", own].contains(&text(chain, "family"))
            && !ours
    }

    fn chain(&self, family: &str, table: &str, name: &str, depth: u8) -> Fate {
        if depth > DEEPEST {
            return Fate::Unknown;
        }
        let of_chain = |rule: &&Value| {
            text(rule, "family") == family && text(rule, "table") == table && text(rule, "chain") == name
        };
        for rule in self.objects.iter().filter_map(|object| object.get("rule")).filter(of_chain) {
            match self.rule(rule, depth) {
                Fate::Returned => {}
                // `return` and `goto` end this chain and no other.
                Fate::Accepted if is_return(rule) => return Fate::Returned,
                fate => return fate,
            }
        }
        Fate::Returned
    }

    /// `Returned`: on to the next rule. A `return` that holds is `Accepted` here, and told apart by the caller.
    fn rule(&self, rule: &Value, depth: u8) -> Fate {
        let mut sure = true;
        for expression in rule.get("expr").and_then(Value::as_array).into_iter().flatten() {
            let Some((kind, content)) = expression.as_object().and_then(|fields| fields.iter().next()) else {
                continue;
            };
            match kind.as_str() {
                "match" => match self.holds(content) {
                    Holds::Yes => {}
                    Holds::No => return Fate::Returned,
                    Holds::Unknown => sure = false,
                },
                "drop" | "reject" => return self.dropped(rule, sure),
                "accept" | "return" => return if sure { Fate::Accepted } else { Fate::Unknown },
                "jump" | "goto" => {
                    let fate =
                        self.chain(text(rule, "family"), text(rule, "table"), text(content, "target"), depth + 1);
                    return match (fate, sure) {
                        // Whoever is not sure to come there cannot be sure to be dropped there.
                        (Fate::Dropped(_), false) => Fate::Returned,
                        (Fate::Returned, _) if kind == "jump" => Fate::Returned,
                        (Fate::Returned, _) => Fate::Unknown,
                        (fate, true) => fate,
                        (_, false) => Fate::Unknown,
                    };
                }
                // Matches and targets of iptables that nft cannot show.
                "xt" => match (text(content, "type"), text(content, "name")) {
                    ("match", "comment") => {}
                    ("target", "REJECT") => return self.dropped(rule, sure),
                    ("target", "LOG" | "NFLOG" | "MARK" | "TCPMSS") => {}
                    _ => sure = false,
                },
                "counter" | "log" | "comment" | "mangle" | "notrack" | "ct helper" => {}
                // Verdict maps, queues, limits, flow tables: they may let it through.
                "vmap" | "queue" | "tproxy" | "synproxy" => return Fate::Unknown,
                _ => sure = false,
            }
        }
        Fate::Returned
    }

    fn dropped(&self, rule: &Value, sure: bool) -> Fate {
        if !sure {
            return Fate::Returned;
        }
        let handle = rule.get("handle").and_then(Value::as_u64).unwrap_or_default();
        let (family, table, chain) = (text(rule, "family"), text(rule, "table"), text(rule, "chain"));
        Fate::Dropped(format!("rule {handle} (handle) of nftables chain {family} {table} {chain}"))
    }

    fn holds(&self, content: &Value) -> Holds {
        let (Some(left), Some(right)) = (content.get("left"), content.get("right")) else { return Holds::Unknown };
        let is = self.is(left, right);
        match (text(content, "op"), is) {
            ("==" | "in", is) => is,
            ("!=", Holds::Yes) => Holds::No,
            ("!=", Holds::No) => Holds::Yes,
            _ => Holds::Unknown,
        }
    }

    /// Whether a field of the sample has a value, or one of several.
    fn is(&self, left: &Value, right: &Value) -> Holds {
        if let Some(list) = right.as_array().or_else(|| right.get("set").and_then(Value::as_array)) {
            let each: Vec<Holds> = list.iter().map(|one| self.is(left, one)).collect();
            return match (each.contains(&Holds::Yes), each.contains(&Holds::Unknown)) {
                (true, _) => Holds::Yes,
                (false, true) => Holds::Unknown,
                (false, false) => Holds::No,
            };
        }
        // Named sets are not looked into.
        if right.as_str().is_some_and(|name| name.starts_with('@')) {
            return Holds::Unknown;
        }
        if let Some(key) = left.get("meta").map(|meta| text(meta, "key")) {
            return self.meta(key, right);
        }
        if left.pointer("/ct/key").and_then(Value::as_str) == Some("state") {
            return right.as_str().map_or(Holds::Unknown, |state| Holds::of(state == "new"));
        }
        let Some(payload) = left.get("payload") else { return Holds::Unknown };
        let four = self.sample.source.is_ipv4();
        match (text(payload, "protocol"), text(payload, "field")) {
            ("ip", _) if !four => Holds::No,
            ("ip6", _) if four => Holds::No,
            ("ip" | "ip6", "saddr") => address(self.sample.source, right),
            ("ip" | "ip6", "daddr") => address(self.sample.destination, right),
            ("ip", "protocol") | ("ip6", "nexthdr") => self.meta("l4proto", right),
            (protocol @ ("tcp" | "udp" | "sctp" | "icmp" | "icmpv6"), _) if protocol != self.sample.protocol => {
                Holds::No
            }
            ("tcp" | "udp" | "th", "dport") => number(u64::from(self.sample.port), right),
            _ => Holds::Unknown,
        }
    }

    fn meta(&self, key: &str, right: &Value) -> Holds {
        let name = |device: Option<&str>| match (device, right.as_str()) {
            (_, None) => Holds::Unknown,
            (None, Some(_)) => Holds::No,
            (Some(device), Some(wanted)) => Holds::of(match wanted.strip_suffix('*') {
                Some(beginning) => device.starts_with(beginning),
                None => device == wanted,
            }),
        };
        match key {
            "iifname" | "iif" => name(Some(&self.sample.from_device)),
            "oifname" | "oif" => name(self.sample.to_device.as_deref()),
            "l4proto" => match right.as_str() {
                Some(protocol) => Holds::of(protocol == self.sample.protocol),
                None => number(if self.sample.protocol == "tcp" { 6 } else { 17 }, right),
            },
            "nfproto" => right
                .as_str()
                .map_or(Holds::Unknown, |family| Holds::of((family == "ipv4") == self.sample.source.is_ipv4())),
            _ => Holds::Unknown,
        }
    }
}

fn is_return(rule: &Value) -> bool {
    let mut expressions = rule.get("expr").and_then(Value::as_array).into_iter().flatten();
    expressions.any(|expression| expression.get("return").is_some())
}

fn address(own: IpAddr, right: &Value) -> Holds {
    let parsed = |value: &Value| value.as_str().and_then(|text| text.parse::<IpAddr>().ok());
    if let Some(prefix) = right.get("prefix") {
        let length = prefix.get("len").and_then(Value::as_u64).and_then(|length| u8::try_from(length).ok());
        let net = prefix.get("addr").and_then(parsed).zip(length).and_then(|(addr, len)| IpNet::new(addr, len).ok());
        return net.map_or(Holds::Unknown, |net| Holds::of(net.contains(&own)));
    }
    if let Some([first, last]) = right.get("range").and_then(Value::as_array).map(Vec::as_slice) {
        return match (parsed(first), parsed(last)) {
            (Some(first), Some(last)) => Holds::of(first <= own && own <= last),
            _ => Holds::Unknown,
        };
    }
    parsed(right).map_or(Holds::Unknown, |other| Holds::of(other == own))
}

fn number(own: u64, right: &Value) -> Holds {
    if let Some([first, last]) = right.get("range").and_then(Value::as_array).map(Vec::as_slice) {
        return match (first.as_u64(), last.as_u64()) {
            (Some(first), Some(last)) => Holds::of((first..=last).contains(&own)),
            _ => Holds::Unknown,
        };
    }
    right.as_u64().map_or(Holds::Unknown, |other| Holds::of(other == own))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::testing::root;

    fn sample() -> Sample {
        Sample {
            hook: "forward",
            from_device: "tp0123".to_owned(),
            to_device: Some("eth0".to_owned()),
            source: "10.244.1.5".parse().unwrap(),
            destination: "192.0.2.1".parse().unwrap(),
            protocol: "tcp",
            port: 6443,
        }
    }

    /// The ruleset as nft lists it after taking `rules`, in a network namespace of its own; none where that cannot be.
    fn listed(rules: &str) -> Option<Value> {
        if !root() {
            return None;
        }
        let script = "nft -f - && nft -j list ruleset";
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{rules}");
        Some(serde_json::from_slice(&output.stdout).unwrap())
    }

    fn fate(body: &str, sample: &Sample) -> Option<String> {
        let base = "type filter hook forward priority 0";
        let rules =
            format!("table inet fw {{\nchain other {{\ntcp dport 6443 drop\n}}\nchain f {{\n{base}; {body}\n}}\n}}\n");
        listed(&rules).and_then(|ruleset| dropped_by(&ruleset, sample))
    }

    #[test]
    fn what_drops_for_sure_is_named_by_table_chain_and_handle() {
        if listed("").is_none() {
            return;
        }
        let named = fate(
            "ct state established,related accept; ip saddr 10.0.0.0/8 ip daddr != 10.0.0.0/8 counter drop;",
            &sample(),
        );
        let named = named.unwrap();
        assert!(named.starts_with("rule ") && named.ends_with("of nftables chain inet fw f"), "{named}");
        for dropping in [
            "policy drop;",
            "policy drop; iifname \"eth0\" accept; tcp dport { 80, 443 } accept; udp dport 53 accept;",
            "jump other;",
            "meta l4proto tcp reject;",
            "iifname \"tp*\" oifname eth0 drop;",
            "tcp dport 6000-7000 drop;",
            "ip saddr { 10.244.1.0/24, 10.9.0.0/16 } drop;",
            "udp dport 53 return; ct state new drop;",
        ] {
            assert!(fate(dropping, &sample()).is_some(), "{dropping}");
        }
    }

    #[test]
    fn what_passes_or_may_pass_is_not_complained_about() {
        if listed("").is_none() {
            return;
        }
        for passing in [
            "policy accept;",
            "policy drop; ip saddr 10.244.0.0/16 accept;",
            "policy drop; ct state new accept;",
            "policy drop; meta mark 0x4000 accept;",
            "ip saddr 10.99.0.0/16 drop;",
            "udp dport 6443 drop;",
            "ip6 saddr fd00::/8 drop;",
            "ct state invalid drop;",
            "meta mark 7 drop;",
            "policy drop; ct state vmap { established : accept, new : accept };",
            "ip daddr 192.0.2.1 accept; drop;",
        ] {
            assert_eq!(fate(passing, &sample()), None, "{passing}");
        }
        let other_hook = Sample { hook: "input", to_device: None, ..sample() };
        assert_eq!(fate("policy drop;", &other_hook), None);
    }

    #[test]
    fn our_own_table_and_nonsense_say_nothing() {
        let rules = serde_json::json!({"nftables": [
            {"chain": {"family": "inet", "table": TABLE, "name": "f", "type": "filter", "hook": "forward", "policy": "drop"}},
            {"chain": 7}, {"rule": {"expr": [null, {"match": {}}]}},
        ]});
        assert_eq!(dropped_by(&rules, &sample()), None);
        assert_eq!(dropped_by(&Value::Null, &sample()), None);
        let around = serde_json::json!({"nftables": [
            {"chain": {"family": "ip", "table": "t", "name": "f", "type": "filter", "hook": "forward", "policy": "accept"}},
            {"rule": {"family": "ip", "table": "t", "chain": "f", "expr": [{"jump": {"target": "f"}}]}},
        ]});
        assert_eq!(dropped_by(&around, &sample()), None, "a chain that calls itself ends");
    }
}
