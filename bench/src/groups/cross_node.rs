//! Pods of two nodes, against the bare underlay and kernel VXLAN with bridges.

use anyhow::Result;

use super::{Ratio, Run};
use crate::baseline::Baseline;
use crate::lab::Lab;
use crate::load::{Ends, Measure};
use crate::row::{Goal, Null};

const NULL: Null = Null { one: "underlay", other: "another underlay" };

/// Measures them.
///
/// # Errors
/// A path does not carry traffic, or cannot be made.
pub(super) fn measure(run: &mut Run, lab: Option<&mut Lab>) -> Result<()> {
    let limit = Baseline::underlay("underlay", run.cpus)?;
    let again = Baseline::underlay("underlay-again", run.cpus)?;
    let vxlan = Baseline::vxlan(run.cpus)?;
    let ours = match lab {
        Some(lab) => {
            let (client, server) = (lab.pod("near", "n1")?, lab.pod("far", "n2")?);
            let pods = Ends::start("pods of two nodes", &client.place, &server.place, run.cpus)?;
            let ((client, _), (node, address)) = (lab.node("n1")?, lab.node("n2")?);
            let nodes = Ends::start("two nodes of the lab", &client, &node, run.cpus)?;
            Some([("Towpath", pods, server.ip), ("nodes of the lab", nodes, address)])
        }
        None => None,
    };
    for measure in run.options.measures.clone() {
        let mut arms = vec![
            limit.ends.to(NULL.one, limit.to),
            again.ends.to(NULL.other, again.to),
            vxlan.ends.to("kernel VXLAN", vxlan.to),
        ];
        arms.extend(ours.iter().flatten().map(|(name, ends, to)| ends.to(name, *to)));
        let ratio = |name: &str, over, under, against: &str, goal| Ratio {
            id: format!("cross-node.{}.{name}", measure.id()),
            title: format!("across nodes, {}: {against}", measure.title()),
            over,
            under,
            goal,
        };
        let goal = match measure {
            Measure::Rr => Some(Goal::AtLeast(0.90)),
            Measure::Crr | Measure::Stream => Some(Goal::AtLeast(0.80)),
            Measure::UdpRr => None,
        };
        let ratios = vec![
            ratio("underlay", "Towpath", NULL.one, "Towpath (VXLAN) ÷ bare underlay", goal),
            ratio("nodes", "Towpath", "nodes of the lab", "Towpath (VXLAN) ÷ node to node in the lab", None),
            ratio("vxlan", "Towpath", "kernel VXLAN", "Towpath (VXLAN) ÷ kernel VXLAN and bridges", None),
            ratio("vxlan-underlay", "kernel VXLAN", NULL.one, "kernel VXLAN and bridges ÷ bare underlay", None),
        ];
        run.compare("across nodes", &arms, measure, NULL, ratios)?;
    }
    Ok(())
}
