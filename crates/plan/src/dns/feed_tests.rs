use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use serde_json::json;
use towpath_model::{EndpointSlice, Namespace, NamespacedName, Pod, Service, World};
use towpath_wire::dns::{DnsAnswer, FeedMessage};

use super::{FeedPlanner, Records};
use crate::{Changed, ChangedPods};

fn service(value: serde_json::Value) -> Service {
    Service::try_from(&serde_json::from_value::<core::Service>(value).unwrap()).unwrap()
}

fn world() -> World {
    let mut world = World::default();
    let services = [
        json!({"metadata": {"name": "web", "namespace": "default"}, "spec": {
            "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ports": [{"name": "http", "port": 80}]}}),
        json!({"metadata": {"name": "pending", "namespace": "default"}, "spec": {"ports": [{"port": 80}]}}),
        json!({"metadata": {"name": "db", "namespace": "default"}, "spec": {"clusterIP": "None"}}),
        json!({"metadata": {"name": "out", "namespace": "default"}, "spec": {
            "type": "ExternalName", "externalName": "Example.COM."}}),
    ];
    for value in services {
        let service = service(value);
        world.services.insert(service.name.clone(), service);
    }
    let slice: discovery::EndpointSlice = serde_json::from_value(json!({
        "metadata": {"name": "db-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "db"}},
        "addressType": "IPv4",
        "ports": [{"name": "peer", "port": 7000}],
        "endpoints": [
            {"addresses": ["10.244.0.3"], "conditions": {"ready": false}},
            {"addresses": ["10.244.0.2"], "hostname": "db-0", "conditions": {"ready": true}},
        ],
    }))
    .unwrap();
    let slice = EndpointSlice::try_from(&slice).unwrap();
    world.slices.insert(slice.name.clone(), slice);
    world.namespaces.insert(
        "default".to_owned(),
        Namespace {
            name: "default".to_owned(),
            labels: Default::default(),
            socket_services: Default::default(),
            pods_choose: false,
            terminating: false,
        },
    );
    for pod in [pod("default", "db-0", "Running", "10.244.0.2"), pod("default", "done", "Succeeded", "10.244.0.9")] {
        world.pods.insert(pod.name.clone(), pod);
    }
    world
}

fn pod(namespace: &str, name: &str, phase: &str, address: &str) -> Pod {
    let pod: core::Pod = serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": namespace}, "spec": {"containers": []},
        "status": {"phase": phase, "podIP": address},
    }))
    .unwrap();
    Pod::try_from(&pod).unwrap()
}

fn named(name: &str) -> NamespacedName {
    NamespacedName::new("default", name)
}

#[test]
fn the_first_message_is_a_snapshot_of_everything() {
    let mut planner = FeedPlanner::new("cluster.local");
    let messages = planner.plan(&world(), Changed::Services(&BTreeSet::new()), None);
    let [FeedMessage::Snapshot { domain, services, namespaces, pods, .. }] = messages.as_slice() else {
        panic!("{messages:?}")
    };
    assert_eq!((domain.as_str(), namespaces.len()), ("cluster.local", 1));
    let names: Vec<&str> = services.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["db", "out", "web"], "a Service without an address yet has no name");
    let DnsAnswer::Endpoints { endpoints } = &services[0].answer else { panic!() };
    assert_eq!(endpoints.len(), 1, "only the ready one");
    assert_eq!(endpoints[0].hostname.as_deref(), Some("db-0"));
    assert_eq!(services[1].answer, DnsAnswer::Alias { target: "example.com".to_owned() });
    let DnsAnswer::ClusterIps { ports, .. } = &services[2].answer else { panic!() };
    assert_eq!((ports[0].name.as_str(), ports[0].protocol.as_str(), ports[0].port), ("http", "tcp", 80));
    let addresses: Vec<IpAddr> = pods.iter().map(|p| p.address).collect();
    assert_eq!(addresses, [IpAddr::from([10, 244, 0, 2])], "pods that ended have no name");
    assert!(planner.plan(&world(), Changed::All, None).is_empty(), "and nothing when nothing differs");
}

