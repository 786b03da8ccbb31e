/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* tcx ingress of the host side of a pod's veth: everything that a pod sends. */

struct tp_arp {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_len;
	__u8 protocol_len;
	__be16 operation;
	__u8 sender_mac[6];
	__u8 sender[4];
	__u8 target_mac[6];
	__u8 target[4];
} __attribute__((packed));

/* The pod that owns this address, if it lives behind this device and has this MAC; else why not. */
static __always_inline struct tp_pod *tp_sender(struct __sk_buff *skb, struct tp_work *w, const struct tp_addr *addr)
{
	struct tp_pod *pod = bpf_map_lookup_elem(&tp_pods, addr);

	if (!pod || pod->ifindex != skb->ifindex) {
		w->reason = TP_DROP_SOURCE_ADDRESS;
		return NULL;
	}
	if (!tp_same_mac(pod->mac, w->h.eth_src)) {
		w->reason = TP_DROP_SOURCE_MAC;
		return NULL;
	}
	return pod;
}

/* The same, as this connection's entry knows it under the present revision. */
static __always_inline int tp_known_sender(struct __sk_buff *skb, const struct tp_work *w, struct tp_ct *ct)
{
	struct tp_ct_end *end;

	if (!ct || tp_ct_stale(ct, tp_revision_now()))
		return 0;
	end = tp_ct_source(w, ct);
	return end->ifindex == skb->ifindex && tp_same_mac(end->mac, w->h.eth_src);
}

/* ARP only about the pod's own address and MAC. */
static __noinline int tp_arp_from_pod(struct __sk_buff *skb, struct tp_work *w)
{
	struct tp_arp arp;
	struct tp_addr sender;
	__be32 v4;

	tp_nothing_read(w);
	if (bpf_skb_load_bytes(skb, 0, w->h.eth_dst, ETH_LEN) || bpf_skb_load_bytes(skb, ETH_LEN, &arp, sizeof(arp)))
		return tp_drop(skb, TP_DROP_MALFORMED);
	__builtin_memcpy(&v4, arp.sender, 4);
	tp_set_v4(&sender, v4);
	if (arp.hardware != bpf_htons(1) || arp.protocol != bpf_htons(ETH_P_IP) || arp.hardware_len != 6 ||
	    arp.protocol_len != 4 || !tp_same_mac(arp.sender_mac, w->h.eth_src) || !tp_sender(skb, w, &sender))
		return tp_drop(skb, TP_DROP_ARP_ND);
	return TC_ACT_OK;
}

#define MLD_QUERY 130
#define MLD_DONE 132
#define MLD2_REPORT 143

static __always_inline int tp_is_nd(const struct tp_packet *p)
{
	return p->t.proto == ICMP6 && !(p->flags & TP_PKT_LATER_FRAG) &&
	       ((p->icmp_type >= MLD_QUERY && p->icmp_type <= ND_REDIRECT) || p->icmp_type == MLD2_REPORT);
}

/*
 * Neighbour discovery only with the pod's own source and about itself. The gateway's neighbour entry is permanent, so
 * nothing depends on it; what the kernel of a pod says unasked on its link is ignored, not counted as an attack.
 */
static __noinline int tp_nd_from_pod(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	struct tp_addr target;
	__u8 type = w->p.icmp_type;
	int unasked = tp_is_zero(&w->p.t.saddr) || tp_is_link_local(&w->p.t.saddr);

	if (type == ND_ROUTER_ADVERTISEMENT || type == ND_REDIRECT)
		return tp_drop(skb, TP_DROP_ARP_ND);
	if (type != ND_NEIGHBOUR_ADVERTISEMENT && unasked)
		return tp_drop(skb, TP_IGNORED);
	if (type != ND_NEIGHBOUR_SOLICITATION && type != ND_NEIGHBOUR_ADVERTISEMENT)
		return tp_drop(skb, unasked ? TP_IGNORED : TP_DROP_ARP_ND);
	if (w->p.ttl != 255 || bpf_skb_load_bytes(skb, w->p.l4_off + 8, &target, sizeof(target)))
		return tp_drop(skb, TP_DROP_MALFORMED);
	if (type == ND_NEIGHBOUR_ADVERTISEMENT && tp_is_link_local(&target) && unasked)
		return tp_drop(skb, TP_IGNORED);
	if (!tp_sender(skb, w, &w->p.t.saddr) ||
	    (type == ND_NEIGHBOUR_ADVERTISEMENT && !tp_same(&target, &w->p.t.saddr)))
		return tp_drop(skb, TP_DROP_ARP_ND);
	/* The stack would route what is for somebody beyond the link, and no policy has judged it. */
	if (!tp_is_link_local(&w->p.t.daddr) && !tp_is_link_multicast(&w->p.t.daddr) && !tp_is_own_node(cfg, &w->p.t.daddr))
		return tp_drop(skb, TP_DROP_ARP_ND);
	return TC_ACT_OK;
}

