//! What the kernel programs cost a packet: run on packets of many flows with `BPF_PROG_TEST_RUN`, in a network namespace of our own.
//!
//! One packet again and again would find all it needs in the nearest cache and flatter every program. So each flow's packet runs
//! once, and the kernel's own clock says for how long. That clock is in every figure: a program that does nothing runs beside each,
//! and its time is taken off.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use libbpf_rs::{MapCore, MapFlags, Object, ObjectBuilder, ProgramInput};
use serde::{Deserialize, Serialize};
use towpath_datapath::bpf::{BpfConfig, Hook, Isolation, Limits, NodeConfig, Programs};
use towpath_model::desired::{
    Algorithm, BackendAddress, BackendId, Clients, Frontend, FrontendTarget, LocalPod, NodePeer, PodSets, ServiceId,
    ServiceTable, SetId,
};
use towpath_model::{Family, NamespacedName, NodeName, Protocol};
use towpath_policy::{Compiler, View};

use crate::cluster::NAMESPACE;
use crate::cluster::policies::{self, Admitted};
use crate::packet::packet;

/// The programs of `bpf/unit.c`.
const UNIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/unit.o"));
/// Flows: more than the nearest caches hold.
const FLOWS: u32 = 65_536;
/// Services that they go to, in turn.
const SERVICES: u32 = 10_000;
/// Rules, in each direction, of the policies that judge both pods.
const RULES: usize = 1000;
const NODE: &str = "n1";
/// First port of the backends, which are all in one pod.
const PORT: u16 = 8080;
/// First Service address.
const FIRST: u32 = 0x0a60_0001;
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 10);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 11);
const MAC_CLIENT: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
const MAC_SERVER: [u8; 6] = [2, 0, 0, 0, 0, 0xb];
const MAC_HOST: [u8; 6] = [2, 0x74, 0x70, 0, 0, 1];
/// `TC_ACT_OK` and `TC_ACT_REDIRECT` of linux/pkt_cls.h.
const PASSED: u32 = 0;
const REDIRECTED: u32 = 7;
/// TCP flags.
const SYN: u8 = 2;
const ACK: u8 = 16;

/// Two pods, an uplink and a tunnel device, as the agent would have them.
const DEVICES: &str = "\
link add tpa address 02:74:70:00:00:01 type veth peer name pa
link add tpb address 02:74:70:00:00:01 type veth peer name pb
link add up0 type veth peer name up1
link add vx0 type vxlan external dstport 4789 nolearning
link set lo up
link set tpa up
link set tpb up
link set pa up
link set pb up
link set up0 up
link set up1 up
link set vx0 up
addr add 192.168.50.1/24 dev up0
route add default via 192.168.50.254
";

/// What is to be run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Loads everything; pins go to a directory on a BPF file system.
    Load {
        /// The directory.
        pin_dir: PathBuf,
    },
    /// One look-up a packet.
    One,
    /// The same by another program.
    Again,
    /// The first packet of every flow, from a pod to a Service: translated, tracked, given to the other pod.
    New,
    /// A later one of every flow, after an answer.
    Established,
    /// As [`Request::New`], with policies that judge both ends.
    NewJudged,
    /// As [`Request::Established`], with those.
    EstablishedJudged,
}

/// The worker's side.
#[derive(Default)]
pub(crate) struct Bench {
    loaded: Option<Loaded>,
}

struct Loaded {
    programs: Programs,
    unit: Object,
    client: LocalPod,
    server: LocalPod,
    /// The sets that policies give to the client and the server.
    sets: [PodSets; 2],
}

