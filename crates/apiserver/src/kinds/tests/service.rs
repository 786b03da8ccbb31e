use serde_json::{Value, json};

use super::{LABEL, PORT, made, refused, refused_update};

fn service(spec: Value) -> Value {
    let mut spec = spec;
    spec.as_object_mut().unwrap().entry("ports").or_insert(json!([{"port": 80}]));
    json!({"spec": spec})
}

#[test]
fn a_service_gets_the_defaults() {
    let made = made("Service", service(json!({"type": "NodePort", "selector": {"app": "web"}})));
    let spec = &made["spec"];
    assert_eq!(spec["sessionAffinity"], "None");
    assert_eq!(spec["internalTrafficPolicy"], "Cluster");
    assert_eq!(spec["externalTrafficPolicy"], "Cluster");
    assert_eq!(spec["ports"], json!([{"port": 80, "protocol": "TCP", "targetPort": 80}]));
    assert_eq!(made["status"], json!({"loadBalancer": {}}));
    let sticky = super::made("Service", service(json!({"sessionAffinity": "ClientIP"})));
    assert_eq!(sticky["spec"]["sessionAffinityConfig"], json!({"clientIP": {"timeoutSeconds": 10800}}));
    assert_eq!(sticky["spec"].get("externalTrafficPolicy"), None);
}

#[test]
fn services_are_refused_in_the_words_of_kubernetes() {
    let cases: Vec<(Value, Vec<String>)> = vec![
        (service(json!({})), vec![]),
        (json!({"spec": {}}), vec!["spec.ports: Required value".into()]),
        (json!({"spec": {"clusterIP": "None"}}), vec![]),
        (service(json!({"ports": [{"port": 0}]})), vec![
            format!("spec.ports[0].port: Invalid value: 0: {PORT}"),
            format!("spec.ports[0].targetPort: Invalid value: 0: {PORT}"),
        ]),
        (
            service(json!({"ports": [{"port": 80}, {"port": 81}]})),
            vec!["spec.ports[0].name: Required value".into(), "spec.ports[1].name: Required value".into()],
        ),
        (
            service(json!({"ports": [{"port": 80, "name": "a"}, {"port": 80, "name": "b"}]})),
            vec!["spec.ports[1]: Duplicate value: {\"Name\":\"\",\"Protocol\":\"TCP\",\"AppProtocol\":null,\"Port\":80,\"TargetPort\":0,\"NodePort\":0}".into()],
        ),
        (
            service(json!({"ports": [{"port": 80, "name": "a"}, {"port": 81, "name": "a"}]})),
            vec!["spec.ports[1].name: Duplicate value: \"a\"".into()],
        ),
        (
            service(json!({"ports": [{"port": 80, "nodePort": 30000}]})),
            vec!["spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'".into()],
        ),
        (
            service(json!({"type": "Magic"})),
            vec!["spec.type: Unsupported value: \"Magic\": supported values: \"ClusterIP\", \"ExternalName\", \"LoadBalancer\", \"NodePort\"".into()],
        ),
        (
            service(json!({"type": "NodePort", "clusterIP": "None"})),
            vec!["spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for NodePort services".into()],
        ),
        (json!({"spec": {"type": "ExternalName"}}), vec!["spec.externalName: Required value".into()]),
        (json!({"spec": {"type": "ExternalName", "externalName": "example.com"}}), vec![]),
        (
            service(json!({"externalIPs": ["127.0.0.1"]})),
            vec!["spec.externalIPs[0]: Invalid value: \"127.0.0.1\": may not be in the loopback range (127.0.0.0/8, ::1/128)".into()],
        ),
        (
            service(json!({"externalIPs": ["10.0.0.256"]})),
            vec!["spec.externalIPs[0]: Invalid value: \"10.0.0.256\": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".into()],
        ),
        (
            service(json!({"clusterIP": "10.096.0.1"})),
            vec!["spec.clusterIPs[0]: Invalid value: \"10.096.0.1\": must not have leading 0s".into()],
        ),
        (
            service(json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}})),
            vec!["spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 0: must be greater than 0 and less than 86400".into()],
        ),
        (
            service(json!({"externalTrafficPolicy": "Local"})),
            vec!["spec.externalTrafficPolicy: Invalid value: \"Local\": may only be set for externally-accessible services".into()],
        ),
        (
            service(json!({"loadBalancerSourceRanges": ["10.0.0.1/8"]})),
            vec![
                "spec.LoadBalancerSourceRanges: Forbidden: may only be used when `type` is 'LoadBalancer'".into(),
                "spec.LoadBalancerSourceRanges[0]: Invalid value: \"10.0.0.1/8\": must not have bits set beyond the prefix length".into(),
            ],
        ),
        (
            service(json!({"ports": [{"port": 80, "targetPort": "not_a_name"}]})),
            vec!["spec.ports[0].targetPort: Invalid value: \"not_a_name\": must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".into()],
        ),
    ];
    for (object, expected) in cases {
        assert_eq!(refused("Service", object.clone()), expected, "{object}");
    }
}

