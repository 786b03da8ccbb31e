//! `towpath observe --drops` tells of real packets as they are dropped: who sent them, to whom, and which policies deny it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, field};
use towpath_walkthrough::machine::can_run_labs;

/// How long an event may take from the packet to the line.
const SOON: Duration = Duration::from_secs(5);

const OBJECTS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  nodeName: n2
  containers: [{name: web, image: nginx, ports: [{containerPort: 80}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: asks, labels: {app: asks}}
spec:
  nodeName: n1
  containers: [{name: shell, image: busybox, command: [sleep, "86400"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: friend, labels: {app: friend}}
spec:
  nodeName: n1
  containers: [{name: shell, image: busybox, command: [sleep, "86400"]}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{name: http, port: 8000, targetPort: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: empty}
spec:
  selector: {app: nobody}
  ports: [{name: http, port: 80}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]
"#;

/// `towpath observe --drops -o json`, with its lines.
struct Observer {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Observer {
    /// Started, and listening to both nodes.
    fn start(cluster: &Cluster, args: &[&str]) -> Result<Self> {
        let mut command = Command::new(cluster.towpath());
        command.env("KUBECONFIG", cluster.kubeconfig()).args(["observe", "--drops", "-o", "json"]).args(args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("towpath observe")?;
        let (out, err) = (child.stdout.take().context("its output")?, child.stderr.take().context("its errors")?);
        let (told, lines) = mpsc::channel();
        std::thread::spawn(move || {
            BufReader::new(out).lines().map_while(Result::ok).all(|line| told.send(line).is_ok())
        });
        let (ready, nodes) = mpsc::channel();
        std::thread::spawn(move || {
            BufReader::new(err).lines().map_while(Result::ok).all(|line| ready.send(line).is_ok())
        });
        let observer = Self { child, lines };
        for _ in 0..2 {
            let said = nodes.recv_timeout(SOON).context("it does not listen")?;
            ensure!(said.contains("listening to node"), "it said: {said}");
        }
        Ok(observer)
    }

    fn next(&self) -> Result<Value> {
        let line = self.lines.recv_timeout(SOON).context("nothing was told")?;
        serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))
    }

    /// What is told in half a second: nothing, while it goes on to listen.
    fn silent(&self) -> Result<()> {
        match self.lines.recv_timeout(Duration::from_millis(500)) {
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Err(RecvTimeoutError::Disconnected) => bail!("towpath observe ended"),
            Ok(told) => bail!("told, and not asked for: {told}"),
        }
    }

    /// Until nothing is told any more of what was sent before.
    fn settle(&self) -> Result<()> {
        let deadline = Instant::now() + SOON;
        while let Err(told) = self.silent() {
            ensure!(Instant::now() < deadline, "it does not end: {told:#}");
        }
        Ok(())
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn drops_are_told_as_they_happen_with_the_policies_that_deny_them() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("observe", 2, Families::Ipv4)?;
    cluster.apply_text(OBJECTS)?;
    cluster.wait_pod("web")?;
    cluster.wait_pod("friend")?;
    let asks = cluster.wait_pod("asks")?;
    let all = Observer::start(&cluster, &[])?;
    let of_friend = Observer::start(&cluster, &["-l", "app=friend"])?;

    // Denied where the pod is that it was sent to, by way of a Service.
    cluster.exec("asks", "nc -w 1 web 8000 </dev/null; true")?;
    let told = all.next()?;
    ensure!(field(&told, "/reason") == "ingress_policy" && field(&told, "/verdict") == "DROPPED", "{told}");
    ensure!(field(&told, "/node") == "n2" && field(&told, "/detail") == "SYN", "{told}");
    ensure!(field(&told, "/source/is/name") == "asks" && field(&told, "/source/address") == asks.ip, "{told}");
    ensure!(field(&told, "/destination/is/name") == "web" && told["destination"]["port"] == 80, "{told}");
    ensure!(field(&told, "/destination/labels/app") == "web", "{told}");
    ensure!(told["policy"]["policies"] == serde_json::json!(["default/closed"]), "{told}");
    ensure!(field(&told, "/policy/direction") == "Ingress", "{told}");

    // Refused before anything is sent.
    all.settle()?;
    cluster.exec("asks", "nc -w 1 empty 80 </dev/null; true")?;
    let told = all.next()?;
    ensure!(field(&told, "/reason") == "refused" && field(&told, "/verdict") == "REFUSED", "{told}");
    ensure!(
        field(&told, "/destination/is/kind") == "Service" && field(&told, "/destination/is/name") == "empty",
        "{told}"
    );
    ensure!(field(&told, "/node") == "n1" && field(&told, "/place") == "socket", "{told}");
    ensure!(told.get("policy").is_none(), "{told}");

    // Who asks for one pod's is told of that pod's, and of nobody else's.
    of_friend.silent()?;
    all.settle()?;
    cluster.exec("friend", "nc -w 1 empty 80 </dev/null; true")?;
    for told in [of_friend.next()?, all.next()?] {
        ensure!(
            field(&told, "/source/is/name") == "friend" && field(&told, "/source/labels/app") == "friend",
            "{told}"
        );
    }

    // The policy goes, and nothing is dropped any more.
    cluster.try_kubectl(&["delete", "networkpolicy", "closed"])?;
    let answered = cluster
        .exec("asks", "for i in 1 2 3 4 5 6 7 8 9 10; do nc -w 1 web 8000 </dev/null && exit 0; done; exit 1")?;
    ensure!(answered.ok, "{}", answered.all());
    all.settle()?;
    cluster.exec("asks", "nc -w 1 web 8000 </dev/null")?;
    all.silent()?;
    of_friend.settle()?;
    cluster.down()
}
