/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one source of every layout that kernel programs and user space share.
 *
 * Rules: fixed-width types, no implicit padding (every hole is a named field that user space writes as zero),
 * addresses are 16 bytes with IPv4 mapped into IPv6 (::ffff:a.b.c.d), addresses and ports in network byte order,
 * everything else in host order. The Rust side is generated from this file; a check fails on a difference.
 */
#ifndef TOWPATH_ABI_H
#define TOWPATH_ABI_H

/*
 * Raised whenever a layout below changes: part of the pin directory's name. A version finds what another one, older or newer, left in its
 * directory: a map of the same layout is shared by both, one of another layout is copied field by field, by name. So:
 * - a field whose meaning changes gets another name;
 * - a new field of a value means, as zero, what held before there was one;
 * - fields of a key only come and go with the map's name.
 */
#define TP_ABI_VERSION 7

/* ---- addresses and tuples ------------------------------------------------------------------------------------ */

struct tp_addr {
	__u8 b[16];
} __attribute__((aligned(4)));

/* Prefix-tree key. `family` is 4 or 6 and comes first, so that ::/0 never matches IPv4. prefixlen counts from the
 * family field: 32 + 96 + n for IPv4 (mapped), 32 + n for IPv6. */
struct tp_cidr_key {
	__u32 prefixlen;
	__u32 family;
	struct tp_addr addr;
};

/* One direction of a flow. ICMP echo: both ports hold the identifier. Other protocols: ports are 0. */
struct tp_tuple {
	struct tp_addr saddr;
	struct tp_addr daddr;
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 pad[3];
};

/* ---- the node -------------------------------------------------------------------------------------------------- */

enum tp_backend_mode {
	TP_MODE_VXLAN = 1,
};

enum tp_node_flag {
	TP_NODE_PLAIN_ROUTING = 1 << 0,	/* no routing rules but the kernel's and ours: the main table decides */
	TP_NODE_BORROWED_TUNNEL = 1 << 1,	/* the tunnel device is another network's, which knows peers by its own tables: what
						 * cannot be put into an envelope here goes to the kernel's routes */
	TP_NODE_SILENT_LO4 = 1 << 2,	/* no NodePort answers at 127.0.0.1 */
	TP_NODE_SILENT_LO6 = 1 << 3,	/* nor at ::1 */
	TP_NODE_DIRECT_RETURN = 1 << 4,	/* an endpoint's node answers clients outside itself, with the Service's address as source */
	TP_NODE_ON_LINK = 1 << 5,	/* pods are on the uplink's link with their own MACs (macvlan): answered for there, taken and sent with these */
};

/* tp_node_config: array of one. */
struct tp_node_config {
	struct tp_addr node4;		/* this node's address, zero when it has none of the family */
	struct tp_addr node6;
	struct tp_addr dns4;		/* node-local address that DNS listens on */
	struct tp_addr dns6;
	__u64 netns_cookie;		/* the node's own network namespace */
	__u32 uplink_ifindex;
	__u32 tunnel_ifindex;
	__u32 tunnel_id;		/* VNI */
	__u32 mode;			/* enum tp_backend_mode */
	__u32 tunnel_mtu;		/* bytes; what does not fit takes the kernel's path. 0: not checked */
	__be16 tunnel_port;
	__be16 nodeport_min;
	__be16 nodeport_max;
	__u8 tunnel_mac[6];		/* this node's tunnel device's own address, see below */
	__u32 flags;			/* enum tp_node_flag */
	__u32 tunnel6_ifindex;		/* with a borrowed tunnel: the other network's device over IPv6, 0: none */
	__u32 udp_ifindex;		/* the device of the backend udp, see below. 0: none */
	__be16 udp_port;		/* where its datagrams come in */
	__u8 pad[2];
};

/* MAC of the tunnel device of the node whose tunnel address is T: 02:74 and the four bytes of the XOR of T's four 32-bit
 * words. Inner Ethernet source is the sender's (tunnel_mac), inner destination the receiver's, computed from
 * tp_peer.tunnel (or tp_ct.via), unless the entry of that address in tp_peers names another. It must differ between nodes: the
 * VXLAN driver drops a frame whose inner source is its own address as a loop. The programs here take a frame for any MAC. */

