/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What one run of a tc or XDP program works on: too much for a stack of 512 bytes, so it lives in a per-CPU array.
 *
 * Both run with bottom halves off (XDP in the device's NAPI poll), none of ours calls another, and those of XDP have an array of
 * their own: so nothing else writes here meanwhile. The socket
 * hooks and the collector run in other contexts and must not use it. It is never cleared as a whole: whoever reads a
 * field is preceded by who wrote it.
 */
#ifndef TOWPATH_WORK_H
#define TOWPATH_WORK_H

/*
 * A function that the verifier looks at once for each program, by itself, and not anew in every state that a call finds it in: what many ways
 * lead to, and is long, is one. (Without, two programs came near to the million instructions that a kernel looks at.) It may know nothing of its
 * callers: it gets the context, numbers, and pointers to memory, each of which may be none until it has asked; it returns a number.
 */
#define TP_APART __noinline

#define ETH_LEN 14
#define NSEC_PER_SEC 1000000000ULL

/* Link and network header as they came, so placed that the network header is aligned. */
struct tp_headers {
	__u8 pad[2];
	__u8 eth_dst[6];
	__u8 eth_src[6];
	__be16 eth_type;
	union {
		struct iphdr v4;
		struct ipv6hdr v6;
	};
};

/*
 * What VXLAN (RFC 7348) over IPv4 puts between the outer Ethernet header and the inner packet, and behind it the beginning of the
 * inner network header, in which the time to live lies: so that all of it is written at once.
 */
struct tp_envelope {
	struct iphdr ip;
	__be16 sport;
	__be16 dport;
	__be16 len;
	__sum16 check;
	__be32 flags;
	__be32 vni;			/* in the upper 24 bits */
	__u8 eth_dst[6];
	__u8 eth_src[6];
	__be16 eth_type;
	__u16 inner[6];
};

#define TP_ENVELOPE_LEN 50
#define TP_VXLAN_FLAGS bpf_htonl(0x08000000)	/* a valid identifier, nothing else */

/* An IP header alone around a packet, with the Ethernet type before it and the first bytes of the packet behind it. */
struct tp_ipip {
	__be16 eth_type;
	struct iphdr ip;
	__u16 inner[6];
} __attribute__((packed));

/* The same between nodes' IPv6 addresses (RFC 2473). */
struct tp_ipip6 {
	__be16 eth_type;
	struct ipv6hdr ip;
	__u16 inner[6];
} __attribute__((packed));

/* Of a packet in such a header: what is to be known once the header is off. */
struct tp_outer {
	struct tp_addr from;		/* the node that sent it */
	__be16 eth_type;		/* of the packet inside */
	__u8 ecn;			/* congestion notification, of the header */
	__u8 pad;
};

enum tp_packet_flag {
	TP_PKT_V6 = 1 << 0,
	TP_PKT_SLOW = 1 << 1,		/* IPv4 options or IPv6 extension headers: forwarding is the kernel's business */
	TP_PKT_FIRST_FRAG = 1 << 2,
	TP_PKT_LATER_FRAG = 1 << 3,	/* no transport header in it */
	TP_PKT_OPENS = 1 << 4,		/* TCP SYN without ACK, echo request: opens a connection in its own direction */
	TP_PKT_ERROR = 1 << 5,		/* ICMP or ICMPv6 error that quotes a packet */
};

struct tp_packet {
	struct tp_tuple t;
	__u32 l4_off;
	__u32 frag_id;
	__u32 flags;			/* enum tp_packet_flag */
	__u8 ttl;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 pad;
};

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* The first 16 bytes of a TCP header; shorter protocols use less of it. */
struct tp_l4 {
	__be16 sport;
	__be16 dport;
	__be32 seq;
	__be32 ack;
	__u8 offset;
	__u8 flags;
	__be16 window;
};

struct tp_icmp {
	__u8 type;
	__u8 code;
	__be16 sum;
	__be16 id;
	__be16 seq;
};

/* A choice of backend. Small enough for the stack of a socket hook. */
struct tp_lb {
	struct tp_service_key key;
	struct tp_service service;
	struct tp_slot_key slot;
	struct tp_affinity_key affinity_key;
	struct tp_affinity affinity;
	struct tp_backend backend;
	__u32 backend_id;
	__u32 sport;			/* of the client, for TP_TUPLE_HASH */
};

/* A judgement of a flow in its original direction. */
struct tp_judgement {
	__u32 egress_rule;
	__u32 ingress_rule;
	__u32 isolated;			/* one of the ends that are here is isolated */
	__u8 egress_verdict;		/* enum tp_verdict; NONE: that end is not here */
	__u8 ingress_verdict;
	__u8 pad[2];
	__u32 pod_id;
	__u32 egress_audit;		/* sets that would judge it if the audited policies were enforced, 0: none there */
	__u32 ingress_audit;
	struct tp_ct_end from;
	struct tp_ct_end to;
};

enum tp_own_node {
	TP_OWN_UNKNOWN = 0,		/* this hook cannot see who generated the packet */
	TP_OWN_YES = 1,
	TP_OWN_NO = 2,
};

/* What tp_nat has of w->sent. */
enum tp_sought {
	TP_NAT_UNSOUGHT = 0,
	TP_NAT_KNOWN = 1,		/* and w->lb holds the backend */
	TP_NAT_UNKNOWN = 2,
};

struct tp_work {
	struct tp_headers h;
	struct tp_packet p;
	struct tp_tuple sent;		/* before translation */
	struct tp_tuple quoted;		/* inside an ICMP error */
	__u32 quoted_l4;		/* where its ports are */
	struct tp_tuple origin;		/* opener to responder, what is judged */
	struct tp_ct_key key;
	struct tp_ct_key recycled;	/* an older opening of the same pod */
	struct tp_ct fresh;
	struct tp_nat nat;
	struct tp_lb lb;
	struct tp_snat_way way;		/* of a connection whose backend is no pod (snat.h) */
	struct tp_snat snat;
	struct tp_tuple answer;		/* as that backend answers */
	struct tp_tuple aim;		/* what such a packet becomes */
	struct tp_judgement j;
	struct tp_pod from;		/* copies of the ends' entries in tp_pods */
	struct tp_pod to;
	struct tp_cidr_key cidr;
	struct tp_rule_key rule_key;
	struct tp_set_class_key set_class;
	struct tp_audit_key audit_key;
	struct tp_audited audited;
	struct tp_frag_key frag_key;
	struct tp_frag frag;
	struct bpf_tunnel_key tunnel;
	struct tp_envelope envelope;
	struct tp_ipip ipip;
	__u8 ipip_pad[2];
	struct tp_ipip6 ipip6;
	__u8 ipip6_pad[2];
	struct tp_outer outer;
	struct bpf_fib_lookup fib;
	struct bpf_redir_neigh hop;
	struct tp_l4 l4;
	struct tp_l4 l4_new;
	struct tp_icmp icmp;
	__u8 quote[ETH_LEN + 2 * 40 + 16];	/* an answer under construction */
	struct tp_addr via;
	__u32 rule;			/* of the last judgement of one set */
	__u32 reason;			/* why to drop, 0: do not */
	__u8 from_a;			/* the packet comes from side A of `key` */
	__u8 reply;
	__u8 translated;		/* destination is to become lb.backend */
	__u8 chosen;			/* with translated: by this packet, no earlier one */
	__u8 sought;			/* enum tp_sought */
	__u8 has_via;
	__u8 by;			/* with has_via: enum tp_by */
	__u8 resolve;			/* look the destination's node up for new and stale flows */
	__u8 own_node;			/* enum tp_own_node */
	__u8 overtaken;			/* by another CPU, in entering a connection */
	__u8 direct;			/* the node that it is sent to is asked to answer `sent` itself */
	__u8 passing;			/* what tp_to_pod sees next is its own copy of a packet that it let pass: it sees it at once, before anything else */
	__u8 restore;			/* the quoted packet was translated: its destination was nat.daddr, nat.dport */
};

/* How the far end of a connection is sent to, by tp_ct.flags. */
static __always_inline __u8 tp_by_of_ct(__u32 flags)
{
	if (flags & TP_CT_PLAIN)
		return flags & TP_CT_LINK ? TP_BY_LINK : TP_BY_ITSELF;
	return flags & TP_CT_IPIP ? TP_BY_IPIP : TP_BY_ENVELOPE;
}

/* How the pods of a node are, by its entry. */
static __always_inline __u8 tp_by_of_peer(const struct tp_peer *peer)
{
	if (peer->flags & TP_PEER_PLAIN)
		return peer->flags & TP_PEER_LINK ? TP_BY_LINK : TP_BY_ITSELF;
	return peer->flags & TP_PEER_IPIP ? TP_BY_IPIP : TP_BY_ENVELOPE;
}

#endif
