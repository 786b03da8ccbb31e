//! The plugin as a runtime executes it: environment and standard input in, standard output and exit code out, with a fake
//! agent behind a real socket and real network namespaces.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy knows only functions marked as tests to be tests; here all are"
)]

mod rig;

use std::time::Duration;

use rig::{Fake, Rig, netns, root};
use serde_json::{Value, json};
use towpath_wire::cni::{
    AddResult, Attachment, CniError, ErrorCode, Interface, IpConfig, Reply, Request, Route, Version,
};

fn added() -> Reply {
    Reply::Added {
        result: AddResult {
            interfaces: vec![
                Interface {
                    name: "tp0".into(),
                    mac: "02:74:70:00:00:01".into(),
                    mtu: Some(1450),
                    ..Interface::default()
                },
                Interface { name: "eth0".into(), sandbox: "/x".into(), mtu: Some(1450), ..Interface::default() },
            ],
            ips: vec![IpConfig {
                address: "10.244.1.2/32".parse().unwrap(),
                gateway: Some([10, 244, 1, 1].into()),
                interface: Some(1),
            }],
            routes: vec![Route::via("0.0.0.0/0".parse().unwrap(), [10, 244, 1, 1].into())],
            ..AddResult::default()
        },
    }
}

#[test]
fn add_hands_over_the_namespace_and_prints_the_result_in_every_version() {
    if !root("add_hands_over_the_namespace_and_prints_the_result_in_every_version") {
        return;
    }
    let namespace = netns();
    for version in Version::SUPPORTED {
        let rig = Rig::new();
        let fake = Fake::start(&rig, added());
        let out = rig.run("ADD", &[("CNI_NETNS", &namespace.path)], &rig.config(version, json!({})));
        assert_eq!(out.code, 0, "{out:?}");
        assert_eq!(out.json["cniVersion"], version.as_str());
        assert_eq!(out.json["ips"][0]["address"], "10.244.1.2/32");
        assert_eq!(out.json["ips"][0].get("version").is_some(), version < Version::V1_0_0);
        let seen = fake.seen();
        assert_eq!(seen.netns, Some(namespace.inode), "the very namespace arrives");
        let Request::Add(add) = seen.request else { panic!("{:?}", seen.request) };
        assert_eq!(add.attachment, Attachment::new("c0ffee", "eth0").unwrap());
        let pod = add.pod.unwrap();
        assert_eq!((pod.namespace.as_str(), pod.name.as_str(), pod.uid.as_str()), ("default", "web-0", "u-1"));
    }
}

#[test]
fn add_passes_on_what_earlier_plugins_made() {
    if !root("add_passes_on_what_earlier_plugins_made") {
        return;
    }
    let (rig, namespace) = (Rig::new(), netns());
    let _fake = Fake::start(&rig, added());
    let before = json!({ "cniVersion": "1.0.0", "interfaces": [{ "name": "lo", "sandbox": "/x" }],
        "ips": [{ "address": "127.0.0.1/8", "interface": 0 }], "dns": { "nameservers": ["9.9.9.9"] } });
    let config = rig.config(Version::V1_0_0, json!({ "prevResult": before }));
    let out = rig.run("ADD", &[("CNI_NETNS", &namespace.path)], &config);
    assert_eq!(out.json["interfaces"].as_array().map(Vec::len), Some(3), "{out:?}");
    assert_eq!(out.json["ips"][0], json!({ "address": "127.0.0.1/8", "interface": 0 }));
    assert_eq!(out.json["ips"][1]["interface"], 2);
    assert_eq!(out.json["dns"]["nameservers"][0], "9.9.9.9");
}

