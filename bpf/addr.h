/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Addresses as 16 bytes, read as four words in network byte order. */
#ifndef TOWPATH_ADDR_H
#define TOWPATH_ADDR_H

#define MAPPED_PREFIX bpf_htonl(0x0000ffff)

static __always_inline __be32 tp_word(const struct tp_addr *a, int i)
{
	return ((const __be32 *)a->b)[i];
}

static __always_inline void tp_set_word(struct tp_addr *a, int i, __be32 v)
{
	((__be32 *)a->b)[i] = v;
}

static __always_inline void tp_set_v4(struct tp_addr *a, __be32 v4)
{
	tp_set_word(a, 0, 0);
	tp_set_word(a, 1, 0);
	tp_set_word(a, 2, MAPPED_PREFIX);
	tp_set_word(a, 3, v4);
}

static __always_inline void tp_set_v6(struct tp_addr *a, const void *v6)
{
	const __be32 *w = v6;

	tp_set_word(a, 0, w[0]);
	tp_set_word(a, 1, w[1]);
	tp_set_word(a, 2, w[2]);
	tp_set_word(a, 3, w[3]);
}

static __always_inline int tp_is_v4(const struct tp_addr *a)
{
	return tp_word(a, 0) == 0 && tp_word(a, 1) == 0 && tp_word(a, 2) == MAPPED_PREFIX;
}

static __always_inline int tp_is_zero(const struct tp_addr *a)
{
	return !(tp_word(a, 0) | tp_word(a, 1) | tp_word(a, 2) | tp_word(a, 3));
}

static __always_inline int tp_same(const struct tp_addr *a, const struct tp_addr *b)
{
	return tp_word(a, 3) == tp_word(b, 3) && tp_word(a, 2) == tp_word(b, 2) && tp_word(a, 1) == tp_word(b, 1) &&
	       tp_word(a, 0) == tp_word(b, 0);
}

static __always_inline int tp_same_tuple(const struct tp_tuple *a, const struct tp_tuple *b)
{
	return a->sport == b->sport && a->dport == b->dport && a->proto == b->proto && tp_same(&a->saddr, &b->saddr) &&
	       tp_same(&a->daddr, &b->daddr);
}

static __always_inline __u64 tp_mix(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
	return hash ^ (hash >> 29);
}

/* The same on every node: nothing in it but the packet. */
static __always_inline __u64 tp_mix_addr(__u64 hash, const struct tp_addr *addr)
{
	hash = tp_mix(hash, tp_word(addr, 0) | (__u64)tp_word(addr, 1) << 32);
	return tp_mix(hash, tp_word(addr, 2) | (__u64)tp_word(addr, 3) << 32);
}

/* tp_nat.mark of a key; never 0. */
static __always_inline __u64 tp_mark_of(const struct tp_tuple *t)
{
	__u64 mark = tp_mix_addr(tp_mix_addr(0, &t->saddr), &t->daddr);

	return tp_mix(mark, t->sport | (__u64)t->dport << 16 | (__u64)t->proto << 32) | 1;
}

/* Which bit of tp_service_bits is an address's. */
static __always_inline __u32 tp_service_bit(const struct tp_addr *addr)
{
	return tp_mix_addr(0, addr) >> (64 - TP_SERVICE_BITS_SHIFT);
}

/* 127.0.0.0/8 (RFC 1122 3.2.1.3) or ::1: what a host says to itself. */
static __always_inline int tp_is_loopback(const struct tp_addr *a)
{
	if (tp_is_v4(a))
		return a->b[12] == 127;
	return !(tp_word(a, 0) | tp_word(a, 1) | tp_word(a, 2)) && tp_word(a, 3) == bpf_htonl(1);
}

/* Whether an end of a packet that came by a wire is one that no wire may name: where nodes route such addresses (route_localnet, as kube-proxy sets
 * it), they are reached by them, and sockets behind them trust whom they hear. */
static __always_inline int tp_names_loopback(const struct tp_tuple *t)
{
	return tp_is_loopback(&t->saddr) || tp_is_loopback(&t->daddr);
}

/* Mapped, compatible or translated IPv4 in an IPv6 header (RFC 4291 2.5.5, RFC 2765): none belongs on a wire. */
static __always_inline int tp_embeds_v4(const struct tp_addr *a)
{
	__be32 third = tp_word(a, 2);

	if (tp_word(a, 0) | tp_word(a, 1))
		return 0;
	if (third == MAPPED_PREFIX || third == bpf_htonl(0xffff0000))
		return 1;
	return third == 0 && bpf_ntohl(tp_word(a, 3)) > 1;
}

static __always_inline int tp_is_link_local(const struct tp_addr *a)
{
	return (tp_word(a, 0) & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* ff02::/16: heard on the link, and routed nowhere (RFC 4291 2.7). */
static __always_inline int tp_is_link_multicast(const struct tp_addr *a)
{
	return (tp_word(a, 0) & bpf_htonl(0xff0f0000)) == bpf_htonl(0xff020000);
}

/*
 * What a pod sees as the source of what it sent to itself by way of a Service: 169.254.116.9 or fd00:7470::9. (A host takes no packet with
 * its own source, and sends none to its own address out of a device.) Nobody has these addresses; what comes from them is forged.
 */
#define HAIRPIN_V4 bpf_htonl(0xa9fe7409)
#define HAIRPIN_V6_FIRST bpf_htonl(0xfd007470)
#define HAIRPIN_V6_LAST bpf_htonl(9)

static __always_inline int tp_is_hairpin(const struct tp_addr *a)
{
	if (tp_word(a, 3) == HAIRPIN_V4)
		return tp_is_v4(a);
	return tp_word(a, 3) == HAIRPIN_V6_LAST && tp_word(a, 0) == HAIRPIN_V6_FIRST && !(tp_word(a, 1) | tp_word(a, 2));
}

/* The source of a tuple whose ends are one pod becomes the address that stands for it. */
static __always_inline void tp_tell_ends_apart(struct tp_tuple *t)
{
	if (!tp_same(&t->saddr, &t->daddr))
		return;
	if (tp_is_v4(&t->daddr)) {
		tp_set_v4(&t->saddr, HAIRPIN_V4);
		return;
	}
	tp_set_word(&t->saddr, 0, HAIRPIN_V6_FIRST);
	tp_set_word(&t->saddr, 1, 0);
	tp_set_word(&t->saddr, 2, 0);
	tp_set_word(&t->saddr, 3, HAIRPIN_V6_LAST);
}

/* What the other end of `from` sends. */
static __always_inline void tp_turn(struct tp_tuple *to, const struct tp_tuple *from)
{
	*to = *from;
	to->saddr = from->daddr;
	to->sport = from->dport;
	to->daddr = from->saddr;
	to->dport = from->sport;
}

static __always_inline int tp_same_mac(const __u8 *a, const __u8 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4] && a[5] == b[5];
}

static __always_inline void tp_copy_mac(__u8 *to, const __u8 *from)
{
	__builtin_memcpy(to, from, 6);
}

static __always_inline void tp_full_prefix(struct tp_cidr_key *key, const struct tp_addr *a)
{
	key->prefixlen = 32 + 128;
	key->family = tp_is_v4(a) ? 4 : 6;
	key->addr = *a;
}

/* Which it has not, of a family, is zero: nobody's address, but what who has none yet asks from. */
static __always_inline int tp_is_own_node(const struct tp_node_config *cfg, const struct tp_addr *a)
{
	return (tp_same(a, &cfg->node4) || tp_same(a, &cfg->node6)) && !tp_is_zero(a);
}

#endif
