//! What `towpath observe --drops` costs a flow that is allowed: with nothing dropped, and beside a stream of packets that are.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::super::{Ratio, Run};
use crate::cluster::policies::only;
use crate::cluster::{Node, PORT};
use crate::datagrams::Request;
use crate::lab::wait;
use crate::load::{Ends, Measure};
use crate::place::Place;
use crate::rounds::{self, Arm, Block};
use crate::row::{Goal, Null};
use crate::worker::Worker;

const NULL: Null = Null { one: "nobody listens", other: "nobody listens again" };
const LISTENING: &str = "somebody listens";
const DROPS: &str = "drops";
const DROPS_HEARD: &str = "drops, somebody listens";
/// Packets a second that are dropped.
const A_SECOND: u32 = 1000;
/// The programs still tell for so long after the last one who listened is gone.
const SETTLE: Duration = Duration::from_millis(300);
/// How long a block must be at least to have a connection in it.
const PROBE: Duration = Duration::from_millis(5);
/// Longest time until the policy is enforced.
const SLACK: Duration = Duration::from_secs(70);

/// What happens beside the measured flow.
#[derive(Clone, Copy, Debug)]
struct Beside {
    listens: bool,
    drops: bool,
}

/// The node, and what runs on it.
struct Scene {
    ends: Ends,
    to: SocketAddr,
    /// Where the packets come from that are dropped, and where they go.
    stranger: Place,
    guarded: SocketAddr,
    // Last: what runs there has ended by then.
    _echo: Worker,
    node: Node,
}

impl Scene {
    fn block(&self, beside: Beside, length: Duration) -> Result<Block> {
        std::thread::sleep(SETTLE);
        let listener = beside.listens.then(|| self.node.listen_to_drops()).transpose()?;
        let (to, a_second) = (self.guarded.to_string(), A_SECOND.to_string());
        let knocking = ["knock", to.as_str(), a_second.as_str()];
        let knocks = beside.drops.then(|| Worker::start("a stranger", &self.stranger, &knocking)).transpose()?;
        let block = self.ends.block(Measure::Rr, self.to, length)?;
        drop(knocks);
        if let Some(listener) = listener {
            std::thread::sleep(SETTLE);
            let (heard, expected) = (listener.heard()?, length.as_secs_f64() * f64::from(A_SECOND));
            // A hundredth of them is enough to know that it did listen: who listens to a flood is told a part.
            ensure!(!beside.drops || heard as f64 > expected / 100.0, "of about {expected} drops {heard} were told");
        }
        Ok(block)
    }
}

/// Measures it.
///
/// # Errors
/// The agent does not come up, or tells nothing of drops.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    crate::report::progress("a node that is listened to");
    let mut node = Node::new(1)?;
    // What is measured goes to another pod, which no policy selects.
    node.api.apply(only("near", "guarded"))?;
    node.start_agent()?;
    node.until_ready()?;
    let (near, server) = (node.pod("near")?, node.pod("server")?);
    let (behind, stranger) = (node.pod("guarded")?, node.pod("stranger")?);
    let ends = Ends::start("two pods that are listened to", &near.place, &server.place, run.cpus)?;
    let echo = Worker::start("a server that is guarded", &behind.place, &["serve-udp"])?;
    let to = SocketAddr::new(server.ip, PORT);
    wait(&format!("{to} to answer"), || Ok(ends.block(Measure::Crr, to, PROBE).ok()))?;
    let guarded = SocketAddr::new(behind.ip, PORT);
    for (place, passes) in [(&near.place, true), (&stranger.place, false)] {
        let mut client = Worker::start("a client of a guarded server", place, &["until-verdict"])?;
        client
            .ask::<u64>(&Request::certain(guarded, passes), SLACK)
            .map_err(|error| error.context(node.end_of_log()))?;
    }
    let (pids, cgroup) = (ends.pids(Measure::Rr), node.cgroup_name());
    let scene = Scene { ends, to, stranger: stranger.place, guarded, _echo: echo, node };
    let length = run.protocol.block;
    let arm = |name, listens, drops| Arm {
        name,
        pids: pids.to_vec(),
        run: Box::new({
            let scene = &scene;
            move || scene.block(Beside { listens, drops }, length)
        }),
    };
    let mut arms = [
        arm(NULL.one, false, false),
        arm(NULL.other, false, false),
        arm(LISTENING, true, false),
        arm(DROPS, false, true),
        arm(DROPS_HEARD, true, true),
    ];
    let title = "one node that is listened to".to_owned();
    let series = rounds::measure(&title, &mut arms, &run.protocol, Some(&cgroup), &mut run.random)?;
    drop(arms);
    let ratio = |id: &str, title: &str, over, under, goal| Ratio {
        id: format!("policy.observe.{id}"),
        title: format!("same node, TCP RR: {title}"),
        over,
        under,
        goal,
    };
    let goal = Some(Goal::AtLeast(0.99));
    let ratios = vec![
        ratio("quiet", "`towpath observe --drops` ÷ nobody listens", LISTENING, NULL.one, goal),
        ratio("drops", "the same, beside 1,000 datagrams a second that are dropped", DROPS_HEARD, DROPS, goal),
        ratio("cost", "1,000 datagrams a second are dropped ÷ none, nobody listens", DROPS, NULL.one, None),
    ];
    run.take(title, series, NULL, ratios);
    Ok(())
}
