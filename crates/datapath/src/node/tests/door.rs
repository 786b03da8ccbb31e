//! The async door: from a multi-threaded runtime, and with errors that a person can act on.

use super::lab::{Ns, TestNode, root};
use crate::{Datapath, DatapathConfig};

fn is_shareable<T: Send + Sync + Clone>() {}

#[test]
fn the_handle_can_be_shared_between_tasks() {
    is_shareable::<Datapath>();
}

fn opening_fails(ns: &Ns, config: DatapathConfig) -> String {
    ns.run(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(Datapath::open(config)).unwrap_err().to_string()
    })
}

#[test]
fn a_node_without_its_address_is_told_what_to_check() {
    if !root() {
        return;
    }
    let node = TestNode::new(1, super::lab::BENEATH);
    let error = opening_fails(&node.ns, node.config.clone());
    assert!(error.contains("192.0.2.1") && error.contains("ip addr"), "{error}");
    let mut config = node.config.clone();
    config.uplink = Some("wan0".to_owned());
    let error = opening_fails(&node.ns, config);
    assert!(error.contains("wan0") && error.contains("ip link"), "{error}");
    let mut config = node.config.clone();
    config.settings.addresses.clear();
    assert!(opening_fails(&node.ns, config).contains("kubectl get node n1"));
    assert!(!node.traces().contains("towpath"), "nothing was changed");
}
