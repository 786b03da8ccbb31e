//! What Flannel or Canal has left in the kernel of a node, and taking it away: by the command of an operator, never by the agent itself.
//!
//! Only what is theirs by name is touched: devices `flannel.*`, `flannel-v6.*`, `cni0` and veths `cali*`, nftables tables `flannel-ipv4` and `flannel-ipv6`, chains
//! `FLANNEL-*` and `cali-*` (of iptables too, where that is nftables beneath) and the rules that jump to them, and routes to ranges of the
//! cluster that nobody but a program beside the kernel and us has made.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteType};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage as Message};
use serde_json::{Value, json};

use crate::error::Error;
use crate::net::link::{self, Link};
use crate::net::netlink::{Netlink, Request};
use crate::net::{MAIN_TABLE, PROTOCOL, nft, route};
use crate::node::lent::{BRIDGE, FLANNEL_VXLAN, FLANNEL_VXLAN_V6};

/// Nftables tables of Flannel's nftables mode, with their families (flannel `pkg/trafficmngr/nftables`).
const TABLES: [(&str, &str); 2] = [("ip", "flannel-ipv4"), ("ip6", "flannel-ipv6")];
/// What the names of their chains begin with.
const CHAINS: [&str; 2] = ["FLANNEL-", "cali-"];
/// What the names of Calico's devices begin with, one a pod (felix `InterfacePrefix`).
const CALICO_DEVICE: &str = "cali";

/// Calico's end of a pod's veth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CalicoDevice {
    /// Its name.
    pub name: String,
    /// Addresses that host routes lead to by it; none where Calico has taken them away already.
    pub addresses: Vec<IpAddr>,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Flannel's VXLAN devices.
    pub tunnels: Vec<String>,
    /// The bridge, with the number of devices on it.
    pub bridge: Option<(String, usize)>,
    /// Canal's devices, one a pod.
    pub calico_devices: Vec<CalicoDevice>,
    /// Routes to ranges of the cluster over other nodes (`host-gw`).
    pub routes: Vec<IpNet>,
    /// Nftables tables, as `family name`.
    pub tables: Vec<String>,
    /// Chains, as `family table name`.
    pub chains: Vec<String>,
    /// Rules elsewhere that lead to those.
    pub jumps: usize,
}