/*
 * The backend udp: user space takes a frame of its device to the node that the frame's destination names, and gives frames of other nodes to it with
 * the sender's in their source. The node at the IPv4 address A is 02:77 and A there; at an IPv6 address 0a: and 40 bits of a hash of it, which two
 * nodes that differ in the last five bytes only do not share. Where two do, the one with the lower address has it, and the other stays in
 * envelopes. User space looks at no packet to decide: who may send what is judged by the program of the device, as in a tunnel.
 */

/* tp_udp_nodes: hash, the 40 bits -> tp_addr: the IPv6 address of the other node that has them. Who sends datagrams is known by its whole address
 * before (an outsider's do not get past the device that they come in by, and user space compares), so to have the same bits is of no use. */

/*
 * On the link (TP_NODE_ON_LINK) an address of a pod has a MAC that follows from it, so that nobody of this network has to ask for it: 06:74 and the
 * XOR of 0xffff and the IPv4 address; of IPv6 06:76, the XOR of its first seven 16-bit words, and the last one. Where the pod's own MAC begins
 * otherwise somebody chose it: it answers with that one, and sends with it to all but nodes and pods of this network, which send to the other.
 */

/* tp_revision: array of one __u32, raised after every change of policy sets, classes, rules or peers is complete. A verdict
 * older than it is judged again at the flow's next packet, and where the flow goes is looked up again. Never 0. */

/* ---- pods and peers -------------------------------------------------------------------------------------------- */

enum tp_pod_flag {
	TP_POD_HOST_ONLY = 1 << 0,	/* labels unknown yet: everything denied but its own node */
};

/* Of host_mac[0], where the address itself has 0 (it is no group's): what is for the pod waits at its device's queue for its turn (a limit to what it
 * receives), so it is handed to the device, and not past the queue into the pod's namespace. */
#define TP_HOST_MAC_WAITS 1

/* tp_pods: hash, address -> this. Pods of this node only; a pod with two families has two entries. A packet from a pod's
 * device whose source has no entry, or one with another ifindex or MAC, is dropped. */
struct tp_pod {
	__u32 ifindex;			/* host side of the pod's veth */
	__u32 pod_id;			/* stable while the pod lives; never 0 */
	__u32 ingress_set;		/* policy set, 0: not isolated */
	__u32 egress_set;
	__u32 flags;			/* enum tp_pod_flag */
	__u8 mac[6];			/* the pod's own */
	__u8 host_mac[6];		/* the host side's, with TP_HOST_MAC_WAITS */
	/* The same with the policies that are only audited, as if they were enforced: what they would deny is counted (tp_audited)
	 * and told, and passes. 0: none of them selects the pod. */
	__u32 ingress_audit_set;
	__u32 egress_audit_set;
};

/*
 * tp_netns_pods: hash, netns cookie (__u64) -> this. Lets the socket hooks name the client as the veth path would. They leave the sockets
 * of a namespace alone that is neither here nor the node's: a pod's that is translated at its device.
 */
struct tp_netns_pod {
	struct tp_addr addr4;
	struct tp_addr addr6;
	__u32 pod_id;
	__u32 pad;
};

/* How a packet goes to the node that its destination lies behind. */
enum tp_by {
	TP_BY_ENVELOPE = 0,		/* VXLAN */
	TP_BY_ITSELF = 1,
	TP_BY_IPIP = 2,			/* an IP header (RFC 2003, RFC 4213); what the other end could not take out of it goes in an envelope */
	TP_BY_LINK = 3,			/* as it is, to the pod's MAC on the link */
};

