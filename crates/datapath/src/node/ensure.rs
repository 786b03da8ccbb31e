//! The steps that compare the kernel with what should be and repair it. Each returns what it changed, in words.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use towpath_model::desired::Vxlan;

use super::{Node, cgroup_root, lent, program_error};
use crate::bpf::NodeConfig;
use crate::error::Error;
use crate::net::link::{self, Link, TUNNEL_DEVICE};
use crate::net::route::Route;
use crate::net::tap::UDP_DEVICE;
use crate::net::{MAIN_TABLE, NODE_TABLE, address, mac, neighbour, nft, route, rule, sysctl};
use crate::requests::Applied;

impl Node {
    /// Sysctls, tunnel device, addresses on `lo`, the programs of node-wide hooks. The tunnel device comes up only when
    /// its program is attached.
    pub(super) fn ensure_node(&mut self) -> Result<Vec<String>, Error> {
        let mut changes = self.ensure_forwarding()?;
        changes.extend(self.ensure_announced()?);
        let tunnel = self.ensure_tunnel_device(&mut changes)?;
        self.facts.tunnel_ifindex = tunnel.index;
        if let Some(mac) = tunnel.mac.filter(|_| self.lent.is_some()) {
            self.facts.tunnel_mac = mac;
        }
        let udp = self.ensure_udp_device(&mut changes)?;
        self.ensure_programs()?;
        if let Some(udp) = udp.filter(|udp| !udp.up) {
            changes.push(format!("bring device {} up", udp.name));
            self.netlink.request(link::up(udp.index, &udp.name))?;
        }
        if !tunnel.up {
            changes.push(format!("bring device {TUNNEL_DEVICE} up"));
            self.netlink.request(link::up(tunnel.index, TUNNEL_DEVICE))?;
        }
        let lo = link::existing(&mut self.netlink, "lo")?;
        let settings = &self.config.settings;
        let wanted: BTreeSet<_> = self.facts.gateways.iter().chain(&settings.dns_addresses).copied().collect();
        changes.extend(address::ensure(&mut self.netlink, lo.index, "lo", &wanted)?);
        if !lo.up {
            self.netlink.request(link::up(lo.index, "lo"))?;
            changes.push("bring device lo up".to_owned());
        }
        changes.extend(rule::ensure(&mut self.netlink, &self.config.settings.pod_cidrs)?);
        changes.extend(self.ensure_refusals()?);
        Ok(changes)
    }

    /// What is for an address of our own ranges that no pod has is refused here; else it would leave by the default route.
    fn ensure_refusals(&mut self) -> Result<Vec<String>, Error> {
        let wanted: Vec<Route> = self.config.settings.pod_cidrs.iter().copied().map(Route::unreachable).collect();
        let (changes, failed) = route::ensure(&mut self.netlink, MAIN_TABLE, |r| r.device == 0, &wanted)?;
        Error::collect(failed.into_iter().map(Error::from).collect())?;
        Ok(changes)
    }

    fn ensure_forwarding(&self) -> Result<Vec<String>, Error> {
        let (has_v4, has_v6) = (self.has_family(true), self.has_family(false));
        let mut wanted = Vec::new();
        if has_v4 {
            wanted.push(("ipv4/ip_forward".to_owned(), "1"));
        }
        if has_v6 {
            // A forwarding node ignores router advertisements unless told otherwise; its own default route may be from one.
            for (_, device) in &self.facts.outside {
                let accept = format!("ipv6/conf/{device}/accept_ra");
                if sysctl::get(&accept)? == "1" {
                    wanted.push((accept, "2"));
                }
            }
            wanted.push(("ipv6/conf/all/forwarding".to_owned(), "1"));
        }
        let mut changes = Vec::new();
        for (name, value) in wanted {
            if sysctl::set(&name, value)? {
                changes.push(format!("set sysctl {name} to {value}"));
            }
        }
        Ok(changes)
    }

    /// The devices that lead out say their addresses anew when they come up or get another MAC address: other nodes, whose packets go to
    /// the MAC address that they know, hear of it at once, and not when they doubt it after half a minute.
    fn ensure_announced(&self) -> Result<Vec<String>, Error> {
        let mut changes = Vec::new();
        for (_, device) in &self.facts.outside {
            for name in [format!("ipv4/conf/{device}/arp_notify"), format!("ipv6/conf/{device}/ndisc_notify")] {
                if sysctl::set_if_known(&name, "1")? {
                    changes.push(format!("set sysctl {name} to 1"));
                }
            }
        }
        Ok(changes)
    }

    fn has_family(&self, v4: bool) -> bool {
        self.config.settings.pod_cidrs.iter().any(|c| c.addr().is_ipv4() == v4)
    }

