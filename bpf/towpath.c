/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The kernel's part of Towpath: one translation unit, a file a hook. See ../ARCHITECTURE.md for where each hook sits, abi.h
 * for every layout that user space shares.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#ifndef NULL
#define NULL ((void *)0)
#endif

#include "abi.h"
#include "work.h"
#include "maps.h"
#include "addr.h"
#include "drops.h"
#include "tc.h"
#include "parse.h"
#include "policy.h"
#include "budget.h"
#include "ct.h"
#include "snat.h"
#include "lb.h"
#include "sctp.h"
#include "direct_return.h"
#include "forward.h"
#include "rewrite.h"
#include "encap.h"
#include "refuse.h"
#include "far.h"
#include "link.h"

#include "from_pod.c"
#include "to_pod.c"
#include "from_tunnel.c"
#include "from_uplink.c"
#include "to_uplink.c"
#include "sock.c"
#include "collect.c"

/* The kernel gives some of its helpers only to programs that are loaded under the GPL, which the files' dual licence allows. */
char _license[] SEC("license") = "GPL";
