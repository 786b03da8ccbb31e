//! Services change hands between Towpath and kube-proxy, in both directions, while connections are open and new ones are made: none
//! breaks, and none fails.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::in_charge::{config_says, in_charge, network_config, said_by_nodes};
use towpath_walkthrough::kube_proxy::KubeProxy;
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::{server, shell};

/// Longest an answer may take: the machine may be busy, a connection that was lost does not answer at all.
const ANSWER: Duration = Duration::from_secs(5);
const NODE_PORT: u16 = 30080;
/// So many new connections are opened before the next change; and so many that nobody serves show that nobody does.
const SETTLED: usize = 100;
const TELLING: usize = 300;
const NODES: [&str; 2] = ["n1", "n2"];

const RULES: &str = r#"---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{port: 80, nodePort: 30080}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: to-web}
spec:
  podSelector: {matchLabels: {egress: web}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 80}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: to-others}
spec:
  podSelector: {matchLabels: {egress: other}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: other}}}]}]
"#;

/// Everything that is applied.
fn objects() -> String {
    [
        server("web1", "n1", "app: web"),
        server("web2", "n2", "app: web"),
        shell("to-service", "n2", ""),
        shell("to-n1", "n2", ""),
        shell("to-n2", "n2", ""),
        shell("shell", "n2", ""),
        shell("allowed", "n1", "egress: web"),
        shell("denied", "n1", "egress: other"),
        RULES.to_owned(),
    ]
    .concat()
}

#[derive(Default)]
struct Load {
    over: AtomicBool,
    /// Who is in charge changes: from here on new connections are kept open, too.
    phase: AtomicUsize,
    asked: AtomicUsize,
    opened: AtomicUsize,
}

impl Load {
    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }

    /// Waits until so many more connections have been opened.
    fn opens(&self, count: usize) -> Result<()> {
        let until = self.opened.load(Ordering::Relaxed) + count;
        wait(&format!("{count} new connections"), Duration::from_secs(20), || {
            let opened = self.opened.load(Ordering::Relaxed);
            ensure!(opened >= until, "{opened} of {until}");
            Ok(())
        })
    }
}

