/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Services: which backend, chosen once a connection. What the veth, the uplink and the socket hooks have in common. */
#ifndef TOWPATH_LB_H
#define TOWPATH_LB_H

/* Whose client asks at what may be a node's address. */
enum tp_nodeport {
	TP_NODEPORT_OUTSIDE = 1,
	TP_NODEPORT_INSIDE = 2,
};

enum tp_choice {
	TP_CHOICE_NONE = 0,		/* nobody's Service */
	TP_CHOICE_BACKEND = 1,		/* lb.backend */
	TP_CHOICE_REFUSE = 2,		/* a Service without a backend */
	TP_CHOICE_DENY = 3,		/* a Service that is not for this client */
	TP_CHOICE_FAR = 4,		/* as an earlier packet: w->way, to what is no pod (snat.h) */
};

#define LEAST_LOOKED_AT 64

static __always_inline int tp_is_nodeport(const struct tp_node_config *cfg, __be16 port)
{
	__u16 p = bpf_ntohs(port);

	return p >= bpf_ntohs(cfg->nodeport_min) && p <= bpf_ntohs(cfg->nodeport_max);
}

/* The key under which any node's address has its NodePorts. */
static __always_inline void tp_nodeport_key(struct tp_service_key *key)
{
	if (tp_is_v4(&key->addr))
		tp_set_v4(&key->addr, 0);
	else
		__builtin_memset(&key->addr, 0, sizeof(key->addr));
}

/* A backend that this client used before and that still exists. */
static __always_inline int tp_affine(struct tp_lb *lb, __u64 now)
{
	struct tp_affinity *old = bpf_map_lookup_elem(&tp_affinity, &lb->affinity_key);
	struct tp_backend *backend;

	__u64 last_used;

	if (!old)
		return 0;
	last_used = old->last_used;
	/* The coarse clock of another CPU may be a tick ahead. */
	if (now > last_used && now - last_used > (__u64)lb->service.affinity_seconds * NSEC_PER_SEC)
		return 0;
	lb->backend_id = old->backend;
	backend = bpf_map_lookup_elem(&tp_backends, &lb->backend_id);
	if (!backend)
		return 0;
	lb->backend = *backend;
	old->last_used = now;
	return 1;
}

/* Whether a Service that is for some clients is for this one. */
static __always_inline int tp_is_for(__u32 service, const struct tp_addr *client)
{
	struct tp_source_key key = {
		.prefixlen = 192,
		.service = service,
		.family = tp_is_v4(client) ? 4 : 6,
		.addr = *client,
	};

	return bpf_map_lookup_elem(&tp_source_ranges, &key) != NULL;
}

static __always_inline __u32 tp_hash_of(const struct tp_lb *lb, const struct tp_addr *client, int whole)
{
	__u64 hash = tp_mix_addr(0, client);

	if (whole) {
		hash = tp_mix_addr(hash, &lb->key.addr);
		hash = tp_mix(hash, lb->key.port | (__u64)lb->key.proto << 16 | (__u64)lb->sport << 32);
	}
	return tp_mix(hash, hash >> 32) >> 32;
}

/* Finds the slot whose backend has the fewest open connections among those that are looked at. */
struct tp_least {
	struct tp_slot_key slot;
	__u32 count;
	__u32 start;
	__u32 best;
	__u32 index;
};

static long tp_least_step(__u32 i, struct tp_least *least)
{
	struct tp_load *load;
	struct tp_slot *slot;
	__u32 open = 0;

	least->slot.index = (least->start + i) % least->count;
	slot = bpf_map_lookup_elem(&tp_slots, &least->slot);
	if (!slot)
		return 0;
	load = bpf_map_lookup_elem(&tp_loads, &slot->backend);
	if (load)
		open = load->flows + load->sockets;
	/* Counts are read as signed: see budget.h. */
	if ((__s32)open < 0)
		open = 0;
	if (open >= least->best)
		return 0;
	least->best = open;
	least->index = least->slot.index;
	return !open;
}

