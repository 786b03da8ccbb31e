/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Every map. Sizes here are replaced by the loader's limits; what each holds is said in abi.h. */
#ifndef TOWPATH_MAPS_H
#define TOWPATH_MAPS_H

#define TP_MAP(name, kind, k, v, max, extra)		\
	struct {					\
		__uint(type, kind);			\
		__uint(max_entries, max);		\
		__uint(map_flags, extra);		\
		__type(key, k);				\
		__type(value, v);			\
	} name SEC(".maps")

TP_MAP(tp_node_config, BPF_MAP_TYPE_ARRAY, __u32, struct tp_node_config, 1, 0);
TP_MAP(tp_revision, BPF_MAP_TYPE_ARRAY, __u32, __u32, 1, 0);

TP_MAP(tp_pods, BPF_MAP_TYPE_HASH, struct tp_addr, struct tp_pod, 4096, BPF_F_NO_PREALLOC);
TP_MAP(tp_netns_pods, BPF_MAP_TYPE_HASH, __u64, struct tp_netns_pod, 4096, BPF_F_NO_PREALLOC);
TP_MAP(tp_peers, BPF_MAP_TYPE_LPM_TRIE, struct tp_cidr_key, struct tp_peer, 65536, BPF_F_NO_PREALLOC);

TP_MAP(tp_class_pods, BPF_MAP_TYPE_HASH, struct tp_addr, __u32, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_class_cidrs, BPF_MAP_TYPE_LPM_TRIE, struct tp_cidr_key, __u32, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_set_class, BPF_MAP_TYPE_HASH, struct tp_set_class_key, __u32, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_rules, BPF_MAP_TYPE_LPM_TRIE, struct tp_rule_key, struct tp_rule, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_audited, BPF_MAP_TYPE_HASH, struct tp_audit_key, struct tp_audited, 16384, BPF_F_NO_PREALLOC);

TP_MAP(tp_ct, BPF_MAP_TYPE_HASH, struct tp_ct_key, struct tp_ct, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_nat, BPF_MAP_TYPE_HASH, struct tp_tuple, struct tp_nat, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_snat, BPF_MAP_TYPE_HASH, struct tp_tuple, struct tp_snat, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_snat_asked, BPF_MAP_TYPE_HASH, struct tp_tuple, struct tp_snat_way, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_budget, BPF_MAP_TYPE_ARRAY, __u32, struct tp_budget, 1, 0);
TP_MAP(tp_held, BPF_MAP_TYPE_ARRAY, __u32, __u32, 1, 0);
TP_MAP(tp_flows, BPF_MAP_TYPE_HASH, __u32, struct tp_flows, 4096, BPF_F_NO_PREALLOC);
TP_MAP(tp_frags, BPF_MAP_TYPE_LRU_HASH, struct tp_frag_key, struct tp_frag, 8192, 0);

TP_MAP(tp_services, BPF_MAP_TYPE_HASH, struct tp_service_key, struct tp_service, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_slots, BPF_MAP_TYPE_HASH, struct tp_slot_key, struct tp_slot, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_backends, BPF_MAP_TYPE_HASH, __u32, struct tp_backend, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_loads, BPF_MAP_TYPE_HASH, __u32, struct tp_load, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_loads_kept, BPF_MAP_TYPE_ARRAY, __u32, __u32, 1, 0);
TP_MAP(tp_service_bits, BPF_MAP_TYPE_ARRAY, __u32, __u64, (1 << TP_SERVICE_BITS_SHIFT) / 64, 0);
TP_MAP(tp_source_ranges, BPF_MAP_TYPE_LPM_TRIE, struct tp_source_key, __u32, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_service_names, BPF_MAP_TYPE_HASH, __u64, struct tp_addr, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_node_names, BPF_MAP_TYPE_HASH, __u64, struct tp_addr, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_udp_nodes, BPF_MAP_TYPE_HASH, __u64, struct tp_addr, 65536, BPF_F_NO_PREALLOC);
TP_MAP(tp_affinity, BPF_MAP_TYPE_LRU_HASH, struct tp_affinity_key, struct tp_affinity, 32768, 0);
TP_MAP(tp_sock_peer, BPF_MAP_TYPE_SK_STORAGE, int, struct tp_sock_peer, 0, BPF_F_NO_PREALLOC);
TP_MAP(tp_sock_load, BPF_MAP_TYPE_SK_STORAGE, int, struct tp_sock_load, 0, BPF_F_NO_PREALLOC);
TP_MAP(tp_sock_peers, BPF_MAP_TYPE_SK_STORAGE, int, struct tp_sock_peers, 0, BPF_F_NO_PREALLOC);

