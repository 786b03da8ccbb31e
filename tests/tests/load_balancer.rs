//! Addresses of load balancers in a lab: given, shared, refused and taken back; announced by one node, with real ARP and neighbour
//! discovery of the kernel that asks, and moved when that node is gone.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use towpath_datapath::net::packet::{Listen, PacketSocket};
use towpath_walkthrough::cluster::{Cluster, Driver, Families, Said, field, host, wait};
use towpath_walkthrough::log::{Log, Voice};
use towpath_walkthrough::machine::{self, Frozen, can_run_labs};
use towpath_walkthrough::place::Place;
use towpath_walkthrough::rows::balancer_address;

const PATIENCE: Duration = Duration::from_secs(10);
/// From the death of the node that announces an address to its announcement by another, as `docs/load-balancer.md` promises it.
const MOVED_WITHIN: Duration = Duration::from_secs(2);
/// So often it is measured.
const MOVES: usize = 4;

fn web(name: &str, node: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}-{node}, labels: {{app: {name}}}}}\nspec:\n  nodeName: {node}\n  \
         terminationGracePeriodSeconds: 0\n  containers: [{{name: web, image: nginx, ports: [{{containerPort: 80}}]}}]\n---\n"
    )
}

/// A Service of type LoadBalancer for `app: NAME`, with more lines of metadata and spec (each with its indentation).
fn service(name: &str, port: u16, metadata: &str, spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n{metadata}spec:\n  type: LoadBalancer\n  selector: {{app: web}}\n  \
         ports: [{{port: {port}, targetPort: 80}}]\n{spec}---\n"
    )
}

fn pool(name: &str, addresses: &str) -> String {
    format!(
        "apiVersion: towpath.dev/v1alpha1\nkind: AddressPool\nmetadata: {{name: {name}}}\nspec: {{addresses: [{addresses}]}}\n---\n"
    )
}

fn ingress(cluster: &Cluster, service: &str) -> Result<Vec<String>> {
    let object = cluster.get("svc", service)?;
    let list = object.pointer("/status/loadBalancer/ingress").and_then(Value::as_array).cloned().unwrap_or_default();
    Ok(list.iter().map(|entry| field(entry, "/ip")).collect())
}

fn underlay(cluster: &Cluster) -> Result<Place> {
    let path = format!("/run/netns/tp-{}-underlay", cluster.name());
    Place::of_netns("underlay", Path::new(&path))
}

