//! `towpath verify` as people run it: the tutorial's commands, places in files, exit codes, reports.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what failed by panicking, in its helpers too"
)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn verify_with(args: &[&str], stdin: &str) -> Ran {
    let mut child = Command::new(env!("CARGO_BIN_EXE_towpath"))
        .arg("verify")
        .args(args)
        .current_dir(root())
        .env_remove("KUBECONFIG")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: done.status.code().unwrap(), out: text(done.stdout), err: text(done.stderr) }
}

fn verify(args: &[&str]) -> Ran {
    verify_with(args, "")
}

/// Words of a command line; what is in quotes is one.
fn words(line: &str) -> Vec<String> {
    let parts = line.split('"').enumerate();
    parts
        .flat_map(|(index, part)| match index % 2 {
            1 => vec![part.to_owned()],
            _ => part.split_whitespace().map(str::to_owned).collect(),
        })
        .collect()
}

/// Commands of the tutorial with what it says they print.
fn tutorial() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(root().join("docs/verify.md")).unwrap();
    let mut commands: Vec<(String, String)> = Vec::new();
    for block in text.split("```console\n").skip(1) {
        for line in block.split("```").next().unwrap().lines() {
            match line.strip_prefix("$ ") {
                Some(command) => commands.push((command.to_owned(), String::new())),
                None => {
                    let last = commands.last_mut().unwrap();
                    last.1.push_str(line);
                    last.1.push('\n');
                }
            }
        }
    }
    commands
}

#[test]
fn the_tutorial_shows_what_its_commands_print() {
    let commands = tutorial();
    assert!(commands.len() >= 8);
    for (command, wanted) in commands {
        let words = words(command.strip_prefix("towpath verify ").unwrap());
        let ran = verify(&words.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(ran.out, wanted, "{command}\n{}", ran.err);
        let bad = wanted.contains("FAIL") || wanted.contains("newly");
        assert_eq!(ran.code, i32::from(bad), "{command}\n{}", ran.err);
    }
}

#[test]
fn every_code_of_lint_is_in_the_tutorial_as_it_is() {
    let text = std::fs::read_to_string(root().join("docs/verify.md")).unwrap();
    let mut number = 0;
    loop {
        number += 1;
        let ran = verify(&["lint", "--explain", &format!("TP{number:03}")]);
        if ran.code != 0 {
            assert_eq!(ran.code, 2);
            break;
        }
        let first = ran.out.lines().next().unwrap();
        let (code, rest) = first.split_once(" (").unwrap();
        let (level, title) = rest.split_once("): ").unwrap();
        let row = format!("| {code} | {level} | {} |", title.trim_end_matches('.'));
        assert!(text.contains(&row), "{row}");
    }
    assert!(number > 10 && !text.contains(&format!("| TP{number:03} ")));
}

const BROKEN: &str = r"apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c}]}
---
# a comment
apiVersion: v1
kind: List
items:
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: a, namespace: shop}
  spec:
    podSelector: {matchLabels: {app: web}}
    policyTypes: [Ingress]
    ingress:
    - from:
      - ipBlock:
          cidr: 192.168.0.0/16
          except: [10.0.0.0/8]
    - ports:
      - port: 80
        endPort: 79
    egress:
    - {}
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: a, namespace: shop}
  spec: {podSelector: {}}
- apiVersion: crd.projectcalico.org/v1
  kind: NetworkPolicy
  metadata: {name: c, namespace: shop}
---
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: typed, namespace: shop}
spec: {podSelector: {}, ingress: [{ports: [{port: [80]}]}]}
";

#[test]
fn what_is_wrong_is_found_with_its_line_and_stops_the_other_questions() {
    let ran = verify_with(&["lint", "-o", "json", "-"], BROKEN);
    assert_eq!(ran.code, 1, "{}", ran.err);
    let findings: Vec<Value> = serde_json::from_str(&ran.out).unwrap();
    let said: Vec<String> = findings
        .iter()
        .map(|f| {
            format!(
                "{} {} {}",
                f["code"].as_str().unwrap(),
                f["place"].as_str().unwrap_or_default(),
                f["field"].as_str().unwrap()
            )
        })
        .collect();
    for wanted in [
        "TP014 standard input:20 ",
        "TP013 standard input:23 ",
        "TP011 standard input:25 ",
        "TP012 standard input:26 metadata.name",
        "TP013 standard input:34 ",
        "TP015  ",
    ] {
        assert!(said.iter().any(|line| line.starts_with(wanted)), "{wanted}: {said:#?}");
    }
    let ran = verify_with(&["reach", "-"], BROKEN);
    assert_eq!(ran.code, 2);
    assert!(
        ran.err.contains("standard input:20: NetworkPolicy shop/a: spec.ingress[0].from[0].ipBlock.except: 10.0.0.0/8"),
        "{}",
        ran.err
    );
    assert!(ran.err.contains("crd.projectcalico.org/v1"), "{}", ran.err);
}

