/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Packets of clients outside for backends that are no pods (snat.h has the tables), where they come in.
 *
 * A backend on another node, or outside the cluster, answers by the network's ways: to us only if we are its client. So the source becomes
 * an address of this node and a port of TP_SNAT_PORT_MIN or more, never the client's own: what is in that range is nobody else's, neither
 * masquerading's nor a socket's that did not ask for it, unless ip_local_port_range reaches into it (the agent's status says so then).
 * Such packets never enter the kernel's stack, which takes none with its own source and knows nothing of the port; what only the stack
 * could do with one is dropped and counted.
 *
 * A backend that is this node itself keeps the client's address: the packet goes to the node's sockets with another destination, and their
 * answers pass the hook on the other side of the device (to_uplink.c).
 */
#ifndef TOWPATH_FAR_H
#define TOWPATH_FAR_H

#define FIB_SRC (1U << 4)		/* BPF_FIB_LOOKUP_SRC, Linux 6.7 */
#define SNAT_PORTS (TP_SNAT_PORT_MAX - TP_SNAT_PORT_MIN + 1)
#define SNAT_TRIES 128
/* Without a factor in common with 4536 = 2^3 * 3^4 * 7, so it meets every port; and the golden part of it, so that however few are looked at
 * they lie evenly: no run of 46 free ports is missed in a round. */
#define SNAT_STEP 2803
#define SNAT_ROUNDS 8
/* What is not established gives its port to who finds no other, after so long. */
#define SNAT_YIELD (1 * NSEC_PER_SEC)

enum tp_far_place {
	TP_FAR_NOWHERE = 0,
	TP_FAR_HERE = 1,
	TP_FAR_AWAY = 2,
};

/* Where w->lb.backend, which is no pod, is. */
static __noinline int tp_far_place(struct tp_work *w, const struct tp_node_config *cfg)
{
	struct tp_peer *peer;

	if (tp_is_own_node(cfg, &w->lb.backend.addr))
		return TP_FAR_HERE;
	tp_full_prefix(&w->cidr, &w->lb.backend.addr);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	if (!peer)
		return TP_FAR_AWAY;
	/* In a node's range, and no pod: one that has gone. */
	if (!(peer->flags & TP_PEER_NODE))
		return TP_FAR_NOWHERE;
	return peer->flags & TP_PEER_LOCAL ? TP_FAR_HERE : TP_FAR_AWAY;
}

/* Looks up the kernel's way for w->aim; `more`: flags besides. What bpf_fib_lookup says. */
static __always_inline long tp_far_lookup(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg, __u32 more)
{
	struct bpf_fib_lookup *fib = &w->fib;
	__u32 flags = more | (cfg->flags & TP_NODE_PLAIN_ROUTING ? BPF_FIB_LOOKUP_DIRECT : 0);

	__builtin_memset(fib, 0, sizeof(*fib));
	fib->ifindex = skb->ifindex;
	fib->l4_protocol = w->p.t.proto;
	if (tp_is_v4(&w->aim.daddr)) {
		fib->family = FAMILY_V4;
		fib->ipv4_src = tp_word(&w->aim.saddr, 3);
		fib->ipv4_dst = tp_word(&w->aim.daddr, 3);
	} else {
		fib->family = FAMILY_V6;
		__builtin_memcpy(fib->ipv6_src, w->aim.saddr.b, 16);
		__builtin_memcpy(fib->ipv6_dst, w->aim.daddr.b, 16);
	}
	return bpf_fib_lookup(skb, fib, sizeof(*fib), flags);
}

/* The same, with whatever of it this kernel has. */
static __always_inline long tp_far_find(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg, __u32 more)
{
	long found = tp_far_lookup(skb, w, cfg, more | BPF_FIB_LOOKUP_SKIP_NEIGH);

	/* Linux before 6.7, and before 6.3. */
	if (found == -EINVAL && more)
		found = tp_far_lookup(skb, w, cfg, BPF_FIB_LOOKUP_SKIP_NEIGH);
	if (found == -EINVAL)
		found = tp_far_lookup(skb, w, cfg, 0);
	return found;
}

/*
 * Makes w->way.source the address that the node has towards w->way.backend: that of the device which leads there, by which the answers
 * then come back. Not 0: nothing leads there.
 */
static __noinline int tp_far_source(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	struct bpf_fib_lookup *fib = &w->fib;
	int v4 = tp_is_v4(&w->way.backend);
	long found;

	w->way.source = v4 ? cfg->node4 : cfg->node6;
	w->aim.saddr = w->way.source;
	w->aim.daddr = w->way.backend;
	found = tp_far_find(skb, w, cfg, FIB_SRC);
	if (found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH && found != BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return -1;
	if (v4 ? fib->ipv4_src : fib->ipv6_src[0] | fib->ipv6_src[1] | fib->ipv6_src[2] | fib->ipv6_src[3]) {
		if (v4)
			tp_set_v4(&w->way.source, fib->ipv4_src);
		else
			tp_set_v6(&w->way.source, fib->ipv6_src);
	}
	return tp_is_zero(&w->way.source) || tp_is_v4(&w->way.source) != v4 ? -1 : 0;
}

/* A search for a port that nobody has towards one backend. */
struct tp_port_search {
	struct tp_tuple answer;
	__u64 now;
	__u32 at;
	__u32 step;
	__u32 yields;			/* also one that somebody has and could do without */
	__u32 found;
};

static long tp_port_step(__u32 i, struct tp_port_search *search)
{
	struct tp_snat *snat;
	__u64 last_seen;

	search->at = (search->at + search->step) % SNAT_PORTS;
	search->answer.dport = bpf_htons(TP_SNAT_PORT_MIN + search->at);
	snat = bpf_map_lookup_elem(&tp_snat, &search->answer);
	if (!snat) {
		search->found = 1;
		return 1;
	}
	if (!tp_snat_over(search->answer.proto, snat, search->now)) {
		last_seen = snat->last_seen;
		if (!search->yields || search->now <= last_seen || search->now - last_seen < SNAT_YIELD)
			return 0;
		if ((snat->flags & TP_CT_ESTABLISHED) && !CT_CLOSED(snat->flags))
			return 0;
		tp_count(TP_CT_RECYCLED, 0);
	}
	tp_snat_remove(&search->answer, snat);
	search->found = 1;
	return 1;
}

/*
 * The node's socket that would get what is sent as `t`: 0 none, 1 one that waits for anybody, 2 one that is connected to the sender.
 */
static __noinline int tp_has_socket(struct __sk_buff *skb, const struct tp_tuple *t)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sock = NULL;
	__u32 size = sizeof(tuple.ipv6);
	int kind = 1;

	if (!t)
		return 0;
	if (tp_is_v4(&t->saddr)) {
		size = sizeof(tuple.ipv4);
		tuple.ipv4.saddr = tp_word(&t->saddr, 3);
		tuple.ipv4.daddr = tp_word(&t->daddr, 3);
		tuple.ipv4.sport = t->sport;
		tuple.ipv4.dport = t->dport;
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, t->saddr.b, 16);
		__builtin_memcpy(tuple.ipv6.daddr, t->daddr.b, 16);
		tuple.ipv6.sport = t->sport;
		tuple.ipv6.dport = t->dport;
	}
	if (t->proto == IPPROTO_TCP)
		sock = bpf_sk_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else if (t->proto == IPPROTO_UDP)
		sock = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!sock)
		return 0;
	if (t->proto == IPPROTO_TCP && sock->state != BPF_TCP_LISTEN)
		kind = 2;
	bpf_sk_release(sock);
	return kind;
}

