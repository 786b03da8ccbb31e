//! Two nodes, an underlay and an outside host in nameless network namespaces: gone with the test, however it ends.

use std::io;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use tempfile::TempDir;
use towpath_model::desired::{LocalPod, NodePeer, NodeSettings, PodSets, Reach, TranslatedAt, Vxlan};
use towpath_model::{Bandwidth, Family, NamespacedName, NodeName, family_of};

use crate::net::link::{self, Veth};
use crate::net::netlink::Netlink;
use crate::node::Node;
use crate::node::pods::attach_pod;
use crate::requests::{AttachRequest, DatapathConfig};
pub(super) use crate::testing::root;
use crate::worker::Worker;

pub(super) const PATIENCE: Duration = Duration::from_secs(3);

/// What a lab tries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    /// Kernel programs, or the network beneath them alone.
    pub(super) programs: bool,
    /// Tunnels between IPv6 addresses.
    pub(super) underlay_v6: bool,
    /// The one family that pods and nodes have; none: both.
    pub(super) only: Option<Family>,
    /// Whether pods' devices keep the filters that they begin with; else links take their place at once.
    pub(super) keep_filters: bool,
    /// Whether the kernel is taken for one that has no links for devices.
    pub(super) clsact: bool,
}

/// Policy sets of a pod that nothing isolates.
pub(super) const OPEN: Option<PodSets> =
    Some(PodSets::enforced(towpath_model::desired::SetId(0), towpath_model::desired::SetId(0)));

/// The network beneath the programs, alone.
pub(super) const BENEATH: Kind =
    Kind { programs: false, underlay_v6: false, only: None, keep_filters: false, clsact: false };

/// With the programs.
pub(super) const PROGRAMS: Kind = Kind { programs: true, ..BENEATH };
/// As on a kernel without links for devices.
pub(super) const CLSACT: Kind = Kind { clsact: true, ..PROGRAMS };
/// Before links have taken the place of filters.
pub(super) const FILTERS: Kind = Kind { keep_filters: true, ..PROGRAMS };

/// A network and mount namespace.
#[derive(Debug)]
pub(super) struct Ns {
    net: OwnedFd,
    mnt: OwnedFd,
}

impl Ns {
    pub(super) fn new() -> Self {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&Path>, "/", None::<&Path>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&Path>).unwrap();
            let open = |path| OwnedFd::from(std::fs::File::open(path).unwrap());
            let ns = Self { net: open("/proc/thread-self/ns/net"), mnt: open("/proc/thread-self/ns/mnt") };
            sh("ip link set lo up");
            ns
        })
        .join()
        .unwrap()
    }

    pub(super) fn fd(&self) -> OwnedFd {
        self.net.try_clone().unwrap()
    }

    pub(super) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_FS).unwrap();
                setns(self.mnt.as_fd(), CloneFlags::CLONE_NEWNS).unwrap();
                setns(self.net.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    pub(super) fn sh(&self, command: &str) -> String {
        self.run(|| sh(command))
    }

    /// Whether an echo request to `to` (options of `ping` may come before the address) is answered.
    pub(super) fn pings(&self, to: &str) -> bool {
        self.run(|| Command::new("ping").args(["-c1", "-W1"]).args(to.split(' ')).output().unwrap().status.success())
    }

    /// As [`Ns::pings`], until a deadline.
    pub(super) fn comes_to_ping(&self, to: &str) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while !self.pings(to) {
            if Instant::now() > deadline {
                return false;
            }
        }
        true
    }
}

fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The address that a TCP server in `server` sees when `client` connects to `to`, and a payload was echoed.
pub(super) fn tcp(client: &Ns, server: &Ns, to: SocketAddr) -> io::Result<IpAddr> {
    tcp_to(client, server, to.port(), to)
}

