/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* tcx ingress of the uplink: what comes from outside, encapsulated packets and the node's own traffic among it. */

/* The backend is a pod here or behind another node; anything else needs a source address that we do not give it yet. */
static __always_inline int tp_serve(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	struct tp_pod *to = bpf_map_lookup_elem(&tp_pods, &w->lb.backend.addr);
	struct tp_ct *ct;

	if (!to) {
		struct tp_peer *peer;

		tp_full_prefix(&w->cidr, &w->lb.backend.addr);
		peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
		if (!peer || (peer->flags & (TP_PEER_NODE | TP_PEER_LOCAL)))
			return tp_refuse(skb, w, 0);
		w->via = peer->tunnel;
		w->has_via = 1;
	}
	ct = tp_track(w, cfg, tp_ct_find(w, &w->p.t));
	if (w->reason || !ct)
		return tp_drop(skb, w->reason ? w->reason : TP_DROP_CT_FULL);
	if (tp_rewrite(skb, w, 0, &w->lb.backend.addr, w->lb.backend.port))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_SERVICE_TRANSLATED, skb->len);
	if (tp_wants_stack(w))
		return tp_to_stack(skb);
	return to ? tp_deliver_to(skb, w, to) : tp_encapsulate(skb, w, cfg, &w->via);
}

SEC("tc")
int tp_from_uplink(struct __sk_buff *skb)
{
	const struct tp_node_config *cfg = tp_config();
	struct tp_work *w = tp_work();
	struct tp_peer *peer;
	__u32 reason;
	int own, choice;

	if (!cfg || !w || skb->pkt_type || skb->vlan_present ||
	    (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6)))
		return TC_ACT_OK;
	reason = tp_parse(skb, w);
	if (reason == TP_DROP_MAPPED_V4)
		return tp_drop(skb, reason);
	/* What cannot be read, or follows a fragment that was not ours, is for the kernel to judge. */
	if (reason && reason != TP_DROP_FRAGMENT)
		return TC_ACT_OK;
	tp_full_prefix(&w->cidr, &w->p.t.saddr);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	/* Pods come in the tunnel only, and this node does not come from outside at all. */
	if (tp_is_own_node(cfg, &w->p.t.saddr) || (peer && (peer->flags & (TP_PEER_NODE | TP_PEER_LOCAL)) != TP_PEER_NODE))
		return tp_drop(skb, TP_DROP_SPOOFED_NODE);
	if (reason)
		return TC_ACT_OK;
	own = tp_is_own_node(cfg, &w->p.t.daddr);
	if (w->p.t.proto == IPPROTO_UDP && w->p.t.dport == cfg->tunnel_port && own)
		return peer ? TC_ACT_OK : tp_drop(skb, TP_DROP_TUNNEL_OUTSIDER);
	if (!tp_has_ports(w->p.t.proto)) {
		if ((w->p.flags & TP_PKT_OPENS) && !own && tp_is_service_address(w))
			return tp_drop(skb, TP_DROP_SERVICE_ICMP);
		return TC_ACT_OK;
	}
	w->sent = w->p.t;
	choice = tp_translate(w, cfg, own);
	if (w->reason)
		return tp_drop(skb, w->reason);
	if (choice == TP_CHOICE_NONE)
		return TC_ACT_OK;
	return choice == TP_CHOICE_REFUSE ? tp_refuse(skb, w, 0) : tp_serve(skb, w, cfg);
}