impl Bench {
    /// Runs it; nanoseconds a packet, without those of an empty program.
    ///
    /// # Errors
    /// The kernel refuses, or a packet did not go where it should.
    pub(crate) fn block(&mut self, request: Request) -> Result<f64> {
        let loaded = match (&request, &mut self.loaded) {
            (Request::Load { pin_dir }, loaded) => {
                *loaded = Some(Loaded::new(pin_dir.clone())?);
                return Ok(0.0);
            }
            (_, Some(loaded)) => loaded,
            (_, None) => bail!("nothing is loaded yet"),
        };
        match request {
            Request::Load { .. } => Ok(0.0),
            Request::One => loaded.unit("tpb_one"),
            Request::Again => loaded.unit("tpb_again"),
            Request::New => loaded.new_flows([PodSets::default(); 2]),
            Request::NewJudged => loaded.new_flows(loaded.sets),
            Request::Established => loaded.established([PodSets::default(); 2]),
            Request::EstablishedJudged => loaded.established(loaded.sets),
        }
    }
}

fn local_pod(id: u32, name: &str, device: &str, mac: [u8; 6], address: Ipv4Addr) -> Result<LocalPod> {
    Ok(LocalPod {
        name: NamespacedName::new("default", name),
        container_id: name.to_owned(),
        addresses: vec![address.into()],
        host_device: device.to_owned(),
        ifindex: nix::net::if_::if_nametoindex(device).with_context(|| format!("device {device}"))?,
        mac,
        host_mac: MAC_HOST,
        // Of nobody's namespace: no socket is made here.
        netns_cookie: 1_000_000 + u64::from(id),
        pod_id: id,
    })
}

/// `SERVICES` Services with a backend each.
fn table() -> ServiceTable {
    let mut table = ServiceTable::default();
    for number in 0..SERVICES {
        let backend = BackendId(number + 1);
        let port = PORT + u16::try_from(number).unwrap_or(0);
        let to = BackendAddress { address: SERVER.into(), port, protocol: Protocol::Tcp };
        table.backends.insert(backend, to);
        let address = Some(IpAddr::from(Ipv4Addr::from(FIRST + number)));
        let frontend = Frontend { address, family: Family::V4, port: 80, protocol: Protocol::Tcp };
        let target = FrontendTarget {
            id: ServiceId(number + 1),
            backends: vec![backend],
            affinity_seconds: None,
            clients: Clients::All,
            service: NamespacedName::new("default", format!("service-{number}")),
            port_name: String::new(),
            algorithm: Algorithm::Random,
            table: Default::default(),
            sources: None,
        };
        table.frontends.insert(frontend, target.into());
    }
    table
}

/// Has the kernel hold policies of `RULES` rules for both pods, the last of which lets the one connect to the other; the sets that they
/// have then.
fn apply_policies(programs: &mut Programs) -> Result<[PodSets; 2]> {
    let pods = [("client", CLIENT), ("server", SERVER)];
    let admitted = Admitted { from: "client", to: "server", ports: (1, u16::MAX) };
    let mut objects = policies::rules(RULES, admitted);
    objects.extend(
        pods.map(|(name, ip)| policies::running(NAMESPACE, name, NODE, ip.into(), &serde_json::json!({"app": name}))),
    );
    let world = policies::world(objects)?;
    let image =
        Compiler::new(Duration::from_secs(5)).compile(&View::of(&world), &NodeName::new(NODE), Duration::ZERO)?;
    programs.apply_policy(&image)?;
    let sets = pods.map(|(_, ip)| image.pods.get(&IpAddr::from(ip)).copied().unwrap_or_default());
    if sets.iter().flat_map(|sets| [sets.ingress, sets.egress]).any(|set| set == SetId(0)) {
        bail!("the policies do not isolate both pods: {sets:?}");
    }
    Ok(sets)
}

