//! Layouts and numbers that kernel programs and user space share: generated from `bpf/abi.h`, which says what each means.
//!
//! Do not edit. After a change of the header: `TOWPATH_REFRESH=1 cargo test -p towpath-datapath --test abi`.
#![allow(missing_docs, reason = "bpf/abi.h documents every field; this file is generated")]

/// A type that is its bytes: any bytes are a value of it, and all of its bytes are defined.
///
/// # Safety
/// Only for `repr(C)` or `repr(transparent)` types without padding whose fields are all plain.
pub unsafe trait Plain: Copy + Default + 'static {}

/// A 16-bit number in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Be16(u16);

impl Be16 {
    /// From a number of this machine.
    pub const fn new(value: u16) -> Self {
        Self(value.to_be())
    }

    /// As a number of this machine.
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
}

// SAFETY: an integer.
unsafe impl Plain for u32 {}
// SAFETY: an integer.
unsafe impl Plain for u64 {}

pub const TP_ABI_VERSION: u32 = 7;
pub const TP_HOST_MAC_WAITS: u32 = 1;
pub const TP_SNAT_PORT_MIN: u32 = 61000;
pub const TP_SNAT_PORT_MAX: u32 = 65535;
pub const TP_ALGORITHM_SHIFT: u32 = 24;
pub const TP_SERVICE_BITS_SHIFT: u32 = 18;

// enum tp_backend_mode
pub const TP_MODE_VXLAN: u32 = 1;

// enum tp_node_flag
pub const TP_NODE_PLAIN_ROUTING: u32 = 1;
pub const TP_NODE_BORROWED_TUNNEL: u32 = 2;
pub const TP_NODE_SILENT_LO4: u32 = 4;
pub const TP_NODE_SILENT_LO6: u32 = 8;
pub const TP_NODE_DIRECT_RETURN: u32 = 16;
pub const TP_NODE_ON_LINK: u32 = 32;

// enum tp_pod_flag
pub const TP_POD_HOST_ONLY: u32 = 1;

// enum tp_by
pub const TP_BY_ENVELOPE: u32 = 0;
pub const TP_BY_ITSELF: u32 = 1;
pub const TP_BY_IPIP: u32 = 2;
pub const TP_BY_LINK: u32 = 3;

// enum tp_peer_flag
pub const TP_PEER_NODE: u32 = 1;
pub const TP_PEER_LOCAL: u32 = 2;
pub const TP_PEER_PLAIN: u32 = 4;
pub const TP_PEER_SILENT: u32 = 8;
pub const TP_PEER_IPIP: u32 = 16;
pub const TP_PEER_UDP: u32 = 32;
pub const TP_PEER_LINK: u32 = 64;

// enum tp_verdict
pub const TP_VERDICT_NONE: u32 = 0;
pub const TP_VERDICT_ALLOW: u32 = 1;
pub const TP_VERDICT_DENY: u32 = 2;

// enum tp_rule_id
pub const TP_RULE_NOT_ISOLATED: u32 = 0;
pub const TP_RULE_DEFAULT_DENY: u32 = 0xffffffff;
pub const TP_RULE_OWN_NODE: u32 = 0xfffffffe;
pub const TP_RULE_HOST_ONLY: u32 = 0xfffffffd;
pub const TP_RULE_SELF: u32 = 0xfffffffc;

// enum tp_ct_flag
pub const TP_CT_FROM_A: u32 = 1;
pub const TP_CT_REPLIED: u32 = 2;
pub const TP_CT_DNAT: u32 = 4;
pub const TP_CT_FIN_A: u32 = 8;
pub const TP_CT_FIN_B: u32 = 16;
pub const TP_CT_RST: u32 = 32;
pub const TP_CT_VIA_TUNNEL: u32 = 64;
pub const TP_CT_ESTABLISHED: u32 = 128;
pub const TP_CT_DIRECT: u32 = 256;
pub const TP_CT_PLAIN: u32 = 512;
pub const TP_CT_IPIP: u32 = 1024;
pub const TP_CT_LINK: u32 = 2048;

// enum tp_holder
pub const TP_HOLDER_OTHERS: u32 = 0;
pub const TP_HOLDER_NODE: u32 = 0xffffffff;

// enum tp_frag_way
pub const TP_FRAG_FIRST: u32 = 0;
pub const TP_FRAG_WHOLE: u32 = 1;
pub const TP_FRAG_TOO_BIG: u32 = 2;

// enum tp_service_flag
pub const TP_SERVICE_AFFINITY: u32 = 1;
pub const TP_SERVICE_NODEPORT: u32 = 2;
pub const TP_SERVICE_PODS: u32 = 4;
pub const TP_SERVICE_RANGES: u32 = 8;
pub const TP_SERVICE_INSIDE: u32 = 16;

// enum tp_algorithm
pub const TP_RANDOM: u32 = 0;
pub const TP_ROUND_ROBIN: u32 = 1;
pub const TP_LEAST_CONNECTIONS: u32 = 2;
pub const TP_SOURCE_HASH: u32 = 3;
pub const TP_TUPLE_HASH: u32 = 4;

