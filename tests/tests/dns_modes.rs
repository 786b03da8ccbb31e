//! Cluster DNS changes hands between Towpath and the servers behind `kube-system/kube-dns`, in both directions, and no question is
//! without an answer; while Towpath answers, it does what CoreDNS's configuration says.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::in_charge::{in_charge, network_config, said_by_nodes};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, address};

const NODES: [&str; 2] = ["n1", "n2"];

/// Whether something goes on.
#[derive(Default)]
struct Load {
    over: AtomicBool,
}

impl Load {
    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }
}

/// A server behind `kube-system/kube-dns`: it says 192.0.2.53 to every question for an address.
fn serve_dns(load: &Load) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:53")?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut buffer = [0u8; 1500];
    while load.goes_on() {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        // The header and the question; what may follow (EDNS) is not answered.
        let asked = buffer.get(..length).unwrap_or_default();
        let Some(end) = asked.iter().skip(12).position(|byte| *byte == 0) else { continue };
        let mut answer = asked.get(..12 + end + 5).unwrap_or_default().to_vec();
        for (at, value) in [(2, 0x85), (3, 0x80), (7, 1), (11, 0)] {
            if let Some(byte) = answer.get_mut(at) {
                *byte = value;
            }
        }
        answer.extend_from_slice(&[0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 192, 0, 2, 53]);
        socket.send_to(&answer, from)?;
    }
    Ok(())
}

/// A source port that was used a moment ago leads where it led then, until that server's flows are let go of.
const LET_GO_OF: Duration = Duration::from_secs(4);
/// So many answers in a row show who gives them.
const TELLING: usize = 100;

const NAME: &str = "kubernetes.default.svc.cluster.local";

/// Asks over `socket`; whether the server behind the Service answered, and not Towpath's.
fn ask_dns(socket: &UdpSocket, to: SocketAddr, id: u16) -> Result<bool> {
    let mut question = id.to_be_bytes().to_vec();
    question.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in NAME.split('.') {
        question.push(u8::try_from(label.len())?);
        question.extend_from_slice(label.as_bytes());
    }
    question.extend_from_slice(&[0, 0, 1, 0, 1]);
    socket.send_to(&question, to)?;
    let mut buffer = [0u8; 1500];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).with_context(|| format!("question {id} has no answer"))?;
        let answer = buffer.get(..length).unwrap_or_default();
        if answer.get(..2) != Some(id.to_be_bytes().as_slice()) {
            continue;
        }
        ensure!(from == to, "{from} answered what {to} was asked");
        ensure!(answer.get(3).is_some_and(|byte| byte & 15 == 0), "question {id}: {answer:?}");
        return Ok(answer.ends_with(&[192, 0, 2, 53]));
    }
}

struct Answers {
    theirs: AtomicUsize,
    ours: AtomicUsize,
}

