//! The real kubectl against the server: the commands people type.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test binary: a panic is how a test fails"
)]

mod cluster;

use cluster::{Cluster, kubectl_missing};

const DEPLOYMENT: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: nginx
        ports: [{containerPort: 80}]
        env: [{name: A, value: "1"}, {name: B, value: "2"}]
"#;

const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: x, labels: {app: x}}
spec: {nodeName: n1, containers: [{name: c, image: busybox}]}
"#;

#[tokio::test(flavor = "multi_thread")]
async fn client_side_apply_adds_changes_and_removes_fields() {
    if kubectl_missing() {
        return;
    }
    let cluster = Cluster::start().await;
    assert!(cluster.ok(&["apply", "-f", "-"], DEPLOYMENT).await.contains("deployment.apps/web created"));
    assert!(cluster.ok(&["apply", "-f", "-"], DEPLOYMENT).await.contains("unchanged"));
    let changed = DEPLOYMENT.replace("replicas: 2", "replicas: 3").replace(", {name: B, value: \"2\"}", "");
    assert!(cluster.ok(&["apply", "-f", "-"], &changed).await.contains("configured"));
    let env = cluster
        .ok(
            &[
                "get",
                "deploy",
                "web",
                "-o",
                "jsonpath={.spec.replicas} {.spec.template.spec.containers[0].env[*].name}",
            ],
            "",
        )
        .await;
    assert_eq!(env, "3 A");
    let table = cluster.ok(&["get", "deploy"], "").await;
    assert!(table.contains("READY") && table.contains("web") && table.contains("0/3"), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn server_side_apply_keeps_owners_apart() {
    if kubectl_missing() {
        return;
    }
    let cluster = Cluster::start().await;
    cluster.ok(&["apply", "--server-side", "--field-manager=one", "-f", "-"], DEPLOYMENT).await;
    let changed = DEPLOYMENT.replace("replicas: 2", "replicas: 5");
    let refused = cluster.fails(&["apply", "--server-side", "--field-manager=two", "-f", "-"], &changed).await;
    assert!(refused.contains("conflict with \"one\"") && refused.contains(".spec.replicas"), "{refused}");
    cluster.ok(&["apply", "--server-side", "--field-manager=two", "--force-conflicts", "-f", "-"], &changed).await;
    let replicas = cluster.ok(&["get", "deploy", "web", "-o", "jsonpath={.spec.replicas}"], "").await;
    assert_eq!(replicas, "5");
    // One gives up what two does not own: the variable B.
    let less = changed.replace(", {name: B, value: \"2\"}", "");
    cluster.ok(&["apply", "--server-side", "--field-manager=two", "-f", "-"], &less).await;
    let env = ["get", "deploy", "web", "-o", "jsonpath={.spec.template.spec.containers[0].env[*].name}"];
    assert_eq!(cluster.ok(&env, "").await, "A B", "B is still one's");
    cluster.ok(&["apply", "--server-side", "--field-manager=one", "--force-conflicts", "-f", "-"], &less).await;
    assert_eq!(cluster.ok(&env, "").await, "A");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_small_verbs_work() {
    if kubectl_missing() {
        return;
    }
    let cluster = Cluster::start().await;
    cluster.ok(&["create", "-f", "-"], DEPLOYMENT).await;
    assert!(cluster.fails(&["create", "-f", "-"], DEPLOYMENT).await.contains("(AlreadyExists)"));
    cluster.ok(&["scale", "deploy/web", "--replicas=4"], "").await;
    cluster.ok(&["label", "deploy", "web", "tier=front"], "").await;
    cluster.ok(&["annotate", "deploy", "web", "note=hello"], "").await;
    cluster.ok(&["set", "image", "deploy/web", "web=httpd"], "").await;
    cluster.ok(&["rollout", "restart", "deploy/web"], "").await;
    cluster
        .ok(
            &["patch", "deploy", "web", "--type=json", "-p", r#"[{"op":"replace","path":"/spec/replicas","value":6}]"#],
            "",
        )
        .await;
    cluster.ok(&["patch", "deploy", "web", "--type=merge", "-p", r#"{"metadata":{"labels":{"tier":null}}}"#], "").await;
    let all = cluster.ok(&["get", "deploy", "web", "-o", "jsonpath={.spec.replicas} {.metadata.labels} {.metadata.annotations.note} {.spec.template.spec.containers[0].image}"], "").await;
    assert_eq!(all, r#"6 {"app":"web"} hello httpd"#);
    cluster.ok(&["expose", "deploy", "web", "--port=80", "--type=NodePort"], "").await;
    let service =
        cluster.ok(&["get", "svc", "web", "-o", "jsonpath={.spec.clusterIP} {.spec.ports[0].nodePort}"], "").await;
    let (address, port) = service.split_once(' ').unwrap();
    assert!(address.starts_with("10.") && (30000..=32767).contains(&port.parse::<u32>().unwrap()), "{service}");
    cluster.ok(&["create", "configmap", "c", "--from-literal=a=b"], "").await;
    cluster.ok(&["create", "namespace", "other"], "").await;
    cluster.ok(&["run", "p", "--image=busybox", "-n", "other"], "").await;
    assert!(
        cluster
            .fails(&["run", "p", "--image=busybox", "-n", "missing"], "")
            .await
            .contains("namespaces \"missing\" not found")
    );
    assert!(cluster.ok(&["get", "pods", "-A", "-o", "wide"], "").await.contains("other"));
    assert!(cluster.ok(&["describe", "deploy", "web"], "").await.contains("6 desired"));
    assert!(cluster.ok(&["get", "all"], "").await.contains("service/kubernetes"));
    assert!(cluster.ok(&["delete", "deploy", "web"], "").await.contains("deleted"));
    assert!(cluster.fails(&["get", "deploy", "web"], "").await.contains("(NotFound)"));
    assert!(cluster.ok(&["api-resources"], "").await.contains("deployments"));
    assert!(cluster.ok(&["version"], "").await.contains("towpath"));
    assert_eq!(cluster.ok(&["auth", "can-i", "delete", "nodes"], "").await.trim(), "yes");
    assert!(cluster.ok(&["auth", "whoami"], "").await.contains("kubernetes-admin"));
    assert!(cluster.ok(&["auth", "whoami", "--as=jane"], "").await.contains("jane"));
    assert!(cluster.fails(&["get", "pods", "--as=jane"], "").await.contains("User \"jane\" cannot list"));
    cluster.ok(&["delete", "service", "kubernetes"], "").await;
    cluster.ok(&["wait", "--for=create", "service/kubernetes", "--timeout=5s"], "").await;
    assert!(cluster.ok(&["explain", "pod.spec.containers.image"], "").await.contains("image"));
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_validation_names_unknown_fields_and_dry_run_stores_nothing() {
    if kubectl_missing() {
        return;
    }
    let cluster = Cluster::start().await;
    let wrong = DEPLOYMENT.replace("image: nginx", "imagee: nginx");
    let refused = cluster.fails(&["apply", "-f", "-"], &wrong).await;
    assert!(refused.contains("unknown field \"spec.template.spec.containers[0].imagee\""), "{refused}");
    cluster.ok(&["apply", "--dry-run=server", "-f", "-"], DEPLOYMENT).await;
    assert!(cluster.fails(&["get", "deploy", "web"], "").await.contains("(NotFound)"));
    let invalid = DEPLOYMENT.replace("matchLabels: {app: web}", "matchLabels: {app: other}");
    let refused = cluster.fails(&["create", "-f", "-"], &invalid).await;
    assert!(refused.contains("is invalid") && refused.contains("selector"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_exec_attach_and_exit_codes() {
    if kubectl_missing() {
        return;
    }
    let cluster = Cluster::start().await;
    cluster.ok(&["create", "-f", "-"], POD).await;
    assert_eq!(cluster.ok(&["logs", "x"], "").await, "one of c\ntwo of c\nthree of c\n");
    assert_eq!(cluster.ok(&["logs", "x", "--tail=1"], "").await, "three of c\n");
    assert_eq!(cluster.ok(&["exec", "-i", "x", "--", "cat"], "through stdin").await, "through stdin");
    assert_eq!(cluster.ok(&["exec", "x", "--", "big"], "").await.len(), 1_000_000);
    let both = cluster.run(&["exec", "x", "--", "both"], "").await;
    assert_eq!(
        (both.stdout.as_slice(), both.stderr.as_slice()),
        (b"to stdout\n".as_slice(), b"to stderr\n".as_slice())
    );
    let exit = cluster.run(&["exec", "x", "--", "exit", "3"], "").await;
    assert_eq!(exit.status.code(), Some(3), "{}", cluster::text(&exit.stderr));
    assert!(cluster.fails(&["exec", "x", "-c", "nope", "--", "cat"], "").await.contains("nope"));
}

#[tokio::test(flavor = "multi_thread")]
async fn port_forward_carries_several_connections() {
    use std::io::{BufRead, Read, Write};
    if kubectl_missing() {
        return;
    }
    let cluster = Cluster::start().await;
    cluster.ok(&["create", "-f", "-"], POD).await;
    cluster
        .ok(
            &["patch", "pod", "x", "--subresource=status", "--type=merge", "-p", r#"{"status":{"phase":"Running"}}"#],
            "",
        )
        .await;
    let mut child =
        cluster.kubectl(&["port-forward", "pod/x", ":80"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let output = child.stdout.take().unwrap();
    let answers = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        // kubectl writes a line for each connection: its output must stay open.
        let mut output = std::io::BufReader::new(output);
        output.read_line(&mut line).unwrap();
        let port: u16 = line.split([':', ' ']).find_map(|word| word.parse().ok()).unwrap();
        let mut first = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        let mut second = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        [(&mut second, "b"), (&mut first, "a")].map(|(stream, word)| {
            stream.write_all(word.as_bytes()).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        })
    })
    .await
    .unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(answers, ["80:b", "80:a"]);
}

const DEFINITION: &str = r#"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: boats.example.com}
spec:
  group: example.com
  scope: Namespaced
  names: {plural: boats, singular: boat, kind: Boat, shortNames: [bt]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}, scale: {specReplicasPath: .spec.crew, statusReplicasPath: .status.crew}}
    additionalPrinterColumns:
    - {name: Speed, type: integer, jsonPath: .spec.speed}
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            required: [speed]
            properties:
              speed: {type: integer, minimum: 1, description: Knots.}
              crew: {type: integer, default: 2}
              colour: {type: string, enum: [red, blue]}
          status: {type: object, properties: {crew: {type: integer}}}
"#;

#[tokio::test(flavor = "multi_thread")]
async fn custom_resources_are_served_at_once_and_go_with_their_definition() {
    if kubectl_missing() {
        return;
    }
    let cluster = Cluster::start().await;
    cluster.ok(&["apply", "-f", "-"], DEFINITION).await;
    cluster.ok(&["wait", "--for=condition=established", "crd/boats.example.com", "--timeout=5s"], "").await;
    let boat = "apiVersion: example.com/v1\nkind: Boat\nmetadata: {name: b}\nspec: {speed: 7, colour: red}\n";
    cluster.ok(&["apply", "-f", "-"], boat).await;
    let table = cluster.ok(&["get", "bt"], "").await;
    assert!(table.contains("SPEED") && table.contains('7'), "{table}");
    cluster.ok(&["scale", "boat/b", "--replicas=5"], "").await;
    assert_eq!(cluster.ok(&["get", "boat", "b", "-o", "jsonpath={.spec.crew}"], "").await, "5");
    let refused =
        cluster.fails(&["apply", "-f", "-"], &boat.replace("speed: 7, colour: red", "speed: 0, colour: green")).await;
    assert!(refused.contains("spec.speed") && refused.contains("supported values: \"red\", \"blue\""), "{refused}");
    assert!(cluster.ok(&["explain", "boat.spec.speed"], "").await.contains("Knots."));
    cluster.ok(&["delete", "crd", "boats.example.com"], "").await;
    assert!(!cluster.run(&["get", "boats.example.com"], "").await.status.success());
    cluster.ok(&["apply", "-f", "-"], DEFINITION).await;
    assert_eq!(cluster.ok(&["get", "bt", "-o", "name"], "").await, "");
}