#[test]
fn errors_of_the_agent_are_printed_as_they_are() {
    if !root("errors_of_the_agent_are_printed_as_they_are") {
        return;
    }
    let (rig, namespace) = (Rig::new(), netns());
    let _fake = Fake::start(
        &rig,
        Reply::Failed { error: CniError::new(ErrorCode::Exhausted, "no free address").hint("scale") },
    );
    let out = rig.run("ADD", &[("CNI_NETNS", &namespace.path)], &rig.config(Version::V0_4_0, json!({})));
    assert_eq!(out.code, 1);
    assert_eq!(out.json, json!({ "cniVersion": "0.4.0", "code": 100, "msg": "no free address", "details": "scale" }));
}

#[test]
fn without_an_agent_add_is_to_be_tried_again_and_status_is_not_available() {
    if !root("without_an_agent_add_is_to_be_tried_again_and_status_is_not_available") {
        return;
    }
    let (rig, namespace) = (Rig::new(), netns());
    let out = rig.run("ADD", &[("CNI_NETNS", &namespace.path)], &rig.config(Version::V1_1_0, json!({})));
    assert_eq!((out.code, &out.json["code"]), (1, &json!(11)), "{out:?}");
    assert!(out.json["msg"].as_str().unwrap().contains("there is no Towpath agent on this node"), "{out:?}");
    drop(std::os::unix::net::UnixListener::bind(rig.socket()).unwrap());
    let out = rig.run("STATUS", &[], &rig.config(Version::V1_1_0, json!({})));
    assert_eq!((out.code, &out.json["code"]), (1, &json!(50)), "{out:?}");
    assert!(out.json["msg"].as_str().unwrap().contains("is not running"), "{out:?}");
}

fn status(rig: &Rig) -> rig::Out {
    rig.run("STATUS", &[], &rig.config(Version::V1_1_0, json!({})))
}

#[test]
fn status_is_well_between_one_agent_and_the_next_for_a_minute_and_then_says_how_long_there_is_none() {
    let (rig, starting) = (Rig::new(), Rig::new());
    let not_ready = CniError::new(ErrorCode::NotAvailable, "the Towpath agent is not ready: waiting");
    let _fake = Fake::start(&starting, Reply::Failed { error: not_ready });
    for rig in [&rig, &starting] {
        assert_eq!(status(rig).json["code"], 50, "no agent was ever ready here");
        rig.was_ready(Duration::from_secs(20));
        let out = status(rig);
        assert_eq!((out.code, out.text.as_str()), (0, ""), "{out:?}");
        rig.was_ready(Duration::from_secs(75));
        let out = status(rig);
        assert_eq!((out.code, &out.json["code"]), (1, &json!(50)), "{out:?}");
        assert!(out.json["msg"].as_str().unwrap().contains("it was last ready 75 s ago"), "{out:?}");
    }
}

#[test]
fn an_agent_that_hangs_is_no_agent_that_comes_back() {
    let rig = Rig::new();
    rig.was_ready(Duration::ZERO);
    // It takes what comes, and says nothing.
    let _hangs = std::os::unix::net::UnixListener::bind(rig.socket()).unwrap();
    let out = status(&rig);
    assert_eq!((out.code, &out.json["code"]), (1, &json!(50)), "{out:?}");
    assert!(out.json["msg"].as_str().unwrap().contains("did not answer in time"), "{out:?}");
}

