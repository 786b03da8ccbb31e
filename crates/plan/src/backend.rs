//! Which way packets go to each node while nodes change from one backend to another.
//!
//! Every node takes envelopes (VXLAN), whatever its backend is, so no order of changes leaves two nodes without a way. A node is sent
//! another backend's packets when it says that it is ready for them; and a node takes them from all nodes as long as any may still send
//! them, also after it has left that backend itself.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use towpath_model::NodeName;
use towpath_model::added_ranges::MOST;
use towpath_model::custom::{BackendName, NodeNetwork};
use towpath_model::desired::Reach;

/// What a node's `NodeNetwork` says of backends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Says {
    /// What it sends by. None: it does not say, and sends envelopes.
    pub sends: Option<BackendName>,
    /// What it is ready to receive besides envelopes.
    pub receives: BTreeSet<BackendName>,
    /// Pod ranges beyond its `spec.podCIDRs` that it uses ([`crate::added_ranges`]). Text that is no range is left out.
    #[serde(default)]
    pub added_ranges: Vec<IpNet>,
}

impl Says {
    /// What an object says.
    pub fn of(object: &NodeNetwork) -> Self {
        let status = object.status.as_ref();
        Self {
            sends: status.and_then(|status| status.backend),
            receives: status.iter().flat_map(|status| status.receive_ready.iter().copied()).collect(),
            added_ranges: ranges_of(object),
        }
    }
}

fn ranges_of(object: &NodeNetwork) -> Vec<IpNet> {
    let ranges = object.spec.added_pod_cidrs.iter().filter_map(|text| text.parse::<IpNet>().ok());
    ranges.map(|range| range.trunc()).take(2 * MOST).collect()
}

/// What a node is able to do for some of the backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Able {
    /// Its kernel takes packets of both families out of an IP header.
    pub ipip: bool,
    /// Somebody in user space carries its packets (`udp`).
    pub udp: bool,
    /// Its uplink sends and takes frames with other MAC addresses than its own (`macvlan`).
    pub macs: bool,
}

/// What a node whose backend is `own` is ready to receive, and tells the others so. `ipip` asks for nothing that envelopes do not, so it is
/// taken whatever the backend is.
pub fn ready_for(own: BackendName, able: Able) -> BTreeSet<BackendName> {
    let mut ready = BTreeSet::from([BackendName::Vxlan]);
    // Who is on the link takes packets as they are whichever MAC they are sent to.
    ready.extend(matches!(own, BackendName::HostGw | BackendName::Macvlan).then_some(BackendName::HostGw));
    ready.extend(able.ipip.then_some(BackendName::Ipip));
    ready.extend((own == BackendName::Udp && able.udp).then_some(BackendName::Udp));
    ready.extend((own == BackendName::Macvlan && able.macs).then_some(BackendName::Macvlan));
    ready
}

/// How nodes' pods are reached that are not sent envelopes, from a node that is able to do so much.
pub fn instead(own: BackendName, able: Able, said: &BTreeMap<NodeName, Says>) -> BTreeMap<NodeName, Reach> {
    let reach = match own {
        BackendName::Vxlan => return BTreeMap::new(),
        BackendName::Udp if !able.udp => return BTreeMap::new(),
        BackendName::Udp => Reach::Udp,
        BackendName::Macvlan if !able.macs => return BTreeMap::new(),
        BackendName::Macvlan => Reach::Link,
        BackendName::HostGw => Reach::Route,
        BackendName::Ipip => Reach::Ipip,
    };
    said.iter().filter(|(_, says)| says.receives.contains(&own)).map(|(node, _)| (node.clone(), reach)).collect()
}

/// Why the pods of a node are not reached by the backend that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It has not said that it takes such packets.
    NotReady,
    /// It has said nothing at all of backends.
    Silent,
    /// Its kernel cannot take such packets.
    Kernel,
    /// It is not on a link with this one.
    BeyondRouter,
    /// It goes by what another node goes by where this backend has no room for whole addresses, or this node does.
    SameName,
    /// Its uplink, or this node's, bears no MAC address but its own.
    Uplink,
}

