/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* What a packet is to the programs of tc, in the words that the headers have for every kind of hook (xdp.h: the other). */
#ifndef TOWPATH_TC_H
#define TOWPATH_TC_H

typedef struct __sk_buff tp_context;

/* linux/if_packet.h */
#define PACKET_HOST 0
#define PACKET_BROADCAST 1
#define PACKET_MULTICAST 2
#define PACKET_OTHERHOST 3

/* Bytes from the Ethernet header on. */
static __always_inline __u32 tp_len(const struct __sk_buff *skb)
{
	return skb->len;
}

/* Payload bytes of the packets that this one is cut into, 0: it stays whole. */
static __always_inline __u32 tp_segment_size(const struct __sk_buff *skb)
{
	return skb->gso_size;
}

static __always_inline __be16 tp_protocol(const struct __sk_buff *skb)
{
	return skb->protocol;
}

static __always_inline long tp_load(struct __sk_buff *skb, __u32 off, void *to, __u32 len)
{
	return bpf_skb_load_bytes(skb, off, to, len);
}

#define VLAN_ID 0x0fff
/* As many priority tags in a row are more than anybody writes. */
#define TAGS_MAX 4

/*
 * Takes priority tags off (VLAN 0, IEEE 802.1Q 9.6): the kernel takes such a frame for one without a tag, so it has to be judged as one. More than
 * 0: it is of a VLAN; less: it cannot be told.
 */
static __always_inline int tp_untag(struct __sk_buff *skb)
{
	for (int i = 0; i < TAGS_MAX; i++) {
		if (!skb->vlan_present)
			return 0;
		if (skb->vlan_tci & VLAN_ID)
			return 1;
		if (bpf_skb_vlan_pop(skb))
			return -1;
	}
	return -1;
}

static __always_inline int tp_drop(struct __sk_buff *skb, __u32 reason)
{
	tp_count(reason, skb->len);
	tp_tell(reason, skb->ifindex, skb->len, 0);
	return TC_ACT_SHOT;
}

static __always_inline int tp_to_stack(struct __sk_buff *skb)
{
	tp_count(TP_TO_STACK, skb->len);
	return TC_ACT_OK;
}

#endif
