/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What program costs are measured in: a program that reads a packet's addresses and ports and looks them up in one hash map, twice
 * for the A/A null; and one that does nothing, whose time is that of the clock and the call.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

/* As large as the key and about as large as the value of a tracked connection of a plain table. */
struct tuple {
	__u32 src, dst, ports, proto;
};

struct state {
	__u64 seen[8];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 131072);
	__type(key, struct tuple);
	__type(value, struct state);
} tpb_flows SEC(".maps");

static __always_inline int tpb_look_up(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + sizeof(struct ethhdr);
	__u32 *ports = (void *)(ip + 1);
	struct tuple key;

	if ((void *)(ports + 1) > end)
		return TC_ACT_SHOT;
	key.src = ip->saddr;
	key.dst = ip->daddr;
	key.ports = *ports;
	key.proto = ip->protocol;
	return bpf_map_lookup_elem(&tpb_flows, &key) ? TC_ACT_OK : TC_ACT_SHOT;
}

SEC("tc")
int tpb_one(struct __sk_buff *skb)
{
	return tpb_look_up(skb);
}

SEC("tc")
int tpb_again(struct __sk_buff *skb)
{
	return tpb_look_up(skb);
}

SEC("tc")
int tpb_empty(struct __sk_buff *skb)
{
	return TC_ACT_OK;
}

char _license[] SEC("license") = "GPL";
