/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Connections of clients outside to backends that are no pods (tp_snat and tp_snat_asked, see abi.h): their tables. What becomes of the
 * packets: far.h.
 *
 * A connection has two entries: the answers' tuple, which is the claim to the source port and keeps the state, and the client's, which leads
 * to it. The first is entered first and deleted last but one look: who finds the second without the first, or with another client's, takes
 * it for gone; what is left alone by two CPUs that worked on one connection the collector finds. Nothing of an entry changes but
 * `last_seen` and `flags`, but its memory may be given to another key once it is deleted (maps that are not preallocated, since
 * Linux 6.1): so what was copied is believed only when it agrees with the key.
 *
 * A backend that is in no node's range is taken for one outside. It may be a pod whose node is not known yet: so of a connection that nobody
 * has answered that is asked again at each packet, and not once.
 */
#ifndef TOWPATH_SNAT_H
#define TOWPATH_SNAT_H

static __always_inline int tp_snat_has_port(__be16 port)
{
	return bpf_ntohs(port) >= TP_SNAT_PORT_MIN;
}

/* Whether nothing more of it is expected. */
static __always_inline int tp_snat_over(__u8 proto, const struct tp_snat *snat, __u64 now)
{
	__u64 last_seen = snat->last_seen;

	/* The coarse clock of another CPU may be a tick ahead. */
	return now > last_seen && now - last_seen > tp_ct_idle_limit(proto, snat->flags);
}

/* Whether it is the connection of what the client sends. */
static __always_inline int tp_snat_is_of(const struct tp_snat *snat, const struct tp_tuple *sent)
{
	return snat->client_port == sent->sport && snat->vport == sent->dport && tp_same(&snat->client, &sent->saddr) &&
	       tp_same(&snat->vip, &sent->daddr);
}

static __always_inline void tp_snat_sent_of(struct tp_tuple *sent, const struct tp_snat *snat, __u8 proto)
{
	sent->saddr = snat->client;
	sent->daddr = snat->vip;
	sent->sport = snat->client_port;
	sent->dport = snat->vport;
	sent->proto = proto;
	__builtin_memset(sent->pad, 0, sizeof(sent->pad));
}

static __always_inline void tp_snat_answer_of(struct tp_tuple *answer, const struct tp_snat_way *way, __u8 proto)
{
	answer->saddr = way->backend;
	answer->daddr = way->source;
	answer->sport = way->backend_port;
	answer->dport = way->source_port;
	answer->proto = proto;
	__builtin_memset(answer->pad, 0, sizeof(answer->pad));
}

/* Deletes what leads to a connection, whose entry `way` is; whether it was there. */
static __always_inline int tp_snat_forget(const struct tp_tuple *sent, const struct tp_snat_way *way)
{
	__u32 backend = way->backend_id;	/* before: afterwards the entry's memory may be another's */

	if (bpf_map_delete_elem(&tp_snat_asked, sent))
		return 0;
	tp_load_flow(backend, -1);
	return 1;
}

/* Whether the entry of `sent` leads to `answer`; then it is `way`. */
static __always_inline int tp_snat_leads(const struct tp_snat_way *way, const struct tp_tuple *answer)
{
	return way && way->source_port == answer->dport && way->backend_port == answer->sport &&
	       tp_same(&way->source, &answer->daddr) && tp_same(&way->backend, &answer->saddr);
}

/* Deletes a connection: the answers' tuple, whose entry `snat` is, and what leads to it. How many entries. */
static __noinline int tp_snat_remove(const struct tp_tuple *answer, const struct tp_snat *snat)
{
	struct tp_tuple sent;
	struct tp_snat_way *way;
	int removed = 0;

	tp_snat_sent_of(&sent, snat, answer->proto);
	way = bpf_map_lookup_elem(&tp_snat_asked, &sent);
	if (tp_snat_leads(way, answer))
		removed = tp_snat_forget(&sent, way);
	return removed + !bpf_map_delete_elem(&tp_snat, answer);
}