// enum tp_reason
pub const TP_LOCAL_DELIVERY: u32 = 0;
pub const TP_TUNNEL_OUT: u32 = 1;
pub const TP_TO_STACK: u32 = 2;
pub const TP_SERVICE_TRANSLATED: u32 = 3;
pub const TP_HOST_OUT: u32 = 4;
pub const TP_IGNORED: u32 = 5;
pub const TP_REFUSED: u32 = 6;
pub const TP_UNTRACKED: u32 = 7;
pub const TP_CT_RECYCLED: u32 = 8;
pub const TP_ACCELERATED: u32 = 9;
pub const TP_AUDIT_EGRESS: u32 = 10;
pub const TP_AUDIT_INGRESS: u32 = 11;
pub const TP_DIRECT_RETURN: u32 = 12;
pub const TP_IPIP_OUT: u32 = 13;
pub const TP_UDP_OUT: u32 = 14;
pub const TP_LINK_OUT: u32 = 15;
pub const TP_DROP_FIRST: u32 = 16;
pub const TP_DROP_MALFORMED: u32 = 16;
pub const TP_DROP_SOURCE_ADDRESS: u32 = 17;
pub const TP_DROP_SOURCE_MAC: u32 = 18;
pub const TP_DROP_ARP_ND: u32 = 19;
pub const TP_DROP_MAPPED_V4: u32 = 20;
pub const TP_DROP_EGRESS_POLICY: u32 = 21;
pub const TP_DROP_INGRESS_POLICY: u32 = 22;
pub const TP_DROP_TUNNEL_SOURCE: u32 = 23;
pub const TP_DROP_TUNNEL_OUTSIDER: u32 = 24;
pub const TP_DROP_SPOOFED_NODE: u32 = 25;
pub const TP_DROP_NO_BACKEND: u32 = 26;
pub const TP_DROP_CT_FULL: u32 = 27;
pub const TP_DROP_FRAGMENT: u32 = 28;
pub const TP_DROP_SERVICE_ICMP: u32 = 29;
pub const TP_DROP_INTERNAL: u32 = 30;
pub const TP_DROP_NO_POD: u32 = 31;
pub const TP_DROP_CT_BUDGET: u32 = 32;
pub const TP_DROP_SOURCE_RANGE: u32 = 33;
pub const TP_DROP_SNAT_PORTS: u32 = 34;
pub const TP_DROP_SNAT_FULL: u32 = 35;
pub const TP_DROP_SNAT_ODD: u32 = 36;
pub const TP_DROP_CONGESTED: u32 = 37;
pub const TP_DROP_OWN_ENVELOPE: u32 = 38;
pub const TP_DROP_LOOPBACK: u32 = 39;
pub const TP_REASON_MAX: u32 = 64;

// enum tp_drop_flag
pub const TP_DROPPED_TUPLE: u32 = 1;
pub const TP_DROPPED_TRANSLATED: u32 = 2;
pub const TP_DROPPED_XDP: u32 = 4;
pub const TP_DROPPED_SOCKET: u32 = 8;

#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Addr {
    pub b: [u8; 16],
}

