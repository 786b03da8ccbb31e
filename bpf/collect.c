/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The collector deletes what is idle. User space runs it every few seconds, in a process that can be preempted; when user
 * space has not come for a while, a timer does it, in the softirq of one CPU. And what user space asks to be deleted.
 */

#define COLLECT_EVERY (5 * NSEC_PER_SEC)
#define COLLECT_ALONE (30 * NSEC_PER_SEC)
#define CROWDED (5 * NSEC_PER_SEC)
#define CLOCK_MONOTONIC 1

/* Connections to backends that are no pods: of more than these, what is not established is not waited for. */
#define SNAT_MANY 8192

struct tp_sweep {
	__u64 now;
	struct tp_removed removed;
	__u32 crowded;
	__u32 pad;
};

/* Not established, idle for a moment, and of a pod that has all of its share while others may soon need theirs. */
static __always_inline int tp_ct_crowds(const struct tp_ct *ct, __u64 now)
{
	__u64 last_seen = ct->last_seen;
	struct tp_budget *budget;
	struct tp_flows *flows;
	__u32 zero = 0, pod = ct->pod_id;
	__u32 *held;

	if ((ct->flags & TP_CT_ESTABLISHED) || now <= last_seen || now - last_seen < CROWDED)
		return 0;
	budget = bpf_map_lookup_elem(&tp_budget, &zero);
	held = bpf_map_lookup_elem(&tp_held, &zero);
	flows = bpf_map_lookup_elem(&tp_flows, &pod);
	return budget && held && flows && (__s32)flows->held > (__s32)budget->share && *held > budget->room / 2;
}

static long tp_collect_ct(void *map, struct tp_ct_key *key, struct tp_ct *ct, struct tp_sweep *sweep)
{
	int removed;

	if (!tp_ct_expired(key->proto, ct, sweep->now) && !tp_ct_crowds(ct, sweep->now))
		return 0;
	removed = tp_ct_remove(key, ct);
	sweep->removed.connections += !!removed;
	sweep->removed.translations += removed == 2;
	return 0;
}

/* A translation goes with its connection. This finds what was left when two CPUs worked on one. */
static long tp_collect_nat(void *map, struct tp_tuple *sent, struct tp_nat *nat, struct tp_sweep *sweep)
{
	struct tp_ct_key key = {};
	struct tp_tuple t = *sent;
	struct tp_ct *ct;
	__u8 from_a;

	t.daddr = nat->daddr;
	t.dport = nat->dport;
	tp_tell_ends_apart(&t);
	from_a = tp_ct_key_of(&key, &t);
	ct = bpf_map_lookup_elem(&tp_ct, &key);
	if (ct && (ct->flags & TP_CT_DNAT) && !(ct->flags & TP_CT_FROM_A) == !from_a && ct->vport == sent->dport &&
	    tp_same(&ct->vip, &sent->daddr))
		return 0;
	sweep->removed.translations += tp_nat_delete(sent, nat);
	return 0;
}

/* Goes when it is idle, or nothing leads to it; of many, also what is not established and idle for a moment. */
static long tp_collect_snat(void *map, struct tp_tuple *answer, struct tp_snat *snat, struct tp_sweep *sweep)
{
	__u64 last_seen = snat->last_seen, created = snat->created;
	int over = tp_snat_over(answer->proto, snat, sweep->now), removed;
	struct tp_tuple sent;

	if (!over && sweep->crowded)
		over = !(snat->flags & TP_CT_ESTABLISHED) && sweep->now > last_seen && sweep->now - last_seen > CROWDED;
	if (!over) {
		tp_snat_sent_of(&sent, snat, answer->proto);
		/* It is entered a moment before what leads to it. */
		over = !tp_snat_leads(bpf_map_lookup_elem(&tp_snat_asked, &sent), answer) && sweep->now > created &&
		       sweep->now - created > NSEC_PER_SEC;
	}
	if (!over)
		return 0;
	removed = tp_snat_remove(answer, snat);
	sweep->removed.connections += !!removed;
	sweep->removed.translations += removed == 2;
	return 0;
}

/* What leads to nothing. */
static long tp_collect_asked(void *map, struct tp_tuple *sent, struct tp_snat_way *way, struct tp_sweep *sweep)
{
	struct tp_tuple answer;
	struct tp_snat *snat;

	tp_snat_answer_of(&answer, way, sent->proto);
	snat = bpf_map_lookup_elem(&tp_snat, &answer);
	if (!snat || !tp_snat_is_of(snat, sent))
		sweep->removed.translations += tp_snat_forget(sent, way);
	return 0;
}

static __noinline void tp_collect_all(struct tp_sweep *sweep)
{
	/* The fine clock: programs of this kind are not given the coarse one, which is at most a tick behind. */
	sweep->now = tp_now_exact();
	bpf_for_each_map_elem(&tp_ct, tp_collect_ct, sweep, 0);
	bpf_for_each_map_elem(&tp_nat, tp_collect_nat, sweep, 0);
	sweep->crowded = 0;
	if (bpf_for_each_map_elem(&tp_snat, tp_collect_snat, sweep, 0) > SNAT_MANY) {
		sweep->crowded = 1;
		bpf_for_each_map_elem(&tp_snat, tp_collect_snat, sweep, 0);
	}
	bpf_for_each_map_elem(&tp_snat_asked, tp_collect_asked, sweep, 0);
}

