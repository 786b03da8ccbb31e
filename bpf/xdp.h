/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* What a packet is to the programs of XDP, in the words that the headers have for every kind of hook (tc.h: the other). */
#ifndef TOWPATH_XDP_H
#define TOWPATH_XDP_H

typedef struct xdp_md tp_context;

/* Bytes from the Ethernet header on, those in further buffers (jumbo frames) among them. */
static __always_inline __u32 tp_len(struct xdp_md *ctx)
{
	return bpf_xdp_get_buff_len(ctx);
}

/* Segments are made, and put together, by the stack only. */
static __always_inline __u32 tp_segment_size(struct xdp_md *ctx)
{
	return 0;
}

/* As the Ethernet header has it. A VLAN's tag is a protocol that nobody here knows. */
static __always_inline __be16 tp_protocol(struct xdp_md *ctx)
{
	const void *data = (void *)(long)ctx->data;
	const void *end = (void *)(long)ctx->data_end;

	return data + ETH_LEN > end ? 0 : ((const __be16 *)data)[6];
}

static __always_inline long tp_load(struct xdp_md *ctx, __u32 off, void *to, __u32 len)
{
	return bpf_xdp_load_bytes(ctx, off, to, len);
}

static __always_inline int tp_drop(struct xdp_md *ctx, __u32 reason)
{
	__u32 len = tp_len(ctx);

	tp_count(reason, len);
	tp_tell(reason, ctx->ingress_ifindex, len, TP_DROPPED_XDP);
	return XDP_DROP;
}

#endif