/* Of a list of more than LEAST_LOOKED_AT as many are looked at, from a random one on: equals take turns at random, too. */
static __noinline __u32 tp_least(__u32 list, __u32 count)
{
	struct tp_least least = { .slot.list = list, .count = count ? count : 1, .best = ~0U };

	least.start = bpf_get_prandom_u32() % least.count;
	least.index = least.start;
	bpf_loop(least.count < LEAST_LOOKED_AT ? least.count : LEAST_LOOKED_AT, tp_least_step, &least, 0);
	return least.index;
}

/* The slot for a new connection. `service` is the entry that lb->service is a copy of. */
static __always_inline __u32 tp_index(const struct tp_lb *lb, struct tp_service *service, const struct tp_addr *client)
{
	__u32 count = lb->service.count;

	switch (lb->service.flags >> TP_ALGORITHM_SHIFT) {
	case TP_ROUND_ROBIN:
		return __sync_fetch_and_add(&service->turn, 1) % count;
	case TP_LEAST_CONNECTIONS:
		return tp_least(lb->service.slots, count);
	case TP_SOURCE_HASH:
		return tp_hash_of(lb, client, 0) % count;
	case TP_TUPLE_HASH:
		return tp_hash_of(lb, client, 1) % count;
	default:
		return bpf_get_prandom_u32() % count;
	}
}

/* Who asks for a Service. */
enum tp_client {
	TP_CLIENT_OUTSIDE = 0,
	TP_CLIENT_NODE = 1,		/* a process of this node */
	TP_CLIENT_POD = 2,		/* a pod of this node */
};

/* One try: the entry, a slot of its list, the backend. An entry, list or backend that went away meanwhile is a miss (-1).
 * Where another proxy serves everybody but pods, these entries are nobody's for others. */
static __always_inline int tp_choose_once(struct tp_lb *lb, const struct tp_addr *client, enum tp_client who)
{
	struct tp_service *service = bpf_map_lookup_elem(&tp_services, &lb->key);
	struct tp_service *again;
	struct tp_slot *slot;
	__u64 now = 0;

	if (!service)
		return TP_CHOICE_NONE;
	if (who != TP_CLIENT_OUTSIDE && (service->flags & TP_SERVICE_INSIDE)) {
		struct tp_service *inside;

		lb->key.inside = 1;
		inside = bpf_map_lookup_elem(&tp_services, &lb->key);
		if (inside)
			service = inside;
		else
			lb->key.inside = 0;
	}
	lb->service = *service;
	/* An update frees the old entry at once, and the kernel may give its memory to another key while it is copied here (maps
	 * that are not preallocated, since 6.1). What was copied is believed only if the key still leads to the same. */
	again = bpf_map_lookup_elem(&tp_services, &lb->key);
	if (!again || again->id != lb->service.id || again->slots != lb->service.slots || again->count != lb->service.count ||
	    again->flags != lb->service.flags)
		return -1;
	if ((lb->service.flags & TP_SERVICE_PODS) && who != TP_CLIENT_POD)
		return TP_CHOICE_NONE;
	if ((lb->service.flags & TP_SERVICE_RANGES) && !tp_is_for(lb->service.id, client))
		return TP_CHOICE_DENY;
	if (!lb->service.count)
		return TP_CHOICE_REFUSE;
	if (lb->service.flags & TP_SERVICE_AFFINITY) {
		now = tp_now();
		lb->affinity_key.client = *client;
		lb->affinity_key.service = lb->service.id;
		lb->affinity_key.pad = 0;
		if (tp_affine(lb, now))
			return TP_CHOICE_BACKEND;
	}
	lb->slot.list = lb->service.slots;
	lb->slot.index = tp_index(lb, service, client);
	/* Slots and backends need no second look: both are never rewritten, and deleted only seconds after the last list, or
	 * the last affinity, that leads to them is gone. */
	slot = bpf_map_lookup_elem(&tp_slots, &lb->slot);
	if (!slot)
		return -1;
	lb->backend_id = slot->backend;
	lb->backend.addr = slot->addr;
	lb->backend.port = slot->port;
	lb->backend.proto = slot->proto;
	if (lb->service.flags & TP_SERVICE_AFFINITY) {
		lb->affinity.last_used = now;
		lb->affinity.backend = lb->backend_id;
		lb->affinity.pad = 0;
		bpf_map_update_elem(&tp_affinity, &lb->affinity_key, &lb->affinity, BPF_ANY);
	}
	return TP_CHOICE_BACKEND;
}

