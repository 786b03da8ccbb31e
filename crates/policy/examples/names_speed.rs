//! Times what a new address of a name costs beside many blocks and names: `cargo run -p towpath-policy --example names_speed [blocks] [names]`.
//!
//! Medians of 21 new addresses one after another.
#![allow(clippy::expect_used, reason = "a measurement, run by hand")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use towpath_model::{ClusterNetworkPolicy, DomainName, NamespacedName, NetworkPolicy, NodeName, Pod, World};
use towpath_policy::check::Checker;
use towpath_policy::compile::Touched;
use towpath_policy::names::{Learned, Limits};
use towpath_policy::{Compiler, View};

fn address(first: u32, index: u32) -> String {
    Ipv4Addr::from(first + 2 * index).to_string()
}

fn world(blocks: u32) -> World {
    let pod = |index: u32| {
        let object = serde_json::json!({
            "metadata": {"namespace": "n", "name": format!("p{index}"), "uid": "u"},
            "spec": {"nodeName": "n1", "containers": []},
            "status": {"phase": "Running", "podIPs": [{"ip": address(0x0aff_0000, index)}]},
        });
        let object: k8s_openapi::api::core::v1::Pod = serde_json::from_value(object).expect("a pod");
        Pod::try_from(&object).expect("a pod")
    };
    let peers: Vec<_> = (0..blocks)
        .map(|n| serde_json::json!({"ipBlock": {"cidr": format!("{}/32", address(0x0100_0000, n))}}))
        .collect();
    let policy = serde_json::json!({
        "metadata": {"namespace": "n", "name": "blocks"},
        "spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": peers}]},
    });
    let policy: k8s_openapi::api::networking::v1::NetworkPolicy = serde_json::from_value(policy).expect("a policy");
    let policy = NetworkPolicy::try_from(&policy).expect("a policy");
    let named = serde_json::json!({
        "metadata": {"name": "names"},
        "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
            "egress": [{"action": "Accept", "to": [{"domainNames": ["*.example.com"]}]}]},
    });
    let named: towpath_model::cluster_policy::object::ClusterNetworkPolicy =
        serde_json::from_value(named).expect("a policy");
    let (named, _) = ClusterNetworkPolicy::fail_closed(&named).expect("a policy");
    World {
        pods: (0..20).map(pod).map(|pod| (pod.name.clone(), pod)).collect(),
        policies: [(policy.name.clone(), policy)].into(),
        cluster_policies: [("names".to_owned(), named)].into(),
        ..World::default()
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|a| a.parse::<u32>().ok());
    let (blocks, names) = (numbers.next().unwrap_or(10_000), numbers.next().unwrap_or(8_000));
    let (world, node) = (world(blocks), NodeName::new("n1"));
    let given: BTreeMap<NamespacedName, Vec<IpAddr>> = BTreeMap::new();
    let asked = [DomainName { below: true, name: "example.com".to_owned() }];
    let mut learned = Learned::new(Limits::default());
    let learn = |learned: &mut Learned, index: u32| {
        let address: IpAddr = address(0xc612_0000, index).parse().expect("an address");
        learned.learn(&format!("h{index}.example.com"), [address], Duration::from_secs(60), &asked);
    };
    (0..names).for_each(|index| learn(&mut learned, index));
    let mut compiler = Compiler::new(Duration::from_secs(5));
    let view = View { world: &world, dns: &[], pod_ips: &given, names: &learned };
    compiler.follow(&view, &node, Duration::ZERO, &Touched::everything()).expect("not too large");
    let mut checker = Checker::new(node.clone());
    checker.check(&view, compiler.image()).expect("what was compiled is what was written");
    let (mut compiled, mut checked, mut entries) = (Vec::new(), Vec::new(), 0);
    for turn in 0..21 {
        learn(&mut learned, names + turn);
        let view = View { world: &world, dns: &[], pod_ips: &given, names: &learned };
        let start = Instant::now();
        compiler.follow(&view, &node, Duration::ZERO, &Touched::nothing()).expect("not too large");
        compiled.push(start.elapsed());
        let start = Instant::now();
        let changes = compiler.changes().expect("it follows");
        let checked_now = checker.follow(&view, compiler.image(), Some(changes), &Touched::nothing());
        checked_now.expect("what was compiled is what was written");
        checked.push(start.elapsed());
        entries = changes.len();
    }
    println!(
        "{blocks} blocks, {names} names: compile {:?}, check {:?}, {entries} entries",
        median(compiled),
        median(checked)
    );
}
