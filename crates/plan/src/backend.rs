//! Which way packets go to each node while nodes change from one backend to another.
//!
//! Every node takes envelopes (VXLAN), whatever its backend is, so no order of changes leaves two nodes without a way. A node is sent
//! another backend's packets when it says that it is ready for them; and a node takes them from all nodes as long as any may still send
//! them, also after it has left that backend itself.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use towpath_model::NodeName;
use towpath_model::custom::{BackendName, NodeNetwork};
use towpath_model::desired::Reach;

/// What a node's `NodeNetwork` says of backends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Says {
    /// What it sends by. None: it does not say, and sends envelopes.
    pub sends: Option<BackendName>,
    /// What it is ready to receive besides envelopes.
    pub receives: BTreeSet<BackendName>,
}

impl Says {
    /// What an object says.
    pub fn of(object: &NodeNetwork) -> Self {
        let status = object.status.as_ref();
        Self {
            sends: status.and_then(|status| status.backend),
            receives: status.iter().flat_map(|status| status.receive_ready.iter().copied()).collect(),
        }
    }
}

/// What a node is able to do for some of the backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Able {
    /// Its kernel takes packets of both families out of an IP header.
    pub ipip: bool,
    /// Somebody in user space carries its packets (`udp`).
    pub udp: bool,
}

/// What a node whose backend is `own` is ready to receive, and tells the others so. `ipip` asks for nothing that envelopes do not, so it is
/// taken whatever the backend is.
pub fn ready_for(own: BackendName, able: Able) -> BTreeSet<BackendName> {
    let mut ready = BTreeSet::from([BackendName::Vxlan]);
    ready.extend((own == BackendName::HostGw).then_some(BackendName::HostGw));
    ready.extend(able.ipip.then_some(BackendName::Ipip));
    ready.extend((own == BackendName::Udp && able.udp).then_some(BackendName::Udp));
    ready
}

/// How nodes' pods are reached that are not sent envelopes, from a node that is able to do so much.
pub fn instead(own: BackendName, able: Able, said: &BTreeMap<NodeName, Says>) -> BTreeMap<NodeName, Reach> {
    let reach = match own {
        BackendName::Vxlan => return BTreeMap::new(),
        BackendName::Udp if !able.udp => return BTreeMap::new(),
        BackendName::Udp => Reach::Udp,
        BackendName::HostGw => Reach::Route,
        BackendName::Ipip => Reach::Ipip,
    };
    said.iter().filter(|(_, says)| says.receives.contains(&own)).map(|(node, _)| (node.clone(), reach)).collect()
}

/// Whether packets of other nodes' pods are taken as they are.
pub fn takes_plain(own: BackendName, said: &BTreeMap<NodeName, Says>) -> bool {
    own == BackendName::HostGw || said.values().any(|says| says.sends == Some(BackendName::HostGw))
}

/// Whether packets are taken by way of user space.
pub fn takes_udp(own: BackendName, said: &BTreeMap<NodeName, Says>) -> bool {
    own == BackendName::Udp || said.values().any(|says| says.sends == Some(BackendName::Udp))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [BackendName; 4] = [BackendName::Vxlan, BackendName::HostGw, BackendName::Ipip, BackendName::Udp];
    const ABLE: Able = Able { ipip: true, udp: true };

    fn says(backend: BackendName) -> Says {
        Says { sends: Some(backend), receives: ready_for(backend, ABLE) }
    }

    /// Whether what the first sends to the second arrives.
    fn arrives(from: (BackendName, &BTreeMap<NodeName, Says>), to: (BackendName, &BTreeMap<NodeName, Says>)) -> bool {
        match instead(from.0, ABLE, from.1).get(&NodeName::new("to")) {
            Some(Reach::Route) => takes_plain(to.0, to.1),
            Some(Reach::Udp) => takes_udp(to.0, to.1),
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
        assert!(takes_plain(BackendName::Vxlan, &said), "one still sends so");
        assert!(!takes_plain(BackendName::Vxlan, &BTreeMap::from([(NodeName::new("old"), Says::default())])));
    }
}
