//! The state of the data path thread: what one node should be, and the calls that make it so.
//!
//! Every step that can be undone by somebody else (a device, a route, a sysctl) is an `ensure_*` that compares and repairs
//! (`ensure.rs`), so that opening, applying and auditing are the same code.

mod bandwidth;
mod ensure;
mod finish;
mod hooks;
pub(crate) mod lent;
mod mtu;
mod on_link;
pub(crate) mod pods;
mod reaper;
mod release;
mod remembered;
#[cfg(test)]
mod tests;
mod udp;
mod wires;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towpath_model::NodeName;
use towpath_model::desired::{NodePeer, PolicyChanges, PolicyImage, ServiceChanges, ServiceTable};

use self::finish::Finishers;
use self::hooks::{Attachment, Part};
use self::reaper::Reaper;
use self::release::{Releaser, UdpTable};
use crate::bpf::{self, BpfConfig, Changes, Programs, ServicesApplied};
use crate::error::Error;
use crate::net::groups::Groups;
use crate::net::link::{self, Link, TUNNEL_DEVICE};
use crate::net::namespaces::{self, Namespaces};
use crate::net::netlink::Netlink;
use crate::net::peers::{PeerTables, Tunnel};
use crate::net::uplink::Outside;
use crate::net::{self, gateway_of, local_ports, mac, netns, nft, of_family, peers, tap, uplink};
use crate::records::Records;
use crate::requests::{Applied, DatapathConfig, NodeFacts, NodeStatus, Released, ServiceFlows};
use crate::uninstall;

/// Duplicate address detection takes one to two seconds (RFC 4862 §5.4).
const DAD_PATIENCE: Duration = Duration::from_secs(3);

/// UDP flows are not looked at more often.
const RELEASE_EVERY: Duration = Duration::from_millis(200);

/// How long uninstalling waits for what is being taken away already.
const UNINSTALL_PATIENCE: Duration = Duration::from_secs(10);

/// One node's data path.
#[derive(Debug)]
pub(crate) struct Node {
    config: DatapathConfig,
    netlink: Netlink,
    /// None only in tests of the network beneath the programs.
    programs: Option<Programs>,
    attachment: Attachment,
    facts: NodeFacts,
    records: Records,
    reaper: Reaper,
    finishers: Finishers,
    releaser: Option<Releaser>,
    /// When it was asked last.
    released_at: Option<Instant>,
    /// Indexes of devices that were buried and whose program links are not yet forgotten.
    buried: BTreeSet<u32>,
    /// Devices of pods whose programs are filters that links are to follow, by index with their names.
    unlinked: BTreeMap<u32, String>,
    /// Devices that lead out and run the uplink's program; unknown at the start, when those of an earlier run may have it.
    hooked: Option<Vec<(u32, String)>>,
    wires: wires::Wires,
    /// What is to be applied before another version's programs go.
    awaited: BTreeSet<Part>,
    /// The peers as they were planned.
    planned: Vec<NodePeer>,
    /// The same as each is reached.
    peers: Vec<NodePeer>,
    /// Nodes that were to be sent packets as they are, and have a router in between.
    beyond: BTreeSet<NodeName>,
    /// Name of the tunnel device, where it is another network's.
    lent: Option<String>,
    /// Devices by which packets of nodes come as they are, IPv4 and IPv6.
    plain: BTreeMap<NodeName, [u32; 2]>,
    /// Bridges of another network on which the node answers for pods here, by index with their names.
    bridges: BTreeMap<u32, String>,
    /// Addresses in this node's ranges that another network's pods hold.
    elsewhere: BTreeSet<IpAddr>,
    /// Whether `apply_peers` was called: before it, what a former agent left stays.
    peers_known: bool,
    /// Whether packets are taken by way of user space (`udp`); none: nobody has said yet, and what a former agent left stays.
    udp_wanted: Option<bool>,
    /// MAC addresses of pods that the uplink lets in.
    let_in: BTreeSet<[u8; 6]>,
    /// What is heard there of IPv6.
    groups: Groups,
    nft: nft::Table,
    problems: Vec<String>,
    /// Pods that could not be adopted when this was opened.
    lost: Vec<String>,
    /// What pods have by [`Node::apply_pod_mtu`]; none: it was not called.
    pod_mtu: Option<u32>,
    /// Where pods' network namespaces were found.
    namespaces: Namespaces,
}

