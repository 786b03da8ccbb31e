/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * XDP of the devices that lead out: packets of outside clients to a Service whose backend is behind another node, and the answers, turned
 * round before the kernel has made a buffer of them.
 *
 * What is not both ordinary and certain goes on as it came (XDP_PASS) to the hooks of tc, which decide by the same code. So nothing is
 * decided otherwise than without this program, and it may come and go under a connection. A packet that was given a backend and then
 * goes on has left its connection and translation in the maps, by which tc gives it the same.
 *
 * Offsets: an ordinary packet has no IPv4 options and no IPv6 extension headers, so its transport header lies at one of two places.
 */

#define V4_L4 (ETH_LEN + sizeof(struct iphdr))
#define V6_L4 (ETH_LEN + sizeof(struct ipv6hdr))
#define TCP_SUM 16			/* of the checksum in the transport header */
#define UDP_SUM 6

/* Which frames a device takes for its own: its index -> this. Written by user space before the program runs there; while the address is
 * not the device's, everything goes on. */
TP_MAP(tp_wires, BPF_MAP_TYPE_HASH, __u32, struct tp_wire, 256, 0);

/*
 * Where packets for a backend on another node go, with the neighbour, for XDP resolves none. Believed for HOP_LIFE, and as long as the
 * revision is the same, which every change of pods and of nodes' ranges raises.
 */
struct tp_wire_hop {
	__u64 until;			/* ktime, ns */
	struct tp_addr backend;
	struct tp_addr via;		/* its node's tunnel address */
	__u32 revision;
	__u32 ifindex;
	__u32 mtu;			/* bytes, of the path */
	__u8 dst[6];
	__u8 src[6];
	__u8 inner[6];			/* inner destination */
	__u8 asked;			/* may be asked to answer clients itself */
	__u8 pad;
};
TP_MAP(tp_wire_hops, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct tp_wire_hop, HOPS, 0);

static __always_inline int tp_is_to(struct xdp_md *ctx, const struct tp_wire *wire)
{
	const __u16 *data = (void *)(long)ctx->data;
	const void *end = (void *)(long)ctx->data_end;
	const __u16 *mac = (const __u16 *)wire->mac;

	return (const void *)(data + 3) <= end && data[0] == mac[0] && data[1] == mac[1] && data[2] == mac[2];
}

static __always_inline int tp_is_tcp(const struct tp_work *w)
{
	return w->p.t.proto == IPPROTO_TCP;
}

/* Adds what a checksum gains when a word in its range changes. */
static __always_inline __u64 tp_changed(__u64 diff, __be32 from, __be32 to)
{
	return diff + (__u32)~from + to;
}

static __always_inline __u16 tp_fold_long(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	return tp_fold(sum);
}

/* Of two addresses of one family: the first three words of IPv4 are the same and cancel out. */
static __always_inline __u16 tp_address_change(const struct tp_addr *from, const struct tp_addr *to)
{
	__u64 diff = 0;

#pragma unroll
	for (int i = 0; i < 4; i++)
		diff = tp_changed(diff, tp_word(from, i), tp_word(to, i));
	return tp_fold_long(diff);
}

/* RFC 1624, equation 3. */
static __always_inline __u16 tp_sum_changed(__u16 sum, __u32 diff)
{
	return ~tp_fold((__u16)~sum + diff);
}

/*
 * Whether the checksum field holds the pseudo-header's sum alone: the sender, on this machine, left the rest to a device that the packet
 * never met (veth). The stack knows such a packet by its buffer (CHECKSUM_PARTIAL), which a frame sent from here would leave behind. Of
 * 65,536 others one looks the same, and goes on without harm.
 */
static __always_inline int tp_is_partial(const struct tp_work *w, __u16 sum)
{
	__u64 pseudo = bpf_htons(w->p.t.proto);
	__be16 len = w->p.flags & TP_PKT_V6 ? w->h.v6.payload_len :
					      bpf_htons(bpf_ntohs(w->h.v4.tot_len) - sizeof(struct iphdr));

	/* What all mapped addresses have in common is no part of it. */
	if (w->p.flags & TP_PKT_V6) {
#pragma unroll
		for (int i = 0; i < 3; i++)
			pseudo += (__u64)tp_word(&w->p.t.saddr, i) + tp_word(&w->p.t.daddr, i);
	}
	pseudo += (__u64)tp_word(&w->p.t.saddr, 3) + tp_word(&w->p.t.daddr, 3) + len;
	return tp_fold_long(pseudo) == sum;
}

