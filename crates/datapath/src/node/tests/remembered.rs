//! Records that are lost while their pods run.

use super::lab::{BENEATH, Kind, Lab, OPEN, PROGRAMS, TestNode, TestPod, root};
use crate::requests::RememberedPod;

fn record(node: &TestNode, pod: &TestPod) -> std::path::PathBuf {
    node.config.state_dir.join("pods").join(&pod.pod.host_device).with_extension("json")
}

/// As an agent that starts again and has the leases of these pods.
fn reopen(node: &mut TestNode, leases: &[&TestPod]) {
    let remember = |pod: &&TestPod| RememberedPod { pod: pod.pod.clone(), ifname: "eth0".to_owned() };
    node.config.remembered = leases.iter().map(remember).collect();
    node.open();
}

fn loses_no_pod(kind: Kind) {
    let mut lab = Lab::new(kind);
    let (a, b, c) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n2.pod(10, OPEN));
    let before = lab.n1.traces();
    lab.n1.close();
    std::fs::remove_file(record(&lab.n1, &a)).unwrap();
    std::fs::write(record(&lab.n1, &b), "{").unwrap();
    reopen(&mut lab.n1, &[&a, &b]);
    let pods = lab.n1.call(|node| node.list_pods()).unwrap();
    for pod in [&a, &b] {
        assert!(pods.contains(&(pod.pod.clone(), "eth0".to_owned())), "its lease would be released: {pods:?}");
        assert!(pod.ns.pings(&c.v4().to_string()) && c.ns.pings(&pod.v6().to_string()));
    }
    lab.n1.apply_peers();
    assert_eq!(lab.n1.traces(), before, "no device was touched");
    assert_eq!(lab.n1.call(|node| Ok(node.status())).unwrap().problems, Vec::<String>::new());
    // On record again: the next start needs nobody's memory.
    lab.n1.close();
    reopen(&mut lab.n1, &[]);
    assert_eq!(lab.n1.call(|node| node.list_pods()).unwrap().len(), 2);
}

#[test]
fn a_pod_whose_record_is_gone_or_cannot_be_read_keeps_its_device_by_its_lease() {
    if root() {
        loses_no_pod(BENEATH);
        loses_no_pod(PROGRAMS);
    }
}

#[test]
fn what_is_remembered_of_another_device_or_of_a_pod_that_was_detached_is_not_believed() {
    if !root() {
        return;
    }
    let mut lab = Lab::new(BENEATH);
    let (mut another, detached) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN));
    lab.n1.close();
    std::fs::remove_file(record(&lab.n1, &another)).unwrap();
    // An agent that dies between a detached pod's tombstone and the end of its device.
    std::fs::rename(record(&lab.n1, &detached), record(&lab.n1, &detached).with_extension("gone")).unwrap();
    another.pod.ifindex += 100;
    reopen(&mut lab.n1, &[&another, &detached]);
    assert_eq!(lab.n1.call(|node| node.list_pods()).unwrap(), []);
}

#[test]
fn a_pod_that_nobody_knows_any_more_is_told_in_the_status() {
    if !root() {
        return;
    }
    let mut lab = Lab::new(BENEATH);
    let pod = lab.n1.pod(10, OPEN);
    lab.n1.close();
    std::fs::write(record(&lab.n1, &pod), "{").unwrap();
    reopen(&mut lab.n1, &[]);
    let problems = lab.n1.call(|node| Ok(node.status())).unwrap().problems;
    assert!(problems.iter().any(|problem| problem.contains(&pod.pod.host_device)), "{problems:?}");
}