/* Where an allowed and translated packet goes on. */
static __always_inline int tp_route_from_pod(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg,
					     struct tp_ct *ct, int answer_of_service)
{
	if (tp_passes_for_envelope(w, cfg, w->p.t.dport) && tp_leaves_the_pods(w))
		return tp_drop(skb, TP_DROP_OWN_ENVELOPE);
	if (tp_wants_stack(w))
		return tp_to_stack(skb);
	if (ct) {
		struct tp_ct_end *end = tp_ct_target(w, ct);

		if (end->ifindex)
			return tp_deliver(skb, w, end);
		if (ct->flags & TP_CT_VIA_TUNNEL) {
			w->via = ct->via;
			w->by = tp_by_of_ct(ct->flags);
			return tp_send_to_node(skb, w, cfg);
		}
	} else {
		struct tp_pod *to = bpf_map_lookup_elem(&tp_pods, &w->p.t.daddr);

		if (to)
			return tp_deliver_to(skb, w, to);
		w->resolve = 1;
		tp_resolve_via(w);
		if (w->has_via)
			return tp_send_to_node(skb, w, cfg);
	}
	if (answer_of_service)
		return tp_route_out(skb, w, cfg);
	return tp_to_stack(skb);
}

/* What a pod sent to itself by way of a Service, translated. It has not been anywhere, so no hop is taken from its life. */
static __noinline int tp_back_to_sender(struct __sk_buff *skb, struct tp_work *w)
{
	if (tp_swap_macs(skb, w))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_LOCAL_DELIVERY, skb->len);
	tp_note(1, skb->ifindex, TP_LOCAL_DELIVERY);
	return bpf_redirect_peer(skb->ifindex, 0);
}

/* What it answers itself then. To that address nobody begins anything. */
static __noinline int tp_hairpin_answer(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg, struct tp_ct *ct)
{
	__u32 reason;

	if (!ct || tp_ct_restarts(w, ct, tp_now()))
		return tp_drop(skb, TP_DROP_NO_POD);
	ct = tp_track(w, cfg, ct);
	if (w->reason || !ct || !w->reply || !(ct->flags & TP_CT_DNAT))
		return tp_drop(skb, w->reason ? w->reason : TP_DROP_NO_POD);
	w->nat.daddr = ct->vip;
	reason = tp_rewrite(skb, w, 1, &w->nat.daddr, ct->vport);
	if (!reason)
		reason = tp_rewrite(skb, w, 0, &w->p.t.saddr, w->l4.dport);
	return reason ? tp_drop(skb, reason) : tp_back_to_sender(skb, w);
}

/* And what it complains of: the quoted packet was sent by the pod, to the Service. */
static __noinline int tp_hairpin_error(struct __sk_buff *skb, struct tp_work *w)
{
	__u32 ip = w->p.l4_off + 8;
	struct tp_addr *pod = &w->quoted.daddr;
	__be32 to = tp_word(pod, 3);
	__s64 diff;

	if (!w->restore)
		return tp_drop(skb, TP_DROP_NO_POD);
	if (w->p.flags & TP_PKT_V6) {
		diff = bpf_csum_diff((__be32 *)w->quoted.saddr.b, 16, (__be32 *)pod->b, 16, 0);
		if (diff < 0 || bpf_l4_csum_replace(skb, w->p.l4_off + 2, 0, diff, 0) ||
		    bpf_skb_store_bytes(skb, ip + 8, pod->b, 16, 0))
			return tp_drop(skb, TP_DROP_INTERNAL);
	} else if (bpf_l3_csum_replace(skb, ip + 10, tp_word(&w->quoted.saddr, 3), to, 4) ||
		   bpf_skb_store_bytes(skb, ip + 12, &to, 4, 0)) {
		return tp_drop(skb, TP_DROP_INTERNAL);
	}
	if (tp_restore_quoted(skb, w) || tp_rewrite(skb, w, 0, pod, 0))
		return tp_drop(skb, TP_DROP_INTERNAL);
	return tp_back_to_sender(skb, w);
}

