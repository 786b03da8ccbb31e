//! The lab, who asks in it, and what an answer says.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::log::{Log, Voice};
use towpath_walkthrough::place::{Place, address};
use towpath_walkthrough::pods::shell;
use towpath_walkthrough::udp::Joined;

/// For what the API says to be in the data path.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(4);
/// Whoever has not answered by then does not.
const SILENCE: Duration = Duration::from_millis(1500);
pub(crate) const NODES: [&str; 3] = ["n1", "n2", "n3"];
/// NodePorts that the agents serve; the API server gives others, too.
const NODE_PORTS: &str = "nodePorts=[30000,31999]";

/// A web server on every node: its port `http` has another number on each; the label `at` names its node.
fn webs() -> String {
    let one = |node: &str, number: u16, role: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: web-{node}, labels: {{app: web, at: {node}, role: {role}}}}}\nspec:\n  \
             nodeName: {node}\n  terminationGracePeriodSeconds: 0\n  containers:\n  - name: web\n    image: nginx\n    ports:\n    \
             - {{name: http, containerPort: {number}}}\n    - {{containerPort: 80}}\n    - {{containerPort: 80, protocol: UDP}}\n"
        )
    };
    one("n1", 8081, "pair") + &one("n2", 8082, "pair") + &one("n3", 8083, "alone")
}

pub(crate) struct Scene {
    pub(crate) cluster: Cluster,
    /// A pod of n1: this process is in that node's cgroup, so its connections are translated in the socket.
    pub(crate) hooked: Place,
    /// A pod of n2: its connections are translated at its device.
    pub(crate) plain: Place,
    /// A pod of n3, translated at its device, too.
    pub(crate) third: Place,
    /// n1.
    pub(crate) node: Place,
    pub(crate) outside: Place,
    nodes: Vec<(String, Vec<IpAddr>)>,
    webs: Vec<(String, Vec<IpAddr>)>,
    askers: Vec<(String, Vec<IpAddr>)>,
    _joined: Joined,
}

/// What a web server says of a request.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) pod: String,
    pub(crate) client: IpAddr,
}

/// How an attempt to connect ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Connected,
    Refused,
    Silence,
}

fn ips(object: &Value, pointer: &str, name: &str) -> Vec<IpAddr> {
    let list = object.pointer(pointer).and_then(Value::as_array).cloned().unwrap_or_default();
    list.iter().filter_map(|entry| field(entry, name).parse().ok()).collect()
}

impl Scene {
    pub(crate) fn set_up() -> Result<Self> {
        let cluster = Cluster::up_with("e2e-fields", 3, Families::Dual, &["--agent-config", NODE_PORTS])?;
        strict_underlay(&cluster)?;
        let log = Log::new(Voice::Plain);
        for (node, zone) in NODES.iter().zip(["east", "west", "west"]) {
            cluster.kubectl(&log, &["label", "node", node, &format!("topology.kubernetes.io/zone={zone}")])?;
        }
        let askers = [("hooked", "n1"), ("plain", "n2"), ("third", "n3")];
        let shells: String = askers.iter().map(|(name, node)| shell(name, node, "")).collect();
        cluster.apply_text(&(webs() + &shells))?;
        cluster.wait_ready("app=web", 3)?;
        let place = |pod: &str| Place::of_pod(&cluster, &cluster.wait_pod(pod)?);
        let [hooked, plain, third] = [place("hooked")?, place("plain")?, place("third")?];
        let pod_ips = |pod: &str| Ok((pod.to_owned(), ips(&cluster.get("pod", pod)?, "/status/podIPs", "/ip")));
        let webs = NODES.iter().map(|node| pod_ips(&format!("web-{node}"))).collect::<Result<Vec<_>>>()?;
        let askers = askers.iter().map(|(pod, _)| pod_ips(pod)).collect::<Result<Vec<_>>>()?;
        let node_ips = |node: &&str| {
            let object = cluster.get("node", node)?;
            let addresses = ips(&object, "/status/addresses", "/address");
            Ok(((*node).to_owned(), addresses))
        };
        let nodes = NODES.iter().map(node_ips).collect::<Result<Vec<_>>>()?;
        let (node, outside) = (Place::of_node(&cluster, "n1")?, Place::of_node(&cluster, "outside")?);
        let joined = Joined::node(&cluster, "n1")?;
        Ok(Self { hooked, plain, third, node, outside, nodes, webs, askers, _joined: joined, cluster })
    }

