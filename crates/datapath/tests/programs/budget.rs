//! Budgets: what one pod does to the connection table is its own affair, and the account of it is exact.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use libbpf_rs::ProgramInput;
use towpath_datapath::abi::*;
use towpath_datapath::bpf::{Connection, Hook, Isolation, Limits};
use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, FIN, Frame, L4, RST, SYN};
use crate::world::*;

const LIMIT: u32 = 8192;
const SHARE: u32 = LIMIT / 2 / 128;
/// What one pod alone may hold: two thirds of the half that is lent.
const ALONE: usize = LIMIT as usize / 3;
const A: u32 = 11;
const B: u32 = 12;

fn in_small_world(test: impl FnOnce(&mut World) + Send + 'static) {
    in_world_with(Limits { connections: LIMIT, ..Limits::default() }, test);
}

/// The n-th of many addresses outside the cluster.
fn stranger(n: u32) -> IpAddr {
    Ipv4Addr::from(0xc612_0000 + n).into()
}

/// Runs a program on a frame, nothing read back but the verdict: thousands a second.
fn push(w: &World, hook: Hook, frame: &Frame, ifindex: u32, ingress: u32) -> u32 {
    let mut context = [0u8; 192];
    context[36..40].copy_from_slice(&ingress.to_ne_bytes());
    context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
    let bytes = frame.bytes();
    let mut out = vec![0u8; bytes.len() + 256];
    let program = w.programs.object().progs_mut().find(|p| p.name() == hook.program()).unwrap();
    let input = ProgramInput {
        context_in: Some(&mut context),
        data_in: Some(&bytes),
        data_out: Some(&mut out),
        ..ProgramInput::default()
    };
    program.test_run(input).unwrap().return_value
}

fn send(w: &World, frame: &Frame) -> u32 {
    let ifindex = if frame.src_mac == MAC_B { w.pod_b } else { w.pod_a };
    push(w, Hook::FromPod, frame, ifindex, ifindex)
}

/// A handshake of a pod with somebody outside; whether it could begin.
fn establish(w: &World, pod: IpAddr, port: u16, peer: IpAddr) -> bool {
    if send(w, &sent_by(pod, port, peer, 443, L4::syn())) != PASS {
        return false;
    }
    let (mac, ifindex) = if pod == hosts(Family::V4).b { (MAC_B, w.pod_b) } else { (MAC_A, w.pod_a) };
    let answer = arriving(mac, peer, 443, pod, port, L4::tcp(SYN | ACK));
    assert_eq!(push(w, Hook::ToPod, &answer, ifindex, w.uplink), PASS);
    assert_eq!(send(w, &sent_by(pod, port, peer, 443, L4::tcp(ACK))), PASS);
    true
}

/// Isolates both pods, and allows them everything over TCP and UDP: so that they need their entries.
fn isolate_and_allow(w: &mut World) {
    for (pod, set) in [(w.local_a(), 5), (w.local_b(), 6)] {
        w.isolate(&pod, set, set);
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let protocol = RowProtocol::Ports(protocol);
            let key = RowKey { set: SetId(set), class: LocalClass(0), protocol, port: 0, port_bits: 0 };
            w.image.rows.insert(key, Row { verdict: Verdict::Allow, rule: RuleId(set) });
        }
    }
    w.apply_policy();
}

fn established(w: &World) -> BTreeSet<(IpAddr, u16, IpAddr)> {
    let all = w.programs.connections().unwrap().into_iter();
    let kept = all.filter(|c| c.flags & TP_CT_ESTABLISHED != 0);
    kept.map(|c| (c.opener.0, c.opener.1, c.responder.0)).collect()
}

fn held(w: &World) -> BTreeMap<u32, u32> {
    w.programs.held().unwrap().holders.into_iter().map(|holder| (holder.id, holder.held)).collect()
}

fn count(w: &World, reason: &str) -> u64 {
    w.programs.counters().unwrap().iter().find(|c| c.reason.name() == reason).unwrap().packets
}

