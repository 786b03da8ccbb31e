/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The ways a packet leaves a hook other than by the kernel's stack. */
#ifndef TOWPATH_ENCAP_H
#define TOWPATH_ENCAP_H

#define EINVAL 22

/*
 * skb->mark of what was judged and is to wait at a pod's device. tp_to_pod, which sees it next, lets it pass as it is. Who can write it there is who can
 * reach every pod of the node anyway: the kernel takes marks off what leaves a pod's namespace, and what the node's own processes send has no ingress
 * device, without which it counts for nothing.
 */
#define TP_MARK_DELIVERED 0x7470d311

/*
 * Puts a packet into the queue of a pod's device, of which tp_to_pod lets it pass. What waits there counts against the buffer of the socket that sent it, in
 * whatever namespace of this node that is: a TCP connection then waits for its own other end, but a socket of UDP serves many. A pod that takes little
 * would have a DNS server wait for it, and with it everybody. So of the others a copy waits, which is nobody's.
 */
static __always_inline int tp_let_wait(struct __sk_buff *skb, const struct tp_work *w, __u32 ifindex)
{
	if (w->p.t.proto == IPPROTO_TCP)
		return bpf_redirect(ifindex, 0);
	bpf_clone_redirect(skb, ifindex, 0);
	/* To no device: gone, and to its sender it was sent. */
	return bpf_redirect(0, 0);
}

/*
 * Straight into a pod's namespace; or, where what is for the pod waits for its turn (TP_HOST_MAC_WAITS), to the queue of its device, past which
 * bpf_redirect_peer goes.
 */
TP_APART int tp_deliver(struct __sk_buff *skb, struct tp_work *w, const struct tp_ct_end *pod)
{
	__u32 ifindex;
	int waits;

	if (!w || !pod)
		return TC_ACT_SHOT;
	ifindex = pod->ifindex;
	waits = pod->host_mac[0] & TP_HOST_MAC_WAITS;
	tp_copy_mac(w->h.eth_dst, pod->mac);
	tp_copy_mac(w->h.eth_src, pod->host_mac);
	w->h.eth_src[0] &= ~TP_HOST_MAC_WAITS;
	if (tp_forward_headers(skb, w))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_LOCAL_DELIVERY, skb->len);
	if (waits) {
		skb->mark = TP_MARK_DELIVERED;
		tp_note(2, ifindex, TP_LOCAL_DELIVERY);
		return tp_let_wait(skb, w, ifindex);
	}
	tp_note(1, ifindex, TP_LOCAL_DELIVERY);
	return bpf_redirect_peer(ifindex, 0);
}

static __always_inline int tp_deliver_to(struct __sk_buff *skb, struct tp_work *w, const struct tp_pod *pod)
{
	tp_end_of(&w->j.to, pod);
	return tp_deliver(skb, w, &w->j.to);
}

/* Length in bytes, as the tunnel device would count it, of the largest packet that this one becomes. */
static __always_inline __u32 tp_wire_len(struct __sk_buff *skb, const struct tp_work *w)
{
	__u32 header = w->p.l4_off - ETH_LEN;

	if (!skb->gso_size)
		return skb->len - ETH_LEN;
	if (w->p.t.proto == IPPROTO_TCP)
		return header + (w->l4.offset >> 4) * 4 + skb->gso_size;
	return header + 8 + skb->gso_size;
}

static __always_inline int tp_set_tunnel(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg,
					 const struct tp_addr *to)
{
	struct bpf_tunnel_key *key = &w->tunnel;

	__builtin_memset(key, 0, sizeof(*key));
	key->tunnel_id = cfg->tunnel_id;
	key->tunnel_ttl = TUNNEL_TTL;
	if (tp_is_v4(to)) {
		key->remote_ipv4 = bpf_ntohl(tp_word(to, 3));
		key->local_ipv4 = bpf_ntohl(tp_word(&cfg->node4, 3));
		return bpf_skb_set_tunnel_key(skb, key, sizeof(*key), BPF_F_ZERO_CSUM_TX);
	}
	for (int i = 0; i < 4; i++) {
		key->remote_ipv6[i] = tp_word(to, i);
		key->local_ipv6[i] = tp_word(&cfg->node6, i);
	}
	return bpf_skb_set_tunnel_key(skb, key, sizeof(*key), BPF_F_TUNINFO_IPV6);
}

