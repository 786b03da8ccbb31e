//! `lab up`, the start of a pod, memory of the agents.

use std::time::Duration;

use anyhow::Result;

use super::Run;
use crate::api::has_kubectl;
use crate::interrupt;
use crate::lab::Lab;
use crate::noise::{Own, Snapshot};
use crate::row::{About, Goal, Row, Unit};
use crate::stats;

/// How long the agents are left alone before their memory is read.
const IDLE: Duration = Duration::from_secs(3);

/// Measures them.
///
/// # Errors
/// A pod does not start.
pub(super) fn measure(run: &mut Run, lab: &mut Lab) -> Result<()> {
    let about = |id: &str, title: String, goal: f64| About { id: id.to_owned(), title, goal: Some(Goal::AtMost(goal)) };
    if !lab.ups.is_empty() {
        let about = about("lab.up", "`towpath lab up`, 3 nodes, until DNS answers".to_owned(), 3.0);
        let row = Row::of_samples(about, Unit::Seconds, lab.ups.clone(), "median".to_owned(), &mut run.random);
        run.add(row.taken_with(lab.noise, run.protocol.limits));
    }

    std::thread::sleep(IDLE);
    let memory = lab.agent_memory()?;
    let largest = memory.iter().copied().fold(0.0, f64::max);
    let note = format!("VmRSS, the largest of {} agents", memory.len());
    let about_memory = about("agent.memory", "agent, resident memory, idle".to_owned(), 30.0);
    let row = Row::of_samples(about_memory, Unit::Mebibytes, vec![largest], note, &mut run.random);
    run.add(row);

    let own = Own { pids: [std::process::id()].into(), cgroup: Some(lab.cgroup_name()) };
    let before = Snapshot::take()?;
    let (mut starts, mut applies) = (Vec::new(), Vec::new());
    for index in 0..run.options.pod_starts {
        interrupt::check()?;
        crate::report::progress(&format!("start of pod {} of {}", index + 1, run.options.pod_starts));
        let (running, applied) = lab.time_pod(&format!("start-{index}"), "n1")?;
        starts.push(running);
        applies.push(applied);
    }
    crate::report::progress("");
    let noise = before.until(&Snapshot::take()?, &own);
    let tool = if has_kubectl() { "the command" } else { "`towpath lab apply`, as there is no kubectl," };
    let note = format!("median; {tool} itself ran {:.2} s", stats::median(&applies).unwrap_or(0.0));
    let about_start = about("pod.start", "pod, from `kubectl apply` to Running".to_owned(), 0.5);
    let row = Row::of_samples(about_start, Unit::Seconds, starts, note, &mut run.random);
    run.add(row.taken_with(noise, run.protocol.limits));
    Ok(())
}
