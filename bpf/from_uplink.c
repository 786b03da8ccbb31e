/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* tcx ingress of the uplink and of every other device that leads out: what comes from outside, encapsulated packets and the
 * node's own traffic among it. */

/* The UAPI headers of before 6.3 do not have them; where the kernel does not, packets of pods of another family than the nodes' come by the tunnel device. */
#define ADJ_ROOM_DECAP_L3_IPV4 (1ULL << 7)
#define ADJ_ROOM_DECAP_L3_IPV6 (1ULL << 8)

/* The backend is a pod here or behind another node; for anything else see far.h. */
static __always_inline int tp_serve(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	struct tp_pod *to = bpf_map_lookup_elem(&tp_pods, &w->lb.backend.addr);
	struct tp_ct *ct;
	__u32 reason;

	if (!to && tp_backend_node(w))
		return tp_far_serve(skb, w, cfg);
	if (tp_aimed_clashes(w, &ct))
		return tp_refuse_clash(skb, w, 0);
	if (w->has_via && tp_is_too_big(skb, w, cfg)) {
		if (tp_make_too_big(skb, w, cfg))
			return tp_drop(skb, TP_DROP_INTERNAL);
		tp_count(TP_REFUSED, skb->len);
		tp_tell(TP_REFUSED, skb->ifindex, skb->len, 0);
		tp_note(2, skb->ifindex, TP_REFUSED);
		return bpf_redirect(skb->ifindex, 0);
	}
	tp_track_aimed(w, cfg, ct);
	if (w->reason)
		return tp_drop(skb, w->reason);
	reason = tp_rewrite(skb, w, 0, &w->lb.backend.addr, w->lb.backend.port);
	if (reason)
		return tp_drop(skb, reason);
	tp_count(TP_SERVICE_TRANSLATED, skb->len);
	if (tp_wants_stack(w))
		return tp_to_stack(skb);
	return to ? tp_deliver_to(skb, w, to) : tp_encapsulate(skb, w, cfg, &w->via);
}

/*
 * Somebody on the way complains of an answer: too big for the path, say. It was sent to the Service's address and is for the endpoint, which
 * knows nothing of that. Who is not a client of ours is the stack's to hear.
 */
static __noinline int tp_error_from_outside(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	struct tp_pod *to;
	__u32 reason;

	if (tp_wants_stack(w) || tp_parse_quoted(skb, w) || !tp_has_ports(w->quoted.proto) || !tp_same(&w->quoted.saddr, &w->p.t.daddr))
		return TC_ACT_OK;
	tp_turn(&w->sent, &w->quoted);
	if (tp_snat_answered(w, &w->sent, 0))
		return tp_far_error_to_client(skb, w, cfg);
	if (tp_snat_known(w))
		return tp_far_error_to_backend(skb, w, cfg);
	/* What the cluster says within itself nobody outside has seen. */
	tp_full_prefix(&w->cidr, &w->sent.saddr);
	if (bpf_map_lookup_elem(&tp_peers, &w->cidr) || !tp_nat_known(w))
		return TC_ACT_OK;
	reason = tp_aim_quoted(skb, w);
	if (reason)
		return tp_drop(skb, reason);
	w->p.t.daddr = w->lb.backend.addr;
	reason = tp_track_error(skb, w, cfg);
	if (reason)
		return tp_drop(skb, reason);
	to = bpf_map_lookup_elem(&tp_pods, &w->p.t.daddr);
	if (to)
		return tp_deliver_to(skb, w, to);
	return w->has_via ? tp_encapsulate(skb, w, cfg, &w->via) : tp_drop(skb, TP_DROP_NO_POD);
}

/*
 * An envelope's packet for a pod here is taken out at once and never sees the UDP stack and the tunnel device. -1, and nothing
 * changed: it is for somebody else, or for nobody, or needs the kernel. Then it goes on to the tunnel device, whose hook
 * decides by the same rules and counts what it drops.
 */