static __always_inline int tp_error_from_pod(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	__u32 reason = tp_track_error(skb, w, cfg);

	if (reason)
		return tp_drop(skb, reason);
	/* A pod is no router: it complains of what was sent to it, and of nothing else. */
	if (!tp_same(&w->quoted.daddr, &w->p.t.saddr))
		return tp_drop(skb, TP_DROP_SOURCE_ADDRESS);
	if (tp_is_hairpin(&w->p.t.daddr))
		return tp_hairpin_error(skb, w);
	/* For a client that came in at another node, that node restores what it translated. */
	if (w->has_via && !tp_wants_stack(w) && !bpf_map_lookup_elem(&tp_pods, &w->p.t.daddr))
		return tp_send_to_node(skb, w, cfg);
	if (tp_restore_quoted(skb, w))
		return tp_drop(skb, TP_DROP_INTERNAL);
	return tp_route_from_pod(skb, w, cfg, NULL, w->restore);
}

/*
 * Whether a packet to a Service changes nothing about its connection and is late enough to know all of it from `nat`, the entry of w->sent. Then
 * w->lb, w->j.to and w->via say where it goes. What it knows is at most NAT_FRESH old, far less than the shortest time after which an established
 * connection is deleted: its end is put off by no packet that goes on here. (A translation is deleted with its connection, and the revision is
 * raised when anything else changes.)
 */
static __always_inline int tp_goes_on(struct __sk_buff *skb, struct tp_work *w, const struct tp_nat *nat)
{
	__u64 age = tp_now() - *(volatile const __u64 *)&nat->fresh;

	/* The clock of another CPU may be a tick ahead: then it is old. */
	if (age > NAT_FRESH || nat->revision != tp_revision_now())
		return 0;
	if ((w->p.flags & ~TP_PKT_V6) || w->p.ttl <= 1)
		return 0;
	if (w->p.t.proto == IPPROTO_TCP && (w->p.tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)))
		return 0;
	if (nat->from.ifindex != skb->ifindex || !tp_same_mac(nat->from.mac, w->h.eth_src))
		return 0;
	w->lb.backend.addr = nat->daddr;
	w->lb.backend.port = nat->dport;
	w->j.to = nat->to;
	w->via = nat->via;
	w->by = nat->by;
	/* Last: the kernel may give the memory of a deleted entry to another key at once. */
	barrier();
	return *(volatile const __u64 *)&nat->mark == tp_mark_of(&w->sent) && (w->j.to.ifindex || !tp_is_zero(&w->via));
}

static __always_inline int tp_go_on(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	__u32 reason = tp_rewrite(skb, w, 0, &w->lb.backend.addr, w->lb.backend.port);

	if (reason)
		return tp_drop(skb, reason);
	tp_count(TP_SERVICE_TRANSLATED, skb->len);
	return w->j.to.ifindex ? tp_deliver(skb, w, &w->j.to) : tp_send_to_node(skb, w, cfg);
}

/* Notes in the translation of w->sent that its connection was looked at and is established. */
static __always_inline void tp_nat_refresh(struct tp_work *w, struct tp_nat *nat, const struct tp_ct *ct)
{
	const __u32 wanted = TP_CT_REPLIED | TP_CT_ESTABLISHED, flags = ct->flags;
	__u64 now = tp_now();

	if ((flags & (wanted | TP_CT_FIN_A | TP_CT_FIN_B | TP_CT_RST)) != wanted)
		return;
	/* Written by whoever holds a pointer to it, also to an entry that was deleted since and whose memory is another's: that one's
	 * connection then is looked at a little later than it would have been. */
	if (nat->revision == tp_revision_now() && nat->mark == tp_mark_of(&w->sent)) {
		if (nat->fresh != now)
			*(volatile __u64 *)&nat->fresh = now;
		return;
	}
	tp_nat_fill(w, ct);
	if (!w->nat.revision)
		return;
	w->nat.fresh = now;
	bpf_map_update_elem(&tp_nat, &w->sent, &w->nat, BPF_EXIST);
}

