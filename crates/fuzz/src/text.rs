//! Policies as nobody would write them: valid ones with one place made wrong, read the way an agent reads what its watch brings.
//!
//! What is still understood must be judged alike by everybody. What is not must close: nothing may pass that would not pass if the part in
//! which the place lies were not there, and what the policy isolates stays isolated.

use k8s_openapi::api::networking::v1 as networking;
use serde_json::{Value, json};
use towpath_model::cluster_policy::{MOST_ITEMS, object};
use towpath_model::desired::Verdict;
use towpath_model::readable::Readable;
use towpath_model::{ClusterNetworkPolicy, Direction, NamespacedName, NetworkPolicy, World};
use towpath_policy::names::NOTHING_LEARNED;
use towpath_policy::{Compiler, Evaluator, Flow, View};

use crate::cluster::Spec;
use crate::judge::{Judges, compile};
use crate::packet::{Packet, Subjects};
use crate::random::Random;
use crate::tally::Tally;

/// What became of a policy with a wrong place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// It was understood, or the wrong place is one that nobody looks at.
    Understood,
    /// A part was not, and closed.
    Closed,
    /// The whole object did not fit its type, and stands for one that denies all.
    Unreadable,
    /// It has no name: nobody knows what it is. The API server stores no such object.
    Nameless,
}

/// Texts that are nearly something.
const TEXTS: [&str; 28] = [
    "",
    " ",
    "In",
    "NotIn",
    "Exists",
    "DoesNotExist",
    "Near",
    "TCP",
    "tcp",
    "ICMP",
    "80",
    "http",
    "no port name",
    "10.0.0.0/33",
    "10.0.0.0",
    "10.0.0.0/08",
    " 10.0.0.0/8",
    "0x0a000000/8",
    "10.0.0.1/8",
    "::ffff:10.0.0.0/104",
    "::ffff:0:0/96",
    "fe80::/10%eth0",
    "Ingress",
    "Egress",
    "Accept",
    "../../etc",
    "a\u{0}b",
    "\u{202e}x",
];

const NUMBERS: [i64; 12] =
    [i64::MIN, -1, 0, 1, 79, 65535, 65536, 1 << 31, 1 << 32, (1 << 32) + 80, i64::MAX - 1, i64::MAX];

fn wrong_value(random: &mut Random) -> Value {
    match random.below(9) {
        0 => Value::Null,
        1 => json!(random.chance(1, 2)),
        2 | 3 => json!(random.pick(&NUMBERS)),
        4 | 5 => json!(random.pick(&TEXTS)),
        6 => json!([]),
        7 => json!({}),
        _ => random.pick(&[json!(1.5), json!(1e300), json!([[]]), json!({"a": {"b": []}}), json!("x".repeat(5_000))]),
    }
}

/// JSON pointers to everything in a value.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(i, child)| places(child, &format!("{at}/{i}"), found));
        }
        Value::Object(fields) => {
            let escaped = |name: &str| name.replace('~', "~0").replace('/', "~1");
            fields.iter().for_each(|(name, child)| places(child, &format!("{at}/{}", escaped(name)), found));
        }
        _ => {}
    }
}

/// Makes one place below `/spec` wrong; the pointer to it.
pub fn spoil(random: &mut Random, object: &mut Value) -> String {
    let mut all = Vec::new();
    places(&object["spec"], "/spec", &mut all);
    let place = random.pick(&all);
    let Some(value) = object.pointer_mut(&place) else { return place };
    match (random.below(8), value) {
        (0, Value::Object(fields)) => {
            let name =
                random.pick(&["port", "endPort", "ipBlock", "podSelector", "namespaceSelector", "ofALaterVersion"]);
            fields.insert(name.to_owned(), wrong_value(random));
        }
        (1, Value::Object(fields)) => {
            let names: Vec<String> = fields.keys().cloned().collect();
            if !names.is_empty() {
                fields.shift_remove(&random.pick(&names));
            }
        }
        (0, Value::Array(list)) => list.push(wrong_value(random)),
        (1, Value::Array(list)) if !list.is_empty() => {
            let one = random.pick(list);
            list.extend(std::iter::repeat_n(one, 300));
        }
        (2, Value::Number(number)) => {
            let wrong = number.as_i64().unwrap_or(0).wrapping_add(random.pick(&[-1, 1, 65536, -65536]));
            *number = wrong.into();
        }
        // So deep that who follows it must have a bound.
        (3, value) => {
            let depth = random.pick(&[4usize, 60, 100]);
            *value = (0..depth).fold(value.take(), |inner, _| json!([inner]));
        }
        (_, value) => *value = wrong_value(random),
    }
    place
}