impl Leftovers {
    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Looks at the calling thread's network namespace; changes nothing. `cluster` are the ranges of all pods.
///
/// # Errors
/// The kernel does not answer, or `nft` cannot be run.
pub fn survey(cluster: &[IpNet]) -> Result<Leftovers, Error> {
    let mut netlink = Netlink::open()?;
    let links = link::list(&mut netlink)?;
    let rules = Rules::read()?;
    let bridge = match links.iter().find(|l| l.name == BRIDGE) {
        Some(bridge) => Some((bridge.name.clone(), ports(&mut netlink, bridge)?)),
        None => None,
    };
    Ok(Leftovers {
        tunnels: tunnels(&links).into_iter().map(|l| l.name.clone()).collect(),
        bridge,
        calico_devices: calico_devices(&mut netlink, &links)?,
        routes: routes(&mut netlink, cluster)?.into_iter().map(|(range, _)| range).collect(),
        tables: rules.tables.iter().map(|(family, name)| format!("{family} {name}")).collect(),
        chains: rules.chains.iter().map(|[family, table, name]| format!("{family} {table} {name}")).collect(),
        jumps: rules.jumps.len(),
    })
}

/// Whether a VXLAN device of Flannel's is in the calling thread's network namespace.
///
/// # Errors
/// The kernel does not answer.
pub fn has_tunnel() -> Result<bool, Error> {
    Ok(!tunnels(&link::list(&mut Netlink::open()?)?).is_empty())
}

/// Takes rules, chains and tables away, the bridge, these devices of Calico's, and routes over other nodes, in whose place ours come
/// without a gap. Not the tunnel devices: the agent does that, whose own takes their place.
///
/// # Errors
/// What could not be removed; the rest is.
pub fn clean(cluster: &[IpNet], calico: &[CalicoDevice]) -> Result<(), Error> {
    let mut netlink = Netlink::open()?;
    let mut errors: Vec<Error> = Vec::new();
    errors.extend(Rules::read().and_then(|rules| rules.delete()).err());
    match routes(&mut netlink, cluster) {
        Ok(routes) => {
            for (range, mut message) in routes {
                message.header.protocol = RouteProtocol::Other(PROTOCOL);
                let flags = rtnetlink::packet_core::NLM_F_CREATE | rtnetlink::packet_core::NLM_F_REPLACE;
                let ours = Request::new(format!("take route {range} over"), Message::NewRoute(message), flags);
                errors.extend(netlink.request(ours).err().map(Error::from));
            }
        }
        Err(error) => errors.push(error),
    }
    for device in calico {
        let deleted = match link::by_name(&mut netlink, &device.name) {
            Ok(Some(there)) => link::delete(&mut netlink, there.index, &there.name),
            other => other.map(drop),
        };
        errors.extend(deleted.err().map(Error::from));
    }
    match link::by_name(&mut netlink, BRIDGE) {
        Ok(Some(bridge)) => errors.extend(link::delete(&mut netlink, bridge.index, BRIDGE).err().map(Error::from)),
        Ok(None) => {}
        Err(error) => errors.push(error.into()),
    }
    Error::collect(errors)
}

/// Flannel's VXLAN devices among these.
pub(crate) fn tunnels(links: &[Link]) -> Vec<&Link> {
    let theirs = |l: &&Link| {
        matches!(l.vxlan, Some((false, _)))
            && (l.name.starts_with(FLANNEL_VXLAN) || l.name.starts_with(FLANNEL_VXLAN_V6))
    };
    links.iter().filter(theirs).collect()
}

/// Calico's devices, with the addresses behind them. Only veths: somebody may call a card so.
fn calico_devices(netlink: &mut Netlink, links: &[Link]) -> Result<Vec<CalicoDevice>, Error> {
    let theirs = |l: &&Link| l.name.starts_with(CALICO_DEVICE) && l.kind == Some(InfoKind::Veth);
    let mut found: BTreeMap<u32, CalicoDevice> = links
        .iter()
        .filter(theirs)
        .map(|l| (l.index, CalicoDevice { name: l.name.clone(), addresses: Vec::new() }))
        .collect();
    if found.is_empty() {
        return Ok(Vec::new());
    }
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        for answer in netlink.dump("list routes", Message::GetRoute(filter))? {
            let Message::NewRoute(message) = answer else { continue };
            let to_a_host = route::destination_of(&message).filter(|to| to.prefix_len() == to.max_prefix_len());
            let in_main = u32::from(message.header.table) == MAIN_TABLE && message.header.kind == RouteType::Unicast;
            if let Some(address) = to_a_host.filter(|_| in_main)
                && let Some(device) = device_of(&message).and_then(|index| found.get_mut(&index))
            {
                device.addresses.push(address.addr());
            }
        }
    }
    Ok(found.into_values().collect())
}

/// Index of the device that a route leads out of.
fn device_of(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|a| if let RouteAttribute::Oif(index) = a { Some(*index) } else { None })
}

/// Devices whose master is the bridge.
fn ports(netlink: &mut Netlink, bridge: &Link) -> Result<usize, Error> {
    let answers = netlink.dump("list network devices", Message::GetLink(Default::default()))?;
    let on_it = |m: &Message| matches!(m, Message::NewLink(link) if link.attributes.contains(&LinkAttribute::Controller(bridge.index)));
    Ok(answers.iter().filter(|m| on_it(m)).count())
}

/// Routes over another node to a range within the cluster's, which a program like flanneld has made: of protocol `boot`, as who does not
/// say one. Those through a device of Flannel's go with it.
fn routes(netlink: &mut Netlink, cluster: &[IpNet]) -> Result<Vec<(IpNet, RouteMessage)>, Error> {
    let links = link::list(netlink)?;
    let tunnels: BTreeSet<u32> = tunnels(&links).iter().map(|l| l.index).collect();
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        for answer in netlink.dump("list routes", Message::GetRoute(filter))? {
            let Message::NewRoute(message) = answer else { continue };
            let device = device_of(&message);
            let over_a_node = message.attributes.iter().any(|a| matches!(a, RouteAttribute::Gateway(_)));
            let in_main = u32::from(message.header.table) == MAIN_TABLE && message.header.kind == RouteType::Unicast;
            let theirs = message.header.protocol == RouteProtocol::Boot && over_a_node && in_main;
            if !theirs || device.is_none_or(|device| tunnels.contains(&device)) {
                continue;
            }
            if let Some(range) = route::destination_of(&message)
                && cluster.iter().any(|all| all.contains(&range))
            {
                found.push((range, message));
            }
        }
    }
    Ok(found)
}

/// Their nftables objects.
#[derive(Debug, Default, PartialEq, Eq)]
struct Rules {
    tables: Vec<(String, String)>,
    /// Family, table, name.
    chains: Vec<[String; 3]>,
    /// Rules elsewhere that lead to them: family, table, chain, handle.
    jumps: Vec<([String; 3], u64)>,
}