/* Where the kernel's routes lead for w->fib: leaves w->hop. Not 0: nowhere that this packet could go at once. */
static __always_inline int tp_next_hop(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	struct bpf_fib_lookup *fib = &w->fib;
	struct bpf_redir_neigh *hop = &w->hop;

	/* Rules cost more than the look-up itself. */
	__u32 flags = cfg->flags & TP_NODE_PLAIN_ROUTING ? BPF_FIB_LOOKUP_DIRECT : 0;
	long found;

	fib->ifindex = skb->ifindex;
	found = bpf_fib_lookup(skb, fib, sizeof(*fib), flags | BPF_FIB_LOOKUP_SKIP_NEIGH);
	/* Linux before 6.3 refuses the flag before it looks at anything; without it the route is found, its neighbour perhaps not. */
	if (found == -EINVAL)
		found = bpf_fib_lookup(skb, fib, sizeof(*fib), flags);
	if (found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH)
		return -1;
	/* A next hop may be of the other family (RFC 5549). */
	__builtin_memset(hop, 0, sizeof(*hop));
	hop->nh_family = fib->family;
	if (fib->family == FAMILY_V6)
		__builtin_memcpy(hop->ipv6_nh, fib->ipv6_dst, 16);
	else
		hop->ipv4_nh = fib->ipv4_dst;
	return 0;
}

/* The next hop towards another node's tunnel address; NULL: the kernel knows none. */
static __always_inline struct tp_hop *tp_hop_to(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg,
						const struct tp_addr *tunnel, __u32 len)
{
	__be32 to = tp_word(tunnel, 3);
	__u32 slot = (bpf_ntohl(to) ^ bpf_ntohl(to) >> 8) % HOPS;
	struct tp_hop *hop = bpf_map_lookup_elem(&tp_hops, &slot);
	__u64 now = tp_now();
	struct bpf_fib_lookup *fib = &w->fib;

	if (!hop || (hop->to == to && hop->until > now))
		return hop;
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->family = FAMILY_V4;
	fib->l4_protocol = IPPROTO_UDP;
	fib->tot_len = len;
	fib->ipv4_src = tp_word(&cfg->node4, 3);
	fib->ipv4_dst = to;
	if (tp_next_hop(skb, w, cfg))
		return NULL;
	hop->until = now + HOP_LIFE;
	hop->to = to;
	hop->ifindex = fib->ifindex;
	hop->mtu = fib->mtu_result;
	hop->next = w->hop;
	tp_inner_mac(w, tunnel, hop->mac);
	return hop;
}

/*
 * Puts the packet into a VXLAN envelope and sends it to the next hop, without the tunnel device and its way through the IP
 * stack. -1, and nothing changed: an IPv6 underlay (whose UDP checksum is not optional), no route, too small a path, or a
 * kind of packet that bpf_skb_adjust_room refuses. `len`: of the largest inner packet, in bytes.
 */
static __always_inline int tp_envelop(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg,
				      const struct tp_addr *to, __u32 len)
{
	struct tp_hop *hop;

	if (!tp_is_v4(to) || skb->len > 0xffff - TP_ENVELOPE_LEN)
		return -1;
	hop = tp_hop_to(skb, w, cfg, to, len + TP_ENVELOPE_LEN);
	if (!hop || len + TP_ENVELOPE_LEN > hop->mtu)
		return -1;
	tp_copy_mac(w->h.eth_dst, hop->mac);
	if (w->direct)
		tp_ask_direct_return(w);
	tp_write_envelope(w, cfg, tp_word(to, 3), skb->len, bpf_get_hash_recalc(skb));
	if (bpf_skb_adjust_room(skb, TP_ENVELOPE_LEN, BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
				BPF_F_ADJ_ROOM_ENCAP_L2(ETH_LEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH))
		return -1;
	if (bpf_skb_store_bytes(skb, ETH_LEN, &w->envelope, TP_ENVELOPE_LEN + sizeof(w->envelope.inner), BPF_F_RECOMPUTE_CSUM))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_TUNNEL_OUT, skb->len);
	tp_note(3, hop->ifindex, TP_TUNNEL_OUT);
	return bpf_redirect_neigh(hop->ifindex, &hop->next, sizeof(hop->next), 0);
}