fn keep_asking(load: &Load, answers: &Answers, to: SocketAddr) -> Result<()> {
    let open = || -> Result<UdpSocket> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        Ok(socket)
    };
    // One that asks from the same port for ever, and a new one for each question.
    let kept = open()?;
    let mut id = 0u16;
    while load.goes_on() {
        id = id.wrapping_add(1);
        ask_dns(&kept, to, id).context("over the same socket")?;
        let theirs = ask_dns(&open()?, to, id).context("over a new socket")?;
        if theirs { &answers.theirs } else { &answers.ours }.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn slice(ip: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {{name: kube-dns-coredns, namespace: kube-system, labels: {{kubernetes.io/service-name: kube-dns}}}}\n\
         endpoints: [{{addresses: [\"{ip}\"], conditions: {{ready: true}}, nodeName: n1, targetRef: {{kind: Pod, name: coredns, namespace: kube-system}}}}]\n\
         ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]\n"
    )
}

fn agents(cluster: &Cluster) -> Result<Vec<i32>> {
    let of = |node: &str| -> Result<Vec<i32>> {
        let system = machine::lab_cgroup(cluster.name())?.join("nodes").join(node).join("system");
        let is_agent = |pid: &i32| machine::command_line(*pid).get(1).is_some_and(|word| word == "agent");
        Ok(machine::processes_below(&system).into_iter().filter(is_agent).collect())
    };
    Ok(NODES.iter().map(|node| of(node)).collect::<Result<Vec<_>>>()?.concat())
}

/// Writes a Corefile with a host of its own and a stub zone that the server in the pod answers; waits until both are so.
fn corefile_is(cluster: &Cluster, host: &str, stub: &str) -> Result<()> {
    let corefile = format!(
        ".:53 {{\n  errors\n  kubernetes cluster.local in-addr.arpa ip6.arpa {{\n    pods insecure\n  }}\n  hosts {{\n    {host} pinned.test\n    \
         fallthrough\n  }}\n  template IN A odd.test\n  forward . /etc/resolv.conf\n}}\nstub.test:53 {{\n  forward . {stub}\n}}\n"
    );
    let object = serde_json::json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "coredns", "namespace": "kube-system"},
        "data": {"Corefile": corefile},
    });
    cluster.apply_text(&object.to_string())?;
    for (name, address) in [("pinned.test", host), ("a.stub.test", "192.0.2.53")] {
        wait(&format!("{name} to be {address}"), Duration::from_secs(10), || {
            let said = cluster.exec("shell", &format!("timeout 5 nslookup -type=a {name}"))?;
            if said.out.contains(address) { Ok(()) } else { bail!("{}", said.all()) }
        })?;
    }
    let told = said_by_nodes(cluster, "hints")?;
    ensure!(
        told.iter().all(|hints| hints.contains("template IN A odd.test")),
        "what is not done is not named: {told:?}"
    );
    Ok(())
}

fn dns_hand_over_and_back(cluster: &Cluster, coredns: &str, answers: &Answers) -> Result<()> {
    let count = || (answers.theirs.load(Ordering::Relaxed), answers.ours.load(Ordering::Relaxed));
    let more = |before: (usize, usize)| {
        wait("answers", Duration::from_secs(5), || {
            let now = count();
            ensure!(now.0 + now.1 >= before.0 + before.1 + TELLING, "from {before:?} to {now:?}");
            Ok(now)
        })
    };
    let answered_by = |theirs: bool| {
        wait("another to answer", LET_GO_OF, || {
            let before = count();
            let after = more(before)?;
            let (of_theirs, of_ours) = (after.0 - before.0, after.1 - before.1);
            // CoreDNS stays the server of flows that it had, as long as it is there.
            let right = if theirs { of_ours == 0 } else { of_ours > 4 * of_theirs };
            ensure!(right, "who answers: {before:?} to {after:?}");
            Ok(())
        })
    };
    answered_by(false)?;
    println!("CoreDNS comes");
    cluster.apply_text(&slice(coredns))?;
    let took = in_charge(cluster, "dns", "coredns")?;
    ensure!(took > Duration::from_secs(8), "it was given DNS after {took:?}, before it can have settled");
    answered_by(true)?;
    println!("it goes");
    let gone = cluster.try_kubectl(&["delete", "endpointslice", "-n", "kube-system", "kube-dns-coredns"])?;
    ensure!(gone.status.success(), "{}", String::from_utf8_lossy(&gone.stderr));
    in_charge(cluster, "dns", "stand-in")?;
    answered_by(false)?;
    println!("it comes back, and dns: towpath");
    cluster.apply_text(&slice(coredns))?;
    cluster.apply_text(&network_config("{dns: towpath}"))?;
    in_charge(cluster, "dns", "towpath")?;
    answered_by(false)?;
    println!("it answers by CoreDNS's configuration, and follows it");
    let agents = agents(cluster)?;
    corefile_is(cluster, "192.0.2.77", coredns)?;
    corefile_is(cluster, "192.0.2.78", coredns)?;
    ensure!(agents == self::agents(cluster)?, "an agent was started again for it");
    println!("dns: auto");
    cluster.apply_text(&network_config("{dns: auto}"))?;
    in_charge(cluster, "dns", "coredns")?;
    answered_by(true)
}

#[test]
fn cluster_dns_changes_hands_and_no_question_is_without_an_answer() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-modes-dns", 2, Families::Ipv4)?;
    let pod = |name: &str, node: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  nodeName: {node}\n  \
             containers: [{{name: shell, image: busybox, command: [sleep, \"86400\"]}}]\n---\n"
        )
    };
    cluster.apply_text(&format!("{}{}{}", pod("coredns", "n1"), pod("near", "n1"), pod("far", "n2")))?;
    cluster.apply_text(&pod("shell", "n2"))?;
    cluster.wait_pod("shell")?;
    let [coredns, near, far] = ["coredns", "near", "far"].map(|name| cluster.wait_pod(name));
    let (coredns, near, far) = (coredns?, near?, far?);
    let listed = cluster.try_kubectl(&["get", "svc", "kube-dns", "-n", "kube-system", "-o", "json"])?;
    let service: Value = serde_json::from_slice(&listed.stdout)?;
    let to = SocketAddr::new(address(&field(&service, "/spec/clusterIP"))?, 53);
    let at = [Place::of_pod(&cluster, &coredns)?, Place::of_pod(&cluster, &near)?, Place::of_pod(&cluster, &far)?];
    let [server, near, far] = &at;
    let (load, served, answers) =
        (Load::default(), Load::default(), Answers { theirs: AtomicUsize::new(0), ours: AtomicUsize::new(0) });
    let in_pod = format!(
        "n=0; while [ ! -e /tmp/over ]; do n=$((n+1)); timeout 5 nslookup -type=a {NAME} {} >/dev/null || echo NAMELESS $n; done; \
         echo TRIED $n",
        to.ip()
    );
    let (done, outcomes) = std::thread::scope(|scope| {
        let (load, answers, cluster) = (&load, &answers, &cluster);
        let served = &served;
        let behind = scope.spawn(move || server.enter(|| serve_dns(served)));
        let threads = [
            ("near", scope.spawn(move || near.enter(|| keep_asking(load, answers, to)))),
            ("far", scope.spawn(move || far.enter(|| keep_asking(load, answers, to)))),
            (
                "a pod's own sockets",
                scope.spawn(|| {
                    let said = cluster.exec("shell", &in_pod)?;
                    ensure!(said.out.contains("TRIED") && !said.out.contains("NAMELESS"), "{}", said.all());
                    Ok(())
                }),
            ),
        ];
        let done = dns_hand_over_and_back(cluster, &coredns.ip, answers);
        load.over.store(true, Ordering::Relaxed);
        let _ = cluster.exec("shell", "touch /tmp/over");
        let outcomes = threads.map(|(what, thread)| (what, thread.join().map_err(|_| anyhow!("panicked"))));
        served.over.store(true, Ordering::Relaxed);
        let server = ("the server", behind.join().map_err(|_| anyhow!("panicked")));
        (done, outcomes.into_iter().chain([server]).collect::<Vec<_>>())
    });
    let mut problems: Vec<String> = done.err().map(|error| format!("{error:#}")).into_iter().collect();
    for (what, outcome) in outcomes {
        problems.extend(outcome.and_then(|inner| inner).err().map(|error| format!("{what}: {error:#}")));
    }
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    println!("answers of theirs {:?}, of ours {:?}", answers.theirs, answers.ours);
    cluster.down()
}
