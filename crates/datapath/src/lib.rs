//! Every effect on the kernel: programs, maps, netlink, nft, namespaces.
