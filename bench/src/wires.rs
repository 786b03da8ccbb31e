//! NodePorts through the driver of a device: the kernel makes frames, runs a node's program on them as its device's driver would
//! (`BPF_F_TEST_XDP_LIVE_FRAMES`), and sends on a veth what the program says; they are counted at the other end.
//!
//! All of it is on one CPU, and in every figure: what the kernel needs to make and to send a frame is in that of the least program that sends
//! frames back, which is the limit.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use libbpf_rs::{Link, MapCore, MapFlags, Object, ObjectBuilder, ProgramInput};
use nix::sched::{CloneFlags, setns, unshare};
use serde::{Deserialize, Serialize};
use towpath_datapath::bpf::{BpfConfig, Hook, Limits, NodeConfig, Programs};
use towpath_model::desired::{
    Algorithm, BackendAddress, BackendId, Clients, Frontend, FrontendTarget, NodePeer, ServiceId, ServiceTable,
};
use towpath_model::{Family, NamespacedName, NodeName, Protocol};

use crate::packet::packet;

/// The programs of `bpf/wires.c`.
const OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/wires.o"));
/// As `bpf/wires.c` has it.
const FLOWS: u16 = 1024;
const HEADERS: usize = 42;
/// Bytes of a frame: a small question, and room for nothing else.
const FRAME: usize = 106;
/// Frames that the kernel makes in one call.
const CALL: u32 = 16_384;
/// `BPF_F_TEST_XDP_LIVE_FRAMES` of linux/bpf.h.
const LIVE: u32 = 2;
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const OTHER_NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 2);
const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 9);
const BACKEND: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 20);
const PORT: u16 = 30080;
const MAC_NODE: [u8; 6] = [2, 0, 0, 0, 0, 0x51];
const MAC_CLIENT: [u8; 6] = [2, 0, 0, 0, 0, 0xee];

/// What the node does with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Way {
    /// The least program that sends it back.
    Echo,
    /// The same again.
    EchoAgain,
    /// A NodePort's endpoint on another node, by the program of XDP.
    Towpath,
    /// The same by the stack: destination and source translated by rules as kube-proxy has them.
    Iptables,
}

/// What is to be done.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Makes all ways; pins go to a directory on a BPF file system.
    Load {
        /// The directory.
        pin_dir: PathBuf,
    },
    /// Sends for a while.
    Send {
        /// Through which node.
        way: Way,
        /// How long.
        block: Duration,
    },
}

/// The worker's side.
#[derive(Default)]
pub(crate) struct Bench {
    wires: BTreeMap<Way, Wire>,
}

/// A node, and the way to it.
struct Wire {
    way: Way,
    /// The node's device.
    ifindex: u32,
    object: Object,
    /// Counts at the other end.
    _sink: Link,
    node: Option<Programs>,
    netns: OwnedFd,
}

impl Bench {
    /// Does it; packets a second that came back.
    ///
    /// # Errors
    /// The kernel refuses something, or packets are lost.
    pub(crate) fn block(&mut self, request: Request) -> Result<f64> {
        match request {
            Request::Load { pin_dir } => {
                for (number, way) in (0..).zip([Way::Echo, Way::EchoAgain, Way::Towpath, Way::Iptables]) {
                    let wire = Wire::new(number, way, &pin_dir).with_context(|| format!("{way:?}"))?;
                    // Connections and neighbours are there from the first block on.
                    wire.send(Duration::from_millis(20), false).with_context(|| format!("{way:?}"))?;
                    self.wires.insert(way, wire);
                }
                Ok(0.0)
            }
            Request::Send { way, block } => self
                .wires
                .get(&way)
                .context("nothing is made yet")?
                .send(block, true)
                .with_context(|| format!("{way:?}")),
        }
    }
}

fn netns() -> Result<OwnedFd> {
    Ok(File::open("/proc/self/ns/net").context("open the network namespace")?.into())
}

