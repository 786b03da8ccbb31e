use serde_json::{Value, json};

use super::{made, refused, refused_update, strategy};

fn template(labels: Value) -> Value {
    json!({"metadata": {"labels": labels}, "spec": {"containers": [{"name": "web", "image": "nginx"}]}})
}

fn workload(fields: Value) -> Value {
    let mut spec = json!({"selector": {"matchLabels": {"app": "web"}}, "template": template(json!({"app": "web"}))});
    spec.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    json!({"spec": spec})
}

#[test]
fn a_deployment_gets_the_defaults() {
    let made = made("Deployment", workload(json!({})));
    let spec = &made["spec"];
    assert_eq!(spec["replicas"], 1);
    assert_eq!(spec["revisionHistoryLimit"], 10);
    assert_eq!(spec["progressDeadlineSeconds"], 600);
    assert_eq!(
        spec["strategy"],
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}})
    );
    assert_eq!(spec["template"]["spec"]["restartPolicy"], "Always");
    assert_eq!(spec["template"]["spec"].get("enableServiceLinks"), None, "only pods get this, not templates");
}

#[test]
fn workloads_are_refused_in_the_words_of_kubernetes() {
    let cases: Vec<(&str, Value, Vec<&str>)> = vec![
        ("Deployment", workload(json!({})), vec![]),
        (
            "Deployment",
            workload(json!({"replicas": -1})),
            vec!["spec.replicas: Invalid value: -1: must be greater than or equal to 0"],
        ),
        ("Deployment", workload(json!({"selector": null})), vec!["spec.selector: Required value"]),
        (
            "Deployment",
            workload(json!({"selector": {}})),
            vec!["spec.selector: Invalid value: {}: empty selector is invalid for deployment"],
        ),
        (
            "Deployment",
            workload(json!({"template": template(json!({"app": "db"}))})),
            vec![
                "spec.template.metadata.labels: Invalid value: {\"app\":\"db\"}: `selector` does not match template `labels`",
            ],
        ),
        (
            "Deployment",
            workload(json!({"strategy": {"type": "Recreate", "rollingUpdate": {"maxSurge": 1}}})),
            vec!["spec.strategy.rollingUpdate: Forbidden: may not be specified when strategy `type` is 'Recreate'"],
        ),
        (
            "Deployment",
            workload(json!({"strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}})),
            vec!["spec.strategy.rollingUpdate.maxUnavailable: Invalid value: 0: may not be 0 when `maxSurge` is 0"],
        ),
        (
            "Deployment",
            workload(json!({"strategy": {"rollingUpdate": {"maxUnavailable": "150%"}}})),
            vec!["spec.strategy.rollingUpdate.maxUnavailable: Invalid value: \"150%\": must not be greater than 100%"],
        ),
        (
            "Deployment",
            workload(json!({"minReadySeconds": 700})),
            vec!["spec.progressDeadlineSeconds: Invalid value: 600: must be greater than minReadySeconds"],
        ),
        (
            "DaemonSet",
            workload(json!({"selector": {}})),
            vec!["spec.selector: Invalid value: {}: empty selector is invalid for daemonset"],
        ),
        (
            "DaemonSet",
            workload(json!({"updateStrategy": {"rollingUpdate": {"maxUnavailable": 1, "maxSurge": 1}}})),
            vec![
                "spec.updateStrategy.rollingUpdate.maxSurge: Invalid value: 1: may not be set when maxUnavailable is non-zero",
            ],
        ),
        (
            "StatefulSet",
            workload(json!({"podManagementPolicy": "Random"})),
            vec!["spec.podManagementPolicy: Invalid value: \"Random\": must be 'OrderedReady' or 'Parallel'"],
        ),
        (
            "Job",
            json!({"spec": {"template": template(json!({}))}}),
            vec!["spec.template.spec.restartPolicy: Required value: valid values: \"OnFailure\", \"Never\""],
        ),
        (
            "CronJob",
            json!({"spec": {"schedule": "* * *", "jobTemplate": {"spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "a", "image": "a"}]}}}}}}),
            vec!["spec.schedule: Invalid value: \"* * *\": expected exactly 5 fields, found 3: [* * *]"],
        ),
        (
            "PodDisruptionBudget",
            json!({"spec": {"minAvailable": 1, "maxUnavailable": 1}}),
            vec![
                "spec: Invalid value: {\"minAvailable\":1,\"maxUnavailable\":1}: minAvailable and maxUnavailable cannot be both set",
            ],
        ),
    ];
    for (kind, object, expected) in cases {
        assert_eq!(refused(kind, object.clone()), expected, "{kind} {object}");
    }
}

#[test]
fn errors_of_the_template_name_its_path() {
    let broken = json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "web"}]}});
    assert_eq!(
        refused("Deployment", workload(json!({"template": broken}))),
        vec!["spec.template.spec.containers[0].image: Required value"]
    );
}

#[test]
fn selectors_never_change() {
    for kind in ["Deployment", "ReplicaSet", "DaemonSet"] {
        let refusal = refused_update(kind, workload(json!({})), |object| {
            object["spec"]["selector"] = json!({"matchLabels": {"app": "db"}});
            object["spec"]["template"]["metadata"]["labels"] = json!({"app": "db"});
        });
        assert_eq!(
            refusal,
            vec!["spec.selector: Invalid value: {\"matchLabels\":{\"app\":\"db\"}}: field is immutable"],
            "{kind}"
        );
    }
}

#[test]
fn a_stateful_set_changes_only_what_may_change() {
    let scaled = refused_update("StatefulSet", workload(json!({})), |object| object["spec"]["replicas"] = json!(3));
    assert_eq!(scaled, Vec::<String>::new());
    let renamed = refused_update("StatefulSet", workload(json!({"serviceName": "a"})), |object| {
        object["spec"]["serviceName"] = json!("b")
    });
    assert_eq!(
        renamed,
        vec![
            "spec: Forbidden: updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden"
        ]
    );
}

#[test]
fn a_stateful_set_may_mount_its_claims() {
    let mut object = workload(
        json!({"volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"]}}]}),
    );
    object["spec"]["template"]["spec"]["containers"][0]["volumeMounts"] =
        json!([{"name": "data", "mountPath": "/data"}]);
    assert_eq!(refused("StatefulSet", object), Vec::<String>::new());
}

