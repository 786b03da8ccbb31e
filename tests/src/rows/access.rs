//! NetworkPolicy, and the table of who reaches whom.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{fetch, fetch_from_host, ping};
use crate::cluster::{Cluster, Driver, field, host, wait};
use crate::log::Log;

const PLAIN: &str = "busybox";
const LABELLED: &str = "busybox-xx";

/// One line of the reachability table.
#[derive(Clone, Debug)]
pub struct Reach {
    /// Who asks.
    pub from: String,
    /// Whom, and how.
    pub to: String,
    /// Whether it worked.
    pub works: bool,
}

fn servers(cluster: &Cluster) -> Result<[(String, String); 2]> {
    Ok([("nginx".to_owned(), cluster.wait_pod("nginx")?.ip), ("nginx2".to_owned(), cluster.wait_pod("nginx2")?.ip)])
}

/// Who reaches the two servers: pods without and with the label, and a host outside through the NodePorts.
///
/// # Errors
/// A pod or Service that the earlier rows made is not there.
pub fn reachability(cluster: &Cluster) -> Result<Vec<Reach>> {
    let mut table = Vec::new();
    for (name, ip) in servers(cluster)? {
        for client in [PLAIN, LABELLED] {
            let works = cluster.exec(client, &fetch(&format!("http://{name}/")))?.ok;
            table.push(Reach { from: client.to_owned(), to: format!("{name} TCP 80"), works });
            let works = cluster.exec(client, &ping(&ip))?.ok;
            table.push(Reach { from: client.to_owned(), to: format!("{name} ping"), works });
        }
        let port = field(&cluster.get("svc", &name)?, "/spec/ports/0/nodePort");
        let (_, node) = cluster.nodes()?.into_iter().next().context("no node")?;
        let works = cluster.outside(&fetch_from_host(&format!("http://{}:{port}/", host(&node))))?.ok;
        table.push(Reach { from: "outside".to_owned(), to: format!("{name} NodePort"), works });
    }
    Ok(table)
}

fn wget(cluster: &Cluster, log: &mut Log, client: &str, server: &str, expected: bool) -> Result<()> {
    let said = cluster.exec(client, &fetch(&format!("http://{server}/")))?;
    let word = if expected { "works" } else { "does not" };
    log.expect(format!("wget {server} from {client} {word}"), said.ok == expected, said.all());
    Ok(())
}

fn pinged(
    cluster: &Cluster,
    log: &mut Log,
    client: &str,
    (server, ip): &(String, String),
    expected: bool,
) -> Result<()> {
    let said = cluster.exec(client, &ping(ip))?;
    let word = if expected { "works" } else { "does not" };
    log.expect(format!("ping {server} ({ip}) from {client} {word}"), said.ok == expected, said.all());
    Ok(())
}

/// Waits until a policy shows: `client` no longer (or again) reaches `server`.
fn settled(cluster: &Cluster, client: &str, url: &str, expected: bool) -> Result<Duration> {
    let started = Instant::now();
    let probe = format!("timeout 1 wget -q -O - {url}");
    wait(&format!("{client} → {url} {expected}"), Duration::from_secs(5), || {
        let said = cluster.exec(client, &probe)?;
        if said.ok == expected { Ok(started.elapsed()) } else { bail!("{}", said.all()) }
    })
}