fn feed(argv: &[&str], input: &str) -> Result<()> {
    let (program, args) = argv.split_first().context("no command")?;
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that ends early says why itself.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().with_context(|| format!("wait for {program}"))?;
    if !output.status.success() {
        bail!("{}: {}; it was given:\n{input}", argv.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn index(device: &str) -> Result<u32> {
    nix::net::if_::if_nametoindex(device).with_context(|| format!("device {device}"))
}

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

impl Wire {
    fn new(number: u32, way: Way, pin_dir: &Path) -> Result<Self> {
        let near = format!("near{number}");
        let object = ObjectBuilder::default().open_memory(OBJECT)?.load().context("load the programs at the ends")?;
        unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
        let there = netns()?;
        let (node_mac, client_mac) = (mac(MAC_NODE), mac(MAC_CLIENT));
        feed(
            &["ip", "-batch", "-"],
            &format!(
                "link set lo up\nlink add up0 address {node_mac} type veth peer name {near} address {client_mac}\n\
                 addr add {NODE}/24 dev up0\nlink set up0 up\nlink set {near} up\nroute add default via 192.168.50.254\n\
                 neigh add 192.168.50.254 lladdr {client_mac} dev up0\nneigh add {OTHER_NODE} lladdr {client_mac} dev up0\n\
                 route add 10.2.0.0/24 via {OTHER_NODE} dev up0\n"
            ),
        )?;
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("forward")?;
        let up0 = index("up0")?;
        let node = if way == Way::Towpath { Some(towpath(up0, pin_dir)?) } else { None };
        if way == Way::Iptables {
            feed(&["iptables-restore"], &rules())?;
        }
        let sink = attach(&object, "tpb_sink", index(&near)?)?;
        let headers = map(&object, "tpb_headers")?;
        for flow in 0..FLOWS {
            let mut value = frame(flow);
            value.resize(HEADERS + 6, 0);
            headers.update(&u32::from(flow).to_ne_bytes(), &value, MapFlags::ANY).context("fill tpb_headers")?;
        }
        Ok(Self { way, ifindex: up0, object, _sink: sink, node, netns: there })
    }

    /// Packets a second that come back; what a slow way loses is none of them. `all`: most must.
    fn send(&self, block: Duration, all: bool) -> Result<f64> {
        setns(self.netns.as_fd(), CloneFlags::CLONE_NEWNET).context("enter the node's network namespace")?;
        let (object, name) = match self.way {
            Way::Echo | Way::EchoAgain => (&self.object, "tpb_echo"),
            Way::Iptables => (&self.object, "tpb_pass"),
            Way::Towpath => {
                let object =
                    self.node.as_ref().and_then(Programs::wire_object).context("the program of XDP is not loaded")?;
                (object, Hook::FromWire.program())
            }
        };
        let program =
            object.progs_mut().find(|program| program.name() == name).with_context(|| format!("no {name}"))?;
        let mut data = frame(0);
        data.resize(FRAME, 0);
        let (began, before, mut sent) = (Instant::now(), self.came_back()?, 0);
        while began.elapsed() < block {
            // struct xdp_md: data_end at 4, ingress_ifindex at 12.
            let mut context = [0u8; 24];
            for (at, number) in [(4, u32::try_from(FRAME)?), (12, self.ifindex)] {
                if let Some(field) = context.get_mut(at..at + 4) {
                    field.copy_from_slice(&number.to_ne_bytes());
                }
            }
            let input = ProgramInput {
                context_in: Some(&mut context),
                data_in: Some(&data),
                repeat: CALL,
                flags: LIVE,
                ..ProgramInput::default()
            };
            program.test_run(input).context("send frames")?;
            sent += u64::from(CALL);
        }
        let (took, back) = (began.elapsed(), self.came_back()? - before);
        if all && back < sent / 2 {
            bail!("{back} of {sent} packets came back");
        }
        Ok(back as f64 / took.as_secs_f64())
    }

    fn came_back(&self) -> Result<u64> {
        let counts = map(&self.object, "tpb_back")?.lookup_percpu(&0_u32.to_ne_bytes(), MapFlags::ANY)?;
        let counts = counts.context("no entry of tpb_back")?;
        Ok(counts.iter().filter_map(|count| Some(u64::from_ne_bytes(count.as_slice().try_into().ok()?))).sum())
    }
}

fn map<'a>(object: &'a Object, name: &str) -> Result<libbpf_rs::Map<'a>> {
    object.maps().find(|map| map.name() == name).with_context(|| format!("bpf/wires.c has no {name}"))
}

fn attach(object: &Object, name: &str, ifindex: u32) -> Result<Link> {
    let program = object.progs_mut().find(|program| program.name() == name);
    let program = program.with_context(|| format!("bpf/wires.c has no {name}"))?;
    program.attach_xdp(i32::try_from(ifindex)?).with_context(|| format!("attach {name}"))
}

/// A node with one NodePort, whose one endpoint is on another node.
fn towpath(up0: u32, pin_dir: &Path) -> Result<Programs> {
    let mut programs = Programs::open(BpfConfig { pin_dir: pin_dir.to_owned(), limits: Limits::default() })?;
    programs.apply_node(&NodeConfig {
        addresses: vec![NODE.into()],
        dns_addresses: Vec::new(),
        netns_cookie: 1,
        uplink_ifindex: up0,
        tunnel_ifindex: 0,
        tunnel_mac: [2, 0x74, 192, 168, 50, 1],
        tunnel_mtu: 1450,
        vni: 7,
        tunnel_port: 4789,
        node_ports: (30000, 32767),
        loopback_node_ports: (true, true),
        plain_routing: true,
        borrowed_tunnel: false,
        direct_return: false,
        borrowed_tunnel6: 0,
        udp: (0, 0),
        on_link: false,
    })?;
    let peer = |name: &str, address: Ipv4Addr, range: &str, local| -> Result<NodePeer> {
        Ok(NodePeer {
            name: NodeName::new(name),
            addresses: vec![address.into()],
            pod_cidrs: vec![range.parse()?],
            tunnel: address.into(),
            local,
            reach: towpath_model::desired::Reach::Tunnel,
            plain: false,
            flannel: None,
        })
    };
    programs.apply_peers(&[peer("n1", NODE, "10.1.0.0/24", true)?, peer("n2", OTHER_NODE, "10.2.0.0/24", false)?])?;
    let mut table = ServiceTable::default();
    let backend = BackendAddress { address: BACKEND.into(), port: 53, protocol: Protocol::Udp };
    table.backends.insert(BackendId(1), backend);
    let target = FrontendTarget {
        id: ServiceId(1),
        backends: vec![BackendId(1)],
        affinity_seconds: None,
        clients: Clients::All,
        service: NamespacedName::new("default", "service"),
        port_name: String::new(),
        algorithm: Algorithm::Random,
        table: Default::default(),
        sources: None,
    };
    let address: Option<IpAddr> = None;
    table
        .frontends
        .insert(Frontend { address, family: Family::V4, port: PORT, protocol: Protocol::Udp }, target.into());
    programs.apply_services(&table, Instant::now())?;
    // The kernel's test runs it: it need be attached nowhere.
    programs.prepare_wire(up0, MAC_NODE)?;
    Ok(programs)
}

/// A NodePort with one endpoint as kube-proxy 1.36 writes it for iptables: after the first packet of a flow none of them is looked at.
fn rules() -> String {
    format!(
        "*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-EXT-1 - [0:0]
:KUBE-SVC-1 - [0:0]
:KUBE-SEP-1 - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p udp -m udp --dport {PORT} -j KUBE-EXT-1
-A KUBE-EXT-1 -j MARK --set-xmark 0x4000/0x4000
-A KUBE-EXT-1 -j KUBE-SVC-1
-A KUBE-SVC-1 -j KUBE-SEP-1
-A KUBE-SEP-1 -p udp -m udp -j DNAT --to-destination {BACKEND}:53
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
"
    )
}

/// Link, network and transport header of a flow's frame.
fn frame(flow: u16) -> Vec<u8> {
    let mut udp = Vec::from((1024 + flow).to_be_bytes());
    udp.extend(PORT.to_be_bytes());
    udp.extend(((FRAME - 34) as u16).to_be_bytes());
    udp.resize(FRAME - 34, 0);
    let mut frame = [&MAC_NODE[..], &MAC_CLIENT, &[8, 0], &packet(CLIENT, NODE, 17, &udp, 6)].concat();
    frame.truncate(HEADERS);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::checksum;

    #[test]
    fn flows_are_all_different_and_their_checksums_right() {
        let ends: std::collections::BTreeSet<Vec<u8>> = (0..FLOWS).map(|flow| frame(flow)[26..38].to_vec()).collect();
        assert_eq!(ends.len(), usize::from(FLOWS));
        let frame = frame(77);
        assert_eq!((frame.len(), checksum(&frame[14..34])), (HEADERS, [0, 0]));
        let pseudo = [&frame[26..34], &[0, 17, 0, 72][..], &frame[34..]].concat();
        assert_eq!(checksum(&pseudo), [0, 0]);
    }
}
