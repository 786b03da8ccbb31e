/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What hooks of every kind do with a packet that goes on: whose it may be, which connection it belongs to, what its next headers are.
 */
#ifndef TOWPATH_FORWARD_H
#define TOWPATH_FORWARD_H

#define FAMILY_V4 2			/* AF_INET */
#define FAMILY_V6 10			/* AF_INET6 */
#define TUNNEL_TTL 64
#define UDP_FIRST 0x02
#define UDP_SECOND 0x77
#define UDP_FIRST_V6 0x0a
#define LINK_FIRST 0x06
#define LINK_SECOND_V4 0x74
#define LINK_SECOND_V6 0x76
#define ECN_MASK 3
#define ECN_ECT_0 2
#define ECN_CE 3

static __always_inline __u16 tp_fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* Takes one from the time to live of w->h, which is at least 2. */
static __always_inline void tp_take_one_hop(struct tp_work *w)
{
	struct iphdr *ip = &w->h.v4;
	/* RFC 1624 with the known difference of 0x0100. */
	__u32 check = (__u32)ip->check + bpf_htons(0x0100);

	if (w->p.flags & TP_PKT_V6) {
		w->h.v6.hop_limit--;
		return;
	}
	ip->check = (__u16)(check + (check >= 0xffff));
	ip->ttl--;
}

/* Whether forwarding this packet is for the kernel: it will be answered, or its header is an odd one. */
static __always_inline int tp_wants_stack(const struct tp_work *w)
{
	return w->p.ttl <= 1 || (w->p.flags & TP_PKT_SLOW);
}

/* See abi.h for how a tunnel device's address follows from its node's tunnel address. */
static __always_inline void tp_tunnel_mac(__u8 *mac, const struct tp_addr *tunnel)
{
	__be32 folded = tp_word(tunnel, 0) ^ tp_word(tunnel, 1) ^ tp_word(tunnel, 2) ^ tp_word(tunnel, 3);

	mac[0] = 0x02;
	mac[1] = 0x74;
	__builtin_memcpy(mac + 2, &folded, 4);
}

/* The same of the device of udp. Of IPv6: as `udp_names` of user space makes it. */
static __always_inline void tp_udp_mac(__u8 *mac, const struct tp_addr *node)
{
	__be32 word = tp_word(node, 3);
	__u64 tag;

	if (tp_is_v4(node)) {
		mac[0] = UDP_FIRST;
		mac[1] = UDP_SECOND;
		__builtin_memcpy(mac + 2, &word, 4);
		return;
	}
	tag = tp_mix_addr(0, node) >> 24;
	mac[0] = UDP_FIRST_V6;
#pragma unroll
	for (int i = 1; i < 6; i++)
		mac[i] = tag >> (40 - 8 * i);
}

/* The node that has this MAC there; zero: none that is known. */
static __always_inline void tp_udp_node(const __u8 *mac, struct tp_addr *node)
{
	struct tp_addr *named;
	__u64 tag = 0;
	__be32 word;

	__builtin_memset(node, 0, sizeof(*node));
	if (mac[0] == UDP_FIRST && mac[1] == UDP_SECOND) {
		__builtin_memcpy(&word, mac + 2, 4);
		tp_set_v4(node, word);
		return;
	}
	if (mac[0] != UDP_FIRST_V6)
		return;
#pragma unroll
	for (int i = 1; i < 6; i++)
		tag = tag << 8 | mac[i];
	named = bpf_map_lookup_elem(&tp_udp_nodes, &tag);
	if (named)
		*node = *named;
}

/* The MAC of a pod's address on the link. */
static __always_inline void tp_link_mac(__u8 *mac, const struct tp_addr *addr)
{
	__u32 all = bpf_ntohl(tp_word(addr, 0) ^ tp_word(addr, 1) ^ tp_word(addr, 2) ^ tp_word(addr, 3));
	__u32 last = bpf_ntohl(tp_word(addr, 3)) & 0xffff;
	int v4 = tp_is_v4(addr);
	__be32 word = v4 ? tp_word(addr, 3) ^ bpf_htonl(0xffff) : bpf_htonl((all ^ all << 16 ^ last << 16) & 0xffff0000) | bpf_htonl(last);

	mac[0] = LINK_FIRST;
	mac[1] = v4 ? LINK_SECOND_V4 : LINK_SECOND_V6;
	__builtin_memcpy(mac + 2, &word, 4);
}

/* Whether a peer's tunnel device is another network's. */
static __always_inline int tp_names_mac(const struct tp_peer *peer)
{
	return peer->mac[0] | peer->mac[1] | peer->mac[2] | peer->mac[3] | peer->mac[4] | peer->mac[5];
}