static __noinline int tp_unwrap(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	struct tp_addr outer;
	struct tp_ct *ct;

	tp_set_v4(&outer, w->envelope.ip.saddr);
	if (tp_parse_inner(skb, w) || (w->p.flags & TP_PKT_ERROR) || tp_wants_stack(w) || tp_is_out_of_order(w))
		return -1;
	ct = tp_ct_find(w, &w->p.t);
	if (!tp_known_in_tunnel(w, ct, &outer) &&
	    (!bpf_map_lookup_elem(&tp_pods, &w->p.t.daddr) || !tp_may_send(w, &outer, !tp_asked_elsewhere(w, ct))))
		return -1;
	if (bpf_skb_adjust_room(skb, -TP_ENVELOPE_LEN, BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | (w->p.flags & TP_PKT_V6 ? ADJ_ROOM_DECAP_L3_IPV6 : 0)))
		return -1;
	w->via = outer;
	return tp_node_to_pod(skb, w, cfg, ct, 1);
}

/*
 * What a pod here is sent in an IP header alone, taken out of it. -1, and nothing changed: it is for no pod here, or nothing that a node of this network
 * would send so, and the kernel's, where another network may know of it. `header`: its length, as tp_is_ipip says.
 */
static __noinline int tp_unwrap_ipip(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg, __u32 header)
{
	int over_v6 = header == sizeof(struct ipv6hdr);
	struct tp_addr outer = w->outer.from;
	struct tp_ct *ct;
	__u64 family = 0;

	if (over_v6 ? tp_parse_in_ipip6(skb, w) : tp_parse_in_ipip(skb, w))
		return -1;
	if ((w->p.flags & (TP_PKT_ERROR | TP_PKT_FIRST_FRAG | TP_PKT_LATER_FRAG)) || tp_wants_stack(w))
		return -1;
	ct = tp_ct_find(w, &w->p.t);
	if (!tp_known_in_tunnel(w, ct, &outer)) {
		if (!bpf_map_lookup_elem(&tp_pods, &w->p.t.daddr))
			return -1;
		if (!tp_may_send(w, &outer, 0))
			return tp_drop(skb, TP_DROP_TUNNEL_OUTSIDER);
	}
	/* Asked for only where the packet becomes one of the other family. */
	if (over_v6 != !!(w->p.flags & TP_PKT_V6))
		family = over_v6 ? ADJ_ROOM_DECAP_L3_IPV4 : ADJ_ROOM_DECAP_L3_IPV6;
	if (bpf_skb_adjust_room(skb, over_v6 ? -(int)sizeof(struct ipv6hdr) : -(int)sizeof(struct iphdr), BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | family))
		return tp_drop(skb, TP_DROP_INTERNAL);
	if (w->outer.ecn == ECN_CE) {
		__u8 by = w->by;

		/* Congestion that was met on the way, for an end that knows nothing of it, is told by the loss (RFC 6040 4.2). */
		if (bpf_skb_ecn_set_ce(skb) <= 0 || tp_parse(skb, w))
			return tp_drop(skb, TP_DROP_CONGESTED);
		w->by = by;
		ct = tp_ct_find(w, &w->p.t);
	}
	/* The link header is still that of the packet around it. */
	w->h.eth_type = w->outer.eth_type;
	w->via = outer;
	return tp_node_to_pod(skb, w, cfg, ct, 0);
}

/*
 * What another node's pod sends to one here without an envelope; `peer` is that node, which sends so by this device. -1, and nothing changed: it is
 * for somebody else, or needs the kernel, which leads it to the pod's own device.
 */
static __noinline int tp_plain_to_pod(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg, const struct tp_peer *peer)
{
	if ((w->p.flags & TP_PKT_ERROR) || tp_wants_stack(w) || tp_is_out_of_order(w) || !bpf_map_lookup_elem(&tp_pods, &w->p.t.daddr))
		return -1;
	w->via = peer->tunnel;
	w->by = tp_by_of_pods(peer);
	return tp_node_to_pod(skb, w, cfg, tp_ct_find(w, &w->p.t), 0);
}

/* Whether the packet is for this node: for the address of its object, or for another that it has on a device that leads out. */
static __always_inline int tp_is_for_node(struct tp_work *w, const struct tp_node_config *cfg)
{
	struct tp_peer *peer;

	if (tp_is_own_node(cfg, &w->p.t.daddr))
		return 1;
	tp_full_prefix(&w->cidr, &w->p.t.daddr);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	return peer && (peer->flags & TP_PEER_NODE) && (peer->flags & TP_PEER_LOCAL);
}

