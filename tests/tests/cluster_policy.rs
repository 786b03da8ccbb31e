//! ClusterNetworkPolicy with real packets: tiers, Pass, nodes, networks and named ports, on one node and across nodes; and who is denied
//! stays denied while policies change and agents die.

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::shell;

const WEB: &str = r#"---
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  nodeName: n1
  terminationGracePeriodSeconds: 0
  containers: [{name: web, image: nginx, ports: [{name: http, containerPort: 80}]}]
"#;

fn pods() -> String {
    [
        WEB.to_owned(),
        shell("friend", "n2", "app: friend"),
        shell("stranger", "n2", "app: stranger"),
        shell("neighbour", "n1", "app: stranger"),
    ]
    .concat()
}

/// A policy with one rule, about pods with the label `app: web`.
fn ingress(name: &str, tier: &str, priority: u32, action: &str, from: &str, more: &str) -> String {
    format!(
        "---\napiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{name: {name}}}\nspec:\n  \
         tier: {tier}\n  priority: {priority}\n  \
         subject: {{pods: {{namespaceSelector: {{}}, podSelector: {{matchLabels: {{app: web}}}}}}}}\n  \
         ingress: [{{name: the-rule, action: {action}, from: [{from}]{more}}}]\n"
    )
}

fn pods_of(app: &str) -> String {
    format!("{{pods: {{namespaceSelector: {{}}, podSelector: {{matchLabels: {{app: {app}}}}}}}}}")
}

/// A policy with one rule, about pods with the label `app: friend`.
fn egress(name: &str, action: &str, to: &str) -> String {
    format!(
        "---\napiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{name: {name}}}\nspec:\n  \
         tier: Admin\n  priority: 50\n  \
         subject: {{pods: {{namespaceSelector: {{}}, podSelector: {{matchLabels: {{app: friend}}}}}}}}\n  \
         egress: [{{action: {action}, to: [{to}]}}]\n"
    )
}

const FRIENDS_ONLY: &str = r#"---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends-only}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
    - from: [{podSelector: {matchLabels: {app: friend}}}]
"#;

/// Waits until exactly these connections come about, and then that it stays so.
fn settles(what: &str, expected: &[(&Place, SocketAddr, bool)]) -> Result<()> {
    let check = || {
        for (place, to, wanted) in expected {
            let open = place.enter(|| Ok(Session::open(*to, Duration::from_millis(400)).is_ok()))?;
            if open != *wanted {
                bail!("{} → {to}: open is {open}", place.name());
            }
        }
        Ok(())
    };
    wait(what, Duration::from_secs(20), check)?;
    check()
}

fn delete(cluster: &Cluster, names: &[&str]) -> Result<()> {
    for name in names {
        let out = cluster.try_kubectl(&["delete", "clusternetworkpolicy", name])?;
        ensure!(out.status.success(), "delete {name}: {}", String::from_utf8_lossy(&out.stderr));
    }
    Ok(())
}

