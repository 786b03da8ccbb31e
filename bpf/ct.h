/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Connections: found from both directions, judged when new or when the policy changed, in the direction in which they
 * were opened.
 */
#ifndef TOWPATH_CT_H
#define TOWPATH_CT_H

/* Idle limits. */
#define CT_TCP_ESTABLISHED (8 * 3600 * NSEC_PER_SEC)
#define CT_TCP_HANDSHAKE (60 * NSEC_PER_SEC)
#define CT_TCP_CLOSING (10 * NSEC_PER_SEC)
/* Of which the answers are not seen: as long as RFC 5382 (REQ-5) has translators wait, open or half closed. */
#define CT_TCP_ONE_WAY (124 * 60 * NSEC_PER_SEC)
#define CT_TCP_ONE_WAY_CLOSING (4 * 60 * NSEC_PER_SEC)
#define CT_STREAM (180 * NSEC_PER_SEC)
#define CT_EXCHANGE (30 * NSEC_PER_SEC)

/* How long packets that change nothing about a connection may go on without a look at it. */
#define NAT_FRESH (4 * NSEC_PER_SEC)

#define CT_CLOSED(flags) \
	(((flags) & TP_CT_RST) || ((flags) & (TP_CT_FIN_A | TP_CT_FIN_B)) == (TP_CT_FIN_A | TP_CT_FIN_B))

static __always_inline __u64 tp_ct_idle_limit(__u8 proto, __u32 flags)
{
	if (proto == IPPROTO_TCP) {
		if (CT_CLOSED(flags))
			return CT_TCP_CLOSING;
		if (!(flags & TP_CT_ESTABLISHED))
			return CT_TCP_HANDSHAKE;
		if ((flags & (TP_CT_DIRECT | TP_CT_REPLIED)) != TP_CT_DIRECT)
			return CT_TCP_ESTABLISHED;
		return flags & (TP_CT_FIN_A | TP_CT_FIN_B) ? CT_TCP_ONE_WAY_CLOSING : CT_TCP_ONE_WAY;
	}
	/* A question and its answer are soon over, as in the kernel's own tracking (nf_conntrack_udp_timeout). */
	if ((proto == IPPROTO_UDP || proto == SCTP) && (flags & TP_CT_ESTABLISHED))
		return CT_STREAM;
	return CT_EXCHANGE;
}

static __always_inline int tp_ct_expired(__u8 proto, const struct tp_ct *ct, __u64 now)
{
	__u64 last_seen = ct->last_seen;

	/* The coarse clock of another CPU may be a tick ahead. */
	return now > last_seen && now - last_seen > tp_ct_idle_limit(proto, ct->flags);
}

static __always_inline int tp_source_is_smaller(const struct tp_tuple *t)
{
	for (int i = 0; i < 4; i++) {
		__u32 s = bpf_ntohl(tp_word(&t->saddr, i)), d = bpf_ntohl(tp_word(&t->daddr, i));

		if (s != d)
			return s < d;
	}
	return bpf_ntohs(t->sport) <= bpf_ntohs(t->dport);
}

/* The key of a tuple's connection; whether its source is side A. */
static __always_inline __u8 tp_ct_key_of(struct tp_ct_key *key, const struct tp_tuple *t)
{
	__u8 from_a = tp_source_is_smaller(t);

	if (from_a) {
		key->addr_a = t->saddr;
		key->addr_b = t->daddr;
		key->port_a = t->sport;
		key->port_b = t->dport;
	} else {
		key->addr_a = t->daddr;
		key->addr_b = t->saddr;
		key->port_a = t->dport;
		key->port_b = t->sport;
	}
	key->proto = t->proto;
	__builtin_memset(key->pad, 0, sizeof(key->pad));
	return from_a;
}

/* Makes w->key and w->from_a of a tuple, and looks the connection up. */
static __always_inline struct tp_ct *tp_ct_find(struct tp_work *w, const struct tp_tuple *t)
{
	w->from_a = tp_ct_key_of(&w->key, t);
	return bpf_map_lookup_elem(&tp_ct, &w->key);
}

