//! Two pods that policies judge, against two that none does.
//!
//! Every pair is on a node of its own, with an agent of its own and maps that hold its own policies alone. So all of them run in the same
//! rounds, and ten rules are not looked up among another pair's ten thousand.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::{Ratio, Run};
use crate::cluster::policies::{self, Admitted};
use crate::cluster::{NAMESPACE, Node, PORT};
use crate::datagrams::Request;
use crate::interrupt;
use crate::lab::{Pod, wait};
use crate::load::{Ends, Measure};
use crate::row::{Goal, Null};
use crate::worker::Worker;

const NULL: Null = Null { one: "no policy", other: "no policy again" };
const RULES: [(&str, usize); 3] = [("10 rules", 10), ("1,000 rules", 1000), ("10,000 rules", 10_000)];
const BLOCKS: &str = "blocks";
/// Across nodes.
const SOME: (&str, usize) = ("1,000 rules", 1000);
/// The one thing that policies admit.
const ADMITTED: Admitted<'_> = Admitted { from: "near", to: "server", ports: (PORT, PORT) };
/// How long a block must be at least to have any connection in it.
const PROBE: Duration = Duration::from_millis(5);
/// Longest time until policies are enforced: compiling many blocks takes a while.
const SLACK: Duration = Duration::from_secs(70);

/// Two pods with a server and a client.
struct Pair {
    name: &'static str,
    ends: Ends,
    server: Pod,
    // Last: their nodes.
    _nodes: Vec<Node>,
}

impl Pair {
    /// On one node.
    fn together(run: &Run, name: &'static str, objects: Vec<Value>) -> Result<Self> {
        crate::report::progress(&format!("a node with {name}"));
        let judged = !objects.is_empty();
        let mut node = Node::new(1)?;
        for object in objects {
            node.api.apply(object)?;
        }
        node.start_agent()?;
        node.until_ready()?;
        let (near, server) = (node.pod("near")?, node.pod("server")?);
        Self::checked(run, name, near, server, judged, vec![node])
    }

    /// On two nodes.
    fn apart(run: &Run, name: &'static str, objects: &[Value]) -> Result<Self> {
        crate::report::progress(&format!("two nodes with {name}"));
        let [mut one, mut two] = Node::pair()?;
        for node in [&mut one, &mut two] {
            for object in objects {
                node.api.apply(object.clone())?;
            }
            node.start_agent()?;
            node.until_ready()?;
        }
        let (near, server) = (one.pod("near")?, two.pod("server")?);
        let pod = |name: &str, node, pod: &Pod| policies::running(NAMESPACE, name, node, pod.ip, &json!({"app": name}));
        one.api.apply(pod("server", "n2", &server))?;
        two.api.apply(pod("near", "n1", &near))?;
        Self::checked(run, name, near, server, !objects.is_empty(), vec![one, two])
    }

    /// With the server reached, and with what policies do not admit kept out: before that nothing is known of what is measured.
    fn checked(run: &Run, name: &'static str, near: Pod, server: Pod, judged: bool, nodes: Vec<Node>) -> Result<Self> {
        let logs = || nodes.iter().map(Node::end_of_log).collect::<Vec<_>>().join("\n");
        let ends = Ends::start(&format!("two pods with {name}"), &near.place, &server.place, run.cpus)?;
        let to = SocketAddr::new(server.ip, PORT);
        let reached = wait(&format!("{to} to answer with {name}"), || Ok(ends.block(Measure::Crr, to, PROBE).ok()));
        reached.map_err(|error| error.context(logs()))?;
        let mut datagrams = Worker::start("a client that no rule admits", &near.place, &["until-verdict"])?;
        let verdict = datagrams.ask::<u64>(&Request::certain(to, !judged), SLACK);
        verdict.map_err(|error| error.context(format!("what is not admitted, with {name}; {}", logs())))?;
        Ok(Self { name, ends, server, _nodes: nodes })
    }
}

/// Measures that are asked for and that a packet's or a connection's cost shows in.
fn measures(run: &Run) -> Vec<Measure> {
    let asked = run.options.measures.iter().copied();
    asked.filter(|measure| matches!(measure, Measure::Rr | Measure::Crr)).collect()
}

/// Measures pairs against each other; which ratios to make of them is asked for each measure.
fn compare(run: &mut Run, title: &str, pairs: &[Pair], ratios: impl Fn(Measure) -> Vec<Ratio>) -> Result<()> {
    for measure in measures(run) {
        let arms: Vec<_> = pairs.iter().map(|pair| pair.ends.to(pair.name, pair.server.ip)).collect();
        run.compare(title, &arms, measure, NULL, ratios(measure))?;
    }
    Ok(())
}

/// On one node, with few and many rules, and with many blocks of addresses.
///
/// # Errors
/// An agent does not come up, or does not enforce its policies.
pub(super) fn same_node(run: &mut Run) -> Result<()> {
    let count = run.options.blocks;
    ensure!((2..=60_000).contains(&count), "--blocks {count}: between 2 and 60000");
    if measures(run).is_empty() {
        return Ok(());
    }
    let mut pairs = vec![Pair::together(run, NULL.one, Vec::new())?, Pair::together(run, NULL.other, Vec::new())?];
    for (name, count) in RULES {
        interrupt::check()?;
        pairs.push(Pair::together(run, name, policies::rules(count, ADMITTED))?);
    }
    pairs.push(Pair::together(run, BLOCKS, policies::blocks(count, "10.244.1.0/24"))?);
    compare(run, "one node, with policies", &pairs, |measure| {
        let ratio = |id: &str, title: String, over, under, goal| Ratio {
            id: format!("policy.{}.{id}", measure.id()),
            title: format!("same node, {}: {title}", measure.title()),
            over,
            under,
            goal: Some(Goal::AtLeast(goal)),
        };
        let goal = |count| if count > 10 { 0.97 } else { 0.99 };
        let mut ratios: Vec<Ratio> = RULES
            .into_iter()
            .map(|(name, count)| {
                let title = format!("judged by {name} at each end ÷ by none");
                ratio(&count.to_string(), title, name, NULL.one, goal(count))
            })
            .collect();
        let [(few, _), .., (many, _)] = RULES;
        ratios.push(ratio("slope", format!("judged by {many} ÷ by {few}"), many, few, 0.99));
        let blocks = format!("judged by a list of {count} blocks of addresses at each end ÷ by none");
        ratios.push(ratio("blocks", blocks, BLOCKS, NULL.one, 0.95));
        ratios
    })
}

/// On two nodes: what goes out is judged on the one, what comes in on the other.
///
/// # Errors
/// As [`same_node`].
pub(super) fn across_nodes(run: &mut Run) -> Result<()> {
    if measures(run).is_empty() {
        return Ok(());
    }
    let (name, count) = SOME;
    let pairs = [
        Pair::apart(run, NULL.one, &[])?,
        Pair::apart(run, NULL.other, &[])?,
        Pair::apart(run, name, &policies::rules(count, ADMITTED))?,
    ];
    compare(run, "two nodes, with policies", &pairs, |measure| {
        vec![Ratio {
            id: format!("policy.{}.across", measure.id()),
            title: format!("across nodes, {}: judged by {name} at each end ÷ by none", measure.title()),
            over: name,
            under: NULL.one,
            goal: Some(Goal::AtLeast(0.97)),
        }]
    })
}