#[test]
fn del_without_an_agent_is_queued_and_succeeds() {
    let rig = Rig::new();
    let config = rig.config(Version::V1_0_0, json!({ "prevResult": { "ips": "nonsense" } }));
    for _ in 0..2 {
        let out = rig.run("DEL", &[], &config);
        assert_eq!((out.code, out.text.as_str()), (0, ""), "{out:?}");
    }
    let queued: Vec<String> =
        std::fs::read_dir(rig.deletes()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(queued, ["c0ffee@eth0.del"]);
}

#[test]
fn del_that_the_agent_refuses_or_never_answers_is_queued_too() {
    for reply in [Some(Reply::Failed { error: CniError::new(ErrorCode::Plumbing, "busy") }), None] {
        let rig = Rig::new();
        let _fake = Fake::start_with(&rig, reply);
        let out = rig.run("DEL", &[], &rig.config(Version::V1_0_0, json!({})));
        assert_eq!(out.code, 0, "{out:?}");
        assert!(rig.deletes().join("c0ffee@eth0.del").exists());
    }
}

#[test]
fn del_that_the_agent_does_is_not_queued() {
    let rig = Rig::new();
    let fake = Fake::start(&rig, Reply::Done);
    let out = rig.run("DEL", &[("CNI_NETNS", "/does/not/exist")], &rig.config(Version::V1_0_0, json!({})));
    assert_eq!(out.code, 0, "a namespace that is gone is no reason to fail: {out:?}");
    assert!(matches!(fake.seen().request, Request::Del(del) if del.network == "towpath"));
    assert!(!rig.deletes().exists());
}

#[test]
fn check_and_gc_send_what_the_runtime_says() {
    if !root("check_and_gc_send_what_the_runtime_says") {
        return;
    }
    let (rig, namespace) = (Rig::new(), netns());
    let fake = Fake::start(&rig, Reply::Done);
    let prev = json!({ "cniVersion": "0.4.0", "ips": [{ "version": "4", "address": "10.244.1.2/32" }] });
    let out = rig.run(
        "CHECK",
        &[("CNI_NETNS", &namespace.path)],
        &rig.config(Version::V0_4_0, json!({ "prevResult": prev })),
    );
    assert_eq!((out.code, out.text.as_str()), (0, ""), "{out:?}");
    let seen = fake.seen();
    assert_eq!(seen.netns, Some(namespace.inode));
    assert!(matches!(seen.request, Request::Check(check) if check.prev_result.ips.len() == 1));

    let valid = json!({ "cni.dev/valid-attachments": [{ "containerID": "abc", "ifname": "eth0" }] });
    let out = rig.run("GC", &[], &rig.config(Version::V1_1_0, valid));
    assert_eq!((out.code, out.text.as_str()), (0, ""), "{out:?}");
    let Request::Gc { valid, .. } = fake.seen().request else { panic!("not GC") };
    assert_eq!(valid, [Attachment::new("abc", "eth0").unwrap()]);
}

#[test]
fn version_is_answered_without_a_configuration() {
    let rig = Rig::new();
    let out = rig.run("VERSION", &[], "");
    assert_eq!(out.code, 0);
    assert_eq!(out.json, json!({ "cniVersion": "1.1.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] }));
}

#[test]
fn bad_calls_have_the_specifications_codes_and_ask_nobody() {
    let rig = Rig::new();
    let good = rig.config(Version::V1_1_0, json!({}));
    let netns = ("CNI_NETNS", "/proc/self/ns/net");
    /// Verb, variables, configuration, code, and what the message says.
    type Case<'a> = (&'a str, Vec<(&'a str, &'a str)>, String, u64, &'a str);
    let cases: Vec<Case<'_>> = vec![
        ("", vec![], good.clone(), 4, "CNI_COMMAND is not set"),
        ("FROB", vec![], good.clone(), 4, "CNI_COMMAND \"FROB\" is none of"),
        ("ADD", vec![], good.clone(), 4, "CNI_NETNS is not set"),
        ("ADD", vec![netns, ("CNI_CONTAINERID", "")], good.clone(), 4, "CNI_CONTAINERID is not set"),
        ("ADD", vec![netns, ("CNI_CONTAINERID", "../x")], good.clone(), 4, "container id \"../x\""),
        ("ADD", vec![netns, ("CNI_IFNAME", "a/b")], good.clone(), 4, "interface name \"a/b\""),
        ("ADD", vec![netns, ("CNI_ARGS", "K8S_POD_NAME")], good.clone(), 4, "is not KEY=VALUE"),
        ("ADD", vec![netns, ("CNI_ARGS", "K8S_POD_NAME=x")], good.clone(), 4, "without K8S_POD_NAMESPACE"),
        ("ADD", vec![netns], good.clone(), 4, "the network namespace of the plugin itself"),
        ("ADD", vec![("CNI_NETNS", "/etc/hostname")], good.clone(), 4, "not a network namespace"),
        ("ADD", vec![("CNI_NETNS", "/does/not/exist")], good.clone(), 3, "does not exist"),
        ("ADD", vec![netns], "{".to_owned(), 6, "network configuration"),
        ("DEL", vec![], String::new(), 6, "is empty"),
        ("DEL", vec![("CNI_IFNAME", "")], good.clone(), 4, "CNI_IFNAME is not set"),
        (
            "ADD",
            vec![netns],
            rig.config(Version::V1_1_0, json!({ "cniVersion": "2.0.0" })),
            1,
            "\"2.0.0\" is not supported",
        ),
        ("CHECK", vec![netns], rig.config(Version::V0_3_1, json!({})), 1, "has no CHECK"),
        ("CHECK", vec![netns], good.clone(), 7, "prevResult is missing"),
        ("GC", vec![], rig.config(Version::V1_0_0, json!({})), 1, "has no GC"),
        ("GC", vec![], good.clone(), 7, "valid-attachments is missing"),
        ("STATUS", vec![], rig.config(Version::V1_0_0, json!({})), 1, "has no STATUS"),
    ];
    for (verb, environment, config, code, says) in cases {
        let out = rig.run(verb, &environment, &config);
        assert_eq!((out.code, out.json["code"].as_u64()), (1, Some(code)), "{verb} {environment:?}: {out:?}");
        assert!(out.json["msg"].as_str().unwrap_or_default().contains(says), "{out:?} should say {says:?}");
        assert!(out.json["cniVersion"].is_string());
    }
    assert!(!rig.deletes().exists(), "a DEL that makes no sense is not queued");
}

/// As libcni does it: each plugin of the list gets the result of the one before as `prevResult`. The reference plugins run in
/// a network namespace of their own, so that nothing of this machine is touched.
#[test]
fn results_chain_with_the_reference_plugins() {
    const PLUGINS: &str = "/usr/lib/cni";
    if !root("results_chain_with_the_reference_plugins") || !rig::have(&format!("{PLUGINS}/loopback")) {
        return;
    }
    for version in Version::SUPPORTED {
        if version == Version::V1_1_0 && !rig::speaks(&format!("{PLUGINS}/loopback"), version) {
            continue;
        }
        let (rig, namespace) = (Rig::new(), netns());
        let _fake = Fake::start(&rig, added());
        let environment = [("CNI_NETNS", namespace.path.as_str())];
        let loopback = json!({ "cniVersion": version.as_str(), "name": "towpath", "type": "loopback" });
        let first = rig.run_other(&format!("{PLUGINS}/loopback"), "ADD", &environment, &loopback.to_string());
        assert_eq!(first.code, 0, "{first:?}");
        let ours = rig.run("ADD", &environment, &rig.config(version, json!({ "prevResult": first.json })));
        assert_eq!(ours.code, 0, "{version}: {ours:?}");
        assert!(
            ours.json["interfaces"].as_array().unwrap().iter().any(|i| i["name"] == "lo"),
            "lo is passed on: {ours:?}"
        );
        let mut result: Value = ours.json.clone();
        for plugin in ["portmap", "bandwidth", "tuning"] {
            let config =
                json!({ "cniVersion": version.as_str(), "name": "towpath", "type": plugin, "prevResult": result });
            let out = rig.run_other(&format!("{PLUGINS}/{plugin}"), "ADD", &environment, &config.to_string());
            assert_eq!(out.code, 0, "{plugin} at {version}: {out:?}");
            result = out.json;
        }
        let (theirs, own) =
            (AddResult::parse(&result, version).unwrap(), AddResult::parse(&ours.json, version).unwrap());
        assert_eq!(theirs, own, "what comes out at the end of the chain is what we made");
    }
}
