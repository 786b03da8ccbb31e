//! The lab from the outside, with the reference `bridge` plugin as its network: pods, logs, exec, restarts, and that
//! nothing is left behind. Needs root, busybox and Debian's `containernetworking-plugins`; skipped with a line otherwise.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what failed by panicking, in its helpers too"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Event, Node, Pod};
use kube::api::{Api, AttachParams, DeleteParams, ListParams, LogParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::json;
use tokio::io::AsyncReadExt;

/// A lab that is removed when the test ends, however it ends.
struct Lab {
    name: String,
}

fn program() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let path = own.parent().and_then(Path::parent).unwrap().join("examples/labdev");
    assert!(path.exists(), "{} is not built; run `cargo build -p towpath-lab --examples`", path.display());
    path
}

/// Why this machine cannot run the tests, if so. With CI=true that is a failure.
fn cannot_run() -> bool {
    let missing = if !nix::unistd::Uid::effective().is_root() {
        Some("not root")
    } else if !Path::new("/usr/lib/cni/bridge").exists() {
        Some("containernetworking-plugins is not installed")
    } else {
        None
    };
    let Some(why) = missing else { return false };
    assert!(std::env::var("CI").as_deref() != Ok("true"), "cannot run: {why}");
    eprintln!("skipped: {why}");
    true
}

impl Lab {
    fn run(&self, args: &[&str]) -> Output {
        Command::new(program()).args(args).env("LAB", &self.name).env("NODES", "2").output().unwrap()
    }

    fn succeed(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    }

    fn up(name: &str) -> Self {
        let lab = Self { name: format!("{name}-{}", std::process::id() % 10_000) };
        let conflist = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/bridge.conflist");
        lab.succeed(&["up", &conflist.display().to_string()]);
        lab
    }

    fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.succeed(&["status"])).unwrap()
    }

    async fn client(&self) -> Client {
        let file = Kubeconfig::read_from(self.status()["kubeconfig"].as_str().unwrap()).unwrap();
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.unwrap();
        Client::try_from(config).unwrap()
    }

    /// Everything on the machine that carries this lab's name.
    fn traces(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut add = |what: &str, text: String| {
            if text.contains(&self.name) {
                found.insert(format!("{what} {text}"));
            }
        };
        let names = |dir: &str| -> Vec<String> {
            std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path().display().to_string()).collect()
        };
        for dir in ["/run/netns", "/run/towpath/lab", "/var/lib/towpath/lab", "/sys/class/net"] {
            names(dir).into_iter().for_each(|name| add("file", name));
        }
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        for line in mounts.lines() {
            add("mount", line.to_owned());
            let mut fields = line.split(' ');
            if let (_, Some(at), Some("cgroup2")) = (fields.next(), fields.next(), fields.next()) {
                names(at).into_iter().for_each(|name| add("cgroup", name));
            }
        }
        for process in names("/proc").iter().filter(|p| *p != &format!("/proc/{}", std::process::id())) {
            let line = std::fs::read(format!("{process}/cmdline")).unwrap_or_default();
            add("process", String::from_utf8_lossy(&line).replace('\0', " "));
        }
        found
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.run(&["down"]);
    }
}

fn links() -> BTreeSet<String> {
    std::fs::read_dir("/sys/class/net")
        .unwrap()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}

fn pod(name: &str, node: &str, container: &serde_json::Value) -> Pod {
    let mut container = container.clone();
    container["name"] = json!("c");
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"nodeName": node, "terminationGracePeriodSeconds": 5, "containers": [container],
                 "restartPolicy": if name.starts_with("once") { "Never" } else { "Always" }},
    }))
    .unwrap()
}

/// Polls until `look` finds something.
async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "timed out: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn in_phase(pods: &Api<Pod>, name: &str, phase: &str) -> Pod {
    eventually(&format!("pod {name} {phase}"), || async {
        pods.get(name).await.ok().filter(|p| p.status.as_ref().and_then(|s| s.phase.as_deref()) == Some(phase))
    })
    .await
}

