//! What answers queries in user space: the DNS server.
#![forbid(unsafe_code)]