impl Why {
    /// In one word, as conditions have it.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotReady => "NotReady",
            Self::Silent => "Silent",
            Self::Kernel => "Kernel",
            Self::BeyondRouter => "BeyondRouter",
            Self::SameName => "SameName",
            Self::Uplink => "Uplink",
        }
    }

    /// What is to be said of the node.
    pub fn in_words(self) -> &'static str {
        match self {
            Self::NotReady => "has not said that it is ready for that",
            Self::Silent => "has said nothing: is its agent running, and of this version?",
            Self::Kernel => "has a kernel that cannot take it (ipip asks for Linux 6.3)",
            Self::BeyondRouter => "is beyond a router",
            Self::SameName => {
                "has, or this node has, an IPv6 address of the same 40 bits as another node's (udp): give one of them another address"
            }
            Self::Uplink => {
                "has, or this node has, an uplink that bears no MAC addresses of pods (macvlan asks for Ethernet, not wireless)"
            }
        }
    }

    /// Whether it is a matter of time. What is not stays as it is until somebody changes a kernel or a network.
    pub fn passes(self) -> bool {
        matches!(self, Self::NotReady | Self::Silent)
    }
}

/// A node whose pods are reached by another backend than the one that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Behind {
    /// The node.
    pub node: NodeName,
    /// The backend that its pods are reached by.
    pub by: BackendName,
    /// Why.
    pub why: Why,
}

/// The backend that a way is of.
pub fn of_way(reach: Reach) -> BackendName {
    match reach {
        Reach::Route => BackendName::HostGw,
        Reach::Ipip => BackendName::Ipip,
        Reach::Udp => BackendName::Udp,
        Reach::Link => BackendName::Macvlan,
        Reach::Tunnel | Reach::TunnelTo(_) => BackendName::Vxlan,
    }
}

/// A peer as it is reached now.
#[derive(Clone, Copy, Debug)]
pub struct Way<'a> {
    /// The node.
    pub node: &'a NodeName,
    /// How its pods are reached.
    pub reach: Reach,
    /// It or this node goes by what another node goes by in datagrams (`udp`).
    pub same_name: bool,
    /// There is a router in between.
    pub beyond: bool,
}

/// The nodes that are not reached by the backend `wanted`, and why; `able`: this node. Everybody takes envelopes, so when those are wanted nobody is behind but for an instant.
pub fn behind<'a>(
    wanted: BackendName,
    able: Able,
    ways: impl IntoIterator<Item = Way<'a>>,
    said: &BTreeMap<NodeName, Says>,
) -> Vec<Behind> {
    let behind = |way: Way<'_>| {
        let by = of_way(way.reach);
        (by != wanted && wanted != BackendName::Vxlan).then(|| Behind {
            node: way.node.clone(),
            by,
            why: match said.get(way.node) {
                _ if way.beyond => Why::BeyondRouter,
                _ if wanted == BackendName::Macvlan && !able.macs => Why::Uplink,
                _ if wanted == BackendName::Udp && way.same_name => Why::SameName,
                None => Why::Silent,
                // Whose agent is ready takes those of this backend whatever its own is, if its kernel can.
                Some(says)
                    if wanted == BackendName::Ipip
                        && says.receives.contains(&BackendName::Vxlan)
                        && !says.receives.contains(&wanted) =>
                {
                    Why::Kernel
                }
                // Whoever has this backend is ready, if its uplink is.
                Some(says)
                    if wanted == BackendName::Macvlan
                        && says.sends == Some(wanted)
                        && !says.receives.contains(&wanted) =>
                {
                    Why::Uplink
                }
                Some(_) => Why::NotReady,
            },
        })
    };
    ways.into_iter().filter_map(behind).collect()
}

/// Whether packets of other nodes' pods are taken as they are.
pub fn takes_plain(own: BackendName, said: &BTreeMap<NodeName, Says>) -> bool {
    let plain = |backend| matches!(backend, BackendName::HostGw | BackendName::Macvlan);
    plain(own) || said.values().any(|says| says.sends.is_some_and(plain))
}

