//! What Flannel writes on a node's object, by which the Flannel of every other node sends packets there
//! (flannel `pkg/subnet/kube`, `pkg/backend/vxlan`).

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{Family, canonical, family_of};

/// What all annotations begin with.
pub const PREFIX: &str = "flannel.alpha.coreos.com/";

/// A node that Flannel knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flannel {
    /// How its packets go.
    pub backend: FlannelBackend,
    /// Where they go to, at most one a family.
    pub ends: Vec<FlannelEnd>,
    /// Annotations that cannot be understood, in words.
    pub problems: Vec<String>,
}

/// Flannel's backend on a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FlannelBackend {
    /// `vxlan`.
    Vxlan,
    /// `host-gw`.
    HostGw,
    /// One that is not understood here.
    Other(String),
}

/// Where packets for a node's pods of one family go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlannelEnd {
    /// `public-ip` or `public-ipv6`: the outer address, or the next hop.
    pub address: IpAddr,
    /// Of `vxlan`: the device there.
    pub vtep: Option<Vtep>,
}

/// Flannel's VXLAN device on a node (`backend-data`, `backend-v6-data`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vtep {
    /// Network identifier; versions before 0.13 do not write it, and 1 is the default.
    pub vni: u32,
    /// Its MAC address.
    pub mac: [u8; 6],
}

#[derive(Deserialize)]
struct BackendData {
    #[serde(rename = "VNI", default = "default_vni")]
    vni: u32,
    #[serde(rename = "VtepMAC")]
    vtep_mac: String,
}

fn default_vni() -> u32 {
    1
}

/// Six bytes in hexadecimal with colons; none if it is not that, or no unicast address.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next().filter(|part| part.len() == 2)?, 16).ok()?;
    }
    let unicast = mac.first().is_some_and(|first| first & 1 == 0) && mac != [0; 6];
    (parts.next().is_none() && unicast).then_some(mac)
}

impl Flannel {
    /// From a node's annotations; none where Flannel keeps no subnet there (`kube-subnet-manager`).
    pub fn of(annotations: &BTreeMap<String, String>) -> Option<Self> {
        let get = |name: &str| annotations.get(&format!("{PREFIX}{name}")).map(String::as_str);
        if get("kube-subnet-manager") != Some("true") {
            return None;
        }
        let backend = match get("backend-type").unwrap_or_default() {
            "vxlan" => FlannelBackend::Vxlan,
            "host-gw" => FlannelBackend::HostGw,
            other => FlannelBackend::Other(other.to_owned()),
        };
        let mut flannel = Self { backend, ends: Vec::new(), problems: Vec::new() };
        for (family, address, data) in
            [(Family::V4, "public-ip", "backend-data"), (Family::V6, "public-ipv6", "backend-v6-data")]
        {
            match flannel.end(family, get(address), get(data)) {
                Ok(end) => flannel.ends.extend(end),
                Err(what) => flannel.problems.push(format!("annotation {PREFIX}{what}")),
            }
        }
        Some(flannel)
    }

    fn end(&self, family: Family, address: Option<&str>, data: Option<&str>) -> Result<Option<FlannelEnd>, String> {
        let Some(text) = address else { return Ok(None) };
        let (ip_name, data_name) = match family {
            Family::V4 => ("public-ip", "backend-data"),
            Family::V6 => ("public-ipv6", "backend-v6-data"),
        };
        let address = text
            .parse::<IpAddr>()
            .ok()
            .map(canonical)
            .filter(|address| family_of(*address) == family)
            .ok_or_else(|| format!("{ip_name}: {text:?} is no address of its family"))?;
        if self.backend != FlannelBackend::Vxlan {
            return Ok(Some(FlannelEnd { address, vtep: None }));
        }
        let text = data.unwrap_or_default();
        let read: BackendData = serde_json::from_str(text).map_err(|e| format!("{data_name}: {text:?}: {e}"))?;
        let mac = parse_mac(&read.vtep_mac)
            .ok_or_else(|| format!("{data_name}: VtepMAC {:?} is no MAC address of a device", read.vtep_mac))?;
        Ok(Some(FlannelEnd { address, vtep: Some(Vtep { vni: read.vni, mac }) }))
    }

    /// Where packets of a family go.
    pub fn end_of(&self, family: Family) -> Option<&FlannelEnd> {
        self.ends.iter().find(|end| family_of(end.address) == family)
    }
}

