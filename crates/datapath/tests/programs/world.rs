//! One node in a throw-away network namespace: real devices, so that indexes, MACs and routes are the kernel's own, and the
//! programs run packet by packet with BPF_PROG_TEST_RUN.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Instant;

use ipnet::IpNet;
use libbpf_rs::{MapCore, MapFlags, ProgramInput};
use towpath_datapath::abi::*;
use towpath_datapath::bpf::{BpfConfig, Hook, Isolation, Limits, NodeConfig, Programs};
use towpath_datapath::net::filter::{self, Direction, Filter, Present};
use towpath_datapath::net::netlink::Netlink;
use towpath_model::desired::*;
use towpath_model::{Family, NamespacedName, NodeName, Protocol};

use crate::envelope;
use crate::frame::{Frame, L4, Mac, read};

pub const DROP: u32 = 2;
pub const PASS: u32 = 0;
pub const REDIRECT: u32 = 7;
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;

pub const MAC_A: Mac = [2, 0, 0, 0, 0, 0xa];
pub const MAC_B: Mac = [2, 0, 0, 0, 0, 0xb];
pub const MAC_HOST: Mac = [2, 0x74, 0x70, 0, 0, 1];
pub const MAC_ROUTER: Mac = [2, 0, 0, 0, 0, 0xee];
pub const MAC_TUNNEL: Mac = [2, 0x74, 192, 168, 50, 1];
pub const MAC_UPLINK: Mac = [2, 0, 0, 0, 0, 0x51];
pub const VNI: u32 = 7;
pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The hosts of the tests by name, in one family.
#[derive(Clone, Copy)]
pub struct Hosts {
    pub a: IpAddr,
    pub b: IpAddr,
    pub remote: IpAddr,
    pub node: IpAddr,
    pub node2: IpAddr,
    pub outside: IpAddr,
    pub service: IpAddr,
}

pub fn hosts(family: Family) -> Hosts {
    let pick = |v4: &str, v6: &str| if family == Family::V4 { ip(v4) } else { ip(v6) };
    Hosts {
        a: pick("10.1.0.10", "fd01::10"),
        b: pick("10.1.0.11", "fd01::11"),
        remote: pick("10.2.0.20", "fd02::20"),
        node: pick("192.168.50.1", "fd50::1"),
        node2: pick("192.168.50.2", "fd50::2"),
        outside: pick("198.51.100.9", "fd99::9"),
        service: pick("10.96.0.5", "fd96::5"),
    }
}

/// What became of a frame.
#[derive(Debug)]
pub struct Outcome {
    pub verdict: u32,
    pub bytes: Vec<u8>,
    /// 1 into a pod, 2 out of a device, 3 by the routes.
    pub kind: u32,
    pub ifindex: u32,
    pub tunnel: IpAddr,
    /// Reasons counted.
    pub counted: Vec<&'static str>,
}

impl Outcome {
    pub fn frame(&self) -> Frame {
        read(&self.bytes)
    }
    #[track_caller]
    pub fn dropped(&self, reason: &str) {
        assert_eq!((self.verdict, self.counted.as_slice()), (DROP, [reason].as_slice()), "{self:?}");
    }
    #[track_caller]
    pub fn passed(&self) -> &Self {
        assert_eq!(self.verdict, PASS, "{self:?}");
        self
    }
    #[track_caller]
    pub fn into_pod(&self, ifindex: u32) -> Frame {
        assert_eq!((self.verdict, self.kind, self.ifindex), (REDIRECT, 1, ifindex), "{self:?}");
        self.frame()
    }
    /// To another node: in an envelope out of the uplink or, over an IPv6 underlay, by the tunnel device. The inner frame.
    #[track_caller]
    pub fn into_tunnel(&self, world: &World, to: IpAddr) -> Frame {
        assert_eq!(self.tunnel, to);
        if to.is_ipv6() {
            return self.by_tunnel_device(world);
        }
        assert_eq!((self.verdict, self.kind, self.ifindex), (REDIRECT, 3, world.uplink), "{self:?}");
        let (outer, inner) = envelope::open(&self.bytes);
        assert_eq!((outer.src.ip(), outer.dst, outer.ttl), (ip("192.168.50.1"), SocketAddr::new(to, 4789), 64));
        assert!(outer.src.port() >= 0xc000, "{outer:?}");
        read(&inner)
    }
    #[track_caller]
    pub fn by_tunnel_device(&self, world: &World) -> Frame {
        assert_eq!((self.verdict, self.kind, self.ifindex), (REDIRECT, 2, world.tunnel), "{self:?}");
        self.frame()
    }
    /// Forwarded by the program of XDP.
    #[track_caller]
    pub fn by_wire(&self) -> &Self {
        assert!(self.counted.contains(&"accelerated"), "{self:?}");
        self
    }
    #[track_caller]
    pub fn out_of(&self, kind: u32, ifindex: u32) -> Frame {
        assert_eq!((self.verdict, self.kind, self.ifindex), (REDIRECT, kind, ifindex), "{self:?}");
        self.frame()
    }
}

