/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* From bytes to struct tp_packet. Answers 0, or the reason for which the packet is to be dropped. */
#ifndef TOWPATH_PARSE_H
#define TOWPATH_PARSE_H

#define IP_DF 0x4000
#define IP_MF 0x2000
#define IP_OFFSET 0x1fff
#define ICMP6 58
#define ND_ROUTER_SOLICITATION 133
#define ND_ROUTER_ADVERTISEMENT 134
#define ND_NEIGHBOUR_SOLICITATION 135
#define ND_NEIGHBOUR_ADVERTISEMENT 136
#define ND_REDIRECT 137
#define SCTP 132

static __always_inline int tp_has_ports(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == SCTP;
}

/*
 * Headers are read straight from the packet where they lie in its linear part, which they nearly always do, and by the
 * helper otherwise. The copies go by words, because the compiler trusts no alignment of the packet. (Written they are by
 * helpers only: a program that writes to the packet itself makes the kernel copy every clone that TCP sends.)
 *
 * `base`, here and below: where the packet's Ethernet header lies, 0 or inside an envelope.
 */
static __always_inline int tp_load_network(tp_context *ctx, struct tp_work *w, const __u32 base, const __u32 words)
{
	const void *data = (void *)(long)ctx->data;
	const void *end = (void *)(long)ctx->data_end;
	__u16 *link = (__u16 *)w->h.eth_dst;
	__u32 *network = (__u32 *)&w->h.v4;

	if (data + base + ETH_LEN + words * 4 > end)
		return tp_load(ctx, base, w->h.eth_dst, ETH_LEN + words * 4);
#pragma unroll
	for (int i = 0; i < ETH_LEN / 2; i++)
		link[i] = ((const __u16 *)(data + base))[i];
#pragma unroll
	for (int i = 0; i < words; i++)
		network[i] = ((const __u32 *)(data + base + ETH_LEN))[i];
	return 0;
}

/* `usual`: where the transport header begins after a network header without options. */
static __always_inline int tp_load_transport(tp_context *ctx, struct tp_work *w, const __u32 base, const __u32 usual,
					     const __u32 words)
{
	const void *data = (void *)(long)ctx->data;
	const void *end = (void *)(long)ctx->data_end;

	if (w->p.l4_off != usual || data + base + usual + words * 4 > end)
		return tp_load(ctx, base + w->p.l4_off, &w->l4, words * 4);
#pragma unroll
	for (int i = 0; i < words; i++)
		((__u32 *)&w->l4)[i] = ((const __u32 *)(data + base + usual))[i];
	return 0;
}

/* Echo: the identifier stands for both ports. Errors quote a packet. Everything else has no ports. */
static __always_inline void tp_parse_icmp(struct tp_packet *p, const struct tp_icmp *icmp, int v6)
{
	__u8 request = v6 ? 128 : 8;
	__u8 reply = v6 ? 129 : 0;

	p->icmp_type = icmp->type;
	if (icmp->type == request || icmp->type == reply) {
		p->t.sport = icmp->id;
		p->t.dport = icmp->id;
		if (icmp->type == request)
			p->flags |= TP_PKT_OPENS;
		return;
	}
	if (v6 ? (icmp->type >= 1 && icmp->type <= 4) :
		 (icmp->type == 3 || icmp->type == 11 || icmp->type == 12))
		p->flags |= TP_PKT_ERROR;
}

