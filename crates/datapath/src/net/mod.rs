//! The kernel's own network of one node: devices, addresses, routes, neighbours, rules, nftables, sysctls.
//!
//! Everything here is synchronous and acts in the network namespace of the calling thread (a [`netlink::Netlink`] socket in
//! that of the thread which opened it), so callers run it on a thread of their own and never across an await. What is ours
//! is told from what is not by names ([`link::TUNNEL_DEVICE`], [`tap::UDP_DEVICE`], pod devices, see [`pod::host_device`]), by [`PROTOCOL`] on routes,
//! rules and addresses, and by the nftables table [`nft::TABLE`]; nothing else is ever changed or deleted.

pub mod address;
pub mod address_news;
pub mod bucket;
pub mod card;
pub mod error;
pub mod filter;
pub mod foreign;
pub mod groups;
pub mod link;
pub mod local_ports;
pub mod mac;
pub mod namespaces;
pub mod neighbour;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod packet;
pub mod peers;
pub mod pod;
pub mod route;
pub mod rule;
pub mod sock_diag;
pub mod sysctl;
pub mod tap;
pub mod uplink;

pub use error::Error;

/// Marks routes, rules and addresses as ours (`rtm_protocol`, `FRA_PROTOCOL`, `IFA_PROTO`); add it as `116 towpath` to
/// `/etc/iproute2/rt_protos` to read it by name.
pub const PROTOCOL: u8 = 116;

/// Routing table that leads packets from our pods to the addresses of other nodes through the tunnel, and the priority of
/// the rules that point to it.
pub const NODE_TABLE: u32 = 7470;

/// The table that `ip route` shows (RT_TABLE_MAIN).
pub const MAIN_TABLE: u32 = 254;

/// The first address of a pod range, its gateway: on the loopback device of the node that owns the range. None for a range
/// that holds a single address.
pub fn gateway_of(cidr: ipnet::IpNet) -> Option<std::net::IpAddr> {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    if cidr.prefix_len() == cidr.max_prefix_len() {
        return None;
    }
    Some(match cidr.network() {
        IpAddr::V4(network) => IpAddr::V4(Ipv4Addr::from(u32::from(network).checked_add(1)?)),
        IpAddr::V6(network) => IpAddr::V6(Ipv6Addr::from(u128::from(network).checked_add(1)?)),
    })
}

/// The address as a range of its own: /32 or /128.
pub fn host_range(address: std::net::IpAddr) -> ipnet::IpNet {
    ipnet::IpNet::from(address)
}

/// The member of `addresses` that has the family of `like`.
pub fn of_family(addresses: &[std::net::IpAddr], like: std::net::IpAddr) -> Option<std::net::IpAddr> {
    addresses.iter().copied().find(|a| a.is_ipv4() == like.is_ipv4())
}
