//! A case cut down to what it takes: whatever can be left out of a cluster without the difference going away.

use serde_json::Value;

use crate::cluster::Spec;

/// Tries at most.
const TRIES: usize = 4_000;

/// Fields without which an object is none.
const NEEDED: [&str; 12] = [
    "podSelector",
    "namespaceSelector",
    "tier",
    "priority",
    "subject",
    "action",
    "cidr",
    "key",
    "operator",
    "values",
    "start",
    "end",
];

/// The lists of a cluster that may become shorter.
const LISTS: [fn(&mut Spec) -> &mut Vec<Value>; 3] =
    [|spec| &mut spec.policies, |spec| &mut spec.cluster_policies, |spec| &mut spec.pods];

/// JSON pointers to everything below a value that can be left out, outer ones first.
fn removable(value: &Value, at: &str, found: &mut Vec<String>) {
    let children: Vec<(String, &Value, bool)> = match value {
        Value::Array(list) => {
            list.iter().enumerate().map(|(i, child)| (i.to_string(), child, list.len() > 1)).collect()
        }
        Value::Object(fields) => {
            fields.iter().map(|(name, child)| (name.clone(), child, !NEEDED.contains(&name.as_str()))).collect()
        }
        _ => Vec::new(),
    };
    for (name, _, _) in children.iter().filter(|(_, _, removable)| *removable) {
        found.push(format!("{at}/{}", name.replace('~', "~0").replace('/', "~1")));
    }
    for (name, child, _) in children {
        removable(child, &format!("{at}/{}", name.replace('~', "~0").replace('/', "~1")), found);
    }
}

fn without(object: &Value, pointer: &str) -> Option<Value> {
    let mut object = object.clone();
    let (parent, name) = pointer.rsplit_once('/')?;
    let name = name.replace("~1", "/").replace("~0", "~");
    match object.pointer_mut(parent)? {
        Value::Array(list) => {
            let index = name.parse::<usize>().ok().filter(|index| *index < list.len())?;
            list.remove(index);
        }
        Value::Object(fields) => drop(fields.shift_remove(&name)?),
        _ => return None,
    }
    Some(object)
}

/// The cluster without all that `differs` does not need.
pub fn shrink(spec: &Spec, mut differs: impl FnMut(&Spec) -> bool) -> Spec {
    let mut best = spec.clone();
    let mut tries = 0;
    let mut try_it = |candidate: Spec, best: &mut Spec| {
        tries += 1;
        let kept = tries <= TRIES && differs(&candidate);
        if kept {
            *best = candidate;
        }
        kept
    };
    loop {
        let before = best.clone();
        for list in LISTS {
            let mut at = 0;
            while at < list(&mut best).len() {
                let mut candidate = best.clone();
                list(&mut candidate).remove(at);
                candidate.forget_gone();
                at += usize::from(!try_it(candidate, &mut best));
            }
        }
        for list in &LISTS[..2] {
            for at in 0..list(&mut best).len() {
                let mut pointers = Vec::new();
                removable(&list(&mut best)[at]["spec"], "/spec", &mut pointers);
                // From the last on, so that what is left keeps its place.
                for pointer in pointers.iter().rev() {
                    let mut candidate = best.clone();
                    let Some(smaller) = without(&list(&mut candidate)[at], pointer) else { continue };
                    list(&mut candidate)[at] = smaller;
                    try_it(candidate, &mut best);
                }
            }
        }
        if best == before {
            return best;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn only_what_the_difference_takes_is_left() {
        let mut random = Random::new(3);
        let mut spec = Spec::random(&mut random);
        while !spec.policies.iter().any(|policy| policy.to_string().contains("ipBlock")) {
            spec = Spec::random(&mut random);
        }
        let small = shrink(&spec, |spec| spec.policies.iter().any(|policy| policy.to_string().contains("ipBlock")));
        assert!(small.pods.is_empty() && small.cluster_policies.is_empty());
        assert_eq!(small.policies.len(), 1);
        let text = small.policies[0].to_string();
        assert!(text.contains("ipBlock") && !text.contains("except") && !text.contains("ports"), "{text}");
    }
}