/// As [`tcp`], with the server on another port (and address) than the client connects to.
pub(super) fn tcp_to(client: &Ns, server: &Ns, port: u16, to: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let listener = server.run(|| TcpListener::bind((any, port)).unwrap());
    let mut stream = client.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
    let (mut accepted, peer) = listener.accept()?;
    for end in [&stream, &accepted] {
        end.set_read_timeout(Some(PATIENCE))?;
    }
    // Larger than any MTU here, so that path and checksum offload are exercised.
    let sent: Vec<u8> = (0..40_000_u32).map(|i| i as u8).collect();
    let writer = {
        let (mut stream, sent) = (stream.try_clone()?, sent.clone());
        std::thread::spawn(move || stream.write_all(&sent))
    };
    let mut received = vec![0; sent.len()];
    accepted.read_exact(&mut received)?;
    writer.join().unwrap()?;
    assert!(received == sent, "payload changed on the way");
    accepted.write_all(b"ok")?;
    let mut answer = [0; 2];
    stream.read_exact(&mut answer)?;
    Ok(peer.ip())
}

/// The address that a UDP server sees, when its answer comes back to a connected client.
pub(super) fn udp(client: &Ns, server: &Ns, to: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let serving = server.run(|| UdpSocket::bind(to).unwrap());
    let asking = client.run(|| UdpSocket::bind((any, 0)).unwrap());
    serving.set_read_timeout(Some(PATIENCE))?;
    asking.set_read_timeout(Some(PATIENCE))?;
    asking.connect(to)?;
    asking.send(b"ping")?;
    let mut bytes = [0; 16];
    let (_, peer) = serving.recv_from(&mut bytes)?;
    serving.send_to(b"pong", peer)?;
    asking.recv(&mut bytes)?;
    Ok(peer.ip())
}

/// A node: its namespace, configuration and data path.
pub(super) struct TestNode {
    pub(super) ns: Ns,
    pub(super) config: DatapathConfig,
    pub(super) worker: Option<Worker<Node>>,
    kind: Kind,
    directory: TempDir,
    cgroup: PathBuf,
}

