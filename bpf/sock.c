/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Socket hooks: a socket that connects or sends to a Service talks to a backend from its first packet on, and believes that
 * it talks to the Service. They run in process context and may be preempted, so everything is on their stack.
 */

#define EPERM 1
#define ECONNREFUSED 111

enum tp_asker {
	TP_ASKER_NOBODY = 0,		/* neither a pod of this node nor the node: not ours to translate */
	TP_ASKER_NODE = 1,
	TP_ASKER_POD = 2,
};

/*
 * Who asks for `addr`, as the veth path would name it. What a pod says to its own loopback is not ours to translate either:
 * the node's host ports are not there.
 */
static __always_inline enum tp_asker tp_asker(struct bpf_sock_addr *ctx, const struct tp_node_config *cfg,
				    const struct tp_addr *addr, struct tp_addr *client)
{
	int v4 = tp_is_v4(addr);
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct tp_netns_pod *pod = bpf_map_lookup_elem(&tp_netns_pods, &cookie);

	if (pod) {
		if (tp_is_loopback(addr))
			return TP_ASKER_NOBODY;
		*client = v4 ? pod->addr4 : pod->addr6;
		return TP_ASKER_POD;
	}
	if (cookie != cfg->netns_cookie)
		return TP_ASKER_NOBODY;
	*client = v4 ? cfg->node4 : cfg->node6;
	return TP_ASKER_NODE;
}

static __always_inline void tp_sock_addr(struct bpf_sock_addr *ctx, int v6, struct tp_addr *addr)
{
	if (!v6) {
		tp_set_v4(addr, ctx->user_ip4);
		return;
	}
	tp_set_word(addr, 0, ctx->user_ip6[0]);
	tp_set_word(addr, 1, ctx->user_ip6[1]);
	tp_set_word(addr, 2, ctx->user_ip6[2]);
	tp_set_word(addr, 3, ctx->user_ip6[3]);
}

static __always_inline void tp_set_sock_addr(struct bpf_sock_addr *ctx, int v6, const struct tp_addr *addr, __be16 port)
{
	if (v6) {
		ctx->user_ip6[0] = tp_word(addr, 0);
		ctx->user_ip6[1] = tp_word(addr, 1);
		ctx->user_ip6[2] = tp_word(addr, 2);
		ctx->user_ip6[3] = tp_word(addr, 3);
	} else {
		ctx->user_ip4 = tp_word(addr, 3);
	}
	ctx->user_port = port;
}

/* Whether it is a node's address at which NodePorts answer, this node's if so; -1: it is none. Loopback is this node's: pods that ask for
 * theirs do not come this far. */
static __always_inline int tp_sock_node(const struct tp_node_config *cfg, const struct tp_addr *addr)
{
	struct tp_cidr_key key;
	struct tp_peer *peer;

	if (tp_is_loopback(addr))
		return cfg->flags & (tp_is_v4(addr) ? TP_NODE_SILENT_LO4 : TP_NODE_SILENT_LO6) ? -1 : 1;
	tp_full_prefix(&key, addr);
	peer = bpf_map_lookup_elem(&tp_peers, &key);
	if (!peer || (peer->flags & (TP_PEER_NODE | TP_PEER_SILENT)) != TP_PEER_NODE)
		return -1;
	return !!(peer->flags & TP_PEER_LOCAL);
}

static __always_inline int tp_sock_choose(struct tp_lb *lb, const struct tp_node_config *cfg, const struct tp_addr *client,
					  enum tp_client who)
{
	int node, choice;

	/* Whichever the kernel would choose: who has not bound a port does not mean one. */
	lb->sport = bpf_get_prandom_u32() & 0xffff;
	choice = tp_choose(lb, client, who);
	if (choice != TP_CHOICE_NONE || !tp_is_nodeport(cfg, lb->key.port))
		return choice;
	node = tp_sock_node(cfg, &lb->key.addr);
	return node < 0 ? choice : tp_choose_nodeport(lb, cfg, client, node, who);
}