/* A client's port may come round: its SYN then begins another connection, unless the former one is open yet (see tp_is_new_connection). */
static __always_inline int tp_snat_begins_anew(const struct tp_work *w, __u32 flags)
{
	return w->sent.proto == IPPROTO_TCP && (w->p.flags & TP_PKT_OPENS) && CT_CLOSED(flags);
}

/* Whether w->way keeps the client's own address and port: the backend is this node. */
static __always_inline int tp_snat_keeps(const struct tp_work *w)
{
	return w->way.source_port == w->sent.sport && tp_same(&w->way.source, &w->sent.saddr);
}

/* Whether the backend of w->way has come to be in a node's range: a pod's address, to which there is another way. */
static __always_inline int tp_snat_is_of_pod(struct tp_work *w)
{
	struct tp_peer *peer;

	tp_full_prefix(&w->cidr, &w->way.backend);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	return peer && !(peer->flags & TP_PEER_NODE);
}

/* Whether earlier packets of w->sent went to what is no pod: then w->way and w->answer say how. */
static __noinline int tp_snat_known(struct tp_work *w)
{
	struct tp_snat_way *way = bpf_map_lookup_elem(&tp_snat_asked, &w->sent);
	struct tp_snat *snat;

	if (!way)
		return 0;
	w->way = *way;
	tp_snat_answer_of(&w->answer, &w->way, w->sent.proto);
	snat = bpf_map_lookup_elem(&tp_snat, &w->answer);
	if (snat && tp_snat_is_of(snat, &w->sent)) {
		if (!tp_snat_over(w->sent.proto, snat, tp_now()) && !tp_snat_begins_anew(w, snat->flags) &&
		    ((snat->flags & TP_CT_REPLIED) || tp_snat_keeps(w) || !tp_snat_is_of_pod(w)))
			return 1;
		tp_snat_remove(&w->answer, snat);
		return 0;
	}
	tp_snat_forget(&w->sent, &w->way);
	return 0;
}

/*
 * Whether `answer` is what a backend answers to such a client: then w->snat holds whom, and w->answer is the key. `opens`: the packet begins
 * a connection, so it answers nothing.
 */
static __noinline int tp_snat_answered(struct tp_work *w, const struct tp_tuple *answer, __u32 opens)
{
	struct tp_snat *snat;

	w->answer = *answer;
	snat = bpf_map_lookup_elem(&tp_snat, &w->answer);
	if (!snat || opens)
		return 0;
	w->snat = *snat;
	barrier();
	snat = bpf_map_lookup_elem(&tp_snat, &w->answer);
	return snat && snat->client_port == w->snat.client_port && snat->vport == w->snat.vport &&
	       tp_same(&snat->client, &w->snat.client) && tp_same(&snat->vip, &w->snat.vip) &&
	       !tp_snat_over(w->answer.proto, snat, tp_now());
}

/* What a packet of w->answer's connection tells of its state; see tp_ct_observe. */
static __always_inline void tp_snat_observe(const struct tp_work *w, int reply)
{
	struct tp_snat *snat = bpf_map_lookup_elem(&tp_snat, &w->answer);
	__u64 now = tp_now();
	__u32 add = 0, flags;

	if (!snat)
		return;
	flags = snat->flags;
	if (reply)
		add |= TP_CT_REPLIED;
	else if ((flags & TP_CT_REPLIED) && (w->p.t.proto != IPPROTO_TCP || (w->p.tcp_flags & (TCP_ACK | TCP_SYN)) == TCP_ACK))
		add |= TP_CT_ESTABLISHED;
	if (w->p.t.proto == IPPROTO_TCP) {
		if (w->p.tcp_flags & TCP_RST)
			add |= TP_CT_RST;
		if (w->p.tcp_flags & TCP_FIN)
			add |= reply ? TP_CT_FIN_B : TP_CT_FIN_A;
	}
	if (add & ~flags)
		__sync_fetch_and_or(&snat->flags, add);
	if (now > snat->last_seen && now - snat->last_seen > NSEC_PER_SEC)
		snat->last_seen = now;
}

#endif
