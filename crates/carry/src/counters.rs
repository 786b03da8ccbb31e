//! What is counted, without locks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use towpath_wire::dns::{DURATIONS, DnsCounters, RCODES};

macro_rules! counters {
    ($($name:ident),* $(,)?) => {
        /// One number for each field of [`DnsCounters`] that only rises.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)*
            rcodes: [Counter; RCODES.len()],
            durations: [Counter; DURATIONS.len() + 1],
            durations_micros: Counter,
        }

        impl Counters {
            /// All numbers now; the cache's own are left at 0.
            pub(crate) fn read(&self) -> DnsCounters {
                DnsCounters {
                    $($name: self.$name.get(),)*
                    rcodes: self.rcodes.each_ref().map(Counter::get),
                    durations: self.durations.each_ref().map(Counter::get),
                    durations_micros: self.durations_micros.get(),
                    ..DnsCounters::default()
                }
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
    clients_over_share,
    servers_over_share,
    feed_messages,
    names_told,
    names_held,
    names_held_micros,
    names_late,
    names_unheard,
);

impl Counters {
    /// A response is sent (a whole DNS message).
    pub(crate) fn responded(&self, message: &[u8]) {
        // RFC 1035, 4.1.1: the low four bits of the fourth byte.
        let Some(code) = message.get(3).map(|byte| byte & 0xf) else { return };
        let place = match code {
            0..=3 => usize::from(code),
            5 => 4,
            _ => 5,
        };
        self.rcodes.get(place).into_iter().for_each(Counter::add);
    }

    /// A query was turned away because its client had its share.
    pub(crate) fn client_over_share(&self) {
        self.overloaded.add();
        self.clients_over_share.add();
    }

    /// A query was turned away because those to be asked had their share.
    pub(crate) fn servers_over_share(&self) {
        self.overloaded.add();
        self.servers_over_share.add();
    }

    /// Somebody upstream was asked for it, and it took so long.
    pub(crate) fn took(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let place = DURATIONS.iter().position(|end| seconds <= *end).unwrap_or(DURATIONS.len());
        self.durations.get(place).into_iter().for_each(Counter::add);
        self.durations_micros.0.fetch_add(u64::try_from(time.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// A number that rises.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self) {
        self.add_all(1);
    }

    pub(crate) fn add_all(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses_are_counted_by_code_and_durations_by_bucket() {
        let counters = Counters::default();
        for code in [0, 3, 3, 5, 9] {
            counters.responded(&[0, 0, 0x81, 0x80 | code, 0, 0]);
        }
        counters.responded(&[0, 0]);
        counters.took(Duration::from_millis(1));
        counters.took(Duration::from_secs(60));
        let read = counters.read();
        assert_eq!(read.rcodes, [1, 0, 0, 2, 1, 1]);
        assert_eq!((read.durations[0], read.durations[DURATIONS.len()], read.durations_micros), (1, 1, 60_001_000));
    }
}