impl Loaded {
    fn new(pin_dir: PathBuf) -> Result<Self> {
        let mut child = Command::new("ip").args(["-batch", "-"]).stdin(std::process::Stdio::piped()).spawn();
        let child = child.as_mut().map_err(|error| anyhow::anyhow!("start ip: {error}"))?;
        if let Some(mut stdin) = child.stdin.take() {
            std::io::Write::write_all(&mut stdin, DEVICES.as_bytes()).context("tell ip which devices to make")?;
        }
        if !child.wait()?.success() {
            bail!("ip could not make the devices");
        }
        let index = |device: &str| nix::net::if_::if_nametoindex(device).with_context(|| format!("device {device}"));
        // So many that one pod may hold all flows.
        let limits = Limits { connections: 8 * FLOWS, ..Limits::default() };
        let mut programs = Programs::open(BpfConfig { pin_dir, limits })?;
        let node = IpAddr::from([192, 168, 50, 1]);
        programs.apply_node(&NodeConfig {
            addresses: vec![node],
            netns_cookie: 1,
            uplink_ifindex: index("up0")?,
            tunnel_ifindex: index("vx0")?,
            tunnel_mac: [2, 0x74, 192, 168, 50, 1],
            tunnel_mtu: 1450,
            vni: 7,
            tunnel_port: 4789,
            node_ports: (30000, 32767),
            loopback_node_ports: (true, true),
            direct_return: false,
            plain_routing: true,
            ..NodeConfig::default()
        })?;
        programs.apply_peers(&[NodePeer {
            name: NodeName::new(NODE),
            addresses: vec![node],
            pod_cidrs: vec!["10.1.0.0/24".parse()?],
            tunnel: node,
            local: true,
            reach: towpath_model::desired::Reach::Tunnel,
            plain: false,
            flannel: None,
        }])?;
        let client = local_pod(11, "client", "tpa", MAC_CLIENT, CLIENT)?;
        let server = local_pod(12, "server", "tpb", MAC_SERVER, SERVER)?;
        for pod in [&client, &server] {
            programs.set_pod(pod, Isolation::Sets(PodSets::default()))?;
        }
        programs.apply_services(&table(), Instant::now())?;
        let sets = apply_policies(&mut programs)?;
        let unit = ObjectBuilder::default().open_memory(UNIT)?.load().context("load the programs to compare with")?;
        let flows = unit.maps().find(|map| map.name() == "tpb_flows").context("bpf/unit.c has no tpb_flows")?;
        for number in 0..FLOWS {
            let frame = frame(number, SYN);
            // As tpb_look_up takes them: both addresses, both ports, and the protocol in a word of its own.
            let mut key = [0; 16];
            if let Some((to, from)) = key.get_mut(..12).zip(frame.get(26..38)) {
                to.copy_from_slice(from);
            }
            if let Some(to) = key.get_mut(12..) {
                to.copy_from_slice(&6_u32.to_ne_bytes());
            }
            flows.update(&key, &[0; 64], MapFlags::ANY).context("fill tpb_flows")?;
        }
        Ok(Self { programs, unit, client, server, sets })
    }

    fn new_flows(&mut self, sets: [PodSets; 2]) -> Result<f64> {
        self.forget(sets)?;
        self.ours(SYN)
    }

    fn established(&mut self, sets: [PodSets; 2]) -> Result<f64> {
        self.forget(sets)?;
        self.ours(SYN)?;
        self.answer()?;
        // The first after an answer makes the connection an established one.
        self.ours(ACK)?;
        self.ours(ACK)
    }

    /// Ends all connections, and has the two pods judged by these sets.
    fn forget(&mut self, [client, server]: [PodSets; 2]) -> Result<()> {
        self.programs.remove_pod(&self.client)?;
        self.programs.set_pod(&self.client, Isolation::Sets(client))?;
        self.programs.set_pod(&self.server, Isolation::Sets(server))?;
        let left = self.programs.held()?.all;
        if left != 0 { bail!("{left} connections stay when their pod is removed") } else { Ok(()) }
    }

    fn unit(&self, name: &str) -> Result<f64> {
        let program = program(&self.unit, name)?;
        self.run(&program, |number| frame(number, SYN), self.client.ifindex, PASSED)
    }

    fn ours(&self, flags: u8) -> Result<f64> {
        let program = program(self.programs.object(), Hook::FromPod.program())?;
        self.run(&program, |number| frame(number, flags), self.client.ifindex, REDIRECTED)
    }

