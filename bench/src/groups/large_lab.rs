//! A lab of many nodes with many pods: how soon it is there, and what of memory a node takes.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::Run;
use crate::lab::Lab;
use crate::noise::{Own, Snapshot};
use crate::row::{About, Goal, Row, Unit};

/// How long everything is left alone before memory is read.
const IDLE: Duration = Duration::from_secs(5);

/// Measures it.
///
/// # Errors
/// The lab does not come up, or its pods do not run in time.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    let (nodes, pods) = (run.options.large_nodes, run.options.large_pods);
    let before = Snapshot::take()?;
    let mut lab = Lab::large(nodes)?;
    let own = Own { pids: [std::process::id()].into(), cgroup: Some(lab.cgroup_name()) };
    let up = lab.ups.iter().sum::<f64>();
    crate::report::progress(&format!("{pods} pods on {nodes} nodes"));
    let started = Instant::now();
    lab.fill(nodes, pods)?;
    let filled = started.elapsed().as_secs_f64();
    crate::report::progress("");
    let noise = before.until(&Snapshot::take()?, &own);
    let about = About {
        id: "lab.large".to_owned(),
        title: format!("lab of {nodes} nodes and {pods} pods, until all are ready"),
        goal: Some(Goal::AtMost(20.0)),
    };
    let note = format!("{up:.1} s until {nodes} nodes are, {filled:.1} s more until {pods} pods are");
    let row = Row::of_samples(about, Unit::Seconds, vec![up + filled], note, &mut run.random);
    run.add(row.taken_with(noise, run.protocol.limits));

    std::thread::sleep(IDLE);
    let memory = lab.node_memory()?;
    let largest = memory.iter().copied().fold(0.0, f64::max);
    let about = About {
        id: "lab.large.memory".to_owned(),
        title: format!("memory of a node among {nodes}, with {pods} pods"),
        goal: Some(Goal::AtMost(12.0)),
    };
    let note = format!("Pss of agent and carry, median of {} nodes; the largest {largest:.1} MiB", memory.len());
    let median = crate::stats::median(&memory).into_iter().collect();
    let row = Row::of_samples(about, Unit::Mebibytes, median, note, &mut run.random);
    run.add(row);
    Ok(())
}