impl Node {
    /// Opens with programs. What cannot work (no uplink, no address) is found before anything is loaded.
    pub(crate) fn open(config: DatapathConfig) -> Result<Self, Error> {
        let facts = gather(&mut Netlink::open()?, &config)?;
        let programs = load(&config)?;
        let attachment = Attachment::of_kernel(&programs)?;
        Self::open_with(config, facts, Some(programs), attachment)
    }

    /// Opens as on a kernel that has no links for devices.
    #[cfg(test)]
    fn open_with_filters(config: DatapathConfig) -> Result<Self, Error> {
        let facts = gather(&mut Netlink::open()?, &config)?;
        let programs = load(&config)?;
        Self::open_with(config, facts, Some(programs), Attachment::Filters)
    }

    /// Opens the network beneath the programs alone.
    #[cfg(test)]
    fn open_beneath(config: DatapathConfig) -> Result<Self, Error> {
        let facts = gather(&mut Netlink::open()?, &config)?;
        Self::open_with(config, facts, None, Attachment::Links)
    }

    fn open_with(
        config: DatapathConfig,
        facts: NodeFacts,
        programs: Option<Programs>,
        attachment: Attachment,
    ) -> Result<Self, Error> {
        let netlink = Netlink::open()?;
        let records = Records::open(config.state_dir.join("pods"))?;
        let nft = nft::Table::default();
        let groups = Groups::on(facts.uplink_ifindex);
        let purger = || programs.as_ref().map(Programs::purger).transpose();
        let reaper = Reaper::start(purger()?)?;
        let finishers = Finishers::start()?;
        let releaser = programs.as_ref().map(|programs| Releaser::start(programs, facts.netns_cookie)).transpose()?;
        let awaited = Part::awaited(programs.as_ref());
        let mut node = Self {
            config,
            netlink,
            programs,
            attachment,
            facts,
            records,
            reaper,
            finishers,
            releaser,
            released_at: None,
            buried: BTreeSet::new(),
            unlinked: BTreeMap::new(),
            hooked: None,
            wires: wires::Wires::default(),
            awaited,
            lent: None,
            plain: BTreeMap::new(),
            bridges: BTreeMap::new(),
            elsewhere: BTreeSet::new(),
            planned: Vec::new(),
            peers: Vec::new(),
            beyond: BTreeSet::new(),
            peers_known: false,
            udp_wanted: None,
            let_in: BTreeSet::new(),
            groups,
            nft,
            problems: Vec::new(),
            lost: Vec::new(),
            pod_mtu: None,
            namespaces: Namespaces::new(namespaces::PLACES.map(PathBuf::from)),
        };
        node.ensure_node()?;
        node.ensure_nftables(false)?;
        node.remember_pods()?;
        node.bury_again();
        node.adopt_pods()?;
        if let Some(programs) = &mut node.programs {
            programs.sweep_links()?;
        }
        Ok(node)
    }

    /// What was found out anew; what pods have is not found out.
    fn take_facts(&mut self, facts: NodeFacts) {
        self.facts = NodeFacts { pod_mtu: self.pod_mtu.unwrap_or(facts.pod_mtu), ..facts };
    }

    pub(crate) fn facts(&self) -> &NodeFacts {
        &self.facts
    }