#[test]
fn a_job_finds_its_pods_by_its_own_uid() {
    let uid = "11111111-2222-3333-4444-555555555555";
    let mut template = template(json!({}));
    template["spec"]["restartPolicy"] = json!("Never");
    let object = json!({"spec": {"template": template}});
    assert_eq!(refused("Job", object.clone()), Vec::<String>::new());
    let made = made("Job", object);
    assert_eq!(made["spec"]["selector"], json!({"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}));
    let labels = &made["spec"]["template"]["metadata"]["labels"];
    for (key, value) in [
        ("controller-uid", uid),
        ("batch.kubernetes.io/controller-uid", uid),
        ("job-name", "thing"),
        ("batch.kubernetes.io/job-name", "thing"),
    ] {
        assert_eq!(labels[key], value);
    }
    assert_eq!((&made["spec"]["completions"], &made["spec"]["backoffLimit"]), (&json!(1), &json!(6)));
}

#[test]
fn the_generation_rises_with_the_spec_and_not_with_labels() {
    let old = made("Deployment", workload(json!({})));
    let strategy = strategy("Deployment");
    let mut labelled = old.clone();
    labelled["metadata"]["labels"] = json!({"a": "b"});
    strategy.prepare_update(&mut labelled, &old);
    assert_eq!(labelled["metadata"]["generation"], 1);
    let mut scaled = old.clone();
    scaled["spec"]["replicas"] = json!(5);
    scaled["status"] = json!({"replicas": 99});
    strategy.prepare_update(&mut scaled, &old);
    assert_eq!(scaled["metadata"]["generation"], 2);
    assert_eq!(scaled["status"], old["status"]);
}
