//! Every path under policy: one generated matrix, judged at the receiver, against the evaluator that is written from the documentation alone.
//!
//! The axes (`every_path/axes.rs`) are run through by nested loops: whom the client asks (an endpoint's address, ClusterIP, NodePort of each node,
//! a load balancer's address that either node announces, host port) × who asks (pods under different policies, the endpoint itself, processes
//! of either node, hosts outside) × same node, cross node × where a Service's address is replaced × what judges at the endpoint (nothing,
//! NetworkPolicy by selectors, by `ipBlock`, ClusterNetworkPolicy, a pod with `hostNetwork`) × IPv4, IPv6 × TCP, UDP, SCTP, ICMP × one
//! packet, fragments, ICMP errors × two ports. What is no path is left out by a rule that says why (`Axes::is_no_path`).
//!
//! - **Expected** is what the oracle says of the packet as policy should see it: from the client's address, to the endpoint's address and port.
//! - **Arrived** is what a packet socket in the endpoint's pod saw of the case, of whatever protocol and of however small a piece: packets carry
//!   the number of their case every eight bytes, TCP has a source port for each. Allowed means arrived, from the client's own address, and
//!   answered; denied means that not a piece arrived and that the client was told nothing.
//!
//! Between nodes there is one backend, VXLAN, so *overlay, direct* is not an axis of pods' packets: `NodeNetwork` offers nothing else yet. What
//! packets of clients outside do between nodes is one: forwarded both ways, or answered directly. XDP (`serviceAcceleration`) is not: what the driver
//! of a veth forwards is lost where the other end runs no XDP program, and a lab has none; `towpath-datapath` tries it, under policy too
//! (`tests/programs/entry_policy.rs`).
//!
//! # Mutants
//!
//! Each of these changes was made by hand, one at a time; the matrix names the cases.
//!
//! | change | cases that differ |
//! | --- | --- |
//! | `tp_track_aimed` (`bpf/forward.h`): what comes in at the uplink goes on whatever is judged | 238: clients outside by the NodePort, load balancer and host port of the endpoint's own node, but not `Options`, which the pod's device judges again |
//! | `tp_tunnel_to_pod` (`bpf/from_tunnel.c`): likewise from the tunnel | 1,784: `CrossNode` by every way, all but `Options` and `Forged` |
//! | `tp_ct_open` (`bpf/ct.h`): judged with the Service's port, not the endpoint's | 1,448: everything translated `AtDevice` whose verdict depends on the port |
//! | `tp_track` (`bpf/ct.h`): a later fragment without a connection goes on | 818: `Fragments` of UDP, SCTP and ICMP on every path, and nothing else |
//! | `tp_track_error` (`bpf/ct.h`): an ICMP error about no connection goes on | 22: `Forged` |
//! | the tunnel device checks return paths loosely (`rp_filter` 2), as it did before this test was there | `Options` of IPv4 from outside to another node's pod: all that are allowed |

#![allow(clippy::indexing_slicing, reason = "a JSON value without a field is null")]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use towpath_oracle::{Traffic, allowed};
use towpath_walkthrough::cluster::wait;
use towpath_walkthrough::in_charge::{network_config, said_by_nodes};
use towpath_walkthrough::machine::can_run_labs;

#[path = "every_path/axes.rs"]
mod axes;
#[path = "every_path/hear.rs"]
mod hear;
#[path = "every_path/policies.rs"]
mod policies;
#[path = "every_path/probe.rs"]
mod probe;
#[path = "every_path/scene.rs"]
mod scene;
#[path = "every_path/wire.rs"]
mod wire;

use axes::{Axes, Axis, Client, Content, Endpoint, Entry, Place, Protocol, Translated};
use probe::{Case, Outcome, PATIENCE, run};
use scene::Scene;

/// Source ports are the cases' own, below those that sockets are given.
const FIRST_PORT: u16 = 11_000;
const LAST_PORT: u16 = 29_999;
/// Whom an endpoint sees that reaches itself by a Service at its device (docs/services.md).
const STANDS_IN: [&str; 2] = ["169.254.116.9", "fd00:7470::9"];
const SHOWN: usize = 40;
const SETTLED_WITHIN: Duration = Duration::from_secs(30);
/// Marks the numbers of cases that are tried before the matrix.
const OF_ITS_OWN: u32 = 1 << 24;

/// All cases, and how many combinations were left out for which reason.
fn cases(scene: &Scene) -> Result<(Vec<Case>, BTreeMap<&'static str, usize>)> {
    let mut found = Vec::new();
    let mut left_out = BTreeMap::new();
    let ports = FIRST_PORT..=LAST_PORT;
    for axes in axes::all() {
        if let Some(why) = axes.is_no_path() {
            *left_out.entry(why).or_default() += 1;
            continue;
        }
        let number = u32::try_from(found.len())?;
        let Some(port) = ports.clone().nth(found.len()) else { bail!("more cases than source ports") };
        found.push(case(scene, axes, number, port)?);
    }
    Ok((found, left_out))
}

