//! Policies as large as the API server lets in are read, compiled, checked and judged within bounds of time and memory.
//!
//! Time is this thread's own on the processor, so that a busy machine changes nothing; the bounds are for code that is not optimised.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

use std::collections::BTreeMap;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use towpath_fuzz::cluster::{Local, NODES, Spec};
use towpath_fuzz::judge::{Judges, compile};
use towpath_fuzz::packet::{Packet, Subjects, Transport};
use towpath_fuzz::random::Random;
use towpath_fuzz::tally::Tally;
use towpath_model::NodeName;
use towpath_model::desired::PolicyImage;
use towpath_policy::Compiler;
use towpath_policy::check::check;

/// The API server's limit of a request: 3 MiB; of what etcd stores: 1.5 MiB.
const LARGEST: usize = 3 << 19;

fn used() -> Duration {
    let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    Duration::new(u64::try_from(now.tv_sec()).unwrap(), u32::try_from(now.tv_nsec()).unwrap())
}

/// The most memory that this process ever had, in bytes.
fn most_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn cluster(policies: Vec<Value>) -> Spec {
    let mut random = Random::new(11);
    let mut spec = Spec::random(&mut random);
    while spec.local.len() < 4 {
        spec = Spec::random(&mut random);
    }
    let namespace = spec.local[0].namespace.clone();
    spec.cluster_policies.clear();
    spec.policies = policies;
    for (index, policy) in spec.policies.iter_mut().enumerate() {
        policy["metadata"] = json!({"namespace": namespace, "name": format!("q{index}")});
    }
    spec
}

/// Reads, compiles, checks and judges; how long all but the last took, and the image.
fn judged(name: &str, spec: &Spec) -> (Duration, PolicyImage) {
    let bytes: usize = spec.policies.iter().map(|policy| policy.to_string().len()).sum();
    let (before, start) = (most_memory(), used());
    let parsed = spec.parse().unwrap();
    let image = compile(&parsed, &mut Compiler::new(Duration::ZERO), Duration::ZERO);
    let view = towpath_fuzz::judge::view(&parsed);
    check(&view, &NodeName::new(NODES[0]), &image).unwrap();
    let took = used() - start;
    let grown = most_memory() - before;
    println!(
        "{name}: {bytes} bytes, {} rows, {} prefixes: {took:?}, {} MiB",
        image.rows.len(),
        image.cidr_classes.len(),
        grown >> 20
    );
    assert!(bytes > LARGEST / 16, "{name} is not large: {bytes} bytes");
    assert!(took < Duration::from_secs(5), "{name} took {took:?} to read, compile and check");
    assert!(grown < 192 << 20, "{name} took {} MiB", grown >> 20);
    let judges = Judges::new(&parsed, &image);
    let mut random = Random::new(12);
    let subjects = Subjects::of(spec);
    for packet in (0..12).filter_map(|_| subjects.packet(&mut random)) {
        judges.judge(&packet, &mut Tally::default()).unwrap();
    }
    (took, image)
}

fn policy(ingress: Vec<Value>) -> Value {
    json!({"spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": ingress}})
}

#[test]
fn ten_thousand_rules_of_one_policy() {
    let rule = |n: u32| {
        let peer = match n % 40 {
            0 => json!({"ipBlock": {"cidr": format!("198.18.{}.{}/32", (n >> 8) & 255, n & 255)}}),
            few if few < 20 => json!({"podSelector": {"matchLabels": {"a": "x"}}}),
            _ => json!({"podSelector": {"matchLabels": {"a": "y"}}}),
        };
        json!({"from": [peer], "ports": [{"protocol": "TCP", "port": 1 + n % 65_000}]})
    };
    let (_, image) = judged("10,000 rules", &cluster(vec![policy((0..10_000).map(rule).collect())]));
    assert!(image.rows.len() >= 10_000, "{}", image.rows.len());
}

/// Ten thousand blocks, in a policy as large as a request may be.
const BLOCKS: u32 = 10_000;

fn block(address: u32, bits: u8, except: &[(u32, u8)]) -> Value {
    let text = |address: u32, bits: u8| format!("{}/{bits}", std::net::Ipv4Addr::from(address));
    let except: Vec<String> = except.iter().map(|(address, bits)| text(*address, *bits)).collect();
    json!({"ipBlock": {"cidr": text(address, bits), "except": except}})
}