/*
 * Takes a source port towards w->way.backend, by entering w->snat under the answers' tuple (w->answer). 0, or the reason to drop. It begins
 * anywhere (RFC 6056 3.3.1): who watches one connection learns nothing of the next, and a port that a backend still remembers is not
 * soon met again.
 */
static __noinline __u32 tp_far_take_port(struct __sk_buff *skb, struct tp_work *w)
{
	struct tp_port_search search = { .now = tp_now() };
	__u32 random = bpf_get_prandom_u32();
	long err;

	tp_snat_answer_of(&search.answer, &w->way, w->sent.proto);
	search.at = random % SNAT_PORTS;
	search.step = SNAT_STEP;
	for (int i = 0; i < SNAT_ROUNDS; i++) {
		search.found = 0;
		bpf_loop(SNAT_TRIES, tp_port_step, &search, 0);
		if (!search.found) {
			if (search.yields)
				break;
			search.yields = 1;
			continue;
		}
		w->answer = search.answer;
		if (tp_has_socket(skb, &w->answer))
			continue;
		err = bpf_map_update_elem(&tp_snat, &w->answer, &w->snat, BPF_NOEXIST);
		if (!err)
			return 0;
		/* EEXIST: another CPU took it just now. */
		if (err != -EEXIST)
			return TP_DROP_SNAT_FULL;
	}
	return TP_DROP_SNAT_PORTS;
}

