//! What the objects say: types, rights (golden), isolation of the containers, and that everything a process writes is mounted.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{ConfigMap, Container, PodSpec, Service, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value as Json, json};
use towpath_wire::config::{AgentConfig, CarryConfig, ControllerConfig};

use super::check_tests::{objects, values};
use super::manifests::{Values, config_data, install, uninstall};

/// The object as its type, which must hold every field of it.
fn typed<T: DeserializeOwned + Serialize>(object: &Json) -> T {
    let parsed: T = serde_json::from_value(object.clone()).unwrap();
    let mut back = serde_json::to_value(&parsed).unwrap();
    strip(&mut back);
    let mut have = object.clone();
    strip(&mut have);
    assert_eq!(back, have, "a field that its type does not have");
    parsed
}

/// What is written by hand and otherwise by the types: empty lists are left out, numbers of a schema are floats.
fn strip(value: &mut Json) {
    match value {
        Json::Object(map) => {
            map.values_mut().for_each(strip);
            map.retain(|_, v| !(v.is_null() || v.as_array().is_some_and(Vec::is_empty)));
        }
        Json::Array(list) => list.iter_mut().for_each(strip),
        Json::Number(number) => *value = number.as_f64().into(),
        _ => {}
    }
}

fn all() -> BTreeMap<String, Json> {
    let dns = values(&["--dns=towpath"]).unwrap();
    let mut all = objects(&install(&dns).unwrap());
    all.extend(objects(&uninstall(&dns).unwrap()));
    all
}

fn pod(of: &str) -> PodSpec {
    let object = &all()[of];
    serde_json::from_value(object.pointer("/spec/template/spec").unwrap().clone()).unwrap()
}

const DAEMONSET: &str = "DaemonSet kube-system/towpath";
const DNS: &str = "DaemonSet kube-system/towpath-dns";
const CONTROLLER: &str = "Deployment kube-system/towpath-controller";
const UNINSTALL: &str = "DaemonSet kube-system/towpath-uninstall";

#[test]
fn every_object_is_of_its_type_and_says_nothing_that_the_type_does_not_know() {
    let mut seen = BTreeSet::new();
    for (name, object) in all() {
        seen.insert(name.clone());
        match object["kind"].as_str().unwrap() {
            "CustomResourceDefinition" => drop(typed::<CustomResourceDefinition>(&object)),
            "ValidatingAdmissionPolicy" => drop(typed::<ValidatingAdmissionPolicy>(&object)),
            "ValidatingAdmissionPolicyBinding" => drop(typed::<ValidatingAdmissionPolicyBinding>(&object)),
            "ServiceAccount" => drop(typed::<ServiceAccount>(&object)),
            "ClusterRole" => drop(typed::<ClusterRole>(&object)),
            "ClusterRoleBinding" => drop(typed::<ClusterRoleBinding>(&object)),
            "Role" => drop(typed::<Role>(&object)),
            "RoleBinding" => drop(typed::<RoleBinding>(&object)),
            "ConfigMap" => drop(typed::<ConfigMap>(&object)),
            "Service" => drop(typed::<Service>(&object)),
            "DaemonSet" => drop(typed::<DaemonSet>(&object)),
            "Deployment" => drop(typed::<Deployment>(&object)),
            other => panic!("{name}: no test knows {other}"),
        }
    }
    assert_eq!(seen.len(), 25, "{seen:#?}");
}

fn lines(rules: &[PolicyRule]) -> Vec<String> {
    let mut lines = Vec::new();
    for rule in rules {
        let list = |items: &Option<Vec<String>>| items.clone().unwrap_or_default();
        assert!(rule.non_resource_urls.is_none());
        for group in list(&rule.api_groups) {
            for resource in list(&rule.resources) {
                let named = list(&rule.resource_names).iter().map(|n| format!(" [{n}]")).collect::<String>();
                lines.push(format!("{group}/{resource}{named}: {}", rule.verbs.join(" ")));
            }
        }
    }
    lines.sort();
    lines
}

fn role(name: &str) -> Vec<String> {
    lines(&serde_json::from_value::<Vec<PolicyRule>>(all()[name]["rules"].clone()).unwrap())
}