    pub(crate) fn down(self) -> Result<()> {
        let Self { cluster, _joined: joined, .. } = self;
        drop(joined);
        cluster.down()
    }

    pub(crate) fn apply(&self, manifests: &str) -> Result<()> {
        self.cluster.apply_text(manifests)
    }

    /// Who is inside: by which path, from where, and the address that a server should see, if it is known.
    pub(crate) fn inside(&self) -> [(&'static str, &Place, &'static str); 3] {
        [
            ("a pod's socket", &self.hooked, "hooked"),
            ("a pod's device", &self.plain, "plain"),
            ("a node", &self.node, ""),
        ]
    }

    /// Those and a host outside.
    pub(crate) fn everywhere(&self) -> [(&'static str, &Place); 4] {
        [
            ("a pod's socket", &self.hooked),
            ("a pod's device", &self.plain),
            ("a node", &self.node),
            ("outside", &self.outside),
        ]
    }

    fn of(list: &[(String, Vec<IpAddr>)], name: &str, six: bool) -> Result<IpAddr> {
        let found = list.iter().find(|(known, _)| known == name);
        let mut addresses = found.into_iter().flat_map(|(_, all)| all);
        addresses.find(|ip| ip.is_ipv6() == six).copied().with_context(|| format!("{name} has no such address"))
    }

    pub(crate) fn node_ip(&self, node: &str, six: bool) -> Result<IpAddr> {
        Self::of(&self.nodes, node, six)
    }

    pub(crate) fn web_ip(&self, node: &str, six: bool) -> Result<IpAddr> {
        Self::of(&self.webs, &format!("web-{node}"), six)
    }

    /// The address of an asking pod.
    pub(crate) fn asker_ip(&self, pod: &str, six: bool) -> Result<IpAddr> {
        Self::of(&self.askers, pod, six)
    }

    pub(crate) fn at_node(&self, node: &str, port: u16) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.node_ip(node, false)?, port))
    }

    /// A Service's cluster address in a family.
    pub(crate) fn vip(&self, service: &str, six: bool) -> Result<IpAddr> {
        let object = self.cluster.get("service", service)?;
        let list = object.pointer("/spec/clusterIPs").and_then(Value::as_array).cloned().unwrap_or_default();
        let mut ips = list.iter().filter_map(Value::as_str).filter_map(|text| text.parse::<IpAddr>().ok());
        ips.find(|ip| ip.is_ipv6() == six).with_context(|| format!("Service {service} has no such address: {list:?}"))
    }

    pub(crate) fn at_vip(&self, service: &str, port: u16) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.vip(service, false)?, port))
    }

    /// The address that a load balancer's pool gave a Service.
    pub(crate) fn balancer(&self, service: &str) -> Result<IpAddr> {
        address(&towpath_walkthrough::rows::balancer_address(&self.cluster, service)?)
    }
}

/// Every node checks return paths strictly, and the network between them drops what has a pod's address, as clouds' do.
fn strict_underlay(cluster: &Cluster) -> Result<()> {
    for node in NODES {
        let said = cluster.node(node, "sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.eth0.rp_filter=1")?;
        ensure!(said.ok, "rp_filter on {node}: {}", said.all());
    }
    let rules = "add table bridge strict\nadd chain bridge strict forward { type filter hook forward priority 0; }\n\
                 add rule bridge strict forward ip saddr 10.244.0.0/16 counter drop\n\
                 add rule bridge strict forward ip6 saddr fd00:10:244::/56 counter drop\n\
                 add table inet strict\nadd chain inet strict prerouting { type filter hook prerouting priority 0; }\n\
                 add rule inet strict prerouting ip saddr 10.244.0.0/16 counter drop\n\
                 add rule inet strict prerouting ip6 saddr fd00:10:244::/56 counter drop\n";
    let file = std::env::temp_dir().join(format!("towpath-{}-strict.nft", cluster.name()));
    std::fs::write(&file, rules)?;
    let underlay = format!("tp-{}-underlay", cluster.name());
    let loaded = Command::new("ip").args(["netns", "exec", &underlay, "nft", "-f"]).arg(&file).output()?;
    let _ = std::fs::remove_file(&file);
    ensure!(loaded.status.success(), "{}", String::from_utf8_lossy(&loaded.stderr));
    Ok(())
}