    pub(crate) fn status(&self) -> NodeStatus {
        let released = self.releaser.as_ref().map(Releaser::released).unwrap_or_default();
        NodeStatus {
            facts: self.facts.clone(),
            pods: self.records.iter().count(),
            limited: self.limited(),
            peers: self.peers.iter().filter(|p| !p.local).count(),
            reached: self.peers.iter().filter(|p| !p.local).map(|p| (p.name.clone(), p.reach)).collect(),
            beyond: self.beyond.clone(),
            on_link: self.is_on_link(),
            problems: self.problems(&released),
            accelerated: self.wires.accelerated(),
            acceleration_notes: self.wires.notes(),
            released,
        }
    }

    fn problems(&self, released: &Released) -> Vec<String> {
        let known = self.problems.iter().chain(&self.lost).chain(&released.problem).cloned();
        known.chain(self.port_problem()).collect()
    }

    /// Whether sockets may take the ports that the programs give to clients.
    fn port_problem(&self) -> Option<String> {
        self.programs.as_ref()?;
        local_ports::problem().unwrap_or_else(|error| Some(error.to_string()))
    }

    /// See [`crate::Datapath::service_flows`].
    pub(crate) fn service_flows(&self) -> Result<ServiceFlows, Error> {
        let sockets = self.releaser.as_ref().map(Releaser::sockets);
        release::flows(sockets, self.observe(Programs::connections)?)
    }

    /// See [`crate::Datapath::apply_peers`]. Programs learn of a peer before routes lead to it.
    pub(crate) fn apply_peers(&mut self, peers: Vec<NodePeer>) -> Result<Applied, Error> {
        self.planned = peers;
        self.peers_known = true;
        let own = self.planned.iter().find(|p| p.local).map(|p| p.tunnel);
        let mut applied = Applied::default();
        if own.is_some_and(|own| own != self.facts.tunnel_address) {
            let facts = gather_with(&mut self.netlink, &self.config, own)?;
            self.take_facts(facts);
            applied.note(self.ensure_node());
        }
        self.ensure_surroundings()?;
        if self.lent.is_some() {
            self.ensure_node_hooks()?;
        }
        applied.note(self.ensure_nftables(false));
        applied.note(self.ensure_on_link());
        self.ensure_peers(&mut applied);
        self.problems = applied.problems.clone();
        self.applied_part(Part::Peers);
        Ok(applied)
    }

    /// Nodes' prefixes to the programs; this node's with the addresses that the API does not name.
    fn apply_prefixes(&mut self) -> Result<(), Error> {
        let silent = self.silent();
        let mut peers = self.peers.clone();
        for own in peers.iter_mut().filter(|peer| peer.local) {
            own.addresses.extend(&self.facts.more_addresses);
        }
        if let Some(programs) = &mut self.programs {
            programs.silence(silent);
            programs.apply_peers(&peers)?;
        }
        Ok(())
    }

    /// Addresses of nodes at which NodePorts do not answer.
    fn silent(&self) -> BTreeSet<IpAddr> {
        let chosen = &self.config.settings.node_port_addresses;
        let named = self.peers.iter().flat_map(|peer| peer.addresses.iter().copied());
        let named: BTreeSet<IpAddr> = named.chain(self.config.settings.addresses.iter().copied()).collect();
        let tunnels = self.peers.iter().map(|peer| peer.tunnel);
        let others = tunnels.chain(self.facts.more_addresses.iter().copied()).filter(|other| !named.contains(other));
        let others: Vec<IpAddr> = others.filter(|other| !chosen.has(*other, false)).collect();
        named.iter().copied().filter(|address| !chosen.has(*address, true)).chain(others).collect()
    }

    /// See [`crate::Datapath::apply_services`].
    pub(crate) fn apply_services(&mut self, table: &ServiceTable) -> Result<ServicesApplied, Error> {
        let Some(programs) = &mut self.programs else { return Ok(ServicesApplied::default()) };
        let applied = programs.apply_services(table, Instant::now())?;
        self.release_udp(Instant::now());
        self.applied_part(Part::Services);
        Ok(applied)
    }

