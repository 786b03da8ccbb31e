//! What a cluster configures of its agents, in the one reading that agents go by and that tools explain them by: `agent.yaml`, with the cluster-wide
//! `NetworkConfig` over it, and every text of both parsed.
//!
//! Pure: who reads files and objects, and what holds while none can be read, is the caller's to say.

use std::net::IpAddr;

use ipnet::IpNet;
use towpath_model::custom::{NETWORK_CONFIG_NAME, NetworkConfigSpec};
use towpath_model::desired::Clients;
use towpath_model::{Family, Invalid, NodePortAddresses};
use towpath_wire::config::AgentConfig;
use towpath_wire::config::ipnet_text::Cidr;

use crate::services::ServiceConfig;

/// Why a configuration cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A field of the `NetworkConfig` has something else than an address.
    #[error("NetworkConfig {NETWORK_CONFIG_NAME}, spec.{field}: {text:?}")]
    NoAddress {
        /// The field.
        field: &'static str,
        /// What it has.
        text: String,
        /// Why that is none.
        source: std::net::AddrParseError,
    },
    /// A field has something else than a range.
    #[error("agent configuration, {field}: {text:?} is no CIDR")]
    NoRange {
        /// The field.
        field: &'static str,
        /// What it has.
        text: String,
        /// Why that is none.
        source: ipnet::AddrParseError,
    },
    /// Two ranges that have to be disjoint are not; each with its field.
    #[error("agent configuration: {} {} overlaps {} {}; choose disjoint ranges", .0.0, .0.1, .1.0, .1.1)]
    Overlap((&'static str, IpNet), (&'static str, IpNet)),
    /// The lowest NodePort is above the highest.
    #[error("agent configuration, nodePorts: {0} is above {1}")]
    NodePorts(u16, u16),
    /// Two backends have one port.
    #[error("agent configuration: vxlanPort and udpPort are both {0}; a node takes packets of both backends")]
    SamePort(u16),
    /// Paths would be tried without a pause.
    #[error("agent configuration, pathRoundSeconds: 0; write 1 or more, paths are tried again after so many seconds")]
    NoPause,
    /// `nodePortAddresses` has something else than ranges or `primary`.
    #[error("agent configuration")]
    NodePortAddresses(#[source] Invalid),
}

/// The ranges that are configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranges {
    /// Pod ranges of the cluster.
    pub cluster_cidrs: Vec<IpNet>,
    /// Service ranges, where no `ServiceCIDR` says others ([`crate::service_ranges`]).
    pub service_cidrs: Vec<IpNet>,
    /// Destinations that see pod addresses.
    pub non_masquerade_cidrs: Vec<IpNet>,
    /// Ranges in which Services may have external addresses.
    pub external_cidrs: Vec<IpNet>,
    /// At which of a node's addresses NodePorts answer.
    pub node_port_addresses: NodePortAddresses,
}

/// The configuration with what the object names in place of its own.
///
/// # Errors
/// Something that is no address.
pub fn overlay(mut config: AgentConfig, spec: &NetworkConfigSpec) -> Result<AgentConfig, ConfigError> {
    config.backend = spec.backend.unwrap_or(config.backend);
    if let Some(vxlan) = spec.vxlan {
        config.vxlan_vni = vxlan.vni.unwrap_or(config.vxlan_vni);
        config.vxlan_port = vxlan.port.unwrap_or(config.vxlan_port);
    }
    config.udp_port = spec.udp.and_then(|udp| udp.port).unwrap_or(config.udp_port);
    for (own, named) in [
        (&mut config.cluster_cidrs, &spec.cluster_cidrs),
        (&mut config.service_cidrs, &spec.service_cidrs),
        (&mut config.non_masquerade_cidrs, &spec.non_masquerade_cidrs),
        (&mut config.external_cidrs, &spec.external_cidrs),
    ] {
        if let Some(named) = named {
            *own = named.iter().cloned().map(Cidr).collect();
        }
    }
    if let Some(masquerade) = spec.masquerade {
        config.masquerade_ipv4 = masquerade.ipv4.unwrap_or(config.masquerade_ipv4);
        config.masquerade_ipv6 = masquerade.ipv6.unwrap_or(config.masquerade_ipv6);
    }
    if let Some(addresses) = &spec.node_port_addresses {
        config.node_port_addresses.clone_from(addresses);
    }
    if let Some(devices) = &spec.devices {
        config.devices.clone_from(devices);
    }
    config.direct_server_return = spec.direct_server_return.unwrap_or(config.direct_server_return);
    config.pod_mtu = spec.mtu.or(config.pod_mtu);
    config.service_proxy = spec.service_proxy.unwrap_or(config.service_proxy);
    config.service_acceleration = spec.service_acceleration.unwrap_or(config.service_acceleration);
    config.dns = spec.dns.unwrap_or(config.dns);
    if let Some(list) = &spec.cluster_dns {
        let parse = |text: &String| {
            let fault = |source| ConfigError::NoAddress { field: "clusterDNS", text: text.clone(), source };
            text.parse::<IpAddr>().map_err(fault)
        };
        config.cluster_dns = list.iter().map(parse).collect::<Result<_, _>>()?;
    }
    if let Some(domain) = &spec.cluster_domain {
        config.cluster_domain.clone_from(domain);
    }
    Ok(config)
}

