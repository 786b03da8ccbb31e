/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * tcx egress of the devices that lead out: what the node's own sockets answer to a client outside that asked a Service, of which one of them
 * is the backend (far.h). It gets the Service's address as its source again, when all else about it is decided. Nothing is dropped here for
 * a reason of ours. And what leaves with a pod's address gets the pod's own MAC, where pods are on the link (link.h).
 */

/* The node complains of what such a client sent: that nobody listens at the port, mostly. */
static __noinline int tp_error_of_node(struct __sk_buff *skb, struct tp_work *w)
{
	if (tp_parse_quoted(skb, w) || !tp_has_ports(w->quoted.proto) || !tp_same(&w->quoted.saddr, &w->p.t.daddr))
		return TC_ACT_OK;
	tp_turn(&w->sent, &w->quoted);
	if (!tp_snat_answered(w, &w->sent, 0))
		return TC_ACT_OK;
	w->restore = 1;
	w->nat.daddr = w->snat.vip;
	w->nat.dport = w->snat.vport;
	return tp_restore_quoted(skb, w) ? tp_drop(skb, TP_DROP_INTERNAL) : TC_ACT_OK;
}

SEC("tc")
int tp_to_uplink(struct __sk_buff *skb)
{
	const struct tp_node_config *cfg = tp_config();
	struct tp_work *w = tp_work();
	__u32 reason;

	if (cfg && tp_is_on_link(skb, cfg) && tp_own_mac(skb))
		return tp_drop(skb, TP_DROP_INTERNAL);
	/* What was received before is another's: pods', mostly. (See tp_generated_here for whom this does not tell.) */
	if (!cfg || !w || skb->ingress_ifindex || skb->vlan_present ||
	    (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6)))
		return TC_ACT_OK;
	if (tp_parse(skb, w))
		return TC_ACT_OK;
	if (w->p.flags & TP_PKT_ERROR)
		return tp_error_of_node(skb, w);
	if (!tp_has_ports(w->p.t.proto) || !tp_snat_answered(w, &w->p.t, w->p.flags & TP_PKT_OPENS))
		return TC_ACT_OK;
	tp_snat_observe(w, 1);
	if (w->p.flags & TP_PKT_FIRST_FRAG)
		tp_frag_record(w, &w->p.t);
	reason = tp_rewrite(skb, w, 1, &w->snat.vip, w->snat.vport);
	return reason ? tp_drop(skb, reason) : TC_ACT_OK;
}