fn request(to: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, ANSWER).with_context(|| format!("connect to {to}"))?;
    stream.set_read_timeout(Some(ANSWER))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text).with_context(|| format!("read the answer of {to}"))?;
    Ok(text)
}

fn line(text: &str, name: &str) -> Option<String> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(|rest| rest.trim().to_owned())
}

fn understood(text: &str) -> Result<Answer> {
    let client: SocketAddr = line(text, "client: ").context("no client")?.parse()?;
    Ok(Answer { pod: line(text, "pod: ").with_context(|| format!("no pod in {text:?}"))?, client: client.ip() })
}

/// An HTTP answer, head and body.
pub(crate) fn whole(from: &Place, to: SocketAddr, path: &str) -> Result<String> {
    from.enter(|| request(to, path))
}

/// One request over a new connection.
pub(crate) fn ask(from: &Place, to: SocketAddr) -> Result<Answer> {
    from.enter(|| understood(&request(to, "/")?)).with_context(|| format!("from {}", from.name()))
}

/// As many, one after the other.
pub(crate) fn ask_often(from: &Place, to: SocketAddr, count: usize) -> Result<Vec<Answer>> {
    from.enter(|| (0..count).map(|_| understood(&request(to, "/")?)).collect())
        .with_context(|| format!("from {} to {to}", from.name()))
}

/// Which pods answer `count` requests.
pub(crate) fn who(from: &Place, to: SocketAddr, count: usize) -> Result<BTreeSet<String>> {
    Ok(ask_often(from, to, count)?.into_iter().map(|answer| answer.pod).collect())
}

/// Waits until these pods, and no others, answer twenty requests for each of them.
pub(crate) fn only(what: &str, from: &Place, to: SocketAddr, pods: &[&str]) -> Result<()> {
    let wanted: BTreeSet<String> = pods.iter().map(|pod| (*pod).to_owned()).collect();
    wait(&format!("{wanted:?} at {to} from {what}"), PATIENCE, || {
        let found = who(from, to, 20 * pods.len())?;
        if found == wanted { Ok(()) } else { bail!("{found:?}") }
    })
}

/// How connecting ends.
pub(crate) fn connect(from: &Place, to: SocketAddr) -> Result<Outcome> {
    from.enter(|| match TcpStream::connect_timeout(&to, SILENCE) {
        Ok(_) => Ok(Outcome::Connected),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(Outcome::Refused),
        Err(error) if error.kind() == ErrorKind::TimedOut => Ok(Outcome::Silence),
        Err(error) => Err(anyhow!(error).context(format!("connect to {to}"))),
    })
}

/// Waits until connecting ends so.
pub(crate) fn ends(what: &str, from: &Place, to: SocketAddr, wanted: Outcome) -> Result<()> {
    wait(&format!("{wanted:?} at {to} from {what}"), PATIENCE, || {
        let found = connect(from, to)?;
        if found == wanted { Ok(()) } else { bail!("{found:?}") }
    })
}

/// A datagram over a connected socket, and what comes back.
pub(crate) fn datagram(from: &Place, to: SocketAddr, payload: &[u8]) -> Result<Vec<u8>> {
    from.enter(|| {
        let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_read_timeout(Some(SILENCE))?;
        socket.connect(to)?;
        socket.send(payload).with_context(|| format!("send to {to}"))?;
        let mut buffer = vec![0; 65536];
        let count = socket.recv(&mut buffer).with_context(|| format!("an answer of {to}"))?;
        buffer.truncate(count);
        Ok(buffer)
    })
}

/// Who answers `whoami` by UDP.
pub(crate) fn ask_udp(from: &Place, to: SocketAddr) -> Result<Answer> {
    understood(&String::from_utf8_lossy(&datagram(from, to, b"whoami")?))
        .with_context(|| format!("from {}", from.name()))
}
