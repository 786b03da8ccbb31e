use serde_json::{Value, json};

use super::{made, strategy};
use crate::kinds::print::age;

const NOW: &str = "2026-01-02T00:00:00Z";

fn cells(kind: &str, object: &Value) -> Vec<String> {
    let strategy = strategy(kind);
    let row = strategy.row(object, NOW);
    assert_eq!(row.len(), strategy.columns().len(), "{kind}");
    row.into_iter().map(|cell| cell.as_str().map_or_else(|| cell.to_string(), str::to_owned)).collect()
}

#[test]
fn ages_read_as_in_kubectl() {
    for (since, shown) in [
        ("2026-01-01T23:59:55Z", "5s"),
        ("2026-01-01T23:58:01Z", "119s"),
        ("2026-01-01T23:57:57Z", "2m3s"),
        ("2026-01-01T23:56:00Z", "4m"),
        ("2026-01-01T23:15:00Z", "45m"),
        ("2026-01-01T19:30:00Z", "4h30m"),
        ("2026-01-01T10:00:00Z", "14h"),
        ("2025-12-29T20:00:00Z", "3d4h"),
        ("2025-11-01T00:00:00Z", "62d"),
        ("2023-01-01T00:00:00Z", "3y2d"),
        ("2010-01-01T00:00:00Z", "16y"),
        ("2026-01-02T00:00:01Z", "0s"),
        ("2026-01-02T00:01:00Z", "<invalid>"),
        ("", "<unknown>"),
    ] {
        assert_eq!(age(since, NOW), shown, "{since}");
    }
}

fn pod(status: Value) -> Value {
    json!({
        "metadata": {"name": "web", "creationTimestamp": "2026-01-01T23:59:00Z"},
        "spec": {"nodeName": "n1", "containers": [{"name": "a"}, {"name": "b"}]},
        "status": status,
    })
}

fn running(ready: bool) -> Value {
    json!({"name": "a", "ready": ready, "restartCount": 0, "state": {"running": {}}})
}

#[test]
fn pod_status_reads_as_in_kubectl() {
    let waiting = |reason: &str| json!({"name": "b", "ready": false, "restartCount": 0, "state": {"waiting": {"reason": reason}}});
    let ended = |state: Value| json!({"name": "b", "ready": false, "restartCount": 0, "state": {"terminated": state}});
    let cases = [
        (json!({"phase": "Pending"}), "0/2", "Pending"),
        (json!({"phase": "Running", "containerStatuses": [running(true), running(true)]}), "2/2", "Running"),
        (json!({"phase": "Running", "containerStatuses": [running(true), running(false)]}), "1/2", "Running"),
        (
            json!({"phase": "Pending", "containerStatuses": [running(true), waiting("ErrImagePull")]}),
            "1/2",
            "ErrImagePull",
        ),
        (
            json!({"phase": "Running", "containerStatuses": [running(true), waiting("CrashLoopBackOff")]}),
            "1/2",
            "CrashLoopBackOff",
        ),
        (
            json!({"phase": "Pending", "containerStatuses": [waiting("ContainerCreating"), waiting("ContainerCreating")]}),
            "0/2",
            "ContainerCreating",
        ),
        (
            json!({"phase": "Succeeded", "containerStatuses": [ended(json!({"exitCode": 0, "reason": "Completed"}))]}),
            "0/2",
            "Completed",
        ),
        (
            json!({"phase": "Failed", "containerStatuses": [ended(json!({"exitCode": 1, "reason": "Error"}))]}),
            "0/2",
            "Error",
        ),
        (json!({"phase": "Failed", "containerStatuses": [ended(json!({"exitCode": 3}))]}), "0/2", "ExitCode:3"),
        (
            json!({"phase": "Failed", "containerStatuses": [ended(json!({"exitCode": 137, "signal": 9}))]}),
            "0/2",
            "Signal:9",
        ),
        (
            json!({"phase": "Running", "containerStatuses": [ended(json!({"exitCode": 0, "reason": "Completed"})), running(true)]}),
            "1/2",
            "NotReady",
        ),
        (json!({"phase": "Failed", "reason": "Evicted"}), "0/2", "Evicted"),
        (
            json!({"phase": "Pending", "initContainerStatuses": [waiting("CrashLoopBackOff")]}),
            "0/2",
            "Init:CrashLoopBackOff",
        ),
        (json!({"phase": "Pending", "initContainerStatuses": [running(false)]}), "0/2", "Init:0/0"),
    ];
    for (status, ready, state) in cases {
        let cells = cells("Pod", &pod(status.clone()));
        assert_eq!((cells[1].as_str(), cells[2].as_str()), (ready, state), "{status}");
        assert_eq!(cells[4], "60s");
    }
    let mut going = pod(json!({"phase": "Running", "containerStatuses": [running(true), running(true)]}));
    going["metadata"]["deletionTimestamp"] = json!(NOW);
    assert_eq!(cells("Pod", &going)[2], "Terminating");
}