/* What the backend of w->way gets. */
static __always_inline void tp_far_aim_at_backend(struct tp_work *w)
{
	w->aim.saddr = w->way.source;
	w->aim.sport = w->way.source_port;
	w->aim.daddr = w->way.backend;
	w->aim.dport = w->way.backend_port;
}

/*
 * As tp_far_take_port, where the client's address and port are kept. The reason is TP_DROP_NO_BACKEND where they are taken: by a
 * connection that the client has by way of another address of the Service, or directly. (See tp_ct_clashes.)
 */
static __noinline __u32 tp_far_keep_port(struct __sk_buff *skb, struct tp_work *w)
{
	struct tp_snat *snat;
	long err;

	w->way.source = w->sent.saddr;
	w->way.source_port = w->sent.sport;
	tp_snat_answer_of(&w->answer, &w->way, w->sent.proto);
	snat = bpf_map_lookup_elem(&tp_snat, &w->answer);
	if (snat && (tp_snat_over(w->sent.proto, snat, w->snat.created) || CT_CLOSED(snat->flags)))
		tp_snat_remove(&w->answer, snat);
	tp_far_aim_at_backend(w);
	w->aim.proto = w->sent.proto;
	if (tp_has_socket(skb, &w->aim) == 2)
		return TP_DROP_NO_BACKEND;
	err = bpf_map_update_elem(&tp_snat, &w->answer, &w->snat, BPF_NOEXIST);
	if (!err)
		return 0;
	if (err != -EEXIST)
		return TP_DROP_SNAT_FULL;
	/* By this very connection, of which another CPU has a packet, too: it is about to enter what leads there, and so are we. */
	snat = bpf_map_lookup_elem(&tp_snat, &w->answer);
	return snat && tp_snat_is_of(snat, &w->sent) ? 0 : TP_DROP_NO_BACKEND;
}