/// Blocks of one shape.
type Shape = (&'static str, fn(u32) -> Value);

const TEN: u32 = 10 << 24;

/// How blocks can be to each other; of IPv6, too.
const SHAPES: [Shape; 6] = [
    ("apart", |n| block(TEN + 2 * n, 32, &[])),
    ("overlapping, with holes that the next fill again", |n| {
        block(TEN + (n << 8), 23, &[(TEN + (n << 8), 25), (TEN + (n << 8), 24)])
    }),
    ("all over everything but one address", |n| block(0, 0, &[(TEN + 2 * n, 32)])),
    ("one in the other", |n| block(TEN + ((n / 20) << 12), u8::try_from(12 + n % 20).unwrap(), &[])),
    ("apart, of IPv6", |n| json!({"ipBlock": {"cidr": format!("2001:db8:{:x}::/64", n)}})),
    (
        "all over everything of IPv6 but a network",
        |n| json!({"ipBlock": {"cidr": "2001:db8::/32", "except": [format!("2001:db8:{n:x}::/64")]}}),
    ),
];

/// One policy whose one rule has so many blocks.
fn blocks(shape: fn(u32) -> Value, count: u32) -> Vec<Value> {
    vec![policy(vec![json!({"from": (0..count).map(shape).collect::<Vec<_>>()})])]
}

#[test]
fn ten_thousand_blocks_of_every_shape() {
    for (name, shape) in SHAPES {
        judged(name, &cluster(blocks(shape, BLOCKS)));
    }
}

#[test]
fn fifty_thousand_blocks_of_five_policies_and_ten_thousand_policies_of_a_block() {
    let apart = SHAPES[0].1;
    let five = (0..5).map(|p| {
        let peers: Vec<Value> = (0..BLOCKS).map(|n| apart(p * BLOCKS + n)).collect();
        policy(vec![json!({"from": peers})])
    });
    judged("five policies", &cluster(five.collect()));
    let each = |shape: fn(u32) -> Value| (0..BLOCKS).map(|n| policy(vec![json!({"from": [shape(n)]})])).collect();
    judged("a policy each, apart", &cluster(each(apart)));
    judged("a policy each, over everything", &cluster(each(SHAPES[2].1)));
}

/// What compiling and checking cost this thread, of the cheapest of some tries.
fn cost(spec: &Spec) -> Duration {
    let parsed = spec.parse().unwrap();
    let try_once = || {
        let start = used();
        let image = compile(&parsed, &mut Compiler::new(Duration::ZERO), Duration::ZERO);
        let view = towpath_fuzz::judge::view(&parsed);
        check(&view, &NodeName::new(NODES[0]), &image).unwrap();
        used() - start
    };
    (0..3).map(|_| try_once()).min().unwrap()
}

/// Four times the blocks cost some four times as much: with the square it would be sixteen times.
#[test]
fn what_blocks_cost_grows_with_their_number_and_not_with_its_square() {
    let several =
        |shape: fn(u32) -> Value, count: u32| (0..count).map(|n| policy(vec![json!({"from": [shape(n)]})])).collect();
    let ports = |shape: fn(u32) -> Value, count: u32| {
        let rule = |n| json!({"from": [shape(n)], "ports": [{"port": n + 1}]});
        vec![policy((0..count).map(rule).collect())]
    };
    type Make<'m> = &'m dyn Fn(fn(u32) -> Value, u32) -> Vec<Value>;
    let of_one = SHAPES.map(|(name, shape)| (name, shape, &blocks as Make<'_>));
    type Case<'m> = (&'static str, fn(u32) -> Value, Make<'m>);
    let others: [Case<'_>; 3] = [
        ("a policy each, apart", SHAPES[0].1, &several),
        ("a policy each, over everything", SHAPES[2].1, &several),
        ("a port each, apart", SHAPES[0].1, &ports),
    ];
    for (name, shape, make) in of_one.into_iter().chain(others) {
        let [few, many] = [1_000, 4_000].map(|count| cost(&cluster(make(shape, count))));
        let ratio = many.as_secs_f64() / few.as_secs_f64();
        println!("{name}: {few:?}, four times as many {many:?}: {ratio:.1} times");
        assert!(ratio < 8.0, "{name}: {few:?}, four times as many {many:?}: {ratio:.1} times");
    }
}

#[test]
fn selectors_of_every_operator_with_thousands_of_values() {
    let values = |first: u32| (first..first + 3_000).map(|n| format!("value-of-a-label-{n}")).collect::<Vec<_>>();
    let expression = |n: u32| {
        let operator = ["In", "NotIn"][usize::from(n.is_multiple_of(2))];
        json!({"key": "a", "operator": operator, "values": values(n * 1_000)})
    };
    let selector = json!({"matchExpressions": (0..6).map(expression).chain([
        json!({"key": "a", "operator": "Exists"}), json!({"key": "b", "operator": "DoesNotExist"})]).collect::<Vec<_>>()});
    let rule = json!({"from": [{"podSelector": selector, "namespaceSelector": {}}]});
    judged("selectors", &cluster((0..3).map(|_| policy(vec![rule.clone()])).collect()));
}

#[test]
fn every_second_port() {
    let ports: Vec<Value> = (0..20_000).map(|n| json!({"port": 1 + 2 * n})).collect();
    let rule = json!({"from": [{"podSelector": {}}], "ports": ports});
    let (_, image) = judged("20,000 ports", &cluster(vec![policy(vec![rule])]));
    assert!(image.rows.len() >= 20_000);
}

/// Labels and names that no API server lets in do no harm where they come from a file.
#[test]
fn an_object_of_nonsense_is_read_to_its_end() {
    let nonsense = "\u{0}\u{202e}../".repeat(40_000);
    let labels: BTreeMap<String, &str> = (0..4).map(|n| (format!("{n}{nonsense}"), nonsense.as_str())).collect();
    let rule = json!({"from": [{"podSelector": {"matchLabels": labels}}], "ports": [{"port": nonsense}]});
    judged("nonsense", &cluster(vec![policy(vec![rule])]));
}

#[test]
fn nested_deeper_than_anything_is_refused_and_not_followed() {
    for depth in [200usize, 100_000] {
        let text = format!(
            "{{\"metadata\":{{\"namespace\":\"n\",\"name\":\"p\"}},\"spec\":{}{}}}",
            "{\"a\":".repeat(depth),
            "0".to_owned() + &"}".repeat(depth)
        );
        let read = serde_json::from_str::<Value>(&text);
        assert!(read.is_err_and(|error| error.to_string().contains("recursion")));
    }
}

/// What policy would allow passes only with the pod's own address, and with no IPv4 address in IPv6.
#[test]
fn addresses_of_one_family_written_in_the_other_are_dropped() {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "CI must ask the kernel, as root");
        return;
    }
    std::thread::spawn(|| {
        let mut kernel = towpath_fuzz::kernel::Kernel::load().unwrap();
        let pod = |place: usize, addresses: &[&str]| Local {
            namespace: "n0".into(),
            name: format!("p0{place}"),
            place,
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            given: true,
        };
        let local = vec![pod(0, &["10.0.0.2", "fd00::2"]), pod(1, &["fd00::3"])];
        let spec = Spec { local: local.clone(), ..cluster(Vec::new()) };
        let open =
            spec.parse().map(|parsed| compile(&parsed, &mut Compiler::new(Duration::ZERO), Duration::ZERO)).unwrap();
        let mut image = open.clone();
        image.pods = local.iter().flat_map(|pod| &pod.addresses).map(|ip| (*ip, Default::default())).collect();
        kernel.apply(&local, &image).unwrap();
        let frame_of = |place: u8, source: &str, destination: &str| {
            Packet {
                source: source.parse().unwrap(),
                destination: destination.parse().unwrap(),
                transport: Transport::Tcp,
                source_port: 20_001,
                port: 80,
                way: None,
            }
            .frame([2, 0, 0, 0, 1, place], [2, 0x74, 0x70, 0, 0, 1])
        };
        let frame = |source: &str, destination: &str| frame_of(0, source, destination);
        assert!(kernel.passes_frame(0, &frame("fd00::2", "2001:db8::1")).unwrap(), "what it may send passes");
        for other in ["::ffff:198.51.100.7", "::198.51.100.7", "::ffff:0:198.51.100.7"] {
            assert!(!kernel.passes_frame(0, &frame("fd00::2", other)).unwrap(), "to {other}");
            assert!(!kernel.passes_frame(0, &frame(other, "2001:db8::1")).unwrap(), "from {other}");
        }
        assert!(!kernel.passes_frame(0, &frame("::ffff:10.0.0.2", "2001:db8::1")).unwrap(), "from its own, mapped");
        let neighbours = |mac: u8| kernel.passes_frame(0, &frame_of(mac, "fd00::3", "2001:db8::1")).unwrap();
        assert!(kernel.passes_frame(1, &frame_of(1, "fd00::3", "2001:db8::1")).unwrap(), "the neighbour itself");
        assert!(!neighbours(0) && !neighbours(1), "from its neighbour's, with either MAC");
    })
    .join()
    .unwrap();
}