impl Rules {
    fn read() -> Result<Self, Error> {
        Ok(Self::of(&nft::list_all()?))
    }

    fn of(ruleset: &Value) -> Self {
        let mut rules = Self::default();
        let theirs = |name: &str| CHAINS.iter().any(|prefix| name.starts_with(prefix));
        for object in ruleset.get("nftables").and_then(Value::as_array).into_iter().flatten() {
            let text =
                |value: &Value, field: &str| value.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
            if let Some(table) = object.get("table") {
                let (family, name) = (text(table, "family"), text(table, "name"));
                if TABLES.contains(&(family.as_str(), name.as_str())) {
                    rules.tables.push((family, name));
                }
            } else if let Some(chain) = object.get("chain").filter(|chain| theirs(&text(chain, "name"))) {
                rules.chains.push([text(chain, "family"), text(chain, "table"), text(chain, "name")]);
            } else if let Some(rule) = object.get("rule").filter(|rule| !theirs(&text(rule, "chain"))) {
                let target = |verdict: &str, part: &Value| {
                    part.pointer(&format!("/{verdict}/target")).and_then(Value::as_str).is_some_and(theirs)
                };
                let parts = rule.get("expr").and_then(Value::as_array);
                let leads = parts.into_iter().flatten().any(|part| target("jump", part) || target("goto", part));
                if let Some(handle) = rule.get("handle").and_then(Value::as_u64).filter(|_| leads) {
                    rules.jumps.push(([text(rule, "family"), text(rule, "table"), text(rule, "chain")], handle));
                }
            }
        }
        rules
    }

    /// One transaction: rules that lead to chains, then what is in the chains (which may lead to each other), then the chains.
    fn transaction(&self) -> Vec<Value> {
        let mut commands = Vec::new();
        for ([family, table, chain], handle) in &self.jumps {
            commands.push(
                json!({"delete": {"rule": {"family": family, "table": table, "chain": chain, "handle": handle}}}),
            );
        }
        for verb in ["flush", "delete"] {
            for [family, table, name] in &self.chains {
                commands.push(json!({verb: {"chain": {"family": family, "table": table, "name": name}}}));
            }
        }
        for (family, name) in &self.tables {
            commands.push(json!({"delete": {"table": {"family": family, "name": name}}}));
        }
        commands
    }

    fn delete(&self) -> Result<(), Error> {
        if *self == Self::default() {
            return Ok(());
        }
        Ok(nft::run(self.transaction())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_their_tables_chains_and_what_leads_there_are_found() {
        let rule = |chain: &str, handle: u64, target: &str| json!({"rule": {"family": "ip", "table": "nat", "chain": chain, "handle": handle, "expr": [{"counter": null}, {"jump": {"target": target}}]}});
        let chain = |name: &str| json!({"chain": {"family": "ip", "table": "nat", "name": name, "handle": 1}});
        let ruleset = json!({"nftables": [
            {"table": {"family": "ip", "name": "flannel-ipv4"}}, {"table": {"family": "ip", "name": "nat"}},
            chain("POSTROUTING"), chain("FLANNEL-POSTRTG"), chain("KUBE-SERVICES"), chain("cali-nat-outgoing"),
            rule("POSTROUTING", 3, "FLANNEL-POSTRTG"), rule("POSTROUTING", 4, "KUBE-POSTROUTING"),
            rule("POSTROUTING", 5, "cali-POSTROUTING"), rule("cali-nat-outgoing", 6, "cali-fip-snat"),
        ]});
        let rules = Rules::of(&ruleset);
        assert_eq!(rules.tables, [("ip".to_owned(), "flannel-ipv4".to_owned())]);
        let names: Vec<&str> = rules.chains.iter().map(|[_, _, name]| name.as_str()).collect();
        assert_eq!(names, ["FLANNEL-POSTRTG", "cali-nat-outgoing"]);
        assert_eq!(rules.jumps.iter().map(|(_, handle)| *handle).collect::<Vec<_>>(), [3, 5]);
        let verbs: Vec<String> = rules
            .transaction()
            .iter()
            .flat_map(|command| {
                command
                    .as_object()
                    .unwrap()
                    .iter()
                    .map(|(verb, what)| format!("{verb} {}", what.as_object().unwrap().keys().next().unwrap()))
            })
            .collect();
        assert_eq!(verbs[..2], ["delete rule", "delete rule"]);
        assert_eq!(verbs[2..], ["flush chain", "flush chain", "delete chain", "delete chain", "delete table"]);
    }
}
