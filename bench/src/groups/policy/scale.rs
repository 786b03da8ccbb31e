//! A large cluster's policies: compiled, checked and in the kernel's maps; one label of one pod that changes; and what pods of other nodes
//! take of the maps' memory.

use std::time::Duration;

use anyhow::Result;

use super::super::Run;
use crate::cluster::policies::Scale;
use crate::cni::Scratch;
use crate::image::{Request, Took};
use crate::interrupt;
use crate::noise::{Noise, Own, Snapshot};
use crate::place::Place;
use crate::row::{About, Goal, Row, Unit};
use crate::stats;
use crate::worker::Worker;

const POLICIES: usize = 10_000;
/// How many labels change.
const LABELS: usize = 21;
/// Longest time for making the cluster, or for loading all of it.
const SLACK: Duration = Duration::from_secs(120);

/// Measures it.
///
/// # Errors
/// The kernel refuses, or what was compiled is not what the policies say.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    let (scratch, scale) = (Scratch::new()?, Scale::of_policies(POLICIES));
    let pin_dir = scratch.path().to_owned();
    let place = Place { new_netns: true, bpffs: Some(pin_dir.clone()), ..Place::default() };
    crate::report::progress(&format!("making {}", scale.words()));
    let mut worker = Worker::start("the compiler of policies", &place, &["image"])?;
    worker.ask::<Took>(&Request::Make { pin_dir, scale }, SLACK)?;
    let times = run.options.cold_starts.max(1);
    let (all, noise) = repeat(&mut worker, &Request::Everything, times)?;
    let title = format!("{} compiled, checked and written into the kernel's maps", scale.words());
    add(run, "policy.load", title, (Unit::Seconds, 2.0), all, noise);
    let (labels, noise) = repeat(&mut worker, &Request::Label, LABELS)?;
    let title = format!("another label of a pod on another node compiled, checked and written, {}", scale.words());
    add(run, "policy.label", title, (Unit::Milliseconds, 5.0), labels, noise);
    let took: Took = worker.ask(&Request::Memory, SLACK)?;
    let about = About {
        id: "policy.memory.maps".to_owned(),
        title: format!("kernel maps for each pod of another node, {}", scale.words()),
        goal: Some(Goal::AtMost(300.0)),
    };
    let note = "what the kernel counts more to all maps of a node when the pods of other nodes come".to_owned();
    let row = Row::of_samples(about, Unit::Bytes, vec![took.bytes_a_pod], note, &mut run.random);
    run.add(row);
    Ok(())
}

fn repeat(worker: &mut Worker, request: &Request, times: usize) -> Result<(Vec<Took>, Noise)> {
    let own = Own { pids: [std::process::id(), worker.pid()].into(), cgroup: None };
    let (mut all, mut noise) = (Vec::new(), Noise::default());
    for number in 0..times {
        interrupt::check()?;
        crate::report::progress(&format!("policies into the kernel, {} of {times}", number + 1));
        let before = Snapshot::take()?;
        all.push(worker.ask(request, SLACK)?);
        noise = noise.worst(before.until(&Snapshot::take()?, &own));
    }
    crate::report::progress("");
    Ok((all, noise))
}

fn add(run: &mut Run, id: &str, title: String, (unit, goal): (Unit, f64), all: Vec<Took>, noise: Noise) {
    let median = |part: fn(&Took) -> f64| stats::median(&all.iter().map(part).collect::<Vec<_>>()).unwrap_or(0.0);
    let note = format!(
        "median; compiling {:.1} ms, the translation check {:.1} ms, writing {:.1} ms, {:.0} entries",
        median(|took| took.compile),
        median(|took| took.check),
        median(|took| took.load),
        median(|took| took.entries as f64)
    );
    let in_unit = if unit == Unit::Seconds { 1000.0 } else { 1.0 };
    let samples = all.iter().map(|took| took.all() / in_unit).collect();
    let about = About { id: id.to_owned(), title, goal: Some(Goal::AtMost(goal)) };
    let row = Row::of_samples(about, unit, samples, note, &mut run.random);
    run.add(row.taken_with(noise, run.protocol.limits));
}