/// Every right, so that one more is a change that somebody looks at.
#[test]
fn rights_are_these_and_no_others() {
    assert_eq!(
        role("ClusterRole /towpath-agent"),
        [
            "/namespaces: list watch",
            "/nodes/status: patch",
            "/nodes: get list watch patch",
            "/pods: get list watch",
            "/services: list watch",
            "discovery.k8s.io/endpointslices: list watch",
            "events.k8s.io/events: create",
            "networking.k8s.io/networkpolicies: list watch",
            "networking.k8s.io/servicecidrs: list watch",
            "policy.networking.k8s.io/clusternetworkpolicies: list watch",
            "towpath.dev/addresspools: list watch",
            "towpath.dev/networkconfigs: get list watch",
            "towpath.dev/nodenetworks/status: patch",
            "towpath.dev/nodenetworks: get list watch create patch",
        ]
    );
    assert_eq!(
        role("ClusterRole /towpath-controller"),
        [
            "/namespaces: list watch",
            "/nodes: list watch patch",
            "/services/status: patch",
            "/services: list watch",
            "events.k8s.io/events: create patch",
            "networking.k8s.io/servicecidrs: list watch",
            "towpath.dev/addresspools/status: patch",
            "towpath.dev/addresspools: list watch",
            "towpath.dev/networkconfigs/status: patch",
            "towpath.dev/networkconfigs: list watch",
            "towpath.dev/nodenetworks: list watch",
        ]
    );
    assert_eq!(
        role("Role kube-system/towpath-agent"),
        [
            "/configmaps [coredns] [kube-dns] [ip-masq-agent]: get list watch",
            "coordination.k8s.io/leases: get create update"
        ]
    );
    assert_eq!(
        role("Role kube-system/towpath-controller"),
        [
            "coordination.k8s.io/leases [towpath-controller]: get update",
            "coordination.k8s.io/leases: create list delete"
        ]
    );
    let mut bindings = BTreeSet::new();
    for (name, object) in all() {
        if name.contains("RoleBinding") {
            let subjects = object["subjects"].as_array().unwrap();
            let [subject] = subjects.as_slice() else { panic!("{name}: {subjects:?}") };
            assert_eq!(subject["kind"], "ServiceAccount");
            assert_eq!(subject["namespace"], "kube-system");
            assert_eq!(subject["name"], object["metadata"]["name"], "{name}");
            assert_eq!(object["roleRef"]["name"], object["metadata"]["name"], "{name}");
            bindings.insert(name);
        }
    }
    assert_eq!(bindings.len(), 4, "{bindings:?}");
}

fn containers(spec: &PodSpec) -> Vec<&Container> {
    spec.init_containers.iter().flatten().chain(&spec.containers).collect()
}

fn added(container: &Container) -> Vec<String> {
    let context = container.security_context.as_ref().unwrap();
    let capabilities = context.capabilities.as_ref().unwrap();
    assert_eq!(capabilities.drop.as_deref(), Some(["ALL".to_owned()].as_slice()), "{}", container.name);
    capabilities.add.clone().unwrap_or_default()
}

#[test]
fn every_container_has_the_least_it_needs() {
    let mut capabilities = BTreeMap::new();
    for name in [DAEMONSET, DNS, CONTROLLER, UNINSTALL] {
        let spec = pod(name);
        let seccomp = spec.security_context.as_ref().unwrap().seccomp_profile.as_ref().unwrap();
        assert_eq!(seccomp.type_, "RuntimeDefault", "{name}");
        assert_eq!((spec.host_pid, spec.host_ipc), (None, None), "{name}");
        assert!(spec.priority_class_name.as_ref().unwrap().starts_with("system-"), "{name}");
        for container in containers(&spec) {
            let context = container.security_context.as_ref().unwrap();
            assert_eq!(context.read_only_root_filesystem, Some(true), "{}", container.name);
            assert_eq!(context.allow_privilege_escalation, Some(false), "{}", container.name);
            assert_eq!(context.privileged, None, "{}", container.name);
            let resources = container.resources.as_ref().unwrap();
            assert_eq!(resources.requests.as_ref().unwrap().len(), 2, "{}", container.name);
            assert!(container.command.is_none() && container.image_pull_policy.is_none(), "{}", container.name);
            capabilities.insert(container.name.clone(), added(container).join(" "));
        }
    }
    let golden = [
        ("agent", "NET_ADMIN NET_RAW SYS_ADMIN"),
        ("carry", "NET_BIND_SERVICE"),
        ("controller", ""),
        ("done", ""),
        ("install", ""),
        ("uninstall", "NET_ADMIN SYS_ADMIN"),
    ];
    assert_eq!(capabilities, golden.map(|(name, list)| (name.to_owned(), list.to_owned())).into());
    let controller = pod(CONTROLLER).security_context.unwrap();
    assert_eq!((controller.run_as_non_root, controller.run_as_user), (Some(true), Some(65532)));
    assert!(pod(CONTROLLER).volumes.unwrap().iter().all(|volume| volume.host_path.is_none()));
}

/// The path on the node that a path of a container is, if the node has it.
fn on_node(spec: &PodSpec, container: &str, path: &str) -> Option<String> {
    let container = containers(spec).into_iter().find(|c| c.name == container).unwrap();
    let mounts = container.volume_mounts.iter().flatten();
    let mount = mounts.filter(|m| path.starts_with(&m.mount_path)).max_by_key(|m| m.mount_path.len())?;
    let volume = spec.volumes.iter().flatten().find(|v| v.name == mount.name).unwrap();
    let host = volume.host_path.as_ref()?;
    Some(format!("{}{}", host.path, path.strip_prefix(&mount.mount_path).unwrap()))
}

