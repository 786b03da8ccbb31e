//! Agents of every node die twenty times in all while 250 connections are open and 500 a second are opened, from pods, nodes and outside,
//! translated in sockets and at devices: none breaks, none is refused.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, anyhow, bail, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::load::Load;
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::{server, shell};
use towpath_walkthrough::udp::Joined;

const ANSWER: Duration = Duration::from_secs(5);
const NODES: [&str; 3] = ["n1", "n2", "n3"];
/// Of each node's agent. The supervisor waits 0.2 s, 0.4 s … 12.8 s before it starts a dead one again.
const KILLS: usize = 7;
/// How long an agent lives, in turn: it dies before its first sync, within it, and after it.
const LIVES: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(150),
    Duration::from_millis(400),
    Duration::from_millis(800),
    Duration::from_millis(1500),
];
/// Each open connection is used as often.
const EVERY: Duration = Duration::from_millis(500);

/// `web` has an endpoint on every node; `one` has one on n1, so that at other nodes' NodePorts it is reached through another node.
const SERVICES: &str = r"---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{port: 80, nodePort: 30080}]
---
apiVersion: v1
kind: Service
metadata: {name: one}
spec:
  type: NodePort
  selector: {one: here}
  ports: [{port: 80, nodePort: 30081}]
";

fn kill_again_and_again(cluster: &Cluster, node: &str) -> Result<()> {
    let mut last = 0;
    for life in LIVES.iter().cycle().take(KILLS) {
        let agent = || {
            let pid = machine::lab_agent(cluster.name(), node)?;
            if pid == last { bail!("process {pid} survived SIGKILL") } else { Ok(pid) }
        };
        let pid = wait("another agent", Duration::from_secs(30), agent)?;
        std::thread::sleep(*life);
        machine::kill(pid)?;
        last = pid;
    }
    let back = || {
        let pid = machine::lab_agent(cluster.name(), node)?;
        if pid == last { bail!("process {pid} is still there") } else { Ok(()) }
    };
    wait("the agent that stays", Duration::from_secs(30), back)
}

struct Scene {
    cluster: Cluster,
    /// A pod of n2, where this process is in the node's cgroup: its connections are translated in the socket.
    hooked: Place,
    /// A pod of n1: translated at its device.
    plain: Place,
    node: Place,
    outside: Place,
    web: SocketAddr,
    /// `web` at n2.
    web_port: SocketAddr,
    /// `one` at n3, which has no endpoint of it.
    one_port: SocketAddr,
}

fn set_up() -> Result<Scene> {
    let cluster = Cluster::up("e2e-deaths", 3, Families::Ipv4)?;
    let webs: String = NODES.iter().map(|node| server(&format!("web-{node}"), node, "app: web")).collect();
    let one = server("one", "n1", "one: here");
    let clients = shell("hooked", "n2", "") + &shell("plain", "n1", "");
    cluster.apply_text(&(webs + &one + &clients + SERVICES))?;
    cluster.wait_ready("app=web", 3)?;
    cluster.wait_pod("one")?;
    let place = |pod: &str| Place::of_pod(&cluster, &cluster.wait_pod(pod)?);
    let (hooked, plain) = (place("hooked")?, place("plain")?);
    let web = SocketAddr::new(address(&field(&cluster.get("svc", "web")?, "/spec/clusterIP"))?, 80);
    let nodes = cluster.nodes()?;
    let at = |node: &str, port: u16| {
        let ip = nodes.iter().find(|(name, _)| name == node).map(|(_, ip)| ip.as_str());
        Ok::<_, anyhow::Error>(SocketAddr::new(address(ip.unwrap_or_default())?, port))
    };
    // One node's address for each: a client that comes by two may use one port for both, and means one connection to the endpoint then.
    let (web_port, one_port) = (at("n2", 30080)?, at("n3", 30081)?);
    let (node, outside) = (Place::of_node(&cluster, "n2")?, Place::of_node(&cluster, "outside")?);
    wait("all of it to answer", Duration::from_secs(20), || {
        let outer = [web_port, one_port];
        outside.enter(|| outer.iter().try_for_each(|to| Session::open(*to, ANSWER)?.ask(ANSWER).map(drop)))?;
        plain.enter(|| Session::open(web, ANSWER)?.ask(ANSWER))
    })?;
    Ok(Scene { cluster, hooked, plain, node, outside, web, web_port, one_port })
}

/// Runs the load while `meanwhile` does its work.
fn under_load(scene: &Scene, load: &Load, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
    let Scene { hooked, plain, node, outside, web, web_port, one_port, .. } = scene;
    // A device does not know that two addresses lead to one backend, and a pod's kernel may use one port for both: one address only.
    let kept = [
        ("a pod's socket", Load::sessions(hooked, &[*web], 60)?),
        ("a pod's device", Load::sessions(plain, &[*web], 60)?),
        ("a node's socket", Load::sessions(node, &[*web], 40)?),
        ("from outside", Load::sessions(outside, &[*web_port], 40)?),
        ("through another node, first half", Load::sessions(outside, &[*one_port], 25)?),
        ("through another node, second half", Load::sessions(outside, &[*one_port], 25)?),
    ];
    let (web, web_port, one_port) = ([*web], [*web_port], [*one_port]);
    let mut rates: Vec<(&str, &Place, &[SocketAddr], u32)> = Vec::new();
    for _ in 0..2 {
        rates.push(("a pod's socket", hooked, &web, 70));
        rates.push(("a pod's device", plain, &web, 70));
        rates.push(("a node's socket", node, &web, 40));
        rates.push(("from outside", outside, &web_port, 40));
        rates.push(("through another node", outside, &one_port, 30));
    }
    std::thread::scope(|scope| {
        for (what, sessions) in kept {
            scope.spawn(move || load.keep(what, sessions, EVERY));
        }
        let openers: Vec<_> = rates
            .into_iter()
            .map(|(what, from, to, rate)| {
                scope.spawn(move || {
                    from.enter(|| {
                        load.open(what, to, rate);
                        Ok(())
                    })
                })
            })
            .collect();
        let done = meanwhile();
        load.ends();
        openers.into_iter().try_for_each(|opener| opener.join().map_err(|_| anyhow!("a thread panicked"))?)?;
        done
    })
}

#[test]
fn agents_die_twenty_times_and_no_connection_notices() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let scene = set_up()?;
    let cluster = &scene.cluster;
    let joined = Joined::node(cluster, "n2")?;
    let load = Load::default();
    under_load(&scene, &load, || {
        std::thread::scope(|scope| {
            let killers = NODES.map(|node| scope.spawn(move || kill_again_and_again(cluster, node)));
            killers.into_iter().try_for_each(|killer| killer.join().map_err(|_| anyhow!("a killer panicked"))?)
        })
    })?;
    drop(joined);
    load.judge(3000, 3000)?;
    let answers = load.answers();
    let all = ["web-n1", "web-n2", "web-n3", "one"];
    ensure!(all.iter().all(|pod| answers.get(*pod).is_some_and(|n| *n > 50)), "somebody was left out: {answers:?}");

    // Those that came back do their work again, on every node.
    cluster.apply_text(&server("late", "n3", "one: here"))?;
    cluster.wait_pod("late")?;
    wait("the late endpoint", Duration::from_secs(20), || {
        let answer = scene.outside.enter(|| Session::open(scene.one_port, ANSWER)?.ask(ANSWER))?;
        if answer.contains("late") { Ok(()) } else { bail!("{answer}") }
    })?;
    scene.cluster.down()
}