#[test]
fn a_name_may_begin_with_a_digit_but_not_hold_dots() {
    let named = |name: &str| json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}});
    assert_eq!(refused("Service", named("1web")), Vec::<String>::new());
    assert_eq!(
        refused("Service", named("we.b")),
        vec!["metadata.name: Invalid value: \"we.b\": must not contain dots"]
    );
    assert_eq!(refused("Service", named("web-")), vec![format!("metadata.name: Invalid value: \"web-\": {LABEL}")]);
}

fn running() -> Value {
    service(json!({"clusterIP": "10.96.0.7", "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"}))
}

#[test]
fn the_cluster_address_never_changes() {
    let refusal = refused_update("Service", running(), |service| {
        service["spec"]["clusterIP"] = json!("10.96.0.8");
        service["spec"]["clusterIPs"] = json!(["10.96.0.8"]);
    });
    assert_eq!(refusal, vec!["spec.clusterIPs[0]: Invalid value: [\"10.96.0.8\"]: may not change once set"]);
}

#[test]
fn an_update_that_leaves_the_address_out_keeps_it() {
    let old = made("Service", running());
    let mut new = json!({"metadata": old["metadata"], "spec": {"ports": [{"port": 81}]}});
    super::strategy("Service").prepare_update(&mut new, &old);
    assert_eq!(new["spec"]["clusterIP"], "10.96.0.7");
    assert_eq!(new["spec"]["clusterIPs"], json!(["10.96.0.7"]));
    assert_eq!(new["spec"]["ipFamilies"], json!(["IPv4"]));
    assert_eq!(new["spec"]["ports"][0]["port"], 81);
}

#[test]
fn node_ports_stay_by_name_and_go_with_the_type() {
    let old = made(
        "Service",
        service(json!({
            "type": "NodePort", "clusterIP": "10.96.0.7", "ports": [{"port": 80, "name": "http", "nodePort": 30080}],
        })),
    );
    let strategy = super::strategy("Service");
    let mut kept =
        json!({"metadata": old["metadata"], "spec": {"type": "NodePort", "ports": [{"port": 8080, "name": "http"}]}});
    strategy.prepare_update(&mut kept, &old);
    assert_eq!(kept["spec"]["ports"][0]["nodePort"], 30080);
    let mut inner = old.clone();
    inner["spec"]["type"] = json!("ClusterIP");
    strategy.prepare_update(&mut inner, &old);
    assert_eq!(inner["spec"]["ports"][0].get("nodePort"), None);
    assert_eq!(inner["spec"].get("externalTrafficPolicy"), None);
    let mut outer = old.clone();
    outer["spec"]["type"] = json!("ExternalName");
    outer["spec"]["externalName"] = json!("example.com");
    strategy.prepare_update(&mut outer, &old);
    assert_eq!(outer["spec"].get("clusterIP"), None);
    assert_eq!(outer["spec"].get("clusterIPs"), None);
}