pub struct World {
    pub programs: Programs,
    pub pod_a: u32,
    pub pod_b: u32,
    pub tunnel: u32,
    pub uplink: u32,
    pub table: ServiceTable,
    /// Whom the frontends are for that [`World::serve`] adds.
    pub clients: Clients,
    pub image: PolicyImage,
    /// Whether packets meet the program of XDP before those of tc.
    pub accelerated: bool,
}

pub fn sh(line: &str) {
    let status = Command::new("sh").args(["-c", line]).status().unwrap();
    assert!(status.success(), "{line}");
}

pub fn index_of(device: &str) -> u32 {
    nix::net::if_::if_nametoindex(device).unwrap()
}

/// Whether this process may do all this. If not: says so, and fails where everything must run.
pub fn may_run() -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    assert!(std::env::var("CI").as_deref() != Ok("true"), "CI must run the fixtures as root");
    println!("skipped: loading BPF programs needs root (sudo -E cargo nextest run -p towpath-datapath)");
    false
}

/// Runs a test on a thread of its own with network and mount namespaces that end with it.
pub fn in_namespaces(test: impl FnOnce(&std::path::Path) + Send + 'static) {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    if !may_run() {
        return;
    }
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        mount(Some("bpf"), dir.path(), Some("bpf"), MsFlags::empty(), none).unwrap();
        test(dir.path());
        nix::mount::umount(dir.path()).unwrap();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a test on a fresh world.
pub fn in_world(test: impl FnOnce(&mut World) + Send + 'static) {
    in_world_with(Limits::default(), test);
}

pub fn in_world_with(limits: Limits, test: impl FnOnce(&mut World) + Send + 'static) {
    in_namespaces(move |dir| {
        let mut world = World::new(dir, limits);
        test(&mut world);
        world.programs.unpin_all().unwrap();
    });
}

/// Runs a test on a fresh world, and again on one where the program of XDP meets packets first: nothing may come out otherwise.
pub fn in_both_worlds(test: impl Fn(&mut World) + Clone + Send + 'static) {
    in_world(test.clone());
    in_accelerated_world(test);
}

/// Runs a test on a fresh world where the program of XDP meets packets first.
pub fn in_accelerated_world(test: impl FnOnce(&mut World) + Send + 'static) {
    in_world(|w| {
        w.programs.prepare_wire(w.uplink, MAC_UPLINK).unwrap();
        w.accelerated = true;
        test(w);
    });
}

const SETUP: &str = "set -e
ip link set lo up
ip link add tpa address 02:74:70:00:00:01 type veth peer name pa
ip link add tpb address 02:74:70:00:00:01 type veth peer name pb
ip link add up0 address 02:00:00:00:00:51 type veth peer name up1
ip link add vx0 address 02:74:c0:a8:32:01 type vxlan external dstport 4789 nolearning
for d in tpa tpb pa pb up0 up1 vx0; do ip link set $d up; done
ip addr add 192.168.50.1/24 dev up0
ip addr add fd50::1/64 dev up0 nodad
ip route add default via 192.168.50.254
ip -6 route add default via fd50::fe
ip neigh add 192.168.50.254 lladdr 02:00:00:00:00:ee dev up0
ip neigh add 192.168.50.2 lladdr 02:00:00:00:00:02 dev up0
ip neigh add 192.168.50.3 lladdr 02:00:00:00:00:03 dev up0
ip neigh add fd50::fe lladdr 02:00:00:00:00:ee dev up0
echo 1 > /proc/sys/net/ipv4/ip_forward
echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
";

