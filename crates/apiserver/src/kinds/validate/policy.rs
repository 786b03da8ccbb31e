//! Validation of NetworkPolicies and PodDisruptionBudgets.

use serde_json::Value;

use super::legacy_cidr;
use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::metadata::label_selector;
use crate::kinds::read::Read;

/// Checks a new `NetworkPolicy`.
pub(crate) fn network_policy(object: &Value, faults: &mut Faults) {
    check(object.at("spec"), &[], faults);
}

/// Checks an update of a `NetworkPolicy`; CIDRs that it had before are not looked at again.
pub(crate) fn network_policy_update(object: &Value, old: &Value, faults: &mut Faults) {
    let mut known = Vec::new();
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        for block in
            old.at("spec").list(direction).iter().flat_map(|rule| rule.list(peers)).map(|peer| peer.at("ipBlock"))
        {
            known.push(block.text("cidr"));
            known.extend(block.texts("except"));
        }
    }
    check(object.at("spec"), &known, faults);
}

fn check(spec: &Value, known: &[&str], faults: &mut Faults) {
    let path = Path::new("spec");
    label_selector(spec.at("podSelector"), &path.child("podSelector"), faults);
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        for (index, rule) in spec.list(direction).iter().enumerate() {
            let here = path.child(direction).index(index);
            for (place, port) in rule.list("ports").iter().enumerate() {
                self::port(port, &here.child("ports").index(place), faults);
            }
            for (place, peer) in rule.list(peers).iter().enumerate() {
                self::peer(peer, known, &here.child(peers).index(place), faults);
            }
        }
    }
    let types = spec.texts("policyTypes");
    if types.len() > 2 {
        faults.invalid(&path.child("policyTypes"), spec.at("policyTypes"), "may not specify more than two policyTypes");
        return;
    }
    for (index, kind) in types.iter().enumerate().filter(|(_, kind)| !["Ingress", "Egress"].contains(kind)) {
        faults.unsupported(&path.child("policyTypes").index(index), *kind, &["Ingress", "Egress"]);
    }
}

fn port(port: &Value, path: &Path, faults: &mut Faults) {
    const PROTOCOLS: &[&str] = &["TCP", "UDP", "SCTP"];
    if port.has("protocol") && !PROTOCOLS.contains(&port.text("protocol")) {
        faults.unsupported(&path.child("protocol"), port.text("protocol"), PROTOCOLS);
    }
    let end_path = path.child("endPort");
    let end = port.int("endPort");
    match port.at("port") {
        Value::Null => {
            if let Some(end) = end {
                faults.invalid(&end_path, end, "may not be specified when `port` is not specified");
            }
        }
        Value::String(name) => {
            if let Some(end) = end {
                faults.invalid(&end_path, end, "may not be specified when `port` is non-numeric");
            }
            faults.invalid_each(&path.child("port"), name, format::port_name(name));
        }
        number => {
            let number = number.as_i64().unwrap_or(0);
            super::container::port_number(number, &path.child("port"), faults);
            if let Some(end) = end {
                if end < number {
                    faults.invalid(&end_path, end, "must be greater than or equal to `port`");
                }
                super::container::port_number(end, &end_path, faults);
            }
        }
    }
}

fn peer(peer: &Value, known: &[&str], path: &Path, faults: &mut Faults) {
    let mut found = 0;
    for field in ["podSelector", "namespaceSelector"] {
        if peer.has(field) {
            found += 1;
            label_selector(peer.at(field), &path.child(field), faults);
        }
    }
    if peer.has("ipBlock") {
        found += 1;
        ip_block(peer.at("ipBlock"), known, &path.child("ipBlock"), faults);
    }
    if found == 0 {
        faults.required(path, "must specify a peer");
    } else if found > 1 && peer.has("ipBlock") {
        faults.forbidden(path, "may not specify both ipBlock and another peer");
    }
}

fn ip_block(block: &Value, known: &[&str], path: &Path, faults: &mut Faults) {
    let cidr = block.text("cidr");
    if cidr.is_empty() {
        faults.required(&path.child("cidr"), "");
        return;
    }
    legacy_cidr(cidr, known, &path.child("cidr"), faults);
    let Some((base, length)) = format::sloppy_cidr(cidr) else { return };
    for (index, except) in block.texts("except").iter().enumerate() {
        let here = path.child("except").index(index);
        legacy_cidr(except, known, &here, faults);
        let Some((address, narrower)) = format::sloppy_cidr(except) else { continue };
        let inside =
            base.is_ipv4() == address.is_ipv4() && format::masked(address, length) == format::masked(base, length);
        if !inside || length >= narrower {
            faults.invalid(&here, *except, "must be a strict subset of `cidr`");
        }
    }
}

/// Checks a `PodDisruptionBudget`.
pub(crate) fn pod_disruption_budget(object: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    if spec.has("minAvailable") && spec.has("maxUnavailable") {
        faults.invalid(&path, spec, "minAvailable and maxUnavailable cannot be both set");
    }
    for field in ["minAvailable", "maxUnavailable"] {
        if spec.has(field) {
            super::workload::int_or_percent(spec.at(field), &path.child(field), faults);
            super::workload::at_most_all(spec.at(field), &path.child(field), faults);
        }
    }
    label_selector(spec.at("selector"), &path.child("selector"), faults);
    const POLICIES: &[&str] = &["AlwaysAllow", "IfHealthyBudget"];
    if spec.has("unhealthyPodEvictionPolicy") && !POLICIES.contains(&spec.text("unhealthyPodEvictionPolicy")) {
        faults.unsupported(
            &path.child("unhealthyPodEvictionPolicy"),
            spec.text("unhealthyPodEvictionPolicy"),
            POLICIES,
        );
    }
}
