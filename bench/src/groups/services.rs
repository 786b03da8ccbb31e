//! Connections to a ClusterIP against connections to the pod behind it, and against rules shaped as kube-proxy's, with few and many
//! Services.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Result;

use super::{Ratio, Run};
use crate::baseline::Baseline;
use crate::cluster::{MEASURED, Node, PORT, address, filler, nobodys, service, slice};
use crate::interrupt;
use crate::lab::wait;
use crate::load::{Ends, Measure};
use crate::row::{About, Goal, Null, Row, Unit};
use crate::rulesets::Ruleset;

const NULL: Null = Null { one: "pod address", other: "pod address again" };
const OURS: &str = "ClusterIP";
const RULESETS: [Ruleset; 2] = [Ruleset::Nftables, Ruleset::Iptables];
/// Endpoints of each Service that nobody measures.
const ENDPOINTS: usize = 2;
/// How long a block must be at least to have any connection in it, and how long it takes until a probe of one is given up.
const PROBE: Duration = Duration::from_millis(5);

/// Measures them.
///
/// # Errors
/// A Service does not answer in time, or rules are refused.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    let mut sizes = run.options.services.clone();
    sizes.sort_unstable();
    let mut node = Node::new(sizes.last().copied().unwrap_or(1))?;
    node.start_agent()?;
    node.until_ready()?;
    let (client, server) = (node.pod("near")?, node.pod("server")?);
    let ends = Ends::start("a Service", &client.place, &server.place, run.cpus)?;
    node.api.apply(service(MEASURED))?;
    node.api.apply(slice(MEASURED, &[server.ip]))?;
    answers(&node, &ends, MEASURED)?;
    let mut rows = Vec::new();
    let mut there = 1;
    for size in sizes {
        grow(&node, &ends, there, size, server.ip)?;
        there = there.max(size);
        rows.extend(pass(run, &ends, server.ip, size)?.map(|row| (size, row)));
    }
    if let [(few, first), .., (many, last)] = rows.as_slice() {
        let about = About {
            id: "services.crr.slope".to_owned(),
            title: format!("ClusterIP ÷ pod address, TCP CRR: with {many} Services ÷ with {few}"),
            goal: Some(Goal::AtLeast(0.99)),
        };
        let row = Row::of_rows(about, last, first, &mut run.random);
        run.add(row);
    }
    Ok(())
}

/// Has the agent told of more Services, one event after the other, until there are `size`; the last one leads to the server, and
/// answers before this returns.
fn grow(node: &Node, ends: &Ends, there: usize, size: usize, server: IpAddr) -> Result<()> {
    // The measured one is one of them.
    let last = size.saturating_sub(2);
    for index in there.saturating_sub(1)..size.saturating_sub(1) {
        if index % 1000 == 0 {
            interrupt::check()?;
            crate::report::progress(&format!("Service {index} of {size}"));
        }
        let endpoints = if index == last { vec![server] } else { nobodys(index, ENDPOINTS) };
        node.api.apply(service(&filler(index)))?;
        node.api.apply(slice(&filler(index), &endpoints))?;
    }
    crate::report::progress("");
    if size > there { answers(node, ends, &filler(last)) } else { Ok(()) }
}

/// Waits until connections to a Service work.
fn answers(node: &Node, ends: &Ends, name: &str) -> Result<()> {
    let to = SocketAddr::new(address(name).into(), PORT);
    let answer = wait(&format!("{to} to answer"), || Ok(ends.block(Measure::Crr, to, PROBE).ok()));
    answer.map(drop).map_err(|error| error.context(node.end_of_log()))
}

/// One measurement with all that it is compared with; the row of ClusterIP against pod.
fn pass(run: &mut Run, ends: &Ends, pod: IpAddr, count: usize) -> Result<Option<Row>> {
    let mut others = Vec::new();
    for ruleset in RULESETS.into_iter().filter(|_| count > 1) {
        crate::report::progress(&format!("loading {count} Services, {}", ruleset.title()));
        match Baseline::kube_proxy(ruleset, count, run.cpus) {
            Ok((baseline, took)) => {
                loaded(run, ruleset, count, took);
                others.push((ruleset, baseline));
            }
            // Rules that do not load are no reason to measure nothing else.
            Err(error) => crate::report::note(&format!("{count} Services, {}: {error:#}", ruleset.title())),
        }
        interrupt::check()?;
    }
    let mut arms = vec![ends.to(OURS, address(MEASURED).into()), ends.to(NULL.one, pod), ends.to(NULL.other, pod)];
    for (ruleset, baseline) in &others {
        // The first connection of a pod may wait for its neighbours.
        let arm = baseline.ends.to(ruleset.title(), baseline.to);
        wait(&format!("{} to answer", ruleset.title()), || Ok(baseline.ends.block(Measure::Crr, arm.to, PROBE).ok()))?;
        arms.push(arm);
    }
    let plural = if count == 1 { "" } else { "s" };
    let id = format!("services.crr.{count}");
    let mut ratios = vec![Ratio {
        id: id.clone(),
        title: format!("ClusterIP ÷ pod address, TCP CRR, {count} Service{plural}"),
        over: OURS,
        under: NULL.one,
        goal: Some(Goal::AtLeast(0.97)),
    }];
    for (ruleset, _) in &others {
        let title = ruleset.title();
        ratios.push(Ratio {
            id: format!("{id}.{title}"),
            title: format!("ClusterIP, TCP CRR, {count} Services: Towpath ÷ {title}"),
            over: OURS,
            under: title,
            goal: goal(*ruleset, count),
        });
    }
    run.compare(&format!("ClusterIP with {count} Service{plural}"), &arms, Measure::Crr, NULL, ratios)?;
    Ok(run.rows.iter().find(|row| row.id == id).cloned())
}

fn goal(ruleset: Ruleset, count: usize) -> Option<Goal> {
    match (ruleset, count) {
        (Ruleset::Nftables, _) => Some(Goal::AtLeast(1.25)),
        (Ruleset::Iptables, 50_000..) => Some(Goal::AtLeast(15.0)),
        (Ruleset::Iptables, 10_000..) => Some(Goal::AtLeast(4.0)),
        (Ruleset::Iptables, _) => None,
    }
}

/// How long rules took to load, where they are all that kube-proxy would load.
fn loaded(run: &mut Run, ruleset: Ruleset, count: usize, took: Duration) {
    if !ruleset.is_whole(count) {
        return;
    }
    let about = About {
        id: format!("services.load.{count}.{}", ruleset.title()),
        title: format!("{count} Services of {ENDPOINTS} endpoints, {}: rules loaded", ruleset.title()),
        goal: None,
    };
    let note = format!("by {}, in one call", ruleset.loader());
    let row = Row::of_samples(about, Unit::Seconds, vec![took.as_secs_f64()], note, &mut run.random);
    run.add(row);
}