/* Where a frame for the node with this tunnel address is sent to inside the envelope: another network's device takes none but its own. */
static __always_inline void tp_inner_mac(struct tp_work *w, const struct tp_addr *tunnel, __u8 *mac)
{
	struct tp_peer *peer;

	tp_full_prefix(&w->cidr, tunnel);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	if (peer && tp_names_mac(peer))
		tp_copy_mac(mac, peer->mac);
	else
		tp_tunnel_mac(mac, tunnel);
}

/* Congestion notification of the outer header (RFC 6040 4.1, as the kernel's tunnels do it). */
static __always_inline __u8 tp_outer_ecn(const struct tp_work *w)
{
	const __u8 *first = (const __u8 *)&w->h.v4;
	__u8 inner = w->p.flags & TP_PKT_V6 ? first[1] >> 4 : first[1];

	return (inner & ECN_MASK) == ECN_CE ? ECN_ECT_0 : inner & ECN_MASK;
}

/* Makes w->envelope for a frame of `len` bytes to the node at `to`. `hash`: of its flow, in which every bit depends on it. */
static __always_inline void tp_write_envelope(struct tp_work *w, const struct tp_node_config *cfg, __be32 to, __u32 len, __u32 hash)
{
	struct tp_envelope *e = &w->envelope;
	const __u16 *inner = (const __u16 *)&w->h.v4;
	__be16 words[] = { bpf_htons(0x4500 | tp_outer_ecn(w)), bpf_htons(len - ETH_LEN + TP_ENVELOPE_LEN),
			   (__u16)bpf_get_prandom_u32(), 0, bpf_htons(TUNNEL_TTL << 8 | IPPROTO_UDP) };
	__be32 from = tp_word(&cfg->node4, 3);
	__u32 sum = (from & 0xffff) + (from >> 16) + (to & 0xffff) + (to >> 16);

#pragma unroll
	for (int i = 0; i < 5; i++) {
		((__u16 *)&e->ip)[i] = words[i];
		sum += words[i];
	}
	e->ip.check = ~tp_fold(sum);
	e->ip.saddr = from;
	e->ip.daddr = to;
	/* The flow's entropy for whoever spreads by ports on the way (RFC 7348 5), in 49152-65535. */
	e->sport = bpf_htons(0xc000 | ((hash ^ hash >> 16) & 0x3fff));
	e->dport = cfg->tunnel_port;
	e->len = bpf_htons(len - ETH_LEN + TP_ENVELOPE_LEN - sizeof(e->ip));
	e->check = 0;
	e->flags = TP_VXLAN_FLAGS;
	e->vni = bpf_htonl(cfg->tunnel_id << 8);
	tp_copy_mac(e->eth_dst, w->h.eth_dst);
	tp_copy_mac(e->eth_src, w->h.eth_src);
	e->eth_type = w->h.eth_type;
#pragma unroll
	for (int i = 0; i < 6; i++)
		e->inner[i] = inner[i];
}

/* Whether this is one of our envelopes, to this node, and nothing odd about it. Then w->envelope holds it. */
static __always_inline int tp_is_envelope(tp_context *ctx, struct tp_work *w, const struct tp_node_config *cfg)
{
	const void *data = (void *)(long)ctx->data;
	const void *end = (void *)(long)ctx->data_end;
	struct tp_envelope *e = &w->envelope;

	if (tp_protocol(ctx) != bpf_htons(ETH_P_IP) || data + ETH_LEN + TP_ENVELOPE_LEN > end ||
	    ((const struct iphdr *)(data + ETH_LEN))->protocol != IPPROTO_UDP)
		return 0;
#pragma unroll
	for (int i = 0; i < TP_ENVELOPE_LEN / 2; i++)
		((__u16 *)e)[i] = ((const __u16 *)(data + ETH_LEN))[i];
	/* Congestion that was met on the way and a checksum are for the kernel to carry over and to verify. */
	return e->dport == cfg->tunnel_port && e->ip.daddr == tp_word(&cfg->node4, 3) && tp_is_v4(&cfg->node4) &&
	       *(__u8 *)&e->ip == 0x45 && !(e->ip.frag_off & bpf_htons(IP_MF | IP_OFFSET)) &&
	       (e->ip.tos & ECN_MASK) != ECN_CE && !e->check && e->flags == TP_VXLAN_FLAGS &&
	       e->vni == bpf_htonl(cfg->tunnel_id << 8);
}

/*
 * Whether this is an IP header alone around a packet, to this node, and nothing odd about it: the header's length, and what it says in w->outer. 0: it is
 * not.
 */
