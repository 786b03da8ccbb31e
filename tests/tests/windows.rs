//! No packet contrary to policy while policies change: every packet is judged at its receiver, by what was wanted when and by what each node
//! had acknowledged, with agents that are killed and cut off meanwhile. And policies hold while their namespace ends.
//!
//! The seed is printed; `TOWPATH_SEED` repeats a run, `TOWPATH_FULL=1` makes a thousand changes instead of a hundred, and kills agents for longer (nextest's
//! profile `full` has the time).

#![allow(clippy::indexing_slicing, reason = "indexes come from the dice, below the length")]

#[path = "windows/desired.rs"]
mod desired;
#[path = "windows/history.rs"]
mod history;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use towpath_walkthrough::api::{Api, cut_off, join_again, server_address};
use towpath_walkthrough::cluster::{Cluster, Families, Pod, field, usable_kubectl, wait};
use towpath_walkthrough::in_force::{Acknowledging, Written};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, address};
use towpath_walkthrough::pods::shell;
use towpath_walkthrough::traffic::{Clock, Flow, Heard, Receiver, Sender, Sent};

use desired::{Desired, Dice, PORTS, SPACES, Which};
use history::{History, Way};

const SEED: u64 = 0x0057_494e_444f_5753;
const NODES: [&str; 2] = ["n1", "n2"];
/// Between two rounds of all flows of a pod.
const PACE: Duration = Duration::from_millis(20);
/// A connection of its own for every so manieth round: each lives half a minute in the connection table.
const FRESH_EVERY: u32 = 12;
/// How long a change may take while agents die: the supervisor waits up to 10 s before it starts one again.
const PATIENCE: Duration = Duration::from_secs(40);

fn full() -> bool {
    std::env::var_os("TOWPATH_FULL").is_some_and(|value| value == "1")
}

/// Whether the machine has what these tests need; says what it lacks.
fn can_run() -> Result<bool> {
    if can_run_labs()? && usable_kubectl() {
        return Ok(true);
    }
    println!("skipped: no kubectl of 1.31 or newer, whose proxy takes hundreds of writes a minute");
    Ok(false)
}

fn manifests() -> String {
    let mut text = String::new();
    for (number, space) in SPACES.iter().enumerate() {
        let _ = writeln!(text, "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {space}}}");
        for pod in 0..3 {
            let (web, admin) = if (number + pod) % 2 == 0 { (PORTS[0], PORTS[1]) } else { (PORTS[1], PORTS[0]) };
            let _ = writeln!(
                text,
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {space}-{pod}, namespace: {space}, labels: {{tier: front, app: x}}}}\n\
                 spec:\n  nodeName: {}\n  terminationGracePeriodSeconds: 0\n  containers:\n  - name: shell\n    image: busybox\n    \
                 command: [sleep, \"86400\"]\n    ports: [{{name: web, protocol: UDP, containerPort: {web}}}, \
                 {{name: admin, protocol: UDP, containerPort: {admin}}}]",
                NODES[pod % 2]
            );
        }
    }
    text
}

/// Traffic from every pod to every other one, over connections that last and over new ones.
struct Everywhere {
    ways: BTreeMap<(u32, u32), Way>,
    receivers: Vec<Receiver>,
    senders: Vec<Sender>,
}

/// What was sent and heard of it.
struct Passed {
    ways: BTreeMap<(u32, u32), Way>,
    sent: Vec<Sent>,
    heard: Vec<Heard>,
}

