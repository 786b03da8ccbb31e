//! Results of ADD, in the shape of each version.
//!
//! In memory and between our processes a result has the 1.1.0 shape; [`AddResult::to_json`] and [`AddResult::parse`] know the
//! others: `ips[].version` exists up to 0.4.0, `interfaces[].mtu` and the further route fields from 1.1.0.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{CniError, ErrorCode, Prefix, Version};

/// What ADD made (specification "ADD Success").
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddResult {
    /// Interfaces made, in the container (with `sandbox`) and on the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub interfaces: Vec<Interface>,
    /// Addresses given.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub ips: Vec<IpConfig>,
    /// Routes made.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub routes: Vec<Route>,
    /// DNS settings; Kubernetes has its own and ignores these.
    #[serde(default, deserialize_with = "null_is_default")]
    pub dns: Dns,
}

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC address.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Its MTU in bytes (from 1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Path of the network namespace it is in; empty on the node.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    /// Socket that stands for the interface (from 1.1.0).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub socket_path: String,
    /// PCI device that stands for the interface (from 1.1.0).
    #[serde(default, rename = "pciID", skip_serializing_if = "String::is_empty")]
    pub pci_id: String,
}

/// An address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpConfig {
    /// The address with its prefix length.
    pub address: Prefix,
    /// Its gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Index into [`AddResult::interfaces`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<u32>,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination.
    pub dst: Prefix,
    /// Next hop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    /// MTU in bytes (from 1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Largest TCP segment to advertise, in bytes (from 1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advmss: Option<u32>,
    /// Metric, lower first (from 1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    /// Routing table (from 1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    /// Scope (from 1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<u32>,
}

impl Route {
    /// A route of which only destination and next hop are given.
    pub fn via(dst: Prefix, gw: IpAddr) -> Self {
        Self { dst, gw: Some(gw), mtu: None, advmss: None, priority: None, table: None, scope: None }
    }
}

/// DNS settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Servers, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub nameservers: Vec<String>,
    /// Local domain.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Search domains.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub search: Vec<String>,
    /// Resolver options.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub options: Vec<String>,
}

/// Plugins in Go write an empty list as `null`.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

impl AddResult {
    /// Reads a result (`prevResult`) of the shape of `version`. What later versions added is ignored in earlier ones.
    pub fn parse(value: &Value, version: Version) -> Result<Self, CniError> {
        let invalid = |why: String| CniError::new(ErrorCode::InvalidConfig, format!("prevResult: {why}"));
        if let Some(own) = value.get("cniVersion").and_then(Value::as_str)
            && own != version.as_str()
        {
            return Err(invalid(format!("is of CNI version {own:?}, the configuration of {version}")));
        }
        let mut result: AddResult = serde_json::from_value(value.clone()).map_err(|e| invalid(e.to_string()))?;
        if version < Version::V1_1_0 {
            result.trim_to_1_0();
        }
        for (index, ip) in result.ips.iter().enumerate() {
            if let Some(interface) = ip.interface
                && usize::try_from(interface).map_or(true, |i| i >= result.interfaces.len())
            {
                let have = result.interfaces.len();
                return Err(invalid(format!("ips[{index}].interface is {interface}, with {have} interfaces listed")));
            }
        }
        Ok(result)
    }

    /// The result in the shape of `version`, as it goes to standard output or into a `prevResult`.
    pub fn to_json(&self, version: Version) -> Value {
        let mut shaped = self.clone();
        if version < Version::V1_1_0 {
            shaped.trim_to_1_0();
        }
        let body = serde_json::to_value(&shaped).unwrap_or_default();
        let mut out = serde_json::Map::new();
        out.insert("cniVersion".to_owned(), Value::from(version.as_str()));
        if let Value::Object(fields) = body {
            out.extend(fields);
        }
        if version < Version::V1_0_0
            && let Some(Value::Array(ips)) = out.get_mut("ips")
        {
            for (ip, config) in ips.iter_mut().zip(&shaped.ips) {
                if let Some(object) = ip.as_object_mut() {
                    object.insert(
                        "version".to_owned(),
                        Value::from(if config.address.address.is_ipv4() { "4" } else { "6" }),
                    );
                }
            }
        }
        Value::Object(out)
    }

    /// Adds another result behind this one: the rule for a plugin that is not the first of its list (specification,
    /// "Plugins … should output … prevResult with modifications").
    pub fn append(&mut self, other: AddResult) {
        let offset = u32::try_from(self.interfaces.len()).unwrap_or(u32::MAX);
        self.interfaces.extend(other.interfaces);
        self.ips.extend(other.ips.into_iter().map(|mut ip| {
            ip.interface = ip.interface.map(|i| i.saturating_add(offset));
            ip
        }));
        self.routes.extend(other.routes);
        if other.dns != Dns::default() {
            self.dns = other.dns;
        }
    }

    fn trim_to_1_0(&mut self) {
        for interface in &mut self.interfaces {
            interface.mtu = None;
            interface.socket_path.clear();
            interface.pci_id.clear();
        }
        for route in &mut self.routes {
            *route = Route {
                dst: route.dst,
                gw: route.gw,
                mtu: None,
                advmss: None,
                priority: None,
                table: None,
                scope: None,
            };
        }
    }
}