static __always_inline __u32 tp_is_ipip(tp_context *ctx, struct tp_work *w, const struct tp_node_config *cfg)
{
	const void *data = (void *)(long)ctx->data;
	const void *end = (void *)(long)ctx->data_end;
	struct tp_outer *o = &w->outer;

	if (tp_protocol(ctx) == bpf_htons(ETH_P_IPV6)) {
		const struct ipv6hdr *ip = data + ETH_LEN;
		struct tp_addr to;

		if (data + ETH_LEN + sizeof(*ip) > end || (ip->nexthdr != IPPROTO_IPIP && ip->nexthdr != IPPROTO_IPV6))
			return 0;
		tp_set_v6(&to, &ip->daddr);
		if (ip->version != 6 || !tp_same(&to, &cfg->node6))
			return 0;
		tp_set_v6(&o->from, &ip->saddr);
		/* No IPv4 address speaks here. */
		if (tp_embeds_v4(&o->from))
			return 0;
		o->eth_type = ip->nexthdr == IPPROTO_IPIP ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
		o->ecn = ip->flow_lbl[0] >> 4 & ECN_MASK;
		return sizeof(*ip);
	}
	if (tp_protocol(ctx) == bpf_htons(ETH_P_IP)) {
		const struct iphdr *ip = data + ETH_LEN;

		if (data + ETH_LEN + sizeof(*ip) > end || (ip->protocol != IPPROTO_IPIP && ip->protocol != IPPROTO_IPV6) ||
		    *(__u8 *)ip != 0x45 || ip->daddr != tp_word(&cfg->node4, 3) || !tp_is_v4(&cfg->node4) ||
		    (ip->frag_off & bpf_htons(IP_MF | IP_OFFSET)))
			return 0;
		tp_set_v4(&o->from, ip->saddr);
		o->eth_type = ip->protocol == IPPROTO_IPIP ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
		o->ecn = ip->tos & ECN_MASK;
		return sizeof(*ip);
	}
	return 0;
}

/*
 * Whether another node would take what goes on to `dport` for something that this node put into an envelope, once it bears this node's address:
 * masquerading gives it that, and so does a Service at this node's address.
 */
static __always_inline int tp_passes_for_envelope(const struct tp_work *w, const struct tp_node_config *cfg, __be16 dport)
{
	__u8 proto = w->p.t.proto;

	/* Other nodes may take datagrams (udp) also where this one does not. */
	if (proto == IPPROTO_UDP)
		return dport == cfg->tunnel_port || (cfg->udp_port && dport == cfg->udp_port);
	return proto == IPPROTO_IPIP || proto == IPPROTO_IPV6;
}

/*
 * Whether a pod may not send that there. Between pods it is theirs, whatever way it goes: they keep their addresses. To a node it is not, also
 * when that node is known here: what does not fit its tunnel goes by the kernel's routes.
 */
static __noinline int tp_leaves_the_pods(struct tp_work *w)
{
	struct tp_peer *peer;

	if (bpf_map_lookup_elem(&tp_pods, &w->p.t.daddr))
		return 0;
	tp_full_prefix(&w->cidr, &w->p.t.daddr);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	return !peer || (peer->flags & TP_PEER_NODE);
}

/* Whether what would go to the node at `to` in an envelope goes by user space (udp). */
static __always_inline int tp_takes_udp(struct tp_work *w, const struct tp_node_config *cfg, const struct tp_addr *to)
{
	struct tp_peer *peer;

	if (!cfg->udp_ifindex)
		return 0;
	tp_full_prefix(&w->cidr, to);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	return peer && (peer->flags & TP_PEER_UDP);
}

/* Whether only nodes send to this UDP port. */
static __always_inline int tp_is_tunnel_port(const struct tp_node_config *cfg, __be16 port)
{
	return port == cfg->tunnel_port || (cfg->udp_ifindex && port == cfg->udp_port);
}

/* How pods of this entry are sent to. */
static __always_inline __u8 tp_by_of_pods(const struct tp_peer *peer)
{
	return peer && !(peer->flags & (TP_PEER_NODE | TP_PEER_LOCAL)) ? tp_by_of_peer(peer) : TP_BY_ENVELOPE;
}

/*
 * Whether `outer` may send this inner source here: it is the node that owns it, or, with `forwards`, a node at all that
 * brings an outside client. The node may send from another of its addresses than that of its tunnel (a network with a tunnel a
 * family does); then `outer` becomes the latter, by which it is answered; w->by says how.
 */
