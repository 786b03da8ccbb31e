//! `deploy/towpath.yaml` in an API server: it is accepted, what the agents' and the controller's accounts may do, and that a node's
//! agent writes what is its own and nothing else.
//!
//! The embedded API server keeps admission policies and does not run them; the policy's own expressions are evaluated here instead,
//! over requests as an API server shows them to a policy.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what failed by panicking, in its helpers too"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use towpath_apiserver::{ApiServer, Config, UserInfo};
use towpath_model::custom::{
    Acceleration, AddressPool, AddressPoolSpec, BackendName, Duty, GivenAddress, MasqueradeConfig, NetworkConfig,
    NetworkConfigSpec, NodeNetwork, NodeNetworkSpec, NodeNetworkStatus, PeerBehind, UdpConfig, VxlanConfig,
};

fn deploy(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy").join(file)
}

fn documents(file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(deploy(file)).unwrap();
    serde_saphyr::from_multiple::<Value>(&text).unwrap().into_iter().filter(|object| !object.is_null()).collect()
}

struct Server {
    api: ApiServer,
    dir: tempfile::TempDir,
}

impl Server {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let api = ApiServer::start(Config::new(dir.path().join("data"))).await.unwrap();
        Self { api, dir }
    }

    fn client(&self, user: UserInfo) -> Client {
        Client::new(self.api.loopback(user), "default")
    }

    fn admin(&self) -> Client {
        self.client(UserInfo::admin())
    }

    /// As the token of a service account of ours shows itself.
    fn account(&self, name: &str) -> Client {
        let groups = ["system:serviceaccounts", "system:serviceaccounts:kube-system"];
        self.client(UserInfo::new(format!("system:serviceaccount:kube-system:{name}"), &groups))
    }

    /// With everything of a file in it, which every field of every object must survive.
    async fn installed(file: &str) -> Self {
        let server = Self::start().await;
        let strict = PostParams { field_manager: Some("test".to_owned()), ..PostParams::default() };
        for object in documents(file) {
            let object: DynamicObject = serde_json::from_value(object).unwrap();
            let name = format!("{:?} {:?}", object.types, object.metadata.name);
            let api = dynamic(&server.admin(), &object);
            api.create(&strict, &object).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        server
    }
}