static __always_inline int tp_is_backend(const struct tp_sock_peer *peer, const struct tp_addr *addr, __be16 port)
{
	return peer->backend_port == port && tp_same(&peer->backend, addr);
}

/* Where the memory of this backend is, or is to be, in a socket that sends without connecting. */
static __always_inline struct tp_sock_peer *tp_sock_place(struct bpf_sock_addr *ctx, const struct tp_lb *lb)
{
	struct tp_sock_peers *all = bpf_sk_storage_get(&tp_sock_peers, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);

	if (!all)
		return NULL;
	for (int i = 0; i < 32; i++) {
		if (tp_is_backend(&all->peers[i], &lb->backend.addr, lb->backend.port))
			return &all->peers[i];
	}
	return &all->peers[__sync_fetch_and_add(&all->next, 1) % 32];
}

static __always_inline void tp_load_socket(__u32 backend, int change)
{
	struct tp_load *load = bpf_map_lookup_elem(&tp_loads, &backend);

	/* What a socket was counted to may be another backend's count by now, which it must not take from for ever. */
	if (load && (change > 0 || load->sockets))
		__sync_fetch_and_add(&load->sockets, change);
}

/* Counts a socket that connects to its backend, and no longer to the one of an earlier connect. Without memory for it, it is not
 * counted. */
static __always_inline void tp_sock_count(struct bpf_sock_addr *ctx, const struct tp_lb *lb, enum tp_choice choice)
{
	int counts = choice == TP_CHOICE_BACKEND && lb->service.flags >> TP_ALGORITHM_SHIFT == TP_LEAST_CONNECTIONS;
	struct tp_sock_load *counted = bpf_sk_storage_get(&tp_sock_load, ctx->sk, NULL,
							  counts ? BPF_SK_STORAGE_GET_F_CREATE : 0);

	if (!counted)
		return;
	if (counted->backend)
		tp_load_socket(counted->backend, -1);
	counted->backend = counts ? lb->backend_id : 0;
	if (counts)
		tp_load_socket(lb->backend_id, 1);
}