/// The accounts say what the table holds, and every translation has its connection.
#[track_caller]
fn accounts_are_exact(w: &World) {
    let mut wanted: BTreeMap<u32, u32> = held(w).into_keys().map(|pod| (pod, 0)).collect();
    let connections = w.programs.connections().unwrap();
    for connection in &connections {
        *wanted.get_mut(&connection.pod_id).expect("a pod with an account") += 1;
    }
    assert_eq!(held(w), wanted);
    assert_eq!(w.programs.held().unwrap().all as usize, connections.len());
}

fn translated(connections: &[Connection]) -> BTreeSet<(IpAddr, u16, IpAddr, u16, IpAddr, u16)> {
    let dnat = connections.iter().filter_map(|c| Some((c, c.service?)));
    dnat.map(|(c, s)| (c.opener.0, c.opener.1, s.0, s.1, c.responder.0, c.responder.1)).collect()
}

fn translations(w: &World) -> BTreeSet<(IpAddr, u16, IpAddr, u16, IpAddr, u16)> {
    w.entries::<Tuple, Nat>("tp_nat")
        .into_iter()
        .map(|(t, n)| (t.saddr.ip(), t.sport.get(), t.daddr.ip(), t.dport.get(), n.daddr.ip(), n.dport.get()))
        .collect()
}

#[test]
fn a_pod_that_floods_loses_its_own_openings_and_nobody_elses() {
    in_small_world(|w| {
        let h = hosts(Family::V4);
        isolate_and_allow(w);
        for n in 0..40 {
            assert!(establish(w, h.a, 1000 + n, stranger(1)));
            assert!(n >= 20 || establish(w, h.b, 1000 + n, stranger(2)));
        }
        let before = established(w);
        assert_eq!(before.len(), 60);
        for n in 0..3 * LIMIT {
            let syn = sent_by(h.a, 10_000 + (n % 50_000) as u16, stranger(1000 + n / 1000), 80, L4::syn());
            assert_eq!(send(w, &syn), PASS, "{n}");
        }
        assert_eq!(count(w, "ct_budget"), 0);
        let all = w.programs.held().unwrap();
        assert_eq!((all.room, all.share), (LIMIT / 2, SHARE));
        let full: Vec<String> = all.holders.iter().filter(|h| h.full).map(|h| h.name()).collect();
        assert_eq!(full, ["pod 10.1.0.10, fd01::10"]);
        let of_a = held(w)[&A] as usize;
        assert!((ALONE - 60..=ALONE).contains(&of_a), "{of_a}");
        assert_eq!(count(w, "ct_recycled") as usize, 3 * LIMIT as usize + 40 - of_a);
        // The oldest went first: of the flood's last packets none is missing.
        let open: BTreeSet<(u16, IpAddr)> =
            w.programs.connections().unwrap().into_iter().map(|c| (c.opener.1, c.responder.0)).collect();
        let last = 3 * LIMIT - 120..3 * LIMIT;
        assert!(last.into_iter().all(|n| open.contains(&(10_000 + (n % 50_000) as u16, stranger(1000 + n / 1000)))));
        // The neighbour has its share, and nobody lost what stood.
        for n in 0..SHARE as u16 {
            assert!(establish(w, h.b, 2000 + n, stranger(3)), "{n}");
        }
        let after = established(w);
        assert!(after.is_superset(&before));
        assert_eq!(after.len(), 60 + SHARE as usize);
        accounts_are_exact(w);
    });
}

