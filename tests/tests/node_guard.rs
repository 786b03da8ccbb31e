//! No policy locks a node out. With everything denied that a ClusterNetworkPolicy of the Admin tier and a NetworkPolicy can deny, to and from all
//! pods, every node still reaches the API server, the kubelets' and ssh's ports of all nodes, and the pods that it has to probe; so does
//! the world outside reach the nodes; and what is on the host network is as free as its node. Pods are cut off from all of them.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::shell;

const SOON: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(5);
/// ssh, and the kubelet's own port.
const PORTS: [u16; 2] = [22, 10250];
const HOST_PORT: u16 = 8088;

fn probed(name: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: probed}}}}\nspec:\n  nodeName: n1\n  \
         terminationGracePeriodSeconds: 0\n  containers:\n  - name: web\n    image: nginx\n    ports: [{{containerPort: 80}}]\n    \
         readinessProbe: {{httpGet: {{path: /, port: 80}}, periodSeconds: 1, failureThreshold: 1}}\n"
    )
}

const ON_THE_HOST: &str = r#"---
apiVersion: v1
kind: Pod
metadata: {name: host, labels: {app: host}}
spec:
  nodeName: n2
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  containers: [{name: web, image: nginx, ports: [{containerPort: 8088}]}]
"#;

const LOCKDOWN: &str = r#"---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: lockdown}
spec:
  tier: Admin
  priority: 0
  subject: {namespaces: {}}
  ingress: [{name: nobody, action: Deny, from: [{namespaces: {}}]}]
  egress:
  - name: nowhere
    action: Deny
    to: [{namespaces: {}}, {nodes: {}}, {networks: ["0.0.0.0/0", "::/0"]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: lockdown}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
"#;

/// An end with a name for errors, and whom it asks.
type Way<'a> = (&'a Place, SocketAddr);

fn open(ways: &[Way<'_>], wanted: bool) -> Result<()> {
    let mut wrong = Vec::new();
    for (place, to) in ways {
        match place.enter(|| Ok(Session::open(*to, Duration::from_millis(700)).map(drop)))? {
            Ok(()) if !wanted => wrong.push(format!("{} → {to} is open", place.name())),
            Err(error) if wanted => wrong.push(format!("{} → {to}: {error:#}", place.name())),
            _ => {}
        }
    }
    ensure!(wrong.is_empty(), "{} of {}: {}", wrong.len(), ways.len(), wrong.join("; "));
    Ok(())
}

/// All addresses of all nodes.
fn node_addresses(cluster: &Cluster) -> Result<Vec<(String, IpAddr)>> {
    let out = cluster.try_kubectl(&["get", "nodes", "-o", "json"])?;
    let nodes: Value = serde_json::from_slice(&out.stdout)?;
    let mut all = Vec::new();
    for node in nodes.get("items").and_then(Value::as_array).into_iter().flatten() {
        for at in node.pointer("/status/addresses").and_then(Value::as_array).into_iter().flatten() {
            if field(at, "/type") == "InternalIP" {
                all.push((field(node, "/metadata/name"), address(&field(at, "/address"))?));
            }
        }
    }
    ensure!(all.len() >= 4, "two nodes have these addresses only: {all:?}");
    Ok(all)
}

/// The API server: its Service's address, and where it is.
fn api_server(cluster: &Cluster) -> Result<(SocketAddr, Vec<SocketAddr>)> {
    let service = cluster.get("service", "kubernetes")?;
    let mut all = Vec::new();
    for slice in cluster.list("endpointslices", "kubernetes.io/service-name=kubernetes")? {
        let port = slice.pointer("/ports/0/port").and_then(Value::as_u64).context("no port")?;
        for endpoint in slice.get("endpoints").and_then(Value::as_array).into_iter().flatten() {
            all.push(SocketAddr::new(address(&field(endpoint, "/addresses/0"))?, port.try_into()?));
        }
    }
    ensure!(!all.is_empty(), "the API server has no endpoint");
    Ok((SocketAddr::new(address(&field(&service, "/spec/clusterIP"))?, 443), all))
}

/// Nodes ask the API server by its Service, too: from where their programs are, for what is translated is the sockets of their cgroup.
fn nodes_ask_the_service(cluster: &Cluster, service: SocketAddr) -> Result<()> {
    for node in ["n1", "n2"] {
        let said = cluster.node(node, &format!("nc.openbsd -z -w 2 {} {}", service.ip(), service.port()))?;
        ensure!(said.ok, "{node} → {service}: {}", said.all());
    }
    Ok(())
}

/// A connection from one node to another that somebody works over.
struct Work(TcpStream, TcpStream);

impl Work {
    fn begin(from: &Place, listener: &TcpListener) -> Result<Self> {
        let to = listener.local_addr()?;
        let near = from.enter(|| Ok(TcpStream::connect_timeout(&to, ANSWER)?))?;
        let (far, _) = listener.accept()?;
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(ANSWER))?;
        }
        Ok(Self(near, far))
    }

    fn goes_on(&mut self) -> Result<()> {
        let mut byte = [0];
        self.0.write_all(b"?")?;
        self.1.read_exact(&mut byte)?;
        self.1.write_all(b"!")?;
        self.0.read_exact(&mut byte).context("the connection between nodes broke")
    }
}