/// The text of an object; now and then with a key twice, of which readers take the last.
pub fn written(random: &mut Random, object: &Value) -> String {
    let text = object.to_string();
    let key = random.pick(&["\"podSelector\":", "\"ports\":", "\"spec\":", "\"action\":", "\"cidr\":"]);
    match text.find(key) {
        Some(at) if random.chance(1, 10) => format!("{}{key}{},{}", &text[..at], wrong_value(random), &text[at..]),
        _ => text,
    }
}

/// A policy of either kind, as it was read.
enum Read {
    Namespaced(NetworkPolicy, bool),
    Cluster(ClusterNetworkPolicy, bool),
}

/// As the agent's index does: an object that does not fit costs itself, never the list that it is in. The flag: all of it was understood.
fn read(text: &str) -> Result<(Option<Read>, Outcome), String> {
    let kind: Value = serde_json::from_str(text).map_err(|e| format!("no JSON: {e}"))?;
    if kind["kind"] == "ClusterNetworkPolicy" {
        let read: Readable<object::ClusterNetworkPolicy> =
            serde_json::from_str(text).map_err(|e| format!("a whole list would be lost: {e}"))?;
        let Ok(object) = read.object() else { return Ok((None, Outcome::Nameless)) };
        let Ok((policy, problems)) = ClusterNetworkPolicy::fail_closed(object) else {
            return Ok((None, Outcome::Nameless));
        };
        let outcome = if problems.is_empty() { Outcome::Understood } else { Outcome::Closed };
        return Ok((Some(Read::Cluster(policy, problems.is_empty())), outcome));
    }
    let read: Readable<networking::NetworkPolicy> =
        serde_json::from_str(text).map_err(|e| format!("a whole list would be lost: {e}"))?;
    let metadata = k8s_openapi::Metadata::metadata(&read);
    let (Some(namespace), Some(name)) = (&metadata.namespace, &metadata.name) else {
        return Ok((None, Outcome::Nameless));
    };
    let key = NamespacedName::new(namespace, name);
    let parsed = read.object().ok().and_then(|object| NetworkPolicy::fail_closed(object).ok());
    Ok(match parsed {
        Some((policy, problems)) if problems.is_empty() => (Some(Read::Namespaced(policy, true)), Outcome::Understood),
        Some((policy, _)) => (Some(Read::Namespaced(policy, false)), Outcome::Closed),
        None => (Some(Read::Namespaced(NetworkPolicy::deny_all(key), false)), Outcome::Unreadable),
    })
}

/// The rule that a place lies in: its direction and index.
fn rule_of(place: &str) -> Option<(&str, usize)> {
    let mut parts = place.strip_prefix("/spec/")?.split('/');
    let direction = parts.next().filter(|name| ["ingress", "egress"].contains(name))?;
    Some((direction, parts.next()?.parse().ok()?))
}

/// Whether some list has more items than a ClusterNetworkPolicy may have.
fn is_too_long(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.len() > MOST_ITEMS || list.iter().any(is_too_long),
        Value::Object(fields) => fields.values().any(is_too_long),
        _ => false,
    }
}

/// The valid policy with as much of it left out as may close when `place` is not understood; none: nothing may be concluded of it.
fn closed(valid: &Value, spoiled: &Value, place: &str, outcome: Outcome) -> Option<Option<Value>> {
    let mut reference = valid.clone();
    if valid["kind"] == "ClusterNetworkPolicy" {
        // What is only too much of something is taken all the same, and said.
        if is_too_long(spoiled) {
            return None;
        }
        return match rule_of(place) {
            Some((direction, index)) => {
                let rules = reference["spec"][direction].as_array_mut()?;
                if rules.get(index)?["action"] == "Accept" && spoiled["spec"][direction][index]["action"] == "Accept" {
                    rules.remove(index);
                } else {
                    let peers = if direction == "ingress" { "from" } else { "to" };
                    rules[index] = json!({"action": "Deny", peers: [{"namespaces": {}}]});
                }
                Some(Some(reference))
            }
            // Of whom it is for, and when it is asked, nothing is known: then it accepts nothing.
            None if place.starts_with("/spec/subject") || place.starts_with("/spec/tier") => Some(None),
            None => None,
        };
    }
    let spec = &spoiled["spec"];
    let types = match spec["policyTypes"].as_array() {
        Some(types) if !types.is_empty() => json!(types),
        _ if spec["egress"].as_array().is_some_and(|rules| !rules.is_empty()) => json!(["Ingress", "Egress"]),
        _ => json!(["Ingress"]),
    };
    match rule_of(place) {
        _ if outcome == Outcome::Unreadable => {
            reference["spec"] = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
        }
        Some((direction, index)) => {
            reference["spec"][direction].as_array_mut().filter(|rules| index < rules.len())?.remove(index);
            reference["spec"]["policyTypes"] = types;
        }
        None if place.starts_with("/spec/podSelector") => {
            reference["spec"] = json!({"podSelector": {}, "policyTypes": types});
        }
        None => return None,
    }
    Some(Some(reference))
}

