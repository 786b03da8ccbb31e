//! Maps of Services and of policy that are full: what has no room takes none from others, and loses nothing that it had.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use towpath_datapath::bpf::Error;
use towpath_datapath::bpf::{Limits, Programs};
use towpath_model::desired::{
    Algorithm, ClassId, Frontend, FrontendTarget, LocalClass, PolicyImage, Row, RowKey, RowProtocol, RuleId, SetId,
    Verdict,
};
use towpath_model::{Family, Protocol};

use crate::frame::L4;
use crate::world::*;

fn address(n: u8) -> IpAddr {
    IpAddr::from([10, 96, 2, n])
}

fn target(w: &mut World, n: u8) -> &mut FrontendTarget {
    let frontend = Frontend { address: Some(address(n)), family: Family::V4, port: 80, protocol: Protocol::Tcp };
    std::sync::Arc::make_mut(w.table.frontends.get_mut(&frontend).unwrap())
}

fn later(w: &mut World) {
    w.programs.sweep(Instant::now() + Duration::from_secs(10)).unwrap();
}

/// Which backend port a pod's connection to a Service is led to.
fn led_to(w: &World, n: u8, sport: u16) -> u16 {
    let h = hosts(Family::V4);
    w.from_pod(&sent_by(h.a, sport, address(n), 80, L4::syn())).into_pod(w.pod_b).dst.port()
}

#[test]
fn a_look_up_table_without_room_is_stood_in_for_and_leaves_room_for_the_others() {
    // A quarter is for plain lists only: room for two tables.
    let limits = Limits { slots: 3000, ..Limits::default() };
    in_world_with(limits, |w| {
        let h = hosts(Family::V4);
        // The first ids have the last addresses: the stand-in goes by addresses.
        let backends = |n: u16| [SocketAddr::new(h.b, 8009 + 10 * n), SocketAddr::new(h.b, 8001 + 10 * n)];
        for n in 1..=3 {
            w.serve(u32::from(n), Family::V4, Some(address(n)), 80, Protocol::Tcp, &backends(n.into()));
            let target = target(w, n);
            target.algorithm = Algorithm::SourceHash;
            target.table = target.backends.iter().copied().cycle().take(1021).collect();
        }
        w.serve(4, Family::V4, Some(address(4)), 80, Protocol::Tcp, &backends(4));
        let applied = w.programs.apply_services(&w.table, Instant::now()).unwrap();
        let [left_out] = applied.left_out.as_slice() else { panic!("{:?}", applied.left_out) };
        assert!(left_out.reason.contains("look-up table") && left_out.reason.contains("tp_slots"), "{left_out:?}");
        later(w);
        let slots = || libbpf_rs::MapCore::keys(&w.map("tp_slots")).count();
        assert_eq!(slots(), 2 * 1021 + 2 + 2);
        for n in 1..=4 {
            let first = led_to(w, n, 5000);
            assert!([8001, 8009].contains(&(first - 10 * u16::from(n))), "{first}");
            let hashes = n < 4;
            assert!(!hashes || (5001..5009).all(|sport| led_to(w, n, sport) == first), "one client, one backend");
        }
        let list: Vec<(towpath_datapath::abi::SlotKey, towpath_datapath::abi::Slot)> = w.entries("tp_slots");
        let list: Vec<_> = list.into_iter().map(|(key, slot)| (key, slot.backend)).collect();
        let stand_in = |index| list.iter().find(|(key, id)| key.index == index && [301, 302].contains(id)).unwrap().1;
        let plain: Vec<u32> = (0..2).map(stand_in).collect();
        let of_plain = list.iter().filter(|(_, id)| [301, 302].contains(id)).count();
        assert_eq!((plain, of_plain), (vec![302, 301], 2), "by address, as on every other node");
        // One goes, and after its grace the third has a table like the others.
        w.table.frontends.retain(|frontend, _| frontend.address != Some(address(1)));
        let applied = w.programs.apply_services(&w.table, Instant::now()).unwrap();
        assert_eq!(applied.left_out.len(), 1);
        later(w);
        let applied = w.programs.apply_services(&w.table, Instant::now()).unwrap();
        assert_eq!(applied.left_out, []);
        later(w);
        assert_eq!(libbpf_rs::MapCore::keys(&w.map("tp_slots")).count(), 2 * 1021 + 2);
    });
}

