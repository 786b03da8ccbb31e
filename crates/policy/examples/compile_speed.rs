//! Times compilations of a large cluster: `cargo run --profile bench-lab -p towpath-policy --example compile_speed [policies] [pods] [label sets]`.
//!
//! Prints medians: of a first compilation, of one that looks at everything again, and of those that follow one change.
#![allow(clippy::expect_used, reason = "a measurement, run by hand")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use towpath_model::desired::PolicyImage;
use towpath_model::labels::Requirement;
use towpath_model::{
    Enforcement, Labels, NamedPort, Namespace, NamespacedName, NetworkPolicy, NodeName, Peer, Phase, Pod, PolicyPort,
    PolicyRule, PortMatch, Protocol, Selector, World,
};
use towpath_policy::check::Checker;
use towpath_policy::compile::Touched;
use towpath_policy::{Compiler, View};

/// Pods of one node, as kubelet's default allows.
const PER_NODE: usize = 110;
const NAMESPACES: usize = 50;

fn labels(pairs: &[(&str, String)]) -> Labels {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect()
}

/// A number that has nothing to do with the index, so that each node has pods of most namespaces.
fn scattered(index: usize) -> usize {
    index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33
}

/// Pod `i` is spread over nodes and namespaces like the scheduler would.
fn pod(index: usize, nodes: usize, apps: usize) -> Pod {
    let app = index % apps;
    let octets = [
        10,
        u8::try_from(index / 65536).unwrap_or(255),
        u8::try_from(index / 256 % 256).unwrap_or(0),
        u8::try_from(index % 256).unwrap_or(0),
    ];
    Pod {
        name: NamespacedName::new(format!("ns{}", app % NAMESPACES), format!("pod{index}")),
        uid: Default::default(),
        labels: labels(&[
            ("app", format!("app{app}")),
            ("pod-template-hash", format!("{:x}", app * 7919)),
            ("tier", format!("t{}", app % 4)),
        ])
        .into(),
        daemon_set: None,
        node: Some(NodeName::new(format!("node{}", scattered(index) % nodes))),
        ips: vec![octets.into()].into(),
        named_ports: vec![NamedPort { name: "http".to_owned(), protocol: Protocol::Tcp, number: 8080 }].into(),
        host_ports: Default::default(),
        host_network: false,
        phase: Phase::Running,
        terminating: false,
        ready: true,
        socket_services: Default::default(),
        chosen: None,
        bandwidth: None,
    }
}

fn equals(key: &str, value: String) -> Selector {
    Selector::of([Requirement::In(key.to_owned(), BTreeSet::from([value]))])
}

/// Policy `i` selects a tier of a namespace, allows other apps in by name, and lets out to DNS, one app and a block.
fn policy(index: usize, apps: usize, port: u16) -> NetworkPolicy {
    let ports = vec![
        PolicyPort { protocol: Protocol::Tcp, port: PortMatch::Named("http".to_owned()) },
        PolicyPort { protocol: Protocol::Tcp, port: PortMatch::Range(port, port + 1000) },
    ];
    let app = |n: usize| Peer::Pods {
        namespaces: Some(Selector::everything()),
        pods: equals("app", format!("app{}", n % apps)),
    };
    let block = |n: usize| Peer::IpBlock {
        cidr: format!("172.{}.{}.0/24", 16 + n % 16, n / 16 % 256).parse().expect("a CIDR"),
        except: Vec::new(),
    };
    NetworkPolicy {
        name: NamespacedName::new(format!("ns{}", index % NAMESPACES), format!("policy{index}")),
        pod_selector: equals("tier", format!("t{}", index / NAMESPACES % 4)),
        ingress: Some(vec![PolicyRule { peers: vec![app(index * 3), app(index * 7 + 1)], ports: ports.clone() }]),
        egress: Some(vec![
            PolicyRule { peers: vec![app(index * 5 + 2), block(index)], ports },
            PolicyRule {
                peers: vec![Peer::Pods {
                    namespaces: Some(Selector::everything()),
                    pods: equals("k8s-app", "kube-dns".to_owned()),
                }],
                ports: vec![PolicyPort { protocol: Protocol::Udp, port: PortMatch::Range(53, 53) }],
            },
        ]),
        enforcement: Enforcement::Enforced,
    }
}