pub(super) fn w7(cluster: &Cluster, log: &mut Log) -> Result<()> {
    cluster.apply(log, "w07-nginx.yaml")?;
    let servers = servers(cluster)?;
    for (name, _) in &servers {
        cluster.kubectl(log, &["expose", "pod", name, "--port=80", "--type=NodePort"])?;
    }
    for (name, labels) in [(PLAIN, "run=busybox"), (LABELLED, "run=busybox,xx=xx")] {
        let labels = format!("--labels={labels}");
        cluster.kubectl(log, &["run", name, "--image=busybox", &labels, "--restart=Never", "--", "sleep", "86400"])?;
        cluster.wait_pod(name)?;
    }
    for (name, _) in &servers {
        let outcome = wait(name, Duration::from_secs(5), || {
            let said = cluster.exec(PLAIN, &fetch(&format!("http://{name}/")))?;
            if said.ok { Ok(()) } else { bail!("{}", said.all()) }
        });
        log.check(format!("wget {name} from {PLAIN} works"), outcome.map_err(|e| format!("{e:#}")));
    }
    for server in &servers {
        pinged(cluster, log, PLAIN, server, true)?;
    }
    if cluster.driver() == Driver::Kubectl {
        let script = "wget -q -O - http://nginx/; wget -q -O - http://nginx2/";
        let args = ["run", "visitor", "--rm", "-i", "--image=busybox", "--restart=Never", "--", "sh", "-c", script];
        let out = cluster.kubectl(log, &args)?;
        log.expect("the same in `kubectl run --rm -i`", out.contains("nginx") && out.contains("nginx2"), out);
    }
    Ok(())
}

pub(super) fn w8(cluster: &Cluster, log: &mut Log) -> Result<()> {
    let servers = servers(cluster)?;
    cluster.apply(log, "w08-policy.yaml")?;
    let took = settled(cluster, PLAIN, "http://nginx/", false)?;
    log.say(&format!("the policy shows after {:.2} s (its probe alone waits 1 s)", took.as_secs_f64()));
    wget(cluster, log, PLAIN, "nginx", false)?;
    pinged(cluster, log, PLAIN, &servers[0], false)?;
    wget(cluster, log, PLAIN, "nginx2", true)
}

pub(super) fn w9(cluster: &Cluster, log: &mut Log) -> Result<()> {
    let servers = servers(cluster)?;
    wget(cluster, log, LABELLED, "nginx", true)?;
    pinged(cluster, log, LABELLED, &servers[0], false)?;
    wget(cluster, log, LABELLED, "nginx2", true)
}

pub(super) fn w10(cluster: &Cluster, log: &mut Log) -> Result<()> {
    cluster.apply(log, "w10-services.yaml")?;
    cluster.apply(log, "w10-policy.yaml")?;
    let (_, node) = cluster.nodes()?.into_iter().next().context("no node")?;
    let four = !node.contains(':');
    // One host outside has an address in the block, the other has not.
    let by_node = |port: u16| format!("curl -sS -m 4 http://{}:{port}/", host(&node));
    for port in [31080, 31234] {
        let outcome = wait("the block is admitted", Duration::from_secs(5), || {
            let said = cluster.outside(&by_node(port))?;
            if said.ok == four { Ok(()) } else { bail!("{}", said.all()) }
        });
        let word = if four { "reaches" } else { "(IPv6: not in the IPv4 block) does not reach" };
        log.check(format!("a host in the block {word} port {port}"), outcome.map_err(|e| format!("{e:#}")));
    }
    if four {
        let said = cluster.outside_from("203.0.113.10", &by_node(31080))?;
        log.expect("a host that is not in the block does not", !said.ok, said.all());
    }
    let listen = |port: u16| format!("busybox httpd -f -p {port} -h /etc & pid=$!; sleep 6; kill $pid");
    std::thread::scope(|scope| -> Result<()> {
        let listeners = [80, 81].map(|port| scope.spawn(move || cluster.outside(&listen(port))));
        if four {
            let outcome = wait("port 80 of the block", Duration::from_secs(3), || {
                let said = cluster.exec("nginx", "curl -sS -m 1 http://192.168.26.10:80/hostname")?;
                if said.ok { Ok(()) } else { bail!("{}", said.all()) }
            });
            log.check("the pod reaches port 80 of the block", outcome.map_err(|e| format!("{e:#}")));
            let said = cluster.exec("nginx", "curl -sS -m 2 http://192.168.26.10:81/hostname")?;
            log.expect("but no other port of it", !said.ok && said.err.contains("timed out"), said.all());
        }
        for listener in listeners {
            let _ = listener.join();
        }
        Ok(())
    })?;
    let echo = cluster.wait_pod("echo")?;
    let said = cluster.exec("nginx", &format!("curl -sS -m 2 http://{}/", host(&echo.ip)))?;
    log.expect("nor any other pod", !said.ok, said.all());
    let said = cluster.exec("nginx", "timeout 3 nslookup httpd-svc.default.svc.cluster.local")?;
    log.expect("and it cannot resolve names: nothing allowed DNS", !said.ok, said.all());
    wget(cluster, log, LABELLED, "nginx", true)
}