/* To the node at `to` by user space, through the device whose frames say between which nodes they go. */
static __noinline int tp_send_udp(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg, const struct tp_addr *to)
{
	__u32 ifindex = cfg->udp_ifindex;

	tp_udp_mac(w->h.eth_dst, to);
	tp_udp_mac(w->h.eth_src, tp_is_v4(to) ? &cfg->node4 : &cfg->node6);
	if (tp_forward_headers(skb, w))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_UDP_OUT, skb->len);
	tp_note(2, ifindex, TP_UDP_OUT);
	return bpf_redirect(ifindex, 0);
}

/* Through the tunnel to another node. What is too big for it goes to the kernel, which says so to the sender. */
TP_APART int tp_encapsulate(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg,
			    const struct tp_addr *to)
{
	__u32 len;
	int sent;

	if (!w || !cfg || !to)
		return TC_ACT_SHOT;
	len = tp_wire_len(skb, w);
	if (cfg->tunnel_mtu && len > cfg->tunnel_mtu) {
		if (w->p.flags & TP_PKT_FIRST_FRAG)
			tp_frag_too_big(w, w->translated ? &w->sent : &w->p.t);
		return tp_to_stack(skb);
	}
	/* Direct return is asked for in what only envelopes have. */
	if (!w->direct && tp_takes_udp(w, cfg, to))
		return tp_send_udp(skb, w, cfg, to);
	tp_copy_mac(w->h.eth_src, cfg->tunnel_mac);
	tp_take_one_hop(w);
	tp_note_tunnel(cfg, to);
	sent = tp_envelop(skb, w, cfg, to, len);
	if (sent >= 0)
		return sent;
	if (cfg->flags & TP_NODE_BORROWED_TUNNEL)
		return tp_to_stack(skb);
	tp_inner_mac(w, to, w->h.eth_dst);
	if (w->direct)
		tp_ask_direct_return(w);
	if (tp_write_headers(skb, w) || tp_set_tunnel(skb, w, cfg, to))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_TUNNEL_OUT, skb->len);
	tp_note(2, cfg->tunnel_ifindex, TP_TUNNEL_OUT);
	return bpf_redirect(cfg->tunnel_ifindex, 0);
}

/* Whether what w->fib found has the node at `to` itself as its next hop. */
static __always_inline int tp_leads_over(struct tp_work *w, const struct tp_addr *to)
{
	struct tp_addr next;
	struct tp_peer *peer;

	if (w->fib.family == FAMILY_V6)
		tp_set_v6(&next, w->fib.ipv6_dst);
	else
		tp_set_v4(&next, w->fib.ipv4_dst);
	tp_full_prefix(&w->cidr, &next);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	return peer && (peer->flags & TP_PEER_NODE) && tp_same(&peer->tunnel, to);
}

/* Where the next hop towards a node has its place in tp_hops6 and tp_node_hops6. */
static __always_inline __u32 tp_hop_slot(const struct tp_addr *to)
{
	__u32 word = bpf_ntohl(tp_word(to, 0) ^ tp_word(to, 1) ^ tp_word(to, 2) ^ tp_word(to, 3));

	return (word ^ word >> 8) % HOPS;
}

/*
 * The next hop of an IPv6 packet to a pod of the node at `to`, which the kernel's routes lead over that node: by another of its addresses than
 * that of its tunnel, where that is IPv4's. NULL: they lead elsewhere (still), into the tunnel or to a router, or have no room for `len` bytes.
 */