/* Whether the packet last looked up goes from the opener to the responder. */
static __always_inline int tp_ct_forward(const struct tp_work *w, const struct tp_ct *ct)
{
	return !!(ct->flags & TP_CT_FROM_A) == !!w->from_a;
}

/* See struct tp_ct; 0 of an end that is not here. */
static __always_inline __u64 tp_judged(__u8 verdict, __u32 revision)
{
	return verdict ? (__u64)verdict << 32 | revision : 0;
}

static __always_inline int tp_ct_stale(const struct tp_ct *ct, __u32 revision)
{
	return (ct->egress && (__u32)ct->egress != revision) || (ct->ingress && (__u32)ct->ingress != revision);
}

/* The end that the packet last looked up comes from, or goes to. */
static __always_inline struct tp_ct_end *tp_ct_source(const struct tp_work *w, struct tp_ct *ct)
{
	return w->from_a ? &ct->a : &ct->b;
}

static __always_inline struct tp_ct_end *tp_ct_target(const struct tp_work *w, struct tp_ct *ct)
{
	return w->from_a ? &ct->b : &ct->a;
}

/* Whether the packet begins a connection anew although there is an entry. */
static __always_inline int tp_ct_restarts(const struct tp_work *w, const struct tp_ct *ct, __u64 now)
{
	int forward = tp_ct_forward(w, ct);

	if (tp_ct_expired(w->p.t.proto, ct, now))
		return 1;
	/* An own-node verdict serves only packets that the node generated, and they need no other. */
	if (forward && w->own_node != TP_OWN_UNKNOWN &&
	    (w->own_node == TP_OWN_YES) != (ct->ingress_rule == TP_RULE_OWN_NODE))
		return 1;
	/* The same addresses reached by way of another Service, or of none: the answer's source would be wrong. */
	if (forward && w->translated &&
	    (!(ct->flags & TP_CT_DNAT) || ct->vport != w->sent.dport || !tp_same(&ct->vip, &w->sent.daddr)))
		return 1;
	if (!(w->p.flags & TP_PKT_OPENS))
		return 0;
	return !forward || CT_CLOSED(ct->flags) || (w->p.t.proto == IPPROTO_TCP && (ct->flags & TP_CT_ESTABLISHED)) ||
	       (!w->translated && (ct->flags & TP_CT_DNAT));
}

/*
 * Whether the entry that a packet of the opener's would share is another connection's, which is still open: the same ends reached by
 * way of another Service's address, or of none, from one port. The client tells the two apart by the address that it asked; the
 * backend cannot, so one of them would get the other's answers. (The socket hook never lets it come to this: the client's own kernel
 * sees the backend's address and gives no port twice.) Without a connection's end to go by, one that was silent for a while is over.
 */
static __always_inline int tp_ct_clashes(const struct tp_work *w, const struct tp_ct *ct)
{
	__u32 flags = ct->flags;
	__u64 now, last_seen;
	struct tp_tuple sent;

	if (w->translated ? (flags & TP_CT_DNAT) && ct->vport == w->sent.dport && tp_same(&ct->vip, &w->sent.daddr)
			  : !(flags & TP_CT_DNAT))
		return 0;
	if (!tp_ct_forward(w, ct) || CT_CLOSED(flags))
		return 0;
	now = tp_now();
	last_seen = ct->last_seen;
	if (tp_ct_expired(w->p.t.proto, ct, now))
		return 0;
	/* Its translation was taken away with its Service, or its backend: there is nobody to go on with it. */
	if (flags & TP_CT_DNAT) {
		tp_nat_key_of(&sent, &w->key, ct);
		if (!bpf_map_lookup_elem(&tp_nat, &sent))
			return 0;
	}
	return w->p.t.proto == IPPROTO_TCP || !w->translated || now <= last_seen || now - last_seen <= CT_TCP_CLOSING;
}

static __always_inline void tp_origin_is(struct tp_work *w, const struct tp_tuple *t, int forward)
{
	if (forward) {
		w->origin = *t;
		return;
	}
	w->origin.saddr = t->daddr;
	w->origin.daddr = t->saddr;
	w->origin.sport = t->dport;
	w->origin.dport = t->sport;
	w->origin.proto = t->proto;
	__builtin_memset(w->origin.pad, 0, sizeof(w->origin.pad));
}

