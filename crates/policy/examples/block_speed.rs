//! Times the compilation and the check of policies with many different blocks of addresses:
//! `cargo run -p towpath-policy --example block_speed [blocks] [shape]…`. Without shapes: all.
//!
//! Two sizes a shape, one half the other: what grows with the square shows as a ratio of four. Time is this thread's own on the processor.
#![allow(clippy::expect_used, reason = "a measurement, run by hand")]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use towpath_model::{
    Enforcement, Labels, NamespacedName, NetworkPolicy, NodeName, Peer, Phase, Pod, PolicyPort, PolicyRule, PortMatch,
    Protocol, Selector, World,
};
use towpath_policy::check::check;
use towpath_policy::compile::Touched;
use towpath_policy::{Compiler, View};

/// What this thread has used of the processor, in nanoseconds.
fn used() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or_default())
}

/// The most memory that this process ever had, in MiB.
fn most_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or_default() >> 10
}

fn v4(address: u32, bits: u8) -> IpNet {
    Ipv4Net::new(Ipv4Addr::from(address), bits).expect("a length").trunc().into()
}

fn v6(index: u32, bits: u8) -> IpNet {
    let address = (0x2001_0db8_u128 << 96) | (u128::from(index) << 64);
    Ipv6Net::new(Ipv6Addr::from(address), bits).expect("a length").trunc().into()
}

fn block(cidr: IpNet, except: Vec<IpNet>) -> Peer {
    Peer::IpBlock { cidr, except }
}

fn rule(peers: Vec<Peer>, port: Option<u16>) -> PolicyRule {
    let port = port.map(|n| PolicyPort { protocol: Protocol::Tcp, port: PortMatch::Range(n, n) });
    PolicyRule { peers, ports: port.into_iter().collect() }
}

/// Selects the pods labelled `own=<index>`; none: all.
fn policy(name: String, own: Option<usize>, ingress: Vec<PolicyRule>) -> NetworkPolicy {
    let labels = own.map(|own| ("own".to_owned(), own.to_string()));
    NetworkPolicy {
        name: NamespacedName::new("default", name),
        pod_selector: labels.map_or_else(Selector::everything, |label| Selector::of([equals(label)])),
        ingress: Some(ingress),
        egress: None,
        enforcement: Enforcement::Enforced,
    }
}

fn equals((key, value): (String, String)) -> towpath_model::labels::Requirement {
    towpath_model::labels::Requirement::In(key, [value].into())
}

fn pod(index: usize) -> Pod {
    Pod {
        name: NamespacedName::new("default", format!("p{index}")),
        uid: Default::default(),
        labels: Labels::from([("own".to_owned(), index.to_string())]).into(),
        daemon_set: None,
        node: Some(NodeName::new("n1")),
        ips: vec![Ipv4Addr::from(0x0aff_0000 + u32::try_from(index).unwrap_or(0)).into()].into(),
        named_ports: Default::default(),
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

/// Blocks next to each other with a gap between.
fn apart(first: u32, count: u32) -> Vec<Peer> {
    (first..first + count).map(|n| block(v4(0x0100_0000 + 2 * n, 32), Vec::new())).collect()
}

/// The policies of a shape with so many blocks.
fn shape(name: &str, blocks: u32) -> Option<Vec<NetworkPolicy>> {
    let one = |peers| vec![policy("p".to_owned(), None, vec![rule(peers, None)])];
    Some(match name {
        "apart" => one(apart(0, blocks)),
        "apart-v6" => one((0..blocks).map(|n| block(v6(n, 64), Vec::new())).collect()),
        // Each overlaps the one before it, and has holes that the next ones fill again.
        "holes" => {
            let base = |n: u32| 0x0a00_0000 + (n << 8);
            one((0..blocks).map(|n| block(v4(base(n), 23), vec![v4(base(n), 25), v4(base(n), 24)])).collect())
        }
        // All of them cover all, but for one address each.
        "covering" => one((0..blocks).map(|n| block(v4(0, 1), vec![v4(2 * n, 32)])).collect()),
        "covering-v6" => one((0..blocks).map(|n| block(v6(0, 32), vec![v6(n, 64)])).collect()),
        // One in the other, as deep as lengths go.
        "nested" => one((0..blocks)
            .map(|n| block(v4((n / 20) << 20, u8::try_from(12 + n % 20).unwrap_or(32)), Vec::new()))
            .collect()),
        "ports" => {
            let port = |n: u32| u16::try_from(1 + n % 60_000).ok();
            let rules = apart(0, blocks).into_iter().zip(0..).map(|(peer, n)| rule(vec![peer], port(n)));
            vec![policy("p".to_owned(), None, rules.collect())]
        }
        "five" => (0..5)
            .map(|p| policy(format!("p{p}"), None, vec![rule(apart(p * (blocks / 5), blocks / 5), None)]))
            .collect(),
        "policies" => apart(0, blocks)
            .into_iter()
            .zip(0..)
            .map(|(peer, n): (_, usize)| policy(format!("p{n}"), None, vec![rule(vec![peer], None)]))
            .collect(),
        "sets" => (0..20u32)
            .map(|p| {
                let own = usize::try_from(p).ok();
                policy(format!("p{p}"), own, vec![rule(apart(p * (blocks / 20), blocks / 20), None)])
            })
            .collect(),
        _ => return None,
    })
}

const SHAPES: [&str; 10] =
    ["apart", "apart-v6", "holes", "covering", "covering-v6", "nested", "ports", "five", "policies", "sets"];

fn main() {
    let mut arguments = std::env::args().skip(1).peekable();
    let blocks = arguments.next_if(|a| a.parse::<u32>().is_ok()).and_then(|a| a.parse().ok()).unwrap_or(10_000);
    let mut shapes: Vec<String> = arguments.collect();
    if shapes.is_empty() {
        shapes = SHAPES.map(str::to_owned).to_vec();
    }
    let node = NodeName::new("n1");
    for name in shapes {
        for blocks in [blocks / 2, blocks] {
            let Some(policies) = shape(&name, blocks) else { continue };
            let world = World {
                pods: (0..20).map(pod).map(|p| (p.name.clone(), p)).collect(),
                policies: policies.into_iter().map(|p| (p.name.clone(), p)).collect::<BTreeMap<_, _>>(),
                ..World::default()
            };
            let view = View::of(&world);
            let mut compiler = Compiler::new(Duration::from_secs(5));
            let start = used();
            compiler.follow(&view, &node, Duration::ZERO, &Touched::everything()).expect("not too large");
            let compiled = used() - start;
            let start = used();
            check(&view, &node, compiler.image()).expect("what was compiled is what was written");
            let checked = used() - start;
            let counts = compiler.counts();
            println!(
                "{name} {blocks}: compile {compiled:?}, check {checked:?}; {} sets, {} classes, {} class entries, {} rows, {} ranges; {} MiB at most so far",
                counts.sets,
                counts.classes,
                counts.set_classes,
                counts.rows,
                counts.ranges,
                most_memory()
            );
        }
    }
}
