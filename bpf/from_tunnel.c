/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* tcx ingress of the collect-metadata VXLAN device, and of the device of udp: what other nodes send here. */

static __always_inline int tp_is_by_udp(const struct __sk_buff *skb, const struct tp_node_config *cfg)
{
	return cfg->udp_ifindex && skb->ifindex == cfg->udp_ifindex;
}

/* The node that sent the encapsulated packet, which tp_parse has just read; zero with another network's identifier or without tunnel metadata. */
static __always_inline void tp_outer_source(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg,
					    struct tp_addr *outer)
{
	struct bpf_tunnel_key *key = &w->tunnel;

	__builtin_memset(outer, 0, sizeof(*outer));
	if (tp_is_by_udp(skb, cfg)) {
		tp_udp_node(w->h.eth_src, outer);
		return;
	}
	if (tp_testing) {
		__u32 zero = 0;
		struct tp_trace *trace = bpf_map_lookup_elem(&tp_trace, &zero);

		if (trace && !tp_is_zero(&trace->tunnel_source)) {
			*outer = trace->tunnel_source;
			return;
		}
	}
	if (!bpf_skb_get_tunnel_key(skb, key, sizeof(*key), 0)) {
		if (key->tunnel_id == cfg->tunnel_id)
			tp_set_v4(outer, bpf_htonl(key->remote_ipv4));
	} else if (!bpf_skb_get_tunnel_key(skb, key, sizeof(*key), BPF_F_TUNINFO_IPV6)) {
		if (key->tunnel_id == cfg->tunnel_id)
			tp_set_v6(outer, key->remote_ipv6);
	}
}

/* A backend complains to the client that came in here. */
static __always_inline int tp_tunnel_error_to_other(struct __sk_buff *skb, struct tp_work *w,
						    const struct tp_node_config *cfg)
{
	__u32 reason = tp_track_error(skb, w, cfg);

	if (reason || !w->restore)
		return tp_drop(skb, reason ? reason : TP_DROP_NO_POD);
	if (tp_restore_quoted(skb, w))
		return tp_drop(skb, TP_DROP_INTERNAL);
	return tp_route_out(skb, w, cfg);
}

/* For none of our pods: our own address, or the answer to a client that came in here. */
static __always_inline int tp_tunnel_to_other(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg,
					      struct tp_ct *ct)
{
	__u32 reason;

	if (tp_is_for_stack(w, cfg)) {
		if (w->p.flags & TP_PKT_FIRST_FRAG)
			tp_frag_record(w, &w->p.t);
		return tp_to_stack(skb);
	}
	if (w->p.flags & TP_PKT_ERROR)
		return tp_tunnel_error_to_other(skb, w, cfg);
	ct = tp_track_answer(w, cfg, ct);
	if (!ct)
		return tp_drop(skb, w->reason);
	w->nat.daddr = ct->vip;
	reason = tp_rewrite(skb, w, 1, &w->nat.daddr, ct->vport);
	if (reason)
		return tp_drop(skb, reason);
	return tp_wants_stack(w) ? tp_to_stack(skb) : tp_route_out(skb, w, cfg);
}

/*
 * A flow of a pod here with this very node, under the present revision: its ends were checked when it was entered. Leaves in w->by how that node
 * is answered, as tp_may_send does.
 */
static __always_inline int tp_known_in_tunnel(struct tp_work *w, struct tp_ct *ct, const struct tp_addr *outer)
{
	__u32 flags = ct ? ct->flags : 0;

	w->by = tp_by_of_ct(flags);
	return ct && (flags & TP_CT_VIA_TUNNEL) && !(w->p.flags & TP_PKT_ERROR) && tp_same(&ct->via, outer) &&
	       !tp_is_zero(outer) && tp_ct_target(w, ct)->ifindex && !tp_ct_stale(ct, tp_revision_now());
}

/*
 * To a pod here, from a node that may send it: `ct` is what tp_ct_find just found, w->via the node, w->by how it is answered, `enveloped` whether
 * it came in the tunnel. Judged, translated back, delivered.
 */
