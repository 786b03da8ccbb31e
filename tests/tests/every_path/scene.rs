//! The lab: endpoints, clients and policies, and who is where.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use towpath_oracle::Cluster as Objects;
use towpath_walkthrough::cluster::{Cluster, Families, Pod, field, wait};
use towpath_walkthrough::place::{Place as Spot, address};
use towpath_walkthrough::pods::shell;

use crate::axes::{Axes, Axis, Client, Endpoint, Family, Place, Port, Protocol, Way};
use crate::policies::{self, Addresses};

/// Ports of the endpoints, and of their Services.
pub(crate) const OPEN: u16 = 7001;
pub(crate) const CLOSED: u16 = 7002;
const SERVICE: [u16; 2] = [81, 82];
const HOST_PORTS: u16 = 7100;
const PATIENCE: Duration = Duration::from_secs(60);
const ROLES: [(Client, &str, &str); 4] = [
    (Client::Friend, "friend", "default"),
    (Client::Bound, "bound", "default"),
    (Client::Stranger, "stranger", "others"),
    (Client::Tied, "tied", "others"),
];
const NODES: [&str; 2] = ["n1", "n2"];

/// Where somebody stands.
pub(crate) struct Standing {
    pub(crate) spot: Spot,
    /// The node whose socket hooks its processes have.
    pub(crate) node: Option<&'static str>,
    /// One a family.
    pub(crate) addresses: [IpAddr; 2],
}

impl Standing {
    pub(crate) fn address(&self, family: Family) -> IpAddr {
        let [v4, v6] = self.addresses;
        if family == Family::V4 { v4 } else { v6 }
    }
}

/// One way by which an endpoint is reached: an address a family, and the number of each port for each protocol.
struct Front {
    addresses: [IpAddr; 2],
    ports: BTreeMap<(Protocol, Port), u16>,
}

/// Everything that is asked and asks.
pub(crate) struct Scene {
    pub(crate) cluster: Cluster,
    pub(crate) standing: Vec<Standing>,
    /// Indexes of `standing`.
    clients: BTreeMap<(Client, Place), usize>,
    endpoints: BTreeMap<Endpoint, usize>,
    fronts: BTreeMap<(Endpoint, Way), Front>,
    pub(crate) objects: Objects,
}

fn name_of(endpoint: Endpoint) -> String {
    format!("{endpoint:?}").to_lowercase()
}

fn number_of(port: Port) -> u16 {
    if port == Port::Open { OPEN } else { CLOSED }
}

fn host_port(endpoint: Endpoint, port: Port) -> u16 {
    HOST_PORTS + endpoint as u16 * 2 + port as u16
}

/// All objects but the policies.
fn objects() -> String {
    let mut text =
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: others, labels: {team: others}}\n".to_owned();
    for (pool, node, v4, v6) in [
        ("here", "n1", "192.168.255.180-192.168.255.189", "fd00:255::2000-fd00:255::200f"),
        ("there", "n2", "192.168.255.190-192.168.255.199", "fd00:255::3000-fd00:255::300f"),
    ] {
        let _ = writeln!(
            text,
            "---\napiVersion: towpath.dev/v1alpha1\nkind: AddressPool\nmetadata: {{name: {pool}}}\nspec: {{addresses: [\"{v4}\", \
             \"{v6}\"], autoAssign: false, nodeSelector: {{matchLabels: {{kubernetes.io/hostname: {node}}}}}}}"
        );
    }
    for (_, role, namespace) in ROLES {
        for node in NODES {
            let pod = shell(&format!("{role}-{node}"), node, &format!("role: {role}"));
            text += &pod.replace("metadata: {", &format!("metadata: {{namespace: {namespace}, "));
        }
    }
    for endpoint in Endpoint::ALL {
        text += &serving(*endpoint);
        for pool in ["here", "there"] {
            text += &service(*endpoint, pool);
        }
    }
    text
}

