/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Direct server return (TP_NODE_DIRECT_RETURN): the node where a client's packets come in tells the endpoint's node which address and
 * port they were sent to, and that one answers the client itself, with them as its source.
 *
 * It is told in the addresses of the frame in the envelope, which nobody needs there. Of IPv4: 02:75 and the Service's address as the
 * destination; 02:75, two bytes of 0 and its port as the source. Of IPv6, whose addresses are too long: 02:76 and 48 bits of a hash of the
 * address, four bytes in the destination, two in the source. The packet is otherwise the one that is sent in any case, translated
 * to the endpoint. So it costs no room, takes the same ways, and who does not know of this, or does not believe it, answers through the tunnel
 * as ever: the node where the packets came in is prepared for both.
 */
#ifndef TOWPATH_DIRECT_RETURN_H
#define TOWPATH_DIRECT_RETURN_H

#define DIRECT_FIRST 0x02
#define DIRECT_SECOND_V4 0x75
#define DIRECT_SECOND_V6 0x76
#define DIRECT_SCANNED 1024

/* Another network's device takes no frame but its own. */
static __always_inline int tp_knows_direct_return(const struct tp_node_config *cfg)
{
	return (cfg->flags & (TP_NODE_DIRECT_RETURN | TP_NODE_BORROWED_TUNNEL)) == TP_NODE_DIRECT_RETURN;
}

/* Whether the other node can be told of w->sent. Who is in the cluster gets his answers by the cluster's ways. */
static __always_inline int tp_may_ask_direct_return(struct tp_work *w, const struct tp_node_config *cfg)
{
	if (!tp_knows_direct_return(cfg))
		return 0;
	tp_full_prefix(&w->cidr, &w->sent.saddr);
	return !bpf_map_lookup_elem(&tp_peers, &w->cidr);
}

/* What stands for an IPv6 address; `Addr::name` of user space makes the same. */
static __always_inline __u64 tp_name_of(const struct tp_addr *addr)
{
	return tp_mix_addr(0, addr) >> 16;
}

/* Writes w->sent into the addresses of w->h. */
static __always_inline void tp_ask_direct_return(struct tp_work *w)
{
	int v4 = tp_is_v4(&w->sent.daddr);
	__u64 name = v4 ? tp_word(&w->sent.daddr, 3) : tp_name_of(&w->sent.daddr);
	__u32 low = name;
	__u16 high = name >> 32;

	w->h.eth_dst[0] = DIRECT_FIRST;
	w->h.eth_dst[1] = v4 ? DIRECT_SECOND_V4 : DIRECT_SECOND_V6;
	__builtin_memcpy(w->h.eth_dst + 2, &low, 4);
	w->h.eth_src[0] = DIRECT_FIRST;
	w->h.eth_src[1] = w->h.eth_dst[1];
	__builtin_memcpy(w->h.eth_src + 2, &high, 2);
	__builtin_memcpy(w->h.eth_src + 4, &w->sent.dport, 2);
}

/* Reads w->sent from them: what the client sent. 0: they are a frame's own, or name what nobody knows here. */
static __always_inline int tp_read_direct_return(struct tp_work *w)
{
	const __u8 *dst = w->h.eth_dst, *src = w->h.eth_src;
	int v4 = tp_is_v4(&w->p.t.daddr);
	__u8 second = v4 ? DIRECT_SECOND_V4 : DIRECT_SECOND_V6;
	struct tp_addr *addr;
	__u64 name;
	__u32 low;
	__u16 high;

	if (dst[0] != DIRECT_FIRST || src[0] != DIRECT_FIRST || dst[1] != second || src[1] != second)
		return 0;
	__builtin_memcpy(&low, dst + 2, 4);
	__builtin_memcpy(&high, src + 2, 2);
	w->sent = w->p.t;
	__builtin_memcpy(&w->sent.dport, src + 4, 2);
	if (v4) {
		tp_set_v4(&w->sent.daddr, low);
		return !high;
	}
	name = low | (__u64)high << 32;
	addr = bpf_map_lookup_elem(&tp_service_names, &name);
	if (!addr)
		addr = bpf_map_lookup_elem(&tp_node_names, &name);
	if (!addr)
		return 0;
	w->sent.daddr = *addr;
	/* The entry's memory may have become another's meanwhile. */
	return tp_name_of(&w->sent.daddr) == name;
}