/* The node that the destination lies behind, when it is not this one. */
static __always_inline void tp_resolve_via(struct tp_work *w)
{
	struct tp_peer *peer;

	if (!w->resolve)
		return;
	tp_full_prefix(&w->cidr, &w->p.t.daddr);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	if (!peer || (peer->flags & TP_PEER_LOCAL) || (peer->flags & (TP_PEER_NODE | TP_PEER_PLAIN)) == (TP_PEER_NODE | TP_PEER_PLAIN))
		return;
	w->via = peer->tunnel;
	w->has_via = 1;
	w->by = tp_by_of_peer(peer);
}

/*
 * The same of the source, for an entry that is judged again by a hook that sends nothing to other nodes: the next packet of the other direction
 * is not going to ask.
 */
static __always_inline void tp_resolve_back(struct tp_work *w, struct tp_ct *ct)
{
	struct tp_peer *peer;

	if (w->resolve || w->has_via || !(ct->flags & TP_CT_VIA_TUNNEL))
		return;
	tp_full_prefix(&w->cidr, &w->p.t.saddr);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	if (!peer || (peer->flags & (TP_PEER_LOCAL | TP_PEER_NODE)))
		return;
	w->via = peer->tunnel;
	w->has_via = 1;
	w->by = tp_by_of_peer(peer);
}

#define TP_CT_WAY (TP_CT_VIA_TUNNEL | TP_CT_PLAIN | TP_CT_IPIP | TP_CT_LINK)

/* How tp_ct.flags says which way the end that is not here is reached. */
static __always_inline __u32 tp_way_flags(const struct tp_work *w)
{
	if (!w->has_via)
		return 0;
	if (w->by == TP_BY_ENVELOPE)
		return TP_CT_VIA_TUNNEL;
	if (w->by == TP_BY_IPIP)
		return TP_CT_VIA_TUNNEL | TP_CT_IPIP;
	return TP_CT_VIA_TUNNEL | TP_CT_PLAIN | (w->by == TP_BY_LINK ? TP_CT_LINK : 0);
}

/* Has the entry lead where w->via says. */
static __always_inline void tp_ct_lead(const struct tp_work *w, struct tp_ct *ct)
{
	__u32 flags = ct->flags & TP_CT_WAY, way = tp_way_flags(w);

	if (!w->has_via)
		return;
	if (!tp_same(&ct->via, &w->via))
		ct->via = w->via;
	if (way & ~flags)
		__sync_fetch_and_or(&ct->flags, way);
	if (flags & ~way)
		__sync_fetch_and_and(&ct->flags, ~(flags & ~way));
}

/* A connection that passes is held against the policies that are only audited once under one set of them. */
static __always_inline void tp_ct_audit(struct tp_work *w, struct tp_ct *ct)
{
	__u16 mark = tp_audit_mark(&w->j);

	if (mark && ct->audited != mark) {
		ct->audited = mark;
		tp_audit();
	}
}

/* Judges an entry again under the present policy; `t` is the direction in which it was looked up. */
static __always_inline void tp_rejudge(struct tp_work *w, const struct tp_node_config *cfg, struct tp_ct *ct,
				       const struct tp_tuple *t, __u32 revision)
{
	__u32 denied;

	tp_origin_is(w, t, tp_ct_forward(w, ct));
	denied = tp_judge(w, cfg, ct->ingress_rule == TP_RULE_OWN_NODE);
	ct->egress_rule = w->j.egress_rule;
	ct->ingress_rule = w->j.ingress_rule;
	if (ct->flags & TP_CT_FROM_A) {
		ct->a = w->j.from;
		ct->b = w->j.to;
	} else {
		ct->a = w->j.to;
		ct->b = w->j.from;
	}
	/* Last: who sees the revision sees what was judged under it. */
	barrier();
	*(volatile __u64 *)&ct->egress = tp_judged(w->j.egress_verdict, revision);
	*(volatile __u64 *)&ct->ingress = tp_judged(w->j.ingress_verdict, revision);
	if (!denied)
		tp_ct_audit(w, ct);
}

