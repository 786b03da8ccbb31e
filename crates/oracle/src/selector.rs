//! Label selectors, as <https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/> words them.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

/// "All of the requirements, from both matchLabels and matchExpressions are ANDed together". Empty: matches everything.
pub(crate) fn matches(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    for (key, value) in selector.match_labels.iter().flatten() {
        if labels.get(key) != Some(value) {
            return false;
        }
    }
    for expression in selector.match_expressions.iter().flatten() {
        let value = labels.get(&expression.key);
        let listed = value.is_some_and(|v| expression.values.iter().flatten().any(|w| w == v));
        let holds = match expression.operator.as_str() {
            "In" => listed,
            // Also objects without the key at all.
            "NotIn" => !listed,
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            _ => false,
        };
        if !holds {
            return false;
        }
    }
    true
}