/// Parses a configuration, and checks what has to fit together in it.
///
/// # Errors
/// A range that is none, ranges that overlap, or ports that do not go together.
pub fn parse(config: &AgentConfig) -> Result<Ranges, ConfigError> {
    let cluster_cidrs = cidrs("clusterCidrs", &config.cluster_cidrs)?;
    let service_cidrs = cidrs("serviceCidrs", &config.service_cidrs)?;
    refuse_overlap(&[("clusterCidrs", &cluster_cidrs), ("serviceCidrs", &service_cidrs)])?;
    if config.node_ports.0 > config.node_ports.1 {
        return Err(ConfigError::NodePorts(config.node_ports.0, config.node_ports.1));
    }
    if config.udp_port == config.vxlan_port {
        return Err(ConfigError::SamePort(config.udp_port));
    }
    if config.path_round_seconds == 0 {
        return Err(ConfigError::NoPause);
    }
    Ok(Ranges {
        cluster_cidrs,
        service_cidrs,
        non_masquerade_cidrs: cidrs("nonMasqueradeCidrs", &config.non_masquerade_cidrs)?,
        external_cidrs: cidrs("externalCidrs", &config.external_cidrs)?,
        node_port_addresses: NodePortAddresses::parse(&config.node_port_addresses)
            .map_err(ConfigError::NodePortAddresses)?,
    })
}

fn cidrs(field: &'static str, list: &[Cidr]) -> Result<Vec<IpNet>, ConfigError> {
    let parse = |Cidr(text): &Cidr| {
        let fault = |source| ConfigError::NoRange { field, text: text.clone(), source };
        text.parse::<IpNet>().map(|net| net.trunc()).map_err(fault)
    };
    list.iter().map(parse).collect()
}