/* Whether a packet that was just parsed can be forwarded here at all; `base` as in parse.h. */
static __always_inline int tp_is_ordinary(struct xdp_md *ctx, const struct tp_work *w, const __u32 base)
{
	const void *data = (void *)(long)ctx->data;
	const void *end = (void *)(long)ctx->data_end;
	__u32 l4 = w->p.flags & TP_PKT_V6 ? V6_L4 : V4_L4;

	if ((w->p.flags & (TP_PKT_FIRST_FRAG | TP_PKT_LATER_FRAG)) || tp_wants_stack(w) || w->p.l4_off != l4 ||
	    (w->p.t.proto != IPPROTO_TCP && w->p.t.proto != IPPROTO_UDP))
		return 0;
	data += base + l4;
	if (tp_is_tcp(w))
		return data + TCP_SUM + 2 <= end && !tp_is_partial(w, *(const __u16 *)(data + TCP_SUM));
	return data + UDP_SUM + 2 <= end && !tp_is_partial(w, *(const __u16 *)(data + UDP_SUM));
}

/*
 * Where the kernel's routes lead for w->fib, whose neighbour is left in it. Not 0: nowhere, not at once, or by another device than the
 * packet came by (the driver of which may not send what this one received).
 */
static __always_inline int tp_wire_route(struct xdp_md *ctx, struct tp_work *w, const struct tp_node_config *cfg)
{
	__u32 flags = cfg->flags & TP_NODE_PLAIN_ROUTING ? BPF_FIB_LOOKUP_DIRECT : 0;
	struct bpf_fib_lookup *fib = &w->fib;

	fib->ifindex = ctx->ingress_ifindex;
	if (bpf_fib_lookup(ctx, fib, sizeof(*fib), flags) != BPF_FIB_LKUP_RET_SUCCESS)
		return -1;
	return fib->ifindex == ctx->ingress_ifindex ? 0 : -1;
}

enum tp_wire_place {
	TP_WIRE_NOWHERE = -1,		/* behind no node that is known */
	TP_WIRE_ELSEWHERE = -2,		/* not from here: it is a pod of this node, or the way is not for XDP */
};

/* Looks up where w->lb.backend is, and the way there for an inner packet of `len` bytes. 0, or enum tp_wire_place. */
static __noinline int tp_wire_find(struct xdp_md *ctx, struct tp_work *w, const struct tp_node_config *cfg, struct tp_wire_hop *hop,
				   __u32 len)
{
	struct bpf_fib_lookup *fib = &w->fib;
	__u32 revision = tp_revision_now();

	if (!hop)
		return TP_WIRE_ELSEWHERE;
	hop->until = 0;
	if (bpf_map_lookup_elem(&tp_pods, &w->lb.backend.addr))
		return TP_WIRE_ELSEWHERE;
	if (tp_backend_node(w))
		return TP_WIRE_NOWHERE;
	if (!tp_is_v4(&w->via) || tp_takes_udp(w, cfg, &w->via))
		return TP_WIRE_ELSEWHERE;
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->family = FAMILY_V4;
	fib->l4_protocol = IPPROTO_UDP;
	fib->tot_len = len + TP_ENVELOPE_LEN;
	fib->ipv4_src = tp_word(&cfg->node4, 3);
	fib->ipv4_dst = tp_word(&w->via, 3);
	if (tp_wire_route(ctx, w, cfg))
		return TP_WIRE_ELSEWHERE;
	hop->backend = w->lb.backend.addr;
	hop->via = w->via;
	hop->asked = w->direct;
	hop->revision = revision;
	hop->ifindex = fib->ifindex;
	hop->mtu = fib->mtu_result;
	tp_copy_mac(hop->dst, fib->dmac);
	tp_copy_mac(hop->src, fib->smac);
	tp_inner_mac(w, &w->via, hop->inner);
	hop->until = tp_now() + HOP_LIFE;
	return 0;
}

