//! Times `verify diff` on a generated cluster: `cargo run --profile bench-lab -p towpath-policy --example verify_speed [policies] [workloads]`.
//!
//! Before and after differ in one policy, in a tenth of them, and in all. Prints the median of seven runs of each.
#![allow(clippy::expect_used, reason = "a measurement, run by hand")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use towpath_model::labels::Requirement;
use towpath_model::{
    Enforcement, NamespacedName, NetworkPolicy, Peer, PolicyPort, PolicyRule, PortMatch, Protocol, Selector, World,
};
use towpath_policy::verify::diff::diff;
use towpath_policy::verify::reach::reach;
use towpath_policy::verify::{Change, Owners, Universe};

const NAMESPACES: usize = 25;

fn equals(key: &str, value: String) -> Selector {
    Selector::of([Requirement::In(key.to_owned(), BTreeSet::from([value]))])
}

fn pod(index: usize) -> towpath_model::Pod {
    let object = serde_json::json!({
        "metadata": {"namespace": format!("ns{}", index % NAMESPACES), "name": format!("app{index}"),
            "labels": {"app": format!("app{index}"), "tier": format!("t{}", index % 4)}},
        "spec": {"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8000 + index % 7}]}]}});
    let object: k8s_openapi::api::core::v1::Pod = serde_json::from_value(object).expect("a pod");
    towpath_model::Pod::try_from(&object).expect("a pod")
}

/// Policy `index` lets two applications and a block in to an application (every eighth: a tier of its namespace), and out to one.
fn policy(index: usize, workloads: usize, port: u16) -> NetworkPolicy {
    let app = |n: usize| Peer::Pods {
        namespaces: Some(Selector::everything()),
        pods: equals("app", format!("app{}", n % workloads)),
    };
    let block = Peer::IpBlock {
        cidr: format!("172.{}.{}.0/24", 16 + index % 16, index / 16 % 256).parse().expect("a CIDR"),
        except: Vec::new(),
    };
    let ports = vec![
        PolicyPort { protocol: Protocol::Tcp, port: PortMatch::Named("http".to_owned()) },
        PolicyPort { protocol: Protocol::Tcp, port: PortMatch::Range(port, port + 10) },
    ];
    let selector = match index % 8 {
        0 => equals("tier", format!("t{}", index / 8 % 4)),
        _ => equals("app", format!("app{}", index % workloads)),
    };
    NetworkPolicy {
        name: NamespacedName::new(format!("ns{}", index % NAMESPACES), format!("policy{index}")),
        pod_selector: selector,
        ingress: Some(vec![PolicyRule {
            peers: vec![app(index * 3), app(index * 7 + 1), block],
            ports: ports.clone(),
        }]),
        egress: index.is_multiple_of(4).then(|| vec![PolicyRule { peers: vec![app(index * 5)], ports }]),
        enforcement: Enforcement::Enforced,
    }
}

fn world(policies: usize, workloads: usize, changed: usize) -> World {
    let mut world = World::default();
    for pod in (0..workloads).map(pod) {
        world.pods.insert(pod.name.clone(), pod);
    }
    for index in 0..policies {
        let policy = policy(index, workloads, if index < changed { 9100 } else { 9000 });
        world.policies.insert(policy.name.clone(), policy);
    }
    world
}

fn median(mut run: impl FnMut() -> usize) -> (Duration, usize) {
    let mut rows = 0;
    let mut times: Vec<Duration> = (0..7)
        .map(|_| {
            let begun = Instant::now();
            rows = run();
            begun.elapsed()
        })
        .collect();
    times.sort_unstable();
    (times.get(3).copied().unwrap_or_default(), rows)
}

fn main() {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<usize>().expect("a number"));
    let (policies, workloads) = (arguments.next().unwrap_or(1000), arguments.next().unwrap_or(500));
    println!("{policies} policies, {workloads} workloads");
    for changed in [1, policies / 10, policies] {
        let (time, rows) = median(|| {
            let (before, after) = (world(policies, workloads, 0), world(policies, workloads, changed));
            let difference = diff(&Change::of((before, &Owners::new()), (after, &Owners::new()), &[]));
            difference.allowed.len() + difference.denied.len()
        });
        println!("diff, {changed} changed: {time:.1?} ({rows} rows)");
    }
    let (time, rows) =
        median(|| reach(&Universe::of(world(policies, workloads, 0), &Owners::new(), &[]), None).rows.len());
    println!("reach: {time:.1?} ({rows} rows)");
}
