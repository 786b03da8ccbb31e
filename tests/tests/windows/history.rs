//! What was wanted when, and from when on each node said that it enforces it; and every packet held against that.
//!
//! A packet is judged at both ends, each on its own node. Before a node has acknowledged a change it may judge as before or as after it; once it has,
//! only as after it. So a packet that was heard must be allowed, at each end, by one of the worlds between the last that the node had
//! acknowledged when the packet was sent and the last that was begun when it was heard. One that was not heard must be denied, at one end,
//! by one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;

use anyhow::Result;
use towpath_oracle::{Cluster as Objects, Traffic, egress_allowed, ingress_allowed};
use towpath_walkthrough::traffic::{Heard, Sent};

/// A packet that its sender has handed over is judged within this time, in nanoseconds.
const UNDERWAY: u64 = 500_000_000;
/// So many violations are told.
const TOLD: usize = 12;

/// What was wanted from a moment on.
struct World {
    begun: u64,
    objects: Objects,
    what: String,
}

/// All that was wanted, and when who enforced it.
#[derive(Default)]
pub(crate) struct History {
    worlds: Vec<World>,
    acknowledged: BTreeMap<String, Vec<u64>>,
}

/// One way that packets go.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    /// Node of the sender, and of the receiver.
    pub(crate) nodes: [String; 2],
    /// Names of both pods.
    pub(crate) names: [String; 2],
    /// Their addresses.
    pub(crate) from: IpAddr,
    pub(crate) to: IpAddr,
    /// UDP port.
    pub(crate) port: u16,
}

/// What came of it.
#[derive(Default, Debug)]
pub(crate) struct Judged {
    pub(crate) sent: usize,
    pub(crate) heard: usize,
    /// Packets that were judged while a change was not acknowledged by one of their nodes.
    pub(crate) in_windows: usize,
    pub(crate) forbidden: usize,
    pub(crate) lost: usize,
    /// Changes that changed the verdict over at least one way.
    pub(crate) telling: usize,
    pub(crate) told: Vec<String>,
}

/// Verdicts over one way in each world: at the sender's end, at the receiver's.
type Verdicts = Vec<[bool; 2]>;

impl History {
    /// From now on this is wanted.
    pub(crate) fn begins(&mut self, at: u64, objects: Objects, what: String) {
        self.worlds.push(World { begun: at, objects, what });
    }

    /// A node enforces everything that is wanted so far.
    pub(crate) fn acknowledges(&mut self, node: &str, at: u64) {
        self.acknowledged.entry(node.to_owned()).or_default().resize(self.worlds.len(), at);
    }

    /// The worlds by which a node may judge what was sent and over between two moments.
    fn possible(&self, node: &str, sent: u64, over: u64) -> RangeInclusive<usize> {
        let acknowledged = self.acknowledged.get(node).map_or(&[][..], Vec::as_slice);
        let first = acknowledged.partition_point(|at| *at <= sent).saturating_sub(1);
        let last = self.worlds.partition_point(|world| world.begun <= over).saturating_sub(1);
        first..=last.max(first)
    }

    fn verdicts(&self, way: &Way) -> Verdicts {
        let traffic = Traffic { from: way.from, to: way.to, protocol: "UDP", port: way.port };
        let of = |world: &World| [egress_allowed(&world.objects, &traffic), ingress_allowed(&world.objects, &traffic)];
        self.worlds.iter().map(of).collect()
    }

    /// Judges all packets; ways are by sender and flow.
    pub(crate) fn judge(&self, ways: &BTreeMap<(u32, u32), Way>, sent: &[Sent], heard: &[Heard]) -> Result<Judged> {
        let verdicts: BTreeMap<(u32, u32), Verdicts> = ways.iter().map(|(id, way)| (*id, self.verdicts(way))).collect();
        let mut judged = Judged { sent: sent.len(), heard: heard.len(), ..Judged::default() };
        judged.telling = (1..self.worlds.len())
            .filter(|world| verdicts.values().any(|of| of.get(*world) != of.get(world - 1)))
            .count();
        let id = |packet: &towpath_walkthrough::traffic::Packet| (packet.sender, packet.flow);
        let arrived: BTreeSet<_> = heard.iter().map(|heard| heard.packet).collect();
        for Heard { packet, at } in heard {
            let (Some(way), Some(verdicts)) = (ways.get(&id(packet)), verdicts.get(&id(packet))) else { continue };
            let possible = [0, 1].map(|end| self.possible(&way.nodes[end], packet.sent, *at));
            judged.in_windows += usize::from(possible.iter().any(|worlds| worlds.start() != worlds.end()));
            let allowed = [0, 1].map(|end| verdicts[possible[end].clone()].iter().any(|verdict| verdict[end]));
            if allowed != [true, true] {
                judged.forbidden += 1;
                let end = usize::from(allowed[0]);
                judged.tell(format!(
                    "forbidden at {}: {}",
                    way.nodes[end],
                    self.told(way, packet.sent, *at, &possible[end])
                ));
            }
        }
        for Sent { packet, done } in sent.iter().filter(|sent| !arrived.contains(&sent.packet)) {
            let (Some(way), Some(verdicts)) = (ways.get(&id(packet)), verdicts.get(&id(packet))) else { continue };
            let possible = [0, 1].map(|end| self.possible(&way.nodes[end], packet.sent, done + UNDERWAY));
            let denied = [0, 1].iter().any(|end| verdicts[possible[*end].clone()].iter().any(|verdict| !verdict[*end]));
            if !denied {
                judged.lost += 1;
                judged.tell(format!("lost: {}", self.told(way, packet.sent, *done, &possible[1])));
            }
        }
        Ok(judged)
    }

    fn told(&self, way: &Way, sent: u64, over: u64, possible: &RangeInclusive<usize>) -> String {
        let ms = |at: u64| at as f64 / 1e6;
        let worlds = possible.clone().filter_map(|at| Some((at, self.worlds.get(at)?)));
        let worlds: Vec<String> = worlds.map(|(at, w)| format!("  {at} ({:.2} ms) {}", ms(w.begun), w.what)).collect();
        format!(
            "{} → {}:{} sent {:.2} ms, over {:.2} ms; judged by one of:\n{}",
            way.names[0],
            way.names[1],
            way.port,
            ms(sent),
            ms(over),
            worlds.join("\n")
        )
    }
}

impl Judged {
    fn tell(&mut self, what: String) {
        if self.told.len() < TOLD {
            self.told.push(what);
        }
    }
}
