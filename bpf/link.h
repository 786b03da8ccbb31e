/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Pods on the link of the uplink, each address with a MAC of its own there (TP_NODE_ON_LINK, the backend macvlan): the node answers ARP and
 * neighbour discovery for them with that MAC, takes frames that are sent to it, and gives it to what leaves with a pod's address. Nodes of this
 * network know it without asking (tp_link_mac): no table of neighbours is as long as the list of the cluster's pods. A pod whose MAC somebody
 * chose has two: nodes go on as with any, and everybody else is told the chosen one, and sees it.
 *
 * The pods' devices are as with any other backend, and so is all that is judged: what is on the link is a frame, made of a packet that
 * tp_from_pod has let pass. (docs/decisions/016 says why they are no devices of the kind macvlan.)
 */
#ifndef TOWPATH_LINK_H
#define TOWPATH_LINK_H

#define ARP_REQUEST 1
#define ARP_REPLY 2
#define ND_SOLICITED bpf_htonl(0x60000000)	/* and overriding (RFC 4861 4.4) */
#define ND_UNASKED bpf_htonl(0x20000000)
#define ND_TARGET_MAC bpf_htons(0x0201)	/* option 2, of eight bytes */
#define ND_LEN 32			/* an advertisement with its option */

struct tp_on_link_arp {
	__u8 eth_dst[6];
	__u8 eth_src[6];
	__be16 eth_type;
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_len;
	__u8 protocol_len;
	__be16 operation;
	__u8 sender_mac[6];
	__u8 sender[4];
	__u8 target_mac[6];
	__u8 target[4];
} __attribute__((packed));

struct tp_nd {
	__u8 type;
	__u8 code;
	__u16 sum;
	__be32 flags;
	struct tp_addr target;
	__be16 option;
	__u8 mac[6];
};

static __always_inline int tp_is_on_link(const struct __sk_buff *skb, const struct tp_node_config *cfg)
{
	return (cfg->flags & TP_NODE_ON_LINK) && skb->ifindex == cfg->uplink_ifindex && !skb->vlan_present;
}

/* Whether somebody chose a pod's MAC. */
static __always_inline int tp_mac_is_chosen(const struct tp_pod *pod)
{
	return pod->mac[0] != LINK_FIRST || (pod->mac[1] != LINK_SECOND_V4 && pod->mac[1] != LINK_SECOND_V6);
}

/* Under which MAC a pod's address is known on the link. */
static __always_inline void tp_mac_of_pod(__u8 *mac, const struct tp_pod *pod, const struct tp_addr *addr)
{
	if (!tp_mac_is_chosen(pod))
		tp_link_mac(mac, addr);
	else
		tp_copy_mac(mac, pod->mac);
}

static __always_inline int tp_answer_on_link(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;

	tp_note(2, ifindex, TP_IGNORED);
	return bpf_redirect(ifindex, 0);
}

/* Who asks for a pod here gets its MAC. -1: it is for the kernel. */
static __noinline int tp_arp_on_link(struct __sk_buff *skb, struct tp_work *w)
{
	struct tp_on_link_arp arp;
	struct tp_pod *pod;
	struct tp_addr target;
	__u8 asked[4];
	__be32 v4;

	if (!w || bpf_skb_load_bytes(skb, 0, &arp, sizeof(arp)) || arp.operation != bpf_htons(ARP_REQUEST) || arp.hardware != bpf_htons(1) ||
	    arp.protocol != bpf_htons(ETH_P_IP) || arp.hardware_len != 6 || arp.protocol_len != 4)
		return -1;
	__builtin_memcpy(&v4, arp.target, 4);
	tp_set_v4(&target, v4);
	pod = bpf_map_lookup_elem(&tp_pods, &target);
	/* Who asks for his own address claims it, and wants no answer (RFC 5227 3). */
	if (!pod || !__builtin_memcmp(arp.sender, arp.target, 4))
		return -1;
	__builtin_memcpy(asked, arp.target, 4);
	tp_copy_mac(arp.eth_dst, arp.eth_src);
	tp_mac_of_pod(arp.eth_src, pod, &target);
	arp.operation = bpf_htons(ARP_REPLY);
	tp_copy_mac(arp.target_mac, arp.sender_mac);
	__builtin_memcpy(arp.target, arp.sender, 4);
	tp_copy_mac(arp.sender_mac, arp.eth_src);
	__builtin_memcpy(arp.sender, asked, 4);
	if (bpf_skb_store_bytes(skb, 0, &arp, sizeof(arp), BPF_F_RECOMPUTE_CSUM))
		return tp_drop(skb, TP_DROP_INTERNAL);
	return tp_answer_on_link(skb);
}