/* Ports, flags and identifiers; p.l4_off and p.t.proto are set. */
static __always_inline __u32 tp_parse_l4(tp_context *ctx, struct tp_work *w, const __u32 base, const __u32 usual)
{
	struct tp_packet *p = &w->p;
	__u8 proto = p->t.proto;

	if (proto == IPPROTO_TCP) {
		if (tp_load_transport(ctx, w, base, usual, 4))
			return TP_DROP_MALFORMED;
		p->tcp_flags = w->l4.flags;
		if ((w->l4.flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN)
			p->flags |= TP_PKT_OPENS;
	} else if (proto == IPPROTO_UDP || proto == SCTP) {
		/* Both have eight bytes at least: as many as a sequence number takes after the ports. */
		if (tp_load_transport(ctx, w, base, usual, 2))
			return TP_DROP_MALFORMED;
	} else if (proto == IPPROTO_ICMP || proto == ICMP6) {
		int v6 = p->flags & TP_PKT_V6;

		if ((proto == ICMP6) != !!v6)
			return TP_DROP_MALFORMED;
		if (tp_load(ctx, base + p->l4_off, &w->icmp, sizeof(w->icmp)))
			return TP_DROP_MALFORMED;
		tp_parse_icmp(p, &w->icmp, v6);
		return 0;
	} else {
		return 0;
	}
	p->t.sport = w->l4.sport;
	p->t.dport = w->l4.dport;
	return 0;
}

static __always_inline void tp_frag_key_of(struct tp_work *w, const struct tp_tuple *t)
{
	w->frag_key.saddr = t->saddr;
	w->frag_key.daddr = t->daddr;
	w->frag_key.id = w->p.frag_id;
	w->frag_key.proto = t->proto;
	__builtin_memset(w->frag_key.pad, 0, sizeof(w->frag_key.pad));
}

/* A first fragment, `t` as it was sent, leaves its ports behind for those that follow. Only once its source is believed: what
 * is planted here decides how others' fragments are judged. */
static __noinline void tp_frag_record(struct tp_work *w, const struct tp_tuple *t)
{
	tp_frag_key_of(w, t);
	w->frag.sport = t->sport;
	w->frag.dport = t->dport;
	w->frag.way = TP_FRAG_FIRST;
	bpf_map_update_elem(&tp_frags, &w->frag_key, &w->frag, BPF_ANY);
}

static __always_inline __u32 tp_frag_follow(struct tp_work *w)
{
	struct tp_frag *first;

	tp_frag_key_of(w, &w->p.t);
	first = bpf_map_lookup_elem(&tp_frags, &w->frag_key);
	if (!first || first->way == TP_FRAG_WHOLE)
		return TP_DROP_FRAGMENT;
	if (first->way == TP_FRAG_TOO_BIG)
		w->p.flags |= TP_PKT_SLOW;
	w->p.t.sport = first->sport;
	w->p.t.dport = first->dport;
	return 0;
}

/* Whether this is the first fragment of a datagram of which a later one came before. */
static __always_inline int tp_is_out_of_order(struct tp_work *w)
{
	struct tp_frag *later;

	if (!(w->p.flags & TP_PKT_FIRST_FRAG))
		return 0;
	tp_frag_key_of(w, &w->p.t);
	later = bpf_map_lookup_elem(&tp_frags, &w->frag_key);
	return later && later->way == TP_FRAG_WHOLE;
}

/*
 * The first fragment goes to the stack, which puts the datagram together: so must those that follow, also the last, which is small. `t`: as
 * they are sent.
 */
static __noinline void tp_frag_too_big(struct tp_work *w, const struct tp_tuple *t)
{
	tp_frag_key_of(w, t);
	w->frag.sport = t->sport;
	w->frag.dport = t->dport;
	w->frag.way = TP_FRAG_TOO_BIG;
	bpf_map_update_elem(&tp_frags, &w->frag_key, &w->frag, BPF_ANY);
}

/* Leaves all fragments of a datagram to the kernel. As with tp_frag_record, only once the source is believed. */
static __always_inline void tp_frag_leave(struct tp_work *w)
{
	tp_frag_key_of(w, &w->p.t);
	__builtin_memset(&w->frag, 0, sizeof(w->frag));
	w->frag.way = TP_FRAG_WHOLE;
	bpf_map_update_elem(&tp_frags, &w->frag_key, &w->frag, BPF_ANY);
}

static __always_inline __u32 tp_parse_rest(tp_context *ctx, struct tp_work *w, const __u32 base, const __u32 usual)
{
	if (w->p.flags & TP_PKT_LATER_FRAG)
		return tp_frag_follow(w);
	return tp_parse_l4(ctx, w, base, usual);
}

static __always_inline __u32 tp_parse_v4(tp_context *ctx, struct tp_work *w, const __u32 base)
{
	struct tp_packet *p = &w->p;
	struct iphdr *ip = &w->h.v4;
	__u32 header, total, frag, len = tp_len(ctx);

	if (tp_load_network(ctx, w, base, sizeof(*ip) / 4))
		return TP_DROP_MALFORMED;
	header = ip->ihl * 4;
	total = bpf_ntohs(ip->tot_len);
	/* A total length of 0 is how the kernel writes segments above 64 KiB (BIG TCP). */
	if (ip->version != 4 || header < sizeof(*ip) || base + ETH_LEN + header > len ||
	    (total ? total < header || base + ETH_LEN + total > len : !tp_segment_size(ctx)))
		return TP_DROP_MALFORMED;
	tp_set_v4(&p->t.saddr, ip->saddr);
	tp_set_v4(&p->t.daddr, ip->daddr);
	p->t.proto = ip->protocol;
	p->ttl = ip->ttl;
	p->l4_off = ETH_LEN + header;
	if (header != sizeof(*ip))
		p->flags |= TP_PKT_SLOW;
	frag = bpf_ntohs(ip->frag_off);
	if (frag & (IP_MF | IP_OFFSET)) {
		p->frag_id = ip->id;
		p->flags |= frag & IP_OFFSET ? TP_PKT_LATER_FRAG : TP_PKT_FIRST_FRAG;
		/* RFC 1858: a second fragment at byte 8 rewrites the flags of a TCP header. */
		if ((frag & IP_OFFSET) == 1 && ip->protocol == IPPROTO_TCP)
			return TP_DROP_MALFORMED;
	}
	return tp_parse_rest(ctx, w, base, ETH_LEN + sizeof(*ip));
}

#define NEXT_HOP 0
#define NEXT_ROUTING 43
#define NEXT_FRAGMENT 44
#define NEXT_AUTH 51
#define NEXT_DEST 60
#define EXTENSIONS_MAX 6

/* The beginning of an extension header; the last two fields are a fragment header's. */
struct tp_extension {
	__u8 next;
	__u8 len;
	__be16 offset;
	__be32 id;
};

static __always_inline int tp_is_extension(__u8 next)
{
	return next == NEXT_HOP || next == NEXT_ROUTING || next == NEXT_FRAGMENT || next == NEXT_AUTH || next == NEXT_DEST;
}

/* In bytes, of a header of the kind `kind`. */
static __always_inline __u32 tp_extension_len(__u8 kind, const struct tp_extension *ext)
{
	if (kind == NEXT_FRAGMENT)
		return 8;
	return kind == NEXT_AUTH ? (ext->len + 2) * 4 : (ext->len + 1) * 8;
}

/* Walks the extension headers to the transport header. */
static __always_inline __u32 tp_parse_extensions(tp_context *ctx, struct tp_packet *p, const __u32 base,
						__u8 next)
{
	struct tp_extension ext;
	__u32 off = ETH_LEN + sizeof(struct ipv6hdr);

	for (int i = 0; i < EXTENSIONS_MAX; i++) {
		if (!tp_is_extension(next)) {
			p->t.proto = next;
			p->l4_off = off;
			return 0;
		}
		if (tp_load(ctx, base + off, &ext, sizeof(ext)))
			return TP_DROP_MALFORMED;
		if (next == NEXT_HOP && i)
			return TP_DROP_MALFORMED;
		if (next == NEXT_FRAGMENT) {
			__u32 frag = bpf_ntohs(ext.offset);

			if (frag & 0xfff9) {
				p->frag_id = ext.id;
				p->flags |= frag & 0xfff8 ? TP_PKT_LATER_FRAG : TP_PKT_FIRST_FRAG;
			}
			off += tp_extension_len(NEXT_FRAGMENT, &ext);
			next = ext.next;
			if (p->flags & TP_PKT_LATER_FRAG) {
				p->t.proto = next;
				p->l4_off = off;
				return 0;
			}
			continue;
		}
		p->flags |= TP_PKT_SLOW;
		off += tp_extension_len(next, &ext);
		next = ext.next;
	}
	return TP_DROP_MALFORMED;
}

static __always_inline __u32 tp_parse_v6(tp_context *ctx, struct tp_work *w, const __u32 base)
{
	struct tp_packet *p = &w->p;
	struct ipv6hdr *ip = &w->h.v6;
	__u32 reason;

	if (tp_load_network(ctx, w, base, sizeof(*ip) / 4) || ip->version != 6)
		return TP_DROP_MALFORMED;
	if (base + ETH_LEN + sizeof(*ip) + bpf_ntohs(ip->payload_len) > tp_len(ctx))
		return TP_DROP_MALFORMED;
	p->flags |= TP_PKT_V6;
	tp_set_v6(&p->t.saddr, &ip->saddr);
	tp_set_v6(&p->t.daddr, &ip->daddr);
	if (tp_embeds_v4(&p->t.saddr) || tp_embeds_v4(&p->t.daddr))
		return TP_DROP_MAPPED_V4;
	p->ttl = ip->hop_limit;
	reason = tp_parse_extensions(ctx, p, base, ip->nexthdr);
	if (reason)
		return reason;
	return tp_parse_rest(ctx, w, base, ETH_LEN + sizeof(*ip));
}

static __always_inline __u32 tp_parse_at(tp_context *ctx, struct tp_work *w, const __u32 base, __be16 protocol)
{
	struct tp_packet *p = &w->p;

	__builtin_memset(p, 0, sizeof(*p));
	w->reason = 0;
	w->reply = 0;
	w->translated = 0;
	w->sought = TP_NAT_UNSOUGHT;
	w->has_via = 0;
	w->by = TP_BY_ENVELOPE;
	w->resolve = 0;
	w->restore = 0;
	w->direct = 0;
	w->own_node = TP_OWN_UNKNOWN;
	if (protocol == bpf_htons(ETH_P_IP))
		return tp_parse_v4(ctx, w, base);
	if (protocol == bpf_htons(ETH_P_IPV6))
		return tp_parse_v6(ctx, w, base);
	return TP_DROP_MALFORMED;
}

TP_APART __u32 tp_parse(tp_context *ctx, struct tp_work *w)
{
	return w ? tp_parse_at(ctx, w, 0, tp_protocol(ctx)) : TP_DROP_INTERNAL;
}

/* The packet inside the envelope that tp_is_envelope has seen. Offsets are those that it has once the envelope is off. */
static __noinline __u32 tp_parse_inner(tp_context *ctx, struct tp_work *w)
{
	return tp_parse_at(ctx, w, TP_ENVELOPE_LEN, w->envelope.eth_type);
}

/* The same of an IP header alone, that tp_is_ipip has seen. */
static __noinline __u32 tp_parse_in_ipip(tp_context *ctx, struct tp_work *w)
{
	return tp_parse_at(ctx, w, sizeof(struct iphdr), w->outer.eth_type);
}

static __noinline __u32 tp_parse_in_ipip6(tp_context *ctx, struct tp_work *w)
{
	return tp_parse_at(ctx, w, sizeof(struct ipv6hdr), w->outer.eth_type);
}

/* Walks the extension headers of a quoted packet, as far as they are quoted. */
static __always_inline int tp_quoted_extensions(tp_context *ctx, __u8 *next, __u32 *off)
{
	struct tp_extension ext;

	for (int i = 0; i < EXTENSIONS_MAX; i++) {
		if (!tp_is_extension(*next))
			return 0;
		if (tp_load(ctx, *off, &ext, sizeof(ext)))
			return -1;
		/* Behind it are no ports. */
		if (*next == NEXT_FRAGMENT && (ext.offset & bpf_htons(0xfff8)))
			return -1;
		*off += tp_extension_len(*next, &ext);
		*next = ext.next;
	}
	return -1;
}

/* The tuple of the packet that an ICMP error quotes, as the quoted packet has it. */
static __noinline __u32 tp_parse_quoted(tp_context *ctx, struct tp_work *w)
{
	struct tp_tuple *t = &w->quoted;
	__u32 off = w->p.l4_off + 8;

	__builtin_memset(t, 0, sizeof(*t));
	if (w->p.flags & TP_PKT_V6) {
		struct ipv6hdr ip;

		if (tp_load(ctx, off, &ip, sizeof(ip)) || ip.version != 6)
			return TP_DROP_MALFORMED;
		tp_set_v6(&t->saddr, &ip.saddr);
		tp_set_v6(&t->daddr, &ip.daddr);
		t->proto = ip.nexthdr;
		off += sizeof(ip);
		if (tp_quoted_extensions(ctx, &t->proto, &off))
			return TP_DROP_MALFORMED;
	} else {
		struct iphdr ip;

		if (tp_load(ctx, off, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
			return TP_DROP_MALFORMED;
		tp_set_v4(&t->saddr, ip.saddr);
		tp_set_v4(&t->daddr, ip.daddr);
		t->proto = ip.protocol;
		off += ip.ihl * 4;
	}
	w->quoted_l4 = off;
	if (tp_has_ports(t->proto)) {
		__be16 ports[2];

		if (tp_load(ctx, off, ports, sizeof(ports)))
			return TP_DROP_MALFORMED;
		t->sport = ports[0];
		t->dport = ports[1];
	} else if (t->proto == IPPROTO_ICMP || t->proto == ICMP6) {
		struct tp_icmp icmp;

		if (tp_load(ctx, off, &icmp, sizeof(icmp)))
			return TP_DROP_MALFORMED;
		if (t->proto == ICMP6 ? (icmp.type == 128 || icmp.type == 129) : (icmp.type == 8 || icmp.type == 0)) {
			t->sport = icmp.id;
			t->dport = icmp.id;
		}
	}
	return 0;
}

#endif