fn world(policies: usize, pods: usize, apps: usize) -> World {
    let nodes = pods.div_ceil(PER_NODE).max(1);
    let mut world = World::default();
    for n in 0..NAMESPACES {
        let name = format!("ns{n}");
        let labels = labels(&[("kubernetes.io/metadata.name", name.clone())]);
        world.namespaces.insert(
            name.clone(),
            Namespace { name, labels, socket_services: Default::default(), pods_choose: false, terminating: false },
        );
    }
    world.pods = (0..pods).map(|i| pod(i, nodes, apps)).map(|p| (p.name.clone(), p)).collect();
    world.policies = (0..policies).map(|i| policy(i, apps, 9000)).map(|p| (p.name.clone(), p)).collect();
    world
}

/// Pages of this process in memory, in bytes.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or_default() * 4096
}

/// For how long this thread had a processor so far.
fn processor_time() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

/// What followed a change: how long, and how many entries became others.
#[derive(Default)]
struct Followed {
    times: Vec<Duration>,
    /// And for how long of that it had a processor.
    compiled: Vec<Duration>,
    /// What the translation check of it took.
    checks: Vec<Duration>,
    /// And for how long of that it had a processor: others take turns.
    worked: Vec<Duration>,
    entries: Vec<usize>,
    /// So many checks read everything anew.
    anew: usize,
}

/// Whoever follows changes.
struct Followers {
    compiler: Compiler,
    checker: Checker,
}

impl Followers {
    fn new() -> Self {
        Self { compiler: Compiler::new(Duration::from_secs(5)), checker: Checker::new(NodeName::new("node0")) }
    }
}

impl Followed {
    fn follow(&mut self, followers: &mut Followers, world: &World, now: Duration, touched: &Touched) {
        let (view, node) = (View::of(world), NodeName::new("node0"));
        let Followers { compiler, checker } = followers;
        let (start, worked) = (Instant::now(), processor_time());
        compiler.follow(&view, &node, now, touched).expect("not too large");
        self.times.push(start.elapsed());
        self.compiled.push(processor_time().saturating_sub(worked));
        let (start, worked) = (Instant::now(), processor_time());
        let checked = checker.follow(&view, compiler.image(), compiler.changes(), touched);
        self.checks.push(start.elapsed());
        self.worked.push(processor_time().saturating_sub(worked));
        let checked = checked.expect("what was compiled is what was written");
        self.anew += usize::from(checked.anew);
        self.entries.push(compiler.changes().map_or(0, |changes| changes.len()));
    }

    fn say(mut self, what: &str) {
        self.times.sort_unstable();
        self.compiled.sort_unstable();
        self.checks.sort_unstable();
        self.worked.sort_unstable();
        self.entries.sort_unstable();
        let (middle, last) = (self.times.len() / 2, self.times.len() - 1);
        let (median, most) = (self.times.get(middle), self.times.get(last));
        let entries = self.entries.get(middle).copied().unwrap_or_default();
        println!(
            "{what}: {:?} (median of {}, slowest {:?}; at work {:?}, {:?}), {entries} entries; check {:?} (slowest {:?}; at work {:?}, {:?}), {} anew",
            median.copied().unwrap_or_default(),
            self.times.len(),
            most.copied().unwrap_or_default(),
            self.compiled.get(middle).copied().unwrap_or_default(),
            self.compiled.get(last).copied().unwrap_or_default(),
            self.checks.get(middle).copied().unwrap_or_default(),
            self.checks.get(last).copied().unwrap_or_default(),
            self.worked.get(middle).copied().unwrap_or_default(),
            self.worked.get(last).copied().unwrap_or_default(),
            self.anew
        );
    }
}

/// The slowest of so many is about what one of a hundred takes.
const ROUNDS: usize = 101;

