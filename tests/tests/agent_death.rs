//! The agent dies, again and again, and nobody notices: open connections, new ones, names and policies outlive it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::{server, shell};

/// Longest an answer may take: the machine may be busy, a dead data path does not answer at all.
const ANSWER: Duration = Duration::from_secs(5);
/// The supervisor waits 0.2 s, 0.4 s, 0.8 s … before it starts a dead agent again.
const KILLS: u32 = 5;

const RULES: &str = r#"---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends-only}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]
"#;

/// Everything that is applied.
fn objects() -> String {
    [
        server("web", "n1", "app: web"),
        shell("friend", "n2", "app: friend"),
        shell("stranger", "n2", "app: stranger"),
        RULES.to_owned(),
    ]
    .concat()
}

/// Kills the node's agent whenever it is there, `KILLS` times, and waits until one has come to stay.
fn kill_again_and_again(cluster: &Cluster, node: &str) -> Result<Duration> {
    let mut last = 0;
    let mut dead = Duration::ZERO;
    for _ in 0..KILLS {
        let pid = wait("an agent", Duration::from_secs(20), || machine::lab_agent(cluster.name(), node))?;
        ensure!(pid != last, "process {pid} survived SIGKILL");
        last = pid;
        machine::kill(pid)?;
        let died = Instant::now();
        wait("another agent", Duration::from_secs(20), || {
            if machine::lab_agent(cluster.name(), node)? == last {
                bail!("process {last} is still there")
            } else {
                Ok(())
            }
        })?;
        dead += died.elapsed();
    }
    Ok(dead)
}

#[derive(Default)]
struct Tally {
    over: AtomicBool,
    kept: AtomicUsize,
    opened: AtomicUsize,
    forbidden: AtomicUsize,
}

impl Tally {
    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }
}

