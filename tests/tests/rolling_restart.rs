//! A Service of twenty endpoints is restarted pod by pod, as a Deployment does it, while 500 connections a second come from pods, nodes and
//! outside, under both policies of external traffic: none is refused.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, anyhow, bail, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::load::Load;
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::shell;
use towpath_walkthrough::udp::Joined;

const ANSWER: Duration = Duration::from_secs(5);
const ROLLED: Duration = Duration::from_secs(90);
/// Ten endpoints on each of two nodes.
const EACH: usize = 10;

const SERVICES: &str = r"---
apiVersion: v1
kind: Service
metadata: {name: cluster}
spec:
  type: NodePort
  selector: {app: rolls}
  ports: [{port: 80, nodePort: 30080}]
---
apiVersion: v1
kind: Service
metadata: {name: local}
spec:
  type: NodePort
  externalTrafficPolicy: Local
  selector: {app: rolls}
  ports: [{port: 80, nodePort: 30081}]
";

/// Pods that say when they are ready, and go on serving for a second after they were told to end, as those do whose owners have read of
/// endpoints that propagate.
fn deployment(node: &str, revision: u32) -> String {
    format!(
        "---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: rolls-{node}}}\nspec:\n  replicas: {EACH}\n  \
         strategy: {{rollingUpdate: {{maxSurge: 3, maxUnavailable: 0}}}}\n  \
         selector: {{matchLabels: {{app: rolls, at: {node}}}}}\n  template:\n    \
         metadata: {{labels: {{app: rolls, at: {node}}}, annotations: {{example.com/revision: \"{revision}\"}}}}\n    spec:\n      \
         nodeSelector: {{kubernetes.io/hostname: {node}}}\n      terminationGracePeriodSeconds: 10\n      containers:\n      \
         - name: web\n        image: nginx\n        ports: [{{containerPort: 80}}]\n        \
         readinessProbe: {{httpGet: {{path: /healthz, port: 80}}, periodSeconds: 1}}\n        \
         lifecycle: {{preStop: {{sleep: {{seconds: 1}}}}}}\n"
    )
}

fn deployments(revision: u32) -> String {
    ["n1", "n2"].map(|node| deployment(node, revision)).concat()
}

fn names(cluster: &Cluster) -> Result<Vec<String>> {
    let pods = cluster.list("pods", "app=rolls")?;
    Ok(pods.iter().map(|pod| field(pod, "/metadata/name")).collect())
}

/// Every pod of before is gone, and as many are ready.
fn wait_rolled(cluster: &Cluster, before: &[String]) -> Result<()> {
    wait("the last pod to be replaced", ROLLED, || {
        let now = names(cluster)?;
        let left = now.iter().filter(|name| before.contains(name)).count();
        let ready = |node: &str| {
            let status = cluster.get("deployment", &format!("rolls-{node}"))?;
            Ok::<_, anyhow::Error>(field(&status, "/status/availableReplicas") == EACH.to_string())
        };
        if left > 0 || now.len() != 2 * EACH || !ready("n1")? || !ready("n2")? {
            bail!("{left} of before are left, {} pods in all", now.len());
        }
        Ok(())
    })
}

/// Who asks whom, how often a second.
struct Stream {
    what: &'static str,
    from: Place,
    to: Vec<SocketAddr>,
    rate: u32,
}

/// A place that is translated at a device asks by one address only: two that lead to one endpoint may meet at one port there.
fn streams(cluster: &Cluster) -> Result<Vec<Stream>> {
    let nodes = cluster.nodes()?;
    let at = |node: &str, port: u16| {
        let ip = nodes.iter().find(|(name, _)| name == node).map(|(_, ip)| ip.as_str());
        Ok::<_, anyhow::Error>(SocketAddr::new(address(ip.unwrap_or_default())?, port))
    };
    let vip = SocketAddr::new(address(&field(&cluster.get("svc", "cluster")?, "/spec/clusterIP"))?, 80);
    let pod = |name: &str| Place::of_pod(cluster, &cluster.wait_pod(name)?);
    let host = |name: &str| Place::of_node(cluster, name);
    let stream = |what, from, to, rate| Stream { what, from, to, rate };
    Ok(vec![
        stream("a pod's socket", pod("hooked")?, vec![vip, at("n1", 30080)?, at("n1", 30081)?, at("n2", 30080)?], 80),
        stream("a pod's socket to the other node's local ones", pod("across")?, vec![at("n2", 30081)?], 40),
        stream("a pod's device", pod("plain")?, vec![vip], 70),
        stream("a pod's device to the node's local ones", pod("beside")?, vec![at("n2", 30081)?], 40),
        stream("a node's socket", host("n1")?, vec![vip, at("n1", 30080)?, at("n1", 30081)?], 70),
        stream("outside, all endpoints", host("outside")?, vec![at("n1", 30080)?], 80),
        stream("outside, local endpoints", host("outside2")?, vec![at("n1", 30081)?, at("n2", 30081)?], 120),
    ])
}

#[test]
fn a_rolling_restart_refuses_nobody() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-rolls", 2, Families::Ipv4)?;
    // Those on n1 are translated in the socket, those on n2, where this process is in no cgroup of the node's, at the device.
    let clients = [("hooked", "n1"), ("across", "n1"), ("plain", "n2"), ("beside", "n2")];
    let clients: String = clients.iter().map(|(name, node)| shell(name, node, "")).collect();
    cluster.apply_text(&(clients + &deployments(1) + SERVICES))?;
    wait_rolled(&cluster, &[])?;
    let before = names(&cluster)?;
    let joined = Joined::node(&cluster, "n1")?;
    let streams = streams(&cluster)?;
    wait("all addresses to answer", Duration::from_secs(20), || {
        streams.iter().try_for_each(|stream| {
            let ask = |to: &SocketAddr| Session::open(*to, ANSWER)?.ask(ANSWER).map(drop);
            stream.from.enter(|| stream.to.iter().try_for_each(ask))
        })
    })?;
    let load = Load::default();
    let rolled = std::thread::scope(|scope| {
        let load = &load;
        let threads: Vec<_> = streams
            .iter()
            .map(|stream| {
                scope.spawn(move || {
                    stream.from.enter(|| {
                        load.open(stream.what, &stream.to, stream.rate);
                        Ok(())
                    })
                })
            })
            .collect();
        let rolled = cluster.apply_text(&deployments(2)).and_then(|()| wait_rolled(&cluster, &before));
        load.ends();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)?;
        rolled
    });
    drop(joined);
    rolled?;
    load.judge(1500, 0)?;
    let answers = load.answers();
    let (old, new): (Vec<_>, Vec<_>) = answers.keys().partition(|pod| before.contains(pod));
    ensure!(old.len() == 2 * EACH && new.len() == 2 * EACH, "some were asked by nobody: {answers:?}");
    cluster.down()
}