TP_APART int tp_may_send(struct tp_work *w, struct tp_addr *outer, __u32 forwards)
{
	struct tp_peer *peer, *sender;

	if (!w || !outer)
		return 0;
	w->by = TP_BY_ENVELOPE;
	if (tp_is_hairpin(&w->p.t.saddr))
		return 0;
	tp_full_prefix(&w->cidr, &w->p.t.saddr);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	w->by = tp_by_of_pods(peer);
	if (peer && (peer->flags & TP_PEER_LOCAL))
		return 0;
	if (peer && tp_same(&peer->tunnel, outer))
		return 1;
	tp_full_prefix(&w->cidr, outer);
	sender = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	if (!sender || (sender->flags & (TP_PEER_NODE | TP_PEER_LOCAL)) != TP_PEER_NODE)
		return 0;
	if (!peer)
		return forwards;
	if (!tp_same(&peer->tunnel, &sender->tunnel))
		return 0;
	*outer = peer->tunnel;
	return 1;
}

/*
 * One of the node's own addresses, also one that its object does not name, or one in its range that is no pod of ours: another
 * network's pod, or this node towards such a network.
 */
static __always_inline int tp_is_for_stack(struct tp_work *w, const struct tp_node_config *cfg)
{
	struct tp_peer *peer;

	if (tp_is_own_node(cfg, &w->p.t.daddr))
		return 1;
	tp_full_prefix(&w->cidr, &w->p.t.daddr);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	return peer && (peer->flags & TP_PEER_LOCAL) && ((peer->flags & TP_PEER_NODE) || peer->ifindex);
}

/*
 * Whether nobody outside may have this source; `peer`: its entry, if it has one. Pods come in the tunnel only, but for those of a network
 * that routes; this node does not come from outside at all. (Its further addresses may: one that just moved to another node.)
 */
static __always_inline int tp_is_inside_source(const struct tp_work *w, const struct tp_node_config *cfg, const struct tp_peer *peer,
					__u32 ifindex)
{
	return tp_is_own_node(cfg, &w->p.t.saddr) || tp_is_hairpin(&w->p.t.saddr) ||
	       (peer && !(peer->flags & TP_PEER_NODE) && ((peer->flags & TP_PEER_LOCAL) || peer->ifindex != ifindex));
}

/* Makes the node of w->lb.backend, which is no pod here, the packet's way, and notes in w->direct whether it can be asked anything. -1: it is
 * behind no other node either. */
static __always_inline int tp_backend_node(struct tp_work *w)
{
	struct tp_peer *peer;

	tp_full_prefix(&w->cidr, &w->lb.backend.addr);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	if (!peer || (peer->flags & (TP_PEER_NODE | TP_PEER_LOCAL)))
		return -1;
	w->via = peer->tunnel;
	w->has_via = 1;
	w->direct = !tp_names_mac(peer);
	return 0;
}

/* Whether a packet from outside that tp_translate has aimed would share another's entry; `ct`: what it has, if it has one. */
static __always_inline int tp_aimed_clashes(struct tp_work *w, struct tp_ct **ct)
{
	*ct = tp_ct_find(w, &w->p.t);
	/* Who is outside reaches no pod but so: an entry without a translation is of another proxy's time. */
	return *ct && ((*ct)->flags & TP_CT_DNAT) && tp_ct_clashes(w, *ct);
}

/* Its connection: judged, and entered if it is new. Leaves the reason to drop it in w->reason, and in w->direct whether the other node is to
 * be asked to answer itself. */
static __always_inline void tp_track_aimed(struct tp_work *w, const struct tp_node_config *cfg, struct tp_ct *ct)
{
	w->direct = w->direct && tp_may_ask_direct_return(w, cfg);
	ct = tp_track(w, cfg, ct);
	if (!ct && !w->reason)
		w->reason = TP_DROP_CT_FULL;
	/* A connection goes on as it began. */
	w->direct = w->direct && ct && (ct->flags & TP_CT_DIRECT);
}

/*
 * The connection that an answer from the tunnel belongs to, if its client came in here: `ct` is what tp_ct_find has just found. NULL, with
 * the reason to drop the packet in w->reason: it answers nobody.
 */
static __always_inline struct tp_ct *tp_track_answer(struct tp_work *w, const struct tp_node_config *cfg, struct tp_ct *ct)
{
	if (!ct || tp_ct_forward(w, ct) || !(ct->flags & TP_CT_DNAT)) {
		w->reason = TP_DROP_NO_POD;
		return NULL;
	}
	if (tp_passes_for_envelope(w, cfg, w->p.t.dport)) {
		w->reason = TP_DROP_OWN_ENVELOPE;
		return NULL;
	}
	ct = tp_track(w, cfg, ct);
	if (!w->reason && (!ct || !w->reply))
		w->reason = TP_DROP_NO_POD;
	return w->reason ? NULL : ct;
}

#endif
