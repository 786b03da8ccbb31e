/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The ways a packet leaves a hook other than by the kernel's stack. */
#ifndef TOWPATH_ENCAP_H
#define TOWPATH_ENCAP_H

/* Whether forwarding this packet is for the kernel: it will be answered, or its header is an odd one. */
static __always_inline int tp_wants_stack(const struct tp_work *w)
{
	return w->p.ttl <= 1 || (w->p.flags & TP_PKT_SLOW);
}

/* Straight into a pod's namespace. */
static __noinline int tp_deliver(struct __sk_buff *skb, struct tp_work *w, const struct tp_ct_end *pod)
{
	__u32 ifindex = pod->ifindex;

	tp_copy_mac(w->h.eth_dst, pod->mac);
	tp_copy_mac(w->h.eth_src, pod->host_mac);
	if (tp_forward_headers(skb, w))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_LOCAL_DELIVERY, skb->len);
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

/* See abi.h for how a tunnel device's address follows from its node's tunnel address. */
static __always_inline void tp_tunnel_mac(__u8 *mac, const struct tp_addr *tunnel)
{
	__be32 folded = tp_word(tunnel, 0) ^ tp_word(tunnel, 1) ^ tp_word(tunnel, 2) ^ tp_word(tunnel, 3);

	mac[0] = 0x02;
	mac[1] = 0x74;
	__builtin_memcpy(mac + 2, &folded, 4);
}

static __always_inline int tp_set_tunnel(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg,
					 const struct tp_addr *to)
{
	struct bpf_tunnel_key *key = &w->tunnel;

	__builtin_memset(key, 0, sizeof(*key));
	key->tunnel_id = cfg->tunnel_id;
	key->tunnel_ttl = 64;
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

/* Through the tunnel to another node. What is too big for it goes to the kernel, which says so to the sender. */
static __noinline int tp_encapsulate(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg,
				     const struct tp_addr *to)
{
	if (cfg->tunnel_mtu && tp_wire_len(skb, w) > cfg->tunnel_mtu)
		return tp_to_stack(skb);
	tp_tunnel_mac(w->h.eth_dst, to);
	tp_copy_mac(w->h.eth_src, cfg->tunnel_mac);
	if (tp_forward_headers(skb, w) || tp_set_tunnel(skb, w, cfg, to))
		return tp_drop(skb, TP_DROP_INTERNAL);
	if (tp_testing) {
		__u32 zero = 0;
		struct tp_trace *trace = bpf_map_lookup_elem(&tp_trace, &zero);

		if (trace) {
			trace->tunnel_remote = *to;
			trace->tunnel_id = cfg->tunnel_id;
		}
	}
	tp_count(TP_TUNNEL_OUT, skb->len);
	tp_note(2, cfg->tunnel_ifindex, TP_TUNNEL_OUT);
	return bpf_redirect(cfg->tunnel_ifindex, 0);
}

/*
 * Out by the kernel's routes without its stack: the source is an address of this node (a Service's answer), which the
 * stack would take for a forged one.
 */
static __noinline int tp_route_out(struct __sk_buff *skb, struct tp_work *w)
{
	struct bpf_fib_lookup *fib = &w->fib;
	struct bpf_redir_neigh *hop = &w->hop;
	int v6 = w->p.flags & TP_PKT_V6;

	__builtin_memset(fib, 0, sizeof(*fib));
	__builtin_memset(hop, 0, sizeof(*hop));
	fib->family = v6 ? 10 : 2;	/* AF_INET6, AF_INET */
	fib->ifindex = skb->ifindex;
	fib->l4_protocol = w->p.t.proto;
	if (v6) {
		__builtin_memcpy(fib->ipv6_src, &w->h.v6.saddr, 16);
		__builtin_memcpy(fib->ipv6_dst, &w->h.v6.daddr, 16);
	} else {
		fib->ipv4_src = w->h.v4.saddr;
		fib->ipv4_dst = w->h.v4.daddr;
	}
	if (bpf_fib_lookup(skb, fib, sizeof(*fib), BPF_FIB_LOOKUP_SKIP_NEIGH) != BPF_FIB_LKUP_RET_SUCCESS)
		return tp_drop(skb, TP_DROP_INTERNAL);
	/* A next hop may be of the other family (RFC 5549). */
	hop->nh_family = fib->family;
	if (fib->family == 10)
		__builtin_memcpy(hop->ipv6_nh, fib->ipv6_dst, 16);
	else
		hop->ipv4_nh = fib->ipv4_dst;
	if (tp_forward_headers(skb, w))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_HOST_OUT, skb->len);
	tp_note(3, fib->ifindex, TP_HOST_OUT);
	return bpf_redirect_neigh(fib->ifindex, hop, sizeof(*hop), 0);
}

#endif