    /// Adopts the tunnel device, or makes it (down). A device of its name that is of another kind or port is ours, from
    /// another configuration: it is replaced.
    fn ensure_tunnel_device(&mut self, changes: &mut Vec<String>) -> Result<Link, Error> {
        let port = self.config.settings.vxlan.port;
        if let Some(lent) = self.find_lent_tunnel()? {
            return Ok(lent);
        }
        // It may have been a lent device's until now.
        self.facts.tunnel_mac = mac::of_tunnel(self.facts.tunnel_address);
        let (mac, mtu) = (self.facts.tunnel_mac, self.facts.tunnel_mtu);
        let netlink = &mut self.netlink;
        let mut present = link::by_name(netlink, TUNNEL_DEVICE)?;
        if let Some(other) = present.take_if(|l| l.vxlan != Some((true, port))) {
            link::delete(netlink, other.index, TUNNEL_DEVICE)?;
            changes.push(format!("delete device {TUNNEL_DEVICE} of another kind"));
        }
        let tunnel = match present {
            Some(tunnel) => tunnel,
            None => {
                link::create_vxlan(netlink, TUNNEL_DEVICE, mac, port, mtu)?;
                changes.push(format!("make device {TUNNEL_DEVICE}"));
                link::existing(netlink, TUNNEL_DEVICE)?
            }
        };
        let mut requests = Vec::new();
        if !tunnel.up {
            requests.push(link::no_link_local(tunnel.index, TUNNEL_DEVICE));
        }
        if tunnel.mac != Some(mac) {
            requests.push(link::set_mac(tunnel.index, TUNNEL_DEVICE, mac));
        }
        if tunnel.mtu != mtu {
            requests.push(link::set_mtu(tunnel.index, TUNNEL_DEVICE, mtu));
        }
        changes.extend(requests.iter().map(|r| r.operation.clone()));
        netlink.batch(requests).into_iter().collect::<Result<(), _>>()?;
        // Packets of outside clients come through it too, and their way back is another device. Loose is not enough: where a device has no
        // address, as this one, the kernel takes loose for strict (`__fib_validate_source`). Who may send what is judged by `tp_from_tunnel`.
        let filter = format!("ipv4/conf/{TUNNEL_DEVICE}/rp_filter");
        if sysctl::set_if_known(&filter, "0")? {
            changes.push(format!("set sysctl {filter} to 0"));
        }
        Ok(tunnel)
    }

    /// Node facts first, then the hooks that read them.
    pub(super) fn ensure_programs(&mut self) -> Result<(), Error> {
        let settings = &self.config.settings;
        let Vxlan { vni, port } = settings.vxlan;
        let facts = &self.facts;
        let on_link = self.is_on_link();
        let Some(programs) = &mut self.programs else { return Ok(()) };
        let plain_routing = rule::is_plain(&mut self.netlink)?;
        let borrowed_tunnel6 = if self.lent.is_some() { lent::tunnel6(&link::list(&mut self.netlink)?) } else { 0 };
        programs.apply_node(&NodeConfig {
            addresses: settings.addresses.clone(),
            dns_addresses: settings.dns_addresses.clone(),
            netns_cookie: facts.netns_cookie,
            uplink_ifindex: facts.uplink_ifindex,
            tunnel_ifindex: facts.tunnel_ifindex,
            tunnel_mac: facts.tunnel_mac,
            tunnel_mtu: facts.tunnel_mtu,
            vni,
            tunnel_port: port,
            node_ports: settings.node_ports,
            loopback_node_ports: (
                settings.node_port_addresses.has(Ipv4Addr::LOCALHOST.into(), false),
                settings.node_port_addresses.has(Ipv6Addr::LOCALHOST.into(), false),
            ),
            plain_routing,
            borrowed_tunnel: self.lent.is_some(),
            direct_return: settings.direct_server_return,
            borrowed_tunnel6,
            udp: (facts.udp_ifindex, settings.udp_port),
            on_link,
        })?;
        self.ensure_node_hooks()?;
        let cgroup = match &self.config.cgroup {
            Some(cgroup) => cgroup.clone(),
            None => cgroup_root()?,
        };
        self.programs.as_mut().map_or(Ok(()), |programs| programs.attach_cgroup(&cgroup)).map_err(program_error)
    }

    /// The nftables table; `compare` with what the kernel lists, or only with what was written last. Before the peers are
    /// known a table that is there stays: without their addresses it would masquerade what a former agent's does not.
    pub(super) fn ensure_nftables(&mut self, compare: bool) -> Result<Vec<String>, Error> {
        if !self.peers_known && nft::is_present()? {
            return Ok(Vec::new());
        }
        let facts = self.nft_facts();
        let written = if compare { self.nft.repair(&facts)? } else { self.nft.apply(&facts)? };
        Ok(if written { vec!["write nftables table inet towpath".to_owned()] } else { Vec::new() })
    }

    /// Routes, neighbours and rules towards the peers. Neighbours come before the routes that lead to them.
    pub(super) fn ensure_peers(&mut self, applied: &mut Applied) {
        let tables = match self.peer_tables() {
            Ok(tables) => tables,
            Err(error) => return applied.problems.push(error.to_string()),
        };
        let device = self.facts.tunnel_ifindex;
        applied.problems.extend(tables.problems);
        match &self.lent {
            None => applied.note(neighbour::ensure(&mut self.netlink, device, TUNNEL_DEVICE, &tables.neighbours)),
            Some(name) => {
                applied.note(neighbour::ensure_forwarding(&mut self.netlink, device, name, &tables.forwarding));
                applied.note(neighbour::ensure_among(&mut self.netlink, device, name, &tables.neighbours));
            }
        }
        if self.facts.udp_ifindex > 0 {
            let device = self.facts.udp_ifindex;
            applied.note(neighbour::ensure(&mut self.netlink, device, UDP_DEVICE, &tables.udp_neighbours));
        }
        for (table, wanted) in [(MAIN_TABLE, tables.ranges), (NODE_TABLE, tables.nodes)] {
            // In the main table the others of ours are the pods'. Ours through no device of ours are leftovers.
            let pods: BTreeSet<u32> = self.records.iter().map(|r| r.pod.ifindex).collect();
            let scope = |r: &Route| r.device > 0 && !pods.contains(&r.device);
            let yields = |range| tables.yielding.contains(&range);
            match route::ensure_or_yield(&mut self.netlink, table, scope, &wanted, yields) {
                Ok((changes, failed)) => {
                    applied.changes.extend(changes);
                    applied.problems.extend(failed.iter().map(ToString::to_string));
                }
                Err(error) => applied.problems.push(error.to_string()),
            }
        }
    }
}