impl Everywhere {
    fn begin(cluster: &Cluster, pods: &[Pod], clock: Clock) -> Result<Self> {
        let places = pods.iter().map(|pod| Ok(Arc::new(Place::of_pod(cluster, pod)?)));
        let places = places.collect::<Result<Vec<_>>>()?;
        let (mut ways, mut receivers, mut senders) = (BTreeMap::new(), Vec::new(), Vec::new());
        for (pod, place) in pods.iter().zip(&places) {
            for port in PORTS {
                receivers.push(Receiver::at(place, SocketAddr::new(address(&pod.ip)?, port), clock)?);
            }
        }
        for (sender, pod) in (0_u32..).zip(pods) {
            let mut flows = Vec::new();
            for other in pods.iter().filter(|other| other.name != pod.name) {
                for (port, fresh) in PORTS.iter().flat_map(|port| [(*port, false), (*port, true)]) {
                    let number = u32::try_from(flows.len())?;
                    let to = SocketAddr::new(address(&other.ip)?, port);
                    flows.push(Flow { number, to, fresh, every: if fresh { FRESH_EVERY } else { 1 }, size: 0 });
                    let way = Way {
                        nodes: [pod.node.clone(), other.node.clone()],
                        names: [pod.name.clone(), other.name.clone()],
                        from: address(&pod.ip)?,
                        to: to.ip(),
                        port,
                    };
                    ways.insert((sender, number), way);
                }
            }
            let place = places.get(sender as usize).context("a pod without a place")?;
            senders.push(Sender::start(place.clone(), sender, flows, PACE, clock));
        }
        Ok(Self { ways, receivers, senders })
    }

    fn end(self) -> Result<Passed> {
        let sent = self.senders.into_iter().map(Sender::end).collect::<Result<Vec<_>>>()?.concat();
        let heard = self.receivers.into_iter().map(Receiver::end).collect::<Result<Vec<_>>>()?.concat();
        Ok(Passed { ways: self.ways, sent, heard })
    }
}

/// The cluster, what is wanted of it and what it acknowledged.
struct Run<'c> {
    cluster: &'c Cluster,
    api: Api,
    dice: Dice,
    desired: Desired,
    history: History,
    clock: Clock,
    agents: BTreeMap<&'static str, Acknowledging>,
    kills: usize,
    /// How long changes took to be in force everywhere, in nanoseconds, where no agent was killed.
    took: Vec<u64>,
}