enum tp_peer_flag {
	TP_PEER_NODE = 1 << 0,		/* the prefix is a node's own address (NodePort answers there, unless SILENT) */
	TP_PEER_LOCAL = 1 << 1,		/* it is this node's */
	TP_PEER_PLAIN = 1 << 2,		/* what is for it is sent without an envelope: a pod's packets to the node, a node's own by the
					 * kernel's routes */
	TP_PEER_SILENT = 1 << 3,	/* no NodePort answers at this address of a node */
	TP_PEER_IPIP = 1 << 4,		/* of a pod range: what is for it is sent in an IP header alone, where that can be */
	TP_PEER_UDP = 1 << 5,		/* of a node's address: what would go there in an envelope goes by the device of udp, if there is one */
	TP_PEER_LINK = 1 << 6,		/* of a pod range, with PLAIN: what is for it is sent to the pods' MACs on the link */
};

/* tp_peers: prefix tree, tp_cidr_key -> this. podCIDRs and node addresses of all nodes, this one included. Who is not
 * in it is outside the cluster. */
struct tp_peer {
	struct tp_addr tunnel;		/* the node's tunnel address */
	__u32 flags;			/* enum tp_peer_flag */
	/* A device besides the tunnel that its packets come by; 0: none. With LOCAL: what is there is no pod of ours, and is reached
	 * through the kernel's stack. */
	__u32 ifindex;
	__u8 mac[6];			/* of its tunnel device; zero: as computed */
	__u8 pad[2];
};

/* tp_wires: hash, ifindex -> this. */
struct tp_wire {
	__u8 mac[6];			/* of the device that runs the program of XDP */
	__u8 pad[2];
};

/* ---- policy ---------------------------------------------------------------------------------------------------- */

/* tp_class_pods: hash, address -> __u32 class. Every address of a pod that some policy in force on this node can tell
 * apart. Looked up first. tp_class_cidrs: prefix tree, tp_cidr_key -> __u32 class, for everything else. Neither: class 0. */

/* tp_set_class: hash, this -> __u32 local class. Absent: local class 0. */
struct tp_set_class_key {
	__u32 set;
	__u32 class_id;
};

/* tp_rules: prefix tree, this -> tp_rule. Prefixes of one (set, local class, proto) are disjoint: the planner flattens
 * ranges, so prefix length decides nothing. proto is TCP, UDP or SCTP, or 0 for every other protocol (port then 0).
 * prefixlen = 80 + number of significant bits of the port. Absent: denied by default. Sets belong to one direction. */
struct tp_rule_key {
	__u32 prefixlen;
	__u32 set;
	__u32 local_class;
	__u8 proto;
	__u8 pad;
	__be16 port;
};

enum tp_verdict {
	TP_VERDICT_NONE = 0,		/* not judged */
	TP_VERDICT_ALLOW = 1,
	TP_VERDICT_DENY = 2,
};

struct tp_rule {
	__u32 verdict;			/* enum tp_verdict */
	__u32 rule_id;			/* resolved by user space to policy, direction, rule, peer and port */
};

/* rule_id values that no rule has. */
enum tp_rule_id {
	TP_RULE_NOT_ISOLATED = 0,	/* no policy selects the pod in this direction */
	TP_RULE_DEFAULT_DENY = 0xffffffff,
	TP_RULE_OWN_NODE = 0xfffffffe,	/* generated by the pod's own node */
	TP_RULE_HOST_ONLY = 0xfffffffd,	/* the pod's labels are not known yet */
	TP_RULE_SELF = 0xfffffffc,	/* a pod always reaches itself */
};

/*
 * tp_audited: hash, this -> tp_audited. Connections that pass, and would be denied by a set that is only audited. One is counted when it
 * is opened, or when it is judged again under such a set for the first time: once under one set, as a rule. An entry is made by
 * the program that counts first; user space takes it away when nothing has the set any more.
 */
struct tp_audit_key {
	__u32 set;
	__u32 rule;			/* rule_id, TP_RULE_DEFAULT_DENY too */
};

struct tp_audited {
	__u64 connections;
	__u64 last;			/* ktime, ns: when one was counted last */
};

/* ---- connections ----------------------------------------------------------------------------------------------- */

