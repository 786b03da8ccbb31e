//! Two pods of one node, against a bare veth pair and a Linux bridge.

use anyhow::Result;

use super::{Ratio, Run};
use crate::baseline::Baseline;
use crate::lab::Lab;
use crate::load::{Ends, Measure};
use crate::row::{Goal, Null};

const NULL: Null = Null { one: "veth pair", other: "another veth pair" };

/// Measures them.
///
/// # Errors
/// A path does not carry traffic, or cannot be made.
pub(super) fn measure(run: &mut Run, lab: Option<&mut Lab>) -> Result<()> {
    let limit = Baseline::veth("veth", run.cpus)?;
    let again = Baseline::veth("veth-again", run.cpus)?;
    let bridge = Baseline::bridge(run.cpus)?;
    let ours = match lab {
        Some(lab) => {
            let (client, server) = (lab.pod("near", "n1")?, lab.pod("server", "n1")?);
            Some((Ends::start("two pods of one node", &client.place, &server.place, run.cpus)?, server.ip))
        }
        None => None,
    };
    for measure in run.options.measures.clone() {
        let mut arms = vec![
            limit.ends.to(NULL.one, limit.to),
            again.ends.to(NULL.other, again.to),
            bridge.ends.to("Linux bridge", bridge.to),
        ];
        arms.extend(ours.as_ref().map(|(ends, to)| ends.to("Towpath", *to)));
        let ratio = |name: &str, over, under, against: &str, goal| Ratio {
            id: format!("same-node.{}.{name}", measure.id()),
            title: format!("same node, {}: {against}", measure.title()),
            over,
            under,
            goal,
        };
        let goal = (measure != Measure::UdpRr).then_some(Goal::AtLeast(0.95));
        let ratios = vec![
            ratio("veth", "Towpath", NULL.one, "Towpath ÷ bare veth pair", goal),
            ratio("bridge", "Towpath", "Linux bridge", "Towpath ÷ Linux bridge with conntrack", None),
            ratio("bridge-veth", "Linux bridge", NULL.one, "Linux bridge with conntrack ÷ bare veth pair", None),
        ];
        run.compare("same node", &arms, measure, NULL, ratios)?;
    }
    Ok(())
}
