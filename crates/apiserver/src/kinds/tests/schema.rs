use serde_json::{Value, json};

use super::strategy;
use crate::kinds::builtin;
use crate::kinds::quantity::Quantity;
use crate::kinds::schema::Shapes;
use crate::resource::ListMerge;

#[test]
fn every_kind_has_a_shape_and_distinct_names() {
    let kinds = builtin();
    for row in crate::kinds::table::ROWS {
        assert!(
            Shapes::get().named(row.schema).is_some_and(|shape| shape.field("metadata").is_some()),
            "{}",
            row.schema
        );
    }
    let mut paths: Vec<String> =
        kinds.iter().map(|kind| format!("{}/{}/{}", kind.gvk.group, kind.gvk.version, kind.plural)).collect();
    let count = paths.len();
    paths.sort();
    paths.dedup();
    assert_eq!(paths.len(), count);
    let keys: Vec<&str> =
        kinds.iter().filter(|kind| kind.plural == "events").map(|kind| kind.storage_key.as_ref()).collect();
    assert_eq!(keys, ["/events", "/events"], "both event groups share one storage");
}

#[test]
fn unknown_fields_are_named_by_path_and_dropped() {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "lables": {}},
        "spec": {"containers": [{"name": "a", "imagee": "b", "env": [{"name": "x", "valeu": "y"}]}], "tolerations": null, "volumes": []},
        "extra": 1,
    });
    let unknown = strategy("Pod").prune_unknown_fields(&mut pod);
    assert_eq!(unknown, ["extra", "metadata.lables", "spec.containers[0].imagee", "spec.containers[0].env[0].valeu"]);
    assert_eq!(
        pod,
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": [{"name": "a", "env": [{"name": "x"}]}]},
        })
    );
}

#[test]
fn empty_objects_mean_something_and_stay() {
    let mut policy = json!({"spec": {"podSelector": {}, "ingress": [{}], "egress": [], "policyTypes": ["Ingress"]}});
    assert_eq!(strategy("NetworkPolicy").prune_unknown_fields(&mut policy), Vec::<String>::new());
    assert_eq!(policy, json!({"spec": {"podSelector": {}, "ingress": [{}], "policyTypes": ["Ingress"]}}));
    let mut pod = json!({"spec": {"volumes": [{"name": "a", "emptyDir": {}}], "containers": []}});
    strategy("Pod").prune_unknown_fields(&mut pod);
    assert_eq!(pod["spec"], json!({"volumes": [{"name": "a", "emptyDir": {}}], "containers": []}));
}

#[test]
fn free_form_parts_are_left_alone() {
    let mut revision = json!({"data": {"spec": {"anything": [1, {"goes": null}]}}, "revision": 1});
    let before = revision.clone();
    assert_eq!(strategy("ControllerRevision").prune_unknown_fields(&mut revision), Vec::<String>::new());
    assert_eq!(revision, before);
    let mut definition = json!({"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": {
        "type": "object", "properties": {"spec": {"type": "object", "properties": {"x": {"type": "string", "default": "a"}}}}}}}]}});
    let before = definition.clone();
    assert_eq!(strategy("CustomResourceDefinition").prune_unknown_fields(&mut definition), Vec::<String>::new());
    assert_eq!(definition, before);
}