/* tp_ct: hash. One entry a connection, found from both directions: the smaller (address, port) is side A.
 * The tuple is the one after service translation. */
struct tp_ct_key {
	struct tp_addr addr_a;
	struct tp_addr addr_b;
	__be16 port_a;
	__be16 port_b;
	__u8 proto;
	__u8 pad[3];
};

enum tp_ct_flag {
	TP_CT_FROM_A = 1 << 0,		/* side A opened the connection */
	TP_CT_REPLIED = 1 << 1,
	TP_CT_DNAT = 1 << 2,		/* replies get vip/vport as their source */
	TP_CT_FIN_A = 1 << 3,
	TP_CT_FIN_B = 1 << 4,
	TP_CT_RST = 1 << 5,
	TP_CT_VIA_TUNNEL = 1 << 6,	/* the end that is not here is reached through the node `via`: a remote pod or node, or
					 * an outside client that came in there */
	TP_CT_ESTABLISHED = 1 << 7,	/* the opener has sent again after an answer; of TCP: past the handshake */
	TP_CT_DIRECT = 1 << 8,		/* came in here for an endpoint whose node was asked to answer directly: unless TP_CT_REPLIED,
					 * answers are not seen here */
	TP_CT_PLAIN = 1 << 9,		/* with VIA_TUNNEL: that end is a pod of a node that takes packets without an envelope */
	TP_CT_IPIP = 1 << 10,		/* the same, in an IP header alone */
	TP_CT_LINK = 1 << 11,		/* with PLAIN: to the pod's MAC on the link */
};

/* An end that is a pod of this node: what the source check and the delivery need, so that an established connection costs
 * one look-up. As fresh as the entry's revisions. ifindex 0: not here. */
struct tp_ct_end {
	__u32 ifindex;
	__u8 mac[6];
	__u8 host_mac[6];
};

/* How an end was judged: enum tp_verdict in the high half, the tp_revision under which it was in the low one. One word, so
 * that nobody sees one half without the other. */

/* In the order of use: a packet of an established connection finds all that it needs in the two cache lines behind the key. */
struct tp_ct {
	__u64 last_seen;		/* ktime, ns */
	__u64 egress;			/* how the opener's egress was judged, 0: that end is not here */
	__u64 ingress;			/* the same of the responder's ingress */
	__u32 flags;			/* enum tp_ct_flag */
	__be16 vport;
	__u16 audited;			/* under which audit sets it was counted last (a hash of them), 0: none */
	struct tp_ct_end a;
	struct tp_ct_end b;
	struct tp_addr vip;
	struct tp_addr via;
	__u64 created;
	__u32 egress_rule;
	__u32 ingress_rule;
	__u32 backend;			/* tp_backends id, with TP_CT_DNAT */
	__u32 pod_id;			/* whom it is counted to, see tp_flows; stays while the key does */
};

/*
 * A pod's budget. Every entry of tp_ct is counted to who opened it, if that is a pod of this node or the node itself, else to
 * the responder if that is a pod of this node, else to everybody else together. With L the limit of tp_ct, one half of it is divided: a pod that holds
 * less than its share may always open a connection. The other half is lent to who asks, to each no more than twice what is
 * then left of it. So the table cannot be full for who is below its share, and whoever fills it leaves room for others.
 */

/* Holders of entries that are no pods. */
enum tp_holder {
	TP_HOLDER_OTHERS = 0,
	TP_HOLDER_NODE = 0xffffffff,	/* so that a pod's flood does not cost it its probes */
};

/* tp_budget: array of one. */
struct tp_budget {
	__u32 room;			/* half of L: what all may hold together while something is lent */
	__u32 share;
};

/* tp_held: array of one __u32: entries of tp_ct, counted before an entry is made and after it is deleted. */

/* A stretch of tp_flows.ring. (Of 32 because Rust knows no default of longer arrays.) */
struct tp_openings {
	struct tp_ct_key keys[32];
};

/* tp_flows: hash, pod_id or enum tp_holder -> this. Made by user space before the pod is entered in tp_pods, deleted a while after the last
 * entry that is counted to it. `ring` holds the pod's latest openings: when the pod may hold no more, the oldest of them
 * that is not established gives way to the new one. */
