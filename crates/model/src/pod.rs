//! Pods, as far as the network needs them.

use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use serde::{Deserialize, Serialize};
use towpath_wire::shared::Shared;

use crate::{
    AskedBandwidth, Chosen, Invalid, Labels, NamespacedName, NodeName, PodIps, Protocol, Sharing, SocketServices, Uid,
    canonical,
};

/// A named container port: what a named port of a policy or a Service resolves to in this pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NamedPort {
    /// The name (IANA_SVC_NAME).
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number, 1–65535.
    pub number: u16,
}

/// A container port that its node answers on too (`containers[].ports[].hostPort`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HostPort {
    /// `hostIP`, canonical: an address of the node. None: all of them, loopback too.
    pub address: Option<IpAddr>,
    /// The node's port, 1–65535.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
    /// The pod's port, 1–65535.
    pub container_port: u16,
}

/// Where a pod is in its life (`status.phase`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// Accepted, not all containers started.
    Pending,
    /// At least one container runs.
    Running,
    /// `Succeeded` or `Failed`: its address may belong to another pod by now.
    Terminated,
}

/// A pod. Every node keeps every pod of the cluster: what it takes is counted in bytes ([`Pod::slim`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Namespace and name.
    pub name: NamespacedName,
    /// `metadata.uid`; empty for the API's mirror of a static pod, whose uid is not the one kubelet gave the sandbox.
    pub uid: Uid,
    /// Its labels.
    pub labels: Shared<Labels>,
    /// The DaemonSet that controls it (`metadata.ownerReferences`).
    pub daemon_set: Option<Box<str>>,
    /// `spec.nodeName`, once it is bound.
    pub node: Option<NodeName>,
    /// `status.podIPs`, canonical, at most one a family. Of a hostNetwork pod: its node's.
    pub ips: PodIps,
    /// Named container ports (of containers and restartable init containers), sorted.
    pub named_ports: Shared<Vec<NamedPort>>,
    /// Host ports (of the same containers), sorted. None with hostNetwork: there the process itself has the node's port.
    pub host_ports: Box<[HostPort]>,
    /// `spec.hostNetwork`: not on the pod network; NetworkPolicy does not apply to it.
    pub host_network: bool,
    /// Where it is in its life.
    pub phase: Phase,
    /// It has a deletion timestamp.
    pub terminating: bool,
    /// The `Ready` condition.
    pub ready: bool,
    /// Whether its sockets are translated when they connect to a Service.
    pub socket_services: SocketServices,
    /// The addresses that it asks for; none: any.
    #[serde(default)]
    pub chosen: Option<Box<Chosen>>,
    /// How much it may receive and send; none: it does not say.
    #[serde(default)]
    pub bandwidth: Option<Box<AskedBandwidth>>,
}

impl Pod {
    /// Whether policies and address classes apply: on the pod network and not ended.
    pub fn on_pod_network(&self) -> bool {
        !self.host_network && self.phase != Phase::Terminated
    }

    /// Shares what other pods say alike.
    pub fn slim(&mut self, sharing: &mut Sharing) {
        self.node = self.node.take().map(|node| sharing.nodes.shared(&node));
        sharing.labels.share(&mut self.labels);
        sharing.named_ports.share(&mut self.named_ports);
    }

    /// The number that a named port of `protocol` has in this pod.
    pub fn named_port(&self, name: &str, protocol: Protocol) -> Option<u16> {
        self.named_ports.iter().find(|p| p.name == name && p.protocol == protocol).map(|p| p.number)
    }
}

/// The host port of a container port, if it has one. What the API server would not have let in is none: it must not cost the
/// pod its place in the world, nor its policies.
fn host_port(port: &core::ContainerPort) -> Option<HostPort> {
    let number = |value: i32| u16::try_from(value).ok().filter(|n| *n > 0);
    let address = match port.host_ip.as_deref().unwrap_or_default() {
        "" => None,
        text => Some(canonical(text.parse().ok()?)),
    };
    Some(HostPort {
        address,
        port: number(port.host_port?)?,
        protocol: Protocol::parse(port.protocol.as_deref())?,
        container_port: number(port.container_port)?,
    })
}

impl TryFrom<&core::Pod> for Pod {
    type Error = Invalid;

    fn try_from(object: &core::Pod) -> Result<Self, Invalid> {
        let meta = &object.metadata;
        let (Some(namespace), Some(name)) = (&meta.namespace, &meta.name) else {
            return Err(Invalid::new("Pod", "metadata", "namespace or name missing"));
        };
        let name = NamespacedName::new(namespace, name);
        let spec = object.spec.as_ref().ok_or_else(|| Invalid::new(format!("Pod {name}"), "spec", "missing"))?;
        let status = object.status.clone().unwrap_or_default();
        let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
        let host_network = spec.host_network.unwrap_or(false);
        let (mut named_ports, mut host_ports) = (Vec::new(), Vec::new());
        for container in spec.containers.iter().chain(sidecars) {
            for port in container.ports.iter().flatten() {
                host_ports.extend(host_port(port).filter(|_| !host_network));
                let (Some(port_name), Some(protocol)) = (&port.name, Protocol::parse(port.protocol.as_deref())) else {
                    continue;
                };
                let number = u16::try_from(port.container_port).map_err(|_| {
                    Invalid::new(format!("Pod {name}"), "containerPort", format!("{} is no port", port.container_port))
                })?;
                named_ports.push(NamedPort { name: port_name.clone(), protocol, number });
            }
        }
        named_ports.sort();
        named_ports.dedup();
        host_ports.sort();
        host_ports.dedup();
        let mut ips: Vec<IpAddr> = Vec::new();
        let listed = status.pod_ips.iter().flatten().map(|p| p.ip.clone()).chain(status.pod_ip.clone());
        for text in listed {
            if let Ok(ip) = text.parse::<IpAddr>().map(canonical)
                && !ips.contains(&ip)
            {
                ips.push(ip);
            }
        }
        let mirror = meta.annotations.as_ref().is_some_and(|a| a.contains_key("kubernetes.io/config.mirror"));
        let phase = match status.phase.as_deref() {
            Some("Running") => Phase::Running,
            Some("Succeeded" | "Failed") => Phase::Terminated,
            _ => Phase::Pending,
        };
        let controller = meta.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
        Ok(Self {
            daemon_set: controller.filter(|owner| owner.kind == "DaemonSet").map(|owner| owner.name.as_str().into()),
            uid: meta.uid.as_deref().filter(|_| !mirror).map(Uid::from).unwrap_or_default(),
            labels: meta.labels.clone().unwrap_or_default().into(),
            node: spec.node_name.clone().filter(|n| !n.is_empty()).map(NodeName::new),
            ips: ips.into(),
            named_ports: named_ports.into(),
            host_ports: host_ports.into(),
            host_network,
            phase,
            terminating: meta.deletion_timestamp.is_some(),
            ready: status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True"),
            socket_services: SocketServices::of(meta.annotations.as_ref()),
            chosen: Chosen::of(meta.annotations.as_ref()),
            bandwidth: AskedBandwidth::of(meta.annotations.as_ref()),
            name,
        })
    }
}