#[test]
fn a_pod_full_of_established_connections_is_refused_and_keeps_them() {
    in_small_world(|w| {
        let h = hosts(Family::V4);
        isolate_and_allow(w);
        let mut opened = 0;
        while establish(w, h.a, 1000 + (opened % 1000) as u16, stranger(opened / 1000)) {
            opened += 1;
        }
        assert!((ALONE - 1..=ALONE + 1).contains(&(opened as usize)), "{opened}");
        w.from_pod(&sent_by(h.a, 9000, stranger(99), 80, L4::syn())).dropped("ct_budget");
        w.from_pod(&sent_by(h.a, 9000, stranger(99), 53, L4::udp(b"x"))).dropped("ct_budget");
        assert_eq!(established(w).len(), opened as usize);
        assert_eq!(count(w, "ct_recycled"), 0);
        w.from_pod(&sent_by(h.a, 1000, stranger(0), 443, L4::data(b"x"))).passed();
        // Its node reaches it still, at its own cost, and is answered.
        let probe = |n| arriving(MAC_A, h.node, n, h.a, 8080, L4::syn());
        for n in 1..=SHARE as u16 {
            assert_eq!(push(w, Hook::ToPod, &probe(n), w.pod_a, 0), PASS);
        }
        assert_eq!(send(w, &sent_by(h.a, 8080, h.node, 1, L4::tcp(SYN | ACK))), PASS);
        assert_eq!(held(w)[&TP_HOLDER_NODE], SHARE);
        // The neighbour has not only its share: a third of what was lent is left, and two thirds of that may be its own.
        let mut neighbours = 0;
        while establish(w, h.b, 1000 + (neighbours % 1000) as u16, stranger(neighbours / 1000)) {
            neighbours += 1;
        }
        assert!(neighbours > 8 * SHARE && neighbours < LIMIT / 4, "{neighbours}");
        // Who is no pod of this node has a share too.
        w.serve(1, Family::V4, None, 30080, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
        let mut strangers = 0;
        let ask = |n: u32, l4| arriving(MAC_UPLINK, stranger(n), 5000, h.node, 30080, l4);
        for n in 0..2 * SHARE {
            let verdict = push(w, Hook::FromUplink, &ask(n, L4::syn()), w.uplink, w.uplink);
            strangers += u32::from(verdict == REDIRECT);
        }
        assert_eq!(strangers, 2 * SHARE, "what they open beyond gives way to what they open next");
        assert!(held(w)[&TP_HOLDER_OTHERS] >= SHARE);
        assert_eq!(translations(w), translated(&w.programs.connections().unwrap()));
        // Room again: one connection less, one more.
        let gone: Vec<IpAddr> = vec![stranger(0)];
        w.programs.purger().unwrap().purge(&gone).unwrap();
        assert!(establish(w, h.a, 9000, stranger(99)));
        accounts_are_exact(w);
    });
}

#[test]
fn a_pod_that_needs_no_entries_goes_on_without_them() {
    in_small_world(|w| {
        let h = hosts(Family::V4);
        let mut opened = 0;
        while count(w, "untracked") == 0 {
            assert!(establish(w, h.a, 1000 + (opened % 1000) as u16, stranger(opened / 1000)));
            opened += 1;
        }
        let outcome = w.from_pod(&sent_by(h.a, 9000, stranger(99), 80, L4::syn()));
        assert!(outcome.passed().counted.contains(&"untracked"));
        w.to_pod(&arriving(MAC_A, stranger(99), 80, h.a, 9000, L4::tcp(SYN | ACK)), w.pod_a, w.uplink).passed();
        w.from_pod(&sent_by(h.a, 9000, h.b, 80, L4::syn())).into_pod(w.pod_b);
        // For another node's pod the way back is in the entry.
        w.from_pod(&sent_by(h.a, 9000, h.remote, 80, L4::syn())).dropped("ct_budget");
        accounts_are_exact(w);
    });
}

#[test]
fn a_question_and_its_answer_give_way_and_a_conversation_does_not() {
    in_small_world(|w| {
        let h = hosts(Family::V4);
        isolate_and_allow(w);
        let answer = |n: u16| arriving(MAC_A, h.outside, 53, h.a, n, L4::udp(b"answer"));
        for n in 1..10 {
            let ask = sent_by(h.a, n, h.outside, 53, L4::udp(b"question"));
            w.from_pod(&ask).passed();
            w.to_pod(&answer(n), w.pod_a, w.uplink).passed();
            w.from_pod(&ask).passed();
        }
        assert_eq!(established(w).len(), 9);
        for n in 100..u16::try_from(ALONE).unwrap() + 1000 {
            assert_eq!(send(w, &sent_by(h.a, n, h.outside, 53, L4::udp(b"question"))), PASS);
            assert_eq!(push(w, Hook::ToPod, &answer(n), w.pod_a, w.uplink), PASS);
        }
        assert_eq!(established(w).len(), 9);
        assert!(count(w, "ct_recycled") > 800);
        accounts_are_exact(w);
        // Soon over, but not at once; a conversation lasts longer.
        w.age(20);
        w.programs.collect().unwrap();
        let left = w.programs.held().unwrap();
        assert_eq!(left.all, left.room / 2, "no more than room for others was taken");
        w.age(11);
        w.programs.collect().unwrap();
        assert_eq!(w.programs.connections().unwrap().len(), 9);
        w.age(150);
        assert_eq!(w.programs.collect().unwrap().connections, 9);
        accounts_are_exact(w);
        assert_eq!(w.programs.held().unwrap().all, 0);
    });
}

#[test]
fn the_collector_is_strict_with_a_pod_that_crowds_the_table() {
    in_small_world(|w| {
        let h = hosts(Family::V4);
        isolate_and_allow(w);
        let flood = |w: &World, pod: IpAddr, n: u32| {
            for n in 0..n {
                send(w, &sent_by(pod, 1000 + (n % 1000) as u16, stranger(n / 1000), 80, L4::syn()));
            }
        };
        flood(w, h.b, SHARE);
        flood(w, h.a, LIMIT / 4 - 2 * SHARE);
        w.age(6);
        assert_eq!(w.programs.collect().unwrap(), Removed::default(), "there is room");
        flood(w, h.a, LIMIT);
        w.age(6);
        let removed = w.programs.collect().unwrap().connections;
        assert!(removed > LIMIT / 2 / 6, "{removed}");
        let all = w.programs.held().unwrap();
        // As far as it must, and not the neighbour's.
        assert_eq!(all.all, all.room / 2);
        assert_eq!(held(w)[&B], SHARE);
        accounts_are_exact(w);
    });
}

#[test]
fn translations_come_with_their_connections_and_go_with_them() {
    in_small_world(|w| {
        let h = hosts(Family::V4);
        let backends: Vec<SocketAddr> = (1..=8).map(|n| SocketAddr::new(h.remote, 8000 + n)).collect();
        w.serve(1, Family::V4, Some(h.service), 80, Protocol::Tcp, &backends);
        let a = w.local_a();
        // Denied: nothing is left behind.
        w.isolate(&a, 0, 7);
        w.apply_policy();
        w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::syn())).dropped("egress_policy");
        assert!(translations(w).is_empty());
        isolate_and_allow(w);
        let same = |w: &World| {
            let connections = translated(&w.programs.connections().unwrap());
            assert_eq!(translations(w), connections);
            connections.len()
        };
        // A retransmission goes where the first went.
        let port_of = |w: &World, l4| {
            w.from_pod(&sent_by(h.a, 4000, h.service, 80, l4)).into_tunnel(w, ip("192.168.50.2")).dst.port()
        };
        let first = port_of(w, L4::syn());
        assert!((0..20).all(|_| port_of(w, L4::syn()) == first));
        assert_eq!(same(w), 1);
        // Closed and opened again until another backend is chosen: the translation is the new connection's, also when the
        // old entry goes.
        let close = |w: &World| {
            port_of(w, L4::tcp(RST));
        };
        let mut now = first;
        while now == first {
            close(w);
            now = port_of(w, L4::syn());
        }
        assert_eq!(translated(&w.programs.connections().unwrap()).len(), 2);
        assert_eq!(translations(w).len(), 1);
        w.age(11);
        w.programs.collect().unwrap();
        assert_eq!(same(w), 1);
        assert_eq!(port_of(w, L4::syn()), now);
        // Recycled, collected, purged.
        for n in 0..LIMIT {
            let syn = sent_by(h.a, 5000 + (n % 50_000) as u16, h.service, 80, L4::syn());
            assert_eq!(send(w, &syn), REDIRECT);
        }
        assert!(count(w, "ct_recycled") > 1000);
        assert!(same(w) > ALONE - 100);
        w.age(61);
        let removed = w.programs.collect().unwrap();
        assert_eq!(removed.connections, removed.translations);
        assert_eq!(same(w), 0);
        accounts_are_exact(w);
    });
}

