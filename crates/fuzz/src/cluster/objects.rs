//! The objects as those who judge read them: `model` for the compiler and the evaluator, the API's own types for the oracle.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result};
use k8s_openapi::serde::de::DeserializeOwned;
use serde_json::{Value, json};
use towpath_model::{ClusterNetworkPolicy, Namespace, NamespacedName, NetworkPolicy, Node, Pod, World};
use towpath_oracle::Cluster;

use super::{DNS, Spec};

/// A cluster, read.
#[derive(Clone, Debug, Default)]
pub struct Parsed {
    /// For the compiler and the evaluator.
    pub world: World,
    /// Addresses that the node gave, as the compiler is told of them.
    pub given: BTreeMap<NamespacedName, Vec<IpAddr>>,
    /// Node-local addresses of DNS.
    pub dns: Vec<IpAddr>,
    /// For the oracle: the same, with a pod in the place of DNS, and with the addresses that pods have whatever their status says yet.
    pub oracle: Cluster,
}

fn read<T: DeserializeOwned>(object: &Value) -> Result<T> {
    serde_json::from_value(object.clone()).with_context(|| format!("this object does not fit its type: {object}"))
}

fn read_all<T: DeserializeOwned>(objects: &[Value]) -> Result<Vec<T>> {
    objects.iter().map(read).collect()
}

/// What the oracle must know of the node-local DNS to class it: a pod like the cluster's own DNS.
fn dns_pod() -> Value {
    let ips: Vec<Value> = DNS.iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "metadata": {"namespace": "kube-system", "name": "node-local-dns", "labels": {"k8s-app": "kube-dns"}},
        "spec": {"containers": [{"name": "dns", "ports": [
            {"name": "dns", "protocol": "UDP", "containerPort": 53}, {"name": "dns-tcp", "protocol": "TCP", "containerPort": 53}]}]},
        "status": {"phase": "Running", "podIPs": ips}
    })
}

impl Spec {
    /// Reads the objects.
    ///
    /// # Errors
    /// One is none that Kubernetes would have let in.
    pub fn parse(&self) -> Result<Parsed> {
        Ok(Parsed {
            world: self.world()?,
            given: self
                .local
                .iter()
                .filter(|local| local.given)
                .map(|local| (NamespacedName::new(&local.namespace, &local.name), local.addresses.clone()))
                .collect(),
            dns: DNS.iter().filter_map(|ip| ip.parse().ok()).collect(),
            oracle: self.for_oracle()?,
        })
    }

    fn world(&self) -> Result<World> {
        let mut world = World::default();
        for object in &self.nodes {
            let node = Node::try_from(&read(object)?)?;
            world.nodes.insert(node.name.clone(), node);
        }
        for object in &self.namespaces {
            let namespace = Namespace::try_from(&read(object)?)?;
            world.namespaces.insert(namespace.name.clone(), namespace);
        }
        for object in &self.pods {
            let pod = Pod::try_from(&read(object)?)?;
            world.pods.insert(pod.name.clone(), pod);
        }
        for object in &self.policies {
            let policy = NetworkPolicy::try_from(&read(object)?)?;
            world.policies.insert(policy.name.clone(), policy);
        }
        for object in &self.cluster_policies {
            let (policy, _) = ClusterNetworkPolicy::fail_closed(&read(object)?)?;
            world.cluster_policies.insert(policy.name.clone(), policy);
        }
        Ok(world)
    }

    fn for_oracle(&self) -> Result<Cluster> {
        let mut pods = self.pods.clone();
        for pod in &mut pods {
            let known = self
                .local
                .iter()
                .find(|local| pod["metadata"]["name"] == local.name && pod["metadata"]["namespace"] == local.namespace);
            if let Some(local) = known {
                let ips: Vec<Value> = local.addresses.iter().map(|ip| json!({"ip": ip.to_string()})).collect();
                pod["status"]["podIPs"] = json!(ips);
            }
        }
        pods.push(dns_pod());
        Ok(Cluster {
            nodes: read_all(&self.nodes)?,
            namespaces: read_all(&self.namespaces)?,
            pods: read_all(&pods)?,
            policies: read_all(&self.policies)?,
            cluster_policies: self.cluster_policies.clone(),
            names: Vec::new(),
        })
    }
}
