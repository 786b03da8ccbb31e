//! A Service that changes under those who look it up: a list of backends is replaced a thousand times a second while sockets connect,
//! and every look-up finds a backend.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::sockets::in_sockets_world;
use crate::world::*;

const LOOKUPS: u32 = 1_000_000;
/// Between two changes.
const BEAT: Duration = Duration::from_millis(1);
const PORT: u16 = 8080;
/// Longest wait for a datagram, which is delivered before it is sent: what is not there then went elsewhere.
const PATIENCE: Duration = Duration::from_secs(1);

/// Connects a new socket to the Service and sends on it, again and again. One server listens on all addresses of all backends, so that
/// a look-up that found nothing shows: the datagram goes to the Service's own address, which nobody has, or the socket is refused.
fn look_up(service: SocketAddr, stop: &AtomicBool) -> (u32, [u32; 4]) {
    let server = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut served = [0; 4];
    for number in 0..LOOKUPS {
        let client = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        client.connect(service).unwrap_or_else(|error| panic!("look-up {number}: {error}"));
        client.send(&number.to_ne_bytes()).unwrap_or_else(|error| panic!("look-up {number}: {error}"));
        let mut got = [0; 8];
        let (length, from) = server.recv_from(&mut got).unwrap_or_else(|error| panic!("look-up {number}: {error}"));
        assert_eq!(got[..length], number.to_ne_bytes());
        // A socket that is connected to one of the host's own addresses sends from that address.
        let SocketAddr::V4(from) = from else { panic!("IPv4") };
        served[usize::from(from.ip().octets()[3] - 1)] += 1;
    }
    stop.store(true, Ordering::Relaxed);
    (LOOKUPS, served)
}

#[test]
fn a_million_look_ups_against_a_thousand_changes_a_second_find_a_backend_each() {
    in_sockets_world(|w, _| {
        let service = SocketAddr::new(hosts(Family::V4).service, 80);
        let backends: Vec<SocketAddr> = (1..=4).map(|last| SocketAddr::new([10, 7, 0, last].into(), PORT)).collect();
        for backend in backends.iter().skip(1) {
            sh(&format!("ip addr add {}/32 dev lo", backend.ip()));
        }
        w.serve(1, Family::V4, Some(service.ip()), 80, Protocol::Udp, &backends);
        let frontend = Frontend { address: Some(service.ip()), family: Family::V4, port: 80, protocol: Protocol::Udp };
        let target = w.table.frontends[&frontend].clone();
        let stop = AtomicBool::new(false);
        let begun = Instant::now();
        let (looked_up, served, flips) = thread::scope(|scope| {
            let looking = scope.spawn(|| {
                // Also when a look-up fails.
                struct Stop<'a>(&'a AtomicBool);
                impl Drop for Stop<'_> {
                    fn drop(&mut self) {
                        self.0.store(true, Ordering::Relaxed);
                    }
                }
                let _stop = Stop(&stop);
                look_up(service, &stop)
            });
            let mut flips = 0u32;
            while !stop.load(Ordering::Relaxed) {
                // Now the one half, now the other: no entry of a list outlives a change.
                let half = if flips.is_multiple_of(2) { &target.backends[..2] } else { &target.backends[2..] };
                let now = FrontendTarget { backends: half.to_vec(), ..(*target).clone() };
                let changes =
                    ServiceChanges { frontends: [(frontend, Some(now.into()))].into(), ..ServiceChanges::default() };
                let applied = w.programs.apply_service_changes(&changes, Instant::now()).unwrap();
                assert_eq!(applied.left_out, []);
                flips += 1;
                if flips.is_multiple_of(1000) {
                    // As the agent does every second.
                    w.programs.sweep(Instant::now()).unwrap();
                }
                thread::sleep((BEAT * flips).saturating_sub(begun.elapsed()));
            }
            let (looked_up, served) = looking.join().unwrap();
            (looked_up, served, flips)
        });
        let took = begun.elapsed();
        println!(
            "{looked_up} look-ups in {took:?} against {flips} changes ({:.0} a second): {served:?}",
            f64::from(flips) / took.as_secs_f64()
        );
        assert_eq!(served.iter().sum::<u32>(), LOOKUPS);
        assert!(served.iter().all(|count| *count > LOOKUPS / 20), "both halves were in force: {served:?}");
        assert!(
            f64::from(flips) > 500.0 * took.as_secs_f64(),
            "only {flips} changes in {took:?}: the machine is too busy"
        );
    });
}
