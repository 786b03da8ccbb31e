//! Opening again adopts what is there; links go on without the process; the collector needs nobody.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use libbpf_rs::MapCore;
use towpath_datapath::abi::*;
use towpath_datapath::bpf::{BpfConfig, Hook, Isolation, Limits, Programs};
use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, L4};
use crate::world::*;

#[test]
fn opening_again_adopts_links_maps_and_connections_and_writes_nothing() {
    in_namespaces(|dir| {
        let mut w = World::new(dir, Limits::default());
        if !w.has_device_links() {
            return;
        }
        let h = hosts(Family::V4);
        w.programs.attach_device(w.pod_a, Hook::FromPod).unwrap();
        w.programs.attach_device(w.pod_a, Hook::ToPod).unwrap();
        w.serve(1, Family::V4, Some(h.service), 80, Protocol::Tcp, &[std::net::SocketAddr::new(h.b, 8080)]);
        let b = w.local_b();
        w.isolate(&b, 5, 0);
        w.allow(5, h.a, RowProtocol::Ports(Protocol::Tcp), 8080, 42);
        w.apply_policy();
        w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::syn())).into_pod(w.pod_b);
        let before = w.programs.snapshot().unwrap();
        let config = w.programs.config().clone();
        let attached = w.programs.attached().unwrap();
        assert_eq!(attached, [(w.pod_a, Hook::FromPod), (w.pod_a, Hook::ToPod)]);
        // Another limit does not throw the pinned map away.
        let config = BpfConfig { limits: Limits { connections: 77, ..config.limits }, ..config };
        w.programs = Programs::open_for_tests(config).unwrap();
        assert_eq!(w.programs.attached().unwrap(), attached);
        let after = w.programs.snapshot().unwrap();
        assert_eq!(
            (before.revision, before.pods.len(), before.peers.len()),
            (after.revision, after.pods.len(), after.peers.len())
        );
        assert_eq!(w.programs.connections().unwrap().len(), 1);
        // The same wishes are no changes. But whether who wrote before was killed before it had verdicts looked at again nobody knows: that is
        // done once, and never again.
        let none = towpath_datapath::bpf::Changes::default();
        let same = |w: &mut World| {
            assert_eq!(w.programs.apply_policy(&w.image.clone()).unwrap(), none);
            assert_eq!(w.programs.apply_services(&w.table.clone(), Instant::now()).unwrap().changes, none);
            assert_eq!(w.programs.apply_peers(&peers()).unwrap(), none);
            w.programs.adopt_pod(&b).unwrap();
            w.programs.snapshot().unwrap().revision
        };
        let looked_again = same(&mut w);
        assert!(looked_again > before.revision);
        assert_eq!(same(&mut w), looked_again);
        // Replaced in place, twice; the flow goes on.
        w.programs.attach_device(w.pod_a, Hook::FromPod).unwrap();
        w.programs.attach_device(w.pod_a, Hook::FromPod).unwrap();
        w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::tcp(ACK))).into_pod(w.pod_b);
        w.programs.unpin_all().unwrap();
    });
}