/* Looks for a backend in a list. */
struct tp_scan {
	struct tp_slot_key slot;
	struct tp_addr addr;
	__be16 port;
	__u8 proto;
	__u8 pad;
	__u32 found;			/* its id */
};

static long tp_scan_step(__u32 i, struct tp_scan *scan)
{
	struct tp_slot *slot;

	scan->slot.index = i;
	slot = bpf_map_lookup_elem(&tp_slots, &scan->slot);
	if (!slot || slot->port != scan->port || slot->proto != scan->proto || !tp_same(&slot->addr, &scan->addr))
		return 0;
	scan->found = slot->backend;
	return 1;
}

/*
 * Whether w->sent was sent to a Service that the outside may ask, of which the endpoint that w->p.t is sent to is one. Then w->lb holds that.
 * Of a list of more than DIRECT_SCANNED places only so many are looked at (of a hashed list they are a sample in which each of some
 * hundred endpoints is found): who is not found answers through the tunnel.
 */
static __noinline int tp_is_served(struct tp_work *w, const struct tp_node_config *cfg)
{
	struct tp_lb *lb = &w->lb;
	struct tp_service *service;
	struct tp_scan scan = {};

	tp_service_key_of(&lb->key, &w->sent.daddr, w->sent.dport, w->sent.proto);
	service = bpf_map_lookup_elem(&tp_services, &lb->key);
	if (!service && tp_is_nodeport(cfg, w->sent.dport)) {
		struct tp_peer *peer;

		tp_full_prefix(&w->cidr, &w->sent.daddr);
		peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
		if (!peer || (peer->flags & (TP_PEER_NODE | TP_PEER_SILENT)) != TP_PEER_NODE)
			return 0;
		tp_nodeport_key(&lb->key);
		service = bpf_map_lookup_elem(&tp_services, &lb->key);
	}
	if (!service || (service->flags & TP_SERVICE_PODS))
		return 0;
	scan.slot.list = service->slots;
	scan.addr = w->p.t.daddr;
	scan.port = w->p.t.dport;
	scan.proto = w->p.t.proto;
	bpf_loop(service->count < DIRECT_SCANNED ? service->count : DIRECT_SCANNED, tp_scan_step, &scan, 0);
	if (!scan.found)
		return 0;
	lb->backend.addr = w->p.t.daddr;
	lb->backend.port = w->p.t.dport;
	lb->backend_id = scan.found;
	return 1;
}

/*
 * Of a packet that came in the tunnel, for a pod here: whether its answers leave here by this node's own routes. A connection goes on as
 * it began, so also one that came in here before, and whose address has moved to another node. A new one is entered as if it had come in
 * here and had been translated here. -1: it would share another's entry (tp_ct_clashes).
 */
static __noinline int tp_answers_directly(struct tp_work *w, const struct tp_node_config *cfg, struct tp_ct *ct)
{
	if (ct && !tp_ct_restarts(w, ct, tp_now()))
		return tp_ct_forward(w, ct) && (ct->flags & (TP_CT_DNAT | TP_CT_VIA_TUNNEL)) == TP_CT_DNAT;
	if (!tp_knows_direct_return(cfg) || !tp_read_direct_return(w))
		return 0;
	tp_full_prefix(&w->cidr, &w->p.t.saddr);
	if (bpf_map_lookup_elem(&tp_peers, &w->cidr) || !tp_is_served(w, cfg))
		return 0;
	w->translated = 1;
	w->chosen = 1;
	if (ct && (ct->flags & TP_CT_DNAT) && tp_ct_clashes(w, ct))
		return -1;
	/* Those that follow come translated as this one. */
	if (w->p.flags & TP_PKT_FIRST_FRAG)
		tp_frag_record(w, &w->p.t);
	return 1;
}

#endif
