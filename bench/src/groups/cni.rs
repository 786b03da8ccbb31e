//! CNI ADD and DEL, against the reference plugins `bridge` and `host-local`.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Ratio, Run};
use crate::cni::{Done, Plugin, REFERENCE, Request, Scratch, first_plugin, without_sleep};
use crate::lab::{Lab, beside};
use crate::netns::Netns;
use crate::place::Place;
use crate::rounds::{self, Arm, Block, Series};
use crate::row::{Goal, Null, Row};
use crate::stats;
use crate::worker::Worker;

const NULL: Null = Null { one: "bridge + host-local", other: "bridge + host-local again" };
/// How much longer than its length a block may take.
const SLACK: Duration = Duration::from_secs(30);

/// Pause between containers where single calls are what counts: the kernel takes tens of milliseconds to take a device away.
const REST: Duration = Duration::from_millis(100);

/// One plugin on one node.
struct Node {
    name: &'static str,
    worker: RefCell<Worker>,
    request: Request,
    /// Every ADD and every DEL, in milliseconds.
    calls: RefCell<Done>,
    _node: Option<Netns>,
}

impl Node {
    fn new(name: &'static str, place: &Place, node: Option<Netns>, plugin: PathBuf, config: Value) -> Result<Self> {
        let request = Request { plugin: Plugin::new(plugin), config, length: 0, rest: 0 };
        let worker = RefCell::new(Worker::start(&format!("the runtime of {name}"), place, &["plugins"])?);
        Ok(Self { name, worker, request, calls: RefCell::default(), _node: node })
    }

    /// A node with the reference plugins. `host-local` keeps its leases in `data`.
    fn reference(name: &'static str, data: &Path) -> Result<Self> {
        let node = Netns::new("cni-node")?;
        let ranges = json!([[{"subnet": "10.212.0.0/24"}]]);
        let config = json!({
            "cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "cni0",
            "isGateway": true, "ipMasq": false,
            "ipam": {"type": "host-local", "dataDir": data, "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]},
        });
        let place = node.place();
        Self::new(name, &place, Some(node), Path::new(REFERENCE).join("bridge"), config)
    }

    /// A node of the lab with our plugin, as its runtime would run it.
    fn ours(lab: &Lab) -> Result<Self> {
        let file = lab.node_run("n1").join("cni/net.d/10-towpath.conflist");
        let text = std::fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        let list = serde_json::from_slice(&text).with_context(|| format!("understand {}", file.display()))?;
        let place = Place { netns: Some(lab.node_netns("n1")), ..Place::default() };
        Self::new("Towpath", &place, None, beside("towpath-cni")?, first_plugin(&list)?)
    }

    /// The mean time of ADD and DEL together, in milliseconds; and less known sleeps.
    fn block(&self, length: Duration, rest: Duration) -> Result<Block> {
        let milliseconds = |time: Duration| u64::try_from(time.as_millis());
        let request = Request { length: milliseconds(length)?, rest: milliseconds(rest)?, ..self.request.clone() };
        let done: Done = self.worker.borrow_mut().ask(&request, length + SLACK)?;
        let count = done.adds.len().max(1) as f64;
        let whole: f64 = done.adds.iter().chain(&done.dels).sum();
        let slept: f64 = done.adds.iter().map(|add| add - without_sleep(*add)).sum();
        let mut calls = self.calls.borrow_mut();
        calls.adds.extend(done.adds);
        calls.dels.extend(done.dels);
        Ok(Block { value: whole / count, cpu: None, awake: Some((whole - slept) / count) })
    }

    fn arm(&self, length: Duration, rest: Duration) -> Arm<'_> {
        Arm { name: self.name, pids: vec![self.worker.borrow().pid()], run: Box::new(move || self.block(length, rest)) }
    }

    fn slept(&self) -> usize {
        self.calls.borrow().adds.iter().filter(|add| without_sleep(**add) < **add).count()
    }

    /// Single calls since the last time it was asked: medians, and what one of a hundred took longer than.
    fn say(&self) -> String {
        let calls = self.calls.take();
        let median = |values: &[f64]| stats::median(values).unwrap_or(0.0);
        let late = |values: &[f64]| stats::percentile(values, 99.0).unwrap_or(0.0);
        let (adds, dels) = (&calls.adds, &calls.dels);
        let name = self.name;
        format!(
            "{name}: ADD {:.1} ms (99 %: {:.1}), DEL {:.1} ms ({:.1})",
            median(adds),
            late(adds),
            median(dels),
            late(dels)
        )
    }
}

/// Measures them.
///
/// # Errors
/// A plugin is missing or fails.
pub(super) fn measure(run: &mut Run, lab: Option<&Lab>) -> Result<()> {
    let scratch = Scratch::new()?;
    let mut nodes = vec![
        Node::reference(NULL.one, &scratch.path().join("one"))?,
        Node::reference(NULL.other, &scratch.path().join("other"))?,
    ];
    if let Some(lab) = lab {
        nodes.push(Node::ours(lab)?);
    }
    let cgroup = lab.map(Lab::cgroup_name);
    let against = "Towpath ÷ bridge + host-local";
    let goal = Some(Goal::AtMost(0.5));
    let single = pass(run, &nodes, "CNI ADD + DEL", REST, cgroup.as_deref())?;
    let slept: usize = nodes.iter().filter(|node| node.name != "Towpath").map(Node::slept).sum();
    let note = notes(&nodes);
    if slept > 0 {
        let title = format!("CNI ADD + DEL: {against} less its sleep");
        let note = format!("the reference plugin slept 50 ms or more in {slept} ADDs");
        rows(run, "CNI ADD + DEL less sleep", single.awake(NULL.one, NULL.other), ("cni.awake", title, None), &note);
    }
    rows(run, "CNI ADD + DEL", single, ("cni.single", format!("CNI ADD + DEL: {against}"), goal), &note);
    let churn = pass(run, &nodes, "CNI ADD + DEL without a pause", Duration::ZERO, cgroup.as_deref())?;
    let title = format!("CNI ADD + DEL without a pause: {against}");
    rows(run, "CNI ADD + DEL without a pause", churn, ("cni.churn", title, None), &notes(&nodes));
    Ok(())
}

fn pass(run: &mut Run, nodes: &[Node], title: &str, rest: Duration, cgroup: Option<&str>) -> Result<Series> {
    let mut arms: Vec<Arm<'_>> = nodes.iter().map(|node| node.arm(run.protocol.block, rest)).collect();
    rounds::measure(title, &mut arms, &run.protocol, cgroup, &mut run.random)
}

fn notes(nodes: &[Node]) -> String {
    let said: Vec<(bool, String)> = nodes.iter().map(|node| (node.name == NULL.other, node.say())).collect();
    said.into_iter().filter(|(again, _)| !again).map(|(_, text)| text).collect::<Vec<_>>().join("; ")
}

fn rows(run: &mut Run, title: &str, series: Series, row: (&str, String, Option<Goal>), note: &str) {
    let (id, row_title, goal) = row;
    let ratio = Ratio { id: id.to_owned(), title: row_title, over: "Towpath", under: NULL.one, goal };
    let first = run.rows.len();
    run.take(title.to_owned(), series, NULL, vec![ratio]);
    let noted: Vec<Row> = run.rows.drain(first..).map(|row| row.remark(note)).collect();
    run.rows.extend(noted);
}
