/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Which queue of the device of `udp` a frame goes by: for one flow always the same, so that its packets are not overtaken by each other.
 * What the device does by itself (tun_automq_select_queue) has a flow follow the queue that its answers were written to, and those may
 * come by any.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define STEER_MORE 0x2000
#define STEER_OFFSET 0x1fff

static __always_inline __u32 steer_mix(__u32 hash, __u32 word)
{
	hash = (hash ^ word) * 0x9e3779b1;
	return hash ^ (hash >> 15);
}

static __always_inline int steer_has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP;
}

static __always_inline __u32 steer_words(__u32 hash, const __u32 *words, int count)
{
#pragma unroll
	for (int i = 0; i < count; i++)
		hash = steer_mix(hash, words[i]);
	return hash;
}

static __always_inline __u32 steer_ports(struct __sk_buff *skb, __u32 hash, __u32 at)
{
	__u32 ports;

	return bpf_skb_load_bytes(skb, at, &ports, sizeof(ports)) ? hash : steer_mix(hash, ports);
}

/* A number for the flow; the kernel takes it modulo the queues. Fragments of a packet have one: their addresses'. */
SEC("socket")
int tp_udp_queue(struct __sk_buff *skb)
{
	__u32 hash = 0;
	__be16 kind;

	if (bpf_skb_load_bytes(skb, __builtin_offsetof(struct ethhdr, h_proto), &kind, sizeof(kind)))
		return 0;
	if (kind == bpf_htons(ETH_P_IP)) {
		struct iphdr ip;

		if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
			return 0;
		__u32 words[] = { ip.saddr, ip.daddr, ip.protocol };

		hash = steer_words(hash, words, 3);
		if (steer_has_ports(ip.protocol) && !(ip.frag_off & bpf_htons(STEER_MORE | STEER_OFFSET)))
			hash = steer_ports(skb, hash, ETH_HLEN + ip.ihl * 4);
	} else if (kind == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
			return 0;
		hash = steer_words(hash, ip.saddr.in6_u.u6_addr32, 4);
		hash = steer_words(hash, ip.daddr.in6_u.u6_addr32, 4);
		/* Behind an extension header, a fragment's say, there are none. */
		if (steer_has_ports(ip.nexthdr))
			hash = steer_ports(skb, steer_mix(hash, ip.nexthdr), ETH_HLEN + sizeof(ip));
	}
	hash ^= hash >> 16;
	hash *= 0x85ebca6b;
	return hash ^ (hash >> 13);
}

char _license[] SEC("license") = "GPL";
