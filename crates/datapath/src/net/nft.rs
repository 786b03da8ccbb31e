//! Our nftables table `inet towpath`: masquerading of what leaves the cluster, connection tracking off for what stays inside,
//! and refusal of what is for a Service address and nobody translated.
//!
//! The table is replaced as a whole in one transaction, and only when its content changed. Nothing outside it is touched.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use ipnet::IpNet;
use serde_json::{Value, json};
use towpath_model::Family;

use super::error::Error;
use super::host_range;
use super::link::TUNNEL_DEVICE;
use super::tap::UDP_DEVICE;

/// The table's name, in family `inet`.
pub const TABLE: &str = "towpath";

/// Source ports that masquerading picks from: the range of ordinary clients. Those above are left for translation in
/// kernel programs (`TP_SNAT_PORT_MIN` in `bpf/abi.h`), those below hold listeners and NodePorts.
pub const MASQUERADE_PORTS: (u16, u16) = (32768, 60999);

/// The mark that kube-proxy puts on connections which must have a source of the node (`--iptables-masquerade-bit`, 14 by default).
const KUBE_PROXY_MASQUERADE: u32 = 1 << 14;

/// What the table depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// This node's pod ranges: what is masqueraded.
    pub pods: Vec<IpNet>,
    /// All pod ranges.
    pub cluster: Vec<IpNet>,
    /// Service ranges.
    pub services: Vec<IpNet>,
    /// This node's addresses, at most one a family.
    pub own: Vec<IpAddr>,
    /// Addresses of all nodes, this one included.
    pub nodes: Vec<IpAddr>,
    /// Families of which anything is masqueraded.
    pub masqueraded: Vec<Family>,
    /// Destinations that see pod addresses untranslated.
    pub untranslated: Vec<IpNet>,
    /// Node-local DNS addresses.
    pub dns: Vec<IpAddr>,
    /// UDP port of the tunnel.
    pub tunnel_port: u16,
    /// Port of the backend `udp`, while packets are taken so.
    pub udp_port: Option<u16>,
    /// The tunnel device is another network's, and no program of ours judges what it opens: only nodes send envelopes here.
    pub borrowed_tunnel: bool,
    /// Packets between pods are tracked: another network's pods are here, whose rules and translations go by what is tracked.
    pub track_pods: bool,
}

/// The table in the kernel, as far as this process knows.
#[derive(Debug, Default)]
pub struct Table {
    applied: Option<Facts>,
    /// What the kernel listed right after we wrote it.
    listed: Option<Value>,
}

impl Table {
    /// Writes the table if `facts` differ from what was written last; whether it was written.
    pub fn apply(&mut self, facts: &Facts) -> Result<bool, Error> {
        if self.applied.as_ref() == Some(facts) {
            return Ok(false);
        }
        nft(&["-j", "-f", "-"], Some(&ruleset(facts)))?;
        self.applied = Some(facts.clone());
        self.listed = list()?;
        Ok(true)
    }

    /// Writes the table if the kernel's differs from what we wrote (flushed, deleted or edited by somebody); whether it did.
    pub fn repair(&mut self, facts: &Facts) -> Result<bool, Error> {
        if self.listed.is_none() || list()? != self.listed {
            self.applied = None;
        }
        self.apply(facts)
    }
}

/// All tables of the namespace, those of others too, as `nft -j list ruleset` says them.
///
/// # Errors
/// `nft` is not there, or not allowed to.
pub fn whole_ruleset() -> Result<Value, Error> {
    let output = nft(&["-j", "list", "ruleset"], None)?;
    serde_json::from_slice(&output)
        .map_err(|e| Error::Nft { reason: format!("`nft -j list ruleset` printed no JSON: {e}") })
}

/// Whether the table is there.
pub fn is_present() -> Result<bool, Error> {
    Ok(list()?.is_some())
}

/// Deletes the table; fine when there is none.
pub fn delete() -> Result<(), Error> {
    let table = json!({"table": {"family": "inet", "name": TABLE}});
    nft(&["-j", "-f", "-"], Some(&json!({"nftables": [{"add": table}, {"delete": table}]}))).map(drop)
}

