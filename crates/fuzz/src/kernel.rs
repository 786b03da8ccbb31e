//! The kernel's own verdicts: the programs loaded once in namespaces of their own, their maps written by difference, and packets run through
//! them one by one (`BPF_PROG_TEST_RUN`).
//!
//! Everything lives in a network and a mount namespace of the calling thread, and ends with it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapCore, MapFlags, Object, ProgramInput};
use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};
use towpath_datapath::abi::Addr;
use towpath_datapath::bpf::{BpfConfig, Connection, Hook, Isolation, Limits, NodeConfig, Programs};
use towpath_model::desired::{LocalPod, NodePeer, PolicyImage, Reach};
use towpath_model::{NamespacedName, NodeName};

use crate::cluster::{Local, NODES, PLACES, RANGES, node_ips};
use crate::packet::{Ingress, Packet, Way};

/// `TC_ACT_SHOT`.
const SHOT: u32 = 2;
const HOST_MAC: [u8; 6] = [2, 0x74, 0x70, 0, 0, 1];
const TUNNEL_MAC: [u8; 6] = [2, 0x74, 10, 9, 0, 1];

/// Both ends of a pair serve as pods' devices: nothing is ever sent by them.
const SETUP: &str = "set -e
ip link set lo up
for n in 0 2 4; do ip link add tp$n type veth peer name tp$((n + 1)); done
ip link add up0 type veth peer name up1
ip link add vx0 type vxlan external dstport 4789 nolearning
for d in tp0 tp1 tp2 tp3 tp4 tp5 up0 up1 vx0; do ip link set $d up; done
ip addr add 10.9.0.1/24 dev up0
ip addr add fd09::1/64 dev up0 nodad
ip route add default via 10.9.0.254
ip -6 route add default via fd09::fe
ip neigh add 10.9.0.254 lladdr 02:00:00:00:00:fe dev up0
ip neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev up0
ip neigh add fd09::fe lladdr 02:00:00:00:00:fe dev up0
";

/// The programs of the first node.
#[derive(Debug)]
pub struct Kernel {
    programs: Programs,
    pins: tempfile::TempDir,
    places: Vec<u32>,
    tunnel: u32,
    uplink: u32,
    pods: Vec<LocalPod>,
}

fn index_of(device: &str) -> Result<u32> {
    nix::net::if_::if_nametoindex(device).with_context(|| format!("no device {device} in this namespace"))
}

fn parsed<T: std::str::FromStr>(texts: &[impl AsRef<str>]) -> Vec<T> {
    texts.iter().filter_map(|text| text.as_ref().parse().ok()).collect()
}

fn peers() -> Vec<NodePeer> {
    let peer = |node: usize| {
        let addresses: Vec<IpAddr> = parsed(&node_ips(node));
        Some(NodePeer {
            name: NodeName::new(NODES[node]),
            tunnel: *addresses.first()?,
            addresses,
            pod_cidrs: parsed(&RANGES[node]),
            local: node == 0,
            reach: Reach::Tunnel,
            plain: false,
            flannel: None,
        })
    };
    (0..NODES.len()).filter_map(peer).collect()
}