#[test]
fn a_translation_that_is_gone_comes_back_with_the_next_packet() {
    in_small_world(|w| {
        let h = hosts(Family::V4);
        w.serve(1, Family::V4, Some(h.service), 80, Protocol::Tcp, &[SocketAddr::new(h.b, 8080)]);
        w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::syn())).into_pod(w.pod_b);
        let (key, nat) = w.entries::<Tuple, Nat>("tp_nat")[0];
        use libbpf_rs::MapCore as _;
        w.map("tp_nat").delete(&bytes_of(&key)).unwrap();
        w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::data(b"x"))).into_pod(w.pod_b);
        assert_eq!(w.entries::<Tuple, Nat>("tp_nat"), [(key, nat)]);
        // And one that has no connection is found, now and then.
        let orphan = Tuple { sport: Be16::new(4001), ..key };
        w.write("tp_nat", &orphan, &nat);
        assert_eq!(w.programs.collect().unwrap(), Removed { connections: 0, translations: 1 });
    });
}

#[test]
fn an_account_goes_when_its_pod_and_all_that_is_counted_to_it_are_gone() {
    in_small_world(|w| {
        let h = hosts(Family::V4);
        let b = w.local_b();
        w.from_pod(&sent_by(h.b, 4000, h.outside, 80, L4::syn())).passed();
        w.programs.forget_pod(&b).unwrap();
        let later = |seconds| Instant::now() + Duration::from_secs(seconds);
        for seconds in [0, 5, 10] {
            w.programs.sweep(later(seconds)).unwrap();
            assert_eq!(held(w).get(&B), Some(&1), "its connection is still there");
        }
        w.programs.purger().unwrap().purge(&b.addresses).unwrap();
        assert_eq!(held(w).get(&B), Some(&0));
        w.programs.sweep(later(20)).unwrap();
        assert_eq!(held(w).get(&B), Some(&0), "a program may still look at it");
        // The same pod again, before and after.
        w.programs.set_pod(&b, Isolation::Sets(PodSets::default())).unwrap();
        w.programs.sweep(later(30)).unwrap();
        assert!(held(w).contains_key(&B));
        w.programs.remove_pod(&b).unwrap();
        w.programs.sweep(later(40)).unwrap();
        w.programs.sweep(later(43)).unwrap();
        assert!(!held(w).contains_key(&B));
        w.programs.set_pod(&b, Isolation::Sets(PodSets::default())).unwrap();
        w.from_pod(&sent_by(h.b, 4000, h.outside, 80, L4::syn())).passed();
        assert_eq!(held(w).get(&B), Some(&1));
        accounts_are_exact(w);
    });
}

