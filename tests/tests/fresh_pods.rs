//! A pod is known to the policies of other nodes by the time it runs: its first instruction connects to an isolated pod elsewhere,
//! and the first packet is let in. A lost one would be sent again after a second.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::log::{Log, Voice};
use towpath_walkthrough::machine::can_run_labs;

const CLIENTS: usize = 12;
/// What a first packet that was dropped would cost at least, in milliseconds (RFC 6298: the initial timeout).
const RETRANSMITTED: u64 = 1000;

const SERVER: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  nodeName: n1
  containers: [{name: web, image: nginx, ports: [{containerPort: 80}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends-only}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
    - from: [{podSelector: {matchLabels: {app: friend}}}]
"#;

/// Says how many milliseconds its first connection took, before anything else.
fn client(name: &str, label: &str, node: &str, target: &str) -> String {
    format!(
        r#"---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {label}}}}}
spec:
  nodeName: {node}
  containers:
    - name: client
      image: busybox
      command: [sh, -c, "read a _ < /proc/uptime; if /bin/nc -z -w 3 {target} 80; then got=CONNECTED; else got=REFUSED; fi; read b _ < /proc/uptime; echo $got $a $b; sleep 86400"]
"#
    )
}

/// The first line that the pod wrote: what came of it, and how long it took in milliseconds.
fn first_connection(cluster: &Cluster, name: &str) -> Result<(String, u64)> {
    let log = Log::new(Voice::Plain);
    let line = wait("the pod to say how its first connection went", Duration::from_secs(15), || {
        let text = cluster.kubectl(&log, &["logs", name])?;
        text.lines().next().map(str::to_owned).context("it has said nothing yet")
    })?;
    let words: Vec<&str> = line.split(' ').collect();
    let [got, begun, ended] = words.as_slice() else { anyhow::bail!("{name} said {line:?}") };
    let took = ended.parse::<f64>()? - begun.parse::<f64>()?;
    Ok(((*got).to_owned(), (took * 1000.0) as u64))
}

#[test]
fn a_new_pods_first_packet_is_let_in_by_another_nodes_policy() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-fresh", 3, Families::Ipv4)?;
    cluster.apply_text(SERVER)?;
    let target = cluster.wait_pod("web")?.ip;
    let names: Vec<String> = (0..CLIENTS).map(|n| format!("friend-{n}")).collect();
    let nodes = ["n2", "n3"];
    let friends: String =
        names.iter().zip(nodes.iter().cycle()).map(|(name, node)| client(name, "friend", node, &target)).collect();
    cluster.apply_text(&format!("{friends}{}", client("stranger", "stranger", "n2", &target)))?;
    for name in &names {
        let (got, took) = first_connection(&cluster, name)?;
        ensure!(got == "CONNECTED" && took < RETRANSMITTED, "{name}: {got} after {took} ms");
    }
    let (got, _) = first_connection(&cluster, "stranger")?;
    ensure!(got == "REFUSED", "the policy is not in force: the stranger {got}");
    cluster.down()
}
