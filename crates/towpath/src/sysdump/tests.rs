//! Nothing secret gets into an archive, and what does get in can be read with tar.

use std::process::Command;

use serde_json::json;

use super::{Collection, archive, cluster, redact};

/// Each form in which a secret has been seen to turn up, with the part that must not.
const SECRETS: [(&str, &str); 14] = [
    ("token: k7Jq0planted", "planted"),
    ("--bootstrap-token=k7Jq0planted", "planted"),
    (r#"{"password":"hunter2planted"}"#, "planted"),
    ("DB_PASSWORD=hunter2planted rest", "planted"),
    ("Authorization: Bearer abc.planted-xyz", "planted"),
    ("authorization basic cGxhbnRlZDpwbGFudGVk", "cGxhbnRl"),
    ("got eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJwbGFudGVkIn0.c2lnbmVkplanted here", "planted"),
    ("https://admin:planted@registry.example/x", "planted"),
    ("-----BEGIN EC PRIVATE KEY-----\nplanted\n-----END EC PRIVATE KEY-----\n", "planted"),
    ("cut off: -----BEGIN PRIVATE KEY-----\nplanted\nplanted", "planted"),
    ("client-key-data: LS0tLS1CRUdJTiBwbGFudGVkplanted", "planted"),
    ("joined with abcdef.0123456789abcdef", "0123456789abcdef"),
    ("AKIAIOSFODNN7EXAMPLE", "EXAMPLE"),
    ("ghp_0123456789012345678901234567plantedXX", "planted"),
];

#[test]
fn no_form_of_a_secret_stays_in_a_text() {
    for (text, secret) in SECRETS {
        let said = redact::text(&format!("before {text} after"));
        assert!(!said.contains(secret), "{text:?} became {said:?}");
        assert!(said.starts_with("before "), "{said:?}");
    }
    let plain = "node n1 → 10.244.1.5:8080 drop.ingress_policy 3, see docs/install.md; keyed by (a, b)";
    assert_eq!(redact::text(plain), plain);
}

#[test]
fn objects_lose_environments_annotations_and_private_fields_and_keep_the_rest() {
    let mut pod = json!({
        "metadata": {
            "name": "web", "managedFields": [{"x": "planted"}],
            "annotations": {
                "kubectl.kubernetes.io/last-applied-configuration": "planted",
                "vault.example/x": "planted",
                "flannel.alpha.coreos.com/public-ip": "192.0.2.1",
            },
        },
        "spec": {"containers": [{
            "env": [{"name": "A", "value": "planted"}, {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}],
            "args": ["--token=planted", "--port=80"],
        }]},
        "webhooks": [{"clientConfig": {"caBundle": "planted"}}],
        "privateKey": "planted",
    });
    redact::value(&mut pod);
    let said = pod.to_string();
    assert!(!said.contains("planted"), "{said}");
    for kept in ["web", "192.0.2.1", "fieldPath", "--port=80", "\"A\""] {
        assert!(said.contains(kept), "{kept} is gone: {said}");
    }
    let mut secret = json!({"kind": "Secret", "data": {"x": "cGxhbnRlZA=="}});
    redact::value(&mut secret);
    assert!(!secret.to_string().contains("cGxhbnRlZA"));
}

#[test]
fn of_a_pod_only_what_concerns_the_network_is_taken() {
    let pod = json!({
        "metadata": {"name": "web", "annotations": {"a": "planted"}},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "x", "args": ["planted"], "ports": [{"containerPort": 80}]}]},
        "status": {"podIPs": [{"ip": "10.244.1.5"}]},
    });
    let said = cluster::network_part(&pod).to_string();
    assert!(!said.contains("planted"), "{said}");
    assert!(["n1", "10.244.1.5", "80"].iter().all(|kept| said.contains(kept)), "{said}");
}

#[test]
fn what_a_node_of_another_version_hands_over_is_redacted_again() {
    let mut all = Collection::default();
    let mut node = Collection::default();
    node.files.insert("a.json".to_owned(), r#"{"token":"planted","b":1}"#.to_owned());
    node.files.insert("b.txt".to_owned(), "token=planted".to_owned());
    node.missing.insert("c".to_owned(), "refused: password=planted".to_owned());
    all.below("nodes/n1", node);
    let said = serde_json::to_string(&all).unwrap();
    assert!(!said.contains("planted") && said.contains("nodes/n1/a.json") && said.contains("\\\"b\\\": 1"), "{said}");
}

#[test]
fn tar_reads_the_archive_with_long_names_and_odd_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.tar.gz");
    let long = format!("nodes/{}/net/devices.txt", "n".repeat(200));
    let texts =
        [("MANIFEST.json", "{}".to_owned()), ("empty", String::new()), (long.as_str(), "x".repeat(512 * 3 + 1))];
    archive::write(&file, "dump", 1_700_000_000, texts.iter().map(|(name, text)| (*name, text.as_str()))).unwrap();
    let done = Command::new("tar").arg("xzf").arg(&file).arg("-C").arg(dir.path()).output().unwrap();
    assert!(done.status.success() && done.stderr.is_empty(), "{}", String::from_utf8_lossy(&done.stderr));
    for (name, text) in &texts {
        assert_eq!(&std::fs::read_to_string(dir.path().join("dump").join(name)).unwrap(), text, "{name}");
    }
    assert!(!dir.path().join("x.tar.gz.part").exists());
    assert!(archive::write(&dir.path().join("no/such/x"), "dump", 0, [("a", "b")]).is_err());
}

#[test]
fn what_is_collected_is_a_document_still_and_stays_in_its_directory() {
    let mut all = Collection::default();
    let pod = serde_json::json!({
        "automountServiceAccountToken": false, "tokens": ["planted-abc"],
        "sources": [{"serviceAccountToken": {"path": "token"}}],
    });
    all.json("pod.json", Ok(pod));
    let text = all.files.get("pod.json").unwrap();
    let read: serde_json::Value = serde_json::from_str(text).unwrap();
    assert_eq!(read.get("automountServiceAccountToken"), Some(&serde_json::json!(false)));
    assert!(!text.contains("planted"), "{text}");
    let mut liar = Collection::default();
    liar.text("../../.bashrc", Ok("x"));
    all.below("nodes/n1", liar);
    assert!(all.files.keys().all(|path| !path.contains("..")) && all.missing.contains_key("nodes/n1/refused"));
}