fn mac(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// What the underlay's router hears of an address: answers and announcements, in ARP or neighbour discovery.
struct Ear {
    socket: PacketSocket,
    address: IpAddr,
}

impl Ear {
    /// In the thread's network namespace.
    fn open(address: IpAddr) -> Result<Self> {
        let device = nix::net::if_::if_nametoindex("nodes0").context("device nodes0")?;
        let listen = if address.is_ipv4() { Listen::Arp } else { Listen::NeighbourDiscovery };
        Ok(Self { socket: PacketSocket::open(device, listen)?, address })
    }

    /// The next device that says that it has the address; none when nothing more was said.
    fn next(&self) -> Result<Option<String>> {
        let mut frame = [0_u8; 2048];
        while let Some(length) = self.socket.receive(&mut frame)? {
            let frame = frame.get(..length).unwrap_or_default();
            // ARP, reply or announcement: the sender's address (a probe has none). A neighbour advertisement: the target.
            let says = match self.address {
                IpAddr::V4(v4) => frame.get(14 + 14..14 + 18) == Some(&v4.octets()),
                IpAddr::V6(v6) => frame.get(14 + 40) == Some(&136) && frame.get(62..62 + 16) == Some(&v6.octets()),
            };
            if says {
                return Ok(Some(mac(frame.get(6..12).unwrap_or_default())));
            }
        }
        Ok(None)
    }
}

/// Every device that answers when the underlay's router asks who has the address: the kernel asks anew, and all answers are collected, not
/// only the one that it believes.
fn who_answers(cluster: &Cluster, address: &str) -> Result<BTreeSet<String>> {
    let ip: IpAddr = address.parse()?;
    underlay(cluster)?.enter(|| {
        let ear = Ear::open(ip)?;
        let run = |program: &str, args: &[&str]| Command::new(program).args(args).output();
        run("ip", &["neigh", "del", address, "dev", "nodes0"])?;
        run("ping", &["-c", "1", "-W", "1", address])?;
        let mut answers = BTreeSet::new();
        while let Some(mac) = ear.next()? {
            answers.insert(mac);
        }
        Ok(answers)
    })
}

/// The node that announces an address freezes: until when another one tells the network, and which.
fn freezes(cluster: &Cluster, address: &str) -> Result<(Frozen, String, Duration)> {
    let first = announced_by_one(cluster, address)?;
    let (of_first, agent) = (mac_of(cluster, &first)?, machine::lab_agent(cluster.name(), &first)?);
    underlay(cluster)?.enter(|| {
        let ear = Ear::open(address.parse()?)?;
        let frozen = machine::freeze(agent)?;
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            match ear.next()? {
                Some(mac) if mac != of_first => return Ok((frozen, first, begun.elapsed())),
                Some(_) => {}
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        bail!("{first} is frozen and nobody announces {address}")
    })
}

fn mac_of(cluster: &Cluster, node: &str) -> Result<String> {
    let said = cluster.node(node, "ip -o link show eth0")?;
    let mut words = said.out.split_whitespace().skip_while(|word| *word != "link/ether");
    words.nth(1).map(str::to_owned).with_context(|| format!("eth0 of {node}: {}", said.all()))
}

/// The node that holds the Lease of an address.
fn holder(cluster: &Cluster, address: &str) -> Result<String> {
    let mut name = format!("towpath-lb-{}", address.replace(['.', ':'], "-"));
    if name.ends_with('-') {
        name.push('0');
    }
    let out = cluster.try_kubectl(&["get", "lease", "-n", "kube-system", &name, "-o", "json"])?;
    ensure!(out.status.success(), "no Lease {name}: {}", String::from_utf8_lossy(&out.stderr));
    let holder = field(&serde_json::from_slice(&out.stdout)?, "/spec/holderIdentity");
    ensure!(!holder.is_empty(), "nobody holds Lease {name}");
    Ok(holder)
}

/// Waits until one node answers for the address, the one that holds its Lease, and returns that node.
fn announced_by_one(cluster: &Cluster, address: &str) -> Result<String> {
    wait(&format!("one node to announce {address}"), PATIENCE, || {
        let node = holder(cluster, address)?;
        let answers = who_answers(cluster, address)?;
        let expected = mac_of(cluster, &node)?;
        if answers == BTreeSet::from([expected.clone()]) {
            Ok(node)
        } else {
            bail!("{answers:?} answer; {node}, which holds the Lease, is {expected}")
        }
    })
}

fn from_outside(cluster: &Cluster, address: &str, port: u16) -> Result<Said> {
    cluster.outside(&format!("curl -sS -m 4 http://{}:{port}/", host(address)))
}

fn answers_from_outside(cluster: &Cluster, address: &str, port: u16) -> Result<()> {
    wait(&format!("{address} port {port} from outside"), PATIENCE, || {
        let said = from_outside(cluster, address, port)?;
        if said.ok && said.out.contains("pod: ") { Ok(()) } else { bail!("{}", said.all()) }
    })
}

/// Runs `ip` where the network outside of the nodes is.
fn ip_outside(cluster: &Cluster, args: &[&str]) -> Result<()> {
    underlay(cluster)?.enter(|| {
        let out = std::process::Command::new("ip").args(args).output()?;
        ensure!(out.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(())
    })
}

fn kubectl(cluster: &Cluster, args: &[&str]) -> Result<String> {
    cluster.kubectl(&Log::new(Voice::Plain), args)
}

#[test]
fn one_node_announces_an_address_and_another_takes_over_when_it_is_gone() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-lb-moves", 3, Families::Dual)?;
    let pods: String = ["n1", "n2", "n3"].iter().map(|node| web("web", node)).collect();
    cluster.apply_text(&format!("{pods}{}", service("web", 80, "", "  ipFamilyPolicy: RequireDualStack\n")))?;
    cluster.wait_ready("app=web", 3)?;
    let addresses = wait("an address of each family", PATIENCE, || {
        let addresses = ingress(&cluster, "web")?;
        if addresses.len() == 2 { Ok(addresses) } else { bail!("{addresses:?}") }
    })?;
    for address in &addresses {
        answers_from_outside(&cluster, address, 80)?;
        announced_by_one(&cluster, address)?;
    }

    // Its node freezes: everything of it stops in the midst of what it does, and later goes on as if nothing had been.
    let mut moves = Vec::new();
    for address in addresses.iter().cycle().take(MOVES - 1) {
        let (frozen, _, took) = freezes(&cluster, address)?;
        moves.push(took);
        announced_by_one(&cluster, address)?;
        drop(frozen);
    }
    let address = addresses.first().context("an address")?;
    let (frozen, first, took) = freezes(&cluster, address)?;
    moves.push(took);
    println!("announced by another node after {moves:?}");
    ensure!(moves.iter().all(|took| *took <= MOVED_WITHIN), "announced by another node after {moves:?}");
    let second = holder(&cluster, address)?;
    answers_from_outside(&cluster, address, 80)?;
    for number in 0..20 {
        let said = from_outside(&cluster, address, 80)?;
        ensure!(said.ok, "request {number} after {second} took over: {}", said.all());
    }
    ensure!(announced_by_one(&cluster, address)? == second, "and nobody else");
    drop(frozen);
    // It thinks that it holds the Lease until it has asked; it must not answer meanwhile.
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        let answers = who_answers(&cluster, address)?;
        ensure!(answers == BTreeSet::from([mac_of(&cluster, &second)?]), "{first} woke up, and {answers:?} answer");
    }

    // Killed, and started again by the supervisor: whoever has it then, requests go on and one node answers.
    let now = holder(&cluster, address)?;
    machine::kill(machine::lab_agent(cluster.name(), &now)?)?;
    let until = Instant::now() + Duration::from_secs(4);
    let mut asked = 0;
    while Instant::now() < until {
        let said = from_outside(&cluster, address, 80)?;
        ensure!(said.ok, "request {asked} while the agent of {now} was dead: {}", said.all());
        asked += 1;
    }
    ensure!(asked > 10, "only {asked} requests");
    for address in &addresses {
        announced_by_one(&cluster, address)?;
    }
    cluster.down()
}

/// The agent of a node has no way to the API server, or has it again: a neighbour entry that leads to nobody.
fn cut_off(cluster: &Cluster, node: &str, server: &str, cut: bool) -> Result<()> {
    let line = if cut {
        format!("ip neigh replace {server} lladdr 02:00:00:00:00:99 dev eth0 nud permanent")
    } else {
        format!("ip neigh del {server} dev eth0")
    };
    let said = cluster.node(node, &line)?;
    ensure!(said.ok, "{line} on {node}: {}", said.all());
    Ok(())
}

/// Address of the API server, as the agent of a node has it.
fn api_server(cluster: &Cluster, node: &str) -> Result<String> {
    let said = cluster.node(node, "ss -Htn state established '( dport = :6443 )' | head -1")?;
    let peer = said.out.split_whitespace().last().with_context(|| format!("no connection to it: {}", said.all()))?;
    Ok(peer.rsplit_once(':').context("no port")?.0.to_owned())
}

/// Kills the agent of a node and waits until the next one is ready without the API server.
fn restart_alone(cluster: &Cluster, node: &str) -> Result<()> {
    let before = machine::lab_agent(cluster.name(), node)?;
    machine::kill(before)?;
    wait("another agent that goes on with what was known", Duration::from_secs(40), || {
        ensure!(machine::lab_agent(cluster.name(), node)? != before, "process {before} is still there");
        let output =
            Command::new(cluster.towpath()).args(["status", "--lab", cluster.name(), "-o", "json"]).output()?;
        let all: Value = serde_json::from_slice(&output.stdout).context("towpath status")?;
        let of_node = all.as_array().into_iter().flatten().find(|answer| field(answer, "/node") == node);
        let status = of_node.and_then(|answer| answer.get("status")).context("no answer")?;
        ensure!(status.get("ready") == Some(&Value::Bool(true)), "{status}");
        ensure!(status.to_string().contains("earlier run"), "it has the API server: {status}");
        Ok(())
    })
}

/// Waits until a node has on its disk what its agent goes on with alone: the Service with its address, the endpoint, and that it announces it.
fn has_kept(cluster: &Cluster, node: &str, address: &str, endpoint: &str) -> Result<()> {
    let state = Path::new("/var/lib/towpath/lab").join(cluster.name()).join("nodes").join(node).join("towpath");
    let service = format!(r#""load_balancer_ips":["{address}"],"load_balancer_class":null,"balanced_by_us":true"#);
    let endpoint = format!(r#"{{"address":"{endpoint}","conditions":{{"ready":true"#);
    let kept = [
        ("last-known/services.jsonl", service),
        ("last-known/endpointslices.jsonl", endpoint),
        ("announced.json", format!("\"{address}\"")),
    ];
    wait(&format!("{node} to have kept what it knows"), Duration::from_secs(30), || {
        for (file, text) in &kept {
            let path = state.join(file);
            let found = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            ensure!(found.contains(text), "{}: no {text} in {found}", path.display());
        }
        Ok(())
    })
}

#[test]
fn an_agent_that_starts_without_the_api_server_announces_what_it_held_and_nothing_that_another_has() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-lb-alone", 2, Families::Ipv4)?;
    cluster.apply_text(&(web("web", "n1") + &service("web", 80, "", "")))?;
    let endpoint = cluster.wait_ready("app=web", 1)?.pop().context("a pod")?.ip;
    let address = balancer_address(&cluster, "web")?;
    answers_from_outside(&cluster, &address, 80)?;
    let first = announced_by_one(&cluster, &address)?;
    let second = if first == "n1" { "n2" } else { "n1" };
    wait("the Event that says who announces it", PATIENCE, || {
        let said = told(&cluster, "web", "nodeAssigned")?;
        let wanted = format!("announcing {address} from node \"{first}\" with protocol \"layer2\"");
        if said.contains(&wanted) { Ok(()) } else { bail!("{said:?}") }
    })?;
    let shown = Command::new(cluster.towpath())
        .env("KUBECONFIG", cluster.kubeconfig())
        .args(["service", "show", "default/web", "-o", "json"])
        .output()?;
    let shown: Value = serde_json::from_slice(&shown.stdout).context("towpath service show")?;
    ensure!(field(&shown, "/announced/0/node") == first, "{shown}");

    has_kept(&cluster, &first, &address, &endpoint)?;
    let server = api_server(&cluster, &first)?;
    // The one that stands by first: it is not to take over meanwhile.
    for node in [second, first.as_str()] {
        cut_off(&cluster, node, &server, true)?;
    }
    let of_first = BTreeSet::from([mac_of(&cluster, &first)?]);
    wait("the last holder to go on alone", PATIENCE, || {
        let answers = who_answers(&cluster, &address)?;
        if answers == of_first { Ok(()) } else { bail!("{answers:?}") }
    })?;
    restart_alone(&cluster, &first)?;
    wait("it to announce the address again", PATIENCE, || {
        let answers = who_answers(&cluster, &address)?;
        if answers == of_first { Ok(()) } else { bail!("{answers:?}") }
    })?;

    // The other one takes over while the first is cut off and dead; then the API server is gone for both.
    let frozen = machine::freeze(machine::lab_agent(cluster.name(), &first)?)?;
    cut_off(&cluster, second, &server, false)?;
    wait("the other one to take over", Duration::from_secs(60), || {
        let node = holder(&cluster, &address)?;
        if node == second { Ok(()) } else { bail!("{node}") }
    })?;
    announced_by_one(&cluster, &address)?;
    cut_off(&cluster, second, &server, true)?;
    // Dead, not thawed: it would go on answering, and neither of two that hear each other announces without the API server.
    restart_alone(&cluster, &first)?;
    std::mem::forget(frozen);
    let of_second = BTreeSet::from([mac_of(&cluster, second)?]);
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        let answers = who_answers(&cluster, &address)?;
        ensure!(answers == of_second, "{second} has it, and {answers:?} answer");
    }
    for node in [first.as_str(), second] {
        cut_off(&cluster, node, &server, false)?;
    }
    announced_by_one(&cluster, &address)?;
    // The router is the API server's host, so the outside was cut off, too.
    answers_from_outside(&cluster, &address, 80)?;
    cluster.down()
}

#[test]
fn with_the_policy_local_the_address_is_where_an_endpoint_is() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-lb-local", 3, Families::Ipv4)?;
    cluster.apply_text(&format!(
        "{}{}",
        web("web", "n1"),
        service("web", 80, "", "  externalTrafficPolicy: Local\n")
    ))?;
    cluster.wait_ready("app=web", 1)?;
    let address = balancer_address(&cluster, "web")?;
    let at = |node: &str| {
        wait(&format!("{address} at {node}"), PATIENCE, || {
            let by = announced_by_one(&cluster, &address)?;
            if by == node { Ok(()) } else { bail!("{by} announces it") }
        })
    };
    at("n1")?;
    answers_from_outside(&cluster, &address, 80)?;
    let said = from_outside(&cluster, &address, 80)?;
    ensure!(said.out.contains("client: 192.168.26.10:"), "the client's own address is seen: {}", said.out);

    kubectl(&cluster, &["delete", "pod", "web-n1"])?;
    wait("nobody to announce it", PATIENCE, || {
        let answers = who_answers(&cluster, &address)?;
        if answers.is_empty() { Ok(()) } else { bail!("{answers:?} answer without an endpoint") }
    })?;
    cluster.apply_text(&web("web", "n2"))?;
    cluster.wait_ready("app=web", 1)?;
    at("n2")?;
    answers_from_outside(&cluster, &address, 80)?;
    cluster.down()
}

