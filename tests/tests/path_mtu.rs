//! A network beyond the nodes that takes less than the nodes' does: whoever sends too much through it is told so, by whatever path of a Service it sends,
//! and its packets arrive. Bytes by TCP and datagrams of both families, from a client beyond a narrow link and to it, and into the tunnel.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::in_charge::{all_send_by, network_config};
use towpath_walkthrough::libcni::Sandbox;
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, address};
use towpath_walkthrough::pods::shell;

const NODES: [&str; 2] = ["n1", "n2"];
const PATIENCE: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(200);
/// Of the link to the client, in bytes.
const NARROW: &str = "1300";
const CLIENT: [&str; 2] = ["192.0.2.2", "2001:db8:77::2"];
const EXTERNAL: [&str; 2] = ["198.51.100.7", "2001:db8:ff::7"];
/// Where the test's servers listen, in pods and on nodes.
const PORT: u16 = 7070;
/// By TCP, in bytes.
const BULK: usize = 200_000;
/// A datagram that fits the pods' own devices whatever the backend is, and one that fits the nodes' link but no envelope.
const DATAGRAM: usize = 1_350;
const LARGE: usize = 1_440;

/// Pods, and a Service of each kind with its node port. Each client asks an endpoint by one address only: a client that is translated at its device has one
/// port for a server, by whichever address it asks it.
fn objects() -> String {
    let mut all =
        shell("one", "n1", "app: one") + &shell("two", "n2", "app: two") + &shell("asker", "n1", "app: asker");
    all += &shell("mesh", "n1", "app: mesh").replacen(
        "metadata: {",
        "metadata: {annotations: {towpath.dev/socket-services: disabled}, ",
        1,
    );
    all += &shell("host", "n2", "app: host").replacen("spec:\n", "spec:\n  hostNetwork: true\n", 1);
    all += &format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: port}}\nspec:\n  nodeName: n1\n  containers: [{{name: shell, image: busybox, command: [sleep, \
         '86400'], ports: [{{containerPort: {PORT}, hostPort: 8070}}, {{containerPort: {PORT}, hostPort: 8070, protocol: UDP}}]}}]\n"
    );
    let service = |name: &str, app: &str, node_port: u16, more: &str| {
        let selector = if app.is_empty() { String::new() } else { format!("selector: {{app: {app}}}, ") };
        let port = |protocol: &str| {
            format!("{{name: {}, protocol: {protocol}, port: {PORT}, nodePort: {node_port}}}", protocol.to_lowercase())
        };
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{type: NodePort, ipFamilyPolicy: RequireDualStack, {selector}{more}\
             ports: [{}, {}]}}\n",
            port("TCP"),
            port("UDP")
        )
    };
    all += &service("one", "one", 30171, "");
    all += &service("two", "two", 30172, "");
    all += &service("local", "two", 30173, "externalTrafficPolicy: Local, ");
    all += &service("host", "host", 30174, "");
    all += &service(
        "external",
        "two",
        30175,
        &format!("externalIPs: [{}], ", EXTERNAL.map(|ip| format!("'{ip}'")).join(", ")),
    );
    all += &service("beyond", "", 30176, "");
    for (family, ip) in ["IPv4", "IPv6"].iter().zip(CLIENT) {
        all += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: beyond-{}, labels: {{kubernetes.io/service-name: beyond}}}}\n\
             addressType: {family}\nendpoints: [{{addresses: ['{ip}']}}]\nports: [{{name: tcp, protocol: TCP, port: {PORT}}}, {{name: udp, protocol: UDP, \
             port: {PORT}}}]\n",
            family.to_lowercase()
        );
    }
    all
}