static __always_inline int tp_choose(struct tp_lb *lb, const struct tp_addr *client, enum tp_client who)
{
	int choice = tp_choose_once(lb, client, who);

	if (choice < 0) {
		lb->key.inside = 0;
		choice = tp_choose_once(lb, client, who);
	}
	return choice < 0 ? TP_CHOICE_REFUSE : choice;
}

/*
 * A NodePort at a node's address (lb->key). Where outside clients get this node's endpoints only, clients of this node get all
 * of them at its address, and what they send to another node's is that node's to serve.
 */
static __always_inline int tp_choose_nodeport(struct tp_lb *lb, const struct tp_node_config *cfg,
					      const struct tp_addr *client, int own, enum tp_client who)
{
	tp_nodeport_key(&lb->key);
	if (who != TP_CLIENT_OUTSIDE && !own) {
		lb->key.inside = 1;
		if (bpf_map_lookup_elem(&tp_services, &lb->key))
			return TP_CHOICE_NONE;
	}
	lb->key.inside = 0;
	return tp_choose(lb, client, who);
}

static __always_inline void tp_service_key_of(struct tp_service_key *key, const struct tp_addr *addr, __be16 port,
					      __u8 proto)
{
	key->addr = *addr;
	key->port = port;
	key->proto = proto;
	key->inside = 0;
}

/* Whether there may be a Service at an address, or a port of any node's, or a translation that leads from there. */
static __always_inline int tp_may_be_service(const struct tp_node_config *cfg, const struct tp_addr *addr, __be16 port)
{
	__u32 bit = tp_service_bit(addr), word = bit / 64;
	__u64 *bits = bpf_map_lookup_elem(&tp_service_bits, &word);

	return (bits && (*bits >> (bit % 64)) & 1) || tp_is_nodeport(cfg, port);
}

/* Looks w->sent up; then w->lb holds the backend that an earlier packet of this flow was sent to. */
static __always_inline struct tp_nat *tp_nat_seek(struct tp_work *w)
{
	struct tp_nat *nat = bpf_map_lookup_elem(&tp_nat, &w->sent);

	w->sought = TP_NAT_UNKNOWN;
	if (!nat)
		return NULL;
	w->sought = TP_NAT_KNOWN;
	w->lb.backend.addr = nat->daddr;
	w->lb.backend.port = nat->dport;
	w->lb.backend_id = nat->backend;
	return nat;
}

static __always_inline int tp_nat_known(struct tp_work *w)
{
	if (w->sought == TP_NAT_UNSOUGHT)
		tp_nat_seek(w);
	return w->sought == TP_NAT_KNOWN;
}

/* The packet's tuple after translation to w->lb.backend; the packet itself is rewritten, and the translation entered for
 * those that follow, once it may pass. */
static __always_inline void tp_aim(struct tp_work *w, __u8 chosen)
{
	w->p.t.daddr = w->lb.backend.addr;
	w->p.t.dport = w->lb.backend.port;
	tp_tell_ends_apart(&w->p.t);
	w->translated = 1;
	w->chosen = chosen;
}

/*
 * A SYN of the same client port begins a new connection once the former one was closed. Until then it goes where that went: it may be a
 * retransmission, or somebody's who writes the client's address. To a client that did begin anew an open connection's end answers with an ACK
 * of what it has (RFC 9293 3.10.7.4), and hears a RST: so that is closed, and the next SYN chooses.
 */