#[test]
fn with_everything_denied_every_node_still_reaches_what_it_needs_and_is_reached() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-guard", 2, Families::Dual)?;
    let pods =
        [probed("probed"), ON_THE_HOST.to_owned(), shell("asks", "n1", "app: asks"), shell("other", "n2", "app: asks")];
    cluster.apply_text(&pods.concat())?;
    let pod = |name: &str| Place::of_pod(&cluster, &cluster.wait_pod(name)?);
    let web = SocketAddr::new(address(&cluster.wait_pod("probed")?.ip)?, 80);
    let (asks, other) = (pod("asks")?, pod("other")?);
    cluster.wait_pod("host")?;
    let [n1, n2] = [Place::of_node(&cluster, "n1")?, Place::of_node(&cluster, "n2")?];
    let outside = Place::of_node(&cluster, "outside")?;

    let addresses = node_addresses(&cluster)?;
    let mut listeners = Vec::new();
    for (node, ip) in &addresses {
        for port in PORTS {
            let bind = || {
                TcpListener::bind(SocketAddr::new(*ip, port)).with_context(|| format!("{node}: listen on {ip}:{port}"))
            };
            listeners.push(Place::of_node(&cluster, node)?.enter(bind)?);
        }
    }
    let mut targets: Vec<SocketAddr> = listeners.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?;
    let on_n2 = addresses.iter().filter(|(node, _)| node == "n2").map(|(_, ip)| SocketAddr::new(*ip, HOST_PORT));
    targets.extend(on_n2);
    let (service, api) = api_server(&cluster)?;

    // What no policy may take, and what this one takes.
    let from_nodes = [&n1, &n2].into_iter().flat_map(|node| targets.iter().chain(&api).map(move |to| (node, *to)));
    let from_outside = targets.iter().map(|to| (&outside, *to));
    let kept: Vec<Way<'_>> = from_nodes.chain(from_outside).chain([(&n1, web)]).collect();
    let from_pods = [&asks, &other]
        .into_iter()
        .flat_map(|pod| targets.iter().chain(&api).chain([&service]).map(move |to| (pod, *to)));
    let taken: Vec<Way<'_>> = from_pods.chain([(&asks, web), (&other, web), (&n2, web)]).collect();
    wait("an open network", SOON, || {
        open(&kept, true)?;
        nodes_ask_the_service(&cluster, service)?;
        open(&taken, true)
    })?;
    let mut works = Vec::new();
    for (listener, from) in listeners.iter().flat_map(|listener| [(listener, &n1), (listener, &n2)]) {
        // Of the connections that were only tried, one each may stand before it.
        while {
            listener.set_nonblocking(true)?;
            listener.accept().is_ok()
        } {}
        listener.set_nonblocking(false)?;
        works.push(Work::begin(from, listener)?);
    }

    cluster.apply_text(LOCKDOWN)?;
    wait("everything to be denied to pods", SOON, || open(&taken, false))?;
    open(&kept, true)?;
    nodes_ask_the_service(&cluster, service)?;
    works.iter_mut().try_for_each(Work::goes_on)?;
    // Probes come every second and one that fails is enough; a new pod is given its network, probed and ready, too.
    cluster.apply_text(&probed("later"))?;
    cluster.wait_pod("later")?;
    std::thread::sleep(Duration::from_secs(3));
    for name in ["probed", "later", "host"] {
        cluster.wait_pod(name)?;
    }
    let probed = cluster.get("pod", "probed")?;
    let restarts = probed.pointer("/status/containerStatuses/0/restartCount").and_then(Value::as_u64);
    ensure!(restarts == Some(0), "it was restarted: {probed}");
    open(&kept, true)?;
    nodes_ask_the_service(&cluster, service)?;
    println!("{} ways kept, {} taken", kept.len(), taken.len());

    // The agents hear of changes: who locked everything can open it again.
    for kind in ["clusternetworkpolicy", "networkpolicy"] {
        cluster.try_kubectl(&["delete", kind, "lockdown"])?;
    }
    wait("the network to be open again", SOON, || open(&taken, true))?;
    works.iter_mut().try_for_each(Work::goes_on)?;
    drop(listeners);
    cluster.down()
}