TP_APART int tp_node_to_pod(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg, struct tp_ct *ct,
			    __u32 enveloped)
{
	struct tp_pod *to;
	__u32 reason;
	int direct = 0;

	if (!w || !cfg)
		return TC_ACT_SHOT;
	if (enveloped) {
		direct = tp_answers_directly(w, cfg, ct);
		if (direct < 0)
			return tp_drop(skb, TP_DROP_NO_BACKEND);
	}
	w->has_via = !direct;
	ct = tp_track(w, cfg, ct);
	if (w->reason)
		return tp_drop(skb, w->reason);
	if (w->translated)
		tp_count(TP_DIRECT_RETURN, skb->len);
	if (ct && w->reply && (ct->flags & TP_CT_DNAT)) {
		w->nat.daddr = ct->vip;
		reason = tp_rewrite(skb, w, 1, &w->nat.daddr, ct->vport);
		if (reason)
			return tp_drop(skb, reason);
	}
	if (tp_wants_stack(w))
		return tp_to_stack(skb);
	if (ct && tp_ct_target(w, ct)->ifindex)
		return tp_deliver(skb, w, tp_ct_target(w, ct));
	to = bpf_map_lookup_elem(&tp_pods, &w->p.t.daddr);
	return to ? tp_deliver_to(skb, w, to) : tp_drop(skb, TP_DROP_NO_POD);
}

/* What a pod asked of the outside by another way is not answered through the tunnel. */
static __always_inline int tp_asked_elsewhere(const struct tp_work *w, const struct tp_ct *ct)
{
	return ct && !tp_ct_forward(w, ct) && !(ct->flags & TP_CT_VIA_TUNNEL);
}

/*
 * A later fragment that comes before the first, and from then on all of that datagram: the kernel puts them together where it routes (it does so
 * for its connection tracking, which masquerading needs), and cuts them again in order, for the pod's own device to judge. Ports are not
 * known here, so who sends is judged by the addresses; a client from outside would need more than that.
 */
static __always_inline int tp_fragments_to_stack(struct __sk_buff *skb, struct tp_work *w, struct tp_addr *outer)
{
	if (tp_is_zero(outer) || !bpf_map_lookup_elem(&tp_pods, &w->p.t.daddr) || !tp_may_send(w, outer, 0))
		return tp_drop(skb, TP_DROP_FRAGMENT);
	tp_frag_leave(w);
	return tp_to_stack(skb);
}

SEC("tc")
int tp_from_tunnel(struct __sk_buff *skb)
{
	const struct tp_node_config *cfg = tp_config();
	struct tp_work *w = tp_work();
	struct tp_addr outer;
	struct tp_pod *to;
	struct tp_ct *ct;
	__u32 reason;

	if (!cfg || !w)
		return TC_ACT_SHOT;
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6)) {
		tp_nothing_read(w);
		return tp_drop(skb, TP_DROP_ARP_ND);
	}
	reason = tp_parse(skb, w);
	if (reason && reason != TP_DROP_FRAGMENT)
		return tp_drop(skb, reason);
	tp_outer_source(skb, w, cfg, &outer);
	/* A sender may know this node by the MAC of a device that was here before. */
	if (skb->pkt_type == PACKET_OTHERHOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	if (reason || tp_is_out_of_order(w))
		return tp_fragments_to_stack(skb, w, &outer);
	ct = tp_ct_find(w, &w->p.t);
	if (!tp_known_in_tunnel(w, ct, &outer)) {
		to = bpf_map_lookup_elem(&tp_pods, &w->p.t.daddr);
		if (tp_is_zero(&outer) || !tp_may_send(w, &outer, to && !tp_asked_elsewhere(w, ct)))
			return tp_drop(skb, TP_DROP_TUNNEL_SOURCE);
		if (!to)
			return tp_tunnel_to_other(skb, w, cfg, ct);
		if (w->p.flags & TP_PKT_ERROR) {
			reason = tp_track_error(skb, w, cfg);
			if (reason)
				return tp_drop(skb, reason);
			if (tp_restore_quoted(skb, w))
				return tp_drop(skb, TP_DROP_INTERNAL);
			return tp_wants_stack(w) ? tp_to_stack(skb) : tp_deliver_to(skb, w, to);
		}
	}
	w->via = outer;
	return tp_node_to_pod(skb, w, cfg, ct, !tp_is_by_udp(skb, cfg));
}
