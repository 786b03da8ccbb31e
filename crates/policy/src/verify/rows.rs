//! Cells of a table of who reaches whom, merged to the fewest rows that say the same, with names that people use.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::{Serialize, Serializer};
use towpath_model::Family;

use super::addresses::Addresses;
use super::engine::{Ledger, PortsId};
use super::ports::Ports;
use super::universe::{Universe, Who};

/// One end of a cell.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Party {
    /// An endpoint, by index.
    Endpoint(usize),
    /// Addresses outside.
    Outside(Addresses),
}

/// What is so between two parties.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    pub(super) from: Party,
    pub(super) to: Party,
    /// Set where the families differ.
    pub(super) family: Option<Family>,
    pub(super) ports: PortsId,
}

/// One end of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parties {
    /// Each by name.
    pub names: Vec<String>,
    /// As short as it can be said: `shop/*`, `every workload`.
    pub short: Vec<String>,
}

impl Serialize for Parties {
    /// The names, all of them.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.names.serialize(serializer)
    }
}

/// A row: everyone of `from` reaches everyone of `to` on these ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Who connects.
    pub from: Parties,
    /// To whom.
    pub to: Parties,
    /// Set where it is so in one address family only.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "family_name")]
    pub family: Option<Family>,
    /// On which ports.
    pub ports: Ports,
}

#[expect(clippy::ref_option, reason = "serde's signature")]
fn family_name<S: Serializer>(family: &Option<Family>, serializer: S) -> Result<S::Ok, S::Error> {
    match family {
        Some(Family::V4) => serializer.serialize_str("IPv4"),
        Some(Family::V6) => serializer.serialize_str("IPv6"),
        None => serializer.serialize_none(),
    }
}

/// The names of a universe's endpoints: `shop/web`; with the kind where two workloads have that name; with a pod where policy tells the
/// pods of a workload apart.
pub(super) struct Names {
    names: Vec<String>,
    namespaces: Vec<Option<String>>,
    all_workloads: BTreeSet<usize>,
    by_namespace: BTreeMap<String, BTreeSet<usize>>,
    nodes: BTreeSet<usize>,
    outside: Addresses,
    pods: Addresses,
}

impl Names {
    pub(super) fn of(universe: &Universe) -> Self {
        let mut kinds: HashMap<(&str, &str), BTreeSet<&str>> = HashMap::new();
        let mut variants: HashMap<&super::universe::Workload, usize> = HashMap::new();
        for endpoint in &universe.endpoints {
            if let Who::Workload(workload, _) = &endpoint.who {
                kinds.entry((&workload.namespace, &workload.name)).or_default().insert(&workload.kind);
                *variants.entry(workload).or_default() += 1;
            }
        }
        let names = universe.endpoints.iter().map(|endpoint| match &endpoint.who {
            Who::Node(name, None) => format!("node/{name}"),
            Who::Node(name, Some(address)) => format!("node/{name} [{address}]"),
            Who::Workload(workload, _) => {
                let several = kinds.get(&(workload.namespace.as_str(), workload.name.as_str()));
                let mut name = match several {
                    Some(kinds) if kinds.len() > 1 => workload.to_string(),
                    _ => format!("{}/{}", workload.namespace, workload.name),
                };
                if variants.get(workload).is_some_and(|count| *count > 1) {
                    let first = endpoint.pods.first().map(|pod| pod.name.as_str()).unwrap_or_default();
                    let more = endpoint.pods.len().saturating_sub(1);
                    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
                    name = format!("{name} [pod {first}{more}]");
                }
                name
            }
        });
        let names = names.collect();
        let mut all = Self {
            names,
            namespaces: universe.endpoints.iter().map(|e| e.namespace().map(str::to_owned)).collect(),
            all_workloads: BTreeSet::new(),
            by_namespace: BTreeMap::new(),
            nodes: BTreeSet::new(),
            outside: universe.outside.clone(),
            pods: Addresses::of_all(&universe.pod_ranges),
        };
        for (index, endpoint) in universe.endpoints.iter().enumerate() {
            match endpoint.namespace() {
                Some(namespace) => {
                    all.all_workloads.insert(index);
                    all.by_namespace.entry(namespace.to_owned()).or_default().insert(index);
                }
                None => {
                    all.nodes.insert(index);
                }
            }
        }
        all
    }

    /// An endpoint's name.
    pub(super) fn endpoint(&self, index: usize) -> &str {
        self.names.get(index).map(String::as_str).unwrap_or_default()
    }