#[test]
fn endpoints_of_a_service_with_an_address_are_fed_if_they_have_a_host_name() {
    let (mut planner, mut world) = (FeedPlanner::new("c"), world());
    planner.plan(&world, Changed::All, None);
    let slice: discovery::EndpointSlice = serde_json::from_value(json!({
        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [
            {"addresses": ["10.244.0.4"], "hostname": "web-1", "conditions": {"ready": false}},
            {"addresses": ["10.244.0.5"], "hostname": "Web-0", "conditions": {"ready": true}},
            {"addresses": ["10.244.0.6"], "conditions": {"ready": true}},
        ],
    }))
    .unwrap();
    let slice = EndpointSlice::try_from(&slice).unwrap();
    world.slices.insert(slice.name.clone(), slice);
    let mut fed = |world: &World| match planner.plan(world, Changed::Services(&[named("web")].into()), None).as_slice()
    {
        [FeedMessage::Set { service }] => match &service.answer {
            DnsAnswer::ClusterIps { endpoints, .. } => endpoints.clone(),
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    };
    let endpoints = fed(&world);
    assert_eq!(endpoints.len(), 1, "{endpoints:?}: the ready one; who has no host name takes no memory");
    assert_eq!((endpoints[0].hostname.as_deref(), endpoints[0].ports[0].port), (Some("web-0"), 8080));

    world.services.get_mut(&named("web")).unwrap().publish_not_ready = true;
    assert_eq!(fed(&world).len(), 2);
}

#[test]
fn publish_not_ready_addresses_lists_all_endpoints() {
    let mut world = world();
    world.services.get_mut(&named("db")).unwrap().publish_not_ready = true;
    let messages = FeedPlanner::new("c").plan(&world, Changed::All, None);
    let FeedMessage::Snapshot { services, .. } = &messages[0] else { panic!() };
    assert!(matches!(&services[0].answer, DnsAnswer::Endpoints { endpoints } if endpoints.len() == 2));
}

#[test]
fn changes_lead_to_the_same_records_as_a_new_snapshot() {
    let (mut planner, mut records) = (FeedPlanner::new("cluster.local"), Records::default());
    let mut world = world();
    let mut feed =
        |planner: &mut FeedPlanner, world: &World, names: &[&str], pods: Option<&[NamespacedName]>| -> usize {
            let names: BTreeSet<NamespacedName> = names.iter().map(|n| named(n)).collect();
            let pods: Option<BTreeSet<NamespacedName>> = pods.map(|pods| pods.iter().cloned().collect());
            let messages = planner.plan(world, Changed::Services(&names), pods.as_ref().map(ChangedPods::These));
            let count = messages.len();
            messages.into_iter().for_each(|m| records.apply(m));
            let mut whole = Records::default();
            FeedPlanner::new("cluster.local").plan(world, Changed::All, None).into_iter().for_each(|m| whole.apply(m));
            assert_eq!(records, whole);
            count
        };
    assert_eq!(feed(&mut planner, &world, &[], None), 1);

    let mut slice = world.slices[&named("db-1")].clone();
    slice.endpoints[0].conditions.ready = true;
    world.slices.insert(named("db-1"), slice);
    assert_eq!(feed(&mut planner, &world, &["db"], None), 1);

    world.services.remove(&named("web"));
    world.services.get_mut(&named("pending")).unwrap().cluster_ips = vec![IpAddr::from([10, 96, 0, 7])];
    assert_eq!(feed(&mut planner, &world, &["web", "pending", "db"], None), 2, "db did not change");

    let names = ["a", "b"].map(|name| NamespacedName::new("other", name));
    for (name, address) in [("a", "10.244.0.7"), ("b", "10.244.0.8")] {
        let pod = pod("other", name, "Running", address);
        world.pods.insert(pod.name.clone(), pod);
    }
    assert_eq!(feed(&mut planner, &world, &[], Some(&names)), 1, "pods of a namespace that had none");
    world.pods.insert(names[0].clone(), pod("other", "a", "Running", "10.244.0.9"));
    world.pods.insert(names[1].clone(), pod("other", "b", "Succeeded", "10.244.0.8"));
    assert_eq!(feed(&mut planner, &world, &[], Some(&names)), 1, "one has another address, and one has ended");
    world.pods.remove(&names[0]);
    assert_eq!(feed(&mut planner, &world, &[], Some(&names[..1])), 1, "the last of a namespace is gone");

    world.pods.remove(&named("db-0"));
    world.namespaces.clear();
    assert_eq!(feed(&mut planner, &world, &[], Some(&[named("db-0")])), 2);
}
