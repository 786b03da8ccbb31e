//! What the kernel tells: counters, connections, how full the maps are.

use std::net::IpAddr;
use std::time::Duration;

use libbpf_rs::Object;
use towpath_model::desired::{RuleId, Verdict};

use super::error::Result;
use super::map::{self, Map};
use crate::abi::*;

/// What a counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reason(u32);

impl Reason {
    /// One of `enum tp_reason`.
    pub const fn new(value: u32) -> Self {
        Self(value)
    }

    /// Whether packets counted here were dropped.
    pub const fn is_drop(self) -> bool {
        self.0 >= TP_DROP_FIRST
    }

    /// Whether packets counted here passed, and an audited policy would have denied the connections that they opened.
    pub const fn is_audit(self) -> bool {
        self.0 == TP_AUDIT_EGRESS || self.0 == TP_AUDIT_INGRESS
    }

    /// Name as a metric label has it.
    pub const fn name(self) -> &'static str {
        match self.0 {
            TP_LOCAL_DELIVERY => "local_delivery",
            TP_TUNNEL_OUT => "tunnel_out",
            TP_TO_STACK => "to_stack",
            TP_SERVICE_TRANSLATED => "service_translated",
            TP_HOST_OUT => "host_out",
            TP_IGNORED => "ignored",
            TP_REFUSED => "refused",
            TP_UNTRACKED => "untracked",
            TP_CT_RECYCLED => "ct_recycled",
            TP_AUDIT_EGRESS => "audit_egress",
            TP_AUDIT_INGRESS => "audit_ingress",
            TP_DIRECT_RETURN => "direct_return",
            TP_IPIP_OUT => "ipip_out",
            TP_UDP_OUT => "udp_out",
            TP_LINK_OUT => "link_out",
            TP_ACCELERATED => "accelerated",
            TP_DROP_MALFORMED => "malformed",
            TP_DROP_SOURCE_ADDRESS => "source_address",
            TP_DROP_SOURCE_MAC => "source_mac",
            TP_DROP_ARP_ND => "arp_nd",
            TP_DROP_MAPPED_V4 => "mapped_v4",
            TP_DROP_EGRESS_POLICY => "egress_policy",
            TP_DROP_INGRESS_POLICY => "ingress_policy",
            TP_DROP_TUNNEL_SOURCE => "tunnel_source",
            TP_DROP_TUNNEL_OUTSIDER => "tunnel_outsider",
            TP_DROP_SPOOFED_NODE => "spoofed_node",
            TP_DROP_NO_BACKEND => "no_backend",
            TP_DROP_CT_FULL => "ct_full",
            TP_DROP_FRAGMENT => "fragment",
            TP_DROP_SERVICE_ICMP => "service_icmp",
            TP_DROP_INTERNAL => "internal",
            TP_DROP_NO_POD => "no_pod",
            TP_DROP_CT_BUDGET => "ct_budget",
            TP_DROP_SOURCE_RANGE => "source_range",
            TP_DROP_SNAT_PORTS => "snat_ports",
            TP_DROP_SNAT_FULL => "snat_full",
            TP_DROP_SNAT_ODD => "snat_odd",
            TP_DROP_CONGESTED => "congested",
            TP_DROP_OWN_ENVELOPE => "own_envelope",
            TP_DROP_LOOPBACK => "loopback",
            _ => "unknown",
        }
    }
}

/// One counter, summed over CPUs since the maps were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// What it counts.
    pub reason: Reason,
    /// Packets (socket translations count as packets of no bytes).
    pub packets: u64,
    /// Bytes, link header included.
    pub bytes: u64,
}

/// How one end of a connection was judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judged {
    /// The verdict.
    pub verdict: Verdict,
    /// The rule that decided.
    pub rule: RuleId,
    /// The revision under which it did.
    pub revision: u32,
}

/// An address and a port (of ICMP echo: the identifier).
pub type End = (IpAddr, u16);