/// Gives [`BULK`] bytes to who asks by TCP for them, or says how many it got; by UDP a datagram of as many bytes as it is asked for, or the length of what came.
struct Server {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// At all addresses of a place.
    fn at(place: &Place) -> Result<Self> {
        let (tcp, udp) = place.enter(|| {
            let any = SocketAddr::from(([0_u16; 8], PORT));
            Ok((TcpListener::bind(any)?, UdpSocket::bind(any)?))
        })?;
        tcp.set_nonblocking(true)?;
        udp.set_read_timeout(Some(Duration::from_millis(20)))?;
        let over = Arc::<AtomicBool>::default();
        let (ended, ended_too) = (over.clone(), over.clone());
        let by_tcp = move || {
            while !ended.load(Ordering::Relaxed) {
                match tcp.accept() {
                    // What it says of a connection that breaks, its client says better.
                    Ok((stream, _)) => drop(std::thread::spawn(move || serve(stream))),
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        };
        let by_udp = move || {
            let mut buffer = vec![0; 2000];
            while !ended_too.load(Ordering::Relaxed) {
                let Ok((count, from)) = udp.recv_from(&mut buffer) else { continue };
                let answer = match buffer.first() {
                    Some(b'D') => vec![b'd'; DATAGRAM],
                    _ => count.to_be_bytes().to_vec(),
                };
                // The first that is too big is refused here, too, once that is known: the client asks again.
                let _may_be_refused = udp.send_to(&answer, from);
            }
        };
        Ok(Self { over, threads: vec![std::thread::spawn(by_tcp), std::thread::spawn(by_udp)] })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ended = thread.join();
        }
    }
}

fn serve(mut stream: TcpStream) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    let mut what = [0];
    stream.read_exact(&mut what)?;
    if what == *b"D" {
        stream.write_all(&vec![7; BULK])?;
        return Ok(());
    }
    let mut all = Vec::new();
    let count = stream.read_to_end(&mut all)?;
    Ok(stream.write_all(&count.to_be_bytes())?)
}

/// Who sends much.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The server, so the endpoint: what is too big are its answers.
    Down,
    /// The client.
    Up,
}

/// All bytes of a connection, from where the calling thread stands.
fn by_tcp(to: SocketAddr, way: Way) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, ANSWER).with_context(|| format!("connect to {to}"))?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    let mut said = Vec::new();
    if way == Way::Down {
        stream.write_all(b"D")?;
        stream.read_to_end(&mut said).with_context(|| format!("after {} bytes of {to}", said.len()))?;
        ensure!(said.len() == BULK, "{} bytes came from {to}", said.len());
    } else {
        stream.write_all(b"U")?;
        stream.write_all(&vec![7; BULK])?;
        stream.shutdown(Shutdown::Write)?;
        stream.read_to_end(&mut said).with_context(|| format!("{to} did not get it all"))?;
        ensure!(said == BULK.to_be_bytes(), "{to} got {said:?}");
    }
    Ok(())
}

/// One datagram there and one back; asked again and again, as the first that is too big is lost.
fn by_udp(to: SocketAddr, way: Way, large: usize) -> Result<()> {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(AGAIN))?;
    let (question, answer) = match way {
        Way::Down => (b"D".to_vec(), vec![b'd'; DATAGRAM]),
        Way::Up => (vec![b'U'; large], large.to_be_bytes().to_vec()),
    };
    let mut last = None;
    for _ in 0..15 {
        let mut said = vec![0; 2000];
        match socket.send(&question).and_then(|_| socket.recv(&mut said)) {
            Ok(count) => {
                ensure!(said.get(..count) == Some(answer.as_slice()), "{to} says {count} bytes");
                return Ok(());
            }
            Err(error) => last = Some(error),
        }
    }
    bail!("nothing from {to}: {last:?}")
}

fn ip(place: &Place, arguments: &str) -> Result<()> {
    place.enter(|| {
        let said = Command::new("ip").args(arguments.split(' ')).output()?;
        ensure!(said.status.success(), "ip {arguments} in {}: {}", place.name(), String::from_utf8_lossy(&said.stderr));
        Ok(())
    })
}

fn set(place: &Place, name: &str, value: &str) -> Result<()> {
    place.enter(|| std::fs::write(Path::new("/proc/sys/net").join(name), value).with_context(|| name.to_owned()))
}

/// The address of each family by which others reach a node.
fn both(place: &Place) -> Result<[IpAddr; 2]> {
    let said = place.enter(|| {
        Ok(Command::new("ip").args(["-o", "address", "show", "dev", "eth0", "scope", "global"]).output()?.stdout)
    })?;
    let text = String::from_utf8(said)?;
    let of = |family: &str| {
        let word = text.split(&format!(" {family} ")).nth(1).and_then(|rest| rest.split(['/', ' ']).next());
        address(word.with_context(|| format!("no {family} address of {} in {text}", place.name()))?)
    };
    Ok([of("inet")?, of("inet6")?])
}