/* Enters a connection of w->sent to w->lb.backend: w->way and w->answer. 0, or the reason to drop; TP_DROP_NO_BACKEND: to refuse. */
static __noinline __u32 tp_far_open(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	int place = tp_far_place(w, cfg);
	struct tp_nat *nat;
	__u32 reason;
	long err;

	if (place == TP_FAR_NOWHERE)
		return TP_DROP_NO_BACKEND;
	__builtin_memset(&w->snat, 0, sizeof(w->snat));
	__builtin_memset(&w->way, 0, sizeof(w->way));
	w->snat.created = tp_now();
	w->snat.last_seen = w->snat.created;
	w->snat.client = w->sent.saddr;
	w->snat.client_port = w->sent.sport;
	w->snat.vip = w->sent.daddr;
	w->snat.vport = w->sent.dport;
	w->way.backend = w->lb.backend.addr;
	w->way.backend_port = w->lb.backend.port;
	w->way.backend_id = w->lb.backend_id;
	if (place == TP_FAR_HERE) {
		reason = tp_far_keep_port(skb, w);
	} else {
		if (tp_far_source(skb, w, cfg))
			return TP_DROP_NO_BACKEND;
		reason = tp_far_take_port(skb, w);
	}
	if (reason)
		return reason;
	w->way.source_port = w->answer.dport;
	err = bpf_map_update_elem(&tp_snat_asked, &w->sent, &w->way, BPF_NOEXIST);
	if (err) {
		/* EEXIST: another packet of the connection was first, on another CPU. It may have come to the same. */
		if (err == -EEXIST && tp_snat_leads(bpf_map_lookup_elem(&tp_snat_asked, &w->sent), &w->answer))
			return 0;
		bpf_map_delete_elem(&tp_snat, &w->answer);
		if (err != -EEXIST)
			return TP_DROP_SNAT_FULL;
		return tp_snat_known(w) ? 0 : TP_DROP_INTERNAL;
	}
	tp_load_flow(w->way.backend_id, 1);
	/* Of an earlier connection from this port to a pod: it would be found first. */
	nat = bpf_map_lookup_elem(&tp_nat, &w->sent);
	if (nat)
		tp_nat_delete(&w->sent, nat);
	return 0;
}

/* Says of a packet that does not fit the way of w->aim, which nobody may cut, how much would. */
static __always_inline int tp_far_too_big(struct __sk_buff *skb, struct tp_work *w)
{
	__u32 mtu = w->fib.mtu_result;

	if (!(w->p.flags & TP_PKT_V6) && !(w->h.v4.frag_off & bpf_htons(IP_DF)))
		return tp_drop(skb, TP_DROP_SNAT_ODD);
	if (!mtu || (w->p.flags & TP_PKT_V6 ? tp_unreachable_v6(skb, w, mtu) : tp_unreachable_v4(skb, w, mtu)) || tp_swap_macs(skb, w))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_REFUSED, skb->len);
	tp_tell(TP_REFUSED, skb->ifindex, skb->len, 0);
	tp_note(2, skb->ifindex, TP_REFUSED);
	return bpf_redirect(skb->ifindex, 0);
}

/* Sends the packet, which by now is w->aim's, out by the way that was found for that. */
static __always_inline int tp_far_send(struct __sk_buff *skb, struct tp_work *w)
{
	struct bpf_fib_lookup *fib = &w->fib;
	struct bpf_redir_neigh *hop = &w->hop;

	__builtin_memset(hop, 0, sizeof(*hop));
	/* A next hop may be of the other family (RFC 5549). */
	hop->nh_family = fib->family;
	if (fib->family == FAMILY_V6)
		__builtin_memcpy(hop->ipv6_nh, fib->ipv6_dst, 16);
	else
		hop->ipv4_nh = fib->ipv4_dst;
	if (tp_forward_headers(skb, w))
		return tp_drop(skb, TP_DROP_INTERNAL);
	tp_count(TP_HOST_OUT, skb->len);
	tp_note(3, fib->ifindex, TP_HOST_OUT);
	return bpf_redirect_neigh(fib->ifindex, hop, sizeof(*hop), 0);
}

