/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Changes to headers, with every checksum kept right: complete ones, partial ones (CHECKSUM_PARTIAL: the field holds the
 * pseudo-header's sum) and the device's sum of the whole packet (CHECKSUM_COMPLETE).
 */
#ifndef TOWPATH_REWRITE_H
#define TOWPATH_REWRITE_H

#define V4_TTL_OFF (ETH_LEN + 8)
#define V4_SUM_OFF (ETH_LEN + 10)
#define V4_SADDR_OFF (ETH_LEN + 12)
#define V4_DADDR_OFF (ETH_LEN + 16)
#define V6_TTL_OFF (ETH_LEN + 7)
#define V6_SADDR_OFF (ETH_LEN + 8)
#define V6_DADDR_OFF (ETH_LEN + 24)

/* Offset of the transport checksum, 0: this packet has none that depends on addresses (ICMP, SCTP, later fragments). */
static __always_inline __u32 tp_sum_off(const struct tp_packet *p)
{
	if (p->flags & TP_PKT_LATER_FRAG)
		return 0;
	if (p->t.proto == IPPROTO_TCP)
		return p->l4_off + 16;
	if (p->t.proto == IPPROTO_UDP)
		return p->l4_off + 6;
	if (p->t.proto == ICMP6)
		return p->l4_off + 2;
	return 0;
}

/* A UDP checksum of 0 means none, and must neither appear nor disappear. */
static __always_inline __u64 tp_sum_flags(const struct tp_packet *p)
{
	return p->t.proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
}

static __always_inline int tp_rewrite_v4(struct __sk_buff *skb, struct tp_work *w, int source, __be32 to)
{
	__be32 from = source ? w->h.v4.saddr : w->h.v4.daddr;
	__u32 off = source ? V4_SADDR_OFF : V4_DADDR_OFF;
	__u32 sum = tp_sum_off(&w->p);

	if (sum && bpf_l4_csum_replace(skb, sum, from, to, BPF_F_PSEUDO_HDR | tp_sum_flags(&w->p) | 4))
		return -1;
	if (bpf_l3_csum_replace(skb, V4_SUM_OFF, from, to, 4))
		return -1;
	if (bpf_skb_store_bytes(skb, off, &to, 4, 0))
		return -1;
	/* The copy is what forwarding works on. */
	return bpf_skb_load_bytes(skb, ETH_LEN, &w->h.v4, sizeof(w->h.v4));
}

static __always_inline int tp_rewrite_v6(struct __sk_buff *skb, struct tp_work *w, int source, const struct tp_addr *to)
{
	void *from = source ? &w->h.v6.saddr : &w->h.v6.daddr;
	__u32 off = source ? V6_SADDR_OFF : V6_DADDR_OFF;
	__u32 sum = tp_sum_off(&w->p);
	__s64 diff = bpf_csum_diff(from, 16, (__be32 *)to->b, 16, 0);

	if (diff < 0)
		return -1;
	if (sum && bpf_l4_csum_replace(skb, sum, 0, diff, BPF_F_PSEUDO_HDR | tp_sum_flags(&w->p)))
		return -1;
	/* The line above took the checksum field's change out of a complete sum, if there is such a field; this puts the address's
	 * change in. (IPv4 needs no such thing: there the header's own checksum makes up for the address.) */
	if (bpf_skb_store_bytes(skb, off, to->b, 16, BPF_F_RECOMPUTE_CSUM))
		return -1;
	return bpf_skb_load_bytes(skb, ETH_LEN, &w->h.v6, sizeof(w->h.v6));
}

/* Gives the packet another source, or another destination. 0, or the reason to drop it. */
TP_APART __u32 tp_rewrite(struct __sk_buff *skb, struct tp_work *w, __u32 source, const struct tp_addr *addr,
			  __be16 port)
{
	__u32 sum, at = source ? 0 : 2, sctp, reason;
	__be16 old;

	if (!w || !addr)
		return TP_DROP_INTERNAL;
	old = source ? w->l4.sport : w->l4.dport;
	sum = tp_sum_off(&w->p);
	sctp = w->p.t.proto == SCTP;
	if (w->p.flags & TP_PKT_V6 ? tp_rewrite_v6(skb, w, source, addr) :
				     tp_rewrite_v4(skb, w, source, tp_word(addr, 3)))
		return TP_DROP_INTERNAL;
	if (w->p.flags & TP_PKT_LATER_FRAG || !tp_has_ports(w->p.t.proto) || old == port)
		return 0;
	reason = sctp ? tp_sctp_port(skb, w, at, old, port) : 0;
	if (reason)
		return reason;
	/* Without a pseudo-header flag a partial sum is left alone: the device adds the ports when it completes it. */
	if (sum && bpf_l4_csum_replace(skb, sum, old, port, tp_sum_flags(&w->p) | 2))
		return TP_DROP_INTERNAL;
	/* A sum of the whole packet stays as it is: the checksum makes up for the port. Not so that of SCTP. */
	return bpf_skb_store_bytes(skb, w->p.l4_off + at, &port, 2, sctp ? BPF_F_RECOMPUTE_CSUM : 0) ? TP_DROP_INTERNAL : 0;
}

/*
 * Gives the packet that an ICMP error quotes the destination that its sender gave it, and the error the Service's source
 * if it comes from the backend itself. The quoted transport checksum stays as it was: nobody checks it.
 */
static __noinline int tp_restore_quoted(struct __sk_buff *skb, struct tp_work *w)
{
	__u32 ip = w->p.l4_off + 8, sum = w->p.l4_off + 2;
	__be16 port = w->nat.dport;

	if (!w->restore)
		return 0;
	if (w->p.flags & TP_PKT_V6) {
		__s64 diff = bpf_csum_diff((__be32 *)w->quoted.daddr.b, 16, (__be32 *)w->nat.daddr.b, 16, 0);

		if (diff < 0 || bpf_l4_csum_replace(skb, sum, 0, diff, 0) ||
		    bpf_skb_store_bytes(skb, ip + 24, w->nat.daddr.b, 16, 0))
			return -1;
	} else {
		/* The quoted header's checksum makes up for the address, so the error's own stays as it is. */
		__be32 to = tp_word(&w->nat.daddr, 3);

		if (bpf_l3_csum_replace(skb, ip + 10, tp_word(&w->quoted.daddr, 3), to, 4) ||
		    bpf_skb_store_bytes(skb, ip + 16, &to, 4, 0))
			return -1;
	}
	if (tp_has_ports(w->quoted.proto) && port != w->quoted.dport &&
	    (bpf_l4_csum_replace(skb, sum, w->quoted.dport, port, 2) ||
	     bpf_skb_store_bytes(skb, w->quoted_l4 + 2, &port, 2, 0)))
		return -1;
	if (!tp_same(&w->p.t.saddr, &w->quoted.daddr))
		return 0;
	return tp_rewrite(skb, w, 1, &w->nat.daddr, 0);
}

/*
 * The other way: gives the packet that an ICMP error quotes the source that its sender gave it, lb.backend, and the error that
 * destination. 0, or the reason to drop it.
 */
static __noinline __u32 tp_aim_quoted(struct __sk_buff *skb, struct tp_work *w)
{
	__u32 ip = w->p.l4_off + 8, sum = w->p.l4_off + 2;
	struct tp_addr *to = &w->lb.backend.addr;
	__be16 port = w->lb.backend.port;

	if (w->p.flags & TP_PKT_V6) {
		__s64 diff = bpf_csum_diff((__be32 *)w->quoted.saddr.b, 16, (__be32 *)to->b, 16, 0);

		if (diff < 0 || bpf_l4_csum_replace(skb, sum, 0, diff, 0) || bpf_skb_store_bytes(skb, ip + 8, to->b, 16, 0))
			return TP_DROP_INTERNAL;
	} else {
		__be32 v4 = tp_word(to, 3);

		if (bpf_l3_csum_replace(skb, ip + 10, tp_word(&w->quoted.saddr, 3), v4, 4) ||
		    bpf_skb_store_bytes(skb, ip + 12, &v4, 4, 0))
			return TP_DROP_INTERNAL;
	}
	if (port != w->quoted.sport && (bpf_l4_csum_replace(skb, sum, w->quoted.sport, port, 2) ||
					bpf_skb_store_bytes(skb, w->quoted_l4, &port, 2, 0)))
		return TP_DROP_INTERNAL;
	return tp_rewrite(skb, w, 0, to, 0);
}

/*
 * Writes the Ethernet header and the time to live of w->h. In IPv4 the header's checksum changes the other way, so a sum of the
 * whole packet stays as it is.
 */
static __always_inline int tp_write_headers(struct __sk_buff *skb, struct tp_work *w)
{
	if (!(w->p.flags & TP_PKT_V6))
		return bpf_skb_store_bytes(skb, 0, w->h.eth_dst, ETH_LEN + 12, 0);
	if (bpf_skb_store_bytes(skb, 0, w->h.eth_dst, ETH_LEN, 0))
		return -1;
	return bpf_skb_store_bytes(skb, V6_TTL_OFF, &w->h.v6.hop_limit, 1, BPF_F_RECOMPUTE_CSUM);
}

static __always_inline int tp_forward_headers(struct __sk_buff *skb, struct tp_work *w)
{
	tp_take_one_hop(w);
	return tp_write_headers(skb, w);
}

#endif
