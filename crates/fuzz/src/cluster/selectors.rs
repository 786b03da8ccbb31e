//! Labels and selectors.

use serde_json::{Map, Value, json};

use crate::random::Random;

/// Labels of few keys and values. The empty value is one.
pub(super) fn labels(random: &mut Random) -> Value {
    let mut labels = Map::new();
    for key in ["a", "b"] {
        let value = random.pick(&[None, None, Some("x"), Some("x"), Some("x"), Some("y"), Some("y"), Some("")]);
        labels.extend(value.map(|value| (key.to_owned(), json!(value))));
    }
    Value::Object(labels)
}

fn expression(random: &mut Random) -> Value {
    let key = random.pick(&["a", "a", "b", "b", "c", "kubernetes.io/metadata.name"]);
    let values = |random: &mut Random| {
        let mut values = random.list(1, 3, |random| random.pick(&["x", "y", "", "n0", "n1", "kube-system"]));
        values.sort_unstable();
        values.dedup();
        values
    };
    match random.below(4) {
        0 => json!({"key": key, "operator": "In", "values": values(random)}),
        1 => json!({"key": key, "operator": "NotIn", "values": values(random)}),
        2 => json!({"key": key, "operator": "Exists"}),
        _ => json!({"key": key, "operator": "DoesNotExist"}),
    }
}

/// A selector, of all shapes: everything, labels, every operator, also such as contradict each other.
pub(super) fn selector(random: &mut Random) -> Value {
    match random.below(8) {
        0 | 1 => json!({}),
        2..=4 => json!({"matchLabels": labels(random)}),
        5 | 6 => json!({"matchExpressions": random.list(1, 2, expression)}),
        _ => json!({"matchLabels": labels(random), "matchExpressions": random.list(1, 3, expression)}),
    }
}
