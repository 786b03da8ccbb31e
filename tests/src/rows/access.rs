//! NetworkPolicy, and the table of who reaches whom.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::{Hope, fetch, fetch_from_host, ping};
use crate::cluster::{Cluster, Driver, field, host, wait};
use crate::log::Log;
use crate::place::{Place, Session, address};

const PLAIN: &str = "busybox";
const LABELLED: &str = "busybox-xx";

/// An HTTP server on a host outside, for as long as this is held.
struct Listener(Arc<AtomicBool>, Option<JoinHandle<()>>);

impl Listener {
    fn at(place: &Place, port: u16) -> Result<Self> {
        let socket = place.enter(|| TcpListener::bind(("0.0.0.0", port)).with_context(|| format!("port {port}")))?;
        socket.set_nonblocking(true)?;
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let serve = move || {
            while !ended.load(Ordering::Relaxed) {
                match socket.accept() {
                    Ok((mut stream, _)) => {
                        let _who_asks_may_be_gone = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok");
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        };
        Ok(Self(over, Some(std::thread::spawn(serve))))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        let _ended = self.1.take().map(JoinHandle::join);
    }
}

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
    let said = cluster.exec(client, &Hope::of(expected).fetch(&format!("http://{server}/")))?;
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
    let said = cluster.exec(client, &Hope::of(expected).ping(ip))?;
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
    let by_node = |hope: Hope, port: u16| hope.fetch_from_host(&format!("http://{}:{port}/", host(&node)));
    for port in [31080, 31234] {
        let outcome = wait("the block is admitted", Duration::from_secs(5), || {
            let said = cluster.outside(&by_node(Hope::of(four), port))?;
            if said.ok == four { Ok(()) } else { bail!("{}", said.all()) }
        });
        let word = if four { "reaches" } else { "(IPv6: not in the IPv4 block) does not reach" };
        log.check(format!("a host in the block {word} port {port}"), outcome.map_err(|e| format!("{e:#}")));
    }
    if four {
        let said = cluster.outside_from("203.0.113.10", &by_node(Hope::Silence, 31080))?;
        log.expect("a host that is not in the block does not", !said.ok, said.all());
    }
    if four {
        let outside = Place::of_node(cluster, "outside")?;
        let _listeners = [Listener::at(&outside, 80)?, Listener::at(&outside, 81)?];
        let outcome = wait("port 80 of the block", Duration::from_secs(3), || {
            let said = cluster.exec("nginx", "curl -sS -m 1 http://192.168.26.10:80/")?;
            if said.ok { Ok(()) } else { bail!("{}", said.all()) }
        });
        log.check("the pod reaches port 80 of the block", outcome.map_err(|e| format!("{e:#}")));
        let said = cluster.exec("nginx", "curl -sS -m 2 http://192.168.26.10:81/")?;
        log.expect("but no other port of it", !said.ok && said.err.contains("timed out"), said.all());
    }
    let echo = cluster.wait_pod("echo")?;
    let said = cluster.exec("nginx", &format!("curl -sS -m 2 http://{}/", host(&echo.ip)))?;
    log.expect("nor any other pod", !said.ok, said.all());
    let said = cluster.exec("nginx", "timeout 2 nslookup httpd-svc.default.svc.cluster.local")?;
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
    let said = cluster.exec("near", &Hope::Silence.fetch(&url))?;
    log.expect("nor does a pod on another node", !said.ok, said.all());
    let said = cluster.node("n2", &fetch_from_host(&url))?;
    log.expect("its own node does (probes)", said.ok, said.all());
    let said = cluster.node("n1", &Hope::Silence.fetch_from_host(&url))?;
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
    let server = servers(cluster)?.into_iter().next().map(|(_, ip)| ip).context("no server")?;
    let (at, place) = (SocketAddr::new(address(&server)?, 80), Place::of_pod(cluster, &cluster.wait_pod(PLAIN)?)?);
    let closed = place.enter(|| Ok(Session::open(at, Duration::from_millis(300)).is_err()))?;
    log.expect("until then it is not", closed, "nginx answers busybox");
    // How long that takes is measured where it happens: a command that asks takes longer to start.
    let seconds = std::thread::scope(|scope| -> Result<f64> {
        let opens = scope.spawn(|| {
            place.enter(|| {
                wait("nginx", Duration::from_secs(10), || Session::open(at, Duration::from_millis(100)))?;
                Ok(Instant::now())
            })
        });
        cluster.kubectl(log, &["delete", "networkpolicy", "test-network-policy"])?;
        let deleted = Instant::now();
        let opened = opens.join().map_err(|_| anyhow!("the thread that asks panicked"))??;
        Ok(opened.saturating_duration_since(deleted).as_secs_f64())
    })?;
    log.expect(format!("reachable {seconds:.2} s after the deletion"), seconds < 1.0, format!("{seconds:.2} s"));
    cluster.kubectl(log, &["delete", "networkpolicy", "-n", "closed", "default-deny"])?;
    settled(cluster, PLAIN, "http://nginx/", true)?;
    for reach in reachability(cluster)? {
        log.expect(format!("{} → {}", reach.from, reach.to), reach.works, "does not work");
    }
    cluster.kubectl(log, &["delete", "namespace", "closed", "--wait=false"])?;
    Ok(())
}
