//! Whether somebody is in a set as people write it ([`super::words`]).

use std::net::IpAddr;

use towpath_model::Labels;
use towpath_model::desired::RowProtocol;

use super::words::{Peers, Place, PortWords, Term, Within};

/// Somebody: a pod, or an address outside.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// Whether it is a node; then `labels` are the node's.
    pub(super) is_node: bool,
    /// None: it is no pod.
    pub(super) namespace: Option<String>,
    pub(super) namespace_labels: Labels,
    pub(super) labels: Labels,
    pub(super) address: IpAddr,
}

/// Whether it is in the set. Names are nobody here: who has a name is for who knows the universe.
pub(super) fn holds(set: &Peers, peer: &Peer) -> bool {
    set.0.iter().any(|term| is_in(term, peer))
}

fn is_in(term: &Term, peer: &Peer) -> bool {
    match term {
        Term::Anything => true,
        Term::Outside => peer.namespace.is_none(),
        Term::NotIn(place) => !in_place(place, peer),
        Term::Addresses(net) => net.contains(&peer.address),
        Term::Pods(selector, within) => {
            let here = match within {
                Within::Any => true,
                Within::In(place) => in_place(place, peer),
                Within::NotIn(place) => !in_place(place, peer),
            };
            peer.namespace.is_some() && here && selector.matches(&peer.labels)
        }
        Term::Node(None) => peer.is_node,
        Term::Named { .. } | Term::Node(Some(_)) => false,
    }
}

fn in_place(place: &Place, peer: &Peer) -> bool {
    let Some(namespace) = &peer.namespace else { return false };
    match place {
        Place::Named(names) => names.contains(namespace),
        Place::Matching(selector) => selector.matches(&peer.namespace_labels),
    }
}

/// Whether a port is in the set. `named`: what the destination calls it.
pub(super) fn holds_ports(set: &PortWords, protocol: RowProtocol, port: u16, named: &[(&str, RowProtocol)]) -> bool {
    let by_name = |(name, of): &(String, towpath_model::Protocol)| {
        protocol == RowProtocol::Ports(*of) && named.contains(&(name.as_str(), protocol))
    };
    set.fixed.has(protocol, port) || set.named.iter().any(by_name)
}