#[test]
fn a_port_with_more_endpoints_than_there_is_room_for_takes_none_of_it() {
    let limits = Limits { backends: 6, ..Limits::default() };
    in_world_with(limits, |w| {
        let h = hosts(Family::V4);
        let backends = |from: u16, count: u16| -> Vec<SocketAddr> {
            (from..from + count).map(|port| SocketAddr::new(h.b, port)).collect()
        };
        let mut whole = towpath_model::desired::ServiceTable::default();
        for (n, from, count) in [(1, 8101, 8), (2, 8201, 2), (3, 8301, 4)] {
            w.table = whole;
            w.serve(n, Family::V4, Some(address(n as u8)), 80, Protocol::Tcp, &backends(from, count));
            whole = w.table.clone();
        }
        let applied = w.programs.apply_services(&whole, Instant::now()).unwrap();
        let names: Vec<&str> = applied.left_out.iter().map(|left| left.reason.as_str()).collect();
        assert!(names.len() == 1 && names[0].contains("tp_backends"), "{names:?}");
        assert!([8201, 8202].contains(&led_to(w, 2, 5000)));
        assert!((8301..8305).contains(&led_to(w, 3, 5000)));
    });
}

#[test]
fn what_is_left_out_keeps_its_clients_and_its_backends() {
    let limits = Limits { slots: 4, ..Limits::default() };
    in_world_with(limits, |w| {
        let h = hosts(Family::V4);
        let backends = |ports: &[u16]| -> Vec<SocketAddr> { ports.iter().map(|p| SocketAddr::new(h.b, *p)).collect() };
        w.serve(1, Family::V4, Some(address(1)), 80, Protocol::Tcp, &backends(&[8001, 8002]));
        target(w, 1).sources = Some(["10.1.0.10/32".parse().unwrap()].as_slice().into());
        w.apply_services();
        let before = led_to(w, 1, 5000);
        assert!([8001, 8002].contains(&before));
        // Two more endpoints, for whose list there is no room beside the one in use; and the first ones go.
        w.serve(2, Family::V4, Some(address(1)), 80, Protocol::Tcp, &backends(&[8003, 8004, 8005]));
        target(w, 1).sources =
            Some(["10.1.0.10/32".parse().unwrap(), "10.3.0.0/24".parse().unwrap()].as_slice().into());
        target(w, 1).id = towpath_model::desired::ServiceId(1);
        w.table.backends.retain(|id, _| id.0 > 200);
        for turn in 0..3u16 {
            let applied = w.programs.apply_services(&w.table, Instant::now()).unwrap();
            assert_eq!(applied.left_out.len(), 1, "{applied:?}");
            later(w);
            let now = led_to(w, 1, 5001 + turn);
            assert!([8001, 8002].contains(&now), "it leads where it led: {now}");
        }
        // With less to ask for, it has it.
        target(w, 1).backends.truncate(2);
        assert_eq!(w.programs.apply_services(&w.table, Instant::now()).unwrap().left_out, []);
        later(w);
        let now = led_to(w, 1, 5010);
        assert!([8003, 8004].contains(&now), "{now}");
        let ids: Vec<u32> =
            w.entries::<u32, towpath_datapath::abi::Backend>("tp_backends").iter().map(|(id, _)| *id).collect();
        assert!(ids.iter().all(|id| *id > 200), "those that it led to are gone: {ids:?}");
        assert_eq!(libbpf_rs::MapCore::keys(&w.map("tp_source_ranges")).count(), 2);
    });
}

#[test]
fn slots_that_another_version_left_without_a_backend_take_no_room() {
    let limits = Limits { slots: 4, ..Limits::default() };
    in_world_with(limits, |w| {
        use towpath_datapath::abi::{Slot, SlotKey};
        let h = hosts(Family::V4);
        let backends: Vec<SocketAddr> = (8001..8004).map(|port| SocketAddr::new(h.b, port)).collect();
        w.serve(1, Family::V4, Some(address(1)), 80, Protocol::Tcp, &backends);
        // As a map of another layout is copied, of which no field has a name that is known here.
        for (key, _) in w.entries::<SlotKey, Slot>("tp_slots") {
            w.write("tp_slots", &key, &Slot::default());
        }
        w.programs = Programs::open_for_tests(w.programs.config().clone()).unwrap();
        assert_eq!(w.programs.apply_services(&w.table, Instant::now()).unwrap().left_out, []);
        let slots: Vec<u32> = w.entries::<SlotKey, Slot>("tp_slots").iter().map(|(_, slot)| slot.backend).collect();
        assert_eq!(slots.len(), 3, "{slots:?}");
        assert!((8001..8004).contains(&led_to(w, 1, 5000)));
    });
}

