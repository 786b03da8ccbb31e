/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Who may enter how many connections, and their deletion: see tp_flows in abi.h.
 *
 * The account is exact. An entry is counted up before its key is inserted, by who then inserts it (BPF_NOEXIST: a key is
 * inserted once), and counted down after the key is deleted, by whose deletion succeeded. A key keeps the pod that it is
 * counted to until it is deleted. So nobody ever holds more than is counted, and what is counted is held or about to be.
 * (The sum of all is exact in any case. Whose it was, is read just before the deletion: were the key deleted and inserted for
 * another pod by other CPUs in between, one would be counted to the wrong one of the two. Counts are read as signed for that.)
 * Nothing here is touched by a packet of a connection that has its entry.
 */
#ifndef TOWPATH_BUDGET_H
#define TOWPATH_BUDGET_H

#define EEXIST 17
#define OPENINGS 128			/* places of tp_flows.ring */
#define RECYCLE_TRIES 8

static __always_inline struct tp_ct_key *tp_opening(struct tp_flows *flows, __u32 place)
{
	return &flows->ring[(place / 32) % 4].keys[place % 32];
}

static __always_inline struct tp_flows *tp_flows_of(__u32 pod)
{
	return bpf_map_lookup_elem(&tp_flows, &pod);
}

static __always_inline __u32 *tp_held_by_all(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&tp_held, &zero);
}

static __always_inline void tp_uncount(__u32 pod)
{
	struct tp_flows *flows = tp_flows_of(pod);
	__u32 *all = tp_held_by_all();

	if (flows)
		__sync_fetch_and_sub(&flows->held, 1);
	if (all)
		__sync_fetch_and_sub(all, 1);
}

static __always_inline void tp_load_flow(__u32 backend, int change)
{
	__u32 zero = 0, *kept = bpf_map_lookup_elem(&tp_loads_kept, &zero);
	struct tp_load *load;

	if (!kept || !*kept)
		return;
	load = bpf_map_lookup_elem(&tp_loads, &backend);
	if (load)
		__sync_fetch_and_add(&load->flows, change);
}

/* Deletes a translation, whose entry `nat` is; whether it was there. */
static __always_inline int tp_nat_delete(const struct tp_tuple *sent, const struct tp_nat *nat)
{
	__u32 backend = nat->backend;	/* before: afterwards the entry's memory may be another's */

	if (bpf_map_delete_elem(&tp_nat, sent))
		return 0;
	tp_load_flow(backend, -1);
	return 1;
}

/* The revision under which a connection may pass at all ends that are here; 0: there is none. */
static __always_inline __u32 tp_ct_judged_under(const struct tp_ct *ct)
{
	__u64 egress = ct->egress, ingress = ct->ingress;

	if ((egress && egress >> 32 != TP_VERDICT_ALLOW) || (ingress && ingress >> 32 != TP_VERDICT_ALLOW))
		return 0;
	if (egress && ingress && egress != ingress)
		return 0;
	return egress ? egress : ingress;
}

/* The entry of w->sent that leads to `ct`, which w->key has. */
static __always_inline void tp_nat_fill(struct tp_work *w, const struct tp_ct *ct)
{
	struct tp_nat *nat = &w->nat;

	nat->daddr = w->lb.backend.addr;
	nat->dport = w->lb.backend.port;
	__builtin_memset(nat->pad, 0, sizeof(nat->pad));
	nat->backend = w->lb.backend_id;
	nat->mark = tp_mark_of(&w->sent);
	nat->fresh = 0;
	/* Of what a pod sends itself both ends are the same, and it goes back the way it came. */
	nat->revision = tp_is_hairpin(&w->p.t.saddr) ? 0 : tp_ct_judged_under(ct);
	nat->by = tp_by_of_ct(ct->flags);
	/* After the revision: see tp_rejudge. */
	barrier();
	nat->from = w->from_a ? ct->a : ct->b;
	nat->to = w->from_a ? ct->b : ct->a;
	if (ct->flags & TP_CT_VIA_TUNNEL)
		nat->via = ct->via;
	else
		__builtin_memset(&nat->via, 0, sizeof(nat->via));
}

static __always_inline int tp_nat_enter(struct tp_work *w, const struct tp_ct *ct)
{
	struct tp_nat *old;
	long err;

	tp_nat_fill(w, ct);
	err = bpf_map_update_elem(&tp_nat, &w->sent, &w->nat, BPF_NOEXIST);
	if (!err) {
		tp_load_flow(w->nat.backend, 1);
		return 0;
	}
	if (err != -EEXIST)
		return err;
	old = bpf_map_lookup_elem(&tp_nat, &w->sent);
	if (old && old->backend != w->nat.backend) {
		tp_load_flow(old->backend, -1);
		tp_load_flow(w->nat.backend, 1);
	}
	return bpf_map_update_elem(&tp_nat, &w->sent, &w->nat, BPF_ANY);
}

