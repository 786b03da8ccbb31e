/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* tcx egress of the host side of a pod's veth: what comes to a pod through the kernel's stack, and what tp_deliver has wait there. */

/* Not for a pod's address: the node's own link-local housekeeping passes, nothing else does. */
static __always_inline int tp_no_pod(struct __sk_buff *skb)
{
	return skb->ingress_ifindex ? tp_drop(skb, TP_DROP_NO_POD) : TC_ACT_OK;
}

/* What was received with a pod's address and did not come from that pod's device or, if the pod is another node's, in the
 * tunnel: the uplink's hook sees the uplink only, and a node has other devices. */
static __always_inline int tp_is_forged(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	struct tp_peer *peer;
	struct tp_pod *from;

	if (tp_is_hairpin(&w->p.t.saddr))
		return 1;
	if (!skb->ingress_ifindex)
		return 0;
	from = bpf_map_lookup_elem(&tp_pods, &w->p.t.saddr);
	if (from)
		return from->ifindex != skb->ingress_ifindex;
	tp_full_prefix(&w->cidr, &w->p.t.saddr);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	if (!peer || (peer->flags & TP_PEER_NODE) || (peer->ifindex && skb->ingress_ifindex == peer->ifindex))
		return 0;
	if (peer->flags & TP_PEER_LOCAL)
		return 1;
	return skb->ingress_ifindex != cfg->tunnel_ifindex && skb->ingress_ifindex != cfg->tunnel6_ifindex &&
	       skb->ingress_ifindex != cfg->udp_ifindex;
}

/*
 * Whether the node itself generated the packet. Never by source address alone, which masqueraded traffic carries too: what
 * was received has an ingress device. But the fragments that the kernel makes again of a forwarded IPv6 packet have lost it
 * (ip6_copy_metadata, unlike IPv4's): of those also the address must be the node's.
 */
static __always_inline __u8 tp_generated_here(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	if (skb->ingress_ifindex)
		return TP_OWN_NO;
	if ((w->p.flags & TP_PKT_V6) && (w->p.flags & (TP_PKT_FIRST_FRAG | TP_PKT_LATER_FRAG)) &&
	    !tp_is_own_node(cfg, &w->p.t.saddr))
		return TP_OWN_NO;
	return TP_OWN_YES;
}

/* Into the queue of the device, if there is one: what is no connection's of its own as a copy (tp_let_wait), which comes here again. */
static __always_inline int tp_pass_to_pod(struct __sk_buff *skb, struct tp_work *w, __u8 waits)
{
	if (!waits || w->p.t.proto == IPPROTO_TCP)
		return TC_ACT_OK;
	w->passing = 1;
	bpf_clone_redirect(skb, skb->ifindex, 0);
	w->passing = 0;
	return bpf_redirect(0, 0);
}

SEC("tc")
int tp_to_pod(struct __sk_buff *skb)
{
	const struct tp_node_config *cfg = tp_config();
	struct tp_work *w = tp_work();
	struct tp_pod *pod;
	struct tp_ct *ct;
	__u32 reason;
	__u8 waits;

	if (w && w->passing)
		return TC_ACT_OK;
	/* Judged, and counted, where it was handed over. */
	if (skb->mark == TP_MARK_DELIVERED && skb->ingress_ifindex) {
		skb->mark = 0;
		return TC_ACT_OK;
	}
	if (!cfg || !w)
		return TC_ACT_SHOT;
	if (skb->protocol == bpf_htons(ETH_P_ARP)) {
		tp_nothing_read(w);
		return tp_no_pod(skb);
	}
	reason = tp_parse(skb, w);
	if (reason && reason != TP_DROP_FRAGMENT)
		return tp_drop(skb, reason);
	pod = bpf_map_lookup_elem(&tp_pods, &w->p.t.daddr);
	if (!pod || pod->ifindex != skb->ifindex)
		return tp_no_pod(skb);
	waits = pod->host_mac[0] & TP_HOST_MAC_WAITS;
	if (reason)
		return tp_drop(skb, reason);
	if (tp_is_nd(&w->p))
		return tp_no_pod(skb);
	if (tp_is_forged(skb, w, cfg))
		return tp_drop(skb, TP_DROP_SPOOFED_NODE);
	w->own_node = tp_generated_here(skb, w, cfg);
	if (w->p.flags & TP_PKT_ERROR) {
		reason = tp_track_error(skb, w, cfg);
		if (reason)
			return tp_drop(skb, reason);
		return tp_restore_quoted(skb, w) ? tp_drop(skb, TP_DROP_INTERNAL) : tp_pass_to_pod(skb, w, waits);
	}
	ct = tp_track(w, cfg, tp_ct_find(w, &w->p.t));
	if (w->reason)
		return tp_drop(skb, w->reason);
	if (ct && w->reply && (ct->flags & TP_CT_DNAT)) {
		w->nat.daddr = ct->vip;
		reason = tp_rewrite(skb, w, 1, &w->nat.daddr, ct->vport);
		if (reason)
			return tp_drop(skb, reason);
	}
	return tp_pass_to_pod(skb, w, waits);
}