/// An image in which pod b has a set of so many rows, and a class, a prefix and an entry of the set for each.
fn rows(w: &mut World, set: u32, count: u16) -> PolicyImage {
    let mut image = w.image.clone();
    let sets = towpath_model::desired::PodSets { ingress: SetId(set), ..Default::default() };
    image.pods.extend(w.local_b().addresses.iter().map(|address| (*address, sets)));
    for port in 1..=count {
        let key = RowKey {
            set: SetId(set),
            class: LocalClass(0),
            protocol: RowProtocol::Ports(Protocol::Tcp),
            port,
            port_bits: 16,
        };
        image.rows.insert(key, Row { verdict: Verdict::Allow, rule: RuleId(set) });
        let (class, third, fourth) = (ClassId(1000 * set + u32::from(port)), (port >> 8) as u8, (port & 255) as u8);
        image.cidr_classes.insert(IpAddr::from([198, set as u8, third, fourth]).into(), class);
        image.set_classes.insert((SetId(set), class), LocalClass(0));
    }
    image
}

/// What does not fit is not written, not even a part: the policies before stay in force, and the next ones that fit are taken.
#[test]
fn policies_that_do_not_fit_leave_the_tables_as_they_are() {
    for (limits, full) in [
        (Limits { rules: 64, ..Limits::default() }, "tp_rules"),
        (Limits { set_classes: 64, ..Limits::default() }, "tp_set_class"),
        (Limits { classes: 64, ..Limits::default() }, "tp_class_cidrs"),
    ] {
        in_world_with(limits, move |w| {
            let h = hosts(Family::V4);
            let small = rows(w, 5, 20);
            w.programs.apply_policy(&small).unwrap();
            let passes =
                |w: &World, sport, port| w.from_pod(&sent_by(h.a, sport, h.b, port, L4::syn())).into_pod(w.pod_b);
            let denied = |w: &World, sport, port| {
                w.from_pod(&sent_by(h.a, sport, h.b, port, L4::syn())).dropped("ingress_policy")
            };
            passes(w, 4001, 20);
            denied(w, 4002, 21);
            let held = |w: &World| {
                ["tp_rules", "tp_set_class", "tp_class_cidrs"].map(|map| libbpf_rs::MapCore::keys(&w.map(map)).count())
            };
            let before = held(w);
            let large = rows(w, 6, 100);
            for _ in 0..2 {
                let error = w.programs.apply_policy(&large).unwrap_err();
                assert!(matches!(error, Error::Full { map, limit: 64 } if map == full), "{error}");
                assert_eq!(held(w), before, "nothing is left of it");
            }
            passes(w, 4003, 20);
            denied(w, 4004, 21);
            let other = rows(w, 7, 30);
            w.programs.apply_policy(&other).unwrap();
            passes(w, 4005, 30);
            denied(w, 4006, 31);
        });
    }
}

/// What fills its table to the last entry leaves no room for what closes pods either. Emptied, the tables take it: and until they have it, who
/// was isolated is closed, whom nothing isolates is not, and an address that loses its class is no stranger whom somebody lets in.
#[test]
fn tables_full_to_the_last_entry_are_emptied_with_their_pods_closed() {
    in_world_with(Limits { rules: 64, ..Limits::default() }, |w| {
        let h = hosts(Family::V4);
        let full = rows(w, 5, 64);
        w.programs.apply_policy(&full).unwrap();
        let syn = |w: &World, from, to, sport, port| w.from_pod(&sent_by(from, sport, to, port, L4::syn()));
        syn(w, h.a, h.b, 4001, 20).into_pod(w.pod_b);
        let least = rows(w, 6, 1);
        let error = w.programs.apply_policy(&least).unwrap_err();
        assert!(matches!(error, Error::Full { map: "tp_rules", limit: 64 }), "{error}");
        w.programs.vacate_policy().unwrap();
        for map in ["tp_rules", "tp_set_class", "tp_class_cidrs", "tp_class_pods"] {
            assert_eq!(libbpf_rs::MapCore::keys(&w.map(map)).count(), 0, "{map}");
        }
        // A connection that was let in, and a new one.
        for sport in [4001, 4002] {
            syn(w, h.a, h.b, sport, 20).dropped("ingress_policy");
        }
        syn(w, h.b, h.a, 4003, 80).dropped("egress_policy");
        w.programs.apply_policy(&least).unwrap();
        syn(w, h.a, h.b, 4004, 1).into_pod(w.pod_b);
        syn(w, h.a, h.b, 4005, 2).dropped("ingress_policy");
        syn(w, h.b, h.a, 4006, 80).into_pod(w.pod_a);
    });
}