pub(super) fn w11(cluster: &Cluster, log: &mut Log) -> Result<()> {
    cluster.kubectl(log, &["create", "namespace", "closed"])?;
    let pod = r#"{"spec":{"nodeName":"n2"}}"#;
    let overrides = format!("--overrides={pod}");
    cluster.kubectl(log, &["run", "inside", "-n", "closed", "--image=nginx", "--port=80", &overrides])?;
    let inside = wait("pod inside", Duration::from_secs(30), || {
        let pod = cluster.get("pod/inside", "--namespace=closed")?;
        let ready = pod
            .pointer("/status/conditions")
            .and_then(|c| c.as_array())
            .is_some_and(|all| all.iter().any(|c| field(c, "/type") == "Ready" && field(c, "/status") == "True"));
        if ready { Ok(field(&pod, "/status/podIP")) } else { bail!("{}", field(&pod, "/status/phase")) }
    })?;
    let url = format!("http://{}/", host(&inside));
    settled(cluster, "far", &url, true)?;
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/w11-default-deny.yaml");
    cluster.kubectl(log, &["apply", "-n", "closed", "-f", &file.to_string_lossy()])?;
    let outcome = settled(cluster, "far", &url, false).map(|_| ());
    log.check("a pod on the same node no longer reaches it", outcome.map_err(|e| format!("{e:#}")));
    let said = cluster.exec("near", &fetch(&url))?;
    log.expect("nor does a pod on another node", !said.ok, said.all());
    let said = cluster.node("n2", &fetch_from_host(&url))?;
    log.expect("its own node does (probes)", said.ok, said.all());
    let said = cluster.node("n1", &fetch_from_host(&url))?;
    log.expect("another node does not", !said.ok, said.all());
    let echo = cluster.wait_pod("echo")?;
    let reach_out = fetch(&format!("http://{}/", host(&echo.ip)));
    let out = cluster.try_kubectl(&["exec", "-n", "closed", "inside", "--", "sh", "-c", &reach_out])?;
    let said = crate::cluster::Said::from(out);
    log.expect("it still reaches out", said.ok, said.all());
    let said = cluster.exec("far", &fetch(&format!("http://{}/", host(&echo.ip))))?;
    log.expect("other namespaces are not touched", said.ok, said.all());
    Ok(())
}

pub(super) fn w12(cluster: &Cluster, log: &mut Log) -> Result<()> {
    cluster.kubectl(log, &["delete", "networkpolicy", "test-network-policy"])?;
    let deleted = Instant::now();
    cluster.kubectl(log, &["delete", "networkpolicy", "-n", "closed", "default-deny"])?;
    settled(cluster, PLAIN, "http://nginx/", true)?;
    let seconds = deleted.elapsed().as_secs_f64();
    log.expect(format!("reachable {seconds:.2} s after the deletion"), seconds < 1.5, format!("{seconds:.2} s"));
    for reach in reachability(cluster)? {
        log.expect(format!("{} → {}", reach.from, reach.to), reach.works, "does not work");
    }
    cluster.kubectl(log, &["delete", "namespace", "closed", "--wait=false"])?;
    Ok(())
}