    /// See [`crate::Datapath::apply_service_changes`].
    pub(crate) fn apply_service_changes(&mut self, changes: &ServiceChanges) -> Result<ServicesApplied, Error> {
        let Some(programs) = &mut self.programs else { return Ok(ServicesApplied::default()) };
        let applied = programs.apply_service_changes(changes, Instant::now())?;
        self.release_udp(Instant::now());
        Ok(applied)
    }

    /// Has UDP flows let go that are held to what their Service no longer has, if there may be any. Where Services change all the
    /// time, not at each change: the next sweep comes within a second.
    fn release_udp(&mut self, now: Instant) {
        let (Some(programs), Some(releaser)) = (&mut self.programs, &self.releaser) else { return };
        let lately = |at: Instant| now.saturating_duration_since(at) < RELEASE_EVERY;
        if !self.released_at.is_some_and(lately) && programs.take_udp_left() {
            self.released_at = Some(now);
            releaser.release(UdpTable::of(programs.udp_targets()));
        }
    }

    /// See [`crate::Datapath::apply_policy`].
    pub(crate) fn apply_policy(&mut self, image: &PolicyImage) -> Result<Changes, Error> {
        let Some(programs) = &mut self.programs else { return Ok(Changes::default()) };
        let changes = programs.apply_policy(image)?;
        self.applied_part(Part::Policy);
        Ok(changes)
    }

    /// See [`crate::Datapath::apply_policy_changes`].
    pub(crate) fn apply_policy_changes(&mut self, changes: &PolicyChanges) -> Result<Changes, Error> {
        let Some(programs) = &mut self.programs else { return Ok(Changes::default()) };
        let changes = programs.apply_policy_changes(changes)?;
        self.applied_part(Part::Policy);
        Ok(changes)
    }

    /// See [`crate::Datapath::vacate_policy`].
    pub(crate) fn vacate_policy(&mut self) -> Result<Changes, Error> {
        let Some(programs) = &mut self.programs else { return Ok(Changes::default()) };
        Ok(programs.vacate_policy()?)
    }

    /// See [`crate::Datapath::sweep`].
    pub(crate) fn sweep(&mut self, now: Instant) -> Result<usize, Error> {
        self.forget_buried()?;
        self.replace_lent_tunnel()?;
        self.release_udp(now);
        match &mut self.programs {
            Some(programs) => Ok(programs.sweep(now)?),
            None => Ok(0),
        }
    }

    /// Reads something of the programs; empty where there are none.
    pub(crate) fn observe<R: Default>(&self, read: impl FnOnce(&Programs) -> bpf::Result<R>) -> Result<R, Error> {
        self.programs.as_ref().map_or_else(|| Ok(R::default()), |programs| read(programs).map_err(program_error))
    }

    /// See [`crate::Datapath::follow_addresses`].
    pub(crate) fn follow_addresses(&mut self) -> Result<Applied, Error> {
        let mut applied = Applied::default();
        let uplink = uplink::find(&mut self.netlink, &self.config.settings.addresses, self.config.uplink.as_deref())?;
        let outside = find_outside(&mut self.netlink, &self.config, &uplink)?;
        let (devices, addresses) = (&mut self.facts.outside, &mut self.facts.more_addresses);
        if (&*devices, &*addresses) == (&outside.devices, &outside.addresses) {
            return Ok(applied);
        }
        for come in outside.addresses.iter().filter(|address| !addresses.contains(address)) {
            applied.changes.push(format!("address {come} has come"));
        }
        for gone in addresses.iter().filter(|address| !outside.addresses.contains(address)) {
            applied.changes.push(format!("address {gone} has gone"));
        }
        (*devices, *addresses) = (outside.devices, outside.addresses);
        self.ensure_node_hooks()?;
        if self.peers_known {
            self.apply_prefixes()?;
        }
        applied.note(self.ensure_nftables(false));
        Ok(applied)
    }