#[test]
fn endpoints_never_point_at_the_node_itself() {
    let endpoints = |ip: &str| json!({"subsets": [{"addresses": [{"ip": ip}], "ports": [{"port": 80}]}]});
    assert_eq!(refused("Endpoints", endpoints("10.1.2.3")), Vec::<String>::new());
    for (ip, words) in [
        ("127.0.0.1", "may not be in the loopback range (127.0.0.0/8, ::1/128)"),
        ("169.254.169.254", "may not be in the link-local range (169.254.0.0/16, fe80::/10)"),
        ("fe80::1", "may not be in the link-local range (169.254.0.0/16, fe80::/10)"),
        ("224.0.0.1", "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)"),
        ("0.0.0.0", "may not be unspecified (0.0.0.0)"),
    ] {
        assert_eq!(
            refused("Endpoints", endpoints(ip)),
            vec![format!("subsets[0].addresses[0].ip: Invalid value: \"{ip}\": {words}")]
        );
    }
    assert_eq!(
        refused("Endpoints", json!({"subsets": [{"ports": [{"port": 80}]}]})),
        vec!["subsets[0]: Required value: must specify `addresses` or `notReadyAddresses`"]
    );
}

#[test]
fn endpoint_slices_are_checked_by_their_address_type() {
    let slice = |kind: &str, address: &str| json!({"addressType": kind, "endpoints": [{"addresses": [address]}], "ports": [{"port": 80}]});
    assert_eq!(refused("EndpointSlice", slice("IPv4", "10.1.2.3")), Vec::<String>::new());
    assert_eq!(
        refused("EndpointSlice", slice("IPv4", "2001:db8::1")),
        vec!["endpoints[0].addresses[0]: Invalid value: \"2001:db8::1\": must be a valid IPv4 address"]
    );
    assert_eq!(
        refused("EndpointSlice", slice("IPv4", "127.0.0.1")),
        vec![
            "endpoints[0].addresses[0]: Invalid value: \"127.0.0.1\": may not be in the loopback range (127.0.0.0/8, ::1/128)"
        ]
    );
    assert_eq!(
        refused("EndpointSlice", slice("IP", "10.1.2.3")),
        vec!["addressType: Unsupported value: \"IP\": supported values: \"FQDN\", \"IPv4\", \"IPv6\""]
    );
    assert_eq!(
        refused("EndpointSlice", json!({"addressType": "IPv4", "endpoints": [{"addresses": []}]})),
        vec!["endpoints[0].addresses: Required value: must contain at least 1 address"]
    );
    let changed = refused_update("EndpointSlice", slice("IPv4", "10.1.2.3"), |slice| {
        slice["addressType"] = json!("IPv6");
        slice["endpoints"] = json!([{"addresses": ["2001:db8::1"]}]);
    });
    assert_eq!(changed, vec!["addressType: Invalid value: \"IPv6\": field is immutable"]);
}

fn policy(spec: Value) -> Value {
    json!({"spec": spec})
}

#[test]
fn policy_types_default_by_what_is_there() {
    for (spec, types) in [
        (json!({"podSelector": {}}), json!(["Ingress"])),
        (json!({"podSelector": {}, "egress": [{}]}), json!(["Ingress", "Egress"])),
        (json!({"podSelector": {}, "policyTypes": ["Egress"]}), json!(["Egress"])),
    ] {
        assert_eq!(made("NetworkPolicy", policy(spec))["spec"]["policyTypes"], types);
    }
    assert_eq!(made("NetworkPolicy", json!({}))["spec"], json!({"podSelector": {}, "policyTypes": ["Ingress"]}));
    let ports = made("NetworkPolicy", policy(json!({"podSelector": {}, "ingress": [{"ports": [{"port": 80}]}]})));
    assert_eq!(ports["spec"]["ingress"][0]["ports"], json!([{"port": 80, "protocol": "TCP"}]));
}

