//! Whether a pod fits a node: readiness, taints, selectors, affinity, host ports. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodAffinityTerm, Taint, Toleration,
};
use kube::ResourceExt;
use towpath_model::Selector;

/// Why the pod may not run on the node, as kube-scheduler words it; none: it may.
pub(super) fn refusal(
    pod: &Pod,
    node: &Node,
    nodes: &BTreeMap<String, Node>,
    placed: &[(&str, &Pod)],
) -> Option<&'static str> {
    if !is_ready(node) {
        return Some("node(s) were not ready");
    }
    let spec = pod.spec.as_ref()?;
    let tolerations = spec.tolerations.as_deref().unwrap_or_default();
    if node.spec.as_ref().is_some_and(|s| s.unschedulable == Some(true)) {
        let taint = Taint {
            key: "node.kubernetes.io/unschedulable".to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        };
        if !tolerated(&taint, tolerations) {
            return Some("node(s) were unschedulable");
        }
    }
    if !taints_tolerated(node, tolerations, &["NoSchedule", "NoExecute"]) {
        return Some("node(s) had untolerated taint(s)");
    }
    if !selected(pod, node) {
        return Some("node(s) didn't match Pod's node affinity/selector");
    }
    if host_ports_taken(pod, &node.name_any(), placed) {
        return Some("node(s) didn't have free ports for the requested pod ports");
    }
    if !pod_affinity_holds(pod, node, nodes, placed) {
        return Some("node(s) didn't match pod affinity/anti-affinity rules");
    }
    None
}

/// Whether a DaemonSet's pod belongs on the node: it ignores that the node is not ready or is cordoned.
pub(in crate::controllers) fn daemon_may_run(pod: &Pod, node: &Node) -> bool {
    let tolerations = pod.spec.as_ref().and_then(|s| s.tolerations.as_deref()).unwrap_or_default();
    taints_tolerated(node, tolerations, &["NoSchedule", "NoExecute"]) && selected(pod, node)
}

fn is_ready(node: &Node) -> bool {
    node.status.iter().flat_map(|s| s.conditions.iter().flatten()).any(|c| c.type_ == "Ready" && c.status == "True")
}

fn tolerated(taint: &Taint, tolerations: &[Toleration]) -> bool {
    tolerations.iter().any(|t| {
        let effect = t.effect.as_deref().is_none_or(|e| e.is_empty() || e == taint.effect);
        let key = t.key.as_deref().is_none_or(|k| k.is_empty() || k == taint.key);
        let value = match t.operator.as_deref() {
            Some("Exists") => true,
            _ => t.value.as_deref().unwrap_or("") == taint.value.as_deref().unwrap_or(""),
        };
        effect && key && value
    })
}

fn taints_tolerated(node: &Node, tolerations: &[Toleration], effects: &[&str]) -> bool {
    let taints = node.spec.as_ref().and_then(|s| s.taints.as_deref()).unwrap_or_default();
    taints.iter().filter(|t| effects.contains(&t.effect.as_str())).all(|t| tolerated(t, tolerations))
}

fn selected(pod: &Pod, node: &Node) -> bool {
    let Some(spec) = &pod.spec else { return true };
    let labels = node.labels();
    let by_selector = spec.node_selector.iter().flatten().all(|(k, v)| labels.get(k) == Some(v));
    let required = spec
        .affinity
        .as_ref()
        .and_then(|a| a.node_affinity.as_ref())
        .and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    by_selector && required.is_none_or(|r| node_selector_matches(r, node))
}

fn node_selector_matches(selector: &NodeSelector, node: &Node) -> bool {
    let term = |term: &NodeSelectorTerm| {
        let expressions = term.match_expressions.as_deref().unwrap_or_default();
        let fields = term.match_fields.as_deref().unwrap_or_default();
        // A term without requirements matches nothing (core/v1 NodeSelectorTerm).
        !(expressions.is_empty() && fields.is_empty())
            && expressions.iter().all(|r| requirement(r, node.labels().get(&r.key).map(String::as_str)))
            && fields.iter().all(|r| requirement(r, (r.key == "metadata.name").then(|| node.name_any()).as_deref()))
    };
    selector.node_selector_terms.iter().any(term)
}

fn requirement(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = |v: &str| values.iter().any(|w| w == v);
    let compare = |f: fn(i64, i64) -> bool| {
        let bound = values.first().and_then(|v| v.parse().ok());
        value.and_then(|v| v.parse().ok()).zip(bound).is_some_and(|(v, b)| f(v, b))
    };
    match requirement.operator.as_str() {
        "In" => value.is_some_and(listed),
        "NotIn" => !value.is_some_and(listed),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(|v, b| v > b),
        "Lt" => compare(|v, b| v < b),
        _ => false,
    }
}

