use serde_json::{Value, json};

use super::{LABEL, made, refused, refused_update, strategy};

#[test]
fn secrets_take_text_and_store_bytes() {
    let made = made("Secret", json!({"stringData": {"password": "hunter2"}}));
    assert_eq!(made["data"], json!({"password": "aHVudGVyMg=="}));
    assert_eq!(made.get("stringData"), None);
    assert_eq!(made["type"], "Opaque");
}

#[test]
fn configuration_is_refused_in_the_words_of_kubernetes() {
    let key = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')";
    let cases: Vec<(&str, Value, Vec<String>)> = vec![
        ("ConfigMap", json!({"data": {"a b": "c"}}), vec![format!("data[a b]: Invalid value: \"a b\": {key}")]),
        ("ConfigMap", json!({"data": {"..": "c"}}), vec!["data[..]: Invalid value: \"..\": must not be '..'".into()]),
        (
            "ConfigMap",
            json!({"data": {"a": "c"}, "binaryData": {"a": "Yw=="}}),
            vec!["data[a]: Invalid value: \"a\": duplicate of key present in binaryData".into()],
        ),
        (
            "Secret",
            json!({"type": "kubernetes.io/tls"}),
            vec!["data[tls.crt]: Required value".into(), "data[tls.key]: Required value".into()],
        ),
        ("Namespace", json!({"metadata": {"name": "My"}}), vec![format!("metadata.name: Invalid value: \"My\": {LABEL}")]),
        (
            "Node",
            json!({"spec": {"podCIDRs": ["10.0.0.0/24", "10.0.1.0/24"]}}),
            vec!["spec.podCIDRs: Invalid value: [\"10.0.0.0/24\",\"10.0.1.0/24\"]: may specify no more than one CIDR for each IP family".into()],
        ),
        (
            "Node",
            json!({"spec": {"taints": [{"key": "a", "effect": "Never"}]}}),
            vec!["metadata.taints[0].effect: Unsupported value: \"Never\": supported values: \"NoSchedule\", \"PreferNoSchedule\", \"NoExecute\"".into()],
        ),
        ("Role", json!({"rules": [{"apiGroups": [""], "resources": ["pods"]}]}), vec!["rules[0].verbs: Required value: verbs must contain at least one value".into()]),
        (
            "RoleBinding",
            json!({"roleRef": {"kind": "Thing", "name": "x"}}),
            vec!["roleRef.kind: Unsupported value: \"Thing\": supported values: \"Role\", \"ClusterRole\"".into()],
        ),
        ("Lease", json!({"spec": {"leaseDurationSeconds": 0}}), vec!["spec.leaseDurationSeconds: Invalid value: 0: must be greater than 0".into()]),
        (
            "Ingress",
            json!({"spec": {"rules": [{"host": "10.0.0.1", "http": {"paths": [{"path": "x", "pathType": "Prefix", "backend": {"service": {"name": "a", "port": {}}}}]}}]}}),
            vec![
                "spec.rules[0].host: Invalid value: \"10.0.0.1\": must be a DNS name, not an IP address".into(),
                "spec.rules[0].http.paths[0].path: Invalid value: \"x\": must be an absolute path".into(),
                "spec.rules[0].http.paths[0].backend: Required value: port name or number is required".into(),
            ],
        ),
        (
            "CustomResourceDefinition",
            json!({"metadata": {"name": "x"}, "spec": {"group": "example.com", "scope": "Namespaced", "names": {"plural": "things", "kind": "Thing"},
                "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {"type": "object"}}}]}}),
            vec!["metadata.name: Invalid value: \"x\": must be spec.names.plural+\".\"+spec.group".into()],
        ),
    ];
    for (kind, object, expected) in cases {
        assert_eq!(refused(kind, object.clone()), expected, "{kind} {object}");
    }
}

#[test]
fn annotations_have_a_limit() {
    let object = json!({"metadata": {"annotations": {"a": "x".repeat(256 * 1024)}}});
    assert_eq!(refused("ConfigMap", object), vec!["metadata.annotations: Too long: may not be more than 262144 bytes"]);
}

#[test]
fn what_is_immutable_stays() {
    let map = json!({"data": {"a": "b"}, "immutable": true});
    let changed = refused_update("ConfigMap", map, |map| map["data"]["a"] = json!("c"));
    assert_eq!(changed, vec!["data: Forbidden: field is immutable when `immutable` is set"]);
    let secret = refused_update("Secret", json!({}), |secret| secret["type"] = json!("other"));
    assert_eq!(secret, vec!["type: Invalid value: \"other\": field is immutable"]);
    let node = refused_update("Node", json!({"spec": {"podCIDRs": ["10.0.0.0/24"]}}), |node| {
        node["spec"] = json!({"podCIDRs": ["10.0.1.0/24"]});
    });
    assert_eq!(node, vec!["spec.podCIDRs: Forbidden: node updates may not change podCIDR except from \"\" to valid"]);
    let binding = json!({"roleRef": {"kind": "ClusterRole", "name": "a"}});
    let bound = refused_update("ClusterRoleBinding", binding, |binding| binding["roleRef"]["name"] = json!("b"));
    assert_eq!(bound.len(), 1);
    assert!(bound[0].ends_with("cannot change roleRef"), "{bound:?}");
    let named = refused_update("ConfigMap", json!({}), |map| map["metadata"]["name"] = json!("other"));
    assert_eq!(named, vec!["metadata.name: Invalid value: \"other\": field is immutable"]);
}

#[test]
fn a_namespace_begins_active_and_is_held_by_its_controller() {
    let made = made("Namespace", json!({"status": {"phase": "Terminating"}}));
    assert_eq!(made["status"]["phase"], "Active");
    assert_eq!(made["spec"]["finalizers"], json!(["kubernetes"]));
    assert_eq!(made["metadata"]["labels"]["kubernetes.io/metadata.name"], "thing");
    let mut ended = made.clone();
    ended["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    ended["spec"]["finalizers"] = json!([]);
    strategy("Namespace").default_object(&mut ended);
    assert_eq!(ended["spec"]["finalizers"], json!([]), "a namespace that goes is not held again");
}

#[test]
fn finalizers_are_not_added_to_what_is_being_deleted() {
    let refusal =
        refused_update("ConfigMap", json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}), |map| {
            map["metadata"]["finalizers"] = json!(["example.com/b", "example.com/a"]);
        });
    assert_eq!(
        refusal,
        vec![
            "metadata.finalizers: Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers []string{\"example.com/a\", \"example.com/b\"}"
        ]
    );
}

#[test]
fn a_node_registers_with_its_status_and_its_ranges_agree() {
    let node = made("Node", json!({"spec": {"podCIDR": "10.244.0.0/24"}, "status": {"capacity": {"cpu": "2"}}}));
    assert_eq!(node["status"], json!({"capacity": {"cpu": "2"}, "allocatable": {"cpu": "2"}}));
    assert_eq!(node["spec"]["podCIDRs"], json!(["10.244.0.0/24"]));
    let listed = made("Node", json!({"spec": {"podCIDRs": ["10.244.1.0/24", "fd00::/64"]}}));
    assert_eq!(listed["spec"]["podCIDR"], "10.244.1.0/24");
    let mut changed = node.clone();
    changed["status"] = json!({});
    strategy("Node").prepare_update(&mut changed, &node);
    assert_eq!(changed["status"], node["status"], "later only the status endpoint changes it");
}