#[test]
fn restarts_say_when() {
    let status = json!({"phase": "Running", "podIPs": [{"ip": "10.1.2.3"}], "containerStatuses": [{
        "name": "a", "ready": true, "restartCount": 2, "state": {"running": {}},
        "lastState": {"terminated": {"finishedAt": "2026-01-01T23:59:57Z"}},
    }]});
    let cells = cells("Pod", &pod(status));
    assert_eq!(cells, ["web", "1/2", "Running", "2 (3s ago)", "60s", "10.1.2.3", "n1", "<none>", "<none>"]);
}

#[test]
fn services_show_addresses_and_ports() {
    let service = |spec: Value, status: Value| json!({"metadata": {"name": "a"}, "spec": spec, "status": status});
    let ports = json!([{"port": 80, "protocol": "TCP", "nodePort": 30080}, {"port": 53, "protocol": "UDP"}]);
    let cells = |spec: Value, status: Value| cells("Service", &service(spec, status))[1..5].join(" ");
    assert_eq!(
        cells(json!({"type": "NodePort", "clusterIPs": ["10.96.0.1"], "ports": ports}), json!({})),
        "NodePort 10.96.0.1 <none> 80:30080/TCP,53/UDP"
    );
    assert_eq!(cells(json!({"type": "ClusterIP", "clusterIPs": ["None"]}), json!({})), "ClusterIP None <none> <none>");
    assert_eq!(
        cells(json!({"type": "LoadBalancer", "clusterIPs": ["10.96.0.2"]}), json!({})),
        "LoadBalancer 10.96.0.2 <pending> <none>"
    );
    assert_eq!(
        cells(
            json!({"type": "LoadBalancer", "clusterIPs": ["10.96.0.2"], "externalIPs": ["1.2.3.4"]}),
            json!({"loadBalancer": {"ingress": [{"ip": "5.6.7.8"}]}})
        ),
        "LoadBalancer 10.96.0.2 5.6.7.8,1.2.3.4 <none>"
    );
    assert_eq!(
        cells(json!({"type": "ExternalName", "externalName": "example.com"}), json!({})),
        "ExternalName <none> example.com <none>"
    );
}

#[test]
fn other_rows_read_as_in_kubectl() {
    let slice = json!({"metadata": {"name": "a"}, "addressType": "IPv4", "ports": [{"port": 80}], "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}, {"addresses": ["10.0.0.3"]}, {"addresses": ["10.0.0.4"]}]});
    assert_eq!(cells("EndpointSlice", &slice)[1..4], ["IPv4", "80", "10.0.0.1,10.0.0.2,10.0.0.3 + 1 more..."]);
    let empty = json!({"metadata": {"name": "a"}, "addressType": "IPv4"});
    assert_eq!(cells("EndpointSlice", &empty)[1..4], ["IPv4", "<unset>", "<unset>"]);
    assert_eq!(cells("Endpoints", &json!({"metadata": {"name": "a"}}))[1], "<none>");
    let policy = json!({"metadata": {"name": "a"}, "spec": {"podSelector": {"matchLabels": {"aa": "aa1"}, "matchExpressions": [{"key": "b", "operator": "In", "values": ["y", "x"]}]}}});
    assert_eq!(cells("NetworkPolicy", &policy)[1], "aa=aa1,b in (x,y)");
    let all = json!({"metadata": {"name": "a"}, "spec": {"podSelector": {}}});
    assert_eq!(cells("NetworkPolicy", &all)[1], "<none>");
    let node = json!({"metadata": {"name": "n1", "labels": {"node-role.kubernetes.io/control-plane": ""}}, "spec": {"unschedulable": true},
        "status": {"conditions": [{"type": "Ready", "status": "True"}], "addresses": [{"type": "InternalIP", "address": "192.168.1.1"}], "nodeInfo": {"kubeletVersion": "v1.36.0"}}});
    assert_eq!(
        cells("Node", &node)[1..7],
        ["Ready,SchedulingDisabled", "control-plane", "<unknown>", "v1.36.0", "192.168.1.1", "<none>"]
    );
    let deployment = made(
        "Deployment",
        json!({"spec": {"replicas": 3, "selector": {"matchLabels": {"a": "b"}}, "template": {"spec": {"containers": [{"name": "c", "image": "i"}, {"name": "d", "image": "j"}]}}}}),
    );
    assert_eq!(cells("Deployment", &deployment), ["thing", "0/3", "0", "0", "<unknown>", "c,d", "i,j", "a=b"]);
    let event = json!({"metadata": {"name": "e"}, "involvedObject": {"kind": "Pod", "name": "web"}, "type": "Warning", "reason": "BackOff", "message": "x\n", "count": 4,
        "firstTimestamp": "2026-01-01T23:50:00Z", "lastTimestamp": "2026-01-01T23:59:30Z", "source": {"component": "kubelet", "host": "n1"}});
    assert_eq!(
        cells("Event", &event),
        ["30s", "Warning", "BackOff", "pod/web", "", "kubelet, n1", "x", "10m", "4", "e"]
    );
}

#[test]
fn every_row_has_a_cell_for_every_column() {
    for resource in crate::kinds::builtin() {
        let row = resource.strategy.row(&json!({"metadata": {"name": "a"}}), NOW);
        assert_eq!(row.len(), resource.strategy.columns().len(), "{}", resource.gvk.kind);
    }
}
