//! Versions, shapes, refusals.

use serde_json::{Value, json};

use super::*;

fn ours() -> AddResult {
    AddResult {
        interfaces: vec![
            Interface {
                name: "tp0123".into(),
                mac: "02:74:70:00:00:01".into(),
                mtu: Some(1450),
                ..Interface::default()
            },
            Interface { name: "eth0".into(), mtu: Some(1450), sandbox: "/run/netns/a".into(), ..Interface::default() },
        ],
        ips: vec![
            IpConfig {
                address: "10.244.1.2/32".parse().unwrap(),
                gateway: Some([10, 244, 1, 1].into()),
                interface: Some(1),
            },
            IpConfig {
                address: "fd00::2/128".parse().unwrap(),
                gateway: Some("fd00::1".parse().unwrap()),
                interface: Some(1),
            },
        ],
        routes: vec![Route { mtu: Some(1400), ..Route::via("0.0.0.0/0".parse().unwrap(), [10, 244, 1, 1].into()) }],
        dns: Dns::default(),
    }
}

fn config(extra: Value) -> Vec<u8> {
    let mut value = json!({ "cniVersion": "1.0.0", "name": "towpath", "type": "towpath-cni" });
    value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    serde_json::to_vec(&value).unwrap()
}

#[test]
fn each_version_has_its_shape() {
    insta::assert_json_snapshot!("result-0.4.0", ours().to_json(Version::V0_4_0));
    insta::assert_json_snapshot!("result-1.1.0", ours().to_json(Version::V1_1_0));
    let (old, new) = (ours().to_json(Version::V0_3_1), ours().to_json(Version::V1_0_0));
    assert_eq!((&old["ips"][0]["version"], &old["ips"][1]["version"]), (&json!("4"), &json!("6")));
    assert_eq!(new["ips"][0].get("version"), None);
    for older in [old, new] {
        assert_eq!(older["interfaces"][0].get("mtu"), None, "mtu came with 1.1.0");
        assert_eq!(older["routes"][0].get("mtu"), None);
    }
}

#[test]
fn a_result_is_read_back_in_every_version() {
    for version in Version::SUPPORTED {
        let read = AddResult::parse(&ours().to_json(version), version).unwrap();
        assert_eq!(read.to_json(version), ours().to_json(version), "{version}");
    }
    assert_eq!(AddResult::parse(&ours().to_json(Version::V1_1_0), Version::V1_1_0).unwrap(), ours());
}

#[test]
fn a_result_as_go_writes_it_is_read() {
    let go = json!({ "cniVersion": "0.4.0", "interfaces": null, "ips": [{ "version": "4", "address": "127.0.0.1/8" }],
        "routes": null, "dns": {}, "somethingNew": 1 });
    let result = AddResult::parse(&go, Version::V0_4_0).unwrap();
    assert_eq!((result.interfaces.len(), result.ips[0].address.to_string().as_str()), (0, "127.0.0.1/8"));
}

#[test]
fn appending_moves_the_interface_indices() {
    let mut before = AddResult {
        interfaces: vec![Interface { name: "lo".into(), ..Interface::default() }],
        ips: vec![IpConfig { address: "127.0.0.1/8".parse().unwrap(), gateway: None, interface: Some(0) }],
        dns: Dns { domain: "kept".into(), ..Dns::default() },
        ..AddResult::default()
    };
    before.append(ours());
    assert_eq!(before.ips.iter().map(|ip| ip.interface).collect::<Vec<_>>(), [Some(0), Some(2), Some(2)]);
    assert_eq!((before.interfaces.len(), before.dns.domain.as_str()), (3, "kept"));
}

#[test]
fn wrong_prev_results_are_refused() {
    for (prev, says) in [
        (json!({ "cniVersion": "0.4.0" }), "is of CNI version \"0.4.0\", the configuration of 1.0.0"),
        (json!({ "ips": [{ "address": "10.0.0.1" }] }), "is no address with a prefix length"),
        (json!({ "ips": [{ "address": "10.0.0.1/33" }] }), "is no address with a prefix length"),
        (json!({ "ips": [{ "address": "10.0.0.1/32", "interface": 0 }] }), "ips[0].interface is 0, with 0 interfaces"),
        (json!({ "ips": [{ "address": "10.0.0.1/32", "interface": -1 }] }), "prevResult"),
        (json!("text"), "prevResult"),
    ] {
        let error = NetworkConfig::parse(&config(json!({ "prevResult": prev }))).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidConfig);
        assert!(error.msg.contains(says), "{error}");
    }
}

#[test]
fn a_configuration_names_socket_and_state() {
    let plain = NetworkConfig::parse(&config(json!({}))).unwrap();
    assert_eq!(
        (plain.socket.to_str(), plain.state_dir.to_str()),
        (Some("/run/towpath/cni.sock"), Some("/var/lib/towpath"))
    );
    let dir = NetworkConfig::parse(&config(json!({ "runDir": "/r", "stateDir": "/s", "capabilities": {}, "x": [] })))
        .unwrap();
    assert_eq!((dir.socket.to_str(), dir.state_dir.to_str()), (Some("/r/cni.sock"), Some("/s")));
    let socket = NetworkConfig::parse(&config(json!({ "runDir": "/r", "socket": "/x.sock" }))).unwrap();
    assert_eq!(socket.socket.to_str(), Some("/x.sock"));
}