fn tiers(name: &str, families: Families) -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up(name, 2, families)?;
    cluster.apply_text(&pods())?;
    let web = SocketAddr::new(address(&cluster.wait_pod("web")?.ip)?, 80);
    let place = |name: &str| Place::of_pod(&cluster, &cluster.wait_pod(name)?);
    let (friend, stranger, neighbour) = (place("friend")?, place("stranger")?, place("neighbour")?);
    let verdicts = |f, s, n| [(&friend, web, f), (&stranger, web, s), (&neighbour, web, n)];
    settles("an open network", &verdicts(true, true, true))?;

    cluster.apply_text(&ingress("closed", "Baseline", 1, "Deny", "{namespaces: {}}", ""))?;
    settles("the baseline to close", &verdicts(false, false, false))?;
    cluster.apply_text(FRIENDS_ONLY)?;
    settles("the NetworkPolicy to override the baseline", &verdicts(true, false, false))?;

    let by_name = ", protocols: [{destinationNamedPort: http}]";
    cluster.apply_text(&ingress("no-friend", "Admin", 20, "Deny", &pods_of("friend"), by_name))?;
    settles("the admin tier to override the NetworkPolicy", &verdicts(false, false, false))?;
    let said = std::process::Command::new(cluster.towpath())
        .args(["explain", "pod/friend", "pod/web", "80"])
        .env("KUBECONFIG", cluster.kubeconfig())
        .output()?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let rule = "denied: ClusterNetworkPolicy admin/no-friend: spec.ingress[0] \"the-rule\" from[0] protocols[0]";
    ensure!(said.contains(rule), "explain says {said}");

    cluster.apply_text(&ingress("pass", "Admin", 10, "Pass", &pods_of("friend"), ""))?;
    settles("Pass to skip the rest of the admin tier", &verdicts(true, false, false))?;
    let mut open = friend.enter(|| Session::open(web, Duration::from_secs(5)))?;
    open.ask(Duration::from_secs(5))?;
    cluster.apply_text(&ingress("welcome", "Admin", 5, "Accept", &pods_of("stranger"), ""))?;
    settles("Accept to override the NetworkPolicy", &verdicts(true, true, true))?;
    open.ask(Duration::from_secs(5))?;
    delete(&cluster, &["pass"])?;
    settles("the deny to be back", &verdicts(false, true, true))?;
    let cut = open.ask(Duration::from_secs(2));
    ensure!(cut.is_err(), "a connection that is forbidden now still answers");
    delete(&cluster, &["no-friend", "welcome", "closed"])?;

    let nodes: Vec<(String, IpAddr)> =
        cluster.nodes()?.iter().map(|(name, ip)| Ok((name.clone(), address(ip)?))).collect::<Result<_>>()?;
    let listeners = nodes
        .iter()
        .map(|(name, ip)| Place::of_node(&cluster, name)?.enter(|| Ok(TcpListener::bind(SocketAddr::new(*ip, 8099))?)));
    let listeners: Vec<TcpListener> = listeners.collect::<Result<_>>()?;
    let to_nodes = |open| -> Result<Vec<(&Place, SocketAddr, bool)>> {
        listeners.iter().map(|l| Ok((&friend, l.local_addr()?, open))).chain([Ok((&friend, web, true))]).collect()
    };
    settles("nodes in reach", &to_nodes(true)?)?;
    cluster.apply_text(&egress("no-nodes", "Deny", "{nodes: {}}"))?;
    settles("no node in reach, and pods still", &to_nodes(false)?)?;
    delete(&cluster, &["no-nodes"])?;
    settles("nodes in reach again", &to_nodes(true)?)?;
    let all = r#"{networks: ["0.0.0.0/0", "::/0"]}"#;
    cluster.apply_text(&egress("nothing", "Deny", all))?;
    settles("networks to be pods too", &[(&friend, web, false), (&stranger, web, false)])?;
    cluster.down()
}

#[test]
fn tiers_decide_in_their_order_on_one_node_and_across_nodes() -> Result<()> {
    tiers("e2e-cnp4", Families::Ipv4)
}

#[test]
fn tiers_decide_in_their_order_over_ipv6() -> Result<()> {
    tiers("e2e-cnp6", Families::Ipv6)
}

const KILLS: usize = 3;
const CHANGES: usize = 20;