impl TestNode {
    pub(super) fn new(number: u8, kind: Kind) -> Self {
        let ns = Ns::new();
        let directory = tempfile::tempdir().unwrap();
        let bpffs = directory.path().join("bpf");
        std::fs::create_dir(&bpffs).unwrap();
        ns.run(|| mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&Path>)).unwrap();
        let unique = directory.path().file_name().unwrap().to_string_lossy().replace('.', "");
        let cgroup = super::super::cgroup_root().unwrap().join(format!("towpath-test-{unique}-{number}"));
        std::fs::create_dir(&cgroup).unwrap();
        let config = DatapathConfig {
            settings: settings(number, kind),
            bpffs,
            cgroup: Some(cgroup.clone()),
            state_dir: directory.path().join("state"),
            remembered: Vec::new(),
            uplink: None,
            devices: Vec::new(),
            acceleration: Default::default(),
            limits: crate::bpf::Limits::default(),
        };
        Self { ns, config, worker: None, kind, directory, cgroup }
    }

    /// Opens the data path, as an agent that starts does.
    pub(super) fn open(&mut self) {
        self.worker = Some(self.start().unwrap());
    }

    /// Fails unless opening fails with all of these words.
    pub(super) fn open_in_vain(&self, words: &[&str]) {
        let Err(error) = self.start() else { panic!("it opened, without {words:?}") };
        let said = error.to_string();
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    }

    fn start(&self) -> Result<Worker<Node>, crate::Error> {
        let (config, kind) = (self.config.clone(), self.kind);
        let open = move || match kind {
            Kind { programs: false, .. } => Node::open_beneath(config),
            Kind { clsact: true, .. } => Node::open_with_filters(config),
            _ => Node::open(config),
        };
        // Tests say themselves when links are attached.
        let start = Worker::start(open, |_| false);
        self.ns.run(|| block_on(start))
    }

    /// Ends it, as an agent that dies does: nothing is taken back.
    pub(super) fn close(&mut self) {
        self.worker = None;
    }

    pub(super) fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Node) -> Result<R, crate::Error> + Send + 'static,
    ) -> Result<R, crate::Error> {
        block_on(self.worker.as_ref().unwrap().call(work))
    }

    /// Gives a pod its device.
    pub(super) fn attach(&self, request: AttachRequest) -> Result<LocalPod, crate::Error> {
        block_on(self.begin_attach(request))
    }

    /// The same, of which the answer is waited for later.
    pub(super) fn begin_attach(
        &self,
        request: AttachRequest,
    ) -> impl Future<Output = Result<LocalPod, crate::Error>> + use<> {
        attach_pod(self.worker.as_ref().unwrap(), request)
    }

    /// A pod with the `host`-th address of the node's ranges.
    pub(super) fn pod(&self, host: u8, sets: Option<PodSets>) -> TestPod {
        let ns = Ns::new();
        let request = self.request(&ns, host, sets);
        let pod = self.attach(request).unwrap();
        if !self.kind.keep_filters {
            self.link();
        }
        TestPod { ns, pod }
    }

    /// Attaches all links that are to follow.
    pub(super) fn link(&self) {
        while self.call(|node| Ok(node.link_next())).unwrap() {}
    }

    pub(super) fn request(&self, ns: &Ns, host: u8, sets: Option<PodSets>) -> AttachRequest {
        let number = self.number();
        let mut addresses =
            vec![[10, 244, number, host].into(), format!("fd00:244:{number}::{host:x}").parse().unwrap()];
        addresses.retain(|a| self.kind.only.is_none_or(|family| family_of(*a) == family));
        AttachRequest {
            netns: ns.fd(),
            ifname: "eth0".to_owned(),
            container_id: format!("container-{number}-{host}"),
            pod: NamespacedName::new("default", format!("pod-{number}-{host}")),
            addresses,
            mac: None,
            mtu: None,
            sets,
            translated_at: TranslatedAt::Sockets,
            bandwidth: Bandwidth::default(),
            runtime_bandwidth: Bandwidth::default(),
        }
    }

    fn number(&self) -> u8 {
        let text = self.config.settings.name.as_str().trim_start_matches('n').to_owned();
        text.parse().unwrap()
    }

    pub(super) fn apply_peers(&self) {
        let mut peers = peers(self.kind);
        for peer in &mut peers {
            peer.local = peer.name == self.config.settings.name;
        }
        let applied = self.call(|node| node.apply_peers(peers)).unwrap();
        assert_eq!(applied.problems, Vec::<String>::new());
    }

    /// Fails unless the traces come to be `wanted` before a deadline.
    pub(super) fn comes_to(&self, wanted: &str, why: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.traces() != wanted && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(self.traces(), wanted, "{why}");
    }

    /// Everything of the namespace that we may change, as text.
    pub(super) fn traces(&self) -> String {
        self.ns.sh(
            "ip -br link; ip -4 addr show lo; ip -6 addr show lo; for f in -4 -6; do ip $f rule; ip $f route show table all | grep -vE 'multicast|anycast'; done; \
             nft list ruleset",
        )
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        self.worker = None;
        // The programs are attached to the cgroup: with the last pin of this mount gone, so are they.
        let _left_behind = std::fs::remove_dir(&self.cgroup);
        let _ = &self.directory;
    }
}

/// An attached pod.
pub(super) struct TestPod {
    pub(super) ns: Ns,
    pub(super) pod: LocalPod,
}

impl TestPod {
    pub(super) fn v4(&self) -> IpAddr {
        self.pod.addresses[0]
    }

    pub(super) fn v6(&self) -> IpAddr {
        self.pod.addresses[1]
    }
}

/// Two nodes and an outside host around a router.
pub(super) struct Lab {
    pub(super) n1: TestNode,
    pub(super) n2: TestNode,
    pub(super) outside: Ns,
    pub(super) router: Ns,
}

impl Lab {
    /// Opens both nodes and makes them known to each other.
    pub(super) fn new(kind: Kind) -> Self {
        let mut lab = Self::bare(kind);
        for node in [&mut lab.n1, &mut lab.n2] {
            node.open();
            node.apply_peers();
        }
        lab
    }