#[test]
fn what_cannot_be_understood_has_an_exit_code_of_its_own() {
    let shop = "examples/verify/shop.yaml";
    for (args, stdin, why) in [
        (vec!["reach"], "", "name manifests"),
        (vec!["reach", "/nowhere.yaml"], "", "/nowhere.yaml"),
        (vec!["reach", "-n", "nobody", shop], "", "namespace nobody"),
        (vec!["reach", "-"], "a: 1\n---\nb: [\n", "standard input:"),
        (vec!["prove", "nothing goes anywhere", shop], "", "word 2 (\"goes\")"),
        (vec!["prove", "nothing reaches shop/db", shop], "", ""),
        (vec!["prove", "nothing reaches app=db", "--steps", "3", shop], "", ""),
        (vec!["diff", shop], "", "two sides"),
        (
            vec!["assert", "-f", "-", shop],
            "- alow: {from: shop/web, to: shop/db}\n",
            "standard input:1: unknown field \"alow\"",
        ),
        (
            vec!["assert", "-f", "-", shop],
            "- allow:\n    from: shop/web\n    to: shop/db\n    port: htt p\n",
            "standard input:4: \"htt p\"",
        ),
        (vec!["assert", "-f", "-", shop], "- allow: {from: shop/wbe, to: shop/db}\n", ""),
        (vec!["assert", "-f", "-", shop], "[]\n", "no expectation"),
        (vec!["lint", "--explain", "TP999"], "", "no code"),
        (vec!["lint", shop], "", "no policy"),
        (vec!["assert", "-f", "-", "-"], "- allow: {from: shop/web, to: shop/db}\n", "named twice"),
        (vec!["reach", "--pod-cidr", "10.0.0.0/30", shop], "", "5 pods have no address, and 10.0.0.0/30 has none left"),
        (vec!["prove", "nothing app='web' reaches app=db", shop], "", "\"app='web'\" is no requirement"),
        (vec!["reach", "-"], MISSPELT, "standard input:6: NetworkPolicy shop/a: spec.ingress[0].form: no such field"),
        (vec!["diff", "-", shop], MISSPELT, "spec.ingress[0].form"),
    ] {
        let ran = verify_with(&args, stdin);
        assert_eq!(ran.code, 2, "{args:?}: {}{}", ran.out, ran.err);
        assert!(ran.err.contains(why), "{args:?}: {}", ran.err);
        assert!(!ran.err.contains("panicked"), "{}", ran.err);
    }
}

/// A rule without `from` lets everybody in.
const MISSPELT: &str = r"apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: a, namespace: shop, creationTimestamp: null}
spec:
  podSelector: {matchLabels: {}}
  ingress: [{form: [{podSelector: {}}]}]
status: {}
";

#[test]
fn fields_that_a_policy_does_not_have_and_directions_that_there_are_not_are_found() {
    let said = |manifest: &str| -> Vec<String> {
        let ran = verify_with(&["lint", "-o", "json", "--allow", "TP008", "-"], manifest);
        let findings: Vec<Value> = serde_json::from_str(&ran.out).unwrap();
        findings.iter().map(|f| format!("{} {}", f["code"].as_str().unwrap(), f["field"].as_str().unwrap())).collect()
    };
    assert_eq!(said(MISSPELT), ["TP013 spec.ingress[0].form"]);
    assert_eq!(said(&MISSPELT.replace("form:", "from:")), [""; 0]);
    let types = MISSPELT.replace("form:", "from:").replace("  ingress:", "  policyTypes: [ingress]\n  ingress:");
    assert_eq!(said(&types), ["TP013 spec.policyTypes[0]"]);
    // What is of a later version is said once, where it is not understood.
    let cluster = r"{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, metadata: {name: c},
        spec: {tier: Admin, priority: 1, subject: {namespaces: {}}, egres: [],
        ingress: [{action: Deny, form: 1, from: [{namespaces: {}}]}, {action: Deny, from: [{later: {}}]}]},
        status: {conditions: [], more: 1}}";
    assert_eq!(said(cluster), ["TP013 spec.egres", "TP013 spec.ingress[0].form", "TP013 spec.ingress[1].from[0]"]);
}

#[test]
fn a_list_in_a_file_is_any_of_its_entries() {
    let asked = "- nothing: [app=web in namespace shop, any pod in namespace monitoring]\n  reaches: app=db in namespace shop\n  on: [icmp, 53/udp]\n";
    let ran = verify_with(&["prove", "-f", "-", "examples/verify/shop.yaml", "examples/verify/policies.yaml"], asked);
    assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
    let wanted = "ok   nothing app=web in namespace shop or any pod in namespace monitoring reaches app=db in namespace shop on icmp, 53/udp";
    assert!(ran.out.starts_with(wanted), "{}", ran.out);
}

