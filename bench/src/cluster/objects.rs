//! Services and EndpointSlices as an API server has them, with all that controllers and field managers leave in them, and pods.

use std::net::{IpAddr, Ipv4Addr};

use serde_json::{Value, json};

/// Kubernetes namespace of all that is measured.
pub(crate) const NAMESPACE: &str = "bench";
/// Port of every Service, and of its endpoints.
pub(crate) const PORT: u16 = crate::load::PORT;
/// The Service that is measured; the last one of a list.
pub(crate) const MEASURED: &str = "zz-measured";
/// Its address.
const MEASURED_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 77);
/// Before that of the first filler.
const ADDRESSES: u32 = 0x0a60_0100;

/// Name of the `index`th of many Services.
pub(crate) fn filler(index: usize) -> String {
    format!("filler-{index:05}")
}

/// Cluster address of a Service, by its name.
pub(crate) fn address(name: &str) -> Ipv4Addr {
    let index = name.strip_prefix("filler-").and_then(|number| number.parse::<u32>().ok());
    index.map_or(MEASURED_ADDRESS, |index| Ipv4Addr::from(ADDRESSES + index))
}

/// Endpoints of the `index`th Service, nobody's: 198.18.0.0/15 is for benchmarks (RFC 2544).
pub(crate) fn nobodys(index: usize, count: usize) -> Vec<IpAddr> {
    let number = |which: usize| u32::try_from(index * count + which).unwrap_or(0) % 0x1_fffe + 1;
    (0..count).map(|which| IpAddr::from(Ipv4Addr::from(0xc612_0000 + number(which)))).collect()
}

/// Like a random one, and the same for the same name.
pub(super) fn uid(of: &str) -> String {
    let hash =
        of.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{:08x}-{:04x}-4000-8000-{:012x}", hash >> 32, hash & 0xffff, hash & 0xffff_ffff_ffff)
}

pub(super) fn managed(manager: &str, fields: &Value) -> Value {
    json!([{
        "manager": manager, "operation": "Update", "apiVersion": "v1", "time": "2026-01-01T00:00:00Z",
        "fieldsType": "FieldsV1", "fieldsV1": fields,
    }])
}

/// A Service.
pub(crate) fn service(name: &str) -> Value {
    let address = address(name);
    let fields = json!({
        "f:spec": {"f:internalTrafficPolicy": {}, "f:ports": {".": {}, "k:{\"port\":80,\"protocol\":\"TCP\"}": {
            ".": {}, "f:name": {}, "f:port": {}, "f:protocol": {}, "f:targetPort": {}}},
            "f:selector": {}, "f:sessionAffinity": {}, "f:type": {}},
    });
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": name, "namespace": NAMESPACE, "uid": uid(name), "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": name}, "managedFields": managed("kubectl-create", &fields),
        },
        "spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster", "sessionAffinity": "None",
            "selector": {"app": name},
            "ports": [{"name": "p", "port": PORT, "targetPort": PORT, "protocol": "TCP"}],
        },
        "status": {"loadBalancer": {}},
    })
}

/// The one EndpointSlice of a Service.
pub(crate) fn slice(service: &str, endpoints: &[IpAddr]) -> Value {
    let endpoint = |(number, ip): (usize, &IpAddr)| {
        let pod = format!("{service}-{number}");
        json!({
            "addresses": [ip], "conditions": {"ready": true, "serving": true, "terminating": false}, "nodeName": "another",
            "targetRef": {"kind": "Pod", "namespace": NAMESPACE, "name": pod, "uid": uid(&pod)},
        })
    };
    let fields = json!({
        "f:addressType": {}, "f:endpoints": {}, "f:ports": {},
        "f:metadata": {"f:generateName": {}, "f:labels": {".": {}, "f:endpointslice.kubernetes.io/managed-by": {},
            "f:kubernetes.io/service-name": {}}, "f:ownerReferences": {}},
    });
    let endpoints: Vec<Value> = endpoints.iter().enumerate().map(endpoint).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-a"), "generateName": format!("{service}-"), "namespace": NAMESPACE,
            "uid": uid(&format!("{service}-a")), "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {
                "kubernetes.io/service-name": service,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
            "ownerReferences": [{
                "apiVersion": "v1", "kind": "Service", "name": service, "uid": uid(service),
                "controller": true, "blockOwnerDeletion": true,
            }],
            "managedFields": managed("kube-controller-manager", &fields),
        },
        "addressType": "IPv4", "endpoints": endpoints,
        "ports": [{"name": "p", "port": PORT, "protocol": "TCP"}],
    })
}

/// The node: it says already what an agent would say of it.
pub(super) fn node(name: &str, address: &str, range: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "uid": uid(name), "labels": {"kubernetes.io/hostname": name}},
        "spec": {"podCIDR": range, "podCIDRs": [range]},
        "status": {
            "addresses": [{"type": "InternalIP", "address": address}],
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
        },
    })
}

/// The namespace of everything.
pub(super) fn namespace() -> Value {
    let labels = json!({"kubernetes.io/metadata.name": NAMESPACE});
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "uid": uid(NAMESPACE), "labels": labels}})
}

/// A pod that a runtime is about to start.
pub(super) fn pod(name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "uid": uid(name), "labels": {"app": name}},
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "busybox"}]},
        "status": {"phase": "Pending"},
    })
}

/// `CNI_ARGS` of a pod.
pub(super) fn cni_args(name: &str) -> String {
    format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={name};K8S_POD_UID={}", uid(name))
}