#[test]
fn links_of_another_version_are_left_alone_and_then_taken_over() {
    in_namespaces(|dir| {
        let mut w = World::new(dir, Limits::default());
        if !w.has_device_links() {
            return;
        }
        for (pod, hook) in [(w.pod_a, Hook::FromPod), (w.pod_b, Hook::FromPod), (w.pod_b, Hook::ToPod)] {
            w.programs.attach_device(pod, hook).unwrap();
        }
        let config = w.programs.config().clone();
        let (ours, theirs) = (dir.join(format!("towpath-v{TP_ABI_VERSION}")), dir.join("towpath-v77"));
        std::fs::rename(&ours, &theirs).unwrap();
        // A hook that only they have.
        let pin = |hook: &str| theirs.join(format!("links/dev-{}-{hook}", w.pod_b));
        std::fs::rename(pin("tp_to_pod"), pin("tp_their_own")).unwrap();
        w.programs = Programs::open_for_tests(config.clone()).unwrap();
        assert!(w.programs.has_former());
        w.programs.attach_device(w.pod_a, Hook::FromPod).unwrap();
        w.programs.attach_device(w.pod_a, Hook::ToPod).unwrap();
        let attached = w.programs.attached().unwrap();
        assert_eq!(attached, [(w.pod_a, Hook::ToPod)], "only where they have none");
        assert!(w.programs.is_linked(w.pod_a, Hook::FromPod).unwrap());
        assert!(!w.programs.is_linked(w.pod_b, Hook::ToPod).unwrap());
        assert_eq!(w.programs.take_over().unwrap(), 3);
        let taken = [(w.pod_a, Hook::FromPod), (w.pod_a, Hook::ToPod), (w.pod_b, Hook::FromPod)];
        assert_eq!(w.programs.attached().unwrap(), taken);
        assert!(w.programs.has_former() && theirs.exists() && w.programs.take_over().unwrap() == 0);
        w.programs.end_take_over().unwrap();
        assert!(!w.programs.has_former() && !theirs.exists());
        // What the pinned links run now is what this process loaded.
        for (pod, hook) in taken {
            let pin = ours.join(format!("links/dev-{pod}-{}", hook.program()));
            let runs = libbpf_rs::Link::open(pin).unwrap().info().unwrap().prog_id;
            let loaded = w.programs.descriptor(hook).unwrap();
            assert_eq!(runs, libbpf_rs::Program::id_from_fd(loaded.as_fd()).unwrap(), "{hook:?} of {pod}");
        }
        w.programs.unpin_all().unwrap();
        assert!(!ours.exists());
    });
}

#[test]
fn a_pod_without_an_entry_is_adopted_as_unknown() {
    in_world(|w| {
        let a = w.local_a();
        w.programs.remove_pod(&a).unwrap();
        w.programs.adopt_pod(&a).unwrap();
        let h = hosts(Family::V6);
        w.from_pod(&sent_by(h.a, 4000, h.outside, 80, L4::syn())).dropped("egress_policy");
        w.programs.set_pod(&a, Isolation::Sets(PodSets::default())).unwrap();
        w.from_pod(&sent_by(h.a, 4000, h.outside, 80, L4::syn())).passed();
        assert_eq!(w.programs.retain_pods(&[a]).unwrap(), 2);
    });
}

#[test]
fn links_of_devices_that_are_gone_are_swept_and_an_index_used_again_gets_its_own() {
    in_world(|w| {
        if !w.has_device_links() {
            return;
        }
        w.programs.attach_device(w.pod_a, Hook::FromPod).unwrap();
        w.programs.attach_device(w.pod_b, Hook::FromPod).unwrap();
        assert_eq!(w.programs.sweep_links().unwrap(), 0);
        sh("ip link del tpa");
        let again = format!("ip link add tpa index {} type veth peer name pa", w.pod_a);
        sh(&again);
        // The pin is there, its device is not: attaching makes a new link.
        w.programs.attach_device(w.pod_a, Hook::FromPod).unwrap();
        assert_eq!(w.programs.attached().unwrap().len(), 2);
        sh("ip link del tpa");
        assert_eq!(w.programs.attached().unwrap(), [(w.pod_b, Hook::FromPod)]);
        assert_eq!(w.programs.sweep_links().unwrap(), 1);
        w.programs.detach_device(w.pod_b).unwrap();
        w.programs.detach_device(w.pod_b).unwrap();
        assert!(w.programs.attached().unwrap().is_empty());
        let error = w.programs.attach_device(99_999, Hook::FromPod).unwrap_err().to_string();
        assert!(error.contains("tp_from_pod to device 99999"), "{error}");
    });
}

