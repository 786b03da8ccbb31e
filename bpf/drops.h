/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Drops, told as they happen to whoever listens. Nothing that passes comes here; and a flood of what does not is told in part, so that
 * who sends it costs the node no more than it did.
 */
#ifndef TOWPATH_DROPS_H
#define TOWPATH_DROPS_H

/* Told at most on one CPU in a span of time. */
#define TOLD_SPAN (10 * 1000 * 1000ULL)	/* ns */
#define TOLD_MAX 100

/* A hook that drops what it has not parsed says so: the tuple is an earlier packet's. */
static __always_inline void tp_nothing_read(struct tp_work *w)
{
	__builtin_memset(&w->p, 0, sizeof(w->p));
	w->translated = 0;
}

static __always_inline int tp_may_tell(__u64 now)
{
	__u32 zero = 0;
	struct tp_told *told = bpf_map_lookup_elem(&tp_told, &zero);

	if (!told)
		return 0;
	if (now - told->since > TOLD_SPAN) {
		told->since = now;
		told->count = 0;
	}
	if (told->count >= TOLD_MAX) {
		told->untold++;
		return 0;
	}
	told->count++;
	return 1;
}

static __always_inline void tp_untold(void)
{
	__u32 zero = 0;
	struct tp_told *told = bpf_map_lookup_elem(&tp_told, &zero);

	if (told)
		told->untold++;
}

static __always_inline int tp_is_policy(__u32 reason)
{
	return reason == TP_DROP_EGRESS_POLICY || reason == TP_DROP_INGRESS_POLICY;
}

/* What is known of the packet in hand. (A function by itself: so the object's types have the struct, which no map's do.) */
static __noinline int tp_describe(struct tp_dropped *dropped, const struct tp_work *w)
{
	if (!dropped || !w)
		return 0;
	dropped->t = w->p.t;
	dropped->tcp_flags = w->p.tcp_flags;
	dropped->icmp_type = w->p.icmp_type;
	if (!tp_is_zero(&w->p.t.saddr) || !tp_is_zero(&w->p.t.daddr))
		dropped->flags |= TP_DROPPED_TUPLE;
	if (!w->translated)
		return 1;
	dropped->t = w->sent;
	dropped->backend = w->lb.backend.addr;
	dropped->backend_port = w->lb.backend.port;
	dropped->flags |= TP_DROPPED_TRANSLATED;
	return 1;
}

/* Room for what is to be told; NULL: nobody listens, or too much was told just now. Ends with bpf_ringbuf_submit. */
static __always_inline struct tp_dropped *tp_tell_begin(__u32 reason)
{
	__u32 zero = 0, *watched = bpf_map_lookup_elem(&tp_watched, &zero);
	struct tp_dropped *dropped;
	__u64 now;

	if (!watched || !*watched)
		return NULL;
	now = bpf_ktime_get_ns();
	if (!tp_may_tell(now))
		return NULL;
	dropped = bpf_ringbuf_reserve(&tp_drops, sizeof(*dropped), 0);
	if (!dropped) {
		tp_untold();
		return NULL;
	}
	__builtin_memset(dropped, 0, sizeof(*dropped));
	dropped->at = now;
	dropped->reason = reason;
	return dropped;
}

/* Tells of the packet in w->p. The rule of a denial is in w->rule. */
TP_APART int tp_tell(__u32 reason, __u32 ifindex, __u32 len, __u8 flags)
{
	struct tp_dropped *dropped;
	struct tp_work *w = tp_work();

	/* Housekeeping of links is nobody's loss. */
	if (!w || (reason < TP_DROP_FIRST && reason != TP_REFUSED))
		return 0;
	dropped = tp_tell_begin(reason);
	if (!dropped)
		return 0;
	dropped->ifindex = ifindex;
	dropped->len = len;
	dropped->flags = flags;
	if (tp_is_policy(reason))
		dropped->rule = w->rule;
	tp_describe(dropped, w);
	bpf_ringbuf_submit(dropped, 0);
	return 1;
}

/* Tells of a connection that passes, and would not by w->rule of an audited policy's set. `reason`: TP_AUDIT_EGRESS or TP_AUDIT_INGRESS. */
static __noinline int tp_tell_audit(__u32 reason, __u32 set)
{
	struct tp_work *w = tp_work();
	struct tp_dropped *dropped = w ? tp_tell_begin(reason) : NULL;

	if (!dropped)
		return 0;
	dropped->rule = w->rule;
	dropped->set = set;
	if (tp_same_tuple(&w->origin, &w->p.t)) {
		tp_describe(dropped, w);
	} else {
		/* It was open before, and the packet in hand is an answer, or speaks of it. */
		dropped->t = w->origin;
		dropped->flags |= TP_DROPPED_TUPLE;
	}
	bpf_ringbuf_submit(dropped, 0);
	return 1;
}

/* Tells of a socket that was refused before it sent anything. `client`: the pod, or the node. */
static __noinline int tp_tell_socket(__u32 reason, const struct tp_addr *client, const struct tp_service_key *asked)
{
	struct tp_dropped *dropped = client && asked ? tp_tell_begin(reason) : NULL;

	if (!dropped)
		return 0;
	dropped->t.saddr = *client;
	dropped->t.daddr = asked->addr;
	dropped->t.dport = asked->port;
	dropped->t.proto = asked->proto;
	dropped->flags = TP_DROPPED_TUPLE | TP_DROPPED_SOCKET;
	bpf_ringbuf_submit(dropped, 0);
	return 1;
}

#endif