/// A tracked connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// IP protocol number.
    pub protocol: u8,
    /// Who opened it.
    pub opener: End,
    /// Whom it was opened to, after Service translation.
    pub responder: End,
    /// The Service address it was opened to, when it was translated outside the socket.
    pub service: Option<End>,
    /// The node behind which the end that is not here lies.
    pub via: Option<IpAddr>,
    /// Raw `enum tp_ct_flag`.
    pub flags: u32,
    /// Since the last packet (seconds precision).
    pub idle: Duration,
    /// Since the first packet.
    pub age: Duration,
    /// Egress of the opener, if it was judged here.
    pub egress: Option<Judged>,
    /// Ingress of the responder, if it was judged here.
    pub ingress: Option<Judged>,
    /// Whose budget it takes from: a pod's id, or `enum tp_holder`.
    pub pod_id: u32,
}

impl Connection {
    /// Whether neither end has closed it.
    pub fn is_open(&self) -> bool {
        self.flags & (TP_CT_FIN_A | TP_CT_FIN_B | TP_CT_RST) == 0
    }
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapUsage {
    /// The map's name.
    pub map: &'static str,
    /// Entries in it.
    pub entries: usize,
    /// Entries that it may hold.
    pub limit: u32,
}

/// From the word that holds verdict and revision.
fn judged(word: u64, rule: u32) -> Option<Judged> {
    let (verdict, revision) = ((word >> 32) as u32, word as u32);
    let verdict = match verdict {
        TP_VERDICT_ALLOW => Verdict::Allow,
        TP_VERDICT_DENY => Verdict::Deny,
        _ => return None,
    };
    Some(Judged { verdict, rule: RuleId(rule), revision })
}

fn decode(key: &CtKey, ct: &Ct, now: u64) -> Connection {
    let a = (key.addr_a.ip(), key.port_a.get());
    let b = (key.addr_b.ip(), key.port_b.get());
    let (opener, responder) = if ct.flags & TP_CT_FROM_A != 0 { (a, b) } else { (b, a) };
    Connection {
        protocol: key.proto,
        opener,
        responder,
        service: (ct.flags & TP_CT_DNAT != 0).then(|| (ct.vip.ip(), ct.vport.get())),
        via: (ct.flags & TP_CT_VIA_TUNNEL != 0).then(|| ct.via.ip()),
        flags: ct.flags,
        idle: Duration::from_nanos(now.saturating_sub(ct.last_seen)),
        age: Duration::from_nanos(now.saturating_sub(ct.created)),
        egress: judged(ct.egress, ct.egress_rule),
        ingress: judged(ct.ingress, ct.ingress_rule),
        pod_id: ct.pod_id,
    }
}

/// As [`decode`], of a client outside with a backend that is no pod.
fn decode_snat(answer: &Tuple, snat: &Snat, now: u64) -> Connection {
    Connection {
        protocol: answer.proto,
        opener: (snat.client.ip(), snat.client_port.get()),
        responder: (answer.saddr.ip(), answer.sport.get()),
        service: Some((snat.vip.ip(), snat.vport.get())),
        via: None,
        flags: snat.flags | TP_CT_FROM_A | TP_CT_DNAT,
        idle: Duration::from_nanos(now.saturating_sub(snat.last_seen)),
        age: Duration::from_nanos(now.saturating_sub(snat.created)),
        egress: None,
        ingress: None,
        pod_id: TP_HOLDER_OTHERS,
    }
}

/// The clock that the programs use, in ns.
pub(super) fn monotonic() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours, which the call fills; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    u64::try_from(now.tv_sec).unwrap_or(0).saturating_mul(1_000_000_000) + u64::try_from(now.tv_nsec).unwrap_or(0)
}

pub(crate) fn connections(ct: &Map<CtKey, Ct>, snat: &Map<Tuple, Snat>) -> Result<Vec<Connection>> {
    let now = monotonic();
    let mut all: Vec<Connection> = ct.entries()?.iter().map(|(key, value)| decode(key, value, now)).collect();
    all.extend(snat.entries()?.iter().map(|(answer, value)| decode_snat(answer, value, now)));
    Ok(all)
}

pub(crate) fn counters(object: &Object) -> Result<Vec<Count>> {
    let mut counts = Vec::new();
    for reason in (0..TP_REASON_MAX).map(Reason::new).filter(|reason| reason.name() != "unknown") {
        let cpus: Vec<Counter> = map::per_cpu(object, "tp_counters", reason.0)?;
        let packets = cpus.iter().map(|c| c.packets).fold(0, u64::wrapping_add);
        let bytes = cpus.iter().map(|c| c.bytes).fold(0, u64::wrapping_add);
        counts.push(Count { reason, packets, bytes });
    }
    Ok(counts)
}