fn refuse_overlap(named: &[(&'static str, &[IpNet])]) -> Result<(), ConfigError> {
    let all: Vec<(&str, IpNet)> = named.iter().flat_map(|(name, list)| list.iter().map(move |n| (*name, *n))).collect();
    for (i, (name, net)) in all.iter().enumerate() {
        for (other_name, other) in all.iter().skip(i + 1) {
            if net.contains(&other.network()) || other.contains(&net.network()) {
                return Err(ConfigError::Overlap((name, *net), (other_name, *other)));
            }
        }
    }
    Ok(())
}

/// What a planner of Services goes by on any node, before it is decided who is in charge there ([`crate::modes`]): it answers no cluster DNS, and
/// its Services are for all. `service_cidrs`: the ranges in force.
pub fn services(config: &AgentConfig, ranges: &Ranges, service_cidrs: &[IpNet]) -> ServiceConfig {
    ServiceConfig {
        node_ports: config.node_ports,
        node_port_addresses: ranges.node_port_addresses.clone(),
        cluster_dns: Vec::new(),
        dns_addresses: config.dns_addresses.clone(),
        service_cidrs: service_cidrs.to_vec(),
        external_cidrs: ranges.external_cidrs.clone(),
        clients: Clients::All,
        ..ServiceConfig::default()
    }
}

/// Families of which what pods send out of the cluster leaves with their node's address.
pub fn masqueraded(config: &AgentConfig) -> Vec<Family> {
    [(Family::V4, config.masquerade_ipv4), (Family::V6, config.masquerade_ipv6)]
        .into_iter()
        .filter_map(|(family, masqueraded)| masqueraded.then_some(family))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use towpath_model::custom::{Acceleration, Duty, MasqueradeConfig, VxlanConfig};

    #[test]
    fn what_is_named_wins_and_the_rest_stays() {
        let own = AgentConfig { pod_mtu: Some(1400), cluster_domain: "own".to_owned(), ..AgentConfig::default() };
        let spec = NetworkConfigSpec {
            devices: Some(vec!["eth*".to_owned()]),
            direct_server_return: Some(true),
            masquerade: Some(MasqueradeConfig { ipv4: None, ipv6: Some(false) }),
            cluster_cidrs: Some(vec!["10.8.0.0/16".to_owned()]),
            vxlan: Some(VxlanConfig { vni: None, port: Some(4789) }),
            service_acceleration: Some(Acceleration::BestEffort),
            cluster_dns: Some(vec!["10.96.0.53".to_owned()]),
            ..NetworkConfigSpec::default()
        };
        let now = overlay(own.clone(), &spec).unwrap();
        assert_eq!(now.cluster_cidrs, [Cidr("10.8.0.0/16".to_owned())]);
        assert_eq!((now.vxlan_vni, now.vxlan_port), (own.vxlan_vni, 4789));
        assert_eq!(now.devices, ["eth*"]);
        assert_eq!(masqueraded(&now), [Family::V4]);
        assert!(now.direct_server_return && !own.direct_server_return);
        assert_eq!(now.service_acceleration, Acceleration::BestEffort);
        assert_eq!(now.cluster_dns, ["10.96.0.53".parse::<IpAddr>().unwrap()]);
        assert_eq!(
            (now.pod_mtu, now.cluster_domain, now.service_cidrs),
            (Some(1400), "own".to_owned(), own.service_cidrs)
        );
    }

    #[test]
    fn what_is_no_address_is_said_by_field() {
        let dns = NetworkConfigSpec { cluster_dns: Some(vec!["x".to_owned()]), ..NetworkConfigSpec::default() };
        let refused = overlay(AgentConfig::default(), &dns).unwrap_err().to_string();
        assert!(refused.contains("spec.clusterDNS") && refused.contains("\"x\""), "{refused}");
        let duties = NetworkConfigSpec {
            dns: Some(Duty::Off),
            service_proxy: Some(Duty::Towpath),
            ..NetworkConfigSpec::default()
        };
        let now = overlay(AgentConfig::default(), &duties).unwrap();
        assert_eq!((now.service_proxy, now.dns), (Duty::Towpath, Duty::Off));
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_name() {
        let refused = |config: AgentConfig| parse(&config).unwrap_err().to_string();
        let cidr = |text: &str| vec![Cidr(text.to_owned())];
        let overlap = refused(AgentConfig { service_cidrs: cidr("10.244.8.0/22"), ..AgentConfig::default() });
        assert!(overlap.contains("10.244.0.0/16") && overlap.contains("serviceCidrs 10.244.8.0/22"), "{overlap}");
        let odd = refused(AgentConfig { external_cidrs: cidr("x"), ..AgentConfig::default() });
        assert!(odd.contains("externalCidrs") && odd.contains("\"x\""), "{odd}");
        let ports = refused(AgentConfig { node_ports: (30001, 30000), ..AgentConfig::default() });
        assert!(ports.contains("30001 is above 30000"), "{ports}");
        let same = refused(AgentConfig { udp_port: 8472, ..AgentConfig::default() });
        assert!(same.contains("both 8472"), "{same}");
        let addresses = AgentConfig { node_port_addresses: vec!["x".to_owned()], ..AgentConfig::default() };
        assert!(matches!(parse(&addresses), Err(ConfigError::NodePortAddresses(_))));
    }
}