struct tp_flows {
	__u32 held;			/* entries of tp_ct that are counted to the pod */
	__u32 next;			/* modulo 128: the oldest place of the ring */
	struct tp_openings ring[4];
};

/* tp_nat: hash, tp_tuple as the client sends it (before translation) -> this. Entered with the connection that it leads to,
 * deleted with it. Of that connection it also holds what a packet needs that changes nothing about it, so that such a packet costs one
 * look-up. Only `fresh` is ever written where the entry lies. */
struct tp_nat {
	struct tp_addr daddr;
	__be16 dport;
	__u8 pad[2];
	__u32 backend;
	__u64 mark;			/* of the key, see addr.h: whose entry this is, where its memory may be another's by now */
	__u64 fresh;			/* ktime, ns, when the connection was last looked at and established. 0: never */
	__u32 revision;			/* under which it may pass at all ends that are here, 0: not known */
	__u32 by;			/* with via: enum tp_by */
	struct tp_ct_end from;		/* the client, if it is a pod of this node */
	struct tp_ct_end to;		/* the backend, if it is one */
	struct tp_addr via;		/* the node that the backend lies behind, zero: none */
};

/*
 * Clients outside whose backend is no pod (a node's own address, or one outside the cluster): there is no tunnel by which its answers would
 * come back, so the source is translated too, to an address of the node and a port of these; but of a backend that is this node itself,
 * whose answers pass its devices in any case. The one place where the range is said: it is disjoint from nftables' masquerading
 * (MASQUERADE_PORTS) and from the ports that Linux gives to sockets (ip_local_port_range, 32768-60999, unless somebody widened it).
 */
#define TP_SNAT_PORT_MIN 61000
#define TP_SNAT_PORT_MAX 65535

/* tp_snat: hash, tp_tuple as the backend answers -> this. Whoever enters it has its port; deleted with the entry in tp_snat_asked that leads
 * to it. */
struct tp_snat {
	__u64 last_seen;		/* ktime, ns */
	__u64 created;
	struct tp_addr client;
	struct tp_addr vip;
	__be16 client_port;
	__be16 vport;
	__u32 flags;			/* enum tp_ct_flag; side A is the client */
};

/* tp_snat_asked: hash, tp_tuple as the client sends -> this: what it becomes. */
struct tp_snat_way {
	struct tp_addr source;		/* the client's own address and port, if the backend is this node */
	struct tp_addr backend;
	__be16 source_port;
	__be16 backend_port;
	__u32 backend_id;		/* tp_backends id */
};

/* tp_frags: LRU, first fragment's facts for those that follow. */
struct tp_frag_key {
	struct tp_addr saddr;
	struct tp_addr daddr;
	__u32 id;
	__u8 proto;
	__u8 pad[3];
};

struct tp_frag {
	__be16 sport;
	__be16 dport;
	__u32 way;			/* enum tp_frag_way */
};

/* Whither the fragments of a datagram go. */
enum tp_frag_way {
	TP_FRAG_FIRST = 0,		/* each after the first, as that went */
	TP_FRAG_WHOLE = 1,		/* a later one came before the first: all to the kernel's stack, as they came */
	TP_FRAG_TOO_BIG = 2,		/* the first was too big for the tunnel: all to the stack, translated */
};

/* ---- services -------------------------------------------------------------------------------------------------- */

/* tp_services: hash, this -> tp_service. The zero address of a family (::ffff:0.0.0.0 or ::) is "any node address":
 * NodePorts. Port 0, protocol 0 marks the address itself as a Service's: nothing but its ports answers there.
 * `inside` 1: what has only this node's endpoints for clients from outside, as this node's own clients have it. */
struct tp_service_key {
	struct tp_addr addr;
	__be16 port;
	__u8 proto;
	__u8 inside;
};