#[test]
fn policies_are_refused_in_the_words_of_kubernetes() {
    let from = |peer: Value| policy(json!({"podSelector": {}, "ingress": [{"from": [peer]}]}));
    let port = |port: Value| policy(json!({"podSelector": {}, "ingress": [{"ports": [port]}]}));
    let cases: Vec<(Value, Vec<String>)> = vec![
        (from(json!({"podSelector": {}, "namespaceSelector": {}})), vec![]),
        (from(json!({})), vec!["spec.ingress[0].from[0]: Required value: must specify a peer".into()]),
        (
            from(json!({"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}})),
            vec!["spec.ingress[0].from[0]: Forbidden: may not specify both ipBlock and another peer".into()],
        ),
        (
            from(json!({"ipBlock": {"cidr": "10.0.0.0/33"}})),
            vec!["spec.ingress[0].from[0].ipBlock.cidr: Invalid value: \"10.0.0.0/33\": must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)".into()],
        ),
        (
            from(json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}})),
            vec!["spec.ingress[0].from[0].ipBlock.except[0]: Invalid value: \"11.0.0.0/16\": must be a strict subset of `cidr`".into()],
        ),
        (
            from(json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}})),
            vec!["spec.ingress[0].from[0].ipBlock.except[0]: Invalid value: \"10.0.0.0/8\": must be a strict subset of `cidr`".into()],
        ),
        (
            from(json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}})),
            vec!["spec.ingress[0].from[0].podSelector.matchExpressions[0].values: Required value: must be specified when `operator` is 'In' or 'NotIn'".into()],
        ),
        (
            port(json!({"protocol": "ICMP"})),
            vec!["spec.ingress[0].ports[0].protocol: Unsupported value: \"ICMP\": supported values: \"TCP\", \"UDP\", \"SCTP\"".into()],
        ),
        (
            port(json!({"port": 80, "endPort": 79})),
            vec!["spec.ingress[0].ports[0].endPort: Invalid value: 79: must be greater than or equal to `port`".into()],
        ),
        (
            port(json!({"port": "http", "endPort": 90})),
            vec!["spec.ingress[0].ports[0].endPort: Invalid value: 90: may not be specified when `port` is non-numeric".into()],
        ),
        (
            port(json!({"endPort": 90})),
            vec!["spec.ingress[0].ports[0].endPort: Invalid value: 90: may not be specified when `port` is not specified".into()],
        ),
        (
            policy(json!({"podSelector": {}, "policyTypes": ["Sideways"]})),
            vec!["spec.policyTypes[0]: Unsupported value: \"Sideways\": supported values: \"Ingress\", \"Egress\"".into()],
        ),
    ];
    for (object, expected) in cases {
        assert_eq!(refused("NetworkPolicy", object.clone()), expected, "{object}");
    }
}

/// As Go decodes them: a null in a list is an item whose fields are all empty. (An agent reads what is stored.)
#[test]
fn a_null_in_a_list_is_an_empty_item() {
    let mut object =
        policy(json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": [null]}]},
        "ingress": [{"ports": [null], "from": [null]}, null]}));
    super::strategy("NetworkPolicy").prune_unknown_fields(&mut object);
    assert_eq!(object["spec"]["podSelector"]["matchExpressions"][0]["values"], json!([""]));
    assert_eq!(object["spec"]["ingress"], json!([{"ports": [{}], "from": [{}]}, {}]));
    assert_eq!(made("NetworkPolicy", object)["spec"]["ingress"][0]["ports"], json!([{"protocol": "TCP"}]));
}

#[test]
fn a_bad_block_that_was_there_before_is_not_refused_again() {
    let old = policy(json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.1/8"}}]}]}));
    let touched = refused_update("NetworkPolicy", old, |policy| policy["metadata"]["labels"] = json!({"a": "b"}));
    assert_eq!(touched, Vec::<String>::new());
}
