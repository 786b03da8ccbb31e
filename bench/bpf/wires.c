/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What forwarding by XDP is compared with, and who counts at the far end of the wire. The kernel runs a program on frames that it makes
 * (BPF_F_TEST_XDP_LIVE_FRAMES), and sends what the program says on a veth.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define FLOWS 1024
#define HEADERS 42			/* Ethernet, IPv4, UDP */
#define FRAME 106
#define ENVELOPE 50

struct headers {
	__u8 bytes[HEADERS];
	__u8 pad[6];
};

/* What every flow's frame begins with. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FLOWS);
	__type(key, __u32);
	__type(value, struct headers);
} tpb_headers SEC(".maps");

/* Which flow is next. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} tpb_next SEC(".maps");

/* What came back. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} tpb_back SEC(".maps");

/*
 * Counts. The kernel uses the memory of a frame again as it finds it, so this makes it the next flow's question: there are 50 bytes of
 * envelope before one that was forwarded to another node, and none before the others.
 */
SEC("xdp")
int tpb_sink(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 zero = 0, *next = bpf_map_lookup_elem(&tpb_next, &zero), flow;
	__u64 *back = bpf_map_lookup_elem(&tpb_back, &zero);
	struct headers *headers;

	if (!next || !back || data + FRAME > end)
		return XDP_DROP;
	flow = (*next)++ % FLOWS;
	headers = bpf_map_lookup_elem(&tpb_headers, &flow);
	if (!headers)
		return XDP_DROP;
	(*back)++;
	if (data + FRAME + ENVELOPE <= end)
		data += ENVELOPE;
#pragma unroll
	for (int i = 0; i < HEADERS / 2; i++)
		((__u16 *)data)[i] = ((__u16 *)headers->bytes)[i];
	return XDP_DROP;
}

/* The least that turns a packet round. */
SEC("xdp")
int tpb_echo(struct xdp_md *ctx)
{
	__u16 *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;

	if ((void *)(data + 6) > end)
		return XDP_DROP;
#pragma unroll
	for (int i = 0; i < 3; i++) {
		__u16 word = data[i];

		data[i] = data[i + 3];
		data[i + 3] = word;
	}
	return XDP_TX;
}

/* To the stack. */
SEC("xdp")
int tpb_pass(struct xdp_md *ctx)
{
	return XDP_PASS;
}

char _license[] SEC("license") = "GPL";