fn case(scene: &Scene, axes: Axes, number: u32, port: u16) -> Result<Case> {
    let (mut asker, mut asked) = (scene.asker(&axes)?, scene.asked(&axes)?);
    let (mut to, mut at) = (scene.target(&axes)?, scene.translated(&axes)?);
    if axes.content == Content::Forged {
        (asker, asked) = (asked, asker);
        at = SocketAddr::new(scene.standing[asked].address(axes.family), 0);
        to = at;
    }
    let from = scene.standing[asker].address(axes.family);
    let protocol = format!("{:?}", axes.protocol).to_uppercase();
    let traffic = Traffic { from, to: at.ip(), protocol: &protocol, port: at.port() };
    let expected = allowed(&scene.objects, &traffic);
    let seen = seen(scene, &axes).unwrap_or(from);
    Ok(Case { axes, number, port, asker, asked, from, seen, to, at, expected })
}

/// Whom the endpoint sees instead of its client (docs/services.md); no policy is about either.
fn seen(scene: &Scene, axes: &Axes) -> Option<IpAddr> {
    let Axes { client, translated, endpoint, place, family, .. } = *axes;
    if client == Client::Itself && translated == Translated::AtDevice {
        return STANDS_IN[family as usize].parse().ok();
    }
    // A node that is asked by way of another one sees that one.
    if endpoint == Endpoint::Hosted && client.is_outside() && place == Place::CrossNode {
        let entry = scene.asker(&Axes { client: Client::Host, ..*axes }).ok()?;
        return Some(scene.standing[entry].address(family));
    }
    None
}

/// What differs from what was expected; none: nothing does.
fn difference(case: &Case, outcome: &Outcome) -> Option<String> {
    let Outcome { arrived, answered, told } = outcome;
    let fine = match (case.expected, arrived) {
        (true, Some((place, from))) => *place == case.asked && *answered && told.is_none() && *from == case.seen,
        (true, None) | (false, Some(_)) => false,
        (false, None) => !answered && told.is_none(),
    };
    if fine {
        return None;
    }
    let expected = if case.expected { "allowed" } else { "denied" };
    let (from, to, at) = (case.from, case.to, case.at);
    let arrived = arrived.map_or("did not arrive".to_owned(), |(_, from)| format!("arrived from {from}"));
    let answered = if *answered { "answered" } else { "not answered" };
    let told = told.as_deref().unwrap_or("nothing");
    Some(format!(
        "{}: {from} → {to} ({at}) is {expected}; it {arrived}, {answered}, the client was told {told}",
        case.axes
    ))
}

/// Runs the cases that are forwarded so, each kind of packet by itself.
fn differences(scene: &Scene, cases: &[Case], entry: Entry) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for content in Content::ALL {
        for protocol in Protocol::ALL {
            let kind = (entry, *protocol, *content);
            let these = |case: &&Case| (case.axes.entry, case.axes.protocol, case.axes.content) == kind;
            let these: Vec<Case> = cases.iter().filter(these).copied().collect();
            if these.is_empty() {
                continue;
            }
            let begun = Instant::now();
            let outcomes = run(scene, &these, *protocol, *content, PATIENCE)?;
            let differ: Vec<String> =
                these.iter().zip(&outcomes).filter_map(|(case, outcome)| difference(case, outcome)).collect();
            let took = begun.elapsed().as_secs_f64();
            println!(
                "{protocol:?} {content:?}, entry {entry:?}: {} cases, {} differ, {took:.1} s",
                these.len(),
                differ.len()
            );
            found.extend(differ);
        }
    }
    Ok(found)
}

/// How many cases of each value of each axis are allowed and denied.
fn counts(cases: &[Case]) -> BTreeMap<String, [usize; 2]> {
    let mut counts: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    for case in cases {
        let Axes { way, client, place, translated, endpoint, family, protocol, content, entry, port } = case.axes;
        for value in [
            format!("way {way:?}"),
            format!("client {client:?}"),
            format!("place {place:?}"),
            format!("translated {translated:?}"),
            format!("endpoint {endpoint:?}"),
            format!("family {family:?}"),
            format!("protocol {protocol:?}"),
            format!("content {content:?}"),
            format!("entry {entry:?}"),
            format!("port {port:?}"),
            // Each path by itself.
            format!("{way:?} {place:?} {translated:?} {family:?} {protocol:?} {content:?} {entry:?}"),
        ] {
            counts.entry(value).or_default()[usize::from(!case.expected)] += 1;
        }
    }
    counts
}

/// What nobody may deny.
fn is_never_denied(value: &str) -> bool {
    // "A Pod cannot block access to itself."
    value == "client Itself"
}