impl Kernel {
    /// Loads the programs. The calling thread is moved to namespaces of its own.
    ///
    /// # Errors
    /// The process may not, or the kernel refuses a program.
    pub fn load() -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "loading BPF programs needs root; --no-kernel compares the others alone"
        );
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("make namespaces")?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make mounts private")?;
        let pins = tempfile::tempdir().context("make a directory for pins")?;
        mount(Some("bpf"), pins.path(), Some("bpf"), MsFlags::empty(), none).context("mount bpffs")?;
        let status = Command::new("sh").args(["-c", SETUP]).status().context("run ip")?;
        ensure!(status.success(), "making devices failed: see what ip says above");
        let (tunnel, uplink) = (index_of("vx0")?, index_of("up0")?);
        let programs = load_programs(pins.path(), tunnel, uplink)?;
        let places = (0..PLACES[0]).map(|place| index_of(&format!("tp{place}"))).collect::<Result<_>>()?;
        Ok(Self { programs, pins, places, tunnel, uplink, pods: Vec::new() })
    }

    fn pod(&self, local: &Local) -> Result<LocalPod> {
        let place = u8::try_from(local.place)?;
        Ok(LocalPod {
            name: NamespacedName::new(&local.namespace, &local.name),
            container_id: local.name.clone(),
            addresses: local.addresses.clone(),
            host_device: format!("tp{place}"),
            ifindex: *self.places.get(local.place).context("no such place")?,
            mac: mac_of(place),
            host_mac: HOST_MAC,
            netns_cookie: 1_000 + u64::from(place),
            pod_id: 1 + u32::from(place),
        })
    }

    /// Forgets all pods and connections.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn clear(&mut self) -> Result<()> {
        self.programs.retain_pods(&[])?;
        self.pods.clear();
        Ok(())
    }

    /// Has the kernel hold these pods and this image.
    ///
    /// # Errors
    /// The kernel refuses, or there is no room.
    pub fn apply(&mut self, local: &[Local], image: &PolicyImage) -> Result<()> {
        let wanted: Vec<LocalPod> = local.iter().map(|local| self.pod(local)).collect::<Result<_>>()?;
        for gone in self.pods.iter().filter(|pod| !wanted.contains(pod)) {
            self.programs.remove_pod(gone)?;
        }
        for fresh in wanted.iter().filter(|pod| !self.pods.contains(pod)) {
            self.programs.set_pod(fresh, Isolation::HostOnly)?;
        }
        self.pods = wanted;
        self.programs.apply_policy(image)?;
        // What the tunnel's hook is to believe: the second node sent it.
        let mut trace = vec![0u8; 16 + 16 + 16];
        let from: Vec<IpAddr> = parsed(&node_ips(1)[..1]);
        let outer = from.first().map(|ip| Addr::new(*ip).b).unwrap_or_default();
        trace[..16].copy_from_slice(&outer);
        let map = self.programs.object().maps().find(|map| map.name() == "tp_trace").context("no map tp_trace")?;
        trace.resize(map.value_size() as usize, 0);
        map.update(&0u32.to_ne_bytes(), &trace, MapFlags::ANY).context("write tp_trace")
    }

    /// Whether the packet may pass. It must have a way.
    ///
    /// # Errors
    /// The program cannot be run.
    pub fn passes(&self, packet: &Packet) -> Result<bool> {
        let place_mac = |place: usize| mac_of(u8::try_from(place).unwrap_or(0));
        let device = |place: usize| self.places.get(place).copied().unwrap_or(0);
        let (hook, ifindex, ingress, source, destination) = match packet.way.context("a packet without a way")? {
            Way::FromPod(place) => (Hook::FromPod, device(place), device(place), place_mac(place), HOST_MAC),
            Way::ToPod(place, ingress) => {
                let ingress = match ingress {
                    Ingress::Node => 0,
                    Ingress::Place(other) => device(other),
                    Ingress::Uplink => self.uplink,
                    Ingress::Tunnel => self.tunnel,
                };
                (Hook::ToPod, device(place), ingress, HOST_MAC, place_mac(place))
            }
            Way::FromTunnel => (Hook::FromTunnel, self.tunnel, self.tunnel, [2, 0x74, 10, 9, 0, 2], TUNNEL_MAC),
        };
        let verdict = run(self.programs.object(), hook, &packet.frame(source, destination), ifindex, ingress)?;
        Ok(verdict != SHOT)
    }

    /// Runs a frame of the pod in a place through the hook for what pods send; whether it may pass.
    ///
    /// # Errors
    /// The program cannot be run.
    pub fn passes_frame(&self, place: usize, frame: &[u8]) -> Result<bool> {
        let device = *self.places.get(place).context("no such place")?;
        Ok(run(self.programs.object(), Hook::FromPod, frame, device, device)? != SHOT)
    }

    /// Packets dropped by reason, since the programs were loaded.
    ///
    /// # Errors
    /// The counters cannot be read.
    pub fn dropped(&self) -> Result<BTreeMap<&'static str, u64>> {
        let counters = self.programs.counters()?.into_iter().filter(|count| count.reason.is_drop());
        Ok(counters.map(|count| (count.reason.name(), count.packets)).collect())
    }

    /// The tracked connections.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn connections(&self) -> Result<Vec<Connection>> {
        Ok(self.programs.connections()?)
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // With the last descriptors the maps go too; the mount would end with the thread in any case.
        if let Err(error) = umount(self.pins.path()) {
            eprintln!("unmount {}: {error}", self.pins.path().display());
        }
    }
}

fn mac_of(place: u8) -> [u8; 6] {
    [2, 0, 0, 0, 1, place]
}

fn load_programs(pin_dir: &Path, tunnel: u32, uplink: u32) -> Result<Programs> {
    let limits = Limits {
        connections: 64 * 1024,
        services: 1024,
        slots: 1024,
        backends: 1024,
        classes: 16 * 1024,
        set_classes: 64 * 1024,
        ..Limits::default()
    };
    let mut programs = Programs::open_for_tests(BpfConfig { pin_dir: pin_dir.to_owned(), limits })?;
    programs.apply_node(&NodeConfig {
        addresses: parsed(&node_ips(0)),
        netns_cookie: 1,
        uplink_ifindex: uplink,
        tunnel_ifindex: tunnel,
        tunnel_mac: TUNNEL_MAC,
        tunnel_mtu: 1450,
        vni: 7,
        tunnel_port: 4789,
        node_ports: (30_000, 32_767),
        loopback_node_ports: (true, true),
        plain_routing: true,
        ..NodeConfig::default()
    })?;
    programs.apply_peers(&peers())?;
    Ok(programs)
}

fn run(object: &Object, hook: Hook, frame: &[u8], ifindex: u32, ingress: u32) -> Result<u32> {
    // struct __sk_buff: ingress_ifindex at 36, ifindex at 40.
    let mut context = [0u8; 192];
    context[36..40].copy_from_slice(&ingress.to_ne_bytes());
    context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
    let program = object.progs_mut().find(|program| program.name() == hook.program());
    let program = program.with_context(|| format!("no program {}", hook.program()))?;
    let input = ProgramInput { context_in: Some(&mut context), data_in: Some(frame), ..ProgramInput::default() };
    let output = program.test_run(input).with_context(|| format!("run {}", hook.program()))?;
    Ok(output.return_value)
}