static __always_inline struct tp_hop6 *tp_hop_to_pod6(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg,
						      const struct tp_addr *to, __u32 len)
{
	__u32 slot = tp_hop_slot(to);
	struct tp_hop6 *hop = bpf_map_lookup_elem(&tp_hops6, &slot);
	struct bpf_fib_lookup *fib = &w->fib;
	__u64 now = tp_now();

	if (!hop || (hop->until > now && tp_same(&hop->to, to)))
		return hop;
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->family = FAMILY_V6;
	fib->l4_protocol = w->p.t.proto;
	fib->tot_len = len;
	/* As they are by now: a packet that goes on by its translation was parsed before that. */
	__builtin_memcpy(fib->ipv6_src, &w->h.v6.saddr, 16);
	__builtin_memcpy(fib->ipv6_dst, &w->h.v6.daddr, 16);
	if (tp_next_hop(skb, w, cfg) || !tp_leads_over(w, to))
		return NULL;
	hop->until = now + HOP_LIFE;
	hop->to = *to;
	hop->ifindex = fib->ifindex;
	hop->mtu = fib->mtu_result;
	hop->next = w->hop;
	return hop;
}

/* Whether the node at `to` takes envelopes: all do but another network's, which are sent to by the kernel's routes. */
static __always_inline int tp_takes_envelopes(struct tp_work *w, const struct tp_addr *to)
{
	struct tp_peer *peer;

	tp_full_prefix(&w->cidr, to);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	return peer && !(peer->flags & TP_PEER_PLAIN);
}

/*
 * Whether the next hop towards the pods of the node at `to` is that node: then they are on the same link. Of IPv6 the look-up has seen that
 * (tp_leads_over).
 */
static __always_inline int tp_hop_is_node(const struct tp_work *w, const struct bpf_redir_neigh *next, const struct tp_addr *to)
{
	if (w->p.flags & TP_PKT_V6)
		return next->nh_family == FAMILY_V6;
	return next->nh_family == FAMILY_V4 && next->ipv4_nh == tp_word(to, 3);
}

/* To the pod itself, by its MAC on the link. The sender's is put where it leaves (tp_own_mac). */
static __always_inline int tp_send_on_link(struct __sk_buff *skb, struct tp_work *w, __u32 ifindex)
{
	struct tp_addr to;

	/* The packet as it is by now: what goes on by its translation was parsed before that. */
	if (w->p.flags & TP_PKT_V6)
		tp_set_v6(&to, &w->h.v6.daddr);
	else
		tp_set_v4(&to, w->h.v4.daddr);
	tp_link_mac(w->h.eth_dst, &to);
	if (tp_forward_headers(skb, w))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_LINK_OUT, skb->len);
	tp_note(2, ifindex, TP_LINK_OUT);
	return bpf_redirect(ifindex, 0);
}

/*
 * To a pod of another node without an envelope: to the next hop towards the node, or with TP_BY_LINK to the pod itself. Until there is one,
 * in an envelope. What does not fit its path goes by the kernel's routes.
 */
static __noinline int tp_send_plain(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg, const struct tp_addr *to)
{
	__u32 len = tp_wire_len(skb, w), ifindex = 0, mtu = 0;
	struct bpf_redir_neigh *next = NULL;
	struct tp_hop6 *hop6;
	struct tp_hop *hop;

	if (w->p.flags & TP_PKT_V6) {
		hop6 = tp_hop_to_pod6(skb, w, cfg, to, len);
		if (hop6) {
			ifindex = hop6->ifindex;
			mtu = hop6->mtu;
			next = &hop6->next;
		}
	} else if (tp_is_v4(to)) {
		hop = tp_hop_to(skb, w, cfg, to, len);
		if (hop) {
			ifindex = hop->ifindex;
			mtu = hop->mtu;
			next = &hop->next;
		}
	}
	if (!next && tp_takes_envelopes(w, to))
		return tp_encapsulate(skb, w, cfg, to);
	if (!next || len > mtu) {
		if (w->p.flags & TP_PKT_FIRST_FRAG)
			tp_frag_too_big(w, w->translated ? &w->sent : &w->p.t);
		return tp_to_stack(skb);
	}
	if (w->by == TP_BY_LINK && ifindex == cfg->uplink_ifindex && tp_hop_is_node(w, next, to))
		return tp_send_on_link(skb, w, ifindex);
	if (tp_forward_headers(skb, w))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_HOST_OUT, skb->len);
	tp_note(3, ifindex, TP_HOST_OUT);
	return bpf_redirect_neigh(ifindex, next, sizeof(*next), 0);
}

