/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Sockets that a socket hook translated: which there are, of every network namespace, and the end of those that are held to a backend
 * that is gone. An object of its own, so that a kernel that has no such iterators loses nothing else.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#ifndef NULL
#define NULL ((void *)0)
#endif

#include "abi.h"
#include "addr.h"

#define AF_INET 2
#define AF_INET6 10
#define TCP_ESTABLISHED 1

/* What is read of the kernel's own types; where each field really is, the loader finds out. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct net {
	__u64 net_cookie;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct in6_addr {
	__u8 any[16];
};

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	unsigned char skc_state;
	int skc_bound_dev_if;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
};

struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
};

struct udp_sock;
struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__bpf_sk_storage_map {
	struct bpf_iter_meta *meta;
	struct bpf_map *map;
	struct sock *sk;
	void *value;
};

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
};
#pragma clang attribute pop

/* Linux 6.5. */
extern int bpf_sock_destroy(struct sock_common *sock) __ksym __weak;

/* The main object's, whose descriptor the loader puts here. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct tp_sock_peer);
} tp_sock_peer SEC(".maps");

/* Sockets that are to end, by cookie, with what each was translated to. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct tp_sock_peer);
} tp_doomed SEC(".maps");

static __always_inline void tp_v6(struct tp_addr *to, struct sock *sk, int remote)
{
	if (!bpf_core_field_exists(sk->__sk_common.skc_v6_daddr)) {
		__builtin_memset(to, 0, sizeof(*to));
		return;
	}
	if (remote)
		bpf_core_read(to, sizeof(*to), &sk->__sk_common.skc_v6_daddr);
	else
		bpf_core_read(to, sizeof(*to), &sk->__sk_common.skc_v6_rcv_saddr);
}

/* Whether the socket is connected to the backend that it was translated to: it may have connected elsewhere since. */
static __always_inline int tp_is_held(struct sock *sk, const struct tp_sock_peer *peer)
{
	struct tp_addr remote;

	if (!peer->backend_port || sk->__sk_common.skc_dport != peer->backend_port)
		return 0;
	if (sk->__sk_common.skc_family == AF_INET6)
		tp_v6(&remote, sk, 1);
	else
		tp_set_v4(&remote, sk->__sk_common.skc_daddr);
	return tp_same(&remote, &peer->backend);
}

static __noinline int tp_say(struct bpf_iter__bpf_sk_storage_map *ctx, struct tp_held_socket *held)
{
	return bpf_seq_write(ctx->meta->seq, held, sizeof(*held));
}

SEC("iter/bpf_sk_storage_map")
int tp_held_sockets(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct tp_held_socket held = {};
	struct tp_sock_peer *peer = ctx->value;
	struct sock *sk = ctx->sk;

	if (!sk || !peer)
		return 0;
	held.peer = *peer;
	if (!tp_is_held(sk, &held.peer))
		return 0;
	held.cookie = bpf_get_socket_cookie(sk);
	held.netns_cookie = sk->__sk_common.skc_net.net->net_cookie;
	held.proto = sk->sk_protocol;
	held.state = sk->__sk_common.skc_state;
	held.ifindex = sk->__sk_common.skc_bound_dev_if;
	held.local_port = bpf_htons(sk->__sk_common.skc_num);
	if (sk->__sk_common.skc_family == AF_INET6) {
		held.family = 6;
		tp_v6(&held.local, sk, 0);
	} else {
		held.family = 4;
		tp_set_v4(&held.local, sk->__sk_common.skc_rcv_saddr);
	}
	tp_say(ctx, &held);
	return 0;
}

/* Run in a network namespace: ends those of its UDP sockets that are to end. The kernel holds each socket's lock meanwhile, so none
 * can connect elsewhere between the look and the end. */
SEC("iter/udp")
int tp_end_sockets(struct bpf_iter__udp *ctx)
{
	struct sock *sk = (struct sock *)ctx->udp_sk;
	struct tp_sock_peer *doomed, *peer;
	__u64 cookie;

	if (!sk || !bpf_ksym_exists(bpf_sock_destroy))
		return 0;
	cookie = bpf_get_socket_cookie(sk);
	doomed = bpf_map_lookup_elem(&tp_doomed, &cookie);
	if (!doomed)
		return 0;
	peer = bpf_sk_storage_get(&tp_sock_peer, sk, NULL, 0);
	if (!peer || peer->backend_port != doomed->backend_port || !tp_same(&peer->backend, &doomed->backend) ||
	    !tp_is_held(sk, peer))
		return 0;
	if (!bpf_sock_destroy((struct sock_common *)sk))
		bpf_seq_write(ctx->meta->seq, &cookie, sizeof(cookie));
	return 0;
}

char _license[] SEC("license") = "GPL";
