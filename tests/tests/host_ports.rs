//! A pod's host port: from outside, from its node (loopback too), from pods of its own and of another node; gone with the pod.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::pods::{server_with_host_port, shell};

/// The pods.
fn pods() -> String {
    [
        server_with_host_port("web", "n1", "hostPort: 8088"),
        server_with_host_port("private", "n1", "hostPort: 8089, hostIP: 127.0.0.1"),
        shell("near", "n1", ""),
        shell("far", "n2", ""),
    ]
    .concat()
}

const PATIENCE: Duration = Duration::from_secs(10);

fn says(output: &str, pod: &str) -> Result<()> {
    if output.contains(&format!("pod: {pod}\n")) { Ok(()) } else { bail!("not {pod}: {output}") }
}

#[test]
fn a_host_port_answers_everywhere_it_should_and_nowhere_else() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-hostport", 2, Families::Ipv4)?;
    cluster.apply_text(&pods())?;
    for pod in ["web", "private", "near", "far"] {
        cluster.wait_pod(pod)?;
    }
    let nodes = cluster.nodes()?;
    let at = |name: &str| nodes.iter().find(|(node, _)| node == name).map(|(_, ip)| ip.clone()).unwrap_or_default();
    let (n1, n2) = (at("n1"), at("n2"));
    let curl = |host: &str, port: u16| format!("curl -sS -m 4 http://{host}:{port}/");
    let to_n1 = curl(&n1, 8088);

    wait("the host port from outside", PATIENCE, || says(&cluster.outside(&to_n1)?.all(), "web"))?;
    wait("from its node", PATIENCE, || says(&cluster.node("n1", &to_n1)?.all(), "web"))?;
    wait("on its node's loopback", PATIENCE, || says(&cluster.node("n1", &curl("127.0.0.1", 8088))?.all(), "web"))?;
    wait("from another node", PATIENCE, || says(&cluster.node("n2", &to_n1)?.all(), "web"))?;
    for pod in ["near", "far", "web"] {
        wait(&format!("from pod {pod}"), PATIENCE, || says(&cluster.exec(pod, &to_n1)?.all(), "web"))?;
    }
    wait("the one on loopback only", PATIENCE, || {
        says(&cluster.node("n1", &curl("127.0.0.1", 8089))?.all(), "private")
    })?;

    for (what, said) in [
        ("the loopback one at the node's address", cluster.outside(&curl(&n1, 8089))?),
        ("the loopback one from a pod's own loopback", cluster.exec("near", &curl("127.0.0.1", 8089))?),
        ("at another node's address", cluster.outside(&curl(&n2, 8088))?),
        ("at another node's loopback", cluster.node("n2", &curl("127.0.0.1", 8088))?),
    ] {
        ensure!(!said.all().contains("pod: "), "{what}: {}", said.all());
    }

    let counted = towpath_walkthrough::in_charge::said_by_nodes(&cluster, "hostPorts")?;
    ensure!(counted == ["2", "0"], "host ports in status: {counted:?}");

    let log = towpath_walkthrough::log::Log::new(towpath_walkthrough::log::Voice::Plain);
    cluster.kubectl(&log, &["delete", "pod", "web"])?;
    wait("its end", PATIENCE, || {
        let said = cluster.outside(&to_n1)?;
        if said.all().contains("pod: ") { bail!("it still answers") } else { Ok(()) }
    })?;
    cluster.down()
}
