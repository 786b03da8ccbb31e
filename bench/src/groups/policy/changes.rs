//! A policy changes: from its event at the agent's socket until packets have the new verdict, in small and large clusters. And what the pods
//! of a large one take of an agent's memory.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use super::super::Run;
use crate::cluster::policies::{Scale, only};
use crate::cluster::{Node, PORT};
use crate::datagrams::Request;
use crate::interrupt;
use crate::noise::{Own, Snapshot, process_seconds};
use crate::row::{About, Goal, Row, Unit};
use crate::stats;
use crate::worker::Worker;

/// Name of the node.
const NODE: &str = "n1";
/// Longest wait for one answer of the client.
const SLACK: Duration = Duration::from_secs(70);
/// What is not answered by then was kept out, in milliseconds.
const SILENCE: u64 = 50;
/// Before a change the agent is left alone for so long: it rests after work, at most 20 ms.
const REST: Duration = Duration::from_millis(40);
/// How long the agent is left alone before its memory is read.
const IDLE: Duration = Duration::from_secs(3);

/// Measures them.
///
/// # Errors
/// An agent does not come up, or does not enforce a change.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    let all = run.options.policies.clone();
    for policies in &all {
        interrupt::check()?;
        let scale = Scale::of_policies(*policies);
        crate::report::progress(&format!("a node with {}", scale.words()));
        let mut node = Node::new(1)?;
        node.api.apply(only("near", "server"))?;
        let largest = Some(policies) == all.iter().max();
        for object in scale.namespaces().into_iter().chain(scale.network_policies()) {
            node.api.apply(object)?;
        }
        let (here, elsewhere): (Vec<Value>, Vec<Value>) = scale
            .pods(NODE)
            .into_iter()
            .partition(|pod| pod.pointer("/spec/nodeName").and_then(Value::as_str) == Some(NODE));
        for pod in here {
            node.api.apply(pod)?;
        }
        let alone = if largest { Some(resident(&mut node)?) } else { None };
        let remote = elsewhere.len();
        for pod in elsewhere {
            node.api.apply(pod)?;
        }
        match alone {
            Some(alone) => {
                let all = resident(&mut node)?;
                memory(run, scale, remote, alone, all);
            }
            None => {
                node.start_agent()?;
                node.until_ready()?;
            }
        }
        let count = if largest { run.options.policy_changes.div_ceil(4) } else { run.options.policy_changes };
        changes(run, &mut node, scale, count)?;
    }
    Ok(())
}

/// Resident memory of an agent that has just started with what there is, in MiB.
fn resident(node: &mut Node) -> Result<f64> {
    node.start_agent()?;
    node.until_ready()?;
    std::thread::sleep(IDLE);
    Ok(node.agent_memory()?.0)
}

fn memory(run: &mut Run, scale: Scale, remote: usize, alone: f64, all: f64) {
    let about = About {
        id: "policy.memory.agent".to_owned(),
        title: format!("agent, resident memory for each pod of another node, {}", scale.words()),
        goal: Some(Goal::AtMost(300.0)),
    };
    let note = format!(
        "VmRSS {all:.1} MiB some seconds after the start, {alone:.1} MiB without the {remote} pods of other nodes"
    );
    let bytes = (all - alone) * 1_048_576.0 / remote.max(1) as f64;
    let row = Row::of_samples(about, Unit::Bytes, vec![bytes], note, &mut run.random);
    run.add(row);
}

/// The policy of the measured pod admits its client, and does not, in turn.
fn changes(run: &mut Run, node: &mut Node, scale: Scale, count: usize) -> Result<()> {
    let (near, server) = (node.pod("near")?, node.pod("server")?);
    let _server = Worker::start("the server", &server.place.on(run.cpus.server), &["serve-udp"])?;
    let mut client = Worker::start("a client", &near.place.on(run.cpus.client), &["until-verdict"])?;
    let to = SocketAddr::new(server.ip, PORT);
    client.ask::<u64>(&Request::certain(to, true), SLACK).map_err(|error| error.context(node.end_of_log()))?;
    let own = Own { pids: [std::process::id(), client.pid()].into(), cgroup: Some(node.cgroup_name()) };
    let (before, used) = (Snapshot::take()?, process_seconds(node.agent()?)?);
    let (mut denied, mut allowed) = (Vec::new(), Vec::new());
    for number in 0..count {
        interrupt::check()?;
        if number % 10 == 0 {
            crate::report::progress(&format!("changes of a policy, {}: {number} of {count}", scale.words()));
        }
        for (passes, from, times) in [(false, "nobody", &mut denied), (true, "near", &mut allowed)] {
            let took = change(node, &mut client, &Request { to, passes, silence: SILENCE }, from, number);
            times.push(took.map_err(|error| error.context(node.end_of_log()))?);
        }
    }
    crate::report::progress("");
    let noise = before.until(&Snapshot::take()?, &own);
    let worked = (process_seconds(node.agent()?)? - used) * 1000.0 / (denied.len() + allowed.len()).max(1) as f64;
    for (id, what, times) in [("deny", "allowed, then denied", denied), ("allow", "denied, then allowed", allowed)] {
        let about = About {
            id: format!("policy.change.{}.{id}", scale.policies),
            title: format!(
                "a policy changes, until packets have the new verdict ({what}), 99th percentile, {}",
                scale.words()
            ),
            goal: Some(Goal::AtMost(20.0)),
        };
        let (median, worst) = (stats::median(&times).unwrap_or(0.0), times.iter().copied().fold(0.0, f64::max));
        let note = format!(
            "{} changes, median {median:.1} ms, worst {worst:.1} ms; from the moment that the event is written to the agent's socket to \
             the first datagram of an open flow that has the new verdict; a client sends one every 0.1 ms; the agent's CPU time was \
             {worked:.1} ms a change, with all that it does beside",
            times.len()
        );
        let late = stats::percentile(&times, 99.0).into_iter().collect();
        let row = Row::of_samples(about, Unit::Milliseconds, late, note, &mut run.random);
        run.add(row.taken_with(noise, run.protocol.limits));
    }
    Ok(())
}

/// Changes who is admitted; milliseconds until it is so.
fn change(node: &Node, client: &mut Worker, request: &Request, from: &str, number: usize) -> Result<f64> {
    let changed = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| client.ask::<u64>(request, SLACK));
        // Not in step with anything that happens again and again.
        std::thread::sleep(REST + Duration::from_micros(137 * (number as u64 % 73)));
        let begun = node.api.apply(only(from, "server"))?;
        let Ok(seen) = waiting.join() else { bail!("the thread of the client died") };
        Ok((begun, seen?))
    });
    let (begun, seen) = changed?;
    // A server that does not come to run for so long is silent, too.
    ensure!(
        seen >= begun,
        "the verdict was seen to change before the policy was changed: this machine is too busy to measure this"
    );
    Ok(Duration::from_nanos(seen - begun).as_secs_f64() * 1000.0)
}