#[test]
fn the_collector_visits_every_connection_and_deletes_the_idle_ones() {
    in_world(|w| {
        const COUNT: u32 = 200_000;
        let best = |w: &mut World, removed: u32| {
            let once = |w: &mut World| {
                let began = Instant::now();
                assert_eq!(w.programs.collect().unwrap().connections, removed);
                began.elapsed()
            };
            (0..5).map(|_| once(w)).min().unwrap()
        };
        let empty = best(w, 0);
        w.fill(COUNT, uptime());
        let visiting = best(w, 0);
        let listed = Instant::now();
        assert_eq!(w.programs.connections().unwrap().len(), COUNT as usize);
        let listing = listed.elapsed();
        // 31 s ago: past the limit of a flow that nobody answered.
        w.fill(COUNT, uptime() - 31_000_000_000);
        let began = Instant::now();
        let removed = w.programs.collect().unwrap().connections;
        let deleting = began.elapsed();
        println!(
            "no connections: {empty:?}; {COUNT}: visited in {visiting:?}, listed in {listing:?}, deleted in {deleting:?}"
        );
        assert_eq!(removed, COUNT);
        assert!(w.programs.connections().unwrap().is_empty());
    });
}

#[test]
fn the_collector_runs_without_the_process_that_armed_it() {
    in_namespaces(|dir| {
        let w = World::new(dir, Limits::default());
        let config = w.programs.config().clone();
        w.fill(100, uptime() - 31_000_000_000);
        let usage = |programs: &Programs| programs.connections().unwrap().len();
        assert_eq!(usage(&w.programs), 100);
        // The agent dies.
        drop(w);
        let map =
            libbpf_rs::MapHandle::from_pinned_path(dir.join(format!("towpath-v{TP_ABI_VERSION}/maps/tp_ct"))).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while map.keys().next().is_some() {
            assert!(Instant::now() < deadline, "nothing was collected");
            std::thread::sleep(Duration::from_millis(100));
        }
        // The next one takes the timer over.
        let programs = Programs::open_for_tests(config).unwrap();
        assert_eq!(usage(&programs), 0);
        programs.unpin_all().unwrap();
    });
}

#[test]
fn translations_go_with_their_connections() {
    in_world(|w| {
        let h = hosts(Family::V4);
        w.serve(1, Family::V4, Some(h.service), 53, Protocol::Udp, &[std::net::SocketAddr::new(h.b, 5353)]);
        w.from_pod(&sent_by(h.a, 4000, h.service, 53, L4::udp(b"x"))).into_pod(w.pod_b);
        let translations = |w: &World| w.programs.usage().unwrap().iter().find(|u| u.map == "tp_nat").unwrap().entries;
        assert_eq!(translations(w), 1);
        assert_eq!(w.programs.collect().unwrap(), Removed::default());
        let a = w.local_a();
        w.programs.remove_pod(&a).unwrap();
        assert_eq!(translations(w), 0);
    });
}

/// Instructions that the kernel's verifier walked to load a program: it gives up at a million. Kernels differ in how soon they see that
/// they were somewhere before.
fn walked(program: BorrowedFd<'_>) -> u32 {
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut length = u32::try_from(size_of_val(&info)).unwrap();
    // SAFETY: the kernel writes no more than `length` bytes into `info`, which are all numbers, and follows no pointer in it, as each is null.
    let failed =
        unsafe { libbpf_sys::bpf_obj_get_info_by_fd(program.as_raw_fd(), (&raw mut info).cast(), &raw mut length) };
    assert_eq!(failed, 0);
    info.verified_insns
}

#[test]
fn no_program_comes_near_to_what_a_verifier_looks_at() {
    in_world(|w| {
        let programs = w.programs.object().progs();
        let walked: Vec<(String, u32)> =
            programs.map(|program| (program.name().to_string_lossy().into_owned(), walked(program.as_fd()))).collect();
        assert!(walked.len() > 10 && walked.iter().any(|(_, n)| *n > 10_000), "{walked:?}");
        let most = walked.iter().max_by_key(|(_, n)| *n).unwrap();
        assert!(most.1 < 200_000, "{most:?}: mark what many ways lead to as TP_APART (bpf/work.h)");
    });
}
