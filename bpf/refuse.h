/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The answer to a packet for a Service without a backend: a reset, or port unreachable, made of the packet itself and sent
 * back to where it came from.
 */
#ifndef TOWPATH_REFUSE_H
#define TOWPATH_REFUSE_H

#define IPV4_QUOTE 28			/* header and eight bytes (RFC 792) */
#define IPV6_QUOTE 48
#define IPV6_QUOTE_TOO_BIG 56		/* of a fragment, its own header comes between */

static __always_inline int tp_swap_macs(struct __sk_buff *skb, struct tp_work *w)
{
	__u8 swapped[12];

	tp_copy_mac(swapped, w->h.eth_src);
	tp_copy_mac(swapped + 6, w->h.eth_dst);
	return bpf_skb_store_bytes(skb, 0, swapped, sizeof(swapped), 0);
}

/* Swaps addresses and ports: no checksum changes. */
static __always_inline int tp_swap_ends(struct __sk_buff *skb, struct tp_work *w)
{
	__be16 ports[2] = { w->l4.dport, w->l4.sport };
	struct tp_addr ends[2] = { w->p.t.daddr, w->p.t.saddr };
	__be32 ends4[2] = { tp_word(&ends[0], 3), tp_word(&ends[1], 3) };

	if (tp_swap_macs(skb, w) || bpf_skb_store_bytes(skb, w->p.l4_off, ports, sizeof(ports), 0))
		return -1;
	if (w->p.flags & TP_PKT_V6)
		return bpf_skb_store_bytes(skb, V6_SADDR_OFF, ends, sizeof(ends), 0);
	return bpf_skb_store_bytes(skb, V4_SADDR_OFF, ends4, sizeof(ends4), 0);
}

/* Payload bytes of the segment, from the network header's length. */
static __always_inline __u32 tp_payload_len(const struct tp_work *w)
{
	__u32 end = w->p.flags & TP_PKT_V6 ? ETH_LEN + sizeof(struct ipv6hdr) + bpf_ntohs(w->h.v6.payload_len) :
					     ETH_LEN + bpf_ntohs(w->h.v4.tot_len);
	__u32 start = w->p.l4_off + (w->l4.offset >> 4) * 4;

	return end > start ? end - start : 0;
}

/*
 * RFC 9293 3.10.7.1. The segment keeps its length, so that its checksum can be corrected whether it is complete or partial. Its
 * options become payload, which is ignored: of those of its own the sender takes a timestamp's echo for a reason to drop the reset
 * (RFC 7323 5, when it uses a port again that waits for the end of its time).
 */
static __always_inline int tp_reset(struct __sk_buff *skb, struct tp_work *w)
{
	struct tp_l4 *new = &w->l4_new;
	__u32 sum = w->p.l4_off + 16;
	__s64 diff;

	*new = w->l4;
	new->offset = 5 << 4;
	if (w->l4.flags & TCP_ACK) {
		new->seq = w->l4.ack;
		new->ack = 0;
		new->flags = TCP_RST;
	} else {
		new->seq = 0;
		new->ack = bpf_htonl(bpf_ntohl(w->l4.seq) + tp_payload_len(w) + !!(w->l4.flags & TCP_SYN) +
				     !!(w->l4.flags & TCP_FIN));
		new->flags = TCP_RST | TCP_ACK;
	}
	new->window = 0;
	diff = bpf_csum_diff((__be32 *)&w->l4.seq, 12, (__be32 *)&new->seq, 12, 0);
	if (diff < 0 || bpf_l4_csum_replace(skb, sum, 0, diff, 0))
		return -1;
	if (bpf_skb_store_bytes(skb, w->p.l4_off + 4, &new->seq, 12, 0))
		return -1;
	return tp_swap_ends(skb, w);
}

static __always_inline __u16 tp_finish_sum(__s64 sum)
{
	return ~tp_fold(tp_fold((__u32)sum));
}

/* `mtu`: in bytes, of what is too big (RFC 1191); 0: nobody listens at the port. */
static __always_inline int tp_unreachable_v4(struct __sk_buff *skb, struct tp_work *w, __u32 mtu)
{
	struct iphdr *ip = (void *)w->quote;
	struct tp_icmp *icmp = (void *)(w->quote + sizeof(*ip));
	__u32 size = sizeof(*ip) + sizeof(*icmp) + IPV4_QUOTE;

	if (bpf_skb_load_bytes(skb, ETH_LEN, w->quote + sizeof(*ip) + sizeof(*icmp), IPV4_QUOTE))
		return -1;
	if (bpf_skb_change_tail(skb, ETH_LEN + IPV4_QUOTE, 0) ||
	    bpf_skb_adjust_room(skb, sizeof(*ip) + sizeof(*icmp), BPF_ADJ_ROOM_MAC, 0))
		return -1;
	__builtin_memset(w->quote, 0, sizeof(*ip) + sizeof(*icmp));
	ip->version = 4;
	ip->ihl = 5;
	ip->tot_len = bpf_htons(size);
	ip->ttl = 64;
	ip->protocol = IPPROTO_ICMP;
	ip->saddr = w->h.v4.daddr;
	ip->daddr = w->h.v4.saddr;
	ip->check = tp_finish_sum(bpf_csum_diff(NULL, 0, (__be32 *)w->quote, sizeof(*ip), 0));
	icmp->type = 3;
	icmp->code = mtu ? 4 : 3;
	icmp->seq = bpf_htons(mtu);
	icmp->sum = tp_finish_sum(bpf_csum_diff(NULL, 0, (__be32 *)icmp, sizeof(*icmp) + IPV4_QUOTE, 0));
	return bpf_skb_store_bytes(skb, ETH_LEN, w->quote, sizeof(*ip) + sizeof(*icmp) + IPV4_QUOTE, 0);
}