/// Each datagram from a socket of its own: a flow that nobody has judged before.
fn send(place: &Place, to: SocketAddr, done: &AtomicBool, sent: &AtomicU64) -> Result<()> {
    place.enter(|| {
        while !done.load(Ordering::Relaxed) {
            let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
            // Refused at once where the policy says so: that is no news here.
            if UdpSocket::bind((any, 0))?.send_to(b"forbidden", to).is_ok() {
                sent.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    })
}

#[test]
fn who_is_denied_by_label_stays_denied_while_policies_change_and_agents_die() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-cnpdie", 2, Families::Ipv4)?;
    cluster.apply_text(&pods())?;
    let web = cluster.wait_pod("web")?;
    let to = SocketAddr::new(address(&web.ip)?, 7777);
    let http = SocketAddr::new(to.ip(), 80);
    let place = |name: &str| Place::of_pod(&cluster, &cluster.wait_pod(name)?);
    let (friend, stranger, neighbour) = (place("friend")?, place("stranger")?, place("neighbour")?);
    cluster.apply_text(&ingress("no-strangers", "Admin", 500, "Deny", &pods_of("stranger"), ""))?;
    settles("the deny", &[(&friend, http, true), (&stranger, http, false), (&neighbour, http, false)])?;

    let socket = Place::of_pod(&cluster, &web)?.enter(|| Ok(UdpSocket::bind(to)?))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let (done, sent, arrived) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| -> Result<()> {
        let senders = [&stranger, &neighbour].map(|place| scope.spawn(|| send(place, to, &done, &sent)));
        let receiver = scope.spawn(|| {
            let mut datagram = [0_u8; 64];
            while !done.load(Ordering::Relaxed) {
                if socket.recv(&mut datagram).is_ok() {
                    arrived.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let changed = changes(&cluster).and_then(|()| deaths(&cluster));
        done.store(true, Ordering::Relaxed);
        for sender in senders {
            sender.join().map_err(|_| anyhow::anyhow!("a sender panicked"))??;
        }
        receiver.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))?;
        changed
    })?;
    let (sent, arrived) = (sent.into_inner(), arrived.into_inner());
    ensure!(sent > 1000, "only {sent} datagrams were sent: the test shows nothing");
    ensure!(arrived == 0, "{arrived} of {sent} forbidden datagrams arrived");
    settles("the friend still", &[(&friend, http, true), (&stranger, http, false)])?;
    friend.enter(|| Ok(UdpSocket::bind("0.0.0.0:0")?.send_to(b"allowed", to)?))?;
    ensure!(socket.recv(&mut [0; 64]).is_ok(), "what is allowed does not arrive: the test shows nothing");
    cluster.down()
}

/// None of them says anything of strangers; each gives the pod another set, or peers other classes.
fn changes(cluster: &Cluster) -> Result<()> {
    for round in 0..CHANGES {
        let (tier, action) = if round % 2 == 0 { ("Admin", "Accept") } else { ("Baseline", "Deny") };
        let priority = u32::try_from(round)?;
        cluster.apply_text(&ingress("other", tier, priority, action, &pods_of("nobody"), ""))?;
        let label = format!("round=r{round}");
        cluster.try_kubectl(&["label", "--overwrite", "pod/neighbour", "pod/stranger", &label])?;
        std::thread::sleep(Duration::from_millis(100));
    }
    delete(cluster, &["other"])
}

fn deaths(cluster: &Cluster) -> Result<()> {
    for node in ["n1", "n2"].repeat(KILLS) {
        let pid = wait("an agent", Duration::from_secs(20), || machine::lab_agent(cluster.name(), node))?;
        machine::kill(pid)?;
        wait("another agent that is ready", Duration::from_secs(30), || {
            let now = machine::lab_agent(cluster.name(), node)?;
            ensure!(now != pid, "process {pid} is still there");
            Ok(())
        })?;
        // It has applied its first image, and its grace period is over, or not: both happen.
        std::thread::sleep(Duration::from_secs(3));
    }
    Ok(())
}

const LATE: usize = 8;

/// A pod that sends from its first instruction on, each datagram by a socket of its own.
fn late(name: &str, node: &str, target: &str) -> String {
    format!(
        r#"---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: stranger}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers:
    - name: sender
      image: busybox
      command: [sh, -c, "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do echo {name} | /bin/nc -u -q 0 {target} 7777; done; echo SENT; sleep 86400"]
"#
    )
}

#[test]
fn a_new_pod_is_denied_by_its_labels_before_the_other_node_has_heard_of_it() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-cnplate", 2, Families::Ipv4)?;
    cluster.apply_text(&pods())?;
    let web = cluster.wait_pod("web")?;
    let to = SocketAddr::new(address(&web.ip)?, 7777);
    let http = SocketAddr::new(to.ip(), 80);
    let place = |name: &str| Place::of_pod(&cluster, &cluster.wait_pod(name)?);
    let (friend, stranger) = (place("friend")?, place("stranger")?);
    cluster.apply_text(&ingress("no-strangers", "Admin", 500, "Deny", &pods_of("stranger"), ""))?;
    settles("the deny", &[(&friend, http, true), (&stranger, http, false)])?;
    let socket = Place::of_pod(&cluster, &web)?.enter(|| Ok(UdpSocket::bind(to)?))?;
    socket.set_read_timeout(Some(Duration::from_millis(300)))?;
    let names: Vec<(String, &str)> = (0..LATE).map(|n| (format!("late-{n}"), ["n2", "n1"][n % 2])).collect();
    cluster.apply_text(&names.iter().map(|(name, node)| late(name, node, &web.ip)).collect::<String>())?;
    for (name, _) in &names {
        wait(&format!("{name} to have sent"), Duration::from_secs(30), || {
            let out = cluster.try_kubectl(&["logs", name])?;
            let said = String::from_utf8_lossy(&out.stdout).into_owned();
            if said.contains("SENT") { Ok(()) } else { bail!("its log: {said}") }
        })?;
    }
    let mut datagram = [0_u8; 64];
    let arrived = std::iter::from_fn(|| socket.recv(&mut datagram).ok()).count();
    ensure!(arrived == 0, "{arrived} datagrams of pods that are denied by their labels arrived");
    // The node itself is no pod: neither its own address nor the one that it has in its pod range.
    let node = Place::of_node(&cluster, "n2")?;
    settles("nodes to be no pods", &[(&node, http, true)])?;
    friend.enter(|| Ok(UdpSocket::bind("0.0.0.0:0")?.send_to(b"allowed", to)?))?;
    ensure!(socket.recv(&mut [0; 64]).is_ok(), "what is allowed does not arrive: the test shows nothing");
    cluster.down()
}