    /// The underlay only.
    pub(super) fn bare(kind: Kind) -> Self {
        let (router, outside) = (Ns::new(), Ns::new());
        let (n1, n2) = (TestNode::new(1, kind), TestNode::new(2, kind));
        for ns in [&router, &outside, &n1.ns, &n2.ns] {
            ns.sh("for s in all default; do echo 0 > /proc/sys/net/ipv6/conf/$s/accept_dad; done");
        }
        for ns in [&n1.ns, &n2.ns] {
            // As strict as distributions are.
            ns.sh("for s in all default; do echo 1 > /proc/sys/net/ipv4/conf/$s/rp_filter; done");
        }
        router.sh("ip link add br0 type bridge; ip link set br0 up");
        for (name, ns) in [("n1", &n1.ns), ("n2", &n2.ns), ("out", &outside)] {
            router.run(|| {
                let veth = Veth {
                    host_name: name,
                    host_mac: [2, 0, 0, 0, 1, name.len() as u8 + name.as_bytes()[1]],
                    pod_name: "eth0",
                    pod_mac: [2, 0, 0, 0, 2, name.len() as u8 + name.as_bytes()[1]],
                    pod_netns: ns.net.as_fd(),
                    mtu: 1500,
                };
                link::create_veth(&mut Netlink::open().unwrap(), &veth).unwrap();
            });
        }
        router.sh("ip link set n1 master br0 up; ip link set n2 master br0 up; ip link set out up
             ip addr add 192.0.2.254/24 dev br0; ip addr add 2001:db8:1::fe/64 dev br0 nodad
             ip addr add 198.51.100.254/24 dev out; ip addr add 2001:db8:2::fe/64 dev out nodad
             echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding");
        for (ns, v4, v6) in [
            (&n1.ns, "192.0.2.1", "2001:db8:1::1"),
            (&n2.ns, "192.0.2.2", "2001:db8:1::2"),
            (&outside, "198.51.100.9", "2001:db8:2::9"),
        ] {
            let (gw4, gw6) = (v4.rsplit_once('.').unwrap().0, v6.rsplit_once(':').unwrap().0);
            ns.sh(&format!(
                "ip addr add {v4}/24 dev eth0; ip addr add {v6}/64 dev eth0 nodad; ip link set eth0 up
                 ip route add default via {gw4}.254; ip -6 route add default via {gw6}:fe",
            ));
        }
        for ns in [&n1.ns, &n2.ns] {
            assert!(ns.comes_to_ping("198.51.100.9") && ns.comes_to_ping("2001:db8:2::9"), "the underlay works");
        }
        Self { n1, n2, outside, router }
    }
}

fn settings(number: u8, kind: Kind) -> NodeSettings {
    let mut addresses = vec![[192, 0, 2, number].into(), format!("2001:db8:1::{number}").parse().unwrap()];
    if kind.underlay_v6 {
        addresses.reverse();
    }
    let mut settings = NodeSettings {
        name: NodeName::new(format!("n{number}")),
        addresses,
        pod_cidrs: vec![
            format!("10.244.{number}.0/24").parse().unwrap(),
            format!("fd00:244:{number}::/64").parse().unwrap(),
        ],
        cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/32".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/12".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        masqueraded: vec![Family::V4, Family::V6],
        non_masquerade_cidrs: Vec::new(),
        dns_addresses: vec!["169.254.116.10".parse().unwrap(), "fd00:7470::a".parse().unwrap()],
        node_ports: (30000, 32767),
        node_port_addresses: Default::default(),
        vxlan: Vxlan { vni: 116, port: 8472 },
        udp_port: 8285,
        pod_mtu: None,
        direct_server_return: false,
    };
    let keep = |address: IpAddr| kind.only.is_none_or(|family| family_of(address) == family);
    settings.addresses.retain(|a| keep(*a));
    settings.dns_addresses.retain(|a| keep(*a));
    for ranges in [&mut settings.pod_cidrs, &mut settings.cluster_cidrs, &mut settings.service_cidrs] {
        ranges.retain(|r| keep(r.addr()));
    }
    settings
}

/// Both nodes, none marked as local.
fn peers(kind: Kind) -> Vec<NodePeer> {
    [1, 2]
        .map(|number| {
            let settings = settings(number, kind);
            NodePeer {
                name: settings.name,
                tunnel: settings.addresses[0],
                addresses: settings.addresses,
                pod_cidrs: settings.pod_cidrs,
                local: false,
                reach: Reach::Tunnel,
                plain: false,
                flannel: None,
            }
        })
        .to_vec()
}

/// Runs a future to its end on this thread.
pub(super) fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}