impl Run<'_> {
    /// One change; waits until these nodes acknowledge it. `kill`: an agent dies meanwhile, wherever it may be with it.
    fn change(&mut self, which: Which, nodes: &[&'static str], kill: bool) -> Result<()> {
        // What is about to be written may be in force before the answer to the write is here.
        let begun = self.clock.now();
        let change = self.desired.change(&mut self.dice, &self.api, which)?;
        self.history.begins(begun, self.desired.objects()?, change.what.clone());
        if kill {
            let victim = self.dice.pick(&NODES);
            std::thread::sleep(Duration::from_micros(self.dice.below(12_000) as u64));
            if let Ok(pid) = machine::lab_agent(self.cluster.name(), victim) {
                machine::kill(pid)?;
                self.kills += 1;
            }
        }
        self.acknowledged(nodes, &change.written).with_context(|| change.what)?;
        if !kill {
            self.took.push(self.clock.now() - begun);
        }
        std::thread::sleep(Duration::from_micros(self.dice.below(30_000) as u64));
        Ok(())
    }

    fn acknowledged(&mut self, nodes: &[&'static str], written: &Written) -> Result<()> {
        let mut open: Vec<&str> = nodes.to_vec();
        let until = Instant::now() + PATIENCE;
        while !open.is_empty() {
            open.retain(|node| {
                let has = self.agents.get(node).is_some_and(|agent| agent.has(written).unwrap_or(false));
                if has {
                    self.history.acknowledges(node, self.clock.now());
                }
                !has
            });
            ensure!(Instant::now() < until, "{open:?} did not acknowledge {written:?} within {PATIENCE:?}");
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    /// One change, and an agent that dies in the kernel call of that number: of the first of its threads to get so far since the change was begun. Whether
    /// it died.
    fn change_and_die_in_call(&mut self, call: u32) -> Result<bool> {
        let victim = NODES[call as usize % NODES.len()];
        // Its own housekeeping makes calls too, and may get so far before the change is begun: then it is the next agent's turn.
        let killer = wait("an agent that lives until the change", Duration::from_secs(60), || {
            let pid = wait("an agent", PATIENCE, || machine::lab_agent(self.cluster.name(), victim))?;
            Killer::of(pid, call)?.context("it was killed too early")
        })?;
        let begun = self.clock.now();
        let change = self.desired.change(&mut self.dice, &self.api, Which::All)?;
        self.history.begins(begun, self.desired.objects()?, change.what.clone());
        self.acknowledged(&NODES, &change.written).with_context(|| format!("call {call}: {}", change.what))?;
        let died = killer.has_killed()?;
        self.kills += usize::from(died);
        Ok(died)
    }

    /// Waits until every agent has listed everything.
    fn settled(&self) -> Result<()> {
        wait("the agents to have listed everything", PATIENCE, || {
            for agent in self.agents.values() {
                let says = agent.says()?;
                ensure!(field(&says, "/failing").is_empty(), "{says}");
            }
            Ok(())
        })
    }

    /// Changes while a node hears nothing of the API server: it judges as before until it is back.
    fn change_behind_its_back(&mut self, changes: usize, last_at_least: Duration) -> Result<()> {
        let [away, here] = NODES;
        let server = server_address(self.cluster, away)?;
        cut_off(self.cluster, away, &server)?;
        let begun = Instant::now();
        for _ in 0..changes {
            self.change(Which::NetworkPolicies, &[here], false)?;
        }
        while begun.elapsed() < last_at_least {
            self.change(Which::NetworkPolicies, &[here], false)?;
            std::thread::sleep(Duration::from_millis(300));
        }
        join_again(self.cluster, away, &server)?;
        let begun = self.clock.now();
        let change = self.desired.change(&mut self.dice, &self.api, Which::NetworkPolicies)?;
        self.history.begins(begun, self.desired.objects()?, change.what);
        // Of what it never heard of, that it is gone is no acknowledgement: it must have all that there is.
        let all = self.desired.policies()?;
        let agent = self.agents[away].clone();
        wait("the node that was away to follow", Duration::from_secs(120), || {
            match agent.has_exactly("NetworkPolicy", &all)? {
                true => Ok(()),
                false => bail!("it says {}", agent.says()?),
            }
        })?;
        self.history.acknowledges(away, self.clock.now());
        self.acknowledged(&[here], &change.written)
    }
}

/// Kills a process when one of its threads makes its so manieth `bpf` call.
struct Killer {
    strace: Child,
}

impl Killer {
    /// From when this returns the calls are counted. None: it has done its work already, for a thread made so many while others were being taken.
    fn of(pid: i32, call: u32) -> Result<Option<Self>> {
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=bpf"]);
        strace.args(["-e", &format!("inject=bpf:signal=KILL:when={call}"), "-p", &pid.to_string()]);
        let mut killer = Self { strace: strace.stdin(Stdio::null()).spawn().context("start strace")? };
        let traced = |status: &str| status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"));
        wait("strace to have all threads", PATIENCE, || {
            if killer.strace.try_wait()?.is_some() {
                return Ok(None);
            }
            for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
                let status = std::fs::read_to_string(task?.path().join("status"))?;
                ensure!(traced(&status), "process {pid}: {status}");
            }
            Ok(Some(()))
        })
        .map(|has_all| has_all.map(|()| killer))
    }

    /// Whether it did its work: it ends with the process.
    fn has_killed(mut self) -> Result<bool> {
        let ended = self.strace.try_wait()?.is_some();
        if !ended {
            // Asked, not killed: it lets go of the process.
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(self.strace.id() as i32),
                nix::sys::signal::Signal::SIGTERM,
            )?;
            self.strace.wait()?;
        }
        Ok(ended)
    }
}

fn pods(cluster: &Cluster) -> Result<Vec<Pod>> {
    let out = cluster.try_kubectl(&["get", "pods", "--all-namespaces", "-o", "json"])?;
    let list: Value = serde_json::from_slice(&out.stdout)?;
    let found: Vec<Pod> = list["items"].as_array().into_iter().flatten().map(Pod::from_json).collect();
    let ready = found.iter().filter(|pod| pod.ready).count();
    if ready == SPACES.len() * 3 { Ok(found) } else { bail!("{ready} pods are ready") }
}

#[test]
fn before_a_node_acknowledges_a_change_it_judges_by_old_or_new_and_after_it_by_new_only() -> Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let seed = std::env::var("TOWPATH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(SEED);
    println!("TOWPATH_SEED={seed}");
    let (changes, kill_every, away) = if full() { (1000, 100, 120) } else { (90, 30, 6) };
    let cluster = Cluster::up("e2e-windows", 2, Families::Ipv4)?;
    cluster.apply_text(&manifests())?;
    let pods = wait("all pods to be ready", Duration::from_secs(30), || pods(&cluster))?;
    let api = Api::of(&cluster)?;
    let (desired, clock) = (Desired::read(&api)?, Clock::default());
    let agents: BTreeMap<_, _> = NODES.map(|node| (node, Acknowledging::of(cluster.name(), node))).into();
    let (history, dice) = (History::default(), Dice(seed));
    let mut run = Run { cluster: &cluster, api, dice, desired, history, clock, agents, kills: 0, took: Vec::new() };
    // The first world: a namespace's label that everybody has heard of.
    run.change(Which::All, &NODES, false)?;
    let traffic = Everywhere::begin(&cluster, &pods, clock)?;
    for number in 0..changes {
        run.change(Which::All, &NODES, number % kill_every == kill_every - 1)
            .with_context(|| format!("TOWPATH_SEED={seed}, change {number}"))?;
    }
    run.change_behind_its_back(changes / 10, Duration::from_secs(away)).context("behind a node's back")?;
    let passed = traffic.end()?;
    let judged = run.history.judge(&passed.ways, &passed.sent, &passed.heard)?;
    run.took.sort_unstable();
    let at = |share: usize| run.took.get(run.took.len() * share / 100).map_or(0.0, |ns| *ns as f64 / 1e6);
    println!(
        "{} changes, {} of them telling, {} agents killed; in force everywhere after {:.1} ms (median), {:.1} ms (99 %)",
        run.took.len(),
        judged.telling,
        run.kills,
        at(50),
        at(99)
    );
    println!(
        "{} packets sent, {} heard, {} of those in a window; {} forbidden, {} lost",
        judged.sent, judged.heard, judged.in_windows, judged.forbidden, judged.lost
    );
    ensure!(judged.forbidden + judged.lost == 0, "TOWPATH_SEED={seed}\n{}", judged.told.join("\n"));
    ensure!(run.kills > 0 && judged.telling > changes / 5 && judged.in_windows > 0, "too little was tried: {judged:?}");
    ensure!(judged.heard > judged.sent / 20 && judged.heard < judged.sent * 19 / 20, "such policies show little");
    cluster.down()
}

/// So many kernel calls a change of policy takes, about; many take fewer, and then nobody dies.
const CALLS: u32 = 9;
/// They are gone through for so long, again and again, at most; with `TOWPATH_FULL=1` that long.
const KILLING: Duration = Duration::from_secs(45);
/// As often an agent is killed in each call, or finds that a change does not get so far.
const OFTEN: usize = 2;

/// The calls that agents were to die in, in their order.
#[derive(Debug, Default)]
struct Tries {
    killed: Vec<u32>,
    missed: Vec<u32>,
    last: u32,
}

impl Tries {
    /// The next one in turn that has not been tried often enough; none: all have.
    fn next(&self) -> Option<u32> {
        let often = |tries: &[u32], call| tries.iter().filter(|tried| **tried == call).count() >= OFTEN;
        let enough = |call| !full() && (often(&self.killed, call) || often(&self.missed, call));
        (self.last + 1..=CALLS).chain(1..=self.last).find(|call| !enough(*call))
    }

    fn note(&mut self, call: u32, died: bool) {
        self.last = call;
        if died { &mut self.killed } else { &mut self.missed }.push(call);
    }
}

#[test]
fn an_agent_that_is_killed_in_any_call_of_a_change_leaves_old_or_new_and_the_next_ends_it() -> Result<()> {
    if !can_run()? {
        return Ok(());
    }
    if !Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_ok_and(|status| status.success()) {
        println!("skipped: no strace");
        return Ok(());
    }
    let seed = std::env::var("TOWPATH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(SEED);
    println!("TOWPATH_SEED={seed}");
    let cluster = Cluster::up("e2e-killed", 2, Families::Ipv4)?;
    cluster.apply_text(&manifests())?;
    let pods = wait("all pods to be ready", Duration::from_secs(30), || pods(&cluster))?;
    let api = Api::of(&cluster)?;
    let (desired, clock) = (Desired::read(&api)?, Clock::default());
    let agents: BTreeMap<_, _> = NODES.map(|node| (node, Acknowledging::of(cluster.name(), node))).into();
    let (history, dice) = (History::default(), Dice(seed));
    let mut run = Run { cluster: &cluster, api, dice, desired, history, clock, agents, kills: 0, took: Vec::new() };
    // Some policies first, so that there is something to change.
    for _ in 0..12 {
        run.change(Which::All, &NODES, false)?;
    }
    let traffic = Everywhere::begin(&cluster, &pods, clock)?;
    let (begun, mut tries) = (Instant::now(), Tries::default());
    while begun.elapsed() < KILLING
        && let Some(call) = tries.next()
    {
        let died = run.change_and_die_in_call(call).with_context(|| format!("TOWPATH_SEED={seed}"))?;
        tries.note(call, died);
        if died {
            // One that comes up is in the midst of things, too; but it is the change that is to be cut.
            run.settled()?;
        }
    }
    let passed = traffic.end()?;
    let judged = run.history.judge(&passed.ways, &passed.sent, &passed.heard)?;
    println!(
        "killed in calls {:?}, not in calls {:?}, within {:.1} s; {} packets sent, {} heard, {} of those in a window; {} forbidden, {} lost",
        tries.killed,
        tries.missed,
        begun.elapsed().as_secs_f64(),
        judged.sent,
        judged.heard,
        judged.in_windows,
        judged.forbidden,
        judged.lost
    );
    ensure!(judged.forbidden + judged.lost == 0, "TOWPATH_SEED={seed}\n{}", judged.told.join("\n"));
    let tried: BTreeSet<u32> = tries.killed.into_iter().collect();
    ensure!(
        tried.len() > 2 && judged.telling > 0 && judged.in_windows > 0,
        "too little was tried: {tried:?} {judged:?}"
    );
    cluster.down()
}

const ENDING: &str = r#"---
apiVersion: v1
kind: Namespace
metadata: {name: ending}
---
apiVersion: v1
kind: Pod
metadata: {name: walled, namespace: ending}
spec:
  nodeName: n1
  terminationGracePeriodSeconds: 600
  containers: [{name: shell, image: busybox, command: [sh, -c, "trap '' TERM; sleep 86400"]}]
"#;

const WALL: &str = r#"---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: wall, namespace: ending}
spec: {podSelector: {}, policyTypes: [Ingress]}
"#;

#[test]
fn a_namespace_that_ends_keeps_its_policies_until_its_pods_are_gone() -> Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-ending", 2, Families::Ipv4)?;
    cluster.apply_text(&(shell("near", "n1", "app: prober") + &shell("far", "n2", "app: prober") + ENDING))?;
    let api = Api::of(&cluster)?;
    let walled = wait("the pod to be ready", Duration::from_secs(30), || {
        let pod = Pod::from_json(&api.get("/api/v1/namespaces/ending/pods/walled")?);
        if pod.ready { Ok(pod) } else { bail!("{pod:?}") }
    })?;
    let clock = Clock::default();
    let at = SocketAddr::new(address(&walled.ip)?, 9000);
    let receiver = Receiver::at(&Place::of_pod(&cluster, &walled)?, at, clock)?;
    let flows = [false, true].map(|fresh| Flow {
        number: u32::from(fresh),
        to: at,
        fresh,
        every: 1 + 9 * u32::from(fresh),
        size: 0,
    });
    let mut senders = Vec::new();
    for (number, name) in (0_u32..).zip(["near", "far"]) {
        let place = Arc::new(Place::of_pod(&cluster, &cluster.wait_pod(name)?)?);
        senders.push(Sender::start(place, number, flows.to_vec(), Duration::from_millis(5), clock));
    }
    wait("both to be heard without a policy", Duration::from_secs(10), || {
        ensure!(receiver.count() > 100, "{} packets", receiver.count());
        Ok(())
    })?;
    cluster.apply_text(WALL)?;
    let agent = Acknowledging::of(cluster.name(), "n1");
    wait("the policy to be in force", Duration::from_secs(10), || {
        let says = agent.says()?;
        ensure!(!field(&says, "/kinds/NetworkPolicy/objects/ending~1wall").is_empty(), "{says}");
        Ok(())
    })?;
    let walled_since = clock.now();
    // What an agent that starts again goes by.
    let kept = PathBuf::from("/var/lib/towpath/lab").join(cluster.name()).join("nodes/n1");
    wait("the policy to be on the node's disk", Duration::from_secs(20), || {
        let found = Command::new("grep").args(["-rlq", "\"wall\""]).arg(&kept).status()?;
        ensure!(found.success(), "not below {}", kept.display());
        Ok(())
    })?;
    api.delete("/api/v1/namespaces/ending")?;
    let is_there = |path: &str| api.get(path).is_ok();
    let wall = "/apis/networking.k8s.io/v1/namespaces/ending/networkpolicies/wall";
    let pod = "/api/v1/namespaces/ending/pods/walled";
    wait("the policy to be deleted", Duration::from_secs(10), || {
        if is_there(wall) { bail!("it is there") } else { Ok(()) }
    })?;
    ensure!(is_there(pod), "the pod went first: the test shows nothing");
    wait("the agent to say that it holds", Duration::from_secs(5), || {
        let says = agent.says()?;
        ensure!(field(&says, "/outliving/0") == "ending/wall", "{says}");
        Ok(())
    })?;
    machine::kill(wait("an agent", PATIENCE, || machine::lab_agent(cluster.name(), "n1"))?)?;
    wait("its successor to say so, too", Duration::from_secs(60), || {
        let says = agent.says()?;
        ensure!(field(&says, "/outliving/0") == "ending/wall", "{says}");
        Ok(())
    })?;
    ensure!(is_there(pod), "the pod is gone already: the test shows nothing");
    api.delete(&format!("{pod}?gracePeriodSeconds=0"))?;
    wait("the namespace to be gone", Duration::from_secs(30), || {
        if is_there("/api/v1/namespaces/ending") { bail!("it is there") } else { Ok(()) }
    })?;
    wait("nothing to outlive it", Duration::from_secs(10), || {
        let says = agent.says()?;
        ensure!(says.get("outliving").is_none(), "{says}");
        Ok(())
    })?;
    let sent: usize = senders.into_iter().map(|sender| sender.end().map(|sent| sent.len())).sum::<Result<_>>()?;
    let through: Vec<Heard> = receiver.end()?.into_iter().filter(|heard| heard.packet.sent > walled_since).collect();
    println!("{sent} packets sent; {} heard behind the wall", through.len());
    ensure!(through.is_empty(), "{} packets of {sent} came through, the first: {:?}", through.len(), through.first());
    cluster.down()
}