#[test]
fn hundreds_of_pods_have_accounts_and_shares_become_smaller() {
    in_small_world(|w| {
        for n in 0..300u32 {
            let mut pod = w.local_a();
            pod.pod_id = 1000 + n;
            pod.addresses = vec![Ipv4Addr::from(0x0a01_0100 + n).into()];
            pod.netns_cookie = 0;
            w.programs.set_pod(&pod, Isolation::HostOnly).unwrap();
        }
        let held = w.programs.held().unwrap();
        assert_eq!((held.holders.len(), held.share), (304, SHARE / 4));
    });
}

/// xorshift64*: the same storm each time, as far as two CPUs let it be.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u32) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as u32 % n
    }
}

/// A packet of the storm: few tuples, so that both CPUs work on the same connections, in both directions.
fn of_the_storm(dice: &mut Dice) -> Frame {
    let h = hosts(Family::V4);
    let low = |dice: &mut Dice| 1000 + dice.below(40) as u16;
    let flags = [SYN, SYN, SYN | ACK, ACK, ACK, FIN | ACK, RST][dice.below(7) as usize];
    let tcp = L4::tcp(flags);
    match dice.below(6) {
        0 => sent_by(h.a, low(dice), h.b, low(dice), tcp),
        1 => sent_by(h.b, low(dice), h.a, low(dice), tcp),
        2 => sent_by(h.a, low(dice), stranger(dice.below(40)), 80, L4::syn()),
        3 => sent_by(h.a, low(dice), h.service, 80, tcp),
        4 => sent_by(h.b, 8001 + dice.below(8) as u16, h.a, low(dice), tcp),
        _ => sent_by(h.b, low(dice), h.a, low(dice), L4::udp(b"x")),
    }
}