/* Makes w->ipip for this packet to the node at `to`, once there is room for the header. */
static __always_inline void tp_write_ipip(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg, __be32 to)
{
	struct tp_ipip *o = &w->ipip;
	const __u16 *inner = (const __u16 *)&w->h.v4;
	__be16 words[] = { bpf_htons(0x4500 | tp_outer_ecn(w)), bpf_htons(skb->len - ETH_LEN),
			   (__u16)bpf_get_prandom_u32(), bpf_htons(IP_DF),
			   bpf_htons(TUNNEL_TTL << 8 | (w->p.flags & TP_PKT_V6 ? IPPROTO_IPV6 : IPPROTO_IPIP)) };
	__be32 from = tp_word(&cfg->node4, 3);
	__u32 sum = (from & 0xffff) + (from >> 16) + (to & 0xffff) + (to >> 16);

#pragma unroll
	for (int i = 0; i < 5; i++) {
		((__u16 *)o)[1 + i] = words[i];
		sum += words[i];
	}
	o->eth_type = bpf_htons(ETH_P_IP);
	o->ip.check = ~tp_fold(sum);
	o->ip.saddr = from;
	o->ip.daddr = to;
#pragma unroll
	for (int i = 0; i < 6; i++)
		o->inner[i] = inner[i];
}

/* The next hop towards another node's IPv6 tunnel address, for a packet of `len` bytes; NULL: the kernel knows none. */
static __always_inline struct tp_hop6 *tp_hop_to_node6(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg,
						       const struct tp_addr *to, __u32 len)
{
	__u32 slot = tp_hop_slot(to);
	struct tp_hop6 *hop = bpf_map_lookup_elem(&tp_node_hops6, &slot);
	struct bpf_fib_lookup *fib = &w->fib;
	__u64 now = tp_now();

	if (!hop || (hop->until > now && tp_same(&hop->to, to)))
		return hop;
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->family = FAMILY_V6;
	fib->l4_protocol = w->p.flags & TP_PKT_V6 ? IPPROTO_IPV6 : IPPROTO_IPIP;
	fib->tot_len = len;
	__builtin_memcpy(fib->ipv6_src, &cfg->node6, 16);
	__builtin_memcpy(fib->ipv6_dst, to, 16);
	if (tp_next_hop(skb, w, cfg))
		return NULL;
	hop->until = now + HOP_LIFE;
	hop->to = *to;
	hop->ifindex = fib->ifindex;
	hop->mtu = fib->mtu_result;
	hop->next = w->hop;
	return hop;
}

/* Makes w->ipip6 for this packet to the node at `to`, once there is room for the header. `hash`: of its flow. */
static __always_inline void tp_write_ipip6(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg, const struct tp_addr *to,
					   __u32 hash)
{
	struct tp_ipip6 *o = &w->ipip6;
	const __u16 *inner = (const __u16 *)&w->h.v4;

	/* The flow's entropy for whoever spreads by flow labels on the way (RFC 6438), never 0, which stands for none. */
	__be32 first = bpf_htonl(6u << 28 | (__u32)tp_outer_ecn(w) << 20 | (((hash ^ hash >> 12) & 0xfffff) | 1));

	o->eth_type = bpf_htons(ETH_P_IPV6);
	__builtin_memcpy(&o->ip, &first, sizeof(first));
	o->ip.payload_len = bpf_htons(skb->len - ETH_LEN - sizeof(o->ip));
	o->ip.nexthdr = w->p.flags & TP_PKT_V6 ? IPPROTO_IPV6 : IPPROTO_IPIP;
	o->ip.hop_limit = TUNNEL_TTL;
	__builtin_memcpy(&o->ip.saddr, &cfg->node6, 16);
	__builtin_memcpy(&o->ip.daddr, to, 16);
#pragma unroll
	for (int i = 0; i < 6; i++)
		o->inner[i] = inner[i];
}

