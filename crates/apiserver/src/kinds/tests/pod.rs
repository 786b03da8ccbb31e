use serde_json::{Value, json};

use super::{LABEL, PORT, SUBDOMAIN, made, refused, refused_update, strategy};

fn pod(spec: Value) -> Value {
    let mut spec = spec;
    spec.as_object_mut().unwrap().entry("containers").or_insert(json!([{"name": "web", "image": "nginx"}]));
    json!({"spec": spec})
}

fn container(fields: Value) -> Value {
    let mut container = json!({"name": "web", "image": "nginx"});
    container.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    json!({"spec": {"containers": [container]}})
}

#[test]
fn a_plain_pod_is_accepted_and_gets_the_defaults() {
    assert_eq!(refused("Pod", pod(json!({}))), Vec::<String>::new());
    let made = made("Pod", pod(json!({})));
    let spec = &made["spec"];
    assert_eq!(spec["restartPolicy"], "Always");
    assert_eq!(spec["dnsPolicy"], "ClusterFirst");
    assert_eq!(spec["terminationGracePeriodSeconds"], 30);
    assert_eq!(spec["schedulerName"], "default-scheduler");
    assert_eq!(spec["enableServiceLinks"], true);
    assert_eq!(spec["securityContext"], json!({}));
    let container = &spec["containers"][0];
    assert_eq!(container["imagePullPolicy"], "Always", "no tag means latest");
    assert_eq!(container["terminationMessagePath"], "/dev/termination-log");
    assert_eq!(container["terminationMessagePolicy"], "File");
    assert_eq!(container["resources"], json!({}));
    assert_eq!(made["status"], json!({"phase": "Pending", "qosClass": "BestEffort"}));
    assert_eq!(made["metadata"]["generation"], 1);
}

#[test]
fn the_pull_policy_follows_the_tag() {
    for (image, policy) in [
        ("nginx", "Always"),
        ("nginx:latest", "Always"),
        ("nginx:1.27", "IfNotPresent"),
        ("registry:5000/nginx", "Always"),
        ("registry:5000/nginx:1", "IfNotPresent"),
        ("nginx@sha256:0123", "IfNotPresent"),
    ] {
        let made = made("Pod", pod(json!({"containers": [{"name": "web", "image": image}]})));
        assert_eq!(made["spec"]["containers"][0]["imagePullPolicy"], policy, "{image}");
    }
}

#[test]
fn the_service_class_follows_requests_and_limits() {
    for (resources, class) in [
        (json!({}), "BestEffort"),
        (json!({"requests": {"cpu": "100m"}}), "Burstable"),
        (json!({"limits": {"cpu": "1", "memory": "1Gi"}}), "Guaranteed"),
        (json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}}), "Burstable"),
        (json!({"limits": {"cpu": "1"}}), "Burstable"),
    ] {
        assert_eq!(made("Pod", container(json!({"resources": resources})))["status"]["qosClass"], class, "{resources}");
    }
}