/* The same, as it was found lately: w->via and `found`. */
static __always_inline int tp_wire_hop_to(struct xdp_md *ctx, struct tp_work *w, const struct tp_node_config *cfg, __u32 len,
					  struct tp_wire_hop **found)
{
	const struct tp_addr *backend = &w->lb.backend.addr;
	__u32 word = bpf_ntohl(tp_word(backend, 3)), slot = (word ^ word >> 8) % HOPS;
	struct tp_wire_hop *hop = bpf_map_lookup_elem(&tp_wire_hops, &slot);
	int place;

	if (hop && tp_same(&hop->backend, backend) && hop->ifindex == ctx->ingress_ifindex && hop->revision == tp_revision_now() &&
	    hop->until > tp_now()) {
		w->via = hop->via;
		w->has_via = 1;
		w->direct = hop->asked;
	} else {
		place = tp_wire_find(ctx, w, cfg, hop, len);
		if (place)
			return place;
	}
	if (!hop || len + TP_ENVELOPE_LEN > hop->mtu || (cfg->tunnel_mtu && len > cfg->tunnel_mtu) ||
	    len > 0xffff - TP_ENVELOPE_LEN)
		return TP_WIRE_ELSEWHERE;
	*found = hop;
	return 0;
}

/* Writes a port, 0 the source's or 2 the destination's, and the checksum that is its and the addresses' change. */
static __always_inline int tp_wire_transport(struct xdp_md *ctx, const struct tp_work *w, const __u32 base, const __u32 at, __be16 port,
					     __u32 diff)
{
	void *data = (void *)(long)ctx->data;
	const void *end = (void *)(long)ctx->data_end;
	__u16 *sum;

	data += base + (w->p.flags & TP_PKT_V6 ? V6_L4 : V4_L4);
	if (tp_is_tcp(w)) {
		sum = data + TCP_SUM;
		if ((const void *)(sum + 1) > end)
			return -1;
		*sum = tp_sum_changed(*sum, diff);
	} else {
		sum = data + UDP_SUM;
		if ((const void *)(sum + 1) > end)
			return -1;
		/* 0 means none, and must neither appear nor disappear. */
		if (*sum) {
			__u16 changed = tp_sum_changed(*sum, diff);

			*sum = changed ? changed : 0xffff;
		}
	}
	*(__be16 *)(data + at) = port;
	return 0;
}

/* Writes the link and the network header of w->h. */
static __always_inline int tp_wire_headers(struct xdp_md *ctx, const struct tp_work *w, const __u32 base)
{
	void *data = (void *)(long)ctx->data + base;
	const void *end = (void *)(long)ctx->data_end;
	const __u16 *link = (const __u16 *)w->h.eth_dst;
	const __u32 *network = (const __u32 *)&w->h.v4;

	if (data + V4_L4 > end)
		return -1;
#pragma unroll
	for (int i = 0; i < ETH_LEN / 2; i++)
		((__u16 *)data)[i] = link[i];
#pragma unroll
	for (int i = 0; i < sizeof(struct iphdr) / 4; i++)
		((__u32 *)(data + ETH_LEN))[i] = network[i];
	if (!(w->p.flags & TP_PKT_V6))
		return 0;
	if (data + V6_L4 > end)
		return -1;
#pragma unroll
	for (int i = sizeof(struct iphdr) / 4; i < sizeof(struct ipv6hdr) / 4; i++)
		((__u32 *)(data + ETH_LEN))[i] = network[i];
	return 0;
}

/* Gives w->h, which is in no checksum but its own, another address; what the transport's checksum gains. */
static __always_inline __u16 tp_wire_address(struct tp_work *w, const int source, const struct tp_addr *from, const struct tp_addr *to)
{
	__u16 diff = tp_address_change(from, to);
	struct iphdr *ip = &w->h.v4;

	if (w->p.flags & TP_PKT_V6) {
		__builtin_memcpy(source ? &w->h.v6.saddr : &w->h.v6.daddr, to->b, 16);
		return diff;
	}
	ip->check = tp_sum_changed(ip->check, diff);
	*(source ? &ip->saddr : &ip->daddr) = tp_word(to, 3);
	return diff;
}