/// Runs a program by its descriptor: what can be done from several threads.
fn run_raw(program: &OwnedFd, frame: &[u8], ifindex: u32) {
    let mut context = [0u8; 192];
    context[36..40].copy_from_slice(&ifindex.to_ne_bytes());
    context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
    let mut out = vec![0u8; frame.len() + 256];
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as libbpf_sys::size_t,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        data_out: out.as_mut_ptr().cast(),
        data_size_out: out.len() as u32,
        ctx_in: context.as_mut_ptr().cast(),
        ctx_size_in: context.len() as u32,
        ..Default::default()
    };
    // SAFETY: the descriptor is a program's, and all that `options` points to outlives the call and is as long as it says.
    let ret = unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &raw mut options) };
    assert_eq!(ret, 0);
}

fn pin_to(cpu: usize) {
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
}

#[test]
fn after_a_storm_on_all_cpus_the_accounts_are_exact() {
    const PACKETS: u32 = 30_000;
    in_world_with(Limits { connections: 1024, ..Limits::default() }, |w| {
        isolate_and_allow(w);
        let h = hosts(Family::V4);
        let backends: Vec<SocketAddr> = (1..=8).map(|n| SocketAddr::new(h.b, 8000 + n)).collect();
        w.serve(1, Family::V4, Some(h.service), 80, Protocol::Tcp, &backends);
        let program = || {
            let found = w.programs.object().progs_mut().find(|p| p.name() == "tp_from_pod").unwrap();
            found.as_fd().try_clone_to_owned().unwrap()
        };
        let cpus = std::thread::available_parallelism().unwrap().get();
        let (pod_a, pod_b) = (w.pod_a, w.pod_b);
        let sent = AtomicU32::new(0);
        let together = std::sync::Barrier::new(cpus.max(2));
        let purger = w.programs.purger().unwrap();
        std::thread::scope(|scope| {
            let senders: Vec<_> = (0..cpus.max(2))
                .map(|n| {
                    let (program, sent, together) = (program(), &sent, &together);
                    scope.spawn(move || {
                        pin_to(n % cpus);
                        // The same packets at the same time: the same connection is opened on all CPUs at once.
                        let mut dice = Dice(77);
                        for round in 0..PACKETS {
                            if round % 16 == 0 {
                                together.wait();
                            }
                            let frame = of_the_storm(&mut dice);
                            let ifindex = if frame.src_mac == MAC_B { pod_b } else { pod_a };
                            run_raw(&program, &frame.bytes(), ifindex);
                            sent.fetch_add(1, Ordering::Relaxed);
                        }
                    })
                })
                .collect();
            // Deleted by others than who opens, two at once, nearly to the end.
            let deleting: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let mut dice = Dice(5);
                        while sent.load(Ordering::Relaxed) < PACKETS * 3 / 2 {
                            purger.purge(&[stranger(dice.below(40)), stranger(dice.below(40))]).unwrap();
                            if dice.below(4) == 0 {
                                purger.purge(&[h.a]).unwrap();
                            }
                        }
                    })
                })
                .collect();
            for thread in senders.into_iter().chain(deleting) {
                thread.join().unwrap();
            }
        });
        assert!(count(w, "ct_recycled") > 1000, "the budget was met");
        assert!(!w.programs.connections().unwrap().is_empty());
        accounts_are_exact(w);
        // What two CPUs did to one translation at the same moment is found later.
        let found = w.programs.collect().unwrap().translations;
        println!("{found} translations were left behind");
        assert!(found < PACKETS / 1000, "{found}");
        let connections = translated(&w.programs.connections().unwrap());
        assert!(translations(w).is_subset(&connections));
        w.programs.purger().unwrap().purge(&[h.a, h.b]).unwrap();
        accounts_are_exact(w);
        assert_eq!(w.programs.held().unwrap().all, 0);
        assert!(translations(w).is_empty());
    });
}
