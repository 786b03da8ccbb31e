//! Strategic merge patches and server-side apply on real kinds.

use std::sync::Arc;

use serde_json::{Value, json};

use super::apply::{Applier, apply, nothing};
use super::managed::{self, entries, same_but_times};
use super::strategic::strategic_merge;
use crate::resource::ResourceKind;

fn kind(name: &str) -> Arc<ResourceKind> {
    Arc::new(crate::kinds::builtin().into_iter().find(|kind| kind.gvk.kind == name).unwrap())
}

fn by(manager: &str) -> Applier<'_> {
    Applier { manager, force: false, subresource: "" }
}

fn merged(original: Value, patch: Value) -> Value {
    strategic_merge(kind("Pod").strategy.as_ref(), &original, &patch).unwrap()
}

#[test]
fn lists_merge_by_key_and_directives_are_obeyed() {
    let pod = json!({"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "1"}],
        "tolerations": [{"key": "x"}]}, "metadata": {"finalizers": ["f1", "f2"], "labels": {"k": "v", "l": "w"}}});
    let patched = merged(
        pod,
        json!({
        "spec": {"containers": [{"name": "b", "image": "2"}, {"name": "a", "$patch": "delete"}, {"name": "c"}],
            "$setElementOrder/containers": [{"name": "c"}, {"name": "b"}],
            "tolerations": [{"key": "y"}]},
        "metadata": {"$deleteFromPrimitiveList/finalizers": ["f1"], "finalizers": ["f3"], "labels": {"k": null}}}),
    );
    assert_eq!(patched["spec"]["containers"], json!([{"name": "c"}, {"name": "b", "image": "2"}]));
    assert_eq!(patched["spec"]["tolerations"], json!([{"key": "y"}]), "tolerations are replaced whole");
    assert_eq!(patched["metadata"]["finalizers"], json!(["f2", "f3"]));
    assert_eq!(patched["metadata"]["labels"], json!({"l": "w"}));
}

#[test]
fn maps_can_be_replaced_and_keep_only_named_keys() {
    let pod =
        json!({"metadata": {"labels": {"a": "1", "b": "2"}}, "spec": {"volumes": [{"name": "v", "emptyDir": {}}]}});
    let patched = merged(pod.clone(), json!({"metadata": {"labels": {"$patch": "replace", "c": "3"}}}));
    assert_eq!(patched["metadata"]["labels"], json!({"c": "3"}));
    let patched = merged(
        pod,
        json!({"spec": {"volumes": [
        {"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/x"}}]}}),
    );
    assert_eq!(patched["spec"]["volumes"], json!([{"name": "v", "hostPath": {"path": "/x"}}]));
}

#[test]
fn a_patch_item_without_its_key_is_refused() {
    let error = strategic_merge(
        kind("Pod").strategy.as_ref(),
        &json!({"spec": {"containers": []}}),
        &json!({"spec": {"containers": [{"image": "x"}]}}),
    );
    assert!(error.unwrap_err().message.contains("does not contain declared merge key: name"));
}

fn deployment(replicas: u32, containers: &[(&str, &str)]) -> Value {
    let containers: Vec<Value> = containers
        .iter()
        .map(|(name, image)| json!({"name": name, "image": image, "ports": [{"containerPort": 80}]}))
        .collect();
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "namespace": "default"},
        "spec": {"replicas": replicas, "template": {"spec": {"containers": containers}}}})
}

#[test]
fn what_a_manager_no_longer_applies_goes_unless_another_owns_it() {
    let kind = kind("Deployment");
    let one = apply(&kind, &nothing(), &deployment(2, &[("a", "1"), ("b", "1")]), &by("one")).unwrap();
    let two = apply(&kind, &one, &deployment(2, &[("b", "1")]), &by("two")).unwrap();
    assert_eq!(entries(&two).len(), 2);
    // One drops both containers: a goes, b is two's as well.
    let mut less = deployment(2, &[]);
    less["spec"].as_object_mut().unwrap().remove("template");
    let after = apply(&kind, &two, &less, &by("one")).unwrap();
    let names: Vec<&Value> =
        after["spec"]["template"]["spec"]["containers"].as_array().unwrap().iter().map(|c| &c["name"]).collect();
    assert_eq!(names, ["b"]);
    let again = apply(&kind, &after, &less, &by("one")).unwrap();
    assert!(same_but_times(&again, &after), "applying the same again changes nothing");
}

#[test]
fn another_value_conflicts_the_same_value_is_shared_and_force_takes_over() {
    let kind = kind("Deployment");
    let live = apply(&kind, &nothing(), &deployment(2, &[("a", "1")]), &by("one")).unwrap();
    let error = apply(&kind, &live, &deployment(3, &[("a", "1")]), &by("two")).unwrap_err();
    assert_eq!((error.code, error.reason.as_ref()), (409, "Conflict"));
    assert_eq!(error.details.unwrap()["causes"][0]["field"], ".spec.replicas");
    let forced = Applier { force: true, ..by("two") };
    let taken = apply(&kind, &live, &deployment(3, &[("a", "1")]), &forced).unwrap();
    let owners: Vec<String> = entries(&taken)
        .into_iter()
        .filter(|entry| entry.fields.paths().contains(&".spec.replicas".to_owned()))
        .map(|entry| entry.manager)
        .collect();
    assert_eq!(owners, ["two"]);
    let image = ".spec.template.spec.containers[name=\"a\"].image".to_owned();
    assert!(entries(&taken).iter().all(|entry| entry.fields.paths().contains(&image)), "the image is both's");
}

#[test]
fn an_update_takes_ownership_of_what_it_changes() {
    let kind = kind("Deployment");
    let live = apply(&kind, &nothing(), &deployment(2, &[("a", "1")]), &by("one")).unwrap();
    let mut scaled = live.clone();
    scaled["spec"]["replicas"] = json!(5);
    managed::track(&kind, Some(&live), &mut scaled, "scaler", "scale");
    let owner = entries(&scaled).into_iter().find(|entry| entry.fields.paths().contains(&".spec.replicas".to_owned()));
    let owner = owner.unwrap();
    assert_eq!(
        (owner.manager.as_str(), owner.operation.as_str(), owner.subresource.as_str()),
        ("scaler", "Update", "scale")
    );
    let error = apply(&kind, &scaled, &deployment(2, &[("a", "1")]), &by("one")).unwrap_err();
    assert!(
        error.message.contains("conflict with \"scaler\" with subresource \"scale\" using apps/v1: .spec.replicas"),
        "{error}"
    );
}