/// The lab; a host outside, beyond a router; and a client beyond the same router on a narrow link.
struct Scene {
    cluster: Cluster,
    router: Place,
    outside: Place,
    client: Place,
    nodes: Vec<Place>,
    node_ips: Vec<[IpAddr; 2]>,
    pods: Vec<Place>,
    _client: Sandbox,
}

impl Scene {
    fn new(cluster: Cluster) -> Result<Self> {
        let place =
            |name: &str| Place::of_netns(name, &Path::new("/run/netns").join(format!("tp-{}-{name}", cluster.name())));
        let (router, outside) = (place("underlay")?, place("outside")?);
        let sandbox = Sandbox::make("narrow")?;
        let client = Place::of_netns("the client", &sandbox.netns())?;
        ip(&router, &format!("link add narrow type veth peer name narrow netns {}", sandbox.pid()))?;
        // The client does not know: else nobody would send it more by TCP.
        ip(&router, &format!("link set narrow mtu {NARROW}"))?;
        for (place, host) in [(&router, '1'), (&client, '2')] {
            ip(place, &format!("address add 192.0.2.{host}/24 dev narrow"))?;
            ip(place, &format!("address add 2001:db8:77::{host}/64 dev narrow nodad"))?;
            ip(place, "link set narrow up")?;
        }
        ip(&client, "route add default via 192.0.2.1")?;
        ip(&client, "-6 route add default via 2001:db8:77::1")?;
        // It says so as often as it has to; a router that says it seldom only makes it slower.
        for name in ["ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"] {
            set(&router, name, "0")?;
        }
        let nodes: Vec<Place> = NODES.iter().map(|name| Place::of_node(&cluster, name)).collect::<Result<_>>()?;
        let node_ips: Vec<[IpAddr; 2]> = nodes.iter().map(both).collect::<Result<_>>()?;
        let [n1, n1_6] = node_ips.first().copied().context("no node")?;
        ip(&router, &format!("route add {} via {n1}", EXTERNAL[0]))?;
        ip(&router, &format!("-6 route add {} via {n1_6}", EXTERNAL[1]))?;
        let mut pods = Vec::new();
        for name in ["one", "two", "asker", "mesh", "port"] {
            pods.push(Place::of_pod(&cluster, &cluster.wait_pod(name)?)?);
        }
        cluster.wait_pod("host")?;
        Ok(Self { cluster, router, outside, client, nodes, node_ips, pods, _client: sandbox })
    }

    fn pod(&self, name: &str) -> Result<&Place> {
        self.pods.iter().find(|pod| pod.name() == name).with_context(|| format!("no pod {name}"))
    }

    /// Nobody knows any more what the way takes.
    fn forget(&self) -> Result<()> {
        for place in self.nodes.iter().chain(&self.pods).chain([&self.router, &self.outside, &self.client]) {
            ip(place, "route flush cache")?;
            ip(place, "-6 route flush cache")?;
        }
        Ok(())
    }

    /// How often the router said of a family that something was too big.
    fn complaints(&self, six: bool) -> Result<u64> {
        self.router.enter(|| {
            let file = if six { "/proc/thread-self/net/snmp6" } else { "/proc/thread-self/net/snmp" };
            let text = std::fs::read_to_string(file)?;
            if six {
                let line = text.lines().find_map(|line| line.strip_prefix("Icmp6OutPktTooBigs"));
                return line.and_then(|count| count.trim().parse().ok()).context("no Icmp6OutPktTooBigs");
            }
            let mut lines = text.lines().filter_map(|line| line.strip_prefix("IcmpMsg: "));
            let (names, counts) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
            let found = names.split(' ').zip(counts.split(' ')).find(|(name, _)| *name == "OutType3");
            Ok(found.and_then(|(_, count)| count.parse().ok()).unwrap_or_default())
        })
    }

    fn vip(&self, service: &str, six: bool) -> Result<IpAddr> {
        address(&field(&self.cluster.get("service", service)?, &format!("/spec/clusterIPs/{}", usize::from(six))))
    }

