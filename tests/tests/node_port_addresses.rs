//! `NetworkConfig` chooses at which of a node's addresses NodePorts answer (`nodePortAddresses`): for clients outside, pods, the node's own
//! processes by loopback, and load balancers' health checks.

use std::time::Duration;

use anyhow::{Result, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::pods::{server, shell};

const PATIENCE: Duration = Duration::from_secs(30);
/// Another address of n1, that its object does not name.
const SECOND: &str = "192.168.255.201";

const OBJECTS: &str = r#"---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: LoadBalancer
  loadBalancerClass: example.com/nobody
  externalTrafficPolicy: Local
  healthCheckNodePort: 30081
  selector: {app: web}
  ports: [{port: 80, nodePort: 30080}]
"#;

/// Who gets an answer at a port, of those who ask.
fn answered(cluster: &Cluster, port: u16, own: &str) -> Result<Vec<&'static str>> {
    let ask = |address: &str| format!("timeout 2 busybox wget -q -O - http://{address}:{port}/ 2>&1");
    // A pod's own image has wget by that name.
    let from_pod = |address: &str| cluster.exec("asks", &ask(address).replace("busybox ", ""));
    let mut answered = Vec::new();
    for (who, said) in [
        ("outside", cluster.outside(&ask(own))?),
        ("outside, second", cluster.outside(&ask(SECOND))?),
        ("pod", from_pod(own)?),
        ("pod, second", from_pod(SECOND)?),
        ("node", cluster.node("n1", &ask(own))?),
        ("node, second", cluster.node("n1", &ask(SECOND))?),
        ("node, loopback", cluster.node("n1", &ask("127.0.0.1"))?),
    ] {
        if said.all().contains("pod: web\n") || said.all().contains("localEndpoints") {
            answered.push(who);
        }
    }
    Ok(answered)
}

fn choose(cluster: &Cluster, addresses: &str) -> Result<()> {
    cluster.apply_text(&format!(
        "apiVersion: towpath.dev/v1alpha1\nkind: NetworkConfig\nmetadata: {{name: default}}\nspec: {{nodePortAddresses: {addresses}}}\n"
    ))
}

fn comes_to(cluster: &Cluster, own: &str, what: &str, wanted: &[&str]) -> Result<()> {
    for (port, name) in [(30080, "the NodePort"), (30081, "the health check")] {
        wait(&format!("{what}: {name} to answer {wanted:?}"), PATIENCE, || {
            let answered = answered(cluster, port, own)?;
            ensure!(answered == wanted, "{answered:?} are answered");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn node_ports_answer_at_the_chosen_addresses_and_nowhere_else() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-npaddr", 2, Families::Ipv4)?;
    cluster.apply_text(&(server("web", "n1", "app: web") + &shell("asks", "n2", "") + OBJECTS))?;
    cluster.wait_pod("web")?;
    cluster.wait_pod("asks")?;
    let own = cluster.node_ip("n1")?;
    let added = cluster.node("n1", &format!("ip addr add {SECOND}/24 dev eth0"))?;
    ensure!(added.ok, "{}", added.all());
    let first = ["outside", "pod", "node"];
    let second = ["outside, second", "pod, second", "node, second"];
    let all = [first[0], second[0], first[1], second[1], first[2], second[2], "node, loopback"];
    comes_to(&cluster, &own, "nothing said", &all)?;
    choose(&cluster, "[primary]")?;
    comes_to(&cluster, &own, "primary", &first)?;
    choose(&cluster, &format!("[{SECOND}/32]"))?;
    comes_to(&cluster, &own, "a range", &second)?;
    choose(&cluster, &format!("[\"{own}/32\", 127.0.0.0/8]"))?;
    comes_to(&cluster, &own, "a range and loopback", &[first[0], first[1], first[2], "node, loopback"])?;
    cluster.down()
}