/* Why a connection is denied, the rule in w->rule; 0: it is not. */
static __always_inline __u32 tp_ct_denied(struct tp_work *w, const struct tp_ct *ct)
{
	if (ct->egress >> 32 == TP_VERDICT_DENY) {
		w->rule = ct->egress_rule;
		return TP_DROP_EGRESS_POLICY;
	}
	if (ct->ingress >> 32 == TP_VERDICT_DENY) {
		w->rule = ct->ingress_rule;
		return TP_DROP_INGRESS_POLICY;
	}
	return 0;
}

/* What a packet tells of its connection's state. Shared lines are written only when something is new. */
static __always_inline void tp_ct_observe(struct tp_work *w, struct tp_ct *ct, __u64 now)
{
	__u32 flags = ct->flags, add = 0;

	if (w->reply)
		add |= TP_CT_REPLIED;
	if (w->p.t.proto == IPPROTO_TCP) {
		__u8 tcp = w->p.tcp_flags;

		if (tcp & TCP_RST)
			add |= TP_CT_RST;
		if (tcp & TCP_FIN)
			add |= w->from_a ? TP_CT_FIN_A : TP_CT_FIN_B;
		if (!w->reply && (tcp & TCP_ACK) && !(tcp & TCP_SYN) && (flags & (TP_CT_REPLIED | TP_CT_DIRECT)))
			add |= TP_CT_ESTABLISHED;
	} else if (!w->reply && (flags & (TP_CT_REPLIED | TP_CT_DIRECT))) {
		add |= TP_CT_ESTABLISHED;
	}
	if (add & ~flags)
		__sync_fetch_and_or(&ct->flags, add);
	if (now - ct->last_seen > NSEC_PER_SEC)
		ct->last_seen = now;
	tp_ct_lead(w, ct);
}

/*
 * Puts w->fresh in the place of `old`. A key is counted once and to one pod, however often its connection begins anew. If it
 * was reached by way of another Service, that translation goes.
 */
static __always_inline int tp_ct_renew(struct tp_work *w, const struct tp_ct *old)
{
	__u32 flags = old->flags;
	struct tp_tuple sent;

	tp_nat_key_of(&sent, &w->key, old);
	w->fresh.pod_id = old->pod_id;
	if (bpf_map_update_elem(&tp_ct, &w->key, &w->fresh, BPF_EXIST))
		return -1;
	if ((flags & TP_CT_DNAT) && !(w->translated && tp_same_tuple(&sent, &w->sent)))
		tp_nat_forget(&sent, &w->key, flags & TP_CT_FROM_A);
	return 0;
}

/* Enters w->fresh under w->key, in place of `old` if that is still there. 0, or why not. */
TP_APART __u32 tp_ct_enter(struct tp_work *w, const struct tp_ct *old)
{
	__u32 reason;
	long err;

	if (!w)
		return TP_DROP_INTERNAL;
	if (old && !tp_ct_renew(w, old))
		return 0;
	w->fresh.pod_id = w->j.pod_id;
	reason = tp_admit(w);
	if (reason)
		return reason;
	err = bpf_map_update_elem(&tp_ct, &w->key, &w->fresh, BPF_NOEXIST);
	if (!err)
		return 0;
	tp_uncount(w->fresh.pod_id);
	/* Another CPU entered it just now. */
	w->overtaken = err == -EEXIST;
	return w->overtaken ? 0 : TP_DROP_CT_FULL;
}

/* The entry of w->fresh, which is then as good as it, and the translation that leads to it. Without an entry, answers would be judged as if they were
 * questions, and never be translated back: NULL with w->reason 0 only if that does not matter. */
