//! A UDP client that keeps its socket reaches no address that its Service no longer leads to for more than two seconds, and works again
//! as soon as the Service does: from a pod and from the node, over connected sockets and single datagrams, translated in the socket and at
//! the pod's device, whatever becomes of the endpoints.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, address};
use towpath_walkthrough::udp::{Client, Joined, Server};

/// The promise.
const BOUND: Duration = Duration::from_secs(2);
/// How long silence is listened to after it.
const SILENCE: Duration = Duration::from_millis(700);
const PATIENCE: Duration = Duration::from_secs(10);

const PODS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: asks}
spec:
  nodeName: n1
  containers: [{name: shell, image: busybox, command: [sleep, "86400"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: near}
spec:
  nodeName: n1
  containers: [{name: shell, image: busybox, command: [sleep, "86400"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: far}
spec:
  nodeName: n2
  containers: [{name: shell, image: busybox, command: [sleep, "86400"]}]
"#;

fn service(port: u16) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "names", "namespace": "default"}, "spec": {
        "type": "NodePort", "ports": [{"name": "q", "protocol": "UDP", "port": port, "targetPort": 5353, "nodePort": 30053}]}})
}

fn slice(endpoints: &[&str], port: u16) -> Value {
    let endpoints: Vec<Value> = endpoints.iter().map(|ip| json!({"addresses": [ip]})).collect();
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "names-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "names"}},
        "endpoints": endpoints, "ports": [{"name": "q", "protocol": "UDP", "port": port}]})
}

struct Scene<'a> {
    cluster: &'a Cluster,
    clients: Vec<Client>,
    near: Server,
    far: Server,
    /// Of the near pod, at another port.
    moved: Server,
    near_ip: String,
    far_ip: String,
}

impl Scene<'_> {
    fn apply(&self, object: &Value) -> Result<Instant> {
        self.cluster.apply_text(&object.to_string())?;
        Ok(Instant::now())
    }

    /// Nobody is heard there from [`BOUND`] after the change on.
    fn is_left(&self, what: &str, server: &Server, changed: Instant) -> Result<()> {
        std::thread::sleep((changed + BOUND + SILENCE).saturating_duration_since(Instant::now()));
        for client in &self.clients {
            let heard = server.heard(&client.name);
            if let Some(late) = heard.and_then(|at| at.checked_duration_since(changed)) {
                ensure!(late <= BOUND, "{what}: {} still reaches the dead after {late:?}", client.name);
            }
        }
        Ok(())
    }

    /// Everybody is heard there after the change, soon.
    fn is_found(&self, what: &str, server: &Server, changed: Instant) -> Result<()> {
        wait(what, PATIENCE, || {
            for client in &self.clients {
                if server.heard(&client.name).is_none_or(|at| at <= changed) {
                    bail!("{} is not heard", client.name);
                }
            }
            Ok(())
        })?;
        let took = changed.elapsed();
        println!("{what}: everybody was heard {took:?} after the change");
        ensure!(took <= BOUND + SILENCE, "{what}: only after {took:?}");
        Ok(())
    }

    fn play(&self, vip: &str) -> Result<()> {
        let begun = self.apply(&slice(&[&self.near_ip], 5353))?;
        self.is_found("the first endpoint", &self.near, begun)?;
        let swapped = self.apply(&slice(&[&self.far_ip], 5353))?;
        self.is_found("another endpoint in its place", &self.far, swapped)?;
        self.is_left("another endpoint in its place", &self.near, swapped)?;
        let none = self.apply(&slice(&[], 5353))?;
        self.is_left("no endpoint", &self.far, none)?;
        let back = self.apply(&slice(&[&self.near_ip], 5353))?;
        self.is_found("an endpoint again", &self.near, back)?;
        let target = self.apply(&slice(&[&self.near_ip], 5354))?;
        self.is_found("another target port", &self.moved, target)?;
        self.is_left("another target port", &self.near, target)?;
        let renumbered = self.apply(&service(54))?;
        let vip_clients = || self.clients.iter().filter(|client| client.name.contains("cluster"));
        std::thread::sleep((renumbered + BOUND + SILENCE).saturating_duration_since(Instant::now()));
        for client in vip_clients() {
            let late = self.moved.heard(&client.name).and_then(|at| at.checked_duration_since(renumbered));
            ensure!(
                late.is_none_or(|late| late <= BOUND),
                "another port: {} goes on at the old after {late:?}",
                client.name
            );
        }
        let aimed = Instant::now();
        vip_clients().try_for_each(|client| address(vip).map(|ip| client.aim(SocketAddr::new(ip, 54))))?;
        self.is_found("the other port", &self.moved, aimed)?;
        self.agent_was_away()?;
        let log = towpath_walkthrough::log::Log::new(towpath_walkthrough::log::Voice::Plain);
        self.cluster.kubectl(&log, &["delete", "service", "names"])?;
        let deleted = Instant::now();
        self.is_left("no Service", &self.moved, deleted)?;
        self.is_left("no Service", &self.far, deleted)
    }

    /// What changed while nobody looked is found when the agent is back.
    fn agent_was_away(&self) -> Result<()> {
        let pid = machine::lab_agent(self.cluster.name(), "n1")?;
        machine::kill(pid)?;
        let changed = self.apply(&slice(&[&self.far_ip], 5353))?;
        wait("a new agent to let go", Duration::from_secs(20), || {
            for client in &self.clients {
                if self.far.heard(&client.name).is_none_or(|at| at <= changed) {
                    bail!("{} is not heard at the new endpoint", client.name);
                }
            }
            Ok(())
        })?;
        let over = Instant::now();
        std::thread::sleep(SILENCE);
        for client in &self.clients {
            ensure!(self.moved.heard(&client.name).is_none_or(|at| at < over), "{} is at both", client.name);
        }
        Ok(())
    }
}