/// Waits for the kernel to take an IPv6 address into use, a moment after it has it.
pub fn until_taken(address: &str) -> String {
    format!("timeout 5 sh -c 'until ip route get {address} 2>&1 | grep -q ^local; do sleep 0.01; done'")
}

fn local_pod(id: u32, name: &str, ifindex: u32, mac: Mac, addresses: Vec<IpAddr>) -> LocalPod {
    LocalPod {
        name: NamespacedName::new("default", name),
        container_id: name.into(),
        addresses,
        host_device: format!("tp{name}"),
        ifindex,
        mac,
        host_mac: MAC_HOST,
        netns_cookie: 1_000_000 + u64::from(id),
        pod_id: id,
    }
}

pub fn peers() -> Vec<NodePeer> {
    let net = |text: &str| text.parse::<IpNet>().unwrap();
    vec![
        NodePeer {
            name: NodeName::new("node1"),
            addresses: vec![ip("192.168.50.1"), ip("fd50::1")],
            pod_cidrs: vec![net("10.1.0.0/24"), net("fd01::/64")],
            tunnel: ip("192.168.50.1"),
            local: true,
            reach: Reach::Tunnel,
            plain: false,
            flannel: None,
        },
        NodePeer {
            name: NodeName::new("node2"),
            addresses: vec![ip("192.168.50.2"), ip("fd50::2")],
            pod_cidrs: vec![net("10.2.0.0/24"), net("fd02::/64")],
            tunnel: ip("192.168.50.2"),
            local: false,
            reach: Reach::Tunnel,
            plain: false,
            flannel: None,
        },
        NodePeer {
            name: NodeName::new("node3"),
            addresses: vec![ip("192.168.50.3"), ip("fd50::3")],
            pod_cidrs: vec![net("10.3.0.0/24"), net("fd03::/64")],
            tunnel: ip("192.168.50.3"),
            local: false,
            reach: Reach::Tunnel,
            plain: false,
            flannel: None,
        },
    ]
}

pub fn node_config(tunnel: u32, uplink: u32) -> NodeConfig {
    NodeConfig {
        addresses: vec![ip("192.168.50.1"), ip("fd50::1")],
        dns_addresses: vec![],
        netns_cookie: 1,
        uplink_ifindex: uplink,
        tunnel_ifindex: tunnel,
        tunnel_mac: MAC_TUNNEL,
        tunnel_mtu: 1450,
        vni: VNI,
        tunnel_port: 4789,
        node_ports: (30000, 32767),
        loopback_node_ports: (true, true),
        plain_routing: true,
        borrowed_tunnel: false,
        direct_return: false,
        borrowed_tunnel6: 0,
        udp: (0, 0),
        on_link: false,
    }
}

impl World {
    /// Whether the kernel attaches programs to devices by links; says so where it does not.
    pub fn has_device_links(&self) -> bool {
        let links = self.programs.has_device_links().unwrap();
        if !links {
            println!("skipped: this kernel has no tcx (Linux 6.6)");
        }
        links
    }

    /// Has a pod's device run its programs, as links or, where the kernel has none for devices, as filters.
    pub fn attach(&mut self, pod: u32) {
        let hooks = [(Hook::FromPod, Direction::Ingress), (Hook::ToPod, Direction::Egress)];
        if self.programs.has_device_links().unwrap() {
            return hooks.iter().for_each(|(hook, _)| self.programs.attach_device(pod, *hook).unwrap());
        }
        let mut netlink = Netlink::open().unwrap();
        for (hook, direction) in hooks {
            let program = self.programs.descriptor(hook).unwrap();
            let one = Filter { direction, program: program.as_fd(), name: hook.program() };
            filter::ensure(&mut netlink, pod, "a pod", &[one], Present::Updated).unwrap();
        }
    }

    pub fn new(pin_dir: &std::path::Path, limits: Limits) -> World {
        sh(SETUP);
        let config = BpfConfig { pin_dir: pin_dir.to_owned(), limits };
        let mut programs = Programs::open_for_tests(config).unwrap();
        let (tunnel, uplink) = (index_of("vx0"), index_of("up0"));
        programs.apply_node(&node_config(tunnel, uplink)).unwrap();
        programs.apply_peers(&peers()).unwrap();
        let (pod_a, pod_b) = (index_of("tpa"), index_of("tpb"));
        let mut world = World {
            programs,
            pod_a,
            pod_b,
            tunnel,
            uplink,
            table: ServiceTable::default(),
            clients: Clients::All,
            image: PolicyImage::default(),
            accelerated: false,
        };
        for pod in [world.local_a(), world.local_b()] {
            world.programs.set_pod(&pod, Isolation::Sets(PodSets::default())).unwrap();
            world.image.pods.extend(pod.addresses.iter().map(|a| (*a, PodSets::default())));
        }
        world
    }