SEC("tc")
int tp_from_uplink(struct __sk_buff *skb)
{
	const struct tp_node_config *cfg = tp_config();
	struct tp_work *w = tp_work();
	struct tp_peer *peer;
	__u32 reason, header;
	int own, choice, done, grouped, tagged = tp_untag(skb);

	if (!cfg || !w || tagged > 0)
		return TC_ACT_OK;
	if (tagged < 0) {
		tp_nothing_read(w);
		return tp_drop(skb, TP_DROP_MALFORMED);
	}
	if (tp_is_on_link(skb, cfg)) {
		done = tp_on_link(skb, w);
		if (done >= 0)
			return done;
	}
	/* To a MAC of all or many, which IP takes as well: nothing to translate or to unwrap, but nobody else's source, and no loopback. */
	grouped = skb->pkt_type == PACKET_BROADCAST || skb->pkt_type == PACKET_MULTICAST;
	if ((skb->pkt_type && !grouped) || (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6)))
		return TC_ACT_OK;
	/* At any other device the kernel may know better (rp_filter), and its tunnel device is there for what it lets in. */
	if (!grouped && skb->ifindex == cfg->uplink_ifindex && tp_is_envelope(skb, w, cfg)) {
		done = tp_unwrap(skb, w, cfg);
		if (done >= 0)
			return done;
	} else if (!grouped && skb->ifindex == cfg->uplink_ifindex) {
		header = tp_is_ipip(skb, w, cfg);
		done = header ? tp_unwrap_ipip(skb, w, cfg, header) : -1;
		if (done >= 0)
			return done;
	}
	reason = tp_parse(skb, w);
	if (reason == TP_DROP_MAPPED_V4)
		return tp_drop(skb, reason);
	/* Also of what cannot be read any further. */
	if (tp_names_loopback(&w->p.t))
		return tp_drop(skb, TP_DROP_LOOPBACK);
	tp_full_prefix(&w->cidr, &w->p.t.saddr);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	if (tp_is_inside_source(w, cfg, peer, skb->ifindex))
		return tp_drop(skb, TP_DROP_SPOOFED_NODE);
	/* The kernel judges what cannot be read. */
	if (reason && reason != TP_DROP_FRAGMENT)
		return TC_ACT_OK;
	/* Its first fragment is not here yet, or went to the stack. What is for a Service's address can only be lost: there it is for nobody. */
	if (reason)
		return tp_is_service_address(w, 0) ? tp_drop(skb, reason) : TC_ACT_OK;
	if (w->p.t.proto == IPPROTO_UDP && tp_is_tunnel_port(cfg, w->p.t.dport) && tp_is_for_node(w, cfg))
		return peer ? TC_ACT_OK : tp_drop(skb, TP_DROP_TUNNEL_OUTSIDER);
	if (grouped)
		return TC_ACT_OK;
	/* Of a node that may send so: see tp_is_inside_source. */
	if (peer && !(peer->flags & (TP_PEER_NODE | TP_PEER_LOCAL))) {
		done = tp_plain_to_pod(skb, w, cfg, peer);
		if (done >= 0)
			return done;
	}
	own = tp_is_own_node(cfg, &w->p.t.daddr);
	if (w->p.flags & TP_PKT_ERROR)
		return tp_error_from_outside(skb, w, cfg);
	if (!tp_has_ports(w->p.t.proto)) {
		if ((w->p.flags & TP_PKT_OPENS) && !own && tp_is_service_address(w, 0))
			return tp_drop(skb, TP_DROP_SERVICE_ICMP);
		return TC_ACT_OK;
	}
	w->sent = w->p.t;
	if (tp_snat_has_port(w->sent.dport) && tp_snat_answered(w, &w->sent, w->p.flags & TP_PKT_OPENS))
		return tp_far_answer(skb, w, cfg);
	choice = tp_translate(w, cfg, TP_NODEPORT_OUTSIDE);
	if (w->reason)
		return tp_drop(skb, w->reason);
	if (choice == TP_CHOICE_NONE)
		return TC_ACT_OK;
	if (choice == TP_CHOICE_FAR)
		return tp_far_ask(skb, w, cfg);
	return choice == TP_CHOICE_REFUSE ? tp_refuse(skb, w, 0) : tp_serve(skb, w, cfg);
}