fn address(pod: &Pod) -> String {
    pod.status.as_ref().unwrap().pod_ip.clone().unwrap()
}

async fn exec(pods: &Api<Pod>, name: &str, command: &[&str]) -> String {
    let params = AttachParams::default().stdout(true).stderr(true);
    let mut process = pods.exec(name, command.to_vec(), &params).await.unwrap();
    let mut text = String::new();
    process.stdout().unwrap().read_to_string(&mut text).await.unwrap();
    process.join().await.unwrap();
    text
}

#[tokio::test]
async fn pods_run_answer_log_and_leave_nothing_behind() {
    if cannot_run() {
        return;
    }
    let before = links();
    let lab = Lab::up("e2e");
    assert_eq!(links(), before, "the machine's own network changed");
    let client = lab.client().await;
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await.unwrap();
    assert_eq!(nodes.items.len(), 2);

    let create = PostParams::default();
    pods.create(&create, &pod("web", "n1", &json!({"image": "nginx"}))).await.unwrap();
    pods.create(&create, &pod("tools", "n1", &json!({"image": "busybox", "command": ["sleep", "1000"]})))
        .await
        .unwrap();
    let script = "echo out; echo err >&2; exit 3";
    pods.create(&create, &pod("once-bad", "n2", &json!({"image": "busybox", "command": ["sh", "-c", script]})))
        .await
        .unwrap();
    pods.create(&create, &pod("strange", "n2", &json!({"image": "postgres"}))).await.unwrap();

    let web = in_phase(&pods, "web", "Running").await;
    in_phase(&pods, "tools", "Running").await;
    let own = address(&pods.get("tools").await.unwrap());
    let answer = exec(&pods, "tools", &["wget", "-qO-", &format!("http://{}/", address(&web))]).await;
    assert!(answer.contains("pod: web\n") && answer.contains("node: n1\n"), "{answer}");
    assert!(answer.contains(&format!("client: {own}:")), "the client's address is not its own: {answer}");
    assert_eq!(exec(&pods, "tools", &["hostname"]).await, "tools\n");

    in_phase(&pods, "once-bad", "Failed").await;
    let log = pods.logs("once-bad", &LogParams::default()).await.unwrap();
    assert!(log.contains("out\n") && log.contains("err\n"), "{log:?}");
    eventually("an image that cannot be had is named in an event", || async {
        let events: Api<Event> = Api::namespaced(client.clone(), "default");
        let list = events.list(&ListParams::default().fields("involvedObject.name=strange")).await.ok()?;
        list.items.into_iter().find(|e| e.message.as_deref().is_some_and(|m| m.contains("postgres")))
    })
    .await;

    pods.delete("web", &DeleteParams::default()).await.unwrap();
    eventually("the pod is gone", || async { pods.get_opt("web").await.unwrap().is_none().then_some(()) }).await;
    lab.succeed(&["down"]);
    assert_eq!(lab.traces(), BTreeSet::new());
    assert_eq!(links(), before);
}

#[tokio::test]
async fn a_killed_supervisor_leaves_a_lab_that_down_removes() {
    if cannot_run() {
        return;
    }
    let lab = Lab::up("kill");
    let pods: Api<Pod> = Api::namespaced(lab.client().await, "default");
    let idle = pod("idle", "n1", &json!({"image": "busybox", "command": ["sleep", "1000"]}));
    pods.create(&PostParams::default(), &idle).await.unwrap();
    in_phase(&pods, "idle", "Running").await;
    let supervisor = i32::try_from(lab.status()["supervisor"].as_i64().unwrap()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(supervisor), nix::sys::signal::Signal::SIGKILL).unwrap();
    lab.succeed(&["down"]);
    assert_eq!(lab.traces(), BTreeSet::new());
    lab.succeed(&["down"]);
}

