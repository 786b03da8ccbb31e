//! Objects that a cluster's installer makes (kubeadm and the network's manifest): the DNS Service and the rights of Towpath's
//! own components. Existing objects stay as they are.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Service, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kube::api::PostParams;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::options::ClusterSpec;

/// Makes what is missing.
pub(super) async fn run(client: &Client, spec: &ClusterSpec) -> Result<()> {
    create(&Api::<Service>::namespaced(client.clone(), "kube-system"), dns_service(spec)).await?;
    for name in ["towpath-agent", "towpath-controller"] {
        let account = json!({"metadata": {"name": name, "namespace": "kube-system"}});
        create(&Api::<ServiceAccount>::namespaced(client.clone(), "kube-system"), account).await?;
        create(&Api::<ClusterRole>::all(client.clone()), role(name)).await?;
        let binding = json!({
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": "kube-system"}],
        });
        create(&Api::<ClusterRoleBinding>::all(client.clone()), binding).await?;
    }
    Ok(())
}

async fn create<K>(api: &Api<K>, object: Value) -> Result<()>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + serde::Serialize + std::fmt::Debug,
{
    let name = object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned();
    // Asked before: of a Service that is there the address is refused first.
    if api.get_opt(&name).await.with_context(|| format!("read {} {name}", K::kind(&())))?.is_some() {
        return Ok(());
    }
    let object: K = serde_json::from_value(object).with_context(|| format!("understand {name}"))?;
    match api.create(&PostParams::default(), &object).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(error)) if error.code == 409 => Ok(()),
        Err(error) => Err(error).with_context(|| format!("create {} {name}", K::kind(&()))),
    }
}

/// `kube-dns` as kubeadm makes it; it has no selector, for the network itself answers at its address.
fn dns_service(spec: &ClusterSpec) -> Value {
    let addresses: Vec<String> = spec.dns_addresses.iter().map(ToString::to_string).collect();
    let policy = if addresses.len() > 1 { "RequireDualStack" } else { "SingleStack" };
    json!({
        "metadata": {
            "name": "kube-dns", "namespace": "kube-system",
            "labels": {"k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS"},
        },
        "spec": {
            "clusterIP": addresses.first(), "clusterIPs": addresses, "ipFamilyPolicy": policy,
            "ports": [
                {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53},
                {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53},
            ],
        },
    })
}

/// What the agent and the controller may do: read what a network is made of, write their own resources.
fn role(name: &str) -> Value {
    let read = json!(["get", "list", "watch"]);
    let mut rules = vec![
        json!({"apiGroups": [""], "resources": ["pods", "services", "endpoints", "nodes", "namespaces"], "verbs": read}),
        json!({"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": read}),
        json!({"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies", "servicecidrs", "ingresses", "ingressclasses"], "verbs": read}),
        json!({"apiGroups": ["policy.networking.k8s.io", "apiextensions.k8s.io"], "resources": ["*"], "verbs": read}),
        json!({"apiGroups": ["", "events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch", "update"]}),
        json!({"apiGroups": ["towpath.dev"], "resources": ["*"], "verbs": ["*"]}),
        json!({"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch", "update"]}),
    ];
    if name == "towpath-controller" {
        rules.push(json!({"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["*"]}));
        rules.push(json!({"apiGroups": [""], "resources": ["nodes"], "verbs": ["patch", "update"]}));
        rules.push(json!({"apiGroups": [""], "resources": ["services/status"], "verbs": ["patch", "update"]}));
    }
    json!({"metadata": {"name": name}, "rules": rules})
}
