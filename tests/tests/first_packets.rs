//! A pod's first instruction sends, and somebody sends to it from its first moment on: no packet contrary to policy, with agents that run, that lag
//! behind the API server, that are stopped for a while and that are killed, and 64 ADDs at once.
//!
//! Sandboxes are made here and attached by the plugin, as a container runtime does. What sends in them does so before the device is there, so that
//! the first packet that can go at all goes. `TOWPATH_FULL=1`: two thousand pods instead of two hundred (nextest's
//! profile `full` has the time).

#![allow(clippy::indexing_slicing, reason = "indexes are counted here")]

#[path = "first_packets/pod.rs"]
mod pod;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use towpath_walkthrough::api::{Api, cut_off, join_again, server_address};
use towpath_walkthrough::cluster::{Cluster, Families, usable_kubectl, wait};
use towpath_walkthrough::in_force::Acknowledging;
use towpath_walkthrough::libcni::Libcni;
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, address};
use towpath_walkthrough::pods::shell;
use towpath_walkthrough::traffic::{Clock, Flow, Heard, Receiver, Sender};

use pod::{Outcome, Role, Surroundings};

/// ADDs at once.
const WORKERS: usize = 64;
/// How often agents are killed: one that starts is waited for.
const KILLS: usize = 6;
/// How often each node lags: in the end it must be able to follow.
const ROUNDS_EACH: usize = 3;
/// Where anybody may send, and where only friends.
const OPEN: u16 = 7777;
/// The port that others knock at in new pods.
pub(crate) const KNOCK: u16 = 9000;

