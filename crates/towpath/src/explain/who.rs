//! Who is meant on the command line, as addresses.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use towpath_model::{Family, NamespacedName, NodeName, Protocol, ServiceKind, World, canonical, family_of};

/// A port, or ICMP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortSpec {
    /// A port of a protocol that has ports.
    Port(Protocol, u16),
    /// ICMP or ICMPv6 (ping).
    Icmp,
}

impl FromStr for PortSpec {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        super::parse_port(text)
    }
}

impl fmt::Display for PortSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PortSpec::Port(protocol, number) => write!(f, "{protocol} {number}"),
            PortSpec::Icmp => f.write_str("ICMP"),
        }
    }
}

/// Who is meant, and its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    name: String,
    addresses: Vec<IpAddr>,
}

impl Target {
    /// Its addresses.
    pub(super) fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }
}

/// Finds who `text` means.
///
/// # Errors
/// Nobody of that name is there, or it has no address (yet).
pub(crate) fn parse(world: &World, namespace: &str, text: &str) -> Result<Target> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(Target { name: text.to_owned(), addresses: vec![canonical(address)] });
    }
    let parts: Vec<&str> = text.split('/').collect();
    let (namespace, kind, name) = match parts.as_slice() {
        [name] => (namespace, "pod", *name),
        [kind @ ("pod" | "pods" | "po" | "svc" | "service" | "services" | "node" | "nodes" | "no"), name] => {
            (namespace, *kind, *name)
        }
        [namespace, name] => (*namespace, "pod", *name),
        [namespace, kind, name] => (*namespace, *kind, *name),
        _ => bail!("{text:?}: write pod/NAME, svc/NAME, node/NAME, NAMESPACE/pod/NAME or an address"),
    };
    let key = NamespacedName::new(namespace, name);
    let (name, addresses) = match kind {
        "pod" | "pods" | "po" => {
            let pod = world.pods.get(&key).with_context(|| format!("there is no pod {key}"))?;
            (format!("pod {key}"), pod.ips.to_vec())
        }
        "svc" | "service" | "services" => {
            let service = world.services.get(&key).with_context(|| format!("there is no Service {key}"))?;
            match &service.kind {
                ServiceKind::ExternalName(target) => bail!("Service {key} is the name {target} only: explain that"),
                ServiceKind::Headless => bail!("Service {key} is headless: explain one of its pods"),
                _ => (format!("Service {key}"), service.cluster_ips.clone()),
            }
        }
        "node" | "nodes" | "no" => {
            let node = world.nodes.get(&NodeName::new(name)).with_context(|| format!("there is no node {name}"))?;
            (format!("node {name}"), node.internal_ips.clone())
        }
        other => bail!("{text:?}: {other:?} is none of pod, svc, node"),
    };
    if addresses.is_empty() {
        bail!("{name} has no address yet");
    }
    Ok(Target { name, addresses })
}

/// An address of each in the same family, IPv4 first.
///
/// # Errors
/// They have no family in common.
pub(crate) fn pair(from: &Target, to: &Target) -> Result<(IpAddr, IpAddr)> {
    for family in [Family::V4, Family::V6] {
        let of = |target: &Target| target.addresses.iter().copied().find(|a| family_of(*a) == family);
        if let (Some(source), Some(destination)) = (of(from), of(to)) {
            return Ok((source, destination));
        }
    }
    bail!("{} and {} have no address family in common", from.name, to.name)
}