#[test]
fn every_path_has_the_verdict_that_the_documentation_gives_it() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let begun = Instant::now();
    let scene = Scene::set_up()?;
    let (cases, left_out) = cases(&scene)?;
    for (why, count) in &left_out {
        println!("{count} combinations are no paths: {why}");
    }
    let counts = counts(&cases);
    for (value, [yes, no]) in counts.iter().filter(|(value, _)| value.split(' ').count() == 2) {
        println!("{value}: {yes} allowed, {no} denied");
    }
    let one_sided = counts.iter().filter(|(value, [yes, no])| *yes == 0 || (*no == 0 && !is_never_denied(value)));
    let one_sided: Vec<&String> = one_sided.map(|(value, _)| value).collect();
    ensure!(one_sided.is_empty(), "all allowed or all denied, which shows little: {one_sided:?}");
    println!("the lab and its pods took {:.1} s", begun.elapsed().as_secs_f64());
    if let Err(unsettled) = settle(&scene, &cases) {
        println!("{unsettled:#}");
    }
    println!("{} cases; the lab, its pods and policies took {:.1} s", cases.len(), begun.elapsed().as_secs_f64());

    for entry in Entry::ALL {
        let found = forwarded(&scene, &cases, *entry)?;
        let text = found.iter().take(SHOWN).fold(String::new(), |text, line| text + line + "\n");
        ensure!(found.is_empty(), "{} of {} cases differ:\n{text}", found.len(), cases.len());
    }
    println!("{:.1} s in all", begun.elapsed().as_secs_f64());
    scene.cluster.down()
}

/// The cases that are to be forwarded so, once the cluster is told to; and that they are, by a counter of a node.
fn forwarded(scene: &Scene, cases: &[Case], entry: Entry) -> Result<Vec<String>> {
    if entry == Entry::Hook {
        return differences(scene, cases, entry);
    }
    let count = || -> Result<usize> {
        let counted = said_by_nodes(&scene.cluster, "counters/direct_return")?;
        counted.first().and_then(|count| count.parse().ok()).with_context(|| format!("counters: {counted:?}"))
    };
    scene.cluster.apply_text(&network_config("{directServerReturn: true}"))?;
    let ordinary = |case: &&Case| {
        (case.axes.entry, case.axes.content, case.expected) == (entry, Content::Whole, true)
            && matches!(case.axes.protocol, Protocol::Tcp | Protocol::Udp)
    };
    let ordinary: Vec<&Case> = cases.iter().filter(ordinary).collect();
    let first = ordinary.iter().find(|case| case.axes.protocol == Protocol::Udp).context("no case")?;
    let first = Case { port: 0, number: first.number | OF_ITS_OWN, ..**first };
    wait(&format!("a packet that is forwarded by {entry:?}"), SETTLED_WITHIN, || {
        let before = count()?;
        run(scene, &[first], Protocol::Udp, Content::Whole, Duration::ZERO)?;
        ensure!(count()? > before, "direct_return of n1 stays {before}");
        Ok(())
    })?;
    // What earlier cases told clients of what the ways take.
    for standing in &scene.standing {
        standing.spot.enter(|| {
            for family in ["-4", "-6"] {
                let flushed = Command::new("ip").args([family, "route", "flush", "cache"]).status()?;
                ensure!(flushed.success(), "ip {family} route flush cache: {flushed}");
            }
            Ok(())
        })?;
    }
    let before = count()?;
    let found = differences(scene, cases, entry)?;
    let (counted, wanted) = (count()? - before, ordinary.len());
    ensure!(counted >= wanted, "n1 counts {counted} packets for {wanted} connections that it answers itself");
    Ok(found)
}

/// Waits until some cases of every endpoint, client and way are as they should be: from then on, and in any case when the time is over, all must
/// be. Their connections are not those of the matrix.
fn settle(scene: &Scene, cases: &[Case]) -> Result<()> {
    let some = cases
        .iter()
        .filter(|case| (case.axes.protocol, case.axes.content) == (Protocol::Udp, Content::Whole))
        .step_by(7);
    let some: Vec<Case> = some.map(|case| Case { port: 0, number: case.number | OF_ITS_OWN, ..*case }).collect();
    wait("policies and Services to be in the kernel", SETTLED_WITHIN, || {
        let outcomes = run(scene, &some, Protocol::Udp, Content::Whole, Duration::from_secs(2))?;
        let differ: Vec<String> =
            some.iter().zip(&outcomes).filter_map(|(case, outcome)| difference(case, outcome)).collect();
        ensure!(
            differ.is_empty(),
            "{} of {} differ:\n{}",
            differ.len(),
            some.len(),
            differ.iter().take(SHOWN).fold(String::new(), |all, line| all + line + "\n")
        );
        Ok(())
    })
}
