//! Objects that a cluster's installer makes (kubeadm and the network's manifest): the DNS Service, and of Towpath's own manifest its
//! kinds and the rights of its components, so that they have no more here than in any cluster; and what an administrator would add: a pool
//! of addresses for load balancers. Existing objects stay as they are.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Service;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, PostParams};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::options::ClusterSpec;

/// Of `deploy/kustomize/base/`: what is no process. And ClusterNetworkPolicy.
const INSTALLED: [&str; 6] = [
    include_str!("../../../../deploy/crds/policy.networking.k8s.io_clusternetworkpolicies.yaml"),
    include_str!("../../../../deploy/kustomize/base/crd-addresspool.yaml"),
    include_str!("../../../../deploy/kustomize/base/crd-networkconfig.yaml"),
    include_str!("../../../../deploy/kustomize/base/crd-nodenetwork.yaml"),
    include_str!("../../../../deploy/kustomize/base/admission.yaml"),
    include_str!("../../../../deploy/kustomize/base/rbac.yaml"),
];

/// Makes what is missing.
pub(super) async fn run(client: &Client, spec: &ClusterSpec) -> Result<()> {
    create(&Api::<Service>::namespaced(client.clone(), "kube-system"), dns_service(spec)).await?;
    for text in INSTALLED {
        for object in serde_saphyr::from_multiple::<DynamicObject>(text).context("understand an embedded manifest")? {
            create_any(client, &object).await?;
        }
    }
    let ranges = spec.load_balancer_ranges();
    if spec.cni_conf.is_none() && !ranges.is_empty() {
        let pool = json!({
            "apiVersion": "towpath.dev/v1alpha1", "kind": "AddressPool", "metadata": {"name": "lab"}, "spec": {"addresses": ranges},
        });
        create_any(client, &serde_json::from_value(pool)?).await?;
    }
    Ok(())
}

async fn create_any(client: &Client, object: &DynamicObject) -> Result<()> {
    let types = object.types.clone().context("an embedded manifest without a kind")?;
    let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(&types)?);
    let api: Api<DynamicObject> = match &object.metadata.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    match api.create(&PostParams::default(), object).await {
        Err(kube::Error::Api(error)) if error.code == 409 => Ok(()),
        made => made.map(drop).with_context(|| format!("create {} {:?}", types.kind, object.metadata.name)),
    }
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
