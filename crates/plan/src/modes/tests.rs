use super::*;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use serde_json::{Value, json};
use towpath_model::{EndpointSlice, Service};

const READY: KubeProxy = KubeProxy { here: true, ready: true, elsewhere: true };
const STARTING: KubeProxy = KubeProxy { here: true, ready: false, elsewhere: true };
const ELSEWHERE: KubeProxy = KubeProxy { here: false, ready: false, elsewhere: true };
const NOWHERE: KubeProxy = KubeProxy { here: false, ready: false, elsewhere: false };
const BOTH_READY: CoreDns = CoreDns { endpoints: 2, ready: 2 };
const NONE_READY: CoreDns = CoreDns { endpoints: 2, ready: 0 };
const NO_DNS: CoreDns = CoreDns { endpoints: 0, ready: 0 };

fn auto() -> Modes {
    Modes::new(Duty::Auto, Duty::Auto, None)
}

fn kept(proxy: Proxy, dns: Dns) -> Modes {
    Modes::new(Duty::Auto, Duty::Auto, Some(InCharge { proxy, dns }))
}

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn proxy(modes: &mut Modes, seen: KubeProxy, seconds: u64) -> Proxy {
    modes.decide(seen, NO_DNS, false, at(seconds)).proxy
}

fn dns(modes: &mut Modes, seen: CoreDns, seconds: u64) -> Dns {
    modes.decide(NOWHERE, seen, false, at(seconds)).dns
}

fn pod(value: Value) -> Pod {
    Pod::try_from(&serde_json::from_value::<core::Pod>(value).unwrap()).unwrap()
}

fn world_of(pods: Vec<Pod>) -> World {
    World { pods: pods.into_iter().map(|pod| (pod.name.clone(), pod)).collect(), ..World::default() }
}