enum tp_service_flag {
	TP_SERVICE_AFFINITY = 1 << 0,	/* ClientIP */
	TP_SERVICE_NODEPORT = 1 << 1,
	TP_SERVICE_PODS = 1 << 2,	/* for pods of this node only: another proxy serves the node and the outside */
	TP_SERVICE_RANGES = 1 << 3,	/* for clients in tp_source_ranges only */
	TP_SERVICE_INSIDE = 1 << 4,	/* there is an entry with `inside` beside this one */
};

/* How a slot of a list is chosen for a new connection: the upper 8 bits of tp_service.flags. */
enum tp_algorithm {
	TP_RANDOM = 0,
	TP_ROUND_ROBIN = 1,		/* by tp_service.turn */
	TP_LEAST_CONNECTIONS = 2,	/* by tp_loads */
	TP_SOURCE_HASH = 3,		/* of the client's address */
	TP_TUPLE_HASH = 4,		/* of addresses, ports and protocol, as the client sends them */
};
#define TP_ALGORITHM_SHIFT 24

struct tp_service {
	__u32 id;			/* stable; the affinity key refers to it */
	__u32 slots;			/* generation: the list of tp_slots keys */
	__u32 count;			/* backends in the list; 0: refuse at once */
	__u32 flags;			/* enum tp_service_flag, enum tp_algorithm << TP_ALGORITHM_SHIFT */
	__u32 affinity_seconds;
	__u32 turn;			/* counted up by programs */
};

/* tp_slots: hash, this -> tp_slot. A new list is written whole before a service points to it. */
struct tp_slot_key {
	__u32 list;
	__u32 index;
};

/* A backend as tp_backends has it, so that a choice costs one look-up less; in the kernel's memory an entry is no larger for it. */
struct tp_slot {
	struct tp_addr addr;
	__be16 port;
	__u8 proto;
	__u8 pad;
	__u32 backend;
};

/* tp_service_bits: array of 64 bits each: which addresses may be Services', by a hash of the address (addr.h). No bit is ever cleared while
 * programs run, and an address has its own before it has an entry in tp_services: who finds none need not look for a Service, nor for a translation. */
#define TP_SERVICE_BITS_SHIFT 18

/* tp_backends: hash, __u32 id -> this. */
struct tp_backend {
	struct tp_addr addr;
	__be16 port;
	__u8 proto;
	__u8 pad;
	__u32 flags;
};

/* tp_loads: hash, __u32 backend id -> this. Open connections that go to the backend from here, of the backends that are chosen by
 * it. What was open before its entry was there is counted where it is in tp_nat. tp_loads_kept: array of one __u32, not 0 while there may be
 * entries: set before the first. */
struct tp_load {
	__u32 flows;			/* in tp_nat and tp_snat_asked */
	__u32 sockets;			/* translated when they connected */
};

/* tp_source_ranges: prefix tree, this -> __u32 1. Who may use a Service that is flagged TP_SERVICE_RANGES. prefixlen counts from
 * the service's id: 64 + 96 + n for IPv4 (mapped), 64 + n for IPv6. */
struct tp_source_key {
	__u32 prefixlen;
	__u32 service;
	__u32 family;
	struct tp_addr addr;
};

/* tp_service_names, tp_node_names: hash, 48 bits of a hash of an IPv6 address (direct_return.h) -> tp_addr: the address that has it. All
 * addresses of Services, and all nodes' own. */

/* tp_affinity: LRU. */
struct tp_affinity_key {
	struct tp_addr client;
	__u32 service;
	__u32 pad;
};

struct tp_affinity {
	__u64 last_used;		/* ktime, ns */
	__u32 backend;
	__u32 pad;
};

/* What a translated socket believes it talks to. Kept with the socket and freed with it, so no socket's memory is at the
 * cost of another's. tp_sock_peer: of its last connect. */
struct tp_sock_peer {
	struct tp_addr backend;
	struct tp_addr service;
	__be16 backend_port;
	__be16 service_port;
};

/* tp_sock_load: the backend that the socket is counted to in tp_loads. */
struct tp_sock_load {
	__u32 backend;
};