fn serving(endpoint: Endpoint) -> String {
    let name = name_of(endpoint);
    let mut ports = String::new();
    for port in Port::ALL {
        let (number, host) = (number_of(*port), host_port(endpoint, *port));
        let called = format!("{port:?}").to_lowercase();
        let _ = write!(
            ports,
            "{{name: {called}, containerPort: {number}, hostPort: {host}}}, {{containerPort: {number}, hostPort: {host}, protocol: \
             UDP}}, {{containerPort: {number}, protocol: SCTP}}, "
        );
    }
    let (host_network, ports) =
        if endpoint == Endpoint::Hosted { ("true", String::new()) } else { ("false", format!(", ports: [{ports}]")) };
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\nspec:\n  nodeName: n1\n  hostNetwork: \
         {host_network}\n  terminationGracePeriodSeconds: 0\n  \
         containers: [{{name: shell, image: busybox, command: [sleep, \"86400\"]{ports}}}]\n"
    )
}

/// ClusterIP, NodePorts and a load balancer's address that one node announces.
fn service(endpoint: Endpoint, pool: &str) -> String {
    let name = name_of(endpoint);
    let mut ports = String::new();
    for protocol in ["TCP", "UDP", "SCTP"] {
        for (port, number) in Port::ALL.iter().zip(SERVICE) {
            let target = number_of(*port);
            let called = format!("{protocol}-{port:?}").to_lowercase();
            let _ = write!(ports, "{{name: {called}, protocol: {protocol}, port: {number}, targetPort: {target}}}, ");
        }
    }
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}-{pool}, annotations: {{towpath.dev/address-pool: {pool}}}}}\n\
         spec: {{type: LoadBalancer, ipFamilyPolicy: RequireDualStack, selector: {{app: {name}}}, ports: [{ports}]}}\n"
    )
}

fn everything<T: serde::de::DeserializeOwned>(cluster: &Cluster, kind: &str) -> Result<Vec<T>> {
    let out = cluster.try_kubectl(&["get", kind, "--all-namespaces", "-o", "json"])?;
    ensure!(out.status.success(), "get {kind}: {}", String::from_utf8_lossy(&out.stderr));
    let mut list: Value = serde_json::from_slice(&out.stdout)?;
    serde_json::from_value(list["items"].take()).with_context(|| format!("understand the {kind}"))
}

/// The texts at a pointer in each element of a list, as addresses: one of IPv4, one of IPv6.
fn pair(list: Option<&Value>, pointer: &str) -> Result<[IpAddr; 2]> {
    let items = list.and_then(Value::as_array).cloned().unwrap_or_default();
    let all: Vec<IpAddr> = items.iter().filter_map(|item| item.pointer(pointer)?.as_str()?.parse().ok()).collect();
    let of = |v4: bool| all.iter().copied().find(|ip| ip.is_ipv4() == v4);
    Ok([
        of(true).with_context(|| format!("no IPv4 in {all:?}"))?,
        of(false).with_context(|| format!("no IPv6 in {all:?}"))?,
    ])
}

impl Scene {
    /// Brings everything up, and applies the policies last.
    pub(crate) fn set_up() -> Result<Self> {
        let cluster = Cluster::up("e2e-everypath", 2, Families::Dual)?;
        cluster.apply_text(&objects())?;
        let pods = wait("all pods to be ready", PATIENCE, || {
            let pods: Vec<Value> = everything(&cluster, "pods")?;
            let ready = pods.iter().filter(|pod| Pod::from_json(pod).ready).count();
            if ready == pods.len() { Ok(pods) } else { bail!("{ready} of {}", pods.len()) }
        })?;
        let mut scene = Self {
            cluster,
            standing: Vec::new(),
            clients: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            fronts: BTreeMap::new(),
            objects: Objects::default(),
        };
        scene.stand(&pods)?;
        scene.find_fronts()?;
        for at in scene.endpoints.values() {
            scene.standing.get(*at).context("an endpoint")?.spot.enter(complain_freely)?;
        }
        let addresses = scene.addresses()?;
        scene.cluster.apply_text(&policies::manifests(&addresses))?;
        scene.objects = Objects {
            nodes: everything(&scene.cluster, "nodes")?,
            namespaces: everything(&scene.cluster, "namespaces")?,
            pods: everything(&scene.cluster, "pods")?,
            policies: everything(&scene.cluster, "networkpolicies")?,
            cluster_policies: everything(&scene.cluster, "clusternetworkpolicies")?,
            names: Vec::new(),
        };
        Ok(scene)
    }

    fn stands(&mut self, spot: Spot, node: Option<&'static str>, addresses: [IpAddr; 2]) -> usize {
        self.standing.push(Standing { spot, node, addresses });
        self.standing.len() - 1
    }