/* All bits of it depend on the flow, and nothing else: the packets of one take one way. */
static __always_inline __u32 tp_flow_hash(const struct tp_tuple *t)
{
	__u64 hash = tp_mix(tp_mix_addr(0, &t->saddr), t->sport | (__u64)t->dport << 16 | (__u64)t->proto << 32);

	return tp_mix(hash, tp_word(&t->daddr, 3)) >> 32;
}

/* Into an envelope for w->via, and back out of the device that it came by. `len`: of the frame, in bytes. */
static __noinline int tp_wire_encapsulate(struct xdp_md *ctx, struct tp_work *w, const struct tp_node_config *cfg,
					  const struct tp_wire_hop *hop, __u32 len)
{
	__u32 diff;
	const __u16 *envelope = (const __u16 *)&w->envelope;
	const __u16 *link;
	const void *end;
	void *data;

	/* The only step that may fail: nothing is changed before. */
	if (bpf_xdp_adjust_head(ctx, -TP_ENVELOPE_LEN))
		return XDP_PASS;
	diff = tp_wire_address(w, 0, &w->sent.daddr, &w->lb.backend.addr);
	diff += (__u16)~w->sent.dport + w->lb.backend.port;
	tp_take_one_hop(w);
	tp_copy_mac(w->h.eth_dst, hop->inner);
	tp_copy_mac(w->h.eth_src, cfg->tunnel_mac);
	if (w->direct)
		tp_ask_direct_return(w);
	tp_write_envelope(w, cfg, tp_word(&w->via, 3), len, tp_flow_hash(&w->p.t));
	if (tp_wire_headers(ctx, w, TP_ENVELOPE_LEN) ||
	    tp_wire_transport(ctx, w, TP_ENVELOPE_LEN, 2, w->lb.backend.port, diff))
		return tp_drop(ctx, TP_DROP_INTERNAL);
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if (data + ETH_LEN + TP_ENVELOPE_LEN > end)
		return tp_drop(ctx, TP_DROP_INTERNAL);
	link = (const __u16 *)hop->dst;
#pragma unroll
	for (int i = 0; i < 6; i++)
		((__u16 *)data)[i] = link[i];
	((__be16 *)data)[6] = bpf_htons(ETH_P_IP);
#pragma unroll
	for (int i = 0; i < TP_ENVELOPE_LEN / 2; i++)
		((__u16 *)(data + ETH_LEN))[i] = envelope[i];
	len += TP_ENVELOPE_LEN;
	tp_count(TP_SERVICE_TRANSLATED, len);
	tp_count(TP_TUNNEL_OUT, len);
	tp_count(TP_ACCELERATED, len);
	tp_note_tunnel(cfg, &w->via);
	tp_note(3, ctx->ingress_ifindex, TP_TUNNEL_OUT);
	return XDP_TX;
}

/* What a client sends. */
static __always_inline int tp_wire_ask(struct xdp_md *ctx, struct tp_work *w, const struct tp_node_config *cfg)
{
	struct tp_wire_hop *hop = NULL;
	struct tp_peer *peer;
	struct tp_ct *ct;
	__u32 len;

	if (tp_parse(ctx, w) || !tp_is_ordinary(ctx, w, 0) ||
	    (w->p.t.proto == IPPROTO_UDP && tp_is_tunnel_port(cfg, w->p.t.dport)) || tp_names_loopback(&w->p.t))
		return XDP_PASS;
	tp_full_prefix(&w->cidr, &w->p.t.saddr);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	if (tp_is_inside_source(w, cfg, peer, ctx->ingress_ifindex))
		return XDP_PASS;
	w->sent = w->p.t;
	/* Perhaps the answer of a backend that is no pod. */
	if (tp_snat_has_port(w->sent.dport) && bpf_map_lookup_elem(&tp_snat, &w->sent))
		return XDP_PASS;
	if (tp_translate(w, cfg, TP_NODEPORT_OUTSIDE) != TP_CHOICE_BACKEND)
		return w->reason ? tp_drop(ctx, w->reason) : XDP_PASS;
	len = tp_len(ctx);
	if (tp_wire_hop_to(ctx, w, cfg, len - ETH_LEN, &hop) == TP_WIRE_NOWHERE)
		return XDP_PASS;
	/* A choice that was made here is entered, that the next hook makes no other. */
	if ((!hop && !w->chosen) || tp_aimed_clashes(w, &ct))
		return XDP_PASS;
	tp_track_aimed(w, cfg, ct);
	if (w->reason)
		return tp_drop(ctx, w->reason);
	return hop ? tp_wire_encapsulate(ctx, w, cfg, hop, len) : XDP_PASS;
}