    pub fn local_a(&self) -> LocalPod {
        local_pod(11, "a", self.pod_a, MAC_A, vec![ip("10.1.0.10"), ip("fd01::10")])
    }

    pub fn local_b(&self) -> LocalPod {
        local_pod(12, "b", self.pod_b, MAC_B, vec![ip("10.1.0.11"), ip("fd01::11")])
    }

    fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.programs.counters().unwrap().into_iter().map(|c| (c.reason.name(), c.packets)).collect()
    }

    fn trace(&self) -> Vec<u8> {
        let map = self.programs.object().maps().find(|m| m.name() == "tp_trace").unwrap();
        map.lookup(&0u32.to_ne_bytes(), MapFlags::ANY).unwrap().unwrap()
    }

    /// Clears the trace and sets the outer source that tp_from_tunnel is to see.
    fn arm_trace(&self, outer: Option<IpAddr>) {
        let mut value = vec![0u8; size_of::<Trace>()];
        if let Some(outer) = outer {
            value[..16].copy_from_slice(&Addr::new(outer).b);
        }
        let map = self.programs.object().maps().find(|m| m.name() == "tp_trace").unwrap();
        map.update(&0u32.to_ne_bytes(), &value, MapFlags::ANY).unwrap();
    }

    /// Runs one program on one frame.
    pub fn run(&self, hook: Hook, frame: &[u8], ifindex: u32, ingress: u32, outer: Option<IpAddr>) -> Outcome {
        if self.accelerated && hook == Hook::FromUplink {
            let first = self.on_wire(frame, ifindex);
            return if first.verdict == PASS { self.run_tc(hook, frame, ifindex, ingress, outer) } else { first };
        }
        self.run_tc(hook, frame, ifindex, ingress, outer)
    }

    /// Runs the program of XDP on one frame. PASS: it is as it was.
    pub fn on_wire(&self, frame: &[u8], ifindex: u32) -> Outcome {
        // struct xdp_md: data_end at 4, ingress_ifindex at 12.
        let mut context = [0u8; 24];
        context[4..8].copy_from_slice(&(frame.len() as u32).to_ne_bytes());
        context[12..16].copy_from_slice(&ifindex.to_ne_bytes());
        let object = self.programs.wire_object().unwrap();
        let mut outcome = self.run_on(object, Hook::FromWire, frame, &mut context, None);
        outcome.verdict = match outcome.verdict {
            XDP_DROP => DROP,
            XDP_PASS => PASS,
            XDP_TX => REDIRECT,
            other => panic!("verdict {other}: {outcome:?}"),
        };
        if outcome.verdict == PASS {
            assert_eq!(outcome.bytes, frame, "passed on, and changed");
            assert_eq!(outcome.counted, Vec::<&str>::new());
        }
        outcome
    }

    fn run_tc(&self, hook: Hook, frame: &[u8], ifindex: u32, ingress: u32, outer: Option<IpAddr>) -> Outcome {
        // struct __sk_buff: ingress_ifindex at 36, ifindex at 40.
        let mut context = [0u8; 192];
        context[36..40].copy_from_slice(&ingress.to_ne_bytes());
        context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
        self.run_on(self.programs.object(), hook, frame, &mut context, outer)
    }

    fn run_on(
        &self,
        object: &libbpf_rs::Object,
        hook: Hook,
        frame: &[u8],
        context: &mut [u8],
        outer: Option<IpAddr>,
    ) -> Outcome {
        self.arm_trace(outer);
        let before = self.counts();
        let mut out = vec![0u8; frame.len() + 256];
        let program = object.progs_mut().find(|p| p.name() == hook.program()).unwrap();
        let input = ProgramInput {
            context_in: Some(context),
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..ProgramInput::default()
        };
        let output = program.test_run(input).unwrap();
        let (verdict, bytes) = (output.return_value, output.data.unwrap().to_vec());
        let trace = self.trace();
        let number = |at: usize| u32::from_ne_bytes(trace[at..at + 4].try_into().unwrap());
        let offset = |name: &str| {
            let layout = LAYOUTS.iter().find(|(s, _, _)| *s == "tp_trace").unwrap().2;
            layout.iter().find(|(field, _)| *field == name).unwrap().1
        };
        let remote = offset("tunnel_remote");
        let after = self.counts();
        Outcome {
            verdict,
            bytes,
            kind: number(offset("redirect_kind")),
            ifindex: number(offset("redirect_ifindex")),
            tunnel: Addr { b: trace[remote..remote + 16].try_into().unwrap() }.ip(),
            counted: after.iter().filter(|(name, n)| before[*name] != **n).map(|(name, _)| *name).collect(),
        }
    }

    pub fn from_pod(&self, frame: &Frame) -> Outcome {
        let ifindex = if frame.src_mac == MAC_B { self.pod_b } else { self.pod_a };
        self.run(Hook::FromPod, &frame.bytes(), ifindex, ifindex, None)
    }

    /// Through the stack to a pod; `ingress` 0: generated by this node.
    pub fn to_pod(&self, frame: &Frame, pod: u32, ingress: u32) -> Outcome {
        self.run(Hook::ToPod, &frame.bytes(), pod, ingress, None)
    }

    /// In an envelope from `outer`, where the program of XDP may open it; else out of the tunnel device.
    pub fn from_tunnel(&self, frame: &Frame, outer: &str) -> Outcome {
        if self.accelerated && ip(outer).is_ipv4() {
            let first = self.on_wire(&envelope::wrap(&frame.bytes(), outer).bytes(), self.uplink);
            if first.verdict != PASS {
                return first;
            }
        }
        self.run(Hook::FromTunnel, &frame.bytes(), self.tunnel, self.tunnel, Some(ip(outer)))
    }

    pub fn from_uplink(&self, frame: &Frame) -> Outcome {
        self.run(Hook::FromUplink, &frame.bytes(), self.uplink, self.uplink, None)
    }

    // ---- the maps, past the programs --------------------------------------------------------------------------------

    pub fn map(&self, name: &str) -> impl MapCore {
        self.programs.object().maps().find(|m| m.name() == name).unwrap()
    }

    /// Every entry of a map.
    pub fn entries<K: Plain, V: Plain>(&self, name: &str) -> Vec<(K, V)> {
        let map = self.map(name);
        let value = |key: &Vec<u8>| map.lookup(key, MapFlags::ANY).unwrap();
        let keys: Vec<Vec<u8>> = map.keys().collect();
        keys.iter().filter_map(|key| Some((of_bytes(key), of_bytes(&value(key)?)))).collect()
    }

    pub fn write<K: Plain, V: Plain>(&self, name: &str, key: &K, value: &V) {
        self.map(name).update(&bytes_of(key), &bytes_of(value), MapFlags::ANY).unwrap();
    }

    /// Deletes every entry of a map.
    pub fn clear(&self, name: &str) {
        let map = self.map(name);
        let keys: Vec<Vec<u8>> = map.keys().collect();
        // The collector may have been faster.
        keys.iter().for_each(|key| drop(map.delete(key)));
        assert_eq!(map.keys().count(), 0);
    }

    /// Fills the connection table with UDP flows that were last seen at `last_seen` (ktime, ns), counted to nobody's pod.
    /// Nothing else may be in it.
    pub fn fill(&self, count: u32, last_seen: u64) {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for n in 0..count {
            let key = CtKey {
                addr_a: Addr::new(std::net::Ipv4Addr::from(0x0a01_0000 + (n >> 8)).into()),
                addr_b: Addr::new(std::net::Ipv4Addr::from(0x0a02_0000 + (n & 0xff)).into()),
                port_a: Be16::new(1000),
                port_b: Be16::new((n % 60_000) as u16),
                proto: 17,
                ..CtKey::default()
            };
            keys.extend(bytes_of(&key));
            values.extend(bytes_of(&Ct { last_seen, created: last_seen, ..Ct::default() }));
        }
        self.map("tp_ct").update_batch(&keys, &values, count, MapFlags::ANY, MapFlags::ANY).unwrap();
        self.write("tp_flows", &0u32, &Flows { held: count, ..Flows::default() });
        self.write("tp_held", &0u32, &count);
    }

    /// Lets every connection have been idle for so much longer.
    pub fn age(&self, seconds: u64) {
        for (key, ct) in self.entries::<CtKey, Ct>("tp_ct") {
            let last_seen = ct.last_seen.checked_sub(seconds * 1_000_000_000).unwrap();
            self.write("tp_ct", &key, &Ct { last_seen, ..ct });
        }
        for (key, nat) in self.entries::<Tuple, Nat>("tp_nat") {
            let fresh = nat.fresh.saturating_sub(seconds * 1_000_000_000);
            self.write("tp_nat", &key, &Nat { fresh, ..nat });
        }
    }

    // ---- what is wanted ------------------------------------------------------------------------------------------

    pub fn apply_policy(&mut self) {
        self.programs.apply_policy(&self.image).unwrap();
    }

    /// Gives a pod (both addresses) its sets.
    pub fn isolate(&mut self, pod: &LocalPod, ingress: u32, egress: u32) {
        let sets = PodSets::enforced(SetId(ingress), SetId(egress));
        self.image.pods.extend(pod.addresses.iter().map(|a| (*a, sets)));
    }

    /// A row of a set for a peer (as a class of its own) and a TCP or UDP port, or all other protocols.
    pub fn allow(&mut self, set: u32, peer: IpAddr, protocol: RowProtocol, port: u16, rule: u32) {
        let class = ClassId(set * 100 + 7);
        self.image.pod_classes.insert(peer, class);
        self.image.set_classes.insert((SetId(set), class), LocalClass(1));
        let key = RowKey { set: SetId(set), class: LocalClass(1), protocol, port, port_bits: 16 };
        self.image.rows.insert(key, Row { verdict: Verdict::Allow, rule: RuleId(rule) });
    }

    /// A Service port with backends on the same protocol. `address` none: a NodePort.
    pub fn serve(
        &mut self,
        id: u32,
        family: Family,
        address: Option<IpAddr>,
        port: u16,
        protocol: Protocol,
        to: &[SocketAddr],
    ) {
        let mut backends = Vec::new();
        for (n, at) in (1u32..).zip(to) {
            let backend = BackendId(id * 100 + n);
            backends.push(backend);
            self.table.backends.insert(backend, BackendAddress { address: at.ip(), port: at.port(), protocol });
        }
        let target = FrontendTarget {
            id: ServiceId(id),
            backends,
            affinity_seconds: None,
            clients: self.clients,
            service: NamespacedName::new("default", "svc"),
            port_name: String::new(),
            algorithm: Algorithm::Random,
            table: Default::default(),
            sources: None,
        };
        self.table.frontends.insert(Frontend { address, family, port, protocol }, target.into());
        self.apply_services();
    }

    pub fn apply_services(&mut self) {
        self.programs.apply_services(&self.table, Instant::now()).unwrap();
    }
}

