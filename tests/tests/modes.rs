//! Services and cluster DNS change hands between Towpath and who else is there, in both directions, while connections are open and
//! new ones are made: none breaks, none fails, no question is without an answer.
//!
//! kube-proxy is stood in for by its pods, which the agents go by, and by the rules that it leaves on a node (its mode `nftables`).

use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, Session, address};

/// Longest an answer may take: the machine may be busy, a connection that was lost does not answer at all.
const ANSWER: Duration = Duration::from_secs(5);
const NODE_PORT: u16 = 30080;
const NODES: [&str; 2] = ["n1", "n2"];

const OBJECTS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: web1, labels: {app: web}}
spec:
  nodeName: n1
  containers: [{name: web, image: nginx, ports: [{containerPort: 80}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: web2, labels: {app: web}}
spec:
  nodeName: n2
  containers: [{name: web, image: nginx, ports: [{containerPort: 80}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: to-service}
spec:
  nodeName: n2
  containers: [{name: shell, image: busybox, command: [sleep, "86400"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: to-n1}
spec:
  nodeName: n2
  containers: [{name: shell, image: busybox, command: [sleep, "86400"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: to-n2}
spec:
  nodeName: n2
  containers: [{name: shell, image: busybox, command: [sleep, "86400"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: shell}
spec:
  nodeName: n2
  containers: [{name: shell, image: busybox, command: [sleep, "86400"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: allowed, labels: {egress: web}}
spec:
  nodeName: n1
  containers: [{name: shell, image: busybox, command: [sleep, "86400"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: denied, labels: {egress: other}}
spec:
  nodeName: n1
  containers: [{name: shell, image: busybox, command: [sleep, "86400"]}]
---
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

const KUBE_PROXY: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: kube-proxy-NODE, namespace: kube-system, labels: {k8s-app: kube-proxy}}
spec:
  nodeName: NODE
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  containers: [{name: stand-in, image: busybox, command: [sleep, "86400"]}]
"#;

fn network_config(spec: &str) -> String {
    format!("apiVersion: towpath.dev/v1alpha1\nkind: NetworkConfig\nmetadata: {{name: default}}\nspec: {spec}\n")
}

fn places(cluster: &Cluster, field_name: &str) -> Result<Vec<String>> {
    let output =
        Command::new(cluster.towpath()).args(["status", "--lab", cluster.name(), "-o", "json"]).output()?.stdout;
    let answers: Vec<Value> = serde_json::from_slice(&output).context("towpath status -o json")?;
    Ok(answers.iter().map(|answer| field(answer, &format!("/status/{field_name}"))).collect())
}

/// Waits until every node says that `who` is in charge; how long that took.
fn in_charge(cluster: &Cluster, field_name: &str, who: &str) -> Result<Duration> {
    let begun = Instant::now();
    wait(&format!("{who} to be in charge"), Duration::from_secs(60), || {
        let now = places(cluster, field_name)?;
        if now.iter().all(|is| is == who) { Ok(()) } else { bail!("{field_name}: {now:?}") }
    })?;
    Ok(begun.elapsed())
}

/// The lab's Service as kube-proxy's rules have it on every node.
struct KubeProxy<'a> {
    cluster: &'a Cluster,
    ruleset: String,
}

impl<'a> KubeProxy<'a> {
    fn new(cluster: &'a Cluster, service: SocketAddr, nodes: &[(String, String)], endpoints: &[String]) -> Self {
        let node_ips: Vec<&str> = nodes.iter().map(|(_, ip)| ip.as_str()).collect();
        let mut text = format!(
            r#"table ip kube-proxy {{
  counter served {{ }}
  map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ {vip} . tcp . 80 : goto service-web }} }}
  map service-nodeports {{ type inet_proto . inet_service : verdict; elements = {{ tcp . {NODE_PORT} : goto external-web }} }}
  set nodeport-ips {{ type ipv4_addr; elements = {{ {ips} }} }}
  chain nat-prerouting {{ type nat hook prerouting priority dstnat; policy accept; jump services; }}
  chain nat-output {{ type nat hook output priority -100; policy accept; jump services; }}
  chain nat-postrouting {{ type nat hook postrouting priority srcnat; policy accept; jump masquerading; }}
  chain services {{
    ip daddr . meta l4proto . th dport vmap @service-ips
    ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
  }}
  chain masquerading {{
    meta mark & 0x4000 == 0 return
    meta mark set meta mark ^ 0x4000
    masquerade fully-random
  }}
  chain mark-for-masquerade {{ meta mark set meta mark | 0x4000; }}
  chain external-web {{ jump mark-for-masquerade; goto service-web; }}
"#,
            vip = service.ip(),
            ips = node_ips.join(", "),
        );
        for (index, endpoint) in endpoints.iter().enumerate() {
            text.push_str(&format!(
                "  chain endpoint-{index} {{ ip saddr {endpoint} jump mark-for-masquerade; meta l4proto tcp dnat to {endpoint}:80; }}\n"
            ));
        }
        let choices: Vec<String> = (0..endpoints.len()).map(|index| format!("{index} : goto endpoint-{index}")).collect();
        text.push_str(&format!(
            "  chain service-web {{ counter name served; ip daddr {} ip saddr != 10.244.0.0/16 jump mark-for-masquerade; \
             numgen random mod {} vmap {{ {} }}; }}\n}}\n",
            service.ip(),
            endpoints.len(),
            choices.join(", ")
        ));
        // In the order in which names are known.
        Self { cluster, ruleset: order_chains(&text) }
    }

    /// Its rules on every node, and then its pods.
    fn arrives(&self) -> Result<()> {
        let file = std::env::temp_dir().join(format!("towpath-{}-kube-proxy.nft", self.cluster.name()));
        std::fs::write(&file, &self.ruleset)?;
        for node in NODES {
            let said = self.cluster.node(node, &format!("nft -f {}", file.display()))?;
            ensure!(said.ok, "{}\n{}", said.all(), self.ruleset);
        }
        std::fs::remove_file(&file)?;
        NODES.iter().try_for_each(|node| self.pod_comes(node))
    }

    fn pod_comes(&self, node: &str) -> Result<()> {
        self.cluster.apply_text(&KUBE_PROXY.replace("NODE", node))
    }

    fn pod_goes(&self, node: &str) -> Result<()> {
        let name = format!("kube-proxy-{node}");
        let deleted = self.cluster.try_kubectl(&["delete", "pod", "-n", "kube-system", &name])?;
        ensure!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
        Ok(())
    }

    fn rules_go(&self) -> Result<()> {
        for node in NODES {
            let said = self.cluster.node(node, "nft delete table ip kube-proxy")?;
            ensure!(said.ok, "{}", said.all());
        }
        Ok(())
    }

    /// Connections that its rules have led to a pod so far, on every node.
    fn served(&self) -> Result<Vec<u64>> {
        let of = |node: &&str| -> Result<u64> {
            let said = self.cluster.node(node, "nft -j list counter ip kube-proxy served")?;
            let value: Value = serde_json::from_str(&said.out).with_context(|| said.all())?;
            let counters = value.pointer("/nftables").and_then(Value::as_array).cloned().unwrap_or_default();
            let packets = counters.iter().find_map(|entry| entry.pointer("/counter/packets").and_then(Value::as_u64));
            packets.with_context(|| said.all())
        };
        NODES.iter().map(of).collect()
    }
}

/// nft knows a chain by what was said before: what is jumped to comes first, base chains and maps last.
fn order_chains(text: &str) -> String {
    let names = ["mark-for-masquerade", "masquerading", "services", "service-web", "external-web"];
    let declared: String = names.iter().map(|name| format!("add chain ip kube-proxy {name}\n")).collect();
    let endpoints: String = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("chain endpoint-")?.split(' ').next())
        .map(|index| format!("add chain ip kube-proxy endpoint-{index}\n"))
        .collect();
    format!("add table ip kube-proxy\n{declared}{endpoints}{text}")
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
    ensure!(said.out.contains("TRIED") && !said.out.contains("REFUSED"), "node {node}, new connections: {}", said.all());
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
fn hand_over_and_back(cluster: &Cluster, kube_proxy: &KubeProxy<'_>, load: &Load, check: &dyn Fn() -> Result<()>) -> Result<()> {
    let next = || load.phase.fetch_add(1, Ordering::Relaxed);
    let settle = || std::thread::sleep(Duration::from_secs(2));
    ensure!(health(cluster)? == "200", "kube-proxy's health is ours to answer");
    settle();

    println!("kube-proxy comes, and gets Services once it has settled");
    kube_proxy.arrives()?;
    let took = in_charge(cluster, "serviceProxy", "kube-proxy")?;
    ensure!(took > Duration::from_secs(8), "it was given them after {took:?}, before it can have settled");
    next();
    let before = kube_proxy.served()?;
    settle();
    let after = kube_proxy.served()?;
    ensure!(before.iter().zip(&after).all(|(b, a)| a > b), "its rules serve nobody: {before:?}, {after:?}");
    ensure!(health(cluster)? == "000", "its ports are its own");
    check()?;

    println!("its pod is rolled, and nothing flips");
    kube_proxy.pod_goes("n1")?;
    for second in 0..5 {
        if second == 2 {
            kube_proxy.pod_comes("n1")?;
        }
        std::thread::sleep(Duration::from_secs(1));
        let now = places(cluster, "serviceProxy")?;
        ensure!(now.iter().all(|who| who == "kube-proxy"), "{now:?} in the middle of a roll");
    }

    println!("serviceProxy: towpath, and kube-proxy goes with its rules");
    cluster.apply_text(&network_config("{serviceProxy: towpath}"))?;
    in_charge(cluster, "serviceProxy", "towpath")?;
    next();
    let before = kube_proxy.served()?;
    settle();
    ensure!(before == kube_proxy.served()?, "kube-proxy's rules still serve");
    NODES.iter().try_for_each(|node| kube_proxy.pod_goes(node))?;
    kube_proxy.rules_go()?;
    settle();
    check()?;
    wait("kube-proxy's health to be ours", ANSWER, || if health(cluster)? == "200" { Ok(()) } else { bail!("not 200") })?;

    println!("kube-proxy again, serviceProxy: auto");
    kube_proxy.arrives()?;
    cluster.apply_text(&network_config("{serviceProxy: auto}"))?;
    in_charge(cluster, "serviceProxy", "kube-proxy")?;
    next();
    settle();

    println!("kube-proxy is deleted for good");
    NODES.iter().try_for_each(|node| kube_proxy.pod_goes(node))?;
    let took = in_charge(cluster, "serviceProxy", "towpath")?;
    ensure!(took > Duration::from_secs(25), "Towpath took over after {took:?}, as if no pod were ever rolled");
    next();
    kube_proxy.rules_go()?;
    settle();
    Ok(())
}

#[test]
fn services_change_hands_and_no_connection_notices() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-modes", 2, Families::Ipv4)?;
    cluster.apply_text(OBJECTS)?;
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
    let kube_proxy = KubeProxy::new(&cluster, service, &nodes, &endpoints);
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
            threads.push((format!("pod {} to {to}", client.name()), scope.spawn(move || client.enter(|| talk(load, to)))));
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

/// A server behind `kube-system/kube-dns`: it says 192.0.2.53 to every question for an address.
fn serve_dns(load: &Load) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:53")?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut buffer = [0u8; 1500];
    while load.goes_on() {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let mut answer = buffer.get(..length).unwrap_or_default().to_vec();
        for (at, value) in [(2, 0x85), (3, 0x80), (7, 1), (11, 0)] {
            if let Some(byte) = answer.get_mut(at) {
                *byte = value;
            }
        }
        answer.extend_from_slice(&[0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 192, 0, 2, 53]);
        socket.send_to(&answer, from)?;
    }
    Ok(())
}

const NAME: &str = "kubernetes.default.svc.cluster.local";

/// Asks over `socket`; whether the server behind the Service answered, and not Towpath's.
fn ask_dns(socket: &UdpSocket, to: SocketAddr, id: u16) -> Result<bool> {
    let mut question = id.to_be_bytes().to_vec();
    question.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in NAME.split('.') {
        question.push(u8::try_from(label.len())?);
        question.extend_from_slice(label.as_bytes());
    }
    question.extend_from_slice(&[0, 0, 1, 0, 1]);
    socket.send_to(&question, to)?;
    let mut buffer = [0u8; 1500];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).with_context(|| format!("question {id} has no answer"))?;
        let answer = buffer.get(..length).unwrap_or_default();
        if answer.get(..2) != Some(id.to_be_bytes().as_slice()) {
            continue;
        }
        ensure!(from == to, "{from} answered what {to} was asked");
        ensure!(answer.get(3).is_some_and(|byte| byte & 15 == 0), "question {id}: {answer:?}");
        return Ok(answer.ends_with(&[192, 0, 2, 53]));
    }
}

struct Answers {
    theirs: AtomicUsize,
    ours: AtomicUsize,
}

fn keep_asking(load: &Load, answers: &Answers, to: SocketAddr) -> Result<()> {
    let open = || -> Result<UdpSocket> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        Ok(socket)
    };
    // One that asks from the same port for ever, and a new one for each question.
    let kept = open()?;
    let mut id = 0u16;
    while load.goes_on() {
        id = id.wrapping_add(1);
        ask_dns(&kept, to, id).context("over the same socket")?;
        let theirs = ask_dns(&open()?, to, id).context("over a new socket")?;
        if theirs { &answers.theirs } else { &answers.ours }.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn slice(ip: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {{name: kube-dns-coredns, namespace: kube-system, labels: {{kubernetes.io/service-name: kube-dns}}}}\n\
         endpoints: [{{addresses: [\"{ip}\"], conditions: {{ready: true}}, nodeName: n1, targetRef: {{kind: Pod, name: coredns, namespace: kube-system}}}}]\n\
         ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]\n"
    )
}

fn dns_hand_over_and_back(cluster: &Cluster, coredns: &str, answers: &Answers) -> Result<()> {
    let answered_by = |theirs: bool| -> Result<()> {
        // A source port that was used a moment ago leads where it led then, until that server's flows are let go of.
        std::thread::sleep(Duration::from_secs(4));
        let count = || (answers.theirs.load(Ordering::Relaxed), answers.ours.load(Ordering::Relaxed));
        let before = count();
        std::thread::sleep(Duration::from_secs(1));
        let after = count();
        let (of_theirs, of_ours) = (after.0 - before.0, after.1 - before.1);
        // CoreDNS stays the server of flows that it had, as long as it is there.
        let right = if theirs { of_ours == 0 && of_theirs > 20 } else { of_ours > 20 && of_ours > 4 * of_theirs };
        ensure!(right, "who answers: {before:?} to {after:?}");
        Ok(())
    };
    answered_by(false)?;
    println!("CoreDNS comes");
    cluster.apply_text(&slice(coredns))?;
    let took = in_charge(cluster, "dns", "coredns")?;
    ensure!(took > Duration::from_secs(8), "it was given DNS after {took:?}, before it can have settled");
    answered_by(true)?;
    println!("it goes");
    let gone = cluster.try_kubectl(&["delete", "endpointslice", "-n", "kube-system", "kube-dns-coredns"])?;
    ensure!(gone.status.success(), "{}", String::from_utf8_lossy(&gone.stderr));
    in_charge(cluster, "dns", "stand-in")?;
    answered_by(false)?;
    println!("it comes back, and dns: towpath");
    cluster.apply_text(&slice(coredns))?;
    cluster.apply_text(&network_config("{dns: towpath}"))?;
    in_charge(cluster, "dns", "towpath")?;
    answered_by(false)?;
    println!("dns: auto");
    cluster.apply_text(&network_config("{dns: auto}"))?;
    in_charge(cluster, "dns", "coredns")?;
    answered_by(true)
}

#[test]
fn cluster_dns_changes_hands_and_no_question_is_without_an_answer() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-modes-dns", 2, Families::Ipv4)?;
    let pod = |name: &str, node: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  nodeName: {node}\n  \
             containers: [{{name: shell, image: busybox, command: [sleep, \"86400\"]}}]\n---\n"
        )
    };
    cluster.apply_text(&format!("{}{}{}", pod("coredns", "n1"), pod("near", "n1"), pod("far", "n2")))?;
    cluster.apply_text(&pod("shell", "n2"))?;
    cluster.wait_pod("shell")?;
    let [coredns, near, far] = ["coredns", "near", "far"].map(|name| cluster.wait_pod(name));
    let (coredns, near, far) = (coredns?, near?, far?);
    let listed = cluster.try_kubectl(&["get", "svc", "kube-dns", "-n", "kube-system", "-o", "json"])?;
    let service: Value = serde_json::from_slice(&listed.stdout)?;
    let to = SocketAddr::new(address(&field(&service, "/spec/clusterIP"))?, 53);
    let at = [Place::of_pod(&cluster, &coredns)?, Place::of_pod(&cluster, &near)?, Place::of_pod(&cluster, &far)?];
    let [server, near, far] = &at;
    let (load, served, answers) = (Load::default(), Load::default(), Answers { theirs: AtomicUsize::new(0), ours: AtomicUsize::new(0) });
    let in_pod = format!(
        "n=0; while [ ! -e /tmp/over ]; do n=$((n+1)); timeout 5 nslookup -type=a {NAME} {} >/dev/null || echo NAMELESS $n; done; \
         echo TRIED $n",
        to.ip()
    );
    let (done, outcomes) = std::thread::scope(|scope| {
        let (load, answers, cluster) = (&load, &answers, &cluster);
        let served = &served;
        let behind = scope.spawn(move || server.enter(|| serve_dns(served)));
        let threads = [
            ("near", scope.spawn(move || near.enter(|| keep_asking(load, answers, to)))),
            ("far", scope.spawn(move || far.enter(|| keep_asking(load, answers, to)))),
            (
                "a pod's own sockets",
                scope.spawn(|| {
                    let said = cluster.exec("shell", &in_pod)?;
                    ensure!(said.out.contains("TRIED") && !said.out.contains("NAMELESS"), "{}", said.all());
                    Ok(())
                }),
            ),
        ];
        let done = dns_hand_over_and_back(cluster, &coredns.ip, answers);
        load.over.store(true, Ordering::Relaxed);
        let _ = cluster.exec("shell", "touch /tmp/over");
        let outcomes = threads.map(|(what, thread)| (what, thread.join().map_err(|_| anyhow!("panicked"))));
        served.over.store(true, Ordering::Relaxed);
        let server = ("the server", behind.join().map_err(|_| anyhow!("panicked")));
        (done, outcomes.into_iter().chain([server]).collect::<Vec<_>>())
    });
    let mut problems: Vec<String> = done.err().map(|error| format!("{error:#}")).into_iter().collect();
    for (what, outcome) in outcomes {
        problems.extend(outcome.and_then(|inner| inner).err().map(|error| format!("{what}: {error:#}")));
    }
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    println!("answers of theirs {:?}, of ours {:?}", answers.theirs, answers.ours);
    cluster.down()
}