/// Whether this node's pods are on the link, at MAC addresses of their own.
pub fn takes_on_link(own: BackendName, able: Able, said: &BTreeMap<NodeName, Says>) -> bool {
    let some_send = || said.values().any(|says| says.sends == Some(BackendName::Macvlan));
    able.macs && (own == BackendName::Macvlan || some_send())
}

/// Whether packets are taken by way of user space.
pub fn takes_udp(own: BackendName, said: &BTreeMap<NodeName, Says>) -> bool {
    own == BackendName::Udp || said.values().any(|says| says.sends == Some(BackendName::Udp))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [BackendName; 5] =
        [BackendName::Vxlan, BackendName::HostGw, BackendName::Ipip, BackendName::Udp, BackendName::Macvlan];
    const ABLE: Able = Able { ipip: true, udp: true, macs: true };

    fn says(backend: BackendName) -> Says {
        Says { sends: Some(backend), receives: ready_for(backend, ABLE), ..Says::default() }
    }

    /// Whether what the first sends to the second arrives.
    fn arrives(from: (BackendName, &BTreeMap<NodeName, Says>), to: (BackendName, &BTreeMap<NodeName, Says>)) -> bool {
        match instead(from.0, ABLE, from.1).get(&NodeName::new("to")) {
            Some(Reach::Route) => takes_plain(to.0, to.1),
            Some(Reach::Udp) => takes_udp(to.0, to.1),
            Some(Reach::Link) => takes_plain(to.0, to.1) && takes_on_link(to.0, ABLE, to.1),
            _ => true,
        }
    }

    #[test]
    fn whatever_two_nodes_are_and_however_late_they_hear_of_it_packets_arrive() {
        for [from, to, heard_of_from, heard_of_to] in ALL
            .into_iter()
            .flat_map(|a| ALL.into_iter().flat_map(move |b| ALL.map(|c| ALL.map(|d| [a, b, c, d]))))
            .flatten()
        {
            // Where both are out of date, who just left a backend still takes its packets for a while: the agent's to see to.
            if from != heard_of_from && to != heard_of_to {
                continue;
            }
            let at_from = BTreeMap::from([(NodeName::new("to"), says(heard_of_to))]);
            let at_to = BTreeMap::from([(NodeName::new("from"), says(heard_of_from))]);
            assert!(arrives((from, &at_from), (to, &at_to)), "{from:?} {to:?} {heard_of_from:?} {heard_of_to:?}");
        }
    }

    #[test]
    fn who_is_behind_is_named_with_the_reason_that_holds_longest() {
        let names: BTreeMap<&str, NodeName> =
            ["old", "silent", "router", "late", "there"].map(|name| (name, NodeName::new(name))).into();
        let said = BTreeMap::from([
            (
                names["old"].clone(),
                Says {
                    sends: None,
                    receives: ready_for(BackendName::Ipip, Able { ipip: false, ..ABLE }),
                    ..Says::default()
                },
            ),
            (names["router"].clone(), says(BackendName::HostGw)),
            (names["late"].clone(), says(BackendName::Vxlan)),
            (names["there"].clone(), says(BackendName::HostGw)),
        ]);
        let behind = |wanted, same_name| {
            let ways = names.iter().map(|(name, node)| {
                let reach = match (*name, wanted) {
                    ("there", BackendName::HostGw) => Reach::Route,
                    ("there", BackendName::Ipip) => Reach::Ipip,
                    _ => Reach::Tunnel,
                };
                Way { node, reach, same_name, beyond: *name == "router" }
            });
            let found = super::behind(wanted, ABLE, ways, &said);
            assert!(found.iter().all(|behind| behind.by == BackendName::Vxlan));
            found.into_iter().map(|behind| (behind.node.to_string(), behind.why)).collect::<Vec<_>>()
        };
        let expected = |list: &[(&str, Why)]| list.iter().map(|(n, w)| ((*n).to_owned(), *w)).collect::<Vec<_>>();
        assert_eq!(behind(BackendName::Vxlan, false), []);
        assert_eq!(
            behind(BackendName::HostGw, false),
            expected(&[
                ("late", Why::NotReady),
                ("old", Why::NotReady),
                ("router", Why::BeyondRouter),
                ("silent", Why::Silent)
            ])
        );
        assert_eq!(behind(BackendName::Ipip, false)[1], ("old".to_owned(), Why::Kernel));
        assert_eq!(behind(BackendName::Ipip, true), behind(BackendName::Ipip, false));
        let late = |same_name| behind(BackendName::Udp, same_name).into_iter().find(|(name, _)| name == "late");
        assert_eq!([false, true].map(|same| late(same).unwrap().1), [Why::NotReady, Why::SameName]);
        assert!(!Why::SameName.passes());
        let wireless = |able: Able, other: Able| {
            let said = BTreeMap::from([(
                names["there"].clone(),
                Says {
                    sends: Some(BackendName::Macvlan),
                    receives: ready_for(BackendName::Macvlan, other),
                    ..Says::default()
                },
            )]);
            let way = Way { node: &names["there"], reach: Reach::Tunnel, same_name: false, beyond: false };
            super::behind(BackendName::Macvlan, able, [way], &said)[0].why
        };
        let none = Able { macs: false, ..ABLE };
        assert_eq!(
            [wireless(none, ABLE), wireless(ABLE, none), wireless(ABLE, ABLE)],
            [Why::Uplink, Why::Uplink, Why::NotReady]
        );
        assert!(!Why::Uplink.passes());
        assert!(Why::Silent.passes() && !Why::Kernel.passes() && !Why::BeyondRouter.passes());
    }

    #[test]
    fn a_node_is_sent_what_it_is_ready_for_and_nobody_else_decides() {
        let said = BTreeMap::from([
            (NodeName::new("ready"), says(BackendName::HostGw)),
            (NodeName::new("old"), Says::default()),
            (NodeName::new("vxlan"), says(BackendName::Vxlan)),
        ]);
        assert_eq!(instead(BackendName::HostGw, ABLE, &said), BTreeMap::from([(NodeName::new("ready"), Reach::Route)]));
        assert_eq!(instead(BackendName::Vxlan, ABLE, &said), BTreeMap::new());
        let udp = BTreeMap::from([(NodeName::new("udp"), says(BackendName::Udp))]);
        assert_eq!(instead(BackendName::Udp, ABLE, &udp), BTreeMap::from([(NodeName::new("udp"), Reach::Udp)]));
        let without = Able { udp: false, ..ABLE };
        assert_eq!(instead(BackendName::Udp, without, &udp), BTreeMap::new(), "nobody here would carry it");
        assert!(!ready_for(BackendName::Udp, without).contains(&BackendName::Udp), "nobody here would take it");
        assert!(
            !ready_for(BackendName::Vxlan, ABLE).contains(&BackendName::Udp),
            "no port is open that nobody asked for"
        );
        let named: Vec<String> = instead(BackendName::Ipip, ABLE, &said).keys().map(NodeName::to_string).collect();
        assert_eq!(named, ["ready", "vxlan"], "who is of this version takes them whatever it sends itself");
        assert!(
            !ready_for(BackendName::Ipip, Able { ipip: false, ..ABLE }).contains(&BackendName::Ipip),
            "a kernel that cannot is sent none"
        );
        let link = BTreeMap::from([(NodeName::new("link"), says(BackendName::Macvlan))]);
        assert_eq!(instead(BackendName::Macvlan, ABLE, &link), BTreeMap::from([(NodeName::new("link"), Reach::Link)]));
        assert_eq!(instead(BackendName::HostGw, ABLE, &link), BTreeMap::from([(NodeName::new("link"), Reach::Route)]));
        let wireless = Able { macs: false, ..ABLE };
        assert_eq!(instead(BackendName::Macvlan, wireless, &link), BTreeMap::new(), "nobody would hear its pods");
        assert!(
            !takes_on_link(BackendName::Macvlan, wireless, &link) && takes_on_link(BackendName::Vxlan, ABLE, &link)
        );
        assert!(takes_plain(BackendName::Vxlan, &said), "one still sends so");
        assert!(!takes_plain(BackendName::Vxlan, &BTreeMap::from([(NodeName::new("old"), Says::default())])));
    }
}