    /// Addresses outside, as short as they can be said.
    pub(super) fn outside(&self, addresses: &Addresses) -> String {
        if *addresses == self.outside {
            return "outside".to_owned();
        }
        for (family, name) in [(Family::V4, "outside (IPv4)"), (Family::V6, "outside (IPv6)")] {
            if *addresses == self.outside.and(&Addresses::of_family(family)) {
                return name.to_owned();
            }
        }
        let shorter = |set: &Addresses| {
            // That pods' addresses are not outside goes without saying.
            let (plain, filled) = (set.prefixes(), set.or(&self.pods).prefixes());
            if filled.len() < plain.len() { filled } else { plain }
        };
        let in_it = shorter(addresses);
        // What is short enough needs no other way to say it.
        let not_in_it = if in_it.len() > 2 { shorter(&self.outside.without(addresses)) } else { in_it.clone() };
        let list = |word: &str, prefixes: &[ipnet::IpNet]| {
            let text = |net: &ipnet::IpNet| match net.prefix_len() == net.max_prefix_len() {
                true => net.addr().to_string(),
                false => net.to_string(),
            };
            let shown: Vec<String> = prefixes.iter().take(SHOWN).map(text).collect();
            let more = prefixes.len().saturating_sub(SHOWN);
            let more = if more == 0 { String::new() } else { format!(" and {more} more prefixes") };
            format!("outside {word}{}{more}", shown.join(", "))
        };
        if in_it.len() <= not_in_it.len() { list("", &in_it) } else { list("but ", &not_in_it) }
    }

    fn parties(&self, set: &BTreeSet<Party>) -> Parties {
        let endpoints: BTreeSet<usize> = set
            .iter()
            .filter_map(|party| match party {
                Party::Endpoint(index) => Some(*index),
                Party::Outside(_) => None,
            })
            .collect();
        let outside: Vec<String> = set
            .iter()
            .filter_map(|party| match party {
                Party::Outside(addresses) => Some(self.outside(addresses)),
                Party::Endpoint(_) => None,
            })
            .collect();
        let mut names: Vec<String> = endpoints.iter().map(|index| self.endpoint(*index).to_owned()).collect();
        names.extend(outside.iter().cloned());
        let mut short = Vec::new();
        let mut rest = endpoints;
        let mut take = |name: String, group: &BTreeSet<usize>, least: usize, rest: &mut BTreeSet<usize>| {
            if group.len() >= least && group.is_subset(rest) {
                rest.retain(|index| !group.contains(index));
                short.push(name);
            }
        };
        take("every workload".to_owned(), &self.all_workloads, 2, &mut rest);
        for (namespace, group) in &self.by_namespace {
            take(format!("{namespace}/*"), group, 2, &mut rest);
        }
        take("every node".to_owned(), &self.nodes, 2, &mut rest);
        short.extend(rest.iter().map(|index| self.endpoint(*index).to_owned()));
        short.extend(outside);
        Parties { names, short }
    }

    /// The namespace of an endpoint.
    pub(super) fn namespace(&self, index: usize) -> Option<&str> {
        self.namespaces.get(index)?.as_deref()
    }
}

/// Prefixes that are written out before they are only counted.
const SHOWN: usize = 8;

type Group = (BTreeSet<Party>, BTreeSet<Party>, Option<Family>, PortsId);

/// Cells of which each pair of parties has one (a family), as rows.
pub(super) fn merge(cells: Vec<Cell>, names: &Names, ledger: &Ledger) -> Vec<Row> {
    let by_target = grouped(&cells, false);
    let by_source = grouped(&cells, true);
    let groups = if by_source.len() < by_target.len() { by_source } else { by_target };
    let mut rows: Vec<Row> = groups
        .into_iter()
        .map(|(from, to, family, ports)| Row {
            from: names.parties(&from),
            to: names.parties(&to),
            family,
            ports: ledger.get(ports),
        })
        .collect();
    rows.sort_by(|a, b| {
        let key = |row: &Row| (row.to.short.clone(), row.from.short.clone(), row.family);
        key(a).cmp(&key(b))
    });
    rows
}

/// What cells of one group have in common: their other ends, family and ports.
type Alike<'c> = (BTreeSet<&'c Party>, Option<Family>, PortsId);

/// Groups by one end first, then those with the same other ends.
fn grouped(cells: &[Cell], by_source: bool) -> Vec<Group> {
    let mut first: BTreeMap<(&Party, Option<Family>, PortsId), BTreeSet<&Party>> = BTreeMap::new();
    for cell in cells {
        let (key, other) = if by_source { (&cell.from, &cell.to) } else { (&cell.to, &cell.from) };
        first.entry((key, cell.family, cell.ports)).or_default().insert(other);
    }
    // Ordered: rows that sort alike are shown in the same order every time.
    let mut second: BTreeMap<Alike<'_>, BTreeSet<&Party>> = BTreeMap::new();
    for ((key, family, ports), others) in first {
        second.entry((others, family, ports)).or_default().insert(key);
    }
    let owned = |set: BTreeSet<&Party>| set.into_iter().cloned().collect::<BTreeSet<Party>>();
    second
        .into_iter()
        .map(|((others, family, ports), keys)| {
            let (keys, others) = (owned(keys), owned(others));
            if by_source { (keys, others, family, ports) } else { (others, keys, family, ports) }
        })
        .collect()
}