pub fn bytes_of<T: Plain>(value: &T) -> Vec<u8> {
    // SAFETY: a plain value has no padding, so all its bytes are defined.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }.to_vec()
}

pub fn of_bytes<T: Plain>(bytes: &[u8]) -> T {
    assert_eq!(bytes.len(), size_of::<T>());
    // SAFETY: there are as many bytes as the value has, and any bytes are a value of a plain type.
    unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) }
}

/// The clock of the programs under test: a day more than since the machine started (`TESTING_AHEAD` in bpf/maps.h).
pub fn uptime() -> u64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap();
    ((text.split(' ').next().unwrap().parse::<f64>().unwrap() + 24.0 * 3600.0) * 1e9) as u64
}

/// A frame that pod a or b sends (by its address), to its gateway.
pub fn sent_by(src: IpAddr, sport: u16, dst: IpAddr, dport: u16, l4: L4) -> Frame {
    let is_b = [hosts(Family::V4).b, hosts(Family::V6).b].contains(&src);
    Frame {
        src_mac: if is_b { MAC_B } else { MAC_A },
        dst_mac: MAC_HOST,
        src: SocketAddr::new(src, sport),
        dst: SocketAddr::new(dst, dport),
        ttl: 64,
        fragment: None,
        l4,
    }
}

/// A frame that arrives on a device with this MAC.
pub fn arriving(mac: Mac, src: IpAddr, sport: u16, dst: IpAddr, dport: u16, l4: L4) -> Frame {
    Frame { src_mac: MAC_ROUTER, dst_mac: mac, ..sent_by(src, sport, dst, dport, l4) }
}