static int tp_collector_fires(void *map, __u32 *index, struct tp_collector *collector)
{
	struct tp_sweep sweep = {};

	if (tp_now_exact() - collector->last_run >= COLLECT_ALONE)
		tp_collect_all(&sweep);
	bpf_timer_start(&collector->timer, COLLECT_EVERY, 0);
	return 0;
}

/* Run once at load. A timer that an earlier load armed is taken over: it goes on with this code. */
SEC("syscall")
int tp_arm(void *ctx)
{
	__u32 zero = 0;
	struct tp_collector *collector = bpf_map_lookup_elem(&tp_collector, &zero);

	if (!collector)
		return 1;
	/* EBUSY: it is there already. */
	bpf_timer_init(&collector->timer, &tp_collector, CLOCK_MONOTONIC);
	if (bpf_timer_set_callback(&collector->timer, tp_collector_fires))
		return 2;
	return bpf_timer_start(&collector->timer, COLLECT_EVERY, 0) ? 3 : 0;
}

SEC("syscall")
int tp_collect(struct tp_removed *removed)
{
	struct tp_sweep sweep = {};
	__u32 zero = 0;
	struct tp_collector *collector = bpf_map_lookup_elem(&tp_collector, &zero);

	tp_collect_all(&sweep);
	if (collector)
		collector->last_run = sweep.now;
	*removed = sweep.removed;
	return 0;
}

static __always_inline int tp_purged(const struct tp_purge *purge, const struct tp_addr *one, const struct tp_addr *other)
{
#pragma unroll
	for (int i = 0; i < 12; i++) {
		if (i < purge->count && (tp_same(one, &purge->addrs[i]) || tp_same(other, &purge->addrs[i])))
			return 1;
	}
	return 0;
}

static long tp_purge_ct(void *map, struct tp_ct_key *key, struct tp_ct *ct, struct tp_purge *purge)
{
	if (tp_purged(purge, &key->addr_a, &key->addr_b))
		purge->removed += tp_ct_remove(key, ct);
	return 0;
}

static long tp_purge_nat(void *map, struct tp_tuple *sent, struct tp_nat *nat, struct tp_purge *purge)
{
	if (tp_purged(purge, &sent->saddr, &nat->daddr))
		purge->removed += tp_nat_delete(sent, nat);
	return 0;
}

SEC("syscall")
int tp_purge(struct tp_purge *asked)
{
	struct tp_purge purge = *asked;	/* callbacks are given a place on the stack only */

	purge.removed = 0;
	bpf_for_each_map_elem(&tp_ct, tp_purge_ct, &purge, 0);
	bpf_for_each_map_elem(&tp_nat, tp_purge_nat, &purge, 0);
	asked->removed = purge.removed;
	return 0;
}

/* One translation, as its client sends; 1: it was there. */
SEC("syscall")
int tp_untranslate(struct tp_tuple *asked)
{
	struct tp_tuple sent = *asked;
	struct tp_nat *nat = bpf_map_lookup_elem(&tp_nat, &sent);
	struct tp_snat_way *way;

	if (nat)
		return tp_nat_delete(&sent, nat);
	way = bpf_map_lookup_elem(&tp_snat_asked, &sent);
	return way ? tp_snat_forget(&sent, way) : 0;
}

static long tp_release_nat(void *map, struct tp_tuple *sent, struct tp_nat *nat, struct tp_sweep *sweep)
{
	__u32 backend = nat->backend;

	if (!bpf_map_lookup_elem(&tp_backends, &backend))
		sweep->removed.translations += tp_nat_delete(sent, nat);
	return 0;
}

/* The collector then finds what it led to. */
static long tp_release_asked(void *map, struct tp_tuple *sent, struct tp_snat_way *way, struct tp_sweep *sweep)
{
	__u32 backend = way->backend_id;

	if (!bpf_map_lookup_elem(&tp_backends, &backend))
		sweep->removed.translations += tp_snat_forget(sent, way);
	return 0;
}

SEC("syscall")
int tp_release(struct tp_removed *removed)
{
	struct tp_sweep sweep = {};

	bpf_for_each_map_elem(&tp_nat, tp_release_nat, &sweep, 0);
	bpf_for_each_map_elem(&tp_snat_asked, tp_release_asked, &sweep, 0);
	*removed = sweep.removed;
	return 0;
}

SEC("syscall")
int tp_adjust(struct tp_adjust *adjust)
{
	struct tp_flows *flows = tp_flows_of(adjust->pod);
	__u32 *all = tp_held_by_all();

	if (flows)
		__sync_fetch_and_add(&flows->held, adjust->change);
	if (all)
		__sync_fetch_and_add(all, adjust->all);
	return 0;
}
