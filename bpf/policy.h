/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* What the compiled policy says of a flow, in the direction in which it was opened. */
#ifndef TOWPATH_POLICY_H
#define TOWPATH_POLICY_H

static __always_inline __u32 tp_class_of(struct tp_work *w, const struct tp_addr *peer)
{
	__u32 *class_id = bpf_map_lookup_elem(&tp_class_pods, peer);

	if (class_id)
		return *class_id;
	tp_full_prefix(&w->cidr, peer);
	class_id = bpf_map_lookup_elem(&tp_class_cidrs, &w->cidr);
	return class_id ? *class_id : 0;
}

/* Judges w->origin by one set. Leaves the rule in w->rule. */
static __noinline __u32 tp_judge_set(struct tp_work *w, __u32 set, const struct tp_addr *peer)
{
	__u8 proto = w->origin.proto;
	struct tp_rule *rule;
	__u32 *local;

	if (!set) {
		w->rule = TP_RULE_NOT_ISOLATED;
		return TP_VERDICT_ALLOW;
	}
	w->j.isolated = 1;
	w->set_class.set = set;
	w->set_class.class_id = tp_class_of(w, peer);
	local = bpf_map_lookup_elem(&tp_set_class, &w->set_class);
	w->rule_key.prefixlen = 80 + 16;
	w->rule_key.set = set;
	w->rule_key.local_class = local ? *local : 0;
	w->rule_key.proto = tp_has_ports(proto) ? proto : 0;
	w->rule_key.pad = 0;
	w->rule_key.port = tp_has_ports(proto) ? w->origin.dport : 0;
	rule = bpf_map_lookup_elem(&tp_rules, &w->rule_key);
	if (!rule) {
		w->rule = TP_RULE_DEFAULT_DENY;
		return TP_VERDICT_DENY;
	}
	w->rule = rule->rule_id;
	return rule->verdict;
}

static __always_inline void tp_end_of(struct tp_ct_end *end, const struct tp_pod *pod)
{
	end->ifindex = pod->ifindex;
	__builtin_memcpy(end->mac, pod->mac, 6);
	__builtin_memcpy(end->host_mac, pod->host_mac, 6);
}

static __always_inline int tp_pods_differ(const struct tp_pod *one, const struct tp_pod *other)
{
	const __u32 *a = (const __u32 *)one, *b = (const __u32 *)other;
	__u32 differ = 0;

#pragma unroll
	for (int i = 0; i < sizeof(*one) / 4; i++)
		differ |= a[i] ^ b[i];
	return differ;
}

/* NetworkPolicy: "a Pod cannot block access to itself". That the source is the pod's own the hooks have checked. */
static __always_inline void tp_judge_self(struct tp_judgement *j, const struct tp_pod *pod)
{
	j->pod_id = pod->pod_id;
	tp_end_of(&j->from, pod);
	tp_end_of(&j->to, pod);
	j->egress_verdict = TP_VERDICT_ALLOW;
	j->ingress_verdict = TP_VERDICT_ALLOW;
	j->egress_rule = TP_RULE_SELF;
	j->ingress_rule = TP_RULE_SELF;
}

/*
 * Copies a pod's entry; 0: none has the address. An update frees the old entry at once, and the kernel may give its
 * memory to another key while it is copied here (maps that are not preallocated, since 6.1). What was copied is believed
 * only if the key still leads to the same. An entry that does not hold still is taken for one of which nothing is known yet:
 * whoever changed it raises the revision when done, and the flow is judged again.
 *
 * Not so for the other maps of policy. Nodes of prefix trees (tp_rules, tp_class_cidrs, tp_peers) are freed after a grace
 * period. Of tp_class_pods and tp_set_class one word is read; if it is another key's, the key's own was being changed, and
 * the revision is raised after that too.
 */
static __noinline int tp_pod_copy(struct tp_pod *copy, const struct tp_addr *addr)
{
	for (int i = 0; i < 2; i++) {
		struct tp_pod *pod = bpf_map_lookup_elem(&tp_pods, addr);

		if (!pod)
			return 0;
		*copy = *pod;
		barrier();
		pod = bpf_map_lookup_elem(&tp_pods, addr);
		if (pod && !tp_pods_differ(copy, pod))
			return 1;
	}
	copy->flags |= TP_POD_HOST_ONLY;
	return 1;
}

/*
 * Judges w->origin at both ends, as far as they are pods of this node. `own_node`: the responder sees a packet that its
 * own node generated.
 */