/// Notes of the Events on a Service with that reason.
fn told(cluster: &Cluster, service: &str, reason: &str) -> Result<Vec<String>> {
    let out = cluster.try_kubectl(&["get", "events", "-o", "json"])?;
    let value: Value = serde_json::from_slice(&out.stdout).context("get events")?;
    let events = value.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
    let of = |event: &&Value| {
        field(event, "/involvedObject/name") == service
            && field(event, "/involvedObject/kind") == "Service"
            && field(event, "/reason") == reason
    };
    Ok(events.iter().filter(of).map(|event| field(event, "/message")).collect())
}

#[test]
fn a_full_pool_is_said_and_what_is_freed_is_given_to_who_waits() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-lb-pool", 2, Families::Ipv4)?;
    kubectl(&cluster, &["delete", "addresspool", "lab"])?;
    cluster.apply_text(&format!("{}{}", web("web", "n1"), pool("small", "192.168.255.230/32")))?;
    cluster.wait_ready("app=web", 1)?;
    cluster.apply_text(&service("first", 80, "", ""))?;
    ensure!(balancer_address(&cluster, "first")? == "192.168.255.230");
    answers_from_outside(&cluster, "192.168.255.230", 80)?;
    cluster.apply_text(&service("second", 80, "", ""))?;
    wait("the Event that the pool is full", PATIENCE, || {
        let said = told(&cluster, "second", "AddressPoolFull")?;
        if said.iter().any(|note| note.contains("AddressPool small") && note.contains("spec.addresses")) {
            Ok(())
        } else {
            bail!("{said:?}")
        }
    })?;
    ensure!(ingress(&cluster, "second")?.is_empty());
    wait("the pool's status", PATIENCE, || {
        let pool = cluster.get("addresspool", "small")?;
        let counts = ["total", "assigned", "available"].map(|count| field(&pool, &format!("/status/{count}")));
        if counts == ["1", "1", "0"] { Ok(()) } else { bail!("{counts:?}") }
    })?;

    // Another type is no load balancer any more.
    let plain = r#"{"spec": {"type": "ClusterIP"}}"#;
    kubectl(&cluster, &["patch", "svc", "first", "--type=merge", "-p", plain])?;
    ensure!(balancer_address(&cluster, "second")? == "192.168.255.230", "freed, and given");
    wait("the first one's status to be empty", PATIENCE, || {
        let left = ingress(&cluster, "first")?;
        if left.is_empty() { Ok(()) } else { bail!("{left:?}") }
    })?;
    answers_from_outside(&cluster, "192.168.255.230", 80)?;

    // A controller that starts again takes nothing away; a pool that goes does.
    let pid = wait("the controller", PATIENCE, || controller(&cluster))?;
    machine::kill(pid)?;
    wait("another controller", Duration::from_secs(30), || {
        let now = controller(&cluster)?;
        if now == pid { bail!("process {pid} is still there") } else { Ok(()) }
    })?;
    ensure!(ingress(&cluster, "second")? == ["192.168.255.230"]);
    kubectl(&cluster, &["delete", "addresspool", "small"])?;
    // The next one leads when the dead one's Lease has run out.
    wait("the address to be taken back", Duration::from_secs(30), || {
        let left = ingress(&cluster, "second")?;
        if left.is_empty() { Ok(()) } else { bail!("{left:?}") }
    })?;
    wait("nobody to announce it", PATIENCE, || {
        let answers = who_answers(&cluster, "192.168.255.230")?;
        if answers.is_empty() { Ok(()) } else { bail!("{answers:?}") }
    })?;
    cluster.down()
}