    fn stand(&mut self, pods: &[Value]) -> Result<()> {
        let both = [Place::SameNode, Place::CrossNode];
        for (node, place) in NODES.into_iter().zip(both) {
            let object = self.cluster.get("node", node)?;
            let addresses = pair(object.pointer("/status/addresses"), "/address")?;
            let spot = Spot::of_node(&self.cluster, node)?;
            let at = self.stands(spot, Some(node), addresses);
            self.clients.insert((Client::Host, place), at);
        }
        let hosted = self.client(Client::Host, Place::SameNode).context("node n1")?;
        self.endpoints.insert(Endpoint::Hosted, hosted);
        for (client, host) in [(Client::Outside, "outside"), (Client::Elsewhere, "outside2")] {
            let path = Path::new("/run/netns").join(format!("tp-{}-{host}", self.cluster.name()));
            let spot = Spot::of_netns(host, &path)?;
            let addresses = sources(&spot, self.standing.first().context("node n1")?.addresses)?;
            let at = self.stands(spot, None, addresses);
            self.clients.extend(both.map(|place| ((client, place), at)));
        }
        let mut stand = |name: &str, node: &'static str| -> Result<usize> {
            let object = pods.iter().find(|pod| field(pod, "/metadata/name") == name);
            let object = object.with_context(|| format!("no pod {name}"))?;
            let spot = Spot::of_pod(&self.cluster, &Pod::from_json(object))?;
            let addresses = pair(object.pointer("/status/podIPs"), "/ip")?;
            self.standing.push(Standing { spot, node: Some(node), addresses });
            Ok(self.standing.len() - 1)
        };
        for (client, role, _) in ROLES {
            for (node, place) in NODES.into_iter().zip(both) {
                self.clients.insert((client, place), stand(&format!("{role}-{node}"), node)?);
            }
        }
        for endpoint in Endpoint::ALL.iter().filter(|endpoint| **endpoint != Endpoint::Hosted) {
            self.endpoints.insert(*endpoint, stand(&name_of(*endpoint), NODES[0])?);
        }
        Ok(())
    }

    fn find_fronts(&mut self) -> Result<()> {
        let with_ports = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
        let numbers = |number: &dyn Fn(Protocol, Port) -> Option<u16>| -> Result<BTreeMap<(Protocol, Port), u16>> {
            let all = with_ports.iter().flat_map(|protocol| Port::ALL.iter().map(move |port| (*protocol, *port)));
            all.map(|key| Ok((key, number(key.0, key.1).with_context(|| format!("no port for {key:?}"))?))).collect()
        };
        let nodes = [Place::SameNode, Place::CrossNode].map(|place| self.client(Client::Host, place));
        let [Some(here), Some(there)] = nodes.map(|node| node.and_then(|at| Some(self.standing.get(at)?.addresses)))
        else {
            bail!("no nodes")
        };
        let services = wait("the load balancers' addresses", PATIENCE, || {
            let all: Vec<Value> = everything(&self.cluster, "services")?;
            let ours = all.iter().filter(|service| field(service, "/spec/type") == "LoadBalancer");
            ours.map(|service| pair(service.pointer("/status/loadBalancer/ingress"), "/ip").map(|_| service.clone()))
                .collect()
        });
        let services: Vec<Value> = services?;
        for endpoint in Endpoint::ALL.iter().copied() {
            let own = self.standing.get(*self.endpoints.get(&endpoint).context("an endpoint")?).context("its pod")?;
            let own = Front { addresses: own.addresses, ports: numbers(&|_, port| Some(number_of(port)))? };
            let host_ports = Front { addresses: here, ports: numbers(&|_, port| Some(host_port(endpoint, port)))? };
            self.fronts.insert((endpoint, Way::Address), own);
            self.fronts.insert((endpoint, Way::HostPort), host_ports);
            for (pool, way) in [("here", Way::BalancerHere), ("there", Way::BalancerThere)] {
                let name = format!("{}-{pool}", name_of(endpoint));
                let object = services.iter().find(|service| field(service, "/metadata/name") == name);
                let object = object.with_context(|| format!("no Service {name}"))?;
                let listed = object.pointer("/spec/ports").and_then(Value::as_array).cloned().unwrap_or_default();
                let number = |protocol: Protocol, port: Port, pointer: &str| {
                    let called = format!("{protocol:?}-{port:?}").to_lowercase();
                    let found = listed.iter().find(|listed| field(listed, "/name") == called)?;
                    field(found, pointer).parse().ok()
                };
                let service = || numbers(&|protocol, port| number(protocol, port, "/port"));
                let node_ports = || numbers(&|protocol, port| number(protocol, port, "/nodePort"));
                let balancer = pair(object.pointer("/status/loadBalancer/ingress"), "/ip")?;
                self.fronts.insert((endpoint, way), Front { addresses: balancer, ports: service()? });
                if way == Way::BalancerHere {
                    let texts = object.pointer("/spec/clusterIPs");
                    let cluster_ip = Front { addresses: pair(texts, "")?, ports: service()? };
                    self.fronts.insert((endpoint, Way::ClusterIp), cluster_ip);
                    for (way, addresses) in [(Way::NodePortHere, here), (Way::NodePortThere, there)] {
                        self.fronts.insert((endpoint, way), Front { addresses, ports: node_ports()? });
                    }
                }
            }
        }
        Ok(())
    }

    fn client(&self, client: Client, place: Place) -> Option<usize> {
        self.clients.get(&(client, place)).copied()
    }

    fn addresses(&self) -> Result<Addresses> {
        let of = |client, place| -> Result<Vec<IpAddr>> {
            let at = self.client(client, place).and_then(|at| self.standing.get(at)).context("a client")?;
            Ok(at.addresses.to_vec())
        };
        let tiered = self.endpoints.get(&Endpoint::Tiered).and_then(|at| self.standing.get(*at)).context("a pod")?;
        Ok(Addresses {
            here: of(Client::Host, Place::SameNode)?,
            there: of(Client::Host, Place::CrossNode)?,
            outside: of(Client::Outside, Place::SameNode)?,
            except: [of(Client::Friend, Place::SameNode)?, of(Client::Stranger, Place::CrossNode)?].concat(),
            tiered: tiered.addresses.to_vec(),
        })
    }

    /// Index in `standing` of who asks.
    pub(crate) fn asker(&self, axes: &Axes) -> Result<usize> {
        let found = match axes.client {
            Client::Itself => self.endpoints.get(&axes.endpoint).copied(),
            client => self.client(client, axes.place),
        };
        found.with_context(|| format!("{axes}: nobody asks"))
    }

    /// Index in `standing` of who is asked.
    pub(crate) fn asked(&self, axes: &Axes) -> Result<usize> {
        self.endpoints.get(&axes.endpoint).copied().with_context(|| format!("{axes}: no endpoint"))
    }

    /// The address and port that are asked.
    pub(crate) fn target(&self, axes: &Axes) -> Result<SocketAddr> {
        self.front(axes, axes.way)
    }

    /// The address and port of the endpoint: what a Service's becomes.
    pub(crate) fn translated(&self, axes: &Axes) -> Result<SocketAddr> {
        self.front(axes, Way::Address)
    }

    fn front(&self, axes: &Axes, way: Way) -> Result<SocketAddr> {
        let front = self.fronts.get(&(axes.endpoint, way)).with_context(|| format!("{axes}: no such way"))?;
        let [v4, v6] = front.addresses;
        let ip = if axes.family == Family::V4 { v4 } else { v6 };
        // ICMP has none.
        Ok(SocketAddr::new(ip, front.ports.get(&(axes.protocol, axes.port)).copied().unwrap_or(0)))
    }
}

/// Has the kernel of the calling thread's network namespace send an ICMP error for each packet that deserves one, not some a second.
fn complain_freely() -> Result<()> {
    for (limit, value) in [
        ("ipv4/icmp_ratemask", "0"),
        // Of all types only this, which is none.
        ("ipv6/icmp/ratemask", "255"),
    ] {
        let path = format!("/proc/sys/net/{limit}");
        std::fs::write(&path, value).with_context(|| format!("write {path}"))?;
    }
    Ok(())
}

/// The addresses that a host sends from towards others.
fn sources(spot: &Spot, towards: [IpAddr; 2]) -> Result<[IpAddr; 2]> {
    let source = |to: IpAddr| {
        spot.enter(|| {
            let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let socket = std::net::UdpSocket::bind((any, 0))?;
            socket.connect((to, 9)).with_context(|| format!("{} towards {to}", spot.name()))?;
            address(&socket.local_addr()?.ip().to_string())
        })
    };
    let [v4, v6] = towards;
    Ok([source(v4)?, source(v6)?])
}