TP_MAP(tp_counters, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct tp_counter, TP_REASON_MAX, 0);
TP_MAP(tp_trace, BPF_MAP_TYPE_ARRAY, __u32, struct tp_trace, 1, 0);

/* Not pinned: whoever listens does so to the programs that it loaded. */
TP_MAP(tp_watched, BPF_MAP_TYPE_ARRAY, __u32, __u32, 1, 0);
TP_MAP(tp_told, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct tp_told, 1, 0);
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);	/* bytes */
} tp_drops SEC(".maps");

/* Not shared with user space. */
TP_MAP(tp_scratch, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct tp_work, 1, 0);

/*
 * Next hops towards other nodes' tunnel addresses, a direct-mapped cache: a look-up of the kernel's routes costs as much as all the
 * rest of an envelope. A changed route is followed within HOP_LIFE.
 */
#define HOPS 256
#define HOP_LIFE (50 * 1000 * 1000ULL)	/* ns */

struct tp_hop {
	__u64 until;			/* ktime, ns */
	__be32 to;
	__u32 ifindex;
	__u32 mtu;			/* bytes, of the path */
	struct bpf_redir_neigh next;
	__u8 mac[6];			/* inner destination */
	__u8 pad[2];
};
TP_MAP(tp_hops, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct tp_hop, HOPS, 0);

/* The same of IPv6 packets that go as they are, by the tunnel address of the node that they go to: all its pods are behind one next hop. */
struct tp_hop6 {
	__u64 until;			/* ktime, ns; 0: empty */
	struct tp_addr to;
	__u32 ifindex;
	__u32 mtu;
	struct bpf_redir_neigh next;
	__u32 pad;
};

TP_MAP(tp_hops6, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct tp_hop6, HOPS, 0);

/* And those towards nodes' IPv6 tunnel addresses themselves, for headers around packets: another route may lead there than to the pods behind. */
TP_MAP(tp_node_hops6, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct tp_hop6, HOPS, 0);

struct tp_collector {
	struct bpf_timer timer;
	__u64 last_run;
};
TP_MAP(tp_collector, BPF_MAP_TYPE_ARRAY, __u32, struct tp_collector, 1, 0);

/* Set by tests before loading. */
const volatile __u32 tp_testing = 0;

/* Tests have connections be idle for hours, on machines that started a minute ago: there the clock of the programs is ahead by a day. */
#define TESTING_AHEAD (24 * 3600 * 1000000000ULL)

/* ktime, ns, a few milliseconds behind at most. */
static __always_inline __u64 tp_now(void)
{
	return bpf_ktime_get_coarse_ns() + (tp_testing ? TESTING_AHEAD : 0);
}

/* The same, exact: for contexts that run without a device. */
static __always_inline __u64 tp_now_exact(void)
{
	return bpf_ktime_get_ns() + (tp_testing ? TESTING_AHEAD : 0);
}

static __always_inline struct tp_work *tp_work(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&tp_scratch, &zero);
}

static __always_inline const struct tp_node_config *tp_config(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&tp_node_config, &zero);
}

static __always_inline __u32 tp_revision_now(void)
{
	__u32 zero = 0;
	__u32 *revision = bpf_map_lookup_elem(&tp_revision, &zero);

	return revision && *revision ? *revision : 1;
}

static __always_inline void tp_count(__u32 reason, __u32 bytes)
{
	struct tp_counter *c = bpf_map_lookup_elem(&tp_counters, &reason);

	if (c) {
		c->packets++;
		c->bytes += bytes;
	}
}

static __always_inline void tp_note(__u32 kind, __u32 ifindex, __u32 reason)
{
	__u32 zero = 0;
	struct tp_trace *trace;

	if (!tp_testing)
		return;
	trace = bpf_map_lookup_elem(&tp_trace, &zero);
	if (!trace)
		return;
	trace->redirect_kind = kind;
	trace->redirect_ifindex = ifindex;
	trace->reason = reason;
}

static __always_inline void tp_note_tunnel(const struct tp_node_config *cfg, const struct tp_addr *to)
{
	__u32 zero = 0;
	struct tp_trace *trace;

	if (!tp_testing)
		return;
	trace = bpf_map_lookup_elem(&tp_trace, &zero);
	if (!trace)
		return;
	trace->tunnel_remote = *to;
	trace->tunnel_id = cfg->tunnel_id;
}

#endif