    /// Both protocols by one path, of which the router complains if it is one to the narrow link.
    fn passes(&self, what: &str, from: &Place, to: SocketAddr, way: Way) -> Result<()> {
        let narrow = from.name() != self.outside.name();
        let large = if narrow { DATAGRAM } else { LARGE };
        let transfers: [(&str, &(dyn Fn() -> Result<()> + Sync)); 2] =
            [("TCP", &|| by_tcp(to, way)), ("UDP", &|| by_udp(to, way, large))];
        for (protocol, transfer) in transfers {
            let what = || format!("{protocol} {what}, from {} to {to}", from.name());
            self.forget()?;
            let before = self.complaints(to.is_ipv6())?;
            from.enter(transfer).with_context(what)?;
            let complaints = self.complaints(to.is_ipv6())? - before;
            ensure!(!narrow || complaints > 0, "{}: nothing was too big, so nothing was tried", what());
        }
        Ok(())
    }

    /// Every path of a Service.
    fn all_pass(&self, backend: &str) -> Result<()> {
        let [n1, n2] = self.node_ips.as_slice() else { bail!("{:?}", self.node_ips) };
        for (six, (((n1, n2), external), client)) in
            [false, true].into_iter().zip(n1.iter().zip(n2).zip(EXTERNAL).zip(CLIENT))
        {
            let (outside, at) = (&self.outside, SocketAddr::new);
            for (what, from, to, way) in [
                ("answers of a pod on the node that is asked", &self.client, at(*n1, 30171), Way::Down),
                ("answers of a pod on another node", &self.client, at(*n1, 30172), Way::Down),
                (
                    "answers of a pod of a Service with externalTrafficPolicy Local",
                    &self.client,
                    at(*n2, 30173),
                    Way::Down,
                ),
                ("answers of another node's own program", &self.client, at(*n1, 30174), Way::Down),
                ("answers by an external address", &self.client, at(address(external)?, PORT), Way::Down),
                ("answers of a host port", &self.client, at(*n1, 8070), Way::Down),
                ("what a pod sends out", self.pod("one")?, at(address(client)?, PORT), Way::Up),
                (
                    "what a pod sends to a Service's endpoint outside",
                    self.pod("asker")?,
                    at(self.vip("beyond", six)?, PORT),
                    Way::Up,
                ),
                (
                    "what a pod sends there from its device",
                    self.pod("mesh")?,
                    at(self.vip("beyond", six)?, PORT),
                    Way::Up,
                ),
                ("what comes for a pod on another node", outside, at(*n1, 30172), Way::Up),
                ("what comes for another node's own program", outside, at(*n1, 30174), Way::Up),
            ] {
                self.passes(what, from, to, way).with_context(|| format!("backend {backend}"))?;
            }
        }
        Ok(())
    }
}

#[test]
fn what_is_too_big_for_the_path_is_told_by_every_path_of_a_service() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-path-mtu", 2, Families::Dual)?;
    let external = format!("externalCIDRs: [{}/32, '{}/128']", EXTERNAL[0], EXTERNAL[1]);
    cluster.apply_text(&(network_config(&format!("{{{external}}}")) + &objects()))?;
    let scene = Scene::new(cluster)?;
    let servers: Vec<Server> = ["one", "two", "port"]
        .into_iter()
        .map(|name| Server::at(scene.pod(name)?))
        .chain([Server::at(&scene.client), Server::at(scene.nodes.last().context("no node")?)])
        .collect::<Result<_>>()?;
    wait("the Services", PATIENCE, || {
        for port in [30171, 30172, 30174, 30175, 30176, 8070] {
            let to = scene.node_ips.first().context("no node")?.map(|ip| SocketAddr::new(ip, port));
            to.iter().try_for_each(|to| scene.outside.enter(|| by_udp(*to, Way::Up, 1)))?;
        }
        Ok(())
    })?;
    for (backend, direct) in
        [("vxlan", false), ("vxlan", true), ("host-gw", false), ("host-gw", true), ("ipip", false), ("udp", false)]
    {
        println!("backend {backend}, direct server return {direct}");
        let config = format!("{{backend: {backend}, directServerReturn: {direct}, {external}}}");
        scene.cluster.apply_text(&network_config(&config))?;
        all_send_by(&scene.cluster, backend)?;
        scene.all_pass(backend).with_context(|| format!("direct server return {direct}"))?;
    }
    drop(servers);
    let Scene { cluster, .. } = scene;
    cluster.down()
}