/* Gives the packet the ends of w->aim and forwards it. */
static __noinline int tp_far_forward(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	__u32 reason;
	long found;

	if (tp_wants_stack(w))
		return tp_drop(skb, TP_DROP_SNAT_ODD);
	found = tp_far_find(skb, w, cfg, 0);
	if (found == BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return tp_far_too_big(skb, w);
	if (found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH)
		return tp_drop(skb, TP_DROP_INTERNAL);
	reason = tp_rewrite(skb, w, 1, &w->aim.saddr, w->aim.sport);
	if (!reason)
		reason = tp_rewrite(skb, w, 0, &w->aim.daddr, w->aim.dport);
	return reason ? tp_drop(skb, reason) : tp_far_send(skb, w);
}

/* What the client of w->snat gets. */
static __always_inline void tp_far_aim_at_client(struct tp_work *w)
{
	w->aim.saddr = w->snat.vip;
	w->aim.sport = w->snat.vport;
	w->aim.daddr = w->snat.client;
	w->aim.dport = w->snat.client_port;
}

/* What a client sends on a connection that is entered: w->way and w->answer. */
static __noinline int tp_far_ask(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	__u32 reason;
	int sent;

	tp_snat_observe(w, 0);
	if (w->p.flags & TP_PKT_FIRST_FRAG)
		tp_frag_record(w, &w->sent);
	if (tp_snat_keeps(w)) {
		reason = tp_rewrite(skb, w, 0, &w->way.backend, w->way.backend_port);
		if (reason)
			return tp_drop(skb, reason);
		tp_count(TP_SERVICE_TRANSLATED, skb->len);
		return tp_to_stack(skb);
	}
	tp_far_aim_at_backend(w);
	sent = tp_far_forward(skb, w, cfg);
	if (sent == TC_ACT_REDIRECT)
		tp_count(TP_SERVICE_TRANSLATED, skb->len);
	return sent;
}

/* What a client sends to w->lb.backend, which is no pod here and behind no other node. */
static __noinline int tp_far_serve(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	__u32 reason;

	/* It was a pod when the connection was opened. */
	if (!w->chosen)
		return tp_refuse_clash(skb, w, 0);
	if (tp_passes_for_envelope(w, cfg, w->lb.backend.port))
		return tp_drop(skb, TP_DROP_OWN_ENVELOPE);
	reason = tp_far_open(skb, w, cfg);
	if (reason)
		return reason == TP_DROP_NO_BACKEND ? tp_refuse_clash(skb, w, 0) : tp_drop(skb, reason);
	return tp_far_ask(skb, w, cfg);
}

/* What a backend elsewhere answers to the client of w->snat. */
static __noinline int tp_far_answer(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	tp_snat_observe(w, 1);
	if (w->p.flags & TP_PKT_FIRST_FRAG)
		tp_frag_record(w, &w->p.t);
	tp_far_aim_at_client(w);
	return tp_far_forward(skb, w, cfg);
}

/* Sends an ICMP error on, with w->aim's addresses: no stranger's source leaves from here. */
static __always_inline int tp_far_send_error(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	long found = tp_far_find(skb, w, cfg, 0);

	if (found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH)
		return tp_drop(skb, TP_DROP_INTERNAL);
	if (!tp_same(&w->p.t.saddr, &w->quoted.daddr) && tp_rewrite(skb, w, 1, &w->aim.saddr, 0))
		return tp_drop(skb, TP_DROP_INTERNAL);
	return tp_far_send(skb, w);
}

/* Sends an ICMP error to w->aim's receiver, about what that sent to w->aim's sender, as it knows the two. */
static __noinline int tp_far_send_quoted(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	__u32 reason;

	w->restore = 1;
	w->nat.daddr = w->aim.saddr;
	w->nat.dport = w->aim.sport;
	if (tp_restore_quoted(skb, w))
		return tp_drop(skb, TP_DROP_INTERNAL);
	w->lb.backend.addr = w->aim.daddr;
	w->lb.backend.port = w->aim.dport;
	reason = tp_aim_quoted(skb, w);
	return reason ? tp_drop(skb, reason) : tp_far_send_error(skb, w, cfg);
}

/* The backend, or who is on the way there, complains of what was sent to it: to the client, who knows of the Service only. */
static __noinline int tp_far_error_to_client(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	tp_far_aim_at_client(w);
	return tp_far_send_quoted(skb, w, cfg);
}

/* The client, or who is on the way there, complains of an answer: to the backend, who knows of w->way only. */
static __noinline int tp_far_error_to_backend(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	__u32 reason;

	if (!tp_snat_keeps(w)) {
		tp_far_aim_at_backend(w);
		return tp_far_send_quoted(skb, w, cfg);
	}
	w->lb.backend.addr = w->way.backend;
	w->lb.backend.port = w->way.backend_port;
	reason = tp_aim_quoted(skb, w);
	return reason ? tp_drop(skb, reason) : tp_to_stack(skb);
}

#endif
