//! What is counted, without locks.

use std::sync::atomic::{AtomicU64, Ordering};

use towpath_wire::dns::DnsCounters;

macro_rules! counters {
    ($($name:ident),* $(,)?) => {
        /// One number for each field of [`DnsCounters`] that only rises.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)*
        }

        impl Counters {
            /// All numbers now; the cache's own are left at 0.
            pub(crate) fn read(&self) -> DnsCounters {
                DnsCounters { $($name: self.$name.get(),)* ..DnsCounters::default() }
            }
        }
    };
}

counters!(
    udp_queries,
    tcp_queries,
    cluster_answers,
    cache_hits,
    forwarded,
    joined,
    stale_answers,
    upstream_failures,
    truncated,
    malformed,
    overloaded,
    feed_messages,
);

/// A number that rises.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
