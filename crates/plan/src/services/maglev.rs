//! Look-up tables of consistent hashing: Maglev (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer",
//! NSDI 2016, §3.4).
//!
//! Every backend has its own order of preference over the places of the table, which its address alone decides; in turns, each takes
//! the next place in its order that is free. So the table is the same on every node, each backend has as many places as the
//! others but for one, and a backend that goes or comes moves few places that are not its own.

use std::net::IpAddr;

use towpath_model::desired::BackendAddress;

/// Sizes of tables, prime numbers, each with the most backends that it is for: the more places a backend has, the fewer move. Few
/// sizes, because everybody's place is another when the size changes: when a Service comes to have more than 10, or 40, backends, or
/// fewer again.
const SIZES: [(usize, usize); 3] = [(10, 1021), (40, 16381), (usize::MAX, 65537)];

/// The table: indexes into `backends`, which must be sorted. One backend needs but one place.
pub(super) fn table(backends: &[BackendAddress]) -> Vec<usize> {
    match backends.len() {
        0 => Vec::new(),
        1 => vec![0],
        count => {
            SIZES.into_iter().find(|(most, _)| count <= *most).map(|(_, size)| fill(backends, size)).unwrap_or_default()
        }
    }
}

fn fill(backends: &[BackendAddress], size: usize) -> Vec<usize> {
    let mut preferences: Vec<Preference> = backends.iter().map(|b| Preference::of(b.address, size)).collect();
    let mut table: Vec<Option<usize>> = vec![None; size];
    let mut free = size;
    loop {
        for (index, preference) in preferences.iter_mut().enumerate() {
            if free == 0 {
                return table.into_iter().flatten().collect();
            }
            // There is a free place, and the order of preference comes by all of them.
            while let Some(place) = table.get_mut(preference.next()) {
                if place.is_none() {
                    *place = Some(index);
                    free -= 1;
                    break;
                }
            }
        }
    }
}

/// A backend's order of preference: every place once, because the size is prime.
struct Preference {
    place: usize,
    skip: usize,
    size: usize,
}

impl Preference {
    /// By the address and not the port, so that a client who is hashed by its address has the same pod at every port of a Service.
    fn of(address: IpAddr, size: usize) -> Self {
        let bytes = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let below = |hash: u64, limit: usize| usize::try_from(hash % limit as u64).unwrap_or_default();
        let place = below(hash(bytes, 0x51_7c_c1_b7_27_22_0a_95), size);
        Self { place, skip: below(hash(bytes, 0x2545_f491_4f6c_dd1d), size - 1) + 1, size }
    }

    fn next(&mut self) -> usize {
        let place = self.place;
        self.place = (place + self.skip) % self.size;
        place
    }
}

/// The same on all nodes and in all versions: connections depend on it.
fn hash(bytes: [u8; 16], seed: u64) -> u64 {
    let mixed = bytes.iter().fold(seed, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    let mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    mixed ^ (mixed >> 33)
}

#[cfg(test)]
mod tests {
    use towpath_model::Protocol;

    use super::*;

    fn backends(count: u8) -> Vec<BackendAddress> {
        (0..count)
            .map(|n| BackendAddress { address: IpAddr::from([10, 244, n % 7, n]), port: 80, protocol: Protocol::Tcp })
            .collect()
    }

    #[test]
    fn places_are_shared_evenly() {
        for count in [2, 3, 10, 11, 100, 250] {
            let mut backends = backends(count);
            backends.sort();
            let table = table(&backends);
            assert!(table.len() >= usize::from(count) * 100);
            assert!(
                (2..).take_while(|d| d * d <= table.len()).all(|d| !table.len().is_multiple_of(d)),
                "a prime number"
            );
            let mut shares = vec![0usize; usize::from(count)];
            table.iter().for_each(|index| shares[*index] += 1);
            let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            assert!(most - least <= 1, "{count}: {least} to {most}");
        }
    }

    #[test]
    fn few_places_move_when_a_backend_goes_and_comes() {
        for count in [3, 10, 100] {
            let mut all = backends(count);
            all.sort();
            let before = table(&all);
            for gone in [0, usize::from(count / 2), usize::from(count - 1)] {
                let mut fewer = all.clone();
                fewer.remove(gone);
                let after = table(&fewer);
                assert_eq!(before.len(), after.len());
                let moved = before.iter().zip(&after).filter(|(one, other)| all[**one] != fewer[**other]).count();
                // Its own places, and at most as many again.
                assert!(moved <= 2 * before.len() / usize::from(count), "{count}: {moved} of {} moved", before.len());
            }
        }
    }

    #[test]
    fn the_order_in_which_backends_came_does_not_matter_nor_does_the_port() {
        let one = BackendAddress { address: IpAddr::from([10, 0, 0, 1]), port: 80, protocol: Protocol::Tcp };
        let other = BackendAddress { address: IpAddr::from([10, 0, 0, 2]), port: 80, protocol: Protocol::Tcp };
        let elsewhere = [one, other].map(|b| BackendAddress { port: 8443, ..b });
        assert_eq!(table(&[one, other]), table(&elsewhere));
        assert_eq!(table(&[]), Vec::<usize>::new());
        assert_eq!(table(&[one]), [0]);
        // Two ports of one address are two backends with the same wishes.
        let twice = table(&[one, BackendAddress { port: 81, ..one }]);
        let first = twice.iter().filter(|index| **index == 0).count();
        assert!(first.abs_diff(twice.len() - first) <= 1);
    }
}