const _: () = assert!(size_of::<Addr>() == size_of::<[u8; 16]>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Addr {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CidrKey {
    pub prefixlen: u32,
    pub family: u32,
    pub addr: Addr,
}

const _: () = assert!(size_of::<CidrKey>() == size_of::<u32>() + size_of::<u32>() + size_of::<Addr>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for CidrKey {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tuple {
    pub saddr: Addr,
    pub daddr: Addr,
    pub sport: Be16,
    pub dport: Be16,
    pub proto: u8,
    pub pad: [u8; 3],
}

const _: () = assert!(
    size_of::<Tuple>()
        == size_of::<Addr>()
            + size_of::<Addr>()
            + size_of::<Be16>()
            + size_of::<Be16>()
            + size_of::<u8>()
            + size_of::<[u8; 3]>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Tuple {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NodeConfig {
    pub node4: Addr,
    pub node6: Addr,
    pub dns4: Addr,
    pub dns6: Addr,
    pub netns_cookie: u64,
    pub uplink_ifindex: u32,
    pub tunnel_ifindex: u32,
    pub tunnel_id: u32,
    pub mode: u32,
    pub tunnel_mtu: u32,
    pub tunnel_port: Be16,
    pub nodeport_min: Be16,
    pub nodeport_max: Be16,
    pub tunnel_mac: [u8; 6],
    pub flags: u32,
    pub tunnel6_ifindex: u32,
    pub udp_ifindex: u32,
    pub udp_port: Be16,
    pub pad: [u8; 2],
}

const _: () = assert!(
    size_of::<NodeConfig>()
        == size_of::<Addr>()
            + size_of::<Addr>()
            + size_of::<Addr>()
            + size_of::<Addr>()
            + size_of::<u64>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<Be16>()
            + size_of::<Be16>()
            + size_of::<Be16>()
            + size_of::<[u8; 6]>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<Be16>()
            + size_of::<[u8; 2]>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for NodeConfig {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Pod {
    pub ifindex: u32,
    pub pod_id: u32,
    pub ingress_set: u32,
    pub egress_set: u32,
    pub flags: u32,
    pub mac: [u8; 6],
    pub host_mac: [u8; 6],
    pub ingress_audit_set: u32,
    pub egress_audit_set: u32,
}

const _: () = assert!(
    size_of::<Pod>()
        == size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<[u8; 6]>()
            + size_of::<[u8; 6]>()
            + size_of::<u32>()
            + size_of::<u32>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Pod {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NetnsPod {
    pub addr4: Addr,
    pub addr6: Addr,
    pub pod_id: u32,
    pub pad: u32,
}

const _: () =
    assert!(size_of::<NetnsPod>() == size_of::<Addr>() + size_of::<Addr>() + size_of::<u32>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for NetnsPod {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Peer {
    pub tunnel: Addr,
    pub flags: u32,
    pub ifindex: u32,
    pub mac: [u8; 6],
    pub pad: [u8; 2],
}

const _: () = assert!(
    size_of::<Peer>()
        == size_of::<Addr>() + size_of::<u32>() + size_of::<u32>() + size_of::<[u8; 6]>() + size_of::<[u8; 2]>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Peer {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Wire {
    pub mac: [u8; 6],
    pub pad: [u8; 2],
}

const _: () = assert!(size_of::<Wire>() == size_of::<[u8; 6]>() + size_of::<[u8; 2]>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Wire {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SetClassKey {
    pub set: u32,
    pub class_id: u32,
}

const _: () = assert!(size_of::<SetClassKey>() == size_of::<u32>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for SetClassKey {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RuleKey {
    pub prefixlen: u32,
    pub set: u32,
    pub local_class: u32,
    pub proto: u8,
    pub pad: u8,
    pub port: Be16,
}

const _: () = assert!(
    size_of::<RuleKey>()
        == size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u8>()
            + size_of::<u8>()
            + size_of::<Be16>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for RuleKey {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rule {
    pub verdict: u32,
    pub rule_id: u32,
}

const _: () = assert!(size_of::<Rule>() == size_of::<u32>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Rule {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AuditKey {
    pub set: u32,
    pub rule: u32,
}

const _: () = assert!(size_of::<AuditKey>() == size_of::<u32>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for AuditKey {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Audited {
    pub connections: u64,
    pub last: u64,
}

const _: () = assert!(size_of::<Audited>() == size_of::<u64>() + size_of::<u64>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Audited {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CtKey {
    pub addr_a: Addr,
    pub addr_b: Addr,
    pub port_a: Be16,
    pub port_b: Be16,
    pub proto: u8,
    pub pad: [u8; 3],
}

const _: () = assert!(
    size_of::<CtKey>()
        == size_of::<Addr>()
            + size_of::<Addr>()
            + size_of::<Be16>()
            + size_of::<Be16>()
            + size_of::<u8>()
            + size_of::<[u8; 3]>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for CtKey {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CtEnd {
    pub ifindex: u32,
    pub mac: [u8; 6],
    pub host_mac: [u8; 6],
}

const _: () = assert!(size_of::<CtEnd>() == size_of::<u32>() + size_of::<[u8; 6]>() + size_of::<[u8; 6]>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for CtEnd {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ct {
    pub last_seen: u64,
    pub egress: u64,
    pub ingress: u64,
    pub flags: u32,
    pub vport: Be16,
    pub audited: u16,
    pub a: CtEnd,
    pub b: CtEnd,
    pub vip: Addr,
    pub via: Addr,
    pub created: u64,
    pub egress_rule: u32,
    pub ingress_rule: u32,
    pub backend: u32,
    pub pod_id: u32,
}

const _: () = assert!(
    size_of::<Ct>()
        == size_of::<u64>()
            + size_of::<u64>()
            + size_of::<u64>()
            + size_of::<u32>()
            + size_of::<Be16>()
            + size_of::<u16>()
            + size_of::<CtEnd>()
            + size_of::<CtEnd>()
            + size_of::<Addr>()
            + size_of::<Addr>()
            + size_of::<u64>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Ct {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    pub room: u32,
    pub share: u32,
}

const _: () = assert!(size_of::<Budget>() == size_of::<u32>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Budget {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Openings {
    pub keys: [CtKey; 32],
}

const _: () = assert!(size_of::<Openings>() == size_of::<[CtKey; 32]>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Openings {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flows {
    pub held: u32,
    pub next: u32,
    pub ring: [Openings; 4],
}

const _: () = assert!(size_of::<Flows>() == size_of::<u32>() + size_of::<u32>() + size_of::<[Openings; 4]>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Flows {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Nat {
    pub daddr: Addr,
    pub dport: Be16,
    pub pad: [u8; 2],
    pub backend: u32,
    pub mark: u64,
    pub fresh: u64,
    pub revision: u32,
    pub by: u32,
    pub from: CtEnd,
    pub to: CtEnd,
    pub via: Addr,
}

const _: () = assert!(
    size_of::<Nat>()
        == size_of::<Addr>()
            + size_of::<Be16>()
            + size_of::<[u8; 2]>()
            + size_of::<u32>()
            + size_of::<u64>()
            + size_of::<u64>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<CtEnd>()
            + size_of::<CtEnd>()
            + size_of::<Addr>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Nat {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Snat {
    pub last_seen: u64,
    pub created: u64,
    pub client: Addr,
    pub vip: Addr,
    pub client_port: Be16,
    pub vport: Be16,
    pub flags: u32,
}

const _: () = assert!(
    size_of::<Snat>()
        == size_of::<u64>()
            + size_of::<u64>()
            + size_of::<Addr>()
            + size_of::<Addr>()
            + size_of::<Be16>()
            + size_of::<Be16>()
            + size_of::<u32>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Snat {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SnatWay {
    pub source: Addr,
    pub backend: Addr,
    pub source_port: Be16,
    pub backend_port: Be16,
    pub backend_id: u32,
}

const _: () = assert!(
    size_of::<SnatWay>()
        == size_of::<Addr>() + size_of::<Addr>() + size_of::<Be16>() + size_of::<Be16>() + size_of::<u32>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for SnatWay {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragKey {
    pub saddr: Addr,
    pub daddr: Addr,
    pub id: u32,
    pub proto: u8,
    pub pad: [u8; 3],
}

const _: () = assert!(
    size_of::<FragKey>()
        == size_of::<Addr>() + size_of::<Addr>() + size_of::<u32>() + size_of::<u8>() + size_of::<[u8; 3]>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for FragKey {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Frag {
    pub sport: Be16,
    pub dport: Be16,
    pub way: u32,
}

const _: () = assert!(size_of::<Frag>() == size_of::<Be16>() + size_of::<Be16>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Frag {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ServiceKey {
    pub addr: Addr,
    pub port: Be16,
    pub proto: u8,
    pub inside: u8,
}

const _: () =
    assert!(size_of::<ServiceKey>() == size_of::<Addr>() + size_of::<Be16>() + size_of::<u8>() + size_of::<u8>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for ServiceKey {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Service {
    pub id: u32,
    pub slots: u32,
    pub count: u32,
    pub flags: u32,
    pub affinity_seconds: u32,
    pub turn: u32,
}

const _: () = assert!(
    size_of::<Service>()
        == size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Service {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SlotKey {
    pub list: u32,
    pub index: u32,
}

const _: () = assert!(size_of::<SlotKey>() == size_of::<u32>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for SlotKey {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Slot {
    pub addr: Addr,
    pub port: Be16,
    pub proto: u8,
    pub pad: u8,
    pub backend: u32,
}

const _: () = assert!(
    size_of::<Slot>() == size_of::<Addr>() + size_of::<Be16>() + size_of::<u8>() + size_of::<u8>() + size_of::<u32>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Slot {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Backend {
    pub addr: Addr,
    pub port: Be16,
    pub proto: u8,
    pub pad: u8,
    pub flags: u32,
}

const _: () = assert!(
    size_of::<Backend>()
        == size_of::<Addr>() + size_of::<Be16>() + size_of::<u8>() + size_of::<u8>() + size_of::<u32>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Backend {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Load {
    pub flows: u32,
    pub sockets: u32,
}

const _: () = assert!(size_of::<Load>() == size_of::<u32>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Load {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SourceKey {
    pub prefixlen: u32,
    pub service: u32,
    pub family: u32,
    pub addr: Addr,
}

const _: () =
    assert!(size_of::<SourceKey>() == size_of::<u32>() + size_of::<u32>() + size_of::<u32>() + size_of::<Addr>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for SourceKey {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AffinityKey {
    pub client: Addr,
    pub service: u32,
    pub pad: u32,
}

const _: () = assert!(size_of::<AffinityKey>() == size_of::<Addr>() + size_of::<u32>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for AffinityKey {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Affinity {
    pub last_used: u64,
    pub backend: u32,
    pub pad: u32,
}

const _: () = assert!(size_of::<Affinity>() == size_of::<u64>() + size_of::<u32>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Affinity {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SockPeer {
    pub backend: Addr,
    pub service: Addr,
    pub backend_port: Be16,
    pub service_port: Be16,
}

const _: () =
    assert!(size_of::<SockPeer>() == size_of::<Addr>() + size_of::<Addr>() + size_of::<Be16>() + size_of::<Be16>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for SockPeer {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SockLoad {
    pub backend: u32,
}

const _: () = assert!(size_of::<SockLoad>() == size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for SockLoad {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SockPeers {
    pub peers: [SockPeer; 32],
    pub next: u32,
}

const _: () = assert!(size_of::<SockPeers>() == size_of::<[SockPeer; 32]>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for SockPeers {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Purge {
    pub addrs: [Addr; 12],
    pub count: u32,
    pub removed: u32,
}

const _: () = assert!(size_of::<Purge>() == size_of::<[Addr; 12]>() + size_of::<u32>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Purge {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Removed {
    pub connections: u32,
    pub translations: u32,
}

const _: () = assert!(size_of::<Removed>() == size_of::<u32>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Removed {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HeldSocket {
    pub cookie: u64,
    pub netns_cookie: u64,
    pub peer: SockPeer,
    pub local: Addr,
    pub local_port: Be16,
    pub proto: u8,
    pub family: u8,
    pub ifindex: u32,
    pub state: u32,
}

const _: () = assert!(
    size_of::<HeldSocket>()
        == size_of::<u64>()
            + size_of::<u64>()
            + size_of::<SockPeer>()
            + size_of::<Addr>()
            + size_of::<Be16>()
            + size_of::<u8>()
            + size_of::<u8>()
            + size_of::<u32>()
            + size_of::<u32>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for HeldSocket {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Adjust {
    pub pod: u32,
    pub change: u32,
    pub all: u32,
}

const _: () = assert!(size_of::<Adjust>() == size_of::<u32>() + size_of::<u32>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Adjust {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counter {
    pub packets: u64,
    pub bytes: u64,
}

const _: () = assert!(size_of::<Counter>() == size_of::<u64>() + size_of::<u64>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Counter {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Dropped {
    pub at: u64,
    pub t: Tuple,
    pub backend: Addr,
    pub backend_port: Be16,
    pub flags: u8,
    pub tcp_flags: u8,
    pub icmp_type: u8,
    pub pad: [u8; 3],
    pub reason: u32,
    pub rule: u32,
    pub ifindex: u32,
    pub len: u32,
    pub set: u32,
    pub pad_end: [u8; 4],
}

const _: () = assert!(
    size_of::<Dropped>()
        == size_of::<u64>()
            + size_of::<Tuple>()
            + size_of::<Addr>()
            + size_of::<Be16>()
            + size_of::<u8>()
            + size_of::<u8>()
            + size_of::<u8>()
            + size_of::<[u8; 3]>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<[u8; 4]>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Dropped {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Told {
    pub since: u64,
    pub untold: u64,
    pub count: u32,
    pub pad: u32,
}

const _: () = assert!(size_of::<Told>() == size_of::<u64>() + size_of::<u64>() + size_of::<u32>() + size_of::<u32>());
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Told {}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Trace {
    pub tunnel_source: Addr,
    pub tunnel_remote: Addr,
    pub redirect_ifindex: u32,
    pub redirect_kind: u32,
    pub tunnel_id: u32,
    pub reason: u32,
}

const _: () = assert!(
    size_of::<Trace>()
        == size_of::<Addr>()
            + size_of::<Addr>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
            + size_of::<u32>()
);
// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.
unsafe impl Plain for Trace {}

/// Name, size in bytes, and fields with their offsets in bytes.
pub type Layout = (&'static str, usize, &'static [(&'static str, usize)]);

/// Every struct: what the tests compare with the object's BTF.
pub const LAYOUTS: &[Layout] = &[
    ("tp_addr", size_of::<Addr>(), &[("b", std::mem::offset_of!(Addr, b))]),
    (
        "tp_cidr_key",
        size_of::<CidrKey>(),
        &[
            ("prefixlen", std::mem::offset_of!(CidrKey, prefixlen)),
            ("family", std::mem::offset_of!(CidrKey, family)),
            ("addr", std::mem::offset_of!(CidrKey, addr)),
        ],
    ),
    (
        "tp_tuple",
        size_of::<Tuple>(),
        &[
            ("saddr", std::mem::offset_of!(Tuple, saddr)),
            ("daddr", std::mem::offset_of!(Tuple, daddr)),
            ("sport", std::mem::offset_of!(Tuple, sport)),
            ("dport", std::mem::offset_of!(Tuple, dport)),
            ("proto", std::mem::offset_of!(Tuple, proto)),
            ("pad", std::mem::offset_of!(Tuple, pad)),
        ],
    ),
    (
        "tp_node_config",
        size_of::<NodeConfig>(),
        &[
            ("node4", std::mem::offset_of!(NodeConfig, node4)),
            ("node6", std::mem::offset_of!(NodeConfig, node6)),
            ("dns4", std::mem::offset_of!(NodeConfig, dns4)),
            ("dns6", std::mem::offset_of!(NodeConfig, dns6)),
            ("netns_cookie", std::mem::offset_of!(NodeConfig, netns_cookie)),
            ("uplink_ifindex", std::mem::offset_of!(NodeConfig, uplink_ifindex)),
            ("tunnel_ifindex", std::mem::offset_of!(NodeConfig, tunnel_ifindex)),
            ("tunnel_id", std::mem::offset_of!(NodeConfig, tunnel_id)),
            ("mode", std::mem::offset_of!(NodeConfig, mode)),
            ("tunnel_mtu", std::mem::offset_of!(NodeConfig, tunnel_mtu)),
            ("tunnel_port", std::mem::offset_of!(NodeConfig, tunnel_port)),
            ("nodeport_min", std::mem::offset_of!(NodeConfig, nodeport_min)),
            ("nodeport_max", std::mem::offset_of!(NodeConfig, nodeport_max)),
            ("tunnel_mac", std::mem::offset_of!(NodeConfig, tunnel_mac)),
            ("flags", std::mem::offset_of!(NodeConfig, flags)),
            ("tunnel6_ifindex", std::mem::offset_of!(NodeConfig, tunnel6_ifindex)),
            ("udp_ifindex", std::mem::offset_of!(NodeConfig, udp_ifindex)),
            ("udp_port", std::mem::offset_of!(NodeConfig, udp_port)),
            ("pad", std::mem::offset_of!(NodeConfig, pad)),
        ],
    ),
    (
        "tp_pod",
        size_of::<Pod>(),
        &[
            ("ifindex", std::mem::offset_of!(Pod, ifindex)),
            ("pod_id", std::mem::offset_of!(Pod, pod_id)),
            ("ingress_set", std::mem::offset_of!(Pod, ingress_set)),
            ("egress_set", std::mem::offset_of!(Pod, egress_set)),
            ("flags", std::mem::offset_of!(Pod, flags)),
            ("mac", std::mem::offset_of!(Pod, mac)),
            ("host_mac", std::mem::offset_of!(Pod, host_mac)),
            ("ingress_audit_set", std::mem::offset_of!(Pod, ingress_audit_set)),
            ("egress_audit_set", std::mem::offset_of!(Pod, egress_audit_set)),
        ],
    ),
    (
        "tp_netns_pod",
        size_of::<NetnsPod>(),
        &[
            ("addr4", std::mem::offset_of!(NetnsPod, addr4)),
            ("addr6", std::mem::offset_of!(NetnsPod, addr6)),
            ("pod_id", std::mem::offset_of!(NetnsPod, pod_id)),
            ("pad", std::mem::offset_of!(NetnsPod, pad)),
        ],
    ),
    (
        "tp_peer",
        size_of::<Peer>(),
        &[
            ("tunnel", std::mem::offset_of!(Peer, tunnel)),
            ("flags", std::mem::offset_of!(Peer, flags)),
            ("ifindex", std::mem::offset_of!(Peer, ifindex)),
            ("mac", std::mem::offset_of!(Peer, mac)),
            ("pad", std::mem::offset_of!(Peer, pad)),
        ],
    ),
    (
        "tp_wire",
        size_of::<Wire>(),
        &[("mac", std::mem::offset_of!(Wire, mac)), ("pad", std::mem::offset_of!(Wire, pad))],
    ),
    (
        "tp_set_class_key",
        size_of::<SetClassKey>(),
        &[("set", std::mem::offset_of!(SetClassKey, set)), ("class_id", std::mem::offset_of!(SetClassKey, class_id))],
    ),
    (
        "tp_rule_key",
        size_of::<RuleKey>(),
        &[
            ("prefixlen", std::mem::offset_of!(RuleKey, prefixlen)),
            ("set", std::mem::offset_of!(RuleKey, set)),
            ("local_class", std::mem::offset_of!(RuleKey, local_class)),
            ("proto", std::mem::offset_of!(RuleKey, proto)),
            ("pad", std::mem::offset_of!(RuleKey, pad)),
            ("port", std::mem::offset_of!(RuleKey, port)),
        ],
    ),
    (
        "tp_rule",
        size_of::<Rule>(),
        &[("verdict", std::mem::offset_of!(Rule, verdict)), ("rule_id", std::mem::offset_of!(Rule, rule_id))],
    ),
    (
        "tp_audit_key",
        size_of::<AuditKey>(),
        &[("set", std::mem::offset_of!(AuditKey, set)), ("rule", std::mem::offset_of!(AuditKey, rule))],
    ),
    (
        "tp_audited",
        size_of::<Audited>(),
        &[("connections", std::mem::offset_of!(Audited, connections)), ("last", std::mem::offset_of!(Audited, last))],
    ),
    (
        "tp_ct_key",
        size_of::<CtKey>(),
        &[
            ("addr_a", std::mem::offset_of!(CtKey, addr_a)),
            ("addr_b", std::mem::offset_of!(CtKey, addr_b)),
            ("port_a", std::mem::offset_of!(CtKey, port_a)),
            ("port_b", std::mem::offset_of!(CtKey, port_b)),
            ("proto", std::mem::offset_of!(CtKey, proto)),
            ("pad", std::mem::offset_of!(CtKey, pad)),
        ],
    ),
    (
        "tp_ct_end",
        size_of::<CtEnd>(),
        &[
            ("ifindex", std::mem::offset_of!(CtEnd, ifindex)),
            ("mac", std::mem::offset_of!(CtEnd, mac)),
            ("host_mac", std::mem::offset_of!(CtEnd, host_mac)),
        ],
    ),
    (
        "tp_ct",
        size_of::<Ct>(),
        &[
            ("last_seen", std::mem::offset_of!(Ct, last_seen)),
            ("egress", std::mem::offset_of!(Ct, egress)),
            ("ingress", std::mem::offset_of!(Ct, ingress)),
            ("flags", std::mem::offset_of!(Ct, flags)),
            ("vport", std::mem::offset_of!(Ct, vport)),
            ("audited", std::mem::offset_of!(Ct, audited)),
            ("a", std::mem::offset_of!(Ct, a)),
            ("b", std::mem::offset_of!(Ct, b)),
            ("vip", std::mem::offset_of!(Ct, vip)),
            ("via", std::mem::offset_of!(Ct, via)),
            ("created", std::mem::offset_of!(Ct, created)),
            ("egress_rule", std::mem::offset_of!(Ct, egress_rule)),
            ("ingress_rule", std::mem::offset_of!(Ct, ingress_rule)),
            ("backend", std::mem::offset_of!(Ct, backend)),
            ("pod_id", std::mem::offset_of!(Ct, pod_id)),
        ],
    ),
    (
        "tp_budget",
        size_of::<Budget>(),
        &[("room", std::mem::offset_of!(Budget, room)), ("share", std::mem::offset_of!(Budget, share))],
    ),
    ("tp_openings", size_of::<Openings>(), &[("keys", std::mem::offset_of!(Openings, keys))]),
    (
        "tp_flows",
        size_of::<Flows>(),
        &[
            ("held", std::mem::offset_of!(Flows, held)),
            ("next", std::mem::offset_of!(Flows, next)),
            ("ring", std::mem::offset_of!(Flows, ring)),
        ],
    ),
    (
        "tp_nat",
        size_of::<Nat>(),
        &[
            ("daddr", std::mem::offset_of!(Nat, daddr)),
            ("dport", std::mem::offset_of!(Nat, dport)),
            ("pad", std::mem::offset_of!(Nat, pad)),
            ("backend", std::mem::offset_of!(Nat, backend)),
            ("mark", std::mem::offset_of!(Nat, mark)),
            ("fresh", std::mem::offset_of!(Nat, fresh)),
            ("revision", std::mem::offset_of!(Nat, revision)),
            ("by", std::mem::offset_of!(Nat, by)),
            ("from", std::mem::offset_of!(Nat, from)),
            ("to", std::mem::offset_of!(Nat, to)),
            ("via", std::mem::offset_of!(Nat, via)),
        ],
    ),
    (
        "tp_snat",
        size_of::<Snat>(),
        &[
            ("last_seen", std::mem::offset_of!(Snat, last_seen)),
            ("created", std::mem::offset_of!(Snat, created)),
            ("client", std::mem::offset_of!(Snat, client)),
            ("vip", std::mem::offset_of!(Snat, vip)),
            ("client_port", std::mem::offset_of!(Snat, client_port)),
            ("vport", std::mem::offset_of!(Snat, vport)),
            ("flags", std::mem::offset_of!(Snat, flags)),
        ],
    ),
    (
        "tp_snat_way",
        size_of::<SnatWay>(),
        &[
            ("source", std::mem::offset_of!(SnatWay, source)),
            ("backend", std::mem::offset_of!(SnatWay, backend)),
            ("source_port", std::mem::offset_of!(SnatWay, source_port)),
            ("backend_port", std::mem::offset_of!(SnatWay, backend_port)),
            ("backend_id", std::mem::offset_of!(SnatWay, backend_id)),
        ],
    ),
    (
        "tp_frag_key",
        size_of::<FragKey>(),
        &[
            ("saddr", std::mem::offset_of!(FragKey, saddr)),
            ("daddr", std::mem::offset_of!(FragKey, daddr)),
            ("id", std::mem::offset_of!(FragKey, id)),
            ("proto", std::mem::offset_of!(FragKey, proto)),
            ("pad", std::mem::offset_of!(FragKey, pad)),
        ],
    ),
    (
        "tp_frag",
        size_of::<Frag>(),
        &[
            ("sport", std::mem::offset_of!(Frag, sport)),
            ("dport", std::mem::offset_of!(Frag, dport)),
            ("way", std::mem::offset_of!(Frag, way)),
        ],
    ),
    (
        "tp_service_key",
        size_of::<ServiceKey>(),
        &[
            ("addr", std::mem::offset_of!(ServiceKey, addr)),
            ("port", std::mem::offset_of!(ServiceKey, port)),
            ("proto", std::mem::offset_of!(ServiceKey, proto)),
            ("inside", std::mem::offset_of!(ServiceKey, inside)),
        ],
    ),
    (
        "tp_service",
        size_of::<Service>(),
        &[
            ("id", std::mem::offset_of!(Service, id)),
            ("slots", std::mem::offset_of!(Service, slots)),
            ("count", std::mem::offset_of!(Service, count)),
            ("flags", std::mem::offset_of!(Service, flags)),
            ("affinity_seconds", std::mem::offset_of!(Service, affinity_seconds)),
            ("turn", std::mem::offset_of!(Service, turn)),
        ],
    ),
    (
        "tp_slot_key",
        size_of::<SlotKey>(),
        &[("list", std::mem::offset_of!(SlotKey, list)), ("index", std::mem::offset_of!(SlotKey, index))],
    ),
    (
        "tp_slot",
        size_of::<Slot>(),
        &[
            ("addr", std::mem::offset_of!(Slot, addr)),
            ("port", std::mem::offset_of!(Slot, port)),
            ("proto", std::mem::offset_of!(Slot, proto)),
            ("pad", std::mem::offset_of!(Slot, pad)),
            ("backend", std::mem::offset_of!(Slot, backend)),
        ],
    ),
    (
        "tp_backend",
        size_of::<Backend>(),
        &[
            ("addr", std::mem::offset_of!(Backend, addr)),
            ("port", std::mem::offset_of!(Backend, port)),
            ("proto", std::mem::offset_of!(Backend, proto)),
            ("pad", std::mem::offset_of!(Backend, pad)),
            ("flags", std::mem::offset_of!(Backend, flags)),
        ],
    ),
    (
        "tp_load",
        size_of::<Load>(),
        &[("flows", std::mem::offset_of!(Load, flows)), ("sockets", std::mem::offset_of!(Load, sockets))],
    ),
    (
        "tp_source_key",
        size_of::<SourceKey>(),
        &[
            ("prefixlen", std::mem::offset_of!(SourceKey, prefixlen)),
            ("service", std::mem::offset_of!(SourceKey, service)),
            ("family", std::mem::offset_of!(SourceKey, family)),
            ("addr", std::mem::offset_of!(SourceKey, addr)),
        ],
    ),
    (
        "tp_affinity_key",
        size_of::<AffinityKey>(),
        &[
            ("client", std::mem::offset_of!(AffinityKey, client)),
            ("service", std::mem::offset_of!(AffinityKey, service)),
            ("pad", std::mem::offset_of!(AffinityKey, pad)),
        ],
    ),
    (
        "tp_affinity",
        size_of::<Affinity>(),
        &[
            ("last_used", std::mem::offset_of!(Affinity, last_used)),
            ("backend", std::mem::offset_of!(Affinity, backend)),
            ("pad", std::mem::offset_of!(Affinity, pad)),
        ],
    ),
    (
        "tp_sock_peer",
        size_of::<SockPeer>(),
        &[
            ("backend", std::mem::offset_of!(SockPeer, backend)),
            ("service", std::mem::offset_of!(SockPeer, service)),
            ("backend_port", std::mem::offset_of!(SockPeer, backend_port)),
            ("service_port", std::mem::offset_of!(SockPeer, service_port)),
        ],
    ),
    ("tp_sock_load", size_of::<SockLoad>(), &[("backend", std::mem::offset_of!(SockLoad, backend))]),
    (
        "tp_sock_peers",
        size_of::<SockPeers>(),
        &[("peers", std::mem::offset_of!(SockPeers, peers)), ("next", std::mem::offset_of!(SockPeers, next))],
    ),
    (
        "tp_purge",
        size_of::<Purge>(),
        &[
            ("addrs", std::mem::offset_of!(Purge, addrs)),
            ("count", std::mem::offset_of!(Purge, count)),
            ("removed", std::mem::offset_of!(Purge, removed)),
        ],
    ),
    (
        "tp_removed",
        size_of::<Removed>(),
        &[
            ("connections", std::mem::offset_of!(Removed, connections)),
            ("translations", std::mem::offset_of!(Removed, translations)),
        ],
    ),
    (
        "tp_held_socket",
        size_of::<HeldSocket>(),
        &[
            ("cookie", std::mem::offset_of!(HeldSocket, cookie)),
            ("netns_cookie", std::mem::offset_of!(HeldSocket, netns_cookie)),
            ("peer", std::mem::offset_of!(HeldSocket, peer)),
            ("local", std::mem::offset_of!(HeldSocket, local)),
            ("local_port", std::mem::offset_of!(HeldSocket, local_port)),
            ("proto", std::mem::offset_of!(HeldSocket, proto)),
            ("family", std::mem::offset_of!(HeldSocket, family)),
            ("ifindex", std::mem::offset_of!(HeldSocket, ifindex)),
            ("state", std::mem::offset_of!(HeldSocket, state)),
        ],
    ),
    (
        "tp_adjust",
        size_of::<Adjust>(),
        &[
            ("pod", std::mem::offset_of!(Adjust, pod)),
            ("change", std::mem::offset_of!(Adjust, change)),
            ("all", std::mem::offset_of!(Adjust, all)),
        ],
    ),
    (
        "tp_counter",
        size_of::<Counter>(),
        &[("packets", std::mem::offset_of!(Counter, packets)), ("bytes", std::mem::offset_of!(Counter, bytes))],
    ),
    (
        "tp_dropped",
        size_of::<Dropped>(),
        &[
            ("at", std::mem::offset_of!(Dropped, at)),
            ("t", std::mem::offset_of!(Dropped, t)),
            ("backend", std::mem::offset_of!(Dropped, backend)),
            ("backend_port", std::mem::offset_of!(Dropped, backend_port)),
            ("flags", std::mem::offset_of!(Dropped, flags)),
            ("tcp_flags", std::mem::offset_of!(Dropped, tcp_flags)),
            ("icmp_type", std::mem::offset_of!(Dropped, icmp_type)),
            ("pad", std::mem::offset_of!(Dropped, pad)),
            ("reason", std::mem::offset_of!(Dropped, reason)),
            ("rule", std::mem::offset_of!(Dropped, rule)),
            ("ifindex", std::mem::offset_of!(Dropped, ifindex)),
            ("len", std::mem::offset_of!(Dropped, len)),
            ("set", std::mem::offset_of!(Dropped, set)),
            ("pad_end", std::mem::offset_of!(Dropped, pad_end)),
        ],
    ),
    (
        "tp_told",
        size_of::<Told>(),
        &[
            ("since", std::mem::offset_of!(Told, since)),
            ("untold", std::mem::offset_of!(Told, untold)),
            ("count", std::mem::offset_of!(Told, count)),
            ("pad", std::mem::offset_of!(Told, pad)),
        ],
    ),
    (
        "tp_trace",
        size_of::<Trace>(),
        &[
            ("tunnel_source", std::mem::offset_of!(Trace, tunnel_source)),
            ("tunnel_remote", std::mem::offset_of!(Trace, tunnel_remote)),
            ("redirect_ifindex", std::mem::offset_of!(Trace, redirect_ifindex)),
            ("redirect_kind", std::mem::offset_of!(Trace, redirect_kind)),
            ("tunnel_id", std::mem::offset_of!(Trace, tunnel_id)),
            ("reason", std::mem::offset_of!(Trace, reason)),
        ],
    ),
];