SEC("tc")
int tp_from_pod(struct __sk_buff *skb)
{
	const struct tp_node_config *cfg = tp_config();
	struct tp_work *w = tp_work();
	struct tp_nat *nat = NULL;
	struct tp_ct *ct = NULL;
	__u32 reason;
	int answer = 0, service;

	if (!cfg || !w)
		return TC_ACT_SHOT;
	/* A pod is on no VLAN; the tag would go with the packet wherever this program sends it. */
	if (tp_untag(skb)) {
		tp_nothing_read(w);
		return tp_drop(skb, TP_DROP_MALFORMED);
	}
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return tp_arp_from_pod(skb, w);
	reason = tp_parse(skb, w);
	if (reason && reason != TP_DROP_FRAGMENT)
		return tp_drop(skb, reason);
	if (tp_is_nd(&w->p))
		return tp_nd_from_pod(skb, w, cfg);
	service = !reason && tp_has_ports(w->p.t.proto) && tp_may_be_service(cfg, &w->p.t.daddr, w->p.t.dport);
	if (service) {
		w->sent = w->p.t;
		nat = tp_nat_seek(w);
		if (nat && tp_goes_on(skb, w, nat))
			return tp_go_on(skb, w, cfg);
	}
	/* What is translated, or is to be, has its connection under another key. */
	if (!nat && !(service && (w->p.flags & TP_PKT_OPENS)))
		ct = tp_ct_find(w, &w->p.t);
	if (!tp_known_sender(skb, w, ct) && !tp_sender(skb, w, &w->p.t.saddr))
		return tp_drop(skb, w->reason);
	if (reason)
		return tp_drop(skb, reason);
	/* An IPv4 redirect is the router's to send, as in IPv6. */
	if (w->p.t.proto == IPPROTO_ICMP && w->p.icmp_type == 5)
		return tp_drop(skb, TP_DROP_ARP_ND);
	w->resolve = 1;
	if (!ct && tp_is_loopback(&w->p.t.daddr))
		return tp_drop(skb, TP_DROP_LOOPBACK);
	if (w->p.flags & TP_PKT_ERROR)
		return tp_error_from_pod(skb, w, cfg);
	if (tp_is_hairpin(&w->p.t.daddr))
		return tp_hairpin_answer(skb, w, cfg, ct);

	if (service && (!ct || (w->p.flags & TP_PKT_OPENS) || (!(ct->flags & TP_CT_REPLIED) && tp_ct_forward(w, ct)))) {
		int choice = tp_translate(w, cfg, TP_NODEPORT_INSIDE);

		if (w->reason)
			return tp_drop(skb, w->reason);
		if (choice == TP_CHOICE_REFUSE)
			return tp_refuse(skb, w, 1);
		if (choice == TP_CHOICE_BACKEND || (w->p.flags & TP_PKT_OPENS))
			ct = tp_ct_find(w, &w->p.t);
	} else if (!ct && !tp_has_ports(w->p.t.proto) && tp_is_service_address(w, 1)) {
		return tp_drop(skb, TP_DROP_SERVICE_ICMP);
	}
	if (ct && tp_ct_clashes(w, ct))
		return tp_refuse_clash(skb, w, 1);
	ct = tp_track(w, cfg, ct);
	if (w->reason)
		return tp_drop(skb, w->reason);
	if (nat && ct && w->translated && !w->chosen)
		tp_nat_refresh(w, nat, ct);
	if (w->translated) {
		int itself = tp_is_hairpin(&w->p.t.saddr);

		reason = tp_rewrite(skb, w, 0, &w->lb.backend.addr, w->lb.backend.port);
		if (!reason && itself)
			reason = tp_rewrite(skb, w, 1, &w->p.t.saddr, w->l4.sport);
		if (reason)
			return tp_drop(skb, reason);
		tp_count(TP_SERVICE_TRANSLATED, skb->len);
		if (itself)
			return tp_back_to_sender(skb, w);
	} else if (ct && w->reply && (ct->flags & TP_CT_DNAT)) {
		answer = 1;
		w->nat.daddr = ct->vip;
		reason = tp_rewrite(skb, w, 1, &w->nat.daddr, ct->vport);
		if (reason)
			return tp_drop(skb, reason);
	}
	return tp_route_from_pod(skb, w, cfg, ct, answer);
}