/* Leaves in w->fib where the client of a connection is reached, for a packet of `len` bytes from its Service's address. */
static __always_inline int tp_wire_route_to_client(struct xdp_md *ctx, struct tp_work *w, const struct tp_node_config *cfg,
						   const struct tp_ct *ct, __u32 len)
{
	struct bpf_fib_lookup *fib = &w->fib;

	__builtin_memset(fib, 0, sizeof(*fib));
	fib->l4_protocol = w->p.t.proto;
	fib->tot_len = len;
	if (w->p.flags & TP_PKT_V6) {
		fib->family = FAMILY_V6;
		__builtin_memcpy(fib->ipv6_src, ct->vip.b, 16);
		__builtin_memcpy(fib->ipv6_dst, w->p.t.daddr.b, 16);
	} else {
		fib->family = FAMILY_V4;
		fib->ipv4_src = tp_word(&ct->vip, 3);
		fib->ipv4_dst = tp_word(&w->p.t.daddr, 3);
	}
	return tp_wire_route(ctx, w, cfg);
}

/* What a backend's node sends in an envelope, which tp_is_envelope has just seen: out of it, if it is for a client that came in here. */
static __noinline int tp_wire_answer(struct xdp_md *ctx, struct tp_work *w, const struct tp_node_config *cfg)
{
	struct tp_addr outer;
	struct tp_ct *ct;
	__u32 diff, len;

	tp_set_v4(&outer, w->envelope.ip.saddr);
	if (tp_parse_inner(ctx, w) || !tp_is_ordinary(ctx, w, TP_ENVELOPE_LEN))
		return XDP_PASS;
	ct = tp_ct_find(w, &w->p.t);
	if (!ct || tp_ct_forward(w, ct) || !(ct->flags & TP_CT_DNAT))
		return XDP_PASS;
	len = tp_len(ctx) - TP_ENVELOPE_LEN;
	if (bpf_map_lookup_elem(&tp_pods, &w->p.t.daddr) || tp_is_for_stack(w, cfg) || !tp_may_send(w, &outer, 0) ||
	    tp_wire_route_to_client(ctx, w, cfg, ct, len - ETH_LEN))
		return XDP_PASS;
	ct = tp_track_answer(w, cfg, ct);
	if (!ct)
		return tp_drop(ctx, w->reason);
	w->nat.daddr = ct->vip;
	diff = tp_wire_address(w, 1, &w->p.t.saddr, &w->nat.daddr);
	diff += (__u16)~w->p.t.sport + ct->vport;
	tp_take_one_hop(w);
	tp_copy_mac(w->h.eth_dst, w->fib.dmac);
	tp_copy_mac(w->h.eth_src, w->fib.smac);
	if (bpf_xdp_adjust_head(ctx, TP_ENVELOPE_LEN) || tp_wire_headers(ctx, w, 0) ||
	    tp_wire_transport(ctx, w, 0, 0, ct->vport, diff))
		return tp_drop(ctx, TP_DROP_INTERNAL);
	tp_count(TP_HOST_OUT, len);
	tp_count(TP_ACCELERATED, len);
	tp_note(3, ctx->ingress_ifindex, TP_HOST_OUT);
	return XDP_TX;
}

SEC("xdp.frags")
int tp_from_wire(struct xdp_md *ctx)
{
	const struct tp_node_config *cfg = tp_config();
	struct tp_work *w = tp_work();
	__u32 ifindex = ctx->ingress_ifindex;
	struct tp_wire *wire = bpf_map_lookup_elem(&tp_wires, &ifindex);

	if (!cfg || !w || !wire || !tp_is_to(ctx, wire))
		return XDP_PASS;
	/* At any other device the tunnel device is there for what the kernel lets in. */
	if (ifindex == cfg->uplink_ifindex && tp_is_envelope(ctx, w, cfg))
		return tp_wire_answer(ctx, w, cfg);
	return tp_wire_ask(ctx, w, cfg);
}
