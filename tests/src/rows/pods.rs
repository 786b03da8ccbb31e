//! Pods and what a person asks about them.

use anyhow::Result;

use super::{fetch, ping};
use crate::cluster::{Cluster, Driver, Pod, host};
use crate::log::Log;

/// By its path: Debian's busybox shell prefers its own applet, which knows no UDP.
const NC: &str = "/bin/nc";

pub(super) fn w1(cluster: &Cluster, log: &mut Log) -> Result<()> {
    cluster.apply(log, "w01-two-containers.yaml")?;
    let pods = cluster.wait_ready("app=pair", 2)?;
    for pod in &pods {
        let said = cluster.exec_in(&pod.name, "side", &fetch("http://localhost:8080"))?;
        log.expect(
            format!("the second container of {} reaches the first on localhost:8080", pod.name),
            said.ok && said.out.contains(&pod.name),
            said.all(),
        );
        let script = "ip -o addr show dev eth0 | grep -o 'inet6\\? [^ ]*' | grep -v fe80";
        let web = cluster.exec_in(&pod.name, "web", script)?;
        let side = cluster.exec_in(&pod.name, "side", script)?;
        log.expect(
            format!("both containers of {} have its address {}", pod.name, pod.ip),
            web.out == side.out && web.out.contains(&format!("{}/", pod.ip)),
            format!("web: {}side: {}", web.all(), side.all()),
        );
    }
    let nodes: Vec<&str> = pods.iter().map(|p| p.node.as_str()).collect();
    log.expect(
        "both pods listen on 8080 on the same node without conflict",
        nodes == ["n1", "n1"],
        format!("{nodes:?}"),
    );
    cluster.kubectl(log, &["delete", "pod", "pair-a", "pair-b", "--wait=false"])?;
    Ok(())
}

pub(super) fn w2(cluster: &Cluster, log: &mut Log) -> Result<()> {
    cluster.apply(log, "w02-echo.yaml")?;
    let server = cluster.wait_pod("echo")?;
    for name in ["near", "far"] {
        let client = cluster.wait_pod(name)?;
        let place = if client.node == server.node { "on the same node" } else { "on another node" };
        let said = cluster.exec(name, &ping(&server.ip))?;
        log.expect(format!("ping {place}"), said.ok, said.all());
        let said = cluster.exec(name, &fetch(&format!("http://{}/", host(&server.ip))))?;
        log.expect(format!("HTTP {place}"), said.ok && said.out.contains("echo"), said.all());
        log.expect(
            format!("the server sees the client's own address {}", client.ip),
            said.out.contains(&client.ip),
            said.all(),
        );
        let said = cluster.exec(name, &format!("echo hello-{name} | timeout 3 {NC} -u -w 1 {} 9000", server.ip))?;
        log.expect(format!("UDP echo {place}"), said.out.contains(&format!("hello-{name}")), said.all());
    }
    for (node, _) in cluster.nodes()? {
        let said = cluster.node(&node, &ping(&server.ip))?;
        log.expect(format!("ping from node {node}"), said.ok, said.all());
    }
    Ok(())
}

pub(super) fn w19(cluster: &Cluster, log: &mut Log) -> Result<()> {
    let server = cluster.wait_pod("echo")?;
    if cluster.driver() == Driver::Kubectl {
        tables_and_logs(cluster, log, &server)?;
    } else {
        log.say("tables, describe and logs are kubectl's: left out here");
    }
    for command in ["nslookup kubernetes.default.svc.cluster.local", "curl -sS -m 4 http://httpd-svc:8080/"] {
        log.command(&format!("kubectl exec near -- {command}"));
        let said = cluster.exec("near", command)?;
        log.expect(format!("exec -- {command}"), said.ok, said.all());
    }
    let said = cluster.exec("near", "exit 7")?;
    log.expect("exec reports the command's exit code", !said.ok && said.err.contains('7'), said.all());
    Ok(())
}

fn tables_and_logs(cluster: &Cluster, log: &mut Log, server: &Pod) -> Result<()> {
    let out = cluster.kubectl(log, &["get", "pods", "-o", "wide"])?;
    log.expect(
        "get pods -o wide shows address and node",
        out.contains("NODE")
            && out.lines().any(|l| l.starts_with("echo ") && l.contains(&server.ip) && l.contains("n1")),
        out,
    );
    let out = cluster.kubectl(log, &["describe", "pod", "echo"])?;
    log.expect(
        "describe pod shows state and events",
        ["Events:", "Started", "Running", &server.ip].iter().all(|w| out.contains(*w)),
        out,
    );
    let out = cluster.kubectl(log, &["get", "svc", "httpd-svc", "-o", "yaml"])?;
    log.expect(
        "get svc -o yaml shows ports and address",
        out.contains("nodePort: 30000") && out.contains("clusterIP:"),
        out,
    );
    cluster.exec("near", &fetch(&format!("http://{}/w19-was-here", host(&server.ip))))?;
    let out = cluster.kubectl(log, &["logs", "echo"])?;
    log.expect("logs show the server's requests", out.contains("w19-was-here"), out);
    Ok(())
}