#[test]
fn both_sides_of_a_change_have_what_came_from_standard_input_and_blocks_among_pods_count() {
    let dir = tempfile::tempdir().unwrap();
    let side = |name: &str, cidr: &str| {
        let file = dir.path().join(name);
        let policy = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: a, namespace: shop}, spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: CIDR}}]}]}}";
        std::fs::write(&file, format!("# first\n--- {}\n", policy.replace("CIDR", cidr))).unwrap();
        file.to_str().unwrap().to_owned()
    };
    let shop = std::fs::read_to_string(root().join("examples/verify/shop.yaml")).unwrap();
    let (before, after) = (side("before.yaml", "10.244.4.0/24"), side("after.yaml", "10.244.5.0/24"));
    let ran = verify_with(&["diff", "--with", "-", &before, &after], &shop);
    assert_eq!(ran.code, 1, "{}{}", ran.out, ran.err);
    let (first, last) = ran.out.split_once("\n\n").unwrap();
    assert!(first.ends_with("get these addresses (not compared): 10.244.4.0/23"), "{}", ran.out);
    assert_eq!(
        last,
        "Pods without an address are taken to be in 10.244.0.0/16 (--pod-cidr), and outside of the 2 ipBlocks that lie within it.\n"
    );
    let ran = verify_with(&["diff", "--with", "-", &after, &after], &shop);
    assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
}

#[test]
fn reports_for_programs_say_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report.xml");
    let base = ["-f", "examples/verify/expectations.yaml", "examples/verify/shop.yaml", "examples/verify/change"];
    let mut args = vec!["assert", "--junit", report.to_str().unwrap(), "-o", "json"];
    args.extend(base);
    let ran = verify(&args);
    assert_eq!(ran.code, 1, "{}", ran.err);
    let said: Value = serde_json::from_str(&ran.out).unwrap();
    let failed: Vec<&Value> = said["expectations"].as_array().unwrap().iter().filter(|e| e["holds"] == false).collect();
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0]["failures"][0]["to"], "shop/db");
    assert_eq!(failed[0]["failures"][0]["ports"][0]["first"], 9187);
    let xml = std::fs::read_to_string(&report).unwrap();
    assert!(xml.contains("tests=\"7\" failures=\"1\" errors=\"0\""), "{xml}");
    assert!(xml.contains("file=\"examples/verify/expectations.yaml:"), "{xml}");
    assert_eq!(xml.matches("<failure ").count(), 1);
    let ran = verify(&[
        "prove",
        "-o",
        "json",
        "nothing reaches app=db on tcp",
        "examples/verify/shop.yaml",
        "examples/verify/policies.yaml",
    ]);
    let said: Value = serde_json::from_str(&ran.out).unwrap();
    let found = &said["statements"][0]["counterexample"];
    assert_eq!((found["to"]["labels"]["app"].as_str(), found["protocol"].as_str()), (Some("db"), Some("TCP")));
}

#[test]
fn workloads_of_every_kind_are_collapsed_and_told_apart_where_policy_does() {
    let manifests = r#"
{"apiVersion": "v1", "kind": "List", "items": [
  {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "backup"}, "spec": {"jobTemplate": {"spec": {"template":
    {"metadata": {"labels": {"app": "backup"}}, "spec": {"containers": [{"name": "c"}]}}}}}},
  {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "agent", "namespace": "kube-system"}, "spec": {"template":
    {"metadata": {"labels": {"app": "agent"}}, "spec": {"hostNetwork": true, "containers": [{"name": "c"}]}}}},
  {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "db"}, "spec": {"template":
    {"metadata": {"labels": {"app": "db"}}, "spec": {"containers": [{"name": "c"}]}}}},
  {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web-6b-x", "labels": {"app": "web", "pod-template-hash": "6b"},
     "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-6b", "uid": "u", "controller": true}]},
     "spec": {"containers": [{"name": "c"}]}, "status": {"phase": "Running", "podIP": "10.244.7.7"}},
  {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "first"}, "spec": {
     "podSelector": {"matchLabels": {"statefulset.kubernetes.io/pod-name": "db-0"}}, "ingress": []}}
]}"#;
    let ran = verify_with(&["reach", "-o", "json", "-"], manifests);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let said: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(said["workloads"], 3, "{said}");
    assert_eq!(said["onNodes"][0], "kube-system/daemonset/agent");
    let names = |end: &str| -> Vec<String> {
        let rows = said["rows"].as_array().unwrap();
        let all =
            rows.iter().flat_map(|row| row[end].as_array().unwrap().iter().map(|n| n.as_str().unwrap().to_owned()));
        let mut all: Vec<String> = all.collect();
        all.sort();
        all.dedup();
        all
    };
    assert_eq!(names("to"), ["default/backup", "default/db [pod db-1]", "default/web", "outside"]);
    assert!(names("from").contains(&"default/db [pod db-0]".to_owned()));
}