    /// Each flow's first answer.
    fn answer(&self) -> Result<f64> {
        let program = program(self.programs.object(), Hook::FromPod.program())?;
        self.run(&program, answer, self.server.ifindex, REDIRECTED)
    }

    /// Runs a program once on a packet of each flow, and the empty one beside it.
    fn run(
        &self,
        program: &libbpf_rs::ProgramMut<'_>,
        frame: impl Fn(u32) -> Vec<u8>,
        ifindex: u32,
        verdict: u32,
    ) -> Result<f64> {
        let empty = self::program(&self.unit, "tpb_empty")?;
        let (mut taken, mut idle) = (0, 0);
        for number in 0..FLOWS {
            let frame = frame(number);
            idle += once(&empty, &frame, ifindex)?.1;
            let (said, nanoseconds) = once(program, &frame, ifindex)?;
            if said != verdict {
                bail!("{:?} said {said} of flow {number}, not {verdict}", program.name());
            }
            taken += nanoseconds;
        }
        Ok((taken as f64 - idle as f64) / f64::from(FLOWS))
    }
}

fn program<'a>(object: &'a Object, name: &str) -> Result<libbpf_rs::ProgramMut<'a>> {
    object.progs_mut().find(|program| program.name() == name).with_context(|| format!("no program {name}"))
}

/// What a program says of a packet from the client's device, and the nanoseconds that it took.
fn once(program: &libbpf_rs::ProgramMut<'_>, frame: &[u8], ifindex: u32) -> Result<(u32, u64)> {
    // struct __sk_buff: ingress_ifindex at 36, ifindex at 40.
    let mut context = [0u8; 192];
    for at in [36, 40] {
        if let Some(field) = context.get_mut(at..at + 4) {
            field.copy_from_slice(&ifindex.to_ne_bytes());
        }
    }
    let input =
        ProgramInput { context_in: Some(&mut context), data_in: Some(frame), repeat: 1, ..ProgramInput::default() };
    let output = program.test_run(input).context("run a program on a packet")?;
    Ok((output.return_value, output.duration.as_nanos().try_into()?))
}

/// A TCP packet of the `number`th flow from the client to a Service.
fn frame(number: u32, flags: u8) -> Vec<u8> {
    // No divisor in common with the number of Services: no two flows are the same.
    let port = 1024 + u16::try_from(number % 59_999).unwrap_or(0);
    let from = SocketAddrV4::new(CLIENT, port);
    let to = SocketAddrV4::new(Ipv4Addr::from(FIRST + number % SERVICES), 80);
    segment(MAC_CLIENT, from, to, flags)
}

/// What the backend answers to the `number`th flow's first packet.
fn answer(number: u32) -> Vec<u8> {
    let port = 1024 + u16::try_from(number % 59_999).unwrap_or(0);
    let from = SocketAddrV4::new(SERVER, PORT + u16::try_from(number % SERVICES).unwrap_or(0));
    segment(MAC_SERVER, from, SocketAddrV4::new(CLIENT, port), SYN | ACK)
}

/// A frame to the node with a TCP segment that has no data.
fn segment(mac: [u8; 6], from: SocketAddrV4, to: SocketAddrV4, flags: u8) -> Vec<u8> {
    let mut tcp = Vec::from(from.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend([0, 0, 0x13, 0x88, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    [&MAC_HOST[..], &mac, &[8, 0], &packet(*from.ip(), *to.ip(), 6, &tcp, 16)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::checksum;

    #[test]
    fn flows_are_all_different_and_their_checksums_right() {
        let keys: std::collections::BTreeSet<Vec<u8>> =
            (0..FLOWS).map(|number| frame(number, SYN)[26..38].to_vec()).collect();
        assert_eq!(keys.len(), FLOWS as usize);
        let frame = frame(12_345, ACK);
        assert_eq!(checksum(&frame[14..34]), [0, 0]);
        let pseudo = [&frame[26..34], &[0, 6, 0, 20][..], &frame[34..]].concat();
        assert_eq!(checksum(&pseudo), [0, 0]);
    }
}
