/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The checksum of SCTP (RFC 9260 6.8): CRC32c of the whole packet, so a changed port cannot be put right with a sum. But a CRC is linear:
 * that of the changed packet is the old one and, added to it (XOR), the remainder of the change alone, moved up by as many bytes as follow.
 */
#ifndef TOWPATH_SCTP_H
#define TOWPATH_SCTP_H

#define SCTP_SUM_OFF 8
#define CRC32C 0x82f63b78		/* the polynomial, lowest power in the highest bit, as are all remainders here */

/* The remainder of x^(8 * 2^i): what multiplies when 2^i bytes follow. */
static const __u32 tp_crc_powers[17] = {
	0x00800000, 0x00008000, 0x82f63b78, 0x6ea2d55c, 0x18b8ea18, 0x510ac59a, 0xb82be955, 0xb8fdb1e7, 0x88e56f72,
	0x74c360a4, 0xe4172b16, 0x0d65762a, 0x35d73a62, 0x28461564, 0xbf455269, 0xe2ea32dc, 0xfe7740e6,
};

/* Product of two remainders. Without branches: a verifier that does not know the bits would follow every way through them. */
static __always_inline __u32 tp_crc_product(__u32 a, __u32 b)
{
	__u32 product = 0;

	for (int i = 0; i < 32; i++) {
		product ^= b & -(a >> 31);
		a <<= 1;
		b = (b >> 1) ^ (CRC32C & -(b & 1));
	}
	return product;
}

/* The remainder of `crc` when so many bytes follow it, fewer than 2^17. */
static __noinline __u32 tp_crc_moved(__u32 crc, __u32 bytes)
{
	for (int i = 0; i < 17; i++) {
		if (bytes >> i & 1)
			crc = tp_crc_product(crc, tp_crc_powers[i]);
	}
	return crc;
}

/* Bytes from the transport header to the end of the packet, by its network header. */
static __always_inline __u32 tp_transport_len(const struct tp_work *w)
{
	__u32 end = w->p.flags & TP_PKT_V6 ? ETH_LEN + sizeof(struct ipv6hdr) + bpf_ntohs(w->h.v6.payload_len) :
					     ETH_LEN + bpf_ntohs(w->h.v4.tot_len);

	return end > w->p.l4_off ? end - w->p.l4_off : 0;
}

/*
 * Puts the checksum right for the port at `at` (0 or 2 bytes into the header) that is about to become another. 0, or the reason to
 * drop. A checksum of 0 stays: the device is to fill it in (CHECKSUM_PARTIAL), or the ends do without (RFC 9653). In the first
 * fragment nobody knows how much follows; SCTP does not let its packets be cut (RFC 9260 6.9), so that is no loss.
 */
static __always_inline __u32 tp_sctp_port(struct __sk_buff *skb, struct tp_work *w, __u32 at, __be16 from, __be16 to)
{
	__u32 off = w->p.l4_off + SCTP_SUM_OFF, len = tp_transport_len(w);
	__be16 change = from ^ to;
	const __u8 *bytes = (const __u8 *)&change;
	__u32 crc;
	__u8 sum[4];

	if (bpf_skb_load_bytes(skb, off, sum, sizeof(sum)) || len < SCTP_SUM_OFF + sizeof(sum))
		return TP_DROP_MALFORMED;
	if (!(sum[0] | sum[1] | sum[2] | sum[3]))
		return 0;
	if (w->p.flags & TP_PKT_FIRST_FRAG)
		return TP_DROP_FRAGMENT;
	/* What is read is added to the lowest bits before they are moved: the change moves by its own bytes too. */
	crc = tp_crc_moved(bytes[0] | bytes[1] << 8, len - at);
	/* It is sent lowest byte first (RFC 9260 appendix A). */
#pragma unroll
	for (int i = 0; i < 4; i++)
		sum[i] ^= crc >> 8 * i;
	return bpf_skb_store_bytes(skb, off, sum, sizeof(sum), BPF_F_RECOMPUTE_CSUM) ? TP_DROP_INTERNAL : 0;
}

#endif