fn keep_one_open(tally: &Tally, to: SocketAddr) -> Result<()> {
    let mut session = Session::open(to, ANSWER)?;
    while tally.goes_on() {
        let asked = tally.kept.fetch_add(1, Ordering::Relaxed);
        session.ask(ANSWER).with_context(|| format!("request {asked} over the open connection"))?;
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn open_many(tally: &Tally, to: SocketAddr) -> Result<()> {
    while tally.goes_on() {
        let opened = tally.opened.fetch_add(1, Ordering::Relaxed);
        let answer = Session::open(to, ANSWER).and_then(|mut session| session.ask(ANSWER));
        answer.with_context(|| format!("new connection {opened} to the Service"))?;
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn try_in_vain(tally: &Tally, to: SocketAddr) -> Result<()> {
    while tally.goes_on() {
        tally.forbidden.fetch_add(1, Ordering::Relaxed);
        ensure!(Session::open(to, Duration::from_millis(150)).is_err(), "a forbidden connection to {to} was made");
    }
    Ok(())
}

fn devices(cluster: &Cluster, node: &str) -> Result<String> {
    let said = cluster.node(node, "ip -o link | cut -d: -f1,2")?;
    ensure!(said.ok && said.out.lines().count() > 2, "ip link on {node}: {}", said.all());
    Ok(said.out)
}

#[test]
fn traffic_names_and_policies_outlive_the_agent() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-death", 2, Families::Ipv4)?;
    cluster.apply_text(&objects())?;
    let [web, friend, stranger] = ["web", "friend", "stranger"].map(|name| cluster.wait_pod(name));
    let (web, friend, stranger) = (web?, friend?, stranger?);
    let pod = SocketAddr::new(address(&web.ip)?, 80);
    let service = SocketAddr::new(address(&field(&cluster.get("svc", "web")?, "/spec/clusterIP"))?, 80);
    let (friend, stranger) = (Place::of_pod(&cluster, &friend)?, Place::of_pod(&cluster, &stranger)?);
    wait("the Service to answer and the policy to hold", Duration::from_secs(10), || {
        friend.enter(|| Session::open(service, ANSWER)?.ask(ANSWER))?;
        let open = stranger.enter(|| Ok(Session::open(pod, Duration::from_millis(300)).is_ok()))?;
        if open { bail!("the stranger still reaches the server") } else { Ok(()) }
    })?;
    let before = [devices(&cluster, "n1")?, devices(&cluster, "n2")?];

    let tally = Tally::default();
    // In the pods themselves, whose connections the socket programs translate.
    let script = "n=0; while [ ! -e /tmp/over ]; do n=$((n+1)); \
                  timeout 5 wget -q -O /dev/null http://SERVICE/ || echo REFUSED $n, status $?, at $(date +%T); \
                  timeout 5 nslookup web.default.svc.cluster.local >/dev/null || echo NAMELESS $n, status $?, at $(date +%T); done; echo TRIED $n"
        .replace("SERVICE", &service.ip().to_string());
    let (dead, inside, outcomes) = std::thread::scope(|scope| {
        let tally = &tally;
        let threads = [
            ("an open connection", scope.spawn(|| friend.enter(|| keep_one_open(tally, pod)))),
            ("new connections", scope.spawn(|| friend.enter(|| open_many(tally, service)))),
            ("forbidden connections", scope.spawn(|| stranger.enter(|| try_in_vain(tally, pod)))),
        ];
        let inside = scope.spawn(|| cluster.exec("friend", &script));
        // Both ends' agents: the client's node translates and sends, the server's node judges.
        let dead: Result<Vec<Duration>> = std::thread::scope(|killers| {
            let killers = ["n1", "n2"].map(|node| killers.spawn(|| kill_again_and_again(&cluster, node)));
            killers.into_iter().map(|k| k.join().map_err(|_| anyhow::anyhow!("panicked"))?).collect()
        });
        tally.over.store(true, Ordering::Relaxed);
        let _ = cluster.exec("friend", "touch /tmp/over");
        let outcomes = threads.map(|(what, t)| (what, t.join().map_err(|_| anyhow::anyhow!("panicked"))));
        (dead, inside.join().map_err(|_| anyhow::anyhow!("panicked")), outcomes)
    });
    let dead = dead?;
    let counts = [&tally.kept, &tally.opened, &tally.forbidden].map(|count| count.load(Ordering::Relaxed));
    println!("agents were dead for {dead:?} in all; kept, opened, forbidden: {counts:?}");
    for (what, outcome) in outcomes {
        outcome?.with_context(|| what.to_owned())?;
    }
    ensure!(counts.iter().all(|count| *count > 20), "too little was tried: {counts:?}");
    let inside = inside??;
    let tried = inside.out.lines().filter_map(|l| l.strip_prefix("TRIED ")).filter_map(|n| n.parse::<u32>().ok());
    ensure!(tried.sum::<u32>() > 10, "too little was tried in the pod: {}", inside.all());
    ensure!(!inside.out.contains("REFUSED") && !inside.out.contains("NAMELESS"), "in the pod: {}", inside.all());

    // The agents that came back adopted what was there, and do their work again.
    ensure!(before == [devices(&cluster, "n1")?, devices(&cluster, "n2")?], "devices were made anew: {before:?}");
    cluster.apply_text(&RULES.replace("app: friend}}}", "app: stranger}}}"))?;
    wait("the agents to follow a changed policy", Duration::from_secs(20), || {
        stranger.enter(|| Session::open(pod, ANSWER)?.ask(ANSWER))?;
        let open = friend.enter(|| Ok(Session::open(pod, Duration::from_millis(300)).is_ok()))?;
        if open { bail!("who is no friend any more still reaches the server") } else { Ok(()) }
    })?;
    let late = r#"{"spec":{"nodeName":"n1"}}"#;
    let overrides = format!("--overrides={late}");
    cluster.try_kubectl(&["run", "late", "--image=nginx", "--port=80", &overrides])?;
    let late = cluster.wait_pod("late")?;
    friend.enter(|| Session::open(SocketAddr::new(address(&late.ip)?, 80), ANSWER)?.ask(ANSWER))?;
    cluster.down()
}