/* The same as tp_send_ipip between nodes' IPv6 addresses. */
static __noinline int tp_send_ipip6(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg, const struct tp_addr *to, __u32 len)
{
	struct tp_hop6 *hop;
	__u32 hash;

	/* Without an address of its own there is nothing that the other end would believe. */
	if (skb->len > 0xffff || tp_is_zero(&cfg->node6))
		return -1;
	hop = tp_hop_to_node6(skb, w, cfg, to, len + sizeof(w->ipip6.ip));
	if (!hop || len + sizeof(w->ipip6.ip) > hop->mtu)
		return -1;
	hash = bpf_get_hash_recalc(skb);
	if (bpf_skb_adjust_room(skb, sizeof(w->ipip6.ip), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV6))
		return -1;
	tp_take_one_hop(w);
	tp_write_ipip6(skb, w, cfg, to, hash);
	if (bpf_skb_store_bytes(skb, ETH_LEN - sizeof(w->ipip6.eth_type), &w->ipip6, sizeof(w->ipip6), BPF_F_RECOMPUTE_CSUM))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_IPIP_OUT, skb->len);
	tp_note(3, hop->ifindex, TP_IPIP_OUT);
	return bpf_redirect_neigh(hop->ifindex, &hop->next, sizeof(hop->next), 0);
}

/*
 * To a pod of another node with an IP header and nothing else around it. -1, and nothing changed: an envelope is for it, as for all that the
 * other end could not take out by itself (there is no tunnel device that would help it).
 */
static __noinline int tp_send_ipip(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg, const struct tp_addr *to)
{
	__u32 len = tp_wire_len(skb, w);
	struct tp_hop *hop;

	if ((w->p.flags & (TP_PKT_ERROR | TP_PKT_FIRST_FRAG | TP_PKT_LATER_FRAG | TP_PKT_SLOW)) || w->p.ttl <= 2 ||
	    (cfg->tunnel_mtu && len > cfg->tunnel_mtu))
		return -1;
	if (!tp_is_v4(to))
		return tp_send_ipip6(skb, w, cfg, to, len);
	if (skb->len > 0xffff - sizeof(w->ipip.ip))
		return -1;
	hop = tp_hop_to(skb, w, cfg, to, len + sizeof(w->ipip.ip));
	if (!hop || len + sizeof(w->ipip.ip) > hop->mtu)
		return -1;
	if (bpf_skb_adjust_room(skb, sizeof(w->ipip.ip), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4))
		return -1;
	tp_take_one_hop(w);
	tp_write_ipip(skb, w, cfg, tp_word(to, 3));
	if (bpf_skb_store_bytes(skb, ETH_LEN - sizeof(w->ipip.eth_type), &w->ipip, sizeof(w->ipip), BPF_F_RECOMPUTE_CSUM))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_IPIP_OUT, skb->len);
	tp_note(3, hop->ifindex, TP_IPIP_OUT);
	return bpf_redirect_neigh(hop->ifindex, &hop->next, sizeof(hop->next), 0);
}

/* The way of w->via to another node. */
static __always_inline int tp_send_to_node(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	int sent;

	if (w->by == TP_BY_ITSELF || w->by == TP_BY_LINK)
		return tp_send_plain(skb, w, cfg, &w->via);
	if (w->by == TP_BY_IPIP) {
		sent = tp_send_ipip(skb, w, cfg, &w->via);
		if (sent >= 0)
			return sent;
	}
	return tp_encapsulate(skb, w, cfg, &w->via);
}

/*
 * Out by the kernel's routes without its stack: the source is an address of this node (a Service's answer), which the
 * stack would take for a forged one.
 */
static __noinline int tp_route_out(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	struct bpf_fib_lookup *fib = &w->fib;

	__builtin_memset(fib, 0, sizeof(*fib));
	fib->l4_protocol = w->p.t.proto;
	if (w->p.flags & TP_PKT_V6) {
		fib->family = FAMILY_V6;
		__builtin_memcpy(fib->ipv6_src, &w->h.v6.saddr, 16);
		__builtin_memcpy(fib->ipv6_dst, &w->h.v6.daddr, 16);
	} else {
		fib->family = FAMILY_V4;
		fib->ipv4_src = w->h.v4.saddr;
		fib->ipv4_dst = w->h.v4.daddr;
	}
	if (tp_next_hop(skb, w, cfg) || tp_forward_headers(skb, w))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_HOST_OUT, skb->len);
	tp_note(3, fib->ifindex, TP_HOST_OUT);
	return bpf_redirect_neigh(fib->ifindex, &w->hop, sizeof(w->hop), 0);
}

#endif