fn controller(cluster: &Cluster) -> Result<i32> {
    let nodes = machine::lab_cgroup(cluster.name())?.join("nodes");
    let is_one = |pid: &i32| machine::command_line(*pid).iter().any(|word| word == "controller");
    machine::processes_below(&nodes).into_iter().find(is_one).context("no controller runs")
}

#[test]
fn an_address_that_another_machine_has_is_announced_when_it_is_free_and_a_deleted_lease_moves_nothing() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-lb-taken", 2, Families::Ipv4)?;
    // The kernel of another machine answers for it.
    let taken = "192.168.255.245";
    ip_outside(&cluster, &["addr", "add", &format!("{taken}/32"), "dev", "nodes0"])?;
    let wants = format!("  annotations: {{towpath.dev/load-balancer-ips: {taken}}}\n");
    cluster.apply_text(&(web("web", "n1") + &service("web", 80, &wants, "")))?;
    cluster.wait_ready("app=web", 1)?;
    ensure!(balancer_address(&cluster, "web")? == taken);
    wait("the Event that it is in use", PATIENCE, || {
        let out = cluster.try_kubectl(&["get", "events", "-A", "-o", "json"])?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        if said.contains("AddressInUse") && said.contains(taken) { Ok(()) } else { bail!("no Event AddressInUse") }
    })?;
    std::thread::sleep(Duration::from_secs(2));
    ensure!(holder(&cluster, taken).is_err(), "nobody announces what a stranger has");
    ip_outside(&cluster, &["addr", "del", &format!("{taken}/32"), "dev", "nodes0"])?;
    let node = announced_by_one(&cluster, taken)?;
    answers_from_outside(&cluster, taken, 80)?;

    // Whoever held it makes it again; the other node waits.
    for _ in 0..3 {
        kubectl(&cluster, &["delete", "lease", "-n", "kube-system", "towpath-lb-192-168-255-245"])?;
        let until = Instant::now() + Duration::from_millis(1200);
        while Instant::now() < until {
            let answers = who_answers(&cluster, taken)?;
            ensure!(answers.len() <= 1, "its Lease was deleted, and {answers:?} answer");
        }
    }
    ensure!(announced_by_one(&cluster, taken)? == node, "it did not move");

    // A tenant who takes our name off the status, and claims the address for another Service, changes nothing.
    if cluster.driver() == Driver::Kubectl {
        kubectl(&cluster, &["patch", "svc", "web", "--type=merge", "-p", r#"{"metadata": {"managedFields": [{}]}}"#])?;
        let thief = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: thief}}\nspec: {{ports: [{{port: 80}}], externalIPs: [{taken}]}}\n"
        );
        cluster.apply_text(&thief)?;
        wait("our name to be on the status again", PATIENCE, || {
            let fields = cluster.try_kubectl(&["get", "svc", "web", "-o", "json", "--show-managed-fields"])?;
            let fields = String::from_utf8_lossy(&fields.stdout).into_owned();
            if fields.contains("towpath-load-balancer") { Ok(()) } else { bail!("{fields}") }
        })?;
        ensure!(ingress(&cluster, "web")? == [taken], "{:?}", ingress(&cluster, "web")?);
        ensure!(announced_by_one(&cluster, taken)? == node, "it did not move");
        answers_from_outside(&cluster, taken, 80)?;
    }
    cluster.down()
}

