//! Policy arrives under open connections and breaks only those that it forbids; and a pod has no first unfiltered packet.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::{server, shell};

const ANSWER: Duration = Duration::from_secs(5);
/// By then a sender that stalled for some seconds has tried again.
const RETRANSMITTED: Duration = Duration::from_secs(30);
const ALLOWED: usize = 200;
const FORBIDDEN: usize = 20;

/// The pods.
fn pods() -> String {
    [
        server("web", "n1", "app: web"),
        shell("friend", "n2", "app: friend"),
        shell("neighbour", "n1", "app: friend"),
        shell("stranger", "n2", "app: stranger"),
    ]
    .concat()
}

const POLICY: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends-only}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
    - from: [{podSelector: {matchLabels: {app: friend}}}]
      ports: [{port: 80}]
"#;

fn sessions(place: &Place, to: SocketAddr, count: usize) -> Result<Vec<Session>> {
    place.enter(|| {
        let opened = (0..count).map(|_| {
            let mut session = Session::open(to, ANSWER)?;
            session.ask(ANSWER)?;
            Ok(session)
        });
        opened.collect::<Result<Vec<_>>>().with_context(|| format!("{count} connections from {}", place.name()))
    })
}

#[test]
fn a_policy_breaks_only_the_connections_that_it_forbids() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-isolate", 2, Families::Ipv4)?;
    cluster.apply_text(&pods())?;
    let to = SocketAddr::new(address(&cluster.wait_pod("web")?.ip)?, 80);
    let place = |name: &str| Place::of_pod(&cluster, &cluster.wait_pod(name)?);
    let (friend, neighbour, stranger) = (place("friend")?, place("neighbour")?, place("stranger")?);
    let mut allowed = sessions(&friend, to, ALLOWED / 2)?;
    allowed.extend(sessions(&neighbour, to, ALLOWED / 2)?);
    let mut forbidden = sessions(&stranger, to, FORBIDDEN)?;

    cluster.apply_text(POLICY)?;
    wait("the policy to hold for new connections", Duration::from_secs(5), || {
        let open = stranger.enter(|| Ok(Session::open(to, Duration::from_millis(200)).is_ok()))?;
        if open { bail!("the stranger still connects") } else { Ok(()) }
    })?;

    for round in 0..3 {
        for (number, session) in allowed.iter_mut().enumerate() {
            session.ask(ANSWER).with_context(|| format!("allowed connection {number} in round {round}"))?;
        }
    }
    // All at once: each waits for an answer that must not come.
    let answered = std::thread::scope(|scope| {
        let asked: Vec<_> =
            forbidden.iter_mut().map(|s| scope.spawn(|| s.ask(Duration::from_secs(2)).is_ok())).collect();
        asked.into_iter().filter_map(|a| a.join().ok()).filter(|answered| *answered).count()
    });
    ensure!(answered == 0, "{answered} of {FORBIDDEN} forbidden connections still answer");

    // And without the policy those that stalled go on where they stopped.
    cluster.kubectl(
        &towpath_walkthrough::log::Log::new(towpath_walkthrough::log::Voice::Plain),
        &["delete", "networkpolicy", "friends-only"],
    )?;
    wait("the stranger again", Duration::from_secs(5), || sessions(&stranger, to, 1))?;
    // Each answers what it was asked while it stalled, when its sender tries the next time.
    let answers: Vec<Result<String>> = std::thread::scope(|scope| {
        let asked: Vec<_> = forbidden.iter_mut().map(|s| scope.spawn(|| s.ask(RETRANSMITTED))).collect();
        asked.into_iter().map(|a| a.join().map_err(|_| anyhow::anyhow!("panicked"))?).collect()
    });
    for (number, answer) in answers.into_iter().enumerate() {
        answer.with_context(|| format!("stalled connection {number}"))?;
    }
    cluster.down()
}

const SENDERS: usize = 10;

fn sender(name: &str, label: &str, node: &str, target: &str) -> String {
    // Each datagram by a socket of its own, as fast as the shell can from the first instant on.
    format!(
        r#"---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{kind: {label}}}}}
spec:
  nodeName: {node}
  containers:
    - name: sender
      image: busybox
      command: [sh, -c, "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do echo {name} | /bin/nc -u -q 0 {target} 7777; done; echo SENT; sleep 86400"]
"#
    )
}

#[test]
fn a_pod_has_no_first_unfiltered_packet() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-first", 2, Families::Ipv4)?;
    cluster.apply_text(
        r#"
apiVersion: v1
kind: Pod
metadata: {name: target, labels: {app: target}}
spec:
  nodeName: n1
  containers: [{name: shell, image: busybox, command: [sleep, "86400"]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: quiet}
spec:
  podSelector: {matchLabels: {kind: quiet}}
  policyTypes: [Egress]
"#,
    )?;
    let target = cluster.wait_pod("target")?;
    let place = Place::of_pod(&cluster, &target)?;
    let socket = place.enter(|| Ok(UdpSocket::bind((address(&target.ip)?, 7777))?))?;
    socket.set_read_timeout(Some(Duration::from_millis(300)))?;

    let mut pods = ["n1", "n2"].map(|node| sender(&format!("talker-{node}"), "loud", node, &target.ip)).concat();
    for number in 0..SENDERS {
        let node = if number % 2 == 0 { "n1" } else { "n2" };
        pods.push_str(&sender(&format!("quiet-{number}"), "quiet", node, &target.ip));
    }
    cluster.apply_text(&pods)?;
    let names: Vec<String> =
        (0..SENDERS).map(|n| format!("quiet-{n}")).chain(["talker-n1", "talker-n2"].map(str::to_owned)).collect();
    for name in &names {
        wait(&format!("{name} to have sent"), Duration::from_secs(30), || {
            let out = cluster.try_kubectl(&["logs", name])?;
            let said = String::from_utf8_lossy(&out.stdout).into_owned();
            if said.contains("SENT") { Ok(()) } else { bail!("its log: {said}") }
        })?;
    }
    let mut heard = Vec::new();
    let mut datagram = [0_u8; 64];
    while let Ok(size) = socket.recv(&mut datagram) {
        heard.push(String::from_utf8_lossy(&datagram[..size]).trim().to_owned());
    }
    let quiet: Vec<&String> = heard.iter().filter(|name| name.starts_with("quiet")).collect();
    for talker in ["talker-n1", "talker-n2"] {
        ensure!(
            heard.iter().any(|name| name == talker),
            "{talker}, which no policy selects, was not heard: the test shows nothing"
        );
    }
    ensure!(quiet.is_empty(), "{} packets of pods that may send nothing arrived: {quiet:?}", quiet.len());
    cluster.down()
}
