use serde_json::{Value, json};

use super::{v2, v3};

fn schema<'a>(document: &'a Value, name: &str) -> &'a Value {
    &document["components"]["schemas"][name]
}

#[test]
fn every_reference_has_a_target() {
    fn walk(value: &Value, root: &Value, missing: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                let target = map.get("$ref").and_then(Value::as_str);
                if let Some(target) = target.filter(|target| root.pointer(&target[1..]).is_none()) {
                    missing.push(target.to_owned());
                }
                map.values().for_each(|value| walk(value, root, missing));
            }
            Value::Array(items) => items.iter().for_each(|value| walk(value, root, missing)),
            _ => {}
        }
    }
    let mut missing = Vec::new();
    let swagger = v2();
    walk(&swagger, &swagger, &mut missing);
    for row in crate::kinds::table::ROWS {
        let document = v3(row.group, row.version).unwrap();
        walk(&document, &document, &mut missing);
    }
    assert_eq!(missing, Vec::<String>::new());
}

#[test]
fn explain_finds_the_kind_by_path_and_its_schema_by_kind() {
    let document = v3("apps", "v1").unwrap();
    let get = &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["get"];
    let gvk = json!({"group": "apps", "kind": "Deployment", "version": "v1"});
    assert_eq!(get["x-kubernetes-group-version-kind"], gvk);
    let deployment = schema(&document, "io.k8s.api.apps.v1.Deployment");
    assert_eq!(deployment["x-kubernetes-group-version-kind"], json!([gvk]));
    assert_eq!(
        deployment["properties"]["spec"]["allOf"],
        json!([{"$ref": "#/components/schemas/io.k8s.api.apps.v1.DeploymentSpec"}])
    );
}

#[test]
fn kubectl_sees_that_the_server_validates_fields() {
    let document = v3("", "v1").unwrap();
    let patch = &document["paths"]["/api/v1/namespaces/{namespace}/pods/{name}"]["patch"];
    let names: Vec<&str> = patch["parameters"].as_array().unwrap().iter().filter_map(|p| p["name"].as_str()).collect();
    assert!(names.contains(&"fieldValidation"), "{names:?}");
}

#[test]
fn lists_say_how_they_merge() {
    let document = v3("", "v1").unwrap();
    let ports = &schema(&document, "io.k8s.api.core.v1.Container")["properties"]["ports"];
    assert_eq!(ports["x-kubernetes-list-type"], "map");
    assert_eq!(ports["x-kubernetes-list-map-keys"], json!(["containerPort", "protocol"]));
    assert_eq!(ports["x-kubernetes-patch-merge-key"], "containerPort");
    let volumes = &schema(&document, "io.k8s.api.core.v1.PodSpec")["properties"]["volumes"];
    assert_eq!(volumes["x-kubernetes-patch-strategy"], "merge,retainKeys");
    assert_eq!(
        schema(&document, "io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelector")["x-kubernetes-map-type"],
        "atomic"
    );
}

#[test]
fn unknown_group_versions_have_no_document() {
    assert_eq!(v3("apps", "v1beta1"), None);
    assert_eq!(v3("example.com", "v1"), None);
}