#[test]
fn an_address_is_shared_by_those_who_say_so_and_anothers_status_is_left_alone() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-lb-share", 2, Families::Ipv4)?;
    if cluster.driver() != Driver::Kubectl {
        // A status is written by hand below.
        return cluster.down();
    }
    let key = "  annotations: {towpath.dev/allow-shared-ip: together}\n";
    let shared = service("http", 80, key, "") + &service("alt", 8080, key, "") + &service("alone", 80, "", "");
    cluster.apply_text(&(web("web", "n1") + &shared))?;
    cluster.wait_ready("app=web", 1)?;
    let address = balancer_address(&cluster, "http")?;
    ensure!(balancer_address(&cluster, "alt")? == address, "the same key");
    ensure!(balancer_address(&cluster, "alone")? != address, "no key");
    answers_from_outside(&cluster, &address, 80)?;
    answers_from_outside(&cluster, &address, 8080)?;
    // Both want one port: one of them must go elsewhere.
    let clash = r#"{"spec": {"ports": [{"port": 80, "targetPort": 80}]}}"#;
    kubectl(&cluster, &["patch", "svc", "alt", "--type=merge", "-p", clash])?;
    wait("them to part", PATIENCE, || {
        let (http, alt) = (ingress(&cluster, "http")?, ingress(&cluster, "alt")?);
        let one_stays = http == [address.clone()] || alt == [address.clone()];
        if one_stays && http.len() == 1 && alt.len() == 1 && alt != http { Ok(()) } else { bail!("{http:?} {alt:?}") }
    })?;

    // A requested address, and one that cannot be had.
    let wants = |ip: &str| format!("  annotations: {{towpath.dev/load-balancer-ips: {ip}}}\n");
    cluster.apply_text(&service("asks", 80, &wants("192.168.255.250"), ""))?;
    ensure!(balancer_address(&cluster, "asks")? == "192.168.255.250");
    cluster.apply_text(&service("asks-too", 80, &wants("192.168.255.250"), ""))?;
    wait("the Event that it is taken", PATIENCE, || {
        let said = told(&cluster, "asks-too", "RequestedAddressRefused")?;
        if said.iter().any(|note| note.contains("in use by Service default/asks")) { Ok(()) } else { bail!("{said:?}") }
    })?;

    // Others: one by its class, one by what it wrote.
    cluster.apply_text(&service("theirs", 80, "", "  loadBalancerClass: example.com/other\n"))?;
    kubectl(&cluster, &["delete", "addresspool", "lab"])?;
    wait("all to be taken back", PATIENCE, || {
        let left = ingress(&cluster, "http")?;
        if left.is_empty() { Ok(()) } else { bail!("{left:?}") }
    })?;
    let theirs = r#"{"status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.7", "ipMode": "VIP"}]}}}"#;
    kubectl(&cluster, &["patch", "svc", "alone", "--subresource=status", "--type=merge", "-p", theirs])?;
    cluster.apply_text(&pool("again", "192.168.255.240-192.168.255.250"))?;
    balancer_address(&cluster, "http")?;
    ensure!(ingress(&cluster, "alone")? == ["198.51.100.7"], "it is another implementation's");
    ensure!(ingress(&cluster, "theirs")?.is_empty(), "its class is another implementation's");
    cluster.down()
}