/* tp_sock_peers: of a socket that sends without connecting: the latest backends. */
struct tp_sock_peers {
	struct tp_sock_peer peers[32];
	__u32 next;			/* modulo 32: the oldest */
};

/* ---- asked of the kernel by user space (programs in SEC("syscall")) --------------------------------------------- */

/* tp_purge: deletes every connection and translation that has one of these addresses at either end. One run walks both
 * tables whole, tens of milliseconds, whatever it finds: so several addresses at once. */
struct tp_purge {
	struct tp_addr addrs[12];	/* more would not fit the stack that Linux 6.1 gives to a walk */
	__u32 count;			/* how many of them count */
	__u32 removed;			/* answer */
};

/* tp_untranslate: deletes the translation of this tp_tuple. tp_release: deletes translations whose backend is no longer in tp_backends. tp_collect: one run of the collector. */
struct tp_removed {
	__u32 connections;
	__u32 translations;
};

/* tp_held_sockets (an iterator): a connected socket that was translated, and still is connected to that backend. */
struct tp_held_socket {
	__u64 cookie;			/* SO_COOKIE */
	__u64 netns_cookie;
	struct tp_sock_peer peer;
	struct tp_addr local;		/* its own address and port */
	__be16 local_port;
	__u8 proto;
	__u8 family;			/* 4 or 6: the socket's, which may be 6 where its addresses are IPv4 */
	__u32 ifindex;			/* device that it is bound to, 0: none */
	__u32 state;			/* as TCP counts them; 1: established, UDP: connected */
};

/* tp_adjust: adds to what a pod, and what all, are counted to hold. Both signed. */
struct tp_adjust {
	__u32 pod;
	__u32 change;
	__u32 all;
};

/* ---- what is counted ------------------------------------------------------------------------------------------- */

/* tp_counters: per-CPU array, reason -> tp_counter. Reasons below TP_DROP_FIRST are not drops. */
enum tp_reason {
	TP_LOCAL_DELIVERY = 0,		/* straight into a pod of this node */
	TP_TUNNEL_OUT = 1,
	TP_TO_STACK = 2,
	TP_SERVICE_TRANSLATED = 3,
	TP_HOST_OUT = 4,		/* out of the uplink by the kernel's FIB, without its stack */
	TP_IGNORED = 5,			/* link-local housekeeping that nobody here needs: router solicitations, MLD, DAD */
	TP_REFUSED = 6,			/* answered with a reset or an ICMP error: the Service has no backend, or the packet does not fit the tunnel */
	TP_UNTRACKED = 7,		/* new, allowed and without an entry, for which there was no room: its answers need none */
	TP_CT_RECYCLED = 8,		/* an opening that gave way to a later one of its pod */
	TP_ACCELERATED = 9,		/* forwarded by XDP; also counted as what it is */
	TP_AUDIT_EGRESS = 10,		/* a connection that passes, and that a policy which is only audited would deny: of its opener's egress */
	TP_AUDIT_INGRESS = 11,		/* of its responder's ingress */
	TP_DIRECT_RETURN = 12,		/* opened by way of another node and answered from here (TP_NODE_DIRECT_RETURN) */
	TP_IPIP_OUT = 13,		/* to another node in an IP header alone */
	TP_UDP_OUT = 14,		/* to another node by the device of udp */
	TP_LINK_OUT = 15,		/* as it is to the MAC of a pod of another node */
	TP_DROP_FIRST = 16,
	TP_DROP_MALFORMED = 16,
	TP_DROP_SOURCE_ADDRESS = 17,	/* not the sender's own */
	TP_DROP_SOURCE_MAC = 18,
	TP_DROP_ARP_ND = 19,		/* foreign ARP, neighbour or router discovery */
	TP_DROP_MAPPED_V4 = 20,		/* IPv6 packet with a mapped, compatible or translated IPv4 address */
	TP_DROP_EGRESS_POLICY = 21,
	TP_DROP_INGRESS_POLICY = 22,
	TP_DROP_TUNNEL_SOURCE = 23,	/* outer source is not the node that owns the inner source */
	TP_DROP_TUNNEL_OUTSIDER = 24,	/* encapsulated packet from what is no node */
	TP_DROP_SPOOFED_NODE = 25,	/* from outside with this node's or a pod's address */
	TP_DROP_NO_BACKEND = 26,
	TP_DROP_CT_FULL = 27,
	TP_DROP_FRAGMENT = 28,		/* its first fragment was not seen */
	TP_DROP_SERVICE_ICMP = 29,	/* an echo request to a Service address */
	TP_DROP_INTERNAL = 30,		/* a helper failed */
	TP_DROP_NO_POD = 31,		/* for an address that no pod has here */
	TP_DROP_CT_BUDGET = 32,		/* a new connection of a pod that holds as many as it may */
	TP_DROP_SOURCE_RANGE = 33,	/* to a Service that is not for this client (loadBalancerSourceRanges) */
	TP_DROP_SNAT_PORTS = 34,	/* a new connection to a backend that is no pod: no source port towards it is free */
	TP_DROP_SNAT_FULL = 35,		/* the same: tp_snat or tp_snat_asked has no room */
	TP_DROP_SNAT_ODD = 36,		/* IP options, or the end of its time to live, towards or from such a backend: the kernel, whose
					 * business that is, forwards nothing that has its own address as the source */
	TP_DROP_CONGESTED = 37,		/* met congestion between nodes (ECN) on its way to an end that does not know of such a thing */
	TP_DROP_OWN_ENVELOPE = 38,	/* would leave with this node's address, and be taken for an envelope of this node's; made by somebody else */
	TP_DROP_LOOPBACK = 39,		/* to or from a loopback address, by a wire or a pod's device */
	TP_REASON_MAX = 64,
};