/// Gives every pod that `which` picks another `app` label, one after another, each a change of its own.
fn relabel(
    followers: &mut Followers,
    world: &mut World,
    now: Duration,
    apps: usize,
    which: impl Fn(&Pod) -> bool,
) -> Followed {
    let mut followed = Followed::default();
    let mut names: Vec<NamespacedName> = world.pods.values().filter(|p| which(p)).map(|p| p.name.clone()).collect();
    names.sort_by_key(|name| scattered(name.name.len() + name.name.bytes().map(usize::from).sum::<usize>()));
    names.truncate(ROUNDS);
    for (round, name) in names.into_iter().enumerate() {
        if let Some(pod) = world.pods.get_mut(&name) {
            pod.labels.insert("app".to_owned(), format!("app{}", (round * 97 + 13) % apps));
        }
        let mut touched = Touched::nothing();
        touched.pod(name);
        followed.follow(followers, world, now, &touched);
    }
    followed
}

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|a| a.parse::<usize>().ok());
    let (policies, pods) = (numbers.next().unwrap_or(1000), numbers.next().unwrap_or(5000));
    let apps = numbers.next().unwrap_or(pods / 10).max(1);
    let mut world = world(policies, pods, apps);
    let (node, before) = (NodeName::new("node0"), resident());
    let mut followers = Followers::new();
    followers.compiler.follow(&View::of(&world), &node, Duration::ZERO, &Touched::everything()).expect("not too large");
    let (grown, before) = (resident().saturating_sub(before), resident());
    followers
        .checker
        .check(&View::of(&world), followers.compiler.image())
        .expect("what was compiled is what was written");
    let kept = resident().saturating_sub(before);
    let mut now = Duration::from_secs(1);
    let (mut first, mut again) = (Followed::default(), Followed::default());
    for _ in 0..3 {
        again.follow(&mut followers, &world, now, &Touched::everything());
        let mut other = Followers::new();
        first.follow(&mut other, &world, now, &Touched::everything());
    }
    let image: &PolicyImage = followers.compiler.image();
    println!("{policies} policies, {pods} pods of {apps} label sets, {} of them on the node", image.pods.len());
    println!(
        "image: {} sets, {} pod classes, {} CIDR classes, {} class entries, {} rows",
        image.isolating.len(),
        image.pod_classes.len(),
        image.cidr_classes.len(),
        image.set_classes.len(),
        image.rows.len()
    );
    println!("compiler and image: {grown} B, {} B a pod", grown / pods.max(1));
    println!("what the check keeps: {kept} B, {} B a pod", kept / pods.max(1));
    first.say("first");
    again.say("everything again");
    let remote = |pod: &Pod| pod.node.as_ref() != Some(&node);
    relabel(&mut followers, &mut world, now, apps, remote).say("label of a pod elsewhere");
    relabel(&mut followers, &mut world, now, apps, |pod| !remote(pod)).say("label of a pod here");
    let (mut edited, mut expired) = (Followed::default(), Followed::default());
    for round in 0..ROUNDS {
        let next = policy(round, apps, 9001 + u16::try_from(round).unwrap_or(0));
        let mut touched = Touched::nothing();
        touched.policy(next.name.clone());
        world.policies.insert(next.name.clone(), next);
        edited.follow(&mut followers, &world, now, &touched);
        now += Duration::from_secs(6);
        expired.follow(&mut followers, &world, now, &Touched::nothing());
    }
    edited.say("rules of a policy");
    expired.say("sets that nobody has leave");
    let (mut edited, mut expired) = (Followed::default(), Followed::default());
    let server = world.pods.values().find(|pod| !remote(pod)).map(|pod| pod.name.clone()).expect("a pod of the node");
    for round in 0..ROUNDS {
        let spec = policy(round * 7, apps, 9000);
        let mut next = NetworkPolicy { name: NamespacedName::new(&server.namespace, "zz-one"), ..spec };
        next.pod_selector = world
            .pods
            .get(&server)
            .map(|pod| Selector::equals(pod.labels.iter().map(|(k, v)| (k.clone(), v.clone()))))
            .expect("it is there");
        next.egress = None;
        let mut touched = Touched::nothing();
        touched.policy(next.name.clone());
        world.policies.insert(next.name.clone(), next);
        edited.follow(&mut followers, &world, now, &touched);
        now += Duration::from_secs(6);
        expired.follow(&mut followers, &world, now, &Touched::nothing());
    }
    edited.say("rules of a policy for a pod here");
    expired.say("sets that it had leave");
    let mut renamed = Followed::default();
    for round in 0..ROUNDS {
        let name = format!("ns{}", round % NAMESPACES);
        if let Some(namespace) = world.namespaces.get_mut(&name) {
            namespace.labels.insert("round".to_owned(), round.to_string());
        }
        let mut touched = Touched::nothing();
        touched.namespace(name);
        renamed.follow(&mut followers, &world, now, &touched);
    }
    renamed.say("labels of a namespace");
}