#[test]
fn wrong_types_are_reported_as_the_decoder_does() {
    let cases: Vec<(&str, Value, &str)> = vec![
        (
            "Pod",
            json!({"spec": {"containers": [{"name": "a", "ports": [{"containerPort": "80"}]}]}}),
            "Pod in version \"v1\" cannot be handled as a Pod: json: cannot unmarshal string into Go struct field ContainerPort.spec.containers.ports.containerPort of type int32",
        ),
        (
            "Deployment",
            json!({"spec": {"replicas": "3"}}),
            "Deployment in version \"v1\" cannot be handled as a Deployment: json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
        (
            "ConfigMap",
            json!({"data": {"a": 1}}),
            "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: json: cannot unmarshal number into Go struct field ConfigMap.data of type string",
        ),
        (
            "Pod",
            json!({"spec": {"containers": {}}}),
            "Pod in version \"v1\" cannot be handled as a Pod: json: cannot unmarshal object into Go struct field PodSpec.spec.containers of type []v1.Container",
        ),
        (
            "Pod",
            json!({"metadata": {"labels": ["a"]}}),
            "Pod in version \"v1\" cannot be handled as a Pod: json: cannot unmarshal array into Go struct field ObjectMeta.metadata.labels of type map[string]string",
        ),
        (
            "Secret",
            json!({"data": {"a": "not base64!"}}),
            "Secret in version \"v1\" cannot be handled as a Secret: illegal base64 data at input byte 3",
        ),
        (
            "Pod",
            json!({"spec": {"containers": [{"resources": {"limits": {"cpu": "lots"}}}]}}),
            "Pod in version \"v1\" cannot be handled as a Pod: quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
        ),
        (
            "Pod",
            json!({"spec": {"hostNetwork": "yes"}}),
            "Pod in version \"v1\" cannot be handled as a Pod: json: cannot unmarshal string into Go struct field PodSpec.spec.hostNetwork of type bool",
        ),
    ];
    for (kind, object, expected) in cases {
        assert_eq!(strategy(kind).type_error(&object).as_deref(), Some(expected));
    }
    let fine = json!({"spec": {"containers": [{"name": "a", "livenessProbe": {"httpGet": {"port": "http"}}, "resources": {"limits": {"cpu": 1, "memory": "1Gi"}}}], "nodeName": null}});
    assert_eq!(strategy("Pod").type_error(&fine), None);
}

#[test]
fn merge_rules_follow_the_path() {
    let pod = strategy("Pod");
    let keys = |keys: &[&'static str]| Some(ListMerge::Map(keys.iter().map(|key| (*key).into()).collect()));
    let ports = pod.merge(&["spec", "containers", "ports"]);
    assert_eq!(ports.list, keys(&["containerPort", "protocol"]));
    assert_eq!(ports.patch_merge_key.as_deref(), Some("containerPort"));
    assert_eq!(pod.merge(&["spec", "containers"]).list, keys(&["name"]));
    assert_eq!(pod.merge(&["spec", "containers", "command"]).list, Some(ListMerge::Atomic));
    assert_eq!(pod.merge(&["metadata", "finalizers"]).list, Some(ListMerge::Set));
    assert!(pod.merge(&["metadata", "finalizers"]).patch_merge);
    assert!(pod.merge(&["spec", "nodeSelector"]).atomic_map);
    assert!(pod.merge(&["spec", "volumes"]).retain_keys);
    assert_eq!(pod.merge(&["metadata", "labels"]).list, None);
    assert!(!pod.merge(&["metadata", "labels"]).atomic_map);
    assert_eq!(pod.merge(&["metadata", "labels", "app"]).list, None);
    let deployment = strategy("Deployment");
    assert_eq!(deployment.merge(&["spec", "template", "spec", "containers", "env"]).list, keys(&["name"]));
    assert!(deployment.merge(&["spec", "strategy"]).retain_keys);
    assert!(deployment.merge(&["spec", "selector"]).atomic_map, "LabelSelector is owned whole");
    let service = strategy("Service");
    assert_eq!(service.merge(&["spec", "ports"]).list, keys(&["port", "protocol"]));
    assert_eq!(service.merge(&["spec", "ports"]).patch_merge_key.as_deref(), Some("port"));
    assert_eq!(strategy("EndpointSlice").merge(&["endpoints"]).list, Some(ListMerge::Atomic));
    assert_eq!(strategy("NetworkPolicy").merge(&["spec", "ingress"]).list, Some(ListMerge::Atomic));
    assert_eq!(service.merge(&["spec", "nonsense"]).list, Some(ListMerge::Atomic));
}

#[test]
fn quantities_compare_by_value() {
    let read = |text: &str| Quantity::parse(text);
    for (a, b) in [
        ("1", "1000m"),
        ("1Ki", "1024"),
        ("1k", "1e3"),
        ("0.5", "500m"),
        ("1.5Gi", "1536Mi"),
        ("+2", "2"),
        ("100M", "1E8"),
    ] {
        assert_eq!(read(a), read(b), "{a} {b}");
        assert!(read(a).is_some());
    }
    assert!(read("1Gi") > read("1G"));
    assert!(read("-1").is_some_and(Quantity::is_negative));
    for bad in ["", "lots", "1..2", "1 Gi", "1gi", "e3", "."] {
        assert_eq!(read(bad), None, "{bad}");
    }
    for (quantity, divisor, often) in [
        ("1500m", "1", Some(2)),
        ("64Mi", "1Mi", Some(64)),
        ("-3", "2", Some(-1)),
        ("3", "-2", Some(-1)),
        ("1", "0", None),
    ] {
        let (quantity, divisor) = (read(quantity).unwrap(), read(divisor).unwrap());
        assert_eq!(quantity.divided_up(divisor), often, "{quantity:?} by {divisor:?}");
    }
}

#[test]
fn quantities_are_stored_in_canonical_form() {
    use crate::kinds::quantity::{canonical, round_up_to_milli};
    for (given, stored) in [
        ("1000m", "1"),
        ("0.5", "500m"),
        ("1024Mi", "1Gi"),
        ("1.5Gi", "1536Mi"),
        ("100Mi", "100Mi"),
        ("1000", "1k"),
        ("5e3", "5e3"),
        ("0", "0"),
        ("0Mi", "0"),
        ("512Ki", "512Ki"),
        ("1E", "1E"),
        ("100n", "100n"),
        ("-1", "-1"),
        ("1023", "1023"),
        ("110", "110"),
    ] {
        assert_eq!(canonical(given).as_deref(), Some(stored), "{given}");
    }
    assert_eq!(round_up_to_milli("100u").as_deref(), Some("1m"));
    assert_eq!(round_up_to_milli("1500m"), None);
    let mut pod = json!({"metadata": {"annotations": {"a": null}}, "spec": {"containers": [{"name": "a", "resources": {"limits": {"cpu": 1, "memory": "1024Mi"}}}]}});
    strategy("Pod").prune_unknown_fields(&mut pod);
    assert_eq!(pod["spec"]["containers"][0]["resources"]["limits"], json!({"cpu": "1", "memory": "1Gi"}));
    assert_eq!(pod["metadata"]["annotations"], json!({"a": ""}));
}