    /// See [`crate::Datapath::follow_service_ranges`].
    pub(crate) fn follow_service_ranges(&mut self, ranges: Vec<IpNet>) -> Result<(), Error> {
        self.config.settings.service_cidrs = ranges;
        self.ensure_nftables(false)?;
        Ok(())
    }

    /// See [`crate::Datapath::follow_non_masquerade`].
    pub(crate) fn follow_non_masquerade(&mut self, destinations: Vec<IpNet>) -> Result<(), Error> {
        self.config.settings.non_masquerade_cidrs = destinations;
        self.ensure_nftables(false)?;
        Ok(())
    }

    /// See [`crate::Datapath::audit`].
    pub(crate) fn audit(&mut self) -> Applied {
        let mut applied = Applied::default();
        let own = Some(self.facts.tunnel_address);
        match gather_with(&mut self.netlink, &self.config, own) {
            Ok(facts) => self.take_facts(facts),
            Err(error) => applied.problems.push(error.to_string()),
        }
        applied.note(self.ensure_node());
        applied.note(self.ensure_nftables(true));
        self.ensure_pods(&mut applied);
        applied.problems.extend(self.take_over());
        if self.peers_known {
            if let Err(error) = self.ensure_surroundings() {
                applied.problems.push(error.to_string());
            }
            applied.note(self.ensure_on_link());
            self.ensure_peers(&mut applied);
        }
        if let Some(programs) = &mut self.programs
            && let Err(error) = programs.sweep_links()
        {
            applied.problems.push(error.to_string());
        }
        self.problems = applied.problems.clone();
        applied
    }

    /// See [`crate::Datapath::uninstall`].
    pub(crate) fn uninstall(&mut self) -> Result<(), Error> {
        let mut errors: Vec<Error> = Vec::new();
        let mut note = |result: Result<(), Error>| errors.extend(result.err());
        note(self.reaper.settle(&[], UNINSTALL_PATIENCE));
        uninstall::network(&mut self.netlink, &mut note);
        for device in self.records.iter().map(|r| r.pod.host_device.clone()).collect::<Vec<_>>() {
            note(self.records.remove(&device));
        }
        if let Some(programs) = self.programs.take() {
            note(programs.unpin_all().map_err(Error::from));
        }
        Error::collect(errors)
    }

    fn tunnel(&mut self) -> Result<Tunnel, Error> {
        let (lent_v6, led) = self.find_lent_v6()?;
        Ok(Tunnel {
            device: self.facts.tunnel_ifindex,
            id: self.config.settings.vxlan.vni,
            addresses: self.config.settings.addresses.clone(),
            gateways: self.facts.gateways.clone(),
            lent: self.lent.is_some(),
            lent_v6,
            led,
            uplink: self.facts.uplink_ifindex,
            udp: self.facts.udp_ifindex,
            plain: self.plain.clone(),
        })
    }

    fn nft_facts(&self) -> nft::Facts {
        let settings = &self.config.settings;
        let mut nodes: Vec<IpAddr> = settings.addresses.iter().chain(&self.facts.more_addresses).copied().collect();
        nodes.extend(self.peers.iter().flat_map(|p| p.addresses.iter().copied().chain([p.tunnel])));
        nodes.sort_unstable();
        nodes.dedup();
        nft::Facts {
            pods: settings.pod_cidrs.clone(),
            cluster: settings.cluster_cidrs.clone(),
            services: settings.service_cidrs.clone(),
            own: settings.addresses.clone(),
            nodes,
            masqueraded: settings.masqueraded.clone(),
            untranslated: settings.non_masquerade_cidrs.clone(),
            dns: settings.dns_addresses.clone(),
            tunnel_port: settings.vxlan.port,
            udp_port: Some(settings.udp_port).filter(|_| self.facts.udp_ifindex > 0),
            // Before the peers are known every node would be a stranger.
            borrowed_tunnel: self.lent.is_some() && self.peers_known,
            // Before the first peers nothing is known of another network's pods either.
            track_pods: !self.elsewhere.is_empty() || !self.peers_known,
        }
    }