static __always_inline int tp_is_new_connection(struct tp_work *w)
{
	struct tp_ct *ct;

	if (w->p.t.proto != IPPROTO_TCP || !(w->p.flags & TP_PKT_OPENS))
		return 0;
	w->origin = w->sent;
	w->origin.daddr = w->lb.backend.addr;
	w->origin.dport = w->lb.backend.port;
	tp_tell_ends_apart(&w->origin);
	ct = tp_ct_find(w, &w->origin);
	return !ct || CT_CLOSED(ct->flags);
}

/*
 * Whether the packet is for a Service: NONE, BACKEND (w->p.t is aimed at it), FAR or REFUSE. w->sent is the tuple as it came.
 */
TP_APART int tp_translate(struct tp_work *w, const struct tp_node_config *cfg, __u32 nodeport)
{
	enum tp_client who = nodeport == TP_NODEPORT_INSIDE ? TP_CLIENT_POD : TP_CLIENT_OUTSIDE;
	int choice;

	if (!w || !cfg)
		return TP_CHOICE_NONE;
	if (tp_nat_known(w) && !tp_is_new_connection(w)) {
		tp_aim(w, 0);
		return TP_CHOICE_BACKEND;
	}
	if (nodeport == TP_NODEPORT_OUTSIDE && tp_snat_known(w))
		return TP_CHOICE_FAR;
	/* A host port on loopback is for the node's own sockets; no neighbour or pod gets there by writing that address. */
	if (tp_is_loopback(&w->sent.daddr))
		return TP_CHOICE_NONE;
	tp_service_key_of(&w->lb.key, &w->sent.daddr, w->sent.dport, w->sent.proto);
	w->lb.sport = w->sent.sport;
	choice = tp_choose(&w->lb, &w->sent.saddr, who);
	if (choice == TP_CHOICE_NONE && tp_is_nodeport(cfg, w->sent.dport)) {
		struct tp_peer *peer;

		tp_full_prefix(&w->cidr, &w->sent.daddr);
		peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
		if (!peer || (peer->flags & (TP_PEER_NODE | TP_PEER_SILENT)) != TP_PEER_NODE)
			return TP_CHOICE_NONE;
		/* What comes in from outside for another node's address is on its way there. */
		if (nodeport == TP_NODEPORT_OUTSIDE && !(peer->flags & TP_PEER_LOCAL))
			return TP_CHOICE_NONE;
		/* A connection that was opened while another proxy served the node's ports goes on where it was translated: in the
		 * kernel's own tracking. Without it the node's stack answers with a reset, as it should. */
		if (nodeport == TP_NODEPORT_OUTSIDE && w->sent.proto == IPPROTO_TCP && !(w->p.flags & TP_PKT_OPENS))
			return TP_CHOICE_NONE;
		choice = tp_choose_nodeport(&w->lb, cfg, &w->sent.saddr, peer->flags & TP_PEER_LOCAL, who);
	}
	if (choice == TP_CHOICE_DENY)
		w->reason = TP_DROP_SOURCE_RANGE;
	if (choice != TP_CHOICE_BACKEND)
		return choice;
	tp_aim(w, 1);
	return TP_CHOICE_BACKEND;
}

/* Whether an address is a Service's that is ours to serve, so that nothing but its ports answers there. */
static __always_inline int tp_is_service_address(struct tp_work *w, int for_pod)
{
	struct tp_service *mark;
	struct tp_peer *peer;

	tp_service_key_of(&w->lb.key, &w->p.t.daddr, 0, 0);
	mark = bpf_map_lookup_elem(&tp_services, &w->lb.key);
	if (!mark || ((mark->flags & TP_SERVICE_PODS) && !for_pod))
		return 0;
	tp_full_prefix(&w->cidr, &w->p.t.daddr);
	peer = bpf_map_lookup_elem(&tp_peers, &w->cidr);
	return !peer || !(peer->flags & TP_PEER_NODE);
}

#endif