fn dynamic(client: &Client, object: &DynamicObject) -> Api<DynamicObject> {
    let types = object.types.clone().unwrap();
    let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(&types).unwrap());
    match &object.metadata.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, kube::Error>) -> u16 {
    match result {
        Ok(_) => 200,
        Err(kube::Error::Api(status)) => status.code,
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_applies_it_and_a_second_time_changes_nothing() {
    if Command::new("kubectl").arg("version").arg("--client").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "no kubectl here, and CI has one");
        println!("skipped: no kubectl here");
        return;
    }
    let server = Server::start().await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    server.api.serve(listener).unwrap();
    let admin = server.api.client_credentials("kubernetes-admin", &["system:masters"]).unwrap();
    let kubeconfig = server.dir.path().join("kubeconfig");
    std::fs::write(&kubeconfig, server.api.kubeconfig(&url, &admin)).unwrap();
    let home = server.dir.path().to_owned();
    let kubectl = move |arguments: &[&str]| {
        let output =
            Command::new("kubectl").env("KUBECONFIG", &kubeconfig).env("HOME", &home).args(arguments).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{arguments:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
        said
    };
    let file = deploy("towpath.yaml");
    let cleaner = deploy("towpath-uninstall.yaml");
    tokio::task::spawn_blocking(move || {
        let (file, cleaner) = (file.to_str().unwrap(), cleaner.to_str().unwrap());
        let first = kubectl(&["apply", "--validate=strict", "-f", file]);
        let objects = documents("towpath.yaml").len();
        assert_eq!(first.lines().filter(|line| line.ends_with(" created")).count(), objects, "{first}");
        let second = kubectl(&["apply", "-f", file]);
        assert_eq!(second.lines().filter(|line| line.ends_with(" unchanged")).count(), objects, "{second}");
        // Another manager, and the server's own idea of who owns what.
        let server_side = kubectl(&["apply", "--server-side", "--force-conflicts", "-f", file]);
        assert_eq!(server_side.lines().count(), objects, "{server_side}");
        assert!(kubectl(&["get", "netcfg,nodenet"]).is_empty(), "our kinds by their short names");
        kubectl(&["delete", "-f", file, "--wait=false"]);
        kubectl(&["apply", "--validate=strict", "-f", cleaner]);
        kubectl(&["delete", "-f", cleaner, "--wait=false"]);
    })
    .await
    .unwrap();
}

fn whole_config() -> NetworkConfigSpec {
    NetworkConfigSpec {
        backend: Some(BackendName::Vxlan),
        vxlan: Some(VxlanConfig { vni: Some(116), port: Some(8472) }),
        udp: Some(UdpConfig { port: Some(8285) }),
        cluster_cidrs: Some(vec!["10.244.0.0/16".to_owned(), "fd00:8::/48".to_owned()]),
        service_cidrs: Some(vec!["10.96.0.0/12".to_owned()]),
        non_masquerade_cidrs: Some(vec!["192.168.0.0/16".to_owned()]),
        masquerade: Some(MasqueradeConfig { ipv4: Some(true), ipv6: Some(false) }),
        external_cidrs: Some(vec!["203.0.113.0/24".to_owned(), "2001:db8::/32".to_owned()]),
        node_port_addresses: Some(vec!["192.0.2.0/24".to_owned(), "2001:db8::/64".to_owned()]),
        direct_server_return: Some(true),
        service_acceleration: Some(Acceleration::BestEffort),
        devices: Some(vec!["eth1".to_owned(), "bond*".to_owned()]),
        mtu: Some(1400),
        service_proxy: Some(Duty::Off),
        dns: Some(Duty::Towpath),
        cluster_dns: Some(vec!["10.96.0.10".to_owned(), "fd00:9::a".to_owned()]),
        cluster_domain: Some("cluster.local".to_owned()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn our_types_are_what_the_definitions_say() {
    let server = Server::installed("towpath.yaml").await;
    // A field that the definition does not know would be dropped, and one it types otherwise refused.
    let configs: Api<NetworkConfig> = Api::all(server.admin());
    let written = configs.create(&PostParams::default(), &NetworkConfig::new(whole_config())).await.unwrap();
    assert_eq!(written.spec, whole_config());
    assert_eq!(written.metadata.generation, Some(1));

    let rack = LabelSelector { match_labels: Some([("rack".to_owned(), "a".to_owned())].into()), ..Default::default() };
    let pool = AddressPoolSpec {
        addresses: vec!["192.0.2.0/28".to_owned()],
        service_selector: Some(rack.clone()),
        namespace_selector: Some(rack.clone()),
        auto_assign: Some(false),
        allow_sharing_across_namespaces: Some(true),
        node_selector: Some(rack),
    };
    let pools: Api<AddressPool> = Api::all(server.admin());
    let written = pools.create(&PostParams::default(), &AddressPool::new("lan", pool.clone())).await.unwrap();
    assert_eq!(written.spec, pool);

    let nodes: Api<NodeNetwork> = Api::all(server.admin());
    let spec = NodeNetworkSpec {
        tunnel_address: Some("fd00::1".to_owned()),
        tunnel_mac: Some("02:00:c0:00:02:01".to_owned()),
        pod_cidrs: vec!["10.244.1.0/24".to_owned(), "10.245.1.0/24".to_owned(), "fd00:1::/64".to_owned()],
        added_pod_cidrs: vec!["10.245.1.0/24".to_owned()],
    };
    let node = nodes.create(&PostParams::default(), &NodeNetwork::new("n1", spec.clone())).await.unwrap();
    assert_eq!(node.spec, spec);
    let condition = serde_json::from_value(json!({
        "type": "Ready", "status": "True", "reason": "Synced", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z",
    }));
    let status = NodeNetworkStatus {
        service_proxy: Some("kube-proxy".to_owned()),
        dns: Some("stand-in".to_owned()),
        backend: Some(BackendName::HostGw),
        receive_ready: vec![BackendName::Vxlan, BackendName::HostGw],
        pod_mtu: Some(1450),
        peers_behind: vec![PeerBehind {
            node: "n2".to_owned(),
            backend: "vxlan".to_owned(),
            reason: "BeyondRouter".to_owned(),
        }],
        peers_behind_count: Some(1),
        network_config_generation: Some(1),
        agent_version: Some("0.1.0".to_owned()),
        pods: vec![GivenAddress {
            namespace: "default".to_owned(),
            name: "web".to_owned(),
            uid: "u".to_owned(),
            ips: vec!["10.244.1.2".to_owned(), "fd00:8::2".to_owned()],
        }],
        conditions: vec![condition.unwrap()],
    };
    let patch = json!({"apiVersion": "towpath.dev/v1alpha1", "kind": "NodeNetwork", "status": status});
    let params = PatchParams::apply("agent").validation_strict();
    let node = nodes.patch_status("n1", &params, &Patch::Apply(&patch)).await.unwrap();
    assert_eq!(node.status.unwrap(), status);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_configuration_is_refused() {
    let server = Server::installed("towpath.yaml").await;
    let configs: Api<DynamicObject> = Api::all_with(
        server.admin(),
        &ApiResource::from_gvk(&GroupVersionKind::gvk("towpath.dev", "v1alpha1", "NetworkConfig")),
    );
    for (spec, field) in [
        (json!({"mtu": 1279}), "spec.mtu"),
        (json!({"clusterCIDRs": ["10.244.0.0"]}), "spec.clusterCIDRs"),
        (json!({"clusterCIDRs": []}), "spec.clusterCIDRs"),
        (json!({"serviceCIDRs": ["10.0.0.0/16", "fd00::/108", "10.1.0.0/16"]}), "spec.serviceCIDRs"),
        (json!({"backend": "carrier-pigeon"}), "spec.backend"),
        (json!({"vxlan": {"vni": 16_777_216}}), "spec.vxlan.vni"),
        (json!({"nodePortAddresses": ["192.0.2.1"]}), "spec.nodePortAddresses"),
        (json!({"nodePortAddresses": ["secondary"]}), "spec.nodePortAddresses"),
        (json!({"dns": "maybe"}), "spec.dns"),
        (json!({"clusterDNS": ["ten"]}), "spec.clusterDNS"),
        (json!({"clusterDomain": "Cluster.Local."}), "spec.clusterDomain"),
    ] {
        let object = json!({
            "apiVersion": "towpath.dev/v1alpha1", "kind": "NetworkConfig", "metadata": {"name": "default"}, "spec": spec,
        });
        let object: DynamicObject = serde_json::from_value(object).unwrap();
        match configs.create(&PostParams::default(), &object).await {
            Err(kube::Error::Api(status)) => {
                assert!(status.code == 422 && status.message.contains(field), "{spec}: {}", status.message);
            }
            other => panic!("{spec}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_reads_what_a_network_is_made_of_and_changes_nobodys_service_node_or_pool() {
    let server = Server::installed("towpath.yaml").await;
    let agent = server.account("towpath-agent");
    let service = json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}});
    let node = json!({"metadata": {"name": "n2"}});
    let services: Api<core::Service> = Api::namespaced(server.admin(), "default");
    services.create(&PostParams::default(), &serde_json::from_value(service).unwrap()).await.unwrap();
    let nodes: Api<core::Node> = Api::all(server.admin());
    nodes.create(&PostParams::default(), &serde_json::from_value(node).unwrap()).await.unwrap();

    assert_eq!(code(Api::<core::Service>::all(agent.clone()).list(&Default::default()).await), 200);
    assert_eq!(code(Api::<NetworkConfig>::all(agent.clone()).list(&Default::default()).await), 200);
    assert_eq!(code(Api::<core::Secret>::all(agent.clone()).list(&Default::default()).await), 403);
    assert_eq!(code(Api::<core::ConfigMap>::namespaced(agent.clone(), "kube-system").get("towpath").await), 403);
    let merge = |patch: Value| Patch::Merge(patch);
    let params = PatchParams::default();
    let status = merge(json!({"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}}));
    let own_services: Api<core::Service> = Api::namespaced(agent.clone(), "default");
    assert_eq!(code(own_services.patch_status("s", &params, &status).await), 403);
    assert_eq!(
        code(own_services.patch("s", &params, &merge(json!({"spec": {"externalIPs": ["192.0.2.1"]}}))).await),
        403
    );
    let own_nodes: Api<core::Node> = Api::all(agent.clone());
    // Of which node, is the admission policy's to say.
    assert_eq!(code(own_nodes.delete("n2", &Default::default()).await), 403);
    let configs: Api<NetworkConfig> = Api::all(agent.clone());
    assert_eq!(code(configs.create(&PostParams::default(), &NetworkConfig::new(whole_config())).await), 403);
    let own: Api<NodeNetwork> = Api::all(agent);
    assert_eq!(
        code(own.create(&PostParams::default(), &NodeNetwork::new("n1", NodeNetworkSpec::default())).await),
        200
    );
    assert_eq!(code(own.delete("n1", &Default::default()).await), 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_controller_leads_and_gives_ranges_and_no_more() {
    use k8s_openapi::api::coordination::v1::Lease;
    let server = Server::installed("towpath.yaml").await;
    let controller = server.account("towpath-controller");
    let nodes: Api<core::Node> = Api::all(server.admin());
    nodes
        .create(&PostParams::default(), &serde_json::from_value(json!({"metadata": {"name": "n1"}})).unwrap())
        .await
        .unwrap();
    let ranges = Patch::Merge(json!({"spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]}}));
    let own_nodes: Api<core::Node> = Api::all(controller.clone());
    assert_eq!(code(own_nodes.patch("n1", &PatchParams::default(), &ranges).await), 200);
    let lease = |name: &str| Lease {
        metadata: kube::api::ObjectMeta { name: Some(name.to_owned()), ..Default::default() },
        ..Default::default()
    };
    let leases: Api<Lease> = Api::namespaced(controller.clone(), "kube-system");
    let ours = leases.create(&PostParams::default(), &lease("towpath-controller")).await.unwrap();
    assert_eq!(code(leases.replace("towpath-controller", &PostParams::default(), &ours).await), 200);
    let all: Api<Lease> = Api::namespaced(server.admin(), "kube-system");
    let foreign = all.create(&PostParams::default(), &lease("kube-scheduler")).await.unwrap();
    assert_eq!(code(leases.replace("kube-scheduler", &PostParams::default(), &foreign).await), 403);
    all.create(&PostParams::default(), &lease("towpath-lb-192-0-2-1")).await.unwrap();
    assert_eq!(code(leases.list(&Default::default()).await), 200);
    assert_eq!(code(leases.delete("towpath-lb-192-0-2-1", &Default::default()).await), 200);
    assert_eq!(code(Api::<core::Pod>::all(controller.clone()).list(&Default::default()).await), 403);
    let services: Api<core::Service> = Api::namespaced(controller.clone(), "default");
    let externals = Patch::Merge(json!({"spec": {"externalIPs": ["192.0.2.1"]}}));
    assert_eq!(code(services.patch("kubernetes", &PatchParams::default(), &externals).await), 403, "its status only");
    assert_eq!(code(Api::<core::Secret>::all(controller).list(&Default::default()).await), 403);
}

/// The admission policy, run as an API server runs one: conditions, variables in order, validations.
struct Policy(Value);

impl Policy {
    fn load() -> Self {
        Self::named("towpath-node-writes-its-own")
    }

    fn named(name: &str) -> Self {
        let is_it =
            |object: &Value| object["kind"] == "ValidatingAdmissionPolicy" && object["metadata"]["name"] == name;
        Self(documents("towpath.yaml").into_iter().find(is_it).unwrap())
    }

    fn evaluate(expression: &str, names: &[(&str, &Value)]) -> Value {
        let program = cel::Program::compile(expression).unwrap_or_else(|error| panic!("{expression}: {error}"));
        let mut context = cel::Context::default();
        for (name, value) in names {
            context.add_variable(*name, cel::to_value(value).unwrap()).unwrap();
        }
        program.execute(&context).unwrap_or_else(|error| panic!("{expression}: {error}")).json().unwrap()
    }

    /// Why the request is refused; none: it is let through.
    fn refuses(&self, request: &Value, object: &Value, old: &Value) -> Option<String> {
        let spec = &self.0["spec"];
        let each = |field: &str| spec[field].as_array().unwrap().clone();
        let text = |value: &Value, field: &str| value[field].as_str().unwrap_or_default().to_owned();
        let mut variables = json!({});
        let run = |expression: &str, variables: &Value| {
            Self::evaluate(
                expression,
                &[("request", request), ("object", object), ("oldObject", old), ("variables", variables)],
            )
        };
        let each = |field: &str| if spec[field].is_null() { Vec::new() } else { each(field) };
        if each("matchConditions")
            .iter()
            .any(|condition| run(&text(condition, "expression"), &variables) != json!(true))
        {
            return None;
        }
        for variable in each("variables") {
            let value = run(&text(&variable, "expression"), &variables);
            variables[text(&variable, "name")] = value;
        }
        for validation in each("validations") {
            if run(&text(&validation, "expression"), &variables) != json!(true) {
                let message = text(&validation, "messageExpression");
                return Some(match message.is_empty() {
                    true => text(&validation, "message"),
                    false => run(&message, &variables).as_str().unwrap().to_owned(),
                });
            }
        }
        None
    }

    /// Whether the resource and operation are the policy's to look at.
    fn covers(&self, group: &str, resource: &str, operation: &str) -> bool {
        let has = |list: &Value, wanted: &str| list.as_array().unwrap().iter().any(|item| item == wanted);
        self.0["spec"]["matchConstraints"]["resourceRules"].as_array().unwrap().iter().any(|rule| {
            has(&rule["apiGroups"], group) && has(&rule["resources"], resource) && has(&rule["operations"], operation)
        })
    }
}

fn request(operation: &str, user: &str, node: Option<&str>) -> Value {
    let mut request = json!({
        "operation": operation, "userInfo": {"username": user, "groups": []}, "resource": {"resource": "nodenetworks"},
    });
    if let Some(node) = node {
        request["userInfo"]["extra"] = json!({
            "authentication.kubernetes.io/node-name": [node], "authentication.kubernetes.io/pod-name": ["towpath-x"],
        });
    }
    request
}

const AGENT: &str = "system:serviceaccount:kube-system:towpath-agent";

#[test]
fn a_node_writes_its_own_object_and_no_others() {
    let policy = Policy::load();
    let object = |name: &str| json!({"metadata": {"name": name}});
    let none = Value::Null;
    for operation in ["CREATE", "UPDATE"] {
        let from_n1 = request(operation, AGENT, Some("n1"));
        assert_eq!(policy.refuses(&from_n1, &object("n1"), &none), None);
        let refused = policy.refuses(&from_n1, &object("n2"), &none).unwrap();
        assert!(refused.contains("node n1") && refused.contains("node n2"), "{refused}");
    }
    let delete = request("DELETE", AGENT, Some("n1"));
    assert_eq!(policy.refuses(&delete, &none, &object("n1")), None);
    assert!(policy.refuses(&delete, &none, &object("n2")).is_some());
    // A token that is bound to no pod, as an old cluster or a person makes it, may write nothing.
    let unbound = policy.refuses(&request("UPDATE", AGENT, None), &object("n1"), &none).unwrap();
    assert!(unbound.contains("names no node"), "{unbound}");
    let mut several = request("UPDATE", AGENT, Some("n1"));
    several["userInfo"]["extra"]["authentication.kubernetes.io/node-name"] = json!(["n1", "n2"]);
    assert!(policy.refuses(&several, &object("n1"), &none).is_some());
    // Others are not its business: RBAC decides.
    assert_eq!(policy.refuses(&request("UPDATE", "kubernetes-admin", None), &object("n2"), &none), None);
}

#[test]
fn a_node_writes_events_on_its_own_node_object_and_on_nothing_else() {
    let policy = Policy::load();
    let mut from_n1 = request("CREATE", AGENT, Some("n1"));
    from_n1["resource"]["resource"] = json!("events");
    let on = |kind: &str, name: &str| json!({"metadata": {"name": "e"}, "regarding": {"kind": kind, "name": name}});
    assert_eq!(policy.refuses(&from_n1, &on("Node", "n1"), &Value::Null), None);
    for other in [on("Node", "n2"), on("Pod", "n1")] {
        assert!(policy.refuses(&from_n1, &other, &Value::Null).is_some(), "{other}");
    }
}

#[test]
fn of_services_and_pods_a_node_says_what_is_refused_in_its_own_name_and_nothing_else() {
    let policy = Policy::load();
    let mut from_n1 = request("CREATE", AGENT, Some("n1"));
    from_n1["resource"]["resource"] = json!("events");
    let event = |kind: &str, reason: &str, who: &str, of: &str| {
        json!({"metadata": {"name": "e", "namespace": "a"}, "regarding": {"kind": kind, "name": "web", "namespace": "a"},
            "reason": reason, "reportingController": who, "reportingInstance": of})
    };
    for (kind, reason) in [("Service", "EndpointRefused"), ("Service", "FrontendRefused"), ("Pod", "HostPortRefused")] {
        assert_eq!(
            policy.refuses(&from_n1, &event(kind, reason, "towpath-agent", "n1"), &Value::Null),
            None,
            "{reason}"
        );
    }
    for other in [
        event("Service", "EndpointRefused", "towpath-agent", "n2"),
        event("Service", "EndpointRefused", "kubelet", "n1"),
        event("Pod", "Scheduled", "towpath-agent", "n1"),
        event("Secret", "EndpointRefused", "towpath-agent", "n1"),
    ] {
        assert!(policy.refuses(&from_n1, &other, &Value::Null).is_some(), "{other}");
    }
}

#[test]
fn of_its_own_node_an_agent_changes_what_is_its_business_only() {
    let policy = Policy::load();
    let mut from_n1 = request("UPDATE", AGENT, Some("n1"));
    from_n1["resource"]["resource"] = json!("nodes");
    let taint = |key: &str| json!({"key": key, "effect": "NoSchedule"});
    let condition = |kind: &str, status: &str| json!({"type": kind, "status": status, "reason": "R"});
    let old = json!({
        "metadata": {"name": "n1", "labels": {"zone": "a"}},
        "spec": {"podCIDRs": ["10.244.0.0/24"], "taints": [taint("towpath.dev/agent-not-ready"), taint("gpu")]},
        "status": {
            "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}], "capacity": {"cpu": "2"}, "allocatable": {"cpu": "2"},
            "conditions": [condition("Ready", "True"), condition("NetworkUnavailable", "True")],
        },
    });
    let changed = |pointer: &str, value: Value| {
        let mut object = old.clone();
        *object.pointer_mut(pointer).unwrap() = value;
        policy.refuses(&from_n1, &object, &old)
    };
    assert_eq!(policy.refuses(&from_n1, &old, &old), None);
    assert_eq!(changed("/spec/taints", json!([taint("gpu")])), None, "the start-up taint goes");
    assert_eq!(changed("/status/conditions/1/status", json!("False")), None);
    let mut annotated = old.clone();
    annotated["metadata"]["annotations"] = json!({"flannel.alpha.coreos.com/public-ip": "192.0.2.1"});
    assert_eq!(policy.refuses(&from_n1, &annotated, &old), None);

    let mut cordoned = old.clone();
    cordoned["spec"]["unschedulable"] = json!(true);
    assert!(policy.refuses(&from_n1, &cordoned, &old).unwrap().contains("spec"));
    for (pointer, value, why) in [
        ("/metadata/labels", json!({"zone": "b"}), "label"),
        ("/spec/taints", json!([taint("gpu"), taint("mine")]), "adds none"),
        ("/spec/taints", json!([taint("towpath.dev/agent-not-ready")]), "but its own"),
        ("/spec/taints", json!([{"key": "gpu", "effect": "NoSchedule", "value": "other"}]), "but its own"),
        ("/status/conditions", json!([condition("NetworkUnavailable", "False")]), "condition"),
        ("/status/addresses/0/address", json!("192.0.2.9"), "addresses"),
        ("/status/capacity", json!({"cpu": "64"}), "resources"),
        ("/status/allocatable", json!({"cpu": "64"}), "resources"),
        ("/status/conditions/0/status", json!("False"), "conditions"),
    ] {
        let refused = changed(pointer, value).unwrap_or_else(|| panic!("{pointer} was let through"));
        assert!(refused.contains(why), "{pointer}: {refused}");
    }
}

#[test]
fn a_node_holds_leases_of_load_balancers_in_its_own_name_and_takes_no_others() {
    let policy = Policy::load();
    let ask = |operation: &str, name: &str, before: Option<&str>, after: Option<&str>| {
        let mut from_n1 = request(operation, AGENT, Some("n1"));
        from_n1["resource"]["resource"] = json!("leases");
        let lease = |holder: Option<&str>| {
            let spec = holder.map_or_else(|| json!({}), |holder| json!({"holderIdentity": holder}));
            json!({"metadata": {"name": name}, "spec": spec})
        };
        let old = if operation == "CREATE" { Value::Null } else { lease(before) };
        let new = if operation == "DELETE" { Value::Null } else { lease(after) };
        policy.refuses(&from_n1, &new, &old)
    };
    let name = "towpath-lb-192-0-2-1";
    assert_eq!(ask("CREATE", name, None, Some("n1")), None);
    assert_eq!(ask("UPDATE", name, Some("n1"), Some("n1")), None, "renewed");
    assert_eq!(ask("UPDATE", name, Some("n2"), Some("n1")), None, "taken over");
    assert_eq!(ask("UPDATE", name, Some("n1"), Some("")), None, "let go");
    assert_eq!(ask("UPDATE", name, Some("n1"), None), None, "let go");
    for (what, refused) in [
        ("for another", ask("CREATE", name, None, Some("n2"))),
        ("handed to another", ask("UPDATE", name, Some("n1"), Some("n2"))),
        ("taken from another for nobody", ask("UPDATE", name, Some("n2"), Some(""))),
        ("another's deleted", ask("DELETE", name, Some("n2"), None)),
    ] {
        assert!(refused.is_some_and(|why| why.contains("node n1")), "{what}");
    }
    for theirs in ["kube-controller-manager", "towpath-controller"] {
        for operation in ["CREATE", "UPDATE"] {
            assert!(ask(operation, theirs, Some("n1"), Some("n1")).unwrap().contains("towpath-lb-"), "{theirs}");
        }
    }
}

#[test]
fn the_controller_deletes_leases_of_load_balancers_and_no_others() {
    let policy = Policy::named("towpath-controller-deletes-its-own");
    assert!(policy.covers("coordination.k8s.io", "leases", "DELETE"));
    assert_eq!(policy.0["spec"]["failurePolicy"], "Fail");
    let binding = documents("towpath.yaml").into_iter().find(|object| {
        object["kind"] == "ValidatingAdmissionPolicyBinding"
            && object["spec"]["policyName"] == policy.0["metadata"]["name"]
    });
    assert_eq!(binding.unwrap()["spec"]["validationActions"], json!(["Deny"]));
    let ask = |user: &str, name: &str| {
        policy.refuses(&request("DELETE", user, None), &Value::Null, &json!({"metadata": {"name": name}}))
    };
    let controller = "system:serviceaccount:kube-system:towpath-controller";
    assert_eq!(ask(controller, "towpath-lb-192-0-2-1"), None);
    for theirs in ["kube-scheduler", "towpath-controller"] {
        assert!(ask(controller, theirs).unwrap().contains("towpath-lb-"), "{theirs}");
    }
    assert_eq!(ask("kube:admin", "kube-scheduler"), None, "others are others' business");
}

#[test]
fn a_node_adds_no_pod_ranges_to_itself_and_everything_else_that_kubelets_write_is_let_through() {
    let policy = Policy::named("towpath-nodes-add-no-pod-ranges");
    assert_eq!(policy.0["spec"]["failurePolicy"], "Fail");
    for resource in ["nodes", "nodes/status"] {
        assert!(policy.covers("", resource, "CREATE") && policy.covers("", resource, "UPDATE"), "{resource}");
    }
    let binding = documents("towpath.yaml").into_iter().find(|object| {
        object["kind"] == "ValidatingAdmissionPolicyBinding"
            && object["spec"]["policyName"] == policy.0["metadata"]["name"]
    });
    assert_eq!(binding.unwrap()["spec"]["validationActions"], json!(["Deny"]));
    let kubelet = |operation: &str| {
        let mut request = request(operation, "system:node:n1", None);
        request["userInfo"]["groups"] = json!(["system:nodes", "system:authenticated"]);
        request
    };
    let plain = || json!({"metadata": {"name": "n1"}});
    let annotated = |annotations: Value| json!({"metadata": {"name": "n1", "annotations": annotations}});
    let other = || annotated(json!({"volumes.kubernetes.io/controller-managed-attach-detach": "true"}));
    let asks = |ranges: &str| annotated(json!({"towpath.dev/pod-cidrs": ranges}));
    let (one, two) = (asks("10.245.7.0/24"), asks("10.245.0.0/16"));
    for (object, old, let_through) in [
        (plain(), plain(), true),
        (other(), plain(), true),
        (plain(), other(), true),
        (one.clone(), one.clone(), true),
        (one.clone(), plain(), false),
        (one.clone(), other(), false),
        (two.clone(), one.clone(), false),
        (other(), one.clone(), false),
    ] {
        for from in [kubelet("UPDATE"), request("UPDATE", AGENT, Some("n1"))] {
            assert_eq!(policy.refuses(&from, &object, &old).is_none(), let_through, "{object} after {old}");
        }
        assert_eq!(policy.refuses(&request("UPDATE", "kube:admin", None), &object, &old), None);
    }
    assert_eq!(policy.refuses(&kubelet("CREATE"), &other(), &Value::Null), None);
    assert!(policy.refuses(&kubelet("CREATE"), &one, &Value::Null).unwrap().contains("by administrators"));
}

#[test]
fn everything_an_agent_may_write_is_under_the_policy() {
    let policy = Policy::load();
    let roles: Vec<Value> = documents("towpath.yaml")
        .into_iter()
        .filter(|object| matches!(object["kind"].as_str(), Some("ClusterRole" | "Role")))
        .filter(|object| object["metadata"]["name"] == "towpath-agent")
        .collect();
    assert_eq!(roles.len(), 2);
    let mut written = 0;
    for rule in roles.iter().flat_map(|role| role["rules"].as_array().unwrap()) {
        let strings = |field: &str| -> Vec<String> { serde_json::from_value(rule[field].clone()).unwrap() };
        for verb in strings("verbs") {
            let operation = match verb.as_str() {
                "get" | "list" | "watch" => continue,
                "create" => "CREATE",
                "update" | "patch" => "UPDATE",
                other => panic!("an agent has no use for {other}"),
            };
            for resource in strings("resources") {
                for group in strings("apiGroups") {
                    assert!(policy.covers(&group, &resource, operation), "{verb} {group}/{resource}");
                    written += 1;
                }
            }
        }
    }
    assert_eq!(written, 8);
    let binding =
        documents("towpath.yaml").into_iter().find(|o| o["kind"] == "ValidatingAdmissionPolicyBinding").unwrap();
    assert_eq!(binding["spec"]["policyName"], policy.0["metadata"]["name"]);
    assert_eq!(binding["spec"]["validationActions"], json!(["Deny"]));
    assert_eq!(policy.0["spec"]["failurePolicy"], "Fail");
}