/// The annotations that make the Flannel of other nodes send packets of a family's pods to a VXLAN device here, as they
/// have it (`vxlan`).
pub fn announcing_vxlan(ends: &[(IpAddr, Vtep)]) -> BTreeMap<String, String> {
    let mut annotations = BTreeMap::new();
    let mut put = |name: &str, value: String| drop(annotations.insert(format!("{PREFIX}{name}"), value));
    put("kube-subnet-manager", "true".to_owned());
    put("backend-type", "vxlan".to_owned());
    for (address, vtep) in ends {
        let mac = vtep.mac.map(|byte| format!("{byte:02x}")).join(":");
        let data = format!(r#"{{"VNI":{},"VtepMAC":"{mac}"}}"#, vtep.vni);
        match family_of(*address) {
            Family::V4 => {
                put("public-ip", address.to_string());
                put("backend-data", data);
            }
            Family::V6 => {
                put("public-ipv6", address.to_string());
                put("backend-v6-data", data);
            }
        }
    }
    annotations
}

/// The annotations that make the Flannel of other nodes route packets over this node's addresses (`host-gw`).
pub fn announcing_host_gw(addresses: &[IpAddr]) -> BTreeMap<String, String> {
    let mut annotations = BTreeMap::new();
    let mut put = |name: &str, value: String| drop(annotations.insert(format!("{PREFIX}{name}"), value));
    put("kube-subnet-manager", "true".to_owned());
    put("backend-type", "host-gw".to_owned());
    put("backend-data", "null".to_owned());
    for address in addresses {
        let name = if address.is_ipv4() { "public-ip" } else { "public-ipv6" };
        put(name, address.to_string());
    }
    annotations
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| (format!("{PREFIX}{name}"), (*value).to_owned())).collect()
    }

    const VXLAN: [(&str, &str); 4] = [
        ("kube-subnet-manager", "true"),
        ("backend-type", "vxlan"),
        ("backend-data", r#"{"VNI":1,"VtepMAC":"de:ad:be:ef:00:01"}"#),
        ("public-ip", "192.0.2.1"),
    ];

    #[test]
    fn a_node_of_flannels_vxlan_is_understood_in_both_families() {
        let flannel = Flannel::of(&annotations(&VXLAN)).unwrap();
        let expected = Vtep { vni: 1, mac: [0xde, 0xad, 0xbe, 0xef, 0, 1] };
        assert_eq!(flannel.backend, FlannelBackend::Vxlan);
        assert_eq!(flannel.ends, [FlannelEnd { address: "192.0.2.1".parse().unwrap(), vtep: Some(expected) }]);
        let mut both = VXLAN.to_vec();
        both.extend([("public-ipv6", "fd00::1"), ("backend-v6-data", r#"{"VtepMAC":"02:00:00:00:00:02"}"#)]);
        let flannel = Flannel::of(&annotations(&both)).unwrap();
        let end = flannel.end_of(Family::V6).unwrap();
        assert_eq!(end.vtep.unwrap(), Vtep { vni: 1, mac: [2, 0, 0, 0, 0, 2] }, "old versions do not say the VNI");
        assert!(flannel.problems.is_empty());
    }

    #[test]
    fn host_gw_has_addresses_and_no_device() {
        let flannel = Flannel::of(&announcing_host_gw(&["192.0.2.1".parse().unwrap()])).unwrap();
        assert_eq!(flannel.backend, FlannelBackend::HostGw);
        assert_eq!(flannel.ends, [FlannelEnd { address: "192.0.2.1".parse().unwrap(), vtep: None }]);
    }

    #[test]
    fn who_is_not_managed_by_flannel_is_none_of_its_nodes() {
        let mut pairs = VXLAN.to_vec();
        pairs[0].1 = "false";
        assert_eq!(Flannel::of(&annotations(&pairs)), None);
        assert_eq!(Flannel::of(&BTreeMap::new()), None);
    }

    #[test]
    fn nonsense_is_named_and_never_an_end() {
        for (name, value) in [
            ("backend-data", "null"),
            ("backend-data", r#"{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#),
            ("backend-data", r#"{"VNI":1,"VtepMAC":"de:ad:be:ef:00"}"#),
            ("public-ip", "fd00::1"),
            ("public-ip", "nonsense"),
        ] {
            let mut map = annotations(&VXLAN);
            map.insert(format!("{PREFIX}{name}"), value.to_owned());
            let flannel = Flannel::of(&map).unwrap();
            assert!(flannel.ends.is_empty(), "{name} {value}");
            assert!(flannel.problems[0].contains(name), "{:?}", flannel.problems);
        }
    }

    #[test]
    fn what_we_announce_is_what_flannel_would() {
        let vtep = Vtep { vni: 1, mac: [0xde, 0xad, 0xbe, 0xef, 0, 1] };
        assert_eq!(announcing_vxlan(&[("192.0.2.1".parse().unwrap(), vtep)]), annotations(&VXLAN));
    }
}