/* The same of IPv6; w->h holds the headers, a solicitation of which `nd` has been read. */
static __noinline int tp_nd_on_link(struct __sk_buff *skb, struct tp_work *w)
{
	const __u32 icmp = sizeof(struct ipv6hdr);
	struct tp_headers *frame = (void *)w->quote;
	struct ipv6hdr *ip = &frame->v6;
	struct tp_nd *nd = (void *)(w->quote + __builtin_offsetof(struct tp_headers, v6) + icmp);
	struct tp_addr from;
	struct tp_pod *pod;
	__s64 sum;
	int probe;

	if (bpf_skb_load_bytes(skb, 0, frame->eth_dst, ETH_LEN + icmp) || ip->hop_limit != 255 ||
	    bpf_skb_load_bytes(skb, ETH_LEN + icmp, nd, 24) || nd->code)
		return -1;
	pod = bpf_map_lookup_elem(&tp_pods, &nd->target);
	tp_set_v6(&from, &ip->saddr);
	if (!pod || tp_is_v4(&nd->target) || tp_same(&from, &nd->target))
		return -1;
	/* Who is about to take the address (RFC 4862 5.4.3) has none to be answered at: everybody is told. */
	probe = tp_is_zero(&from);
	if (probe) {
		frame->eth_dst[0] = 0x33;
		frame->eth_dst[1] = 0x33;
		__builtin_memset(frame->eth_dst + 2, 0, 3);
		frame->eth_dst[5] = 1;
		__builtin_memset(&from, 0, sizeof(from));
		from.b[0] = 0xff;
		from.b[1] = 2;
		from.b[15] = 1;
	} else {
		tp_copy_mac(frame->eth_dst, frame->eth_src);
	}
	tp_mac_of_pod(frame->eth_src, pod, &nd->target);
	__builtin_memcpy(&ip->saddr, nd->target.b, 16);
	__builtin_memcpy(&ip->daddr, from.b, 16);
	nd->type = ND_NEIGHBOUR_ADVERTISEMENT;
	nd->sum = 0;
	nd->flags = probe ? ND_UNASKED : ND_SOLICITED;
	nd->option = ND_TARGET_MAC;
	tp_copy_mac(nd->mac, frame->eth_src);
	/* For the sum the header stands as the pseudo-header does: addresses, length, protocol in the last byte of a word. */
	ip->payload_len = bpf_htons(ND_LEN);
	*(__be32 *)ip = bpf_htonl(ICMP6);
	ip->nexthdr = 0;
	ip->hop_limit = 0;
	sum = bpf_csum_diff(NULL, 0, (__be32 *)ip, icmp + ND_LEN, 0);
	if (sum < 0)
		return tp_drop(skb, TP_DROP_INTERNAL);
	nd->sum = tp_finish_sum(sum);
	*(__be32 *)ip = bpf_htonl(0x60000000);
	ip->nexthdr = ICMP6;
	ip->hop_limit = 255;
	if (bpf_skb_change_tail(skb, ETH_LEN + icmp + ND_LEN, 0) ||
	    bpf_skb_store_bytes(skb, 0, frame->eth_dst, ETH_LEN + icmp + ND_LEN, BPF_F_RECOMPUTE_CSUM))
		return tp_drop(skb, TP_DROP_INTERNAL);
	return tp_answer_on_link(skb);
}

/* The pod here that has the packet's source (`at` 0) or destination (1) as its address, which is left in `addr`. NULL: none. */
static __always_inline struct tp_pod *tp_pod_on_link(struct __sk_buff *skb, const __u32 at, struct tp_addr *addr)
{
	__be32 v4;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes(skb, ETH_LEN + 12 + 4 * at, &v4, sizeof(v4)))
			return NULL;
		tp_set_v4(addr, v4);
	} else if (skb->protocol != bpf_htons(ETH_P_IPV6) || bpf_skb_load_bytes(skb, ETH_LEN + 8 + 16 * at, addr, sizeof(*addr)) ||
		   tp_is_v4(addr)) {
		return NULL;
	}
	return bpf_map_lookup_elem(&tp_pods, addr);
}

/*
 * What comes from the link, before all else: answers for pods, and has the kernel take a frame to a pod's MAC for its own, for that is who
 * forwards it. -1: it goes on.
 */
static __always_inline int tp_on_link(struct __sk_buff *skb, struct tp_work *w)
{
	__u8 to[6], own[6], type;
	struct tp_addr addr;
	struct tp_pod *pod;

	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return tp_arp_on_link(skb, w);
	if (skb->protocol == bpf_htons(ETH_P_IPV6) && !bpf_skb_load_bytes(skb, ETH_LEN + 6, &type, 1) && type == ICMP6 &&
	    !bpf_skb_load_bytes(skb, ETH_LEN + sizeof(struct ipv6hdr), &type, 1) && type == ND_NEIGHBOUR_SOLICITATION)
		return tp_nd_on_link(skb, w);
	if (skb->pkt_type != PACKET_OTHERHOST)
		return -1;
	pod = tp_pod_on_link(skb, 1, &addr);
	if (!pod || bpf_skb_load_bytes(skb, 0, to, sizeof(to)))
		return -1;
	tp_link_mac(own, &addr);
	if (tp_same_mac(own, to) || tp_same_mac(pod->mac, to))
		bpf_skb_change_type(skb, PACKET_HOST);
	return -1;
}

/* Whether a packet is for a node of this network or a pod behind one. */
static __always_inline int tp_goes_to_peer(struct __sk_buff *skb)
{
	struct tp_cidr_key key = {};
	struct tp_addr to;
	__be32 v4;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes(skb, ETH_LEN + 16, &v4, sizeof(v4)))
			return 0;
		tp_set_v4(&to, v4);
	} else if (bpf_skb_load_bytes(skb, ETH_LEN + 24, &to, sizeof(to))) {
		return 0;
	}
	tp_full_prefix(&key, &to);
	return bpf_map_lookup_elem(&tp_peers, &key) != NULL;
}

/*
 * Gives what leaves with a pod's address the MAC of that: whatever way it took, so that switches know where it is. Where the pod's is chosen,
 * nodes send to the other one: switches hear that from what goes to them. Not 0: it could not.
 */
static __always_inline int tp_own_mac(struct __sk_buff *skb)
{
	struct tp_addr addr;
	struct tp_pod *pod = tp_pod_on_link(skb, 0, &addr);
	__u8 from[6], own[6];

	if (!pod || bpf_skb_load_bytes(skb, 6, from, sizeof(from)))
		return 0;
	if (tp_mac_is_chosen(pod) && !tp_goes_to_peer(skb))
		tp_copy_mac(own, pod->mac);
	else
		tp_link_mac(own, &addr);
	return tp_same_mac(own, from) ? 0 : bpf_skb_store_bytes(skb, 6, own, sizeof(own), 0);
}

#endif