#[test]
fn what_the_processes_write_is_on_the_node_at_its_own_path() {
    let data = config_data(&Values::default()).unwrap();
    let agent: AgentConfig = serde_saphyr::from_str(&data["agent.yaml"]).unwrap();
    let carry: CarryConfig = serde_saphyr::from_str(&data["carry.yaml"]).unwrap();
    let _: ControllerConfig = serde_saphyr::from_str(&data["controller.yaml"]).unwrap();
    let (node, dns) = (pod(DAEMONSET), pod(DNS));
    let at = |container: &str, path: &std::path::Path| {
        on_node(if container == "carry" { &dns } else { &node }, container, path.to_str().unwrap())
    };
    let same = |container: &str, path: &std::path::Path| {
        assert_eq!(at(container, path).as_deref(), path.to_str(), "{container}");
    };
    // The plugin gets these paths from the CNI configuration and looks for them on the node.
    same("agent", &agent.cni_socket());
    same("agent", &agent.state_dir);
    same("agent", &agent.cni_conf_dir);
    same("agent", &agent.cni_state_dir);
    same("carry", &agent.carry_socket());
    same("carry", &carry.state_dir);
    same("install", &agent.api_server_note());
    assert_eq!(agent.run_dir, carry.run_dir);
    assert_eq!(at("agent", &agent.bpffs).as_deref(), Some("/sys/fs/bpf"));
    assert_eq!(at("agent", agent.cgroup.as_ref().unwrap()).as_deref(), Some("/sys/fs/cgroup"));
    assert_eq!(at("agent", std::path::Path::new("/host/proc/sys/net/ipv4")).as_deref(), Some("/proc/sys/net/ipv4"));
    assert_eq!(at("install", std::path::Path::new("/host/opt/cni/bin")).as_deref(), Some("/opt/cni/bin"));
    // Where namespaces are looked for that pods have.
    let [namespaces, _] = towpath_datapath::net::namespaces::PLACES;
    assert_eq!(on_node(&node, "agent", namespaces).as_deref(), Some(namespaces));
    let uninstall = pod(UNINSTALL);
    for (inside, outside) in [
        ("/run/towpath", "/run/towpath"),
        ("/var/lib/towpath", "/var/lib/towpath"),
        ("/host/opt/cni/bin", "/opt/cni/bin"),
        ("/host/etc/cni/net.d", "/etc/cni/net.d"),
        ("/host/sys/fs/bpf", "/sys/fs/bpf"),
    ] {
        assert_eq!(on_node(&uninstall, "uninstall", inside).as_deref(), Some(outside));
    }
}

#[test]
fn the_node_pods_are_there_first_and_everywhere_and_asked_where_they_listen() {
    for name in [DAEMONSET, DNS] {
        let spec = pod(name);
        assert_eq!(spec.host_network, Some(true), "{name}");
        assert_eq!(spec.priority_class_name.as_deref(), Some("system-node-critical"), "{name}");
        let [toleration] = spec.tolerations.as_deref().unwrap() else { panic!("{name}") };
        assert_eq!((toleration.operator.as_deref(), &toleration.key), (Some("Exists"), &None), "{name}");
        assert_eq!(spec.automount_service_account_token, Some(false), "{name}");
    }
    let data = config_data(&Values::default()).unwrap();
    let agent: AgentConfig = serde_saphyr::from_str(&data["agent.yaml"]).unwrap();
    let listens = agent.metrics_listen.unwrap().to_string();
    let spec = pod(DAEMONSET);
    let [container] = spec.containers.as_slice() else { panic!() };
    for (probe, path) in [(&container.liveness_probe, "/healthz"), (&container.readiness_probe, "/readyz")] {
        let get = probe.as_ref().unwrap().http_get.as_ref().unwrap();
        let port = serde_json::to_value(&get.port).unwrap();
        assert_eq!(format!("{}:{port}", get.host.as_ref().unwrap()), listens);
        assert_eq!(get.path.as_deref(), Some(path));
    }
    let spec = pod(DNS);
    let [carry] = spec.containers.as_slice() else { panic!() };
    let host = carry.readiness_probe.as_ref().unwrap().tcp_socket.as_ref().unwrap().host.clone().unwrap();
    assert!(agent.dns_addresses.contains(&host.parse().unwrap()), "{host}");
}

/// A new one runs beside the old one, and the old one goes only when the new one has taken over.
#[test]
fn dns_is_replaced_without_a_gap() {
    let set: DaemonSet = typed(&all()[DNS]);
    let rolling = set.spec.unwrap().update_strategy.unwrap().rolling_update.unwrap();
    assert_eq!(serde_json::to_value(&rolling).unwrap(), json!({"maxSurge": "10%", "maxUnavailable": 0}));
    let spec = pod(DNS);
    let [carry] = spec.containers.as_slice() else { panic!() };
    // A port of the node is one pod's alone: declared, it would keep the second away.
    assert!(carry.ports.is_none());
    let started = carry.startup_probe.as_ref().unwrap().exec.as_ref().unwrap().command.clone().unwrap();
    let args = carry.args.clone().unwrap();
    assert_eq!(started, [vec!["/usr/bin/towpath".to_owned()], args, vec!["--started".to_owned()]].concat());
}