/* The same (RFC 8201). */
static __always_inline int tp_unreachable_v6(struct __sk_buff *skb, struct tp_work *w, __u32 mtu)
{
	const __u32 quote = mtu ? IPV6_QUOTE_TOO_BIG : IPV6_QUOTE;
	struct ipv6hdr *ip = (void *)w->quote;
	struct tp_icmp *icmp = (void *)(w->quote + sizeof(*ip));
	const __u32 len = sizeof(*icmp) + quote;
	__s64 sum;

	if (bpf_skb_load_bytes(skb, ETH_LEN, w->quote + sizeof(*ip) + sizeof(*icmp), quote))
		return -1;
	if (bpf_skb_change_tail(skb, ETH_LEN + quote, 0) ||
	    bpf_skb_adjust_room(skb, sizeof(*ip) + sizeof(*icmp), BPF_ADJ_ROOM_MAC, 0))
		return -1;
	__builtin_memset(w->quote, 0, sizeof(*ip) + sizeof(*icmp));
	/* For the sum the header stands as the pseudo-header does: addresses, length, protocol in the last byte of a word. */
	ip->saddr = w->h.v6.daddr;
	ip->daddr = w->h.v6.saddr;
	ip->payload_len = bpf_htons(len);
	*(__be32 *)w->quote = bpf_htonl(ICMP6);
	icmp->type = mtu ? 2 : 1;
	icmp->code = mtu ? 0 : 4;
	icmp->seq = bpf_htons(mtu);
	sum = bpf_csum_diff(NULL, 0, (__be32 *)w->quote, sizeof(*ip) + sizeof(*icmp) + quote, 0);
	icmp->sum = tp_finish_sum(sum);
	*(__be32 *)w->quote = bpf_htonl(0x60000000);
	ip->nexthdr = ICMP6;
	ip->hop_limit = 64;
	return bpf_skb_store_bytes(skb, ETH_LEN, w->quote, sizeof(*ip) + sizeof(*icmp) + quote, 0);
}

/* Turns the packet into its refusal. Nonzero: it cannot be answered, drop it. */
static __noinline int tp_make_refusal(struct __sk_buff *skb, struct tp_work *w)
{
	if (w->p.flags & (TP_PKT_SLOW | TP_PKT_FIRST_FRAG | TP_PKT_LATER_FRAG))
		return -1;
	if (w->p.t.proto == IPPROTO_TCP) {
		if ((w->l4.flags & TCP_RST) || skb->gso_size)
			return -1;
		return tp_reset(skb, w);
	}
	if (w->p.t.proto != IPPROTO_UDP)
		return -1;
	if (w->p.flags & TP_PKT_V6 ? tp_unreachable_v6(skb, w, 0) : tp_unreachable_v4(skb, w, 0))
		return -1;
	return tp_swap_macs(skb, w);
}

/* `into_peer`: the packet came out of a pod and its refusal goes into it without passing the pod's policy. */
static __always_inline int tp_refuse(struct __sk_buff *skb, struct tp_work *w, int into_peer)
{
	/* By the address that was asked. */
	if (w->translated)
		w->p.t = w->sent;
	if (tp_make_refusal(skb, w))
		return tp_drop(skb, TP_DROP_NO_BACKEND);
	tp_count(TP_REFUSED, skb->len);
	tp_tell(TP_REFUSED, skb->ifindex, skb->len, 0);
	tp_note(into_peer ? 1 : 2, skb->ifindex, TP_REFUSED);
	return into_peer ? bpf_redirect_peer(skb->ifindex, 0) : bpf_redirect(skb->ifindex, 0);
}

/* Whether a packet does not fit the tunnel, and nobody may cut it on the way. */
static __always_inline int tp_is_too_big(struct __sk_buff *skb, const struct tp_work *w, const struct tp_node_config *cfg)
{
	if (!cfg->tunnel_mtu || skb->gso_size || skb->len - ETH_LEN <= cfg->tunnel_mtu)
		return 0;
	return (w->p.flags & TP_PKT_V6) || (w->h.v4.frag_off & bpf_htons(IP_DF));
}

/*
 * Tells who sent it, of what it sent: the stack would speak of the translated packet, to a sender who knows of no such destination.
 * Nonzero: it cannot be told, drop it.
 */
static __noinline int tp_make_too_big(struct __sk_buff *skb, struct tp_work *w, const struct tp_node_config *cfg)
{
	__u32 mtu = cfg->tunnel_mtu;

	if (mtu > 0xffff || !mtu)
		return -1;
	if (w->p.flags & TP_PKT_V6 ? tp_unreachable_v6(skb, w, mtu) : tp_unreachable_v4(skb, w, mtu))
		return -1;
	return tp_swap_macs(skb, w);
}

/* Of a packet that would share another connection's entry (tp_ct_clashes): whoever sent it tries again from another port. */
static __always_inline int tp_refuse_clash(struct __sk_buff *skb, struct tp_work *w, int into_peer)
{
	return tp_refuse(skb, w, into_peer);
}

#endif