#[test]
fn pods_are_refused_in_the_words_of_kubernetes() {
    let cases: Vec<(Value, Vec<String>)> = vec![
        (json!({"spec": {"containers": []}}), vec!["spec.containers: Required value".into()]),
        (json!({"spec": {"containers": [{"name": "web"}]}}), vec!["spec.containers[0].image: Required value".into()]),
        (json!({"spec": {"containers": [{"image": "x"}]}}), vec!["spec.containers[0].name: Required value".into()]),
        (
            json!({"spec": {"containers": [{"name": "Web", "image": "x"}]}}),
            vec![format!("spec.containers[0].name: Invalid value: \"Web\": {LABEL}")],
        ),
        (
            json!({"spec": {"containers": [{"name": "a", "image": "x"}, {"name": "a", "image": "x"}]}}),
            vec!["spec.containers[1].name: Duplicate value: \"a\"".into()],
        ),
        (
            container(json!({"ports": [{"containerPort": 70000}]})),
            vec![format!("spec.containers[0].ports[0].containerPort: Invalid value: 70000: {PORT}")],
        ),
        (
            container(json!({"ports": [{"containerPort": 80, "protocol": "ICMP"}]})),
            vec!["spec.containers[0].ports[0].protocol: Unsupported value: \"ICMP\": supported values: \"SCTP\", \"TCP\", \"UDP\"".into()],
        ),
        (
            container(json!({"ports": [{"containerPort": 80, "name": "this-name-is-too-long"}]})),
            vec!["spec.containers[0].ports[0].name: Invalid value: \"this-name-is-too-long\": must be no more than 15 characters".into()],
        ),
        (
            container(json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]})),
            vec!["spec.containers[0].volumeMounts[0].name: Not found: \"data\"".into()],
        ),
        (
            container(json!({"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}})),
            vec!["spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1".into()],
        ),
        (
            container(json!({"imagePullPolicy": "Sometimes"})),
            vec!["spec.containers[0].imagePullPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \"IfNotPresent\", \"Never\"".into()],
        ),
        (
            container(json!({"livenessProbe": {"httpGet": {"port": 0}}})),
            vec![format!("spec.containers[0].livenessProbe.httpGet.port: Invalid value: 0: {PORT}")],
        ),
        (
            container(json!({"readinessProbe": {}})),
            vec!["spec.containers[0].readinessProbe: Required value: must specify a handler type".into()],
        ),
        (
            container(json!({"env": [{"name": "A=B", "value": "x"}]})),
            vec!["spec.containers[0].env[0].name: Invalid value: \"A=B\": a valid environment variable name must consist only of printable ASCII characters other than '='".into()],
        ),
        (
            pod(json!({"restartPolicy": "Maybe"})),
            vec!["spec.restartPolicy: Unsupported value: \"Maybe\": supported values: \"Always\", \"OnFailure\", \"Never\"".into()],
        ),
        (pod(json!({"hostname": "a.b"})), vec!["spec.hostname: Invalid value: \"a.b\": must not contain dots".into()]),
        (
            pod(json!({"dnsPolicy": "None"})),
            vec!["spec.dnsConfig: Required value: must provide `dnsConfig` when `dnsPolicy` is None".into()],
        ),
        (
            pod(json!({"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]})),
            vec!["spec.tolerations[0].operator: Invalid value: \"b\": value must be empty when `operator` is 'Exists'".into()],
        ),
        (
            pod(json!({"nodeName": "Node_1"})),
            vec![format!("spec.nodeName: Invalid value: \"Node_1\": {SUBDOMAIN}")],
        ),
        (
            json!({"metadata": {"name": "Bad_Name"}, "spec": {"containers": [{"name": "web", "image": "nginx"}]}}),
            vec![format!("metadata.name: Invalid value: \"Bad_Name\": {SUBDOMAIN}")],
        ),
        (
            pod(json!({"volumes": [{"name": "v", "emptyDir": {}, "hostPath": {"path": "/x"}}]})),
            vec!["spec.volumes[0].hostPath: Forbidden: may not specify more than 1 volume type".into()],
        ),
    ];
    for (object, expected) in cases {
        assert_eq!(refused("Pod", object.clone()), expected, "{object}");
    }
}

#[test]
fn labels_are_checked_key_and_value() {
    let object = |labels: Value| json!({"metadata": {"labels": labels}, "spec": {"containers": [{"name": "web", "image": "nginx"}]}});
    let long = "x".repeat(64);
    assert_eq!(
        refused("Pod", object(json!({"a": long}))),
        vec![format!("metadata.labels: Invalid value: \"{long}\": must be no more than 63 bytes")]
    );
    assert_eq!(
        refused("Pod", object(json!({"-a": "b"}))),
        vec![
            "metadata.labels: Invalid value: \"-a\": name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
        ]
    );
    assert_eq!(
        refused("Pod", object(json!({"a": "b c"}))),
        vec![
            "metadata.labels: Invalid value: \"b c\": a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
        ]
    );
}

#[test]
fn an_update_changes_images_only() {
    let base = || pod(json!({"nodeName": "n1"}));
    let change =
        |pointer: &'static str, value: Value| move |pod: &mut Value| *pod.pointer_mut(pointer).unwrap() = value;
    assert_eq!(
        refused_update("Pod", base(), change("/spec/containers/0/image", json!("nginx:2"))),
        Vec::<String>::new()
    );
    let refusal = refused_update("Pod", base(), change("/spec/nodeName", json!("n2")));
    assert_eq!(refusal.len(), 1);
    assert!(
        refusal[0].starts_with("spec: Forbidden: pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)\n"),
        "{refusal:?}"
    );
    assert!(refusal[0].contains("- spec.nodeName: \"n1\"\n+ spec.nodeName: \"n2\""), "{refusal:?}");
    let more = refused_update("Pod", base(), |pod| {
        pod["spec"]["containers"].as_array_mut().unwrap().push(json!({"name": "b", "image": "b"}));
    });
    assert_eq!(more, vec!["spec.containers: Forbidden: pod updates may not add or remove containers"]);
    let added =
        refused_update("Pod", base(), |pod| pod["spec"]["tolerations"] = json!([{"key": "a", "operator": "Exists"}]));
    assert_eq!(added, Vec::<String>::new());
}

#[test]
fn an_update_that_leaves_out_defaults_does_not_raise_the_generation() {
    let old = made("Pod", pod(json!({})));
    let strategy = strategy("Pod");
    let mut same = pod(json!({}));
    same["metadata"] = old["metadata"].clone();
    strategy.prepare_update(&mut same, &old);
    assert_eq!(same["metadata"]["generation"], 1);
    assert_eq!(same["status"], old["status"], "the main endpoint leaves status alone");
    same["spec"]["containers"][0]["image"] = json!("nginx:2");
    strategy.prepare_update(&mut same, &old);
    assert_eq!(same["metadata"]["generation"], 2);
}

#[test]
fn the_status_endpoint_changes_nothing_but_status() {
    let old = made("Pod", pod(json!({})));
    let mut new = old.clone();
    new["spec"]["nodeName"] = json!("n9");
    new["status"] = json!({"phase": "Running", "podIP": "10.1.2.3", "podIPs": [{"ip": "10.1.2.3"}]});
    let strategy = strategy("Pod");
    strategy.prepare_status_update(&mut new, &old);
    assert_eq!(new["spec"], old["spec"]);
    assert_eq!(new["status"]["phase"], "Running");
    assert_eq!(new["status"]["qosClass"], "BestEffort");
    let mut single = old.clone();
    single["status"] = json!({"phase": "Running", "podIP": "10.1.2.3"});
    strategy.prepare_status_update(&mut single, &old);
    strategy.default_object(&mut single);
    assert_eq!(single["status"]["podIPs"], json!([{"ip": "10.1.2.3"}]), "one address stands for the list");
}

#[test]
fn field_selectors_see_node_and_phase() {
    let strategy = strategy("Pod");
    let object = made("Pod", pod(json!({"nodeName": "n1"})));
    assert_eq!(strategy.selectable_field("spec.nodeName", &object).as_deref(), Some("n1"));
    assert_eq!(strategy.selectable_field("status.phase", &object).as_deref(), Some("Pending"));
    assert_eq!(strategy.selectable_field("status.podIP", &Value::Null).as_deref(), Some(""));
    assert_eq!(strategy.selectable_field("spec.volumes", &object), None);
}