/* When there is no memory for it, the socket is told of the backend: it works, but may not believe the answer. */
static __always_inline void tp_sock_remember(struct bpf_sock_addr *ctx, int connects, const struct tp_lb *lb,
					     const struct tp_addr *addr, __be16 port)
{
	struct tp_sock_peer *peer;

	if (connects)
		peer = bpf_sk_storage_get(&tp_sock_peer, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	else
		peer = tp_sock_place(ctx, lb);
	if (!peer)
		return;
	peer->backend = lb->backend.addr;
	peer->backend_port = lb->backend.port;
	peer->service = *addr;
	peer->service_port = port;
}

/* Goes on untranslated: a socket that connects to what is no Service's forgets what it was translated to before. */
static __always_inline int tp_sock_plain(struct bpf_sock_addr *ctx, int connects)
{
	struct tp_sock_peer *peer;

	if (!connects)
		return 1;
	peer = bpf_sk_storage_get(&tp_sock_peer, ctx->sk, NULL, 0);
	if (peer)
		peer->backend_port = 0;
	return 1;
}

/* 1: go on. 0: refused, with errno set. */
static __always_inline int tp_sock_forward(struct bpf_sock_addr *ctx, int v6, int connects)
{
	const struct tp_node_config *cfg = tp_config();
	__u32 proto = ctx->protocol;
	__be16 port = ctx->user_port;
	struct tp_service_key asked;
	struct tp_addr addr, client;
	struct tp_lb lb = {};
	enum tp_asker asker;
	int choice;

	if (!cfg || (proto != IPPROTO_TCP && proto != IPPROTO_UDP) || !port)
		return 1;
	tp_sock_addr(ctx, v6, &addr);
	asker = tp_asker(ctx, cfg, &addr, &client);
	if (asker == TP_ASKER_NOBODY) {
		/* Its pod may have been ours to translate when it connected before. */
		if (connects)
			tp_sock_count(ctx, &lb, TP_CHOICE_NONE);
		return tp_sock_plain(ctx, connects);
	}
	tp_service_key_of(&lb.key, &addr, port, proto);
	/* The choice may look under another address: any node's. */
	asked = lb.key;
	choice = tp_sock_choose(&lb, cfg, &client, asker == TP_ASKER_POD ? TP_CLIENT_POD : TP_CLIENT_NODE);
	if (connects)
		tp_sock_count(ctx, &lb, choice);
	if (choice == TP_CHOICE_NONE)
		return tp_sock_plain(ctx, connects);
	if (choice == TP_CHOICE_DENY) {
		tp_count(TP_DROP_SOURCE_RANGE, 0);
		tp_tell_socket(TP_DROP_SOURCE_RANGE, &client, &asked);
		bpf_set_retval(-EPERM);
		return 0;
	}
	if (choice == TP_CHOICE_REFUSE) {
		tp_count(TP_REFUSED, 0);
		tp_tell_socket(TP_REFUSED, &client, &asked);
		bpf_set_retval(-ECONNREFUSED);
		return 0;
	}
	tp_sock_remember(ctx, connects, &lb, &addr, port);
	tp_set_sock_addr(ctx, v6, &lb.backend.addr, lb.backend.port);
	tp_count(TP_SERVICE_TRANSLATED, 0);
	return 1;
}

/*
 * What a socket is told of its peer: the Service, if it was translated to this backend. `connected`: the peer is who it is
 * connected to, else who sent a datagram.
 */
static __always_inline int tp_sock_backward(struct bpf_sock_addr *ctx, int v6, int connected)
{
	struct tp_sock_peer *peer = bpf_sk_storage_get(&tp_sock_peer, ctx->sk, NULL, 0);
	__be16 port = ctx->user_port;
	struct tp_sock_peers *all;
	struct tp_addr addr;

	tp_sock_addr(ctx, v6, &addr);
	if (peer && tp_is_backend(peer, &addr, port)) {
		tp_set_sock_addr(ctx, v6, &peer->service, peer->service_port);
		return 1;
	}
	if (connected)
		return 1;
	all = bpf_sk_storage_get(&tp_sock_peers, ctx->sk, NULL, 0);
	if (!all)
		return 1;
	for (int i = 0; i < 32; i++) {
		if (!tp_is_backend(&all->peers[i], &addr, port))
			continue;
		tp_set_sock_addr(ctx, v6, &all->peers[i].service, all->peers[i].service_port);
		return 1;
	}
	return 1;
}

SEC("cgroup/connect4")
int tp_connect4(struct bpf_sock_addr *ctx)
{
	return tp_sock_forward(ctx, 0, 1);
}

SEC("cgroup/connect6")
int tp_connect6(struct bpf_sock_addr *ctx)
{
	return tp_sock_forward(ctx, 1, 1);
}

SEC("cgroup/sendmsg4")
int tp_sendmsg4(struct bpf_sock_addr *ctx)
{
	return tp_sock_forward(ctx, 0, 0);
}

SEC("cgroup/sendmsg6")
int tp_sendmsg6(struct bpf_sock_addr *ctx)
{
	return tp_sock_forward(ctx, 1, 0);
}

SEC("cgroup/recvmsg4")
int tp_recvmsg4(struct bpf_sock_addr *ctx)
{
	return tp_sock_backward(ctx, 0, 0);
}

SEC("cgroup/recvmsg6")
int tp_recvmsg6(struct bpf_sock_addr *ctx)
{
	return tp_sock_backward(ctx, 1, 0);
}

SEC("cgroup/getpeername4")
int tp_getpeername4(struct bpf_sock_addr *ctx)
{
	return tp_sock_backward(ctx, 0, 1);
}

SEC("cgroup/getpeername6")
int tp_getpeername6(struct bpf_sock_addr *ctx)
{
	return tp_sock_backward(ctx, 1, 1);
}

SEC("cgroup/sock_release")
int tp_sock_release(struct bpf_sock *sk)
{
	struct tp_sock_load *counted = bpf_sk_storage_get(&tp_sock_load, sk, NULL, 0);

	if (counted && counted->backend) {
		tp_load_socket(counted->backend, -1);
		counted->backend = 0;
	}
	return 1;
}
