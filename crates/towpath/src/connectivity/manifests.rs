//! What the test puts into the cluster, as objects.

use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde_json::{Value, json};

use super::stage::NodeFacts;

/// Marks the namespace as this command's to remove.
pub(super) const OURS: (&str, &str) = ("app.kubernetes.io/managed-by", "towpath-connectivity");
/// Port of every probe in its pod.
pub(super) const PORT: u16 = 8080;
/// Port of the Services.
pub(super) const SERVICE_PORT: u16 = 80;
/// Pods end by themselves after so many seconds.
const LIFE: u32 = 1800;
/// The path of the program in its image.
pub(super) const PROGRAM: &str = "/usr/bin/towpath";

/// What a pod is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Asks.
    Client,
    /// Answers, behind the Services.
    Server,
    /// Answers, and policies select it.
    Guarded,
    /// Asks and answers on the node's own network.
    Host,
    /// Answers on a port of its node.
    HostPort,
}

impl Role {
    /// The label `app`, and the beginning of the name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
            Self::Guarded => "guarded",
            Self::Host => "host",
            Self::HostPort => "host-port",
        }
    }
}

/// A manifest that does not fit its type is a mistake of this file, which the tests find.
fn object<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, serde_json::Error> {
    serde_json::from_value(value)
}

/// The namespace. Pods on the nodes' own network and ports need the level `privileged` of Pod Security; all others of the test are
/// as `restricted` wants them.
pub(super) fn namespace(name: &str) -> Result<Namespace, serde_json::Error> {
    let (key, value) = OURS;
    object(json!({
        "metadata": {"name": name, "labels": {
            key: value,
            "pod-security.kubernetes.io/enforce": "privileged",
            "pod-security.kubernetes.io/audit": "privileged",
            "pod-security.kubernetes.io/warn": "privileged",
        }},
    }))
}

/// A pod on a node; `number` counts nodes from 1.
pub(super) fn pod(
    role: Role,
    number: usize,
    node: &NodeFacts,
    image: &str,
    host_port: u16,
) -> Result<Pod, serde_json::Error> {
    let name = format!("{}-{number}", role.name());
    let port = match role {
        Role::Host => host_port.saturating_add(1),
        _ => PORT,
    };
    let ports = match role {
        Role::HostPort => json!([
            {"name": "tcp", "containerPort": PORT, "hostPort": host_port, "protocol": "TCP"},
            {"name": "udp", "containerPort": PORT, "hostPort": host_port, "protocol": "UDP"},
        ]),
        Role::Host => json!([]),
        _ => json!([
            {"name": "tcp", "containerPort": PORT, "protocol": "TCP"},
            {"name": "udp", "containerPort": PORT, "protocol": "UDP"},
        ]),
    };
    object(json!({
        "metadata": {"name": name, "labels": {"app": role.name(), "instance": name}},
        "spec": {
            // Not the scheduler's to choose: every node that is tried has one, whatever its taints.
            "nodeName": node.name,
            "tolerations": [{"operator": "Exists"}],
            "hostNetwork": role == Role::Host,
            "dnsPolicy": "ClusterFirst",
            "restartPolicy": "Never",
            "activeDeadlineSeconds": LIFE,
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [{
                "name": "probe",
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "command": [PROGRAM],
                "args": ["probe", "serve", "--port", port.to_string(), "--seconds", LIFE.to_string()],
                "env": [
                    {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                    {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                ],
                "ports": ports,
                "securityContext": {
                    "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]},
                },
                "resources": {"requests": {"cpu": "1m", "memory": "8Mi"}, "limits": {"memory": "64Mi"}},
            }],
        },
    }))
}

/// The Services: `web` for all servers, on node ports too; `peers` is headless; `self` has one endpoint, which asks itself.
pub(super) fn services() -> Result<Vec<Service>, serde_json::Error> {
    let ports = json!([
        {"name": "tcp", "port": SERVICE_PORT, "targetPort": PORT, "protocol": "TCP"},
        {"name": "udp", "port": SERVICE_PORT, "targetPort": PORT, "protocol": "UDP"},
    ]);
    let spec = |extra: Value| {
        let mut spec = json!({
            "ports": ports, "selector": {"app": Role::Server.name()}, "ipFamilyPolicy": "PreferDualStack",
        });
        if let (Some(all), Value::Object(extra)) = (spec.as_object_mut(), extra) {
            all.extend(extra);
        }
        spec
    };
    [
        ("web", json!({"type": "NodePort"})),
        ("peers", json!({"clusterIP": "None"})),
        ("self", json!({"selector": {"instance": "server-1"}})),
    ]
    .into_iter()
    .map(|(name, extra)| object(json!({"metadata": {"name": name}, "spec": spec(extra)})))
    .collect()
}

/// Nobody reaches the guarded pod.
pub(super) fn deny_ingress() -> Result<NetworkPolicy, serde_json::Error> {
    object(json!({
        "metadata": {"name": "deny-ingress"},
        "spec": {"podSelector": {"matchLabels": {"app": Role::Guarded.name()}}, "policyTypes": ["Ingress"]},
    }))
}

/// The first client alone reaches the guarded pod, by TCP.
pub(super) fn allow_first_client() -> Result<NetworkPolicy, serde_json::Error> {
    object(json!({
        "metadata": {"name": "allow-client-1"},
        "spec": {
            "podSelector": {"matchLabels": {"app": Role::Guarded.name()}},
            "policyTypes": ["Ingress"],
            "ingress": [{
                "from": [{"podSelector": {"matchLabels": {"instance": "client-1"}}}],
                "ports": [{"port": PORT, "protocol": "TCP"}],
            }],
        },
    }))
}

/// Clients reach the cluster's DNS and the first server, and nobody else.
pub(super) fn deny_egress() -> Result<NetworkPolicy, serde_json::Error> {
    object(json!({
        "metadata": {"name": "deny-egress"},
        "spec": {
            "podSelector": {"matchLabels": {"app": Role::Client.name()}},
            "policyTypes": ["Egress"],
            "egress": [
                {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
                {"to": [{"podSelector": {"matchLabels": {"instance": "server-1"}}}]},
            ],
        },
    }))
}