/// Everything that the kernel lists, of all tables.
pub(crate) fn list_all() -> Result<Value, Error> {
    let output = nft(&["-j", "list", "ruleset"], None)?;
    serde_json::from_slice(&output)
        .map_err(|e| Error::Nft { reason: format!("`nft -j list ruleset` printed no JSON: {e}") })
}

/// Carries a transaction out.
pub(crate) fn run(transaction: &Value) -> Result<(), Error> {
    nft(&["-j", "-f", "-"], Some(transaction)).map(drop)
}

/// The table as the kernel lists it, without handles; none when it is not there.
fn list() -> Result<Option<Value>, Error> {
    let output = match nft(&["-j", "list", "table", "inet", TABLE], None) {
        Ok(output) => output,
        Err(Error::Nft { reason }) if reason.contains("No such file or directory") => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut value: Value = serde_json::from_slice(&output)
        .map_err(|e| Error::Nft { reason: format!("`nft -j list table` printed no JSON: {e}") })?;
    strip_handles(&mut value);
    Ok(Some(value))
}

fn strip_handles(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.remove("handle");
            map.remove("metainfo");
            map.values_mut().for_each(strip_handles);
        }
        Value::Array(list) => list.iter_mut().for_each(strip_handles),
        _ => {}
    }
}

fn nft(arguments: &[&str], input: Option<&Value>) -> Result<Vec<u8>, Error> {
    let broken = |e: std::io::Error| Error::Nft {
        reason: match e.kind() {
            std::io::ErrorKind::NotFound => {
                "the program `nft` is not installed; on Debian: apt install nftables".to_owned()
            }
            _ => format!("`nft` cannot be run: {e}"),
        },
    };
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(broken)?;
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        // A child that died at once closes the pipe; its exit status and words say why.
        let _closed_early = stdin.write_all(input.to_string().as_bytes());
    }
    let output = child.wait_with_output().map_err(broken)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(Error::Nft { reason: format!("`nft {}` failed ({}): {}", arguments.join(" "), output.status, words.trim()) })
}

/// The whole transaction: the old table goes, the new one comes.
pub fn ruleset(facts: &Facts) -> Value {
    let table = json!({"table": {"family": "inet", "name": TABLE}});
    let mut commands = vec![json!({"add": table}), json!({"delete": table}), json!({"add": table})];
    for (name, (kind, hook, priority)) in chains() {
        commands.push(json!({"add": {"chain": {
            "family": "inet", "table": TABLE, "name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept",
        }}}));
    }
    for chain in ["raw-prerouting", "raw-output"] {
        for port in [facts.tunnel_port].into_iter().chain(facts.udp_port) {
            let port = equal(payload("udp", "dport"), json!(port));
            commands.push(rule(chain, "tunnel packets need no tracking", vec![port, json!({"notrack": null})]));
        }
    }
    for family in [4, 6] {
        commands.extend(family_rules(family, facts));
    }
    json!({ "nftables": commands })
}

fn chains() -> BTreeMap<&'static str, (&'static str, &'static str, i32)> {
    BTreeMap::from([
        ("raw-prerouting", ("filter", "prerouting", -300)),
        ("raw-output", ("filter", "output", -300)),
        ("input", ("filter", "input", 0)),
        ("forward", ("filter", "forward", 0)),
        ("output", ("filter", "output", 0)),
        ("before-masquerading", ("nat", "postrouting", 99)),
        ("postrouting", ("nat", "postrouting", 100)),
    ])
}

