//! What is in the table's sets, as the kernel lists it and as it is told to be.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::TABLE;
use super::rules::{self, Facts, Sets};
use crate::net::host_range;

/// Commands that make of what is in sets what should be. What stays is not touched: no packet finds it missing.
pub(super) fn turn(present: &Sets, wanted: &Sets) -> Vec<Value> {
    let none = BTreeSet::new();
    let differing = |from: &Sets, to: &Sets, verb: &str| -> Vec<Value> {
        let changes = to.iter().map(|(name, to)| (name, to.difference(from.get(name).unwrap_or(&none))));
        let changes = changes.map(|(name, elements)| (name, elements.map(element).collect::<Vec<_>>()));
        changes
            .filter(|(_, elements)| !elements.is_empty())
            .map(|(name, elements)| elements_of(verb, name, &elements))
            .collect()
    };
    // What is added may hold what goes, and elements do not overlap.
    let mut commands = differing(wanted, present, "delete");
    commands.extend(differing(present, wanted, "add"));
    commands
}

fn elements_of(verb: &str, set: &str, elements: &[Value]) -> Value {
    json!({verb: {"element": {"family": "inet", "table": TABLE, "name": set, "elem": elements}}})
}

fn element(range: &IpNet) -> Value {
    match range.prefix_len() {
        full if full == range.max_prefix_len() => json!(range.addr().to_string()),
        length => json!({"prefix": {"addr": range.network().to_string(), "len": length}}),
    }
}

/// What is in the sets of a listed table; none if anything of it is not as we write it.
pub(super) fn read(listed: &Value) -> Option<Sets> {
    let mut sets = rules::sets(&Facts::default());
    for set in listed.get("nftables")?.as_array()?.iter().filter_map(|object| object.get("set")) {
        if let Some(known) = sets.get_mut(set.get("name")?.as_str()?) {
            *known = set
                .get("elem")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .map(read_element)
                .collect::<Option<_>>()?;
        }
    }
    Some(sets)
}

fn read_element(element: &Value) -> Option<IpNet> {
    let address = |value: &Value| value.as_str()?.parse::<IpAddr>().ok();
    match element.get("prefix") {
        None => address(element).map(host_range),
        Some(prefix) => {
            let length = u8::try_from(prefix.get("len")?.as_u64()?).ok()?;
            IpNet::new(address(prefix.get("addr")?)?, length).ok()
        }
    }
}

/// A listed table without what is in its sets.
pub(super) fn without_elements(mut listed: Value) -> Value {
    let objects = listed.get_mut("nftables").and_then(Value::as_array_mut).into_iter().flatten();
    for set in objects.filter_map(|object| object.get_mut("set")?.as_object_mut()) {
        set.remove("elem");
    }
    listed
}