#[tokio::test]
async fn stop_and_start_bring_the_same_cluster_back() {
    if cannot_run() {
        return;
    }
    let lab = Lab::up("again");
    let pods: Api<Pod> = Api::namespaced(lab.client().await, "default");
    pods.create(&PostParams::default(), &pod("web", "n2", &json!({"image": "httpd"}))).await.unwrap();
    let first = in_phase(&pods, "web", "Running").await;
    lab.succeed(&["stop"]);
    let left = lab.traces();
    assert!(left.iter().all(|trace| trace.contains("/var/lib/towpath/lab") || trace.contains(".lock")), "{left:?}");
    lab.succeed(&["start"]);
    let pods: Api<Pod> = Api::namespaced(lab.client().await, "default");
    let second = eventually("the pod runs again", || async {
        let pod = pods.get("web").await.ok()?;
        let restarted = pod.status.as_ref()?.container_statuses.as_ref()?.first()?.restart_count == 1;
        restarted.then_some(pod)
    })
    .await;
    assert_eq!(first.metadata.uid, second.metadata.uid);
    lab.succeed(&["exec", "n2", "ping", "-c1", "-W2", &address(&in_phase(&pods, "web", "Running").await)]);
}

#[tokio::test]
async fn nodes_that_join_and_leave_are_as_those_that_came_with_the_lab() {
    if cannot_run() {
        return;
    }
    let lab = Lab::up("nodes");
    assert_eq!(lab.succeed(&["node", "add"]), "n3\n");
    let client = lab.client().await;
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let nodes: Api<Node> = Api::all(client.clone());
    let idle = |name: &str, node: &str| pod(name, node, &json!({"image": "busybox", "command": ["sleep", "1000"]}));
    for (name, node) in [("stays", "n1"), ("goes", "n2"), ("joined", "n3")] {
        pods.create(&PostParams::default(), &idle(name, node)).await.unwrap();
    }
    for name in ["stays", "goes", "joined"] {
        in_phase(&pods, name, "Running").await;
    }
    let first = nodes.get("n2").await.unwrap();
    let of_n2 = |traces: &BTreeSet<String>| -> Vec<String> {
        traces.iter().filter(|trace| trace.contains("/n2") || trace.ends_with("-n2")).cloned().collect()
    };
    let before = lab.traces();
    assert!(!of_n2(&before).is_empty(), "{before:?}");
    lab.succeed(&["node", "delete", "n2"]);
    let after = lab.traces();
    assert_eq!(of_n2(&after), Vec::<String>::new());
    let sandboxes = |traces: &BTreeSet<String>| traces.iter().filter(|trace| trace.contains("-p-")).count();
    assert!(sandboxes(&after) < sandboxes(&before), "its pods' namespaces are there: {after:?}");
    assert!(nodes.get_opt("n2").await.unwrap().is_none() && pods.get_opt("goes").await.unwrap().is_none());
    assert!(!lab.run(&["node", "delete", "n2"]).status.success(), "there is none");

    // It is brought back as it is now, and the number that is free is given again, to a machine that knows nothing.
    lab.succeed(&["stop"]);
    lab.succeed(&["start"]);
    let pods: Api<Pod> = Api::namespaced(lab.client().await, "default");
    let nodes: Api<Node> = Api::all(lab.client().await);
    let names: Vec<String> = lab.status()["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| node["name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["n1", "n3"]);
    in_phase(&pods, "joined", "Running").await;
    assert_eq!(lab.succeed(&["node", "add"]), "n2\n");
    let second = nodes.get("n2").await.unwrap();
    assert_eq!(first.spec.unwrap().pod_cidrs, second.spec.unwrap().pod_cidrs);
    let machine = |node: &Option<k8s_openapi::api::core::v1::NodeStatus>| {
        node.as_ref().unwrap().node_info.as_ref().unwrap().machine_id.clone()
    };
    assert_ne!(machine(&first.status), machine(&second.status));
    pods.create(&PostParams::default(), &idle("again", "n2")).await.unwrap();
    in_phase(&pods, "again", "Running").await;

    lab.succeed(&["node", "delete", "n1"]);
    lab.succeed(&["node", "delete", "n2"]);
    assert!(!lab.run(&["node", "delete", "n3"]).status.success(), "the last one stays");
    lab.succeed(&["down"]);
    assert_eq!(lab.traces(), BTreeSet::new());
}