#[test]
fn kube_proxy_is_seen_by_label_by_owner_and_as_a_static_pod_on_its_own_node_only() {
    let metadata = [
        json!({"labels": {"k8s-app": "kube-proxy"}}),
        json!({"labels": {"component": "kube-proxy"}}),
        json!({"ownerReferences": [{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "kube-proxy", "uid": "u", "controller": true}]}),
    ];
    for mut metadata in metadata {
        metadata["namespace"] = json!("kube-system");
        metadata["name"] = json!("any-name");
        let object = |metadata: &Value| {
            json!({"metadata": metadata, "spec": {"nodeName": "n1", "containers": []},
                   "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}})
        };
        let world = world_of(vec![pod(object(&metadata))]);
        assert_eq!(kube_proxy(&world, &NodeName::new("n1")), KubeProxy { here: true, ready: true, elsewhere: false });
        assert_eq!(kube_proxy(&world, &NodeName::new("n2")), ELSEWHERE);
        metadata["namespace"] = json!("default");
        let tenant = world_of(vec![pod(object(&metadata))]);
        assert_eq!(kube_proxy(&tenant, &NodeName::new("n1")), NOWHERE, "a tenant's pod of that name is none");
    }
    let other = json!({"metadata": {"namespace": "kube-system", "name": "kube-proxy", "labels": {"k8s-app": "other"}},
                       "spec": {"nodeName": "n1", "containers": []}});
    assert_eq!(kube_proxy(&world_of(vec![pod(other)]), &NodeName::new("n1")), NOWHERE);
}

#[test]
fn what_is_fixed_holds_at_once_whatever_runs() {
    for seen in [READY, NOWHERE] {
        let mut ours = Modes::new(Duty::Towpath, Duty::Towpath, None);
        assert_eq!(ours.decide(seen, BOTH_READY, false, at(0)), InCharge { proxy: Proxy::Towpath, dns: Dns::Towpath });
        let mut off = Modes::new(Duty::Off, Duty::Off, None);
        assert_eq!(off.decide(seen, NO_DNS, false, at(0)), InCharge { proxy: Proxy::Others, dns: Dns::Others });
        assert_eq!((ours.next_deadline(), off.next_deadline()), (None, None));
    }
}

#[test]
fn the_first_look_leaves_it_to_what_runs_and_serves_where_nothing_does() {
    assert_eq!(proxy(&mut auto(), STARTING, 0), Proxy::KubeProxy);
    assert_eq!(proxy(&mut auto(), NOWHERE, 0), Proxy::Towpath);
    // A node that has just joined a cluster with kube-proxy: its pod may be on its way.
    let mut joining = auto();
    assert_eq!(proxy(&mut joining, ELSEWHERE, 0), Proxy::KubeProxy);
    assert_eq!(joining.next_deadline(), Some(GONE));
    assert_eq!(proxy(&mut joining, ELSEWHERE, 30), Proxy::Towpath);
}

#[test]
fn a_restart_or_a_roll_of_kube_proxy_flips_nothing() {
    let mut modes = auto();
    let roll = [(READY, 0), (STARTING, 5), (READY, 9), (NOWHERE, 60), (ELSEWHERE, 70), (STARTING, 80), (READY, 500)];
    for (seen, seconds) in roll {
        assert_eq!(proxy(&mut modes, seen, seconds), Proxy::KubeProxy, "at {seconds}");
    }
}

#[test]
fn kube_proxy_that_is_deleted_for_good_is_followed_by_towpath_and_not_before() {
    let mut modes = auto();
    proxy(&mut modes, READY, 0);
    assert_eq!(proxy(&mut modes, NOWHERE, 100), Proxy::KubeProxy);
    assert_eq!(modes.next_deadline(), Some(at(130)));
    assert_eq!(proxy(&mut modes, NOWHERE, 129), Proxy::KubeProxy);
    assert_eq!(proxy(&mut modes, NOWHERE, 130), Proxy::Towpath);
    assert_eq!(modes.next_deadline(), None);
}

#[test]
fn kube_proxy_gets_services_back_once_it_has_settled_and_is_healthy() {
    let mut modes = auto();
    proxy(&mut modes, NOWHERE, 0);
    for (seen, seconds) in [(STARTING, 10), (READY, 20), (STARTING, 25), (READY, 26), (READY, 35)] {
        assert_eq!(proxy(&mut modes, seen, seconds), Proxy::Towpath, "at {seconds}");
    }
    assert_eq!(modes.next_deadline(), Some(at(36)));
    assert!(!modes.wants_health(at(35)) && modes.wants_health(at(36)));
    assert_eq!(modes.decide(READY, NO_DNS, true, at(36)).proxy, Proxy::Towpath, "it says that it is not in order");
    assert_eq!(proxy(&mut modes, READY, 37), Proxy::KubeProxy);
}

#[test]
fn a_restarted_agent_goes_on_with_what_it_had() {
    assert_eq!(proxy(&mut kept(Proxy::Towpath, Dns::Towpath), READY, 0), Proxy::Towpath);
    assert_eq!(proxy(&mut kept(Proxy::KubeProxy, Dns::Towpath), NOWHERE, 0), Proxy::KubeProxy);
    // What was fixed before says nothing of what `auto` would have found.
    assert_eq!(proxy(&mut kept(Proxy::Others, Dns::Others), READY, 0), Proxy::KubeProxy);
    assert_eq!(proxy(&mut kept(Proxy::Others, Dns::Others), NOWHERE, 0), Proxy::Towpath);
    assert_eq!(dns(&mut kept(Proxy::Towpath, Dns::Others), BOTH_READY, 0), Dns::CoreDns);
    assert_eq!(dns(&mut kept(Proxy::Towpath, Dns::CoreDns), BOTH_READY, 0), Dns::CoreDns);
}

#[test]
fn core_dns_is_stood_in_for_at_once_and_gets_dns_back_when_it_has_settled() {
    let mut modes = auto();
    assert_eq!(dns(&mut modes, BOTH_READY, 0), Dns::CoreDns);
    assert_eq!(dns(&mut modes, NONE_READY, 1), Dns::StandIn);
    assert_eq!(dns(&mut modes, BOTH_READY, 5), Dns::StandIn);
    assert_eq!(modes.next_deadline(), Some(at(15)));
    assert_eq!(dns(&mut modes, BOTH_READY, 15), Dns::CoreDns);
    // Deleted for good.
    assert_eq!(dns(&mut modes, NO_DNS, 20), Dns::StandIn);
    assert_eq!(modes.next_deadline(), Some(at(50)));
    assert_eq!(dns(&mut modes, NO_DNS, 50), Dns::Towpath);
    // And back.
    assert_eq!(dns(&mut modes, NONE_READY, 60), Dns::StandIn);
    assert_eq!(dns(&mut modes, BOTH_READY, 70), Dns::StandIn);
    assert_eq!(dns(&mut modes, BOTH_READY, 80), Dns::CoreDns);
}

#[test]
fn a_cluster_without_core_dns_is_answered_at_once() {
    assert_eq!(dns(&mut auto(), NO_DNS, 0), Dns::Towpath);
}

fn service(name: &str, ip: &str) -> Service {
    let object = json!({"metadata": {"namespace": "kube-system", "name": name},
                        "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 53, "protocol": "UDP"}]}});
    Service::try_from(&serde_json::from_value::<core::Service>(object).unwrap()).unwrap()
}

#[test]
fn dns_is_answered_at_the_services_addresses_and_never_at_anothers() {
    let mut world = World::default();
    let configured: Vec<IpAddr> = vec!["10.96.0.10".parse().unwrap()];
    assert_eq!(dns_addresses(&world, &[]), (Vec::new(), Vec::new()));
    assert_eq!(dns_addresses(&world, &configured).0, configured);
    let theirs = service("metrics", "10.96.0.10");
    world.services.insert(theirs.name.clone(), theirs.clone());
    assert_eq!(dns_addresses(&world, &configured), (Vec::new(), vec![(configured[0], theirs.name)]));
    let own = service("kube-dns", "10.96.0.11");
    world.services.insert(own.name.clone(), own);
    assert_eq!(dns_addresses(&world, &[]).0, ["10.96.0.11".parse::<IpAddr>().unwrap()]);
}

#[test]
fn towpaths_own_servers_behind_the_service_are_not_core_dns() {
    let object = json!({
        "metadata": {"namespace": "kube-system", "name": "kube-dns-x", "labels": {"kubernetes.io/service-name": "kube-dns"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.244.1.5"], "conditions": {"ready": true}},
                      {"addresses": ["10.244.2.5"], "conditions": {"ready": false}},
                      {"addresses": ["169.254.116.10"]}],
        "ports": [],
    });
    let slice = EndpointSlice::try_from(&serde_json::from_value::<discovery::EndpointSlice>(object).unwrap()).unwrap();
    let world = World { slices: [(slice.name.clone(), slice)].into(), ..World::default() };
    let own = ["169.254.116.10".parse().unwrap()];
    assert_eq!(core_dns(&world, &own), CoreDns { endpoints: 2, ready: 1 });
}

#[test]
fn who_is_in_charge_is_read_as_it_is_said_and_words_of_another_version_say_nothing() {
    let status = |proxy: Option<&str>, dns: Option<&str>| NodeNetworkStatus {
        service_proxy: proxy.map(str::to_owned),
        dns: dns.map(str::to_owned),
        ..NodeNetworkStatus::default()
    };
    for proxy in [Proxy::Towpath, Proxy::KubeProxy, Proxy::Others] {
        for dns in [Dns::Towpath, Dns::CoreDns, Dns::StandIn, Dns::Others] {
            let said = InCharge::said(&status(Some(proxy.name()), Some(dns.name())));
            assert_eq!(said, Some(InCharge { proxy, dns }));
        }
    }
    for (proxy, dns) in [(None, None), (Some("towpath"), None), (Some("pigeon"), Some("coredns"))] {
        assert_eq!(InCharge::said(&status(proxy, dns)), None);
    }
}