fn family_rules(family: u8, facts: &Facts) -> Vec<Value> {
    let ip = if family == 4 { "ip" } else { "ip6" };
    let of = |nets: &[IpNet]| prefixes(family, nets);
    let (source, destination) = (|| payload(ip, "saddr"), || payload(ip, "daddr"));
    let hosts = |addresses: &[IpAddr]| addresses.iter().copied().map(host_range).collect::<Vec<_>>();
    let mut rules = Vec::new();
    if let Some(own) = facts.own.iter().find(|own| own.is_ipv4() == (family == 4)) {
        rules.push(source_for_kube_proxy(ip, *own));
    }
    if let Some(cluster) = of(&facts.cluster).filter(|_| !facts.track_pods) {
        let both = vec![equal(source(), cluster.clone()), equal(destination(), cluster), json!({"notrack": null})];
        rules.push(rule("raw-prerouting", "pod to pod needs no tracking", both));
    }
    if let Some(dns) = of(&hosts(&facts.dns)) {
        let near =
            json!({"match": {"op": "!=", "left": {"meta": {"key": "iifname"}}, "right": {"set": ["lo", "tp*"]}}});
        let expressions = vec![near, equal(destination(), dns), json!({"drop": null})];
        rules.push(rule("input", "DNS is for this node and its pods", expressions));
    }
    if let Some(nodes) = of(&hosts(&facts.nodes)).filter(|_| facts.borrowed_tunnel) {
        // Of whichever of this node's addresses, by whichever device, a pod's too.
        let envelope = equal(payload("udp", "dport"), json!(facts.tunnel_port));
        let expressions = vec![envelope, differ(source(), nodes), json!({"drop": null})];
        rules.push(rule("input", "only nodes send envelopes", expressions));
    }
    if let Some(services) = of(&facts.services) {
        for chain in ["forward", "output"] {
            rules.extend(refusal(chain, &equal(destination(), services.clone())));
        }
    }
    let masqueraded = facts.masqueraded.contains(&if family == 4 { Family::V4 } else { Family::V6 });
    if let Some(pods) = of(&facts.pods).filter(|_| masqueraded) {
        let inside = [&facts.cluster, &facts.services, &facts.untranslated, &facts.pods, &hosts(&facts.nodes)];
        let inside: Vec<IpNet> = inside.into_iter().flatten().copied().collect();
        let leaving = vec![equal(source(), pods), differ(destination(), of(&inside).unwrap_or(Value::Null))];
        rules.extend(masquerade(&leaving));
    }
    rules
}

/// What is for a Service address and still untranslated never leaves the node.
fn refusal(chain: &str, service: &Value) -> [Value; 3] {
    let protocol = |name: &str| equal(json!({"meta": {"key": "l4proto"}}), json!(name));
    let reset = json!({"reject": {"type": "tcp reset"}});
    let unreachable = json!({"reject": {"type": "icmpx", "expr": "port-unreachable"}});
    let why = "no Service has this address and port";
    [
        rule(chain, why, vec![service.clone(), protocol("tcp"), reset]),
        rule(chain, why, vec![service.clone(), protocol("udp"), unreachable]),
        rule(chain, why, vec![service.clone(), json!({"drop": null})]),
    ]
}

/// kube-proxy gives what it translates for others than pods a source of the node, and the kernel takes it from the device that the
/// packet leaves by. Pods' devices and the tunnel have none: it would be the gateway's, which no peer believes. So it is given
/// here, just before, and the mark taken off, as kube-proxy does: the envelope must not be translated too.
fn source_for_kube_proxy(ip: &str, own: IpAddr) -> Value {
    let mark = || json!({"meta": {"key": "mark"}});
    let marked =
        json!({"match": {"op": "==", "left": {"&": [mark(), KUBE_PROXY_MASQUERADE]}, "right": KUBE_PROXY_MASQUERADE}});
    let devices = json!({"set": ["tp*", TUNNEL_DEVICE, UDP_DEVICE]});
    let family = if ip == "ip" { "ipv4" } else { "ipv6" };
    let expressions = vec![
        equal(json!({"meta": {"key": "nfproto"}}), json!(family)),
        equal(json!({"meta": {"key": "oifname"}}), devices),
        marked,
        json!({"mangle": {"key": mark(), "value": {"&": [mark(), !KUBE_PROXY_MASQUERADE]}}}),
        json!({"snat": {"family": ip, "addr": own.to_string(), "flags": "fully-random"}}),
    ];
    rule("before-masquerading", "what kube-proxy masquerades on its way to a pod", expressions)
}

