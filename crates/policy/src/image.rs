//! A [`PolicyImage`] read as the kernel reads it: the same look-ups in the same order.
//!
//! The [translation check](crate::check) reads images this way too; `explain` uses it to tell what a node really holds.

use std::net::IpAddr;

use ipnet::IpNet;
use towpath_model::Direction;
use towpath_model::desired::{ClassId, LocalClass, PolicyImage, RowKey, RowProtocol, RuleId, SetId, Verdict};

/// The class of an address: pods first, then the longest prefix of its family, else class 0.
pub fn class_of(image: &PolicyImage, address: IpAddr) -> ClassId {
    image.pod_classes.get(&address).copied().unwrap_or_else(|| prefix_class(image, address))
}

/// The class of an address that is no pod's: the longest prefix of its family, else class 0.
pub(crate) fn prefix_class(image: &PolicyImage, address: IpAddr) -> ClassId {
    let bits: u8 = if address.is_ipv4() { 32 } else { 128 };
    (0..=bits)
        .rev()
        .filter_map(|length| IpNet::new(address, length).ok())
        .find_map(|net| image.cidr_classes.get(&net.trunc()).copied())
        .unwrap_or_default()
}

/// The verdict of a set on a peer, and who says so. `port` is the destination port of the flow's first packet, 0 for
/// [`RowProtocol::Other`].
pub fn judge(image: &PolicyImage, set: SetId, peer: IpAddr, protocol: RowProtocol, port: u16) -> (Verdict, RuleId) {
    if set == SetId::default() {
        return (Verdict::Allow, RuleId::NOT_ISOLATED);
    }
    let class = image.set_classes.get(&(set, class_of(image, peer))).copied().unwrap_or(LocalClass(0));
    let port = if protocol == RowProtocol::Other { 0 } else { port };
    let row = (0..=16u8).rev().find_map(|port_bits| {
        let key = RowKey { set, class, protocol, port: port & port_mask(port_bits), port_bits };
        image.rows.get(&key)
    });
    row.map_or((Verdict::Deny, RuleId::DEFAULT_DENY), |row| (row.verdict, row.rule))
}

/// The verdict of a local pod's set of a direction. An address that is no known pod of the node: denied all but itself.
pub fn judge_pod(
    image: &PolicyImage,
    pod: IpAddr,
    direction: Direction,
    peer: IpAddr,
    protocol: RowProtocol,
    port: u16,
) -> (Verdict, RuleId) {
    if pod == peer {
        return (Verdict::Allow, RuleId::SELF);
    }
    let Some(sets) = image.pods.get(&pod) else { return (Verdict::Deny, RuleId::HOST_ONLY) };
    judge(image, sets.of(direction).0, peer, protocol, port)
}

/// What a local pod's set of a direction would say if the policies that are only audited were enforced; none: the same.
pub fn audit_pod(
    image: &PolicyImage,
    pod: IpAddr,
    direction: Direction,
    peer: IpAddr,
    protocol: RowProtocol,
    port: u16,
) -> Option<(Verdict, RuleId)> {
    let (_, audited) = image.pods.get(&pod)?.of(direction);
    (audited != SetId::default() && pod != peer).then(|| judge(image, audited, peer, protocol, port))
}

/// The mask of a prefix of `bits` bits of a port.
pub(crate) fn port_mask(bits: u8) -> u16 {
    u16::MAX.checked_shl(16u32.saturating_sub(u32::from(bits))).unwrap_or(0)
}