fn host_ports(pod: &Pod) -> impl Iterator<Item = (i32, String)> + '_ {
    let spec = pod.spec.iter();
    spec.flat_map(|s| s.containers.iter().flat_map(|c| c.ports.iter().flatten()))
        .filter_map(|p| Some((p.host_port.filter(|n| *n > 0)?, p.protocol.clone().unwrap_or_else(|| "TCP".to_owned()))))
}

fn host_ports_taken(pod: &Pod, node: &str, placed: &[(&str, &Pod)]) -> bool {
    let wanted: Vec<(i32, String)> = host_ports(pod).collect();
    !wanted.is_empty()
        && placed.iter().filter(|(n, _)| *n == node).any(|(_, p)| host_ports(p).any(|h| wanted.contains(&h)))
}

fn pod_affinity_holds(pod: &Pod, node: &Node, nodes: &BTreeMap<String, Node>, placed: &[(&str, &Pod)]) -> bool {
    let Some(affinity) = pod.spec.as_ref().and_then(|s| s.affinity.as_ref()) else { return true };
    let with =
        affinity.pod_affinity.as_ref().and_then(|a| a.required_during_scheduling_ignored_during_execution.as_deref());
    let without = affinity
        .pod_anti_affinity
        .as_ref()
        .and_then(|a| a.required_during_scheduling_ignored_during_execution.as_deref());
    let near = |term: &PodAffinityTerm| {
        let domain = node.labels().get(&term.topology_key);
        placed.iter().any(|(other_node, other)| {
            let same =
                domain.is_some() && nodes.get(*other_node).and_then(|n| n.labels().get(&term.topology_key)) == domain;
            same && term_matches(term, pod, other)
        })
    };
    // A pod that matches its own affinity may be the first of its kind.
    let first = |term: &PodAffinityTerm| {
        term_matches(term, pod, pod) && !placed.iter().any(|(_, other)| term_matches(term, pod, other))
    };
    with.unwrap_or_default().iter().all(|t| near(t) || first(t)) && !without.unwrap_or_default().iter().any(near)
}

fn term_matches(term: &PodAffinityTerm, pod: &Pod, other: &Pod) -> bool {
    let namespaces = term.namespaces.as_deref().unwrap_or_default();
    let in_namespace = if namespaces.is_empty() {
        other.namespace() == pod.namespace()
    } else {
        other.namespace().is_some_and(|n| namespaces.contains(&n))
    };
    let selector = term.label_selector.as_ref().and_then(|s| Selector::parse(s, "pod affinity", "labelSelector").ok());
    in_namespace && selector.is_some_and(|s| s.matches(other.labels()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(ready: &str, taints: serde_json::Value, labels: serde_json::Value) -> Node {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "n1", "labels": labels},
            "spec": {"taints": taints},
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        }))
        .unwrap()
    }

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({"metadata": {"name": "p", "namespace": "default"}, "spec": spec}))
            .unwrap()
    }

    fn refuses(pod: &Pod, node: &Node) -> Option<&'static str> {
        refusal(pod, node, &BTreeMap::from([("n1".to_owned(), node.clone())]), &[])
    }

    #[test]
    fn readiness_taints_and_selectors_decide() {
        let plain = pod(serde_json::json!({"containers": []}));
        let none = serde_json::json!([]);
        assert_eq!(refuses(&plain, &node("True", none.clone(), serde_json::json!({}))), None);
        assert!(refuses(&plain, &node("False", none.clone(), serde_json::json!({}))).is_some());
        let tainted = node("True", serde_json::json!([{"key": "k", "effect": "NoSchedule"}]), serde_json::json!({}));
        assert!(refuses(&plain, &tainted).is_some());
        let tolerant = pod(serde_json::json!({"containers": [], "tolerations": [{"key": "k", "operator": "Exists"}]}));
        assert_eq!(refuses(&tolerant, &tainted), None);
        let picky = pod(serde_json::json!({"containers": [], "nodeSelector": {"disk": "ssd"}}));
        assert!(refuses(&picky, &node("True", none.clone(), serde_json::json!({"disk": "hdd"}))).is_some());
        assert_eq!(refuses(&picky, &node("True", none, serde_json::json!({"disk": "ssd"}))), None);
    }

    #[test]
    fn anti_affinity_keeps_two_of_a_kind_apart() {
        let spec = serde_json::json!({"containers": [], "affinity": {"podAntiAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "x"}}}]}}});
        let mut pod = pod(spec);
        pod.metadata.labels = Some(BTreeMap::from([("app".to_owned(), "x".to_owned())]));
        let node = node("True", serde_json::json!([]), serde_json::json!({"kubernetes.io/hostname": "n1"}));
        let nodes = BTreeMap::from([("n1".to_owned(), node.clone())]);
        assert_eq!(refusal(&pod, &node, &nodes, &[]), None);
        assert!(refusal(&pod, &node, &nodes, &[("n1", &pod)]).is_some());
    }
}