fn play(cluster: &Cluster, hooked: bool) -> Result<()> {
    let [asks, near, far] = ["asks", "near", "far"].map(|name| cluster.wait_pod(name));
    let (asks, near, far) = (asks?, near?, far?);
    let joined = if hooked { Some(Joined::node(cluster, "n1")?) } else { None };
    cluster.apply_text(&service(53).to_string())?;
    let vip = field(&cluster.get("service", "names")?, "/spec/clusterIP");
    let nodes = cluster.nodes()?;
    let at_node =
        |name: &str| nodes.iter().find(|(node, _)| node == name).map(|(_, ip)| ip.clone()).unwrap_or_default();
    let to_vip = SocketAddr::new(address(&vip)?, 53);
    let to_port = |node: &str| Ok::<_, anyhow::Error>(SocketAddr::new(address(&at_node(node))?, 30053));
    let (pod, node) = (Place::of_pod(cluster, &asks)?, Place::of_node(cluster, "n1")?);
    let mut clients = vec![
        Client::start(&pod, "pod, cluster address, connected", to_vip, true)?,
        Client::start(&pod, "pod, cluster address, datagrams", to_vip, false)?,
        Client::start(&pod, "pod, NodePort of another node, connected", to_port("n2")?, true)?,
    ];
    if hooked {
        // Without the socket hook the node's own processes have no Services.
        clients.push(Client::start(&node, "node, cluster address, connected", to_vip, true)?);
        clients.push(Client::start(&node, "node, cluster address, datagrams", to_vip, false)?);
        clients.push(Client::start(&node, "node, NodePort, connected", to_port("n1")?, true)?);
    }
    let (near_place, far_place) = (Place::of_pod(cluster, &near)?, Place::of_pod(cluster, &far)?);
    let at = |ip: &str, port: u16| Ok::<_, anyhow::Error>(SocketAddr::new(address(ip)?, port));
    let scene = Scene {
        cluster,
        clients,
        near: Server::at(&near_place, at(&near.ip, 5353)?)?,
        far: Server::at(&far_place, at(&far.ip, 5353)?)?,
        moved: Server::at(&near_place, at(&near.ip, 5354)?)?,
        near_ip: near.ip.clone(),
        far_ip: far.ip.clone(),
    };
    let played = scene.play(&vip);
    drop(scene);
    drop(joined);
    played
}

#[test]
fn no_datagram_goes_to_the_dead_and_a_client_that_keeps_its_socket_works_again() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-udp", 2, Families::Ipv4)?;
    cluster.apply_text(PODS)?;
    for hooked in [true, false] {
        println!("translated {}", if hooked { "in the socket" } else { "at the pod's device" });
        play(&cluster, hooked)?;
    }
    cluster.down()
}
