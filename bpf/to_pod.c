/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* tcx egress of the host side of a pod's veth: what comes to a pod through the kernel's stack. */

/* Not for a pod's address: the node's own link-local housekeeping passes, nothing else does. */
static __always_inline int tp_no_pod(struct __sk_buff *skb)
{
	return skb->ingress_ifindex ? tp_drop(skb, TP_DROP_NO_POD) : TC_ACT_OK;
}

SEC("tc")
int tp_to_pod(struct __sk_buff *skb)
{
	const struct tp_node_config *cfg = tp_config();
	struct tp_work *w = tp_work();
	struct tp_pod *pod;
	struct tp_ct *ct;
	__u32 reason;

	if (!cfg || !w)
		return TC_ACT_SHOT;
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return tp_no_pod(skb);
	reason = tp_parse(skb, w);
	if (reason && reason != TP_DROP_FRAGMENT)
		return tp_drop(skb, reason);
	pod = bpf_map_lookup_elem(&tp_pods, &w->p.t.daddr);
	if (!pod || pod->ifindex != skb->ifindex)
		return tp_no_pod(skb);
	if (reason)
		return tp_drop(skb, reason);
	if (tp_is_nd(&w->p))
		return tp_no_pod(skb);
	/* Never by source address, which masqueraded traffic carries too: what was received has an ingress device. */
	w->own_node = skb->ingress_ifindex ? TP_OWN_NO : TP_OWN_YES;
	if (w->p.flags & TP_PKT_ERROR) {
		reason = tp_track_error(skb, w, cfg);
		if (reason)
			return tp_drop(skb, reason);
		return tp_restore_quoted(skb, w) ? tp_drop(skb, TP_DROP_INTERNAL) : TC_ACT_OK;
	}
	ct = tp_track(w, cfg, tp_ct_find(w, &w->p.t));
	if (w->reason)
		return tp_drop(skb, w->reason);
	if (ct && w->reply && (ct->flags & TP_CT_DNAT)) {
		w->nat.daddr = ct->vip;
		if (tp_rewrite(skb, w, 1, &w->nat.daddr, ct->vport))
			return tp_drop(skb, TP_DROP_INTERNAL);
	}
	return TC_ACT_OK;
}