/// Keeps connections of every phase open and in use, and opens new ones all the time.
fn talk(load: &Load, to: SocketAddr) -> Result<()> {
    let mut kept: Vec<(usize, Session)> = Vec::new();
    let mut last = usize::MAX;
    while load.goes_on() {
        let phase = load.phase.load(Ordering::Relaxed);
        if phase != last {
            last = phase;
            for _ in 0..6 {
                kept.push((phase, Session::open(to, ANSWER).with_context(|| format!("in phase {phase}"))?));
            }
        }
        for (since, session) in &mut kept {
            load.asked.fetch_add(1, Ordering::Relaxed);
            session.ask(ANSWER).with_context(|| format!("in phase {phase}, over one opened in phase {since}"))?;
        }
        load.opened.fetch_add(1, Ordering::Relaxed);
        let new = Session::open(to, ANSWER).and_then(|mut session| session.ask(ANSWER));
        new.with_context(|| format!("a new connection in phase {phase}"))?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// One connection of a node's own process, in use until `over` is there; what was not answered.
fn node_keeps(cluster: &Cluster, node: &str, to: SocketAddr, over: &str) -> Result<()> {
    let sent = format!("{over}-sent-{:?}", std::thread::current().id()).replace(['(', ')'], "");
    let script = format!(
        "a=$({{ n=0; while [ ! -e {over} ]; do printf 'GET /hostname HTTP/1.1\\r\\nHost: t\\r\\n\\r\\n'; n=$((n+1)); sleep 0.1; \
         done; echo $n > {sent}; sleep 1; }} | nc -w 3 {} {} | grep -c '^HTTP/1.1 200'); echo $(cat {sent}) $a; rm -f {sent}",
        to.ip(),
        to.port()
    );
    let said = cluster.node(node, &script)?;
    let counts: Vec<u64> = said.out.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    match counts.as_slice() {
        [sent, answered] if sent == answered && *sent > 0 => Ok(()),
        _ => bail!("node {node}: sent and answered over one connection: {}", said.all()),
    }
}

fn node_opens(cluster: &Cluster, node: &str, to: SocketAddr, over: &str) -> Result<()> {
    let script = format!(
        "n=0; while [ ! -e {over} ]; do n=$((n+1)); curl -sS -m 5 -o /dev/null http://{to}/ || echo REFUSED $n; sleep 0.02; done; \
         echo TRIED $n"
    );
    let said = cluster.node(node, &script)?;
    ensure!(
        said.out.contains("TRIED") && !said.out.contains("REFUSED"),
        "node {node}, new connections: {}",
        said.all()
    );
    Ok(())
}

/// NetworkPolicy judges the backend, whoever serves the node.
fn policies_hold(cluster: &Cluster, service: SocketAddr, node: &str) -> Result<()> {
    for to in [service.to_string(), format!("{node}:{NODE_PORT}")] {
        let ask = format!("curl -sS -m 3 http://{to}/hostname");
        wait("the policy that allows the backends", Duration::from_secs(10), || {
            let said = cluster.exec("allowed", &ask)?;
            if said.ok { Ok(()) } else { bail!("{to}: {}", said.all()) }
        })?;
        let said = cluster.exec("denied", &ask)?;
        ensure!(!said.ok, "{to} is reached against the policy: {}", said.all());
    }
    Ok(())
}

fn health(cluster: &Cluster) -> Result<String> {
    let ask = "curl -s -m 3 -o /dev/null -w '%{http_code}' http://127.0.0.1:10256/healthz";
    Ok(cluster.node("n1", ask)?.out)
}

/// Everything that changes, in order, while the load goes on.
fn hand_over_and_back(
    cluster: &Cluster,
    kube_proxy: &KubeProxy<'_>,
    load: &Load,
    check: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let next = || load.phase.fetch_add(1, Ordering::Relaxed);
    let settle = || load.opens(SETTLED);
    ensure!(health(cluster)? == "200", "kube-proxy's health is ours to answer");
    settle()?;

    println!("kube-proxy comes, and gets Services once it has settled");
    kube_proxy.arrives()?;
    let took = in_charge(cluster, "serviceProxy", "kube-proxy")?;
    ensure!(took > Duration::from_secs(8), "it was given them after {took:?}, before it can have settled");
    next();
    let before = kube_proxy.served()?;
    settle()?;
    wait("its rules to serve on every node", ANSWER, || {
        let after = kube_proxy.served()?;
        ensure!(before.iter().zip(&after).all(|(b, a)| a > b), "its rules serve nobody: {before:?}, {after:?}");
        Ok(())
    })?;
    ensure!(health(cluster)? == "000", "its ports are its own");
    check()?;

    println!("its pod is rolled, and nothing flips");
    kube_proxy.pod_goes("n1")?;
    for second in 0..5 {
        if second == 2 {
            kube_proxy.pod_comes("n1")?;
        }
        std::thread::sleep(Duration::from_secs(1));
        let now = said_by_nodes(cluster, "serviceProxy")?;
        ensure!(now.iter().all(|who| who == "kube-proxy"), "{now:?} in the middle of a roll");
    }

    println!("serviceProxy: towpath, and kube-proxy goes with its rules");
    cluster.apply_text(&network_config("{serviceProxy: towpath}"))?;
    in_charge(cluster, "serviceProxy", "towpath")?;
    next();
    let before = kube_proxy.served()?;
    load.opens(TELLING)?;
    ensure!(before == kube_proxy.served()?, "kube-proxy's rules still serve");
    config_says(cluster, "Applied", "True", "all 2 nodes")?;
    // What cannot be used is in force nowhere; taken back, it is everywhere, and no agent has started again for it.
    let agents = || NODES.map(|node| machine::lab_agent(cluster.name(), node).ok());
    let before = agents();
    cluster.apply_text(&network_config("{serviceProxy: towpath, clusterCIDRs: [10.96.0.0/16]}"))?;
    config_says(cluster, "Applied", "False", "n1")?;
    cluster.apply_text(&network_config("{serviceProxy: towpath, clusterCIDRs: null}"))?;
    config_says(cluster, "Applied", "True", "all 2 nodes")?;
    ensure!(agents() == before && before.iter().all(Option::is_some), "{before:?}, {:?}", agents());
    config_says(cluster, "ServicesByTowpath", "True", "towpath on 2 nodes")?;
    NODES.iter().try_for_each(|node| kube_proxy.pod_goes(node))?;
    kube_proxy.rules_go()?;
    settle()?;
    check()?;
    wait(
        "kube-proxy's health to be ours",
        ANSWER,
        || if health(cluster)? == "200" { Ok(()) } else { bail!("not 200") },
    )?;

    println!("kube-proxy again, serviceProxy: auto");
    kube_proxy.arrives()?;
    cluster.apply_text(&network_config("{serviceProxy: auto}"))?;
    in_charge(cluster, "serviceProxy", "kube-proxy")?;
    next();
    config_says(cluster, "ServicesByTowpath", "False", "delete daemonset kube-proxy")?;
    settle()?;

    println!("kube-proxy is deleted for good");
    NODES.iter().try_for_each(|node| kube_proxy.pod_goes(node))?;
    let took = in_charge(cluster, "serviceProxy", "towpath")?;
    ensure!(took > Duration::from_secs(25), "Towpath took over after {took:?}, as if no pod were ever rolled");
    next();
    kube_proxy.rules_go()?;
    settle()
}

#[test]
fn services_change_hands_and_no_connection_notices() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-modes", 2, Families::Ipv4)?;
    cluster.apply_text(&objects())?;
    let endpoints = ["web1", "web2"].map(|name| cluster.wait_pod(name).map(|pod| pod.ip));
    let endpoints = endpoints.into_iter().collect::<Result<Vec<_>>>()?;
    // The test's own sockets are in no pod's cgroup, so they are translated at the pod's device. A pod for each address: its kernel
    // does not know that two of them lead to one backend, and may use one source port for both.
    let clients = ["to-service", "to-n1", "to-n2"].map(|name| Place::of_pod(&cluster, &cluster.wait_pod(name)?));
    let clients = clients.into_iter().collect::<Result<Vec<_>>>()?;
    ["allowed", "denied", "shell"].iter().try_for_each(|pod| cluster.wait_pod(pod).map(drop))?;
    let service = SocketAddr::new(address(&field(&cluster.get("svc", "web")?, "/spec/clusterIP"))?, 80);
    let nodes = cluster.nodes()?;
    let ports = nodes.iter().map(|(_, ip)| Ok(SocketAddr::new(address(ip)?, NODE_PORT))).collect::<Result<Vec<_>>>()?;
    let targets: Vec<SocketAddr> = [service].into_iter().chain(ports.iter().copied()).collect();
    let outside = Place::of_node(&cluster, "outside")?;
    wait("the Service to answer", Duration::from_secs(10), || {
        for (client, to) in clients.iter().zip(&targets) {
            client.enter(|| Session::open(*to, ANSWER)?.ask(ANSWER))?;
        }
        outside.enter(|| ports.iter().try_for_each(|port| Session::open(*port, ANSWER)?.ask(ANSWER).map(drop)))
    })?;
    in_charge(&cluster, "serviceProxy", "towpath")?;
    let kube_proxy = KubeProxy::new(&cluster, service, NODE_PORT, &nodes, &endpoints);
    let load = Load::default();
    let over = std::env::temp_dir().join(format!("towpath-e2e-modes-over-{}", std::process::id()));
    let over = over.to_str().context("a temporary directory that is no text")?;
    let first = nodes.first().map(|(_, ip)| ip.clone()).unwrap_or_default();
    let in_pod = format!(
        "n=0; while [ ! -e /tmp/over ]; do n=$((n+1)); timeout 5 wget -q -O /dev/null http://{service}/ || echo REFUSED $n; done; \
         echo TRIED $n"
    );
    let (done, outcomes) = std::thread::scope(|scope| {
        let (load, cluster) = (&load, &cluster);
        let mut threads: Vec<(String, std::thread::ScopedJoinHandle<'_, Result<()>>)> = Vec::new();
        for (client, to) in clients.iter().zip(targets.iter().copied()) {
            threads
                .push((format!("pod {} to {to}", client.name()), scope.spawn(move || client.enter(|| talk(load, to)))));
        }
        if let Some(port) = ports.first().copied() {
            let outside = &outside;
            threads.push((format!("outside to {port}"), scope.spawn(move || outside.enter(|| talk(load, port)))));
        }
        for node in NODES {
            threads.push((format!("{node} opens"), scope.spawn(move || node_opens(cluster, node, service, over))));
        }
        threads.push((
            "a pod's own sockets".to_owned(),
            scope.spawn(|| {
                let said = cluster.exec("shell", &in_pod)?;
                ensure!(said.out.contains("TRIED") && !said.out.contains("REFUSED"), "{}", said.all());
                Ok(())
            }),
        ));
        // Connections of nodes' own processes, made while one is in charge and kept to the end.
        let keeper = scope.spawn(move || {
            std::thread::scope(|inner| {
                let mut kept = Vec::new();
                let mut last = usize::MAX;
                while load.goes_on() {
                    let phase = load.phase.load(Ordering::Relaxed);
                    if phase != last {
                        last = phase;
                        for node in NODES {
                            kept.push(inner.spawn(move || {
                                node_keeps(cluster, node, service, over).with_context(|| format!("since phase {phase}"))
                            }));
                        }
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
                kept.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("panicked"))?)
            })
        });
        threads.push(("nodes keep".to_owned(), keeper));
        let done = hand_over_and_back(cluster, &kube_proxy, load, &|| policies_hold(cluster, service, &first));
        load.over.store(true, Ordering::Relaxed);
        let _ = std::fs::write(over, "");
        let _ = cluster.exec("shell", "touch /tmp/over");
        let join = |(what, thread): (String, std::thread::ScopedJoinHandle<'_, Result<()>>)| {
            (what, thread.join().map_err(|_| anyhow!("panicked")))
        };
        (done, threads.into_iter().map(join).collect::<Vec<_>>())
    });
    let _ = std::fs::remove_file(over);
    let counts = [&load.asked, &load.opened].map(|count| count.load(Ordering::Relaxed));
    println!("asked over open connections, opened: {counts:?}");
    let mut problems: Vec<String> = done.err().map(|error| format!("{error:#}")).into_iter().collect();
    for (what, outcome) in outcomes {
        problems.extend(outcome.and_then(|inner| inner).err().map(|error| format!("{what}: {error:#}")));
    }
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    ensure!(counts.iter().all(|count| *count > 500), "too little was tried: {counts:?}");
    cluster.down()
}
