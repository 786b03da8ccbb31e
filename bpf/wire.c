/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The programs of XDP, in an object of their own: a node that runs none loads none, and a kernel or a device that refuses them loses
 * nothing else. Maps that towpath.c has too are towpath.c's, but for what one run works on (tp_scratch, next hops).
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#ifndef NULL
#define NULL ((void *)0)
#endif

/* The headers have more than is needed here. */
#pragma clang diagnostic ignored "-Wunused-function"

#include "abi.h"
#include "work.h"
#include "maps.h"
#include "addr.h"
#include "drops.h"
#include "xdp.h"
#include "parse.h"
#include "policy.h"
#include "budget.h"
#include "ct.h"
#include "snat.h"
#include "lb.h"
#include "direct_return.h"
#include "forward.h"

#include "from_wire.c"

/* As of towpath.c. */
char _license[] SEC("license") = "GPL";