struct tp_counter {
	__u64 packets;
	__u64 bytes;
};

/* ---- what is told as it happens ---------------------------------------------------------------------------------- */

enum tp_drop_flag {
	TP_DROPPED_TUPLE = 1 << 0,	/* the packet could be read as far as its addresses, at least */
	TP_DROPPED_TRANSLATED = 1 << 1,	/* it was on its way to `backend` by way of the Service in the tuple */
	TP_DROPPED_XDP = 1 << 2,
	TP_DROPPED_SOCKET = 1 << 3,	/* no packet: a socket that may not connect, or send; its own port is not known */
};

/* tp_drops: ring of what is dropped or refused, or would be by an audited policy (TP_AUDIT_*), while tp_watched says so (array of one, nonzero: somebody listens). */
struct tp_dropped {
	__u64 at;			/* ktime, ns */
	struct tp_tuple t;		/* as its sender wrote it */
	struct tp_addr backend;
	__be16 backend_port;
	__u8 flags;			/* enum tp_drop_flag */
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 pad[3];
	__u32 reason;			/* enum tp_reason */
	__u32 rule;			/* of the policy that denied it, or would, else 0 */
	__u32 ifindex;			/* where it came in; 0 of TP_AUDIT_* */
	__u32 len;			/* bytes, link header included; 0 of TP_AUDIT_* */
	__u32 set;			/* of TP_AUDIT_*: the set that would deny it */
	__u8 pad_end[4];
};

/* tp_told: per-CPU array of one: how much was told in this span of time, and how much was not, ever. */
struct tp_told {
	__u64 since;			/* ktime, ns */
	__u64 untold;			/* more than may be told, or there was no room */
	__u32 count;
	__u32 pad;
};

/* tp_trace: array of one: the last redirect. Used only when the object was loaded with tp_testing set (constant data,
 * so in production the code that writes it does not exist). */
struct tp_trace {
	struct tp_addr tunnel_source;	/* in: the outer source that tp_from_tunnel is to believe, zero: the real one */
	struct tp_addr tunnel_remote;
	__u32 redirect_ifindex;
	__u32 redirect_kind;		/* 1 peer, 2 device, 3 neighbour */
	__u32 tunnel_id;
	__u32 reason;
};

#endif