#[test]
fn limits_of_the_runtime_are_read_and_its_bursts_are_not() {
    let read = |runtime: Value| NetworkConfig::parse(&config(json!({ "runtimeConfig": runtime })));
    let all =
        json!({ "ingressRate": 8_000_000, "ingressBurst": 4_294_967_295_u64, "egressRate": 1_000, "egressBurst": 1 });
    let limits = read(json!({ "bandwidth": all, "portMappings": [] })).unwrap().bandwidth;
    assert_eq!(limits, Some(RuntimeBandwidth { ingress_rate: 8_000_000, egress_rate: 1_000 }));
    let one = read(json!({ "bandwidth": { "egressRate": 5_000 } })).unwrap().bandwidth;
    assert_eq!(one, Some(RuntimeBandwidth { ingress_rate: 0, egress_rate: 5_000 }));
    for none in [json!({}), json!({ "bandwidth": null }), json!({ "portMappings": [] })] {
        assert_eq!(read(none).unwrap().bandwidth, None);
    }
    for wrong in
        [json!("8M"), json!({ "ingressRate": "8M" }), json!({ "ingressRate": -1 }), json!({ "egressRate": 1.5 })]
    {
        let error = read(json!({ "bandwidth": wrong })).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidConfig, "{wrong}");
        assert!(error.to_string().contains("runtimeConfig.bandwidth"), "{error}");
    }
}

#[test]
fn wrong_configurations_are_refused_with_the_specifications_codes() {
    let cases: Vec<(Vec<u8>, u32, &str)> = vec![
        (b"".to_vec(), 6, "is empty"),
        (b"{\"cniVersion\": ".to_vec(), 6, "EOF"),
        (b"[1]".to_vec(), 6, "not a JSON object"),
        (b"{\"name\":\"x\"}".to_vec(), 1, "cniVersion is missing"),
        (config(json!({ "cniVersion": "0.2.0" })), 1, "\"0.2.0\" is not supported"),
        (config(json!({ "cniVersion": 1 })), 7, "cniVersion must be a string"),
        (config(json!({ "name": "" })), 7, "name \"\" must be"),
        (config(json!({ "name": "../x" })), 7, "name \"../x\" must be"),
        (config(json!({ "type": {} })), 7, "type must be a string"),
        (config(json!({ "socket": "relative" })), 7, "must be an absolute path"),
        (config(json!({ "stateDir": 7 })), 7, "stateDir must be a string"),
        (
            config(json!({ "cni.dev/valid-attachments": [{ "containerID": "../../etc", "ifname": "eth0" }] })),
            7,
            "container id",
        ),
        (config(json!({ "cni.dev/valid-attachments": "all" })), 7, "cni.dev/valid-attachments"),
    ];
    for (bytes, code, says) in cases {
        let error = NetworkConfig::parse(&bytes).unwrap_err();
        assert_eq!(u32::from(error.code), code, "{error}");
        assert!(error.msg.contains(says), "{error} should say {says:?}");
    }
}

#[test]
fn valid_attachments_are_read_by_either_name() {
    let list = json!([{ "containerID": "abc", "ifname": "eth0" }]);
    let expected = Some(vec![Attachment::new("abc", "eth0").unwrap()]);
    for name in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
        let parsed = NetworkConfig::parse(&config(json!({ name: list }))).unwrap();
        assert_eq!(parsed.valid_attachments, expected);
    }
    assert_eq!(NetworkConfig::parse(&config(json!({}))).unwrap().valid_attachments, None, "absent is not empty");
}

#[test]
fn container_ids_and_interface_names_cannot_leave_a_directory() {
    for (id, ifname) in [
        ("", "eth0"),
        ("..", "eth0"),
        ("a/b", "eth0"),
        ("a@b", "eth0"),
        ("a\0", "eth0"),
        ("é", "eth0"),
        ("a", ""),
        ("a", ".."),
        ("a", "x/y"),
        ("a", "a b"),
        ("a", "a:1"),
        ("a", "a\0"),
        ("a", "sixteen-bytes-xx"),
    ] {
        assert!(Attachment::new(id, ifname).is_err(), "{id:?} {ifname:?}");
    }
    assert!(Attachment::new(&"a".repeat(201), "eth0").is_err());
    let odd = Attachment::new("a-._Z9", "e@h0").unwrap();
    assert_eq!(Attachment::from_file_stem(&odd.file_stem()), Some(odd));
}

#[test]
fn messages_survive_a_newer_and_an_older_other_side() {
    let add = Request::Add(AddRequest {
        attachment: Attachment::new("abc", "eth0").unwrap(),
        network: "towpath".into(),
        netns: "/run/netns/a".into(),
        pod: Some(PodIdentity { namespace: "default".into(), name: "web".into(), uid: String::new() }),
        bandwidth: Some(RuntimeBandwidth { ingress_rate: 8_000_000, egress_rate: 0 }),
    });
    let mut value = serde_json::to_value(&add).unwrap();
    value["fromTheFuture"] = json!(true);
    assert_eq!(serde_json::from_value::<Request>(value).unwrap(), add);
    let hostile = json!({ "command": "del", "containerID": "../../../etc", "ifname": "eth0", "network": "n" });
    assert!(serde_json::from_value::<Request>(hostile).is_err());
}

#[test]
fn errors_are_printed_as_the_specification_says() {
    let error = CniError::new(ErrorCode::TryAgain, "not yet").hint("wait");
    assert_eq!(
        error.to_json(Version::V0_4_0),
        json!({ "cniVersion": "0.4.0", "code": 11, "msg": "not yet", "details": "wait" })
    );
    for code in 0..200u32 {
        assert_eq!(u32::from(ErrorCode::from(code)), code);
    }
}
