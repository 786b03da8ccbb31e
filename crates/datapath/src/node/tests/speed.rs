//! How long calls take, printed; fails only where a call is slow by an order of magnitude.

use std::time::{Duration, Instant};

use super::lab::{Kind, Lab, Ns, OPEN, root};

#[test]
fn attaching_and_detaching_a_pod_takes_milliseconds() {
    if !root() {
        return;
    }
    let lab = Lab::new(Kind { programs: true, underlay_v6: false });
    let (mut attached, mut detached) = (Vec::new(), Vec::new());
    for host in 20..60 {
        let ns = Ns::new();
        let request = lab.n1.request(&ns, host, OPEN);
        let started = Instant::now();
        lab.n1.call(move |node| node.attach_pod(request)).unwrap();
        attached.push(started.elapsed());
        let started = Instant::now();
        lab.n1.call(move |node| node.detach_pod(&format!("container-1-{host}"), "eth0")).unwrap();
        detached.push(started.elapsed());
    }
    attached.sort();
    detached.sort();
    let (attach, detach) = (attached[attached.len() / 2], detached[detached.len() / 2]);
    println!("median of {}: attach {attach:?}, detach {detach:?}", attached.len());
    assert!(attach < Duration::from_millis(100) && detach < Duration::from_millis(100));
}
