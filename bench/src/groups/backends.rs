//! Every backend beside the bare underlay: a lab for each, all measured in the same rounds.

use anyhow::Result;

use super::{Ratio, Run};
use crate::baseline::Baseline;
use crate::lab::Lab;
use crate::load::{Ends, Measure};
use crate::row::{Goal, Null};

const NULL: Null = Null { one: "underlay", other: "another underlay" };
const KERNEL: &str = "kernel VXLAN and bridges";
const WIREGUARD: &str = "wireguard-go";

/// A backend of Towpath as it is compared.
struct Backend {
    name: &'static str,
    /// What it demands of what lies between the nodes.
    demands: &'static str,
    /// What is to be reached of the bare underlay.
    goals: fn(Measure) -> Option<f64>,
}

const UDP: &str = "udp";

const BACKENDS: [Backend; 5] = [
    Backend {
        name: "vxlan",
        demands: "UDP port 8472",
        goals: |measure| match measure {
            Measure::Rr => Some(0.95),
            Measure::Crr => Some(0.85),
            Measure::Stream => Some(0.80),
            Measure::UdpRr => None,
        },
    },
    Backend {
        name: "host-gw",
        demands: "one link, pods' addresses let through",
        goals: |measure| match measure {
            Measure::Rr => Some(0.90),
            Measure::Stream => Some(0.92),
            Measure::Crr | Measure::UdpRr => None,
        },
    },
    Backend { name: "ipip", demands: "IP protocols 4 and 41, UDP port 8472", goals: |_| None },
    Backend { name: UDP, demands: "UDP port 8285", goals: |_| None },
    Backend { name: "macvlan", demands: "one link, pods' addresses and MAC addresses let through", goals: |_| None },
];

/// A way between two nodes, in the table that compares them.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    /// The arm's name.
    pub(crate) name: &'static str,
    /// Bytes that a packet between its ends can have.
    pub(crate) mtu: u64,
    /// What it demands of the underlay.
    pub(crate) demands: &'static str,
}

/// Title of the series of a measure.
pub(crate) fn title(measure: Measure) -> String {
    format!("{TITLE}, {}", measure.title())
}

const TITLE: &str = "backends";

/// Measures them.
///
/// # Errors
/// A lab does not come up, or a path does not carry traffic.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    let limit = Baseline::underlay("underlay", run.cpus)?;
    let again = Baseline::underlay("underlay-again", run.cpus)?;
    let vxlan = Baseline::vxlan(run.cpus)?;
    let wireguard = Baseline::wireguard(run.cpus)?;
    if wireguard.is_none() {
        crate::report::note("wireguard-go and wg are not installed: not compared with");
    }
    let mut labs = Vec::new();
    let wanted = if run.options.baselines_only { &[][..] } else { &BACKENDS[..] };
    for backend in wanted {
        let mut lab = Lab::with_backend(backend.name)?;
        let (client, server) = (lab.pod("near", "n1")?, lab.pod("far", "n2")?);
        let ends = Ends::start(&format!("pods of lab {}", lab.cgroup_name()), &client.place, &server.place, run.cpus)?;
        let ends = ends.carried_by(lab.node_processes()?);
        run.ways.push(Way { name: backend.name, mtu: lab.pod_mtu()?, demands: backend.demands });
        labs.push((backend, ends, server.ip, lab));
    }
    run.ways.push(Way { name: NULL.one, mtu: 1500, demands: "no pods: node to node" });
    run.ways.push(Way { name: KERNEL, mtu: 1450, demands: "UDP port 8472" });
    if wireguard.is_some() {
        run.ways.push(Way { name: WIREGUARD, mtu: 1420, demands: "no pods: node to node, by UDP port 51820" });
    }
    for measure in run.options.measures.clone() {
        let mut arms = vec![
            limit.ends.to(NULL.one, limit.to),
            again.ends.to(NULL.other, again.to),
            vxlan.ends.to(KERNEL, vxlan.to),
        ];
        arms.extend(wireguard.iter().map(|baseline| baseline.ends.to(WIREGUARD, baseline.to)));
        arms.extend(labs.iter().map(|(backend, ends, to, _)| ends.to(backend.name, *to)));
        let ratio = |over: &'static str, goal: Option<f64>| Ratio {
            id: format!("backends.{}.{over}", measure.id()).replace(' ', "-"),
            title: format!("{}: {over} ÷ bare underlay", measure.title()),
            over,
            under: NULL.one,
            goal: goal.map(Goal::AtLeast),
        };
        let mut ratios: Vec<Ratio> = wanted.iter().map(|b| ratio(b.name, (b.goals)(measure))).collect();
        ratios.extend([KERNEL, WIREGUARD].map(|name| ratio(name, None)));
        let goal = |goal: f64| (measure == Measure::Stream).then_some(Goal::AtLeast(goal));
        for (under, goal) in [("vxlan", goal(0.35)), (WIREGUARD, goal(3.0))] {
            let title = format!("{}: {UDP} ÷ {under}", measure.title());
            ratios.push(Ratio { id: format!("backends.{}.udp-{under}", measure.id()), title, over: UDP, under, goal });
        }
        run.compare(TITLE, &arms, measure, NULL, ratios)?;
    }
    Ok(())
}