TP_APART __u32 tp_judge(struct tp_work *w, const struct tp_node_config *cfg, __u32 own_node)
{
	struct tp_judgement *j;
	struct tp_pod *from, *to;

	if (!w || !cfg)
		return TP_DROP_INTERNAL;
	j = &w->j;
	__builtin_memset(j, 0, sizeof(*j));
	if (tp_is_hairpin(&w->origin.saddr) && tp_pod_copy(&w->to, &w->origin.daddr)) {
		tp_judge_self(j, &w->to);
		/* The address that stands for the pod is nowhere, and nothing is known of who writes it. */
		__builtin_memset(&j->from, 0, sizeof(j->from));
		return 0;
	}
	from = tp_pod_copy(&w->from, &w->origin.saddr) ? &w->from : NULL;
	if (from && tp_same(&w->origin.saddr, &w->origin.daddr)) {
		tp_judge_self(j, from);
		return 0;
	}
	if (from) {
		j->pod_id = from->pod_id;
		tp_end_of(&j->from, from);
		if (from->flags & TP_POD_HOST_ONLY) {
			j->isolated = 1;
			j->egress_rule = TP_RULE_HOST_ONLY;
			j->egress_verdict = tp_is_own_node(cfg, &w->origin.daddr) ? TP_VERDICT_ALLOW : TP_VERDICT_DENY;
		} else {
			j->egress_verdict = tp_judge_set(w, from->egress_set, &w->origin.daddr);
			j->egress_rule = w->rule;
			j->egress_audit = from->egress_audit_set;
		}
	}
	to = tp_pod_copy(&w->to, &w->origin.daddr) ? &w->to : NULL;
	if (to) {
		if (!j->pod_id)
			j->pod_id = to->pod_id;
		tp_end_of(&j->to, to);
		if (own_node) {
			if (!from)
				j->pod_id = TP_HOLDER_NODE;
			j->ingress_verdict = TP_VERDICT_ALLOW;
			j->ingress_rule = TP_RULE_OWN_NODE;
		} else if (to->flags & TP_POD_HOST_ONLY) {
			j->isolated = 1;
			j->ingress_verdict = TP_VERDICT_DENY;
			j->ingress_rule = TP_RULE_HOST_ONLY;
		} else {
			j->ingress_verdict = tp_judge_set(w, to->ingress_set, &w->origin.saddr);
			j->ingress_rule = w->rule;
			j->ingress_audit = to->ingress_audit_set;
		}
	}
	if (j->egress_verdict == TP_VERDICT_DENY) {
		w->rule = j->egress_rule;
		return TP_DROP_EGRESS_POLICY;
	}
	w->rule = j->ingress_rule;
	if (j->ingress_verdict == TP_VERDICT_DENY)
		return TP_DROP_INGRESS_POLICY;
	return 0;
}

/* Counts a connection that passes and would be denied by a set that is only audited, by w->rule. */
static __always_inline void tp_would_deny(struct tp_work *w, __u32 reason, __u32 set)
{
	struct tp_audited *audited;

	tp_count(reason, 0);
	w->audit_key.set = set;
	w->audit_key.rule = w->rule;
	audited = bpf_map_lookup_elem(&tp_audited, &w->audit_key);
	if (!audited) {
		w->audited.connections = 0;
		w->audited.last = 0;
		/* There already: another CPU's doing. No room: tp_counters has it all the same. */
		bpf_map_update_elem(&tp_audited, &w->audit_key, &w->audited, BPF_NOEXIST);
		audited = bpf_map_lookup_elem(&tp_audited, &w->audit_key);
	}
	if (audited) {
		__sync_fetch_and_add(&audited->connections, 1);
		audited->last = tp_now();
	}
	tp_tell_audit(reason, set);
}

/*
 * Judges a connection that passes once more, by the sets that tp_judge has just left in w->j: those with the policies that are only audited. It
 * changes nothing about the packet.
 */
TP_APART int tp_audit(void)
{
	struct tp_work *w = tp_work();
	__u32 isolated, rule;

	if (!w)
		return 0;
	isolated = w->j.isolated;
	rule = w->rule;
	if (w->j.egress_audit && tp_judge_set(w, w->j.egress_audit, &w->origin.daddr) == TP_VERDICT_DENY)
		tp_would_deny(w, TP_AUDIT_EGRESS, w->j.egress_audit);
	if (w->j.ingress_audit && tp_judge_set(w, w->j.ingress_audit, &w->origin.saddr) == TP_VERDICT_DENY)
		tp_would_deny(w, TP_AUDIT_INGRESS, w->j.ingress_audit);
	w->j.isolated = isolated;
	w->rule = rule;
	return 0;
}

/* Under which audit sets w->j is to be counted: 0 if under none. A hash: two pairs of sets that share one cost a connection that is open
 * when they change its second count. */
static __always_inline __u16 tp_audit_mark(const struct tp_judgement *j)
{
	__u32 mixed = j->egress_audit * 0x9e3779b1u + j->ingress_audit * 0x85ebca6bu;
	__u16 mark = mixed >> 16;

	if (!(j->egress_audit | j->ingress_audit))
		return 0;
	return mark ? mark : 1;
}

#endif