fn masquerade(leaving: &[Value]) -> [Value; 2] {
    let ports = json!({"set": ["tcp", "udp", "sctp"]});
    let with_ports = equal(json!({"meta": {"key": "l4proto"}}), ports);
    let range = json!({"range": [MASQUERADE_PORTS.0, MASQUERADE_PORTS.1]});
    let why = "pods leave the cluster with the node's address";
    let build = |tail: Vec<Value>| rule("postrouting", why, leaving.iter().cloned().chain(tail).collect());
    [
        build(vec![with_ports, json!({"masquerade": {"port": range, "flags": "fully-random"}})]),
        build(vec![json!({"masquerade": {"flags": "fully-random"}})]),
    ]
}

fn rule(chain: &str, comment: &str, expressions: Vec<Value>) -> Value {
    json!({"add": {"rule": {"family": "inet", "table": TABLE, "chain": chain, "comment": comment, "expr": expressions}}})
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn equal(left: Value, right: Value) -> Value {
    json!({"match": {"op": "==", "left": left, "right": right}})
}

fn differ(left: Value, right: Value) -> Value {
    json!({"match": {"op": "!=", "left": left, "right": right}})
}

/// The family's members of `nets` as an anonymous set, without overlaps; none when there are none.
fn prefixes(family: u8, nets: &[IpNet]) -> Option<Value> {
    let own: Vec<IpNet> = nets.iter().filter(|n| n.addr().is_ipv4() == (family == 4)).copied().collect();
    let elements: Vec<Value> = IpNet::aggregate(&own)
        .iter()
        .map(|n| match n.prefix_len() {
            full if full == n.max_prefix_len() => json!(n.addr().to_string()),
            length => json!({"prefix": {"addr": n.network().to_string(), "len": length}}),
        })
        .collect();
    if elements.is_empty() { None } else { Some(json!({ "set": elements })) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{TP_SNAT_PORT_MAX, TP_SNAT_PORT_MIN};

    #[test]
    fn who_masquerades_and_who_translates_share_no_source_port() {
        let (first, last) = MASQUERADE_PORTS;
        assert!(first < last && u32::from(last) < TP_SNAT_PORT_MIN && TP_SNAT_PORT_MIN < TP_SNAT_PORT_MAX);
        assert_eq!(TP_SNAT_PORT_MAX, u32::from(u16::MAX));
    }

    fn facts() -> Facts {
        Facts {
            pods: vec!["10.244.1.0/24".parse().unwrap()],
            cluster: vec!["10.244.0.0/16".parse().unwrap()],
            services: vec!["10.96.0.0/12".parse().unwrap()],
            own: vec!["192.0.2.1".parse().unwrap()],
            nodes: vec!["192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap()],
            masqueraded: vec![Family::V4, Family::V6],
            untranslated: Vec::new(),
            dns: vec!["169.254.116.10".parse().unwrap()],
            tunnel_port: 8472,
            udp_port: None,
            borrowed_tunnel: false,
            track_pods: false,
        }
    }

    #[test]
    fn the_transaction_replaces_the_table_and_mentions_no_family_that_is_not_used() {
        let text = ruleset(&facts()).to_string();
        assert!(text.contains("\"delete\""));
        assert!(!text.contains("ip6"), "{text}");
        assert!(!text.contains("10.244.1.0\",\"len\":24}},{"), "own pods are part of the cluster: aggregated");
        assert!(text.contains("fully-random"));
    }

    #[test]
    fn a_borrowed_tunnel_device_is_for_nodes_only() {
        let why = "only nodes send envelopes";
        assert!(!ruleset(&facts()).to_string().contains(why));
        assert!(ruleset(&Facts { borrowed_tunnel: true, ..facts() }).to_string().contains(why));
    }

    #[test]
    fn pods_of_another_network_are_tracked() {
        let why = "pod to pod needs no tracking";
        assert!(ruleset(&facts()).to_string().contains(why));
        assert!(!ruleset(&Facts { track_pods: true, ..facts() }).to_string().contains(why));
    }
}