fn put(world: &mut World, read: &Read) {
    match read {
        Read::Namespaced(policy, _) => drop(world.policies.insert(policy.name.clone(), policy.clone())),
        Read::Cluster(policy, _) => drop(world.cluster_policies.insert(policy.name.clone(), policy.clone())),
    }
}

/// Spoils one policy of a cluster and holds what is read of it against the rest.
///
/// # Errors
/// Something passes that should not, or judges differ; and what was read.
pub fn check(random: &mut Random) -> Result<Outcome, String> {
    let mut spec = Spec::random(random);
    while spec.policies.is_empty() || spec.local.is_empty() {
        spec = Spec::random(random);
    }
    let of_cluster = !spec.cluster_policies.is_empty() && random.chance(1, 2);
    let list = if of_cluster { &mut spec.cluster_policies } else { &mut spec.policies };
    let valid = list.remove(random.below(list.len()));
    let mut spoiled = valid.clone();
    let place = spoil(random, &mut spoiled);
    let text = written(random, &spoiled);
    let subjects =
        Subjects::of(&Spec { policies: vec![valid.clone()], cluster_policies: vec![spoiled.clone()], ..spec.clone() });
    let packets: Vec<Packet> = (0..96).filter_map(|_| subjects.packet(random)).collect();
    judge_spoiled(&spec, &valid, &spoiled, &place, &text, &packets)
        .map_err(|what| format!("{what}\nat {place} of\n{text}\nin\n{}", spec.manifests()))
}

fn judge_spoiled(
    spec: &Spec,
    valid: &Value,
    spoiled: &Value,
    place: &str,
    text: &str,
    packets: &[Packet],
) -> Result<Outcome, String> {
    let (read, outcome) = read(text)?;
    let Some(read) = read else { return Ok(outcome) };
    let mut parsed = spec.parse().map_err(|e| format!("{e:#}"))?;
    let mut without = parsed.world.clone();
    put(&mut parsed.world, &read);
    // The image of whatever was read says what the evaluator says.
    let image = compile(&parsed, &mut Compiler::new(std::time::Duration::ZERO), std::time::Duration::ZERO);
    let understood = matches!(&read, Read::Namespaced(_, true) | Read::Cluster(_, true));
    let same_text = serde_json::from_str::<Value>(text).is_ok_and(|value| value == *spoiled);
    if understood && same_text {
        let fits = match &read {
            Read::Namespaced(..) => {
                serde_json::from_value(spoiled.clone()).map(|policy| parsed.oracle.policies.push(policy)).is_ok()
            }
            Read::Cluster(..) => true,
        };
        if let Read::Cluster(..) = &read {
            parsed.oracle.cluster_policies.push(spoiled.clone());
        }
        let judges = Judges::new(&parsed, &image);
        for packet in packets.iter().filter(|_| fits) {
            judges.judge(packet, &mut Tally::default()).map_err(|what| format!("{packet:?}: {what}"))?;
        }
        return Ok(outcome);
    }
    if !same_text || understood {
        return Ok(outcome);
    }
    // Where something else is not understood either, nobody knows whether this place was: what stands beside a known field is left out.
    let was_understood =
        matches!(self::read(&valid.to_string())?.0, Some(Read::Namespaced(_, true) | Read::Cluster(_, true)));
    if !was_understood {
        return Ok(outcome);
    }
    let Some(reference) = closed(valid, spoiled, place, outcome) else { return Ok(outcome) };
    if let Some(reference) = reference {
        put(&mut without, &self::read(&reference.to_string())?.0.ok_or("the reference has no name")?);
    }
    no_broader(&parsed, &without, packets)?;
    Ok(outcome)
}

/// Nothing passes an end in the first world that does not in the second.
fn no_broader(parsed: &crate::cluster::Parsed, reference: &World, packets: &[Packet]) -> Result<(), String> {
    let view = View { world: reference, dns: &parsed.dns, pod_ips: &parsed.given, names: &NOTHING_LEARNED };
    let (found, wanted) = (Evaluator::new(&crate::judge::view(parsed)), Evaluator::new(&view));
    for packet in packets {
        let flow = Flow::new(packet.source, packet.destination, packet.transport.row(), packet.port);
        for direction in [Direction::Egress, Direction::Ingress] {
            let (Some(found), Some(wanted)) = (found.side(&flow, direction), wanted.side(&flow, direction)) else {
                continue;
            };
            if found.verdict == Verdict::Allow && wanted.verdict == Verdict::Deny {
                return Err(format!("{flow:?} passes: {found}; without what is not understood: {wanted}"));
            }
        }
    }
    Ok(())
}