/* What the opener of a translated connection sends, its key in tp_nat. */
static __always_inline void tp_nat_key_of(struct tp_tuple *sent, const struct tp_ct_key *key, const struct tp_ct *ct)
{
	int from_a = ct->flags & TP_CT_FROM_A;

	sent->saddr = from_a ? key->addr_a : key->addr_b;
	if (tp_is_hairpin(&sent->saddr))
		sent->saddr = from_a ? key->addr_b : key->addr_a;
	sent->sport = from_a ? key->port_a : key->port_b;
	sent->daddr = ct->vip;
	sent->dport = ct->vport;
	sent->proto = key->proto;
	__builtin_memset(sent->pad, 0, sizeof(sent->pad));
}

/* Deletes a translation that led to the connection of `key`, opened from side A or B; how many. The client may have gone on
 * to another backend by the same Service: that is not this connection's. */
static __always_inline int tp_nat_forget(const struct tp_tuple *sent, const struct tp_ct_key *key, __u32 from_a)
{
	struct tp_nat *nat = bpf_map_lookup_elem(&tp_nat, sent);

	if (!nat)
		return 0;
	if (from_a ? nat->dport != key->port_b || !tp_same(&nat->daddr, &key->addr_b) :
		     nat->dport != key->port_a || !tp_same(&nat->daddr, &key->addr_a))
		return 0;
	return tp_nat_delete(sent, nat);
}

/*
 * Deletes an entry, the translation that led to it, and what its pod is counted for it. How many were deleted, translation
 * included: 0 if another was first.
 */
static __noinline int tp_ct_remove(const struct tp_ct_key *key, const struct tp_ct *ct)
{
	__u32 pod = ct->pod_id, flags = ct->flags;
	struct tp_tuple sent;

	/* Before the deletion: afterwards the entry's memory may be another's. */
	tp_nat_key_of(&sent, key, ct);
	if (bpf_map_delete_elem(&tp_ct, key))
		return 0;
	tp_uncount(pod);
	if (!(flags & TP_CT_DNAT))
		return 1;
	return 1 + tp_nat_forget(&sent, key, flags & TP_CT_FROM_A);
}

/* Deletes the oldest of a pod's latest openings that is not established; its place in the ring, -1: there is none. */
static __always_inline int tp_recycle(struct tp_work *w, struct tp_flows *flows)
{
	for (int i = 0; i < RECYCLE_TRIES; i++) {
		__u32 place = __sync_fetch_and_add(&flows->next, 1) % OPENINGS;
		struct tp_ct *ct;

		w->recycled = *tp_opening(flows, place);
		ct = bpf_map_lookup_elem(&tp_ct, &w->recycled);
		/* The place may be being written by another CPU: nobody's but the pod's own entry is looked for. */
		if (!ct || ct->pod_id != w->fresh.pod_id || (ct->flags & TP_CT_ESTABLISHED))
			continue;
		if (!tp_ct_remove(&w->recycled, ct))
			continue;
		tp_count(TP_CT_RECYCLED, 0);
		return place;
	}
	return -1;
}

static __always_inline int tp_may_hold_more(const struct tp_flows *flows, const struct tp_budget *budget, __u32 all)
{
	__s32 held = flows->held;

	if (held < (__s32)budget->share)
		return 1;
	return all < budget->room && (__u32)held < 2 * (budget->room - all);
}

/* Counts w->key to pod w->fresh.pod_id, which then may enter it. 0, or why it may not. */
static __noinline __u32 tp_admit(struct tp_work *w)
{
	struct tp_flows *flows = tp_flows_of(w->fresh.pod_id);
	__u32 *all = tp_held_by_all();
	struct tp_budget *budget;
	__u32 zero = 0;
	int place;

	if (!flows) {
		w->fresh.pod_id = TP_HOLDER_OTHERS;
		flows = tp_flows_of(TP_HOLDER_OTHERS);
	}
	budget = bpf_map_lookup_elem(&tp_budget, &zero);
	if (!flows || !all || !budget)
		return TP_DROP_INTERNAL;
	if (tp_may_hold_more(flows, budget, *all))
		place = __sync_fetch_and_add(&flows->next, 1) % OPENINGS;
	else
		place = tp_recycle(w, flows);
	if (place < 0)
		return TP_DROP_CT_BUDGET;
	*tp_opening(flows, place) = w->key;
	__sync_fetch_and_add(&flows->held, 1);
	__sync_fetch_and_add(all, 1);
	return 0;
}

#endif