static __always_inline struct tp_ct *tp_ct_keep(struct tp_work *w, const struct tp_ct *old)
{
	struct tp_ct *ct = &w->fresh;
	__u32 reason;
	int left_out;

	w->overtaken = 0;
	reason = tp_ct_enter(w, old);
	if (reason) {
		if (w->j.isolated || w->translated || w->has_via)
			w->reason = reason;
		else
			tp_count(TP_UNTRACKED, 0);
		return NULL;
	}
	left_out = w->translated && tp_nat_enter(w, ct);
	if (w->overtaken)
		ct = bpf_map_lookup_elem(&tp_ct, &w->key);
	if (!left_out)
		return ct;
	w->reason = TP_DROP_CT_FULL;
	if (ct)
		tp_ct_remove(&w->key, ct);
	return NULL;
}

/* A new connection, judged and entered; `old`: an entry that it takes the place of. NULL with w->reason 0: it may pass, but
 * is not tracked. */
static __always_inline struct tp_ct *tp_ct_open(struct tp_work *w, const struct tp_node_config *cfg, const struct tp_ct *old,
						__u64 now, __u32 revision)
{
	struct tp_ct *fresh = &w->fresh;

	w->origin = w->p.t;
	w->reason = tp_judge(w, cfg, w->own_node == TP_OWN_YES);
	if (w->reason)
		return NULL;
	__builtin_memset(fresh, 0, sizeof(*fresh));
	fresh->last_seen = now;
	fresh->created = now;
	fresh->flags = w->from_a ? TP_CT_FROM_A : 0;
	if (w->p.tcp_flags & TCP_RST)
		fresh->flags |= TP_CT_RST;
	if (w->translated) {
		fresh->flags |= TP_CT_DNAT;
		fresh->vip = w->sent.daddr;
		fresh->vport = w->sent.dport;
		fresh->backend = w->lb.backend_id;
	}
	/* A pod of this node lies behind no other. */
	if (!old && !w->j.to.ifindex)
		tp_resolve_via(w);
	fresh->flags |= tp_way_flags(w);
	if (w->has_via)
		fresh->via = w->via;
	if (w->direct)
		fresh->flags |= TP_CT_DIRECT;
	fresh->egress_rule = w->j.egress_rule;
	fresh->ingress_rule = w->j.ingress_rule;
	fresh->egress = tp_judged(w->j.egress_verdict, revision);
	fresh->ingress = tp_judged(w->j.ingress_verdict, revision);
	*tp_ct_source(w, fresh) = w->j.from;
	*tp_ct_target(w, fresh) = w->j.to;
	tp_ct_audit(w, fresh);
	return tp_ct_keep(w, old);
}

/*
 * Whether a connection that begins anew may do so in the entry of the former one: it has its direction, its translation and its
 * way, and nobody deletes the entry meanwhile. (An established one is not recycled, and the collector waits for the end of its time.)
 */
static __always_inline int tp_ct_serves_again(const struct tp_work *w, const struct tp_ct *ct, __u64 now)
{
	__u32 flags = ct->flags;

	if (!(flags & TP_CT_ESTABLISHED) || now + NSEC_PER_SEC > ct->last_seen + tp_ct_idle_limit(w->p.t.proto, flags))
		return 0;
	if (!tp_ct_forward(w, ct) || !(flags & TP_CT_DNAT) != !w->translated || !(flags & TP_CT_VIA_TUNNEL) != !w->has_via ||
	    !(flags & TP_CT_DIRECT) != !w->direct)
		return 0;
	if (w->translated && (ct->backend != w->lb.backend_id || ct->vport != w->sent.dport || !tp_same(&ct->vip, &w->sent.daddr)))
		return 0;
	return (w->own_node == TP_OWN_YES) == (ct->ingress_rule == TP_RULE_OWN_NODE);
}

/*
 * A client's ports come round: most new connections of a busy one find the entry of a former one. It is judged again and begins
 * anew in its place, which spares the kernel an allocation, a copy and a grace period.
 */
