//! Validation of Endpoints and EndpointSlices.

use std::net::IpAddr;

use serde_json::Value;

use super::container::{port_number, protocol};
use super::legacy_ip;
use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::metadata::{immutable, labels};
use crate::kinds::read::Read;

/// An address that traffic is sent to: not unspecified, loopback or link-local.
pub(super) fn endpoint_ip(text: &str, path: &Path, faults: &mut Faults) {
    let Some(address) = format::sloppy_ip(text).map(format::unmapped) else {
        faults.invalid(path, text, "must be a valid IP address");
        return;
    };
    let (link_local, multicast) = match address {
        IpAddr::V4(v4) => (v4.is_link_local(), matches!(v4.octets(), [224, 0, 0, _])),
        IpAddr::V6(v6) => {
            let first = v6.segments().first().copied().unwrap_or(0);
            (first & 0xffc0 == 0xfe80, first & 0xff0f == 0xff02)
        }
    };
    if address.is_unspecified() {
        faults.invalid(path, text, &format!("may not be unspecified ({text})"));
    }
    if address.is_loopback() {
        faults.invalid(path, text, "may not be in the loopback range (127.0.0.0/8, ::1/128)");
    }
    if link_local {
        faults.invalid(path, text, "may not be in the link-local range (169.254.0.0/16, fe80::/10)");
    }
    if multicast {
        faults.invalid(path, text, "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)");
    }
}

/// Checks an `Endpoints`.
pub(crate) fn endpoints(object: &Value, faults: &mut Faults) {
    for (index, subset) in object.list("subsets").iter().enumerate() {
        let here = Path::new("subsets").index(index);
        if subset.list("addresses").is_empty() && subset.list("notReadyAddresses").is_empty() {
            faults.required(&here, "must specify `addresses` or `notReadyAddresses`");
        }
        for field in ["addresses", "notReadyAddresses"] {
            for (place, address) in subset.list(field).iter().enumerate() {
                self::address(address, &here.child(field).index(place), faults);
            }
        }
        let ports = subset.list("ports");
        for (place, port) in ports.iter().enumerate() {
            let path = here.child("ports").index(place);
            let name = port.text("name");
            if !name.is_empty() {
                faults.invalid_each(&path.child("name"), name, format::dns_label(name));
            } else if ports.len() > 1 {
                faults.required(&path.child("name"), "");
            }
            port_number(port.int("port").unwrap_or(0), &path.child("port"), faults);
            protocol(port.text("protocol"), &path.child("protocol"), faults);
            if port.has("appProtocol") {
                faults.invalid_each(
                    &path.child("appProtocol"),
                    port.text("appProtocol"),
                    format::label_key(port.text("appProtocol")),
                );
            }
        }
    }
}

fn address(address: &Value, path: &Path, faults: &mut Faults) {
    let (ip, hostname, node) = (address.text("ip"), address.text("hostname"), address.text("nodeName"));
    legacy_ip(ip, &[], &path.child("ip"), faults);
    if !hostname.is_empty() {
        faults.invalid_each(&path.child("hostname"), hostname, format::dns_label(hostname));
    }
    if address.has("nodeName") {
        faults.invalid_each(&path.child("nodeName"), node, format::dns_subdomain(node));
    }
    endpoint_ip(ip, &path.child("ip"), faults);
}

const ADDRESS_TYPES: &[&str] = &["FQDN", "IPv4", "IPv6"];

/// Checks an `EndpointSlice`.
pub(crate) fn endpoint_slice(object: &Value, faults: &mut Faults) {
    let kind = object.text("addressType");
    if kind.is_empty() {
        faults.required(&Path::new("addressType"), "");
    } else if !ADDRESS_TYPES.contains(&kind) {
        faults.unsupported(&Path::new("addressType"), kind, ADDRESS_TYPES);
    }
    slice_endpoints(object.list("endpoints"), kind, &Path::new("endpoints"), faults);
    slice_ports(object.list("ports"), &Path::new("ports"), faults);
}

/// The address type of an `EndpointSlice` never changes.
pub(crate) fn endpoint_slice_update(object: &Value, old: &Value, faults: &mut Faults) {
    immutable(object.at("addressType"), old.at("addressType"), &Path::new("addressType"), faults);
}

fn slice_endpoints(endpoints: &[Value], kind: &str, path: &Path, faults: &mut Faults) {
    if endpoints.len() > 1000 {
        faults.too_many(path, endpoints.len(), 1000);
        return;
    }
    for (index, endpoint) in endpoints.iter().enumerate() {
        let here = path.index(index);
        let addresses = endpoint.texts("addresses");
        let address_path = here.child("addresses");
        if addresses.is_empty() {
            faults.required(&address_path, "must contain at least 1 address");
        } else if addresses.len() > 100 {
            faults.too_many(&address_path, addresses.len(), 100);
        }
        for (place, address) in addresses.iter().enumerate() {
            slice_address(address, kind, &address_path.index(place), faults);
        }
        let topology = endpoint.at("deprecatedTopology");
        let count = topology.as_object().map_or(0, serde_json::Map::len);
        if count > 16 {
            faults.too_many(&here.child("deprecatedTopology"), count, 16);
        }
        labels(topology, &here.child("deprecatedTopology"), faults);
        if endpoint.has("hostname") {
            faults.invalid_each(
                &here.child("hostname"),
                endpoint.text("hostname"),
                format::dns_label(endpoint.text("hostname")),
            );
        }
        if endpoint.has("nodeName") {
            faults.invalid_each(
                &here.child("nodeName"),
                endpoint.text("nodeName"),
                format::dns_subdomain(endpoint.text("nodeName")),
            );
        }
    }
}

fn slice_address(address: &str, kind: &str, path: &Path, faults: &mut Faults) {
    match kind {
        "IPv4" | "IPv6" => {
            let before = faults.len();
            legacy_ip(address, &[], path, faults);
            let six = format::sloppy_ip(address).is_some_and(|address| address.is_ipv6());
            if faults.len() == before && six != (kind == "IPv6") {
                faults.invalid(path, address, &format!("must be a valid {kind} address"));
            }
            if format::sloppy_ip(address).is_some() {
                endpoint_ip(address, path, faults);
            }
        }
        "FQDN" => {
            let bare = address.strip_suffix('.').unwrap_or(address);
            if bare.is_empty() {
                faults.required(path, "");
                return;
            }
            let complaints = format::dns_subdomain(bare);
            if !complaints.is_empty() {
                faults.invalid_each(path, bare, complaints);
            } else if !bare.contains('.') {
                faults.invalid(path, bare, "should be a domain with at least two segments separated by dots");
            }
        }
        _ => {}
    }
}

fn slice_ports(ports: &[Value], path: &Path, faults: &mut Faults) {
    if ports.len() > 20000 {
        faults.too_many(path, ports.len(), 20000);
        return;
    }
    let mut names = Vec::new();
    for (index, port) in ports.iter().enumerate() {
        let here = path.index(index);
        let name = port.text("name");
        if !name.is_empty() {
            faults.invalid_each(&here.child("name"), name, format::dns_label(name));
        }
        if names.contains(&name) {
            faults.duplicate(&here.child("name"), name);
        }
        names.push(name);
        if let Some(number) = port.int("port") {
            port_number(number, &here.child("port"), faults);
        }
        protocol(port.text("protocol"), &here.child("protocol"), faults);
        if port.has("appProtocol") {
            faults.invalid_each(
                &here.child("appProtocol"),
                port.text("appProtocol"),
                format::label_key(port.text("appProtocol")),
            );
        }
    }
}
