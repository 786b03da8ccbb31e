//! CNI ADD and DEL, against the reference plugins `bridge` and `host-local`.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Ratio, Run};
use crate::cni::{Done, Request, Scratch, first_plugin, without_sleep};
use crate::lab::{Lab, beside};
use crate::netns::Netns;
use crate::place::Place;
use crate::rounds::{self, Arm, Block, Series};
use crate::row::{Goal, Null, Row};
use crate::stats;
use crate::worker::Worker;

/// Where Debian puts the reference plugins.
const REFERENCE: &str = "/usr/lib/cni";
const NULL: Null = Null { one: "bridge + host-local", other: "bridge + host-local again" };
/// How much longer than its length a block may take.
const SLACK: Duration = Duration::from_secs(30);

/// One plugin on one node, with a container.
struct Node {
    name: &'static str,
    worker: RefCell<Worker>,
    request: Request,
    /// Every ADD, in milliseconds.
    adds: RefCell<Vec<f64>>,
    container: Netns,
    _node: Option<Netns>,
}

impl Node {
    fn new(name: &'static str, place: &Place, node: Option<Netns>, plugin: PathBuf, config: Value) -> Result<Self> {
        let container = Netns::new("container")?;
        let directory = plugin.parent().unwrap_or(Path::new("/")).display().to_string();
        let request = Request {
            path: format!("{directory}:{REFERENCE}"),
            plugin,
            config,
            netns: container.path().to_owned(),
            container: format!("towpath-bench-{}", container.pid()),
            length: 0,
        };
        let worker = RefCell::new(Worker::start(&format!("the runtime of {name}"), place, &["plugins"])?);
        Ok(Self { name, worker, request, adds: RefCell::new(Vec::new()), container, _node: node })
    }

    /// A node with the reference plugins. `host-local` keeps its leases in `data`.
    fn reference(name: &'static str, data: &Path) -> Result<Self> {
        let node = Netns::new("cni-node")?;
        let config = json!({
            "cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "cni0",
            "isGateway": true, "ipMasq": false,
            "ipam": {"type": "host-local", "dataDir": data, "ranges": [[{"subnet": "10.212.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]},
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

    /// The mean time of ADD and DEL together, in milliseconds; and without known sleeps.
    fn block(&self, length: Duration) -> Result<Block> {
        let request = Request { length: u64::try_from(length.as_millis())?, ..self.request.clone() };
        let done: Done = self.worker.borrow_mut().ask(&request, length + SLACK)?;
        let count = done.adds.len().max(1) as f64;
        let dels: f64 = done.dels.iter().sum();
        let awake: f64 = done.adds.iter().map(|add| without_sleep(*add)).sum();
        let whole: f64 = done.adds.iter().sum();
        self.adds.borrow_mut().extend(done.adds);
        Ok(Block { value: (whole + dels) / count, cpu: None, awake: Some((awake + dels) / count) })
    }

    fn arm(&self, length: Duration) -> Arm<'_> {
        Arm {
            name: self.name,
            pids: vec![self.worker.borrow().pid(), self.container.pid()],
            run: Box::new(move || self.block(length)),
        }
    }

    fn say(&self) -> String {
        let adds = self.adds.borrow();
        let slept = adds.iter().filter(|add| without_sleep(**add) < **add).count();
        format!(
            "{}: ADD median {:.1} ms, {slept} of {} slept 50 ms or more",
            self.name,
            stats::median(&adds).unwrap_or(0.0),
            adds.len()
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
    let title = "CNI ADD + DEL".to_owned();
    let mut arms: Vec<Arm<'_>> = nodes.iter().map(|node| node.arm(run.protocol.block)).collect();
    let series = rounds::measure(&title, &mut arms, &run.protocol, cgroup.as_deref(), &mut run.random)?;
    drop(arms);
    let note = nodes.iter().filter(|node| node.name != NULL.other).map(Node::say).collect::<Vec<_>>().join("; ");
    rows(run, title, series, &note);
    Ok(())
}

fn rows(run: &mut Run, title: String, series: Series, note: &str) {
    let ratio = |id: &str, title: &str, goal| Ratio {
        id: id.to_owned(),
        title: title.to_owned(),
        over: "Towpath",
        under: NULL.one,
        goal,
    };
    let awake = series.awake(NULL.one, NULL.other);
    let first = run.rows.len();
    run.take(
        title.clone(),
        series,
        NULL,
        vec![ratio("cni.bridge", "CNI ADD + DEL: Towpath ÷ bridge + host-local", Some(Goal::AtMost(0.5)))],
    );
    let less = "CNI ADD + DEL: Towpath ÷ bridge + host-local less its sleep";
    run.take(format!("{title}, less sleep"), awake, NULL, vec![ratio("cni.bridge-awake", less, None)]);
    let noted: Vec<Row> = run.rows.drain(first..).map(|row| row.remark(note)).collect();
    run.rows.extend(noted);
}