const RULES: &str = r#"---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends-only}
spec:
  podSelector: {matchLabels: {app: guarded}}
  ingress: [{from: [{podSelector: {matchLabels: {role: friend}}}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: quiet}
spec: {podSelector: {matchLabels: {role: quiet}}, policyTypes: [Egress]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: walled}
spec: {podSelector: {matchLabels: {role: walled}}, policyTypes: [Ingress]}
"#;

/// What is done to agents while pods start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Trouble {
    Calm,
    /// Nodes hear nothing of the API server for a while; agents are stopped for a while.
    Lagging,
    Killed,
}

impl Trouble {
    const ALL: [Trouble; 3] = [Trouble::Calm, Trouble::Lagging, Trouble::Killed];

    /// Goes on until it is over.
    fn make(
        self,
        cluster: &Cluster,
        nodes: &[String],
        server: &str,
        over: &AtomicBool,
        count: &AtomicUsize,
    ) -> Result<()> {
        let mut turn = 0;
        while self != Trouble::Calm && !over.load(Ordering::Relaxed) {
            let node = &nodes[turn % nodes.len()];
            turn += 1;
            let most = if self == Trouble::Killed { KILLS } else { ROUNDS_EACH * nodes.len() };
            if turn > most {
                return Ok(());
            }
            // Not as long as a round of it: that a moment has nothing to do with ADDs' steps.
            let moment = Duration::from_millis(37 * (turn as u64 % 11));
            match self {
                Trouble::Calm => {}
                Trouble::Lagging if turn % 2 == 0 => {
                    if let Ok(pid) = machine::lab_agent(cluster.name(), node) {
                        let _frozen = machine::freeze(pid)?;
                        std::thread::sleep(Duration::from_millis(100) + moment);
                    }
                }
                Trouble::Lagging => {
                    cut_off(cluster, node, server)?;
                    std::thread::sleep(Duration::from_millis(700) + moment * 4);
                    join_again(cluster, node, server)?;
                }
                Trouble::Killed => {
                    // Wherever it is with an ADD, but not before it has taken one: the supervisor waits ever longer before it starts one again.
                    let works = Acknowledging::of(cluster.name(), node)
                        .says()
                        .is_ok_and(|says| says.pointer("/kinds/Pod").is_some());
                    if !works {
                        std::thread::sleep(Duration::from_millis(20));
                        turn -= 1;
                        continue;
                    }
                    std::thread::sleep(moment);
                    machine::kill(machine::lab_agent(cluster.name(), node)?)?;
                }
            }
            count.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

/// Receivers that anybody may send to, and those that hear only friends.
struct Ears {
    open: Vec<Receiver>,
    guarded: Vec<Receiver>,
}

impl Ears {
    fn have_heard(&self, number: u32, role: Role) -> bool {
        let guarded = self.guarded.iter().filter(|_| role == Role::Friend);
        self.open.iter().chain(guarded).all(|ear| ear.has_heard_of(number))
    }
}

fn role_of(number: u32) -> Role {
    // By pairs: each role on both nodes.
    Role::ALL[number as usize / 2 % Role::ALL.len()]
}

/// Lives the lives of these pods, [`WORKERS`] at once.
fn live_all(
    numbers: std::ops::Range<u32>,
    nodes: &[String],
    plugins: &[Libcni],
    around: &Surroundings<'_>,
) -> Result<BTreeMap<u32, Outcome>> {
    let left = Mutex::new(numbers.collect::<VecDeque<u32>>());
    let outcomes = Mutex::new(BTreeMap::new());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    std::thread::scope(|scope| {
        let work = || {
            while let Some(number) = next() {
                let at = number as usize % nodes.len();
                let role = role_of(number);
                let outcome = pod::live(number, role, &nodes[at], &plugins[at], around)?;
                outcomes.lock().unwrap_or_else(PoisonError::into_inner).insert(number, outcome);
            }
            Ok::<(), anyhow::Error>(())
        };
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| anyhow!("a worker panicked"))?)
    })?;
    Ok(outcomes.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Sends to every address that new pods may get, which are given out in order, again and again.
fn knock(cluster: &Cluster, name: &str, pods: u32, clock: Clock) -> Result<Sender> {
    let place = Arc::new(Place::of_pod(cluster, &cluster.wait_pod(name)?)?);
    let most = if cluster.families() == Families::Ipv4 { 254 } else { u16::try_from(pods / 2 + 20)? };
    let of_node = |node: u8| (2..=most).map(move |host| (node, host));
    let address = |(node, host): (u8, u16)| match cluster.families() {
        Families::Ipv4 => IpAddr::from([10, 244, node, host as u8]),
        _ => IpAddr::from([0xfd00, 0x10, 0x244, u16::from(node), 0, 0, 0, host]),
    };
    let flows = of_node(0).chain(of_node(1)).map(address);
    let flows = flows.map(|ip| Flow { number: 0, to: SocketAddr::new(ip, KNOCK), fresh: false, every: 1, size: 0 });
    // One socket a flow: as many datagrams a second, however many addresses there are.
    let pace = Duration::from_micros(500) * u32::from(most);
    Ok(Sender::start(place, u32::MAX, flows.collect(), pace, clock))
}

fn tell(trouble: Trouble, outcomes: &BTreeMap<u32, Outcome>, done: usize, took: Duration) {
    let mut adds: Vec<Duration> = outcomes.values().map(|outcome| outcome.add).collect();
    adds.sort_unstable();
    let at = |share: usize| adds.get(adds.len() * share / 100).copied().unwrap_or_default();
    let sum = |of: fn(&Outcome) -> usize| outcomes.values().map(of).sum::<usize>();
    println!(
        "{trouble:?} ({done} times): {} pods in {:.1} s; ADD {:?} (median), {:?} (99 %), {} failed and tried again; {} packets sent before the \
         ADD was answered, {} after",
        outcomes.len(),
        took.as_secs_f64(),
        at(50),
        at(99),
        sum(|outcome| outcome.failed),
        sum(|outcome| outcome.before),
        sum(|outcome| outcome.after)
    );
}

#[test]
fn no_first_packet_of_a_new_pod_or_to_it_is_contrary_to_policy() -> Result<()> {
    if !can_run_labs()? || !usable_kubectl() {
        println!("skipped: it needs a lab, and the proxy of a kubectl of 1.31 or newer");
        return Ok(());
    }
    let full = std::env::var_os("TOWPATH_FULL").is_some_and(|value| value == "1");
    // No address is given twice: a node's IPv4 range has 254, and what is given back rests for 30 s.
    let (count, families): (u32, Families) = if full { (2001, Families::Ipv6) } else { (201, Families::Ipv4) };
    let cluster = Cluster::up("e2e-first-packets", 2, families)?;
    let nodes = ["n1", "n2"].map(str::to_owned);
    let pods = [
        ("open-1", "n1", "open"),
        ("open-2", "n2", "open"),
        ("guarded-1", "n1", "guarded"),
        ("guarded-2", "n2", "guarded"),
    ];
    let mut manifests: String =
        pods.iter().map(|(name, node, app)| shell(name, node, &format!("app: {app}"))).collect();
    manifests += &(shell("knocker-1", "n1", "app: knocker") + &shell("knocker-2", "n2", "app: knocker"));
    cluster.apply_text(&(manifests + RULES))?;
    let clock = Clock::default();
    let (mut ears, mut targets) = (Ears { open: Vec::new(), guarded: Vec::new() }, Vec::new());
    for (name, _, app) in pods {
        let pod = cluster.wait_pod(name)?;
        let at = SocketAddr::new(address(&pod.ip)?, OPEN);
        let ear = Receiver::at(&Place::of_pod(&cluster, &pod)?, at, clock)?;
        if app == "open" {
            ears.open.push(ear)
        } else {
            ears.guarded.push(ear)
        }
        targets.push(at);
    }
    let (api, server) = (Api::of(&cluster)?, server_address(&cluster, "n1")?);
    for node in &nodes {
        let agent = Acknowledging::of(cluster.name(), node);
        wait("the policies to be in force", Duration::from_secs(20), || {
            let says = agent.says()?;
            let policies = says.pointer("/kinds/NetworkPolicy/objects").and_then(|objects| objects.as_object());
            ensure!(policies.is_some_and(|policies| policies.len() == 3), "{node} says {says}");
            Ok(())
        })?;
    }
    let knocking = ["knocker-1", "knocker-2"].map(|name| knock(&cluster, name, count, clock));
    let plugins = nodes.iter().map(|node| Libcni::of_node(&cluster, node)).collect::<Result<Vec<_>>>()?;
    let was_heard = |number: u32, role: Role| ears.have_heard(number, role);
    let around = Surroundings { api: &api, clock, targets, was_heard: &was_heard };
    let (mut all, mut failed) = (BTreeMap::new(), None);
    let share = count / 3;
    for (number, trouble) in (0_u32..).zip(Trouble::ALL) {
        let (over, done, begun) = (AtomicBool::new(false), AtomicUsize::new(0), Instant::now());
        let lived = std::thread::scope(|scope| {
            let troubled = scope.spawn(|| trouble.make(&cluster, &nodes, &server, &over, &done));
            let lived = live_all(number * share..(number + 1) * share, &nodes, &plugins, &around);
            over.store(true, Ordering::Relaxed);
            troubled.join().map_err(|_| anyhow!("panicked"))??;
            lived
        });
        // What was heard until then is judged in any case.
        let lived = match lived.with_context(|| format!("{trouble:?}")) {
            Ok(lived) => lived,
            Err(error) => {
                failed = Some(error);
                break;
            }
        };
        tell(trouble, &lived, done.load(Ordering::Relaxed), begun.elapsed());
        ensure!(
            trouble == Trouble::Calm || done.load(Ordering::Relaxed) > 1,
            "{trouble:?}: nothing happened to any agent"
        );
        all.extend(lived);
    }
    for knocker in knocking {
        let sent = knocker?.end()?.len();
        ensure!(sent > 1000, "a knocker sent {sent} packets only");
    }
    let ears = [(false, ears.open), (true, ears.guarded)];
    let mut contrary: Vec<String> = Vec::new();
    let mut heard: BTreeMap<Role, usize> = BTreeMap::new();
    for (guarded, ears) in ears {
        for Heard { packet, at } in
            ears.into_iter().map(Receiver::end).collect::<Result<Vec<_>>>()?.into_iter().flatten()
        {
            if packet.sender >= count {
                continue;
            }
            let (name, role) = (packet.sender, role_of(packet.sender));
            *heard.entry(role).or_default() += 1;
            if role == Role::Quiet || (guarded && role != Role::Friend) {
                let answered = all.get(&name).map_or(u64::MAX, |outcome| outcome.answered);
                let before = if packet.sent < answered { "before" } else { "after" };
                contrary.push(format!(
                    "{role:?} new-{name}, {before} its ADD was answered, to {}, heard {at}",
                    packet.flow
                ));
            }
        }
    }
    let knocked =
        |role: Role| all.values().filter(|outcome| outcome.role == role).map(|outcome| outcome.received).sum::<usize>();
    println!(
        "heard of new pods: {heard:?}; knocks heard in open ones {}, in walled ones {}",
        knocked(Role::Friend),
        knocked(Role::Walled)
    );
    ensure!(
        contrary.is_empty(),
        "{} packets contrary to policy:\n{}",
        contrary.len(),
        contrary[..contrary.len().min(12)].join("\n")
    );
    ensure!(knocked(Role::Walled) == 0, "{} packets reached pods that nobody may send to", knocked(Role::Walled));
    if let Some(error) = failed {
        return Err(error);
    }
    let early: usize = all.values().map(|outcome| outcome.before).sum();
    ensure!(
        early > 0 && knocked(Role::Friend) > 0 && heard.contains_key(&Role::Stranger),
        "too little was tried: {early} early packets"
    );
    cluster.down()
}