static __always_inline struct tp_ct *tp_ct_reopen(struct tp_work *w, const struct tp_node_config *cfg, struct tp_ct *ct,
						  __u64 now, __u32 revision)
{
	ct->last_seen = now;
	ct->created = now;
	ct->audited = 0;
	tp_rejudge(w, cfg, ct, &w->p.t, revision);
	w->reason = tp_ct_denied(w, ct);
	if (w->reason)
		return NULL;
	tp_ct_lead(w, ct);
	if (w->translated && w->chosen && tp_nat_enter(w, ct)) {
		w->reason = TP_DROP_CT_FULL;
		return NULL;
	}
	__sync_fetch_and_and(&ct->flags, TP_CT_FROM_A | TP_CT_DNAT | TP_CT_DIRECT | TP_CT_WAY);
	if (w->p.tcp_flags & TCP_RST)
		__sync_fetch_and_or(&ct->flags, TP_CT_RST);
	return ct;
}

/*
 * The connection of packet w->p, which tp_ct_find has just looked up: `ct` is what it found. Leaves the reason to drop the
 * packet in w->reason, and whether it is a reply in w->reply.
 */
static __always_inline struct tp_ct *tp_track(struct tp_work *w, const struct tp_node_config *cfg, struct tp_ct *ct)
{
	__u64 now = tp_now();
	__u32 revision = tp_revision_now();

	/* Here, because every hook has checked the source before. */
	if (w->p.flags & TP_PKT_FIRST_FRAG)
		tp_frag_record(w, w->translated ? &w->sent : &w->p.t);
	if (!ct || tp_ct_restarts(w, ct, now)) {
		if (ct)
			tp_resolve_via(w);
		if (ct && tp_ct_serves_again(w, ct, now))
			return tp_ct_reopen(w, cfg, ct, now, revision);
		return tp_ct_open(w, cfg, ct, now, revision);
	}
	w->reply = !tp_ct_forward(w, ct);
	if (tp_ct_stale(ct, revision)) {
		tp_rejudge(w, cfg, ct, &w->p.t, revision);
		tp_resolve_via(w);
		tp_resolve_back(w, ct);
	}
	w->reason = tp_ct_denied(w, ct);
	if (w->reason)
		return NULL;
	/* The connection is known and its translation is not: released with a backend that is here again. */
	if (w->translated && w->chosen && tp_nat_enter(w, ct)) {
		w->reason = TP_DROP_CT_FULL;
		return NULL;
	}
	tp_ct_observe(w, ct, now);
	return ct;
}

/*
 * An ICMP error is as welcome as an answer to the packet that it quotes, at whose sender it must be aimed. Where there is no such
 * connection, or none any more, it is judged like any packet (and so would that answer be), and leaves no entry.
 */
TP_APART __u32 tp_track_error(tp_context *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	__u32 revision = tp_revision_now();
	struct tp_ct *ct;
	__u32 reason;
	int stale;

	if (!w || !cfg)
		return TP_DROP_INTERNAL;
	reason = tp_parse_quoted(skb, w);
	if (reason)
		return reason;
	if (!tp_same(&w->quoted.saddr, &w->p.t.daddr))
		return TP_DROP_MALFORMED;
	ct = tp_ct_find(w, &w->quoted);
	if (!ct || tp_ct_expired(w->quoted.proto, ct, tp_now())) {
		w->origin = w->p.t;
		reason = tp_judge(w, cfg, w->own_node == TP_OWN_YES);
		if (!reason)
			tp_resolve_via(w);
		return reason;
	}
	stale = tp_ct_stale(ct, revision);
	if (stale) {
		/* The entry stays as it is: with the connection's next packet its way is looked up too. */
		tp_origin_is(w, &w->quoted, tp_ct_forward(w, ct));
		reason = tp_judge(w, cfg, ct->ingress_rule == TP_RULE_OWN_NODE);
	} else {
		reason = tp_ct_denied(w, ct);
	}
	if (reason)
		return reason;
	/* The opener knows of the Service only. */
	if ((ct->flags & TP_CT_DNAT) && tp_ct_forward(w, ct)) {
		w->restore = 1;
		w->nat.daddr = ct->vip;
		w->nat.dport = ct->vport;
	}
	if (!(ct->flags & TP_CT_VIA_TUNNEL) || (stale && w->resolve)) {
		tp_resolve_via(w);
		return 0;
	}
	w->via = ct->via;
	w->has_via = 1;
	w->by = tp_by_of_ct(ct->flags);
	return 0;
}

#endif