    fn peer_tables(&mut self) -> Result<PeerTables, Error> {
        Ok(peers::tables(&self.tunnel()?, &self.peers))
    }
}

fn load(config: &DatapathConfig) -> Result<Programs, Error> {
    Ok(Programs::open(BpfConfig { pin_dir: config.bpffs.clone(), limits: config.limits.clone() })?)
}

fn gather(netlink: &mut Netlink, config: &DatapathConfig) -> Result<NodeFacts, Error> {
    gather_with(netlink, config, None)
}

/// What can be known before anything is made; the tunnel device's index is 0 until it is there.
fn gather_with(netlink: &mut Netlink, config: &DatapathConfig, tunnel: Option<IpAddr>) -> Result<NodeFacts, Error> {
    let settings = &config.settings;
    let Some(tunnel_address) = tunnel.or(settings.addresses.first().copied()) else {
        return Err(net::Error::Refused(format!(
            "node {} has no address; check `kubectl get node {} -o wide`",
            settings.name, settings.name
        ))
        .into());
    };
    if of_family(&settings.addresses, tunnel_address) != Some(tunnel_address) {
        return Err(net::Error::Refused(format!(
            "tunnel address {tunnel_address} is not an address of node {}",
            settings.name
        ))
        .into());
    }
    uplink::settle(netlink, &settings.addresses, DAD_PATIENCE)?;
    let uplink = uplink::find(netlink, &settings.addresses, config.uplink.as_deref())?;
    lent::find(netlink, settings.vxlan)?;
    let tunnel_mtu = uplink::tunnel_mtu(uplink.mtu, tunnel_address);
    let present = link::by_name(netlink, TUNNEL_DEVICE)?;
    let outside = find_outside(netlink, config, &uplink)?;
    let bears_macs = uplink::bears_macs(&uplink);
    Ok(NodeFacts {
        uplink: uplink.name,
        uplink_ifindex: uplink.index,
        uplink_mtu: uplink.mtu,
        outside: outside.devices,
        more_addresses: outside.addresses,
        tunnel_ifindex: present.map_or(0, |l| l.index),
        udp_ifindex: link::by_name(netlink, tap::UDP_DEVICE)?.map_or(0, |l| l.index),
        tunnel_address,
        tunnel_mac: mac::of_tunnel(tunnel_address),
        tunnel_mtu,
        pod_mtu: settings.pod_mtu.unwrap_or(tunnel_mtu),
        gateways: settings.pod_cidrs.iter().copied().filter_map(gateway_of).collect(),
        netns_cookie: netns::cookie()?,
        takes_ipip: bpf::takes_ipv6_out_of_ipv4(),
        bears_macs,
    })
}

/// What leads out of the node, with its addresses there that its object does not name.
fn find_outside(netlink: &mut Netlink, config: &DatapathConfig, uplink: &Link) -> Result<Outside, Error> {
    let mut outside = uplink::outside(netlink, uplink, &config.devices)?;
    outside.addresses.retain(|address| !config.settings.addresses.contains(address));
    Ok(outside)
}

/// The root of the cgroup2 mount.
fn cgroup_root() -> Result<PathBuf, Error> {
    let mounts = fs::read_to_string("/proc/mounts").map_err(|e| net::Error::system("read /proc/mounts", e))?;
    let root = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let place = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(place.replace("\\040", " ")))
    });
    Ok(root.ok_or_else(|| {
        net::Error::Refused("no cgroup2 file system is mounted; mount one, or name a directory of one".to_owned())
    })?)
}

fn program_error(error: bpf::Error) -> Error {
    Error::Bpf(error)
}
