//! Times a compilation of a large cluster: `cargo run --profile ci -p towpath-policy --example compile_speed [policies] [pods]`.
//!
//! Prints the medians for a first compilation, one where nothing changed, and one after a policy changed.
#![allow(clippy::expect_used, reason = "a measurement, run by hand")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use towpath_model::desired::PolicyImage;
use towpath_model::labels::Requirement;
use towpath_model::{
    Labels, NamedPort, Namespace, NamespacedName, NetworkPolicy, NodeName, Peer, Phase, Pod, PolicyPort, PolicyRule,
    PortMatch, Protocol, Selector, World,
};
use towpath_policy::{Compiler, View};

/// Pods of one node, as kubelet's default allows.
const PER_NODE: usize = 110;
const NAMESPACES: usize = 50;
/// Pods of a Deployment.
const REPLICAS: usize = 5;

fn labels(pairs: &[(&str, String)]) -> Labels {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect()
}

/// Pod `i` is spread over nodes and namespaces like the scheduler would.
fn pod(index: usize, nodes: usize) -> Pod {
    let app = index / REPLICAS;
    let octets = [
        10,
        u8::try_from(index / 65536).unwrap_or(255),
        u8::try_from(index / 256 % 256).unwrap_or(0),
        u8::try_from(index % 256).unwrap_or(0),
    ];
    Pod {
        name: NamespacedName::new(format!("ns{}", app % NAMESPACES), format!("pod{index}")),
        uid: String::new(),
        labels: labels(&[
            ("app", format!("app{app}")),
            ("pod-template-hash", format!("{:x}", app * 7919)),
            ("tier", format!("t{}", app % 4)),
            ("apps.kubernetes.io/pod-index", format!("{}", index % REPLICAS)),
        ]),
        daemon_set: None,
        node: Some(NodeName::new(format!("node{}", index % nodes))),
        ips: vec![octets.into()],
        named_ports: vec![NamedPort { name: "http".to_owned(), protocol: Protocol::Tcp, number: 8080 }],
        host_ports: Vec::new(),
        host_network: false,
        phase: Phase::Running,
        terminating: false,
        ready: true,
        hostname: None,
        subdomain: None,
        socket_services: Default::default(),
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
    }
}

fn world(policies: usize, pods: usize) -> World {
    let nodes = pods.div_ceil(PER_NODE).max(1);
    let mut world = World::default();
    for n in 0..NAMESPACES {
        let name = format!("ns{n}");
        let labels = labels(&[("kubernetes.io/metadata.name", name.clone())]);
        world.namespaces.insert(name.clone(), Namespace { name, labels, socket_services: Default::default() });
    }
    world.pods = (0..pods).map(|i| pod(i, nodes)).map(|p| (p.name.clone(), p)).collect();
    let apps = pods.div_ceil(REPLICAS).max(1);
    world.policies = (0..policies).map(|i| policy(i, apps, 9000)).map(|p| (p.name.clone(), p)).collect();
    world
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|a| a.parse::<usize>().ok());
    let (policies, pods) = (numbers.next().unwrap_or(1000), numbers.next().unwrap_or(5000));
    let mut world = world(policies, pods);
    let node = NodeName::new("node0");
    let apps = pods.div_ceil(REPLICAS).max(1);
    let (mut first, mut again, mut changed) = (Vec::new(), Vec::new(), Vec::new());
    let mut image = PolicyImage::default();
    for round in 0..15u16 {
        let mut compiler = Compiler::new(Duration::from_secs(5));
        let mut timed = |world: &World, times: &mut Vec<Duration>| {
            let start = Instant::now();
            image = compiler.compile(&View::of(world), &node, Duration::from_secs(1));
            times.push(start.elapsed());
        };
        timed(&world, &mut first);
        timed(&world, &mut again);
        let edited = policy(0, apps, 9001 + round);
        world.policies.insert(edited.name.clone(), edited);
        timed(&world, &mut changed);
    }
    println!("{policies} policies, {pods} pods, {} of them on the node", image.pods.len());
    println!(
        "image: {} sets, {} pod classes, {} CIDR classes, {} class entries, {} rows",
        image.isolating.len(),
        image.pod_classes.len(),
        image.cidr_classes.len(),
        image.set_classes.len(),
        image.rows.len()
    );
    println!(
        "first {:?}, unchanged {:?}, one policy changed {:?} (medians of 15)",
        median(first),
        median(again),
        median(changed)
    );
}
